/* Few query rows: the policy KEYS has the bits of TILES in every combination; eps > 0 keeps what it promises. */
#include "attention_call.h"

/* ---- The same bits as tiles ------------------------------------------------------------------------------------------------- */

static const sfa_dtype key_types[] = {SFA_F32, SFA_BF16, SFA_F16, SFA_I8},
                       value_types[] = {SFA_F32, SFA_BF16, SFA_F16, SFA_I8, SFA_I4, SFA_E4M3};

/* Tokens and heads of a group: their product is at most SFA_KEYS_ROWS. */
static const int32_t rows[][2] = {{1, 1}, {1, 4}, {3, 1}, {5, 3}, {2, 8}};
enum { N_ROWS = sizeof rows / sizeof *rows };

static const struct {
  const char *name;
  sfa_attention_options o;
  bool sink, alibi;
} masks[] = {
    {"full", {.causal = 0}, 0, 0},
    {"causal, softcap, ALiBi, sink", {.causal = 1, .softcap = 4, .softmax_scale = 0.3f}, 1, 1},
    {"window, sink tokens", {.causal = 1, .has_window = 1, .window_size = {70, 0}, .n_sink_tokens = 3}, 1, 0},
};

static sfa_attention_options options_of(int mask, const int32_t row[2], int32_t D, int32_t k_q, int32_t k_k, int64_t n_keys) {
  sfa_attention_options o = masks[mask].o;
  o.n_kv_heads = 2;
  o.n_heads = 2 * row[1];
  o.max_seqlen_q = row[0];
  o.max_seqlen_k = n_keys;
  o.head_dim = D;
  o.head_dim_v = 24;
  o.k_q = k_q;
  o.k_k = k_k;
  return o;
}

static const float many_sinks[] = {0.5f, -1, 3, 0, 2, 1, -2, 0.5f, 1, 1, 0, -1, 2, 3, -3, 0.25f};
static const float many_slopes[] = {0.5f, 0.25f, 0.0625f, 0.01f, 0, 0.1f, 0.3f, 1, 0.5f, 0.25f, 0.0625f, 0.01f, 0, 0.1f, 0.3f, 1};

static call masked_call(sfa_attention_options o, int mask, uint64_t seed) {
  call c = new_call(o, seed);
  c.a.sink_logit = masks[mask].sink ? many_sinks : NULL;
  c.a.alibi_slopes = masks[mask].alibi ? many_slopes : NULL;
  return c;
}

/* Every type of keys and values, dense and coded with ids of one and of two bytes, with more slots than are summed exactly. */
static void keys_are_tiles(void **state) {
  (void)state;
  static const int32_t widths[][3] = {{40, 0, 0}, {64, 8, 8}, {64, 0, 40}, {264, 12, 16}, {512, 16, 70}}; /* D, k_q, k_k */
  for (int isa = SFA_ISA_SCALAR; isa <= (int)sfa_isa_best(); isa++) {
    sfa_context *ctx = new_context(2, (sfa_isa)isa);
    int n = 0;
    for (int w = 0; w < 5; w++)
      for (int kt = 0; kt < 4; kt++)
        for (int vt = 0; vt < 6; vt++, n++) { /* rows and masks take turns */
          int mask = n % 3;
          sfa_attention_options o = options_of(mask, rows[n % N_ROWS], widths[w][0], widths[w][1], widths[w][2], 64 + n % 130);
          o.k_dtype = key_types[kt];
          o.v_dtype = value_types[vt];
          call tiles = masked_call(o, mask, (uint64_t)n + 1), keys = masked_call(o, mask, (uint64_t)n + 1);
          tiles.o.policy = SFA_POLICY_TILES;
          keys.o.policy = SFA_POLICY_KEYS;
          run_ok(ctx, &tiles);
          run_ok(ctx, &keys);
          char name[200];
          snprintf(name, sizeof name, "%s, D %d k %d %d, types %d %d, rows %d x %d, keys %d, %s", sfa_isa_name((sfa_isa)isa), widths[w][0],
                   widths[w][1], widths[w][2], key_types[kt], value_types[vt], rows[n % N_ROWS][0], rows[n % N_ROWS][1], 64 + n % 130,
                   masks[mask].name);
          expect_same(name, &tiles, &keys);
          free_call(&tiles);
          free_call(&keys);
        }
    sfa_context_destroy(ctx);
  }
}

