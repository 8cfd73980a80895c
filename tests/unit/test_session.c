/* Sessions: what the length of a chunk, the number of threads and the way of asking must not change; and that a failure, wherever it
 * comes, leaves the timeline as it was. The model is stories260K (5 layers, 8 heads, 512 tokens of vocabulary and of context). */
#include <math.h>
#include <string.h>

#include <sfa/engine.h>

#include "unit_tools.h"

#define MODEL SFA_TEST_DATA "/golden/models/stories260K/stories260K.bin"
enum { N = 70, VOCAB = 512, CONTEXT = 512 };

static int32_t tokens[N];
static float logits_a[VOCAB], logits_b[VOCAB];

static sfa_model *open_model(sfa_context *ctx) {
  sfa_model *model;
  assert_int_equal(sfa_model_open(ctx, MODEL, NULL, &model), SFA_OK);
  return model;
}

static sfa_session *make_session(const sfa_model *model, int32_t chunk_len, int sparse_k, sfa_progress_fn progress, void *user) {
  sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = sparse_k > 0, .k = sparse_k};
  sfa_session_options options = {
      .struct_size = sizeof options, .attention = &choice, .chunk_len = chunk_len, .progress = progress, .progress_user = user};
  sfa_session *session;
  assert_int_equal(sfa_session_create(model, &options, &session), SFA_OK);
  return session;
}

static int make_tokens(void **state) {
  (void)state;
  uint32_t x = 12345;
  for (int i = 0; i < N; i++) {
    tokens[i] = i ? (int32_t)((x >> 16) % VOCAB) : 1;
    x = x * 1103515245u + 12345u;
  }
  return 0;
}

static void result_is_the_same_however_it_is_asked_for(void **state) {
  (void)state;
  static const struct { int32_t n_threads, chunk_len; } ways[] = {{1, 0}, {1, 1}, {1, 7}, {2, 0}, {2, 64}, {3, 70}};
  float nll[2][N];
  int32_t argmax[2][N];
  for (int sparse_k = 0; sparse_k <= 2; sparse_k += 2)
    for (size_t w = 0; w < sizeof ways / sizeof *ways; w++) {
      sfa_context *ctx = new_context(ways[w].n_threads, SFA_ISA_DEFAULT);
      sfa_model *model = open_model(ctx);
      sfa_session *session = make_session(model, ways[w].chunk_len, sparse_k, NULL, NULL);
      int at = w > 0;
      assert_int_equal(sfa_session_score(session, tokens, N, 7, nll[at], argmax[at]), SFA_OK);
      assert_int_equal(sfa_session_len(session), N);
      if (at) {
        assert_memory_equal(nll[0], nll[1], sizeof nll[0]);
        assert_memory_equal(argmax[0], argmax[1], sizeof argmax[0]);
      }
      sfa_session_destroy(session);
      sfa_model_close(model);
      sfa_context_destroy(ctx);
    }
}

/* Each score, recomputed in double from the logits that appending the tokens one at a time gives. */
static void score_is_the_log_softmax_of_the_logits(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  sfa_model *model = open_model(ctx);
  sfa_session *scored = make_session(model, 16, 2, NULL, NULL), *stepped = make_session(model, 0, 2, NULL, NULL);
  float nll[N];
  int32_t argmax[N];
  assert_int_equal(sfa_session_score(scored, tokens, N, -1, nll, argmax), SFA_OK);
  for (int i = 0; i < N; i++) {
    assert_int_equal(sfa_session_append(stepped, tokens + i, 1, logits_a), SFA_OK);
    int best = 0;
    for (int v = 1; v < VOCAB; v++)
      if (logits_a[v] > logits_a[best])
        best = v;
    assert_int_equal(argmax[i], best);
    if (i + 1 == N)
      break;
    double sum = 0;
    for (int v = 0; v < VOCAB; v++)
      sum += exp((double)logits_a[v] - (double)logits_a[best]);
    double wanted = log(sum) + (double)logits_a[best] - (double)logits_a[tokens[i + 1]];
    assert_true(fabs((double)nll[i] - wanted) <= 1e-5 * (1 + wanted));
  }
  assert_true(isnan(nll[N - 1]));
  /* In one call: the same last logits. */
  sfa_session *whole = make_session(model, 0, 2, NULL, NULL);
  assert_int_equal(sfa_session_append(whole, tokens, N, logits_b), SFA_OK);
  assert_memory_equal(logits_a, logits_b, sizeof logits_a);
  sfa_session_destroy(scored);
  sfa_session_destroy(stepped);
  sfa_session_destroy(whole);
  sfa_model_close(model);
  sfa_context_destroy(ctx);
}

