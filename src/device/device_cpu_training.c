/* Training on the CPU: work cut by shape over the context's threads, kernels of the context's instruction set. */
#include "device/training_kernels.h"

#include <math.h>
#include <string.h>

static const sfa_training_kernels *kernels_of(const sfa_context *ctx) {
#if defined(__x86_64__)
  if (ctx->isa >= SFA_ISA_AVX512 && __builtin_cpu_supports("avx512vnni"))
    return &sfa_training_kernels_avx512;
  if (ctx->isa >= SFA_ISA_AVX2)
    return &sfa_training_kernels_avx2;
#endif
  (void)ctx;
  return &sfa_training_kernels_scalar;
}

static const sfa_product_kernels *product_kernels_of(const sfa_context *ctx, bool bf16) {
#if defined(__x86_64__)
  if (ctx->isa == SFA_ISA_AMX && bf16)
    return &sfa_product_kernels_amx;
#endif
  (void)bf16;
  return &kernels_of(ctx)->products;
}

static void product(const sfa_context *ctx, const sfa_product *p, void *scratch) {
  sfa_product_run(ctx, product_kernels_of(ctx, p->bf16), p, scratch);
}

/* ---- Sums over rows --------------------------------------------------------------------------------------------------------------- */

/* Rows are summed in so many pieces, cut by their number alone, then the pieces in order. */
enum { PIECES = 64 };

static size_t scratch_bytes(int64_t max_dim) {
  size_t products = sfa_product_scratch_bytes(max_dim), sums = (size_t)max_dim * 2 * PIECES * sizeof(float);
  return products > sums ? products : sums;
}

typedef struct sum_job {
  const sfa_training_kernels *kernels;
  int64_t n_rows, x_stride;
  int32_t dim, n_sums;
  const float *x;
  const sfa_norm_backward *norm;
  float *sums; /* [PIECES][n_sums][dim] */
} sum_job;

static void sum_piece(void *arg, int64_t piece, int32_t thread) {
  (void)thread;
  const sum_job *job = arg;
  float *sums = job->sums + piece * job->n_sums * job->dim;
  memset(sums, 0, (size_t)job->n_sums * (size_t)job->dim * sizeof *sums);
  for (int64_t row = piece * job->n_rows / PIECES; row < (piece + 1) * job->n_rows / PIECES; row++) {
    if (!job->norm) {
      job->kernels->scale(job->dim, 1.0f, job->x + row * job->x_stride, true, sums);
      continue;
    }
    const sfa_norm_backward *t = job->norm;
    for (int64_t group = 0; group < t->n_groups; group++) {
      int64_t at = group * t->dim;
      job->kernels->norm_backward(t, t->x + row * t->x_stride + at, t->d_out + row * t->d_out_stride + at,
                                  t->d_x + row * t->d_x_stride + at, t->d_weight ? sums : NULL, t->d_bias ? sums + t->dim : NULL);
    }
  }
}

static void join_pieces(const sum_job *job, int32_t index, float *out) {
  for (int64_t piece = 0; piece < PIECES; piece++)
    job->kernels->scale(job->dim, 1.0f, job->sums + (piece * job->n_sums + index) * job->dim, true, out);
}

static void column_sum(const sfa_context *ctx, int64_t n_rows, int32_t dim, const float *x, int64_t x_stride, float *out, void *scratch) {
  sum_job job = {.kernels = kernels_of(ctx), .n_rows = n_rows, .dim = dim, .n_sums = 1, .x = x, .x_stride = x_stride, .sums = scratch};
  sfa_parallel(ctx, PIECES, sum_piece, &job);
  join_pieces(&job, 0, out);
}

static void norm_backward(const sfa_context *ctx, const sfa_norm_backward *norm, void *scratch) {
  sum_job job = {.kernels = kernels_of(ctx), .n_rows = norm->n_rows, .dim = norm->dim, .n_sums = 2, .norm = norm, .sums = scratch};
  sfa_parallel(ctx, PIECES, sum_piece, &job);
  if (norm->d_weight)
    join_pieces(&job, 0, norm->d_weight);
  if (norm->d_bias)
    join_pieces(&job, 1, norm->d_bias);
}

/* ---- Row by row ------------------------------------------------------------------------------------------------------------------- */

