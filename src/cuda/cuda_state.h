/* cuda/cuda_state.h: what a CUDA context keeps, and how the files of this folder call the GPU. */
#ifndef SFA_CUDA_STATE_H
#define SFA_CUDA_STATE_H

#include "cuda/cuda.h"
#include "cuda/cuda_library.h"

/* Marks of the call that runs (cuda_laps.c). */
enum { SFA_CUDA_MARKS = 8 };
typedef struct sfa_cuda_laps {
  int64_t *stage_ns; /* NULL: nobody asks */
  int32_t n;
  void *marks[SFA_CUDA_MARKS];    /* made when they are first needed */
  int32_t stages[SFA_CUDA_MARKS]; /* what is over at each */
} sfa_cuda_laps;

typedef struct sfa_cuda {
  const sfa_cuda_library *library;
  int32_t device;                     /* its index */
  int32_t compute;                    /* 10 * major + minor */
  sfa_cuda_stream own_stream, stream; /* the second is in use: the first, or the caller's */
  void *scratch;                      /* device: of one call after the other, in the order of the stream */
  size_t scratch_bytes;
  int32_t *n_bad; /* device, [1] rows that their storage type cannot hold, since the last wait */
  sfa_cuda_laps laps;
} sfa_cuda;

/* SFA_ERROR_DEVICE with a text of the library's, or SFA_OK without one; `what` was to be done. */
sfa_status sfa_cuda_status(sfa_context *ctx, const char *what, const char *text);
/* The context's GPU becomes the thread's. Before any call of the library. */
sfa_status sfa_cuda_enter(sfa_context *ctx);
/* Memory until the next call that asks for some; grows by waiting for the GPU. */
sfa_status sfa_cuda_scratch(sfa_context *ctx, size_t bytes, void **out);

static inline const sfa_cuda_stages *sfa_cuda_stages_of(const sfa_context *ctx) { return &ctx->cuda->library->stages; }
static inline const sfa_cuda_helpers *sfa_cuda_help_of(const sfa_context *ctx) { return &ctx->cuda->library->help; }

/* ---- Plans (cuda_plan.c) --------------------------------------------------------------------------------------------------------- */

enum { SFA_CUDA_WHY_BYTES = 224 };

/* Parts of a workspace: those of a plan, or of its backward. A call uses what it needs of them. */
typedef enum sfa_cuda_part {
  SFA_CUDA_PART_NUMBERS, /* of sfa_cuda_help_numbers; n_keys behind, then the lens and ends of sfa_cuda_help_span */
  SFA_CUDA_PART_Q,       /* rows of queries for the tensor cores, of f32 for decode; codes of them for Algorithm 1 */
  SFA_CUDA_PART_Q_APART, /* queries of sequences of different lengths as decode takes them */
  SFA_CUDA_PART_OUT,     /* what decode answers to these, or the tensor cores for some of the keys; and its lse and dropped */
  SFA_CUDA_PART_LSE,
  SFA_CUDA_PART_DROPPED,
  SFA_CUDA_PART_LSE_ALL, /* of all keys so far, where the caller does not take it */
  SFA_CUDA_PART_Q_SCALES,
  SFA_CUDA_PART_Q_SUPPORT,
  SFA_CUDA_PART_K,
  SFA_CUDA_PART_K_SCALES,
  SFA_CUDA_PART_K_SUPPORT,
  SFA_CUDA_PART_V,
  SFA_CUDA_PART_K_STORE, /* keys and values as they are stored, [B][G][max_seqlen_k] rows */
  SFA_CUDA_PART_V_STORE,
  SFA_CUDA_PART_TABLES, /* page pointers [B][pages of max_seqlen_k] */
  SFA_CUDA_PART_STAGE,  /* what a stage wants */
  SFA_CUDA_N_PARTS
} sfa_cuda_part;

sfa_status sfa_cuda_plan(sfa_attention_plan *plan, const sfa_costs *costs);
/* Where the parts are, the last entry what all take; false: they do not fit an address. */
bool sfa_cuda_parts(const sfa_attention_plan *plan, bool backward, size_t parts[SFA_CUDA_N_PARTS + 1]);
enum { SFA_CUDA_WHOLE_TILES = 640 }; /* keys: whole tiles of 64, 80 and 128 */
/* Keys of each sequence of a cache that are written out for the tensor cores in a turn: however long the cache, the workspace holds no
 * more. */
int64_t sfa_cuda_turn_keys(const sfa_attention_plan *plan);
/* So many between sink tokens and a window are worth a turn more. */
static inline int64_t sfa_cuda_far_keys(const sfa_attention_plan *plan) { return sfa_cuda_turn_keys(plan) / 8; }
/* As many, or all that the plan is for. */
int64_t sfa_cuda_keys_at_once(const sfa_attention_plan *plan);
/* Whether those that a call sees may be written out in several turns. */
bool sfa_cuda_in_turns(const sfa_attention_plan *plan);
/* The stage that multiplies rows of a policy on the context's GPU; NULL: none. */
const char *(*sfa_cuda_prefill_of(const sfa_context *ctx, sfa_policy policy))(const sfa_cuda_prefill *args, sfa_cuda_stream stream);
/* A decode of the plan's shape, without pointers but for the sizes. */
sfa_cuda_decode sfa_cuda_decode_shape(const sfa_attention_plan *plan);
sfa_cuda_backward sfa_cuda_backward_shape(const sfa_attention_plan *plan);
sfa_cuda_scores sfa_cuda_scores_of(const sfa_attention_plan *plan, const sfa_attention_args *args);

