/* cuda/backward_sm90.cuh: gradients of a key tile, and its part of those of the queries (sm_90a).
 *
 *     S^T  = K Q^T            [64 keys][64 queries] a unit
 *     P^T  = exp(S^T - lse)   0 where masked
 *     dP^T = V dO^T
 *     dS^T = P^T (dP^T - delta), times the derivative of the softcap
 *     dV  += P^T dO           dK += dS^T Q           dQ += dS K
 *
 * Three warpgroups, each with products and arithmetic of its own, so that one's products run under the others' arithmetic:
 *
 *     scores      S, P, dV      hands weights on: P times the softcap's derivative, f16, times 2^14
 *     gradients   dP, dS, dK    hands dS on, bf16
 *     queries     dQ            adds it to sums in memory
 *
 * a thread that loads: query tiles (q with lse, d_out with delta) go round in buffers, keys and values stay; and a warp that waits for
 * turns. A group issues the next unit's first product together with this unit's second one. P^T goes from product to product in registers:
 * D of one is A of the next (wgmma.cuh). dS^T lies in shared memory, as A of dK and of dQ.
 *
 * For DIM 128 and 256, adding dQ to memory would limit all this. Two blocks form a cluster, each with half of the key tile: the copy engine
 * hands dS on to the other block too, 16 bits each, and each block adds half of the columns of dQ, in 32 bits, for the keys of both. So
 * half as much is added, half as often. The price is room for dS and those columns of the other block's keys: DIM 256 has one buffer for
 * d_out.
 *
 * f16 with 2^14 keeps weights to 11 bits down to 2^-28, where bf16 would add to dS an error as large as that of its own rounding. All
 * sums are 2^14 too large, which costs nothing: the last factor takes it back.
 *
 * dQ: the sums of a query tile are added to in the order of count_above, whoever is early: a block waits for its turn, and clusters take
 * their tiles by ticket, so that all they wait for have begun. The first stores, the others add: no two at a time, in a fixed order. */
#ifndef SFA_BACKWARD_SM90_CUH
#define SFA_BACKWARD_SM90_CUH

#include "cuda/backward.cuh"
#include "cuda/hopper.cuh"
#include "cuda/wgmma.cuh"

template <int DIM> struct backward_layout {
  enum {
    UNITS = 256 / DIM,
    TILE = DIM / 64 * BACKWARD_BLOCK, /* bytes of 64 rows */
    CLUSTER = BACKWARD_CLUSTER(DIM),
    STAGES = DIM == 64 ? 4 : 2, /* powers of two, as the slots are: a place in a ring follows from the number of the step */
    DO_STAGES = DIM == 256 ? 1 : STAGES,
    /* The second product before the next first one: what it read is free the sooner, but the group's arithmetic runs under none of its own
     * products. What is faster was measured. */
    SCORES_SUM_FIRST = DIM == 256,
    GRADIENTS_SUM_FIRST = DIM >= 128,
    P_SLOTS = 2,
    S_SLOTS = 2 * UNITS, /* those of two steps */
    SLOT = 64 * 64 * 2,
    COLUMNS = DIM < 128 ? DIM : 128, /* of a sum, a product */
    PIECES = DIM / COLUMNS,
    /* shared memory, from a multiple of 1,024 */
    K = 0,
    V = K + UNITS * TILE,
    Q = V + UNITS * TILE,
    DO = Q + STAGES * TILE,
    DS = DO + DO_STAGES * TILE,
    DS_PEER = DS + S_SLOTS * SLOT,                     /* of the other block */
    K_PEER = DS_PEER + (CLUSTER - 1) * S_SLOTS * SLOT, /* its keys, those columns of which this block makes dQ */
    P = K_PEER + (CLUSTER - 1) * UNITS * (TILE / 2),
    LSE = P + P_SLOTS * SLOT,
    DELTA = LSE + STAGES * 256,
    BARRIERS = DELTA + DO_STAGES * 256,
    /* barriers, 8 bytes each */
    KV_FULL = BARRIERS,
    Q_FULL = KV_FULL + 8,
    Q_EMPTY = Q_FULL + 8 * STAGES,
    DO_FULL = Q_EMPTY + 8 * STAGES,
    DO_EMPTY = DO_FULL + 8 * DO_STAGES,
    P_FULL = DO_EMPTY + 8 * DO_STAGES,
    P_EMPTY = P_FULL + 8 * P_SLOTS,
    DS_FULL = P_EMPTY + 8 * P_SLOTS,
    DS_EMPTY = DS_FULL + 8 * S_SLOTS,
    TURN = DS_EMPTY + 8 * S_SLOTS,
    JOB = TURN + 8,
    BYTES = JOB + 16 + 1024 /* to align */
  };
};

