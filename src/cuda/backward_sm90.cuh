/* cuda/backward_sm90.cuh: gradients of a key tile, and its part of those of the queries (sm_90a).
 *
 *     S^T  = K Q^T            [64 keys][64 queries] a unit
 *     P^T  = exp(S^T - lse)   0 where masked
 *     dP^T = V dO^T
 *     dS^T = P^T (dP^T - delta), times the derivative of the softcap
 *     dV  += P^T dO           dK += dS^T Q           dQ += dS K
 *
 * Three warpgroups, so that products of one run under the arithmetic of another; two have the keys, one the queries:
 *
 *     owner, owner          DIM 64, 128: each everything of half of the keys; P, dP and sums of dV and dK stay in its registers
 *     scores, gradients     DIM 256, where the sums take the registers of both: S, P, dV and dP, dS, dK; weights go from the first to
 *                           the second through shared memory
 *     queries               dQ, which it adds to sums in memory
 *
 * a thread that loads: query tiles (q with lse, d_out with delta) go round in buffers, keys and values stay; and a warp that waits for
 * turns. P^T goes from product to product in registers: D of one is A of the next (wgmma.cuh). dS^T lies in shared memory, as A of dK and
 * of dQ.
 *
 * For DIM 128 and 256, adding dQ to memory would limit all this. Two blocks form a cluster, each with half of the key tile: the copy engine
 * hands dS on to the other block too, 16 bits each, and each block adds half of the columns of dQ, in 32 bits, for the keys of both. So
 * half as much is added, half as often. The price is room for dS and those columns of the other block's keys: DIM 256 has one buffer for
 * d_out.
 *
 * Weights wait for dP as f16 times 2^14, half of the room of f32: that keeps 11 bits down to 2^-28, where bf16 would add to dS an error as
 * large as that of its own rounding. All sums are 2^14 too large, which costs nothing: the last factor takes it back.
 *
 * dQ: the sums of a query tile are added to in the order of key tiles (count_before), whoever is early: a block waits for its turn, and
 * clusters take their tiles by ticket, so that all they wait for have begun. The first stores, the others add: no two at a time, in a fixed
 * order. All go through the queries from the last one on, and the first key tiles, which a causal mask leaves the most queries, come first:
 * a block is a step behind the one before it, and what is left at the end is short. */
#ifndef SFA_BACKWARD_SM90_CUH
#define SFA_BACKWARD_SM90_CUH

#include "cuda/backward_groups.cuh"

/* ---- The block ------------------------------------------------------------------------------------------------------- */

/* By instructions that the compiler does not move: none may come between the products of a group. */
template <int PIECES, int N> static __device__ __forceinline__ void clear(float (&sum)[PIECES][N]) {
#pragma unroll
  for (int i = 0; i < PIECES * N; i++)
    asm volatile("mov.f32 %0, 0f00000000;" : "=f"(sum[i / N][i % N]));
}

/* The block's work, by its ticket: of a batch of heads, the first key tile of each in the order of turns, then the second. */
template <int DIM> static __device__ __forceinline__ backward_job find_job(const backward_call *call, uint32_t shared) {
  backward_job job;
  const int number = (int)sfa_shared_load(shared + backward_layout<DIM>::JOB), batch = BACKWARD_BATCH(DIM) * call->k_tiles;
  const int first = number / batch * BACKWARD_BATCH(DIM);
  const int n_pairs = min(call->n_sequences * call->n_kv_heads - first, BACKWARD_BATCH(DIM));
  const int pair = first + number % batch % n_pairs, turn = number % batch / n_pairs;
  job.b = pair / call->n_kv_heads;
  job.g = pair % call->n_kv_heads;
  const int n_queries = range_of(call->cu_queries, call->max_queries, job.b).count;
  job.shape = shape_of(n_queries, range_of(call->cu_keys, call->max_keys, job.b).count, BACKWARD_KEYS_LOG2(DIM));
  job.n = turn < job.shape.k_tiles ? tile_of_turn(call, &job.shape, turn) : turn;
  job.rank = backward_layout<DIM>::CLUSTER == 1 ? 0 : (int)cluster_rank();
  job.key = (job.n << job.shape.tile_log2) + job.rank * backward_layout<DIM>::UNITS * 64;
  tiles_met(call, &job.shape, job.n, &job.first, &job.end);
  job.n_steps = max(job.end - job.first, 0) * call->group;
  return job;
}

