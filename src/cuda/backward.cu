/* Gradients (docs/MATH.md 4) on tensor cores, over rows with zeros: what a support drops is 0 in q and k, and is made 0 in d_q and d_k when
 * they are written. Four launches:
 *
 *     load queries   q, d_out as bf16 tiles; lse; delta = d_out . out - d_lse
 *     load keys      k, v as bf16 tiles
 *     backward       a cluster a key tile: d_k, d_v, and its part of the sums of d_q (backward_sm90.cuh)
 *     finish         sums of d_q times softmax_scale to the caller's rows; with a sink, its gradient
 *
 * Why one pass with ordered sums and not two kernels, one owning keys and one queries: five products against seven. */
#include "cuda/backward_sm90.cuh"

#include <math.h>

/* ---- Plan ------------------------------------------------------------------------------------------------------------ */

static int width_of(const sfa_cuda_backward *a) {
  const int most = a->head_dim > a->head_dim_v ? a->head_dim : a->head_dim_v;
  return most <= 64 ? 64 : most <= 128 ? 128 : 256;
}

static void *take(void *memory, size_t *used, size_t bytes) {
  void *at = memory ? (unsigned char *)memory + *used : NULL;
  *used += (bytes + 255) & ~(size_t)255;
  return at;
}

static int span_of(int64_t window) { return window < 0 || window > BACKWARD_FAR ? BACKWARD_FAR : (int)window; }

/* The call as the kernels see it; returns the bytes of its workspace. */
static size_t plan(const sfa_cuda_backward *a, backward_call *c) {
  const size_t width = (size_t)width_of(a), unit_bytes = 64 * width * 2;
  memset(c, 0, sizeof *c);
  c->n_sequences = a->q_tokens.n_sequences;
  c->n_heads = a->n_heads;
  c->n_kv_heads = a->n_kv_heads;
  c->group = a->n_heads / a->n_kv_heads;
  c->dim = a->head_dim;
  c->dim_v = a->head_dim_v;
  c->max_queries = (int)a->q_tokens.max_seqlen;
  c->max_keys = (int)a->k_tokens.max_seqlen;
  c->cu_queries = a->q_tokens.cu_seqlens;
  c->cu_keys = a->k_tokens.cu_seqlens;
  const int tile = 1 << BACKWARD_KEYS_LOG2(width);
  c->q_tiles = (c->max_queries + 63) / 64;
  c->k_tiles = (c->max_keys + tile - 1) / tile;
  c->softmax_scale = a->scores.softmax_scale;
  c->softcap = a->scores.softcap;
  c->left = span_of(a->scores.window_left);
  c->right = a->scores.causal ? 0 : span_of(a->scores.window_right);
  c->n_sinks = a->scores.n_sink_tokens > c->max_keys ? c->max_keys : (int)a->scores.n_sink_tokens;
  c->alibi_slopes = a->scores.alibi_slopes;
  const size_t q_tiles = (size_t)c->n_sequences * (size_t)c->n_heads * (size_t)c->q_tiles;
  const size_t units = (size_t)c->n_sequences * (size_t)c->n_kv_heads * (size_t)c->k_tiles * (size_t)BACKWARD_UNITS(width);
  size_t used = 0;
  c->q = (unsigned char *)take(a->workspace, &used, q_tiles * unit_bytes);
  c->d_out = (unsigned char *)take(a->workspace, &used, q_tiles * unit_bytes);
  c->k = (unsigned char *)take(a->workspace, &used, units * unit_bytes);
  c->v = (unsigned char *)take(a->workspace, &used, units * unit_bytes);
  c->lse = (float *)take(a->workspace, &used, q_tiles * 256);
  c->delta = (float *)take(a->workspace, &used, q_tiles * 256);
  c->d_q = (float4 *)take(a->workspace, &used, q_tiles * 64 * width * sizeof(float));
  c->ticket = (int *)take(a->workspace, &used, (1 + 2 * q_tiles) * sizeof(int));
  c->turns = c->ticket + 1;
  c->d_k = a->d_k;
  c->d_v = a->d_v;
  return used;
}

size_t sfa_cuda_backward_workspace_bytes(const sfa_cuda_backward *args) {
  backward_call call;
  return plan(args, &call);
}

/* ---- Rows to tiles --------------------------------------------------------------------------------------------------- */

/* Columns column .. column + 7 of a row; what lies beyond dim is 0. */
static __device__ __forceinline__ void load_unit(const sfa_cuda_rows *rows, int64_t token, int head, int column, int dim, float (&x)[8]) {
  const int64_t at = token * rows->token_stride + head * rows->head_stride + column;
#pragma unroll
  for (int i = 0; i < 8; i++)
    x[i] = 0;
  if (column >= dim)
    return;
  if (rows->dtype == SFA_F32) {
    const float *from = (const float *)rows->data + at;
    if (((uintptr_t)from & 15) == 0) {
      const float4 a = ((const float4 *)from)[0], b = ((const float4 *)from)[1];
      x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++)
        x[i] = from[i];
    }
  } else {
    const __nv_bfloat16 *from = (const __nv_bfloat16 *)rows->data + at;
    if (((uintptr_t)from & 15) == 0) {
      const uint4 a = *(const uint4 *)from;
      const uint32_t words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++)
        x[i] = __bfloat162float(from[i]);
    }
  }
}

