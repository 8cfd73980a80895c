/* From a file's metadata to sfa_model_config: one reader for GGUF keys and config.json paths. */
#include "model/model_parts.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

const char *sfa_config_key(const sfa_model_config *config, const char *key, char out[SFA_KEY_BYTES]) {
  snprintf(out, SFA_KEY_BYTES, "%s%s", config->prefix, key);
  return out;
}

bool sfa_config_number(const sfa_weights *weights, const sfa_model_config *config, const char *key, double *out) {
  char text[SFA_KEY_BYTES];
  return sfa_meta_number(weights, sfa_config_key(config, key, text), out);
}

bool sfa_config_bool(const sfa_weights *weights, const sfa_model_config *config, const char *key, bool *out) {
  char text[SFA_KEY_BYTES];
  return sfa_meta_bool(weights, sfa_config_key(config, key, text), out);
}

bool sfa_config_string(const sfa_weights *weights, const sfa_model_config *config, const char *key, const char **out) {
  char text[SFA_KEY_BYTES];
  return sfa_meta_string(weights, sfa_config_key(config, key, text), out, NULL);
}

/* The file's own key of a number that the families know, without prefix; NULL if this kind of file has none. */
static const char *number_key(const sfa_model_config *config, sfa_number number) {
  if (config->is_gguf)
    return number == SFA_NUMBER_NORM_EPS ? config->family->gguf_norm_eps : sfa_gguf_numbers[number];
  return config->family->numbers[number];
}

/* A whole number from 1 to most. fallback 0: it must be there. */
static sfa_status read_count(sfa_context *ctx, const sfa_weights *weights, const sfa_model_config *config, sfa_number number, int64_t most,
                             int64_t fallback, int64_t *out) {
  const char *key = number_key(config, number);
  double value = (double)fallback;
  if ((!key || !sfa_config_number(weights, config, key, &value)) && fallback == 0)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "the model file does not say %s%s: convert or download it again", config->prefix,
                    key ? key : "a number that its family needs");
  if (!(value >= 1 && value <= (double)most) || value != floor(value))
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s%s is %g, not a whole number from 1 to %lld: the model file is damaged", config->prefix,
                    key ? key : "", value, (long long)most);
  *out = (int64_t)value;
  return SFA_OK;
}

static sfa_status read_count32(sfa_context *ctx, const sfa_weights *weights, const sfa_model_config *config, sfa_number number,
                               int32_t most, int32_t fallback, int32_t *out) {
  int64_t value;
  SFA_TRY(read_count(ctx, weights, config, number, most, fallback, &value));
  *out = (int32_t)value;
  return SFA_OK;
}

static sfa_status find_family(sfa_context *ctx, const sfa_weights *weights, sfa_model_config *config) {
  const char *name = NULL, *key;
  config->is_gguf = strcmp(sfa_weights_format(weights), "gguf") == 0;
  key = config->is_gguf ? "general.architecture" : "model_type";
  if (!sfa_meta_string(weights, key, &name, NULL))
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "the model file does not say its %s: is it a language model?", key);
  config->family = config->is_gguf ? sfa_family_of_gguf(name) : sfa_family_of_model_type(name);
  if (!config->family)
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "models of the architecture \"%.60s\" are not handled; these are: %s", name,
                    sfa_families_known);
  if (config->is_gguf) {
    snprintf(config->prefix, sizeof config->prefix, "%s.", name);
    return SFA_OK;
  }
  double n_layers;
  for (size_t i = 0; i < sizeof config->family->config_prefixes / sizeof(char *) && config->family->config_prefixes[i]; i++) {
    snprintf(config->prefix, sizeof config->prefix, "%s", config->family->config_prefixes[i]);
    if (sfa_config_number(weights, config, config->family->numbers[SFA_NUMBER_LAYERS], &n_layers))
      break;
  }
  return SFA_OK;
}

