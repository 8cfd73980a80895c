/* Decode over bf16 codes of any K that is a multiple of 8. */
#include "cuda/decode_instances.cuh"

template <int ROWS> struct codes { typedef sfa_decode_codes<SFA_BF16, 0, ROWS> type; };

sfa_decode_launch sfa_decode_stream_bf16(int32_t value_dtype, int32_t rows, int32_t head_dim_v) {
  return head_dim_v == 64    ? sfa_decode_instance<codes, 64, false>(value_dtype, rows)
         : head_dim_v == 128 ? sfa_decode_instance<codes, 128, false>(value_dtype, rows)
         : head_dim_v == 256 ? sfa_decode_instance<codes, 256, false>(value_dtype, rows)
                             : NULL;
}
