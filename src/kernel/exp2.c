/* The one definition of 2^x and tanh x, as scalar code. */
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

float sfa_tanh(float x) {
  float a = fabsf(x);
  if (a < SFA_TANH_SPLIT) {
    float z = x * x, q = SFA_TANH_4;
    q = fmaf(q, z, SFA_TANH_3);
    q = fmaf(q, z, SFA_TANH_2);
    q = fmaf(q, z, SFA_TANH_1);
    q = fmaf(q, z, SFA_TANH_0);
    return fmaf(x * z, q, x);
  }
  float doublings = a * (2.0f * SFA_LOG2E);
  float e = sfa_exp2(doublings > SFA_TANH_LIMIT ? SFA_TANH_LIMIT : doublings); /* NaN stays */
  return copysignf(1.0f - 2.0f / (e + 1.0f), x);
}
