/* Which layers are sparse and how much: what the file asks for (docs/MATH.md 9), and what a user's choice makes of it. */
#include "model/model_parts.h"

#include <stdio.h>
#include <string.h>

enum { DEFAULT_K = 16 };

/* ---- The file ------------------------------------------------------------------------------------------------------------------- */

static bool wish_number(const sfa_weights *weights, const sfa_model_config *c, const char *name, double *out) {
  char key[SFA_KEY_BYTES];
  snprintf(key, sizeof key, "%s%s", c->is_gguf ? "attention.sfa." : "sparse_attention_config.", name);
  return sfa_config_number(weights, c, key, out);
}

/* The full key of a setting, for arrays. */
static const char *wish_key(const sfa_model_config *c, const char *name, char out[SFA_KEY_BYTES]) {
  char key[SFA_KEY_BYTES / 2];
  snprintf(key, sizeof key, "%s%s", c->is_gguf ? "attention.sfa." : "sparse_attention_config.", name);
  return sfa_config_key(c, key, out);
}

static sfa_status read_choice_of_features(sfa_context *ctx, const sfa_weights *weights, sfa_model_config *c, double largest) {
  char key[SFA_KEY_BYTES];
  const char *text;
  if (!c->is_gguf && sfa_meta_string(weights, wish_key(c, "algorithm", key), &text, NULL) && strcmp(text, "sfa") != 0)
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "%s is \"%.40s\"; only \"sfa\" is handled", key, text);
  if (sfa_meta_string(weights, wish_key(c, "order", key), &text, NULL)) {
    c->pre_rope = strcmp(text, "pre_rope") == 0;
    if (!c->pre_rope && strcmp(text, "post_rope") != 0)
      return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "%s is \"%.40s\"; it must be \"post_rope\" or \"pre_rope\"", key, text);
  }
  sfa_meta_bool(weights, wish_key(c, "two_of_four", key), &c->two_of_four);
  if (c->two_of_four && largest > c->head_dim / 2)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s is true, but k is %g: two of each four are half of the head_dim %d at most", key, largest,
                    c->head_dim);
  return SFA_OK;
}

static sfa_status check_wish(sfa_context *ctx, const sfa_model_config *c, const char *key, double k) {
  if (!(k >= 0 && k <= c->head_dim) || k != (double)(int32_t)k)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s holds %g; it must be a whole number from 0 to the head_dim %d", key, k, c->head_dim);
  return SFA_OK;
}

/* Clears k in layers that the list leaves out. */
static sfa_status keep_listed(sfa_context *ctx, const sfa_weights *weights, sfa_model_config *c) {
  char key[SFA_KEY_BYTES];
  int64_t n_listed = sfa_meta_array_len(weights, wish_key(c, "layers", key));
  if (n_listed < 0)
    return SFA_OK;
  uint8_t *listed;
  SFA_TRY(sfa_alloc_zero(ctx, (size_t)c->n_layers, 1, "a layer list", (void **)&listed));
  sfa_status status = SFA_OK;
  for (int64_t i = 0; i < n_listed && status == SFA_OK; i++) {
    double layer = -1;
    if (!sfa_meta_array_number(weights, key, i, &layer) || !(layer >= 0 && layer < c->n_layers))
      status = sfa_fail(ctx, SFA_ERROR_FORMAT, "%s holds %g; the layers are 0 to %d", key, layer, c->n_layers - 1);
    else
      listed[(int32_t)layer] = 1;
  }
  for (int32_t layer = 0; layer < c->n_layers; layer++)
    if (!listed[layer])
      c->sfa_k[layer] = 0;
  sfa_free(ctx, listed);
  return status;
}

sfa_status sfa_model_sparsity_read(sfa_context *ctx, const sfa_weights *weights, sfa_model_config *c) {
  SFA_TRY(sfa_alloc_zero(ctx, (size_t)c->n_layers, sizeof *c->sfa_k, "kept features by layer", (void **)&c->sfa_k));
  char key[SFA_KEY_BYTES];
  int64_t n_listed = sfa_meta_array_len(weights, wish_key(c, "k", key));
  double k = 0, largest = 0, k_q;
  if (n_listed < 0 && !wish_number(weights, c, "k", &k))
    return SFA_OK;
  if (n_listed >= 0 && n_listed != c->n_layers)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s lists %lld layers but the model has %d", key, (long long)n_listed, c->n_layers);
  for (int32_t layer = 0; layer < c->n_layers; layer++) {
    if (n_listed >= 0 && !sfa_meta_array_number(weights, key, layer, &k))
      k = -1;
    SFA_TRY(check_wish(ctx, c, key, k));
    c->sfa_k[layer] = (int32_t)k;
    largest = k > largest ? k : largest;
  }
  k_q = largest;
  if (wish_number(weights, c, "k_q", &k_q))
    SFA_TRY(check_wish(ctx, c, wish_key(c, "k_q", key), k_q));
  c->sfa_k_q = (int32_t)k_q;
  c->is_sparse = largest > 0;
  SFA_TRY(read_choice_of_features(ctx, weights, c, largest));
  return keep_listed(ctx, weights, c);
}

