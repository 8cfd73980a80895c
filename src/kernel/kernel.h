/* kernel/kernel.h: the CPU micro-kernels, one table of function pointers an instruction set.
 *
 * Everything that attention does, in prefill and decode, dense and sparse, is these slots in a row over one tile of keys:
 *
 *     query_tile -> score_codes | score_dense -> (score_adjust) -> (score_mask) -> softmax_tile -> (rescale) -> (scale_weights) ->
 *     value_product
 *
 * Query-stationary: a tile of W query rows is laid feature-major, Qt [D][W], lanes are queries. A key is then K (or D) steps of
 * "broadcast one of its values, multiply the row of Qt that belongs to its feature, add": the same cost for sparse and dense q, no
 * gather, no scatter, no packing of keys. W is a multiple of SFA_LANES; lanes beyond the real rows hold zeros and are ignored.
 *
 * The order of operations is part of every contract, so that bits do not depend on the instruction set, on W, or on which rows share a
 * tile. All arithmetic is f32 with fused multiply-add (fmaf in scalar code). For a query row i, over the keys of a tile in rising order:
 *
 *     s_j = 0; for features u of key j, rising: s_j = fma(k_ju, q_iu, s_j)          score_codes, score_dense
 *     m'  = max(m, s_j over the tile);  alpha = e2(m - m');  l = l * alpha          softmax_tile
 *     p_j = e2(s_j - m');  l = l + ((t_0 + t_1) + (t_2 + t_3)), t_a = the sum of p_j over j = a modulo 4, one after the other
 *     o_e = o_e * alpha                                                             rescale
 *     o_e = fma(p_j, v_je, o_e), one key after the other                            value_product
 *
 * Values of SFA_I8, SFA_I4 and SFA_E4M3 are numbers c of few bits and a row scale, and the scale goes to the weight: o_e = fma(p_j *
 * scale_j, c_je, o_e), the product rounded to f32 once a key (scale_weights), after p_j was added to l. A weight of 0 stays 0 whatever the
 * scale.
 *
 * Features that a code leaves out would add fma(0, q, s) = s, so a code with K = D, and dense rows, give the same bits.
 * Scores are in units of log2: softmax_scale * log2(e) is multiplied into Qt. e2 is the polynomial of kernel.h's sfa_exp2 below.
 *
 * Keys of SFA_I8 are whole numbers c and a row scale. Qt then holds the query rounded to multiples of its own step 2^e (round_rows below)
 * instead of scaled, so that the sum of c_ju q_iu over SFA_EXACT_TERMS slots is exact in f32 in any order; such sums are added in rising
 * order, and s_j = that total * (scale of row j * query_scale), the product in brackets rounded to f32 first: key_scale[j] below.
 *
 * Decode has one or a few query rows. There lanes are keys (the last section); those slots are the same formulas, rounding for rounding,
 * so that a prompt may be cut anywhere: sums over features in rising order (or exact), l in four interleaved sums a tile, o one key after
 * the other.
 */
#ifndef SFA_KERNEL_H
#define SFA_KERNEL_H

#include <sfa/base.h>

enum {
  SFA_KEY_TILE = 64, /* keys of a tile, counted from the sequence's first key: part of the definition of the bits */
  SFA_LANES = 16,    /* query tile widths are multiples of this on every instruction set */
  SFA_MAX_WIDTH = 128,
  SFA_EXACT_TERMS = 32, /* slots whose products with an int8 key are summed exactly */
  SFA_DEPTH_STEPS = 8,  /* an octave's, of count_depths */
  SFA_N_DEPTHS = 40 * SFA_DEPTH_STEPS,
  SFA_KEYS_ROWS = 16,     /* most query rows of the slots whose lanes are keys */
  SFA_AHEAD_BYTES = 4096, /* from a memory request to the work on it, in bytes of work: see value_keys */
  SFA_EXPAND_SLACK = 16,  /* bytes behind the values of expand_add */
  SFA_EXPAND_STEPS = 1    /* single keys that take expand_add as long as 64 at once, where it has that: from AVX-512 on */
};

/* Bytes of one row's table for score_keys: room for 256 numbers after its step at least, so that any id of one byte stays within it. */
static inline size_t sfa_query_table_bytes(int32_t D) { return ((size_t)(D < 112 ? 112 : D) * 8 + 192 + 63) & ~(size_t)63; }

