/* norm_rows: RMS norm of rows, in the order of device/rows_tmpl.c: squares in 16 chains, feature u in chain u mod 16, joined as a tree. */

static void norm_rows(int64_t n_rows, int32_t D, const float *x, int64_t x_stride, const float *weight, float eps, float *out,
                      int64_t out_stride) {
  enum { CHAINS = 16 };
  for (int64_t row = 0; row < n_rows; row++, x += x_stride, out += out_stride) {
    float squares[CHAINS] = {0};
    int32_t u = 0;
    for (; u + CHAINS <= D; u += CHAINS)
      for (int32_t c = 0; c < CHAINS; c++)
        squares[c] = fmaf(x[u + c], x[u + c], squares[c]);
    for (int32_t c = 0; u + c < D; c++)
      squares[c] = fmaf(x[u + c], x[u + c], squares[c]);
    for (int32_t apart = CHAINS / 2; apart > 0; apart /= 2)
      for (int32_t c = 0; c < apart; c++)
        squares[c] += squares[c + apart];
    const float factor = 1.0f / sqrtf(squares[0] / (float)D + eps);
    for (u = 0; u < D; u++)
      out[u] = x[u] * factor * weight[u];
  }
}
