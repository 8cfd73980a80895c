/* Decode that leaves values out, with a certificate (docs/MATH.md 7): a block's weights are all known before its first value is read.
 *
 *     probe    per block: a few tiles are weighed. Would enough rows of V be spared? If not, the block takes the exact step
 *     weigh    every span of the other blocks: P of each tile to the workspace, m and l as the exact step has them, keys counted by weight;
 *              then, per query row, the highest edge below which the counted weights stay within eps
 *     values   every span: keys below the edges of all rows leave, what they weigh is added up; the others' rows of V are read
 *
 * Counts are whole numbers, weights are compared with edges that are exact multiples of each other, and sums run in the order of the keys:
 * which thread does what does not show. A key that one row keeps is kept for all rows of the block: its values are read anyway. What stays
 * is the exact step's chain of operations with P = 0 for what left: without anything to leave, its bits. */
#include "attn/attn_keys.h"

#include "base/half.h"

#include <math.h>
#include <string.h>

enum {
  PROBED = 64, /* one tile in so many, at most */
  SPAN_TILES = SFA_KEY_SPAN / SFA_KEY_TILE,
  TILE_KEPT = SFA_KEY_TILE - 8 /* more kept rows than this are read as a stream, and then all count as kept */
};
/* Two passes pay where they spare so many bytes of an element of V, those of rows that are read, scattered, counted by half more. Measured
 * on Cascade Lake, 128 elements a row: of int8 values, 7 % kept break even; of bf16, a third; int4 never pays. */
static const double least_spared = 0.97, scattered = 1.5;
static const double margin = 1 - 0x1p-10; /* of eps, for the rounding of l: at worst 4096 additions of 2^-24 */

/* ---- What a span leaves behind ------------------------------------------------------------------------------------------------- */

typedef struct drop_totals {
  float reference[SFA_KEYS_ROWS]; /* a row's largest score of the span, rounded up to a whole number of octaves: the unit of its weights */
  double dropped[SFA_KEYS_ROWS];
} drop_totals;

typedef struct drop_span {
  drop_totals *totals;
  float *weights;         /* [tiles][rows][64] P, relative to the largest score so far */
  float *alpha, *factor;  /* [tiles][rows] of o; from P's unit to the span's */
  unsigned char *changed; /* [tiles] any alpha differs from 1 */
  uint32_t *depths;       /* [rows][SFA_N_DEPTHS] number of keys by weight */
} drop_span;

typedef struct drop_block {
  float reference[SFA_KEYS_ROWS];
  float edge[SFA_KEYS_ROWS]; /* weights below it leave, in units of reference; 0: none may */
  double mass[SFA_KEYS_ROWS];
  bool weighed, drops; /* said the probe; say the edges */
} drop_block;

static int32_t most_rows(const sfa_attention_plan *plan) { return (int32_t)(plan->options.max_seqlen_q * plan->group); }

/* Lays a span over memory; NULL counts only. Returns the bytes. */
static size_t span_place(const sfa_attention_plan *plan, unsigned char *memory, drop_span *span) {
  size_t rows = (size_t)most_rows(plan), n_keys = (size_t)sfa_min64(plan->options.max_seqlen_k, SFA_KEY_SPAN);
  size_t tiles = (n_keys + SFA_KEY_TILE - 1) / SFA_KEY_TILE;
  size_t weights = sfa_align64(sizeof *span->totals), alpha = weights + tiles * rows * SFA_KEY_TILE * sizeof(float);
  size_t factor = alpha + sfa_align64(tiles * rows * sizeof(float)), changed = factor + sfa_align64(tiles * rows * sizeof(float));
  size_t depths = changed + sfa_align64(tiles), end = depths + rows * SFA_N_DEPTHS * sizeof(uint32_t);
  if (memory)
    *span = (drop_span){.totals = (drop_totals *)(void *)memory,
                        .weights = (float *)(void *)(memory + weights),
                        .alpha = (float *)(void *)(memory + alpha),
                        .factor = (float *)(void *)(memory + factor),
                        .changed = memory + changed,
                        .depths = (uint32_t *)(void *)(memory + depths)};
  return end;
}

