/* Trainings: they learn, stop, go on with the same bits, and fail with a text and without loss. */
#include "unit_tools.h"

#include <dirent.h>
#include <math.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <sfa/train.h>

#include "train_files.h"

static int setup(void **state) {
  temp_begin(state);
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  train_make_shards(ctx, in_temp("data"), 1, 3000);
  train_make_shards(ctx, in_temp("other"), 2, 2000);
  train_make_shards(ctx, in_temp("held"), 3, 1000);
  sfa_context_destroy(ctx);
  return 0;
}

/* How a run goes: stops after `stop_after` steps (0: not), notes the losses. */
typedef struct run {
  int32_t n_threads;
  bool resume;
  const char *over, *data, *model; /* over: JSON that lies over the tiny model */
  int64_t stop_after, n_steps;
  double first_loss, last_loss, validation_loss;
  char error[512];
} run;

static int watch(void *user, const sfa_train_progress *p) {
  run *r = user;
  if (!isnan(p->validation_loss))
    r->validation_loss = p->validation_loss;
  else
    r->n_steps++;
  if (r->n_steps == 1)
    r->first_loss = p->loss;
  r->last_loss = p->loss;
  return r->stop_after && r->n_steps >= r->stop_after;
}

static sfa_status train(const char *out, run *r) {
  sfa_context *ctx = new_context(r->n_threads ? r->n_threads : 1, SFA_ISA_DEFAULT);
  const char *const recipes[] = {r->model ? "{\"steps\": 3, \"sequence_len\": 16}" : tiny_model, r->over ? r->over : "{}"};
  const char *const data[] = {in_temp(r->data ? r->data : "data")}, *const held[] = {in_temp("held")};
  const sfa_train_options options = {.struct_size = sizeof options,
                                     .recipes = recipes,
                                     .n_recipes = 2,
                                     .model = r->model,
                                     .data = data,
                                     .n_data = 1,
                                     .validation = held,
                                     .n_validation = 1,
                                     .out = in_temp(out),
                                     .resume = r->resume,
                                     .progress = watch,
                                     .progress_user = r};
  sfa_train *t;
  sfa_status status = sfa_train_open(ctx, &options, &t);
  if (status == SFA_OK)
    status = sfa_train_run(t);
  else
    assert_null(t);
  snprintf(r->error, sizeof r->error, "%s", sfa_context_error(ctx));
  sfa_train_close(t);
  sfa_context_destroy(ctx);
  return status;
}

static void expect_text(const run *r, const char *text) {
  if (!strstr(r->error, text))
    fail_msg("\"%s\" does not tell of \"%s\"", r->error, text);
}

static bool same_models(const char *a, const char *b) {
  char x[TEMP_PATH_BYTES], y[TEMP_PATH_BYTES];
  snprintf(x, sizeof x, "%s/%s/model/model.safetensors", temp_dir, a);
  snprintf(y, sizeof y, "%s/%s/model/model.safetensors", temp_dir, b);
  return same_files(x, y);
}

/* The log without its speeds. */
static char *read_log(const char *out) {
  char path[TEMP_PATH_BYTES];
  size_t bytes, n = 0;
  snprintf(path, sizeof path, "%s/%s/log.jsonl", temp_dir, out);
  char *text = read_whole(path, &bytes);
  assert_non_null(text);
  for (size_t i = 0; i < bytes; i++) {
    if (strncmp(text + i, ",\"tokens_per_s\"", 15) == 0)
      while (i < bytes && text[i] != '}')
        i++;
    text[n++] = text[i];
  }
  text[n] = 0;
  return text;
}

static const char sparse[] = "{\"sparse_attention_config\": {\"k\": 4}, \"dense_until\": 0.2, \"k_final_from\": 0.6}";

