/* The tile loop: a block of query rows meets the keys 64 at a time. Prefill and decode, dense and sparse are this one loop.
 *
 * The query rows of a kv head lie feature-major in Qt [D][W], so that lanes are queries. Per tile of keys (online softmax, docs/MATH.md 3):
 *
 *     S [64][W] = K Qt           codes: K_k steps a key; dense: D
 *     S += softcap, ALiBi; S = -inf where masked
 *     P, m, l, alpha = softmax(S, m, l)
 *     O [W][E] = alpha O + P^T V
 *
 * Bits: rows do not touch each other; a tile that a row does not see changes nothing in it; keys are cut into tiles and spans by their
 * position in the sequence alone. So a row's result does not depend on its block, the batch, or how the prompt was cut. */
#include "attn/attn_tile.h"

#include "attn/attn_paper.h"
#include "base/half.h"
#include "code/code.h"

#include <math.h>
#include <string.h>

/* An inf or NaN has all exponent bits set: one more carries into the sign. */
static bool all_finite(const float *x, int64_t n) {
  uint32_t carry = 0;
  for (int64_t i = 0; i < n; i++)
    carry |= (sfa_bits_of(x[i]) & 0x7fffffffu) + 0x00800000u;
  return carry < 0x80000000u;
}

/* ---- The block ------------------------------------------------------------------------------------------------------------- */

bool sfa_attn_block_find(const sfa_attn_call *call, int32_t b, int32_t g, int64_t block, int32_t thread, int32_t strip,
                         sfa_attn_block *out) {
  const sfa_attention_plan *plan = call->plan;
  int64_t n_tokens;
  out->call = call;
  out->view = &call->views[b];
  out->kv_head = g;
  out->first_row = block * plan->width;
  sfa_attn_token_range(call->args->cu_seqlens_q, plan->options.max_seqlen_q, b, &out->first_token, &n_tokens);
  int64_t n_rows = sfa_min64(n_tokens * plan->group - out->first_row, plan->width);
  if (n_rows <= 0)
    return false;
  out->n_rows = (int32_t)n_rows;
  out->q_offset = call->args->cu_seqlens_q ? out->first_token * call->args->q.token_stride : b * call->args->q.batch_stride;
  out->position_offset = out->view->n_keys - n_tokens;
  sfa_attn_scratch_of(plan, call->args, thread, strip, &out->scratch);
  out->state = &out->scratch.total;
  const sfa_attn_scratch *s = &out->scratch;
  const float *slopes = call->args->alibi_slopes;
  int64_t token = out->first_row / plan->group;
  int32_t head_in_group = (int32_t)(out->first_row % plan->group);
  for (int32_t i = 0; i < plan->width; i++) {
    s->head[i] = g * plan->group + head_in_group;
    s->row[i] = (out->first_token + token) * plan->options.n_heads + s->head[i];
    s->position[i] = (int32_t)(token + out->position_offset);
    s->slope[i] = slopes ? slopes[s->head[i]] * (float)M_LOG2E : 0;
    if (i + 1 < out->n_rows && ++head_in_group == plan->group) { /* the lanes beyond repeat the last row: any valid mask will do */
      head_in_group = 0;
      token++;
    }
  }
  return true;
}

/* Dense query rows i .. i + *n - 1 as they came, all of those that lie evenly: a token's heads, or all tokens of the only head. */
static sfa_row_source query_rows(const sfa_attn_block *block, int32_t i, int32_t *n) {
  const sfa_attn_scratch *s = &block->scratch;
  const sfa_rows *q = &block->call->args->q;
  int32_t group = block->call->plan->group;
  int64_t first_line = block->call->args->cu_seqlens_q ? block->first_token : 0, token = s->position[i] - block->position_offset;
  sfa_row_source x = sfa_rows_from(q, block->q_offset + s->head[i] * q->head_stride, token, first_line + token);
  x.row_stride = group == 1 ? q->token_stride : q->head_stride;
  *n = group == 1 ? block->n_rows - i : (int32_t)sfa_min64((block->kv_head + 1) * group - s->head[i], block->n_rows - i);
  return x;
}

