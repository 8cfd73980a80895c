/* Attention of a layer that learns: libsfa's forward and backward, called once for all heads, or once for every run of kv heads that keep
 * the same number of features. */
#include "base/hash.h"
#include "model/learn_parts.h"

#include <sfa/backward.h>

#include <string.h>

/* Heads of one call: kv heads first .. first + n - 1 and their queries. */
typedef struct head_run {
  int32_t first, n, k_keys, k_queries;
} head_run;

static head_run run_at(const sfa_learner *l, int32_t index, int32_t first) {
  const int32_t *k_keys = l->k_keys + (int64_t)index * l->config.n_kv_heads,
                *k_queries = l->k_queries + (int64_t)index * l->config.n_kv_heads;
  head_run run = {first, 1, k_keys[first], k_queries[first]};
  while (first + run.n < l->config.n_kv_heads && k_keys[first + run.n] == run.k_keys && k_queries[first + run.n] == run.k_queries)
    run.n++;
  return run;
}

/* Features of a code: with top-k before rope those of both members of every kept pair. */
static int32_t stored_k(const sfa_learner *l, int32_t k) {
  if (!l->sparsity.pre_rope || !l->config.rope_pairs)
    return k;
  return 2 * k < l->config.head_dim ? 2 * k : 0;
}

static int32_t longest(const sfa_learn_batch *batch) {
  int32_t most = batch->cu_seqlens ? 0 : batch->n_tokens;
  for (int32_t b = 0; batch->cu_seqlens && b < batch->n_sequences; b++) {
    int32_t len = batch->cu_seqlens[b + 1] - batch->cu_seqlens[b];
    most = len > most ? len : most;
  }
  return most;
}

static sfa_status make_plan(sfa_learner *l, const sfa_learn_plan *wanted, sfa_attention_plan **plan) {
  const sfa_model_config *c = &l->config;
  bool local = wanted->layer_kind == SFA_LAYER_LOCAL;
  sfa_attention_options options = {.struct_size = sizeof options,
                                   .n_heads = c->n_heads / c->n_kv_heads * wanted->n_kv_heads,
                                   .n_kv_heads = wanted->n_kv_heads,
                                   .head_dim = c->head_dim,
                                   .head_dim_v = c->head_dim_v,
                                   .n_sequences = wanted->n_sequences,
                                   .max_seqlen_q = wanted->max_seqlen,
                                   .max_seqlen_k = wanted->max_seqlen,
                                   .k_q = wanted->k_queries,
                                   .k_k = wanted->k_keys,
                                   .softmax_scale = c->softmax_scale,
                                   .softcap = c->attention_softcap,
                                   .causal = 1,
                                   .has_window = local,
                                   .window_size = {local ? c->window_len - 1 : -1, -1},
                                   .precision = sfa_learn_on_gpu(l)        ? SFA_PRECISION_DEFAULT
                                                : l->options.bf16_products ? SFA_PRECISION_HALF
                                                                           : SFA_PRECISION_F32};
  return sfa_attention_plan_create(l->ctx, &options, plan);
}

static sfa_status need_workspace(sfa_learner *l, size_t bytes) {
  if (bytes <= l->workspace_bytes)
    return SFA_OK;
  sfa_memory_free(l->ctx, l->workspace);
  l->workspace = NULL;
  l->bytes -= l->workspace_bytes;
  l->workspace_bytes = 0;
  SFA_TRY(sfa_memory_alloc(l->ctx, bytes, &l->workspace));
  l->workspace_bytes = bytes;
  l->bytes += bytes;
  return SFA_OK;
}

/* The plan for such a call: kept from an earlier run, or made in the place of the oldest. */
static sfa_status find_plan(sfa_learner *l, const sfa_learn_batch *batch, int32_t index, const head_run *run, sfa_attention_plan **plan) {
  sfa_learn_plan wanted = {.k_keys = stored_k(l, run->k_keys),
                           .k_queries = stored_k(l, run->k_queries),
                           .layer_kind = l->config.layer_kinds[index],
                           .n_kv_heads = run->n,
                           .n_sequences = batch->n_sequences,
                           .max_seqlen = longest(batch)};
  for (int32_t i = 0; i < SFA_LEARN_PLANS && l->plans[i].plan; i++) {
    wanted.plan = l->plans[i].plan;
    if (memcmp(&wanted, &l->plans[i], sizeof wanted) == 0) {
      *plan = wanted.plan;
      return SFA_OK;
    }
  }
  SFA_TRY(make_plan(l, &wanted, plan));
  sfa_learn_plan *place = &l->plans[l->n_plans++ % SFA_LEARN_PLANS];
  if (place->plan)
    sfa_attention_plan_destroy(place->plan);
  wanted.plan = *plan;
  *place = wanted;
  size_t forward = sfa_attention_workspace_bytes(*plan), backward = sfa_attention_backward_workspace_bytes(*plan);
  return need_workspace(l, forward > backward ? forward : backward);
}

