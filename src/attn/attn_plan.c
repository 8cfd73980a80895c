/* Tiles, splits, workspace. */
#include "attn/attn_policy.h"

#include "code/code.h"

#include <math.h>
#include <string.h>

/* Rows of a block: 64 measured best or within noise of it for D = 64, 128 and 256, dense and sparse, on AVX-512 and AVX2 (32 costs dense
 * 10 % more, 128 costs codes 5 %); fewer where Qt [D][W] would outgrow a second-level cache, or the call has fewer rows. */
static int32_t block_width(int64_t n_rows, int32_t head_dim) {
  int64_t width = sfa_min64(sfa_max64(65536 / head_dim, SFA_LANES), 64);
  width = sfa_min64(width, sfa_max64(n_rows, 1));
  return (int32_t)((width + SFA_LANES - 1) / SFA_LANES * SFA_LANES);
}

/* Appends an array to a layout: *offset is where it begins. */
static bool add_array(size_t *total, size_t count, size_t bytes, size_t *offset) {
  size_t size;
  *offset = *total;
  return sfa_mul_size(count, bytes, &size) && sfa_add_size(size, 63, &size) && sfa_add_size(*total, size & ~(size_t)63, total);
}

void sfa_attn_plan_shape(sfa_attention_plan *plan) {
  const sfa_attention_options *o = &plan->options;
  plan->group = o->n_heads / o->n_kv_heads;
  int64_t n_rows = o->max_seqlen_q * plan->group;
  plan->width = block_width(n_rows, o->head_dim);
  plan->n_blocks = (n_rows + plan->width - 1) / plan->width;
  plan->n_spans = (o->max_seqlen_k + SFA_KEY_SPAN - 1) / SFA_KEY_SPAN;
  int64_t n_blocks = (int64_t)o->n_sequences * o->n_kv_heads * plan->n_blocks;
  /* Four blocks to an item leave the keys and values in the cache, and convert them, four times as seldom; 32 items, of which the longest
   * come first, keep 16 threads busy to the end under a causal mask (16 items would leave half of their time idle). */
  plan->n_strips = (int32_t)sfa_min64(sfa_max64(n_blocks / 32, 1), sfa_min64(SFA_MAX_STRIPS, sfa_max64(plan->n_blocks, 1)));
  /* Few blocks over many keys, as in decode: share out the spans too. 64 items keep the machines of today busy, and bound the parts. */
  plan->split = plan->n_spans > 1 && n_blocks < 64;
  plan->query_scale = o->softcap > 0 ? o->softmax_scale / o->softcap : o->softmax_scale * (float)M_LOG2E;
  plan->k_format = (sfa_row_format){o->head_dim, o->k_k == o->head_dim ? 0 : o->k_k, o->k_dtype};
  plan->v_format = (sfa_row_format){o->head_dim_v, 0, o->v_dtype};
  plan->encode_k = !o->from_cache && (plan->k_format.k || o->k_dtype != SFA_F32);
  plan->encode_v = !o->from_cache && o->v_dtype != SFA_F32;
}

bool sfa_attn_plan_workspace(sfa_attention_plan *plan) {
  const sfa_attention_options *o = &plan->options;
  const sfa_attn_way *way = sfa_attn_way_of(plan->policy);
  int64_t n_blocks = (int64_t)o->n_sequences * o->n_kv_heads * plan->n_blocks;
  plan->densify_once = plan->densify && plan->encode_k && o->k_dtype == SFA_F32;
  sfa_attn_state state;
  sfa_attn_scratch scratch;
  plan->part_bytes = sfa_attn_state_place(plan, NULL, &state);
  plan->scratch_bytes = sfa_attn_scratch_place(plan, NULL, 0, &scratch);
  size_t n_parts = plan->split ? (size_t)n_blocks : 0;
  size_t n_keys, total = 0;
  if (!sfa_mul_size((size_t)o->n_sequences, (size_t)o->n_kv_heads, &n_keys) || !sfa_mul_size(n_keys, (size_t)o->max_seqlen_k, &n_keys))
    return false;
  size_t n_pages = ((size_t)o->max_seqlen_k + SFA_KEY_TILE - 1) / SFA_KEY_TILE;
  size_t n_k = plan->encode_k ? n_keys : 0, n_v = plan->encode_v ? n_keys : 0;
  const sfa_row_format *k = &plan->k_format, *v = &plan->v_format;
  bool fits =
      add_array(&total, (size_t)o->n_sequences, sizeof(sfa_kv_view), &plan->views) &&
      add_array(&total, n_parts * (size_t)plan->n_spans, plan->part_bytes, &plan->parts) &&
      add_array(&total, (size_t)plan->ctx->n_threads, plan->scratch_bytes, &plan->scratch) &&
      add_array(&total, way->workspace_bytes ? way->workspace_bytes(plan) : 0, 1, &plan->way_memory) &&
      add_array(&total, (size_t)o->n_sequences * n_pages, sizeof(void *), &plan->page_tables) &&
      add_array(&total, plan->densify_once ? n_keys : 0, (size_t)o->head_dim * sizeof(float), &plan->k_dense) &&
      add_array(&total, n_k, sfa_row_ids_bytes(k), &plan->k_ids) && add_array(&total, n_k, sfa_row_values_bytes(k), &plan->k_values) &&
      add_array(&total, n_k, sfa_row_scale_bytes(k), &plan->k_scales) && add_array(&total, n_v, sfa_row_values_bytes(v), &plan->v_values) &&
      add_array(&total, n_v, sfa_row_scale_bytes(v), &plan->v_scales);
  plan->workspace_bytes = total;
  return fits;
}

