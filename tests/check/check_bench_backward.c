/* sfa_check --bench-backward: gradients over codes beside their dense twin, one head, causal and not, on one thread and on two; and what
 * share of the processor's multiply-adds the twin uses: 5 products of n x n x D, half of them under a causal mask. On AMX both in 16 bits
 * as well, on one thread and on sixteen. */
#include "check.h"
#include "check_bench.h"
#include <math.h>
#include <sfa/backward.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { K = 16, MAX_ROUNDS = 31 };

/* Of the others' times against the first's. */
static const struct {
  const char *name;
  int kept;
  bool half;
} candidates[] = {{"dense", 0, false}, {"k 16", K, false}, {"dense, 16 bits", 0, true}, {"k 16, 16 bits", K, true}};
enum { N_CANDIDATES = 4, N_F32 = 2 };

typedef struct grad_bench {
  sfa_context *ctx;
  sfa_attention_plan *plan;
  sfa_attention_args forward;
  sfa_attention_grad_args args;
  float *rows[8]; /* q, k, v, out, d_out, d_q, d_k, d_v */
} grad_bench;

static void bench_create(grad_bench *b, sfa_isa isa, int n_threads, int n, int D, int candidate, int causal) {
  const sfa_context_options context = {.struct_size = sizeof context, .n_threads = n_threads, .isa = isa};
  *b = (grad_bench){.ctx = NULL};
  check_must(NULL, sfa_context_create(&context, &b->ctx));
  const sfa_attention_options options = {.struct_size = sizeof options,
                                         .n_heads = 1,
                                         .head_dim = D,
                                         .max_seqlen_q = n,
                                         .max_seqlen_k = n,
                                         .k_q = candidates[candidate].kept,
                                         .k_k = candidates[candidate].kept,
                                         .causal = causal,
                                         .policy = candidates[candidate].half ? SFA_POLICY_HALF_DENSE : SFA_POLICY_TILES};
  check_must(b->ctx, sfa_attention_plan_create(b->ctx, &options, &b->plan));
  sfa_rng rng = {1};
  for (int i = 0; i < 8; i++) {
    b->rows[i] = check_block((size_t)n * (size_t)D * sizeof(float));
    for (int64_t at = 0; at < (int64_t)n * D && i != 3 && i < 5; at++)
      b->rows[i][at] = (float)sfa_rng_normal(&rng);
  }
  b->forward = (sfa_attention_args){.struct_size = sizeof b->forward, .q.data = b->rows[0], .k.data = b->rows[1], .v.data = b->rows[2]};
  b->forward.out = b->rows[3];
  b->forward.lse = check_block((size_t)n * sizeof(float));
  b->forward.workspace = check_block(sfa_attention_workspace_bytes(b->plan));
  check_must(b->ctx, sfa_attention_run(b->plan, &b->forward));
  b->args = (sfa_attention_grad_args){.struct_size = sizeof b->args, .forward = &b->forward, .d_out = b->rows[4]};
  b->args.d_q = b->rows[5];
  b->args.d_k = b->rows[6];
  b->args.d_v = b->rows[7];
  b->args.workspace = check_block(sfa_attention_backward_workspace_bytes(b->plan));
}

static void bench_destroy(grad_bench *b) {
  for (int i = 0; i < 8; i++)
    free(b->rows[i]);
  free(b->forward.lse);
  free(b->forward.workspace);
  free(b->args.workspace);
  sfa_attention_plan_destroy(b->plan);
  sfa_context_destroy(b->ctx);
}

/* ---- The processor's multiply-adds a millisecond, of one thread ---- */

#if defined(__x86_64__)
enum { PEAK_STEPS = 100000, PEAK_CHAINS = 12 };

__attribute__((target("avx512f"))) static float spin_avx512(void) {
  __m512 sum[PEAK_CHAINS], x = _mm512_set1_ps(0.5f);
  for (int c = 0; c < PEAK_CHAINS; c++)
    sum[c] = _mm512_set1_ps((float)c);
  for (int i = 0; i < PEAK_STEPS; i++)
#pragma GCC unroll 12
    for (int c = 0; c < PEAK_CHAINS; c++)
      sum[c] = _mm512_fmadd_ps(sum[c], x, x);
  for (int c = 1; c < PEAK_CHAINS; c++)
    sum[0] = _mm512_add_ps(sum[0], sum[c]);
  return _mm512_cvtss_f32(sum[0]);
}

