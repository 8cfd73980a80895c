/* cuda/prefill_sm90.cuh: attention of many queries on sm_90a, one block for 128 or 192 query rows of a head.
 *
 *     s_ij = softmax_scale q_i . k_j     (softcap, alibi, masks)        o_i = sum_j 2^(s_ij - m_i) v_j / sum_j 2^(s_ij - m_i)
 *
 * Warpgroup 0 loads: the block's query rows once, then key and value tiles into a ring of STAGES, by the copy engine from the rows as they
 * lie; what is beyond head_dim or beyond the last token arrives as zeros, so any head_dim up to WIDTH runs as WIDTH. Each other warpgroup
 * owns 64 rows and goes over the tiles, from the last key to the first (under a causal mask the ragged tiles come first), then over the
 * tiles of the sink tokens left of a window:
 *
 *     scores(j) starts; values(j - 1) starts; scores(j) ends; softmax(j), while values(j - 1) runs; values(j - 1) ends; O *= change of m
 *
 * Named barriers make the warpgroups take turns to start products, so that one's softmax runs under another's products. m_i need not be
 * the maximum: it moves there only once a score lies more than ROOM above it, which is rare after the first tiles, so that hardly a tile
 * waits for its lanes to agree on one.
 *
 * What is multiplied (POLICY):
 *     BF16     rows as they are
 *     INT8     int8 rows: exact sums, times the tile's scale (sfa_prefill_level); the query's goes into softmax_scale
 *     SP_...   queries as a sparse operand, at most two of each four adjacent features, with half the products. Rows where a group
 *              of four holds more come first in a block (order_rows), and the consumers that get such take their rows as they are:
 *              the result is exact whatever the rows hold, and most consumers take the fast way
 *
 * Rows of a group of heads that share keys may be packed into one block (row = token * pack + head), which fills it where queries are few.
 */
#ifndef SFA_PREFILL_SM90_CUH
#define SFA_PREFILL_SM90_CUH

#include <math_constants.h>

#include "cuda/prefill_sm90_tiles.cuh"
#include "cuda/wgmma.cuh"

/* ---- Sparse queries -------------------------------------------------------------------------------------------------------------- */

/* 8 bytes of a query row, one group of bf16 or two of int8, as 4 bytes of the operand and 4 or 8 bits of places. A group's two are its
 * entries that are not 0, in rising order; one alone has a zero beside it, and is the second of the two if it is entry 3. */
struct sfa_piece {
  uint32_t values, places, is_full; /* is_full: a group holds more than two */
};
template <bool INT8> static __device__ __forceinline__ sfa_piece sfa_prefill_piece(uint2 x) {
  constexpr int BITS = INT8 ? 8 : 16;
  constexpr uint32_t ONES = (1u << BITS) - 1;
  sfa_piece piece = {0, 0, 0};
#pragma unroll
  for (int i = 0; i < (INT8 ? 2 : 1); i++) {
    const uint64_t group = INT8 ? (i ? x.y : x.x) : (uint64_t)x.y << 32 | x.x;
    uint32_t mask = 0;
#pragma unroll
    for (int u = 0; u < 4; u++)
      mask |= (group >> BITS * u & (INT8 ? 0xFF : 0x7FFF)) != 0 ? 1u << u : 0;
    const uint32_t others = mask & (mask - 1);
    const int first = __ffs(mask) - 1, low = others || (mask && first < 3) ? first : 0, high = others ? __ffs(others) - 1 : 3;
    const uint32_t value = (mask >> low & 1 ? (uint32_t)(group >> BITS * low) & ONES : 0) |
                           (mask >> high & 1 ? (uint32_t)(group >> BITS * high) & ONES : 0) << BITS;
    piece.values |= value << 16 * i;
    piece.places |= (uint32_t)(low | high << 2) << 4 * i;
    piece.is_full |= others & (others - 1);
  }
  return piece;
}

