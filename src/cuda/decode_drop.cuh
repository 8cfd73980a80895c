/* cuda/decode_drop.cuh: decode that leaves values out, with a certificate (docs/MATH.md 7).
 *
 *     clear    counts and tickets become 0
 *     weigh    scores of all keys to the workspace; m and l of each split; keys are counted by score, in bins of a quarter of an octave
 *     gather   every block finds each row's edge: the highest below which the counts, taken at the bins' upper edges, weigh no more than
 *              eps l. Of its split, keys that some row keeps are compacted, 32 at a time, and their rows of V read; what the others weigh
 * is added up. The last block of a kv head joins the parts of its splits, in their order
 *
 * Each is launched while the one before runs, and waits for it on the GPU where it needs it. Bins are numbered floor(4 s) mod 256: 64
 * octaves. Only scores within 40 octaves of the largest one that the warp has seen are counted, so the bins of the last 40 octaves below
 * the largest of all hold what belongs there, and at worst something lighter. What was not counted weighs less than n 2^-40, which is taken
 * off the budget. Where the counts say that more than SFA_DROP_KEPT_SHARE of the keys would stay, all stay and nothing is left out. Counts
 * are whole numbers, everything else is added in a fixed order: the same bits every time. */
#ifndef SFA_CUDA_DECODE_DROP_CUH
#define SFA_CUDA_DECODE_DROP_CUH

#include "cuda/decode_stream.cuh"

enum {
  SFA_DROP_OCTAVE = 4, /* bins of an octave */
  SFA_DROP_DEPTH = 40, /* octaves that are counted */
  SFA_DROP_COPIES = 8, /* of a bin, so that lanes seldom meet in one */
  SFA_DROP_QUEUE = 64  /* kept keys of a warp that wait for their values */
};
#define SFA_DROP_KEPT_SHARE 0.8f

/* Which of the kv heads' blocks of rows, over all sequences. */
static __device__ __forceinline__ int64_t sfa_drop_pair(const sfa_decode_call &call, const sfa_decode_span &span) {
  return ((int64_t)span.b * call.args.n_kv_heads + span.g) * call.n_row_blocks + span.first_row / call.rows_of_block;
}

/* ---- Clear
 * ------------------------------------------------------------------------------------------------------------------------------- */

static __global__ void sfa_drop_clear_kernel(int32_t *words, int64_t n) {
  sfa_decode_next_may_start();
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x)
    words[i] = 0;
}

/* ---- Weigh
 * ------------------------------------------------------------------------------------------------------------------------------- */

template <class KEYS, int ROWS> static __host__ __device__ size_t sfa_drop_weigh_shared(const sfa_decode_call &call) {
  return KEYS::table_bytes(call) + sizeof(int32_t) * ROWS * SFA_DROP_BINS * SFA_DROP_COPIES + sizeof(float2) * SFA_DECODE_WARPS * ROWS +
         2 * (size_t)ROWS * call.args.head_dim * sizeof(float);
}

