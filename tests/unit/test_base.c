/* The base layer: half conversions on every pattern, contexts and their options, injected memory, errors, parallel items, files. */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <setjmp.h>

#include <cmocka.h>

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/context.h"
#include "base/half.h"
#include "base/map.h"
#include "base/rng.h"

/* ---- Half precision ------------------------------------------------------------------------------------------------------------ */

/* A binary format of 1 sign, n_exponent and n_fraction bits, decoded by the definition, in double (every value of both is exact there). */
typedef struct half_format {
  int n_exponent, n_fraction;
  float (*widen)(uint16_t);
  uint16_t (*narrow)(float);
} half_format;

static const half_format half_formats[] = {{5, 10, sfa_f32_from_f16, sfa_f16_from_f32}, {8, 7, sfa_f32_from_bf16, sfa_bf16_from_f32}};

static double decode(const half_format *f, unsigned magnitude) { /* finite or infinite magnitudes; inf is what would follow the largest */
  int bias = (1 << (f->n_exponent - 1)) - 1, exponent = (int)(magnitude >> f->n_fraction);
  double fraction = ldexp((double)(magnitude & ((1u << f->n_fraction) - 1)), -f->n_fraction);
  return exponent ? ldexp(1 + fraction, exponent - bias) : ldexp(fraction, 1 - bias);
}

static unsigned infinity_of(const half_format *f) { return ((1u << f->n_exponent) - 1) << f->n_fraction; }

/* Round to nearest even by search: the pattern whose value is nearest, of two the one with an even last bit. */
static uint16_t round_by_search(const half_format *f, float x) {
  unsigned low = 0, high = infinity_of(f), sign = signbit(x) ? 0x8000u : 0;
  double magnitude = fabs((double)x);
  if (isinf(x))
    return (uint16_t)(sign | high);
  while (high - low > 1) { /* decode(low) <= magnitude < decode(high) or high = inf */
    unsigned middle = (low + high) / 2;
    if (decode(f, middle) <= magnitude)
      low = middle;
    else
      high = middle;
  }
  double below = magnitude - decode(f, low), above = decode(f, high) - magnitude;
  unsigned nearest = below < above || (below == above && low % 2 == 0) ? low : high;
  return (uint16_t)(sign | nearest);
}

static void widening_is_exact(void **state) {
  (void)state;
  for (size_t i = 0; i < 2; i++) {
    const half_format *f = &half_formats[i];
    for (unsigned h = 0; h < 65536; h++) {
      unsigned magnitude = h & 0x7fffu;
      float x = f->widen((uint16_t)h);
      assert_int_equal(signbit(x) != 0, h >> 15);
      if (magnitude > infinity_of(f)) {
        assert_true(isnan(x));
        uint16_t again = f->narrow(x);
        assert_true((again & 0x7fffu) > infinity_of(f));
      } else {
        assert_true(magnitude == infinity_of(f) ? isinf(x) : fabs((double)x) == decode(f, magnitude));
        assert_int_equal(f->narrow(x), h); /* there and back */
      }
    }
  }
}

static void check_narrow(const half_format *f, float x) {
  uint16_t got = f->narrow(x), want = round_by_search(f, x);
  if (got != want)
    fail_msg("%a gives %04x, nearest even is %04x", (double)x, got, want);
}

static void narrowing_rounds_to_nearest_even(void **state) {
  (void)state;
  sfa_rng rng = {1};
  for (size_t i = 0; i < 2; i++) {
    const half_format *f = &half_formats[i];
    for (unsigned h = 0; h < infinity_of(f); h++) { /* halfway between each pair of neighbours, and one step to both sides */
      float middle = (float)((decode(f, h) + decode(f, h + 1)) / 2);
      float around[] = {nextafterf(middle, 0), middle, nextafterf(middle, INFINITY)};
      for (size_t j = 0; j < 3; j++) {
        check_narrow(f, around[j]);
        check_narrow(f, -around[j]);
      }
    }
    for (int n = 0; n < 200000; n++) { /* every exponent */
      float x = sfa_float_of((uint32_t)sfa_rng_next(&rng));
      if (!isnan(x))
        check_narrow(f, x);
    }
    check_narrow(f, INFINITY);
    check_narrow(f, -0.0f);
  }
}

static void narrowing_keeps_nan(void **state) {
  (void)state;
  for (size_t i = 0; i < 2; i++)
    for (uint32_t bit = 0; bit < 23; bit++) /* also those whose payload is cut off */
      for (uint32_t sign = 0; sign < 2; sign++)
        assert_true((half_formats[i].narrow(sfa_float_of(sign << 31 | 0x7f800000u | 1u << bit)) & 0x7fffu) > infinity_of(&half_formats[i]));
}

