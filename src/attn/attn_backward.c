/* Gradients: the tile loop once more, this time with weights known beforehand (docs/MATH.md 4). Per block of W query rows and 64 keys:
 *
 *     P  = e2(S - lse)                 S as in the forward: K_k steps a key, or D
 *     dP = V dOt                       [64][W], dense
 *     dS = P (dP - delta)
 *     dV += P dO                       [64][E], dense
 *     dK += dS Q     codes: a sum of W products a slot; dense: [64][D]
 *     dQ += dS^T K   codes: K_k steps a key into dQt [D][W]; dense: [W][D]
 *
 * One pass, so that S and dP are computed once: sums of queries and of keys both live in the workspace. Threads stay out of each other's
 * way by a timetable: blocks and tiles of a kv head are cut into n_cuts pieces each, and in round p piece c of the keys meets piece
 * (p - c) mod n_cuts of the queries. Nobody shares a piece in a round, every sum grows in the order of the rounds, whoever does the work;
 * and as c + r = p is the diagonal across, a round under a causal mask has as much to do as any other. */
#include "attn/attn_backward_parts.h"

#include "code/code.h"

#include <math.h>
#include <string.h>

/* ---- Plan ------------------------------------------------------------------------------------------------------------------ */

enum {
  CUT_ROWS = 256,  /* a piece has as many query rows and keys at least, so that what it reads is read for many */
  ROUND_ITEMS = 32 /* pieces of a round, if there are so many: what keeps 16 threads busy */
};

static void *take(void *memory, size_t *used, size_t count, size_t bytes, bool *fits) {
  size_t size, at = *used;
  *fits = *fits && sfa_mul_size(count, bytes, &size) && sfa_add_size(size, 63, &size) && sfa_add_size(at, size & ~(size_t)63, used);
  return memory ? (unsigned char *)memory + at : NULL;
}

static int32_t to_lanes(int32_t n) { return (n + SFA_LANES - 1) / SFA_LANES * SFA_LANES; }

static size_t scratch_place(const sfa_backward_call *w, void *memory, sfa_backward_scratch *s, bool *fits) {
  size_t used = 0, W = (size_t)w->plan.width, D = (size_t)w->plan.options.head_dim, E = (size_t)w->plan.options.head_dim_v,
         f = sizeof(float);
  size_t in_f32 = !w->half, tile = w->half ? SFA_BACKWARD_HALF_TILE : 0;
  s->scores = take(memory, &used, in_f32 * SFA_KEY_TILE * W, f, fits);
  s->capped = take(memory, &used, w->plan.options.softcap > 0 ? SFA_KEY_TILE * W : 0, f, fits);
  s->turned = take(memory, &used, W, (size_t)w->turned_width * f, fits);
  s->row = take(memory, &used, D, f, fits);
  s->line = take(memory, &used, D / 2, f, fits);
  s->rows = take(memory, &used, D > W ? D : W, sizeof *s->rows, fits);
  s->dense = take(memory, &used, w->half ? SFA_KEY_TILE * (D > E ? D : E) : 0, f, fits);
  s->P = take(memory, &used, tile, sizeof *s->P, fits);
  s->dS = take(memory, &used, tile, sizeof *s->dS, fits);
  s->dS_keys = take(memory, &used, SFA_MAX_STRIPS * tile, sizeof *s->dS_keys, fits);
  return used;
}

sfa_backward_scratch sfa_backward_scratch_of(const sfa_backward_call *w, int32_t thread) {
  sfa_backward_scratch s;
  bool fits = true;
  scratch_place(w, w->threads + (size_t)thread * w->thread_bytes, &s, &fits);
  return s;
}

/* Pieces that the keys and the queries of a pair are cut into. */
static int32_t count_cuts(const sfa_backward_call *w) {
  int64_t most = sfa_min64(w->n_blocks * w->plan.width, w->n_tiles * SFA_KEY_TILE) / CUT_ROWS;
  return (int32_t)sfa_max64(sfa_min64((ROUND_ITEMS + w->n_pairs - 1) / w->n_pairs, most), 1);
}