template <class KEYS, int ROWS, int AT_ONCE>
static __global__ __launch_bounds__(SFA_DECODE_THREADS, 2) void sfa_drop_weigh_kernel(const __grid_constant__ sfa_decode_call call) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ sfa_decode_query queries_of[ROWS];
  const sfa_cuda_store &k = call.args.k;
  int32_t self = (int32_t)threadIdx.x, lane = self & 31, warp = self / 32, split = (int32_t)blockIdx.x / call.n_row_blocks;
  sfa_decode_span span = sfa_decode_span_of(call, (int32_t)blockIdx.z, (int32_t)blockIdx.y, (int32_t)blockIdx.x % call.n_row_blocks);
  int32_t *counts = (int32_t *)(shared + KEYS::table_bytes(call)); /* [ROWS][BINS][COPIES] */
  float2 *sums = (float2 *)(counts + ROWS * SFA_DROP_BINS * SFA_DROP_COPIES);
  float *queries = (float *)(sums + SFA_DECODE_WARPS * ROWS);
  const bool straight = sfa_decode_straight(call);
  const int64_t pair = sfa_drop_pair(call, span);
  int32_t step, end_step;
  sfa_decode_next_may_start();
  if (self < ROWS)
    queries_of[self] = sfa_decode_query_of(call, span, self);
  sfa_decode_split_steps(span.n_steps, call.n_splits, split, &step, &end_step);
  step += warp;

  const sfa_decode_rows streams[3] = {sfa_decode_rows_of(k, k.ids, call.ids_pitch, span.b, span.g),
                                      sfa_decode_rows_of(k, k.values, call.key_pitch, span.b, span.g),
                                      sfa_decode_rows_of(k, k.scales, call.key_scale_pitch, span.b, span.g)};
  KEYS keys[AT_ONCE];
  auto fetch = [&](int32_t from) { /* steps from, from + 8, ... */
#pragma unroll
                                   for (int u = 0; u < AT_ONCE; u++) {
                                     int32_t at = from + u * SFA_DECODE_WARPS;
                                     if (at < end_step) {
                                       int32_t token = sfa_decode_step_token(span, at);
                                       keys[u].load(call, streams, sfa_decode_page(k, span.b, token), token, span.n_keys, lane);
                                     }
                                   }
  };
  fetch(step);
  for (int32_t i = self; i < ROWS * SFA_DROP_BINS * SFA_DROP_COPIES; i += SFA_DECODE_THREADS)
    counts[i] = 0;
  sfa_decode_load_queries(call, span, ROWS, queries + ROWS * call.args.head_dim, queries);
  KEYS::prepare(call, queries, shared);
  sfa_decode_softmax<ROWS> softmax;
  softmax.clear();
  __syncthreads();

  float *scores = call.drop_scores + pair * ROWS * call.drop_pitch;
  for (; step < end_step; step += AT_ONCE * SFA_DECODE_WARPS) {
    float s[AT_ONCE][ROWS], largest[ROWS], even, odd;
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++)
      if (step + u * SFA_DECODE_WARPS < end_step)
        keys[u].score(call, shared, NULL, lane, s[u]);
    fetch(step + AT_ONCE * SFA_DECODE_WARPS);
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      int32_t at = step + u * SFA_DECODE_WARPS, token = sfa_decode_step_token(span, at);
      if (at < end_step)
        sfa_decode_bend_rows<ROWS>(call, span, queries_of, sfa_decode_step_whole(span, token), straight, token + lane, s[u]);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        s[u][r] = at < end_step ? s[u][r] : -INFINITY;
        largest[r] = u ? fmaxf(largest[r], s[u][r]) : s[u][r];
      }
    }
    softmax.lift(largest, lane, &even, &odd);
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      int32_t at = step + u * SFA_DECODE_WARPS;
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        float below = s[u][r] - softmax.m[r];
        softmax.l[r] += sfa_decode_exp2(below);
        int32_t bin = __float2int_rd(s[u][r] * SFA_DROP_OCTAVE) & (SFA_DROP_BINS - 1);
        atomicAdd(&counts[(r * SFA_DROP_BINS + bin) * SFA_DROP_COPIES + (lane & (SFA_DROP_COPIES - 1))], below >= -SFA_DROP_DEPTH);
        if (at < end_step)
          scores[r * call.drop_pitch + (int64_t)at * SFA_DECODE_STEP + lane] = s[u][r];
      }
    }
  }

#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    float l = sfa_decode_warp_sum(softmax.l[r]);
    if (lane == 0)
      sums[r * SFA_DECODE_WARPS + warp] = make_float2(softmax.m[r], l);
  }
  __syncthreads();
  if (self < ROWS) {
    float m = SFA_DECODE_NOTHING, l = 0;
    for (int w = 0; w < SFA_DECODE_WARPS; w++)
      m = fmaxf(m, sums[self * SFA_DECODE_WARPS + w].x);
    for (int w = 0; w < SFA_DECODE_WARPS; w++)
      l = fmaf(sums[self * SFA_DECODE_WARPS + w].y, sfa_decode_exp2(sums[self * SFA_DECODE_WARPS + w].x - m), l);
    call.part_sums[(pair * ROWS + self) * call.n_splits + split] = make_float2(m, l);
  }
  sfa_decode_wait_for_previous(); /* the counts are clear */
  for (int32_t i = self; i < ROWS * SFA_DROP_BINS; i += SFA_DECODE_THREADS) {
    int32_t n = 0;
    for (int copy = 0; copy < SFA_DROP_COPIES; copy++)
      n += counts[i * SFA_DROP_COPIES + copy];
    if (n)
      atomicAdd(&call.drop_counts[pair * ROWS * SFA_DROP_BINS + i], n);
  }
}

