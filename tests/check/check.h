/* check.h: what the checks share: numbers from a seed, memory between guard pages, comparisons, the count of passed and failed. */
#ifndef SFA_CHECK_H
#define SFA_CHECK_H

#include "base/rng.h"
#include "kernel/kernel.h"
#include "kernel/kernel_half.h"
#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>

enum { CHECK_MAX_BUFFERS = 64 };

typedef struct check {
  const sfa_kernels *kernels;   /* under test */
  const sfa_kernels *plain;     /* what they must equal: the scalar table */
  const sfa_half_kernels *half; /* under test, in the group of 16-bit kernels */
  sfa_rng rng;
  uint64_t seed;
  bool quick;
  bool quiet;      /* print no failures: the self-test plants them */
  jmp_buf *escape; /* where the first failure goes instead of being counted; NULL: nowhere */
  int64_t n_passed, n_failed;

  /* Of the case that runs now. */
  const char *subject;
  char text[240];
  bool failed;
  struct {
    void *base;
    size_t bytes;
  } buffers[CHECK_MAX_BUFFERS];
  int n_buffers;
} check;

typedef void (*check_fn)(check *c);

/* ---- Cases ---- */

/* A case begins with its parameters as text and ends with one more passed or failed; guarded memory goes with it. */
void check_begin(check *c, const char *subject, const char *format, ...) __attribute__((format(printf, 3, 4)));
void check_end(check *c);
/* The running case fails, with a reason. Only the first reason of a case is printed. */
void check_fail(check *c, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- Numbers ---- */

int check_pick(check *c, int n);                /* 0 .. n - 1 */
int check_range(check *c, int first, int last); /* both inclusive */
float check_normal(check *c);

/* Kinds of rows that a kernel may meet. */
typedef enum check_kind { CHECK_NORMAL, CHECK_TIES, CHECK_ZEROS, CHECK_DENORMAL, CHECK_WIDE, CHECK_INF, CHECK_NAN, CHECK_KINDS } check_kind;
void check_fill(check *c, check_kind kind, float *x, int64_t n);
const char *check_kind_name(check_kind kind);

/* ---- Memory ---- */

/* Memory that touches an unreadable page at its end or, rounded up to 64 bytes, at its start, filled with 0xff (NaN as f32). */
void *check_memory(check *c, size_t bytes);
float *check_floats(check *c, int64_t n);
/* n floats of a kind. */
float *check_rows(check *c, check_kind kind, int64_t n);

/* ---- Comparisons ---- */

/* Equal bytes. */
void check_bytes(check *c, const char *what, const void *got, const void *expected, size_t bytes);
/* Equal bits, any NaN for any NaN. */
void check_bits(check *c, const char *what, const float *got, const float *expected, int64_t n);

/* Rounded results: errors against the truth beside those of naive code in f32. */
typedef struct check_errors {
  double largest, naive_largest, squares, naive_squares, scale;
  int64_t n;
} check_errors;
void check_errors_add(check_errors *errors, double got, double naive, double truth);
/* Largest error at most twice the naive one plus `slack` (usually 2) ulp of max|truth|; RMS at most twice (plus half an ulp). Fewer
 * than 64 outputs say little: 8 ulp, no RMS. Not-a-number fails. */
void check_errors_judge(check *c, const char *what, const check_errors *errors, double slack);

/* ---- The checks ---- */

typedef struct check_entry {
  const char *name;
  check_fn fn;
} check_entry;

/* Ends with an entry of NULL. One an instruction set: */
extern const check_entry check_codes_entries[], check_scores_entries[], check_values_entries[], check_keys_entries[],
    check_forward_entries[], check_postings_entries[], check_drop_entries[], check_attention_entries[], check_backward_entries[];
/* One a table of 16-bit kernels: */
extern const check_entry check_half_entries[], check_half_backward_entries[];
/* Whole gradients in 16 bits (check_backward.c). */
void check_backward_half(check *c);
/* Plants bugs in a copy of a table; each must be caught. */
void check_selftest(check *c);
/* The 16-bit ways on AMX; nothing on other machines. */
void check_bench_half(bool quick);
int check_bench(const char *isa_name, bool quick);
int check_bench_forms(const char *isa_name, const char *only, bool quick);
int check_bench_backward(const char *isa_name, bool quick);

#endif
