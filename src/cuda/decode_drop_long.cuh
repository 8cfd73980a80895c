/* cuda/decode_drop_long.cuh: long calls with eps, in two launches (see decode_drop.cuh): every split weighs its keys, and leaves scores,
 * sums and counts, as bf16 rounded up; then every block finds the edges of its rows from the counts of all splits, and gathers for its own.
 * The last block of a kv head joins the parts of its splits, in their order. Each is launched while what runs before it ends, and waits for
 * that on the GPU. */
#ifndef SFA_CUDA_DECODE_DROP_LONG_CUH
#define SFA_CUDA_DECODE_DROP_LONG_CUH

#include "cuda/decode_drop.cuh"

/* Which of the kv heads' blocks of rows, over all sequences; n_splits blocks share it. */
static __device__ __forceinline__ int64_t sfa_drop_pair(const sfa_decode_call &call) {
  return ((int64_t)blockIdx.z * call.args.n_kv_heads + blockIdx.y) * call.n_row_blocks + blockIdx.x % call.n_row_blocks;
}

template <class KEYS, int ROWS, int AT_ONCE>
static __global__ __launch_bounds__(SFA_DECODE_THREADS, 2) void sfa_drop_weigh_kernel(const __grid_constant__ sfa_decode_call call) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ sfa_decode_query queries_of[ROWS];
  int32_t self = (int32_t)threadIdx.x, split = sfa_decode_quotient((int32_t)blockIdx.x, call.n_row_blocks);
  int32_t row_block = (int32_t)blockIdx.x - split * call.n_row_blocks, step, end_step;
  const sfa_drop_memory<KEYS, ROWS> memory(call, shared, queries_of);
  const int64_t pair = sfa_drop_pair(call);
  sfa_cuda_wait_for_previous();
  int32_t n_keys = call.args.n_keys[blockIdx.z];
  sfa_decode_load_queries(call, (int32_t)blockIdx.z, (int32_t)blockIdx.y, row_block * call.rows_of_block, ROWS, memory.queries);
  sfa_decode_span span = sfa_decode_span_of(call, (int32_t)blockIdx.z, (int32_t)blockIdx.y, row_block, n_keys);
  if (self < ROWS)
    queries_of[self] = sfa_decode_query_of(call, span, self);
  sfa_decode_split_steps(span.n_steps, call.n_splits, split, &step, &end_step);
  int32_t first = step + self / 32 * AT_ONCE; /* of the warp */
  sfa_drop_weigh<KEYS, ROWS, AT_ONCE>(call, span, memory, step, end_step,
                                      call.drop_scores + (pair * call.drop_pitch + (int64_t)first * SFA_DECODE_STEP + (self & 31)) * ROWS,
                                      AT_ONCE * SFA_DECODE_WARPS * SFA_DECODE_STEP * ROWS);
  if (self < ROWS) {
    float m = SFA_DECODE_NOTHING, l = 0;
    for (int w = 0; w < SFA_DECODE_WARPS; w++)
      m = fmaxf(m, memory.sums[self * SFA_DECODE_WARPS + w].x);
    for (int w = 0; w < SFA_DECODE_WARPS; w++)
      l = fmaf(memory.sums[self * SFA_DECODE_WARPS + w].y, sfa_decode_exp2(memory.sums[self * SFA_DECODE_WARPS + w].x - m), l);
    if (span.first_row + self < call.n_rows)
      call.part_sums[sfa_drop_part(call, span.first_row + self, split)] = make_float2(m, l);
  }
  __nv_bfloat162 *to = (__nv_bfloat162 *)call.drop_counts + (pair * call.n_splits + split) * ROWS * (SFA_DROP_BINS / 2);
#pragma unroll 1
  for (int32_t i = self; i < ROWS * SFA_DROP_BINS / 2; i += SFA_DECODE_THREADS)
    to[i] = __halves2bfloat162(__float2bfloat16_ru((float)memory.counts[2 * i]), __float2bfloat16_ru((float)memory.counts[2 * i + 1]));
  if (split == 0 && self == 0)
    call.drop_tickets[pair] = 0;
}

