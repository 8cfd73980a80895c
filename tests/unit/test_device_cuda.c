/* The CUDA device against the CPU's: every operation on the same random numbers. Skipped where there is no GPU.
 *
 *     test_device_cuda [PATTERN]     tests whose name matches, as *norm*; none: all
 */
#include "base/half.h"
#include "base/rng.h"
#include "device/device_of.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <sfa/stream.h>

/* Both machines, and what was allocated for the test that runs. */
static struct {
  sfa_context *cpu, *gpu;
  const sfa_device *cpu_ops, *gpu_ops;
  const sfa_training *cpu_training, *gpu_training;
  void *of_host[64], *of_gpu[64];
  int n;
} both;

static int open_both(void **state) {
  (void)state;
  char why[256] = "";
  const sfa_context_options options = {
      .struct_size = sizeof options, .n_threads = 2, .device = SFA_DEVICE_CUDA, .why = why, .why_bytes = sizeof why};
  const sfa_context_options host = {.struct_size = sizeof host, .n_threads = 2};
  if (sfa_context_create(&host, &both.cpu) != SFA_OK || sfa_device_of(both.cpu, &both.cpu_ops, &both.cpu_training) != SFA_OK)
    return 1;
  if (sfa_context_create(&options, &both.gpu) != SFA_OK) {
    print_message("no GPU: %s\n", why);
    return 0;
  }
  if (sfa_device_of(both.gpu, &both.gpu_ops, &both.gpu_training) == SFA_OK)
    return 0;
  print_error("%s\n", sfa_context_error(both.gpu));
  return 1;
}

static int close_both(void **state) {
  (void)state;
  sfa_context_destroy(both.gpu);
  sfa_context_destroy(both.cpu);
  return 0;
}

static int begin(void **state) {
  (void)state;
  both.n = 0;
  return 0;
}

static int end(void **state) {
  (void)state;
  for (int i = 0; i < both.n; i++) {
    free(both.of_host[i]);
    sfa_memory_free(both.gpu, both.of_gpu[i]);
  }
  return 0;
}

/* An array on both machines. */
typedef struct array {
  float *host, *gpu;
  int64_t n;
} array;

static array array_of(const void *values, int64_t n) {
  array a = {malloc((size_t)n * sizeof(float)), NULL, n};
  assert_non_null(a.host);
  memcpy(a.host, values, (size_t)n * sizeof(float));
  assert_int_equal(sfa_memory_alloc(both.gpu, (size_t)n * sizeof(float), (void **)&a.gpu), SFA_OK);
  assert_int_equal(sfa_memory_copy(both.gpu, a.gpu, a.host, (size_t)n * sizeof(float)), SFA_OK);
  assert_true(both.n < 64);
  both.of_host[both.n] = a.host;
  both.of_gpu[both.n++] = a.gpu;
  return a;
}

static array randoms(int64_t n, uint64_t seed) {
  sfa_rng rng = {seed};
  float *x = malloc((size_t)n * sizeof *x);
  for (int64_t i = 0; i < n; i++)
    x[i] = (float)sfa_rng_normal(&rng);
  array a = array_of(x, n);
  free(x);
  return a;
}

static const int32_t *integers(const array *a) { return (const int32_t *)(const void *)a->host; }
static int32_t *gpu_integers(const array *a) { return (int32_t *)(void *)a->gpu; }

/* ||gpu - cpu|| / ||cpu|| <= limit; NaN never passes. */
static void check(const char *what, const array *a, double limit) {
  float *found = malloc((size_t)a->n * sizeof *found);
  if (both.gpu_ops->finish(both.gpu) != SFA_OK)
    fail_msg("%s: %s", what, sfa_context_error(both.gpu));
  assert_int_equal(sfa_memory_copy(both.gpu, found, a->gpu, (size_t)a->n * sizeof *found), SFA_OK);
  assert_int_equal(sfa_stream_wait(both.gpu), SFA_OK);
  double error = 0, size = 0, worst = -1;
  int64_t at = 0;
  for (int64_t i = 0; i < a->n; i++) {
    double difference = (double)found[i] - (double)a->host[i];
    error += difference * difference;
    size += (double)a->host[i] * (double)a->host[i];
    if (!(fabs(difference) <= worst))
      worst = fabs(difference), at = i;
  }
  double relative = sqrt(error / (size > 0 ? size : 1));
  if (!(relative <= limit))
    print_error("%s: %g of the size, worst at %lld: %g is not %g\n", what, relative, (long long)at, (double)found[at], (double)a->host[at]);
  free(found);
  assert_true(relative <= limit);
}

static void need_gpu(void) {
  if (!both.gpu)
    skip();
}

