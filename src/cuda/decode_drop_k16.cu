/* Decode with eps over int8 codes of K = 16. */
#include "cuda/decode_drop.cuh"

template <int DTYPE, int E, int ROWS> static sfa_decode_launch instance(void) {
  return sfa_decode_drop_launch<sfa_decode_codes<SFA_I8, 16, ROWS>, sfa_decode_values<DTYPE, E, ROWS>, ROWS, E, (ROWS == 1 ? 4 : 2)>;
}

template <int DTYPE, int E> static sfa_decode_launch rows_of(int32_t rows) {
  return rows == 1 ? instance<DTYPE, E, 1>() : instance<DTYPE, E, 4>();
}

sfa_decode_launch sfa_decode_drop_k16(int32_t value_dtype, int32_t rows, int32_t head_dim_v) {
  if (value_dtype == SFA_I8)
    return head_dim_v == 64 ? rows_of<SFA_I8, 64>(rows) : head_dim_v == 128 ? rows_of<SFA_I8, 128>(rows) : NULL;
  if (value_dtype == SFA_BF16)
    return head_dim_v == 64 ? rows_of<SFA_BF16, 64>(rows) : head_dim_v == 128 ? rows_of<SFA_BF16, 128>(rows) : NULL;
  return NULL;
}