/* ---- Contexts ------------------------------------------------------------------------------------------------------------------ */

typedef struct counting_memory {
  size_t live, calls, refuse_from; /* refuse_from: number of the first call that gets NULL; 0: none */
} counting_memory;

static void *counting_alloc(void *user, size_t bytes) {
  counting_memory *memory = user;
  if (memory->refuse_from && ++memory->calls >= memory->refuse_from)
    return NULL;
  memory->live++;
  return aligned_alloc(64, sfa_align64(bytes));
}

static void counting_free(void *user, void *block) {
  ((counting_memory *)user)->live--;
  free(block);
}

static void options_are_checked(void **state) {
  (void)state;
  sfa_context *ctx = (sfa_context *)&ctx;
  assert_int_equal(sfa_context_create(NULL, NULL), SFA_ERROR_ARGUMENT);
  struct {
    sfa_context_options options;
    sfa_status status;
  } cases[] = {
      {{.struct_size = 1}, SFA_ERROR_ARGUMENT},
      {{.struct_size = sizeof(sfa_context_options), .n_threads = -1}, SFA_ERROR_ARGUMENT},
      {{.struct_size = sizeof(sfa_context_options), .isa = (sfa_isa)99}, SFA_ERROR_UNSUPPORTED},
      {{.struct_size = sizeof(sfa_context_options), .isa = SFA_ISA_SCALAR, .n_threads = 3}, SFA_OK},
      {{.struct_size = sizeof(sfa_context_options)}, SFA_OK},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    assert_int_equal(sfa_context_create(&cases[i].options, &ctx), cases[i].status);
    assert_int_equal(ctx != NULL, cases[i].status == SFA_OK);
    if (ctx) {
      assert_int_equal(sfa_context_isa(ctx), cases[i].options.isa ? cases[i].options.isa : sfa_isa_best());
      assert_true(cases[i].options.n_threads ? sfa_context_threads(ctx) == cases[i].options.n_threads : sfa_context_threads(ctx) >= 1);
      assert_string_equal(sfa_context_error(ctx), "");
    }
    sfa_context_destroy(ctx);
  }
  assert_int_equal(sfa_context_create(NULL, &ctx), SFA_OK);
  sfa_context_destroy(ctx);
  sfa_context_destroy(NULL);
  assert_int_equal(sfa_context_threads(NULL), 0);
  assert_int_equal(sfa_context_isa(NULL), SFA_ISA_DEFAULT);
  assert_int_equal(sfa_context_device(NULL), SFA_DEVICE_CPU);
}

static void memory_is_the_callers(void **state) {
  (void)state;
  counting_memory memory = {0};
  sfa_allocator allocator = {counting_alloc, counting_free, &memory};
  sfa_context_options options = {.struct_size = sizeof options, .allocator = &allocator};
  sfa_context *ctx;
  assert_int_equal(sfa_context_create(&options, &ctx), SFA_OK);
  void *block, *zeros, *text;
  assert_int_equal(sfa_alloc(ctx, 0, "nothing", &block), SFA_OK);
  assert_non_null(block);
  assert_int_equal(sfa_alloc_zero(ctx, 100, 3, "zeros", &zeros), SFA_OK);
  for (int i = 0; i < 300; i++)
    assert_int_equal(((char *)zeros)[i], 0);
  assert_int_equal(sfa_strdup(ctx, "words", (char **)&text), SFA_OK);
  assert_string_equal(text, "words");
  assert_int_equal(memory.live, 4);
  sfa_free(ctx, block);
  sfa_free(ctx, zeros);
  sfa_free(ctx, text);
  sfa_free(ctx, NULL);
  assert_int_equal(memory.live, 1);

  memory.refuse_from = 1;
  assert_int_equal(sfa_alloc(ctx, 12345, "a test", &block), SFA_ERROR_MEMORY);
  assert_null(block);
  assert_non_null(strstr(sfa_context_error(ctx), "12345 bytes for a test"));
  block = &block;
  assert_int_equal(sfa_alloc_zero(ctx, SIZE_MAX / 2, 3, "too much", &block), SFA_ERROR_MEMORY);
  assert_null(block);
  sfa_context_destroy(ctx);
  assert_int_equal(memory.live, 0);

  assert_int_equal(sfa_context_create(&options, &ctx), SFA_ERROR_MEMORY);
  assert_null(ctx);
}

static void *crooked_alloc(void *user, size_t bytes) {
  char *memory = counting_alloc(user, bytes + 64);
  return memory ? memory + 16 : NULL;
}

static void crooked_free(void *user, void *block) { counting_free(user, (char *)block - 16); }

