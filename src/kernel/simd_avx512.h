/* kernel/simd_avx512.h: the vocabulary of the *_tmpl.c files in AVX-512 (F, BW, DQ, VL, CD) with FMA. See simd_avx2.h for the other one.
 *
 * vf: V_LANES floats; vi: as many int32; vm: a mask of lanes. Loads and stores need no alignment. Everything is static: a file that
 * includes this is compiled for the instruction set and leaks nothing of it.
 */
#ifndef SFA_SIMD_AVX512_H
#define SFA_SIMD_AVX512_H

#include "kernel/exp2.h"
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define V_INLINE static inline __attribute__((always_inline, unused))
#define V_LANES 16
#define V_EXPAND /* has vi_expand_i8 */
/* Register blocks of the products: 24 accumulators of 32 registers. */
#define V_SCORE_KEYS(columns) ((columns) == 4 ? 6 : (columns) == 3 ? 8 : (columns) == 2 ? 8 : 16)
#define V_SCORE_COLUMNS 4
#define V_VALUE_ROWS 6
#define V_VALUE_COLUMNS 4

typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

V_INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
V_INLINE void vf_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
/* The low 8 lanes only; the others read as 0. */
V_INLINE vf vf_load_half(const float *p) { return _mm512_maskz_loadu_ps(0xff, p); }
V_INLINE void vf_store_half(float *p, vf x) { _mm512_mask_storeu_ps(p, 0xff, x); }
V_INLINE vf vf_set(float x) { return _mm512_set1_ps(x); }
V_INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
V_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
V_INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
V_INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
V_INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
V_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
/* a > b ? a : b and a < b ? a : b: b where one is NaN. */
V_INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
V_INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
V_INLINE vf vf_abs(vf x) { return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff))); }
V_INLINE vf vf_copysign(vf x, vf sign) { /* per bit: mask ? sign : x */
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(_mm512_set1_epi32(INT32_MIN), _mm512_castps_si512(sign), _mm512_castps_si512(x), 0xca));
}
/* Lanes 2 i and 2 i + 1 changed for each other; V_LANES / 2 floats, each in two lanes; lanes 2 i times -1. */
V_INLINE vf vf_swap_pairs(vf x) { return _mm512_permute_ps(x, 0xb1); }
V_INLINE vf vf_load_twice(const float *p) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return _mm512_permutexvar_ps(lanes, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
}
V_INLINE vf vf_negate_even(vf x) {
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), _mm512_set1_epi64((int64_t)0x80000000)));
}
V_INLINE vi vf_bits(vf x) { return _mm512_castps_si512(x); }

V_INLINE vi vi_load(const int32_t *p) { return _mm512_loadu_si512(p); }
V_INLINE vi vi_set(int32_t x) { return _mm512_set1_epi32(x); }
V_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
V_INLINE void vi_store(int32_t *p, vi x) { _mm512_storeu_si512(p, x); }
V_INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
V_INLINE vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
V_INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
V_INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
V_INLINE vi vi_shift_left(vi x, const int n) { return _mm512_slli_epi32(x, (unsigned)n); }
/* Of the only bit of each lane. */
V_INLINE vi vi_bit_number(vi bit) { return _mm512_sub_epi32(_mm512_set1_epi32(31), _mm512_lzcnt_epi32(bit)); }
V_INLINE vf vi_to_float(vi x) { return _mm512_cvtepi32_ps(x); }
V_INLINE int32_t vi_reduce_max(vi x) { return _mm512_reduce_max_epi32(x); }

/* Products of the low 16 bits of both, the high ones of b being 0. */
V_INLINE vi vi_mul_i16(vi a, vi b) { return _mm512_madd_epi16(a, b); }
/* The next values at the lanes of a mask, 0 elsewhere; reads 16. */
V_INLINE vi vi_expand_i8(vm m, const int8_t *values) {
  return _mm512_maskz_expand_epi32(m, _mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)values)));
}