/* Rounded into unit `unit` of a tile's row; x becomes what was stored. */
static __device__ __forceinline__ void store_unit(unsigned char *tile, int row, int unit, float (&x)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    words[i] = sfa_bf16_pair(x[2 * i], x[2 * i + 1]);
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
  *(uint4 *)(tile + unit / 8 * BACKWARD_BLOCK + row * 128 + ((unit ^ row) % 8) * 16) = make_uint4(words[0], words[1], words[2], words[3]);
}

/* A block of 256 threads a tile of queries of a head; DIM / 8 threads a row. */
template <int DIM>
static __global__ void load_queries_kernel(backward_call call, sfa_cuda_rows q, sfa_cuda_rows out, sfa_cuda_rows d_out, const float *lse,
                                           const float *d_lse) {
  const int64_t tile = blockIdx.x;
  const int m = (int)(tile % call.q_tiles), h = (int)(tile / call.q_tiles % call.n_heads), b = (int)(tile / call.q_tiles / call.n_heads);
  const backward_range queries = range_of(call.cu_queries, call.max_queries, b);
  if (64 * m >= queries.count)
    return;
  const int unit = threadIdx.x % (DIM / 8);
#pragma unroll
  for (int row = threadIdx.x / (DIM / 8); row < 64; row += 256 / (DIM / 8)) {
    const bool live = 64 * m + row < queries.count;
    const int64_t token = (int64_t)queries.first + 64 * m + row;
    float x[8], y[8], delta = 0;
    load_unit(&q, token, h, 8 * unit, live ? call.dim : 0, x);
    store_unit(call.q + tile * 128 * DIM, row, unit, x);
    load_unit(&d_out, token, h, 8 * unit, live ? call.dim_v : 0, x);
    store_unit(call.d_out + tile * 128 * DIM, row, unit, x);
    load_unit(&out, token, h, 8 * unit, live ? call.dim_v : 0, y);
#pragma unroll
    for (int i = 0; i < 8; i++)
      delta = fmaf(x[i], y[i], delta);
#pragma unroll
    for (int other = 1; other < DIM / 8; other *= 2)
      delta += __shfl_xor_sync(~0u, delta, other);
    if (unit == 0) {
      const int64_t at = token * call.n_heads + h;
      const float l = live ? lse[at] : -INFINITY;
      call.lse[64 * tile + row] = l == -INFINITY ? INFINITY : l * 1.4426950408889634f - BACKWARD_SHIFT;
      call.delta[64 * tile + row] = live && d_lse ? delta - d_lse[at] : delta;
    }
  }
}

/* The same of 64 keys. */
template <int DIM> static __global__ void load_keys_kernel(backward_call call, sfa_cuda_rows k, sfa_cuda_rows v) {
  const int64_t tile = blockIdx.x;
  const int n_units = call.k_tiles * BACKWARD_UNITS(DIM), n = (int)(tile % n_units), g = (int)(tile / n_units % call.n_kv_heads);
  const backward_range keys = range_of(call.cu_keys, call.max_keys, (int)(tile / n_units / call.n_kv_heads));
  if (64 * (n & -BACKWARD_UNITS(DIM)) >= keys.count) /* its key tile is not met */
    return;
  const int unit = threadIdx.x % (DIM / 8);
#pragma unroll
  for (int row = threadIdx.x / (DIM / 8); row < 64; row += 256 / (DIM / 8)) {
    const bool live = 64 * n + row < keys.count;
    const int64_t token = (int64_t)keys.first + 64 * n + row;
    float x[8];
    load_unit(&k, token, g, 8 * unit, live ? call.dim : 0, x);
    store_unit(call.k + tile * 128 * DIM, row, unit, x);
    load_unit(&v, token, g, 8 * unit, live ? call.dim_v : 0, x);
    store_unit(call.v + tile * 128 * DIM, row, unit, x);
  }
}

/* ---- Sums to rows ---------------------------------------------------------------------------------------------------- */

