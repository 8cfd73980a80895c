/* cuda/cuda_stages.h: the stages of the CUDA backend: what each one computes, and its launcher.
 *
 *     select    dense rows -> (QK-norm, RoPE) -> top-k -> codes in arrays or pages, and rows [D] with zeros for the tensor cores
 *     gather    stored keys and values of pages -> rows for the tensor cores
 *     prefill   many queries: tensor cores over rows (policies bf16, sp_bf16, int8, sp_int8), online softmax, V
 *     decode    few queries: scores from the codes where they lie, V streamed, or with eps > 0 gathered under a certificate
 *     backward  gradients, masked to the supports
 *     paper     Algorithm 1 of the paper, for comparison
 *
 * A launcher checks nothing that the API has checked, enqueues its kernels on a stream and returns at once; it neither allocates nor
 * synchronises, so that a stream capture can hold it. All pointers inside the structs are device memory, the structs themselves host
 * memory that is free on return. It returns NULL, or a text (static storage) that says what the device refused. The same call gives the
 * same bits. Letters: docs/MATH.md. Plain C, read by C and by CUDA.
 */
#ifndef SFA_CUDA_STAGES_H
#define SFA_CUDA_STAGES_H

#include "backend/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct CUstream_st *sfa_cuda_stream; /* a cudaStream_t */

/* ---- Where rows are --------------------------------------------------------------------------------------------------------------- */

/* Rows [tokens][heads][dim] of SFA_F32, SFA_BF16, or (from select and gather) SFA_I8; strides count elements. */
typedef struct sfa_cuda_rows {
  void *data;
  sfa_dtype dtype;
  int64_t token_stride, head_stride;
} sfa_cuda_rows;

/* Tokens of B sequences, packed: those of sequence b are cu_seqlens[b] .. cu_seqlens[b + 1] (device, [B + 1]); NULL: each has max_seqlen.
 */
typedef struct sfa_cuda_tokens {
  int32_t n_sequences;
  int64_t max_seqlen;
  const int32_t *cu_seqlens;
  int64_t n_tokens; /* of all together; 0: n_sequences * max_seqlen */
} sfa_cuda_tokens;

/* Stored rows of B sequences: sfa_kv_side's streams (backend.h) with base, or with pages [B][max_pages] (device array of device pointers;
 * page i holds tokens 64 i .. 64 i + 63) to which offset + head * head_bytes is added. Without pages sequence b begins at
 * base + b * sequence_bytes, and tile_bytes is what 64 tokens take. */
typedef struct sfa_cuda_store {
  unsigned char *const *pages;
  int64_t max_pages, sequence_bytes;
  sfa_row_format format;
  sfa_kv_stream ids, values, scales;
} sfa_cuda_store;

/* ---- select ----------------------------------------------------------------------------------------------------------------------- */

typedef struct sfa_cuda_select {
  sfa_cuda_tokens tokens;
  int32_t n_heads, dim, k; /* k = 0 or dim: nothing is dropped */
  sfa_cuda_rows x;

  const float *norm_weight; /* [dim] RMS norm over the row first (QK-norm); NULL: none */
  float norm_eps;
  /* RoPE after it: cos, sin [lines][n_pairs]; token t of a sequence takes line first_line[b] + t (first_line NULL: the packed token). */
  const float *rope_cos, *rope_sin; /* NULL: none */
  int32_t n_pairs, rope_interleaved;
  const int32_t *first_line; /* [B] */
  int32_t two_of_four;       /* 1: at most two of each aligned four (the two largest), then k of these */

  /* Outputs, each for itself. */
  int32_t has_store;
  sfa_cuda_store store;       /* codes (format.k > 0) or rows (0), rounded to format.dtype as the CPU backend rounds */
  const int32_t *first_token; /* [B] token t of sequence b is stored as token first_token[b] + t; NULL: t */
  sfa_cuda_rows rows;         /* [tokens][heads][dim] zeros where dropped, SFA_BF16 or SFA_I8; data NULL: not wanted. Of keys that are also
                               * stored in a narrower type: of what was stored */
  float *row_scales;          /* [tokens][heads] of SFA_I8 rows: x = value * scale */
  float *rows_f32;            /* [tokens][heads][dim] contiguous; NULL: not wanted */
  uint32_t *support;          /* [tokens][heads][ceil(dim / 32)] bit f: kept; NULL: not wanted */
  int32_t *n_bad;             /* [1] added to: rows with a finite value beyond what the type can hold; NULL: not counted */
} sfa_cuda_select;
const char *sfa_cuda_select_run(const sfa_cuda_select *args, sfa_cuda_stream stream);
/* Keys and values of the same tokens of one sequence, whose len [1] grows by them afterwards. */
const char *sfa_cuda_store_run(const sfa_cuda_select *k, const sfa_cuda_select *v, int32_t *len, sfa_cuda_stream stream);

/* ---- gather ----------------------------------------------------------------------------------------------------------------------- */

/* Tokens [0, n_keys[b]) of a store as rows [b * max_keys + token][head][dim], zeros where a code has nothing. */
typedef struct sfa_cuda_gather {
  sfa_cuda_store store;
  int32_t n_sequences, n_heads;
  const int32_t *n_keys; /* [B] */
  int64_t max_keys;
  sfa_cuda_rows rows; /* SFA_BF16 or SFA_I8 */
  float *row_scales;  /* [B * max_keys][heads] of SFA_I8 rows */
} sfa_cuda_gather;
const char *sfa_cuda_gather_run(const sfa_cuda_gather *args, sfa_cuda_stream stream);

/* ---- prefill ---------------------------------------------------------------------------------------------------------------------- */

