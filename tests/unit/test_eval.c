/* Evaluation: every task on a few rows and a tiny random model, against what lm-evaluation-harness says of them (tests/golden/eval, made by
 * tools/compare_lm_eval.py); the prompts of the tasks that the harness does not have; rows that are wrong. */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <sfa/eval.h>

#include "eval/eval_open.h"
#include "unit_tools.h"

#define GOLDEN SFA_TEST_DATA "/golden/eval/"

static sfa_context *ctx;
static sfa_model *model;

static int open_model(void **state) {
  (void)state;
  ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_model_options options = {.struct_size = sizeof options, .weights = SFA_WEIGHTS_F32};
  return sfa_model_open(ctx, GOLDEN "model", &options, &model) != SFA_OK;
}

static int close_model(void **state) {
  (void)state;
  sfa_model_close(model);
  sfa_context_destroy(ctx);
  return 0;
}

static sfa_session *new_session(int64_t context_len, int32_t k) {
  sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = k > 0, .k = k};
  sfa_session_options options = {.struct_size = sizeof options, .context_len = context_len, .attention = &choice};
  sfa_session *session;
  assert_int_equal(sfa_session_create(model, &options, &session), SFA_OK);
  return session;
}

static sfa_eval *open_task(const char *task, const char *path, const sfa_eval_options *options) {
  sfa_eval *eval;
  if (sfa_eval_open(model, task, path, options, &eval) != SFA_OK)
    fail_msg("%s: %s", task, sfa_context_error(ctx));
  return eval;
}

static cJSON *read_json(const char *path) {
  sfa_bytes text = {0};
  assert_int_equal(sfa_eval_file_read(ctx, path, &text), SFA_OK);
  cJSON *json = cJSON_Parse((const char *)text.data);
  assert_non_null(json);
  sfa_free(ctx, text.data);
  return json;
}

static double number(const cJSON *json, const char *name) { return cJSON_GetObjectItem(json, name)->valuedouble; }

static void near(double seen, double wanted, double tolerance) {
  if (!(fabs(seen - wanted) <= tolerance * fmax(1, fabs(wanted))))
    fail_msg("%.9g, not %.9g", seen, wanted);
}

/* ---- Against the harness --------------------------------------------------------------------------------------------------------- */

static void compare_item(const sfa_eval_info *info, const sfa_eval_result *r, const cJSON *wanted) {
  const cJSON *answer = cJSON_GetObjectItem(wanted, "answer");
  if (answer) {
    assert_string_equal(r->text, answer->valuestring);
    for (int m = 0; m < info->n_metrics; m++)
      near(r->metrics[m], number(wanted, info->metrics[m]), 0);
    return;
  }
  const cJSON *loglik = cJSON_GetObjectItem(wanted, "loglik"), *greedy = cJSON_GetObjectItem(wanted, "greedy");
  assert_int_equal(r->n_choices, cJSON_GetArraySize(loglik));
  for (int i = 0; i < r->n_choices; i++) {
    near(r->loglik[i], cJSON_GetArrayItem(loglik, i)->valuedouble, 2e-6);
    assert_int_equal(r->is_greedy[i], cJSON_GetArrayItem(greedy, i)->valueint);
  }
}

