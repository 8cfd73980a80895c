/* The 16-bit kernels in plain C: the definition, rounding for rounding. */
#include "kernel/kernel_half.h"

#include "base/half.h"
#include "kernel/kernel.h" /* sfa_exp2 */

#include <math.h>
#include <stddef.h>
#include <string.h>

/* ---- Roundings ---------------------------------------------------------------------------------------------------------------- */

/* A number rounded to f16, as a double: adding 1.5 * 2^52 last places leaves no room for less than one. */
static double round_f16(double x) {
  double magnitude = fabs(x);
  int exponent = magnitude < 0x1p-14 ? -14 : ilogb(magnitude);
  double anchor = ldexp(1.5, 52 + exponent - 10), rounded = (x + anchor) - anchor;
  return fabs(rounded) > 65504 ? copysign(INFINITY, x) : rounded;
}

/* Denormal numbers count as 0 of their sign, as in the processor's conversion and products. */
static uint16_t to_bf16(float x) { return sfa_bf16_from_f32(fabsf(x) < 0x1p-126f ? copysignf(0, x) : x); }

/* To a whole number, to nearest even; beyond 16 bits the ends. */
static int16_t to_units(double s) { return (int16_t)(s <= -32768 ? -32768 : s >= 32767 ? 32767 : rint(s)); }

static uint16_t weight_of(int16_t t) {
  int32_t bits = t + (0x3f00 | sfa_half_exp[(t >> 1) & 63]);
  return (uint16_t)(bits < 0 ? 0 : bits > 32767 ? 32767 : bits);
}

typedef float row16 __attribute__((vector_size(64))); /* 16 floats, on any machine */

/* C [16][16] += A [16][32] B [16 pairs][16][2]: the even and the odd places in chains of their own. Products of bf16 are exact. */
static void tile_product(const uint16_t *A, const uint16_t *B, float *C, ptrdiff_t c_stride) {
  float b[32][16]; /* B by its places */
  for (int p = 0; p < 32; p++)
    for (int j = 0; j < 16; j++)
      b[p][j] = sfa_f32_from_bf16(B[p / 2 * 32 + j * 2 + p % 2]);
  for (int i = 0; i < 16; i++) {
    row16 sum[2] = {{0}}, place, out;
    for (int p = 0; p < 32; p++) {
      memcpy(&place, b[p], sizeof place);
      sum[p % 2] += sfa_f32_from_bf16(A[i * 32 + p]) * place;
    }
    memcpy(&out, C + i * c_stride, sizeof out);
    out += sum[0] + sum[1];
    memcpy(C + i * c_stride, &out, sizeof out);
  }
}

/* ---- Packing ------------------------------------------------------------------------------------------------------------------ */

static void begin(void) {}

static uint32_t largest_bits(uint32_t a, float b) {
  uint32_t bits = sfa_bits_of(fabsf(b));
  return a > bits ? a : bits;
}

static uint32_t pack_values(int32_t step, int32_t n, int32_t E, const float *values, int64_t stride, uint16_t *chunk) {
  uint32_t largest = 0;
  for (int32_t e = 0; e < sfa_half_padded(E); e++)
    for (int32_t j = 0; j < SFA_HALF_STEP; j++) {
      float v = j < n && e < E ? values[j * stride + e] : 0;
      chunk[sfa_half_value_at(step, e, j)] = to_bf16(v);
      largest = largest_bits(largest, v);
    }
  return largest;
}

static uint32_t pack_values_bf16(int32_t step, int32_t n, int32_t E, const uint16_t *values, int64_t stride, uint16_t *chunk) {
  uint32_t largest = 0;
  for (int32_t e = 0; e < sfa_half_padded(E); e++)
    for (int32_t j = 0; j < SFA_HALF_STEP; j++) {
      uint16_t v = j < n && e < E ? values[j * stride + e] : 0;
      chunk[sfa_half_value_at(step, e, j)] = v;
      largest = largest_bits(largest, sfa_f32_from_bf16(v));
    }
  return largest;
}

