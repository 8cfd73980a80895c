/* The sampler against a naive one that sorts, in what it keeps and how often it draws it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <sfa/engine.h>

#include "base/rng.h"

static sfa_context *ctx;

static int group_setup(void **state) {
  (void)state;
  return sfa_context_create(NULL, &ctx) == SFA_OK ? 0 : 1;
}

static int group_teardown(void **state) {
  (void)state;
  sfa_context_destroy(ctx);
  return 0;
}

static sfa_sampler *make_sampler(sfa_sampler_options options, int32_t vocab_size) {
  sfa_sampler *s;
  options.struct_size = sizeof options;
  if (sfa_sampler_create(ctx, &options, vocab_size, &s) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  return s;
}

/* One draw of a new sampler. */
static int32_t draw_once(sfa_sampler_options options, float *logits, int32_t vocab_size) {
  sfa_sampler *s = make_sampler(options, vocab_size);
  int32_t id = sfa_sampler_next(s, logits);
  sfa_sampler_destroy(s);
  return id;
}

static void greedy(void **state) {
  (void)state;
  sfa_sampler_options o = {0};
  assert_int_equal(draw_once(o, (float[]){1, 3, 3, -2}, 4), 1); /* ties: the lower id */
  assert_int_equal(draw_once(o, (float[]){-5, -INFINITY, -4, NAN}, 4), 2);
  assert_int_equal(draw_once(o, (float[]){NAN, 1, INFINITY, INFINITY}, 4), 2);
  assert_int_equal(draw_once(o, (float[]){NAN, NAN}, 2), 0);
  assert_int_equal(draw_once(o, (float[]){-INFINITY, -INFINITY}, 2), 0);
  o = (sfa_sampler_options){.temperature = 2, .top_k = 1};
  assert_int_equal(draw_once(o, (float[]){1, 3, 3, -2}, 4), 1);
  o = (sfa_sampler_options){.temperature = 2, .top_p = 1e-9f};
  assert_int_equal(draw_once(o, (float[]){1, 3, 3, -2}, 4), 1);
  o = (sfa_sampler_options){.temperature = 1};
  for (uint64_t seed = 0; seed < 50; seed++) {
    o.seed = seed;
    assert_int_equal(draw_once(o, (float[]){NAN, -INFINITY, -1000, NAN}, 4), 2); /* nothing else is possible */
    assert_int_equal(draw_once(o, (float[]){NAN, NAN}, 2), 0);
    int32_t id = draw_once(o, (float[]){0, INFINITY, 50, INFINITY}, 4);
    assert_true(id == 1 || id == 3);
  }
}

/* ---- The naive sampler: probabilities of every token --------------------------------------------------------------------------------- */

enum { VOCAB = 50 };
static const float *sort_key;

static int by_logit(const void *a, const void *b) {
  int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
  if (sort_key[x] != sort_key[y])
    return sort_key[x] > sort_key[y] ? -1 : 1;
  return x < y ? -1 : 1;
}

static void naive(const sfa_sampler_options *o, const float *logits, double *p) {
  int32_t order[VOCAB], n = VOCAB;
  for (int32_t i = 0; i < VOCAB; i++) {
    order[i] = i;
    p[i] = 0;
  }
  sort_key = logits;
  qsort(order, VOCAB, sizeof *order, by_logit);
  if (o->top_k > 0 && o->top_k < n)
    n = o->top_k;
  double best = (double)logits[order[0]], total = 0, sum = 0;
  for (int32_t i = 0; i < n; i++)
    total += exp((double)logits[order[i]] - best);
  if (o->top_p > 0 && o->top_p < 1)
    for (int32_t i = 0; i < n; i++) {
      sum += exp((double)logits[order[i]] - best) / total;
      if (sum >= (double)o->top_p)
        n = i + 1;
    }
  while (n > 1 && exp((double)logits[order[n - 1]] - best) < (double)o->min_p)
    n--;
  total = 0;
  for (int32_t i = 0; i < n; i++)
    total += p[order[i]] = exp(((double)logits[order[i]] - best) / (double)o->temperature);
  for (int32_t i = 0; i < VOCAB; i++)
    p[i] /= total;
}

static void frequencies(void **state) {
  (void)state;
  static const sfa_sampler_options options[] = {
      {.temperature = 1},
      {.temperature = 0.7f, .top_k = 8},
      {.temperature = 1.3f, .top_p = 0.8f},
      {.temperature = 1, .min_p = 0.1f},
      {.temperature = 0.8f, .top_k = 20, .top_p = 0.9f, .min_p = 0.02f},
      {.temperature = 5, .top_k = 3, .top_p = 0.5f},
      {.temperature = 1, .top_k = 1000, .top_p = 1},
  };
  enum { DRAWS = 20000 };
  sfa_rng rng = {7};
  for (size_t k = 0; k < sizeof options / sizeof *options; k++) {
    float logits[VOCAB], copy[VOCAB];
    for (int i = 0; i < VOCAB; i++)
      logits[i] = (float)(1.5 * sfa_rng_normal(&rng));
    logits[5] = logits[30]; /* a tie */
    double p[VOCAB];
    naive(&options[k], logits, p);
    int64_t count[VOCAB] = {0};
    sfa_sampler *s = make_sampler(options[k], VOCAB);
    for (int i = 0; i < DRAWS; i++) {
      memcpy(copy, logits, sizeof copy);
      count[sfa_sampler_next(s, copy)]++;
    }
    sfa_sampler_destroy(s);
    for (int i = 0; i < VOCAB; i++) {
      double sigma = sqrt(DRAWS * p[i] * (1 - p[i])), off = fabs((double)count[i] - DRAWS * p[i]);
      if (p[i] == 0 ? count[i] != 0 : !(off <= 5 * sigma + 1))
        fail_msg("options %zu, token %d: drawn %lld times of %d, its probability is %g", k, i, (long long)count[i], DRAWS, p[i]);
    }
  }
}

