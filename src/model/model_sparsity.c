/* Which heads are sparse and how much: what the file asks for (docs/MATH.md 9), and what a user's choice makes of it. */
#include "model/model_parts.h"

#include <sfa/plan.h>

#include <stdio.h>
#include <string.h>

enum { DEFAULT_K = 16, AS_KEYS = -1 };

/* ---- The file ------------------------------------------------------------------------------------------------------------------- */

/* The full key of a setting; a layer of one that is a list of lists: 0 .. n_layers - 1, else -1. */
static const char *wish_key(const sfa_model_config *c, const char *name, int32_t layer, char out[SFA_KEY_BYTES]) {
  char key[SFA_KEY_BYTES / 2];
  const int n = snprintf(key, sizeof key, "%s%s", c->is_gguf ? "attention.sfa." : "sparse_attention_config.", name);
  if (layer >= 0)
    snprintf(key + n, sizeof key - (size_t)n, ".%d", layer);
  return sfa_config_key(c, key, out);
}

static bool is_there(const sfa_weights *weights, const char *key) {
  double x;
  return sfa_meta_number(weights, key, &x) || sfa_meta_array_len(weights, key) >= 0;
}

/* A setting of kv heads, as a number for all of them, a list of one for each layer, one of all heads in a row (GGUF), or a list of lists
 * (config.json, where each layer has a key of its own): the number of one head. */
static sfa_status read_head(sfa_context *ctx, const sfa_weights *weights, const sfa_model_config *c, const char *name, int32_t layer,
                            int32_t head, int32_t *out) {
  char key[SFA_KEY_BYTES];
  const int64_t n_heads = c->n_kv_heads;
  double k = -1;
  int64_t n = sfa_meta_array_len(weights, wish_key(c, name, -1, key)), wanted = n == c->n_layers ? n : c->n_layers * n_heads;
  int64_t at = n == c->n_layers ? layer : layer * n_heads + head;
  if (n < 0 && !sfa_meta_number(weights, key, &k)) {
    n = sfa_meta_array_len(weights, wish_key(c, name, layer, key));
    wanted = n_heads;
    at = head;
    sfa_meta_number(weights, key, &k);
  }
  if (n >= 0 && n != wanted)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s lists %lld numbers; the model has %d layers of %d kv heads", key, (long long)n, c->n_layers,
                    c->n_kv_heads);
  if (n >= 0 && !sfa_meta_array_number(weights, key, at, &k))
    k = -1;
  if (!(k >= 0 && k <= c->head_dim) || k != (double)(int32_t)k)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s holds %g; it must be a whole number from 0 to the head_dim %d", key, k, c->head_dim);
  *out = (int32_t)k;
  return SFA_OK;
}

static sfa_status read_choice_of_features(sfa_context *ctx, const sfa_weights *weights, sfa_model_config *c, int32_t largest) {
  char key[SFA_KEY_BYTES];
  const char *text;
  if (!c->is_gguf && sfa_meta_string(weights, wish_key(c, "algorithm", -1, key), &text, NULL) && strcmp(text, "sfa") != 0)
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "%s is \"%.40s\"; only \"sfa\" is handled", key, text);
  if (sfa_meta_string(weights, wish_key(c, "order", -1, key), &text, NULL)) {
    c->pre_rope = strcmp(text, "pre_rope") == 0;
    if (!c->pre_rope && strcmp(text, "post_rope") != 0)
      return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "%s is \"%.40s\"; it must be \"post_rope\" or \"pre_rope\"", key, text);
  }
  sfa_meta_bool(weights, wish_key(c, "two_of_four", -1, key), &c->two_of_four);
  if (c->two_of_four && largest > c->head_dim / 2)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s is true, but k is %d: two of each four are half of the head_dim %d at most", key, largest,
                    c->head_dim);
  return SFA_OK;
}

/* Clears k in layers that the list leaves out. */
static sfa_status keep_listed(sfa_context *ctx, const sfa_weights *weights, sfa_model_config *c) {
  char key[SFA_KEY_BYTES];
  int64_t n_listed = sfa_meta_array_len(weights, wish_key(c, "layers", -1, key));
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
  for (int32_t i = 0; i < c->n_layers * c->n_kv_heads; i++)
    if (!listed[i / c->n_kv_heads])
      c->sfa_k[i] = 0;
  sfa_free(ctx, listed);
  return status;
}

sfa_status sfa_model_sparsity_read(sfa_context *ctx, const sfa_weights *weights, sfa_model_config *c) {
  const int32_t n = c->n_layers * c->n_kv_heads;
  char key[SFA_KEY_BYTES];
  int32_t largest = 0;
  SFA_TRY(sfa_alloc_zero(ctx, (size_t)n, sizeof *c->sfa_k, "kept features by head", (void **)&c->sfa_k));
  SFA_TRY(sfa_alloc_zero(ctx, (size_t)n, sizeof *c->sfa_k_q, "kept features by head", (void **)&c->sfa_k_q));
  if (!is_there(weights, wish_key(c, "k", -1, key)) && !is_there(weights, wish_key(c, "k", 0, key)))
    return SFA_OK;
  const bool has_queries = is_there(weights, wish_key(c, "k_q", -1, key)) || is_there(weights, wish_key(c, "k_q", 0, key));
  for (int32_t i = 0; i < n; i++) {
    const int32_t layer = i / c->n_kv_heads, head = i % c->n_kv_heads;
    c->sfa_k_q[i] = AS_KEYS;
    SFA_TRY(read_head(ctx, weights, c, "k", layer, head, &c->sfa_k[i]));
    if (has_queries)
      SFA_TRY(read_head(ctx, weights, c, "k_q", layer, head, &c->sfa_k_q[i]));
    largest = c->sfa_k[i] > largest ? c->sfa_k[i] : largest;
  }
  c->is_sparse = largest > 0;
  SFA_TRY(read_choice_of_features(ctx, weights, c, largest));
  return keep_listed(ctx, weights, c);
}