/* ---- Rows ----------------------------------------------------------------------------------------------------------------------- */

static void norms(void **state) {
  (void)state;
  need_gpu();
  static const int32_t dims[] = {1, 31, 64, 128, 576, 1030, 5000};
  for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
    int32_t dim = dims[d], groups = dim <= 128 ? 3 : 1;
    int64_t rows = 37, stride = (int64_t)groups * dim + 5;
    both.n = 0;
    array x = randoms(rows * stride, 1), w = randoms(dim, 2), b = randoms(dim, 3), out = randoms(rows * stride, 4);
    both.cpu_ops->rms_norm(both.cpu, rows, groups, dim, x.host, stride, w.host, 1e-5f, out.host, stride);
    both.gpu_ops->rms_norm(both.gpu, rows, groups, dim, x.gpu, stride, w.gpu, 1e-5f, out.gpu, stride);
    check("rms_norm", &out, 1e-5);
    both.cpu_ops->rms_norm(both.cpu, rows, groups, dim, x.host, stride, w.host, 1e-5f, x.host, stride);
    both.gpu_ops->rms_norm(both.gpu, rows, groups, dim, x.gpu, stride, w.gpu, 1e-5f, x.gpu, stride);
    check("rms_norm in place", &x, 1e-5);
    both.cpu_ops->layer_norm(both.cpu, rows, dim, x.host, stride, w.host, b.host, 1e-5f, out.host, stride);
    both.gpu_ops->layer_norm(both.gpu, rows, dim, x.gpu, stride, w.gpu, b.gpu, 1e-5f, out.gpu, stride);
    check("layer_norm", &out, 1e-5);
    end(NULL);
  }
  both.n = 0;
}

static void elements(void **state) {
  (void)state;
  need_gpu();
  enum { ROWS = 70, HEADS = 3, DIM = 64, PAIRS = 24, STRIDE = HEADS * DIM + 7 };
  array x = randoms(ROWS * STRIDE, 1), up = randoms(ROWS * STRIDE, 2), out = randoms(ROWS * STRIDE, 3), cosines = randoms(ROWS * PAIRS, 4),
        sines = randoms(ROWS * PAIRS, 5);
  for (int interleaved = 0; interleaved < 2; interleaved++) {
    both.cpu_ops->rope(both.cpu, ROWS, HEADS, DIM, PAIRS, interleaved, cosines.host, sines.host, x.host, STRIDE);
    both.gpu_ops->rope(both.gpu, ROWS, HEADS, DIM, PAIRS, interleaved, cosines.gpu, sines.gpu, x.gpu, STRIDE);
    check("rope", &x, 1e-6);
  }
  for (int act = SFA_ACT_SILU; act <= SFA_ACT_GELU_TANH; act++)
    for (int gated = 0; gated < 2; gated++) {
      both.cpu_ops->activate(both.cpu, (sfa_activation)act, ROWS, 150, x.host, STRIDE, gated ? up.host : NULL, STRIDE, out.host, STRIDE);
      both.gpu_ops->activate(both.gpu, (sfa_activation)act, ROWS, 150, x.gpu, STRIDE, gated ? up.gpu : NULL, STRIDE, out.gpu, STRIDE);
      check("activate", &out, 1e-6);
    }
  both.cpu_ops->add(both.cpu, ROWS, STRIDE, x.host, up.host);
  both.gpu_ops->add(both.gpu, ROWS, STRIDE, x.gpu, up.gpu);
  check("add", &x, 1e-6);
  both.cpu_ops->softcap(both.cpu, ROWS, 100, 3.0f, x.host, STRIDE);
  both.gpu_ops->softcap(both.gpu, ROWS, 100, 3.0f, x.gpu, STRIDE);
  check("softcap", &x, 1e-6);
  int32_t positions[ROWS];
  double frequencies[PAIRS];
  for (int i = 0; i < ROWS; i++)
    positions[i] = i * i * 17;
  for (int i = 0; i < PAIRS; i++)
    frequencies[i] = pow(10000, -i / (double)PAIRS);
  array places = array_of(positions, ROWS), turns = array_of(frequencies, 2 * PAIRS);
  both.cpu_ops->rotations(both.cpu, ROWS, integers(&places), PAIRS, frequencies, cosines.host, sines.host);
  both.gpu_ops->rotations(both.gpu, ROWS, gpu_integers(&places), PAIRS, (const double *)(const void *)turns.gpu, cosines.gpu, sines.gpu);
  check("cosines", &cosines, 1e-7);
  check("sines", &sines, 1e-7);
}

