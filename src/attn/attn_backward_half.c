/* Gradients in 16 bits: the same timetable, the products by tiles of bf16 with sums in f32 (kernel_half.h). Codes are written out as rows
 * with zeros, because a tile product costs less than the look-ups of a few features. Per 4 tiles of keys and 4 blocks of queries, where a
 * tile product needs what lies in both orders:
 *
 *     P, dS            [64][256] of a tile: patches of S and dP come from the tile registers and leave as bf16
 *     dV += P dO       sums over the queries of all blocks
 *     dK += dS Q       likewise
 *     dQt += K^T dS    sums over the keys of all tiles; kept until then in its other order
 *
 * Blocks that see a tile follow each other: a causal mask or a window leaves out the first or the last of them. Tiles that a block sees do
 * so but for the gap between sink tokens and window. */
#include "attn/attn_backward_parts.h"

#include "code/code.h"

#include <string.h>

enum { WIDTH = SFA_BACKWARD_HALF_WIDTH, STRIDE = SFA_BACKWARD_HALF_STRIDE, TILE = SFA_BACKWARD_HALF_TILE, PATCH = 32 * 32 };

void sfa_attn_backward_pack_block(const sfa_backward_call *w, const sfa_attn_block *block, int64_t place, const float *rows,
                                  const float *d_out) {
  const sfa_backward_half *to = &w->bf16;
  int32_t D = w->plan.options.head_dim, E = w->plan.options.head_dim_v;
  for (int32_t i = 0; i < WIDTH; i += 32) {
    int64_t q_at = (place * WIDTH + i) * w->q_height, o_at = (place * WIDTH + i) * w->v_width;
    int32_t n = (int32_t)sfa_min64(sfa_max64(block->n_rows - i, 0), 32);
    w->half->pack_patches(n, D, rows + (int64_t)i * w->turned_width, w->turned_width, true, to->q + q_at, to->q_turned + q_at);
    w->half->pack_patches(n, E, d_out + (int64_t)i * E, E, true, to->o + o_at, to->o_turned + o_at);
  }
}

/* Rows times their scales, copied unless they have none. */
static const float *scale_rows(const sfa_backward_call *w, int32_t n, int32_t width, const float *rows, const float *scale, float *copy) {
  if (!scale)
    return rows;
  if (rows != copy)
    memcpy(copy, rows, (size_t)n * (size_t)width * sizeof *copy);
  w->plan.kernels->rescale(n, width, scale, copy);
  return copy;
}

void sfa_attn_backward_pack_tile(void *call, int64_t item, int32_t thread) {
  const sfa_backward_call *w = call;
  const sfa_backward_half *to = &w->bf16;
  int32_t D = w->plan.options.head_dim, E = w->plan.options.head_dim_v, G = w->plan.options.n_kv_heads;
  int64_t pair = item / w->n_tiles, number = item % w->n_tiles;
  sfa_attn_block reader = {.call = &w->call, .view = &w->call.views[pair / G], .kv_head = (int32_t)(pair % G)};
  if (number * SFA_KEY_TILE >= reader.view->n_keys)
    return;
  sfa_attn_scratch_of(&w->plan, &w->args, thread, 0, &reader.scratch);
  sfa_backward_scratch own = sfa_backward_scratch_of(w, thread);
  int64_t start = w->args.stage_ns ? sfa_now_ns() : 0;
  sfa_attn_key_tile tile = sfa_attn_tile_load(&reader, number);
  const float *keys = tile.keys;
  if (tile.ids) {
    sfa_code_write_out(tile.n_keys, D, reader.view->k.format.k, tile.ids, tile.keys, own.dense);
    keys = own.dense;
  }
  keys = scale_rows(w, tile.n_keys, D, keys, tile.scale, own.dense);
  for (int32_t pass = 0; pass < 2; pass++) { /* keys, then values in the same scratch */
    const float *rows = pass ? scale_rows(w, tile.n_keys, E, tile.values, tile.value_scale, own.dense) : keys;
    for (int32_t j = 0; j < SFA_KEY_TILE; j += 32) {
      int64_t row = item * SFA_KEY_TILE + j;
      int32_t n = (int32_t)sfa_min64(sfa_max64(tile.n_keys - j, 0), 32);
      if (pass)
        w->half->pack_patches(n, E, rows + (int64_t)j * E, E, false, to->v + row * w->v_width, NULL);
      else
        w->half->pack_patches(n, D, rows + (int64_t)j * D, D, false, to->k + row * w->k_width, to->k_turned + row * w->k_width);
    }
  }
  if (w->args.stage_ns)
    reader.scratch.stage_ns[SFA_STAGE_PACK] += sfa_now_ns() - start;
}

