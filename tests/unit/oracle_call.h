/* oracle_call.h: a call of sfa_attention_run as the oracle has it: a problem for each sequence. */
#ifndef ORACLE_CALL_H
#define ORACLE_CALL_H

#include <sfa/attention.h>

#include "oracle.h"

static inline int storage_of(sfa_dtype dtype) {
  static const int storage[] = {ORACLE_F32, ORACLE_F32, ORACLE_BF16, ORACLE_F16, ORACLE_I8, ORACLE_I4, ORACLE_E4M3};
  return storage[dtype];
}

/* First token and number of tokens of sequence b. */
static inline int64_t range(const int32_t *cu_seqlens, int64_t max_seqlen, int32_t b, int64_t *n) {
  *n = cu_seqlens ? cu_seqlens[b + 1] - cu_seqlens[b] : max_seqlen;
  return cu_seqlens ? cu_seqlens[b] : b * max_seqlen;
}

/* Sequence b of a call whose arguments are f32; *q0, *k0: its first tokens. */
static inline oracle_problem oracle_of(const sfa_attention_options *o, const sfa_attention_args *a, int32_t b, int64_t *q0, int64_t *k0) {
  int64_t T, S;
  *q0 = range(a->cu_seqlens_q, o->max_seqlen_q, b, &T);
  *k0 = range(a->cu_seqlens_k, o->max_seqlen_k, b, &S);
  return (oracle_problem){.n_queries = (int)T,
                          .n_keys = (int)S,
                          .n_heads = o->n_heads,
                          .n_kv_heads = o->n_kv_heads,
                          .head_dim = o->head_dim,
                          .head_dim_v = o->head_dim_v,
                          .k_q = o->k_q,
                          .k_k = o->k_k,
                          .k_storage = storage_of(o->k_dtype),
                          .v_storage = storage_of(o->v_dtype),
                          .softmax_scale = o->softmax_scale,
                          .softcap = o->softcap,
                          .causal = o->causal,
                          .has_window = o->has_window,
                          .window_left = o->window_size[0],
                          .window_right = o->window_size[1],
                          .n_sink_tokens = o->n_sink_tokens,
                          .sink_logit = a->sink_logit,
                          .alibi_slopes = a->alibi_slopes,
                          .q = (const float *)a->q.data + *q0 * o->n_heads * o->head_dim,
                          .k = (const float *)a->k.data + *k0 * o->n_kv_heads * o->head_dim,
                          .v = (const float *)a->v.data + *k0 * o->n_kv_heads * o->head_dim_v};
}

#endif
