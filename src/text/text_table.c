/* Growing arrays and the two hash tables, both with open addressing and linear probing. */
#include "text/text_table.h"

#include <string.h>

sfa_status sfa_array_reserve(sfa_context *ctx, void **data, size_t *capacity, size_t need, size_t element_bytes) {
  if (need <= *capacity)
    return SFA_OK;
  size_t wanted = *capacity > need / 2 ? *capacity * 2 : need, bytes;
  if (wanted < 64)
    wanted = 64;
  if (!sfa_mul_size(wanted, element_bytes, &bytes))
    return sfa_fail(ctx, SFA_ERROR_MEMORY, "%zu elements of %zu bytes do not fit an address", wanted, element_bytes);
  void *grown;
  SFA_TRY(sfa_alloc(ctx, bytes, "the tokenizer", &grown));
  if (*data)
    memcpy(grown, *data, *capacity * element_bytes);
  sfa_free(ctx, *data);
  *data = grown;
  *capacity = wanted;
  return SFA_OK;
}

sfa_status sfa_bytes_append(sfa_context *ctx, sfa_bytes *bytes, const void *data, size_t len) {
  if (len == 0)
    return SFA_OK;
  SFA_TRY(sfa_array_reserve(ctx, (void **)&bytes->data, &bytes->capacity, bytes->len + len, 1));
  memcpy(bytes->data + bytes->len, data, len);
  bytes->len += len;
  return SFA_OK;
}

sfa_status sfa_ids_append(sfa_context *ctx, sfa_ids *ids, const int32_t *data, size_t len) {
  if (len == 0)
    return SFA_OK;
  SFA_TRY(sfa_array_reserve(ctx, (void **)&ids->data, &ids->capacity, ids->len + len, sizeof *ids->data));
  memcpy(ids->data + ids->len, data, len * sizeof *data);
  ids->len += len;
  return SFA_OK;
}

/* ---- Pairs ------------------------------------------------------------------------------------------------------------------- */

static const uint64_t NO_PAIR = ~(uint64_t)0;

static uint64_t pair_of(int32_t a, int32_t b) { return (uint64_t)(uint32_t)a << 32 | (uint32_t)b; }

/* The slot that holds the pair, or the free one where it belongs. */
static struct sfa_pair_slot *pair_slot(const sfa_pair_map *map, uint64_t pair) {
  uint64_t mixed = pair * 0x9e3779b97f4a7c15ull;
  size_t mask = map->capacity - 1, i = (size_t)(mixed ^ mixed >> 32) & mask;
  while (map->slots[i].pair != pair && map->slots[i].pair != NO_PAIR)
    i = (i + 1) & mask;
  return map->slots + i;
}

static sfa_status pair_map_grow(sfa_context *ctx, sfa_pair_map *map) {
  sfa_pair_map grown = {.count = map->count, .capacity = map->capacity ? map->capacity * 2 : 256};
  SFA_TRY(sfa_alloc_zero(ctx, grown.capacity, sizeof *grown.slots, "the tokenizer's merges", (void **)&grown.slots));
  for (size_t i = 0; i < grown.capacity; i++)
    grown.slots[i].pair = NO_PAIR;
  for (size_t i = 0; i < map->capacity; i++)
    if (map->slots[i].pair != NO_PAIR)
      *pair_slot(&grown, map->slots[i].pair) = map->slots[i];
  sfa_free(ctx, map->slots);
  *map = grown;
  return SFA_OK;
}

sfa_status sfa_pair_map_set(sfa_context *ctx, sfa_pair_map *map, int32_t a, int32_t b, uint64_t value, uint64_t *old) {
  if (2 * (map->count + 1) > map->capacity)
    SFA_TRY(pair_map_grow(ctx, map));
  struct sfa_pair_slot *slot = pair_slot(map, pair_of(a, b));
  if (slot->pair == NO_PAIR)
    map->count++;
  else if (old)
    *old = slot->value;
  *slot = (struct sfa_pair_slot){pair_of(a, b), value};
  return SFA_OK;
}