static void items_are_scored_as_by_the_harness(void **state) {
  (void)state;
  cJSON *golden = read_json(GOLDEN "golden.json"), *task;
  int n_tasks = 0;
  cJSON_ArrayForEach(task, golden) {
    if (cJSON_IsArray(task)) /* perplexities */
      continue;
    const cJSON *items = cJSON_GetObjectItem(task, "items"), *scores = cJSON_GetObjectItem(task, "scores");
    char path[256];
    snprintf(path, sizeof path, GOLDEN "%s.jsonl", task->string);
    bool shots = strcmp(task->string, "gsm8k") == 0;
    sfa_eval_options options = {.struct_size = sizeof options, .shots_path = shots ? GOLDEN "gsm8k_train.jsonl" : NULL};
    sfa_eval *eval = open_task(task->string, path, &options);
    sfa_session *session = new_session(0, 0);
    sfa_eval_info info;
    sfa_eval_describe(eval, &info);
    assert_int_equal(info.n_items, cJSON_GetArraySize(items));
    sfa_eval_result results[8];
    for (int i = 0; i < info.n_items; i++) {
      if (sfa_eval_item(eval, session, i, &results[i]) != SFA_OK)
        fail_msg("%s item %d: %s", task->string, i, sfa_context_error(ctx));
      compare_item(&info, &results[i], cJSON_GetArrayItem(items, i));
    }
    sfa_eval_score sums[SFA_EVAL_MAX_METRICS];
    sfa_eval_summarise(eval, results, info.n_items, sums);
    for (int m = 0; m < info.n_metrics; m++) {
      const cJSON *wanted = cJSON_GetObjectItem(scores, info.metrics[m]);
      near(sums[m].value, number(wanted, "value"), 5e-6);
      if (cJSON_IsNumber(cJSON_GetObjectItem(wanted, "stderr")))
        near(sums[m].stderr_of_mean, number(wanted, "stderr"), 1e-9);
    }
    for (int i = 0; i < info.n_items; i++)
      sfa_free_text(ctx, results[i].text);
    sfa_session_destroy(session);
    sfa_eval_close(eval);
    n_tasks++;
  }
  assert_int_equal(n_tasks, 9);
  cJSON_Delete(golden);
}

/* Items in any order, on a fresh session or after others: the same bits. */
static void what_a_session_did_before_changes_nothing(void **state) {
  (void)state;
  sfa_eval *eval = open_task("hellaswag", GOLDEN "hellaswag.jsonl", NULL);
  sfa_session *used = new_session(96, 4);
  for (int i = 3; i >= 0; i--) {
    sfa_eval_result a, b;
    sfa_session *fresh = new_session(96, 4);
    assert_int_equal(sfa_eval_item(eval, used, i, &a), SFA_OK);
    assert_int_equal(sfa_eval_item(eval, fresh, i, &b), SFA_OK);
    assert_memory_equal(a.loglik, b.loglik, sizeof a.loglik);
    assert_memory_equal(a.is_greedy, b.is_greedy, sizeof a.is_greedy);
    sfa_session_destroy(fresh);
  }
  sfa_session_destroy(used);
  sfa_eval_close(eval);
}

static void answers_are_judged_as_by_the_references(void **state) {
  (void)state;
  cJSON *cases = read_json(GOLDEN "judges.json"), *one;
  cJSON_ArrayForEach(one, cases) {
    const cJSON *scores = cJSON_GetObjectItem(one, "scores"), *wanted;
    int n_scores = cJSON_GetArraySize(scores);
    eval_item item = {0};
    cJSON_ArrayForEach(wanted, cJSON_GetObjectItem(one, "wanted")) {
      item.answers[item.n_answers++] = item.text.len;
      assert_int_equal(sfa_bytes_append(ctx, &item.text, " ", 1), SFA_OK);
      assert_int_equal(sfa_bytes_append(ctx, &item.text, wanted->valuestring, strlen(wanted->valuestring) + 1), SFA_OK);
    }
    double metrics[SFA_EVAL_MAX_METRICS] = {0};
    const char *answer = cJSON_GetObjectItem(one, "answer")->valuestring;
    assert_int_equal((n_scores == 2 ? sfa_eval_judge_number : sfa_eval_judge_rouge)(ctx, answer, &item, metrics), SFA_OK);
    for (int m = 0; m < n_scores; m++)
      if (!(fabs(metrics[m] - cJSON_GetArrayItem(scores, m)->valuedouble) < 1e-12))
        fail_msg("\"%s\", score %d: %g", answer, m, metrics[m]);
    sfa_eval_item_free(ctx, &item);
  }
  cJSON_Delete(cases);
}

