/* The tables that this build has, and which of them the machine runs. */
#include "kernel/kernel_half.h"
#include "kernel/kernel_table.h"

const sfa_kernels *sfa_kernel_select(sfa_isa isa) {
  sfa_isa best = sfa_isa_best();
  return isa > best ? NULL : sfa_kernel_of(isa == SFA_ISA_DEFAULT ? best : isa);
}

const sfa_kernels *sfa_kernel_of(sfa_isa isa) {
  switch (isa) {
  case SFA_ISA_SCALAR: return &sfa_kernels_scalar;
#if defined(SFA_KERNEL_X86)
  case SFA_ISA_AVX2: return &sfa_kernels_avx2;
  case SFA_ISA_AVX512: return &sfa_kernels_avx512;
  case SFA_ISA_VBMI:
  case SFA_ISA_AMX: return &sfa_kernels_vbmi; /* what AMX adds is in half precision: kernel_half.h */
#endif
  default: return NULL;
  }
}

const sfa_half_kernels *sfa_half_kernel_select(sfa_isa isa) { return isa > sfa_isa_best() ? NULL : sfa_half_kernel_of(isa); }

const sfa_half_kernels *sfa_half_kernel_of(sfa_isa isa) {
  if (isa == SFA_ISA_SCALAR)
    return &sfa_half_kernels_scalar;
#if defined(SFA_KERNEL_X86)
  if (isa == SFA_ISA_AMX)
    return &sfa_half_kernels_amx;
#endif
  return NULL;
}
