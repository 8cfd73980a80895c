/* Checks of softmax_backward, key_product, query_codes_backward and key_codes_backward, and of whole gradients. */
#include "attn/attn_plan.h"
#include "check.h"
#include "oracle.h"
#include <math.h>
#include <sfa/backward.h>
#include <string.h>

static const int widths[] = {16, 32, 48, 64, 80, 128};
static const int key_counts[] = {1, 2, 5, 63, SFA_KEY_TILE};
enum { N_WIDTHS = 6, N_KEY_COUNTS = 5 };

/* ---- Slots ----------------------------------------------------------------------------------------------------------------- */

static void softmax_case(check *c, check_kind kind, int W, int n_keys, bool with_cap) {
  check_begin(c, "softmax_backward", "%s W %d n_keys %d softcap %d", check_kind_name(kind), W, n_keys, with_cap);
  const int64_t n = (int64_t)n_keys * W;
  const float cap = 1.0f + (float)check_pick(c, 30);
  float *s = check_rows(c, CHECK_NORMAL, n), *dp = check_rows(c, kind, n), *capped = check_rows(c, CHECK_NORMAL, n);
  float *lse = check_rows(c, CHECK_NORMAL, W), *delta = check_rows(c, CHECK_NORMAL, W);
  for (int64_t at = 0; at < n; at += 1 + check_pick(c, 5))
    s[at] = -INFINITY; /* masked: whatever dP holds */
  lse[check_pick(c, W)] = INFINITY;
  float *P = check_floats(c, n), *dS = check_floats(c, n), *plain_P = check_floats(c, n), *plain_dS = check_floats(c, n);
  memcpy(P, s, (size_t)n * sizeof *s);
  memcpy(plain_P, s, (size_t)n * sizeof *s);
  memcpy(dS, dp, (size_t)n * sizeof *dp);
  memcpy(plain_dS, dp, (size_t)n * sizeof *dp);
  c->kernels->softmax_backward(n_keys, W, lse, delta, with_cap ? capped : NULL, cap, P, dS);
  c->plain->softmax_backward(n_keys, W, lse, delta, with_cap ? capped : NULL, cap, plain_P, plain_dS);
  check_bits(c, "P", P, plain_P, n);
  check_bits(c, "dS", dS, plain_dS, n);
  check_errors errors = {0};
  for (int64_t at = 0; at < n; at++) {
    const double p = exp2((double)s[at] - (double)lse[at % W]), t = (double)capped[at] / (double)cap / 1.4426950408889634074;
    const double truth = p * ((double)dp[at] - (double)delta[at % W]) * (with_cap ? 1 - t * t : 1);
    const float naive = exp2f(s[at] - lse[at % W]) * (dp[at] - delta[at % W]) * (with_cap ? 1 - (float)t * (float)t : 1);
    if (p == 0 && dS[at] != 0)
      check_fail(c, "dS[%lld] is %g where the weight is 0", (long long)at, (double)dS[at]);
    if (p != 0 && kind == CHECK_NORMAL)
      check_errors_add(&errors, dS[at], naive, truth);
  }
  if (errors.n)
    check_errors_judge(c, "dS", &errors, 8);
  check_end(c);
}

static void check_softmax_backward(check *c) {
  for (int w = 0; w < N_WIDTHS; w++)
    for (int k = 0; k < N_KEY_COUNTS; k++)
      for (int cap = 0; cap < 2; cap++) {
        softmax_case(c, CHECK_NORMAL, widths[w], key_counts[k], cap);
        softmax_case(c, (check_kind)check_pick(c, CHECK_KINDS), widths[w], key_counts[k], cap);
      }
}

static void key_product_case(check *c, check_kind kind, int E, int W, int n_keys, int n_rows) {
  check_begin(c, "key_product", "%s E %d W %d n_keys %d n_rows %d", check_kind_name(kind), E, W, n_keys, n_rows);
  const int64_t n = (int64_t)n_keys * E, stride = E + 3 * check_pick(c, 2);
  const float *P = check_rows(c, CHECK_NORMAL, (int64_t)n_keys * W), *x = check_rows(c, kind, (n_rows - 1) * stride + E);
  const float *before = check_rows(c, CHECK_NORMAL, n);
  float *out = check_floats(c, n), *plain = check_floats(c, n);
  memcpy(out, before, (size_t)n * sizeof *out);
  memcpy(plain, before, (size_t)n * sizeof *out);
  c->kernels->key_product(n_keys, n_rows, W, P, E, x, stride, out);
  c->plain->key_product(n_keys, n_rows, W, P, E, x, stride, plain);
  check_bits(c, "out", out, plain, n);
  check_errors errors = {0};
  for (int64_t at = 0; at < n && kind == CHECK_NORMAL; at++) {
    double truth = before[at];
    float naive = before[at];
    for (int i = 0; i < n_rows; i++) {
      truth += (double)P[at / E * W + i] * (double)x[i * stride + at % E];
      naive += P[at / E * W + i] * x[i * stride + at % E];
    }
    check_errors_add(&errors, out[at], naive, truth);
  }
  if (errors.n)
    check_errors_judge(c, "out", &errors, 2);
  check_end(c);
}