/* ---- Texts ----------------------------------------------------------------------------------------------------------------------- */

/* A text of some hundred tokens. */
static int32_t *text_ids(size_t *n) {
  sfa_bytes text = {0};
  int32_t *ids;
  assert_int_equal(sfa_eval_file_read(ctx, GOLDEN "gsm8k_train.jsonl", &text), SFA_OK);
  assert_int_equal(sfa_tokenizer_encode(sfa_model_tokenizer(model), (const char *)text.data, text.len, SFA_TOKENIZE_SPECIAL, &ids, n),
                   SFA_OK);
  sfa_free(ctx, text.data);
  return ids;
}

static void perplexity_is_that_of_the_guide(void **state) {
  (void)state;
  size_t n;
  int32_t *ids = text_ids(&n);
  cJSON *golden = read_json(GOLDEN "golden.json"), *wanted;
  sfa_session *session = new_session(0, 0);
  cJSON_ArrayForEach(wanted, cJSON_GetObjectItem(golden, "ppl")) {
    int64_t window = (int64_t)number(wanted, "window"), stride = (int64_t)number(wanted, "stride"), sum_n = 0;
    double position_nll[384] = {0}, sum = 0;
    int64_t position_n[384] = {0};
    sfa_perplexity p;
    assert_int_equal(sfa_eval_perplexity(session, ids, (int64_t)n, window, stride, &p, position_nll, position_n), SFA_OK);
    assert_int_equal(p.n_scored, number(wanted, "n"));
    near(p.nll, number(wanted, "nll"), 1e-6);
    for (int64_t i = 0; i < window; i++) {
      sum += position_nll[i];
      sum_n += position_n[i];
    }
    assert_int_equal(position_n[0], p.n_windows);
    assert_int_equal(position_n[window - 1], 0); /* nothing follows the last token */
    if (stride == window) {
      near(sum / (double)sum_n, p.nll, 1e-12);
      assert_int_equal(sum_n, p.n_scored);
    }
  }
  sfa_perplexity p;
  assert_int_equal(sfa_eval_perplexity(session, ids, 1, 64, 64, &p, NULL, NULL), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_eval_perplexity(session, ids, 50, 1000, 64, &p, NULL, NULL), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_eval_perplexity(session, ids, 50, 40, 41, &p, NULL, NULL), SFA_ERROR_ARGUMENT);
  sfa_session_destroy(session);
  sfa_free_ids(ctx, ids);
  cJSON_Delete(golden);
}

