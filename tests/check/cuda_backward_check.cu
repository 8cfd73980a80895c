/* cuda_backward_check: sfa_cuda_backward_run against gradients in double (oracle.h) over shapes, masks, supports and types.
 *
 * Each case draws rows (random normal, the k largest features of q and k kept, rounded to bf16), runs three times and compares the bits,
 * then every gradient with the reference: ||got - ref|| / ||ref||, and exactly 0 outside of the supports. Outputs and workspace are NaN
 * before. A line a case; the last says how many failed. Exit status 77 without a Hopper GPU, 1 if a case failed. Arguments: the first and
 * the last case to check, of all. */
extern "C" {
#include "base/half.h"
#include "oracle.h"
}
#include "cuda/cuda_stages.h"
#include "cuda_check_tools.cuh"

#include <string.h>

/* ---- Cases ----------------------------------------------------------------------------------------------------------- */

typedef struct check_case {
  int dim, dim_v, k; /* k: kept features of q and k, 0: all */
  int heads, kv_heads;
  int B, T, S, ragged; /* ragged: cu_seqlens, some sequences empty or short */
  int causal, left, right, sinks;
  float softcap;
  int alibi, sink_logit, d_lse, bf16; /* bf16: d_out, out and the gradients, else f32 */
} check_case;

static const check_case cases[] = {
    /* dim  v    k   H  G  B  T    S    rag cau left right sinks cap alibi sink dlse bf16 */
    {64, 64, 0, 1, 1, 1, 64, 64, 0, 0, -1, -1, 0, 0, 0, 0, 0, 0},
    {128, 128, 0, 1, 1, 1, 64, 128, 0, 0, -1, -1, 0, 0, 0, 0, 0, 0},
    {256, 256, 0, 1, 1, 1, 64, 64, 0, 0, -1, -1, 0, 0, 0, 0, 0, 0},
    {64, 64, 8, 2, 2, 1, 320, 320, 0, 0, -1, -1, 0, 0, 0, 0, 0, 1},
    {128, 128, 16, 2, 2, 1, 320, 320, 0, 0, -1, -1, 0, 0, 0, 0, 0, 1},
    {256, 256, 16, 2, 2, 1, 320, 320, 0, 0, -1, -1, 0, 0, 0, 0, 0, 1},
    {64, 64, 16, 4, 2, 1, 333, 777, 0, 1, -1, -1, 0, 0, 0, 0, 1, 0},
    {128, 128, 16, 4, 2, 1, 333, 777, 0, 1, -1, -1, 0, 0, 0, 0, 1, 0},
    {256, 256, 16, 4, 1, 1, 133, 277, 0, 1, -1, -1, 0, 0, 0, 0, 1, 0},
    {128, 128, 16, 2, 1, 1, 500, 300, 0, 1, -1, -1, 0, 0, 0, 1, 1, 0},
    {128, 128, 16, 2, 1, 1, 700, 800, 0, 1, 100, -1, 70, 0, 0, 0, 0, 0},
    {64, 64, 16, 2, 1, 1, 900, 900, 0, 0, 130, 40, 300, 0, 0, 1, 0, 0},
    {256, 256, 16, 1, 1, 1, 400, 400, 0, 0, 3, 2, 5, 0, 0, 1, 0, 0},
    {128, 128, 16, 2, 2, 1, 300, 450, 0, 1, -1, -1, 0, 2.5f, 1, 1, 1, 0},
    {64, 64, 16, 2, 2, 1, 300, 450, 0, 0, 100, 50, 70, 1.5f, 0, 1, 1, 0},
    {256, 256, 16, 2, 2, 1, 200, 250, 0, 1, -1, -1, 0, 0, 1, 1, 1, 0},
    {72, 40, 16, 6, 2, 5, 200, 300, 1, 1, -1, -1, 0, 0, 0, 1, 1, 0},
    {40, 136, 8, 3, 3, 4, 257, 513, 1, 0, -1, -1, 0, 0, 0, 0, 0, 1},
    {8, 8, 0, 3, 1, 4, 257, 513, 1, 1, 64, -1, 4, 0, 0, 0, 0, 0},
    {200, 64, 16, 2, 1, 3, 70, 90, 1, 1, -1, -1, 0, 0, 0, 1, 0, 0},
    {128, 128, 16, 2, 1, 1, 0, 150, 0, 0, -1, -1, 0, 0, 0, 1, 0, 0},
    {256, 256, 16, 2, 1, 1, 0, 70, 0, 1, -1, -1, 0, 0, 0, 0, 0, 1},
    {64, 64, 16, 1, 1, 1, 90, 0, 0, 1, -1, -1, 0, 0, 0, 1, 0, 0},
    {256, 256, 16, 2, 1, 1, 900, 900, 0, 1, -1, -1, 0, 0, 0, 0, 0, 1},
    {256, 256, 16, 4, 2, 3, 300, 500, 1, 1, 120, -1, 70, 0, 0, 1, 1, 0},
    {128, 128, 16, 4, 2, 3, 500, 900, 1, 0, 300, 200, 70, 2.0f, 1, 1, 1, 0},
    {128, 128, 16, 1, 1, 1, 2048, 2048, 0, 1, -1, -1, 0, 0, 0, 0, 0, 0},
};

