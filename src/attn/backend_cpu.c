/* The CPU backend: plain memory, the folder code, the folder attn. */
#include "attn/attn.h"
#include "attn/attn_backward.h"
#include "code/code.h"

#include <string.h>

static void copy_memory(sfa_context *ctx, void *to, const void *from, size_t bytes) {
  (void)ctx;
  memcpy(to, from, bytes);
}

static int64_t encode_rows(const sfa_context *ctx, int64_t n_rows, const sfa_row_source *x, const sfa_row_format *format,
                           const sfa_row_store *out, void *scratch, int64_t *stage_ns) {
  return sfa_code_rows(sfa_kernel_of(ctx->isa), n_rows, x, format, out, scratch, stage_ns);
}

static const sfa_backend backend_cpu = {
    .name = "cpu",
    .memory_alloc = sfa_alloc,
    .memory_free = sfa_free,
    .memory_copy = copy_memory,
    .encode_scratch_bytes = sfa_code_scratch_bytes,
    .encode = encode_rows,
    .attend = sfa_attn_attend,
    .backward_bytes = sfa_attn_backward_workspace_bytes,
    .backward = sfa_attn_backward,
};

const sfa_backend *sfa_backend_of(const sfa_context *ctx) {
  (void)ctx;
  return &backend_cpu;
}