/* What all keys weigh, by one warp: m and l of the row's parts, of which the lane holds the first two of its own. */
static __device__ __forceinline__ sfa_drop_row sfa_drop_weight(const sfa_decode_call &call, const float2 *parts, const float2 *first,
                                                               int32_t head, int32_t lane, float *largest) {
  float sink = call.args.scores.sink_logit ? call.args.scores.sink_logit[head] * 1.44269504f : -INFINITY;
  float m = fmaxf(first[0].x, first[1].x), l = 0;
  for (int32_t s = lane + 64; s < call.n_splits; s += 32)
    m = fmaxf(m, parts[s].x);
  m = sfa_decode_warp_max(m);
  float unit = fmaxf(m, sink);
  auto add = [&](float2 part) { l += part.y == 0 ? 0.f : part.y * sfa_decode_exp2(part.x - unit); };
  add(first[0]), add(first[1]);
  for (int32_t s = lane + 64; s < call.n_splits; s += 32)
    add(parts[s]);
  *largest = m;
  return {0, unit, sfa_decode_warp_sum(l) + sfa_decode_exp2(sink - unit)};
}

/* Joins the parts of all splits of the span, by one block. columns: shared memory [warps][128] */
template <int ROWS, int E>
static __device__ __forceinline__ void sfa_drop_join(const sfa_decode_call &call, const sfa_decode_span &span, const sfa_drop_row *rows,
                                                     float *columns) {
  enum { AT_ONCE = 5 };
  int32_t self = (int32_t)threadIdx.x, lane = self & 31, warp = self / 32;
#pragma unroll 1
  for (int32_t r = 0; r < ROWS; r++) {
    int32_t row = span.first_row + r;
    if (row >= call.n_rows)
      break;
    const int64_t part = sfa_drop_part(call, row, 0);
    const float *out = call.part_out + part * E, *left = call.drop_left + part;
    float4 o = make_float4(0, 0, 0, 0);
    float gone = 0;
    for (int32_t s = lane; s < call.n_splits; s += 32)
      gone += __ldcg(left + s);
    gone = sfa_decode_warp_sum(gone);
    if (4 * lane < E) {
#pragma unroll 1
      for (int32_t s = warp; s < call.n_splits; s += AT_ONCE * SFA_DECODE_WARPS) {
        float4 x[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
          int32_t at = s + u * SFA_DECODE_WARPS;
          x[u] = at < call.n_splits ? __ldcg((const float4 *)(out + (int64_t)at * E) + lane) : make_float4(0, 0, 0, 0);
        }
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++)
          o.x += x[u].x, o.y += x[u].y, o.z += x[u].z, o.w += x[u].w;
      }
      ((float4 *)columns)[warp * 32 + lane] = o;
    }
    __syncthreads();
    int64_t to = ((int64_t)span.b * call.args.n_queries + row / call.group) * call.args.n_heads + span.g * call.group + row % call.group;
    if (self < E) {
      float x = 0, stays = rows[r].l - gone;
      for (int w = 0; w < SFA_DECODE_WARPS; w++)
        x += columns[w * 128 + self];
      call.args.out[to * E + self] = rows[r].l == 0 ? 0.f : x == 0 && stays <= 0 ? 0.f : x / stays;
    }
    if (self == 0) {
      if (call.args.lse)
        call.args.lse[to] = rows[r].l == 0 ? -INFINITY : (rows[r].unit + log2f(rows[r].l)) * 0.693147181f;
      if (call.args.dropped)
        call.args.dropped[to] = gone > 0 ? gone / rows[r].l : 0.f;
    }
    __syncthreads();
  }
}

/* Steps whose scores a warp reads at once. */
template <int ROWS> static constexpr int sfa_drop_group = ROWS == 1 ? 16 : 4;

/* Shared memory: of each warp its queue and the scores of a group of steps. In the beginning the counts of all splits are over it, in the
 * end the sums of the warps. */
template <class VALUES, int ROWS>
static constexpr size_t sfa_drop_warp_bytes = sfa_drop_queue<VALUES, ROWS>::BYTES + sfa_drop_group<ROWS> * 32 * ROWS * sizeof(float);
template <class VALUES, int ROWS, int E> static size_t sfa_drop_gather_shared(void) {
  size_t begin = SFA_DECODE_THREADS * 8 * sizeof(float); /* counts */
  size_t end = sfa_decode_sums_bytes<ROWS, E>, work = SFA_DECODE_WARPS * sfa_drop_warp_bytes<VALUES, ROWS>;
  return begin > end ? (begin > work ? begin : work) : (end > work ? end : work);
}

