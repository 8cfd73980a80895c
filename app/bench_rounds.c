/* Rounds and medians; words of options that benchmarks share. */
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int compare_doubles(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

double bench_median(const double *values, int n) {
  double sorted[BENCH_MOST_ROUNDS + 1];
  memcpy(sorted, values, (size_t)n * sizeof *values);
  qsort(sorted, (size_t)n, sizeof *sorted, compare_doubles);
  return n % 2 ? sorted[n / 2] : 0.5 * (sorted[n / 2 - 1] + sorted[n / 2]);
}

static const double least_seconds = 0.5, most_seconds = 20;

/* One timed run, after as many untimed ones as fill warm_ms. */
static int run_engine(bench_engine *e, int round, double warm_ms) {
  int status = EXIT_OK;
  for (int left = round ? (int)(warm_ms / e->ms[round - 1]) : 0; left >= 0 && !status; left--) {
    int64_t stage_ns[SFA_STAGE_COUNT] = {0};
    status = e->run(e->arg, &e->ms[round], stage_ns);
    for (int stage = 0; stage < SFA_STAGE_COUNT; stage++)
      e->stage_ms[stage][round] = 1e-6 * (double)stage_ns[stage];
  }
  if (e->rest)
    e->rest(e->arg);
  return status;
}

static int run_round(bench_engine *engines, int n_engines, int round, double warm_ms) {
  for (bench_engine *e = engines; e < engines + n_engines; e++) {
    if (e->lost)
      continue;
    int status = run_engine(e, round, warm_ms);
    if (status && !e->optional)
      return status;
    e->lost = status != EXIT_OK;
  }
  return EXIT_OK;
}

static bench_times summary(const bench_engine *e, const bench_engine *first, int from, int n) {
  double ratio[BENCH_MOST_ROUNDS + 1];
  bench_times t = {.median_ms = bench_median(e->ms + from, n), .least_ms = e->ms[from], .most_ms = e->ms[from]};
  for (int i = 0; i < n; i++) {
    double ms = e->ms[from + i];
    t.least_ms = ms < t.least_ms ? ms : t.least_ms;
    t.most_ms = ms > t.most_ms ? ms : t.most_ms;
    ratio[i] = ms / first->ms[from + i];
  }
  t.times_first = bench_median(ratio, n);
  for (int stage = 0; stage < SFA_STAGE_COUNT; stage++)
    t.stage_ms[stage] = bench_median(e->stage_ms[stage] + from, n);
  return t;
}

int bench_time(bench_engine *engines, int n_engines, int64_t repeats, double warm_ms, bench_times *times, int *n_rounds) {
  double start = seconds_now();
  int n = 0;
  for (bool more = true; more; n++) {
    int status = run_round(engines, n_engines, n, warm_ms);
    if (status)
      return status;
    double passed = seconds_now() - start;
    more = repeats > 0 ? n < repeats : n < BENCH_MOST_ROUNDS && (n < BENCH_LEAST_ROUNDS || passed < least_seconds) && passed < most_seconds;
  }
  int from = n > 1;
  for (int i = 0; i < n_engines; i++)
    if (!engines[i].lost)
      times[i] = summary(&engines[i], &engines[0], from, n - from);
  *n_rounds = n - from;
  return EXIT_OK;
}

/* ---- Words -------------------------------------------------------------------------------------------------------------------------- */

sfa_dtype bench_dtype(int64_t word) {
  static const sfa_dtype dtypes[] = {SFA_F32, SFA_BF16, SFA_F16, SFA_I8, SFA_I4, SFA_E4M3};
  return dtypes[word];
}

const char *bench_dtype_name(sfa_dtype dtype) {
  static const char *const names[] = {"default", "f32", "bf16", "f16", "int8", "int4", "fp8"};
  return names[dtype];
}

int bench_check_isa(sfa_isa isa) {
  if (isa > sfa_isa_best())
    return app_fail("this machine has no %s; its best is %s", sfa_isa_name(isa), sfa_isa_name(sfa_isa_best()));
  return EXIT_OK;
}
