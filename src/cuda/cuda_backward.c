/* Gradients on a GPU: the operands as the forward had them, as rows with their supports, then the stage; then the rope's way back. */
#include "cuda/cuda_state.h"

size_t sfa_cuda_gradients_bytes(const sfa_attention_plan *plan) {
  size_t parts[SFA_CUDA_N_PARTS + 1];
  return sfa_cuda_parts(plan, true, parts) ? parts[SFA_CUDA_N_PARTS] : 0;
}

static sfa_status check(const sfa_attention_plan *plan) {
  const sfa_attention_options *o = &plan->options;
  const sfa_cuda_stages *stages = sfa_cuda_stages_of(plan->ctx);
  enum { MOST_DIM = 256 };
  if (plan->ctx->cuda->compute != 90)
    return sfa_fail(plan->ctx, SFA_ERROR_UNSUPPORTED,
                    "gradients need a GPU of compute capability 9.0, this one has %d.%d: compute them on the CPU",
                    plan->ctx->cuda->compute / 10, plan->ctx->cuda->compute % 10);
  if (!stages->backward || !stages->select || !stages->gather)
    return sfa_fail(plan->ctx, SFA_ERROR_UNSUPPORTED, "this build of libsfa_cuda.so has no gradients");
  if (o->head_dim > MOST_DIM || o->head_dim_v > MOST_DIM)
    return sfa_fail(plan->ctx, SFA_ERROR_UNSUPPORTED, "head_dim is %d, head_dim_v %d: gradients on a GPU take up to %d", o->head_dim,
                    o->head_dim_v, MOST_DIM);
  return SFA_OK;
}

/* d_q, or d_k, of the rows as they were given. */
static sfa_status turn_back(sfa_context *ctx, const sfa_cuda_operand *p, float *rows, int64_t token_stride) {
  if (!rows || p->codes || !p->x->rope)
    return SFA_OK;
  return sfa_cuda_status(
      ctx, "the rope's way back",
      sfa_cuda_help_of(ctx)->unrotate(&p->tokens, p->n_heads, p->dim, p->x->rope, rows, token_stride, ctx->cuda->stream));
}

static sfa_cuda_gradient written(float *rows, int64_t token_stride, const sfa_cuda_operand *p, float *values, int32_t k) {
  return (sfa_cuda_gradient){.rows = {.data = rows, .dtype = SFA_F32, .token_stride = token_stride, .head_stride = p->dim},
                             .values = values,
                             .k = k,
                             .support = p->support};
}

sfa_status sfa_cuda_gradients(const sfa_attention_plan *plan, const sfa_attention_grad_args *args) {
  sfa_context *ctx = plan->ctx;
  const sfa_attention_options *o = &plan->options;
  const sfa_attention_args *forward = args->forward;
  unsigned char *workspace = args->workspace;
  size_t parts[SFA_CUDA_N_PARTS + 1];
  sfa_cuda_operands p;
  sfa_cuda_parts(plan, true, parts);
  SFA_TRY(check(plan));
  SFA_TRY(sfa_cuda_enter(ctx));
  SFA_TRY(sfa_cuda_laps_begin(ctx, args->stage_ns));
  sfa_cuda_operands_of(plan, forward, parts, false, &p);
  if (p.q.k || p.q.codes)
    p.q.support = (uint32_t *)(void *)(workspace + parts[SFA_CUDA_PART_Q_SUPPORT]);
  if (p.k.k || p.k.codes)
    p.k.support = (uint32_t *)(void *)(workspace + parts[SFA_CUDA_PART_K_SUPPORT]);
  if (p.q.codes || p.k.codes)
    SFA_TRY(sfa_cuda_put_numbers(plan, forward, parts));
  sfa_cuda_backward b = sfa_cuda_backward_shape(plan);
  b.q_tokens = p.q.tokens;
  b.k_tokens = p.k.tokens;
  b.scores = sfa_cuda_scores_of(plan, forward);
  SFA_TRY(sfa_cuda_rows_of(ctx, &p.q, &b.q));
  SFA_TRY(sfa_cuda_rows_of(ctx, &p.k, &b.k));
  SFA_TRY(sfa_cuda_rows_of(ctx, &p.v, &b.v));
  SFA_TRY(sfa_cuda_lap(ctx, SFA_STAGE_TOPK));
  b.out = sfa_cuda_rows_in(forward->out, SFA_F32, o->n_heads, o->head_dim_v);
  b.d_out = sfa_cuda_rows_in((void *)(uintptr_t)args->d_out, SFA_F32, o->n_heads, o->head_dim_v);
  b.lse = forward->lse;
  b.d_lse = args->d_lse;
  b.d_q = written(args->d_q, args->d_q_token_stride, &p.q, args->d_q_values, o->k_q);
  b.d_k = written(args->d_k, args->d_k_token_stride, &p.k, args->d_k_values, o->k_k);
  b.d_v = written(args->d_v, args->d_v_token_stride, &p.v, NULL, 0);
  b.d_sink_logit = args->d_sink_logit;
  b.workspace = workspace + parts[SFA_CUDA_PART_STAGE];
  SFA_TRY(sfa_cuda_status(ctx, "gradients", sfa_cuda_stages_of(ctx)->backward(&b, ctx->cuda->stream)));
  SFA_TRY(turn_back(ctx, &p.q, args->d_q, args->d_q_token_stride));
  SFA_TRY(turn_back(ctx, &p.k, args->d_k, args->d_k_token_stride));
  SFA_TRY(sfa_cuda_lap(ctx, SFA_STAGE_ATTEND));
  return sfa_cuda_laps_end(ctx);
}
