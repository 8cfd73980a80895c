/* Decode that leaves values out, with a certificate (docs/MATH.md 7): a block's weights are all known before its first value is read.
 *
 *     weigh    every span: P of each tile to the workspace, m and l as the exact step has them; an eighth of the tiles counted by weight
 *     choose   per block: would enough rows of V be spared? If not, the rest is the exact step
 *     count    every span: the other tiles too. Then, per query row, the highest edge below which the counted weights stay within eps
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
  SAMPLED = 8, /* one tile in so many is counted at first */
  SPAN_TILES = SFA_KEY_SPAN / SFA_KEY_TILE,
  TILE_KEPT = SFA_KEY_TILE - 8 /* more kept rows than this are read as a stream, and then all count as kept */
};
static const double largest_share = 0.8;  /* of the keys that a block may keep for the work to pay */
static const double margin = 1 - 0x1p-10; /* of eps, for the rounding of l: at worst 4096 additions of 2^-24 */

/* ---- What a span leaves behind ------------------------------------------------------------------------------------------------- */

typedef struct drop_totals {
  float reference[SFA_KEYS_ROWS]; /* a row's largest score of the span, rounded up to a whole number of octaves: the unit of its weights */
  double dropped[SFA_KEYS_ROWS];
  int64_t n_counted, n_seen; /* keys, in whole tiles */
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
  bool drops;
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
  span->totals->n_counted += SFA_KEY_TILE;
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

/* Sets the edges of a block's rows from what has been counted, and whether to go on. */
static void choose(const sfa_attn_keys_call *keys, const sfa_attn_keys_item *item) {
  drop_block *drop = block_of(keys, item->number);
  int32_t n_rows = item->block.n_rows;
  int64_t n_counted = 0, n_seen = 0;
  float m[SFA_KEYS_ROWS], l[SFA_KEYS_ROWS] = {0};
  for (int32_t i = 0; i < n_rows; i++)
    m[i] = drop->reference[i] = -INFINITY;
  join_masses(keys, item, m, l);
  for (int64_t n = 0; n < item->spans->n; n++) {
    const drop_totals *totals = span_of(keys, item->number, item->spans->numbers[n]).totals;
    n_counted += totals->n_counted;
    n_seen += totals->n_seen;
    for (int32_t i = 0; i < n_rows; i++)
      drop->reference[i] = fmaxf(drop->reference[i], totals->reference[i]);
  }
  drop->drops = n_seen > 0;
  for (int32_t i = 0; i < n_rows; i++) {
    int64_t counts[SFA_N_DEPTHS], n_kept = n_counted;
    drop->mass[i] = (double)l[i] * exp2((double)m[i] - (double)drop->reference[i]);
    drop->edge[i] = drop->reference[i] == -INFINITY ? INFINITY : 0; /* who sees no key keeps none */
    if (drop->edge[i] > 0 || !isfinite(l[i]) || !isfinite(drop->reference[i]))
      continue;
    gather_depths(keys, item, i, drop->reference[i], counts);
    double budget = (double)keys->call.plan->options.eps * margin * drop->mass[i] * (double)n_counted / (double)n_seen, spent = 0;
    for (int32_t d = SFA_N_DEPTHS - 1; d >= 0; d--) {
      spent += (double)counts[d] * (double)depth_end(d);
      if (!(spent <= budget))
        break;
      drop->edge[i] = depth_end(d);
      n_kept -= counts[d];
    }
    drop->drops &= (double)n_kept <= largest_share * (double)n_counted;
  }
}

/* ---- The passes ---------------------------------------------------------------------------------------------------------------- */

static void weigh_span(const sfa_attn_keys_call *keys, sfa_attn_keys_item *item) {
  sfa_attn_block *block = &item->block;
  const sfa_attention_plan *plan = keys->call.plan;
  drop_span span = span_of(keys, item->number, item->span);
  sfa_attn_state part = sfa_attn_keys_part(keys, item->number, item->span);
  int64_t first = item->span * SPAN_TILES, end = first + SPAN_TILES;
  int32_t rows = most_rows(plan), n_rows = block->n_rows;
  sfa_attn_state_clear(plan, &part);
  sfa_attn_block_load(block);
  sfa_attn_keys_index(block, item->span);
  *span.totals = (drop_totals){.n_counted = 0};
  memset(span.depths, 0, (size_t)rows * SFA_N_DEPTHS * sizeof *span.depths);
  for (int64_t tile = sfa_attn_block_next_tile(block, first); tile < end; tile = sfa_attn_block_next_tile(block, tile + 1)) {
    int64_t at = (tile - first) * rows;
    bool rescaled;
    sfa_attn_keys_weigh(block, tile, &part, span.weights + at * SFA_KEY_TILE, span.alpha + at, &rescaled);
    span.changed[tile - first] = rescaled;
    memcpy(span.factor + at, part.m, (size_t)n_rows * sizeof *part.m);
    span.totals->n_seen += SFA_KEY_TILE;
  }
  for (int32_t i = 0; i < n_rows; i++)
    span.totals->reference[i] = ceilf(part.m[i]);
  for (int64_t tile = sfa_attn_block_next_tile(block, first); tile < end; tile = sfa_attn_block_next_tile(block, tile + 1)) {
    int64_t at = (tile - first) * rows;
    for (int32_t i = 0; i < n_rows; i++) {
      float m = span.factor[at + i];
      span.factor[at + i] = m == -INFINITY ? 0 : sfa_exp2(m - span.totals->reference[i]);
    }
    if ((tile - first) % SAMPLED == 0)
      count_tile(keys, &span, tile - first, n_rows);
  }
}

static void weigh_item(void *arg, int64_t number, int32_t thread) {
  const sfa_attn_keys_call *keys = arg;
  sfa_attn_keys_item item;
  sfa_attn_keys_find(keys, number, thread, &item);
  int64_t start = sfa_attn_clock(&item.block);
  if (item.span >= 0)
    weigh_span(keys, &item);
  if (sfa_attn_keys_arrive(keys, &item))
    choose(keys, &item);
  sfa_attn_clock_stop(&item.block, start);
}

static void count_item(void *arg, int64_t number, int32_t thread) {
  const sfa_attn_keys_call *keys = arg;
  sfa_attn_keys_item item;
  sfa_attn_keys_find(keys, number, thread, &item);
  if (!block_of(keys, item.number)->drops)
    return;
  int64_t start = sfa_attn_clock(&item.block), first = item.span * SPAN_TILES, end = first + SPAN_TILES;
  drop_span span = span_of(keys, item.number, item.span);
  for (int64_t tile = sfa_attn_block_next_tile(&item.block, first); tile < end; tile = sfa_attn_block_next_tile(&item.block, tile + 1))
    if ((tile - first) % SAMPLED)
      count_tile(keys, &span, tile - first, item.block.n_rows);
  if (sfa_attn_keys_arrive(keys, &item))
    choose(keys, &item);
  sfa_attn_clock_stop(&item.block, start);
}

static void value_span(const sfa_attn_keys_call *keys, sfa_attn_keys_item *item) {
  sfa_attn_block *block = &item->block;
  const drop_block *drop = block_of(keys, item->number);
  drop_span span = span_of(keys, item->number, item->span);
  sfa_attn_state part = sfa_attn_keys_part(keys, item->number, item->span);
  int64_t first = item->span * SPAN_TILES, end = first + SPAN_TILES;
  const sfa_kernels *kernels = keys->call.plan->kernels;
  int32_t rows = most_rows(keys->call.plan);
  float limit[SFA_KEYS_ROWS]; /* the edges in the span's unit: powers of two apart, so that depths are cut where they were counted */
  for (int32_t i = 0; i < block->n_rows; i++)
    limit[i] = drop->edge[i] * exp2f(drop->reference[i] - span.totals->reference[i]);
  for (int64_t tile = sfa_attn_block_next_tile(block, first); tile < end; tile = sfa_attn_block_next_tile(block, tile + 1)) {
    int64_t at = (tile - first) * rows;
    float *P = span.weights + at * SFA_KEY_TILE;
    int32_t n_keys = (int32_t)sfa_min64(SFA_KEY_TILE, block->view->n_keys - tile * SFA_KEY_TILE);
    float sums[SFA_KEYS_ROWS];
    if (drop->drops && kernels->drop_keys(block->n_rows, span.factor + at, limit, TILE_KEPT, P, sums) <= TILE_KEPT)
      for (int32_t i = 0; i < block->n_rows; i++)
        span.totals->dropped[i] += (double)sums[i] * (double)span.factor[at + i];
    sfa_attn_keys_values(block, tile, n_keys, P, span.alpha + at, span.changed[tile - first], &part);
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
  int64_t start = sfa_attn_clock(&item.block);
  if (item.span >= 0)
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
  sfa_parallel(plan->ctx, n_items, weigh_item, arg);
  bool any = false;
  for (int64_t number = 0; number < (int64_t)plan->options.n_sequences * plan->options.n_kv_heads; number++)
    any |= keys->spans[number / plan->options.n_kv_heads].n > 0 && block_of(keys, number)->drops;
  if (any)
    sfa_parallel(plan->ctx, n_items, count_item, arg);
  sfa_parallel(plan->ctx, n_items, value_item, arg);
}