/* Variants of a family that would load but compute something else. */
static sfa_status refuse_variants(sfa_context *ctx, const sfa_weights *weights, const sfa_model_config *config) {
  static const char *const experts[] = {"expert_count", "num_local_experts", "num_experts"};
  double count = 0;
  for (size_t i = 0; i < sizeof experts / sizeof *experts; i++)
    if (sfa_config_number(weights, config, experts[i], &count) && count > 0)
      return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "the model is a mixture of %g experts (%s); only dense feed-forward layers are handled",
                      count, experts[i]);
  if (config->is_gguf)
    return SFA_OK;
  const char *activation;
  if (sfa_config_string(weights, config, config->family->activation_key, &activation)) {
    bool known = false;
    for (size_t i = 0; i < sizeof config->family->activations / sizeof(char *) && config->family->activations[i]; i++)
      known |= strcmp(activation, config->family->activations[i]) == 0;
    if (!known)
      return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "%s is \"%.40s\"; for %s models only %s is handled", config->family->activation_key,
                      activation, config->family->name, config->family->activations[0]);
  }
  static const struct {
    const char *key;
    bool usual;
  } switches[] = {{"scale_attn_weights", true},
                  {"scale_attn_by_inverse_layer_idx", false},
                  {"add_cross_attention", false},
                  {"use_bidirectional_attention", false}};
  for (size_t i = 0; i < sizeof switches / sizeof *switches; i++) {
    bool value = switches[i].usual;
    if (sfa_config_bool(weights, config, switches[i].key, &value) && value != switches[i].usual)
      return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "%s = %s is not handled", switches[i].key, value ? "true" : "false");
  }
  return SFA_OK;
}

static sfa_status read_shape(sfa_context *ctx, const sfa_weights *weights, sfa_model_config *c) {
  SFA_TRY(read_count32(ctx, weights, c, SFA_NUMBER_LAYERS, 4096, 0, &c->n_layers));
  SFA_TRY(read_count32(ctx, weights, c, SFA_NUMBER_HIDDEN, 1 << 20, 0, &c->hidden_dim));
  SFA_TRY(read_count32(ctx, weights, c, SFA_NUMBER_HEADS, 1 << 16, 0, &c->n_heads));
  SFA_TRY(read_count32(ctx, weights, c, SFA_NUMBER_KV_HEADS, 1 << 16, c->n_heads, &c->n_kv_heads));
  SFA_TRY(read_count32(ctx, weights, c, SFA_NUMBER_HEAD_DIM, 1 << 16, (int32_t)sfa_max64(1, c->hidden_dim / c->n_heads), &c->head_dim));
  SFA_TRY(read_count32(ctx, weights, c, SFA_NUMBER_VALUE_DIM, 1 << 16, c->head_dim, &c->head_dim_v));
  /* GPT-2's n_inner may be absent or null: then 4 hidden_dim. */
  SFA_TRY(read_count32(ctx, weights, c, SFA_NUMBER_FFN, 1 << 24, c->family->layer_norm ? 4 * c->hidden_dim : 0, &c->ffn_dim));
  SFA_TRY(read_count(ctx, weights, c, SFA_NUMBER_CONTEXT, INT32_MAX, 0, &c->context_len));
  if (c->n_heads % c->n_kv_heads != 0)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%d query heads do not share %d key heads evenly: the model file is damaged", c->n_heads,
                    c->n_kv_heads);
  if (c->head_dim % 8 != 0 || c->head_dim_v % 8 != 0)
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "a head_dim of %d with values of %d is not handled: each must be a multiple of 8",
                    c->head_dim, c->head_dim_v);
  double eps = c->family->layer_norm ? 1e-5 : 1e-6;
  const char *key = number_key(c, SFA_NUMBER_NORM_EPS);
  sfa_config_number(weights, c, key, &eps);
  if (!(eps >= 0 && eps < 1))
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s%s is %g: the model file is damaged", c->prefix, key, eps);
  c->norm_eps = (float)eps;
  return SFA_OK;
}

