/* cuda/decode_drop.cuh: decode that leaves values out, with a certificate (docs/MATH.md 7), in two launches:
 *
 *     weigh    scores of all keys to the workspace; m and l of each split; its keys counted by score, in bins of a quarter of an octave
 *     gather   every block finds each row's edge: the highest below which the counts, taken at the bins' upper edges, weigh no more than
 *              eps l. Of its split, keys that some row keeps are queued, their rows of V fetched ahead and added; what the others weigh is
 *              added up. The last block of a kv head joins the parts of its splits, in their order
 *
 * Each is launched while what runs before it ends, and waits for that on the GPU. Bins are numbered floor(4 s) mod 256: 64 octaves. Only
 * scores within 40 octaves of the largest one that the warp has seen are counted, so the bins of the last 40 octaves below the largest of
 * all hold what belongs there, and at worst something lighter. What was not counted weighs less than n 2^-40, which is taken off the
 * budget. A split's counts are stored as bf16, rounded up. Where the counts say that more than SFA_DROP_KEPT_SHARE of the keys would stay,
 * all stay, and V is streamed. Everything is added in a fixed order: the same bits every time. */
#ifndef SFA_CUDA_DECODE_DROP_CUH
#define SFA_CUDA_DECODE_DROP_CUH

#include "cuda/decode_stream.cuh"

enum {
  SFA_DROP_OCTAVE = 4, /* bins of an octave */
  SFA_DROP_DEPTH = 40, /* octaves that are counted */
  SFA_DROP_QUEUE = 128 /* kept keys of a warp that wait for their values */
};
#define SFA_DROP_KEPT_SHARE 0.8f

/* Which of the kv heads' blocks of rows, over all sequences; n_splits blocks share it. */
static __device__ __forceinline__ int64_t sfa_drop_pair(const sfa_decode_call &call) {
  return ((int64_t)blockIdx.z * call.args.n_kv_heads + blockIdx.y) * call.n_row_blocks + blockIdx.x % call.n_row_blocks;
}

/* ---- Weigh --------------------------------------------------------------------------------------------------------------------------- */

template <class KEYS, int ROWS> static __host__ __device__ size_t sfa_drop_weigh_shared(const sfa_decode_call &call) {
  return KEYS::table_bytes(call) + sizeof(int32_t) * ROWS * SFA_DROP_BINS + sizeof(float2) * SFA_DECODE_WARPS * ROWS +
         (size_t)ROWS * call.args.head_dim * sizeof(float);
}

/* Takes scores of the warp's steps at, at + 1, ...: to m and l, to the counts, to the workspace (scores: of the lane). */
template <int ROWS, int STEPS>
static __device__ __forceinline__ void sfa_drop_take(const float (*s)[ROWS], sfa_decode_softmax<ROWS> &softmax, int32_t *counts,
                                                     float *scores, int32_t lane) {
  float largest[ROWS], even, odd;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    largest[r] = s[0][r];
#pragma unroll
    for (int u = 1; u < STEPS; u++)
      largest[r] = fmaxf(largest[r], s[u][r]);
  }
  softmax.lift(largest, lane, &even, &odd);
#pragma unroll
  for (int u = 0; u < STEPS; u++) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float below = s[u][r] - softmax.m[r];
      softmax.l[r] += sfa_decode_exp2(below);
      if (below >= -SFA_DROP_DEPTH)
        atomicAdd(&counts[r * SFA_DROP_BINS + (__float2int_rd(s[u][r] * SFA_DROP_OCTAVE) & (SFA_DROP_BINS - 1))], 1);
    }
    if constexpr (ROWS == 4)
      *(float4 *)(scores + u * SFA_DECODE_STEP * ROWS) = make_float4(s[u][0], s[u][1], s[u][2], s[u][3]);
    else
      scores[u * SFA_DECODE_STEP] = s[u][0];
  }
}