/* ---- Gather
 * ------------------------------------------------------------------------------------------------------------------------------ */

/* What a row's keys weigh and which stay: scores below the edge leave, in octaves; l in units of 2^unit. */
typedef struct sfa_drop_row {
  float edge, unit, l;
} sfa_drop_row;

/* Of row r, by one warp. */
static __device__ __forceinline__ sfa_drop_row sfa_drop_choose(const sfa_decode_call &call, const sfa_decode_span &span, int64_t row_of_all,
                                                               int32_t head, int32_t lane) {
  const float2 *parts = call.part_sums + row_of_all * call.n_splits;
  const int32_t *counts = call.drop_counts + row_of_all * SFA_DROP_BINS;
  const int each = (SFA_DROP_DEPTH * SFA_DROP_OCTAVE + SFA_DROP_OCTAVE + 31) / 32; /* bins of a lane */
  float sink = call.args.scores.sink_logit ? call.args.scores.sink_logit[head] * 1.44269504f : -INFINITY;
  float m = SFA_DECODE_NOTHING, l = 0;
  for (int32_t s = lane; s < call.n_splits; s += 32)
    m = fmaxf(m, parts[s].x);
  m = sfa_decode_warp_max(m);
  float unit = fmaxf(m, sink);
  for (int32_t s = lane; s < call.n_splits; s += 32)
    l += parts[s].y == 0 ? 0.f : parts[s].y * sfa_decode_exp2(parts[s].x - unit);
  l = sfa_decode_warp_sum(l) + sfa_decode_exp2(sink - unit);

  int32_t lowest = __float2int_rd(m * SFA_DROP_OCTAVE) - SFA_DROP_DEPTH * SFA_DROP_OCTAVE, n_of[each], n_before = 0;
  float mass[each], before = 0, budget = call.args.eps * (1 - 0x1p-10f) * l - (float)span.n_keys * 0x1p-40f * sfa_decode_exp2(m - unit);
#pragma unroll
  for (int i = 0; i < each; i++) {
    int32_t bin = lowest + lane * each + i, n = counts[bin & (SFA_DROP_BINS - 1)];
    before += (float)n * sfa_decode_exp2((float)(bin + 1) * (1.f / SFA_DROP_OCTAVE) - unit);
    n_before += n;
    mass[i] = before;
    n_of[i] = n_before;
  }
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) { /* of all lanes up to this one */
    float x = __shfl_up_sync(~0u, before, step);
    int32_t n = __shfl_up_sync(~0u, n_before, step);
    before += lane >= step ? x : 0.f;
    n_before += lane >= step ? n : 0;
  }
  int32_t n_all = __shfl_sync(~0u, n_before, 31);
  before = __shfl_up_sync(~0u, before, 1);
  n_before = __shfl_up_sync(~0u, n_before, 1);
  if (lane == 0)
    before = 0, n_before = 0;
  int32_t n_bins = 0, n_left = n_before; /* of the lane: the bins that may leave; keys in all bins up to them */
#pragma unroll
  for (int i = 0; i < each; i++)
    if (before + mass[i] <= budget && n_bins == i)
      n_bins = i + 1, n_left = n_before + n_of[i];
  int32_t stop = __ffs((int)~__ballot_sync(~0u, n_bins == each)) - 1; /* the first lane that keeps something */
  stop = stop < 0 ? 31 : stop;
  int32_t edge = lowest + stop * each + __shfl_sync(~0u, n_bins, stop);
  n_left = __shfl_sync(~0u, n_left, stop);
  bool keeps_all = !(budget > 0) || !(l < INFINITY) || (float)(n_all - n_left) > SFA_DROP_KEPT_SHARE * (float)span.n_keys;
  return {m > SFA_DECODE_NOTHING && keeps_all ? -INFINITY : (float)edge * (1.f / SFA_DROP_OCTAVE), unit, l};
}

