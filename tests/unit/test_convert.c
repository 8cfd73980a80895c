/* Conversion of a trained dense model: a teacher brings the heads nearer to the dense ones, what a part of the weights learned is a small
 * file that gives the same model when it is laid over, and files that do not belong together are refused. */
#include "unit_tools.h"

#include <math.h>

#include <sfa/train.h>

#include "model/learn.h"
#include "train_files.h"

/* Trains a new model, or `model` further. */
static void train(const char *out, const char *model, const char *recipe) {
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  const char *const recipes[] = {model ? "{}" : tiny_model, recipe}, *const data[] = {in_temp("data")};
  const sfa_train_options options = {
      .struct_size = sizeof options, .recipes = recipes, .n_recipes = 2, .model = model, .data = data, .n_data = 1, .out = in_temp(out)};
  sfa_train *t;
  if (sfa_train_open(ctx, &options, &t) != SFA_OK || sfa_train_run(t) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  sfa_train_close(t);
  sfa_context_destroy(ctx);
}

static int setup(void **state) {
  temp_begin(state);
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  train_make_shards(ctx, in_temp("data"), 1, 3000);
  sfa_context_destroy(ctx);
  train("dense", NULL, "{\"steps\": 60}");
  return 0;
}

enum { N = 20, MODEL_DIM = 4 * 16, LAYERS = 2, HEADS = 2 };

/* Head outputs [LAYERS][N][H * E] of a model with k features kept (0: all). */
static void heads_of(const char *model, int32_t k, float out[LAYERS][N * MODEL_DIM]) {
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  const sfa_learn_options options = {.max_tokens = N};
  int32_t ids[N], kept[LAYERS * HEADS];
  for (int i = 0; i < N; i++)
    ids[i] = (7 * i + 1) % TRAIN_VOCAB;
  for (int i = 0; i < LAYERS * HEADS; i++)
    kept[i] = k;
  const sfa_learn_sparsity sparsity = {.k_keys = kept, .k_queries = kept};
  sfa_weights *weights;
  sfa_learner *learner;
  sfa_learn_result result;
  float *heads[LAYERS] = {out[0], out[1]};
  assert_int_equal(sfa_weights_open(ctx, model, &weights), SFA_OK);
  assert_int_equal(sfa_learner_create(ctx, weights, &options, &learner), SFA_OK);
  assert_int_equal(sfa_learner_sparsity(learner, &sparsity), SFA_OK);
  const sfa_learn_batch batch = {.n_tokens = N, .n_sequences = 1, .tokens = ids, .head_outputs = heads};
  assert_int_equal(sfa_learner_run(learner, &batch, &result), SFA_OK);
  sfa_learner_destroy(learner);
  sfa_context_destroy(ctx);
}

/* Relative distance of the head outputs of a model with k = 4 to those of the dense model, mean over the layers. */
static double distance(const char *model) {
  static float dense[LAYERS][N * MODEL_DIM], sparse[LAYERS][N * MODEL_DIM];
  double total = 0;
  heads_of(in_temp("dense/model"), 0, dense);
  heads_of(model, 4, sparse);
  for (int layer = 0; layer < LAYERS; layer++) {
    double apart = 0, size = 0;
    for (int i = 0; i < N * MODEL_DIM; i++) {
      apart += pow((double)sparse[layer][i] - dense[layer][i], 2);
      size += pow(dense[layer][i], 2);
    }
    total += apart / size / LAYERS;
  }
  return total;
}

#define CONVERSION                                                                                                                         \
  "\"sparse_attention_config\": {\"k\": 4}, \"k_schedule\": \"fixed\", \"steps\": 60, \"sequences\": 2, \"sequence_len\": 24, "            \
  "\"learning_rate\": 0.003, \"warmup_steps\": 2"

static void test_heads_come_nearer(void **state) {
  (void)state;
  const char *dense = in_temp("dense/model");
  train("heads", dense, "{" CONVERSION ", \"loss_weight\": 0, \"head_weight\": 1}");
  assert_true(distance(in_temp("heads/model")) < 0.7 * distance(in_temp("dense/model")));
}

static void logits_of(const char *model, const char *adapter, float logits[TRAIN_VOCAB]) {
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  const sfa_model_options options = {.struct_size = sizeof options, .weights = SFA_WEIGHTS_F32, .adapter = adapter};
  const sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = 1};
  const sfa_session_options session_options = {.struct_size = sizeof session_options, .attention = &choice};
  const int32_t ids[] = {3, 18, 29, 20, 7};
  sfa_model *m;
  sfa_session *session;
  sfa_model_info info;
  if (sfa_model_open(ctx, model, &options, &m) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  sfa_model_describe(m, &info);
  assert_int_equal(info.sfa_k, 4);
  assert_int_equal(sfa_session_create(m, &session_options, &session), SFA_OK);
  assert_int_equal(sfa_session_append(session, ids, 5, logits), SFA_OK);
  sfa_session_destroy(session);
  sfa_model_close(m);
  sfa_context_destroy(ctx);
}

static int64_t file_bytes(const char *path) {
  size_t bytes;
  free(read_whole(path, &bytes));
  return (int64_t)bytes;
}

static void test_adapter(void **state) {
  (void)state;
  float whole[TRAIN_VOCAB], laid_over[TRAIN_VOCAB];
  train("qk", in_temp("dense/model"), "{" CONVERSION ", \"train\": \"qk\", \"teacher_weight\": 1, \"temperature\": 2}");
  logits_of(in_temp("qk/model"), NULL, whole);
  logits_of(in_temp("dense/model"), in_temp("qk/adapter"), laid_over);
  assert_memory_equal(whole, laid_over, sizeof whole);
  assert_true(file_bytes(in_temp("qk/adapter/adapter.safetensors")) < file_bytes(in_temp("qk/model/model.safetensors")) / 2);
}

static void expect_refused(const char *model, const char *adapter, const char *text) {
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  const sfa_model_options options = {.struct_size = sizeof options, .adapter = adapter};
  sfa_model *m;
  assert_int_not_equal(sfa_model_open(ctx, model, &options, &m), SFA_OK);
  if (!strstr(sfa_context_error(ctx), text))
    fail_msg("\"%s\" says nothing of \"%s\"", sfa_context_error(ctx), text);
  sfa_context_destroy(ctx);
}

static void test_wrong_adapters(void **state) {
  (void)state;
  train("wide", NULL,
        "{\"steps\": 1, \"model\": {\"model_type\": \"llama\", \"hidden_size\": 64, \"intermediate_size\": 48, \"num_hidden_layers\": 2, "
        "\"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"head_dim\": 16, \"max_position_embeddings\": 64, \"rms_norm_eps\": "
        "1e-5, \"rope_theta\": 10000, \"hidden_act\": \"silu\"}}");
  train("part", in_temp("dense/model"), "{" CONVERSION ", \"steps\": 1, \"train\": \"qk\"}");
  expect_refused(in_temp("wide/model"), in_temp("part/adapter"), "another model");
  expect_refused(in_temp("dense/model"), in_temp("dense/model"), "adapter.safetensors");
  expect_refused(SFA_TEST_DATA "/golden/models/stories260K/stories260K.bin", in_temp("part/adapter"), "directories");
}

static void test_teacher_wants_a_model(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  const char *const recipes[] = {tiny_model, "{\"head_weight\": 1}"}, *const data[] = {in_temp("data")};
  const sfa_train_options options = {
      .struct_size = sizeof options, .recipes = recipes, .n_recipes = 2, .data = data, .n_data = 1, .out = in_temp("new")};
  sfa_train *t;
  assert_int_equal(sfa_train_open(ctx, &options, &t), SFA_ERROR_ARGUMENT);
  assert_non_null(strstr(sfa_context_error(ctx), "teacher"));
  sfa_context_destroy(ctx);
}

/* ---- A k a head ---------------------------------------------------------------------------------------------------------------------- */

/* Logits [N][TRAIN_VOCAB] as the trainer's forward pass has them, in the way that the folder's config asks for. */
static void logits_of_learner(const char *model, const int32_t *ids, float *logits) {
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  const sfa_learn_options options = {.max_tokens = N};
  float hidden[N * 32];
  sfa_weights *weights;
  sfa_learner *learner;
  sfa_learn_result result;
  assert_int_equal(sfa_weights_open(ctx, model, &weights), SFA_OK);
  assert_int_equal(sfa_learner_create(ctx, weights, &options, &learner), SFA_OK);
  const sfa_learn_batch batch = {.n_tokens = N, .n_sequences = 1, .tokens = ids, .hidden = hidden};
  assert_int_equal(sfa_learner_run(learner, &batch, &result), SFA_OK);
  assert_int_equal(sfa_learner_logits(learner, N, hidden, logits), SFA_OK);
  sfa_learner_destroy(learner);
  sfa_context_destroy(ctx);
}

/* The same by the engine, over its cache: the prompt in one piece with the logits of its last token, or token by token with those of all.
 * Returns the cache's bytes a token. */
static size_t logits_of_engine(const char *model, sfa_dtype cache_k, bool by_token, const int32_t *ids, float *logits) {
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  const sfa_model_options options = {.struct_size = sizeof options, .weights = SFA_WEIGHTS_F32};
  const sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = 1, .cache_k = cache_k};
  const sfa_session_options session_options = {.struct_size = sizeof session_options, .attention = &choice};
  sfa_model *m;
  sfa_session *session;
  size_t bytes;
  if (sfa_model_open(ctx, model, &options, &m) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  assert_int_equal(sfa_session_create(m, &session_options, &session), SFA_OK);
  assert_int_equal(sfa_model_kv_bytes(m, &choice, &bytes), SFA_OK);
  if (!by_token)
    assert_int_equal(sfa_session_append(session, ids, N, logits), SFA_OK);
  for (int i = 0; i < N && by_token; i++)
    assert_int_equal(sfa_session_append(session, ids + i, 1, logits + i * TRAIN_VOCAB), SFA_OK);
  sfa_session_destroy(session);
  sfa_model_close(m);
  sfa_context_destroy(ctx);
  return bytes;
}

/* What sfa_session_inspect says that each head keeps. */
static void features_of_heads(const char *model, const int32_t *ids, sfa_head_report heads[LAYERS * HEADS]) {
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  const sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = 1, .cache_k = SFA_F32};
  const sfa_session_options options = {.struct_size = sizeof options, .attention = &choice};
  sfa_model *m;
  sfa_session *session;
  assert_int_equal(sfa_model_open(ctx, model, NULL, &m), SFA_OK);
  assert_int_equal(sfa_session_create(m, &options, &session), SFA_OK);
  assert_int_equal(sfa_session_inspect(session, ids, N, 4, heads, NULL), SFA_OK);
  sfa_session_destroy(session);
  sfa_model_close(m);
  sfa_context_destroy(ctx);
}

