/* Whole attention of one head, composed of the slots as kernel.h lists them: against the oracle, and needle sweeps. */
#include "check_forward.h"
#include "oracle.h"
#include <math.h>
#include <string.h>

void check_attend(check *c, const sfa_kernels *kernels, const oracle_problem *p, int W, float *out, float *lse) {
  const int T = p->n_queries, S = p->n_keys, D = p->head_dim, E = p->head_dim_v, id_bytes = D <= 256 ? 1 : 2;
  const int k_q = p->k_q ? p->k_q : D, k_k = p->k_k ? p->k_k : D;
  const float scale = (float)(1.4426950408889634074 / sqrt(D));
  char *q_ids = check_memory(c, (size_t)(T * k_q * id_bytes)), *k_ids = check_memory(c, (size_t)(S * k_k * id_bytes));
  float *q_values = check_floats(c, (int64_t)T * k_q), *k_values = check_floats(c, (int64_t)S * k_k);
  float *Qt = check_floats(c, (int64_t)D * W), *scores = check_floats(c, (int64_t)SFA_KEY_TILE * W);
  float *m = check_floats(c, W), *l = check_floats(c, W), *alpha = check_floats(c, W);
  int32_t *lo = check_memory(c, (size_t)W * 4), *hi = check_memory(c, (size_t)W * 4);
  kernels->topk(T, p->q, D, D, k_q, q_ids, q_values);
  kernels->topk(S, p->k, D, D, k_k, k_ids, k_values);
  for (int first = 0; first < T; first += W) {
    const int n_rows = T - first < W ? T - first : W;
    const void *id_rows[SFA_MAX_WIDTH];
    const float *value_rows[SFA_MAX_WIDTH];
    float *O = out + (int64_t)first * E;
    for (int i = 0; i < n_rows; i++) {
      id_rows[i] = q_ids + (int64_t)(first + i) * k_q * id_bytes;
      value_rows[i] = q_values + (int64_t)(first + i) * k_q;
    }
    kernels->query_tile_codes(n_rows, id_rows, id_bytes, value_rows, k_q, D, W, scale, Qt);
    memset(O, 0, (size_t)n_rows * (size_t)E * sizeof *O);
    for (int i = 0; i < W; i++) {
      m[i] = -INFINITY;
      l[i] = 0.0f;
    }
    for (int key = 0; key < S; key += SFA_KEY_TILE) {
      const int n_keys = S - key < SFA_KEY_TILE ? S - key : SFA_KEY_TILE;
      for (int i = 0; i < W; i++) {
        const int position = first + (i < n_rows ? i : n_rows - 1) + S - T - key;
        lo[i] = p->has_window && p->window_left >= 0 ? position - (int)p->window_left : INT32_MIN;
        hi[i] = p->causal ? position : p->has_window && p->window_right >= 0 ? position + (int)p->window_right : INT32_MAX;
      }
      if (p->k_k)
        kernels->score_codes(n_keys, k_k, k_ids + (int64_t)key * k_k * id_bytes, id_bytes, k_values + (int64_t)key * k_k, NULL, Qt, W,
                             scores);
      else
        kernels->score_dense(n_keys, D, p->k + (int64_t)key * D, D, NULL, Qt, W, scores);
      kernels->score_mask(n_keys, W, lo, hi, (int)p->n_sink_tokens - key, scores);
      if (kernels->softmax_tile(n_keys, W, scores, m, l, alpha))
        kernels->rescale(n_rows, E, alpha, O);
      kernels->value_product(n_rows, n_keys, W, scores, E, p->v + (int64_t)key * E, E, O);
    }
    for (int i = 0; i < n_rows; i++) {
      for (int e = 0; e < E; e++)
        O[(int64_t)i * E + e] = l[i] > 0 ? O[(int64_t)i * E + e] / l[i] : 0.0f;
      lse[first + i] = l[i] > 0 ? m[i] * 0x1.62e43p-1f + logf(l[i]) : -INFINITY;
    }
  }
}

static void keep_further(float *kept, const float *other, const double *truth, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if (fabs(other[i] - truth[i]) > fabs(kept[i] - truth[i]))
      kept[i] = other[i];
}

void check_attention_judge(check *c, const oracle_problem *p, const float *out, const float *lse) {
  const int64_t rows = (int64_t)p->n_queries * p->n_heads, n = rows * p->head_dim_v;
  double *truth = check_memory(c, (size_t)n * sizeof *truth), *truth_lse = check_memory(c, (size_t)rows * sizeof *truth_lse);
  float *naive = check_floats(c, n), *naive_lse = check_floats(c, rows), *other = check_floats(c, n), *other_lse = check_floats(c, rows);
  oracle_attention_f64(p, truth, truth_lse);
  oracle_attention_f32(p, naive, naive_lse);
  for (int order = 1; order < 4; order++) { /* of the natural orders of naive code, the one that fares worst */
    oracle_problem ordered = *p;
    ordered.scale_first = order & 1;
    ordered.features_backwards = order >> 1;
    oracle_attention_f32(&ordered, other, other_lse);
    keep_further(naive, other, truth, n);
    keep_further(naive_lse, other_lse, truth_lse, rows);
  }
  check_errors errors = {0}, lse_errors = {0};
  for (int64_t at = 0; at < n; at++)
    check_errors_add(&errors, out[at], naive[at], truth[at]);
  for (int64_t row = 0; row < rows; row++)
    if (truth_lse[row] == -INFINITY || lse[row] == -INFINITY) {
      if ((double)lse[row] != truth_lse[row])
        check_fail(c, "row %lld: lse %g, oracle %g", (long long)row, (double)lse[row], truth_lse[row]);
    } else {
      check_errors_add(&lse_errors, lse[row], naive_lse[row], truth_lse[row]);
    }
  const double slack = rows < 64 ? 8 : 2; /* the outputs of a row share its scores: rows count, not elements */
  check_errors_judge(c, "out", &errors, slack);
  check_errors_judge(c, "lse", &lse_errors, slack);
}

