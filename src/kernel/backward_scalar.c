/* The gradients of a tile in plain C, as kernel.h words them. Part of kernel_scalar.c. */

static void softmax_backward(int32_t n_keys, int32_t W, const float *lse, const float *delta, const float *capped, float cap, float *S,
                             float *dP) {
  const float shrink = capped ? 1.0f / (cap * SFA_LOG2E) : 0.0f;
  for (int64_t j = 0; j < n_keys; j++)
    for (int64_t at = j * W, i = 0; i < W; i++, at++) {
      float p = sfa_exp2(S[at] - lse[i]), slope = 1.0f;
      if (capped) {
        float t = capped[at] * shrink;
        slope = fmaf(-t, t, 1.0f);
      }
      S[at] = p;
      dP[at] = p == 0.0f ? 0.0f : p * (dP[at] - delta[i]) * slope;
    }
}

static void key_product(int32_t n_keys, int32_t n_rows, int32_t W, const float *P, int32_t E, const float *X, int64_t x_stride, float *O) {
  for (int32_t j = 0; j < n_keys; j++, P += W, O += E)
    for (int32_t i = 0; i < n_rows; i++)
      for (int32_t e = 0; e < E; e++)
        O[e] = fmaf(P[i], X[i * x_stride + e], O[e]);
}

static void query_codes_backward(int32_t n_keys, int32_t K, const void *ids, int32_t id_bytes, const float *values, const float *dS,
                                 int32_t W, float *dQt) {
  for (int32_t j = 0; j < n_keys; j++, dS += W)
    for (int64_t at = (int64_t)j * K; at < (int64_t)(j + 1) * K; at++) {
      float *out = dQt + (int64_t)feature_at(ids, id_bytes, at) * W;
      for (int32_t i = 0; i < W; i++)
        out[i] = fmaf(values[at], dS[i], out[i]);
    }
}

static void key_codes_backward(int32_t n_keys, int32_t K, const void *ids, int32_t id_bytes, const float *dS, const float *Qt, int32_t W,
                               float *dK) {
  for (int32_t j = 0; j < n_keys; j++, dS += W)
    for (int64_t at = (int64_t)j * K; at < (int64_t)(j + 1) * K; at++) {
      const float *q = Qt + (int64_t)feature_at(ids, id_bytes, at) * W;
      float sum[16] = {0};
      for (int32_t i = 0; i < W; i++)
        sum[i % 16] = fmaf(dS[i], q[i], sum[i % 16]);
      for (int32_t n = 8; n; n /= 2)
        for (int32_t l = 0; l < n; l++)
          sum[l] += sum[l + n];
      dK[at] += sum[0];
    }
}
