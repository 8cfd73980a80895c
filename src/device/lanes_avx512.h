/* device/lanes_avx512.h: 16 lanes in one register; AVX-512 with VNNI. */
#ifndef SFA_LANES_H
#define SFA_LANES_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { DENSE_ROWS = 12, DENSE_PANELS = 2, BLOCK_ROWS = 4, BLOCK_PANELS = 2 };

typedef __m512 lanes;
typedef __m512i ilanes;
typedef __m512i blanes;

static inline lanes lanes_set(float x) { return _mm512_set1_ps(x); }
static inline lanes lanes_load(const float *p) { return _mm512_loadu_ps(p); }
static inline lanes lanes_load_some(const float *p, int32_t n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
static inline lanes lanes_load_bf16(const uint16_t *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
static inline lanes lanes_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
static inline void lanes_store(float *p, lanes a) { _mm512_storeu_ps(p, a); }
static inline void lanes_store_some(float *p, lanes a, int32_t n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a); }
static inline lanes lanes_add(lanes a, lanes b) { return _mm512_add_ps(a, b); }
static inline lanes lanes_sub(lanes a, lanes b) { return _mm512_sub_ps(a, b); }
static inline lanes lanes_mul(lanes a, lanes b) { return _mm512_mul_ps(a, b); }
static inline lanes lanes_div(lanes a, lanes b) { return _mm512_div_ps(a, b); }
static inline lanes lanes_sqrt(lanes a) { return _mm512_sqrt_ps(a); }
static inline lanes lanes_fma(lanes a, lanes b, lanes c) { return _mm512_fmadd_ps(a, b, c); }
static inline lanes lanes_min(lanes a, lanes b) { return _mm512_min_ps(a, b); }
static inline lanes lanes_max(lanes a, lanes b) { return _mm512_max_ps(a, b); }
static inline lanes lanes_abs(lanes a) { return _mm512_abs_ps(a); }
static inline lanes lanes_scale2(lanes a, lanes shifted_n) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_castps_si512(shifted_n), 23)));
}

/* lane j of x[i] and lane i of x[j] change places: pairs, fours, then quarters of registers. */
#define LANES_TRANSPOSE
static inline void lanes_transpose(lanes x[16]) {
  lanes y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      __m512d a = _mm512_castps_pd(y[i + h]), b = _mm512_castps_pd(y[i + 2 + h]);
      x[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      x[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) { /* x[4 q + i] has columns i, 4 + i, 8 + i, 12 + i of rows 4 q .. 4 q + 3 */
    lanes a = _mm512_shuffle_f32x4(x[i], x[4 + i], 0x88), b = _mm512_shuffle_f32x4(x[i], x[4 + i], 0xdd);
    lanes c = _mm512_shuffle_f32x4(x[8 + i], x[12 + i], 0x88), d = _mm512_shuffle_f32x4(x[8 + i], x[12 + i], 0xdd);
    y[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    y[8 + i] = _mm512_shuffle_f32x4(a, c, 0xdd);
    y[4 + i] = _mm512_shuffle_f32x4(b, d, 0x88);
    y[12 + i] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++)
    x[i] = y[i];
}

static inline ilanes ilanes_set(int32_t x) { return _mm512_set1_epi32(x); }
static inline lanes lanes_from_i32(ilanes a) { return _mm512_cvtepi32_ps(a); }
static inline void lanes_store_planes(int8_t *high, int8_t *low, lanes a) {
  __m512i q = _mm512_cvtps_epi32(a), top = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(64)), 7);
  _mm_storeu_si128((void *)high, _mm512_cvtepi32_epi8(top));
  _mm_storeu_si128((void *)low, _mm512_cvtepi32_epi8(_mm512_sub_epi32(q, _mm512_slli_epi32(top, 7))));
}
static inline ilanes ilanes_join(ilanes a, ilanes b) { return _mm512_add_epi32(_mm512_slli_epi32(a, 7), b); }

static inline blanes blanes_load(const uint8_t *p) { return _mm512_loadu_si512(p); }
static inline blanes blanes_low(blanes a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
static inline blanes blanes_high(blanes a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
static inline ilanes ilanes_dot(ilanes acc, blanes w, int32_t x, int small) {
  (void)small;
  return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x));
}

#endif
