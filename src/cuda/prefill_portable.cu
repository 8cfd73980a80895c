/* prefill_portable: attention of many queries by mma.sync, for every GPU from sm_80 on, in bf16 with f32 sums; the way of FlashAttention-2.
 *
 *     s_ij = softmax_scale q_i . k_j     (softcap, alibi, masks)        o_i = sum_j 2^(s_ij - m_i) v_j / sum_j 2^(s_ij - m_i)
 *
 * A block has one head; a warp owns 16 TILES query rows and walks the key tiles in rising order: scores into registers (as
 * the m16n8k16 accumulators lie), online softmax there, and the weights, rounded to bf16, are the left operand of the product with the
 * values. One buffer each for a tile of keys and of values: while one is multiplied, the copy of the other is under way (cp.async).
 *
 * Rows lie in shared memory in pieces of 16 bytes, piece c of row r at c ^ (r mod 8), so that the eight rows of a ldmatrix meet all banks.
 * Features beyond head_dim are zeros there, up to a width of 64, 128 or 256: products without a branch between them, which the assembler
 * then puts under the loads. int8 rows become bf16 as they are loaded, times their scale.
 *
 * Widths 64 and 128 take four warps with two m-tiles each, so that a fragment of keys or values serves two products. O of 256 features
 * leaves registers for one m-tile: eight warps share a tile of keys, or four where shared memory is small (sm_89, sm_120: 99 KiB).
 */
#include "cuda/cuda_sight.cuh"

#include <cuda_bf16.h>
#include <math_constants.h>

enum { KEYS = 64 };

template <int WIDTH, int WARPS> struct shape {
  static constexpr int TILES = WIDTH == 256 ? 1 : 2; /* of 16 rows, a warp */
  static constexpr int ROWS = 16 * TILES * WARPS;
  static constexpr int BYTES = (ROWS + 2 * KEYS) * WIDTH * 2;
};

#define LOG2E 1.44269504088896340736f

/* ---- Instructions ----------------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
static __device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at));
}
static __device__ __forceinline__ void load_transposed(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at));
}
/* 16 bytes, or zeros. */
static __device__ __forceinline__ void copy_piece(uint32_t to, const void *from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
static __device__ __forceinline__ void copies_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Until at most the youngest group of copies is under way. */
template <int YOUNGEST> static __device__ __forceinline__ void copies_wait(void) {
  asm volatile("cp.async.wait_group %0;" ::"n"(YOUNGEST) : "memory");
}
static __device__ __forceinline__ float exp2_of(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
static __device__ __forceinline__ uint32_t two_bf16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

/* ---- Rows into shared memory -------------------------------------------------------------------------------------------------------- */

/* Byte of piece `piece` (8 features) of a row. */
template <int WIDTH> static __device__ __forceinline__ uint32_t piece_at(int row, int piece) {
  return (uint32_t)(row * WIDTH * 2 + ((piece ^ (row & 7)) << 4));
}

/* N rows from token `first` on of a head, of which `n` are there, into the block at `to`; scales: [tokens][n_heads] of int8 rows. */
template <int WIDTH, int N, int THREADS>
static __device__ __forceinline__ void load_rows(uint32_t to, const sfa_cuda_rows &rows, const float *scales, int n_heads, int dim,
                                                 int64_t first, int n, int head) {
  constexpr int PIECES = WIDTH / 8, STEP = THREADS / PIECES; /* a thread has one piece of every STEPth row */
  const int row = (int)threadIdx.x / PIECES, piece = (int)threadIdx.x % PIECES;
  const bool there = piece * 8 < dim;
  const int64_t offset = (first + row) * rows.token_stride + head * rows.head_stride + piece * 8, step = STEP * rows.token_stride;
  if (rows.dtype == SFA_BF16) {
    const uint16_t *from = (const uint16_t *)rows.data + offset;
#pragma unroll
    for (int i = 0; i < N / STEP; i++, from += step)
      copy_piece(to + piece_at<WIDTH>(row + i * STEP, piece), from, there && row + i * STEP < n);
    return;
  }
  const int8_t *from = (const int8_t *)rows.data + offset;
  const float *scale = scales + (first + row) * n_heads + head;
#pragma unroll 1
  for (int i = 0; i < N / STEP; i++, from += step, scale += STEP * n_heads) {
    uint32_t w[4] = {0, 0, 0, 0};
    if (there && row + i * STEP < n) {
#pragma unroll
      for (int j = 0; j < 4; j++)
        w[j] = two_bf16((float)from[2 * j] * *scale, (float)from[2 * j + 1] * *scale);
    }
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + piece_at<WIDTH>(row + i * STEP, piece)), "r"(w[0]), "r"(w[1]),
                 "r"(w[2]), "r"(w[3])
                 : "memory");
  }
}