sfa_head_features sfa_model_features(const sfa_model_config *c, int32_t head) {
  const int32_t k = c->sfa_k[head], k_q = c->sfa_k_q[head] == AS_KEYS ? k : c->sfa_k_q[head];
  return (sfa_head_features){k, k ? k_q : 0};
}

/* ---- The user ------------------------------------------------------------------------------------------------------------------- */

enum { LAYERS_OF_MODEL = 0, LAYERS_GLOBAL = 1, LAYERS_LISTED = 2 };

/* head: layer * n_kv_heads + kv head. */
static bool is_chosen(const sfa_model_config *c, const sfa_attention_choice *choice, int32_t head) {
  const int32_t layer = head / c->n_kv_heads;
  bool listed = false;
  if (!choice->sparse)
    return false;
  for (int32_t i = 0; choice->layers == LAYERS_LISTED && i < choice->n_layer_list; i++)
    listed |= choice->layer_list[i] == layer;
  return choice->layers == LAYERS_OF_MODEL ? !c->is_sparse || c->sfa_k[head] > 0
                                           : listed || (choice->layers == LAYERS_GLOBAL && c->layer_kinds[layer] == SFA_LAYER_GLOBAL);
}

static sfa_status check_choice(const sfa_model *model, const sfa_attention_choice *choice) {
  sfa_context *ctx = model->ctx;
  SFA_REQUIRE(ctx, choice->struct_size == sizeof *choice, "sfa_attention_choice is of another version: %zu bytes, not %zu",
              choice->struct_size, sizeof *choice);
  SFA_REQUIRE(ctx, choice->k >= 0, "attention choice: k is %d; it must be 0 (as the model says) or more", choice->k);
  SFA_REQUIRE(ctx, choice->k_q >= -1, "attention choice: k_q is %d; it must be -1 (all), 0 (as the model says) or more", choice->k_q);
  SFA_REQUIRE(ctx, choice->layers >= LAYERS_OF_MODEL && choice->layers <= LAYERS_LISTED, "attention choice: layers is %d, not 0, 1 or 2",
              choice->layers);
  SFA_REQUIRE(ctx, choice->n_layer_list >= 0 && (choice->layer_list || choice->n_layer_list == 0),
              "attention choice: %d listed layers, but no list", choice->n_layer_list);
  for (int32_t i = 0; choice->layers == LAYERS_LISTED && i < choice->n_layer_list; i++)
    SFA_REQUIRE(ctx, choice->layer_list[i] >= 0 && choice->layer_list[i] < model->config.n_layers,
                "attention choice: there is no layer %d, the model's are 0 to %d", choice->layer_list[i], model->config.n_layers - 1);
  SFA_REQUIRE(ctx, choice->cache_k >= SFA_DTYPE_DEFAULT && choice->cache_k <= SFA_I8,
              "attention choice: cache_k is %d: keys are SFA_F32, SFA_BF16, SFA_F16 or SFA_I8", (int)choice->cache_k);
  SFA_REQUIRE(ctx, choice->cache_v >= SFA_DTYPE_DEFAULT && choice->cache_v <= SFA_E4M3,
              "attention choice: cache_v is %d: values are SFA_F32 to SFA_E4M3", (int)choice->cache_v);
  SFA_REQUIRE(ctx, choice->policy >= SFA_POLICY_AUTO && choice->policy <= SFA_POLICY_SP_INT8 && choice->policy != SFA_POLICY_POSTINGS,
              "attention choice: policy is %d, %s; prompts are attended to by SFA_POLICY_AUTO to PAPER, or on a GPU by BF16 to SP_INT8",
              (int)choice->policy, sfa_policy_name(choice->policy));
  return SFA_OK;
}

sfa_status sfa_model_resolve(const sfa_model *model, const sfa_attention_choice *choice, int32_t *k_keys, int32_t *k_queries,
                             sfa_dtype *cache_k_sparse, sfa_dtype *cache_k_dense, sfa_dtype *cache_v) {
  const sfa_model_config *c = &model->config;
  const sfa_attention_choice dense = {.struct_size = sizeof dense};
  choice = choice ? choice : &dense;
  SFA_TRY(check_choice(model, choice));
  for (int32_t head = 0; head < c->n_layers * c->n_kv_heads; head++) {
    const bool chosen = is_chosen(c, choice, head);
    const int32_t k = choice->k ? choice->k : c->sfa_k[head] ? c->sfa_k[head] : DEFAULT_K;
    const int32_t of_file = c->is_sparse && c->sfa_k_q[head] != AS_KEYS ? c->sfa_k_q[head] : k;
    const int32_t k_q = choice->k_q > 0 ? choice->k_q : choice->k_q < 0 ? 0 : of_file;
    k_keys[head] = chosen && k < c->head_dim ? k : 0;
    k_queries[head] = chosen && k_q < c->head_dim ? k_q : 0;
  }
  sfa_dtype plain = model->file_is_f32 ? SFA_F32 : SFA_BF16;
  *cache_k_sparse = choice->cache_k ? choice->cache_k : SFA_I8;
  *cache_k_dense = choice->cache_k ? choice->cache_k : plain;
  *cache_v = choice->cache_v ? choice->cache_v : plain;
  return SFA_OK;
}
