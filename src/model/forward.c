/* Making and keeping a timeline: caches, plans, buffers. What is done with them is in block.c. */
#include "model/forward.h"

#include <sfa/plan.h>
#include <sfa/stream.h>

#include <math.h>
#include <stdio.h>
#include <string.h>

/* What an attention choice came to, layer by layer. */
typedef struct resolution {
  int32_t *k_keys, *k_queries;       /* [n_layers] slots of codes, 0: dense */
  int32_t *keep_keys, *keep_queries; /* [n_layers][G] sfa_layer_route has them */
  sfa_dtype k_dtype[SFA_CACHES], v_dtype;
  const sfa_costs *costs;
  sfa_precision precision;
  sfa_policy policy;
  float eps;
} resolution;

static void free_resolution(sfa_context *ctx, resolution *r) {
  sfa_free(ctx, r->k_keys);
  sfa_free(ctx, r->k_queries);
  sfa_free(ctx, r->keep_keys);
  sfa_free(ctx, r->keep_queries);
}

/* From k of the heads, in keep, to slots of the layer's codes and what is chosen in dense rows before: two of four, top-k before the
 * rotation, and heads with fewer features than another of their layer. What is left fits into codes: of the most features of a head, or of
 * twice as many where a feature's rotation has two; the slots that a row does not need hold zeros. */
static void resolve_kept(const sfa_model_config *c, int32_t *slots, int32_t *keep) {
  for (int32_t layer = 0; layer < c->n_layers; layer++, keep += c->n_kv_heads) {
    int32_t most = 0;
    bool dense = false;
    for (int32_t g = 0; g < c->n_kv_heads; g++) {
      keep[g] = c->two_of_four && keep[g] > c->head_dim / 2 ? c->head_dim / 2 : keep[g];
      most = keep[g] > most ? keep[g] : most;
      dense |= keep[g] == 0;
    }
    slots[layer] = dense ? 0 : c->pre_rope ? 2 * most : most;
    slots[layer] = slots[layer] < c->head_dim ? slots[layer] : 0;
    for (int32_t g = 0; g < c->n_kv_heads && !c->pre_rope && !c->two_of_four; g++)
      keep[g] = keep[g] == slots[layer] ? 0 : keep[g]; /* the code's own top-k */
  }
}

static sfa_status resolve(const sfa_model *model, const sfa_attention_choice *choice, resolution *r) {
  const size_t n_layers = (size_t)model->config.n_layers, n_heads = n_layers * (size_t)model->config.n_kv_heads;
  *r = (resolution){0};
  if (choice) {
    r->costs = choice->costs;
    r->precision = choice->precision;
    r->policy = choice->policy;
    r->eps = choice->eps;
  }
  SFA_TRY(sfa_alloc_zero(model->ctx, n_layers, sizeof(int32_t), "kept features by layer", (void **)&r->k_keys));
  SFA_TRY(sfa_alloc_zero(model->ctx, n_layers, sizeof(int32_t), "kept features by layer", (void **)&r->k_queries));
  SFA_TRY(sfa_alloc_zero(model->ctx, n_heads, sizeof(int32_t), "kept features by head", (void **)&r->keep_keys));
  SFA_TRY(sfa_alloc_zero(model->ctx, n_heads, sizeof(int32_t), "kept features by head", (void **)&r->keep_queries));
  SFA_TRY(sfa_model_resolve(model, choice, r->keep_keys, r->keep_queries, &r->k_dtype[SFA_CACHE_SPARSE], &r->k_dtype[SFA_CACHE_DENSE],
                            &r->v_dtype));
  resolve_kept(&model->config, r->k_keys, r->keep_keys);
  resolve_kept(&model->config, r->k_queries, r->keep_queries);
  return SFA_OK;
}

/* One cache for the dense layers and one for the sparse ones; routes may be NULL. */
static sfa_status create_caches(const sfa_model *model, const resolution *r, sfa_cache *caches[SFA_CACHES], sfa_layer_route *routes) {
  const sfa_model_config *c = &model->config;
  int32_t *k;
  SFA_TRY(sfa_alloc_zero(model->ctx, (size_t)c->n_layers, sizeof *k, "kept features by layer", (void **)&k));
  sfa_status status = SFA_OK;
  for (int kind = 0; kind < SFA_CACHES && status == SFA_OK; kind++) {
    int32_t n = 0;
    for (int32_t layer = 0; layer < c->n_layers; layer++)
      if ((r->k_keys[layer] > 0) == (kind == SFA_CACHE_SPARSE))
        k[n++] = r->k_keys[layer];
    if (n == 0)
      continue;
    sfa_cache_options options = {.struct_size = sizeof options,
                                 .n_layers = n,
                                 .n_kv_heads = c->n_kv_heads,
                                 .head_dim = c->head_dim,
                                 .head_dim_v = c->head_dim_v,
                                 .k = k,
                                 .k_dtype = r->k_dtype[kind],
                                 .v_dtype = r->v_dtype};
    status = sfa_cache_create(model->ctx, &options, &caches[kind]);
    n = 0;
    for (int32_t layer = 0; routes && status == SFA_OK && layer < c->n_layers; layer++)
      if ((r->k_keys[layer] > 0) == (kind == SFA_CACHE_SPARSE))
        routes[layer] = (sfa_layer_route){.cache = caches[kind], .cache_layer = n++};
  }
  sfa_free(model->ctx, k);
  return status;
}

