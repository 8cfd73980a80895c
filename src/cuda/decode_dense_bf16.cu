/* Decode over dense keys of bf16, D = E. */
#include "cuda/decode_instances.cuh"

template <int D> struct rows_of {
  template <int ROWS> struct keys { typedef sfa_decode_dense<SFA_BF16, D, ROWS> type; };
};

sfa_decode_launch sfa_decode_dense_bf16(int32_t value_dtype, int32_t rows, int32_t head_dim) {
  return head_dim == 64    ? sfa_decode_instance<rows_of<64>::keys, 64, false>(value_dtype, rows)
         : head_dim == 128 ? sfa_decode_instance<rows_of<128>::keys, 128, false>(value_dtype, rows)
         : head_dim == 256 ? sfa_decode_instance<rows_of<256>::keys, 256, false>(value_dtype, rows)
                           : NULL;
}