static void report_card_is_that_of_two_readings(void **state) {
  (void)state;
  size_t n = 0;
  int32_t *ids = text_ids(&n);
  enum { N = 150 };
  assert_true(n > N);
  for (int32_t k = 0; k <= 2; k += 2) {
    sfa_session *reading[2] = {new_session(N, 0), new_session(N, k)}, *side[2] = {new_session(N, 0), new_session(N, k)};
    float nll[2][N];
    int32_t argmax[2][N], same = 0;
    double mean[2] = {0};
    for (int s = 0; s < 2; s++) {
      assert_int_equal(sfa_session_score(reading[s], ids, N, -1, nll[s], argmax[s]), SFA_OK);
      for (int i = 0; i < N - 1; i++)
        mean[s] += (double)nll[s][i] / (N - 1);
    }
    for (int i = 0; i < N - 1; i++)
      same += argmax[0][i] == argmax[1][i];
    sfa_report_card card;
    assert_int_equal(sfa_eval_report_card(side[0], side[1], ids, N, &card), SFA_OK);
    near(card.nll_reference, mean[0], 1e-6);
    near(card.nll_candidate, mean[1], 1e-6);
    near(card.top1_agreement, (double)same / (N - 1), 1e-12);
    assert_true(k ? card.kl > 1e-3 && card.kl < 5 : card.kl == 0 && card.top1_agreement == 1);
    sfa_session_stats stats;
    sfa_session_stats_read(reading[1], &stats);
    assert_int_equal(card.kv_bytes_candidate, stats.kv_bytes);
    assert_true(card.kv_bytes_reference > 0);
    assert_int_equal(sfa_eval_report_card(side[0], side[1], ids, N, &card), SFA_ERROR_ARGUMENT); /* no longer empty */
    sfa_speed speeds[2];
    sfa_session_stats before, after;
    sfa_session_stats_read(side[1], &before);
    assert_int_equal(sfa_eval_speeds(side[0], side[1], ids, N, 10, 3, speeds), SFA_OK);
    sfa_session_stats_read(side[1], &after);
    assert_int_equal(after.decode_tokens - before.decode_tokens, 4 * 10); /* a round more than is counted */
    assert_int_equal(after.prefill_tokens - before.prefill_tokens, 4 * (N - 10));
    for (int s = 0; s < 2; s++)
      assert_true(speeds[s].prefill > 0 && speeds[s].decode > 0 && sfa_session_len(side[s]) == 0);
    assert_int_equal(sfa_eval_speeds(side[0], side[1], ids, 32, 0, 0, speeds), SFA_ERROR_ARGUMENT);  /* 32 steps */
    assert_int_equal(sfa_eval_speeds(side[0], side[1], ids, N + 1, 10, 1, speeds), SFA_ERROR_RANGE); /* beyond the context */
    assert_int_equal(sfa_eval_speeds(side[0], NULL, ids, N, 10, 1, speeds), SFA_ERROR_ARGUMENT);
    for (int s = 0; s < 2; s++) {
      sfa_session_destroy(reading[s]);
      sfa_session_destroy(side[s]);
    }
  }
  sfa_free_ids(ctx, ids);
}

/* KL by its definition, from logits. */
static void divergence_is_its_definition(void **state) {
  (void)state;
  enum { N = 70, VOCAB = 4096 };
  size_t n;
  int32_t *ids = text_ids(&n);
  sfa_model_info info;
  sfa_model_describe(model, &info);
  assert_true(info.vocab_size <= VOCAB);
  sfa_session *step[2] = {new_session(N, 0), new_session(N, 3)}, *side[2] = {new_session(N, 0), new_session(N, 3)};
  static float logits[2][VOCAB];
  double kl = 0;
  for (int i = 0; i < N - 1; i++) {
    double sum[2] = {0};
    for (int s = 0; s < 2; s++) {
      assert_int_equal(sfa_session_append(step[s], ids + i, 1, logits[s]), SFA_OK);
      for (int v = 0; v < info.vocab_size; v++)
        sum[s] += exp((double)logits[s][v]);
    }
    for (int v = 0; v < info.vocab_size; v++) {
      double p = exp((double)logits[0][v]) / sum[0], q = exp((double)logits[1][v]) / sum[1];
      kl += p * log(p / q) / (N - 1);
    }
  }
  sfa_report_card card;
  assert_int_equal(sfa_eval_report_card(side[0], side[1], ids, N, &card), SFA_OK);
  near(card.kl, kl, 1e-5);
  for (int s = 0; s < 2; s++) {
    sfa_session_destroy(step[s]);
    sfa_session_destroy(side[s]);
  }
  sfa_free_ids(ctx, ids);
}

/* ---- ListOps --------------------------------------------------------------------------------------------------------------------- */

