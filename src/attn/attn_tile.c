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

#include "base/half.h"

#include <math.h>
#include <string.h>

/* ---- The block ------------------------------------------------------------------------------------------------------------- */

static int64_t token_of(const sfa_attn_block *block, int64_t i) { return (block->first_row + i) / block->call->plan->group; }
static int32_t head_of(const sfa_attn_block *block, int64_t i) {
  int32_t group = block->call->plan->group;
  return block->kv_head * group + (int32_t)((block->first_row + i) % group);
}

bool sfa_attn_block_find(const sfa_attn_call *call, int32_t b, int32_t g, int64_t block, int32_t thread, sfa_attn_block *out) {
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
  sfa_attn_scratch_of(plan, call->args, thread, &out->scratch);
  const float *slopes = call->args->alibi_slopes;
  for (int32_t i = 0; i < plan->width; i++) {
    bool real = i < out->n_rows; /* the lanes beyond repeat the last row: any valid mask will do */
    int32_t row = real ? i : out->n_rows - 1;
    out->scratch.position[i] = (int32_t)(token_of(out, row) + out->position_offset);
    out->scratch.slope[i] = slopes ? slopes[head_of(out, row)] * (float)M_LOG2E : 0;
  }
  return true;
}

/* Dense query rows to scratch.q_rows [n_rows][D]: a token's heads at a time. */
static void load_query_rows(const sfa_attn_block *block) {
  const sfa_attention_plan *plan = block->call->plan;
  const sfa_rows *q = &block->call->args->q;
  int32_t D = plan->options.head_dim, head_end = (block->kv_head + 1) * plan->group;
  for (int32_t i = 0; i < block->n_rows;) {
    int32_t head = head_of(block, i), n = (int32_t)sfa_min64(head_end - head, block->n_rows - i);
    int64_t offset = block->q_offset + token_of(block, i) * q->token_stride + head * q->head_stride;
    plan->kernels->load_rows(n, D, q->dtype, (const unsigned char *)q->data + (size_t)offset * sfa_dtype_bytes(q->dtype), q->head_stride,
                             NULL, block->scratch.q_rows + (int64_t)i * D, D);
    i += n;
  }
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
    load_query_rows(block);
    plan->kernels->topk(block->n_rows, s->q_rows, D, D, K, s->q_ids, s->q_values);
    if (block->call->args->stage_ns)
      s->stage_ns[SFA_STAGE_TOPK] += sfa_now_ns() - start;
  }
  for (int32_t i = 0; i < block->n_rows; i++) {
    s->id_rows[i] = s->q_ids + (size_t)i * row_bytes;
    s->value_rows[i] = s->q_values + (int64_t)i * K;
    if (codes) {
      int64_t row = (block->first_token + token_of(block, i)) * plan->options.n_heads + head_of(block, i);
      const unsigned char *values = (const unsigned char *)codes->values + (size_t)(row * K) * sfa_dtype_bytes(codes->dtype);
      s->id_rows[i] = (const unsigned char *)codes->ids + (size_t)row * row_bytes;
      plan->kernels->load_rows(1, K, codes->dtype, values, K, codes->scales ? codes->scales + row : NULL, s->q_values + (int64_t)i * K, K);
    }
  }
}

