/* cuda_prefill_sm90_check: sfa_cuda_prefill_run against attention in double, written down naively, over policies, shapes, masks and sizes.
 *
 * Each case draws rows (random normal, the k largest features kept), runs twice and compares the bits, then compares with the reference:
 * ||out - ref|| / ||ref|| over the case, every element within a wider bound, every lse. What lies behind the rows that a sequence owns is
 * NaN, so that a read too far is seen; outputs are NaN before. A line a case; the last says how many failed. Argument: the number of a
 * policy (sfa_policy) to check only that one. */
#include <cuda_bf16.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/cuda_stages.h"

struct check_case {
  int32_t head_dim, head_dim_v, k; /* k: kept features of q and k, 0: all */
  int32_t n_heads, n_kv_heads;
  int32_t n_sequences, T, S; /* longest; others are shorter where `ragged` */
  int32_t ragged;            /* 1: cu_seqlens; 2: k_lens */
  int32_t causal, window_left, window_right, n_sink_tokens;
  float sharpness, softcap; /* factor of q; softcap */
  int32_t alibi, sink_logit, out_bf16;
};

static const check_case cases[] = {
    /* dim  v    k   H   G  B  T    S    rag cau left right sinks sharp cap alibi sink bf16 */
    {128, 128, 0, 2, 2, 1, 384, 512, 0, 0, -1, -1, 0, 1, 0, 0, 0, 0},
    {128, 128, 16, 2, 2, 1, 512, 512, 0, 1, -1, -1, 0, 1, 0, 0, 0, 1},
    {64, 64, 8, 3, 1, 2, 600, 777, 0, 0, -1, -1, 0, 1, 0, 0, 0, 0},
    {64, 64, 16, 4, 2, 1, 1000, 1000, 0, 1, -1, -1, 0, 4, 0, 0, 0, 0},
    {128, 128, 8, 4, 1, 1, 700, 1300, 0, 1, -1, -1, 0, 4, 0, 0, 0, 0},
    {256, 256, 16, 2, 1, 1, 500, 900, 0, 0, -1, -1, 0, 4, 0, 0, 0, 0},
    {256, 256, 32, 2, 2, 1, 999, 999, 0, 1, -1, -1, 0, 1, 0, 0, 0, 1},
    {96, 80, 12, 2, 1, 1, 333, 555, 0, 1, -1, -1, 0, 2, 0, 0, 0, 0},
    {16, 48, 8, 2, 2, 1, 130, 129, 0, 0, -1, -1, 0, 2, 0, 0, 0, 0},
    {192, 128, 24, 2, 2, 1, 300, 301, 0, 1, -1, -1, 0, 2, 0, 0, 0, 0},
    {128, 256, 16, 2, 1, 1, 257, 511, 0, 1, -1, -1, 0, 2, 0, 0, 0, 0},
    {128, 128, 16, 9, 3, 2, 5, 1000, 0, 1, -1, -1, 0, 2, 0, 0, 0, 0},
    {128, 128, 16, 16, 1, 1, 1, 2049, 0, 1, -1, -1, 0, 2, 0, 0, 0, 0},
    {64, 64, 16, 7, 1, 1, 100, 400, 0, 1, 63, -1, 5, 2, 0, 1, 1, 0},
    {128, 128, 16, 2, 1, 1, 900, 900, 0, 1, 100, -1, 0, 2, 0, 0, 0, 0},
    {128, 128, 16, 2, 1, 1, 900, 1000, 0, 1, 200, -1, 70, 2, 0, 0, 0, 0},
    {128, 128, 16, 2, 1, 1, 900, 1000, 0, 0, 33, 65, 4, 2, 0, 0, 0, 0},
    {128, 128, 16, 2, 1, 1, 400, 150, 0, 1, -1, -1, 0, 2, 0, 0, 0, 0},
    {128, 128, 16, 2, 1, 1, 400, 150, 0, 1, -1, -1, 0, 2, 0, 0, 1, 0},
    {128, 128, 16, 2, 1, 5, 700, 800, 1, 1, -1, -1, 0, 2, 0, 0, 0, 0},
    {64, 64, 16, 2, 2, 7, 300, 200, 1, 0, -1, -1, 0, 2, 0, 0, 0, 1},
    {128, 128, 16, 4, 2, 5, 64, 800, 2, 1, -1, -1, 0, 2, 0, 0, 0, 0},
    {256, 256, 16, 2, 1, 3, 100, 300, 2, 0, -1, -1, 0, 2, 0, 0, 0, 0},
    {128, 128, 16, 2, 1, 1, 300, 500, 0, 1, -1, -1, 0, 8, 20, 0, 0, 0},
    {128, 128, 16, 4, 1, 1, 300, 500, 0, 1, -1, -1, 0, 2, 0, 1, 0, 0},
    {128, 128, 16, 4, 1, 1, 30, 500, 0, 1, -1, -1, 0, 8, 30, 1, 1, 1},
    {128, 128, 16, 2, 2, 1, 300, 2000, 0, 0, -1, -1, 0, 60, 0, 0, 0, 0},
    {256, 256, 16, 8, 1, 1, 37, 2000, 0, 1, 500, -1, 3, 60, 0, 0, 0, 0},
    {128, 128, 16, 1, 1, 1, 1, 1, 0, 1, -1, -1, 0, 2, 0, 0, 0, 0},
    {64, 64, 4, 1, 1, 1, 193, 1, 0, 0, -1, -1, 0, 2, 0, 0, 0, 0},
    {128, 128, 16, 2, 1, 1, 2048, 2048, 0, 1, -1, -1, 0, 2, 0, 0, 0, 1},
    {128, 128, 8, 8, 2, 1, 1500, 3000, 0, 0, -1, -1, 0, 2, 0, 0, 0, 0},
    {24, 24, 8, 2, 1, 1, 200, 260, 0, 1, -1, -1, 0, 2, 0, 0, 0, 0},
    {256, 64, 16, 2, 2, 1, 700, 700, 0, 1, -1, -1, 0, 2, 0, 0, 0, 0},
    {64, 64, 16, 4, 2, 5, 300, 500, 1, 1, 90, -1, 5, 8, 20, 1, 1, 1},
    {256, 256, 16, 4, 2, 5, 300, 500, 1, 1, 90, -1, 5, 8, 20, 1, 1, 0},
    {256, 256, 16, 2, 1, 4, 200, 300, 1, 0, 40, 50, 3, 2, 0, 0, 1, 1},
    {64, 64, 0, 2, 1, 1, 200, 300, 0, 1, -1, -1, 0, 8, 10, 0, 1, 0},
    {256, 256, 0, 2, 1, 1, 200, 300, 0, 0, -1, -1, 0, 8, 10, 0, 1, 0},
    {64, 64, 63, 2, 1, 1, 300, 400, 0, 1, -1, -1, 0, 2, 0, 0, 0, 0},
    {128, 128, 100, 2, 1, 1, 300, 400, 0, 1, -1, -1, 0, 2, 0, 0, 0, 0},
    {256, 256, 250, 2, 1, 1, 300, 400, 0, 0, -1, -1, 0, 2, 0, 0, 0, 0},
    {64, 256, 16, 2, 1, 1, 300, 400, 0, 1, -1, -1, 0, 2, 0, 0, 0, 0},
    {64, 128, 16, 2, 1, 1, 300, 400, 0, 0, -1, -1, 0, 2, 0, 0, 0, 0},
    {8, 8, 4, 2, 1, 1, 200, 260, 0, 1, -1, -1, 0, 2, 0, 0, 0, 0},
    {248, 200, 16, 2, 1, 1, 200, 260, 0, 1, -1, -1, 0, 2, 0, 0, 0, 0},
};

