/* What a training is made of: recipes and their schedules, the order of the data, the log. */
#include "unit_tools.h"

#include <math.h>

#include "train_files.h"

#include "train/batches.h"
#include "train/recipe.h"
#include "train/train_log.h"

static sfa_status read_recipe(sfa_context *ctx, sfa_recipe *recipe, const char *a, const char *b) {
  const char *const texts[] = {a, b};
  return sfa_recipe_read(ctx, texts, b ? 2 : 1, recipe);
}

static void test_recipe_members(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_recipe r;
  assert_int_equal(read_recipe(ctx, &r, "{\"steps\": 7, \"learning_rate\": 0.5, \"_why\": [1]}", "{\"steps\": 9, \"decay\": \"wsd\"}"),
                   SFA_OK);
  assert_int_equal(r.steps, 9);
  assert_true(r.learning_rate == 0.5);
  assert_int_equal(r.decay, SFA_DECAY_WSD);
  assert_true(r.beta2 == 0.95);
  assert_int_equal(cJSON_GetObjectItem(r.json, "sequences")->valueint, 8); /* defaults are written down */
  sfa_recipe_free(&r);
  static const char *const wrong[][2] = {
      {"{\"stepz\": 7}", "stepz"},
      {"{\"steps\": 0}", "\"steps\" is 0"},
      {"{\"steps\": 1.5}", "whole number"},
      {"{\"steps\": \"many\"}", "many"},
      {"{\"decay\": \"cliff\"}", "cosine|linear|wsd"},
      {"{\"bf16_products\": 1}", "true or false"},
      {"{\"learning_rate\": -1}", "learning_rate"},
      {"{\"gumbel_scale\": 3}", "gumbel_scale"},
      {"{\"model\": 3}", "object"},
      {"{\"dense_until\": 0.9}", "k_final_from"},
      {"{\"steps\": 7", "JSON"},
  };
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    assert_int_not_equal(read_recipe(ctx, &r, wrong[i][0], NULL), SFA_OK);
    if (!strstr(sfa_context_error(ctx), wrong[i][1]))
      fail_msg("%s: %s", wrong[i][0], sfa_context_error(ctx));
  }
  sfa_context_destroy(ctx);
}

static void test_recipe_match(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_recipe before, now;
  assert_int_equal(read_recipe(ctx, &before, "{\"steps\": 9, \"model\": {\"hidden_size\": 8}}", NULL), SFA_OK);
  assert_int_equal(read_recipe(ctx, &now, "{\"model\": {\"hidden_size\": 8}, \"steps\": 9, \"log_every\": 3, \"weights\": \"bf16\"}", NULL),
                   SFA_OK);
  assert_int_equal(sfa_recipe_match(ctx, &now, before.json, "x"), SFA_OK);
  sfa_recipe_free(&now);
  static const char *const changed[][2] = {{"{\"steps\": 9, \"model\": {\"hidden_size\": 9}}", "model"},
                                           {"{\"steps\": 9}", "model"},
                                           {"{\"steps\": 9, \"seed\": 2, \"model\": {\"hidden_size\": 8}}", "seed"},
                                           {"{\"steps\": 8, \"model\": {\"hidden_size\": 8}}", "steps"}};
  for (size_t i = 0; i < sizeof changed / sizeof *changed; i++) {
    assert_int_equal(read_recipe(ctx, &now, changed[i][0], NULL), SFA_OK);
    assert_int_equal(sfa_recipe_match(ctx, &now, before.json, "x"), SFA_ERROR_ARGUMENT);
    assert_non_null(strstr(sfa_context_error(ctx), changed[i][1]));
    sfa_recipe_free(&now);
  }
  /* what a checkpoint of an earlier version lacks had its default */
  cJSON_DeleteItemFromObject(before.json, "document_mask");
  for (int mask = 0; mask < 2; mask++) {
    const char *over = mask ? "{\"document_mask\": true}" : NULL;
    assert_int_equal(read_recipe(ctx, &now, "{\"steps\": 9, \"model\": {\"hidden_size\": 8}}", over), SFA_OK);
    assert_int_equal(sfa_recipe_match(ctx, &now, before.json, "x"), mask ? SFA_ERROR_ARGUMENT : SFA_OK);
    sfa_recipe_free(&now);
  }
  sfa_recipe_free(&before);
  sfa_context_destroy(ctx);
}