bool sfa_pair_map_find(const sfa_pair_map *map, int32_t a, int32_t b, uint64_t *value) {
  if (map->count == 0)
    return false;
  const struct sfa_pair_slot *slot = pair_slot(map, pair_of(a, b));
  if (slot->pair == NO_PAIR)
    return false;
  *value = slot->value;
  return true;
}

void sfa_pair_map_free(sfa_context *ctx, sfa_pair_map *map) {
  sfa_free(ctx, map->slots);
  *map = (sfa_pair_map){0};
}

/* ---- Texts ------------------------------------------------------------------------------------------------------------------- */

/* Eight bytes a step; the length goes in, so that the zeros which fill the last step are not ambiguous. */
static uint32_t text_hash(const uint8_t *text, size_t len) {
  uint64_t hash = 0x2545f4914f6cdd1dull ^ len;
  while (len > 0) {
    uint64_t word = 0;
    size_t n = len < 8 ? len : 8;
    memcpy(&word, text, n);
    hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;
    hash ^= hash >> 29;
    text += n;
    len -= n;
  }
  return (uint32_t)(hash ^ hash >> 32);
}

static struct sfa_text_slot *text_slot(const sfa_text_table *table, const void *text, size_t len, uint32_t hash) {
  size_t mask = table->capacity - 1, i = hash & mask;
  for (;; i = (i + 1) & mask) {
    struct sfa_text_slot *slot = table->slots + i;
    if (!slot->used)
      return slot;
    if (slot->hash == hash && slot->len == len && (len == 0 || memcmp(table->texts.data + slot->at, text, len) == 0))
      return slot;
  }
}

static sfa_status text_table_grow(sfa_context *ctx, sfa_text_table *table) {
  size_t capacity = table->capacity ? table->capacity * 2 : 64;
  struct sfa_text_slot *slots;
  SFA_TRY(sfa_alloc_zero(ctx, capacity, sizeof *slots, "the tokenizer's texts", (void **)&slots));
  for (size_t i = 0; i < table->capacity; i++) {
    if (!table->slots[i].used)
      continue;
    size_t to = table->slots[i].hash & (capacity - 1);
    while (slots[to].used)
      to = (to + 1) & (capacity - 1);
    slots[to] = table->slots[i];
  }
  sfa_free(ctx, table->slots);
  table->slots = slots;
  table->capacity = capacity;
  return SFA_OK;
}

sfa_status sfa_text_table_add(sfa_context *ctx, sfa_text_table *table, const void *text, size_t len, int32_t value, int32_t *present) {
  if (present)
    *present = -1;
  if (len > UINT32_MAX)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "a token of %zu bytes is longer than any vocabulary has", len);
  if (2 * (table->count + 1) > table->capacity)
    SFA_TRY(text_table_grow(ctx, table));
  uint32_t hash = text_hash(text, len);
  struct sfa_text_slot *slot = text_slot(table, text, len, hash);
  if (slot->used) {
    if (present)
      *present = slot->value;
    return SFA_OK;
  }
  size_t at = table->texts.len;
  SFA_TRY(sfa_bytes_append(ctx, &table->texts, text, len));
  *slot = (struct sfa_text_slot){.hash = hash, .len = (uint32_t)len, .at = at, .value = value, .used = true};
  table->count++;
  return SFA_OK;
}

int32_t sfa_text_table_find(const sfa_text_table *table, const void *text, size_t len) {
  if (table->count == 0)
    return -1;
  const struct sfa_text_slot *slot = text_slot(table, text, len, text_hash(text, len));
  return slot->used ? slot->value : -1;
}

void sfa_text_table_free(sfa_context *ctx, sfa_text_table *table) {
  sfa_free(ctx, table->slots);
  sfa_free(ctx, table->texts.data);
  *table = (sfa_text_table){0};
}
