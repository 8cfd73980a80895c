/* kernel/exp2.h: constants of 2^x and tanh x, shared by every instruction set.
 *
 * 2^x = 2^n * p(r), n = x rounded to the nearest even integer, r = x - n in [-1/2, 1/2]. p(0) = 1, so that whole numbers are exact;
 * the other coefficients minimise the largest relative error: 9.2e-8, 1.6e-7 with the rounding of the Horner steps.
 * Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, which gives n and 2^n without a conversion.
 */
#ifndef SFA_EXP2_H
#define SFA_EXP2_H

#define SFA_EXP2_ROUND 0x1.8p23f
#define SFA_EXP2_1 0x1.62e42ap-1f
#define SFA_EXP2_2 0x1.ebf9bcp-3f
#define SFA_EXP2_3 0x1.c6b752p-5f
#define SFA_EXP2_4 0x1.3cea88p-7f
#define SFA_EXP2_5 0x1.5bba14p-10f

/* tanh x = x + x^3 q(x^2) where |x| < 0.625 (relative error 4e-9), else sign(x) * (1 - 2 / (2^(|x| * 2 log2 e) + 1)). */
#define SFA_TANH_SPLIT 0.625f
#define SFA_TANH_0 -0x1.555532p-2f
#define SFA_TANH_1 0x1.110726p-3f
#define SFA_TANH_2 -0x1.b83c5ap-5f
#define SFA_TANH_3 0x1.52269ap-6f
#define SFA_TANH_4 -0x1.75e1c6p-8f

#define SFA_LOG2E 0x1.715476p+0f
/* 2^x overflows no more than this many doublings; tanh is 1 long before. */
#define SFA_TANH_LIMIT 64.0f

#endif
