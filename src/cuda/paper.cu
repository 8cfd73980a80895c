/* paper: Algorithm 1 of the paper, for comparison: queries as compressed rows, keys as posting lists of a tile, scores by scatter-add into
 * a score tile in shared memory, online softmax, dense values; all in f32.
 *
 * The paper keeps one list a feature for the whole sequence and clips it to a key tile by binary search; here the lists are made for each
 * tile (build_lists), so that they are its part, and all query rows share them. Then a warp owns 4 query rows: over the features of a row
 * it adds q_iu k_ju to the row's 64 scores, a lane a key of the feature's list, in which a key stands once, so that no two lanes meet. The
 * sum over features runs in rising order and no other warp touches the row: the same bits every time.
 *
 * Workspace, for each sequence, kv head and tile: where each feature's list begins [D + 1], values [64 K], keys [64 K].
 */
#include "cuda/cuda_sight.cuh"

#include <cuda_bf16.h>
#include <math_constants.h>

enum { KEYS = 64, WARPS = 8, ROWS = 4, LISTERS = 128, WIDEST = 256 /* of values */ };

#define LOG2E 1.44269504088896340736f

static __host__ __device__ int64_t align_up(int64_t bytes) { return (bytes + 15) / 16 * 16; }
static __host__ __device__ int64_t starts_bytes(const sfa_codes &k) { return align_up((k.head_dim + 1) * 4); }
static __host__ __device__ int64_t values_bytes(const sfa_codes &k) { return (int64_t)KEYS * k.k * 4; }
static __host__ __device__ int64_t list_bytes(const sfa_codes &k) {
  return starts_bytes(k) + values_bytes(k) + align_up((int64_t)KEYS * k.k);
}
static __host__ __device__ int64_t tiles_of(const sfa_cuda_prefill &a) { return (a.k_tokens.max_seqlen + KEYS - 1) / KEYS; }

/* The lists of a tile. */
struct lists {
  int32_t *starts;
  float *values;
  uint8_t *keys;
};
static __device__ __forceinline__ lists lists_of(const sfa_cuda_paper &a, int b, int kv_head, int64_t tile) {
  const int64_t number = ((int64_t)b * a.shape.n_kv_heads + kv_head) * tiles_of(a.shape) + tile;
  unsigned char *at = (unsigned char *)a.workspace + number * list_bytes(a.k_codes);
  lists l;
  l.starts = (int32_t *)(void *)at;
  l.values = (float *)(void *)(at + starts_bytes(a.k_codes));
  l.keys = at + starts_bytes(a.k_codes) + values_bytes(a.k_codes);
  return l;
}

static __device__ __forceinline__ int id_at(const sfa_codes &codes, int64_t at) {
  return codes.head_dim <= 256 ? ((const uint8_t *)codes.ids)[at] : ((const uint16_t *)codes.ids)[at];
}
static __device__ __forceinline__ float value_at(const sfa_codes &codes, int64_t at) {
  return codes.dtype == SFA_F32 ? ((const float *)codes.values)[at] : __uint_as_float((uint32_t)((const uint16_t *)codes.values)[at] << 16);
}