/* 0, 1, 2, ... */
V_INLINE vi vi_iota(void) { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
V_INLINE float vf_reduce_max(vf x) { return _mm512_reduce_max_ps(x); }
V_INLINE vf vf_gather(const float *p, vi at) { return _mm512_i32gather_ps(at, p, 4); }

V_INLINE vm vi_gt(vi a, vi b) { return _mm512_cmpgt_epi32_mask(a, b); }
V_INLINE vm vi_ne(vi a, vi b) { return _mm512_cmpneq_epi32_mask(a, b); }
V_INLINE vi vi_select(vm m, vi yes, vi no) { return _mm512_mask_blend_epi32(m, no, yes); }
V_INLINE vm vf_eq(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
V_INLINE vm vf_ne(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
V_INLINE vm vf_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
V_INLINE vm vm_or(vm a, vm b) { return (vm)(a | b); }
V_INLINE vf vf_select(vm m, vf yes, vf no) { return _mm512_mask_blend_ps(m, no, yes); }
V_INLINE uint32_t vm_bits(vm m) { return m; }

/* 2^x of x <= 127, or NaN: sfa_exp2 step by step. n is whole and 2^n * p never subnormal, so scalef is exact as the product is. */
V_INLINE vf vf_exp2(vf x) {
  vf n = vf_sub(vf_add(x, vf_set(SFA_EXP2_ROUND)), vf_set(SFA_EXP2_ROUND));
  vf r = vf_sub(x, n);
  vf p = vf_fma(vf_set(SFA_EXP2_5), r, vf_set(SFA_EXP2_4));
  p = vf_fma(p, r, vf_set(SFA_EXP2_3));
  p = vf_fma(p, r, vf_set(SFA_EXP2_2));
  p = vf_fma(p, r, vf_set(SFA_EXP2_1));
  p = vf_fma(p, r, vf_set(1.0f));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, vf_set(-126.0f), _CMP_NLT_UQ), p, n);
}

/* 8 elements of 16 rows, turned: out[u] lane i = rows[i][u]. 8 x 8 transposition in both 256-bit halves at once. */
V_INLINE void vf_turn(const float *const rows[V_LANES], int64_t at, vf out[8]) {
  __m512 a[8], b[8];
  for (int i = 0; i < 8; i++)
    a[i] = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(rows[i] + at)), _mm256_loadu_ps(rows[i + 8] + at), 1);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int u = 0; u < 2; u++) { /* a[i + f]: element f of rows i..i+3 in the low quarter of a half, element f + 4 in the high one */
      __m512d low = _mm512_castps_pd(b[i + u]), high = _mm512_castps_pd(b[i + u + 2]);
      a[i + 2 * u] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * u + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  for (int u = 0; u < 4; u++) {
    out[u] = _mm512_castpd_ps(_mm512_permutex2var_pd(_mm512_castps_pd(a[u]), low, _mm512_castps_pd(a[u + 4])));
    out[u + 4] = _mm512_castpd_ps(_mm512_permutex2var_pd(_mm512_castps_pd(a[u]), high, _mm512_castps_pd(a[u + 4])));
  }
}

