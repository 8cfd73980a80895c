/* sfa/attention.h: top-k codes, and exact attention over them or over dense rows (the dense twin).
 *
 * Letters (docs/MATH.md): B sequences, T query tokens, S key tokens, H query heads, G key/value heads (H = G * group), D query/key
 * head dim, E value head dim, K kept features. Arrays are row-major, strides count elements.
 *
 * What is promised about bits: the output of a query row depends on its own query, on the keys and values that it may see and on the
 * options; not on the other rows of the call, on how a prompt is cut into calls, on the batch, on n_threads or on the instruction set.
 * With k_k = 0 or D (and k_q = 0 or D) the result is that of the dense twin, bit for bit. Two things are outside of the promise, and both
 * can be turned off: the 16-bit arithmetic of AMX machines (SFA_PRECISION_F32 turns it off; it still does not depend on n_threads or on
 * what the other sequences of the batch hold), and eps > 0, which leaves values out.
 *
 * Against keys stored as SFA_I8 a query row is rounded as well, to a grid so fine that every score is a sum of whole numbers below 2^24,
 * exact in any order (docs/NUMERICS.md): at K = 16 to 1/4128 of its largest entry or better, a thirtieth of the keys' own rounding.
 *
 * On a CUDA context (sfa/stream.h) every array of numbers that a struct here points to is device memory, ids, lengths and the workspace
 * (256-byte aligned) among them; the structs are host memory and may go when the call returns. Supports and codes are those of the CPU, bit
 * for bit. Attention has other bits there: the same from run to run, and within the roundings of a dense attention
 * in bf16 (docs/NUMERICS.md). head_dim and head_dim_v are at most 256 where queries are many.
 */
#ifndef SFA_ATTENTION_H
#define SFA_ATTENTION_H

#include <sfa/base.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Codes: the K features of largest magnitude of each row (paper section 3, docs/MATH.md 1) -------------------------------- */

/* A view of n_rows codes; the memory is the caller's. */
typedef struct sfa_codes {
  int64_t n_rows;
  int32_t head_dim; /* D: multiple of 8, 8..65536 */
  int32_t k;        /* K: 1..D */
  sfa_dtype dtype;  /* of the values: SFA_I8, SFA_BF16, SFA_F16 or SFA_F32 */
  void *ids;        /* [n_rows][K] ascending feature ids: uint8_t if D <= 256, else uint16_t */
  void *values;     /* [n_rows][K] in the order of ids */
  uint16_t *scales; /* [n_rows] f16, one a row, for SFA_I8; NULL otherwise */
} sfa_codes;

/* Bytes of a buffer that holds such codes, with its three arrays each aligned to 64 bytes. 0 if an argument is out of range. */
SFA_API size_t sfa_codes_bytes(int64_t n_rows, int32_t head_dim, int32_t k, sfa_dtype dtype);
/* Lays a view over memory (64-byte aligned, at least sfa_codes_bytes). */
SFA_API sfa_status sfa_codes_place(sfa_context *ctx, int64_t n_rows, int32_t head_dim, int32_t k, sfa_dtype dtype, void *memory,
                                   sfa_codes *codes);

/* Top-k of dense rows. x: [n_rows][D] of SFA_F32 or SFA_BF16, row_stride elements apart. Ties go to the lower feature id; NaN counts as
 * larger than everything. SFA_ERROR_RANGE: a finite value beyond f16's range in a row to be stored as SFA_I8 or SFA_F16.
 * Cost: one read of x; 30 to 100 ns a row on one core (docs/KERNELS.md). */
SFA_API sfa_status sfa_codes_select(sfa_context *ctx, const void *x, sfa_dtype x_dtype, int64_t row_stride, sfa_codes *codes);

/* Dense f32 rows with zeros outside the supports: out [n_rows][D], row_stride elements apart. */
SFA_API sfa_status sfa_codes_densify(sfa_context *ctx, const sfa_codes *codes, float *out, int64_t row_stride);

/* How sfa_rows_keep chooses. Codes have no such choices: codes of rows where all else is 0 already are codes of that choice. */
typedef struct sfa_keep_options {
  size_t struct_size;
  int32_t k;           /* 1..head_dim features of a row; at most head_dim / 2 with two_of_four */
  int32_t two_of_four; /* 1: at most two in each aligned group of four features, the two largest; then the k largest of these */
  float gumbel_scale;  /* 0 to 2, on a GPU 0. Above 0: sizes are compared as ln|x| + gumbel_scale * Gumbel noise; values are not changed */
  uint64_t seed;       /* of the noise, which depends on this, the token's number and the head only */
  int64_t first_token; /* the number of x's first token */
} sfa_keep_options;

