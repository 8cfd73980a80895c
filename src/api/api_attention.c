/* Plan, run, merge: arguments are checked here, the work is the backend's. */
#include "api/api_attention.h"
#include "api/api_check.h"
#include "cache/cache_pages.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Positions are int32 inside a tile, with room for a tile beyond. */
static const int64_t longest_sequence = INT32_MAX - 2 * SFA_PAGE_LEN;

/* ---- Plan ---------------------------------------------------------------------------------------------------------------------------- */

/* Whether the bytes of n_sequences * n_tokens * n_heads f32 rows are an int64: then so is every count that comes of such a shape. */
static bool rows_fit(int64_t n_sequences, int64_t n_tokens, int64_t n_heads, int32_t dim) {
  int64_t n = n_sequences;
  return !__builtin_mul_overflow(n, n_tokens, &n) && !__builtin_mul_overflow(n, n_heads, &n) &&
         !__builtin_mul_overflow(n, dim * (int64_t)sizeof(float), &n);
}

static sfa_status check_options(sfa_context *ctx, const sfa_attention_options *given, sfa_attention_options *o) {
  SFA_REQUIRE(ctx, given, "options is NULL");
  SFA_REQUIRE(ctx, given->struct_size == sizeof *given, "options.struct_size is %zu: set it to sizeof(sfa_attention_options) = %zu",
              given->struct_size, sizeof *given);
  *o = *given;
  SFA_REQUIRE(ctx, o->n_heads >= 1 && o->n_heads <= 65536, "n_heads is %d: it must be from 1 to 65536", o->n_heads);
  o->n_kv_heads = o->n_kv_heads ? o->n_kv_heads : o->n_heads;
  SFA_REQUIRE(ctx, o->n_kv_heads >= 1 && o->n_heads % o->n_kv_heads == 0, "n_kv_heads is %d: it must divide n_heads = %d", o->n_kv_heads,
              o->n_heads);
  SFA_TRY(sfa_check_head_dim(ctx, "head_dim", o->head_dim));
  o->head_dim_v = o->head_dim_v ? o->head_dim_v : o->head_dim;
  SFA_TRY(sfa_check_head_dim(ctx, "head_dim_v", o->head_dim_v));
  o->n_sequences = o->n_sequences ? o->n_sequences : 1;
  SFA_REQUIRE(ctx, o->n_sequences >= 1, "n_sequences is %d: it must be positive, or 0 for 1", o->n_sequences);
  SFA_REQUIRE(ctx,
              o->max_seqlen_q >= 0 && o->max_seqlen_q <= longest_sequence && o->max_seqlen_k >= 0 && o->max_seqlen_k <= longest_sequence,
              "max_seqlen_q is %lld, max_seqlen_k %lld: they must be from 0 to %lld", (long long)o->max_seqlen_q,
              (long long)o->max_seqlen_k, (long long)longest_sequence);
  int32_t dim = o->head_dim > o->head_dim_v ? o->head_dim : o->head_dim_v;
  SFA_REQUIRE(ctx,
              rows_fit(o->n_sequences, o->max_seqlen_q, o->n_heads, dim) && rows_fit(o->n_sequences, o->max_seqlen_k, o->n_kv_heads, dim),
              "%d sequences of %lld queries and %lld keys with %d heads of %d features do not fit an address: make the shape smaller",
              o->n_sequences, (long long)o->max_seqlen_q, (long long)o->max_seqlen_k, o->n_heads, dim);
  SFA_TRY(sfa_check_kept(ctx, "k_q", o->k_q, o->head_dim));
  SFA_TRY(sfa_check_kept(ctx, "k_k", o->k_k, o->head_dim));
  o->k_dtype = o->k_dtype ? o->k_dtype : SFA_F32;
  o->v_dtype = o->v_dtype ? o->v_dtype : SFA_F32;
  o->row_dtype = o->row_dtype ? o->row_dtype : SFA_F32;
  SFA_TRY(sfa_check_dtype(ctx, "k_dtype", o->k_dtype));
  SFA_TRY(sfa_check_value_dtype(ctx, "v_dtype", o->v_dtype));
  SFA_REQUIRE(ctx, o->row_dtype == SFA_F32 || o->row_dtype == SFA_BF16,
              "row_dtype is %d: the rows of a call are SFA_F32 or SFA_BF16 (0: SFA_F32)", (int)o->row_dtype);
  SFA_REQUIRE(ctx, o->from_cache == 0 || o->from_cache == 1, "from_cache is %d: it must be 0 or 1", o->from_cache);
  SFA_REQUIRE(ctx, isfinite(o->softmax_scale), "softmax_scale is %g: it must be finite, or 0 for 1 / sqrt(head_dim)",
              (double)o->softmax_scale);
  if (o->softmax_scale == 0)
    o->softmax_scale = (float)(1 / sqrt(o->head_dim));
  SFA_REQUIRE(ctx, o->softcap >= 0 && isfinite(o->softcap), "softcap is %g: it must be positive and finite, or 0 for none",
              (double)o->softcap);
  float unit = o->softcap > 0 ? o->softmax_scale / o->softcap : o->softmax_scale * (float)M_LOG2E; /* that queries are multiplied by */
  SFA_REQUIRE(ctx, isfinite(unit), "softmax_scale is %g, softcap %g: beyond f32 as a factor of queries, give a smaller scale or larger cap",
              (double)o->softmax_scale, (double)o->softcap);
  SFA_REQUIRE(ctx, (o->causal | o->has_window) == (o->causal || o->has_window), "causal is %d, has_window %d: they must be 0 or 1",
              o->causal, o->has_window);
  for (int side = 0; side < 2; side++) {
    SFA_REQUIRE(ctx, !o->has_window || o->window_size[side] >= -1,
                "window_size[%d] is %lld: it must be a number of keys, or -1 for unlimited", side, (long long)o->window_size[side]);
    o->window_size[side] = sfa_min64(o->window_size[side], INT32_MAX);
  }
  SFA_REQUIRE(ctx, o->n_sink_tokens >= 0, "n_sink_tokens is %lld: it must not be negative", (long long)o->n_sink_tokens);
  o->n_sink_tokens = sfa_min64(o->n_sink_tokens, INT32_MAX);
  SFA_REQUIRE(ctx, (unsigned)o->policy <= SFA_POLICY_SP_INT8, "policy is %d: it must be one of SFA_POLICY_AUTO to SFA_POLICY_SP_INT8",
              (int)o->policy);
  SFA_REQUIRE(ctx, (unsigned)o->precision <= SFA_PRECISION_HALF,
              "precision is %d: it must be SFA_PRECISION_DEFAULT, SFA_PRECISION_F32 or SFA_PRECISION_HALF", (int)o->precision);
  SFA_REQUIRE(ctx, o->eps >= 0 && o->eps <= 0.5f, "eps is %g: it must be from 0 to 0.5", (double)o->eps);
  return SFA_OK;
}

