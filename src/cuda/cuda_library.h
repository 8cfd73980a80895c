/* cuda/cuda_library.h: what libsfa_cuda.so gives to libsfa: the GPU's memory and streams, and the stages.
 *
 * libsfa itself is plain C and knows CUDA by this table alone, so that one binary runs on machines without a GPU: the shared object is
 * loaded when a CUDA context is asked for (base/dl.h). It calls nothing of libsfa's; functions that can fail return NULL, or a text in
 * static storage. Plain C, read by C and by CUDA.
 */
#ifndef SFA_CUDA_LIBRARY_H
#define SFA_CUDA_LIBRARY_H

#include "cuda/cuda_help.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A GPU as the driver describes it. */
typedef struct sfa_cuda_found {
  char name[96];
  int32_t compute_major, compute_minor, n_processors;
  int64_t memory_bytes, free_bytes;
} sfa_cuda_found;

/* The stages of this build; NULL: not part of it. */
typedef struct sfa_cuda_stages {
  const char *(*select)(const sfa_cuda_select *args, sfa_cuda_stream stream);
  const char *(*store)(const sfa_cuda_select *k, const sfa_cuda_select *v, int32_t *len, sfa_cuda_stream stream);
  const char *(*gather)(const sfa_cuda_gather *args, sfa_cuda_stream stream);
  const char *(*prefill_sm90)(const sfa_cuda_prefill *args, sfa_cuda_stream stream);
  const char *(*prefill_portable)(const sfa_cuda_prefill *args, sfa_cuda_stream stream);
  size_t (*decode_bytes)(const sfa_cuda_decode *args);
  const char *(*decode)(const sfa_cuda_decode *args, sfa_cuda_stream stream);
  size_t (*backward_bytes)(const sfa_cuda_backward *args);
  const char *(*backward)(const sfa_cuda_backward *args, sfa_cuda_stream stream);
  size_t (*paper_bytes)(const sfa_cuda_paper *args);
  const char *(*paper)(const sfa_cuda_paper *args, sfa_cuda_stream stream);
} sfa_cuda_stages;

/* cuda_help.h. */
typedef struct sfa_cuda_helpers {
  const char *(*words)(uint64_t *to, int32_t n, const uint64_t *values, sfa_cuda_stream stream);
  const char *(*lens)(int32_t *lens, int64_t stride, int64_t n, int32_t len, sfa_cuda_len_change change, sfa_cuda_stream stream);
  const char *(*numbers)(const sfa_cuda_tokens *q, const sfa_cuda_tokens *k, int32_t *numbers, sfa_cuda_stream stream);
  const char *(*span)(int32_t n_sequences, const int32_t *n_keys, int64_t first, int64_t most, int32_t *lens, int32_t *ends,
                      sfa_cuda_stream stream);
  const char *(*tables)(const sfa_cuda_tables *args, sfa_cuda_stream stream);
  const char *(*slots)(int64_t n, const int64_t *slots, unsigned char *pool, size_t page_bytes, int64_t n_pages, unsigned char *nowhere,
                       unsigned char **pages, int32_t *tokens, sfa_cuda_stream stream);
  const char *(*unpack)(const sfa_cuda_places *args, sfa_cuda_stream stream);
  const char *(*pack)(const sfa_cuda_places *args, sfa_cuda_stream stream);
  const char *(*merge)(const sfa_cuda_tokens *tokens, int32_t n_heads, int32_t dim, float *out_a, float *lse_a, const float *out_b,
                       const float *lse_b, sfa_cuda_stream stream);
  const char *(*spread)(const sfa_codes *codes, float *rows, int64_t row_stride, uint32_t *support, sfa_cuda_stream stream);
  const char *(*unrotate)(const sfa_cuda_tokens *tokens, int32_t n_heads, int32_t dim, const sfa_rope *rope, float *rows,
                          int64_t token_stride, sfa_cuda_stream stream);
} sfa_cuda_helpers;

typedef struct sfa_cuda_library {
  /* The GPUs there are: up to `capacity` are described. A text: why there are none. */
  const char *(*find)(int32_t capacity, sfa_cuda_found *found, int32_t *n_found);
  /* Makes a GPU the calling thread's. Before every other call. */
  const char *(*enter)(int32_t index);
  /* After a call that failed: whether every later one will fail as well. */
  bool (*is_lost)(void);
  const char *(*stream_create)(sfa_cuda_stream *stream);
  void (*stream_destroy)(sfa_cuda_stream stream);
  const char *(*stream_wait)(sfa_cuda_stream stream);
  /* Whether a capture holds what is put on it, to be run again. */
  bool (*stream_is_captured)(sfa_cuda_stream stream);
  /* *out NULL without a text: out of memory; *free_bytes is what there was. */
  const char *(*memory_alloc)(size_t bytes, void **out, size_t *free_bytes);
  void (*memory_free)(void *memory);
  const char *(*memory_copy)(void *to, const void *from, size_t bytes, sfa_cuda_stream stream);
  /* n_rows of row_bytes each, those of `to` to_pitch bytes apart, those of `from` together. */
  const char *(*memory_copy_rows)(void *to, size_t to_pitch, const void *from, size_t row_bytes, size_t n_rows, sfa_cuda_stream stream);
  const char *(*memory_zero)(void *memory, size_t bytes, sfa_cuda_stream stream);
  /* Marks: moments of a stream, and the time between two that have passed. */
  const char *(*mark_create)(void **mark);
  void (*mark_destroy)(void *mark);
  const char *(*mark)(void *mark, sfa_cuda_stream stream);
  const char *(*mark_ns)(void *from, void *to, int64_t *ns);
  sfa_cuda_helpers help;
  sfa_cuda_stages stages;
} sfa_cuda_library;

/* What both sides must have compiled alike. */
#define SFA_CUDA_INTERFACE                                                                                                                 \
  (sizeof(sfa_cuda_library) + sizeof(sfa_cuda_select) + sizeof(sfa_cuda_gather) + sizeof(sfa_cuda_prefill) + sizeof(sfa_cuda_decode) +     \
   sizeof(sfa_cuda_backward) + sizeof(sfa_cuda_paper) + sizeof(sfa_cuda_tables) + sizeof(sfa_cuda_places))

/* The only symbol of the shared object. version: SFA_VERSION; NULL: the two were not built together. */
typedef const sfa_cuda_library *(*sfa_cuda_open_fn)(const char *version, size_t interface_bytes);
SFA_API const sfa_cuda_library *sfa_backend_cuda_open(const char *version, size_t interface_bytes);

#ifdef __cplusplus
}
#endif
#endif