/* Dense rows x [n_tokens][n_heads][head_dim] (tokens token_stride elements apart; 0: n_heads * head_dim) keep k features each, in place:
 * the others become 0. Ties go to the lower feature; NaN counts as larger than everything.
 * Top-k before RoPE (docs/MATH.md 1): keep k, then read the rows as codes of 2 k features with sfa_rows.rope: both members of each kept
 * pair are all that is not 0. Errors: SFA_ERROR_ARGUMENT, SFA_ERROR_MEMORY; x is then as it was. The same bits for any threads.
 * Cost, a row of 128 on one core: 0.2 us; 0.8 us with two_of_four; 1.3 us with noise. */
SFA_API sfa_status sfa_rows_keep(sfa_context *ctx, const sfa_keep_options *options, int64_t n_tokens, int32_t n_heads, int32_t head_dim,
                                 float *x, int64_t token_stride);

/* Compressed sparse rows, as the paper stores queries: row_ptr [n_rows + 1], col [n_rows * K], val [n_rows * K]. Kept zeros are
 * entries too, so that every row has K. */
SFA_API sfa_status sfa_codes_to_csr(sfa_context *ctx, const sfa_codes *codes, int64_t *row_ptr, int32_t *col, float *val);
/* Compressed sparse columns, as the paper stores keys (one posting list a feature): col_ptr [D + 1], row [n_rows * K] ascending in each
 * column, val [n_rows * K]. */
SFA_API sfa_status sfa_codes_to_csc(sfa_context *ctx, const sfa_codes *codes, int64_t *col_ptr, int64_t *row, float *val);

/* ---- Dense rows ------------------------------------------------------------------------------------------------------------ */

/* Rotary position embedding, applied to dense rows as they are read, before top-k (docs/MATH.md 1). Row t of a sequence (counted from its
 * first query, or from the first token appended) takes line t of the tables. With angle a of pair p: x' = x cos a - y sin a,
 * y' = y cos a + x sin a. */
typedef struct sfa_rope {
  const float *cos, *sin; /* [n_tokens][n_rotated / 2] */
  int32_t n_rotated;      /* the first features of a row; even, at most D; the others stay */
  int32_t interleaved;    /* 0: pair p is features p and p + n_rotated / 2; 1: features 2 p and 2 p + 1 */
} sfa_rope;

/* RMS norm of each row as it is read, before its rope and its top-k (QK-norm): x' = x * f * weight with f = 1 / sqrt(mean of x^2 + eps). */
typedef struct sfa_row_norm {
  const float *weight; /* [dim] */
  float eps;           /* 0 or more */
} sfa_row_norm;

/* One dense operand [token][head][dim]; the last dimension is contiguous. */
typedef struct sfa_rows {
  const void *data;
  sfa_dtype dtype;      /* SFA_F32 or SFA_BF16; 0: SFA_F32 */
  int64_t batch_stride; /* elements between sequences; 0: max_seqlen * token_stride. Unused with cu_seqlens */
  int64_t token_stride; /* 0: heads * dim */
  int64_t head_stride;  /* 0: dim */
  const sfa_rope *rope; /* NULL: none. Of queries, and of keys that are stored first: for a cache, for pages, or by a plan with k_k below
                         * head_dim or a k_dtype other than SFA_F32. With cu_seqlens its lines are those of the packed tokens */
  const sfa_row_norm *norm; /* NULL: none. Where a rope may be; gradients do not go back through it (sfa/backward.h refuses it) */
} sfa_rows;

/* ---- Attention forward: plan, then run (paper section 3.2, docs/MATH.md 2 and 3) -------------------------------------------- */

/* Ways to the same result, which the planner chooses among; asking for one that the options exclude is SFA_ERROR_UNSUPPORTED. What a call
 * brings on top is met as well: with alibi_slopes the two 16-bit ways compute as TILES does. */
