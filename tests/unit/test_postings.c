/* The inverted index through the public API: same bits as reading the codes, whatever happened to the sequence meanwhile; the highest
 * scores; what is refused. */
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <sfa/postings.h>

#include "unit_tools.h"

enum { G = 2, D = 64, E = 8, K = 8, LAYERS = 4, BLOCK = 4096, LEN = 2 * BLOCK + 200 };
enum { CODES = 0, DENSE = 1, MANY = 2, HALF = 3 }; /* layers: codes, dense keys, too many features for exact sums, codes again */

static sfa_cache *new_cache(sfa_context *ctx, sfa_dtype k_dtype) {
  static const int32_t k[LAYERS] = {K, 0, 40, K};
  sfa_cache_options options = {.struct_size = sizeof options,
                               .n_layers = LAYERS,
                               .n_kv_heads = G,
                               .head_dim = D,
                               .head_dim_v = E,
                               .k = k,
                               .k_dtype = k_dtype,
                               .n_sequences = 3};
  sfa_cache *cache;
  assert_int_equal(sfa_cache_create(ctx, &options, &cache), SFA_OK);
  return cache;
}

/* Appends n tokens of random keys to a layer. */
static void append(sfa_cache *cache, int32_t sequence, int32_t layer, uint64_t seed, int64_t n) {
  float *k = normals(seed, n * G * D), *v = normals(seed + 1, n * G * E);
  for (int64_t row = 5; row < n * G; row += 97) { /* rows of zeros, and rows with equal entries */
    memset(k + row * D, 0, D * sizeof *k);
    if (row % 2)
      for (int u = 0; u < 5; u++)
        k[row * D + 11 * u] = 2.0f;
  }
  assert_int_equal(sfa_cache_append(cache, sequence, layer, n, &(sfa_rows){.data = k}, &(sfa_rows){.data = v}), SFA_OK);
  free(k);
  free(v);
}

/* Four query rows coded with k features of D. */
typedef struct queries {
  sfa_codes codes;
  void *memory;
} queries;

static queries new_queries(sfa_context *ctx, int32_t k) {
  queries q;
  float *x = normals(77, 4 * D);
  q.memory = aligned_alloc(64, (sfa_codes_bytes(4, D, k, SFA_F32) + 63) / 64 * 64);
  assert_int_equal(sfa_codes_place(ctx, 4, D, k, SFA_F32, q.memory, &q.codes), SFA_OK);
  assert_int_equal(sfa_codes_select(ctx, x, SFA_F32, D, &q.codes), SFA_OK);
  free(x);
  return q;
}

/* Scores with and without the index, for each kv head and query: equal bits. */
static void same_scores(const sfa_cache *cache, int32_t sequence, int32_t layer, const sfa_postings *postings, const sfa_codes *codes) {
  int64_t n = sfa_cache_len(cache, sequence, layer);
  float *with = malloc((size_t)(n + 1) * sizeof *with), *without = malloc((size_t)(n + 1) * sizeof *without);
  for (int32_t g = 0; g < G; g++)
    for (int64_t row = 0; row < codes->n_rows; row++) {
      sfa_search search = {.struct_size = sizeof search,
                           .sequence = sequence,
                           .layer = layer,
                           .kv_head = g,
                           .query = codes,
                           .query_row = row,
                           .postings = postings};
      with[n] = without[n] = 42;
      assert_int_equal(sfa_cache_scores(cache, &search, with), SFA_OK);
      search.postings = NULL;
      assert_int_equal(sfa_cache_scores(cache, &search, without), SFA_OK);
      assert_memory_equal(with, without, (size_t)(n + 1) * sizeof *with);
      bool any = false;
      for (int64_t j = 0; j < n; j++)
        any |= with[j] != 0;
      assert_true(any || !n);
    }
  free(with);
  free(without);
}

