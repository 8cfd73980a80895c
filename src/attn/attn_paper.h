/* attn/attn_paper.h: the policy PAPER, a step of the tile loop: scores by Algorithm 1 of the paper. */
#ifndef SFA_ATTN_PAPER_H
#define SFA_ATTN_PAPER_H

#include "attn/attn_policy.h"
#include "attn/attn_tile.h"

/* The row of the policy table. */
bool sfa_attn_paper_fits(const sfa_attention_plan *plan, char why[SFA_ATTN_WHY_BYTES]);

/* The block's queries as compressed rows: scratch.csr_ids and csr_values. Ids are those of scratch.id_rows, values those of the q_tile,
 * scaled or rounded as the other policies have them. */
void sfa_attn_paper_queries(const sfa_attn_block *block);
/* A tile's codes as one list of keys a feature: scratch.lists. ids, values [n_keys][K]. */
void sfa_attn_paper_lists(const sfa_attn_block *block, int32_t n_keys, const void *ids, const float *values);
/* scratch.scores [n_keys][W]. key_scale: of int8 keys, else NULL. */
void sfa_attn_paper_scores(const sfa_attn_block *block, int32_t n_keys, const float *key_scale);

#endif
