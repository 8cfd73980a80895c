/* A norm and rotary positions given with the rows: the bits of doing it first, wherever rows are read. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <sfa/backward.h>
#include <sfa/cache.h>

#include "base/half.h"
#include "base/rng.h"

enum { H = 4, G = 2, D = 64, LEN = 150, ROTATED = 48, PAIRS = ROTATED / 2 };

typedef struct fixture {
  sfa_context *ctx;
  float *q, *k, *v;           /* [LEN][H or G][D] */
  float *turned_q, *turned_k; /* normed and rotated by the test */
  float cos[LEN * PAIRS], sin[LEN * PAIRS], weight[D];
  sfa_rope rope;
  const sfa_row_norm *norm; /* NULL: none */
  sfa_row_norm of_rows;
} fixture;

static float *normals(uint64_t seed, int64_t n) {
  sfa_rng rng = {seed};
  float *x = malloc((size_t)n * sizeof *x);
  assert_non_null(x);
  for (int64_t i = 0; i < n; i++)
    x[i] = sfa_f32_from_bf16(sfa_bf16_from_f32((float)sfa_rng_normal(&rng))); /* so that the same rows can be given as bf16 */
  return x;
}

/* As src/kernel/kernel.h has norm_rows. */
static void norm(const sfa_row_norm *norm, float *row) {
  float chains[16] = {0};
  for (int u = 0; u < D; u++)
    chains[u % 16] = fmaf(row[u], row[u], chains[u % 16]);
  for (int apart = 8; apart > 0; apart /= 2)
    for (int c = 0; c < apart; c++)
      chains[c] += chains[c + apart];
  const float factor = 1.0f / sqrtf(chains[0] / D + norm->eps);
  for (int u = 0; u < D; u++)
    row[u] = row[u] * factor * norm->weight[u];
}

static float *turn(const fixture *f, const float *x, int n_heads) {
  const int step = f->rope.interleaved ? 2 : 1, apart = f->rope.interleaved ? 1 : PAIRS;
  float *out = malloc((size_t)LEN * (size_t)n_heads * D * sizeof *out);
  assert_non_null(out);
  memcpy(out, x, (size_t)LEN * (size_t)n_heads * D * sizeof *out);
  for (int row = 0; f->norm && row < LEN * n_heads; row++)
    norm(f->norm, out + row * D);
  for (int t = 0; t < LEN; t++)
    for (int h = 0; h < n_heads; h++)
      for (int p = 0; p < PAIRS; p++) {
        float *a = out + (t * n_heads + h) * D + p * step, *b = a + apart, c = f->cos[t * PAIRS + p], s = f->sin[t * PAIRS + p];
        const float ac = *a * c, bs = *b * s, bc = *b * c, as = *a * s;
        *a = ac - bs;
        *b = bc + as;
      }
  return out;
}

static fixture *make(int interleaved, int normed) {
  fixture *f = calloc(1, sizeof *f);
  assert_non_null(f);
  const sfa_context_options options = {.struct_size = sizeof options, .n_threads = 2};
  assert_int_equal(sfa_context_create(&options, &f->ctx), SFA_OK);
  f->q = normals(1, LEN * H * D);
  f->k = normals(2, LEN * G * D);
  f->v = normals(3, LEN * G * D);
  for (int t = 0; t < LEN; t++)
    for (int p = 0; p < PAIRS; p++) {
      const double angle = t * pow(10000, -(double)p / PAIRS);
      f->cos[t * PAIRS + p] = (float)cos(angle);
      f->sin[t * PAIRS + p] = (float)sin(angle);
    }
  f->rope = (sfa_rope){f->cos, f->sin, ROTATED, interleaved};
  for (int u = 0; u < D; u++)
    f->weight[u] = 0.5f + 0.03f * (float)u;
  f->of_rows = (sfa_row_norm){f->weight, 1e-5f};
  f->norm = normed ? &f->of_rows : NULL;
  f->turned_q = turn(f, f->q, H);
  f->turned_k = turn(f, f->k, G);
  return f;
}

static void discard(fixture *f) {
  sfa_context_destroy(f->ctx);
  free(f->q);
  free(f->k);
  free(f->v);
  free(f->turned_q);
  free(f->turned_k);
  free(f);
}

static void *as_bf16(const float *x, int64_t n) {
  uint16_t *out = malloc((size_t)n * sizeof *out);
  assert_non_null(out);
  for (int64_t i = 0; i < n; i++)
    out[i] = sfa_bf16_from_f32(x[i]);
  return out;
}

static sfa_attention_plan *plan_of(fixture *f, int32_t n_q, int32_t k, sfa_dtype k_dtype, int32_t n_sequences) {
  const sfa_attention_options options = {.struct_size = sizeof options,
                                         .n_sequences = n_sequences,
                                         .n_heads = H,
                                         .n_kv_heads = G,
                                         .head_dim = D,
                                         .max_seqlen_q = n_q,
                                         .max_seqlen_k = LEN,
                                         .k_q = k,
                                         .k_k = k,
                                         .k_dtype = k_dtype,
                                         .causal = 1};
  sfa_attention_plan *plan;
  assert_int_equal(sfa_attention_plan_create(f->ctx, &options, &plan), SFA_OK);
  return plan;
}

