/* device/training.h: what training asks of a machine beyond device.h: products of any operands, the backward passes of the operations
 * there, the loss over a chunk of logits, the optimizer's step. All f32.
 *
 * Bits: as in device.h every sum has one order, which depends on the shapes alone; the number of threads and the instruction set change
 * nothing. Where operands of products are rounded to bf16 (sfa_product.bf16) matrix instructions sum in an order of their own.
 * Nothing here fails or waits; every array, single numbers too, is in the machine's memory. scratch: scratch_bytes of memory, 64-byte
 * aligned, for one call at a time.
 */
#ifndef SFA_TRAINING_H
#define SFA_TRAINING_H

#include "device/device.h"

/* A matrix in memory: element (i, j) at data[i * row_stride + j * column_stride]; one of the strides is 1. */
typedef struct sfa_matrix {
  const float *data;
  int64_t row_stride, column_stride;
} sfa_matrix;

/* out [m][n] = a [m][k] b [k][n] + bias; or added to out, which then starts the sum. */
typedef struct sfa_product {
  int64_t m, n, k;
  sfa_matrix a, b;
  const float *bias; /* [n] or NULL */
  bool add;
  bool bf16; /* operands rounded to bf16 */
  float *out;
  int64_t out_stride;
} sfa_product;

/* The backward pass of rms_norm, or with center of layer_norm, over n_groups pieces of dim elements in every row. */
typedef struct sfa_norm_backward {
  int64_t n_rows;
  int32_t n_groups, dim;
  bool center;
  float eps;
  const float *weight; /* [dim] */
  const float *x;      /* what was normalised */
  int64_t x_stride;
  const float *d_out;
  int64_t d_out_stride;
  float *d_x; /* may be d_out */
  int64_t d_x_stride;
  bool add;        /* d_x += */
  float *d_weight; /* [dim], added to; NULL: not wanted */
  float *d_bias;   /* the same */
} sfa_norm_backward;

/* Losses of a chunk of logits, which become their gradients:
 *     l = softcap(logits);  loss = -log softmax(l)[target];  divergence = sum p log(p / softmax(l / t)), p = softmax(teacher / t)
 *     logits = d (target_scale * loss + teacher_scale * t^2 * divergence) / d logits       for scored rows, 0 for the others */
typedef struct sfa_loss {
  int64_t n_rows;
  int32_t n_classes;
  float *logits;          /* [n_rows][n_classes] */
  const int32_t *targets; /* [n_rows], -1: not scored */
  float softcap;          /* 0: none */
  bool backward;          /* false: the logits stay as they are, but capped */
  float target_scale;
  const float *teacher; /* [n_rows][n_classes] or NULL */
  float teacher_scale, temperature;
  float *losses;      /* [n_rows], 0 where not scored */
  float *divergences; /* [n_rows], of teacher alone */
} sfa_loss;

/* The norm of all gradients, and what they are multiplied by so that it stays below a limit. */
typedef struct sfa_clip {
  double norm;
  float factor;
} sfa_clip;

/* AdamW: g = factor * gradient; m += (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g^2;
 * value = value (1 - rate * decay) - rate / correction1 * m / (sqrt(v / correction2) + eps), correction_i = 1 - beta_i^step. */
typedef struct sfa_adamw {
  float rate, beta1, beta2, eps, decay, correction1, correction2;
  const sfa_clip *clip; /* in the machine's memory; where its norm is not finite nothing moves. NULL: a factor of 1 */
} sfa_adamw;

typedef struct sfa_training {
  /* Enough for products whose m and n are at most max_dim, and for sums over rows of so many columns. */
  size_t (*scratch_bytes)(int64_t max_dim);
  void (*product)(const sfa_context *ctx, const sfa_product *product, void *scratch);
  /* out [dim] += the sum of rows. */
  void (*column_sum)(const sfa_context *ctx, int64_t n_rows, int32_t dim, const float *x, int64_t x_stride, float *out, void *scratch);
  void (*norm_backward)(const sfa_context *ctx, const sfa_norm_backward *norm, void *scratch);
  /* d_out is that of act(x) * up; d_x and d_up may be d_out or their operand. up NULL: of act(x), d_up unused. */
  void (*activate_backward)(const sfa_context *ctx, sfa_activation act, int64_t n_rows, int32_t dim, const float *x, int64_t x_stride,
                            const float *up, int64_t up_stride, const float *d_out, int64_t d_out_stride, float *d_x, int64_t d_x_stride,
                            float *d_up, int64_t d_up_stride);
  /* out [n_rows][dim] = scale * table[ids[row]], or added to out. */
  void (*gather)(const sfa_context *ctx, int64_t n_rows, int32_t dim, const float *table, const int32_t *ids, float scale, bool add,
                 float *out);
  /* table[ids[row]] += scale * x[row], rows in rising order. */
  void (*scatter_add)(const sfa_context *ctx, int64_t n_rows, int32_t dim, const float *x, const int32_t *ids, float scale, float *table);
  void (*loss)(const sfa_context *ctx, const sfa_loss *loss);
  /* out [n] = factor * x, or added to out; out may be x. */
  void (*scale)(const sfa_context *ctx, int64_t n, float factor, const float *x, bool add, float *out);
  /* *sum = that of the squares of x [n]. */
  void (*square_sum)(const sfa_context *ctx, int64_t n, const float *x, double *sum);
  /* norm = sqrt(sums [n] together); factor = min(1, most / (norm + 1e-6)), 1 without a limit (most = 0). */
  void (*clip)(const sfa_context *ctx, int32_t n, const double *sums, double most, sfa_clip *clip);
  /* out [n] += (float)(factor / *over) x; nothing where *over is 0. */
  void (*add_share)(const sfa_context *ctx, int64_t n, double factor, const double *over, const float *x, float *out);
  void (*adamw)(const sfa_context *ctx, const sfa_adamw *how, int64_t n, const float *gradient, float *m, float *v, float *value);
  /* to [n_rows][width] = from, rows of both `stride` elements apart. */
  void (*copy_rows)(const sfa_context *ctx, int64_t n_rows, int64_t width, const float *from, int64_t from_stride, float *to,
                    int64_t to_stride);
  /* out [n] = x + constant. */
  void (*shift)(const sfa_context *ctx, int64_t n, const float *x, float constant, float *out);
  /* x [n] becomes 0 where mask [n] is 0. */
  void (*keep_where)(const sfa_context *ctx, int64_t n, const float *mask, float *x);
} sfa_training;

/* The CPU, with kernels for the context's instruction set. */
const sfa_training *sfa_training_cpu(void);

#endif
