/* The CPU device: weights packed into panels, work cut by shape over the context's threads, kernels of the context's instruction set. */
#include "base/half.h"
#include "device/cpu_kernels.h"
#include "device/device_onednn.h"

#include <math.h>
#include <string.h>

struct sfa_linear {
  sfa_storage storage;
  int32_t n_in, n_out, n_blocks, n_panels, offset;
  bool has_minimum;
  size_t panel_bytes, panel_params; /* weights of a panel; f16 numbers of its scales and minima */
  uint8_t *weights;
  uint16_t *params;
  float *bias;        /* [n_panels * 16] or NULL */
  sfa_onednn *onednn; /* in place of all this for BF16_PRODUCTS */
};

/* Rows of a task: with them, the inputs (and one pair of panels) stay in the second level cache. */
enum { ROW_BLOCK = 96 };

static const sfa_cpu_kernels *kernels_of(const sfa_context *ctx) {
#if defined(__x86_64__)
  if (ctx->isa >= SFA_ISA_AVX512 && __builtin_cpu_supports("avx512vnni"))
    return &sfa_cpu_kernels_avx512;
  if (ctx->isa >= SFA_ISA_AVX2)
    return &sfa_cpu_kernels_avx2;
#endif
  (void)ctx;
  return &sfa_cpu_kernels_scalar;
}

static bool in_blocks(sfa_storage storage) { return storage == SFA_STORE_U8 || storage == SFA_STORE_U4; }
static int32_t blocks_of(int32_t n_in) { return (n_in + SFA_BLOCK - 1) / SFA_BLOCK; }

/* ---- Preparing weights --------------------------------------------------------------------------------------------------------- */

typedef struct pack_job {
  const sfa_linear_source *source;
  sfa_linear *linear;
  uint8_t *rows; /* [n_threads][row_bytes] one row of a thread */
  size_t row_bytes;
} pack_job;

static void pack_floats(sfa_linear *l, int32_t column, const float *row, uint8_t *panel) {
  float *f32 = (float *)(void *)panel;
  uint16_t *half = (uint16_t *)(void *)panel;
  for (int64_t i = 0; i < l->n_in; i++) {
    int64_t at = i * SFA_PANEL + column;
    if (l->storage == SFA_STORE_F32)
      f32[at] = row[i];
    else
      half[at] = l->storage == SFA_STORE_BF16 ? sfa_bf16_from_f32(row[i]) : sfa_f16_from_f32(row[i]);
  }
}

static void pack_blocks(sfa_linear *l, int32_t column, const uint8_t *u, const uint16_t *scale, const uint16_t *minimum, uint8_t *panel,
                        uint16_t *params) {
  int32_t n_pieces = l->storage == SFA_STORE_U4 ? 4 : 8, n_params = l->has_minimum ? 2 : 1;
  for (int32_t b = 0; b < l->n_blocks; b++, u += SFA_BLOCK) {
    for (int32_t v = 0; v < n_pieces; v++) {
      uint8_t *to = panel + ((size_t)b * (size_t)n_pieces + (size_t)v) * 64 + column * 4;
      for (int32_t i = 0; i < 4; i++)
        to[i] = n_pieces == 4 ? (uint8_t)(u[4 * v + i] | u[16 + 4 * v + i] << 4) : u[4 * v + i];
    }
    params[b * n_params * SFA_PANEL + column] = scale[b];
    if (l->has_minimum)
      params[(b * n_params + 1) * SFA_PANEL + column] = minimum[b];
  }
}

