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

/* Of naive code that rounds the operands of its products to bf16. */
enum { LARGEST_HALF = 4, RMS_HALF = 2 };

/* ---- The definition -------------------------------------------------------------------------------------------------------- */

/* Errors of n numbers, beside those of naive code; in 16 bits also by their squares. */
static void expect_close(const char *shape, const char *what, int64_t n, const float *got, const float *naive, const double *truth,
                         bool half) {
  double scale = 0, error = 0, naive_error = 0, squares = 0, naive_squares = 0;
  for (int64_t i = 0; i < n; i++) {
    scale = fmax(scale, fabs(truth[i]));
    error = fabs(got[i] - truth[i]) <= error ? error : fabs(got[i] - truth[i]);
    naive_error = fmax(naive_error, fabs((double)naive[i] - truth[i]));
    squares += (got[i] - truth[i]) * (got[i] - truth[i]);
    naive_squares += (naive[i] - truth[i]) * (naive[i] - truth[i]);
  }
  if (half && n < 64) /* so few say little of how naive code fares: what bf16 rounds at least */
    naive_error = fmax(naive_error, 0x1p-9 * scale);
  if (!(error <= (half ? LARGEST_HALF : 2) * naive_error + 2e-6 * scale))
    fail_msg("%s: error of %s %g of %g, of naive code %g", shape, what, error, scale, naive_error);
  if (half && n >= 64 && !(squares <= RMS_HALF * RMS_HALF * naive_squares))
    fail_msg("%s: RMS error of %s %g, of naive code %g", shape, what, sqrt(squares / (double)n), sqrt(naive_squares / (double)n));
}

/* Outside of the supports of rows x [n][d] a gradient is 0. */
static void expect_support(const char *shape, int64_t n, int d, int k, const float *x, const float *got) {
  int *ids = memory((size_t)d * sizeof *ids);
  for (int64_t row = 0; row < n && k > 0 && k < d; row++) {
    oracle_topk(x + row * d, d, k, ids);
    for (int u = 0, at = 0; u < d; u++)
      if (at < k && ids[at] == u)
        at++;
      else if (!(got[row * d + u] == 0))
        fail_msg("%s: feature %d of row %lld was dropped, its gradient is %g", shape, u, (long long)row, (double)got[row * d + u]);
  }
  free(ids);
}

static void expect_gradients(const char *shape, const grad_call *g) {
  const sfa_attention_options *o = &g->c.o;
  const bool half = o->policy != SFA_POLICY_AUTO;
  int64_t H = o->n_heads, G = o->n_kv_heads, D = o->head_dim, E = o->head_dim_v;
  sfa_attention_args rows = g->c.a; /* in f32, whatever the call takes */
  rows.q.data = g->c.q, rows.k.data = g->c.k, rows.v.data = g->c.v;
  double sink[16] = {0};
  float naive_sink[16] = {0};
  for (int32_t b = 0; b < o->n_sequences; b++) {
    int64_t q0, k0;
    oracle_problem p = oracle_of(o, &rows, b, &q0, &k0);
    size_t n_q = (size_t)(p.n_queries * H * D), n_k = (size_t)(p.n_keys * G * D), n_v = (size_t)(p.n_keys * G * E);
    double sinks[16], *truth = memory((n_q + n_k + n_v) * sizeof *truth);
    float naive_sinks[16], *naive = memory((n_q + n_k + n_v) * sizeof *naive);
    oracle_grad_f64 exact = {truth, truth + n_q, truth + n_q + n_k, sinks};
    oracle_grad_f32 plain = {naive, naive + n_q, naive + n_q + n_k, naive_sinks};
    const float *d_out = g->d_out + q0 * H * E, *d_lse = g->a.d_lse ? g->a.d_lse + q0 * H : NULL;
    oracle_backward_f64(&p, d_out, d_lse, &exact);
    p.short_products = half;
    oracle_backward_f32(&p, d_out, d_lse, &plain);
    expect_close(shape, "d_q", (int64_t)n_q, g->d_q + q0 * H * D, plain.q, exact.q, half);
    expect_close(shape, "d_k", (int64_t)n_k, g->d_k + k0 * G * D, plain.k, exact.k, half);
    expect_close(shape, "d_v", (int64_t)n_v, g->d_v + k0 * G * E, plain.v, exact.v, half);
    expect_support(shape, p.n_queries * H, (int)D, p.k_q, p.q, g->d_q + q0 * H * D);
    expect_support(shape, p.n_keys * G, (int)D, p.k_k, p.k, g->d_k + k0 * G * D);
    for (int h = 0; h < H; h++) {
      sink[h] += sinks[h];
      naive_sink[h] += naive_sinks[h];
    }
    free(truth);
    free(naive);
  }
  expect_close(shape, "d_sink_logit", H, g->d_sink, naive_sink, sink, half);
}

