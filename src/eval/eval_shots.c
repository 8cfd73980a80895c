/* Python's random.sample: MT19937 seeded as by random.seed(1234), _randbelow by rejection, and sample()'s two ways: a set of what was taken
 * where few of many are drawn, else a pool that shrinks. (Matsumoto and Nishimura 1998; CPython's Lib/random.py.) */
#include "eval/eval_shots.h"

#include <math.h>

enum { N = 624, M = 397, SEED = 1234 };

typedef struct twister {
  uint32_t state[N];
  int at;
} twister;

static void seed_twister(twister *t, uint32_t seed) {
  uint32_t *s = t->state;
  s[0] = 19650218;
  for (uint32_t i = 1; i < N; i++)
    s[i] = 1812433253u * (s[i - 1] ^ (s[i - 1] >> 30)) + i;
  uint32_t i = 1;
  for (int k = 0; k < N; k++) { /* init_by_array of a key of one word */
    s[i] = (s[i] ^ ((s[i - 1] ^ (s[i - 1] >> 30)) * 1664525u)) + seed;
    if (++i == N) {
      s[0] = s[N - 1];
      i = 1;
    }
  }
  for (int k = 0; k < N - 1; k++) {
    s[i] = (s[i] ^ ((s[i - 1] ^ (s[i - 1] >> 30)) * 1566083941u)) - i;
    if (++i == N) {
      s[0] = s[N - 1];
      i = 1;
    }
  }
  s[0] = 0x80000000u;
  t->at = N;
}

static uint32_t next_word(twister *t) {
  if (t->at == N) {
    for (int i = 0; i < N; i++) {
      uint32_t y = (t->state[i] & 0x80000000u) | (t->state[(i + 1) % N] & 0x7fffffffu);
      t->state[i] = t->state[(i + M) % N] ^ (y >> 1) ^ (y & 1 ? 0x9908b0dfu : 0);
    }
    t->at = 0;
  }
  uint32_t y = t->state[t->at++];
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return y ^ (y >> 18);
}

/* Uniform in 0 .. n - 1, 1 <= n < 2^31. */
static uint32_t below(twister *t, uint32_t n) {
  int shift = __builtin_clz(n);
  uint32_t r;
  do
    r = next_word(t) >> shift;
  while (r >= n);
  return r;
}

/* pool: [n_rows] scratch for the second way. */
static void sample(twister *t, int32_t n_rows, int32_t n, int32_t *pool, int32_t *out) {
  double set_size = 21 + (n > 5 ? pow(4, ceil(log(3.0 * n) / log(4))) : 0);
  if ((double)n_rows > set_size) {
    for (int32_t i = 0; i < n;) {
      out[i] = (int32_t)below(t, (uint32_t)n_rows);
      int32_t j = 0;
      while (out[j] != out[i])
        j++;
      i += j == i; /* one that was taken is drawn again */
    }
    return;
  }
  for (int32_t i = 0; i < n_rows; i++)
    pool[i] = i;
  for (int32_t i = 0; i < n; i++) {
    uint32_t j = below(t, (uint32_t)(n_rows - i));
    out[i] = pool[j];
    pool[j] = pool[n_rows - i - 1];
  }
}

sfa_status sfa_eval_shots_draw(sfa_context *ctx, int64_t n_rows, int32_t n_shots, int64_t n_items, int32_t **shots) {
  int32_t *pool;
  twister t;
  SFA_TRY(sfa_alloc_zero(ctx, (size_t)n_rows, sizeof *pool, "a pool of examples", (void **)&pool));
  sfa_status status = sfa_alloc_zero(ctx, (size_t)n_items * (size_t)n_shots, sizeof **shots, "the choice of examples", (void **)shots);
  seed_twister(&t, SEED);
  for (int64_t i = 0; status == SFA_OK && i < n_items; i++)
    sample(&t, (int32_t)n_rows, n_shots, pool, *shots + i * n_shots);
  sfa_free(ctx, pool);
  return status;
}
