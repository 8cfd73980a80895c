/* Many query rows: an item is a block of rows of one kv head with all the keys it sees. */
#include "attn/attn_tile.h"

static void prefill_item(void *arg, int64_t item, int32_t thread) {
  const sfa_attn_call *call = arg;
  const sfa_attention_plan *plan = call->plan;
  /* Heads one after the other, so that their keys stay in the cache; in each the longest blocks first, so that what is left at the end is
   * short. */
  int64_t block_number = plan->n_blocks - 1 - item % plan->n_blocks, pair = item / plan->n_blocks;
  int32_t g = (int32_t)(pair % plan->options.n_kv_heads), b = (int32_t)(pair / plan->options.n_kv_heads);
  sfa_attn_block block;
  if (!sfa_attn_block_find(call, b, g, block_number, thread, &block))
    return;
  int64_t start = sfa_attn_clock(&block);
  sfa_attn_block_load(&block);
  const sfa_attn_state *total = &block.scratch.total, *part = &block.scratch.part;
  bool first = true;
  for (int64_t key = 0; key < block.view->n_keys; key += SFA_KEY_SPAN) {
    if (!sfa_attn_block_sees(&block, key, key + SFA_KEY_SPAN))
      continue;
    sfa_attn_block_span(&block, key / SFA_KEY_SPAN, first ? total : part);
    if (!first)
      sfa_attn_block_join(&block, total, part);
    first = false;
  }
  if (first)
    sfa_attn_state_clear(plan, total);
  sfa_attn_block_finish(&block, total);
  sfa_attn_clock_stop(&block, start);
}

void sfa_attn_prefill(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_view *views) {
  sfa_attn_call call = {plan, args, views};
  sfa_parallel(plan->ctx, (int64_t)plan->options.n_sequences * plan->options.n_kv_heads * plan->n_blocks, prefill_item, &call);
}
