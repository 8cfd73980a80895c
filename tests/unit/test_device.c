/* Whole-tensor operations against the plain formulas in double; the same bits on every instruction set, for any number of threads, and
 * whether rows come together or one by one. */
#include "base/half.h"
#include "base/rng.h"
#include "device/device.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static sfa_context *context_of(sfa_isa isa, int32_t n_threads) {
  sfa_context *ctx;
  sfa_context_options options = {.struct_size = sizeof options, .n_threads = n_threads, .isa = isa};
  assert_int_equal(sfa_context_create(&options, &ctx), SFA_OK);
  return ctx;
}

static void fill(float *x, int64_t n, uint64_t seed) {
  sfa_rng rng = {seed};
  for (int64_t i = 0; i < n; i++)
    x[i] = (float)sfa_rng_normal(&rng);
}

/* ---- Linear layers ----------------------------------------------------------------------------------------------------------------- */

/* oneDNN has products of bf16 for processors from AVX-512 on; the engine takes them on AMX machines. */
static bool has_bf16_products(void) { return sfa_isa_best() >= SFA_ISA_AVX512; }
static sfa_storage bf16_products_or_bf16(void) { return has_bf16_products() ? SFA_STORE_BF16_PRODUCTS : SFA_STORE_BF16; }

/* A weight matrix in blocks and, of the same values, in floats. */
typedef struct matrix {
  int32_t n_in, n_out, n_blocks, offset;
  bool has_minimum;
  float *values; /* [n_out][n_in] */
  uint8_t *u;    /* [n_out][n_blocks * 32] */
  uint16_t *scale, *minimum;
  float *bias;
} matrix;

static void row_f32(void *arg, int64_t row, float *out) {
  const matrix *m = arg;
  memcpy(out, m->values + row * m->n_in, (size_t)m->n_in * sizeof *out);
}

static void row_blocks(void *arg, int64_t row, uint8_t *u, uint16_t *scale, uint16_t *minimum) {
  const matrix *m = arg;
  memcpy(u, m->u + row * m->n_blocks * SFA_BLOCK, (size_t)m->n_blocks * SFA_BLOCK);
  memcpy(scale, m->scale + row * m->n_blocks, (size_t)m->n_blocks * sizeof *scale);
  memcpy(minimum, m->minimum + row * m->n_blocks, (size_t)m->n_blocks * sizeof *minimum);
}

static matrix make_matrix(int32_t n_in, int32_t n_out, sfa_storage storage, bool has_minimum, bool biased) {
  matrix m = {
      n_in, n_out, (n_in + SFA_BLOCK - 1) / SFA_BLOCK, has_minimum ? 0 : storage == SFA_STORE_U4 ? 8 : 128, has_minimum, NULL, NULL, NULL,
      NULL, NULL};
  size_t n_blocks = (size_t)n_out * (size_t)m.n_blocks;
  m.values = malloc((size_t)n_in * (size_t)n_out * sizeof(float));
  m.u = malloc(n_blocks * SFA_BLOCK);
  m.scale = malloc(n_blocks * 2);
  m.minimum = malloc(n_blocks * 2);
  m.bias = biased ? malloc((size_t)n_out * sizeof(float)) : NULL;
  sfa_rng rng = {(uint64_t)n_in * 1000 + (uint64_t)n_out};
  for (size_t b = 0; b < n_blocks; b++) {
    m.scale[b] = sfa_f16_from_f32((float)(0.001 + 0.01 * sfa_rng_uniform(&rng)));
    m.minimum[b] = has_minimum ? sfa_f16_from_f32((float)(-0.05 * sfa_rng_uniform(&rng))) : 0;
  }
  for (int64_t row = 0; row < n_out; row++)
    for (int64_t i = 0; i < (int64_t)m.n_blocks * SFA_BLOCK; i++) {
      int64_t b = row * m.n_blocks + i / SFA_BLOCK;
      uint8_t u = (uint8_t)(sfa_rng_next(&rng) % (storage == SFA_STORE_U4 ? 16 : 256));
      m.u[row * m.n_blocks * SFA_BLOCK + i] = i < n_in ? u : 0;
      if (i < n_in && storage >= SFA_STORE_U8)
        m.values[row * n_in + i] = sfa_f32_from_f16(m.scale[b]) * (float)(u - m.offset) + sfa_f32_from_f16(m.minimum[b]);
      else if (i < n_in)
        m.values[row * n_in + i] = sfa_f32_from_bf16(sfa_bf16_from_f32((float)sfa_rng_normal(&rng)));
    }
  if (biased)
    fill(m.bias, n_out, 7);
  return m;
}