/* What the options decide, and the arrays over memory (NULL: their bytes alone). False if these do not fit an address. */
static bool backward_place(const sfa_attention_plan *plan, const sfa_half_kernels *half, void *memory, sfa_backward_call *w) {
  const sfa_attention_options *o = &plan->options;
  w->plan = *plan;
  w->half = half;
  w->plan.policy = SFA_POLICY_TILES;
  w->plan.densify = w->plan.split = false;
  w->plan.n_strips = SFA_MAX_STRIPS;
  w->plan.width = half ? SFA_BACKWARD_HALF_WIDTH : plan->width; /* if that is less, there is one block */
  bool fits = sfa_attn_plan_workspace(&w->plan), dense_keys = !o->k_k || o->k_k == o->head_dim;
  w->n_pairs = (int64_t)o->n_sequences * o->n_kv_heads;
  w->n_blocks = plan->n_blocks;
  w->n_tiles = (o->max_seqlen_k + SFA_KEY_TILE - 1) / SFA_KEY_TILE;
  w->n_cuts = count_cuts(w);
  w->turned_width = to_lanes(o->head_dim);
  w->k_is_packed = !half;
  w->q_height = half ? sfa_half_padded(o->head_dim) : o->head_dim;
  w->k_width = half ? w->q_height : o->k_k ? o->k_k : o->head_dim;
  w->v_width = half ? sfa_half_padded(o->head_dim_v) : o->head_dim_v;
  size_t used = w->plan.workspace_bytes, f = sizeof(float), h = sizeof(uint16_t), D = (size_t)o->head_dim, E = (size_t)o->head_dim_v;
  size_t n_rows, n_keys;
  fits = fits && sfa_mul_size((size_t)(w->n_pairs * w->n_blocks), (size_t)w->plan.width, &n_rows) &&
         sfa_mul_size((size_t)(w->n_pairs * w->n_tiles), SFA_KEY_TILE, &n_keys);
  if (!fits)
    return false;
  size_t f_rows = half ? 0 : n_rows, h_rows = half ? n_rows : 0, h_keys = half ? n_keys : 0;
  w->q_tile = take(memory, &used, f_rows, D * f, &fits);
  w->q_rows = take(memory, &used, dense_keys ? f_rows : 0, (size_t)w->turned_width * f, &fits);
  w->o_tile = take(memory, &used, f_rows, E * f, &fits);
  w->o_rows = take(memory, &used, f_rows, E * f, &fits);
  w->bf16.q = take(memory, &used, h_rows, (size_t)w->q_height * h, &fits);
  w->bf16.q_turned = take(memory, &used, h_rows, (size_t)w->q_height * h, &fits);
  w->bf16.o = take(memory, &used, h_rows, (size_t)w->v_width * h, &fits);
  w->bf16.o_turned = take(memory, &used, h_rows, (size_t)w->v_width * h, &fits);
  w->bf16.k = take(memory, &used, h_keys, (size_t)w->k_width * h, &fits);
  w->bf16.k_turned = take(memory, &used, h_keys, (size_t)w->k_width * h, &fits);
  w->bf16.v = take(memory, &used, h_keys, (size_t)w->v_width * h, &fits);
  w->q_sum = take(memory, &used, n_rows, (size_t)w->q_height * f, &fits);
  w->lse = take(memory, &used, n_rows, f, &fits);
  w->delta = take(memory, &used, n_rows, f, &fits);
  w->q_ids = take(memory, &used, n_rows, (size_t)o->k_q * sfa_id_bytes(o->head_dim), &fits);
  w->k_sum = take(memory, &used, n_keys, (size_t)w->k_width * f, &fits);
  w->v_sum = take(memory, &used, n_keys, (size_t)w->v_width * f, &fits);
  sfa_backward_scratch s;
  w->thread_bytes = scratch_place(w, NULL, &s, &fits);
  w->threads = take(memory, &used, (size_t)plan->ctx->n_threads, w->thread_bytes, &fits);
  w->bytes = used;
  return fits;
}