static size_t blocks_bytes(const sfa_attention_plan *plan) {
  return sfa_align64((size_t)plan->options.n_sequences * (size_t)plan->options.n_kv_heads * sizeof(drop_block));
}

size_t sfa_attn_drop_span_bytes(const sfa_attention_plan *plan) {
  drop_span span;
  return span_place(plan, NULL, &span);
}

size_t sfa_attn_drop_workspace(const sfa_attention_plan *plan) {
  size_t n_spans = (size_t)plan->options.n_sequences * (size_t)plan->options.n_kv_heads * (size_t)plan->n_spans;
  return blocks_bytes(plan) + n_spans * sfa_attn_drop_span_bytes(plan);
}

static drop_block *block_of(const sfa_attn_keys_call *keys, int64_t number) { return (drop_block *)(void *)keys->drop + number; }

static drop_span span_of(const sfa_attn_keys_call *keys, int64_t number, int64_t span) {
  const sfa_attention_plan *plan = keys->call.plan;
  drop_span out;
  size_t before = (size_t)(number * plan->n_spans + span) * sfa_attn_drop_span_bytes(plan);
  span_place(plan, keys->drop + blocks_bytes(plan) + before, &out);
  return out;
}

/* ---- Counting by weight -------------------------------------------------------------------------------------------------------- */

/* What the weights of a depth are below: see count_depths. */
static float depth_end(int32_t depth) { return sfa_float_of((uint32_t)(127 * SFA_DEPTH_STEPS - depth + 1) << 20); }

static void count_tile(const sfa_attn_keys_call *keys, const drop_span *span, int64_t tile, int32_t n_rows) {
  int32_t rows = most_rows(keys->call.plan);
  for (int32_t i = 0; i < n_rows; i++) {
    int64_t at = tile * rows + i;
    keys->call.plan->kernels->count_depths(span->weights + at * SFA_KEY_TILE, span->factor[at], span->depths + (int64_t)i * SFA_N_DEPTHS);
  }
}

/* Keys of row i by weight in the block's unit, all spans. */
static void gather_depths(const sfa_attn_keys_call *keys, const sfa_attn_keys_item *item, int32_t i, float reference,
                          int64_t counts[SFA_N_DEPTHS]) {
  memset(counts, 0, SFA_N_DEPTHS * sizeof *counts);
  for (int64_t n = 0; n < item->spans->n; n++) {
    drop_span span = span_of(keys, item->number, item->spans->numbers[n]);
    float octaves = reference - span.totals->reference[i]; /* inf where the row sees nothing of the span */
    int32_t shift = octaves < SFA_N_DEPTHS / SFA_DEPTH_STEPS ? (int32_t)octaves * SFA_DEPTH_STEPS : SFA_N_DEPTHS;
    for (int32_t d = 0; d < SFA_N_DEPTHS; d++)
      counts[d + shift < SFA_N_DEPTHS ? d + shift : SFA_N_DEPTHS - 1] += span.depths[(int64_t)i * SFA_N_DEPTHS + d];
  }
}

/* ---- Choosing ------------------------------------------------------------------------------------------------------------------ */

/* m and l of all keys and the sink, as sfa_attn_block_finish will have them. */
static void join_masses(const sfa_attn_keys_call *keys, const sfa_attn_keys_item *item, float *m, float *l) {
  const sfa_attn_block *block = &item->block;
  const sfa_kernels *kernels = keys->call.plan->kernels;
  const float *sinks = keys->call.args->sink_logit;
  float sink_m[SFA_KEYS_ROWS], sink_l[SFA_KEYS_ROWS], o = 0;
  for (int64_t n = 0; n < item->spans->n; n++) {
    sfa_attn_state part = sfa_attn_keys_part(keys, item->number, item->spans->numbers[n]);
    kernels->merge(block->n_rows, 0, m, l, &o, part.m, part.l, &o);
  }
  for (int32_t i = 0; sinks && i < block->n_rows; i++) {
    sink_m[i] = sinks[block->scratch.head[i]] * (float)M_LOG2E;
    sink_l[i] = sink_m[i] != -INFINITY;
  }
  if (sinks)
    kernels->merge(block->n_rows, 0, m, l, &o, sink_m, sink_l, &o);
}

