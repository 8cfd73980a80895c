/* attn/attn_backward_parts.h: a call of the backward as attn_backward.c lays it out, for its two ways to multiply: f32 there, 16 bits in
 * attn_backward_half.c. */
#ifndef SFA_ATTN_BACKWARD_PARTS_H
#define SFA_ATTN_BACKWARD_PARTS_H

#include "attn/attn_backward.h"
#include "attn/attn_tile.h"
#include "kernel/kernel_half.h"

/* Rows of keys and queries as bf16 patches of 32 x 32, straight and turned (kernel_half.h). Keys of a pair begin at row pair * n_tiles *
 * 64, a block's queries at row place * W. */
typedef struct sfa_backward_half {
  uint16_t *q, *q_turned; /* [rows][Dp] */
  uint16_t *o, *o_turned; /* [rows][Ep] of d_out */
  uint16_t *k, *k_turned; /* [keys][Dp] */
  uint16_t *v;            /* [keys][Ep] */
} sfa_backward_half;

/* A call. Arrays of a block are those of block n = pair * n_blocks + its number, its place; those of a key of key
 * n = (pair * n_tiles) * 64 + j. */
typedef struct sfa_backward_call {
  sfa_attention_plan plan; /* of the forward, made to TILES */
  sfa_attention_args args; /* of the forward, with this call's workspace and clocks */
  const sfa_attention_grad_args *grad;
  const sfa_half_kernels *half; /* multiply in 16 bits; NULL: in f32 */
  sfa_attn_call call;

  int64_t n_pairs, n_blocks, n_tiles; /* pairs of sequence and kv head; blocks and tiles of a pair */
  int32_t n_cuts, turned_width;       /* turned_width: D in whole vectors */
  int32_t q_height, k_width, v_width; /* of the sums. f32: D; K_k or D; E. 16 bits: D, D, E in whole patches */
  bool q_is_sparse, k_is_packed;      /* k_sum has the kept features alone */

  float *q_tile;          /* f32: [blocks][D][W] times query_scale, or rounded to meet int8 keys */
  float *q_rows;          /* f32: [blocks][W][turned_width] the same, turned; where keys may be dense */
  float *o_tile, *o_rows; /* f32: [blocks][E][W], [blocks][W][E] of d_out */
  sfa_backward_half bf16;
  float *q_sum;           /* [blocks] dQt [q_height][W], or dQ [W][D] over dense keys in f32 */
  float *lse;             /* [blocks][W] in units of log2, +inf where no key is seen */
  float *delta;           /* [blocks][W] */
  unsigned char *q_ids;   /* [blocks][W][K_q] supports of sparse queries */
  float *k_sum;           /* [keys][k_width] */
  float *v_sum;           /* [keys][v_width] */
  unsigned char *threads; /* [n_threads] of thread_bytes */
  size_t thread_bytes, bytes;
} sfa_backward_call;

/* What a thread works in, beside the forward's scratch. */
typedef struct sfa_backward_scratch {
  float *scores, *capped;     /* f32: [64][W] gradients of weights; scores as a softcap left them */
  float *turned;              /* [W][turned_width] */
  float *row, *line;          /* [D]; [D / 2] of a rope */
  const float **rows;         /* [D or W] */
  float *dense;               /* 16 bits: [64][D or E] rows before they are rounded */
  uint16_t *P, *dS, *dS_keys; /* 16 bits: of one tile, of one, of SFA_MAX_STRIPS, by SFA_MAX_STRIPS blocks */
} sfa_backward_scratch;

enum {
  SFA_BACKWARD_HALF_WIDTH = 64,                                             /* query rows of a block in 16 bits */
  SFA_BACKWARD_HALF_STRIDE = SFA_MAX_STRIPS * SFA_BACKWARD_HALF_WIDTH * 32, /* between rows of patches of weights */
  SFA_BACKWARD_HALF_TILE = SFA_KEY_TILE / 32 * SFA_BACKWARD_HALF_STRIDE     /* of the weights of a tile */
};

sfa_backward_scratch sfa_backward_scratch_of(const sfa_backward_call *w, int32_t thread);

/* rows [64][turned_width], the block's queries without query_scale, and d_out [n_rows][E] to patches. */
void sfa_attn_backward_pack_block(const sfa_backward_call *w, const sfa_attn_block *block, int64_t place, const float *rows,
                                  const float *d_out);
/* An item of sfa_parallel over all pairs and tiles: keys and values to patches. */
void sfa_attn_backward_pack_tile(void *call, int64_t item, int32_t thread);
/* Blocks of one pair, n of them in a row, meet tiles [tile, end). */
void sfa_attn_backward_meet_half(const sfa_backward_call *w, int64_t pair, int32_t n, sfa_attn_block *blocks, const int64_t *places,
                                 int64_t tile, int64_t end, const sfa_backward_scratch *own);

#endif