static void free_matrix(matrix *m) {
  free(m->values);
  free(m->u);
  free(m->scale);
  free(m->minimum);
  free(m->bias);
}

/* out [n_rows][out_stride] = x [n_rows][x_stride] by the device, in calls of `step` rows. */
static void product(sfa_context *ctx, const matrix *m, sfa_storage storage, int64_t n_rows, int64_t step, const float *x, int64_t x_stride,
                    float *out, int64_t out_stride) {
  const sfa_device *device = sfa_device_cpu();
  sfa_linear_source source = {.n_in = m->n_in,
                              .n_out = m->n_out,
                              .arg = (void *)(uintptr_t)m,
                              .row_f32 = row_f32,
                              .row_blocks = row_blocks,
                              .offset = m->offset,
                              .has_minimum = m->has_minimum,
                              .bias = m->bias};
  sfa_linear *linear;
  assert_int_equal(device->linear_create(ctx, &source, storage, &linear), SFA_OK);
  assert_true(device->linear_bytes(linear) > 0);
  void *scratch = aligned_alloc(64, sfa_align64(device->scratch_bytes(ctx, step, m->n_in)));
  for (int64_t row = 0; row < n_rows; row += step)
    device->linear(ctx, step < n_rows - row ? step : n_rows - row, x + row * x_stride, x_stride, 1,
                   &(sfa_linear_part){linear, out + row * out_stride, out_stride}, scratch);
  free(scratch);
  device->linear_destroy(ctx, linear);
}

/* Largest error of a row relative to the sum of the magnitudes that were added. */
static double product_error(const matrix *m, int64_t n_rows, const float *x, int64_t x_stride, const float *out, int64_t out_stride) {
  double worst = 0;
  for (int64_t row = 0; row < n_rows; row++)
    for (int64_t o = 0; o < m->n_out; o++) {
      double sum = m->bias ? (double)m->bias[o] : 0, magnitude = fabs(sum);
      for (int64_t i = 0; i < m->n_in; i++) {
        double term = (double)x[row * x_stride + i] * (double)m->values[o * m->n_in + i];
        sum += term;
        magnitude += fabs(term);
      }
      double error = fabs(sum - (double)out[row * out_stride + o]) / (magnitude + 1e-30);
      worst = !(error <= worst) ? error : worst;
    }
  return worst;
}

static void check_linear(sfa_storage storage, bool has_minimum, double limit) {
  static const struct {
    int32_t n_in, n_out;
    int64_t n_rows;
    bool biased;
  } shapes[] = {{1, 1, 1, false}, {31, 17, 3, true}, {64, 32, 13, false}, {172, 100, 110, true}, {576, 50, 6, false}};
  for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
    matrix m = make_matrix(shapes[s].n_in, shapes[s].n_out, storage, has_minimum, shapes[s].biased);
    int64_t n_rows = shapes[s].n_rows, x_stride = m.n_in + 3, out_stride = m.n_out + 5;
    size_t out_bytes = (size_t)(n_rows * out_stride) * sizeof(float);
    float *x = malloc((size_t)(n_rows * x_stride) * sizeof(float)), *first = malloc(out_bytes), *out = malloc(out_bytes);
    fill(x, n_rows * x_stride, 11 + s);
    memset(first, 0xff, out_bytes); /* NaN */
    sfa_context *scalar = context_of(SFA_ISA_SCALAR, 1);
    product(scalar, &m, storage, n_rows, n_rows, x, x_stride, first, out_stride);
    sfa_context_destroy(scalar);
    double error = product_error(&m, n_rows, x, x_stride, first, out_stride);
    if (!(error <= limit))
      fail_msg("storage %d, %d x %d: error %g", (int)storage, m.n_in, m.n_out, error);
    for (int64_t row = 0; row < n_rows; row++) /* nothing beyond the columns */
      for (int64_t o = m.n_out; o < out_stride; o++)
        assert_int_equal(sfa_bits_of(first[row * out_stride + o]), 0xffffffffu);
    for (int isa = SFA_ISA_SCALAR; isa <= (int)sfa_isa_best(); isa++)
      for (int64_t step = 1; step <= n_rows; step = step * 3 + 2) {
        sfa_context *ctx = context_of((sfa_isa)isa, 1 + (int32_t)step % 2);
        memset(out, 0xff, out_bytes);
        product(ctx, &m, storage, n_rows, step, x, x_stride, out, out_stride);
        assert_memory_equal(out, first, out_bytes);
        sfa_context_destroy(ctx);
      }
    free(x);
    free(first);
    free(out);
    free_matrix(&m);
  }
}