/* The rows, turned, to scratch.q_rows [n_rows][D]. */
static void load_query_rows(const sfa_attn_block *block) {
  const sfa_attention_plan *plan = block->call->plan;
  int32_t D = plan->options.head_dim;
  for (int32_t i = 0, n; i < block->n_rows; i += n) {
    sfa_row_source x = query_rows(block, i, &n);
    sfa_code_load(plan->kernels, n, &x, D, plan->group == 1, block->scratch.q_rows + (int64_t)i * D);
  }
}

/* Their codes to scratch.q_ids and q_values. */
static void select_query_rows(const sfa_attn_block *block) {
  const sfa_attention_plan *plan = block->call->plan;
  const sfa_attn_scratch *s = &block->scratch;
  int32_t D = plan->options.head_dim, K = plan->options.k_q, n;
  sfa_row_source x = query_rows(block, 0, &n);
  if (!sfa_code_from_bf16(&x, D)) {
    load_query_rows(block);
    plan->kernels->topk(block->n_rows, s->q_rows, D, D, K, s->q_ids, s->q_values);
    return;
  }
  if (n < block->n_rows) { /* one after the other, still in bf16 */
    uint16_t *rows = (uint16_t *)(void *)s->q_rows;
    for (int32_t i = 0; i < block->n_rows; i += n) {
      x = query_rows(block, i, &n);
      for (int32_t j = 0; j < n; j++)
        memcpy(rows + (int64_t)(i + j) * D, (const uint16_t *)x.data + j * x.row_stride, (size_t)D * sizeof *rows);
    }
    x = (sfa_row_source){.data = rows, .row_stride = D};
  }
  plan->kernels->topk_bf16(block->n_rows, x.data, x.row_stride, D, K, s->q_ids, s->q_values);
}

/* Codes of the block's rows to scratch.id_rows and value_rows: those given, or top-k of the dense rows. */
static void load_query_codes(const sfa_attn_block *block) {
  const sfa_attention_plan *plan = block->call->plan;
  const sfa_codes *codes = block->call->args->q_codes;
  const sfa_attn_scratch *s = &block->scratch;
  int32_t D = plan->options.head_dim, K = plan->options.k_q;
  size_t row_bytes = (size_t)K * sfa_id_bytes(D);
  if (!codes) {
    int64_t start = block->call->args->stage_ns ? sfa_now_ns() : 0;
    select_query_rows(block);
    if (block->call->args->stage_ns)
      s->stage_ns[SFA_STAGE_TOPK] += sfa_now_ns() - start;
  }
  for (int32_t i = 0; i < block->n_rows; i++) {
    s->id_rows[i] = s->q_ids + (size_t)i * row_bytes;
    s->value_rows[i] = s->q_values + (int64_t)i * K;
    if (codes) {
      int64_t row = s->row[i];
      const unsigned char *values = (const unsigned char *)codes->values + (size_t)(row * K) * sfa_dtype_bytes(codes->dtype);
      s->id_rows[i] = (const unsigned char *)codes->ids + (size_t)row * row_bytes;
      plan->kernels->load_rows(1, K, codes->dtype, values, K, codes->scales ? codes->scales + row : NULL, s->q_values + (int64_t)i * K, K);
    }
  }
}

/* scratch.q_rows [n_rows][D] from the codes of load_query_codes. */
static void write_out_codes(const sfa_attn_block *block) {
  const sfa_attention_options *o = &block->call->plan->options;
  const sfa_attn_scratch *s = &block->scratch;
  int32_t D = o->head_dim, K = o->k_q;
  memset(s->q_rows, 0, (size_t)block->n_rows * (size_t)D * sizeof *s->q_rows);
  for (int32_t i = 0; i < block->n_rows; i++)
    for (int32_t u = 0; u < K; u++)
      s->q_rows[(int64_t)i * D + sfa_id_at(s->id_rows[i], D, u)] = s->value_rows[i][u];
}

static bool has_query_codes(const sfa_attn_block *block) {
  const sfa_attention_options *o = &block->call->plan->options;
  return block->call->args->q_codes || (o->k_q && o->k_q < o->head_dim);
}

bool sfa_attn_block_load_codes(sfa_attn_block *block) {
  bool wanted = has_query_codes(block) && block->view->k.format.dtype != SFA_I8;
  if (wanted)
    load_query_codes(block);
  return wanted;
}