static void scores(void **state) {
  (void)state;
  need_gpu();
  enum { ROWS = 5, CLASSES = 3001 };
  array logits = randoms(ROWS * CLASSES, 1), nll = randoms(ROWS, 2), best = randoms(ROWS, 3);
  for (int row = 0; row < ROWS; row++)
    logits.host[row * CLASSES + 700 * row + 13] = logits.host[row * CLASSES + 17] = 9; /* the first of two largest */
  const int32_t targets[ROWS] = {5, 3000, 0, 13, 717};
  array wanted = array_of(targets, ROWS), x = array_of(logits.host, ROWS * CLASSES);
  both.cpu_ops->score(both.cpu, ROWS, CLASSES, x.host, targets, nll.host, (int32_t *)(void *)best.host);
  both.gpu_ops->score(both.gpu, ROWS, CLASSES, x.gpu, gpu_integers(&wanted), nll.gpu, gpu_integers(&best));
  check("nll", &nll, 1e-6);
  int32_t found[ROWS];
  assert_int_equal(sfa_memory_copy(both.gpu, found, best.gpu, sizeof found), SFA_OK);
  assert_int_equal(sfa_stream_wait(both.gpu), SFA_OK);
  assert_memory_equal(found, best.host, sizeof found);
}

/* ---- Linear layers ---------------------------------------------------------------------------------------------------------------- */

typedef struct matrix {
  int32_t n_in, n_out;
  const float *values;
} matrix;

static void row_of(void *arg, int64_t row, float *out) {
  const matrix *m = arg;
  memcpy(out, m->values + row * m->n_in, (size_t)m->n_in * sizeof *out);
}

typedef struct layer {
  sfa_linear *cpu, *gpu;
} layer;

static layer make_layer(int32_t n_in, int32_t n_out, bool bf16, bool biased, uint64_t seed) {
  array values = randoms((int64_t)n_in * n_out, seed), bias = randoms(n_out, seed + 1);
  for (int64_t i = 0; bf16 && i < values.n; i++)
    values.host[i] = sfa_f32_from_bf16(sfa_bf16_from_f32(values.host[i]));
  matrix m = {n_in, n_out, values.host};
  const sfa_linear_source source = {.n_in = n_in, .n_out = n_out, .arg = &m, .row_f32 = row_of, .bias = biased ? bias.host : NULL};
  layer l;
  const sfa_storage storage = bf16 ? SFA_STORE_BF16 : SFA_STORE_F32;
  assert_int_equal(both.cpu_ops->linear_create(both.cpu, &source, storage, &l.cpu), SFA_OK);
  assert_int_equal(both.gpu_ops->linear_create(both.gpu, &source, both.gpu_ops->fast_storage(both.gpu, storage), &l.gpu), SFA_OK);
  assert_true(both.gpu_ops->linear_bytes(l.gpu) > 0);
  return l;
}

static void free_layer(layer *l) {
  both.cpu_ops->linear_destroy(both.cpu, l->cpu);
  both.gpu_ops->linear_destroy(both.gpu, l->gpu);
}

/* Norm, two layers, activation and addition, by the CPU's operations one by one. */
static void project_by_steps(const sfa_projection *t, int32_t n_in, int32_t n_out, float *normed, float *sums) {
  const sfa_device *ops = both.cpu_ops;
  void *scratch = aligned_alloc(64, sfa_align64(ops->scratch_bytes(both.cpu, t->n_rows, n_in) + 1));
  for (int64_t row = 0; row < t->n_rows; row++)
    memcpy(normed + row * n_in, t->x + row * t->x_stride, (size_t)n_in * sizeof *normed);
  if (t->norm_weight && t->center)
    ops->layer_norm(both.cpu, t->n_rows, n_in, normed, n_in, t->norm_weight, t->norm_bias, t->norm_eps, normed, n_in);
  else if (t->norm_weight)
    ops->rms_norm(both.cpu, t->n_rows, 1, n_in, normed, n_in, t->norm_weight, t->norm_eps, normed, n_in);
  sfa_linear_part parts[2];
  for (int p = 0; p < t->n_parts; p++)
    parts[p] = (sfa_linear_part){t->parts[p].linear, sums + p * n_out, 2 * n_out};
  ops->linear(both.cpu, t->n_rows, normed, n_in, t->n_parts, parts, scratch);
  free(scratch);
  if (t->activated)
    ops->activate(both.cpu, t->activation, t->n_rows, n_out, sums, 2 * n_out, t->n_parts == 2 ? sums + n_out : NULL, 2 * n_out, sums,
                  2 * n_out);
  for (int p = 0; p < (t->activated ? 1 : t->n_parts); p++)
    for (int64_t row = 0; row < t->n_rows; row++)
      for (int32_t i = 0; i < n_out; i++) {
        float *to = t->parts[p].out + row * t->parts[p].out_stride + i, y = sums[row * 2 * n_out + p * n_out + i];
        *to = t->add ? *to + y : y;
      }
}