/* A block's work: its share, by rank, of key tile n of sequence b and kv head g, from `key` on, with query tiles [first, end) of each of
 * the group's heads, a head after the other. */
typedef struct backward_job {
  int b, g, n, rank, key, first, end, n_steps;
  backward_shape shape;
} backward_job;

/* The query tile of a step. */
typedef struct backward_step {
  int head, m;
} backward_step;

static __device__ __forceinline__ void step_next(backward_step *step, const backward_job *job) {
  if (++step->m == job->end) {
    step->m = job->first;
    step->head++;
  }
}

static __device__ __forceinline__ int64_t tile_of(const backward_call *call, const backward_job *job, const backward_step *step) {
  return ((int64_t)job->b * call->n_heads + step->head) * call->q_tiles + step->m;
}

/* Of a buffer used for the count-th time, of n in a ring: where it is, and the parity of the phase in which it is full. */
static __device__ __forceinline__ uint32_t slot_of(int count, int n) { return (uint32_t)(count & (n - 1)); }
static __device__ __forceinline__ uint32_t parity_of(int count, int n) { return (uint32_t)(count / n & 1); }

/* By every thread that has read or written a buffer: its own arrival orders what it did. */
static __device__ __forceinline__ void release(uint32_t barrier) { sfa_barrier_arrive(barrier); }

/* The same where products alone have read it: a lane for its warp. */
static __device__ __forceinline__ void release_operand(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0)
    sfa_barrier_arrive(barrier);
}

/* The same place in block `rank` of the cluster. */
static __device__ __forceinline__ uint32_t remote_at(uint32_t at, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(at), "r"(rank));
  return remote;
}

/* release_operand, of what blocks of the cluster write together. Relaxed: products alone have read it, and they are done; ordered arrivals
 * would wait for this thread's additions to memory. */
template <int CLUSTER> static __device__ __forceinline__ void release_all(uint32_t barrier) {
  if (CLUSTER == 1) {
    release_operand(barrier);
    return;
  }
  __syncwarp();
  if (threadIdx.x % 32 < CLUSTER)
    asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote_at(barrier, threadIdx.x % 32)) : "memory");
}