/* ||a - b|| / ||b|| */
static double apart(const float *a, const float *b, int64_t n) {
  double difference = 0, size = 0;
  for (int64_t i = 0; i < n; i++) {
    difference += pow((double)a[i] - (double)b[i], 2);
    size += pow((double)b[i], 2);
  }
  return sqrt(difference / size);
}

/* Every head keeps its own number: what the engine makes of a prompt and of single tokens is the trainer's forward pass, and is not that of
 * a layer whose heads all keep the most. The cache has slots for the most of a layer's heads. */
static void test_k_a_head(void **state) {
  (void)state;
  static const struct {
    const char *name, *sparsity;
    int32_t slots[LAYERS];
  } models[] = {{"by head", "{\"k\": [[3, 9], [12, 2]], \"k_q\": [[3, 7], [0, 2]]}", {9, 12}},
                {"keys", "{\"k\": [[3, 9], 4], \"k_q\": 0}", {9, 4}},
                {"rope", "{\"k\": [[2, 6], [1, 3]], \"order\": \"pre_rope\"}", {12, 6}},
                {"dense head", "{\"k\": [[0, 4], [5, 5]]}", {0, 5}},
                {"most", "{\"k\": [9, 12]}", {9, 12}}};
  float learner[5][N * TRAIN_VOCAB], steps[N * TRAIN_VOCAB], last[TRAIN_VOCAB];
  int32_t ids[N];
  for (int i = 0; i < N; i++)
    ids[i] = (7 * i * i + 1) % TRAIN_VOCAB;
  for (int m = 0; m < 5; m++) {
    char recipe[400], folder[TEMP_PATH_BYTES], gguf[TEMP_PATH_BYTES];
    snprintf(recipe, sizeof recipe, "{\"sparse_attention_config\": %s, \"k_schedule\": \"fixed\", \"steps\": 6, \"sequence_len\": 24}",
             models[m].sparsity);
    snprintf(folder, sizeof folder, "%s/%s/model", temp_dir, models[m].name);
    snprintf(gguf, sizeof gguf, "%s/%s.gguf", temp_dir, models[m].name);
    train(models[m].name, in_temp("dense/model"), recipe);
    logits_of_learner(folder, ids, learner[m]);
    sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
    assert_int_equal(sfa_model_export_gguf(ctx, folder, gguf, SFA_F32), SFA_OK);
    sfa_context_destroy(ctx);
    for (int file = 0; file < 2; file++) {
      const size_t bytes = logits_of_engine(file ? gguf : folder, SFA_F32, true, ids, steps);
      logits_of_engine(file ? gguf : folder, SFA_F32, false, ids, last);
      if (!(apart(steps, learner[m], N * TRAIN_VOCAB) < 2e-6 && apart(last, steps + (N - 1) * TRAIN_VOCAB, TRAIN_VOCAB) < 2e-6))
        fail_msg("%s: steps are %g off the trainer's, a prompt %g off its steps", models[m].name, apart(steps, learner[m], N * TRAIN_VOCAB),
                 apart(last, steps + (N - 1) * TRAIN_VOCAB, TRAIN_VOCAB));
      size_t wanted = 0; /* f32 values of 16, f32 keys of 16 or codes of 4 + 1 bytes a slot */
      for (int layer = 0; layer < LAYERS; layer++)
        wanted += HEADS * (16 * 4 + (models[m].slots[layer] ? (size_t)models[m].slots[layer] * 5 : 16 * 4));
      assert_int_equal(bytes, wanted);
    }
    logits_of_engine(folder, SFA_I8, true, ids, steps); /* zeros in slots change no row's scale */
    assert_true(apart(steps, learner[m], N * TRAIN_VOCAB) < 0.02);
  }
  assert_true(apart(learner[0], learner[4], N * TRAIN_VOCAB) > 0.01);
  static const int32_t of_keys[] = {3, 9, 12, 2}, of_queries[] = {3, 7, 16, 2};
  sfa_head_report heads[LAYERS * HEADS];
  features_of_heads(in_temp("by head/model"), ids, heads);
  for (int head = 0; head < LAYERS * HEADS; head++)
    assert_true(heads[head].k_keys == of_keys[head] && heads[head].k_queries == of_queries[head]);
}

