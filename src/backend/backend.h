/* backend/backend.h: what a backend does, and the plain data that crosses to it.
 *
 * Above this line nobody knows where the work is done: the API checks arguments and calls the context's backend; the cache lays out pages
 * and has the backend fill and copy them. Below it nobody knows about caches: attention reads keys and values through a sfa_kv_view.
 */
#ifndef SFA_BACKEND_H
#define SFA_BACKEND_H

#include <sfa/attention.h>
#include <sfa/backward.h>

#include "base/context.h"
#include "base/dtype.h"

/* ---- Stored rows ---------------------------------------------------------------------------------------------------------- */

/* How rows of keys or values are stored: the k largest features with their ids, or the whole row without ids. */
typedef struct sfa_row_format {
  int32_t dim; /* D or E */
  int32_t k;   /* kept features, 0: the whole row */
  sfa_dtype dtype;
} sfa_row_format;

/* Values that one row stores. */
static inline int32_t sfa_row_width(const sfa_row_format *format) { return format->k ? format->k : format->dim; }
static inline size_t sfa_id_bytes(int32_t dim) { return dim <= 256 ? 1 : 2; }
/* Feature id number `at` of codes of that dim. */
static inline int32_t sfa_id_at(const void *ids, int32_t dim, int64_t at) {
  return dim <= 256 ? ((const uint8_t *)ids)[at] : ((const uint16_t *)ids)[at];
}
static inline size_t sfa_row_ids_bytes(const sfa_row_format *format) { return (size_t)format->k * sfa_id_bytes(format->dim); }
static inline size_t sfa_row_values_bytes(const sfa_row_format *format) { return sfa_stored_bytes(format->dtype, sfa_row_width(format)); }
static inline size_t sfa_row_scale_bytes(const sfa_row_format *format) { return sfa_has_scales(format->dtype) ? sizeof(uint16_t) : 0; }

/* Dense rows to be stored: [n][dim], row_stride elements apart, turned first where there is a rope: row i by its line `line + i`. */
typedef struct sfa_row_source {
  const void *data;
  sfa_dtype dtype; /* SFA_F32 or SFA_BF16 */
  int64_t row_stride;
  const sfa_rope *rope; /* NULL: none */
  int64_t line;
} sfa_row_source;

/* Rows of one head of an operand from token `token` on; element `offset` is the head's token 0. */
static inline sfa_row_source sfa_rows_from(const sfa_rows *rows, int64_t offset, int64_t token, int64_t line) {
  return (sfa_row_source){(const unsigned char *)rows->data + (size_t)(offset + token * rows->token_stride) * sfa_dtype_bytes(rows->dtype),
                          rows->dtype, rows->token_stride, rows->rope, line};
}

/* Where rows go, one after the other. */
typedef struct sfa_row_store {
  void *ids;        /* [n][k], unused with k = 0 */
  void *values;     /* [n][width] */
  uint16_t *scales; /* [n] f16, for SFA_I8 and SFA_I4 */
} sfa_row_store;

/* ---- Keys and values as attention reads them --------------------------------------------------------------------------------- */

/* One array of a view. Head g's rows of key tile t begin at (pages ? pages[t] : base) + offset + g * head_bytes + t * tile_bytes. */
typedef struct sfa_kv_stream {
  const unsigned char *base;
  size_t offset, head_bytes, tile_bytes;
  int64_t row_stride; /* elements between keys */
} sfa_kv_stream;

/* Keys, or values. */
typedef struct sfa_kv_side {
  sfa_row_format format;
  sfa_kv_stream ids, values, scales;
  sfa_kv_stream dense; /* codes written out as f32 rows [dim] as well; base NULL: they are not */
} sfa_kv_side;

/* The keys and values of one sequence, all kv heads: pages of SFA_KEY_TILE keys, or plain arrays (pages = NULL). */
typedef struct sfa_kv_view {
  int64_t n_keys;
  const unsigned char *const *pages; /* [n_keys / SFA_KEY_TILE, rounded up] */
  const uint64_t *stamps;            /* [the same] of a cache's pages: equal stamps, equal content of the page and all before it */
  sfa_kv_side k, v;
} sfa_kv_view;

static inline const unsigned char *sfa_kv_at(const sfa_kv_view *view, const sfa_kv_stream *stream, int32_t kv_head, int64_t tile) {
  return (view->pages ? view->pages[tile] : stream->base) + stream->offset + (size_t)kv_head * stream->head_bytes +
         (size_t)tile * stream->tile_bytes;
}

/* ---- The backend ---------------------------------------------------------------------------------------------------------- */

typedef struct sfa_backend {
  const char *name;

  /* Memory that the backend computes on, and the order of work on it: sfa/stream.h. alloc sets *out to NULL and the error text on failure;
   * free takes NULL; copy takes memory of the device and of the host on either side. */
  sfa_status (*memory_alloc)(sfa_context *ctx, size_t bytes, const char *what, void **out);
  void (*memory_free)(sfa_context *ctx, void *memory);
  sfa_status (*memory_copy)(sfa_context *ctx, void *to, const void *from, size_t bytes);
  sfa_status (*memory_zero)(sfa_context *ctx, void *memory, size_t bytes);
  sfa_status (*stream_set)(sfa_context *ctx, void *stream);
  void *(*stream_of)(const sfa_context *ctx);
  sfa_status (*stream_wait)(sfa_context *ctx);

  /* Dense rows x [n][dim] to the stored format: rope, top-k, rounding. Serial, so that callers share out rows.
   * scratch: encode_scratch_bytes. stage_ns [SFA_STAGE_COUNT] or NULL: time added. Returns 0, or 1 + the first row with a finite value
   * beyond f16's range where the format is SFA_I8, SFA_I4 or SFA_F16. */
  size_t (*encode_scratch_bytes)(const sfa_row_format *format, int64_t n_rows);
  int64_t (*encode)(const sfa_context *ctx, int64_t n_rows, const sfa_row_source *x, const sfa_row_format *format, const sfa_row_store *out,
                    void *scratch, int64_t *stage_ns);

  /* Attention of checked arguments over views [B], in the way of the plan's policy. */
  void (*attend)(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_view *views);
  /* Gradients of a call with checked arguments, args->forward included; *args has its defaults filled in. SFA_ERROR_RANGE: a key or value
   * that the storage type cannot hold. backward_bytes: of args->workspace, 0 if they do not fit an address. */
  size_t (*backward_bytes)(const sfa_attention_plan *plan);
  sfa_status (*backward)(const sfa_attention_plan *plan, const sfa_attention_grad_args *args);
} sfa_backend;

extern const sfa_backend sfa_backend_cpu, sfa_backend_cuda;

/* The backend of a context. */
static inline const sfa_backend *sfa_backend_of(const sfa_context *ctx) { return ctx->backend; }

#endif
