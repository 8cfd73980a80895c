/* Decode: what a call becomes, and the joining of its parts.
 *
 *     parts   decode_stream.cuh, or decode_plain.cu for what that has no instance of
 *             with eps > 0 decode_drop.cuh does it all
 *     join    m = max m_s, l = sum l_s 2^(m_s - m) (+ the sink), o = sum o_s 2^(m_s - m) / l over the splits, in their order
 *
 * Both start early (cuda_early.cuh). */
#include "base/cuda_early.cuh"
#include "cuda/decode_call.cuh"
#include "cuda/decode_launch.h"

#include <algorithm>

enum { TARGET_BLOCKS = 264, MAX_SPLITS = 256, JOIN_THREADS = 256 }; /* blocks: two of each of 132 multiprocessors, whatever GPU it is */

/* ---- Join ---------------------------------------------------------------------------------------------------------------------------- */

/* A warp takes every eighth split, AT_ONCE of which are on their way while the largest m is looked for. */
static __global__ __launch_bounds__(JOIN_THREADS) void join_kernel(const __grid_constant__ sfa_decode_call call) {
  enum { WARPS = JOIN_THREADS / 32, AT_ONCE = 5 };
  __shared__ float4 columns[WARPS][32];
  int32_t self = (int32_t)threadIdx.x, lane = self & 31, warp = self / 32, n_splits = call.n_splits, dim_v = call.args.head_dim_v;
  int64_t index = blockIdx.x; /* [B][G][n_rows] */
  int32_t row = (int32_t)(index % call.n_rows), b = (int32_t)(index / call.n_rows / call.args.n_kv_heads);
  int32_t head = (int32_t)(index / call.n_rows % call.args.n_kv_heads) * call.group + row % call.group;
  int64_t to = ((int64_t)b * call.args.n_queries + row / call.group) * call.args.n_heads + head;
  const float2 *sums = call.part_sums + index * n_splits;
  const float *left = call.drop_left ? call.drop_left + index * n_splits : NULL;
  sfa_cuda_wait_for_previous();
  float sink = call.args.scores.sink_logit ? call.args.scores.sink_logit[head] * 1.44269504f : -INFINITY;
  float m = fmaxf(SFA_DECODE_NOTHING, sink), l = 0, gone = 0;
  for (int32_t first = 0; first < dim_v; first += 128) {
    int32_t e = first + 4 * lane;
    const float *parts = call.part_out + index * n_splits * dim_v + e;
    float4 o = make_float4(0, 0, 0, 0);
    int32_t from = warp;
    do {
      float4 x[AT_ONCE];
      float2 sum[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        int32_t s = from + i * WARPS;
        sum[i] = s < n_splits ? sums[s] : make_float2(0, 0);
        x[i] = s < n_splits && e < dim_v ? *(const float4 *)(parts + (int64_t)s * dim_v) : make_float4(0, 0, 0, 0);
      }
      if (first == 0 && from == warp) { /* each warp for itself */
#pragma unroll 1
        for (int32_t s = lane; s < n_splits; s += 32)
          m = fmaxf(m, sums[s].x);
        m = sfa_decode_warp_max(m);
#pragma unroll 1
        for (int32_t s = lane; s < n_splits; s += 32) {
          float2 part = sums[s];
          float factor = part.y == 0 ? 0.f : sfa_decode_exp2(part.x - m);
          l += part.y * factor;
          gone += left ? left[s] * factor : 0.f;
        }
        l = sfa_decode_warp_sum(l) + sfa_decode_exp2(sink - m);
        gone = sfa_decode_warp_sum(gone);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++)
        if (sum[i].y != 0) { /* 0: nothing was seen, o may not have been written */
          float factor = sfa_decode_exp2(sum[i].x - m);
          o.x = fmaf(x[i].x, factor, o.x), o.y = fmaf(x[i].y, factor, o.y), o.z = fmaf(x[i].z, factor, o.z),
          o.w = fmaf(x[i].w, factor, o.w);
        }
      from += AT_ONCE * WARPS;
    } while (from < n_splits);
    columns[warp][lane] = o;
    __syncthreads();
    if (self < 128 && first + self < dim_v) {
      float x = 0;
      for (int w = 0; w < WARPS; w++)
        x += ((const float *)columns[w])[self];
      call.args.out[to * dim_v + first + self] = l - gone <= 0 ? 0.f : x / (l - gone);
    }
    __syncthreads();
  }
  if (self == 0) {
    if (call.args.lse)
      call.args.lse[to] = l == 0 ? -INFINITY : (m + log2f(l)) * 0.693147181f;
    if (call.args.dropped)
      call.args.dropped[to] = gone > 0 ? gone / l : 0.f;
  }
}

static const char *join(const sfa_decode_call *call, cudaStream_t stream) {
  const char *refused = sfa_decode_mark_between(call, stream);
  if (refused)
    return refused;
  const dim3 grid((unsigned)(call->args.n_sequences * call->args.n_kv_heads * call->n_rows));
  return sfa_cuda_launch_after(join_kernel, grid, JOIN_THREADS, 0, stream, *call);
}