static void new_shape(grad_call *g, int i) {
  new_grad_call(g, shapes[i].o, (uint64_t)(100 * i + 7));
  g->c.a.sink_logit = shapes[i].sink ? sink_logits : NULL;
  g->c.a.alibi_slopes = shapes[i].alibi ? alibi_slopes : NULL;
  if (i % 3 == 0)
    g->a.d_lse = NULL;
}

static void definition(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  for (int i = 0; i < N_SHAPES; i++) {
    grad_call g;
    new_shape(&g, i);
    run_grad_ok(ctx, &g);
    expect_gradients(shapes[i].name, &g);
    free_grad_call(&g);
  }
  sfa_context_destroy(ctx);
}

/* Sequences of their own lengths, some of them empty: as if each had come alone. */
static void variable_lengths(void **state) {
  (void)state;
  static const int32_t q[] = {0, 30, 30, 101, 131}, k[] = {0, 100, 130, 201, 201};
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  for (int kept = 0; kept <= 8; kept += 8) {
    grad_call g;
    sfa_attention_options o = {.n_heads = 4, .n_kv_heads = 2, .head_dim = 32, .n_sequences = 4, .max_seqlen_q = 80, .max_seqlen_k = 110};
    o.causal = 1;
    o.k_q = o.k_k = kept;
    new_grad_call(&g, o, 5);
    g.c.a.cu_seqlens_q = q;
    g.c.a.cu_seqlens_k = k;
    g.c.a.sink_logit = sink_logits;
    run_grad_ok(ctx, &g);
    expect_gradients("variable lengths", &g);
    free_grad_call(&g);
  }
  sfa_context_destroy(ctx);
}

