/* sfa/base.h: status codes, element types, and the context that every other call takes.
 *
 * Thread rule for the whole API: a context, and everything made from it, is used by one thread at a time. Inside a call the library
 * works with up to n_threads threads of its own. Two contexts never share mutable state.
 *
 * Those threads are OpenMP's, and by default they spin while they wait. On a machine that has other work to do, start the program with
 * OMP_WAIT_POLICY=passive in its environment; the command sfa does so by itself.
 */
#ifndef SFA_BASE_H
#define SFA_BASE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SFA_VERSION "0.1.0"

/* Symbols of the shared objects: everything else is hidden. */
#if defined(__GNUC__)
#define SFA_API __attribute__((visibility("default")))
#else
#define SFA_API
#endif

/* Result of every call that can fail. The text that says what to do about it is in the context: sfa_context_error. */
typedef enum sfa_status {
  SFA_OK = 0,
  SFA_ERROR_ARGUMENT = 1,    /* a shape, pointer or option that the call's contract excludes */
  SFA_ERROR_MEMORY = 2,      /* the allocator returned NULL */
  SFA_ERROR_IO = 3,          /* a file could not be opened, read or written */
  SFA_ERROR_FORMAT = 4,      /* a file is truncated, corrupt, or not of the expected kind */
  SFA_ERROR_UNSUPPORTED = 5, /* well formed, but a variant that this build does not handle */
  SFA_ERROR_RANGE = 6,       /* a value that the chosen storage type cannot hold, or a full context */
  SFA_ERROR_CANCELLED = 7,   /* a progress callback asked to stop; state is that before the call */
  SFA_ERROR_DEVICE = 8       /* a GPU, or its driver, is missing or failed */
} sfa_status;

/* "ok", "argument", ... Never NULL, static storage. */
SFA_API const char *sfa_status_name(sfa_status status);

/* Element types of arrays that cross the API. */
typedef enum sfa_dtype {
  SFA_DTYPE_DEFAULT = 0, /* what the function's comment says */
  SFA_F32 = 1,
  SFA_BF16 = 2, /* upper half of an f32 */
  SFA_F16 = 3,  /* IEEE binary16 */
  SFA_I8 = 4,   /* int8 with one f16 scale a row: x = value * scale */
  SFA_I4 = 5,   /* values only: -7..7 with one f16 scale a row, stored as value + 8, two a byte, the even one in the low half */
  SFA_E4M3 = 6  /* values only: fp8 e4m3 (no infinities, 0x7f NaN) with one f16 scale a row: x = value * scale */
} sfa_dtype;

/* Bytes of one element (without a row's scale); 0 for SFA_DTYPE_DEFAULT, and for SFA_I4, whose two share one. */
SFA_API size_t sfa_dtype_bytes(sfa_dtype dtype);

/* Instruction sets of the CPU kernels, in rising order. */
typedef enum sfa_isa {
  SFA_ISA_DEFAULT = 0,
  SFA_ISA_SCALAR = 1,
  SFA_ISA_AVX2 = 2,   /* with FMA and F16C: Haswell, Zen */
  SFA_ISA_AVX512 = 3, /* F, BW, DQ, VL, CD: Skylake server */
  SFA_ISA_VBMI = 4,   /* with VBMI, VBMI2, VNNI, BITALG: Ice Lake, Zen 4 */
  SFA_ISA_AMX = 5     /* with AVX512-FP16 and AMX bf16, which the system lets the process use: Sapphire Rapids */
} sfa_isa;

/* "scalar", "avx2", "avx512", "vbmi", "amx"; "default" for 0. */
SFA_API const char *sfa_isa_name(sfa_isa isa);
/* The best one that this machine runs. */
SFA_API sfa_isa sfa_isa_best(void);

/* Memory of the caller's. alloc returns 64-byte aligned memory or NULL; free takes what alloc gave, never NULL. Memory that is not aligned
 * is SFA_ERROR_ARGUMENT. */
typedef struct sfa_allocator {
  void *(*alloc)(void *user, size_t bytes);
  void (*free)(void *user, void *memory);
  void *user;
} sfa_allocator;

typedef void (*sfa_log_fn)(void *user, const char *message);

/* Where a context computes, and in whose memory arrays lie: sfa/stream.h. */
typedef enum sfa_device_kind { SFA_DEVICE_CPU = 0, SFA_DEVICE_CUDA = 1 } sfa_device_kind;

typedef struct sfa_context_options {
  size_t struct_size;             /* sizeof(sfa_context_options) */
  const sfa_allocator *allocator; /* NULL: the C library's. Copied */
  sfa_log_fn log;                 /* NULL: silent. Gets one line without its end, from the calling thread */
  void *log_user;
  int32_t n_threads; /* up to 4096; 0: all processors that the process may run on */
  sfa_isa isa;       /* upper limit; 0: sfa_isa_best(). One that this machine lacks is SFA_ERROR_UNSUPPORTED */
  /* A GPU of NVIDIA's, compute capability 8.0 or later: sfa_device_list tells which there are. SFA_ERROR_UNSUPPORTED: this build has no
   * CUDA, or the GPU is too old; SFA_ERROR_DEVICE: no driver, no such GPU, or it failed. */
  sfa_device_kind device;
  int32_t device_index; /* of a GPU */
  char *why;            /* [why_bytes] the text of what is wrong where no context comes of it; NULL: not wanted */
  size_t why_bytes;
} sfa_context_options;

typedef struct sfa_context sfa_context;

/* Makes a context. options may be NULL. On failure *context is NULL. */
SFA_API sfa_status sfa_context_create(const sfa_context_options *options, sfa_context **context);
/* Everything made from the context must be destroyed before. Takes NULL. */
SFA_API void sfa_context_destroy(sfa_context *context);
/* The text of the last failure on this context, "" if there was none. Valid until the next call on it. */
SFA_API const char *sfa_context_error(const sfa_context *context);
/* Of NULL: 0, SFA_ISA_DEFAULT, SFA_DEVICE_CPU. */
SFA_API int32_t sfa_context_threads(const sfa_context *context);
SFA_API sfa_isa sfa_context_isa(const sfa_context *context);
SFA_API sfa_device_kind sfa_context_device(const sfa_context *context);

#ifdef __cplusplus
}
#endif
#endif