static void *after(void *memory, size_t bytes) { return memory ? (unsigned char *)memory + bytes : NULL; }

/* Takes the next bytes of a block of memory, or only counts them. */
static void *take(void *memory, size_t *used, size_t count, size_t bytes) {
  void *at = after(memory, *used);
  *used += sfa_align64(count * bytes);
  return at;
}

size_t sfa_attn_state_place(const sfa_attention_plan *plan, void *memory, sfa_attn_state *state) {
  size_t used = 0, width = (size_t)plan->width;
  state->m = take(memory, &used, width, sizeof(float));
  state->l = take(memory, &used, width, sizeof(float));
  state->o = take(memory, &used, width * (size_t)plan->options.head_dim_v, sizeof(float));
  return used;
}

static size_t strip_place(const sfa_attention_plan *plan, void *memory, sfa_attn_scratch *s) {
  size_t used = 0, W = (size_t)plan->width;
  s->q_tile = take(memory, &used, W * (size_t)plan->options.head_dim, sizeof(float));
  size_t csr_values = plan->policy == SFA_POLICY_PAPER ? W * (size_t)plan->options.k_q : 0;
  s->csr_ids = take(memory, &used, csr_values, sfa_id_bytes(plan->options.head_dim));
  s->csr_values = take(memory, &used, csr_values, sizeof(float));
  s->slope = take(memory, &used, W, sizeof(float));
  s->row = take(memory, &used, W, sizeof(int64_t));
  s->head = take(memory, &used, W, sizeof(int32_t));
  s->position = take(memory, &used, W, sizeof(int32_t));
  used += sfa_attn_state_place(plan, after(memory, used), &s->total);
  used += sfa_attn_state_place(plan, after(memory, used), &s->part);
  return used;
}

/* What the policy PAPER wants: the struct, and its arrays. */
static sfa_key_lists *take_lists(const sfa_attention_plan *plan, void *memory, size_t *used) {
  size_t n = SFA_KEY_TILE * (size_t)plan->options.k_k;
  sfa_key_lists *at = take(memory, used, 1, sizeof *at), lists;
  lists.starts = take(memory, used, (size_t)plan->options.head_dim + 2, sizeof *lists.starts);
  lists.keys = take(memory, used, n, sizeof *lists.keys);
  lists.values = take(memory, used, n, sizeof *lists.values);
  if (at)
    *at = lists;
  return at;
}

size_t sfa_attn_scratch_place(const sfa_attention_plan *plan, void *memory, int32_t strip, sfa_attn_scratch *s) {
  const sfa_attention_options *o = &plan->options;
  size_t used = 0, W = (size_t)plan->width, D = (size_t)o->head_dim, E = (size_t)o->head_dim_v, id_bytes = sfa_id_bytes(o->head_dim);
  size_t k_width = (size_t)(o->k_k ? o->k_k : o->head_dim);
  s->stage_ns = take(memory, &used, SFA_STAGE_COUNT, sizeof(int64_t));
  s->q_rows = take(memory, &used, W * D, sizeof(float));
  s->q_step = take(memory, &used, W, sizeof(float));
  s->q_table = take(memory, &used, sfa_attn_lanes_are_keys(plan) ? W : 0, sfa_query_table_bytes(o->head_dim));
  size_t indexed = sfa_attn_takes_postings(plan) ? SFA_KEY_SPAN : 0;
  s->index_sums = take(memory, &used, indexed, sizeof(int32_t));
  s->index_scores = take(memory, &used, W * indexed, sizeof(float));
  s->q_values = take(memory, &used, W * (size_t)o->k_q, sizeof(float));
  s->q_ids = take(memory, &used, W * (size_t)o->k_q, id_bytes);
  s->id_rows = take(memory, &used, W, sizeof(void *));
  s->value_rows = take(memory, &used, W, sizeof(float *));
  s->k_rows = take(memory, &used, SFA_KEY_TILE * k_width, sizeof(float));
  s->k_ids = take(memory, &used, SFA_KEY_TILE * (size_t)o->k_k, id_bytes);
  s->k_dense = take(memory, &used, plan->densify ? SFA_KEY_TILE * D : 0, sizeof(float));
  s->v_rows = take(memory, &used, SFA_KEY_TILE * E, sizeof(float));
  s->scales = take(memory, &used, SFA_KEY_TILE, sizeof(uint16_t));
  s->k_scale = take(memory, &used, SFA_KEY_TILE, sizeof(float));
  s->v_scale = take(memory, &used, SFA_KEY_TILE, sizeof(float));
  s->scores = take(memory, &used, SFA_KEY_TILE * W, sizeof(float));
  s->alpha = take(memory, &used, W, sizeof(float));
  s->tile_position = take(memory, &used, W, sizeof(int32_t));
  s->lo = take(memory, &used, W, sizeof(int32_t));
  s->hi = take(memory, &used, W, sizeof(int32_t));
  s->lists = plan->policy == SFA_POLICY_PAPER ? take_lists(plan, memory, &used) : NULL;
  size_t k_bytes = plan->encode_k ? sfa_code_scratch_bytes(&plan->k_format, SFA_ENCODE_ROWS) : 0;
  size_t v_bytes = plan->encode_v ? sfa_code_scratch_bytes(&plan->v_format, SFA_ENCODE_ROWS) : 0;
  s->encode = take(memory, &used, k_bytes > v_bytes ? k_bytes : v_bytes, 1);
  size_t strip_bytes = strip_place(plan, NULL, s);
  strip_place(plan, after(memory, used + (size_t)strip * strip_bytes), s);
  return used + (size_t)plan->n_strips * strip_bytes;
}
