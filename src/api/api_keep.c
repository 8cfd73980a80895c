/* sfa_rows_keep: features that are not kept become 0 in dense rows. Each row gets a copy of sizes to be compared, which noise and the
 * groups of four change; the top-k of these is the backend's. Only the choice differs from that of codes, never the kept values. */
#include "api/api_check.h"

#include "backend/backend.h"
#include "base/half.h"
#include "base/rng.h"

#include <string.h>

enum { KEEP_ROWS = 32, ROWS_AN_ITEM = 256 };

typedef struct keep_job {
  const sfa_context *ctx;
  const sfa_keep_options *options;
  int64_t n_rows;
  int32_t n_heads, head_dim;
  float *x;
  int64_t token_stride;
  unsigned char *scratch; /* [n_threads] */
  size_t sizes_bytes, kept_bytes, ids_bytes, scratch_bytes;
} keep_job;

/* NaN is largest, as in top-k. */
static uint32_t magnitude(float x) { return sfa_bits_of(x) & 0x7fffffffu; }

/* ---- Noise ------------------------------------------------------------------------------------------------------------------------ */

/* log2 x of a normal x > 0, to 5e-5 of it: x = 2^n (1 + t) with 1 + t from sqrt(1/2) to sqrt(2), so that nothing cancels near 1. */
static inline float rough_log2(float x) {
  const int32_t bits = (int32_t)sfa_bits_of(x), n = (bits - 0x3f3504f3) >> 23;
  const float t = sfa_float_of((uint32_t)bits - ((uint32_t)n << 23)) - 1.0f;
  return (float)n + t * (0x1.715144p+0f + t * (-0x1.70ec94p-1f + t * (0x1.f0f43ap-2f + t * (-0x1.90461ap-2f + t * 0x1.04dd7p-2f))));
}

/* 2^x, |x| < 100, to 8e-5 of it. Adding 1.5 * 2^23 rounds to a whole number, which stands in the low bits. */
static inline float rough_exp2(float x) {
  const float shifted = x + 0x1.8p23f, r = x - (shifted - 0x1.8p23f);
  const float p = 0x1.fff692p-1f + r * (0x1.62f31ap-1f + r * (0x1.f0de1cp-3f + r * 0x1.c3f758p-5f));
  return sfa_float_of(sfa_bits_of(p) + (sfa_bits_of(shifted) << 23));
}

/* The size times e^(scale * g), g from the Gumbel distribution: top-k of these draws from the softmax of ln(size) / scale without putting
 * back. g = -ln(-ln(r)), r uniform in (0, 1); so the factor is (-log2 r)^-scale, but for one that a row's features have in common.
 * r is a hash of row and feature: the numbers belong to the row, wherever it is computed, and to no instruction set: the loop is plain
 * arithmetic on each feature for itself, which compilers turn into vectors. */
static void add_noise(int32_t D, float scale, uint64_t seed, int64_t row, float *sizes) {
  sfa_rng start = {seed}, rng = {sfa_rng_next(&start) ^ (uint64_t)row};
  const uint64_t key = sfa_rng_next(&rng);
  for (int32_t u = 0; u < D; u++) {
    uint32_t h = (uint32_t)key + (uint32_t)u * 0x9e3779b9u;
    h = (h ^ h >> 16) * 0x7feb352du ^ (uint32_t)(key >> 32);
    h = (h ^ h >> 15) * 0x846ca68bu;
    const float r = ((float)(int32_t)((h ^ h >> 16) >> 9) + 0.5f) * 0x1p-23f;
    sizes[u] *= rough_exp2(-scale * rough_log2(-rough_log2(r)));
  }
}

/* ---- Rows ------------------------------------------------------------------------------------------------------------------------- */

/* Of each aligned four the two largest stay, ties to the lower feature. */
static void keep_two_of_four(int32_t D, float *sizes, float *x) {
  for (int32_t four = 0; four < D; four += 4) {
    bool loses[4];
    for (int32_t u = four; u < four + 4; u++) {
      int n_before = 0;
      for (int32_t v = four; v < four + 4; v++)
        n_before += magnitude(sizes[v]) > magnitude(sizes[u]) || (v < u && magnitude(sizes[v]) == magnitude(sizes[u]));
      loses[u - four] = n_before >= 2;
    }
    for (int32_t u = four; u < four + 4; u++)
      if (loses[u - four])
        sizes[u] = x[u] = 0;
  }
}

