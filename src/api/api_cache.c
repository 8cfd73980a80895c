/* Public functions on the cache. */
#include "api/api_check.h"
#include "cache/cache_pages.h"

sfa_status sfa_cache_create(sfa_context *ctx, const sfa_cache_options *options, sfa_cache **cache) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(ctx, cache, "cache is NULL");
  *cache = NULL;
  SFA_REQUIRE(ctx, options, "options is NULL");
  SFA_REQUIRE(ctx, options->struct_size == sizeof *options, "options.struct_size is %zu: set it to sizeof(sfa_cache_options) = %zu",
              options->struct_size, sizeof *options);
  sfa_cache_options o = *options;
  o.head_dim_v = o.head_dim_v ? o.head_dim_v : o.head_dim;
  o.n_sequences = o.n_sequences ? o.n_sequences : 1;
  SFA_REQUIRE(ctx, o.n_layers >= 1 && o.n_layers <= 65536, "n_layers is %d: it must be from 1 to 65536", o.n_layers);
  SFA_REQUIRE(ctx, o.n_kv_heads >= 1 && o.n_kv_heads <= 65536, "n_kv_heads is %d: it must be from 1 to 65536", o.n_kv_heads);
  SFA_REQUIRE(ctx, o.n_sequences >= 1, "n_sequences is %d: it must be positive, or 0 for 1", o.n_sequences);
  SFA_TRY(sfa_check_head_dim(ctx, "head_dim", o.head_dim));
  SFA_TRY(sfa_check_head_dim(ctx, "head_dim_v", o.head_dim_v));
  for (int32_t layer = 0; o.k && layer < o.n_layers; layer++)
    SFA_TRY(sfa_check_kept(ctx, "a layer's k", o.k[layer], o.head_dim));
  if (o.k_dtype)
    SFA_TRY(sfa_check_dtype(ctx, "k_dtype", o.k_dtype));
  if (o.v_dtype)
    SFA_TRY(sfa_check_value_dtype(ctx, "v_dtype", o.v_dtype));
  return sfa_cache_pages_create(ctx, &o, cache);
}

void sfa_cache_destroy(sfa_cache *cache) {
  if (cache)
    sfa_cache_pages_destroy(cache);
}

sfa_status sfa_cache_append(sfa_cache *cache, int32_t sequence, int32_t layer, int64_t n_tokens, const sfa_rows *k, const sfa_rows *v) {
  if (!cache)
    return SFA_ERROR_ARGUMENT;
  sfa_context *ctx = cache->ctx;
  SFA_TRY(sfa_check_cache_sequence(cache->ctx, "sequence", cache, sequence));
  SFA_TRY(sfa_check_cache_layer(cache->ctx, cache, layer));
  int64_t len = sfa_cache_table_of(cache, sequence, layer)->len;
  SFA_REQUIRE(ctx, n_tokens >= 0 && n_tokens <= INT32_MAX - len, "n_tokens is %lld: with the %lld there it must be from 0 to 2^31 - 1",
              (long long)n_tokens, (long long)len);
  SFA_REQUIRE(ctx, k && v, "k or v is NULL");
  sfa_rows k_checked, v_checked;
  SFA_TRY(sfa_check_rows(ctx, "k", k, cache->n_kv_heads, cache->layers[layer].k.dim, n_tokens, &k_checked));
  SFA_TRY(sfa_check_values(ctx, v, cache->n_kv_heads, cache->layers[layer].v.dim, n_tokens, &v_checked));
  return n_tokens ? sfa_cache_pages_append(cache, sequence, layer, n_tokens, &k_checked, &v_checked) : SFA_OK;
}

int64_t sfa_cache_len(const sfa_cache *cache, int32_t sequence, int32_t layer) {
  if (!cache || sequence < 0 || sequence >= cache->n_sequences || layer < 0 || layer >= cache->n_layers)
    return -1;
  return sfa_cache_table_of(cache, sequence, layer)->len;
}

