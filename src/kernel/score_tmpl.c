/* query_tile, score_codes, score_dense, score_adjust, score_mask: from query rows to the scores of a tile of keys.
 *
 * Both products are the outer-product form of a matrix product: a block of keys times a block of query vectors stays in registers as
 * accumulators; each step loads the query vectors of a feature once and multiplies them by one broadcast value a key. With codes every
 * key has features of its own, so the query vectors are loaded a key; with dense rows they serve the whole block.
 */

/* ---- queries ---- */

static void query_tile(int32_t n_rows, const float *const *rows, int32_t D, int32_t W, float scale, float *Qt) {
  for (int32_t first = 0; first < W; first += V_LANES) {
    const int32_t n = n_rows - first;
    if (n <= 0) {
      for (int32_t u = 0; u < D; u++)
        vf_store(Qt + (int64_t)u * W + first, vf_zero());
      continue;
    }
    const float *lanes[V_LANES];
    int32_t numbers[V_LANES];
    for (int32_t i = 0; i < V_LANES; i++) {
      lanes[i] = rows[first + (i < n ? i : n - 1)];
      numbers[i] = i;
    }
    const vm real = vi_gt(vi_set(n), vi_load(numbers)); /* the other lanes repeat a row */
    const vf factor = vf_set(scale);
    for (int32_t u = 0; u < D; u += 8) {
      vf x[8];
      vf_turn(lanes, u, x);
      for (int i = 0; i < 8; i++)
        vf_store(Qt + (int64_t)(u + i) * W + first, vf_select(real, vf_mul(x[i], factor), vf_zero()));
    }
  }
}

static void query_tile_codes(int32_t n_rows, const void *const *ids_rows, int32_t id_bytes, const float *const *value_rows, int32_t K,
                             int32_t D, int32_t W, float scale, float *Qt) {
  memset(Qt, 0, (size_t)D * (size_t)W * sizeof *Qt);
  for (int32_t i = 0; i < n_rows; i++)
    for (int32_t u = 0; u < K; u++) {
      int32_t feature = id_bytes == 1 ? ((const uint8_t *)ids_rows[i])[u] : ((const uint16_t *)ids_rows[i])[u];
      Qt[(int64_t)feature * W + i] = scale * value_rows[i][u];
    }
}

/* ---- codes ---- */

/* Where a block's sums end: in S. `first`: sums of earlier slots are there already; key_scale, not NULL after the last slots alone, is the
 * last factor. */
V_INLINE void score_block_store(const int keys, const int columns, const vf *sum, int first, const float *key_scale, int64_t W, float *S) {
#pragma GCC unroll 16
  for (int j = 0; j < keys; j++)
#pragma GCC unroll 8
    for (int c = 0; c < columns; c++) {
      float *s = S + j * W + c * V_LANES;
      vf total = sum[j * columns + c];
      if (!first)
        total = vf_add(vf_load(s), total);
      vf_store(s, key_scale ? vf_mul(total, vf_set(key_scale[j])) : total);
    }
}

/* `keys` keys from key j on, `columns` query vectors from lane i on; both, and id_bytes, are constants where this is inlined. */
V_INLINE void score_codes_block(const int keys, const int columns, const int id_bytes, int32_t K, const void *ids, const float *values,
                                const float *key_scale, const float *Qt, int64_t W, float *S) {
  const int32_t terms = key_scale ? SFA_EXACT_TERMS : K;
  for (int32_t u = 0, end; u < K; u = end) {
    const int first = u == 0;
    end = K - u < terms ? K : u + terms;
    vf sum[16];
#pragma GCC unroll 16
    for (int a = 0; a < keys * columns; a++)
      sum[a] = vf_zero();
    for (; u < end; u++) {
#pragma GCC unroll 8
      for (int j = 0; j < keys; j++) {
        const int64_t at = (int64_t)j * K + u;
        const int64_t feature = id_bytes == 1 ? ((const uint8_t *)ids)[at] : ((const uint16_t *)ids)[at];
        const float *q = Qt + feature * W;
        if (V_LANES == 8)
          __asm__("" : "+r"(q)); /* an address in one register: with two, an AVX2 multiply-add takes two issue slots (28 % of the time) */
        const vf value = vf_set(values[at]);
#pragma GCC unroll 8
        for (int c = 0; c < columns; c++)
          sum[j * columns + c] = vf_fma(value, vf_load(q + c * V_LANES), sum[j * columns + c]);
      }
    }
    score_block_store(keys, columns, sum, first, end == K ? key_scale : NULL, W, S);
  }
}

