/* Few query rows: lanes are keys, and every stored byte of a tile is read once for all rows. Per tile of 64 keys:
 *
 *     S [rows][64] = scores      score_keys, over codes or dense rows as they are stored
 *     S += softcap, ALiBi; S = -inf where masked
 *     P, m, l, alpha = softmax(S, m, l)
 *     O [rows][E] = alpha O + P V     value_keys, likewise
 *
 * The formulas and their order are those of attn_tile.c, and so are the bits. */
#include "attn/attn_keys.h"

#include "attn/attn_cost.h"
#include "attn/attn_postings.h"
#include "kernel/stored_rows.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- The work ---------------------------------------------------------------------------------------------------------------- */

bool sfa_attn_keys_fits(const sfa_attention_plan *plan, char why[SFA_ATTN_WHY_BYTES]) {
  int64_t n_rows = plan->options.max_seqlen_q * plan->group;
  if (n_rows <= SFA_KEYS_ROWS)
    return true;
  snprintf(why, SFA_ATTN_WHY_BYTES,
           "it takes max_seqlen_q * n_heads / n_kv_heads = %lld query rows of a kv head, at most %d: choose "
           "SFA_POLICY_TILES",
           (long long)n_rows, SFA_KEYS_ROWS);
  return false;
}

bool sfa_attn_keys_postings_fit(const sfa_attention_plan *plan, char why[SFA_ATTN_WHY_BYTES]) {
  if (plan->k_format.k > 0 && plan->k_format.k <= SFA_EXACT_TERMS)
    return sfa_attn_keys_fits(plan, why);
  snprintf(why, SFA_ATTN_WHY_BYTES,
           "an index holds keys with k_k from 1 to %d of fewer than head_dim features, and k_k is %d: choose SFA_POLICY_KEYS",
           SFA_EXACT_TERMS, plan->options.k_k);
  return false;
}

/* Lays a call over its part of the workspace; NULL counts only. Returns the bytes. */
static size_t place(const sfa_attention_plan *plan, unsigned char *memory, sfa_attn_keys_call *keys, int32_t **numbers) {
  const sfa_attention_options *o = &plan->options;
  size_t n_sequences = (size_t)o->n_sequences, n_blocks = n_sequences * (size_t)o->n_kv_heads, n_spans = (size_t)plan->n_spans;
  size_t pending = sfa_align64((n_sequences + 1) * sizeof *keys->spans);
  size_t spans = pending + sfa_align64(n_blocks * sizeof *keys->pending);
  size_t parts = spans + sfa_align64(n_sequences * n_spans * sizeof **numbers);
  size_t drop = parts + n_blocks * n_spans * plan->part_bytes;
  if (memory) {
    keys->spans = (sfa_attn_spans *)(void *)memory;
    keys->pending = (_Atomic int32_t *)(void *)(memory + pending);
    *numbers = (int32_t *)(void *)(memory + spans);
    keys->parts = memory + parts;
    keys->drop = memory + drop;
  }
  return drop + (o->eps > 0 ? sfa_attn_drop_workspace(plan) : 0);
}

size_t sfa_attn_keys_workspace(const sfa_attention_plan *plan) {
  const sfa_attention_options *o = &plan->options;
  sfa_attn_keys_call keys;
  int32_t *numbers = NULL;
  size_t n_spans, bytes; /* what cannot fit an address must not look as if it did */
  if (!sfa_mul_size((size_t)o->n_sequences * (size_t)o->n_kv_heads, (size_t)plan->n_spans + 1, &n_spans) ||
      !sfa_mul_size(n_spans, plan->part_bytes + sfa_attn_drop_span_bytes(plan) + 4096, &bytes))
    return SIZE_MAX;
  return place(plan, NULL, &keys, &numbers);
}

/* Lists the spans that each sequence sees, so that short ones and windows cost no items. */
static void share_out(sfa_attn_keys_call *keys, int32_t *numbers) {
  const sfa_attention_plan *plan = keys->call.plan;
  int32_t G = plan->options.n_kv_heads;
  int64_t n_items = 0;
  for (int32_t b = 0; b < plan->options.n_sequences; b++, numbers += plan->n_spans) {
    sfa_attn_spans *spans = &keys->spans[b];
    sfa_attn_block block;
    *spans = (sfa_attn_spans){.first_item = n_items, .numbers = numbers};
    if (!sfa_attn_block_find(&keys->call, b, 0, 0, 0, 0, &block))
      continue;
    for (int64_t span = 0; span * SFA_KEY_SPAN < block.view->n_keys; span++)
      if (sfa_attn_block_sees(&block, span * SFA_KEY_SPAN, (span + 1) * SFA_KEY_SPAN))
        numbers[spans->n++] = (int32_t)span;
    int64_t n = sfa_max64(spans->n, 1); /* somebody has to write the rows */
    for (int32_t g = 0; g < G; g++)
      atomic_init(&keys->pending[(int64_t)b * G + g], (int32_t)n);
    n_items += G * n;
  }
  keys->spans[plan->options.n_sequences] = (sfa_attn_spans){.first_item = n_items};
}

