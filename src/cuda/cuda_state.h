/* cuda/cuda_state.h: what a CUDA context keeps, and how the files of this folder call the GPU. */
#ifndef SFA_CUDA_STATE_H
#define SFA_CUDA_STATE_H

#include "cuda/cuda.h"
#include "cuda/cuda_library.h"

typedef struct sfa_cuda {
  const sfa_cuda_library *library;
  int32_t device;                     /* its index */
  int32_t compute;                    /* 10 * major + minor */
  sfa_cuda_stream own_stream, stream; /* the second is in use: the first, or the caller's */
  int32_t *n_bad;                     /* device, [1] rows that their storage type cannot hold, since the last wait */
} sfa_cuda;

/* SFA_ERROR_DEVICE with a text of the library's, or SFA_OK without one; `what` was to be done. */
sfa_status sfa_cuda_status(sfa_context *ctx, const char *what, const char *text);
/* The context's GPU becomes the thread's. Before any call of the library. */
sfa_status sfa_cuda_enter(sfa_context *ctx);

#endif
