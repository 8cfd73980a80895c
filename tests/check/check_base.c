/* Cases, numbers, guarded memory and comparisons of the checks. */
#include "base/half.h"
#include "check.h"
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- Cases ---- */

void check_begin(check *c, const char *subject, const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(c->text, sizeof c->text, format, args);
  va_end(args);
  c->subject = subject;
  c->failed = false;
}

void check_end(check *c) {
  for (int i = 0; i < c->n_buffers; i++)
    munmap(c->buffers[i].base, c->buffers[i].bytes);
  c->n_buffers = 0;
  if (c->failed && c->escape)
    longjmp(*c->escape, 1);
  if (c->failed)
    c->n_failed++;
  else
    c->n_passed++;
}

void check_fail(check *c, const char *format, ...) {
  if (!c->failed && !c->quiet) {
    va_list args;
    va_start(args, format);
    printf("FAIL %s %s [%s]: ", sfa_isa_name(c->kernels->isa), c->subject, c->text);
    vprintf(format, args);
    printf("\n");
    va_end(args);
  }
  c->failed = true;
}

/* ---- Numbers ---- */

int check_pick(check *c, int n) { return (int)(sfa_rng_next(&c->rng) % (uint64_t)n); }
int check_range(check *c, int first, int last) { return first + check_pick(c, last - first + 1); }
float check_normal(check *c) { return (float)sfa_rng_normal(&c->rng); }

const char *check_kind_name(check_kind kind) {
  static const char *const names[CHECK_KINDS] = {"normal", "ties", "zeros", "denormal", "wide", "inf", "nan"};
  return names[kind];
}

static float draw(check *c, check_kind kind) {
  uint32_t sign = (uint32_t)check_pick(c, 2) << 31;
  switch (kind) {
  case CHECK_TIES: return (float)check_range(c, -3, 3);
  case CHECK_ZEROS: return check_pick(c, 8) ? sfa_float_of(sign) : check_normal(c);
  case CHECK_DENORMAL: return sfa_float_of(sign | (uint32_t)check_pick(c, 1 << 23));
  case CHECK_WIDE: return ldexpf(check_normal(c), check_range(c, -30, 12));
  case CHECK_INF: return check_pick(c, 16) ? check_normal(c) : sfa_float_of(sign | 0x7f800000u);
  case CHECK_NAN: return check_pick(c, 16) ? check_normal(c) : sfa_float_of(sign | 0x7f800001u | (uint32_t)check_pick(c, 1 << 23));
  default: return check_normal(c);
  }
}

void check_fill(check *c, check_kind kind, float *x, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    x[i] = draw(c, kind);
}

/* ---- Memory ---- */

void *check_memory(check *c, size_t bytes) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE), body = (bytes + page) / page * page;
  char *base = mmap(NULL, body + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED || mprotect(base + page, body, PROT_READ | PROT_WRITE) || c->n_buffers == CHECK_MAX_BUFFERS) {
    fprintf(stderr, "sfa_check: out of memory or buffers (%zu bytes)\n", bytes);
    exit(1);
  }
  c->buffers[c->n_buffers].base = base;
  c->buffers[c->n_buffers++].bytes = body + 2 * page;
  memset(base + page, 0xff, body);
  return check_pick(c, 2) ? base + page : base + page + body - bytes;
}

float *check_floats(check *c, int64_t n) { return check_memory(c, (size_t)n * sizeof(float)); }

float *check_rows(check *c, check_kind kind, int64_t n) {
  float *x = check_floats(c, n);
  check_fill(c, kind, x, n);
  return x;
}

/* ---- Comparisons ---- */

void check_bytes(check *c, const char *what, const void *got, const void *expected, size_t bytes) {
  const unsigned char *a = got, *b = expected;
  for (size_t i = 0; i < bytes; i++)
    if (a[i] != b[i]) {
      check_fail(c, "%s: byte %zu of %zu is %u, must be %u", what, i, bytes, a[i], b[i]);
      return;
    }
}

void check_bits(check *c, const char *what, const float *got, const float *expected, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if (sfa_bits_of(got[i]) != sfa_bits_of(expected[i]) && !(isnan(got[i]) && isnan(expected[i]))) {
      check_fail(c, "%s: element %lld of %lld is %.9g (%08x), must be %.9g (%08x)", what, (long long)i, (long long)n, (double)got[i],
                 sfa_bits_of(got[i]), (double)expected[i], sfa_bits_of(expected[i]));
      return;
    }
}

void check_errors_add(check_errors *errors, double got, double naive, double truth) {
  double error = fabs(got - truth), naive_error = fabs(naive - truth);
  if (!(error <= errors->largest)) /* a NaN stays */
    errors->largest = error;
  if (naive_error > errors->naive_largest)
    errors->naive_largest = naive_error;
  errors->squares += error * error;
  errors->naive_squares += naive_error * naive_error;
  errors->scale = fmax(errors->scale, fabs(truth));
  errors->n++;
}

void check_errors_judge(check *c, const char *what, const check_errors *errors, double slack) {
  double ulp = errors->scale > 0 ? ldexp(1, ilogb(errors->scale) - 23) : 0x1p-149;
  double limit = 2 * errors->naive_largest + (errors->n < 64 ? 8 : slack) * ulp;
  if (!(errors->largest <= limit))
    check_fail(c, "%s: largest error %.3g, allowed %.3g (naive f32 %.3g, ulp %.3g)", what, errors->largest, limit, errors->naive_largest,
               ulp);
  if (errors->n < 64)
    return;
  double rms = sqrt(errors->squares / (double)errors->n), naive = sqrt(errors->naive_squares / (double)errors->n);
  if (!(rms <= 2 * naive + 0.5 * ulp))
    check_fail(c, "%s: RMS error %.3g, naive f32 %.3g", what, rms, naive);
}
