/* The cache through the public API: what attention reads from it, sharing, and what failures leave behind. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <sfa/cache.h>

#include "unit_tools.h"

/* One model of one shape, a cache of it, and inputs of `len` tokens. */
enum { H = 6, G = 2, D = 64, E = 40, LAYERS = 3, LEN = 300 };
static const int32_t layer_k[LAYERS] = {8, 0, 16};

typedef struct fixture {
  sfa_context *ctx;
  sfa_cache *cache;
  float *q, *k, *v; /* [LEN][H][D], [LEN][G][D], [LEN][G][E]: the same for every layer */
} fixture;

static fixture new_fixture(int32_t n_threads, sfa_dtype k_dtype, sfa_dtype v_dtype) {
  fixture f = {.ctx = new_context(n_threads, SFA_ISA_DEFAULT)};
  sfa_cache_options options = {.struct_size = sizeof options,
                               .n_layers = LAYERS,
                               .n_kv_heads = G,
                               .head_dim = D,
                               .head_dim_v = E,
                               .k = layer_k,
                               .k_dtype = k_dtype,
                               .v_dtype = v_dtype,
                               .n_sequences = 3};
  assert_int_equal(sfa_cache_create(f.ctx, &options, &f.cache), SFA_OK);
  f.q = normals(1, LEN * H * D);
  f.k = normals(2, LEN * G * D);
  f.v = normals(3, LEN * G * E);
  return f;
}

static void free_fixture(fixture *f) {
  free(f->q);
  free(f->k);
  free(f->v);
  sfa_cache_destroy(f->cache);
  sfa_context_destroy(f->ctx);
}

/* Appends tokens first..end of the inputs to a layer, or to all (-1). */
static void append(fixture *f, int32_t sequence, int32_t only_layer, int64_t first, int64_t end) {
  sfa_rows k = {.data = f->k + first * G * D}, v = {.data = f->v + first * G * E};
  for (int32_t layer = 0; layer < LAYERS; layer++)
    if (only_layer < 0 || only_layer == layer)
      if (sfa_cache_append(f->cache, sequence, layer, end - first, &k, &v) != SFA_OK)
        fail_msg("%s", sfa_context_error(f->ctx));
}

/* In f32 on every machine: in 16 bits a prompt's cut can show. */
static sfa_attention_options options_of(int32_t layer, int64_t n_queries, int64_t n_keys) {
  return (sfa_attention_options){.struct_size = sizeof(sfa_attention_options),
                                 .n_heads = H,
                                 .n_kv_heads = G,
                                 .head_dim = D,
                                 .head_dim_v = E,
                                 .max_seqlen_q = n_queries,
                                 .max_seqlen_k = n_keys,
                                 .k_q = layer_k[layer],
                                 .k_k = layer_k[layer],
                                 .causal = 1,
                                 .precision = SFA_PRECISION_F32};
}

/* Queries first..end over the cache as it is: out [end - first][H][E], lse [end - first][H]. */
static void attend(fixture *f, int32_t sequence, int32_t layer, int64_t first, int64_t end, float *out, float *lse) {
  sfa_attention_options options = options_of(layer, end - first, sfa_cache_len(f->cache, sequence, layer));
  sfa_attention_plan *plan;
  assert_int_equal(sfa_attention_plan_create(f->ctx, &options, &plan), SFA_OK);
  void *workspace = aligned_alloc(64, (sfa_attention_workspace_bytes(plan) + 63) / 64 * 64);
  sfa_attention_args args = {.struct_size = sizeof args, .q.data = f->q + first * H * D, .out = out, .lse = lse, .workspace = workspace};
  if (sfa_attention_run_cached(plan, &args, f->cache, layer, &sequence) != SFA_OK)
    fail_msg("%s", sfa_context_error(f->ctx));
  free(workspace);
  sfa_attention_plan_destroy(plan);
}

