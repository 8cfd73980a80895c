/* device/lanes_scalar.h: 16 lanes in plain C. What each function means is written here; lanes_avx2.h and lanes_avx512.h give the same
 * bits. */
#ifndef SFA_LANES_H
#define SFA_LANES_H

#include "base/half.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Rows and panels of a register tile: as many accumulators as the registers hold. */
enum { DENSE_ROWS = 4, DENSE_PANELS = 1, BLOCK_ROWS = 2, BLOCK_PANELS = 1 };

typedef struct lanes {
  float x[16];
} lanes;
typedef struct ilanes {
  int32_t x[16];
} ilanes;
typedef struct blanes { /* 16 groups of 4 bytes */
  uint8_t x[64];
} blanes;

#define EACH for (int i = 0; i < 16; i++)

static inline lanes lanes_set(float x) {
  lanes r;
  EACH r.x[i] = x;
  return r;
}
static inline lanes lanes_load(const float *p) {
  lanes r;
  memcpy(r.x, p, sizeof r.x);
  return r;
}
/* The first n of 16, zeros after them. */
static inline lanes lanes_load_some(const float *p, int32_t n) {
  lanes r = lanes_set(0.0f);
  memcpy(r.x, p, (size_t)n * sizeof *p);
  return r;
}
static inline lanes lanes_load_bf16(const uint16_t *p) {
  lanes r;
  EACH r.x[i] = sfa_f32_from_bf16(p[i]);
  return r;
}
static inline lanes lanes_load_f16(const uint16_t *p) {
  lanes r;
  EACH r.x[i] = sfa_f32_from_f16(p[i]);
  return r;
}
static inline void lanes_store(float *p, lanes a) { memcpy(p, a.x, sizeof a.x); }
static inline void lanes_store_some(float *p, lanes a, int32_t n) { memcpy(p, a.x, (size_t)n * sizeof *p); }
static inline lanes lanes_add(lanes a, lanes b) {
  EACH a.x[i] += b.x[i];
  return a;
}
static inline lanes lanes_sub(lanes a, lanes b) {
  EACH a.x[i] -= b.x[i];
  return a;
}
static inline lanes lanes_mul(lanes a, lanes b) {
  EACH a.x[i] *= b.x[i];
  return a;
}
static inline lanes lanes_div(lanes a, lanes b) {
  EACH a.x[i] /= b.x[i];
  return a;
}
static inline lanes lanes_sqrt(lanes a) {
  EACH a.x[i] = sqrtf(a.x[i]);
  return a;
}
/* a * b + c, rounded once. */
static inline lanes lanes_fma(lanes a, lanes b, lanes c) {
  EACH c.x[i] = fmaf(a.x[i], b.x[i], c.x[i]);
  return c;
}
/* The second operand where one of the two is NaN. */
static inline lanes lanes_min(lanes a, lanes b) {
  EACH b.x[i] = a.x[i] < b.x[i] ? a.x[i] : b.x[i];
  return b;
}
static inline lanes lanes_max(lanes a, lanes b) {
  EACH b.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i];
  return b;
}
static inline lanes lanes_abs(lanes a) {
  EACH a.x[i] = sfa_float_of(sfa_bits_of(a.x[i]) & 0x7fffffffu);
  return a;
}
/* a * 2^n, n whole with a normal result: n in the exponent's place, after adding 1.5 * 2^23. */
static inline lanes lanes_scale2(lanes a, lanes shifted_n) {
  EACH a.x[i] = sfa_float_of(sfa_bits_of(a.x[i]) + (sfa_bits_of(shifted_n.x[i]) << 23));
  return a;
}

static inline ilanes ilanes_set(int32_t x) {
  ilanes r;
  EACH r.x[i] = x;
  return r;
}
static inline lanes lanes_from_i32(ilanes a) {
  lanes r;
  EACH r.x[i] = (float)a.x[i];
  return r;
}
/* 16 values up to 127 * 128, rounded to nearest even, as 128 * high + low with low in -64..63. */
static inline void lanes_store_planes(int8_t *high, int8_t *low, lanes a) {
  EACH {
    int32_t q = (int32_t)lrintf(a.x[i]), top = (q + 64) >> 7;
    high[i] = (int8_t)top;
    low[i] = (int8_t)(q - top * 128);
  }
}
/* 128 * a + b. */
static inline ilanes ilanes_join(ilanes a, ilanes b) {
  EACH b.x[i] += a.x[i] * 128;
  return b;
}

static inline blanes blanes_load(const uint8_t *p) {
  blanes r;
  memcpy(r.x, p, sizeof r.x);
  return r;
}
static inline blanes blanes_low(blanes a) {
  for (int i = 0; i < 64; i++)
    a.x[i] &= 15;
  return a;
}
static inline blanes blanes_high(blanes a) {
  for (int i = 0; i < 64; i++)
    a.x[i] >>= 4;
  return a;
}
/* Lane i: acc + the four products of w's group i with the four bytes of x. Exact. small: no byte of w is above 127. */
static inline ilanes ilanes_dot(ilanes acc, blanes w, int32_t x, int small) {
  (void)small;
  int8_t v[4];
  memcpy(v, &x, sizeof v);
  for (int i = 0; i < 64; i++)
    acc.x[i / 4] += w.x[i] * v[i % 4];
  return acc;
}

#undef EACH
#endif