/* Every instruction set, sparse and dense queries, any number of threads. */
static void index_has_the_bits_of_the_codes(void **state) {
  (void)state;
  for (sfa_isa isa = SFA_ISA_SCALAR; isa <= sfa_isa_best(); isa++)
    for (int32_t n_threads = 1; n_threads <= 3; n_threads += 2) {
      sfa_context *ctx = new_context(n_threads, isa);
      sfa_cache *cache = new_cache(ctx, SFA_I8);
      sfa_postings *postings;
      assert_int_equal(sfa_postings_create(cache, CODES, &postings), SFA_OK);
      append(cache, 0, CODES, 1, LEN);
      assert_int_equal(sfa_postings_update(postings, 0), SFA_OK);
      assert_int_equal(sfa_postings_len(postings), 2 * BLOCK);
      for (int32_t k = 1; k <= D; k += 21) {
        queries q = new_queries(ctx, k);
        same_scores(cache, 0, CODES, postings, &q.codes);
        free(q.memory);
      }
      sfa_postings_destroy(postings);
      sfa_cache_destroy(cache);
      sfa_context_destroy(ctx);
    }
}

/* The scores themselves: the product in double, to the rounding of keys and query. */
static void scores_are_products(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_cache *cache = new_cache(ctx, SFA_DTYPE_DEFAULT);
  queries q = new_queries(ctx, K);
  float dense[4 * D];
  assert_int_equal(sfa_codes_densify(ctx, &q.codes, dense, D), SFA_OK);
  for (int32_t layer = 0; layer < LAYERS; layer++) {
    enum { N = 130 };
    append(cache, 1, layer, 3, N);
    float *k = normals(3, N * G * D), scores[N];
    for (int64_t row = 5; row < N * G; row += 97) {
      memset(k + row * D, 0, D * sizeof *k);
      if (row % 2)
        for (int u = 0; u < 5; u++)
          k[row * D + 11 * u] = 2.0f;
    }
    int32_t kept = layer == DENSE ? D : layer == MANY ? 40 : K;
    sfa_codes key;
    void *memory = aligned_alloc(64, (sfa_codes_bytes(N * G, D, kept, SFA_F32) + 63) / 64 * 64);
    assert_int_equal(sfa_codes_place(ctx, N * G, D, kept, SFA_F32, memory, &key), SFA_OK);
    assert_int_equal(sfa_codes_select(ctx, k, SFA_F32, D, &key), SFA_OK);
    assert_int_equal(sfa_codes_densify(ctx, &key, k, D), SFA_OK);
    sfa_search search = {.struct_size = sizeof search,
                         .sequence = 1,
                         .layer = layer,
                         .kv_head = 1,
                         .query = &q.codes,
                         .query_row = 2,
                         .softmax_scale = -0.5f};
    assert_int_equal(sfa_cache_scores(cache, &search, scores), SFA_OK);
    for (int j = 0; j < N; j++) {
      double truth = 0;
      for (int u = 0; u < D; u++)
        truth -= 0.5 * (double)dense[2 * D + u] * (double)k[(j * G + 1) * D + u];
      assert_true(fabs(scores[j] - truth) <= 0.06);
    }
    free(memory);
    free(k);
  }
  free(q.memory);
  sfa_cache_destroy(cache);
  sfa_context_destroy(ctx);
}

