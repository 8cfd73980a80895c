/* file/table.h: memory that is given back in one go, lists that grow, and hashed tables of named items. */
#ifndef SFA_TABLE_H
#define SFA_TABLE_H

#include "base/context.h"

/* Many small pieces, freed together. Start it zeroed. */
typedef struct sfa_arena {
  struct sfa_arena_chunk *chunks;
} sfa_arena;

/* 8-byte aligned memory that lives as long as the arena. */
sfa_status sfa_arena_alloc(sfa_context *ctx, sfa_arena *arena, size_t bytes, void **out);
/* A copy with a NUL behind it. */
sfa_status sfa_arena_text(sfa_context *ctx, sfa_arena *arena, const char *text, size_t bytes, const char **out);
void sfa_arena_free(sfa_context *ctx, sfa_arena *arena);

/* Room for one more in *list, an array of n items: where it is full it moves to one of twice the size, new places zeroed. Start with NULL
 * and 0; free with sfa_free. what: "a list of ..." for the error. */
sfa_status sfa_list_grow(sfa_context *ctx, void **list, int64_t n, int64_t *capacity, size_t item_bytes, const char *what);

/* Items of one size in the order they came; the first member of each is `const char *name`. Start it zeroed but for item_bytes. */
typedef struct sfa_table {
  size_t item_bytes;
  uint8_t *items;
  int64_t count, capacity;
  uint32_t *slots; /* [n_slots] open addressing: index of an item + 1, 0 = free */
  size_t n_slots;  /* a power of two, at least twice the capacity */
} sfa_table;

/* *item is the one of that name: a new one, zeroed but for the name (*added true), or the one that was there already. The name must live
 * as long as the table. Items move when others are added. */
sfa_status sfa_table_add(sfa_context *ctx, sfa_table *table, const char *name, void **item, bool *added);
void *sfa_table_at(const sfa_table *table, int64_t index);
void *sfa_table_find(const sfa_table *table, const char *name);
void sfa_table_free(sfa_context *ctx, sfa_table *table);

#endif
