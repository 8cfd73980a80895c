/* From arguments to views: where keys and values lie, and storing them first where the plan asks for another form than they came in. */
#include "attn/attn.h"

#include "code/code.h"

#include <stdatomic.h>
#include <string.h>

void sfa_attn_token_range(const int32_t *cu_seqlens, int64_t max_seqlen, int32_t b, int64_t *first, int64_t *n_tokens) {
  *first = cu_seqlens ? cu_seqlens[b] : b * max_seqlen;
  *n_tokens = cu_seqlens ? cu_seqlens[b + 1] - cu_seqlens[b] : max_seqlen;
}

/* Rows number first + g * head_rows + j * token_rows of an array, row_bytes each, of `width` elements. */
static sfa_kv_stream stream_over(const void *base, size_t row_bytes, int64_t width, int64_t first, int64_t head_rows, int64_t token_rows) {
  if (!base)
    return (sfa_kv_stream){0};
  return (sfa_kv_stream){.base = (const unsigned char *)base + (size_t)first * row_bytes,
                         .head_bytes = (size_t)head_rows * row_bytes,
                         .tile_bytes = (size_t)token_rows * row_bytes * SFA_KEY_TILE,
                         .row_stride = token_rows * width};
}

static sfa_kv_side side_over(const sfa_row_format *format, const sfa_row_store *store, int64_t first, int64_t head_rows,
                             int64_t token_rows) {
  int64_t width = sfa_row_width(format);
  return (sfa_kv_side){
      .format = *format,
      .ids = stream_over(format->k ? store->ids : NULL, sfa_row_ids_bytes(format), format->k, first, head_rows, token_rows),
      .values = stream_over(store->values, sfa_row_values_bytes(format), width, first, head_rows, token_rows),
      .scales = stream_over(sfa_has_scales(format->dtype) ? store->scales : NULL, sizeof(uint16_t), 1, first, head_rows, token_rows)};
}

/* ---- Storing dense arguments ---------------------------------------------------------------------------------------------------- */

/* One of k and v, all sequences: rows [B][G][max_seqlen_k] in the workspace. */
typedef struct encode_job {
  const sfa_attention_plan *plan;
  const sfa_attention_args *args;
  const sfa_rows *rows;
  const sfa_row_format *format;
  sfa_row_store store;
  float *dense;                   /* [B][G][max_seqlen_k][D] where codes are written out too; else NULL */
  int64_t n_chunks;               /* of a (sequence, head) */
  _Atomic int64_t first_bad_item; /* INT64_MAX: none */
} encode_job;

static void encode_item(void *arg, int64_t item, int32_t thread) {
  encode_job *job = arg;
  const sfa_attention_plan *plan = job->plan;
  int64_t max_keys = plan->options.max_seqlen_k, pair = item / job->n_chunks, row = item % job->n_chunks * SFA_ENCODE_ROWS;
  int32_t b = (int32_t)(pair / plan->options.n_kv_heads), g = (int32_t)(pair % plan->options.n_kv_heads);
  int64_t first_token, n_tokens;
  sfa_attn_token_range(job->args->cu_seqlens_k, max_keys, b, &first_token, &n_tokens);
  int64_t n_rows = sfa_min64(n_tokens - row, SFA_ENCODE_ROWS);
  if (n_rows <= 0)
    return;
  const sfa_rows *rows = job->rows;
  bool packed = job->args->cu_seqlens_k;
  int64_t offset = (packed ? first_token * rows->token_stride : b * rows->batch_stride) + g * rows->head_stride;
  sfa_row_source x = sfa_rows_from(rows, offset, row, packed ? first_token + row : row);
  size_t to = (size_t)(pair * max_keys + row);
  sfa_row_store store = {(unsigned char *)job->store.ids + to * sfa_row_ids_bytes(job->format),
                         (unsigned char *)job->store.values + to * sfa_row_values_bytes(job->format), job->store.scales + to};
  sfa_attn_scratch scratch;
  sfa_attn_scratch_of(plan, job->args, thread, 0, &scratch);
  if (sfa_code_rows(plan->kernels, n_rows, &x, job->format, &store, scratch.encode, job->args->stage_ns ? scratch.stage_ns : NULL)) {
    int64_t before = atomic_load(&job->first_bad_item);
    while (item < before && !atomic_compare_exchange_weak(&job->first_bad_item, &before, item))
      continue;
  } else if (job->dense) {
    int64_t start = job->args->stage_ns ? sfa_now_ns() : 0;
    int32_t D = job->format->dim;
    sfa_code_write_out(n_rows, D, job->format->k, store.ids, store.values, job->dense + to * (size_t)D);
    if (job->args->stage_ns)
      scratch.stage_ns[SFA_STAGE_PACK] += sfa_now_ns() - start;
  }
}

