/* cuda/cuda_rows.cuh: stored rows on the device: where they are, how values are rounded (bit for bit as the CPU's kernel/convert_tmpl.c and
 * kernel/stored_rows.h), and rows spread over lanes.
 *
 * A row of up to 16 L features is held by L neighbouring lanes, 16 features each: slots 0..7 are 16-byte-sized piece `lane` of the row's
 * first half, slots 8..15 that of the second, so that loads and stores are whole vectors and a bit of a lane's mask is a feature:
 *
 *     feature of slot j of lane l  =  (j / 8) * 8 L + 8 l + j % 8
 */
#ifndef SFA_CUDA_ROWS_CUH
#define SFA_CUDA_ROWS_CUH

#include "cuda/cuda_fp8.cuh"
#include "cuda/cuda_stages.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>

#define SFA_DEVICE static __device__ __forceinline__

/* ---- Elements --------------------------------------------------------------------------------------------------------------------- */

SFA_DEVICE uint32_t magnitude_of(float x) { return __float_as_uint(x) & 0x7fffffffu; }

SFA_DEVICE float f32_from_bf16(uint32_t h) { return __uint_as_float(h << 16); }
SFA_DEVICE uint32_t bf16_from_f32(float x) { /* NaN keeps its sign and upper bits, as on the CPU */
  const uint32_t bits = __float_as_uint(x);
  return x != x ? (bits >> 16) | 0x40u : __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
SFA_DEVICE float f32_from_f16(uint32_t h) { return __half2float(__ushort_as_half((unsigned short)h)); }
SFA_DEVICE uint32_t f16_from_f32(float x) {
  return x != x ? ((__float_as_uint(x) >> 16) & 0x8000u) | 0x7e00u : __half_as_ushort(__float2half_rn(x));
}

SFA_DEVICE bool is_whole(int32_t dtype) { return dtype == SFA_I8 || dtype == SFA_I4; }
SFA_DEVICE bool has_scale(int32_t dtype) { return is_whole(dtype) || dtype == SFA_E4M3; }
SFA_DEVICE int32_t bytes_of(int32_t dtype) { return dtype == SFA_F32 ? 4 : has_scale(dtype) ? 1 : 2; } /* SFA_I4: of two */

/* x / step to nearest even, and not -0. The product by the inverse differs from the quotient by less than 2^-15, which matters beside a
 * half only. */
SFA_DEVICE float whole_of(float x, float step, float inverse) {
  const float near = __fmul_rn(x, inverse), whole = rintf(near);
  const bool beside_half = !(fabsf(fabsf(__fsub_rn(near, whole)) - 0.5f) > 0x1p-10f);
  return __fadd_rn(beside_half ? rintf(__fdiv_rn(x, step)) : whole, 0.0f);
}

/* How a row is stored: its type and, where it has one, the row's scale. A value v reads back as stored(v) * unit. */
struct row_rounding {
  int32_t dtype;
  uint32_t scale; /* f16 */
  float unit, inverse;
  bool empty; /* all values are 0: a row of zeros, or one whose scale is NaN for an inf or NaN, or inf */
};

/* The f16 from 2^-24 on that is the smallest power of two of at least max|x| / 448, as sfa_e4m3_scale of the CPU. */
SFA_DEVICE uint32_t e4m3_scale(uint32_t most) {
  const int32_t power = (int32_t)(most >> 23) - 127 - 8 + ((most & 0x7fffffu) > 0x600000u);
  return most == 0 ? 0u : power > 15 ? 0x7c00u : power < -14 ? 1u << max(power + 24, 0) : (uint32_t)(power + 15) << 10;
}

/* most: bits of max|x|. */
SFA_DEVICE row_rounding rounding_of(int32_t dtype, uint32_t most) {
  row_rounding r = {dtype, 0, 1.0f, 1.0f, false};
  if (!has_scale(dtype))
    return r;
  const float limit = __uint_as_float(most), largest = dtype == SFA_I8 ? 127.0f : 7.0f;
  r.scale = most >= 0x7f800000u ? 0x7e00u : dtype == SFA_E4M3 ? e4m3_scale(most) : f16_from_f32(__fdiv_rn(limit, largest));
  if (is_whole(dtype) && r.scale < 0x7c00u && __fmul_rn(f32_from_f16(r.scale), largest) < limit)
    r.scale++;
  r.unit = f32_from_f16(r.scale);
  r.empty = r.scale == 0 || r.scale >= 0x7c00u;
  r.inverse = __frcp_rn(r.unit);
  return r;
}

/* As it is read back, before `unit`. */
SFA_DEVICE float stored(const row_rounding &r, float x) {
  if (is_whole(r.dtype))
    return r.empty ? 0.0f : whole_of(x, r.unit, r.inverse);
  if (r.dtype == SFA_E4M3) /* the inverse of a power of two is exact */
    return r.empty ? 0.0f : sfa_cuda_f32_from_e4m3(sfa_cuda_e4m3_from_f32(__fmul_rn(x, r.inverse)));
  return r.dtype == SFA_BF16 ? f32_from_bf16(bf16_from_f32(x)) : r.dtype == SFA_F16 ? f32_from_f16(f16_from_f32(x)) : x;
}

/* Element `at` of a row of any type but SFA_I4; x as `stored` left it. */
SFA_DEVICE void put_element(void *row, int32_t dtype, int64_t at, float x) {
  switch (dtype) {
  case SFA_BF16: ((uint16_t *)row)[at] = (uint16_t)bf16_from_f32(x); break;
  case SFA_F16: ((uint16_t *)row)[at] = (uint16_t)f16_from_f32(x); break;
  case SFA_I8: ((int8_t *)row)[at] = (int8_t)(int)x; break;
  case SFA_E4M3: ((uint8_t *)row)[at] = (uint8_t)sfa_cuda_e4m3_from_f32(x); break;
  default: ((float *)row)[at] = x;
  }
}

SFA_DEVICE float element_at(const void *row, int32_t dtype, int64_t at) {
  switch (dtype) {
  case SFA_BF16: return f32_from_bf16(((const uint16_t *)row)[at]);
  case SFA_F16: return f32_from_f16(((const uint16_t *)row)[at]);
  case SFA_I8: return (float)((const int8_t *)row)[at];
  case SFA_I4: return (float)((((const uint8_t *)row)[at >> 1] >> 4 * (at & 1) & 15) - 8);
  case SFA_E4M3: return sfa_cuda_f32_from_e4m3(((const uint8_t *)row)[at]);
  default: return ((const float *)row)[at];
  }
}

enum { TILE_TOKENS = 64 }; /* tokens of a page or tile, as SFA_KEY_TILE */

/* ---- Places ----------------------------------------------------------------------------------------------------------------------- */

/* Tokens are counted in 32 bits, as cu_seqlens does; so are the elements and bytes of one token, and of a tile. */

/* Row of token `token` of a stream of a store. */
SFA_DEVICE unsigned char *stored_row(const sfa_cuda_store &store, const sfa_kv_stream &stream, int32_t dtype, int32_t sequence,
                                     int32_t head, int32_t token) {
  const uint32_t tile = (uint32_t)token / TILE_TOKENS, row = (uint32_t)token % TILE_TOKENS, stride = (uint32_t)stream.row_stride;
  const unsigned char *at = store.pages ? store.pages[sequence * store.max_pages + tile]
                                        : stream.base + sequence * store.sequence_bytes + (uint64_t)tile * (uint32_t)stream.tile_bytes;
  return (unsigned char *)at + stream.offset + (size_t)head * stream.head_bytes +
         (uint64_t)row * (dtype == SFA_I4 ? stride / 2 : stride * (uint32_t)bytes_of(dtype));
}
SFA_DEVICE unsigned char *stored_values(const sfa_cuda_store &store, int32_t sequence, int32_t head, int32_t token) {
  return stored_row(store, store.values, store.format.dtype, sequence, head, token);
}
SFA_DEVICE unsigned char *stored_ids(const sfa_cuda_store &store, int32_t sequence, int32_t head, int32_t token) {
  return stored_row(store, store.ids, store.format.dim <= 256 ? SFA_I8 : SFA_F16, sequence, head, token);
}
SFA_DEVICE uint16_t *stored_scale(const sfa_cuda_store &store, int32_t sequence, int32_t head, int32_t token) {
  return (uint16_t *)(void *)stored_row(store, store.scales, SFA_F16, sequence, head, token);
}

SFA_DEVICE int32_t tokens_of(const sfa_cuda_tokens &tokens) {
  return tokens.cu_seqlens ? tokens.cu_seqlens[tokens.n_sequences] : tokens.n_sequences * (int32_t)tokens.max_seqlen;
}
/* The sequence of a packed token, and its first one. */
SFA_DEVICE int32_t sequence_of(const sfa_cuda_tokens &tokens, int32_t token, int32_t *first) {
  int32_t low = 0;
  *first = 0;
  if (tokens.cu_seqlens) {
    for (int32_t high = tokens.n_sequences; high - low > 1;) {
      const int32_t middle = (low + high) / 2;
      const bool upper = tokens.cu_seqlens[middle] <= token;
      low = upper ? middle : low;
      high = upper ? high : middle;
    }
    *first = tokens.cu_seqlens[low];
  } else if (tokens.n_sequences > 1) {
    low = (int32_t)((uint32_t)token / (uint32_t)tokens.max_seqlen);
    *first = low * (int32_t)tokens.max_seqlen;
  }
  return low;
}

/* Where a packed token belongs. */
struct token_place {
  int32_t sequence, stored, line; /* in the sequence's store; of the rope */
};

SFA_DEVICE token_place place_of(const sfa_cuda_select &s, int32_t token) {
  token_place at = {0, token, token};
  if (s.has_store || s.first_line) {
    int32_t first;
    at.sequence = sequence_of(s.tokens, token, &first);
    at.stored = token - first + (s.first_token ? s.first_token[at.sequence] : 0);
    at.line = s.first_line ? token - first + s.first_line[at.sequence] : token;
  }
  return at;
}

/* ---- Rows over lanes -------------------------------------------------------------------------------------------------------------- */

enum { SLOTS = 16, WIDEST = 256 }; /* features a lane; the widest row that lanes hold */

template <int L> SFA_DEVICE int32_t feature_of(int32_t lane, int j) { return (j / 8) * 8 * L + 8 * lane + j % 8; }

template <int L> SFA_DEVICE uint32_t group_max(uint32_t x) {
#pragma unroll
  for (int apart = L / 2; apart > 0; apart /= 2)
    x = max(x, __shfl_xor_sync(~0u, x, apart));
  return x;
}

/* 8 values in the bytes of their type at `to`, which is aligned to them (to 16 bytes at most); x as `stored` left them. */
SFA_DEVICE void put_eight(void *to, int32_t dtype, const float *x) {
  uint32_t w[4] = {0, 0, 0, 0};
  switch (dtype) {
  case SFA_BF16:
  case SFA_F16:
#pragma unroll
    for (int i = 0; i < 4; i++)
      w[i] = dtype == SFA_BF16 ? bf16_from_f32(x[2 * i]) | bf16_from_f32(x[2 * i + 1]) << 16
                               : f16_from_f32(x[2 * i]) | f16_from_f32(x[2 * i + 1]) << 16;
    *(uint4 *)to = make_uint4(w[0], w[1], w[2], w[3]);
    break;
  case SFA_I8:
  case SFA_E4M3:
#pragma unroll
    for (int i = 0; i < 8; i++)
      w[i / 4] |= (dtype == SFA_I8 ? (uint32_t)(int)x[i] & 255u : sfa_cuda_e4m3_from_f32(x[i])) << 8 * (i % 4);
    *(uint2 *)to = make_uint2(w[0], w[1]);
    break;
  case SFA_I4:
#pragma unroll
    for (int i = 0; i < 8; i++)
      w[0] |= (uint32_t)((int)x[i] + 8) << 4 * i;
    *(uint32_t *)to = w[0];
    break;
  default: ((float4 *)to)[0] = make_float4(x[0], x[1], x[2], x[3]); ((float4 *)to)[1] = make_float4(x[4], x[5], x[6], x[7]);
  }
}

SFA_DEVICE void take_eight(const void *from, int32_t dtype, float *x) {
  switch (dtype) {
  case SFA_BF16:
  case SFA_F16: {
    const uint4 four = *(const uint4 *)from;
    const uint32_t w[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      x[2 * i] = dtype == SFA_BF16 ? __uint_as_float(w[i] << 16) : f32_from_f16(w[i] & 0xffffu);
      x[2 * i + 1] = dtype == SFA_BF16 ? __uint_as_float(w[i] & 0xffff0000u) : f32_from_f16(w[i] >> 16);
    }
    break;
  }
  case SFA_I8:
  case SFA_E4M3: {
    const uint2 two = *(const uint2 *)from;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const uint32_t byte = (i < 4 ? two.x : two.y) >> 8 * (i % 4) & 255u;
      x[i] = dtype == SFA_I8 ? (float)(int8_t)byte : sfa_cuda_f32_from_e4m3(byte);
    }
    break;
  }
  case SFA_I4: {
    const uint32_t one = *(const uint32_t *)from;
#pragma unroll
    for (int i = 0; i < 8; i++)
      x[i] = (float)(int32_t)((one >> 4 * i & 15u) - 8u);
    break;
  }
  default: {
    const float4 a = ((const float4 *)from)[0], b = ((const float4 *)from)[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  }
  }
}

/* The row of a token and head of rows, in bytes. */
SFA_DEVICE unsigned char *row_at(const sfa_cuda_rows &rows, int32_t token, int32_t head) {
  return (unsigned char *)rows.data + ((int64_t)token * (int32_t)rows.token_stride + head * rows.head_stride) * bytes_of(rows.dtype);
}

/* A row x * unit to rows of SFA_BF16 or SFA_I8; `whole`: x are whole numbers up to 127, which int8 rows take as they are. All lanes of the
 * group call; `writes`: the row is there. */
template <int L>
SFA_DEVICE void put_row(const sfa_cuda_rows &rows, float *row_scales, int32_t token, int32_t head, int32_t n_heads, int32_t dim,
                        int32_t lane, const float *x, float unit, bool whole, bool writes) {
  row_rounding r = {SFA_BF16, 0, 1.0f, 1.0f, false};
  if (rows.dtype == SFA_I8) {
    float scale = unit;
    if (!whole) {
      uint32_t most = 0;
#pragma unroll
      for (int j = 0; j < SLOTS; j++)
        most = max(most, magnitude_of(__fmul_rn(x[j], unit)));
      r = rounding_of(SFA_I8, group_max<L>(most));
      scale = r.unit;
    }
    if (writes && lane == 0)
      row_scales[(int64_t)token * n_heads + head] = scale;
  }
  unsigned char *row = row_at(rows, token, head);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int32_t f = feature_of<L>(lane, 8 * half);
    float y[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      y[j] = x[8 * half + j];
      if (rows.dtype == SFA_BF16)
        y[j] = __fmul_rn(y[j], unit);
      else if (!whole)
        y[j] = stored(r, __fmul_rn(y[j], unit));
    }
    if (writes && f < dim)
      put_eight(row + f * bytes_of(rows.dtype), rows.dtype, y);
  }
}

