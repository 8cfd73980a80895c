/* cuda_check_tools.cuh: what the checks of single stages on a GPU share: failing calls, random numbers, cases, device memory. */
#ifndef SFA_CUDA_CHECK_TOOLS_CUH
#define SFA_CUDA_CHECK_TOOLS_CUH

#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
/* Each case draws its own numbers, whichever cases run. */
static inline void begin_case(int number) {
  seed = 20261123 + 7919 * (uint64_t)number;
  next_bits();
}
static inline double uniform(void) { return (next_bits() + 0.5) / 4294967296.0; }
static inline float normal(void) { return (float)(sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform())); }

/* What to do, of arguments [--check-only [FIRST [LAST]] | --time-only]. */
typedef struct check_wish {
  bool cases, times;
  int first, last;
} check_wish;

static inline check_wish wish_of(int argc, char **argv) {
  const bool cases_only = argc > 1 && strcmp(argv[1], "--check-only") == 0, times_only = argc > 1 && strcmp(argv[1], "--time-only") == 0;
  return (check_wish){!times_only, !cases_only, cases_only && argc > 2 ? atoi(argv[2]) : 0,
                      cases_only && argc > 3 ? atoi(argv[3]) : INT32_MAX};
}

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