/* Sums of a unit's keys, times factor, to the caller's rows. */
template <int DIM, int PIECES, int N>
static __device__ __forceinline__ void write_sums(const backward_call *call, uint32_t shared, int unit, const sfa_cuda_gradient *to,
                                                  int dim, float factor, const float (&sum)[PIECES][N]) {
  const backward_job job = find_job<DIM>(call, shared); /* once more: nobody kept it in registers */
  const int t = threadIdx.x % 128;
  const int64_t first = range_of(call->cu_keys, call->max_keys, job.b).first;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int key = job.key + 64 * unit + t / 32 * 16 + t % 32 / 4 + 8 * half;
    if (key >= job.shape.n_keys)
      continue;
    backward_line line = {first + key, job.g, (first + key) * call->n_kv_heads + job.g, 0};
#pragma unroll
    for (int column = 0; column < DIM; column += 32)
      if (column < dim) {
        float x[4][2];
#pragma unroll
        for (int c = 0; c < 4; c++) {
          const float *from = sum[(column / 2 + 4 * c) / N] + (column / 2 + 4 * c) % N + 2 * half;
          x[c][0] = factor * from[0];
          x[c][1] = factor * from[1];
        }
        store_pairs(to, &line, column + t % 4 * 2, dim, x);
      }
  }
}
template <int DIM, int PIECES, int N>
static __device__ __forceinline__ void write_values(const backward_call *call, uint32_t shared, int unit, const float (&sum)[PIECES][N]) {
  write_sums<DIM>(call, shared, unit, &call->d_v, call->dim_v, 1 / BACKWARD_WEIGHT, sum);
}
template <int DIM, int PIECES, int N>
static __device__ __forceinline__ void write_keys(const backward_call *call, uint32_t shared, int unit, const float (&sum)[PIECES][N]) {
  write_sums<DIM>(call, shared, unit, &call->d_k, call->dim, call->softmax_scale / BACKWARD_WEIGHT, sum);
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
      sfa_barrier_init(shared + L::Q_EMPTY + 8 * i, L::N_READERS);
    }
    for (int i = 0; i < L::DO_STAGES; i++) {
      sfa_barrier_init(shared + L::DO_FULL + 8 * i, 1);
      sfa_barrier_init(shared + L::DO_EMPTY + 8 * i, L::N_READERS);
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
  } else if constexpr (L::OWNERS) {
    float d_v[L::OWN][L::PIECES][L::COLUMNS / 2], d_k[L::OWN][L::PIECES][L::COLUMNS / 2];
    const int first_unit = __shfl_sync(~0u, role, 0) * L::OWN; /* so that the compiler sees it is one for all lanes */
    sfa_registers_take<208>();
#pragma unroll
    for (int u = 0; u < L::OWN; u++) {
      clear(d_v[u]);
      clear(d_k[u]);
    }
    if (job.n_steps > 0)
      run_owner<DIM, BENT>(&call, view_of(&call, &job, first_unit), job.n_steps, shared, first_unit, d_v, d_k);
#pragma unroll
    for (int u = 0; u < L::OWN; u++) {
      write_values<DIM>(&call, shared, first_unit + u, d_v[u]);
      write_keys<DIM>(&call, shared, first_unit + u, d_k[u]);
    }
  } else {
    float sum[L::PIECES][L::COLUMNS / 2];
    if (role == 0) {
      sfa_registers_take<224>();
      clear(sum);
      if (job.n_steps > 0)
        run_scores<DIM, BENT>(&call, view_of(&call, &job, 0), job.n_steps, shared, sum);
      write_values<DIM>(&call, shared, 0, sum);
    } else {
      sfa_registers_take<200>();
      clear(sum);
      if (job.n_steps > 0)
        run_gradients<DIM>(job.n_steps, shared, sum);
      write_keys<DIM>(&call, shared, 0, sum);
    }
  }
  if (L::CLUSTER == 2) { /* nobody leaves while the other may still write here */
    __syncwarp();
    cluster_sync();
  }
}

#endif
