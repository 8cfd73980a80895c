/* One query against the keys of a layer, by the public calls of libsfa. */
#include "engine/look.h"

#include <sfa/stream.h>

#include <math.h>
#include <string.h>

static float scale_of(const sfa_look *look) {
  return look->heads.softmax_scale > 0 ? look->heads.softmax_scale : 1 / sqrtf((float)look->heads.head_dim);
}

sfa_status sfa_look_open(sfa_look *look, const sfa_model *model) {
  sfa_context *ctx = sfa_model_context(model);
  sfa_model_info info;
  sfa_model_describe(model, &info);
  *look = (sfa_look){.ctx = ctx, .model_ctx = ctx, .heads = sfa_model_heads_of(model), .head_dim_v = info.head_dim_v};
  if (sfa_context_device(ctx) != SFA_DEVICE_CPU) {
    char why[160] = "";
    const sfa_context_options options = {.struct_size = sizeof options, .n_threads = ctx->n_threads, .why = why, .why_bytes = sizeof why};
    look->ctx = NULL;
    sfa_status status = sfa_context_create(&options, &look->ctx);
    if (status != SFA_OK)
      return sfa_fail(ctx, status, "a context of the CPU, for looking inside: %s", why);
  }
  int32_t D = look->heads.head_dim;
  return sfa_alloc(look->ctx, sfa_codes_bytes(1, D, D, SFA_F32), "the code of a query", &look->memory);
}

static void forget(sfa_look *look) {
  sfa_cache_destroy(look->cache); /* before its pages */
  sfa_free(look->ctx, look->pages);
  sfa_free(look->ctx, look->queries);
  look->cache = NULL;
  look->pages = look->queries = NULL;
}

sfa_status sfa_look_close(sfa_look *look, sfa_status status) {
  if (!look->ctx)
    return status;
  forget(look);
  sfa_free(look->ctx, look->memory);
  if (look->ctx == look->model_ctx)
    return status;
  if (status != SFA_OK && *sfa_context_error(look->ctx))
    sfa_fail(look->model_ctx, status, "%s", sfa_context_error(look->ctx));
  sfa_context_destroy(look->ctx);
  return status;
}

/* A cache of one layer over copies of the pages that hold `len` tokens of the probe's. */
static sfa_status bring_pages(sfa_look *look, const sfa_layer_storage *storage, const sfa_probe *probe, int64_t len) {
  enum { PAGE_LEN = 64 }; /* tokens of a page: sfa/cache.h */
  size_t n_pages = (size_t)((len + PAGE_LEN - 1) / PAGE_LEN);
  const sfa_cache_options options = {.struct_size = sizeof options,
                                     .n_layers = 1,
                                     .n_kv_heads = look->heads.n_kv_heads,
                                     .head_dim = look->heads.head_dim,
                                     .head_dim_v = look->head_dim_v,
                                     .k = &storage->k,
                                     .k_dtype = storage->k_dtype,
                                     .v_dtype = storage->v_dtype};
  SFA_TRY(sfa_cache_create(look->ctx, &options, &look->cache));
  SFA_TRY(sfa_alloc_zero(look->ctx, n_pages, storage->page_bytes + sizeof(void *), "a layer's pages", &look->pages));
  const void **list = (const void **)(void *)((unsigned char *)look->pages + n_pages * storage->page_bytes);
  for (size_t i = 0; i < n_pages; i++) {
    void *image = (unsigned char *)look->pages + i * storage->page_bytes;
    list[i] = image;
    SFA_TRY(sfa_cache_page_save(probe->cache, 0, probe->cache_layer, (int64_t)i, image));
  }
  return sfa_cache_map(look->cache, 0, 0, len, list);
}

