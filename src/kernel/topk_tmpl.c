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

static int32_t topk_count(const float *x, int32_t D, int32_t limit) {
  int32_t count = 0;
  for (int32_t u = 0; u < D; u += 64)
    count += __builtin_popcountll(v_above(x + u, D - u < 64 ? D - u : 64, limit));
  return count;
}

static int32_t topk_bisect(const float *x, int32_t D, int32_t K) {
  int32_t threshold = 0;
  for (int bit = 30; bit >= 0; bit--)
    if (topk_count(x, D, (threshold | 1 << bit) - 1) >= K)
      threshold |= 1 << bit;
  return threshold;
}

/* Writes the features above the threshold and the first ones at it. */
V_INLINE void topk_write(const float *x, int32_t D, int32_t ties, int32_t threshold, const int id_bytes, void *ids, float *values) {
  for (int32_t u = 0; u < D; u += 64) {
    int32_t n = D - u < 64 ? D - u : 64;
    uint64_t keep = v_above(x + u, n, threshold - 1);
    if (ties >= 0) {
      uint64_t above = v_above(x + u, n, threshold), tied = keep & ~above;
      for (keep = above; tied && ties > 0; ties--, tied &= tied - 1)
        keep |= tied & -tied;
    }
    for (; keep; keep &= keep - 1) {
      int32_t feature = u + __builtin_ctzll(keep);
      if (id_bytes == 1) {
        *(uint8_t *)ids = (uint8_t)feature;
        ids = (uint8_t *)ids + 1;
      } else {
        *(uint16_t *)ids = (uint16_t)feature;
        ids = (uint16_t *)ids + 1;
      }
      *values++ = x[feature];
    }
  }
}

static void topk_row(const float *x, int32_t D, int32_t K, int32_t threshold, void *ids, float *values) {
  int32_t ties = -1; /* none to count */
  if (topk_count(x, D, threshold - 1) != K) {
    threshold = topk_bisect(x, D, K);
    ties = K - topk_count(x, D, threshold);
  }
  if (D <= 256)
    topk_write(x, D, ties, threshold, 1, ids, values);
  else
    topk_write(x, D, ties, threshold, 2, ids, values);
}

static void topk(int64_t n_rows, const float *x, int64_t row_stride, int32_t D, int32_t K, void *ids, float *values) {
  const int64_t id_bytes = D <= 256 ? 1 : 2;
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
    for (int64_t i = 0; i < n; i++)
      topk_row(rows[i], D, K, thresholds[i], (char *)ids + (first + i) * K * id_bytes, values + (first + i) * K);
  }
}
