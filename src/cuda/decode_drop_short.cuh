/* cuda/decode_drop_short.cuh: short calls with eps, in one launch (see decode_drop.cuh): a split's keys are weighed, and left out, against
 * the split's own mass, so that no block waits for another: what all splits leave is at most eps of what all of them hold. More keys stay
 * than when all of a row's are weighed together, the more splits, the more; but scores never leave the block. */
#ifndef SFA_CUDA_DECODE_DROP_SHORT_CUH
#define SFA_CUDA_DECODE_DROP_SHORT_CUH

#include "cuda/decode_drop.cuh"

/* Shared memory: what weighing takes, later the queues, later the sums of the warps; behind it the scores. */
template <class KEYS, class VALUES, int ROWS, int E> static size_t sfa_drop_short_scores_at(const sfa_decode_call &call) {
  size_t begin = sfa_drop_weigh_shared<KEYS, ROWS>(call), end = sfa_decode_sums_bytes<ROWS, E>,
         work = SFA_DECODE_WARPS * (size_t)sfa_drop_queue<VALUES, ROWS>::BYTES;
  return ((begin > end ? (begin > work ? begin : work) : (end > work ? end : work)) + 127) / 128 * 128;
}

template <class KEYS, class VALUES, int ROWS, int E, int AT_ONCE>
static __global__ __launch_bounds__(SFA_DECODE_THREADS, 2) void sfa_drop_short_kernel(const __grid_constant__ sfa_decode_call call) {
  enum { TURNS = SFA_DROP_SHORT / ROWS / SFA_DECODE_STEP / SFA_DECODE_WARPS / AT_ONCE, STEPS = TURNS * AT_ONCE }; /* of a warp */
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ sfa_decode_query queries_of[ROWS];
  __shared__ sfa_drop_row rows[ROWS];
  __shared__ float lefts[SFA_DECODE_WARPS][ROWS];
  const sfa_cuda_store &v = call.args.v;
  int32_t self = (int32_t)threadIdx.x, lane = self & 31, warp = self / 32,
          split = sfa_decode_quotient((int32_t)blockIdx.x, call.n_row_blocks);
  int32_t row_block = (int32_t)blockIdx.x - split * call.n_row_blocks, first_step, end_step;
  const sfa_drop_memory<KEYS, ROWS> memory(call, shared, queries_of);
  sfa_cuda_wait_for_previous();
  int32_t n_keys = call.args.n_keys[blockIdx.z];
  sfa_decode_load_queries(call, (int32_t)blockIdx.z, (int32_t)blockIdx.y, row_block * call.rows_of_block, ROWS, memory.queries);
  sfa_decode_span span = sfa_decode_span_of(call, (int32_t)blockIdx.z, (int32_t)blockIdx.y, row_block, n_keys);
  const int64_t part = sfa_drop_part(call, span.first_row, split);
  sfa_decode_split_steps(span.n_steps, call.n_splits, split, &first_step, &end_step);
  if (first_step >= end_step) {
    if (self < ROWS && span.first_row + self < call.n_rows) {
      call.part_sums[part + self * call.n_splits] = make_float2(SFA_DECODE_NOTHING, 0);
      call.drop_left[part + self * call.n_splits] = 0;
    }
    return;
  }
  if (self < ROWS)
    queries_of[self] = sfa_decode_query_of(call, span, self);
  float *scores = (float *)(shared + call.drop_scores_at) + (warp * STEPS * SFA_DECODE_STEP + lane) * ROWS; /* [STEPS][32][ROWS] a warp */
  sfa_drop_weigh<KEYS, ROWS, AT_ONCE>(call, span, memory, first_step, end_step, scores, AT_ONCE * SFA_DECODE_STEP * ROWS);

  /* Step number i of the warp, of STEPS. */
  auto step_of = [&](int32_t i) { return first_step + (i / AT_ONCE * SFA_DECODE_WARPS + warp) * AT_ONCE + i % AT_ONCE; };
  const unsigned char *page_of_lane = NULL; /* of step number `lane` */
  if (v.pages && lane < STEPS && step_of(lane) < end_step)
    page_of_lane = sfa_decode_page(v, span.b, sfa_decode_step_token(span, step_of(lane)));

  if (warp < ROWS) {
    float2 sum = lane < SFA_DECODE_WARPS ? memory.sums[warp * SFA_DECODE_WARPS + lane] : make_float2(SFA_DECODE_NOTHING, 0);
    float m = sfa_decode_warp_max(sum.x);
    sfa_drop_row row = {0, m, sfa_decode_warp_sum(sum.y * sfa_decode_exp2(sum.x - m))};
    row.edge =
        sfa_drop_edge<1>(call, (float)((end_step - first_step) * SFA_DECODE_STEP), row, m, memory.counts + warp * SFA_DROP_BINS, 0, lane);
    if (lane == 0) {
      rows[warp] = row;
      if (span.first_row + warp < call.n_rows)
        call.part_sums[part + warp * call.n_splits] = make_float2(m, row.l);
    }
  }
  __syncthreads();
  float edge[ROWS], unit[ROWS], left[ROWS]; /* left: mass of keys that leave */
#pragma unroll
  for (int r = 0; r < ROWS; r++)
    edge[r] = span.first_row + r < call.n_rows ? rows[r].edge : INFINITY, unit[r] = rows[r].unit, left[r] = 0;

  const uint32_t magic = call.magic;
  const sfa_decode_rows value_rows = sfa_decode_rows_of(v, v.values, call.value_pitch, span.b, span.g);
  const sfa_decode_rows value_scales = sfa_decode_rows_of(v, v.scales, call.value_scale_pitch, span.b, span.g);
  VALUES values;
  values.clear();
  sfa_drop_queue<VALUES, ROWS> queue;
  queue.start(shared + warp * sfa_drop_queue<VALUES, ROWS>::BYTES, lane);
  uint32_t kept = 0; /* of the lane's keys: one of each step */
#pragma unroll 4
  for (int32_t i = 0; i < STEPS; i++) {
    bool keep = false, sees = false;
    float p[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float s = step_of(i) < end_step ? scores[i * SFA_DECODE_STEP * ROWS + r] : -INFINITY;
      p[r] = sfa_decode_exp2(s - unit[r]);
      keep |= !(s < edge[r]);
      sees |= s != -INFINITY;
    }
    keep &= sees;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      left[r] += keep ? 0.f : p[r];
    kept |= keep ? 1u << i : 0u;
  }
#pragma unroll 1
  while (uint32_t pushing = __ballot_sync(~0u, kept != 0)) { /* one of each lane at a time */
    int32_t i = kept ? __ffs((int)kept) - 1 : 0, key = sfa_decode_step_token(span, step_of(i)) + lane;
    const unsigned char *page = (const unsigned char *)__shfl_sync(~0u, (uint64_t)page_of_lane, i);
    float p[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      p[r] = sfa_decode_exp2(scores[i * SFA_DECODE_STEP * ROWS + r] - unit[r]);
    queue.push(pushing, sfa_decode_row(value_rows, page, key), sfa_decode_row(value_scales, page, key), p);
    kept &= kept - 1;
    while (queue.n_queued - queue.n_asked >= queue.KEYS)
      queue.advance(queue.KEYS, values, magic);
  }
  queue.finish(values, magic);

  sfa_drop_leave<VALUES, ROWS, E>(call, span, part, values, left, (float *)shared, lefts);
}

template <class KEYS, class VALUES, int ROWS, int E, int AT_ONCE>
static const char *sfa_drop_short_launch(const sfa_decode_call *call, cudaStream_t stream) {
  void (*kernel)(sfa_decode_call) = sfa_drop_short_kernel<KEYS, VALUES, ROWS, E, AT_ONCE>;
  const dim3 grid((unsigned)(call->n_splits * call->n_row_blocks), (unsigned)call->args.n_kv_heads, (unsigned)call->args.n_sequences);
  sfa_decode_call job = *call;
  job.drop_scores_at = sfa_drop_short_scores_at<KEYS, VALUES, ROWS, E>(*call);
  const size_t bytes = job.drop_scores_at + SFA_DROP_SHORT * sizeof(float);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  return error != cudaSuccess ? cudaGetErrorString(error) : sfa_cuda_launch_after(kernel, grid, SFA_DECODE_THREADS, bytes, stream, job);
}

#endif
