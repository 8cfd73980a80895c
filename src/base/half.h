/* base/half.h: bf16 and f16 as integers, rounded to nearest even; exact in the other direction. */
#ifndef SFA_HALF_H
#define SFA_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t sfa_bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float sfa_float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static inline float sfa_f32_from_bf16(uint16_t h) { return sfa_float_of((uint32_t)h << 16); }

static inline uint16_t sfa_bf16_from_f32(float x) {
  uint32_t bits = sfa_bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) /* NaN: keep it one */
    return (uint16_t)((bits >> 16) | 0x40u);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float sfa_f32_from_f16(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) /* inf, NaN */
    return sfa_float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) /* normal: exponent bias 15 -> 127 */
    return sfa_float_of(sign | ((magnitude << 13) + (112u << 23)));
  float x = (float)magnitude * 0x1p-24f; /* subnormal, exact */
  return sign ? -x : x;
}

static inline uint16_t sfa_f16_from_f32(float x) {
  uint32_t bits = sfa_bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u)
    return (uint16_t)(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) /* rounds to 65536 or more */
    return (uint16_t)(sign | 0x7c00u);
  if (magnitude < 0x38800000u) { /* below 2^-14: adding 0.5 leaves the value, rounded, in the low bits */
    uint32_t rounded = sfa_bits_of(sfa_float_of(magnitude) + 0.5f) - 0x3f000000u;
    return (uint16_t)(sign | rounded);
  }
  magnitude += 0xfffu + ((magnitude >> 13) & 1u);
  return (uint16_t)(sign | ((magnitude - (112u << 23)) >> 13));
}

#endif
