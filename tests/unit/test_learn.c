/* Models that learn: gradients of every family against PyTorch autograd (tools/make_gradient_golden.py), dense and sparse; the same bits
 * for any threads, instruction set and with checkpointing; conversion's losses by central differences; arguments that are wrong. */
#include "unit_tools.h"

#include "temp_files.h"

#include "file/save.h"
#include "file/weights_write.h"
#include "model/learn.h"
#include "model/model.h"
#include "train/optimizer.h"

#include <math.h>
#include <stdio.h>
#include <unistd.h>

#define GOLDEN SFA_TEST_DATA "/golden/"

enum { N_TOKENS = 80, FIRST_LEN = 50, N_SUMS = 4, MOST_SAMPLES = 24 };
static const int32_t cu_seqlens[] = {0, FIRST_LEN, N_TOKENS};
static const char *const families[] = {"llama", "qwen2", "qwen3", "gpt2", "gemma3"};
enum { N_FAMILIES = sizeof families / sizeof *families };

static sfa_learner *open_learner(sfa_context *ctx, const char *name, const char *file, const sfa_learn_options *options) {
  char path[512];
  sfa_weights *weights;
  sfa_learner *learner = NULL;
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
  sfa_learn_sparsity sparsity = {
      .k_keys = k_keys, .k_queries = k_queries, .pre_rope = strcmp(which, "pre") == 0, .two_of_four = strcmp(which, "two") == 0};
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
  against_file("qwen3", "", "pre", &options);
  against_file("qwen3", "", "two", &options);
}

/* 50 steps of AdamW from the golden model: the losses of PyTorch. */
static void follow(const char *name, const char *which) {
  char path[512], word[32];
  const sfa_learn_options options = {.max_tokens = N_TOKENS};
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  sfa_learner *learner = open_learner(ctx, name, "", &options);
  int32_t k_keys[64] = {0}, k_queries[64] = {0};
  double loss, worst = 0;
  snprintf(path, sizeof path, GOLDEN "gradients/%s_%s.txt", name, which);
  FILE *file = fopen(path, "r");
  assert_non_null(file);
  assert_int_equal(fscanf(file, "%31s %lf %*d", word, &loss), 2);
  read_numbers(file, "k_keys", k_keys, 64);
  read_numbers(file, "k_queries", k_queries, 64);
  fclose(file);
  sfa_learn_sparsity sparsity = {.k_keys = k_keys, .k_queries = k_queries};
  assert_int_equal(sfa_learner_sparsity(learner, &sparsity), SFA_OK);
  text t = read_text(name);
  sfa_learn_batch batch = batch_of(&t);
  batch.loss_scale = 1.0f / 67; /* scored tokens */
  const sfa_recipe recipe = {.steps = 50,
                             .learning_rate = 1e-3,
                             .final_learning_rate = 1e-3,
                             .beta1 = 0.9,
                             .beta2 = 0.95,
                             .epsilon = 1e-8,
                             .weight_decay = 0.1,
                             .clip_norm = 1};
  sfa_optimizer optimizer;
  assert_int_equal(sfa_optimizer_create(ctx, learner, &optimizer), SFA_OK);
  snprintf(path, sizeof path, GOLDEN "gradients/%s_%s_steps.txt", name, which);
  file = fopen(path, "r");
  assert_non_null(file);
  for (int64_t step = 0; step < recipe.steps; step++) {
    sfa_learner_clear(learner);
    sfa_learn_result result = must_run(ctx, learner, &batch);
    assert_int_equal(fscanf(file, "%lf", &loss), 1);
    worst = fmax(worst, fabs(result.loss_sum / (double)result.n_scored - loss));
    assert_int_equal(sfa_optimizer_step(&optimizer, &recipe, step), SFA_OK);
  }
  fclose(file);
  print_message("%s %s: losses %.2g away over 50 steps, the last %.4f\n", name, which, worst, loss);
  assert_true(worst <= 1e-4);
  sfa_optimizer_free(&optimizer);
  sfa_learner_destroy(learner);
  sfa_context_destroy(ctx);
}

static void steps(void **state) {
  (void)state;
  follow("qwen2", "dense");
  follow("gpt2", "dense");
  follow("qwen3", "sfa");
}

