/* base/dtype.h: what stored elements take. */
#ifndef SFA_DTYPE_H
#define SFA_DTYPE_H

#include <sfa/base.h>

#include <stdbool.h>

/* Bytes of n elements of one of the types, an even number for SFA_I4. In line: kernels ask for every list. */
static inline size_t sfa_stored_bytes(sfa_dtype dtype, int64_t n) {
  return dtype == SFA_I4 ? (size_t)n / 2 : (size_t)n * (dtype == SFA_F32 ? 4 : dtype == SFA_I8 || dtype == SFA_E4M3 ? 1 : 2);
}

/* Whether each row has a scale. */
static inline bool sfa_has_scales(sfa_dtype dtype) { return dtype == SFA_I8 || dtype == SFA_I4 || dtype == SFA_E4M3; }

#endif