/* ---- Sensitivity ------------------------------------------------------------------------------------------------------------------ */

static void test_sensitivity(void **state) {
  (void)state;
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  const char *const data[] = {in_temp("data")};
  const int32_t tried[] = {1, 8, 16};
  const sfa_sensitivity_options options = {
      .struct_size = sizeof options, .model = in_temp("dense/model"), .data = data, .n_data = 1, .window_len = 32, .k = tried, .n_k = 3};
  sfa_sensitivity *s;
  assert_int_equal(sfa_sensitivity_measure(ctx, &options, &s), SFA_OK);
  assert_int_equal(s->n_layers, LAYERS);
  assert_int_equal(s->n_kv_heads, HEADS);
  assert_int_equal(s->n_k, 2); /* 16 of 16 is everything */
  assert_true(s->dense_loss > 0 && s->dense_loss < log(TRAIN_VOCAB));
  double rises[2] = {0};
  for (int i = 0; i < 2; i++)
    for (int head = 0; head < LAYERS * HEADS; head++)
      rises[i] += fabs(s->rise[i * LAYERS * HEADS + head]);
  assert_true(rises[0] > 2 * rises[1] && rises[1] > 0);
  sfa_sensitivity_destroy(ctx, s);
  sfa_sensitivity_options wrong = options;
  wrong.window_len = 65; /* the context is 64 */
  assert_int_equal(sfa_sensitivity_measure(ctx, &wrong, &s), SFA_ERROR_ARGUMENT);
  wrong = options;
  wrong.k = (const int32_t[]){8, 4};
  wrong.n_k = 2;
  assert_int_equal(sfa_sensitivity_measure(ctx, &wrong, &s), SFA_ERROR_ARGUMENT);
  assert_null(s);
  sfa_context_destroy(ctx);
}

