/* file/weights.h: one view over a model's files, whatever their format: named tensors in a map, and named metadata. */
#ifndef SFA_WEIGHTS_H
#define SFA_WEIGHTS_H

#include "base/context.h"

/* Storage of a tensor; numbers are GGUF's. */
typedef enum sfa_tensor_type {
  SFA_TENSOR_F32 = 0,
  SFA_TENSOR_F16 = 1,
  SFA_TENSOR_Q4_0 = 2,
  SFA_TENSOR_Q4_1 = 3,
  SFA_TENSOR_Q5_0 = 6,
  SFA_TENSOR_Q5_1 = 7,
  SFA_TENSOR_Q8_0 = 8,
  SFA_TENSOR_Q4_K = 12,
  SFA_TENSOR_Q5_K = 13,
  SFA_TENSOR_Q6_K = 14,
  SFA_TENSOR_BF16 = 30
} sfa_tensor_type;

typedef struct sfa_tensor {
  const char *name;
  sfa_tensor_type type;
  int32_t n_dims;
  int64_t shape[4]; /* outermost first, as PyTorch shows it; unused: 1. The last dimension is contiguous */
  const void *data; /* inside the map; alignment 1 */
  int64_t n_elements, bytes;
} sfa_tensor;

typedef struct sfa_weights sfa_weights;

/* path: a GGUF file, a directory with config.json and *.safetensors, a llama2.c .bin. Every offset and size is checked against the file
 * before it is believed. */
sfa_status sfa_weights_open(sfa_context *ctx, const char *path, sfa_weights **weights);
/* The same with an adapter laid over: a directory whose config.json takes the place of the model's and whose adapter.safetensors holds
 * tensors that take the place of the model's of the same name and shape. The model must be a directory. NULL: none. */
sfa_status sfa_weights_open_adapted(sfa_context *ctx, const char *path, const char *adapter, sfa_weights **weights);
void sfa_weights_close(sfa_weights *weights);
/* "gguf", "safetensors" or "llama2.c". */
const char *sfa_weights_format(const sfa_weights *weights);
int64_t sfa_weights_bytes(const sfa_weights *weights);
int64_t sfa_weights_count(const sfa_weights *weights);
const sfa_tensor *sfa_weights_at(const sfa_weights *weights, int64_t index);
/* NULL if there is none of that name. Hashed: cheap. llama2.c tensors carry Hugging Face names (model.layers.0.self_attn.q_proj.weight). */
const sfa_tensor *sfa_weights_find(const sfa_weights *weights, const char *name);

/* Metadata by name: a GGUF key ("llama.block_count"), or a path into config.json ("rope_scaling.factor"). For safetensors the paths
 * "tokenizer_config/..." and "generation_config/..." look into those files where they exist. llama2.c's header appears under config.json's
 * names (hidden_size, ...). Wrong type or absent: false, *out unchanged. */
bool sfa_meta_number(const sfa_weights *weights, const char *key, double *out);
bool sfa_meta_bool(const sfa_weights *weights, const char *key, bool *out);
/* The text is NUL-terminated and lives as long as the weights; bytes may be NULL. */
bool sfa_meta_string(const sfa_weights *weights, const char *key, const char **out, size_t *bytes);
/* Elements of an array; -1 if there is no such array. */
int64_t sfa_meta_array_len(const sfa_weights *weights, const char *key);
bool sfa_meta_array_number(const sfa_weights *weights, const char *key, int64_t index, double *out);
bool sfa_meta_array_string(const sfa_weights *weights, const char *key, int64_t index, const char **out, size_t *bytes);

const char *sfa_tensor_type_name(sfa_tensor_type type);
/* Elements of a block (1, 32 or 256) and its bytes. */
int32_t sfa_tensor_block_len(sfa_tensor_type type);
int32_t sfa_tensor_block_bytes(sfa_tensor_type type);
/* n elements (a multiple of the block) from data to f32, as ggml defines the formats. */
void sfa_tensor_dequantize(sfa_tensor_type type, int64_t n, const void *data, float *out);

#endif
