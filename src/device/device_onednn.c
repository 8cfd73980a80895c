/* Linear layers by oneDNN: bf16 x bf16 summed in f32.
 *
 * A product is cut into items of 32 rows and 128 outputs, short ones padded with zeros; each is one call of one and the same primitive, on
 * one thread, inside our own loop. So a row's bits depend on that row alone, whatever the number of threads and of rows. oneDNN would
 * share out a whole product by itself, but then by the number of threads.
 * Its C API changed with version 3: in 2 a memory descriptor is a structure, in 3 a handle; the first section hides that. */
#include "device/device_onednn.h"

#include "base/half.h"

#include <dnnl.h>
#include <math.h>
#include <string.h>

enum { PANEL_ROWS = 32, BLOCK_OUT = 128 };

struct sfa_onednn {
  int32_t n_in, n_out, n_blocks;
  size_t block_bytes;
  uint8_t *weights;      /* [n_blocks][block_bytes] */
  float *bias;           /* [n_out] or NULL */
  dnnl_memory_t *blocks; /* [n_blocks] the same weights as oneDNN's objects, which are read only and so may be shared */
  dnnl_engine_t engine;
  dnnl_primitive_desc_t description;
  dnnl_primitive_t primitive;
};

#define DNNL_TRY(expression)                                                                                                               \
  do {                                                                                                                                     \
    dnnl_status_t dnnl_try_status_ = (expression);                                                                                         \
    if (dnnl_try_status_ != dnnl_success)                                                                                                  \
      return dnnl_try_status_;                                                                                                             \
  } while (0)

/* ---- The two APIs ---------------------------------------------------------------------------------------------------------------- */

#if DNNL_VERSION_MAJOR >= 3
typedef const_dnnl_memory_desc_t shape_ref;
static shape_ref ref(const dnnl_memory_desc_t *shape) { return *shape; }
static void shape_drop(dnnl_memory_desc_t *shape) { dnnl_memory_desc_destroy(*shape); }
static dnnl_status_t shape_make(dnnl_memory_desc_t *shape, int64_t n, int64_t m, dnnl_data_type_t type, dnnl_format_tag_t order) {
  return dnnl_memory_desc_create_with_tag(shape, 2, (dnnl_dims_t){n, m}, type, order);
}
static dnnl_status_t describe(dnnl_engine_t engine, shape_ref x, shape_ref w, shape_ref out, const_dnnl_primitive_attr_t attributes,
                              dnnl_primitive_desc_t *description) {
  return dnnl_matmul_primitive_desc_create(description, engine, x, w, NULL, out, attributes);
}
#else
typedef const dnnl_memory_desc_t *shape_ref;
static shape_ref ref(const dnnl_memory_desc_t *shape) { return shape; }
static void shape_drop(dnnl_memory_desc_t *shape) { (void)shape; }
static dnnl_status_t shape_make(dnnl_memory_desc_t *shape, int64_t n, int64_t m, dnnl_data_type_t type, dnnl_format_tag_t order) {
  return dnnl_memory_desc_init_by_tag(shape, 2, (dnnl_dims_t){n, m}, type, order);
}
static dnnl_status_t describe(dnnl_engine_t engine, shape_ref x, shape_ref w, shape_ref out, const_dnnl_primitive_attr_t attributes,
                              dnnl_primitive_desc_t *description) {
  dnnl_matmul_desc_t operation;
  DNNL_TRY(dnnl_matmul_desc_init(&operation, x, w, NULL, out));
  return dnnl_primitive_desc_create(description, &operation, attributes, engine, NULL);
}
#endif

static shape_ref shape_of(const sfa_onednn *l, dnnl_query_t what) { return dnnl_primitive_desc_query_md(l->description, what, 0); }

/* ---- Preparing ------------------------------------------------------------------------------------------------------------------- */

/* What the kernel may want beside its operands; far more than any has asked for. */
static size_t scratchpad_limit(int32_t n_in) { return sfa_align64((size_t)n_in * PANEL_ROWS * sizeof(float)) + (256 << 10); }

