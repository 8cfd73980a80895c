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
#include "oracle.h"

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

/* ---- The definition
 * ------------------------------------------------------------------------------------------------------------------------ */

static int storage_of(sfa_dtype dtype) {
  static const int storage[] = {ORACLE_F32, ORACLE_F32, ORACLE_BF16, ORACLE_F16, ORACLE_I8};
  return storage[dtype];
}

/* First token and number of tokens of sequence b. */
static int64_t range(const int32_t *cu_seqlens, int64_t max_seqlen, int32_t b, int64_t *n) {
  *n = cu_seqlens ? cu_seqlens[b + 1] - cu_seqlens[b] : max_seqlen;
  return cu_seqlens ? cu_seqlens[b] : b * max_seqlen;
}

/* Largest |error| of out and lse against the maths in double. */
static void measure(const call *c, double *out_error, double *lse_error) {
  const sfa_attention_options *o = &c->o;
  int32_t H = o->n_heads, G = o->n_kv_heads, D = o->head_dim, E = o->head_dim_v;
  *out_error = *lse_error = 0;
  for (int32_t b = 0; b < o->n_sequences; b++) {
    int64_t T, S, q0 = range(c->a.cu_seqlens_q, o->max_seqlen_q, b, &T), k0 = range(c->a.cu_seqlens_k, o->max_seqlen_k, b, &S);
    oracle_problem problem = {.n_queries = (int)T,
                              .n_keys = (int)S,
                              .n_heads = H,
                              .n_kv_heads = G,
                              .head_dim = D,
                              .head_dim_v = E,
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
                              .q = (const float *)c->a.q.data + q0 * H * D,
                              .k = (const float *)c->a.k.data + k0 * G * D,
                              .v = (const float *)c->a.v.data + k0 * G * E};
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

static call shape_call(int i) {
  call c = new_call(shapes[i].o, (uint64_t)(100 * i + 1));
  c.a.sink_logit = shapes[i].sink ? sink_logits : NULL;
  c.a.alibi_slopes = shapes[i].alibi ? alibi_slopes : NULL;
  return c;
}

static void definition(void **state) {
  (void)state;
  for (int isa = SFA_ISA_SCALAR; isa <= (int)sfa_isa_best(); isa++) {
    sfa_context *ctx = new_context(2, (sfa_isa)isa);
    for (int i = 0; i < N_SHAPES; i++) {
      call c = shape_call(i);
      run_ok(ctx, &c);
      expect_exact(shapes[i].name, &c);
      free_call(&c);
    }
    sfa_context_destroy(ctx);
  }
}

/* ---- Promises about bits
 * ------------------------------------------------------------------------------------------------------------------------ */

static size_t out_bytes(const call *c) { return (size_t)(c->n_q * c->o.n_heads * c->o.head_dim_v) * sizeof(float); }
static size_t lse_bytes(const call *c) { return (size_t)(c->n_q * c->o.n_heads) * sizeof(float); }

static void expect_same(const char *what, const call *a, const call *b) {
  if (memcmp(a->out, b->out, out_bytes(a)) || memcmp(a->lse, b->lse, lse_bytes(a)))
    fail_msg("%s: other bits", what);
}

/* Rows of sequence `sequence` of c, from its token `first` on, are those of `alone`, whose only sequence they are. */
static void expect_rows(const char *what, const call *c, int64_t first_token, const call *alone) {
  int64_t row = first_token * c->o.n_heads;
  if (memcmp(c->out + row * c->o.head_dim_v, alone->out, out_bytes(alone)) || memcmp(c->lse + row, alone->lse, lse_bytes(alone)))
    fail_msg("%s: other bits", what);
}

/* Another instruction set, other numbers of threads on the best one: the bits of plain C on one thread. */
static void machine_does_not_matter(void **state) {
  (void)state;
  sfa_context *reference = new_context(1, SFA_ISA_SCALAR);
  for (int i = 0; i < N_SHAPES; i++) {
    call want = shape_call(i);
    run_ok(reference, &want);
    for (int isa = SFA_ISA_SCALAR + 1; isa <= (int)sfa_isa_best(); isa++)
      for (int32_t n_threads = isa == (int)sfa_isa_best() ? 3 : 1; n_threads > 0; n_threads--) {
        sfa_context *ctx = new_context(n_threads, (sfa_isa)isa);
        call c = shape_call(i);
        run_ok(ctx, &c);
        expect_same(shapes[i].name, &want, &c);
        free_call(&c);
        sfa_context_destroy(ctx);
      }
    free_call(&want);
  }
  sfa_context_destroy(reference);
}

/* Algorithm 1 of the paper over every shape with codes on both sides: the bits of the tile loop. */
static void paper(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  int n_same = 0;
  for (int i = 0; i < N_SHAPES; i++) {
    call tiles = shape_call(i), lists = shape_call(i);
    tiles.o.policy = SFA_POLICY_TILES;
    lists.o.policy = SFA_POLICY_PAPER;
    run_ok(ctx, &tiles);
    const sfa_attention_options *o = &lists.o;
    if (o->k_q > 0 && o->k_q < o->head_dim && o->k_k > 0 && o->k_k < o->head_dim) {
      run_ok(ctx, &lists);
      expect_same(shapes[i].name, &tiles, &lists);
      n_same++;
    } else {
      assert_int_equal(run(ctx, &lists), SFA_ERROR_UNSUPPORTED);
      assert_non_null(strstr(sfa_context_error(ctx), "policy paper: it walks codes of queries and keys"));
    }
    free_call(&tiles);
    free_call(&lists);
  }
  assert_true(n_same >= 10);
  sfa_context_destroy(ctx);
}

/* One sequence of c, its last n_tokens queries over all its keys, as a call of its own. */
static call sequence_of(const call *c, int32_t b, int64_t n_tokens) {
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

/* A sequence alone, in a batch, packed with others, and its last rows asked for without the first: the same bits. */
static void company_does_not_matter(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  static const int32_t cu_q[] = {0, 3, 3, 43, 60}, cu_k[] = {0, 70, 90, 130, 130}; /* no queries; no keys */
  for (int i = 0; i < N_SHAPES; i++)
    for (int packed = 0; packed < 2; packed++) {
      sfa_attention_options o = shapes[i].o;
      o.n_sequences = 4;
      if (packed) {
        o.max_seqlen_q = 40;
        o.max_seqlen_k = 70;
      }
      call c = new_call(o, 7);
      c.a.sink_logit = shapes[i].sink ? sink_logits : NULL;
      c.a.alibi_slopes = shapes[i].alibi ? alibi_slopes : NULL;
      c.a.cu_seqlens_q = packed ? cu_q : NULL;
      c.a.cu_seqlens_k = packed ? cu_k : NULL;
      run_ok(ctx, &c);
      for (int32_t b = 0; b < 4; b++) {
        int64_t T, q0 = range(c.a.cu_seqlens_q, o.max_seqlen_q, b, &T);
        for (int64_t n = T; n > 0; n = n > 40 ? 40 : n > 1 ? 1 : 0) {
          call alone = sequence_of(&c, b, n);
          run_ok(ctx, &alone);
          expect_rows(shapes[i].name, &c, q0 + T - n, &alone);
          free_call(&alone);
        }
      }
      free_call(&c);
    }
  sfa_context_destroy(ctx);
}

/* Decode shares out spans of keys where prefill takes them one after the other: the same bits, over three spans and a window. */
static void spans(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  for (int window = 0; window < 2; window++) {
    sfa_attention_options o = {.n_heads = 2,
                               .n_kv_heads = 1,
                               .head_dim = 8,
                               .max_seqlen_q = 2600,
                               .max_seqlen_k = 9000,
                               .k_k = 4,
                               .causal = 1,
                               .has_window = window,
                               .window_size = {4500, 0},
                               .n_sink_tokens = 2};
    call c = new_call(o, 5);
    c.a.sink_logit = sink_logits;
    run_ok(ctx, &c);
    for (int64_t n = 5; n > 0; n -= 4) {
      call last = sequence_of(&c, 0, n);
      run_ok(ctx, &last);
      expect_rows("spans", &c, 2600 - n, &last);
      expect_exact("spans", &last);
      free_call(&last);
    }
    free_call(&c);
  }
  sfa_context_destroy(ctx);
}

/* Keeping all features is dense attention. */
static void all_features_are_dense(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  for (int i = 0; i < N_SHAPES; i++) {
    sfa_attention_options o = shapes[i].o;
    o.k_q = o.k_k = 0;
    call dense = new_call(o, 3);
    run_ok(ctx, &dense);
    int32_t D = o.head_dim;
    for (int which = 0; which < 3; which++) {
      o.k_q = which == 0 ? 0 : D;
      o.k_k = D;
      call c = new_call(o, 3);
      sfa_codes q_codes, k_codes;
      void *q_memory = memory(sfa_codes_bytes(c.n_q * c.o.n_heads, D, D, SFA_F32));
      void *k_memory = memory(sfa_codes_bytes(c.n_k * c.o.n_kv_heads, D, D, o.k_dtype ? o.k_dtype : SFA_F32));
      if (which == 2) { /* codes of all features are codes, not dense rows: another path */
        assert_int_equal(sfa_codes_place(ctx, c.n_q * c.o.n_heads, D, D, SFA_F32, q_memory, &q_codes), SFA_OK);
        assert_int_equal(sfa_codes_select(ctx, c.q, SFA_F32, D, &q_codes), SFA_OK);
        assert_int_equal(sfa_codes_place(ctx, c.n_k * c.o.n_kv_heads, D, D, o.k_dtype ? o.k_dtype : SFA_F32, k_memory, &k_codes), SFA_OK);
        assert_int_equal(sfa_codes_select(ctx, c.k, SFA_F32, D, &k_codes), SFA_OK);
        c.a.q_codes = &q_codes;
        c.a.k_codes = &k_codes;
      }
      run_ok(ctx, &c);
      expect_same(shapes[i].name, &dense, &c);
      free(q_memory);
      free(k_memory);
      free_call(&c);
    }
    free_call(&dense);
  }
  sfa_context_destroy(ctx);
}

/* Codes made before give what run makes itself. */
static void given_codes(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  static const sfa_dtype types[] = {SFA_F32, SFA_BF16, SFA_F16, SFA_I8};
  static const int32_t dims[] = {64, 264}; /* ids of one and of two bytes */
  for (int t = 0; t < 4; t++)
    for (int d = 0; d < 2; d++)
      for (int32_t G = 1; G <= 2; G++) {
        sfa_attention_options o = {.n_heads = 4,
                                   .n_kv_heads = G,
                                   .head_dim = dims[d],
                                   .n_sequences = 2,
                                   .max_seqlen_q = 50,
                                   .max_seqlen_k = 80,
                                   .k_q = 9,
                                   .k_k = 12,
                                   .k_dtype = types[t],
                                   .causal = 1};
        call inside = new_call(o, 11), before = new_call(o, 11);
        run_ok(ctx, &inside);
        sfa_codes q_codes, k_codes;
        int64_t n_q = before.n_q * 4, n_k = before.n_k * G;
        void *q_memory = memory(sfa_codes_bytes(n_q, dims[d], 9, SFA_F32)), *k_memory = memory(sfa_codes_bytes(n_k, dims[d], 12, types[t]));
        assert_int_equal(sfa_codes_place(ctx, n_q, dims[d], 9, SFA_F32, q_memory, &q_codes), SFA_OK);
        assert_int_equal(sfa_codes_select(ctx, before.q, SFA_F32, dims[d], &q_codes), SFA_OK);
        assert_int_equal(sfa_codes_place(ctx, n_k, dims[d], 12, types[t], k_memory, &k_codes), SFA_OK);
        assert_int_equal(sfa_codes_select(ctx, before.k, SFA_F32, dims[d], &k_codes), SFA_OK);
        before.a.q_codes = &q_codes;
        before.a.k_codes = &k_codes;
        before.a.q.data = before.a.k.data = NULL;
        run_ok(ctx, &before);
        expect_same("given codes", &inside, &before);
        ((uint8_t *)k_codes.ids)[0] = 255; /* not ascending, or no feature at all */
        assert_int_equal(run(ctx, &before), SFA_ERROR_ARGUMENT);
        free(q_memory);
        free(k_memory);
        free_call(&inside);
        free_call(&before);
      }
  sfa_context_destroy(ctx);
}

/* ---- Inputs
 * ------------------------------------------------------------------------------------------------------------------------------------ */

/* [B][T][H][D] to [B][H][T][D], bf16 where asked. */
static void *transposed(const float *x, int64_t B, int64_t T, int64_t H, int64_t D, bool bf16) {
  uint16_t *half = memory((size_t)(B * T * H * D) * 4);
  float *whole = (float *)(void *)half;
  for (int64_t b = 0; b < B; b++)
    for (int64_t t = 0; t < T; t++)
      for (int64_t h = 0; h < H; h++)
        for (int64_t u = 0; u < D; u++) {
          int64_t to = ((b * H + h) * T + t) * D + u, from = ((b * T + t) * H + h) * D + u;
          if (bf16)
            half[to] = sfa_bf16_from_f32(x[from]);
          else
            whole[to] = x[from];
        }
  return half;
}

/* Head-major arrays and bf16 arrays give what token-major f32 arrays of the same numbers give. */
static void layouts(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  static const sfa_dtype types[] = {SFA_F32, SFA_BF16, SFA_F16, SFA_I8};
  for (int sparse = 0; sparse < 2; sparse++)
    for (int t = 0; t < 4; t++)
      for (int bf16 = 0; bf16 < 2; bf16++) {
        enum { B = 2, T = 45, S = 75, H = 6, G = 2, D = 40, E = 48 };
        sfa_attention_options o = {.n_heads = H,
                                   .n_kv_heads = G,
                                   .head_dim = D,
                                   .head_dim_v = E,
                                   .n_sequences = B,
                                   .max_seqlen_q = T,
                                   .max_seqlen_k = S,
                                   .k_q = sparse ? 8 : 0,
                                   .k_k = sparse ? 8 : 0,
                                   .k_dtype = types[t],
                                   .v_dtype = types[t],
                                   .causal = 1};
        call plain = new_call(o, 21), other = new_call(o, 21);
        void *q = transposed(plain.q, B, T, H, D, bf16), *k = transposed(plain.k, B, S, G, D, bf16),
             *v = transposed(plain.v, B, S, G, E, bf16);
        sfa_dtype dtype = bf16 ? SFA_BF16 : SFA_DTYPE_DEFAULT;
        other.a.q = (sfa_rows){q, dtype, T * H * D, D, T * D};
        other.a.k = (sfa_rows){k, dtype, S * G * D, D, S * D};
        other.a.v = (sfa_rows){v, dtype, S * G * E, E, S * E};
        float *rounded[] = {plain.q, plain.k, plain.v};
        int64_t counts[] = {B * T * H * D, B * S * G * D, B * S * G * E};
        for (int x = 0; x < 3 && bf16; x++)
          for (int64_t i = 0; i < counts[x]; i++)
            rounded[x][i] = sfa_f32_from_bf16(sfa_bf16_from_f32(rounded[x][i]));
        run_ok(ctx, &plain);
        run_ok(ctx, &other);
        expect_same("layouts", &plain, &other);
        free(q);
        free(k);
        free(v);
        free_call(&plain);
        free_call(&other);
      }
  sfa_context_destroy(ctx);
}

/* inf and NaN reach the rows that see them, and no others. */
static void values_that_are_no_numbers(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  for (int where = 0; where < 3; where++) { /* in v, k, q */
    sfa_attention_options o = {.n_heads = 1, .head_dim = 16, .max_seqlen_q = 100, .max_seqlen_k = 100, .k_k = 8, .causal = 1};
    call clean = new_call(o, 31), dirty = new_call(o, 31);
    run_ok(ctx, &clean);
    float *arrays[] = {dirty.v, dirty.k, dirty.q};
    arrays[where][70 * 16 + 3] = NAN;
    run_ok(ctx, &dirty);
    for (int64_t row = 0; row < 100; row++) {
      bool reached = where < 2 ? row >= 70 : row == 70;
      if (reached)
        assert_true(isnan(dirty.out[row * 16 + 3]));
      else
        assert_memory_equal(dirty.out + row * 16, clean.out + row * 16, 16 * sizeof(float));
    }
    free_call(&clean);
    free_call(&dirty);
  }
  sfa_context_destroy(ctx);
}

/* Values that f16 or the int8 scale cannot hold are refused; inf and NaN are not. */
static void range_errors(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  static const sfa_dtype types[] = {SFA_F32, SFA_BF16, SFA_F16, SFA_I8};
  for (int t = 0; t < 4; t++)
    for (int side = 0; side < 2; side++) {
      sfa_attention_options o = {
          .n_heads = 2, .head_dim = 16, .max_seqlen_q = 4, .max_seqlen_k = 600, .k_k = 8, .k_dtype = types[t], .v_dtype = types[t]};
      call c = new_call(o, 41);
      float *x = side ? c.v : c.k;
      x[599 * 32] = 65505;
      assert_int_equal(run(ctx, &c), t < 2 ? SFA_OK : SFA_ERROR_RANGE);
      if (t >= 2)
        assert_non_null(strstr(sfa_context_error(ctx), side ? "v of sequence 0, head 0" : "k of sequence 0, head 0"));
      x[599 * 32] = INFINITY;
      assert_int_equal(run(ctx, &c), SFA_OK);
      free_call(&c);
    }
  sfa_context_destroy(ctx);
}

/* ---- Merge
 * ---------------------------------------------------------------------------------------------------------------------------------------
 */

/* Attention over the first and over the last keys, joined, is attention over all; a part without keys changes nothing. */
static void merge(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  sfa_attention_options o = {.n_heads = 2, .head_dim = 32, .max_seqlen_q = 70, .max_seqlen_k = 200, .k_q = 8, .k_k = 8};
  call whole = new_call(o, 51), a = new_call(o, 51), b = new_call(o, 51), none = new_call(o, 51);
  a.o.max_seqlen_k = 80;
  b.o.max_seqlen_k = 120;
  none.o.max_seqlen_k = 0;
  b.a.k.data = b.k + 80 * 2 * 32;
  b.a.v.data = b.v + 80 * 2 * 32;
  a.a.sink_logit = sink_logits; /* in one of the two */
  whole.a.sink_logit = sink_logits;
  run_ok(ctx, &a);
  run_ok(ctx, &b);
  run_ok(ctx, &none);
  assert_int_equal(sfa_attention_merge(ctx, 140, 32, a.out, a.lse, none.out, none.lse), SFA_OK);
  assert_int_equal(sfa_attention_merge(ctx, 140, 32, none.out, none.lse, b.out, b.lse), SFA_OK);
  assert_int_equal(sfa_attention_merge(ctx, 140, 32, a.out, a.lse, none.out, none.lse), SFA_OK);
  memcpy(whole.out, a.out, out_bytes(&whole));
  memcpy(whole.lse, a.lse, lse_bytes(&whole));
  expect_exact("merge", &whole);
  float out[8] = {0}, lse = -INFINITY; /* nothing joined with nothing */
  assert_int_equal(sfa_attention_merge(ctx, 1, 8, out, &lse, out, &lse), SFA_OK);
  assert_true(lse == -INFINITY && out[0] == 0);
  assert_int_equal(sfa_attention_merge(ctx, -1, 8, out, &lse, out, &lse), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_attention_merge(ctx, 1, 12, out, &lse, out, &lse), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_attention_merge(ctx, 1, 8, NULL, &lse, out, &lse), SFA_ERROR_ARGUMENT);
  free_call(&whole);
  free_call(&a);
  free_call(&b);
  free_call(&none);
  sfa_context_destroy(ctx);
}

/* ---- Memory and time
 * ------------------------------------------------------------------------------------------------------------------------------- */

static size_t workspace_of(sfa_context *ctx, sfa_attention_options o, int64_t n) {
  o.struct_size = sizeof o;
  o.max_seqlen_q = o.max_seqlen_k = n;
  sfa_attention_plan *plan;
  assert_int_equal(sfa_attention_plan_create(ctx, &o, &plan), SFA_OK);
  size_t bytes = sfa_attention_workspace_bytes(plan);
  sfa_attention_plan_destroy(plan);
  return bytes;
}

static void workspace_is_linear(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  for (int i = 0; i < N_SHAPES; i++)
    for (int64_t n = 1024; n <= 1 << 20; n *= 4)
      assert_true((double)workspace_of(ctx, shapes[i].o, 4 * n) <= 4.3 * (double)workspace_of(ctx, shapes[i].o, n));
  sfa_context_destroy(ctx);
}

static void *counting_alloc(void *user, size_t bytes) {
  int *left = user;
  return (*left)-- > 0 ? aligned_alloc(64, (bytes + 63) / 64 * 64) : NULL;
}
static void plain_free(void *user, void *p) {
  (void)user;
  free(p);
}

/* plan_create takes one block and says so when there is none; run takes nothing. */
static void allocations(void **state) {
  (void)state;
  int left = 1;
  sfa_allocator allocator = {counting_alloc, plain_free, &left};
  sfa_context_options options = {.struct_size = sizeof options, .allocator = &allocator, .n_threads = 2};
  sfa_context *ctx;
  assert_int_equal(sfa_context_create(&options, &ctx), SFA_OK);
  call c = new_call(shapes[3].o, 61);
  assert_int_equal(run(ctx, &c), SFA_ERROR_MEMORY);
  left = 1;
  assert_int_equal(run(ctx, &c), SFA_OK);
  free_call(&c);
  sfa_context_destroy(ctx);
}

static void stage_times(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  for (int sparse = 0; sparse < 2; sparse++) {
    sfa_attention_options o = {.n_heads = 2,
                               .head_dim = 64,
                               .max_seqlen_q = 500,
                               .max_seqlen_k = 500,
                               .k_q = sparse ? 8 : 0,
                               .k_k = sparse ? 8 : 0,
                               .v_dtype = sparse ? SFA_I8 : SFA_F32};
    call c = new_call(o, 71);
    int64_t ns[SFA_STAGE_COUNT] = {1000, 1000, 1000}; /* added to */
    c.a.stage_ns = ns;
    run_ok(ctx, &c);
    assert_true(ns[SFA_STAGE_ATTEND] > 1000);
    assert_int_equal(ns[SFA_STAGE_TOPK] > 1000, sparse);
    assert_int_equal(ns[SFA_STAGE_PACK] > 1000, sparse);
    free_call(&c);
  }
  sfa_context_destroy(ctx);
}

/* ---- Wrong arguments
 * -------------------------------------------------------------------------------------------------------------------------------- */

static const int32_t cu_late[] = {1, 5, 10}, cu_fall[] = {0, 5, 4}, cu_far[] = {0, 11, 12};

/* Each line spoils one thing of a good call. */
#define SPOIL(name, ...)                                                                                                                   \
  static void spoil_##name(call *c) { __VA_ARGS__; }
#define SPOILS(X)                                                                                                                          \
  X(options_size, c->o.struct_size--)                                                                                                      \
  X(no_heads, c->o.n_heads = 0)                                                                                                            \
  X(kv_heads, c->o.n_kv_heads = 3)                                                                                                         \
  X(kv_heads_negative, c->o.n_kv_heads = -2)                                                                                               \
  X(head_dim, c->o.head_dim = 12)                                                                                                          \
  X(head_dim_zero, c->o.head_dim = 0)                                                                                                      \
  X(head_dim_large, c->o.head_dim = 65544)                                                                                                 \
  X(head_dim_v, c->o.head_dim_v = 20)                                                                                                      \
  X(sequences, c->o.n_sequences = -1)                                                                                                      \
  X(seqlen_q, c->o.max_seqlen_q = -1)                                                                                                      \
  X(seqlen_k, c->o.max_seqlen_k = INT64_MAX)                                                                                               \
  X(k_q, c->o.k_q = 17)                                                                                                                    \
  X(k_k, c->o.k_k = -1)                                                                                                                    \
  X(k_dtype, c->o.k_dtype = (sfa_dtype)9)                                                                                                  \
  X(v_dtype, c->o.v_dtype = (sfa_dtype)-1)                                                                                                 \
  X(scale, c->o.softmax_scale = NAN)                                                                                                       \
  X(softcap, c->o.softcap = -1)                                                                                                            \
  X(causal, c->o.causal = 2)                                                                                                               \
  X(window_flag, c->o.has_window = -1)                                                                                                     \
  X(window, c->o.has_window = 1; c->o.window_size[0] = -2)                                                                                 \
  X(sink_tokens, c->o.n_sink_tokens = -1)                                                                                                  \
  X(args_size, c->a.struct_size = 8)                                                                                                       \
  X(no_q, c->a.q.data = NULL)                                                                                                              \
  X(no_k, c->a.k.data = NULL)                                                                                                              \
  X(no_v, c->a.v.data = NULL)                                                                                                              \
  X(no_out, c->a.out = NULL)                                                                                                               \
  X(odd_q, c->a.q.data = (const char *)c->q + 2)                                                                                           \
  X(odd_lse, c->a.lse = (float *)(void *)((char *)c->lse + 1))                                                                             \
  X(q_dtype, c->a.q.dtype = SFA_I8)                                                                                                        \
  X(v_stride, c->a.v.token_stride = -32)                                                                                                   \
  X(k_stride_huge, c->a.k.token_stride = INT64_MAX / 2)                                                                                    \
  X(cu_first, c->a.cu_seqlens_q = cu_late)                                                                                                 \
  X(cu_falling, c->a.cu_seqlens_q = cu_fall)                                                                                               \
  X(cu_long, c->a.cu_seqlens_k = cu_far)
SPOILS(SPOIL)

static void wrong_arguments(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
#define NAMED(name, ...) {#name, spoil_##name},
  static const struct {
    const char *name;
    void (*spoil)(call *);
  } spoils[] = {SPOILS(NAMED)};
  for (size_t i = 0; i < sizeof spoils / sizeof *spoils; i++) {
    sfa_attention_options o = {.n_heads = 2, .head_dim = 16, .n_sequences = 2, .max_seqlen_q = 10, .max_seqlen_k = 10, .k_q = 4, .k_k = 4};
    call c = new_call(o, 81);
    run_ok(ctx, &c);
    spoils[i].spoil(&c);
    if (run(ctx, &c) != SFA_ERROR_ARGUMENT || strlen(sfa_context_error(ctx)) < 10)
      fail_msg("%s was accepted, or without a text", spoils[i].name);
    free_call(&c);
  }
  sfa_attention_options o = {.struct_size = sizeof o, .n_heads = 1, .head_dim = 8, .max_seqlen_q = 1, .max_seqlen_k = 1};
  sfa_attention_plan *plan;
  assert_int_equal(sfa_attention_plan_create(NULL, &o, &plan), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_attention_plan_create(ctx, NULL, &plan), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_attention_plan_create(ctx, &o, NULL), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_attention_plan_create(ctx, &o, &plan), SFA_OK);
  float x[8] = {0};
  sfa_attention_args args = {.struct_size = sizeof args, .q.data = x, .k.data = x, .v.data = x, .out = x, .workspace = x + 1};
  assert_int_equal(sfa_attention_run(plan, &args), SFA_ERROR_ARGUMENT); /* workspace not aligned */
  assert_int_equal(sfa_attention_run(plan, NULL), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_attention_run(NULL, &args), SFA_ERROR_ARGUMENT);
  sfa_attention_plan_destroy(plan);
  sfa_attention_plan_destroy(NULL);
  sfa_context_destroy(ctx);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(definition),
      cmocka_unit_test(machine_does_not_matter),
      cmocka_unit_test(paper),
      cmocka_unit_test(company_does_not_matter),
      cmocka_unit_test(spans),
      cmocka_unit_test(all_features_are_dense),
      cmocka_unit_test(given_codes),
      cmocka_unit_test(layouts),
      cmocka_unit_test(values_that_are_no_numbers),
      cmocka_unit_test(range_errors),
      cmocka_unit_test(merge),
      cmocka_unit_test(workspace_is_linear),
      cmocka_unit_test(allocations),
      cmocka_unit_test(stage_times),
      cmocka_unit_test(wrong_arguments),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