static int by_value(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

/* The value of an expression, by a reader that shares nothing with the writer; *symbols counts its words. */
static int read_tree(char **at, int *symbols, int depth, int *deepest) {
  char *word = strsep(at, " ");
  assert_non_null(word);
  ++*symbols;
  *deepest = depth > *deepest ? depth : *deepest;
  if (word[0] != '[')
    return atoi(word);
  int values[64], n = 0, sum = 0;
  while (**at != ']')
    values[n++] = read_tree(at, symbols, depth + 1, deepest);
  strsep(at, " ");
  ++*symbols;
  assert_true(n >= 2);
  qsort(values, (size_t)n, sizeof *values, by_value);
  for (int i = 0; i < n; i++)
    sum += values[i];
  return !strcmp(word, "[MIN")   ? values[0]
         : !strcmp(word, "[MAX") ? values[n - 1]
         : !strcmp(word, "[SM")  ? sum % 10
                                 : (int)floor(0.5 * (values[(n - 1) / 2] + values[n / 2]));
}

static void lists_are_worth_what_they_say(void **state) {
  (void)state;
  uint64_t seed = 7, again = 7;
  int found[10] = {0}, deepest = 0;
  for (int i = 0; i < 300; i++) {
    char line[4096], copy[4096], *at = line, *tab;
    size_t n = sfa_listops_line(&seed, 4, 5, 10, 60, line, sizeof line);
    assert_true(n > 10 && line[n - 1] == '\n');
    assert_int_equal(sfa_listops_line(&again, 4, 5, 10, 60, copy, sizeof copy), n);
    assert_memory_equal(line, copy, n);
    tab = memchr(line, '\t', n);
    assert_true(tab == line + n - 3);
    *tab = '\0';
    int symbols = 0, value = read_tree(&at, &symbols, 1, &deepest);
    assert_int_equal(tab[1] - '0', value);
    assert_true(symbols > 10 && symbols < 60);
    found[value]++;
  }
  assert_int_equal(deepest, 4);
  for (int v = 0; v < 10; v++)
    assert_true(found[v] > 0);
  char small[8];
  assert_int_equal(sfa_listops_line(&seed, 4, 5, 10, 60, small, sizeof small), 0);
  assert_int_equal(sfa_listops_line(&seed, 1, 2, 50, 60, (char[99]){0}, 99), 0); /* one level of two digits has no 50 symbols */
}

/* ---- Prompts of our own ---------------------------------------------------------------------------------------------------------- */

static void check_item(const char *task, const char *path, int64_t index, const char *context, const char *answer, double depth) {
  eval_item item = {0};
  sfa_eval *eval = open_task(task, path, NULL);
  assert_int_equal(sfa_eval_item_make(eval, index, &item), SFA_OK);
  assert_string_equal(sfa_eval_item_text(&item, item.contexts[0]), context);
  assert_string_equal(sfa_eval_item_text(&item, item.answers[item.gold]), answer);
  assert_true(item.depth == depth);
  sfa_eval_item_free(ctx, &item);
  sfa_eval_close(eval);
}

static void prompts_are_as_the_document_says(void **state) {
  (void)state;
  check_item("scitldr", GOLDEN "scitldr.jsonl", 0,
             "We look at sums of few features. They are faster than long sums. Quality stays.\nTL;DR:",
             " Few features are enough, and faster.", 0);
  check_item("kv", GOLDEN "kv.jsonl", 0,
             "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{\"aa-11\": \"b7-20\",\n"
             " \"cc-33\": \"d9-41\",\n \"ee-55\": \"f2-63\"}\n\nKey: \"cc-33\"\nCorresponding value:",
             " d9-41", 0.5);
  check_item("listops", GOLDEN "listops.tsv", 0, "[MAX 2 9 [MIN 4 7 ] 0 ]", "\t9", 0);
  check_item("listops", GOLDEN "listops.tsv", 1, "[SM 4 8 ]", "\t2", 0); /* without the parentheses */
}

/* A place of the grid: exactly as long as asked, the needle at its depth, the question at the end. */
static void needles_lie_where_they_should(void **state) {
  (void)state;
  const char *book = SFA_TEST_DATA "/../examples/data/the_time_machine.txt";
  int64_t lengths[] = {300, 384};
  sfa_eval_options options = {.struct_size = sizeof options, .lengths = lengths, .n_lengths = 2, .n_depths = 3, .n_trials = 2};
  sfa_eval *eval = open_task("niah", book, &options);
  sfa_session *session = new_session(0, 0);
  assert_int_equal(eval->n_items, 12);
  for (int i = 0; i < 12; i++) {
    eval_item item = {0};
    assert_int_equal(sfa_eval_item_make(eval, i, &item), SFA_OK);
    assert_int_equal(item.ids.len + 16, lengths[i / 6]);
    assert_true(item.depth == 0.5 * (i % 3));
    char text[8192] = "", *needle;
    size_t n = 0, n_text = 0;
    for (size_t t = 0; t < item.ids.len; t++)
      n += sfa_tokenizer_decode(sfa_model_tokenizer(model), -1, item.ids.data[t], 0, text + n, sizeof text - n);
    n_text = n;
    const char *answer = sfa_eval_item_text(&item, item.answers[0]);
    needle = strstr(text, "The special magic number of ");
    assert_non_null(needle);
    assert_non_null(strstr(needle, answer));
    assert_string_equal(text + n_text - 3, " is");
    double place = (double)(needle - text) / (double)n_text;
    assert_true(i % 3 == 0 ? place < 0.05 : i % 3 == 1 ? place > 0.2 && place < 0.6 : place > 0.4);
    if (i % 3) { /* the same text around it as at the depth before */
      eval_item before = {0};
      assert_int_equal(sfa_eval_item_make(eval, i - 1, &before), SFA_OK);
      assert_int_equal(before.ids.data[item.ids.len - 1], item.ids.data[item.ids.len - 1]);
      assert_memory_equal(before.ids.data, item.ids.data, (i % 3 == 2 ? 50 : 1) * sizeof(int32_t));
      sfa_eval_item_free(ctx, &before);
    }
    sfa_eval_result r;
    assert_int_equal(sfa_eval_item(eval, session, i, &r), SFA_OK);
    assert_int_equal(r.n_tokens, lengths[i / 6]);
    sfa_free_text(ctx, r.text);
    sfa_eval_item_free(ctx, &item);
  }
  sfa_session *small = new_session(350, 0);
  sfa_eval_result r;
  assert_int_equal(sfa_eval_item(eval, small, 11, &r), SFA_ERROR_RANGE);
  sfa_session_destroy(small);
  sfa_session_destroy(session);
  sfa_eval_close(eval);
}

/* ---- What is wrong --------------------------------------------------------------------------------------------------------------- */

static void bad_rows_are_named(void **state) {
  (void)state;
  static const struct {
    const char *task, *row, *tells;
  } cases[] = {
      {"hellaswag", "{\"ctx\": \"a\", \"endings\": [\"b\"], \"label\": 1}", "line 2: \"label\" is not a whole number from 0 to 0"},
      {"hellaswag", "{\"ctx\": \"a\", \"endings\": [], \"label\": 0}", "line 2: \"endings\" is empty"},
      {"hellaswag", "{\"endings\": [\"b\"], \"label\": 0}", "\"ctx\" is missing"},
      {"hellaswag", "{\"ctx\": \"a\", \"endings\": [1], \"label\": 0}", "holds something that is no text"},
      {"piqa", "{\"goal\": 1, \"sol1\": \"\", \"sol2\": \"\", \"label\": 0}", "\"goal\" is no text"},
      {"piqa", "{\"goal\": \"\", \"sol1\": \"\", \"sol2\": \"\", \"label\": \"x\"}", "\"label\" is not a whole number from 0 to 1"},
      {"piqa", "{\"goal\": \"\", \"sol1\": \"\", \"sol2\": \"\"}", "\"label\" is missing"},
      {"piqa", "{\"goal\": ", "line 2: it is no JSON"},
      {"piqa", "[1]", "it is no JSON object"},
      {"arc_easy", "{\"question\": \"a\", \"choices\": [\"b\"], \"answerKey\": \"B\"}", "\"answerKey\" is the label of no choice"},
      {"arc_easy", "{\"question\": \"a\", \"choices\": {\"text\": 1}, \"label\": 0}", "no list of 1 to 16 choices"},
      {"openbookqa", "{\"choices\": [\"b\"], \"label\": 0}", "no question"},
      {"winogrande", "{\"sentence\": \"no blank\", \"option1\": \"\", \"option2\": \"\", \"answer\": 1}", "no blank"},
      {"winogrande", "{\"question\": \"_\", \"choices\": [\"a\"], \"label\": 0}", "1 choices, not 2"},
      {"pubmedqa", "{\"question\": \"\", \"contexts\": [\"\"], \"final_decision\": \"no?\"}", "neither yes, no nor maybe"},
      {"lambada", "{\"txt\": \"\"}", "\"text\" is missing"},
      {"scitldr", "{\"source\": \"\", \"target\": [\"\"]}", "\"source\" is no list of sentences"},
      {"scitldr", "{\"source\": [1], \"target\": [\"\"]}", "\"source\" holds something that is no text"},
      {"kv", "{\"ordered_kv_records\": [[\"a\", \"b\"]], \"key\": \"c\", \"value\": \"b\"}", "does not hold the key"},
      {"kv", "{\"ordered_kv_records\": [[\"a\"]], \"key\": \"a\", \"value\": \"b\"}", "record 0 of \"ordered_kv_records\" is no pair"},
      {"listops", "[MAX 1 ]", "it is another text"},
      {"listops", "[MAX 1 ]\t10", "it is another text"},
  };
  char path[] = "eval_rows_XXXXXX";
  int file = mkstemp(path);
  assert_true(file >= 0);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    FILE *out = fopen(path, "w");
    fprintf(out, "\n%s\n", cases[i].row); /* the empty line is no row, and is counted */
    fclose(out);
    sfa_eval *eval;
    assert_int_equal(sfa_eval_open(model, cases[i].task, path, NULL, &eval), SFA_ERROR_FORMAT);
    assert_null(eval);
    const char *error = sfa_context_error(ctx);
    if (!strstr(error, cases[i].tells) || strncmp(error, path, strlen(path)) != 0 || !strstr(error, "; a row is "))
      fail_msg("%s: %s", cases[i].tells, error);
  }
  static const struct {
    const char *bytes;
    size_t n;
    const char *tells;
  } files[] = {{"", 0, "is empty"}, {"\n\r\n", 3, "is empty"}, {"\x1f\x8b", 2, "is compressed"}, {"a\0b", 3, "line 1: a zero byte"}};
  for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
    FILE *out = fopen(path, "w");
    fwrite(files[i].bytes, 1, files[i].n, out);
    fclose(out);
    sfa_eval *eval;
    assert_int_equal(sfa_eval_open(model, "piqa", path, NULL, &eval), SFA_ERROR_FORMAT);
    assert_non_null(strstr(sfa_context_error(ctx), files[i].tells));
  }
  close(file);
  unlink(path);
}

