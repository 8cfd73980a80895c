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

#include <sfa/stream.h>

#include <string.h>

static bool on_gpu(const sfa_forward *f) { return sfa_context_device(f->model->ctx) != SFA_DEVICE_CPU; }

static void norm_rows(const sfa_model *m, const sfa_norm *norm, int32_t n, const float *x, float *out) {
  const sfa_model_config *c = &m->config;
  if (c->family->layer_norm)
    m->device->layer_norm(m->ctx, n, c->hidden_dim, x, c->hidden_dim, norm->weight, norm->bias, c->norm_eps, out, c->hidden_dim);
  else
    m->device->rms_norm(m->ctx, n, 1, c->hidden_dim, x, c->hidden_dim, norm->weight, c->norm_eps, out, c->hidden_dim);
}

/* ---- What a step is told ----------------------------------------------------------------------------------------------------------- */

static int32_t *input_of(const sfa_forward *f, int which) { return f->inputs + (int64_t)which * (f->chunk_len + 2); }

/* Tokens and positions, in the memory of the device. */
static sfa_status put_inputs(sfa_forward *f, const int32_t *tokens, int32_t n, int64_t first) {
  enum { PIECE = 1024 };
  sfa_context *ctx = f->model->ctx;
  const int32_t lengths[2] = {0, n};
  SFA_TRY(sfa_memory_copy(ctx, input_of(f, SFA_INPUT_TOKENS), tokens, (size_t)n * sizeof *tokens));
  for (int32_t from = 0; from < n; from += PIECE) {
    int32_t positions[PIECE], count = (int32_t)sfa_min64(PIECE, n - from);
    for (int32_t t = 0; t < count; t++)
      positions[t] = (int32_t)(first + from + t);
    SFA_TRY(sfa_memory_copy(ctx, input_of(f, SFA_INPUT_POSITIONS) + from, positions, (size_t)count * sizeof *positions));
  }
  return n == 1 ? SFA_OK : sfa_memory_copy(ctx, input_of(f, SFA_INPUT_LENGTHS), lengths, sizeof lengths);
}

/* Row `index` of a table in the model file. */
static void table_row(const sfa_tensor *t, int64_t index, float *out) {
  int64_t bytes = t->shape[1] / sfa_tensor_block_len(t->type) * sfa_tensor_block_bytes(t->type);
  sfa_tensor_dequantize(t->type, t->shape[1], (const uint8_t *)t->data + index * bytes, out);
}

static void embed(sfa_forward *f, int32_t n) {
  const sfa_model *m = f->model;
  const int32_t *tokens = input_of(f, SFA_INPUT_TOKENS), *positions = input_of(f, SFA_INPUT_POSITIONS);
  int32_t dim = m->config.hidden_dim;
  if (m->embedding_rows) {
    m->device->rows(m->ctx, n, m->embedding_rows, tokens, m->config.embedding_scale, false, f->stream);
    if (m->positions)
      m->device->rows(m->ctx, n, m->position_rows, positions, 1.0f, true, f->stream);
    return;
  }
  for (int32_t t = 0; t < n; t++) {
    float *x = f->stream + (int64_t)t * dim;
    table_row(m->embedding, tokens[t], x);
    for (int32_t i = 0; m->config.embedding_scale != 1.0f && i < dim; i++)
      x[i] *= m->config.embedding_scale;
    if (m->positions)
      table_row(m->positions, positions[t], f->normed + (int64_t)t * dim);
  }
  if (m->positions)
    m->device->add(m->ctx, n, dim, f->stream, f->normed);
}

static void fill_rotations(sfa_forward *f, int32_t n) {
  const sfa_model *m = f->model;
  for (int kind = 0; m->config.rope_pairs && kind < SFA_LAYER_KINDS; kind++)
    m->device->rotations(m->ctx, n, input_of(f, SFA_INPUT_POSITIONS), m->config.rope_pairs, f->frequencies[kind], f->rope_cos[kind],
                         f->rope_sin[kind]);
}