static void test_learns(void **state) {
  (void)state;
  run dense = {.over = "{\"steps\": 60}"}, sfa = {.over = "{\"steps\": 60, \"sparse_attention_config\": {\"k\": 4, \"k_q\": 0}}"};
  assert_int_equal(train("dense", &dense), SFA_OK);
  assert_int_equal(train("sfa", &sfa), SFA_OK);
  assert_int_equal(dense.n_steps, 60);
  assert_true(fabs(dense.first_loss - log(TRAIN_VOCAB)) < 0.2); /* knows nothing yet */
  assert_true(dense.last_loss < dense.first_loss - 0.5 && dense.validation_loss < dense.first_loss - 0.5);
  assert_true(sfa.last_loss < sfa.first_loss - 0.5);
  assert_true(sfa.first_loss == dense.first_loss); /* the same weights, the same tokens, dense at first */
  /* The engine opens what came out, and finds what it was trained for. */
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_model *model;
  sfa_model_info info;
  assert_int_equal(sfa_model_open(ctx, in_temp("sfa/model"), NULL, &model), SFA_OK);
  sfa_model_describe(model, &info);
  assert_int_equal(info.sfa_k, 4);
  assert_int_equal(info.vocab_size, TRAIN_VOCAB);
  sfa_model_close(model);
  sfa_context_destroy(ctx);
  /* And it can be trained further. */
  run further = {.model = in_temp("dense/model")};
  assert_int_equal(train("further", &further), SFA_OK);
  assert_true(further.first_loss < dense.first_loss - 0.3);
}

/* Stopped anywhere, gone on with any number of threads: the same bits, the same log. */
static void test_resume(void **state) {
  (void)state;
  run whole = {.over = sparse, .n_threads = 1};
  assert_int_equal(train("whole", &whole), SFA_OK);
  run threads = {.over = sparse, .n_threads = 3};
  assert_int_equal(train("threads", &threads), SFA_OK);
  assert_true(same_models("whole", "threads"));
  run part = {.over = sparse, .stop_after = 5, .n_threads = 2};
  assert_int_equal(train("parts", &part), SFA_ERROR_CANCELLED);
  expect_text(&part, "step 5 of 12");
  assert_false(same_models("whole", "parts"));
  run refused = {.over = sparse};
  assert_int_equal(train("parts", &refused), SFA_ERROR_ARGUMENT);
  expect_text(&refused, "step 5");
  part.resume = true;
  part.n_steps = 0;
  part.stop_after = 4;
  assert_int_equal(train("parts", &part), SFA_ERROR_CANCELLED);
  run rest = {.over = sparse, .resume = true, .n_threads = 1};
  assert_int_equal(train("parts", &rest), SFA_OK);
  assert_int_equal(rest.n_steps, 3);
  assert_true(same_models("whole", "parts"));
  char *a = read_log("whole"), *b = read_log("parts");
  assert_string_equal(a, b);
  assert_non_null(strstr(a, "\"support\""));
  free(a);
  free(b);
}

static int n_checkpoints(const char *out) {
  char path[TEMP_PATH_BYTES];
  int n = 0;
  snprintf(path, sizeof path, "%s/%s/checkpoints", temp_dir, out);
  DIR *list = opendir(path);
  for (struct dirent *file = list ? readdir(list) : NULL; file; file = readdir(list))
    n += file->d_name[0] != '.';
  if (list)
    closedir(list);
  return n;
}

