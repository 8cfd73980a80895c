/* cuda/prefill_sm90_tiles.cuh: what a block of prefill_sm90.cuh is told, the tiles it cuts rows and keys into, where these lie in shared
 * memory, which keys a row sees, and the warp that loads them. */
#ifndef SFA_PREFILL_SM90_TILES_CUH
#define SFA_PREFILL_SM90_TILES_CUH

#include "cuda/cuda_stages.h"
#include "cuda/hopper.cuh"

/* What a block is told. */
struct sfa_prefill_job {
  CUtensorMap q, k, v; /* boxes of 128 bytes x [pack][ROWS / pack] rows of q, [1][KEYS] of k and v */
  float softmax_scale, softcap;
  int32_t causal, window_left, window_right, n_sink_tokens; /* windows: -1 unlimited */
  const float *sink_logit, *alibi_slopes;                   /* [H] or NULL */
  const float *q_scales, *k_scales;                         /* [tokens][heads] of int8 rows; of keys: the same in a tile */
  const int32_t *cu_q, *cu_k, *k_lens, *k_ends;
  int32_t max_q, max_k;
  int32_t n_heads, n_kv_heads, head_dim_v;
  int32_t pack;         /* heads in a block */
  int32_t block_tokens; /* ROWS / pack */
  int32_t n_blocks;     /* of the longest sequence */
  int32_t heads_first;  /* 1: blocks of all heads with the longest rows first (causal); 0: head after head */
  int32_t shaped;       /* softcap, alibi, or a softmax_scale that is not positive: scores are computed before the maximum is looked for */
  void *out;
  int32_t out_bf16;
  int64_t out_token_stride, out_head_stride;
  float *lse;
};

/* ---- Tiles ----------------------------------------------------------------------------------------------------------------------- */

/* Tile sizes, and why. A consumer of 64 rows holds O (WIDTH / 2 registers), scores (KEYS / 2), their bf16 form (KEYS / 4) and, sparse,
 * its queries: 240 registers with two consumers, 160 with three. Shared memory: 227 KiB for queries and the ring.
 *
 *     width 64    3 x 64 rows: the exponentials are the limit, three consumers hide each other's latency best. bf16: 128 keys; else
 *                 64, for the registers of whole sums or sparse queries
 *     width 128   dense: 2 x 64 rows, 128 keys: a product over 128 keys reads its queries from shared memory half as often as over 64
 *                 sparse: 3 x 64 rows, 64 keys: queries are in registers, and a third consumer is worth more than wide tiles
 *     width 256   2 x 64 rows: O alone takes 128 registers. bf16: 80 keys, the most of which two tiles fit into shared memory, where
 *                 sparse queries (40 registers) stay, too; int8: 64, for the registers of sparse queries */
template <int POLICY, int WIDTH> struct sfa_prefill_tile {
  static constexpr bool INT8 = POLICY == SFA_POLICY_INT8 || POLICY == SFA_POLICY_SP_INT8;
  static constexpr bool SPARSE = POLICY == SFA_POLICY_SP_BF16 || POLICY == SFA_POLICY_SP_INT8;
  static constexpr int CONSUMERS = WIDTH == 64 || (WIDTH == 128 && SPARSE) ? 3 : 2;
  static constexpr int KEYS = WIDTH == 256 ? (INT8 ? 64 : 80) : SPARSE || (WIDTH == 64 && INT8) ? 64 : 128;
  static constexpr int ROWS = 64 * CONSUMERS;
  static constexpr int THREADS = 128 * (1 + CONSUMERS);
  static constexpr int REGISTERS = CONSUMERS == 3 ? 160 : 240; /* of a consumer */

  static constexpr int ROW_BYTES = WIDTH * (INT8 ? 1 : 2);               /* of q and k */
  static constexpr int QK_BOXES = ROW_BYTES < 128 ? 1 : ROW_BYTES / 128; /* blocks of 128 bytes */
  static constexpr int V_BOXES = WIDTH * 2 / 128;
  static constexpr int STEPS = ROW_BYTES / 64; /* of sparse products: 64 bytes of a row each */
  static constexpr bool REGISTER_QUERIES = SPARSE && STEPS <= 4;

  static constexpr int Q_BYTES = QK_BOXES * ROWS * 128;
  static constexpr int K_BYTES = QK_BOXES * KEYS * 128;
  static constexpr int V_BYTES = V_BOXES * KEYS * 128;
  static constexpr int SCALE_BYTES = INT8 ? 16 : 0; /* a word */
  static constexpr int STAGES = Q_BYTES + 4 * (K_BYTES + V_BYTES + SCALE_BYTES) <= 200 * 1024   ? 4
                                : Q_BYTES + 3 * (K_BYTES + V_BYTES + SCALE_BYTES) <= 224 * 1024 ? 3
                                                                                                : 2;
  /* Offsets from a 1,024-byte boundary. Barriers: queries, tail, then STAGES each of keys there, keys used, values there, values used. */
  static constexpr int K_AT = Q_BYTES;
  static constexpr int V_AT = K_AT + STAGES * K_BYTES;
  static constexpr int SCALES_AT = V_AT + STAGES * V_BYTES;
  static constexpr int BARRIERS_AT = SCALES_AT + STAGES * SCALE_BYTES;
  static constexpr int N_FULL_AT = BARRIERS_AT + 8 * (2 + 4 * STAGES); /* a word: sfa_prefill_order_rows */
  static constexpr int SPAN_AT = N_FULL_AT + 16;                       /* sfa_prefill_note */
  static constexpr int ORDER_AT = SPAN_AT + 32;                        /* a word a row of a sparse block: which of its rows it is */
  static constexpr int SHARED_BYTES = ORDER_AT + (SPARSE ? 4 * ROWS : 0) + 1024;
  static_assert(SHARED_BYTES <= 232448, "more shared memory than a block may have");
};