static void seeds(void **state) {
  (void)state;
  enum { LEN = 200 };
  int32_t drawn[3][LEN];
  for (int k = 0; k < 3; k++) {
    sfa_sampler *s = make_sampler((sfa_sampler_options){.temperature = 1, .top_p = 0.95f, .seed = k == 2 ? 43 : 42}, VOCAB);
    for (int i = 0; i < LEN; i++) {
      float logits[VOCAB];
      for (int j = 0; j < VOCAB; j++)
        logits[j] = (float)((i * 7 + j * 13) % 5);
      drawn[k][i] = sfa_sampler_next(s, logits);
    }
    sfa_sampler_destroy(s);
  }
  assert_memory_equal(drawn[0], drawn[1], sizeof drawn[0]);
  assert_memory_not_equal(drawn[0], drawn[2], sizeof drawn[0]);
}

static void repetitions(void **state) {
  (void)state;
  sfa_sampler *s = make_sampler((sfa_sampler_options){.repetition_penalty = 2, .repetition_last = 3}, 6);
  sfa_sampler_accept(s, 0);
  sfa_sampler_accept(s, 1);
  sfa_sampler_accept(s, 1);
  sfa_sampler_accept(s, -1); /* outside: not counted */
  sfa_sampler_accept(s, 6);
  float logits[] = {4, -4, 3, 1, 1, 1};
  assert_int_equal(sfa_sampler_next(s, logits), 2);
  assert_true(logits[0] == 2 && logits[1] == -8 && logits[2] == 3); /* once, however often it came */
  float again[] = {4, -4, 3, 1, 1, 1};
  assert_int_equal(sfa_sampler_next(s, again), 0); /* 0 has left the window (1, 1, 2) */
  assert_true(again[0] == 4 && again[1] == -8 && again[2] == 1.5f);
  float third[] = {4, -4, 3, 1, 1, 1}; /* the window is 1, 2, 0 */
  sfa_sampler_next(s, third);
  assert_true(third[0] == 2 && third[1] == -8 && third[2] == 1.5f);
  sfa_sampler_destroy(s);
}

static void large_vocabulary(void **state) {
  (void)state;
  enum { N = 262144 };
  float *logits = malloc(N * sizeof *logits);
  static const sfa_sampler_options options[] = {{.temperature = 1},
                                                {.temperature = 1, .top_k = 40},
                                                {.temperature = 1, .top_p = 0.9f},
                                                {.temperature = 1, .top_p = 0.9f, .top_k = N}};
  for (size_t k = 0; k < sizeof options / sizeof *options; k++) {
    sfa_sampler *s = make_sampler(options[k], N);
    for (int i = 0; i < N; i++)
      logits[i] = (float)(i % 1000) / 1000; /* almost flat: top-p keeps most of it */
    int32_t id = sfa_sampler_next(s, logits);
    assert_in_range(id, 0, N - 1);
    if (options[k].top_k == 40)
      assert_int_equal(id % 1000, 999);
    sfa_sampler_destroy(s);
  }
  free(logits);
}

static void arguments(void **state) {
  (void)state;
  static const sfa_sampler_options bad[] = {
      {.temperature = -1}, {.temperature = NAN},       {.top_k = -1},           {.top_p = 1.5f},          {.top_p = NAN},
      {.min_p = -0.1f},    {.repetition_penalty = -2}, {.repetition_last = -1}, {.temperature = INFINITY}};
  sfa_sampler *s;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    sfa_sampler_options o = bad[i];
    o.struct_size = sizeof o;
    assert_int_equal(sfa_sampler_create(ctx, &o, 10, &s), SFA_ERROR_ARGUMENT);
    assert_null(s);
  }
  sfa_sampler_options o = {0};
  assert_int_equal(sfa_sampler_create(ctx, &o, 10, &s), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_sampler_create(ctx, NULL, 10, &s), SFA_ERROR_ARGUMENT);
  o.struct_size = sizeof o;
  assert_int_equal(sfa_sampler_create(ctx, &o, 0, &s), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_sampler_create(NULL, &o, 10, &s), SFA_ERROR_ARGUMENT);
  sfa_sampler_destroy(NULL);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(greedy),      cmocka_unit_test(frequencies),      cmocka_unit_test(seeds),
                                     cmocka_unit_test(repetitions), cmocka_unit_test(large_vocabulary), cmocka_unit_test(arguments)};
  return cmocka_run_group_tests_name("sampler", tests, group_setup, group_teardown);
}