/* A GGUF file becomes the same parameters: rows of q and k in their places, GPT-2's matrices turned. */
static void gradients_from_gguf(void **state) {
  (void)state;
  const sfa_learn_options options = {.max_tokens = N_TOKENS};
  against_file("llama", "/model.gguf", "dense", &options);
  against_file("qwen3", "/model.gguf", "sfa", &options);
  against_file("gpt2", "/model.gguf", "sfa", &options);
}

/* ---- The same bits ---------------------------------------------------------------------------------------------------------------- */

/* Every gradient, one after the other. */
static float *all_gradients(sfa_learner *learner, int64_t *n) {
  *n = 0;
  for (int32_t i = 0; i < sfa_learner_count(learner); i++)
    *n += sfa_learner_parameter(learner, i)->n;
  float *all = memory((size_t)*n * sizeof *all), *to = all;
  for (int32_t i = 0; i < sfa_learner_count(learner); i++) {
    const sfa_parameter *p = sfa_learner_parameter(learner, i);
    memcpy(to, p->gradient, (size_t)p->n * sizeof *to);
    to += p->n;
  }
  return all;
}

static void set_sparsity(sfa_context *ctx, sfa_learner *learner, int32_t k, int32_t k_q, sfa_learn_sparsity sparsity) {
  sfa_learner_shape shape = sfa_learner_shape_of(learner);
  int32_t k_keys[64], k_queries[64];
  for (int32_t i = 0; i < shape.n_layers * shape.n_kv_heads; i++) {
    k_keys[i] = k;
    k_queries[i] = k_q;
  }
  sparsity.k_keys = k_keys;
  sparsity.k_queries = k_queries;
  if (sfa_learner_sparsity(learner, &sparsity) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
}

static float *gradients_with(const char *name, int32_t n_threads, sfa_isa isa, const sfa_learn_options *options, int64_t *n) {
  sfa_context *ctx = new_context(n_threads, isa);
  sfa_learner *learner = open_learner(ctx, name, "", options);
  text t = read_text(name);
  sfa_learn_batch batch = batch_of(&t);
  set_sparsity(ctx, learner, 4, 4, (sfa_learn_sparsity){.two_of_four = true, .gumbel_scale = 0.5f, .gumbel_seed = 3});
  must_run(ctx, learner, &batch);
  float *all = all_gradients(learner, n);
  sfa_learner_destroy(learner);
  sfa_context_destroy(ctx);
  return all;
}

static void same_bits(void **state) {
  (void)state;
  const sfa_learn_options plain = {.max_tokens = N_TOKENS, .loss_tokens = 48},
                          less = {.max_tokens = 2 * N_TOKENS, .loss_tokens = 48, .checkpointing = true};
  static const char *const names[] = {"gpt2", "gemma3"};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    int64_t n, n_other;
    float *first = gradients_with(names[i], 1, SFA_ISA_DEFAULT, &plain, &n);
    const struct {
      int32_t n_threads;
      sfa_isa isa;
      const sfa_learn_options *options;
    } others[] = {
        {2, SFA_ISA_DEFAULT, &plain}, {3, SFA_ISA_DEFAULT, &less}, {2, isa_at_most(SFA_ISA_AVX2), &plain}, {2, SFA_ISA_SCALAR, &plain}};
    for (size_t o = 0; o < sizeof others / sizeof *others; o++) {
      float *other = gradients_with(names[i], others[o].n_threads, others[o].isa, others[o].options, &n_other);
      assert_int_equal(n, n_other);
      assert_memory_equal(first, other, (size_t)n * sizeof *first);
      free(other);
    }
    free(first);
  }
}

/* Operands in bf16, on AMX by its instructions and attention's with them: gradients of dense rows, whose supports cannot move, within such
 * roundings of f32's, and the same bits for any threads. */