static void linear_f32(void **state) {
  (void)state;
  check_linear(SFA_STORE_F32, false, 1e-6);
}
/* The matrices hold values that bf16 and, within 2^-11, f16 represent. */
static void linear_bf16(void **state) {
  (void)state;
  check_linear(SFA_STORE_BF16, false, 1e-6);
}
static void linear_f16(void **state) {
  (void)state;
  check_linear(SFA_STORE_F16, false, 1e-6);
}
/* Inputs are rounded to 1 / 32512 of the largest in their block. */
static void linear_u8(void **state) {
  (void)state;
  check_linear(SFA_STORE_U8, false, 4e-4);
  check_linear(SFA_STORE_U8, true, 4e-4);
}
static void linear_u4(void **state) {
  (void)state;
  check_linear(SFA_STORE_U4, false, 4e-4);
  check_linear(SFA_STORE_U4, true, 4e-4);
}

/* oneDNN's products of bf16: exact products of the rounded inputs, and the same bits however rows are cut and shared out. */
static void linear_bf16_products(void **state) {
  (void)state;
  if (!has_bf16_products())
    skip();
  enum { N_ROWS = 100 };
  static const struct {
    int32_t n_in, n_out;
    bool biased;
  } shapes[] = {{1, 1, false}, {31, 17, true}, {64, 128, false}, {172, 300, true}, {577, 129, true}};
  static const int64_t steps[] = {1, 7, 31, 32, 33, 64};
  for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
    matrix m = make_matrix(shapes[s].n_in, shapes[s].n_out, SFA_STORE_BF16_PRODUCTS, false, shapes[s].biased);
    int64_t x_stride = m.n_in + 3, out_stride = m.n_out + 5;
    size_t out_bytes = (size_t)(N_ROWS * out_stride) * sizeof(float);
    float *x = malloc((size_t)(N_ROWS * x_stride) * sizeof(float)), *first = malloc(out_bytes), *out = malloc(out_bytes);
    fill(x, N_ROWS * x_stride, 11 + s);
    memset(first, 0xff, out_bytes); /* NaN */
    sfa_context *ctx = context_of(SFA_ISA_DEFAULT, 1);
    product(ctx, &m, SFA_STORE_BF16_PRODUCTS, N_ROWS, N_ROWS, x, x_stride, first, out_stride);
    sfa_context_destroy(ctx);
    for (int32_t n_threads = 1; n_threads <= 2; n_threads++)
      for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        ctx = context_of(SFA_ISA_DEFAULT, n_threads);
        memset(out, 0xff, out_bytes);
        product(ctx, &m, SFA_STORE_BF16_PRODUCTS, N_ROWS, steps[i], x, x_stride, out, out_stride);
        assert_memory_equal(out, first, out_bytes);
        sfa_context_destroy(ctx);
      }
    for (int64_t i = 0; i < N_ROWS * x_stride; i++)
      x[i] = sfa_f32_from_bf16(sfa_bf16_from_f32(x[i]));
    double error = product_error(&m, N_ROWS, x, x_stride, first, out_stride);
    if (!(error <= 1e-6))
      fail_msg("%d x %d: error %g", m.n_in, m.n_out, error);
    for (int64_t row = 0; row < N_ROWS; row++) /* nothing beyond the columns */
      for (int64_t o = m.n_out; o < out_stride; o++)
        assert_int_equal(sfa_bits_of(first[row * out_stride + o]), 0xffffffffu);
    free(x);
    free(first);
    free(out);
    free_matrix(&m);
  }
}

