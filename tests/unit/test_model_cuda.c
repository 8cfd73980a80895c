/* Models on a GPU against the CPU's: every family, prompts and steps of one token, dense and sparse, with the same session calls. Skipped
 * where there is no GPU.
 *
 *     test_model_cuda [PATTERN]     tests whose name matches, as spars*; none: all
 */
#include "engine/session.h"
#include "model/learn.h"
#include "model/model_parts.h"

#include <dlfcn.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>
#include <sfa/plan.h>
#include <sfa/stream.h>
#include <sfa/train.h>

#include "backend/backend.h"
#include "base/half.h"
#include "base/rng.h"
#include "train/optimizer.h"
#include "train_files.h"

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

static const char *name_of(const char *path) { return strncmp(path, MODELS, sizeof MODELS - 1) == 0 ? path + sizeof MODELS - 1 : path; }

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
  sfa_attention_choice planned = *choice;
  planned.policy = SFA_POLICY_AUTO; /* the CPU's */
  side a = open_side(cpu, path, format, &planned, chunk), b = open_side(gpu, path, format, choice, chunk);
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
  sfa_session_stats stats;
  sfa_session_stats_read(b.session, &stats);
  print_message("%-16s chunk %3d, k %2d, k_q %2d, %-7s: prompt %.2e, all %.2e of the CPU's logits\n", name_of(path), chunk,
                choice->sparse ? choice->k : 0, choice->k_q, sfa_policy_name(stats.prefill_policy), prompt, all);
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

static bool opens(const sfa_model *model, const sfa_attention_choice *choice, sfa_policy *policy) {
  sfa_session *session;
  sfa_session_stats stats = {0};
  const sfa_session_options options = {.struct_size = sizeof options, .attention = choice};
  if (sfa_session_create(model, &options, &session) != SFA_OK)
    return false;
  sfa_session_stats_read(session, &stats);
  *policy = stats.prefill_policy;
  sfa_session_destroy(session);
  return true;
}

/* What is asked for is what prompts are attended to by, as exactly as its numbers are; and what is no way of this GPU is refused. */
static void policies(void **state) {
  (void)state;
  if (!gpu)
    skip();
  sfa_policy found;
  side s = open_side(gpu, paths[0], SFA_WEIGHTS_BF16, NULL, 0);
  sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = 1, .k = 4};
  assert_true(opens(s.model, &choice, &found) && found == SFA_POLICY_BF16);
  choice.policy = SFA_POLICY_TILES;
  assert_true(!opens(s.model, &choice, &found) && strstr(sfa_context_error(gpu), "CPU"));
  choice.policy = SFA_POLICY_SP_INT8;
  const bool hopper = opens(s.model, &choice, &found);
  assert_true(hopper ? found == SFA_POLICY_SP_INT8 : strstr(sfa_context_error(gpu), "compute capability") != NULL);
  choice.precision = SFA_PRECISION_F32;
  assert_true(!opens(s.model, &choice, &found) && strstr(sfa_context_error(gpu), "SFA_PRECISION_F32"));
  close_side(&s);
  for (int i = 0; i < 5; i++)
    for (int policy = SFA_POLICY_BF16; policy <= (hopper ? SFA_POLICY_SP_INT8 : SFA_POLICY_BF16); policy++)
      for (int32_t k = 0; k <= 8; k += 8) {
        const bool whole = policy == SFA_POLICY_INT8 || policy == SFA_POLICY_SP_INT8;
        choice = (sfa_attention_choice){.struct_size = sizeof choice, .sparse = k > 0, .k = k, .policy = (sfa_policy)policy};
        compare(paths[i], SFA_WEIGHTS_BF16, &choice, 40, whole ? 1e-1 : k ? 6e-2 : 3e-2);
      }
}

