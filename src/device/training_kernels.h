/* device/training_kernels.h: the inner loops of device_cpu_products.c and device_cpu_training.c, one table an instruction set.
 * product_tmpl.c and training_tmpl.c are their one text, over the 16 lanes of lanes_<isa>.h. */
#ifndef SFA_TRAINING_KERNELS_H
#define SFA_TRAINING_KERNELS_H

#include "device/training.h"

/* A rectangle of a product from packed operands. */
typedef struct sfa_product_block {
  int64_t n_rows, n_columns, k;
  int64_t stride;    /* k in whole 32s: what tiles and panels lie apart by */
  const float *a;    /* [tiles][stride][tile_rows] */
  const float *b;    /* [panels][stride][panel_columns] */
  const float *bias; /* [n_columns], added after the sum; NULL: none */
  bool add;          /* the sum starts from what is in out */
  float *out;
  int64_t out_stride;
} sfa_product_block;

/* How a tile's or a panel's memory is used, pack and product settle among themselves. */
typedef struct sfa_product_kernels {
  int32_t tile_rows, panel_columns;
  void (*product)(const sfa_product_block *block);
  /* A tile's rows, or a panel's columns: element (i, s), s < k, from x[i * stride + s * step], one of the two 1; zeros from n on. */
  void (*pack_rows)(int64_t n, int64_t k, const float *x, int64_t stride, int64_t step, bool bf16, float *out);
  void (*pack_columns)(int64_t n, int64_t k, const float *x, int64_t stride, int64_t step, bool bf16, float *out);
} sfa_product_kernels;

typedef struct sfa_training_kernels {
  sfa_product_kernels products;
  /* One piece of a row; sums are added to d_weight and d_bias where they are not NULL. */
  void (*norm_backward)(const sfa_norm_backward *norm, const float *x, const float *d_out, float *d_x, float *d_weight, float *d_bias);
  void (*activate_backward)(sfa_activation act, int32_t dim, const float *x, const float *up, const float *d_out, float *d_x, float *d_up);
  /* out = scale * x, or added to out. */
  void (*scale)(int32_t dim, float scale, const float *x, bool add, float *out);
  /* Row `row` of a loss. */
  void (*loss)(const sfa_loss *loss, int64_t row);
  double (*square_sum)(int32_t n, const float *x);
  void (*adamw)(const sfa_adamw *how, int32_t n, const float *gradient, float *m, float *v, float *value);
} sfa_training_kernels;

extern const sfa_training_kernels sfa_training_kernels_scalar, sfa_training_kernels_avx2, sfa_training_kernels_avx512;
/* Of products in bf16 alone. */
extern const sfa_product_kernels sfa_product_kernels_amx;

/* Products over the context's threads (device_cpu_products.c); scratch for m and n of up to max_dim. */
size_t sfa_product_scratch_bytes(int64_t max_dim);
void sfa_product_run(const sfa_context *ctx, const sfa_product_kernels *kernels, const sfa_product *product, void *scratch);

#endif