static uint32_t pack_keys(int32_t step, int32_t n, int32_t D, const float *keys, int64_t stride, uint16_t *chunk) {
  uint32_t largest = 0;
  int32_t Dp = sfa_half_padded(D);
  for (int32_t j = 0; j < SFA_HALF_STEP; j++) {
    float squares = 0;
    for (int32_t u = 0; u < Dp; u++) {
      float k = j < n && u < D ? keys[j * stride + u] : 0;
      chunk[sfa_half_key_at(Dp, step, j, u)] = to_bf16(k);
      squares = fmaf(k, k, squares);
    }
    largest = largest_bits(largest, squares);
  }
  return largest;
}

static uint32_t pack_codes(int32_t step, int32_t n, int32_t K, const void *ids, int32_t id_bytes, const float *key_values, int32_t W,
                           uint32_t *values, uint16_t *offsets) {
  uint32_t largest = 0;
  for (int32_t j = 0; j < SFA_HALF_STEP; j++) {
    float squares = 0;
    for (int32_t u = 0; u < K; u++) {
      float k = j < n ? key_values[j * K + u] : 0;
      uint32_t id = j >= n ? 0 : id_bytes == 1 ? ((const uint8_t *)ids)[j * K + u] : ((const uint16_t *)ids)[j * K + u];
      int64_t at = ((int64_t)(step * SFA_HALF_STEP + j) / 2 * K + u) * 2 + j % 2;
      values[at] = sfa_f16_from_f32(k) * 0x10001u;
      offsets[at] = (uint16_t)(id * (uint32_t)W * 2);
      squares = fmaf(k, k, squares);
    }
    largest = largest_bits(largest, squares);
  }
  return largest;
}

/* ---- Queries ------------------------------------------------------------------------------------------------------------------ */

static void sum_squares(int32_t n, int32_t D, const float *Qt, float factor, float *squares) {
  for (int32_t i = 0; i < n; i++) {
    squares[i] = 0;
    for (int32_t u = 0; u < D; u++) {
      float q = Qt[(int64_t)u * n + i] * factor;
      squares[i] = fmaf(q, q, squares[i]);
    }
  }
}

static void query_codes(int32_t first, int32_t n, int32_t D, const float *Qt, float factor, int32_t W, uint16_t *out, float *squares) {
  sum_squares(n, D, Qt, factor, squares);
  for (int32_t u = 0; u < D; u++)
    for (int32_t i = 0; i < sfa_half_padded(n); i++)
      out[(int64_t)u * W + sfa_half_lane(first + i)] = i < n ? sfa_f16_from_f32(Qt[(int64_t)u * n + i] * factor) : 0;
}

static void query_sparse(int32_t first, int32_t n, int32_t D, int32_t K, const void *const *ids, const float *const *values, float factor,
                         int32_t W, uint16_t *out, float *squares) {
  for (int32_t u = 0; u < D; u++)
    for (int32_t i = 0; i < sfa_half_padded(n); i++)
      out[(int64_t)u * W + sfa_half_lane(first + i)] = 0;
  for (int32_t i = 0; i < n; i++) {
    squares[i] = 0;
    for (int32_t u = 0; u < K; u++) {
      float q = values[i][u] * factor;
      squares[i] = fmaf(q, q, squares[i]);
      out[(int64_t)((const uint8_t *)ids[i])[u] * W + sfa_half_lane(first + i)] = sfa_f16_from_f32(q);
    }
  }
}

static void query_dense(int32_t first, int32_t n, int32_t D, const float *Qt, float factor, uint16_t *out, float *squares) {
  int32_t Dp = sfa_half_padded(D);
  sum_squares(n, D, Qt, factor, squares);
  for (int32_t u = 0; u < Dp; u++)
    for (int32_t i = 0; i < sfa_half_padded(n); i++)
      out[sfa_half_query_at(Dp, first + i, u)] = i < n && u < D ? to_bf16(Qt[(int64_t)u * n + i] * factor) : 0;
}

/* ---- One chunk ---------------------------------------------------------------------------------------------------------------- */

static int sees(const sfa_half_mask *mask, int32_t i, int32_t j) {
  return !mask || ((mask->lo[i] <= j || j < mask->n_always) && j <= mask->hi[i]);
}