static void test_rates(void **state) {
  (void)state;
  sfa_recipe r = {.steps = 100, .learning_rate = 1, .final_learning_rate = 0.1, .warmup_steps = 10, .decay_part = 0.2};
  static const struct {
    sfa_rate_decay decay;
    int64_t step;
    double rate;
  } points[] = {{SFA_DECAY_COSINE, 0, 0.1},   {SFA_DECAY_COSINE, 9, 1},     {SFA_DECAY_COSINE, 10, 1},    {SFA_DECAY_COSINE, 55, 0.55},
                {SFA_DECAY_COSINE, 100, 0.1}, {SFA_DECAY_LINEAR, 28, 0.82}, {SFA_DECAY_LINEAR, 55, 0.55}, {SFA_DECAY_WSD, 79, 1},
                {SFA_DECAY_WSD, 90, 0.55},    {SFA_DECAY_WSD, 100, 0.1}};
  for (size_t i = 0; i < sizeof points / sizeof *points; i++) {
    r.decay = points[i].decay;
    if (!(fabs(sfa_recipe_rate(&r, points[i].step) - points[i].rate) < 1e-12))
      fail_msg("point %zu: %g, not %g", i, sfa_recipe_rate(&r, points[i].step), points[i].rate);
  }
  r.warmup_steps = 0;
  r.decay = SFA_DECAY_LINEAR;
  assert_true(sfa_recipe_rate(&r, 0) == 1);
}

static void test_ks(void **state) {
  (void)state;
  sfa_recipe r = {.steps = 100, .k_schedule = SFA_K_DENSE_FIRST, .dense_until = 0.4, .k_final_from = 0.7};
  assert_int_equal(sfa_recipe_k(&r, 0, 16, 64), 0);
  assert_int_equal(sfa_recipe_k(&r, 39, 16, 64), 0);
  assert_int_equal(sfa_recipe_k(&r, 40, 16, 64), 0);  /* 64 of 64 */
  assert_int_equal(sfa_recipe_k(&r, 55, 16, 64), 32); /* half the way down in the logarithm */
  assert_int_equal(sfa_recipe_k(&r, 70, 16, 64), 16);
  assert_int_equal(sfa_recipe_k(&r, 100, 16, 64), 16);
  int32_t before = 64;
  for (int64_t step = 41; step <= 100; step++) {
    int32_t k = sfa_recipe_k(&r, step, 3, 64);
    assert_true(k >= 3 && k <= before);
    before = k;
  }
  assert_int_equal(sfa_recipe_k(&r, 90, 0, 64), 0);
  r.k_schedule = SFA_K_FIXED;
  assert_int_equal(sfa_recipe_k(&r, 0, 16, 64), 16);
}

static void check_sparsity(sfa_context *ctx, const char *config, const int32_t *keys, const int32_t *queries) {
  char text[400];
  sfa_recipe r;
  sfa_recipe_sparsity s;
  snprintf(text, sizeof text, "{\"sparse_attention_config\": %s}", config);
  assert_int_equal(read_recipe(ctx, &r, text, NULL), SFA_OK);
  sfa_status status = sfa_recipe_sparsity_read(ctx, &r, 2, 2, 16, &s);
  if (keys) {
    assert_int_equal(status, SFA_OK);
    assert_memory_equal(s.k_keys, keys, 4 * sizeof *keys);
    assert_memory_equal(s.k_queries, queries, 4 * sizeof *queries);
  } else {
    assert_int_equal(status, SFA_ERROR_ARGUMENT);
  }
  sfa_recipe_sparsity_free(ctx, &s);
  sfa_recipe_free(&r);
}

