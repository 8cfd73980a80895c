/* cuda/backward_parts.cuh: what the groups of a block of backward_sm90.cuh share: shared memory, the block's work, rings of buffers,
 * products, and the arithmetic between them. */
#ifndef SFA_BACKWARD_PARTS_CUH
#define SFA_BACKWARD_PARTS_CUH

#include "cuda/backward.cuh"
#include "cuda/hopper.cuh"
#include "cuda/wgmma.cuh"

template <int DIM> struct backward_layout {
  enum {
    UNITS = 256 / DIM,
    TILE = DIM / 64 * BACKWARD_BLOCK, /* bytes of 64 rows */
    CLUSTER = BACKWARD_CLUSTER(DIM),
    OWNERS = DIM < 256,               /* two groups own half of the units each; else one has dV of all, one dK */
    OWN = OWNERS ? UNITS / 2 : UNITS, /* units whose sums a group has */
    STAGES = 4 - DIM / 128,           /* buffers of q, which is given back only after dK */
    DO_STAGES = 256 / DIM,
    N_READERS = OWNERS ? 256 : 128 + 4, /* arrivals that give q or d_out back */
    P_SLOTS = OWNERS ? 0 : 2,
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
    FIRST = JOB + 4,        /* 1: nobody has added to the tile whose turn it is */
    BYTES = JOB + 16 + 1024 /* to align */
  };
};

/* A block's work: its share, by rank, of key tile n of sequence b and kv head g, from `key` on, with query tiles [first, end) of each of
 * the group's heads, a head after the other, the last tile first. */
typedef struct backward_job {
  int b, g, n, rank, key, first, end, n_steps;
  backward_shape shape;
} backward_job;

/* The query tile of a step. */
typedef struct backward_step {
  int head, m;
} backward_step;

static __device__ __forceinline__ backward_step first_step(const backward_call *call, const backward_job *job) {
  return (backward_step){job->g * call->group, job->end - 1};
}

static __device__ __forceinline__ void step_next(backward_step *step, const backward_job *job) {
  if (--step->m < job->first) {
    step->m = job->end - 1;
    step->head++;
  }
}

static __device__ __forceinline__ int64_t tile_of(const backward_call *call, const backward_job *job, const backward_step *step) {
  return ((int64_t)job->b * call->n_heads + step->head) * call->q_tiles + step->m;
}

/* Of a buffer used for the count-th time, of n in a ring: where it is, and the parity of the phase in which it is full. */
static __device__ __forceinline__ uint32_t slot_of(int count, int n) { return (uint32_t)count % (uint32_t)n; }
static __device__ __forceinline__ uint32_t parity_of(int count, int n) { return (uint32_t)count / (uint32_t)n & 1; }