/* ---- A block ------------------------------------------------------------------------------------------------------------------------ */

template <int WIDTH, int WARPS>
static __global__ void __launch_bounds__(32 * WARPS, 8 / WARPS)
    attend(const __grid_constant__ sfa_cuda_prefill a, int n_blocks, int shaped) {
  constexpr int TILES = shape<WIDTH, WARPS>::TILES, ROWS = shape<WIDTH, WARPS>::ROWS, THREADS = 32 * WARPS;
  extern __shared__ __align__(128) unsigned char memory[];
  const uint32_t q_at = (uint32_t)__cvta_generic_to_shared(memory), k_at = q_at + ROWS * WIDTH * 2, v_at = k_at + KEYS * WIDTH * 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
  const int head = blockIdx.y, b = blockIdx.z, kv_head = head / (a.n_heads / a.n_kv_heads);
  const int D = a.head_dim, E = a.head_dim_v;

  const sfa_extent of = sfa_extent_of(a, b);
  const int64_t first_q = of.first_q, first_k = of.first_k;
  const int32_t T = of.T, S = of.S;
  const int32_t block_row = (n_blocks - 1 - (int)blockIdx.x) * ROWS; /* the longest causal rows first */
  if (block_row >= T)
    return;

  const sfa_cuda_scores &scores = a.scores;
  const int32_t position = block_row + of.shift, n_rows = min(ROWS, T - block_row); /* position: of the block's first row */
  const sfa_sight upper = sfa_sight_of(scores, position, S), lower = sfa_sight_of(scores, position + n_rows - 1, S);
  const sfa_walk walk = sfa_walk_of<KEYS>(scores, position, n_rows, S);
  int32_t tile = sfa_walk_first(walk);

  load_rows<WIDTH, ROWS, THREADS>(q_at, a.q, a.q_scales, a.n_heads, D, first_q + block_row, T - block_row, head);
  if (tile < walk.end)
    load_rows<WIDTH, KEYS, THREADS>(k_at, a.k, a.k_scales, a.n_kv_heads, D, first_k + tile * KEYS, S - tile * KEYS, kv_head);
  copies_commit();

  float o[TILES][WIDTH / 8][4], largest[TILES][2], sum[TILES][2];
#pragma unroll
  for (int t = 0; t < TILES; t++) {
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        o[t][n][i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++)
      largest[t][i] = -CUDART_INF_F, sum[t][i] = 0.0f;
  }
  const float slope = scores.alibi_slopes ? scores.alibi_slopes[head] * LOG2E : 0.0f;
  const float unit = shaped ? 1.0f : scores.softmax_scale * LOG2E; /* of s below, in log2 */
  const int warp_row = warp * 16 * TILES;
  /* where this lane's pieces of a ldmatrix begin: rows 0..15 of an operand, then its second eight features */
  const int at_row = lane % 16, at_piece = lane / 16;

  while (tile < walk.end) {
    const int32_t key = tile * KEYS;
    copies_wait<0>();
    __syncthreads(); /* queries and keys are there, the values before are used */
    load_rows<WIDTH, KEYS, THREADS>(v_at, a.v, NULL, 0, E, first_k + key, S - key, kv_head);
    copies_commit();

    float s[TILES][KEYS / 8][4];
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          s[t][n][i] = 0.0f;
#pragma unroll
    for (int d = 0; d < WIDTH / 16; d++) {
      uint32_t q[TILES][4];
#pragma unroll
      for (int t = 0; t < TILES; t++)
        load_matrices(q[t], q_at + piece_at<WIDTH>(warp_row + 16 * t + at_row, 2 * d + at_piece));
#pragma unroll
      for (int n = 0; n < KEYS / 16; n++) {
        uint32_t k[4]; /* keys 0..7 and 8..15, of the first eight features, then of the others */
        load_matrices(k, k_at + piece_at<WIDTH>(16 * n + at_row, 2 * d + at_piece));
#pragma unroll
        for (int t = 0; t < TILES; t++) {
          multiply(s[t][2 * n], q[t], k[0], k[2]);
          multiply(s[t][2 * n + 1], q[t], k[1], k[3]);
        }
      }
    }
    copies_wait<0>();
    __syncthreads(); /* the values are there, the keys are used */

    const int32_t next = sfa_walk_next(walk, tile);
    if (next < walk.end)
      load_rows<WIDTH, KEYS, THREADS>(k_at, a.k, a.k_scales, a.n_kv_heads, D, first_k + next * KEYS, S - next * KEYS, kv_head);
    copies_commit();

    if (shaped) {
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            float x = s[t][n][i] * scores.softmax_scale;
            if (scores.softcap > 0)
              x = scores.softcap * tanhf(x / scores.softcap);
            const float distance = (float)(key + 8 * n + column + i % 2 - (position + warp_row + 16 * t + row + i / 2 * 8));
            s[t][n][i] = fmaf(slope, distance, x * LOG2E);
          }
    }
    /* a mask where not every row of the block sees every key */
    if (key + KEYS - 1 > upper.last || (key < lower.first && key + KEYS > scores.n_sink_tokens)) {
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const sfa_sight see = sfa_sight_of(scores, position + warp_row + 16 * t + row + 8 * half, S);
          const int first = see.first - key, last = see.last - key;
          const int n_always = (int)min(scores.n_sink_tokens, (int64_t)S) - key;
#pragma unroll
          for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const int j = 8 * n + column + i;
              if (j > last || (j < first && j >= n_always))
                s[t][n][2 * half + i] = -CUDART_INF_F;
            }
        }
    }