static void bad_questions_are_refused(void **state) {
  (void)state;
  sfa_eval *eval;
  int64_t lengths[] = {100000};
  sfa_eval_options many = {.struct_size = sizeof many, .n_shots = 9, .shots_path = GOLDEN "gsm8k_train.jsonl"},
                   less = {.struct_size = sizeof less, .limit = -1}, old = {.struct_size = 1},
                   far = {.struct_size = sizeof far, .lengths = lengths, .n_lengths = 1};
  assert_int_equal(sfa_eval_open(NULL, "piqa", "x", NULL, &eval), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_eval_open(model, "boolq", "x", NULL, &eval), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_eval_open(model, "piqa", "/nowhere", NULL, &eval), SFA_ERROR_IO);
  assert_int_equal(sfa_eval_open(model, "piqa", GOLDEN "piqa.jsonl", &old, &eval), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_eval_open(model, "piqa", GOLDEN "piqa.jsonl", &less, &eval), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_eval_open(model, "gsm8k", GOLDEN "gsm8k.jsonl", NULL, &eval), SFA_ERROR_ARGUMENT); /* examples from where? */
  assert_int_equal(sfa_eval_open(model, "gsm8k", GOLDEN "gsm8k.jsonl", &many, &eval), SFA_ERROR_RANGE);
  assert_int_equal(sfa_eval_open(model, "niah", GOLDEN "gsm8k.jsonl", &far, &eval), SFA_ERROR_RANGE);
  assert_int_equal(sfa_eval_open(model, "niah", GOLDEN "listops.tsv", NULL, &eval), SFA_ERROR_RANGE); /* too short a book */

  eval = open_task("gsm8k", GOLDEN "gsm8k.jsonl", &(sfa_eval_options){.struct_size = sizeof many, .n_shots = -1});
  sfa_session *session = new_session(200, 0);
  sfa_eval_result r;
  assert_int_equal(sfa_eval_item(eval, session, 0, &r), SFA_ERROR_RANGE); /* no room for 256 tokens */
  assert_null(r.text);
  assert_int_equal(sfa_eval_item(eval, session, 2, &r), SFA_ERROR_ARGUMENT);
  sfa_session_destroy(session);
  sfa_eval_close(eval);
}

