/* What makes an argument acceptable, and what to say when it is not. */
#include "api/api_check.h"

#include "cache/cache_pages.h"
#include "code/code.h"

sfa_status sfa_check_here(sfa_context *ctx, const char *what) {
  return sfa_arrays_are_here(ctx) ? SFA_OK
                                  : sfa_fail(ctx, SFA_ERROR_UNSUPPORTED,
                                             "%s: on the CPU only; copy the arrays to the host and use a context with device = "
                                             "SFA_DEVICE_CPU",
                                             what);
}

sfa_status sfa_check_head_dim(sfa_context *ctx, const char *name, int32_t dim) {
  SFA_REQUIRE(ctx, dim >= 8 && dim <= 65536 && dim % 8 == 0, "%s is %d: it must be a multiple of 8 from 8 to 65536 (pad with zeros)", name,
              dim);
  return SFA_OK;
}

sfa_status sfa_check_kept(sfa_context *ctx, const char *name, int32_t k, int32_t dim) {
  SFA_REQUIRE(ctx, k >= 0 && k <= dim, "%s is %d: it must be from 1 to head_dim = %d, or 0 for dense", name, k, dim);
  return SFA_OK;
}

sfa_status sfa_check_dtype(sfa_context *ctx, const char *name, sfa_dtype dtype) {
  SFA_REQUIRE(ctx, dtype >= SFA_F32 && dtype <= SFA_I8, "%s is %d: it must be SFA_F32, SFA_BF16, SFA_F16 or SFA_I8", name, (int)dtype);
  return SFA_OK;
}

sfa_status sfa_check_value_dtype(sfa_context *ctx, const char *name, sfa_dtype dtype) {
  SFA_REQUIRE(ctx, dtype >= SFA_F32 && dtype <= SFA_E4M3, "%s is %d: it must be SFA_F32, SFA_BF16, SFA_F16, SFA_I8, SFA_I4 or SFA_E4M3",
              name, (int)dtype);
  return SFA_OK;
}

static bool aligned(const void *pointer, size_t bytes) { return (uintptr_t)pointer % bytes == 0; }

sfa_status sfa_check_codes(sfa_context *ctx, const char *name, const sfa_codes *codes) {
  SFA_REQUIRE(ctx, codes, "%s is NULL", name);
  SFA_TRY(sfa_check_head_dim(ctx, "head_dim of the codes", codes->head_dim));
  SFA_REQUIRE(ctx, codes->k >= 1 && codes->k <= codes->head_dim, "%s keep k = %d of head_dim = %d: k must be from 1 to head_dim", name,
              codes->k, codes->head_dim);
  SFA_TRY(sfa_check_dtype(ctx, "dtype of the codes", codes->dtype));
  SFA_REQUIRE(ctx, codes->n_rows >= 0 && codes->n_rows <= INT64_MAX / 65536 / 8, "%s have n_rows = %lld: it must not be negative or absurd",
              name, (long long)codes->n_rows);
  if (codes->n_rows == 0)
    return SFA_OK;
  SFA_REQUIRE(ctx, codes->ids && codes->values, "%s have no ids or no values: sfa_codes_place lays them over memory", name);
  SFA_REQUIRE(ctx, codes->dtype != SFA_I8 || codes->scales, "%s are int8 without scales: one f16 a row is needed", name);
  SFA_REQUIRE(ctx,
              aligned(codes->ids, sfa_id_bytes(codes->head_dim)) && aligned(codes->values, sfa_dtype_bytes(codes->dtype)) &&
                  aligned(codes->scales, sizeof(uint16_t)),
              "%s: ids, values or scales are not aligned to their elements", name);
  return SFA_OK;
}

sfa_status sfa_check_code_ids(sfa_context *ctx, const char *name, const sfa_codes *codes) {
  int64_t row = sfa_code_bad_row(codes);
  SFA_REQUIRE(ctx, row < 0, "%s: the ids of row %lld are not ascending features below head_dim = %d", name, (long long)row,
              codes->head_dim);
  return SFA_OK;
}