typedef struct row_job {
  const sfa_training_kernels *kernels;
  sfa_activation act;
  int64_t n_rows, x_stride, up_stride, d_out_stride, d_x_stride, d_up_stride;
  int32_t dim;
  const float *x, *up, *d_out;
  float *d_x, *d_up;
  const int32_t *ids;
  float scale;
  bool add;
  const sfa_loss *loss;
} row_job;

static void activate_backward_row(void *arg, int64_t row, int32_t thread) {
  (void)thread;
  const row_job *j = arg;
  j->kernels->activate_backward(j->act, j->dim, j->x + row * j->x_stride, j->up ? j->up + row * j->up_stride : NULL,
                                j->d_out + row * j->d_out_stride, j->d_x + row * j->d_x_stride,
                                j->up ? j->d_up + row * j->d_up_stride : NULL);
}

static void activate_backward(const sfa_context *ctx, sfa_activation act, int64_t n_rows, int32_t dim, const float *x, int64_t x_stride,
                              const float *up, int64_t up_stride, const float *d_out, int64_t d_out_stride, float *d_x, int64_t d_x_stride,
                              float *d_up, int64_t d_up_stride) {
  row_job job = {.kernels = kernels_of(ctx),
                 .act = act,
                 .dim = dim,
                 .x = x,
                 .x_stride = x_stride,
                 .up = up,
                 .up_stride = up_stride,
                 .d_out = d_out,
                 .d_out_stride = d_out_stride,
                 .d_x = d_x,
                 .d_x_stride = d_x_stride,
                 .d_up = d_up,
                 .d_up_stride = d_up_stride};
  sfa_parallel(ctx, n_rows, activate_backward_row, &job);
}

static void gather_row(void *arg, int64_t row, int32_t thread) {
  (void)thread;
  const row_job *j = arg;
  j->kernels->scale(j->dim, j->scale, j->x + (int64_t)j->ids[row] * j->dim, j->add, j->d_x + row * j->dim);
}

static void gather(const sfa_context *ctx, int64_t n_rows, int32_t dim, const float *table, const int32_t *ids, float scale, bool add,
                   float *out) {
  row_job job = {.kernels = kernels_of(ctx), .dim = dim, .x = table, .ids = ids, .scale = scale, .add = add, .d_x = out};
  sfa_parallel(ctx, n_rows, gather_row, &job);
}

/* Columns are shared out, so that every element meets its rows in order. */
enum { SCATTER_COLUMNS = 32 };

static void scatter_columns(void *arg, int64_t item, int32_t thread) {
  (void)thread;
  const row_job *j = arg;
  int64_t first = item * SCATTER_COLUMNS;
  int32_t n = (int32_t)sfa_min64(SCATTER_COLUMNS, j->dim - first);
  for (int64_t row = 0; row < j->n_rows; row++)
    j->kernels->scale(n, j->scale, j->x + row * j->dim + first, true, j->d_x + (int64_t)j->ids[row] * j->dim + first);
}

static void scatter_add(const sfa_context *ctx, int64_t n_rows, int32_t dim, const float *x, const int32_t *ids, float scale,
                        float *table) {
  row_job job = {.kernels = kernels_of(ctx), .n_rows = n_rows, .dim = dim, .x = x, .ids = ids, .scale = scale, .d_x = table};
  sfa_parallel(ctx, (dim + SCATTER_COLUMNS - 1) / SCATTER_COLUMNS, scatter_columns, &job);
}

static void loss_row(void *arg, int64_t row, int32_t thread) {
  (void)thread;
  const row_job *j = arg;
  j->kernels->loss(j->loss, row);
}

static void loss(const sfa_context *ctx, const sfa_loss *t) {
  sfa_parallel(ctx, t->n_rows, loss_row, &(row_job){.kernels = kernels_of(ctx), .loss = t});
}

/* ---- Whole arrays ----------------------------------------------------------------------------------------------------------------- */

enum { ELEMENTS_AN_ITEM = 1 << 15, SUMS = 64 };

typedef struct step_job {
  const sfa_training_kernels *kernels;
  const sfa_adamw *how;
  float factor;
  bool add;
  int64_t n, first;
  const float *gradient; /* or any operand */
  float *m, *v, *value;
  double *sums; /* [SUMS] */
} step_job;