static void truncate_goes_back(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_model *model = open_model(ctx);
  sfa_session *session = make_session(model, 0, 2, NULL, NULL);
  assert_int_equal(sfa_session_append(session, tokens, N, logits_a), SFA_OK);
  static const int32_t other[3] = {5, 6, 7};
  for (int keep = 0; keep < N; keep += 23) {
    assert_int_equal(sfa_session_truncate(session, keep), SFA_OK);
    assert_int_equal(sfa_session_len(session), keep);
    assert_int_equal(sfa_session_append(session, other, 3, NULL), SFA_OK);
    assert_int_equal(sfa_session_truncate(session, keep), SFA_OK);
    assert_int_equal(sfa_session_append(session, tokens + keep, N - keep, logits_b), SFA_OK);
    assert_memory_equal(logits_a, logits_b, sizeof logits_a);
  }
  assert_int_equal(sfa_session_truncate(session, N + 100), SFA_OK);
  assert_int_equal(sfa_session_len(session), N);
  assert_int_equal(sfa_session_truncate(session, -1), SFA_ERROR_ARGUMENT);
  sfa_session_destroy(session);
  sfa_model_close(model);
  sfa_context_destroy(ctx);
}

typedef struct step_log {
  int calls, stop_at;
  int64_t done, total;
} step_log;

static int count_step(void *user, int64_t done, int64_t total) {
  step_log *s = user;
  s->done = done;
  s->total = total;
  return ++s->calls == s->stop_at;
}

static void cancel_leaves_the_timeline(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_model *model = open_model(ctx);
  step_log steps = {.stop_at = 2};
  sfa_session *session = make_session(model, 10, 2, count_step, &steps), *plain = make_session(model, 0, 2, NULL, NULL);
  assert_int_equal(sfa_session_append(session, tokens, 5, NULL), SFA_OK);
  assert_int_equal(steps.calls, 0); /* one chunk: nothing lies between */
  assert_int_equal(sfa_session_append(session, tokens + 5, N - 5, logits_a), SFA_ERROR_CANCELLED);
  assert_int_equal(sfa_session_len(session), 5);
  assert_int_equal(steps.done, 20);
  assert_int_equal(steps.total, N - 5);
  assert_non_null(strstr(sfa_context_error(ctx), "20 of 65"));
  sfa_session_stats stats;
  sfa_session_stats_read(session, &stats);
  assert_int_equal(stats.prefill_tokens, 5);
  steps.stop_at = 0;
  assert_int_equal(sfa_session_append(session, tokens + 5, N - 5, logits_a), SFA_OK);
  assert_int_equal(sfa_session_append(plain, tokens, N, logits_b), SFA_OK);
  assert_memory_equal(logits_a, logits_b, sizeof logits_a);
  sfa_session_destroy(session);
  sfa_session_destroy(plain);
  sfa_model_close(model);
  sfa_context_destroy(ctx);
}