static void check_projection(int32_t n_in, int32_t n_out, int64_t n_rows, bool bf16, int variant) {
  int64_t x_stride = n_in + 4, out_stride = n_out + 3;
  layer layers[2] = {make_layer(n_in, n_out, bf16, variant & 1, 10), make_layer(n_in, n_out, bf16, true, 20)};
  array x = randoms(n_rows * x_stride, 1), w = randoms(n_in, 2), b = randoms(n_in, 3), out = randoms(n_rows * out_stride, 4),
        second = randoms(n_rows * out_stride, 5), normed = randoms(n_rows * n_in, 6), sums = randoms(n_rows * 2 * n_out, 7);
  bool activated = variant == 2 || variant == 4, norm = variant > 0;
  sfa_projection t = {.n_rows = n_rows,
                      .x_stride = x_stride,
                      .center = variant == 3,
                      .norm_eps = 1e-5f,
                      .n_parts = variant == 4 ? 1 : 2,
                      .activated = activated,
                      .activation = variant == 4 ? SFA_ACT_GELU_TANH : SFA_ACT_SILU,
                      .add = variant == 3};
  sfa_linear_part on_cpu[2] = {{layers[0].cpu, out.host, out_stride}, {layers[1].cpu, second.host, out_stride}};
  sfa_linear_part on_gpu[2] = {{layers[0].gpu, out.gpu, out_stride}, {layers[1].gpu, second.gpu, out_stride}};
  t.x = x.host, t.norm_weight = norm ? w.host : NULL, t.norm_bias = t.center ? b.host : NULL, t.parts = on_cpu;
  project_by_steps(&t, n_in, n_out, normed.host, sums.host);
  t.x = x.gpu, t.norm_weight = norm ? w.gpu : NULL, t.norm_bias = t.center ? b.gpu : NULL, t.parts = on_gpu;
  both.gpu_ops->project(both.gpu, &t);
  char what[128];
  snprintf(what, sizeof what, "%d x %d, %lld rows, %s, variant %d", n_in, n_out, (long long)n_rows, bf16 ? "bf16" : "f32", variant);
  double limit = bf16 && n_rows > 8 ? 8e-3 : 1e-5;
  check(what, &out, limit);
  if (!activated)
    check(what, &second, limit);
  free_layer(&layers[0]);
  free_layer(&layers[1]);
}

static void projections(void **state) {
  (void)state;
  need_gpu();
  static const struct { int32_t n_in, n_out; } shapes[] = {{1, 1}, {31, 17}, {64, 172}, {172, 64}, {576, 960}, {1536, 576}, {9000, 40}};
  static const int64_t rows[] = {1, 2, 7, 8, 9, 130};
  for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
      for (int variant = 0; variant < 5; variant++)
        for (int bf16 = 0; bf16 < 2; bf16++) {
          both.n = 0;
          check_projection(shapes[s].n_in, shapes[s].n_out, rows[r], bf16, variant);
          end(NULL);
        }
  both.n = 0;
}

/* q, k and v into columns of one array; and rows of a table. */
static void parts_and_tables(void **state) {
  (void)state;
  need_gpu();
  enum { N_IN = 96, ROWS = 40, STRIDE = 64 + 32 + 32 };
  layer q = make_layer(N_IN, 64, true, true, 1), k = make_layer(N_IN, 32, true, false, 3), v = make_layer(N_IN, 32, false, false, 5);
  array x = randoms(ROWS * N_IN, 7), out = randoms(ROWS * STRIDE, 8);
  const sfa_linear_part on_cpu[] = {{q.cpu, out.host, STRIDE}, {k.cpu, out.host + 64, STRIDE}, {v.cpu, out.host + 96, STRIDE}};
  const sfa_linear_part on_gpu[] = {{q.gpu, out.gpu, STRIDE}, {k.gpu, out.gpu + 64, STRIDE}, {v.gpu, out.gpu + 96, STRIDE}};
  void *scratch = aligned_alloc(64, sfa_align64(both.cpu_ops->scratch_bytes(both.cpu, ROWS, N_IN) + 1));
  for (int64_t n = 3; n <= ROWS; n += 37) {
    both.cpu_ops->linear(both.cpu, n, x.host, N_IN, 3, on_cpu, scratch);
    both.gpu_ops->linear(both.gpu, n, x.gpu, N_IN, 3, on_gpu, NULL);
    check("three parts", &out, 8e-3);
  }
  free(scratch);
  int32_t ids[ROWS];
  for (int i = 0; i < ROWS; i++)
    ids[i] = i * 13 % 32;
  array wanted = array_of(ids, ROWS), rows = randoms(ROWS * N_IN, 9), table = randoms(32 * N_IN, 5); /* the values of v */
  both.cpu_training->gather(both.cpu, ROWS, N_IN, table.host, ids, 2.5f, true, rows.host);
  both.gpu_ops->rows(both.gpu, ROWS, v.gpu, gpu_integers(&wanted), 2.5f, true, rows.gpu);
  check("rows", &rows, 1e-6);
  free_layer(&q);
  free_layer(&k);
  free_layer(&v);
}