enum { REFERENCE_SLICES = 128 }; /* blocks that share a head's queries */

static uint64_t random_state = 12345;
static double random_uniform(void) {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return ((double)(random_state >> 33) + 0.5) / 2147483648.0;
}
static float random_normal(void) { return (float)(sqrt(-2 * log(random_uniform())) * cos(6.283185307179586 * random_uniform())); }

static void cuda_must(cudaError_t error, const char *what) {
  if (error != cudaSuccess) {
    printf("%s: %s\n", what, cudaGetErrorString(error));
    exit(2);
  }
}
static void *device_memory(size_t bytes) {
  void *memory;
  cuda_must(cudaMalloc(&memory, bytes + 16), "cudaMalloc");
  cuda_must(cudaMemset(memory, 0xFF, bytes + 16), "cudaMemset");
  return memory;
}
template <class TYPE> static TYPE *device_copy(const TYPE *from, size_t n) {
  void *to = device_memory(n * sizeof *from);
  cuda_must(cudaMemcpy(to, from, n * sizeof *from, cudaMemcpyHostToDevice), "cudaMemcpy");
  return (TYPE *)to;
}
template <class TYPE> static TYPE *host_copy(const void *from, size_t n) {
  TYPE *to = (TYPE *)malloc(n * sizeof *to + 1);
  cuda_must(cudaMemcpy(to, from, n * sizeof *to, cudaMemcpyDeviceToHost), "cudaMemcpy");
  return to;
}

