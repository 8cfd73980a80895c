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

enum { GRAD_SLOTS = 8 }; /* of a key together; each has a sum in 16 lanes */

V_INLINE void key_codes_slots(const int n, const int id_bytes, const void *ids, int64_t at, const float *dS, const float *Qt, int64_t W,
                              float *dK) {
  enum { parts = 16 / V_LANES };
  vf sum[GRAD_SLOTS][parts];
  const float *q[GRAD_SLOTS];
#pragma GCC unroll 8
  for (int u = 0; u < n; u++) {
    q[u] = Qt + code_row(id_bytes, ids, at + u) * W;
    for (int c = 0; c < parts; c++)
      sum[u][c] = vf_zero();
  }
  for (int64_t i = 0; i < W; i += 16)
#pragma GCC unroll 2
    for (int c = 0; c < parts; c++) {
      const vf d = vf_load(dS + i + c * V_LANES);
#pragma GCC unroll 8
      for (int u = 0; u < n; u++)
        sum[u][c] = vf_fma(d, vf_load(q[u] + i + c * V_LANES), sum[u][c]);
    }
#pragma GCC unroll 8
  for (int u = 0; u < n; u++) {
    float lanes[16];
    for (int c = 0; c < parts; c++)
      vf_store(lanes + c * V_LANES, sum[u][c]);
    for (int half = 8; half; half /= 2)
      for (int l = 0; l < half; l++)
        lanes[l] += lanes[l + half];
    dK[at + u] += lanes[0];
  }
}

V_INLINE void key_codes_all(const int id_bytes, int32_t n_keys, int32_t K, const void *ids, const float *dS, const float *Qt, int64_t W,
                            float *dK) {
  for (int64_t j = 0; j < n_keys; j++, dS += W) {
    int32_t u = 0;
    for (; K - u >= GRAD_SLOTS; u += GRAD_SLOTS)
      key_codes_slots(GRAD_SLOTS, id_bytes, ids, j * K + u, dS, Qt, W, dK);
    for (; u < K; u++)
      key_codes_slots(1, id_bytes, ids, j * K + u, dS, Qt, W, dK);
  }
}

static void key_codes_backward(int32_t n_keys, int32_t K, const void *ids, int32_t id_bytes, const float *dS, const float *Qt, int32_t W,
                               float *dK) {
  if (id_bytes == 1)
    key_codes_all(1, n_keys, K, ids, dS, Qt, W, dK);
  else
    key_codes_all(2, n_keys, K, ids, dS, Qt, W, dK);
}