static void short_products(void **state) {
  (void)state;
  const sfa_learn_options options[] = {{.max_tokens = N_TOKENS, .loss_tokens = 48},
                                       {.max_tokens = N_TOKENS, .loss_tokens = 48, .bf16_products = true}};
  for (int i = 0; i < N_FAMILIES; i++) {
    float *found[3]; /* f32; bf16 on one thread, and on three */
    int64_t n = 0;
    text t = read_text(families[i]);
    sfa_learn_batch batch = batch_of(&t);
    for (int run = 0; run < 3; run++) {
      sfa_context *ctx = new_context(run == 2 ? 3 : 1, SFA_ISA_DEFAULT);
      sfa_learner *learner = open_learner(ctx, families[i], "", &options[run > 0]);
      set_sparsity(ctx, learner, 0, 0, (sfa_learn_sparsity){.gumbel_scale = 0});
      must_run(ctx, learner, &batch);
      found[run] = all_gradients(learner, &n);
      sfa_learner_destroy(learner);
      sfa_context_destroy(ctx);
    }
    double apart = 0, size = 0;
    for (int64_t at = 0; at < n; at++) {
      apart += ((double)found[1][at] - (double)found[0][at]) * ((double)found[1][at] - (double)found[0][at]);
      size += (double)found[0][at] * (double)found[0][at];
    }
    if (!(apart > 0 && sqrt(apart / size) <= 0.1))
      fail_msg("%s: gradients in bf16 are %g of their norm away", families[i], sqrt(apart / size));
    assert_memory_equal(found[1], found[2], (size_t)n * sizeof(float));
    for (int run = 0; run < 3; run++)
      free(found[run]);
  }
}

/* ---- Slopes ----------------------------------------------------------------------------------------------------------------------- */

static double loss_of(const sfa_learn_batch *batch, const sfa_learn_result *r) {
  double temperature = batch->temperature > 0 ? (double)batch->temperature : 1.0;
  return (batch->loss_weight < 0 ? 0.0 : r->loss_sum) + (double)batch->head_weight * (double)r->n_scored * r->head_loss +
         (double)batch->teacher_weight * temperature * temperature * r->teacher_sum;
}

static void move(sfa_learner *learner, double step) {
  sfa_rng rng = {77};
  for (int32_t i = 0; i < sfa_learner_count(learner); i++) {
    sfa_parameter *p = sfa_learner_parameter(learner, i);
    for (int64_t e = 0; e < p->n; e++)
      p->value[e] += (float)(step * sfa_rng_normal(&rng));
  }
}

/* The gradient along a random direction against the change of the loss along it. */
static void assert_slope(sfa_context *ctx, sfa_learner *learner, sfa_learn_batch batch, const char *what) {
  const double step = 2e-4;
  double along = 0, losses[2];
  sfa_rng rng = {77};
  batch.backward = true;
  sfa_learner_clear(learner);
  must_run(ctx, learner, &batch);
  for (int32_t i = 0; i < sfa_learner_count(learner); i++) {
    const sfa_parameter *p = sfa_learner_parameter(learner, i);
    for (int64_t e = 0; e < p->n; e++)
      along += (double)p->gradient[e] * sfa_rng_normal(&rng);
  }
  batch.backward = false;
  for (int side = 0; side < 2; side++) {
    move(learner, side ? -2 * step : step);
    sfa_learn_result result = must_run(ctx, learner, &batch);
    losses[side] = loss_of(&batch, &result);
  }
  move(learner, step);
  double slope = (losses[0] - losses[1]) / (2 * step);
  print_message("%s: %.6g along the gradient, %.6g by differences\n", what, along, slope);
  assert_true(fabs(slope - along) <= 0.01 * fabs(along) + 0.02);
}

typedef struct teacher {
  int32_t vocab;
} teacher;

static sfa_status teach(void *user, int32_t first, int32_t n, float *logits) {
  const teacher *t = user;
  sfa_rng rng = {(uint64_t)first + 5};
  for (int64_t i = 0; i < (int64_t)n * t->vocab; i++)
    logits[i] = (float)(2 * sfa_rng_normal(&rng));
  return SFA_OK;
}