/* The same without a cache, all LEN tokens at once: keys and values rounded to the same types inside run. */
static void attend_directly(fixture *f, int32_t layer, sfa_dtype k_dtype, sfa_dtype v_dtype, float *out, float *lse) {
  sfa_attention_options options = options_of(layer, LEN, LEN);
  options.k_dtype = k_dtype;
  options.v_dtype = v_dtype;
  sfa_attention_plan *plan;
  assert_int_equal(sfa_attention_plan_create(f->ctx, &options, &plan), SFA_OK);
  void *workspace = aligned_alloc(64, (sfa_attention_workspace_bytes(plan) + 63) / 64 * 64);
  sfa_attention_args args = {
      .struct_size = sizeof args, .q.data = f->q, .k.data = f->k, .v.data = f->v, .out = out, .lse = lse, .workspace = workspace};
  assert_int_equal(sfa_attention_run(plan, &args), SFA_OK);
  free(workspace);
  sfa_attention_plan_destroy(plan);
}

static float out_a[LEN * H * E], out_b[LEN * H * E], lse_a[LEN * H], lse_b[LEN * H];

static void expect_same(const char *what, int64_t n_tokens, const float *out, const float *lse) {
  if (memcmp(out_a, out, (size_t)(n_tokens * H * E) * sizeof *out) || memcmp(lse_a, lse, (size_t)(n_tokens * H) * sizeof *lse))
    fail_msg("%s: other bits", what);
}

/* ---- Tests -------------------------------------------------------------------------------------------------------------- */

/* A prompt cut into chunks of any size gives the bits of one call without a cache. */
static void chunks(void **state) {
  (void)state;
  static const sfa_dtype k_types[] = {SFA_I8, SFA_BF16, SFA_F32, SFA_F16}, v_types[] = {SFA_BF16, SFA_I8, SFA_F32, SFA_F16};
  static const int64_t chunk_lens[] = {1, 7, 64, 100, LEN};
  for (int type = 0; type < 4; type++)
    for (int32_t layer = 0; layer < LAYERS; layer++)
      for (int cut = 0; cut < 5; cut++) {
        fixture f = new_fixture(2, k_types[type], v_types[type]);
        attend_directly(&f, layer, k_types[type], v_types[type], out_a, lse_a);
        for (int64_t first = 0; first < LEN; first += chunk_lens[cut]) {
          int64_t end = first + chunk_lens[cut] < LEN ? first + chunk_lens[cut] : LEN;
          append(&f, 1, layer, first, end);
          attend(&f, 1, layer, first, end, out_b + first * H * E, lse_b + first * H);
        }
        expect_same("chunks", LEN, out_b, lse_b);
        free_fixture(&f);
      }
}

/* Threads share out spans and heads; sequences of other lengths go along: the same bits. */
static void company(void **state) {
  (void)state;
  enum { N = 3 };
  static const int64_t lens[N] = {300, 64, 131};
  fixture one = new_fixture(1, SFA_DTYPE_DEFAULT, SFA_DTYPE_DEFAULT), two = new_fixture(2, SFA_DTYPE_DEFAULT, SFA_DTYPE_DEFAULT);
  for (int32_t s = 0; s < N; s++) {
    append(&one, s, -1, 0, lens[s]);
    append(&two, s, -1, 0, lens[s]);
  }
  for (int32_t layer = 0; layer < LAYERS; layer++) {
    static const int32_t cu_seqlens[] = {0, 5, 6, 10}, order[] = {2, 0, 1};
    sfa_attention_options options = options_of(layer, 5, LEN);
    options.n_sequences = N;
    sfa_attention_plan *plan;
    assert_int_equal(sfa_attention_plan_create(two.ctx, &options, &plan), SFA_OK);
    void *workspace = aligned_alloc(64, (sfa_attention_workspace_bytes(plan) + 63) / 64 * 64);
    sfa_attention_args args = {
        .struct_size = sizeof args, .q.data = two.q, .cu_seqlens_q = cu_seqlens, .out = out_b, .lse = lse_b, .workspace = workspace};
    assert_int_equal(sfa_attention_run_cached(plan, &args, two.cache, layer, order), SFA_OK);
    for (int b = 0; b < N; b++) {
      int32_t first = cu_seqlens[b], end = cu_seqlens[b + 1];
      attend(&one, order[b], layer, first, end, out_a, lse_a);
      expect_same("company", end - first, out_b + first * H * E, lse_b + first * H);
    }
    free(workspace);
    sfa_attention_plan_destroy(plan);
  }
  free_fixture(&one);
  free_fixture(&two);
}