/* A warp takes AT_ONCE steps that follow each other at a time (whole pages); one by one where they are not seen by all rows. */
template <class KEYS, int ROWS, int AT_ONCE>
static __global__ __launch_bounds__(SFA_DECODE_THREADS, 2) void sfa_drop_weigh_kernel(const __grid_constant__ sfa_decode_call call) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ sfa_decode_query queries_of[ROWS];
  const sfa_cuda_store &k = call.args.k;
  int32_t self = (int32_t)threadIdx.x, lane = self & 31, warp = self / 32, split = (int32_t)blockIdx.x / call.n_row_blocks;
  sfa_cuda_wait_for_previous();
  int32_t *counts = (int32_t *)(shared + KEYS::table_bytes(call)); /* [ROWS][BINS] */
  float2 *sums = (float2 *)(counts + ROWS * SFA_DROP_BINS);
  float *queries = (float *)(sums + SFA_DECODE_WARPS * ROWS);
  int32_t n_keys = call.args.n_keys[blockIdx.z], row_block = (int32_t)blockIdx.x % call.n_row_blocks;
  sfa_decode_load_queries(call, (int32_t)blockIdx.z, (int32_t)blockIdx.y, row_block * call.rows_of_block, ROWS, queries);
  sfa_decode_cut_queries(call, ROWS, queries);
  sfa_decode_span span = sfa_decode_span_of(call, (int32_t)blockIdx.z, (int32_t)blockIdx.y, row_block, n_keys);
  const bool straight = sfa_decode_straight(call);
  const float factor = straight ? call.scale_log2 : 1.f;
  const int64_t pair = sfa_drop_pair(call);
  int32_t step, end_step;
  if (self < ROWS)
    queries_of[self] = sfa_decode_query_of(call, span, self);
  sfa_decode_split_steps(span.n_steps, call.n_splits, split, &step, &end_step);
  step += warp * AT_ONCE;

  const sfa_decode_rows streams[3] = {sfa_decode_rows_of(k, k.ids, call.ids_pitch, span.b, span.g),
                                      sfa_decode_rows_of(k, k.values, call.key_pitch, span.b, span.g),
                                      sfa_decode_rows_of(k, k.scales, call.key_scale_pitch, span.b, span.g)};
  /* The lane's row in the first page, or in any. */
  const unsigned char *ids = streams[0].start + lane * streams[0].pitch, *values = streams[1].start + lane * streams[1].pitch,
                      *scales = streams[2].start + lane * streams[2].pitch;
  KEYS keys[AT_ONCE];
  auto load = [&](int u, const unsigned char *id, const unsigned char *value, const unsigned char *scale) {
    keys[u].load_from(id, value, scale);
    keys[u + 1].load_from(id + 32 * streams[0].pitch, value + 32 * streams[1].pitch, scale + 32 * streams[2].pitch);
  };
  auto whole = [&](int32_t at) {
    int32_t token = sfa_decode_step_token(span, at);
    return at >= span.n_sink_steps && at + AT_ONCE <= end_step && token >= span.all_from &&
           token + AT_ONCE * SFA_DECODE_STEP <= span.all_end;
  };
  auto fetch = [&](int32_t at) {
    uint32_t tile = (uint32_t)sfa_decode_step_token(span, at) >> 6;
    if (k.pages) {
      unsigned char *const *pages = k.pages + span.b * k.max_pages + tile;
#pragma unroll
      for (int u = 0; u < AT_ONCE; u += 2) {
        size_t page = (size_t)pages[u / 2];
        load(u, ids + page, values + page, scales + page);
      }
    } else {
#pragma unroll
      for (int u = 0; u < AT_ONCE; u += 2)
        load(u, ids + (uint64_t)(tile + u / 2) * (uint32_t)streams[0].tile_bytes,
             values + (uint64_t)(tile + u / 2) * (uint32_t)streams[1].tile_bytes,
             scales + (uint64_t)(tile + u / 2) * (uint32_t)streams[2].tile_bytes);
    }
  };
  bool ready = whole(step);
  if (ready)
    fetch(step);