/* A model that learned to attend by codes reads prompts by int8 where that is faster: heads beyond 64, keys stored as int8 codes. */
static void converted(void **state) {
  (void)state;
  if (!gpu)
    skip();
  static const char wide[] =
      "{\"model\": {\"model_type\": \"llama\", \"hidden_size\": 32, \"intermediate_size\": 48, \"num_hidden_layers\": 2, "
      "\"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"head_dim\": 128, \"max_position_embeddings\": 64, "
      "\"rms_norm_eps\": 1e-5, \"rope_theta\": 10000, \"hidden_act\": \"silu\"}, "
      "\"sparse_attention_config\": {\"k\": 16}, \"steps\": 1}";
  char directory[TEMP_DIR_BYTES], data_path[TEMP_PATH_BYTES], run_path[TEMP_PATH_BYTES], path[TEMP_PATH_BYTES + 8];
  make_temp_dir(directory);
  snprintf(data_path, sizeof data_path, "%s/data", directory);
  snprintf(run_path, sizeof run_path, "%s/run", directory);
  snprintf(path, sizeof path, "%s/model", run_path);
  train_make_shards(cpu, data_path, 1, 400);
  const char *const recipes[] = {tiny_model, wide}, *const data[] = {data_path};
  const sfa_train_options options = {
      .struct_size = sizeof options, .recipes = recipes, .n_recipes = 2, .data = data, .n_data = 1, .out = run_path};
  sfa_train *train;
  if (sfa_train_open(cpu, &options, &train) != SFA_OK || sfa_train_run(train) != SFA_OK)
    fail_msg("%s", sfa_context_error(cpu));
  sfa_train_close(train);
  side s = open_side(gpu, path, SFA_WEIGHTS_BF16, NULL, 0);
  sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = 1, .policy = SFA_POLICY_INT8};
  sfa_policy found;
  const sfa_policy wanted = opens(s.model, &choice, &found) ? SFA_POLICY_INT8 : SFA_POLICY_BF16;
  const struct {
    sfa_attention_choice choice;
    sfa_policy policy;
  } cases[] = {{{.sparse = 1}, wanted},
               {{.sparse = 1, .k = 32, .k_q = -1}, wanted},
               {{.sparse = 1, .policy = SFA_POLICY_BF16}, SFA_POLICY_BF16},
               {{.sparse = 1, .cache_k = SFA_BF16}, SFA_POLICY_BF16},
               {{.sparse = 0}, SFA_POLICY_BF16},
               {{.sparse = 1, .precision = SFA_PRECISION_F32}, SFA_POLICY_KEYS}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    choice = cases[i].choice;
    choice.struct_size = sizeof choice;
    assert_true(opens(s.model, &choice, &found));
    assert_int_equal(found, cases[i].policy);
  }
  close_side(&s);
  choice = (sfa_attention_choice){.struct_size = sizeof choice, .sparse = 1};
  compare(path, SFA_WEIGHTS_BF16, &choice, 24, 1e-1);
  remove_tree(directory);
}

/* What explain and inspect find is what they find on the CPU, up to features at the edge of a choice. */
static void look_into(const char *path, int32_t k) {
  enum { TOP = 5, MOST_REPORTS = 64 };
  const sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = k > 0, .k = k};
  side sides[2] = {open_side(cpu, path, SFA_WEIGHTS_BF16, &choice, 0), open_side(gpu, path, SFA_WEIGHTS_BF16, &choice, 0)};
  const int32_t n = (int32_t)(sides[0].info.context_len <= PROMPT ? sides[0].info.context_len - 1 : PROMPT),
                n_reports = sides[0].info.n_layers * sides[0].info.n_kv_heads;
  int32_t *ids = make_text(n, sides[0].info.vocab_size);
  sfa_explained_token tokens[2][TOP];
  static sfa_head_report reports[2][MOST_REPORTS];
  float mass[2][PROMPT], after[2];
  int64_t n_tokens[2];
  assert_true(n_reports <= MOST_REPORTS);
  for (int i = 0; i < 2; i++) {
    side *s = &sides[i];
    if (sfa_session_inspect(s->session, ids, n, 0, reports[i], NULL) != SFA_OK)
      fail_msg("inspect: %s", sfa_context_error(s->ctx));
    if (sfa_session_explain(s->session, NULL, TOP, tokens[i], &n_tokens[i], mass[i]) != SFA_OK)
      fail_msg("explain: %s", sfa_context_error(s->ctx));
    assert_int_equal(sfa_session_len(s->session), n);
    float *logits = malloc((size_t)s->info.vocab_size * sizeof *logits);
    assert_int_equal(sfa_session_append(s->session, ids, 1, logits), SFA_OK); /* the timeline goes on */
    after[i] = logits[0];
    free(logits);
  }
  double moved = 0;
  for (int32_t t = 0; t < n; t++)
    moved += fabs((double)mass[0][t] - (double)mass[1][t]);
  print_message("%-30s k %2d: mass moved %.1e, first token %lld of weight %.4f (%lld, %.4f), logit %.4f (%.4f)\n", name_of(path), k, moved,
                (long long)tokens[1][0].position, (double)tokens[1][0].mass, (long long)tokens[0][0].position, (double)tokens[0][0].mass,
                (double)after[1], (double)after[0]);
  assert_true(moved <= 0.1);
  assert_int_equal(n_tokens[0], n_tokens[1]);
  assert_true(fabs((double)tokens[0][0].mass - (double)tokens[1][0].mass) <= 0.02);
  for (int32_t r = 0; r < n_reports; r++) {
    const sfa_head_report *a = &reports[0][r], *b = &reports[1][r];
    assert_int_equal(a->k_keys, b->k_keys);
    assert_int_equal(a->k_queries, b->k_queries);
    assert_true(fabs((double)a->effective - (double)b->effective) <= 0.05 * (double)a->effective);
    assert_true(fabs((double)a->overlap - (double)b->overlap) <= 0.5);
    for (int level = 0; level < 3; level++)
      assert_true(fabs((double)a->keys_for[level] - (double)b->keys_for[level]) <= 0.1);
  }
  free(ids);
  for (int i = 0; i < 2; i++)
    close_side(&sides[i]);
}

