/* base/rng.h: a small counter generator (splitmix64): the same numbers on every machine from a seed. */
#ifndef SFA_RNG_H
#define SFA_RNG_H

#include <math.h>
#include <stdint.h>

typedef struct sfa_rng {
  uint64_t state;
} sfa_rng;

static inline uint64_t sfa_rng_next(sfa_rng *rng) {
  uint64_t z = rng->state += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

/* Uniform in [0, 1). */
static inline double sfa_rng_uniform(sfa_rng *rng) { return (double)(sfa_rng_next(rng) >> 11) * 0x1p-53; }

/* Standard normal (Box-Muller, one of the pair). */
static inline double sfa_rng_normal(sfa_rng *rng) {
  double u = 1.0 - sfa_rng_uniform(rng), v = sfa_rng_uniform(rng);
  return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

#endif