static int64_t items_of(int64_t n) { return (n + ELEMENTS_AN_ITEM - 1) / ELEMENTS_AN_ITEM; }

static void sum_item(void *arg, int64_t item, int32_t thread) {
  (void)thread;
  const step_job *j = arg;
  int64_t at = (j->first + item) * ELEMENTS_AN_ITEM;
  j->sums[item] = j->kernels->square_sum((int32_t)sfa_min64(ELEMENTS_AN_ITEM, j->n - at), j->gradient + at);
}

static void square_sum(const sfa_context *ctx, int64_t n, const float *x, double *sum) {
  double sums[SUMS];
  step_job job = {.kernels = kernels_of(ctx), .n = n, .gradient = x, .sums = sums};
  *sum = 0;
  for (; job.first < items_of(n); job.first += SUMS) {
    int64_t n_items = sfa_min64(SUMS, items_of(n) - job.first);
    sfa_parallel(ctx, n_items, sum_item, &job);
    for (int64_t i = 0; i < n_items; i++)
      *sum += sums[i];
  }
}

static void clip(const sfa_context *ctx, int32_t n, const double *sums, double most, sfa_clip *clip) {
  double sum = 0;
  (void)ctx;
  for (int32_t i = 0; i < n; i++)
    sum += sums[i];
  clip->norm = sqrt(sum);
  clip->factor = (float)(most > 0 ? fmin(1, most / (clip->norm + 1e-6)) : 1); /* 1e-6 as PyTorch has it */
}

static void scale_item(void *arg, int64_t item, int32_t thread) {
  (void)thread;
  const step_job *j = arg;
  int64_t at = item * ELEMENTS_AN_ITEM;
  j->kernels->scale((int32_t)sfa_min64(ELEMENTS_AN_ITEM, j->n - at), j->factor, j->gradient + at, j->add, j->value + at);
}

static void scale(const sfa_context *ctx, int64_t n, float factor, const float *x, bool add, float *out) {
  step_job job = {.kernels = kernels_of(ctx), .factor = factor, .add = add, .n = n, .gradient = x, .value = out};
  sfa_parallel(ctx, items_of(n), scale_item, &job);
}

static void add_share(const sfa_context *ctx, int64_t n, double factor, const double *over, const float *x, float *out) {
  if (*over != 0)
    scale(ctx, n, (float)(factor / *over), x, true, out);
}

static void step_item(void *arg, int64_t item, int32_t thread) {
  (void)thread;
  const step_job *j = arg;
  int64_t at = item * ELEMENTS_AN_ITEM;
  j->kernels->adamw(j->how, (int32_t)sfa_min64(ELEMENTS_AN_ITEM, j->n - at), j->gradient + at, j->m + at, j->v + at, j->value + at);
}

static void adamw(const sfa_context *ctx, const sfa_adamw *how, int64_t n, const float *gradient, float *m, float *v, float *value) {
  if (how->clip && !isfinite(how->clip->norm))
    return;
  step_job job = {.kernels = kernels_of(ctx), .how = how, .n = n, .gradient = gradient, .m = m, .v = v, .value = value};
  sfa_parallel(ctx, items_of(n), step_item, &job);
}

/* ---- Rows and masks --------------------------------------------------------------------------------------------------------------- */

static void copy_rows(const sfa_context *ctx, int64_t n_rows, int64_t width, const float *from, int64_t from_stride, float *to,
                      int64_t to_stride) {
  (void)ctx;
  for (int64_t row = 0; row < n_rows; row++)
    memcpy(to + row * to_stride, from + row * from_stride, (size_t)width * sizeof *to);
}

static void shift(const sfa_context *ctx, int64_t n, const float *x, float constant, float *out) {
  (void)ctx;
  for (int64_t i = 0; i < n; i++)
    out[i] = x[i] + constant;
}

static void keep_where(const sfa_context *ctx, int64_t n, const float *mask, float *x) {
  (void)ctx;
  for (int64_t i = 0; i < n; i++)
    if (mask[i] == 0.0f)
      x[i] = 0.0f;
}

const sfa_training *sfa_training_cpu(void) {
  static const sfa_training cpu = {scratch_bytes, product, column_sum, norm_backward, activate_backward, gather, scatter_add, loss, scale,
                                   square_sum,    clip,    add_share,  adamw,         copy_rows,         shift,  keep_where};
  return &cpu;
}
