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

void sfa_cache_pages_read_keys(const sfa_cache *cache, int32_t sequence, int32_t layer, int32_t kv_head, int64_t first, int64_t n_tokens,
                               void *ids, float *values) {
  sfa_kv_view view;
  sfa_cache_pages_view(cache, sequence, layer, &view);
  const sfa_row_format *format = &view.k.format;
  int32_t width = sfa_row_width(format);
  size_t ids_bytes = sfa_row_ids_bytes(format), values_bytes = sfa_row_values_bytes(format);
  for (int64_t t = 0; t < n_tokens; t++) {
    int64_t tile = (first + t) / SFA_PAGE_LEN, row = (first + t) % SFA_PAGE_LEN;
    const unsigned char *stored = sfa_kv_at(&view, &view.k.values, kv_head, tile) + (size_t)row * values_bytes;
    float scale = 1;
    if (format->dtype == SFA_I8)
      scale = sfa_f32_from_f16(((const uint16_t *)(const void *)sfa_kv_at(&view, &view.k.scales, kv_head, tile))[row]);
    for (int32_t i = 0; i < width; i++)
      values[t * width + i] = load_value(format->dtype, stored, i) * scale;
    if (ids && ids_bytes)
      memcpy((unsigned char *)ids + (size_t)t * ids_bytes, sfa_kv_at(&view, &view.k.ids, kv_head, tile) + (size_t)row * ids_bytes,
             ids_bytes);
  }
}
