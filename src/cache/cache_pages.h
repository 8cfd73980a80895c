/* cache/cache_pages.h: the cache as pages and tables. Arguments are checked (src/api); byte layout: docs/LAYOUTS.md. */
#ifndef SFA_CACHE_PAGES_H
#define SFA_CACHE_PAGES_H

#include <sfa/cache.h>

#include "backend/backend.h"

enum { SFA_PAGE_LEN = 64 }; /* tokens: one key tile of attention */

/* A page of the cache's own: its bytes are in the backend's memory, what is known about it here. The bytes begin with SFA_PAGE_HEADER that
 * nobody reads; the heads' blocks follow. */
typedef struct sfa_page {
  unsigned char *memory;
  int64_t n_users;       /* tables that name it; 0: on a free list */
  struct sfa_page *next; /* of the free list */
} sfa_page;
enum { SFA_PAGE_HEADER = 64 };

/* Pages that were taken from the backend together. */
typedef struct sfa_slab {
  struct sfa_slab *next;
  unsigned char *memory; /* [n_pages] */
  int64_t n_pages;
  sfa_page pages[];
} sfa_slab;

/* What pages of a layer look like: for each kv head ids [64][K], values [64][K or D], scales [64], v [64][E], v scales [64], each
 * aligned to 64 bytes. */
typedef struct sfa_cache_layer {
  sfa_row_format k, v;
  size_t k_ids, k_values, k_scales, v_values, v_scales; /* from the head's block */
  size_t head_bytes, page_bytes;
  int32_t pool; /* the first layer with pages of this size: its free list serves them all */
  sfa_page *free_pages;
  sfa_slab *slabs;
} sfa_cache_layer;

/* The pages of one layer of one sequence. Mapped pages are somebody else's memory: never written nor freed, they have no owner. They
 * come first, because what is appended goes into pages of the cache; a mapped last page that has room is copied before that. */
typedef struct sfa_cache_table {
  unsigned char **pages; /* [capacity], the first n_pages in use */
  sfa_page **owners;     /* [capacity] what is known of each; NULL where it is mapped */
  uint64_t *stamps;      /* [capacity] number of the append that last wrote into the page. Pages only change from the end on, so that a
                          * page's stamp tells its content and that of all pages before it, whichever tables share them */
  int64_t n_mapped;      /* of the pages, from the first */
  int64_t n_pages;       /* those of len tokens, and what was reserved */
  int64_t capacity;
  int64_t len;
} sfa_cache_table;

struct sfa_cache {
  sfa_context *ctx;
  const sfa_backend *backend;
  int32_t n_layers, n_kv_heads, n_sequences;
  sfa_cache_layer *layers; /* [n_layers] */
  sfa_cache_table *tables; /* [n_sequences][n_layers] */
  unsigned char *scratch;  /* [n_threads] of scratch_bytes, for encoding */
  size_t scratch_bytes;
  size_t bytes;      /* of pages with users */
  uint64_t n_stamps; /* given so far */

  /* Of a backend that reads tables in its own memory: the same there, changed in the order of the work that reads them. */
  unsigned char **device_pages; /* [n_layers][n_sequences][device_stride] */
  int64_t device_stride;
  int32_t *device_lens; /* [n_layers][n_sequences] */
  int64_t n_moves;      /* how often device_pages moved */
};

static inline sfa_cache_table *sfa_cache_table_of(const sfa_cache *cache, int32_t sequence, int32_t layer) {
  return &cache->tables[(int64_t)sequence * cache->n_layers + layer];
}
static inline int64_t sfa_page_count(int64_t len) { return (len + SFA_PAGE_LEN - 1) / SFA_PAGE_LEN; }

/* From options that are checked: everything but the pool. */
void sfa_cache_layer_lay_out(const sfa_page_options *options, sfa_cache_layer *layer);
/* Bytes of scratch that writing up to SFA_PAGE_LEN rows takes. */
size_t sfa_cache_layer_scratch(const sfa_backend *backend, const sfa_cache_layer *layer);
/* Codes and stores tokens first .. first + n - 1 of k and v, kv head g, in rows row .. row + n - 1 of a page. False if a value is beyond
 * what the storage type can hold. */