static dnnl_status_t make_primitive(sfa_onednn *l) {
  dnnl_memory_desc_t x, w, out;
  dnnl_primitive_attr_t attributes;
  DNNL_TRY(dnnl_engine_create(&l->engine, dnnl_cpu, 0));
  DNNL_TRY(dnnl_primitive_attr_create(&attributes));
  dnnl_status_t status = dnnl_primitive_attr_set_scratchpad_mode(attributes, dnnl_scratchpad_mode_user);
  if (status == dnnl_success && (status = shape_make(&x, PANEL_ROWS, l->n_in, dnnl_bf16, dnnl_ab)) == dnnl_success) {
    if ((status = shape_make(&w, l->n_in, BLOCK_OUT, dnnl_bf16, dnnl_format_tag_any)) == dnnl_success) {
      if ((status = shape_make(&out, PANEL_ROWS, BLOCK_OUT, dnnl_f32, dnnl_ab)) == dnnl_success) {
        status = describe(l->engine, ref(&x), ref(&w), ref(&out), attributes, &l->description);
        shape_drop(&out);
      }
      shape_drop(&w);
    }
    shape_drop(&x);
  }
  dnnl_primitive_attr_destroy(attributes);
  return status == dnnl_success ? dnnl_primitive_create(&l->primitive, l->description) : status;
}

/* to = from, in the order of to. */
static dnnl_status_t reorder(dnnl_engine_t engine, shape_ref from_shape, dnnl_memory_t from, shape_ref to_shape, dnnl_memory_t to) {
  dnnl_primitive_desc_t description = NULL;
  dnnl_primitive_t primitive = NULL;
  dnnl_stream_t stream = NULL;
  dnnl_exec_arg_t arguments[] = {{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, to}};
  dnnl_status_t status = dnnl_reorder_primitive_desc_create(&description, from_shape, engine, to_shape, engine, NULL);
  if (status == dnnl_success)
    status = dnnl_primitive_create(&primitive, description);
  if (status == dnnl_success)
    status = dnnl_stream_create(&stream, engine, dnnl_stream_default_flags);
  if (status == dnnl_success)
    status = dnnl_primitive_execute(primitive, stream, 2, arguments);
  dnnl_stream_destroy(stream);
  dnnl_primitive_destroy(primitive);
  dnnl_primitive_desc_destroy(description);
  return status;
}

typedef struct pack_job {
  const sfa_linear_source *source;
  sfa_onednn *layer;
  uint8_t *rows; /* [n_threads][thread_bytes] f32 [n_in], bf16 [128][n_in] */
  size_t row_bytes, thread_bytes;
  int status; /* dnnl_status_t of a block that failed */
} pack_job;

static dnnl_status_t place_block(sfa_onednn *l, int64_t block, uint16_t *rows) {
  dnnl_memory_desc_t shape;
  dnnl_memory_t from = NULL;
  DNNL_TRY(
      dnnl_memory_create(&l->blocks[block], shape_of(l, dnnl_query_weights_md), l->engine, l->weights + (size_t)block * l->block_bytes));
  DNNL_TRY(shape_make(&shape, l->n_in, BLOCK_OUT, dnnl_bf16, dnnl_ba));
  dnnl_status_t status = dnnl_memory_create(&from, ref(&shape), l->engine, rows);
  if (status == dnnl_success)
    status = reorder(l->engine, ref(&shape), from, shape_of(l, dnnl_query_weights_md), l->blocks[block]);
  dnnl_memory_destroy(from);
  shape_drop(&shape);
  return status;
}

static void pack_block(void *arg, int64_t block, int32_t thread) {
  pack_job *job = arg;
  sfa_onednn *l = job->layer;
  float *row = (float *)(void *)(job->rows + (size_t)thread * job->thread_bytes);
  uint16_t *rows = (uint16_t *)(void *)((uint8_t *)row + job->row_bytes);
  memset(rows, 0, (size_t)BLOCK_OUT * (size_t)l->n_in * sizeof *rows);
  for (int64_t r = 0; r < sfa_min64(BLOCK_OUT, l->n_out - block * BLOCK_OUT); r++) {
    job->source->row_f32(job->source->arg, block * BLOCK_OUT + r, row);
    for (int64_t i = 0; i < l->n_in; i++)
      rows[r * l->n_in + i] = sfa_bf16_from_f32(row[i]);
  }
  int32_t before = sfa_library_threads(1);
  dnnl_status_t status = place_block(l, block, rows);
  sfa_library_threads(before);
  if (status != dnnl_success)
    __atomic_store_n(&job->status, (int)status, __ATOMIC_RELAXED);
}

static sfa_status check(sfa_context *ctx, const sfa_onednn *l, int status) {
  if (status == dnnl_success)
    return SFA_OK;
  return sfa_fail(
      ctx, status == dnnl_out_of_memory ? SFA_ERROR_MEMORY : SFA_ERROR_UNSUPPORTED,
      "oneDNN %d.%d could not prepare a linear layer of %d inputs and %d outputs in bf16 (its status is %d); open the model with "
      "weights in f32 or int8, or limit the instruction set to avx2",
      dnnl_version()->major, dnnl_version()->minor, l->n_in, l->n_out, status);
}

