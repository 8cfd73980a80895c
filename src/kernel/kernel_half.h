/* kernel/kernel_half.h: 16-bit attention of many query rows: a second, small table of kernels, for processors with AVX512-FP16 and AMX.
 *
 * As in kernel.h a block of W query rows is laid feature-major and the keys come by; here scores are f16 (or bf16 products with f32 sums),
 * weights are bf16, and values meet them transposed, O^T += V^T P^T, on tiles of 16 rows of 32 bf16:
 *
 *     weights_codes | weights_dense -> (shift, and once more) -> accumulate
 *
 * Gradients (attn_half_backward.c) take no chunks and no table of weights: f32 scores by tile products, exact weights.
 *
 * Keys are cut into chunks of SFA_HALF_CHUNK, counted from the sequence's first key, and these into steps of 32, the depth of a tile
 * product. Everything is packed once per call, chunk by chunk, and shared by all blocks; absent rows and features are zeros.
 *
 * Scores t are in units of 1/128 octave, so that t = 128 log2(weight) fits 16 bits, and a weight is a table look-up away:
 *
 *     t = round(s_j - shift_i) to a whole number, ties to even, saturated to 16 bits
 *     p = bf16 of the bits t + (0x3f00 | sfa_half_exp[(t >> 1) mod 64]), saturated; 0 if that is negative        2^(t / 128), 0.5 %
 *
 * The bits of bf16 are a straight line between powers of two, and the table holds by how much 2^x sags below it. The sum of the weights,
 * which divides at the end, is that of the rounded ones: a common error cancels.
 *
 * Shift. softmax needs any common shift m near the row's maximum. While a bound says |s| <= SFA_HALF_NEAR, none is needed: shift and top
 * are NULL. Otherwise weights_* also give the largest t, and where it is beyond SFA_HALF_LAZY the caller moves the shift by whole
 * octaves, scales O and l by that power of two, and has the weights of the chunk computed again: before any value that needs it is added.
 *
 * The scalar table is the definition; a fused multiply-add rounds once, to f16 or f32. What tiles add up, they add in the order of
 * tile_product in kernel_half_scalar.c, except that denormal f32 and bf16 count as 0. W is 64, 128 or 256.
 */
#ifndef SFA_KERNEL_HALF_H
#define SFA_KERNEL_HALF_H

#include <sfa/base.h>
#include <stdbool.h>

enum {
  SFA_HALF_STEP = 32,   /* keys of a step */
  SFA_HALF_CHUNK = 256, /* keys of a chunk */
  SFA_HALF_STEPS = SFA_HALF_CHUNK / SFA_HALF_STEP,
  SFA_HALF_MIN_WIDTH = 64, /* query rows of a block: 64, 128 or 256 */
  SFA_HALF_MAX_WIDTH = 256,
  SFA_HALF_OCTAVE = 128,                /* units of a score in a factor of two */
  SFA_HALF_NEAR = 16 * SFA_HALF_OCTAVE, /* |s| that needs no shift: up to here f16 rounds it to 1/2 */
  SFA_HALF_LAZY = 8 * SFA_HALF_OCTAVE,  /* t that may stand without a new shift */
  SFA_HALF_UNSEEN = -32768              /* top of a row that saw no key */
};

/* Dimensions of tiles: D and E rounded up. */
static inline int32_t sfa_half_padded(int32_t dim) { return (dim + 31) / 32 * 32; }
/* The best width: Qt [D][W] of f16 fills two thirds of a 48 KB first-level cache. */
static inline int32_t sfa_half_width(int32_t head_dim) { return head_dim <= 64 ? 256 : head_dim <= 128 ? 128 : 64; }
/* Lane of row i in Qt of weights_codes: in groups of 32 rows, so that interleaving the weights of two keys within 128 bits, as the
 * processor does, leaves rows 0..15 and 16..31 each in order. */
static inline int32_t sfa_half_lane(int32_t i) { return (i & ~31) | (i & 12) << 1 | (i & 16) >> 2 | (i & 3); }

/* Where things lie, in elements. P: of row i, key j of a step; blocks of 32 rows, in each the steps, two tiles [16 key pairs][16 rows][2].
 * The 160 elements between blocks keep them in different sets of the cache. */
