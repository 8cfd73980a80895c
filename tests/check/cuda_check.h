/* cuda_check.h: what the parts of cuda_check share: the context under test, one on the CPU beside it, arrays in device memory, verdicts. */
#ifndef CUDA_CHECK_H
#define CUDA_CHECK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <sfa/sfa.h>

#include "oracle_call.h"

typedef struct cuda_check {
  sfa_context *gpu, *cpu;
  bool of_hopper; /* tensor cores by all policies, and gradients */
  const char *test;
  int n_checks, n_failures;
} cuda_check;

/* Counts; prints where it is not true, with the test's name. */
bool cuda_expect(cuda_check *t, bool good, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* Whether a GPU has the kernels of Hopper. */
bool cuda_has_hopper(sfa_context *ctx);
/* A call that must succeed: else its text is printed. */
bool cuda_ok(cuda_check *t, sfa_context *ctx, sfa_status status, const char *what);

/* ---- Memory ---------------------------------------------------------------------------------------------------------- */

void *host_memory(size_t bytes);
/* Normal numbers; bf16: rounded to that type, so that both types of input hold the same. */
float *host_normals(uint64_t seed, int64_t n, bool bf16);
/* Device memory of `gpu` with a copy of the host's bytes, or all ones bits (NaN) without. */
void *device_of(cuda_check *t, const void *from, size_t bytes);
/* Back to the host: waits. */
void fetch(cuda_check *t, void *to, const void *from, size_t bytes);

/* ---- One call of sfa_attention_run ----------------------------------------------------------------------------------- */

typedef struct cuda_call {
  sfa_attention_options o;
  const int32_t *cu_q, *cu_k; /* host, [B + 1]; NULL: all of the largest length */
  bool bf16, sinks, alibi;    /* type of q, k and v; beside the options */
  bool only_out;              /* lse and dropped are not wanted */
  int64_t gap;                /* elements between tokens */
  uint64_t seed;
  int64_t n_q, n_k;
  float *q, *k, *v; /* host */
  float *sink_logit, *alibi_slopes;
  float *out, *lse, *dropped; /* host, after cuda_call_run */
  double *ref, *ref_lse;      /* the maths in double */
  float *naive;               /* naive code in 16 bits (weights), or with int8 rows */
} cuda_call;

void cuda_call_fill(cuda_call *c);
void cuda_call_free(cuda_call *c);
/* Runs on the GPU and fetches out, lse and dropped; false: refused or failed, which is counted. */
bool cuda_call_run(cuda_check *t, cuda_call *c);
/* The oracle's problem of sequence b; *q0 and *k0 its first tokens. */
oracle_problem cuda_call_problem(const cuda_call *c, int32_t b, int64_t *q0, int64_t *k0);
/* ref, ref_lse and naive. */
void cuda_call_reference(cuda_call *c, bool whole);
/* Error of out [n] against the double reference, in the units of what naive code has: max <= 2 times its max + 2 ulp of f32 of max|ref|,
 * RMS likewise. */
void cuda_expect_close(cuda_check *t, const char *what, int64_t n, const float *out, const double *ref, const float *naive);

/* ---- The tests ------------------------------------------------------------------------------------------------------- */

void cuda_check_devices(cuda_check *t);
void cuda_check_choices(cuda_check *t);
void cuda_check_memory(cuda_check *t);
void cuda_check_select(cuda_check *t);
void cuda_check_attention(cuda_check *t);
void cuda_check_refusals(cuda_check *t);
void cuda_check_codes(cuda_check *t);
void cuda_check_keep(cuda_check *t);
void cuda_check_merge(cuda_check *t);
void cuda_check_needles(cuda_check *t);
void cuda_check_rope(cuda_check *t);
void cuda_check_backward(cuda_check *t);
void cuda_check_cache(cuda_check *t);
void cuda_check_slots(cuda_check *t);
void cuda_check_decode(cuda_check *t);
void cuda_check_long(cuda_check *t);
void cuda_check_graph(cuda_check *t);
void cuda_check_streams(cuda_check *t);
/* In a process of its own, which cuda_lose_gpu is. */
void cuda_check_lost(cuda_check *t);
int cuda_lose_gpu(cuda_check *t);

#endif
