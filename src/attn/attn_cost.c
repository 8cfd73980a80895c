/* What a call should cost: units of work times their costs.
 *
 * The model counts what the kernels do, padding included, and takes one time for each kind of unit. It knows nothing about threads: all
 * ways share out their items in the same manner, so the order among them stays.
 *
 *     TILES       score  = pairs (a + K b(D))  or  pairs D c(D);  softmax = pairs e;  value = pairs E v(E)
 *     KEYS        the same with one query row a pair, and never below the time to read the keys and the values
 *     HALF_*      as TILES, with 16-bit units, and bringing keys and values into their form before
 */
#include "attn/attn_cost.h"

#include "attn/attn_cost_tables.h"
#include "kernel/kernel_half.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

const sfa_costs *sfa_attn_costs_of(sfa_isa isa) { return &cost_tables[isa > SFA_ISA_DEFAULT && isa <= SFA_ISA_AMX ? isa : SFA_ISA_SCALAR]; }

bool sfa_attn_costs_usable(const sfa_costs *costs) {
  enum { FIRST = offsetof(sfa_costs, call), HALF = offsetof(sfa_costs, half_code_step), HALF_END = offsetof(sfa_costs, paper_entry) };
  for (size_t at = FIRST; at < sizeof *costs; at += sizeof(double)) {
    double entry;
    memcpy(&entry, (const unsigned char *)costs + at, sizeof entry);
    bool may_be_absent = at >= HALF && at < HALF_END && costs->isa != SFA_ISA_AMX;
    if (!isfinite(entry) || !(entry > 0 || (entry == 0 && may_be_absent)))
      return false;
  }
  return true;
}

/* ---- Entries between the sizes of a table ------------------------------------------------------------------------------------ */

/* At head dim `dim` of entries for 64, 128, 256: straight lines between, the end ones beyond. */
static double by_dim(const double at[SFA_COST_DIMS], int32_t dim) {
  if (dim <= 64)
    return at[0];
  if (dim < 128)
    return at[0] + (at[1] - at[0]) * (dim - 64) / 64;
  return dim < 256 ? at[1] + (at[2] - at[1]) * (dim - 128) / 128 : at[2];
}

/* The same for K = 8, 16, 32; beyond 32 the last line goes on. */
static double by_kept(const double at[SFA_COST_KEPT], int32_t k) {
  if (k <= 8)
    return at[0];
  return k < 16 ? at[0] + (at[1] - at[0]) * (k - 8) / 8 : at[1] + fmax(at[2] - at[1], 0) * (k - 16) / 16;
}

static double topk_row(const sfa_attention_plan *plan, int32_t k) {
  const sfa_costs *c = &plan->costs;
  const int32_t dim = plan->options.head_dim;
  const bool from_bf16 = plan->options.row_dtype == SFA_BF16 && dim <= 256;
  double at[SFA_COST_DIMS];
  for (int i = 0; i < SFA_COST_DIMS; i++)
    at[i] = by_kept((from_bf16 ? c->topk_bf16 : c->topk)[i], k);
  double beyond = dim > 256 ? dim / 256.0 : dim < 64 ? dim / 64.0 : 1; /* every feature is looked at */
  return by_dim(at, dim) * beyond;
}

/* ---- Units of a call --------------------------------------------------------------------------------------------------------- */

typedef struct units {
  double q_rows, keys; /* rows of the call, all heads and sequences */
  double seen_keys;    /* of these keys, those behind a window's left edge, and sink tokens */
  double blocks;
  double tiles;      /* met by a block */
  double lane_pairs; /* (lane, key) of those tiles, padding lanes included */
  double row_pairs;  /* without padding */
  double block_keys; /* keys of those tiles: what is read where every block reads for itself */
} units;

enum { MOST_SAMPLED = 1024 }; /* blocks looked at; more are represented by every second, third, ... one */