static void check_key_product(check *c) {
  static const int dims[] = {8, 24, 64, 72, 128, 136};
  for (int d = 0; d < 6; d++)
    for (int w = 0; w < N_WIDTHS; w++)
      for (int k = 0; k < N_KEY_COUNTS; k++) {
        key_product_case(c, CHECK_NORMAL, dims[d], widths[w], key_counts[k], check_range(c, 1, widths[w]));
        key_product_case(c, (check_kind)check_pick(c, CHECK_KINDS), dims[d], widths[w], check_range(c, 1, SFA_KEY_TILE), widths[w]);
      }
}

/* Both slots of codes. */
static void codes_case(check *c, check_kind kind, int D, int K, int W, int n_keys) {
  check_begin(c, "codes_backward", "%s D %d K %d W %d n_keys %d", check_kind_name(kind), D, K, W, n_keys);
  const int id_bytes = D <= 256 ? 1 : 2;
  const int64_t n_q = (int64_t)D * W, n_k = (int64_t)n_keys * K;
  const float *x = check_rows(c, CHECK_NORMAL, (int64_t)n_keys * D), *ds = check_rows(c, kind, (int64_t)n_keys * W);
  const float *Qt = check_rows(c, CHECK_NORMAL, n_q), *before = check_rows(c, CHECK_NORMAL, n_q > n_k ? n_q : n_k);
  void *ids = check_memory(c, (size_t)(n_k * id_bytes));
  float *values = check_floats(c, n_k), *dQt = check_floats(c, n_q), *dK = check_floats(c, n_k), *plain = check_floats(c, n_q + n_k);
  c->plain->topk(n_keys, x, D, D, K, ids, values);
  memcpy(dQt, before, (size_t)n_q * sizeof *dQt);
  memcpy(dK, before, (size_t)n_k * sizeof *dK);
  memcpy(plain, before, (size_t)n_q * sizeof *dQt);
  memcpy(plain + n_q, before, (size_t)n_k * sizeof *dK);
  c->kernels->query_codes_backward(n_keys, K, ids, id_bytes, values, ds, W, dQt);
  c->kernels->key_codes_backward(n_keys, K, ids, id_bytes, ds, Qt, W, dK);
  c->plain->query_codes_backward(n_keys, K, ids, id_bytes, values, ds, W, plain);
  c->plain->key_codes_backward(n_keys, K, ids, id_bytes, ds, Qt, W, plain + n_q);
  check_bits(c, "dQt", dQt, plain, n_q);
  check_bits(c, "dK", dK, plain + n_q, n_k);
  double *truth = check_memory(c, (size_t)n_q * sizeof *truth);
  float *naive = check_floats(c, n_q);
  check_errors q_errors = {0}, k_errors = {0};
  for (int64_t at = 0; at < n_q; at++)
    truth[at] = naive[at] = before[at];
  for (int64_t at = 0; at < n_k; at++) {
    const int feature = id_bytes == 1 ? ((uint8_t *)ids)[at] : ((uint16_t *)ids)[at];
    double sum = before[at];
    float naive_sum = before[at];
    for (int i = 0; i < W; i++) {
      const float d = ds[at / K * W + i];
      truth[feature * W + i] += (double)d * (double)values[at];
      naive[feature * W + i] += d * values[at];
      sum += (double)d * (double)Qt[feature * W + i];
      naive_sum += d * Qt[feature * W + i];
    }
    if (kind == CHECK_NORMAL)
      check_errors_add(&k_errors, dK[at], naive_sum, sum);
  }
  for (int64_t at = 0; at < n_q && kind == CHECK_NORMAL; at++)
    check_errors_add(&q_errors, dQt[at], naive[at], truth[at]);
  if (kind == CHECK_NORMAL) {
    check_errors_judge(c, "dQt", &q_errors, 2);
    check_errors_judge(c, "dK", &k_errors, 2);
  }
  check_end(c);
}

