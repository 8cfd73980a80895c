/* Decode with eps over int8 codes and values of e4m3. */
#include "cuda/decode_drop_instances.cuh"

template <int E> static sfa_decode_launch instance(int32_t k, int32_t rows) {
  return k == 8 ? sfa_drop_instance_of<8, 4, SFA_E4M3, E>(rows) : sfa_drop_instance_of<16, 2, SFA_E4M3, E>(rows);
}

sfa_decode_launch sfa_decode_fp8_drop(int32_t k, int32_t rows, int32_t head_dim_v) {
  return head_dim_v == 64 ? instance<64>(k, rows) : head_dim_v == 128 ? instance<128>(k, rows) : NULL;
}
