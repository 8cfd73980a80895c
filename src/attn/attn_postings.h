/* attn/attn_postings.h: an inverted index over the int8 codes of a sequence, in sealed blocks of one span of keys.
 *
 * A block holds, for each kv head, what docs/LAYOUTS.md draws: bitmaps [D][64] of the keys that keep a feature with a value other than 0,
 * where each feature's values begin, the rows' scales, and the values, feature by feature. */
#ifndef SFA_ATTN_POSTINGS_H
#define SFA_ATTN_POSTINGS_H

#include "attn/attn_plan.h"

enum {
  SFA_POSTINGS_BLOCK = SFA_KEY_SPAN, /* keys of a sealed block */
  SFA_POSTINGS_WORDS = SFA_POSTINGS_BLOCK / 64
};

struct sfa_postings {
  sfa_context *ctx;
  const sfa_kernels *kernels;
  const void *cache; /* that it belongs to, an sfa_cache: this layer only compares it */
  int32_t layer, n_kv_heads;
  sfa_row_format format;                  /* of the keys */
  size_t bitmaps, starts, scales, values; /* from a head's memory: uint64 [D][64], uint32 [D + 1], f16 [4096], int8 */
  size_t head_bytes;                      /* of a head in a block */
  int64_t n_blocks, capacity;             /* sealed; room in the arrays */
  uint64_t *stamps;                       /* [capacity] of the block's last page (sfa_kv_view): the content of this block and all before */
  unsigned char **blocks;                 /* [capacity] memory of the heads */
};

/* Whether keys of this format can be indexed: int8 codes whose sums are exact. */
bool sfa_attn_postings_fit(const sfa_row_format *format);
/* Empty; cache, layer: as they are compared. */
sfa_status sfa_attn_postings_create(sfa_context *ctx, const void *cache, int32_t layer, int32_t n_kv_heads, const sfa_row_format *format,
                                    sfa_postings **postings);
/* Takes NULL. */
void sfa_attn_postings_destroy(sfa_postings *postings);
/* Blocks of the view that the index holds, from the first one on. */
int64_t sfa_attn_postings_valid(const sfa_postings *postings, const sfa_kv_view *view);
/* Keeps those, forgets others, seals the full blocks that are missing. */
sfa_status sfa_attn_postings_update(sfa_postings *postings, const sfa_kv_view *view);

/* What scoring by the index does, known before it is done. */
typedef struct sfa_attn_postings_work {
  int64_t steps; /* keys added to; where 64 of them are taken at once, at most SFA_EXPAND_STEPS for each 64 */
  int64_t bytes; /* of the index that are read */
} sfa_attn_postings_work;
/* Adds the work for one query row over a block. q [D]: zero outside the support. */
void sfa_attn_postings_count(const sfa_postings *postings, int64_t block, int32_t kv_head, const float *q, sfa_attn_postings_work *work);
/* S [4096]: the scores of a block's keys, bit for bit those of score_keys. q [D]: rounded by round_rows to step. sums [4096]: scratch. */
void sfa_attn_postings_scores(const sfa_postings *postings, int64_t block, int32_t kv_head, const float *q, float step, float query_scale,
                              int32_t *sums, float *S);

#endif