static void conversion(void **state) {
  (void)state;
  const sfa_learn_options options = {.max_tokens = N_TOKENS, .loss_tokens = 32, .checkpointing = true};
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  sfa_learner *learner = open_learner(ctx, "gemma3", "", &options);
  sfa_learner_shape shape = sfa_learner_shape_of(learner);
  text t = read_text("gemma3");
  teacher user = {shape.vocab_size};
  int64_t n = (int64_t)N_TOKENS * shape.n_heads * shape.head_dim_v;
  float *targets[4], *outputs[4] = {memory((size_t)n * sizeof(float)), NULL, NULL, NULL};
  assert_int_equal(shape.n_layers, 4);
  for (int i = 0; i < 4; i++)
    targets[i] = i == 1 ? NULL : normals((uint64_t)i, n);

  sfa_learn_batch batch = batch_of(&t);
  assert_slope(ctx, learner, batch, "the next token");
  batch.loss_weight = -1;
  batch.head_targets = (const float *const *)targets;
  batch.head_weight = 3;
  batch.head_outputs = outputs;
  assert_slope(ctx, learner, batch, "heads");
  batch.head_targets = NULL;
  batch.teacher = teach;
  batch.teacher_user = &user;
  batch.teacher_weight = 0.5f;
  batch.temperature = 2;
  assert_slope(ctx, learner, batch, "a teacher");

  /* Heads that are what they should be cost nothing. */
  memcpy(targets[0], outputs[0], (size_t)n * sizeof(float));
  batch = batch_of(&t);
  batch.backward = false;
  batch.head_outputs = outputs;
  must_run(ctx, learner, &batch);
  memcpy(targets[0], outputs[0], (size_t)n * sizeof(float));
  free(targets[2]), free(targets[3]);
  targets[2] = targets[3] = NULL;
  batch.head_targets = (const float *const *)targets;
  assert_true(must_run(ctx, learner, &batch).head_loss == 0);
  free(targets[0]), free(outputs[0]);
  sfa_learner_destroy(learner);
  sfa_context_destroy(ctx);
}

/* Features that are kept are counted; noise follows its seed. */
static void supports(void **state) {
  (void)state;
  const sfa_learn_options options = {.max_tokens = N_TOKENS};
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  sfa_learner *learner = open_learner(ctx, "qwen3", "", &options);
  sfa_learner_shape shape = sfa_learner_shape_of(learner);
  text t = read_text("qwen3");
  sfa_learn_batch batch = batch_of(&t);
  size_t n_uses = (size_t)shape.n_layers * (size_t)shape.n_kv_heads * (size_t)shape.head_dim;
  int64_t *keys = calloc(n_uses, sizeof *keys), *queries = calloc(n_uses, sizeof *queries), n_keys = 0, n_queries = 0;
  set_sparsity(ctx, learner, 8, 8, (sfa_learn_sparsity){.two_of_four = true});
  batch.backward = false;
  batch.key_uses = keys;
  batch.query_uses = queries;
  must_run(ctx, learner, &batch);
  for (size_t i = 0; i < n_uses; i++) {
    n_keys += keys[i];
    n_queries += queries[i];
    assert_in_range(keys[i], 0, N_TOKENS);
  }
  assert_int_equal(n_keys, 8 * N_TOKENS * shape.n_layers * shape.n_kv_heads);
  assert_int_equal(n_queries, 8 * N_TOKENS * shape.n_layers * shape.n_heads);

  /* Noise is what it was for the same seed, and another for another. */
  double losses[3];
  for (int i = 0; i < 3; i++) {
    set_sparsity(ctx, learner, 8, 8, (sfa_learn_sparsity){.gumbel_scale = 1, .gumbel_seed = (uint64_t)i / 2});
    losses[i] = must_run(ctx, learner, &batch).loss_sum;
  }
  assert_true(losses[0] == losses[1]);
  assert_true(losses[0] != losses[2]);
  free(keys), free(queries);
  sfa_learner_destroy(learner);
  sfa_context_destroy(ctx);
}

/* ---- Wide heads ------------------------------------------------------------------------------------------------------------------- */

enum { WIDE_TENSORS = 2 + 2 * 9, WIDE_VOCAB = 50, WIDE_HIDDEN = 32 };
static const char wide_config[] =
    "{\"model_type\": \"llama\", \"hidden_size\": 32, \"intermediate_size\": 48, \"num_hidden_layers\": 2, \"num_attention_heads\": 2,"
    " \"num_key_value_heads\": 1, \"head_dim\": 32, \"v_head_dim\": 16, \"max_position_embeddings\": 128, \"rms_norm_eps\": 1e-6,"
    " \"rope_theta\": 10000.0, \"hidden_act\": \"silu\", \"tie_word_embeddings\": true}";

