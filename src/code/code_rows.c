/* Dense rows -> stored rows. The one place that decides what attention will read: the API, the cache and the attention over dense inputs
 * all come through here, so that a key is coded in the same way wherever it is kept. */
#include "code/code.h"

#include "base/half.h"

static const uint32_t f16_largest = 0x477fe000u, f32_infinity = 0x7f800000u; /* 65504 and inf as bits */

/* -1, or the first row with a finite value that f16 cannot hold. */
static int64_t first_beyond_f16(int64_t n_rows, int32_t width, const float *rows, int64_t row_stride) {
  for (int64_t i = 0; i < n_rows; i++) {
    uint32_t beyond = 0;
    for (int32_t e = 0; e < width; e++) {
      uint32_t magnitude = sfa_bits_of(rows[i * row_stride + e]) & 0x7fffffffu;
      beyond |= (magnitude > f16_largest) & (magnitude < f32_infinity);
    }
    if (beyond)
      return i;
  }
  return -1;
}

size_t sfa_code_scratch_bytes(const sfa_row_format *format, int64_t n_rows) {
  return sfa_align64((size_t)n_rows * (size_t)format->dim * sizeof(float)) +
         sfa_align64((size_t)n_rows * (size_t)format->k * sizeof(float));
}

int64_t sfa_code_rows(const sfa_kernels *kernels, int64_t n_rows, const void *x, sfa_dtype x_dtype, int64_t row_stride,
                      const sfa_row_format *format, const sfa_row_store *out, void *scratch, int64_t *stage_ns) {
  int32_t dim = format->dim, k = format->k, width = sfa_row_width(format);
  int64_t start = stage_ns ? sfa_now_ns() : 0;
  const float *rows = x;
  if (x_dtype != SFA_F32) {
    kernels->load_rows(n_rows, dim, x_dtype, x, row_stride, NULL, scratch, dim);
    rows = scratch;
    row_stride = dim;
  }
  bool stored = false; /* f32 codes need no second step */
  if (k) {
    stored = format->dtype == SFA_F32;
    float *kept = stored ? out->values : (float *)((unsigned char *)scratch + sfa_align64((size_t)n_rows * (size_t)dim * sizeof(float)));
    kernels->topk(n_rows, rows, row_stride, dim, k, out->ids, kept);
    rows = kept;
    row_stride = k;
    if (stage_ns) {
      int64_t now = sfa_now_ns();
      stage_ns[SFA_STAGE_TOPK] += now - start;
      start = now;
    }
  }
  int64_t bad_row = -1;
  if (!stored && (sfa_has_scales(format->dtype) || format->dtype == SFA_F16))
    bad_row = first_beyond_f16(n_rows, width, rows, row_stride);
  if (bad_row < 0 && !stored) {
    if (format->dtype == SFA_I8)
      kernels->quantize_i8(n_rows, width, rows, row_stride, out->values, width, out->scales);
    else if (format->dtype == SFA_I4)
      kernels->quantize_i4(n_rows, width, rows, row_stride, out->values, width, out->scales);
    else
      kernels->store_rows(n_rows, width, rows, row_stride, format->dtype, out->values, width);
  }
  if (stage_ns)
    stage_ns[SFA_STAGE_PACK] += sfa_now_ns() - start;
  return bad_row + 1;
}