/* The formulas themselves: the oracle's gradients are the slopes of its forward, away from where a support changes. */
static void central_differences(void **state) {
  (void)state;
  enum { T = 5, S = 7, H = 2, D = 8, E = 8, N = T * H * D + S * D + S * E + H };
  float x[N];
  const float slopes[H] = {0.1f, 0.3f};
  sfa_rng rng = {3};
  for (int i = 0; i < N; i++) { /* magnitudes of a row at least 0.1 apart: no step of h moves a support */
    float magnitude = 0.4f + 0.2f * (float)(i * 5 % 8) + 0.1f * (float)(sfa_rng_normal(&rng) > 0);
    x[i] = sfa_rng_normal(&rng) > 0 ? magnitude : -magnitude;
  }
  float *q = x, *k = q + T * H * D, *v = k + S * D, *sink = v + S * E;
  float *d_out = normals(4, T * H * E), *d_lse = normals(5, T * H);
  for (int kind = 0; kind < 4; kind++) {
    oracle_problem p = {.n_queries = T, .n_keys = S, .n_heads = H, .n_kv_heads = 1, .head_dim = D, .head_dim_v = E, .q = q, .k = k, .v = v};
    p.k_storage = p.v_storage = ORACLE_F32;
    p.k_k = kind ? 3 : 0;
    p.k_q = kind > 1 ? 5 : 0;
    p.causal = kind % 2;
    p.softcap = kind == 2 ? 1.5 : 0;
    p.softmax_scale = 0.7;
    p.alibi_slopes = kind == 3 ? slopes : NULL;
    p.sink_logit = kind ? sink : NULL;
    double grad[N];
    oracle_grad_f64 at = {grad, grad + T * H * D, grad + T * H * D + S * D, grad + T * H * D + S * D + S * E};
    oracle_backward_f64(&p, d_out, d_lse, &at);
    int ids[D];
    for (int i = 0; i < N; i++) {
      int is_q = i < T * H * D, is_k = !is_q && i < T * H * D + S * D, kept = is_q ? p.k_q : is_k ? p.k_k : 0, supported = 1;
      if (kept) { /* straight through: outside of the support the gradient is 0 by definition */
        oracle_topk(x + i / D * D, D, kept, ids);
        supported = 0;
        for (int u = 0; u < kept; u++)
          supported |= ids[u] == i % D;
      }
      float before = x[i], h = 0x1p-10f;
      double side[2];
      for (int n = 0; n < 2; n++) {
        double out[T * H * E], lse[T * H];
        x[i] = n ? before + h : before - h;
        oracle_attention_f64(&p, out, lse);
        side[n] = 0;
        for (int e = 0; e < T * H * E; e++)
          side[n] += out[e] * (double)d_out[e];
        for (int row = 0; row < T * H; row++)
          side[n] += lse[row] * (double)d_lse[row];
      }
      double width = (double)(before + h) - (double)(before - h), slope = supported ? (side[1] - side[0]) / width : 0;
      x[i] = before;
      if (!(fabs(slope - grad[i]) <= 1e-5))
        fail_msg("kind %d, entry %d: slope %g, gradient %g", kind, i, slope, grad[i]);
    }
  }
  free(d_out);
  free(d_lse);
}

static void expect_same_gradients(const char *what, const grad_call *a, const grad_call *b) {
  if (memcmp(a->d_q, b->d_q, q_floats(a) * 4) || memcmp(a->d_k, b->d_k, k_floats(a) * 4) || memcmp(a->d_v, b->d_v, v_floats(a) * 4) ||
      memcmp(a->d_sink, b->d_sink, (size_t)a->c.o.n_heads * 4))
    fail_msg("%s: other bits", what);
}

/* ---- 16 bits ------------------------------------------------------------------------------------------------------------------- */

static bool fits_half(const sfa_attention_options *o) { return o->head_dim <= 256 && o->softcap == 0; }

static void new_half_shape(grad_call *g, int i, sfa_policy policy) {
  new_shape(g, i);
  g->c.o.policy = policy;
  g->c.o.precision = SFA_PRECISION_DEFAULT;
  g->c.a.alibi_slopes = NULL;
}

/* In plain C, and on AMX where the machine has it. The forward rounds as well: its out and lse are part of the error. */
static void sixteen_bits(void **state) {
  (void)state;
  static const sfa_isa isas[] = {SFA_ISA_SCALAR, SFA_ISA_AMX};
  for (int n = 0; n < 2 && isas[n] <= sfa_isa_best(); n++)
    for (int i = 0; i < N_SHAPES; i++)
      for (int codes = 0; codes < 2; codes++) {
        const sfa_attention_options *o = &shapes[i].o;
        if (!fits_half(o) || (codes && (!o->k_k || o->k_k == o->head_dim)))
          continue;
        sfa_context *one = new_context(1, isas[n]), *three = new_context(3, isas[n]);
        grad_call g, same;
        new_half_shape(&g, i, codes ? SFA_POLICY_HALF_CODES : SFA_POLICY_HALF_DENSE);
        new_half_shape(&same, i, g.c.o.policy);
        run_grad_ok(one, &g);
        run_grad_ok(three, &same);
        expect_gradients(shapes[i].name, &g);
        expect_same_gradients(shapes[i].name, &g, &same);
        free_grad_call(&g);
        free_grad_call(&same);
        sfa_context_destroy(one);
        sfa_context_destroy(three);
      }
}