void sfa_learn_plans_free(sfa_learner *l) {
  for (int32_t i = 0; i < SFA_LEARN_PLANS; i++)
    if (l->plans[i].plan)
      sfa_attention_plan_destroy(l->plans[i].plan);
}

/* ---- Which features are kept ------------------------------------------------------------------------------------------------------ */

/* Heads of a run: of keys, or of queries. salt tells apart what must not have the same noise. */
static sfa_status keep_rows(const sfa_learner *l, int64_t n, int32_t n_heads, int32_t k, uint64_t salt, float *x, int64_t stride) {
  const sfa_keep_options options = {.struct_size = sizeof options,
                                    .k = k,
                                    .two_of_four = l->sparsity.two_of_four,
                                    .gumbel_scale = l->sparsity.gumbel_scale,
                                    .seed = sfa_hash_word(l->sparsity.gumbel_seed, salt)};
  return k ? sfa_rows_keep(l->ctx, &options, n, n_heads, l->config.head_dim, x, stride) : SFA_OK;
}

static sfa_status note_kept(sfa_learner *l, int64_t n, sfa_learn_saved *saved) {
  const sfa_model_config *c = &l->config;
  int64_t n_q = sfa_learn_q_dim(c), n_k = sfa_learn_k_dim(c);
  if (!saved->kept_q)
    SFA_TRY(sfa_learn_alloc_device(l, (size_t)l->options.max_tokens, (size_t)n_q * sizeof(float), &saved->kept_q));
  if (!saved->kept_k)
    SFA_TRY(sfa_learn_alloc_device(l, (size_t)l->options.max_tokens, (size_t)n_k * sizeof(float), &saved->kept_k));
  SFA_TRY(sfa_memory_copy(l->ctx, saved->kept_q, saved->q, (size_t)(n * n_q) * sizeof(float)));
  return sfa_memory_copy(l->ctx, saved->kept_k, saved->k, (size_t)(n * n_k) * sizeof(float));
}

sfa_status sfa_learn_keep(sfa_learner *l, int64_t n, int32_t index, sfa_learn_saved *saved) {
  const sfa_model_config *c = &l->config;
  int32_t group = c->n_heads / c->n_kv_heads;
  if (!l->sparsity.pre_rope && !l->sparsity.two_of_four && l->sparsity.gumbel_scale == 0)
    return SFA_OK; /* attention's own top-k */
  for (int32_t first = 0; first < c->n_kv_heads;) {
    head_run run = run_at(l, index, first);
    uint64_t salt = 2 * ((uint64_t)index * (uint64_t)c->n_kv_heads + (uint64_t)first);
    SFA_TRY(keep_rows(l, n, run.n, run.k_keys, salt, saved->k + (int64_t)first * c->head_dim, sfa_learn_k_dim(c)));
    SFA_TRY(keep_rows(l, n, run.n * group, run.k_queries, salt + 1, saved->q + (int64_t)first * group * c->head_dim, sfa_learn_q_dim(c)));
    first += run.n;
  }
  return l->sparsity.pre_rope ? note_kept(l, n, saved) : SFA_OK;
}

/* uses [D] += the rows of n_heads heads in which a feature is among the k kept; x: rows `stride` apart. */
static sfa_status count_uses(sfa_learner *l, int64_t n, int32_t n_heads, int32_t k, const float *x, int64_t stride, int64_t *uses) {
  const sfa_keep_options options = {.struct_size = sizeof options, .k = k};
  const int64_t dim = l->config.head_dim, width = n_heads * dim;
  const size_t bytes = (size_t)l->options.max_tokens * (size_t)sfa_learn_q_dim(&l->config) * sizeof(float);
  if (!l->uses)
    SFA_TRY(sfa_learn_alloc_device(l, 1, bytes, &l->uses));
  if (!l->host_uses)
    SFA_TRY(sfa_learn_alloc(l, 1, bytes, "rows of features", &l->host_uses));
  l->training->copy_rows(l->ctx, n, width, x, stride, l->uses, width);
  SFA_TRY(sfa_rows_keep(l->ctx, &options, n, n_heads, (int32_t)dim, l->uses, width));
  SFA_TRY(sfa_memory_copy(l->ctx, l->host_uses, l->uses, (size_t)(n * width) * sizeof(float)));
  SFA_TRY(sfa_stream_wait(l->ctx));
  for (int64_t i = 0; i < n * width; i++)
    uses[i % dim] += l->host_uses[i] != 0.0f;
  return SFA_OK;
}

