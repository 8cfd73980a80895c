/* Devices, memory and streams without a GPU: what a context on the CPU makes of them, and what is said where there is no CUDA. */
#include <sfa/sfa.h>

#include "unit_tools.h"

/* ---- No GPU ----------------------------------------------------------------------------------------------------------------------- */

static sfa_status cuda_context(int32_t index, char why[512]) {
  sfa_context_options o = {.struct_size = sizeof o, .device = SFA_DEVICE_CUDA, .device_index = index, .why = why, .why_bytes = 512};
  sfa_context *ctx = (sfa_context *)&o;
  *why = 0;
  sfa_status status = sfa_context_create(&o, &ctx);
  if (status == SFA_OK) {
    assert_int_equal(sfa_context_device(ctx), SFA_DEVICE_CUDA);
    sfa_context_destroy(ctx);
  } else {
    assert_null(ctx);
    assert_true(strlen(why) > 20);
  }
  return status;
}

static void missing_library(void **state) {
  (void)state;
  char why[512];
  setenv("SFA_CUDA_LIBRARY", "/nowhere/none.so", 1);
  assert_int_equal(cuda_context(0, why), SFA_ERROR_UNSUPPORTED);
  assert_non_null(strstr(why, "/nowhere/none.so"));
  assert_non_null(strstr(why, "SFA_CUDA=ON"));
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  int32_t n = 7;
  assert_int_equal(sfa_device_list(ctx, 0, NULL, &n), SFA_ERROR_UNSUPPORTED);
  assert_int_equal(n, 0);
  assert_string_equal(sfa_context_error(ctx), why);
  sfa_context_destroy(ctx);
  unsetenv("SFA_CUDA_LIBRARY");
}

/* A shared object that is none of ours. */
static void strange_library(void **state) {
  (void)state;
  char why[512];
  setenv("SFA_CUDA_LIBRARY", "libm.so.6", 1);
  assert_int_equal(cuda_context(0, why), SFA_ERROR_UNSUPPORTED);
  assert_non_null(strstr(why, "sfa_backend_cuda_open"));
  unsetenv("SFA_CUDA_LIBRARY");
}

/* With whatever is found: a context, or a text; and never one on a GPU that is not there. */
static void found_or_told(void **state) {
  (void)state;
  char why[512];
  sfa_device_info devices[4];
  int32_t n = -1;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_status status = sfa_device_list(ctx, 4, devices, &n);
  assert_true(status == SFA_OK ? n > 0 : n == 0 && (status == SFA_ERROR_UNSUPPORTED || status == SFA_ERROR_DEVICE));
  for (int32_t i = 0; i < n && i < 4; i++) {
    assert_int_equal(devices[i].index, i);
    assert_int_equal(devices[i].is_usable, devices[i].why[0] == 0);
    assert_int_equal(cuda_context(i, why) == SFA_OK, devices[i].is_usable);
  }
  assert_int_not_equal(cuda_context(1000, why), SFA_OK);
  sfa_context_destroy(ctx);
}