/* Stores all rows and points the side of each view at them. */
static sfa_status encode_side(encode_job *job, const char *name, size_t side_offset, sfa_kv_view *views) {
  const sfa_attention_plan *plan = job->plan;
  const sfa_attention_options *o = &plan->options;
  job->n_chunks = (o->max_seqlen_k + SFA_ENCODE_ROWS - 1) / SFA_ENCODE_ROWS;
  atomic_init(&job->first_bad_item, INT64_MAX);
  sfa_parallel(plan->ctx, (int64_t)o->n_sequences * o->n_kv_heads * job->n_chunks, encode_item, job);
  int64_t bad = atomic_load(&job->first_bad_item);
  if (bad < INT64_MAX) {
    int64_t pair = bad / job->n_chunks;
    return sfa_fail(plan->ctx, SFA_ERROR_RANGE,
                    "%s of sequence %lld, head %lld has a value beyond 65504, which neither f16 nor a row scale can hold: scale the "
                    "input, or store %s as bf16 or f32",
                    name, (long long)(pair / o->n_kv_heads), (long long)(pair % o->n_kv_heads), name);
  }
  for (int32_t b = 0; b < o->n_sequences; b++) {
    sfa_kv_side *side = (sfa_kv_side *)((unsigned char *)&views[b] + side_offset);
    int64_t first = (int64_t)b * o->n_kv_heads * o->max_seqlen_k;
    *side = side_over(job->format, &job->store, first, o->max_seqlen_k, 1);
    side->dense = stream_over(job->dense, (size_t)job->format->dim * sizeof(float), job->format->dim, first, o->max_seqlen_k, 1);
  }
  return SFA_OK;
}

/* ---- Views ---------------------------------------------------------------------------------------------------------------------- */

/* Whether reading the rows as they came gives what the plan's storage type gives. */
static bool readable_in_place(const sfa_rows *rows, const sfa_row_format *format) {
  return !format->k && !rows->rope && !rows->norm && (format->dtype == SFA_F32 || format->dtype == rows->dtype);
}

static sfa_kv_side dense_side(const sfa_rows *rows, int32_t dim, int64_t first_element) {
  return (sfa_kv_side){.format = {dim, 0, rows->dtype},
                       .values =
                           stream_over(rows->data, sfa_dtype_bytes(rows->dtype), 1, first_element, rows->head_stride, rows->token_stride)};
}

sfa_status sfa_attn_prepare(const sfa_attention_plan *plan, const sfa_attention_args *args, sfa_kv_view *views) {
  const sfa_attention_options *o = &plan->options;
  const sfa_codes *codes = args->k_codes;
  unsigned char *workspace = args->workspace;
  for (int32_t b = 0; b < o->n_sequences; b++) {
    int64_t first, n_keys;
    sfa_attn_token_range(args->cu_seqlens_k, o->max_seqlen_k, b, &first, &n_keys);
    views[b] = (sfa_kv_view){.n_keys = n_keys};
    views[b].v = dense_side(&args->v, o->head_dim_v, args->cu_seqlens_k ? first * args->v.token_stride : b * args->v.batch_stride);
    if (codes) {
      sfa_row_format format = {codes->head_dim, codes->k, codes->dtype};
      sfa_row_store store = {codes->ids, codes->values, codes->scales};
      views[b].k = side_over(&format, &store, first * o->n_kv_heads, 1, o->n_kv_heads);
    } else {
      views[b].k = dense_side(&args->k, o->head_dim, args->cu_seqlens_k ? first * args->k.token_stride : b * args->k.batch_stride);
    }
  }
  if (!codes && !readable_in_place(&args->k, &plan->k_format)) {
    encode_job job = {.plan = plan, .args = args, .rows = &args->k, .format = &plan->k_format};
    job.store = (sfa_row_store){workspace + plan->k_ids, workspace + plan->k_values, (uint16_t *)(void *)(workspace + plan->k_scales)};
    job.dense = plan->densify_once ? (float *)(void *)(workspace + plan->k_dense) : NULL;
    SFA_TRY(encode_side(&job, "k", offsetof(sfa_kv_view, k), views));
  }
  if (!readable_in_place(&args->v, &plan->v_format)) {
    encode_job job = {.plan = plan, .args = args, .rows = &args->v, .format = &plan->v_format};
    job.store = (sfa_row_store){NULL, workspace + plan->v_values, (uint16_t *)(void *)(workspace + plan->v_scales)};
    SFA_TRY(encode_side(&job, "v", offsetof(sfa_kv_view, v), views));
  }
  return SFA_OK;
}
