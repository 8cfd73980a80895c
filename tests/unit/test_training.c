/* Operations of training (device/training.h) against sums in double: products of every shape and order of operands, column sums, the
 * optimizer; the same bits on every instruction set and for any threads. The backward passes are proved in test_learn.c. */
#include "unit_tools.h"

#include "base/half.h"
#include "device/training.h"

#include <math.h>

/* Plain C, AVX2 and the best that there is. */
enum { N_ISAS = 3 };
static sfa_isa isa_of(int i) { return i == 0 ? SFA_ISA_SCALAR : i == 1 ? isa_at_most(SFA_ISA_AVX2) : SFA_ISA_DEFAULT; }

typedef struct shape {
  int64_t m, n, k;
  bool a_turned, b_turned, add, biased, bf16;
} shape;

/* a [m][k] or turned [k][m]; b [k][n] or turned [n][k]; each row of out is followed by a gap that stays. */
static float *product_of(const shape *s, const float *a, const float *b, const float *bias, sfa_isa isa, int32_t n_threads) {
  enum { GAP = 3 };
  sfa_context *ctx = new_context(n_threads, isa);
  const sfa_training *ops = sfa_training_cpu();
  float *out = memory((size_t)(s->m * (s->n + GAP)) * sizeof *out);
  for (int64_t i = 0; i < s->m * (s->n + GAP); i++)
    out[i] = s->add ? (float)(i % 5) : i % (s->n + GAP) < s->n ? NAN : 7.0f;
  void *scratch = memory(ops->scratch_bytes(s->m > s->n ? s->m : s->n));
  const sfa_product product = {.m = s->m,
                               .n = s->n,
                               .k = s->k,
                               .a = {a, s->a_turned ? 1 : s->k, s->a_turned ? s->m : 1},
                               .b = {b, s->b_turned ? 1 : s->n, s->b_turned ? s->k : 1},
                               .bias = s->biased ? bias : NULL,
                               .add = s->add,
                               .bf16 = s->bf16,
                               .out = out,
                               .out_stride = s->n + GAP};
  ops->product(ctx, &product, scratch);
  for (int64_t i = 0; !s->add && i < s->m; i++)
    for (int64_t j = s->n; j < s->n + GAP; j++)
      assert_true(out[i * (s->n + GAP) + j] == 7.0f);
  free(scratch);
  sfa_context_destroy(ctx);
  return out;
}

static void products(void **state) {
  (void)state;
  static const shape shapes[] = {
      {1, 1, 1, false, false, false, false, false},   {12, 32, 16, false, true, false, true, false},
      {13, 33, 17, false, false, false, true, false}, {100, 130, 300, true, false, true, false, false},
      {97, 129, 511, false, true, false, true, true}, {5, 200, 257, true, true, true, false, true},
      {3, 5, 0, false, false, false, false, false},   {70, 40, 300, false, false, false, false, true},
      {40, 70, 33, true, false, true, true, true},
  };
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
    const shape *s = &shapes[i];
    float *a = normals(1, s->m * s->k), *b = normals(2, s->k * s->n), *bias = normals(3, s->n);
    float *out = product_of(s, a, b, bias, SFA_ISA_DEFAULT, 2);
    int64_t stride = s->n + 3;
    for (int64_t row = 0; row < s->m; row++)
      for (int64_t column = 0; column < s->n; column++) {
        double sum = s->add ? (double)((row * stride + column) % 5) : 0, size = 1;
        for (int64_t u = 0; u < s->k; u++) {
          float x = a[s->a_turned ? u * s->m + row : row * s->k + u], y = b[s->b_turned ? column * s->k + u : u * s->n + column];
          if (s->bf16)
            x = sfa_f32_from_bf16(sfa_bf16_from_f32(x)), y = sfa_f32_from_bf16(sfa_bf16_from_f32(y));
          sum += (double)x * (double)y;
          size += fabs((double)x * (double)y);
        }
        sum += s->biased ? (double)bias[column] : 0;
        assert_true(fabs((double)out[row * stride + column] - sum) <= 1e-6 * size);
      }
    for (int isa = 0; isa < N_ISAS; isa++) {
      bool by_tiles = s->bf16 && sfa_isa_best() == SFA_ISA_AMX; /* which sum in an order of their own: the same for any threads */
      float *other = product_of(s, a, b, bias, by_tiles ? SFA_ISA_DEFAULT : isa_of(isa), 1 + isa);
      assert_memory_equal(other, out, (size_t)(s->m * stride) * sizeof *out);
      free(other);
    }
    free(a), free(b), free(bias), free(out);
  }
}