/* All keys of a band of `columns` vectors: blocks of `keys`, then single keys. */
V_INLINE void score_codes_band(const int keys, const int columns, const int id_bytes, int32_t n_keys, int32_t K, const void *ids,
                               const float *values, const float *key_scale, const float *Qt, int64_t W, float *S) {
  for (int32_t j = 0, n; j < n_keys; j += n) {
    const void *block_ids = (const char *)ids + (int64_t)j * K * id_bytes;
    const float *block_values = values + (int64_t)j * K, *block_scale = key_scale ? key_scale + j : NULL;
    n = keys > 1 && n_keys - j < keys ? 1 : keys;
    if (n == keys)
      score_codes_block(keys, columns, id_bytes, K, block_ids, block_values, block_scale, Qt, W, S + j * W);
    else
      score_codes_block(1, columns, id_bytes, K, block_ids, block_values, block_scale, Qt, W, S + j * W);
  }
}

/* keys * columns is about 8: two multiply-adds a cycle, each four cycles deep. */
V_INLINE void score_codes_all(const int id_bytes, int32_t n_keys, int32_t K, const void *ids, const float *values, const float *key_scale,
                              const float *Qt, const int64_t W, float *S) {
  int64_t i = 0;
  for (; W - i >= 8 * V_LANES; i += 8 * V_LANES)
    score_codes_band(1, 8, id_bytes, n_keys, K, ids, values, key_scale, Qt + i, W, S + i);
  for (; W - i >= 4 * V_LANES; i += 4 * V_LANES)
    score_codes_band(2, 4, id_bytes, n_keys, K, ids, values, key_scale, Qt + i, W, S + i);
  if (W - i >= 3 * V_LANES) {
    score_codes_band(2, 3, id_bytes, n_keys, K, ids, values, key_scale, Qt + i, W, S + i);
    i += 3 * V_LANES;
  }
  if (W - i >= 2 * V_LANES) {
    score_codes_band(4, 2, id_bytes, n_keys, K, ids, values, key_scale, Qt + i, W, S + i);
    i += 2 * V_LANES;
  }
  if (W - i >= V_LANES)
    score_codes_band(8, 1, id_bytes, n_keys, K, ids, values, key_scale, Qt + i, W, S + i);
}

static void score_codes(int32_t n_keys, int32_t K, const void *ids, int32_t id_bytes, const float *values, const float *key_scale,
                        const float *Qt, int32_t W, float *S) {
  if (id_bytes == 1)
    score_codes_all(1, n_keys, K, ids, values, key_scale, Qt, W, S);
  else
    score_codes_all(2, n_keys, K, ids, values, key_scale, Qt, W, S);
}

/* ---- dense rows ---- */

V_INLINE void score_dense_block(const int keys, const int columns, int32_t D, const float *k, int64_t key_stride, const float *key_scale,
                                const float *Qt, int64_t W, float *S) {
  const int32_t terms = key_scale ? SFA_EXACT_TERMS : D;
  for (int32_t u = 0, end; u < D; u = end) {
    const int first = u == 0;
    end = D - u < terms ? D : u + terms;
    vf sum[24];
#pragma GCC unroll 24
    for (int a = 0; a < keys * columns; a++)
      sum[a] = vf_zero();
    for (; u < end; u++, Qt += W) {
      vf q[4];
#pragma GCC unroll 4
      for (int c = 0; c < columns; c++)
        q[c] = vf_load(Qt + c * V_LANES);
#pragma GCC unroll 16
      for (int j = 0; j < keys; j++) {
        const vf value = vf_set(k[j * key_stride + u]);
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++)
          sum[j * columns + c] = vf_fma(value, q[c], sum[j * columns + c]);
      }
    }
    score_block_store(keys, columns, sum, first, end == D ? key_scale : NULL, W, S);
  }
}