static sfa_status count_all_uses(sfa_learner *l, const sfa_learn_batch *batch, int32_t index, const sfa_learn_saved *saved) {
  const sfa_model_config *c = &l->config;
  int64_t n = batch->n_tokens, q_dim = sfa_learn_q_dim(c), k_dim = sfa_learn_k_dim(c);
  int32_t group = c->n_heads / c->n_kv_heads;
  for (int32_t g = 0; g < c->n_kv_heads; g++) {
    head_run run = run_at(l, index, g);
    int64_t at = ((int64_t)index * c->n_kv_heads + g) * c->head_dim;
    int32_t k_keys = stored_k(l, run.k_keys), k_queries = stored_k(l, run.k_queries);
    if (batch->key_uses && k_keys)
      SFA_TRY(count_uses(l, n, 1, k_keys, saved->k + (int64_t)g * c->head_dim, k_dim, batch->key_uses + at));
    if (batch->query_uses && k_keys)
      SFA_TRY(count_uses(l, n, group, k_queries ? k_queries : c->head_dim, saved->q + (int64_t)g * group * c->head_dim, q_dim,
                         batch->query_uses + at));
  }
  return SFA_OK;
}

/* ---- Attention -------------------------------------------------------------------------------------------------------------------- */

/* Columns of some heads: rows of `width` at `column` of rows of `stride`, to or from contiguous ones. */
static void take_heads(const sfa_learner *l, int64_t n, int64_t width, const float *from, int64_t stride, int64_t column, float *to) {
  l->training->copy_rows(l->ctx, n, width, from + column, stride, to, width);
}

static void put_heads(const sfa_learner *l, int64_t n, int64_t width, const float *from, float *to, int64_t stride, int64_t column) {
  l->training->copy_rows(l->ctx, n, width, from, width, to + column, stride);
}

static sfa_attention_args arguments_of(const sfa_learner *l, const head_run *run, const sfa_learn_saved *saved) {
  const sfa_model_config *c = &l->config;
  int64_t group = c->n_heads / c->n_kv_heads;
  return (sfa_attention_args){.struct_size = sizeof(sfa_attention_args),
                              .q = {.data = saved->q + run->first * group * c->head_dim,
                                    .dtype = SFA_F32,
                                    .token_stride = sfa_learn_q_dim(c),
                                    .head_stride = c->head_dim},
                              .k = {.data = saved->k + (int64_t)run->first * c->head_dim,
                                    .dtype = SFA_F32,
                                    .token_stride = sfa_learn_k_dim(c),
                                    .head_stride = c->head_dim},
                              .v = {.data = saved->v + (int64_t)run->first * c->head_dim_v,
                                    .dtype = SFA_F32,
                                    .token_stride = sfa_learn_v_dim(c),
                                    .head_stride = c->head_dim_v},
                              .cu_seqlens_q = l->cu_seqlens,
                              .cu_seqlens_k = l->cu_seqlens,
                              .out = saved->attended,
                              .lse = saved->lse,
                              .workspace = l->workspace};
}

sfa_status sfa_learn_attend(sfa_learner *l, const sfa_learn_batch *batch, int32_t index, sfa_learn_saved *saved) {
  const sfa_model_config *c = &l->config;
  int32_t group = c->n_heads / c->n_kv_heads;
  for (int32_t first = 0; first < c->n_kv_heads;) {
    head_run run = run_at(l, index, first);
    bool some = run.n < c->n_kv_heads;
    sfa_attention_plan *plan;
    SFA_TRY(find_plan(l, batch, index, &run, &plan));
    sfa_attention_args args = arguments_of(l, &run, saved);
    if (some)
      args.out = l->heads, args.lse = l->lse_heads;
    SFA_TRY(sfa_attention_run(plan, &args));
    if (some) {
      int64_t at = (int64_t)run.first * group, n_heads = (int64_t)run.n * group;
      put_heads(l, batch->n_tokens, n_heads * c->head_dim_v, l->heads, saved->attended, sfa_learn_attended_dim(c), at * c->head_dim_v);
      put_heads(l, batch->n_tokens, n_heads, l->lse_heads, saved->lse, c->n_heads, at);
    }
    first += run.n;
  }
  return batch->key_uses || batch->query_uses ? count_all_uses(l, batch, index, saved) : SFA_OK;
}