static __device__ __forceinline__ uint32_t cluster_rank(void) {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
static __device__ __forceinline__ void cluster_sync(void) {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

static __device__ __forceinline__ uint4 shared_load4(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
  return x;
}
static __device__ __forceinline__ void shared_store4(uint32_t at, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
static __device__ __forceinline__ float2 shared_pair(uint32_t at) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
  return x;
}
static __device__ __forceinline__ uint32_t f16_pair(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
static __device__ __forceinline__ float2 of_f16_pair(uint32_t x) {
  float2 y;
  asm("{.reg .f16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;}" : "=f"(y.x), "=f"(y.y) : "r"(x));
  return y;
}

/* ---- Products -------------------------------------------------------------------------------------------------------- */

/* x [64][64] = rows a [64][DIM] times rows b [64][DIM], turned; a group of its own. */
template <int DIM> static __device__ __forceinline__ void begin_pairs(float (&x)[32], uint32_t a, uint32_t b) {
  const uint64_t pa = sfa_operand(a), pb = sfa_operand(b);
  sfa_matrix_fence();
#pragma unroll
  for (int k = 0; k < DIM / 16; k++) {
    const uint32_t at = k / 4 * BACKWARD_BLOCK + k % 4 * 32;
    if (k == 0)
      sfa_product_bf16_first(x, pa, pb);
    else
      sfa_product_bf16(x, sfa_operand_at(pa, at), sfa_operand_at(pb, at), 1);
  }
  sfa_matrix_commit();
}

/* sum [64][DIM] += x [64][64], bf16 pairs in registers, times rows b [64][DIM]; a group of its own. */
template <int PIECES, int N>
static __device__ __forceinline__ void begin_sum(float (&sum)[PIECES][N], const uint32_t (&x)[16], uint32_t b) {
  const uint64_t pb = sfa_operand_turned(b, BACKWARD_BLOCK);
  sfa_matrix_fence();
#pragma unroll
  for (int k = 0; k < 4; k++)
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
      sfa_product_turned(sum[piece], x + 4 * k, sfa_operand_at(pb, 2048 * k + piece * (N / 32) * BACKWARD_BLOCK));
  sfa_matrix_commit();
}

/* The same with x [64][64] in shared memory. */
template <int PIECES, int N> static __device__ __forceinline__ void begin_sum(float (&sum)[PIECES][N], uint32_t x, uint32_t b) {
  const uint64_t px = sfa_operand(x), pb = sfa_operand_turned(b, BACKWARD_BLOCK);
  sfa_matrix_fence();
#pragma unroll
  for (int k = 0; k < 4; k++)
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
      sfa_product_turned(sum[piece], sfa_operand_at(px, 32 * k), sfa_operand_at(pb, 2048 * k + piece * (N / 32) * BACKWARD_BLOCK));
  sfa_matrix_commit();
}

/* ---- scores: S, P, dV ------------------------------------------------------------------------------------------------ */

/* What the scores' group knows of a key tile, in few registers: its sums leave it 80 for all else. */
typedef struct backward_view {
  int away, first_away, end_away; /* of the tile's first key from the step's first query, in this step, in a head's first, after its last */
  int keys_left, sinks_left;      /* keys, sink tokens from the tile's first key on */
  int head;
} backward_view;

static __device__ __forceinline__ void view_next(backward_view *view) {
  view->away -= 64;
  if (view->away == view->end_away) {
    view->away = view->first_away;
    view->head++;
  }
}

/* 8 scores, those of queries 16 i .. 16 i + 15, become weights; those to hand on: 4 pairs. A hidden score is -inf. */
template <bool BENT>
static __device__ __forceinline__ void weigh(const backward_call *call, float *x, uint32_t lse, int away, float slope, uint32_t *pairs) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float2 minus = shared_pair(lse + 32 * half);
#pragma unroll
    for (int row = 0; row < 2; row++) {
      float *y = x + 4 * half + 2 * row, bend[2] = {1, 1};
#pragma unroll
      for (int column = 0; column < 2; column++) {
        const float l = column ? minus.y : minus.x;
        if (BENT) {
          const bool hidden = y[column] == -INFINITY;
          float s = y[column] * call->softmax_scale;
          if (call->softcap > 0) {
            const float h = 1 - __fdividef(2, sfa_exp2(s * (2 * 1.4426950408889634f / call->softcap)) + 1); /* tanh */
            s = call->softcap * h;
            bend[column] = 1 - h * h;
          }
          s += slope * (float)(away + 8 * row - 8 * half - column);
          y[column] = hidden ? 0 : sfa_exp2(fmaf(s, 1.4426950408889634f, -l));
        } else
          y[column] = sfa_exp2(fmaf(y[column], call->softmax_scale * 1.4426950408889634f, -l));
      }
      pairs[2 * half + row] = BENT ? f16_pair(y[0] * bend[0], y[1] * bend[1]) : f16_pair(y[0], y[1]);
    }
  }
}

/* Hides what a mask hides; away, keys_left, sinks_left: of this thread's first row and column. */
static __device__ __forceinline__ void hide(const backward_call *call, float (&s)[32], int away, int keys_left, int sinks_left) {
#pragma unroll
  for (int i = 0; i < 32; i++) {
    const int row = i / 2 % 2 * 8, d = away + row - i / 4 * 8 - i % 2; /* j - i */
    if (!(row < keys_left && d <= call->right && (d >= -call->left || row < sinks_left)))
      s[i] = -INFINITY;
  }
}

/* The scores of unit u of step i become weights, and are handed on. */
template <int DIM, bool BENT>
static __device__ __forceinline__ void weigh_unit(const backward_call *call, const backward_view *view, uint32_t shared, float (&s)[32],
                                                  int u, int i) {
  typedef backward_layout<DIM> L;
  const int t = threadIdx.x % 128, row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2, count = i * L::UNITS + u;
  const float slope = BENT && call->alibi_slopes ? call->alibi_slopes[view->head] : 0;
  const int away = view->away + 64 * u;
  if (!(64 * u + 64 <= view->keys_left && away + 63 <= call->right && (away - 63 >= -call->left || 64 * u + 64 <= view->sinks_left)))
    hide(call, s, away + row - column, view->keys_left - 64 * u - row, view->sinks_left - 64 * u - row);
  const uint32_t lse = shared + L::LSE + 256 * slot_of(i, L::STAGES) + 4 * column;
  const uint32_t slot = shared + L::P + L::SLOT * slot_of(count, L::P_SLOTS) + 16 * t;
  sfa_barrier_wait(shared + L::P_EMPTY + 8 * slot_of(count, L::P_SLOTS), parity_of(count, L::P_SLOTS) ^ 1);
#pragma unroll
  for (int q = 0; q < 4; q++) {
    uint32_t pairs[4];
    weigh<BENT>(call, s + 8 * q, lse + 64 * q, away + row - column - 16 * q, slope, pairs);
    shared_store4(slot + 2048 * q, pairs[0], pairs[1], pairs[2], pairs[3]);
  }
  release(shared + L::P_FULL + 8 * slot_of(count, L::P_SLOTS));
  if (u == L::UNITS - 1)
    release(shared + L::Q_EMPTY + 8 * slot_of(i, L::STAGES));
}

static __device__ __forceinline__ void round_unit(const float (&x)[32], uint32_t (&p)[16]) {
#pragma unroll
  for (int i = 0; i < 16; i++)
    p[i] = sfa_bf16_pair(x[2 * i], x[2 * i + 1]);
}

template <int DIM, bool BENT>
static __device__ __forceinline__ void
run_scores(const backward_call *call, backward_view view, int n_steps, uint32_t shared,
           float (&sum)[256 / DIM][backward_layout<DIM>::PIECES][backward_layout<DIM>::COLUMNS / 2]) {
  typedef backward_layout<DIM> L;
  float s[32];
  uint32_t p[16];
  sfa_barrier_wait(shared + L::KV_FULL, 0);
  sfa_barrier_wait(shared + L::Q_FULL, 0);
  begin_pairs<DIM>(s, shared + L::K, shared + L::Q);
  sfa_matrix_wait<0>();
  weigh_unit<DIM, BENT>(call, &view, shared, s, 0, 0);
  round_unit(s, p);
  for (int i = 0;;) {
    const uint32_t d_out = shared + L::DO + L::TILE * slot_of(i, L::DO_STAGES);
    sfa_barrier_wait(shared + L::DO_FULL + 8 * slot_of(i, L::DO_STAGES), parity_of(i, L::DO_STAGES));
#pragma unroll
    for (int u = 1; u < L::UNITS; u++) {
      if (L::SCORES_SUM_FIRST)
        begin_sum(sum[u - 1], p, d_out);
      begin_pairs<DIM>(s, shared + L::K + L::TILE * u, shared + L::Q + L::TILE * slot_of(i, L::STAGES));
      if (!L::SCORES_SUM_FIRST)
        begin_sum(sum[u - 1], p, d_out);
      sfa_matrix_wait<!L::SCORES_SUM_FIRST>();
      weigh_unit<DIM, BENT>(call, &view, shared, s, u, i);
      sfa_matrix_wait<0>();
      round_unit(s, p);
    }
    if (++i == n_steps) {
      begin_sum(sum[L::UNITS - 1], p, d_out);
      sfa_matrix_wait<0>();
      return;
    }
    view_next(&view);
    if (L::SCORES_SUM_FIRST)
      begin_sum(sum[L::UNITS - 1], p, d_out);
    sfa_barrier_wait(shared + L::Q_FULL + 8 * slot_of(i, L::STAGES), parity_of(i, L::STAGES));
    begin_pairs<DIM>(s, shared + L::K, shared + L::Q + L::TILE * slot_of(i, L::STAGES));
    if (!L::SCORES_SUM_FIRST)
      begin_sum(sum[L::UNITS - 1], p, d_out);
    sfa_matrix_wait<1>();
    if (L::SCORES_SUM_FIRST) {
      release_operand(shared + L::DO_EMPTY + 8 * slot_of(i - 1, L::DO_STAGES));
      sfa_matrix_wait<0>();
    }
    weigh_unit<DIM, BENT>(call, &view, shared, s, 0, i);
    if (!L::SCORES_SUM_FIRST) {
      sfa_matrix_wait<0>();
      release_operand(shared + L::DO_EMPTY + 8 * slot_of(i - 1, L::DO_STAGES));
    }
    round_unit(s, p);
  }
}

/* ---- gradients: dP, dS, dK ------------------------------------------------------------------------------------------- */

/* x: dP of unit u of step i becomes dS. */
template <int DIM> static __device__ __forceinline__ void bend_unit(uint32_t shared, float (&x)[32], int u, int i) {
  typedef backward_layout<DIM> L;
  const int t = threadIdx.x % 128, count = i * L::UNITS + u;
  const uint32_t delta = shared + L::DELTA + 256 * slot_of(i, L::DO_STAGES) + 8 * (t % 4);
  const uint32_t slot = shared + L::P + L::SLOT * slot_of(count, L::P_SLOTS) + 16 * t;
  sfa_barrier_wait(shared + L::P_FULL + 8 * slot_of(count, L::P_SLOTS), parity_of(count, L::P_SLOTS));
#pragma unroll
  for (int q = 0; q < 4; q++) {
    const uint4 pairs = shared_load4(slot + 2048 * q);
    const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float2 d = shared_pair(delta + 64 * q + 32 * half);
#pragma unroll
      for (int row = 0; row < 2; row++) {
        const float2 w = of_f16_pair(words[2 * half + row]);
        float *y = x + 8 * q + 4 * half + 2 * row;
        y[0] = w.x * (y[0] - d.x);
        y[1] = w.y * (y[1] - d.y);
      }
    }
  }
  release(shared + L::P_EMPTY + 8 * slot_of(count, L::P_SLOTS));
  if (u == L::UNITS - 1)
    release(shared + L::DO_EMPTY + 8 * slot_of(i, L::DO_STAGES));
}

