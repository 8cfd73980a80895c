/* file/weights_write.h: model files out of tensors in memory: safetensors and GGUF, each written whole or not at all (save.h). */
#ifndef SFA_WEIGHTS_WRITE_H
#define SFA_WEIGHTS_WRITE_H

#include "file/weights_build.h"

/* A tensor to be written. Rows are asked for one after another, from the first to the last, as f32. */
typedef struct sfa_tensor_out {
  const char *name;
  sfa_tensor_type type; /* SFA_TENSOR_F32, F16 or BF16: rounded to nearest even */
  int32_t n_dims;
  int64_t shape[4]; /* outermost first; unused: 1 */
  /* Row `row` [shape[n_dims - 1]] of the n_elements / shape[n_dims - 1] rows. NULL: values holds all of them; both NULL: zeros. */
  void (*row)(const struct sfa_tensor_out *tensor, int64_t row, float *out);
  const void *arg;
  const float *values;
} sfa_tensor_out;

/* One safetensors file. Names must be unique. */
sfa_status sfa_safetensors_write(sfa_context *ctx, const char *path, int64_t n_tensors, const sfa_tensor_out *tensors);
/* One GGUF file, version 3, alignment 32. Keys as sfa_meta; strings are sfa_text. */
sfa_status sfa_gguf_write(sfa_context *ctx, const char *path, int64_t n_keys, const sfa_meta *keys, int64_t n_tensors,
                          const sfa_tensor_out *tensors);

/* What the two share: the bytes of a tensor's elements, appended. */
sfa_status sfa_tensor_append(sfa_context *ctx, struct sfa_save *save, const sfa_tensor_out *tensor);
int64_t sfa_tensor_out_bytes(const sfa_tensor_out *tensor);

#endif
