/* Joining two partial results over disjoint sets of keys. */
#include "attn/attn.h"

#include <math.h>

enum { MERGE_ROWS = 64 };

typedef struct merge_job {
  const sfa_kernels *kernels;
  int64_t n_rows;
  int32_t E;
  float *out_a, *lse_a;
  const float *out_b, *lse_b;
} merge_job;

/* A finished row is a state with l = 1 and m = lse. */
static void merge_item(void *arg, int64_t item, int32_t thread) {
  (void)thread;
  const merge_job *job = arg;
  int64_t first = item * MERGE_ROWS, n = sfa_min64(job->n_rows - first, MERGE_ROWS);
  float m_a[MERGE_ROWS], l_a[MERGE_ROWS], m_b[MERGE_ROWS] = {0}, l_b[MERGE_ROWS] = {0};
  for (int64_t i = 0; i < n; i++) {
    m_a[i] = job->lse_a[first + i] * (float)M_LOG2E;
    m_b[i] = job->lse_b[first + i] * (float)M_LOG2E;
    l_a[i] = job->lse_a[first + i] != -INFINITY; /* no keys, no sum */
    l_b[i] = job->lse_b[first + i] != -INFINITY;
  }
  float *out = job->out_a + first * job->E;
  job->kernels->merge((int32_t)n, job->E, m_a, l_a, out, m_b, l_b, job->out_b + first * job->E);
  for (int64_t i = 0; i < n; i++) {
    float divisor = l_a[i] == 0 ? 1 : l_a[i];
    for (int32_t e = 0; e < job->E; e++)
      out[i * job->E + e] /= divisor;
    job->lse_a[first + i] = (float)((double)m_a[i] * M_LN2 + log((double)l_a[i]));
  }
}

sfa_status sfa_attn_merge(sfa_context *ctx, int64_t n_rows, int32_t head_dim_v, float *out_a, float *lse_a, const float *out_b,
                          const float *lse_b) {
  merge_job job = {sfa_kernel_of(ctx->isa), n_rows, head_dim_v, out_a, lse_a, out_b, lse_b};
  sfa_parallel(ctx, (n_rows + MERGE_ROWS - 1) / MERGE_ROWS, merge_item, &job);
  return SFA_OK;
}