/* Sequences of their own lengths over several pieces; and a call with ALiBi, which is computed in f32. */
static void sixteen_bits_of_many(void **state) {
  (void)state;
  static const int32_t q[] = {0, 30, 30, 101, 731}, k[] = {0, 100, 130, 201, 901};
  sfa_context *ctx = new_context(2, SFA_ISA_SCALAR);
  sfa_attention_options o = {.n_heads = 2, .n_kv_heads = 1, .head_dim = 16, .n_sequences = 4, .max_seqlen_q = 700, .max_seqlen_k = 701};
  o.causal = 1;
  o.k_k = 4;
  o.policy = SFA_POLICY_HALF_CODES;
  grad_call g, f32;
  new_grad_call(&g, o, 5);
  g.c.a.cu_seqlens_q = q;
  g.c.a.cu_seqlens_k = k;
  g.c.a.sink_logit = sink_logits;
  run_grad_ok(ctx, &g);
  expect_gradients("variable lengths", &g);
  g.c.a.alibi_slopes = alibi_slopes;
  new_grad_call(&f32, o, 5);
  f32.c.a.cu_seqlens_q = q;
  f32.c.a.cu_seqlens_k = k;
  f32.c.a.sink_logit = sink_logits;
  f32.c.a.alibi_slopes = alibi_slopes;
  f32.c.o.policy = SFA_POLICY_TILES;
  run_grad_ok(ctx, &g);
  run_grad_ok(ctx, &f32);
  const int64_t n_q = 731 * 2 * 16, n_k = 901 * 16;
  assert_memory_equal(g.d_q, f32.d_q, (size_t)n_q * 4);
  assert_memory_equal(g.d_k, f32.d_k, (size_t)n_k * 4);
  assert_memory_equal(g.d_v, f32.d_v, (size_t)n_k * 4);
  free_grad_call(&g);
  free_grad_call(&f32);
  sfa_context_destroy(ctx);
}

/* ---- Bits ---------------------------------------------------------------------------------------------------------------------- */

static void machine_does_not_matter(void **state) {
  (void)state;
  for (int i = 0; i <= N_SHAPES; i++) {
    grad_call plain;
    const char *name = i < N_SHAPES ? shapes[i].name : "many pieces";
    for (sfa_isa isa = SFA_ISA_SCALAR; isa <= sfa_isa_best(); isa++) {
      grad_call g;
      sfa_context *ctx = new_context(isa == SFA_ISA_SCALAR ? 1 : 1 + (int)isa % 3, isa);
      if (i < N_SHAPES)
        new_shape(&g, i);
      else /* several pieces to a round */
        new_grad_call(
            &g, (sfa_attention_options){.n_heads = 1, .head_dim = 8, .max_seqlen_q = 1500, .max_seqlen_k = 1600, .k_k = 3, .causal = 1}, 1);
      run_grad_ok(ctx, &g);
      sfa_context_destroy(ctx);
      if (isa == SFA_ISA_SCALAR) {
        plain = g;
        continue;
      }
      expect_same_gradients(name, &plain, &g);
      free_grad_call(&g);
    }
    if (i == N_SHAPES)
      expect_gradients(name, &plain);
    free_grad_call(&plain);
  }
}