enum { SFA_PREFILL_TURN = 1, SFA_PREFILL_ALL = 7 }; /* named barriers: the turn of consumer w is TURN + w; all consumers meet at ALL */

/* ---- Sequences, and which keys a row sees ---------------------------------------------------------------------------------------- */

struct sfa_prefill_span {
  int32_t n_q, n_k, shift, first_q, first_k; /* of the sequence, whose query t stands at key t + shift */
  int32_t t0;                                /* first token of the block */
  int32_t head, kv_head;                     /* head: the first of the block */
};

static __device__ __forceinline__ sfa_prefill_span sfa_prefill_place(const sfa_prefill_job &job) {
  sfa_prefill_span at;
  const int32_t n_columns = job.n_heads / job.pack, index = (int32_t)blockIdx.x;
  const int32_t block = job.heads_first ? job.n_blocks - 1 - index / n_columns : index % job.n_blocks;
  const int32_t column = job.heads_first ? index % n_columns : index / job.n_blocks;
  at.head = column * job.pack;
  at.kv_head = at.head / (job.n_heads / job.n_kv_heads);
  const int32_t sequence = (int32_t)blockIdx.y;
  at.first_q = job.cu_q ? job.cu_q[sequence] : sequence * job.max_q;
  at.n_q = job.cu_q ? job.cu_q[sequence + 1] - at.first_q : job.max_q;
  at.first_k = job.cu_k ? job.cu_k[sequence] : sequence * job.max_k;
  at.n_k = job.cu_k ? job.cu_k[sequence + 1] - at.first_k : job.k_lens ? job.k_lens[sequence] : job.max_k;
  at.shift = (job.k_ends ? job.k_ends[sequence] : at.n_k) - at.n_q;
  at.t0 = block * job.block_tokens;
  return at;
}

/* Kept in shared memory at `to` for those who ask later (sfa_prefill_row_at says why). */
static __device__ __forceinline__ void sfa_prefill_note(uint32_t to, const sfa_prefill_span &at) {
  const int32_t word[] = {at.n_q, at.n_k, at.shift, at.first_q, at.t0, at.head};
#pragma unroll
  for (int i = 0; i < 6; i++)
    sfa_shared_store(to + 4 * i, (uint32_t)word[i]);
}
static __device__ __forceinline__ sfa_prefill_span sfa_prefill_recall(uint32_t from) {
  int32_t word[6];
#pragma unroll
  for (int i = 0; i < 6; i++)
    word[i] = (int32_t)sfa_shared_load(from + 4 * i);
  return {word[0], word[1], word[2], word[3], 0, word[4], word[5], 0};
}

/* Query token t of the sequence sees keys [begin, end), and of those before begin the sink tokens. */
static __device__ __forceinline__ int32_t sfa_prefill_end(const sfa_prefill_job &job, const sfa_prefill_span &at, int32_t t) {
  const int32_t i = t + at.shift;
  int32_t end = at.n_k;
  if (job.causal)
    end = min(end, i + 1);
  if (job.window_right >= 0)
    end = min((int64_t)end, (int64_t)i + job.window_right + 1);
  return max(end, 0);
}
static __device__ __forceinline__ int32_t sfa_prefill_begin(const sfa_prefill_job &job, const sfa_prefill_span &at, int32_t t) {
  return job.window_left >= 0 ? max(t + at.shift - job.window_left, 0) : 0;
}

