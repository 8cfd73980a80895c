/* Gradients of attention: against the maths in double over a table of shapes, and the maths against central differences; the same bits
 * for any threads, instruction set and form of the same call; ropes; arguments. */
#include "attention_call.h"

#include <sfa/backward.h>

/* A call of the forward and of the backward. */
typedef struct grad_call {
  call c;
  sfa_attention_grad_args a;
  float *d_out, *d_lse, *d_q, *d_k, *d_v, d_sink[16];
} grad_call;

static size_t q_floats(const grad_call *g) { return (size_t)(g->c.n_q * g->c.o.n_heads * g->c.o.head_dim); }
static size_t k_floats(const grad_call *g) { return (size_t)(g->c.n_k * g->c.o.n_kv_heads * g->c.o.head_dim); }
static size_t v_floats(const grad_call *g) { return (size_t)(g->c.n_k * g->c.o.n_kv_heads * g->c.o.head_dim_v); }

static void new_grad_call(grad_call *g, sfa_attention_options o, uint64_t seed) {
  *g = (grad_call){.c = new_call(o, seed)};
  int64_t rows = g->c.n_q * g->c.o.n_heads;
  g->d_out = normals(seed + 3, at_least_1(rows * g->c.o.head_dim_v));
  g->d_lse = normals(seed + 4, at_least_1(rows));
  g->d_q = memory(q_floats(g) * sizeof(float));
  g->d_k = memory(k_floats(g) * sizeof(float));
  g->d_v = memory(v_floats(g) * sizeof(float));
  g->a = (sfa_attention_grad_args){.struct_size = sizeof g->a, .d_out = g->d_out, .d_lse = g->d_lse};
  g->a.d_q = g->d_q;
  g->a.d_k = g->d_k;
  g->a.d_v = g->d_v;
  g->a.d_sink_logit = g->d_sink;
}

static void free_grad_call(grad_call *g) {
  free_call(&g->c);
  free(g->d_out);
  free(g->d_lse);
  free(g->d_q);
  free(g->d_k);
  free(g->d_v);
}

/* Forward, then backward. */
static sfa_status run_grad(sfa_context *ctx, grad_call *g) {
  sfa_attention_plan *plan;
  sfa_status status = run(ctx, &g->c);
  if (status != SFA_OK)
    return status;
  assert_int_equal(sfa_attention_plan_create(ctx, &g->c.o, &plan), SFA_OK);
  size_t bytes = sfa_attention_backward_workspace_bytes(plan);
  unsigned char *workspace = memory(bytes);
  g->a.forward = &g->c.a;
  g->a.workspace = workspace;
  status = sfa_attention_backward(plan, &g->a);
  for (int i = 0; i < 64; i++) /* nothing beyond the bytes that were asked for */
    assert_int_equal(workspace[(bytes + 63) / 64 * 64 + (size_t)i], 0xff);
  free(workspace);
  sfa_attention_plan_destroy(plan);
  return status;
}