static void write_wide(sfa_context *ctx, const char *folder, const sfa_tensor_out *tensors) {
  char path[128];
  snprintf(path, sizeof path, "%s/config.json", folder);
  assert_int_equal(sfa_save_file(ctx, path, wide_config, sizeof wide_config - 1), SFA_OK);
  snprintf(path, sizeof path, "%s/model.safetensors", folder);
  assert_int_equal(sfa_safetensors_write(ctx, path, WIDE_TENSORS, tensors), SFA_OK);
}

/* The shapes of a model whose queries and keys have 32 features and whose values have 16; all zeros. */
static void write_wide_zeros(sfa_context *ctx, const char *folder) {
  static const struct {
    const char *name;
    int64_t rows, columns;
  } layer[] = {{"input_layernorm", 32, 0},   {"self_attn.q_proj", 64, 32}, {"self_attn.k_proj", 32, 32},
               {"self_attn.v_proj", 16, 32}, {"self_attn.o_proj", 32, 32}, {"post_attention_layernorm", 32, 0},
               {"mlp.gate_proj", 48, 32},    {"mlp.up_proj", 48, 32},      {"mlp.down_proj", 32, 48}};
  char names[WIDE_TENSORS][64];
  sfa_tensor_out tensors[WIDE_TENSORS] = {
      {.name = "model.embed_tokens.weight", .type = SFA_TENSOR_F32, .n_dims = 2, .shape = {WIDE_VOCAB, WIDE_HIDDEN, 1, 1}},
      {.name = "model.norm.weight", .type = SFA_TENSOR_F32, .n_dims = 1, .shape = {WIDE_HIDDEN, 1, 1, 1}}};
  for (int i = 0; i < 18; i++) {
    snprintf(names[i], sizeof names[i], "model.layers.%d.%s.weight", i / 9, layer[i % 9].name);
    bool matrix = layer[i % 9].columns > 0;
    tensors[2 + i] = (sfa_tensor_out){.name = names[i],
                                      .type = SFA_TENSOR_F32,
                                      .n_dims = matrix ? 2 : 1,
                                      .shape = {layer[i % 9].rows, matrix ? layer[i % 9].columns : 1, 1, 1}};
  }
  write_wide(ctx, folder, tensors);
}

static void write_parameters(sfa_context *ctx, const char *folder, sfa_learner *learner) {
  sfa_tensor_out tensors[WIDE_TENSORS];
  assert_int_equal(sfa_learner_count(learner), WIDE_TENSORS);
  for (int32_t i = 0; i < WIDE_TENSORS; i++) {
    const sfa_parameter *p = sfa_learner_parameter(learner, i);
    tensors[i] = (sfa_tensor_out){
        .name = p->name, .type = SFA_TENSOR_F32, .n_dims = p->n_dims, .shape = {p->shape[0], p->shape[1], 1, 1}, .values = p->value};
  }
  write_wide(ctx, folder, tensors);
}

/* A model that was saved says in the engine what it said while it learned. */
static void assert_same_logits(sfa_context *ctx, const char *folder, sfa_learner *learner, int32_t k) {
  int32_t tokens[N_TOKENS];
  float *hidden = memory((size_t)N_TOKENS * WIDE_HIDDEN * sizeof(float)), *found = memory((size_t)N_TOKENS * WIDE_VOCAB * sizeof(float));
  float *wanted = memory((size_t)N_TOKENS * WIDE_VOCAB * sizeof(float));
  for (int i = 0; i < N_TOKENS; i++)
    tokens[i] = i * i % WIDE_VOCAB;
  sfa_learn_batch batch = {.n_tokens = N_TOKENS, .n_sequences = 1, .tokens = tokens, .hidden = hidden};
  must_run(ctx, learner, &batch);
  assert_int_equal(sfa_learner_logits(learner, N_TOKENS, hidden, wanted), SFA_OK);

  sfa_weights *weights;
  sfa_model *model;
  sfa_forward *forward;
  int64_t ns = 0;
  sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = k > 0, .k = k, .k_q = -1, .cache_k = SFA_F32, .cache_v = SFA_F32};
  assert_int_equal(sfa_weights_open(ctx, folder, &weights), SFA_OK);
  if (sfa_model_load(ctx, weights, SFA_WEIGHTS_F32, &model) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  assert_int_equal(sfa_forward_create(model, &choice, 128, 32, &forward), SFA_OK);
  for (int32_t first = 0; first < N_TOKENS; first += 16)
    assert_int_equal(sfa_forward_run(forward, tokens + first, 16, hidden + first * WIDE_HIDDEN, &ns), SFA_OK);
  assert_int_equal(sfa_model_logits(model, N_TOKENS, hidden, found), SFA_OK);
  for (int i = 0; i < N_TOKENS * WIDE_VOCAB; i++)
    assert_true(fabs((double)found[i] - (double)wanted[i]) <= 1e-4);
  sfa_forward_destroy(forward);
  sfa_model_destroy(model);
  free(hidden), free(found), free(wanted);
}