void sfa_attn_block_load(sfa_attn_block *block) {
  const sfa_attention_plan *plan = block->call->plan;
  const sfa_kernels *kernels = plan->kernels;
  const sfa_attn_scratch *s = &block->scratch;
  const sfa_row_format *k_format = &block->view->k.format;
  int32_t D = plan->options.head_dim, W = plan->width, K = plan->options.k_q, n_rows = block->n_rows;
  bool sparse = has_query_codes(block), whole = k_format->dtype == SFA_I8, keys = sfa_attn_lanes_are_keys(plan);
  if (sparse)
    load_query_codes(block);
  else
    load_query_rows(block);
  if (sparse && !whole && !keys) {
    kernels->query_tile_codes(n_rows, s->id_rows, (int32_t)sfa_id_bytes(D), s->value_rows, K, D, W, plan->query_scale, s->q_tile);
  } else {
    if (sparse)
      write_out_codes(block);
    if (whole) /* the scale joins each key's own: see kernel.h */
      kernels->round_rows(n_rows, D, sfa_row_width(k_format), s->q_rows, D, s->q_step);
    else if (keys)
      for (int64_t i = 0; i < (int64_t)n_rows * D; i++)
        s->q_rows[i] *= plan->query_scale;
    for (int32_t i = 0; i < n_rows; i++)
      s->value_rows[i] = s->q_rows + (int64_t)i * D;
    if (keys)
      kernels->query_table(n_rows, D, s->q_rows, D, whole ? s->q_step : NULL, s->q_table);
    else
      kernels->query_tile(n_rows, s->value_rows, D, W, whole ? 1.0f : plan->query_scale, s->q_tile);
  }
  if (plan->policy == SFA_POLICY_PAPER)
    sfa_attn_paper_queries(block);
  block->indexed = NULL;
  block->finite = !plan->densify || all_finite(s->q_tile, (int64_t)D * W);
}

/* ---- Visibility ------------------------------------------------------------------------------------------------------------- */

/* First and last key that a query at `position` sees, sink tokens apart. Both rise with the position. */
static int64_t leftmost_key(const sfa_attn_block *block, int64_t position) {
  const sfa_attention_options *o = &block->call->plan->options;
  return o->has_window && o->window_size[0] >= 0 ? sfa_max64(position - o->window_size[0], 0) : 0;
}
static int64_t rightmost_key(const sfa_attn_block *block, int64_t position) {
  const sfa_attention_options *o = &block->call->plan->options;
  int64_t last = block->view->n_keys - 1;
  if (o->causal)
    last = sfa_min64(last, position);
  if (o->has_window && o->window_size[1] >= 0)
    last = sfa_min64(last, position + o->window_size[1]);
  return last;
}

void sfa_attn_block_range(const sfa_attn_block *block, int32_t i, int64_t *first_key, int64_t *last_key) {
  *first_key = leftmost_key(block, block->scratch.position[i]);
  *last_key = rightmost_key(block, block->scratch.position[i]);
}

bool sfa_attn_block_sees(const sfa_attn_block *block, int64_t first_key, int64_t end_key) {
  const int32_t *position = block->scratch.position;
  return rightmost_key(block, position[block->n_rows - 1]) >= first_key &&
         (leftmost_key(block, position[0]) < end_key || first_key < block->call->plan->options.n_sink_tokens);
}

/* Whether every row sees all of these keys. */
static bool block_sees_all(const sfa_attn_block *block, int64_t first_key, int64_t end_key) {
  const int32_t *position = block->scratch.position;
  return rightmost_key(block, position[0]) >= end_key - 1 &&
         (leftmost_key(block, position[block->n_rows - 1]) <= first_key || end_key <= block->call->plan->options.n_sink_tokens);
}

static int32_t within_tile(int64_t key) { return (int32_t)sfa_min64(sfa_max64(key, -1), SFA_KEY_TILE); }

