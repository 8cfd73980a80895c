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
V_INLINE vi vf_bits(vf x) { return _mm512_castps_si512(x); }

V_INLINE vi vi_load(const int32_t *p) { return _mm512_loadu_si512(p); }
V_INLINE vi vi_set(int32_t x) { return _mm512_set1_epi32(x); }
V_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
V_INLINE void vi_store(int32_t *p, vi x) { _mm512_storeu_si512(p, x); }
V_INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
V_INLINE vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
V_INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
V_INLINE vf vi_to_float(vi x) { return _mm512_cvtepi32_ps(x); }
V_INLINE int32_t vi_reduce_max(vi x) { return _mm512_reduce_max_epi32(x); }

/* Products of the low 16 bits of both, the high ones of b being 0. */
V_INLINE vi vi_mul_i16(vi a, vi b) { return _mm512_madd_epi16(a, b); }
/* The next values at the lanes of a mask, 0 elsewhere; reads 16. */
V_INLINE vi vi_expand_i8(vm m, const int8_t *values) {
  return _mm512_maskz_expand_epi32(m, _mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)values)));
}

V_INLINE vm vi_gt(vi a, vi b) { return _mm512_cmpgt_epi32_mask(a, b); }
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

V_INLINE vf v_load_bf16(const uint16_t *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
V_INLINE vf v_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
V_INLINE vf v_load_i8(const int8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p))); }
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