/* A record gives what its operations gave, from what is in their inputs when it runs. */
static void records(void **state) {
  (void)state;
  need_gpu();
  enum { N_IN = 64, N_OUT = 48 };
  layer l = make_layer(N_IN, N_OUT, true, true, 1);
  array x = randoms(N_IN, 3), w = randoms(N_IN, 4), out = randoms(N_OUT, 5), normed = randoms(N_IN, 6);
  void *record = NULL;
  assert_int_equal(both.gpu_ops->record_begin(both.gpu), SFA_OK);
  both.gpu_ops->rms_norm(both.gpu, 1, 1, N_IN, x.gpu, N_IN, w.gpu, 1e-5f, normed.gpu, N_IN);
  both.gpu_ops->linear(both.gpu, 1, normed.gpu, N_IN, 1, &(sfa_linear_part){l.gpu, out.gpu, N_OUT}, NULL);
  assert_int_equal(both.gpu_ops->record_end(both.gpu, &record), SFA_OK);
  assert_non_null(record);
  void *scratch = aligned_alloc(64, sfa_align64(both.cpu_ops->scratch_bytes(both.cpu, 1, N_IN) + 1));
  for (int round = 0; round < 3; round++) {
    for (int i = 0; i < N_IN; i++)
      x.host[i] += (float)round;
    assert_int_equal(sfa_memory_copy(both.gpu, x.gpu, x.host, N_IN * sizeof(float)), SFA_OK);
    assert_int_equal(both.gpu_ops->record_run(both.gpu, record), SFA_OK);
    both.cpu_ops->rms_norm(both.cpu, 1, 1, N_IN, x.host, N_IN, w.host, 1e-5f, normed.host, N_IN);
    both.cpu_ops->linear(both.cpu, 1, normed.host, N_IN, 1, &(sfa_linear_part){l.cpu, out.host, N_OUT}, scratch);
    check("a record", &out, 1e-5);
  }
  free(scratch);
  both.gpu_ops->record_destroy(both.gpu, record);
  free_layer(&l);
}

/* ---- Training --------------------------------------------------------------------------------------------------------------------- */

static void products(void **state) {
  (void)state;
  need_gpu();
  static const int64_t shapes[][3] = {{1, 1, 1}, {33, 17, 65}, {128, 96, 300}, {200, 576, 64}};
  void *scratch = aligned_alloc(64, sfa_align64(both.cpu_training->scratch_bytes(600)));
  for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
    for (int variant = 0; variant < 32; variant++) {
      const int64_t m = shapes[s][0], n = shapes[s][1], k = shapes[s][2];
      bool a_turned = variant & 1, b_turned = variant & 2, biased = variant & 4, add = variant & 8, bf16 = variant & 16;
      both.n = 0;
      array a = randoms(m * k, 1), b = randoms(k * n, 2), bias = randoms(n, 3), out = randoms(m * (n + 5), 4);
      sfa_product p = {.m = m,
                       .n = n,
                       .k = k,
                       .a = {a.host, a_turned ? 1 : k, a_turned ? m : 1},
                       .b = {b.host, b_turned ? 1 : n, b_turned ? k : 1},
                       .bias = biased ? bias.host : NULL,
                       .add = add,
                       .bf16 = bf16,
                       .out = out.host,
                       .out_stride = n + 5};
      both.cpu_training->product(both.cpu, &p, scratch);
      p.a.data = a.gpu, p.b.data = b.gpu, p.bias = biased ? bias.gpu : NULL, p.out = out.gpu;
      both.gpu_training->product(both.gpu, &p, NULL);
      char what[96];
      snprintf(what, sizeof what, "product %lld %lld %lld variant %d", (long long)m, (long long)n, (long long)k, variant);
      check(what, &out, bf16 ? 6e-3 : 1e-5);
      end(NULL);
    }
  free(scratch);
  both.n = 0;
}

