/* cuda/decode_drop.cuh: decode that leaves values out, with a certificate (docs/MATH.md 7): what its two forms share.
 *
 *     weigh    scores of the keys; m and l; keys counted by score, in bins of a quarter of an octave
 *     edge     of a row: the highest below which the counts, taken at the bins' upper edges, weigh no more than eps l
 *     gather   keys that some row keeps are queued, their rows of V fetched ahead and added; what the others weigh is added up
 *
 * A long call (decode_drop_long.cuh) weighs all keys of a row before it looks for the edge, a short one (decode_drop_short.cuh) each split
 * for itself. Bins are numbered floor(4 s) mod 256: 64 octaves. Only scores within 40 octaves of the largest one that the warp has seen are
 * counted, so the bins of the last 40 octaves below the largest of all hold what belongs there, and at worst something lighter. What was
 * not counted weighs less than n 2^-40, which is taken off the budget. Where the counts say that more than SFA_DROP_KEPT_SHARE of the keys
 * would stay, all stay, and V is streamed. Everything is added in a fixed order: the same bits every time. */
#ifndef SFA_CUDA_DECODE_DROP_CUH
#define SFA_CUDA_DECODE_DROP_CUH

#include "cuda/decode_stream.cuh"

enum {
  SFA_DROP_OCTAVE = 4, /* bins of an octave */
  SFA_DROP_DEPTH = 40, /* octaves that are counted */
  SFA_DROP_QUEUE = 128 /* kept keys of a warp that wait for their values */
};
#define SFA_DROP_KEPT_SHARE 0.8f

/* Where the part of a row is that a split leaves. */
static __device__ __forceinline__ int64_t sfa_drop_part(const sfa_decode_call &call, int32_t row, int32_t split) {
  return (((int64_t)blockIdx.z * call.args.n_kv_heads + blockIdx.y) * call.n_rows + row) * call.n_splits + split;
}

/* ---- Weigh --------------------------------------------------------------------------------------------------------------------------- */

/* Shared memory of a block that weighs. */
template <class KEYS, int ROWS> struct sfa_drop_memory {
  unsigned char *table;
  int32_t *counts; /* [ROWS][BINS] */
  float2 *sums;    /* [ROWS][warps] m, l */
  float *queries;  /* [ROWS][D] */
  const sfa_decode_query *queries_of;

  __device__ __forceinline__ sfa_drop_memory(const sfa_decode_call &call, unsigned char *shared, const sfa_decode_query *of) {
    table = shared;
    counts = (int32_t *)(shared + KEYS::table_bytes(call));
    sums = (float2 *)(counts + ROWS * SFA_DROP_BINS);
    queries = (float *)(sums + SFA_DECODE_WARPS * ROWS);
    queries_of = of;
  }
};
template <class KEYS, int ROWS> static size_t sfa_drop_weigh_shared(const sfa_decode_call &call) {
  return KEYS::table_bytes(call) + sizeof(int32_t) * ROWS * SFA_DROP_BINS + sizeof(float2) * SFA_DECODE_WARPS * ROWS +
         (size_t)ROWS * call.args.head_dim * sizeof(float);
}

/* Takes scores of the warp's steps at, at + 1, ...: to m and l, to the counts, to scores, which are the lane's. */
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

/* Scores of the steps first_step .. end_step - 1, whose queries are loaded, by all warps: the lane's to `to`, `turn` numbers farther after
 * every AT_ONCE steps of the warp, which follow each other (whole pages); one by one where they are not seen by all rows. Leaves sums and
 * counts; a barrier follows. */
