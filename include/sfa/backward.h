/* sfa/backward.h: gradients of attention, dense or over codes (paper section 3, docs/MATH.md 4).
 *
 * Straight-through: the gradient of a kept feature passes, that of a dropped one is 0, and where keys or values are stored rounded it
 * passes the rounding as it is. The gradients are those of the rows as they were given: through the rope where there is one.
 *
 * What is promised about bits: they depend on the shape, the options and the data; not on n_threads nor on the instruction set. eps does
 * not matter here, and of the policy only whether it is one of the two 16-bit ways: this is one loop over tiles in f32 for every other.
 * Where the plan's forward is in 16 bits (on AMX machines: options.precision), operands of the gradients' products are rounded to bf16,
 * sums are f32, and the bits are that machine's, still the same for any n_threads. With alibi_slopes it is the f32 loop, as forward. Inputs
 * and d_out should be finite: an inf or NaN reaches the gradients, also from pairs that a mask leaves out.
 *
 * On a CUDA context every array is device memory (sfa/attention.h), operands are rounded to bf16, and sums have an order of their own: the
 * same bits from run to run.
 */
#ifndef SFA_BACKWARD_H
#define SFA_BACKWARD_H

#include <sfa/attention.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sfa_attention_grad_args {
  size_t struct_size; /* sizeof(sfa_attention_grad_args) */

  /* What sfa_attention_run was given, and the out and lse that it filled. Its workspace, dropped and stage_ns are not looked at. Codes that
   * were made before save making them again; then the gradients are those of the rows that they were made of, and a rope beside them is
   * not looked at. */
  const sfa_attention_args *forward;

  const float *d_out; /* [B][T][H][E], contiguous: gradient of out */
  const float *d_lse; /* [B][T][H], gradient of lse; NULL: 0 */

  /* Written whole; tokens token_stride elements apart (0: heads * dim), a token's heads one after the other. With cu_seqlens tokens are
   * packed as they are in q, k and v; without, sequence b begins at token b * max_seqlen. */
  float *d_q; /* [B][T][H][D] zeros outside of the support; NULL where d_q_values is wanted alone */
  int64_t d_q_token_stride;
  float *d_k; /* [B][S][G][D] likewise, and d_k_values */
  int64_t d_k_token_stride;
  float *d_v; /* [B][S][G][E] */
  int64_t d_v_token_stride;
  float *d_sink_logit; /* [H], written; NULL: not wanted */

  /* The same written compact: gradients of the values of codes (sfa_codes), in the order of their ids, contiguous. They are of the rows
   * that were cut: turned ones where there is a rope, in d_q and d_k it is turned back. NULL: not wanted. */
  float *d_q_values; /* [B][T][H][k_q] */
  float *d_k_values; /* [B][S][G][k_k] */

  void *workspace; /* 64-byte aligned, sfa_attention_backward_workspace_bytes; may be the memory that the forward worked in */

  int64_t *stage_ns; /* [SFA_STAGE_COUNT] or NULL: time is added here, summed over threads */
} sfa_attention_grad_args;

/* Bytes that the backward of a plan wants; linear in max_seqlen_q + max_seqlen_k. */
SFA_API size_t sfa_attention_backward_workspace_bytes(const sfa_attention_plan *plan);

/* Gradients of sfa_attention_run. Neither allocates nor fails for memory. Arguments that do not fit the plan: SFA_ERROR_ARGUMENT.
 * Cost: dense, 5 products of T x S x D to the forward's 2; over codes two of them stay dense, the others take about K steps a pair. */
SFA_API sfa_status sfa_attention_backward(const sfa_attention_plan *plan, const sfa_attention_grad_args *args);

#ifdef __cplusplus
}
#endif
#endif