/* Over several spans, in a batch of very different lengths, on one and on three threads. */
static void lengths_differ(void **state) {
  (void)state;
  static const int32_t cu_q[] = {0, 2, 2, 3, 5, 6}, cu_k[] = {0, 9000, 9100, 9101, 13400, 13400}; /* no queries; one key; no keys */
  for (int mask = 0; mask < 3; mask++)
    for (int eps = 0; eps < 2; eps++) {
      sfa_attention_options o = options_of(mask, (const int32_t[]){2, 4}, 16, 0, 4, 9000);
      o.n_sequences = 5;
      o.k_dtype = SFA_I8;
      o.v_dtype = SFA_I8;
      o.eps = eps ? 1e-2f : 0;
      call one = masked_call(o, mask, 3), many = masked_call(o, mask, 3);
      sfa_context *few = new_context(1, SFA_ISA_DEFAULT), *more = new_context(3, SFA_ISA_SCALAR);
      one.a.cu_seqlens_q = many.a.cu_seqlens_q = cu_q;
      one.a.cu_seqlens_k = many.a.cu_seqlens_k = cu_k;
      one.o.policy = many.o.policy = SFA_POLICY_KEYS;
      memset(one.out, 0, out_bytes(&one)); /* rows that no sequence has are not written */
      memset(one.lse, 0, lse_bytes(&one));
      memset(many.out, 0, out_bytes(&many));
      memset(many.lse, 0, lse_bytes(&many));
      run_ok(few, &one);
      run_ok(more, &many);
      expect_same("threads and instruction sets", &one, &many);
      for (int32_t b = 0; b < 5 && !eps; b++) {
        int64_t n = cu_q[b + 1] - cu_q[b];
        call alone = sequence_of(&one, b, n);
        alone.o.policy = SFA_POLICY_TILES;
        run_ok(few, &alone);
        expect_rows("a batch of lengths", &one, cu_q[b], &alone);
        free_call(&alone);
      }
      free_call(&one);
      free_call(&many);
      sfa_context_destroy(few);
      sfa_context_destroy(more);
    }
}

static void too_many_rows(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  call c = new_call((sfa_attention_options){.n_heads = 1, .head_dim = 8, .max_seqlen_q = 17, .max_seqlen_k = 20}, 1);
  c.o.policy = SFA_POLICY_KEYS;
  assert_int_equal(run(ctx, &c), SFA_ERROR_UNSUPPORTED);
  assert_non_null(strstr(sfa_context_error(ctx), "17 query rows"));
  free_call(&c);
  sfa_context_destroy(ctx);
}

/* ---- Leaving values out ------------------------------------------------------------------------------------------------------ */

/* Rows of q times `sharpness`, so that few keys hold most of the mass. */
static call sharp_call(sfa_attention_options o, int mask, float sharpness) {
  call c = masked_call(o, mask, 9);
  for (int64_t i = 0; i < c.n_q * c.o.n_heads * c.o.head_dim; i++)
    c.q[i] *= sharpness;
  return c;
}

/* What eps promises, against the exact step; returns the largest rho. */
static double expect_certificate(const char *what, sfa_context *ctx, call *exact, call *eps) {
  int64_t n_rows = exact->n_q * exact->o.n_heads;
  int32_t E = exact->o.head_dim_v;
  double most = 0, largest_v = 0;
  float *dropped = memory((size_t)n_rows * sizeof *dropped);
  eps->a.dropped = dropped;
  exact->o.eps = 0;
  run_ok(ctx, exact);
  run_ok(ctx, eps);
  for (int64_t i = 0; i < exact->n_k * exact->o.n_kv_heads * E; i++)
    largest_v = fmax(largest_v, fabs((double)exact->v[i]));
  if (memcmp(exact->lse, eps->lse, lse_bytes(exact)))
    fail_msg("%s: another lse", what);
  for (int64_t row = 0; row < n_rows; row++) {
    double rho = (double)dropped[row];
    if (!(rho >= 0 && rho <= (double)eps->o.eps))
      fail_msg("%s: row %lld drops %g of %g", what, (long long)row, rho, (double)eps->o.eps);
    for (int32_t e = 0; e < E; e++) {
      double error = fabs((double)exact->out[row * E + e] - (double)eps->out[row * E + e]);
      if (rho == 0 ? error != 0 : !(error <= 2.02 * rho * largest_v + 4e-6)) /* int8 and int4 values may be 1 % above those that came */
        fail_msg("%s: row %lld errs by %g with %g dropped", what, (long long)row, error, rho);
    }
    most = fmax(most, rho);
  }
  free(dropped);
  eps->a.dropped = NULL;
  return most;
}