static void sums(void **state) {
  (void)state;
  enum { ROWS = 201, DIM = 37, STRIDE = 40, N = 100003 };
  const sfa_training *ops = sfa_training_cpu();
  float *x = normals(4, N), first[DIM];
  double squares = 0, first_squares = 0;
  for (int i = 0; i < N; i++)
    squares += (double)x[i] * (double)x[i];
  for (int isa = 0; isa < N_ISAS; isa++) {
    sfa_context *ctx = new_context(1 + isa, isa_of(isa));
    void *scratch = memory(ops->scratch_bytes(DIM));
    float out[DIM];
    for (int j = 0; j < DIM; j++)
      out[j] = (float)j;
    ops->column_sum(ctx, ROWS, DIM, x, STRIDE, out, scratch);
    for (int j = 0; j < DIM; j++) {
      double sum = j;
      for (int i = 0; i < ROWS; i++)
        sum += (double)x[i * STRIDE + j];
      assert_true(fabs((double)out[j] - sum) <= 1e-4);
    }
    double found;
    ops->square_sum(ctx, N, x, &found);
    assert_true(fabs(found - squares) <= 1e-9 * squares);
    if (isa == 0)
      memcpy(first, out, sizeof out), first_squares = found;
    assert_memory_equal(first, out, sizeof out);
    assert_true(first_squares == found);
    free(scratch);
    sfa_context_destroy(ctx);
  }
  free(x);
}

static void optimizer(void **state) {
  (void)state;
  enum { N = 70001, STEPS = 5 };
  const sfa_training *ops = sfa_training_cpu();
  float *start = normals(5, N), *gradients[STEPS], *first = NULL;
  const sfa_clip clip = {1, 0.5f};
  for (int step = 0; step < STEPS; step++)
    gradients[step] = normals((uint64_t)step + 6, N);
  for (int isa = 0; isa < N_ISAS; isa++) {
    sfa_context *ctx = new_context(1 + isa, isa_of(isa));
    float *value = memory(N * sizeof(float)), *m = calloc(N, sizeof(float)), *v = calloc(N, sizeof(float));
    memcpy(value, start, N * sizeof(float));
    for (int step = 0; step < STEPS; step++) {
      const sfa_adamw how = {.rate = 1e-2f,
                             .beta1 = 0.9f,
                             .beta2 = 0.95f,
                             .eps = 1e-8f,
                             .decay = 0.1f,
                             .correction1 = (float)(1 - pow(0.9, step + 1)),
                             .correction2 = (float)(1 - pow(0.95, step + 1)),
                             .clip = &clip};
      ops->adamw(ctx, &how, N, gradients[step], m, v, value);
    }
    for (int i = 0; isa == 0 && i < N; i += 13) {
      double w = (double)start[i], mean = 0, square = 0;
      for (int step = 0; step < STEPS; step++) {
        double g = 0.5 * (double)gradients[step][i];
        mean = 0.9 * mean + 0.1 * g;
        square = 0.95 * square + 0.05 * g * g;
        w = w * (1 - 1e-3) - 1e-2 * (mean / (1 - pow(0.9, step + 1))) / (sqrt(square / (1 - pow(0.95, step + 1))) + 1e-8);
      }
      assert_true(fabs((double)value[i] - w) <= 2e-6);
    }
    if (!first) {
      first = value;
      value = NULL;
    } else {
      assert_memory_equal(first, value, N * sizeof(float));
    }
    free(value), free(m), free(v);
    sfa_context_destroy(ctx);
  }
  for (int step = 0; step < STEPS; step++)
    free(gradients[step]);
  free(start), free(first);
}

/* The factor of a norm, and what a norm that is not finite moves: nothing. */
static void clipping(void **state) {
  (void)state;
  const sfa_training *ops = sfa_training_cpu();
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  const double sums[] = {9, 0, 16};
  sfa_clip clip;
  ops->clip(ctx, 3, sums, 0, &clip);
  assert_true(clip.norm == 5 && clip.factor == 1);
  ops->clip(ctx, 3, sums, 6, &clip);
  assert_true(clip.norm == 5 && clip.factor == 1);
  ops->clip(ctx, 3, sums, 1, &clip);
  assert_true(clip.norm == 5 && clip.factor == (float)(1 / (5 + 1e-6)));
  float x[] = {1, 2}, out[] = {3, 4};
  ops->add_share(ctx, 2, -8, &sums[2], x, out);
  assert_true(out[0] == 2.5f && out[1] == 3);
  ops->add_share(ctx, 2, 8, &sums[1], x, out);
  assert_true(out[0] == 2.5f && out[1] == 3);
  const double too_much = INFINITY;
  float gradient[] = {INFINITY, 1}, m[] = {0, 0}, v[] = {0, 0};
  const sfa_adamw how = {
      .rate = 1, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .decay = 0.1f, .correction1 = 0.1f, .correction2 = 0.05f, .clip = &clip};
  ops->clip(ctx, 1, &too_much, 1, &clip);
  ops->adamw(ctx, &how, 2, gradient, m, v, x);
  assert_true(x[0] == 1 && x[1] == 2 && m[1] == 0 && v[1] == 0);
  sfa_context_destroy(ctx);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(products), cmocka_unit_test(sums), cmocka_unit_test(optimizer),
                                     cmocka_unit_test(clipping)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