/* The best of all ways to share a budget out over n layers or heads (n_heads of each), by trying them. */
static double best_by_trying(const sfa_sensitivity *s, int32_t n, int32_t n_heads, int32_t share, int32_t left) {
  double best = share == n ? 0 : INFINITY;
  for (int32_t i = 0; share < n && i <= s->n_k; i++) {
    const int32_t k = i < s->n_k ? s->k[i] : s->head_dim;
    double rise = 0;
    for (int32_t g = 0; i < s->n_k && g < n_heads; g++)
      rise += s->rise[(i * n + share) * n_heads + g];
    if (k <= left)
      best = fmin(best, rise + best_by_trying(s, n, n_heads, share + 1, left - k));
  }
  return best;
}

static void test_allocation(void **state) {
  (void)state;
  enum { L = 4, G = 2, N_K = 3 };
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  int32_t tried[N_K] = {4, 8, 16}, k[L * G];
  double rise[N_K * L * G], sum, sums[2];
  sfa_rng rng = {5};
  for (int i = 0; i < N_K * L * G; i++)
    rise[i] = sfa_rng_uniform(&rng) / tried[i / (L * G)] - 0.01;
  const sfa_sensitivity s = {.n_layers = L, .n_kv_heads = G, .head_dim = 32, .n_k = N_K, .k = tried, .dense_loss = 2, .rise = rise};
  for (double mean = 4; mean <= 32; mean += 1.7) {
    for (int by_head = 0; by_head < 2; by_head++) {
      const int32_t n = by_head ? L * G : L, n_heads = by_head ? 1 : G;
      assert_int_equal(sfa_sensitivity_allocate(ctx, &s, mean, by_head, k, &sums[by_head]), SFA_OK);
      assert_true(fabs(sums[by_head] - best_by_trying(&s, n, n_heads, 0, (int32_t)floor(mean * n))) < 1e-12);
      int32_t used = 0;
      for (int head = 0; head < L * G; head++) {
        used += k[head];
        assert_true(by_head || k[head] == k[head / G * G]);
      }
      assert_true(used <= mean * L * G);
    }
    assert_true(sums[1] <= sums[0] + 1e-12); /* what heads share, layers may share too */
  }
  assert_int_equal(sfa_sensitivity_allocate(ctx, &s, 3.9, 0, k, &sum), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_sensitivity_allocate(ctx, &s, NAN, 0, k, &sum), SFA_ERROR_ARGUMENT);
  sfa_context_destroy(ctx);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_heads_come_nearer), cmocka_unit_test(test_adapter),
      cmocka_unit_test(test_wrong_adapters),    cmocka_unit_test(test_teacher_wants_a_model),
      cmocka_unit_test(test_k_a_head),          cmocka_unit_test(test_sensitivity),
      cmocka_unit_test(test_allocation),
  };
  return cmocka_run_group_tests(tests, setup, temp_end);
}
