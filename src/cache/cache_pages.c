/* Pages, their users, tables; create, fork, cut. */
#include "cache/cache_pages.h"

#include <string.h>

/* ---- Pages ----------------------------------------------------------------------------------------------------------------------- */

sfa_status sfa_cache_page_take(sfa_cache *cache, int32_t layer, unsigned char **page) {
  size_t bytes = cache->layers[layer].page_bytes;
  sfa_cache_layer *pool = &cache->layers[cache->layers[layer].pool];
  sfa_page *taken = pool->free_pages;
  if (taken)
    pool->free_pages = taken->next;
  else
    SFA_TRY(cache->backend->memory_alloc(cache->ctx, bytes, "a page of the cache", (void **)&taken));
  *taken = (sfa_page){.n_users = 1};
  cache->bytes += bytes;
  *page = (unsigned char *)taken;
  return SFA_OK;
}

void sfa_cache_page_release(sfa_cache *cache, int32_t layer, unsigned char *memory) {
  sfa_page *page = (sfa_page *)(void *)memory;
  if (--page->n_users > 0)
    return;
  sfa_cache_layer *pool = &cache->layers[cache->layers[layer].pool];
  page->next = pool->free_pages;
  pool->free_pages = page;
  cache->bytes -= cache->layers[layer].page_bytes;
}

/* ---- Tables ---------------------------------------------------------------------------------------------------------------------- */

sfa_status sfa_cache_table_reserve(sfa_cache *cache, sfa_cache_table *table, int64_t n_pages) {
  if (n_pages <= table->capacity)
    return SFA_OK;
  int64_t capacity = sfa_max64(n_pages, 2 * table->capacity);
  unsigned char **pages; /* and the stamps behind them */
  SFA_TRY(sfa_alloc_zero(cache->ctx, (size_t)capacity, sizeof *pages + sizeof *table->stamps, "a page table", (void **)&pages));
  uint64_t *stamps = (uint64_t *)(void *)(pages + capacity);
  if (table->pages) {
    memcpy(pages, table->pages, (size_t)sfa_page_count(table->len) * sizeof *pages);
    memcpy(stamps, table->stamps, (size_t)sfa_page_count(table->len) * sizeof *stamps);
  }
  sfa_free(cache->ctx, table->pages);
  table->pages = pages;
  table->stamps = stamps;
  table->capacity = capacity;
  return SFA_OK;
}

void sfa_cache_table_cut(sfa_cache *cache, int32_t layer, sfa_cache_table *table, int64_t new_len) {
  if (new_len >= table->len)
    return;
  for (int64_t p = sfa_max64(sfa_page_count(new_len), table->n_mapped); p < sfa_page_count(table->len); p++)
    sfa_cache_page_release(cache, layer, table->pages[p]);
  table->n_mapped = sfa_min64(table->n_mapped, sfa_page_count(new_len));
  table->len = new_len;
}

sfa_status sfa_cache_pages_fork(sfa_cache *cache, int32_t from, int32_t to, int64_t prefix_len) {
  /* What can fail first: room in every table. Then nothing can. */
  for (int32_t layer = 0; layer < cache->n_layers; layer++)
    SFA_TRY(sfa_cache_table_reserve(cache, sfa_cache_table_of(cache, to, layer), sfa_page_count(prefix_len)));
  for (int32_t layer = 0; layer < cache->n_layers; layer++) {
    const sfa_cache_table *source = sfa_cache_table_of(cache, from, layer);
    sfa_cache_table *target = sfa_cache_table_of(cache, to, layer);
    sfa_cache_table_cut(cache, layer, target, 0);
    target->n_mapped = sfa_min64(source->n_mapped, sfa_page_count(prefix_len));
    for (int64_t p = 0; p < sfa_page_count(prefix_len); p++) {
      target->pages[p] = source->pages[p];
      target->stamps[p] = source->stamps[p];
      if (p >= target->n_mapped)
        ((sfa_page *)(void *)source->pages[p])->n_users++;
    }
    target->len = prefix_len;
  }
  return SFA_OK;
}

sfa_status sfa_cache_pages_map(sfa_cache *cache, int32_t sequence, int32_t layer, int64_t len, const void *const *pages) {
  sfa_cache_table *table = sfa_cache_table_of(cache, sequence, layer);
  SFA_TRY(sfa_cache_table_reserve(cache, table, sfa_page_count(len)));
  cache->n_stamps++;
  for (int64_t p = 0; p < sfa_page_count(len); p++) {
    table->pages[p] = (unsigned char *)(uintptr_t)pages[p];
    table->stamps[p] = cache->n_stamps;
  }
  table->n_mapped = sfa_page_count(len);
  table->len = len;
  return SFA_OK;
}

void sfa_cache_pages_save(const sfa_cache *cache, int32_t sequence, int32_t layer_index, int64_t index, void *image) {
  const sfa_cache_table *table = sfa_cache_table_of(cache, sequence, layer_index);
  const sfa_cache_layer *layer = &cache->layers[layer_index];
  const struct {
    size_t offset, row_bytes;
  } streams[] = {{layer->k_ids, sfa_row_ids_bytes(&layer->k)},
                 {layer->k_values, sfa_row_values_bytes(&layer->k)},
                 {layer->k_scales, sfa_row_scale_bytes(&layer->k)},
                 {layer->v_values, sfa_row_values_bytes(&layer->v)},
                 {layer->v_scales, sfa_row_scale_bytes(&layer->v)}};
  size_t n_rows = (size_t)sfa_min64(SFA_PAGE_LEN, table->len - index * SFA_PAGE_LEN);
  memset(image, 0, layer->page_bytes);
  for (int32_t g = 0; g < cache->n_kv_heads; g++)
    for (size_t i = 0; i < sizeof streams / sizeof *streams; i++) {
      size_t at = SFA_PAGE_HEADER + (size_t)g * layer->head_bytes + streams[i].offset;
      cache->backend->memory_copy(cache->ctx, (unsigned char *)image + at, table->pages[index] + at, n_rows * streams[i].row_bytes);
    }
}

