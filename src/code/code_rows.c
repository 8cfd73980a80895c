/* Dense rows -> stored rows. The one place that decides what attention will read: the API, the cache and the attention over dense inputs
 * all come through here, so that a key is coded in the same way wherever it is kept. */
#include "code/code.h"

#include "base/half.h"

static const uint32_t f16_largest = 0x477fe000u, f32_infinity = 0x7f800000u; /* 65504 and inf as bits */

/* Whether a finite value is more than f16 can hold. */
static bool beyond_f16(int64_t n, const float *x) {
  uint32_t beyond = 0;
  for (int64_t i = 0; i < n; i++) {
    uint32_t magnitude = sfa_bits_of(x[i]) & 0x7fffffffu;
    beyond |= (magnitude > f16_largest) & (magnitude < f32_infinity);
  }
  return beyond;
}

/* -1, or the first row with such a value. */
static int64_t first_beyond_f16(int64_t n_rows, int32_t width, const float *rows, int64_t row_stride) {
  if (row_stride == width && !beyond_f16(n_rows * width, rows)) /* short rows are looked at together */
    return -1;
  for (int64_t i = 0; i < n_rows; i++)
    if (beyond_f16(width, rows + i * row_stride))
      return i;
  return -1;
}

/* Rows are taken in blocks, so that what one step leaves for the next stays in the L1 or L2: the input is read once, the output written
 * once, and nothing else goes through memory. */
enum { BLOCK_ROWS = 32 };

static int64_t block_rows(int64_t n_rows) { return sfa_min64(n_rows, BLOCK_ROWS); }

static size_t dense_bytes(const sfa_row_format *format, int64_t n_rows) {
  return sfa_align64((size_t)block_rows(n_rows) * (size_t)format->dim * sizeof(float));
}

size_t sfa_code_scratch_bytes(const sfa_row_format *format, int64_t n_rows) {
  return dense_bytes(format, n_rows) + sfa_align64((size_t)block_rows(n_rows) * (size_t)format->k * sizeof(float));
}

void sfa_code_load(const sfa_kernels *kernels, int64_t n_rows, const sfa_row_source *x, int32_t dim, int64_t line_step, float *out) {
  const float *rows = x->data;
  int64_t row_stride = x->row_stride;
  if (x->dtype != SFA_F32 || (!x->rope && !x->norm)) {
    kernels->load_rows(n_rows, dim, x->dtype, x->data, row_stride, NULL, out, dim);
    rows = out;
    row_stride = dim;
  }
  if (x->norm) {
    kernels->norm_rows(n_rows, dim, rows, row_stride, x->norm->weight, x->norm->eps, out, dim);
    rows = out;
    row_stride = dim;
  }
  const sfa_rope *rope = x->rope;
  if (rope) {
    int64_t n_pairs = rope->n_rotated / 2;
    kernels->rotate_rows(n_rows, dim, rows, row_stride, rope->cos + x->line * n_pairs, rope->sin + x->line * n_pairs, line_step * n_pairs,
                         rope->n_rotated, rope->interleaved, out, dim);
  }
}

/* Rows to the storage type. Returns -1, or the first row that it cannot hold. */
static int64_t store(const sfa_kernels *kernels, int64_t n_rows, int32_t width, const float *rows, int64_t row_stride, sfa_dtype dtype,
                     void *values, uint16_t *scales) {
  int64_t bad_row = sfa_has_scales(dtype) || dtype == SFA_F16 ? first_beyond_f16(n_rows, width, rows, row_stride) : -1;
  if (bad_row >= 0)
    return bad_row;
  if (dtype == SFA_I8)
    kernels->quantize_i8(n_rows, width, rows, row_stride, values, width, scales);
  else if (dtype == SFA_I4)
    kernels->quantize_i4(n_rows, width, rows, row_stride, values, width, scales);
  else if (dtype == SFA_E4M3)
    kernels->quantize_e4m3(n_rows, width, rows, row_stride, values, width, scales);
  else
    kernels->store_rows(n_rows, width, rows, row_stride, dtype, values, width);
  return -1;
}

static void add_time(int64_t *stage_ns, int stage, int64_t *start) {
  if (!stage_ns)
    return;
  int64_t now = sfa_now_ns();
  stage_ns[stage] += now - *start;
  *start = now;
}

int64_t sfa_code_rows(const sfa_kernels *kernels, int64_t n_rows, const sfa_row_source *x, const sfa_row_format *format,
                      const sfa_row_store *out, void *scratch, int64_t *stage_ns) {
  int32_t dim = format->dim, k = format->k, width = sfa_row_width(format);
  float *dense = scratch, *kept = (float *)(void *)((unsigned char *)scratch + dense_bytes(format, n_rows));
  int64_t start = stage_ns ? sfa_now_ns() : 0;
  for (int64_t first = 0, n; first < n_rows; first += n) {
    n = block_rows(n_rows - first);
    sfa_row_source block = *x;
    block.data = (const unsigned char *)x->data + (size_t)(first * x->row_stride) * sfa_dtype_bytes(x->dtype);
    block.line += first;
    const float *rows = block.data;
    int64_t row_stride = x->row_stride;
    bool from_bf16 = k && sfa_code_from_bf16(x, dim);
    if (!from_bf16 && (x->dtype != SFA_F32 || x->rope || x->norm)) {
      sfa_code_load(kernels, n, &block, dim, 1, dense);
      rows = dense;
      row_stride = dim;
    }
    unsigned char *values = (unsigned char *)out->values + (size_t)first * sfa_row_values_bytes(format);
    if (k) {
      bool whole = format->dtype == SFA_F32; /* nothing to round */
      float *to = whole ? (float *)(void *)values : kept;
      unsigned char *ids = (unsigned char *)out->ids + (size_t)first * sfa_row_ids_bytes(format);
      if (from_bf16)
        kernels->topk_bf16(n, block.data, row_stride, dim, k, ids, to);
      else
        kernels->topk(n, rows, row_stride, dim, k, ids, to);
      rows = to;
      row_stride = k;
      add_time(stage_ns, SFA_STAGE_TOPK, &start);
      if (whole)
        continue;
    }
    int64_t bad_row =
        store(kernels, n, width, rows, row_stride, format->dtype, values, sfa_has_scales(format->dtype) ? out->scales + first : NULL);
    add_time(stage_ns, SFA_STAGE_PACK, &start);
    if (bad_row >= 0)
      return first + bad_row + 1;
  }
  return 0;
}