static void run_grad_ok(sfa_context *ctx, grad_call *g) {
  if (run_grad(ctx, g) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
}

/* ---- The definition -------------------------------------------------------------------------------------------------------- */

/* Errors of n numbers, beside those of naive code. */
static void expect_close(const char *shape, const char *what, int64_t n, const float *got, const float *naive, const double *truth) {
  double scale = 0, error = 0, naive_error = 0;
  for (int64_t i = 0; i < n; i++) {
    scale = fmax(scale, fabs(truth[i]));
    error = fabs(got[i] - truth[i]) <= error ? error : fabs(got[i] - truth[i]);
    naive_error = fmax(naive_error, fabs((double)naive[i] - truth[i]));
  }
  if (!(error <= 2 * naive_error + 2e-6 * scale))
    fail_msg("%s: error of %s %g of %g, of naive code %g", shape, what, error, scale, naive_error);
}

static oracle_problem problem_of(const call *c, int32_t b, int64_t *q0, int64_t *k0) {
  const sfa_attention_options *o = &c->o;
  int64_t T, S;
  *q0 = range(c->a.cu_seqlens_q, o->max_seqlen_q, b, &T);
  *k0 = range(c->a.cu_seqlens_k, o->max_seqlen_k, b, &S);
  return (oracle_problem){.n_queries = (int)T,
                          .n_keys = (int)S,
                          .n_heads = o->n_heads,
                          .n_kv_heads = o->n_kv_heads,
                          .head_dim = o->head_dim,
                          .head_dim_v = o->head_dim_v,
                          .k_q = o->k_q,
                          .k_k = o->k_k,
                          .k_storage = storage_of(o->k_dtype),
                          .v_storage = storage_of(o->v_dtype),
                          .softmax_scale = o->softmax_scale,
                          .softcap = o->softcap,
                          .causal = o->causal,
                          .has_window = o->has_window,
                          .window_left = o->window_size[0],
                          .window_right = o->window_size[1],
                          .n_sink_tokens = o->n_sink_tokens,
                          .sink_logit = c->a.sink_logit,
                          .alibi_slopes = c->a.alibi_slopes,
                          .q = c->q + *q0 * o->n_heads * o->head_dim,
                          .k = c->k + *k0 * o->n_kv_heads * o->head_dim,
                          .v = c->v + *k0 * o->n_kv_heads * o->head_dim_v};
}

static void expect_gradients(const char *shape, const grad_call *g) {
  const sfa_attention_options *o = &g->c.o;
  int64_t H = o->n_heads, G = o->n_kv_heads, D = o->head_dim, E = o->head_dim_v;
  double sink[16] = {0};
  float naive_sink[16] = {0};
  for (int32_t b = 0; b < o->n_sequences; b++) {
    int64_t q0, k0;
    oracle_problem p = problem_of(&g->c, b, &q0, &k0);
    size_t n_q = (size_t)(p.n_queries * H * D), n_k = (size_t)(p.n_keys * G * D), n_v = (size_t)(p.n_keys * G * E);
    double sinks[16], *truth = memory((n_q + n_k + n_v) * sizeof *truth);
    float naive_sinks[16], *naive = memory((n_q + n_k + n_v) * sizeof *naive);
    oracle_grad_f64 exact = {truth, truth + n_q, truth + n_q + n_k, sinks};
    oracle_grad_f32 plain = {naive, naive + n_q, naive + n_q + n_k, naive_sinks};
    const float *d_out = g->d_out + q0 * H * E, *d_lse = g->a.d_lse ? g->a.d_lse + q0 * H : NULL;
    oracle_backward_f64(&p, d_out, d_lse, &exact);
    oracle_backward_f32(&p, d_out, d_lse, &plain);
    expect_close(shape, "d_q", (int64_t)n_q, g->d_q + q0 * H * D, plain.q, exact.q);
    expect_close(shape, "d_k", (int64_t)n_k, g->d_k + k0 * G * D, plain.k, exact.k);
    expect_close(shape, "d_v", (int64_t)n_v, g->d_v + k0 * G * E, plain.v, exact.v);
    for (int h = 0; h < H; h++) {
      sink[h] += sinks[h];
      naive_sink[h] += naive_sinks[h];
    }
    free(truth);
    free(naive);
  }
  expect_close(shape, "d_sink_logit", H, g->d_sink, naive_sink, sink);
}

static void definition(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  for (int i = 0; i < N_SHAPES; i++) {
    grad_call g;
    new_grad_call(&g, shapes[i].o, 7);
    g.c.a.sink_logit = shapes[i].sink ? sink_logits : NULL;
    g.c.a.alibi_slopes = shapes[i].alibi ? alibi_slopes : NULL;
    if (i % 3 == 0)
      g.a.d_lse = NULL;
    run_grad_ok(ctx, &g);
    expect_gradients(shapes[i].name, &g);
    free_grad_call(&g);
  }
  sfa_context_destroy(ctx);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(definition)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
