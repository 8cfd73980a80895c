/* sfa/cache.h: the sparse KV cache. Keys are stored as top-k codes (or dense), values dense, in pages of 64 tokens.
 *
 * One cache serves all layers of a model and any number of sequences; a sequence is a small number (its slot). Forked sequences share
 * full pages; a page is freed with its last user. Byte layout: docs/LAYOUTS.md.
 *
 * On a CUDA context pages, page tables and lengths are device memory, and so are k and v of an append, pool, slots, block_table and
 * cache_seqlens; nothing here waits for the GPU but where a comment says so. A value that cannot be stored is told by sfa_stream_wait.
 */
#ifndef SFA_CACHE_H
#define SFA_CACHE_H

#include <sfa/attention.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sfa_cache_options {
  size_t struct_size; /* sizeof(sfa_cache_options) */
  int32_t n_layers;
  int32_t n_kv_heads;  /* G */
  int32_t head_dim;    /* D */
  int32_t head_dim_v;  /* E; 0: D */
  const int32_t *k;    /* [n_layers] kept features of a key; 0 or D: dense. NULL: dense everywhere. Copied */
  sfa_dtype k_dtype;   /* 0: SFA_I8 where k < D, SFA_BF16 where dense */
  sfa_dtype v_dtype;   /* 0: SFA_BF16 */
  int32_t n_sequences; /* slots; 0: 1 */
} sfa_cache_options;

typedef struct sfa_cache sfa_cache;

SFA_API sfa_status sfa_cache_create(sfa_context *ctx, const sfa_cache_options *options, sfa_cache **cache);
SFA_API void sfa_cache_destroy(sfa_cache *cache);

/* Appends n_tokens to one layer of a sequence: keys are coded and rounded, values rounded, to what the cache stores. k: [n][G][D],
 * v: [n][G][E] (batch_stride unused). All layers must be appended to before attention over the new tokens makes sense, but a layer's
 * attention needs only that layer. SFA_ERROR_RANGE: see sfa_codes_select; SFA_ERROR_MEMORY: no page; either way the cache is as before. */
SFA_API sfa_status sfa_cache_append(sfa_cache *cache, int32_t sequence, int32_t layer, int64_t n_tokens, const sfa_rows *k,
                                    const sfa_rows *v);
/* Tokens that this layer of the sequence holds; -1 for a wrong layer or slot. */
SFA_API int64_t sfa_cache_len(const sfa_cache *cache, int32_t sequence, int32_t layer);
/* Forgets all tokens from new_len on, in every layer. new_len beyond a layer's length leaves that layer as it is. */
SFA_API sfa_status sfa_cache_truncate(sfa_cache *cache, int32_t sequence, int64_t new_len);
/* Pages for all tokens up to `len` of a sequence, in every layer, so that appending up to there takes no more memory; truncating gives them
 * back. SFA_ERROR_MEMORY: some layers may have theirs. */
SFA_API sfa_status sfa_cache_reserve(sfa_cache *cache, int32_t sequence, int64_t len);
/* CUDA graphs: a captured sfa_cache_append reads the length and the pages from device memory, so that each run of the graph appends behind
 * what is there. What was captured is counted when it is captured, for the graph's first run; before every further run reserve its tokens,
 * and tell the cache of it: n_tokens more in every layer of the sequence. */
SFA_API sfa_status sfa_cache_advance(sfa_cache *cache, int32_t sequence, int64_t n_tokens);
/* How often the page tables moved in device memory: a graph that was captured at another number must be captured again. They move when a
 * sequence outgrows them, doubling; 0 on the CPU, -1 for NULL. */
SFA_API int64_t sfa_cache_moves(const sfa_cache *cache);
/* Makes slot `to` (emptied first) a copy of the first prefix_len tokens of slot `from`; full pages are shared, not copied. */
SFA_API sfa_status sfa_cache_fork(sfa_cache *cache, int32_t from, int32_t to, int64_t prefix_len);
/* Reads stored keys back as numbers, into host memory (on a GPU it waits for them): tokens first .. first + n_tokens - 1 of a kv head. ids
 * [n][K] as in sfa_codes and values [n][K] f32 (value times scale); of a dense layer values [n][D], ids is not written. ids may be NULL. */
SFA_API sfa_status sfa_cache_read_keys(const sfa_cache *cache, int32_t sequence, int32_t layer, int32_t kv_head, int64_t first,
                                       int64_t n_tokens, void *ids, float *values);
/* Kept features of a key of this layer, 0: all, dense. -1 for a wrong layer. */
SFA_API int32_t sfa_cache_k(const sfa_cache *cache, int32_t layer);

/* ---- Pages as bytes: saving them, and using saved ones where they lie ---- */