static void looks(void **state) {
  (void)state;
  if (!gpu)
    skip();
  for (int i = 0; i < 5; i++) {
    look_into(paths[i], 0);
    look_into(paths[i], 8);
  }
}

/* Heads of a layer that keep different numbers of features. */
static void by_head(void **state) {
  (void)state;
  if (!gpu)
    skip();
  char directory[TEMP_DIR_BYTES];
  const sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = 1};
  make_variant(paths[0], "{", "{\"sparse_attention_config\": {\"k\": [[3, 6], [4, 2], 5], \"k_q\": [[3, 7], 0, 5]},", directory);
  compare(directory, SFA_WEIGHTS_BF16, &choice, 0, 6e-2);
  remove_tree(directory);
}

/* ---- Choices ---------------------------------------------------------------------------------------------------------------------- */

/* Where features nearly tie, products in 16 bits turn choices over, and where few features are kept the logits with them: by a tenth of
 * their norm here, as rounding the inputs of the CPU's own products does. So both halves are checked for themselves: of the GPU's rows the
 * CPU keeps what the GPU keeps, bit for bit; and with the GPU's choices the CPU's logits are as close as dense ones. */
static struct {
  sfa_backend noting, told;
  const sfa_backend *cpu, *gpu; /* as they are */
  uint8_t *kept;                /* whether the GPU kept a feature; all calls, one after the other */
  int64_t n, n_told;
} choices;

static sfa_status keep_noting(sfa_context *ctx, const sfa_keep_options *options, int64_t n_tokens, int32_t n_heads, int32_t head_dim,
                              float *x, int64_t token_stride) {
  const int64_t width = (int64_t)n_heads * head_dim, n = n_tokens * width;
  float *rows[2]; /* before, and after */
  for (int i = 0; i < 2; i++) {
    rows[i] = malloc((size_t)n * sizeof(float));
    if (i)
      assert_int_equal(choices.gpu->keep(ctx, options, n_tokens, n_heads, head_dim, x, token_stride), SFA_OK);
    for (int64_t t = 0; t < n_tokens; t++)
      assert_int_equal(sfa_memory_copy(ctx, rows[i] + t * width, x + t * token_stride, (size_t)width * sizeof(float)), SFA_OK);
    assert_int_equal(sfa_stream_wait(ctx), SFA_OK);
  }
  assert_int_equal(sfa_rows_keep(cpu, options, n_tokens, n_heads, head_dim, rows[0], width), SFA_OK);
  assert_memory_equal(rows[0], rows[1], (size_t)n * sizeof(float));
  choices.kept = realloc(choices.kept, (size_t)(choices.n + n));
  for (int64_t i = 0; i < n; i++)
    choices.kept[choices.n++] = rows[1][i] != 0;
  for (int i = 0; i < 2; i++)
    free(rows[i]);
  return SFA_OK;
}

static sfa_status keep_as_told(sfa_context *ctx, const sfa_keep_options *options, int64_t n_tokens, int32_t n_heads, int32_t head_dim,
                               float *x, int64_t token_stride) {
  (void)ctx, (void)options;
  assert_true(choices.n_told + n_tokens * n_heads * head_dim <= choices.n);
  for (int64_t t = 0; t < n_tokens; t++)
    for (int64_t i = 0; i < (int64_t)n_heads * head_dim; i++)
      x[t * token_stride + i] = choices.kept[choices.n_told++] ? x[t * token_stride + i] : 0.0f;
  return SFA_OK;
}

/* The logits of a prompt on a device whose backend is `backend`. */
static float *prompt_of(sfa_context *ctx, const sfa_backend *backend, const char *path, const int32_t *ids, int32_t chunk) {
  const sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = 1};
  side s = open_side(ctx, path, SFA_WEIGHTS_BF16, &choice, chunk);
  float *logits = malloc((size_t)PROMPT * (size_t)s.info.vocab_size * sizeof *logits);
  ctx->backend = backend;
  if (sfa_session_logits(s.session, ids, PROMPT, logits) != SFA_OK)
    fail_msg("prompt: %s", sfa_context_error(ctx));
  ctx->backend = ctx == cpu ? choices.cpu : choices.gpu;
  close_side(&s);
  return logits;
}

