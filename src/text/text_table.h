/* text/text_table.h: the containers of the tokenizer: arrays that grow, a map of integer pairs, a table from texts to numbers. */
#ifndef SFA_TEXT_TABLE_H
#define SFA_TEXT_TABLE_H

#include "base/context.h"

/* Makes room for `need` elements in an array of *capacity; what it holds stays. Capacity at least doubles, so that appending is linear. */
sfa_status sfa_array_reserve(sfa_context *ctx, void **data, size_t *capacity, size_t need, size_t element_bytes);

typedef struct sfa_bytes {
  uint8_t *data;
  size_t len, capacity;
} sfa_bytes;

sfa_status sfa_bytes_append(sfa_context *ctx, sfa_bytes *bytes, const void *data, size_t len);

typedef struct sfa_ids {
  int32_t *data;
  size_t len, capacity;
} sfa_ids;

sfa_status sfa_ids_append(sfa_context *ctx, sfa_ids *ids, const int32_t *data, size_t len);

/* (a, b) -> value, a and b below 2^31: merges of a pair of tokens, edges of a trie. */
typedef struct sfa_pair_map {
  struct sfa_pair_slot *slots; /* [capacity], capacity a power of two, at most half full */
  size_t count, capacity;
} sfa_pair_map;

struct sfa_pair_slot {
  uint64_t pair; /* a << 32 | b; all ones: free */
  uint64_t value;
};

/* Sets the value of a pair; *old tells what it was, or is untouched if it is new. old may be NULL. */
sfa_status sfa_pair_map_set(sfa_context *ctx, sfa_pair_map *map, int32_t a, int32_t b, uint64_t value, uint64_t *old);
bool sfa_pair_map_find(const sfa_pair_map *map, int32_t a, int32_t b, uint64_t *value);
void sfa_pair_map_free(sfa_context *ctx, sfa_pair_map *map);

/* Text -> value >= 0. The table keeps its own copy of the texts. */
typedef struct sfa_text_table {
  struct sfa_text_slot *slots; /* [capacity], capacity a power of two, at most half full */
  size_t count, capacity;
  sfa_bytes texts;
} sfa_text_table;

struct sfa_text_slot {
  uint32_t hash, len;
  uint64_t at; /* in texts */
  int32_t value;
  bool used;
};

/* *present (may be NULL): the value that the text has already, which stays; else -1. */
sfa_status sfa_text_table_add(sfa_context *ctx, sfa_text_table *table, const void *text, size_t len, int32_t value, int32_t *present);
/* -1: not there. */
int32_t sfa_text_table_find(const sfa_text_table *table, const void *text, size_t len);
void sfa_text_table_free(sfa_context *ctx, sfa_text_table *table);

#endif