static void destroy_caches(sfa_cache *caches[SFA_CACHES]) {
  for (int kind = 0; kind < SFA_CACHES; kind++)
    if (caches[kind])
      sfa_cache_destroy(caches[kind]);
}

sfa_status sfa_model_kv_bytes(const sfa_model *model, const sfa_attention_choice *choice, size_t *bytes) {
  resolution r;
  sfa_cache *caches[SFA_CACHES] = {NULL, NULL};
  sfa_status status = resolve(model, choice, &r);
  if (status == SFA_OK)
    status = create_caches(model, &r, caches, NULL);
  *bytes = 0;
  for (int kind = 0; kind < SFA_CACHES && status == SFA_OK; kind++)
    *bytes += caches[kind] ? sfa_cache_token_bytes(caches[kind]) : 0;
  destroy_caches(caches);
  free_resolution(model->ctx, &r);
  return status;
}

/* ---- Plans ----------------------------------------------------------------------------------------------------------------------- */

static sfa_status create_plan(const sfa_forward *f, const resolution *r, const sfa_attention_kind *kind, int64_t n_tokens,
                              sfa_policy policy, sfa_attention_plan **plan) {
  const sfa_model_config *c = &f->model->config;
  sfa_attention_options options = {
      .struct_size = sizeof options,
      .n_heads = c->n_heads,
      .n_kv_heads = c->n_kv_heads,
      .head_dim = c->head_dim,
      .head_dim_v = c->head_dim_v,
      .max_seqlen_q = n_tokens,
      .max_seqlen_k = f->context_len,
      .k_q = kind->k_queries,
      .k_k = kind->k_keys,
      .softmax_scale = c->softmax_scale,
      .softcap = c->attention_softcap,
      .causal = 1,
      .has_window = kind->layer_kind == SFA_LAYER_LOCAL,
      .window_size = {kind->layer_kind == SFA_LAYER_LOCAL ? c->window_len - 1 : -1, -1},
      .from_cache = 1,
      .k_dtype = r->k_dtype[kind->k_keys ? SFA_CACHE_SPARSE : SFA_CACHE_DENSE],
      .v_dtype = r->v_dtype,
      .policy = policy,
      .costs = r->costs,
      .precision = r->precision,
      .eps = n_tokens == 1 ? r->eps : 0, /* what is read stays exact */
  };
  return sfa_attention_plan_create(f->model->ctx, &options, plan);
}

/* Whether whole numbers pay: where a model learned to attend by codes, and its keys are stored so, they cost it nothing (docs/RESULTS.md);
 * heads of up to 64 gain no time by them. */
static bool whole_numbers_pay(const sfa_forward *f, const resolution *r, const sfa_attention_kind *kind) {
  const sfa_model_config *c = &f->model->config;
  return c->is_sparse && kind->k_keys && r->k_dtype[SFA_CACHE_SPARSE] == SFA_I8 && c->head_dim > 64;
}

/* Of steps of several tokens. On a GPU the planner's choice for short ones takes whole chunks only, so that it is made here. */
static sfa_status create_chunk_plan(const sfa_forward *f, const resolution *r, const sfa_attention_kind *kind, sfa_attention_plan **plan) {
  const bool on_gpu = sfa_context_device(f->model->ctx) != SFA_DEVICE_CPU;
  if (r->policy || !on_gpu || r->precision == SFA_PRECISION_F32)
    return create_plan(f, r, kind, f->chunk_len, r->policy, plan);
  if (whole_numbers_pay(f, r, kind)) {
    sfa_status status = create_plan(f, r, kind, f->chunk_len, SFA_POLICY_INT8, plan);
    if (status != SFA_ERROR_UNSUPPORTED) /* not by this GPU */
      return status;
  }
  return create_plan(f, r, kind, f->chunk_len, SFA_POLICY_BF16, plan);
}

