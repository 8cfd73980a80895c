/* The decoder block, one for all families. In order (docs/MATH.md 1: QK-norm, RoPE, top-k, nothing after it):
 *
 *     x = embedding[token] * scale (+ position)
 *     each layer:  n = norm(x);  q, k, v = n Wqkv;  q, k = rope(qk_norm(q, k));  cache += top-k(k), v
 *                  x += post_norm(attention(q, cache) Wo)
 *                  n = norm(x);  x += post_norm((act(n Wgate) * n Wup) Wdown)        without a gate: act(n Wup) Wdown
 *     hidden = norm(x);  logits = softcap(hidden Whead)
 *
 * What a family lacks is NULL in sfa_layer and skipped.
 */
#include "model/forward.h"

#include <math.h>
#include <string.h>

static void norm_rows(const sfa_model *m, const sfa_norm *norm, int32_t n, const float *x, float *out) {
  const sfa_model_config *c = &m->config;
  if (c->family->layer_norm)
    m->device->layer_norm(m->ctx, n, c->hidden_dim, x, c->hidden_dim, norm->weight, norm->bias, c->norm_eps, out, c->hidden_dim);
  else
    m->device->rms_norm(m->ctx, n, 1, c->hidden_dim, x, c->hidden_dim, norm->weight, c->norm_eps, out, c->hidden_dim);
}

/* Row `index` of a table in the model file. */
static void table_row(const sfa_tensor *t, int64_t index, float *out) {
  int64_t bytes = t->shape[1] / sfa_tensor_block_len(t->type) * sfa_tensor_block_bytes(t->type);
  sfa_tensor_dequantize(t->type, t->shape[1], (const uint8_t *)t->data + index * bytes, out);
}

static void embed(sfa_forward *f, const int32_t *tokens, int32_t n, int64_t first) {
  const sfa_model *m = f->model;
  int32_t dim = m->config.hidden_dim;
  for (int32_t t = 0; t < n; t++) {
    float *x = f->stream + (int64_t)t * dim;
    table_row(m->embedding, tokens[t], x);
    for (int32_t i = 0; m->config.embedding_scale != 1.0f && i < dim; i++)
      x[i] *= m->config.embedding_scale;
    if (m->positions)
      table_row(m->positions, first + t, f->normed + (int64_t)t * dim);
  }
  if (m->positions)
    m->device->add(m->ctx, n, dim, f->stream, f->normed);
}

static void fill_rotations(sfa_forward *f, int32_t n, int64_t first) {
  const sfa_model_config *c = &f->model->config;
  for (int kind = 0; kind < SFA_LAYER_KINDS; kind++)
    for (int64_t t = 0; t < n; t++)
      for (int64_t p = 0; p < c->rope_pairs; p++) {
        double angle = (double)(first + t) * c->rope_frequencies[kind][p];
        f->rope_cos[kind][t * c->rope_pairs + p] = (float)cos(angle);
        f->rope_sin[kind][t * c->rope_pairs + p] = (float)sin(angle);
      }
}

/* Three columns of f->qkv: q [n][H][D], k [n][G][D], v [n][G][E], rows `stride` apart. */
typedef struct qkv_view {
  float *q, *k, *v;
  int64_t stride;
} qkv_view;

static qkv_view project_qkv(sfa_forward *f, const sfa_layer *layer, int32_t n) {
  const sfa_model *m = f->model;
  const sfa_model_config *c = &m->config;
  int64_t q_dim = (int64_t)c->n_heads * c->head_dim, k_dim = (int64_t)c->n_kv_heads * c->head_dim;
  qkv_view view = {f->qkv, f->qkv + q_dim, f->qkv + q_dim + k_dim, q_dim + k_dim + (int64_t)c->n_kv_heads * c->head_dim_v};
  const sfa_linear_part parts[] = {
      {layer->qkv[0], view.q, view.stride}, {layer->qkv[1], view.k, view.stride}, {layer->qkv[2], view.v, view.stride}};
  m->device->linear(m->ctx, n, f->normed, c->hidden_dim, layer->qkv[1] ? 3 : 1, parts, f->scratch);
  if (layer->q_norm.weight) {
    m->device->rms_norm(m->ctx, n, c->n_heads, c->head_dim, view.q, view.stride, layer->q_norm.weight, c->norm_eps, view.q, view.stride);
    m->device->rms_norm(m->ctx, n, c->n_kv_heads, c->head_dim, view.k, view.stride, layer->k_norm.weight, c->norm_eps, view.k, view.stride);
  }
  return view;
}