static void wide(void **state) {
  (void)state;
  char folder[TEMP_DIR_BYTES];
  const sfa_learn_options options = {.max_tokens = N_TOKENS};
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  sfa_weights *weights;
  sfa_learner *learner;
  make_temp_dir(folder);
  write_wide_zeros(ctx, folder);
  assert_int_equal(sfa_weights_open(ctx, folder, &weights), SFA_OK);
  if (sfa_learner_create(ctx, weights, &options, &learner) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  sfa_learner_init_random(learner, 4);
  move(learner, 0.2);

  text t;
  for (int i = 0; i < N_TOKENS; i++) {
    t.tokens[i] = i * 7 % WIDE_VOCAB;
    t.targets[i] = i * 11 % WIDE_VOCAB;
  }
  sfa_learn_batch batch = batch_of(&t);
  assert_slope(ctx, learner, batch, "wide heads");
  write_parameters(ctx, folder, learner);
  assert_same_logits(ctx, folder, learner, 0);
  set_sparsity(ctx, learner, 8, 0, (sfa_learn_sparsity){0});
  assert_same_logits(ctx, folder, learner, 8);
  sfa_learner_destroy(learner);
  sfa_context_destroy(ctx);
  remove_tree(folder);
}

/* ---- Use -------------------------------------------------------------------------------------------------------------------------- */

/* What learns gets the gradient that it would get among the others; what is frozen gets none. Batches add up. */
static void frozen(void **state) {
  (void)state;
  const sfa_learn_options options = {.max_tokens = N_TOKENS};
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  sfa_learner *learner = open_learner(ctx, "qwen2", "", &options);
  text t = read_text("qwen2");
  sfa_learn_batch batch = batch_of(&t);
  int64_t n, at = 0;
  must_run(ctx, learner, &batch);
  float *all = all_gradients(learner, &n);
  for (int32_t i = 0; i < sfa_learner_count(learner); i++) {
    sfa_parameter *p = sfa_learner_parameter(learner, i);
    p->trainable = p->layer == 1 && (p->role == SFA_ROLE_Q || p->role == SFA_ROLE_K);
  }
  sfa_learner_clear(learner);
  batch.loss_scale = 0.5f;
  must_run(ctx, learner, &batch);
  must_run(ctx, learner, &batch);
  for (int32_t i = 0; i < sfa_learner_count(learner); i++) {
    const sfa_parameter *p = sfa_learner_parameter(learner, i);
    double most = 0, apart = 0;
    for (int64_t e = 0; e < p->n; e++) {
      most = fmax(most, fabs((double)all[at + e]));
      apart = fmax(apart, fabs((double)p->gradient[e] - (p->trainable ? (double)all[at + e] : 0.0)));
    }
    assert_true(apart <= (p->trainable ? 1e-5 * most : 0.0));
    at += p->n;
  }
  free(all);
  sfa_learner_destroy(learner);
  sfa_context_destroy(ctx);
}

static void random_start(void **state) {
  (void)state;
  const sfa_learn_options options = {.max_tokens = N_TOKENS};
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  sfa_learner *learner = open_learner(ctx, "gpt2", "", &options);
  text t = read_text("gpt2");
  sfa_learn_batch batch = batch_of(&t);
  sfa_learner_init_random(learner, 9);
  for (int32_t i = 0; i < sfa_learner_count(learner); i++) {
    const sfa_parameter *p = sfa_learner_parameter(learner, i);
    double squares = 0;
    for (int64_t e = 0; e < p->n; e++)
      squares += (double)p->value[e] * (double)p->value[e];
    bool scaled = p->role == SFA_ROLE_O || p->role == SFA_ROLE_DOWN, weight = strstr(p->name, "weight") != NULL;
    double wanted = p->decays ? 0.02 / (scaled ? 2.0 : 1.0) : weight ? 1.0 : 0.0; /* 2 layers */
    assert_true(fabs(sqrt(squares / (double)p->n) - wanted) <= 0.06 * wanted);
  }
  /* Knows nothing: the loss is that of a guess. */
  sfa_learn_result result = must_run(ctx, learner, &batch);
  assert_true(fabs(result.loss_sum / (double)result.n_scored - log(200.0)) < 0.05);
  sfa_learner_destroy(learner);
  sfa_context_destroy(ctx);
}

static void wrong_arguments(void **state) {
  (void)state;
  const sfa_learn_options options = {.max_tokens = N_TOKENS};
  sfa_context *ctx = new_context(2, SFA_ISA_DEFAULT);
  sfa_learner *learner = open_learner(ctx, "gpt2", "", &options);
  text t = read_text("gpt2"), bad = t;
  sfa_learn_batch batch = batch_of(&t);
  sfa_learn_result result;
  const int32_t gap[] = {0, 90, N_TOKENS}, missing[] = {0, 10, 20}, k[12] = {9, 0}, none[12] = {0};
  sfa_learn_sparsity sparsity = {.k_keys = k, .k_queries = none};
  assert_int_equal(sfa_learner_sparsity(learner, &sparsity), SFA_ERROR_ARGUMENT);
  assert_non_null(strstr(sfa_context_error(ctx), "9 features"));
  sparsity = (sfa_learn_sparsity){.gumbel_scale = 3};
  assert_int_equal(sfa_learner_sparsity(learner, &sparsity), SFA_ERROR_ARGUMENT);
  batch.n_tokens = N_TOKENS + 1;
  assert_int_equal(sfa_learner_run(learner, &batch, &result), SFA_ERROR_ARGUMENT);
  assert_non_null(strstr(sfa_context_error(ctx), "1 to 80"));
  batch.n_tokens = N_TOKENS;
  batch.cu_seqlens = gap;
  assert_int_equal(sfa_learner_run(learner, &batch, &result), SFA_ERROR_ARGUMENT);
  batch.cu_seqlens = missing;
  assert_int_equal(sfa_learner_run(learner, &batch, &result), SFA_ERROR_ARGUMENT);
  batch = batch_of(&bad);
  bad.tokens[3] = 200;
  assert_int_equal(sfa_learner_run(learner, &batch, &result), SFA_ERROR_RANGE);
  bad = t;
  bad.targets[3] = -2;
  assert_int_equal(sfa_learner_run(learner, &batch, &result), SFA_ERROR_RANGE);
  sfa_learner_destroy(learner);
  sfa_context_destroy(ctx);
}

/* Every allocation refused once: an error, and nothing stays behind. */
static void no_memory(void **state) {
  (void)state;
  const sfa_learn_options options = {.max_tokens = N_TOKENS};
  text t = read_text("llama");
  sfa_learn_batch batch = batch_of(&t);
  sfa_status status = SFA_ERROR_MEMORY;
  for (int64_t refuse = 2; status != SFA_OK; refuse += 7) { /* the first is the context */
    memory_account account = {.refuse = refuse};
    sfa_context *ctx = new_counted_context(1, &account);
    sfa_weights *weights;
    sfa_learner *learner = NULL;
    sfa_learn_result result;
    status = sfa_weights_open(ctx, GOLDEN "models/llama", &weights);
    if (status == SFA_OK)
      status = sfa_learner_create(ctx, weights, &options, &learner);
    if (status == SFA_OK)
      status = sfa_learner_run(learner, &batch, &result);
    assert_true(status == SFA_OK || status == SFA_ERROR_MEMORY);
    sfa_learner_destroy(learner);
    sfa_context_destroy(ctx);
    assert_int_equal(account.out, 0);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(gradients),    cmocka_unit_test(gradients_from_gguf),
      cmocka_unit_test(steps),        cmocka_unit_test(same_bits),
      cmocka_unit_test(conversion),   cmocka_unit_test(supports),
      cmocka_unit_test(frozen),       cmocka_unit_test(wide),
      cmocka_unit_test(random_start), cmocka_unit_test(wrong_arguments),
      cmocka_unit_test(no_memory),    cmocka_unit_test(short_products),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
