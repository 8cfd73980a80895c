/* attn/attn_half.h: SFA_POLICY_HALF_CODES and HALF_DENSE, attention in 16-bit arithmetic on machines with AMX. Rows of the table in
 * attn_policy.c; contracts there. */
#ifndef SFA_ATTN_HALF_H
#define SFA_ATTN_HALF_H

#include "attn/attn_policy.h"

bool sfa_attn_half_codes_fits(const sfa_attention_plan *plan, char why[SFA_ATTN_WHY_BYTES]);
bool sfa_attn_half_dense_fits(const sfa_attention_plan *plan, char why[SFA_ATTN_WHY_BYTES]);
/* At plan->way_memory. */
size_t sfa_attn_half_workspace_bytes(const sfa_attention_plan *plan);
void sfa_attn_half(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_view *views);

#endif