/* What is no allocator is told of, not called; memory that vectors cannot lie in is given back. */
static void allocators_are_checked(void **state) {
  (void)state;
  counting_memory memory = {0};
  char why[160];
  const sfa_allocator halves[] = {{counting_alloc, NULL, &memory}, {NULL, counting_free, &memory}};
  sfa_context *ctx;
  for (int i = 0; i < 2; i++) {
    sfa_context_options options = {.struct_size = sizeof options, .allocator = &halves[i], .why = why, .why_bytes = sizeof why};
    assert_int_equal(sfa_context_create(&options, &ctx), SFA_ERROR_ARGUMENT);
    assert_null(ctx);
    assert_non_null(strstr(why, "no alloc or no free"));
  }
  sfa_allocator crooked = {crooked_alloc, crooked_free, &memory};
  sfa_context_options options = {.struct_size = sizeof options, .allocator = &crooked};
  assert_int_equal(sfa_context_create(&options, &ctx), SFA_OK);
  void *block = &block;
  assert_int_equal(sfa_alloc(ctx, 100, "a block", &block), SFA_ERROR_ARGUMENT);
  assert_null(block);
  assert_non_null(strstr(sfa_context_error(ctx), "aligned to 64 bytes"));
  assert_int_equal(memory.live, 1);
  sfa_context_destroy(ctx);
  assert_int_equal(memory.live, 0);
}

static void default_memory_is_aligned(void **state) {
  (void)state;
  sfa_context *ctx;
  assert_int_equal(sfa_context_create(NULL, &ctx), SFA_OK);
  for (size_t bytes = 0; bytes < 200; bytes += 7) {
    void *block;
    assert_int_equal(sfa_alloc(ctx, bytes, "a block", &block), SFA_OK);
    assert_int_equal((uintptr_t)block % 64, 0);
    memset(block, 0xff, bytes);
    sfa_free(ctx, block);
  }
  void *block;
  assert_int_equal(sfa_alloc(ctx, SIZE_MAX - 5, "everything", &block), SFA_ERROR_MEMORY); /* rounding up must not wrap */
  sfa_context_destroy(ctx);
}

static void keep_line(void *user, const char *message) { snprintf(user, 600, "%s", message); }

static void texts_arrive(void **state) {
  (void)state;
  char line[600] = "", very_long[2000];
  sfa_context_options options = {.struct_size = sizeof options, .log = keep_line, .log_user = line};
  sfa_context *ctx;
  assert_int_equal(sfa_context_create(&options, &ctx), SFA_OK);
  sfa_log(ctx, "%d of %s", 3, "them");
  assert_string_equal(line, "3 of them");
  assert_int_equal(sfa_fail(ctx, SFA_ERROR_RANGE, "k = %d", 99), SFA_ERROR_RANGE);
  assert_string_equal(sfa_context_error(ctx), "k = 99");
  memset(very_long, 'x', sizeof very_long);
  very_long[sizeof very_long - 1] = 0;
  sfa_log(ctx, "%s", very_long);
  sfa_fail(ctx, SFA_ERROR_RANGE, "%s", very_long);
  assert_int_equal(strlen(line), 511);
  assert_int_equal(strlen(sfa_context_error(ctx)), 511);
  sfa_context_destroy(ctx);
  assert_string_equal(sfa_context_error(NULL), "");
}

static void names_exist(void **state) {
  (void)state;
  assert_string_equal(sfa_status_name(SFA_OK), "ok");
  assert_string_equal(sfa_status_name(SFA_ERROR_CANCELLED), "cancelled");
  assert_string_equal(sfa_status_name((sfa_status)1000), "unknown");
  assert_string_equal(sfa_isa_name(SFA_ISA_AVX512), "avx512");
  assert_string_equal(sfa_isa_name(SFA_ISA_AMX), "amx");
  assert_string_equal(sfa_isa_name((sfa_isa)1000), "unknown");
  size_t bytes[] = {[SFA_DTYPE_DEFAULT] = 0, [SFA_F32] = 4, [SFA_BF16] = 2, [SFA_F16] = 2, [SFA_I8] = 1, [SFA_I4] = 0, [SFA_E4M3] = 1};
  for (size_t i = 0; i < sizeof bytes / sizeof *bytes; i++)
    assert_int_equal(sfa_dtype_bytes((sfa_dtype)i), bytes[i]);
}

static void sizes_do_not_wrap(void **state) {
  (void)state;
  size_t out = 0;
  assert_true(sfa_mul_size(SIZE_MAX / 2, 2, &out) && out == SIZE_MAX - 1);
  assert_false(sfa_mul_size(SIZE_MAX / 2 + 1, 2, &out));
  assert_true(sfa_add_size(SIZE_MAX - 1, 1, &out) && out == SIZE_MAX);
  assert_false(sfa_add_size(SIZE_MAX, 1, &out));
  assert_int_equal(sfa_align64(0), 0);
  assert_int_equal(sfa_align64(1), 64);
  assert_int_equal(sfa_align64(64), 64);
}

