/* cuda/cuda.h: the CUDA backend as libsfa sees it: plain C over the table of libsfa_cuda.so. */
#ifndef SFA_CUDA_H
#define SFA_CUDA_H

#include <sfa/stream.h>

#include "backend/backend.h"

/* Makes the context one of that GPU: ctx->cuda and ctx->backend. On failure it is as before. */
sfa_status sfa_cuda_open(sfa_context *ctx, int32_t device_index);
/* Takes a context without a GPU. */
void sfa_cuda_close(sfa_context *ctx);

/* Contracts in sfa/stream.h; arguments are checked. */
sfa_status sfa_cuda_device_list(sfa_context *ctx, int32_t capacity, sfa_device_info *devices, int32_t *n_devices);

#endif
