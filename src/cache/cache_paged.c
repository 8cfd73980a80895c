/* Pages in the caller's memory: the same bytes, without tables or users. */
#include "cache/cache_pages.h"

#include <stdatomic.h>

typedef struct store_job {
  sfa_context *ctx;
  sfa_cache_layer layer;
  int32_t n_kv_heads;
  unsigned char *pool;
  int64_t n_tokens;
  const int64_t *slots;
  const sfa_rows *k, *v;
  unsigned char *scratch; /* [n_threads] */
  size_t scratch_bytes;
  _Atomic int64_t n_bad;
} store_job;

/* SFA_PAGE_LEN tokens of one kv head, those with neighbouring slots at a time. */
static void store_item(void *arg, int64_t item, int32_t thread) {
  store_job *job = arg;
  int32_t g = (int32_t)(item % job->n_kv_heads);
  int64_t first = item / job->n_kv_heads * SFA_PAGE_LEN, end = sfa_min64(first + SFA_PAGE_LEN, job->n_tokens);
  for (int64_t n; first < end; first += n) {
    int64_t slot = job->slots[first], page = slot / SFA_PAGE_LEN;
    for (n = 1; slot >= 0 && first + n < end && job->slots[first + n] == slot + n && (slot + n) / SFA_PAGE_LEN == page; n++)
      continue; /* negative slots one by one: -1 is no neighbour of slot 0 */
    if (slot >= 0 && !sfa_cache_rows_write(job->ctx, &job->layer, job->pool + (size_t)page * job->layer.page_bytes, slot % SFA_PAGE_LEN, g,
                                           first, n, job->k, job->v, job->scratch + (size_t)thread * job->scratch_bytes))
      atomic_fetch_add(&job->n_bad, 1);
  }
}

sfa_status sfa_cache_paged_store(sfa_context *ctx, const sfa_page_options *options, unsigned char *pool, int64_t n_pages, int64_t n_tokens,
                                 const int64_t *slots, const sfa_rows *k, const sfa_rows *v) {
  store_job job = {.ctx = ctx, .n_kv_heads = options->n_kv_heads, .pool = pool, .n_tokens = n_tokens, .slots = slots, .k = k, .v = v};
  sfa_cache_layer_lay_out(options, &job.layer);
  if (ctx->backend->append) {
    sfa_kv_view view;
    sfa_cache_layer_view(&job.layer, 0, NULL, &view);
    sfa_kv_append append = {.n_kv_heads = options->n_kv_heads,
                            .k_side = &view.k,
                            .v_side = &view.v,
                            .n_tokens = n_tokens,
                            .k = k,
                            .v = v,
                            .pool = pool,
                            .page_bytes = job.layer.page_bytes,
                            .n_pages = n_pages,
                            .slots = slots};
    return ctx->backend->append(ctx, &append);
  }
  job.scratch_bytes = sfa_cache_layer_scratch(sfa_backend_of(ctx), &job.layer);
  SFA_TRY(sfa_alloc(ctx, job.scratch_bytes * (size_t)ctx->n_threads, "scratch for storing pages", (void **)&job.scratch));
  sfa_parallel(ctx, (n_tokens + SFA_PAGE_LEN - 1) / SFA_PAGE_LEN * options->n_kv_heads, store_item, &job);
  sfa_free(ctx, job.scratch);
  if (atomic_load(&job.n_bad))
    return sfa_fail(ctx, SFA_ERROR_RANGE,
                    "a key or value is beyond 65504, which neither f16 nor a row scale can hold: scale the input, or have pages with "
                    "k_dtype and v_dtype bf16 or f32");
  return SFA_OK;
}
