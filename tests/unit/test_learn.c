/* Models that learn: gradients of every family against PyTorch autograd (tools/make_gradient_golden.py), dense and sparse; the same bits
 * for any threads, instruction set and with checkpointing; conversion's losses by central differences; arguments that are wrong. */
#include "unit_tools.h"

#include "model/learn.h"

#include <math.h>
#include <stdio.h>

#define GOLDEN SFA_TEST_DATA "/golden/"

enum { N_TOKENS = 80, FIRST_LEN = 50, N_SUMS = 4, MOST_SAMPLES = 24 };
static const int32_t cu_seqlens[] = {0, FIRST_LEN, N_TOKENS};
static const char *const families[] = {"llama", "qwen2", "qwen3", "gpt2", "gemma3"};
enum { N_FAMILIES = sizeof families / sizeof *families };

static sfa_learner *open_learner(sfa_context *ctx, const char *name, const char *file, const sfa_learn_options *options) {
  char path[512];
  sfa_weights *weights;
  sfa_learner *learner;
  snprintf(path, sizeof path, GOLDEN "models/%s%s", name, file);
  if (sfa_weights_open(ctx, path, &weights) != SFA_OK || sfa_learner_create(ctx, weights, options, &learner) != SFA_OK)
    fail_msg("%s: %s", path, sfa_context_error(ctx));
  return learner;
}

typedef struct text {
  int32_t tokens[N_TOKENS], targets[N_TOKENS];
} text;

/* As the script scores it. */
static text read_text(const char *name) {
  char path[512];
  text t;
  snprintf(path, sizeof path, GOLDEN "models/%s/ids.i32", name);
  FILE *file = fopen(path, "rb");
  assert_non_null(file);
  assert_int_equal(fread(t.tokens, sizeof(int32_t), N_TOKENS, file), N_TOKENS);
  fclose(file);
  for (int i = 0; i < N_TOKENS; i++) {
    int at = i < FIRST_LEN ? i : i - FIRST_LEN;
    t.targets[i] = i + 1 == FIRST_LEN || i + 1 == N_TOKENS || at % 7 == 3 ? -1 : t.tokens[i + 1];
  }
  return t;
}

static sfa_learn_batch batch_of(const text *t) {
  return (sfa_learn_batch){
      .n_tokens = N_TOKENS, .n_sequences = 2, .tokens = t->tokens, .targets = t->targets, .cu_seqlens = cu_seqlens, .backward = true};
}

static sfa_learn_result must_run(sfa_context *ctx, sfa_learner *learner, const sfa_learn_batch *batch) {
  sfa_learn_result result;
  if (sfa_learner_run(learner, batch, &result) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  return result;
}

/* ---- Against PyTorch -------------------------------------------------------------------------------------------------------------- */

/* The sign of element i in sum p, as in the script. */
static double sign_of(uint32_t p, uint32_t i) {
  uint32_t mixed = (i + 1) * 2654435761u ^ (p * 40503u + 12345u);
  mixed = (mixed ^ mixed >> 15) * 2246822519u;
  return mixed >> 31 ? -1.0 : 1.0;
}

static const sfa_parameter *parameter_named(sfa_learner *learner, const char *name) {
  for (int32_t i = 0; i < sfa_learner_count(learner); i++)
    if (strcmp(sfa_learner_parameter(learner, i)->name, name) == 0)
      return sfa_learner_parameter(learner, i);
  fail_msg("there is no parameter %s", name);
  return NULL;
}

static void read_numbers(FILE *file, const char *title, int32_t *out, int32_t most) {
  char word[32];
  int32_t n;
  assert_int_equal(fscanf(file, "%31s %d", word, &n), 2);
  assert_string_equal(word, title);
  assert_true(n <= most);
  for (int32_t i = 0; i < n; i++)
    assert_int_equal(fscanf(file, "%d", &out[i]), 1);
}

/* A line of the file against a gradient: everything within 1e-4 of the gradient's norm. */
static double check_tensor(FILE *file, sfa_learner *learner) {
  char name[192];
  double norm, sums[N_SUMS], sum = 0, worst = 0;
  int32_t n_samples;
  assert_int_equal(fscanf(file, "%191s %lf", name, &norm), 2);
  const sfa_parameter *p = parameter_named(learner, name);
  for (int i = 0; i < N_SUMS; i++)
    assert_int_equal(fscanf(file, "%lf", &sums[i]), 1);
  assert_int_equal(fscanf(file, "%d", &n_samples), 1);
  assert_in_range(n_samples, 1, MOST_SAMPLES);
  for (int32_t i = 0; i < n_samples; i++) {
    double wanted, found = (double)p->gradient[i * p->n / n_samples];
    assert_int_equal(fscanf(file, "%lf", &wanted), 1);
    worst = fmax(worst, fabs(found - wanted) / norm);
  }
  for (uint32_t s = 0; s < N_SUMS; s++) {
    sum = 0;
    for (int64_t i = 0; i < p->n; i++)
      sum += sign_of(s, (uint32_t)i) * (double)p->gradient[i];
    worst = fmax(worst, fabs(sum - sums[s]) / norm);
  }
  sum = 0;
  for (int64_t i = 0; i < p->n; i++)
    sum += (double)p->gradient[i] * (double)p->gradient[i];
  worst = fmax(worst, fabs(sqrt(sum) - norm) / norm);
  if (!(worst <= 1e-4))
    print_message("%s: %.3g of its norm %.6g away\n", name, worst, norm);
  return worst;
}

static void against_file(const char *name, const char *model_file, const char *which, const sfa_learn_options *options) {
  char path[512];
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  sfa_learner *learner = open_learner(ctx, name, model_file, options);
  int32_t k_keys[64] = {0}, k_queries[64] = {0}, n_tensors, n_scored;
  double loss;
  snprintf(path, sizeof path, GOLDEN "gradients/%s_%s.txt", name, which);
  FILE *file = fopen(path, "r");
  assert_non_null(file);
  assert_int_equal(fscanf(file, "loss %lf %d\n", &loss, &n_scored), 2);
  read_numbers(file, "k_keys", k_keys, 64);
  read_numbers(file, "k_queries", k_queries, 64);
  sfa_learn_sparsity sparsity = {.k_keys = k_keys, .k_queries = k_queries};
  assert_int_equal(sfa_learner_sparsity(learner, &sparsity), SFA_OK);
  text t = read_text(name);
  sfa_learn_batch batch = batch_of(&t);
  sfa_learner_clear(learner);
  sfa_learn_result result = must_run(ctx, learner, &batch);
  assert_int_equal(result.n_scored, n_scored);
  double worst = 0, loss_error = fabs(result.loss_sum - loss) / loss;
  assert_int_equal(fscanf(file, " tensors %d", &n_tensors), 1);
  assert_int_equal(n_tensors, sfa_learner_count(learner));
  for (int32_t i = 0; i < n_tensors; i++)
    worst = fmax(worst, check_tensor(file, learner));
  fclose(file);
  print_message("%s%s %s: loss %.2g, gradients %.2g away\n", name, model_file, which, loss_error, worst);
  assert_true(loss_error <= 1e-5);
  assert_true(worst <= 1e-4);
  sfa_learner_destroy(learner);
  sfa_context_destroy(ctx);
}

static void gradients(void **state) {
  (void)state;
  const sfa_learn_options options = {.max_tokens = N_TOKENS, .loss_tokens = 32};
  for (int i = 0; i < N_FAMILIES; i++) {
    against_file(families[i], "", "dense", &options);
    against_file(families[i], "", "sfa", &options);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(gradients),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
