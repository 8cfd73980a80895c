/* attn/attn_plan.h: everything about a call that its options decide. Pure functions of shape, so that the same call does the same work
 * whatever the data, the threads or the machine. */
#ifndef SFA_ATTN_PLAN_H
#define SFA_ATTN_PLAN_H

#include <sfa/plan.h>

#include "backend/backend.h"
#include "kernel/kernel.h"

enum {
  SFA_KEY_SPAN = 4096,  /* keys of a span, counted from key 0: each has a softmax state of its own, joined in rising order. Part of the
                         * definition of the bits: it lets one query share out a long cache over threads */
  SFA_MAX_STRIPS = 4,   /* blocks of an item at most */
  SFA_ENCODE_ROWS = 256 /* rows of an item where dense keys or values are coded first */
};

/* Contract: sfa_backend.plan. */
sfa_status sfa_attn_plan_fill(sfa_attention_plan *plan, const sfa_costs *costs);
/* Contract: sfa_backend.predict. */
void sfa_attn_report_times(const sfa_attention_plan *plan, sfa_attention_report *report);

/* From ctx, kernels, options and costs, which must be checked: group to encode_v. Then comes the choice of the policy (attn_policy.h), then
 * the workspace. */
void sfa_attn_plan_shape(sfa_attention_plan *plan);
/* False if the workspace does not fit an address. */
bool sfa_attn_plan_workspace(sfa_attention_plan *plan);

/* KEYS and POSTINGS: lanes are keys. */
static inline bool sfa_attn_lanes_are_keys(const sfa_attention_plan *plan) {
  return plan->policy == SFA_POLICY_KEYS || plan->policy == SFA_POLICY_POSTINGS;
}
/* Whether an index that comes with the arguments is used: always, or where it is faster. */
static inline bool sfa_attn_takes_postings(const sfa_attention_plan *plan) {
  return plan->policy == SFA_POLICY_POSTINGS || (plan->policy == SFA_POLICY_KEYS && plan->options.policy == SFA_POLICY_AUTO &&
                                                 plan->k_format.k > 0 && plan->k_format.k <= SFA_EXACT_TERMS);
}

/* Softmax state of a block's rows over some keys: unnormalised, m in units of log2. */
typedef struct sfa_attn_state {
  float *m, *l; /* [W] */
  float *o;     /* [W][E] */
} sfa_attn_state;

/* One thread's memory: what all strips of an item share, and what one of them has for itself. */
typedef struct sfa_attn_scratch {
  int64_t *stage_ns;                /* [SFA_STAGE_COUNT] */
  float *q_rows;                    /* [W][D] */
  float *q_step;                    /* [W] of rows rounded to meet int8 keys */
  void *q_table;                    /* [W] tables of score_keys, where lanes are keys */
  int32_t *index_sums;              /* [4096] with an index of postings */
  float *index_scores;              /* [W][4096] */
  float *q_values;                  /* [W][K_q] */
  unsigned char *q_ids;             /* [W][K_q] */
  const void **id_rows;             /* [W] */
  const float **value_rows;         /* [W] */
  float *k_rows;                    /* [64][K_k or D] */
  unsigned char *k_ids;             /* [64][K_k] */
  float *k_dense;                   /* [64][D], with densify */
  float *v_rows;                    /* [64][E] */
  uint16_t *scales;                 /* [64] */
  float *k_scale, *v_scale;         /* [64] */
  float *scores;                    /* [64][W] */
  float *alpha;                     /* [W] */
  int32_t *tile_position, *lo, *hi; /* [W] place of the query, first and last key that it sees, relative to a tile */
  sfa_key_lists *lists;             /* of a tile, with SFA_POLICY_PAPER */
  void *encode;                     /* of sfa_code_rows */
  /* Of one strip: */
  float *q_tile;            /* [D][W] */
  unsigned char *csr_ids;   /* [W][K_q], with SFA_POLICY_PAPER */
  float *csr_values;        /* [W][K_q] */
  float *slope;             /* [W] */
  int64_t *row;             /* [W] of the query in out: token * H + head */
  int32_t *head, *position; /* [W] its head, and its place among the keys */
  sfa_attn_state total, part;
} sfa_attn_scratch;

/* Lays the pointers over memory, for one strip; NULL counts only. Returns the bytes for all strips. */
size_t sfa_attn_scratch_place(const sfa_attention_plan *plan, void *memory, int32_t strip, sfa_attn_scratch *scratch);
size_t sfa_attn_state_place(const sfa_attention_plan *plan, void *memory, sfa_attn_state *state);

#endif