/* ---- Parts of a layer -------------------------------------------------------------------------------------------------------------- */

/* Linear layers of the normalised stream; with activated the first one's output is activated, and multiplied by the second's. */
static void project_stream(sfa_forward *f, const sfa_norm *norm, int32_t n, int32_t n_parts, const sfa_linear_part *parts, bool activated,
                           int32_t dim) {
  const sfa_model *m = f->model;
  const sfa_model_config *c = &m->config;
  if (m->device->project) {
    const sfa_projection projection = {.n_rows = n,
                                       .x = f->stream,
                                       .x_stride = c->hidden_dim,
                                       .norm_weight = norm->weight,
                                       .norm_bias = norm->bias,
                                       .center = c->family->layer_norm,
                                       .norm_eps = c->norm_eps,
                                       .n_parts = n_parts,
                                       .parts = parts,
                                       .activated = activated,
                                       .activation = c->family->activation};
    m->device->project(m->ctx, &projection);
    return;
  }
  norm_rows(m, norm, n, f->stream, f->normed);
  m->device->linear(m->ctx, n, f->normed, c->hidden_dim, n_parts, parts, f->scratch);
  if (activated)
    m->device->activate(m->ctx, c->family->activation, n, dim, parts[0].out, parts[0].out_stride, n_parts == 2 ? parts[1].out : NULL,
                        parts[1].out_stride, parts[0].out, parts[0].out_stride);
}

/* The stream plus a sub-layer's last linear layer of x. */
static void add_to_stream(sfa_forward *f, const sfa_linear *linear, const sfa_norm *post_norm, int32_t n, const float *x,
                          int64_t x_stride) {
  const sfa_model *m = f->model;
  const int32_t dim = m->config.hidden_dim;
  if (m->device->project && !post_norm->weight) {
    const sfa_linear_part part = {linear, f->stream, dim};
    const sfa_projection projection = {.n_rows = n, .x = x, .x_stride = x_stride, .n_parts = 1, .parts = &part, .add = true};
    m->device->project(m->ctx, &projection);
    return;
  }
  m->device->linear(m->ctx, n, x, x_stride, 1, &(sfa_linear_part){linear, f->normed, dim}, f->scratch);
  if (post_norm->weight)
    norm_rows(m, post_norm, n, f->normed, f->normed);
  m->device->add(m->ctx, n, dim, f->stream, f->normed);
}

/* Parts of f->qkv: q [n][H][D], k [n][G][D], v [n][G][E]; one after the other, or where one layer makes them columns of one array. */
typedef struct qkv_view {
  float *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;
} qkv_view;

static qkv_view view_qkv(const sfa_forward *f, const sfa_layer *layer) {
  const sfa_model_config *c = &f->model->config;
  const int64_t q = (int64_t)c->n_heads * c->head_dim, k = (int64_t)c->n_kv_heads * c->head_dim, v = (int64_t)c->n_kv_heads * c->head_dim_v;
  if (!layer->qkv[1])
    return (qkv_view){f->qkv, f->qkv + q, f->qkv + q + k, q + k + v, q + k + v, q + k + v};
  return (qkv_view){f->qkv, f->qkv + f->chunk_len * q, f->qkv + f->chunk_len * (q + k), q, k, v};
}

static qkv_view project_qkv(sfa_forward *f, const sfa_layer *layer, int32_t n) {
  qkv_view view = view_qkv(f, layer);
  const sfa_linear_part parts[] = {
      {layer->qkv[0], view.q, view.q_stride}, {layer->qkv[1], view.k, view.k_stride}, {layer->qkv[2], view.v, view.v_stride}};
  project_stream(f, &layer->attention_norm, n, layer->qkv[1] ? 3 : 1, parts, false, 0);
  return view;
}