/* The 16-bit kernels, where the plan's forward takes them. */
static const sfa_half_kernels *half_of(const sfa_attention_plan *plan) {
  bool half = plan->policy == SFA_POLICY_HALF_CODES || plan->policy == SFA_POLICY_HALF_DENSE;
  return half ? sfa_half_kernel_of(plan->ctx->isa) : NULL;
}

size_t sfa_attn_backward_workspace_bytes(const sfa_attention_plan *plan) {
  sfa_backward_call in_f32 = {.grad = NULL}, in_half = {.bytes = 0}; /* f32 for calls with ALiBi, which only run knows of */
  const sfa_half_kernels *half = half_of(plan);
  bool fits = backward_place(plan, NULL, NULL, &in_f32) && (!half || backward_place(plan, half, NULL, &in_half));
  return !fits ? 0 : in_f32.bytes > in_half.bytes ? in_f32.bytes : in_half.bytes;
}

/* ---- Queries: what all keys will want of a block ----------------------------------------------------------------------------- */

/* Block `number` of a pair; its query tile lies in the workspace. Its place among all blocks: *place. */
static bool find_block(const sfa_backward_call *w, int64_t pair, int64_t number, int32_t thread, int32_t strip, sfa_attn_block *block,
                       int64_t *place) {
  int32_t G = w->plan.options.n_kv_heads;
  if (!sfa_attn_block_find(&w->call, (int32_t)(pair / G), (int32_t)(pair % G), number, thread, strip, block))
    return false;
  *place = pair * w->n_blocks + number;
  if (!w->half)
    block->scratch.q_tile = w->q_tile + *place * w->plan.width * w->plan.options.head_dim;
  return true;
}

/* out [n_columns][to_lanes(n_rows)] = factor * rows [n_rows][n_columns], turned. */
static void turn(const sfa_backward_call *w, int32_t n_rows, int32_t n_columns, const float *rows, float factor, const float **pointers,
                 float *out) {
  for (int32_t i = 0; i < n_rows; i++)
    pointers[i] = rows + (int64_t)i * n_columns;
  w->plan.kernels->query_tile(n_rows, pointers, n_columns, to_lanes(n_rows), factor, out);
}

/* In 16 chains, for the compiler's vectors. */
static float dot(int32_t n, const float *a, const float *b) {
  float sums[16] = {0};
  for (int32_t e = 0; e < n; e += 8)
    for (int32_t l = 0; l < 8; l++)
      sums[(e & 8) + l] += a[e + l] * b[e + l];
  for (int32_t half = 8; half; half /= 2)
    for (int32_t l = 0; l < half; l++)
      sums[l] += sums[l + half];
  return sums[0];
}