typedef enum sfa_policy {
  SFA_POLICY_AUTO = 0,       /* the planner's choice by shape, k, instruction set and costs (sfa_attention_plan_report tells it) */
  SFA_POLICY_TILES = 1,      /* f32, lanes are queries: 64-key tiles, feature-major query tile */
  SFA_POLICY_KEYS = 2,       /* f32 and whole numbers, lanes are keys: few query rows. The same bits as TILES */
  SFA_POLICY_HALF_CODES = 3, /* f16 scores from codes, exp by table, values by AMX (16-bit precision) */
  SFA_POLICY_HALF_DENSE = 4, /* scores of the densified operands by AMX, the rest as HALF_CODES */
  SFA_POLICY_PAPER = 5,      /* Algorithm 1 of the paper: CSR queries, posting lists of a key tile, scatter-add; for comparison */
  SFA_POLICY_POSTINGS = 6,   /* decode with sparse q over an inverted index (sfa/postings.h); the same bits as KEYS over SFA_I8 codes */
  /* Of CUDA contexts, what the tensor cores multiply where queries are many (there PAPER is another way, and KEYS where they are few): */
  SFA_POLICY_BF16 = 7,    /* rows of bf16 with zeros outside of the supports */
  SFA_POLICY_SP_BF16 = 8, /* the same, queries as 2:4 sparse operands; rows that hold more than 2 of 4 are multiplied as they are: exact */
  SFA_POLICY_INT8 = 9,    /* int8 rows with a scale each, keys then with one for a tile (docs/NUMERICS.md) */
  SFA_POLICY_SP_INT8 = 10 /* both */
} sfa_policy;

typedef enum sfa_precision {
  SFA_PRECISION_DEFAULT = 0, /* 16-bit where it is faster and k_dtype and v_dtype have 16 bits or less; else f32 */
  SFA_PRECISION_F32 = 1,     /* f32 throughout: the same bits on every machine */
  SFA_PRECISION_HALF = 2     /* 16-bit also where keys or values are stored in f32 */
} sfa_precision;

/* What operations cost on a machine, in nanoseconds on one thread: what the planner compares (sfa/plan.h). */
typedef struct sfa_costs sfa_costs;

typedef struct sfa_attention_options {
  size_t struct_size; /* sizeof(sfa_attention_options) */

  /* Shape. */
  int32_t n_heads;      /* H: 1..65536 */
  int32_t n_kv_heads;   /* G, divides H; 0: H. G < H is GQA, G = 1 MQA */
  int32_t head_dim;     /* D: multiple of 8, 8..65536 */
  int32_t head_dim_v;   /* E: multiple of 8, 8..65536; 0: D */
  int32_t n_sequences;  /* B; 0: 1 */
  int64_t max_seqlen_q; /* largest T of a sequence, up to 2^31 - 129 */
  int64_t max_seqlen_k; /* largest S of a sequence, likewise */

  /* Sparsity. 0 or D: dense. k_q = 0 with k_k > 0 is "K-only": q stays dense. */
  int32_t k_q;
  int32_t k_k;

  /* 1: the plan is for sfa_attention_run_cached alone: k_dtype and v_dtype are what the cache stores, top-k of keys is not part of the
   * call, and the workspace has no room for storing keys and values. 0: for sfa_attention_run; run_cached may use it too. */
  int32_t from_cache;

  /* Storage of keys and values that the result is defined on: they are rounded to it before use, as a cache would.
   * Ignored by sfa_attention_run_cached unless from_cache (the cache has its own): AUTO with SFA_PRECISION_DEFAULT then takes an f32 way
   * where the cache stores f32. */
  sfa_dtype k_dtype; /* SFA_F32 (default), SFA_BF16, SFA_F16 or SFA_I8 */
  sfa_dtype v_dtype; /* the same choices, or SFA_I4, SFA_E4M3 */
  /* Type of the dense rows that calls will bring, for the predicted times: SFA_F32 (default) or SFA_BF16. Any call may bring either. */
  sfa_dtype row_dtype;

  /* Scores: s = softmax_scale * q.k, then softcap * tanh(s / softcap), then + alibi_slope[h] * (j - i). */
  float softmax_scale; /* 0: 1 / sqrt(D) */
  float softcap;       /* 0: none */

  /* Masks. i is the query's position aligned bottom-right: i = t + S - T. */
  int32_t causal;         /* 1: keys j <= i only */
  int32_t has_window;     /* 1: window_size holds; 0: unlimited */
  int64_t window_size[2]; /* left and right, both inclusive: i - left <= j <= i + right; -1: unlimited */
  int64_t n_sink_tokens;  /* the first keys stay visible however far left of a window they are */

  /* How. */
  sfa_policy policy;
  sfa_precision precision;
  const sfa_costs *costs; /* NULL: those of the instruction set in the source. Copied */

  /* Mass of the softmax that decode may leave out, with a certificate (docs/MATH.md 7): 0 (exact) to 0.5. A row leaves out the keys of
   * the smallest weights, whose sum rho <= eps is returned in args.dropped, and is renormalised over the others; then
   * |o - o_exact| <= 2 rho max|v|. lse stays that of all keys. Used by SFA_POLICY_KEYS and POSTINGS; the others are exact (rho = 0). */
  float eps;
} sfa_attention_options;

