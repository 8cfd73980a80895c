/* cuda/decode_drop_instances.cuh: the table of instances of decode with eps for int8 codes of K entries, of which a warp scores AT_ONCE
 * steps of 32 at a time. */
#ifndef SFA_CUDA_DECODE_DROP_INSTANCES_CUH
#define SFA_CUDA_DECODE_DROP_INSTANCES_CUH

#include "cuda/decode_drop_long.cuh"
#include "cuda/decode_drop_short.cuh"

template <int K, int AT_ONCE, int DTYPE, int E, int ROWS>
static const char *sfa_drop_launch(const sfa_decode_call *call, cudaStream_t stream) {
  typedef sfa_decode_codes<SFA_I8, K, ROWS> codes;
  typedef sfa_decode_values<DTYPE, E, ROWS> values;
  return call->drop_is_short ? sfa_drop_short_launch<codes, values, ROWS, E, AT_ONCE>(call, stream)
                             : sfa_drop_long_launch<codes, values, ROWS, E, AT_ONCE>(call, stream);
}

template <int K, int AT_ONCE, int DTYPE, int E> static sfa_decode_launch sfa_drop_instance_of(int32_t rows) {
  return rows == 1 ? sfa_drop_launch<K, AT_ONCE, DTYPE, E, 1> : sfa_drop_launch<K, AT_ONCE, DTYPE, E, 4>;
}

template <int K, int AT_ONCE> static sfa_decode_launch sfa_drop_instance(int32_t value_dtype, int32_t rows, int32_t head_dim_v) {
  if (value_dtype == SFA_I8)
    return head_dim_v == 64    ? sfa_drop_instance_of<K, AT_ONCE, SFA_I8, 64>(rows)
           : head_dim_v == 128 ? sfa_drop_instance_of<K, AT_ONCE, SFA_I8, 128>(rows)
                               : NULL;
  if (value_dtype == SFA_BF16)
    return head_dim_v == 64    ? sfa_drop_instance_of<K, AT_ONCE, SFA_BF16, 64>(rows)
           : head_dim_v == 128 ? sfa_drop_instance_of<K, AT_ONCE, SFA_BF16, 128>(rows)
                               : NULL;
  return NULL;
}

#endif