static void backward_of_norms(void **state) {
  (void)state;
  need_gpu();
  static const int32_t dims[] = {5, 64, 576, 1500};
  void *scratch = aligned_alloc(64, sfa_align64(both.cpu_training->scratch_bytes(6000)));
  for (size_t d = 0; d < sizeof dims / sizeof *dims; d++)
    for (int variant = 0; variant < 8; variant++) {
      int32_t dim = dims[d], groups = dim == 64 ? 3 : 1;
      int64_t rows = 150, stride = (int64_t)groups * dim + 2;
      both.n = 0;
      array x = randoms(rows * stride, 1), dy = randoms(rows * stride, 2), w = randoms(dim, 3), dx = randoms(rows * stride, 4),
            dw = randoms(dim, 5), db = randoms(dim, 6);
      bool center = (variant & 1) && groups == 1, add = variant & 2, in_place = variant & 4;
      sfa_norm_backward t = {.n_rows = rows,
                             .n_groups = groups,
                             .dim = dim,
                             .center = center,
                             .eps = 1e-5f,
                             .x_stride = stride,
                             .d_out_stride = stride,
                             .d_x_stride = stride,
                             .add = add && !in_place};
      t.weight = w.host, t.x = x.host, t.d_out = dy.host, t.d_x = in_place ? dy.host : dx.host, t.d_weight = dw.host;
      t.d_bias = center ? db.host : NULL;
      both.cpu_training->norm_backward(both.cpu, &t, scratch);
      t.weight = w.gpu, t.x = x.gpu, t.d_out = dy.gpu, t.d_x = in_place ? dy.gpu : dx.gpu, t.d_weight = dw.gpu;
      t.d_bias = center ? db.gpu : NULL;
      both.gpu_training->norm_backward(both.gpu, &t, NULL);
      check("d_x", in_place ? &dy : &dx, 2e-5);
      check("d_weight", &dw, 2e-5);
      check("d_bias", &db, 2e-5);
      end(NULL);
    }
  free(scratch);
  both.n = 0;
}

static void losses(void **state) {
  (void)state;
  need_gpu();
  enum { ROWS = 9, CLASSES = 1003 };
  for (int variant = 0; variant < 8; variant++) {
    both.n = 0;
    array x = randoms(ROWS * CLASSES, 1), teacher = randoms(ROWS * CLASSES, 2), loss = randoms(ROWS, 3), apart = randoms(ROWS, 4);
    int32_t wanted[ROWS];
    for (int i = 0; i < ROWS; i++)
      wanted[i] = i % 4 == 3 ? -1 : i * 111;
    array targets = array_of(wanted, ROWS);
    bool taught = variant & 1, capped = variant & 2, backward = variant & 4;
    sfa_loss t = {.n_rows = ROWS,
                  .n_classes = CLASSES,
                  .logits = x.host,
                  .targets = wanted,
                  .softcap = capped ? 5.0f : 0.0f,
                  .backward = backward,
                  .target_scale = 0.3f,
                  .teacher = taught ? teacher.host : NULL,
                  .teacher_scale = 0.7f,
                  .temperature = 2.0f,
                  .losses = loss.host,
                  .divergences = apart.host};
    both.cpu_training->loss(both.cpu, &t);
    t.logits = x.gpu, t.targets = gpu_integers(&targets), t.teacher = taught ? teacher.gpu : NULL, t.losses = loss.gpu;
    t.divergences = apart.gpu;
    both.gpu_training->loss(both.gpu, &t);
    check("gradients of logits", &x, 1e-5);
    check("losses", &loss, 1e-6);
    check("divergences", &apart, 1e-5);
    end(NULL);
  }
  both.n = 0;
}