sfa_status sfa_attention_plan_create(sfa_context *ctx, const sfa_attention_options *options, sfa_attention_plan **plan) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(ctx, plan, "plan is NULL");
  *plan = NULL;
  sfa_attention_plan filled = {.ctx = ctx};
  SFA_TRY(check_options(ctx, options, &filled.options));
  filled.options.costs = NULL;
  filled.group = filled.options.n_heads / filled.options.n_kv_heads;
  SFA_TRY(ctx->backend->plan(&filled, options->costs));
  SFA_TRY(sfa_alloc(ctx, sizeof filled, "an attention plan", (void **)plan));
  **plan = filled;
  return SFA_OK;
}

void sfa_attention_plan_destroy(sfa_attention_plan *plan) {
  if (plan)
    sfa_free(plan->ctx, plan);
}

size_t sfa_attention_workspace_bytes(const sfa_attention_plan *plan) { return plan ? plan->workspace_bytes : 0; }

/* ---- Run ----------------------------------------------------------------------------------------------------------------------------- */

static sfa_status check_seqlens(sfa_context *ctx, const char *name, const int32_t *cu_seqlens, int32_t n_sequences, int64_t max_seqlen,
                                int64_t *n_tokens) {
  *n_tokens = n_sequences * max_seqlen;
  SFA_REQUIRE(ctx, (uintptr_t)cu_seqlens % sizeof *cu_seqlens == 0, "%s is not aligned", name);
  if (!cu_seqlens || !sfa_arrays_are_here(ctx))
    return SFA_OK;
  SFA_REQUIRE(ctx, cu_seqlens[0] == 0, "%s[0] is %d: it must be 0", name, cu_seqlens[0]);
  for (int32_t b = 0; b < n_sequences; b++) {
    int64_t len = (int64_t)cu_seqlens[b + 1] - cu_seqlens[b];
    SFA_REQUIRE(ctx, len >= 0 && len <= max_seqlen, "%s[%d] - [%d] is %lld: a length must be from 0 to the plan's max_seqlen = %lld", name,
                b + 1, b, (long long)len, (long long)max_seqlen);
  }
  *n_tokens = cu_seqlens[n_sequences];
  return SFA_OK;
}

