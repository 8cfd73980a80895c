/* kernel/simd_avx2.h: the vocabulary of the *_tmpl.c files in AVX2 with FMA and F16C. Meanings as in simd_avx512.h. */
#ifndef SFA_SIMD_AVX2_H
#define SFA_SIMD_AVX2_H

#include "kernel/exp2.h"
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define V_INLINE static inline __attribute__((always_inline, unused))
#define V_LANES 8
/* Register blocks of the products: 12 accumulators of 16 registers. */
#define V_SCORE_KEYS(columns) ((columns) == 3 ? 4 : (columns) == 2 ? 6 : 8)
#define V_SCORE_COLUMNS 3
#define V_VALUE_ROWS 6
#define V_VALUE_COLUMNS 2

typedef __m256 vf;
typedef __m256i vi;
typedef __m256 vm; /* all bits of a lane */

V_INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
V_INLINE void vf_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
/* A vector is 8 lanes: half of the longest one is all of it. */
V_INLINE vf vf_load_half(const float *p) { return _mm256_loadu_ps(p); }
V_INLINE void vf_store_half(float *p, vf x) { _mm256_storeu_ps(p, x); }
V_INLINE vf vf_set(float x) { return _mm256_set1_ps(x); }
V_INLINE vf vf_zero(void) { return _mm256_setzero_ps(); }
V_INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
V_INLINE vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
V_INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
V_INLINE vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
V_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
V_INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
V_INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
V_INLINE vf vf_abs(vf x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
V_INLINE vf vf_copysign(vf x, vf sign) { return _mm256_or_ps(vf_abs(x), _mm256_and_ps(_mm256_set1_ps(-0.0f), sign)); }
V_INLINE vf vf_swap_pairs(vf x) { return _mm256_permute_ps(x, 0xb1); }
V_INLINE vf vf_load_twice(const float *p) {
  return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}
V_INLINE vf vf_negate_even(vf x) { return _mm256_xor_ps(x, _mm256_castsi256_ps(_mm256_set1_epi64x((int64_t)0x80000000))); }
V_INLINE vi vf_bits(vf x) { return _mm256_castps_si256(x); }

V_INLINE vi vi_load(const int32_t *p) { return _mm256_loadu_si256((const void *)p); }
V_INLINE vi vi_set(int32_t x) { return _mm256_set1_epi32(x); }
V_INLINE void vi_store(int32_t *p, vi x) { _mm256_storeu_si256((void *)p, x); }
V_INLINE vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
V_INLINE vi vi_max(vi a, vi b) { return _mm256_max_epi32(a, b); }
V_INLINE vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
V_INLINE vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
V_INLINE vi vi_shift_left(vi x, const int n) { return _mm256_slli_epi32(x, n); }
/* The exponent of 2^n (or -2^31) as a float. */
V_INLINE vi vi_bit_number(vi bit) {
  const __m256i power = _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(_mm256_cvtepi32_ps(bit)), 23), _mm256_set1_epi32(255));
  return _mm256_sub_epi32(power, _mm256_set1_epi32(127));
}
V_INLINE vf vi_to_float(vi x) { return _mm256_cvtepi32_ps(x); }
V_INLINE int32_t vi_reduce_max(vi x) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

V_INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
V_INLINE vi vi_iota(void) { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
V_INLINE float vf_reduce_max(vf x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
V_INLINE vf vf_gather(const float *p, vi at) { return _mm256_i32gather_ps(p, at, 4); }

V_INLINE vm vi_gt(vi a, vi b) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b)); }
V_INLINE vm vi_ne(vi a, vi b) { return _mm256_castsi256_ps(_mm256_xor_si256(_mm256_cmpeq_epi32(a, b), _mm256_set1_epi32(-1))); }
V_INLINE vi vi_select(vm m, vi yes, vi no) { return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(m)); }
V_INLINE vm vf_eq(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
V_INLINE vm vf_ne(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_NEQ_UQ); }
V_INLINE vm vf_lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
V_INLINE vm vm_or(vm a, vm b) { return _mm256_or_ps(a, b); }
V_INLINE vf vf_select(vm m, vf yes, vf no) { return _mm256_blendv_ps(no, yes, m); }
V_INLINE uint32_t vm_bits(vm m) { return (uint32_t)_mm256_movemask_ps(m); }

V_INLINE vf vf_exp2(vf x) {
  vf t = vf_add(x, vf_set(SFA_EXP2_ROUND));
  vf r = vf_sub(x, vf_sub(t, vf_set(SFA_EXP2_ROUND)));
  vf p = vf_fma(vf_set(SFA_EXP2_5), r, vf_set(SFA_EXP2_4));
  p = vf_fma(p, r, vf_set(SFA_EXP2_3));
  p = vf_fma(p, r, vf_set(SFA_EXP2_2));
  p = vf_fma(p, r, vf_set(SFA_EXP2_1));
  p = vf_fma(p, r, vf_set(1.0f));
  vf power = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(vf_bits(t), 23), vf_bits(vf_set(1.0f))));
  return _mm256_and_ps(_mm256_cmp_ps(x, vf_set(-126.0f), _CMP_NLT_UQ), vf_mul(p, power));
}

