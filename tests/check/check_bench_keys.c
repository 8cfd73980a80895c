/* sfa_check --bench, decode: one query row over many keys, laid tile by tile as the pages of a cache, one thread, d = 128. Beside them a
 * plain read of memory: what no decode can beat by more than its bytes are fewer. All candidates take turns; GB/s are medians, ratios
 * medians of the ratios within a round. */
#include "check.h"
#include "check_bench.h"
#include "kernel/stored_rows.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { D = 128, N_MADE = 64, MAX_ROUNDS = 31 }; /* tiles that are really made; the others repeat them */

/* How a candidate stores keys and values. */
typedef struct layout {
  const char *name;
  sfa_dtype k_dtype;
  int32_t K;         /* 0: dense */
  sfa_dtype v_dtype; /* 0: scores alone */
  int base;          /* the candidate that ratios refer to */
} layout;

static const layout layouts[] = {{"scores, dense bf16", SFA_BF16, 0, 0, 0},
                                 {"scores, dense int8", SFA_I8, 0, 0, 0},
                                 {"scores, k 16 int8", SFA_I8, 16, 0, 0},
                                 {"scores, k 8 int8", SFA_I8, 8, 0, 0},
                                 {"scores, k 16 bf16", SFA_BF16, 16, 0, 0},
                                 {"step, dense bf16, V bf16", SFA_BF16, 0, SFA_BF16, 5},
                                 {"step, dense int8, V int8", SFA_I8, 0, SFA_I8, 5},
                                 {"step, k 16 int8, V bf16", SFA_I8, 16, SFA_BF16, 5},
                                 {"step, k 16 int8, V int8", SFA_I8, 16, SFA_I8, 5},
                                 {"step, k 16 int8, V int4", SFA_I8, 16, SFA_I4, 5},
                                 {"step, k 8 int8, V int8", SFA_I8, 8, SFA_I8, 5}};
enum { N_LAYOUTS = sizeof layouts / sizeof *layouts };

static size_t aligned(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

typedef struct tiles {
  layout how;
  size_t k_values, k_scales, v_values, v_scales, tile_bytes; /* from a tile's start; ids are first */
  int64_t n;
  unsigned char *memory;
} tiles;

static void rows_of(const tiles *t, int64_t tile, sfa_stored_rows *keys, sfa_stored_rows *values) {
  const unsigned char *p = t->memory + (size_t)tile * t->tile_bytes;
  const int32_t width = t->how.K ? t->how.K : D;
  *keys = (sfa_stored_rows){SFA_KEY_TILE, width, t->how.k_dtype, t->how.K ? p : NULL, p + t->k_values, width, width, NULL, 1, NULL, 0};
  keys->scales = t->how.k_dtype == SFA_I8 ? (const uint16_t *)(const void *)(p + t->k_scales) : NULL;
  *values = (sfa_stored_rows){SFA_KEY_TILE, D, t->how.v_dtype, NULL, p + t->v_values, D, D, NULL, 1, NULL, 0};
  values->scales = t->how.v_dtype == SFA_I8 || t->how.v_dtype == SFA_I4 ? (const uint16_t *)(const void *)(p + t->v_scales) : NULL;
}

static void encode(const sfa_kernels *kernels, sfa_dtype dtype, int32_t width, const float *x, void *values, void *scales) {
  if (dtype == SFA_I8)
    kernels->quantize_i8(SFA_KEY_TILE, width, x, width, values, width, scales);
  else if (dtype == SFA_I4)
    kernels->quantize_i4(SFA_KEY_TILE, width, x, width, values, width, scales);
  else if (dtype)
    kernels->store_rows(SFA_KEY_TILE, width, x, width, dtype, values, width);
}

static void tiles_create(tiles *t, const sfa_kernels *kernels, const layout *how, int64_t n) {
  const size_t width = (size_t)(how->K ? how->K : D);
  t->how = *how;
  t->n = n;
  t->k_values = aligned((size_t)how->K * SFA_KEY_TILE);
  t->k_scales = t->k_values + aligned(sfa_stored_bytes(how->k_dtype, (int64_t)width * SFA_KEY_TILE));
  t->v_values = t->k_scales + (how->k_dtype == SFA_I8 ? SFA_KEY_TILE * 2 : 0);
  t->v_scales = t->v_values + (how->v_dtype ? sfa_stored_bytes(how->v_dtype, D * SFA_KEY_TILE) : 0);
  t->tile_bytes = t->v_scales + (how->v_dtype == SFA_I8 || how->v_dtype == SFA_I4 ? SFA_KEY_TILE * 2 : 0);
  t->memory = check_block((size_t)n * t->tile_bytes);
  sfa_rng rng = {1};
  float *x = check_block(SFA_KEY_TILE * D * sizeof *x), *kept = check_block(SFA_KEY_TILE * D * sizeof *kept);
  for (int64_t tile = 0; tile < n; tile++) {
    unsigned char *p = t->memory + (size_t)tile * t->tile_bytes;
    if (tile >= N_MADE) {
      memcpy(p, t->memory + (size_t)(tile % N_MADE) * t->tile_bytes, t->tile_bytes);
      continue;
    }
    for (int i = 0; i < SFA_KEY_TILE * D; i++)
      x[i] = (float)sfa_rng_normal(&rng);
    if (how->K)
      kernels->topk(SFA_KEY_TILE, x, D, D, how->K, p, kept);
    encode(kernels, how->k_dtype, (int32_t)width, how->K ? kept : x, p + t->k_values, p + t->k_scales);
    encode(kernels, how->v_dtype, D, x, p + t->v_values, p + t->v_scales);
  }
  free(x);
  free(kept);
}

/* One decode step, or its scores alone. */
static float step(const sfa_kernels *kernels, const tiles *t, const float *q, void *table) {
  _Alignas(64) float S[SFA_KEY_TILE], O[D] = {0};
  float rounded[D], size, m = -INFINITY, l = 0, alpha, seen = 0;
  const float query_scale = 1.442695f / sqrtf((float)D);
  for (int u = 0; u < D; u++)
    rounded[u] = t->how.k_dtype == SFA_I8 ? q[u] : q[u] * query_scale;
  if (t->how.k_dtype == SFA_I8)
    kernels->round_rows(1, D, t->how.K ? t->how.K : D, rounded, D, &size);
  kernels->query_table(1, D, rounded, D, t->how.k_dtype == SFA_I8 ? &size : NULL, table);
  for (int64_t tile = 0; tile < t->n; tile++) {
    sfa_stored_rows keys, values;
    rows_of(t, tile, &keys, &values);
    if (tile + 1 < t->n) { /* as attention does */
      sfa_stored_rows next, next_values;
      rows_of(t, tile + 1, &next, &next_values);
      keys.next = keys.ids ? (const unsigned char *)keys.ids + SFA_AHEAD_BYTES : next.values;
      keys.next_bytes = (int64_t)(keys.ids ? t->v_values : sfa_stored_bytes(keys.dtype, (int64_t)SFA_KEY_TILE * keys.width));
      values.next = keys.ids ? next.ids : next_values.values;
      values.next_bytes = SFA_AHEAD_BYTES;
    }
    kernels->score_keys(&keys, 1, D, table, query_scale, S);
    if (!t->how.v_dtype) {
      seen += S[tile % SFA_KEY_TILE];
      continue;
    }
    if (kernels->softmax_keys(1, SFA_KEY_TILE, S, &m, &l, &alpha))
      kernels->rescale(1, D, &alpha, O);
    kernels->value_keys(&values, 1, S, D, O);
  }
  return seen + l + O[0];
}

/* Every line of memory, several streams of loads in flight. */
static float read_all(const unsigned char *memory, size_t bytes) {
  const uint64_t *p = (const uint64_t *)(const void *)memory;
  uint64_t sum[8] = {0};
  for (size_t i = 0; i < bytes / 8; i += 8)
    for (int a = 0; a < 8; a++)
      sum[a] += p[i + (size_t)a];
  return (float)(sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7]);
}