/* Norms and turns rows where they lie, in place of whoever reads them. */
static void norm_heads(sfa_forward *f, int32_t n, int32_t n_heads, float *x, sfa_rows *rows) {
  if (rows->norm)
    f->model->device->rms_norm(f->model->ctx, n, n_heads, f->model->config.head_dim, x, rows->token_stride, rows->norm->weight,
                               rows->norm->eps, x, rows->token_stride);
  rows->norm = NULL;
}

static void turn_rows(sfa_forward *f, int32_t n, int32_t n_heads, float *x, sfa_rows *rows) {
  const sfa_model_config *c = &f->model->config;
  norm_heads(f, n, n_heads, x, rows);
  if (rows->rope)
    f->model->device->rope(f->model->ctx, n, n_heads, c->head_dim, c->rope_pairs, c->rope_interleaved, rows->rope->cos, rows->rope->sin, x,
                           rows->token_stride);
  rows->rope = NULL;
}

/* Rows that do not leave the choice to their codes; keep [G], `group` heads of x for each. */
static sfa_status keep_features(sfa_forward *f, int32_t n, int32_t group, const int32_t *keep, float *x, sfa_rows *rows) {
  const sfa_model_config *c = &f->model->config;
  for (int32_t g = 0, run; g < c->n_kv_heads; g += run) {
    for (run = 1; g + run < c->n_kv_heads && keep[g + run] == keep[g];)
      run++;
    if (keep[g] == 0)
      continue;
    (c->pre_rope ? norm_heads : turn_rows)(f, n, group * c->n_kv_heads, x, rows);
    const sfa_keep_options options = {.struct_size = sizeof options, .k = keep[g], .two_of_four = c->two_of_four};
    SFA_TRY(sfa_rows_keep(f->model->ctx, &options, n, run * group, c->head_dim, x + (int64_t)g * group * c->head_dim, rows->token_stride));
  }
  return SFA_OK;
}

static sfa_status show_probe(sfa_forward *f, int32_t index, int32_t n, const qkv_view *view, sfa_rows *q) {
  const sfa_model_config *c = &f->model->config;
  const sfa_layer_route *route = &f->routes[index];
  turn_rows(f, n, c->n_heads, view->q, q); /* a probe is shown what top-k will see */
  const sfa_probe probe = {.layer = index,
                           .n_tokens = n,
                           .first = sfa_cache_len(route->cache, 0, route->cache_layer) - n,
                           .queries = view->q,
                           .query_stride = view->q_stride,
                           .cache = route->cache,
                           .cache_layer = route->cache_layer,
                           .k_queries = route->attention->k_queries,
                           .window_len = c->layer_kinds[index] == SFA_LAYER_LOCAL ? c->window_len : 0};
  return f->probe(f->probe_user, &probe);
}

