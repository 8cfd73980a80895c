/* api/api_attention.h: what the calls of sfa_attention_run, run_cached and run_paged share. */
#ifndef SFA_API_ATTENTION_H
#define SFA_API_ATTENTION_H

#include "backend/backend.h"

/* All arguments but keys and values; *out is *args with its defaults filled in. */
sfa_status sfa_check_attention_args(const sfa_attention_plan *plan, const sfa_attention_args *args, sfa_attention_args *out);
/* The same with keys and values: all that sfa_attention_run wants. */
sfa_status sfa_check_run_args(const sfa_attention_plan *plan, const sfa_attention_args *args, sfa_attention_args *out);
/* That the call wants no index, which only caches have. */
sfa_status sfa_check_no_postings(const sfa_attention_plan *plan, const sfa_attention_args *args);
/* Whether keys and values stored so are those of the plan; `what` stores them. */
sfa_status sfa_check_stored(const sfa_attention_plan *plan, const char *what, int32_t n_kv_heads, const sfa_row_format *k,
                            const sfa_row_format *v);
/* The workspace's room for views [B]. */
sfa_kv_view *sfa_attention_views(const sfa_attention_plan *plan, const sfa_attention_args *args);
/* Memory that a call works in; name: of the function that tells its bytes. */
sfa_status sfa_check_workspace(sfa_context *ctx, const void *workspace, const char *name, size_t bytes);

#endif