template <class KEYS, int ROWS, int AT_ONCE>
static __device__ __forceinline__ void sfa_drop_weigh(const sfa_decode_call &call, const sfa_decode_span &span,
                                                      const sfa_drop_memory<KEYS, ROWS> &memory, int32_t first_step, int32_t end_step,
                                                      float *to, int32_t turn) {
  const sfa_cuda_store &k = call.args.k;
  int32_t self = (int32_t)threadIdx.x, lane = self & 31, warp = self / 32, step = first_step + warp * AT_ONCE;
  const bool straight = sfa_decode_straight(call);
  const float factor = straight ? call.scale_log2 : 1.f;
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
    memory.counts[i] = 0;
  sfa_decode_cut_queries<8>(call, ROWS, memory.queries);
  KEYS::prepare(call, memory.queries, memory.table);
  sfa_decode_softmax<ROWS> softmax;
  softmax.clear();
  __syncthreads();

  for (; step < end_step; step += AT_ONCE * SFA_DECODE_WARPS, to += turn) {
    int32_t next = step + AT_ONCE * SFA_DECODE_WARPS;
    if (ready) {
      float s[AT_ONCE][ROWS];
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++)
        keys[u].score(call, memory.table, NULL, lane, factor, s[u]);
      ready = whole(next);
      if (ready)
        fetch(next);
      if (!straight) {
        int32_t token = sfa_decode_step_token(span, step);
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++)
          sfa_decode_bend_rows<ROWS>(call, span, memory.queries_of, true, false, token + u * SFA_DECODE_STEP + lane, s[u]);
      }
      sfa_drop_take<ROWS, AT_ONCE>(s, softmax, memory.counts, to, lane);
    } else {
#pragma unroll 1
      for (int32_t at = step; at < min(step + AT_ONCE, end_step); at++) {
        int32_t token = sfa_decode_step_token(span, at);
        float s[1][ROWS];
        keys[0].load(call, streams, sfa_decode_page(k, span.b, token), token, span.n_keys, lane);
        keys[0].score(call, memory.table, NULL, lane, 1, s[0]);
        sfa_decode_bend_rows<ROWS>(call, span, memory.queries_of, false, straight, token + lane, s[0]);
        sfa_drop_take<ROWS, 1>(s, softmax, memory.counts, to + (at - step) * SFA_DECODE_STEP * ROWS, lane);
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
      memory.sums[r * SFA_DECODE_WARPS + warp] = make_float2(softmax.m[r], l);
  }
  __syncthreads();
}

/* ---- Edge -----------------------------------------------------------------------------------------------------------------------------
 */

/* What a row's keys weigh and which stay: scores below the edge leave, in octaves; l in units of 2^unit. */
typedef struct sfa_drop_row {
  float edge, unit, l;
} sfa_drop_row;

/* The edge of a row whose largest score is m, by one warp; counts: SHARES times [BINS], `apart` floats from one to the next. */
template <int SHARES, class COUNT>
static __device__ __forceinline__ float sfa_drop_edge(const sfa_decode_call &call, float n_keys, const sfa_drop_row &row, float m,
                                                      const COUNT *counts, int32_t apart, int32_t lane) {
  const int each = (SFA_DROP_DEPTH * SFA_DROP_OCTAVE + SFA_DROP_OCTAVE + 31) / 32; /* bins of a lane */
  int32_t lowest = __float2int_rd(m * SFA_DROP_OCTAVE) - SFA_DROP_DEPTH * SFA_DROP_OCTAVE;
  float n_before = 0, n_of[each], mass[each], before = 0;
  float budget = call.args.eps * (1 - 0x1p-10f) * row.l - n_keys * 0x1p-40f * sfa_decode_exp2(m - row.unit);
#pragma unroll
  for (int i = 0; i < each; i++) {
    int32_t bin = lowest + lane * each + i;
    float n = 0;
#pragma unroll
    for (int share = 0; share < SHARES; share++)
      n += (float)counts[share * apart + (bin & (SFA_DROP_BINS - 1))];
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
  bool keeps_all = !(budget > 0) || !(row.l < INFINITY) || n_all - n_left > SFA_DROP_KEPT_SHARE * n_keys;
  return m > SFA_DECODE_NOTHING && keeps_all ? -INFINITY : (float)edge * (1.f / SFA_DROP_OCTAVE);
}

/* ---- Gather ---------------------------------------------------------------------------------------------------------------------------
 */

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

/* The block's part of each row: o of its warps, and what they left out. shared: sfa_decode_sum_at, lefts: [warps][ROWS] */
template <class VALUES, int ROWS, int E>
static __device__ __forceinline__ void sfa_drop_leave(const sfa_decode_call &call, const sfa_decode_span &span, int64_t part,
                                                      const VALUES &values, const float *left, float *shared, float (*lefts)[ROWS]) {
  int32_t self = (int32_t)threadIdx.x, lane = self & 31, warp = self / 32;
  __syncthreads();
  sfa_decode_put_sums<VALUES, ROWS, E>(values, shared, warp, lane);
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
      x += shared[sfa_decode_sum_at<ROWS, E>(w, i / E, i % E)];
    if (span.first_row + i / E < call.n_rows)
      call.part_out[(part + i / E * call.n_splits) * E + i % E] = x;
  }
  if (self < ROWS && span.first_row + self < call.n_rows) {
    float x = 0;
    for (int w = 0; w < SFA_DECODE_WARPS; w++)
      x += lefts[w][self];
    call.drop_left[part + self * call.n_splits] = x;
  }
}

#endif