/* What slot `sequence` answers for its last 3 tokens must be what a cache answers that got tokens 0..len in one go; the last n_other
 * tokens of it came from input position `other` on. */
static void expect_contents(fixture *f, int32_t sequence, int64_t len, int64_t n_other, int64_t other) {
  fixture fresh = new_fixture(1, SFA_DTYPE_DEFAULT, SFA_DTYPE_DEFAULT);
  append(&fresh, 0, -1, 0, len - n_other);
  append(&fresh, 0, -1, other, other + n_other);
  for (int32_t layer = 0; layer < LAYERS; layer++) {
    assert_int_equal(sfa_cache_len(f->cache, sequence, layer), len);
    attend(&fresh, 0, layer, 0, 3, out_a, lse_a);
    attend(f, sequence, layer, 0, 3, out_b, lse_b);
    expect_same("contents", 3, out_b, lse_b);
  }
  free_fixture(&fresh);
}

/* Forks share pages until one of them writes; then each has its own. */
static void forks(void **state) {
  (void)state;
  for (int64_t prefix = 0; prefix <= 200; prefix += 40) { /* 40, 80, 120, 160: inside a page; 200: all of it */
    fixture f = new_fixture(2, SFA_DTYPE_DEFAULT, SFA_DTYPE_DEFAULT);
    append(&f, 0, -1, 0, 200);
    append(&f, 1, -1, 100, 170); /* is forgotten */
    size_t one = sfa_cache_bytes(f.cache);
    sfa_cache_truncate(f.cache, 1, 0);
    size_t before = sfa_cache_bytes(f.cache);
    assert_true(before < one);
    assert_int_equal(sfa_cache_fork(f.cache, 0, 1, prefix), SFA_OK);
    assert_int_equal(sfa_cache_fork(f.cache, 1, 2, prefix), SFA_OK);
    assert_int_equal(sfa_cache_bytes(f.cache), before);
    append(&f, 1, -1, 250, 300);
    append(&f, 0, -1, 200, 220);
    append(&f, 2, -1, 220, 240);
    expect_contents(&f, 0, 220, 20, 200);
    expect_contents(&f, 1, prefix + 50, 50, 250);
    expect_contents(&f, 2, prefix + 20, 20, 220);
    sfa_cache_truncate(f.cache, 0, 0);
    expect_contents(&f, 1, prefix + 50, 50, 250);
    assert_int_equal(sfa_cache_fork(f.cache, 1, 2, prefix + 50), SFA_OK); /* over what was there */
    expect_contents(&f, 2, prefix + 50, 50, 250);
    sfa_cache_truncate(f.cache, 1, 0);
    sfa_cache_truncate(f.cache, 2, 0);
    assert_int_equal(sfa_cache_bytes(f.cache), 0);
    free_fixture(&f);
  }
}

static void truncation(void **state) {
  (void)state;
  fixture f = new_fixture(2, SFA_DTYPE_DEFAULT, SFA_DTYPE_DEFAULT);
  append(&f, 0, -1, 0, 250);
  size_t full = sfa_cache_bytes(f.cache);
  for (int64_t len = 249; len > 0; len -= 31) {
    assert_int_equal(sfa_cache_truncate(f.cache, 0, len), SFA_OK);
    append(&f, 0, -1, 280, 290);
    expect_contents(&f, 0, len + 10, 10, 280);
    sfa_cache_truncate(f.cache, 0, len);
  }
  assert_true(sfa_cache_bytes(f.cache) * 4 == full); /* one page of four */
  assert_int_equal(sfa_cache_truncate(f.cache, 0, 1000), SFA_OK);
  assert_int_equal(sfa_cache_len(f.cache, 0, 1), 1);
  free_fixture(&f);
}

