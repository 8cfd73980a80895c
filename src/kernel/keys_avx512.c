/* Scores of int8 keys whose lanes are keys, in AVX-512: sums of products of whole numbers, exact in any order (kernel.h).
 *
 * 64 slots of keys, ids and values as they lie in memory, are one register each. lookup_<isa>.h, which comes before, looks the query's
 * numbers up at the ids, multiplies them by the values and adds up four neighbouring slots: a register of 16 quads. What remains is to add
 * the quads of each key: a tree of shuffles and adds that ends in a vector of 16 keys.
 *
 *     K = 8:  a register holds 8 keys of 2 quads;  K = 16: 4 keys of 4 quads;  else 2 keys, 32 slots each, of 8 quads.
 */

/* ---- sums of 16 keys ---- */

/* K = 8: 2 registers of 8 keys with 2 quads. */
V_INLINE __m512i fold_2(const __m512i *quads) {
  const __m512 a = _mm512_castsi512_ps(quads[0]), b = _mm512_castsi512_ps(quads[1]);
  const __m512i sum =
      _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)), _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd)));
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), sum); /* lane i held keys 2 i, 2 i + 1, 8 + 2 i, 9 + 2 i */
}

/* K = 16: 4 registers of 4 keys with 4 quads. */
V_INLINE __m512i fold_4(const __m512i *quads) {
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(quads[0], quads[1]), _mm512_unpackhi_epi32(quads[0], quads[1]));
  const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(quads[2], quads[3]), _mm512_unpackhi_epi32(quads[2], quads[3]));
  const __m512i sum = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), sum); /* lane i: i, 4 + i, .. */
}

/* 8 registers of 2 keys with 8 quads. */
V_INLINE __m512i fold_8(const __m512i *quads) {
  __m512i half[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    half[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                               _mm512_shuffle_i32x4(quads[2 * i], quads[2 * i + 1], 0xdd));
  return fold_4(half);
}

/* ---- a tile ---- */

/* What the sums of 16 keys end as: S = sum * step * (scale of the key * query_scale). */
V_INLINE void store_scores(__m512 total, float step, __m512 key_scale, float *S) {
  _mm512_storeu_ps(S, _mm512_mul_ps(_mm512_mul_ps(total, _mm512_set1_ps(step)), key_scale));
}

/* A whole tile of codes that lie packed, K 8 or 16 (a constant where this is inlined). */
V_INLINE void score_packed(const int K, const int size, const sfa_stored_rows *keys, int32_t n_rows, int32_t D, const void *table,
                           float query_scale, const float *scale, float *S) {
  enum { most = 4 };
  const int n = K / 4, lines = K / 2 + 1; /* registers of 16 keys; their lines of memory, and of scales */
  const char *ahead = keys->next ? keys->next : keys->values;
  for (int32_t j = 0; j < SFA_KEY_TILE; j += 16) {
    const __m512 key_scale = _mm512_mul_ps(_mm512_loadu_ps(scale + j), _mm512_set1_ps(query_scale));
#pragma GCC unroll 9
    for (int line = 0; line < lines; line++, ahead += 64)
      __builtin_prefetch(ahead);
    __m512i ids[most], quads[most];
    slot64 k[most];
#pragma GCC unroll 4
    for (int r = 0; r < n; r++) {
      ids[r] = _mm512_loadu_si512((const char *)keys->ids + j * K + r * 64);
      k[r] = slots_of(_mm512_loadu_si512((const char *)keys->values + j * K + r * 64));
    }
    for (int32_t i = 0; i < n_rows; i++) {
      const float *head = (const float *)((const char *)table + (size_t)i * sfa_query_table_bytes(D));
#pragma GCC unroll 4
      for (int r = 0; r < n; r++)
        quads[r] = look_up_quads(size, head + 16, ids[r], k[r]);
      store_scores(_mm512_cvtepi32_ps(K == 8 ? fold_2(quads) : fold_4(quads)), head[0], key_scale, S + i * SFA_KEY_TILE + j);
    }
  }
}

/* The first `terms` of 32 bytes at each of two addresses; a mask of none reads nothing. */
V_INLINE __m512i load_two(const void *a, __mmask32 mask_a, const void *b, __mmask32 mask_b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi8(mask_a, a)), _mm256_maskz_loadu_epi8(mask_b, b), 1);
}

/* Ids of two bytes; those of no feature become the last one. */
V_INLINE __m512i load_ids(__mmask32 mask, const uint16_t *ids, int32_t D) {
  return _mm512_min_epu16(_mm512_maskz_loadu_epi16(mask, ids), _mm512_set1_epi16((int16_t)(D - 1)));
}

/* 32 slots (or the last ones) of 16 keys, one pair of keys a register: their quads with one query row. size: words of its table, 0 for
 * dense keys, 2 for gathered ids of two bytes; a constant where this is inlined. */
