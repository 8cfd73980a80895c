/* attn/attn_keys.h: the policy KEYS, which decode takes: few query rows, lanes are keys, rows of keys and values read as they are stored.
 *
 * A block is all query rows of a kv head of a sequence, at most SFA_KEYS_ROWS. An item of work is a block over one span of keys; whoever
 * finishes the last span of a block joins its parts, in the order of the keys. */
#ifndef SFA_ATTN_KEYS_H
#define SFA_ATTN_KEYS_H

#include "attn/attn_policy.h"
#include "attn/attn_tile.h"

#include <stdatomic.h>

/* Spans of a sequence that its queries see: items of each of its blocks. */
typedef struct sfa_attn_spans {
  int64_t first_item; /* of the sequence; that of the last sequence's end is one entry further */
  int64_t n;
  const int32_t *numbers; /* [n] rising */
} sfa_attn_spans;

/* A running call. Blocks are numbered b * G + g. */
typedef struct sfa_attn_keys_call {
  sfa_attn_call call;
  sfa_attn_spans *spans;    /* [B + 1] */
  _Atomic int32_t *pending; /* [B][G] spans of a block that are not done */
  unsigned char *parts;     /* [B][G][n_spans] states, part_bytes each */
  unsigned char *drop;      /* what attn_drop.c wants */
} sfa_attn_keys_call;

/* One item: a block and one of its spans; span < 0 where it sees none. */
typedef struct sfa_attn_keys_item {
  sfa_attn_block block;
  const sfa_attn_spans *spans; /* of the sequence */
  int64_t number;              /* of the block */
  int64_t span;
} sfa_attn_keys_item;

/* The row of the policy table. */
bool sfa_attn_keys_fits(const sfa_attention_plan *plan, char why[SFA_ATTN_WHY_BYTES]);
bool sfa_attn_keys_postings_fit(const sfa_attention_plan *plan, char why[SFA_ATTN_WHY_BYTES]); /* that of POSTINGS */
size_t sfa_attn_keys_workspace(const sfa_attention_plan *plan);
void sfa_attn_keys(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_view *views);

/* ---- Steps that skipping values (attn_drop.c) shares ---- */

int64_t sfa_attn_keys_n_items(const sfa_attn_keys_call *keys);
void sfa_attn_keys_find(const sfa_attn_keys_call *keys, int64_t item, int32_t thread, sfa_attn_keys_item *out);
sfa_attn_state sfa_attn_keys_part(const sfa_attn_keys_call *keys, int64_t number, int64_t span);
/* Counts an item as done; true for the last one of its block, which sees what the others wrote. The count starts anew. */
bool sfa_attn_keys_arrive(const sfa_attn_keys_call *keys, const sfa_attn_keys_item *item);
/* After sfa_attn_block_load: scores of a whole span by the sequence's index, where it has one that reaches so far and the plan takes it. */
void sfa_attn_keys_index(sfa_attn_block *block, int64_t span);
/* Keys or values of a tile as they are stored, the first n_keys of it. */
static inline sfa_stored_rows sfa_attn_keys_stored(const sfa_kv_view *view, const sfa_kv_side *side, int32_t kv_head, int64_t tile,
                                                   int32_t n_keys) {
  const sfa_row_format *format = &side->format;
  return (sfa_stored_rows){
      .n = n_keys,
      .width = sfa_row_width(format),
      .dtype = format->dtype,
      .ids = format->k ? sfa_kv_at(view, &side->ids, kv_head, tile) : NULL,
      .values = sfa_kv_at(view, &side->values, kv_head, tile),
      .ids_stride = side->ids.row_stride,
      .values_stride = side->values.row_stride,
      .scales = sfa_has_scales(format->dtype) ? (const uint16_t *)(const void *)sfa_kv_at(view, &side->scales, kv_head, tile) : NULL,
      .scales_stride = side->scales.row_stride};
}

/* Memory that is wanted after a piece of work, to be asked for meanwhile. */
typedef struct sfa_attn_wanted {
  const unsigned char *from;
  int64_t bytes;
} sfa_attn_wanted;
/* The keys of a tile, or what value_keys takes for granted of its values. bytes 0: no such tile, or not in one piece (asked for at once).
 */
sfa_attn_wanted sfa_attn_keys_wanted(const sfa_attn_block *block, int64_t tile);
sfa_attn_wanted sfa_attn_values_wanted(const sfa_attn_block *block, int64_t tile);
/* Scores of a tile, then weights: P [n_rows][64], 0 beyond the sequence's end, and the state's m and l. Where *rescaled is set, o wants
 * alpha [n_rows] first. */
void sfa_attn_keys_weigh(const sfa_attn_block *block, int64_t tile, sfa_attn_wanted wanted, const sfa_attn_state *state, float *P,
                         float *alpha, bool *rescaled);
/* o = alpha o + P V. */
void sfa_attn_keys_values(const sfa_attn_block *block, int64_t tile, sfa_attn_wanted wanted, const float *P, const float *alpha,
                          bool rescaled, const sfa_attn_state *state);
/* Joins a block's parts and writes its rows. rho [n_rows]: see sfa_attn_block_finish. */
void sfa_attn_keys_join(const sfa_attn_keys_call *keys, sfa_attn_keys_item *item, const double *rho);

/* The exact step: an item's span and, if it is the last one, its block's end. */
void sfa_attn_keys_step(const sfa_attn_keys_call *keys, sfa_attn_keys_item *item);

/* Attention with eps > 0, and its workspace: of one span of a block; of the whole call. */
size_t sfa_attn_drop_span_bytes(const sfa_attention_plan *plan);
size_t sfa_attn_drop_workspace(const sfa_attention_plan *plan);
void sfa_attn_drop(const sfa_attn_keys_call *keys);

#endif
