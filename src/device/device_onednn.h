/* device/device_onednn.h: linear layers whose weights and inputs are bf16, by oneDNN (SFA_STORE_BF16_PRODUCTS of device.h). */
#ifndef SFA_DEVICE_ONEDNN_H
#define SFA_DEVICE_ONEDNN_H

#include "device/device.h"

typedef struct sfa_onednn sfa_onednn; /* the weights of one layer, in the order that oneDNN's kernel wants */

/* One of several layers that read the same input, as sfa_linear_part. */
typedef struct sfa_onednn_part {
  const sfa_onednn *layer;
  float *out;
  int64_t out_stride;
} sfa_onednn_part;

/* Whether the processor has matrix instructions for bf16 (AMX) that oneDNN and the context may use. */
bool sfa_onednn_is_fast(const sfa_context *ctx);

sfa_status sfa_onednn_create(sfa_context *ctx, const sfa_linear_source *source, sfa_onednn **layer);
/* Takes NULL. */
void sfa_onednn_destroy(sfa_context *ctx, sfa_onednn *layer);
size_t sfa_onednn_bytes(const sfa_onednn *layer);
size_t sfa_onednn_scratch_bytes(const sfa_context *ctx, int64_t n_rows, int32_t n_in);
void sfa_onednn_linear(const sfa_context *ctx, int64_t n_rows, const float *x, int64_t x_stride, int32_t n_parts,
                       const sfa_onednn_part *parts, void *scratch);

#endif