static void compare_choices(const char *path, const char *sparsity, int32_t chunk) {
  char directory[TEMP_DIR_BYTES], text[200];
  snprintf(text, sizeof text, "{\"sparse_attention_config\": %s,", sparsity);
  make_variant(path, "{", text, directory);
  enum { VOCAB = 200 }; /* of all these models */
  int32_t *ids = make_text(PROMPT, VOCAB);
  choices.n = choices.n_told = 0;
  float *found = prompt_of(gpu, &choices.noting, directory, ids, chunk), *alone = prompt_of(cpu, choices.cpu, directory, ids, chunk),
        *told = prompt_of(cpu, &choices.told, directory, ids, chunk);
  const double error = error_of(found, told, PROMPT * VOCAB);
  print_message("%-8s %-64s chunk %2d: %.2e of the CPU's logits, with its own choices %.2e\n", name_of(path), sparsity, chunk, error,
                error_of(found, alone, PROMPT * VOCAB));
  assert_true(choices.n > 0 && choices.n_told == choices.n);
  assert_true(error <= 3e-2);
  free(found), free(alone), free(told), free(ids);
  remove_tree(directory);
}

static void features_kept(void **state) {
  (void)state;
  if (!gpu)
    skip();
  /* The first is of a model with three layers of two kv heads. */
  static const char *const wishes[] = {"{\"k\": [[1, 3], [2, 1], 2], \"order\": \"pre_rope\"}", "{\"k\": 3, \"two_of_four\": true}",
                                       "{\"k\": 3, \"k_q\": 2, \"order\": \"pre_rope\", \"two_of_four\": true}"};
  choices.cpu = cpu->backend, choices.gpu = gpu->backend;
  choices.noting = *gpu->backend, choices.told = *cpu->backend;
  choices.noting.keep = keep_noting;
  choices.told.keep = keep_as_told;
  for (int i = 0; i < 3; i++)
    for (size_t wish = i > 0; wish < sizeof wishes / sizeof *wishes; wish++)
      for (int32_t chunk = 0; chunk <= 40; chunk += 40)
        compare_choices(paths[i], wishes[wish], chunk);
  free(choices.kept);
}

/* ---- Index files ------------------------------------------------------------------------------------------------------------------ */

enum { BEHIND = 40 };

static side load_side(sfa_context *ctx, const char *path, sfa_weight_format format, const sfa_attention_choice *choice, const char *file,
                      sfa_status *status) {
  side s = open_side(ctx, path, format, choice, 0);
  const sfa_session_options session = {.struct_size = sizeof session, .attention = choice};
  sfa_session_destroy(s.session);
  *status = sfa_session_load(s.model, &session, file, &s.session);
  return s;
}

/* Logits of the steps behind a prompt that `reader` has read, saved to a file, and `stepper` goes on with. */
static float *steps_behind(sfa_context *reader, sfa_context *stepper, const char *path, const sfa_attention_choice *choice,
                           const int32_t *ids, const char *file) {
  sfa_index_writer *writer;
  sfa_status status;
  side a = open_side(reader, path, SFA_WEIGHTS_BF16, choice, 0);
  assert_int_equal(sfa_session_append(a.session, ids, PROMPT, NULL), SFA_OK);
  assert_int_equal(sfa_index_writer_open(reader, file, &writer), SFA_OK);
  assert_int_equal(sfa_session_save(a.session, writer, NULL, 0), SFA_OK);
  sfa_index_writer_close(writer);
  close_side(&a);
  if (stepper == cpu) { /* a GPU's are bf16 then, too */
    side other = load_side(stepper, path, SFA_WEIGHTS_INT8, choice, file, &status);
    assert_int_equal(status, SFA_ERROR_ARGUMENT);
    assert_non_null(strstr(sfa_context_error(stepper), "weights"));
    sfa_model_close(other.model);
  }
  side b = load_side(stepper, path, SFA_WEIGHTS_BF16, choice, file, &status);
  if (status != SFA_OK)
    fail_msg("%s: %s", path, sfa_context_error(stepper));
  float *logits = malloc((size_t)BEHIND * (size_t)b.info.vocab_size * sizeof *logits);
  for (int32_t i = 0; i < BEHIND; i++)
    assert_int_equal(sfa_session_append(b.session, ids + PROMPT + i, 1, logits + (int64_t)i * b.info.vocab_size), SFA_OK);
  close_side(&b);
  remove(file);
  return logits;
}

static void index_files(void **state) {
  (void)state;
  if (!gpu)
    skip();
  char directory[TEMP_DIR_BYTES], file[TEMP_PATH_BYTES];
  make_temp_dir(directory);
  snprintf(file, sizeof file, "%s/index", directory);
  enum { VOCAB = 200 }; /* of all these models */
  int32_t *ids = make_text(PROMPT + BEHIND, VOCAB);
  for (int i = 0; i < 3; i++)
    for (int32_t k = 0; k <= 6; k += 6) {
      const sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = k > 0, .k = k};
      float *here = steps_behind(cpu, cpu, paths[i], &choice, ids, file), *there = steps_behind(gpu, gpu, paths[i], &choice, ids, file),
            *to_gpu = steps_behind(cpu, gpu, paths[i], &choice, ids, file), *to_cpu = steps_behind(gpu, cpu, paths[i], &choice, ids, file);
      const double alone = error_of(there, here, BEHIND * VOCAB), onto_gpu = error_of(to_gpu, here, BEHIND * VOCAB),
                   onto_cpu = error_of(to_cpu, here, BEHIND * VOCAB);
      print_message("%-8s k %d: read and gone on with on the GPU %.2e of the CPU's logits, read on the CPU %.2e, on the GPU %.2e\n",
                    name_of(paths[i]), k, alone, onto_gpu, onto_cpu);
      const double limit = k ? 6e-2 : 3e-2; /* as in families, sparse */
      assert_true(alone <= limit && onto_gpu <= limit && onto_cpu <= limit);
      free(here), free(there), free(to_gpu), free(to_cpu);
    }
  free(ids);
  remove_tree(directory);
}