template <int DIM> static __device__ __forceinline__ uint32_t ds_slot(int u, int i) {
  return slot_of(i, 2) * backward_layout<DIM>::UNITS + u;
}

/* x: dS of unit u of step i to memory, for this group and the queries', here and in the other block. */
template <int DIM> static __device__ __forceinline__ void hand_unit(uint32_t shared, const float (&x)[32], int u, int i) {
  typedef backward_layout<DIM> L;
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16; /* whose address this thread gives */
  const uint32_t slot = ds_slot<DIM>(u, i), line = shared + L::DS + L::SLOT * slot + 128 * row;
  sfa_barrier_wait(shared + L::DS_EMPTY + 8 * slot, parity_of(i, 2) ^ 1);
#pragma unroll
  for (int q = 0; q < 4; q++)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(line + ((2 * q + lane / 16) ^ (row % 8)) * 16),
                 "r"(sfa_bf16_pair(x[8 * q], x[8 * q + 1])), "r"(sfa_bf16_pair(x[8 * q + 2], x[8 * q + 3])),
                 "r"(sfa_bf16_pair(x[8 * q + 4], x[8 * q + 5])), "r"(sfa_bf16_pair(x[8 * q + 6], x[8 * q + 7]))
                 : "memory");
  sfa_shared_publish();
  sfa_named_sync(2, 128);
  if (threadIdx.x % 128 == 0) {
    const uint32_t full = shared + L::DS_FULL + 8 * slot;
    if (L::CLUSTER == 1)
      sfa_barrier_arrive(full);
    else {
      const uint32_t peer = cluster_rank() ^ 1;
      sfa_barrier_expect(full, L::SLOT);
      asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       remote_at(shared + L::DS_PEER + L::SLOT * slot, peer)),
                   "r"(shared + L::DS + L::SLOT * slot), "r"((uint32_t)L::SLOT), "r"(remote_at(full, peer))
                   : "memory");
    }
  }
}

