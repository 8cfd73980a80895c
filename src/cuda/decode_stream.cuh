/* cuda/decode_stream.cuh: exact decode: scores and values in one pass over the keys, online softmax, parts of splits.
 *
 * A block of 8 warps takes one split (of a sequence, a kv head, up to 8 rows); warp w its steps w, w + 8, ... For each:
 *
 *     scores of its codes, which were asked for a step before; codes of the next step are asked for
 *     p = 2^(s - m), l += p (lane = key)
 *     p * scale of the value row, as bf16 hi + lo, through shared memory to mma's lanes
 *     o += p v, of values that were asked for some steps before (cp.async)
 *
 * m need not be the largest score, only within 2^8 of it: it is raised, and o and l rescaled, when a score passes it by 8 octaves, which is
 * seldom. Weights are bf16 pairs with f32's range, so that nothing is lost below m either. In steps where some row does not see some key,
 * tokens of the queries go one after the other, each with the values that it sees: what is masked cannot reach a row, NaN included.
 *
 * The warps' o and l are joined in the order of the warps, with the largest m as unit. */
#ifndef SFA_CUDA_DECODE_STREAM_CUH
#define SFA_CUDA_DECODE_STREAM_CUH

#include "base/cuda_early.cuh"
#include "cuda/decode_launch.h"
#include "cuda/decode_step.cuh"

/* Octaves by which a score may pass m. */
#define SFA_DECODE_SLACK 8.f

/* ---- A warp's values on their way ---------------------------------------------------------------------------------------------------- */

/* A ring in shared memory, filled by cp.async: of whole steps, or of half steps where rows are long. A row's 16-byte chunk c stands at
 * c ^ 2 (row / 4 mod 4): what 8 lanes read at a time, chunks g and g + 1 of rows i, 4 + i, 8 + i and 12 + i, then lies in 8 different
 * places of 128 bytes. */
template <class VALUES, int ROWS> struct sfa_decode_ring {
  enum {
    HALF = 16 * VALUES::ROW_BYTES,
    HALVES = HALF <= 2048 ? 2 : 1, /* of a slot */
    KEYS = 16 * HALVES,
    BYTES = HALVES * HALF,
    ROOM = ROWS == 8 ? 6144 : 10240, /* so that two blocks fit a multiprocessor */
    SLOTS = ROOM / BYTES < 2 ? 2 : ROOM / BYTES,
    CHUNKS = VALUES::ROW_BYTES / 16,        /* of a row */
    TURNS = HALVES * VALUES::ROW_BYTES / 32 /* of the warp's lanes, to fill a slot */
  };

  static __device__ __forceinline__ int32_t place(int32_t row, int32_t chunk) {
    return row * VALUES::ROW_BYTES + (chunk ^ (2 * (row / 4 % 4) & (CHUNKS - 1))) * 16;
  }

  /* The policy, as createpolicy writes it: evict first. What is read once leaves the L2 to page tables, parts and instructions. */
  static __device__ __forceinline__ void copy(uint32_t to, const unsigned char *from) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(0x12f0000000000000ull)
                 : "memory");
  }

  /* Asks for the rows from `token` on, part number `part` of a step; row n - 1 stands for those from n on. start: of the lane's chunk in
   * tile 0 or a page, where rows lie side by side. */
  static __device__ __forceinline__ void fetch(unsigned char *slot, const sfa_decode_rows &rows, const unsigned char *start,
                                               const unsigned char *page, int32_t token, int32_t part, int32_t n, int32_t lane) {
    uint32_t to = (uint32_t)__cvta_generic_to_shared(slot);
    if (rows.pitch == VALUES::ROW_BYTES && token + KEYS <= n) {
      const unsigned char *from = start + (size_t)page + (uint64_t)(uint32_t)(token >> 6) * (uint32_t)rows.tile_bytes + part * BYTES;
#pragma unroll
      for (int i = 0; i < TURNS; i++)
        copy(to + place((lane + 32 * i) / CHUNKS, (lane + 32 * i) % CHUNKS), from + 512 * i);
    } else {
      const unsigned char *from = sfa_decode_row(rows, page, token);
#pragma unroll 1
      for (int32_t at = lane; at < KEYS * CHUNKS; at += 32)
        copy(to + place(at / CHUNKS, at % CHUNKS), from + (int64_t)(min(at / CHUNKS, n - 1 - token) * rows.pitch) + at % CHUNKS * 16);
    }
  }
  static __device__ __forceinline__ void commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
  /* The oldest of SLOTS is there, for this lane's part. */
  static __device__ __forceinline__ void wait(void) { asm volatile("cp.async.wait_group %0;" ::"n"(SLOTS - 1) : "memory"); }

  /* Adds a half step; keys whose bit in `seen` (0..15) is 0 are taken as 0 where not all are seen. */
  static __device__ __forceinline__ void add(VALUES &values, const unsigned char *half, bool whole, uint32_t seen, const uint2 &hi,
                                             const uint2 &lo, int32_t lane, uint32_t magic) {
    int32_t g = lane / 4, t = lane & 3;
    const unsigned char *from = VALUES::VECTOR == 16 ? half + place(4 * t, g) : half + place(4 * t, g / 2) + g % 2 * 8;
#pragma unroll
    for (int vector = 0; vector < VALUES::VECTORS; vector++) {
      uint32_t x[4][VALUES::VECTOR_WORDS];
#pragma unroll
      for (int key = 0; key < 4; key++) {
        const unsigned char *row = from + key * VALUES::ROW_BYTES + vector * 128;
        if constexpr (VALUES::VECTOR == 16)
          *(uint4 *)x[key] = *(const uint4 *)row;
        else
          *(uint2 *)x[key] = *(const uint2 *)row;
      }
      if (!whole) {
#pragma unroll
        for (int key = 0; key < 4; key++)
#pragma unroll
          for (int w = 0; w < VALUES::VECTOR_WORDS; w++)
            x[key][w] = seen >> (4 * t + key) & 1 ? x[key][w] : 0;
      }
      values.add(vector, x, hi, lo, magic);
    }
  }
};