/* ---- A model of the reader's ------------------------------------------------------------------------------------------------------- */

/* The CPU with inputs of its products rounded to bf16, as a GPU's are. */
static struct {
  const sfa_device *plain;
  sfa_device device;
} rounding;

static void linear_rounded(const sfa_context *ctx, int64_t n_rows, const float *x, int64_t x_stride, int32_t n_parts,
                           const sfa_linear_part *parts, void *scratch) {
  float *rounded = malloc((size_t)(n_rows * x_stride) * sizeof *rounded);
  for (int64_t i = 0; i < n_rows * x_stride; i++)
    rounded[i] = sfa_f32_from_bf16(sfa_bf16_from_f32(x[i]));
  rounding.plain->linear(ctx, n_rows, rounded, x_stride, n_parts, parts, scratch);
  free(rounded);
}

typedef struct own_case {
  int32_t k, k_q;
  bool pre_rope, two_of_four;
} own_case;

static float *own_logits(sfa_context *ctx, const char *path, const own_case *c, bool exact, bool rounds, const int32_t *ids, int32_t n) {
  const sfa_model_options options = {.struct_size = sizeof options, .weights = exact ? SFA_WEIGHTS_F32 : SFA_WEIGHTS_BF16};
  const sfa_dtype cache = exact ? SFA_F32 : 0;
  const sfa_attention_choice choice = {
      .struct_size = sizeof choice, .sparse = c->k > 0, .k = c->k, .k_q = c->k_q, .cache_k = cache, .cache_v = cache};
  const sfa_session_options session = {.struct_size = sizeof session, .attention = &choice};
  side s = {.ctx = ctx};
  if (sfa_model_open(ctx, path, &options, &s.model) != SFA_OK)
    fail_msg("%s: %s", path, sfa_context_error(ctx));
  s.model->config.pre_rope = c->pre_rope;
  s.model->config.two_of_four = c->two_of_four;
  if (rounds) {
    rounding.plain = s.model->device;
    rounding.device = *rounding.plain;
    rounding.device.linear = linear_rounded;
    s.model->device = &rounding.device;
  }
  sfa_model_describe(s.model, &s.info);
  if (sfa_session_create(s.model, &session, &s.session) != SFA_OK)
    fail_msg("%s: %s", path, sfa_context_error(ctx));
  float *logits = malloc((size_t)n * (size_t)s.info.vocab_size * sizeof *logits);
  run(&s, ids, n, logits);
  close_side(&s);
  return logits;
}

/* SFA_TEST_MODEL on text: the GPU's logits are as close to the CPU's in f32 as those of a CPU that rounds weights and the inputs of
 * products to bf16, but for a factor of 2: both are one draw of the same noise. */
static void own_model(void **state) {
  (void)state;
  const char *path = getenv("SFA_TEST_MODEL");
  if (!gpu || !path)
    skip();
  enum { N = PROMPT + 2 * AGAIN };
  static const own_case cases[] = {{0, 0, false, false}, {16, 0, false, false}, {32, 0, false, false}, {16, -1, false, false},
                                   {16, 0, true, false}, {16, 0, false, true},  {16, 0, true, true}};
  size_t n_bytes, n_ids = 0;
  int32_t *ids;
  char *text = read_whole(SFA_TEST_DATA "/golden/bpe_train/corpus.en", &n_bytes);
  sfa_tokenizer *tokenizer;
  if (sfa_tokenizer_open(cpu, path, &tokenizer) != SFA_OK || sfa_tokenizer_encode(tokenizer, text, n_bytes, 0, &ids, &n_ids) != SFA_OK)
    fail_msg("%s: %s", path, sfa_context_error(cpu));
  assert_true(n_ids >= N);
  const int64_t vocab = sfa_tokenizer_vocab_size(tokenizer);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    float *exact = own_logits(cpu, path, &cases[i], true, false, ids, N), *rounded = own_logits(cpu, path, &cases[i], false, true, ids, N),
          *found = own_logits(gpu, path, &cases[i], false, false, ids, N);
    const double prompt = error_of(found, exact, PROMPT * vocab), all = error_of(found, exact, N * vocab),
                 prompt_noise = error_of(rounded, exact, PROMPT * vocab), noise = error_of(rounded, exact, N * vocab);
    print_message("k %2d, k_q %2d%s%s: the GPU's logits %.2e from the CPU's in f32, %.2e with the steps; rounding there %.2e, %.2e\n",
                  cases[i].k, cases[i].k_q, cases[i].pre_rope ? ", before RoPE" : "", cases[i].two_of_four ? ", two of four" : "", prompt,
                  all, prompt_noise, noise);
    assert_true(prompt <= 2 * prompt_noise && all <= 2 * noise);
    free(exact), free(rounded), free(found);
  }
  sfa_free_ids(cpu, ids);
  sfa_tokenizer_close(tokenizer);
  free(text);
}