static void turn_rows(sfa_forward *f, int32_t n, int32_t n_heads, float *x, sfa_rows *rows) {
  const sfa_model_config *c = &f->model->config;
  if (rows->rope)
    f->model->device->rope(f->model->ctx, n, n_heads, c->head_dim, c->rope_pairs, c->rope_interleaved, rows->rope->cos, rows->rope->sin, x,
                           rows->token_stride);
  rows->rope = NULL;
}

/* Rows that do not leave the choice to their codes. */
static sfa_status keep_features(sfa_forward *f, int32_t n, int32_t n_heads, int32_t k, float *x, sfa_rows *rows) {
  const sfa_model_config *c = &f->model->config;
  if (k == 0)
    return SFA_OK;
  if (!c->pre_rope)
    turn_rows(f, n, n_heads, x, rows);
  const sfa_keep_options options = {.struct_size = sizeof options, .k = k, .two_of_four = c->two_of_four};
  return sfa_rows_keep(f->model->ctx, &options, n, n_heads, c->head_dim, x, rows->token_stride);
}

static sfa_status attend(sfa_forward *f, int32_t index, int32_t n, const qkv_view *view) {
  const sfa_model_config *c = &f->model->config;
  const sfa_layer_route *route = &f->routes[index];
  int kind = c->layer_kinds[index];
  /* Rotary positions are applied where rows are read: before top-k, in the same pass. */
  const sfa_rope turn = {f->rope_cos[kind], f->rope_sin[kind], 2 * c->rope_pairs, c->rope_interleaved};
  const sfa_rope *rope = c->rope_pairs ? &turn : NULL;
  sfa_rows q = {view->q, SFA_F32, 0, view->stride, c->head_dim, rope};
  sfa_rows k = {view->k, SFA_F32, 0, view->stride, c->head_dim, rope};
  const sfa_rows v = {view->v, SFA_F32, 0, view->stride, c->head_dim_v, NULL};
  const int32_t cu_seqlens_q[2] = {0, n}, slot = 0;
  SFA_TRY(keep_features(f, n, c->n_kv_heads, route->attention->keep_keys, view->k, &k));
  SFA_TRY(keep_features(f, n, c->n_heads, route->attention->keep_queries, view->q, &q));
  SFA_TRY(sfa_cache_append(route->cache, slot, route->cache_layer, n, &k, &v));
  if (f->probe) {
    bool local = kind == SFA_LAYER_LOCAL;
    turn_rows(f, n, c->n_heads, view->q, &q); /* a probe is shown what top-k will see */
    const sfa_probe probe = {.layer = index,
                             .n_tokens = n,
                             .first = sfa_cache_len(route->cache, slot, route->cache_layer) - n,
                             .queries = view->q,
                             .query_stride = view->stride,
                             .cache = route->cache,
                             .cache_layer = route->cache_layer,
                             .k_queries = route->attention->k_queries,
                             .window_len = local ? c->window_len : 0};
    SFA_TRY(f->probe(f->probe_user, &probe));
  }
  sfa_attention_args args = {
      .struct_size = sizeof args, .q = q, .cu_seqlens_q = n == 1 ? NULL : cu_seqlens_q, .out = f->attended, .workspace = f->workspace};
  const sfa_attention_plan *plan = n == 1 ? route->attention->one : route->attention->chunk;
  args.dropped = n == 1 ? f->dropped : NULL;
  SFA_TRY(sfa_attention_run_cached(plan, &args, route->cache, route->cache_layer, &slot));
  for (int32_t head = 0; args.dropped && head < c->n_heads; head++)
    f->dropped_most = fmaxf(f->dropped_most, args.dropped[head]);
  return SFA_OK;
}

/* The stream plus what a sub-layer left in f->normed. */
static void add_to_stream(sfa_forward *f, const sfa_norm *post_norm, int32_t n) {
  const sfa_model *m = f->model;
  if (post_norm->weight)
    norm_rows(m, post_norm, n, f->normed, f->normed);
  m->device->add(m->ctx, n, m->config.hidden_dim, f->stream, f->normed);
}