#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float most = largest[t][half];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
          most = fmaxf(most, fmaxf(s[t][n][2 * half], s[t][n][2 * half + 1]));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        const float shift = most == -CUDART_INF_F ? 0.0f : most * unit; /* a row that has seen nothing stays at 0 */
        const float factor = exp2_of(largest[t][half] * unit - shift);
        largest[t][half] = most;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; i++) {
            s[t][n][i] = exp2_of(fmaf(s[t][n][i], unit, -shift));
            total += s[t][n][i];
          }
        sum[t][half] = fmaf(sum[t][half], factor, total);
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n++) {
          o[t][n][2 * half] *= factor;
          o[t][n][2 * half + 1] *= factor;
        }
      }

#pragma unroll
    for (int j = 0; j < KEYS / 16; j++) {
      uint32_t p[TILES][4];
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          p[t][i] = two_bf16(s[t][2 * j + i / 2][i % 2 * 2], s[t][2 * j + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < WIDTH / 16; n++) {
        uint32_t v[4]; /* keys 0..7 and 8..15 of eight features, then of the other eight */
        load_transposed(v, v_at + piece_at<WIDTH>(16 * j + at_row, 2 * n + at_piece));
#pragma unroll
        for (int t = 0; t < TILES; t++) {
          multiply(o[t][2 * n], p[t], v[0], v[1]);
          multiply(o[t][2 * n + 1], p[t], v[2], v[3]);
        }
      }
    }
    tile = next;
  }

  const float sink = scores.sink_logit ? scores.sink_logit[head] * LOG2E : -CUDART_INF_F;
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int32_t at = block_row + warp_row + 16 * t + row + 8 * half;
      float l = sum[t][half];
      l += __shfl_xor_sync(~0u, l, 1);
      l += __shfl_xor_sync(~0u, l, 2);
      const float m = largest[t][half] == -CUDART_INF_F ? -CUDART_INF_F : largest[t][half] * unit, most = fmaxf(m, sink);
      const float part = m == -CUDART_INF_F ? (l != l ? l : 0.0f) : exp2_of(m - most); /* scores that were all NaN stay so */
      l = fmaf(l, part, sink == -CUDART_INF_F ? 0.0f : exp2_of(sink - most));
      if (at >= T)
        continue;
      const float factor = l == 0.0f ? 0.0f : part / l;
      if (a.lse && lane % 4 == 0)
        a.lse[(first_q + at) * a.n_heads + head] = l == 0.0f ? -CUDART_INF_F : (most + log2f(l)) * 0.693147180559945309417f;
      const int64_t out = (first_q + at) * a.out.token_stride + head * a.out.head_stride;