/* The whole sequence at once, or as two packed ones; q and k turned by us, or told to be. */
static void run_prompt(fixture *f, int32_t k, sfa_dtype k_dtype, const int32_t *cu_seqlens, int fused, sfa_dtype dtype, float *out) {
  sfa_attention_plan *plan = plan_of(f, LEN, k, k_dtype, cu_seqlens ? 2 : 1);
  void *q16 = as_bf16(f->q, LEN * H * D), *k16 = as_bf16(f->k, LEN * G * D);
  void *workspace = aligned_alloc(64, (sfa_attention_workspace_bytes(plan) + 63) / 64 * 64);
  assert_non_null(workspace);
  const sfa_rope *rope = fused ? &f->rope : NULL;
  const sfa_row_norm *norm = fused ? f->norm : NULL;
  const sfa_rows q = {.data = fused ? f->q : f->turned_q, .rope = rope, .norm = norm},
                 k_rows = {.data = fused ? f->k : f->turned_k, .rope = rope, .norm = norm};
  sfa_attention_args args = {.struct_size = sizeof args,
                             .q = q,
                             .k = k_rows,
                             .v = {.data = f->v},
                             .cu_seqlens_q = cu_seqlens,
                             .cu_seqlens_k = cu_seqlens,
                             .out = out,
                             .workspace = workspace};
  if (dtype == SFA_BF16) {
    args.q.data = q16;
    args.k.data = k16;
    args.q.dtype = args.k.dtype = SFA_BF16;
  }
  if (sfa_attention_run(plan, &args) != SFA_OK)
    fail_msg("%s", sfa_context_error(f->ctx));
  sfa_attention_plan_destroy(plan);
  free(workspace);
  free(q16);
  free(k16);
}

static void rows_of_a_call(void **state) {
  (void)state;
  static const struct {
    int32_t k;
    sfa_dtype k_dtype;
  } forms[] = {{8, SFA_F32}, {8, SFA_I8}, {16, SFA_BF16}, {0, SFA_BF16}, {0, SFA_F16}, {0, SFA_I8}};
  static const int32_t cut[] = {0, 67, LEN};
  float *out = malloc(LEN * H * D * sizeof *out), *expected = malloc(LEN * H * D * sizeof *out);
  assert_true(out && expected);
  for (int way = 0; way < 4; way++) {
    fixture *f = make(way & 1, way & 2);
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++)
      for (int packed = 0; packed < 2; packed++) {
        run_prompt(f, forms[i].k, forms[i].k_dtype, packed ? cut : NULL, 0, SFA_F32, expected);
        for (sfa_dtype dtype = SFA_F32; dtype <= SFA_BF16; dtype++) {
          run_prompt(f, forms[i].k, forms[i].k_dtype, packed ? cut : NULL, 1, dtype, out);
          assert_memory_equal(out, expected, LEN * H * D * sizeof *out);
        }
      }
    discard(f);
  }
  free(out);
  free(expected);
}

/* Appended in pieces, each with its lines of the tables; then one query of the last token. */
static void run_cached(fixture *f, int32_t k, sfa_dtype k_dtype, int fused, float *out) {
  static const int32_t pieces[] = {70, 1, 64, LEN - 135};
  const sfa_cache_options options = {
      .struct_size = sizeof options, .n_layers = 1, .n_kv_heads = G, .head_dim = D, .k = &k, .k_dtype = k_dtype};
  sfa_cache *cache;
  assert_int_equal(sfa_cache_create(f->ctx, &options, &cache), SFA_OK);
  int64_t first = 0;
  for (size_t i = 0; i < sizeof pieces / sizeof *pieces; first += pieces[i++]) {
    const sfa_rope rope = {f->cos + first * PAIRS, f->sin + first * PAIRS, ROTATED, f->rope.interleaved};
    const sfa_rows k_rows = {
        .data = (fused ? f->k : f->turned_k) + first * G * D, .rope = fused ? &rope : NULL, .norm = fused ? f->norm : NULL};
    const sfa_rows v_rows = {.data = f->v + first * G * D};
    assert_int_equal(sfa_cache_append(cache, 0, 0, pieces[i], &k_rows, &v_rows), SFA_OK);
  }
  sfa_attention_plan *plan = plan_of(f, 1, k, k_dtype, 1);
  void *workspace = aligned_alloc(64, (sfa_attention_workspace_bytes(plan) + 63) / 64 * 64);
  assert_non_null(workspace);
  const sfa_rope last = {f->cos + (LEN - 1) * PAIRS, f->sin + (LEN - 1) * PAIRS, ROTATED, f->rope.interleaved};
  const sfa_attention_args args = {
      .struct_size = sizeof args,
      .q = {.data = (fused ? f->q : f->turned_q) + (LEN - 1) * H * D, .rope = fused ? &last : NULL, .norm = fused ? f->norm : NULL},
      .out = out,
      .workspace = workspace};
  const int32_t sequence = 0;
  if (sfa_attention_run_cached(plan, &args, cache, 0, &sequence) != SFA_OK)
    fail_msg("%s", sfa_context_error(f->ctx));
  sfa_attention_plan_destroy(plan);
  sfa_cache_destroy(cache);
  free(workspace);
}

