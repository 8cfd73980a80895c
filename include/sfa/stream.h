/* sfa/stream.h: the device that a context computes on: which there are, their memory, and the order of work on them.
 *
 * On a CUDA context (sfa_context_options.device) the library's arrays are the GPU's: every pointer to numbers in sfa_attention_args,
 * sfa_attention_grad_args, sfa_codes, sfa_rows, sfa_rope, sfa_row_norm and sfa_paged_kv is device memory; the structs themselves, stage_ns,
 * and what a comment calls host memory, are not. Calls put their work on the context's stream and return; the results are there after
 * sfa_stream_wait, or for whatever is put on the same stream later. Nothing in a call allocates, or synchronises where no stage_ns is asked
 * for, so that a CUDA graph can capture it. What cannot be looked at without waiting (lengths, slots, block tables) is clamped on the
 * device instead of being refused.
 *
 * On a CPU context all memory is the host's, copies are memcpy, and work is done when a call returns: a program written for the one runs
 * on the other.
 */
#ifndef SFA_STREAM_H
#define SFA_STREAM_H

#include <sfa/base.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Memory ------------------------------------------------------------------------------------------------------------------- */

/* Memory of the context's device, aligned to 256 bytes on a GPU and 64 on the CPU; not cleared. SFA_ERROR_MEMORY: the text says how much is
 * free. free waits for work that is under way on a GPU, and takes NULL. */
SFA_API sfa_status sfa_memory_alloc(sfa_context *ctx, size_t bytes, void **memory);
SFA_API void sfa_memory_free(sfa_context *ctx, void *memory);
/* In stream order; either side may be the device's or the host's. Ordinary host memory may be changed or freed on return, and holds what
 * was copied to it; page-locked memory (cudaMallocHost) is copied in the background. The two must not overlap. */
SFA_API sfa_status sfa_memory_copy(sfa_context *ctx, void *to, const void *from, size_t bytes);
/* Bytes become 0, in stream order. */
SFA_API sfa_status sfa_memory_zero(sfa_context *ctx, void *memory, size_t bytes);

/* ---- Order -------------------------------------------------------------------------------------------------------------------- */

/* Puts all later work of the context on a stream of the caller's (a cudaStream_t, which must outlive its use here); NULL: back to the
 * context's own. The caller orders the two streams (events, or sfa_stream_wait before). On the CPU the stream is not looked at. */
SFA_API sfa_status sfa_stream_set(sfa_context *ctx, void *stream);
/* The stream in use, a cudaStream_t; NULL on the CPU. */
SFA_API void *sfa_stream_of(const sfa_context *ctx);
/* Waits until everything on the stream is done, and tells what went wrong meanwhile. SFA_ERROR_DEVICE: the GPU or its driver failed; after
 * a fault of the device nothing on it works any more in this process. SFA_ERROR_RANGE: since the last wait a row was coded with a finite
 * value beyond what its type can hold; what was stored for it is undefined. */
SFA_API sfa_status sfa_stream_wait(sfa_context *ctx);

/* ---- Devices ------------------------------------------------------------------------------------------------------------------ */

typedef struct sfa_device_info {
  sfa_device_kind kind;
  int32_t index; /* for sfa_context_options.device_index */
  char name[96]; /* as the driver calls it */
  int32_t compute_major, compute_minor;
  int32_t n_processors; /* streaming multiprocessors */
  int64_t memory_bytes, free_bytes;
  int32_t is_usable; /* 1: a context can be made on it */
  char why[160];     /* else what is in the way */
} sfa_device_info;

/* The GPUs that the driver shows, usable or not: up to `capacity` of them in devices, *n_devices how many there are. ctx may be any
 * context. SFA_ERROR_UNSUPPORTED or SFA_ERROR_DEVICE: there is no CUDA here at all; the context's text says why (this build has none, no
 * driver, no GPU), *n_devices is 0. */
SFA_API sfa_status sfa_device_list(sfa_context *ctx, int32_t capacity, sfa_device_info *devices, int32_t *n_devices);

#ifdef __cplusplus
}
#endif
#endif