static sfa_status route_attention(sfa_forward *f, const resolution *r, size_t *workspace_bytes) {
  const sfa_model_config *c = &f->model->config;
  for (int32_t layer = 0; layer < c->n_layers; layer++) {
    sfa_attention_kind wanted = {
        .k_keys = r->k_keys[layer], .k_queries = r->k_queries[layer], .layer_kind = (sfa_layer_kind)c->layer_kinds[layer]};
    int32_t i = 0;
    while (i < f->n_attention && (f->attention[i].k_keys != wanted.k_keys || f->attention[i].k_queries != wanted.k_queries ||
                                  f->attention[i].layer_kind != wanted.layer_kind))
      i++;
    sfa_attention_kind *kind = &f->attention[i];
    if (i == f->n_attention) {
      *kind = wanted;
      f->n_attention++;
      SFA_TRY(create_chunk_plan(f, r, kind, &kind->chunk));
      SFA_TRY(create_plan(f, r, kind, 1, SFA_POLICY_AUTO, &kind->one));
      size_t chunk_bytes = sfa_attention_workspace_bytes(kind->chunk), one_bytes = sfa_attention_workspace_bytes(kind->one);
      *workspace_bytes = chunk_bytes > *workspace_bytes ? chunk_bytes : *workspace_bytes;
      *workspace_bytes = one_bytes > *workspace_bytes ? one_bytes : *workspace_bytes;
    }
    f->routes[layer].attention = kind;
    f->routes[layer].keep_keys = f->keep_keys + (int64_t)layer * c->n_kv_heads;
    f->routes[layer].keep_queries = f->keep_queries + (int64_t)layer * c->n_kv_heads;
  }
  return SFA_OK;
}

/* ---- Life ------------------------------------------------------------------------------------------------------------------------ */

/* Memory of the device; what was too much is said with what would be less. */
static sfa_status alloc_bytes(const sfa_forward *f, size_t bytes, const char *what, void **out) {
  sfa_context *ctx = f->model->ctx;
  char text[256];
  sfa_status status = sfa_memory_alloc(ctx, bytes, out);
  if (status != SFA_ERROR_MEMORY)
    return status;
  snprintf(text, sizeof text, "%s", sfa_context_error(ctx));
  return sfa_fail(ctx, SFA_ERROR_MEMORY, "%s, %d tokens at a time: %s; take smaller chunks, or a shorter context", what, f->chunk_len,
                  text);
}

/* Zeros in the device's memory. */
static sfa_status alloc_device(const sfa_forward *f, size_t count, size_t element_bytes, const char *what, void *out) {
  sfa_context *ctx = f->model->ctx;
  void **memory = out;
  size_t bytes;
  if (!sfa_mul_size(count, element_bytes, &bytes) || bytes > PTRDIFF_MAX)
    return sfa_fail(ctx, SFA_ERROR_MEMORY, "out of memory: %zu times %zu bytes for %s", count, element_bytes, what);
  SFA_TRY(alloc_bytes(f, bytes, what, memory));
  return sfa_memory_zero(ctx, *memory, bytes);
}

static sfa_status alloc_rows(const sfa_forward *f, int64_t dim, const char *what, float **out) {
  return alloc_device(f, (size_t)f->chunk_len, (size_t)dim * sizeof(float), what, out);
}

static sfa_status create_rotations(sfa_forward *f) {
  const sfa_model_config *c = &f->model->config;
  for (int kind = 0; c->rope_pairs && kind < SFA_LAYER_KINDS; kind++) {
    SFA_TRY(alloc_rows(f, c->rope_pairs, "rotations", &f->rope_cos[kind]));
    SFA_TRY(alloc_rows(f, c->rope_pairs, "rotations", &f->rope_sin[kind]));
    SFA_TRY(alloc_device(f, (size_t)c->rope_pairs, sizeof(double), "frequencies", &f->frequencies[kind]));
    SFA_TRY(sfa_memory_copy(f->model->ctx, f->frequencies[kind], c->rope_frequencies[kind], (size_t)c->rope_pairs * sizeof(double)));
  }
  return SFA_OK;
}