/* ---- The shape of a call ------------------------------------------------------------------------------------------------------------- */

static int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

/* Keys that a query can see, at most. */
static int64_t visible_keys(const sfa_cuda_decode *args) {
  const sfa_cuda_scores *scores = &args->scores;
  int64_t right = scores->causal ? 0 : scores->window_right;
  if (scores->window_left < 0 || right < 0)
    return args->max_keys;
  return std::min(args->max_keys, scores->window_left + right + args->n_queries + scores->n_sink_tokens + 3 * SFA_DECODE_STEP);
}

static int32_t pitch_of(const sfa_kv_stream *stream, sfa_dtype dtype) { return (int32_t)sfa_stored_bytes(dtype, stream->row_stride); }

/* All addresses of the stream are multiples of `bytes`; pages are of 64. */
static bool aligned(const sfa_cuda_store *store, const sfa_kv_stream *stream, int32_t pitch, size_t bytes) {
  size_t all = stream->offset | stream->head_bytes | (size_t)pitch;
  if (!store->pages)
    all |= (size_t)(uintptr_t)stream->base | stream->tile_bytes | (size_t)store->sequence_bytes;
  return all % bytes == 0;
}

/* From tile to tile less than 4 GiB: kernels multiply in 32 bits. */
static bool near(const sfa_cuda_store *store) {
  return !((store->ids.tile_bytes | store->values.tile_bytes | store->scales.tile_bytes) >> 32);
}

/* The stream kernel's instance for blocks of that many rows. */
static sfa_decode_launch find_stream(const sfa_decode_call *call, int32_t rows) {
  const sfa_cuda_decode *args = &call->args;
  const sfa_row_format *format = &args->k.format;
  int32_t k = format->k, value_dtype = args->v.format.dtype, dim_v = args->head_dim_v;
  size_t element = format->dtype == SFA_I8 ? 1 : 2, entries = k % 16 == 0 ? 16 : 8;
  if (args->head_dim > 256 || (format->dtype != SFA_I8 && format->dtype != SFA_BF16) || !near(&args->k) || !near(&args->v) ||
      !aligned(&args->v, &args->v.values, call->value_pitch, 16) ||
      !aligned(&args->k, &args->k.values, call->key_pitch, std::min(entries * element, (size_t)16)))
    return NULL;
  if (k ? k % 8 || !aligned(&args->k, &args->k.ids, call->ids_pitch, entries) : args->head_dim != dim_v)
    return NULL;
  if (value_dtype == SFA_E4M3)
    return k && format->dtype == SFA_I8 ? sfa_decode_fp8_codes(k, rows, dim_v) : sfa_decode_fp8_rows(format->dtype, k, rows, dim_v);
  if (!k)
    return (format->dtype == SFA_I8 ? sfa_decode_dense_i8 : sfa_decode_dense_bf16)(value_dtype, rows, dim_v);
  if (format->dtype == SFA_BF16)
    return sfa_decode_stream_bf16(value_dtype, rows, dim_v);
  sfa_decode_launch launch = k == 8    ? sfa_decode_stream_k8(value_dtype, rows, dim_v)
                             : k == 16 ? sfa_decode_stream_k16(value_dtype, rows, dim_v)
                                       : NULL;
  return launch ? launch : sfa_decode_stream_i8(value_dtype, rows, dim_v);
}

/* Rows of a block where all instances are at hand: the fewest blocks, hence the most splits. */
static int32_t usual_rows(int32_t n_rows) { return n_rows == 1 ? 1 : n_rows <= 4 ? 4 : 8; }

static int64_t n_steps(const sfa_cuda_decode *args) { return (visible_keys(args) + SFA_DECODE_STEP - 1) / SFA_DECODE_STEP; }

static int64_t n_pairs(const sfa_decode_call *call) { return (int64_t)call->args.n_sequences * call->args.n_kv_heads * call->n_row_blocks; }

/* Cuts the rows into blocks and the keys into splits. */
static void cut(sfa_decode_call *call, int32_t rows_of_block) {
  call->rows_of_block = rows_of_block;
  call->n_row_blocks = (call->n_rows + rows_of_block - 1) / rows_of_block;
  int64_t target = call->args.n_sequences > 1 ? 4 * TARGET_BLOCKS : TARGET_BLOCKS;
  int64_t splits = std::min(target / n_pairs(call), (n_steps(&call->args) + SFA_DECODE_WARPS - 1) / SFA_DECODE_WARPS);
  call->n_splits = (int32_t)std::max((int64_t)1, std::min(splits, (int64_t)MAX_SPLITS));
}

/* Everything but what depends on where things are. */
static sfa_decode_call shape_of(const sfa_cuda_decode *args) {
  sfa_decode_call call = {};
  call.args = *args;
  call.group = args->n_heads / args->n_kv_heads;
  call.n_rows = args->n_queries * call.group;
  int32_t id_dtype = args->head_dim <= 256 ? SFA_I8 : SFA_BF16;
  call.ids_pitch = pitch_of(&args->k.ids, (sfa_dtype)id_dtype);
  call.key_pitch = pitch_of(&args->k.values, args->k.format.dtype);
  call.key_scale_pitch = pitch_of(&args->k.scales, SFA_F16);
  call.value_pitch = pitch_of(&args->v.values, args->v.format.dtype);
  call.value_scale_pitch = pitch_of(&args->v.scales, SFA_F16);
  for (call.id_mask = 1; call.id_mask < (uint32_t)args->head_dim;)
    call.id_mask *= 2;
  call.id_mask--;
  call.magic = 0x43004300u;
  call.scale_log2 = args->scores.softmax_scale * 1.44269504f;
  cut(&call, usual_rows(call.n_rows));
  return call;
}

