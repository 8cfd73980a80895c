/* attn/attn_policy.h: the ways to compute a call as a table, and which of them a plan takes. */
#ifndef SFA_ATTN_POLICY_H
#define SFA_ATTN_POLICY_H

#include "attn/attn_plan.h"

#include <sfa/plan.h>

enum { SFA_ATTN_WHY_BYTES = 224 };

/* One way. Another file that computes calls its own way adds a row to the table in attn_policy.c, and nothing else. */
typedef struct sfa_attn_way {
  const char *name;
  /* Whether it can do the plan's call (options and instruction set; the shape is filled in). If not, `why` becomes a sentence: what is in
   * the way, with the values, and what to choose. NULL: it can do every call. */
  bool (*fits)(const sfa_attention_plan *plan, char why[SFA_ATTN_WHY_BYTES]);
  /* Bytes of workspace that it wants beside the common ones, at plan->way_memory; NULL: none. */
  size_t (*workspace_bytes)(const sfa_attention_plan *plan);
  /* Contract: sfa_backend.attend. NULL: the policy is not a way of its own. */
  void (*run)(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_view *views);
} sfa_attn_way;

/* The row of a policy. */
const sfa_attn_way *sfa_attn_way_of(sfa_policy policy);

/* Sets plan->policy, densify and reason: what options.policy asks for, or what costs least. A pure function of the options, the instruction
 * set and the costs. False: the asked one does not fit, and `why` says so. */
bool sfa_attn_policy_choose(sfa_attention_plan *plan, char why[SFA_ATTN_WHY_BYTES]);

#endif