/* Weights of a tile, of which n blocks from the first given on see keys; and what they add to the gradients of the tile's keys. P and dS
 * lie from the first of them on. */
static void meet_tile(const sfa_backward_call *w, int64_t row, int64_t first_key, int32_t n, const sfa_attn_block *blocks, int64_t place,
                      const sfa_backward_scratch *own, uint16_t *dS_keys) {
  const sfa_backward_half *from = &w->bf16;
  int32_t Dp = w->k_width, Ep = w->v_width, n_steps = n * WIDTH / 32;
  for (int32_t i = 0; i < n; i++) {
    const sfa_attn_scratch *s = &blocks[i].scratch;
    int64_t rows = (place + i) * WIDTH, at = (int64_t)i * WIDTH * 32;
    int32_t n_always = 0;
    bool masked = sfa_attn_block_bounds(&blocks[i], first_key, SFA_KEY_TILE, &n_always);
    float unit = blocks[i].view->k.format.dtype == SFA_I8 ? 1 : w->plan.query_scale; /* int8 keys bring the scale */
    w->half->weights_backward(w->plan.options.head_dim, w->plan.options.head_dim_v, from->k + row * Dp, from->v + row * Ep, WIDTH,
                              from->q + rows * Dp, from->o + rows * Ep, unit, w->lse + rows, w->delta + rows, masked ? s->lo : NULL, s->hi,
                              n_always, STRIDE, own->P + at, own->dS + at, dS_keys + at);
  }
  w->half->add_product(2, Ep / 32, n_steps, own->P, STRIDE, PATCH, from->o_turned + place * WIDTH * Ep, PATCH, 32 * Ep, w->v_sum + row * Ep,
                       Ep);
  w->half->add_product(2, Dp / 32, n_steps, own->dS, STRIDE, PATCH, from->q_turned + place * WIDTH * Dp, PATCH, 32 * Dp,
                       w->k_sum + row * Dp, Dp);
}

void sfa_attn_backward_meet_half(const sfa_backward_call *w, int64_t pair, int32_t n, sfa_attn_block *blocks, const int64_t *places,
                                 int64_t tile, int64_t end, const sfa_backward_scratch *own) {
  int32_t Dp = w->k_width;
  w->half->begin();
  for (; tile < end; tile += SFA_MAX_STRIPS) {
    int32_t n_tiles = (int32_t)sfa_min64(end - tile, SFA_MAX_STRIPS);
    bool sees[SFA_MAX_STRIPS][SFA_MAX_STRIPS] = {{false}}; /* [block][tile] */
    int64_t row = (pair * w->n_tiles + tile) * SFA_KEY_TILE;
    for (int32_t t = 0; t < n_tiles; t++) {
      int64_t first_key = (tile + t) * SFA_KEY_TILE;
      int32_t first = n, n_seeing = 0;
      for (int32_t i = 0; i < n; i++)
        if ((sees[i][t] = sfa_attn_block_sees(&blocks[i], first_key, first_key + SFA_KEY_TILE))) {
          first = n_seeing ? first : i;
          n_seeing++;
        }
      if (n_seeing)
        meet_tile(w, row + t * SFA_KEY_TILE, first_key, n_seeing, blocks + first, places[first], own,
                  own->dS_keys + t * TILE + first * WIDTH * 32);
    }
    for (int32_t i = 0; i < n; i++)
      for (int32_t t = 0, next; t < n_tiles; t = next) {
        for (next = t + 1; next < n_tiles && sees[i][next] == sees[i][t];)
          next++;
        if (sees[i][t])
          w->half->add_product(Dp / 32, WIDTH / 32, (next - t) * SFA_KEY_TILE / 32, w->bf16.k_turned + (row + t * SFA_KEY_TILE) * Dp, PATCH,
                               32 * Dp, own->dS_keys + t * TILE + i * WIDTH * 32, PATCH, STRIDE, w->q_sum + places[i] * Dp * WIDTH, WIDTH);
      }
  }
  w->half->end();
}
