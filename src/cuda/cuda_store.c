/* Rows, codes and pages on a GPU: what the stages of selection and storing are given. */
#include "cuda/cuda_state.h"

/* ---- Places ---------------------------------------------------------------------------------------------------------------------- */

static size_t align256(size_t bytes) { return (bytes + 255) & ~(size_t)255; }

size_t sfa_cuda_store_bytes(const sfa_row_format *format, int32_t n_heads, int64_t max_tokens) {
  size_t n = (size_t)n_heads * (size_t)max_tokens;
  return align256(n * sfa_row_ids_bytes(format)) + align256(n * sfa_row_values_bytes(format)) + align256(n * sfa_row_scale_bytes(format));
}

/* Rows of row_bytes, `width` elements, those of a token head_rows apart, and those of a head token_rows. */
static sfa_kv_stream stream_at(const void *base, size_t row_bytes, int64_t width, int64_t head_rows, int64_t token_rows) {
  return (sfa_kv_stream){.base = base,
                         .head_bytes = row_bytes * (size_t)head_rows,
                         .tile_bytes = row_bytes * (size_t)token_rows * 64,
                         .row_stride = width * token_rows};
}

static sfa_cuda_store store_at(const sfa_row_format *format, const void *ids, const void *values, const void *scales, int64_t head_rows,
                               int64_t token_rows) {
  return (sfa_cuda_store){.format = *format,
                          .ids = stream_at(ids, sfa_row_ids_bytes(format), format->k, head_rows, token_rows),
                          .values = stream_at(values, sfa_row_values_bytes(format), sfa_row_width(format), head_rows, token_rows),
                          .scales = stream_at(scales, sfa_row_scale_bytes(format), 1, head_rows, token_rows)};
}

sfa_cuda_store sfa_cuda_store_in(void *memory, const sfa_row_format *format, int32_t n_heads, int64_t max_tokens) {
  unsigned char *ids = memory;
  size_t n = (size_t)n_heads * (size_t)max_tokens;
  unsigned char *values = ids + align256(n * sfa_row_ids_bytes(format)), *scales = values + align256(n * sfa_row_values_bytes(format));
  sfa_cuda_store store = store_at(format, ids, values, scales, max_tokens, 1);
  store.sequence_bytes = (int64_t)sfa_cuda_store_bytes(format, n_heads, max_tokens);
  return store;
}

sfa_cuda_store sfa_cuda_store_over(const sfa_codes *codes, int32_t n_heads) {
  sfa_row_format format = {codes->head_dim, codes->k, codes->dtype};
  return store_at(&format, codes->ids, codes->values, codes->scales, 1, n_heads);
}

sfa_cuda_store sfa_cuda_store_pages(const sfa_kv_side *side, unsigned char *const *pages, int64_t max_pages) {
  return (sfa_cuda_store){
      .pages = pages, .max_pages = max_pages, .format = side->format, .ids = side->ids, .values = side->values, .scales = side->scales};
}

/* Elements from head to head. */
static int64_t head_stride(sfa_dtype dtype, int32_t dim) { return dtype == SFA_I8 ? (dim + 15) / 16 * 16 : dim; }

sfa_cuda_rows sfa_cuda_rows_in(void *memory, sfa_dtype dtype, int32_t n_heads, int32_t dim) {
  return (sfa_cuda_rows){
      .data = memory, .dtype = dtype, .token_stride = n_heads * head_stride(dtype, dim), .head_stride = head_stride(dtype, dim)};
}

size_t sfa_cuda_rows_bytes(int64_t n_tokens, sfa_dtype dtype, int32_t n_heads, int32_t dim) {
  return (size_t)(n_tokens * n_heads * head_stride(dtype, dim)) * sfa_dtype_bytes(dtype);
}

/* ---- Selection ------------------------------------------------------------------------------------------------------------------- */

static void *moved(const void *memory, int64_t bytes) { return memory ? (unsigned char *)(uintptr_t)memory + bytes : NULL; }

/* The outputs of sequence b, for a call of its own. */
static sfa_cuda_select sequence_of(const sfa_cuda_select *all, int32_t b) {
  sfa_cuda_select s = *all;
  int64_t first = b * all->tokens.max_seqlen, n_words = (all->dim + 31) / 32;
  s.tokens = (sfa_cuda_tokens){.n_sequences = 1, .max_seqlen = all->tokens.max_seqlen};
  s.store.ids.base = moved(s.store.ids.base, b * s.store.sequence_bytes);
  s.store.values.base = moved(s.store.values.base, b * s.store.sequence_bytes);
  s.store.scales.base = moved(s.store.scales.base, b * s.store.sequence_bytes);
  s.rows.data = moved(s.rows.data, first * s.rows.token_stride * (int64_t)sfa_dtype_bytes(s.rows.dtype));
  s.row_scales = moved(s.row_scales, first * s.n_heads * (int64_t)sizeof *s.row_scales);
  s.rows_f32 = moved(s.rows_f32, first * s.n_heads * s.dim * (int64_t)sizeof *s.rows_f32);
  s.support = moved(s.support, first * s.n_heads * n_words * (int64_t)sizeof *s.support);
  return s;
}