sfa_status sfa_cache_truncate(sfa_cache *cache, int32_t sequence, int64_t new_len) {
  if (!cache)
    return SFA_ERROR_ARGUMENT;
  SFA_TRY(sfa_check_cache_sequence(cache->ctx, "sequence", cache, sequence));
  SFA_REQUIRE(cache->ctx, new_len >= 0, "new_len is %lld: it must not be negative", (long long)new_len);
  return sfa_cache_pages_truncate(cache, sequence, sfa_min64(new_len, INT32_MAX));
}

sfa_status sfa_cache_reserve(sfa_cache *cache, int32_t sequence, int64_t len) {
  if (!cache)
    return SFA_ERROR_ARGUMENT;
  SFA_TRY(sfa_check_cache_sequence(cache->ctx, "sequence", cache, sequence));
  SFA_REQUIRE(cache->ctx, len >= 0 && len <= INT32_MAX, "len is %lld: it must be from 0 to 2^31 - 1", (long long)len);
  return sfa_cache_pages_reserve(cache, sequence, len);
}

sfa_status sfa_cache_advance(sfa_cache *cache, int32_t sequence, int64_t n_tokens) {
  if (!cache)
    return SFA_ERROR_ARGUMENT;
  sfa_context *ctx = cache->ctx;
  SFA_TRY(sfa_check_cache_sequence(ctx, "sequence", cache, sequence));
  if (sfa_arrays_are_here(ctx))
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "sfa_cache_advance is for graphs on a GPU: on the CPU sfa_cache_append does all of it");
  for (int32_t layer = 0; layer < cache->n_layers; layer++) {
    const sfa_cache_table *table = sfa_cache_table_of(cache, sequence, layer);
    SFA_REQUIRE(ctx, n_tokens >= 0 && n_tokens <= table->n_pages * SFA_PAGE_LEN - table->len,
                "n_tokens is %lld: layer %d of sequence %d has %lld tokens and pages for %lld: reserve them before the graph runs",
                (long long)n_tokens, layer, sequence, (long long)table->len, (long long)(table->n_pages * SFA_PAGE_LEN));
  }
  sfa_cache_pages_advance(cache, sequence, n_tokens);
  return SFA_OK;
}

int64_t sfa_cache_moves(const sfa_cache *cache) { return cache ? cache->n_moves : -1; }

sfa_status sfa_cache_fork(sfa_cache *cache, int32_t from, int32_t to, int64_t prefix_len) {
  if (!cache)
    return SFA_ERROR_ARGUMENT;
  SFA_TRY(sfa_check_cache_sequence(cache->ctx, "from", cache, from));
  SFA_TRY(sfa_check_cache_sequence(cache->ctx, "to", cache, to));
  SFA_REQUIRE(cache->ctx, from != to, "from and to are both %d: truncate shortens a sequence in place", from);
  for (int32_t layer = 0; layer < cache->n_layers; layer++) {
    int64_t len = sfa_cache_table_of(cache, from, layer)->len;
    SFA_REQUIRE(cache->ctx, prefix_len >= 0 && prefix_len <= len, "prefix_len is %lld: layer %d of sequence %d holds %lld tokens",
                (long long)prefix_len, layer, from, (long long)len);
  }
  return sfa_cache_pages_fork(cache, from, to, prefix_len);
}

size_t sfa_cache_page_bytes(const sfa_cache *cache, int32_t layer) {
  return cache && layer >= 0 && layer < cache->n_layers ? cache->layers[layer].page_bytes : 0;
}

