/* cuda/decode_call.cuh: what every kernel of decode shares: the call as kernels take it, which keys a block sees, and parts of splits.
 *
 * The queries of a kv head, T tokens times its group of heads, are rows: row r is token r / group, head r % group of the group. A block
 * takes up to 8 of them, so that what it reads of keys and values serves all. The keys that it sees are cut into steps of 32 (half a page),
 * those of sink tokens first, then those of the window:
 *
 *     steps   0 .. n_sink-1 | n_sink .. n_steps-1        token of step s = 32 s, or 32 (s + skip) from n_sink on
 *
 * n_splits blocks share the steps of a sequence, as equal runs; each leaves for its rows a part: m (log2 of the unit), l, o [E] in that
 * unit. The parts are joined in the order of the splits. All cuts follow from shapes and lengths alone.
 */
#ifndef SFA_CUDA_DECODE_CALL_CUH
#define SFA_CUDA_DECODE_CALL_CUH

#include "cuda/cuda_stages.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

enum { SFA_DECODE_STEP = 32, SFA_DECODE_WARPS = 8, SFA_DECODE_THREADS = 32 * SFA_DECODE_WARPS };

/* m of a row that has seen no key yet: far below every score, and finite, so that differences are numbers. */
#define SFA_DECODE_NOTHING (-3e38f)

typedef struct sfa_decode_call {
  sfa_cuda_decode args;
  int32_t group, n_rows, rows_of_block, n_row_blocks, n_splits;
  int32_t ids_pitch, key_pitch, key_scale_pitch, value_pitch, value_scale_pitch; /* bytes from row to row */
  uint32_t id_mask;                                                              /* D, rounded up to a power of two, less 1 */
  uint32_t magic;                                                                /* 0x43004300: see sfa_decode_bf16_of_bytes */
  float scale_log2;                                                              /* softmax_scale * log2(e) */
  float2 *part_sums;                                                             /* [B][G][n_rows][n_splits] m, l */
  float *part_out;                                                               /* [B][G][n_rows][n_splits][E] */
  /* Of calls with eps, with pairs = [B][G][row blocks]; all but the first and the last two of long ones only: */
  float *drop_left;      /* [B][G][n_rows][n_splits] mass that was left out, in the part's unit; NULL: nothing was */
  uint16_t *drop_counts; /* [pairs][n_splits][rows_of_block][bins] bf16 */
  int32_t *drop_tickets; /* [pairs] */
  float *drop_scores;    /* [pairs][drop_pitch][rows_of_block] */
  int64_t drop_pitch;
  int32_t drop_is_short;
  size_t drop_scores_at; /* in a short one's shared memory */
} sfa_decode_call;

/* On the host, when the pass over the keys has been enqueued: whoever times the stages marks the stream here. */
static inline const char *sfa_decode_mark_between(const sfa_decode_call *call, cudaStream_t stream) {
  cudaError_t error = call->args.between ? cudaEventRecord((cudaEvent_t)call->args.between, stream) : cudaSuccess;
  return error == cudaSuccess ? NULL : cudaGetErrorString(error);
}

/* ---- Small things -------------------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ float sfa_decode_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

static __device__ __forceinline__ float sfa_decode_warp_max(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1)
    x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

static __device__ __forceinline__ float sfa_decode_warp_sum(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1)
    x += __shfl_xor_sync(~0u, x, step);
  return x;
}

static __device__ __forceinline__ float sfa_decode_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

/* x / n of whole numbers from 0 on; n = 1 and x < n are usual, and a division is long. */
static __device__ __forceinline__ int32_t sfa_decode_quotient(int32_t x, int32_t n) { return n == 1 ? x : x < n ? 0 : x / n; }

/* ---- Which keys a block sees --------------------------------------------------------------------------------------------------------- */

/* Keys and positions count below 2^30. */
typedef struct sfa_decode_span {
  int32_t b, g, first_row, first_token, n_tokens; /* rows first_row .. first_row + rows_of_block - 1; their tokens */
  int32_t n_keys, first_position;                 /* of first_token */
  int32_t all_from, all_end, n_sink_tokens;       /* keys that every row sees, sink tokens apart */
  int32_t n_steps, n_sink_steps, skip;
} sfa_decode_span;

static __device__ __forceinline__ int32_t sfa_decode_small(int64_t n) { return (int32_t)min(n, (int64_t)1 << 30); }

