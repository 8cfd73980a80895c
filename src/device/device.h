/* device/device.h: what a decoder block asks of a machine: a flat table of operations on whole f32 activations [n_rows][dim].
 *
 * Bits: a row of an output depends on that row of the input alone, and every sum has one order. So results do not depend on n_rows (a
 * prompt may be cut anywhere, prefill and decode agree), on n_threads or on the instruction set. One exception: the bits of
 * SFA_STORE_BF16_PRODUCTS are those of a machine's matrix instructions (and of oneDNN's version), though also there of the row alone.
 * Strides count elements. Nothing here fails but linear_create; out may be the input where the comment says so. (Should oneDNN find no
 * memory for an item's handles, its outputs are NaN.)
 */
#ifndef SFA_DEVICE_H
#define SFA_DEVICE_H

#include "base/context.h"

/* How a linear layer keeps its weights, and with it how it multiplies. */
typedef enum sfa_storage {
  SFA_STORE_F32,  /* f32 products, fused multiply-add over the inputs in rising order */
  SFA_STORE_BF16, /* the same products, weights kept in 16 bits (exact where the file's are bf16) */
  SFA_STORE_F16,
  SFA_STORE_BF16_PRODUCTS, /* bf16 weights, inputs rounded to bf16 too, sums in f32 in an order of oneDNN's; rows as 32 at a time */
  SFA_STORE_U8, /* blocks of 32 inputs: w = scale * (u - offset) + minimum, f16 scale and minimum; inputs rounded to 15 bits a block */
  SFA_STORE_U4  /* the same with u in 0..15, two a byte */
} sfa_storage;

enum { SFA_BLOCK = 32 }; /* inputs that share a scale */

/* The rows of a weight matrix [n_out][n_in], read once by linear_create, from several threads. */
typedef struct sfa_linear_source {
  int32_t n_in, n_out;
  void *arg;
  /* Row `row` as f32 [n_in]; for the storages in floating point. */
  void (*row_f32)(void *arg, int64_t row, float *out);
  /* Row `row` as blocks: u [n_in rounded up to blocks], scale and minimum [blocks]; for U8 and U4. */
  void (*row_blocks)(void *arg, int64_t row, uint8_t *u, uint16_t *scale, uint16_t *minimum);
  int32_t offset;    /* of u; 0 with minima */
  bool has_minimum;  /* false: minimum is 0 */
  const float *bias; /* [n_out] or NULL; copied */
} sfa_linear_source;

typedef struct sfa_linear sfa_linear;

/* One of several linear layers that read the same input. out: [n_rows][n_out], out_stride apart. */
typedef struct sfa_linear_part {
  const sfa_linear *linear;
  float *out;
  int64_t out_stride;
} sfa_linear_part;

typedef enum sfa_activation { SFA_ACT_SILU, SFA_ACT_GELU_TANH } sfa_activation;

/* Linear layers with what stands before and after them in a decoder block. */
typedef struct sfa_projection {
  int64_t n_rows;
  const float *x;
  int64_t x_stride;
  const float *norm_weight, *norm_bias; /* [n_in] x is normalised first: rms_norm, or with center layer_norm. NULL: it is not */
  bool center;
  float norm_eps;
  int32_t n_parts;
  const sfa_linear_part *parts;
  bool activated; /* the first part's output becomes act(it), times the second's (which is scratch then) if there are two */
  sfa_activation activation;
  bool add; /* added to what is in the parts' outputs */
} sfa_projection;

