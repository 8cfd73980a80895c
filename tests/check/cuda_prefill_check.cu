/* cuda_prefill_check: prefill by mma.sync, and the paper's way, against attention in double, with every option; then times. Exit status 1
 * if an error is beyond what bf16 weights and rows explain.
 *
 *     cuda_prefill_check [--check-only [FIRST [LAST]] | --time-only]     of 220 cases the FIRST (0) to the LAST; the paper's from 160 on
 */
#include "cuda/cuda_stages.h"
#include "cuda_check_tools.cuh"

#include <cuda_bf16.h>
#include <string.h>

static void *device_memory(size_t bytes, const void *from) { return device_copy(bytes, from, 0xff); } /* NaN */

__device__ double element(const sfa_cuda_rows &rows, const float *scales, int n_heads, int64_t token, int head, int i) {
  const int64_t at = token * rows.token_stride + head * rows.head_stride + i;
  if (rows.dtype == SFA_I8)
    return (double)__bfloat162float(__float2bfloat16((float)((const int8_t *)rows.data)[at] * scales[token * n_heads + head]));
  return (double)__bfloat162float(((const __nv_bfloat16 *)rows.data)[at]);
}

/* One thread a query row and head. out [tokens][H][E], lse [tokens][H], sizes [tokens][H]: the sum of weight times |v|, at its largest. */
__global__ void reference(sfa_cuda_prefill a, double *scores, double *out, double *lse) {
  const int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t T_max = a.q_tokens.max_seqlen;
  if (at >= a.q_tokens.n_sequences * T_max * a.n_heads)
    return;
  const int head = (int)(at % a.n_heads), b = (int)(at / a.n_heads / T_max), kv = head / (a.n_heads / a.n_kv_heads);
  const int64_t t = at / a.n_heads % T_max;
  const int64_t first_q = a.q_tokens.cu_seqlens ? a.q_tokens.cu_seqlens[b] : b * T_max;
  const int64_t first_k = a.k_tokens.cu_seqlens ? a.k_tokens.cu_seqlens[b] : b * a.k_tokens.max_seqlen;
  const int64_t T = a.q_tokens.cu_seqlens ? a.q_tokens.cu_seqlens[b + 1] - first_q : T_max;
  const int64_t S = a.k_tokens.cu_seqlens ? a.k_tokens.cu_seqlens[b + 1] - first_k : a.k_lens ? a.k_lens[b] : a.k_tokens.max_seqlen;
  if (t >= T)
    return;
  const sfa_cuda_scores *s = &a.scores;
  const int64_t i = t + (a.k_ends ? a.k_ends[b] : S) - T;
  double *x = scores + at * a.k_tokens.max_seqlen, most = s->sink_logit ? (double)s->sink_logit[head] : -INFINITY;
  for (int64_t j = 0; j < S; j++) {
    const bool seen = (!s->causal || j <= i) && (s->window_right < 0 || j <= i + s->window_right) &&
                      (s->window_left < 0 || j >= i - s->window_left || j < s->n_sink_tokens);
    double dot = 0;
    for (int d = 0; d < a.head_dim; d++)
      dot += element(a.q, a.q_scales, a.n_heads, first_q + t, head, d) * element(a.k, a.k_scales, a.n_kv_heads, first_k + j, kv, d);
    dot *= s->softmax_scale;
    if (s->softcap > 0)
      dot = s->softcap * tanh(dot / s->softcap);
    if (s->alibi_slopes)
      dot += s->alibi_slopes[head] * (double)(j - i);
    x[j] = seen ? dot : -INFINITY;
    most = fmax(most, x[j]);
  }
  double sum = s->sink_logit ? exp(s->sink_logit[head] - most) : 0;
  for (int64_t j = 0; j < S; j++)
    sum += x[j] = x[j] == -INFINITY ? 0 : exp(x[j] - most);
  const int64_t row = (first_q + t) * a.n_heads + head;
  for (int e = 0; e < a.head_dim_v; e++) {
    double o = 0;
    for (int64_t j = 0; j < S; j++)
      o += x[j] == 0 ? 0 : x[j] * element(a.v, NULL, 0, first_k + j, kv, e);
    out[row * a.head_dim_v + e] = sum == 0 ? 0 : o / sum;
  }
  lse[row] = sum == 0 ? -INFINITY : most + log(sum);
}