static void check_codes_backward(check *c) {
  static const int dims[] = {8, 24, 64, 128, 256, 264};
  for (int d = 0; d < 6; d++)
    for (int w = 0; w < N_WIDTHS; w++)
      for (int k = 0; k < N_KEY_COUNTS; k++) {
        const int D = dims[d], kept[] = {1, 8, D < 16 ? D : 16, check_range(c, 1, D), D};
        if (c->quick && (d + w + k) % 3)
          continue;
        codes_case(c, CHECK_NORMAL, D, kept[check_pick(c, 5)], widths[w], key_counts[k]);
        codes_case(c, (check_kind)check_pick(c, CHECK_KINDS), D, kept[check_pick(c, 5)], widths[w], check_range(c, 1, SFA_KEY_TILE));
      }
}

/* ---- The whole --------------------------------------------------------------------------------------------------------------- */

/* half: roundings of 2^-9 stand in the few pairs that weigh most, so that the largest error is luck to a factor; the RMS is not. */
static void judge(check *c, bool half, const char *what, int64_t n, const float *got, const float *naive, const float *other,
                  const double *truth) {
  check_errors errors = {0};
  for (int64_t at = 0; at < n; at++) {
    const bool further = fabs((double)other[at] - truth[at]) > fabs((double)naive[at] - truth[at]);
    check_errors_add(&errors, got[at], further ? other[at] : naive[at], truth[at]);
  }
  errors.naive_largest *= half ? 2 : 1;
  check_errors_judge(c, what, &errors, 8);
}

/* With one key or a few dP - delta cancels, and what is left are the roundings of both: 8 keys at least. In 16 bits naive code rounds the
 * operands of its products to bf16 as well. */