static void wrong_calls_change_nothing(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_model *model = open_model(ctx);
  sfa_session_options options = {.struct_size = sizeof options, .context_len = 20};
  sfa_session *session;
  assert_int_equal(sfa_session_create(model, &options, &session), SFA_OK);
  assert_int_equal(sfa_session_append(session, tokens, 10, NULL), SFA_OK);
  int32_t wrong[3] = {1, 2, VOCAB}, negative[2] = {1, -1};
  float nll[N];
  assert_int_equal(sfa_session_append(session, tokens, 11, NULL), SFA_ERROR_RANGE);
  assert_non_null(strstr(sfa_context_error(ctx), "11 tokens after the 10"));
  assert_int_equal(sfa_session_append(session, wrong, 3, NULL), SFA_ERROR_RANGE);
  assert_int_equal(sfa_session_append(session, negative, 2, NULL), SFA_ERROR_RANGE);
  assert_int_equal(sfa_session_append(session, tokens, 0, NULL), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_session_append(session, NULL, 1, NULL), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_session_score(session, tokens, 3, VOCAB, nll, NULL), SFA_ERROR_RANGE);
  assert_int_equal(sfa_session_score(session, tokens, 3, -2, nll, NULL), SFA_ERROR_RANGE);
  assert_int_equal(sfa_session_len(session), 10);
  assert_int_equal(sfa_session_append(session, tokens + 10, 10, logits_a), SFA_OK); /* up to the last place */
  assert_int_equal(sfa_session_append(session, tokens, 1, NULL), SFA_ERROR_RANGE);
  sfa_session_destroy(session);

  options.context_len = CONTEXT + 1;
  assert_int_equal(sfa_session_create(model, &options, &session), SFA_ERROR_RANGE);
  assert_null(session);
  options.context_len = -1;
  assert_int_equal(sfa_session_create(model, &options, &session), SFA_ERROR_ARGUMENT);
  options = (sfa_session_options){.struct_size = 4};
  assert_int_equal(sfa_session_create(model, &options, &session), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_session_create(NULL, NULL, &session), SFA_ERROR_ARGUMENT);
  sfa_session_destroy(NULL);
  sfa_model_close(model);
  sfa_context_destroy(ctx);
}

static void stats_tell_prefill_from_decode(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_model *model = open_model(ctx);
  sfa_session *session = make_session(model, 16, 0, NULL, NULL);
  sfa_session_stats s;
  sfa_session_stats_read(session, &s);
  assert_true(s.prefill_tokens == 0 && s.decode_tokens == 0 && s.prefill_ns == 0 && s.kv_bytes == 0);
  assert_int_equal(sfa_session_append(session, tokens, 40, NULL), SFA_OK);
  for (int i = 40; i < 45; i++)
    assert_int_equal(sfa_session_append(session, tokens + i, 1, logits_a), SFA_OK);
  sfa_session_stats_read(session, &s);
  assert_int_equal(s.prefill_tokens, 40);
  assert_int_equal(s.decode_tokens, 5);
  assert_true(s.prefill_ns >= s.prefill_attention_ns && s.prefill_attention_ns > 0);
  assert_true(s.decode_ns >= s.decode_attention_ns && s.decode_attention_ns > 0);
  sfa_attention_choice dense = {.struct_size = sizeof dense};
  size_t token_bytes;
  assert_int_equal(sfa_model_kv_bytes(model, &dense, &token_bytes), SFA_OK);
  assert_true((size_t)s.kv_bytes >= 45 * token_bytes && (size_t)s.kv_bytes <= 64 * token_bytes + 4096);
  sfa_session_destroy(session);
  sfa_model_close(model);
  sfa_context_destroy(ctx);
}