/* The weight of row i and key j of a step, from its score. */
static void put_weight(int32_t step, int32_t i, int32_t j, double s, const sfa_half_mask *mask, int16_t *top, uint16_t *P) {
  int16_t t = sees(mask, i, step * SFA_HALF_STEP + j) ? to_units(s) : SFA_HALF_UNSEEN;
  P[sfa_half_weight_at(step, i, j)] = weight_of(t);
  if (top && t > top[i])
    top[i] = t;
}

static void weights_codes(int32_t first_step, int32_t n_steps, int32_t K, const uint32_t *values, const uint16_t *offsets, int32_t W,
                          const uint16_t *Qt, const float *shift, const sfa_half_mask *mask, int16_t *top, uint16_t *P) {
  for (int32_t key = first_step * SFA_HALF_STEP; key < (first_step + n_steps) * SFA_HALF_STEP; key++)
    for (int32_t i = 0; i < W; i++) {
      double s = shift ? -shift[i] : 0;
      for (int32_t u = 0; u < K; u++) {
        int64_t at = ((int64_t)(key / 2) * K + u) * 2 + key % 2;
        double k = sfa_f32_from_f16((uint16_t)values[at]), q = sfa_f32_from_f16(Qt[offsets[at] / 2 + sfa_half_lane(i)]);
        s = round_f16(k * q + s); /* exact in a double until then, or so close that it rounds the same */
      }
      put_weight(key / SFA_HALF_STEP, i, key % SFA_HALF_STEP, s, mask, top, P);
    }
}

static void weights_dense(int32_t first_step, int32_t n_steps, int32_t D, const uint16_t *keys, int32_t W, const uint16_t *Q, float unit,
                          const float *shift, const sfa_half_mask *mask, int16_t *top, uint16_t *P) {
  int32_t Dp = sfa_half_padded(D);
  for (int32_t step = first_step; step < first_step + n_steps; step++)
    for (int32_t half = 0; half < 2; half++)
      for (int32_t first = 0; first < W; first += 16) {
        float S[16 * 16] = {0};
        for (int32_t u = 0; u < Dp; u += 32)
          tile_product(keys + sfa_half_key_at(Dp, step, 16 * half, u), Q + sfa_half_query_at(Dp, first, u), S, 16);
        for (int32_t j = 0; j < 16; j++)
          for (int32_t i = 0; i < 16; i++)
            put_weight(step, first + i, 16 * half + j, fmaf(unit, S[j * 16 + i], shift ? -shift[first + i] : 0.0f), mask, top, P);
      }
}

static void accumulate(int32_t first_step, int32_t n_steps, int32_t E, const uint16_t *V, int32_t W, const uint16_t *P, float *O,
                       float *l) {
  static const uint16_t one = 0x3f80;
  uint16_t ones[16 * 32] = {0};
  float sums[16 * 16];
  for (int32_t j = 0; j < 32; j++)
    ones[j] = one;
  for (int32_t i = 0; i < W; i += 16) {
    memset(sums, 0, sizeof sums);
    memcpy(sums, l + i, 16 * sizeof *l);
    for (int32_t step = first_step; step < first_step + n_steps; step++)
      tile_product(ones, P + sfa_half_weight_at(step, i, 0), sums, 16);
    memcpy(l + i, sums, 16 * sizeof *l);
    for (int32_t e = 0; e < sfa_half_padded(E); e += 16)
      for (int32_t step = first_step; step < first_step + n_steps; step++)
        tile_product(V + sfa_half_value_at(step, e, 0), P + sfa_half_weight_at(step, i, 0), O + sfa_half_output_at(W, e, i), 16);
  }
}

static void rescale(int32_t E, int32_t W, const float *factor, float *O, float *l) {
  for (int32_t i = 0; i < W; i++)
    l[i] *= factor[i];
  for (int32_t e = 0; e < sfa_half_padded(E); e++)
    for (int32_t i = 0; i < W; i++)
      O[sfa_half_output_at(W, e, i)] *= factor[i];
}