enum { SFA_HALF_WEIGHTS_STRIDE = SFA_HALF_CHUNK * 32 + 160 };
static inline int64_t sfa_half_weight_at(int32_t step, int32_t i, int32_t j) {
  return (int64_t)(i / 32) * SFA_HALF_WEIGHTS_STRIDE + step * 1024 + (i / 16 % 2) * 512 + j / 2 * 32 + i % 16 * 2 + j % 2;
}
/* V^T of a chunk: blocks of 32 dimensions, in each the steps, two tiles [16 dimensions][32 keys]. */
static inline int64_t sfa_half_value_at(int32_t step, int32_t e, int32_t j) {
  return (int64_t)(e / 32) * SFA_HALF_STEPS * 1024 + step * 1024 + e % 32 * 32 + j;
}
/* Dense keys of a chunk: steps, in each two halves of 16 keys, in each tiles [16 keys][32 features]. Dp = sfa_half_padded(D). */
static inline int64_t sfa_half_key_at(int32_t Dp, int32_t step, int32_t j, int32_t u) {
  return ((int64_t)step * 2 + j / 16) * 16 * Dp + u / 32 * 512 + j % 16 * 32 + u % 32;
}
/* Queries of weights_dense: blocks of 32 rows, in each the tiles of 32 features, two [16 feature pairs][16 rows][2]. */
static inline int64_t sfa_half_query_at(int32_t Dp, int32_t i, int32_t u) {
  return (int64_t)(i / 32) * 32 * Dp + u / 32 * 1024 + (i / 16 % 2) * 512 + u % 32 / 2 * 32 + i % 16 * 2 + u % 2;
}
/* O^T: blocks of 32 dimensions, in each blocks of 32 rows, four tiles [16 dimensions][16 rows] of f32. */
static inline int64_t sfa_half_output_at(int32_t W, int32_t e, int32_t i) {
  return (int64_t)(e / 32) * 32 * W + i / 32 * 1024 + (e / 16 % 2) * 512 + (i / 16 % 2) * 256 + e % 16 * 16 + i % 16;
}

/* Matrices of the gradients, rows of bf16: patches of 32 x 32, those of 32 rows one after the other, zeros beyond what there is. Cp:
 * columns rounded up. Entry (r, c) of a patch stands as tiles want the matrix X as a left operand, or X^T as a right one, either with sums
 * over c (straight) or over r (turned). */
static inline int64_t sfa_half_patch_at(int32_t Cp, int64_t r, int32_t c) { return r / 32 * 32 * Cp + c / 32 * 1024; }
static inline int32_t sfa_half_left_at(int32_t r, int32_t c) { return r * 32 + c; }
static inline int32_t sfa_half_right_at(int32_t r, int32_t c) { return r / 16 * 512 + c / 2 * 32 + r % 16 * 2 + c % 2; }

/* Keys that rows see, counted from the chunk's first: key j is seen by row i if lo[i] <= j <= hi[i], or j < n_always and j <= hi[i]. */
typedef struct sfa_half_mask {
  int16_t lo[SFA_HALF_MAX_WIDTH], hi[SFA_HALF_MAX_WIDTH];
  int32_t n_always;
} sfa_half_mask;