int64_t sfa_attn_keys_n_items(const sfa_attn_keys_call *keys) { return keys->spans[keys->call.plan->options.n_sequences].first_item; }

void sfa_attn_keys_find(const sfa_attn_keys_call *keys, int64_t item, int32_t thread, sfa_attn_keys_item *out) {
  int32_t G = keys->call.plan->options.n_kv_heads, b = 0, end = keys->call.plan->options.n_sequences;
  while (end - b > 1) { /* the last sequence that begins at or before the item */
    int32_t middle = b + (end - b) / 2;
    if (keys->spans[middle].first_item <= item)
      b = middle;
    else
      end = middle;
  }
  const sfa_attn_spans *spans = &keys->spans[b];
  int64_t n = sfa_max64(spans->n, 1), rest = item - spans->first_item;
  int32_t g = (int32_t)(rest / n);
  sfa_attn_block_find(&keys->call, b, g, 0, thread, 0, &out->block);
  out->spans = spans;
  out->number = (int64_t)b * G + g;
  out->span = spans->n ? spans->numbers[rest % n] : -1;
}

sfa_attn_state sfa_attn_keys_part(const sfa_attn_keys_call *keys, int64_t number, int64_t span) {
  const sfa_attention_plan *plan = keys->call.plan;
  sfa_attn_state part;
  sfa_attn_state_place(plan, keys->parts + (size_t)(number * plan->n_spans + span) * plan->part_bytes, &part);
  return part;
}

bool sfa_attn_keys_arrive(const sfa_attn_keys_call *keys, const sfa_attn_keys_item *item) {
  _Atomic int32_t *pending = &keys->pending[item->number];
  if (atomic_fetch_sub_explicit(pending, 1, memory_order_acq_rel) > 1)
    return false;
  atomic_store_explicit(pending, (int32_t)sfa_max64(item->spans->n, 1), memory_order_relaxed);
  return true;
}

/* ---- An index ------------------------------------------------------------------------------------------------------------------ */

/* Whether the index is faster than the code scan of what is seen of a span. */
static bool index_pays(const sfa_attn_block *block, const sfa_postings *postings, int64_t span) {
  const sfa_attn_scratch *s = &block->scratch;
  int64_t n_tiles = 0, end = (span + 1) * (SFA_KEY_SPAN / SFA_KEY_TILE);
  for (int64_t tile = sfa_attn_block_next_tile(block, span * (SFA_KEY_SPAN / SFA_KEY_TILE)); tile < end;
       tile = sfa_attn_block_next_tile(block, tile + 1))
    n_tiles++;
  sfa_attn_postings_work work = {0};
  for (int32_t i = 0; i < block->n_rows; i++)
    sfa_attn_postings_count(postings, span, block->kv_head, s->q_rows + (int64_t)i * postings->format.dim, &work);
  const sfa_attention_plan *plan = block->call->plan;
  return sfa_attn_cost_index(plan, block->view, work.steps, work.bytes) <
         sfa_attn_cost_scan(plan, block->view, n_tiles * SFA_KEY_TILE, block->n_rows);
}

void sfa_attn_keys_index(sfa_attn_block *block, int64_t span) {
  const sfa_attn_call *call = block->call;
  const sfa_attention_plan *plan = call->plan;
  const sfa_attn_scratch *s = &block->scratch;
  const sfa_postings *postings = call->args->postings ? call->args->postings[block->view - call->views] : NULL;
  if (!postings || !sfa_attn_takes_postings(plan) || span >= sfa_attn_postings_valid(postings, block->view) ||
      (plan->policy != SFA_POLICY_POSTINGS && !index_pays(block, postings, span)))
    return;
  for (int64_t i = 0; i < block->n_rows; i++)
    sfa_attn_postings_scores(postings, span, block->kv_head, s->q_rows + i * postings->format.dim, s->q_step[i], plan->query_scale,
                             s->index_sums, s->index_scores + i * SFA_KEY_SPAN);
  block->indexed = s->index_scores;
}

/* ---- What to ask for ------------------------------------------------------------------------------------------------------------ */

/* Memory is asked for some kilobytes of work before it is used, as much at a time as is used: in bursts, or too late, processor and memory
 * wait for each other. */

/* Bytes of a tile's codes with all that lies between them and its values, which follow them in a cache; 0: they are elsewhere, or long. */
static int64_t code_bytes(const sfa_attn_block *block) {
  const sfa_kv_view *view = block->view;
  if (!view->k.format.k)
    return 0;
  int64_t bytes = sfa_kv_at(view, &view->v.values, block->kv_head, 0) - sfa_kv_at(view, &view->k.ids, block->kv_head, 0);
  return bytes > 0 && bytes <= SFA_AHEAD_BYTES ? bytes : 0;
}

