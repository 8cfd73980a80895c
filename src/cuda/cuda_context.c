/* A context on a GPU: finding the GPUs, loading the shared object, memory and stream. */
#include "cuda/cuda_state.h"

#include "base/dl.h"

#include <stdio.h>
#include <string.h>

enum { MOST_DEVICES = 64, LEAST_COMPUTE = 80 };

sfa_status sfa_cuda_status(sfa_context *ctx, const char *what, const char *text) {
  if (!text)
    return SFA_OK;
  if (!ctx->cuda || !ctx->cuda->library->is_lost())
    return sfa_fail(ctx, SFA_ERROR_DEVICE, "%s: %s", what, text);
  return sfa_fail(
      ctx, SFA_ERROR_DEVICE,
      "%s: %s. The GPU is lost to this process, start it anew; a kernel does this that is given memory which is not the GPU's, or "
      "less of it than the call reads or writes",
      what, text);
}

sfa_status sfa_cuda_enter(sfa_context *ctx) {
  return sfa_cuda_status(ctx, "entering the GPU", ctx->cuda->library->enter(ctx->cuda->device));
}

/* ---- Opening ------------------------------------------------------------------------------------------------------------------------- */

static sfa_status load(sfa_context *ctx, const sfa_cuda_library **library) {
  void *symbol;
  sfa_cuda_open_fn open;
  SFA_TRY(sfa_dl_open(ctx, "libsfa_cuda.so", "SFA_CUDA_LIBRARY", "sfa_backend_cuda_open", &symbol));
  memcpy(&open, &symbol, sizeof open);
  *library = open(SFA_VERSION, SFA_CUDA_INTERFACE);
  return *library ? SFA_OK
                  : sfa_fail(ctx, SFA_ERROR_UNSUPPORTED,
                             "libsfa_cuda.so is not of this build (version " SFA_VERSION "): build and install the two together");
}

static sfa_status find(sfa_context *ctx, const sfa_cuda_library *library, sfa_cuda_found found[MOST_DEVICES], int32_t *n_found) {
  SFA_TRY(sfa_cuda_status(ctx, "CUDA", library->find(MOST_DEVICES, found, n_found)));
  *n_found = *n_found < MOST_DEVICES ? *n_found : MOST_DEVICES;
  return SFA_OK;
}

/* Why no context can be made on a GPU; false: nothing is in the way. */
static bool is_too_old(const sfa_cuda_found *gpu, char why[160]) {
  if (gpu->compute_major * 10 + gpu->compute_minor >= LEAST_COMPUTE)
    return false;
  snprintf(why, 160, "compute capability %d.%d: 8.0 or later is needed", gpu->compute_major, gpu->compute_minor);
  return true;
}

sfa_status sfa_cuda_device_list(sfa_context *ctx, int32_t capacity, sfa_device_info *devices, int32_t *n_devices) {
  const sfa_cuda_library *library;
  sfa_cuda_found found[MOST_DEVICES];
  *n_devices = 0;
  SFA_TRY(load(ctx, &library));
  SFA_TRY(find(ctx, library, found, n_devices));
  for (int32_t i = 0; i < *n_devices && i < capacity; i++) {
    const sfa_cuda_found *gpu = &found[i];
    devices[i] = (sfa_device_info){.kind = SFA_DEVICE_CUDA,
                                   .index = i,
                                   .compute_major = gpu->compute_major,
                                   .compute_minor = gpu->compute_minor,
                                   .n_processors = gpu->n_processors,
                                   .memory_bytes = gpu->memory_bytes,
                                   .free_bytes = gpu->free_bytes};
    memcpy(devices[i].name, gpu->name, sizeof devices[i].name);
    devices[i].is_usable = !is_too_old(gpu, devices[i].why);
  }
  return SFA_OK;
}

static sfa_status open_device(sfa_context *ctx, const sfa_cuda_found *gpu, sfa_cuda *cuda) {
  char why[160];
  if (is_too_old(gpu, why))
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "GPU %d (%s): %s", cuda->device, gpu->name, why);
  cuda->compute = gpu->compute_major * 10 + gpu->compute_minor;
  SFA_TRY(sfa_cuda_status(ctx, "entering the GPU", cuda->library->enter(cuda->device)));
  SFA_TRY(sfa_cuda_status(ctx, "a stream", cuda->library->stream_create(&cuda->own_stream)));
  cuda->stream = cuda->own_stream;
  ctx->cuda = cuda;
  void *n_bad;
  SFA_TRY(ctx->backend->memory_alloc(ctx, sizeof *cuda->n_bad, "a counter", &n_bad));
  cuda->n_bad = n_bad;
  return ctx->backend->memory_zero(ctx, n_bad, sizeof *cuda->n_bad);
}