/* Shared memory of a block: weights and queues of the warps; then the sums of the warps over it. */
template <class VALUES, int ROWS, int E> static __host__ __device__ size_t sfa_drop_gather_shared(void) {
  size_t work = (size_t)SFA_DECODE_WARPS * (VALUES::P_ROWS * VALUES::P_PITCH * 2 + SFA_DROP_QUEUE * 4 * (1 + ROWS));
  size_t join = (size_t)SFA_DECODE_WARPS * ROWS * E * sizeof(float);
  return work > join ? work : join;
}

/* Joins the parts of all splits of a pair, by one block. columns: shared memory [warps][128] */
template <int ROWS, int E>
static __device__ __forceinline__ void sfa_drop_join(const sfa_decode_call &call, const sfa_decode_span &span, int64_t pair,
                                                     const sfa_drop_row *rows, float *columns) {
  int32_t self = (int32_t)threadIdx.x, lane = self & 31, warp = self / 32;
  for (int32_t r = 0; r < ROWS; r++) {
    int32_t row = span.first_row + r;
    if (row >= call.n_rows)
      break;
    const float *out = call.part_out + pair * call.n_splits * ROWS * E + r * E, *left = call.drop_left + (pair * ROWS + r) * call.n_splits;
    float4 o = make_float4(0, 0, 0, 0);
    float gone = 0;
    for (int32_t s = lane; s < call.n_splits; s += 32)
      gone += __ldcg(left + s);
    gone = sfa_decode_warp_sum(gone);
    if (4 * lane < E) {
#pragma unroll 8
      for (int32_t s = warp; s < call.n_splits; s += SFA_DECODE_WARPS) {
        float4 x = __ldcg((const float4 *)(out + (int64_t)s * ROWS * E) + lane);
        o.x += x.x, o.y += x.y, o.z += x.z, o.w += x.w;
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

template <class VALUES, int ROWS, int E>
static __global__ __launch_bounds__(SFA_DECODE_THREADS, 2) void sfa_drop_gather_kernel(const __grid_constant__ sfa_decode_call call) {
  static_assert(E <= 128, "a row of output is 32 lanes of 4");
  enum { GROUP = ROWS == 1 ? 16 : 4, VECTORS = VALUES::VECTORS, WORDS = VALUES::VECTOR_WORDS, TOGETHER = VECTORS * WORDS <= 4 ? 2 : 1 };
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ sfa_drop_row rows[ROWS];
  __shared__ float lefts[SFA_DECODE_WARPS][ROWS];
  __shared__ int32_t is_last;
  const sfa_cuda_store &v = call.args.v;
  int32_t self = (int32_t)threadIdx.x, lane = self & 31, warp = self / 32, split = (int32_t)blockIdx.x / call.n_row_blocks;
  sfa_decode_span span = sfa_decode_span_of(call, (int32_t)blockIdx.z, (int32_t)blockIdx.y, (int32_t)blockIdx.x % call.n_row_blocks);
  uint16_t *weights = (uint16_t *)shared + warp * VALUES::P_ROWS * VALUES::P_PITCH; /* [P_ROWS][32] */
  float *queued = (float *)(shared + (size_t)SFA_DECODE_WARPS * VALUES::P_ROWS * VALUES::P_PITCH * 2) + warp * SFA_DROP_QUEUE * (1 + ROWS);
  int32_t *queue = (int32_t *)(queued + ROWS * SFA_DROP_QUEUE); /* keys; queued: their weights [ROWS][QUEUE] */
  const uint32_t magic = call.magic;
  const int64_t pair = sfa_drop_pair(call, span);
  int32_t step, end_step;
  sfa_decode_split_steps(span.n_steps, call.n_splits, split, &step, &end_step);
  step += warp;
  const sfa_decode_rows value_rows = sfa_decode_rows_of(v, v.values, call.value_pitch, span.b, span.g);
  const sfa_decode_rows value_scales = sfa_decode_rows_of(v, v.scales, call.value_scale_pitch, span.b, span.g);
  const float *scores = call.drop_scores + pair * ROWS * call.drop_pitch + lane;
  for (int i = lane; i < VALUES::P_ROWS * VALUES::P_PITCH / 2; i += 32)
    ((uint32_t *)weights)[i] = 0;
  for (int i = lane; i < SFA_DROP_QUEUE; i += 32)
    queue[i] = 0;
  VALUES values;
  values.clear();
  sfa_decode_wait_for_previous();

  if (warp < ROWS) {
    sfa_drop_row row = sfa_drop_choose(call, span, pair * ROWS + warp, sfa_decode_query_of(call, span, warp).head, lane);
    if (lane == 0)
      rows[warp] = row;
  }
  __syncthreads();
  float edge[ROWS], unit[ROWS], left[ROWS]; /* left: mass of keys that leave */
#pragma unroll
  for (int r = 0; r < ROWS; r++)
    edge[r] = span.first_row + r < call.n_rows ? rows[r].edge : INFINITY, unit[r] = rows[r].unit, left[r] = 0;

  int32_t n_queued = 0, n_done = 0;
  for (; step < end_step; step += GROUP * SFA_DECODE_WARPS) {
    float s[GROUP][ROWS];
    bool some = false; /* is anything kept of these steps? Where little is kept, mostly not */
#pragma unroll
    for (int u = 0; u < GROUP; u++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        int32_t at = step + u * SFA_DECODE_WARPS;
        s[u][r] = at < end_step ? scores[r * call.drop_pitch + (int64_t)at * SFA_DECODE_STEP] : -INFINITY;
      }
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
      some |= keep && sees;
    }
    bool last = step + GROUP * SFA_DECODE_WARPS >= end_step;
    if (!__any_sync(~0u, some) && !(last && n_queued > n_done))
      continue;
#pragma unroll 1
    for (int32_t u = 0; u < GROUP; u++) {
      int32_t at = step + u * SFA_DECODE_WARPS;
      float t[ROWS];
      bool keep = false, sees = false;
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        t[r] = at < end_step ? scores[r * call.drop_pitch + (int64_t)at * SFA_DECODE_STEP] : -INFINITY;
        keep |= !(t[r] < edge[r]);
        sees |= t[r] != -INFINITY;
      }
      uint32_t kept = __ballot_sync(~0u, keep && sees);
      if (kept >> lane & 1) {
        int32_t slot = (n_queued + __popc(kept & ((1u << lane) - 1))) & (SFA_DROP_QUEUE - 1);
        queue[slot] = sfa_decode_step_token(span, at) + lane;
#pragma unroll
        for (int r = 0; r < ROWS; r++)
          queued[r * SFA_DROP_QUEUE + slot] = sfa_decode_exp2(t[r] - unit[r]);
      }
      n_queued += __popc(kept);
      int32_t enough = last && u == GROUP - 1 ? 1 : 32;
      while (n_queued - n_done >= enough) { /* the queue's next 32; what is not there weighs nothing */
        int32_t n = n_queued - n_done, from = n_done & (SFA_DROP_QUEUE - 1);
        __syncwarp();
        int32_t own = queue[from + lane];
        float scale = 1;
        if (VALUES::ELEMENT == 1)
          scale = sfa_decode_half(*(const uint16_t *)(const void *)sfa_decode_row(value_scales, sfa_decode_page(v, span.b, own), own));
#pragma unroll
        for (int half = 0; half < 2; half += TOGETHER) {
          uint32_t x[TOGETHER][VECTORS][4][WORDS];
#pragma unroll
          for (int i = 0; i < 4 * TOGETHER; i++) {
            int32_t which = (half + i / 4) * 16 + (lane & 3) * 4 + i % 4, other = queue[from + which];
            const unsigned char *row = sfa_decode_row(value_rows, sfa_decode_page(v, span.b, other), other) + lane / 4 * VALUES::VECTOR;
#pragma unroll
            for (int vector = 0; vector < VECTORS; vector++) {
              uint32_t *to = x[i / 4][vector][i % 4];
#pragma unroll
              for (int w = 0; w < WORDS; w++)
                to[w] = 0;
              if (which < n)
                sfa_decode_fetch<VALUES::VECTOR>(to, row + vector * 8 * VALUES::VECTOR);
            }
          }
          if (half == 0) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
              float p = queued[r * SFA_DROP_QUEUE + from + lane];
              sfa_decode_split(lane < n && p != 0 ? p * scale : 0.f, &weights[r * VALUES::P_PITCH + sfa_decode_weight_at(lane)],
                               &weights[(r + VALUES::P_ROWS / 2) * VALUES::P_PITCH + sfa_decode_weight_at(lane)]);
            }
            __syncwarp();
          }
#pragma unroll
          for (int i = 0; i < TOGETHER; i++) {
            uint2 hi, lo;
            VALUES::weights_of(weights, VALUES::P_PITCH, half + i, lane, &hi, &lo);
#pragma unroll
            for (int vector = 0; vector < VECTORS; vector++)
              values.add(vector, x[i][vector], hi, lo, magic);
          }
        }
        n_done += 32;
        __syncwarp();
      }
    }
  }

  float *parts = (float *)shared; /* [warps][ROWS][E] */
  __syncthreads();
#pragma unroll
  for (int m = 0; m < VALUES::M16; m++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float x = values.sums[m][i];
      if (ROWS < 8)
        x += __shfl_xor_sync(~0u, x, 2);
      int32_t row = 2 * (lane & 3) + (i & 1);
      if (row < ROWS)
        parts[(warp * ROWS + row) * E + VALUES::column(m, lane) + (i >> 1)] = x;
    }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    float x = sfa_decode_warp_sum(left[r]);
    if (lane == 0)
      lefts[warp][r] = x;
  }
  __syncthreads();
  for (int32_t i = self; i < ROWS * E; i += SFA_DECODE_THREADS) {
    float x = 0;
    for (int w = 0; w < SFA_DECODE_WARPS; w++)
      x += parts[w * ROWS * E + i];
    call.part_out[(pair * call.n_splits + split) * ROWS * E + i] = x;
  }
  if (self < ROWS) {
    float x = 0;
    for (int w = 0; w < SFA_DECODE_WARPS; w++)
      x += lefts[w][self];
    call.drop_left[(pair * ROWS + self) * call.n_splits + split] = x;
  }
  __threadfence();
  __syncthreads();
  if (self == 0)
    is_last = atomicAdd(&call.drop_tickets[pair], 1) == call.n_splits - 1;
  __syncthreads();
  if (is_last) {
    __threadfence();
    sfa_drop_join<ROWS, E>(call, span, pair, rows, parts);
  }
}