static void load_item(void *arg, int64_t item, int32_t thread) {
  const sfa_backward_call *w = arg;
  const sfa_attention_options *o = &w->plan.options;
  int32_t W = w->plan.width, D = o->head_dim, E = o->head_dim_v;
  sfa_attn_block block;
  int64_t place;
  if (!find_block(w, item / w->n_blocks, item % w->n_blocks, thread, 0, &block, &place))
    return;
  sfa_backward_scratch s = sfa_backward_scratch_of(w, thread);
  int64_t start = sfa_attn_clock(&block);
  sfa_attn_block_load(&block);
  memset(w->q_sum + place * W * w->q_height, 0, (size_t)W * (size_t)w->q_height * sizeof *w->q_sum);
  if (w->half) /* without the scale, which would spoil rows that are exactly bf16; int8 keys bring it */
    turn(w, D, W, block.scratch.q_tile, block.view->k.format.dtype == SFA_I8 ? 1 : 1 / w->plan.query_scale, s.rows, s.turned);
  else if (w->k_width == D)
    turn(w, D, W, block.scratch.q_tile, 1, s.rows, w->q_rows + place * W * w->turned_width);
  size_t id_bytes = (size_t)o->k_q * sfa_id_bytes(D);
  float *lse = w->lse + place * W, *delta = w->delta + place * W, *rows = w->half ? s.dense : w->o_rows + place * W * E;
  for (int32_t i = 0; i < W; i++) {
    lse[i] = INFINITY;
    delta[i] = 0;
  }
  for (int32_t i = 0; i < block.n_rows; i++) {
    int64_t row = block.scratch.row[i];
    const float *d_out = w->grad->d_out + row * E;
    if (w->q_is_sparse)
      memcpy(w->q_ids + (size_t)(place * W + i) * id_bytes, block.scratch.id_rows[i], id_bytes);
    memcpy(rows + (int64_t)i * E, d_out, (size_t)E * sizeof *rows);
    s.rows[i] = d_out;
    if (w->args.lse[row] != -INFINITY)
      lse[i] = w->args.lse[row] * (float)M_LOG2E;
    delta[i] = dot(E, d_out, w->args.out + row * E) - (w->grad->d_lse ? w->grad->d_lse[row] : 0);
  }
  if (w->half)
    sfa_attn_backward_pack_block(w, &block, place, s.turned, rows);
  else
    w->plan.kernels->query_tile(block.n_rows, s.rows, E, W, 1, w->o_tile + place * W * E);
  sfa_attn_clock_stop(&block, start);
}

/* ---- One tile ---------------------------------------------------------------------------------------------------------------- */

static void meet_tile(const sfa_backward_call *w, sfa_attn_block *block, int64_t place, const sfa_attn_key_tile *tile, int64_t key,
                      const sfa_backward_scratch *own) {
  const sfa_attention_options *o = &w->plan.options;
  const sfa_kernels *kernels = w->plan.kernels;
  const sfa_attn_scratch *s = &block->scratch;
  int32_t n_keys = tile->n_keys, n_rows = block->n_rows, W = w->plan.width, D = o->head_dim, E = o->head_dim_v;
  int32_t K = block->view->k.format.k, id_bytes = (int32_t)sfa_id_bytes(D);
  float *P = s->scores, *dS = own->scores, *q_sum = w->q_sum + place * W * D, *k_sum = w->k_sum + key * w->k_width;

  if (tile->ids)
    kernels->score_codes(n_keys, K, tile->ids, id_bytes, tile->keys, tile->scale, s->q_tile, W, P);
  else
    kernels->score_dense(n_keys, D, tile->keys, D, tile->scale, s->q_tile, W, P);
  if (o->softcap > 0) {
    kernels->score_adjust(n_keys, W, o->softcap, NULL, NULL, P);
    memcpy(own->capped, P, (size_t)n_keys * (size_t)W * sizeof *P);
  }
  if (w->args.alibi_slopes) {
    for (int32_t i = 0; i < W; i++)
      s->tile_position[i] = s->position[i] - (int32_t)tile->first_key;
    kernels->score_adjust(n_keys, W, 0, s->slope, s->tile_position, P);
  }
  int32_t n_always;
  if (sfa_attn_block_bounds(block, tile->first_key, n_keys, &n_always))
    kernels->score_mask(n_keys, W, s->lo, s->hi, n_always, P);

  kernels->score_dense(n_keys, E, tile->values, E, tile->value_scale, w->o_tile + place * W * E, W, dS);
  kernels->softmax_backward(n_keys, W, w->lse + place * W, w->delta + place * W, o->softcap > 0 ? own->capped : NULL, o->softcap, P, dS);

  kernels->key_product(n_keys, n_rows, W, P, E, w->o_rows + place * W * E, E, w->v_sum + key * E);
  if (tile->ids)
    kernels->key_codes_backward(n_keys, K, tile->ids, id_bytes, dS, s->q_tile, W, k_sum);
  else
    kernels->key_product(n_keys, n_rows, W, dS, D, w->q_rows + place * W * w->turned_width, w->turned_width, k_sum);
  if (tile->scale) /* keys are whole numbers */
    kernels->rescale(n_keys, W, tile->scale, dS);
  if (tile->ids)
    kernels->query_codes_backward(n_keys, K, tile->ids, id_bytes, tile->keys, dS, W, q_sum);
  else
    kernels->value_product(n_rows, n_keys, W, dS, D, tile->keys, D, q_sum);
}