static sfa_status create_buffers(sfa_forward *f, size_t workspace_bytes) {
  const sfa_model *m = f->model;
  const sfa_model_config *c = &m->config;
  int64_t attended_dim = (int64_t)c->n_heads * c->head_dim_v;
  int64_t qkv_dim = (int64_t)(c->n_heads + c->n_kv_heads) * c->head_dim + (int64_t)c->n_kv_heads * c->head_dim_v;
  SFA_TRY(alloc_rows(f, c->hidden_dim, "the residual stream", &f->stream));
  SFA_TRY(alloc_rows(f, c->hidden_dim, "activations", &f->normed));
  SFA_TRY(alloc_rows(f, qkv_dim, "queries, keys and values", &f->qkv));
  SFA_TRY(alloc_rows(f, attended_dim, "attention's output", &f->attended));
  SFA_TRY(alloc_rows(f, 2 * (int64_t)c->ffn_dim, "feed-forward activations", &f->ffn));
  SFA_TRY(alloc_device(f, SFA_INPUTS * ((size_t)f->chunk_len + 2), sizeof *f->inputs, "the tokens of a step", &f->inputs));
  SFA_TRY(create_rotations(f));
  const int64_t n_ins[] = {c->hidden_dim, attended_dim, c->ffn_dim};
  size_t scratch_bytes = 0;
  for (size_t i = 0; i < sizeof n_ins / sizeof *n_ins; i++) {
    size_t bytes = m->device->scratch_bytes(m->ctx, f->chunk_len, (int32_t)n_ins[i]);
    scratch_bytes = bytes > scratch_bytes ? bytes : scratch_bytes;
  }
  SFA_TRY(alloc_bytes(f, scratch_bytes, "scratch of linear layers", &f->scratch));
  return alloc_bytes(f, workspace_bytes, "the workspace of attention", &f->workspace);
}

static sfa_status fill_forward(sfa_forward *f, resolution *r) {
  const sfa_model *m = f->model;
  size_t n_layers = (size_t)m->config.n_layers, workspace_bytes = 0;
  SFA_TRY(sfa_alloc_zero(m->ctx, n_layers, sizeof *f->routes, "routes", (void **)&f->routes));
  SFA_TRY(sfa_alloc_zero(m->ctx, n_layers, sizeof *f->attention, "attention plans", (void **)&f->attention));
  f->keep_keys = r->keep_keys, f->keep_queries = r->keep_queries; /* theirs from here on */
  r->keep_keys = r->keep_queries = NULL;
  SFA_TRY(create_caches(m, r, f->caches, f->routes));
  memcpy(f->k_dtype, r->k_dtype, sizeof f->k_dtype);
  f->v_dtype = r->v_dtype;
  if (r->eps > 0) {
    SFA_TRY(alloc_device(f, n_layers * (size_t)m->config.n_heads, sizeof *f->dropped, "masses left out", &f->dropped));
    SFA_TRY(alloc_device(f, 1, sizeof *f->dropped_most, "masses left out", &f->dropped_most));
  }
  SFA_TRY(route_attention(f, r, &workspace_bytes));
  return create_buffers(f, workspace_bytes);
}

sfa_status sfa_forward_create(const sfa_model *model, const sfa_attention_choice *choice, int64_t context_len, int32_t chunk_len,
                              sfa_forward **forward) {
  sfa_context *ctx = model->ctx;
  *forward = NULL;
  SFA_REQUIRE(ctx, context_len >= 1 && context_len <= INT32_MAX, "a context of %lld tokens is out of range", (long long)context_len);
  SFA_REQUIRE(ctx, chunk_len >= 1, "a chunk of %d tokens is out of range", chunk_len);
  if (model->positions && context_len > model->config.context_len)
    return sfa_fail(ctx, SFA_ERROR_RANGE, "a context of %lld tokens: this model has learned positions for %lld", (long long)context_len,
                    (long long)model->config.context_len);
  resolution r;
  sfa_forward *f = NULL;
  sfa_status status = resolve(model, choice, &r);
  if (status == SFA_OK)
    status = sfa_alloc_zero(ctx, 1, sizeof *f, "a timeline", (void **)&f);
  if (status == SFA_OK) {
    f->model = model;
    f->context_len = context_len;
    f->chunk_len = (int32_t)sfa_min64(chunk_len, context_len);
    f->records = model->device->record_begin != NULL;
    status = fill_forward(f, &r);
  }
  free_resolution(ctx, &r);
  if (status != SFA_OK) {
    sfa_forward_destroy(f);
    return status;
  }
  *forward = f;
  return SFA_OK;
}

