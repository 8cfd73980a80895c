/* base/context.h: what every layer uses of a context: errors, memory, log, threads. */
#ifndef SFA_CONTEXT_H
#define SFA_CONTEXT_H

#include <sfa/base.h>
#include <stdbool.h>

struct sfa_context {
  sfa_allocator allocator;
  sfa_log_fn log;
  void *log_user;
  int32_t n_threads;
  sfa_isa isa;
  const struct sfa_backend *backend;     /* backend/backend.h */
  struct sfa_cuda *cuda;                 /* what the CUDA backend keeps (cuda/cuda.h); NULL on the CPU */
  struct sfa_device_state *device_state; /* what the engine's CUDA device keeps (device/device_cuda.cuh), and its end; NULL: nothing */
  void (*device_state_close)(sfa_context *ctx);
  char error[512];
};

/* A context as sfa_context_create makes it, before it has a backend; and its end. *context is NULL on failure, the text in options->why. */
sfa_status sfa_context_init(const sfa_context_options *options, sfa_context **context);
void sfa_context_free(sfa_context *ctx);

/* Sets the context's error text and returns status, so that a check reads `return sfa_fail(ctx, SFA_ERROR_..., "...", ...)`. The text
 * says what is wrong, with the values, and what to do about it. */
sfa_status sfa_fail(sfa_context *ctx, sfa_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* One line for the log callback. */
void sfa_log(const sfa_context *ctx, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Returns from the calling function with the status of a failed call. */
#define SFA_TRY(expression)                                                                                                                \
  do {                                                                                                                                     \
    sfa_status sfa_try_status_ = (expression);                                                                                             \
    if (sfa_try_status_ != SFA_OK)                                                                                                         \
      return sfa_try_status_;                                                                                                              \
  } while (0)

/* Returns SFA_ERROR_ARGUMENT with a text if a condition of the contract does not hold. */
#define SFA_REQUIRE(ctx, condition, ...)                                                                                                   \
  do {                                                                                                                                     \
    if (!(condition))                                                                                                                      \
      return sfa_fail((ctx), SFA_ERROR_ARGUMENT, __VA_ARGS__);                                                                             \
  } while (0)

/* 64-byte aligned memory from the context's allocator; *out is NULL on failure (the text names `what`). 0 bytes give valid memory. */
sfa_status sfa_alloc(sfa_context *ctx, size_t bytes, const char *what, void **out);
/* The same, filled with zeros, for count elements of a size; the product is checked. */
sfa_status sfa_alloc_zero(sfa_context *ctx, size_t count, size_t element_bytes, const char *what, void **out);
/* Takes NULL. */
void sfa_free(sfa_context *ctx, void *memory);
/* A copy of a text; NULL gives "". */
sfa_status sfa_strdup(sfa_context *ctx, const char *text, char **out);

/* a * b and a + b for sizes: false if the result does not fit. */
static inline bool sfa_mul_size(size_t a, size_t b, size_t *out) { return !__builtin_mul_overflow(a, b, out); }
static inline bool sfa_add_size(size_t a, size_t b, size_t *out) { return !__builtin_add_overflow(a, b, out); }
static inline size_t sfa_align64(size_t bytes) { return (bytes + 63) & ~(size_t)63; }
static inline int64_t sfa_min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t sfa_max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* Monotonic clock in nanoseconds. */
int64_t sfa_now_ns(void);

/* fn(arg, item, thread) for item = 0 .. n_items - 1, thread < n_threads, items handed out in rising order to whoever is free. What an
 * item computes must not depend on `thread` (it names scratch memory only): then the result is the same for any number of threads. */
typedef void (*sfa_item_fn)(void *arg, int64_t item, int32_t thread);
void sfa_parallel(const sfa_context *ctx, int64_t n_items, sfa_item_fn fn, void *arg);
/* Threads that another library's OpenMP loops may use when called from this thread; returns the number until now, to be put back. */
int32_t sfa_library_threads(int32_t n_threads);

#endif