/* ---- A piece of the queries meets a piece of the keys ------------------------------------------------------------------------------ */

typedef struct backward_round {
  const sfa_backward_call *w;
  int32_t number;
} backward_round;

static int64_t blocks_of(const sfa_backward_call *w, int64_t pair) {
  int64_t first, n_tokens;
  sfa_attn_token_range(w->args.cu_seqlens_q, w->plan.options.max_seqlen_q, (int32_t)(pair / w->plan.options.n_kv_heads), &first, &n_tokens);
  return (n_tokens * w->plan.group + w->plan.width - 1) / w->plan.width;
}

static int64_t tiles_of(const sfa_backward_call *w, int64_t pair) {
  return (w->call.views[pair / w->plan.options.n_kv_heads].n_keys + SFA_KEY_TILE - 1) / SFA_KEY_TILE;
}

static void meet_item(void *arg, int64_t item, int32_t thread) {
  const backward_round *round = arg;
  const sfa_backward_call *w = round->w;
  int64_t pair = item / w->n_cuts, k_piece = item % w->n_cuts, q_piece = (round->number - k_piece + w->n_cuts) % w->n_cuts;
  int64_t n_blocks = blocks_of(w, pair), n_tiles = tiles_of(w, pair);
  int64_t end_block = n_blocks * (q_piece + 1) / w->n_cuts, end_tile = n_tiles * (k_piece + 1) / w->n_cuts;
  sfa_backward_scratch own = sfa_backward_scratch_of(w, thread);
  sfa_attn_block blocks[SFA_MAX_STRIPS];
  int64_t places[SFA_MAX_STRIPS];
  for (int64_t first = n_blocks * q_piece / w->n_cuts; first < end_block; first += SFA_MAX_STRIPS) {
    int32_t n = 0;
    while (n < SFA_MAX_STRIPS && first + n < end_block && find_block(w, pair, first + n, thread, n, &blocks[n], &places[n]))
      n++;
    int64_t start = sfa_attn_clock(&blocks[0]), first_tile = n_tiles * k_piece / w->n_cuts;
    if (w->half)
      sfa_attn_backward_meet_half(w, pair, n, blocks, places, first_tile, end_tile, &own);
    for (int64_t number = first_tile; !w->half && number < end_tile; number++) {
      int64_t first_key = number * SFA_KEY_TILE, key = pair * w->n_tiles * SFA_KEY_TILE + first_key;
      sfa_attn_key_tile tile = {.n_keys = 0};
      for (int32_t i = 0; i < n; i++)
        if (sfa_attn_block_sees(&blocks[i], first_key, first_key + SFA_KEY_TILE)) {
          if (!tile.n_keys)
            tile = sfa_attn_tile_load(&blocks[i], number);
          meet_tile(w, &blocks[i], places[i], &tile, key, &own);
        }
    }
    sfa_attn_clock_stop(&blocks[0], start);
  }
}

/* ---- From sums to gradients of the rows as they were given --------------------------------------------------------------------- */

/* row [D] = factor * sum at its support (ids NULL: everywhere), 0 elsewhere; sum [K] if it is packed, else [D]. The kept entries alone go
 * to values, the row through the rope to out, where they are wanted. */
