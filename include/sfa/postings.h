/* sfa/postings.h: searching the keys of a cache, with or without an inverted index over their codes.
 *
 * An index (sfa_postings) belongs to one layer of a cache. Its sealed blocks of 4096 tokens hold, for each kv head and feature, a bitmap
 * of the keys that keep the feature and their int8 values packed one after the other (docs/LAYOUTS.md). A sparse query reads the bitmaps
 * and values of its own features only; keys beyond the last sealed block are read from the codes. The scores have the same bits either
 * way, so an index changes time alone. It pays where queries are sparse, supports spread out and keys many: docs/BENCHMARKS.md.
 *
 * Thread rule: that of the cache's context. Destroy an index before its cache.
 */
#ifndef SFA_POSTINGS_H
#define SFA_POSTINGS_H

#include <sfa/cache.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- The index --------------------------------------------------------------------------------------------------------------- */

/* An empty index of a layer. SFA_ERROR_UNSUPPORTED: its keys are not SFA_I8 codes with k up to 32. */
SFA_API sfa_status sfa_postings_create(const sfa_cache *cache, int32_t layer, sfa_postings **postings);
SFA_API void sfa_postings_destroy(sfa_postings *postings);
/* Brings the index in line with a sequence: keeps the blocks whose tokens the sequence still has (after append, truncate or fork, also from
 * another sequence), forgets the others, and seals every full block of 4096 tokens that is missing. SFA_ERROR_MEMORY: it then covers less,
 * and may be used. Cost: about 100 ns a new key and head; nothing where no block is missing. */
SFA_API sfa_status sfa_postings_update(sfa_postings *postings, int32_t sequence);
/* Tokens in sealed blocks: a multiple of 4096. */
SFA_API int64_t sfa_postings_len(const sfa_postings *postings);
/* Bytes that it takes: a key and head take D / 8 + k + 2, and a block and head 4 D more. */
SFA_API size_t sfa_postings_bytes(const sfa_postings *postings);

/* ---- Searching ----------------------------------------------------------------------------------------------------------------- */

/* Which keys, and the query. An index that no longer fits the sequence does no harm: the tokens that changed are read from the cache. */
typedef struct sfa_search {
  size_t struct_size; /* sizeof(sfa_search) */
  int32_t sequence, layer, kv_head;
  int64_t end_key;        /* keys 0 .. end_key - 1; 0: all of the layer */
  const sfa_codes *query; /* row query_row of codes with the layer's head_dim, any k and type */
  int64_t query_row;
  float softmax_scale;          /* 0: 1 / sqrt(D) */
  const sfa_postings *postings; /* of this cache and layer; NULL: every code is read */
} sfa_search;

typedef struct sfa_hit {
  int64_t key;
  float score;
} sfa_hit;

/* scores [end_key]: softmax_scale * q.k (docs/MATH.md 2) of each key as it is stored, q rounded as attention rounds it; no mask, bias or
 * softcap. Works on layers of any type, dense ones too. Cost: that of a decode step's scores, on all threads. */
SFA_API sfa_status sfa_cache_scores(const sfa_cache *cache, const sfa_search *search, float *scores);
/* The n_top keys of the highest scores, highest first, ties to the lower key, NaN before all: hits [n_top]; *n_hits = min(n_top, keys).
 * Exact. Cost: sfa_cache_scores and one pass over the scores, keys * log n_top at worst, where they rise; memory 4 bytes a key while it
 * runs. */
SFA_API sfa_status sfa_cache_search(const sfa_cache *cache, const sfa_search *search, int64_t n_top, sfa_hit *hits, int64_t *n_hits);

#ifdef __cplusplus
}
#endif
#endif
