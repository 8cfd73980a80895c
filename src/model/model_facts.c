/* What a loaded model tells about itself. */
#include "model/model_parts.h"

#include <string.h>

#include "base/hash.h"

sfa_context *sfa_model_context(const sfa_model *model) { return model->ctx; }
const sfa_weights *sfa_model_weights(const sfa_model *model) { return model->weights; }
void sfa_model_attach(sfa_model *model, sfa_tokenizer *tokenizer) { model->tokenizer = tokenizer; }
sfa_tokenizer *sfa_model_attached(const sfa_model *model) { return model->tokenizer; }

/* The most features of a sparse head; queries that are dense anywhere have no such number. */
static sfa_head_features most_features(const sfa_model_config *c) {
  sfa_head_features most = {0, 0};
  bool dense_queries = false;
  for (int32_t head = 0; head < c->n_layers * c->n_kv_heads; head++) {
    const sfa_head_features f = sfa_model_features(c, head);
    most.k = f.k > most.k ? f.k : most.k;
    most.k_q = f.k_q > most.k_q ? f.k_q : most.k_q;
    dense_queries |= f.k > 0 && f.k_q == 0;
  }
  return (sfa_head_features){most.k, dense_queries ? 0 : most.k_q};
}

void sfa_model_describe(const sfa_model *model, sfa_model_info *info) {
  const sfa_model_config *c = &model->config;
  const sfa_head_features most = most_features(c);
  const char *name = "";
  if (!sfa_meta_string(model->weights, "general.name", &name, NULL))
    sfa_meta_string(model->weights, "_name_or_path", &name, NULL);
  *info = (sfa_model_info){
      .family = c->family->name,
      .name = name,
      .format = sfa_weights_format(model->weights),
      .n_layers = c->n_layers,
      .n_heads = c->n_heads,
      .n_kv_heads = c->n_kv_heads,
      .head_dim = c->head_dim,
      .head_dim_v = c->head_dim_v,
      .hidden_dim = c->hidden_dim,
      .intermediate_dim = c->ffn_dim,
      .vocab_size = c->vocab_size,
      .context_len = c->context_len,
      .n_parameters = model->n_parameters,
      .file_bytes = sfa_weights_bytes(model->weights),
      .n_tensors = sfa_weights_count(model->weights),
      .is_instruct = model->tokenizer && sfa_tokenizer_has_chat(model->tokenizer),
      .weights = model->format,
      .sfa_k = most.k,
      .sfa_k_q = most.k_q,
  };
}

int sfa_model_tensor(const sfa_model *model, int64_t index, sfa_tensor_info *info) {
  if (index < 0 || index >= sfa_weights_count(model->weights))
    return 0;
  const sfa_tensor *t = sfa_weights_at(model->weights, index);
  *info = (sfa_tensor_info){t->name, sfa_tensor_type_name(t->type), t->n_dims, {0}, t->bytes};
  memcpy(info->shape, t->shape, sizeof info->shape);
  return 1;
}

sfa_model_heads sfa_model_heads_of(const sfa_model *model) {
  const sfa_model_config *c = &model->config;
  return (sfa_model_heads){c->n_layers, c->n_heads, c->n_kv_heads, c->head_dim, c->softmax_scale, c->attention_softcap};
}

/* ---- Fingerprint ----------------------------------------------------------------------------------------------------------------- */

static uint64_t hash_config(uint64_t h, const sfa_model_config *c) {
  const int64_t whole[] = {c->n_layers,   c->hidden_dim,  c->ffn_dim,    c->n_heads,    c->n_kv_heads,      c->head_dim,
                           c->vocab_size, c->context_len, c->window_len, c->rope_pairs, c->rope_interleaved};
  const float real[] = {c->norm_eps, c->softmax_scale, c->attention_softcap, c->final_softcap, c->embedding_scale};
  h = sfa_hash_bytes(h, c->family->name, strlen(c->family->name));
  h = sfa_hash_bytes(h, whole, sizeof whole);
  h = sfa_hash_bytes(h, real, sizeof real);
  h = sfa_hash_bytes(h, c->layer_kinds, (size_t)c->n_layers);
  for (int kind = 0; kind < SFA_LAYER_KINDS; kind++)
    if (c->rope_frequencies[kind])
      h = sfa_hash_bytes(h, c->rope_frequencies[kind], (size_t)c->rope_pairs * sizeof(double));
  return h;
}

/* Name, type, shape; and 64 bytes of the start, of the middle and of the end. */
static uint64_t hash_tensor(uint64_t h, const sfa_tensor *t) {
  enum { SAMPLE = 64 };
  const int64_t numbers[] = {t->type, t->n_dims, t->shape[0], t->shape[1], t->shape[2], t->shape[3], t->bytes};
  const uint8_t *data = t->data;
  h = sfa_hash_bytes(h, t->name, strlen(t->name));
  h = sfa_hash_bytes(h, numbers, sizeof numbers);
  if (t->bytes <= 3 * SAMPLE)
    return sfa_hash_bytes(h, data, (size_t)t->bytes);
  const int64_t places[] = {0, t->bytes / 2 - SAMPLE / 2, t->bytes - SAMPLE};
  for (int i = 0; i < 3; i++)
    h = sfa_hash_bytes(h, data + places[i], SAMPLE);
  return h;
}

uint64_t sfa_model_fingerprint(const sfa_model *model) {
  uint64_t h = hash_config(sfa_hash_word(0, (uint64_t)sfa_weights_bytes(model->weights)), &model->config);
  for (int64_t i = 0; i < sfa_weights_count(model->weights); i++)
    h = hash_tensor(h, sfa_weights_at(model->weights, i));
  return h;
}