static void finish_row(const sfa_backward_call *w, int32_t K, const void *ids, const float *sum, bool packed, float factor,
                       const sfa_rope *rope, int64_t line, const sfa_backward_scratch *s, float *values, float *out) {
  int32_t D = w->plan.options.head_dim;
  float *row = rope || !out ? s->row : out;
  if (ids)
    memset(row, 0, (size_t)D * sizeof *row);
  for (int32_t u = 0; u < (ids ? K : D); u++) {
    int32_t feature = !ids ? u : D <= 256 ? ((const uint8_t *)ids)[u] : ((const uint16_t *)ids)[u];
    row[feature] = factor * sum[packed ? u : feature];
    if (values)
      values[u] = row[feature];
  }
  if (!rope || !out)
    return;
  int64_t n_pairs = rope->n_rotated / 2;
  for (int64_t p = 0; p < n_pairs; p++) /* back is the same turn by minus the angle */
    s->line[p] = -rope->sin[line * n_pairs + p];
  w->plan.kernels->rotate_rows(1, D, row, D, rope->cos + line * n_pairs, s->line, n_pairs, rope->n_rotated, rope->interleaved, out, D);
}

/* Row `row` of rows or values that may not be wanted. */
static float *row_of(float *rows, int64_t row) { return rows ? rows + row : NULL; }

static void finish_queries_item(void *arg, int64_t item, int32_t thread) {
  const sfa_backward_call *w = arg;
  const sfa_attention_options *o = &w->plan.options;
  int32_t W = w->plan.width, D = o->head_dim;
  sfa_attn_block block;
  int64_t place;
  if (!find_block(w, item / w->n_blocks, item % w->n_blocks, thread, 0, &block, &place))
    return;
  sfa_backward_scratch s = sfa_backward_scratch_of(w, thread);
  int64_t start = sfa_attn_clock(&block), stride = w->grad->d_q_token_stride;
  const float *sums = w->q_sum + place * W * w->q_height;
  int64_t sum_stride = D;
  if (w->half || block.view->k.format.k) {
    turn(w, D, W, sums, 1, s.rows, s.turned);
    sums = s.turned;
    sum_stride = w->turned_width;
  }
  /* What q_tile lacks of softmax_scale is in the keys' factor, and the other way round (kernel.h on SFA_I8). */
  float factor = block.view->k.format.dtype == SFA_I8 ? o->softmax_scale / w->plan.query_scale : o->softmax_scale;
  size_t id_bytes = (size_t)o->k_q * sfa_id_bytes(D);
  for (int32_t i = 0; i < block.n_rows; i++) {
    int64_t token = block.scratch.row[i] / o->n_heads, line = w->args.cu_seqlens_q ? token : token - block.first_token;
    const void *ids = w->q_is_sparse ? w->q_ids + (size_t)(place * W + i) * id_bytes : NULL;
    finish_row(w, o->k_q, ids, sums + i * sum_stride, false, factor, w->args.q.rope, line, &s,
               row_of(w->grad->d_q_values, (token * o->n_heads + block.scratch.head[i]) * o->k_q),
               row_of(w->grad->d_q, token * stride + (int64_t)block.scratch.head[i] * D));
  }
  sfa_attn_clock_stop(&block, start);
}

static void finish_keys_item(void *arg, int64_t item, int32_t thread) {
  const sfa_backward_call *w = arg;
  const sfa_attention_options *o = &w->plan.options;
  int64_t pair = item / w->n_tiles, number = item % w->n_tiles, first_token, n_tokens;
  int32_t b = (int32_t)(pair / o->n_kv_heads), g = (int32_t)(pair % o->n_kv_heads), D = o->head_dim, E = o->head_dim_v;
  const sfa_kv_view *view = &w->call.views[b];
  const sfa_kv_side *k = &view->k;
  sfa_attn_token_range(w->args.cu_seqlens_k, o->max_seqlen_k, b, &first_token, &n_tokens);
  sfa_backward_scratch s = sfa_backward_scratch_of(w, thread);
  float factor = k->format.dtype == SFA_I8 || w->half ? o->softmax_scale : o->softmax_scale / w->plan.query_scale;
  const unsigned char *ids = k->format.k ? sfa_kv_at(view, &k->ids, g, number) : NULL;
  const sfa_rope *rope = w->args.k_codes ? NULL : w->args.k.rope;
  for (int64_t j = number * SFA_KEY_TILE; j < sfa_min64((number + 1) * SFA_KEY_TILE, n_tokens); j++) {
    int64_t token = first_token + j, key = pair * w->n_tiles * SFA_KEY_TILE + j;
    finish_row(w, k->format.k, ids, w->k_sum + key * w->k_width, w->k_is_packed, factor, rope, w->args.cu_seqlens_k ? token : j, &s,
               row_of(w->grad->d_k_values, (token * o->n_kv_heads + g) * o->k_k),
               row_of(w->grad->d_k, token * w->grad->d_k_token_stride + (int64_t)g * D));
    memcpy(w->grad->d_v + token * w->grad->d_v_token_stride + (int64_t)g * E, w->v_sum + key * w->v_width, (size_t)E * sizeof(float));
    if (ids)
      ids += (size_t)k->ids.row_stride * sfa_id_bytes(D);
  }
}