/* ---- Softmax ------------------------------------------------------------------------------------------------------------------------- */

/* One warp's rows: units, sums of weights (of the lane's keys), weights of a step on their way to mma's lanes. */
template <int ROWS> struct sfa_decode_softmax {
  float m[ROWS], l[ROWS];

  __device__ __forceinline__ void clear(void) {
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      m[r] = SFA_DECODE_NOTHING, l[r] = 0;
  }

  /* Raises m where a score of the warp's 32 keys asks for it; `even` and `odd`: what columns 2 t and 2 t + 1 of o are to be multiplied
   * with. Returns whether anything was raised. */
  __device__ __forceinline__ bool lift(const float *s, int32_t lane, float *even, float *odd) {
    bool over = false;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      over |= s[r] > m[r] + SFA_DECODE_SLACK;
    if (!__any_sync(~0u, over))
      return false;
    *even = *odd = 1;
    int32_t column = 2 * (lane & 3) & (ROWS == 8 ? 7 : 3);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float raised = fmaxf(m[r], sfa_decode_warp_max(s[r])), factor = sfa_decode_exp2(m[r] - raised);
      m[r] = raised;
      l[r] *= factor;
      *even = column == r ? factor : *even;
      *odd = column + 1 == r ? factor : *odd;
    }
    return true;
  }
};

/* Where a warp's sum of a row's column stands in shared memory, and floats of all warps. mma's lanes hold columns 8 or 16 apart, of rows 0
 * and 2 or 1 and 3: here these lie in different banks. */
template <int ROWS, int E> static __device__ __forceinline__ int32_t sfa_decode_sum_at(int32_t warp, int32_t row, int32_t column) {
  return (warp * ROWS + row) * (E / 4 * 5 + 1) + column + column / 16 * 4;
}
template <int ROWS, int E> static constexpr size_t sfa_decode_sums_bytes = sizeof(float[SFA_DECODE_WARPS][ROWS][E / 4 * 5 + 1]);

/* The warp's o, to there. */
template <class VALUES, int ROWS, int E>
static __device__ __forceinline__ void sfa_decode_put_sums(const VALUES &values, float *out, int32_t warp, int32_t lane) {
#pragma unroll
  for (int m = 0; m < VALUES::M16; m++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float x = values.sums[m][i];
      if (ROWS < 8)
        x += __shfl_xor_sync(~0u, x, 2);
      int32_t row = 2 * (lane & 3) + (i & 1);
      if (row < ROWS)
        out[sfa_decode_sum_at<ROWS, E>(warp, row, VALUES::column(m, lane) + (i >> 1))] = x;
    }
}