static void certificate(void **state) {
  (void)state;
  static const float budgets[] = {1e-4f, 1e-2f, 0.5f}, sharpnesses[] = {0.1f, 8, 30};
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  for (int mask = 0; mask < 3; mask++)
    for (int r = 0; r < N_ROWS; r++)
      for (int b = 0; b < 3; b++)
        for (int s = 0; s < 3; s++) {
          sfa_attention_options o = options_of(mask, rows[r], 32, 0, 8, mask == 1 && r < 2 ? 4200 : 700);
          o.k_dtype = r % 2 ? SFA_I8 : SFA_F32;
          o.v_dtype = value_types[(r + b) % 6];
          o.policy = SFA_POLICY_KEYS;
          call exact = sharp_call(o, mask, sharpnesses[s]);
          o.eps = budgets[b];
          call eps = sharp_call(o, mask, sharpnesses[s]);
          char name[100];
          snprintf(name, sizeof name, "%s, %d x %d rows, eps %g, sharpness %g", masks[mask].name, rows[r][0], rows[r][1],
                   (double)budgets[b], (double)sharpnesses[s]);
          double most = expect_certificate(name, ctx, &exact, &eps);
          if (mask == 0 && b == 1 && s == 1 && rows[r][0] * rows[r][1] == 1) /* the budget is used */
            assert_true(most > 0.2 * (double)budgets[b]);
          free_call(&exact);
          free_call(&eps);
        }
  sfa_context_destroy(ctx);
}

/* One key holds the mass: the values of the others are not read, whatever is in them. */
static void needle(void **state) {
  (void)state;
  enum { S = 9000, D = 16, NEEDLE = S - 3 };
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  sfa_attention_options o = {.n_heads = 1, .head_dim = D, .max_seqlen_q = 1, .max_seqlen_k = S, .k_k = 4, .eps = 1e-3f};
  call c = new_call(o, 5);
  float dropped;
  for (int64_t i = 0; i < S * D; i++)
    c.v[i] = NAN;
  for (int u = 0; u < D; u++) {
    c.k[NEEDLE * D + u] = c.q[u] = u < 4 ? 5 : 0.01f;
    c.v[NEEDLE * D + u] = (float)u;
  }
  c.a.dropped = &dropped;
  run_ok(ctx, &c);
  for (int u = 0; u < D; u++)
    assert_true(fabsf(c.out[u] - (float)u) <= 4e-6f * (float)u);
  assert_true(dropped > 0 && dropped < 1e-3f);
  c.o.eps = 0; /* the exact step reads them all */
  run_ok(ctx, &c);
  assert_true(isnan(c.out[0]) && dropped == 0);
  free_call(&c);
  sfa_context_destroy(ctx);
}

/* A row whose scores are no numbers keeps every key; its neighbours of the group have their certificate. */
static void no_numbers(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_attention_options o = {.n_heads = 2, .n_kv_heads = 1, .head_dim = 16, .max_seqlen_q = 1, .max_seqlen_k = 900, .eps = 0.1f};
  call c = new_call(o, 6), exact = new_call(o, 6);
  float dropped[2];
  c.q[3] = exact.q[3] = NAN;
  c.a.dropped = dropped;
  exact.o.eps = 0;
  run_ok(ctx, &c);
  run_ok(ctx, &exact);
  assert_true(isnan(c.out[0]) && isnan(c.lse[0]) && dropped[0] == 0 && dropped[1] == 0);
  assert_memory_equal(c.out + 16, exact.out + 16, 16 * sizeof(float));
  free_call(&c);
  free_call(&exact);
  sfa_context_destroy(ctx);
}

/* A sink that holds all the mass lets every value go. */
static void heavy_sink(void **state) {
  (void)state;
  static const float sink = 1000;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  call c = new_call((sfa_attention_options){.n_heads = 1, .head_dim = 16, .max_seqlen_q = 1, .max_seqlen_k = 900, .eps = 1e-3f}, 7);
  float dropped;
  c.a.sink_logit = &sink;
  c.a.dropped = &dropped;
  run_ok(ctx, &c);
  assert_true(c.out[0] == 0 && c.lse[0] == 1000 && dropped <= 1e-3f);
  free_call(&c);
  sfa_context_destroy(ctx);
}

/* Other policies are exact, and say so. */
static void others_are_exact(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  call c = new_call((sfa_attention_options){.n_heads = 1, .head_dim = 16, .max_seqlen_q = 40, .max_seqlen_k = 90, .eps = 0.5f}, 8);
  float dropped[40];
  c.a.dropped = dropped;
  for (int t = 0; t < 40; t++)
    dropped[t] = NAN;
  run_ok(ctx, &c);
  for (int t = 0; t < 40; t++)
    assert_true(dropped[t] == 0);
  c.o.eps = 0;
  expect_exact("eps without effect", &c);
  free_call(&c);
  sfa_context_destroy(ctx);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(keys_are_tiles), cmocka_unit_test(lengths_differ),   cmocka_unit_test(too_many_rows),
      cmocka_unit_test(certificate),    cmocka_unit_test(needle),           cmocka_unit_test(no_numbers),
      cmocka_unit_test(heavy_sink),     cmocka_unit_test(others_are_exact),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