/* 8 elements of 8 rows, turned: two 4-element pieces of rows i and i + 4 a register, then 4 x 4 in both halves. */
V_INLINE void vf_turn(const float *const rows[V_LANES], int64_t at, vf out[8]) {
  for (int half = 0; half < 8; half += 4) {
    __m256 a[4];
    for (int i = 0; i < 4; i++)
      a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[i] + at + half)), _mm_loadu_ps(rows[i + 4] + at + half), 1);
    __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(a[0], a[1])), high01 = _mm256_castps_pd(_mm256_unpackhi_ps(a[0], a[1]));
    __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(a[2], a[3])), high23 = _mm256_castps_pd(_mm256_unpackhi_ps(a[2], a[3]));
    out[half] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
    out[half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
    out[half + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
    out[half + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
  }
}

V_INLINE void vf_fold(const int step, vf a, vf b, vf *x, vf *y) {
  const __m256d a2 = _mm256_castps_pd(a), b2 = _mm256_castps_pd(b);
  switch (step) {
  case 0: *x = _mm256_unpacklo_ps(a, b), *y = _mm256_unpackhi_ps(a, b); break;
  case 1: *x = _mm256_castpd_ps(_mm256_unpacklo_pd(a2, b2)), *y = _mm256_castpd_ps(_mm256_unpackhi_pd(a2, b2)); break;
  default: *x = _mm256_permute2f128_ps(a, b, 0x20), *y = _mm256_permute2f128_ps(a, b, 0x31);
  }
}

V_INLINE uint64_t v_above(const float *x, int32_t n, int32_t limit) {
  uint64_t bits = 0;
  for (int32_t u = 0; u < n; u += 8)
    bits |= (uint64_t)vm_bits(vi_gt(vf_bits(vf_abs(vf_load(x + u))), vi_set(limit))) << u;
  return bits;
}
V_INLINE void v_mark32(const float *x, int32_t limit, uint32_t *bits) { *bits = (uint32_t)v_above(x, 32, limit); }

V_INLINE vf v_load_bf16(const uint16_t *p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
V_INLINE vf v_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
V_INLINE vf v_load_i8(const int8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p))); }
V_INLINE vf v_load_e4m3(const uint8_t *p) {
  const __m128i magnitude = _mm_set1_epi16(0x3f80), wide = _mm_cvtepi8_epi16(_mm_loadl_epi64((const void *)p));
  const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16((short)0xbf80));
  const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(_mm_and_si128(half, magnitude), magnitude), _mm_set1_epi16(0x7e00));
  return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(half, nan)), _mm256_set1_ps(256));
}
V_INLINE void v_load_e4m3_pair(const uint8_t *p, vf out[2]) {
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)p));
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)0xbf80));
  out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
  out[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
}
V_INLINE vi v_most_e4m3(vi most, const uint8_t *p, const int n) {
  const __m256i x = n == 16 ? _mm256_zextsi128_si256(_mm_loadu_si128((const void *)p)) : _mm256_loadu_si256((const void *)p);
  return _mm256_max_epu8(most, _mm256_or_si256(x, _mm256_set1_epi8((char)0x80)));
}
V_INLINE int v_has_nan_e4m3(vi most) { return _mm256_movemask_epi8(_mm256_cmpeq_epi8(most, _mm256_set1_epi8(-1))) != 0; }
V_INLINE void v_store_e4m3(uint8_t *p, vf x) {
  const __m256i bits = vf_bits(x), sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), vi_set(0x80)), size = vf_bits(vf_abs(x));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(size, 20), vi_set(1));
  const __m256i normal = _mm256_srli_epi32(_mm256_add_epi32(size, _mm256_add_epi32(odd, vi_set(0x7ffff - (120 << 23)))), 20);
  const __m256i small = _mm256_sub_epi32(vf_bits(vf_add(vf_abs(x), vf_set(0x1p14f))), vf_bits(vf_set(0x1p14f)));
  const __m256i is_small = _mm256_cmpgt_epi32(vf_bits(vf_set(0x1p-6f)), size);
  const __m256i bytes = _mm256_or_si256(sign, _mm256_blendv_epi8(normal, small, is_small));
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storel_epi64((void *)p, _mm_packus_epi16(words, words));
}
V_INLINE vf v_low_bf16(vf x) { return _mm256_castsi256_ps(_mm256_slli_epi32(vf_bits(x), 16)); }
V_INLINE vf v_high_bf16(vf x) { return _mm256_castsi256_ps(_mm256_and_si256(vf_bits(x), _mm256_set1_epi32(INT32_MIN >> 15))); }
V_INLINE void v_load_i4(const uint8_t *p, vf out[2]) {
  const vi pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p));
  out[0] = vi_to_float(vi_sub(vi_and(pairs, vi_set(15)), vi_set(8)));
  out[1] = vi_to_float(vi_sub(_mm256_srli_epi32(pairs, 4), vi_set(8)));
}
V_INLINE void v_split(vf x[2]) {
  const vf low = _mm256_permute2f128_ps(x[0], x[1], 0x20), high = _mm256_permute2f128_ps(x[0], x[1], 0x31);
  x[0] = _mm256_shuffle_ps(low, high, 0x88);
  x[1] = _mm256_shuffle_ps(low, high, 0xdd);
}
V_INLINE void v_join(vf x[2]) {
  const vf low = _mm256_unpacklo_ps(x[0], x[1]), high = _mm256_unpackhi_ps(x[0], x[1]);
  x[0] = _mm256_permute2f128_ps(low, high, 0x20);
  x[1] = _mm256_permute2f128_ps(low, high, 0x31);
}
V_INLINE void v_store_f16(uint16_t *p, vf x) { _mm_storeu_si128((void *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
V_INLINE void v_store_bf16(uint16_t *p, vf x) {
  __m256i bits = vf_bits(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), vi_set(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, vi_set(0x7fff))), 16);
  __m256i nan = _mm256_or_si256(_mm256_srli_epi32(bits, 16), vi_set(0x40));
  __m256i half = _mm256_blendv_epi8(rounded, nan, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  _mm_storeu_si128((void *)p, _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}
V_INLINE void v_store_i8(int8_t *p, vf x) {
  __m256i whole = _mm256_cvtps_epi32(x);
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64((void *)p, _mm_packs_epi16(words, words));
}

#endif
