/* What the planner chose and what it expects: sfa/plan.h. */
#include <sfa/plan.h>

#include "attn/attn_cost.h"
#include "attn/attn_policy.h"

void sfa_costs_default(sfa_isa isa, sfa_costs *costs) { *costs = *sfa_attn_costs_of(isa == SFA_ISA_DEFAULT ? sfa_isa_best() : isa); }

sfa_status sfa_costs_measure(sfa_context *ctx, sfa_costs *costs) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(ctx, costs, "costs is NULL");
  return sfa_attn_costs_measure(ctx, costs);
}

/* The plan of the same call with dense rows, as far as the prediction looks at it; *ns what AUTO would come to. */
static double dense_prediction(const sfa_attention_plan *plan) {
  sfa_attention_plan dense = *plan;
  char why[SFA_ATTN_WHY_BYTES];
  sfa_attn_times times;
  dense.options.policy = SFA_POLICY_AUTO;
  dense.options.k_q = dense.options.k_k = 0;
  sfa_attn_plan_shape(&dense);
  sfa_attn_policy_choose(&dense, why); /* AUTO always finds one */
  sfa_attn_predict(&dense, dense.policy, false, &times);
  return sfa_attn_times_total(&times);
}

static int64_t stored_bytes(int64_t n_rows, const sfa_row_format *f) {
  return n_rows * (int64_t)(sfa_row_ids_bytes(f) + sfa_row_values_bytes(f) + sfa_row_scale_bytes(f));
}

sfa_status sfa_attention_plan_report(const sfa_attention_plan *plan, sfa_attention_report *report) {
  if (!plan)
    return SFA_ERROR_ARGUMENT;
  const sfa_attention_options *o = &plan->options;
  SFA_REQUIRE(plan->ctx, report, "report is NULL");
  SFA_REQUIRE(plan->ctx, report->struct_size == sizeof *report, "report.struct_size is %zu: set it to sizeof(sfa_attention_report) = %zu",
              report->struct_size, sizeof *report);
  sfa_attn_times t;
  sfa_attn_predict(plan, plan->policy, plan->densify, &t);
  double dense_ns = dense_prediction(plan);
  int64_t n_keys = (int64_t)o->n_sequences * o->n_kv_heads * o->max_seqlen_k;
  sfa_row_format dense_key = {o->head_dim, 0, o->k_dtype};
  *report = (sfa_attention_report){
      .struct_size = sizeof *report,
      .policy = plan->policy,
      .densified = plan->densify,
      .reason = plan->reason,
      .topk_ns = t.topk,
      .pack_ns = t.pack,
      .score_ns = t.score,
      .softmax_ns = t.softmax,
      .value_ns = t.value,
      .call_ns = t.call,
      .dense_ns = dense_ns,
      .key_bytes = stored_bytes(n_keys, &plan->k_format),
      .value_bytes = stored_bytes(n_keys, &plan->v_format),
      .dense_key_bytes = stored_bytes(n_keys, &dense_key),
      .workspace_bytes = (int64_t)plan->workspace_bytes,
      .dense_wins = dense_ns < sfa_attn_times_total(&t),
  };
  return SFA_OK;
}
