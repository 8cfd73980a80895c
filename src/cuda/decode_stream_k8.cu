/* Decode over int8 codes of K = 8. */
#include "cuda/decode_instances.cuh"

template <int ROWS> struct codes { typedef sfa_decode_codes<SFA_I8, 8, ROWS> type; };

sfa_decode_launch sfa_decode_stream_k8(int32_t value_dtype, int32_t rows, int32_t head_dim_v) {
  return head_dim_v == 64    ? sfa_decode_instance<codes, 64, true>(value_dtype, rows)
         : head_dim_v == 128 ? sfa_decode_instance<codes, 128, true>(value_dtype, rows)
                             : NULL;
}
