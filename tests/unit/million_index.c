/* An index of a long text without a model: `million_index FILE TOKENS` makes a layer of random keys and values (8 kv heads of 128, int8
 * codes of 16, int8 values: 164 bytes a token and head), saves it, opens it and compares the bits of a decode step over the file with those
 * over the cache it came from; `million_index FILE` opens such a file and takes the step. Times go to standard output. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <sfa/cache.h>

#include "base/rng.h"
#include "file/index_file.h"

enum { G = 8, H = 8, D = 128, K = 16, VOCAB = 32000, CHUNK = 4096, COMMIT = 65536 };
static float rows[(2 * CHUNK) * G * D], query[H * D], out[2][H * D];
static const int32_t k = K;
static sfa_context *ctx;

static void must(int good, const char *what) {
  if (good)
    return;
  fprintf(stderr, "%s: %s\n", what, sfa_context_error(ctx));
  exit(1);
}

static void fill_normals(float *x, size_t n, uint64_t seed) {
  sfa_rng rng = {seed};
  for (size_t i = 0; i < n; i++)
    x[i] = (float)sfa_rng_normal(&rng);
}

static sfa_cache *make_cache(void) {
  sfa_cache_options options = {
      .struct_size = sizeof options, .n_layers = 1, .n_kv_heads = G, .head_dim = D, .k = &k, .k_dtype = SFA_I8, .v_dtype = SFA_I8};
  sfa_cache *cache;
  must(sfa_cache_create(ctx, &options, &cache) == SFA_OK, "a cache");
  return cache;
}

static double milliseconds(int64_t start) { return 1e-6 * (double)(sfa_now_ns() - start); }

static void step(const sfa_cache *cache, const char *what, float *result) {
  int64_t n = sfa_cache_len(cache, 0, 0);
  sfa_attention_options options = {.struct_size = sizeof options,
                                   .n_heads = H,
                                   .n_kv_heads = G,
                                   .head_dim = D,
                                   .max_seqlen_q = 1,
                                   .max_seqlen_k = n,
                                   .k_q = K,
                                   .k_k = K,
                                   .causal = 1};
  sfa_attention_plan *plan;
  must(sfa_attention_plan_create(ctx, &options, &plan) == SFA_OK, "a plan");
  void *workspace = aligned_alloc(64, (sfa_attention_workspace_bytes(plan) + 63) / 64 * 64);
  must(workspace != NULL, "memory for the workspace");
  sfa_attention_args args = {.struct_size = sizeof args, .q.data = query, .out = result, .workspace = workspace};
  const int32_t sequence = 0;
  for (int i = 0; i < 2; i++) {
    int64_t start = sfa_now_ns();
    must(sfa_attention_run_cached(plan, &args, cache, 0, &sequence) == SFA_OK, "a step");
    printf("%s step over %s, %lld tokens: %.1f ms\n", i ? "second" : "first", what, (long long)n, milliseconds(start));
  }
  free(workspace);
  sfa_attention_plan_destroy(plan);
}

static sfa_status save_page(void *user, int32_t layer, int64_t page, void *image) {
  return sfa_cache_page_save(user, 0, layer, page, image);
}

static void make(const char *path, int64_t n_tokens) {
  int64_t start = sfa_now_ns();
  sfa_cache *cache = make_cache();
  sfa_index_layer_entry layer = {K, K, SFA_I8, SFA_I8, sfa_cache_page_bytes(cache, 0)};
  sfa_index_settings settings = {
      .n_layers = 1, .n_kv_heads = G, .head_dim = D, .head_dim_v = D, .vocab_size = VOCAB, .layers = &layer, .name = "random rows"};
  int32_t *tokens = calloc((size_t)n_tokens, sizeof *tokens);
  sfa_index_writer *writer;
  must(tokens && n_tokens > 0, "memory for tokens");
  fill_normals(rows, sizeof rows / sizeof *rows, 3);
  must(sfa_index_writer_open(ctx, path, &writer) == SFA_OK, "a writer");
  for (int64_t len = 0; len < n_tokens;) {
    int64_t n = n_tokens - len < CHUNK ? n_tokens - len : CHUNK;
    sfa_rows keys = {.data = rows + len / CHUNK * 37 % CHUNK * G * D}, values = {.data = rows + len / CHUNK * 91 % CHUNK * G * D};
    must(sfa_cache_append(cache, 0, 0, n, &keys, &values) == SFA_OK, "tokens");
    for (int64_t i = len; i < len + n; i++)
      tokens[i] = (int32_t)(i * 31 % VOCAB);
    len += n;
    sfa_index_state state = {.settings = &settings, .tokens = tokens, .n_tokens = len, .page = save_page, .user = cache};
    if (len % COMMIT == 0 || len == n_tokens)
      must(sfa_index_writer_commit(writer, &state) == SFA_OK, "a commit");
  }
  sfa_index_writer_close(writer);
  printf("made and saved: %.0f ms\n", milliseconds(start));
  step(cache, "the cache", out[0]);
  sfa_cache_destroy(cache);
  free(tokens);
}

int main(int argc, char **argv) {
  if (argc < 2 || argc > 3) {
    fprintf(stderr, "usage: million_index FILE [TOKENS]\n");
    return 2;
  }
  must(sfa_context_create(NULL, &ctx) == SFA_OK, "a context");
  fill_normals(query, sizeof query / sizeof *query, 5);
  if (argc == 3) {
    unlink(argv[1]);
    make(argv[1], atoll(argv[2]));
  }
  sfa_index *index;
  int64_t start = sfa_now_ns();
  must(sfa_index_open(ctx, argv[1], &index) == SFA_OK, "the index");
  double opened = milliseconds(start);
  sfa_cache *cache = make_cache();
  start = sfa_now_ns();
  must(sfa_cache_map(cache, 0, 0, index->n_tokens, index->pages) == SFA_OK, "the pages");
  sfa_index_info info;
  sfa_index_describe(index, &info);
  printf("opened %.2f GB of %lld tokens in %lld segments: %.2f ms, mapped into a cache: %.2f ms\n", 1e-9 * (double)info.bytes,
         (long long)info.n_tokens, (long long)info.n_segments, opened, milliseconds(start));
  step(cache, "the file", out[1]);
  start = sfa_now_ns();
  must(sfa_index_verify(index) == SFA_OK, "verifying");
  printf("verified: %.0f ms\n", milliseconds(start));
  sfa_cache_destroy(cache);
  sfa_index_close(index);
  sfa_context_destroy(ctx);
  if (argc == 3 && memcmp(out[0], out[1], sizeof out[0]) != 0) {
    fprintf(stderr, "other bits from the file than from the cache\n");
    return 1;
  }
  return 0;
}
