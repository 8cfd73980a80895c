/* The kernels of device_cpu.c for this instruction set. */
#include "device/cpu_kernels.h"
#include "device/lanes_scalar.h"

#include "device/linear_tmpl.c"
#include "device/rows_tmpl.c"

const sfa_cpu_kernels sfa_cpu_kernels_scalar = {linear, quantize, rms_norm, layer_norm, activate, softcap};