static void feed_forward(sfa_forward *f, const sfa_layer *layer, int32_t n) {
  const sfa_model *m = f->model;
  const sfa_model_config *c = &m->config;
  int64_t stride = 2 * (int64_t)c->ffn_dim;
  const sfa_linear_part parts[] = {{layer->gate ? layer->gate : layer->up, f->ffn, stride}, {layer->up, f->ffn + c->ffn_dim, stride}};
  m->device->linear(m->ctx, n, f->normed, c->hidden_dim, layer->gate ? 2 : 1, parts, f->scratch);
  m->device->activate(m->ctx, c->family->activation, n, c->ffn_dim, f->ffn, stride, layer->gate ? f->ffn + c->ffn_dim : NULL, stride,
                      f->ffn, stride);
  m->device->linear(m->ctx, n, f->ffn, stride, 1, &(sfa_linear_part){layer->down, f->normed, c->hidden_dim}, f->scratch);
}

static sfa_status run_layer(sfa_forward *f, int32_t index, int32_t n, int64_t *attention_ns) {
  const sfa_model *m = f->model;
  const sfa_model_config *c = &m->config;
  const sfa_layer *layer = &m->layers[index];
  norm_rows(m, &layer->attention_norm, n, f->stream, f->normed);
  qkv_view view = project_qkv(f, layer, n);
  int64_t start = sfa_now_ns();
  SFA_TRY(attend(f, index, n, &view));
  *attention_ns += sfa_now_ns() - start;
  m->device->linear(m->ctx, n, f->attended, (int64_t)c->n_heads * c->head_dim_v, 1, &(sfa_linear_part){layer->o, f->normed, c->hidden_dim},
                    f->scratch);
  add_to_stream(f, &layer->post_attention_norm, n);
  norm_rows(m, &layer->ffn_norm, n, f->stream, f->normed);
  feed_forward(f, layer, n);
  add_to_stream(f, &layer->post_ffn_norm, n);
  return SFA_OK;
}

sfa_status sfa_forward_run(sfa_forward *f, const int32_t *tokens, int32_t n_tokens, float *hidden, int64_t *attention_ns) {
  const sfa_model *m = f->model;
  int64_t first = sfa_forward_len(f);
  SFA_REQUIRE(m->ctx, n_tokens >= 1 && n_tokens <= f->chunk_len, "a step of %d tokens; this timeline takes 1 to %d", n_tokens,
              f->chunk_len);
  if (first + n_tokens > f->context_len)
    return sfa_fail(m->ctx, SFA_ERROR_RANGE, "%lld tokens and %d more do not fit the context of %lld", (long long)first, n_tokens,
                    (long long)f->context_len);
  for (int32_t t = 0; t < n_tokens; t++)
    if (tokens[t] < 0 || tokens[t] >= m->config.vocab_size)
      return sfa_fail(m->ctx, SFA_ERROR_RANGE, "token id %d is outside the model's vocabulary of %d", tokens[t], m->config.vocab_size);
  embed(f, tokens, n_tokens, first);
  fill_rotations(f, n_tokens, first);
  for (int32_t index = 0; index < m->config.n_layers; index++) {
    sfa_status status = run_layer(f, index, n_tokens, attention_ns);
    if (status != SFA_OK) {
      for (int kind = 0; kind < SFA_CACHES; kind++) /* layers before this one have the tokens already */
        if (f->caches[kind])
          sfa_cache_truncate(f->caches[kind], 0, first);
      return status;
    }
  }
  norm_rows(m, &m->final_norm, n_tokens, f->stream, hidden);
  return SFA_OK;
}

sfa_status sfa_model_logits(const sfa_model *m, int32_t n, const float *hidden, float *logits) {
  const sfa_model_config *c = &m->config;
  void *scratch;
  SFA_TRY(sfa_alloc(m->ctx, m->device->scratch_bytes(m->ctx, n, c->hidden_dim), "rounded activations", &scratch));
  m->device->linear(m->ctx, n, hidden, c->hidden_dim, 1, &(sfa_linear_part){m->head, logits, c->vocab_size}, scratch);
  sfa_free(m->ctx, scratch);
  if (c->final_softcap > 0)
    m->device->softcap(m->ctx, n, c->vocab_size, c->final_softcap, logits, c->vocab_size);
  return SFA_OK;
}