void check_bench_keys(const sfa_kernels *kernels, int64_t n_keys, int n_rounds) {
  static double ms[N_LAYOUTS + 1][MAX_ROUNDS], ratios[MAX_ROUNDS];
  tiles all[N_LAYOUTS];
  float q[D];
  sfa_rng rng = {2};
  for (int u = 0; u < D; u++)
    q[u] = (float)sfa_rng_normal(&rng);
  void *table = check_block(sfa_query_table_bytes(D));
  for (int i = 0; i < N_LAYOUTS; i++)
    tiles_create(&all[i], kernels, &layouts[i], n_keys / SFA_KEY_TILE);
  volatile float sink = 0;
  const size_t read_bytes = (size_t)all[0].n * all[0].tile_bytes;
  for (int round = 0; round < n_rounds; round++)
    for (int i = 0; i <= N_LAYOUTS; i++) {
      const double start = check_clock_ms();
      sink += i < N_LAYOUTS ? step(kernels, &all[i], q, table) : read_all(all[0].memory, read_bytes);
      ms[i][round] = check_clock_ms() - start;
    }
  printf("\n%s, decode, one query over %lld keys, D = E = %d\n", sfa_isa_name(kernels->isa), (long long)n_keys, D);
  printf("  %-26s %8s %8s %8s %10s %12s\n", "", "ms", "ns/key", "GB/s", "of read", "against bf16");
  const double read_speed = (double)read_bytes / check_median(ms[N_LAYOUTS], n_rounds);
  for (int i = 0; i <= N_LAYOUTS; i++) {
    const int base = i < N_LAYOUTS ? layouts[i].base : 0;
    const double bytes = i < N_LAYOUTS ? (double)all[i].n * (double)all[i].tile_bytes : (double)read_bytes;
    double sorted[MAX_ROUNDS];
    for (int round = 0; round < n_rounds; round++)
      ratios[round] = ms[base][round] / ms[i][round];
    memcpy(sorted, ms[i], sizeof sorted);
    const double time = check_median(sorted, n_rounds);
    printf("  %-26s %8.2f %8.2f %8.2f %9.0f%% %12.2f\n", i < N_LAYOUTS ? layouts[i].name : "plain read", time, time * 1e6 / (double)n_keys,
           bytes / time * 1e-6, 100 * bytes / time / read_speed, check_median(ratios, n_rounds));
  }
  for (int i = 0; i < N_LAYOUTS; i++)
    free(all[i].memory);
  free(table);
}