V_INLINE __m512i chunk_sums(const int size, const sfa_stored_rows *keys, int32_t first, int32_t key, const __mmask32 *masks,
                            const slot64 *k, int32_t D, const float *head) {
  __m512i quads[8];
#pragma GCC unroll 8
  for (int p = 0; p < 8; p++) {
    const int64_t a = (key + 2 * p) * keys->ids_stride + first, b = a + keys->ids_stride;
    if (size == 0)
      quads[p] = dense_quads(head + 16, D, first, k[p]);
    else if (size == 2)
      quads[p] = gather_quads((const int32_t *)(head + 16), load_ids(masks[2 * p], (const uint16_t *)keys->ids + a, D),
                              load_ids(masks[2 * p + 1], (const uint16_t *)keys->ids + b, D), k[p]);
    else
      quads[p] = look_up_quads(
          size, head + 16, load_two((const uint8_t *)keys->ids + a, masks[2 * p], (const uint8_t *)keys->ids + b, masks[2 * p + 1]), k[p]);
  }
  return fold_8(quads);
}

/* Any number of keys, slots and strides. */
V_INLINE void score_chunks(const int size, const sfa_stored_rows *keys, int32_t n_rows, int32_t D, const void *table, float query_scale,
                           const float *scale, float *S) {
  const int32_t n_chunks = (keys->width + SFA_EXACT_TERMS - 1) / SFA_EXACT_TERMS;
  for (int32_t j = 0; j < keys->n; j += 16) {
    const __m512 key_scale = _mm512_mul_ps(_mm512_loadu_ps(scale + j), _mm512_set1_ps(query_scale));
    for (int32_t first = 0; first < keys->width; first += SFA_EXACT_TERMS) {
      const int32_t terms = keys->width - first < SFA_EXACT_TERMS ? keys->width - first : SFA_EXACT_TERMS;
      const int last = first + terms == keys->width;
      sfa_next_prefetch(keys, j / 16 * n_chunks + first / SFA_EXACT_TERMS, SFA_KEY_TILE / 16 * n_chunks);
      __mmask32 masks[16];
      slot64 k[8];
      for (int i = 0; i < 16; i++)
        masks[i] = j + i < keys->n ? 0xffffffffu >> (32 - terms) : 0;
      for (int p = 0; p < 8; p++) {
        const int8_t *a = (const int8_t *)keys->values + (j + 2 * p) * keys->values_stride + first;
        k[p] = slots_of(load_two(a, masks[2 * p], a + keys->values_stride, masks[2 * p + 1]));
      }
      for (int32_t i = 0; i < n_rows; i++) {
        const float *head = (const float *)((const char *)table + (size_t)i * sfa_query_table_bytes(D));
        float *s = S + i * SFA_KEY_TILE + j;
        __m512 total = _mm512_cvtepi32_ps(chunk_sums(size, keys, first, j, masks, k, D, head));
        if (first)
          total = _mm512_add_ps(_mm512_loadu_ps(s), total);
        if (last)
          store_scores(total, head[0], key_scale, s);
        else
          _mm512_storeu_ps(s, total);
      }
    }
  }
}

static void score_whole(const sfa_stored_rows *keys, int32_t n_rows, int32_t D, const void *table, float query_scale, float *S) {
  const int packed = keys->n == SFA_KEY_TILE && keys->ids_stride == keys->width && keys->values_stride == keys->width;
  float scale[SFA_KEY_TILE];
  load_scales(keys, scale);
  if (!keys->ids)
    score_chunks(0, keys, n_rows, D, table, query_scale, scale, S);
  else if (D > LOOKED_UP)
    score_chunks(2, keys, n_rows, D, table, query_scale, scale, S);
  else if (packed && keys->width == 16 && D <= 64)
    score_packed(16, 64, keys, n_rows, D, table, query_scale, scale, S);
  else if (packed && keys->width == 16 && D <= 128)
    score_packed(16, 128, keys, n_rows, D, table, query_scale, scale, S);
  else if (packed && keys->width == 16)
    score_packed(16, 256, keys, n_rows, D, table, query_scale, scale, S);
  else if (packed && keys->width == 8 && D <= 64)
    score_packed(8, 64, keys, n_rows, D, table, query_scale, scale, S);
  else if (packed && keys->width == 8 && D <= 128)
    score_packed(8, 128, keys, n_rows, D, table, query_scale, scale, S);
  else if (packed && keys->width == 8)
    score_packed(8, 256, keys, n_rows, D, table, query_scale, scale, S);
  else if (D <= 64)
    score_chunks(64, keys, n_rows, D, table, query_scale, scale, S);
  else if (D <= 128)
    score_chunks(128, keys, n_rows, D, table, query_scale, scale, S);
  else
    score_chunks(256, keys, n_rows, D, table, query_scale, scale, S);
}