V_INLINE void score_dense_band(const int keys, const int columns, int32_t n_keys, int32_t D, const float *k, int64_t key_stride,
                               const float *key_scale, const float *Qt, int64_t W, float *S) {
  for (int32_t j = 0, n; j < n_keys; j += n) {
    const float *block_scale = key_scale ? key_scale + j : NULL;
    n = n_keys - j >= keys ? keys : n_keys - j >= 4 ? 4 : 1;
    if (n == keys)
      score_dense_block(keys, columns, D, k + j * key_stride, key_stride, block_scale, Qt, W, S + j * W);
    else if (n == 4)
      score_dense_block(4, columns, D, k + j * key_stride, key_stride, block_scale, Qt, W, S + j * W);
    else
      score_dense_block(1, columns, D, k + j * key_stride, key_stride, block_scale, Qt, W, S + j * W);
  }
}

static void score_dense(int32_t n_keys, int32_t D, const float *keys, int64_t key_stride, const float *key_scale, const float *Qt,
                        int32_t W, float *S) {
  int32_t i = 0;
#if V_SCORE_COLUMNS == 4
  for (; W - i >= 4 * V_LANES; i += 4 * V_LANES)
    score_dense_band(V_SCORE_KEYS(4), 4, n_keys, D, keys, key_stride, key_scale, Qt + i, W, S + i);
#endif
  for (; W - i >= 3 * V_LANES; i += 3 * V_LANES)
    score_dense_band(V_SCORE_KEYS(3), 3, n_keys, D, keys, key_stride, key_scale, Qt + i, W, S + i);
  for (; W - i >= 2 * V_LANES; i += 2 * V_LANES)
    score_dense_band(V_SCORE_KEYS(2), 2, n_keys, D, keys, key_stride, key_scale, Qt + i, W, S + i);
  for (; W - i >= V_LANES; i += V_LANES)
    score_dense_band(V_SCORE_KEYS(1), 1, n_keys, D, keys, key_stride, key_scale, Qt + i, W, S + i);
}

/* ---- what follows the product ---- */

V_INLINE vf vf_tanh(vf x) {
  vf z = vf_mul(x, x), a = vf_abs(x);
  vf q = vf_fma(vf_set(SFA_TANH_4), z, vf_set(SFA_TANH_3));
  q = vf_fma(q, z, vf_set(SFA_TANH_2));
  q = vf_fma(q, z, vf_set(SFA_TANH_1));
  q = vf_fma(q, z, vf_set(SFA_TANH_0));
  vf near = vf_fma(vf_mul(x, z), q, x);
  vf e = vf_exp2(vf_min(vf_set(SFA_TANH_LIMIT), vf_mul(a, vf_set(2.0f * SFA_LOG2E))));
  vf far = vf_copysign(vf_sub(vf_set(1.0f), vf_div(vf_set(2.0f), vf_add(e, vf_set(1.0f)))), x);
  return vf_select(vf_lt(a, vf_set(SFA_TANH_SPLIT)), near, far);
}

static void score_adjust(int32_t n_keys, int32_t W, float softcap, const float *slope, const int32_t *pos, float *S) {
  const vf cap = vf_set(softcap * SFA_LOG2E);
  for (int32_t j = 0; j < n_keys; j++, S += W)
    for (int32_t i = 0; i < W; i += V_LANES) {
      vf s = vf_load(S + i);
      if (softcap > 0)
        s = vf_mul(cap, vf_tanh(s));
      if (slope)
        s = vf_fma(vf_load(slope + i), vi_to_float(vi_sub(vi_set(j), vi_load(pos + i))), s);
      vf_store(S + i, s);
    }
}

static void score_mask(int32_t n_keys, int32_t W, const int32_t *lo, const int32_t *hi, int32_t n_always, float *S) {
  const vf masked = vf_set(-INFINITY);
  for (int32_t i = 0; i < W; i += V_LANES) {
    const vi first = vi_load(lo + i), last = vi_load(hi + i);
    for (int32_t j = 0; j < n_keys; j++) {
      vm out = vi_gt(vi_set(j), last);
      if (j >= n_always)
        out = vm_or(out, vi_gt(first, vi_set(j)));
      float *s = S + (int64_t)j * W + i;
      vf_store(s, vf_select(out, masked, vf_load(s)));
    }
  }
}
