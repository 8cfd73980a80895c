/* Attention through the public API: against the definition in double, and the promises about bits. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <sfa/attention.h>
#include <sfa/cache.h>

#include "base/half.h"
#include "base/rng.h"

/* ---- Tools
 * ------------------------------------------------------------------------------------------------------------------------------- */

static sfa_context *new_context(int32_t n_threads, sfa_isa isa) {
  sfa_context_options options = {.struct_size = sizeof options, .n_threads = n_threads, .isa = isa};
  sfa_context *ctx;
  assert_int_equal(sfa_context_create(&options, &ctx), SFA_OK);
  return ctx;
}

static void *memory(size_t bytes) {
  void *p = aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
  assert_non_null(p);
  memset(p, 0xff, (bytes + 63) / 64 * 64 + 64); /* NaN: what is read must have been written */
  return p;
}

static float *normals(uint64_t seed, int64_t n) {
  sfa_rng rng = {seed};
  float *x = memory((size_t)n * sizeof *x);
  for (int64_t i = 0; i < n; i++)
    x[i] = (float)sfa_rng_normal(&rng);
  return x;
}

static int64_t at_least_1(int64_t n) { return n > 0 ? n : 1; }

/* One call of sfa_attention_run and all that it needs. */
typedef struct call {
  sfa_attention_options o;
  sfa_attention_args a;
  int64_t n_q, n_k; /* tokens */
  float *q, *k, *v, *out, *lse;
} call;

/* Shapes in o; total tokens B * max unless cu_seqlens are set afterwards. */
static call new_call(sfa_attention_options o, uint64_t seed) {
  call c = {.o = o};
  c.o.struct_size = sizeof c.o;
  c.o.n_sequences = o.n_sequences ? o.n_sequences : 1;
  c.o.n_kv_heads = o.n_kv_heads ? o.n_kv_heads : o.n_heads;
  c.o.head_dim_v = o.head_dim_v ? o.head_dim_v : o.head_dim;
  c.n_q = c.o.n_sequences * c.o.max_seqlen_q;
  c.n_k = c.o.n_sequences * c.o.max_seqlen_k;
  c.q = normals(seed, at_least_1(c.n_q * c.o.n_heads * c.o.head_dim));
  c.k = normals(seed + 1, at_least_1(c.n_k * c.o.n_kv_heads * c.o.head_dim));
  c.v = normals(seed + 2, at_least_1(c.n_k * c.o.n_kv_heads * c.o.head_dim_v));
  c.out = memory((size_t)(c.n_q * c.o.n_heads * c.o.head_dim_v) * sizeof(float));
  c.lse = memory((size_t)(c.n_q * c.o.n_heads) * sizeof(float));
  c.a = (sfa_attention_args){.struct_size = sizeof c.a, .q.data = c.q, .k.data = c.k, .v.data = c.v, .out = c.out, .lse = c.lse};
  return c;
}

static void free_call(call *c) {
  free(c->q);
  free(c->k);
  free(c->v);
  free(c->out);
  free(c->lse);
}

static sfa_status run(sfa_context *ctx, call *c) {
  sfa_attention_plan *plan;
  sfa_status status = sfa_attention_plan_create(ctx, &c->o, &plan);
  if (status != SFA_OK)
    return status;
  size_t bytes = sfa_attention_workspace_bytes(plan);
  unsigned char *workspace = memory(bytes);
  c->a.workspace = workspace;
  status = sfa_attention_run(plan, &c->a);
  for (int i = 0; i < 64; i++) /* nothing beyond the bytes that were asked for */
    assert_int_equal(workspace[(bytes + 63) / 64 * 64 + (size_t)i], 0xff);
  free(workspace);
  c->a.workspace = NULL;
  sfa_attention_plan_destroy(plan);
  return status;
}

