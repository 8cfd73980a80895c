/* device/lanes_avx2.h: 16 lanes in two registers; AVX2, FMA, F16C. */
#ifndef SFA_LANES_H
#define SFA_LANES_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { DENSE_ROWS = 6, DENSE_PANELS = 1, BLOCK_ROWS = 2, BLOCK_PANELS = 1 };

typedef struct lanes {
  __m256 a, b;
} lanes;
typedef struct ilanes {
  __m256i a, b;
} ilanes;
typedef ilanes blanes;

#define PAIRWISE(type, f, x, y) ((type){f((x).a, (y).a), f((x).b, (y).b)})

static inline lanes lanes_set(float x) { return (lanes){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline lanes lanes_load(const float *p) { return (lanes){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline lanes lanes_load_some(const float *p, int32_t n) {
  float padded[16] = {0};
  memcpy(padded, p, (size_t)n * sizeof *p);
  return lanes_load(padded);
}
static inline __m256 widen_bf16(const uint16_t *p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
static inline lanes lanes_load_bf16(const uint16_t *p) { return (lanes){widen_bf16(p), widen_bf16(p + 8)}; }
static inline lanes lanes_load_f16(const uint16_t *p) {
  return (lanes){_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)), _mm256_cvtph_ps(_mm_loadu_si128((const void *)(p + 8)))};
}
static inline void lanes_store(float *p, lanes x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
static inline void lanes_store_some(float *p, lanes x, int32_t n) {
  float padded[16];
  lanes_store(padded, x);
  memcpy(p, padded, (size_t)n * sizeof *p);
}
static inline lanes lanes_add(lanes x, lanes y) { return PAIRWISE(lanes, _mm256_add_ps, x, y); }
static inline lanes lanes_sub(lanes x, lanes y) { return PAIRWISE(lanes, _mm256_sub_ps, x, y); }
static inline lanes lanes_mul(lanes x, lanes y) { return PAIRWISE(lanes, _mm256_mul_ps, x, y); }
static inline lanes lanes_div(lanes x, lanes y) { return PAIRWISE(lanes, _mm256_div_ps, x, y); }
static inline lanes lanes_sqrt(lanes x) { return (lanes){_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
static inline lanes lanes_fma(lanes x, lanes y, lanes z) { return (lanes){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline lanes lanes_min(lanes x, lanes y) { return PAIRWISE(lanes, _mm256_min_ps, x, y); }
static inline lanes lanes_max(lanes x, lanes y) { return PAIRWISE(lanes, _mm256_max_ps, x, y); }
static inline lanes lanes_abs(lanes x) {
  lanes mask = lanes_set(-0.0f);
  return PAIRWISE(lanes, _mm256_andnot_ps, mask, x);
}
static inline __m256 scale2(__m256 x, __m256 n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}
static inline lanes lanes_scale2(lanes x, lanes shifted_n) { return PAIRWISE(lanes, scale2, x, shifted_n); }

static inline ilanes ilanes_set(int32_t x) { return (ilanes){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline lanes lanes_from_i32(ilanes x) { return (lanes){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline void store_i8(int8_t *p, __m256i a, __m256i b) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8); /* from a0-3 b0-3 a4-7 b4-7 to a0-7 b0-7 */
  _mm_storeu_si128((void *)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
static inline __m256i high_plane(__m256i q) { return _mm256_srai_epi32(_mm256_add_epi32(q, _mm256_set1_epi32(64)), 7); }
static inline void lanes_store_planes(int8_t *high, int8_t *low, lanes x) {
  __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b), top_a = high_plane(a), top_b = high_plane(b);
  store_i8(high, top_a, top_b);
  store_i8(low, _mm256_sub_epi32(a, _mm256_slli_epi32(top_a, 7)), _mm256_sub_epi32(b, _mm256_slli_epi32(top_b, 7)));
}
static inline __m256i join(__m256i a, __m256i b) { return _mm256_add_epi32(_mm256_slli_epi32(a, 7), b); }
static inline ilanes ilanes_join(ilanes x, ilanes y) { return PAIRWISE(ilanes, join, x, y); }

static inline blanes blanes_load(const uint8_t *p) {
  return (blanes){_mm256_loadu_si256((const void *)p), _mm256_loadu_si256((const void *)(p + 32))};
}
static inline blanes blanes_low(blanes x) {
  __m256i mask = _mm256_set1_epi8(15);
  return (blanes){_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
static inline blanes blanes_high(blanes x) { return blanes_low((blanes){_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
/* Two products of a byte up to 127 with an int8 fit 16 bits; the upper bit of a larger byte is a second such pair. */
static inline __m256i dot_small(__m256i acc, __m256i w, __m256i x) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
static inline __m256i dot_full(__m256i acc, __m256i w, __m256i x) {
  __m256i top = _mm256_set1_epi8(-128);
  return dot_small(dot_small(acc, _mm256_andnot_si256(top, w), x), _mm256_and_si256(top, w), x);
}
static inline ilanes ilanes_dot(ilanes acc, blanes w, int32_t x, int small) {
  __m256i v = _mm256_set1_epi32(x);
  return small ? (ilanes){dot_small(acc.a, w.a, v), dot_small(acc.b, w.b, v)} : (ilanes){dot_full(acc.a, w.a, v), dot_full(acc.b, w.b, v)};
}

#undef PAIRWISE
#endif
