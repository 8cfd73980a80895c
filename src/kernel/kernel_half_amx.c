/* The 16-bit kernels in AVX512-FP16 and AMX.
 *
 * What bounds them: codes, the two vector ports (2 K + 5 operations on 64 scores of two keys) and the loads of Qt; dense and values, the
 * tile products (16 cycles for 16 x 16 x 32) as long as their operands come from the first-level cache: so a block of 32 x 32 outputs
 * stays in four tiles over all steps of a chunk, and everything that a block reads lies in one piece. */
#include "kernel/kernel_half.h"
#include "kernel/simd_amx.h"

#include <string.h>

static void begin(void) { _tile_loadconfig(&full_tiles); }
static void end(void) { _tile_release(); }

/* ---- Packing -------------------------------------------------------------------------------------------------------------------- */

ALWAYS __m512i magnitude_bits(__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }

/* bf16 of 16 floats in the low halves. */
ALWAYS __m512i bf16_low(__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }

static uint32_t pack_values(int32_t step, int32_t n, int32_t E, const float *values, int64_t stride, uint16_t *chunk) {
  __m512i largest = _mm512_setzero_si512();
  for (int32_t e = 0; e < sfa_half_padded(E); e += 16) {
    __mmask16 lanes = lanes_of(E - e);
    __m512i pairs[16]; /* of keys, in 32 bits; lanes are dimensions, and then the other way round */
    for (int32_t p = 0; p < 16; p++) {
      __m512 even = _mm512_maskz_loadu_ps(2 * p < n ? lanes : 0, values + (2 * p < n ? 2 * p * stride : 0) + e);
      __m512 odd = _mm512_maskz_loadu_ps(2 * p + 1 < n ? lanes : 0, values + (2 * p + 1 < n ? (2 * p + 1) * stride : 0) + e);
      largest = _mm512_max_epu32(largest, _mm512_max_epu32(magnitude_bits(even), magnitude_bits(odd)));
      pairs[p] = _mm512_or_si512(bf16_low(even), _mm512_slli_epi32(bf16_low(odd), 16));
    }
    vi_turn(pairs);
    for (int32_t r = 0; r < 16; r++)
      _mm512_storeu_si512(chunk + sfa_half_value_at(step, e + r, 0), pairs[r]);
  }
  return (uint32_t)_mm512_reduce_max_epu32(largest);
}

/* Interleaving 32 dimensions of two keys within 128 bits leaves 0..3, 8..11, ... in one vector of pairs, 4..7, 12..15, ... in the other. */
static uint32_t pack_values_bf16(int32_t step, int32_t n, int32_t E, const uint16_t *values, int64_t stride, uint16_t *chunk) {
  __m512i largest = _mm512_setzero_si512(); /* |value|, twice */
  for (int32_t e = 0; e < sfa_half_padded(E); e += 32) {
    __mmask32 lanes = E - e >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << (E - e)) - 1;
    __m512i low[16], high[16];
    for (int32_t p = 0; p < 16; p++) {
      __m512i even = _mm512_maskz_loadu_epi16(2 * p < n ? lanes : 0, values + (2 * p < n ? 2 * p * stride : 0) + e);
      __m512i odd = _mm512_maskz_loadu_epi16(2 * p + 1 < n ? lanes : 0, values + (2 * p + 1 < n ? (2 * p + 1) * stride : 0) + e);
      largest = _mm512_max_epu16(largest, _mm512_max_epu16(_mm512_add_epi16(even, even), _mm512_add_epi16(odd, odd)));
      low[p] = _mm512_unpacklo_epi16(even, odd);
      high[p] = _mm512_unpackhi_epi16(even, odd);
    }
    vi_turn(low);
    vi_turn(high);
    for (int32_t r = 0; r < 16; r++) {
      uint16_t *to = chunk + sfa_half_value_at(step, e + r / 4 * 8 + r % 4, 0);
      _mm512_storeu_si512(to, low[r]);
      _mm512_storeu_si512(to + 4 * SFA_HALF_STEP, high[r]);
    }
  }
  __m512i most = _mm512_max_epu32(_mm512_slli_epi32(largest, 16), _mm512_and_si512(largest, _mm512_set1_epi32(-65536)));
  return _mm512_reduce_max_epu32(most) >> 1;
}

