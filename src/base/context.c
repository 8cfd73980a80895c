/* Context, errors, memory, log, clock. The only file of the library that calls the C library's allocator. */
#include "base/context.h"

#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void *default_alloc(void *user, size_t bytes) {
  (void)user;
  size_t rounded;
  if (!sfa_add_size(bytes, 63, &rounded))
    return NULL;
  return aligned_alloc(64, rounded & ~(size_t)63);
}

static void default_free(void *user, void *memory) {
  (void)user;
  free(memory);
}

static int32_t processor_count(void) {
  cpu_set_t set;
  CPU_ZERO(&set);
  int count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  return count < 1 ? 1 : count;
}

/* The text of a context that is not made. */
static sfa_status refuse(const sfa_context_options *options, sfa_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static sfa_status refuse(const sfa_context_options *options, sfa_status status, const char *format, ...) {
  if (options->why && options->why_bytes) {
    va_list args;
    va_start(args, format);
    vsnprintf(options->why, options->why_bytes, format, args);
    va_end(args);
  }
  return status;
}

sfa_status sfa_context_init(const sfa_context_options *given, sfa_context **context) {
  if (!context)
    return SFA_ERROR_ARGUMENT;
  *context = NULL;
  if (given && given->struct_size != sizeof *given)
    return SFA_ERROR_ARGUMENT;
  sfa_context_options o = given ? *given : (sfa_context_options){0};
  sfa_allocator allocator = {default_alloc, default_free, NULL};
  if (o.allocator)
    allocator = *o.allocator;
  if (!allocator.alloc || !allocator.free)
    return refuse(&o, SFA_ERROR_ARGUMENT, "the allocator has no alloc or no free: give both, or no allocator for the C library's");
  sfa_isa isa = sfa_isa_best();
  if (o.isa != SFA_ISA_DEFAULT) {
    if (o.isa < SFA_ISA_SCALAR || o.isa > isa)
      return refuse(&o, SFA_ERROR_UNSUPPORTED, "isa is %d (%s): this machine has %s", (int)o.isa, sfa_isa_name(o.isa), sfa_isa_name(isa));
    isa = o.isa;
  }
  if (o.n_threads < 0 || o.n_threads > 4096)
    return refuse(&o, SFA_ERROR_ARGUMENT, "n_threads is %d: it must be from 1 to 4096, or 0 for all processors", o.n_threads);
  if (o.device != SFA_DEVICE_CPU && o.device != SFA_DEVICE_CUDA)
    return refuse(&o, SFA_ERROR_ARGUMENT, "device is %d: it must be SFA_DEVICE_CPU or SFA_DEVICE_CUDA", (int)o.device);
  if (o.device_index < 0)
    return refuse(&o, SFA_ERROR_ARGUMENT, "device_index is %d: it must not be negative", o.device_index);
  sfa_context *ctx = allocator.alloc(allocator.user, sizeof *ctx);
  if (!ctx)
    return refuse(&o, SFA_ERROR_MEMORY, "out of memory: %zu bytes for a context", sizeof *ctx);
  memset(ctx, 0, sizeof *ctx);
  ctx->allocator = allocator;
  ctx->isa = isa;
  ctx->n_threads = o.n_threads ? o.n_threads : processor_count();
  ctx->log = o.log;
  ctx->log_user = o.log_user;
  *context = ctx;
  return SFA_OK;
}

void sfa_context_free(sfa_context *ctx) { ctx->allocator.free(ctx->allocator.user, ctx); }

const char *sfa_context_error(const sfa_context *ctx) { return ctx ? ctx->error : ""; }
int32_t sfa_context_threads(const sfa_context *ctx) { return ctx ? ctx->n_threads : 0; }
sfa_isa sfa_context_isa(const sfa_context *ctx) { return ctx ? ctx->isa : SFA_ISA_DEFAULT; }

const char *sfa_status_name(sfa_status status) {
  static const char *const names[] = {"ok", "argument", "memory", "io", "format", "unsupported", "range", "cancelled", "device"};
  return (size_t)status < sizeof names / sizeof *names ? names[status] : "unknown";
}

size_t sfa_dtype_bytes(sfa_dtype dtype) {
  switch (dtype) {
  case SFA_F32: return 4;
  case SFA_BF16:
  case SFA_F16: return 2;
  case SFA_I8:
  case SFA_E4M3: return 1;
  default: return 0;
  }
}

sfa_status sfa_fail(sfa_context *ctx, sfa_status status, const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(ctx->error, sizeof ctx->error, format, args);
  va_end(args);
  return status;
}

void sfa_log(const sfa_context *ctx, const char *format, ...) {
  if (!ctx->log)
    return;
  char line[512];
  va_list args;
  va_start(args, format);
  vsnprintf(line, sizeof line, format, args);
  va_end(args);
  ctx->log(ctx->log_user, line);
}

sfa_status sfa_alloc(sfa_context *ctx, size_t bytes, const char *what, void **out) {
  *out = ctx->allocator.alloc(ctx->allocator.user, bytes ? bytes : 1);
  if (!*out)
    return sfa_fail(ctx, SFA_ERROR_MEMORY, "out of memory: %zu bytes for %s", bytes, what);
  if ((uintptr_t)*out % 64 == 0) /* kernels read and write whole vectors */
    return SFA_OK;
  sfa_fail(ctx, SFA_ERROR_ARGUMENT,
           "the allocator gave %p for %s: what it gives must be aligned to 64 bytes, as aligned_alloc(64, ..) has it", *out, what);
  ctx->allocator.free(ctx->allocator.user, *out);
  *out = NULL;
  return SFA_ERROR_ARGUMENT;
}

sfa_status sfa_alloc_zero(sfa_context *ctx, size_t count, size_t element_bytes, const char *what, void **out) {
  size_t bytes;
  *out = NULL;
  if (!sfa_mul_size(count, element_bytes, &bytes))
    return sfa_fail(ctx, SFA_ERROR_MEMORY, "%zu x %zu bytes for %s do not fit an address", count, element_bytes, what);
  SFA_TRY(sfa_alloc(ctx, bytes, what, out));
  memset(*out, 0, bytes);
  return SFA_OK;
}

void sfa_free(sfa_context *ctx, void *memory) {
  if (memory)
    ctx->allocator.free(ctx->allocator.user, memory);
}

sfa_status sfa_strdup(sfa_context *ctx, const char *text, char **out) {
  size_t bytes = text ? strlen(text) + 1 : 1;
  SFA_TRY(sfa_alloc(ctx, bytes, "a text", (void **)out));
  memcpy(*out, text ? text : "", bytes);
  return SFA_OK;
}

int64_t sfa_now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}
