/* cuda_check_tools.cuh: what the checks of single stages on a GPU share: failing calls, random numbers, device memory. */
#ifndef SFA_CUDA_CHECK_TOOLS_CUH
#define SFA_CUDA_CHECK_TOOLS_CUH

#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CUDA_TRY(call)                                                                                                                     \
  do {                                                                                                                                     \
    cudaError_t error_ = (call);                                                                                                           \
    if (error_ != cudaSuccess) {                                                                                                           \
      printf("%s: %s\n", #call, cudaGetErrorString(error_));                                                                               \
      exit(2);                                                                                                                             \
    }                                                                                                                                      \
  } while (0)

static uint64_t seed = 20261123;
static inline uint32_t next_bits(void) {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(seed >> 32);
}
static inline double uniform(void) { return (next_bits() + 0.5) / 4294967296.0; }
static inline float normal(void) { return (float)(sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform())); }

/* A copy of `from`; NULL: every byte is `fill`. */
static inline void *device_copy(size_t bytes, const void *from, int fill) {
  void *memory = NULL;
  CUDA_TRY(cudaMalloc(&memory, bytes + 64));
  if (from)
    CUDA_TRY(cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice));
  else
    CUDA_TRY(cudaMemset(memory, fill, bytes + 64));
  return memory;
}

#endif