#pragma unroll
      for (int n = 0; n < WIDTH / 8; n++)
        if (n * 8 < E) {
          const float x = o[t][n][2 * half] * factor, y = o[t][n][2 * half + 1] * factor;
          if (a.out.dtype == SFA_BF16)
            *(uint32_t *)((uint16_t *)a.out.data + out + 8 * n + column) = two_bf16(x, y);
          else
            *(float2 *)((float *)a.out.data + out + 8 * n + column) = make_float2(x, y);
        }
    }
}

/* ---- The launch ------------------------------------------------------------------------------------------------------ */

template <int WIDTH, int WARPS> static const char *launch(const sfa_cuda_prefill *a, cudaStream_t stream) {
  using tile = shape<WIDTH, WARPS>;
  cudaError_t error = cudaFuncSetAttribute(attend<WIDTH, WARPS>, cudaFuncAttributeMaxDynamicSharedMemorySize, tile::BYTES);
  if (error == cudaSuccess) {
    const int n_blocks = (int)((a->q_tokens.max_seqlen + tile::ROWS - 1) / tile::ROWS);
    const dim3 grid((unsigned)n_blocks, (unsigned)a->n_heads, (unsigned)a->q_tokens.n_sequences);
    const sfa_cuda_scores *s = &a->scores;
    const int shaped = s->softcap > 0 || s->alibi_slopes || !(s->softmax_scale > 0);
    attend<WIDTH, WARPS><<<grid, 32 * WARPS, tile::BYTES, stream>>>(*a, n_blocks, shaped);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? NULL : cudaGetErrorString(error);
}

static bool pieces_aligned(const sfa_cuda_rows *rows) {
  return rows->dtype == SFA_I8 || (((uintptr_t)rows->data | (size_t)rows->token_stride * 2 | (size_t)rows->head_stride * 2) % 16 == 0);
}

extern "C" const char *sfa_cuda_prefill_portable_run(const sfa_cuda_prefill *args, sfa_cuda_stream stream) {
  if (args->q_tokens.max_seqlen == 0 || args->q_tokens.n_sequences == 0 || args->n_heads == 0)
    return NULL;
  if (!pieces_aligned(&args->q) || !pieces_aligned(&args->k) || !pieces_aligned(&args->v))
    return "rows for the tensor cores must begin, and lie apart, at multiples of 16 bytes";
  const int32_t width = args->head_dim > args->head_dim_v ? args->head_dim : args->head_dim_v;
  if (width <= 128)
    return width <= 64 ? launch<64, 4>(args, stream) : launch<128, 4>(args, stream);
  int device = 0, most_bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return "the driver does not tell the GPU's shared memory";
  return most_bytes >= shape<256, 8>::BYTES ? launch<256, 8>(args, stream) : launch<256, 4>(args, stream);
}
