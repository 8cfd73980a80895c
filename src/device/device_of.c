/* The machine of a context: the CPU, or the shared object that knows GPUs, loaded when the first context on one asks for it. */
#include "device/device_of.h"

#include <sfa/stream.h>

#include "base/dl.h"
#include "device/device_cuda.h"

#include <string.h>

static const sfa_device_cuda_memory memory = {sfa_memory_alloc, sfa_memory_free, sfa_memory_copy, sfa_stream_of};

sfa_status sfa_device_of(sfa_context *ctx, const sfa_device **device, const sfa_training **training) {
  if (!ctx->cuda) {
    *device = sfa_device_cpu();
    *training = sfa_training_cpu();
    return SFA_OK;
  }
  void *symbol;
  sfa_device_cuda_open_fn open;
  SFA_TRY(sfa_dl_open(ctx, "libsfa_engine_cuda.so", "SFA_ENGINE_CUDA_LIBRARY", "sfa_device_cuda_open", &symbol));
  memcpy(&open, &symbol, sizeof open);
  const sfa_device_cuda_object *object = open(SFA_VERSION, SFA_DEVICE_CUDA_INTERFACE);
  if (!object)
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED,
                    "libsfa_engine_cuda.so is not of this build (version " SFA_VERSION "): build and install the two together");
  *device = object->device;
  *training = object->training;
  return object->open(ctx, &memory);
}
