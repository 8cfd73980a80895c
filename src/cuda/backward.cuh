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

enum {
  BACKWARD_ROWS = 64,       /* of a tile of queries, of a unit of keys */
  BACKWARD_BLOCK = 64 * 128 /* bytes of a block of 64 columns */
};
/* Of a key tile: blocks in its cluster, keys (their logarithm), units. */
#define BACKWARD_CLUSTER(DIM) ((DIM) == 64 ? 1 : 2)
#define BACKWARD_KEYS_LOG2(DIM) ((DIM) == 256 ? 7 : 8)
#define BACKWARD_UNITS(DIM) (1 << (BACKWARD_KEYS_LOG2(DIM) - 6))
#define BACKWARD_FAR (1 << 29) /* a window without an end */
#define BACKWARD_SHIFT 14      /* weights are computed times 2^14 (backward_sm90.cuh) */
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

/* How many of the key tiles above n meet query tile m (n = -1: how many of all). Key tiles add to a query tile in falling order: under a
 * causal mask the block of tile n begins at its diagonal, and the one before is a step ahead of it everywhere. Windows leave the tiles
 * [lowest, highest], and those with sink tokens below. */
static __device__ __forceinline__ int count_above(const backward_call *call, const backward_shape *s, int n, int m) {
  const int highest = min((64 * (m + 1) + call->right + s->shift - 1) >> s->tile_log2, s->k_tiles - 1);
  const int lowest = call->left == BACKWARD_FAR ? 0 : max((64 * m + s->shift - call->left) >> s->tile_log2, 0);
  const int sinks = min(min((call->n_sinks + (1 << s->tile_log2) - 1) >> s->tile_log2, lowest), highest + 1);
  return max(highest - max(n, lowest - 1), 0) + max(sinks - 1 - n, 0);
}

/* ---- Rows of the caller ---------------------------------------------------------------------------------------------- */

/* A row of gradients that a thread writes by pairs of columns, one in each 8 columns, from left to right. */
typedef struct backward_line {
  int64_t row; /* token * n_heads + head */
  int before;  /* kept features in the words of the support that it has left behind */
} backward_line;

/* x, y to columns `column` and column + 1 of the row: 0 where the support has no bit; and to their places among the kept ones. */
static __device__ __forceinline__ void store_pair(const sfa_cuda_gradient *to, backward_line *line, int64_t token, int head, int column,
                                                  int dim, float x, float y) {
  const uint32_t *support = to->support ? to->support + line->row * ((dim + 31) / 32) + column / 32 : NULL;
  const uint32_t word = support ? *support : ~0u, kept = word >> column % 32;
  if (to->values) {
    if (column >= 32 && column % 32 < 8)
      line->before += support ? __popc(support[-1]) : 32;
    float *out = to->values + line->row * to->k + line->before + __popc(word & ((1u << column % 32) - 1));
    if (kept & 1)
      *out++ = x;
    if (kept & 2)
      *out = y;
  }
  if (!to->rows.data)
    return;
  x = kept & 1 ? x : 0;
  y = kept & 2 ? y : 0;
  const int64_t at = token * to->rows.token_stride + head * to->rows.head_stride + column;
  if (to->rows.dtype == SFA_F32) {
    float *out = (float *)to->rows.data + at;
    if (((uintptr_t)out & 7) == 0)
      *(float2 *)out = make_float2(x, y);
    else {
      out[0] = x;
      out[1] = y;
    }
  } else {
    __nv_bfloat16 *out = (__nv_bfloat16 *)to->rows.data + at;
    if (((uintptr_t)out & 3) == 0)
      *(__nv_bfloat162 *)out = __floats2bfloat162_rn(x, y);
    else {
      out[0] = __float2bfloat16_rn(x);
      out[1] = __float2bfloat16_rn(y);
    }
  }
}

#endif