/* 16 vectors of 16 lanes become their transpose. */
V_INLINE void vi_turn(vi r[16]) {
  vi t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

/* Registers a and b belong to two groups of rows, in both every row has an equal part of the lanes. *x gets one half of each row's lanes,
 * *y the other. After steps 0..3 on registers of one row each, lane i is of row i. */
V_INLINE void vf_fold(const int step, vf a, vf b, vf *x, vf *y) {
  const __m512d a2 = _mm512_castps_pd(a), b2 = _mm512_castps_pd(b);
  switch (step) {
  case 0: *x = _mm512_unpacklo_ps(a, b), *y = _mm512_unpackhi_ps(a, b); break;
  case 1: *x = _mm512_castpd_ps(_mm512_unpacklo_pd(a2, b2)), *y = _mm512_castpd_ps(_mm512_unpackhi_pd(a2, b2)); break;
  case 2: *x = _mm512_shuffle_f32x4(a, b, 0x44), *y = _mm512_shuffle_f32x4(a, b, 0xee); break;
  default: *x = _mm512_shuffle_f32x4(a, b, 0x88), *y = _mm512_shuffle_f32x4(a, b, 0xdd);
  }
}

/* Bit u: the magnitude of x[u], as an integer, is above limit; n elements, a multiple of 8 up to 64. */
V_INLINE uint64_t v_above(const float *x, int32_t n, int32_t limit) {
  uint64_t bits = 0;
  for (int32_t u = 0; u < n; u += 16) {
    vf part = n - u >= 16 ? vf_load(x + u) : vf_load_half(x + u);
    uint64_t found = vi_gt(vf_bits(vf_abs(part)), vi_set(limit));
    bits |= (n - u >= 16 ? found : found & 0xff) << u;
  }
  return bits;
}
/* The same of 32 elements, into memory. */
V_INLINE void v_mark32(const float *x, int32_t limit, uint32_t *bits) {
  const __mmask16 low = vi_gt(vf_bits(vf_abs(vf_load(x))), vi_set(limit)), high = vi_gt(vf_bits(vf_abs(vf_load(x + 16))), vi_set(limit));
  memcpy(bits, &low, 2); /* a mask goes to memory in one step, to a common register in three */
  memcpy((char *)bits + 2, &high, 2);
}

V_INLINE vf v_load_bf16(const uint16_t *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
V_INLINE vf v_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
V_INLINE vf v_load_i8(const int8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p))); }
/* e4m3: its bits at those of an f16 are the number times 2^-8, subnormal or not; NaN alone is to be set. */
V_INLINE vf v_load_e4m3(const uint8_t *p) {
  const __m256i magnitude = _mm256_set1_epi16(0x3f80), wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)p));
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)0xbf80));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(half, magnitude), magnitude);
  return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00))), _mm512_set1_ps(256));
}
/* 2 V_LANES elements of e4m3 times 2^-8, but NaN as 1.875. */
V_INLINE void v_load_e4m3_pair(const uint8_t *p, vf out[2]) {
  const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)p));
  const __m512i half = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16((short)0xbf80));
  out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
  out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
}
/* The larger magnitudes byte by byte, of 2 V_LANES or 4 V_LANES elements of e4m3: bytes of which 255 are NaN. */
V_INLINE vi v_most_e4m3(vi most, const uint8_t *p, const int n) {
  const __m512i x =
      n == 32 ? _mm512_zextsi256_si512(_mm256_loadu_si256((const void *)p)) : _mm512_loadu_si512((const void *)p); /* zeros: no NaN */
  return _mm512_max_epu8(most, _mm512_or_si512(x, _mm512_set1_epi8((char)0x80)));
}
V_INLINE int v_has_nan_e4m3(vi most) { return _mm512_cmpeq_epi8_mask(most, _mm512_set1_epi8(-1)) != 0; }
/* Of magnitudes up to 448, rounded as sfa_e4m3_from_f32 does. */
V_INLINE void v_store_e4m3(uint8_t *p, vf x) {
  const __m512i bits = vf_bits(x), sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), vi_set(0x80)), size = vf_bits(vf_abs(x));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(size, 20), vi_set(1));
  const __m512i normal = _mm512_srli_epi32(_mm512_add_epi32(size, _mm512_add_epi32(odd, vi_set(0x7ffff - (120 << 23)))), 20);
  const __m512i small = _mm512_sub_epi32(vf_bits(vf_add(vf_abs(x), vf_set(0x1p14f))), vf_bits(vf_set(0x1p14f)));
  const __mmask16 is_small = _mm512_cmplt_epi32_mask(size, vf_bits(vf_set(0x1p-6f)));
  _mm_storeu_si128((void *)p, _mm512_cvtepi32_epi8(_mm512_or_si512(sign, _mm512_mask_mov_epi32(normal, is_small, small))));
}
/* Two bf16 a lane: the element at the lower address, and the other. */
V_INLINE vf v_low_bf16(vf x) { return _mm512_castsi512_ps(_mm512_slli_epi32(vf_bits(x), 16)); }
V_INLINE vf v_high_bf16(vf x) { return _mm512_castsi512_ps(_mm512_and_si512(vf_bits(x), _mm512_set1_epi32(INT32_MIN >> 15))); }
/* 2 V_LANES elements of SFA_I4: the even ones, and the odd ones. A permutation looks at the low 4 bits of a lane only. */
V_INLINE void v_load_i4(const uint8_t *p, vf out[2]) {
  const vf levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const vi pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));
  out[0] = _mm512_permutexvar_ps(pairs, levels);
  out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), levels);
}
/* Two vectors in a row to their even and odd elements, and back. */
V_INLINE void v_split(vf x[2]) {
  const vi even = _mm512_slli_epi32(vi_iota(), 1), odd = _mm512_or_si512(even, vi_set(1));
  const vf low = x[0], high = x[1];
  x[0] = _mm512_permutex2var_ps(low, even, high);
  x[1] = _mm512_permutex2var_ps(low, odd, high);
}
V_INLINE void v_join(vf x[2]) {
  const vi first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), second = vi_add(first, vi_set(8));
  const vf even = x[0], odd = x[1];
  x[0] = _mm512_permutex2var_ps(even, first, odd);
  x[1] = _mm512_permutex2var_ps(even, second, odd);
}
V_INLINE void v_store_f16(uint16_t *p, vf x) { _mm256_storeu_si256((void *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
V_INLINE void v_store_bf16(uint16_t *p, vf x) {
  __m512i bits = vf_bits(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), vi_set(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, vi_set(0x7fff))), 16);
  __m512i nan = _mm512_or_si512(_mm512_srli_epi32(bits, 16), vi_set(0x40));
  _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), rounded, nan)));
}
/* Rounded to the nearest whole number, even at a tie. */
V_INLINE void v_store_i8(int8_t *p, vf x) { _mm_storeu_si128((void *)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x))); }

#endif
