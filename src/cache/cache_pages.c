/* Pages, their users, tables; create, fork, cut. */
#include "cache/cache_pages.h"

#include <string.h>

/* ---- Pages ----------------------------------------------------------------------------------------------------------------------- */

/* New pages for a free list: one, or as many as the backend's slabs hold; fewer where memory for these is short. What follows a page's
 * header begins at a multiple of 128 bytes, as lines of a GPU do. */
static sfa_status add_slab(sfa_cache *cache, sfa_cache_layer *pool) {
  const size_t line = 128, step = (pool->page_bytes + line - 1) / line * line, before = line - SFA_PAGE_HEADER;
  int64_t n = sfa_max64((int64_t)(cache->backend->slab_bytes / step), 1);
  for (;; n /= 2) {
    sfa_slab *slab;
    void *memory;
    SFA_TRY(sfa_alloc_zero(cache->ctx, 1, sizeof *slab + (size_t)n * sizeof *slab->pages, "pages of the cache", (void **)&slab));
    sfa_status status = cache->backend->memory_alloc(cache->ctx, before + (size_t)n * step, "pages of the cache", &memory);
    if (status == SFA_OK) {
      *slab = (sfa_slab){.next = pool->slabs, .memory = memory, .n_pages = n};
      pool->slabs = slab;
      for (int64_t i = n; i-- > 0;) {
        slab->pages[i] = (sfa_page){.memory = slab->memory + before + (size_t)i * step, .next = pool->free_pages};
        pool->free_pages = &slab->pages[i];
      }
      return SFA_OK;
    }
    sfa_free(cache->ctx, slab);
    if (status != SFA_ERROR_MEMORY || n == 1)
      return status;
  }
}

/* A page with one user. */
static sfa_status take_page(sfa_cache *cache, int32_t layer, sfa_page **page) {
  sfa_cache_layer *pool = &cache->layers[cache->layers[layer].pool];
  if (!pool->free_pages)
    SFA_TRY(add_slab(cache, pool));
  *page = pool->free_pages;
  pool->free_pages = (*page)->next;
  (*page)->n_users = 1;
  cache->bytes += pool->page_bytes;
  return SFA_OK;
}

/* One user less; the last one puts it on the free list. */
static void release_page(sfa_cache *cache, int32_t layer, sfa_page *page) {
  if (--page->n_users > 0)
    return;
  sfa_cache_layer *pool = &cache->layers[cache->layers[layer].pool];
  page->next = pool->free_pages;
  pool->free_pages = page;
  cache->bytes -= pool->page_bytes;
}

/* ---- Tables ---------------------------------------------------------------------------------------------------------------------- */

/* Entries [first, end) of a table are new: the backend is told. */
static sfa_status tell_table(const sfa_cache *cache, const sfa_cache_table *table, int64_t first, int64_t end) {
  if (!cache->device_pages || first >= end)
    return SFA_OK;
  int64_t number = table - cache->tables, sequence = number / cache->n_layers, layer = number % cache->n_layers;
  unsigned char **there = cache->device_pages + (layer * cache->n_sequences + sequence) * cache->device_stride;
  return cache->backend->set_table(cache->ctx, there + first, end - first, table->pages + first);
}

/* Tables of the backend with room for n_pages entries each. */
static sfa_status widen_device(sfa_cache *cache, int64_t n_pages) {
  if (!cache->backend->set_table || n_pages <= cache->device_stride)
    return SFA_OK;
  enum { LEAST_PAGES = 256 };
  int64_t stride = sfa_max64(sfa_max64(n_pages, 2 * cache->device_stride), LEAST_PAGES),
          n_rows = (int64_t)cache->n_layers * cache->n_sequences;
  void *wider;
  size_t bytes;
  if (!sfa_mul_size((size_t)n_rows * sizeof *cache->device_pages, (size_t)stride, &bytes))
    return sfa_fail(cache->ctx, SFA_ERROR_MEMORY, "page tables of %lld entries do not fit an address", (long long)stride);
  SFA_TRY(cache->backend->memory_alloc(cache->ctx, bytes, "the cache's page tables", &wider));
  sfa_status status = SFA_OK;
  for (int64_t i = 0; cache->device_pages && status == SFA_OK && i < n_rows; i++)
    status = cache->backend->memory_copy(cache->ctx, (unsigned char **)wider + i * stride, cache->device_pages + i * cache->device_stride,
                                         (size_t)cache->device_stride * sizeof *cache->device_pages);
  if (status != SFA_OK) {
    cache->backend->memory_free(cache->ctx, wider);
    return status;
  }
  cache->backend->memory_free(cache->ctx, cache->device_pages);
  cache->device_pages = wider;
  cache->device_stride = stride;
  cache->n_moves++;
  return SFA_OK;
}