/* First key of a position's window, and one behind its last. */
static __device__ __forceinline__ int32_t sfa_decode_window_from(const sfa_cuda_scores &scores, int32_t position) {
  return scores.window_left < 0 ? 0 : max(position - sfa_decode_small(scores.window_left), 0);
}
static __device__ __forceinline__ int32_t sfa_decode_window_end(const sfa_cuda_scores &scores, int32_t position, int32_t n_keys) {
  int32_t end = n_keys;
  if (scores.window_right >= 0)
    end = min(end, position + sfa_decode_small(scores.window_right) + 1);
  return max(scores.causal ? min(end, position + 1) : end, 0);
}

static __device__ __forceinline__ sfa_decode_span sfa_decode_span_of(const sfa_decode_call &call, int32_t b, int32_t g, int32_t row_block,
                                                                     int32_t n_keys) {
  const sfa_cuda_scores &scores = call.args.scores;
  sfa_decode_span span;
  span.b = b;
  span.g = g;
  span.first_row = row_block * call.rows_of_block;
  int32_t last_row = min(span.first_row + call.rows_of_block, call.n_rows) - 1;
  span.first_token = sfa_decode_quotient(span.first_row, call.group);
  span.n_tokens = sfa_decode_quotient(last_row, call.group) - span.first_token + 1;
  span.n_keys = min(max(n_keys, 0), sfa_decode_small(call.args.max_keys));
  span.first_position = span.n_keys - call.args.n_queries + span.first_token;
  int32_t last_position = span.first_position + span.n_tokens - 1;
  int32_t from = sfa_decode_window_from(scores, span.first_position), end = sfa_decode_window_end(scores, last_position, span.n_keys);
  span.all_from = sfa_decode_window_from(scores, last_position);
  span.all_end = sfa_decode_window_end(scores, span.first_position, span.n_keys);
  span.n_sink_tokens = sfa_decode_small(scores.n_sink_tokens);
  int32_t end_step = (end + SFA_DECODE_STEP - 1) / SFA_DECODE_STEP;
  int32_t first_step = min(min(from, end) / 64 * 2, end_step); /* even, as the number of those before it: pages stay whole */
  span.n_sink_steps = min((min(span.n_sink_tokens, end) + 63) / 64 * 2, first_step);
  span.skip = first_step - span.n_sink_steps;
  span.n_steps = span.n_sink_steps + end_step - first_step;
  return span;
}

/* First token of a step. */
static __device__ __forceinline__ int32_t sfa_decode_step_token(const sfa_decode_span &span, int32_t step) {
  return SFA_DECODE_STEP * (step < span.n_sink_steps ? step : step + span.skip);
}

/* Every row sees every key of the step that begins there. */
static __device__ __forceinline__ bool sfa_decode_step_whole(const sfa_decode_span &span, int32_t token) {
  return token + SFA_DECODE_STEP <= span.all_end && (token >= span.all_from || token + SFA_DECODE_STEP <= span.n_sink_tokens);
}

/* The span's token number t (0: first_token) sees that key. */
static __device__ __forceinline__ bool sfa_decode_sees(const sfa_decode_call &call, const sfa_decode_span &span, int32_t t, int32_t key) {
  int32_t position = span.first_position + t;
  return key < sfa_decode_window_end(call.args.scores, position, span.n_keys) &&
         (key >= sfa_decode_window_from(call.args.scores, position) || key < span.n_sink_tokens);
}

/* Steps of split number `split`: [*first, *end). A split takes a multiple of 8, one for each warp. */
static __device__ __forceinline__ void sfa_decode_split_steps(int32_t n_steps, int32_t n_splits, int32_t split, int32_t *first,
                                                              int32_t *end) {
  int32_t share = (n_steps + n_splits - 1) / n_splits;
  share = (share + SFA_DECODE_WARPS - 1) / SFA_DECODE_WARPS * SFA_DECODE_WARPS;
  *first = (int32_t)min((int64_t)share * split, (int64_t)n_steps);
  *end = min(*first + share, n_steps);
}

/* ---- Where rows are ------------------------------------------------------------------------------------------------------------------ */

/* One stream of a sequence's kv head. */
typedef struct sfa_decode_rows {
  const unsigned char *start; /* of the head in tile 0, or what to add to a page */
  size_t tile_bytes;          /* 0: pages */
  int32_t pitch;
} sfa_decode_rows;

static __device__ __forceinline__ sfa_decode_rows sfa_decode_rows_of(const sfa_cuda_store &store, const sfa_kv_stream &stream,
                                                                     int32_t pitch, int32_t b, int32_t g) {
  size_t within = stream.offset + (size_t)g * stream.head_bytes;
  if (store.pages)
    return {(const unsigned char *)within, 0, pitch};
  return {stream.base + (size_t)b * (size_t)store.sequence_bytes + within, stream.tile_bytes, pitch};
}