/* Rows that codes must have: lengths on a device are not known here. */
static int64_t known_rows(const sfa_context *ctx, const int32_t *cu_seqlens, int64_t n_rows) {
  return cu_seqlens && !sfa_arrays_are_here(ctx) ? 0 : n_rows;
}

static sfa_status check_given_codes(sfa_context *ctx, const char *name, const sfa_codes *codes, int32_t head_dim, int32_t k,
                                    int64_t n_rows) {
  SFA_TRY(sfa_check_codes(ctx, name, codes));
  SFA_REQUIRE(ctx, codes->head_dim == head_dim && codes->k == k, "%s keep %d of %d features, the plan %d of %d: they must be the same",
              name, codes->k, codes->head_dim, k, head_dim);
  SFA_REQUIRE(ctx, codes->n_rows >= n_rows, "%s have %lld rows, tokens * heads are %lld", name, (long long)codes->n_rows,
              (long long)n_rows);
  return sfa_arrays_are_here(ctx) ? sfa_check_code_ids(ctx, name, codes) : SFA_OK;
}

sfa_status sfa_check_attention_args(const sfa_attention_plan *plan, const sfa_attention_args *args, sfa_attention_args *out) {
  sfa_context *ctx = plan->ctx;
  const sfa_attention_options *o = &plan->options;
  SFA_REQUIRE(ctx, args, "args is NULL");
  SFA_REQUIRE(ctx, args->struct_size == sizeof *args, "args.struct_size is %zu: set it to sizeof(sfa_attention_args) = %zu",
              args->struct_size, sizeof *args);
  *out = *args;
  int64_t n_tokens;
  SFA_TRY(check_seqlens(ctx, "cu_seqlens_q", args->cu_seqlens_q, o->n_sequences, o->max_seqlen_q, &n_tokens));
  if (args->q_codes)
    SFA_TRY(
        check_given_codes(ctx, "q_codes", args->q_codes, o->head_dim, o->k_q, known_rows(ctx, args->cu_seqlens_q, n_tokens * o->n_heads)));
  else
    SFA_TRY(sfa_check_rows(ctx, "q", &args->q, o->n_heads, o->head_dim, n_tokens ? o->max_seqlen_q : 0, &out->q));
  SFA_REQUIRE(ctx, (args->out && (uintptr_t)args->out % sizeof(float) == 0) || !n_tokens, "out is NULL or not aligned");
  SFA_REQUIRE(ctx, ((uintptr_t)args->lse | (uintptr_t)args->dropped) % sizeof(float) == 0, "lse or dropped is not aligned");
  SFA_REQUIRE(ctx, ((uintptr_t)args->sink_logit | (uintptr_t)args->alibi_slopes) % sizeof(float) == 0,
              "sink_logit or alibi_slopes is not aligned");
  return sfa_check_workspace(ctx, args->workspace, "sfa_attention_workspace_bytes", plan->workspace_bytes);
}

