/* file/index_file.h: the document index, a file of tokens and the cache pages that a model made of them. The public half is in
 * sfa/engine.h; here is what the engine needs to make a session of it, and it of a session. */
#ifndef SFA_INDEX_FILE_H
#define SFA_INDEX_FILE_H

#include <sfa/engine.h>

#include "base/map.h"
#include "file/index_format.h"

/* What the pages were made by: they are good for exactly this. */
typedef struct sfa_index_settings {
  uint64_t model, tokenizer; /* fingerprints */
  int32_t n_layers, n_kv_heads, head_dim, head_dim_v;
  int32_t weights, vocab_size;         /* sfa_weight_format in memory */
  const sfa_index_layer_entry *layers; /* [n_layers] */
  const char *name;                    /* of the model, for people */
} sfa_index_settings;

struct sfa_index {
  sfa_context *ctx;
  char *path;
  sfa_map map;
  sfa_index_slot slot;
  sfa_index_settings settings;
  sfa_index_layer_entry *layers; /* of the settings */
  char *name;
  int64_t n_tokens, n_sources, n_segments, n_pages; /* n_pages: of a layer */
  int32_t *tokens;                                  /* [n_tokens] */
  sfa_index_source *sources;                        /* [n_sources]; the names lie in the map */
  const void **pages;                               /* [n_layers][n_pages] in the map */
  uint64_t *page_sums;                              /* [n_layers][n_pages] */
};

/* Is the file an index that no commit has finished: empty, or begun? Such a file holds nothing and may be written anew. */
sfa_status sfa_index_is_unfinished(sfa_context *ctx, const char *path, bool *unfinished);
/* SFA_ERROR_ARGUMENT with a text that says what differs and what to do about it. */
sfa_status sfa_index_settings_match(const sfa_index *index, const sfa_index_settings *settings);
/* Where the parts of a segment begin, by the counts of its head. false: they do not fit 63 bits. */
typedef struct sfa_index_parts {
  uint64_t tokens_at, sources_at, names_at, sums_at, pages_at, end;
  uint64_t first_page, n_pages; /* of each layer */
} sfa_index_parts;
bool sfa_index_parts_of(const sfa_index_settings *settings, uint64_t at, const sfa_index_segment *head, sfa_index_parts *parts);

/* What a commit puts into the file: the whole state; what the file has already is not written again. */
typedef struct sfa_index_state {
  const sfa_index_settings *settings;
  const int32_t *tokens; /* [n_tokens] */
  int64_t n_tokens;
  const sfa_index_source *sources; /* [n_sources] */
  int64_t n_sources;
  /* Copies page `page` of a layer. */
  sfa_status (*page)(void *user, int32_t layer, int64_t page, void *image);
  void *user;
} sfa_index_state;

sfa_status sfa_index_writer_commit(sfa_index_writer *writer, const sfa_index_state *state);

#endif
