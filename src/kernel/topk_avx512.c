/* topk_bf16 in AVX-512: 16 rows at a time, a feature and its number in one lane.
 *
 * A bf16 leaves half of a lane free, so that an entry holds all that is asked for, and its order as a float is that of the selection:
 *
 *     bits 30..16 |x|, 9..1 RANKS - feature (ties go to the lower one), 0 the sign
 *
 * No two entries are equal. So the columns and folds of topk_tmpl.c, with lists that lose nothing, end at the K entries themselves: no bits
 * of features to find, no values to fetch. They are sorted again by feature, and turned into rows. Of D = 128, K = 8 that takes, in
 * operations a row: entries 16, columns 38, folds 48, the rest 10.
 *
 * Entries of inf and NaN are NaNs, and those of denormal numbers do not compare where the processor counts these as 0: 16 rows with one
 * that matters take the way of other rows, and so do K above 16, but 32 of usual D. */

enum { RANKS = 257, MOST_LISTED = 32 }; /* ranks from 2 on: whatever the rest, an entry turned by 21 is no denormal number */

/* Entries of features at .. at + 16 n - 1 of a row, those that are not there smaller than all others. *most: the largest |x| so far. */
V_INLINE void bf16_entries(const uint16_t *x, int32_t at, int32_t D, const int n, vf *entries, vi *most) {
  const vi step = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12,
                                   10, 8, 6, 4, 2, 0);
#pragma GCC unroll 4
  for (int i = 0; i < n; i += 2, at += 32) {
    const __mmask32 there = D - at >= 32 ? ~(__mmask32)0 : D > at ? ((__mmask32)1 << (D - at)) - 1 : 0;
    const vi row = _mm512_maskz_loadu_epi16(there, x + at), size = _mm512_and_si512(row, _mm512_set1_epi16(0x7fff));
    const vi rank = _mm512_maskz_sub_epi16(there, _mm512_set1_epi16((int16_t)(2 * (RANKS - at))), step);
    const vi low = _mm512_or_si512(rank, _mm512_srli_epi16(row, 15));
    *most = _mm512_max_epu16(*most, size);
    entries[i] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, size));
    entries[i + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, size));
  }
}

/* The `kept` largest entries of each column of a row; columns are `deep`, twice that where D is more than fits. */
V_INLINE void bf16_columns(const uint16_t *x, const int32_t D, const int deep, const int kept, vf *out, vi *most) {
  vf next[8];
  bf16_entries(x, 0, D, deep, out, most);
  topk_sort(out, deep);
  if (D > deep * V_LANES) {
    bf16_entries(x, deep * V_LANES, D, deep, next, most);
    topk_sort(next, deep);
    topk_merge(out, next, deep, kept, out);
  } else {
#pragma GCC unroll 8
    for (int i = deep; i < kept; i++)
      out[i] = vf_zero();
  }
}

/* n entries into the order of their features: ids [n_rows][K] and values [n_rows][K]. Beyond K entries are 0. */
V_INLINE void bf16_put(const vf *entries, const int n, int32_t K, int n_rows, uint8_t *ids, float *values) {
  vi by_feature[MOST_LISTED], turned[V_LANES];
  vf w[MOST_LISTED];
#pragma GCC unroll 32
  for (int i = 0; i < n; i++)
    w[i] = _mm512_castsi512_ps(_mm512_rol_epi32(vf_bits(entries[i]), 21));
  topk_sort(w, 8);
  if (n > 8) {
    topk_sort(w + 8, 8);
    topk_merge(w, w + 8, 8, 16, w);
  }
  if (n > 16) {
    topk_sort(w + 16, 8);
    topk_sort(w + 24, 8);
    topk_merge(w + 16, w + 24, 8, 16, w + 16);
    topk_merge(w, w + 16, 16, 32, w);
  }
#pragma GCC unroll 32
  for (int i = 0; i < n; i++)
    by_feature[i] = vf_bits(w[i]);
  for (int32_t k = 0; k < K; k += 4) {
    vi packed = vi_set(0);
#pragma GCC unroll 4
    for (int s = 0; s < 4; s++)
      packed = vi_or(packed, vi_shift_left(vi_sub(vi_set(RANKS), _mm512_srli_epi32(by_feature[k + s], 22)), 8 * s));
    int32_t four[V_LANES];
    vi_store(four, packed);
    for (int i = 0; i < n_rows; i++)
      if (K - k >= 4)
        memcpy(ids + (int64_t)i * K + k, &four[i], 4);
      else
        memcpy(ids + (int64_t)i * K + k, &four[i], (size_t)(K - k));
  }
#pragma GCC unroll 2
  for (int at = 0; at < n; at += V_LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < V_LANES; i++) { /* sign: bit 21, |x|: bits 19..5 */
      const vi entry = at + i < n ? by_feature[at + i] : vi_set(0);
      turned[i] = _mm512_ternarylogic_epi32(vi_set(INT32_MIN), vi_shift_left(entry, 10), vi_shift_left(entry, 11), 0xca);
    }
    vi_turn(turned);
    const vm kept = (vm)((1u << (K - at < V_LANES ? K - at : V_LANES)) - 1);
    for (int i = 0; i < n_rows; i++)
      _mm512_mask_storeu_ps(values + (int64_t)i * K + at, kept, _mm512_castsi512_ps(turned[i]));
  }
}

