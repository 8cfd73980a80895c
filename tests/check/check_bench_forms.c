/* sfa_check --bench-forms [--only paper|postings]: the forms that stand beside the tile loop and the code scan. One thread; candidates take
 * turns, ratios are medians of the ratios within a round, in processor time of the thread.
 *
 *     paper     a forward of one head by Algorithm 1 of the paper against the tile loop: 4096 tokens, codes ready
 *     postings  scores of a query over all keys by an inverted index against the code scan: D = 128, int8 codes, 8 queries
 *
 * Uniform supports: all features alike. Skewed: feature number r of D is scaled by ((r + 1/2) / D + 1/4)^-1.2, which at D = 64 keeps the
 * hottest in 58 % (K = 8) and 71 % (K = 16) of the rows, as trained models do. */
#include "check.h"
#include "check_bench.h"
#include <math.h>
#include <sfa/attention.h>
#include <sfa/postings.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_ROUNDS = 21 };

static double now_ns(void) { return 1e6 * check_clock_ms(); }

static void fill_rows(sfa_rng *rng, int64_t n, int D, bool skewed, float *x) {
  float scale[256];
  for (int r = 0; r < D; r++)
    scale[r] = skewed ? powf(((float)r + 0.5f) / (float)D + 0.25f, -1.2f) : 1.0f;
  for (int64_t i = 0; i < n * D; i++)
    x[i] = (float)sfa_rng_normal(rng) * scale[i % D];
}

static sfa_codes select_rows(sfa_context *ctx, const float *x, int64_t n, int D, int K) {
  sfa_codes codes;
  check_must(ctx, sfa_codes_place(ctx, n, D, K, SFA_F32, check_block(sfa_codes_bytes(n, D, K, SFA_F32)), &codes));
  check_must(ctx, sfa_codes_select(ctx, x, SFA_F32, D, &codes));
  return codes; /* ids is the memory */
}

/* ---- Algorithm 1 of the paper ---- */

static void bench_paper(sfa_context *ctx, int D, int K, bool skewed, int n_rounds) {
  enum { N = 4096 };
  sfa_rng rng = {1};
  float *q = check_block(N * (size_t)D * sizeof *q), *k = check_block(N * (size_t)D * sizeof *k),
        *out = check_block(N * (size_t)D * sizeof *out);
  fill_rows(&rng, N, D, skewed, q);
  fill_rows(&rng, N, D, skewed, k);
  sfa_codes q_codes = select_rows(ctx, q, N, D, K), k_codes = select_rows(ctx, k, N, D, K);
  sfa_attention_plan *plans[2];
  size_t bytes = 0;
  for (int way = 0; way < 2; way++) {
    const sfa_attention_options o = {.struct_size = sizeof o,
                                     .n_heads = 1,
                                     .head_dim = D,
                                     .max_seqlen_q = N,
                                     .max_seqlen_k = N,
                                     .k_q = K,
                                     .k_k = K,
                                     .policy = way ? SFA_POLICY_PAPER : SFA_POLICY_TILES};
    check_must(ctx, sfa_attention_plan_create(ctx, &o, &plans[way]));
    bytes = sfa_attention_workspace_bytes(plans[way]) > bytes ? sfa_attention_workspace_bytes(plans[way]) : bytes;
  }
  sfa_attention_args args = {.struct_size = sizeof args, .q = {.data = q}, .k = {.data = k}, .v = {.data = k}, .out = out};
  args.q_codes = &q_codes;
  args.k_codes = &k_codes;
  args.workspace = check_block(bytes);
  double times[2][MAX_ROUNDS], ratios[MAX_ROUNDS];
  for (int round = -1; round < n_rounds; round++) /* the first one warms up */
    for (int way = 0; way < 2; way++) {
      const double start = now_ns();
      check_must(ctx, sfa_attention_run(plans[way], &args));
      if (round >= 0)
        times[way][round] = now_ns() - start;
    }
  for (int round = 0; round < n_rounds; round++)
    ratios[round] = times[1][round] / times[0][round];
  printf("paper    %-7s d %3d k %2d  tiles %6.1f ms  paper %6.1f ms  %.2f of the tiles' time\n", skewed ? "skewed" : "uniform", D, K,
         1e-6 * check_median(times[0], n_rounds), 1e-6 * check_median(times[1], n_rounds), check_median(ratios, n_rounds));
  fflush(stdout);
  for (int way = 0; way < 2; way++)
    sfa_attention_plan_destroy(plans[way]);
  void *all[] = {q, k, out, q_codes.ids, k_codes.ids, args.workspace};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    free(all[i]);
}

/* ---- The inverted index ---- */

enum { INDEX_DIM = 128, N_QUERIES = 8, CHUNK = 1 << 16 };
static const int32_t index_k[2] = {8, 16}; /* of the two layers */

/* Features that a query and a key of the chunk share, on average. */
static double overlap(const sfa_codes *queries, const sfa_codes *keys) {
  int64_t used[INDEX_DIM] = {0}, shared = 0;
  for (int64_t i = 0; i < keys->n_rows * keys->k; i++)
    used[((const uint8_t *)keys->ids)[i]]++;
  for (int64_t i = 0; i < queries->n_rows * queries->k; i++)
    shared += used[((const uint8_t *)queries->ids)[i]];
  return (double)shared / (double)(queries->n_rows * keys->n_rows);
}