/* ---- Device memory --------------------------------------------------------------------------------------------------- */

static void *on_device(const void *from, size_t bytes) {
  void *memory = NULL;
  CUDA_TRY(cudaMalloc(&memory, bytes + 1));
  if (from)
    CUDA_TRY(cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice));
  else
    CUDA_TRY(cudaMemset(memory, 0xff, bytes)); /* NaN */
  return memory;
}

/* x [n] in a type. */
static void *typed(const float *x, size_t n, sfa_dtype dtype) {
  if (dtype == SFA_F32)
    return on_device(x, 4 * n);
  uint16_t *halves = (uint16_t *)malloc(2 * n + 1);
  for (size_t i = 0; i < n; i++)
    halves[i] = sfa_bf16_from_f32(x[i]);
  void *memory = on_device(halves, 2 * n);
  free(halves);
  return memory;
}

static sfa_cuda_rows rows_of(const float *x, int64_t tokens, int heads, int dim, sfa_dtype dtype) {
  const size_t n = (size_t)(tokens * heads * dim);
  return (sfa_cuda_rows){x ? typed(x, n, dtype) : on_device(NULL, (dtype == SFA_F32 ? 4 : 2) * n), dtype, (int64_t)heads * dim, dim};
}

static void fetch(const sfa_cuda_rows *rows, size_t n, float *out) {
  if (rows->dtype == SFA_F32) {
    CUDA_TRY(cudaMemcpy(out, rows->data, 4 * n, cudaMemcpyDeviceToHost));
    return;
  }
  uint16_t *halves = (uint16_t *)malloc(2 * n + 1);
  CUDA_TRY(cudaMemcpy(halves, rows->data, 2 * n, cudaMemcpyDeviceToHost));
  for (size_t i = 0; i < n; i++)
    out[i] = sfa_f32_from_bf16(halves[i]);
  free(halves);
}

/* ---- A case ---------------------------------------------------------------------------------------------------------- */

static float *draw(size_t n, bool bf16) {
  float *x = (float *)malloc((n + 1) * sizeof *x);
  for (size_t i = 0; i < n; i++)
    x[i] = bf16 ? sfa_f32_from_bf16(sfa_bf16_from_f32(normal())) : normal();
  return x;
}

/* Keeps the k largest of every row [dim], and says which in support [n][ceil(dim / 32)]. */
static uint32_t *keep(float *x, size_t n, int dim, int k) {
  const int words = (dim + 31) / 32;
  uint32_t *support = (uint32_t *)calloc(n * (size_t)words + 1, 4);
  int *ids = (int *)malloc((size_t)dim * sizeof *ids);
  for (size_t row = 0; row < n; row++) {
    oracle_topk(x + row * dim, dim, k ? k : dim, ids);
    for (int i = 0; i < (k ? k : dim); i++)
      support[row * words + ids[i] / 32] |= 1u << ids[i] % 32;
    for (int u = 0; u < dim; u++)
      if (!(support[row * words + u / 32] >> u % 32 & 1))
        x[row * dim + u] = 0;
  }
  free(ids);
  return support;
}