/* d sink = - sum over the head's rows of e^(sink - lse) delta, in double. */
static void sink_item(void *arg, int64_t item, int32_t thread) {
  (void)thread;
  const sfa_backward_call *w = arg;
  int32_t h = (int32_t)item, group = w->plan.group, W = w->plan.width;
  double sum = 0;
  for (int32_t b = 0; w->args.sink_logit && b < w->plan.options.n_sequences; b++) {
    int64_t first, n_tokens, pair = (int64_t)b * w->plan.options.n_kv_heads + h / group, block = pair * w->n_blocks * W;
    sfa_attn_token_range(w->args.cu_seqlens_q, w->plan.options.max_seqlen_q, b, &first, &n_tokens);
    for (int64_t t = 0; t < n_tokens; t++) {
      double lse = w->args.lse[(first + t) * w->plan.options.n_heads + h];
      if (lse != -INFINITY)
        sum -= exp((double)w->args.sink_logit[h] - lse) * (double)w->delta[block + t * group + h % group];
    }
  }
  w->grad->d_sink_logit[h] = (float)sum;
}

/* ---- The whole ----------------------------------------------------------------------------------------------------------------- */

sfa_status sfa_attn_backward(const sfa_attention_plan *plan, const sfa_attention_grad_args *args) {
  sfa_backward_call w = {.grad = args, .args = *args->forward};
  backward_place(plan, args->forward->alibi_slopes ? NULL : half_of(plan), args->workspace, &w);
  const sfa_attention_options *o = &w.plan.options;
  w.args.workspace = args->workspace;
  w.args.stage_ns = args->stage_ns;
  sfa_kv_view *views = (sfa_kv_view *)(void *)((unsigned char *)args->workspace + w.plan.views);
  w.call = (sfa_attn_call){&w.plan, &w.args, views};
  w.q_is_sparse = w.args.q_codes || (o->k_q && o->k_q < o->head_dim);
  sfa_attn_stages_clear(&w.plan, &w.args);
  SFA_TRY(sfa_attn_prepare(&w.plan, &w.args, views));
  size_t n_keys = (size_t)(w.n_pairs * w.n_tiles) * SFA_KEY_TILE;
  memset(w.k_sum, 0, n_keys * (size_t)w.k_width * sizeof *w.k_sum);
  memset(w.v_sum, 0, n_keys * (size_t)w.v_width * sizeof *w.v_sum);
  sfa_parallel(plan->ctx, w.n_pairs * w.n_blocks, load_item, &w);
  if (w.half)
    sfa_parallel(plan->ctx, w.n_pairs * w.n_tiles, sfa_attn_backward_pack_tile, &w);
  for (backward_round round = {&w, 0}; round.number < w.n_cuts; round.number++)
    sfa_parallel(plan->ctx, w.n_pairs * w.n_cuts, meet_item, &round);
  sfa_parallel(plan->ctx, w.n_pairs * w.n_blocks, finish_queries_item, &w);
  sfa_parallel(plan->ctx, w.n_pairs * w.n_tiles, finish_keys_item, &w);
  if (args->d_sink_logit)
    sfa_parallel(plan->ctx, o->n_heads, sink_item, &w);
  sfa_attn_stages_add(&w.plan, &w.args);
  return SFA_OK;
}