/* The number of threads that OpenMP may use elsewhere is the caller's: a layer puts it back. */
static void linear_leaves_threads(void **state) {
  (void)state;
  float x[8], out[8];
  if (!has_bf16_products())
    skip();
  matrix m = make_matrix(8, 8, SFA_STORE_BF16_PRODUCTS, false, false);
  int32_t before = sfa_library_threads(3);
  sfa_context *ctx = context_of(SFA_ISA_DEFAULT, 1);
  fill(x, 8, 1);
  product(ctx, &m, SFA_STORE_BF16_PRODUCTS, 1, 1, x, 8, out, 8);
  sfa_context_destroy(ctx);
  assert_int_equal(sfa_library_threads(before), 3);
  free_matrix(&m);
}

/* Several layers that share an input, of different storage and width. */
static void linear_parts(void **state) {
  (void)state;
  enum { ROWS = 5, IN = 64, STRIDE = 200 };
  const sfa_device *device = sfa_device_cpu();
  const sfa_storage storages[3] = {SFA_STORE_U4, bf16_products_or_bf16(), SFA_STORE_F32};
  const int32_t widths[3] = {100, 33, 48};
  float x[ROWS * IN], together[ROWS * STRIDE] = {0}, alone[ROWS * STRIDE] = {0};
  matrix m[3];
  sfa_linear *linears[3];
  sfa_linear_part parts[3];
  fill(x, ROWS * IN, 3);
  sfa_context *ctx = context_of(SFA_ISA_DEFAULT, 2);
  int64_t column = 0;
  for (int p = 0; p < 3; column += widths[p++]) {
    m[p] = make_matrix(IN, widths[p], storages[p], p == 0, p == 1);
    sfa_linear_source source = {IN, widths[p], &m[p], row_f32, row_blocks, m[p].offset, m[p].has_minimum, m[p].bias};
    assert_int_equal(device->linear_create(ctx, &source, storages[p], &linears[p]), SFA_OK);
    parts[p] = (sfa_linear_part){linears[p], together + column, STRIDE};
    product(ctx, &m[p], storages[p], ROWS, ROWS, x, IN, alone + column, STRIDE);
  }
  void *scratch = aligned_alloc(64, sfa_align64(device->scratch_bytes(ctx, ROWS, IN)));
  device->linear(ctx, ROWS, x, IN, 3, parts, scratch);
  assert_memory_equal(together, alone, sizeof alone);
  free(scratch);
  for (int p = 0; p < 3; p++) {
    device->linear_destroy(ctx, linears[p]);
    free_matrix(&m[p]);
  }
  device->linear_destroy(ctx, NULL);
  sfa_context_destroy(ctx);
}

/* What is not a number must reach the output, and no other row. */
static void linear_not_finite(void **state) {
  (void)state;
  const sfa_storage storages[] = {SFA_STORE_F32, bf16_products_or_bf16(), SFA_STORE_U8, SFA_STORE_U4};
  static const float bad[] = {NAN, INFINITY, -INFINITY};
  for (int isa = SFA_ISA_SCALAR; isa <= (int)sfa_isa_best(); isa++)
    for (size_t s = 0; s < sizeof storages / sizeof *storages; s++)
      for (size_t b = 0; b < 3; b++) {
        float x[3 * 70], out[3 * 20];
        matrix m = make_matrix(70, 20, storages[s], false, false);
        sfa_context *ctx = context_of((sfa_isa)isa, 1);
        fill(x, 3 * 70, 5);
        x[70 + 40] = bad[b];
        product(ctx, &m, storages[s], 3, 3, x, 70, out, 20);
        for (int o = 0; o < 20; o++) {
          assert_true(isfinite(out[o]) && isfinite(out[40 + o]));
          assert_false(isfinite(out[20 + o]));
        }
        sfa_context_destroy(ctx);
        free_matrix(&m);
      }
}

