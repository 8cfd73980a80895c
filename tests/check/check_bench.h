/* check_bench.h: what the files of sfa_check --bench share. */
#ifndef SFA_CHECK_BENCH_H
#define SFA_CHECK_BENCH_H

#include "base/context.h"
#include "kernel/kernel.h"
#include <stddef.h>

/* Processor time of the calling thread. */
double check_clock_ms(void);
/* Of n numbers, which it sorts. */
double check_median(double *x, int n);
/* Zeroed memory from a page's start, for free(); ends the program if there is none. */
void *check_block(size_t bytes);
/* Ends the program with the context's text where a call failed. */
void check_must(sfa_context *ctx, sfa_status status);

/* Parts of --bench. */
void check_bench_keys(const sfa_kernels *kernels, int64_t n_keys, int n_rounds);

#endif
