/* Attention through the public API: forms of inputs, memory, time, and what is refused. */
#include "attention_call.h"

/* ---- Inputs ---------------------------------------------------------------------------------------------------------------- */

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
        other.a.q = (sfa_rows){.data = q, .dtype = dtype, .batch_stride = T * H * D, .token_stride = D, .head_stride = T * D};
        other.a.k = (sfa_rows){.data = k, .dtype = dtype, .batch_stride = S * G * D, .token_stride = D, .head_stride = S * D};
        other.a.v = (sfa_rows){.data = v, .dtype = dtype, .batch_stride = S * G * E, .token_stride = E, .head_stride = S * E};
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

/* ---- Memory and time ------------------------------------------------------------------------------------------------------- */

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

/* plan_create takes one block and says so when there is none; run takes nothing. */
static void allocations(void **state) {
  (void)state;
  memory_account account = {.refuse = 2}; /* 1 is the context */
  sfa_context *ctx = new_counted_context(2, &account);
  call c = new_call(shapes[3].o, 61);
  assert_int_equal(run(ctx, &c), SFA_ERROR_MEMORY);
  account = (memory_account){.out = 1, .refuse = 2};
  assert_int_equal(run(ctx, &c), SFA_OK);
  free_call(&c);
  sfa_context_destroy(ctx);
  assert_int_equal(account.out, 0);
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

/* ---- Wrong arguments ------------------------------------------------------------------------------------------------------- */

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
  X(scale_huge, c->o.softmax_scale = 3e38f)                                                                                                \
  X(softcap_tiny, c->o.softcap = 1e-45f)                                                                                                   \
  X(odd_sink, c->a.sink_logit = (const float *)(const void *)((const char *)c->q + 1))                                                     \
  X(odd_slopes, c->a.alibi_slopes = (const float *)(const void *)((const char *)c->q + 2))                                                 \
  X(odd_cu, c->a.cu_seqlens_k = (const int32_t *)(const void *)((const char *)c->q + 3))                                                   \
  X(softcap, c->o.softcap = -1)                                                                                                            \
  X(causal, c->o.causal = 2)                                                                                                               \
  X(window_flag, c->o.has_window = -1)                                                                                                     \
  X(window, c->o.has_window = 1; c->o.window_size[0] = -2)                                                                                 \
  X(sink_tokens, c->o.n_sink_tokens = -1)                                                                                                  \
  X(eps, c->o.eps = 0.6f)                                                                                                                  \
  X(eps_negative, c->o.eps = -1e-3f)                                                                                                       \
  X(eps_nan, c->o.eps = NAN)                                                                                                               \
  X(odd_dropped, c->a.dropped = (float *)(void *)((char *)c->lse + 2))                                                                     \
  X(k_int4, c->o.k_dtype = SFA_I4)                                                                                                         \
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
  sfa_attention_plan_destroy(plan);
  for (int keys = 0; keys < 2; keys++) { /* counts that no integer holds, without a key or without a query to give them away */
    sfa_attention_options absurd = {.struct_size = sizeof absurd,
                                    .n_heads = 65536,
                                    .head_dim = 65536,
                                    .n_sequences = INT32_MAX,
                                    .max_seqlen_q = keys ? 0 : 1 << 30,
                                    .max_seqlen_k = keys ? 1 << 30 : 0};
    assert_int_equal(sfa_attention_plan_create(ctx, &absurd, &plan), SFA_ERROR_ARGUMENT);
    assert_non_null(strstr(sfa_context_error(ctx), "do not fit an address"));
  }
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
      cmocka_unit_test(layouts),         cmocka_unit_test(values_that_are_no_numbers),
      cmocka_unit_test(range_errors),    cmocka_unit_test(workspace_is_linear),
      cmocka_unit_test(allocations),     cmocka_unit_test(stage_times),
      cmocka_unit_test(wrong_arguments),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
