/* Many query rows: an item is a few blocks of rows of one kv head with all the keys that they see. */
#include "attn/attn_tile.h"

/* Strips of an item among the blocks of a kv head: item 0 has the last ones, which see most keys under a causal mask, so that what is
 * left at the end is short. */
static int32_t find_blocks(const sfa_attn_call *call, int64_t item, int32_t thread, sfa_attn_block *blocks) {
  const sfa_attention_plan *plan = call->plan;
  int64_t n_items =
      (plan->n_blocks + plan->n_strips - 1) / plan->n_strips; /* of a kv head: heads one after the other keep their keys cached */
  int64_t first = (n_items - 1 - item % n_items) * plan->n_strips, pair = item / n_items;
  int32_t g = (int32_t)(pair % plan->options.n_kv_heads), b = (int32_t)(pair / plan->options.n_kv_heads), n = 0;
  while (n < plan->n_strips && sfa_attn_block_find(call, b, g, first + n, thread, n, &blocks[n]))
    n++;
  return n;
}

void sfa_attn_blocks_attend(sfa_attn_block *blocks, int32_t n_blocks) {
  sfa_attn_block *seeing[SFA_MAX_STRIPS];
  bool started[SFA_MAX_STRIPS] = {false}; /* total holds the spans before */
  int64_t start = sfa_attn_clock(&blocks[0]), n_keys = blocks[0].view->n_keys;
  for (int32_t i = 0; i < n_blocks; i++)
    sfa_attn_block_load(&blocks[i]);
  for (int64_t key = 0; key < n_keys; key += SFA_KEY_SPAN) {
    int32_t n_seeing = 0;
    for (int32_t i = 0; i < n_blocks; i++)
      if (sfa_attn_block_sees(&blocks[i], key, key + SFA_KEY_SPAN)) {
        blocks[i].state = started[i] ? &blocks[i].scratch.part : &blocks[i].scratch.total;
        seeing[n_seeing++] = &blocks[i];
      }
    if (!n_seeing)
      continue;
    sfa_attn_blocks_span(seeing, n_seeing, key / SFA_KEY_SPAN);
    for (int32_t j = 0; j < n_seeing; j++) {
      int64_t i = seeing[j] - blocks;
      if (started[i])
        sfa_attn_block_join(&blocks[i], &blocks[i].scratch.total, &blocks[i].scratch.part);
      started[i] = true;
    }
  }
  for (int32_t i = 0; i < n_blocks; i++) {
    if (!started[i])
      sfa_attn_state_clear(blocks[i].call->plan, &blocks[i].scratch.total);
    sfa_attn_block_finish(&blocks[i], &blocks[i].scratch.total, NULL);
  }
  sfa_attn_clock_stop(&blocks[0], start);
}

static void prefill_item(void *arg, int64_t item, int32_t thread) {
  sfa_attn_block blocks[SFA_MAX_STRIPS];
  int32_t n_blocks = find_blocks(arg, item, thread, blocks);
  if (n_blocks)
    sfa_attn_blocks_attend(blocks, n_blocks);
}

void sfa_attn_prefill(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_view *views) {
  sfa_attn_call call = {plan, args, views};
  int64_t n_items = (plan->n_blocks + plan->n_strips - 1) / plan->n_strips;
  sfa_parallel(plan->ctx, (int64_t)plan->options.n_sequences * plan->options.n_kv_heads * n_items, prefill_item, &call);
}
