/* topk: the K features of largest magnitude of each row, V_LANES rows at a time, in three steps.
 *
 * 1. Up to K = 32, the K-th largest magnitude of each row, the threshold, by networks of compare-exchanges (no branch, no index). A row's
 *    features stand in V_LANES columns, which are sorted. Then the columns are folded: two rows come to share a register, half of the
 *    lanes each, and two sorted columns of a row meet lane by lane and become one list; after log2(V_LANES) folds lanes are rows.
 *    Lists keep a little less than would always do (topk_threshold): it is rare that many of the K stand in one column.
 * 2. A bit for every feature whose magnitude reaches the threshold. If exactly K do, they are the answer, whatever the threshold was found
 *    by. So lists may be short, and magnitudes may be compared as floats (twice as fast as integers on AVX-512), which a NaN upsets.
 *    Where it is the K-th magnitude but more reach it, the first of those at it are taken: a tie, which is in 5 to 20 of 100 rows that
 *    were bf16. Other rows, and every K beyond the lists, get their bits by bisection.
 * 3. The numbers of the bits in rising order, lanes are rows again; and the values.
 *
 * Rows of more than 256 features take bisection, one by one. What bounds the rest, at D = 128 and K = 8 on AVX-512, in cycles a row:
 * columns and folds 75 operations on two ports; bits 16, and 8 stores; numbers 12; values 8 loads that wait for 8 others. The compiler gets
 * there only where D and K are constants, so usual ones are (a fifth faster). The next rows are asked for while these are sorted.
 */

/* ---- 1. The threshold ---- */

V_INLINE void topk_exchange(vf *x, int i, int j) {
  const vf small = vf_min(x[i], x[j]);
  x[i] = vf_max(x[i], x[j]);
  x[j] = small;
}

/* 4 or 8 vectors into falling order, lane by lane: the smallest networks known, 5 and 19 exchanges. */
V_INLINE void topk_sort(vf *x, const int n) {
  static const struct {
    uint8_t i, j;
  } pairs[24] = {{0, 1}, {2, 3}, {0, 2}, {1, 3}, {1, 2}, /* 8: */
                 {0, 2}, {1, 3}, {4, 6}, {5, 7}, {0, 4}, {1, 5}, {2, 6}, {3, 7}, {0, 1}, {2, 3},
                 {4, 5}, {6, 7}, {2, 4}, {3, 5}, {1, 4}, {3, 6}, {1, 2}, {3, 4}, {5, 6}};
  if (n == 4) {
#pragma GCC unroll 5
    for (int c = 0; c < 5; c++)
      topk_exchange(x, pairs[c].i, pairs[c].j);
  } else {
#pragma GCC unroll 19
    for (int c = 5; c < 24; c++)
      topk_exchange(x, pairs[c].i, pairs[c].j);
  }
}

/* A bitonic sequence of n into falling order. */
V_INLINE void topk_clean(vf *x, const int n) {
#pragma GCC unroll 5
  for (int step = n / 2; step > 0; step /= 2)
#pragma GCC unroll 32
    for (int i = 0; i < n; i++)
      if (!(i & step))
        topk_exchange(x, i, i + step);
}

/* out: the `kept` (n or 2 n) largest of two falling lists of n, falling. A falling list against a rising one: the larger of each pair are
 * the n largest of all, a bitonic sequence; so are the smaller ones. */
V_INLINE void topk_merge(const vf *x, const vf *y, const int n, const int kept, vf *out) {
  vf both[32];
#pragma GCC unroll 32
  for (int i = 0; i < n; i++) {
    both[i] = vf_max(x[i], y[n - 1 - i]);
    if (kept > n)
      both[n + i] = vf_min(x[i], y[n - 1 - i]);
  }
  topk_clean(both, n);
  if (kept > n)
    topk_clean(both + n, n);
#pragma GCC unroll 32
  for (int i = 0; i < kept; i++)
    out[i] = both[i];
}

/* Columns of n vectors, sorted; n_features of them are there, the others read as 0. */
V_INLINE void topk_column_block(const float *x, int32_t n_features, const int n, vf *column) {
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) {
    const int32_t left = n_features - i * V_LANES;
    column[i] = left >= V_LANES ? vf_abs(vf_load(x + i * V_LANES)) : left > 0 ? vf_abs(vf_load_half(x + i * V_LANES)) : vf_zero();
  }
  topk_sort(column, n);
}

