/* device/device_cuda.cuh: what the CUDA files of this folder share: the machine's state, launching, sums over a warp or a block.
 *
 * Operations are put on the context's stream and return at once; what could not be launched is kept in the state and told by the device's
 * `finish`. Sums are trees of fixed shape: a call gives the same bits every time.
 */
#ifndef SFA_DEVICE_CUDA_CUH
#define SFA_DEVICE_CUDA_CUH

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

#include "base/cuda_early.cuh"

extern "C" {
#include "base/half.h"
#include "device/device_cuda.h"
}

enum { SFA_CUDA_WORKSPACE_BYTES = 32 << 20, SFA_CUDA_PLANS = 512, SFA_CUDA_SUMS = 256 };
extern const size_t sfa_cuda_plan_bytes;

/* What a context keeps here. */
struct sfa_device_state {
  const sfa_device_cuda_memory *memory;
  cublasLtHandle_t products;
  void *workspace;   /* of cuBLASLt */
  double *sums;      /* [SFA_CUDA_SUMS] of the blocks of a sum */
  unsigned *arrived; /* blocks of it; 0 between two sums */
  cudaMemPool_t pool;
  int n_processors;
  char failed[160];            /* the first operation that could not be put on the stream, "" if all could */
  struct sfa_cuda_plan *plans; /* [SFA_CUDA_PLANS] of products */
};

static inline cudaStream_t sfa_cuda_stream_of(const sfa_context *ctx) { return (cudaStream_t)ctx->device_state->memory->stream_of(ctx); }
/* Keeps the first thing that went wrong; NULL, cudaSuccess: nothing did. */
void sfa_cuda_note(const sfa_context *ctx, const char *refused, const char *what);
static inline void sfa_cuda_note(const sfa_context *ctx, cudaError_t error, const char *what) {
  sfa_cuda_note(ctx, error == cudaSuccess ? NULL : cudaGetErrorString(error), what);
}
/* Memory in stream order, for what lives within one operation; NULL is noted. */
void *sfa_cuda_borrow(const sfa_context *ctx, size_t bytes);
void sfa_cuda_return(const sfa_context *ctx, void *memory);

/* A matrix in memory, row-major, rows `stride` elements apart; transposed: it is used as its transpose. */
typedef struct sfa_cuda_matrix {
  const void *data;
  int64_t stride;
  bool transposed;
} sfa_cuda_matrix;

/* out [m][n] f32 = a [m][k] b [k][n] + bias [n], or with add: out += that; operands all f32 or all bf16. By cuBLASLt, f32 sums, no tf32. */
void sfa_cuda_multiply(const sfa_context *ctx, int64_t m, int64_t n, int64_t k, bool bf16, sfa_cuda_matrix a, sfa_cuda_matrix b,
                       const float *bias, bool add, float *out, int64_t out_stride);
/* out [n_rows][out_stride] bf16 or f32 = x [n_rows][dim], normalised if there is a weight (rms, or with center layer norm); zeros up to
 * out_stride. */
void sfa_cuda_norm_to(const sfa_context *ctx, int64_t n_rows, int32_t dim, const float *x, int64_t x_stride, const float *weight,
                      const float *bias, bool center, float eps, void *out, bool bf16, int64_t out_stride);

/* Fills in the operations of a file. */
void sfa_cuda_linear_ops(sfa_device *device);

#define SFA_CUDA_LAUNCH(ctx, kernel, grid, block, shared, ...)                                                                             \
  do {                                                                                                                                     \
    kernel<<<grid, block, shared, sfa_cuda_stream_of(ctx)>>>(__VA_ARGS__);                                                                 \
    sfa_cuda_note(ctx, cudaPeekAtLastError(), #kernel);                                                                                    \
  } while (0)

/* Blocks for n pieces of work, at most a few waves: kernels go on in strides of the grid. */
static inline unsigned sfa_cuda_blocks(int64_t n, int64_t a_block) {
  const int64_t most = 1 << 16, blocks = (n + a_block - 1) / a_block;
  return (unsigned)(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

/* ---- On the device ---------------------------------------------------------------------------------------------------------------- */

__device__ static inline float sfa_warp_sum(float x) {
  for (int width = 16; width > 0; width /= 2)
    x += __shfl_xor_sync(~0u, x, width);
  return x;
}

__device__ static inline double sfa_warp_sum(double x) {
  for (int width = 16; width > 0; width /= 2)
    x += __shfl_xor_sync(~0u, x, width);
  return x;
}

/* Of WARPS warps; every thread gets it. `room` [WARPS] is free again after the next barrier. */
template <int WARPS, typename T> __device__ static inline T sfa_block_sum(T x, T *room) {
  x = sfa_warp_sum(x);
  if (WARPS == 1)
    return x;
  __syncthreads();
  if (threadIdx.x % 32 == 0)
    room[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = 0;
  for (int warp = 0; warp < WARPS; warp++)
    sum += room[warp];
  return sum;
}

__device__ static inline float sfa_sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* silu x = x sigmoid(x); gelu x = x sigmoid(2u), 2u = 2 sqrt(2 / pi) (x + 0.044715 x^3). */
__device__ static inline float sfa_activated(int act, float x) {
  return x * sfa_sigmoid(act == SFA_ACT_GELU_TANH ? x * fmaf(x * x, 0x1.2444f2p-4f, 0x1.988454p+0f) : x);
}

#endif