static void output_rows(int32_t first, int32_t n, int32_t E, int32_t W, const float *O, const float *scale, float *const *out) {
  for (int32_t i = 0; i < n; i++)
    for (int32_t e = 0; e < E; e++)
      out[i][e] = fmaf(O[sfa_half_output_at(W, e, first + i)], scale[i], 0);
}

/* ---- Gradients ---------------------------------------------------------------------------------------------------------------- */

static void pack_patches(int32_t n, int32_t dim, const float *x, int64_t stride, bool right, uint16_t *straight, uint16_t *turned) {
  for (int32_t r = 0; r < 32; r++)
    for (int32_t c = 0; c < sfa_half_padded(dim); c++) {
      uint16_t entry = r < n && c < dim ? to_bf16(x[r * stride + c]) : 0;
      int64_t patch = sfa_half_patch_at(0, 0, c);
      straight[patch + (right ? sfa_half_right_at(r, c % 32) : sfa_half_left_at(r, c % 32))] = entry;
      if (turned)
        turned[patch + (right ? sfa_half_right_at(c % 32, r) : sfa_half_left_at(c % 32, r))] = entry;
    }
}

/* One patch: C [32][32] += A B. */
static void patch_product(const uint16_t *A, const uint16_t *B, float *C, int64_t c_stride) {
  for (int tile = 0; tile < 4; tile++)
    tile_product(A + tile / 2 * 512, B + tile % 2 * 512, C + tile / 2 * 16 * c_stride + tile % 2 * 16, c_stride);
}

static void weights_backward(int32_t D, int32_t E, const uint16_t *K, const uint16_t *V, int32_t W, const uint16_t *Q, const uint16_t *dO,
                             float unit, const float *lse, const float *delta, const int32_t *lo, const int32_t *hi, int32_t n_always,
                             int64_t stride, uint16_t *P, uint16_t *dS, uint16_t *dS_keys) {
  const int32_t Dp = sfa_half_padded(D), Ep = sfa_half_padded(E);
  for (int32_t first_key = 0; first_key < 64; first_key += 32)
    for (int32_t first = 0; first < W; first += 32) {
      float S[32 * 32] = {0}, dP[32 * 32] = {0};
      for (int32_t u = 0; u < Dp; u += 32)
        patch_product(K + sfa_half_patch_at(Dp, first_key, u), Q + sfa_half_patch_at(Dp, first, u), S, 32);
      for (int32_t e = 0; e < Ep; e += 32)
        patch_product(V + sfa_half_patch_at(Ep, first_key, e), dO + sfa_half_patch_at(Ep, first, e), dP, 32);
      int64_t patch = first_key / 32 * stride + first / 32 * 1024;
      for (int32_t r = 0; r < 32; r++)
        for (int32_t c = 0; c < 32; c++) {
          const int32_t j = first_key + r, i = first + c;
          bool seen = !lo || ((lo[i] <= j || j < n_always) && j <= hi[i]);
          float p = seen ? sfa_exp2(fmaf(S[r * 32 + c], unit, -lse[i])) : 0, d = seen ? p * (dP[r * 32 + c] - delta[i]) : 0;
          P[patch + sfa_half_left_at(r, c)] = to_bf16(p);
          dS[patch + sfa_half_left_at(r, c)] = dS_keys[patch + sfa_half_right_at(c, r)] = to_bf16(d);
        }
    }
}

static void add_product(int32_t n_i, int32_t n_j, int32_t n_steps, const uint16_t *A, int64_t a_i, int64_t a_step, const uint16_t *B,
                        int64_t b_j, int64_t b_step, float *C, int64_t c_stride) {
  for (int32_t i = 0; i < n_i; i++)
    for (int32_t j = 0; j < n_j; j++)
      for (int32_t step = 0; step < n_steps; step++)
        patch_product(A + i * a_i + step * a_step, B + j * b_j + step * b_step, C + 32 * i * c_stride + 32 * j, c_stride);
}

const sfa_half_kernels sfa_half_kernels_scalar = {
    .isa = SFA_ISA_SCALAR,
    .begin = begin,
    .end = begin,
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