sfa_status sfa_check_workspace(sfa_context *ctx, const void *workspace, const char *name, size_t bytes) {
  unsigned alignment = sfa_arrays_are_here(ctx) ? 64 : 256;
  SFA_REQUIRE(ctx, workspace && (uintptr_t)workspace % alignment == 0,
              "workspace is NULL or not aligned to %u bytes: it takes %s = %zu bytes", alignment, name, bytes);
  return SFA_OK;
}

sfa_status sfa_check_stored(const sfa_attention_plan *plan, const char *what, int32_t n_kv_heads, const sfa_row_format *k,
                            const sfa_row_format *v) {
  const sfa_attention_options *o = &plan->options;
  int32_t k_k = o->k_k == o->head_dim ? 0 : o->k_k;
  SFA_REQUIRE(plan->ctx, n_kv_heads == o->n_kv_heads && k->dim == o->head_dim && v->dim == o->head_dim_v && k->k == k_k,
              "%s has %d kv heads, head_dim %d, head_dim_v %d, k %d; the plan has %d, %d, %d, %d: they must be the same", what, n_kv_heads,
              k->dim, v->dim, k->k, o->n_kv_heads, o->head_dim, o->head_dim_v, k_k);
  SFA_REQUIRE(plan->ctx, !o->from_cache || (k->dtype == o->k_dtype && v->dtype == o->v_dtype),
              "%s stores keys as dtype %d and values as %d, the plan has %d and %d: they must be the same", what, (int)k->dtype,
              (int)v->dtype, (int)o->k_dtype, (int)o->v_dtype);
  return SFA_OK;
}

sfa_kv_view *sfa_attention_views(const sfa_attention_plan *plan, const sfa_attention_args *args) {
  return (sfa_kv_view *)(void *)((unsigned char *)args->workspace + plan->views);
}

sfa_status sfa_check_no_postings(const sfa_attention_plan *plan, const sfa_attention_args *args) {
  if (plan->options.policy != SFA_POLICY_POSTINGS && !args->postings)
    return SFA_OK;
  return sfa_fail(plan->ctx, SFA_ERROR_UNSUPPORTED,
                  "an index of postings belongs to a cache: call sfa_attention_run_cached, or choose another policy and no args.postings");
}

sfa_status sfa_check_run_args(const sfa_attention_plan *plan, const sfa_attention_args *args, sfa_attention_args *out) {
  sfa_context *ctx = plan->ctx;
  const sfa_attention_options *o = &plan->options;
  SFA_REQUIRE(ctx, !o->from_cache, "the plan is for sfa_attention_run_cached: make one with from_cache = 0");
  SFA_TRY(sfa_check_attention_args(plan, args, out));
  SFA_TRY(sfa_check_no_postings(plan, args));
  int64_t n_keys;
  SFA_TRY(check_seqlens(ctx, "cu_seqlens_k", args->cu_seqlens_k, o->n_sequences, o->max_seqlen_k, &n_keys));
  if (args->k_codes) {
    SFA_TRY(
        check_given_codes(ctx, "k_codes", args->k_codes, o->head_dim, o->k_k, known_rows(ctx, args->cu_seqlens_k, n_keys * o->n_kv_heads)));
    SFA_REQUIRE(ctx, args->k_codes->dtype == o->k_dtype, "k_codes.dtype is %d, the plan's k_dtype %d: they must be the same",
                (int)args->k_codes->dtype, (int)o->k_dtype);
  } else {
    SFA_TRY(sfa_check_rows(ctx, "k", &args->k, o->n_kv_heads, o->head_dim, n_keys ? o->max_seqlen_k : 0, &out->k));
    if ((args->k.rope || args->k.norm) && !plan->encode_k)
      return sfa_fail(
          ctx, SFA_ERROR_UNSUPPORTED,
          "k.%s is given, but this plan reads dense f32 keys where they are: %s them before, or plan with k_k below head_dim or "
          "another k_dtype",
          args->k.rope ? "rope" : "norm", args->k.rope ? "rotate" : "norm");
  }
  return sfa_check_values(ctx, &args->v, o->n_kv_heads, o->head_dim_v, n_keys ? o->max_seqlen_k : 0, &out->v);
}

