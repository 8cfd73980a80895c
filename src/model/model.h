/* model/model.h: a loaded model and the forward pass over a chunk of tokens. One config-driven decoder block serves all families. */
#ifndef SFA_MODEL_H
#define SFA_MODEL_H

#include <sfa/cache.h>
#include <sfa/engine.h>

#include "file/weights.h"

/* struct sfa_model is the public engine.h's type. */

/* Reads the config, finds the family, prepares every weight. The weights stay open as long as the model (owned by it from here on, also
 * on failure). */
sfa_status sfa_model_load(sfa_context *ctx, sfa_weights *weights, sfa_weight_format format, sfa_model **model);
void sfa_model_destroy(sfa_model *model);
sfa_context *sfa_model_context(const sfa_model *model);
const sfa_weights *sfa_model_weights(const sfa_model *model);
/* The engine attaches the tokenizer that it opened for the model, or NULL, and closes it in sfa_model_close; the model only keeps the
 * pointer (is_instruct of sfa_model_describe: sfa_tokenizer_has_chat of it). NULL until attached. */
void sfa_model_attach(sfa_model *model, sfa_tokenizer *tokenizer);
sfa_tokenizer *sfa_model_attached(const sfa_model *model);

/* A number that another model, or another training of this one, will not have: of the sizes, the config, and of every tensor the name,
 * type, shape and a few samples of its bytes. Reads 200 bytes a tensor; a change of single rows between the samples (an edited embedding)
 * is not seen. */
uint64_t sfa_model_fingerprint(const sfa_model *model);

/* What an attention choice means for this model, head by head; checks it. k_keys, k_queries: [n_layers][n_kv_heads], 0 = dense. */
sfa_status sfa_model_resolve(const sfa_model *model, const sfa_attention_choice *choice, int32_t *k_keys, int32_t *k_queries,
                             sfa_dtype *cache_k_sparse, sfa_dtype *cache_k_dense, sfa_dtype *cache_v);

/* One timeline: cache, activations and plans for chunks of at most chunk_len tokens. */
typedef struct sfa_forward sfa_forward;
sfa_status sfa_forward_create(const sfa_model *model, const sfa_attention_choice *choice, int64_t context_len, int32_t chunk_len,
                              sfa_forward **forward);
void sfa_forward_destroy(sfa_forward *forward);
int64_t sfa_forward_len(const sfa_forward *forward);
sfa_status sfa_forward_truncate(sfa_forward *forward, int64_t new_len);
size_t sfa_forward_kv_bytes(const sfa_forward *forward);
/* How steps of several tokens are attended to, in the first sparse layer, else in the first. */
sfa_policy sfa_forward_policy(const sfa_forward *forward);
/* The largest mass that a head left out in a step of one token. */
float sfa_forward_dropped(const sfa_forward *forward);

/* How a layer's keys and values are kept, and its queries cut: the most features of a head; 0: all. */
typedef struct sfa_layer_storage {
  int32_t k, k_q;
  sfa_dtype k_dtype, v_dtype;
  size_t page_bytes;
} sfa_layer_storage;
sfa_layer_storage sfa_forward_storage(const sfa_forward *forward, int32_t layer);
/* Page `page` of a layer, as sfa_cache_page_save gives it. */
sfa_status sfa_forward_page_save(const sfa_forward *forward, int32_t layer, int64_t page, void *image);
/* Makes an empty timeline one of len tokens whose pages [n_layers][ceil(len / 64)] lie elsewhere: see sfa_cache_map. */
sfa_status sfa_forward_map(sfa_forward *forward, int64_t len, const void *const *pages);
/* Appends n_tokens (1..chunk_len) and runs all blocks. hidden: [n_tokens][hidden_dim] after the final norm, in the memory of the context's
 * device; on a GPU it is there after sfa_stream_wait. attention_ns is added to, but on a GPU. On failure the timeline is as before. */
sfa_status sfa_forward_run(sfa_forward *forward, const int32_t *tokens, int32_t n_tokens, float *hidden, int64_t *attention_ns);
/* For looking inside: called for each layer of a step with its queries after QK-norm and RoPE, before top-k; the keys are in the cache
 * (sequence 0) by then. A failure ends the step like any other. */
typedef struct sfa_probe {
  int32_t layer, n_tokens;
  int64_t first;        /* position of the first */
  const float *queries; /* [n_tokens][H][D], tokens query_stride apart */
  int64_t query_stride;
  const sfa_cache *cache;
  int32_t cache_layer;
  int32_t k_queries;  /* kept of a query, 0: dense; where heads differ, the most: the others' rows are cut already */
  int64_t window_len; /* keys that a query sees, itself included; 0: all before */
} sfa_probe;
typedef sfa_status (*sfa_probe_fn)(void *user, const sfa_probe *probe);
/* NULL: none any more. */
void sfa_forward_probe(sfa_forward *forward, sfa_probe_fn probe, void *user);
/* What explanations want to know of a model. */
typedef struct sfa_model_heads {
  int32_t n_layers, n_heads, n_kv_heads, head_dim;
  float softmax_scale, softcap;
} sfa_model_heads;
sfa_model_heads sfa_model_heads_of(const sfa_model *model);
/* The cache of a layer, and its number there. */
const sfa_cache *sfa_forward_cache(const sfa_forward *forward, int32_t layer, int32_t *cache_layer);
/* logits [n][vocab_size] = head(hidden [n][hidden_dim]), final softcap included; both in the memory of the context's device. */
sfa_status sfa_model_logits(const sfa_model *model, int32_t n, const float *hidden, float *logits);
/* Scores of such logits, device memory as well: sfa_device.score. */
void sfa_model_score(const sfa_model *model, int32_t n, const float *logits, const int32_t *targets, float *nll, int32_t *argmax);
/* Memory of the host that copies from a GPU go to in the background; NULL on the CPU, or if there is none. */
void *sfa_model_host_alloc(const sfa_model *model, size_t bytes);
void sfa_model_host_free(const sfa_model *model, void *memory);

#endif