/* ---- Rows and stores (cuda_store.c) ---------------------------------------------------------------------------------------------- */

/* Bytes of a sequence stored without pages: ids, values and scales [n_heads][max_tokens], each at a multiple of 256. */
size_t sfa_cuda_store_bytes(const sfa_row_format *format, int32_t n_heads, int64_t max_tokens);
sfa_cuda_store sfa_cuda_store_in(void *memory, const sfa_row_format *format, int32_t n_heads, int64_t max_tokens);
/* A store over codes [tokens][n_heads] in the caller's arrays, as one sequence. */
sfa_cuda_store sfa_cuda_store_over(const sfa_codes *codes, int32_t n_heads);
sfa_cuda_store sfa_cuda_store_pages(const sfa_kv_side *side, unsigned char *const *pages, int64_t max_pages);
/* Rows [tokens][n_heads][dim] of f32, bf16 or int8 as the stages like them: dim elements apart, of int8 a multiple of 16. */
sfa_cuda_rows sfa_cuda_rows_in(void *memory, sfa_dtype dtype, int32_t n_heads, int32_t dim);
size_t sfa_cuda_rows_bytes(int64_t n_tokens, sfa_dtype dtype, int32_t n_heads, int32_t dim);

/* Enqueues a selection from rows of the API: to->tokens, n_heads, dim, k and the outputs are set; x, norm and rope are filled in. */
sfa_status sfa_cuda_select_rows(sfa_context *ctx, const sfa_rows *x, const sfa_cuda_select *to);
/* Contracts: sfa_backend. */
sfa_status sfa_cuda_select_codes(sfa_context *ctx, const sfa_rows *x, const sfa_codes *codes);
sfa_status sfa_cuda_densify(sfa_context *ctx, const sfa_codes *codes, float *out, int64_t row_stride);
sfa_status sfa_cuda_keep(sfa_context *ctx, const sfa_keep_options *options, int64_t n_tokens, int32_t n_heads, int32_t head_dim, float *x,
                         int64_t token_stride);
sfa_status sfa_cuda_append(sfa_context *ctx, const sfa_kv_append *job);
sfa_status sfa_cuda_set_table(sfa_context *ctx, unsigned char **to, int64_t n, unsigned char *const *pages);
sfa_status sfa_cuda_set_lens(sfa_context *ctx, int32_t *lens, int64_t stride, int64_t n, int64_t len, bool only_less);

/* ---- Times of stages (cuda_laps.c) ----------------------------------------------------------------------------------------------- */

/* A call begins, and ends by waiting for it if stage_ns is not NULL. Between the two, each stage that has been enqueued is a lap: what the
 * stream does from the lap before on counts as `stage`. */
sfa_status sfa_cuda_laps_begin(sfa_context *ctx, int64_t *stage_ns);
sfa_status sfa_cuda_lap(sfa_context *ctx, int32_t stage);
sfa_status sfa_cuda_laps_end(sfa_context *ctx);
/* The same for a mark that a stage puts on the stream itself; *mark NULL: it need not. */
sfa_status sfa_cuda_lap_inside(sfa_context *ctx, int32_t stage, void **mark);
void sfa_cuda_laps_close(sfa_cuda *cuda);

/* ---- Attention (cuda_attention.c, cuda_backward.c) --------------------------------------------------------------------------------- */

/* One operand of a call on its way to the tensor cores. */
typedef struct sfa_cuda_operand {
  const char *name;
  sfa_cuda_tokens tokens;
  int32_t n_heads, dim, k; /* k: kept features, 0 all */
  sfa_row_format format;   /* its values are rounded to that type first; SFA_F32 and SFA_BF16: they are not */
  const sfa_rows *x;
  const sfa_codes *codes;      /* NULL: x is dense */
  const int32_t *n_tokens;     /* device: all of them; a 0 before it */
  bool whole;                  /* int8 rows are wanted */
  void *rows, *scales, *store; /* parts of the workspace */
  uint32_t *support;           /* NULL: not wanted */
} sfa_cuda_operand;
/* *rows become rows of bf16 or int8 of it: in place, or in the workspace. */
sfa_status sfa_cuda_rows_of(sfa_context *ctx, const sfa_cuda_operand *operand, sfa_cuda_rows *rows);
/* The three operands of a call without a cache. */
typedef struct sfa_cuda_operands {
  sfa_cuda_operand q, k, v;
} sfa_cuda_operands;
void sfa_cuda_operands_of(const sfa_attention_plan *plan, const sfa_attention_args *args, const size_t *parts, bool whole,
                          sfa_cuda_operands *operands);

/* What lengths say, in the workspace. */
sfa_status sfa_cuda_put_numbers(const sfa_attention_plan *plan, const sfa_attention_args *args, const size_t *parts);

sfa_status sfa_cuda_run(const sfa_attention_plan *plan, const sfa_attention_args *args);
sfa_status sfa_cuda_attend_tables(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_kv_tables *tables);
sfa_status sfa_cuda_merge(sfa_context *ctx, int64_t n_rows, int32_t head_dim_v, float *out_a, float *lse_a, const float *out_b,
                          const float *lse_b);
size_t sfa_cuda_gradients_bytes(const sfa_attention_plan *plan);
sfa_status sfa_cuda_gradients(const sfa_attention_plan *plan, const sfa_attention_grad_args *args);

#endif
