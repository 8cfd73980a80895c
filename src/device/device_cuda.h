/* device/device_cuda.h: the CUDA device: whole-tensor operations on a GPU. All arrays are device memory but where a comment says host.
 *
 * It is a shared object of its own (libsfa_engine_cuda.so), loaded when a context on a GPU asks for it (device_of.c). Bits: the same call
 * gives the same bits, but products of many rows and of few take different ways, so that a row's bits depend on how many come together.
 */
#ifndef SFA_DEVICE_CUDA_H
#define SFA_DEVICE_CUDA_H

#include "device/training.h"

/* Memory and stream of a context, as sfa/stream.h has them: the shared object does not see the libsfa of the program that loads it. */
typedef struct sfa_device_cuda_memory {
  sfa_status (*alloc)(sfa_context *ctx, size_t bytes, void **memory);
  void (*free)(sfa_context *ctx, void *memory);
  sfa_status (*copy)(sfa_context *ctx, void *to, const void *from, size_t bytes);
  void *(*stream_of)(const sfa_context *ctx);
} sfa_device_cuda_memory;

/* What the shared object gives to libsfa_engine. */
typedef struct sfa_device_cuda_object {
  /* Makes the context's state (once); it goes with the context. `memory` must stay. */
  sfa_status (*open)(sfa_context *ctx, const sfa_device_cuda_memory *memory);
  const sfa_device *device;
  const sfa_training *training;
} sfa_device_cuda_object;

/* What both sides must have compiled alike. */
#define SFA_DEVICE_CUDA_INTERFACE                                                                                                          \
  (sizeof(sfa_device) + sizeof(sfa_training) + sizeof(struct sfa_context) + sizeof(sfa_projection) + sizeof(sfa_device_cuda_memory))

/* The only symbol of the shared object. version: SFA_VERSION; NULL: the two were not built together. */
typedef const sfa_device_cuda_object *(*sfa_device_cuda_open_fn)(const char *version, size_t interface_bytes);
SFA_API const sfa_device_cuda_object *sfa_device_cuda_open(const char *version, size_t interface_bytes);

const sfa_device *sfa_device_cuda(void);
const sfa_training *sfa_training_cuda(void);

#endif