static void pack_panel(void *arg, int64_t item, int32_t thread) {
  const pack_job *job = arg;
  sfa_linear *l = job->linear;
  uint8_t *row = job->rows + (size_t)thread * job->row_bytes;
  uint8_t *panel = l->weights + (size_t)item * l->panel_bytes;
  uint16_t *params = l->params + (size_t)item * l->panel_params;
  for (int32_t column = 0; column < SFA_PANEL && item * SFA_PANEL + column < l->n_out; column++) {
    int64_t index = item * SFA_PANEL + column;
    if (in_blocks(l->storage)) {
      uint16_t *scale = (uint16_t *)(void *)(row + (size_t)l->n_blocks * SFA_BLOCK), *minimum = scale + l->n_blocks;
      job->source->row_blocks(job->source->arg, index, row, scale, minimum);
      pack_blocks(l, column, row, scale, minimum, panel, params);
    } else {
      job->source->row_f32(job->source->arg, index, (float *)(void *)row);
      pack_floats(l, column, (const float *)(const void *)row, panel);
    }
  }
}

static void linear_destroy(sfa_context *ctx, sfa_linear *linear) {
  if (!linear)
    return;
  sfa_free(ctx, linear->weights);
  sfa_free(ctx, linear->params);
  sfa_free(ctx, linear->bias);
  sfa_onednn_destroy(ctx, linear->onednn);
  sfa_free(ctx, linear);
}

static sfa_status fill_linear(sfa_context *ctx, const sfa_linear_source *source, sfa_linear *l) {
  static const size_t element_bytes[] = {[SFA_STORE_F32] = 4, [SFA_STORE_BF16] = 2, [SFA_STORE_F16] = 2};
  l->n_in = source->n_in;
  l->n_out = source->n_out;
  l->n_blocks = blocks_of(source->n_in);
  l->n_panels = (int32_t)(((int64_t)source->n_out + SFA_PANEL - 1) / SFA_PANEL);
  l->offset = source->offset;
  l->has_minimum = source->has_minimum;
  size_t row_bytes;
  if (in_blocks(l->storage)) {
    l->panel_bytes = (size_t)l->n_blocks * SFA_BLOCK * SFA_PANEL / (l->storage == SFA_STORE_U4 ? 2 : 1);
    l->panel_params = (size_t)l->n_blocks * SFA_PANEL * (l->has_minimum ? 2 : 1);
    row_bytes = (size_t)l->n_blocks * (SFA_BLOCK + 2 * sizeof(uint16_t));
  } else {
    l->panel_bytes = (size_t)l->n_in * SFA_PANEL * element_bytes[l->storage];
    row_bytes = (size_t)l->n_in * sizeof(float);
  }
  row_bytes = sfa_align64(row_bytes);
  SFA_TRY(sfa_alloc_zero(ctx, (size_t)l->n_panels, l->panel_bytes, "a weight matrix", (void **)&l->weights));
  SFA_TRY(
      sfa_alloc_zero(ctx, (size_t)l->n_panels, l->panel_params * sizeof *l->params, "the scales of a weight matrix", (void **)&l->params));
  if (source->bias) {
    SFA_TRY(sfa_alloc_zero(ctx, (size_t)l->n_panels, SFA_PANEL * sizeof(float), "a bias", (void **)&l->bias));
    memcpy(l->bias, source->bias, (size_t)l->n_out * sizeof(float));
  }
  pack_job job = {source, l, NULL, row_bytes};
  SFA_TRY(sfa_alloc_zero(ctx, (size_t)ctx->n_threads, row_bytes, "reading weights", (void **)&job.rows));
  sfa_parallel(ctx, l->n_panels, pack_panel, &job);
  sfa_free(ctx, job.rows);
  return SFA_OK;
}

static sfa_status linear_create(sfa_context *ctx, const sfa_linear_source *source, sfa_storage storage, sfa_linear **linear) {
  sfa_linear *l;
  *linear = NULL;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *l, "a linear layer", (void **)&l));
  l->storage = storage;
  sfa_status status = storage == SFA_STORE_BF16_PRODUCTS ? sfa_onednn_create(ctx, source, &l->onednn) : fill_linear(ctx, source, l);
  if (status != SFA_OK) {
    linear_destroy(ctx, l);
    return status;
  }
  *linear = l;
  return SFA_OK;
}

