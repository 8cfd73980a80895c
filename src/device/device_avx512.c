/* The kernels of device_cpu.c for this instruction set. */
#include "device/cpu_kernels.h"
#include "device/lanes_avx512.h"
#include "device/training_kernels.h"

#include "device/linear_tmpl.c"
#include "device/rows_tmpl.c"

#include "device/product_tmpl.c"
#include "device/training_tmpl.c"

const sfa_cpu_kernels sfa_cpu_kernels_avx512 = {linear, quantize, rms_norm, layer_norm, activate, softcap};
const sfa_training_kernels sfa_training_kernels_avx512 = {
    {DENSE_ROWS, TILE_COLUMNS, product, pack_rows, pack_columns}, norm_backward, activate_backward, scale, loss, square_sum, adamw};