sfa_status sfa_attention_run(const sfa_attention_plan *plan, const sfa_attention_args *args) {
  if (!plan)
    return SFA_ERROR_ARGUMENT;
  sfa_attention_args checked;
  SFA_TRY(sfa_check_run_args(plan, args, &checked));
  return plan->ctx->backend->run(plan, &checked);
}

sfa_status sfa_attention_run_cached(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_cache *cache, int32_t layer,
                                    const int32_t *sequences) {
  if (!plan)
    return SFA_ERROR_ARGUMENT;
  sfa_context *ctx = plan->ctx;
  const sfa_attention_options *o = &plan->options;
  sfa_attention_args checked;
  SFA_TRY(sfa_check_attention_args(plan, args, &checked));
  SFA_REQUIRE(ctx, cache && sequences, "cache or sequences is NULL");
  SFA_REQUIRE(ctx, cache->ctx->backend == ctx->backend, "the plan is for %s, the cache is on %s: make both from one context",
              ctx->cuda ? "a GPU" : "the CPU", ctx->cuda ? "the CPU" : "a GPU");
  SFA_TRY(sfa_check_cache_layer(ctx, cache, layer));
  const sfa_cache_layer *stored = &cache->layers[layer];
  char name[40];
  snprintf(name, sizeof name, "layer %d of the cache", layer);
  SFA_TRY(sfa_check_stored(plan, name, cache->n_kv_heads, &stored->k, &stored->v));
  SFA_REQUIRE(ctx, o->policy != SFA_POLICY_POSTINGS || args->postings,
              "args.postings is NULL: policy postings reads an index of each sequence");
  for (int32_t b = 0; args->postings && b < o->n_sequences; b++)
    SFA_TRY(sfa_check_postings(args->postings[b], cache, layer));
  int64_t least_len = INT64_MAX, most_len = 0;
  for (int32_t b = 0; b < o->n_sequences; b++) {
    SFA_REQUIRE(ctx, sequences[b] >= 0 && sequences[b] < cache->n_sequences, "sequences[%d] is %d: the cache has %d", b, sequences[b],
                cache->n_sequences);
    int64_t len = sfa_cache_table_of(cache, sequences[b], layer)->len;
    SFA_REQUIRE(ctx, len <= o->max_seqlen_k, "sequence %d holds %lld tokens, the plan's max_seqlen_k is %lld: make a larger plan",
                sequences[b], (long long)len, (long long)o->max_seqlen_k);
    least_len = sfa_min64(least_len, len);
    most_len = sfa_max64(most_len, len);
  }
  if (ctx->backend->attend_tables) {
    sfa_kv_tables tables;
    sfa_cache_pages_tables(cache, layer, sequences, &tables);
    tables.least_len = least_len;
    tables.most_len = most_len;
    return ctx->backend->attend_tables(plan, &checked, &tables);
  }
  sfa_kv_view *views = sfa_attention_views(plan, &checked);
  for (int32_t b = 0; b < o->n_sequences; b++)
    sfa_cache_pages_view(cache, sequences[b], layer, &views[b]);
  ctx->backend->attend(plan, &checked, views);
  return SFA_OK;
}

/* ---- Merge ----------------------------------------------------------------------------------------------------------------- */

sfa_status sfa_attention_merge(sfa_context *ctx, int64_t n_rows, int32_t head_dim_v, float *out_a, float *lse_a, const float *out_b,
                               const float *lse_b) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(ctx, n_rows >= 0, "n_rows is %lld: it must not be negative", (long long)n_rows);
  SFA_TRY(sfa_check_head_dim(ctx, "head_dim_v", head_dim_v));
  SFA_REQUIRE(ctx, (out_a && lse_a && out_b && lse_b) || n_rows == 0, "an array is NULL");
  return n_rows ? ctx->backend->merge(ctx, n_rows, head_dim_v, out_a, lse_a, out_b, lse_b) : SFA_OK;
}