sfa_status sfa_cache_table_reserve(sfa_cache *cache, sfa_cache_table *table, int64_t n_pages) {
  SFA_TRY(widen_device(cache, n_pages));
  if (n_pages <= table->capacity)
    return SFA_OK;
  int64_t capacity = sfa_max64(n_pages, 2 * table->capacity);
  unsigned char **pages; /* and owners and stamps behind them */
  SFA_TRY(sfa_alloc_zero(cache->ctx, (size_t)capacity, sizeof *pages + sizeof *table->owners + sizeof *table->stamps, "a page table",
                         (void **)&pages));
  sfa_page **owners = (sfa_page **)(void *)(pages + capacity);
  uint64_t *stamps = (uint64_t *)(void *)(owners + capacity);
  if (table->pages) {
    memcpy(pages, table->pages, (size_t)table->n_pages * sizeof *pages);
    memcpy(owners, table->owners, (size_t)table->n_pages * sizeof *owners);
    memcpy(stamps, table->stamps, (size_t)table->n_pages * sizeof *stamps);
  }
  sfa_free(cache->ctx, table->pages);
  table->pages = pages;
  table->owners = owners;
  table->stamps = stamps;
  table->capacity = capacity;
  return SFA_OK;
}

/* Entry p becomes this page. */
static void put_page(sfa_cache_table *table, int64_t p, sfa_page *page) {
  table->pages[p] = page->memory;
  table->owners[p] = page;
}

/* The last page has room but is mapped, or has other users as well: from here on this table has its own copy. */
static sfa_status own_last_page(sfa_cache *cache, int32_t layer, sfa_cache_table *table) {
  int64_t last = sfa_page_count(table->len) - 1;
  if (table->len % SFA_PAGE_LEN == 0 || (table->owners[last] && table->owners[last]->n_users == 1))
    return SFA_OK;
  sfa_page *copy;
  SFA_TRY(take_page(cache, layer, &copy));
  sfa_status status = cache->backend->memory_copy(cache->ctx, copy->memory + SFA_PAGE_HEADER, table->pages[last] + SFA_PAGE_HEADER,
                                                  cache->layers[layer].page_bytes - SFA_PAGE_HEADER);
  if (status != SFA_OK) {
    release_page(cache, layer, copy);
    return status;
  }
  if (table->owners[last])
    release_page(cache, layer, table->owners[last]);
  else
    table->n_mapped--;
  put_page(table, last, copy);
  return tell_table(cache, table, last, last + 1);
}

sfa_status sfa_cache_table_grow(sfa_cache *cache, int32_t sequence, int32_t layer, int64_t len) {
  sfa_cache_table *table = sfa_cache_table_of(cache, sequence, layer);
  int64_t old_pages = table->n_pages, new_pages = sfa_max64(sfa_page_count(len), old_pages);
  SFA_TRY(sfa_cache_table_reserve(cache, table, new_pages));
  sfa_status status = SFA_OK;
  while (status == SFA_OK && table->n_pages < new_pages) {
    sfa_page *page;
    status = take_page(cache, layer, &page);
    if (status == SFA_OK)
      put_page(table, table->n_pages++, page);
  }
  if (status == SFA_OK)
    status = own_last_page(cache, layer, table);
  if (status == SFA_OK)
    status = tell_table(cache, table, old_pages, new_pages);
  if (status != SFA_OK)
    sfa_cache_table_shrink(cache, layer, table, old_pages);
  return status;
}

void sfa_cache_table_shrink(sfa_cache *cache, int32_t layer, sfa_cache_table *table, int64_t n_pages) {
  while (table->n_pages > n_pages) {
    sfa_page *page = table->owners[--table->n_pages];
    if (page)
      release_page(cache, layer, page);
  }
  table->n_mapped = sfa_min64(table->n_mapped, n_pages);
}

void sfa_cache_table_cut(sfa_cache *cache, int32_t layer, sfa_cache_table *table, int64_t new_len) {
  if (new_len >= table->len)
    return;
  sfa_cache_table_shrink(cache, layer, table, sfa_page_count(new_len));
  table->len = new_len;
}

/* The lengths of a sequence in the backend's memory. */
static sfa_status tell_lens(const sfa_cache *cache, int32_t sequence, int64_t len, bool only_less) {
  if (!cache->device_lens)
    return SFA_OK;
  return cache->backend->set_lens(cache->ctx, cache->device_lens + sequence, cache->n_sequences, cache->n_layers, len, only_less);
}

sfa_status sfa_cache_pages_truncate(sfa_cache *cache, int32_t sequence, int64_t new_len) {
  SFA_TRY(tell_lens(cache, sequence, new_len, true));
  for (int32_t layer = 0; layer < cache->n_layers; layer++)
    sfa_cache_table_cut(cache, layer, sfa_cache_table_of(cache, sequence, layer), new_len);
  return SFA_OK;
}

