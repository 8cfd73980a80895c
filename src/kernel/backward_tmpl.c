/* softmax_backward, key_product, query_codes_backward, key_codes_backward: the gradients of a tile.
 *
 * Lanes are queries, as in the forward. A key's slot is one step over the query vectors: of its feature's row of dQt, which it adds to, and
 * of its feature's row of Qt, from which the slot's own gradient comes as a sum over lanes. Those of 16 slots are added up together, in a
 * tree that halves the registers at each level. */

static void softmax_backward(int32_t n_keys, int32_t W, const float *lse, const float *delta, const float *capped, float cap, float *S,
                             float *dP) {
  const vf one = vf_set(1.0f), shrink = vf_set(capped ? 1.0f / (cap * SFA_LOG2E) : 0.0f);
  for (int32_t i = 0; i < W; i += V_LANES) {
    const vf shift = vf_load(lse + i), mean = vf_load(delta + i);
    for (int64_t j = 0, at = i; j < n_keys; j++, at += W) {
      const vf p = vf_exp2(vf_sub(vf_load(S + at), shift));
      vf d = vf_mul(p, vf_sub(vf_load(dP + at), mean));
      if (capped) {
        const vf t = vf_mul(vf_load(capped + at), shrink);
        d = vf_mul(d, vf_fma(vf_sub(vf_zero(), t), t, one));
      }
      vf_store(S + at, p);
      vf_store(dP + at, vf_select(vf_eq(p, vf_zero()), vf_zero(), d));
    }
  }
}

static void key_product(int32_t n_keys, int32_t n_rows, int32_t W, const float *P, int32_t E, const float *X, int64_t x_stride, float *O) {
  product(n_keys, n_rows, W, 1, P, E, X, x_stride, O);
}

/* ---- codes ---- */

V_INLINE int64_t code_row(const int id_bytes, const void *ids, int64_t at) {
  return id_bytes == 1 ? ((const uint8_t *)ids)[at] : ((const uint16_t *)ids)[at];
}

/* `columns` query vectors, a constant where this is inlined. */
V_INLINE void query_codes_band(const int columns, const int id_bytes, int32_t n_keys, int32_t K, const void *ids, const float *values,
                               const float *dS, int64_t W, float *dQt) {
  for (int64_t j = 0, at = 0; j < n_keys; j++, dS += W) {
    vf d[4];
#pragma GCC unroll 4
    for (int c = 0; c < columns; c++)
      d[c] = vf_load(dS + c * V_LANES);
    for (const int64_t end = at + K; at < end; at++) {
      float *out = dQt + code_row(id_bytes, ids, at) * W;
      const vf value = vf_set(values[at]);
#pragma GCC unroll 4
      for (int c = 0; c < columns; c++)
        vf_store(out + c * V_LANES, vf_fma(value, d[c], vf_load(out + c * V_LANES)));
    }
  }
}

V_INLINE void query_codes_all(const int id_bytes, int32_t n_keys, int32_t K, const void *ids, const float *values, const float *dS,
                              int64_t W, float *dQt) {
  int64_t i = 0;
  for (; W - i >= 4 * V_LANES; i += 4 * V_LANES)
    query_codes_band(4, id_bytes, n_keys, K, ids, values, dS + i, W, dQt + i);
  for (; W - i >= V_LANES; i += V_LANES)
    query_codes_band(1, id_bytes, n_keys, K, ids, values, dS + i, W, dQt + i);
}

static void query_codes_backward(int32_t n_keys, int32_t K, const void *ids, int32_t id_bytes, const float *values, const float *dS,
                                 int32_t W, float *dQt) {
  if (id_bytes == 1)
    query_codes_all(1, n_keys, K, ids, values, dS, W, dQt);
  else
    query_codes_all(2, n_keys, K, ids, values, dS, W, dQt);
}

/* The sums over i of V_LANES slots in a row, each in chains over i modulo 16 of which, with vectors of 8, the second half is added to the
 * first. The first slot is number `slot` of the key with row dS; one_key: so are all the others. */
