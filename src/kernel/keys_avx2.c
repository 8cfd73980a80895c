/* Scores of int8 keys whose lanes are keys, in AVX2: sums of products of whole numbers, exact in any order (kernel.h).
 *
 * 8 slots of a key are one register of dwords: the query at their ids, gathered, and their values. vpmaddwd multiplies them: the upper
 * words of the values are cleared, so that the upper words of the query, which are signs, count nothing. 8 keys, a register each, are then
 * added up by pairs into a vector of 8 keys. */

/* After a row's step: dwords [D]. */
static void write_whole(int32_t D, const float *q, float step, void *numbers) {
  for (int32_t u = 0; u < D; u++)
    ((int32_t *)numbers)[u] = step == step ? (int32_t)(q[u] / step) : 0; /* with a NaN step any numbers will do */
}

/* The sums of 8 registers. */
V_INLINE __m256i fold_8(const __m256i *x) {
  const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3]));
  const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(x[4], x[5]), _mm256_hadd_epi32(x[6], x[7]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

/* Up to 32 slots, in eights, of one key: id_bytes 0 for dense keys; a constant where this is inlined. */
V_INLINE __m256i key_products(const int id_bytes, const void *ids, const int8_t *values, int32_t terms, int32_t D, const int32_t *q) {
  __m256i sum = _mm256_setzero_si256();
  for (int32_t u = 0; u < terms; u += 8) {
    const __m256i k = _mm256_and_si256(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(values + u))), _mm256_set1_epi32(0xffff));
    const __m256i at = id_bytes == 1   ? _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)((const uint8_t *)ids + u)))
                       : id_bytes == 2 ? _mm256_min_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)((const uint16_t *)ids + u))),
                                                          _mm256_set1_epi32(D - 1))
                                       : _mm256_setzero_si256();
    const __m256i row = id_bytes ? _mm256_i32gather_epi32(q, at, 4) : _mm256_loadu_si256((const void *)(q + u));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(row, k));
  }
  return sum;
}

/* The same where the slots are no whole eights: through copies with zeros behind. */
static __m256i key_products_copied(int id_bytes, const void *ids, const int8_t *values, int32_t terms, int32_t D, const int32_t *q) {
  int8_t some_values[SFA_EXACT_TERMS] = {0};
  uint16_t some_ids[SFA_EXACT_TERMS] = {0};
  memcpy(some_values, values, (size_t)terms);
  for (int32_t u = 0; u < terms; u++)
    some_ids[u] = id_bytes == 1 ? ((const uint8_t *)ids)[u] : ((const uint16_t *)ids)[u];
  return key_products(2, some_ids, some_values, terms, D, q);
}

V_INLINE void score_whole_of(const int id_bytes, const sfa_stored_rows *keys, int32_t n_rows, int32_t D, const void *table,
                             float query_scale, const float *scale, float *S) {
  for (int32_t j = 0; j < keys->n; j += 8) {
    const __m256 key_scale = _mm256_mul_ps(_mm256_loadu_ps(scale + j), _mm256_set1_ps(query_scale));
    sfa_next_prefetch(keys, j / 8, SFA_KEY_TILE / 8);
    for (int32_t i = 0; i < n_rows; i++) {
      const float *head = (const float *)((const char *)table + (size_t)i * sfa_query_table_bytes(D));
      const int32_t *q = (const int32_t *)(head + 16);
      __m256 total = _mm256_setzero_ps();
      for (int32_t first = 0; first < keys->width; first += SFA_EXACT_TERMS) {
        const int32_t terms = keys->width - first < SFA_EXACT_TERMS ? keys->width - first : SFA_EXACT_TERMS;
        __m256i sums[8];
        for (int c = 0; c < 8; c++) {
          const int32_t key = j + c < keys->n ? j + c : keys->n - 1;
          const char *ids = id_bytes ? (const char *)keys->ids + (key * keys->ids_stride + first) * id_bytes : NULL;
          const int8_t *values = (const int8_t *)keys->values + key * keys->values_stride + first;
          if (terms % 8 == 0)
            sums[c] = key_products(id_bytes, ids, values, terms, D, id_bytes ? q : q + first);
          else
            sums[c] = key_products_copied(id_bytes, ids, values, terms, D, q);
        }
        total = _mm256_add_ps(total, _mm256_cvtepi32_ps(fold_8(sums)));
      }
      _mm256_storeu_ps(S + i * SFA_KEY_TILE + j, _mm256_mul_ps(_mm256_mul_ps(total, _mm256_set1_ps(head[0])), key_scale));
    }
  }
}

static void score_whole(const sfa_stored_rows *keys, int32_t n_rows, int32_t D, const void *table, float query_scale, float *S) {
  float scale[SFA_KEY_TILE];
  load_scales(keys, scale);
  if (!keys->ids)
    score_whole_of(0, keys, n_rows, D, table, query_scale, scale, S);
  else if (D <= 256)
    score_whole_of(1, keys, n_rows, D, table, query_scale, scale, S);
  else
    score_whole_of(2, keys, n_rows, D, table, query_scale, scale, S);
}