/* `to` with what rows of the API say: tokens follow each other from sequence to sequence, and so do the lines of the rope. */
static sfa_cuda_select select_of(const sfa_context *ctx, const sfa_rows *x, const sfa_cuda_select *to) {
  sfa_cuda_select s = *to;
  s.x = (sfa_cuda_rows){(void *)(uintptr_t)x->data, x->dtype, x->token_stride, x->head_stride};
  if (x->norm) {
    s.norm_weight = x->norm->weight;
    s.norm_eps = x->norm->eps;
  }
  if (x->rope) {
    s.rope_cos = x->rope->cos;
    s.rope_sin = x->rope->sin;
    s.n_pairs = x->rope->n_rotated / 2;
    s.rope_interleaved = x->rope->interleaved;
  }
  if (s.has_store)
    s.n_bad = ctx->cuda->n_bad;
  return s;
}

static sfa_status select_packed(sfa_context *ctx, const sfa_rows *x, const sfa_cuda_select *to) {
  sfa_cuda_select s = select_of(ctx, x, to);
  return sfa_cuda_status(ctx, "top-k", sfa_cuda_stages_of(ctx)->select(&s, ctx->cuda->stream));
}

sfa_status sfa_cuda_select_rows(sfa_context *ctx, const sfa_rows *x, const sfa_cuda_select *to) {
  const sfa_cuda_tokens *tokens = &to->tokens;
  if (tokens->cu_seqlens || tokens->n_sequences == 1 || (!x->rope && x->batch_stride == tokens->max_seqlen * x->token_stride))
    return select_packed(ctx, x, to);
  for (int32_t b = 0; b < tokens->n_sequences; b++) {
    sfa_cuda_select one = sequence_of(to, b);
    sfa_rows rows = *x;
    rows.data = moved(x->data, b * x->batch_stride * (int64_t)sfa_dtype_bytes(x->dtype));
    SFA_TRY(select_packed(ctx, &rows, &one));
  }
  return SFA_OK;
}

static sfa_status need_select(sfa_context *ctx) {
  SFA_TRY(sfa_cuda_enter(ctx));
  return sfa_cuda_stages_of(ctx)->select ? SFA_OK : sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "this build of libsfa_cuda.so has no top-k");
}

sfa_status sfa_cuda_select_codes(sfa_context *ctx, const sfa_rows *x, const sfa_codes *codes) {
  SFA_TRY(need_select(ctx));
  sfa_cuda_select s = {.tokens = {.n_sequences = 1, .max_seqlen = codes->n_rows},
                       .n_heads = 1,
                       .dim = codes->head_dim,
                       .k = codes->k,
                       .has_store = 1,
                       .store = sfa_cuda_store_over(codes, 1)};
  return sfa_cuda_select_rows(ctx, x, &s);
}

sfa_status sfa_cuda_densify(sfa_context *ctx, const sfa_codes *codes, float *out, int64_t row_stride) {
  SFA_TRY(sfa_cuda_enter(ctx));
  return sfa_cuda_status(ctx, "codes to rows", sfa_cuda_help_of(ctx)->spread(codes, out, row_stride, NULL, ctx->cuda->stream));
}

sfa_status sfa_cuda_keep(sfa_context *ctx, const sfa_keep_options *options, int64_t n_tokens, int32_t n_heads, int32_t head_dim, float *x,
                         int64_t token_stride) {
  int64_t width = (int64_t)n_heads * head_dim, stride = token_stride ? token_stride : width;
  void *rows;
  if (options->gumbel_scale > 0)
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "gumbel_scale is %g: noise is drawn on the CPU only", (double)options->gumbel_scale);
  SFA_TRY(need_select(ctx));
  SFA_TRY(sfa_cuda_scratch(ctx, (size_t)(n_tokens * width) * sizeof(float), &rows));
  sfa_rows from = {.data = x, .dtype = SFA_F32, .token_stride = stride, .head_stride = head_dim};
  sfa_cuda_select s = {.tokens = {.n_sequences = 1, .max_seqlen = n_tokens},
                       .n_heads = n_heads,
                       .dim = head_dim,
                       .k = options->k,
                       .two_of_four = options->two_of_four,
                       .rows_f32 = rows};
  SFA_TRY(sfa_cuda_select_rows(ctx, &from, &s));
  return sfa_cuda_status(ctx, "rows to their places",
                         ctx->cuda->library->memory_copy_rows(x, (size_t)stride * sizeof(float), rows, (size_t)width * sizeof(float),
                                                              (size_t)n_tokens, ctx->cuda->stream));
}

/* ---- Pages ----------------------------------------------------------------------------------------------------------------------- */

