/* The one definition of 2^x, as scalar code. */
#include "kernel/exp2.h"
#include "base/half.h"
#include "kernel/kernel.h"
#include <math.h>

float sfa_exp2(float x) {
  if (x < -126.0f)
    return 0.0f;
  if (x >= 127.5f)
    return INFINITY;
  float t = x + SFA_EXP2_ROUND; /* the integer nearest to x stands in the low bits of t */
  float r = x - (t - SFA_EXP2_ROUND);
  float p = SFA_EXP2_5;
  p = fmaf(p, r, SFA_EXP2_4);
  p = fmaf(p, r, SFA_EXP2_3);
  p = fmaf(p, r, SFA_EXP2_2);
  p = fmaf(p, r, SFA_EXP2_1);
  p = fmaf(p, r, 1.0f);
  return p * sfa_float_of((sfa_bits_of(t) << 23) + sfa_bits_of(1.0f));
}