static void bench_search(sfa_context *ctx, const sfa_cache *cache, sfa_search search, const sfa_postings *postings, double shared,
                         bool skewed, float *scores, int n_rounds) {
  double times[2][MAX_ROUNDS], ratios[MAX_ROUNDS];
  for (int round = -1; round < n_rounds; round++)
    for (int way = 0; way < 2; way++) {
      const double start = now_ns();
      search.postings = way ? postings : NULL;
      for (search.query_row = 0; search.query_row < N_QUERIES; search.query_row++)
        check_must(ctx, sfa_cache_scores(cache, &search, scores));
      if (round >= 0)
        times[way][round] = (now_ns() - start) / (double)(N_QUERIES * search.end_key);
    }
  for (int round = 0; round < n_rounds; round++)
    ratios[round] = times[0][round] / times[1][round];
  printf("postings %-7s n %7lld k %2d overlap %.2f  scan %.3f ns a key  index %.3f  ratio %.2f\n", skewed ? "skewed" : "uniform",
         (long long)search.end_key, search.query->k, shared, check_median(times[0], n_rounds), check_median(times[1], n_rounds),
         check_median(ratios, n_rounds));
  fflush(stdout);
}

static void bench_index(sfa_context *ctx, bool skewed, int64_t n_keys, int n_rounds) {
  const sfa_cache_options options = {
      .struct_size = sizeof options, .n_layers = 2, .n_kv_heads = 1, .head_dim = INDEX_DIM, .head_dim_v = 8, .k = index_k};
  sfa_cache *cache;
  sfa_rng rng = {1};
  float *x = check_block(CHUNK * (size_t)INDEX_DIM * sizeof *x), *q = check_block(N_QUERIES * (size_t)INDEX_DIM * sizeof *q);
  float *scores = check_block((size_t)n_keys * sizeof *scores);
  check_must(ctx, sfa_cache_create(ctx, &options, &cache));
  fill_rows(&rng, N_QUERIES, INDEX_DIM, skewed, q);
  for (int64_t done = 0; done < n_keys; done += CHUNK) {
    fill_rows(&rng, CHUNK, INDEX_DIM, skewed, x);
    for (int32_t layer = 0; layer < 2; layer++)
      check_must(ctx, sfa_cache_append(cache, 0, layer, CHUNK, &(sfa_rows){.data = x}, &(sfa_rows){.data = x}));
  }
  for (int32_t layer = 0; layer < 2; layer++) {
    sfa_codes queries = select_rows(ctx, q, N_QUERIES, INDEX_DIM, index_k[layer]);
    sfa_codes keys = select_rows(ctx, x, CHUNK, INDEX_DIM, index_k[layer]);
    sfa_postings *postings;
    check_must(ctx, sfa_postings_create(cache, layer, &postings));
    const double start = now_ns();
    check_must(ctx, sfa_postings_update(postings, 0));
    printf("postings %-7s n %7lld k %2d sealed in %.1f ns a key, %.1f bytes a key\n", skewed ? "skewed" : "uniform", (long long)n_keys,
           index_k[layer], (now_ns() - start) / (double)n_keys, (double)sfa_postings_bytes(postings) / (double)n_keys);
    sfa_search search = {.struct_size = sizeof search, .layer = layer, .query = &queries};
    for (search.end_key = 4096; search.end_key <= n_keys; search.end_key *= 16)
      bench_search(ctx, cache, search, postings, overlap(&queries, &keys), skewed, scores, n_rounds);
    sfa_postings_destroy(postings);
    free(queries.ids);
    free(keys.ids);
  }
  sfa_cache_destroy(cache);
  free(scores);
  free(x);
  free(q);
}

int check_bench_forms(const char *isa_name, const char *only, bool quick) {
  const int n_rounds = quick ? 3 : 11;
  for (sfa_isa isa = sfa_isa_best(); isa >= SFA_ISA_AVX2; isa--) {
    if (isa_name ? strcmp(isa_name, sfa_isa_name(isa)) : isa != sfa_isa_best())
      continue;
    const sfa_context_options options = {.struct_size = sizeof options, .n_threads = 1, .isa = isa};
    sfa_context *ctx = NULL;
    check_must(ctx, sfa_context_create(&options, &ctx));
    printf("%s, one thread\n", sfa_isa_name(isa));
    for (int skewed = 0; skewed < 2; skewed++) {
      for (int D = 64; D <= 256 && (!only || !strcmp(only, "paper")); D *= 2)
        for (int K = 8; K <= 16; K *= 2)
          bench_paper(ctx, D, K, skewed, quick ? n_rounds : 5);
      if (!only || !strcmp(only, "postings"))
        bench_index(ctx, skewed, quick ? CHUNK : 1 << 20, n_rounds);
    }
    sfa_context_destroy(ctx);
  }
  return 0;
}