bool sfa_attn_block_bounds(const sfa_attn_block *block, int64_t first_key, int32_t n_keys, int32_t *n_always) {
  const sfa_attention_plan *plan = block->call->plan;
  const sfa_attn_scratch *s = &block->scratch;
  if (block_sees_all(block, first_key, first_key + n_keys))
    return false;
  for (int32_t i = 0; i < plan->width; i++) {
    s->lo[i] = within_tile(leftmost_key(block, s->position[i]) - first_key);
    s->hi[i] = within_tile(rightmost_key(block, s->position[i]) - first_key);
  }
  *n_always = (int32_t)sfa_min64(sfa_max64(plan->options.n_sink_tokens - first_key, 0), SFA_KEY_TILE);
  return true;
}

/* Over the tiles between the sink tokens and the window of a block's first row, which is the leftmost. */
static int64_t skip_to_window(const sfa_attn_block *block, int64_t tile) {
  int64_t sink_tiles = (block->call->plan->options.n_sink_tokens + SFA_KEY_TILE - 1) / SFA_KEY_TILE;
  return tile < sink_tiles ? tile : sfa_max64(tile, leftmost_key(block, block->scratch.position[0]) / SFA_KEY_TILE);
}

int64_t sfa_attn_block_next_tile(const sfa_attn_block *block, int64_t tile) {
  tile = skip_to_window(block, tile);
  int64_t first_key = tile * SFA_KEY_TILE;
  bool sees = first_key < block->view->n_keys && sfa_attn_block_sees(block, first_key, first_key + SFA_KEY_TILE);
  return sees ? tile : INT64_MAX;
}

/* ---- One tile --------------------------------------------------------------------------------------------------------------- */

/* The f16 scales of a tile's rows, one after the other; NULL where there are none. */
static const uint16_t *load_scales(const sfa_attn_block *block, const sfa_kv_side *side, int64_t tile, int32_t n_keys) {
  if (!sfa_has_scales(side->format.dtype))
    return NULL;
  const uint16_t *scales = (const uint16_t *)sfa_kv_at(block->view, &side->scales, block->kv_head, tile);
  if (side->scales.row_stride == 1)
    return scales;
  for (int32_t j = 0; j < n_keys; j++)
    block->scratch.scales[j] = scales[j * side->scales.row_stride];
  return block->scratch.scales;
}

/* A tile's rows of keys or values as f32, before their scales: in place where they are that, one after the other; else converted into
 * buffer. */
static const float *load_rows(const sfa_attn_block *block, const sfa_kv_side *side, int64_t tile, int32_t n_keys, float *buffer) {
  const sfa_kernels *kernels = block->call->plan->kernels;
  int32_t width = sfa_row_width(&side->format);
  const unsigned char *values = sfa_kv_at(block->view, &side->values, block->kv_head, tile);
  if (side->format.dtype == SFA_F32 && side->values.row_stride == width)
    return (const float *)values;
  if (side->values.row_stride == width) /* one long row is faster than 64 short ones */
    kernels->load_rows(1, n_keys * width, side->format.dtype, values, 0, NULL, buffer, 0);
  else
    kernels->load_rows(n_keys, width, side->format.dtype, values, side->values.row_stride, NULL, buffer, width);
  return buffer;
}

/* The same as f32, times a factor: that of the query makes them the last factor of int8 keys' scores. */
static const float *scale_rows(const sfa_attn_block *block, const sfa_kv_side *side, int64_t tile, int32_t n_keys, float factor,
                               float *out) {
  const uint16_t *scales = load_scales(block, side, tile, n_keys);
  if (!scales)
    return NULL;
  block->call->plan->kernels->load_rows(1, n_keys, SFA_F16, scales, 0, NULL, out, 0);
  for (int32_t j = 0; j < n_keys; j++)
    out[j] *= factor;
  return out;
}

/* Whether n ids, of one byte or of two, are features. */
static bool are_features_1(int32_t D, int32_t n, const uint8_t *ids) {
  uint8_t most = 0;
  if (D > UINT8_MAX)
    return true; /* every byte is one */
  for (int32_t i = 0; i < n; i++)
    most = ids[i] > most ? ids[i] : most;
  return most < D;
}
static bool are_features_2(int32_t D, int32_t n, const uint16_t *ids) {
  uint16_t most = 0;
  for (int32_t i = 0; i < n; i++)
    most = ids[i] > most ? ids[i] : most;
  return most < D;
}

