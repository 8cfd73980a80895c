/* model/model_parts.h: what a loaded model consists of; shared by the files of this folder. */
#ifndef SFA_MODEL_PARTS_H
#define SFA_MODEL_PARTS_H

#include "device/device_of.h"
#include "model/families.h"
#include "model/model.h"

/* Which of the two kinds of layers: all tokens before, or those of a sliding window. */
typedef enum sfa_layer_kind { SFA_LAYER_GLOBAL = 0, SFA_LAYER_LOCAL = 1, SFA_LAYER_KINDS = 2 } sfa_layer_kind;

typedef struct sfa_model_config {
  const sfa_family *family;
  bool is_gguf;
  char prefix[64]; /* of keys: "llama." in GGUF, "" or "text_config." in config.json */

  int32_t n_layers, hidden_dim, ffn_dim, n_heads, n_kv_heads, head_dim, head_dim_v, vocab_size;
  int64_t context_len;
  float norm_eps, softmax_scale, attention_softcap, final_softcap, embedding_scale; /* 0: none; embedding_scale 1: none */

  int32_t rope_pairs; /* 0: no rotary positions */
  bool rope_interleaved;
  double *rope_frequencies[SFA_LAYER_KINDS]; /* [rope_pairs] radians a token */
  int64_t window_len;                        /* keys that a local layer sees, the token itself included */
  uint8_t *layer_kinds;                      /* [n_layers] */

  /* docs/MATH.md 9: what the file asks for. */
  int32_t *sfa_k;   /* [n_layers][n_kv_heads], 0: dense */
  int32_t *sfa_k_q; /* [n_layers][n_kv_heads] of their queries, 0: dense q; -1 in all heads: as sfa_k */
  bool is_sparse;   /* the file has such a wish */
  bool pre_rope;    /* top-k before the rotation: codes have room for both members of each kept pair */
  bool two_of_four; /* at most two kept of each aligned group of four features */
} sfa_model_config;

/* Reads and checks the metadata. On failure what was allocated stays in *config for sfa_model_config_free. */
sfa_status sfa_model_config_read(sfa_context *ctx, const sfa_weights *weights, sfa_model_config *config);
void sfa_model_config_free(sfa_context *ctx, sfa_model_config *config);
/* The rotation frequencies of model_rope.c, from the metadata. */
sfa_status sfa_model_rope_read(sfa_context *ctx, const sfa_weights *weights, sfa_model_config *config);
/* The file's sparse attention settings, from the metadata. */
sfa_status sfa_model_sparsity_read(sfa_context *ctx, const sfa_weights *weights, sfa_model_config *config);
/* What the file asks for in a head (layer * n_kv_heads + kv head): features kept of a key and of a query; 0: all. */
typedef struct sfa_head_features {
  int32_t k, k_q;
} sfa_head_features;
sfa_head_features sfa_model_features(const sfa_model_config *config, int32_t head);

/* A key with the config's prefix before it; false where absent or of another type. */
bool sfa_config_number(const sfa_weights *weights, const sfa_model_config *config, const char *key, double *out);
bool sfa_config_bool(const sfa_weights *weights, const sfa_model_config *config, const char *key, bool *out);
bool sfa_config_string(const sfa_weights *weights, const sfa_model_config *config, const char *key, const char **out);
enum { SFA_KEY_BYTES = 160 };
const char *sfa_config_key(const sfa_model_config *config, const char *key, char out[SFA_KEY_BYTES]);

/* Tensors of a model file by role. */
typedef struct sfa_tensor_names {
  sfa_context *ctx;
  const sfa_weights *weights;
  const sfa_model_config *config;
  const char *prefix;
} sfa_tensor_names;
sfa_tensor_names sfa_tensor_names_of(sfa_context *ctx, const sfa_weights *weights, const sfa_model_config *config);
enum { SFA_NAME_BYTES = 192 };
/* "<prefix><name with the layer for *><suffix>", of GGUF or Hugging Face; layer is unused without a "*". */
const char *sfa_role_name(const sfa_tensor_names *names, bool gguf, sfa_role role, int32_t layer, const char *suffix,
                          char out[SFA_NAME_BYTES]);
/* NULL: not there. */
const sfa_tensor *sfa_role_find(const sfa_tensor_names *names, sfa_role role, int32_t layer, const char *suffix);
sfa_status sfa_role_require(const sfa_tensor_names *names, sfa_role role, int32_t layer, const char *suffix, const sfa_tensor **out);
const sfa_tensor *sfa_role_find_head(const sfa_tensor_names *names);
bool sfa_role_is_norm(sfa_role role);
/* Of a linear layer (or a table [n_out][n_in]); of a norm: n_out = its elements, n_in = 1. */
typedef struct sfa_role_shape {
  int64_t n_out, n_in;
} sfa_role_shape;
sfa_role_shape sfa_role_shape_of(const sfa_model_config *config, sfa_role role);
/* rows = 0: a vector of n. */
sfa_status sfa_tensor_check_shape(sfa_context *ctx, const sfa_tensor *tensor, int64_t rows, int64_t n);

typedef struct sfa_norm {
  float *weight, *bias; /* NULL: this norm, or its bias, does not exist */
} sfa_norm;

typedef struct sfa_layer {
  sfa_norm attention_norm, q_norm, k_norm, post_attention_norm, ffn_norm, post_ffn_norm;
  sfa_linear *qkv[3]; /* q, k, v; or one for all three and NULL, NULL */
  sfa_linear *o;
  sfa_linear *gate; /* NULL: no gate */
  sfa_linear *up, *down;
} sfa_layer;

struct sfa_model {
  sfa_context *ctx;
  sfa_weights *weights;
  sfa_tokenizer *tokenizer; /* attached by the engine */
  const sfa_device *device;
  sfa_model_config config;
  sfa_weight_format format; /* in memory; BF16 stands for any 16-bit floats, a file's f16 stay f16 */
  bool file_is_f32;         /* the file's linear layers are f32: caches default to f32 too */
  int64_t n_parameters;
  const sfa_tensor *embedding, *positions;    /* on the CPU rows are read from the file's map */
  sfa_linear *embedding_rows, *position_rows; /* the same on a device with memory of its own; NULL on the CPU. May be the head's */
  sfa_norm final_norm;
  sfa_linear *head;
  sfa_layer *layers; /* [n_layers] */
};

/* A tensor as the rows of a linear layer. transposed: stored [n_in][n_out]. */
typedef struct sfa_weight_rows {
  const sfa_tensor *tensor;
  bool transposed;
} sfa_weight_rows;

/* How a tensor is kept in memory under a weight format. */
sfa_storage sfa_weight_storage(const sfa_tensor *tensor, sfa_weight_format format);
/* Fills source's callbacks, offset and has_minimum for that storage; rows must outlive source. */
void sfa_weight_source(const sfa_weight_rows *rows, sfa_storage storage, sfa_linear_source *source);

#endif