#pragma unroll 1
  for (int32_t i = self; i < ROWS * SFA_DROP_BINS; i += SFA_DECODE_THREADS)
    counts[i] = 0;
  KEYS::prepare(call, queries, shared);
  sfa_decode_softmax<ROWS> softmax;
  softmax.clear();
  __syncthreads();

  float *scores = call.drop_scores + (pair * call.drop_pitch + lane) * ROWS;
  for (; step < end_step; step += AT_ONCE * SFA_DECODE_WARPS) {
    int32_t next = step + AT_ONCE * SFA_DECODE_WARPS;
    if (ready) {
      float s[AT_ONCE][ROWS];
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++)
        keys[u].score(call, shared, NULL, lane, factor, s[u]);
      ready = whole(next);
      if (ready)
        fetch(next);
      if (!straight) {
        int32_t token = sfa_decode_step_token(span, step);
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++)
          sfa_decode_bend_rows<ROWS>(call, span, queries_of, true, false, token + u * SFA_DECODE_STEP + lane, s[u]);
      }
      sfa_drop_take<ROWS, AT_ONCE>(s, softmax, counts, scores + (int64_t)step * SFA_DECODE_STEP * ROWS, lane);
    } else {
#pragma unroll 1
      for (int32_t at = step; at < min(step + AT_ONCE, end_step); at++) {
        int32_t token = sfa_decode_step_token(span, at);
        float s[1][ROWS];
        keys[0].load(call, streams, sfa_decode_page(k, span.b, token), token, span.n_keys, lane);
        keys[0].score(call, shared, NULL, lane, 1, s[0]);
        sfa_decode_bend_rows<ROWS>(call, span, queries_of, false, straight, token + lane, s[0]);
        sfa_drop_take<ROWS, 1>(s, softmax, counts, scores + (int64_t)at * SFA_DECODE_STEP * ROWS, lane);
      }
      ready = whole(next);
      if (ready)
        fetch(next);
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
  __nv_bfloat162 *to = (__nv_bfloat162 *)call.drop_counts + (pair * call.n_splits + split) * ROWS * (SFA_DROP_BINS / 2);
#pragma unroll 1
  for (int32_t i = self; i < ROWS * SFA_DROP_BINS / 2; i += SFA_DECODE_THREADS)
    to[i] = __halves2bfloat162(__float2bfloat16_ru((float)counts[2 * i]), __float2bfloat16_ru((float)counts[2 * i + 1]));
  if (split == 0 && self == 0)
    call.drop_tickets[pair] = 0;
}

/* ---- Gather -------------------------------------------------------------------------------------------------------------------------- */

/* What a row's keys weigh and which stay: scores below the edge leave, in octaves; l in units of 2^unit. */
typedef struct sfa_drop_row {
  float edge, unit, l;
} sfa_drop_row;

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

/* The edge of a row whose largest score is m, by one warp; counts: SHARES times [BINS], `apart` floats from one to the next. */
template <int SHARES>
static __device__ __forceinline__ float sfa_drop_edge(const sfa_decode_call &call, const sfa_decode_span &span, const sfa_drop_row &row,
                                                      float m, const float *counts, int32_t apart, int32_t lane) {
  const int each = (SFA_DROP_DEPTH * SFA_DROP_OCTAVE + SFA_DROP_OCTAVE + 31) / 32; /* bins of a lane */
  int32_t lowest = __float2int_rd(m * SFA_DROP_OCTAVE) - SFA_DROP_DEPTH * SFA_DROP_OCTAVE;
  float n_before = 0, n_of[each], mass[each], before = 0;
  float budget = call.args.eps * (1 - 0x1p-10f) * row.l - (float)span.n_keys * 0x1p-40f * sfa_decode_exp2(m - row.unit);
#pragma unroll
  for (int i = 0; i < each; i++) {
    int32_t bin = lowest + lane * each + i;
    float n = 0;
#pragma unroll
    for (int share = 0; share < SHARES; share++)
      n += counts[share * apart + (bin & (SFA_DROP_BINS - 1))];
    before += n * sfa_decode_exp2((float)(bin + 1) * (1.f / SFA_DROP_OCTAVE) - row.unit);
    n_before += n;
    mass[i] = before;
    n_of[i] = n_before;
  }
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) { /* of all lanes up to this one */
    float x = __shfl_up_sync(~0u, before, step), n = __shfl_up_sync(~0u, n_before, step);
    before += lane >= step ? x : 0.f;
    n_before += lane >= step ? n : 0.f;
  }
  float n_all = __shfl_sync(~0u, n_before, 31);
  before = __shfl_up_sync(~0u, before, 1);
  n_before = __shfl_up_sync(~0u, n_before, 1);
  if (lane == 0)
    before = 0, n_before = 0;
  int32_t n_bins = 0;      /* of the lane: the bins that may leave */
  float n_left = n_before; /* keys in all bins up to them */
#pragma unroll
  for (int i = 0; i < each; i++)
    if (before + mass[i] <= budget && n_bins == i)
      n_bins = i + 1, n_left = n_before + n_of[i];
  int32_t stop = __ffs((int)~__ballot_sync(~0u, n_bins == each)) - 1; /* the first lane that keeps something */
  stop = stop < 0 ? 31 : stop;
  int32_t edge = lowest + stop * each + __shfl_sync(~0u, n_bins, stop);
  n_left = __shfl_sync(~0u, n_left, stop);
  bool keeps_all = !(budget > 0) || !(row.l < INFINITY) || n_all - n_left > SFA_DROP_KEPT_SHARE * (float)span.n_keys;
  return m > SFA_DECODE_NOTHING && keeps_all ? -INFINITY : (float)edge * (1.f / SFA_DROP_OCTAVE);
}