/* out [n] = ids, but the last feature for those that are none. */
static void copy_features(int32_t D, int32_t n, const void *ids, void *out) {
  for (int32_t i = 0; i < n; i++)
    if (sfa_id_bytes(D) == 1)
      ((uint8_t *)out)[i] = (uint8_t)sfa_min64(((const uint8_t *)ids)[i], D - 1);
    else
      ((uint16_t *)out)[i] = (uint16_t)sfa_min64(((const uint16_t *)ids)[i], D - 1);
}

/* The ids of a tile's keys, one key after the other, all of them features: pages may be the caller's memory, or a file that came a long
 * way, and what follows takes ids for addresses. Plain arrays were made, or checked, by this call. */
static const void *load_ids(const sfa_attn_block *block, const sfa_kv_side *side, int64_t tile, int32_t n_keys) {
  const unsigned char *ids = sfa_kv_at(block->view, &side->ids, block->kv_head, tile);
  size_t id_bytes = sfa_id_bytes(side->format.dim), row_bytes = sfa_row_ids_bytes(&side->format);
  int32_t D = side->format.dim, n = n_keys * side->format.k;
  unsigned char *copy = block->scratch.k_ids;
  if (side->ids.row_stride != side->format.k) {
    for (int32_t j = 0; j < n_keys; j++)
      memcpy(copy + (size_t)j * row_bytes, ids + (size_t)(j * side->ids.row_stride) * id_bytes, row_bytes);
    ids = copy;
  }
  if (!block->view->pages || (id_bytes == 1 ? are_features_1(D, n, ids) : are_features_2(D, n, (const uint16_t *)(const void *)ids)))
    return ids;
  copy_features(D, n, ids, copy);
  return copy;
}

/* Codes of a tile as dense rows, where the plan found those cheaper to score. Not where int8 sums would be cut in other places. */
static const float *densify(const sfa_attn_block *block, const sfa_kv_side *keys, int64_t number, const sfa_attn_key_tile *tile) {
  const sfa_attention_plan *plan = block->call->plan;
  int32_t D = plan->options.head_dim, K = keys->format.k;
  if (!plan->densify || (keys->format.dtype == SFA_I8 && K > SFA_EXACT_TERMS))
    return NULL;
  if (keys->dense.base)
    return (const float *)(const void *)sfa_kv_at(block->view, &keys->dense, block->kv_head, number);
  sfa_code_write_out(tile->n_keys, D, K, tile->ids, tile->keys, block->scratch.k_dense);
  return block->scratch.k_dense;
}

sfa_attn_key_tile sfa_attn_tile_keys(const sfa_attn_block *block, int64_t number) {
  const sfa_kv_side *k = &block->view->k;
  int64_t first_key = number * SFA_KEY_TILE;
  int32_t n_keys = (int32_t)sfa_min64(SFA_KEY_TILE, block->view->n_keys - first_key);
  sfa_attn_key_tile tile = {.first_key = first_key,
                            .n_keys = n_keys,
                            .ids = k->format.k ? load_ids(block, k, number, n_keys) : NULL,
                            .keys = load_rows(block, k, number, n_keys, block->scratch.k_rows),
                            .scale = scale_rows(block, k, number, n_keys, block->call->plan->query_scale, block->scratch.k_scale)};
  tile.dense = tile.ids ? densify(block, k, number, &tile) : NULL;
  if (block->call->plan->policy == SFA_POLICY_PAPER)
    sfa_attn_paper_lists(block, n_keys, tile.ids, tile.keys);
  return tile;
}

void sfa_attn_tile_values(const sfa_attn_block *block, int64_t number, sfa_attn_key_tile *tile) {
  tile->values = load_rows(block, &block->view->v, number, tile->n_keys, block->scratch.v_rows);
  tile->value_scale = scale_rows(block, &block->view->v, number, tile->n_keys, 1, block->scratch.v_scale);
}

sfa_attn_key_tile sfa_attn_tile_load(const sfa_attn_block *block, int64_t number) {
  sfa_attn_key_tile tile = sfa_attn_tile_keys(block, number);
  sfa_attn_tile_values(block, number, &tile);
  return tile;
}

