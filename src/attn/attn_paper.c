/* Algorithm 1 of the paper: queries as compressed rows (CSR), keys as posting lists (CSC), scores by scatter-add into the tile. The paper
 * keeps one list a feature for the whole sequence and finds a tile's part of it by binary search; here the lists are made for each tile, so
 * that they are its part, and blocks that share the tile share them. Masks, softmax and values are the tile loop's. */
#include "attn/attn_paper.h"

#include <stdio.h>
#include <string.h>

bool sfa_attn_paper_fits(const sfa_attention_plan *plan, char why[SFA_ATTN_WHY_BYTES]) {
  const sfa_attention_options *o = &plan->options;
  if (o->k_q > 0 && o->k_q < o->head_dim && o->k_k > 0 && o->k_k < o->head_dim)
    return true;
  snprintf(why, SFA_ATTN_WHY_BYTES,
           "it walks codes of queries and keys, and k_q is %d, k_k %d: give both from 1 to head_dim - 1 = %d, or choose SFA_POLICY_TILES",
           o->k_q, o->k_k, o->head_dim - 1);
  return false;
}

void sfa_attn_paper_queries(const sfa_attn_block *block) {
  const sfa_attention_plan *plan = block->call->plan;
  const sfa_attn_scratch *s = &block->scratch;
  int32_t D = plan->options.head_dim, K = plan->options.k_q;
  size_t row_bytes = (size_t)K * sfa_id_bytes(D);
  for (int32_t i = 0; i < block->n_rows; i++) {
    memcpy(s->csr_ids + (size_t)i * row_bytes, s->id_rows[i], row_bytes);
    for (int32_t u = 0; u < K; u++) {
      int64_t feature = sfa_id_at(s->id_rows[i], D, u);
      s->csr_values[(int64_t)i * K + u] = s->q_tile[feature * plan->width + i];
    }
  }
}

void sfa_attn_paper_lists(const sfa_attn_block *block, int32_t n_keys, const void *ids, const float *values) {
  const sfa_key_lists *lists = block->scratch.lists;
  int32_t D = block->call->plan->options.head_dim, K = block->view->k.format.k, *starts = lists->starts;
  memset(starts, 0, ((size_t)D + 2) * sizeof *starts);
  starts += 2; /* counts of feature u at starts[u], which placing turns into the beginning of u + 1's list */
  for (int32_t at = 0; at < n_keys * K; at++)
    starts[sfa_id_at(ids, D, at)]++;
  for (int32_t u = 1; u < D; u++)
    starts[u] += starts[u - 1];
  starts--;
  for (int32_t at = 0; at < n_keys * K; at++) {
    int32_t place = starts[sfa_id_at(ids, D, at)]++;
    lists->keys[place] = (uint8_t)(at / K);
    lists->values[place] = values[at];
  }
}

void sfa_attn_paper_scores(const sfa_attn_block *block, int32_t n_keys, const float *key_scale) {
  const sfa_attention_plan *plan = block->call->plan;
  const sfa_attn_scratch *s = &block->scratch;
  plan->kernels->score_lists(n_keys, block->n_rows, plan->options.k_q, s->csr_ids, (int32_t)sfa_id_bytes(plan->options.head_dim),
                             s->csr_values, s->lists, key_scale, plan->width, s->scores);
}