/* ---- Rows -------------------------------------------------------------------------------------------------------------------------- */

enum { ROWS = 20, STRIDE = 80 };

typedef void (*row_operation)(sfa_context *ctx, int32_t dim, float *x);

/* The operation in place on [ROWS][STRIDE], the same bits on every instruction set and number of threads; out: the result. */
static void run_everywhere(row_operation operation, int32_t dim, const float *x, float *out) {
  sfa_context *ctx = context_of(SFA_ISA_SCALAR, 1);
  memcpy(out, x, ROWS * STRIDE * sizeof *x);
  operation(ctx, dim, out);
  sfa_context_destroy(ctx);
  for (int isa = SFA_ISA_SCALAR; isa <= (int)sfa_isa_best(); isa++) {
    float again[ROWS * STRIDE];
    memcpy(again, x, sizeof again);
    ctx = context_of((sfa_isa)isa, 2);
    operation(ctx, dim, again);
    sfa_context_destroy(ctx);
    assert_memory_equal(again, out, sizeof again);
  }
}

static void assert_close(float found, double expected, double limit) {
  double error = fabs((double)found - expected);
  if (!(error <= limit * (1 + fabs(expected))))
    fail_msg("%.9g, expected %.9g", (double)found, expected);
}

static float weight[STRIDE], bias[STRIDE];

static void do_rms_norm(sfa_context *ctx, int32_t dim, float *x) {
  sfa_device_cpu()->rms_norm(ctx, ROWS, 2, dim, x, STRIDE, weight, 1e-5f, x, STRIDE);
}
static void do_layer_norm(sfa_context *ctx, int32_t dim, float *x) {
  sfa_device_cpu()->layer_norm(ctx, ROWS, dim, x, STRIDE, weight, bias, 1e-5f, x, STRIDE);
}

static void norms(void **state) {
  (void)state;
  static const int32_t dims[] = {1, 8, 16, 23, 40};
  float x[ROWS * STRIDE], out[ROWS * STRIDE];
  fill(x, ROWS * STRIDE, 21);
  fill(weight, STRIDE, 22);
  fill(bias, STRIDE, 23);
  for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
    int32_t dim = dims[d];
    run_everywhere(do_rms_norm, dim, x, out);
    for (int row = 0; row < ROWS; row++)
      for (int group = 0; group < 2; group++) {
        const float *in = x + row * STRIDE + group * dim;
        double squares = 0;
        for (int i = 0; i < dim; i++)
          squares += (double)in[i] * (double)in[i];
        for (int i = 0; i < dim; i++)
          assert_close(out[row * STRIDE + group * dim + i], (double)in[i] / sqrt(squares / dim + 1e-5) * (double)weight[i], 1e-6);
      }
    run_everywhere(do_layer_norm, dim, x, out);
    for (int row = 0; row < ROWS; row++) {
      const float *in = x + row * STRIDE;
      double mean = 0, variance = 0;
      for (int i = 0; i < dim; i++)
        mean += (double)in[i] / dim;
      for (int i = 0; i < dim; i++)
        variance += ((double)in[i] - mean) * ((double)in[i] - mean) / dim;
      for (int i = 0; i < dim; i++)
        assert_close(out[row * STRIDE + i], ((double)in[i] - mean) / sqrt(variance + 1e-5) * (double)weight[i] + (double)bias[i], 1e-5);
      for (int i = dim; i < STRIDE; i++)
        assert_true(out[row * STRIDE + i] == in[i]);
    }
  }
}

static float turn_cos[ROWS * 8], turn_sin[ROWS * 8];

static void do_rope_halves(sfa_context *ctx, int32_t dim, float *x) {
  sfa_device_cpu()->rope(ctx, ROWS, 3, dim, 8, false, turn_cos, turn_sin, x, STRIDE);
}
static void do_rope_pairs(sfa_context *ctx, int32_t dim, float *x) {
  sfa_device_cpu()->rope(ctx, ROWS, 3, dim, 8, true, turn_cos, turn_sin, x, STRIDE);
}