/* Joins warps: every row's m, l and o [E] of the block to its part. */
template <class VALUES, int ROWS, int E>
static __device__ __forceinline__ void sfa_decode_join_warps(const sfa_decode_call &call, const sfa_decode_span &span, int32_t split,
                                                             const sfa_decode_softmax<ROWS> &softmax, VALUES &values,
                                                             unsigned char *shared) {
  int32_t lane = (int32_t)threadIdx.x & 31, warp = (int32_t)threadIdx.x / 32;
  float2 *sums = (float2 *)shared;                                        /* [warps][ROWS] */
  float *out = (float *)(shared + sizeof(float2) * SFA_DECODE_WARPS * 8); /* sfa_decode_sum_at */
  __syncthreads();
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    float l = sfa_decode_warp_sum(softmax.l[r]);
    if (lane == 0)
      sums[warp * ROWS + r] = make_float2(softmax.m[r], l);
  }
  sfa_decode_put_sums<VALUES, ROWS, E>(values, out, warp, lane);
  __syncthreads();
  for (int32_t i = (int32_t)threadIdx.x; i < ROWS * E; i += SFA_DECODE_THREADS) {
    int32_t row = i / E, at = span.first_row + row;
    if (at >= call.n_rows)
      continue;
    float m = SFA_DECODE_NOTHING, l = 0, o = 0;
    for (int w = 0; w < SFA_DECODE_WARPS; w++)
      m = fmaxf(m, sums[w * ROWS + row].x);
    for (int w = 0; w < SFA_DECODE_WARPS; w++) {
      float factor = sfa_decode_exp2(sums[w * ROWS + row].x - m);
      l = fmaf(sums[w * ROWS + row].y, factor, l);
      o = fmaf(out[sfa_decode_sum_at<ROWS, E>(w, row, i % E)], factor, o);
    }
    int64_t part = (((int64_t)span.b * call.args.n_kv_heads + span.g) * call.n_rows + at) * call.n_splits + split;
    call.part_out[part * E + i % E] = o;
    if (i % E == 0)
      call.part_sums[part] = make_float2(m, l);
  }
}

/* Shared memory of a block: table | ring, exchange, weights of each warp | queries; in the end the sums of the warps over it all. */
template <class KEYS, class VALUES, int ROWS, int E> struct sfa_decode_stream_layout {
  size_t rings, exchanges, weights, queries, all;
  __host__ __device__ sfa_decode_stream_layout(const sfa_decode_call &call) {
    rings = KEYS::table_bytes(call);
    exchanges = rings + SFA_DECODE_WARPS * (size_t)sfa_decode_ring<VALUES, ROWS>::SLOTS * sfa_decode_ring<VALUES, ROWS>::BYTES;
    weights = exchanges + SFA_DECODE_WARPS * KEYS::exchange_bytes();
    queries = weights + SFA_DECODE_WARPS * VALUES::P_ROWS * 64;
    size_t work = queries + (size_t)ROWS * call.args.head_dim * sizeof(float);
    size_t join = sizeof(float2) * SFA_DECODE_WARPS * 8 + sfa_decode_sums_bytes<ROWS, E>;
    all = work > join ? work : join;
  }
};