/* Scales and caps. */
static sfa_status read_scales(sfa_context *ctx, const sfa_weights *weights, sfa_model_config *c) {
  double scale_dim = c->head_dim, cap = 0;
  if (c->family->deep_scale_by_hidden == c->n_layers)
    scale_dim = (double)c->hidden_dim / c->n_heads;
  sfa_config_number(weights, c, "query_pre_attn_scalar", &scale_dim);
  if (!(scale_dim > 0))
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "query_pre_attn_scalar is %g: the model file is damaged", scale_dim);
  c->softmax_scale = (float)(1.0 / sqrt(scale_dim));
  if (sfa_config_number(weights, c, "attn_logit_softcapping", &cap))
    c->attention_softcap = (float)cap;
  cap = 0;
  if (sfa_config_number(weights, c, "final_logit_softcapping", &cap))
    c->final_softcap = (float)cap;
  if (!(c->attention_softcap >= 0 && c->final_softcap >= 0))
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "a logit softcap is negative: the model file is damaged");
  c->embedding_scale = c->family->scale_embedding ? sqrtf((float)c->hidden_dim) : 1.0f;
  return SFA_OK;
}

/* Local layers: listed one by one, by a pattern ("every 6th is global"), or all (Mistral). */
static sfa_status read_layer_kinds(sfa_context *ctx, const sfa_weights *weights, sfa_model_config *c) {
  SFA_TRY(sfa_alloc_zero(ctx, (size_t)c->n_layers, 1, "layer kinds", (void **)&c->layer_kinds));
  const char *window_key = number_key(c, SFA_NUMBER_WINDOW);
  double window = 0, pattern = c->family->default_pattern;
  bool use_window = true;
  sfa_config_bool(weights, c, "use_sliding_window", &use_window);
  if (!use_window || !window_key || !sfa_config_number(weights, c, window_key, &window) || window == 0)
    return SFA_OK;
  if (!(window >= 1 && window <= INT32_MAX))
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s%s is %g: the model file is damaged", c->prefix, window_key, window);
  c->window_len = (int64_t)window;

  char key[SFA_KEY_BYTES];
  const char *list = sfa_config_key(c, c->is_gguf ? "attention.sliding_window_pattern" : "layer_types", key);
  int64_t n_listed = sfa_meta_array_len(weights, list);
  if (n_listed >= 0 && n_listed != c->n_layers)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s lists %lld layers but the model has %d: the model file is damaged", list,
                    (long long)n_listed, c->n_layers);
  sfa_config_number(weights, c, c->is_gguf ? "attention.sliding_window_pattern" : "sliding_window_pattern", &pattern);
  for (int32_t layer = 0; layer < c->n_layers; layer++) {
    const char *kind = "";
    double flag = 0;
    bool local = pattern < 1 || (layer + 1) % (int64_t)pattern != 0;
    if (n_listed >= 0 && c->is_gguf)
      local = sfa_meta_array_number(weights, list, layer, &flag) && flag != 0;
    else if (n_listed >= 0)
      local = sfa_meta_array_string(weights, list, layer, &kind, NULL) && strcmp(kind, "sliding_attention") == 0;
    c->layer_kinds[layer] = local ? SFA_LAYER_LOCAL : SFA_LAYER_GLOBAL;
  }
  return SFA_OK;
}

sfa_status sfa_model_config_read(sfa_context *ctx, const sfa_weights *weights, sfa_model_config *config) {
  SFA_TRY(find_family(ctx, weights, config));
  SFA_TRY(refuse_variants(ctx, weights, config));
  SFA_TRY(read_shape(ctx, weights, config));
  SFA_TRY(read_scales(ctx, weights, config));
  SFA_TRY(read_layer_kinds(ctx, weights, config));
  SFA_TRY(sfa_model_rope_read(ctx, weights, config));
  return sfa_model_sparsity_read(ctx, weights, config);
}

void sfa_model_config_free(sfa_context *ctx, sfa_model_config *config) {
  for (int kind = 0; kind < SFA_LAYER_KINDS; kind++)
    sfa_free(ctx, config->rope_frequencies[kind]);
  sfa_free(ctx, config->layer_kinds);
  sfa_free(ctx, config->sfa_k);
  sfa_free(ctx, config->sfa_k_q);
}