/* Sets the edges of a block's rows from what has been counted, and whether every row lets keys go. */
static void choose(const sfa_attn_keys_call *keys, const sfa_attn_keys_item *item) {
  drop_block *drop = block_of(keys, item->number);
  int32_t n_rows = item->block.n_rows;
  float m[SFA_KEYS_ROWS], l[SFA_KEYS_ROWS] = {0};
  for (int32_t i = 0; i < n_rows; i++)
    m[i] = drop->reference[i] = -INFINITY;
  join_masses(keys, item, m, l);
  for (int64_t n = 0; n < item->spans->n; n++) {
    const drop_totals *totals = span_of(keys, item->number, item->spans->numbers[n]).totals;
    for (int32_t i = 0; i < n_rows; i++)
      drop->reference[i] = fmaxf(drop->reference[i], totals->reference[i]);
  }
  drop->drops = true;
  for (int32_t i = 0; i < n_rows; i++) {
    int64_t counts[SFA_N_DEPTHS];
    drop->mass[i] = (double)l[i] * exp2((double)m[i] - (double)drop->reference[i]);
    drop->edge[i] = drop->reference[i] == -INFINITY ? INFINITY : 0; /* who sees no key keeps none */
    if (drop->edge[i] > 0)
      continue;
    if (!isfinite(l[i]) || !isfinite(drop->reference[i])) {
      drop->drops = false;
      continue;
    }
    gather_depths(keys, item, i, drop->reference[i], counts);
    double budget = (double)keys->call.plan->options.eps * margin * drop->mass[i], spent = 0;
    for (int32_t d = SFA_N_DEPTHS - 1; d >= 0; d--) {
      spent += (double)counts[d] * (double)depth_end(d);
      if (!(spent <= budget))
        break;
      drop->edge[i] = depth_end(d);
    }
    drop->drops &= drop->edge[i] > 0;
  }
}

/* ---- The passes ---------------------------------------------------------------------------------------------------------------- */

/* Weighs tiles [n] of the block: to the given slots of span. The block's queries are loaded. */
static void weigh_tiles(const sfa_attn_keys_call *keys, const sfa_attn_keys_item *item, const sfa_attn_state *part, const drop_span *span,
                        int32_t n, const int64_t *tiles, const int32_t *slots) {
  const sfa_attn_block *block = &item->block;
  int32_t rows = most_rows(keys->call.plan), n_rows = block->n_rows;
  sfa_attn_state_clear(keys->call.plan, part);
  *span->totals = (drop_totals){{0}, {0}};
  memset(span->depths, 0, (size_t)rows * SFA_N_DEPTHS * sizeof *span->depths);
  for (int32_t t = 0; t < n; t++) {
    int64_t at = (int64_t)slots[t] * rows;
    bool rescaled;
    sfa_attn_wanted wanted = t + 1 < n ? sfa_attn_keys_wanted(block, tiles[t + 1]) : (sfa_attn_wanted){0};
    sfa_attn_keys_weigh(block, tiles[t], wanted, part, span->weights + at * SFA_KEY_TILE, span->alpha + at, &rescaled);
    span->changed[slots[t]] = rescaled;
    memcpy(span->factor + at, part->m, (size_t)n_rows * sizeof *part->m);
  }
  for (int32_t i = 0; i < n_rows; i++)
    span->totals->reference[i] = ceilf(part->m[i]);
  for (int32_t t = 0; t < n; t++) {
    float *factor = span->factor + (int64_t)slots[t] * rows;
    for (int32_t i = 0; i < n_rows; i++)
      factor[i] = factor[i] == -INFINITY ? 0 : sfa_exp2(factor[i] - span->totals->reference[i]);
    count_tile(keys, span, slots[t], n_rows);
  }
}

/* The edges in a span's unit: powers of two apart, so that depths are cut where they were counted. */
static void span_limits(const sfa_attn_keys_call *keys, const sfa_attn_keys_item *item, const drop_span *span, float *limit) {
  const drop_block *drop = block_of(keys, item->number);
  for (int32_t i = 0; i < item->block.n_rows; i++)
    limit[i] = drop->edge[i] * exp2f(drop->reference[i] - span->totals->reference[i]);
}