static sfa_status attend(sfa_forward *f, int32_t index, int32_t n, const qkv_view *view) {
  const sfa_model_config *c = &f->model->config;
  const sfa_layer_route *route = &f->routes[index];
  const sfa_layer *layer = &f->model->layers[index];
  int kind = c->layer_kinds[index];
  /* Norms and rotary positions are applied where rows are read: before top-k, in the same pass. */
  const sfa_row_norm q_norm = {layer->q_norm.weight, c->norm_eps}, k_norm = {layer->k_norm.weight, c->norm_eps};
  const sfa_rope turn = {f->rope_cos[kind], f->rope_sin[kind], 2 * c->rope_pairs, c->rope_interleaved};
  const sfa_rope *rope = c->rope_pairs ? &turn : NULL;
  sfa_rows q = {view->q, SFA_F32, 0, view->q_stride, c->head_dim, rope, q_norm.weight ? &q_norm : NULL};
  sfa_rows k = {view->k, SFA_F32, 0, view->k_stride, c->head_dim, rope, k_norm.weight ? &k_norm : NULL};
  const sfa_rows v = {view->v, SFA_F32, 0, view->v_stride, c->head_dim_v, NULL, NULL};
  const int32_t slot = 0;
  if (n == 1) /* a GPU's decode reads queries where they lie */
    norm_heads(f, n, c->n_heads, view->q, &q);
  SFA_TRY(keep_features(f, n, 1, route->keep_keys, view->k, &k));
  SFA_TRY(keep_features(f, n, c->n_heads / c->n_kv_heads, route->keep_queries, view->q, &q));
  SFA_TRY(sfa_cache_append(route->cache, slot, route->cache_layer, n, &k, &v));
  if (f->probe)
    SFA_TRY(show_probe(f, index, n, view, &q));
  sfa_attention_args args = {.struct_size = sizeof args,
                             .q = q,
                             .cu_seqlens_q = n == 1 ? NULL : input_of(f, SFA_INPUT_LENGTHS),
                             .out = f->attended,
                             .workspace = f->workspace};
  const sfa_attention_plan *plan = n == 1 ? route->attention->one : route->attention->chunk;
  args.dropped = n == 1 && f->dropped ? f->dropped + (int64_t)index * c->n_heads : NULL;
  return sfa_attention_run_cached(plan, &args, route->cache, route->cache_layer, &slot);
}

static void feed_forward(sfa_forward *f, const sfa_layer *layer, int32_t n) {
  const sfa_model_config *c = &f->model->config;
  int64_t stride = 2 * (int64_t)c->ffn_dim;
  const sfa_linear_part parts[] = {{layer->gate ? layer->gate : layer->up, f->ffn, stride}, {layer->up, f->ffn + c->ffn_dim, stride}};
  project_stream(f, &layer->ffn_norm, n, layer->gate ? 2 : 1, parts, true, c->ffn_dim);
  add_to_stream(f, layer->down, &layer->post_ffn_norm, n, f->ffn, stride);
}

static sfa_status run_layer(sfa_forward *f, int32_t index, int32_t n, int64_t *attention_ns) {
  const sfa_model *m = f->model;
  const sfa_layer *layer = &m->layers[index];
  qkv_view view = project_qkv(f, layer, n);
  int64_t start = sfa_now_ns();
  SFA_TRY(attend(f, index, n, &view));
  *attention_ns += on_gpu(f) ? 0 : sfa_now_ns() - start;
  add_to_stream(f, layer->o, &layer->post_attention_norm, n, f->attended, (int64_t)m->config.n_heads * m->config.head_dim_v);
  feed_forward(f, layer, n);
  return SFA_OK;
}

/* ---- A step ------------------------------------------------------------------------------------------------------------------------ */

static sfa_status run_layers(sfa_forward *f, int32_t n, float *hidden, int64_t *attention_ns) {
  const sfa_model *m = f->model;
  embed(f, n);
  fill_rotations(f, n);
  for (int32_t index = 0; index < m->config.n_layers; index++)
    SFA_TRY(run_layer(f, index, n, attention_ns));
  norm_rows(m, &m->final_norm, n, f->stream, hidden);
  if (n == 1 && f->dropped)
    m->device->keep_most(m->ctx, (int64_t)m->config.n_layers * m->config.n_heads, f->dropped, f->dropped_most);
  return SFA_OK;
}

static int64_t moves_of(const sfa_forward *f) {
  int64_t moves = 0;
  for (int kind = 0; kind < SFA_CACHES; kind++)
    moves += f->caches[kind] ? sfa_cache_moves(f->caches[kind]) : 0;
  return moves;
}

/* Room for a token, so that a record finds it: nothing may be allocated while one is made or runs. */
static sfa_status reserve_token(sfa_forward *f, int64_t first) {
  for (int kind = 0; kind < SFA_CACHES; kind++)
    if (f->caches[kind])
      SFA_TRY(sfa_cache_reserve(f->caches[kind], 0, first + 1));
  return SFA_OK;
}