/* The query tile of step i. */
template <int DIM> static __device__ __forceinline__ uint32_t q_at(uint32_t shared, int i) {
  return shared + backward_layout<DIM>::Q + backward_layout<DIM>::TILE * slot_of(i, backward_layout<DIM>::STAGES);
}
template <int DIM> static __device__ __forceinline__ uint32_t d_out_at(uint32_t shared, int i) {
  return shared + backward_layout<DIM>::DO + backward_layout<DIM>::TILE * slot_of(i, backward_layout<DIM>::DO_STAGES);
}
template <int DIM> static __device__ __forceinline__ void wait_for_q(uint32_t shared, int i) {
  typedef backward_layout<DIM> L;
  sfa_barrier_wait(shared + L::Q_FULL + 8 * slot_of(i, L::STAGES), parity_of(i, L::STAGES));
}
template <int DIM> static __device__ __forceinline__ void wait_for_d_out(uint32_t shared, int i) {
  typedef backward_layout<DIM> L;
  sfa_barrier_wait(shared + L::DO_FULL + 8 * slot_of(i, L::DO_STAGES), parity_of(i, L::DO_STAGES));
}
template <int DIM> static __device__ __forceinline__ uint32_t q_empty(uint32_t shared, int i) {
  return shared + backward_layout<DIM>::Q_EMPTY + 8 * slot_of(i, backward_layout<DIM>::STAGES);
}
template <int DIM> static __device__ __forceinline__ uint32_t d_out_empty(uint32_t shared, int i) {
  return shared + backward_layout<DIM>::DO_EMPTY + 8 * slot_of(i, backward_layout<DIM>::DO_STAGES);
}

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
/* Pairs, `low` in the low half; volatile, so that the compiler computes them where they stand. */
static __device__ __forceinline__ uint32_t bf16_kept(float low, float high) {
  uint32_t y;
  asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
static __device__ __forceinline__ uint32_t f16_kept(float low, float high) {
  uint32_t y;
  asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
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

/* ---- Weights, and their gradients ------------------------------------------------------------------------------------ */

/* What a group that weighs knows of its keys, in few registers. */
typedef struct backward_view {
  int away, first_away, end_away; /* of the first key from the step's first query, in this step, in a head's first, after its last */
  int keys_left, sinks_left;      /* keys, sink tokens from the first key on */
  int head;
} backward_view;

static __device__ __forceinline__ backward_view view_of(const backward_call *call, const backward_job *job, int first_unit) {
  const int key = job->key + 64 * first_unit, first = key - 64 * (job->end - 1) - job->shape.shift;
  return (backward_view){
      first, first, key - 64 * (job->first - 1) - job->shape.shift, job->shape.n_keys - key, call->n_sinks - key, job->g * call->group};
}

static __device__ __forceinline__ void view_next(backward_view *view) {
  view->away += 64;
  if (view->away == view->end_away) {
    view->away = view->first_away;
    view->head++;
  }
}

/* 8 scores, those of queries 16 i .. 16 i + 15, become weights: 4 pairs bf16, and 4 pairs f16, times the softcap's derivative. A hidden
 * score is -inf. */
template <bool BENT>
static __device__ __forceinline__ void weigh(const backward_call *call, const float *x, uint32_t lse, int away, float slope, uint32_t *p,
                                             uint32_t *w) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float2 minus = shared_pair(lse + 32 * half);
#pragma unroll
    for (int row = 0; row < 2; row++) {
      float y[2] = {x[4 * half + 2 * row], x[4 * half + 2 * row + 1]}, bend[2] = {1, 1};
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
      p[2 * half + row] = bf16_kept(y[0], y[1]);
      w[2 * half + row] = f16_kept(y[0] * bend[0], y[1] * bend[1]);
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

/* x, the scores of unit u of a group's own in step i, becomes weights p and w. */
template <int DIM, bool BENT>
static __device__ __forceinline__ void weigh_unit(const backward_call *call, const backward_view *view, uint32_t shared, float (&x)[32],
                                                  int u, int i, uint32_t (&p)[16], uint32_t (&w)[16]) {
  typedef backward_layout<DIM> L;
  const int t = threadIdx.x % 128, row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
  const float slope = BENT && call->alibi_slopes ? call->alibi_slopes[view->head] : 0;
  const int away = view->away + 64 * u;
  if (!(64 * u + 64 <= view->keys_left && away + 63 <= call->right && (away - 63 >= -call->left || 64 * u + 64 <= view->sinks_left)))
    hide(call, x, away + row - column, view->keys_left - 64 * u - row, view->sinks_left - 64 * u - row);
  const uint32_t lse = shared + L::LSE + 256 * slot_of(i, L::STAGES) + 4 * column;
#pragma unroll
  for (int q = 0; q < 4; q++)
    weigh<BENT>(call, x + 8 * q, lse + 64 * q, away + row - column - 16 * q, slope, p + 4 * q, w + 4 * q);
}

/* w, and x = dP of step i, become dS in w, bf16. */
template <int DIM> static __device__ __forceinline__ void bend_unit(uint32_t shared, const float (&x)[32], uint32_t (&w)[16], int i) {
  typedef backward_layout<DIM> L;
  const uint32_t delta = shared + L::DELTA + 256 * slot_of(i, L::DO_STAGES) + 8 * (threadIdx.x % 4);
#pragma unroll
  for (int c = 0; c < 8; c++) {
    const float2 d = shared_pair(delta + 32 * c);
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const float2 y = of_f16_pair(w[2 * c + row]);
      w[2 * c + row] = bf16_kept(y.x * (x[4 * c + 2 * row] - d.x), y.y * (x[4 * c + 2 * row + 1] - d.y));
    }
  }
}

template <int DIM> static __device__ __forceinline__ uint32_t ds_slot(int unit, int i) {
  return slot_of(i, 2) * backward_layout<DIM>::UNITS + unit;
}

/* dS of a unit in step i to memory, for the products of this group and of the queries', here and in the other block. */
template <int DIM> static __device__ __forceinline__ void hand_unit(uint32_t shared, const uint32_t (&ds)[16], int unit, int i) {
  typedef backward_layout<DIM> L;
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16; /* whose address this thread gives */
  const uint32_t slot = ds_slot<DIM>(unit, i), line = shared + L::DS + L::SLOT * slot + 128 * row;
  sfa_barrier_wait(shared + L::DS_EMPTY + 8 * slot, parity_of(i, 2) ^ 1);
#pragma unroll
  for (int q = 0; q < 4; q++)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(line + ((2 * q + lane / 16) ^ (row % 8)) * 16),
                 "r"(ds[4 * q]), "r"(ds[4 * q + 1]), "r"(ds[4 * q + 2]), "r"(ds[4 * q + 3])
                 : "memory");
  sfa_shared_publish();
  sfa_named_sync(2 + threadIdx.x / 128, 128);
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

#endif