ALWAYS uint32_t larger_bits(uint32_t largest, __m512 squares) {
  float sum = _mm512_reduce_add_ps(squares);
  uint32_t bits;
  memcpy(&bits, &sum, sizeof bits);
  bits &= 0x7fffffffu;
  return bits > largest ? bits : largest;
}

static uint32_t pack_keys(int32_t step, int32_t n, int32_t D, const float *keys, int64_t stride, uint16_t *chunk) {
  uint32_t largest = 0;
  int32_t Dp = sfa_half_padded(D);
  for (int32_t j = 0; j < SFA_HALF_STEP; j++) {
    const float *row = keys + (j < n ? j * stride : 0);
    __m512 squares = _mm512_setzero_ps();
    for (int32_t u = 0; u < Dp; u += 32) {
      __m512 low = _mm512_maskz_loadu_ps(j < n ? lanes_of(D - u) : 0, row + u);
      __m512 high = _mm512_maskz_loadu_ps(j < n ? lanes_of(D - u - 16) : 0, row + u + 16);
      squares = _mm512_fmadd_ps(high, high, _mm512_fmadd_ps(low, low, squares));
      _mm512_storeu_si512(chunk + sfa_half_key_at(Dp, step, j, u), (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    largest = larger_bits(largest, squares);
  }
  return largest;
}

static uint32_t pack_codes(int32_t step, int32_t n, int32_t K, const void *ids, int32_t id_bytes, const float *key_values, int32_t W,
                           uint32_t *values, uint16_t *offsets) {
  /* a0 b0 a1 b1 ... of two vectors of 32 bits */
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const __m512i row_bytes = _mm512_set1_epi32(W * 2);
  uint32_t largest = 0;
  for (int32_t p = 0; p < SFA_HALF_STEP / 2; p++) {
    int64_t out = (int64_t)(step * SFA_HALF_STEP / 2 + p) * K * 2;
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int32_t u = 0; u < K; u += 16) {
      __mmask16 lanes = lanes_of(K - u);
      __m512i twice[2], offset[2];
      for (int32_t side = 0; side < 2; side++) {
        __mmask16 present = 2 * p + side < n ? lanes : 0;
        int64_t at = (int64_t)(present ? 2 * p + side : 0) * K + u;
        __m512 k = _mm512_maskz_loadu_ps(present, key_values + at);
        __m512i half = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(k, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        __m512i id = id_bytes == 1 ? _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(present, (const uint8_t *)ids + at))
                                   : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, (const uint16_t *)ids + at));
        twice[side] = _mm512_or_si512(half, _mm512_slli_epi32(half, 16));
        offset[side] = _mm512_mullo_epi32(id, row_bytes);
        squares[side] = _mm512_fmadd_ps(k, k, squares[side]);
      }
      uint32_t lanes_twice = lanes == 0xffff ? 0xffffffffu : (1u << 2 * (K - u)) - 1;
      __m512i low = _mm512_permutex2var_epi32(twice[0], first, twice[1]), high = _mm512_permutex2var_epi32(twice[0], second, twice[1]);
      _mm512_mask_storeu_epi32(values + out + 2 * u, (__mmask16)lanes_twice, low);
      _mm512_mask_storeu_epi32(values + out + 2 * u + 16, (__mmask16)(lanes_twice >> 16), high);
      /* pairs of 16 bits are one number of 32 */
      _mm512_mask_storeu_epi32(offsets + out + 2 * u, lanes, _mm512_or_si512(offset[0], _mm512_slli_epi32(offset[1], 16)));
    }
    largest = larger_bits(larger_bits(largest, squares[0]), squares[1]);
  }
  return largest;
}