/* Refuses each allocation in turn: opening, reading and scoring give an error, no memory stays out, and the session still works. */
static void refused_memory_is_an_error(void **state) {
  (void)state;
  memory_account account = {0};
  sfa_context *ctx = new_counted_context(1, &account);
  int64_t refused = 0;
  for (int64_t refuse = 1;; refuse++) {
    int64_t out = account.out;
    account.calls = 0;
    account.refuse = refuse;
    sfa_model *model;
    sfa_status status = sfa_model_open(ctx, MODEL, NULL, &model);
    account.refuse = 0;
    if (status == SFA_OK) {
      sfa_model_close(model);
      break;
    }
    assert_int_equal(status, SFA_ERROR_MEMORY);
    assert_null(model);
    assert_int_equal(account.out, out);
    refused++;
  }
  assert_true(refused > 10);

  sfa_model *model = open_model(ctx);
  sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = 1, .k = 2};
  sfa_session_options options = {.struct_size = sizeof options, .attention = &choice};
  sfa_session *session;
  float nll[N], wanted[N];
  assert_int_equal(sfa_session_create(model, &options, &session), SFA_OK);
  assert_int_equal(sfa_session_score(session, tokens, N, 3, wanted, NULL), SFA_OK);
  sfa_session_destroy(session);
  int failed_scores = 0;
  sfa_status status = SFA_ERROR_MEMORY;
  for (int64_t refuse = 1; status != SFA_OK; refuse++) {
    int64_t out = account.out;
    account.calls = 0;
    account.refuse = refuse;
    status = sfa_session_create(model, &options, &session);
    if (status == SFA_OK) {
      status = sfa_session_score(session, tokens, N, 3, nll, NULL);
      account.refuse = 0;
      if (status != SFA_OK) { /* the session is as new */
        failed_scores++;
        assert_int_equal(sfa_session_len(session), 0);
        assert_int_equal(sfa_session_score(session, tokens, N, 3, nll, NULL), SFA_OK);
      }
      assert_memory_equal(wanted, nll, sizeof nll);
      sfa_session_destroy(session);
    }
    assert_true(status == SFA_OK || status == SFA_ERROR_MEMORY);
    assert_int_equal(account.out, out);
  }
  assert_true(failed_scores > 0);
  sfa_model_close(model);
  sfa_context_destroy(ctx);
  assert_int_equal(account.out, 0);
}

/* Steps leave out at most what they may, say how much, and end near the exact ones. */
static void eps_is_kept_and_told(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  sfa_model *model = open_model(ctx);
  static const sfa_dtype stores[] = {SFA_F32, SFA_I8, SFA_E4M3, SFA_I4};
  for (size_t v = 0; v < sizeof stores / sizeof *stores; v++) {
    float dropped[2];
    for (int pass = 0; pass < 2; pass++) {
      sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = 1, .k = 4, .cache_v = stores[v], .eps = pass ? 0.05f : 0};
      sfa_session_options options = {.struct_size = sizeof options, .attention = &choice};
      sfa_session *session;
      float *logits = pass ? logits_b : logits_a;
      assert_int_equal(sfa_session_create(model, &options, &session), SFA_OK);
      assert_int_equal(sfa_session_append(session, tokens, N - 1, NULL), SFA_OK);
      assert_int_equal(sfa_session_append(session, tokens + N - 1, 1, logits), SFA_OK);
      sfa_session_stats stats;
      sfa_session_stats_read(session, &stats);
      dropped[pass] = stats.dropped_most;
      sfa_session_destroy(session);
    }
    assert_true(dropped[0] == 0);
    const int pays = stores[v] != SFA_I4; /* rows of 4 bits cost less to read than to leave out */
    assert_true(pays ? dropped[1] > 0 && dropped[1] <= 0.05f : dropped[1] == 0);
    double difference = 0, size = 0;
    for (int i = 0; i < VOCAB; i++) {
      difference += pow((double)logits_a[i] - (double)logits_b[i], 2);
      size += pow((double)logits_a[i], 2);
    }
    assert_true(pays ? difference > 0 && sqrt(difference / size) < 0.1 : difference == 0);
  }
  sfa_attention_choice choice = {.struct_size = sizeof choice, .eps = 0.6f};
  sfa_session_options options = {.struct_size = sizeof options, .attention = &choice};
  sfa_session *session;
  assert_int_equal(sfa_session_create(model, &options, &session), SFA_ERROR_ARGUMENT);
  sfa_model_close(model);
  sfa_context_destroy(ctx);
}

/* A policy is for prompts: what is asked for is what their steps do, and what the machine cannot do is refused. The f32 ways have the same
 * bits; a step of one token is the planner's whatever is asked for. */