V_INLINE void key_codes_slots(const int one_key, const int id_bytes, int32_t K, int32_t slot, const void *ids, int64_t at, const float *dS,
                              const float *Qt, int64_t W, vf sum[V_LANES]) {
  enum { parts = 16 / V_LANES, together = 16 / (parts * parts) }; /* chains in registers: 16, or 8 */
#pragma GCC unroll 4
  for (int first = 0; first < V_LANES; first += together) {
    const float *q[together], *d[together];
    vf chains[together][parts];
#pragma GCC unroll 16
    for (int u = 0; u < together; u++) {
      q[u] = Qt + code_row(id_bytes, ids, at + first + u) * W;
      d[u] = dS;
      if (!one_key && ++slot == K) {
        slot = 0;
        dS += W;
      }
#pragma GCC unroll 2
      for (int c = 0; c < parts; c++)
        chains[u][c] = vf_zero();
    }
    for (int64_t i = 0; i < W; i += 16)
#pragma GCC unroll 2
      for (int c = 0; c < parts; c++) {
        const vf shared = vf_load(d[0] + i + c * V_LANES);
#pragma GCC unroll 16
        for (int u = 0; u < together; u++)
          chains[u][c] = vf_fma(one_key ? shared : vf_load(d[u] + i + c * V_LANES), vf_load(q[u] + i + c * V_LANES), chains[u][c]);
      }
#pragma GCC unroll 16
    for (int u = 0; u < together; u++)
      sum[first + u] = parts == 1 ? chains[u][0] : vf_add(chains[u][0], chains[u][parts - 1]);
  }
}

/* Lane u: sum[u]'s lanes, the second half added to the first until one is left. */
V_INLINE vf v_fold_lanes(const vf sum[V_LANES]) {
  vf x, y, blocks[4];
#pragma GCC unroll 4
  for (int b = 0; b < 4; b++) { /* slots b, b + 4, .. end in lane b of a block of 4 lanes each */
    vf_fold(2, sum[b], sum[b + 4], &x, &y);
    blocks[b] = vf_add(x, y);
    if (V_LANES == 16) {
      vf_fold(2, sum[b + V_LANES / 2], sum[b + V_LANES - 4], &x, &y);
      vf_fold(3, blocks[b], vf_add(x, y), &x, &y);
      blocks[b] = vf_add(x, y);
    }
  }
#pragma GCC unroll 2
  for (int b = 0; b < 4; b += 2) {
    vf_fold(0, blocks[b], blocks[b + 1], &x, &y);
    blocks[b] = vf_add(x, y);
  }
  vf_fold(1, blocks[0], blocks[2], &x, &y);
  return vf_add(x, y);
}

V_INLINE void key_codes_all(const int one_key, const int id_bytes, int32_t n_keys, int32_t K, const void *ids, const float *dS,
                            const float *Qt, int64_t W, float *dK) {
  const int64_t n = (int64_t)n_keys * K;
  int64_t at = 0;
  int32_t slot = 0;
  for (; n - at >= V_LANES; at += V_LANES) {
    vf sum[V_LANES];
    key_codes_slots(one_key, id_bytes, K, slot, ids, at, dS, Qt, W, sum);
    vf_store(dK + at, vf_add(vf_load(dK + at), v_fold_lanes(sum)));
    for (slot += V_LANES; slot >= K; slot -= K)
      dS += W;
  }
  for (; at < n; at++) { /* fewer than a vector of them */
    const float *q = Qt + code_row(id_bytes, ids, at) * W;
    float chains[16] = {0};
    for (int64_t i = 0; i < W; i += V_LANES)
      vf_store(chains + i % 16, vf_fma(vf_load(dS + i), vf_load(q + i), vf_load(chains + i % 16)));
    for (int half = 8; half; half /= 2)
      for (int l = 0; l < half; l++)
        chains[l] += chains[l + half];
    dK[at] += chains[0];
    if (++slot == K) {
      slot = 0;
      dS += W;
    }
  }
}

static void key_codes_backward(int32_t n_keys, int32_t K, const void *ids, int32_t id_bytes, const float *dS, const float *Qt, int32_t W,
                               float *dK) {
  if (id_bytes == 1 && K % V_LANES == 0)
    key_codes_all(1, 1, n_keys, K, ids, dS, Qt, W, dK);
  else if (id_bytes == 1)
    key_codes_all(0, 1, n_keys, K, ids, dS, Qt, W, dK);
  else
    key_codes_all(0, 2, n_keys, K, ids, dS, Qt, W, dK);
}