/* 1 if got [n] is further from ref than the limit, or not 0 where a support (rows of dim features, NULL: none) has no bit. */
static int compare(const char *what, const float *got, const double *ref, size_t n, double limit, const uint32_t *support, int dim) {
  double far = 0, all = 0;
  size_t at = 0, n_outside = 0;
  for (size_t i = 0; i < n; i++) {
    const double d = (double)got[i] - ref[i];
    if (!(fabs(d) <= fabs((double)got[at] - ref[at])))
      at = i;
    const size_t row = i / (size_t)dim, u = i % (size_t)dim;
    n_outside += support && !(support[row * (size_t)((dim + 31) / 32) + u / 32] >> u % 32 & 1) && !(got[i] == 0);
    far += d * d;
    all += ref[i] * ref[i];
  }
  const double error = all > 0 ? sqrt(far / all) : sqrt(far);
  printf("  %s %.2e", what, error);
  if (error <= limit && n_outside == 0)
    return 0;
  printf(" (limit %.1e; worst at %zu: %g, expected %g; %zu outside of the support)", limit, at, n ? (double)got[at] : 0, n ? ref[at] : 0,
         n_outside);
  return 1;
}

/* Whether the kept entries written alone, in f32, are those of the rows [n]. */
static bool same_values(const char *what, const sfa_cuda_gradient *gradient, const float *rows, size_t n, const uint32_t *support,
                        int dim) {
  const size_t n_values = n / (size_t)dim * (size_t)gradient->k, n_words = (size_t)((dim + 31) / 32);
  float *values = (float *)malloc((n_values + 1) * 4);
  CUDA_TRY(cudaMemcpy(values, gradient->values, n_values * 4, cudaMemcpyDeviceToHost));
  size_t at = 0, n_wrong = 0;
  for (size_t i = 0; i < n; i++) {
    const int u = (int)(i % (size_t)dim);
    if (support && !(support[i / (size_t)dim * n_words + (size_t)(u / 32)] >> u % 32 & 1))
      continue;
    const float value = gradient->rows.dtype == SFA_F32 ? values[at] : sfa_f32_from_bf16(sfa_bf16_from_f32(values[at]));
    n_wrong += !(value == rows[i]);
    at++;
  }
  free(values);
  if (n_wrong || at != n_values)
    printf(" %s: %zu of %zu kept entries are not those of the rows, of which %zu are kept", what, n_wrong, n_values, at);
  return !n_wrong && at == n_values;
}

