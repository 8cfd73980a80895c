/* Public functions of an index over a cache, and of searching it. */
#include "api/api_check.h"
#include "attn/attn_search.h"
#include "cache/cache_pages.h"
#include "code/code.h"

#include <math.h>
#include <string.h>

/* ---- The index --------------------------------------------------------------------------------------------------------------- */

sfa_status sfa_postings_create(const sfa_cache *cache, int32_t layer, sfa_postings **postings) {
  if (!cache)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(cache->ctx, postings, "postings is NULL");
  *postings = NULL;
  SFA_TRY(sfa_check_here(cache->ctx, "an index of postings"));
  SFA_TRY(sfa_check_cache_layer(cache->ctx, cache, layer));
  const sfa_row_format *k = &cache->layers[layer].k;
  if (!sfa_attn_postings_fit(k))
    return sfa_fail(cache->ctx, SFA_ERROR_UNSUPPORTED,
                    "layer %d stores keys with k = %d of %d in dtype %d: an index takes SFA_I8 codes with k from 1 to %d", layer, k->k,
                    k->dim, (int)k->dtype, SFA_EXACT_TERMS);
  return sfa_attn_postings_create(cache->ctx, cache, layer, cache->n_kv_heads, k, postings);
}

sfa_status sfa_postings_update(sfa_postings *postings, int32_t sequence) {
  if (!postings)
    return SFA_ERROR_ARGUMENT;
  const sfa_cache *cache = postings->cache;
  SFA_TRY(sfa_check_cache_sequence(cache->ctx, "sequence", cache, sequence));
  sfa_kv_view view;
  sfa_cache_pages_view(cache, sequence, postings->layer, &view);
  return sfa_attn_postings_update(postings, &view);
}

void sfa_postings_destroy(sfa_postings *postings) { sfa_attn_postings_destroy(postings); }

int64_t sfa_postings_len(const sfa_postings *p) { return p ? p->n_blocks * SFA_POSTINGS_BLOCK : 0; }

size_t sfa_postings_bytes(const sfa_postings *p) {
  return p ? sizeof *p + (size_t)p->capacity * (sizeof *p->stamps + sizeof *p->blocks) +
                 (size_t)p->n_blocks * (size_t)p->n_kv_heads * p->head_bytes
           : 0;
}

sfa_status sfa_check_postings(const sfa_postings *postings, const sfa_cache *cache, int32_t layer) {
  SFA_REQUIRE(cache->ctx, !postings || (postings->cache == cache && postings->layer == layer),
              "the index of postings was made for layer %d of %s: make one for each layer", postings->layer,
              postings->cache == cache ? "this cache" : "another cache");
  return SFA_OK;
}

/* ---- Searching ----------------------------------------------------------------------------------------------------------------- */

/* Checks a search; *n_keys is what it covers. */
static sfa_status check_search(const sfa_cache *cache, const sfa_search *search, int64_t *n_keys) {
  sfa_context *ctx = cache->ctx;
  SFA_TRY(sfa_check_here(ctx, "scores of a cache's keys"));
  SFA_REQUIRE(ctx, search, "search is NULL");
  SFA_REQUIRE(ctx, search->struct_size == sizeof *search, "search.struct_size is %zu: set it to sizeof(sfa_search) = %zu",
              search->struct_size, sizeof *search);
  SFA_TRY(sfa_check_cache_sequence(cache->ctx, "sequence", cache, search->sequence));
  SFA_TRY(sfa_check_cache_layer(cache->ctx, cache, search->layer));
  SFA_REQUIRE(ctx, search->kv_head >= 0 && search->kv_head < cache->n_kv_heads, "kv_head is %d: the cache has %d", search->kv_head,
              cache->n_kv_heads);
  int64_t len = sfa_cache_table_of(cache, search->sequence, search->layer)->len;
  SFA_REQUIRE(ctx, search->end_key >= 0 && search->end_key <= len, "end_key is %lld: layer %d of sequence %d holds %lld tokens",
              (long long)search->end_key, search->layer, search->sequence, (long long)len);
  *n_keys = search->end_key ? search->end_key : len;
  SFA_TRY(sfa_check_codes(ctx, "query", search->query));
  SFA_REQUIRE(ctx, search->query->head_dim == cache->layers[search->layer].k.dim, "the query has head_dim %d, the cache %d",
              search->query->head_dim, cache->layers[search->layer].k.dim);
  SFA_REQUIRE(ctx, search->query_row >= 0 && search->query_row < search->query->n_rows, "query_row is %lld: the query has %lld",
              (long long)search->query_row, (long long)search->query->n_rows);
  SFA_TRY(sfa_check_code_ids(ctx, "query", search->query));
  SFA_REQUIRE(ctx, isfinite(search->softmax_scale), "softmax_scale is %g: it must be finite, or 0 for 1 / sqrt(head_dim)",
              (double)search->softmax_scale);
  return sfa_check_postings(search->postings, cache, search->layer);
}

sfa_status sfa_cache_scores(const sfa_cache *cache, const sfa_search *search, float *scores) {
  if (!cache)
    return SFA_ERROR_ARGUMENT;
  int64_t n_keys = 0;
  SFA_TRY(check_search(cache, search, &n_keys));
  SFA_REQUIRE(cache->ctx, scores || !n_keys, "scores is NULL");
  const sfa_codes *query = search->query;
  int32_t D = query->head_dim;
  float *q, scale = search->softmax_scale != 0 ? search->softmax_scale : (float)(1 / sqrt(D));
  SFA_TRY(sfa_alloc_zero(cache->ctx, (size_t)D, sizeof *q, "a query", (void **)&q));
  for (int32_t u = 0; u < query->k; u++)
    q[sfa_code_id(query, search->query_row, u)] = sfa_code_value(query, search->query_row, u);
  sfa_kv_view view;
  sfa_cache_pages_view(cache, search->sequence, search->layer, &view);
  sfa_status status = sfa_attn_search_scores(cache->ctx, &view, search->kv_head, search->postings, scale, n_keys, q, scores);
  sfa_free(cache->ctx, q);
  return status;
}

sfa_status sfa_cache_search(const sfa_cache *cache, const sfa_search *search, int64_t n_top, sfa_hit *hits, int64_t *n_hits) {
  if (!cache)
    return SFA_ERROR_ARGUMENT;
  int64_t n_keys = 0;
  SFA_TRY(check_search(cache, search, &n_keys));
  SFA_REQUIRE(cache->ctx, n_top >= 0, "n_top is %lld: it must not be negative", (long long)n_top);
  SFA_REQUIRE(cache->ctx, n_hits && (hits || !n_top), "hits or n_hits is NULL");
  int64_t n = sfa_min64(n_top, n_keys);
  size_t scores_bytes = sfa_align64((size_t)n_keys * sizeof(float));
  unsigned char *memory; /* scores, then keys */
  SFA_TRY(sfa_alloc(cache->ctx, scores_bytes + (size_t)n * sizeof(uint64_t), "the scores of a search", (void **)&memory));
  float *scores = (float *)(void *)memory;
  uint64_t *keys = (uint64_t *)(void *)(memory + scores_bytes);
  sfa_status status = sfa_cache_scores(cache, search, scores);
  *n_hits = status == SFA_OK ? n : 0;
  sfa_attn_search_top(n_keys, scores, *n_hits, keys);
  for (int64_t i = 0; i < *n_hits; i++)
    hits[i] = (sfa_hit){.key = (int64_t)keys[i], .score = scores[keys[i]]};
  sfa_free(cache->ctx, memory);
  return status;
}