/* Rows as a cache stores them, for the slots that read them so. */
typedef struct sfa_stored_rows {
  int32_t n, width; /* rows, 1..SFA_KEY_TILE; elements of a row: K for codes, else D or E */
  sfa_dtype dtype;
  const void *ids; /* [n][width] ascending, uint8_t if D <= 256, else uint16_t; NULL: dense rows */
  const void *values;
  int64_t ids_stride, values_stride; /* elements between rows */
  const uint16_t *scales;            /* f16, of types that have them (sfa_has_scales); else NULL */
  int64_t scales_stride;
  const void *next; /* memory that is wanted afterwards: next_bytes of it are asked for, spread over the work on these rows */
  int64_t next_bytes;
} sfa_stored_rows;

/* Codes of a tile turned around: for each feature the keys that keep it, rising. */
typedef struct sfa_key_lists {
  int32_t *starts; /* [D + 2] feature u has entries starts[u] .. starts[u + 1] - 1; the last one is room for who fills them */
  uint8_t *keys;   /* [n_keys * K] place in the tile */
  float *values;   /* [n_keys * K] */
} sfa_key_lists;

typedef struct sfa_kernels {
  sfa_isa isa;

  /* ---- codes ---- */

  /* Top-k of n_rows rows x [n][D] (row_stride elements apart) by magnitude bits (x & 0x7fffffff as an integer, so NaN is largest), ties to
   * the lower feature. ids [n][K]: ascending, uint8_t if D <= 256, else uint16_t; values [n][K] f32, unchanged bits. 1 <= K <= D. */
  void (*topk)(int64_t n_rows, const float *x, int64_t row_stride, int32_t D, int32_t K, void *ids, float *values);
  /* The same of rows of bf16, D <= 256. */
  void (*topk_bf16)(int64_t n_rows, const uint16_t *x, int64_t row_stride, int32_t D, int32_t K, uint8_t *ids, float *values);

  /* Rows to int8: scale = f16(max|x| / 127) rounded up (so that no |value| exceeds 127), value = x / scale rounded to nearest even.
   * All-zero row: scale 0, values 0. A row with NaN or inf: scale NaN (0x7e00), values 0. Returns 0, or 1 + the first row whose finite
   * max|x| needs a scale beyond f16 (that row's output is undefined, later rows are not written). out rows are out_stride apart, scales 1.
   */
  int64_t (*quantize_i8)(int64_t n_rows, int32_t n, const float *x, int64_t row_stride, int8_t *out, int64_t out_stride, uint16_t *scales);
  /* Rows to SFA_I4 in the same way: scale = f16(max|x| / 7) rounded up, value -7..7, stored + 8. n and out_stride (elements) are even. */
  int64_t (*quantize_i4)(int64_t n_rows, int32_t n, const float *x, int64_t row_stride, uint8_t *out, int64_t out_stride, uint16_t *scales);

  /* Rows to SFA_E4M3 in the same way, but scale = the smallest power of two that is at least max|x| / 448 (2^-24 or more): quotients are
   * exact, and rows that are e4m3 times a power of two stay what they are. Values rounded to nearest even. */
  int64_t (*quantize_e4m3)(int64_t n_rows, int32_t n, const float *x, int64_t row_stride, uint8_t *out, int64_t out_stride,
                           uint16_t *scales);

  /* Rows of n stored elements to f32 (out rows out_stride apart). dtype SFA_F32, SFA_BF16, SFA_F16, or SFA_I8, SFA_I4, SFA_E4M3 with
   * scales[row] (f16): value * scale in f32; without scales (NULL) the numbers c. in_stride in elements; for SFA_I4 it and n are even. */
  void (*load_rows)(int64_t n_rows, int32_t n, sfa_dtype dtype, const void *in, int64_t in_stride, const uint16_t *scales, float *out,
                    int64_t out_stride);
  /* The reverse for SFA_F32, SFA_BF16, SFA_F16 (round to nearest even; f16 overflow gives inf, which callers exclude before). */
  void (*store_rows)(int64_t n_rows, int32_t n, const float *in, int64_t in_stride, sfa_dtype dtype, void *out, int64_t out_stride);

  /* out rows = x rows * f * weight with f = 1 / sqrt(sum of x^2 / D + eps), both products rounded; the sum in 16 chains of fused
   * multiply-adds, feature u in chain u mod 16, joined as a tree (8 apart, 4, 2, 1). out may be x. */
  void (*norm_rows)(int64_t n_rows, int32_t D, const float *x, int64_t x_stride, const float *weight, float eps, float *out,
                    int64_t out_stride);

  /* Rotary positions: out rows = x rows with their first n_rotated features (even) turned, the others copied; out may be x. Row i takes
   * line i of cos, sin, lines line_stride apart (0: one line for all). Pair p, features (p, p + n_rotated / 2), or (2 p, 2 p + 1) if
   * interleaved: x' = x cos_p - y sin_p, y' = y cos_p + x sin_p, two rounded products and a rounded sum each. */
  void (*rotate_rows)(int64_t n_rows, int32_t D, const float *x, int64_t x_stride, const float *cos, const float *sin, int64_t line_stride,
                      int32_t n_rotated, int interleaved, float *out, int64_t out_stride);

  /* ---- attention ---- */

  /* Qt [D][W] = scale * rows[i][u] for i < n_rows, 0 in the other lanes. rows: n_rows pointers to D contiguous f32. */
  void (*query_tile)(int32_t n_rows, const float *const *rows, int32_t D, int32_t W, float scale, float *Qt);
  /* The same from codes: row i has K features ids (id_bytes 1 or 2) and values at ids_rows[i], value_rows[i] (f32). */
  void (*query_tile_codes)(int32_t n_rows, const void *const *ids_rows, int32_t id_bytes, const float *const *value_rows, int32_t K,
                           int32_t D, int32_t W, float scale, float *Qt);

  /* S [n_keys][W] from codes: ids [n_keys][K] ascending (id_bytes 1 or 2), values [n_keys][K] f32. n_keys 1..SFA_KEY_TILE. key_scale
   * [n_keys]: a last factor of each key's scores, where the values are whole numbers (sums of SFA_EXACT_TERMS slots, see above); NULL:
   * none, one chain over all slots. */
  void (*score_codes)(int32_t n_keys, int32_t K, const void *ids, int32_t id_bytes, const float *values, const float *key_scale,
                      const float *Qt, int32_t W, float *S);
  /* S [n_keys][W] from dense rows: keys [n_keys][D] f32, key_stride elements apart; key_scale as above. */
  void (*score_dense)(int32_t n_keys, int32_t D, const float *keys, int64_t key_stride, const float *key_scale, const float *Qt, int32_t W,
                      float *S);

  /* The bits of score_codes (of finite keys, and for SFA_I8 at most SFA_EXACT_TERMS slots) by scatter-add: queries are rows of K features,
   * ids ascending (id_bytes 1 or 2) and values [n_rows][K], keys are lists. Lanes beyond n_rows become 0. */
  void (*score_lists)(int32_t n_keys, int32_t n_rows, int32_t K, const void *ids, int32_t id_bytes, const float *values,
                      const sfa_key_lists *lists, const float *key_scale, int32_t W, float *S);

  /* Rows x [n_rows][n] in place to multiples of step[row] = 2^e, to nearest even. n_terms: slots of a key (K or D), of which at most
   * SFA_EXACT_TERMS count. e is the least, from -100 up, with max|x| / 2^e <= min(32767, floor(2^24 / (127 n_terms))): then n_terms
   * products of such a number and an int8 add up to at most 2^24. A row with a NaN or a magnitude of 2^100 or more (of which sums could
   * overflow): all NaN, step NaN. A zero row: step 2^-100. */
  void (*round_rows)(int32_t n_rows, int32_t n, int32_t n_terms, float *x, int64_t row_stride, float *step);

  /* In place: if softcap > 0, S = softcap * log2e * tanh(S) (the caller has folded scale / softcap into Qt); then, if slope is not NULL,
   * S[j][i] = fma(slope[i], (float)(j - pos[i]), S[j][i]): slope already times log2e, pos = the row's aligned position minus the tile's
   * first key. tanh is good to 2 ulp. */
  void (*score_adjust)(int32_t n_keys, int32_t W, float softcap, const float *slope, const int32_t *pos, float *S);
  /* S[j][i] = -inf unless (lo[i] <= j or j < n_always) and j <= hi[i], in tile-relative key numbers. */
  void (*score_mask)(int32_t n_keys, int32_t W, const int32_t *lo, const int32_t *hi, int32_t n_always, float *S);

  /* S becomes P in place; m, l [W] carry on (start: m = -inf, l = 0); alpha [W] is the factor for o. A row that has seen only -inf keeps
   * m = -inf, l = 0, and gets P = 0, alpha = 1. NaN and +inf scores give NaN. Returns 1 if any alpha differs from 1. */
  int (*softmax_tile)(int32_t n_keys, int32_t W, float *S, float *m, float *l, float *alpha);
  /* O [n_rows][E] rows times alpha[row]. */
  void (*rescale)(int32_t n_rows, int32_t E, const float *alpha, float *O);
  /* P [n_keys][W] in place: P[j][i] * scale[j], but 0 where P is 0, for values with scales. */
  void (*scale_weights)(int32_t n_keys, int32_t W, const float *scale, float *P);
  /* O [n_rows][E] += P^T V: P [n_keys][W], V [n_keys][E] f32 with rows v_stride apart, E a multiple of 8. */
  void (*value_product)(int32_t n_rows, int32_t n_keys, int32_t W, const float *P, int32_t E, const float *V, int64_t v_stride, float *O);
  /* The same where a V may be inf or NaN: a key with P = 0 (masked, or weight flushed) adds nothing to that row. Slow; same bits otherwise.
   */
  void (*value_product_masked)(int32_t n_rows, int32_t n_keys, int32_t W, const float *P, int32_t E, const float *V, int64_t v_stride,
                               float *O);

  /* ---- gradients of a tile (docs/MATH.md 4). Lanes are queries; those beyond the real rows hold zeros ---- */

  /* S [n_keys][W], masked scores, becomes P = e2(S - lse[i]); dP becomes dS = P * (dP - delta[i]), times 1 - (capped / (cap log2 e))^2
   * where capped is not NULL (the scores after softcap cap, before the rest), and 0 where P is 0, whatever dP holds. lse is in units of
   * log2, +inf of a row that sees no key. */
  void (*softmax_backward)(int32_t n_keys, int32_t W, const float *lse, const float *delta, const float *capped, float cap, float *S,
                           float *dP);
  /* O [n_keys][E] += P X: P [n_keys][W], X [n_rows][E] rows x_stride apart, one query row after the other; E a multiple of 8. */
  void (*key_product)(int32_t n_keys, int32_t n_rows, int32_t W, const float *P, int32_t E, const float *X, int64_t x_stride, float *O);
  /* dQt [D][W]: for keys j and their slots u, rising, dQt[id][i] = fma(value, dS[j][i], dQt[id][i]). Codes as in score_codes. */
  void (*query_codes_backward)(int32_t n_keys, int32_t K, const void *ids, int32_t id_bytes, const float *values, const float *dS,
                               int32_t W, float *dQt);
  /* dK [n_keys][K] += the sum over i of dS[j][i] Qt[id_ju][i]: 16 chains over i modulo 16, of which the second half is added to the first
   * until one is left. */
  void (*key_codes_backward)(int32_t n_keys, int32_t K, const void *ids, int32_t id_bytes, const float *dS, const float *Qt, int32_t W,
                             float *dK);

  /* ---- few queries: lanes are keys. Rows of S and P are SFA_KEY_TILE apart; what lies beyond n_keys is anything, before and after ---- */

  /* Prepares n_rows query rows q [n_rows][D] for score_keys: zeros outside the support; times query_scale already, or for SFA_I8 keys
   * rounded by round_rows to step[row]. table: n_rows * sfa_query_table_bytes(D), 64-byte aligned; its content is the table's own affair.
   */
  void (*query_table)(int32_t n_rows, int32_t D, const float *q, int64_t row_stride, const float *step, void *table);
  /* S[row][j] for the keys of one tile as they are stored (codes or dense, any type): the bits of load_rows + score_codes or
   * score_dense. query_scale enters for SFA_I8 alone. Every byte of the keys is read once for all rows. An id >= D makes its key's score
   * anything, and reads no further than the table. */
  void (*score_keys)(const sfa_stored_rows *keys, int32_t n_rows, int32_t D, const void *table, float query_scale, float *S);
  /* score_adjust with one slope and position a row. */
  void (*adjust_keys)(int32_t n_rows, int32_t n_keys, float softcap, const float *slope, const int32_t *pos, float *S);
  /* softmax_tile on rows: P in place, m, l, alpha [n_rows]. */
  int (*softmax_keys)(int32_t n_rows, int32_t n_keys, float *S, float *m, float *l, float *alpha);
  /* O [n_rows][E] += P V with V as it is stored: the bits of load_rows (without scales), scale_weights and value_product_masked (up to the
   * sign of a zero). A key whose P is 0 in every row is not read. Memory: SFA_AHEAD_BYTES from the first row on have been asked for; this
   * asks for the rest that far ahead, and for `next` over the last rows. */
  void (*value_keys)(const sfa_stored_rows *values, int32_t n_rows, const float *P, int32_t E, float *O);

  /* ---- leaving values out (attn_drop.c). P [..][SFA_KEY_TILE] are weights from 0 to 1, a tile's, 0 beyond its keys ---- */

  /* depths [SFA_N_DEPTHS]: one more for each key at the depth of P[j] * factor <= 1, in steps of an octave's eighth: 127 SFA_DEPTH_STEPS
   * less the float's bits without the last 20. What is smaller counts at the last depth; NaN at the first. */
  void (*count_depths)(const float *P, float factor, uint32_t *depths);
  /* Keys whose P[i][j] * factor[i] < limit[i] in every row i leave: P = 0, unless more than most_kept keys stay: then nothing changes.
   * Returns how many stay. sums[i] = the weights P[i] that left: 16 sums of the keys j mod 16, rising, added one after the other. */
  int32_t (*drop_keys)(int32_t n_rows, const float *factor, const float *limit, int32_t most_kept, float *P, float *sums);

  /* ---- an inverted index: keys of a feature are the set bits of its bitmap ---- */

  /* sums [64 n_words] += q * value, exactly: bit b of words[w] is key 64 w + b, and values [n_values] are those of the set bits in rising
   * order; SFA_EXPAND_SLACK bytes behind them can be read. |q| <= 32767. */
  void (*expand_add)(int64_t n_words, const uint64_t *words, int64_t n_values, const int8_t *values, int32_t q, int32_t *sums);
  /* S[j] = sums[j] * step * (scales[j] * query_scale), rounding as score_keys does. scales: f16. n: a multiple of SFA_KEY_TILE. */
  void (*scale_sums)(int64_t n, const int32_t *sums, float step, const uint16_t *scales, float query_scale, float *S);

  /* ---- joining ---- */

  /* Adds part (m2, l2, O2) to (m, l, O), row by row: both unnormalised, m in log2 units. m' = max(m, m2), a = e2(m - m'), b = e2(m2 - m');
   * l = fma(l2, b, l * a), O = fma(O2, b, O * a). A part with m2 = -inf changes nothing; m = -inf takes the part as it is. */
  void (*merge)(int32_t n_rows, int32_t E, float *m, float *l, float *O, const float *m2, const float *l2, const float *O2);
} sfa_kernels;

/* The table of an instruction set, or NULL where this build or machine lacks it. SFA_ISA_DEFAULT: the best one. */
const sfa_kernels *sfa_kernel_select(sfa_isa isa);
/* The same for the instruction set of a context, which the machine is known to run: this does not ask the processor, which takes a virtual
 * machine tens of microseconds. */
const sfa_kernels *sfa_kernel_of(sfa_isa isa);

/* 2^x, relative error at most 2e-7, exact for whole x; 0 below -126, inf from 127.5 up, NaN for NaN. The one definition that all vector
 * forms follow step by step (for x <= 127): n = round_to_even(x); r = x - n; polynomial of degree 5 in r by Horner with fma; times 2^n.
 * Constants: kernel/exp2.h. */
float sfa_exp2(float x);

/* tanh x by exp2.h's constants, as score_adjust has it. */
float sfa_tanh(float x);

#endif