template <int DIM>
static __device__ __forceinline__ void
run_gradients(int n_steps, uint32_t shared, float (&sum)[256 / DIM][backward_layout<DIM>::PIECES][backward_layout<DIM>::COLUMNS / 2]) {
  typedef backward_layout<DIM> L;
  float x[32];
  sfa_barrier_wait(shared + L::KV_FULL, 0);
  sfa_barrier_wait(shared + L::DO_FULL, 0);
  begin_pairs<DIM>(x, shared + L::V, shared + L::DO);
  sfa_matrix_wait<0>();
  bend_unit<DIM>(shared, x, 0, 0);
  hand_unit<DIM>(shared, x, 0, 0);
  for (int i = 0;;) {
    const uint32_t q = shared + L::Q + L::TILE * slot_of(i, L::STAGES);
    sfa_barrier_wait(shared + L::Q_FULL + 8 * slot_of(i, L::STAGES), parity_of(i, L::STAGES));
#pragma unroll
    for (int u = 1; u < L::UNITS; u++) {
      const uint32_t ds = shared + L::DS + L::SLOT * ds_slot<DIM>(u - 1, i);
      if (L::GRADIENTS_SUM_FIRST)
        begin_sum(sum[u - 1], ds, q);
      begin_pairs<DIM>(x, shared + L::V + L::TILE * u, shared + L::DO + L::TILE * slot_of(i, L::DO_STAGES));
      if (!L::GRADIENTS_SUM_FIRST)
        begin_sum(sum[u - 1], ds, q);
      sfa_matrix_wait<!L::GRADIENTS_SUM_FIRST>();
      bend_unit<DIM>(shared, x, u, i);
      hand_unit<DIM>(shared, x, u, i);
      sfa_matrix_wait<0>();
    }
    const uint32_t ds = shared + L::DS + L::SLOT * ds_slot<DIM>(L::UNITS - 1, i);
    if (++i == n_steps) {
      begin_sum(sum[L::UNITS - 1], ds, q);
      sfa_matrix_wait<0>();
      return;
    }
    if (L::GRADIENTS_SUM_FIRST)
      begin_sum(sum[L::UNITS - 1], ds, q);
    sfa_barrier_wait(shared + L::DO_FULL + 8 * slot_of(i, L::DO_STAGES), parity_of(i, L::DO_STAGES));
    begin_pairs<DIM>(x, shared + L::V, shared + L::DO + L::TILE * slot_of(i, L::DO_STAGES));
    if (!L::GRADIENTS_SUM_FIRST)
      begin_sum(sum[L::UNITS - 1], ds, q);
    sfa_matrix_wait<1>();
    if (L::GRADIENTS_SUM_FIRST) {
      release_operand(shared + L::Q_EMPTY + 8 * slot_of(i - 1, L::STAGES));
      sfa_matrix_wait<0>();
    }
    bend_unit<DIM>(shared, x, 0, i);
    hand_unit<DIM>(shared, x, 0, i);
    if (!L::GRADIENTS_SUM_FIRST) {
      sfa_matrix_wait<0>();
      release_operand(shared + L::Q_EMPTY + 8 * slot_of(i - 1, L::STAGES));
    }
  }
}