/* The places of a step's four pieces (rows g, g + 8 at bytes 8 c.., then at bytes 32 + 8 c..) as lane c of the quad gives them. */
template <bool INT8> static __device__ __forceinline__ uint32_t sfa_prefill_places(const uint32_t (&places)[4], int c) {
  uint32_t word[4];
  if (INT8) { /* row g low half, row g + 8 low half, row g high half, row g + 8 high half */
#pragma unroll
    for (int i = 0; i < 4; i++)
      word[i] = places[i] << 8 * c;
  } else {
    word[0] = places[0] << 4 * c | places[1] << (16 + 4 * c);
    word[1] = places[2] << 4 * c | places[3] << (16 + 4 * c);
    word[2] = word[3] = 0;
  }
#pragma unroll
  for (int i = 0; i < (INT8 ? 4 : 2); i++) {
    word[i] |= __shfl_xor_sync(~0u, word[i], 1);
    word[i] |= __shfl_xor_sync(~0u, word[i], 2);
  }
  if (INT8)
    return c == 0 ? word[0] : c == 1 ? word[1] : c == 2 ? word[2] : word[3];
  return c & 1 ? word[1] : word[0];
}

/* Byte `byte` of row `row` of the block's queries. */
template <class TILE> static __device__ __forceinline__ uint32_t sfa_prefill_at(uint32_t shared, int row, int byte) {
  return shared + byte / 128 * (TILE::ROWS * 128) + row * 128 + ((byte % 128) ^ (row & 7) << 4);
}

/* Fills ORDER_AT: rows where a group of four holds more than two, then the others, both in rising order; and N_FULL_AT. */
template <class TILE> static __device__ __forceinline__ void sfa_prefill_order_rows(uint32_t shared) {
  const uint32_t order = shared + TILE::ORDER_AT;
  const int lane = threadIdx.x & 31, warp = (int)(threadIdx.x >> 5) - 4;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = warp * 16 + 8 * r + (lane >> 2);
    uint32_t is_full = 0;
#pragma unroll
    for (int byte = 0; byte < TILE::ROW_BYTES; byte += 32)
      is_full |= sfa_prefill_piece<TILE::INT8>(sfa_shared_load2(sfa_prefill_at<TILE>(shared, row, byte + 8 * (lane & 3)))).is_full;
    const uint32_t of_rows = __ballot_sync(~0u, is_full != 0);
    if ((lane & 3) == 0)
      sfa_shared_store(order + 4 * row, of_rows >> lane & 15);
  }
  sfa_named_sync(SFA_PREFILL_ALL, 128 * TILE::CONSUMERS);
  if (warp == 0) {
    uint32_t flags[TILE::ROWS / 32];
    int next = 0, next_other = 0;
#pragma unroll
    for (int i = 0; i < TILE::ROWS / 32; i++) {
      flags[i] = __ballot_sync(~0u, sfa_shared_load(order + 4 * (32 * i + lane)) != 0);
      next_other += __popc(flags[i]);
    }
    __syncwarp(); /* all have read: what follows writes there */
    sfa_shared_store(shared + TILE::N_FULL_AT, (uint32_t)next_other);
#pragma unroll
    for (int i = 0; i < TILE::ROWS / 32; i++) {
      const int before = __popc(flags[i] & ((1u << lane) - 1)), n = __popc(flags[i]);
      sfa_shared_store(order + 4 * (flags[i] >> lane & 1 ? next + before : next_other + lane - before), 32 * i + lane);
      next += n;
      next_other += 32 - n;
    }
  }
  sfa_named_sync(SFA_PREFILL_ALL, 128 * TILE::CONSUMERS);
}

