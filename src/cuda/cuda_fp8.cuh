/* cuda/cuda_fp8.cuh: e4m3 on the device, bit for bit as base/fp8.h, in steps that every GPU has. */
#ifndef SFA_CUDA_FP8_CUH
#define SFA_CUDA_FP8_CUH

#include <cuda_fp16.h>
#include <stdint.h>

/* Exact: its bits at those of an f16 are the number times 2^-8, subnormal or not. */
static __device__ __forceinline__ float sfa_cuda_f32_from_e4m3(uint32_t x) {
  const float value = __half2float(__ushort_as_half((unsigned short)((x & 0x80u) << 8 | (x & 0x7fu) << 7))) * 256.0f;
  return (x & 0x7fu) == 0x7fu ? __uint_as_float(x << 24 | 0x7fc00000u) : value;
}

/* To nearest, ties to even; 448 for what is more. */
static __device__ __forceinline__ uint32_t sfa_cuda_e4m3_from_f32(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u) - (120u << 23)) >> 20;
  const uint32_t small = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 0x1p14f)) - __float_as_uint(0x1p14f);
  return sign | (magnitude > 0x7f800000u ? 0x7fu : magnitude >= 0x43e00000u ? 0x7eu : magnitude < 0x3c800000u ? small : normal);
}

#endif
