/* kernel/lookup_vbmi.h: 64 slots of int8 keys times a query, in AVX-512 with VBMI and VNNI. See keys_avx512.c for what becomes of it.
 *
 * A number q of the query is q = 256 h + l - 32768 with bytes h and l: two tables that vpermb or vpermi2b look up at 64 ids at once.
 * vpdpbusd multiplies unsigned by signed bytes and adds up quads, so that with the key's values v
 *
 *     sum q v = 256 sum h v + sum l v - 32768 sum v,
 *
 * the last sum being the same for every query row.
 */
#ifndef SFA_LOOKUP_VBMI_H
#define SFA_LOOKUP_VBMI_H

#include "kernel/simd_avx512.h"

/* Of a row's table, after its step: low bytes [size], high bytes [size], size = D rounded up to 64, 128 or 256, in the order of the
 * features, so that they serve dense keys too. Beyond 256 features: dwords [D], gathered, before bytes for dense keys, in 32s. */
enum { LOOKED_UP = 256 };

static int32_t bytes_size(int32_t D) { return D > LOOKED_UP ? (D + 31) / 32 * 32 : D <= 64 ? 64 : D <= 128 ? 128 : 256; }
static int32_t bytes_offset(int32_t D) { return D > LOOKED_UP ? D * 4 : 0; }

static void write_whole(int32_t D, const float *q, float step, void *numbers) {
  uint8_t *low = (uint8_t *)numbers + bytes_offset(D), *high = low + bytes_size(D);
  memset(low, 0, 2 * (size_t)bytes_size(D));
  for (int32_t u = 0; u < D; u++) {
    const int32_t whole = step == step ? (int32_t)(q[u] / step) : 0; /* with a NaN step any numbers will do */
    if (D > LOOKED_UP)
      ((int32_t *)numbers)[u] = whole;
    low[u] = (uint8_t)(whole & 255);
    high[u] = (uint8_t)((whole + 32768) >> 8);
  }
}

/* Values, and what their quads are too large by. */
typedef struct slot64 {
  __m512i values, excess;
} slot64;

V_INLINE slot64 slots_of(__m512i values) {
  return (slot64){values, _mm512_slli_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(-128), values), 8)};
}

V_INLINE __m512i quads_of(__m512i low, __m512i high, slot64 k) {
  const __m512i upper = _mm512_slli_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), high, k.values), 8);
  return _mm512_dpbusd_epi32(_mm512_sub_epi32(upper, k.excess), low, k.values);
}

/* Bytes of a table of `size`, a constant where this is inlined, at ids. */
V_INLINE __m512i look_up(const int size, const void *table, __m512i ids) {
  const __m512i *t = (const __m512i *)table;
  if (size == 64)
    return _mm512_permutexvar_epi8(ids, t[0]);
  const __m512i bytes = _mm512_permutex2var_epi8(t[0], ids, t[1]);
  return size == 128 ? bytes : _mm512_mask_blend_epi8(_mm512_movepi8_mask(ids), bytes, _mm512_permutex2var_epi8(t[2], ids, t[3]));
}

V_INLINE __m512i look_up_quads(const int size, const void *table, __m512i ids, slot64 k) {
  return quads_of(look_up(size, table, ids), look_up(size, (const char *)table + size, ids), k);
}

/* 32 features from `first` on, the same for two dense keys. */
V_INLINE __m512i dense_quads(const void *table, int32_t D, int32_t first, slot64 k) {
  const char *low = (const char *)table + bytes_offset(D) + first;
  return quads_of(_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)low)),
                  _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(low + bytes_size(D)))), k);
}

/* Ids of two bytes: 32 of one key and 32 of another. */
V_INLINE __m512i gather_quads(const int32_t *table, __m512i ids_a, __m512i ids_b, slot64 k) {
  const __m512i half[2] = {ids_a, ids_b};
  __m512i words[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const __m512i even = _mm512_i32gather_epi32(_mm512_and_si512(half[i], _mm512_set1_epi32(0xffff)), table, 4);
    const __m512i odd = _mm512_i32gather_epi32(_mm512_srli_epi32(half[i], 16), table, 4);
    words[i] = _mm512_add_epi16(_mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16)), _mm512_set1_epi16(INT16_MIN));
  }
  const __m512i low = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(words[0])), _mm512_cvtepi16_epi8(words[1]), 1);
  const __m512i high = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(_mm512_srli_epi16(words[0], 8))),
                                          _mm512_cvtepi16_epi8(_mm512_srli_epi16(words[1], 8)), 1);
  return quads_of(low, high, k);
}

#endif