/* ---- queries: dQ ----------------------------------------------------------------------------------------------------- */

/* This block's columns, 64 at a time: 32 registers, so that the other groups have enough. */
template <int DIM> static __device__ __forceinline__ void run_queries(const backward_call *call, const backward_job *job, uint32_t shared) {
  typedef backward_layout<DIM> L;
  const int t = threadIdx.x % 128;
  backward_step step = {job->g * call->group, job->first};
  sfa_barrier_wait(shared + L::KV_FULL, 0);
  for (int i = 0; i < job->n_steps; i++) {
    const int64_t tile = tile_of(call, job, &step);
    const int turn = count_above(call, &job->shape, job->n, step.m);
    const uint32_t first_slot = slot_of(i, 2) * L::UNITS;
    const uint32_t first_block = job->rank * (DIM / 128);
    float4 *out = call->d_q + tile * (DIM / 8) * 128 + first_block * 1024 + t;
#pragma unroll 1
    for (int piece = 0; piece < DIM / 64 / L::CLUSTER; piece++) {
      float x[32];
#pragma unroll
      for (int w = 0; w < L::UNITS * L::CLUSTER; w++) {
        const int u = w % L::UNITS;
        const bool own = w < L::UNITS;
        const uint64_t a = sfa_operand_turned(shared + (own ? L::DS : L::DS_PEER) + L::SLOT * (first_slot + u), BACKWARD_BLOCK);
        const uint64_t b = sfa_operand_turned(own ? shared + L::K + L::TILE * u + (first_block + piece) * BACKWARD_BLOCK
                                                  : shared + L::K_PEER + L::TILE / 2 * u + piece * BACKWARD_BLOCK,
                                              BACKWARD_BLOCK);
        if (piece == 0 && own)
          sfa_barrier_wait(shared + L::DS_FULL + 8 * (first_slot + u), parity_of(i, 2));
        sfa_matrix_fence();
#pragma unroll
        for (int k = 0; k < 4; k++)
          if (w == 0 && k == 0)
            sfa_product_both_turned_first(x, a, b);
          else
            sfa_product_both_turned(x, sfa_operand_at(a, 2048 * k), sfa_operand_at(b, 2048 * k));
        sfa_matrix_commit();
      }
      sfa_matrix_wait<0>();
      if (piece == DIM / 64 / L::CLUSTER - 1) {
#pragma unroll
        for (int u = 0; u < L::UNITS; u++)
          release_all<L::CLUSTER>(shared + L::DS_EMPTY + 8 * (first_slot + u));
      }
      if (piece == 0)
        sfa_barrier_wait(shared + L::TURN, i & 1);
      if (turn == 0) {
#pragma unroll
        for (int c = 0; c < 8; c++)
          out[128 * c] = make_float4(x[4 * c], x[4 * c + 1], x[4 * c + 2], x[4 * c + 3]);
      } else {
#pragma unroll
        for (int c = 0; c < 8; c++)
          asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(out + 128 * c), "f"(x[4 * c]), "f"(x[4 * c + 1]),
                       "f"(x[4 * c + 2]), "f"(x[4 * c + 3])
                       : "memory");
      }
      out += 8 * 128;
    }
    sfa_named_arrive(1, 160);
    step_next(&step, job);
  }
}

/* The warp that waits for this block's turn at a query tile, and passes it on once the sums are there. */
template <int DIM> static __device__ __forceinline__ void run_turns(const backward_call *call, const backward_job *job, uint32_t shared) {
  backward_step step = {job->g * call->group, job->first};
  for (int i = 0; i < job->n_steps; i++) {
    int *turns = call->turns + 2 * tile_of(call, job, &step) + job->rank;
    const int turn = count_above(call, &job->shape, job->n, step.m);
    if (threadIdx.x % 32 == 0) {
      int done = 0;
      while (done < turn)
        asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(done) : "l"(turns) : "memory");
      sfa_barrier_arrive(shared + backward_layout<DIM>::TURN);
    }
    sfa_named_sync(1, 160);
    if (threadIdx.x % 32 == 0) {
      __threadfence();
      asm volatile("st.release.gpu.s32 [%0], %1;" ::"l"(turns), "r"(turn + 1) : "memory");
    }
    step_next(&step, job);
  }
}