/* The queries of a consumer: a sparse operand in registers or in shared memory; where a row does not fit one, the rows as they are. */
template <class TILE> struct sfa_prefill_queries {
  uint32_t a[TILE::REGISTER_QUERIES ? TILE::STEPS : 1][4], places[TILE::SPARSE ? TILE::STEPS : 1];
  int is_dense;

  /* From the block's rows in shared memory, which are overwritten by what products read there. */
  __device__ __forceinline__ void build(uint32_t shared, int consumer) {
    const int lane = threadIdx.x & 31, c = lane & 3, row = (int)(threadIdx.x >> 5) * 16 - 64 + (lane >> 2);
    const uint32_t order = shared + TILE::ORDER_AT;
    const int from[2] = {(int)sfa_shared_load(order + 4 * row), (int)sfa_shared_load(order + 4 * (row + 8))};
    uint2 x[TILE::STEPS][4]; /* row + 8 (i & 1), bytes 64 step + 32 (i >> 1) + 8 c */
#pragma unroll
    for (int step = 0; step < TILE::STEPS; step++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        x[step][i] = sfa_shared_load2(sfa_prefill_at<TILE>(shared, from[i & 1], 64 * step + 32 * (i >> 1) + 8 * c));
    is_dense = 64 * consumer < (int)sfa_shared_load(shared + TILE::N_FULL_AT);
    sfa_named_sync(SFA_PREFILL_ALL, 128 * TILE::CONSUMERS); /* all have read their rows */
#pragma unroll
    for (int step = 0; step < TILE::STEPS; step++) {
      uint32_t place[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int to = row + 8 * (i & 1);
        const sfa_piece piece = sfa_prefill_piece<TILE::INT8>(x[step][i]);
        place[i] = piece.places;
        if constexpr (TILE::REGISTER_QUERIES)
          a[step][i] = piece.values;
        if (is_dense)
          sfa_shared_store2(sfa_prefill_at<TILE>(shared, to, 64 * step + 32 * (i >> 1) + 8 * c), x[step][i]);
        else if constexpr (!TILE::REGISTER_QUERIES)
          sfa_shared_store(sfa_prefill_at<TILE>(shared, to, 32 * step + 16 * (i >> 1) + 4 * c), piece.values);
      }
      places[step] = sfa_prefill_places<TILE::INT8>(place, c);
    }
    sfa_shared_publish();
    sfa_named_sync(SFA_PREFILL_ALL, 128 * TILE::CONSUMERS);
  }
};

/* ---- A consumer ------------------------------------------------------------------------------------------------------------------ */

/* All products of a tile of scores, started. */
template <class TILE, bool SPARSE, class SUMS>
static __device__ __forceinline__ void sfa_prefill_products(SUMS &s, const sfa_prefill_queries<TILE> &queries, uint64_t q, uint64_t k) {
  constexpr int K_STEP = SPARSE ? 64 : 32; /* bytes of a key row that a product takes */
  sfa_matrix_fence();
#pragma unroll
  for (int step = 0; step < TILE::ROW_BYTES / K_STEP; step++) {
    const int q_byte = step * 32, k_byte = step * K_STEP;
    const uint64_t a = sfa_operand_at(q, q_byte / 128 * (TILE::ROWS * 128) + q_byte % 128);
    const uint64_t b = sfa_operand_at(k, k_byte / 128 * (TILE::KEYS * 128) + k_byte % 128);
    if constexpr (!SPARSE && TILE::INT8)
      sfa_product_int8(s, a, b, step > 0);
    else if constexpr (!SPARSE)
      sfa_product_bf16(s, a, b, step > 0);
    else if constexpr (TILE::REGISTER_QUERIES)
      sfa_product_sparse(s, queries.a[step], queries.places[step], b, step > 0);
    else
      sfa_product_sparse(s, a, queries.places[step], b, step > 0);
  }
  sfa_matrix_commit();
}

/* The two rows of a thread: weights are 2^(scale s - base). Before a key is seen base is LOWEST: finite, so that 2^(-inf - base) is 0. */
struct sfa_prefill_rows {
  float base[2], sum[2], scale[2]; /* sum: of the weights of this thread's columns */
  float change[2];                 /* by the last tile that moved a base: factor of the older weights */
};
#define SFA_PREFILL_LOWEST (-0x1p127f)

/* Row 0 or 1 of this thread: its place in the block, token, head. Registers are short in the loop over tiles: what only some tiles and
 * the end need is computed there again, from the block's place in shared memory; the volatile read keeps the compiler from doing it once.
 */
struct sfa_prefill_row {
  int32_t in_block, t, head;
};
template <class TILE>
static __device__ __forceinline__ sfa_prefill_row sfa_prefill_row_at(const sfa_prefill_job &job, const sfa_prefill_span &at,
                                                                     uint32_t shared, int r) {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  sfa_prefill_row row;
  row.in_block = (int32_t)((thread >> 5) - 4) * 16 + (int32_t)(thread >> 2 & 7) + 8 * r;
  if constexpr (TILE::SPARSE)
    row.in_block = (int32_t)sfa_shared_load(shared + TILE::ORDER_AT + 4 * row.in_block);
  row.t = at.t0 + row.in_block / job.pack;
  row.head = at.head + row.in_block % job.pack;
  return row;
}
static __device__ __forceinline__ float sfa_prefill_natural(const sfa_prefill_job &job, const sfa_prefill_span &at,
                                                            const sfa_prefill_row &row, bool int8) {
  if (!int8)
    return job.softmax_scale;
  const float scale = job.q_scales[(int64_t)(at.first_q + min(row.t, at.n_q - 1)) * job.n_heads + row.head];
  return job.softmax_scale * (scale == 0 ? 1 : scale); /* 0: all sums of the row are 0, whatever they are multiplied by */
}

/* Sums of products to scores, in powers of two. first: key of the thread's first column. */
template <class TILE>
static __device__ __forceinline__ void sfa_prefill_shape(float (&s)[TILE::KEYS / 2], const sfa_prefill_job &job, uint32_t shared,
                                                         int32_t first) {
  const sfa_prefill_span at = sfa_prefill_recall(shared + TILE::SPAN_AT);
  const float cap = job.softcap, inner = 2 * CUDART_L2E_F / cap;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const sfa_prefill_row row = sfa_prefill_row_at<TILE>(job, at, shared, r);
    const float natural = sfa_prefill_natural(job, at, row, TILE::INT8), slope = job.alibi_slopes ? job.alibi_slopes[row.head] : 0;
    const int32_t distance = first - (row.t + at.shift);
#pragma unroll
    for (int i = 0; i < TILE::KEYS / 4; i++)
      s[4 * (i >> 1) + 2 * r + (i & 1)] *= natural;
    if (cap != 0) /* tanh y = 1 - 2 / (1 + e^2y) */
#pragma unroll
      for (int i = 0; i < TILE::KEYS / 4; i++) {
        float &x = s[4 * (i >> 1) + 2 * r + (i & 1)];
        x = cap - __fdividef(2 * cap, 1 + sfa_exp2(x * inner));
      }
#pragma unroll
    for (int i = 0; i < TILE::KEYS / 4; i++) {
      float &x = s[4 * (i >> 1) + 2 * r + (i & 1)];
      x = fmaf(slope, (float)(distance + 8 * (i >> 1) + (i & 1)), x) * CUDART_L2E_F;
    }
  }
}