static void attend_tile(sfa_attn_block *block, const sfa_attn_key_tile *tile, bool careful) {
  const sfa_attention_plan *plan = block->call->plan;
  const sfa_attention_options *o = &plan->options;
  const sfa_kernels *kernels = plan->kernels;
  const sfa_attn_scratch *s = &block->scratch;
  const sfa_attn_state *state = block->state;
  int32_t n_keys = tile->n_keys, n_rows = block->n_rows, W = plan->width, D = o->head_dim, E = o->head_dim_v;

  if (plan->policy == SFA_POLICY_PAPER)
    sfa_attn_paper_scores(block, n_keys, tile->scale);
  else if (tile->dense && block->finite)
    kernels->score_dense(n_keys, D, tile->dense, D, tile->scale, s->q_tile, W, s->scores);
  else if (tile->ids)
    kernels->score_codes(n_keys, block->view->k.format.k, tile->ids, (int32_t)sfa_id_bytes(D), tile->keys, tile->scale, s->q_tile, W,
                         s->scores);
  else
    kernels->score_dense(n_keys, D, tile->keys, D, tile->scale, s->q_tile, W, s->scores);
  const float *slope = block->call->args->alibi_slopes ? s->slope : NULL;
  if (o->softcap > 0 || slope) {
    for (int32_t i = 0; i < W; i++)
      s->tile_position[i] = s->position[i] - (int32_t)tile->first_key;
    kernels->score_adjust(n_keys, W, o->softcap, slope, s->tile_position, s->scores);
  }
  int32_t n_always;
  if (sfa_attn_block_bounds(block, tile->first_key, n_keys, &n_always))
    kernels->score_mask(n_keys, W, s->lo, s->hi, n_always, s->scores);

  if (kernels->softmax_tile(n_keys, W, s->scores, state->m, state->l, s->alpha))
    for (int32_t i = 0; i < n_rows; i++) /* the maximum of few rows rises: 1 in t at tile t of keys in no order */
      if (s->alpha[i] != 1)
        kernels->rescale(1, E, s->alpha + i, state->o + (int64_t)i * E);
  if (tile->value_scale)
    kernels->scale_weights(n_keys, W, tile->value_scale, s->scores);
  (careful ? kernels->value_product_masked : kernels->value_product)(n_rows, n_keys, W, s->scores, E, tile->values, E, state->o);
}

/* ---- A span, and the end ---------------------------------------------------------------------------------------------------- */

void sfa_attn_state_clear(const sfa_attention_plan *plan, const sfa_attn_state *state) {
  for (int32_t i = 0; i < plan->width; i++)
    state->m[i] = -INFINITY;
  memset(state->l, 0, (size_t)plan->width * sizeof(float));
  memset(state->o, 0, (size_t)plan->width * (size_t)plan->options.head_dim_v * sizeof(float));
}

/* The blocks over the tiles of a span. */
static void attend_span(sfa_attn_block *const *blocks, int32_t n_blocks, int64_t span, bool careful) {
  const sfa_attention_plan *plan = blocks[0]->call->plan;
  int64_t end_key = sfa_min64((span + 1) * SFA_KEY_SPAN, blocks[0]->view->n_keys);
  for (int32_t i = 0; i < n_blocks; i++)
    sfa_attn_state_clear(plan, blocks[i]->state);
  for (int64_t number = span * (SFA_KEY_SPAN / SFA_KEY_TILE); number * SFA_KEY_TILE < end_key; number++) {
    number = skip_to_window(blocks[0], number);
    int64_t first_key = number * SFA_KEY_TILE;
    sfa_attn_key_tile tile = {.n_keys = 0};
    for (int32_t i = 0; i < n_blocks && first_key < end_key; i++)
      if (sfa_attn_block_sees(blocks[i], first_key, first_key + SFA_KEY_TILE)) {
        if (!tile.n_keys)
          tile = sfa_attn_tile_load(blocks[i], number);
        attend_tile(blocks[i], &tile, careful);
      }
  }
}