/* The kernel that takes the call exactly; cuts it anew where that takes other blocks of rows. */
static sfa_decode_launch choose_stream(sfa_decode_call *call) {
  sfa_decode_launch launch = find_stream(call, call->rows_of_block);
  if (!launch && call->rows_of_block == 1 && (launch = find_stream(call, 4)))
    cut(call, 4);
  if (!launch)
    cut(call, 1);
  return launch ? launch : sfa_decode_plain;
}

/* The kernels that take the call with eps; NULL: the exact form is all there is. */
static sfa_decode_launch find_drop(const sfa_decode_call *call) {
  const sfa_cuda_decode *args = &call->args;
  int32_t k = args->k.format.k;
  if (!(args->eps > 0) || args->k.format.dtype != SFA_I8 || args->head_dim > 256 || (k != 8 && k != 16) || !near(&args->k) ||
      !aligned(&args->k, &args->k.ids, call->ids_pitch, (size_t)k) || !aligned(&args->k, &args->k.values, call->key_pitch, (size_t)k) ||
      !aligned(&args->v, &args->v.values, call->value_pitch, 16))
    return NULL;
  if (args->v.format.dtype == SFA_E4M3)
    return sfa_decode_fp8_drop(k, call->rows_of_block, args->head_dim_v);
  return (k == 8 ? sfa_decode_drop_k8 : sfa_decode_drop_k16)(args->v.format.dtype, call->rows_of_block, args->head_dim_v);
}

/* Keys of a split, at most. */
static int64_t split_keys(const sfa_decode_call *call) {
  int64_t steps = (n_steps(&call->args) + call->n_splits - 1) / call->n_splits;
  return round_up(steps, SFA_DECODE_WARPS) * SFA_DECODE_STEP;
}

/* Lays what a call needs over the workspace. Returns the bytes. */
static size_t place(sfa_decode_call *call, bool drops) {
  unsigned char *memory = (unsigned char *)call->args.workspace;
  size_t at = 0, rows = (size_t)(call->args.n_sequences * call->args.n_kv_heads) * (size_t)call->n_rows,
         parts = rows * (size_t)call->n_splits;
  auto take = [&](size_t bytes) {
    unsigned char *from = memory + at;
    at += (size_t)round_up((int64_t)bytes, 256);
    return from;
  };
  call->part_sums = (float2 *)take(parts * sizeof(float2));
  call->part_out = (float *)take(parts * (size_t)call->args.head_dim_v * sizeof(float));
  if (!drops)
    return at;
  call->drop_left = (float *)take(parts * sizeof(float));
  call->drop_is_short = split_keys(call) * call->rows_of_block <= SFA_DROP_SHORT;
  if (call->drop_is_short)
    return at;
  size_t pairs = (size_t)n_pairs(call), of_pairs = pairs * (size_t)call->rows_of_block;
  call->drop_pitch = n_steps(&call->args) * SFA_DECODE_STEP;
  call->drop_counts = (uint16_t *)take(of_pairs * (size_t)call->n_splits * SFA_DROP_BINS * sizeof(uint16_t));
  call->drop_tickets = (int32_t *)take(pairs * sizeof(int32_t));
  call->drop_scores = (float *)take(of_pairs * (size_t)call->drop_pitch * sizeof(float));
  return at;
}

size_t sfa_cuda_decode_workspace_bytes(const sfa_cuda_decode *args) {
  sfa_decode_call call = shape_of(args);
  size_t bytes = place(&call, false);
  if (args->eps > 0) {
    cut(&call, std::min(call.rows_of_block, 4));
    bytes = std::max(bytes, place(&call, true));
  }
  return bytes;
}

const char *sfa_cuda_decode_run(const sfa_cuda_decode *args, sfa_cuda_stream stream) {
  sfa_decode_call call = shape_of(args), drop = call;
  sfa_decode_launch launch = sfa_decode_plain;
  int device = 0, major = 0;
  cudaError_t failed = cudaGetDevice(&device);
  if (failed == cudaSuccess)
    failed = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (failed != cudaSuccess)
    return cudaGetErrorString(failed);
  bool hopper = major == 9;
  cut(&drop, std::min(call.rows_of_block, 4));
  if (hopper && find_drop(&drop)) {
    place(&drop, true);
    const char *refused = find_drop(&drop)(&drop, stream);
    return refused || !drop.drop_is_short ? refused : join(&drop, stream);
  }
  if (hopper)
    launch = choose_stream(&call);
  else
    cut(&call, 1);
  place(&call, false);
  const char *error = launch(&call, stream);
  return error ? error : join(&call, stream);
}