bool sfa_cache_rows_write(sfa_context *ctx, const sfa_cache_layer *layer, unsigned char *page, int64_t row, int32_t g, int64_t first,
                          int64_t n, const sfa_rows *k, const sfa_rows *v, void *scratch);
/* `len` tokens in pages of this layout, as attention reads them. */
void sfa_cache_layer_view(const sfa_cache_layer *layer, int64_t len, const unsigned char *const *pages, sfa_kv_view *view);

/* Room for n_pages entries in a table, and in those of the backend. */
sfa_status sfa_cache_table_reserve(sfa_cache *cache, sfa_cache_table *table, int64_t n_pages);
/* Pages of its own for all tokens up to `len`, the last one that there is among them where it has room but is shared or mapped. On failure
 * the table is as before. */
sfa_status sfa_cache_table_grow(sfa_cache *cache, int32_t sequence, int32_t layer, int64_t len);
/* Forgets all pages from number n_pages on, reserved ones too; none of them may hold tokens. */
void sfa_cache_table_shrink(sfa_cache *cache, int32_t layer, sfa_cache_table *table, int64_t n_pages);
/* Shortens a table to new_len tokens. */
void sfa_cache_table_cut(sfa_cache *cache, int32_t layer, sfa_cache_table *table, int64_t new_len);

/* options: defaults filled in. */
sfa_status sfa_cache_pages_create(sfa_context *ctx, const sfa_cache_options *options, sfa_cache **cache);
void sfa_cache_pages_destroy(sfa_cache *cache);
sfa_status sfa_cache_pages_append(sfa_cache *cache, int32_t sequence, int32_t layer, int64_t n_tokens, const sfa_rows *k,
                                  const sfa_rows *v);
/* sfa_pages_store with checked arguments; slots may be anything. */
sfa_status sfa_cache_paged_store(sfa_context *ctx, const sfa_page_options *options, unsigned char *pool, int64_t n_pages, int64_t n_tokens,
                                 const int64_t *slots, const sfa_rows *k, const sfa_rows *v);
sfa_status sfa_cache_pages_fork(sfa_cache *cache, int32_t from, int32_t to, int64_t prefix_len);
/* Makes an empty table of a layer `len` tokens of mapped pages. */
sfa_status sfa_cache_pages_map(sfa_cache *cache, int32_t sequence, int32_t layer, int64_t len, const void *const *pages);
/* Page `index` of a table with zeros where it is undefined. */
sfa_status sfa_cache_pages_save(const sfa_cache *cache, int32_t sequence, int32_t layer, int64_t index, void *image);
/* The keys and values of a layer of a sequence, as attention reads them; valid until the cache changes. */
void sfa_cache_pages_view(const sfa_cache *cache, int32_t sequence, int32_t layer, sfa_kv_view *view);
/* The same of sequences [B] for a backend that reads tables in its own memory. */
void sfa_cache_pages_tables(const sfa_cache *cache, int32_t layer, const int32_t *sequences, sfa_kv_tables *tables);
/* Contracts: sfa_cache_reserve, sfa_cache_advance. */
sfa_status sfa_cache_pages_reserve(sfa_cache *cache, int32_t sequence, int64_t len);
void sfa_cache_pages_advance(sfa_cache *cache, int32_t sequence, int64_t n_tokens);
/* Shortens a sequence in every layer. */
sfa_status sfa_cache_pages_truncate(sfa_cache *cache, int32_t sequence, int64_t new_len);

/* sfa_cache_read_keys of checked arguments. */
sfa_status sfa_cache_pages_read_keys(const sfa_cache *cache, int32_t sequence, int32_t layer, int32_t kv_head, int64_t first,
                                     int64_t n_tokens, void *ids, float *values);

#endif
