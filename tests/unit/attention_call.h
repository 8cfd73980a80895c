/* One call of sfa_attention_run with all that it needs, its errors against the oracle, and a table of shapes: what the tests of attention
 * share. */
#ifndef ATTENTION_CALL_H
#define ATTENTION_CALL_H

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <sfa/attention.h>
#include <sfa/cache.h>

#include "base/half.h"
#include "oracle_call.h"
#include "unit_tools.h"

/* ---- Tools ----------------------------------------------------------------------------------------------------------------- */

static inline int64_t at_least_1(int64_t n) { return n > 0 ? n : 1; }

/* One call of sfa_attention_run and all that it needs. */
typedef struct call {
  sfa_attention_options o;
  sfa_attention_args a;
  int64_t n_q, n_k; /* tokens */
  float *q, *k, *v, *out, *lse;
} call;

/* Shapes in o; total tokens B * max unless cu_seqlens are set afterwards. Where the planner chooses, with the bits of f32 on every machine:
 * an AMX one may round short types to 16 bits. */
static inline call new_call(sfa_attention_options o, uint64_t seed) {
  call c = {.o = o};
  if (o.policy == SFA_POLICY_AUTO)
    c.o.precision = SFA_PRECISION_F32;
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

static inline void free_call(call *c) {
  free(c->q);
  free(c->k);
  free(c->v);
  free(c->out);
  free(c->lse);
}

static inline sfa_status run(sfa_context *ctx, call *c) {
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

static inline void run_ok(sfa_context *ctx, call *c) {
  if (run(ctx, c) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
}

/* ---- The definition -------------------------------------------------------------------------------------------------------- */

/* Largest |error| of out and lse against the maths in double. */
static inline void measure(const call *c, double *out_error, double *lse_error) {
  const int32_t H = c->o.n_heads, E = c->o.head_dim_v;
  *out_error = *lse_error = 0;
  for (int32_t b = 0; b < c->o.n_sequences; b++) {
    int64_t q0, k0;
    const oracle_problem problem = oracle_of(&c->o, &c->a, b, &q0, &k0);
    const int64_t T = problem.n_queries;
    double *out = memory((size_t)at_least_1(T * H * E) * sizeof *out), *lse = memory((size_t)at_least_1(T * H) * sizeof *lse);
    oracle_attention_f64(&problem, out, lse);
    for (int64_t i = 0; i < T * H * E; i++) {
      double error = fabs(out[i] - (double)c->out[q0 * H * E + i]);
      *out_error = !(error <= *out_error) ? error : *out_error;
    }
    for (int64_t i = 0; i < T * H; i++) {
      double got = c->lse[q0 * H + i], error = lse[i] == got ? 0 : fabs(lse[i] - got); /* -inf where no key is seen */
      *lse_error = !(error <= *lse_error) ? error : *lse_error;
    }
    free(out);
    free(lse);
  }
}

static inline void expect_exact(const char *what, const call *c) {
  double out_error, lse_error;
  measure(c, &out_error, &lse_error);
  if (!(out_error <= 4e-6 && lse_error <= 4e-6))
    fail_msg("%s: error of out %g, of lse %g", what, out_error, lse_error);
}

/* ---- Shapes ------------------------------------------------------------------------------------------------------------ */

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
    {"very large head",
     {.n_heads = 1, .head_dim = 4096, .head_dim_v = 16, .max_seqlen_q = 20, .max_seqlen_k = 70, .k_q = 40, .k_k = 30},
     0,
     0},
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
    {"many blocks, several to an item",
     {.n_heads = 10,
      .n_kv_heads = 5,
      .head_dim = 16,
      .max_seqlen_q = 400,
      .max_seqlen_k = 450,
      .k_q = 8,
      .k_k = 4,
      .k_dtype = SFA_I8,
      .v_dtype = SFA_BF16,
      .causal = 1,
      .has_window = 1,
      .window_size = {150, 0},
      .n_sink_tokens = 70},
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

static inline call shape_call(int i) {
  call c = new_call(shapes[i].o, (uint64_t)(100 * i + 1));
  c.a.sink_logit = shapes[i].sink ? sink_logits : NULL;
  c.a.alibi_slopes = shapes[i].alibi ? alibi_slopes : NULL;
  return c;
}

/* ---- Comparing ---------------------------------------------------------------------------------------------------------------------- */

static inline size_t out_bytes(const call *c) { return (size_t)(c->n_q * c->o.n_heads * c->o.head_dim_v) * sizeof(float); }
static inline size_t lse_bytes(const call *c) { return (size_t)(c->n_q * c->o.n_heads) * sizeof(float); }

static inline void expect_same(const char *what, const call *a, const call *b) {
  if (memcmp(a->out, b->out, out_bytes(a)) || memcmp(a->lse, b->lse, lse_bytes(a)))
    fail_msg("%s: other bits", what);
}

/* Rows of sequence `sequence` of c, from its token `first` on, are those of `alone`, whose only sequence they are. */
static inline void expect_rows(const char *what, const call *c, int64_t first_token, const call *alone) {
  int64_t row = first_token * c->o.n_heads;
  if (memcmp(c->out + row * c->o.head_dim_v, alone->out, out_bytes(alone)) || memcmp(c->lse + row, alone->lse, lse_bytes(alone)))
    fail_msg("%s: other bits", what);
}

/* One sequence of c, its last n_tokens queries over all its keys, as a call of its own. */
static inline call sequence_of(const call *c, int32_t b, int64_t n_tokens) {
  int64_t T, S, q0 = range(c->a.cu_seqlens_q, c->o.max_seqlen_q, b, &T), k0 = range(c->a.cu_seqlens_k, c->o.max_seqlen_k, b, &S);
  sfa_attention_options o = c->o;
  o.n_sequences = 1;
  o.max_seqlen_q = n_tokens;
  o.max_seqlen_k = S;
  call alone = new_call(o, 1);
  alone.a.q.data = c->q + (q0 + T - n_tokens) * o.n_heads * o.head_dim;
  alone.a.k.data = c->k + k0 * o.n_kv_heads * o.head_dim;
  alone.a.v.data = c->v + k0 * o.n_kv_heads * o.head_dim_v;
  alone.a.sink_logit = c->a.sink_logit;
  alone.a.alibi_slopes = c->a.alibi_slopes;
  return alone;
}

#endif