template <class TILE>
static __device__ __forceinline__ void sfa_prefill_mask(float (&s)[TILE::KEYS / 2], const sfa_prefill_job &job, uint32_t shared,
                                                        int32_t first) {
  const sfa_prefill_span at = sfa_prefill_recall(shared + TILE::SPAN_AT);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int32_t t = min(sfa_prefill_row_at<TILE>(job, at, shared, r).t, at.n_q - 1);
    const int32_t begin = sfa_prefill_begin(job, at, t) - first, end = sfa_prefill_end(job, at, t) - first,
                  sinks = min(job.n_sink_tokens - first, end);
#pragma unroll
    for (int i = 0; i < TILE::KEYS / 4; i++) {
      const int column = 8 * (i >> 1) + (i & 1);
      if (!(column < end && (column >= begin || column < sinks)))
        s[4 * (i >> 1) + 2 * r + (i & 1)] = -CUDART_INF_F;
    }
  }
}

static __device__ __forceinline__ float sfa_prefill_most(float a, float b, float c) { return fmaxf(a, fmaxf(b, c)); }
static __device__ __forceinline__ int32_t sfa_prefill_most(int32_t a, int32_t b, int32_t c) { return __vimax3_s32(a, b, c); }

/* Weights of scores x * unit: f32, or whole sums of a tile that no mask touches. Returns whether a base of the warp's rows moved, which it
 * does to a weight above 2^ROOM: each row by its own scores alone. ROOM is 1 since the weight at the base is 1 and not rounded when it
 * meets the values: a larger one would cost where few keys have most of a row's weight. */