/* Bytes of a page of a layer: docs/LAYOUTS.md. 0 for a wrong layer. */
SFA_API size_t sfa_cache_page_bytes(const sfa_cache *cache, int32_t layer);
/* Copies page `index` (tokens 64 index .. 64 index + 63) of a layer of a sequence to image [sfa_cache_page_bytes]. Every byte is defined:
 * the header, rows beyond the sequence's length and unused bytes are 0. image is host memory; on a GPU the call waits for it. */
SFA_API sfa_status sfa_cache_page_save(const sfa_cache *cache, int32_t sequence, int32_t layer, int64_t index, void *image);
/* Makes an empty layer of a sequence hold `len` tokens that lie in such images: pages [ceil(len / 64)], each 64-byte aligned. The array is
 * copied, the images are used where they are: never written nor freed, so they may be read-only and shared by processes. They must stay
 * until no sequence uses them: after the cache's end, or the truncation of every sequence that has them. Appending, truncating and forking
 * work as ever; a last page that is not full is copied when something is appended to it. The bytes are not looked at: ids that no
 * sfa_cache_page_save made (D or above, or not ascending) give wrong scores, never a fault. On a GPU the images are host memory and copied
 * into pages of the cache's own: they may go when the call returns. */
SFA_API sfa_status sfa_cache_map(sfa_cache *cache, int32_t sequence, int32_t layer, int64_t len, const void *const *pages);

/* Bytes of the cache's own pages in use, shared ones counted once; mapped pages are not among them. */
SFA_API size_t sfa_cache_bytes(const sfa_cache *cache);
/* Bytes that one token takes over all layers: codes, scales and values, without the unused rest of a page. */
SFA_API size_t sfa_cache_token_bytes(const sfa_cache *cache);

/* Attention of the plan's B sequences over the cache: sequence b of the plan reads slot sequences[b] at `layer`, S = its length there;
 * its T queries are the last T positions (bottom-right). args.k, v, k_codes and cu_seqlens_k are unused; the plan's k_k must be that of
 * the layer. */
SFA_API sfa_status sfa_attention_run_cached(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_cache *cache,
                                            int32_t layer, const int32_t *sequences);

/* ---- Pages in the caller's memory ---- */

/* For servers that have a memory of their own: a pool of pages, one layer's or more, which the caller hands out; a block table tells which
 * pages a sequence has. A page is 64 tokens of one layer, its bytes are those of docs/LAYOUTS.md. */
typedef struct sfa_page_options {
  size_t struct_size; /* sizeof(sfa_page_options) */
  int32_t n_kv_heads; /* G */
  int32_t head_dim;   /* D */
  int32_t head_dim_v; /* E; 0: D */
  int32_t k;          /* kept features of a key; 0 or D: dense */
  sfa_dtype k_dtype;  /* 0: SFA_I8 where k < D, SFA_BF16 where dense */
  sfa_dtype v_dtype;  /* 0: SFA_BF16 */
} sfa_page_options;

/* Bytes of such a page, a multiple of 64; 0 if an option is out of range. */
SFA_API size_t sfa_page_bytes(const sfa_page_options *options);

/* Codes n_tokens keys and values as a cache would, and stores token i in row slots[i] % 64 of page slots[i] / 64 of the pool. No two tokens
 * may have the same slot; a negative one: the token is not stored. pool: [n_pages] pages, 64-byte aligned, which need no preparation.
 * SFA_ERROR_RANGE: see sfa_codes_select; the rows of this call's tokens are undefined then, all others as before. */
SFA_API sfa_status sfa_pages_store(sfa_context *ctx, const sfa_page_options *options, void *pool, int64_t n_pages, int64_t n_tokens,
                                   const int64_t *slots, const sfa_rows *k, const sfa_rows *v);

typedef struct sfa_paged_kv {
  size_t struct_size;    /* sizeof(sfa_paged_kv) */
  sfa_page_options page; /* what the pages hold; struct_size as above */
  const void *pool;      /* [n_pages] pages */
  int64_t n_pages;
  const int32_t *block_table; /* [B][max_pages] the pages of each sequence: tokens 64 i .. 64 i + 63 are in page block_table[b][i] */
  int64_t max_pages;
  const int32_t *cache_seqlens; /* [B] tokens of each sequence */
} sfa_paged_kv;

/* sfa_attention_run_cached over such pages: sequence b has S = cache_seqlens[b] keys, entries of the block table beyond them are not looked
 * at. What the pages hold must have come from sfa_pages_store: bytes are not looked at. */
SFA_API sfa_status sfa_attention_run_paged(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_paged_kv *kv);

#ifdef __cplusplus
}
#endif
#endif