/* D <= 256, K <= n: 8, 16 or 32. Columns are `deep` and keep `kept`. All are constants where this is inlined, or D and K are not. */
V_INLINE void bf16_narrow(int64_t n_rows, const uint16_t *x, int64_t row_stride, const int32_t D, const int32_t K, const int deep,
                          const int kept, const int n, uint8_t *ids, float *values) {
  const int once = 2 * kept < n ? 2 * kept : n, twice = 2 * once < n ? 2 * once : n; /* after a fold, two; after three, n */
  for (; n_rows > 0; n_rows -= V_LANES, x += V_LANES * row_stride, ids += V_LANES * K, values += V_LANES * K) {
    const int n_here = n_rows < V_LANES ? (int)n_rows : V_LANES;
    vf lists[V_LANES][TOPK_LIST], entries[MOST_LISTED], least = vf_set(INFINITY);
    vi most = vi_set(0);
    for (int i = 0; i < V_LANES; i++) { /* the lanes beyond repeat the last row */
      const uint16_t *row = x + (i < n_here ? i : n_here - 1) * row_stride;
      for (int32_t u = 0; u < D; u += 32) /* whole cache lines of the next rows; an address that is not there is no error */
        __builtin_prefetch((const void *)((uintptr_t)(row + u) + 2 * (uintptr_t)(V_LANES * row_stride)));
      bf16_columns(row, D, deep, kept, lists[i], &most);
    }
    topk_fold(0, lists, kept, once);
    topk_fold(1, lists, once, twice);
    topk_fold(2, lists, twice, n);
#pragma GCC unroll 32
    for (int i = 0; i < n; i++)
      entries[i] = vf_zero();
#pragma GCC unroll 32
    for (int i = 0; i < K; i++) { /* of two falling lists the K largest, in no order */
      vf a, b, other;
      vf_fold(3, lists[0][i], lists[1][i], &a, &other);
      vf_fold(3, lists[0][K - 1 - i], lists[1][K - 1 - i], &other, &b);
      entries[i] = vf_max(a, b);
      least = vf_min(least, entries[i]);
    }
    if (_mm512_cmpge_epu16_mask(most, _mm512_set1_epi16(0x7f80)) | vi_gt(vi_set(0x00800000), vf_bits(least)))
      topk_converted(n_here, x, row_stride, D, K, ids, values);
    else
      bf16_put(entries, n, K, n_here, ids, values);
  }
}

static void topk_bf16(int64_t n_rows, const uint16_t *x, int64_t row_stride, int32_t D, int32_t K, uint8_t *ids, float *values) {
#define USUAL(d, k, deep, kept)                                                                                                            \
  case (d) << 8 | (k): bf16_narrow(n_rows, x, row_stride, d, k, deep, kept, k, ids, values); break
  switch (K < 256 ? D << 8 | K : 0) {
    USUAL(64, 8, 4, 4);
    USUAL(64, 16, 4, 4);
    USUAL(64, 32, 4, 4);
    USUAL(128, 8, 8, 8);
    USUAL(128, 16, 8, 8);
    USUAL(128, 32, 8, 8);
    USUAL(256, 8, 8, 8);
    USUAL(256, 16, 8, 16);
    USUAL(256, 32, 8, 16);
  default:
    if (K <= 8)
      bf16_narrow(n_rows, x, row_stride, D, K, 8, 8, 8, ids, values);
    else if (K <= 16)
      bf16_narrow(n_rows, x, row_stride, D, K, 8, 16, 16, ids, values);
    else
      topk_converted(n_rows, x, row_stride, D, K, ids, values);
  }
#undef USUAL
}
