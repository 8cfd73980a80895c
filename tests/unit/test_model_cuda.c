/* Models on a GPU against the CPU's: every family, prompts and steps of one token, dense and sparse, with the same session calls. Skipped
 * where there is no GPU. */
#include "engine/session.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <sfa/stream.h>

#define MODELS SFA_TEST_DATA "/golden/models/"

static const char *const paths[] = {
    MODELS "llama", MODELS "qwen2", MODELS "qwen3", MODELS "gpt2", MODELS "gemma3", MODELS "llama/model.gguf", MODELS "gemma3/model.gguf"};
enum { N_PATHS = sizeof paths / sizeof *paths };

static sfa_context *cpu, *gpu;

static int open_both(void **state) {
  (void)state;
  char why[256] = "";
  const sfa_context_options host = {.struct_size = sizeof host, .n_threads = 2};
  const sfa_context_options options = {
      .struct_size = sizeof options, .n_threads = 2, .device = SFA_DEVICE_CUDA, .why = why, .why_bytes = sizeof why};
  if (sfa_context_create(&host, &cpu) != SFA_OK)
    return 1;
  if (sfa_context_create(&options, &gpu) != SFA_OK)
    print_message("no GPU: %s\n", why);
  return 0;
}

static int close_both(void **state) {
  (void)state;
  sfa_context_destroy(gpu);
  sfa_context_destroy(cpu);
  return 0;
}

/* A model and a session of one device. */
typedef struct side {
  sfa_context *ctx;
  sfa_model *model;
  sfa_session *session;
  sfa_model_info info;
} side;

static side open_side(sfa_context *ctx, const char *path, sfa_weight_format format, const sfa_attention_choice *choice, int32_t chunk) {
  side s = {.ctx = ctx};
  const sfa_model_options options = {.struct_size = sizeof options, .weights = format};
  if (sfa_model_open(ctx, path, &options, &s.model) != SFA_OK)
    fail_msg("%s: %s", path, sfa_context_error(ctx));
  sfa_model_describe(s.model, &s.info);
  const sfa_session_options session = {.struct_size = sizeof session, .attention = choice, .chunk_len = chunk};
  if (sfa_session_create(s.model, &session, &s.session) != SFA_OK)
    fail_msg("%s: %s", path, sfa_context_error(ctx));
  return s;
}

static void close_side(side *s) {
  sfa_session_destroy(s->session);
  sfa_model_close(s->model);
}

static double error_of(const float *found, const float *expected, int64_t n) {
  double error = 0, size = 0;
  for (int64_t i = 0; i < n; i++) {
    error += ((double)found[i] - (double)expected[i]) * ((double)found[i] - (double)expected[i]);
    size += (double)expected[i] * (double)expected[i];
  }
  return sqrt(error / size);
}

static int32_t *make_text(int32_t n, int32_t vocab) {
  int32_t *ids = malloc((size_t)n * sizeof *ids);
  uint32_t state = 7;
  for (int32_t i = 0; i < n; i++)
    ids[i] = (int32_t)((state = state * 1664525u + 1013904223u) >> 8) % vocab;
  return ids;
}

enum { PROMPT = 75, STEPS = 70, AGAIN = 9 };

/* Logits of a prompt in chunks, of steps, and of steps again after some were taken back. */
static void run(side *s, const int32_t *ids, int32_t n, float *logits) {
  int32_t vocab = s->info.vocab_size, prompt = n < PROMPT ? n / 2 : PROMPT;
  if (sfa_session_logits(s->session, ids, prompt, logits) != SFA_OK)
    fail_msg("prompt: %s", sfa_context_error(s->ctx));
  for (int pass = 0; pass < 2; pass++) {
    for (int64_t i = sfa_session_len(s->session); i < n; i++)
      if (sfa_session_append(s->session, ids + i, 1, logits + i * vocab) != SFA_OK)
        fail_msg("step %lld: %s", (long long)i, sfa_context_error(s->ctx));
    assert_int_equal(sfa_session_len(s->session), n);
    if (pass == 0)
      assert_int_equal(sfa_session_truncate(s->session, n - AGAIN), SFA_OK);
  }
}

static void compare(const char *path, sfa_weight_format format, const sfa_attention_choice *choice, int32_t chunk, double limit) {
  side a = open_side(cpu, path, format, choice, chunk), b = open_side(gpu, path, format, choice, chunk);
  int32_t n = (int32_t)(a.info.context_len < PROMPT + STEPS ? a.info.context_len : PROMPT + STEPS), vocab = a.info.vocab_size;
  int32_t *ids = make_text(n, vocab), *best[2];
  float *logits[3], *nll[2];
  for (int i = 0; i < 3; i++)
    logits[i] = malloc((size_t)n * (size_t)vocab * sizeof(float));
  run(&a, ids, n, logits[0]);
  run(&b, ids, n, logits[1]);
  assert_int_equal(sfa_session_truncate(b.session, 0), SFA_OK);
  run(&b, ids, n, logits[2]);
  assert_memory_equal(logits[1], logits[2], (size_t)n * (size_t)vocab * sizeof(float)); /* the same every time */
  double prompt = error_of(logits[1], logits[0], (int64_t)(n < PROMPT ? n / 2 : PROMPT) * vocab),
         all = error_of(logits[1], logits[0], (int64_t)n * vocab);
  print_message("%-40s chunk %3d, k %2d, k_q %2d: prompt %.2e, all %.2e of the CPU's logits\n", path + sizeof MODELS - 1, chunk,
                choice->sparse ? choice->k : 0, choice->k_q, prompt, all);
  assert_true(prompt <= limit && all <= limit);
  for (int i = 0; i < 2; i++) {
    side *s = i ? &b : &a;
    best[i] = malloc((size_t)n * sizeof(int32_t));
    nll[i] = malloc((size_t)n * sizeof(float));
    assert_int_equal(sfa_session_truncate(s->session, 0), SFA_OK);
    assert_int_equal(sfa_session_score(s->session, ids, n, 3, nll[i], best[i]), SFA_OK);
  }
  assert_true(error_of(nll[1], nll[0], n) <= limit);
  for (int i = 0; i < 2; i++)
    free(best[i]), free(nll[i]);
  for (int i = 0; i < 3; i++)
    free(logits[i]);
  free(ids);
  close_side(&a);
  close_side(&b);
}

static void families(void **state) {
  (void)state;
  if (!gpu)
    skip();
  const sfa_attention_choice dense = {.struct_size = sizeof dense};
  for (int i = 0; i < N_PATHS; i++)
    for (int32_t chunk = 0; chunk <= 40; chunk += 40)
      compare(paths[i], SFA_WEIGHTS_AUTO, &dense, chunk, 3e-2);
}

static void sparse(void **state) {
  (void)state;
  if (!gpu)
    skip();
  for (int i = 0; i < 5; i++)
    for (int32_t k_q = 0; k_q >= -1; k_q--) {
      const sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = 1, .k = 8, .k_q = k_q};
      compare(paths[i], SFA_WEIGHTS_BF16, &choice, 0, 6e-2); /* a feature at the edge of the choice may fall on either side */
    }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(families), cmocka_unit_test(sparse)};
  return cmocka_run_group_tests(tests, open_both, close_both);
}
