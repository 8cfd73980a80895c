/* Decode over bf16 codes, and over dense keys of D = E, and values of e4m3. */
#include "cuda/decode_instances.cuh"

template <int ROWS> struct codes { typedef sfa_decode_codes<SFA_BF16, 0, ROWS> type; };
template <int DTYPE, int D> struct rows_of {
  template <int ROWS> struct keys { typedef sfa_decode_dense<DTYPE, D, ROWS> type; };
};

template <int E> static sfa_decode_launch instance(int32_t key_dtype, int32_t k, int32_t rows) {
  return k                     ? sfa_decode_instance_of<codes, E, false, SFA_E4M3>(rows)
         : key_dtype == SFA_I8 ? sfa_decode_instance_of<rows_of<SFA_I8, E>::template keys, E, false, SFA_E4M3>(rows)
                               : sfa_decode_instance_of<rows_of<SFA_BF16, E>::template keys, E, false, SFA_E4M3>(rows);
}

sfa_decode_launch sfa_decode_fp8_rows(int32_t key_dtype, int32_t k, int32_t rows, int32_t head_dim_v) {
  return head_dim_v == 64    ? instance<64>(key_dtype, k, rows)
         : head_dim_v == 128 ? instance<128>(key_dtype, k, rows)
         : head_dim_v == 256 ? instance<256>(key_dtype, k, rows)
                             : NULL;
}
