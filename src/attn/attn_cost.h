/* attn/attn_cost.h: what a call should cost, from a table of costs. Pure functions, but for the last, which times the kernels. */
#ifndef SFA_ATTN_COST_H
#define SFA_ATTN_COST_H

#include "attn/attn_plan.h"

/* Predicted nanoseconds of a whole call on one thread, by stage. */
typedef struct sfa_attn_times {
  double topk, pack, score, softmax, value, call;
} sfa_attn_times;

static inline double sfa_attn_times_total(const sfa_attn_times *t) {
  return t->topk + t->pack + t->score + t->softmax + t->value + t->call;
}

/* The plan's shape must be filled in (sfa_attn_plan_shape); its own policy does not matter. densify: see plan->densify. */
void sfa_attn_predict(const sfa_attention_plan *plan, sfa_policy policy, bool densify, sfa_attn_times *times);
/* The table of an instruction set in the source; SFA_ISA_DEFAULT is not one. */
const sfa_costs *sfa_attn_costs_of(sfa_isa isa);
/* Whether every entry is a finite time that the model can use: positive, or 0 where the instruction set has no such kernels. */
bool sfa_attn_costs_usable(const sfa_costs *costs);

/* Predicted nanoseconds of scoring n_keys of a cached sequence by its codes for n_rows query rows; and by an index, in the units of
 * sfa_attn_postings_work. */
double sfa_attn_cost_scan(const sfa_attention_plan *plan, const sfa_kv_view *view, int64_t n_keys, int32_t n_rows);
double sfa_attn_cost_index(const sfa_attention_plan *plan, const sfa_kv_view *view, int64_t steps, int64_t bytes);

/* Contract: sfa_costs_measure (attn_measure.c). */
sfa_status sfa_attn_costs_measure(sfa_context *ctx, sfa_costs *costs);

/* Times the 16-bit kernels of the context's instruction set (attn_measure_half.c): memory and random data once, then as many readings of
 * the half entries of a table as wanted. The probe is one block of sfa_alloc. */
typedef struct sfa_attn_half_probe sfa_attn_half_probe;
sfa_status sfa_attn_half_probe_create(sfa_context *ctx, sfa_attn_half_probe **probe);
void sfa_attn_half_probe_read(sfa_attn_half_probe *probe, sfa_costs *costs);

#endif