static sfa_status fill(sfa_context *ctx, const sfa_linear_source *source, sfa_onednn *l) {
  l->n_in = source->n_in;
  l->n_out = source->n_out;
  l->n_blocks = (int32_t)(((int64_t)source->n_out + BLOCK_OUT - 1) / BLOCK_OUT);
  int32_t before = sfa_library_threads(1); /* the number is part of what a primitive is made for */
  dnnl_status_t status = make_primitive(l);
  sfa_library_threads(before);
  SFA_TRY(check(ctx, l, (int)status));
  size_t scratchpad = dnnl_memory_desc_get_size(shape_of(l, dnnl_query_scratchpad_md));
  if (scratchpad > scratchpad_limit(l->n_in))
    return check(ctx, l, dnnl_unimplemented);

  l->block_bytes = sfa_align64(dnnl_memory_desc_get_size(shape_of(l, dnnl_query_weights_md)));
  SFA_TRY(sfa_alloc_zero(ctx, (size_t)l->n_blocks, l->block_bytes, "a weight matrix", (void **)&l->weights));
  SFA_TRY(sfa_alloc_zero(ctx, (size_t)l->n_blocks, sizeof(dnnl_memory_t), "a weight matrix", (void **)&l->blocks));
  if (source->bias) {
    SFA_TRY(sfa_alloc_zero(ctx, (size_t)l->n_out, sizeof(float), "a bias", (void **)&l->bias));
    memcpy(l->bias, source->bias, (size_t)l->n_out * sizeof(float));
  }
  pack_job job = {.source = source, .layer = l, .row_bytes = sfa_align64((size_t)l->n_in * sizeof(float)), .status = dnnl_success};
  job.thread_bytes = job.row_bytes + sfa_align64((size_t)BLOCK_OUT * (size_t)l->n_in * sizeof(uint16_t));
  SFA_TRY(sfa_alloc_zero(ctx, (size_t)ctx->n_threads, job.thread_bytes, "reading weights", (void **)&job.rows));
  sfa_parallel(ctx, l->n_blocks, pack_block, &job);
  sfa_free(ctx, job.rows);
  return check(ctx, l, job.status);
}

bool sfa_onednn_is_fast(const sfa_context *ctx) {
  return ctx->isa >= SFA_ISA_AVX512 && (dnnl_get_effective_cpu_isa() & dnnl_cpu_isa_avx512_core_amx) == dnnl_cpu_isa_avx512_core_amx;
}

sfa_status sfa_onednn_create(sfa_context *ctx, const sfa_linear_source *source, sfa_onednn **layer) {
  sfa_onednn *l;
  *layer = NULL;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *l, "a linear layer", (void **)&l));
  sfa_status status = fill(ctx, source, l);
  if (status != SFA_OK) {
    sfa_onednn_destroy(ctx, l);
    return status;
  }
  *layer = l;
  return SFA_OK;
}

void sfa_onednn_destroy(sfa_context *ctx, sfa_onednn *l) {
  if (!l)
    return;
  for (int32_t b = 0; l->blocks && b < l->n_blocks; b++)
    dnnl_memory_destroy(l->blocks[b]);
  dnnl_primitive_destroy(l->primitive);
  dnnl_primitive_desc_destroy(l->description);
  dnnl_engine_destroy(l->engine);
  sfa_free(ctx, l->blocks);
  sfa_free(ctx, l->weights);
  sfa_free(ctx, l->bias);
  sfa_free(ctx, l);
}

size_t sfa_onednn_bytes(const sfa_onednn *l) {
  return (size_t)l->n_blocks * l->block_bytes + (l->bias ? (size_t)l->n_out * sizeof(float) : 0);
}

/* ---- Products -------------------------------------------------------------------------------------------------------------------- */

static int64_t panels_of(int64_t n_rows) { return (n_rows + PANEL_ROWS - 1) / PANEL_ROWS; }
static size_t panel_bytes(int32_t n_in) { return sfa_align64((size_t)PANEL_ROWS * (size_t)n_in * sizeof(uint16_t)); }
static size_t thread_bytes(int32_t n_in) { return PANEL_ROWS * BLOCK_OUT * sizeof(float) + scratchpad_limit(n_in); }

size_t sfa_onednn_scratch_bytes(const sfa_context *ctx, int64_t n_rows, int32_t n_in) {
  return (size_t)panels_of(n_rows) * panel_bytes(n_in) + (size_t)ctx->n_threads * thread_bytes(n_in);
}

typedef struct product_job {
  int64_t n_rows, x_stride, n_panels;
  int32_t n_in;
  const float *x;
  uint8_t *panels;  /* [n_panels][panel_bytes] x in bf16 */
  uint8_t *threads; /* [n_threads][thread_bytes] out [32][128], scratchpad */
  const sfa_onednn_part *parts;
} product_job;