/* Append, truncate, fork, another slot: the index keeps what still holds, and until it is brought in line it does no harm. */
static void index_follows_the_sequence(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  sfa_cache *cache = new_cache(ctx, SFA_I8);
  queries q = new_queries(ctx, K);
  sfa_postings *postings;
  assert_int_equal(sfa_postings_create(cache, CODES, &postings), SFA_OK);
  assert_int_equal(sfa_postings_update(postings, 0), SFA_OK);
  assert_int_equal(sfa_postings_len(postings), 0);
  size_t empty_bytes = sfa_postings_bytes(postings);
  append(cache, 0, CODES, 1, BLOCK - 1);
  assert_int_equal(sfa_postings_update(postings, 0), SFA_OK);
  assert_int_equal(sfa_postings_len(postings), 0); /* not full */
  append(cache, 0, CODES, 5, 1);
  append(cache, 0, CODES, 7, BLOCK + 100);
  same_scores(cache, 0, CODES, postings, &q.codes); /* covers less than there is */
  assert_int_equal(sfa_postings_update(postings, 0), SFA_OK);
  assert_int_equal(sfa_postings_len(postings), 2 * BLOCK);
  /* LAYOUTS: D / 8 + K + 2 bytes a key and head, 4 D more a block and head, and little else. */
  size_t block_bytes = G * (BLOCK * (D / 8 + K + 2) + 4 * D), bytes = sfa_postings_bytes(postings) - empty_bytes;
  assert_true(bytes >= 2 * block_bytes && bytes <= 2 * block_bytes + 2048);

  /* Cut within the second block, and grown again with other tokens: the same length, the same pages, other content. */
  for (int64_t cut = 2 * BLOCK - 1; cut >= BLOCK; cut -= BLOCK - 1) {
    assert_int_equal(sfa_cache_truncate(cache, 0, cut), SFA_OK);
    same_scores(cache, 0, CODES, postings, &q.codes);
    append(cache, 0, CODES, 100 + (uint64_t)cut, 2 * BLOCK + 100 - cut);
    same_scores(cache, 0, CODES, postings, &q.codes);
    assert_int_equal(sfa_postings_update(postings, 0), SFA_OK);
    assert_int_equal(sfa_postings_len(postings), 2 * BLOCK);
    same_scores(cache, 0, CODES, postings, &q.codes);
  }

  /* A fork shares the first block; then the two go different ways. */
  for (int32_t layer = 1; layer < LAYERS; layer++)
    append(cache, 0, layer, 9, BLOCK + 10);
  assert_int_equal(sfa_cache_fork(cache, 0, 1, BLOCK + 10), SFA_OK);
  append(cache, 1, CODES, 200, BLOCK);
  same_scores(cache, 1, CODES, postings, &q.codes); /* the index of slot 0 over slot 1: only the first block is used */
  assert_int_equal(sfa_postings_update(postings, 1), SFA_OK);
  same_scores(cache, 1, CODES, postings, &q.codes);
  same_scores(cache, 0, CODES, postings, &q.codes);

  /* All of it gone: pages are used again for other tokens. */
  for (int32_t slot = 0; slot < 2; slot++)
    assert_int_equal(sfa_cache_truncate(cache, slot, 0), SFA_OK);
  append(cache, 2, CODES, 300, 2 * BLOCK);
  same_scores(cache, 2, CODES, postings, &q.codes);
  append(cache, 0, CODES, 400, 2 * BLOCK);
  same_scores(cache, 0, CODES, postings, &q.codes);
  assert_int_equal(sfa_cache_truncate(cache, 0, 10), SFA_OK);
  assert_int_equal(sfa_postings_update(postings, 0), SFA_OK);
  assert_int_equal(sfa_postings_len(postings), 0);
  same_scores(cache, 0, CODES, postings, &q.codes);
  sfa_postings_destroy(postings);
  free(q.memory);
  sfa_cache_destroy(cache);
  sfa_context_destroy(ctx);
}

/* ---- Decode -------------------------------------------------------------------------------------------------------------------- */

enum { H = 6 };

static const float sink_logits[H] = {0.5f, -1, 3, 0, 2, 1}, alibi_slopes[H] = {0.5f, 0.25f, 0.0625f, 0.01f, 0, 0.1f};