static size_t linear_bytes(const sfa_linear *l) {
  if (l->onednn)
    return sfa_onednn_bytes(l->onednn);
  return (size_t)l->n_panels * (l->panel_bytes + l->panel_params * sizeof *l->params + (l->bias ? SFA_PANEL * sizeof(float) : 0));
}

/* ---- Products ------------------------------------------------------------------------------------------------------------------- */

static size_t quantized_row_bytes(int32_t n_blocks) {
  return (size_t)n_blocks * (SFA_PLANES * SFA_BLOCK + 2 * sizeof(float) + sizeof(int32_t));
}

static sfa_storage fast_storage(const sfa_context *ctx, sfa_storage storage) {
  return storage == SFA_STORE_BF16 && sfa_onednn_is_fast(ctx) ? SFA_STORE_BF16_PRODUCTS : storage;
}

static size_t scratch_bytes(const sfa_context *ctx, int64_t n_rows, int32_t n_in) {
  size_t quantized = (size_t)n_rows * quantized_row_bytes(blocks_of(n_in)), onednn = sfa_onednn_scratch_bytes(ctx, n_rows, n_in);
  return quantized > onednn ? quantized : onednn;
}

typedef struct quantize_job {
  const sfa_cpu_kernels *kernels;
  const float *x;
  int64_t x_stride;
  int32_t n_in, n_blocks;
  sfa_quantized_rows out;
} quantize_job;

static void quantize_row(void *arg, int64_t row, int32_t thread) {
  (void)thread;
  const quantize_job *job = arg;
  int64_t at = row * job->n_blocks;
  job->kernels->quantize(job->n_in, job->n_blocks, job->x + row * job->x_stride, job->out.q + at * SFA_PLANES * SFA_BLOCK,
                         job->out.scale + at, job->out.sum + at, job->out.scale_sum + at);
}

static sfa_quantized_rows quantize_rows(const sfa_context *ctx, int64_t n_rows, int32_t n_in, const float *x, int64_t x_stride,
                                        void *scratch) {
  int32_t n_blocks = blocks_of(n_in);
  int64_t n = n_rows * n_blocks;
  float *scale = scratch; /* the wider elements first, for their alignment */
  sfa_quantized_rows out = {.scale = scale, .scale_sum = scale + n, .sum = (int32_t *)(scale + 2 * n), .q = (int8_t *)(scale + 3 * n)};
  quantize_job job = {kernels_of(ctx), x, x_stride, n_in, n_blocks, out};
  sfa_parallel(ctx, n_rows, quantize_row, &job);
  return out;
}

enum { MAX_PARTS = 3 };

typedef struct linear_job {
  const sfa_cpu_kernels *kernels;
  int64_t n_rows, n_row_blocks, x_stride;
  const float *x;
  sfa_quantized_rows quantized;
  const sfa_linear_part *parts;
  int32_t n_parts;
  int32_t chunk_panels;               /* panels of an item */
  int64_t first_chunk[MAX_PARTS + 1]; /* of each part, counted through */
} linear_job;

/* Items of one row block follow each other, so that its inputs stay in the cache. */
static void linear_item(void *arg, int64_t item, int32_t thread) {
  (void)thread;
  const linear_job *job = arg;
  int64_t n_chunks = job->first_chunk[job->n_parts], row = item / n_chunks * ROW_BLOCK, chunk = item % n_chunks;
  int32_t part = 0;
  while (chunk >= job->first_chunk[part + 1])
    part++;
  const sfa_linear *l = job->parts[part].linear;
  int32_t panel = (int32_t)(chunk - job->first_chunk[part]) * job->chunk_panels;
  int32_t n_panels = (int32_t)sfa_min64(job->chunk_panels, l->n_panels - panel);
  sfa_linear_task task = {
      .storage = l->storage,
      .n_in = l->n_in,
      .n_blocks = l->n_blocks,
      .offset = l->offset,
      .has_minimum = l->has_minimum,
      .n_panels = n_panels,
      .n_out = (int32_t)sfa_min64((int64_t)n_panels * SFA_PANEL, l->n_out - (int64_t)panel * SFA_PANEL),
      .weights = l->weights + (size_t)panel * l->panel_bytes,
      .panel_bytes = l->panel_bytes,
      .params = l->params + (size_t)panel * l->panel_params,
      .panel_params = l->panel_params,
      .bias = l->bias ? l->bias + (int64_t)panel * SFA_PANEL : NULL,
      .n_rows = sfa_min64(ROW_BLOCK, job->n_rows - row),
      .x = job->x + row * job->x_stride,
      .x_stride = job->x_stride,
      .out = job->parts[part].out + row * job->parts[part].out_stride + (int64_t)panel * SFA_PANEL,
      .out_stride = job->parts[part].out_stride,
  };
  if (in_blocks(l->storage)) {
    int64_t at = row * l->n_blocks;
    task.quantized = (sfa_quantized_rows){job->quantized.q + at * SFA_PLANES * SFA_BLOCK, job->quantized.scale + at,
                                          job->quantized.sum + at, job->quantized.scale_sum + at};
  }
  job->kernels->linear(&task);
}