static void test_changed(void **state) {
  (void)state;
  run first = {.stop_after = 4};
  assert_int_equal(train("changed", &first), SFA_ERROR_CANCELLED);
  static const struct {
    const char *over, *data, *text;
  } cases[] = {{"{\"learning_rate\": 0.02}", NULL, "learning_rate"},
               {"{\"sparse_attention_config\": {\"k\": 4}}", NULL, "sparse_attention_config"},
               {"{\"steps\": 13}", NULL, "steps"},
               {NULL, "other", "data"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    run r = {.resume = true, .over = cases[i].over, .data = cases[i].data};
    assert_int_equal(train("changed", &r), SFA_ERROR_ARGUMENT);
    expect_text(&r, cases[i].text);
  }
  run free_members = {.resume = true, .over = "{\"checkpoint_every\": 1, \"keep_checkpoints\": 3}"};
  assert_int_equal(train("changed", &free_members), SFA_OK);
  assert_int_equal(n_checkpoints("changed"), 3);
}

/* A flipped byte anywhere, a file cut anywhere: refused with its name; the checkpoint before it takes over. */
static void test_damaged_checkpoint(void **state) {
  (void)state;
  run whole = {0};
  assert_int_equal(train("undamaged", &whole), SFA_OK);
  run first = {.stop_after = 9};
  assert_int_equal(train("damaged", &first), SFA_ERROR_CANCELLED);
  char path[TEMP_PATH_BYTES];
  size_t bytes;
  snprintf(path, sizeof path, "%s", in_temp("damaged/checkpoints/step-000000000009.sfa"));
  char *data = read_whole(path, &bytes);
  assert_non_null(data);
  for (size_t i = 0; i < 40; i++) {
    const size_t at = i < 20 ? i * 7 : (bytes - 9) / 20 * (i - 19);
    data[at] ^= 0x10;
    write_whole(path, data, bytes);
    data[at] ^= 0x10;
    run r = {.resume = true};
    if (at < 128 || data[at] || at >= 1 << 13) { /* zeros between pieces are in no sum */
      assert_int_not_equal(train("damaged", &r), SFA_OK);
      expect_text(&r, "step-000000000009.sfa");
    }
    write_whole(path, data, bytes / 40 * i);
    assert_int_equal(train("damaged", &r), SFA_ERROR_FORMAT);
    expect_text(&r, "move it away");
  }
  free(data);
  remove(path);
  run rest = {.resume = true};
  assert_int_equal(train("damaged", &rest), SFA_OK);
  assert_int_equal(rest.n_steps, 12 - 8);
  assert_true(same_models("undamaged", "damaged"));
}

/* A block of ids that was changed on the disk is noticed when it is read; what was trained before is saved. */
static void test_damaged_shard(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  train_make_shards(ctx, in_temp("bad"), 1, 3000);
  sfa_context_destroy(ctx);
  size_t bytes;
  char *data = read_whole(in_temp("bad_00000.shard"), &bytes);
  data[bytes / 2] ^= 1;
  write_whole(in_temp("bad_00000.shard"), data, bytes);
  free(data);
  run r = {.data = "bad"};
  assert_int_equal(train("shard", &r), SFA_ERROR_FORMAT);
  expect_text(&r, "bad_00000.shard");
}

static void test_diverges(void **state) {
  (void)state;
  run r = {.over = "{\"learning_rate\": 1e11, \"warmup_steps\": 0, \"clip_norm\": 0, \"checkpoint_every\": 1}"};
  assert_int_equal(train("diverges", &r), SFA_ERROR_RANGE);
  expect_text(&r, "learning_rate");
  expect_text(&r, "is kept");
  assert_true(n_checkpoints("diverges") >= 1);
}

/* A disk that is full: the checkpoint that was there is intact, and the training goes on when there is room. */
static void test_full_disk(void **state) {
  (void)state;
  run whole = {0}, first = {.stop_after = 6};
  assert_int_equal(train("roomy", &whole), SFA_OK);
  assert_int_equal(train("full", &first), SFA_ERROR_CANCELLED);
  pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0) {
    struct rlimit limit = {60000, 60000}; /* below a checkpoint, above the log */
    signal(SIGXFSZ, SIG_IGN);             /* then a write beyond the limit fails as one on a full disk does */
    setrlimit(RLIMIT_FSIZE, &limit);
    run r = {.resume = true};
    sfa_status status = train("full", &r);
    _exit(status == SFA_ERROR_IO && strstr(r.error, "make room") ? 0 : 1);
  }
  int result;
  assert_int_equal(waitpid(child, &result, 0), child);
  assert_int_equal(result, 0);
  assert_int_equal(access(in_temp("full/checkpoints/step-000000000006.sfa"), R_OK), 0);
  run rest = {.resume = true};
  assert_int_equal(train("full", &rest), SFA_OK);
  assert_int_equal(rest.n_steps, 6);
  assert_true(same_models("roomy", "full"));
}

/* Every call of the allocator fails once: a text, nothing left behind. */
static void test_memory(void **state) {
  (void)state;
  char data_path[TEMP_PATH_BYTES], out[TEMP_PATH_BYTES];
  snprintf(data_path, sizeof data_path, "%s/data", temp_dir);
  snprintf(out, sizeof out, "%s/memory", temp_dir);
  const char *const recipes[] = {tiny_model, "{\"steps\": 1}"}, *const data[] = {data_path};
  int64_t refuse = 1;
  for (sfa_status status = SFA_ERROR_MEMORY; status != SFA_OK; refuse += refuse < 60 ? 1 : 13) {
    memory_account account = {.refuse = refuse};
    sfa_allocator allocator = {account_alloc, account_free, &account};
    sfa_context_options context = {.struct_size = sizeof context, .allocator = &allocator, .n_threads = 1};
    sfa_context *ctx;
    if (sfa_context_create(&context, &ctx) != SFA_OK)
      continue;
    const sfa_train_options options = {
        .struct_size = sizeof options, .recipes = recipes, .n_recipes = 2, .data = data, .n_data = 1, .out = out, .resume = 1};
    sfa_train *t;
    status = sfa_train_open(ctx, &options, &t);
    if (status == SFA_OK)
      status = sfa_train_run(t);
    if (status != SFA_OK && status != SFA_ERROR_MEMORY)
      fail_msg("call %lld: %s", (long long)refuse, sfa_context_error(ctx));
    sfa_train_close(t);
    sfa_context_destroy(ctx);
    assert_int_equal(account.out, 0);
  }
  assert_true(refuse > 60);
}