template <class VALUES, int ROWS, int E>
static __global__ __launch_bounds__(SFA_DECODE_THREADS, 2) void sfa_drop_gather_kernel(const __grid_constant__ sfa_decode_call call) {
  static_assert(E <= 128, "a row of output is 32 lanes of 4");
  enum {
    GROUP = sfa_drop_group<ROWS>,
    VECTORS = ROWS * SFA_DROP_BINS / 8, /* of 8 counts each, of a split */
    SHARES = SFA_DECODE_THREADS / VECTORS,
    AT_ONCE = 5
  };
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ sfa_drop_row rows[ROWS];
  __shared__ float lefts[SFA_DECODE_WARPS][ROWS];
  __shared__ int32_t is_last;
  const sfa_cuda_store &v = call.args.v;
  int32_t self = (int32_t)threadIdx.x, lane = self & 31, warp = self / 32,
          split = sfa_decode_quotient((int32_t)blockIdx.x, call.n_row_blocks);
  const int32_t row_block = (int32_t)blockIdx.x - split * call.n_row_blocks,
                own_row = min(row_block * ROWS + min(warp, ROWS - 1), call.n_rows - 1); /* of the warp, when it looks for the edge */
  unsigned char *own = shared + warp * sfa_drop_warp_bytes<VALUES, ROWS>;
  float *stash = (float *)(own + sfa_drop_queue<VALUES, ROWS>::BYTES) + lane * ROWS; /* [GROUP][32][ROWS] */
  float *counts = (float *)shared;                                                   /* [SHARES][ROWS][BINS] */
  const uint32_t magic = call.magic;
  const int64_t pair = sfa_drop_pair(call);
  sfa_cuda_wait_for_previous();

  int32_t n_keys = call.args.n_keys[blockIdx.z];
  const float2 *parts_of = call.part_sums + sfa_drop_part(call, own_row, 0);
  float2 first[2];
#pragma unroll
  for (int i = 0; i < 2; i++)
    first[i] = lane + 32 * i < call.n_splits ? parts_of[lane + 32 * i] : make_float2(SFA_DECODE_NOTHING, 0);
  { /* counts of all splits, which SHARES groups of threads add */
    const uint4 *from = (const uint4 *)call.drop_counts + pair * call.n_splits * VECTORS + self % VECTORS;
    float n[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 1
    for (int32_t s = self / VECTORS; s < call.n_splits; s += AT_ONCE * SHARES) {
      uint4 x[AT_ONCE];
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++)
        x[u] = s + u * SHARES < call.n_splits ? from[(s + u * SHARES) * VECTORS] : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++) {
        const uint32_t words[4] = {x[u].x, x[u].y, x[u].z, x[u].w};
#pragma unroll
        for (int i = 0; i < 4; i++)
          n[2 * i] += __uint_as_float(words[i] << 16), n[2 * i + 1] += __uint_as_float(words[i] & 0xffff0000u);
      }
    }
    float4 *to = (float4 *)counts + self * 2;
    to[0] = make_float4(n[0], n[1], n[2], n[3]), to[1] = make_float4(n[4], n[5], n[6], n[7]);
  }
  sfa_decode_span span = sfa_decode_span_of(call, (int32_t)blockIdx.z, (int32_t)blockIdx.y, row_block, n_keys);
  int32_t step, end_step;
  sfa_decode_split_steps(span.n_steps, call.n_splits, split, &step, &end_step);
  step += warp;
  const float *scores = call.drop_scores + (pair * call.drop_pitch + lane) * ROWS;
  float s[GROUP][ROWS]; /* of the lane's keys in the warp's next steps */
  auto fetch = [&](void) {
    const float *from = scores + (int64_t)step * SFA_DECODE_STEP * ROWS;
#pragma unroll
    for (int u = 0; u < GROUP; u++) {
      const int far = u * SFA_DECODE_WARPS * SFA_DECODE_STEP * ROWS;
      bool there = step + u * SFA_DECODE_WARPS < end_step;
      if constexpr (ROWS == 4) {
        float4 x = there ? *(const float4 *)(from + far) : make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
        s[u][0] = x.x, s[u][1] = x.y, s[u][2] = x.z, s[u][3] = x.w;
      } else {
        s[u][0] = there ? from[far] : -INFINITY;
      }
    }
  };
  fetch();
  sfa_drop_row row = {};
  float m = 0;
  if (warp < ROWS)
    row = sfa_drop_weight(call, parts_of, first, sfa_decode_query_of(call, span, warp).head, lane, &m);
  __syncthreads();
  if (warp < ROWS) {
    row.edge = sfa_drop_edge<SHARES>(call, (float)n_keys, row, m, counts + warp * SFA_DROP_BINS, ROWS * SFA_DROP_BINS, lane);
    if (lane == 0)
      rows[warp] = row;
  }
  __syncthreads();
  float edge[ROWS], unit[ROWS], left[ROWS]; /* left: mass of keys that leave */