/* Memory is refused at every call in turn: an error each time, and nothing stays behind. */
static void no_memory_is_an_error(void **state) {
  (void)state;
  memory_account account = {0};
  sfa_allocator allocator = {.alloc = account_alloc, .free = account_free, .user = &account};
  sfa_context_options options = {.struct_size = sizeof options, .n_threads = 1, .allocator = &allocator};
  sfa_context *counted;
  sfa_model *own;
  sfa_model_options weights = {.struct_size = sizeof weights, .weights = SFA_WEIGHTS_F32};
  assert_int_equal(sfa_context_create(&options, &counted), SFA_OK);
  assert_int_equal(sfa_model_open(counted, GOLDEN "model", &weights, &own), SFA_OK);
  static const char *const tasks[] = {"hellaswag", "scitldr"};
  for (int t = 0; t < 2; t++) {
    char path[256];
    snprintf(path, sizeof path, GOLDEN "%s.jsonl", tasks[t]);
    int64_t out = account.out;
    bool done = false;
    for (int64_t refuse = 1; !done && refuse < 3000; refuse++) {
      sfa_session_options small = {.struct_size = sizeof small};
      sfa_session *session;
      sfa_eval *eval;
      sfa_eval_result r = {0};
      assert_int_equal(sfa_session_create(own, &small, &session), SFA_OK);
      account.calls = 0;
      account.refuse = refuse;
      sfa_status status =
          sfa_eval_open(own, tasks[t], path, &(sfa_eval_options){.struct_size = sizeof(sfa_eval_options), .n_generate = 3}, &eval);
      if (status == SFA_OK)
        status = sfa_eval_item(eval, session, 0, &r);
      done = account.calls < refuse;
      account.refuse = 0;
      assert_int_equal(status, done ? SFA_OK : SFA_ERROR_MEMORY);
      sfa_free_text(counted, r.text);
      sfa_eval_close(eval);
      sfa_session_destroy(session);
      assert_int_equal(account.out, out);
    }
    assert_true(done);
  }
  sfa_model_close(own);
  sfa_context_destroy(counted);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(items_are_scored_as_by_the_harness),
                                     cmocka_unit_test(what_a_session_did_before_changes_nothing),
                                     cmocka_unit_test(perplexity_is_that_of_the_guide),
                                     cmocka_unit_test(report_card_is_that_of_two_readings),
                                     cmocka_unit_test(divergence_is_its_definition),
                                     cmocka_unit_test(lists_are_worth_what_they_say),
                                     cmocka_unit_test(answers_are_judged_as_by_the_references),
                                     cmocka_unit_test(prompts_are_as_the_document_says),
                                     cmocka_unit_test(needles_lie_where_they_should),
                                     cmocka_unit_test(bad_rows_are_named),
                                     cmocka_unit_test(bad_questions_are_refused),
                                     cmocka_unit_test(no_memory_is_an_error)};
  return cmocka_run_group_tests(tests, open_model, close_model);
}