sfa_status sfa_cache_pages_fork(sfa_cache *cache, int32_t from, int32_t to, int64_t prefix_len) {
  /* What can fail first: room in every table. Then nothing can, but for a device that is lost. */
  int64_t n_pages = sfa_page_count(prefix_len);
  for (int32_t layer = 0; layer < cache->n_layers; layer++)
    SFA_TRY(sfa_cache_table_reserve(cache, sfa_cache_table_of(cache, to, layer), n_pages));
  for (int32_t layer = 0; layer < cache->n_layers; layer++) {
    const sfa_cache_table *source = sfa_cache_table_of(cache, from, layer);
    sfa_cache_table *target = sfa_cache_table_of(cache, to, layer);
    sfa_cache_table_shrink(cache, layer, target, 0);
    target->n_mapped = sfa_min64(source->n_mapped, n_pages);
    for (int64_t p = 0; p < n_pages; p++) {
      target->pages[p] = source->pages[p];
      target->owners[p] = source->owners[p];
      target->stamps[p] = source->stamps[p];
      if (target->owners[p])
        target->owners[p]->n_users++;
    }
    target->n_pages = n_pages;
    target->len = prefix_len;
    SFA_TRY(tell_table(cache, target, 0, n_pages));
  }
  return tell_lens(cache, to, prefix_len, false);
}

sfa_status sfa_cache_pages_map(sfa_cache *cache, int32_t sequence, int32_t layer, int64_t len, const void *const *pages) {
  sfa_cache_table *table = sfa_cache_table_of(cache, sequence, layer);
  int64_t n_pages = sfa_page_count(len);
  SFA_TRY(sfa_cache_table_reserve(cache, table, n_pages));
  bool uploaded = cache->device_lens != NULL;
  if (uploaded) {
    SFA_TRY(sfa_cache_table_grow(cache, sequence, layer, len));
    for (int64_t p = 0; p < n_pages; p++)
      SFA_TRY(cache->backend->memory_copy(cache->ctx, table->pages[p], pages[p], cache->layers[layer].page_bytes));
    SFA_TRY(cache->backend->set_lens(cache->ctx, cache->device_lens + (int64_t)layer * cache->n_sequences + sequence, 1, 1, len, false));
    SFA_TRY(cache->backend->stream_wait(cache->ctx)); /* the images may go */
  } else
    sfa_cache_table_shrink(cache, layer, table, 0); /* what was reserved */
  cache->n_stamps++;
  for (int64_t p = 0; p < n_pages; p++) {
    if (!uploaded) {
      table->pages[p] = (unsigned char *)(uintptr_t)pages[p];
      table->owners[p] = NULL;
    }
    table->stamps[p] = cache->n_stamps;
  }
  table->n_mapped = uploaded ? 0 : n_pages;
  table->n_pages = sfa_max64(table->n_pages, n_pages);
  table->len = len;
  return SFA_OK;
}

sfa_status sfa_cache_pages_save(const sfa_cache *cache, int32_t sequence, int32_t layer_index, int64_t index, void *image) {
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
  SFA_TRY(cache->backend->memory_copy(cache->ctx, image, table->pages[index], layer->page_bytes));
  SFA_TRY(cache->backend->stream_wait(cache->ctx)); /* nobody else does where image is memory that a GPU can write to by itself */
  memset(image, 0, SFA_PAGE_HEADER);
  for (int32_t g = 0; g < cache->n_kv_heads; g++)
    for (size_t i = 0; i < sizeof streams / sizeof *streams; i++) {
      size_t begin = streams[i].offset + n_rows * streams[i].row_bytes;
      size_t end = i + 1 < sizeof streams / sizeof *streams ? streams[i + 1].offset : layer->head_bytes;
      memset((unsigned char *)image + SFA_PAGE_HEADER + (size_t)g * layer->head_bytes + begin, 0, end - begin);
    }
  return SFA_OK;
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
    size_t bytes = cache->backend->encode ? sfa_cache_layer_scratch(cache->backend, layer) : 0;
    cache->scratch_bytes = bytes > cache->scratch_bytes ? bytes : cache->scratch_bytes;
  }
  size_t n_tables = (size_t)cache->n_sequences * (size_t)cache->n_layers;
  SFA_TRY(sfa_alloc_zero(cache->ctx, n_tables, sizeof *cache->tables, "the cache's page tables", (void **)&cache->tables));
  if (!cache->backend->set_table)
    return sfa_alloc(cache->ctx, cache->scratch_bytes * (size_t)cache->ctx->n_threads, "the cache's scratch", (void **)&cache->scratch);
  void *lens;
  SFA_TRY(cache->backend->memory_alloc(cache->ctx, n_tables * sizeof *cache->device_lens, "the cache's lengths", &lens));
  cache->device_lens = lens;
  SFA_TRY(cache->backend->memory_zero(cache->ctx, lens, n_tables * sizeof *cache->device_lens));
  return widen_device(cache, 1);
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
    for (sfa_slab *slab = cache->layers[i].slabs, *next; slab; slab = next) {
      next = slab->next;
      cache->backend->memory_free(cache->ctx, slab->memory);
      sfa_free(cache->ctx, slab);
    }
  cache->backend->memory_free(cache->ctx, cache->device_pages);
  cache->backend->memory_free(cache->ctx, cache->device_lens);
  sfa_free(cache->ctx, cache->scratch);
  sfa_free(cache->ctx, cache->tables);
  sfa_free(cache->ctx, cache->layers);
  sfa_free(cache->ctx, cache);
}