/* For blocks of W rows that meet `tile` keys at a time. */
static units count_units(const sfa_attention_plan *plan, int64_t W, int64_t tile) {
  const sfa_attention_options *o = &plan->options;
  int64_t S = o->max_seqlen_k, T = o->max_seqlen_q, n_rows = T * plan->group;
  int64_t sink_tiles = (sfa_min64(o->n_sink_tokens, S) + tile - 1) / tile;
  int64_t n_blocks = (n_rows + W - 1) / W;
  int64_t step = (n_blocks + MOST_SAMPLED - 1) / MOST_SAMPLED;
  units u = {0};
  for (int64_t block = 0; block < n_blocks; block += step) {
    int64_t first_row = block * W, end_row = sfa_min64(first_row + W, n_rows);
    int64_t first_position = first_row / plan->group + S - T, last_position = (end_row - 1) / plan->group + S - T;
    int64_t left = o->has_window && o->window_size[0] >= 0 ? sfa_max64(first_position - o->window_size[0], 0) : 0, right = S - 1;
    if (o->causal)
      right = sfa_min64(right, last_position);
    if (o->has_window && o->window_size[1] >= 0)
      right = sfa_min64(right, last_position + o->window_size[1]);
    int64_t first_tile = left / tile, end_tile = right < left ? first_tile : right / tile + 1;
    int64_t n_tiles = end_tile - first_tile + sfa_min64(sink_tiles, first_tile);
    int64_t n_keys = sfa_min64(n_tiles * tile, S);
    double weight = (double)sfa_min64(step, n_blocks - block);
    u.blocks += weight;
    u.tiles += weight * (double)n_tiles;
    u.block_keys += weight * (double)n_keys;
    u.lane_pairs += weight * (double)(n_keys * W);
    u.row_pairs += weight * (double)(n_keys * (end_row - first_row));
  }
  double n_heads = (double)o->n_sequences * o->n_kv_heads;
  u.q_rows = n_heads * (double)n_rows;
  u.keys = n_heads * (double)S;
  u.seen_keys = n_heads * (double)(o->has_window && o->window_size[0] >= 0 ? sfa_min64(S, o->window_size[0] + T + o->n_sink_tokens) : S);
  u.blocks *= n_heads;
  u.tiles *= n_heads;
  u.block_keys *= n_heads;
  u.lane_pairs *= n_heads;
  u.row_pairs *= n_heads;
  return u;
}

/* ---- The ways ---------------------------------------------------------------------------------------------------------------- */

static double row_bytes(const sfa_row_format *format) {
  return (double)(sfa_row_ids_bytes(format) + sfa_row_values_bytes(format) + sfa_row_scale_bytes(format));
}

/* What a stage takes that computes for `ns` and reads `bytes`: the longer of the two, where the call's keys and values are more than the
 * cache keeps. */
static double at_least_reading(const sfa_attention_plan *plan, const units *u, double ns, double bytes) {
  const sfa_costs *c = &plan->costs;
  double stored = u->keys * (double)(row_bytes(&plan->k_format) + row_bytes(&plan->v_format));
  return stored > c->near_bytes ? fmax(ns, bytes * c->read_byte) : ns;
}

/* One value of a row met by `rows` query rows at a time. */
static double shared(const double cost[SFA_COST_ROWS], double rows) { return cost[0] + (rows - 1) * cost[1]; }

static void tiles_times(const sfa_attention_plan *plan, const units *u, bool densify, sfa_attn_times *t) {
  const sfa_attention_options *o = &plan->options;
  const sfa_costs *c = &plan->costs;
  int32_t D = o->head_dim, E = o->head_dim_v, K = plan->k_format.k;
  double loads = u->block_keys / plan->n_strips; /* a tile is brought in once for the blocks of an item */
  double score = K && !densify ? u->lane_pairs * (by_dim(c->code_pair, D) + K * by_dim(c->code_step, D))
                               : u->lane_pairs * D * by_dim(c->dense_step, D);
  if (densify && plan->encode_k && o->k_dtype == SFA_F32) /* once, when they are made */
    t->pack += u->keys * (D * c->densify_key + K * c->densify_value);
  else if (densify)
    score += loads * (D * c->densify_key + K * c->densify_value);
  if (o->k_dtype != SFA_F32)
    score += loads * sfa_row_width(&plan->k_format) * c->load_value[o->k_dtype];
  double value = u->row_pairs * E * by_dim(c->value_step, E);
  if (o->v_dtype != SFA_F32)
    value += loads * E * c->load_value[o->v_dtype];
  t->score = at_least_reading(plan, u, score, loads * row_bytes(&plan->k_format));
  t->softmax = u->lane_pairs * c->exp_pair;
  t->value = at_least_reading(plan, u, value, loads * row_bytes(&plan->v_format));
  t->call = u->blocks * c->block + u->tiles * c->tile + u->q_rows * D * c->query_value;
}

static void keys_times(const sfa_attention_plan *plan, const units *u, sfa_attn_times *t) {
  const sfa_attention_options *o = &plan->options;
  const sfa_costs *c = &plan->costs;
  double rows = u->block_keys > 0 ? u->row_pairs / u->block_keys : 1;
  const double *key = (plan->k_format.k ? c->keys_code : c->keys_dense)[o->k_dtype];
  double score = u->block_keys * sfa_row_width(&plan->k_format) * shared(key, rows);
  double value = u->block_keys * o->head_dim_v * shared(c->keys_value[o->v_dtype], rows);
  t->score = at_least_reading(plan, u, score, u->block_keys * row_bytes(&plan->k_format));
  t->softmax = u->row_pairs * c->keys_exp_pair;
  t->value = at_least_reading(plan, u, value, u->block_keys * row_bytes(&plan->v_format));
  t->call = u->blocks * c->block + u->tiles * c->tile + u->q_rows * o->head_dim * c->keys_table;
}

