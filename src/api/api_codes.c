/* Public functions on codes. */
#include "api/api_check.h"

#include "backend/backend.h"
#include "code/code.h"

#include <stdatomic.h>

enum { ROWS_AN_ITEM = 256 };

size_t sfa_codes_bytes(int64_t n_rows, int32_t head_dim, int32_t k, sfa_dtype dtype) {
  if (n_rows < 0 || n_rows > INT64_MAX / 65536 / 8 || head_dim < 8 || head_dim > 65536 || head_dim % 8 || k < 1 || k > head_dim ||
      dtype > SFA_I8 || !sfa_dtype_bytes(dtype))
    return 0;
  sfa_row_format format = {head_dim, k, dtype};
  size_t n = (size_t)n_rows;
  return sfa_align64(n * sfa_row_ids_bytes(&format)) + sfa_align64(n * sfa_row_values_bytes(&format)) +
         sfa_align64(n * sfa_row_scale_bytes(&format));
}

sfa_status sfa_codes_place(sfa_context *ctx, int64_t n_rows, int32_t head_dim, int32_t k, sfa_dtype dtype, void *memory, sfa_codes *codes) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(ctx, codes, "codes is NULL");
  unsigned char *at = memory;
  sfa_row_format format = {head_dim, k, dtype};
  size_t n = n_rows > 0 ? (size_t)n_rows : 0;
  sfa_codes placed = {.n_rows = n_rows, .head_dim = head_dim, .k = k, .dtype = dtype};
  SFA_REQUIRE(ctx, memory && (uintptr_t)memory % 64 == 0, "memory of codes is NULL or not aligned to 64 bytes");
  if (sfa_codes_bytes(n_rows, head_dim, k, dtype)) { /* else the check below says what is wrong */
    placed.ids = at;
    placed.values = at += sfa_align64(n * sfa_row_ids_bytes(&format));
    at += sfa_align64(n * sfa_row_values_bytes(&format));
    placed.scales = dtype == SFA_I8 ? (uint16_t *)(void *)at : NULL;
  }
  SFA_TRY(sfa_check_codes(ctx, "the codes to place", &placed));
  *codes = placed;
  return SFA_OK;
}

typedef struct select_job {
  const sfa_context *ctx;
  const sfa_backend *backend;
  sfa_rows rows;
  sfa_row_format format;
  const sfa_codes *codes;
  unsigned char *scratch; /* [n_threads] */
  size_t scratch_bytes;
  _Atomic int64_t first_bad_row; /* INT64_MAX: none */
} select_job;

static void select_item(void *arg, int64_t item, int32_t thread) {
  select_job *job = arg;
  const sfa_codes *codes = job->codes;
  int64_t first = item * ROWS_AN_ITEM, n = sfa_min64(codes->n_rows - first, ROWS_AN_ITEM);
  sfa_row_store store = {(unsigned char *)codes->ids + (size_t)first * sfa_row_ids_bytes(&job->format),
                         (unsigned char *)codes->values + (size_t)first * sfa_row_values_bytes(&job->format),
                         codes->scales ? codes->scales + first : NULL};
  sfa_row_source x = sfa_rows_from(&job->rows, 0, first, first);
  int64_t bad = job->backend->encode(job->ctx, n, &x, &job->format, &store, job->scratch + (size_t)thread * job->scratch_bytes, NULL);
  int64_t row = first + bad - 1, before = atomic_load(&job->first_bad_row);
  while (bad && row < before && !atomic_compare_exchange_weak(&job->first_bad_row, &before, row))
    continue;
}

sfa_status sfa_codes_select(sfa_context *ctx, const void *x, sfa_dtype x_dtype, int64_t row_stride, sfa_codes *codes) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_TRY(sfa_check_codes(ctx, "the codes to fill", codes));
  sfa_rows rows = {.data = x, .dtype = x_dtype, .token_stride = row_stride}, checked;
  SFA_TRY(sfa_check_rows(ctx, "x", &rows, 1, codes->head_dim, codes->n_rows, &checked));
  if (ctx->backend->select)
    return codes->n_rows ? ctx->backend->select(ctx, &checked, codes) : SFA_OK;
  select_job job = {
      .ctx = ctx, .backend = sfa_backend_of(ctx), .rows = checked, .format = {codes->head_dim, codes->k, codes->dtype}, .codes = codes};
  job.scratch_bytes = job.backend->encode_scratch_bytes(&job.format, ROWS_AN_ITEM);
  atomic_init(&job.first_bad_row, INT64_MAX);
  SFA_TRY(sfa_alloc(ctx, job.scratch_bytes * (size_t)ctx->n_threads, "scratch of the selection", (void **)&job.scratch));
  sfa_parallel(ctx, (codes->n_rows + ROWS_AN_ITEM - 1) / ROWS_AN_ITEM, select_item, &job);
  sfa_free(ctx, job.scratch);
  int64_t bad = atomic_load(&job.first_bad_row);
  if (bad < INT64_MAX)
    return sfa_fail(
        ctx, SFA_ERROR_RANGE,
        "row %lld has a value beyond 65504, which neither f16 nor the int8 row scale can hold: scale x, or take codes of bf16 or "
        "f32",
        (long long)bad);
  return SFA_OK;
}

/* What the three exports check. */
static sfa_status check_export(sfa_context *ctx, const sfa_codes *codes, bool has_outputs) {
  SFA_TRY(sfa_check_codes(ctx, "codes", codes));
  SFA_REQUIRE(ctx, has_outputs, "an output array is NULL");
  return sfa_arrays_are_here(ctx) ? sfa_check_code_ids(ctx, "codes", codes) : SFA_OK;
}

sfa_status sfa_codes_densify(sfa_context *ctx, const sfa_codes *codes, float *out, int64_t row_stride) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_TRY(check_export(ctx, codes, out != NULL));
  SFA_REQUIRE(ctx, row_stride >= codes->head_dim, "row_stride is %lld: rows of %d values would overlap", (long long)row_stride,
              codes->head_dim);
  if (ctx->backend->densify)
    return codes->n_rows ? ctx->backend->densify(ctx, codes, out, row_stride) : SFA_OK;
  sfa_code_densify(codes, out, row_stride);
  return SFA_OK;
}

sfa_status sfa_codes_to_csr(sfa_context *ctx, const sfa_codes *codes, int64_t *row_ptr, int32_t *col, float *val) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_TRY(sfa_check_here(ctx, "compressed rows and columns"));
  SFA_TRY(check_export(ctx, codes, row_ptr && col && val));
  sfa_code_csr(codes, row_ptr, col, val);
  return SFA_OK;
}

sfa_status sfa_codes_to_csc(sfa_context *ctx, const sfa_codes *codes, int64_t *col_ptr, int64_t *row, float *val) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_TRY(sfa_check_here(ctx, "compressed rows and columns"));
  SFA_TRY(check_export(ctx, codes, col_ptr && row && val));
  sfa_code_csc(codes, col_ptr, row, val);
  return SFA_OK;
}