static void test_sparsity(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  check_sparsity(ctx, "{\"k\": 4}", (int32_t[]){4, 4, 4, 4}, (int32_t[]){4, 4, 4, 4});
  check_sparsity(ctx, "{\"k\": 4, \"k_q\": 0}", (int32_t[]){4, 4, 4, 4}, (int32_t[]){0, 0, 0, 0});
  check_sparsity(ctx, "{\"k\": [16, 4], \"k_q\": 8}", (int32_t[]){0, 0, 4, 4}, (int32_t[]){0, 0, 8, 8});
  check_sparsity(ctx, "{\"k\": [[1, 2], [3, 0]]}", (int32_t[]){1, 2, 3, 0}, (int32_t[]){1, 2, 3, 0});
  check_sparsity(ctx, "{\"k\": 4, \"layers\": [1]}", (int32_t[]){0, 0, 4, 4}, (int32_t[]){0, 0, 4, 4});
  check_sparsity(ctx, "{\"k\": 4, \"layers\": \"all\", \"order\": \"pre_rope\"}", (int32_t[]){4, 4, 4, 4}, (int32_t[]){4, 4, 4, 4});
  static const char *const wrong[] = {"{}",
                                      "{\"k\": 17}",
                                      "{\"k\": -1}",
                                      "{\"k\": [1]}",
                                      "{\"k\": [[1], [2]]}",
                                      "{\"k\": 4, \"layers\": [2]}",
                                      "{\"k\": 4, \"layers\": 1}",
                                      "{\"k\": 4, \"order\": \"sideways\"}"};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
    check_sparsity(ctx, wrong[i], NULL, NULL);
  sfa_context_destroy(ctx);
}

/* One to one for every n, and another order for another key. */
static void test_shuffle(void **state) {
  (void)state;
  uint8_t seen[600];
  for (uint64_t n = 1; n < 600; n += n < 20 ? 1 : 57) {
    uint64_t same = 0;
    memset(seen, 0, sizeof seen);
    for (uint64_t i = 0; i < n; i++) {
      uint64_t at = sfa_shuffle(5, n, i);
      assert_true(at < n && !seen[at]);
      seen[at] = 1;
      same += at == sfa_shuffle(6, n, i);
    }
    if (n > 100)
      assert_true(same < n / 10);
  }
}

/* Every pass has each window once; windows are the tokens that they say. */
static void test_batches(void **state) {
  (void)state;
  enum { LEN = 10, N = 1234 };
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  const char *path = in_temp("t");
  train_make_shards(ctx, path, 3, N - 1); /* and the end of the document */
  const char *const paths[] = {path};
  sfa_batches b;
  assert_int_equal(sfa_batches_open(ctx, "training", paths, 1, LEN, &b), SFA_OK);
  assert_int_equal(b.n_windows, (N - 1) / LEN);
  int32_t row[N], tokens[LEN], targets[LEN];
  assert_int_equal(sfa_shards_read(b.shards, 0, N, row), SFA_OK);
  assert_int_equal(row[N - 1], TRAIN_VOCAB - 1);
  uint8_t seen[N] = {0};
  int64_t same = 0;
  for (int64_t i = 0; i < 2 * b.n_windows; i++) {
    int64_t window = sfa_batches_shuffled(&b, 9, i);
    assert_true(window >= 0 && window < b.n_windows && seen[window] == i / b.n_windows);
    seen[window]++;
    same += i >= b.n_windows && window == sfa_batches_shuffled(&b, 9, i - b.n_windows);
    assert_int_equal(sfa_batches_read(&b, window, tokens, targets), SFA_OK);
    assert_memory_equal(tokens, row + window * LEN, sizeof tokens);
    assert_memory_equal(targets, row + window * LEN + 1, sizeof targets);
  }
  assert_true(same < b.n_windows / 4);
  sfa_batches_close(&b);
  assert_int_equal(sfa_batches_open(ctx, "training", paths, 1, N, &b), SFA_ERROR_ARGUMENT);
  assert_non_null(strstr(sfa_context_error(ctx), "sequence_len"));
  sfa_context_destroy(ctx);
}