sfa_status sfa_learn_attend_backward(sfa_learner *l, const sfa_learn_batch *batch, int32_t index, const sfa_learn_saved *saved) {
  const sfa_model_config *c = &l->config;
  int32_t group = c->n_heads / c->n_kv_heads;
  for (int32_t first = 0; first < c->n_kv_heads;) {
    head_run run = run_at(l, index, first);
    sfa_attention_plan *plan;
    SFA_TRY(find_plan(l, batch, index, &run, &plan));
    sfa_attention_args args = arguments_of(l, &run, saved);
    sfa_attention_grad_args gradients = {.struct_size = sizeof gradients,
                                         .forward = &args,
                                         .d_out = l->d_attended,
                                         .d_q = l->d_q + (int64_t)run.first * group * c->head_dim,
                                         .d_q_token_stride = sfa_learn_q_dim(c),
                                         .d_k = l->d_k + (int64_t)run.first * c->head_dim,
                                         .d_k_token_stride = sfa_learn_k_dim(c),
                                         .d_v = l->d_v + (int64_t)run.first * c->head_dim_v,
                                         .d_v_token_stride = sfa_learn_v_dim(c),
                                         .workspace = l->workspace};
    if (run.n < c->n_kv_heads) {
      int64_t at = (int64_t)run.first * group, n_heads = (int64_t)run.n * group;
      take_heads(l, batch->n_tokens, n_heads * c->head_dim_v, saved->attended, sfa_learn_attended_dim(c), at * c->head_dim_v, l->heads);
      take_heads(l, batch->n_tokens, n_heads * c->head_dim_v, l->d_attended, sfa_learn_attended_dim(c), at * c->head_dim_v, l->d_heads);
      take_heads(l, batch->n_tokens, n_heads, saved->lse, c->n_heads, at, l->lse_heads);
      args.out = l->heads, args.lse = l->lse_heads, gradients.d_out = l->d_heads;
    }
    SFA_TRY(sfa_attention_backward(plan, &gradients));
    first += run.n;
  }
  return SFA_OK;
}

sfa_status sfa_learner_sparsity(sfa_learner *l, const sfa_learn_sparsity *sparsity) {
  const sfa_model_config *c = &l->config;
  for (int32_t i = 0; i < c->n_layers * c->n_kv_heads; i++) {
    int32_t k = sparsity->k_keys ? sparsity->k_keys[i] : 0, k_q = sparsity->k_queries ? sparsity->k_queries[i] : 0;
    bool halves = sparsity->two_of_four && ((k > c->head_dim / 2 && k < c->head_dim) || (k_q > c->head_dim / 2 && k_q < c->head_dim));
    SFA_REQUIRE(l->ctx, !halves, "layer %d keeps %d features of a key and %d of a query; two of four allow at most half the head_dim of %d",
                i / c->n_kv_heads, k, k_q, c->head_dim);
    SFA_REQUIRE(l->ctx, k >= 0 && k <= c->head_dim && k_q >= 0 && k_q <= c->head_dim,
                "layer %d keeps %d features of a key and %d of a query; head_dim is %d", i / c->n_kv_heads, k, k_q, c->head_dim);
  }
  SFA_REQUIRE(l->ctx, sparsity->gumbel_scale >= 0 && sparsity->gumbel_scale <= 2, "a Gumbel noise of scale %g; it must be 0 to 2",
              (double)sparsity->gumbel_scale);
  for (int32_t i = 0; i < c->n_layers * c->n_kv_heads; i++) {
    int32_t k = sparsity->k_keys ? sparsity->k_keys[i] : 0, k_q = sparsity->k_queries ? sparsity->k_queries[i] : 0;
    l->k_keys[i] = k == c->head_dim ? 0 : k;
    l->k_queries[i] = k_q == c->head_dim ? 0 : k_q;
  }
  l->sparsity = *sparsity;
  l->sparsity.k_keys = l->sparsity.k_queries = NULL;
  return SFA_OK;
}