__attribute__((target("avx2,fma"))) static float spin_avx2(void) {
  __m256 sum[PEAK_CHAINS], x = _mm256_set1_ps(0.5f);
  for (int c = 0; c < PEAK_CHAINS; c++)
    sum[c] = _mm256_set1_ps((float)c);
  for (int i = 0; i < PEAK_STEPS; i++)
#pragma GCC unroll 12
    for (int c = 0; c < PEAK_CHAINS; c++)
      sum[c] = _mm256_fmadd_ps(sum[c], x, x);
  for (int c = 1; c < PEAK_CHAINS; c++)
    sum[0] = _mm256_add_ps(sum[0], sum[c]);
  return _mm256_cvtss_f32(sum[0]);
}

static double peak(sfa_isa isa) {
  static volatile float kept;
  const double start = check_clock_ms();
  kept = isa >= SFA_ISA_AVX512 ? spin_avx512() : spin_avx2();
  const double ms = check_clock_ms() - start;
  (void)kept;
  return (double)PEAK_STEPS * PEAK_CHAINS * (isa >= SFA_ISA_AVX512 ? 16 : 8) / ms;
}
#else
static double peak(sfa_isa isa) {
  (void)isa;
  return NAN;
}
#endif

static void bench_shape(sfa_isa isa, int n_threads, int n, int D, int causal, int n_rounds) {
  const int n_candidates = isa == SFA_ISA_AMX ? N_CANDIDATES : N_F32;
  grad_bench benches[N_CANDIDATES];
  double ms[N_CANDIDATES][MAX_ROUNDS], ratios[N_CANDIDATES][MAX_ROUNDS], shares[MAX_ROUNDS];
  for (int c = 0; c < n_candidates; c++)
    bench_create(&benches[c], isa, n_threads, n, D, c, causal);
  for (int round = -1; round < n_rounds; round++) {
    const double per_ms = peak(isa);
    for (int c = 0; c < n_candidates; c++) {
      const double start = n_threads > 1 ? (double)sfa_now_ns() * 1e-6 : check_clock_ms();
      check_must(benches[c].ctx, sfa_attention_backward(benches[c].plan, &benches[c].args));
      if (round < 0) /* the first one warms up */
        continue;
      ms[c][round] = (n_threads > 1 ? (double)sfa_now_ns() * 1e-6 : check_clock_ms()) - start;
      ratios[c][round] = ms[0][round] / ms[c][round];
      shares[round] = 100 * 5.0 * n * n * D / (1 + causal) / ms[0][round] / (per_ms * n_threads);
    }
  }
  printf("%-6s d %3d n %5d%s %d thread%s backward: dense %7.2f ms, %.0f %% of the multiply-adds", sfa_isa_name(isa), D, n,
         causal ? " causal" : "", n_threads, n_threads > 1 ? "s" : "", check_median(ms[0], n_rounds), check_median(shares, n_rounds));
  for (int c = 1; c < n_candidates; c++)
    printf("   %s %7.2f ms, ratio %.2f", candidates[c].name, check_median(ms[c], n_rounds), check_median(ratios[c], n_rounds));
  printf("\n");
  fflush(stdout);
  for (int c = 0; c < n_candidates; c++)
    bench_destroy(&benches[c]);
}

int check_bench_backward(const char *isa_name, bool quick) {
  const int n_rounds = quick ? 5 : 15;
  for (sfa_isa isa = SFA_ISA_AMX; isa >= SFA_ISA_AVX2; isa--) {
    if (!sfa_kernel_select(isa) || (isa_name && strcmp(isa_name, sfa_isa_name(isa))))
      continue;
    const int most = isa == SFA_ISA_AMX ? 16 : 2;
    for (int n_threads = 1; n_threads <= most; n_threads += most - 1)
      for (int causal = 0; causal < 2; causal++)
        for (int D = 128; D >= 64; D /= 2)
          bench_shape(isa, n_threads, 2048, D, causal, n_rounds);
    for (int n_threads = 1; n_threads <= most; n_threads += most - 1)
      bench_shape(isa, n_threads, 4096, 128, 1, n_rounds);
  }
  return 0;
}