/* A block a tile: a thread takes some features and finds their keys, which come in rising order. */
static __global__ void __launch_bounds__(LISTERS) build_lists(const __grid_constant__ sfa_cuda_paper a) {
  const int kv_head = blockIdx.y, b = blockIdx.z, G = a.shape.n_kv_heads, D = a.k_codes.head_dim, K = a.k_codes.k;
  const sfa_extent of = sfa_extent_of(a.shape, b);
  const int32_t tile = blockIdx.x, first_key = tile * KEYS;
  if (first_key >= of.S)
    return;
  const int n_keys = min(of.S - first_key, (int32_t)KEYS);
  const lists l = lists_of(a, b, kv_head, tile);
  const int64_t row = (of.first_k + first_key) * G + kv_head; /* of the first key; the next are G rows on */
  for (int u = threadIdx.x; u < D; u += LISTERS) {
    int n = 0;
    for (int at = 0; at < n_keys * K; at++)
      n += id_at(a.k_codes, (row + (int64_t)(at / K) * G) * K + at % K) == u;
    l.starts[u + 1] = n;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    l.starts[0] = 0;
    for (int u = 0; u < D; u++)
      l.starts[u + 1] += l.starts[u];
  }
  __syncthreads();
  for (int u = threadIdx.x; u < D; u += LISTERS) {
    int place = l.starts[u];
    for (int at = 0; place < l.starts[u + 1]; at++) {
      const int64_t code = (row + (int64_t)(at / K) * G) * K + at % K;
      if (id_at(a.k_codes, code) == u) {
        l.keys[place] = (uint8_t)(at / K);
        l.values[place++] = value_at(a.k_codes, code);
      }
    }
  }
}

/* The sum of x over a warp, in every lane; a tree, so always in the same order. */
static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2)
    x += __shfl_xor_sync(~0u, x, apart);
  return x;
}
static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2)
    x = fmaxf(x, __shfl_xor_sync(~0u, x, apart));
  return x;
}

static __global__ void __launch_bounds__(32 * WARPS) attend(const __grid_constant__ sfa_cuda_paper a) {
  __shared__ float tile_scores[WARPS][ROWS][KEYS];
  const sfa_cuda_prefill &p = a.shape;
  const sfa_cuda_scores &s = p.scores;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, b = blockIdx.z;
  const int kv_head = head / (p.n_heads / p.n_kv_heads), K = a.q_codes.k, E = p.head_dim_v;
  const sfa_extent of = sfa_extent_of(p, b);
  const int32_t first_row = ((int)blockIdx.x * WARPS + warp) * ROWS;
  if (first_row >= of.T)
    return; /* nothing below is done by a whole block */
  const int n_rows = min(of.T - first_row, (int32_t)ROWS);
  const int32_t position = first_row + of.shift;
  float(*scores)[KEYS] = tile_scores[warp];
  const float slope = s.alibi_slopes ? s.alibi_slopes[head] : 0.0f;

  float o[ROWS][WIDEST / 32] = {}, largest[ROWS], sum[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; i++)
    largest[i] = -CUDART_INF_F, sum[i] = 0.0f;
  const sfa_walk walk = sfa_walk_of<KEYS>(s, position, n_rows, of.S);
  for (int32_t tile = sfa_walk_first(walk); tile < walk.end; tile = sfa_walk_next(walk, tile)) {
    const lists l = lists_of(a, b, kv_head, tile);
    const int32_t key = tile * KEYS;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      scores[i][lane] = scores[i][lane + 32] = 0.0f;
      __syncwarp();
      if (i < n_rows)
        for (int u = 0; u < K; u++) { /* scatter: a feature's list, a lane a key */
          const int64_t code = ((of.first_q + first_row + i) * p.n_heads + head) * K + u;
          const int feature = id_at(a.q_codes, code);
          const float q = value_at(a.q_codes, code);
          for (int at = l.starts[feature] + lane; at < l.starts[feature + 1]; at += 32) {
            float *score = &scores[i][l.keys[at]];
            *score = fmaf(q, l.values[at], *score);
          }
          __syncwarp();
        }
      const sfa_sight see = sfa_sight_of(s, position + i, of.S);
      float x[2], most = largest[i];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int32_t j = key + lane + 32 * half;
        x[half] = scores[i][lane + 32 * half] * s.softmax_scale;
        if (s.softcap > 0)
          x[half] = s.softcap * tanhf(x[half] / s.softcap);
        x[half] = fmaf(slope, (float)(j - (position + i)), x[half]) * LOG2E;
        if (j > see.last || (j < see.first && j >= s.n_sink_tokens))
          x[half] = -CUDART_INF_F;
        most = fmaxf(most, x[half]);
      }
      most = warp_max(most);
      const float shift = most == -CUDART_INF_F ? 0.0f : most, factor = exp2f(largest[i] - shift);
      largest[i] = most;
#pragma unroll
      for (int half = 0; half < 2; half++)
        scores[i][lane + 32 * half] = x[half] = exp2f(x[half] - shift);
      sum[i] = fmaf(sum[i], factor, warp_sum(x[0] + x[1]));
#pragma unroll
      for (int e = 0; e < WIDEST / 32; e++)
        o[i][e] *= factor;
    }
    __syncwarp();
    const int n_keys = min(of.S - key, (int32_t)KEYS);
    const uint16_t *v = (const uint16_t *)p.v.data + (of.first_k + key) * p.v.token_stride + kv_head * p.v.head_stride;
    for (int j = 0; j < n_keys; j++, v += p.v.token_stride) {
      float weight[ROWS];
#pragma unroll
      for (int i = 0; i < ROWS; i++)
        weight[i] = scores[i][j];
#pragma unroll
      for (int e = 0; e < WIDEST / 32; e++)
        if (32 * e < E) {
          const float value = 32 * e + lane < E ? __uint_as_float((uint32_t)v[32 * e + lane] << 16) : 0.0f;
#pragma unroll
          for (int i = 0; i < ROWS; i++)
            o[i][e] = fmaf(weight[i], value, o[i][e]);
        }
    }
    __syncwarp();
  }

  const float sink = s.sink_logit ? s.sink_logit[head] * LOG2E : -CUDART_INF_F;