/* A block of 128 threads a tile of queries; thread t has what thread t of the product had. */
template <int DIM> static __global__ void finish_queries_kernel(backward_call call, sfa_cuda_gradient d_q) {
  const int64_t tile = blockIdx.x;
  const int m = (int)(tile % call.q_tiles), h = (int)(tile / call.q_tiles % call.n_heads), b = (int)(tile / call.q_tiles / call.n_heads);
  const backward_range queries = range_of(call.cu_queries, call.max_queries, b);
  const int t = threadIdx.x, row = 64 * m + t / 32 * 16 + t % 32 / 4;
  if (64 * m >= queries.count)
    return;
  const int tile_log2 = BACKWARD_KEYS_LOG2(DIM);
  const backward_shape shape = shape_of(queries.count, range_of(call.cu_keys, call.max_keys, b).count, tile_log2);
  const bool met = count_before(&call, &shape, shape.k_tiles, m) > 0;
  const float factor = call.softmax_scale / BACKWARD_WEIGHT;
  const float4 *sums = call.d_q + tile * (DIM / 8) * 128 + t;
  const int64_t token = (int64_t)queries.first + row;
  backward_line lines[2] = {{token, h, token * call.n_heads + h, 0}, {token + 8, h, (token + 8) * call.n_heads + h, 0}};
#pragma unroll 2
  for (int column = 0; column < call.dim; column += 32) {
    float pairs[2][4][2];
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const float4 x = met ? sums[16 * column + 128 * c] : make_float4(0, 0, 0, 0);
      pairs[0][c][0] = factor * x.x, pairs[0][c][1] = factor * x.y;
      pairs[1][c][0] = factor * x.z, pairs[1][c][1] = factor * x.w;
    }
#pragma unroll
    for (int half = 0; half < 2; half++)
      if (row + 8 * half < queries.count)
        store_pairs(&d_q, &lines[half], column + t % 4 * 2, call.dim, pairs[half]);
  }
}

/* d sink = - sum over the head's rows of e^(sink - lse) delta, in double; a block of 256 threads a head. */
static __global__ void finish_sinks_kernel(backward_call call, const float *sink_logit, float *d_sink_logit) {
  __shared__ double sums[256];
  const int h = blockIdx.x;
  double sum = 0;
  for (int b = 0; sink_logit && b < call.n_sequences; b++) {
    const int n_queries = range_of(call.cu_queries, call.max_queries, b).count;
    const int64_t at = 64 * (((int64_t)b * call.n_heads + h) * call.q_tiles);
    for (int t = threadIdx.x; t < n_queries; t += 256)
      sum -= exp2((double)sink_logit[h] * 1.4426950408889634 - BACKWARD_SHIFT - (double)call.lse[at + t]) * (double)call.delta[at + t];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int half = 128; half; half /= 2) {
    if (threadIdx.x < half)
      sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0)
    d_sink_logit[h] = (float)sums[0];
}

/* ---- The whole ------------------------------------------------------------------------------------------------------- */

static const char *text_of(cudaError_t error) {
  if (error == cudaSuccess)
    return NULL;
  (void)cudaGetLastError();
  return cudaGetErrorString(error);
}

template <int DIM> static const char *launch(const sfa_cuda_backward *a, const backward_call *call, cudaStream_t stream) {
  const int q_tiles = call->n_sequences * call->n_heads * call->q_tiles, k_tiles = call->n_sequences * call->n_kv_heads * call->k_tiles;
  const bool bent = call->softcap > 0 || call->alibi_slopes || !(call->softmax_scale > 0); /* -inf times the scale must be -inf */
  void (*const kernel)(backward_call) = bent ? backward_kernel<DIM, true> : backward_kernel<DIM, false>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, backward_layout<DIM>::BYTES);
  if (error == cudaSuccess)
    error = cudaMemsetAsync(call->ticket, 0, (1 + 2 * (size_t)q_tiles) * sizeof(int), stream);
  if (error != cudaSuccess)
    return text_of(error);
  if (q_tiles > 0)
    load_queries_kernel<DIM><<<q_tiles, 256, 0, stream>>>(*call, a->q, a->out, a->d_out, a->lse, a->d_lse);
  if (k_tiles > 0) {
    load_keys_kernel<DIM><<<k_tiles * BACKWARD_UNITS(DIM), 256, 0, stream>>>(*call, a->k, a->v);
    kernel<<<k_tiles * BACKWARD_CLUSTER(DIM), 512, backward_layout<DIM>::BYTES, stream>>>(*call);
  }
  if (q_tiles > 0)
    finish_queries_kernel<DIM><<<q_tiles, 128, 0, stream>>>(*call, a->d_q);
  if (a->d_sink_logit)
    finish_sinks_kernel<<<call->n_heads, 256, 0, stream>>>(*call, a->scores.sink_logit, a->d_sink_logit);
  return text_of(cudaGetLastError());
}

const char *sfa_cuda_backward_run(const sfa_cuda_backward *args, sfa_cuda_stream stream) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess)
    return text_of(error);
  if (major != 9)
    return "gradients need a Hopper GPU (compute capability 9.0): compute them on the CPU";
  backward_call call;
  plan(args, &call);
  switch (width_of(args)) {
  case 64: return launch<64>(args, &call, stream);
  case 128: return launch<128>(args, &call, stream);
  default: return launch<256>(args, &call, stream);
  }
}