/* The n largest of each column of a row. */
V_INLINE void topk_columns(const float *x, int32_t D, const int n, vf *out) {
  const int32_t block = n * V_LANES;
  vf list[8], next[8];
  topk_column_block(x, D, n, list);
  int32_t at = block;
  for (; at + block <= D; at += block) {
    topk_column_block(x + at, block, n, next);
    topk_merge(list, next, n, n, list);
  }
  if (at < D) {
    topk_column_block(x + at, D - at, n, next);
    topk_merge(list, next, n, n, list);
  }
#pragma GCC unroll 8
  for (int i = 0; i < n; i++)
    out[i] = list[i];
}

enum { TOPK_LIST = 32 + 1 }; /* a list of a row; one more, or those of all rows fall into the same sets of the first-level cache */

V_INLINE void topk_fold(const int step, vf (*lists)[TOPK_LIST], const int n, const int kept) {
  for (int row = 0; row < V_LANES >> (step + 1); row++) {
    vf x[32], y[32];
#pragma GCC unroll 32
    for (int i = 0; i < n; i++)
      vf_fold(step, lists[2 * row][i], lists[2 * row + 1][i], &x[i], &y[i]);
    topk_merge(x, y, n, kept, lists[row]);
  }
}

/* The last fold needs no list: the K-th of two falling lists is the least of max(x[0], y[K - 1]), max(x[1], y[K - 2]), ... */
V_INLINE vf topk_last(const int step, vf (*lists)[TOPK_LIST], int32_t K) {
  vf least = vf_set(INFINITY);
#pragma GCC unroll 16
  for (int i = 0; i < K; i++) {
    const int j = K - 1 - i;
    vf x, y, other;
    vf_fold(step, lists[0][i], lists[1][i], &x, &other);
    vf_fold(step, lists[0][j], lists[1][j], &other, &y);
    least = vf_min(least, vf_max(x, y));
  }
  return least;
}

/* The K-th of lists that begin as columns of n0 and are n1, n2, n3 long after the folds; constants where this is inlined. The rows
 * `ahead` bytes on are the next to be asked for. */
V_INLINE vf topk_network(const float *const rows[V_LANES], int64_t ahead, const int32_t D, int32_t K, const int n0, const int n1,
                         const int n2, const int n3) {
  vf lists[V_LANES][TOPK_LIST];
  for (int row = 0; row < V_LANES; row++) {
    for (int32_t u = 0; u < D; u += 16) /* whole cache lines; an address that is not there is no error */
      __builtin_prefetch((const void *)((uintptr_t)rows[row] + (uintptr_t)ahead + 4 * (uintptr_t)u));
    topk_columns(rows[row], D, n0, lists[row]);
  }
  topk_fold(0, lists, n0, n1);
  topk_fold(1, lists, n1, n2);
  if (V_LANES == 8)
    return topk_last(2, lists, K);
  topk_fold(2, lists, n2, n3);
  return topk_last(3, lists, K);
}

/* Of random rows, one in 1,500 (K = 8; AVX2, of 8 columns: 100) and one in 1,400 (K = 16) has more of the K in a list than are kept. */
V_INLINE vf topk_threshold(const float *const rows[V_LANES], int64_t ahead, const int32_t D, int32_t K) {
  if (K <= 8)
    return topk_network(rows, ahead, D, K, 4, 8, 8, 8);
  const int shallow = D <= 4 * V_LANES;
  if (K <= 16)
    return shallow ? topk_network(rows, ahead, D, K, 4, 8, 16, 16) : topk_network(rows, ahead, D, K, 8, V_LANES == 16 ? 8 : 16, 16, 16);
  return shallow ? topk_network(rows, ahead, D, K, 4, 8, 16, 32) : topk_network(rows, ahead, D, K, 8, 16, 32, 32);
}

/* ---- 2. The bits ---- */

enum { TOPK_WORDS = 65536 / 32, TOPK_NARROW_WORDS = 256 / 32 };

/* Whether there are lists for K, and K in the two of the last fold. */
V_INLINE int topk_listed(const int32_t D, const int32_t K) { return K <= 16 || (K <= 32 && D > 32); }