/* The page of a token; NULL without pages. */
static __device__ __forceinline__ const unsigned char *sfa_decode_page(const sfa_cuda_store &store, int32_t b, int32_t token) {
  return store.pages ? store.pages[(int64_t)b * store.max_pages + (token >> 6)] : NULL;
}

/* Row of a token whose page is known. */
static __device__ __forceinline__ const unsigned char *sfa_decode_row(const sfa_decode_rows &rows, const unsigned char *page,
                                                                      int32_t token) {
  return (rows.tile_bytes ? rows.start + (size_t)(token >> 6) * rows.tile_bytes : page + (size_t)rows.start) +
         (int64_t)((token & 63) * rows.pitch);
}

/* The lane's row of one stream in a warp's steps, which all begin at the same place in a page: half of them, or none. */
typedef struct sfa_decode_walk {
  const unsigned char *start; /* of the lane's row in tile 0, or what to add to a page */
  uint32_t tile_bytes;        /* 0: pages */
  int32_t pitch;
} sfa_decode_walk;

static __device__ __forceinline__ sfa_decode_walk sfa_decode_walk_of(const sfa_decode_rows &rows, int32_t token, int32_t lane) {
  return {rows.start + ((token & 63) + lane) * rows.pitch, (uint32_t)rows.tile_bytes, rows.pitch};
}

/* In the step at a token of that page (NULL without pages); `over`: rows that the lane's would be behind the last one. */
static __device__ __forceinline__ const unsigned char *sfa_decode_walk_to(const sfa_decode_walk &walk, const unsigned char *page,
                                                                          int32_t token, int32_t over) {
  return walk.start + (size_t)page + (uint64_t)(uint32_t)(token >> 6) * walk.tile_bytes - (uint32_t)(over * walk.pitch);
}

/* ---- Queries ------------------------------------------------------------------------------------------------------------------------- */

/* Rows first_row, ... of a kv head to shared memory: out [n][D], turned where there is a rope, as kernel/convert_tmpl.c rounds (scale comes
 * later); rows beyond the last are 0. All threads of the block; a barrier follows. AT_ONCE features a thread are on their way together.
 * (Loops that go round a few times before and behind the keys are not unrolled beyond that: a kernel finds its instructions in no cache,
 * and fetching more of them takes longer than running them.) */
static __device__ __forceinline__ void sfa_decode_load_queries(const sfa_decode_call &call, int32_t b, int32_t g, int32_t first_row,
                                                               int32_t n, float *out) {
  enum { AT_ONCE = 4 };
  const sfa_cuda_decode &args = call.args;
  const int32_t dim = args.head_dim, shift = __popc(call.id_mask), self = (int32_t)threadIdx.x;
#pragma unroll 1
  for (int32_t first = self; first < n << shift; first += AT_ONCE * SFA_DECODE_THREADS) {
    float x[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      const int32_t i = first + j * SFA_DECODE_THREADS, row = first_row + (i >> shift), u = i & (int32_t)call.id_mask;
      x[j] = 0;
      if (i < n << shift && row < call.n_rows && u < dim) {
        const int32_t line = sfa_decode_quotient(row, call.group), head = g * call.group + row - line * call.group;
        const int64_t at = ((int64_t)b * args.n_queries + line) * args.q.token_stride + head * args.q.head_stride + u;
        x[j] = args.q.dtype == SFA_F32 ? ((const float *)args.q.data)[at] : __bfloat162float(((const __nv_bfloat16 *)args.q.data)[at]);
      }
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      const int32_t i = first + j * SFA_DECODE_THREADS, u = i & (int32_t)call.id_mask;
      if (i < n << shift && u < dim)
        out[(i >> shift) * dim + u] = x[j];
    }
  }
  __syncthreads();
  if (!args.rope_cos)
    return;
#pragma unroll 1
  for (int32_t i = self; i < n * args.n_pairs; i += SFA_DECODE_THREADS) {
    const int32_t r = i / args.n_pairs, pair = i - r * args.n_pairs, apart = args.rope_interleaved ? 1 : args.n_pairs;
    const int32_t line = min((first_row + r) / call.group, args.n_queries - 1), at = line * args.n_pairs + pair;
    float *x = out + r * dim + (args.rope_interleaved ? 2 * pair : pair);
    const float even = x[0], odd = x[apart], c = args.rope_cos[at], s = args.rope_sin[at];
    x[0] = __fsub_rn(__fmul_rn(even, c), __fmul_rn(odd, s));
    x[apart] = __fadd_rn(__fmul_rn(odd, c), __fmul_rn(even, s));
  }
  __syncthreads();
}

