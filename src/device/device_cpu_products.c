/* Products of any two matrices: packed by blocks, multiplied by register tiles.
 *
 * An item is a rectangle of out. Its thread goes through k in steps of BLOCK_STEPS, packs the rows of a and the columns of b that it needs
 * (a matrix is so packed once for every item that reads it, a few hundredths of the work) and adds the step to out. Every element of out is
 * one chain over k, so the rectangles may follow from the shape as they like.
 */
#include "device/training_kernels.h"

/* The largest rectangle, and its step: the packed operands are half of a second level cache. */
enum { MOST_ROWS = 240, MOST_COLUMNS = 256, LEAST_ROWS = 48, LEAST_COLUMNS = 64, BLOCK_STEPS = 256, WANTED_ITEMS = 64 };

typedef struct product_job {
  const sfa_training_kernels *kernels;
  const sfa_product *product;
  int64_t rows, columns, n_column_items;
  float *scratch; /* [n_threads][THREAD_FLOATS] */
} product_job;

enum { THREAD_FLOATS = (MOST_ROWS + MOST_COLUMNS) * BLOCK_STEPS };

size_t sfa_product_scratch_bytes(const sfa_context *ctx) { return (size_t)ctx->n_threads * THREAD_FLOATS * sizeof(float); }

static void product_item(void *arg, int64_t item, int32_t thread) {
  const product_job *job = arg;
  const sfa_product *p = job->product;
  int64_t row = item / job->n_column_items * job->rows, column = item % job->n_column_items * job->columns;
  float *a = job->scratch + (int64_t)thread * THREAD_FLOATS, *b = a + MOST_ROWS * BLOCK_STEPS;
  sfa_product_block block = {.n_rows = sfa_min64(job->rows, p->m - row),
                             .n_columns = sfa_min64(job->columns, p->n - column),
                             .a = a,
                             .b = b,
                             .add = p->add,
                             .out = p->out + row * p->out_stride + column,
                             .out_stride = p->out_stride};
  int64_t step = 0;
  do { /* once for k = 0, which gives zeros */
    block.k = sfa_min64(BLOCK_STEPS, p->k - step);
    block.bias = p->bias && step + block.k == p->k ? p->bias + column : NULL;
    job->kernels->pack(job->kernels->tile_rows, block.n_rows, block.k, p->a.data + row * p->a.row_stride + step * p->a.column_stride,
                       p->a.row_stride, p->a.column_stride, p->bf16, a);
    job->kernels->pack(job->kernels->panel_columns, block.n_columns, block.k,
                       p->b.data + step * p->b.row_stride + column * p->b.column_stride, p->b.column_stride, p->b.row_stride, p->bf16, b);
    job->kernels->product(&block);
    block.add = true;
    step += block.k;
  } while (step < p->k);
}

void sfa_product_run(const sfa_context *ctx, const sfa_training_kernels *kernels, const sfa_product *product, void *scratch) {
  product_job job = {.kernels = kernels, .product = product, .rows = MOST_ROWS, .columns = MOST_COLUMNS, .scratch = scratch};
  for (;;) { /* smaller rectangles until there is one for every thread of a large machine */
    job.n_column_items = (product->n + job.columns - 1) / job.columns;
    if ((product->m + job.rows - 1) / job.rows * job.n_column_items >= WANTED_ITEMS)
      break;
    if (job.columns > LEAST_COLUMNS && job.columns >= job.rows)
      job.columns /= 2;
    else if (job.rows > LEAST_ROWS)
      job.rows = sfa_max64(LEAST_ROWS, job.rows / 2 / 12 * 12);
    else
      break;
  }
  sfa_parallel(ctx, (product->m + job.rows - 1) / job.rows * job.n_column_items, product_item, &job);
}