/* Codes made before give what the backward makes itself. Codes of all features give it up to rounding: dK has another order. */
static void given_codes(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  static const sfa_dtype types[] = {SFA_F32, SFA_BF16, SFA_F16, SFA_I8};
  static const int32_t dims[] = {64, 264}; /* ids of one and of two bytes */
  for (int t = 0; t < 4; t++)
    for (int d = 0; d < 2; d++)
      for (int all = 0; all < 2; all++) {
        int32_t D = dims[d], k_q = all ? D : 9, k_k = all ? D : 12;
        sfa_attention_options o = {.n_heads = 4, .n_kv_heads = 2, .head_dim = D, .n_sequences = 2, .max_seqlen_q = 50, .max_seqlen_k = 80};
        o.k_q = k_q;
        o.k_k = k_k;
        o.k_dtype = types[t];
        o.causal = 1;
        grad_call inside, before;
        new_grad_call(&inside, o, 11);
        new_grad_call(&before, o, 11);
        run_grad_ok(ctx, &inside);
        sfa_codes q_codes, k_codes;
        void *q_memory = memory(sfa_codes_bytes(400, D, k_q, SFA_F32)), *k_memory = memory(sfa_codes_bytes(320, D, k_k, types[t]));
        assert_int_equal(sfa_codes_place(ctx, 400, D, k_q, SFA_F32, q_memory, &q_codes), SFA_OK);
        assert_int_equal(sfa_codes_select(ctx, before.c.q, SFA_F32, D, &q_codes), SFA_OK);
        assert_int_equal(sfa_codes_place(ctx, 320, D, k_k, types[t], k_memory, &k_codes), SFA_OK);
        assert_int_equal(sfa_codes_select(ctx, before.c.k, SFA_F32, D, &k_codes), SFA_OK);
        before.c.a.q_codes = &q_codes;
        before.c.a.k_codes = &k_codes;
        run_grad_ok(ctx, &before);
        if (all)
          expect_gradients("codes of all features", &before);
        else
          expect_same_gradients("given codes", &inside, &before);
        free(q_memory);
        free(k_memory);
        free_grad_call(&inside);
        free_grad_call(&before);
      }
  sfa_context_destroy(ctx);
}

/* Values alone: what rows have at the supports, in the order of ids, whether rows are wanted too or not; of codes and of rows. */
static void compact_gradients(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  static const sfa_dtype types[] = {SFA_F32, SFA_I8};
  static const int32_t dims[] = {64, 264}, kept[] = {9, 0}; /* 0: all of them */
  for (int n = 0; n < 8; n++) {
    int32_t D = dims[n & 1], k = kept[n >> 1 & 1] ? kept[n >> 1 & 1] : D, ids[264];
    sfa_attention_options o = {.n_heads = 4, .n_kv_heads = 2, .head_dim = D, .n_sequences = 2, .max_seqlen_q = 50, .max_seqlen_k = 80};
    o.k_q = o.k_k = k;
    o.k_dtype = types[n >> 2];
    o.causal = 1;
    grad_call rows, both, alone;
    grad_call *calls[] = {&rows, &both, &alone};
    float *values[3][2] = {{0}};
    for (int i = 0; i < 3; i++) {
      new_grad_call(calls[i], o, 41);
      for (int side = 0; i && side < 2; side++)
        values[i][side] = memory((size_t)((side ? 320 : 400) * k) * sizeof(float));
      calls[i]->a.d_q_values = values[i][0];
      calls[i]->a.d_k_values = values[i][1];
    }
    alone.a.d_q = alone.a.d_k = NULL;
    for (int i = 0; i < 3; i++)
      run_grad_ok(ctx, calls[i]);
    expect_same_gradients("rows beside values", &rows, &both);
    for (int side = 0; side < 2; side++)
      for (int row = 0; row < (side ? 320 : 400); row++) {
        oracle_topk((side ? rows.c.k : rows.c.q) + row * D, D, k, ids);
        for (int u = 0; u < k; u++) {
          float want = (side ? rows.d_k : rows.d_q)[row * D + ids[u]];
          assert_memory_equal(&values[1][side][row * k + u], &want, sizeof want);
          assert_memory_equal(&values[2][side][row * k + u], &want, sizeof want);
        }
      }
    for (int i = 0; i < 3; i++)
      free(values[i][0]), free(values[i][1]), free_grad_call(calls[i]);
  }
  sfa_context_destroy(ctx);
}

/* ---- Ropes, types, strides ----------------------------------------------------------------------------------------------------- */