/* Random rows; every `zeros`-th feature of a row or so is not 0. */
static void *random_rows(int64_t n, int dim, sfa_dtype dtype, int zeros) {
  uint16_t *rows = (uint16_t *)calloc((size_t)(n * dim), 2);
  for (int64_t i = 0; i < n * dim; i++) {
    float v = (float)(sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform()));
    if (zeros > 1 && next_bits() % zeros)
      v = 0;
    uint32_t bits;
    memcpy(&bits, &v, 4);
    if (dtype == SFA_I8)
      ((int8_t *)rows)[i] = (int8_t)fmaxf(-127, fminf(127, rintf(v * 30)));
    else
      rows[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  void *memory = device_memory((size_t)(n * dim) * 2, rows);
  free(rows);
  return memory;
}

/* Codes of k of each row's features, with values of bf16, and the same as rows of bf16. */
static sfa_codes random_codes(int64_t n, int dim, int k, sfa_dtype dtype, sfa_cuda_rows *rows) {
  uint8_t *ids = (uint8_t *)malloc((size_t)(n * k) + 1);
  float *values = (float *)malloc((size_t)(n * k) * 4 + 4);
  uint16_t *halves = (uint16_t *)malloc((size_t)(n * k) * 2 + 2), *dense = (uint16_t *)calloc((size_t)(n * dim) + 1, 2);
  for (int64_t row = 0; row < n; row++)
    for (int f = 0, u = 0; u < k; f++)
      if ((int)(next_bits() % (uint32_t)(dim - f)) < k - u) { /* each set of k alike */
        uint32_t bits;
        const float v = (float)(3 * uniform() - 1.5);
        memcpy(&bits, &v, 4);
        bits &= 0xffff0000u;
        ids[row * k + u] = (uint8_t)f;
        memcpy(&values[row * k + u], &bits, 4);
        halves[row * k + u] = dense[row * dim + f] = (uint16_t)(bits >> 16);
        u++;
      }
  rows->data = device_memory((size_t)(n * dim) * 2, dense);
  rows->dtype = SFA_BF16;
  sfa_codes codes = {n, dim, k, dtype, device_memory((size_t)(n * k), ids), NULL, NULL};
  codes.values = dtype == SFA_F32 ? device_memory((size_t)(n * k) * 4, values) : device_memory((size_t)(n * k) * 2, halves);
  free(ids), free(values), free(halves), free(dense);
  return codes;
}

static int64_t n_wrong;

/* options: bits as they are read below. */
static void check_case(int n, int D, int E, int H, int G, int B, int T, int S, int options) {
  const int varlen = options & 1, causal = options >> 1 & 1, window = options >> 2 & 1, cap = options >> 3 & 1, alibi = options >> 4 & 1,
            sink = options >> 5 & 1, whole = options >> 6 & 1, bf16_out = options >> 7 & 1, lens = options >> 8 & 1,
            paper = options >> 9 & 1, ends = lens && !varlen && n % 2;
  int32_t cu_q[9] = {0}, cu_k[9] = {0}, k_lens[8], k_ends[8];
  for (int b = 0; b < B; b++) {
    cu_q[b + 1] = cu_q[b] + (b == 1 ? 0 : 1 + (int)(next_bits() % T)), cu_k[b + 1] = cu_k[b] + (b == 2 ? 0 : 1 + (int)(next_bits() % S));
    k_lens[b] = (int)(next_bits() % (S + 1));
    k_ends[b] = k_lens[b] - 40 + (int)(next_bits() % 300);
  }
  const int64_t q_tokens = varlen ? cu_q[B] : B * T, k_tokens = varlen ? cu_k[B] : B * S;
  float logits[64], slopes[64];
  for (int h = 0; h < H; h++)
    logits[h] = (float)uniform() * 2, slopes[h] = (float)uniform() * 0.1f;
  sfa_cuda_prefill a = {};
  const sfa_dtype type = whole ? SFA_I8 : SFA_BF16;
  a.policy = whole ? SFA_POLICY_INT8 : SFA_POLICY_BF16;
  a.n_heads = H, a.n_kv_heads = G, a.head_dim = D, a.head_dim_v = E;
  a.q_tokens.n_sequences = a.k_tokens.n_sequences = B, a.q_tokens.max_seqlen = T, a.k_tokens.max_seqlen = S;
  if (varlen)
    a.q_tokens.cu_seqlens = (int32_t *)device_memory(sizeof cu_q, cu_q),
    a.k_tokens.cu_seqlens = (int32_t *)device_memory(sizeof cu_k, cu_k);
  else if (lens)
    a.k_lens = (int32_t *)device_memory(sizeof k_lens, k_lens);
  if (ends)
    a.k_ends = (int32_t *)device_memory(sizeof k_ends, k_ends);
  a.q = (sfa_cuda_rows){random_rows(q_tokens * H, D, type, 4), type, (int64_t)H * D, D};
  a.k = (sfa_cuda_rows){random_rows(k_tokens * G, D, type, 4), type, (int64_t)G * D, D};
  a.v = (sfa_cuda_rows){random_rows(k_tokens * G, E, SFA_BF16, 1), SFA_BF16, (int64_t)G * E, E};
  if (whole) {
    float *scales = (float *)malloc((size_t)(q_tokens * H + k_tokens * G + 1) * 4);
    for (int64_t i = 0; i < q_tokens * H + k_tokens * G; i++)
      scales[i] = (float)(0.02 + 0.02 * uniform());
    a.q_scales = (float *)device_memory((size_t)(q_tokens * H) * 4, scales);
    a.k_scales = (float *)device_memory((size_t)(k_tokens * G) * 4, scales + q_tokens * H);
    free(scales);
  }
  a.scores.softmax_scale = (float)(2 / sqrt((double)D)), a.scores.softcap = cap ? 3.0f : 0.0f, a.scores.causal = causal;
  a.scores.window_left = window ? 70 : -1, a.scores.window_right = window && !causal ? 20 : -1, a.scores.n_sink_tokens = window ? 5 : 0;
  if (sink)
    a.scores.sink_logit = (float *)device_memory(sizeof logits, logits);
  if (alibi)
    a.scores.alibi_slopes = (float *)device_memory(sizeof slopes, slopes);
  const int64_t n_rows = q_tokens * H;
  a.out = (sfa_cuda_rows){device_memory((size_t)(n_rows * E) * 4, NULL), bf16_out ? SFA_BF16 : SFA_F32, (int64_t)H * E, E};
  a.lse = (float *)device_memory((size_t)n_rows * 4, NULL);
  double *scores = (double *)device_memory((size_t)B * T * H * S * 8, NULL),
         *out_d = (double *)device_memory((size_t)(n_rows * E) * 8, NULL);
  double *lse_d = (double *)device_memory((size_t)n_rows * 8, NULL);
  sfa_cuda_paper p = {};
  if (paper) { /* its values are rounded nowhere */
    cudaFree(a.q.data), cudaFree(a.k.data);
    p.q_codes = random_codes(q_tokens * H, D, 1 + D / 9, n % 2 ? SFA_F32 : SFA_BF16, &a.q);
    p.k_codes = random_codes(k_tokens * G, D, 1 + D / 7, n % 2 ? SFA_F32 : SFA_BF16, &a.k);
    p.shape = a;
    p.workspace = device_memory(sfa_cuda_paper_workspace_bytes(&p), NULL);
  }
  const char *text = paper ? sfa_cuda_paper_run(&p, NULL) : sfa_cuda_prefill_portable_run(&a, NULL);
  if (text)
    printf("case %d: %s\n", n, text), exit(2);
  reference<<<(unsigned)((B * T * H + 127) / 128), 128>>>(a, scores, out_d, lse_d);
  CUDA_TRY(cudaDeviceSynchronize());
  double *want = (double *)malloc((size_t)(n_rows * E) * 8), *want_lse = (double *)malloc((size_t)n_rows * 8);
  float *got = (float *)malloc((size_t)(n_rows * E) * 4), *lse = (float *)malloc((size_t)n_rows * 4);
  CUDA_TRY(cudaMemcpy(want, out_d, (size_t)(n_rows * E) * 8, cudaMemcpyDeviceToHost));
  CUDA_TRY(cudaMemcpy(want_lse, lse_d, (size_t)n_rows * 8, cudaMemcpyDeviceToHost));
  CUDA_TRY(cudaMemcpy(got, a.out.data, (size_t)(n_rows * E) * 4, cudaMemcpyDeviceToHost));
  CUDA_TRY(cudaMemcpy(lse, a.lse, (size_t)n_rows * 4, cudaMemcpyDeviceToHost));
  double error = 0, size = 0, worst = 0, worst_lse = 0;
  int64_t worst_at = 0;
  for (int64_t i = 0; i < n_rows * E; i++) {
    float x = got[i];
    if (bf16_out) {
      const uint32_t bits = (uint32_t)((uint16_t *)got)[i] << 16;
      memcpy(&x, &bits, 4);
    }
    const double off = fabs(x - want[i]);
    error += off * off, size += want[i] * want[i];
    if (!(off <= worst))
      worst = off, worst_at = i;
  }
  for (int64_t i = 0; i < n_rows; i++) {
    const double off = want_lse[i] == -INFINITY ? (lse[i] == -INFINITY ? 0 : INFINITY) : fabs(lse[i] - want_lse[i]);
    if (!(off <= worst_lse))
      worst_lse = off;
  }
  const double relative = sqrt(error / (size + 1e-30));
  if (!(relative <= (bf16_out ? 5e-3 : paper ? 1e-5 : 4e-3)) || !(worst <= 0.05) || !(worst_lse <= 1e-4)) {
    n_wrong++;
    printf("WRONG case %d: D %d E %d H %d G %d B %d T %d S %d options %03x: relative %.2e, worst %.2e at token %lld head %lld feature %lld "
           "(%g, expected %g), lse %.2e\n",
           n, D, E, H, G, B, T, S, options, relative, worst, (long long)(worst_at / E / H), (long long)(worst_at / E % H),
           (long long)(worst_at % E), (double)got[worst_at], want[worst_at], worst_lse);
  }
  free(want), free(want_lse), free(got), free(lse);
  void *device[] = {a.q.data,
                    a.k.data,
                    a.v.data,
                    a.out.data,
                    a.lse,
                    scores,
                    out_d,
                    lse_d,
                    (void *)a.q_scales,
                    (void *)a.k_scales,
                    (void *)a.scores.sink_logit,
                    (void *)a.scores.alibi_slopes,
                    (void *)a.q_tokens.cu_seqlens,
                    (void *)a.k_tokens.cu_seqlens,
                    (void *)a.k_lens,
                    (void *)a.k_ends,
                    p.workspace,
                    p.q_codes.ids,
                    p.q_codes.values,
                    p.k_codes.ids,
                    p.k_codes.values};
  for (size_t i = 0; i < sizeof device / sizeof *device; i++)
    cudaFree(device[i]);
}

static int by_size(const void *a, const void *b) { return *(const float *)a < *(const float *)b ? -1 : 1; }

/* k: of the paper's way; 0: by tensor cores. */
static void time_case(int D, int64_t n, int H, int causal, int k) {
  sfa_cuda_prefill a = {};
  a.policy = SFA_POLICY_BF16, a.n_heads = a.n_kv_heads = H, a.head_dim = a.head_dim_v = D;
  a.q_tokens.n_sequences = a.k_tokens.n_sequences = 1, a.q_tokens.max_seqlen = a.k_tokens.max_seqlen = n;
  sfa_cuda_rows *rows[3] = {&a.q, &a.k, &a.v};
  for (int i = 0; i < 3; i++) { /* one head of random numbers for all: more than the L2 does not matter here */
    void *one = random_rows(n, D, SFA_BF16, 1);
    *rows[i] = (sfa_cuda_rows){device_memory((size_t)n * H * D * 2, NULL), SFA_BF16, (int64_t)H * D, D};
    for (int h = 0; h < H; h++)
      CUDA_TRY(cudaMemcpy2D((uint16_t *)rows[i]->data + h * D, (size_t)H * D * 2, one, (size_t)D * 2, (size_t)D * 2, (size_t)n,
                            cudaMemcpyDeviceToDevice));
    cudaFree(one);
  }
  a.scores.softmax_scale = (float)(1 / sqrt((double)D)), a.scores.causal = causal, a.scores.window_left = a.scores.window_right = -1;
  a.out = (sfa_cuda_rows){device_memory((size_t)n * H * D * 2, NULL), SFA_BF16, (int64_t)H * D, D};
  a.lse = (float *)device_memory((size_t)n * H * 4, NULL);
  sfa_cuda_paper p = {};
  sfa_cuda_rows unused;
  if (k) {
    p.q_codes = random_codes(n * H, D, k, SFA_BF16, &unused);
    cudaFree(unused.data);
    p.k_codes = random_codes(n * H, D, k, SFA_BF16, &unused);
    cudaFree(unused.data);
    p.shape = a;
    p.workspace = device_memory(sfa_cuda_paper_workspace_bytes(&p), NULL);
  }
  cudaEvent_t start, stop;
  CUDA_TRY(cudaEventCreate(&start));
  CUDA_TRY(cudaEventCreate(&stop));
  float times[11];
  for (int i = -2; i < 11; i++) {
    CUDA_TRY(cudaEventRecord(start, NULL));
    if (k)
      sfa_cuda_paper_run(&p, NULL);
    else
      sfa_cuda_prefill_portable_run(&a, NULL);
    CUDA_TRY(cudaEventRecord(stop, NULL));
    CUDA_TRY(cudaEventSynchronize(stop));
    if (i >= 0)
      CUDA_TRY(cudaEventElapsedTime(&times[i], start, stop));
  }
  qsort(times, 11, sizeof *times, by_size);
  const double flops = 4.0 * n * n * D * H / (causal ? 2 : 1);
  printf("%s D %3d n %6lld heads %2d causal %d: %.3f ms (%.3f..%.3f), %.0f TFLOP/s\n",
         k ? k == 8 ? "paper, k = 8, " : "paper, k = 16," : "portable", D, (long long)n, H, causal, times[5], times[1], times[9],
         flops / times[5] * 1e-9);
  fflush(stdout);
  void *device[] = {a.q.data,    a.k.data,      a.v.data,         a.out.data,    a.lse,
                    p.workspace, p.q_codes.ids, p.q_codes.values, p.k_codes.ids, p.k_codes.values};
  for (size_t i = 0; i < sizeof device / sizeof *device; i++)
    cudaFree(device[i]);
}

enum { N_PLAIN = 160, N_CASES = 220 };

int main(int argc, char **argv) {
  int n_devices = 0;
  if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
    printf("no GPU: skipped\n");
    return 77;
  }
  const check_wish wish = wish_of(argc, argv);
  if (wish.cases) {
    static const int dims[][2] = {{64, 64}, {128, 128}, {256, 256}, {8, 8}, {24, 40}, {72, 128}, {96, 96}, {192, 128}, {80, 200}, {136, 8}};
    const int last = wish.last < N_CASES - 1 ? wish.last : N_CASES - 1;
    for (int n = wish.first; n <= last; n++) {
      begin_case(n);
      const bool paper = n >= N_PLAIN; /* which takes no int8 rows */
      const int i = paper ? n - N_PLAIN : n % 16, drawn = (int)(next_bits() % 512), *d = dims[paper ? i % 10 : n / 16],
                options = i < 9 ? (i ? 1 << (i - 1) : 0) : drawn;
      check_case(n, d[0], d[1], 2 << i % 3, 2, 1 + i % 4, i % 5 == 4 ? 1 : 1 + (int)(next_bits() % (paper ? 100 : 200)),
                 1 + (int)(next_bits() % 300), paper ? (options & ~(1 << 6)) | 1 << 9 : options);
    }
    printf("%d cases, %lld wrong\n", last < wish.first ? 0 : last - wish.first + 1, (long long)n_wrong);
    fflush(stdout);
  }
  if (wish.times)
    for (int causal = 0; causal < 2; causal++) {
      time_case(64, 8192, 32, causal, 0);
      time_case(128, 8192, 32, causal, 0);
      time_case(256, 8192, 32, causal, 0);
      time_case(128, 32768, 8, causal, 0);
      time_case(128, 8192, 8, causal, 8);
      time_case(128, 8192, 8, causal, 16);
      time_case(128, 8192, 8, causal, 0);
    }
  return n_wrong ? 1 : 0;
}
