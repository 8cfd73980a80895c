/* The CPU backend: plain memory, the folder code, the folder attn. */
#include "attn/attn.h"
#include "attn/attn_backward.h"
#include "code/code.h"

#include <string.h>

static sfa_status copy_memory(sfa_context *ctx, void *to, const void *from, size_t bytes) {
  (void)ctx;
  memcpy(to, from, bytes);
  return SFA_OK;
}

static sfa_status zero_memory(sfa_context *ctx, void *memory, size_t bytes) {
  (void)ctx;
  memset(memory, 0, bytes);
  return SFA_OK;
}

/* Work is done when a call returns. */
static sfa_status set_stream(sfa_context *ctx, void *stream) {
  (void)ctx;
  (void)stream;
  return SFA_OK;
}

static void *stream_of(const sfa_context *ctx) {
  (void)ctx;
  return NULL;
}

static sfa_status wait(sfa_context *ctx) {
  (void)ctx;
  return SFA_OK;
}

static int64_t encode_rows(const sfa_context *ctx, int64_t n_rows, const sfa_row_source *x, const sfa_row_format *format,
                           const sfa_row_store *out, void *scratch, int64_t *stage_ns) {
  return sfa_code_rows(sfa_kernel_of(ctx->isa), n_rows, x, format, out, scratch, stage_ns);
}

const sfa_backend sfa_backend_cpu = {
    .name = "cpu",
    .memory_alloc = sfa_alloc,
    .memory_free = sfa_free,
    .memory_copy = copy_memory,
    .memory_zero = zero_memory,
    .stream_set = set_stream,
    .stream_of = stream_of,
    .stream_wait = wait,
    .encode_scratch_bytes = sfa_code_scratch_bytes,
    .encode = encode_rows,
    .attend = sfa_attn_attend,
    .plan = sfa_attn_plan_fill,
    .predict = sfa_attn_report_times,
    .run = sfa_attn_run,
    .merge = sfa_attn_merge,
    .backward_bytes = sfa_attn_backward_workspace_bytes,
    .backward = sfa_attn_backward,
};
