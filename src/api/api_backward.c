/* Gradients of attention: arguments are checked here, the work is the backend's. */
#include "api/api_attention.h"
#include "api/api_check.h"

size_t sfa_attention_backward_workspace_bytes(const sfa_attention_plan *plan) {
  return plan ? sfa_backend_of(plan->ctx)->backward_bytes(plan) : 0;
}

static bool is_floats(const void *array) { return array && (uintptr_t)array % sizeof(float) == 0; }

/* Rows of gradients to write, unless values of the kept entries are enough; *stride gets its default. */
static sfa_status check_written(sfa_context *ctx, const char *name, const float *rows, const float *values, int64_t n_tokens, int64_t width,
                                int64_t *stride) {
  SFA_REQUIRE(ctx, is_floats(rows) || (!rows && values) || !n_tokens, "%s is NULL or not aligned to its elements", name);
  *stride = *stride ? *stride : width;
  int64_t bytes;
  SFA_REQUIRE(ctx, *stride >= width && !__builtin_mul_overflow(*stride, n_tokens, &bytes) && bytes <= INT64_MAX / (int64_t)sizeof(float),
              "%s_token_stride is %lld: it must be at least heads * dim = %lld, and %lld tokens so far apart must fit an address, or 0",
              name, (long long)*stride, (long long)width, (long long)n_tokens);
  return SFA_OK;
}

static sfa_status check_values(sfa_context *ctx, const char *name, const float *values, const char *k_name, int32_t k) {
  SFA_REQUIRE(ctx, !values || is_floats(values), "%s is not aligned to its elements", name);
  SFA_REQUIRE(ctx, !values || k, "%s are gradients of codes, and options.%s is 0: ask for rows, or keep features", name, k_name);
  return SFA_OK;
}

sfa_status sfa_attention_backward(const sfa_attention_plan *plan, const sfa_attention_grad_args *args) {
  if (!plan)
    return SFA_ERROR_ARGUMENT;
  sfa_context *ctx = plan->ctx;
  const sfa_attention_options *o = &plan->options;
  SFA_REQUIRE(ctx, args, "args is NULL");
  SFA_REQUIRE(ctx, args->struct_size == sizeof *args, "args.struct_size is %zu: set it to sizeof(sfa_attention_grad_args) = %zu",
              args->struct_size, sizeof *args);
  SFA_REQUIRE(ctx, args->forward, "args.forward is NULL: it is what sfa_attention_run was given");
  size_t bytes = sfa_attention_backward_workspace_bytes(plan);
  SFA_REQUIRE(ctx, bytes, "the gradients of %d sequences of %lld queries and %lld keys do not fit an address: make the shape smaller",
              o->n_sequences, (long long)o->max_seqlen_q, (long long)o->max_seqlen_k);
  SFA_TRY(sfa_check_workspace(ctx, args->workspace, "sfa_attention_backward_workspace_bytes", bytes));
  sfa_attention_args forward = *args->forward, checked_forward;
  forward.workspace = args->workspace;
  SFA_TRY(sfa_check_run_args(plan, &forward, &checked_forward));
  if ((!forward.q_codes && forward.q.norm) || (!forward.k_codes && forward.k.norm))
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED,
                    "forward.q or forward.k has a norm, which gradients do not go back through: norm the rows "
                    "before");
  sfa_attention_grad_args checked = *args;
  checked.forward = &checked_forward;
  bool here = sfa_arrays_are_here(ctx);
  int64_t n_q = here && forward.cu_seqlens_q ? forward.cu_seqlens_q[o->n_sequences] : o->n_sequences * o->max_seqlen_q;
  int64_t n_k = here && forward.cu_seqlens_k ? forward.cu_seqlens_k[o->n_sequences] : o->n_sequences * o->max_seqlen_k;
  SFA_REQUIRE(ctx, is_floats(forward.lse) || !n_q, "forward.lse is NULL or not aligned: the backward needs the lse that run writes");
  SFA_REQUIRE(ctx, is_floats(args->d_out) || !n_q, "d_out is NULL or not aligned to its elements");
  SFA_REQUIRE(ctx, !args->d_lse || is_floats(args->d_lse), "d_lse is not aligned to its elements");
  SFA_REQUIRE(ctx, !args->d_sink_logit || is_floats(args->d_sink_logit), "d_sink_logit is not aligned to its elements");
  SFA_TRY(check_values(ctx, "d_q_values", args->d_q_values, "k_q", o->k_q));
  SFA_TRY(check_values(ctx, "d_k_values", args->d_k_values, "k_k", o->k_k));
  SFA_TRY(check_written(ctx, "d_q", args->d_q, args->d_q_values, n_q, (int64_t)o->n_heads * o->head_dim, &checked.d_q_token_stride));
  SFA_TRY(check_written(ctx, "d_k", args->d_k, args->d_k_values, n_k, (int64_t)o->n_kv_heads * o->head_dim, &checked.d_k_token_stride));
  SFA_TRY(check_written(ctx, "d_v", args->d_v, NULL, n_k, (int64_t)o->n_kv_heads * o->head_dim_v, &checked.d_v_token_stride));
  return sfa_backend_of(ctx)->backward(plan, &checked);
}