/* Two sequences, both of layer CODES. Returns out, lse and dropped in one array, which the caller frees. */
static float *decode(sfa_context *ctx, const sfa_cache *cache, const sfa_attention_options *options, sfa_policy policy,
                     const sfa_postings *const *postings, size_t *bytes) {
  sfa_attention_options o = *options;
  o.struct_size = sizeof o;
  o.n_heads = H;
  o.n_kv_heads = G;
  o.head_dim = D;
  o.head_dim_v = E;
  o.n_sequences = 2;
  o.max_seqlen_k = LEN;
  o.k_k = K;
  o.policy = policy;
  sfa_attention_plan *plan;
  if (sfa_attention_plan_create(ctx, &o, &plan) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  int64_t rows = 2 * o.max_seqlen_q * H;
  *bytes = (size_t)rows * (E + 2) * sizeof(float);
  float *q = normals(31, rows * D), *out = malloc(*bytes);
  void *workspace = aligned_alloc(64, (sfa_attention_workspace_bytes(plan) + 63) / 64 * 64);
  sfa_attention_args args = {.struct_size = sizeof args,
                             .q = {.data = q},
                             .sink_logit = sink_logits,
                             .alibi_slopes = options->softcap > 0 ? alibi_slopes : NULL,
                             .out = out,
                             .lse = out + rows * E,
                             .dropped = out + rows * (E + 1),
                             .postings = postings,
                             .workspace = workspace};
  if (sfa_attention_run_cached(plan, &args, cache, CODES, (int32_t[]){0, 1}) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  sfa_attention_plan_destroy(plan);
  free(workspace);
  free(q);
  return out;
}

/* By an index, forced or as the planner likes, out, lse and what eps leaves out have the bits of the code scan. */
static void decode_by_the_index(void **state) {
  (void)state;
  static const sfa_attention_options options[] = {
      {.max_seqlen_q = 1, .k_q = K},
      {.max_seqlen_q = 1, .k_q = 20, .softmax_scale = 1, .eps = 0.05f},
      {.max_seqlen_q = 3, .k_q = 3, .causal = 1, .softcap = 20},
      {.max_seqlen_q = 2, .k_q = 0, .causal = 1, .has_window = 1, .window_size = {5000, 0}, .n_sink_tokens = 70},
      {.max_seqlen_q = 5, .k_q = K, .causal = 1, .softmax_scale = 1, .eps = 0.01f, .softcap = 5},
  };
  for (sfa_isa isa = SFA_ISA_AVX2; isa <= sfa_isa_best(); isa++) {
    sfa_context *ctx = new_context(2, isa);
    sfa_cache *cache = new_cache(ctx, SFA_I8);
    sfa_postings *postings[2];
    for (int32_t slot = 0; slot < 2; slot++) {
      append(cache, slot, CODES, 50 + (uint64_t)slot, slot ? BLOCK + 10 : LEN);
      assert_int_equal(sfa_postings_create(cache, CODES, &postings[slot]), SFA_OK);
      assert_int_equal(sfa_postings_update(postings[slot], slot), SFA_OK);
    }
    const sfa_postings *all[2] = {postings[0], postings[1]}, *some[2] = {NULL, postings[1]}, *wrong[2] = {postings[1], postings[0]};
    const sfa_postings *const *given[] = {all, some, wrong};
    for (size_t i = 0; i < sizeof options / sizeof *options; i++) {
      size_t bytes;
      float *keys = decode(ctx, cache, &options[i], SFA_POLICY_KEYS, NULL, &bytes);
      float largest = 0; /* of what was left out */
      for (int64_t row = 2 * options[i].max_seqlen_q * H, r = 0; r < row; r++)
        largest = fmaxf(largest, keys[row * (E + 1) + r]);
      assert_true(options[i].eps > 0 ? largest > options[i].eps / 10 && largest <= options[i].eps : largest == 0);
      for (int g = 0; g < 3; g++)
        for (int automatic = 0; automatic < 2; automatic++) {
          float *index = decode(ctx, cache, &options[i], automatic ? SFA_POLICY_AUTO : SFA_POLICY_POSTINGS, given[g], &bytes);
          assert_memory_equal(index, keys, bytes);
          free(index);
        }
      free(keys);
    }
    for (int32_t slot = 0; slot < 2; slot++)
      sfa_postings_destroy(postings[slot]);
    sfa_cache_destroy(cache);
    sfa_context_destroy(ctx);
  }
}

static sfa_status plan_of(sfa_context *ctx, int32_t k_k, int64_t T, sfa_attention_plan **plan) {
  sfa_attention_options o = {.struct_size = sizeof o,
                             .n_heads = G,
                             .head_dim = D,
                             .head_dim_v = E,
                             .max_seqlen_q = T,
                             .max_seqlen_k = 100,
                             .k_q = K,
                             .k_k = k_k,
                             .policy = SFA_POLICY_POSTINGS};
  return sfa_attention_plan_create(ctx, &o, plan);
}

static void decode_refusals_say_why(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_cache *cache = new_cache(ctx, SFA_I8);
  sfa_attention_plan *plan;
  assert_int_equal(plan_of(ctx, 0, 1, &plan), SFA_ERROR_UNSUPPORTED);
  assert_int_equal(plan_of(ctx, 33, 1, &plan), SFA_ERROR_UNSUPPORTED);
  assert_non_null(strstr(sfa_context_error(ctx), "k_k is 33"));
  assert_int_equal(plan_of(ctx, K, 17, &plan), SFA_ERROR_UNSUPPORTED);
  assert_int_equal(plan_of(ctx, K, 1, &plan), SFA_OK);
  float q[G * D] = {0}, out[G * E];
  void *workspace = aligned_alloc(64, (sfa_attention_workspace_bytes(plan) + 63) / 64 * 64);
  sfa_attention_args args = {.struct_size = sizeof args, .q = {.data = q}, .k = {.data = q}, .v = {.data = q}, .out = out};
  args.workspace = workspace;
  assert_int_equal(sfa_attention_run(plan, &args), SFA_ERROR_UNSUPPORTED);
  assert_int_equal(sfa_attention_run_cached(plan, &args, cache, CODES, (int32_t[]){0}), SFA_ERROR_ARGUMENT);
  assert_non_null(strstr(sfa_context_error(ctx), "args.postings is NULL"));
  sfa_postings *postings;
  assert_int_equal(sfa_postings_create(cache, HALF, &postings), SFA_OK);
  args.postings = (const sfa_postings *const[]){postings};
  assert_int_equal(sfa_attention_run_cached(plan, &args, cache, CODES, (int32_t[]){0}), SFA_ERROR_ARGUMENT);
  assert_non_null(strstr(sfa_context_error(ctx), "made for layer 3"));
  sfa_postings_destroy(postings);
  free(workspace);
  sfa_attention_plan_destroy(plan);
  sfa_cache_destroy(cache);
  sfa_context_destroy(ctx);
}

/* ---- Search --------------------------------------------------------------------------------------------------------------------- */

static int hit_order(const void *a, const void *b) {
  const sfa_hit *x = a, *y = b;
  if (isnan(x->score) != isnan(y->score))
    return isnan(x->score) ? -1 : 1;
  if (x->score != y->score && !isnan(x->score))
    return x->score > y->score ? -1 : 1;
  return (x->key > y->key) - (x->key < y->key);
}

/* Against a full sort: any n_top, ties, all keys, a part of the keys, keys that are NaN. */
static void search_finds_the_highest(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  sfa_cache *cache = new_cache(ctx, SFA_I8);
  queries q = new_queries(ctx, K);
  append(cache, 0, CODES, 1, BLOCK + 300);
  float broken[G * D] = {0}, v[G * E] = {0};
  broken[3] = NAN;
  assert_int_equal(sfa_cache_append(cache, 0, CODES, 1, &(sfa_rows){.data = broken}, &(sfa_rows){.data = v}), SFA_OK);
  append(cache, 0, CODES, 1, 300); /* the first ones again: ties */
  sfa_postings *postings;
  assert_int_equal(sfa_postings_create(cache, CODES, &postings), SFA_OK);
  assert_int_equal(sfa_postings_update(postings, 0), SFA_OK);
  int64_t n = sfa_cache_len(cache, 0, CODES), n_hits, tops[] = {0, 1, 2, 10, 700, n, n + 5}, ends[] = {0, 1, 64, BLOCK - 1, BLOCK};
  float *scores = malloc((size_t)n * sizeof *scores);
  sfa_hit *sorted = malloc((size_t)n * sizeof *sorted), *hits = malloc((size_t)(n + 5) * sizeof *hits);
  for (int e = 0; e < 5; e++) {
    sfa_search search = {
        .struct_size = sizeof search, .layer = CODES, .end_key = ends[e], .query = &q.codes, .query_row = e % 4, .postings = postings};
    int64_t n_keys = ends[e] ? ends[e] : n;
    assert_int_equal(sfa_cache_scores(cache, &search, scores), SFA_OK);
    for (int64_t j = 0; j < n_keys; j++)
      sorted[j] = (sfa_hit){j, scores[j]};
    qsort(sorted, (size_t)n_keys, sizeof *sorted, hit_order);
    assert_true(e > 0 || isnan(sorted[0].score)); /* the broken key */
    for (int t = 0; t < 7; t++) {
      assert_int_equal(sfa_cache_search(cache, &search, tops[t], hits, &n_hits), SFA_OK);
      assert_int_equal(n_hits, tops[t] < n_keys ? tops[t] : n_keys);
      for (int64_t i = 0; i < n_hits; i++) {
        assert_int_equal(hits[i].key, sorted[i].key);
        assert_memory_equal(&hits[i].score, &sorted[i].score, sizeof(float));
      }
    }
  }
  free(scores);
  free(sorted);
  free(hits);
  sfa_postings_destroy(postings);
  free(q.memory);
  sfa_cache_destroy(cache);
  sfa_context_destroy(ctx);
}

static void refusals_say_why(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_cache *cache = new_cache(ctx, SFA_I8), *other = new_cache(ctx, SFA_F16);
  queries q = new_queries(ctx, K);
  sfa_postings *postings, *none;
  assert_int_equal(sfa_postings_create(cache, CODES, &postings), SFA_OK);
  assert_int_equal(sfa_postings_create(cache, LAYERS, &none), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_postings_create(cache, DENSE, &none), SFA_ERROR_UNSUPPORTED);
  assert_null(none);
  assert_int_equal(sfa_postings_create(cache, MANY, &none), SFA_ERROR_UNSUPPORTED);
  assert_non_null(strstr(sfa_context_error(ctx), "k = 40"));
  assert_int_equal(sfa_postings_create(other, CODES, &none), SFA_ERROR_UNSUPPORTED);
  assert_int_equal(sfa_postings_update(postings, 3), SFA_ERROR_ARGUMENT);
  append(cache, 0, HALF, 1, 70);
  sfa_search good = {.struct_size = sizeof good, .layer = HALF, .query = &q.codes}, bad;
  float scores[70];
  sfa_hit hits[1];
  int64_t n_hits;
  assert_int_equal(sfa_cache_scores(cache, &good, scores), SFA_OK);
#define REFUSED(change)                                                                                                                    \
  bad = good;                                                                                                                              \
  bad.change;                                                                                                                              \
  assert_int_equal(sfa_cache_scores(cache, &bad, scores), SFA_ERROR_ARGUMENT);                                                             \
  assert_int_equal(sfa_cache_search(cache, &bad, 1, hits, &n_hits), SFA_ERROR_ARGUMENT)
  REFUSED(struct_size = 3);
  REFUSED(sequence = 3);
  REFUSED(layer = -1);
  REFUSED(kv_head = G);
  REFUSED(end_key = 71);
  REFUSED(query = NULL);
  REFUSED(query_row = 4);
  REFUSED(softmax_scale = INFINITY);
  REFUSED(postings = postings); /* of another layer */
  assert_int_equal(sfa_cache_scores(cache, &good, NULL), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_search(cache, &good, -1, hits, &n_hits), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_search(cache, &good, 1, NULL, &n_hits), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_search(cache, &good, 0, NULL, &n_hits), SFA_OK);
  sfa_postings_destroy(postings);
  sfa_postings_destroy(NULL);
  assert_int_equal(sfa_postings_len(NULL), 0);
  free(q.memory);
  sfa_cache_destroy(cache);
  sfa_cache_destroy(other);
  sfa_context_destroy(ctx);
}

/* Whichever allocation fails: an error, nothing leaked, and what the index holds is right. */
static void failed_allocations_leave_a_valid_index(void **state) {
  (void)state;
  memory_account account = {0};
  sfa_context *ctx = new_counted_context(1, &account);
  sfa_cache *cache = new_cache(ctx, SFA_I8);
  queries q = new_queries(ctx, K);
  append(cache, 0, CODES, 1, 2 * BLOCK);
  int64_t live = account.out;
  bool worked = false;
  for (int64_t n = 1; !worked; n++) {
    sfa_postings *postings;
    account.refuse = account.calls + n;
    sfa_status status = sfa_postings_create(cache, CODES, &postings);
    if (status == SFA_OK)
      status = sfa_postings_update(postings, 0);
    worked = status == SFA_OK;
    account.refuse = 0;
    assert_true(worked || status == SFA_ERROR_MEMORY);
    assert_int_equal(sfa_postings_len(postings) == 2 * BLOCK, worked);
    if (postings)
      same_scores(cache, 0, CODES, postings, &q.codes);
    sfa_postings_destroy(postings);
    assert_int_equal(account.out, live);
    assert_true(n < 20);
  }
  free(q.memory);
  sfa_cache_destroy(cache);
  sfa_context_destroy(ctx);
  assert_int_equal(account.out, 0);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(index_has_the_bits_of_the_codes),
      cmocka_unit_test(scores_are_products),
      cmocka_unit_test(index_follows_the_sequence),
      cmocka_unit_test(search_finds_the_highest),
      cmocka_unit_test(decode_by_the_index),
      cmocka_unit_test(decode_refusals_say_why),
      cmocka_unit_test(refusals_say_why),
      cmocka_unit_test(failed_allocations_leave_a_valid_index),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
