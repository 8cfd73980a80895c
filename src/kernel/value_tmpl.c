/* rescale, scale_weights, value_product, value_product_masked, merge: weights times values.
 *
 * O += P^T V as an outer product: a block of rows times a block of value vectors stays in registers over all keys of the tile; each key
 * costs one load a value vector and one broadcast a row. The blocks of rows run inside: a band of V is read from memory once.
 */

static void rescale(int32_t n_rows, int32_t E, const float *alpha, float *O) {
  for (int32_t i = 0; i < n_rows; i++, O += E) {
    const vf factor = vf_set(alpha[i]);
    int32_t e = 0;
    for (; e + V_LANES <= E; e += V_LANES)
      vf_store(O + e, vf_mul(vf_load(O + e), factor));
    if (e < E)
      vf_store_half(O + e, vf_mul(vf_load_half(O + e), factor));
  }
}

static void scale_weights(int32_t n_keys, int32_t W, const float *scale, float *P) {
  for (int32_t j = 0; j < n_keys; j++, P += W)
    for (int32_t i = 0; i < W; i += V_LANES) {
      const vf p = vf_load(P + i);
      vf_store(P + i, vf_select(vf_eq(p, vf_zero()), vf_zero(), vf_mul(p, vf_set(scale[j]))));
    }
}

/* `rows` rows and `columns` vectors (constants where this is inlined); half: the vector is the last 8 elements of a row. With `masked`,
 * where P is 0 an inf or NaN of V reads as 0. */
V_INLINE void value_block(const int rows, const int columns, const int half, const int masked, int32_t n_keys, int64_t row_step,
                          int64_t key_step, const float *P, int64_t E, const float *V, int64_t v_stride, float *O) {
  vf sum[24];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
    for (int c = 0; c < columns; c++)
      sum[i * columns + c] = half ? vf_load_half(O + i * E) : vf_load(O + i * E + c * V_LANES);
  for (int32_t j = 0; j < n_keys; j++, P += key_step, V += v_stride) {
    vf v[8], clean[8];
#pragma GCC unroll 8
    for (int c = 0; c < columns; c++) {
      v[c] = half ? vf_load_half(V) : vf_load(V + c * V_LANES);
      if (masked)
        clean[c] = vf_select(vf_eq(vf_mul(v[c], vf_zero()), vf_zero()), v[c], vf_zero());
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      const vf p = vf_set(P[i * row_step]);
#pragma GCC unroll 8
      for (int c = 0; c < columns; c++)
        sum[i * columns + c] = vf_fma(p, masked && P[i * row_step] == 0.0f ? clean[c] : v[c], sum[i * columns + c]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
    for (int c = 0; c < columns; c++) {
      if (half)
        vf_store_half(O + i * E, sum[i * columns + c]);
      else
        vf_store(O + i * E + c * V_LANES, sum[i * columns + c]);
    }
}

/* All rows of a band of `columns` vectors. */
V_INLINE void value_band(const int columns, const int half, int32_t n_rows, int32_t n_keys, int64_t row_step, int64_t key_step,
                         const float *P, int64_t E, const float *V, int64_t v_stride, float *O) {
  for (; n_rows >= V_VALUE_ROWS; n_rows -= V_VALUE_ROWS, P += V_VALUE_ROWS * row_step, O += V_VALUE_ROWS * E)
    value_block(V_VALUE_ROWS, columns, half, 0, n_keys, row_step, key_step, P, E, V, v_stride, O);
  switch (n_rows) {
  case 5: value_block(5, columns, half, 0, n_keys, row_step, key_step, P, E, V, v_stride, O); break;
  case 4: value_block(4, columns, half, 0, n_keys, row_step, key_step, P, E, V, v_stride, O); break;
  case 3: value_block(3, columns, half, 0, n_keys, row_step, key_step, P, E, V, v_stride, O); break;
  case 2: value_block(2, columns, half, 0, n_keys, row_step, key_step, P, E, V, v_stride, O); break;
  case 1: value_block(1, columns, half, 0, n_keys, row_step, key_step, P, E, V, v_stride, O); break;
  default: break;
  }
}

/* row_step or key_step is 1, a constant where this is inlined. */
V_INLINE void product(int32_t n_rows, int32_t n_keys, const int64_t row_step, const int64_t key_step, const float *P, int32_t E,
                      const float *V, int64_t v_stride, float *O) {
  int32_t e = 0;
  for (; n_rows == 1 && E - e >= 8 * V_LANES; e += 8 * V_LANES) /* one row alone: more chains hide the latency */
    value_block(1, 8, 0, 0, n_keys, row_step, key_step, P, E, V + e, v_stride, O + e);
  for (; E - e >= V_VALUE_COLUMNS * V_LANES; e += V_VALUE_COLUMNS * V_LANES)
    value_band(V_VALUE_COLUMNS, 0, n_rows, n_keys, row_step, key_step, P, E, V + e, v_stride, O + e);
  for (; E - e >= V_LANES; e += V_LANES)
    value_band(1, 0, n_rows, n_keys, row_step, key_step, P, E, V + e, v_stride, O + e);
  if (e < E)
    value_band(1, 1, n_rows, n_keys, row_step, key_step, P, E, V + e, v_stride, O + e);
}

static void value_product(int32_t n_rows, int32_t n_keys, int32_t W, const float *P, int32_t E, const float *V, int64_t v_stride,
                          float *O) {
  product(n_rows, n_keys, 1, W, P, E, V, v_stride, O);
}

static void value_product_masked(int32_t n_rows, int32_t n_keys, int32_t W, const float *P, int32_t E, const float *V, int64_t v_stride,
                                 float *O) {
  for (int32_t i = 0; i < n_rows; i++, P++, O += E) {
    int32_t e = 0;
    for (; E - e >= V_LANES; e += V_LANES)
      value_block(1, 1, 0, 1, n_keys, 1, W, P, E, V + e, v_stride, O + e);
    if (e < E)
      value_block(1, 1, 1, 1, n_keys, 1, W, P, E, V + e, v_stride, O + e);
  }
}

static void merge(int32_t n_rows, int32_t E, float *m, float *l, float *O, const float *m2, const float *l2, const float *O2) {
  for (int32_t i = 0; i < n_rows; i++, O += E, O2 += E) {
    if (m2[i] == -INFINITY && l2[i] == 0.0f)
      continue;
    if (m[i] == -INFINITY && l[i] == 0.0f) {
      m[i] = m2[i];
      l[i] = l2[i];
      memcpy(O, O2, (size_t)E * sizeof *O);
      continue;
    }
    float largest = m2[i] > m[i] ? m2[i] : m[i];
    float base = largest == -INFINITY ? 0.0f : largest;
    float a = sfa_exp2(m[i] - base), b = sfa_exp2(m2[i] - base);
    m[i] = largest;
    l[i] = fmaf(l2[i], b, l[i] * a);
    int32_t e = 0;
    for (; e + V_LANES <= E; e += V_LANES)
      vf_store(O + e, vf_fma(vf_load(O2 + e), vf_set(b), vf_mul(vf_load(O + e), vf_set(a))));
    if (e < E)
      vf_store_half(O + e, vf_fma(vf_load_half(O2 + e), vf_set(b), vf_mul(vf_load_half(O + e), vf_set(a))));
  }
}
