/* Append: dense rows become stored rows of the pages. And the view that attention reads. */
#include "cache/cache_pages.h"

#include <stdatomic.h>

static unsigned char *head_block(const sfa_cache_layer *layer, unsigned char *page, int32_t g) {
  return page + SFA_PAGE_HEADER + (size_t)g * layer->head_bytes;
}

/* Row `row` of one side of a head's block. */
static sfa_row_store store_at(const sfa_row_format *format, unsigned char *ids, unsigned char *values, unsigned char *scales, int64_t row) {
  return (sfa_row_store){ids + (size_t)row * sfa_row_ids_bytes(format), values + (size_t)row * sfa_row_values_bytes(format),
                         (uint16_t *)(void *)(scales + (size_t)row * sfa_row_scale_bytes(format))};
}

/* ---- Append -------------------------------------------------------------------------------------------------------------------------- */

typedef struct append_job {
  const sfa_cache *cache;
  const sfa_cache_layer *layer;
  unsigned char *const *pages; /* of the table */
  const sfa_rows *k, *v;
  int64_t old_len, new_len;
  _Atomic int64_t bad_tokens; /* rows that the storage type cannot hold were met */
} append_job;

bool sfa_cache_rows_write(sfa_context *ctx, const sfa_cache_layer *layer, unsigned char *page, int64_t row, int32_t g, int64_t first,
                          int64_t n, const sfa_rows *k, const sfa_rows *v, void *scratch) {
  unsigned char *block = head_block(layer, page, g);
  sfa_row_store k_store = store_at(&layer->k, block + layer->k_ids, block + layer->k_values, block + layer->k_scales, row);
  sfa_row_store v_store = store_at(&layer->v, NULL, block + layer->v_values, block + layer->v_scales, row);
  bool fits = true;
  for (int side = 0; side < 2; side++) {
    const sfa_rows *rows = side ? v : k;
    sfa_row_source x = sfa_rows_from(rows, g * rows->head_stride, first, first);
    if (sfa_backend_of(ctx)->encode(ctx, n, &x, side ? &layer->v : &layer->k, side ? &v_store : &k_store, scratch, NULL))
      fits = false;
  }
  return fits;
}

/* The new tokens of one page, one kv head. */
static void append_item(void *arg, int64_t item, int32_t thread) {
  append_job *job = arg;
  const sfa_cache *cache = job->cache;
  const sfa_cache_layer *layer = job->layer;
  int32_t g = (int32_t)(item % cache->n_kv_heads);
  int64_t page = job->old_len / SFA_PAGE_LEN + item / cache->n_kv_heads;
  int64_t first = sfa_max64(page * SFA_PAGE_LEN, job->old_len), end = sfa_min64((page + 1) * SFA_PAGE_LEN, job->new_len);
  if (!sfa_cache_rows_write(cache->ctx, layer, job->pages[page], first % SFA_PAGE_LEN, g, first - job->old_len, end - first, job->k, job->v,
                            cache->scratch + (size_t)thread * cache->scratch_bytes))
    atomic_fetch_add(&job->bad_tokens, 1);
}

/* In the caller's threads. */
static sfa_status append_rows(sfa_cache *cache, int32_t layer, const sfa_cache_table *table, int64_t n_tokens, const sfa_rows *k,
                              const sfa_rows *v) {
  append_job job = {cache, &cache->layers[layer], table->pages, k, v, table->len, table->len + n_tokens, 0};
  int64_t n_touched = sfa_page_count(job.new_len) - table->len / SFA_PAGE_LEN;
  sfa_parallel(cache->ctx, n_touched * cache->n_kv_heads, append_item, &job);
  if (!atomic_load(&job.bad_tokens))
    return SFA_OK;
  return sfa_fail(cache->ctx, SFA_ERROR_RANGE,
                  "layer %d, tokens %lld..%lld: a key or value beyond 65504, which neither f16 nor a row scale can hold: scale "
                  "the input, or make the cache with k_dtype and v_dtype bf16 or f32",
                  layer, (long long)table->len, (long long)(job.new_len - 1));
}

