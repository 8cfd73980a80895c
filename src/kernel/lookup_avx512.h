/* kernel/lookup_avx512.h: 64 slots of int8 keys times a query, in AVX-512 with BW. See keys_avx512.c for what becomes of it.
 *
 * The query is a table of 16-bit whole numbers in registers that vpermi2w looks up, 64 of its entries an instruction. Words are half as
 * many as bytes, so slots go as the even and the odd ones: no unpacking, for a look-up ignores the upper bits of its index. vpmaddwd adds
 * pairs of products; even and odd together are quads.
 */
#ifndef SFA_LOOKUP_AVX512_H
#define SFA_LOOKUP_AVX512_H

#include "kernel/simd_avx512.h"

/* Of a row's table, after its step. Codes with ids of a byte: words [D, rounded up to 64, 128 or 256]. Dense keys: words of even features
 * and of odd ones, 16 and 16 for each 32. Ids of two bytes: dwords [D], gathered. */
enum { LOOKED_UP = 256 }; /* words at most */

static int32_t dense_offset(int32_t D) { return D > LOOKED_UP ? D * 2 : D <= 64 ? 64 : D <= 128 ? 128 : 256; } /* words */

static void write_whole(int32_t D, const float *q, float step, void *numbers) {
  int16_t *words = numbers, *dense = words + dense_offset(D);
  memset(dense, 0, (size_t)(D + 31) / 32 * 64);
  memset(words, 0, (size_t)dense_offset(D) * sizeof *words);
  for (int32_t u = 0; u < D; u++) {
    const int32_t whole = step == step ? (int32_t)(q[u] / step) : 0; /* with a NaN step any numbers will do */
    if (D > LOOKED_UP)
      ((int32_t *)numbers)[u] = whole;
    else
      words[u] = (int16_t)whole;
    dense[u / 32 * 32 + u % 2 * 16 + u % 32 / 2] = (int16_t)whole;
  }
}

/* ---- 64 slots ---- */

/* Even slots and odd slots as words. */
typedef struct slot64 {
  __m512i even, odd;
} slot64;

V_INLINE slot64 slots_of(__m512i values) {
  return (slot64){_mm512_srai_epi16(_mm512_slli_epi16(values, 8), 8), _mm512_srai_epi16(values, 8)};
}

/* Words of the table at the ids in the low bytes; `size` words, a constant where this is inlined. */
V_INLINE __m512i look_up(const int size, const int16_t *table, __m512i ids) {
  const __m512i *t = (const __m512i *)table;
  __m512i words = _mm512_permutex2var_epi16(t[0], ids, t[1]);
  if (size > 64)
    words = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(ids, _mm512_set1_epi16(64)), words, _mm512_permutex2var_epi16(t[2], ids, t[3]));
  if (size > 128) {
    const __mmask32 odd = _mm512_test_epi16_mask(ids, _mm512_set1_epi16(64)), upper = _mm512_test_epi16_mask(ids, _mm512_set1_epi16(128));
    const __m512i high =
        _mm512_mask_blend_epi16(odd, _mm512_permutex2var_epi16(t[4], ids, t[5]), _mm512_permutex2var_epi16(t[6], ids, t[7]));
    words = _mm512_mask_blend_epi16(upper, words, high);
  }
  return words;
}

V_INLINE __m512i quads_of(slot64 q, slot64 k) {
  return _mm512_add_epi32(_mm512_madd_epi16(q.even, k.even), _mm512_madd_epi16(q.odd, k.odd));
}

V_INLINE __m512i look_up_quads(const int size, const void *table, __m512i ids, slot64 k) {
  return quads_of((slot64){look_up(size, table, ids), look_up(size, table, _mm512_srli_epi16(ids, 8))}, k);
}

/* 32 features from `first` on, the same for two dense keys. */
V_INLINE __m512i dense_quads(const void *table, int32_t D, int32_t first, slot64 k) {
  const int16_t *words = (const int16_t *)table + dense_offset(D) + first;
  return quads_of((slot64){_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)words)),
                           _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(words + 16)))},
                  k);
}

/* Ids of two bytes: 32 of one key and 32 of another. */
V_INLINE __m512i gather_quads(const int32_t *table, __m512i ids_a, __m512i ids_b, slot64 k) {
  const __m512i low = _mm512_set1_epi32(0xffff);
  const __m512i pack = _mm512_setr_epi32(0x20000, 0x60004, 0xa0008, 0xe000c, 0x120010, 0x160014, 0x1a0018, 0x1e001c, 0x220020, 0x260024,
                                         0x2a0028, 0x2e002c, 0x320030, 0x360034, 0x3a0038, 0x3e003c); /* words 0, 2, 4, .. */
  return quads_of((slot64){_mm512_permutex2var_epi16(_mm512_i32gather_epi32(_mm512_and_si512(ids_a, low), table, 4), pack,
                                                     _mm512_i32gather_epi32(_mm512_and_si512(ids_b, low), table, 4)),
                           _mm512_permutex2var_epi16(_mm512_i32gather_epi32(_mm512_srli_epi32(ids_a, 16), table, 4), pack,
                                                     _mm512_i32gather_epi32(_mm512_srli_epi32(ids_b, 16), table, 4))},
                  k);
}

#endif
