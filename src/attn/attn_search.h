/* attn/attn_search.h: the scores of one query against all keys of a sequence. */
#ifndef SFA_ATTN_SEARCH_H
#define SFA_ATTN_SEARCH_H

#include "attn/attn_postings.h"

/* scores [n_keys] of kv head g: softmax_scale * q.k. q [D] is used up: it is rounded as attention rounds it. Sealed blocks of `postings`
 * (NULL: none) that the view still has are read there, the other keys as they are stored. */
sfa_status sfa_attn_search_scores(sfa_context *ctx, const sfa_kv_view *view, int32_t g, const sfa_postings *postings, float softmax_scale,
                                  int64_t n_keys, float *q, float *scores);
/* keys [n_hits]: those of the highest scores, highest first, ties to the lower key, NaN before all. n_hits <= n_keys. */
void sfa_attn_search_top(int64_t n_keys, const float *scores, int64_t n_hits, uint64_t *keys);

#endif