/* ---- Learning -------------------------------------------------------------------------------------------------------------------- */

enum { BATCH = 96, LENGTHS = 3 };

static sfa_learner *open_learner(sfa_context *ctx, const char *path, bool bf16) {
  sfa_weights *weights;
  sfa_learner *learner = NULL;
  const sfa_learn_options options = {.max_tokens = BATCH, .bf16_products = bf16, .loss_tokens = 40};
  if (sfa_weights_open(ctx, path, &weights) != SFA_OK || sfa_learner_create(ctx, weights, &options, &learner) != SFA_OK)
    fail_msg("%s: %s", path, sfa_context_error(ctx));
  return learner;
}

/* Steps of AdamW over one batch; losses [STEPS]. */
static void learn(sfa_context *ctx, sfa_learner *learner, int32_t k, int n_steps, double *losses) {
  static const int32_t cu_seqlens[LENGTHS + 1] = {0, 40, 41, BATCH};
  const sfa_learner_shape shape = sfa_learner_shape_of(learner);
  const sfa_training *ops = sfa_learner_training(learner);
  int32_t kept[256], *ids = make_text(BATCH + 1, shape.vocab_size), n = sfa_learner_count(learner);
  for (int i = 0; i < 256; i++)
    kept[i] = k;
  const sfa_learn_sparsity sparsity = {.k_keys = kept, .k_queries = kept};
  assert_int_equal(sfa_learner_sparsity(learner, &sparsity), SFA_OK);
  const sfa_learn_batch batch = {.n_tokens = BATCH,
                                 .n_sequences = LENGTHS,
                                 .tokens = ids,
                                 .targets = ids + 1,
                                 .cu_seqlens = cu_seqlens,
                                 .backward = true,
                                 .loss_scale = 1.0f / BATCH};
  float **moments = calloc((size_t)n * 2, sizeof *moments);
  for (int step = 0; step < n_steps; step++) {
    sfa_learn_result result;
    assert_int_equal(sfa_learner_clear(learner), SFA_OK);
    if (sfa_learner_run(learner, &batch, &result) != SFA_OK)
      fail_msg("a batch: %s", sfa_context_error(ctx));
    losses[step] = result.loss_sum / BATCH;
    for (int32_t i = 0; n_steps > 1 && i < n; i++) {
      const sfa_parameter *p = sfa_learner_parameter(learner, i);
      const sfa_adamw how = {.rate = 1e-3f,
                             .beta1 = 0.9f,
                             .beta2 = 0.95f,
                             .eps = 1e-8f,
                             .correction1 = (float)(1 - pow(0.9, step + 1)),
                             .correction2 = (float)(1 - pow(0.95, step + 1))};
      for (int m = 0; step == 0 && m < 2; m++) {
        assert_int_equal(sfa_memory_alloc(ctx, (size_t)p->n * sizeof(float), (void **)&moments[2 * i + m]), SFA_OK);
        assert_int_equal(sfa_memory_zero(ctx, moments[2 * i + m], (size_t)p->n * sizeof(float)), SFA_OK);
      }
      ops->adamw(ctx, &how, p->n, p->gradient, moments[2 * i], moments[2 * i + 1], p->value);
    }
  }
  for (int32_t i = 0; i < 2 * n; i++)
    sfa_memory_free(ctx, moments[i]);
  free(moments);
  free(ids);
}

static float *gradient_of(sfa_context *ctx, const sfa_parameter *p) {
  float *copy = malloc((size_t)p->n * sizeof *copy);
  assert_int_equal(sfa_memory_copy(ctx, copy, p->gradient, (size_t)p->n * sizeof *copy), SFA_OK);
  assert_int_equal(sfa_stream_wait(ctx), SFA_OK);
  return copy;
}