sfa_status sfa_check_rows(sfa_context *ctx, const char *name, const sfa_rows *rows, int32_t n_heads, int32_t dim, int64_t max_seqlen,
                          sfa_rows *out) {
  *out = *rows;
  out->dtype = rows->dtype ? rows->dtype : SFA_F32;
  SFA_REQUIRE(ctx, out->dtype == SFA_F32 || out->dtype == SFA_BF16, "%s.dtype is %d: it must be SFA_F32 or SFA_BF16", name,
              (int)rows->dtype);
  SFA_REQUIRE(ctx, rows->batch_stride >= 0 && rows->token_stride >= 0 && rows->head_stride >= 0,
              "%s has a negative stride (batch %lld, token %lld, head %lld)", name, (long long)rows->batch_stride,
              (long long)rows->token_stride, (long long)rows->head_stride);
  out->token_stride = rows->token_stride ? rows->token_stride : (int64_t)n_heads * dim;
  out->head_stride = rows->head_stride ? rows->head_stride : dim;
  SFA_REQUIRE(ctx, rows->batch_stride || !__builtin_mul_overflow(max_seqlen, out->token_stride, &out->batch_stride),
              "%s.token_stride is %lld: %lld tokens do not fit an address", name, (long long)out->token_stride, (long long)max_seqlen);
  SFA_REQUIRE(ctx, rows->data || max_seqlen == 0, "%s.data is NULL", name);
  SFA_REQUIRE(ctx, aligned(rows->data, sfa_dtype_bytes(out->dtype)), "%s.data is not aligned to its elements", name);
  if (rows->norm) {
    SFA_REQUIRE(ctx, rows->norm->weight && aligned(rows->norm->weight, sizeof(float)), "%s.norm has no weight, or one that is not aligned",
                name);
    SFA_REQUIRE(ctx, rows->norm->eps >= 0, "%s.norm.eps is %g: it must be 0 or more", name, (double)rows->norm->eps);
  }
  const sfa_rope *rope = rows->rope;
  if (!rope)
    return SFA_OK;
  SFA_REQUIRE(ctx, rope->cos && rope->sin && aligned(rope->cos, sizeof(float)) && aligned(rope->sin, sizeof(float)),
              "%s.rope has no cos or no sin, or one that is not aligned", name);
  SFA_REQUIRE(ctx, rope->n_rotated >= 0 && rope->n_rotated <= dim && rope->n_rotated % 2 == 0,
              "%s.rope.n_rotated is %d: it must be an even number from 0 to the row's %d features", name, rope->n_rotated, dim);
  SFA_REQUIRE(ctx, rope->interleaved == 0 || rope->interleaved == 1, "%s.rope.interleaved is %d: it must be 0 or 1", name,
              rope->interleaved);
  return SFA_OK;
}

sfa_status sfa_check_values(sfa_context *ctx, const sfa_rows *rows, int32_t n_heads, int32_t dim, int64_t max_seqlen, sfa_rows *out) {
  SFA_REQUIRE(ctx, !rows->rope, "v.rope is given: values are not rotated, it must be NULL");
  SFA_REQUIRE(ctx, !rows->norm, "v.norm is given: values are not normed, it must be NULL");
  return sfa_check_rows(ctx, "v", rows, n_heads, dim, max_seqlen, out);
}

sfa_status sfa_check_cache_layer(sfa_context *ctx, const sfa_cache *cache, int32_t layer) {
  SFA_REQUIRE(ctx, layer >= 0 && layer < cache->n_layers, "layer is %d: the cache has %d", layer, cache->n_layers);
  return SFA_OK;
}

sfa_status sfa_check_cache_sequence(sfa_context *ctx, const char *name, const sfa_cache *cache, int32_t sequence) {
  SFA_REQUIRE(ctx, sequence >= 0 && sequence < cache->n_sequences, "%s is %d: the cache has %d", name, sequence, cache->n_sequences);
  return SFA_OK;
}