static void sums_and_steps(void **state) {
  (void)state;
  need_gpu();
  enum { ROWS = 700, DIM = 300, N = ROWS * DIM };
  array x = randoms(N, 1), up = randoms(N, 2), dy = randoms(N, 3), dx = randoms(N, 4), dup = randoms(N, 5), sum = randoms(DIM, 6);
  void *scratch = aligned_alloc(64, sfa_align64(both.cpu_training->scratch_bytes(DIM)));
  both.cpu_training->column_sum(both.cpu, ROWS, DIM - 3, x.host, DIM, sum.host, scratch);
  both.gpu_training->column_sum(both.gpu, ROWS, DIM - 3, x.gpu, DIM, sum.gpu, NULL);
  check("column_sum", &sum, 1e-5);
  free(scratch);
  for (int act = SFA_ACT_SILU; act <= SFA_ACT_GELU_TANH; act++)
    for (int gated = 0; gated < 2; gated++) {
      both.cpu_training->activate_backward(both.cpu, (sfa_activation)act, ROWS, DIM, x.host, DIM, gated ? up.host : NULL, DIM, dy.host, DIM,
                                           dx.host, DIM, dup.host, DIM);
      both.gpu_training->activate_backward(both.gpu, (sfa_activation)act, ROWS, DIM, x.gpu, DIM, gated ? up.gpu : NULL, DIM, dy.gpu, DIM,
                                           dx.gpu, DIM, dup.gpu, DIM);
      check("d_x of activate", &dx, 2e-6);
      check("d_up of activate", &dup, 2e-6);
    }
  int32_t places[ROWS];
  for (int i = 0; i < ROWS; i++)
    places[i] = i % 3 == 0 ? 7 : i * 31 % 200;
  array ids = array_of(places, ROWS), table = randoms(200 * DIM, 7);
  for (int add = 0; add < 2; add++) {
    both.cpu_training->gather(both.cpu, ROWS, DIM, table.host, places, 1.5f, add, dx.host);
    both.gpu_training->gather(both.gpu, ROWS, DIM, table.gpu, gpu_integers(&ids), 1.5f, add, dx.gpu);
    check("gather", &dx, 1e-6);
    both.cpu_training->scale(both.cpu, N, -0.5f, x.host, add, up.host);
    both.gpu_training->scale(both.gpu, N, -0.5f, x.gpu, add, up.gpu);
    check("scale", &up, 1e-6);
  }
  both.cpu_training->scatter_add(both.cpu, ROWS, DIM, x.host, places, 0.5f, table.host);
  both.gpu_training->scatter_add(both.gpu, ROWS, DIM, x.gpu, gpu_integers(&ids), 0.5f, table.gpu);
  check("scatter_add", &table, 1e-6);
  const sfa_adamw how = {
      .rate = 1e-2f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .decay = 0.1f, .correction1 = 0.1f, .correction2 = 0.05f};
  for (int64_t i = 0; i < N; i++)
    dup.host[i] = fabsf(dup.host[i]);
  array m = randoms(N, 8), v = array_of(dup.host, N);
  both.cpu_training->adamw(both.cpu, &how, N, dy.host, m.host, v.host, x.host);
  both.gpu_training->adamw(both.gpu, &how, N, dy.gpu, m.gpu, v.gpu, x.gpu);
  check("adamw: m", &m, 1e-6);
  check("adamw: v", &v, 1e-6);
  check("adamw: value", &x, 1e-6);
  both.cpu_training->copy_rows(both.cpu, ROWS, 50, x.host + 10, DIM, dx.host + 20, DIM);
  both.gpu_training->copy_rows(both.gpu, ROWS, 50, x.gpu + 10, DIM, dx.gpu + 20, DIM);
  check("copy_rows", &dx, 1e-6);
  both.cpu_training->shift(both.cpu, N, x.host, 1.0f, up.host);
  both.gpu_training->shift(both.gpu, N, x.gpu, 1.0f, up.gpu);
  check("shift", &up, 1e-6);
  for (int64_t i = 0; i < N; i += 3)
    up.host[i] = 0;
  assert_int_equal(sfa_memory_copy(both.gpu, up.gpu, up.host, N * sizeof(float)), SFA_OK);
  both.cpu_training->keep_where(both.cpu, N, up.host, x.host);
  both.gpu_training->keep_where(both.gpu, N, up.gpu, x.gpu);
  check("keep_where", &x, 1e-6);
}