typedef struct sfa_attention_plan sfa_attention_plan;

/* Checks the options, chooses tiles and splits (a pure function of the options and the instruction set). */
SFA_API sfa_status sfa_attention_plan_create(sfa_context *ctx, const sfa_attention_options *options, sfa_attention_plan **plan);
SFA_API void sfa_attention_plan_destroy(sfa_attention_plan *plan);
/* Bytes that run wants; linear in max_seqlen_q + max_seqlen_k. */
SFA_API size_t sfa_attention_workspace_bytes(const sfa_attention_plan *plan);

/* An inverted index over a layer of a cache: sfa/postings.h. */
typedef struct sfa_postings sfa_postings;

typedef struct sfa_attention_args {
  size_t struct_size; /* sizeof(sfa_attention_args) */

  sfa_rows q; /* [B][T][H][D] */
  sfa_rows k; /* [B][S][G][D]; with k_codes or a cache: unused */
  sfa_rows v; /* [B][S][G][E]; with a cache: unused */

  /* Codes made before, instead of top-k inside run. Row of a query: token * H + h; of a key: token * G + g. NULL: none. */
  const sfa_codes *q_codes; /* k = options.k_q */
  const sfa_codes *k_codes; /* k = options.k_k, dtype = options.k_dtype */

  /* Variable lengths: sequence b owns tokens cu_seqlens[b] .. cu_seqlens[b + 1] of packed [token][head][dim] arrays. NULL: every
   * sequence has max_seqlen tokens. [B + 1], first entry 0, rising. */
  const int32_t *cu_seqlens_q;
  const int32_t *cu_seqlens_k;

  const float *sink_logit;   /* [H] a logit that joins the softmax sum without a value; NULL: none */
  const float *alibi_slopes; /* [H]; NULL: none */

  float *out;     /* [B][T][H][E] f32, contiguous. A row that sees no key gives 0 */
  float *lse;     /* [B][T][H] natural log of the softmax sum, where no key is seen -inf or the sink's logit; NULL: not wanted */
  float *dropped; /* [B][T][H] rho, the mass really left out; NULL: not wanted */

  /* [B] indices over the layer of the cache (sfa/postings.h), one a sequence, entries may be NULL; NULL: none. SFA_POLICY_POSTINGS scores
   * by them whatever they cover, AUTO where that is faster; the bits are the same. */
  const sfa_postings *const *postings;

  void *workspace; /* 64-byte aligned, sfa_attention_workspace_bytes */

  int64_t *stage_ns; /* [SFA_STAGE_COUNT] or NULL: time is added here, summed over threads */
} sfa_attention_args;

/* What stage_ns counts: choosing features and writing rows; packing them, or reading pages; scores, softmax and values; and on a GPU,
 * behind the pass over the keys, values kept with eps and the joining of parts (on the CPU part of SFA_STAGE_ATTEND). On a GPU times are
 * those of the stream, and the call waits for it. */
enum { SFA_STAGE_TOPK = 0, SFA_STAGE_PACK = 1, SFA_STAGE_ATTEND = 2, SFA_STAGE_JOIN = 3, SFA_STAGE_COUNT = 4 };

/* o = softmax(scores) v, exactly. Neither allocates nor fails for memory. Arguments that do not fit the plan: SFA_ERROR_ARGUMENT. */
SFA_API sfa_status sfa_attention_run(const sfa_attention_plan *plan, const sfa_attention_args *args);

/* Joins two partial results over disjoint key sets, row by row: out_a [n_rows][E] and lse_a [n_rows] become those of the union. A
 * sink_logit must be in one of the two only. */
SFA_API sfa_status sfa_attention_merge(sfa_context *ctx, int64_t n_rows, int32_t head_dim_v, float *out_a, float *lse_a, const float *out_b,
                                       const float *lse_b);

#ifdef __cplusplus
}
#endif
#endif