static void keep_rows(const keep_job *job, int64_t first, int64_t n, unsigned char *scratch) {
  const sfa_keep_options *o = job->options;
  const int32_t D = job->head_dim, K = o->k;
  float *sizes = (float *)(void *)scratch, *kept = (float *)(void *)(scratch + job->sizes_bytes);
  unsigned char *ids = scratch + job->sizes_bytes + job->kept_bytes;
  float *rows[KEEP_ROWS];
  for (int64_t i = 0; i < n; i++) {
    float *size = sizes + i * D;
    rows[i] = job->x + (first + i) / job->n_heads * job->token_stride + (first + i) % job->n_heads * D;
    for (int32_t u = 0; u < D; u++)
      size[u] = sfa_float_of(magnitude(rows[i][u]));
    if (o->gumbel_scale > 0)
      add_noise(D, o->gumbel_scale, o->seed, o->first_token * job->n_heads + first + i, size);
    if (o->two_of_four)
      keep_two_of_four(D, size, rows[i]);
  }
  const sfa_row_format format = {D, K, SFA_F32};
  const sfa_row_source source = {.data = sizes, .dtype = SFA_F32, .row_stride = D};
  const sfa_row_store store = {ids, kept, NULL};
  sfa_backend_of(job->ctx)->encode(job->ctx, n, &source, &format, &store, scratch + job->sizes_bytes + job->kept_bytes + job->ids_bytes,
                                   NULL); /* f32 holds every row */
  for (int64_t i = 0; i < n; i++) {
    for (int32_t k = 0; k < K; k++)
      kept[k] = rows[i][sfa_id_at(ids, D, i * K + k)];
    memset(rows[i], 0, (size_t)D * sizeof *rows[i]);
    for (int32_t k = 0; k < K; k++)
      rows[i][sfa_id_at(ids, D, i * K + k)] = kept[k];
  }
}

static void keep_item(void *arg, int64_t item, int32_t thread) {
  const keep_job *job = arg;
  const int64_t end = sfa_min64((item + 1) * ROWS_AN_ITEM, job->n_rows);
  for (int64_t first = item * ROWS_AN_ITEM; first < end; first += KEEP_ROWS)
    keep_rows(job, first, sfa_min64(KEEP_ROWS, end - first), job->scratch + (size_t)thread * job->scratch_bytes);
}

sfa_status sfa_rows_keep(sfa_context *ctx, const sfa_keep_options *options, int64_t n_tokens, int32_t n_heads, int32_t head_dim, float *x,
                         int64_t token_stride) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(ctx, options, "options is NULL");
  SFA_REQUIRE(ctx, options->struct_size == sizeof *options, "options.struct_size is %zu: set it to sizeof(sfa_keep_options) = %zu",
              options->struct_size, sizeof *options);
  SFA_REQUIRE(ctx, options->two_of_four == 0 || options->two_of_four == 1, "two_of_four is %d: it must be 0 or 1", options->two_of_four);
  SFA_REQUIRE(ctx, head_dim >= 8 && head_dim <= 65536 && head_dim % 8 == 0, "head_dim is %d; it must be a multiple of 8 up to 65536",
              head_dim);
  SFA_REQUIRE(ctx, options->k >= 1 && options->k <= (options->two_of_four ? head_dim / 2 : head_dim),
              "k is %d; it must be from 1 to head_dim, %d, and to half of it where two of four are kept", options->k, head_dim);
  SFA_REQUIRE(ctx, options->gumbel_scale >= 0 && options->gumbel_scale <= 2, "gumbel_scale is %g; it must be from 0 to 2",
              (double)options->gumbel_scale);
  SFA_REQUIRE(ctx,
              n_heads >= 1 && n_tokens >= 0 && n_tokens <= INT64_MAX / n_heads / head_dim && options->first_token >= 0 &&
                  options->first_token <= INT64_MAX / n_heads - n_tokens,
              "%lld tokens from %lld on, %d heads: out of range", (long long)n_tokens, (long long)options->first_token, n_heads);
  if (n_tokens == 0)
    return SFA_OK;
  SFA_REQUIRE(ctx, x && (uintptr_t)x % sizeof *x == 0, "x is NULL or not aligned to its elements");
  token_stride = token_stride ? token_stride : (int64_t)n_heads * head_dim;
  SFA_REQUIRE(ctx, token_stride >= (int64_t)n_heads * head_dim, "token_stride is %lld: tokens of %d heads of %d would overlap",
              (long long)token_stride, n_heads, head_dim);
  const sfa_row_format format = {head_dim, options->k, SFA_F32};
  if (ctx->backend->keep)
    return n_tokens && n_heads ? ctx->backend->keep(ctx, options, n_tokens, n_heads, head_dim, x, token_stride) : SFA_OK;
  keep_job job = {.ctx = ctx, .options = options, .n_rows = n_tokens * n_heads, .n_heads = n_heads, .head_dim = head_dim, .x = x};
  job.token_stride = token_stride;
  job.sizes_bytes = sfa_align64(KEEP_ROWS * (size_t)head_dim * sizeof(float));
  job.kept_bytes = sfa_align64(KEEP_ROWS * sfa_row_values_bytes(&format));
  job.ids_bytes = sfa_align64(KEEP_ROWS * sfa_row_ids_bytes(&format));
  job.scratch_bytes =
      job.sizes_bytes + job.kept_bytes + job.ids_bytes + sfa_align64(sfa_backend_of(ctx)->encode_scratch_bytes(&format, KEEP_ROWS));
  SFA_TRY(sfa_alloc(ctx, job.scratch_bytes * (size_t)ctx->n_threads, "scratch of the selection", (void **)&job.scratch));
  sfa_parallel(ctx, (job.n_rows + ROWS_AN_ITEM - 1) / ROWS_AN_ITEM, keep_item, &job);
  sfa_free(ctx, job.scratch);
  return SFA_OK;
}
