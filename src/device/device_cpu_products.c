/* Products of any two matrices: packed by blocks, multiplied by register tiles.
 *
 * k is gone through in steps of BLOCK_STEPS. Both operands of a step are packed once, by all threads, into the order in which a register
 * tile reads them; then items, rectangles of out whose operands fit a second level cache, add the step to out. Every element of out is one
 * chain over k, so the cuts may follow from the shape as they like.
 */
#include "device/training_kernels.h"

enum { BLOCK_STEPS = 256, ITEM_ROWS = 96, ITEM_COLUMNS = 128, MOST_TILE = 32 };

typedef struct product_job {
  const sfa_product_kernels *kernels;
  const sfa_product *product;
  int64_t step, n_steps, stride; /* of k; n_steps in whole 32s */
  int64_t n_tiles, n_panels, n_column_items;
  float *a; /* [n_tiles][stride][tile_rows] */
  float *b; /* [n_panels][stride][panel_columns] */
} product_job;

static int64_t pieces_of(int64_t n, int64_t piece) { return (n + piece - 1) / piece; }

size_t sfa_product_scratch_bytes(int64_t max_dim) { return (size_t)(max_dim + MOST_TILE) * 2 * BLOCK_STEPS * sizeof(float); }

static void pack_item(void *arg, int64_t item, int32_t thread) {
  (void)thread;
  const product_job *job = arg;
  const sfa_product *p = job->product;
  if (item < job->n_tiles) {
    int64_t row = item * job->kernels->tile_rows;
    job->kernels->pack_rows(p->m - row, job->n_steps, p->a.data + row * p->a.row_stride + job->step * p->a.column_stride, p->a.row_stride,
                            p->a.column_stride, p->bf16, job->a + row * job->stride);
  } else {
    int64_t column = (item - job->n_tiles) * job->kernels->panel_columns;
    job->kernels->pack_columns(p->n - column, job->n_steps, p->b.data + job->step * p->b.row_stride + column * p->b.column_stride,
                               p->b.column_stride, p->b.row_stride, p->bf16, job->b + column * job->stride);
  }
}

static void product_item(void *arg, int64_t item, int32_t thread) {
  (void)thread;
  const product_job *job = arg;
  const sfa_product *p = job->product;
  int64_t row = item / job->n_column_items * ITEM_ROWS, column = item % job->n_column_items * ITEM_COLUMNS;
  const sfa_product_block block = {.n_rows = sfa_min64(ITEM_ROWS, p->m - row),
                                   .n_columns = sfa_min64(ITEM_COLUMNS, p->n - column),
                                   .k = job->n_steps,
                                   .stride = job->stride,
                                   .a = job->a + row * job->stride,
                                   .b = job->b + column * job->stride,
                                   .bias = p->bias && job->step + job->n_steps == p->k ? p->bias + column : NULL,
                                   .add = p->add || job->step > 0,
                                   .out = p->out + row * p->out_stride + column,
                                   .out_stride = p->out_stride};
  job->kernels->product(&block);
}

void sfa_product_run(const sfa_context *ctx, const sfa_product_kernels *kernels, const sfa_product *product, void *scratch) {
  product_job job = {.kernels = kernels,
                     .product = product,
                     .n_tiles = pieces_of(product->m, kernels->tile_rows),
                     .n_panels = pieces_of(product->n, kernels->panel_columns),
                     .n_column_items = pieces_of(product->n, ITEM_COLUMNS),
                     .a = scratch};
  job.b = job.a + sfa_align64((size_t)job.n_tiles * (size_t)kernels->tile_rows * BLOCK_STEPS);
  do { /* once for k = 0, which gives zeros */
    job.n_steps = sfa_min64(BLOCK_STEPS, product->k - job.step);
    job.stride = (job.n_steps + 31) / 32 * 32;
    sfa_parallel(ctx, job.n_tiles + job.n_panels, pack_item, &job);
    sfa_parallel(ctx, pieces_of(product->m, ITEM_ROWS) * job.n_column_items, product_item, &job);
    job.step += job.n_steps;
  } while (job.step < product->k);
}
