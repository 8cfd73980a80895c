/* cuda/backward.cuh: what the kernels of the gradients share: the call, its workspace, who meets whom and in which order.
 *
 * Rows lie in the workspace as bf16 tiles of 64 rows: [DIM / 64] blocks of [64 rows][128 bytes], 16-byte units exchanged by unit ^ (row %
 * 8) (wgmma.cuh), rows and columns beyond the end 0. DIM, 64, 128 or 256, holds both head_dim and head_dim_v. A block of threads owns UNITS
 * units of 64 keys, UNITS * DIM = 256: gradients of keys and values then take 128 registers a thread, whatever the width is. A key tile is
 * what the blocks of a cluster own together. */
#ifndef SFA_BACKWARD_CUH
#define SFA_BACKWARD_CUH

#include "cuda/cuda_stages.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

enum { BACKWARD_BLOCK = 64 * 128 }; /* bytes of a block of 64 columns */
/* Of a key tile: blocks in its cluster, keys (their logarithm), units. */
#define BACKWARD_CLUSTER(DIM) ((DIM) == 64 ? 1 : 2)
#define BACKWARD_KEYS_LOG2(DIM) ((DIM) == 256 ? 7 : 8)
#define BACKWARD_UNITS(DIM) (1 << (BACKWARD_KEYS_LOG2(DIM) - 6))
#define BACKWARD_BATCH(DIM) (512 / (DIM)) /* heads whose key tiles are begun together */
#define BACKWARD_FAR (1 << 29)            /* a window without an end */
#define BACKWARD_SHIFT 14                 /* weights are computed times 2^14 (backward_sm90.cuh) */
#define BACKWARD_WEIGHT ((float)(1 << BACKWARD_SHIFT))

typedef struct backward_call {
  int n_sequences, n_heads, n_kv_heads, group, dim, dim_v;
  int max_queries, max_keys;
  const int32_t *cu_queries, *cu_keys; /* NULL: every sequence has max_queries, max_keys */
  int q_tiles, k_tiles;                /* of a sequence: tiles of 64 queries, key tiles */

  float softmax_scale, softcap;
  int left, right, n_sinks; /* key j is seen from position i: j <= i + right and (j >= i - left or j < n_sinks) */
  const float *alibi_slopes;

  /* Workspace. Query side: [B][H][q_tiles], key side [B][G][k_tiles * BACKWARD_UNITS]. */
  unsigned char *q, *d_out, *k, *v; /* tiles */
  float *lse, *delta; /* [64] a tile; lse in units of log2, less the shift; +inf where nothing is seen: there all weights are 0 */
  float4 *d_q;        /* [DIM / 8][128] a tile: 4 sums of thread t, as a product leaves them (wgmma.cuh) */
  int *ticket;        /* [1] clusters begun */
  int *turns;         /* [2] a tile, one of each block of a cluster: key tiles that have added to its part of d_q */

  sfa_cuda_gradient d_k, d_v;
} backward_call;

/* ---- Sequences ------------------------------------------------------------------------------------------------------- */

typedef struct backward_range {
  int first, count;
} backward_range;

static __device__ __forceinline__ backward_range range_of(const int32_t *cu, int most, int b) {
  if (!cu)
    return (backward_range){b * most, most};
  return (backward_range){cu[b], cu[b + 1] - cu[b]};
}

/* ---- Who meets whom -------------------------------------------------------------------------------------------------- */

/* Of one sequence; shift = S - T: query t has position t + shift. Floor division by a power of two is a shift of bits. */
typedef struct backward_shape {
  int n_queries, n_keys, shift, q_tiles, k_tiles, tile_log2; /* a key tile has 1 << tile_log2 keys */
} backward_shape;

static __device__ __forceinline__ backward_shape shape_of(int n_queries, int n_keys, int tile_log2) {
  return (backward_shape){n_queries, n_keys, n_keys - n_queries, (n_queries + 63) >> 6, (n_keys + (1 << tile_log2) - 1) >> tile_log2,
                          tile_log2};
}

/* Query tiles [*first, *end) that key tile n meets: those with a query that may see one of its keys. */
static __device__ __forceinline__ void tiles_met(const backward_call *call, const backward_shape *s, int n, int *first, int *end) {
  const int first_key = n << s->tile_log2, next_key = (n + 1) << s->tile_log2;
  *first = max(first_key - call->right - s->shift, 0) >> 6;
  const int last = next_key - 1 + call->left - s->shift;
  *end = call->left == BACKWARD_FAR || first_key < call->n_sinks ? s->q_tiles : min((last >> 6) + 1, s->q_tiles);
}

