/* cache/cache_pages.h: the cache as pages and tables. Arguments are checked (src/api); byte layout: docs/LAYOUTS.md. */
#ifndef SFA_CACHE_PAGES_H
#define SFA_CACHE_PAGES_H

#include <sfa/cache.h>

#include "backend/backend.h"

enum { SFA_PAGE_LEN = 64 }; /* tokens: one key tile of attention */

/* A page begins with this; the heads' blocks follow at SFA_PAGE_HEADER. */
typedef struct sfa_page {
  int64_t n_users;       /* tables that name it; 0: on a free list */
  struct sfa_page *next; /* of the free list */
} sfa_page;
enum { SFA_PAGE_HEADER = 64 };

/* What pages of a layer look like: for each kv head ids [64][K], values [64][K or D], scales [64], v [64][E], v scales [64], each
 * aligned to 64 bytes. */
typedef struct sfa_cache_layer {
  sfa_row_format k, v;
  size_t k_ids, k_values, k_scales, v_values, v_scales; /* from the head's block */
  size_t head_bytes, page_bytes;
  int32_t pool; /* the first layer with pages of this size: its free list serves them all */
  sfa_page *free_pages;
} sfa_cache_layer;

/* The pages of one layer of one sequence. Mapped pages are somebody else's memory: never written (so they have no users) nor freed. They
 * come first, because what is appended goes into pages of the cache; a mapped last page that has room is copied before that. */
typedef struct sfa_cache_table {
  unsigned char **pages; /* [capacity], the first ceil(len / 64) in use */
  uint64_t *stamps;      /* [capacity] number of the append that last wrote into the page. Pages only change from the end on, so that a
                          * page's stamp tells its content and that of all pages before it, whichever tables share them */
  int64_t n_mapped;      /* of the pages, from the first */
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

/* A page with one user, from the free list or the backend's memory. */
sfa_status sfa_cache_page_take(sfa_cache *cache, int32_t layer, unsigned char **page);
/* One user less; the last one puts it on the free list. */
void sfa_cache_page_release(sfa_cache *cache, int32_t layer, unsigned char *page);
/* Room for n_pages entries. */
sfa_status sfa_cache_table_reserve(sfa_cache *cache, sfa_cache_table *table, int64_t n_pages);
/* Shortens a table to new_len tokens. */
void sfa_cache_table_cut(sfa_cache *cache, int32_t layer, sfa_cache_table *table, int64_t new_len);

/* options: defaults filled in. */
sfa_status sfa_cache_pages_create(sfa_context *ctx, const sfa_cache_options *options, sfa_cache **cache);
void sfa_cache_pages_destroy(sfa_cache *cache);
sfa_status sfa_cache_pages_append(sfa_cache *cache, int32_t sequence, int32_t layer, int64_t n_tokens, const sfa_rows *k,
                                  const sfa_rows *v);
/* sfa_pages_store with checked arguments; slots may be anything. */
sfa_status sfa_cache_paged_store(sfa_context *ctx, const sfa_page_options *options, unsigned char *pool, int64_t n_tokens,
                                 const int64_t *slots, const sfa_rows *k, const sfa_rows *v);
sfa_status sfa_cache_pages_fork(sfa_cache *cache, int32_t from, int32_t to, int64_t prefix_len);
/* Makes an empty table of a layer `len` tokens of mapped pages. */
sfa_status sfa_cache_pages_map(sfa_cache *cache, int32_t sequence, int32_t layer, int64_t len, const void *const *pages);
/* Page `index` of a table with zeros where it is undefined. */
void sfa_cache_pages_save(const sfa_cache *cache, int32_t sequence, int32_t layer, int64_t index, void *image);
/* The keys and values of a layer of a sequence, as attention reads them; valid until the cache changes. */
void sfa_cache_pages_view(const sfa_cache *cache, int32_t sequence, int32_t layer, sfa_kv_view *view);

/* sfa_cache_read_keys of checked arguments. */
void sfa_cache_pages_read_keys(const sfa_cache *cache, int32_t sequence, int32_t layer, int32_t kv_head, int64_t first, int64_t n_tokens,
                               void *ids, float *values);

#endif
