/* check_forward.h: attention of one head composed of slots, and its judgement by the oracle. */
#ifndef SFA_CHECK_FORWARD_H
#define SFA_CHECK_FORWARD_H

#include "check.h"
#include "oracle.h"

/* out [T][E], lse [T] of one head; of the problem: sizes, k_q, k_k, masks (queries always by codes). W: width of the query tiles. */
void check_attend(check *c, const sfa_kernels *kernels, const oracle_problem *problem, int W, float *out, float *lse);
/* Fails the running case if out or lse is further from the oracle than the tolerance rule allows. */
void check_attention_judge(check *c, const oracle_problem *problem, const float *out, const float *lse);

#endif