typedef struct sfa_device {
  const char *name;

  sfa_status (*linear_create)(sfa_context *ctx, const sfa_linear_source *source, sfa_storage storage, sfa_linear **linear);
  void (*linear_destroy)(sfa_context *ctx, sfa_linear *linear);
  size_t (*linear_bytes)(const sfa_linear *linear);
  /* The storage that multiplies weights kept as `storage` fastest: BF16 becomes BF16_PRODUCTS on processors with matrix instructions. */
  sfa_storage (*fast_storage)(const sfa_context *ctx, sfa_storage storage);
  /* Bytes of scratch (64-byte aligned) that `linear` wants for inputs of this shape. */
  size_t (*scratch_bytes)(const sfa_context *ctx, int64_t n_rows, int32_t n_in);
  /* out = x w^T + bias for every part; all have the same n_in. */
  void (*linear)(const sfa_context *ctx, int64_t n_rows, const float *x, int64_t x_stride, int32_t n_parts, const sfa_linear_part *parts,
                 void *scratch);

  /* out = x / sqrt(mean(x^2) + eps) * weight over each of n_groups pieces of `dim` elements of a row; out may be x. */
  void (*rms_norm)(const sfa_context *ctx, int64_t n_rows, int32_t n_groups, int32_t dim, const float *x, int64_t x_stride,
                   const float *weight, float eps, float *out, int64_t out_stride);
  /* out = (x - mean) / sqrt(variance + eps) * weight + bias; bias may be NULL; out may be x. */
  void (*layer_norm)(const sfa_context *ctx, int64_t n_rows, int32_t dim, const float *x, int64_t x_stride, const float *weight,
                     const float *bias, float eps, float *out, int64_t out_stride);
  /* Rotates the first 2 * n_pairs features of every head of a row in place by cos, sin [n_rows][n_pairs]. Pair p is (2p, 2p + 1) if
   * interleaved, else (p, p + n_pairs). */
  void (*rope)(const sfa_context *ctx, int64_t n_rows, int32_t n_heads, int32_t head_dim, int32_t n_pairs, bool interleaved,
               const float *cos, const float *sin, float *x, int64_t x_stride);
  /* out = act(x) * up; up NULL: act(x); out may be x or up. */
  void (*activate)(const sfa_context *ctx, sfa_activation act, int64_t n_rows, int32_t dim, const float *x, int64_t x_stride,
                   const float *up, int64_t up_stride, float *out, int64_t out_stride);
  /* x = x + y in place, [n_rows][dim] contiguous. */
  void (*add)(const sfa_context *ctx, int64_t n_rows, int32_t dim, float *x, const float *y);
  /* x = cap * tanh(x / cap) in place. */
  void (*softcap)(const sfa_context *ctx, int64_t n_rows, int32_t dim, float cap, float *x, int64_t x_stride);
  /* cos, sin [n_rows][n_pairs] of the angles positions[row] * frequencies[pair], which are computed in double. */
  void (*rotations)(const sfa_context *ctx, int64_t n_rows, const int32_t *positions, int32_t n_pairs, const double *frequencies,
                    float *cos, float *sin);
  /* nll[row] = -log softmax(logits[row])[targets[row]], NaN where the target is below 0; argmax[row]: the first largest. */
  void (*score)(const sfa_context *ctx, int64_t n_rows, int32_t n_classes, const float *logits, const int32_t *targets, float *nll,
                int32_t *argmax);
  /* *most = the largest of it and of x [n]; none is NaN. */
  void (*keep_most)(const sfa_context *ctx, int64_t n, const float *x, float *most);

  /* The rest is what machines with a memory of their own have; NULL on the CPU. */

  /* One launch or few where the operations one by one are many. */
  void (*project)(const sfa_context *ctx, const sfa_projection *projection);
  /* out [n_rows][n_in] = scale * the rows of a linear layer's weights with these numbers, or added to out: embeddings. */
  void (*rows)(const sfa_context *ctx, int64_t n_rows, const sfa_linear *table, const int32_t *ids, float scale, bool add, float *out);
  /* Memory of the host that copies go to and from in the background; NULL where there is none. */
  void *(*host_alloc)(sfa_context *ctx, size_t bytes);
  void (*host_free)(sfa_context *ctx, void *memory);
  /* Records what is put on the stream between begin and end instead of doing it; run puts it on the stream as one. Pointers and shapes are
   * those of the record. end gives NULL where something cannot be recorded. */
  sfa_status (*record_begin)(sfa_context *ctx);
  sfa_status (*record_end)(sfa_context *ctx, void **record);
  sfa_status (*record_run)(sfa_context *ctx, void *record);
  void (*record_destroy)(sfa_context *ctx, void *record);
  /* What an operation since the last call could not do; does not wait. */
  sfa_status (*finish)(sfa_context *ctx);
} sfa_device;

/* The CPU, with kernels for the context's instruction set. */
const sfa_device *sfa_device_cpu(void);

#endif