/* Word u / 32, bit u % 32: the magnitude of x[u] is above limit. Words are `stride` apart. */
V_INLINE void topk_mark(const float *x, int32_t D, int32_t limit, uint32_t *words, const int stride) {
  for (int32_t u = 0; u < D; u += 32, words += stride)
    if (D - u >= 32)
      v_mark32(x + u, limit, words);
    else
      *words = (uint32_t)v_above(x + u, D - u, limit);
}

V_INLINE int32_t topk_marked(int32_t D, const uint32_t *words, const int stride) {
  int32_t count = 0;
  for (int32_t u = 0; u < D; u += 32, words += stride)
    count += __builtin_popcount(*words);
  return count;
}

/* What is above `kth` and the first ones at it; 0 where these are not K: kth is not the K-th magnitude. */
static __attribute__((noinline)) int topk_settle(const float *x, int32_t D, int32_t K, int32_t kth, uint32_t *words, const int stride) {
  topk_mark(x, D, kth, words, stride);
  int32_t n_tied = K - topk_marked(D, words, stride);
  for (int32_t u = 0; u < D && n_tied > 0; u += 32, words += stride)
    for (uint32_t tied = (uint32_t)v_above(x + u, D - u < 32 ? D - u : 32, kth - 1) & ~*words; tied && n_tied > 0; tied &= tied - 1) {
      *words |= tied & -tied;
      n_tied--;
    }
  return n_tied == 0;
}

/* Right for every row: a threshold that exactly K magnitudes reach, or else the K-th magnitude. K or more magnitudes reach `low`, fewer
 * reach `high`, which comes down from the maximum in growing steps before the bisection. 16 bits of rows that were bf16 stay aside. */
static __attribute__((noinline)) void topk_bisect(const float *x, int32_t D, int32_t K, uint32_t *words, const int stride) {
  vi most = vi_set(0), bits = vi_set(0);
  for (int32_t u = 0; u < D; u += V_LANES) {
    const vi size = vf_bits(vf_abs(D - u >= V_LANES ? vf_load(x + u) : vf_load_half(x + u)));
    most = vi_max(most, size);
    bits = vi_or(bits, size);
  }
  const int64_t unit = vm_bits(vi_ne(vi_and(bits, vi_set(0xffff)), vi_set(0))) ? 1 : 0x10000;
  int64_t low = 0, high = vi_reduce_max(most) + unit;
  int32_t count = 0;
  for (int64_t step = 1 << 22; high - low > unit && count != K; step *= 2) {
    const int64_t trial = low == 0 && high > step ? high - step : (low + (high - low) / 2) & -unit;
    count = 0;
    for (int32_t u = 0; u < D; u += 64)
      count += __builtin_popcountll(v_above(x + u, D - u >= 64 ? 64 : D - u, (int32_t)(trial - 1)));
    *(count >= K ? &low : &high) = trial;
  }
  topk_settle(x, D, K, (int32_t)(count == K ? low - 1 : low), words, stride);
}

/* Bits of n rows, V_LANES of them: lanes are rows. */
V_INLINE void topk_bits(const float *const rows[V_LANES], int64_t ahead, int n, const int32_t D, const int32_t K,
                        uint32_t (*words)[V_LANES]) {
  const int listed = topk_listed(D, K);
  int32_t threshold[V_LANES];
  if (listed) {
    vi_store(threshold, vf_bits(topk_threshold(rows, ahead, D, K)));
    for (int i = 0; i < n; i++)
      topk_mark(rows[i], D, threshold[i] - 1, words[0] + i, V_LANES);
  }
  for (int i = 0; i < n; i++)
    if (!listed || (topk_marked(D, words[0] + i, V_LANES) != K && !topk_settle(rows[i], D, K, threshold[i], words[0] + i, V_LANES)))
      topk_bisect(rows[i], D, K, words[0] + i, V_LANES);
}

/* ---- 3. The features ---- */

/* ids [n_rows][K] of words [n][V_LANES], n a constant where this is inlined. A step takes the lowest bit of every row: of its first word
 * that is not 0. */