typedef struct sfa_half_kernels {
  sfa_isa isa;

  /* A thread calls weights_* and accumulate between begin and end: the tile registers are its own then. */
  void (*begin)(void);
  void (*end)(void);

  /* ---- packing: one step of a chunk, n <= 32 rows of f32 ---- */

  /* Values [n][E], stride elements apart, to bf16. Returns the largest |value| as bits (so NaN > inf > finite). */
  uint32_t (*pack_values)(int32_t step, int32_t n, int32_t E, const float *values, int64_t stride, uint16_t *chunk);
  /* The same of rows of bf16, which stay as they are. */
  uint32_t (*pack_values_bf16)(int32_t step, int32_t n, int32_t E, const uint16_t *values, int64_t stride, uint16_t *chunk);
  /* Dense keys [n][D] to bf16. Returns the largest sum of squares of a row, in whatever order, as bits. */
  uint32_t (*pack_keys)(int32_t step, int32_t n, int32_t D, const float *keys, int64_t stride, uint16_t *chunk);
  /* Codes, ids [n][K] (id_bytes 1 or 2) and f32 values [n][K]. Of keys 2 p and 2 p + 1 of the chunk, feature for feature:
   * values [CHUNK / 2][K][2] f16, twice in 32 bits; offsets [CHUNK / 2][K][2] in bytes to the feature's row of Qt. Returns as pack_keys. */
  uint32_t (*pack_codes)(int32_t step, int32_t n, int32_t K, const void *ids, int32_t id_bytes, const float *key_values, int32_t W,
                         uint32_t *values, uint16_t *offsets);

  /* ---- queries ---- */

  /* Rows first .. first + n - 1 of a block (first a multiple of 32, n of 16) from Qt [D][n] f32, times factor; up to the next multiple of
   * 32 zeros follow. squares [n]: the sum of squares of each row of Qt times factor, before rounding. */
  /* To f16, [D][W] in the order of sfa_half_lane. */
  void (*query_codes)(int32_t first, int32_t n, int32_t D, const float *Qt, float factor, int32_t W, uint16_t *out, float *squares);
  /* The same from codes, for any n: features ids[i] [K], bytes, and values[i] [K] of row first + i. */
  void (*query_sparse)(int32_t first, int32_t n, int32_t D, int32_t K, const void *const *ids, const float *const *values, float factor,
                       int32_t W, uint16_t *out, float *squares);
  /* To bf16, as sfa_half_query_at has it. */
  void (*query_dense)(int32_t first, int32_t n, int32_t D, const float *Qt, float factor, uint16_t *out, float *squares);

  /* ---- one chunk ---- */

  /* P of n_steps steps of the chunk. s starts at -shift, then s = fma(k_u, q_u, s) in f16, features rising; |s| stays below 32768. Rows
   * that do not see a key get P = 0. mask: NULL where all rows see all keys. top [W]: raised to the largest t of a key seen. */
  void (*weights_codes)(int32_t first_step, int32_t n_steps, int32_t K, const uint32_t *values, const uint16_t *offsets, int32_t W,
                        const uint16_t *Qt, const float *shift, const sfa_half_mask *mask, int16_t *top, uint16_t *P);
  /* The same with s = fma(unit, sum of bf16 products in f32, -shift). */
  void (*weights_dense)(int32_t first_step, int32_t n_steps, int32_t D, const uint16_t *keys, int32_t W, const uint16_t *Q, float unit,
                        const float *shift, const sfa_half_mask *mask, int16_t *top, uint16_t *P);
  /* O^T [E][W] += V^T P^T and l [W] += the sum of the weights, over n_steps steps. */
  void (*accumulate)(int32_t first_step, int32_t n_steps, int32_t E, const uint16_t *V, int32_t W, const uint16_t *P, float *O, float *l);
  /* O and l times factor [W]. */
  void (*rescale)(int32_t E, int32_t W, const float *factor, float *O, float *l);
  /* out[i] [E] = row first + i of O times scale [i], for i < n; a -0 becomes 0. first: a multiple of 16. */
  void (*output_rows)(int32_t first, int32_t n, int32_t E, int32_t W, const float *O, const float *scale, float *const *out);

  /* ---- gradients: a tile of 64 keys meets W query rows, W a multiple of 32 ---- */

  /* One row of patches from n <= 32 rows x [n][dim] of f32, stride elements apart: straight, and turned unless that is NULL; as left
   * operands, or as right ones. */
  void (*pack_patches)(int32_t n, int32_t dim, const float *x, int64_t stride, bool right, uint16_t *straight, uint16_t *turned);
  /* Of keys K [64][D] and values V [64][E] (left), queries Q [W][D] and gradients of out dO [W][E] (right):
   *     P = e2(unit K Q^T - lse),  dS = P (V dO^T - delta), both 0 where masked; sums and these in f32, then rounded
   * lse [W] in units of log2, +inf of a row that sees no key; lo, hi, n_always as score_mask has them, lo NULL: no masks. [64][W]: P and dS
   * as left operands turned over, with sums over rows: straight; dS_keys, a right one with sums over keys: turned. Their rows of patches
   * are `stride` apart. */
  void (*weights_backward)(int32_t D, int32_t E, const uint16_t *K, const uint16_t *V, int32_t W, const uint16_t *Q, const uint16_t *dO,
                           float unit, const float *lse, const float *delta, const int32_t *lo, const int32_t *hi, int32_t n_always,
                           int64_t stride, uint16_t *P, uint16_t *dS, uint16_t *dS_keys);
  /* C [32 n_i][32 n_j] of f32, rows c_stride apart, += A B: patches of left operands A and right ones B, n_steps of sums, each so far from
   * its neighbour. */
  void (*add_product)(int32_t n_i, int32_t n_j, int32_t n_steps, const uint16_t *A, int64_t a_i, int64_t a_step, const uint16_t *B,
                      int64_t b_j, int64_t b_step, float *C, int64_t c_stride);
} sfa_half_kernels;

/* The table for an instruction set: plain C for SFA_ISA_SCALAR, AMX for SFA_ISA_AMX; NULL for the others, and where build or machine lack
 * it. */
const sfa_half_kernels *sfa_half_kernel_select(sfa_isa isa);
/* The same for the instruction set of a context: see sfa_kernel_of. */
const sfa_half_kernels *sfa_half_kernel_of(sfa_isa isa);

extern const sfa_half_kernels sfa_half_kernels_scalar;
extern const sfa_half_kernels sfa_half_kernels_amx;

/* round(128 (2^x - 1 - x)) + 128 averaged over x = 2 i / 128 and (2 i + 1) / 128. */
static const uint8_t sfa_half_exp[64] = {128, 127, 127, 126, 126, 125, 124, 124, 123, 123, 123, 122, 122, 121, 121, 120,
                                         120, 120, 119, 119, 119, 119, 118, 118, 118, 118, 118, 117, 117, 117, 117, 117,
                                         117, 117, 117, 117, 117, 117, 117, 117, 117, 118, 118, 118, 118, 118, 119, 119,
                                         119, 120, 120, 120, 121, 121, 122, 122, 123, 123, 124, 125, 125, 126, 127, 127};

#endif
