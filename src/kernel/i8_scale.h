/* kernel/i8_scale.h: the f16 scale of an int8 row, in integer and exact f32 steps: no rounding that an instruction set could change. */
#ifndef SFA_I8_SCALE_H
#define SFA_I8_SCALE_H

#include "base/half.h"

#define SFA_I8_SCALE_NAN 0x7e00u
#define SFA_I8_SCALE_OVERFLOW 0x7c00u

/* largest: bits of max|x|. The smallest f16 that is at least max|x| / 127; NAN for a row with inf or NaN, OVERFLOW if there is none.
 * Rounding to nearest twice gives that or the f16 below it, and scale * 127 is exact in f32 (11 + 7 bits), so one comparison decides. */
static inline uint16_t sfa_i8_scale(uint32_t largest) {
  if (largest >= 0x7f800000u)
    return SFA_I8_SCALE_NAN;
  float limit = sfa_float_of(largest);
  uint16_t scale = sfa_f16_from_f32(limit / 127.0f);
  if (scale < SFA_I8_SCALE_OVERFLOW && sfa_f32_from_f16(scale) * 127.0f < limit)
    scale++;
  return scale;
}

#endif