/* Heads of 24 features, the first 16 of which turn. */
static void rotations(void **state) {
  (void)state;
  enum { DIM = 24 };
  float x[ROWS * STRIDE], out[ROWS * STRIDE];
  fill(x, ROWS * STRIDE, 31);
  for (int i = 0; i < ROWS * 8; i++) {
    turn_cos[i] = cosf((float)i);
    turn_sin[i] = sinf((float)i);
  }
  for (int interleaved = 0; interleaved < 2; interleaved++) {
    run_everywhere(interleaved ? do_rope_pairs : do_rope_halves, DIM, x, out);
    for (int row = 0; row < ROWS; row++)
      for (int head = 0; head < 3; head++) {
        const float *in = x + row * STRIDE + head * DIM, *turned = out + row * STRIDE + head * DIM;
        for (int p = 0; p < 8; p++) {
          int a = interleaved ? 2 * p : p, b = interleaved ? 2 * p + 1 : p + 8;
          double c = (double)turn_cos[row * 8 + p], s = (double)turn_sin[row * 8 + p];
          assert_close(turned[a], (double)in[a] * c - (double)in[b] * s, 1e-6);
          assert_close(turned[b], (double)in[a] * s + (double)in[b] * c, 1e-6);
        }
        for (int i = 16; i < DIM; i++)
          assert_true(turned[i] == in[i]);
      }
  }
}

static float ups[ROWS * STRIDE];

static void do_silu(sfa_context *ctx, int32_t dim, float *x) {
  sfa_device_cpu()->activate(ctx, SFA_ACT_SILU, ROWS, dim, x, STRIDE, ups, STRIDE, x, STRIDE);
}
static void do_gelu(sfa_context *ctx, int32_t dim, float *x) {
  sfa_device_cpu()->activate(ctx, SFA_ACT_GELU_TANH, ROWS, dim, x, STRIDE, NULL, 0, x, STRIDE);
}
static void do_softcap(sfa_context *ctx, int32_t dim, float *x) { sfa_device_cpu()->softcap(ctx, ROWS, dim, 3.0f, x, STRIDE); }
static void do_add(sfa_context *ctx, int32_t dim, float *x) {
  (void)dim;
  sfa_device_cpu()->add(ctx, ROWS, STRIDE, x, ups);
}

static void curves(void **state) {
  (void)state;
  float x[ROWS * STRIDE], out[ROWS * STRIDE];
  fill(x, ROWS * STRIDE, 41);
  fill(ups, ROWS * STRIDE, 42);
  for (int i = 0; i < ROWS * STRIDE; i += 7)
    x[i] *= 30.0f;
  x[0] = -1e30f, x[1] = 1e30f, x[2] = 0.0f, x[3] = -90.0f;
  run_everywhere(do_silu, 37, x, out);
  for (int i = 0; i < 37; i++)
    assert_close(out[i], (double)x[i] / (1 + exp(-(double)x[i])) * (double)ups[i], 2e-6);
  assert_true(out[37] == x[37]);
  run_everywhere(do_gelu, 37, x, out);
  for (int i = 2; i < 37; i++) {
    double v = (double)x[i], u = sqrt(2 / 3.14159265358979323846) * (v + 0.044715 * v * v * v);
    assert_close(out[i], 0.5 * v * (1 + tanh(u)), 2e-6);
  }
  run_everywhere(do_softcap, 37, x, out);
  for (int i = 0; i < 37; i++)
    assert_close(out[i], 3 * tanh((double)x[i] / 3), 2e-6);
  run_everywhere(do_add, 0, x, out);
  for (int i = 0; i < ROWS * STRIDE; i++)
    assert_true(out[i] == x[i] + ups[i]);
  x[5] = NAN;
  run_everywhere(do_softcap, 16, x, out);
  assert_true(isnan(out[5]));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(linear_f32),
      cmocka_unit_test(linear_bf16),
      cmocka_unit_test(linear_f16),
      cmocka_unit_test(linear_u8),
      cmocka_unit_test(linear_u4),
      cmocka_unit_test(linear_parts),
      cmocka_unit_test(linear_not_finite),
      cmocka_unit_test(linear_bf16_products),
      cmocka_unit_test(linear_leaves_threads),
      cmocka_unit_test(norms),
      cmocka_unit_test(rotations),
      cmocka_unit_test(curves),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
