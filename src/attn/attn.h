/* attn/attn.h: attention on the CPU, as the API and the backend table see it. Arguments are checked, strides filled in. */
#ifndef SFA_ATTN_H
#define SFA_ATTN_H

#include "attn/attn_plan.h"

/* Views [B] of keys and values that came as arguments: in place, or stored in the workspace first (top-k, rounding).
 * SFA_ERROR_RANGE: a value that the storage type cannot hold. */
sfa_status sfa_attn_prepare(const sfa_attention_plan *plan, const sfa_attention_args *args, sfa_kv_view *views);

/* The policy of the plan. Contracts: sfa_backend.run, attend, merge. */
sfa_status sfa_attn_run(const sfa_attention_plan *plan, const sfa_attention_args *args);
void sfa_attn_attend(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_view *views);
sfa_status sfa_attn_merge(sfa_context *ctx, int64_t n_rows, int32_t head_dim_v, float *out_a, float *lse_a, const float *out_b,
                          const float *lse_b);
/* SFA_POLICY_TILES: many rows, an item all keys of a few blocks; few rows over many keys, an item a span, joined afterwards. */
void sfa_attn_tiles(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_view *views);
void sfa_attn_prefill(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_view *views);
void sfa_attn_decode(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_view *views);

/* Tokens of sequence b: its first in the packed arrays (or b * max_seqlen), their number. */
void sfa_attn_token_range(const int32_t *cu_seqlens, int64_t max_seqlen, int32_t b, int64_t *first, int64_t *n_tokens);

/* A thread's scratch in the workspace, for one strip; the times that threads noted there: to zero before the work, added to args.stage_ns
 * after it. */
void sfa_attn_scratch_of(const sfa_attention_plan *plan, const sfa_attention_args *args, int32_t thread, int32_t strip,
                         sfa_attn_scratch *scratch);
void sfa_attn_stages_clear(const sfa_attention_plan *plan, const sfa_attention_args *args);
void sfa_attn_stages_add(const sfa_attention_plan *plan, const sfa_attention_args *args);

#endif
