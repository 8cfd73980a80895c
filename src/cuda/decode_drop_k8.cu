/* Decode with eps over int8 codes of K = 8. */
#include "cuda/decode_drop_instances.cuh"

sfa_decode_launch sfa_decode_drop_k8(int32_t value_dtype, int32_t rows, int32_t head_dim_v) {
  return sfa_drop_instance<8, 4>(value_dtype, rows, head_dim_v);
}