sfa_status sfa_cuda_open(sfa_context *ctx, int32_t device_index) {
  const sfa_cuda_library *library;
  sfa_cuda_found found[MOST_DEVICES];
  int32_t n_found;
  sfa_cuda *cuda;
  SFA_TRY(load(ctx, &library));
  SFA_TRY(find(ctx, library, found, &n_found));
  if (device_index >= n_found)
    return sfa_fail(ctx, SFA_ERROR_DEVICE, "device_index is %d: the driver shows %d GPU%s, counted from 0", device_index, n_found,
                    n_found == 1 ? "" : "s");
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *cuda, "a context on a GPU", (void **)&cuda));
  cuda->library = library;
  cuda->device = device_index;
  const sfa_backend *before = ctx->backend;
  ctx->backend = &sfa_backend_cuda;
  sfa_status status = open_device(ctx, &found[device_index], cuda);
  if (status != SFA_OK) {
    ctx->cuda = cuda;
    sfa_cuda_close(ctx);
    ctx->backend = before;
  }
  return status;
}

void sfa_cuda_close(sfa_context *ctx) {
  sfa_cuda *cuda = ctx->cuda;
  if (!cuda)
    return;
  if (cuda->own_stream && !cuda->library->enter(cuda->device)) {
    cuda->library->stream_wait(cuda->stream);
    sfa_cuda_laps_close(cuda);
    cuda->library->memory_free(cuda->n_bad);
    cuda->library->memory_free(cuda->scratch);
    cuda->library->stream_destroy(cuda->own_stream);
  }
  ctx->cuda = NULL;
  sfa_free(ctx, cuda);
}

/* ---- Memory and stream: contracts in backend.h ----------------------------------------------------------------------- */

static sfa_status alloc_memory(sfa_context *ctx, size_t bytes, const char *what, void **out) {
  const sfa_cuda *cuda = ctx->cuda;
  size_t free_bytes = 0;
  *out = NULL;
  SFA_TRY(sfa_cuda_enter(ctx));
  SFA_TRY(sfa_cuda_status(ctx, "memory of the GPU", cuda->library->memory_alloc(bytes, out, &free_bytes)));
  return *out ? SFA_OK
              : sfa_fail(ctx, SFA_ERROR_MEMORY, "out of memory on GPU %d: %zu bytes for %s, %zu are free", cuda->device, bytes, what,
                         free_bytes);
}

static void free_memory(sfa_context *ctx, void *memory) {
  if (memory && sfa_cuda_enter(ctx) == SFA_OK)
    ctx->cuda->library->memory_free(memory);
}

static sfa_status copy_memory(sfa_context *ctx, void *to, const void *from, size_t bytes) {
  SFA_TRY(sfa_cuda_enter(ctx));
  return sfa_cuda_status(ctx, "a copy", ctx->cuda->library->memory_copy(to, from, bytes, ctx->cuda->stream));
}

static sfa_status zero_memory(sfa_context *ctx, void *memory, size_t bytes) {
  SFA_TRY(sfa_cuda_enter(ctx));
  return sfa_cuda_status(ctx, "clearing memory", ctx->cuda->library->memory_zero(memory, bytes, ctx->cuda->stream));
}

sfa_status sfa_cuda_scratch(sfa_context *ctx, size_t bytes, void **out) {
  sfa_cuda *cuda = ctx->cuda;
  if (bytes > cuda->scratch_bytes) {
    void *larger;
    SFA_TRY(alloc_memory(ctx, bytes, "scratch of a call", &larger));
    free_memory(ctx, cuda->scratch);
    cuda->scratch = larger;
    cuda->scratch_bytes = bytes;
  }
  *out = cuda->scratch;
  return SFA_OK;
}

static sfa_status set_stream(sfa_context *ctx, void *stream) {
  ctx->cuda->stream = stream ? stream : ctx->cuda->own_stream;
  return SFA_OK;
}

static void *stream_of(const sfa_context *ctx) { return ctx->cuda->stream; }

static sfa_status wait(sfa_context *ctx) {
  int32_t n_bad = 0;
  SFA_TRY(copy_memory(ctx, &n_bad, ctx->cuda->n_bad, sizeof n_bad));
  SFA_TRY(sfa_cuda_status(ctx, "waiting for the GPU", ctx->cuda->library->stream_wait(ctx->cuda->stream)));
  if (!n_bad)
    return SFA_OK;
  SFA_TRY(zero_memory(ctx, ctx->cuda->n_bad, sizeof n_bad));
  return sfa_fail(ctx, SFA_ERROR_RANGE,
                  "%d row%s coded since the last wait held a value beyond 65504, which neither f16 nor a row scale can hold: scale the "
                  "input, or store keys and values as bf16 or f32",
                  n_bad, n_bad == 1 ? "" : "s");
}

const sfa_backend sfa_backend_cuda = {
    .name = "cuda",
    .memory_alloc = alloc_memory,
    .memory_free = free_memory,
    .memory_copy = copy_memory,
    .memory_zero = zero_memory,
    .stream_set = set_stream,
    .stream_of = stream_of,
    .stream_wait = wait,
    .slab_bytes = (size_t)64 << 20,
    .plan = sfa_cuda_plan,
    .run = sfa_cuda_run,
    .backward_bytes = sfa_cuda_gradients_bytes,
    .backward = sfa_cuda_gradients,
    .merge = sfa_cuda_merge,
    .select = sfa_cuda_select_codes,
    .densify = sfa_cuda_densify,
    .keep = sfa_cuda_keep,
    .append = sfa_cuda_append,
    .attend_tables = sfa_cuda_attend_tables,
    .set_table = sfa_cuda_set_table,
    .set_lens = sfa_cuda_set_lens,
};