/* Of the keys of a span's first n slots, those that some row keeps. */
static double kept_share(const sfa_attn_keys_call *keys, const sfa_attn_keys_item *item, const drop_span *span, int32_t n) {
  const sfa_attention_plan *plan = keys->call.plan;
  float limit[SFA_KEYS_ROWS], sums[SFA_KEYS_ROWS];
  int64_t n_kept = 0, rows = most_rows(plan);
  span_limits(keys, item, span, limit);
  for (int32_t t = 0; t < n; t++) /* at most -1 may stay: nothing changes */
    n_kept +=
        plan->kernels->drop_keys(item->block.n_rows, span->factor + t * rows, limit, -1, span->weights + t * rows * SFA_KEY_TILE, sums);
  return (double)n_kept / ((double)n * SFA_KEY_TILE);
}

/* Tries a block: its first tile, its last, and some between, in the room of its first span. */
static void probe_item(void *arg, int64_t number, int32_t thread) {
  const sfa_attn_keys_call *keys = arg;
  const sfa_attention_plan *plan = keys->call.plan;
  int64_t b = number / plan->options.n_kv_heads, g = number % plan->options.n_kv_heads;
  const sfa_attn_spans *spans = &keys->spans[b], first = {.n = 1, .numbers = spans->numbers};
  sfa_attn_keys_item item;
  block_of(keys, number)->weighed = false;
  if (!spans->n)
    return;
  sfa_attn_keys_find(keys, spans->first_item + g * spans->n, thread, &item);
  int64_t start = sfa_attn_clock(&item.block), tiles[SPAN_TILES];
  int64_t n_tiles = (item.block.view->n_keys + SFA_KEY_TILE - 1) / SFA_KEY_TILE, room = sfa_min64(n_tiles, SPAN_TILES) - 1;
  int64_t step = sfa_max64(PROBED, n_tiles / sfa_max64(room, 1) + 1);
  int32_t slots[SPAN_TILES], n = 0;
  for (int64_t tile = sfa_attn_block_next_tile(&item.block, 0); tile < n_tiles - 1 && n < room;
       tile = sfa_attn_block_next_tile(&item.block, tile + step))
    tiles[n++] = tile;
  if (sfa_attn_block_next_tile(&item.block, n_tiles - 1) == n_tiles - 1)
    tiles[n++] = n_tiles - 1;
  for (int32_t t = 0; t < n; t++)
    slots[t] = t;
  drop_span span = span_of(keys, number, spans->numbers[0]);
  sfa_attn_state part = sfa_attn_keys_part(keys, number, spans->numbers[0]);
  sfa_attn_block_load(&item.block);
  weigh_tiles(keys, &item, &part, &span, n, tiles, slots);
  item.spans = &first;
  choose(keys, &item);
  double bytes = (double)sfa_stored_bytes(plan->v_format.dtype, 2) / 2;
  block_of(keys, number)->weighed =
      block_of(keys, number)->drops && (1 - scattered * kept_share(keys, &item, &span, n)) * bytes >= least_spared;
  sfa_attn_clock_stop(&item.block, start);
}

static void weigh_item(void *arg, int64_t number, int32_t thread) {
  const sfa_attn_keys_call *keys = arg;
  sfa_attn_keys_item item;
  sfa_attn_keys_find(keys, number, thread, &item);
  sfa_attn_block *block = &item.block;
  int64_t start = sfa_attn_clock(block), first = item.span * SPAN_TILES, tiles[SPAN_TILES];
  if (!block_of(keys, item.number)->weighed) {
    sfa_attn_keys_step(keys, &item);
  } else {
    int32_t slots[SPAN_TILES], n = 0;
    for (int64_t tile = sfa_attn_block_next_tile(block, first); tile < first + SPAN_TILES;
         tile = sfa_attn_block_next_tile(block, tile + 1)) {
      slots[n] = (int32_t)(tile - first);
      tiles[n++] = tile;
    }
    drop_span span = span_of(keys, item.number, item.span);
    sfa_attn_state part = sfa_attn_keys_part(keys, item.number, item.span);
    sfa_attn_block_load(block);
    sfa_attn_keys_index(block, item.span);
    weigh_tiles(keys, &item, &part, &span, n, tiles, slots);
    if (sfa_attn_keys_arrive(keys, &item))
      choose(keys, &item);
  }
  sfa_attn_clock_stop(block, start);
}

