/* Public functions on pages in the caller's memory. */
#include "api/api_attention.h"
#include "api/api_check.h"
#include "cache/cache_pages.h"

static sfa_status check_page_options(sfa_context *ctx, const sfa_page_options *o) {
  SFA_REQUIRE(ctx, o, "the page's options are NULL");
  SFA_REQUIRE(ctx, o->struct_size == sizeof *o, "the page's struct_size is %zu: set it to sizeof(sfa_page_options) = %zu", o->struct_size,
              sizeof *o);
  SFA_REQUIRE(ctx, o->n_kv_heads >= 1 && o->n_kv_heads <= 65536, "n_kv_heads is %d: it must be from 1 to 65536", o->n_kv_heads);
  SFA_TRY(sfa_check_head_dim(ctx, "head_dim", o->head_dim));
  SFA_TRY(sfa_check_head_dim(ctx, "head_dim_v", o->head_dim_v ? o->head_dim_v : o->head_dim));
  SFA_TRY(sfa_check_kept(ctx, "k", o->k, o->head_dim));
  if (o->k_dtype)
    SFA_TRY(sfa_check_dtype(ctx, "k_dtype", o->k_dtype));
  if (o->v_dtype)
    SFA_TRY(sfa_check_value_dtype(ctx, "v_dtype", o->v_dtype));
  return SFA_OK;
}

size_t sfa_page_bytes(const sfa_page_options *options) {
  sfa_context nobody = {.n_threads = 1}; /* takes the text of what is wrong */
  sfa_cache_layer layer;
  if (check_page_options(&nobody, options) != SFA_OK)
    return 0;
  sfa_cache_layer_lay_out(options, &layer);
  return layer.page_bytes;
}

static sfa_status check_pool(sfa_context *ctx, const void *pool, int64_t n_pages) {
  SFA_REQUIRE(ctx, n_pages >= 0 && n_pages <= INT32_MAX, "n_pages is %lld: it must be from 0 to 2^31 - 1", (long long)n_pages);
  SFA_REQUIRE(ctx, (pool || !n_pages) && (uintptr_t)pool % 64 == 0, "the pool is NULL or not aligned to 64 bytes");
  return SFA_OK;
}

sfa_status sfa_pages_store(sfa_context *ctx, const sfa_page_options *options, void *pool, int64_t n_pages, int64_t n_tokens,
                           const int64_t *slots, const sfa_rows *k, const sfa_rows *v) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_TRY(check_page_options(ctx, options));
  SFA_TRY(check_pool(ctx, pool, n_pages));
  SFA_REQUIRE(ctx, n_tokens >= 0 && n_tokens <= INT32_MAX, "n_tokens is %lld: it must be from 0 to 2^31 - 1", (long long)n_tokens);
  SFA_REQUIRE(ctx, (slots && k && v) || !n_tokens, "slots, k or v is NULL");
  SFA_REQUIRE(ctx, (uintptr_t)slots % sizeof *slots == 0, "slots is not aligned to its elements");
  if (!n_tokens)
    return SFA_OK;
  for (int64_t i = 0; sfa_arrays_are_here(ctx) && i < n_tokens; i++)
    SFA_REQUIRE(ctx, slots[i] < n_pages * SFA_PAGE_LEN, "slots[%lld] is %lld: the pool's %lld pages have %lld", (long long)i,
                (long long)slots[i], (long long)n_pages, (long long)(n_pages * SFA_PAGE_LEN));
  sfa_rows k_checked, v_checked;
  SFA_TRY(sfa_check_rows(ctx, "k", k, options->n_kv_heads, options->head_dim, n_tokens, &k_checked));
  SFA_TRY(
      sfa_check_values(ctx, v, options->n_kv_heads, options->head_dim_v ? options->head_dim_v : options->head_dim, n_tokens, &v_checked));
  return sfa_cache_paged_store(ctx, options, pool, n_pages, n_tokens, slots, &k_checked, &v_checked);
}

