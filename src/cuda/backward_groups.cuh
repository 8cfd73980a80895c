/* cuda/backward_groups.cuh: what each warpgroup of a block of backward_sm90.cuh does, and its warps that load and pass turns on. */
#ifndef SFA_BACKWARD_GROUPS_CUH
#define SFA_BACKWARD_GROUPS_CUH

#include "cuda/backward_parts.cuh"

/* ---- owners: all of some keys, DIM 64 and 128 ------------------------------------------------------------------------ */

/* Its products follow each other so that arithmetic runs under some: dV under dS, dK under the next weights. The loop ends with these: the
 * compiler would move their exponentials behind the next products, for which registers do not suffice; around a loop it does not. */
template <int DIM, bool BENT>
static __device__ __forceinline__ void
run_owner(const backward_call *call, backward_view view, int n_steps, uint32_t shared, int first_unit,
          float (&d_v)[backward_layout<DIM>::OWN][backward_layout<DIM>::PIECES][backward_layout<DIM>::COLUMNS / 2],
          float (&d_k)[backward_layout<DIM>::OWN][backward_layout<DIM>::PIECES][backward_layout<DIM>::COLUMNS / 2]) {
  typedef backward_layout<DIM> L;
  const uint32_t keys = shared + L::K + L::TILE * first_unit, values = shared + L::V + L::TILE * first_unit;
  float x[32];
  uint32_t p[16], w[16];
  sfa_barrier_wait(shared + L::KV_FULL, 0);
  wait_for_q<DIM>(shared, 0);
  begin_pairs<DIM>(x, keys, q_at<DIM>(shared, 0));
  sfa_matrix_wait<0>();
  weigh_unit<DIM, BENT>(call, &view, shared, x, 0, 0, p, w);
  for (int i = 0;;) {
    const uint32_t q = q_at<DIM>(shared, i), d_out = d_out_at<DIM>(shared, i);
#pragma unroll
    for (int u = 0; u < L::OWN; u++) {
      const bool is_last = u == L::OWN - 1;
      const uint32_t ds = shared + L::DS + L::SLOT * ds_slot<DIM>(first_unit + u, i);
      if (u == 0)
        wait_for_d_out<DIM>(shared, i);
      sfa_matrix_wait<0>(); /* dK of the unit before */
      if (u == 0 && i > 0)
        release(q_empty<DIM>(shared, i - 1));
      begin_pairs<DIM>(x, values + L::TILE * u, d_out);
      begin_sum(d_v[u], p, d_out);
      sfa_matrix_wait<1>();
      bend_unit<DIM>(shared, x, w, i);
      hand_unit<DIM>(shared, w, first_unit + u, i);
      if (is_last && i + 1 == n_steps) {
        begin_sum(d_k[u], ds, q);
        sfa_matrix_wait<0>();
        return;
      }
      if (is_last) {
        view_next(&view);
        wait_for_q<DIM>(shared, i + 1);
      }
      begin_pairs<DIM>(x, keys + (is_last ? 0 : L::TILE * (u + 1)), is_last ? q_at<DIM>(shared, i + 1) : q);
      begin_sum(d_k[u], ds, q);
      sfa_matrix_wait<1>(); /* the next scores, dV */
      if (is_last)
        release(d_out_empty<DIM>(shared, i++));
      weigh_unit<DIM, BENT>(call, &view, shared, x, is_last ? 0 : u + 1, i, p, w);
    }
  }
}

/* ---- scores: S, P, dV of DIM 256 ------------------------------------------------------------------------------------- */

/* x, the scores of step i, becomes weights p, and weights for the other group, which reads what the thread of the same number wrote. */
template <int DIM, bool BENT>
static __device__ __forceinline__ void weigh_and_hand(const backward_call *call, const backward_view *view, uint32_t shared, float (&x)[32],
                                                      int i, uint32_t (&p)[16]) {
  typedef backward_layout<DIM> L;
  const uint32_t slot = slot_of(i, L::P_SLOTS), to = shared + L::P + L::SLOT * slot + 16 * (threadIdx.x % 128);
  uint32_t w[16];
  sfa_barrier_wait(shared + L::P_EMPTY + 8 * slot, parity_of(i, L::P_SLOTS) ^ 1);
  weigh_unit<DIM, BENT>(call, view, shared, x, 0, i, p, w);
#pragma unroll
  for (int q = 0; q < 4; q++)
    shared_store4(to + 2048 * q, w[4 * q], w[4 * q + 1], w[4 * q + 2], w[4 * q + 3]);
  release(shared + L::P_FULL + 8 * slot);
  release(q_empty<DIM>(shared, i)); /* lse */
}

/* dV before the next scores: d_out, which has one buffer, is free the sooner. */
template <int DIM, bool BENT>
static __device__ __forceinline__ void run_scores(const backward_call *call, backward_view view, int n_steps, uint32_t shared,
                                                  float (&sum)[backward_layout<DIM>::PIECES][backward_layout<DIM>::COLUMNS / 2]) {
  typedef backward_layout<DIM> L;
  float x[32];
  uint32_t p[16];
  sfa_barrier_wait(shared + L::KV_FULL, 0);
  wait_for_q<DIM>(shared, 0);
  begin_pairs<DIM>(x, shared + L::K, q_at<DIM>(shared, 0));
  sfa_matrix_wait<0>();
  weigh_and_hand<DIM, BENT>(call, &view, shared, x, 0, p);
  for (int i = 0;;) {
    const uint32_t d_out = d_out_at<DIM>(shared, i);
    wait_for_d_out<DIM>(shared, i);
    if (++i == n_steps) {
      begin_sum(sum, p, d_out);
      sfa_matrix_wait<0>();
      return;
    }
    view_next(&view);
    begin_sum(sum, p, d_out);
    wait_for_q<DIM>(shared, i);
    begin_pairs<DIM>(x, shared + L::K, q_at<DIM>(shared, i));
    sfa_matrix_wait<1>();
    release_operand(d_out_empty<DIM>(shared, i - 1));
    sfa_matrix_wait<0>();
    weigh_and_hand<DIM, BENT>(call, &view, shared, x, i, p);
  }
}