template <class KEYS, class VALUES, int ROWS, int E>
static __global__ __launch_bounds__(SFA_DECODE_THREADS, 2) void sfa_decode_stream_kernel(const __grid_constant__ sfa_decode_call call) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ sfa_decode_query queries_of[ROWS];
  const sfa_cuda_store &k = call.args.k, &v = call.args.v;
  const int32_t lane = (int32_t)threadIdx.x & 31, warp = (int32_t)threadIdx.x / 32, b = (int32_t)blockIdx.z;
  /* [splits][row blocks][kv heads]: what is on the GPU first then is of all heads. */
  const int32_t of_split = sfa_decode_quotient((int32_t)blockIdx.x, call.args.n_kv_heads),
                g = (int32_t)blockIdx.x - of_split * call.args.n_kv_heads;
  const int32_t split = sfa_decode_quotient(of_split, call.n_row_blocks), row_block = of_split - split * call.n_row_blocks;
  const sfa_decode_stream_layout<KEYS, VALUES, ROWS, E> layout(call);
  float *queries = (float *)(shared + layout.queries);
  typedef sfa_decode_ring<VALUES, ROWS> ring;
  unsigned char *table = shared, *slots = shared + layout.rings + warp * ring::SLOTS * ring::BYTES;
  unsigned char *exchange = shared + layout.exchanges + warp * KEYS::exchange_bytes();
  uint16_t *weights = (uint16_t *)(shared + layout.weights) + warp * VALUES::P_ROWS * VALUES::P_PITCH;

  const sfa_decode_rows key_streams[3] = {sfa_decode_rows_of(k, k.ids, call.ids_pitch, b, g),
                                          sfa_decode_rows_of(k, k.values, call.key_pitch, b, g),
                                          sfa_decode_rows_of(k, k.scales, call.key_scale_pitch, b, g)};
  const sfa_decode_rows value_rows = sfa_decode_rows_of(v, v.values, call.value_pitch, b, g);
  const sfa_decode_rows value_scales = sfa_decode_rows_of(v, v.scales, call.value_scale_pitch, b, g);
  const int32_t in_page = warp % 2 * SFA_DECODE_STEP; /* of the first token of all of the warp's steps */
  const sfa_decode_walk key_walks[3] = {sfa_decode_walk_of(key_streams[0], in_page, lane),
                                        sfa_decode_walk_of(key_streams[1], in_page, lane),
                                        sfa_decode_walk_of(key_streams[2], in_page, lane)};
  const sfa_decode_walk scale_walk = sfa_decode_walk_of(value_scales, in_page, lane);
  const unsigned char *value_start = value_rows.start + in_page * value_rows.pitch + 16 * lane;
  sfa_cuda_wait_for_previous();
  /* Before all that keys and values ask of memory: behind it a row takes microseconds. */
  int32_t n_keys = call.args.n_keys[b];
  sfa_decode_load_queries(call, b, g, row_block * call.rows_of_block, ROWS, queries);
  sfa_decode_span span = sfa_decode_span_of(call, b, g, row_block, n_keys);
  int32_t step, end_step;
  sfa_decode_split_steps(span.n_steps, call.n_splits, split, &step, &end_step);
  if (step >= end_step) {
    int32_t row = span.first_row + (int32_t)threadIdx.x;
    if (threadIdx.x < ROWS && row < call.n_rows)
      call.part_sums[(((int64_t)span.b * call.args.n_kv_heads + span.g) * call.n_rows + row) * call.n_splits + split] =
          make_float2(SFA_DECODE_NOTHING, 0);
    return;
  }

  const bool straight = sfa_decode_straight(call);
  const uint32_t magic = call.magic;
  if (threadIdx.x < ROWS)
    queries_of[threadIdx.x] = sfa_decode_query_of(call, span, (int32_t)threadIdx.x);

  KEYS keys;
  VALUES values;
  sfa_decode_softmax<ROWS> softmax;
  /* Values are asked for from `ahead` on: SLOTS slots before they are used. */
  step += warp;
  int32_t token = sfa_decode_step_token(span, step), ahead_step = step, ahead_part = 0, slot = 0;
  const unsigned char *ahead_page = NULL;
  auto fetch = [&](int32_t to) {
    if (ahead_step < end_step) {
      int32_t from = sfa_decode_step_token(span, ahead_step) + ahead_part * ring::KEYS;
      if (from < span.n_keys)
        ring::fetch(slots + to * ring::BYTES, value_rows, value_start, ahead_page, from, ahead_part, span.n_keys, lane);
      if (ring::HALVES == 2 || ahead_part) {
        ahead_part = 0;
        ahead_step += SFA_DECODE_WARPS;
        if (v.pages && ahead_step < end_step)
          ahead_page = sfa_decode_page(v, span.b, sfa_decode_step_token(span, ahead_step));
      } else {
        ahead_part = 1;
      }
    }
    ring::commit();
  };
  uint16_t scale = 0; /* of the lane's row of values */
  auto load = [&](int32_t at) {
    const unsigned char *key_page = sfa_decode_page(k, span.b, at);
    int32_t over = max(at + lane - (span.n_keys - 1), 0);
    if constexpr (KEYS::WALKS)
      keys.load_from(sfa_decode_walk_to(key_walks[0], key_page, at, over), sfa_decode_walk_to(key_walks[1], key_page, at, over),
                     sfa_decode_walk_to(key_walks[2], key_page, at, over));
    else
      keys.load(call, key_streams, key_page, at, span.n_keys, lane);
    if (VALUES::ELEMENT == 1)
      scale = __ldcs((const uint16_t *)(const void *)sfa_decode_walk_to(scale_walk, sfa_decode_page(v, span.b, at), at, over));
  };
  if (step < end_step) {
    load(token);
    ahead_page = sfa_decode_page(v, span.b, token);
    fetch(0);
  }
  for (int i = lane; i < VALUES::P_ROWS * 16; i += 32)
    ((uint32_t *)weights)[i] = 0;
  sfa_decode_cut_queries<8>(call, ROWS, queries);
  KEYS::prepare(call, queries, table);
  values.clear();
  softmax.clear();
  __syncthreads();
  /* Not before: behind the values of all blocks' first steps the keys of some would wait. */
