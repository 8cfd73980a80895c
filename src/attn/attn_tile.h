/* attn/attn_tile.h: the steps of attention on the CPU, shared by prefill and decode. */
#ifndef SFA_ATTN_TILE_H
#define SFA_ATTN_TILE_H

#include "attn/attn.h"

/* A call: the plan, the checked arguments, and where keys and values lie. */
typedef struct sfa_attn_call {
  const sfa_attention_plan *plan;
  const sfa_attention_args *args;
  const sfa_kv_view *views; /* [B] */
} sfa_attn_call;

/* A block of query rows of one kv head, ready to meet keys. */
typedef struct sfa_attn_block {
  const sfa_attn_call *call;
  const sfa_kv_view *view;
  sfa_attn_scratch scratch;
  const sfa_attn_state *state; /* that the next span sets: total, part, or one elsewhere */
  int32_t kv_head, n_rows;
  const float *indexed;    /* [n_rows][4096] scores of the span at hand by an index; NULL: keys are read */
  bool finite;             /* q_tile holds no inf or NaN, which a zero between kept features would turn into NaN; known with densify */
  int64_t first_row;       /* among the rows of the kv head */
  int64_t first_token;     /* the sequence's, in out */
  int64_t q_offset;        /* elements to the sequence's first query */
  int64_t position_offset; /* token t stands at key position t + this: S - T */
} sfa_attn_block;

/* 64 keys of a kv head with their values, as the kernels take them. */
typedef struct sfa_attn_key_tile {
  int64_t first_key;
  int32_t n_keys;
  const void *ids;          /* [n_keys][K], NULL where keys are dense */
  const float *keys;        /* [n_keys][K or D] */
  const float *scale;       /* [n_keys] of int8 keys, whose `keys` are whole numbers; else NULL */
  const float *dense;       /* [n_keys][D] codes written out; NULL where they are scored as they are */
  const float *values;      /* [n_keys][E] */
  const float *value_scale; /* [n_keys] of int8 and int4 values, which are whole numbers here; else NULL */
} sfa_attn_key_tile;
/* Keys 64 number .. of a block's kv head and sequence: in place, or in the block's scratch. tile_keys leaves the values out, which
 * tile_values adds. */
sfa_attn_key_tile sfa_attn_tile_load(const sfa_attn_block *block, int64_t number);
sfa_attn_key_tile sfa_attn_tile_keys(const sfa_attn_block *block, int64_t number);
void sfa_attn_tile_values(const sfa_attn_block *block, int64_t number, sfa_attn_key_tile *tile);

/* Names block `block` of (sequence b, kv head g). False if the sequence has no such block. */
bool sfa_attn_block_find(const sfa_attn_call *call, int32_t b, int32_t g, int64_t block, int32_t thread, int32_t strip,
                         sfa_attn_block *out);
/* Codes and lays out its queries: scratch.q_tile, or q_table where lanes are keys. */
void sfa_attn_block_load(sfa_attn_block *block);
/* Codes its queries alone: scratch.id_rows and value_rows. False where sfa_attn_block_load is wanted: queries are dense, or int8 keys want
 * them rounded. */
bool sfa_attn_block_load_codes(sfa_attn_block *block);
/* First and last key that row i sees, sink tokens apart; last < first: none. Both rise with i. */
void sfa_attn_block_range(const sfa_attn_block *block, int32_t i, int64_t *first_key, int64_t *last_key);
/* Whether any row sees a key of [first, end). */
bool sfa_attn_block_sees(const sfa_attn_block *block, int64_t first_key, int64_t end_key);
/* The first tile from `tile` on that any row sees, or INT64_MAX. */
int64_t sfa_attn_block_next_tile(const sfa_attn_block *block, int64_t tile);
/* What rows see of a tile, for score_mask: scratch.lo and hi, *n_always. False if every row sees all of it. */
bool sfa_attn_block_bounds(const sfa_attn_block *block, int64_t first_key, int32_t n_keys, int32_t *n_always);
/* Attention of blocks of one kv head, which all see it, over one span of keys: sets their states. */
void sfa_attn_blocks_span(sfa_attn_block *const *blocks, int32_t n_blocks, int64_t span);
/* *into becomes the state of the keys of both. */
void sfa_attn_block_join(const sfa_attn_block *block, const sfa_attn_state *into, const sfa_attn_state *part);
/* All of that for blocks of one kv head, with all the keys that they see. */
void sfa_attn_blocks_attend(sfa_attn_block *blocks, int32_t n_blocks);
/* Sink, division, lse: writes the rows of args.out, args.lse and args.dropped. total is used up. rho [n_rows]: the share of each row's mass
 * whose values total.o lacks; NULL: none. */
void sfa_attn_block_finish(sfa_attn_block *block, const sfa_attn_state *total, const double *rho);

/* The state of no keys. */
void sfa_attn_state_clear(const sfa_attention_plan *plan, const sfa_attn_state *state);

/* Clock of an item: what passes between two readings is attention, without the top-k that ran meanwhile. 0 where nobody asked. */
int64_t sfa_attn_clock(const sfa_attn_block *block);
void sfa_attn_clock_stop(sfa_attn_block *block, int64_t start);

#endif