/* The key tiles of a block: n_main from last downwards, then the n_sinks tiles before them, downwards too. */
struct sfa_prefill_tiles {
  int32_t last, n_main, n_sinks;
  __device__ __forceinline__ int32_t n(void) const { return n_main + n_sinks; }
  __device__ __forceinline__ int32_t at(int32_t j) const { return j < n_main ? last - j : n_sinks - 1 - (j - n_main); }
};

template <int KEYS>
static __device__ __forceinline__ sfa_prefill_tiles sfa_prefill_cut(const sfa_prefill_job &job, const sfa_prefill_span &at) {
  const int32_t t1 = min(at.t0 + job.block_tokens, at.n_q) - 1;
  const int32_t end = sfa_prefill_end(job, at, t1), first = sfa_prefill_begin(job, at, at.t0) / KEYS, behind = (end + KEYS - 1) / KEYS;
  sfa_prefill_tiles tiles;
  tiles.last = behind - 1;
  tiles.n_main = max(behind - first, 0);
  tiles.n_sinks = min(min(first, behind), (min(job.n_sink_tokens, end) + KEYS - 1) / KEYS);
  return tiles;
}

/* ---- The loading warp ------------------------------------------------------------------------------------------------------------ */

template <class TILE>
static __device__ __forceinline__ void sfa_prefill_load(const sfa_prefill_job &job, const sfa_prefill_span &at,
                                                        const sfa_prefill_tiles &tiles, uint32_t shared) {
  constexpr int COLUMNS = TILE::INT8 ? 128 : 64; /* of a box of q or k */
  const int lane = threadIdx.x;
  const uint32_t q_there = shared + TILE::BARRIERS_AT, tail = q_there + 8, k_there = q_there + 16, k_used = k_there + 8 * TILE::STAGES,
                 v_there = k_used + 8 * TILE::STAGES, v_used = v_there + 8 * TILE::STAGES;
  if (lane == 0) {
    sfa_map_prefetch(&job.k);
    sfa_map_prefetch(&job.v);
    sfa_barrier_expect(q_there, TILE::QK_BOXES * 128 * job.pack * job.block_tokens);
    for (int box = 0; box < TILE::QK_BOXES; box++)
      sfa_box_load(shared + box * TILE::ROWS * 128, &job.q, box * COLUMNS, at.head, at.first_q + at.t0, q_there);
  }
  for (int32_t j = 0; j < tiles.n(); j++) {
    const int stage = j % TILE::STAGES;
    const uint32_t parity = (j / TILE::STAGES & 1) ^ 1;
    const int32_t first = tiles.at(j) * TILE::KEYS, left = at.n_k - first;
    sfa_barrier_wait(k_used + 8 * stage, parity);
    if (lane == 0) {
      sfa_barrier_expect(k_there + 8 * stage, TILE::K_BYTES);
      for (int box = 0; box < TILE::QK_BOXES; box++)
        sfa_box_load(shared + TILE::K_AT + stage * TILE::K_BYTES + box * TILE::KEYS * 128, &job.k, box * COLUMNS, at.kv_head,
                     at.first_k + first, k_there + 8 * stage);
      if constexpr (TILE::INT8) {
        sfa_word_load(shared + TILE::SCALES_AT + stage * TILE::SCALE_BYTES,
                      job.k_scales + (int64_t)(at.first_k + first) * job.n_kv_heads + at.kv_head);
        sfa_copies_arrive(k_there + 8 * stage);
      }
    }
    sfa_barrier_wait(v_used + 8 * stage, parity);
    const uint32_t v = shared + TILE::V_AT + stage * TILE::V_BYTES, there = left < TILE::KEYS ? tail : v_there + 8 * stage;
    if (lane == 0) {
      sfa_barrier_expect(there, TILE::V_BYTES);
      for (int box = 0; box < TILE::V_BOXES; box++)
        sfa_box_load(v + box * TILE::KEYS * 128, &job.v, box * 64, at.kv_head, at.first_k + first, there);
    }
    if (left < TILE::KEYS) { /* behind the last key anything may lie, but 0 * NaN is NaN: zeros. Once a block at most */
      sfa_barrier_wait(tail, 0);
      for (int box = 0; box < TILE::V_BOXES; box++)
        for (int i = left * 128 + lane * 16; i < TILE::KEYS * 128; i += 512)
          sfa_shared_zero16(v + box * TILE::KEYS * 128 + i);
      sfa_shared_publish();
      __syncwarp();
      if (lane == 0)
        sfa_barrier_arrive(v_there + 8 * stage);
    }
  }
}

#endif