/* ---- Queries -------------------------------------------------------------------------------------------------------------------- */

ALWAYS __m512i to_f16(__m512 low, __m512 high) {
  __m256i a = _mm512_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256i b = _mm512_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

static void query_codes(int32_t first, int32_t n, int32_t D, const float *Qt, float factor, int32_t W, uint16_t *out, float *squares) {
  const __m512 times = _mm512_set1_ps(factor);
  for (int32_t i = 0; i < n; i += 32) {
    __mmask16 upper = lanes_of(n - i - 16);
    __m512 low_squares = _mm512_setzero_ps(), high_squares = _mm512_setzero_ps();
    for (int32_t u = 0; u < D; u++) {
      const float *row = Qt + (int64_t)u * n + i;
      __m512 low = _mm512_mul_ps(_mm512_loadu_ps(row), times), high = _mm512_mul_ps(_mm512_maskz_loadu_ps(upper, row + 16), times);
      low_squares = _mm512_fmadd_ps(low, low, low_squares);
      high_squares = _mm512_fmadd_ps(high, high, high_squares);
      _mm512_storeu_si512(out + (int64_t)u * W + first + i, to_lanes(to_f16(low, high)));
    }
    _mm512_storeu_ps(squares + i, low_squares);
    _mm512_mask_storeu_ps(squares + i + 16, upper, high_squares);
  }
}

static void query_sparse(int32_t first, int32_t n, int32_t D, int32_t K, const void *const *ids, const float *const *values, float factor,
                         int32_t W, uint16_t *out, float *squares) {
  const __m512 times = _mm512_set1_ps(factor);
  for (int32_t u = 0; u < D; u++)
    for (int32_t i = 0; i < n; i += 32)
      _mm512_storeu_si512(out + (int64_t)u * W + first + i, _mm512_setzero_si512());
  for (int32_t i = 0; i < n; i++) {
    const uint8_t *features = ids[i];
    uint16_t *lane = out + sfa_half_lane(first + i), halves[16];
    __m512 sum = _mm512_setzero_ps();
    for (int32_t u = 0; u < K; u += 16) {
      __m512 q = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes_of(K - u), values[i] + u), times);
      sum = _mm512_fmadd_ps(q, q, sum);
      _mm256_storeu_si256((__m256i *)halves, _mm512_cvtps_ph(q, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      for (int32_t s = 0; s < 16 && u + s < K; s++)
        lane[features[u + s] * W] = halves[s];
    }
    squares[i] = _mm512_reduce_add_ps(sum);
  }
}

static void query_dense(int32_t first, int32_t n, int32_t D, const float *Qt, float factor, uint16_t *out, float *squares) {
  const __m512 times = _mm512_set1_ps(factor);
  int32_t Dp = sfa_half_padded(D);
  for (int32_t i = 0; i < sfa_half_padded(n); i += 16) {
    __m512 sum = _mm512_setzero_ps();
    for (int32_t u = 0; u < Dp; u += 2) {
      const float *row = Qt + (int64_t)u * n + i;
      __mmask16 present = u < D && i < n ? 0xffff : 0; /* D is even */
      __m512 even = _mm512_mul_ps(_mm512_maskz_loadu_ps(present, row), times);
      __m512 odd = _mm512_mul_ps(_mm512_maskz_loadu_ps(present, row + n), times);
      sum = _mm512_fmadd_ps(odd, odd, _mm512_fmadd_ps(even, even, sum));
      _mm512_storeu_si512(out + sfa_half_query_at(Dp, first + i, u), _mm512_or_si512(bf16_low(even), _mm512_slli_epi32(bf16_low(odd), 16)));
    }
    if (i < n)
      _mm512_storeu_ps(squares + i, sum);
  }
}

/* ---- Weights -------------------------------------------------------------------------------------------------------------------- */

/* 32 weights from their t. near: no t is so low that the sum would be negative, nor so high that it would overflow. */
ALWAYS __m512i weights_of(__m512i t, __m512i table, bool near) {
  const __m512i above = _mm512_set1_epi16(0x3f00);
  __m512i line = _mm512_mask_permutexvar_epi8(above, 0x5555555555555555ull, _mm512_srli_epi16(t, 1), table);
  return near ? _mm512_add_epi16(t, line) : _mm512_max_epi16(_mm512_adds_epi16(t, line), _mm512_setzero_si512());
}

/* The rows of 32 that see key j, as lanes. */
ALWAYS __mmask32 seeing(const sfa_half_mask *mask, int32_t first_row, int32_t j) {
  __m512i key = _mm512_set1_epi16((int16_t)j);
  __mmask32 not_right = _mm512_cmple_epi16_mask(key, to_lanes(_mm512_loadu_si512(mask->hi + first_row)));
  __mmask32 not_left = _mm512_cmple_epi16_mask(to_lanes(_mm512_loadu_si512(mask->lo + first_row)), key);
  return not_right & (j < mask->n_always ? 0xffffffffu : not_left);
}

/* The weights of 32 rows for keys j and j + 1, t in the order of lanes, to their places in two tiles. */
ALWAYS void put_weights(__m512i t0, __m512i t1, int32_t first_row, int32_t j, bool far, const sfa_half_mask *mask, __m512i *top,
                        __m512i table, uint16_t *P) {
  if (mask) {
    const __m512i unseen = _mm512_set1_epi16(SFA_HALF_UNSEEN);
    t0 = _mm512_mask_mov_epi16(unseen, seeing(mask, first_row, j), t0);
    t1 = _mm512_mask_mov_epi16(unseen, seeing(mask, first_row, j + 1), t1);
  }
  if (far)
    *top = _mm512_max_epi16(*top, _mm512_max_epi16(t0, t1));
  __m512i even = weights_of(t0, table, !far && !mask), odd = weights_of(t1, table, !far && !mask);
  uint16_t *to = P + first_row / 32 * SFA_HALF_WEIGHTS_STRIDE + (j & ~31) * 32 + (j & 31) * 16; /* sfa_half_weight_at */
  _mm512_storeu_si512(to, _mm512_unpacklo_epi16(even, odd));
  _mm512_storeu_si512(to + 512, _mm512_unpackhi_epi16(even, odd));
}

ALWAYS __m512i load_top(const int16_t *top) { return to_lanes(_mm512_loadu_si512(top)); }
ALWAYS void store_top(int16_t *top, __m512i x) { _mm512_storeu_si512(top, from_lanes(x)); }

/* Two keys at a time over n vectors of 32 rows each: enough chains of sums to hide the latency of one. */
ALWAYS void weights_codes_of(const int n, const bool far, const bool masked, int32_t first_key, int32_t n_keys, int32_t K,
                             const uint32_t *values, const uint16_t *offsets, const uint16_t *Qt, const float *shift,
                             const sfa_half_mask *mask, int16_t *top, uint16_t *P) {
  const __m512i table = _mm512_loadu_si512(sfa_half_exp);
  __m512h start[8], even[8], odd[8];
  __m512i tops[8];
  for (int v = 0; v < n; v++) {
    start[v] = _mm512_setzero_ph();
    if (far) {
      __m512i m = to_lanes(to_f16(_mm512_loadu_ps(shift + 32 * v), _mm512_loadu_ps(shift + 32 * v + 16)));
      start[v] = (__m512h)_mm512_xor_si512(m, _mm512_set1_epi16(INT16_MIN));
      tops[v] = load_top(top + 32 * v);
    }
  }
  values += (int64_t)first_key * K;
  offsets += (int64_t)first_key * K;
  for (int32_t j = first_key; j < first_key + n_keys; j += 2) {
#pragma GCC unroll 8
    for (int v = 0; v < n; v++)
      even[v] = odd[v] = start[v];
    for (int32_t u = 0; u < K; u++, values += 2, offsets += 2) {
      const __m512h k0 = (__m512h)_mm512_set1_epi32((int32_t)values[0]), k1 = (__m512h)_mm512_set1_epi32((int32_t)values[1]);
      const char *q0 = (const char *)Qt + offsets[0], *q1 = (const char *)Qt + offsets[1];
#pragma GCC unroll 8
      for (int v = 0; v < n; v++)
        even[v] = _mm512_fmadd_ph(k0, _mm512_loadu_ph(q0 + 64 * v), even[v]);
#pragma GCC unroll 8
      for (int v = 0; v < n; v++)
        odd[v] = _mm512_fmadd_ph(k1, _mm512_loadu_ph(q1 + 64 * v), odd[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < n; v++)
      put_weights(_mm512_cvtph_epi16(even[v]), _mm512_cvtph_epi16(odd[v]), 32 * v, j, far, masked ? mask : NULL, &tops[v], table, P);
  }
  for (int v = 0; v < n && far; v++)
    store_top(top + 32 * v, tops[v]);
}

/* One call of a function with its number of vectors and kinds as constants. */
#define BY_KIND(function, n, ...)                                                                                                          \
  do {                                                                                                                                     \
    if (shift && mask)                                                                                                                     \
      function(n, true, true, __VA_ARGS__);                                                                                                \
    else if (shift)                                                                                                                        \
      function(n, true, false, __VA_ARGS__);                                                                                               \
    else if (mask)                                                                                                                         \
      function(n, false, true, __VA_ARGS__);                                                                                               \
    else                                                                                                                                   \
      function(n, false, false, __VA_ARGS__);                                                                                              \
  } while (0)

static void weights_codes(int32_t first_step, int32_t n_steps, int32_t K, const uint32_t *values, const uint16_t *offsets, int32_t W,
                          const uint16_t *Qt, const float *shift, const sfa_half_mask *mask, int16_t *top, uint16_t *P) {
  int32_t key = first_step * SFA_HALF_STEP, n_keys = n_steps * SFA_HALF_STEP;
  switch (W) {
  case 64: BY_KIND(weights_codes_of, 2, key, n_keys, K, values, offsets, Qt, shift, mask, top, P); break;
  case 128: BY_KIND(weights_codes_of, 4, key, n_keys, K, values, offsets, Qt, shift, mask, top, P); break;
  default: BY_KIND(weights_codes_of, 8, key, n_keys, K, values, offsets, Qt, shift, mask, top, P); break;
  }
}

/* A block of 32 keys and 32 rows at a time: its scores never leave the first-level cache. Packing those of rows 0..15 and 16..31 to 16
 * bits leaves them in the order of lanes. */
ALWAYS void weights_dense_of(const int n_tiles, const bool far, const bool masked, int32_t first_step, int32_t n_steps,
                             const uint16_t *keys, int32_t W, const uint16_t *Q, float unit, const float *shift, const sfa_half_mask *mask,
                             int16_t *top, uint16_t *P) {
  const __m512i table = _mm512_loadu_si512(sfa_half_exp);
  const __m512 units = _mm512_set1_ps(unit);
  const int32_t Dp = 32 * n_tiles;
  float S[32 * 32] __attribute__((aligned(64)));
  for (int32_t step = first_step; step < first_step + n_steps; step++)
    for (int32_t i = 0; i < W; i += 32) {
      const uint16_t *A = keys + sfa_half_key_at(Dp, step, 0, 0), *B = Q + sfa_half_query_at(Dp, i, 0);
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
#pragma GCC unroll 8
      for (int tile = 0; tile < n_tiles; tile++)
        TILE_BLOCK(A + tile * 512, 16 * Dp, B + tile * 1024);
      _tile_stored(0, S, 128);
      _tile_stored(1, S + 16, 128);
      _tile_stored(2, S + 16 * 32, 128);
      _tile_stored(3, S + 16 * 32 + 16, 128);
      __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
      __m512i tops = table;
      if (far) {
        low = _mm512_sub_ps(low, _mm512_loadu_ps(shift + i));
        high = _mm512_sub_ps(high, _mm512_loadu_ps(shift + i + 16));
        tops = load_top(top + i);
      }
      for (int32_t j = 0; j < SFA_HALF_STEP; j += 2) {
        __m512i t[2];
        for (int side = 0; side < 2; side++) {
          const float *s = S + (j + side) * 32;
          t[side] = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_load_ps(s), units, low)),
                                       _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_load_ps(s + 16), units, high)));
        }
        put_weights(t[0], t[1], i, step * SFA_HALF_STEP + j, far, masked ? mask : NULL, &tops, table, P);
      }
      if (far)
        store_top(top + i, tops);
    }
}