/* ---- Launch
 * ------------------------------------------------------------------------------------------------------------------------------ */

template <class KEYS, class VALUES, int ROWS, int E, int AT_ONCE>
static const char *sfa_decode_drop_launch(const sfa_decode_call *call, cudaStream_t stream) {
  void (*weigh)(sfa_decode_call) = sfa_drop_weigh_kernel<KEYS, ROWS, AT_ONCE>;
  void (*gather)(sfa_decode_call) = sfa_drop_gather_kernel<VALUES, ROWS, E>;
  int64_t n_pairs = (int64_t)call->args.n_sequences * call->args.n_kv_heads * call->n_row_blocks;
  int64_t n_words = call->drop_tickets + n_pairs - call->drop_counts;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)(call->n_splits * call->n_row_blocks), (unsigned)call->args.n_kv_heads, (unsigned)call->args.n_sequences);
  config.blockDim = dim3(SFA_DECODE_THREADS);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  sfa_drop_clear_kernel<<<(unsigned)((n_words + 2047) / 2048), 256, 0, stream>>>(call->drop_counts, n_words);
  cudaError_t error = cudaGetLastError();
  config.dynamicSmemBytes = sfa_drop_weigh_shared<KEYS, ROWS>(*call);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(weigh, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)config.dynamicSmemBytes);
  if (error == cudaSuccess)
    error = cudaLaunchKernelEx(&config, weigh, *call);
  config.dynamicSmemBytes = sfa_drop_gather_shared<VALUES, ROWS, E>();
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(gather, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)config.dynamicSmemBytes);
  if (error == cudaSuccess)
    error = cudaLaunchKernelEx(&config, gather, *call);
  return error == cudaSuccess ? NULL : cudaGetErrorString(error);
}

#endif