sfa_status sfa_cache_page_save(const sfa_cache *cache, int32_t sequence, int32_t layer, int64_t index, void *image) {
  if (!cache)
    return SFA_ERROR_ARGUMENT;
  SFA_TRY(sfa_check_cache_sequence(cache->ctx, "sequence", cache, sequence));
  SFA_TRY(sfa_check_cache_layer(cache->ctx, cache, layer));
  int64_t n_pages = sfa_page_count(sfa_cache_table_of(cache, sequence, layer)->len);
  SFA_REQUIRE(cache->ctx, index >= 0 && index < n_pages, "index is %lld: layer %d of sequence %d has %lld pages", (long long)index, layer,
              sequence, (long long)n_pages);
  SFA_REQUIRE(cache->ctx, image, "image is NULL");
  return sfa_cache_pages_save(cache, sequence, layer, index, image);
}

sfa_status sfa_cache_map(sfa_cache *cache, int32_t sequence, int32_t layer, int64_t len, const void *const *pages) {
  if (!cache)
    return SFA_ERROR_ARGUMENT;
  sfa_context *ctx = cache->ctx;
  SFA_TRY(sfa_check_cache_sequence(cache->ctx, "sequence", cache, sequence));
  SFA_TRY(sfa_check_cache_layer(cache->ctx, cache, layer));
  SFA_REQUIRE(ctx, len >= 0 && len <= INT32_MAX, "len is %lld: it must be from 0 to 2^31 - 1", (long long)len);
  int64_t held = sfa_cache_table_of(cache, sequence, layer)->len;
  SFA_REQUIRE(ctx, held == 0, "layer %d of sequence %d holds %lld tokens: pages are mapped into an empty one, truncate it to 0 first",
              layer, sequence, (long long)held);
  SFA_REQUIRE(ctx, pages || len == 0, "pages is NULL");
  for (int64_t p = 0; p < sfa_page_count(len); p++)
    SFA_REQUIRE(ctx, pages[p] && (uintptr_t)pages[p] % 64 == 0, "page %lld lies at %p: a page begins at a multiple of 64", (long long)p,
                pages[p]);
  return sfa_cache_pages_map(cache, sequence, layer, len, pages);
}

sfa_status sfa_cache_read_keys(const sfa_cache *cache, int32_t sequence, int32_t layer, int32_t kv_head, int64_t first, int64_t n_tokens,
                               void *ids, float *values) {
  if (!cache)
    return SFA_ERROR_ARGUMENT;
  SFA_TRY(sfa_check_cache_sequence(cache->ctx, "sequence", cache, sequence));
  SFA_TRY(sfa_check_cache_layer(cache->ctx, cache, layer));
  SFA_REQUIRE(cache->ctx, kv_head >= 0 && kv_head < cache->n_kv_heads, "kv_head is %d: the cache has %d", kv_head, cache->n_kv_heads);
  int64_t len = sfa_cache_table_of(cache, sequence, layer)->len;
  SFA_REQUIRE(cache->ctx, first >= 0 && n_tokens >= 0 && first <= len && n_tokens <= len - first,
              "tokens %lld and the %lld after it: layer %d of sequence %d holds %lld", (long long)first, (long long)n_tokens, layer,
              sequence, (long long)len);
  SFA_REQUIRE(cache->ctx, values, "values is NULL");
  return sfa_cache_pages_read_keys(cache, sequence, layer, kv_head, first, n_tokens, ids, values);
}

int32_t sfa_cache_k(const sfa_cache *cache, int32_t layer) {
  return cache && layer >= 0 && layer < cache->n_layers ? cache->layers[layer].k.k : -1;
}

size_t sfa_cache_bytes(const sfa_cache *cache) { return cache ? cache->bytes : 0; }

size_t sfa_cache_token_bytes(const sfa_cache *cache) {
  size_t bytes = 0;
  for (int32_t i = 0; cache && i < cache->n_layers; i++) {
    const sfa_cache_layer *layer = &cache->layers[i];
    bytes += sfa_row_ids_bytes(&layer->k) + sfa_row_values_bytes(&layer->k) + sfa_row_scale_bytes(&layer->k) +
             sfa_row_values_bytes(&layer->v) + sfa_row_scale_bytes(&layer->v);
  }
  return cache ? bytes * (size_t)cache->n_kv_heads : 0;
}
