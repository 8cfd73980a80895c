/* The naive maths: selection, storage roundings, masks, attention. */
#include "oracle.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

static uint32_t magnitude_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits & 0x7fffffff;
}

void oracle_topk(const float *x, int d, int k, int *ids) {
  char *taken = calloc((size_t)d, 1);
  for (int n = 0; n < k; n++) {
    int best = -1;
    uint32_t largest = 0;
    for (int u = 0; u < d; u++)
      if (!taken[u] && (best < 0 || magnitude_bits(x[u]) > largest)) {
        best = u;
        largest = magnitude_bits(x[u]);
      }
    taken[best] = 1;
  }
  for (int u = 0, n = 0; u < d; u++)
    if (taken[u])
      ids[n++] = u;
  free(taken);
}

/* x rounded to a binary format of `digits` significant bits, smallest exponent of a normal number `least`, by nearbyint's ties to even. */
static double round_binary(double x, int digits, int least, double limit) {
  if (x == 0 || !isfinite(x))
    return x;
  int exponent = ilogb(x) < least ? least : ilogb(x);
  double step = ldexp(1, exponent - digits + 1), y = nearbyint(x / step) * step;
  return fabs(y) > limit ? copysign(INFINITY, x) : y;
}

static double round_f16(double x) { return round_binary(x, 11, -14, 65504); }
static double round_bf16(double x) { return round_binary(x, 8, -126, 0x1.fep127); }

double oracle_f16(unsigned bits) {
  int exponent = (int)(bits >> 10 & 31), fraction = (int)(bits & 1023);
  double x = exponent == 31 ? (fraction ? NAN : INFINITY) : exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
  return bits >> 15 ? -x : x;
}

double oracle_i8(const float *x, int n, int *values) { return oracle_whole(x, n, 127, values); }

double oracle_whole(const float *x, int n, int most, int *values) {
  double largest = 0, scale;
  int odd = 0;
  for (int i = 0; i < n; i++) {
    odd |= !isfinite(x[i]);
    largest = fmax(largest, fabs((double)x[i]));
    if (values)
      values[i] = 0;
  }
  if (odd)
    return NAN;
  if (largest == 0)
    return 0;
  scale = round_f16(largest / most);
  if (scale * most < largest) /* up */
    scale = round_f16(scale + (scale < 0x1p-14 ? 0x1p-24 : ldexp(1, ilogb(scale) - 10)));
  if (!isfinite(scale))
    return -1;
  for (int i = 0; values && i < n; i++)
    values[i] = (int)nearbyintf(x[i] / (float)scale);
  return scale;
}

double oracle_e4m3(const float *x, int n, double *values) {
  double largest = 0, scale = 0x1p-24;
  int odd = 0;
  for (int i = 0; i < n; i++) {
    odd |= !isfinite(x[i]);
    largest = fmax(largest, fabs((double)x[i]));
    values[i] = 0;
  }
  if (odd || largest == 0)
    return odd ? NAN : 0;
  while (scale * 448 < largest)
    scale *= 2;
  if (scale > 0x1p15)
    return -1;
  for (int i = 0; i < n; i++)
    values[i] = round_binary(x[i] / scale, 4, -6, 448);
  return scale;
}

void oracle_round(float *x, int n, int storage) {
  if (storage == ORACLE_E4M3) {
    double *values = malloc((size_t)n * sizeof *values), scale = oracle_e4m3(x, n, values);
    for (int i = 0; i < n; i++)
      x[i] = (float)(values[i] * scale);
    free(values);
    return;
  }
  if (storage == ORACLE_I8 || storage == ORACLE_I4) {
    int *values = malloc((size_t)n * sizeof *values);
    double scale = oracle_whole(x, n, storage == ORACLE_I8 ? 127 : 7, values);
    for (int i = 0; i < n; i++)
      x[i] = (float)(values[i] * scale);
    free(values);
    return;
  }
  for (int i = 0; i < n; i++)
    x[i] = storage == ORACLE_BF16 ? (float)round_bf16(x[i]) : storage == ORACLE_F16 ? (float)round_f16(x[i]) : x[i];
}

void oracle_round_query(float *x, int n, int n_terms) {
  double most = floor(0x1p24 / (127.0 * (n_terms < 32 ? n_terms : 32))), step = 0x1p-100, largest = 0;
  if (most > 32767)
    most = 32767;
  for (int i = 0; i < n; i++)
    largest = !(fabs((double)x[i]) <= largest) ? fabs((double)x[i]) : largest;
  while (largest / step > most && step < 0x1p100)
    step *= 2;
  for (int i = 0; i < n; i++)
    x[i] = largest < 0x1p100 ? (float)(nearbyint(x[i] / step) * step) : NAN;
}

/* A copy of rows [n][d] as attention reads them: kept features, rounded to the storage type, zeros elsewhere. */
static float *oracle_stored(const float *x, long n, int d, int k, int storage) {
  float *rows = calloc((size_t)n * (size_t)d + 1, sizeof *rows);
  int *ids = malloc((size_t)d * sizeof *ids);
  float *kept = malloc((size_t)d * sizeof *kept);
  if (k == 0)
    k = d;
  for (long row = 0; row < n; row++) {
    if (k < d)
      oracle_topk(x + row * d, d, k, ids);
    for (int u = 0; u < d && k == d; u++)
      ids[u] = u;
    for (int u = 0; u < k; u++)
      kept[u] = x[row * d + ids[u]];
    oracle_round(kept, k, storage);
    for (int u = 0; u < k; u++)
      rows[row * d + ids[u]] = kept[u];
  }
  free(ids);
  free(kept);
  return rows;
}

/* The key at which query t stands. */
static long oracle_position(const oracle_problem *problem, long t) {
  return t + problem->n_keys + problem->n_keys_behind - problem->n_queries;
}

int oracle_sees(const oracle_problem *problem, long t, long j) {
  long i = oracle_position(problem, t);
  if (problem->causal && j > i)
    return 0;
  if (!problem->has_window)
    return 1;
  if (problem->window_right >= 0 && j > i + problem->window_right)
    return 0;
  return problem->window_left < 0 || j >= i - problem->window_left || j < problem->n_sink_tokens;
}

/* An operand of a gradient's product as the problem has them: itself, or a bf16 number of units of 1 / short_products. */
static double oracle_operand(const oracle_problem *problem, double x) {
  const double units = problem->short_products;
  return units != 0 ? round_bf16(x * units) / units : x;
}

static void oracle_operands(const oracle_problem *problem, float *x, long n) {
  for (long i = 0; i < n; i++)
    x[i] = (float)oracle_operand(problem, x[i]);
}

#define REAL double
#define NAME(stem) stem##_f64
#define SQRT sqrt
#define TANH tanh
#define EXP exp
#define LOG log
#include "oracle_backward_tmpl.c"
#include "oracle_tmpl.c"
#undef REAL
#undef NAME
#undef SQRT
#undef TANH
#undef EXP
#undef LOG

#define REAL float
#define NAME(stem) stem##_f32
#define SQRT sqrtf
#define TANH tanhf
#define EXP expf
#define LOG logf
#include "oracle_backward_tmpl.c"
#include "oracle_tmpl.c"