/* A warp's kept keys on their way, in shared memory: queued, asked for (cp.async, SLOTS slots of KEYS rows at a time), added. */
template <class VALUES, int ROWS> struct sfa_drop_queue {
  typedef sfa_decode_ring<VALUES, ROWS> ring;
  enum {
    KEYS = ring::KEYS,
    SLOTS = 2, /* (SLOTS + 1) * KEYS - 1 + 32 keys are in the queue at most */
    RINGS = SLOTS * ring::BYTES,
    WEIGHTS = VALUES::P_ROWS * VALUES::P_PITCH * 2,
    BYTES = RINGS + WEIGHTS + SFA_DROP_QUEUE * (8 + 4 + 4 * ROWS)
  };
  unsigned char *slots;
  uint16_t *weights; /* [P_ROWS][32] of the slot that is added */
  /* Of each key: where its row of values is, bit 0: in which half of a word its scale is; that word; its weights [ROWS][QUEUE]. */
  uint64_t *rows;
  uint32_t *scales;
  float *p;
  int32_t lane, n_queued, n_asked, n_done; /* since the beginning; multiples of KEYS but for n_queued */

  __device__ __forceinline__ void start(unsigned char *memory, int32_t of_lane) {
    lane = of_lane;
    n_queued = n_asked = n_done = 0;
    slots = memory;
    weights = (uint16_t *)(memory + RINGS);
    rows = (uint64_t *)(memory + RINGS + WEIGHTS);
    scales = (uint32_t *)(rows + SFA_DROP_QUEUE);
    p = (float *)(scales + SFA_DROP_QUEUE);
    for (int i = lane; i < WEIGHTS / 4; i += 32)
      ((uint32_t *)weights)[i] = 0;
  }

  /* Queues the lanes' keys whose bit in `kept` is set: their rows, their scales where they have any, their weights of_rows [ROWS]. */
  __device__ __forceinline__ void push(uint32_t kept, const unsigned char *row, const unsigned char *scale, const float *of_rows) {
    if (kept >> lane & 1) {
      int32_t place = (n_queued + __popc(kept & ((1u << lane) - 1))) & (SFA_DROP_QUEUE - 1);
      size_t at = (size_t)row;
      if (VALUES::ELEMENT == 1) {
        at |= (size_t)scale >> 1 & 1;
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((uint32_t)__cvta_generic_to_shared(scales + place)),
                     "l"((size_t)scale & ~(size_t)3)
                     : "memory");
      }
      rows[place] = at;
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        p[r * SFA_DROP_QUEUE + place] = of_rows[r];
    }
    n_queued += __popc(kept);
  }

  /* Asks for the rows of the next n, KEYS at most. */
  __device__ __forceinline__ void ask(int32_t n) {
    uint32_t to = (uint32_t)__cvta_generic_to_shared(slots + n_asked / KEYS % SLOTS * ring::BYTES);
    int32_t own = lane / ring::CHUNKS, chunk = lane % ring::CHUNKS; /* of a row */
    const uint64_t *from = rows + (n_asked & (SFA_DROP_QUEUE - 1)) + own;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < ring::TURNS; i++) {
      const int row = 32 * i / ring::CHUNKS;
      if (row + own < n)
        ring::copy(to + ring::place(row + own, chunk), (const unsigned char *)(from[row] & ~(uint64_t)1) + chunk * 16);
    }
    ring::commit();
    n_asked += KEYS;
  }

  /* Adds the oldest rows that were asked for, n of them. */
  __device__ __forceinline__ void use(int32_t n, VALUES &values, uint32_t magic) {
    const unsigned char *slot = slots + n_done / KEYS % SLOTS * ring::BYTES;
    int32_t at = (n_done & (SFA_DROP_QUEUE - 1)) + lane;
    __syncwarp();
    if (lane < KEYS) {
      float scale = VALUES::ELEMENT == 1 ? sfa_decode_half((uint16_t)(scales[at] >> (rows[at] & 1) * 16)) : 1.f;
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        float x = p[r * SFA_DROP_QUEUE + at];
        sfa_decode_split(lane < n && x != 0 ? x * scale : 0.f, &weights[r * VALUES::P_PITCH + sfa_decode_weight_at(lane)],
                         &weights[(r + VALUES::P_ROWS / 2) * VALUES::P_PITCH + sfa_decode_weight_at(lane)]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < ring::HALVES; half++) {
      uint2 hi, lo;
      VALUES::weights_of(weights, VALUES::P_PITCH, half, lane, &hi, &lo);
      ring::add(values, slot + half * ring::HALF, n == KEYS, (uint32_t)((1ull << n) - 1) >> 16 * half, hi, lo, lane, magic);
    }
    n_done += KEYS;
    __syncwarp();
  }

  /* Asks for the next n, when there is a slot for them. */
  __device__ __forceinline__ void advance(int32_t n, VALUES &values, uint32_t magic) {
    if (n_asked - n_done == SLOTS * KEYS) {
      asm volatile("cp.async.wait_group %0;" ::"n"(SLOTS - 1) : "memory");
      use(KEYS, values, magic);
    }
    ask(n);
  }

  /* Adds what is left. */
  __device__ __forceinline__ void finish(VALUES &values, uint32_t magic) {
    if (n_queued > n_asked)
      advance(n_queued - n_asked, values, magic);
    asm volatile("cp.async.wait_all;" ::: "memory");
    while (n_done < n_asked)
      use(min(n_queued - n_done, (int32_t)KEYS), values, magic);
  }
};