/* Negative log-likelihoods of a few tokens, by the engine and as the model file asks for. */
static void score(const char *path, float *nll, int32_t n) {
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_model *model;
  sfa_model_info info;
  sfa_session *session;
  int32_t ids[16];
  for (int32_t i = 0; i < n; i++)
    ids[i] = (i * i * 7 + 3) % TRAIN_VOCAB;
  if (sfa_model_open(ctx, path, NULL, &model) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  sfa_model_describe(model, &info);
  const sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = info.sfa_k > 0, .cache_k = SFA_F32, .cache_v = SFA_F32};
  const sfa_session_options options = {.struct_size = sizeof options, .attention = &choice};
  assert_int_equal(sfa_session_create(model, &options, &session), SFA_OK);
  assert_int_equal(sfa_session_score(session, ids, n, -1, nll, NULL), SFA_OK);
  sfa_session_destroy(session);
  sfa_model_close(model);
  sfa_context_destroy(ctx);
}

/* A model of each family, trained a little, says the same as a GGUF file. */
static void test_gguf(void **state) {
  (void)state;
  enum { N = 16 };
  static const char llama[] = "\"hidden_size\": 32, \"intermediate_size\": 48, \"num_hidden_layers\": 2, \"num_attention_heads\": 4,"
                              "\"num_key_value_heads\": 2, \"head_dim\": 16, \"max_position_embeddings\": 64, \"rope_theta\": 5000";
  static const struct {
    const char *type, *members, *sparse;
  } models[] = {
      {"llama", "\"tie_word_embeddings\": false", "{\"k\": [4, 0], \"k_q\": 0}"},
      {"llama", "\"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 4}",
       "{\"k\": 4, \"order\": \"pre_rope\", \"two_of_four\": true}"},
      {"qwen2", "\"rms_norm_eps\": 1e-6", "null"},
      {"qwen3", "\"rms_norm_eps\": 1e-6", "{\"k\": 6, \"k_q\": 9, \"layers\": [1]}"},
      {"gemma3_text", "\"sliding_window\": 8, \"sliding_window_pattern\": 2, \"query_pre_attn_scalar\": 16", "null"},
      {"gpt2", "\"n_embd\": 32, \"n_layer\": 2, \"n_head\": 2, \"n_positions\": 64", "{\"k\": 8}"},
  };
  for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
    char over[900], out[16], from[TEMP_PATH_BYTES], to[TEMP_PATH_BYTES];
    float wanted[N], seen[N];
    snprintf(over, sizeof over, "{\"model\": {\"model_type\": \"%s\", %s, %s}, \"sparse_attention_config\": %s, \"steps\": 4}",
             models[i].type, llama, models[i].members, models[i].sparse);
    snprintf(out, sizeof out, "gguf%zu", i);
    snprintf(from, sizeof from, "%s/%s/model", temp_dir, out);
    snprintf(to, sizeof to, "%s/%s.gguf", temp_dir, out);
    run r = {.over = over};
    if (train(out, &r) != SFA_OK)
      fail_msg("%s: %s", models[i].type, r.error);
    sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
    if (sfa_model_export_gguf(ctx, from, to, SFA_F32) != SFA_OK)
      fail_msg("%s: %s", models[i].type, sfa_context_error(ctx));
    assert_int_equal(sfa_model_export_gguf(ctx, from, in_temp("nowhere/x.gguf"), SFA_F32), SFA_ERROR_IO);
    assert_int_equal(sfa_model_export_gguf(ctx, to, in_temp("x.gguf"), SFA_F32), SFA_ERROR_ARGUMENT);
    assert_int_equal(sfa_model_export_gguf(ctx, from, to, SFA_I8), SFA_ERROR_ARGUMENT);
    sfa_context_destroy(ctx);
    score(from, wanted, N);
    score(to, seen, N);
    for (int j = 0; j + 1 < N; j++)
      if (!(fabsf(seen[j] - wanted[j]) <= 1e-4f))
        fail_msg("%s, model %zu, token %d: %g, not %g", models[i].type, i, j, (double)seen[j], (double)wanted[j]);
  }
}

