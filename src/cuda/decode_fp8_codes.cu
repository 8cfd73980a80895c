/* Decode over int8 codes and values of e4m3. */
#include "cuda/decode_instances.cuh"

template <int K> struct codes_of {
  template <int ROWS> struct keys { typedef sfa_decode_codes<SFA_I8, K, ROWS> type; };
};

template <int K, int E> static sfa_decode_launch instance(int32_t rows) {
  return sfa_decode_instance_of<codes_of<K>::template keys, E, K != 0, SFA_E4M3>(rows);
}

sfa_decode_launch sfa_decode_fp8_codes(int32_t k, int32_t rows, int32_t head_dim_v) {
  return head_dim_v == 64    ? (k == 8    ? instance<8, 64>
                                : k == 16 ? instance<16, 64>
                                          : instance<0, 64>)(rows)
         : head_dim_v == 128 ? (k == 8    ? instance<8, 128>
                                : k == 16 ? instance<16, 128>
                                          : instance<0, 128>)(rows)
         : head_dim_v == 256 ? instance<0, 256>(rows)
                             : NULL;
}