/* Joins the parts of all splits of a pair, by one block. columns: shared memory [warps][128] */
template <int ROWS, int E>
static __device__ __forceinline__ void sfa_drop_join(const sfa_decode_call &call, const sfa_decode_span &span, int64_t pair,
                                                     const sfa_drop_row *rows, float *columns) {
  enum { AT_ONCE = 5 };
  int32_t self = (int32_t)threadIdx.x, lane = self & 31, warp = self / 32;
#pragma unroll 1
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
#pragma unroll 1
      for (int32_t s = warp; s < call.n_splits; s += AT_ONCE * SFA_DECODE_WARPS) {
        float4 x[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
          int32_t at = s + u * SFA_DECODE_WARPS;
          x[u] = at < call.n_splits ? __ldcg((const float4 *)(out + (int64_t)at * ROWS * E) + lane) : make_float4(0, 0, 0, 0);
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
  size_t end = (size_t)SFA_DECODE_WARPS * ROWS * E * sizeof(float), work = SFA_DECODE_WARPS * sfa_drop_warp_bytes<VALUES, ROWS>;
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
  int32_t self = (int32_t)threadIdx.x, lane = self & 31, warp = self / 32, split = (int32_t)blockIdx.x / call.n_row_blocks;
  unsigned char *own = shared + warp * sfa_drop_warp_bytes<VALUES, ROWS>;
  float *stash = (float *)(own + sfa_drop_queue<VALUES, ROWS>::BYTES) + lane * ROWS; /* [GROUP][32][ROWS] */
  float *counts = (float *)shared;                                                   /* [SHARES][ROWS][BINS] */
  const uint32_t magic = call.magic;
  const int64_t pair = sfa_drop_pair(call);
  sfa_cuda_wait_for_previous();

  int32_t n_keys = call.args.n_keys[blockIdx.z];
  const float2 *parts_of = call.part_sums + (pair * ROWS + min(warp, ROWS - 1)) * call.n_splits;
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
  sfa_decode_span span =
      sfa_decode_span_of(call, (int32_t)blockIdx.z, (int32_t)blockIdx.y, (int32_t)blockIdx.x % call.n_row_blocks, n_keys);
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
    row.edge = sfa_drop_edge<SHARES>(call, span, row, m, counts + warp * SFA_DROP_BINS, ROWS * SFA_DROP_BINS, lane);
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
#pragma unroll 1
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
  __syncthreads();
  if (self == 0) { /* the barrier orders the block's writes before this fence */
    __threadfence();
    is_last = atomicAdd(&call.drop_tickets[pair], 1) == call.n_splits - 1;
    __threadfence();
  }
  __syncthreads();
  if (is_last) {
    sfa_drop_join<ROWS, E>(call, span, pair, rows, parts);
  }
}

/* ---- Launch -------------------------------------------------------------------------------------------------------------------------- */

template <class KEYS, class VALUES, int ROWS, int E, int AT_ONCE>
static const char *sfa_decode_drop_launch(const sfa_decode_call *call, cudaStream_t stream) {
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
  return refused ? refused : sfa_cuda_launch_after(gather, grid, SFA_DECODE_THREADS, gather_shared, stream, *call);
}

#endif