static void sizes(void **state) {
  (void)state;
  fixture f = new_fixture(1, SFA_DTYPE_DEFAULT, SFA_DTYPE_DEFAULT);
  /* int8 codes of 8 and of 16, dense bf16; bf16 values */
  assert_int_equal(sfa_cache_token_bytes(f.cache), G * ((8 * 2 + 2) + D * 2 + (16 * 2 + 2) + 3 * E * 2));
  assert_int_equal(sfa_cache_bytes(f.cache), 0);
  append(&f, 0, -1, 0, 64);
  size_t rows = 64 * sfa_cache_token_bytes(f.cache);
  assert_true(sfa_cache_bytes(f.cache) >= rows && sfa_cache_bytes(f.cache) <= rows + rows / 20);
  free_fixture(&f);
}

/* The first `len` tokens of a slot as images in memory that nobody can write. */
typedef struct saved_pages {
  unsigned char *memory;
  size_t bytes;
  const void *pages[LAYERS][LEN / 64 + 1];
} saved_pages;

static saved_pages save_pages(const fixture *f, int32_t sequence, int64_t len) {
  saved_pages s = {.bytes = 0};
  int64_t n_pages = (len + 63) / 64;
  for (int32_t layer = 0; layer < LAYERS; layer++)
    s.bytes += (size_t)n_pages * sfa_cache_page_bytes(f->cache, layer);
  s.memory = mmap(NULL, s.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  assert_true(s.memory != MAP_FAILED);
  unsigned char *at = s.memory;
  for (int32_t layer = 0; layer < LAYERS; layer++)
    for (int64_t p = 0; p < n_pages; p++, at += sfa_cache_page_bytes(f->cache, layer)) {
      memset(at, 0xee, sfa_cache_page_bytes(f->cache, layer));
      assert_int_equal(sfa_cache_page_save(f->cache, sequence, layer, p, at), SFA_OK);
      s.pages[layer][p] = at;
    }
  assert_int_equal(mprotect(s.memory, s.bytes, PROT_READ), 0);
  return s;
}

static void map_pages(fixture *f, int32_t sequence, int64_t len, const saved_pages *s) {
  for (int32_t layer = 0; layer < LAYERS; layer++)
    if (sfa_cache_map(f->cache, sequence, layer, len, s->pages[layer]) != SFA_OK)
      fail_msg("%s", sfa_context_error(f->ctx));
}

/* Saved pages, mapped read-only into other caches: attention, append, truncate, fork and the cache's end leave them as they are (a write
 * would end the process), and every slot answers as if its tokens had been appended there. */
static void mapping(void **state) {
  (void)state;
  static const int64_t lens[] = {1, 63, 64, 65, 130, 192};
  for (size_t i = 0; i < sizeof lens / sizeof *lens; i++) {
    int64_t len = lens[i];
    fixture maker = new_fixture(1, SFA_DTYPE_DEFAULT, SFA_DTYPE_DEFAULT), f = new_fixture(2, SFA_DTYPE_DEFAULT, SFA_DTYPE_DEFAULT);
    append(&maker, 0, -1, 0, len);
    saved_pages s = save_pages(&maker, 0, len);
    map_pages(&f, 0, len, &s);
    assert_int_equal(sfa_cache_bytes(f.cache), 0);
    if (len >= 3)
      expect_contents(&f, 0, len, 0, 0);
    assert_int_equal(sfa_cache_fork(f.cache, 0, 1, len), SFA_OK);
    append(&f, 0, -1, 200, 290);
    expect_contents(&f, 0, len + 90, 90, 200);
    append(&f, 1, -1, 250, 260);
    expect_contents(&f, 1, len + 10, 10, 250);
    assert_int_equal(sfa_cache_fork(f.cache, 0, 2, len + 5), SFA_OK); /* mapped pages and own ones */
    append(&f, 2, -1, 205, 235);
    expect_contents(&f, 2, len + 35, 35, 200);
    for (int64_t cut = len; cut > 40; cut -= 37) { /* into the mapped pages, and on */
      assert_int_equal(sfa_cache_truncate(f.cache, 0, cut), SFA_OK);
      append(&f, 0, -1, 280, 290);
      expect_contents(&f, 0, cut + 10, 10, 280);
      assert_int_equal(sfa_cache_truncate(f.cache, 0, cut), SFA_OK);
    }
    expect_contents(&f, 1, len + 10, 10, 250);
    /* Saved again, from mapped and own pages: the same bytes. */
    sfa_cache_truncate(f.cache, 1, len);
    saved_pages again = save_pages(&f, 1, len);
    assert_int_equal(again.bytes, s.bytes);
    assert_memory_equal(again.memory, s.memory, s.bytes);
    sfa_cache_truncate(f.cache, 0, 0);
    sfa_cache_truncate(f.cache, 1, 0);
    sfa_cache_truncate(f.cache, 2, 0);
    assert_int_equal(sfa_cache_bytes(f.cache), 0);
    map_pages(&f, 1, len, &s);
    free_fixture(&f); /* leaves the pages */
    map_pages(&maker, 1, len, &s);
    if (len >= 3)
      expect_contents(&maker, 1, len, 0, 0);
    free_fixture(&maker);
    munmap(s.memory, s.bytes);
    munmap(again.memory, again.bytes);
  }
}

/* ---- Failures ----------------------------------------------------------------------------------------------------------- */

static void range_errors(void **state) {
  (void)state;
  fixture f = new_fixture(2, SFA_I8, SFA_F16);
  append(&f, 0, -1, 0, 100);
  assert_int_equal(sfa_cache_fork(f.cache, 0, 1, 100), SFA_OK);
  for (int32_t layer = 0; layer < LAYERS; layer++)
    attend(&f, 0, layer, 0, 9, out_a + layer * 9 * H * E, lse_a + layer * 9 * H);
  size_t bytes = sfa_cache_bytes(f.cache);
  for (int side = 0; side < 2; side++) {
    float *x = side ? f.v + 200 * G * E : f.k + 200 * G * D, kept = *x;
    *x = 70000;
    sfa_rows k = {.data = f.k + 100 * G * D}, v = {.data = f.v + 100 * G * E};
    for (int32_t layer = 0; layer < LAYERS; layer++) {
      assert_int_equal(sfa_cache_append(f.cache, 0, layer, 150, &k, &v), SFA_ERROR_RANGE);
      assert_non_null(strstr(sfa_context_error(f.ctx), "tokens 100..249"));
    }
    *x = kept;
  }
  for (int32_t layer = 0; layer < LAYERS; layer++)
    for (int32_t sequence = 0; sequence < 2; sequence++)
      attend(&f, sequence, layer, 0, 9, out_b + layer * 9 * H * E, lse_b + layer * 9 * H);
  expect_same("after a refused append", 9 * LAYERS, out_b, lse_b);
  assert_true(sfa_cache_bytes(f.cache) <= bytes * 3 / 2); /* a copy of the shared last page may stay, nothing else */
  sfa_cache_truncate(f.cache, 0, 0);
  sfa_cache_truncate(f.cache, 1, 0);
  assert_int_equal(sfa_cache_bytes(f.cache), 0);
  free_fixture(&f);
}

/* Every allocation of a life of a cache is refused once: the call that wanted it says so, what was there is there, nothing leaks. */
static void no_memory(void **state) {
  (void)state;
  int n_refused = 0;
  for (int64_t refuse = 2;; refuse++) { /* 1 is the context */
    memory_account account = {.refuse = refuse};
    fixture f = {
        .ctx = new_counted_context(2, &account), .q = normals(1, LEN * H * D), .k = normals(2, LEN * G * D), .v = normals(3, LEN * G * E)};
    sfa_cache_options options = {
        .struct_size = sizeof options, .n_layers = LAYERS, .n_kv_heads = G, .head_dim = D, .head_dim_v = E, .k = layer_k, .n_sequences = 3};
    sfa_status status = sfa_cache_create(f.ctx, &options, &f.cache);
    assert_true(status == SFA_OK ? f.cache != NULL : status == SFA_ERROR_MEMORY && !f.cache);
    int64_t len[2] = {0, 0};
    static const int64_t steps[] = {100, 30, 170};
    for (int step = 0; status == SFA_OK && step < 3; step++) {
      sfa_rows k = {.data = f.k + len[0] * G * D}, v = {.data = f.v + len[0] * G * E};
      for (int32_t layer = 0; status == SFA_OK && layer < LAYERS; layer++) {
        status = sfa_cache_append(f.cache, 0, layer, steps[step], &k, &v);
        assert_int_equal(sfa_cache_len(f.cache, 0, layer), len[0] + (status == SFA_OK ? steps[step] : 0));
      }
      if (status != SFA_OK)
        sfa_cache_truncate(f.cache, 0, len[0]); /* the layers before the one that failed */
      else
        len[0] += steps[step];
      if (status == SFA_OK) {
        int64_t prefix = len[0] - 10;
        status = sfa_cache_fork(f.cache, 0, 1, prefix);
        len[1] = status == SFA_OK ? prefix : len[1];
      }
    }
    bool refused = status != SFA_OK;
    assert_int_equal(refused, account.calls >= refuse);
    if (refused)
      assert_int_equal(status, SFA_ERROR_MEMORY);
    n_refused += refused;
    account.refuse = 0;
    for (int32_t s = 0; f.cache && s < 2; s++)
      if (len[s])
        expect_contents(&f, s, len[s], 0, 0);
    free_fixture(&f);
    assert_int_equal(account.out, 0);
    if (!refused)
      break;
  }
  assert_true(n_refused > 20);
}

static void wrong_arguments(void **state) {
  (void)state;
  static const int32_t wrong_k[LAYERS] = {8, 65, 0};
  fixture f = new_fixture(1, SFA_DTYPE_DEFAULT, SFA_DTYPE_DEFAULT);
  const sfa_cache_options good = {.struct_size = sizeof good, .n_layers = LAYERS, .n_kv_heads = G, .head_dim = D};
  for (int i = 0; i < 10; i++) {
    sfa_cache_options o = good;
    o.struct_size -= i == 0;
    o.n_layers = i == 1 ? 0 : o.n_layers;
    o.n_kv_heads = i == 2 ? -1 : o.n_kv_heads;
    o.head_dim = i == 3 ? 20 : o.head_dim;
    o.head_dim_v = i == 4 ? 65544 : 0;
    o.k = i == 5 ? wrong_k : NULL;
    o.k_dtype = i == 6 ? (sfa_dtype)7 : 0;
    o.v_dtype = i == 7 ? (sfa_dtype)7 : 0;
    o.n_sequences = i == 8 ? -1 : 0;
    sfa_cache *cache;
    assert_int_equal(sfa_cache_create(f.ctx, &o, &cache), i < 9 ? SFA_ERROR_ARGUMENT : SFA_OK);
    assert_int_equal(cache != NULL, i == 9);
    assert_true(strlen(sfa_context_error(f.ctx)) > 10);
    sfa_cache_destroy(cache);
  }
  assert_int_equal(sfa_cache_create(NULL, &good, &f.cache), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_create(f.ctx, &good, NULL), SFA_ERROR_ARGUMENT);

  const sfa_rows k = {.data = f.k}, v = {.data = f.v}, none = {0}, odd = {.data = f.k, .dtype = SFA_F16};
  assert_int_equal(sfa_cache_append(f.cache, 3, 0, 1, &k, &v), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_append(f.cache, 0, -1, 1, &k, &v), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_append(f.cache, 0, 0, -1, &k, &v), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_append(f.cache, 0, 0, INT64_MAX, &k, &v), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_append(f.cache, 0, 0, 1, NULL, &v), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_append(f.cache, 0, 0, 1, &k, &none), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_append(f.cache, 0, 0, 1, &odd, &v), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_append(NULL, 0, 0, 1, &k, &v), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_append(f.cache, 0, 0, 0, &none, &none), SFA_OK);
  assert_int_equal(sfa_cache_len(f.cache, 0, LAYERS), -1);
  assert_int_equal(sfa_cache_len(f.cache, -1, 0), -1);
  assert_int_equal(sfa_cache_truncate(f.cache, 0, -1), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_truncate(f.cache, 7, 0), SFA_ERROR_ARGUMENT);
  append(&f, 0, -1, 0, 10);
  append(&f, 0, 1, 10, 12);
  assert_int_equal(sfa_cache_fork(f.cache, 0, 0, 5), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_fork(f.cache, 0, 1, 11), SFA_ERROR_ARGUMENT); /* layer 0 holds 10 */
  assert_int_equal(sfa_cache_fork(f.cache, 0, 1, -1), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_fork(f.cache, 0, 3, 1), SFA_ERROR_ARGUMENT);

  for (int i = 0; i < 9; i++) {
    sfa_attention_options options = options_of(0, 1, i == 0 ? 9 : 10);
    options.k_k = i == 1 ? 9 : options.k_k;
    options.n_kv_heads = i == 2 ? 3 : options.n_kv_heads;
    options.head_dim_v = i == 3 ? 48 : options.head_dim_v;
    sfa_attention_plan *plan;
    assert_int_equal(sfa_attention_plan_create(f.ctx, &options, &plan), SFA_OK);
    void *workspace = aligned_alloc(64, (sfa_attention_workspace_bytes(plan) + 63) / 64 * 64);
    sfa_attention_args args = {.struct_size = sizeof args, .q.data = i == 4 ? NULL : f.q, .out = out_a, .workspace = workspace};
    const int32_t sequence = i == 5 ? 3 : 0, layer = i == 6 ? LAYERS : 0;
    sfa_status status = sfa_attention_run_cached(plan, &args, i == 7 ? NULL : f.cache, layer, &sequence);
    assert_int_equal(status, i < 8 ? SFA_ERROR_ARGUMENT : SFA_OK);
    free(workspace);
    sfa_attention_plan_destroy(plan);
  }

  _Alignas(64) static unsigned char image[1 << 16];
  const void *whole[] = {image, image}, *crooked[] = {image + 8, image}, *absent[] = {image, NULL};
  assert_true(sfa_cache_page_bytes(f.cache, 0) > 64 && sfa_cache_page_bytes(f.cache, 0) <= sizeof image);
  assert_int_equal(sfa_cache_page_bytes(f.cache, LAYERS), 0);
  assert_int_equal(sfa_cache_page_bytes(NULL, 0), 0);
  assert_int_equal(sfa_cache_page_save(f.cache, 0, 0, 1, image), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_page_save(f.cache, 0, 0, -1, image), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_page_save(f.cache, 0, LAYERS, 0, image), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_page_save(f.cache, 3, 0, 0, image), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_page_save(f.cache, 0, 0, 0, NULL), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_page_save(NULL, 0, 0, 0, image), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_page_save(f.cache, 0, 0, 0, image), SFA_OK);
  assert_int_equal(sfa_cache_map(f.cache, 0, 0, 100, whole), SFA_ERROR_ARGUMENT); /* not empty */
  assert_int_equal(sfa_cache_map(f.cache, 1, 0, 100, crooked), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_map(f.cache, 1, 0, 100, absent), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_map(f.cache, 1, 0, 100, NULL), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_map(f.cache, 1, 0, -1, whole), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_map(f.cache, 1, 0, (int64_t)INT32_MAX + 1, whole), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_map(f.cache, 1, LAYERS, 100, whole), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_map(f.cache, 3, 0, 100, whole), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_map(NULL, 1, 0, 100, whole), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_len(f.cache, 1, 0), 0);
  assert_int_equal(sfa_cache_map(f.cache, 1, 0, 0, NULL), SFA_OK);
  sfa_cache_destroy(NULL);
  free_fixture(&f);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(chunks),       cmocka_unit_test(company),   cmocka_unit_test(forks),
      cmocka_unit_test(truncation),   cmocka_unit_test(mapping),   cmocka_unit_test(sizes),
      cmocka_unit_test(range_errors), cmocka_unit_test(no_memory), cmocka_unit_test(wrong_arguments),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