static void half_times(const sfa_attention_plan *plan, const units *u, bool codes, sfa_attn_times *t) {
  const sfa_attention_options *o = &plan->options;
  const sfa_costs *c = &plan->costs;
  int32_t D = o->head_dim, E = o->head_dim_v, K = plan->k_format.k;
  codes = codes && K;
  t->pack += (u->seen_keys * ((codes ? K : D) + E) + u->q_rows * D) * c->half_pack_value;
  t->score = u->lane_pairs * (codes ? K * by_dim(c->half_code_step, D) : D * by_dim(c->half_dense_step, D));
  t->softmax = u->lane_pairs * c->half_exp_pair;
  t->value = u->lane_pairs * E * by_dim(c->half_value_step, E);
  t->call = u->blocks * c->block + u->tiles * c->tile;
}

/* Posting lists: of the K_q K features of a pair of rows, K_q K / D meet if all features are used alike. */
static double entries_of_pair(const sfa_attention_plan *plan) {
  const sfa_attention_options *o = &plan->options;
  return (o->k_q ? o->k_q : o->head_dim) * (double)sfa_row_width(&plan->k_format) / o->head_dim;
}

/* The same in the steps of sfa_attn_postings_work. */
static double steps_of_pair(const sfa_attention_plan *plan) {
  double lists = plan->options.k_q ? plan->options.k_q : plan->options.head_dim, steps = entries_of_pair(plan);
  return 1.0 / 16 + (plan->kernels->isa >= SFA_ISA_AVX512 ? fmin(steps, lists * SFA_EXPAND_STEPS / 64) : steps);
}

static void posting_times(const sfa_attention_plan *plan, const units *u, double pair_ns, sfa_attn_times *t) {
  const sfa_attention_options *o = &plan->options;
  const sfa_costs *c = &plan->costs;
  t->score = u->row_pairs * pair_ns;
  t->softmax = u->row_pairs * c->keys_exp_pair;
  t->value =
      at_least_reading(plan, u, u->block_keys * o->head_dim_v * c->keys_value[o->v_dtype][0], u->block_keys * row_bytes(&plan->v_format));
  t->call = u->q_rows * o->head_dim * c->query_value;
}

void sfa_attn_predict(const sfa_attention_plan *plan, sfa_policy policy, bool densify, sfa_attn_times *times) {
  const sfa_attention_options *o = &plan->options;
  const sfa_costs *c = &plan->costs;
  bool half = policy == SFA_POLICY_HALF_CODES || policy == SFA_POLICY_HALF_DENSE;
  units u = half ? count_units(plan, sfa_half_width(o->head_dim), SFA_HALF_CHUNK) : count_units(plan, plan->width, SFA_KEY_TILE);
  *times = (sfa_attn_times){0};
  if (o->k_q && o->k_q < o->head_dim)
    times->topk += u.q_rows * topk_row(plan, o->k_q);
  if (plan->k_format.k && !o->from_cache)
    times->topk += u.keys * topk_row(plan, plan->k_format.k);
  if (plan->encode_k && o->k_dtype != SFA_F32)
    times->pack += u.keys * sfa_row_width(&plan->k_format) * c->pack_value[o->k_dtype];
  if (plan->encode_v)
    times->pack += u.keys * o->head_dim_v * c->pack_value[o->v_dtype];
  switch (policy) {
  case SFA_POLICY_KEYS: keys_times(plan, &u, times); break;
  case SFA_POLICY_HALF_CODES: half_times(plan, &u, true, times); break;
  case SFA_POLICY_HALF_DENSE: half_times(plan, &u, false, times); break;
  case SFA_POLICY_PAPER: posting_times(plan, &u, entries_of_pair(plan) * c->paper_entry, times); break;
  case SFA_POLICY_POSTINGS: posting_times(plan, &u, steps_of_pair(plan) * c->posting_entry, times); break;
  default: tiles_times(plan, &u, densify, times); break;
  }
  times->call += c->call;
}

/* ---- An index or the codes --------------------------------------------------------------------------------------------------- */

static double with_reading(const sfa_attention_plan *plan, const sfa_kv_view *view, double ns, double bytes) {
  double stored = (double)view->n_keys * plan->options.n_kv_heads * (row_bytes(&view->k.format) + row_bytes(&view->v.format));
  return stored > plan->costs.near_bytes ? fmax(ns, bytes * plan->costs.read_byte) : ns;
}

double sfa_attn_cost_scan(const sfa_attention_plan *plan, const sfa_kv_view *view, int64_t n_keys, int32_t n_rows) {
  const sfa_row_format *k = &view->k.format;
  const double *key = (k->k ? plan->costs.keys_code : plan->costs.keys_dense)[k->dtype];
  return with_reading(plan, view, (double)n_keys * sfa_row_width(k) * shared(key, n_rows), (double)n_keys * row_bytes(k));
}

double sfa_attn_cost_index(const sfa_attention_plan *plan, const sfa_kv_view *view, int64_t steps, int64_t bytes) {
  return with_reading(plan, view, (double)steps * plan->costs.posting_entry, (double)bytes);
}
