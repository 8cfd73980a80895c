/* Decode with eps over int8 codes of K = 16. */
#include "cuda/decode_drop_instances.cuh"

sfa_decode_launch sfa_decode_drop_k16(int32_t value_dtype, int32_t rows, int32_t head_dim_v) {
  return sfa_drop_instance<16, 2>(value_dtype, rows, head_dim_v);
}