sfa_attn_wanted sfa_attn_keys_wanted(const sfa_attn_block *block, int64_t tile) {
  const sfa_kv_view *view = block->view;
  int64_t n_keys = view->n_keys - tile * SFA_KEY_TILE, bytes = code_bytes(block);
  if (n_keys <= 0 || block->indexed)
    return (sfa_attn_wanted){0};
  if (bytes)
    return (sfa_attn_wanted){sfa_kv_at(view, &view->k.ids, block->kv_head, tile), bytes};
  sfa_stored_rows keys = sfa_attn_keys_stored(view, &view->k, block->kv_head, tile, (int32_t)sfa_min64(SFA_KEY_TILE, n_keys));
  if (!keys.ids)
    return (sfa_attn_wanted){keys.values, (int64_t)sfa_stored_bytes(keys.dtype, keys.n * keys.values_stride)};
  sfa_stored_rows_prefetch(&keys, (int32_t)sfa_id_bytes(view->k.format.dim));
  return (sfa_attn_wanted){0};
}

/* Fewer than SFA_AHEAD_BYTES where a tile has fewer. */
static int64_t bytes_ahead(const sfa_kv_view *view) {
  return sfa_min64(SFA_AHEAD_BYTES, (int64_t)sfa_stored_bytes(view->v.format.dtype, SFA_KEY_TILE * view->v.values.row_stride));
}

sfa_attn_wanted sfa_attn_values_wanted(const sfa_attn_block *block, int64_t tile) {
  const sfa_kv_view *view = block->view;
  if (tile * SFA_KEY_TILE >= view->n_keys)
    return (sfa_attn_wanted){0};
  return (sfa_attn_wanted){sfa_kv_at(view, &view->v.values, block->kv_head, tile), bytes_ahead(view)};
}

/* ---- One tile ----------------------------------------------------------------------------------------------------------------- */

static int32_t keys_of_tile(const sfa_attn_block *block, int64_t tile) {
  return (int32_t)sfa_min64(SFA_KEY_TILE, block->view->n_keys - tile * SFA_KEY_TILE);
}

void sfa_attn_keys_weigh(const sfa_attn_block *block, int64_t tile, sfa_attn_wanted wanted, const sfa_attn_state *state, float *P,
                         float *alpha, bool *rescaled) {
  const sfa_attention_plan *plan = block->call->plan;
  const sfa_kernels *kernels = plan->kernels;
  const sfa_attn_scratch *s = &block->scratch;
  int64_t first_key = tile * SFA_KEY_TILE;
  int32_t n_keys = keys_of_tile(block, tile), n_rows = block->n_rows;
  if (block->indexed) {
    const float *scores = block->indexed + tile % (SFA_KEY_SPAN / SFA_KEY_TILE) * SFA_KEY_TILE;
    for (int32_t i = 0; i < n_rows; i++)
      memcpy(P + i * SFA_KEY_TILE, scores + (int64_t)i * SFA_KEY_SPAN, SFA_KEY_TILE * sizeof *P);
  } else {
    sfa_stored_rows keys = sfa_attn_keys_stored(block->view, &block->view->k, block->kv_head, tile, n_keys);
    keys.next = wanted.from;
    keys.next_bytes = wanted.bytes;
    const char *scales = (const char *)sfa_kv_at(block->view, &block->view->v.scales, block->kv_head, tile);
    if (sfa_has_scales(block->view->v.format.dtype) && block->view->v.scales.row_stride == 1) { /* the first that values want */
      __builtin_prefetch(scales);
      __builtin_prefetch(scales + 64);
    }
    kernels->score_keys(&keys, n_rows, plan->options.head_dim, s->q_table, plan->query_scale, P);
  }
  const float *slope = block->call->args->alibi_slopes ? s->slope : NULL;
  if (plan->options.softcap > 0 || slope) {
    for (int32_t i = 0; i < n_rows; i++)
      s->tile_position[i] = s->position[i] - (int32_t)first_key;
    kernels->adjust_keys(n_rows, n_keys, plan->options.softcap, slope, s->tile_position, P);
  }
  int32_t n_always;
  if (sfa_attn_block_bounds(block, first_key, n_keys, &n_always))
    for (int32_t i = 0; i < n_rows; i++)
      for (int32_t j = 0; j < n_keys; j++)
        if (!((s->lo[i] <= j || j < n_always) && j <= s->hi[i]))
          P[i * SFA_KEY_TILE + j] = -INFINITY;
  *rescaled = kernels->softmax_keys(n_rows, n_keys, P, state->m, state->l, alpha);
  for (int32_t i = 0; i < n_rows && n_keys < SFA_KEY_TILE; i++)
    memset(P + i * SFA_KEY_TILE + n_keys, 0, (size_t)(SFA_KEY_TILE - n_keys) * sizeof *P);
}

