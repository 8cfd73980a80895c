/* One query against the keys of a layer, by the public calls of libsfa. */
#include "engine/look.h"

#include <math.h>
#include <string.h>

static float scale_of(const sfa_look *look) {
  return look->heads.softmax_scale > 0 ? look->heads.softmax_scale : 1 / sqrtf((float)look->heads.head_dim);
}

sfa_status sfa_look_open(sfa_look *look, const sfa_model *model) {
  *look = (sfa_look){.ctx = sfa_model_context(model), .heads = sfa_model_heads_of(model)};
  int32_t D = look->heads.head_dim;
  return sfa_alloc(look->ctx, sfa_codes_bytes(1, D, D, SFA_F32), "the code of a query", &look->memory);
}

void sfa_look_close(sfa_look *look) { sfa_free(look->ctx, look->memory); }

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