static void backward_case(check *c, bool half) {
  static const int head_dims[] = {8, 24, 64, 72, 128, 264};
  const int D = head_dims[check_pick(c, half ? 5 : 6)], E = check_pick(c, 2) ? D : 8 * check_range(c, 1, 18), G = check_range(c, 1, 2);
  const int H = G * check_range(c, 1, half ? 2 : 3), T = check_range(c, 1, half ? 330 / H : 150), S = check_range(c, 8, half ? 300 : 200);
  const int kept[] = {0, D, check_range(c, 1, D), 8};
  sfa_attention_options o = {.struct_size = sizeof o, .n_heads = H, .n_kv_heads = G, .head_dim = D, .head_dim_v = E};
  o.max_seqlen_q = T;
  o.max_seqlen_k = S;
  o.k_q = kept[check_pick(c, 4)];
  o.k_k = kept[check_pick(c, 4)];
  o.k_dtype = (sfa_dtype)check_range(c, SFA_F32, SFA_I8);
  o.v_dtype = (sfa_dtype)check_range(c, SFA_F32, SFA_E4M3);
  o.softcap = half || check_pick(c, 4) ? 0.0f : 1.0f + (float)check_pick(c, 30);
  o.causal = check_pick(c, 2);
  o.has_window = !check_pick(c, 3);
  o.window_size[0] = check_range(c, -1, 90);
  o.window_size[1] = check_range(c, -1, 40);
  o.n_sink_tokens = check_pick(c, 2) * check_range(c, 0, 70);
  o.policy = SFA_POLICY_TILES; /* out and lse are exact: what is judged are the gradients */
  const sfa_policy way = !half ? SFA_POLICY_TILES : o.k_k && o.k_k < D && check_pick(c, 2) ? SFA_POLICY_HALF_CODES : SFA_POLICY_HALF_DENSE;
  const bool with_sink = check_pick(c, 2), with_alibi = !half && !check_pick(c, 3), with_lse = check_pick(c, 2);
  check_begin(c, half ? "half_backward" : "backward",
              "H %d G %d D %d E %d T %d S %d k_q %d k_k %d types %d %d cap %g%s window %d %lld %lld sinks %lld%s%s%s", H, G, D, E, T, S,
              o.k_q, o.k_k, o.k_dtype, o.v_dtype, (double)o.softcap, o.causal ? " causal" : "", o.has_window, (long long)o.window_size[0],
              (long long)o.window_size[1], (long long)o.n_sink_tokens, with_sink ? " sink" : "", with_alibi ? " alibi" : "",
              with_lse ? " d_lse" : "");
  const int64_t rows = (int64_t)T * H, n_q = rows * D, n_k = (int64_t)S * G * D, n_v = (int64_t)S * G * E, n = n_q + n_k + n_v + H;
  const float *q = check_rows(c, CHECK_NORMAL, n_q), *k = check_rows(c, CHECK_NORMAL, n_k), *v = check_rows(c, CHECK_NORMAL, n_v);
  const float *d_out = check_rows(c, CHECK_NORMAL, rows * E), *d_lse = with_lse ? check_rows(c, CHECK_NORMAL, rows) : NULL;
  float *sink = with_sink ? check_rows(c, CHECK_NORMAL, H) : NULL, *slopes = with_alibi ? check_rows(c, CHECK_NORMAL, H) : NULL;
  for (int h = 0; slopes && h < H; h++)
    slopes[h] = fabsf(slopes[h]) * 0.02f;

  const sfa_context_options context = {.struct_size = sizeof context, .isa = half ? c->half->isa : c->kernels->isa, .n_threads = 1};
  sfa_context *ctx = NULL;
  sfa_attention_plan *plan = NULL;
  sfa_attention_args forward = {.struct_size = sizeof forward, .q.data = q, .k.data = k, .v.data = v};
  sfa_attention_grad_args args = {.struct_size = sizeof args, .forward = &forward, .d_out = d_out, .d_lse = d_lse};
  float *grad = check_floats(c, n), *naive = check_floats(c, n), *other = check_floats(c, n);
  double *truth = check_memory(c, (size_t)n * sizeof *truth);
  forward.sink_logit = sink;
  forward.alibi_slopes = slopes;
  forward.out = check_floats(c, rows * E);
  forward.lse = check_floats(c, rows);
  args.d_q = grad;
  args.d_k = grad + n_q;
  args.d_v = grad + n_q + n_k;
  args.d_sink_logit = grad + n_q + n_k + n_v;
  sfa_status status = sfa_context_create(&context, &ctx);
  if (status == SFA_OK)
    status = sfa_attention_plan_create(ctx, &o, &plan);
  o.policy = way;
  if (status == SFA_OK) {
    forward.workspace = check_memory(c, (sfa_attention_workspace_bytes(plan) + 63) / 64 * 64);
    status = sfa_attention_run(plan, &forward);
    sfa_attention_plan_destroy(plan);
    plan = NULL;
  }
  if (status == SFA_OK)
    status = sfa_attention_plan_create(ctx, &o, &plan);
  if (status == SFA_OK) {
    plan->kernels = c->kernels; /* perhaps with a bug planted */
    args.workspace = check_memory(c, (sfa_attention_backward_workspace_bytes(plan) + 63) / 64 * 64);
    status = sfa_attention_backward(plan, &args);
  }
  sfa_attention_plan_destroy(plan);
  sfa_context_destroy(ctx);
  if (status != SFA_OK)
    check_fail(c, "%s", sfa_status_name(status));

  oracle_problem p = {.n_queries = T, .n_keys = S, .n_heads = H, .n_kv_heads = G, .head_dim = D, .head_dim_v = E};
  p.k_q = o.k_q;
  p.k_k = o.k_k;
  p.k_storage = (int)o.k_dtype;
  p.v_storage = (int)o.v_dtype;
  p.softcap = o.softcap;
  p.causal = o.causal;
  p.has_window = o.has_window;
  p.window_left = (long)o.window_size[0];
  p.window_right = (long)o.window_size[1];
  p.n_sink_tokens = (long)o.n_sink_tokens;
  p.sink_logit = sink;
  p.alibi_slopes = slopes;
  p.q = q;
  p.k = k;
  p.v = v;
  oracle_grad_f64 exact = {truth, truth + n_q, truth + n_q + n_k, truth + n_q + n_k + n_v};
  oracle_grad_f32 plain = {naive, naive + n_q, naive + n_q + n_k, naive + n_q + n_k + n_v};
  oracle_grad_f32 backwards = {other, other + n_q, other + n_q + n_k, other + n_q + n_k + n_v};
  oracle_backward_f64(&p, d_out, d_lse, &exact);
  p.short_products = half;
  oracle_backward_f32(&p, d_out, d_lse, &plain);
  p.features_backwards = 1; /* another natural order of naive code, or other units of what it rounds */
  p.short_products *= 1.4;
  oracle_backward_f32(&p, d_out, d_lse, &backwards);
  judge(c, half, "d_q", n_q, args.d_q, plain.q, backwards.q, exact.q);
  judge(c, half, "d_k", n_k, args.d_k, plain.k, backwards.k, exact.k);
  judge(c, half, "d_v", n_v, args.d_v, plain.v, backwards.v, exact.v);
  judge(c, half, "d_sink_logit", H, args.d_sink_logit, plain.sink_logit, backwards.sink_logit, exact.sink_logit);
  check_end(c);
}

static void check_backward(check *c) {
  const int n_cases = c->quick ? 40 : 300;
  for (int i = 0; i < n_cases; i++)
    backward_case(c, false);
}

void check_backward_half(check *c) {
  const int n_cases = c->quick ? 20 : 200;
  for (int i = 0; i < n_cases; i++)
    backward_case(c, true);
}

const check_entry check_backward_entries[] = {{"softmax_backward", check_softmax_backward},
                                              {"key_product", check_key_product},
                                              {"codes_backward", check_codes_backward},
                                              {"backward", check_backward},
                                              {NULL, NULL}};