#pragma unroll
  for (int i = 0; i < ROWS; i++)
    if (i < n_rows) {
      const float most = fmaxf(largest[i], sink), part = largest[i] == -CUDART_INF_F ? 0.0f : exp2f(largest[i] - most);
      const float total = fmaf(sum[i], part, sink == -CUDART_INF_F ? 0.0f : exp2f(sink - most));
      const float factor = total == 0.0f ? 0.0f : part / total;
      const int64_t token = of.first_q + first_row + i;
      if (p.lse && lane == 0)
        p.lse[token * p.n_heads + head] = total == 0.0f ? -CUDART_INF_F : (most + log2f(total)) * 0.693147180559945309417f;
#pragma unroll
      for (int e = 0; e < WIDEST / 32; e++)
        if (32 * e + lane < E) {
          const int64_t at = token * p.out.token_stride + head * p.out.head_stride + 32 * e + lane;
          if (p.out.dtype == SFA_BF16)
            ((__nv_bfloat16 *)p.out.data)[at] = __float2bfloat16_rn(o[i][e] * factor);
          else
            ((float *)p.out.data)[at] = o[i][e] * factor;
        }
    }
}

extern "C" size_t sfa_cuda_paper_workspace_bytes(const sfa_cuda_paper *args) {
  return (size_t)(args->shape.k_tokens.n_sequences * args->shape.n_kv_heads * tiles_of(args->shape) * list_bytes(args->k_codes));
}

extern "C" const char *sfa_cuda_paper_run(const sfa_cuda_paper *args, sfa_cuda_stream stream) {
  const sfa_cuda_prefill *p = &args->shape;
  const unsigned heads = (unsigned)p->n_heads, sequences = (unsigned)p->q_tokens.n_sequences;
  if (p->q_tokens.max_seqlen == 0 || sequences == 0 || heads == 0)
    return NULL;
  if (p->k_tokens.max_seqlen > 0)
    build_lists<<<dim3((unsigned)tiles_of(*p), (unsigned)p->n_kv_heads, sequences), LISTERS, 0, stream>>>(*args);
  const int64_t rows = WARPS * ROWS;
  attend<<<dim3((unsigned)((p->q_tokens.max_seqlen + rows - 1) / rows), heads, sequences), 32 * WARPS, 0, stream>>>(*args);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? NULL : cudaGetErrorString(error);
}