/* ---- The user ------------------------------------------------------------------------------------------------------------------- */

enum { LAYERS_OF_MODEL = 0, LAYERS_GLOBAL = 1, LAYERS_LISTED = 2 };

static sfa_status is_chosen(const sfa_model *model, const sfa_attention_choice *choice, int32_t layer, bool *out) {
  const sfa_model_config *c = &model->config;
  *out = false;
  switch (choice->layers) {
  case LAYERS_OF_MODEL: *out = !c->is_sparse || c->sfa_k[layer] > 0; break;
  case LAYERS_GLOBAL: *out = c->layer_kinds[layer] == SFA_LAYER_GLOBAL; break;
  case LAYERS_LISTED:
    for (int32_t i = 0; i < choice->n_layer_list; i++)
      *out |= choice->layer_list[i] == layer;
    break;
  default: return sfa_fail(model->ctx, SFA_ERROR_ARGUMENT, "attention choice: layers is %d, not 0, 1 or 2", choice->layers);
  }
  return SFA_OK;
}

static sfa_status check_choice(const sfa_model *model, const sfa_attention_choice *choice) {
  sfa_context *ctx = model->ctx;
  SFA_REQUIRE(ctx, choice->struct_size == sizeof *choice, "sfa_attention_choice is of another version: %zu bytes, not %zu",
              choice->struct_size, sizeof *choice);
  SFA_REQUIRE(ctx, choice->k >= 0, "attention choice: k is %d; it must be 0 (as the model says) or more", choice->k);
  SFA_REQUIRE(ctx, choice->k_q >= -1, "attention choice: k_q is %d; it must be -1 (all), 0 (as the model says) or more", choice->k_q);
  SFA_REQUIRE(ctx, choice->n_layer_list >= 0 && (choice->layer_list || choice->n_layer_list == 0),
              "attention choice: %d listed layers, but no list", choice->n_layer_list);
  for (int32_t i = 0; choice->layers == LAYERS_LISTED && i < choice->n_layer_list; i++)
    SFA_REQUIRE(ctx, choice->layer_list[i] >= 0 && choice->layer_list[i] < model->config.n_layers,
                "attention choice: there is no layer %d, the model's are 0 to %d", choice->layer_list[i], model->config.n_layers - 1);
  SFA_REQUIRE(ctx, choice->cache_k >= SFA_DTYPE_DEFAULT && choice->cache_k <= SFA_I8, "attention choice: cache_k is %d, not an sfa_dtype",
              (int)choice->cache_k);
  SFA_REQUIRE(ctx, choice->cache_v >= SFA_DTYPE_DEFAULT && choice->cache_v <= SFA_I4, "attention choice: cache_v is %d, not an sfa_dtype",
              (int)choice->cache_v);
  return SFA_OK;
}

sfa_status sfa_model_resolve(const sfa_model *model, const sfa_attention_choice *choice, int32_t *k_keys, int32_t *k_queries,
                             sfa_dtype *cache_k_sparse, sfa_dtype *cache_k_dense, sfa_dtype *cache_v) {
  const sfa_model_config *c = &model->config;
  const sfa_attention_choice dense = {.struct_size = sizeof dense};
  choice = choice ? choice : &dense;
  SFA_TRY(check_choice(model, choice));
  for (int32_t layer = 0; layer < c->n_layers; layer++) {
    bool chosen = false;
    if (choice->sparse)
      SFA_TRY(is_chosen(model, choice, layer, &chosen));
    int32_t k = choice->k ? choice->k : c->sfa_k[layer] ? c->sfa_k[layer] : DEFAULT_K;
    int32_t k_q = choice->k_q > 0 ? choice->k_q : choice->k_q < 0 ? 0 : c->is_sparse ? c->sfa_k_q : k;
    k_keys[layer] = chosen && k < c->head_dim ? k : 0;
    k_queries[layer] = chosen && k_q < c->head_dim ? k_q : 0;
  }
  sfa_dtype plain = model->file_is_f32 ? SFA_F32 : SFA_BF16;
  *cache_k_sparse = choice->cache_k ? choice->cache_k : SFA_I8;
  *cache_k_dense = choice->cache_k ? choice->cache_k : plain;
  *cache_v = choice->cache_v ? choice->cache_v : plain;
  return SFA_OK;
}
