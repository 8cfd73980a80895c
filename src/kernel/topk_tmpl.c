/* topk: the K features of largest magnitude of each row.
 *
 * Two steps. First the K-th largest magnitude, the threshold: V_LANES rows at once, lanes are rows. Their features arrive 8 at a time,
 * are sorted by a network of compare-exchanges (no branch, no index) and merged into a list of the 8, 16 or 32 largest so far. Then, row
 * by row, the features whose magnitude reaches the threshold, read off as bits in rising order.
 * If exactly K features reach the threshold they are the answer, whatever it was found by. So the network may compare magnitudes as
 * floats (twice as fast as integers on AVX-512), which a NaN upsets: such a row, one with ties at the K-th place, and every K beyond the
 * lists find their threshold by bisection over the magnitude's bits instead.
 */

V_INLINE void topk_exchange(vf *x, int i, int j) {
  vf small = vf_min(x[i], x[j]);
  x[i] = vf_max(x[i], x[j]);
  x[j] = small;
}

/* 8 vectors into falling order, lane by lane: the smallest network known, 19 exchanges in 6 layers. */
V_INLINE void topk_sort8(vf x[8]) {
  static const struct {
    uint8_t i, j;
  } pairs[19] = {{0, 2}, {1, 3}, {4, 6}, {5, 7}, {0, 4}, {1, 5}, {2, 6}, {3, 7}, {0, 1}, {2, 3},
                 {4, 5}, {6, 7}, {2, 4}, {3, 5}, {1, 4}, {3, 6}, {1, 2}, {3, 4}, {5, 6}};
#pragma GCC unroll 19
  for (int c = 0; c < 19; c++)
    topk_exchange(x, pairs[c].i, pairs[c].j);
}

/* Thresholds of V_LANES rows: the K-th largest magnitude in a list of `length` (a constant where this is inlined) >= K. */
V_INLINE vf topk_network(const float *const rows[V_LANES], int32_t D, int32_t K, const int length) {
  vf list[32];
#pragma GCC unroll 32
  for (int i = 0; i < length; i++)
    list[i] = vf_zero();
  for (int32_t u = 0; u < D; u += 8) {
    vf x[8];
    vf_turn(rows, u, x);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
      x[i] = vf_abs(x[i]);
    topk_sort8(x);
    /* The largest of both: falling list against rising x, then a bitonic sequence, which `length / 2, ... 1` exchanges sort. */
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
      list[length - 1 - i] = vf_max(list[length - 1 - i], x[i]);
#pragma GCC unroll 5
    for (int step = length / 2; step > 0; step /= 2)
#pragma GCC unroll 32
      for (int i = 0; i < length; i++)
        if (!(i & step))
          topk_exchange(list, i, i + step);
  }
  return list[K - 1];
}

/* ---- One row: which features reach the threshold ---- */

enum { TOPK_WORDS = 1024 }; /* of 64 features: D <= 65536 */

/* Bit u: the magnitude of x[u] is above limit. Returns how many are. */
V_INLINE int32_t topk_mark(const float *x, int32_t D, int32_t limit, uint64_t *words) {
  int32_t count = 0;
  for (int32_t u = 0; u < D; u += 64, words++) {
    *words = D - u >= 64 ? v_above(x + u, 64, limit) : v_above(x + u, D - u, limit);
    count += __builtin_popcountll(*words);
  }
  return count;
}

/* The slow way, right for every row: the threshold bit by bit from the top, then what is above it and the first ones at it. */
static __attribute__((noinline)) void topk_bisect(const float *x, int32_t D, int32_t K, uint64_t *words) {
  uint64_t at_least[TOPK_WORDS];
  int32_t threshold = 0;
  for (int bit = 30; bit >= 0; bit--)
    if (topk_mark(x, D, (threshold | 1 << bit) - 1, words) >= K)
      threshold |= 1 << bit;
  int32_t n_tied = K - topk_mark(x, D, threshold, words);
  topk_mark(x, D, threshold - 1, at_least);
  for (int32_t w = 0; n_tied > 0; w++)
    for (uint64_t tied = at_least[w] & ~words[w]; tied && n_tied > 0; tied &= tied - 1, n_tied--)
      words[w] |= tied & -tied;
}

/* ---- Writing a code ---- */

V_INLINE void topk_put(const float *x, int32_t feature, int32_t at, const int id_bytes, void *ids, float *values) {
  if (id_bytes == 1)
    ((uint8_t *)ids)[at] = (uint8_t)feature;
  else
    ((uint16_t *)ids)[at] = (uint16_t)feature;
  values[at] = x[feature];
}

/* 8 features at once, as many as a word of 64 mostly has at most: no branch to guess. Bits that are not there read as the last feature;
 * where `spill` allows it, what that writes beyond the row is for the next row to overwrite. */
V_INLINE void topk_emit(const float *x, int32_t D, const uint64_t *words, const int id_bytes, const int spill, void *ids, float *values) {
  for (int32_t u = 0; u < D; u += 64) {
    uint64_t bits = words[u / 64];
    const uint64_t last = (uint64_t)1 << (D - u >= 64 ? 63 : D - u - 1);
    const int32_t count = __builtin_popcountll(bits);
    int32_t at = 0;
    for (; spill ? at < count : at + 8 <= count; at += 8)
#pragma GCC unroll 8
      for (int32_t i = 0; i < 8; i++, bits &= bits - 1)
        topk_put(x, u + __builtin_ctzll(bits | last), at + i, id_bytes, ids, values);
    for (; at < count; at++, bits &= bits - 1)
      topk_put(x, u + __builtin_ctzll(bits), at, id_bytes, ids, values);
    ids = (char *)ids + count * id_bytes;
    values += count;
  }
}

V_INLINE void topk_rows(const int id_bytes, int64_t n_rows, const float *x, int64_t row_stride, int32_t D, int32_t K, char *ids,
                        float *values) {
  uint64_t words[TOPK_WORDS];
  for (int64_t first = 0; first < n_rows; first += V_LANES) {
    const float *rows[V_LANES];
    int64_t n = n_rows - first < V_LANES ? n_rows - first : V_LANES;
    for (int64_t i = 0; i < V_LANES; i++)
      rows[i] = x + (first + (i < n ? i : n - 1)) * row_stride;
    int32_t thresholds[V_LANES] = {0};
    if (K <= 8)
      vf_store((float *)thresholds, topk_network(rows, D, K, 8));
    else if (K <= 16)
      vf_store((float *)thresholds, topk_network(rows, D, K, 16));
    else if (K <= 32)
      vf_store((float *)thresholds, topk_network(rows, D, K, 32));
    for (int64_t i = 0; i < n; i++) {
      const int64_t at = (first + i) * K;
      if (topk_mark(rows[i], D, thresholds[i] - 1, words) != K)
        topk_bisect(rows[i], D, K, words);
      if ((n_rows - first - i - 1) * K >= 8)
        topk_emit(rows[i], D, words, id_bytes, 1, ids + at * id_bytes, values + at);
      else
        topk_emit(rows[i], D, words, id_bytes, 0, ids + at * id_bytes, values + at);
    }
  }
}

static void topk(int64_t n_rows, const float *x, int64_t row_stride, int32_t D, int32_t K, void *ids, float *values) {
  if (D <= 256)
    topk_rows(1, n_rows, x, row_stride, D, K, ids, values);
  else
    topk_rows(2, n_rows, x, row_stride, D, K, ids, values);
}
