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

static int64_t stored_bytes(int64_t n_rows, const sfa_row_format *f) {
  return n_rows * (int64_t)(sfa_row_ids_bytes(f) + sfa_row_values_bytes(f) + sfa_row_scale_bytes(f));
}

sfa_status sfa_attention_plan_report(const sfa_attention_plan *plan, sfa_attention_report *report) {
  if (!plan)
    return SFA_ERROR_ARGUMENT;
  const sfa_attention_options *o = &plan->options;
  int64_t n_keys = (int64_t)o->n_sequences * o->n_kv_heads * o->max_seqlen_k;
  sfa_row_format dense_key = {o->head_dim, 0, o->k_dtype};
  SFA_REQUIRE(plan->ctx, report, "report is NULL");
  SFA_REQUIRE(plan->ctx, report->struct_size == sizeof *report, "report.struct_size is %zu: set it to sizeof(sfa_attention_report) = %zu",
              report->struct_size, sizeof *report);
  *report = (sfa_attention_report){.struct_size = sizeof *report,
                                   .policy = plan->policy,
                                   .densified = plan->densify,
                                   .reason = plan->reason,
                                   .key_bytes = stored_bytes(n_keys, &plan->k_format),
                                   .value_bytes = stored_bytes(n_keys, &plan->v_format),
                                   .dense_key_bytes = stored_bytes(n_keys, &dense_key),
                                   .workspace_bytes = (int64_t)plan->workspace_bytes};
  if (plan->ctx->backend->predict)
    plan->ctx->backend->predict(plan, report);
  return SFA_OK;
}
