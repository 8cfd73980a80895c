/* Mapped pages whose ids are those of no feature: every way over them ends, with whatever scores, and touches nothing that is not its own.
 * Workspaces end where memory ends; run with an address sanitizer, this sees the rest. */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <sfa/cache.h>
#include <sfa/postings.h>

#include "unit_tools.h"

enum { G = 2, H = 4, E = 16, T = 3, MOST_PAGES = 70 };
#define BARRIER ((size_t)1 << 20)

/* Memory of which the last byte is the last one before a megabyte that nobody can touch. */
typedef struct fenced {
  unsigned char *base, *memory;
  size_t bytes;
} fenced;

static fenced new_fenced(size_t bytes) {
  fenced f = {.bytes = (bytes + 4095) / 4096 * 4096 + BARRIER};
  f.base = mmap(NULL, f.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  assert_true(f.base != MAP_FAILED);
  assert_int_equal(mprotect(f.base + f.bytes - BARRIER, BARRIER, PROT_NONE), 0);
  f.memory = f.base + f.bytes - BARRIER - (bytes + 63) / 64 * 64;
  return f;
}

/* A cache of one layer with two slots: 0 of len tokens, 1 mapped from its pages with all ids as large as they can be. */
typedef struct fixture {
  int32_t D, K;
  int64_t len;
  sfa_dtype dtype;
  sfa_context *ctx;
  sfa_cache *cache;
  fenced images;
  float *q; /* [T][H][D] */
} fixture;

static fixture new_fixture(sfa_isa isa, int32_t D, int32_t K, sfa_dtype dtype, int64_t len) {
  fixture f = {.D = D, .K = K, .len = len, .dtype = dtype, .q = normals(1, (int64_t)T * H * D)};
  sfa_context_options context = {.struct_size = sizeof context, .n_threads = 2, .isa = isa};
  assert_int_equal(sfa_context_create(&context, &f.ctx), SFA_OK);
  sfa_cache_options options = {.struct_size = sizeof options,
                               .n_layers = 1,
                               .n_kv_heads = G,
                               .head_dim = D,
                               .head_dim_v = E,
                               .k = &K,
                               .k_dtype = dtype,
                               .n_sequences = 2};
  assert_int_equal(sfa_cache_create(f.ctx, &options, &f.cache), SFA_OK);
  float *k = normals(2, len * G * D), *v = normals(3, len * G * E);
  assert_int_equal(sfa_cache_append(f.cache, 0, 0, len, &(sfa_rows){.data = k}, &(sfa_rows){.data = v}), SFA_OK);
  free(k);
  free(v);
  size_t page_bytes = sfa_cache_page_bytes(f.cache, 0), head_bytes = (page_bytes - 64) / G, id_bytes = D <= 256 ? 1 : 2;
  int64_t n_pages = (len + 63) / 64;
  f.images = new_fenced((size_t)n_pages * page_bytes);
  const void *pages[MOST_PAGES];
  for (int64_t p = 0; p < n_pages; p++) {
    unsigned char *page = f.images.memory + (size_t)p * page_bytes;
    assert_int_equal(sfa_cache_page_save(f.cache, 0, 0, p, page), SFA_OK);
    for (size_t g = 0; g < G; g++) /* docs/LAYOUTS.md */
      memset(page + 64 + g * head_bytes, 0xff, 64 * (size_t)K * id_bytes);
    pages[p] = page;
  }
  assert_int_equal(sfa_cache_map(f.cache, 1, 0, len, pages), SFA_OK);
  return f;
}

static void free_fixture(fixture *f) {
  sfa_cache_destroy(f->cache);
  sfa_context_destroy(f->ctx);
  munmap(f->images.base, f->images.bytes);
  free(f->q);
}

/* T queries over the damaged slot. Returns 0 where the policy is not for this shape. */
static int attend(const fixture *f, sfa_policy policy, int32_t k_q, const sfa_postings *postings) {
  sfa_attention_options o = {.struct_size = sizeof o,
                             .n_heads = H,
                             .n_kv_heads = G,
                             .head_dim = f->D,
                             .head_dim_v = E,
                             .max_seqlen_q = T,
                             .max_seqlen_k = f->len,
                             .k_q = k_q,
                             .k_k = f->K,
                             .k_dtype = f->dtype,
                             .v_dtype = SFA_BF16,
                             .from_cache = 1,
                             .causal = 1,
                             .policy = policy};
  sfa_attention_plan *plan;
  if (sfa_attention_plan_create(f->ctx, &o, &plan) != SFA_OK)
    return 0;
  fenced workspace = new_fenced(sfa_attention_workspace_bytes(plan));
  float *out = malloc((size_t)T * H * E * sizeof *out);
  sfa_attention_args args = {.struct_size = sizeof args, .q.data = f->q, .out = out, .postings = &postings, .workspace = workspace.memory};
  if (sfa_attention_run_cached(plan, &args, f->cache, 0, &(int32_t){1}) != SFA_OK)
    fail_msg("%s", sfa_context_error(f->ctx));
  free(out);
  munmap(workspace.base, workspace.bytes);
  sfa_attention_plan_destroy(plan);
  return 1;
}

/* All keys of the damaged slot for one query, as explanations ask, and the codes themselves. */
static void look(const fixture *f, const sfa_postings *postings) {
  sfa_codes codes;
  void *memory = aligned_alloc(64, (sfa_codes_bytes(1, f->D, f->K, SFA_F32) + 63) / 64 * 64);
  assert_int_equal(sfa_codes_place(f->ctx, 1, f->D, f->K, SFA_F32, memory, &codes), SFA_OK);
  assert_int_equal(sfa_codes_select(f->ctx, f->q, SFA_F32, f->D, &codes), SFA_OK);
  for (int32_t g = 0; g < G; g++) {
    sfa_search search = {.struct_size = sizeof search, .sequence = 1, .kv_head = g, .query = &codes, .postings = postings};
    sfa_hit hits[5];
    int64_t n_hits;
    assert_int_equal(sfa_cache_search(f->cache, &search, 5, hits, &n_hits), SFA_OK);
    assert_int_equal(n_hits, 5);
    for (int i = 0; i < 5; i++)
      assert_in_range(hits[i].key, 0, f->len - 1);
    unsigned char *ids = malloc((size_t)f->len * (size_t)f->K * 2);
    float *values = malloc((size_t)f->len * (size_t)f->K * sizeof *values);
    assert_int_equal(sfa_cache_read_keys(f->cache, 1, 0, g, 0, f->len, ids, values), SFA_OK);
    for (size_t i = 0; i < (size_t)f->len * (size_t)f->K * (f->D <= 256 ? 1 : 2); i++)
      assert_int_equal(ids[i], 0xff); /* the damage is where it was meant to be */
    free(ids);
    free(values);
  }
  free(memory);
}

static void every_way(void **state) {
  (void)state;
  static const int32_t shapes[][2] = {{8, 4}, {64, 8}, {512, 16}, {256, 16}, {64, 16}, {64, 7}, {128, 40}, {512, 33}}; /* D, K */
  static const sfa_dtype dtypes[] = {SFA_I8, SFA_BF16, SFA_F32};
  int n_runs[SFA_POLICY_POSTINGS + 1] = {0};
  for (sfa_isa isa = SFA_ISA_SCALAR; isa <= sfa_isa_best(); isa++)
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
      for (size_t t = 0; t < sizeof dtypes / sizeof *dtypes; t++) {
        bool indexed = dtypes[t] == SFA_I8 && s < 3; /* by blocks of 4096 keys */
        fixture f = new_fixture(isa, shapes[s][0], shapes[s][1], dtypes[t], (indexed ? 4096 : 0) + 70);
        sfa_postings *postings = NULL;
        if (indexed) {
          assert_int_equal(sfa_postings_create(f.cache, 0, &postings), SFA_OK);
          assert_int_equal(sfa_postings_update(postings, 1), SFA_OK);
          assert_int_equal(sfa_postings_len(postings), 4096);
          look(&f, postings);
        }
        look(&f, NULL);
        for (int policy = SFA_POLICY_AUTO; policy <= SFA_POLICY_POSTINGS; policy++)
          for (int dense_q = 0; dense_q < 2; dense_q++)
            n_runs[policy] += attend(&f, (sfa_policy)policy, dense_q ? 0 : f.K, policy == SFA_POLICY_POSTINGS ? postings : NULL);
        sfa_postings_destroy(postings);
        free_fixture(&f);
      }
  for (int policy = SFA_POLICY_AUTO; policy <= SFA_POLICY_POSTINGS; policy++)
    assert_true(n_runs[policy] > 0);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(every_way)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