static void weights_dense(int32_t first_step, int32_t n_steps, int32_t D, const uint16_t *keys, int32_t W, const uint16_t *Q, float unit,
                          const float *shift, const sfa_half_mask *mask, int16_t *top, uint16_t *P) {
  switch (sfa_half_padded(D) / 32) {
  case 2: BY_KIND(weights_dense_of, 2, first_step, n_steps, keys, W, Q, unit, shift, mask, top, P); break;
  case 4: BY_KIND(weights_dense_of, 4, first_step, n_steps, keys, W, Q, unit, shift, mask, top, P); break;
  case 8: BY_KIND(weights_dense_of, 8, first_step, n_steps, keys, W, Q, unit, shift, mask, top, P); break;
  default: BY_KIND(weights_dense_of, sfa_half_padded(D) / 32, first_step, n_steps, keys, W, Q, unit, shift, mask, top, P);
  }
}

/* ---- Values --------------------------------------------------------------------------------------------------------------------- */

/* O^T of 32 dimensions and 32 rows += V^T P^T, over the steps of a chunk. sums: l of the rows too, by the vector units, which are idle. */
ALWAYS void product_block(const bool sums, int32_t n_steps, const uint16_t *A, const uint16_t *B, float *C, float *l) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  __m512 low[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, high[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  _tile_loadd(0, C, 64);
  _tile_loadd(1, C + 256, 64);
  _tile_loadd(2, C + 512, 64);
  _tile_loadd(3, C + 768, 64);
  for (int32_t step = 0; step < n_steps; step++, A += 1024, B += 1024) {
    TILE_BLOCK(A, 512, B);
    if (sums) {
#pragma GCC unroll 16
      for (int p = 0; p < 16; p++) {
        low[p % 2] = _mm512_dpbf16_ps(low[p % 2], (__m512bh)_mm512_loadu_si512(B + 32 * p), ones);
        high[p % 2] = _mm512_dpbf16_ps(high[p % 2], (__m512bh)_mm512_loadu_si512(B + 512 + 32 * p), ones);
      }
    }
  }
  _tile_stored(0, C, 64);
  _tile_stored(1, C + 256, 64);
  _tile_stored(2, C + 512, 64);
  _tile_stored(3, C + 768, 64);
  if (sums) {
    _mm512_storeu_ps(l, _mm512_add_ps(_mm512_loadu_ps(l), _mm512_add_ps(low[0], low[1])));
    _mm512_storeu_ps(l + 16, _mm512_add_ps(_mm512_loadu_ps(l + 16), _mm512_add_ps(high[0], high[1])));
  }
}

static void accumulate(int32_t first_step, int32_t n_steps, int32_t E, const uint16_t *V, int32_t W, const uint16_t *P, float *O,
                       float *l) {
  for (int32_t e = 0; e < E; e += 32)
    for (int32_t i = 0; i < W; i += 32) {
      const uint16_t *A = V + sfa_half_value_at(first_step, e, 0), *B = P + sfa_half_weight_at(first_step, i, 0);
      float *C = O + sfa_half_output_at(W, e, i);
      if (e == 0)
        product_block(true, n_steps, A, B, C, l + i);
      else
        product_block(false, n_steps, A, B, C, NULL);
    }
}

static void rescale(int32_t E, int32_t W, const float *factor, float *O, float *l) {
  for (int32_t i = 0; i < W; i += 16) {
    __m512 times = _mm512_loadu_ps(factor + i);
    _mm512_storeu_ps(l + i, _mm512_mul_ps(times, _mm512_loadu_ps(l + i)));
    if (_mm512_cmp_ps_mask(times, _mm512_set1_ps(1), _CMP_NEQ_UQ))
      for (int32_t e = 0; e < sfa_half_padded(E); e++) {
        float *o = O + sfa_half_output_at(W, e, i);
        _mm512_storeu_ps(o, _mm512_mul_ps(times, _mm512_loadu_ps(o)));
      }
  }
}

static void output_rows(int32_t first, int32_t n, int32_t E, int32_t W, const float *O, const float *scale, float *const *out) {
  for (int32_t i = 0; i < n; i += 16) {
    const __m512 times = _mm512_maskz_loadu_ps(lanes_of(n - i), scale + i);
    for (int32_t e = 0; e < E; e += 16) {
      const float *tile = O + sfa_half_output_at(W, e, first + i);
      __m512i rows[16];
      for (int32_t r = 0; r < 16; r++)
        rows[r] = _mm512_castps_si512(_mm512_fmadd_ps(_mm512_loadu_ps(tile + 16 * r), times, _mm512_setzero_ps()));
      vi_turn(rows);
      for (int32_t r = 0; r < 16 && i + r < n; r++)
        _mm512_mask_storeu_epi32(out[i + r] + e, lanes_of(E - e), rows[r]);
    }
  }
}

/* ---- Gradients ------------------------------------------------------------------------------------------------------------------ */

static void pack_patches(int32_t n, int32_t dim, const float *x, int64_t stride, bool right, uint16_t *straight, uint16_t *turned) {
  for (int32_t c = 0; c < dim; c += 32, straight += 1024, turned += turned ? 1024 : 0)
    patch_pack(n, dim - c, x + c, stride, right, straight, turned);
}

/* The lanes of 16 rows that see key j. */
ALWAYS __mmask16 rows_seeing(const int32_t *lo, const int32_t *hi, int32_t j, int32_t n_always) {
  __m512i key = _mm512_set1_epi32(j);
  __mmask16 not_left = j < n_always ? 0xffff : _mm512_cmple_epi32_mask(_mm512_loadu_si512(lo), key);
  return _mm512_mask_cmple_epi32_mask(not_left, key, _mm512_loadu_si512(hi));
}

/* A patch's weights and their gradients, 16 rows at a time: a half of key j's. */
ALWAYS void weigh_half(const float *S, const float *dP, __m512 unit, __m512 lse, __m512 delta, __mmask16 seen, __m512 *p, __m512 *d) {
  *p = _mm512_maskz_mov_ps(seen, vf_exp2(_mm512_fmsub_ps(_mm512_load_ps(S), unit, lse)));
  *d = _mm512_maskz_mul_ps(seen, *p, _mm512_sub_ps(_mm512_load_ps(dP), delta));
}

ALWAYS void weigh_patch(const bool masked, const float *S, const float *dP, float unit, const float *lse, const float *delta,
                        const int32_t *lo, const int32_t *hi, int32_t first_key, int32_t n_always, uint16_t *P, uint16_t *dS,
                        uint16_t *dS_keys) {
  const __m512 units = _mm512_set1_ps(unit), lse0 = _mm512_loadu_ps(lse), lse1 = _mm512_loadu_ps(lse + 16);
  const __m512 delta0 = _mm512_loadu_ps(delta), delta1 = _mm512_loadu_ps(delta + 16);
  for (int32_t r = 0; r < 32; r += 2) {
    __m512i d[2];
    for (int32_t side = 0; side < 2; side++) {
      const float *s = S + (r + side) * 32, *g = dP + (r + side) * 32;
      const int32_t j = first_key + r + side;
      __m512 p0, p1, d0, d1;
      weigh_half(s, g, units, lse0, delta0, masked ? rows_seeing(lo, hi, j, n_always) : 0xffff, &p0, &d0);
      weigh_half(s + 16, g + 16, units, lse1, delta1, masked ? rows_seeing(lo + 16, hi + 16, j, n_always) : 0xffff, &p1, &d1);
      d[side] = (__m512i)_mm512_cvtne2ps_pbh(d1, d0);
      _mm512_storeu_si512(P + (r + side) * 32, (__m512i)_mm512_cvtne2ps_pbh(p1, p0));
      _mm512_storeu_si512(dS + (r + side) * 32, d[side]);
    }
    interleave(d[0], d[1], &d[0], &d[1]);
    _mm512_storeu_si512(dS_keys + r * 16, d[0]);
    _mm512_storeu_si512(dS_keys + 512 + r * 16, d[1]);
  }
}

static void weights_backward(int32_t D, int32_t E, const uint16_t *K, const uint16_t *V, int32_t W, const uint16_t *Q, const uint16_t *dO,
                             float unit, const float *lse, const float *delta, const int32_t *lo, const int32_t *hi, int32_t n_always,
                             int64_t stride, uint16_t *P, uint16_t *dS, uint16_t *dS_keys) {
  const int32_t Dp = sfa_half_padded(D), Ep = sfa_half_padded(E);
  float S[32 * 32] __attribute__((aligned(64))), dP[32 * 32] __attribute__((aligned(64)));
  for (int32_t j = 0; j < 64; j += 32)
    for (int32_t i = 0; i < W; i += 32) {
      patch_sum(Dp / 32, K + sfa_half_patch_at(Dp, j, 0), Q + sfa_half_patch_at(Dp, i, 0), S);
      patch_sum(Ep / 32, V + sfa_half_patch_at(Ep, j, 0), dO + sfa_half_patch_at(Ep, i, 0), dP);
      int64_t at = j / 32 * stride + i / 32 * 1024;
      if (lo)
        weigh_patch(true, S, dP, unit, lse + i, delta + i, lo + i, hi + i, j, n_always, P + at, dS + at, dS_keys + at);
      else
        weigh_patch(false, S, dP, unit, lse + i, delta + i, NULL, NULL, j, 0, P + at, dS + at, dS_keys + at);
    }
}

static void add_product(int32_t n_i, int32_t n_j, int32_t n_steps, const uint16_t *A, int64_t a_i, int64_t a_step, const uint16_t *B,
                        int64_t b_j, int64_t b_step, float *C, int64_t c_stride) {
  const int64_t row_bytes = c_stride * (int64_t)sizeof *C;
  for (int32_t i = 0; i < n_i; i++)
    for (int32_t j = 0; j < n_j; j++) {
      float *c = C + 32 * i * c_stride + 32 * j, *below = c + 16 * c_stride;
      _tile_loadd(0, c, row_bytes);
      _tile_loadd(1, c + 16, row_bytes);
      _tile_loadd(2, below, row_bytes);
      _tile_loadd(3, below + 16, row_bytes);
      for (int32_t step = 0; step < n_steps; step++)
        TILE_BLOCK(A + i * a_i + step * a_step, 512, B + j * b_j + step * b_step);
      _tile_stored(0, c, row_bytes);
      _tile_stored(1, c + 16, row_bytes);
      _tile_stored(2, below, row_bytes);
      _tile_stored(3, below + 16, row_bytes);
    }
}

const sfa_half_kernels sfa_half_kernels_amx = {
    .isa = SFA_ISA_AMX,
    .begin = begin,
    .end = end,
    .pack_values = pack_values,
    .pack_values_bf16 = pack_values_bf16,
    .pack_keys = pack_keys,
    .pack_codes = pack_codes,
    .query_codes = query_codes,
    .query_sparse = query_sparse,
    .query_dense = query_dense,
    .weights_codes = weights_codes,
    .weights_dense = weights_dense,
    .accumulate = accumulate,
    .rescale = rescale,
    .output_rows = output_rows,
    .pack_patches = pack_patches,
    .weights_backward = weights_backward,
    .add_product = add_product,
};