/* Rows cut to their k_q largest, a warp a row; magnitudes as whole numbers: NaN is the largest, and of equal ones those with the lower ids
 * stay. n_low >= k reach low, n_high < k reach high: down from the maximum in growing steps, then halves. A lane's EACH magnitudes (D at
 * most 32 EACH) stay in registers; EACH = 0: rows of any length, read again for every count. All threads of the block; a barrier
 * follows. */
template <int EACH> static __device__ __forceinline__ void sfa_decode_cut_queries(const sfa_decode_call &call, int32_t n, float *rows) {
  const int32_t dim = call.args.head_dim, k = call.args.k_q, lane = (int32_t)threadIdx.x & 31, each = EACH ? EACH : (dim + 31) / 32;
  if (k == 0 || k >= dim)
    return;
#pragma unroll 1
  for (int32_t r = (int32_t)threadIdx.x / 32; r < n; r += SFA_DECODE_WARPS) {
    float *row = rows + r * dim + lane;
    uint32_t kept[EACH ? EACH : 1] = {}, most = 0, low = 0;
    auto read = [&](int32_t i) { return lane + 32 * i < dim ? __float_as_uint(row[32 * i]) & 0x7fffffffu : 0; };
    auto magnitude = [&](int32_t i) { return EACH ? kept[EACH ? i : 0] : read(i); };
#pragma unroll
    for (int32_t i = 0; i < each; i++) {
      const uint32_t own = read(i);
      kept[EACH ? i : 0] = own;
      most = max(most, own);
    }
    uint32_t high = __reduce_max_sync(~0u, most) + 1;
    int32_t n_high = 0, n_low = dim;
    for (uint32_t step = 1u << 22; n_low != k && high - low > 1; step = min(2 * step, 1u << 30)) {
      const uint32_t trial = low == 0 && high > step ? high - step : low + (high - low) / 2;
      int32_t n_trial = 0;
#pragma unroll
      for (int32_t i = 0; i < each; i++)
        n_trial += magnitude(i) >= trial;
      n_trial = __reduce_add_sync(~0u, n_trial);
      if (n_trial < k) {
        high = trial;
        n_high = n_trial;
      } else {
        low = trial;
        n_low = n_trial;
      }
    }
#pragma unroll
    for (int32_t i = 0; i < each; i++)
      if (lane + 32 * i < dim && magnitude(i) < low)
        row[32 * i] = 0;
    if (n_low > k) { /* of those at low the first k - n_high stay */
      int32_t n_equal = k - n_high;
#pragma unroll 1
      for (int32_t i = 0; i < (dim + 31) / 32; i++) {
        const bool is_low = lane + 32 * i < dim && read(i) == low;
        const uint32_t equal = __ballot_sync(~0u, is_low);
        if (is_low && __popc(equal & ((1u << lane) - 1)) >= n_equal)
          row[32 * i] = 0;
        n_equal -= __popc(equal);
      }
    }
  }
  __syncthreads();
}

/* Which query a row of a block is. */
typedef struct sfa_decode_query {
  int32_t token, head; /* token: from the span's first_token on */
} sfa_decode_query;

static __device__ __forceinline__ sfa_decode_query sfa_decode_query_of(const sfa_decode_call &call, const sfa_decode_span &span,
                                                                       int32_t r) {
  int32_t row = min(span.first_row + r, call.n_rows - 1);
  int32_t token = sfa_decode_quotient(row, call.group);
  return {token - span.first_token, span.g * call.group + row - token * call.group};
}

/* A product is only scaled: no softcap, no slope. */
static __device__ __forceinline__ bool sfa_decode_straight(const sfa_decode_call &call) {
  return !(call.args.scores.softcap > 0) && !call.args.scores.alibi_slopes;
}

/* What a product becomes before the softmax, in units of log2: scale, softcap, slope. tanh x = 1 - 2 / (e^2x + 1), right to 2^-23 of 1. */
static __device__ __forceinline__ float sfa_decode_bend(const sfa_decode_call &call, float product, int32_t head, int32_t distance) {
  const sfa_cuda_scores &scores = call.args.scores;
  float s = product * call.scale_log2;
  if (scores.softcap > 0)
    s = scores.softcap * 1.44269504f * (1 - __fdividef(2, sfa_decode_exp2(s * (2 / scores.softcap)) + 1));
  if (scores.alibi_slopes)
    s = fmaf(scores.alibi_slopes[head] * 1.44269504f, (float)distance, s);
  return s;
}

#endif