static void policy_is_that_of_prompts(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  sfa_model *model = open_model(ctx);
  static const sfa_policy ways[] = {SFA_POLICY_TILES, SFA_POLICY_KEYS, SFA_POLICY_PAPER};
  sfa_session_stats stats;
  sfa_session *session;
  for (size_t w = 0; w < sizeof ways / sizeof *ways; w++) {
    const sfa_attention_choice choice = {
        .struct_size = sizeof choice, .sparse = 1, .k = 4, .policy = ways[w], .precision = SFA_PRECISION_F32};
    const sfa_session_options options = {.struct_size = sizeof options, .attention = &choice, .chunk_len = w == 1 ? 8 : 0};
    float *logits = w ? logits_b : logits_a;
    assert_int_equal(sfa_session_create(model, &options, &session), SFA_OK);
    assert_int_equal(sfa_session_append(session, tokens, N - 1, NULL), SFA_OK);
    assert_int_equal(sfa_session_append(session, tokens + N - 1, 1, logits), SFA_OK);
    sfa_session_stats_read(session, &stats);
    assert_int_equal(stats.prefill_policy, ways[w]);
    if (w)
      assert_memory_equal(logits_a, logits_b, sizeof logits_a);
    sfa_session_destroy(session);
  }
  for (int policy = SFA_POLICY_BF16; policy <= SFA_POLICY_SP_INT8; policy++) {
    const sfa_attention_choice choice = {.struct_size = sizeof choice, .policy = (sfa_policy)policy};
    const sfa_session_options options = {.struct_size = sizeof options, .attention = &choice};
    assert_int_equal(sfa_session_create(model, &options, &session), SFA_ERROR_UNSUPPORTED);
    assert_non_null(strstr(sfa_context_error(ctx), "GPU"));
    assert_null(session);
  }
  const sfa_attention_choice listed = {.struct_size = sizeof listed, .policy = SFA_POLICY_PAPER}; /* no codes to make lists of */
  const sfa_session_options options = {.struct_size = sizeof options, .attention = &listed};
  assert_int_equal(sfa_session_create(model, &options, &session), SFA_ERROR_UNSUPPORTED);
  sfa_model_close(model);
  sfa_context_destroy(ctx);
}

static void opening_tells_what_is_wrong(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_model *model;
  assert_int_equal(sfa_model_open(ctx, SFA_TEST_DATA "/nothing.gguf", NULL, &model), SFA_ERROR_IO);
  assert_null(model);
  assert_non_null(strstr(sfa_context_error(ctx), "nothing.gguf"));
  assert_int_equal(sfa_model_open(ctx, "", NULL, &model), SFA_ERROR_ARGUMENT);
  sfa_model_options options = {.struct_size = sizeof options, .tokenizer = SFA_TEST_DATA "/nothing.json"};
  assert_int_equal(sfa_model_open(ctx, MODEL, &options, &model), SFA_ERROR_IO);
  assert_null(model);
  options = (sfa_model_options){.struct_size = sizeof options, .weights = (sfa_weight_format)9};
  assert_int_equal(sfa_model_open(ctx, MODEL, &options, &model), SFA_ERROR_ARGUMENT);
  options = (sfa_model_options){.struct_size = 3};
  assert_int_equal(sfa_model_open(ctx, MODEL, &options, &model), SFA_ERROR_ARGUMENT);
  model = open_model(ctx);
  assert_non_null(sfa_model_tokenizer(model)); /* tok512.bin, found by its size */
  assert_int_equal(sfa_tokenizer_vocab_size(sfa_model_tokenizer(model)), VOCAB);
  sfa_model_close(model);
  sfa_model_close(NULL);
  sfa_context_destroy(ctx);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(result_is_the_same_however_it_is_asked_for),
      cmocka_unit_test(score_is_the_log_softmax_of_the_logits),
      cmocka_unit_test(truncate_goes_back),
      cmocka_unit_test(cancel_leaves_the_timeline),
      cmocka_unit_test(wrong_calls_change_nothing),
      cmocka_unit_test(stats_tell_prefill_from_decode),
      cmocka_unit_test(refused_memory_is_an_error),
      cmocka_unit_test(eps_is_kept_and_told),
      cmocka_unit_test(policy_is_that_of_prompts),
      cmocka_unit_test(opening_tells_what_is_wrong),
  };
  return cmocka_run_group_tests(tests, make_tokens, NULL);
}