void sfa_forward_destroy(sfa_forward *f) {
  if (!f)
    return;
  sfa_context *ctx = f->model->ctx;
  for (int32_t i = 0; i < f->n_attention; i++) {
    if (f->attention[i].chunk)
      sfa_attention_plan_destroy(f->attention[i].chunk);
    if (f->attention[i].one)
      sfa_attention_plan_destroy(f->attention[i].one);
  }
  destroy_caches(f->caches);
  if (f->record)
    f->model->device->record_destroy(ctx, f->record);
  void *buffers[] = {f->stream,         f->normed,         f->qkv,         f->attended,    f->ffn,       f->inputs,
                     f->rope_cos[0],    f->rope_cos[1],    f->rope_sin[0], f->rope_sin[1], f->workspace, f->scratch,
                     f->frequencies[0], f->frequencies[1], f->dropped,     f->dropped_most};
  for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
    sfa_memory_free(ctx, buffers[i]);
  sfa_free(ctx, f->keep_keys);
  sfa_free(ctx, f->keep_queries);
  sfa_free(ctx, f->routes);
  sfa_free(ctx, f->attention);
  sfa_free(ctx, f);
}

int64_t sfa_forward_len(const sfa_forward *f) { return sfa_cache_len(f->routes[0].cache, 0, f->routes[0].cache_layer); }

sfa_status sfa_forward_truncate(sfa_forward *f, int64_t new_len) {
  SFA_REQUIRE(f->model->ctx, new_len >= 0 && new_len <= sfa_forward_len(f), "cannot cut a timeline of %lld tokens to %lld",
              (long long)sfa_forward_len(f), (long long)new_len);
  for (int kind = 0; kind < SFA_CACHES; kind++)
    if (f->caches[kind])
      SFA_TRY(sfa_cache_truncate(f->caches[kind], 0, new_len));
  return SFA_OK;
}

float sfa_forward_dropped(const sfa_forward *f) {
  sfa_context *ctx = f->model->ctx;
  float most = 0;
  bool good = !f->dropped || (sfa_memory_copy(ctx, &most, f->dropped_most, sizeof most) == SFA_OK && sfa_stream_wait(ctx) == SFA_OK);
  return good ? most : NAN;
}

sfa_policy sfa_forward_policy(const sfa_forward *f) {
  sfa_attention_report report = {.struct_size = sizeof report};
  int32_t layer = 0;
  while (layer < f->model->config.n_layers && !f->routes[layer].attention->k_keys)
    layer++;
  const sfa_attention_kind *kind = f->routes[layer < f->model->config.n_layers ? layer : 0].attention;
  return sfa_attention_plan_report(kind->chunk, &report) == SFA_OK ? report.policy : SFA_POLICY_AUTO;
}

size_t sfa_forward_kv_bytes(const sfa_forward *f) {
  size_t bytes = 0;
  for (int kind = 0; kind < SFA_CACHES; kind++)
    bytes += f->caches[kind] ? sfa_cache_bytes(f->caches[kind]) : 0;
  return bytes;
}

void sfa_forward_probe(sfa_forward *f, sfa_probe_fn probe, void *user) {
  f->probe = probe;
  f->probe_user = user;
}

const sfa_cache *sfa_forward_cache(const sfa_forward *f, int32_t layer, int32_t *cache_layer) {
  *cache_layer = f->routes[layer].cache_layer;
  return f->routes[layer].cache;
}

/* ---- Pages ----------------------------------------------------------------------------------------------------------------------- */

sfa_layer_storage sfa_forward_storage(const sfa_forward *f, int32_t layer) {
  const sfa_layer_route *route = &f->routes[layer];
  return (sfa_layer_storage){.k = route->attention->k_keys,
                             .k_q = route->attention->k_queries,
                             .k_dtype = f->k_dtype[route->attention->k_keys ? SFA_CACHE_SPARSE : SFA_CACHE_DENSE],
                             .v_dtype = f->v_dtype,
                             .page_bytes = sfa_cache_page_bytes(route->cache, route->cache_layer)};
}

sfa_status sfa_forward_page_save(const sfa_forward *f, int32_t layer, int64_t page, void *image) {
  return sfa_cache_page_save(f->routes[layer].cache, 0, f->routes[layer].cache_layer, page, image);
}

sfa_status sfa_forward_map(sfa_forward *f, int64_t len, const void *const *pages) {
  enum { PAGE_LEN = 64 }; /* tokens of a page: sfa/cache.h */
  int64_t n_pages = (len + PAGE_LEN - 1) / PAGE_LEN;
  for (int32_t layer = 0; layer < f->model->config.n_layers; layer++) {
    sfa_status status = sfa_cache_map(f->routes[layer].cache, 0, f->routes[layer].cache_layer, len, pages + layer * n_pages);
    if (status != SFA_OK) {
      for (int kind = 0; kind < SFA_CACHES; kind++)
        if (f->caches[kind])
          sfa_cache_truncate(f->caches[kind], 0, 0);
      return status;
    }
  }
  return SFA_OK;
}
