/* Gradients of attention in arithmetic of type REAL, one pair after the other, by the formulas of docs/MATH.md 4. */

/* Scores of query t before and after the softcap, and whether the query sees them; returns their lse. */
static REAL NAME(oracle_scores)(const oracle_problem *problem, const float *q, const float *k, long t, int head, REAL *score, REAL *slope) {
  const int d = problem->head_dim, g = head / (problem->n_heads / problem->n_kv_heads);
  const long n = problem->n_keys, i = oracle_position(problem, t);
  const REAL scale = problem->softmax_scale != 0 ? (REAL)problem->softmax_scale : 1 / SQRT((REAL)d), cap = (REAL)problem->softcap;
  REAL most = problem->sink_logit ? (REAL)problem->sink_logit[head] : -(REAL)INFINITY, sum = 0;
  const float *q_row = q + (t * problem->n_heads + head) * d;
  const int backwards = problem->features_backwards;
  for (long j = 0; j < n; j++) {
    score[j] = -(REAL)INFINITY;
    slope[j] = 1;
    if (!oracle_sees(problem, t, j))
      continue;
    const float *k_row = k + (j * problem->n_kv_heads + g) * d;
    REAL dot = 0;
    for (int n_done = 0; n_done < d; n_done++) {
      const int u = backwards ? d - 1 - n_done : n_done;
      dot += (REAL)q_row[u] * (REAL)k_row[u];
    }
    score[j] = dot * scale;
    if (problem->softcap != 0) {
      const REAL h = TANH(score[j] / cap);
      score[j] = cap * h;
      slope[j] = 1 - h * h;
    }
    if (problem->alibi_slopes)
      score[j] += (REAL)problem->alibi_slopes[head] * (REAL)(j - i);
    most = score[j] > most ? score[j] : most;
  }
  if (most == -(REAL)INFINITY)
    return most;
  if (problem->sink_logit)
    sum += EXP((REAL)problem->sink_logit[head] - most);
  for (long j = 0; j < n; j++)
    sum += EXP(score[j] - most);
  return most + LOG(sum);
}

/* short_d_out: d_out as products take it. */
static void NAME(oracle_backward_row)(const oracle_problem *problem, const float *q, const float *k, const float *v, const float *d_out,
                                      const float *short_d_out, const float *d_lse, long t, int head, REAL *score, REAL *slope,
                                      NAME(oracle_grad) * grad) {
  const int d = problem->head_dim, e_dim = problem->head_dim_v, g = head / (problem->n_heads / problem->n_kv_heads);
  const long row = t * problem->n_heads + head;
  const REAL scale = problem->softmax_scale != 0 ? (REAL)problem->softmax_scale : 1 / SQRT((REAL)d);
  const REAL lse = NAME(oracle_scores)(problem, q, k, t, head, score, slope);
  REAL delta = d_lse ? -(REAL)d_lse[row] : 0;
  if (lse == -(REAL)INFINITY)
    return;
  for (long j = 0; j < problem->n_keys; j++)
    score[j] = EXP(score[j] - lse); /* p from here on */
  const long n = problem->n_keys, n_kv_heads = problem->n_kv_heads;
  const float *q_row = q + row * d, *short_row = short_d_out + row * e_dim;
  REAL *d_q = grad->q + row * d;
  for (int e = 0; e < e_dim; e++) {
    REAL out = 0;
    for (long j = 0; j < n; j++)
      out += score[j] * (REAL)v[(j * n_kv_heads + g) * e_dim + e];
    delta += (REAL)d_out[row * e_dim + e] * out;
  }
  for (long j = 0; j < n; j++) {
    const long key = j * n_kv_heads + g;
    const float *k_row = k + key * d, *v_row = v + key * e_dim;
    REAL *d_k = grad->k + key * d, *d_v = grad->v + key * e_dim, dp = 0;
    if (score[j] == 0)
      continue;
    for (int e = 0; e < e_dim; e++)
      dp += (REAL)short_row[e] * (REAL)v_row[e];
    const REAL exact_ds = score[j] * (dp - delta) * slope[j];
    const REAL p = (REAL)oracle_operand(problem, (double)score[j]), ds = (REAL)oracle_operand(problem, (double)exact_ds) * scale;
    for (int e = 0; e < e_dim; e++)
      d_v[e] += p * (REAL)short_row[e];
    for (int u = 0; u < d; u++) {
      d_q[u] += ds * (REAL)k_row[u];
      d_k[u] += ds * (REAL)q_row[u];
    }
  }
  if (problem->sink_logit)
    grad->sink_logit[head] -= EXP((REAL)problem->sink_logit[head] - lse) * delta;
}

/* 0 outside of the supports of rows [n][d]. */
static void NAME(oracle_support)(const float *rows, long n, int d, int k, REAL *grad) {
  int *ids = malloc((size_t)d * sizeof *ids);
  for (long row = 0; row < n && k > 0 && k < d; row++) {
    oracle_topk(rows + row * d, d, k, ids);
    for (int u = 0, at = 0; u < d; u++) {
      if (at < k && ids[at] == u)
        at++;
      else
        grad[row * d + u] = 0;
    }
  }
  free(ids);
}

void NAME(oracle_backward)(const oracle_problem *problem, const float *d_out, const float *d_lse, NAME(oracle_grad) * grad) {
  const long rows_q = (long)problem->n_queries * problem->n_heads, rows_k = (long)problem->n_keys * problem->n_kv_heads;
  const int d = problem->head_dim;
  float *q = oracle_stored(problem->q, rows_q, d, problem->k_q, ORACLE_F32);
  for (long row = 0; row < rows_q && problem->k_storage == ORACLE_I8; row++)
    oracle_round_query(q + row * d, d, problem->k_k ? problem->k_k : d);
  float *k = oracle_stored(problem->k, rows_k, d, problem->k_k, problem->k_storage);
  float *v = oracle_stored(problem->v, rows_k, problem->head_dim_v, 0, problem->v_storage);
  float *short_d_out = malloc((size_t)(rows_q * problem->head_dim_v + 1) * sizeof *short_d_out);
  memcpy(short_d_out, d_out, (size_t)(rows_q * problem->head_dim_v) * sizeof *short_d_out);
  oracle_operands(problem, q, rows_q * d);
  oracle_operands(problem, k, rows_k * d);
  oracle_operands(problem, v, rows_k * problem->head_dim_v);
  oracle_operands(problem, short_d_out, rows_q * problem->head_dim_v);
  const size_t n = (size_t)problem->n_keys + 1;
  REAL *score = malloc(2 * n * sizeof *score);
  memset(grad->q, 0, (size_t)rows_q * (size_t)d * sizeof *grad->q);
  memset(grad->k, 0, (size_t)rows_k * (size_t)d * sizeof *grad->k);
  memset(grad->v, 0, (size_t)rows_k * (size_t)problem->head_dim_v * sizeof *grad->v);
  memset(grad->sink_logit, 0, (size_t)problem->n_heads * sizeof *grad->sink_logit);
  for (long t = 0; t < problem->n_queries; t++)
    for (int head = 0; head < problem->n_heads; head++)
      NAME(oracle_backward_row)(problem, q, k, v, d_out, short_d_out, d_lse, t, head, score, score + n, grad);
  NAME(oracle_support)(problem->q, rows_q, d, problem->k_q, grad->q);
  NAME(oracle_support)(problem->k, rows_k, d, problem->k_k, grad->k);
  free(q);
  free(k);
  free(v);
  free(short_d_out);
  free(score);
}