static void linear_ours(const sfa_context *ctx, int64_t n_rows, const float *x, int64_t x_stride, int32_t n_parts,
                        const sfa_linear_part *parts, void *scratch) {
  linear_job job = {.kernels = kernels_of(ctx),
                    .n_rows = n_rows,
                    .n_row_blocks = (n_rows + ROW_BLOCK - 1) / ROW_BLOCK,
                    .x = x,
                    .x_stride = x_stride,
                    .parts = parts,
                    .n_parts = n_parts};
  bool wants_blocks = false;
  int64_t n_panels = 0;
  for (int32_t p = 0; p < n_parts; p++) {
    wants_blocks |= in_blocks(parts[p].linear->storage);
    n_panels += parts[p].linear->n_panels;
  }
  if (wants_blocks)
    job.quantized = quantize_rows(ctx, n_rows, parts[0].linear->n_in, x, x_stride, scratch);
  job.chunk_panels = (int32_t)sfa_min64(32, sfa_max64(2, n_panels / 64 * 2)); /* about 32 items, of whole pairs */
  for (int32_t p = 0; p < n_parts; p++)
    job.first_chunk[p + 1] = job.first_chunk[p] + (parts[p].linear->n_panels + job.chunk_panels - 1) / job.chunk_panels;
  sfa_parallel(ctx, job.n_row_blocks * job.first_chunk[n_parts], linear_item, &job);
}

/* Parts of the two kinds one after the other, in the same scratch. */
static void linear(const sfa_context *ctx, int64_t n_rows, const float *x, int64_t x_stride, int32_t n_parts, const sfa_linear_part *parts,
                   void *scratch) {
  sfa_linear_part ours[MAX_PARTS];
  sfa_onednn_part onednn[MAX_PARTS];
  int32_t n_ours = 0, n_onednn = 0;
  for (int32_t p = 0; p < n_parts; p++)
    if (parts[p].linear->onednn)
      onednn[n_onednn++] = (sfa_onednn_part){parts[p].linear->onednn, parts[p].out, parts[p].out_stride};
    else
      ours[n_ours++] = parts[p];
  if (n_ours > 0)
    linear_ours(ctx, n_rows, x, x_stride, n_ours, ours, scratch);
  if (n_onednn > 0)
    sfa_onednn_linear(ctx, n_rows, x, x_stride, n_onednn, onednn, scratch);
}

/* ---- Row by row ----------------------------------------------------------------------------------------------------------------- */

typedef struct row_job {
  const sfa_cpu_kernels *kernels;
  int64_t n_rows;
  const float *x, *weight, *bias, *up, *cos, *sin;
  float *out;
  int64_t x_stride, out_stride, up_stride;
  int32_t n_groups, dim, n_pairs;
  float eps;
  sfa_activation act;
  bool interleaved;
  void (*row)(const struct row_job *job, int64_t row);
} row_job;

enum { ROWS_AN_ITEM = 16 }; /* worth handing to a thread */

