/* libsfa_cuda.so: memory and streams of a GPU, and the table that libsfa loads (cuda_library.h). The stages are in files of their own;
 * those that a build has are named here by its CMakeLists. */
#include "cuda/cuda_library.h"

#include <cuda_runtime.h>
#include <string.h>

static const char *text_of(cudaError_t error) {
  if (error == cudaSuccess)
    return NULL;
  (void)cudaGetLastError(); /* what can be forgotten is; a fault of the device comes again with the next call */
  return cudaGetErrorString(error);
}

/* ---- Devices ------------------------------------------------------------------------------------------------------------------------- */

static const char *find(int32_t capacity, sfa_cuda_found *found, int32_t *n_found) {
  int n = 0, version = 0;
  *n_found = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0)
    return "there is no NVIDIA driver (libcuda.so.1): install one for the GPU";
  cudaError_t error = cudaGetDeviceCount(&n);
  if (error == cudaErrorInsufficientDriver)
    return "the NVIDIA driver is older than this build's CUDA: update the driver";
  if (error == cudaErrorNoDevice || (error == cudaSuccess && n == 0))
    return "the NVIDIA driver shows no GPU (CUDA_VISIBLE_DEVICES hides those that it does not name)";
  if (error != cudaSuccess)
    return text_of(error);
  for (int i = 0; i < n && i < capacity; i++) {
    struct cudaDeviceProp p;
    memset(&found[i], 0, sizeof found[i]);
    if ((error = cudaGetDeviceProperties(&p, i)) != cudaSuccess)
      return text_of(error);
    memcpy(found[i].name, p.name, sizeof found[i].name - 1);
    found[i].compute_major = p.major;
    found[i].compute_minor = p.minor;
    found[i].n_processors = p.multiProcessorCount;
    found[i].memory_bytes = (int64_t)p.totalGlobalMem;
    size_t free_bytes = 0, total;
    if (cudaSetDevice(i) == cudaSuccess && cudaMemGetInfo(&free_bytes, &total) == cudaSuccess)
      found[i].free_bytes = (int64_t)free_bytes;
    (void)cudaGetLastError();
  }
  *n_found = n;
  return NULL;
}

static const char *enter(int32_t index) { return text_of(cudaSetDevice(index)); }

/* A kernel that faulted takes its process's state on the GPU with it: from then on every call fails, this one too. */
static bool is_lost(void) {
  size_t free_bytes, total;
  return text_of(cudaMemGetInfo(&free_bytes, &total)) != NULL;
}

/* ---- Streams and memory -------------------------------------------------------------------------------------------------------------- */

static const char *stream_create(sfa_cuda_stream *stream) { return text_of(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking)); }

static void stream_destroy(sfa_cuda_stream stream) { (void)text_of(cudaStreamDestroy(stream)); }

static const char *stream_wait(sfa_cuda_stream stream) { return text_of(cudaStreamSynchronize(stream)); }

static bool stream_is_captured(sfa_cuda_stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return text_of(cudaStreamIsCapturing(stream, &status)) || status != cudaStreamCaptureStatusNone;
}

static const char *memory_alloc(size_t bytes, void **out, size_t *free_bytes) {
  *out = NULL;
  cudaError_t error = cudaMalloc(out, bytes ? bytes : 1);
  if (error != cudaErrorMemoryAllocation)
    return text_of(error);
  size_t total;
  (void)cudaGetLastError();
  *out = NULL;
  *free_bytes = 0;
  return text_of(cudaMemGetInfo(free_bytes, &total));
}

static void memory_free(void *memory) { (void)text_of(cudaFree(memory)); }

static const char *memory_copy(void *to, const void *from, size_t bytes, sfa_cuda_stream stream) {
  return bytes ? text_of(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream)) : NULL;
}

static const char *memory_copy_rows(void *to, size_t to_pitch, const void *from, size_t row_bytes, size_t n_rows, sfa_cuda_stream stream) {
  return text_of(cudaMemcpy2DAsync(to, to_pitch, from, row_bytes, row_bytes, n_rows, cudaMemcpyDeviceToDevice, stream));
}

static const char *memory_zero(void *memory, size_t bytes, sfa_cuda_stream stream) {
  return bytes ? text_of(cudaMemsetAsync(memory, 0, bytes, stream)) : NULL;
}

/* ---- Marks --------------------------------------------------------------------------------------------------------------------------- */

static const char *mark_create(void **mark) { return text_of(cudaEventCreate((cudaEvent_t *)mark)); }

static void mark_destroy(void *mark) { (void)text_of(cudaEventDestroy((cudaEvent_t)mark)); }

static const char *mark(void *mark, sfa_cuda_stream stream) { return text_of(cudaEventRecord((cudaEvent_t)mark, stream)); }

static const char *mark_ns(void *from, void *to, int64_t *ns) {
  float ms = 0;
  const char *text = text_of(cudaEventElapsedTime(&ms, (cudaEvent_t)from, (cudaEvent_t)to));
  *ns = (int64_t)(1e6 * (double)ms);
  return text;
}

/* ---- The table ----------------------------------------------------------------------------------------------------------------------- */

static const sfa_cuda_library library = {
    find,
    enter,
    is_lost,
    stream_create,
    stream_destroy,
    stream_wait,
    stream_is_captured,
    memory_alloc,
    memory_free,
    memory_copy,
    memory_copy_rows,
    memory_zero,
    mark_create,
    mark_destroy,
    mark,
    mark_ns,
    {sfa_cuda_help_words, sfa_cuda_help_lens, sfa_cuda_help_numbers, sfa_cuda_help_span, sfa_cuda_help_tables, sfa_cuda_help_slots,
     sfa_cuda_help_unpack, sfa_cuda_help_pack, sfa_cuda_help_merge, sfa_cuda_help_spread, sfa_cuda_help_unrotate},
    {
#ifdef SFA_CUDA_HAS_SELECT
        sfa_cuda_select_run,
        sfa_cuda_store_run,
#else
        NULL,
        NULL,
#endif
#ifdef SFA_CUDA_HAS_GATHER
        sfa_cuda_gather_run,
#else
        NULL,
#endif
#ifdef SFA_CUDA_HAS_PREFILL_SM90
        sfa_cuda_prefill_run,
#else
        NULL,
#endif
#ifdef SFA_CUDA_HAS_PREFILL_PORTABLE
        sfa_cuda_prefill_portable_run,
#else
        NULL,
#endif
#ifdef SFA_CUDA_HAS_DECODE
        sfa_cuda_decode_workspace_bytes,
        sfa_cuda_decode_run,
#else
        NULL,
        NULL,
#endif
#ifdef SFA_CUDA_HAS_BACKWARD
        sfa_cuda_backward_workspace_bytes,
        sfa_cuda_backward_run,
#else
        NULL,
        NULL,
#endif
#ifdef SFA_CUDA_HAS_PAPER
        sfa_cuda_paper_workspace_bytes,
        sfa_cuda_paper_run,
#else
        NULL,
        NULL,
#endif
    },
};

const sfa_cuda_library *sfa_backend_cuda_open(const char *version, size_t interface_bytes) {
  return strcmp(version, SFA_VERSION) == 0 && interface_bytes == SFA_CUDA_INTERFACE ? &library : NULL;
}
