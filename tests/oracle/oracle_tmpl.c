/* Attention in arithmetic of type REAL: one query after the other, all scores first, then their softmax, then the sum over values. */

static void NAME(oracle_head)(const oracle_problem *problem, const float *q, const float *k, const float *v, long t, int head, REAL *score,
                              REAL *out, REAL *lse) {
  const int d = problem->head_dim, e_dim = problem->head_dim_v, group = problem->n_heads / problem->n_kv_heads;
  const long n = problem->n_keys, i = oracle_position(problem, t);
  const int g = head / group;
  REAL scale = problem->softmax_scale != 0 ? (REAL)problem->softmax_scale : 1 / SQRT((REAL)d);
  const REAL scale_first = problem->scale_first ? scale : 1, scale_last = problem->scale_first ? 1 : scale;
  const int backwards = problem->features_backwards;
  const float *q_row = q + (t * problem->n_heads + head) * d;
  REAL most = -(REAL)INFINITY, sum = 0;
  for (long j = 0; j < n; j++) {
    if (!oracle_sees(problem, t, j))
      continue;
    const float *k_row = k + (j * problem->n_kv_heads + g) * d;
    REAL dot = 0;
    for (int n_done = 0; n_done < d; n_done++) {
      const int u = backwards ? d - 1 - n_done : n_done;
      if (k_row[u] != 0 && q_row[u] != 0) /* a feature that is in one code only has no product, whatever the other side holds */
        dot += (REAL)q_row[u] * scale_first * (REAL)k_row[u];
    }
    score[j] = dot * scale_last;
    if (problem->softcap != 0)
      score[j] = (REAL)problem->softcap * TANH(score[j] / (REAL)problem->softcap);
    if (problem->alibi_slopes)
      score[j] += (REAL)problem->alibi_slopes[head] * (REAL)(j - i);
    if (!(score[j] <= most))
      most = score[j];
  }
  if (problem->sink_logit && problem->sink_logit[head] > most)
    most = problem->sink_logit[head];
  for (int e = 0; e < e_dim; e++)
    out[e] = 0;
  if (most == -(REAL)INFINITY) {
    *lse = most;
    return;
  }
  if (problem->sink_logit)
    sum += EXP((REAL)problem->sink_logit[head] - most);
  for (long j = 0; j < n; j++) {
    if (!oracle_sees(problem, t, j))
      continue;
    const float *v_row = v + (j * problem->n_kv_heads + g) * e_dim;
    REAL p = EXP(score[j] - most);
    sum += p;
    for (int e = 0; e < e_dim; e++)
      out[e] += p * (REAL)v_row[e];
  }
  for (int e = 0; e < e_dim; e++)
    out[e] /= sum;
  *lse = most + LOG(sum);
}

void NAME(oracle_attention)(const oracle_problem *problem, REAL *out, REAL *lse) {
  const long rows_q = (long)problem->n_queries * problem->n_heads, rows_k = (long)problem->n_keys * problem->n_kv_heads;
  float *q = oracle_stored(problem->q, rows_q, problem->head_dim, problem->k_q, ORACLE_F32);
  for (long row = 0; row < rows_q && problem->k_storage == ORACLE_I8; row++)
    oracle_round_query(q + row * problem->head_dim, problem->head_dim, problem->k_k ? problem->k_k : problem->head_dim);
  float *k = oracle_stored(problem->k, rows_k, problem->head_dim, problem->k_k, problem->k_storage);
  float *v = oracle_stored(problem->v, rows_k, problem->head_dim_v, 0, problem->v_storage);
  REAL *score = malloc(((size_t)problem->n_keys + 1) * sizeof *score);
  for (long t = 0; t < problem->n_queries; t++)
    for (int head = 0; head < problem->n_heads; head++) {
      long row = t * problem->n_heads + head;
      NAME(oracle_head)(problem, q, k, v, t, head, score, out + row * problem->head_dim_v, lse + row);
    }
  free(q);
  free(k);
  free(v);
  free(score);
}