/* ---- The thread that loads ------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void load(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes),
               "r"(barrier)
               : "memory");
}

template <int DIM> static __device__ __forceinline__ void run_loads(const backward_call *call, const backward_job *job, uint32_t shared) {
  typedef backward_layout<DIM> L;
  const int64_t kv = (((int64_t)job->b * call->n_kv_heads + job->g) * call->k_tiles + job->n) * L::CLUSTER * L::UNITS * L::TILE;
  const int64_t own = kv + job->rank * L::UNITS * L::TILE, other = kv + (job->rank ^ 1) * L::UNITS * L::TILE;
  backward_step step = {job->g * call->group, job->first};
  sfa_barrier_expect(shared + L::KV_FULL, 2 * L::UNITS * L::TILE + (L::CLUSTER - 1) * L::UNITS * (L::TILE / 2));
  load(shared + L::K, call->k + own, L::UNITS * L::TILE, shared + L::KV_FULL);
  load(shared + L::V, call->v + own, L::UNITS * L::TILE, shared + L::KV_FULL);
  for (int u = 0; L::CLUSTER == 2 && u < L::UNITS; u++)
    load(shared + L::K_PEER + L::TILE / 2 * u, call->k + other + L::TILE * u + L::TILE / 2 * job->rank, L::TILE / 2, shared + L::KV_FULL);
  for (int i = 0; i < job->n_steps; i++) {
    const int64_t tile = tile_of(call, job, &step);
    const uint32_t slot = slot_of(i, L::STAGES), empty = parity_of(i, L::STAGES) ^ 1;
    uint32_t barrier = shared + L::Q_FULL + 8 * slot;
    sfa_barrier_wait(shared + L::Q_EMPTY + 8 * slot, empty);
    sfa_barrier_expect(barrier, L::TILE + 256);
    load(shared + L::Q + L::TILE * slot, call->q + tile * L::TILE, L::TILE, barrier);
    load(shared + L::LSE + 256 * slot, call->lse + tile * 64, 256, barrier);
    const uint32_t do_slot = slot_of(i, L::DO_STAGES);
    barrier = shared + L::DO_FULL + 8 * do_slot;
    sfa_barrier_wait(shared + L::DO_EMPTY + 8 * do_slot, parity_of(i, L::DO_STAGES) ^ 1);
    sfa_barrier_expect(barrier, L::TILE + 256);
    load(shared + L::DO + L::TILE * do_slot, call->d_out + tile * L::TILE, L::TILE, barrier);
    load(shared + L::DELTA + 256 * do_slot, call->delta + tile * 64, 256, barrier);
    step_next(&step, job);
  }
}

/* ---- The block ------------------------------------------------------------------------------------------------------- */

/* By instructions that the compiler does not move: none may come between the products of a group. */
template <int DIM>
static __device__ __forceinline__ void clear(float (&sum)[256 / DIM][backward_layout<DIM>::PIECES][backward_layout<DIM>::COLUMNS / 2]) {
  typedef backward_layout<DIM> L;
#pragma unroll
  for (int i = 0; i < 128; i++)
    asm volatile("mov.f32 %0, 0f00000000;" : "=f"(sum[i / (DIM / 2)][i / (L::COLUMNS / 2) % L::PIECES][i % (L::COLUMNS / 2)]));
}

/* The block's work, by its ticket. */
template <int DIM> static __device__ __forceinline__ backward_job find_job(const backward_call *call, uint32_t shared) {
  backward_job job;
  const int number = (int)sfa_shared_load(shared + backward_layout<DIM>::JOB), pair = number / call->k_tiles;
  job.b = pair / call->n_kv_heads;
  job.g = pair % call->n_kv_heads;
  job.n = call->k_tiles - 1 - number % call->k_tiles;
  const int n_queries = range_of(call->cu_queries, call->max_queries, job.b).count;
  job.shape = shape_of(n_queries, range_of(call->cu_keys, call->max_keys, job.b).count, BACKWARD_KEYS_LOG2(DIM));
  job.rank = backward_layout<DIM>::CLUSTER == 1 ? 0 : (int)cluster_rank();
  job.key = (job.n << job.shape.tile_log2) + job.rank * backward_layout<DIM>::UNITS * 64;
  tiles_met(call, &job.shape, job.n, &job.first, &job.end);
  job.n_steps = max(job.end - job.first, 0) * call->group;
  return job;
}