template <class TILE, class SCORE>
static __device__ __forceinline__ bool sfa_prefill_softmax(float (&weights)[TILE::KEYS / 2], const SCORE (&x)[TILE::KEYS / 2], float unit,
                                                           sfa_prefill_rows &rows) {
  constexpr float ROOM = 1;
  SCORE most[2] = {x[0], x[2]};
#pragma unroll
  for (int i = 0; i < TILE::KEYS / 2; i += 2)
    most[i >> 1 & 1] = sfa_prefill_most(most[i >> 1 & 1], x[i], x[i + 1]);
  float factor[2], top[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    factor[r] = rows.scale[r] * unit;
    top[r] = (float)most[r] * factor[r];
  }
  const bool moves = __any_sync(~0u, top[0] - rows.base[0] > ROOM || top[1] - rows.base[1] > ROOM);
  if (moves) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
      const float base = top[r] - rows.base[r] > ROOM ? top[r] : rows.base[r];
      rows.change[r] = sfa_exp2(rows.base[r] - base);
      rows.base[r] = base;
      rows.sum[r] *= rows.change[r];
    }
  }
#pragma unroll
  for (int i = 0; i < TILE::KEYS / 2; i++)
    weights[i] = sfa_exp2(fmaf((float)x[i], factor[i >> 1 & 1], -rows.base[i >> 1 & 1]));
#pragma unroll
  for (int i = 0; i < TILE::KEYS / 2; i += 2)
    rows.sum[i >> 1 & 1] += weights[i] + weights[i + 1];
  return moves;
}

template <class TILE, int WIDTH>
static __device__ __forceinline__ void sfa_prefill_consume(const sfa_prefill_job &job, const sfa_prefill_span &at,
                                                           const sfa_prefill_tiles &tiles, uint32_t shared) {
  constexpr int KEYS = TILE::KEYS, STAGES = TILE::STAGES;
  const int consumer = __shfl_sync(~0u, (int)(threadIdx.x >> 7) - 1, 0), lane = threadIdx.x & 31, c = lane & 3;
  const uint32_t q_there = shared + TILE::BARRIERS_AT, k_there = q_there + 16, k_used = k_there + 8 * STAGES, v_there = k_used + 8 * STAGES,
                 v_used = v_there + 8 * STAGES;

  sfa_barrier_wait(q_there, 0);
  sfa_prefill_queries<TILE> queries;
  if constexpr (TILE::SPARSE) {
    sfa_prefill_order_rows<TILE>(shared);
    queries.build(shared, consumer);
  } else
    queries.is_dense = 1;
  const uint64_t q = sfa_operand(shared + consumer * 64 * 128);

  /* Tiles that every row of this consumer sees whole: keys [all_begin, all_end). The rows of a sparse one may be any of the block. */
  const int32_t low = TILE::SPARSE ? 0 : consumer * 64, high = TILE::SPARSE ? TILE::ROWS - 1 : low + 63;
  const int32_t all_begin = sfa_prefill_begin(job, at, min(at.t0 + high / job.pack, at.n_q - 1)),
                all_end = sfa_prefill_end(job, at, min(at.t0 + low / job.pack, at.n_q - 1));
  sfa_prefill_rows rows;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    rows.base[r] = SFA_PREFILL_LOWEST;
    rows.sum[r] = 0;
    rows.scale[r] = job.shaped ? 1 : sfa_prefill_natural(job, at, sfa_prefill_row_at<TILE>(job, at, shared, r), TILE::INT8) * CUDART_L2E_F;
  }
  float o[WIDTH / 2], s[KEYS / 2];
  int32_t sums[TILE::INT8 ? KEYS / 2 : 1];
  uint32_t p[KEYS / 4];