/* ---- gradients: dP, dS, dK of DIM 256 -------------------------------------------------------------------------------- */

/* x, dP of step i, becomes dS and is handed on. */
template <int DIM> static __device__ __forceinline__ void bend_and_hand(uint32_t shared, const float (&x)[32], int i) {
  typedef backward_layout<DIM> L;
  const uint32_t slot = slot_of(i, L::P_SLOTS), from = shared + L::P + L::SLOT * slot + 16 * (threadIdx.x % 128);
  uint32_t w[16];
  sfa_barrier_wait(shared + L::P_FULL + 8 * slot, parity_of(i, L::P_SLOTS));
#pragma unroll
  for (int q = 0; q < 4; q++) {
    const uint4 pairs = shared_load4(from + 2048 * q);
    w[4 * q] = pairs.x, w[4 * q + 1] = pairs.y, w[4 * q + 2] = pairs.z, w[4 * q + 3] = pairs.w;
  }
  bend_unit<DIM>(shared, x, w, i);
  release(shared + L::P_EMPTY + 8 * slot);
  release(d_out_empty<DIM>(shared, i)); /* delta */
  hand_unit<DIM>(shared, w, 0, i);
}

template <int DIM>
static __device__ __forceinline__ void run_gradients(int n_steps, uint32_t shared,
                                                     float (&sum)[backward_layout<DIM>::PIECES][backward_layout<DIM>::COLUMNS / 2]) {
  typedef backward_layout<DIM> L;
  float x[32];
  sfa_barrier_wait(shared + L::KV_FULL, 0);
  wait_for_d_out<DIM>(shared, 0);
  begin_pairs<DIM>(x, shared + L::V, d_out_at<DIM>(shared, 0));
  sfa_matrix_wait<0>();
  bend_and_hand<DIM>(shared, x, 0);
  for (int i = 0;;) {
    const uint32_t q = q_at<DIM>(shared, i), ds = shared + L::DS + L::SLOT * ds_slot<DIM>(0, i);
    wait_for_q<DIM>(shared, i);
    if (++i == n_steps) {
      begin_sum(sum, ds, q);
      sfa_matrix_wait<0>();
      return;
    }
    begin_sum(sum, ds, q);
    wait_for_d_out<DIM>(shared, i);
    begin_pairs<DIM>(x, shared + L::V, d_out_at<DIM>(shared, i));
    sfa_matrix_wait<1>();
    release_operand(q_empty<DIM>(shared, i - 1));
    sfa_matrix_wait<0>();
    bend_and_hand<DIM>(shared, x, i);
  }
}

/* ---- queries: dQ ----------------------------------------------------------------------------------------------------- */

/* This block's columns, 64 at a time: 32 registers, so that the other groups have enough. */
template <int DIM> static __device__ __forceinline__ void run_queries(const backward_call *call, const backward_job *job, uint32_t shared) {
  typedef backward_layout<DIM> L;
  const int t = threadIdx.x % 128;
  const uint32_t first_block = job->rank * (DIM / 128);
  const int n_tiles = job->end - job->first;
  const backward_step step = first_step(call, job);
  float4 *out = call->d_q + tile_of(call, job, &step) * (16 * DIM) + first_block * 1024 + t;
  int left = n_tiles; /* of this head */
  sfa_barrier_wait(shared + L::KV_FULL, 0);
#pragma unroll 1
  for (int i = 0; i < job->n_steps; i++) {
    const uint32_t first_slot = slot_of(i, 2) * L::UNITS;
    bool first = false;
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
      if (piece == 0) {
        sfa_barrier_wait(shared + L::TURN, i & 1);
        first = sfa_shared_load(shared + L::FIRST);
      }
      if (first) {
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
    out -= 16 * DIM / L::CLUSTER + 16 * DIM;
    if (--left == 0) {
      left = n_tiles;
      out += (call->q_tiles + n_tiles) * (16 * DIM);
    }
    sfa_named_arrive(1, 160);
  }
}

/* The warp that waits for this block's turn at a query tile, and passes it on once the sums are there: its release orders the additions of
 * the group that it has met at the barrier. */
template <int DIM> static __device__ __forceinline__ void run_turns(const backward_call *call, const backward_job *job, uint32_t shared) {
  backward_step step = first_step(call, job);
  for (int i = 0; i < job->n_steps; i++) {
    int *turns = call->turns + 2 * tile_of(call, job, &step) + job->rank;
    const int turn = count_before(call, &job->shape, job->n, step.m);
    if (threadIdx.x % 32 == 0) {
      int done = 0;
      while (done < turn)
        asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(done) : "l"(turns) : "memory");
      sfa_shared_store(shared + backward_layout<DIM>::FIRST, turn == 0);
      sfa_barrier_arrive(shared + backward_layout<DIM>::TURN);
    }
    sfa_named_sync(1, 160);
    if (threadIdx.x % 32 == 0) {
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
  backward_step step = first_step(call, job);
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

#endif
