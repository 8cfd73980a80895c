/* query_table, score_keys, adjust_keys, softmax_keys, value_keys in plain C: lanes are keys, a row of queries at a time.
 *
 * A row's table: its step (0 where the keys are not int8), then at byte 64 its D values, as f32 or as whole multiples of the step. */

static void query_table(int32_t n_rows, int32_t D, const float *q, int64_t row_stride, const float *step, void *table) {
  for (int32_t i = 0; i < n_rows; i++, q += row_stride) {
    float *head = (float *)((char *)table + (size_t)i * sfa_query_table_bytes(D)), *values = head + 16;
    head[0] = step ? step[i] : 0.0f;
    if (!step)
      memcpy(values, q, (size_t)D * sizeof *q);
    else
      for (int32_t u = 0; u < D; u++) /* a NaN step: any whole numbers will do */
        ((int32_t *)values)[u] = step[i] == step[i] ? (int32_t)(q[u] / step[i]) : 0;
  }
}

static void score_keys(const sfa_stored_rows *keys, int32_t n_rows, int32_t D, const void *table, float query_scale, float *S) {
  for (int32_t i = 0; i < n_rows; i++, S += SFA_KEY_TILE) {
    const float *head = (const float *)((const char *)table + (size_t)i * sfa_query_table_bytes(D)), *q = head + 16;
    const int32_t *whole = (const int32_t *)q;
    for (int32_t j = 0; j < keys->n; j++) {
      float sum = 0.0f;
      int32_t exact = 0;
      for (int32_t u = 0; u < keys->width; u++) {
        int64_t id_at = j * keys->ids_stride + u, at = j * keys->values_stride + u;
        int32_t feature = !keys->ids ? u : D <= 256 ? ((const uint8_t *)keys->ids)[id_at] : ((const uint16_t *)keys->ids)[id_at];
        feature = feature < D ? feature : D - 1;
        if (keys->dtype != SFA_I8) {
          sum = fmaf(sfa_stored_value(keys->dtype, keys->values, at), q[feature], sum);
          continue;
        }
        exact += ((const int8_t *)keys->values)[at] * whole[feature];
        if ((u + 1) % SFA_EXACT_TERMS == 0 || u + 1 == keys->width) {
          sum += (float)exact;
          exact = 0;
        }
      }
      S[j] = keys->dtype == SFA_I8 ? sum * head[0] * (sfa_f32_from_f16(keys->scales[j * keys->scales_stride]) * query_scale) : sum;
    }
  }
}

static void adjust_keys(int32_t n_rows, int32_t n_keys, float softcap, const float *slope, const int32_t *pos, float *S) {
  for (int32_t i = 0; i < n_rows; i++, S += SFA_KEY_TILE)
    for (int32_t j = 0; j < n_keys; j++) {
      if (softcap > 0)
        S[j] = (softcap * SFA_LOG2E) * sfa_tanh(S[j]);
      if (slope)
        S[j] = fmaf(slope[i], (float)(j - pos[i]), S[j]);
    }
}

static int softmax_keys(int32_t n_rows, int32_t n_keys, float *S, float *m, float *l, float *alpha) {
  int changed = 0;
  for (int32_t i = 0; i < n_rows; i++, S += SFA_KEY_TILE) {
    float largest = m[i];
    for (int32_t j = 0; j < n_keys; j++)
      largest = S[j] > largest ? S[j] : largest;
    largest += 0.0f;
    int empty = largest == -INFINITY;
    float base = empty ? 0.0f : largest;
    alpha[i] = empty ? 1.0f : sfa_exp2(m[i] - base);
    changed |= alpha[i] != 1.0f;
    float sums[4] = {0};
    for (int32_t j = 0; j < n_keys; j++) {
      S[j] = sfa_exp2(S[j] - base);
      sums[j % 4] += S[j];
    }
    m[i] = largest;
    l[i] = l[i] * alpha[i] + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return changed;
}

static void value_keys(const sfa_stored_rows *values, int32_t n_rows, const float *P, int32_t E, float *O) {
  const int scaled = sfa_has_scales(values->dtype);
  for (int32_t i = 0; i < n_rows; i++, P += SFA_KEY_TILE, O += E)
    for (int32_t j = 0; j < values->n; j++) {
      if (P[j] == 0.0f)
        continue;
      float weight = scaled ? P[j] * sfa_f32_from_f16(values->scales[j * values->scales_stride]) : P[j];
      if (weight == 0.0f && values->dtype == SFA_E4M3) /* nothing of a row whose scale is 0, not even NaN */
        continue;
      for (int32_t e = 0; e < E; e++)
        O[e] = fmaf(weight, sfa_stored_value(values->dtype, values->values, j * values->values_stride + e), O[e]);
    }
}
