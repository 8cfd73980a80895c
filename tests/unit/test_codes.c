/* Codes through the public API: selection and rounding against the naive maths, exports, arguments. */
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <sfa/attention.h>

#include "base/half.h"
#include "oracle.h"
#include "unit_tools.h"

/* Rows of normal numbers with what is awkward mixed in: ties, zeros, denormals, whole rows of one value. */
static float *awkward_rows(uint64_t seed, int64_t n, int32_t D) {
  sfa_rng rng = {seed};
  float *x = memory((size_t)(n * D) * sizeof *x);
  for (int64_t i = 0; i < n * D; i++) {
    int64_t row = i / D;
    double normal = sfa_rng_normal(&rng);
    if (row % 7 == 1)
      normal = nearbyint(2 * normal) / 2; /* ties, +0 and -0 */
    if (row % 7 == 2)
      normal = sfa_rng_uniform(&rng) < 0.9 ? 0 : normal; /* fewer than K that are not 0 */
    if (row % 7 == 3)
      normal = row % 2 ? 1 : -1;
    if (row % 7 == 4)
      normal *= 1e-41;
    x[i] = (float)normal;
  }
  return x;
}

static const sfa_dtype types[] = {SFA_F32, SFA_BF16, SFA_F16, SFA_I8};
static const int storages[] = {ORACLE_F32, ORACLE_BF16, ORACLE_F16, ORACLE_I8};

