/* Arena, growing lists and tables of named items: every reader of a model file keeps what it found in these. */
#include "file/table.h"

#include <string.h>

struct sfa_arena_chunk {
  struct sfa_arena_chunk *next;
  size_t used, capacity;
  uint8_t memory[];
};

enum { CHUNK_BYTES = 64 * 1024 };

sfa_status sfa_arena_alloc(sfa_context *ctx, sfa_arena *arena, size_t bytes, void **out) {
  *out = NULL;
  size_t rounded, total;
  if (!sfa_add_size(bytes, 7, &rounded) || !sfa_add_size(rounded, sizeof(struct sfa_arena_chunk), &total))
    return sfa_fail(ctx, SFA_ERROR_MEMORY, "%zu bytes do not fit an address", bytes);
  rounded &= ~(size_t)7;
  struct sfa_arena_chunk *chunk = arena->chunks;
  if (!chunk || rounded > chunk->capacity - chunk->used) {
    size_t capacity = rounded > CHUNK_BYTES / 4 ? rounded : CHUNK_BYTES - sizeof *chunk;
    SFA_TRY(sfa_alloc(ctx, sizeof *chunk + capacity, "names and metadata", (void **)&chunk));
    *chunk = (struct sfa_arena_chunk){.capacity = capacity};
    if (arena->chunks && capacity == rounded) { /* a large piece has a chunk of its own; the chunk in use stays first */
      chunk->next = arena->chunks->next;
      arena->chunks->next = chunk;
    } else {
      chunk->next = arena->chunks;
      arena->chunks = chunk;
    }
  }
  *out = chunk->memory + chunk->used;
  chunk->used += rounded;
  return SFA_OK;
}

sfa_status sfa_arena_text(sfa_context *ctx, sfa_arena *arena, const char *text, size_t bytes, const char **out) {
  void *copy;
  *out = NULL;
  SFA_TRY(sfa_arena_alloc(ctx, arena, bytes + 1, &copy));
  memcpy(copy, text, bytes);
  ((char *)copy)[bytes] = 0;
  *out = copy;
  return SFA_OK;
}

void sfa_arena_free(sfa_context *ctx, sfa_arena *arena) {
  while (arena->chunks) {
    struct sfa_arena_chunk *next = arena->chunks->next;
    sfa_free(ctx, arena->chunks);
    arena->chunks = next;
  }
}

sfa_status sfa_list_grow(sfa_context *ctx, void **list, int64_t n, int64_t *capacity, size_t item_bytes, const char *what) {
  enum { FIRST = 16 };
  void *larger;
  if (n < *capacity)
    return SFA_OK;
  const int64_t most = *capacity ? 2 * *capacity : FIRST;
  SFA_TRY(sfa_alloc_zero(ctx, (size_t)most, item_bytes, what, &larger));
  if (n)
    memcpy(larger, *list, (size_t)n * item_bytes);
  sfa_free(ctx, *list);
  *list = larger;
  *capacity = most;
  return SFA_OK;
}

void *sfa_table_at(const sfa_table *table, int64_t index) { return table->items + (size_t)index * table->item_bytes; }

static const char *name_at(const sfa_table *table, int64_t index) {
  const char *name;
  memcpy(&name, sfa_table_at(table, index), sizeof name);
  return name;
}

/* FNV-1a, 64 bits; the upper half is folded in because the slots use the lower bits. */
static size_t hash_of(const char *name) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (; *name; name++)
    hash = (hash ^ (uint8_t)*name) * 0x100000001b3ull;
  return (size_t)(hash ^ (hash >> 32));
}

/* The slot of that name, or the free one where it belongs. */
static uint32_t *slot_of(const sfa_table *table, const char *name) {
  size_t i = hash_of(name) & (table->n_slots - 1);
  while (table->slots[i] && strcmp(name_at(table, table->slots[i] - 1), name) != 0)
    i = (i + 1) & (table->n_slots - 1);
  return &table->slots[i];
}

static sfa_status grow(sfa_context *ctx, sfa_table *table) {
  int64_t capacity = table->capacity ? 2 * table->capacity : 64;
  if (capacity > INT32_MAX)
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "more than %d named items in a model", INT32_MAX / 2);
  sfa_table larger = {.item_bytes = table->item_bytes, .count = table->count, .capacity = capacity, .n_slots = 2 * (size_t)capacity};
  SFA_TRY(sfa_alloc_zero(ctx, (size_t)capacity, table->item_bytes, "a table of names", (void **)&larger.items));
  sfa_status status = sfa_alloc_zero(ctx, larger.n_slots, sizeof *larger.slots, "a table of names", (void **)&larger.slots);
  if (status != SFA_OK) {
    sfa_free(ctx, larger.items);
    return status;
  }
  if (table->count)
    memcpy(larger.items, table->items, (size_t)table->count * table->item_bytes);
  for (int64_t i = 0; i < table->count; i++)
    *slot_of(&larger, name_at(table, i)) = (uint32_t)i + 1;
  sfa_table_free(ctx, table);
  *table = larger;
  return SFA_OK;
}

sfa_status sfa_table_add(sfa_context *ctx, sfa_table *table, const char *name, void **item, bool *added) {
  *item = NULL;
  *added = false;
  if (table->count == table->capacity)
    SFA_TRY(grow(ctx, table));
  uint32_t *slot = slot_of(table, name);
  if (!*slot) {
    *added = true;
    *slot = (uint32_t)++table->count;
    memcpy(sfa_table_at(table, table->count - 1), &name, sizeof name);
  }
  *item = sfa_table_at(table, *slot - 1);
  return SFA_OK;
}

void *sfa_table_find(const sfa_table *table, const char *name) {
  if (!table->count)
    return NULL;
  uint32_t slot = *slot_of(table, name);
  return slot ? sfa_table_at(table, slot - 1) : NULL;
}

void sfa_table_free(sfa_context *ctx, sfa_table *table) {
  sfa_free(ctx, table->items);
  sfa_free(ctx, table->slots);
  *table = (sfa_table){.item_bytes = table->item_bytes};
}