/* Norms, the factors they lead to, and who uses them, as often as twice: the same bits. */
static void clipped_steps(void **state) {
  (void)state;
  need_gpu();
  enum { N = 210001, SUMS = 3 };
  static const int64_t lengths[SUMS] = {1, 700, N};
  const double limits[] = {0, 10, 1e9};
  array x = randoms(N, 1), out = randoms(N, 2), m = randoms(N, 3), value = randoms(N, 5), v = array_of(m.host, N);
  for (int64_t i = 0; i < N; i++)
    v.host[i] = fabsf(v.host[i]);
  assert_int_equal(sfa_memory_copy(both.gpu, v.gpu, v.host, N * sizeof(float)), SFA_OK);
  double sums[SUMS], found_sums[2][SUMS], *gpu_sums;
  sfa_clip clip, found[2], *gpu_clip;
  assert_int_equal(sfa_memory_alloc(both.gpu, sizeof sums, (void **)&gpu_sums), SFA_OK);
  assert_int_equal(sfa_memory_alloc(both.gpu, sizeof clip, (void **)&gpu_clip), SFA_OK);
  for (int variant = 0; variant < 4; variant++) {
    const double limit = limits[variant % 3];
    if (variant == 3) { /* a gradient that is not finite: nothing moves */
      x.host[N / 2] = NAN;
      assert_int_equal(sfa_memory_copy(both.gpu, x.gpu, x.host, N * sizeof(float)), SFA_OK);
    }
    for (int i = 0; i < SUMS; i++)
      both.cpu_training->square_sum(both.cpu, lengths[i], x.host, &sums[i]);
    both.cpu_training->clip(both.cpu, SUMS, sums, limit, &clip);
    for (int again = 0; again < 2; again++) {
      for (int i = 0; i < SUMS; i++)
        both.gpu_training->square_sum(both.gpu, lengths[i], x.gpu, gpu_sums + i);
      both.gpu_training->clip(both.gpu, SUMS, gpu_sums, limit, gpu_clip);
      assert_int_equal(sfa_memory_copy(both.gpu, found_sums[again], gpu_sums, sizeof sums), SFA_OK);
      assert_int_equal(sfa_memory_copy(both.gpu, &found[again], gpu_clip, sizeof clip), SFA_OK);
      assert_int_equal(sfa_stream_wait(both.gpu), SFA_OK);
    }
    assert_memory_equal(found_sums[0], found_sums[1], sizeof sums);
    assert_memory_equal(&found[0].norm, &found[1].norm, sizeof clip.norm);
    assert_memory_equal(&found[0].factor, &found[1].factor, sizeof clip.factor);
    if (variant == 3) {
      assert_true(isnan(clip.norm) && isnan(found[0].norm));
    } else {
      for (int i = 0; i < SUMS; i++)
        assert_true(fabs(sums[i] - found_sums[0][i]) <= 1e-12 * sums[i]);
      assert_true(fabs(clip.norm - found[0].norm) <= 1e-12 * clip.norm);
      assert_true(fabsf(clip.factor - found[0].factor) <= 1e-7f * clip.factor);
      both.cpu_training->add_share(both.cpu, N, 3.0, &sums[1], x.host, out.host);
      both.gpu_training->add_share(both.gpu, N, 3.0, gpu_sums + 1, x.gpu, out.gpu);
      check("add_share", &out, 1e-6);
    }
    sfa_adamw how = {.rate = 1e-2f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .decay = 0.1f, .correction1 = 0.1f, .correction2 = 0.05f};
    how.clip = &clip;
    both.cpu_training->adamw(both.cpu, &how, N, x.host, m.host, v.host, value.host);
    how.clip = gpu_clip;
    both.gpu_training->adamw(both.gpu, &how, N, x.gpu, m.gpu, v.gpu, value.gpu);
    check("clipped adamw: m", &m, 1e-6);
    check("clipped adamw: v", &v, 1e-6);
    check("clipped adamw: value", &value, 1e-6);
  }
  sums[0] = 0;
  assert_int_equal(sfa_memory_copy(both.gpu, gpu_sums, sums, sizeof sums), SFA_OK);
  both.gpu_training->add_share(both.gpu, N, 3.0, gpu_sums, x.gpu, out.gpu); /* nothing, though x has a NaN */
  check("add_share over 0", &out, 1e-6);
  float most = -1, *gpu_most;
  assert_int_equal(sfa_memory_alloc(both.gpu, sizeof most, (void **)&gpu_most), SFA_OK);
  assert_int_equal(sfa_memory_zero(both.gpu, gpu_most, sizeof most), SFA_OK);
  float expected = 0;
  both.cpu_ops->keep_most(both.cpu, N, v.host, &expected);
  both.gpu_ops->keep_most(both.gpu, N, v.gpu, gpu_most);
  both.gpu_ops->keep_most(both.gpu, 3, m.gpu, gpu_most);
  both.cpu_ops->keep_most(both.cpu, 3, m.host, &expected);
  assert_int_equal(sfa_memory_copy(both.gpu, &most, gpu_most, sizeof most), SFA_OK);
  assert_int_equal(sfa_stream_wait(both.gpu), SFA_OK);
  assert_true(fabsf(most - expected) <= 1e-6f * expected);
  sfa_memory_free(both.gpu, gpu_sums);
  sfa_memory_free(both.gpu, gpu_clip);
  sfa_memory_free(both.gpu, gpu_most);
}

#define ONE(function) cmocka_unit_test_setup_teardown(function, begin, end)

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      ONE(norms),    ONE(elements),          ONE(scores), ONE(projections),    ONE(parts_and_tables), ONE(records),
      ONE(products), ONE(backward_of_norms), ONE(losses), ONE(sums_and_steps), ONE(clipped_steps),
  };
  if (argc > 1)
    cmocka_set_test_filter(argv[1]);
  return cmocka_run_group_tests(tests, open_both, close_both);
}
