/* base/cuda_early.cuh: kernels that start while the one before on the stream still runs (compute capability 9.0 and later).
 *
 * Each waits first, and then lets the next one start: so what was before the previous kernel is done when a kernel starts, and nothing is
 * read or written before the wait but what no kernel of the stream writes.
 */
#ifndef SFA_CUDA_EARLY_CUH
#define SFA_CUDA_EARLY_CUH

#include <cuda_runtime.h>

/* Until all that was launched before is done; what was launched early after this may then start. */
__device__ static inline void sfa_cuda_wait_for_previous(void) {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/* Whether the code that such a GPU runs waits. Of a GPU that this file was not compiled for the driver compiles that of an earlier one,
 * which may not. */
static inline bool sfa_cuda_code_waits(int major) {
  bool waits = false;
  for (int architecture : {__CUDA_ARCH_LIST__})
    waits = waits || (architecture >= 900 && architecture / 100 == major);
  return waits;
}

/* Launches a kernel that begins with sfa_cuda_wait_for_previous. */
template <class Job>
static const char *sfa_cuda_launch_after(void (*kernel)(Job), dim3 grid, unsigned threads, size_t shared, cudaStream_t stream,
                                         const Job &job) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = sfa_cuda_code_waits(major);
  if (error == cudaSuccess)
    error = cudaLaunchKernelEx(&config, kernel, job);
  return error == cudaSuccess ? NULL : cudaGetErrorString(error);
}

#endif