void sfa_attn_block_load(sfa_attn_block *block) {
  const sfa_attention_plan *plan = block->call->plan;
  const sfa_attn_scratch *s = &block->scratch;
  int32_t D = plan->options.head_dim, W = plan->width, K = plan->options.k_q;
  bool sparse = block->call->args->q_codes || (K && K < D);
  if (sparse) {
    load_query_codes(block);
    plan->kernels->query_tile_codes(block->n_rows, s->id_rows, (int32_t)sfa_id_bytes(D), s->value_rows, K, D, W, plan->query_scale,
                                    s->q_tile);
  } else {
    load_query_rows(block);
    for (int32_t i = 0; i < block->n_rows; i++)
      s->value_rows[i] = s->q_rows + (int64_t)i * D;
    plan->kernels->query_tile(block->n_rows, s->value_rows, D, W, plan->query_scale, s->q_tile);
  }
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

static void mask_scores(sfa_attn_block *block, int64_t first_key, int32_t n_keys) {
  const sfa_attention_plan *plan = block->call->plan;
  sfa_attn_scratch *s = &block->scratch;
  for (int32_t i = 0; i < plan->width; i++) {
    s->lo[i] = within_tile(leftmost_key(block, s->position[i]) - first_key);
    s->hi[i] = within_tile(rightmost_key(block, s->position[i]) - first_key);
  }
  int32_t n_always = (int32_t)sfa_min64(sfa_max64(plan->options.n_sink_tokens - first_key, 0), SFA_KEY_TILE);
  plan->kernels->score_mask(n_keys, plan->width, s->lo, s->hi, n_always, s->scores);
}

/* ---- One tile --------------------------------------------------------------------------------------------------------------- */

/* A tile's rows of keys or values as f32: in place where they are that, one after the other; else converted into buffer. */
static const float *load_tile(const sfa_attn_block *block, const sfa_kv_side *side, int64_t tile, int32_t n_keys, float *buffer) {
  const sfa_kv_view *view = block->view;
  int32_t width = sfa_row_width(&side->format);
  const unsigned char *values = sfa_kv_at(view, &side->values, block->kv_head, tile);
  if (side->format.dtype == SFA_F32 && side->values.row_stride == width)
    return (const float *)values;
  const uint16_t *scales = NULL;
  if (side->format.dtype == SFA_I8) {
    scales = (const uint16_t *)sfa_kv_at(view, &side->scales, block->kv_head, tile);
    if (side->scales.row_stride != 1) {
      for (int32_t j = 0; j < n_keys; j++)
        block->scratch.scales[j] = scales[j * side->scales.row_stride];
      scales = block->scratch.scales;
    }
  }
  const sfa_kernels *kernels = block->call->plan->kernels;
  if (!scales && side->values.row_stride == width) /* one long row is faster than 64 short ones */
    kernels->load_rows(1, n_keys * width, side->format.dtype, values, 0, NULL, buffer, 0);
  else
    kernels->load_rows(n_keys, width, side->format.dtype, values, side->values.row_stride, scales, buffer, width);
  return buffer;
}

/* The ids of a tile's keys, one key after the other. */
static const void *load_tile_ids(const sfa_attn_block *block, const sfa_kv_side *side, int64_t tile, int32_t n_keys) {
  const unsigned char *ids = sfa_kv_at(block->view, &side->ids, block->kv_head, tile);
  size_t id_bytes = sfa_id_bytes(side->format.dim), row_bytes = sfa_row_ids_bytes(&side->format);
  if (side->ids.row_stride == side->format.k)
    return ids;
  for (int32_t j = 0; j < n_keys; j++)
    memcpy(block->scratch.k_ids + (size_t)j * row_bytes, ids + (size_t)(j * side->ids.row_stride) * id_bytes, row_bytes);
  return block->scratch.k_ids;
}

static void attend_tile(sfa_attn_block *block, int64_t tile, bool careful, const sfa_attn_state *state) {
  const sfa_attention_plan *plan = block->call->plan;
  const sfa_attention_options *o = &plan->options;
  const sfa_kernels *kernels = plan->kernels;
  const sfa_kv_side *k = &block->view->k, *v = &block->view->v;
  sfa_attn_scratch *s = &block->scratch;
  int64_t first_key = tile * SFA_KEY_TILE;
  int32_t n_keys = (int32_t)sfa_min64(SFA_KEY_TILE, block->view->n_keys - first_key), W = plan->width;

  const float *keys = load_tile(block, k, tile, n_keys, s->k_rows);
  if (k->format.k) {
    const void *ids = load_tile_ids(block, k, tile, n_keys);
    kernels->score_codes(n_keys, k->format.k, ids, (int32_t)sfa_id_bytes(o->head_dim), keys, s->q_tile, W, s->scores);
  } else {
    kernels->score_dense(n_keys, o->head_dim, keys, o->head_dim, s->q_tile, W, s->scores);
  }
  const float *slope = block->call->args->alibi_slopes ? s->slope : NULL;
  if (o->softcap > 0 || slope) {
    for (int32_t i = 0; i < W; i++)
      s->tile_position[i] = s->position[i] - (int32_t)first_key;
    kernels->score_adjust(n_keys, W, o->softcap, slope, s->tile_position, s->scores);
  }
  if (!block_sees_all(block, first_key, first_key + n_keys))
    mask_scores(block, first_key, n_keys);

  if (kernels->softmax_tile(n_keys, W, s->scores, state->m, state->l, s->alpha))
    kernels->rescale(block->n_rows, o->head_dim_v, s->alpha, state->o);
  const float *values = load_tile(block, v, tile, n_keys, s->v_rows);
  (careful ? kernels->value_product_masked : kernels->value_product)(block->n_rows, n_keys, W, s->scores, o->head_dim_v, values,
                                                                     o->head_dim_v, state->o);
}

/* ---- A span, and the end ---------------------------------------------------------------------------------------------------- */

void sfa_attn_state_clear(const sfa_attention_plan *plan, const sfa_attn_state *state) {
  for (int32_t i = 0; i < plan->width; i++)
    state->m[i] = -INFINITY;
  memset(state->l, 0, (size_t)plan->width * sizeof(float));
  memset(state->o, 0, (size_t)plan->width * (size_t)plan->options.head_dim_v * sizeof(float));
}

static bool all_finite(const float *x, int64_t n) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; i++)
    bad |= (sfa_bits_of(x[i]) & 0x7f800000u) == 0x7f800000u;
  return !bad;
}

