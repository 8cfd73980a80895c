/* base/fp8.h: e4m3, the 8-bit float of the OCP OFP8 specification (torch.float8_e4m3fn): sign, four exponent bits with bias 7, three
 * mantissa bits.
 *
 *     bytes 0x00, 0x80          +-0
 *     0x01 .. 0x07, with sign   subnormal: multiples of 2^-9
 *     0x08 .. 0x7e              (1 + mantissa / 8) 2^(exponent - 7), up to 448
 *     0x7f, 0xff                NaN; there are no infinities
 */
#ifndef SFA_FP8_H
#define SFA_FP8_H

#include "base/half.h"

/* Exact. */
static inline float sfa_f32_from_e4m3(uint8_t x) {
  const uint32_t sign = (uint32_t)(x & 0x80u) << 24, magnitude = x & 0x7fu;
  if (magnitude == 0x7fu)
    return sfa_float_of(sign | 0x7fc00000u);
  const float value = magnitude < 8 ? (float)magnitude * 0x1p-9f : sfa_float_of((magnitude << 20) + (120u << 23)); /* bias 7 -> 127 */
  return sfa_float_of(sign | sfa_bits_of(value));
}

/* To nearest, ties to even; 448 for what is more, and for infinities. */
static inline uint8_t sfa_e4m3_from_f32(float x) {
  const uint32_t bits = sfa_bits_of(x), sign = bits >> 24 & 0x80u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u)
    return (uint8_t)(sign | 0x7fu);
  if (magnitude >= 0x43e00000u) /* 448 */
    return (uint8_t)(sign | 0x7eu);
  if (magnitude < 0x3c800000u) /* below 2^-6: at 2^14 an f32's last bit is 2^-9, so the sum's low bits are the value, rounded */
    return (uint8_t)(sign | (sfa_bits_of(sfa_float_of(magnitude) + 0x1p14f) - sfa_bits_of(0x1p14f)));
  magnitude += 0x7ffffu + (magnitude >> 20 & 1u);
  return (uint8_t)(sign | ((magnitude - (120u << 23)) >> 20));
}

#endif
