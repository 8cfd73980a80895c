/* backend/backend.h: what a backend does, and the plain data that crosses to it.
 *
 * Above this line nobody knows where the work is done: the API checks arguments and calls the context's backend; the cache lays out pages
 * and has the backend fill and copy them. Below it nobody knows about caches: attention reads keys and values through a sfa_kv_view.
 */
#ifndef SFA_BACKEND_H
#define SFA_BACKEND_H

#include <sfa/attention.h>
#include <sfa/backward.h>
#include <sfa/plan.h>

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

/* Dense rows to be stored: [n][dim], row_stride elements apart, normed first where there is a norm, then turned where there is a rope: row
 * i by its line `line + i`. */
typedef struct sfa_row_source {
  const void *data;
  sfa_dtype dtype; /* SFA_F32 or SFA_BF16 */
  int64_t row_stride;
  const sfa_rope *rope; /* NULL: none */
  int64_t line;
  const sfa_row_norm *norm; /* NULL: none */
} sfa_row_source;

/* Rows of one head of an operand from token `token` on; element `offset` is the head's token 0. */
static inline sfa_row_source sfa_rows_from(const sfa_rows *rows, int64_t offset, int64_t token, int64_t line) {
  return (sfa_row_source){(const unsigned char *)rows->data + (size_t)(offset + token * rows->token_stride) * sfa_dtype_bytes(rows->dtype),
                          rows->dtype,
                          rows->token_stride,
                          rows->rope,
                          line,
                          rows->norm};
}

