/* Stored keys back as numbers. */
#include "cache/cache_pages.h"

#include "base/half.h"

#include <string.h>

static float load_value(sfa_dtype dtype, const unsigned char *values, int64_t index) {
  switch (dtype) {
  case SFA_I8: return (float)((const int8_t *)values)[index];
  case SFA_BF16: return sfa_f32_from_bf16(((const uint16_t *)(const void *)values)[index]);
  case SFA_F16: return sfa_f32_from_f16(((const uint16_t *)(const void *)values)[index]);
  default: return ((const float *)(const void *)values)[index];
  }
}

/* n rows of a page, from row `row` on: ids as they are, values as numbers. */
static void read_rows(const sfa_cache_layer *layer, const unsigned char *block, int64_t row, int64_t n, unsigned char *ids, float *values) {
  const sfa_row_format *format = &layer->k;
  int32_t width = sfa_row_width(format);
  size_t ids_bytes = sfa_row_ids_bytes(format), values_bytes = sfa_row_values_bytes(format);
  for (int64_t t = 0; t < n; t++, row++) {
    const unsigned char *stored = block + layer->k_values + (size_t)row * values_bytes;
    float scale = 1;
    if (format->dtype == SFA_I8)
      scale = sfa_f32_from_f16(((const uint16_t *)(const void *)(block + layer->k_scales))[row]);
    for (int32_t i = 0; i < width; i++)
      values[t * width + i] = load_value(format->dtype, stored, i) * scale;
    if (ids && ids_bytes)
      memcpy(ids + (size_t)t * ids_bytes, block + layer->k_ids + (size_t)row * ids_bytes, ids_bytes);
  }
}

sfa_status sfa_cache_pages_read_keys(const sfa_cache *cache, int32_t sequence, int32_t layer_index, int32_t kv_head, int64_t first,
                                     int64_t n_tokens, void *ids, float *values) {
  const sfa_cache_layer *layer = &cache->layers[layer_index];
  const sfa_cache_table *table = sfa_cache_table_of(cache, sequence, layer_index);
  size_t ids_bytes = sfa_row_ids_bytes(&layer->k), offset = SFA_PAGE_HEADER + (size_t)kv_head * layer->head_bytes;
  unsigned char *copy = NULL; /* of a head's keys in a page that is not here */
  if (!sfa_arrays_are_here(cache->ctx))
    SFA_TRY(sfa_alloc(cache->ctx, layer->head_bytes, "keys of the cache", (void **)&copy));
  sfa_status status = SFA_OK;
  for (int64_t t = 0, n; status == SFA_OK && t < n_tokens; t += n) {
    int64_t page = (first + t) / SFA_PAGE_LEN, row = (first + t) % SFA_PAGE_LEN;
    const unsigned char *block = table->pages[page] + offset;
    n = sfa_min64(SFA_PAGE_LEN - row, n_tokens - t);
    if (copy) {
      status = cache->backend->memory_copy(cache->ctx, copy, block, layer->v_values);
      if (status == SFA_OK)
        status = cache->backend->stream_wait(cache->ctx);
      block = copy;
    }
    if (status == SFA_OK)
      read_rows(layer, block, row, n, ids ? (unsigned char *)ids + (size_t)t * ids_bytes : NULL, values + t * sfa_row_width(&layer->k));
  }
  sfa_free(cache->ctx, copy);
  return status;
}