#pragma unroll
  for (int r = 0; r < ROWS; r++)
    edge[r] = span.first_row + r < call.n_rows ? rows[r].edge : INFINITY, unit[r] = rows[r].unit, left[r] = 0;

  const sfa_decode_rows value_rows = sfa_decode_rows_of(v, v.values, call.value_pitch, span.b, span.g);
  const sfa_decode_rows value_scales = sfa_decode_rows_of(v, v.scales, call.value_scale_pitch, span.b, span.g);
  VALUES values;
  values.clear();
  sfa_drop_queue<VALUES, ROWS> queue;
  queue.start(own, lane);
  for (; step < end_step; step += GROUP * SFA_DECODE_WARPS, fetch()) {
    uint32_t some = 0; /* steps of which something is kept */
#pragma unroll
    for (int u = 0; u < GROUP; u++) {
      bool keep = false, sees = false;
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        keep |= !(s[u][r] < edge[r]);
        sees |= s[u][r] != -INFINITY;
      }
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        left[r] += keep && sees ? 0.f : sfa_decode_exp2(s[u][r] - unit[r]);
      some |= __any_sync(~0u, keep && sees) ? 1u << u : 0u;
    }
    if (!some)
      continue;
#pragma unroll
    for (int u = 0; u < GROUP; u++)
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        stash[u * 32 * ROWS + r] = s[u][r];
#pragma unroll 1
    for (; some; some &= some - 1) {
      int32_t u = __ffs((int)some) - 1, key = sfa_decode_step_token(span, step + u * SFA_DECODE_WARPS) + lane;
      const unsigned char *page = sfa_decode_page(v, span.b, min(key, span.n_keys - 1));
      float p[ROWS];
      bool keep = false, sees = false;
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        float x = stash[u * 32 * ROWS + r];
        keep |= !(x < edge[r]);
        sees |= x != -INFINITY;
        p[r] = sfa_decode_exp2(x - unit[r]);
      }
      queue.push(__ballot_sync(~0u, keep && sees), sfa_decode_row(value_rows, page, key), sfa_decode_row(value_scales, page, key), p);
      while (queue.n_queued - queue.n_asked >= queue.KEYS)
        queue.advance(queue.KEYS, values, magic);
    }
  }
  queue.finish(values, magic);

  float *parts = (float *)shared;
  sfa_drop_leave<VALUES, ROWS, E>(call, span, sfa_drop_part(call, span.first_row, split), values, left, parts, lefts);
  __syncthreads();
  if (self == 0) { /* the barrier orders the block's writes before this fence */
    __threadfence();
    is_last = atomicAdd(&call.drop_tickets[pair], 1) == call.n_splits - 1;
    __threadfence();
  }
  __syncthreads();
  if (is_last)
    sfa_drop_join<ROWS, E>(call, span, rows, parts);
}

template <class KEYS, class VALUES, int ROWS, int E, int AT_ONCE>
static const char *sfa_drop_long_launch(const sfa_decode_call *call, cudaStream_t stream) {
  void (*weigh)(sfa_decode_call) = sfa_drop_weigh_kernel<KEYS, ROWS, AT_ONCE>;
  void (*gather)(sfa_decode_call) = sfa_drop_gather_kernel<VALUES, ROWS, E>;
  const dim3 grid((unsigned)(call->n_splits * call->n_row_blocks), (unsigned)call->args.n_kv_heads, (unsigned)call->args.n_sequences);
  const size_t weigh_shared = sfa_drop_weigh_shared<KEYS, ROWS>(*call), gather_shared = sfa_drop_gather_shared<VALUES, ROWS, E>();
  cudaError_t error = cudaFuncSetAttribute(weigh, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)weigh_shared);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(gather, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)gather_shared);
  if (error != cudaSuccess)
    return cudaGetErrorString(error);
  const char *refused = sfa_cuda_launch_after(weigh, grid, SFA_DECODE_THREADS, weigh_shared, stream, *call);
  refused = refused ? refused : sfa_decode_mark_between(call, stream);
  return refused ? refused : sfa_cuda_launch_after(gather, grid, SFA_DECODE_THREADS, gather_shared, stream, *call);
}

#endif