static void row_item(void *arg, int64_t item, int32_t thread) {
  (void)thread;
  const row_job *job = arg;
  for (int64_t row = item * ROWS_AN_ITEM; row < sfa_min64(job->n_rows, (item + 1) * ROWS_AN_ITEM); row++)
    job->row(job, row);
}

static void run_rows(const sfa_context *ctx, row_job *job) {
  job->kernels = kernels_of(ctx);
  sfa_parallel(ctx, (job->n_rows + ROWS_AN_ITEM - 1) / ROWS_AN_ITEM, row_item, job);
}

static void rms_norm_row(const row_job *j, int64_t row) {
  for (int64_t g = 0; g < j->n_groups; g++)
    j->kernels->rms_norm(j->dim, j->x + row * j->x_stride + g * j->dim, j->weight, j->eps, j->out + row * j->out_stride + g * j->dim);
}

static void rms_norm(const sfa_context *ctx, int64_t n_rows, int32_t n_groups, int32_t dim, const float *x, int64_t x_stride,
                     const float *weight, float eps, float *out, int64_t out_stride) {
  run_rows(ctx, &(row_job){.row = rms_norm_row,
                           .n_rows = n_rows,
                           .n_groups = n_groups,
                           .dim = dim,
                           .x = x,
                           .x_stride = x_stride,
                           .weight = weight,
                           .eps = eps,
                           .out = out,
                           .out_stride = out_stride});
}

static void layer_norm_row(const row_job *j, int64_t row) {
  j->kernels->layer_norm(j->dim, j->x + row * j->x_stride, j->weight, j->bias, j->eps, j->out + row * j->out_stride);
}

static void layer_norm(const sfa_context *ctx, int64_t n_rows, int32_t dim, const float *x, int64_t x_stride, const float *weight,
                       const float *bias, float eps, float *out, int64_t out_stride) {
  run_rows(ctx, &(row_job){.row = layer_norm_row,
                           .n_rows = n_rows,
                           .dim = dim,
                           .x = x,
                           .x_stride = x_stride,
                           .weight = weight,
                           .bias = bias,
                           .eps = eps,
                           .out = out,
                           .out_stride = out_stride});
}

/* (a, b) becomes (a cos - b sin, a sin + b cos). */
static void rope_row(const row_job *j, int64_t row) {
  const float *cos = j->cos + row * j->n_pairs, *sin = j->sin + row * j->n_pairs;
  int64_t step = j->interleaved ? 2 : 1, apart = j->interleaved ? 1 : j->n_pairs;
  for (int64_t g = 0; g < j->n_groups; g++) {
    float *x = j->out + row * j->out_stride + g * j->dim;
    for (int64_t p = 0; p < j->n_pairs; p++) {
      float a = x[p * step], b = x[p * step + apart];
      x[p * step] = a * cos[p] - b * sin[p];
      x[p * step + apart] = a * sin[p] + b * cos[p];
    }
  }
}

static void rope(const sfa_context *ctx, int64_t n_rows, int32_t n_heads, int32_t head_dim, int32_t n_pairs, bool interleaved,
                 const float *cos, const float *sin, float *x, int64_t x_stride) {
  run_rows(ctx, &(row_job){.row = rope_row,
                           .n_rows = n_rows,
                           .n_groups = n_heads,
                           .dim = head_dim,
                           .n_pairs = n_pairs,
                           .interleaved = interleaved,
                           .cos = cos,
                           .sin = sin,
                           .out = x,
                           .out_stride = x_stride});
}

static void activate_row(const row_job *j, int64_t row) {
  j->kernels->activate(j->act, j->dim, j->x + row * j->x_stride, j->up ? j->up + row * j->up_stride : NULL, j->out + row * j->out_stride);
}