static void round_panel(void *arg, int64_t panel, int32_t thread) {
  (void)thread;
  const product_job *job = arg;
  uint16_t *to = (uint16_t *)(void *)(job->panels + (size_t)panel * panel_bytes(job->n_in));
  int64_t n_rows = sfa_min64(PANEL_ROWS, job->n_rows - panel * PANEL_ROWS);
  for (int64_t r = 0; r < n_rows; r++)
    for (int64_t i = 0; i < job->n_in; i++)
      to[r * job->n_in + i] = sfa_bf16_from_f32(job->x[(panel * PANEL_ROWS + r) * job->x_stride + i]);
  memset(to + n_rows * job->n_in, 0, (size_t)((PANEL_ROWS - n_rows) * job->n_in) * sizeof *to);
}

/* tile [32][128] = panel * block. */
static dnnl_status_t multiply(const sfa_onednn *l, void *panel, dnnl_memory_t block, float *tile) {
  enum { X, WEIGHTS, OUT, SCRATCHPAD, N_OPERANDS };
  dnnl_exec_arg_t args[N_OPERANDS] = {{DNNL_ARG_SRC, NULL}, {DNNL_ARG_WEIGHTS, block}, {DNNL_ARG_DST, NULL}, {DNNL_ARG_SCRATCHPAD, NULL}};
  dnnl_stream_t stream = NULL;
  dnnl_status_t status = dnnl_stream_create(&stream, l->engine, dnnl_stream_default_flags);
  if (status == dnnl_success)
    status = dnnl_memory_create(&args[X].memory, shape_of(l, dnnl_query_src_md), l->engine, panel);
  if (status == dnnl_success)
    status = dnnl_memory_create(&args[OUT].memory, shape_of(l, dnnl_query_dst_md), l->engine, tile);
  if (status == dnnl_success)
    status = dnnl_memory_create(&args[SCRATCHPAD].memory, shape_of(l, dnnl_query_scratchpad_md), l->engine, tile + PANEL_ROWS * BLOCK_OUT);
  if (status == dnnl_success)
    status = dnnl_primitive_execute(l->primitive, stream, N_OPERANDS, args);
  dnnl_memory_destroy(args[X].memory);
  dnnl_memory_destroy(args[OUT].memory);
  dnnl_memory_destroy(args[SCRATCHPAD].memory);
  dnnl_stream_destroy(stream);
  return status;
}

/* Items of one block of weights follow each other, so that it stays in the cache. */
static void product_item(void *arg, int64_t item, int32_t thread) {
  const product_job *job = arg;
  const sfa_onednn_part *part = job->parts;
  int64_t block = item / job->n_panels, panel = item % job->n_panels;
  for (; block >= part->layer->n_blocks; part++)
    block -= part->layer->n_blocks;
  const sfa_onednn *l = part->layer;
  float *tile = (float *)(void *)(job->threads + (size_t)thread * thread_bytes(job->n_in));
  int32_t before = sfa_library_threads(1);
  dnnl_status_t status = multiply(l, job->panels + (size_t)panel * panel_bytes(job->n_in), l->blocks[block], tile);
  sfa_library_threads(before);

  int64_t first = block * BLOCK_OUT, n_out = sfa_min64(BLOCK_OUT, l->n_out - first);
  for (int64_t r = 0; r < sfa_min64(PANEL_ROWS, job->n_rows - panel * PANEL_ROWS); r++) {
    float *out = part->out + (panel * PANEL_ROWS + r) * part->out_stride + first;
    for (int64_t o = 0; o < n_out; o++)
      out[o] = status != dnnl_success ? NAN : l->bias ? tile[r * BLOCK_OUT + o] + l->bias[first + o] : tile[r * BLOCK_OUT + o];
  }
}

void sfa_onednn_linear(const sfa_context *ctx, int64_t n_rows, const float *x, int64_t x_stride, int32_t n_parts,
                       const sfa_onednn_part *parts, void *scratch) {
  product_job job = {
      .n_rows = n_rows, .x_stride = x_stride, .n_panels = panels_of(n_rows), .n_in = parts->layer->n_in, .x = x, .parts = parts};
  job.panels = scratch;
  job.threads = job.panels + (size_t)job.n_panels * panel_bytes(job.n_in);
  int64_t n_blocks = 0;
  for (int32_t p = 0; p < n_parts; p++)
    n_blocks += parts[p].layer->n_blocks;
  sfa_parallel(ctx, job.n_panels, round_panel, &job);
  sfa_parallel(ctx, n_blocks * job.n_panels, product_item, &job);
}