/* Rows turned before, and the gradient turned back by hand, against rows turned as they are read. */
static void ropes(void **state) {
  (void)state;
  enum { N = 90, H = 4, G = 2, D = 64, PAIRS = 24 };
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  float *angles = normals(9, N * PAIRS), *cosines = memory(N * PAIRS * 4), *sines = memory(N * PAIRS * 4);
  for (int i = 0; i < N * PAIRS; i++) {
    cosines[i] = cosf(angles[i]);
    sines[i] = sinf(angles[i]);
  }
  for (int interleaved = 0; interleaved < 2; interleaved++) {
    sfa_rope rope = {cosines, sines, 2 * PAIRS, interleaved};
    sfa_attention_options o = {.n_heads = H, .n_kv_heads = G, .head_dim = D, .max_seqlen_q = N, .max_seqlen_k = N, .k_q = 10, .k_k = 8};
    o.causal = 1;
    grad_call inside, before;
    new_grad_call(&inside, o, 21);
    new_grad_call(&before, o, 21);
    int apart = interleaved ? 1 : PAIRS, step = interleaved ? 2 : 1;
    for (int side = 0; side < 2; side++)
      for (int row = 0; row < N * (side ? G : H); row++)
        for (int p = 0; p < PAIRS; p++) {
          float *x = (side ? before.c.k : before.c.q) + row * D + p * step, a = x[0], b = x[apart];
          float c = cosines[row / (side ? G : H) * PAIRS + p], s = sines[row / (side ? G : H) * PAIRS + p];
          x[0] = a * c - b * s;
          x[apart] = b * c + a * s;
        }
    inside.c.a.q.rope = inside.c.a.k.rope = &rope;
    run_grad_ok(ctx, &inside);
    run_grad_ok(ctx, &before);
    for (int side = 0; side < 2; side++)
      for (int row = 0; row < N * (side ? G : H); row++)
        for (int p = 0; p < PAIRS; p++) {
          float *x = (side ? before.d_k : before.d_q) + row * D + p * step, a = x[0], b = x[apart];
          float c = cosines[row / (side ? G : H) * PAIRS + p], s = sines[row / (side ? G : H) * PAIRS + p];
          x[0] = a * c + b * s;
          x[apart] = b * c - a * s;
        }
    for (size_t i = 0; i < q_floats(&inside); i++)
      assert_true(fabsf(inside.d_q[i] - before.d_q[i]) <= 1e-6f);
    for (size_t i = 0; i < k_floats(&inside); i++)
      assert_true(fabsf(inside.d_k[i] - before.d_k[i]) <= 1e-6f);
    free_grad_call(&inside);
    free_grad_call(&before);
  }
  free(angles);
  free(cosines);
  free(sines);
  sfa_context_destroy(ctx);
}

/* bf16 rows give the bits of the same numbers in f32; gradients go where the strides say, and nowhere else. */
static void types_and_strides(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_attention_options o = {.n_heads = 4, .n_kv_heads = 2, .head_dim = 16, .head_dim_v = 24, .max_seqlen_q = 70, .max_seqlen_k = 90};
  o.k_k = 4;
  grad_call plain, other;
  new_grad_call(&plain, o, 31);
  new_grad_call(&other, o, 31);
  float *rows[] = {plain.c.q, plain.c.k, plain.c.v};
  size_t sizes[] = {q_floats(&plain), k_floats(&plain), v_floats(&plain)};
  uint16_t *half[3];
  for (int n = 0; n < 3; n++) {
    half[n] = memory(sizes[n] * 2);
    for (size_t i = 0; i < sizes[n]; i++) {
      half[n][i] = sfa_bf16_from_f32(rows[n][i]);
      rows[n][i] = sfa_f32_from_bf16(half[n][i]);
    }
  }
  other.c.a.q = (sfa_rows){.data = half[0], .dtype = SFA_BF16};
  other.c.a.k = (sfa_rows){.data = half[1], .dtype = SFA_BF16};
  other.c.a.v = (sfa_rows){.data = half[2], .dtype = SFA_BF16};
  int64_t strides[] = {4 * 16 + 5, 2 * 16 + 3, 2 * 24 + 1}, widths[] = {4 * 16, 2 * 16, 2 * 24}, tokens[] = {70, 90, 90};
  float *apart[3], *dense[] = {plain.d_q, plain.d_k, plain.d_v};
  for (int n = 0; n < 3; n++)
    apart[n] = memory((size_t)(tokens[n] * strides[n]) * 4);
  other.a.d_q = apart[0];
  other.a.d_k = apart[1];
  other.a.d_v = apart[2];
  other.a.d_q_token_stride = strides[0];
  other.a.d_k_token_stride = strides[1];
  other.a.d_v_token_stride = strides[2];
  run_grad_ok(ctx, &plain);
  run_grad_ok(ctx, &other);
  for (int n = 0; n < 3; n++) {
    for (int64_t t = 0; t < tokens[n]; t++) {
      assert_memory_equal(apart[n] + t * strides[n], dense[n] + t * widths[n], (size_t)widths[n] * 4);
      for (int64_t i = widths[n]; i < strides[n]; i++)
        assert_true(isnan(apart[n][t * strides[n] + i]));
    }
    free(apart[n]);
    free(half[n]);
  }
  free_grad_call(&plain);
  free_grad_call(&other);
  sfa_context_destroy(ctx);
}