/* Codes of x, over memory that must be freed. */
static sfa_codes select_codes(sfa_context *ctx, const float *x, int64_t n, int32_t D, int32_t K, sfa_dtype dtype, void **buffer) {
  sfa_codes codes;
  *buffer = memory(sfa_codes_bytes(n, D, K, dtype));
  assert_int_equal(sfa_codes_place(ctx, n, D, K, dtype, *buffer, &codes), SFA_OK);
  if (sfa_codes_select(ctx, x, SFA_F32, D, &codes) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  for (int i = 0; i < 64; i++)
    assert_int_equal(((unsigned char *)*buffer)[(sfa_codes_bytes(n, D, K, dtype) + 63) / 64 * 64 + (size_t)i], 0xff);
  return codes;
}

/* ---- Selection ---------------------------------------------------------------------------------------------------------- */

static void selection(void **state) {
  (void)state;
  static const struct {
    int32_t D, K;
    int64_t n;
  } shapes[] = {{8, 1, 30},    {8, 8, 30},    {64, 8, 300},   {64, 16, 77}, {128, 8, 64},
                {256, 32, 40}, {264, 16, 40}, {4096, 100, 5}, {65536, 3, 2}};
  for (int isa = SFA_ISA_SCALAR; isa <= (int)sfa_isa_best(); isa++) {
    sfa_context *ctx = new_context(2, (sfa_isa)isa);
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
      for (int t = 0; t < 4; t++) {
        int32_t D = shapes[s].D, K = shapes[s].K;
        int64_t n = shapes[s].n;
        float *x = awkward_rows(s + 1, n, D), *dense = memory((size_t)(n * D) * sizeof *dense), *row = memory((size_t)D * sizeof *row);
        int *ids = memory((size_t)K * sizeof *ids);
        void *buffer;
        sfa_codes codes = select_codes(ctx, x, n, D, K, types[t], &buffer);
        assert_int_equal(sfa_codes_densify(ctx, &codes, dense, D), SFA_OK);
        for (int64_t i = 0; i < n; i++) {
          oracle_topk(x + i * D, D, K, ids);
          for (int32_t u = 0; u < K; u++) {
            int64_t at = i * K + u;
            assert_int_equal(D <= 256 ? ((uint8_t *)codes.ids)[at] : ((uint16_t *)codes.ids)[at], ids[u]);
            row[u] = x[i * D + ids[u]];
          }
          oracle_round(row, K, storages[t]);
          int64_t n_nonzero = 0;
          for (int32_t u = 0; u < K; u++) {
            assert_true(dense[i * D + ids[u]] == row[u]);
            dense[i * D + ids[u]] = 0;
          }
          for (int32_t u = 0; u < D; u++)
            n_nonzero += dense[i * D + u] != 0;
          assert_int_equal(n_nonzero, 0);
        }
        free(x);
        free(dense);
        free(row);
        free(ids);
        free(buffer);
      }
    sfa_context_destroy(ctx);
  }
}

/* Rows far apart, bf16 rows, other numbers of threads. */
static void same_rows_otherwise(void **state) {
  (void)state;
  enum { N = 1000, D = 64, K = 8 };
  float *x = awkward_rows(3, N, D), *apart = memory(N * 100 * sizeof *apart);
  uint16_t *half = memory(N * D * sizeof *half);
  for (int64_t i = 0; i < N * D; i++) {
    half[i] = sfa_bf16_from_f32(x[i]);
    x[i] = sfa_f32_from_bf16(half[i]);
    apart[i / D * 100 + i % D] = x[i];
  }
  sfa_context *one = new_context(1, SFA_ISA_DEFAULT), *two = new_context(2, SFA_ISA_DEFAULT);
  for (int t = 0; t < 4; t++) {
    void *want_buffer, *got_buffer;
    size_t bytes = sfa_codes_bytes(N, D, K, types[t]);
    select_codes(one, x, N, D, K, types[t], &want_buffer);
    sfa_codes got = select_codes(two, x, N, D, K, types[t], &got_buffer);
    for (int way = 0; way < 3; way++) {
      if (way)
        memset(got.values, 0x55, N * K * sfa_dtype_bytes(types[t]));
      if (way == 1)
        assert_int_equal(sfa_codes_select(two, apart, SFA_DTYPE_DEFAULT, 100, &got), SFA_OK);
      if (way == 2)
        assert_int_equal(sfa_codes_select(two, half, SFA_BF16, D, &got), SFA_OK);
      assert_memory_equal(want_buffer, got_buffer, bytes);
    }
    free(want_buffer);
    free(got_buffer);
  }
  sfa_context_destroy(one);
  sfa_context_destroy(two);
  free(x);
  free(apart);
  free(half);
}

/* NaN is kept before all else; a row with NaN or inf is NaN as int8; beyond f16 is refused, where f16 or int8 is asked. */
static void odd_values(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  for (int t = 0; t < 4; t++) {
    float x[3 * 8] = {1, 2, 3, 4, 5, 6, NAN, 7, 1, -INFINITY, 3, 4, 5, 6, 8, 7, 0}, dense[3 * 8];
    void *buffer;
    sfa_codes codes = select_codes(ctx, x, 3, 8, 2, types[t], &buffer);
    static const uint8_t ids[] = {6, 7, 1, 6, 0, 1};
    assert_memory_equal(codes.ids, ids, sizeof ids);
    assert_int_equal(sfa_codes_densify(ctx, &codes, dense, 8), SFA_OK);
    assert_true(isnan(dense[6]) &&
                (t < 3 ? dense[7] == 7 && dense[9] == -INFINITY && dense[14] == 8 : isnan(dense[7]) && isnan(dense[14])));
    assert_true(dense[16] == 0 && dense[17] == 0);
    x[17] = -65536;
    assert_int_equal(sfa_codes_select(ctx, x, SFA_F32, 8, &codes), t < 2 ? SFA_OK : SFA_ERROR_RANGE);
    if (t >= 2)
      assert_non_null(strstr(sfa_context_error(ctx), "row 2 "));
    free(buffer);
  }
  sfa_context_destroy(ctx);
}

/* ---- Rows that keep some features ---------------------------------------------------------------------------------------- */

/* Row x [D] by the definition, one feature after the other: the largest that may still be kept. sizes: what is compared. */
static void keep_plainly(const float *x, const float *sizes, int32_t D, int32_t K, bool two_of_four, float *out) {
  bool kept[256] = {false};
  for (int32_t n = 0; n < K; n++) {
    int32_t best = -1;
    for (int32_t u = 0; u < D; u++) {
      const bool *four = kept + u / 4 * 4;
      bool may = !kept[u] && !(two_of_four && four[0] + four[1] + four[2] + four[3] == 2);
      if (may && (best < 0 || fabsf(sizes[u]) > fabsf(sizes[best])))
        best = u;
    }
    kept[best] = true;
  }
  for (int32_t u = 0; u < D; u++)
    out[u] = kept[u] ? x[u] : 0;
}

static void kept_features(void **state) {
  (void)state;
  enum { N = 70, H = 3, MOST = 256 };
  static const int32_t dims[] = {8, 64, 128, MOST}, ks[] = {1, 4, 13, 32};
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  for (int d = 0; d < 4; d++)
    for (int two_of_four = 0; two_of_four < 2; two_of_four++)
      for (int i = 0; i < 4; i++) {
        const int32_t D = dims[d], K = ks[i], stride = H * D + 5;
        if (K > D / 2)
          continue;
        float *x = awkward_rows((uint64_t)(d + i), N, H * MOST + 5), *got = memory((size_t)N * (size_t)stride * sizeof *got), want[MOST];
        memcpy(got, x, (size_t)N * (size_t)stride * sizeof *got);
        const sfa_keep_options options = {.struct_size = sizeof options, .k = K, .two_of_four = two_of_four};
        assert_int_equal(sfa_rows_keep(ctx, &options, N, H, D, got, stride), SFA_OK);
        for (int64_t t = 0; t < N; t++) {
          for (int h = 0; h < H; h++) {
            const float *row = x + t * stride + h * D, *result = got + t * stride + h * D;
            keep_plainly(row, row, D, K, two_of_four, want);
            for (int32_t u = 0; u < D; u++)
              assert_true(result[u] == want[u]);
          }
          assert_memory_equal(got + t * stride + H * D, x + t * stride + H * D, 5 * sizeof *x);
        }
        free(x);
        free(got);
      }
  sfa_context_destroy(ctx);
}

/* Noise moves the choice and no value, the same however rows are cut and shared; draws follow the softmax that Gumbel noise stands for. */
static void noisy_choice(void **state) {
  (void)state;
  enum { N = 3000, D = 8 };
  sfa_context *one = new_context(1, SFA_ISA_SCALAR), *two = new_context(2, SFA_ISA_DEFAULT);
  float *x = memory(N * D * sizeof *x), *got = memory(N * D * sizeof *got), *parts = memory(N * D * sizeof *parts);
  for (int i = 0; i < N * D; i++)
    x[i] = (float)(i % D < 4 ? -(i % D + 1) : 0);
  memcpy(got, x, N * D * sizeof *x);
  memcpy(parts, x, N * D * sizeof *x);
  sfa_keep_options options = {.struct_size = sizeof options, .k = 1, .gumbel_scale = 1, .seed = 5};
  assert_int_equal(sfa_rows_keep(two, &options, N, 1, D, got, 0), SFA_OK);
  for (int64_t first = 0; first < N; first += 500) {
    options.first_token = first;
    assert_int_equal(sfa_rows_keep(one, &options, 500, 1, D, parts + first * D, 0), SFA_OK);
  }
  assert_memory_equal(got, parts, N * D * sizeof *x);
  int drawn[D] = {0};
  for (int64_t i = 0; i < N * D; i++)
    if (got[i] != 0) {
      assert_true(got[i] == x[i]);
      drawn[i % D]++;
    }
  for (int u = 0; u < 4; u++) /* weights 1 : 2 : 3 : 4; five standard deviations are at most 135 */
    assert_true(abs(drawn[u] - N * (u + 1) / 10) < 135);
  assert_int_equal(drawn[0] + drawn[1] + drawn[2] + drawn[3], N);
  options.seed = 6;
  memcpy(parts, x, N * D * sizeof *x);
  options.first_token = 0;
  assert_int_equal(sfa_rows_keep(one, &options, N, 1, D, parts, 0), SFA_OK);
  assert_memory_not_equal(got, parts, N * D * sizeof *x);
  free(x);
  free(got);
  free(parts);
  sfa_context_destroy(one);
  sfa_context_destroy(two);
}

static void wrong_choices(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  float x[64] = {1}, before[64] = {1};
  const sfa_keep_options good = {.struct_size = sizeof good, .k = 4};
  sfa_keep_options bad[] = {good, good, good, good, good, good, good};
  bad[0].struct_size = 1, bad[1].k = 0, bad[2].k = 65, bad[3].gumbel_scale = NAN, bad[4].first_token = -1;
  bad[5].k = 33, bad[5].two_of_four = 1;
  bad[6].two_of_four = 2;
  for (int i = 0; i < 7; i++)
    assert_int_equal(sfa_rows_keep(ctx, &bad[i], 1, 1, 64, x, 0), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_rows_keep(ctx, NULL, 1, 1, 64, x, 0), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_rows_keep(NULL, &good, 1, 1, 64, x, 0), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_rows_keep(ctx, &good, 1, 1, 63, x, 0), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_rows_keep(ctx, &good, 1, 1, 64, NULL, 0), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_rows_keep(ctx, &good, 1, 1, 8, (float *)(void *)((char *)x + 2), 0), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_rows_keep(ctx, &good, 1, 1, 64, x, 63), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_rows_keep(ctx, &good, -1, 1, 64, x, 0), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_rows_keep(ctx, &good, 0, 1, 64, NULL, 0), SFA_OK);
  assert_memory_equal(x, before, sizeof x);
  sfa_context_destroy(ctx);
}

/* ---- Exports ------------------------------------------------------------------------------------------------------------ */

static void exports(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  static const int32_t dims[] = {64, 320};
  for (int t = 0; t < 4; t++)
    for (int d = 0; d < 2; d++) {
      enum { N = 50, K = 7 };
      int32_t D = dims[d];
      float *x = awkward_rows(9, N, D), *dense = memory((size_t)(N * D) * sizeof *dense);
      void *buffer;
      sfa_codes codes = select_codes(ctx, x, N, D, K, types[t], &buffer);
      assert_int_equal(sfa_codes_densify(ctx, &codes, dense, D), SFA_OK);
      int64_t row_ptr[N + 1], rows[N * K], *col_ptr = memory((size_t)(D + 1) * sizeof *col_ptr);
      int32_t cols[N * K];
      float values[N * K];
      assert_int_equal(sfa_codes_to_csr(ctx, &codes, row_ptr, cols, values), SFA_OK);
      for (int64_t i = 0; i < N; i++) {
        assert_int_equal(row_ptr[i], i * K);
        for (int64_t at = row_ptr[i]; at < row_ptr[i + 1]; at++) {
          assert_true(at == row_ptr[i] || cols[at] > cols[at - 1]);
          assert_true(values[at] == dense[i * D + cols[at]]);
        }
      }
      assert_int_equal(row_ptr[N], N * K);
      assert_int_equal(sfa_codes_to_csc(ctx, &codes, col_ptr, rows, values), SFA_OK);
      int64_t n_seen = 0;
      for (int32_t c = 0; c < D; c++)
        for (int64_t at = col_ptr[c]; at < col_ptr[c + 1]; at++, n_seen++) {
          assert_true(at == col_ptr[c] || rows[at] > rows[at - 1]);
          assert_true(values[at] == dense[rows[at] * D + c]);
        }
      assert_true(col_ptr[0] == 0 && col_ptr[D] == N * K && n_seen == N * K);
      free(x);
      free(dense);
      free(col_ptr);
      free(buffer);
    }
  sfa_context_destroy(ctx);
}

/* ---- Arguments and memory ----------------------------------------------------------------------------------------------- */

static void wrong_arguments(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  static const struct {
    int64_t n;
    int32_t D, K;
    int dtype;
  } wrong[] = {{-1, 64, 8, SFA_F32}, {INT64_MAX, 64, 8, SFA_F32}, {4, 0, 1, SFA_F32}, {4, 60, 8, SFA_F32}, {4, 65544, 8, SFA_F32},
               {4, 64, 0, SFA_F32},  {4, 64, 65, SFA_F32},        {4, 64, 8, 0},      {4, 64, 8, 5},       {4, 64, 8, -1}};
  float x[4 * 64] = {0}, out[4 * 64];
  void *buffer = memory(sfa_codes_bytes(4, 64, 8, SFA_I8));
  sfa_codes codes;
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    assert_int_equal(sfa_codes_bytes(wrong[i].n, wrong[i].D, wrong[i].K, (sfa_dtype)wrong[i].dtype), 0);
    assert_int_equal(sfa_codes_place(ctx, wrong[i].n, wrong[i].D, wrong[i].K, (sfa_dtype)wrong[i].dtype, buffer, &codes),
                     SFA_ERROR_ARGUMENT);
    assert_true(strlen(sfa_context_error(ctx)) > 10);
  }
  assert_int_equal(sfa_codes_place(NULL, 4, 64, 8, SFA_I8, buffer, &codes), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_codes_place(ctx, 4, 64, 8, SFA_I8, NULL, &codes), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_codes_place(ctx, 4, 64, 8, SFA_I8, (char *)buffer + 8, &codes), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_codes_place(ctx, 4, 64, 8, SFA_I8, buffer, NULL), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_codes_place(ctx, 4, 64, 8, SFA_I8, buffer, &codes), SFA_OK);
  assert_int_equal(sfa_codes_select(ctx, NULL, SFA_F32, 64, &codes), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_codes_select(ctx, x, SFA_F16, 64, &codes), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_codes_select(ctx, x, SFA_F32, -64, &codes), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_codes_select(ctx, x, SFA_F32, 64, NULL), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_codes_select(NULL, x, SFA_F32, 64, &codes), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_codes_select(ctx, x, SFA_F32, 64, &codes), SFA_OK);
  assert_int_equal(sfa_codes_densify(ctx, &codes, out, 63), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_codes_densify(ctx, &codes, NULL, 64), SFA_ERROR_ARGUMENT);
  ((uint8_t *)codes.ids)[9] = 64; /* no feature */
  assert_int_equal(sfa_codes_densify(ctx, &codes, out, 64), SFA_ERROR_ARGUMENT);
  assert_non_null(strstr(sfa_context_error(ctx), "row 1 "));
  int64_t ptr[65], rows[32];
  int32_t cols[32];
  assert_int_equal(sfa_codes_to_csr(ctx, &codes, ptr, cols, out), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_codes_to_csc(ctx, &codes, ptr, rows, out), SFA_ERROR_ARGUMENT);
  codes.scales = NULL;
  assert_int_equal(sfa_codes_select(ctx, x, SFA_F32, 64, &codes), SFA_ERROR_ARGUMENT);
  free(buffer);
  sfa_context_destroy(ctx);
}

static void no_memory(void **state) {
  (void)state;
  memory_account account = {.refuse = 2}; /* 1 is the context */
  sfa_context *ctx = new_counted_context(0, &account);
  float x[64] = {0};
  void *buffer = memory(sfa_codes_bytes(1, 64, 8, SFA_I8));
  sfa_codes codes;
  assert_int_equal(sfa_codes_place(ctx, 1, 64, 8, SFA_I8, buffer, &codes), SFA_OK);
  assert_int_equal(sfa_codes_select(ctx, x, SFA_F32, 64, &codes), SFA_ERROR_MEMORY);
  free(buffer);
  sfa_context_destroy(ctx);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(selection),     cmocka_unit_test(same_rows_otherwise), cmocka_unit_test(odd_values),
      cmocka_unit_test(kept_features), cmocka_unit_test(noisy_choice),        cmocka_unit_test(wrong_choices),
      cmocka_unit_test(exports),       cmocka_unit_test(wrong_arguments),     cmocka_unit_test(no_memory),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
