/* Few query rows over many keys: an item is one span of keys for a block of rows; then the parts are joined in the order of the keys,
 * which gives the bits of attn_prefill.c. */
#include "attn/attn_tile.h"

static bool find_block(const sfa_attn_call *call, int64_t number, int32_t thread, sfa_attn_block *block) {
  const sfa_attention_plan *plan = call->plan;
  int64_t pair = number / plan->n_blocks;
  int32_t g = (int32_t)(pair % plan->options.n_kv_heads), b = (int32_t)(pair / plan->options.n_kv_heads);
  return sfa_attn_block_find(call, b, g, number % plan->n_blocks, thread, 0, block);
}

static bool sees_span(const sfa_attn_block *block, int64_t span) {
  int64_t first_key = span * SFA_KEY_SPAN;
  return first_key < block->view->n_keys && sfa_attn_block_sees(block, first_key, first_key + SFA_KEY_SPAN);
}

/* The part of (block, span) in the workspace. */
static sfa_attn_state part_of(const sfa_attn_call *call, int64_t number, int64_t span) {
  const sfa_attention_plan *plan = call->plan;
  sfa_attn_state part;
  size_t index = (size_t)(number * plan->n_spans + span);
  sfa_attn_state_place(plan, (unsigned char *)call->args->workspace + plan->parts + index * plan->part_bytes, &part);
  return part;
}

static void span_item(void *arg, int64_t item, int32_t thread) {
  const sfa_attn_call *call = arg;
  int64_t number = item / call->plan->n_spans, span = item % call->plan->n_spans;
  sfa_attn_block block;
  if (!find_block(call, number, thread, &block) || !sees_span(&block, span))
    return;
  int64_t start = sfa_attn_clock(&block);
  sfa_attn_state part = part_of(call, number, span);
  sfa_attn_block_load(&block);
  block.state = &part;
  sfa_attn_blocks_span(&(sfa_attn_block *){&block}, 1, span);
  sfa_attn_clock_stop(&block, start);
}

static void join_item(void *arg, int64_t number, int32_t thread) {
  const sfa_attn_call *call = arg;
  sfa_attn_block block;
  if (!find_block(call, number, thread, &block))
    return;
  int64_t start = sfa_attn_clock(&block);
  sfa_attn_state total = block.scratch.total;
  bool first = true;
  for (int64_t span = 0; span < call->plan->n_spans; span++) {
    if (!sees_span(&block, span))
      continue;
    sfa_attn_state part = part_of(call, number, span);
    if (first)
      total = part;
    else
      sfa_attn_block_join(&block, &total, &part);
    first = false;
  }
  if (first)
    sfa_attn_state_clear(call->plan, &total);
  sfa_attn_block_finish(&block, &total, NULL);
  sfa_attn_clock_stop(&block, start);
}

void sfa_attn_decode(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_view *views) {
  sfa_attn_call call = {plan, args, views};
  int64_t n_blocks = (int64_t)plan->options.n_sequences * plan->options.n_kv_heads * plan->n_blocks;
  sfa_parallel(plan->ctx, n_blocks * plan->n_spans, span_item, &call);
  sfa_parallel(plan->ctx, n_blocks, join_item, &call);
}