#pragma unroll
  for (int i = 0; i < WIDTH / 2; i++)
    o[i] = 0;
#pragma unroll
  for (int i = 0; i < (TILE::INT8 ? KEYS / 2 : 0); i++)
    sums[i] = 0;

  const auto start_scores = [&](int stage) {
    const uint64_t k = sfa_operand(shared + TILE::K_AT + stage * TILE::K_BYTES);
    const auto start = [&](auto &to) {
      if (TILE::SPARSE && !queries.is_dense)
        sfa_prefill_products<TILE, TILE::SPARSE>(to, queries, q, k);
      else
        sfa_prefill_products<TILE, false>(to, queries, q, k);
    };
    if constexpr (TILE::INT8)
      start(sums);
    else
      start(s);
  };
  const auto start_values = [&](int stage) {
    const uint64_t v = sfa_operand_turned(shared + TILE::V_AT + stage * TILE::V_BYTES, KEYS * 128);
    sfa_matrix_fence();
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++)
      sfa_product_turned(o, p + 4 * i, sfa_operand_at(v, i * 16 * 128));
    sfa_matrix_commit();
  };
  const auto softmax = [&](int stage, int32_t first) {
    const bool masked = first < all_begin || first + KEYS > all_end;
    if constexpr (TILE::INT8) {
      const float unit = __uint_as_float(sfa_shared_load(shared + TILE::SCALES_AT + stage * TILE::SCALE_BYTES));
      sfa_barrier_arrive(k_used + 8 * stage); /* each thread: each has read */
      if (!job.shaped && !masked)
        return sfa_prefill_softmax<TILE>(s, sums, unit, rows);
#pragma unroll
      for (int i = 0; i < KEYS / 2; i++)
        s[i] = (float)sums[i] * unit;
    } else if (lane == 0)
      sfa_barrier_arrive(k_used + 8 * stage);
    if (job.shaped)
      sfa_prefill_shape<TILE>(s, job, shared, first + 2 * c);
    if (masked)
      sfa_prefill_mask<TILE>(s, job, shared, first + 2 * c);
    return sfa_prefill_softmax<TILE>(s, s, 1, rows);
  };
  const auto round_weights = [&] {
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++)
      p[i] = sfa_bf16_pair(s[2 * i], s[2 * i + 1]);
    if constexpr (TILE::INT8) { /* sums may take the registers of s: the first product of a tile overwrites them, which the compiler can't
                                   know */
#pragma unroll
      for (int i = 0; i < KEYS / 2; i++)
        sums[i] = __float_as_int(s[i]);
    }
  };

  const int32_t n = tiles.n();
  if (n > 0) {
    if (consumer == TILE::CONSUMERS - 1)
      sfa_named_arrive(SFA_PREFILL_TURN, 256);
    int stage = 0; /* of the newest tile of scores; `before` of the values that are added meanwhile */
    uint32_t parity = 0;
    int32_t first = tiles.at(0) * KEYS;
    sfa_barrier_wait(k_there, 0);
    start_scores(0);
    sfa_matrix_wait<0>();
    softmax(0, first);
    round_weights();
    if (n > 1)
      sfa_barrier_wait(k_there + 8, 0);
    for (int32_t j = 1; j < n; j++) {
      const int before = stage;
      const uint32_t before_parity = parity;
      if (++stage == STAGES) {
        stage = 0;
        parity ^= 1;
      }
      first = j == tiles.n_main ? (tiles.n_sinks - 1) * KEYS : first - KEYS;
      sfa_named_sync(SFA_PREFILL_TURN + consumer, 256);
      start_scores(stage);
      sfa_barrier_wait(v_there + 8 * before, before_parity);
      start_values(before);
      sfa_named_arrive(SFA_PREFILL_TURN + (consumer + 1) % TILE::CONSUMERS, 256);
      sfa_matrix_wait<1>();
      const bool moved = softmax(stage, first);
      /* All warps wait for the products in one place, as PTX demands, and behind the softmax: the compiler moves such a wait up to the
       * last place where code branches, and the loop that waits for the next tile's keys is one. */
      if (j + 1 < n)
        sfa_barrier_wait(k_there + (stage + 1 == STAGES ? 0 : 8 * (stage + 1)), parity ^ (stage + 1 == STAGES));
      sfa_matrix_wait<0>();
      if (moved)
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++)
          o[i] *= rows.change[i >> 1 & 1];
      if (lane == 0)
        sfa_barrier_arrive(v_used + 8 * before);
      round_weights();
    }
    sfa_barrier_wait(v_there + 8 * stage, parity);
    start_values(stage);
    sfa_matrix_wait<0>();
    if (consumer == 0)
      sfa_named_sync(SFA_PREFILL_TURN, 256); /* the last one's arrival, so that none is left over */
  }

  const sfa_prefill_span place = sfa_prefill_recall(shared + TILE::SPAN_AT);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float sum = rows.sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const sfa_prefill_row row = sfa_prefill_row_at<TILE>(job, place, shared, r);
    if (row.in_block >= job.pack * job.block_tokens || row.t >= place.n_q)
      continue;
    const float most = rows.base[r] == SFA_PREFILL_LOWEST ? -CUDART_INF_F : rows.base[r];
    const float sink = job.sink_logit ? job.sink_logit[row.head] * CUDART_L2E_F : -CUDART_INF_F, top = fmaxf(most, sink);
    const float share = most == -CUDART_INF_F ? 0 : sfa_exp2(most - top);
    if (job.sink_logit && top != -CUDART_INF_F)
      sum = sum * share + sfa_exp2(sink - top);
    const float factor = sum == 0 ? 0 : (job.sink_logit ? share : 1) / sum;
    const int64_t token = place.first_q + row.t;
    if (job.lse && c == 0)
      job.lse[token * job.n_heads + row.head] = sum == 0 ? -CUDART_INF_F : top * CUDART_LN2_F + logf(sum);
    const int64_t to = token * job.out_token_stride + row.head * job.out_head_stride + 2 * c;