static int run_case(const check_case *c, int number) {
  const int H = c->heads, G = c->kv_heads, D = c->dim, E = c->dim_v, B = c->B;
  const sfa_dtype dtype = c->bf16 ? SFA_BF16 : SFA_F32;
  int32_t cu_q[17] = {0}, cu_k[17] = {0};
  for (int b = 0; b < B; b++) {
    cu_q[b + 1] = cu_q[b] + (b == 0 || !c->ragged ? c->T : (int32_t)(next_bits() % (uint32_t)c->T) * (b != 2));
    cu_k[b + 1] = cu_k[b] + (b == 0 || !c->ragged ? c->S : (int32_t)(next_bits() % (uint32_t)c->S) * (b != 1));
  }
  const int64_t T = cu_q[B], S = cu_k[B];
  const size_t n_q = (size_t)(T * H * D), n_k = (size_t)(S * G * D), n_v = (size_t)(S * G * E), n_out = (size_t)(T * H * E),
               n_lse = (size_t)(T * H);
  float *q = draw(n_q, true), *k = draw(n_k, true), *v = draw(n_v, true), *d_out = draw(n_out, c->bf16), *d_lse = draw(n_lse, false);
  float *sink = draw((size_t)H, false), *slopes = draw((size_t)H, false);
  for (int h = 0; h < H; h++)
    slopes[h] = 0.1f * fabsf(slopes[h]);
  uint32_t *q_support = keep(q, (size_t)(T * H), D, c->k), *k_support = keep(k, (size_t)(S * G), D, c->k);
  const float scale = (c->k ? 2.0f : 1.0f) / sqrtf((float)D);

  double *out = (double *)calloc(n_out + 1, 8), *lse = (double *)calloc(n_lse + 1, 8), *sink_sum = (double *)calloc((size_t)H, 8);
  oracle_grad_f64 ref = {(double *)calloc(n_q + 1, 8), (double *)calloc(n_k + 1, 8), (double *)calloc(n_v + 1, 8),
                         (double *)calloc((size_t)H, 8)};
  for (int b = 0; b < B; b++) {
    const int64_t t = cu_q[b], s = cu_k[b];
    oracle_problem p;
    memset(&p, 0, sizeof p);
    p.n_queries = cu_q[b + 1] - cu_q[b], p.n_keys = cu_k[b + 1] - cu_k[b];
    p.n_heads = H, p.n_kv_heads = G, p.head_dim = D, p.head_dim_v = E, p.k_q = p.k_k = c->k;
    p.k_storage = p.v_storage = ORACLE_F32;
    p.softmax_scale = (double)scale, p.softcap = (double)c->softcap, p.causal = c->causal;
    p.has_window = c->left >= 0 || c->right >= 0, p.window_left = c->left, p.window_right = c->right, p.n_sink_tokens = c->sinks;
    p.sink_logit = c->sink_logit ? sink : NULL, p.alibi_slopes = c->alibi ? slopes : NULL;
    p.q = q + t * H * D, p.k = k + s * G * D, p.v = v + s * G * E;
    oracle_attention_f64(&p, out + t * H * E, lse + t * H);
    oracle_grad_f64 grad = {ref.q + t * H * D, ref.k + s * G * D, ref.v + s * G * E, ref.sink_logit};
    oracle_backward_f64(&p, d_out + t * H * E, c->d_lse ? d_lse + t * H : NULL, &grad);
    for (int h = 0; h < H; h++)
      sink_sum[h] += ref.sink_logit[h];
  }
  float *out_f32 = (float *)malloc((n_out + 1) * 4), *lse_f32 = (float *)malloc((n_lse + 1) * 4);
  for (size_t i = 0; i < n_out; i++)
    out_f32[i] = (float)out[i];
  for (size_t i = 0; i < n_lse; i++)
    lse_f32[i] = (float)lse[i];

  sfa_cuda_backward a;
  memset(&a, 0, sizeof a);
  a.n_heads = H, a.n_kv_heads = G, a.head_dim = D, a.head_dim_v = E;
  a.q_tokens = (sfa_cuda_tokens){B, c->T, c->ragged ? (int32_t *)on_device(cu_q, sizeof cu_q) : NULL, T};
  a.k_tokens = (sfa_cuda_tokens){B, c->S, c->ragged ? (int32_t *)on_device(cu_k, sizeof cu_k) : NULL, S};
  a.q = rows_of(q, T, H, D, SFA_BF16), a.k = rows_of(k, S, G, D, SFA_BF16), a.v = rows_of(v, S, G, E, SFA_BF16);
  a.out = rows_of(out_f32, T, H, E, dtype), a.d_out = rows_of(d_out, T, H, E, dtype);
  a.lse = (float *)on_device(lse_f32, 4 * n_lse), a.d_lse = c->d_lse ? (float *)on_device(d_lse, 4 * n_lse) : NULL;
  a.scores = (sfa_cuda_scores){scale, c->softcap, c->causal, c->left, c->right, c->sinks, NULL, NULL};
  a.scores.sink_logit = c->sink_logit ? (float *)on_device(sink, 4 * (size_t)H) : NULL;
  a.scores.alibi_slopes = c->alibi ? (float *)on_device(slopes, 4 * (size_t)H) : NULL;
  a.d_q.rows = rows_of(NULL, T, H, D, dtype), a.d_k.rows = rows_of(NULL, S, G, D, dtype), a.d_v.rows = rows_of(NULL, S, G, E, dtype);
  a.d_q.support = c->k ? (uint32_t *)on_device(q_support, (size_t)(T * H) * (size_t)((D + 31) / 32) * 4) : NULL;
  a.d_k.support = c->k ? (uint32_t *)on_device(k_support, (size_t)(S * G) * (size_t)((D + 31) / 32) * 4) : NULL;
  a.d_q.k = a.d_k.k = c->k ? c->k : D;
  const size_t n_q_values = (size_t)(T * H * a.d_q.k), n_k_values = (size_t)(S * G * a.d_k.k);
  a.d_q.values = (float *)on_device(NULL, 4 * n_q_values), a.d_k.values = (float *)on_device(NULL, 4 * n_k_values);
  a.d_sink_logit = (float *)on_device(NULL, 4 * (size_t)H);
  a.workspace = on_device(NULL, sfa_cuda_backward_workspace_bytes(&a));

  const size_t n_all = n_q + n_k + n_v + (size_t)H;
  float *got = (float *)malloc(n_all * 4), *first = (float *)malloc(n_all * 4);
  int failed = 0;
  printf("%2d  d %3d/%3d k %2d H %d/%d B %d T %4lld S %4lld:", number, D, E, c->k, H, G, B, (long long)T, (long long)S);
  for (int run = 0; run < 3; run++) {
    const char *text = sfa_cuda_backward_run(&a, 0);
    if (text) {
      printf(" refused: %s\n", text);
      return 1;
    }
    CUDA_TRY(cudaDeviceSynchronize());
    fetch(&a.d_q.rows, n_q, got);
    fetch(&a.d_k.rows, n_k, got + n_q);
    fetch(&a.d_v.rows, n_v, got + n_q + n_k);
    CUDA_TRY(cudaMemcpy(got + n_q + n_k + n_v, a.d_sink_logit, 4 * (size_t)H, cudaMemcpyDeviceToHost));
    if (run == 0)
      memcpy(first, got, n_all * 4);
    else if (memcmp(first, got, n_all * 4) != 0) {
      printf(" bits of run %d differ from the first", run);
      failed = 1;
    }
  }
  const double limit = 5e-3; /* P, dS and d_out are rounded to bf16, gradients too where bf16: each 2e-3 */
  failed |= compare("dq", got, ref.q, n_q, limit, q_support, D);
  failed |= compare("dk", got + n_q, ref.k, n_k, limit, k_support, D);
  failed |= compare("dv", got + n_q + n_k, ref.v, n_v, limit, NULL, E);
  failed |= compare("dsink", got + n_q + n_k + n_v, sink_sum, (size_t)H, limit, NULL, H);
  failed |= !same_values("dq", &a.d_q, got, n_q, q_support, D) || !same_values("dk", &a.d_k, got + n_q, n_k, k_support, D);
  printf("  %s\n", failed ? "FAILED" : "ok");
  fflush(stdout);
  void *const on_gpu[] = {(void *)a.q_tokens.cu_seqlens,
                          (void *)a.k_tokens.cu_seqlens,
                          a.q.data,
                          a.k.data,
                          a.v.data,
                          a.out.data,
                          a.d_out.data,
                          (void *)a.lse,
                          (void *)a.d_lse,
                          (void *)a.scores.sink_logit,
                          (void *)a.scores.alibi_slopes,
                          (void *)a.d_q.support,
                          (void *)a.d_k.support,
                          a.d_q.rows.data,
                          a.d_k.rows.data,
                          a.d_v.rows.data,
                          a.d_q.values,
                          a.d_k.values,
                          a.d_sink_logit,
                          a.workspace};
  for (size_t i = 0; i < sizeof on_gpu / sizeof *on_gpu; i++)
    CUDA_TRY(cudaFree(on_gpu[i]));
  void *const on_host[] = {q,   k,        v,     d_out, d_lse, sink,           slopes,  q_support, k_support, out,
                           lse, sink_sum, ref.q, ref.k, ref.v, ref.sink_logit, out_f32, lse_f32,   got,       first};
  for (size_t i = 0; i < sizeof on_host / sizeof *on_host; i++)
    free(on_host[i]);
  return failed;
}

int main(int argc, char **argv) {
  int n = 0, major = 0, n_checked = 0, n_failed = 0;
  const int n_cases = (int)(sizeof cases / sizeof *cases), first = argc > 1 ? atoi(argv[1]) : 0,
            last = argc > 2 ? atoi(argv[2]) : n_cases - 1;
  if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0 ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess || major != 9) {
    printf("no Hopper GPU: skipped\n");
    return 77;
  }
  for (int i = 0; i < n_cases; i++)
    if (i >= first && i <= last) {
      n_failed += run_case(&cases[i], i);
      n_checked++;
    }
  printf("%d cases, %d failed\n", n_checked, n_failed);
  return n_failed > 0;
}