V_INLINE void topk_ids(const uint32_t *words, const int n, int32_t K, int n_rows, uint8_t *ids) {
  vi w[TOPK_NARROW_WORDS];
#pragma GCC unroll 8
  for (int i = 0; i < n; i++)
    w[i] = vi_load((const int32_t *)words + i * V_LANES);
  for (int32_t k = 0; k < K; k += 4) {
    vi packed = vi_set(0);
#pragma GCC unroll 4
    for (int s = 0; s < 4; s++) {
      vi first = w[n - 1], base = vi_set(32 * (n - 1));
#pragma GCC unroll 8
      for (int i = n - 2; i >= 0; i--) {
        const vm any = vi_ne(w[i], vi_set(0));
        first = vi_select(any, w[i], first);
        base = vi_select(any, vi_set(32 * i), base);
      }
      const vi bit = vi_and(first, vi_sub(vi_set(0), first));
#pragma GCC unroll 8
      for (int i = 0; i < n; i++)
        w[i] = vi_sub(w[i], vi_select(vi_ne(base, vi_set(32 * i)), vi_set(0), bit));
      packed = vi_or(packed, vi_shift_left(vi_or(vi_bit_number(bit), base), 8 * s));
    }
    int32_t four[V_LANES];
    vi_store(four, packed);
    for (int i = 0; i < n_rows; i++)
      if (K - k >= 4)
        memcpy(ids + (int64_t)i * K + k, &four[i], 4);
      else
        memcpy(ids + (int64_t)i * K + k, &four[i], (size_t)(K - k));
  }
}

/* D <= 256: ids of one byte. D and K are constants where this is inlined, or not. */
V_INLINE void topk_narrow(int64_t n_rows, const float *x, int64_t row_stride, const int32_t D, const int32_t K, uint8_t *ids,
                          float *values) {
  uint32_t words[TOPK_NARROW_WORDS][V_LANES] = {{0}};
  for (; n_rows > 0; n_rows -= V_LANES, x += V_LANES * row_stride) {
    const float *rows[V_LANES];
    const int n = n_rows < V_LANES ? (int)n_rows : V_LANES;
    for (int i = 0; i < V_LANES; i++) /* the lanes beyond repeat the last row */
      rows[i] = x + (i < n ? i : n - 1) * row_stride;
    topk_bits(rows, V_LANES * row_stride * (int64_t)sizeof *x, n, D, K, words);
    if (D <= 64)
      topk_ids(words[0], 2, K, n, ids);
    else if (D <= 128)
      topk_ids(words[0], 4, K, n, ids);
    else
      topk_ids(words[0], 8, K, n, ids);
    for (int i = 0; i < n; i++, ids += K, values += K)
      for (int32_t k = 0; k < K; k++)
        values[k] = rows[i][ids[k]];
  }
}

/* Ids of two bytes, bit by bit. */
static void topk_wide(int64_t n_rows, const float *x, int64_t row_stride, int32_t D, int32_t K, uint16_t *ids, float *values) {
  uint32_t words[TOPK_WORDS];
  for (; n_rows > 0; n_rows--, x += row_stride) {
    topk_bisect(x, D, K, words, 1);
    for (int32_t u = 0; u < D; u += 32)
      for (uint32_t bits = words[u / 32]; bits; bits &= bits - 1) {
        const int32_t feature = u + __builtin_ctz(bits);
        *ids++ = (uint16_t)feature;
        *values++ = x[feature];
      }
  }
}

static void topk(int64_t n_rows, const float *x, int64_t row_stride, int32_t D, int32_t K, void *ids, float *values) {
#define USUAL(d, k)                                                                                                                        \
  case (d) << 8 | (k): topk_narrow(n_rows, x, row_stride, d, k, ids, values); break
  switch (D <= 256 && K < 256 ? D << 8 | K : 0) {
    USUAL(64, 8);
    USUAL(64, 16);
    USUAL(128, 8);
    USUAL(128, 16);
    USUAL(256, 8);
    USUAL(256, 16);
  default:
    if (D <= 256)
      topk_narrow(n_rows, x, row_stride, D, K, ids, values);
    else
      topk_wide(n_rows, x, row_stride, D, K, ids, values);
  }
#undef USUAL
}

/* topk_bf16 by way of f32, some rows at a time. */
static void topk_converted(int64_t n_rows, const uint16_t *x, int64_t row_stride, int32_t D, int32_t K, uint8_t *ids, float *values) {
  float rows[V_LANES * 32 * TOPK_NARROW_WORDS];
  for (int64_t n; n_rows > 0; n_rows -= n, x += n * row_stride, ids += n * K, values += n * K) {
    n = n_rows < V_LANES ? n_rows : V_LANES;
    load_rows(n, D, SFA_BF16, x, row_stride, NULL, rows, D);
    topk(n, rows, D, D, K, ids, values);
  }
}