static void check_gradients(const char *path, int32_t k, bool bf16, double limit) {
  sfa_learner *a = open_learner(cpu, path, bf16), *b = open_learner(gpu, path, bf16);
  double losses[2], worst = 0;
  const char *where = "";
  learn(cpu, a, k, 1, &losses[0]);
  learn(gpu, b, k, 1, &losses[1]);
  for (int32_t i = 0; i < sfa_learner_count(a); i++) {
    const sfa_parameter *p = sfa_learner_parameter(a, i);
    float *expected = gradient_of(cpu, p), *found = gradient_of(gpu, sfa_learner_parameter(b, i));
    double error = error_of(found, expected, p->n);
    if (!(error <= worst))
      worst = error, where = p->name;
    free(expected);
    free(found);
  }
  print_message("%-30s k %2d %s: loss %.6f, the CPU's %.6f, gradients differ by %.2e at most, %s\n", name_of(path), k,
                bf16 ? "bf16" : "f32", losses[1], losses[0], worst, where);
  assert_true(fabs(losses[1] - losses[0]) <= 2e-3 * losses[0]);
  assert_true(worst <= limit);
  sfa_learner_destroy(a);
  sfa_learner_destroy(b);
}

static void gradients(void **state) {
  (void)state;
  if (!gpu)
    skip();
  for (int i = 0; i < 5; i++)
    for (int bf16 = 0; bf16 < 2; bf16++)
      check_gradients(paths[i], 0, bf16, bf16 ? 0.2 : 0.1);
  check_gradients(paths[1], 8, false, 0.3); /* a feature at the edge of the choice may fall on either side */
}

static void curves(void **state) {
  (void)state;
  if (!gpu)
    skip();
  enum { N = 40 };
  double expected[N], found[N], again[N];
  sfa_learner *a = open_learner(cpu, paths[0], true), *b = open_learner(gpu, paths[0], true), *c = open_learner(gpu, paths[0], true);
  learn(cpu, a, 0, N, expected);
  learn(gpu, b, 0, N, found);
  learn(gpu, c, 0, N, again);
  for (int i = 0; i < N; i++)
    if (i % 8 == 7)
      print_message("step %2d: loss %.5f, the CPU's %.5f\n", i, found[i], expected[i]);
  assert_memory_equal(found, again, sizeof found);
  assert_true(expected[N - 1] < 0.9 * expected[0]);
  for (int i = 0; i < N; i++)
    assert_true(fabs(found[i] - expected[i]) <= 0.03 + 2e-2 * expected[i]);
  sfa_learner_destroy(a);
  sfa_learner_destroy(b);
  sfa_learner_destroy(c);
}

/* A function of the host on the GPU's stream that holds up all work behind it, until it is let go or has waited too long. */
typedef struct gate {
  atomic_bool open, gave_up;
} gate;

static void hold(void *user) {
  gate *g = user;
  for (int ms = 0; !atomic_load(&g->open) && !atomic_load(&g->gave_up); ms++) {
    nanosleep(&(struct timespec){0, 1000000}, NULL);
    atomic_store(&g->gave_up, ms == 10000);
  }
}

static void close_gate(gate *g) {
  void *driver = dlopen("libcuda.so.1", RTLD_NOW), *symbol = driver ? dlsym(driver, "cuLaunchHostFunc") : NULL;
  int (*launch)(void *stream, void (*function)(void *), void *user);
  assert_non_null(symbol);
  memcpy(&launch, &symbol, sizeof launch);
  atomic_store(&g->open, false);
  atomic_store(&g->gave_up, false);
  assert_int_equal(launch(sfa_stream_of(gpu), hold, g), 0);
}

static void open_gate(gate *g, const char *what) {
  if (atomic_load(&g->gave_up))
    fail_msg("%s waits for the GPU", what);
  atomic_store(&g->open, true);
  assert_int_equal(sfa_stream_wait(gpu), SFA_OK);
}