/* Where rows go, one after the other. */
typedef struct sfa_row_store {
  void *ids;        /* [n][k], unused with k = 0 */
  void *values;     /* [n][width] */
  uint16_t *scales; /* [n] f16, of types that have them */
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

/* The stored keys and values of B sequences as a backend with memory of its own reads them, all but the sides in that memory: from the
 * tables of a cache, or from pages of the caller's and a block table. */
typedef struct sfa_kv_tables {
  sfa_kv_side k, v;     /* streams without base */
  int64_t table_stride; /* entries of a sequence's table */
  const int32_t *lens;  /* tokens of a sequence */
  /* A cache: table and length number sequences[b] (host) are those of sequence b. */
  unsigned char *const *pages; /* [n_sequences][table_stride] */
  const int32_t *sequences;
  int64_t least_len, most_len; /* of these sequences, as the host knows them; a captured call meets others when it runs again */
  /* Or a pool: page block_table[b][i] of it is page i of sequence b. */
  const unsigned char *pool;
  size_t page_bytes;
  int64_t n_pages;
  const int32_t *block_table; /* [B][table_stride] */
} sfa_kv_tables;

/* Tokens of k and v to be coded and stored behind those of a sequence, or each in a slot of its own. */
typedef struct sfa_kv_append {
  int32_t n_kv_heads;
  const sfa_kv_side *k_side, *v_side; /* streams without base */
  int64_t n_tokens;
  const sfa_rows *k, *v;
  /* A cache: the sequence's table, and its length, which grows. */
  unsigned char *const *pages;
  int64_t max_pages;
  int32_t *len;
  /* Or a pool: token i goes to row slots[i] % 64 of page slots[i] / 64; slots beyond the pool are left out. */
  unsigned char *pool;
  size_t page_bytes;
  int64_t n_pages;
  const int64_t *slots;
} sfa_kv_append;

/* ---- A plan ---------------------------------------------------------------------------------------------------------------- */

struct sfa_attention_plan {
  sfa_context *ctx;
  sfa_attention_options options;     /* defaults filled in; k_q and k_k as given; costs is NULL, they are below */
  sfa_policy policy;                 /* never AUTO */
  char reason[224];                  /* why: one line */
  int32_t group;                     /* H / G: query heads that share a kv head */
  sfa_row_format k_format, v_format; /* that run defines its result on. k = 0: dense */
  bool encode_k, encode_v;           /* dense arguments must be stored first */
  size_t workspace_bytes;

  /* Of the CPU (src/attn). */
  const struct sfa_kernels *kernels;
  sfa_costs costs;
  bool densify;      /* TILES scores codes as dense rows: where that is cheaper; the same bits */
  bool densify_once; /* f32 codes of this call's keys are written out when they are made; otherwise each item does it, tile by tile */
  int32_t width;     /* W: query rows of a block. Row r of a kv head is token r / group, head r % group of the group */
  int32_t n_strips;  /* blocks that an item takes through the keys together: a tile is loaded once for all */
  int64_t n_blocks;  /* blocks of max_seqlen_q tokens */
  int64_t n_spans;   /* spans of max_seqlen_k keys */
  bool split;        /* items are (block, span), joined afterwards; else n_strips blocks with all their spans */
  float query_scale; /* goes into Qt: scores come out in units of log2, or divided by softcap */
  /* Offsets into the workspace. */
  size_t views, parts, scratch;
  size_t part_bytes, scratch_bytes;                              /* of one part, of one thread */
  size_t way_memory;                                             /* what the policy wants beside these: attn_policy.h */
  size_t page_tables;                                            /* [B][pages of max_seqlen_k] pointers, for pages in the caller's memory */
  size_t k_dense, k_ids, k_values, k_scales, v_values, v_scales; /* last: calls that need none never touch the memory */
};

/* ---- The backend ---------------------------------------------------------------------------------------------------------- */

/* A backend codes rows in the caller's threads (encode), or is given whole arrays (select, densify, keep, append) and tables
 * (attend_tables, set_tables, set_lens): it has the functions of one of the two groups, those of the other are NULL. */
typedef struct sfa_backend {
  const char *name;

  /* Memory that the backend computes on, and the order of work on it: sfa/stream.h. alloc sets *out to NULL and the error text on failure;
   * free takes NULL; copy takes memory of the device and of the host on either side. slab_bytes: what a cache takes of it at a time, at
   * least; 0: single pages. */
  sfa_status (*memory_alloc)(sfa_context *ctx, size_t bytes, const char *what, void **out);
  void (*memory_free)(sfa_context *ctx, void *memory);
  sfa_status (*memory_copy)(sfa_context *ctx, void *to, const void *from, size_t bytes);
  sfa_status (*memory_zero)(sfa_context *ctx, void *memory, size_t bytes);
  sfa_status (*stream_set)(sfa_context *ctx, void *stream);
  void *(*stream_of)(const sfa_context *ctx);
  sfa_status (*stream_wait)(sfa_context *ctx);
  size_t slab_bytes;

  /* Fills in a plan with ctx and checked options: the choice of the policy, the workspace. costs: those of the caller, or NULL. */
  sfa_status (*plan)(sfa_attention_plan *plan, const sfa_costs *costs);
  /* The predicted times of a report; NULL: nothing is predicted. */
  void (*predict)(const sfa_attention_plan *plan, sfa_attention_report *report);

  /* Attention of checked arguments, keys and values among them. */
  sfa_status (*run)(const sfa_attention_plan *plan, const sfa_attention_args *args);
  /* Gradients of a call with checked arguments, args->forward included; *args has its defaults filled in. SFA_ERROR_RANGE: a key or value
   * that the storage type cannot hold. backward_bytes: of args->workspace, 0 if they do not fit an address. */
  size_t (*backward_bytes)(const sfa_attention_plan *plan);
  sfa_status (*backward)(const sfa_attention_plan *plan, const sfa_attention_grad_args *args);
  /* sfa_attention_merge. */
  sfa_status (*merge)(sfa_context *ctx, int64_t n_rows, int32_t head_dim_v, float *out_a, float *lse_a, const float *out_b,
                      const float *lse_b);

  /* Row by row. encode: dense rows x [n][dim] to the stored format: rope, top-k, rounding. Serial, so that callers share out rows.
   * scratch: encode_scratch_bytes. stage_ns [SFA_STAGE_COUNT] or NULL: time added. Returns 0, or 1 + the first row with a finite value
   * beyond f16's range where the format is SFA_F16 or has scales. */
  size_t (*encode_scratch_bytes)(const sfa_row_format *format, int64_t n_rows);
  int64_t (*encode)(const sfa_context *ctx, int64_t n_rows, const sfa_row_source *x, const sfa_row_format *format, const sfa_row_store *out,
                    void *scratch, int64_t *stage_ns);
  /* Attention of checked arguments over views [B], in the way of the plan's policy. */
  void (*attend)(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_view *views);

  /* Whole arrays, in the backend's memory, enqueued. select: codes of rows x [n][1][D]; densify: back. */
  sfa_status (*select)(sfa_context *ctx, const sfa_rows *x, const sfa_codes *codes);
  sfa_status (*densify)(sfa_context *ctx, const sfa_codes *codes, float *out, int64_t row_stride);
  sfa_status (*keep)(sfa_context *ctx, const sfa_keep_options *options, int64_t n_tokens, int32_t n_heads, int32_t head_dim, float *x,
                     int64_t token_stride);
  sfa_status (*append)(sfa_context *ctx, const sfa_kv_append *job);
  sfa_status (*attend_tables)(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_tables *tables);
  /* Page pointers of the host become entries to[0 .. n - 1] of a table; int32 numbers lens[i * stride], i < n, become len, or stay where
   * they are less and only_less is set. */
  sfa_status (*set_table)(sfa_context *ctx, unsigned char **to, int64_t n, unsigned char *const *pages);
  sfa_status (*set_lens)(sfa_context *ctx, int32_t *lens, int64_t stride, int64_t n, int64_t len, bool only_less);
} sfa_backend;

extern const sfa_backend sfa_backend_cpu, sfa_backend_cuda;

/* The backend of a context. */
static inline const sfa_backend *sfa_backend_of(const sfa_context *ctx) { return ctx->backend; }
/* Whether the arrays of a call are the host's: then they can be looked at. */
static inline bool sfa_arrays_are_here(const sfa_context *ctx) { return ctx->cuda == NULL; }

#endif