/* What a score goes through: s = softmax_scale * q.k; softcap * tanh(s / softcap); + slope * (j - i); masks. As sfa_attention_options. */
typedef struct sfa_cuda_scores {
  float softmax_scale, softcap;      /* softcap 0: none */
  int32_t causal;                    /* i = t + S - T */
  int64_t window_left, window_right; /* -1: unlimited */
  int64_t n_sink_tokens;
  const float *sink_logit, *alibi_slopes; /* [H] or NULL */
} sfa_cuda_scores;

typedef struct sfa_cuda_prefill {
  sfa_policy policy;                                 /* SFA_POLICY_BF16, SP_BF16, INT8 or SP_INT8: what the tensor cores multiply */
  int32_t n_heads, n_kv_heads, head_dim, head_dim_v; /* multiples of 8 up to 256 */
  sfa_cuda_tokens q_tokens, k_tokens;
  /* [B] where k_tokens.cu_seqlens is NULL: keys of each sequence, at most max_seqlen; NULL: max_seqlen. And where these are a part of the
   * keys: those from its first on to the last query's own, so that query t stands at key t + k_ends[b] - T of it; NULL: k_lens. */
  const int32_t *k_lens, *k_ends;
  sfa_cuda_rows q, k;    /* SFA_BF16, or SFA_I8 for the int8 policies; from select or gather, contiguous heads */
  const float *q_scales; /* [tokens][heads] for SFA_I8 */
  float *k_scales;       /* the same of keys. The run rewrites int8 keys and their scales: a tile of keys gets the largest of its scales */
  sfa_cuda_rows v;       /* SFA_BF16 */
  sfa_cuda_scores scores;
  sfa_cuda_rows out; /* SFA_F32 or SFA_BF16 */
  float *lse;        /* [tokens][H], NULL: not wanted */
} sfa_cuda_prefill;
const char *sfa_cuda_prefill_run(const sfa_cuda_prefill *args, sfa_cuda_stream stream);          /* sm_90a */
const char *sfa_cuda_prefill_portable_run(const sfa_cuda_prefill *args, sfa_cuda_stream stream); /* mma.sync, sm_80 and later; bf16 */

/* ---- decode ----------------------------------------------------------------------------------------------------------------------- */

typedef struct sfa_cuda_decode {
  int32_t n_sequences, n_queries; /* T of every sequence: the last T positions */
  int32_t n_heads, n_kv_heads, head_dim, head_dim_v;
  sfa_cuda_rows q;                  /* [B * T][H][D] SFA_F32 or SFA_BF16 */
  const float *rope_cos, *rope_sin; /* [T][n_pairs] queries are turned first; NULL: they are not */
  int32_t n_pairs, rope_interleaved;
  int32_t k_q;           /* and then cut to that many; 0: dense */
  sfa_cuda_store k, v;   /* k.format.k = 0: dense keys */
  const int32_t *n_keys; /* [B] */
  int64_t max_keys;      /* bound of n_keys: decides the splits and the workspace */
  sfa_cuda_scores scores;
  float eps;
  float *out;      /* [B * T][H][E] */
  float *lse;      /* [B * T][H] or NULL */
  float *dropped;  /* [B * T][H] or NULL */
  void *between;   /* an event to record when the keys have been gone through, before what follows (kept values, the joining of parts); or
                      NULL */
  void *workspace; /* sfa_cuda_decode_workspace_bytes, 256-byte aligned; needs no preparation */
} sfa_cuda_decode;
size_t sfa_cuda_decode_workspace_bytes(const sfa_cuda_decode *args); /* of the numbers; pointers are not looked at */
const char *sfa_cuda_decode_run(const sfa_cuda_decode *args, sfa_cuda_stream stream);

/* ---- backward --------------------------------------------------------------------------------------------------------------------- */

/* Where gradients of rows go: rows, 0 outside of the support, and the kept entries of each row alone; either may be NULL. */
typedef struct sfa_cuda_gradient {
  sfa_cuda_rows rows;      /* SFA_F32 or SFA_BF16 */
  float *values;           /* [tokens][heads][k] in the order of features */
  int32_t k;               /* bits of the support of a row; dim without a support */
  const uint32_t *support; /* [tokens][heads][ceil(dim / 32)] bit f: kept; NULL: all */
} sfa_cuda_gradient;

typedef struct sfa_cuda_backward {
  int32_t n_heads, n_kv_heads, head_dim, head_dim_v;
  sfa_cuda_tokens q_tokens, k_tokens;
  sfa_cuda_rows q, k, v;    /* SFA_BF16 rows with zeros where dropped */
  sfa_cuda_rows out, d_out; /* SFA_F32 or SFA_BF16, [tokens][H][E] */
  const float *lse, *d_lse; /* [tokens][H]; d_lse NULL: 0 */
  sfa_cuda_scores scores;
  sfa_cuda_gradient d_q, d_k, d_v;
  float *d_sink_logit; /* [H] or NULL */
  void *workspace;
} sfa_cuda_backward;
size_t sfa_cuda_backward_workspace_bytes(const sfa_cuda_backward *args);
const char *sfa_cuda_backward_run(const sfa_cuda_backward *args, sfa_cuda_stream stream);

/* ---- paper ------------------------------------------------------------------------------------------------------------------------ */

/* Codes of f32 or bf16 values, [tokens][heads][k]; the rest as prefill. */
typedef struct sfa_cuda_paper {
  sfa_cuda_prefill shape; /* q, k, scales unused */
  sfa_codes q_codes, k_codes;
  void *workspace;
} sfa_cuda_paper;
size_t sfa_cuda_paper_workspace_bytes(const sfa_cuda_paper *args);
const char *sfa_cuda_paper_run(const sfa_cuda_paper *args, sfa_cuda_stream stream);

#ifdef __cplusplus
}
#endif
#endif