/* ---- Parallel items ------------------------------------------------------------------------------------------------------------ */

enum { N_ITEMS = 1000, N_THREADS = 4 };

typedef struct item_log {
  const sfa_context *ctx;
  int seen[N_ITEMS]; /* each item writes its own */
  int32_t thread[N_ITEMS];
  int inner[N_ITEMS];
} item_log;

static void count_inner(void *arg, int64_t item, int32_t thread) {
  (void)item;
  assert_int_equal(thread, 0); /* nested work stays on the calling thread */
  ++*(int *)arg;
}

static void log_item(void *arg, int64_t item, int32_t thread) {
  item_log *log = arg;
  log->seen[item]++;
  log->thread[item] = thread;
  sfa_parallel(log->ctx, 3, count_inner, &log->inner[item]);
}

static void every_item_runs_once(void **state) {
  (void)state;
  for (int32_t n_threads = 1; n_threads <= N_THREADS; n_threads += N_THREADS - 1) {
    sfa_context_options options = {.struct_size = sizeof options, .n_threads = n_threads};
    sfa_context *ctx;
    assert_int_equal(sfa_context_create(&options, &ctx), SFA_OK);
    item_log log = {.ctx = ctx};
    sfa_parallel(ctx, 0, log_item, &log);
    assert_int_equal(log.seen[0], 0);
    sfa_parallel(ctx, N_ITEMS, log_item, &log);
    for (int i = 0; i < N_ITEMS; i++) {
      assert_int_equal(log.seen[i], 1);
      assert_in_range(log.thread[i], 0, n_threads - 1);
      assert_int_equal(log.inner[i], 3);
    }
    sfa_context_destroy(ctx);
  }
}

/* ---- Random numbers, files ----------------------------------------------------------------------------------------------------- */

static void random_numbers_are_those_of_the_seed(void **state) {
  (void)state;
  sfa_rng rng = {0}; /* splitmix64's published sequence from seed 0 */
  assert_true(sfa_rng_next(&rng) == 0xe220a8397b1dcdafull);
  assert_true(sfa_rng_next(&rng) == 0x6e789e6aa1b965f4ull);
  double sum = 0, squares = 0;
  enum { N = 100000 };
  for (int i = 0; i < N; i++) {
    double u = sfa_rng_uniform(&rng), x = sfa_rng_normal(&rng);
    assert_true(u >= 0 && u < 1);
    sum += x, squares += x * x;
  }
  assert_true(fabs(sum / N) < 0.02 && fabs(squares / N - 1) < 0.02);
}

static void files_are_mapped(void **state) {
  (void)state;
  sfa_context *ctx;
  assert_int_equal(sfa_context_create(NULL, &ctx), SFA_OK);
  char path[] = "/tmp/sfa_test_base_XXXXXX";
  int file = mkstemp(path);
  assert_true(file >= 0);
  sfa_map map;
  assert_int_equal(sfa_map_open(ctx, path, &map), SFA_OK); /* empty */
  assert_null(map.data);
  assert_int_equal(map.bytes, 0);
  sfa_map_close(&map);
  assert_int_equal(write(file, "content", 7), 7);
  assert_int_equal(sfa_map_open(ctx, path, &map), SFA_OK);
  assert_int_equal(map.bytes, 7);
  assert_memory_equal(map.data, "content", 7);
  sfa_map_close(&map);
  sfa_map_close(&map);
  close(file);
  unlink(path);
  assert_int_equal(sfa_map_open(ctx, path, &map), SFA_ERROR_IO);
  assert_non_null(strstr(sfa_context_error(ctx), path));
  assert_int_equal(sfa_map_open(ctx, "/", &map), SFA_ERROR_IO);
  assert_non_null(strstr(sfa_context_error(ctx), "regular file"));
  sfa_context_destroy(ctx);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(widening_is_exact),
      cmocka_unit_test(narrowing_rounds_to_nearest_even),
      cmocka_unit_test(narrowing_keeps_nan),
      cmocka_unit_test(options_are_checked),
      cmocka_unit_test(memory_is_the_callers),
      cmocka_unit_test(allocators_are_checked),
      cmocka_unit_test(default_memory_is_aligned),
      cmocka_unit_test(texts_arrive),
      cmocka_unit_test(names_exist),
      cmocka_unit_test(sizes_do_not_wrap),
      cmocka_unit_test(every_item_runs_once),
      cmocka_unit_test(random_numbers_are_those_of_the_seed),
      cmocka_unit_test(files_are_mapped),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