static void activate(const sfa_context *ctx, sfa_activation act, int64_t n_rows, int32_t dim, const float *x, int64_t x_stride,
                     const float *up, int64_t up_stride, float *out, int64_t out_stride) {
  run_rows(ctx, &(row_job){.row = activate_row,
                           .act = act,
                           .n_rows = n_rows,
                           .dim = dim,
                           .x = x,
                           .x_stride = x_stride,
                           .up = up,
                           .up_stride = up_stride,
                           .out = out,
                           .out_stride = out_stride});
}

static void add_row(const row_job *j, int64_t row) {
  float *out = j->out + row * j->dim;
  const float *y = j->x + row * j->dim;
  for (int32_t i = 0; i < j->dim; i++)
    out[i] += y[i];
}

static void add(const sfa_context *ctx, int64_t n_rows, int32_t dim, float *x, const float *y) {
  run_rows(ctx, &(row_job){.row = add_row, .n_rows = n_rows, .dim = dim, .out = x, .x = y});
}

static void softcap_row(const row_job *j, int64_t row) { j->kernels->softcap(j->dim, j->eps, j->out + row * j->out_stride); }

static void softcap(const sfa_context *ctx, int64_t n_rows, int32_t dim, float cap, float *x, int64_t x_stride) {
  run_rows(ctx, &(row_job){.row = softcap_row, .n_rows = n_rows, .dim = dim, .eps = cap, .out = x, .out_stride = x_stride});
}

/* One thread, in order: a step has few angles. */
static void rotations(const sfa_context *ctx, int64_t n_rows, const int32_t *positions, int32_t n_pairs, const double *frequencies,
                      float *cos_out, float *sin_out) {
  (void)ctx;
  for (int64_t row = 0; row < n_rows; row++)
    for (int64_t p = 0; p < n_pairs; p++) {
      double angle = (double)positions[row] * frequencies[p];
      cos_out[row * n_pairs + p] = (float)cos(angle);
      sin_out[row * n_pairs + p] = (float)sin(angle);
    }
}

typedef struct score_job {
  int32_t n_classes;
  const float *logits;
  const int32_t *targets;
  float *nll;
  int32_t *argmax;
} score_job;

/* -log softmax(logits)[target] = max + log(sum of e^(logits - max)) - logits[target]. The sum runs in double: 50,000 to 260,000 terms. */
static void score_row(void *arg, int64_t row, int32_t thread) {
  (void)thread;
  const score_job *job = arg;
  const float *logits = job->logits + row * job->n_classes;
  int32_t best = 0, target = job->targets[row];
  for (int32_t v = 1; v < job->n_classes; v++)
    if (logits[v] > logits[best])
      best = v;
  job->argmax[row] = best;
  job->nll[row] = NAN;
  if (target < 0)
    return;
  double sum = 0;
  for (int32_t v = 0; v < job->n_classes; v++)
    sum += (double)expf(logits[v] - logits[best]);
  job->nll[row] = (float)(log(sum) + ((double)logits[best] - (double)logits[target]));
}

static void score(const sfa_context *ctx, int64_t n_rows, int32_t n_classes, const float *logits, const int32_t *targets, float *nll,
                  int32_t *argmax) {
  sfa_parallel(ctx, n_rows, score_row, &(score_job){n_classes, logits, targets, nll, argmax});
}

static void keep_most(const sfa_context *ctx, int64_t n, const float *x, float *most) {
  (void)ctx;
  for (int64_t i = 0; i < n; i++)
    *most = fmaxf(*most, x[i]);
}

const sfa_device *sfa_device_cpu(void) {
  static const sfa_device cpu = {.name = "cpu",
                                 .linear_create = linear_create,
                                 .linear_destroy = linear_destroy,
                                 .linear_bytes = linear_bytes,
                                 .fast_storage = fast_storage,
                                 .scratch_bytes = scratch_bytes,
                                 .linear = linear,
                                 .rms_norm = rms_norm,
                                 .layer_norm = layer_norm,
                                 .rope = rope,
                                 .activate = activate,
                                 .add = add,
                                 .softcap = softcap,
                                 .rotations = rotations,
                                 .score = score,
                                 .keep_most = keep_most};
  return &cpu;
}