static void run_ok(sfa_context *ctx, call *c) {
  if (run(ctx, c) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
}

/* ---- The definition, in double
 * ------------------------------------------------------------------------------------------------------------- */

/* The stored form of a row: top-k by magnitude, rounding. */
static void store_row(const float *x, int32_t dim, int32_t k, sfa_dtype dtype, double *out) {
  float largest = 0;
  for (int32_t u = 0; u < dim; u++) {
    int32_t rank = 0;
    for (int32_t w = 0; w < dim; w++)
      rank += fabsf(x[w]) > fabsf(x[u]) || (fabsf(x[w]) == fabsf(x[u]) && w < u);
    out[u] = !k || rank < k ? x[u] : 0;
    largest = fmaxf(largest, fabsf((float)out[u]));
  }
  float scale = sfa_f32_from_f16(sfa_f16_from_f32(largest / 127));
  if (scale * 127 < largest)
    scale = sfa_f32_from_f16((uint16_t)(sfa_f16_from_f32(largest / 127) + 1));
  for (int32_t u = 0; u < dim; u++)
    switch (dtype) {
    case SFA_BF16: out[u] = sfa_f32_from_bf16(sfa_bf16_from_f32((float)out[u])); break;
    case SFA_F16: out[u] = sfa_f32_from_f16(sfa_f16_from_f32((float)out[u])); break;
    case SFA_I8: out[u] = scale == 0 ? 0 : nearbyint(out[u] / scale) * scale; break;
    default: break;
    }
}

static double *stored_rows(const float *x, int64_t n_rows, int32_t dim, int32_t k, sfa_dtype dtype) {
  double *out = memory((size_t)at_least_1(n_rows * dim) * sizeof *out);
  for (int64_t i = 0; i < n_rows; i++)
    store_row(x + i * dim, dim, k, dtype, out + i * dim);
  return out;
}

static bool sees(const sfa_attention_options *o, int64_t i, int64_t j) {
  if (o->causal && j > i)
    return false;
  if (!o->has_window)
    return true;
  if (o->window_size[1] >= 0 && j > i + o->window_size[1])
    return false;
  return o->window_size[0] < 0 || j >= i - o->window_size[0] || j < o->n_sink_tokens;
}

/* Largest |error| of out and lse against the definition. */
static void measure(const call *c, double *out_error, double *lse_error) {
  const sfa_attention_options *o = &c->o;
  int32_t H = o->n_heads, G = o->n_kv_heads, D = o->head_dim, E = o->head_dim_v;
  double *q = stored_rows(c->q, c->n_q * H, D, o->k_q, SFA_F32), *k = stored_rows(c->k, c->n_k * G, D, o->k_k, o->k_dtype);
  double *v = stored_rows(c->v, c->n_k * G, E, 0, o->v_dtype), *p = memory((size_t)at_least_1(o->max_seqlen_k) * sizeof *p);
  double scale = o->softmax_scale != 0 ? o->softmax_scale : 1 / sqrt(D);
  *out_error = *lse_error = 0;
  for (int32_t b = 0; b < o->n_sequences; b++) {
    int64_t q0 = c->a.cu_seqlens_q ? c->a.cu_seqlens_q[b] : b * o->max_seqlen_q;
    int64_t k0 = c->a.cu_seqlens_k ? c->a.cu_seqlens_k[b] : b * o->max_seqlen_k;
    int64_t T = c->a.cu_seqlens_q ? c->a.cu_seqlens_q[b + 1] - q0 : o->max_seqlen_q;
    int64_t S = c->a.cu_seqlens_k ? c->a.cu_seqlens_k[b + 1] - k0 : o->max_seqlen_k;
    for (int64_t row = 0; row < T * H; row++) {
      int64_t t = row / H, h = row % H, g = h / (H / G), i = t + S - T;
      double m = c->a.sink_logit ? (double)c->a.sink_logit[h] : -INFINITY, l = 0;
      for (int64_t j = 0; j < S; j++) {
        double s = 0;
        for (int32_t u = 0; u < D; u++)
          s += q[((q0 + t) * H + h) * D + u] * k[((k0 + j) * G + g) * D + u];
        s *= scale;
        s = o->softcap > 0 ? o->softcap * tanh(s / o->softcap) : s;
        s += c->a.alibi_slopes ? (double)c->a.alibi_slopes[h] * (double)(j - i) : 0;
        p[j] = sees(o, i, j) ? s : -INFINITY;
        m = fmax(m, p[j]);
      }
      if (c->a.sink_logit)
        l += exp((double)c->a.sink_logit[h] - m);
      for (int64_t j = 0; j < S; j++)
        l += p[j] = m == -INFINITY ? 0 : exp(p[j] - m);
      for (int32_t e = 0; e < E; e++) {
        double want = 0;
        for (int64_t j = 0; j < S; j++)
          want += p[j] == 0 ? 0 : p[j] * v[((k0 + j) * G + g) * E + e] / l;
        double error = fabs(want - (double)c->out[((q0 + t) * H + h) * E + e]);
        *out_error = !(error <= *out_error) ? error : *out_error;
      }
      double lse = m + log(l), got = c->lse[(q0 + t) * H + h];
      double error = l == 0 ? (got == -INFINITY ? 0 : INFINITY) : fabs(lse - got);
      *lse_error = !(error <= *lse_error) ? error : *lse_error;
    }
  }
  free(q);
  free(k);
  free(v);
  free(p);
}

static void expect_exact(const char *what, const call *c) {
  double out_error, lse_error;
  measure(c, &out_error, &lse_error);
  if (!(out_error <= 4e-6 && lse_error <= 4e-6))
    fail_msg("%s: error of out %g, of lse %g", what, out_error, lse_error);
}

/* ---- Against the definition
 * ------------------------------------------------------------------------------------------------------------------ */

static const struct {
  const char *name;
  sfa_attention_options o;
  bool sink, alibi;
} shapes[] = {
    {"dense", {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 130, .max_seqlen_k = 130}, 0, 0},
    {"dense causal", {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 130, .max_seqlen_k = 130, .causal = 1}, 0, 0},
    {"sparse", {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 77, .max_seqlen_k = 140, .k_q = 8, .k_k = 8}, 0, 0},
    {"sparse causal GQA",
     {.n_heads = 6, .n_kv_heads = 2, .head_dim = 64, .max_seqlen_q = 90, .max_seqlen_k = 90, .k_q = 16, .k_k = 16, .causal = 1},
     0,
     0},
    {"K-only MQA", {.n_heads = 3, .n_kv_heads = 1, .head_dim = 128, .max_seqlen_q = 33, .max_seqlen_k = 200, .k_k = 16, .causal = 1}, 0, 0},
    {"q sparser than k", {.n_heads = 1, .head_dim = 256, .max_seqlen_q = 65, .max_seqlen_k = 65, .k_q = 4, .k_k = 32, .causal = 1}, 0, 0},
    {"large head", {.n_heads = 1, .head_dim = 328, .max_seqlen_q = 20, .max_seqlen_k = 70, .k_q = 16, .k_k = 16}, 0, 0},
    {"small head, E > D",
     {.n_heads = 2, .head_dim = 8, .head_dim_v = 72, .max_seqlen_q = 40, .max_seqlen_k = 66, .k_k = 1, .causal = 1},
     0,
     0},
    {"E < D, batch",
     {.n_heads = 4,
      .n_kv_heads = 2,
      .head_dim = 64,
      .head_dim_v = 24,
      .n_sequences = 3,
      .max_seqlen_q = 5,
      .max_seqlen_k = 71,
      .k_q = 8,
      .k_k = 8},
     0,
     0},
    {"more queries than keys", {.n_heads = 2, .head_dim = 16, .max_seqlen_q = 100, .max_seqlen_k = 66, .causal = 1}, 0, 0},
    {"no keys", {.n_heads = 2, .head_dim = 16, .max_seqlen_q = 3, .max_seqlen_k = 0}, 0, 0},
    {"no keys but a sink", {.n_heads = 2, .head_dim = 16, .max_seqlen_q = 3, .max_seqlen_k = 0}, 1, 0},
    {"window",
     {.n_heads = 2, .head_dim = 32, .max_seqlen_q = 300, .max_seqlen_k = 300, .causal = 1, .has_window = 1, .window_size = {70, 0}},
     0,
     0},
    {"window, both sides",
     {.n_heads = 1, .head_dim = 32, .max_seqlen_q = 200, .max_seqlen_k = 230, .has_window = 1, .window_size = {20, 40}},
     0,
     0},
    {"window, right only",
     {.n_heads = 1, .head_dim = 32, .max_seqlen_q = 200, .max_seqlen_k = 230, .has_window = 1, .window_size = {-1, 3}},
     0,
     0},
    {"window with sink tokens",
     {.n_heads = 2,
      .head_dim = 32,
      .max_seqlen_q = 300,
      .max_seqlen_k = 300,
      .k_k = 8,
      .causal = 1,
      .has_window = 1,
      .window_size = {10, 0},
      .n_sink_tokens = 4},
     0,
     0},
    {"sink logit",
     {.n_heads = 4, .n_kv_heads = 2, .head_dim = 64, .max_seqlen_q = 60, .max_seqlen_k = 60, .k_q = 8, .k_k = 8, .causal = 1},
     1,
     0},
    {"softcap",
     {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 60, .max_seqlen_k = 90, .softmax_scale = 1.5f, .softcap = 5, .causal = 1},
     0,
     0},
    {"ALiBi",
     {.n_heads = 4, .n_kv_heads = 2, .head_dim = 64, .max_seqlen_q = 100, .max_seqlen_k = 150, .k_q = 8, .k_k = 8, .causal = 1},
     0,
     1},
    {"all at once",
     {.n_heads = 4,
      .n_kv_heads = 2,
      .head_dim = 40,
      .head_dim_v = 56,
      .n_sequences = 2,
      .max_seqlen_q = 150,
      .max_seqlen_k = 170,
      .k_q = 24,
      .k_k = 12,
      .k_dtype = SFA_I8,
      .v_dtype = SFA_I8,
      .softmax_scale = 0.4f,
      .softcap = 3,
      .causal = 1,
      .has_window = 1,
      .window_size = {50, 0},
      .n_sink_tokens = 3},
     1,
     1},
    {"int8 codes, bf16 values",
     {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 60, .max_seqlen_k = 90, .k_q = 8, .k_k = 8, .k_dtype = SFA_I8, .v_dtype = SFA_BF16},
     0,
     0},
    {"f16",
     {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 60, .max_seqlen_k = 90, .k_k = 16, .k_dtype = SFA_F16, .v_dtype = SFA_F16},
     0,
     0},
    {"dense int8",
     {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 60, .max_seqlen_k = 90, .k_dtype = SFA_I8, .v_dtype = SFA_I8, .causal = 1},
     0,
     0},
    {"one query over two spans",
     {.n_heads = 2, .n_kv_heads = 1, .head_dim = 16, .max_seqlen_q = 1, .max_seqlen_k = 4500, .k_k = 4, .causal = 1},
     1,
     0},
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

static const float sink_logits[] = {0.5f, -1, 3, 0, 2, 1}, alibi_slopes[] = {0.5f, 0.25f, 0.0625f, 0.01f};

static void definition(void **state) {
  (void)state;
  for (int isa = SFA_ISA_SCALAR; isa <= (int)sfa_isa_best(); isa++) {
    sfa_context *ctx = new_context(2, (sfa_isa)isa);
    for (int i = 0; i < N_SHAPES; i++) {
      call c = new_call(shapes[i].o, (uint64_t)(100 * i + 1));
      c.a.sink_logit = shapes[i].sink ? sink_logits : NULL;
      c.a.alibi_slopes = shapes[i].alibi ? alibi_slopes : NULL;
      run_ok(ctx, &c);
      expect_exact(shapes[i].name, &c);
      free_call(&c);
    }
    sfa_context_destroy(ctx);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(definition),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
