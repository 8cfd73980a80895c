/* Pages in the caller's memory: what is refused, what a store touches. (That they give what arrays and caches give: test_composition.c.) */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <sfa/cache.h>

#include "unit_tools.h"

enum { G = 2, D = 16, E = 8, K = 4, N_PAGES = 3, SLOTS = N_PAGES * 64 };

static const sfa_page_options page = {
    .struct_size = sizeof page, .n_kv_heads = G, .head_dim = D, .head_dim_v = E, .k = K, .v_dtype = SFA_I4};

/* Bytes of a head: ids and int8 values [64][4], scales [64], int4 values [64][8], scales [64]. */
static void bytes(void **state) {
  (void)state;
  assert_int_equal(sfa_page_bytes(&page), 64 + G * (256 + 256 + 128 + 256 + 128));
  sfa_page_options dense = {.struct_size = sizeof dense, .n_kv_heads = 1, .head_dim = 8, .k = 8};
  assert_int_equal(sfa_page_bytes(&dense), 64 + 64 * 8 * 2 * 2);
  static const sfa_page_options wrong[] = {{.struct_size = 8, .n_kv_heads = 1, .head_dim = 8},
                                           {.struct_size = sizeof dense, .n_kv_heads = 0, .head_dim = 8},
                                           {.struct_size = sizeof dense, .n_kv_heads = 1, .head_dim = 12},
                                           {.struct_size = sizeof dense, .n_kv_heads = 1, .head_dim = 8, .k = 9},
                                           {.struct_size = sizeof dense, .n_kv_heads = 1, .head_dim = 8, .k_dtype = SFA_I4},
                                           {.struct_size = sizeof dense, .n_kv_heads = 1, .head_dim = 8, .v_dtype = (sfa_dtype)7}};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
    assert_int_equal(sfa_page_bytes(&wrong[i]), 0);
  assert_int_equal(sfa_page_bytes(NULL), 0);
}

typedef struct world {
  sfa_context *ctx;
  unsigned char *pool;
  float k[SLOTS * G * D], v[SLOTS * G * E], q[2 * G * D], out[2 * G * E];
  int64_t slots[SLOTS];
  int32_t table[2 * 2], seqlens[2];
  sfa_paged_kv kv;
  sfa_attention_args args;
} world;

static world *new_world(void) {
  world *w = calloc(1, sizeof *w);
  assert_non_null(w);
  w->ctx = new_context(2, SFA_ISA_DEFAULT);
  w->pool = aligned_alloc(64, N_PAGES * sfa_page_bytes(&page));
  assert_non_null(w->pool);
  memset(w->pool, 0xee, N_PAGES * sfa_page_bytes(&page));
  for (int i = 0; i < SLOTS * G * D; i++)
    w->k[i] = sinf((float)i);
  for (int i = 0; i < SLOTS * G * E; i++)
    w->v[i] = cosf((float)i);
  for (int i = 0; i < 2 * G * D; i++)
    w->q[i] = sinf((float)(3 * i));
  for (int i = 0; i < SLOTS; i++)
    w->slots[i] = i;
  memcpy(w->table, (int32_t[]){2, 0, 1, -1}, sizeof w->table);
  memcpy(w->seqlens, (int32_t[]){100, 64}, sizeof w->seqlens);
  w->kv = (sfa_paged_kv){.struct_size = sizeof w->kv,
                         .page = page,
                         .pool = w->pool,
                         .n_pages = N_PAGES,
                         .block_table = w->table,
                         .max_pages = 2,
                         .cache_seqlens = w->seqlens};
  w->args = (sfa_attention_args){.struct_size = sizeof w->args, .q.data = w->q, .out = w->out};
  return w;
}

static void free_world(world *w) {
  free(w->pool);
  sfa_context_destroy(w->ctx);
  free(w);
}

static sfa_status store(world *w, int64_t n) {
  sfa_rows k = {.data = w->k}, v = {.data = w->v};
  return sfa_pages_store(w->ctx, &page, w->pool, N_PAGES, n, w->slots, &k, &v);
}

static sfa_status attend(world *w) {
  sfa_attention_options o = {.struct_size = sizeof o,
                             .n_heads = G,
                             .head_dim = D,
                             .head_dim_v = E,
                             .n_sequences = 2,
                             .max_seqlen_q = 1,
                             .max_seqlen_k = 128,
                             .k_k = K};
  sfa_attention_plan *plan;
  assert_int_equal(sfa_attention_plan_create(w->ctx, &o, &plan), SFA_OK);
  w->args.workspace = aligned_alloc(64, (sfa_attention_workspace_bytes(plan) + 63) / 64 * 64);
  assert_non_null(w->args.workspace);
  sfa_status status = sfa_attention_run_paged(plan, &w->args, &w->kv);
  free(w->args.workspace);
  sfa_attention_plan_destroy(plan);
  return status;
}

/* Tokens one by one, in any order, some nowhere: the bytes of all at once; rows of others stay. */
static void order_does_not_matter(void **state) {
  (void)state;
  world *once = new_world(), *pieces = new_world();
  assert_int_equal(store(once, SLOTS - 5), SFA_OK);
  static float k[SLOTS * G * D], v[SLOTS * G * E];
  int64_t n = 0;
  for (int64_t i = 0; i < SLOTS; i++) {
    int64_t token = (i * 67 + 3) % SLOTS;
    memcpy(k + n * G * D, once->k + token * G * D, G * D * sizeof *k);
    memcpy(v + n * G * E, once->v + token * G * E, G * E * sizeof *v);
    pieces->slots[n++] = token < SLOTS - 5 ? token : -1;
  }
  memcpy(pieces->k, k, sizeof k);
  memcpy(pieces->v, v, sizeof v);
  assert_int_equal(store(pieces, n), SFA_OK);
  assert_memory_equal(once->pool, pieces->pool, N_PAGES * sfa_page_bytes(&page));
  assert_int_equal(once->pool[2 * sfa_page_bytes(&page) + 64 + 63 * K], 0xee); /* the last row's ids */
  free_world(once);
  free_world(pieces);
}