/* Key tiles with sink tokens that are met from beyond a window. */
static __device__ __forceinline__ int sink_tiles(const backward_call *call, const backward_shape *s) {
  return call->left == BACKWARD_FAR ? 0 : min((call->n_sinks + (1 << s->tile_log2) - 1) >> s->tile_log2, s->k_tiles);
}

/* The key tile whose turn it is: they come in rising order, those with sink tokens last. */
static __device__ __forceinline__ int tile_of_turn(const backward_call *call, const backward_shape *s, int turn) {
  const int n = turn + sink_tiles(call, s);
  return n < s->k_tiles ? n : n - s->k_tiles;
}

/* How many key tiles meet query tile m before n has its turn (n = k_tiles: how many do at all). A window leaves the tiles [lowest,
 * highest], and those with sink tokens below. */
static __device__ __forceinline__ int count_before(const backward_call *call, const backward_shape *s, int n, int m) {
  const int highest = min((64 * (m + 1) + call->right + s->shift - 1) >> s->tile_log2, s->k_tiles - 1), sinks = sink_tiles(call, s);
  const int lowest = call->left == BACKWARD_FAR ? 0 : max((64 * m + s->shift - call->left) >> s->tile_log2, sinks);
  const int in_window = max(highest + 1 - lowest, 0);
  if (n == s->k_tiles)
    return in_window + max(min(sinks, highest + 1), 0);
  return n < sinks ? in_window + n : n - lowest;
}

/* ---- Rows of the caller ---------------------------------------------------------------------------------------------- */

/* A row of gradients that a thread writes 32 columns at a time, from left to right. */
typedef struct backward_line {
  int64_t token;
  int head;
  int64_t row; /* token * n_heads + head */
  int before;  /* kept features left of what comes next */
} backward_line;

/* 4 pairs x, of columns `column` and column + 1, and 8, 16 and 24 beyond, column % 32 = 0, 2, 4 or 6, to the row: 0 where the support has
 * no bit; and to their places among the kept ones. */
static __device__ __forceinline__ void store_pairs(const sfa_cuda_gradient *to, backward_line *line, int column, int dim,
                                                   const float (&x)[4][2]) {
  const uint32_t word = to->support ? to->support[line->row * ((dim + 31) / 32) + column / 32] : ~0u, kept = word >> column % 32;
  if (to->values) {
#pragma unroll
    for (int c = 0; c < 4; c++) {
      float *out = to->values + line->row * to->k + line->before + __popc(word & ((1u << (column % 32 + 8 * c)) - 1));
      if (column + 8 * c < dim && kept >> 8 * c & 1)
        *out++ = x[c][0];
      if (column + 8 * c < dim && kept >> 8 * c & 2)
        *out = x[c][1];
    }
    line->before += __popc(word);
  }
  if (!to->rows.data)
    return;
  float y[4][2];
#pragma unroll
  for (int c = 0; c < 4; c++) {
    y[c][0] = kept >> 8 * c & 1 ? x[c][0] : 0;
    y[c][1] = kept >> 8 * c & 2 ? x[c][1] : 0;
  }
  const int64_t at = line->token * to->rows.token_stride + line->head * to->rows.head_stride + column;
  if (to->rows.dtype == SFA_F32) {
    float *out = (float *)to->rows.data + at;
    const bool aligned = ((uintptr_t)out & 7) == 0;
#pragma unroll
    for (int c = 0; c < 4; c++)
      if (column + 8 * c < dim) {
        if (aligned)
          *(float2 *)(out + 8 * c) = make_float2(y[c][0], y[c][1]);
        else {
          out[8 * c] = y[c][0];
          out[8 * c + 1] = y[c][1];
        }
      }
  } else {
    __nv_bfloat16 *out = (__nv_bfloat16 *)to->rows.data + at;
    const bool aligned = ((uintptr_t)out & 3) == 0;
#pragma unroll
    for (int c = 0; c < 4; c++)
      if (column + 8 * c < dim) {
        if (aligned)
          *(__nv_bfloat162 *)(out + 8 * c) = __floats2bfloat162_rn(y[c][0], y[c][1]);
        else {
          out[8 * c] = __float2bfloat16_rn(y[c][0]);
          out[8 * c + 1] = __float2bfloat16_rn(y[c][1]);
        }
      }
  }
}

#endif