static void wrong_options(void **state) {
  (void)state;
  char why[64] = "";
  sfa_context_options good = {.struct_size = sizeof good, .why = why, .why_bytes = sizeof why};
  const struct {
    sfa_context_options o;
    const char *text;
  } cases[] = {{{.device = (sfa_device_kind)2}, "device is 2"},
               {{.device_index = -1}, "device_index is -1"},
               {{.n_threads = -1}, "n_threads is -1"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    sfa_context_options o = cases[i].o;
    sfa_context *ctx = (sfa_context *)&o;
    o.struct_size = good.struct_size;
    o.why = why;
    o.why_bytes = sizeof why;
    assert_int_equal(sfa_context_create(&o, &ctx), SFA_ERROR_ARGUMENT);
    assert_null(ctx);
    assert_non_null(strstr(why, cases[i].text));
    assert_true(strlen(why) < sizeof why);
  }
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  int32_t n;
  sfa_device_info device;
  assert_int_equal(sfa_device_list(NULL, 1, &device, &n), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_device_list(ctx, 1, NULL, &n), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_device_list(ctx, -1, &device, &n), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_device_list(ctx, 1, &device, NULL), SFA_ERROR_ARGUMENT);
  sfa_context_destroy(ctx);
}

/* ---- On the CPU ------------------------------------------------------------------------------------------------------------------- */

static void memory_on_the_cpu(void **state) {
  (void)state;
  memory_account account = {0};
  sfa_context *ctx = new_counted_context(1, &account);
  unsigned char *a = NULL, *b = NULL;
  assert_int_equal(sfa_context_device(ctx), SFA_DEVICE_CPU);
  assert_int_equal(sfa_memory_alloc(ctx, 100, (void **)&a), SFA_OK);
  assert_int_equal(sfa_memory_alloc(ctx, 0, (void **)&b), SFA_OK);
  assert_true(a && b && (uintptr_t)a % 64 == 0);
  memset(a, 7, 100);
  assert_int_equal(sfa_memory_zero(ctx, a + 10, 20), SFA_OK);
  assert_true(a[9] == 7 && a[10] == 0 && a[29] == 0 && a[30] == 7);
  assert_int_equal(sfa_memory_copy(ctx, a, a + 50, 10), SFA_OK);
  assert_int_equal(a[5], 7);
  assert_int_equal(sfa_memory_copy(ctx, NULL, NULL, 0), SFA_OK);
  assert_int_equal(sfa_memory_zero(ctx, NULL, 0), SFA_OK);
  assert_int_equal(sfa_stream_set(ctx, a), SFA_OK);
  assert_null(sfa_stream_of(ctx));
  assert_int_equal(sfa_stream_wait(ctx), SFA_OK);
  sfa_memory_free(ctx, a);
  sfa_memory_free(ctx, b);
  sfa_memory_free(ctx, NULL);
  account.refuse = account.calls + 1;
  a = (unsigned char *)&account;
  assert_int_equal(sfa_memory_alloc(ctx, 64, (void **)&a), SFA_ERROR_MEMORY);
  assert_null(a);
  assert_int_equal(sfa_memory_alloc(ctx, 64, NULL), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_memory_copy(ctx, NULL, &account, 1), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_memory_copy(ctx, &account, NULL, 1), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_memory_zero(ctx, NULL, 1), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_memory_alloc(NULL, 1, (void **)&a), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_memory_copy(NULL, a, a, 1), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_memory_zero(NULL, a, 1), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_stream_set(NULL, NULL), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_stream_wait(NULL), SFA_ERROR_ARGUMENT);
  assert_null(sfa_stream_of(NULL));
  sfa_memory_free(NULL, NULL);
  sfa_context_destroy(ctx);
  assert_int_equal(account.out, 0);
}

/* Reserved pages are used by appends before any are taken, and go with truncation. */
static void reserved_pages(void **state) {
  (void)state;
  enum { G = 2, D = 16, TOKENS = 150 };
  memory_account account = {0};
  sfa_context *ctx = new_counted_context(1, &account);
  sfa_cache_options o = {.struct_size = sizeof o, .n_layers = 2, .n_kv_heads = G, .head_dim = D, .n_sequences = 2};
  sfa_cache *cache;
  assert_int_equal(sfa_cache_create(ctx, &o, &cache), SFA_OK);
  float *x = normals(1, TOKENS * G * D);
  sfa_rows rows = {.data = x};
  assert_int_equal(sfa_cache_append(cache, 0, 0, 10, &rows, &rows), SFA_OK);
  assert_int_equal(sfa_cache_reserve(cache, 0, TOKENS), SFA_OK);
  assert_int_equal(sfa_cache_bytes(cache), 3 * (sfa_cache_page_bytes(cache, 0) + sfa_cache_page_bytes(cache, 1)));
  int64_t calls = account.calls;
  rows.data = x + 10 * G * D;
  assert_int_equal(sfa_cache_append(cache, 0, 0, TOKENS - 10, &rows, &rows), SFA_OK);
  assert_int_equal(account.calls, calls);
  assert_int_equal(sfa_cache_len(cache, 0, 0), TOKENS);
  assert_int_equal(sfa_cache_len(cache, 0, 1), 0);
  /* A page that another sequence shares becomes its own when it is reserved. */
  assert_int_equal(sfa_cache_fork(cache, 0, 1, 0), SFA_OK);
  rows.data = x;
  assert_int_equal(sfa_cache_append(cache, 0, 1, TOKENS, &rows, &rows), SFA_OK);
  assert_int_equal(sfa_cache_fork(cache, 0, 1, 100), SFA_OK);
  size_t shared = sfa_cache_bytes(cache);
  assert_int_equal(sfa_cache_reserve(cache, 1, 101), SFA_OK);
  assert_int_equal(sfa_cache_bytes(cache), shared + sfa_cache_page_bytes(cache, 0) + sfa_cache_page_bytes(cache, 1));
  assert_int_equal(sfa_cache_truncate(cache, 1, 0), SFA_OK);
  assert_int_equal(sfa_cache_truncate(cache, 0, 0), SFA_OK);
  assert_int_equal(sfa_cache_bytes(cache), 0);
  assert_int_equal(sfa_cache_advance(cache, 0, 1), SFA_ERROR_UNSUPPORTED);
  assert_int_equal(sfa_cache_moves(cache), 0);
  assert_int_equal(sfa_cache_moves(NULL), -1);
  assert_int_equal(sfa_cache_reserve(cache, 2, 1), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_reserve(cache, 0, -1), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_reserve(NULL, 0, 1), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_cache_advance(NULL, 0, 1), SFA_ERROR_ARGUMENT);
  account.refuse = account.calls + 1;
  assert_int_equal(sfa_cache_reserve(cache, 0, 100000), SFA_ERROR_MEMORY);
  sfa_cache_destroy(cache);
  sfa_context_destroy(ctx);
  assert_int_equal(account.out, 0);
  free(x);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(missing_library), cmocka_unit_test(strange_library),   cmocka_unit_test(found_or_told),
      cmocka_unit_test(wrong_options),   cmocka_unit_test(memory_on_the_cpu), cmocka_unit_test(reserved_pages),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
