/* kernel/kernel_table.h: the tables, one an instruction set. Only kernel_select.c and the files that define them look here. */
#ifndef SFA_KERNEL_TABLE_H
#define SFA_KERNEL_TABLE_H

#include "kernel/kernel.h"

extern const sfa_kernels sfa_kernels_scalar;
extern const sfa_kernels sfa_kernels_avx2;
extern const sfa_kernels sfa_kernels_avx512;
extern const sfa_kernels sfa_kernels_vbmi;

#endif