#pragma unroll
    for (int i = 0; i < WIDTH / 8; i++) {
      if (8 * i >= job.head_dim_v)
        break;
      const float x = o[4 * i + 2 * r] * factor, y = o[4 * i + 2 * r + 1] * factor;
      if (job.out_bf16)
        *(uint32_t *)((uint16_t *)job.out + to + 8 * i) = sfa_bf16_pair(x, y);
      else
        *(float2 *)((float *)job.out + to + 8 * i) = make_float2(x, y);
    }
  }
}

/* Grid: blocks x heads / pack, sequences. */
template <int POLICY, int WIDTH>
static __global__ void __launch_bounds__(sfa_prefill_tile<POLICY, WIDTH>::THREADS, 1)
    sfa_prefill_kernel(const __grid_constant__ sfa_prefill_job job) {
  using TILE = sfa_prefill_tile<POLICY, WIDTH>;
  extern __shared__ unsigned char sfa_prefill_memory[];
  /* By a shuffle, so that the compiler knows it to be uniform: else it fetches each product's addresses from the lanes. */
  const uint32_t shared = __shfl_sync(~0u, (sfa_shared_at(sfa_prefill_memory) + 1023) & ~1023u, 0);
  const sfa_prefill_span at = sfa_prefill_place(job);
  if (at.t0 >= at.n_q)
    return;
  const sfa_prefill_tiles tiles = sfa_prefill_cut<TILE::KEYS>(job, at);
  if (threadIdx.x == 0) {
    uint32_t barrier = shared + TILE::BARRIERS_AT;
    for (int i = 0; i < 2; i++, barrier += 8)
      sfa_barrier_init(barrier, 1);
    /* Keys there, keys used, values there, values used. Of int8 keys a scale comes, too, and every thread reads it; else warps read. */
    const int n_arrivals[4] = {TILE::INT8 ? 2 : 1, (TILE::INT8 ? 128 : 4) * TILE::CONSUMERS, 1, 4 * TILE::CONSUMERS};
#pragma unroll
    for (int array = 0; array < 4; array++)
      for (int i = 0; i < TILE::STAGES; i++, barrier += 8)
        sfa_barrier_init(barrier, n_arrivals[array]);
    sfa_prefill_note(shared + TILE::SPAN_AT, at);
    sfa_barrier_publish();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    sfa_registers_release<24>();
    if (threadIdx.x < 32)
      sfa_prefill_load<TILE>(job, at, tiles, shared);
  } else {
    sfa_registers_take<TILE::REGISTERS>();
    sfa_prefill_consume<TILE, WIDTH>(job, at, tiles, shared);
  }
}