void sfa_attn_keys_values(const sfa_attn_block *block, int64_t tile, sfa_attn_wanted wanted, const float *P, const float *alpha,
                          bool rescaled, const sfa_attn_state *state) {
  const sfa_kernels *kernels = block->call->plan->kernels;
  int32_t E = block->call->plan->options.head_dim_v;
  sfa_stored_rows values = sfa_attn_keys_stored(block->view, &block->view->v, block->kv_head, tile, keys_of_tile(block, tile));
  values.next = wanted.from;
  values.next_bytes = wanted.bytes;
  if (rescaled)
    kernels->rescale(block->n_rows, E, alpha, state->o);
  kernels->value_keys(&values, block->n_rows, P, E, state->o);
}

/* ---- A span, and the end ------------------------------------------------------------------------------------------------------- */

void sfa_attn_keys_join(const sfa_attn_keys_call *keys, sfa_attn_keys_item *item, const double *rho) {
  sfa_attn_block *block = &item->block;
  sfa_attn_state total = block->scratch.total;
  if (!item->spans->n)
    sfa_attn_state_clear(keys->call.plan, &total);
  for (int64_t i = 0; i < item->spans->n; i++) {
    sfa_attn_state part = sfa_attn_keys_part(keys, item->number, item->spans->numbers[i]);
    if (i == 0)
      total = part;
    else
      sfa_attn_block_join(block, &total, &part);
  }
  sfa_attn_block_finish(block, &total, rho);
}

/* An item's span: its part becomes the state of its keys. */
static void attend_span(const sfa_attn_keys_call *keys, sfa_attn_keys_item *item) {
  sfa_attn_block *block = &item->block;
  const sfa_attn_scratch *s = &block->scratch;
  sfa_attn_state part = sfa_attn_keys_part(keys, item->number, item->span);
  sfa_attn_state_clear(keys->call.plan, &part);
  sfa_attn_block_load(block);
  sfa_attn_keys_index(block, item->span);
  /* A cache's order is that of the work, so that scores ask for what lies `ahead` behind their codes, and at last values for as much of the
   * next tile. Where keys are elsewhere, they are asked for a tile ahead, and so are values. */
  const sfa_kv_view *view = block->view;
  int64_t end = (item->span + 1) * (SFA_KEY_SPAN / SFA_KEY_TILE), ahead = bytes_ahead(view);
  int64_t codes = block->indexed ? 0 : code_bytes(block);
  for (int64_t tile = sfa_attn_block_next_tile(block, item->span * (SFA_KEY_SPAN / SFA_KEY_TILE)); tile < end;
       tile = sfa_attn_block_next_tile(block, tile + 1)) {
    bool rescaled;
    sfa_attn_wanted wanted, next = {0};
    if (codes) {
      wanted = (sfa_attn_wanted){sfa_kv_at(view, &view->k.ids, block->kv_head, tile) + ahead, codes};
      if ((tile + 1) * SFA_KEY_TILE < view->n_keys)
        next = (sfa_attn_wanted){sfa_kv_at(view, &view->k.ids, block->kv_head, tile + 1), ahead};
    } else {
      wanted = sfa_attn_keys_wanted(block, tile + 1);
      next = sfa_attn_values_wanted(block, tile + 1);
    }
    sfa_attn_keys_weigh(block, tile, wanted, &part, s->scores, s->alpha, &rescaled);
    sfa_attn_keys_values(block, tile, next, s->scores, s->alpha, rescaled, &part);
  }
}

void sfa_attn_keys_step(const sfa_attn_keys_call *keys, sfa_attn_keys_item *item) {
  if (item->span >= 0)
    attend_span(keys, item);
  if (sfa_attn_keys_arrive(keys, item))
    sfa_attn_keys_join(keys, item, NULL);
}

static void span_item(void *arg, int64_t number, int32_t thread) {
  sfa_attn_keys_item item;
  sfa_attn_keys_find(arg, number, thread, &item);
  int64_t start = sfa_attn_clock(&item.block);
  sfa_attn_keys_step(arg, &item);
  sfa_attn_clock_stop(&item.block, start);
}

void sfa_attn_keys(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_view *views) {
  sfa_attn_keys_call keys = {.call = {plan, args, views}};
  int32_t *numbers = NULL;
  place(plan, (unsigned char *)args->workspace + plan->way_memory, &keys, &numbers);
  share_out(&keys, numbers);
  if (plan->options.eps > 0)
    sfa_attn_drop(&keys);
  else
    sfa_parallel(plan->ctx, sfa_attn_keys_n_items(&keys), span_item, &keys);
}
