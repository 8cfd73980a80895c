/* cuda/decode_instances.cuh: the table of decode_stream.cuh's instances for one kind of keys: values of bf16 and int8, and what the kind's
 * file says: column counts E, and whether there are blocks of 1 row beside those of 4 and 8. */
#ifndef SFA_CUDA_DECODE_INSTANCES_CUH
#define SFA_CUDA_DECODE_INSTANCES_CUH

#include "cuda/decode_stream.cuh"

/* KEYS<ROWS>::type are the keys. */
template <template <int> class KEYS, int E, bool SINGLE, int DTYPE> static sfa_decode_launch sfa_decode_instance_of(int32_t rows) {
  if constexpr (SINGLE)
    if (rows == 1)
      return sfa_decode_stream_launch<typename KEYS<1>::type, sfa_decode_values<DTYPE, E, 1>, 1, E>;
  return rows == 4   ? sfa_decode_stream_launch<typename KEYS<4>::type, sfa_decode_values<DTYPE, E, 4>, 4, E>
         : rows == 8 ? sfa_decode_stream_launch<typename KEYS<8>::type, sfa_decode_values<DTYPE, E, 8>, 8, E>
                     : NULL;
}

template <template <int> class KEYS, int E, bool SINGLE> static sfa_decode_launch sfa_decode_instance(int32_t value_dtype, int32_t rows) {
  return value_dtype == SFA_I8     ? sfa_decode_instance_of<KEYS, E, SINGLE, SFA_I8>(rows)
         : value_dtype == SFA_BF16 ? sfa_decode_instance_of<KEYS, E, SINGLE, SFA_BF16>(rows)
                                   : NULL;
}

#endif