/* Tokens that go nowhere take no neighbour with them: slots .., -1, 0, .. count up as those of a run do. */
static void nowhere_before_slot_0(void **state) {
  (void)state;
  for (int n_before = 1; n_before <= 3; n_before += 2) {
    world *plain = new_world(), *after = new_world();
    assert_int_equal(store(plain, 64), SFA_OK);
    for (int i = 0; i < n_before + 64; i++) {
      int token = i < n_before ? 100 : i - n_before;
      after->slots[i] = i - n_before;
      memcpy(after->k + i * G * D, plain->k + token * G * D, G * D * sizeof *plain->k);
      memcpy(after->v + i * G * E, plain->v + token * G * E, G * E * sizeof *plain->v);
    }
    for (int n = n_before + 1; n <= n_before + 64; n += 63) { /* slot 0 alone, then its page */
      assert_int_equal(store(after, n), SFA_OK);
      assert_memory_equal(plain->pool + 64, after->pool + 64, K); /* ids of token 0 */
    }
    assert_memory_equal(plain->pool, after->pool, N_PAGES * sfa_page_bytes(&page));
    free_world(plain);
    free_world(after);
  }
}

/* A sequence is its tokens in the order of the table, not of the pool. */
static void table_is_followed(void **state) {
  (void)state;
  world *w = new_world(), *moved = new_world();
  assert_int_equal(store(w, SLOTS), SFA_OK);
  assert_int_equal(attend(w), SFA_OK);
  for (int i = 0; i < SLOTS; i++)
    moved->slots[i] = (i + 64) % SLOTS;
  memcpy(moved->table, (int32_t[]){0, 1, 2, 99}, sizeof moved->table);
  assert_int_equal(store(moved, SLOTS), SFA_OK);
  assert_int_equal(attend(moved), SFA_OK);
  assert_memory_equal(w->out, moved->out, sizeof w->out);
  free_world(w);
  free_world(moved);
}

#define EXPECT(world, status, text)                                                                                                        \
  do {                                                                                                                                     \
    assert_int_equal(status, SFA_ERROR_ARGUMENT);                                                                                          \
    if (!strstr(sfa_context_error((world)->ctx), text))                                                                                    \
      fail_msg("\"%s\" does not say \"%s\"", sfa_context_error((world)->ctx), text);                                                       \
  } while (0)

static void refused(void **state) {
  (void)state;
  world *w = new_world();
  assert_int_equal(store(w, SLOTS), SFA_OK);
  w->slots[7] = SLOTS;
  EXPECT(w, store(w, 8), "slots[7] is 192");
  w->k[5] = 1e6f;
  w->slots[7] = 7;
  assert_int_equal(store(w, 1), SFA_ERROR_RANGE);
  sfa_rows rows = {.data = w->k};
  EXPECT(w, sfa_pages_store(w->ctx, &page, w->pool + 8, N_PAGES, 1, w->slots, &rows, &rows), "not aligned to 64");
  EXPECT(w, sfa_pages_store(w->ctx, &page, w->pool, N_PAGES, 1, NULL, &rows, &rows), "slots, k or v is NULL");
  EXPECT(w, sfa_pages_store(w->ctx, &page, w->pool, N_PAGES, 1, (const int64_t *)(const void *)((const char *)w->slots + 4), &rows, &rows),
         "slots is not aligned");
  EXPECT(w, sfa_pages_store(w->ctx, NULL, w->pool, N_PAGES, 1, w->slots, &rows, &rows), "options are NULL");
  assert_int_equal(sfa_pages_store(NULL, &page, w->pool, N_PAGES, 1, w->slots, &rows, &rows), SFA_ERROR_ARGUMENT);
  w->table[1] = 3;
  EXPECT(w, attend(w), "block_table[0][1] is 3");
  w->table[1] = -1;
  EXPECT(w, attend(w), "block_table[0][1] is -1");
  w->table[1] = 0;
  w->seqlens[1] = 129;
  EXPECT(w, attend(w), "cache_seqlens[1] is 129");
  w->seqlens[1] = -1;
  EXPECT(w, attend(w), "cache_seqlens[1] is -1");
  w->seqlens[1] = 0;
  assert_int_equal(attend(w), SFA_OK);
  w->kv.page.k = 5;
  EXPECT(w, attend(w), "k 5");
  w->kv.page.k = K;
  w->kv.struct_size = 4;
  EXPECT(w, attend(w), "kv.struct_size is 4");
  w->kv.struct_size = sizeof w->kv;
  w->kv.max_pages = INT64_MAX; /* no place in the table has an address */
  EXPECT(w, attend(w), "max_pages is 9223372036854775807");
  w->kv.max_pages = 2;
  w->kv.block_table = (const int32_t *)(const void *)((const char *)w->table + 1);
  EXPECT(w, attend(w), "block_table is not aligned");
  w->kv.cache_seqlens = NULL;
  EXPECT(w, attend(w), "cache_seqlens or block_table is NULL");
  assert_int_equal(sfa_attention_run_paged(NULL, &w->args, &w->kv), SFA_ERROR_ARGUMENT);
  free_world(w);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(bytes), cmocka_unit_test(order_does_not_matter),
                                     cmocka_unit_test(nowhere_before_slot_0), cmocka_unit_test(table_is_followed),
                                     cmocka_unit_test(refused)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