/* Makes the record of a step; what it appends counts for its first run. */
static sfa_status make_record(sfa_forward *f, float *hidden) {
  const sfa_model *m = f->model;
  int64_t first = sfa_forward_len(f), ns = 0;
  m->device->record_destroy(m->ctx, f->record);
  f->record = NULL;
  SFA_TRY(m->device->record_begin(m->ctx));
  sfa_status status = run_layers(f, 1, hidden, &ns);
  sfa_status end = m->device->record_end(m->ctx, &f->record);
  f->record_rows = hidden;
  f->record_moves = moves_of(f);
  if (status == SFA_OK && end == SFA_OK && f->record)
    return SFA_OK;
  f->records = false; /* from now on one by one */
  m->device->finish(m->ctx);
  return sfa_forward_truncate(f, first);
}

/* A step of one token as a record. false in *done: there is none, and the timeline is as before. */
static sfa_status run_record(sfa_forward *f, int64_t first, float *hidden, bool *done) {
  const sfa_model *m = f->model;
  *done = false;
  SFA_TRY(reserve_token(f, first));
  bool fits = f->record && f->record_rows == hidden && f->record_moves == moves_of(f);
  if (!fits)
    SFA_TRY(make_record(f, hidden));
  if (!f->record)
    return SFA_OK;
  for (int kind = 0; fits && kind < SFA_CACHES; kind++)
    if (f->caches[kind])
      SFA_TRY(sfa_cache_advance(f->caches[kind], 0, 1));
  *done = true;
  return m->device->record_run(m->ctx, f->record);
}

static sfa_status run_step(sfa_forward *f, const int32_t *tokens, int32_t n, int64_t first, float *hidden, int64_t *attention_ns) {
  const sfa_model *m = f->model;
  bool done = false;
  SFA_TRY(put_inputs(f, tokens, n, first));
  if (n == 1 && first > 0 && f->records && !f->probe)
    SFA_TRY(run_record(f, first, hidden, &done));
  if (!done)
    SFA_TRY(run_layers(f, n, hidden, attention_ns));
  return m->device->finish ? m->device->finish(m->ctx) : SFA_OK;
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
  sfa_status status = run_step(f, tokens, n_tokens, first, hidden, attention_ns);
  for (int kind = 0; status != SFA_OK && kind < SFA_CACHES; kind++) /* layers before the one that failed have the tokens already */
    if (f->caches[kind])
      sfa_cache_truncate(f->caches[kind], 0, first);
  return status;
}

sfa_status sfa_model_logits(const sfa_model *m, int32_t n, const float *hidden, float *logits) {
  const sfa_model_config *c = &m->config;
  void *scratch;
  SFA_TRY(sfa_alloc(m->ctx, m->device->scratch_bytes(m->ctx, n, c->hidden_dim), "rounded activations", &scratch));
  m->device->linear(m->ctx, n, hidden, c->hidden_dim, 1, &(sfa_linear_part){m->head, logits, c->vocab_size}, scratch);
  sfa_free(m->ctx, scratch);
  if (c->final_softcap > 0)
    m->device->softcap(m->ctx, n, c->vocab_size, c->final_softcap, logits, c->vocab_size);
  return m->device->finish ? m->device->finish(m->ctx) : SFA_OK;
}

void sfa_model_score(const sfa_model *m, int32_t n, const float *logits, const int32_t *targets, float *nll, int32_t *argmax) {
  m->device->score(m->ctx, n, m->config.vocab_size, logits, targets, nll, argmax);
}

void *sfa_model_host_alloc(const sfa_model *m, size_t bytes) { return m->device->host_alloc ? m->device->host_alloc(m->ctx, bytes) : NULL; }

void sfa_model_host_free(const sfa_model *m, void *memory) {
  if (m->device->host_free)
    m->device->host_free(m->ctx, memory);
}