/* Steps are put on a stream that does not move. All of a training step is but its end: two batches, the norm of the gradients, AdamW. */
static void training_does_not_wait(void **state) {
  (void)state;
  static const int32_t cu_seqlens[LENGTHS + 1] = {0, 40, 41, BATCH};
  static gate g; /* the driver's thread has it */
  if (!gpu)
    skip();
  sfa_learner *learner = open_learner(gpu, paths[0], true);
  const sfa_learner_shape shape = sfa_learner_shape_of(learner);
  const sfa_recipe recipe = {
      .steps = 9, .learning_rate = 1e-3, .beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8, .weight_decay = 0.1, .clip_norm = 0.01};
  int32_t *ids = make_text(BATCH + 1, shape.vocab_size), kept[64];
  for (int i = 0; i < 64; i++)
    kept[i] = 4;
  const sfa_learn_sparsity sparsity = {.k_keys = kept, .k_queries = kept};
  const size_t target_bytes = BATCH * (size_t)(shape.n_heads * shape.head_dim_v) * sizeof(float);
  float *targets[64] = {NULL};
  for (int i = 0; i < shape.n_layers; i += 2) /* a layer between without */
    assert_int_equal(sfa_memory_alloc(gpu, target_bytes, (void **)&targets[i]), SFA_OK);
  sfa_learn_batch batch = {.n_tokens = BATCH,
                           .n_sequences = LENGTHS,
                           .tokens = ids,
                           .targets = ids + 1,
                           .cu_seqlens = cu_seqlens,
                           .backward = true,
                           .loss_scale = 1.0f / BATCH,
                           .head_outputs = targets};
  sfa_optimizer optimizer;
  sfa_learn_result result, twice = {0};
  assert_int_equal(sfa_learner_sparsity(learner, &sparsity), SFA_OK);
  assert_int_equal(sfa_optimizer_create(gpu, learner, &optimizer), SFA_OK);
  assert_int_equal(sfa_learner_clear(learner), SFA_OK);
  assert_int_equal(sfa_learner_run(learner, &batch, &result), SFA_OK); /* plans and workspaces are made now */
  batch.head_outputs = NULL;
  batch.head_targets = (const float *const *)targets;
  batch.head_weight = 1;
  for (int step = 0; step < 3; step++) {
    if (step > 0)
      close_gate(&g);
    assert_int_equal(sfa_learner_clear(learner), SFA_OK);
    for (int i = 0; i < 2; i++)
      assert_int_equal(sfa_learner_start(learner, &batch), SFA_OK);
    assert_int_equal(sfa_optimizer_step(&optimizer, &recipe, step), SFA_OK);
    if (step > 0)
      open_gate(&g, "a training step");
    assert_int_equal(sfa_learner_finish(learner, &twice), SFA_OK);
    assert_true(sfa_optimizer_norm(&optimizer) > 0.01);
    assert_int_equal(twice.n_scored, 2 * result.n_scored);
    assert_true(step > 0 || (twice.loss_sum == 2 * result.loss_sum && twice.head_loss == 0));
    assert_true(step == 0 || (twice.loss_sum < 2 * result.loss_sum && twice.head_loss > 0));
  }
  sfa_optimizer_free(&optimizer);
  sfa_learner_destroy(learner);
  for (int i = 0; i < shape.n_layers; i++)
    sfa_memory_free(gpu, targets[i]);
  free(ids);
}

/* And of a session all but what brings logits to the host: chunks of a prompt, recorded steps, with eps too. */
static void sessions_do_not_wait(void **state) {
  (void)state;
  static gate g;
  if (!gpu)
    skip();
  for (int eps = 0; eps < 2; eps++) {
    const sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = 1, .k = 4, .eps = eps ? 1e-3f : 0};
    side s = open_side(gpu, paths[0], SFA_WEIGHTS_BF16, &choice, 16);
    int32_t *ids = make_text(120, s.info.vocab_size);
    float *logits = malloc((size_t)s.info.vocab_size * sizeof *logits);
    assert_int_equal(sfa_session_append(s.session, ids, 40, logits), SFA_OK);
    for (int i = 40; i < 43; i++) /* the record is made */
      assert_int_equal(sfa_session_append(s.session, ids + i, 1, logits), SFA_OK);
    close_gate(&g);
    for (int i = 43; i < 46; i++)
      assert_int_equal(sfa_session_append(s.session, ids + i, 1, NULL), SFA_OK);
    assert_int_equal(sfa_session_append(s.session, ids + 46, 40, NULL), SFA_OK);
    open_gate(&g, "a session");
    assert_int_equal(sfa_session_len(s.session), 86);
    free(logits);
    free(ids);
    close_side(&s);
  }
}

/* Noise is drawn on the CPU: said before anything begins, and not where a dense-first training turns sparse. */
static void noise(void **state) {
  (void)state;
  if (!gpu)
    skip();
  const char *recipe = "{\"gumbel_scale\": 0.1}";
  const sfa_train_options options = {.struct_size = sizeof options, .recipes = &recipe, .n_recipes = 1, .out = "absent"};
  sfa_train *train = NULL;
  assert_int_equal(sfa_train_open(gpu, &options, &train), SFA_ERROR_UNSUPPORTED);
  assert_non_null(strstr(sfa_context_error(gpu), "gumbel_scale"));
  assert_null(train);
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(families),
                                     cmocka_unit_test(sparse),
                                     cmocka_unit_test(policies),
                                     cmocka_unit_test(converted),
                                     cmocka_unit_test(by_head),
                                     cmocka_unit_test(features_kept),
                                     cmocka_unit_test(index_files),
                                     cmocka_unit_test(own_model),
                                     cmocka_unit_test(looks),
                                     cmocka_unit_test(gradients),
                                     cmocka_unit_test(curves),
                                     cmocka_unit_test(noise),
                                     cmocka_unit_test(training_does_not_wait),
                                     cmocka_unit_test(sessions_do_not_wait)};
  if (argc > 1)
    cmocka_set_test_filter(argv[1]);
  return cmocka_run_group_tests(tests, open_both, close_both);
}