static void rows_of_a_cache(void **state) {
  (void)state;
  static const struct {
    int32_t k;
    sfa_dtype k_dtype;
  } forms[] = {{8, SFA_I8}, {16, SFA_F32}, {0, SFA_F32}, {0, SFA_BF16}};
  for (int way = 0; way < 4; way++) {
    fixture *f = make(way & 1, way & 2);
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
      float out[H * D], expected[H * D];
      run_cached(f, forms[i].k, forms[i].k_dtype, 0, expected);
      run_cached(f, forms[i].k, forms[i].k_dtype, 1, out);
      assert_memory_equal(out, expected, sizeof out);
    }
    discard(f);
  }
}

static void expect_error(fixture *f, sfa_status status, sfa_status wanted, const char *part) {
  assert_int_equal(status, wanted);
  if (!strstr(sfa_context_error(f->ctx), part))
    fail_msg("\"%s\" says nothing of \"%s\"", sfa_context_error(f->ctx), part);
}

static void wrong_arguments(void **state) {
  (void)state;
  fixture *f = make(0, 1);
  float *out = malloc(LEN * H * D * sizeof *out);
  assert_non_null(out);
  sfa_attention_plan *sparse = plan_of(f, LEN, 8, SFA_F32, 1), *dense = plan_of(f, LEN, 0, SFA_F32, 1);
  size_t bytes = sfa_attention_backward_workspace_bytes(sparse) + sfa_attention_workspace_bytes(dense);
  void *workspace = aligned_alloc(64, (bytes + 63) / 64 * 64);
  assert_non_null(workspace);
  const sfa_attention_args good = {
      .struct_size = sizeof good, .q = {.data = f->q}, .k = {.data = f->k}, .v = {.data = f->v}, .out = out, .workspace = workspace};
  sfa_rope bad[] = {f->rope, f->rope, f->rope, f->rope, f->rope};
  bad[0].cos = NULL;
  bad[1].n_rotated = 7;
  bad[2].n_rotated = D + 2;
  bad[3].n_rotated = -2;
  bad[4].interleaved = 2;
  static const char *const parts[] = {"q.rope has no cos", "n_rotated is 7", "n_rotated is 66", "n_rotated is -2", "interleaved is 2"};
  for (int i = 0; i < 5; i++) {
    sfa_attention_args args = good;
    args.q.rope = &bad[i];
    expect_error(f, sfa_attention_run(sparse, &args), SFA_ERROR_ARGUMENT, parts[i]);
  }
  sfa_attention_args args = good;
  args.v.rope = &f->rope;
  expect_error(f, sfa_attention_run(sparse, &args), SFA_ERROR_ARGUMENT, "v.rope");
  args = good;
  args.k.rope = &f->rope;
  expect_error(f, sfa_attention_run(dense, &args), SFA_ERROR_UNSUPPORTED, "k.rope");
  assert_int_equal(sfa_attention_run(sparse, &args), SFA_OK);
  float odd[2] = {0};
  const sfa_row_norm no_norm[] = {
      {NULL, 1e-6f}, {(const float *)(const void *)((char *)odd + 1), 1e-6f}, {f->weight, -1}, {f->weight, NAN}};
  static const char *const norm_parts[] = {"k.norm has no weight", "not aligned", "k.norm.eps is -1", "k.norm.eps is"};
  for (int i = 0; i < 4; i++) {
    args = good;
    args.k.norm = &no_norm[i];
    expect_error(f, sfa_attention_run(sparse, &args), SFA_ERROR_ARGUMENT, norm_parts[i]);
  }
  args = good;
  args.v.norm = f->norm;
  expect_error(f, sfa_attention_run(sparse, &args), SFA_ERROR_ARGUMENT, "v.norm");
  args = good;
  args.k.norm = f->norm;
  expect_error(f, sfa_attention_run(dense, &args), SFA_ERROR_UNSUPPORTED, "k.norm");
  assert_int_equal(sfa_attention_run(sparse, &args), SFA_OK);
  const sfa_attention_grad_args gradient = {
      .struct_size = sizeof gradient, .forward = &args, .workspace = workspace, .d_out = out, .d_q = f->turned_q};
  expect_error(f, sfa_attention_backward(sparse, &gradient), SFA_ERROR_UNSUPPORTED, "a norm");
  sfa_attention_plan_destroy(sparse);
  sfa_attention_plan_destroy(dense);
  free(workspace);
  free(out);
  discard(f);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(rows_of_a_call), cmocka_unit_test(rows_of_a_cache),
                                     cmocka_unit_test(wrong_arguments)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