/* ---- Create ------------------------------------------------------------------------------------------------------------------------ */

/* Appends an array of 64 rows to a head's block. */
static size_t add_rows(size_t *total, size_t row_bytes) {
  size_t offset = *total;
  *total += sfa_align64(row_bytes * SFA_PAGE_LEN);
  return offset;
}

void sfa_cache_layer_lay_out(const sfa_page_options *options, sfa_cache_layer *layer) {
  int32_t K = options->k == options->head_dim ? 0 : options->k;
  *layer = (sfa_cache_layer){
      .k = {options->head_dim, K,
            options->k_dtype ? options->k_dtype
            : K              ? SFA_I8
                             : SFA_BF16},
      .v = {options->head_dim_v ? options->head_dim_v : options->head_dim, 0, options->v_dtype ? options->v_dtype : SFA_BF16}};
  layer->k_ids = add_rows(&layer->head_bytes, sfa_row_ids_bytes(&layer->k));
  layer->k_values = add_rows(&layer->head_bytes, sfa_row_values_bytes(&layer->k));
  layer->k_scales = add_rows(&layer->head_bytes, sfa_row_scale_bytes(&layer->k));
  layer->v_values = add_rows(&layer->head_bytes, sfa_row_values_bytes(&layer->v));
  layer->v_scales = add_rows(&layer->head_bytes, sfa_row_scale_bytes(&layer->v));
  layer->page_bytes = SFA_PAGE_HEADER + (size_t)options->n_kv_heads * layer->head_bytes;
}

size_t sfa_cache_layer_scratch(const sfa_backend *backend, const sfa_cache_layer *layer) {
  size_t k = backend->encode_scratch_bytes(&layer->k, SFA_PAGE_LEN), v = backend->encode_scratch_bytes(&layer->v, SFA_PAGE_LEN);
  return k > v ? k : v;
}

static sfa_status fill(sfa_cache *cache, const sfa_cache_options *options) {
  SFA_TRY(sfa_alloc_zero(cache->ctx, (size_t)cache->n_layers, sizeof *cache->layers, "the cache's layers", (void **)&cache->layers));
  for (int32_t i = 0; i < cache->n_layers; i++) {
    sfa_cache_layer *layer = &cache->layers[i];
    sfa_cache_layer_lay_out(&(sfa_page_options){.n_kv_heads = options->n_kv_heads,
                                                .head_dim = options->head_dim,
                                                .head_dim_v = options->head_dim_v,
                                                .k = options->k ? options->k[i] : 0,
                                                .k_dtype = options->k_dtype,
                                                .v_dtype = options->v_dtype},
                            layer);
    while (cache->layers[layer->pool].page_bytes != layer->page_bytes)
      layer->pool++;
    size_t bytes = sfa_cache_layer_scratch(cache->backend, layer);
    cache->scratch_bytes = bytes > cache->scratch_bytes ? bytes : cache->scratch_bytes;
  }
  SFA_TRY(sfa_alloc_zero(cache->ctx, (size_t)cache->n_sequences * (size_t)cache->n_layers, sizeof *cache->tables, "the cache's page tables",
                         (void **)&cache->tables));
  return cache->backend->memory_alloc(cache->ctx, cache->scratch_bytes * (size_t)cache->ctx->n_threads, "the cache's scratch",
                                      (void **)&cache->scratch);
}

sfa_status sfa_cache_pages_create(sfa_context *ctx, const sfa_cache_options *options, sfa_cache **out) {
  sfa_cache *cache;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *cache, "a cache", (void **)&cache));
  cache->ctx = ctx;
  cache->backend = sfa_backend_of(ctx);
  cache->n_layers = options->n_layers;
  cache->n_kv_heads = options->n_kv_heads;
  cache->n_sequences = options->n_sequences;
  sfa_status status = fill(cache, options);
  if (status != SFA_OK)
    sfa_cache_pages_destroy(cache);
  else
    *out = cache;
  return status;
}

void sfa_cache_pages_destroy(sfa_cache *cache) {
  int64_t n_tables = cache->tables ? (int64_t)cache->n_sequences * cache->n_layers : 0;
  for (int64_t i = 0; i < n_tables; i++) {
    sfa_cache_table_cut(cache, (int32_t)(i % cache->n_layers), &cache->tables[i], 0);
    sfa_free(cache->ctx, cache->tables[i].pages);
  }
  for (int32_t i = 0; cache->layers && i < cache->n_layers; i++)
    for (sfa_page *page = cache->layers[i].free_pages, *next; page; page = next) {
      next = page->next;
      cache->backend->memory_free(cache->ctx, page);
    }
  cache->backend->memory_free(cache->ctx, cache->scratch);
  sfa_free(cache->ctx, cache->tables);
  sfa_free(cache->ctx, cache->layers);
  sfa_free(cache->ctx, cache);
}