/* Sums of the tile's keys, times factor, to the caller's rows. */
template <int DIM>
static __device__ __forceinline__ void
write_sums(const backward_call *call, uint32_t shared, const sfa_cuda_gradient *to, int dim, float factor,
           const float (&sum)[256 / DIM][backward_layout<DIM>::PIECES][backward_layout<DIM>::COLUMNS / 2]) {
  typedef backward_layout<DIM> L;
  const backward_job job = find_job<DIM>(call, shared); /* once more: nobody kept it in registers */
  const int t = threadIdx.x % 128;
  const int64_t first = range_of(call->cu_keys, call->max_keys, job.b).first;
#pragma unroll
  for (int u = 0; u < 256 / DIM; u++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int key = job.key + 64 * u + t / 32 * 16 + t % 32 / 4 + 8 * half;
      if (key >= job.shape.n_keys)
        continue;
      const int64_t token = first + key;
      backward_line line = {token * call->n_kv_heads + job.g, 0};
#pragma unroll
      for (int c = 0; c < DIM / 8; c++)
        if (8 * c < dim) {
          const float *x = sum[u][8 * c / L::COLUMNS] + 8 * c % L::COLUMNS / 2 + 2 * half;
          store_pair(to, &line, token, job.g, 8 * c + t % 4 * 2, dim, factor * x[0], factor * x[1]);
        }
    }
}

template <int DIM, bool BENT>
static __global__ __cluster_dims__(BACKWARD_CLUSTER(DIM), 1, 1)
    __launch_bounds__(512, 1) void backward_kernel(const __grid_constant__ backward_call call) {
  typedef backward_layout<DIM> L;
  extern __shared__ unsigned char memory[];
  const uint32_t shared = (sfa_shared_at(memory) + 1023) & ~1023u;
  const int role = threadIdx.x / 128;
  if (L::CLUSTER == 2) /* only then has the other block begun, and may be written to */
    cluster_sync();
  if (threadIdx.x == 0) {
    sfa_barrier_init(shared + L::KV_FULL, 1);
    for (int i = 0; i < L::STAGES; i++) {
      sfa_barrier_init(shared + L::Q_FULL + 8 * i, 1);
      sfa_barrier_init(shared + L::Q_EMPTY + 8 * i, 128 + 4); /* threads that read lse, warps whose products read q */
    }
    for (int i = 0; i < L::DO_STAGES; i++) {
      sfa_barrier_init(shared + L::DO_FULL + 8 * i, 1);
      sfa_barrier_init(shared + L::DO_EMPTY + 8 * i, 128 + 4);
    }
    for (int i = 0; i < L::P_SLOTS; i++) {
      sfa_barrier_init(shared + L::P_FULL + 8 * i, 128);
      sfa_barrier_init(shared + L::P_EMPTY + 8 * i, 128);
    }
    for (int i = 0; i < L::S_SLOTS; i++) {
      sfa_barrier_init(shared + L::DS_FULL + 8 * i, 1);
      sfa_barrier_init(shared + L::DS_EMPTY + 8 * i, 4 * L::CLUSTER);
    }
    sfa_barrier_init(shared + L::TURN, 1);
    sfa_barrier_publish();
    if (L::CLUSTER == 1)
      sfa_shared_store(shared + L::JOB, (uint32_t)atomicAdd(call.ticket, 1));
    else if (cluster_rank() == 0) {
      const uint32_t number = (uint32_t)atomicAdd(call.ticket, 1);
      sfa_shared_store(shared + L::JOB, number);
      asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote_at(shared + L::JOB, 1)), "r"(number) : "memory");
    }
  }
  __syncthreads();
  if (L::CLUSTER == 2)
    cluster_sync();
  const backward_job job = find_job<DIM>(&call, shared);
  if (job.n >= job.shape.k_tiles)
    return;
  if (role == 3) {
    sfa_registers_release<24>();
    if (threadIdx.x == 384 && job.n_steps > 0)
      run_loads<DIM>(&call, &job, shared);
    else if (threadIdx.x / 32 == 13)
      run_turns<DIM>(&call, &job, shared);
  } else if (role == 2) {
    sfa_registers_release<64>();
    if (job.n_steps > 0)
      run_queries<DIM>(&call, &job, shared);
  } else {
    float sum[L::UNITS][L::PIECES][L::COLUMNS / 2];
    if (role == 0) {
      sfa_registers_take<224>();
      clear<DIM>(sum);
      if (job.n_steps > 0) {
        const int key = job.key, first = key - 64 * job.first - job.shape.shift;
        const backward_view view = {
            first, first, key - 64 * job.end - job.shape.shift, job.shape.n_keys - key, call.n_sinks - key, job.g * call.group};
        run_scores<DIM, BENT>(&call, view, job.n_steps, shared, sum);
      }
      write_sums<DIM>(&call, shared, &call.d_v, call.dim_v, 1 / BACKWARD_WEIGHT, sum);
    } else {
      sfa_registers_take<200>();
      clear<DIM>(sum);
      if (job.n_steps > 0)
        run_gradients<DIM>(job.n_steps, shared, sum);
      write_sums<DIM>(&call, shared, &call.d_k, call.dim, call.softmax_scale / BACKWARD_WEIGHT, sum);
    }
  }
  if (L::CLUSTER == 2) { /* nobody leaves while the other may still write here */
    __syncwarp();
    cluster_sync();
  }
}

#endif