/* By a backend that reads tables and lengths in its own memory, and finds there where the tokens go. */
static sfa_status append_arrays(sfa_cache *cache, int32_t sequence, int32_t layer, int64_t n_tokens, const sfa_rows *k, const sfa_rows *v) {
  sfa_kv_view view;
  int64_t number = (int64_t)layer * cache->n_sequences + sequence;
  sfa_cache_layer_view(&cache->layers[layer], 0, NULL, &view);
  sfa_kv_append job = {.n_kv_heads = cache->n_kv_heads,
                       .k_side = &view.k,
                       .v_side = &view.v,
                       .n_tokens = n_tokens,
                       .k = k,
                       .v = v,
                       .pages = cache->device_pages + number * cache->device_stride,
                       .max_pages = cache->device_stride,
                       .len = cache->device_lens + number};
  return cache->backend->append(cache->ctx, &job);
}

/* n_tokens more are there. */
static void count_tokens(sfa_cache *cache, sfa_cache_table *table, int64_t n_tokens) {
  cache->n_stamps++;
  for (int64_t p = table->len / SFA_PAGE_LEN; p < sfa_page_count(table->len + n_tokens); p++)
    table->stamps[p] = cache->n_stamps;
  table->len += n_tokens;
}

sfa_status sfa_cache_pages_append(sfa_cache *cache, int32_t sequence, int32_t layer, int64_t n_tokens, const sfa_rows *k,
                                  const sfa_rows *v) {
  sfa_cache_table *table = sfa_cache_table_of(cache, sequence, layer);
  int64_t held = table->n_pages;
  SFA_TRY(sfa_cache_table_grow(cache, sequence, layer, table->len + n_tokens));
  sfa_status status =
      cache->backend->append ? append_arrays(cache, sequence, layer, n_tokens, k, v) : append_rows(cache, layer, table, n_tokens, k, v);
  if (status == SFA_OK)
    count_tokens(cache, table, n_tokens);
  else
    sfa_cache_table_shrink(cache, layer, table, held);
  return status;
}

sfa_status sfa_cache_pages_reserve(sfa_cache *cache, int32_t sequence, int64_t len) {
  for (int32_t layer = 0; layer < cache->n_layers; layer++)
    SFA_TRY(sfa_cache_table_grow(cache, sequence, layer, len));
  return SFA_OK;
}

void sfa_cache_pages_advance(sfa_cache *cache, int32_t sequence, int64_t n_tokens) {
  for (int32_t layer = 0; layer < cache->n_layers; layer++)
    count_tokens(cache, sfa_cache_table_of(cache, sequence, layer), n_tokens);
}

/* ---- View ---------------------------------------------------------------------------------------------------------------------------- */

static sfa_kv_stream stream_at(const sfa_cache_layer *layer, size_t offset, int64_t row_width) {
  return (sfa_kv_stream){.offset = SFA_PAGE_HEADER + offset, .head_bytes = layer->head_bytes, .row_stride = row_width};
}

void sfa_cache_layer_view(const sfa_cache_layer *layer, int64_t len, const unsigned char *const *pages, sfa_kv_view *view) {
  *view = (sfa_kv_view){.n_keys = len, .pages = pages};
  view->k = (sfa_kv_side){.format = layer->k,
                          .ids = stream_at(layer, layer->k_ids, layer->k.k),
                          .values = stream_at(layer, layer->k_values, sfa_row_width(&layer->k)),
                          .scales = stream_at(layer, layer->k_scales, 1)};
  view->v = (sfa_kv_side){.format = layer->v,
                          .values = stream_at(layer, layer->v_values, sfa_row_width(&layer->v)),
                          .scales = stream_at(layer, layer->v_scales, 1)};
}

void sfa_cache_pages_view(const sfa_cache *cache, int32_t sequence, int32_t layer, sfa_kv_view *view) {
  const sfa_cache_table *table = sfa_cache_table_of(cache, sequence, layer);
  sfa_cache_layer_view(&cache->layers[layer], table->len, (const unsigned char *const *)table->pages, view);
  view->stamps = table->stamps;
}

void sfa_cache_pages_tables(const sfa_cache *cache, int32_t layer, const int32_t *sequences, sfa_kv_tables *tables) {
  sfa_kv_view view;
  sfa_cache_layer_view(&cache->layers[layer], 0, NULL, &view);
  int64_t first = (int64_t)layer * cache->n_sequences;
  *tables = (sfa_kv_tables){.k = view.k,
                            .v = view.v,
                            .table_stride = cache->device_stride,
                            .lens = cache->device_lens + first,
                            .pages = cache->device_pages + first * cache->device_stride,
                            .sequences = sequences};
}
