/* device/cpu_kernels.h: the inner loops of device_cpu.c, one table an instruction set. linear_tmpl.c and rows_tmpl.c are their one text,
 * over the 16 lanes of lanes_<isa>.h. */
#ifndef SFA_CPU_KERNELS_H
#define SFA_CPU_KERNELS_H

#include "device/device.h"

enum { SFA_PANEL = 16 }; /* outputs side by side in memory: the lanes of a kernel */

/* Inputs rounded to 15 bits, block by block: x = scale * q, q = 128 * high + low. Two bytes, because a machine's fast products are of
 * bytes; with one (as llama.cpp rounds) the result is as far from that in f32 as a 4-bit file from its model. */
enum { SFA_PLANES = 2, SFA_PLANE_BITS = 7 };
typedef struct sfa_quantized_rows {
  int8_t *q;        /* [n_rows][n_blocks][2][32] high, low */
  float *scale;     /* [n_rows][n_blocks] max|x| / (127 * 128); NaN where the block has a NaN or inf */
  int32_t *sum;     /* [n_rows][n_blocks] of q */
  float *scale_sum; /* [n_rows][n_blocks] scale * sum */
} sfa_quantized_rows;

/* A rectangle of a product: rows of x against whole panels.
 * Panel layouts: floating point [n_in][16]; U8 [n_blocks][8][16][4], U4 [n_blocks][4][16][4] (inputs 4v.. of a block in the low halves of
 * piece v, 16 + 4v.. in the high ones); params [n_blocks][1 or 2][16] f16: scale, minimum. */
typedef struct sfa_linear_task {
  sfa_storage storage;
  int32_t n_in, n_blocks, offset;
  bool has_minimum;
  int32_t n_panels, n_out; /* n_out: columns that are stored, in (16 * (n_panels - 1), 16 * n_panels] */
  const uint8_t *weights;
  size_t panel_bytes;
  const uint16_t *params;
  size_t panel_params;
  const float *bias; /* [n_panels * 16] or NULL */
  int64_t n_rows;
  const float *x; /* floating point */
  int64_t x_stride;
  sfa_quantized_rows quantized; /* U8, U4 */
  float *out;
  int64_t out_stride;
} sfa_linear_task;

typedef struct sfa_cpu_kernels {
  void (*linear)(const sfa_linear_task *task);
  /* One row of n elements, padded with zeros to n_blocks. */
  void (*quantize)(int32_t n, int32_t n_blocks, const float *x, int8_t *q, float *scale, int32_t *sum, float *scale_sum);
  void (*rms_norm)(int32_t dim, const float *x, const float *weight, float eps, float *out);
  void (*layer_norm)(int32_t dim, const float *x, const float *weight, const float *bias, float eps, float *out);
  void (*activate)(sfa_activation act, int32_t dim, const float *x, const float *up, float *out);
  void (*softcap)(int32_t dim, float cap, float *x);
} sfa_cpu_kernels;

extern const sfa_cpu_kernels sfa_cpu_kernels_scalar, sfa_cpu_kernels_avx2, sfa_cpu_kernels_avx512;

#endif