void sfa_attn_block_span(sfa_attn_block *block, int64_t span, const sfa_attn_state *state) {
  const sfa_attention_plan *plan = block->call->plan;
  int64_t end_key = sfa_min64((span + 1) * SFA_KEY_SPAN, block->view->n_keys);
  int64_t window_tile = leftmost_key(block, block->scratch.position[0]) / SFA_KEY_TILE;
  int64_t sink_tiles = (plan->options.n_sink_tokens + SFA_KEY_TILE - 1) / SFA_KEY_TILE;
  /* A masked key weighs 0, but 0 times an inf or NaN in its value is NaN. That is rare: so the fast product first, and only where its
   * result is not finite once more with the product that leaves masked keys out. */
  for (int careful = 0; careful < 2; careful++) {
    sfa_attn_state_clear(plan, state);
    for (int64_t tile = span * (SFA_KEY_SPAN / SFA_KEY_TILE); tile * SFA_KEY_TILE < end_key; tile++) {
      if (tile >= sink_tiles)
        tile = sfa_max64(tile, window_tile);
      if (tile * SFA_KEY_TILE >= end_key || !sfa_attn_block_sees(block, tile * SFA_KEY_TILE, end_key))
        break;
      attend_tile(block, tile, careful, state);
    }
    if (all_finite(state->o, (int64_t)block->n_rows * plan->options.head_dim_v))
      break;
  }
}

void sfa_attn_block_join(const sfa_attn_block *block, const sfa_attn_state *into, const sfa_attn_state *part) {
  const sfa_attention_plan *plan = block->call->plan;
  plan->kernels->merge(block->n_rows, plan->options.head_dim_v, into->m, into->l, into->o, part->m, part->l, part->o);
}

void sfa_attn_block_finish(sfa_attn_block *block, const sfa_attn_state *total) {
  const sfa_attention_plan *plan = block->call->plan;
  const sfa_attention_args *args = block->call->args;
  int32_t E = plan->options.head_dim_v;
  if (args->sink_logit) { /* a part with weight 1 at the sink's score, and no value */
    const sfa_attn_state *sink = &block->scratch.part;
    sfa_attn_state_clear(plan, sink);
    for (int32_t i = 0; i < block->n_rows; i++) {
      sink->m[i] = args->sink_logit[head_of(block, i)] * (float)M_LOG2E;
      sink->l[i] = sink->m[i] != -INFINITY;
    }
    sfa_attn_block_join(block, total, sink);
  }
  for (int32_t i = 0; i < block->n_rows; i++) {
    int64_t row = (block->first_token + token_of(block, i)) * plan->options.n_heads + head_of(block, i);
    float l = total->l[i], *out = args->out + row * E;
    const float *o = total->o + (int64_t)i * E;
    float divisor = l == 0 ? 1 : l; /* no key seen: o is 0 */
    for (int32_t e = 0; e < E; e++)
      out[e] = o[e] / divisor + 0.0f; /* -0 becomes 0: which one underflow leaves depends on how many masked keys came after */
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

void sfa_attn_scratch_of(const sfa_attention_plan *plan, const sfa_attention_args *args, int32_t thread, sfa_attn_scratch *scratch) {
  sfa_attn_scratch_place(plan, (unsigned char *)args->workspace + plan->scratch + (size_t)thread * plan->scratch_bytes, scratch);
}

void sfa_attn_stages_clear(const sfa_attention_plan *plan, const sfa_attention_args *args) {
  for (int32_t thread = 0; args->stage_ns && thread < plan->ctx->n_threads; thread++) {
    sfa_attn_scratch scratch;
    sfa_attn_scratch_of(plan, args, thread, &scratch);
    memset(scratch.stage_ns, 0, SFA_STAGE_COUNT * sizeof *scratch.stage_ns);
  }
}

void sfa_attn_stages_add(const sfa_attention_plan *plan, const sfa_attention_args *args) {
  for (int32_t thread = 0; args->stage_ns && thread < plan->ctx->n_threads; thread++) {
    sfa_attn_scratch scratch;
    sfa_attn_scratch_of(plan, args, thread, &scratch);
    for (int32_t stage = 0; stage < SFA_STAGE_COUNT; stage++)
      args->stage_ns[stage] += scratch.stage_ns[stage];
  }
}