/* The views of a plan's sequences, their page tables in the workspace. */
static sfa_status paged_views(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_paged_kv *kv,
                              const sfa_cache_layer *layer, sfa_kv_view *views) {
  sfa_context *ctx = plan->ctx;
  const sfa_attention_options *o = &plan->options;
  const unsigned char **pages = (const unsigned char **)(void *)((unsigned char *)args->workspace + plan->page_tables);
  for (int32_t b = 0; b < o->n_sequences; b++, pages += sfa_page_count(o->max_seqlen_k)) {
    int64_t len = kv->cache_seqlens[b], n_pages = sfa_page_count(len);
    SFA_REQUIRE(ctx, len >= 0 && len <= o->max_seqlen_k && n_pages <= kv->max_pages,
                "cache_seqlens[%d] is %lld: it must be from 0 to the plan's max_seqlen_k = %lld, and fit max_pages = %lld pages", b,
                (long long)len, (long long)o->max_seqlen_k, (long long)kv->max_pages);
    for (int64_t i = 0; i < n_pages; i++) {
      int32_t page = kv->block_table[b * kv->max_pages + i];
      SFA_REQUIRE(ctx, page >= 0 && page < kv->n_pages, "block_table[%d][%lld] is %d: the pool has %lld pages", b, (long long)i, page,
                  (long long)kv->n_pages);
      pages[i] = (const unsigned char *)kv->pool + (size_t)page * layer->page_bytes;
    }
    sfa_cache_layer_view(layer, len, pages, &views[b]);
  }
  return SFA_OK;
}

sfa_status sfa_attention_run_paged(const sfa_attention_plan *plan, const sfa_attention_args *args, const sfa_paged_kv *kv) {
  if (!plan)
    return SFA_ERROR_ARGUMENT;
  sfa_context *ctx = plan->ctx;
  sfa_attention_args checked;
  sfa_cache_layer layer;
  SFA_TRY(sfa_check_attention_args(plan, args, &checked));
  SFA_TRY(sfa_check_no_postings(plan, args));
  SFA_REQUIRE(ctx, kv, "kv is NULL");
  SFA_REQUIRE(ctx, kv->struct_size == sizeof *kv, "kv.struct_size is %zu: set it to sizeof(sfa_paged_kv) = %zu", kv->struct_size,
              sizeof *kv);
  SFA_TRY(check_page_options(ctx, &kv->page));
  SFA_TRY(check_pool(ctx, kv->pool, kv->n_pages));
  SFA_REQUIRE(ctx, kv->max_pages >= 0 && kv->max_pages <= INT32_MAX, "max_pages is %lld: it must be from 0 to 2^31 - 1",
              (long long)kv->max_pages);
  SFA_REQUIRE(ctx, kv->cache_seqlens && (kv->block_table || !kv->max_pages), "cache_seqlens or block_table is NULL");
  SFA_REQUIRE(ctx, ((uintptr_t)kv->cache_seqlens | (uintptr_t)kv->block_table) % sizeof(int32_t) == 0,
              "cache_seqlens or block_table is not aligned to its elements");
  sfa_cache_layer_lay_out(&kv->page, &layer);
  SFA_TRY(sfa_check_stored(plan, "the page", kv->page.n_kv_heads, &layer.k, &layer.v));
  if (ctx->backend->attend_tables) {
    sfa_kv_view view;
    sfa_cache_layer_view(&layer, 0, NULL, &view);
    sfa_kv_tables tables = {.k = view.k,
                            .v = view.v,
                            .table_stride = kv->max_pages,
                            .lens = kv->cache_seqlens,
                            .pool = kv->pool,
                            .page_bytes = layer.page_bytes,
                            .n_pages = kv->n_pages,
                            .block_table = kv->block_table};
    return ctx->backend->attend_tables(plan, &checked, &tables);
  }
  sfa_kv_view *views = sfa_attention_views(plan, &checked);
  SFA_TRY(paged_views(plan, &checked, kv, &layer, views));
  ctx->backend->attend(plan, &checked, views);
  return SFA_OK;
}