static void value_span(const sfa_attn_keys_call *keys, sfa_attn_keys_item *item) {
  sfa_attn_block *block = &item->block;
  const drop_block *drop = block_of(keys, item->number);
  drop_span span = span_of(keys, item->number, item->span);
  sfa_attn_state part = sfa_attn_keys_part(keys, item->number, item->span);
  int64_t first = item->span * SPAN_TILES, end = first + SPAN_TILES;
  const sfa_kernels *kernels = keys->call.plan->kernels;
  int32_t rows = most_rows(keys->call.plan);
  float limit[SFA_KEYS_ROWS];
  span_limits(keys, item, &span, limit);
  for (int64_t tile = sfa_attn_block_next_tile(block, first); tile < end; tile = sfa_attn_block_next_tile(block, tile + 1)) {
    int64_t at = (tile - first) * rows;
    float *P = span.weights + at * SFA_KEY_TILE;
    float sums[SFA_KEYS_ROWS];
    int32_t n_kept = drop->drops ? kernels->drop_keys(block->n_rows, span.factor + at, limit, TILE_KEPT, P, sums) : SFA_KEY_TILE;
    if (n_kept <= TILE_KEPT)
      for (int32_t i = 0; i < block->n_rows; i++)
        span.totals->dropped[i] += (double)sums[i] * (double)span.factor[at + i];
    if (n_kept || span.changed[tile - first])
      sfa_attn_keys_values(block, tile, sfa_attn_values_wanted(block, tile + 1), P, span.alpha + at, span.changed[tile - first], &part);
  }
}

/* The share of each row's mass that left. */
static void measure(const sfa_attn_keys_call *keys, const sfa_attn_keys_item *item, double *rho) {
  const drop_block *drop = block_of(keys, item->number);
  for (int32_t i = 0; i < item->block.n_rows; i++) {
    double sum = 0;
    for (int64_t n = 0; n < item->spans->n; n++) {
      const drop_totals *totals = span_of(keys, item->number, item->spans->numbers[n]).totals;
      if (totals->dropped[i] > 0)
        sum += totals->dropped[i] * exp2((double)totals->reference[i] - (double)drop->reference[i]);
    }
    rho[i] = sum > 0 ? sum / drop->mass[i] : 0;
  }
}

static void value_item(void *arg, int64_t number, int32_t thread) {
  const sfa_attn_keys_call *keys = arg;
  sfa_attn_keys_item item;
  double rho[SFA_KEYS_ROWS];
  sfa_attn_keys_find(keys, number, thread, &item);
  if (!block_of(keys, item.number)->weighed)
    return;
  int64_t start = sfa_attn_clock(&item.block);
  value_span(keys, &item);
  if (sfa_attn_keys_arrive(keys, &item)) {
    measure(keys, &item, rho);
    sfa_attn_keys_join(keys, &item, rho);
  }
  sfa_attn_clock_stop(&item.block, start);
}

void sfa_attn_drop(const sfa_attn_keys_call *keys) {
  const sfa_attention_plan *plan = keys->call.plan;
  int64_t n_items = sfa_attn_keys_n_items(keys);
  void *arg = (void *)(uintptr_t)keys;
  int64_t n_blocks = (int64_t)plan->options.n_sequences * plan->options.n_kv_heads;
  sfa_parallel(plan->ctx, n_blocks, probe_item, arg);
  sfa_parallel(plan->ctx, n_items, weigh_item, arg);
  bool any = false;
  for (int64_t number = 0; number < n_blocks; number++)
    any |= block_of(keys, number)->weighed;
  if (any)
    sfa_parallel(plan->ctx, n_items, value_item, arg);
}