/* ---- Launch, in the file of each policy ------------------------------------------------------------------------------------------ */

/* The job of blocks of n_rows rows and tiles of n_keys keys (prefill_sm90.cu). */
const char *sfa_prefill_prepare(const sfa_cuda_prefill *args, int n_rows, int n_keys, sfa_prefill_job *job);
/* int8 keys: gives every n_keys of a sequence that follow each other one scale. */
const char *sfa_prefill_level(const sfa_cuda_prefill *args, int n_keys, cudaStream_t stream);
const char *sfa_prefill_bf16(const sfa_cuda_prefill *args, sfa_cuda_stream stream);
const char *sfa_prefill_sp_bf16(const sfa_cuda_prefill *args, sfa_cuda_stream stream);
const char *sfa_prefill_int8(const sfa_cuda_prefill *args, sfa_cuda_stream stream);
const char *sfa_prefill_sp_int8(const sfa_cuda_prefill *args, sfa_cuda_stream stream);

template <int POLICY, int WIDTH> static const char *sfa_prefill_launch(const sfa_cuda_prefill *args, cudaStream_t stream) {
  using TILE = sfa_prefill_tile<POLICY, WIDTH>;
  sfa_prefill_job job;
  const char *refused = sfa_prefill_prepare(args, TILE::ROWS, TILE::KEYS, &job);
  if (!refused && TILE::INT8)
    refused = sfa_prefill_level(args, TILE::KEYS, stream);
  if (refused)
    return refused;
  cudaError_t error =
      cudaFuncSetAttribute(sfa_prefill_kernel<POLICY, WIDTH>, cudaFuncAttributeMaxDynamicSharedMemorySize, TILE::SHARED_BYTES);
  if (error != cudaSuccess)
    return cudaGetErrorString(error);
  const dim3 grid((unsigned)(job.n_blocks * (job.n_heads / job.pack)), (unsigned)args->q_tokens.n_sequences);
  sfa_prefill_kernel<POLICY, WIDTH><<<grid, TILE::THREADS, TILE::SHARED_BYTES, stream>>>(job);
  error = cudaGetLastError();
  return error == cudaSuccess ? NULL : cudaGetErrorString(error);
}

/* The narrowest instance that holds both dims. */
template <int POLICY> static const char *sfa_prefill_fit(const sfa_cuda_prefill *args, cudaStream_t stream) {
  const int32_t dim = args->head_dim > args->head_dim_v ? args->head_dim : args->head_dim_v;
  return dim <= 64    ? sfa_prefill_launch<POLICY, 64>(args, stream)
         : dim <= 128 ? sfa_prefill_launch<POLICY, 128>(args, stream)
                      : sfa_prefill_launch<POLICY, 256>(args, stream);
}

#endif