/* A side of `job` to where the tables of the store say. */
static sfa_cuda_select side_of(const sfa_context *ctx, const sfa_kv_append *job, int side, const sfa_cuda_tokens *tokens,
                               unsigned char *const *pages, int64_t max_pages, const int32_t *first_token) {
  const sfa_kv_side *kv = side ? job->v_side : job->k_side;
  sfa_cuda_select s = {.tokens = *tokens,
                       .n_heads = job->n_kv_heads,
                       .dim = kv->format.dim,
                       .k = kv->format.k,
                       .has_store = 1,
                       .store = sfa_cuda_store_pages(kv, pages, max_pages),
                       .first_token = first_token};
  return select_of(ctx, side ? job->v : job->k, &s);
}

/* Each token is a sequence of its own with a table of one page. Tokens without a slot go to a page that nobody reads. */
static sfa_status append_slots(sfa_context *ctx, const sfa_kv_append *job) {
  enum { MOST_TOKENS = 32768 };
  sfa_cuda *cuda = ctx->cuda;
  size_t page_bytes = align256(job->page_bytes), n_most = (size_t)sfa_min64(job->n_tokens, MOST_TOKENS);
  unsigned char *scratch;
  SFA_TRY(sfa_cuda_scratch(ctx, page_bytes + n_most * (sizeof(void *) + sizeof(int32_t)), (void **)&scratch));
  unsigned char **pages = (unsigned char **)(void *)(scratch + page_bytes);
  int32_t *rows = (int32_t *)(void *)(pages + n_most);
  for (int64_t first = 0, n; first < job->n_tokens; first += n) {
    n = sfa_min64(job->n_tokens - first, MOST_TOKENS);
    sfa_rows k = *job->k, v = *job->v;
    sfa_rope rope;
    k.data = moved(k.data, first * k.token_stride * (int64_t)sfa_dtype_bytes(k.dtype));
    v.data = moved(v.data, first * v.token_stride * (int64_t)sfa_dtype_bytes(v.dtype));
    if (k.rope) {
      rope = *k.rope;
      rope.cos += first * (rope.n_rotated / 2);
      rope.sin += first * (rope.n_rotated / 2);
      k.rope = &rope;
    }
    sfa_kv_append part = *job;
    part.k = &k;
    part.v = &v;
    SFA_TRY(sfa_cuda_status(
        ctx, "slots",
        sfa_cuda_help_of(ctx)->slots(n, job->slots + first, job->pool, job->page_bytes, job->n_pages, scratch, pages, rows, cuda->stream)));
    sfa_cuda_tokens tokens = {.n_sequences = (int32_t)n, .max_seqlen = 1};
    for (int side = 0; side < 2; side++) {
      sfa_cuda_select s = side_of(ctx, &part, side, &tokens, pages, 1, rows);
      SFA_TRY(sfa_cuda_status(ctx, "top-k", sfa_cuda_stages_of(ctx)->select(&s, cuda->stream)));
    }
  }
  return SFA_OK;
}

sfa_status sfa_cuda_append(sfa_context *ctx, const sfa_kv_append *job) {
  SFA_TRY(need_select(ctx));
  if (job->slots)
    return append_slots(ctx, job);
  sfa_cuda_tokens tokens = {.n_sequences = 1, .max_seqlen = job->n_tokens};
  sfa_cuda_select k = side_of(ctx, job, 0, &tokens, job->pages, job->max_pages, job->len),
                  v = side_of(ctx, job, 1, &tokens, job->pages, job->max_pages, job->len);
  return sfa_cuda_status(ctx, "storing keys and values", sfa_cuda_stages_of(ctx)->store(&k, &v, job->len, ctx->cuda->stream));
}

sfa_status sfa_cuda_set_table(sfa_context *ctx, unsigned char **to, int64_t n, unsigned char *const *pages) {
  SFA_TRY(sfa_cuda_enter(ctx));
  for (int64_t first = 0; first < n; first += SFA_CUDA_WORDS) {
    uint64_t words[SFA_CUDA_WORDS];
    int32_t n_words = (int32_t)sfa_min64(n - first, SFA_CUDA_WORDS);
    for (int32_t i = 0; i < n_words; i++)
      words[i] = (uintptr_t)pages[first + i];
    SFA_TRY(sfa_cuda_status(ctx, "a page table",
                            sfa_cuda_help_of(ctx)->words((uint64_t *)(void *)(to + first), n_words, words, ctx->cuda->stream)));
  }
  return SFA_OK;
}

sfa_status sfa_cuda_set_lens(sfa_context *ctx, int32_t *lens, int64_t stride, int64_t n, int64_t len, bool only_less) {
  SFA_TRY(sfa_cuda_enter(ctx));
  return sfa_cuda_status(
      ctx, "lengths",
      sfa_cuda_help_of(ctx)->lens(lens, stride, n, (int32_t)len, only_less ? SFA_CUDA_LEN_AT_MOST : SFA_CUDA_LEN_IS, ctx->cuda->stream));
}