void sfa_attn_blocks_span(sfa_attn_block *const *blocks, int32_t n_blocks, int64_t span) {
  int32_t E = blocks[0]->call->plan->options.head_dim_v;
  /* A masked key weighs 0, but 0 times an inf or NaN in its value is NaN. That is rare: so the fast product first, and only where its
   * result is not finite once more with the product that leaves masked keys out. */
  attend_span(blocks, n_blocks, span, false);
  for (int32_t i = 0; i < n_blocks; i++)
    if (!all_finite(blocks[i]->state->o, (int64_t)blocks[i]->n_rows * E))
      attend_span(&blocks[i], 1, span, true);
}

void sfa_attn_block_join(const sfa_attn_block *block, const sfa_attn_state *into, const sfa_attn_state *part) {
  const sfa_attention_plan *plan = block->call->plan;
  plan->kernels->merge(block->n_rows, plan->options.head_dim_v, into->m, into->l, into->o, part->m, part->l, part->o);
}

void sfa_attn_block_finish(sfa_attn_block *block, const sfa_attn_state *total, const double *rho) {
  const sfa_attention_plan *plan = block->call->plan;
  const sfa_attention_args *args = block->call->args;
  int32_t E = plan->options.head_dim_v;
  if (args->sink_logit) { /* a part with weight 1 at the sink's score, and no value */
    const sfa_attn_state *sink = &block->scratch.part;
    sfa_attn_state_clear(plan, sink);
    for (int32_t i = 0; i < block->n_rows; i++) {
      sink->m[i] = args->sink_logit[block->scratch.head[i]] * (float)M_LOG2E;
      sink->l[i] = sink->m[i] != -INFINITY;
    }
    sfa_attn_block_join(block, total, sink);
  }
  for (int32_t i = 0; i < block->n_rows; i++) {
    int64_t row = block->scratch.row[i];
    float l = total->l[i], *out = args->out + row * E;
    const float *o = total->o + (int64_t)i * E;
    double dropped = rho ? rho[i] : 0;
    float divisor = l == 0 ? 1 : (float)((double)l * (1 - dropped)); /* no key seen: o is 0 */
    for (int32_t e = 0; e < E; e++)
      out[e] = o[e] / divisor + 0.0f; /* -0 becomes 0: which one underflow leaves depends on how many masked keys came after */
    if (args->dropped)
      args->dropped[row] = (float)dropped;
    if (args->lse)
      args->lse[row] = (float)((double)total->m[i] * M_LN2 + log((double)l));
  }
}

int64_t sfa_attn_clock(const sfa_attn_block *block) {
  return block->call->args->stage_ns ? sfa_now_ns() - block->scratch.stage_ns[SFA_STAGE_TOPK] : 0;
}

void sfa_attn_clock_stop(sfa_attn_block *block, int64_t start) {
  if (block->call->args->stage_ns)
    block->scratch.stage_ns[SFA_STAGE_ATTEND] += sfa_attn_clock(block) - start;
}

/* ---- Scratch and times ------------------------------------------------------------------------------------------------------ */

void sfa_attn_scratch_of(const sfa_attention_plan *plan, const sfa_attention_args *args, int32_t thread, int32_t strip,
                         sfa_attn_scratch *scratch) {
  sfa_attn_scratch_place(plan, (unsigned char *)args->workspace + plan->scratch + (size_t)thread * plan->scratch_bytes, strip, scratch);
}

void sfa_attn_stages_clear(const sfa_attention_plan *plan, const sfa_attention_args *args) {
  for (int32_t thread = 0; args->stage_ns && thread < plan->ctx->n_threads; thread++) {
    sfa_attn_scratch scratch;
    sfa_attn_scratch_of(plan, args, thread, 0, &scratch);
    memset(scratch.stage_ns, 0, SFA_STAGE_COUNT * sizeof *scratch.stage_ns);
  }
}

void sfa_attn_stages_add(const sfa_attention_plan *plan, const sfa_attention_args *args) {
  for (int32_t thread = 0; args->stage_ns && thread < plan->ctx->n_threads; thread++) {
    sfa_attn_scratch scratch;
    sfa_attn_scratch_of(plan, args, thread, 0, &scratch);
    for (int32_t stage = 0; stage < SFA_STAGE_COUNT; stage++)
      args->stage_ns[stage] += scratch.stage_ns[stage];
  }
}