/* ---- The reference ------------------------------------------------------------------------------------------------------------------ */

struct reference {
  check_case shape;
  const float *q, *k, *v; /* [tokens][heads][dim] */
  const int32_t *first_q, *n_q, *first_k, *n_k;
  const float *sink_logit, *alibi_slopes;
  float softmax_scale;
  double *scores; /* [blocks][S] */
  double *out, *lse;
};

static __global__ void reference_kernel(reference r) {
  const check_case &c = r.shape;
  const int head = blockIdx.x, kv_head = head / (c.n_heads / c.n_kv_heads), b = blockIdx.y;
  double *score = r.scores + ((int64_t)(blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * (c.S + 1);
  __shared__ double most, sum;
  for (int t = blockIdx.z; t < r.n_q[b]; t += gridDim.z) {
    const int64_t token = r.first_q[b] + t, i = (int64_t)t + r.n_k[b] - r.n_q[b];
    for (int64_t j = threadIdx.x; j < r.n_k[b]; j += blockDim.x) {
      double s = 0;
      for (int u = 0; u < c.head_dim; u++)
        s += (double)r.q[(token * c.n_heads + head) * c.head_dim + u] * r.k[((r.first_k[b] + j) * c.n_kv_heads + kv_head) * c.head_dim + u];
      s *= r.softmax_scale;
      if (c.softcap != 0)
        s = c.softcap * tanh(s / c.softcap);
      if (c.alibi)
        s += (double)r.alibi_slopes[head] * (double)(j - i);
      const bool hidden = (c.causal && j > i) || (c.window_right >= 0 && j > i + c.window_right) ||
                          (c.window_left >= 0 && j < i - c.window_left && j >= c.n_sink_tokens);
      score[j] = hidden ? -INFINITY : s;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      most = c.sink_logit ? r.sink_logit[head] : -INFINITY;
      for (int64_t j = 0; j < r.n_k[b]; j++)
        most = fmax(most, score[j]);
      sum = c.sink_logit && most > -INFINITY ? exp(r.sink_logit[head] - most) : 0;
      for (int64_t j = 0; j < r.n_k[b] && most > -INFINITY; j++)
        sum += score[j] = exp(score[j] - most);
      r.lse[token * c.n_heads + head] = most == -INFINITY ? most : most + log(sum);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < c.head_dim_v; e += blockDim.x) {
      double o = 0;
      for (int64_t j = 0; j < r.n_k[b] && most > -INFINITY; j++)
        if (score[j] != 0)
          o += score[j] * r.v[((r.first_k[b] + j) * c.n_kv_heads + kv_head) * c.head_dim_v + e];
      r.out[(token * c.n_heads + head) * c.head_dim_v + e] = most == -INFINITY ? 0 : o / sum;
    }
    __syncthreads();
  }
}

/* ---- One case ------------------------------------------------------------------------------------------------------------------------ */

/* Rows of k kept features (0: all), as the kernel gets them (bf16, or int8 with a scale a row) and as f32. */
struct check_rows {
  float *exact;  /* [n][dim] */
  uint8_t *data; /* [n + n_behind][stride] */
  float *scales; /* [n + n_behind] */
};
static check_rows rows_draw(int64_t n, int dim, int k, float factor, int int8, int64_t n_behind, int stride) {
  check_rows rows = {(float *)malloc(n * dim * 4 + 4), (uint8_t *)calloc((n + n_behind) * stride + 2, 2),
                     (float *)malloc((n + n_behind) * 4 + 4)};
  for (int64_t i = 0; i < n + n_behind; i++) {
    float x[256], most = 0;
    int kept[256] = {0};
    for (int u = 0; u < dim; u++)
      x[u] = random_normal() * factor;
    for (int n_kept = 0; n_kept < k; n_kept++) {
      int best = -1;
      for (int u = 0; u < dim; u++)
        if (!kept[u] && (best < 0 || fabsf(x[u]) > fabsf(x[best])))
          best = u;
      kept[best] = 1;
    }
    for (int u = 0; u < dim; u++) {
      x[u] = k && !kept[u] ? 0 : __bfloat162float(__float2bfloat16(x[u]));
      most = fmaxf(most, fabsf(x[u]));
    }
    float scale = most / 127; /* rounded up to 11 bits, as those of codes are */
    uint32_t bits;
    memcpy(&bits, &scale, 4);
    bits = (bits + 0x1FFF) & ~0x1FFFu;
    memcpy(&scale, &bits, 4);
    rows.scales[i] = i < n ? scale : NAN;
    for (int u = 0; u < dim; u++) {
      const int value = int8 && scale > 0 ? (int)nearbyintf(x[u] / scale) : 0;
      if (int8)
        ((int8_t *)rows.data)[i * stride + u] = (int8_t)value;
      else
        ((__nv_bfloat16 *)rows.data)[i * stride + u] = __float2bfloat16(i < n ? x[u] : NAN);
      if (i < n)
        rows.exact[i * dim + u] = int8 ? (float)value * scale : x[u];
    }
  }
  return rows;
}
static void rows_free(check_rows *rows) {
  free(rows->exact);
  free(rows->data);
  free(rows->scales);
}

/* The keys as the run left them, into k->exact. Returns how many lie further from what they were than half of their new scale. */
static int64_t keys_leveled(check_rows *k, const void *data, const float *scales, int64_t n, int dim, int stride) {
  int8_t *values = host_copy<int8_t>(data, n * stride);
  float *scale = host_copy<float>(scales, n);
  int64_t n_far = 0;
  for (int64_t i = 0; i < n; i++)
    for (int u = 0; u < dim; u++) {
      const float x = (float)values[i * stride + u] * scale[i];
      n_far += !(fabsf(x - k->exact[i * dim + u]) <= 0.5001f * scale[i]);
      k->exact[i * dim + u] = x;
    }
  free(values);
  free(scale);
  return n_far;
}

static int case_check(int number, const check_case *c, sfa_policy policy) {
  const int int8 = policy == SFA_POLICY_INT8 || policy == SFA_POLICY_SP_INT8, H = c->n_heads, G = c->n_kv_heads, D = c->head_dim,
            E = c->head_dim_v;
  int32_t cu_q[16] = {0}, cu_k[16] = {0}, n_q[16], n_k[16];
  for (int b = 0; b < c->n_sequences; b++) {
    n_q[b] = c->ragged == 1 && b ? (b == 2 ? 0 : 1 + (int)(random_uniform() * c->T)) : c->T;
    n_k[b] = c->ragged && b != 1 ? (b == 3 ? 0 : 1 + (int)(random_uniform() * c->S)) : c->S;
    cu_q[b + 1] = cu_q[b] + n_q[b];
    cu_k[b + 1] = cu_k[b] + (c->ragged == 1 ? n_k[b] : c->S);
  }
  const int64_t tokens_q = cu_q[c->n_sequences], tokens_k = cu_k[c->n_sequences], n_out = tokens_q * H * E, n_lse = tokens_q * H;
  const int stride = int8 ? (D + 15) / 16 * 16 : D;
  check_rows q = rows_draw(tokens_q * H, D, c->k, c->sharpness, int8, 64, stride);
  check_rows k = rows_draw(tokens_k * G, D, c->k, 1, int8, 64 * G, stride);
  check_rows v = rows_draw(tokens_k * G, E, 0, 1, 0, 64 * G, E);
  for (int b = 0; b < c->n_sequences && c->ragged == 2; b++) /* behind the keys of a sequence: anything */
    for (int64_t i = (cu_k[b] + n_k[b]) * G * E; i < (int64_t)cu_k[b + 1] * G * E; i++)
      ((__nv_bfloat16 *)v.data)[i] = __float2bfloat16(NAN);
  float sink_logit[64], slopes[64];
  for (int h = 0; h < H; h++) {
    sink_logit[h] = h == 1 ? -INFINITY : 2 + random_normal();
    slopes[h] = 0.5f / (float)(1 << h % 8);
  }

  reference r = {*c, device_copy(q.exact, tokens_q * H * D), device_copy(k.exact, tokens_k * G * D),
                 device_copy(v.exact, tokens_k * G * E)};
  r.first_q = device_copy(cu_q, 16);
  r.n_q = device_copy(n_q, 16);
  r.first_k = device_copy(cu_k, 16);
  r.n_k = device_copy(n_k, 16);
  r.sink_logit = device_copy(sink_logit, 64);
  r.alibi_slopes = device_copy(slopes, 64);
  r.softmax_scale = (float)(1 / sqrt(D));
  r.scores = (double *)device_memory((size_t)REFERENCE_SLICES * H * c->n_sequences * (c->S + 1) * 8);
  r.out = (double *)device_memory(n_out * 8);
  r.lse = (double *)device_memory(n_lse * 8);

  const size_t qk_bytes = int8 ? 1 : 2, out_bytes = c->out_bf16 ? 2 : 4;
  const sfa_dtype qk_dtype = int8 ? SFA_I8 : SFA_BF16;
  sfa_cuda_prefill args = {policy, H, G, D, E};
  args.q_tokens = {c->n_sequences, c->T, c->ragged == 1 ? r.first_q : NULL, tokens_q};
  args.k_tokens = {c->n_sequences, c->S, c->ragged == 1 ? r.first_k : NULL, tokens_k};
  args.k_lens = c->ragged == 2 ? r.n_k : NULL;
  args.q = {device_copy(q.data, (tokens_q * H + 64) * stride * qk_bytes), qk_dtype, (int64_t)H * stride, stride};
  args.k = {device_copy(k.data, (tokens_k + 64) * G * stride * qk_bytes), qk_dtype, (int64_t)G * stride, stride};
  args.v = {device_copy(v.data, (tokens_k + 64) * G * E * 2), SFA_BF16, (int64_t)G * E, E};
  float *q_scales = device_copy(q.scales, tokens_q * H), *k_scales = device_copy(k.scales, (tokens_k + 64) * G);
  args.q_scales = q_scales;
  args.k_scales = k_scales;
  args.scores = {r.softmax_scale,
                 c->softcap,
                 c->causal,
                 c->window_left,
                 c->window_right,
                 c->n_sink_tokens,
                 c->sink_logit ? r.sink_logit : NULL,
                 c->alibi ? r.alibi_slopes : NULL};
  uint8_t *out[2];
  float *lse[2];
  for (int i = 0; i < 2; i++) {
    args.out = {device_memory(n_out * out_bytes), c->out_bf16 ? SFA_BF16 : SFA_F32, (int64_t)H * E, E};
    args.lse = (float *)device_memory(n_lse * 4);
    const char *refused = sfa_cuda_prefill_run(&args, NULL);
    if (refused)
      printf("refused: %s\n", refused);
    cuda_must(cudaDeviceSynchronize(), "prefill");
    out[i] = host_copy<uint8_t>(args.out.data, n_out * out_bytes);
    lse[i] = host_copy<float>(args.lse, n_lse);
    cudaFree(args.out.data);
    cudaFree(args.lse);
  }
  const int64_t n_unlevel = int8 ? keys_leveled(&k, args.k.data, k_scales, tokens_k * G, D, stride) : 0;
  cudaFree((void *)r.k);
  r.k = device_copy(k.exact, tokens_k * G * D);
  reference_kernel<<<dim3(H, c->n_sequences, REFERENCE_SLICES), 256>>>(r);
  double *ref = host_copy<double>(r.out, n_out), *ref_lse = host_copy<double>(r.lse, n_lse);

  double difference = 0, norm = 0, worst = -1, worst_lse = 0;
  int64_t at = 0, n_lse_wrong = 0;
  for (int64_t i = 0; i < n_out; i++) {
    const double x = c->out_bf16 ? (double)__bfloat162float(((__nv_bfloat16 *)out[0])[i]) : (double)((float *)out[0])[i],
                 error = fabs(x - ref[i]);
    difference += error * error;
    norm += ref[i] * ref[i];
    if (!(error <= worst)) {
      worst = error;
      at = i;
    }
  }
  for (int64_t i = 0; i < n_lse; i++) {
    const double error = ref_lse[i] == lse[0][i] ? 0 : fabs(ref_lse[i] - lse[0][i]);
    n_lse_wrong += !(error <= 1e-4 * (1 + fabs(ref_lse[i])));
    worst_lse = !(error <= worst_lse) ? error : worst_lse;
  }
  const double relative = norm > 0 ? sqrt(difference / norm) : sqrt(difference);
  const int same = !memcmp(out[0], out[1], n_out * out_bytes) && !memcmp(lse[0], lse[1], n_lse * 4);
  const int good = relative <= 4e-3 && worst <= 0.05 && n_lse_wrong == 0 && n_unlevel == 0 && same;
  printf("%s case %2d policy %2d D %3d E %3d k %2d H %d/%d B %d T %d S %d: error %.2e, worst %.1e at token %lld head %lld e %lld (%.4f), "
         "lse %.1e (%lld wrong)%s%s\n",
         good ? "ok  " : "BAD ", number, policy, D, E, c->k, H, G, c->n_sequences, c->T, c->S, relative, worst, (long long)(at / E / H),
         (long long)(at / E % H), (long long)(at % E), n_out ? ref[at] : 0, worst_lse, (long long)n_lse_wrong,
         same ? "" : ", bits differ between two runs", n_unlevel ? ", keys are not what they were" : "");
  const void *device[] = {r.q,      r.k,   r.v,   r.first_q,   r.n_q,       r.first_k,   r.n_k,    r.sink_logit, r.alibi_slopes,
                          r.scores, r.out, r.lse, args.q.data, args.k.data, args.v.data, q_scales, k_scales};
  for (const void *memory : device)
    cudaFree((void *)memory);
  void *host[] = {out[0], out[1], lse[0], lse[1], ref, ref_lse};
  for (void *memory : host)
    free(memory);
  rows_free(&q);
  rows_free(&k);
  rows_free(&v);
  return !good;
}

int main(int argc, char **argv) {
  int n_failed = 0, n = 0, major = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess || major != 9) {
    printf("skipped: the first GPU is not of compute capability 9\n");
    return 77;
  }
  for (int policy = SFA_POLICY_BF16; policy <= SFA_POLICY_SP_INT8; policy++) {
    if (argc > 1 && atoi(argv[1]) > 0 && atoi(argv[1]) != policy)
      continue;
    for (int i = 0; i < (int)(sizeof cases / sizeof *cases); i++, n++) {
      n_failed += case_check(i, &cases[i], (sfa_policy)policy);
      fflush(stdout);
    }
  }
  printf("%d passed, %d failed\n", n - n_failed, n_failed);
  return n_failed != 0;
}
