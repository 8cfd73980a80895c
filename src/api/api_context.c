/* Contexts, and the device that each computes on: its memory, its stream. */
#include "api/api_check.h"
#include "cuda/cuda.h"

#include <stdio.h>

/* ---- Contexts ------------------------------------------------------------------------------------------------------------------ */

sfa_status sfa_context_create(const sfa_context_options *options, sfa_context **context) {
  SFA_TRY(sfa_context_init(options, context));
  sfa_context *ctx = *context;
  ctx->backend = &sfa_backend_cpu;
  if (!options || options->device == SFA_DEVICE_CPU)
    return SFA_OK;
  sfa_status status = sfa_cuda_open(ctx, options->device_index);
  if (status == SFA_OK)
    return SFA_OK;
  if (options->why && options->why_bytes)
    snprintf(options->why, options->why_bytes, "%s", ctx->error);
  sfa_log(ctx, "%s", ctx->error);
  sfa_context_destroy(ctx);
  *context = NULL;
  return status;
}

void sfa_context_destroy(sfa_context *ctx) {
  if (!ctx)
    return;
  if (ctx->device_state_close)
    ctx->device_state_close(ctx);
  sfa_cuda_close(ctx);
  sfa_context_free(ctx);
}

sfa_device_kind sfa_context_device(const sfa_context *ctx) { return ctx && ctx->cuda ? SFA_DEVICE_CUDA : SFA_DEVICE_CPU; }

sfa_status sfa_device_list(sfa_context *ctx, int32_t capacity, sfa_device_info *devices, int32_t *n_devices) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(ctx, n_devices && capacity >= 0 && (devices || !capacity), "n_devices or devices is NULL, or capacity negative");
  return sfa_cuda_device_list(ctx, capacity, devices, n_devices);
}

/* ---- Memory and stream ----------------------------------------------------------------------------------------------------------- */

sfa_status sfa_memory_alloc(sfa_context *ctx, size_t bytes, void **memory) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(ctx, memory, "memory is NULL");
  return ctx->backend->memory_alloc(ctx, bytes, "the caller", memory);
}

void sfa_memory_free(sfa_context *ctx, void *memory) {
  if (ctx)
    ctx->backend->memory_free(ctx, memory);
}

sfa_status sfa_memory_copy(sfa_context *ctx, void *to, const void *from, size_t bytes) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(ctx, (to && from) || !bytes, "to or from is NULL");
  return bytes ? ctx->backend->memory_copy(ctx, to, from, bytes) : SFA_OK;
}

sfa_status sfa_memory_zero(sfa_context *ctx, void *memory, size_t bytes) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(ctx, memory || !bytes, "memory is NULL");
  return bytes ? ctx->backend->memory_zero(ctx, memory, bytes) : SFA_OK;
}

sfa_status sfa_stream_set(sfa_context *ctx, void *stream) { return ctx ? ctx->backend->stream_set(ctx, stream) : SFA_ERROR_ARGUMENT; }

void *sfa_stream_of(const sfa_context *ctx) { return ctx ? ctx->backend->stream_of(ctx) : NULL; }

sfa_status sfa_stream_wait(sfa_context *ctx) { return ctx ? ctx->backend->stream_wait(ctx) : SFA_ERROR_ARGUMENT; }
