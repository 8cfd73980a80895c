/* Scores of one query over a whole sequence, and the highest of them. */
#include "attn/attn_search.h"

#include "attn/attn_keys.h"
#include "base/half.h"
#include "kernel/stored_rows.h"

#include <math.h>
#include <string.h>

/* ---- Scores ------------------------------------------------------------------------------------------------------------------ */

typedef struct search_job {
  const sfa_kernels *kernels;
  const sfa_kv_view *view;
  const sfa_postings *postings;
  int64_t n_sealed; /* blocks that are read from the index */
  int32_t kv_head;
  const float *q; /* [D] */
  float step, query_scale;
  const void *table; /* of q, for score_keys */
  int32_t *sums;     /* [n_threads][SFA_POSTINGS_BLOCK] */
  int64_t n_keys;
  float *scores; /* [n_keys] */
} search_job;

static sfa_stored_rows stored_keys(const search_job *job, int64_t tile) {
  int32_t n_keys = (int32_t)sfa_min64(job->n_keys - tile * SFA_KEY_TILE, SFA_KEY_TILE);
  return sfa_attn_keys_stored(job->view, &job->view->k, job->kv_head, tile, n_keys);
}

/* A span of keys. */
static void score_item(void *arg, int64_t span, int32_t thread) {
  const search_job *job = arg;
  int64_t first = span * SFA_KEY_SPAN, end = sfa_min64(first + SFA_KEY_SPAN, job->n_keys);
  if (span < job->n_sealed) {
    sfa_attn_postings_scores(job->postings, span, job->kv_head, job->q, job->step, job->query_scale,
                             job->sums + (int64_t)thread * SFA_POSTINGS_BLOCK, job->scores + first);
    return;
  }
  for (int64_t key = first; key < end; key += SFA_KEY_TILE) {
    sfa_stored_rows rows = stored_keys(job, key / SFA_KEY_TILE);
    if (key + SFA_KEY_TILE < job->n_keys) { /* pages lie anywhere: the processor does not guess the next one */
      sfa_stored_rows next = stored_keys(job, key / SFA_KEY_TILE + 1);
      sfa_stored_rows_prefetch(&next, (int32_t)sfa_id_bytes(job->view->k.format.dim));
    }
    float tile[SFA_KEY_TILE];
    job->kernels->score_keys(&rows, 1, job->view->k.format.dim, job->table, job->query_scale, tile);
    for (int32_t j = 0; j < rows.n; j++)
      job->scores[key + j] = tile[j];
  }
}

sfa_status sfa_attn_search_scores(sfa_context *ctx, const sfa_kv_view *view, int32_t g, const sfa_postings *postings, float softmax_scale,
                                  int64_t n_keys, float *q, float *scores) {
  const sfa_row_format *format = &view->k.format;
  search_job job = {.kernels = sfa_kernel_of(ctx->isa), .view = view, .postings = postings, .kv_head = g, .q = q};
  bool whole = format->dtype == SFA_I8;
  job.query_scale = softmax_scale;
  job.n_keys = n_keys;
  job.scores = scores;
  if (postings)
    job.n_sealed = sfa_min64(sfa_attn_postings_valid(postings, view), n_keys / SFA_POSTINGS_BLOCK);
  if (whole)
    job.kernels->round_rows(1, format->dim, sfa_row_width(format), q, format->dim, &job.step);
  else
    for (int32_t u = 0; u < format->dim; u++)
      q[u] *= softmax_scale;
  size_t table_bytes = sfa_query_table_bytes(format->dim);
  size_t sums_bytes = postings ? (size_t)ctx->n_threads * SFA_POSTINGS_BLOCK * sizeof(int32_t) : 0;
  unsigned char *scratch;
  SFA_TRY(sfa_alloc(ctx, table_bytes + sums_bytes, "a search", (void **)&scratch));
  job.kernels->query_table(1, format->dim, q, format->dim, whole ? &job.step : NULL, scratch);
  job.table = scratch;
  job.sums = (int32_t *)(void *)(scratch + table_bytes);
  sfa_parallel(ctx, (n_keys + SFA_KEY_SPAN - 1) / SFA_KEY_SPAN, score_item, &job);
  sfa_free(ctx, scratch);
  return SFA_OK;
}

/* ---- The highest ------------------------------------------------------------------------------------------------------------- */

/* A number that orders hits: the higher score first, of equal ones the lower key; NaN above inf, -0 as 0. */
static uint64_t rank_of(float score, int64_t key) {
  int32_t bits = (int32_t)sfa_bits_of(score + 0.0f);
  int32_t order = score != score ? INT32_MAX : bits >= 0 ? bits : bits ^ INT32_MAX;
  return (uint64_t)((uint32_t)order ^ 0x80000000u) << 32 | (UINT32_MAX - (uint32_t)key);
}

static int64_t key_of(uint64_t rank) { return UINT32_MAX - (uint32_t)rank; }

/* Puts `rank` at the root of a heap whose least is there. */
static void sink(uint64_t *heap, int64_t n, uint64_t rank) {
  int64_t at = 0;
  for (int64_t child; (child = 2 * at + 1) < n; at = child) {
    child += child + 1 < n && heap[child + 1] < heap[child];
    if (rank <= heap[child])
      break;
    heap[at] = heap[child];
  }
  heap[at] = rank;
}

void sfa_attn_search_top(int64_t n_keys, const float *scores, int64_t n_hits, uint64_t *keys) {
  uint64_t *heap = keys; /* of the best until now; it begins with n_hits that are worse than any */
  memset(heap, 0, (size_t)n_hits * sizeof *heap);
  float worst = -INFINITY; /* among them: most keys are below, and cost one comparison */
  for (int64_t key = 0; key < n_keys && n_hits; key++) {
    if (scores[key] < worst)
      continue;
    uint64_t rank = rank_of(scores[key], key);
    if (rank <= heap[0])
      continue;
    sink(heap, n_hits, rank);
    if (heap[0])
      worst = scores[key_of(heap[0])];
  }
  for (int64_t n = n_hits; n > 0; n--) { /* the least goes last, where the heap no longer is */
    uint64_t least = heap[0];
    sink(heap, n - 1, heap[n - 1]);
    keys[n - 1] = (uint64_t)key_of(least);
  }
}