/* ---- What vectors take ------------------------------------------------------------------------------------------------------------ */

static inline bool sfa_cuda_aligned(const void *pointer, size_t offset, size_t bytes) { return ((uintptr_t)pointer + offset) % bytes == 0; }

/* Whether eight elements of rows are a vector: 16 bytes, or 8 of SFA_I8. */
static inline bool sfa_cuda_rows_aligned(const sfa_cuda_rows *rows) {
  const size_t element = rows->dtype == SFA_F32 ? 4 : rows->dtype == SFA_BF16 ? 2 : 1, bytes = rows->dtype == SFA_I8 ? 8 : 16;
  return sfa_cuda_aligned(rows->data, 0, bytes) && sfa_cuda_aligned(NULL, (size_t)rows->token_stride * element, bytes) &&
         sfa_cuda_aligned(NULL, (size_t)rows->head_stride * element, bytes);
}
/* Of stored rows without ids; pages are aligned to 64 bytes. */
static inline bool sfa_cuda_store_aligned(const sfa_cuda_store *store) {
  const sfa_kv_stream *s = &store->values;
  const size_t bytes = store->format.dtype == SFA_I4 ? 4 : sfa_has_scales(store->format.dtype) ? 8 : 16;
  return sfa_cuda_aligned(store->pages ? NULL : s->base, s->offset, bytes) && s->head_bytes % bytes == 0 &&
         sfa_stored_bytes(store->format.dtype, s->row_stride) % bytes == 0 &&
         (store->pages || (s->tile_bytes % bytes == 0 && (size_t)store->sequence_bytes % bytes == 0));
}

#endif