sfa_status sfa_look_bring(sfa_look *look, const sfa_forward *forward, const sfa_probe *probe, sfa_probe *here) {
  const sfa_layer_storage storage = sfa_forward_storage(forward, probe->layer);
  *here = *probe;
  if (look->ctx == look->model_ctx)
    return SFA_OK;
  forget(look);
  size_t n = (size_t)(probe->n_tokens - 1) * (size_t)probe->query_stride + (size_t)look->heads.n_heads * (size_t)look->heads.head_dim;
  SFA_TRY(sfa_alloc_zero(look->ctx, n, sizeof *look->queries, "queries", (void **)&look->queries));
  SFA_TRY(sfa_memory_copy(look->model_ctx, look->queries, probe->queries, n * sizeof *look->queries));
  SFA_TRY(sfa_stream_wait(look->model_ctx));
  SFA_TRY(bring_pages(look, &storage, probe, probe->first + probe->n_tokens));
  here->queries = look->queries;
  here->cache = look->cache;
  here->cache_layer = 0;
  return SFA_OK;
}

sfa_status sfa_look_query(sfa_look *look, const sfa_probe *probe, int32_t token, int32_t head) {
  int32_t D = look->heads.head_dim, k = probe->k_queries ? probe->k_queries : D;
  SFA_TRY(sfa_codes_place(look->ctx, 1, D, k, SFA_F32, look->memory, &look->code));
  return sfa_codes_select(look->ctx, probe->queries + token * probe->query_stride + (int64_t)head * D, SFA_F32, D, &look->code);
}

sfa_status sfa_look_weights(sfa_look *look, const sfa_probe *probe, int32_t token, int32_t head, const sfa_postings *postings,
                            float *scores, float *weights) {
  const sfa_model_heads *h = &look->heads;
  int64_t n = probe->first + token + 1, hidden = probe->window_len && n > probe->window_len ? n - probe->window_len : 0;
  sfa_search search = {.struct_size = sizeof search,
                       .layer = probe->cache_layer,
                       .kv_head = head / (h->n_heads / h->n_kv_heads),
                       .end_key = n,
                       .query = &look->code,
                       .softmax_scale = scale_of(look),
                       .postings = postings};
  SFA_TRY(sfa_cache_scores(probe->cache, &search, scores));
  float most = -INFINITY;
  for (int64_t i = 0; i < n; i++) {
    weights[i] = i < hidden ? -INFINITY : h->softcap > 0 ? h->softcap * tanhf(scores[i] / h->softcap) : scores[i];
    most = fmaxf(most, weights[i]);
  }
  double sum = 0;
  for (int64_t i = 0; i < n; i++)
    sum += (double)(weights[i] = expf(weights[i] - most));
  for (int64_t i = 0; i < n; i++)
    weights[i] = (float)((double)weights[i] / sum);
  return SFA_OK;
}

/* Keeps the largest parts, falling. */
static void add_reason(sfa_explained_token *out, int32_t feature, float part) {
  int32_t at = out->n_reasons;
  while (at > 0 && fabsf(part) > fabsf(out->reasons[at - 1].part))
    at--;
  if (at == SFA_MAX_REASONS)
    return;
  int32_t n_after = (out->n_reasons < SFA_MAX_REASONS ? out->n_reasons : SFA_MAX_REASONS - 1) - at;
  memmove(out->reasons + at + 1, out->reasons + at, (size_t)n_after * sizeof *out->reasons);
  out->reasons[at] = (sfa_reason){feature, part};
  out->n_reasons = at + n_after + 1;
}

sfa_status sfa_look_reasons(const sfa_look *look, const sfa_probe *probe, int32_t head, int64_t key, void *ids, float *values,
                            sfa_explained_token *out) {
  const sfa_model_heads *h = &look->heads;
  int32_t D = h->head_dim, k_keys = sfa_cache_k(probe->cache, probe->cache_layer), n = k_keys ? k_keys : D;
  SFA_TRY(sfa_cache_read_keys(probe->cache, 0, probe->cache_layer, head / (h->n_heads / h->n_kv_heads), key, 1, ids, values));
  out->n_shared = out->n_reasons = 0;
  for (int32_t i = 0, u = 0; i < n; i++) { /* both ascend */
    int32_t feature = sfa_look_feature(k_keys ? ids : NULL, D, i);
    while (u < look->code.k && sfa_look_feature(look->code.ids, D, u) < feature)
      u++;
    if (u == look->code.k || sfa_look_feature(look->code.ids, D, u) != feature)
      continue;
    out->n_shared++;
    add_reason(out, feature, scale_of(look) * ((const float *)look->code.values)[u] * values[i]);
  }
  return SFA_OK;
}