static void forward_case(check *c, int D, int k_q, int k_k, int causal, int window) {
  const int T = check_range(c, 1, 140), S = T + check_pick(c, 2) * check_range(c, 1, 100), E = 8 * check_range(c, 1, 17);
  const int W = 16 * check_range(c, 1, 8);
  check_begin(c, "forward", "D %d k_q %d k_k %d T %d S %d E %d W %d causal %d window %d", D, k_q, k_k, T, S, E, W, causal, window);
  oracle_problem p = {.n_queries = T, .n_keys = S, .n_heads = 1, .n_kv_heads = 1, .head_dim = D, .head_dim_v = E};
  p.k_q = k_q;
  p.k_k = k_k;
  p.k_storage = p.v_storage = ORACLE_F32;
  p.causal = causal;
  p.has_window = window;
  p.window_left = window ? check_range(c, 0, 80) : -1;
  p.window_right = window ? check_range(c, 0, 20) : -1;
  p.n_sink_tokens = window ? check_pick(c, 5) : 0;
  p.q = check_rows(c, CHECK_NORMAL, (int64_t)T * D);
  p.k = check_rows(c, CHECK_NORMAL, (int64_t)S * D);
  p.v = check_rows(c, CHECK_NORMAL, (int64_t)S * E);
  float *out = check_floats(c, (int64_t)T * E), *lse = check_floats(c, T), *again = check_floats(c, (int64_t)T * E);
  check_attend(c, c->kernels, &p, W, out, lse);
  check_attention_judge(c, &p, out, lse);
  check_attend(c, c->kernels, &p, W == 16 ? 64 : 16, again, lse); /* the width of a tile does not show */
  check_bits(c, "another width", again, out, (int64_t)T * E);
  if (!k_k) {
    p.k_k = D;
    check_attend(c, c->kernels, &p, W, again, lse);
    check_bits(c, "K = D", again, out, (int64_t)T * E);
  }
  check_end(c);
}

static void check_forwards(check *c) {
  static const int head_dims[] = {8, 24, 64, 72, 128, 256, 264};
  for (int round = 0; round < (c->quick ? 2 : 10); round++)
    for (int d = 0; d < 7; d++)
      for (int mode = 0; mode < 6; mode++) {
        const int D = head_dims[d], kept = check_range(c, 1, D);
        forward_case(c, D, mode % 3 == 2 ? 0 : kept, mode % 3 == 0 ? 0 : check_range(c, 1, D), mode & 1, mode > 3);
      }
}

/* One key alone shares a feature with the query, by far: its V row must come out bit for bit. At the first position that causal
 * forbids, it must not. */
static void needle_case(check *c, int D, int K, int S, int needle) {
  const int T = 17, E = 72, W = 16 * check_range(c, 1, 4), query = check_pick(c, T);
  const int position = query + S - T;
  check_begin(c, "needle", "D %d K %d S %d needle %d query at %d W %d", D, K, S, needle, position, W);
  float *q = check_rows(c, CHECK_NORMAL, (int64_t)T * D), *k = check_floats(c, (int64_t)S * D);
  float *out = check_floats(c, (int64_t)T * E), *lse = check_floats(c, T);
  const float *v = check_rows(c, CHECK_NORMAL, (int64_t)S * E);
  const int feature = check_pick(c, D), other = (feature + 1 + check_pick(c, D - 1)) % D;
  memset(q + (int64_t)query * D, 0, (size_t)D * sizeof *q);
  memset(k, 0, (size_t)S * (size_t)D * sizeof *k);
  q[query * D + feature] = 64.0f;
  for (int j = 0; j < S; j++)
    k[j * D + (j == needle ? feature : other)] = 64.0f;
  oracle_problem p = {.n_queries = T, .n_keys = S, .n_heads = 1, .n_kv_heads = 1, .head_dim = D, .head_dim_v = E, .k_q = K, .k_k = K};
  p.k_storage = p.v_storage = ORACLE_F32;
  p.causal = 1;
  p.q = q;
  p.k = k;
  p.v = v;
  check_attend(c, c->kernels, &p, W, out, lse);
  if (needle <= position)
    check_bits(c, "needle's values", out + query * E, v + needle * E, E);
  else if (!memcmp(out + query * E, v + needle * E, (size_t)E * sizeof *v))
    check_fail(c, "the query sees a key that it must not see");
  check_end(c);
}

static void check_needle(check *c) {
  static const int shapes[][2] = {{64, 8}, {128, 16}, {24, 1}, {264, 264}};
  for (int s = 0; s < 4; s++)
    for (int S = 17; S <= 150; S += c->quick ? 133 : 19)
      for (int needle = 0; needle < S; needle++)
        needle_case(c, shapes[s][0], shapes[s][1], S, needle);
}

const check_entry check_forward_entries[] = {{"forward", check_forwards}, {"needle", check_needle}, {NULL, NULL}};
