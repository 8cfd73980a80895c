/* score_lists: Algorithm 1 of the paper on one tile. A query walks its features, and each feature the tile's keys that keep it: one
 * multiply-add scattered into the scores for every overlap of two supports, and none for the rest. Rising features give the sums of
 * score_codes. It multiplies less than that and loses all the same: one number at a time, at addresses that are known late. */

static inline void score_lists_rows(const int id_bytes, int32_t n_keys, int32_t n_rows, int32_t K, const void *ids, const float *values,
                                    const sfa_key_lists *lists, const float *key_scale, int64_t W, float *S) {
  for (int32_t i = 0; i < n_rows; i++) {
    float sum[SFA_KEY_TILE] = {0};
    for (int64_t u = (int64_t)i * K; u < (int64_t)(i + 1) * K; u++) {
      const int32_t feature = id_bytes == 1 ? ((const uint8_t *)ids)[u] : ((const uint16_t *)ids)[u];
      const int32_t end = lists->starts[feature + 1];
      for (int32_t at = lists->starts[feature]; at < end; at++)
        sum[lists->keys[at]] = fmaf(lists->values[at], values[u], sum[lists->keys[at]]);
    }
    for (int32_t j = 0; j < n_keys; j++)
      S[j * W + i] = key_scale ? sum[j] * key_scale[j] : sum[j];
  }
}

static void score_lists(int32_t n_keys, int32_t n_rows, int32_t K, const void *ids, int32_t id_bytes, const float *values,
                        const sfa_key_lists *lists, const float *key_scale, int32_t W, float *S) {
  memset(S, 0, (size_t)n_keys * (size_t)W * sizeof *S);
  if (id_bytes == 1)
    score_lists_rows(1, n_keys, n_rows, K, ids, values, lists, key_scale, W, S);
  else
    score_lists_rows(2, n_keys, n_rows, K, ids, values, lists, key_scale, W, S);
}
