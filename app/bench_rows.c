/* Random rows for the benchmarks. Normal numbers come from a table of 65536 quantiles, four to one random number: a cache of a million
 * tokens has two thousand million of them. */
#include "bench.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { N_QUANTILES = 1 << 16 };

struct bench_random {
  uint64_t state;
  int32_t n_heads, head_dim;
  float *popularity; /* [n_heads][head_dim]; NULL: all 1 */
  float quantile[N_QUANTILES];
};

void *bench_alloc(int64_t count, size_t size) {
  if (count < 0 || (uint64_t)count > (SIZE_MAX / 2) / size)
    return NULL;
  size_t bytes = ((size_t)count * size + 63) & ~(size_t)63;
  return aligned_alloc(64, bytes ? bytes : 64);
}

static uint64_t next_random(uint64_t *state) { /* xorshift64* */
  *state ^= *state >> 12;
  *state ^= *state << 25;
  *state ^= *state >> 27;
  return *state * 0x2545f4914f6cdd1dull;
}

/* quantile[i] = x with Phi(x) = (i + 1/2) / N, by Newton's method from the neighbour's. */
static void fill_quantiles(float *quantile) {
  const double root_2 = sqrt(2), root_2_pi = sqrt(2 * acos(-1));
  double x = 0;
  for (int i = N_QUANTILES / 2; i < N_QUANTILES; i++) {
    double tail = (N_QUANTILES - i - 0.5) / N_QUANTILES;
    for (int step = 0; step < 8; step++)
      x += (0.5 * erfc(x / root_2) - tail) * root_2_pi * exp(0.5 * x * x);
    quantile[i] = (float)x;
    quantile[N_QUANTILES - 1 - i] = (float)-x;
  }
}

/* Skewed supports: feature number r of D, in an order of the head's own, is scaled by (r / D + 0.25)^-1.2. At D = 64 the hottest feature is
 * then kept in 58 % (K = 8) and 71 % (K = 16) of the rows, and two rows share 2.66 and 6.9 features: as on trained models. */
static void fill_popularity(bench_random *random) {
  int32_t D = random->head_dim;
  for (int32_t h = 0; h < random->n_heads; h++) {
    float *scale = random->popularity + (int64_t)h * D;
    for (int32_t r = 0; r < D; r++)
      scale[r] = powf(((float)r + 0.5f) / (float)D + 0.25f, -1.2f);
    for (int32_t r = D - 1; r > 0; r--) {
      int32_t other = (int32_t)(next_random(&random->state) % (uint64_t)(r + 1));
      float swap = scale[r];
      scale[r] = scale[other];
      scale[other] = swap;
    }
  }
}

bench_random *bench_random_create(bench_supports supports, int32_t n_heads, int32_t head_dim, uint64_t seed) {
  bench_random *random = malloc(sizeof *random);
  if (!random)
    return NULL;
  random->state = (seed + 1) * 0x9e3779b97f4a7c15ull;
  random->n_heads = n_heads;
  random->head_dim = head_dim;
  random->popularity = NULL;
  fill_quantiles(random->quantile);
  if (supports == SUPPORTS_SKEWED) {
    random->popularity = bench_alloc((int64_t)n_heads * head_dim, sizeof(float));
    if (!random->popularity) {
      free(random);
      return NULL;
    }
    fill_popularity(random);
  }
  return random;
}

void bench_random_stream(bench_random *random, uint64_t stream) { random->state = (stream + 1) * 0xd1342543de82ef95ull ^ random->state; }

void bench_random_destroy(bench_random *random) {
  if (random)
    free(random->popularity);
  free(random);
}

void bench_random_values(bench_random *random, int64_t n_rows, int64_t dim, float *out) {
  int64_t n = n_rows * dim, i = 0;
  uint64_t state = random->state;
  for (; i + 4 <= n; i += 4) {
    uint64_t bits = next_random(&state);
    for (int lane = 0; lane < 4; lane++)
      out[i + lane] = random->quantile[bits >> (16 * lane) & 0xffff];
  }
  for (; i < n; i++)
    out[i] = random->quantile[next_random(&state) >> 48];
  random->state = state;
}

void bench_random_features(bench_random *random, int64_t n_rows, float *out) {
  int64_t width = (int64_t)random->n_heads * random->head_dim;
  bench_random_values(random, n_rows, width, out);
  for (int64_t row = 0; random->popularity && row < n_rows; row++)
    for (int64_t i = 0; i < width; i++)
      out[row * width + i] *= random->popularity[i];
}

void bench_cut_bf16(const float *in, int64_t n, uint16_t *out) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, in + i, sizeof bits);
    out[i] = (uint16_t)(bits >> 16);
  }
}

static int32_t feature(const sfa_codes *codes, int64_t i) {
  return codes->head_dim <= 256 ? ((const uint8_t *)codes->ids)[i] : ((const uint16_t *)codes->ids)[i];
}

double bench_mean_overlap(const sfa_codes *q, const sfa_codes *k, bool causal) {
  int64_t *count = calloc((size_t)k->head_dim, sizeof *count); /* rows of k so far that keep a feature */
  int64_t j = 0;
  double shared = 0, pairs = 0;
  for (int64_t i = 0; count && i < q->n_rows; i++) {
    int64_t end = causal ? i + 1 + k->n_rows - q->n_rows : k->n_rows;
    for (; j < end; j++)
      for (int32_t s = 0; s < k->k; s++)
        count[feature(k, j * k->k + s)]++;
    for (int32_t s = 0; s < q->k; s++)
      shared += (double)count[feature(q, i * q->k + s)];
    pairs += (double)(end > 0 ? end : 0);
  }
  free(count);
  return pairs > 0 ? shared / pairs : 0;
}