static void test_wrong_options(void **state) {
  (void)state;
  static const struct {
    const char *over, *text;
  } cases[] = {{"{\"model\": null}", "model"},
               {"{\"sequence_len\": 65}", "context"},
               {"{\"sequence_len\": 5000}", "sequence_len"},
               {"{\"sparse_attention_config\": {\"k\": 99}}", "head_dim"},
               {"{\"model\": {\"model_type\": \"llama\"}}", "num_hidden_layers"},
               {"{\"model\": {\"model_type\": \"mamba\"}}", "mamba"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    run r = {.over = cases[i].over};
    assert_int_not_equal(train("wrong", &r), SFA_OK);
    if (!strstr(r.error, cases[i].text))
      print_message("%s: %s\n", cases[i].over, r.error);
    expect_text(&r, cases[i].text);
  }
  run nowhere = {.data = "nowhere"};
  assert_int_not_equal(train("wrong", &nowhere), SFA_OK);
  expect_text(&nowhere, "nowhere");
}

/* Four documents in one window are, with document_mask, the four windows of a document each; without it they are not. */
static void test_document_mask(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  train_make_documents(ctx, in_temp("documents"), 5, 5, 5);
  sfa_context_destroy(ctx);
#define BATCH(sequences, len) "{\"steps\": 1, \"validate_every\": 0, \"sequences\": " #sequences ", \"sequence_len\": " #len
  run apart = {.data = "documents", .over = BATCH(4, 6) "}"},
      masked = {.data = "documents", .over = BATCH(1, 24) ", \"document_mask\": true}"},
      joined = {.data = "documents", .over = BATCH(1, 24) "}"};
#undef BATCH
  assert_int_equal(train("apart", &apart), SFA_OK);
  assert_int_equal(train("masked", &masked), SFA_OK);
  assert_int_equal(train("joined", &joined), SFA_OK);
  assert_true(fabs(masked.first_loss - apart.first_loss) < 1e-6);
  assert_true(fabs(joined.first_loss - apart.first_loss) > 1e-5);
}

/* The recipe.json of a run leads to the same training, bit for bit, also with numbers that 15 digits do not tell; their neighbours do not
 * go on with it. */
static void test_recipe_again(void **state) {
  (void)state;
  run first = {.over = "{\"steps\": 2, \"seed\": 9007199254740991, \"learning_rate\": 0.010000000000000002}"};
  assert_int_equal(train("exact", &first), SFA_OK);
  size_t bytes;
  char *recipe = read_whole(in_temp("exact/recipe.json"), &bytes);
  assert_non_null(recipe);
  run again = {.over = recipe}, other = {.over = "{\"steps\": 2, \"seed\": 9007199254740990, \"learning_rate\": 0.010000000000000002}"};
  assert_int_equal(train("exact_again", &again), SFA_OK);
  assert_true(same_models("exact", "exact_again"));
  assert_int_equal(train("exact_other", &other), SFA_OK);
  assert_false(same_models("exact", "exact_other"));
  run resumed = {.resume = true, .over = recipe},
      changed[] = {{.resume = true, .over = other.over},
                   {.resume = true, .over = "{\"steps\": 2, \"seed\": 9007199254740991, \"learning_rate\": 0.01}"}};
  assert_int_equal(train("exact", &resumed), SFA_OK);
  assert_int_equal(train("exact", &changed[0]), SFA_ERROR_ARGUMENT);
  expect_text(&changed[0], "\"seed\" 9007199254740991, now it is 9007199254740990");
  assert_int_equal(train("exact", &changed[1]), SFA_ERROR_ARGUMENT);
  expect_text(&changed[1], "\"learning_rate\" 0.010000000000000002, now it is 0.01:");
  free(recipe);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_learns),        cmocka_unit_test(test_resume),
      cmocka_unit_test(test_changed),       cmocka_unit_test(test_damaged_checkpoint),
      cmocka_unit_test(test_damaged_shard), cmocka_unit_test(test_diverges),
      cmocka_unit_test(test_full_disk),     cmocka_unit_test(test_memory),
      cmocka_unit_test(test_document_mask), cmocka_unit_test(test_gguf),
      cmocka_unit_test(test_wrong_options), cmocka_unit_test(test_recipe_again),
  };
  return cmocka_run_group_tests(tests, setup, temp_end);
}