/* What lies behind the step of a checkpoint goes, and half a line. */
static void test_log(void **state) {
  (void)state;
  static const char lines[] = "{\"step\":2,\"a\":1}\n{\"step\":4,\"a\":1}\n{\"step\":4,\"b\":1}\n{\"step\":10,\"a\":1}\n{\"st";
  static const struct {
    int64_t step;
    size_t lines;
  } cases[] = {{0, 0}, {1, 0}, {2, 1}, {4, 3}, {9, 3}, {10, 4}, {99, 4}};
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  const char *path = in_temp("log");
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    sfa_train_log log;
    write_whole(path, lines, sizeof lines - 1);
    assert_int_equal(sfa_train_log_open(ctx, path, cases[i].step, &log), SFA_OK);
    cJSON *line = cJSON_CreateObject();
    cJSON_AddNumberToObject(line, "step", 5);
    assert_int_equal(sfa_train_log_add(&log, line), SFA_OK);
    sfa_train_log_close(&log);
    size_t bytes, n = 0;
    char *text = read_whole(path, &bytes);
    for (size_t j = 0; j < bytes; j++)
      n += text[j] == '\n';
    assert_int_equal(n, cases[i].lines + 1);
    assert_memory_equal(text + bytes - 11, "{\"step\":5}\n", 11);
    free(text);
  }
  sfa_context_destroy(ctx);
}

/* Numbers of every size come back as they were. */
static void test_exact_numbers(void **state) {
  (void)state;
  static const struct {
    double value;
    const char *text;
  } cases[] = {{0.1, "0.1"},
               {0.1 + 0.2, "0.30000000000000004"},
               {-3, "-3"},
               {0, "0"},
               {0x1p53 - 1, "9007199254740991"},
               {1e15, "1000000000000000"},
               {1e20, "1e+20"},
               {-1e-5, "-1e-05"},
               {0x1p-1074, "4.94065645841247e-324"},
               {(double)1e-5f, "9.999999747378752e-06"}};
  sfa_rng rng = {11};
  cJSON *list = cJSON_CreateArray();
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    cJSON *number = cJSON_CreateNumber(cases[i].value);
    char *text = sfa_json_print(number, false);
    assert_string_equal(text, cases[i].text);
    cJSON_free(text);
    cJSON_Delete(number);
  }
  double values[1000];
  for (int i = 0; i < 1000; i++) {
    values[i] = ldexp(sfa_rng_uniform(&rng) - 0.5, (int)(sfa_rng_next(&rng) % 2000) - 1000);
    cJSON_AddItemToArray(list, cJSON_CreateNumber(values[i]));
  }
  for (int indented = 0; indented < 2; indented++) {
    char *text = sfa_json_print(list, indented);
    cJSON *read = cJSON_Parse(text);
    const cJSON *item = read->child;
    for (int i = 0; i < 1000; i++, item = item->next)
      assert_memory_equal(&item->valuedouble, &values[i], sizeof *values);
    assert_null(item);
    cJSON_Delete(read);
    cJSON_free(text);
  }
  cJSON_Delete(list);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_recipe_members), cmocka_unit_test(test_recipe_match),
      cmocka_unit_test(test_rates),          cmocka_unit_test(test_ks),
      cmocka_unit_test(test_sparsity),       cmocka_unit_test(test_shuffle),
      cmocka_unit_test(test_batches),        cmocka_unit_test(test_log),
      cmocka_unit_test(test_exact_numbers),
  };
  return cmocka_run_group_tests(tests, temp_begin, temp_end);
}
