/* What a loaded model tells about itself. */
#include "model/model_parts.h"

#include <string.h>

sfa_context *sfa_model_context(const sfa_model *model) { return model->ctx; }
const sfa_weights *sfa_model_weights(const sfa_model *model) { return model->weights; }
void sfa_model_attach(sfa_model *model, sfa_tokenizer *tokenizer) { model->tokenizer = tokenizer; }
sfa_tokenizer *sfa_model_attached(const sfa_model *model) { return model->tokenizer; }

static int32_t largest_of(const int32_t *values, int32_t n) {
  int32_t largest = 0;
  for (int32_t i = 0; i < n; i++)
    largest = values[i] > largest ? values[i] : largest;
  return largest;
}

void sfa_model_describe(const sfa_model *model, sfa_model_info *info) {
  const sfa_model_config *c = &model->config;
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
      .hidden_dim = c->hidden_dim,
      .intermediate_dim = c->ffn_dim,
      .vocab_size = c->vocab_size,
      .context_len = c->context_len,
      .n_parameters = model->n_parameters,
      .file_bytes = sfa_weights_bytes(model->weights),
      .n_tensors = sfa_weights_count(model->weights),
      .is_instruct = model->tokenizer && sfa_tokenizer_has_chat(model->tokenizer),
      .weights = model->format,
      .sfa_k = largest_of(c->sfa_k, c->n_layers),
      .sfa_k_q = c->sfa_k_q,
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
