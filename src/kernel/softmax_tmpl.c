/* softmax_tile: scores to weights, lanes are queries, so that max and sum never cross lanes. */

/* `columns` query vectors at once, a constant where this is inlined. The running maximum has several accumulators, as its order does not
 * show (kernel.h: only its zero has one sign); the sum of a tile has four, one for each key modulo 4. */
V_INLINE int softmax_band(const int columns, int32_t n_keys, int64_t W, float *S, float *m, float *l, float *alpha) {
  enum { ways = 4 };
  vf largest[4][ways], part[4][ways], base[4], sum[4];
  int changed = 0;
#pragma GCC unroll 4
  for (int c = 0; c < columns; c++)
#pragma GCC unroll 4
    for (int w = 0; w < ways; w++) {
      largest[c][w] = vf_load(m + c * V_LANES);
      part[c][w] = vf_zero();
    }
  int32_t j = 0;
  for (; j + ways <= n_keys; j += ways)
#pragma GCC unroll 4
    for (int w = 0; w < ways; w++)
#pragma GCC unroll 4
      for (int c = 0; c < columns; c++)
        largest[c][w] = vf_max(vf_load(S + (j + w) * W + c * V_LANES), largest[c][w]);
  for (; j < n_keys; j++)
#pragma GCC unroll 4
    for (int c = 0; c < columns; c++)
      largest[c][0] = vf_max(vf_load(S + j * W + c * V_LANES), largest[c][0]);
#pragma GCC unroll 4
  for (int c = 0; c < columns; c++) {
    vf most = vf_max(vf_max(largest[c][0], largest[c][1]), vf_max(largest[c][2], largest[c][3]));
    most = vf_add(most, vf_zero());
    vm empty = vf_eq(most, vf_set(-INFINITY));
    base[c] = vf_select(empty, vf_zero(), most);
    vf factor = vf_select(empty, vf_set(1.0f), vf_exp2(vf_sub(vf_load(m + c * V_LANES), base[c])));
    changed |= vm_bits(vf_ne(factor, vf_set(1.0f))) != 0;
    sum[c] = vf_mul(vf_load(l + c * V_LANES), factor);
    vf_store(alpha + c * V_LANES, factor);
    vf_store(m + c * V_LANES, most);
  }
  for (j = 0; j < n_keys; j += ways) {
    const int32_t n = n_keys - j < ways ? n_keys - j : ways;
#pragma GCC unroll 4
    for (int w = 0; w < ways; w++)
#pragma GCC unroll 4
      for (int c = 0; c < columns && w < n; c++) {
        float *s = S + (j + w) * W + c * V_LANES;
        const vf p = vf_exp2(vf_sub(vf_load(s), base[c]));
        part[c][w] = vf_add(part[c][w], p);
        vf_store(s, p);
      }
  }
#pragma GCC unroll 4
  for (int c = 0; c < columns; c++)
    vf_store(l + c * V_LANES, vf_add(sum[c], vf_add(vf_add(part[c][0], part[c][1]), vf_add(part[c][2], part[c][3]))));
  return changed;
}

static int softmax_tile(int32_t n_keys, int32_t W, float *S, float *m, float *l, float *alpha) {
  int changed = 0;
  int32_t i = 0;
  for (; W - i >= 2 * V_LANES; i += 2 * V_LANES)
    changed |= softmax_band(2, n_keys, W, S + i, m + i, l + i, alpha + i);
  for (; W - i >= V_LANES; i += V_LANES)
    changed |= softmax_band(1, n_keys, W, S + i, m + i, l + i, alpha + i);
  return changed;
}