/* ---- Arguments ----------------------------------------------------------------------------------------------------------------- */

static void arguments(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_attention_options o = {.n_heads = 2, .head_dim = 16, .max_seqlen_q = 90, .max_seqlen_k = 1100, .k_k = 4};
  grad_call g;
  sfa_attention_plan *plan;
  new_grad_call(&g, o, 1);
  run_grad_ok(ctx, &g);
  assert_int_equal(sfa_attention_plan_create(ctx, &g.c.o, &plan), SFA_OK);
  void *workspace = memory(sfa_attention_backward_workspace_bytes(plan));
  g.a.workspace = workspace;
  int64_t stages[SFA_STAGE_COUNT] = {0};
  g.a.stage_ns = stages;
  assert_int_equal(sfa_attention_backward(plan, &g.a), SFA_OK);
  assert_true(stages[SFA_STAGE_TOPK] > 0 && stages[SFA_STAGE_ATTEND] > 0);
  for (int wrong = 0; wrong < 15; wrong++) {
    sfa_attention_grad_args a = g.a;
    sfa_attention_args forward = g.c.a;
    a.forward = &forward;
    switch (wrong) {
    case 0: a.struct_size--; break;
    case 1: a.forward = NULL; break;
    case 2: a.d_out = NULL; break;
    case 3: a.d_q = NULL; break;
    case 4: a.d_k = (float *)(void *)((char *)g.d_k + 1); break;
    case 5: a.d_v = NULL; break;
    case 6: a.workspace = NULL; break;
    case 7: a.d_q_token_stride = 31; break;
    case 8: a.d_v_token_stride = INT64_MAX / 4; break;
    case 9: forward.lse = NULL; break;
    case 10: forward.out = NULL; break;
    case 11: a.d_q_values = g.d_q; break; /* of dense queries */
    case 12: a.d_k_values = (float *)(void *)((char *)g.d_k + 1); break;
    case 13: a.d_q = NULL, a.d_k_values = g.d_k; break;
    default: forward.v.data = NULL;
    }
    assert_int_equal(sfa_attention_backward(plan, &a), SFA_ERROR_ARGUMENT);
    assert_true(strlen(sfa_context_error(ctx)) > 10);
  }
  assert_int_equal(sfa_attention_backward(NULL, &g.a), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_attention_backward(plan, NULL), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_attention_backward_workspace_bytes(NULL), 0);
  sfa_attention_plan_destroy(plan);
  free(workspace);
  free_grad_call(&g);
  sfa_context_destroy(ctx);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(definition),          cmocka_unit_test(variable_lengths),
      cmocka_unit_test(central_differences), cmocka_unit_test(machine_does_not_matter),
      cmocka_unit_test(given_codes),         cmocka_unit_test(ropes),
      cmocka_unit_test(types_and_strides),   cmocka_unit_test(arguments),
      cmocka_unit_test(sixteen_bits),        cmocka_unit_test(sixteen_bits_of_many),
      cmocka_unit_test(compact_gradients),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