#pragma unroll 1
  for (int32_t i = 1; i < ring::SLOTS; i++)
    fetch(i);

  for (; step < end_step; step += SFA_DECODE_WARPS) {
    const bool whole = sfa_decode_step_whole(span, token);
    int32_t key = token + lane, next_token = sfa_decode_step_token(span, step + SFA_DECODE_WARPS);
    float unit = VALUES::ELEMENT == 1 ? sfa_decode_half(scale) : 1.f;

    float s[ROWS], even, odd;
    keys.score(call, table, exchange, lane, whole && straight ? call.scale_log2 : 1.f, s);
    if (step + SFA_DECODE_WARPS < end_step)
      load(next_token);
    if (!(whole && straight))
      sfa_decode_bend_rows<ROWS>(call, span, queries_of, whole, false, key, s);
    if (softmax.lift(s, lane, &even, &odd))
      values.scale(even, odd);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      s[r] = sfa_decode_exp2(s[r] - softmax.m[r]);
      softmax.l[r] += s[r];
    }

    auto weigh = [&](int r, float p) {
      sfa_decode_split(p, &weights[r * VALUES::P_PITCH + sfa_decode_weight_at(lane)],
                       &weights[(r + VALUES::P_ROWS / 2) * VALUES::P_PITCH + sfa_decode_weight_at(lane)]);
    };
    auto add = [&](int half, bool all, uint32_t seen) {
      uint2 hi, lo;
      __syncwarp();
      VALUES::weights_of(weights, VALUES::P_PITCH, half, lane, &hi, &lo);
      ring::add(values, slots + slot * ring::BYTES + half % ring::HALVES * ring::HALF, all, seen, hi, lo, lane, magic);
    };
    if (whole) {
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        weigh(r, s[r] * unit);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (half % ring::HALVES == 0)
        ring::wait();
      if (whole) {
        add(half, true, 0);
      } else {
#pragma unroll 1
        for (int32_t t = 0; t < span.n_tokens; t++) {
          uint32_t seen = __ballot_sync(~0u, sfa_decode_sees(call, span, t, key));
#pragma unroll
          for (int r = 0; r < ROWS; r++)
            weigh(r, (seen >> lane & 1) && queries_of[r].token == t ? s[r] * unit : 0.f);
          add(half, false, seen >> 16 * half);
          __syncwarp();
        }
      }
      if (half % ring::HALVES == ring::HALVES - 1) {
        __syncwarp();
        fetch(slot);
        slot = slot + 1 == ring::SLOTS ? 0 : slot + 1;
      }
    }
    token = next_token;
  }
  sfa_decode_join_warps<VALUES, ROWS, E>(call, span, split, softmax, values, shared);
}

/* Launches an instance. */
template <class KEYS, class VALUES, int ROWS, int E>
static const char *sfa_decode_stream_launch(const sfa_decode_call *call, cudaStream_t stream) {
  size_t shared = sfa_decode_stream_layout<KEYS, VALUES, ROWS, E>(*call).all;
  cudaError_t error =
      cudaFuncSetAttribute(sfa_decode_stream_kernel<KEYS, VALUES, ROWS, E>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
  if (error != cudaSuccess)
    return cudaGetErrorString(error);
  dim3 grid((unsigned)(call->n_splits * call->n_row_blocks * call->args.n_kv_heads), 1, (unsigned)call->args.n_sequences);
  return sfa_cuda_launch_after(sfa_decode_stream_kernel<KEYS, VALUES, ROWS, E>, grid, SFA_DECODE_THREADS, shared, stream, *call);
}

#endif
