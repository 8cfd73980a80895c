/* From options to a training that is ready for its next step. */
#include "train/train_parts.h"

#include <sfa/stream.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "file/save.h"

enum { CONFIG_BYTES_MAX = 16 << 20 };

/* ---- The recipe ------------------------------------------------------------------------------------------------------------------- */

static cJSON *member(const sfa_train *t, const char *name) { return cJSON_GetObjectItemCaseSensitive(t->recipe.json, name); }

/* The config.json of the model that is trained further, as the recipe's "model". */
static sfa_status take_config(sfa_train *t, const char *model) {
  char *path;
  cJSON *config;
  SFA_REQUIRE(t->ctx, !cJSON_IsObject(member(t, "model")),
              "the recipe has a \"model\", and %s is to be trained further: one of them is meant", model);
  SFA_TRY(sfa_save_path(t->ctx, model, "config.json", &path));
  sfa_status status = access(path, F_OK) == 0
                          ? sfa_json_load(t->ctx, path, CONFIG_BYTES_MAX, &config)
                          : sfa_fail(t->ctx, SFA_ERROR_ARGUMENT,
                                     "%s is no Hugging Face directory (it has no config.json): only those are trained further", model);
  sfa_free(t->ctx, path);
  return status == SFA_OK ? sfa_recipe_put(t->ctx, &t->recipe, "model", config) : status;
}

/* What a new model's config need not say. */
static sfa_status complete_config(sfa_train *t, const sfa_shards_info *data) {
  cJSON *config = member(t, "model");
  SFA_REQUIRE(t->ctx, cJSON_IsObject(config),
              "the recipe has no \"model\" (the members of a Hugging Face config.json), and no model to train further is named");
  bool complete = true;
  if (!cJSON_HasObjectItem(config, "vocab_size"))
    complete &= cJSON_AddNumberToObject(config, "vocab_size", data->vocab_size) != NULL;
  if (!cJSON_HasObjectItem(config, "eos_token_id"))
    complete &= cJSON_AddNumberToObject(config, "eos_token_id", data->end_token) != NULL;
  if (!cJSON_HasObjectItem(config, "tie_word_embeddings"))
    complete &= cJSON_AddTrueToObject(config, "tie_word_embeddings") != NULL;
  return complete ? SFA_OK : sfa_fail(t->ctx, SFA_ERROR_MEMORY, "out of memory for the model's config");
}

/* The recipe's sparse attention; without a wish of its own, that of the model. */
static sfa_status take_sparsity(sfa_train *t) {
  static const char name[] = "sparse_attention_config";
  cJSON *of_model = cJSON_DetachItemFromObjectCaseSensitive(member(t, "model"), name);
  if (!member(t, name))
    return sfa_recipe_put(t->ctx, &t->recipe, name, of_model ? of_model : cJSON_CreateNull());
  cJSON_Delete(of_model);
  return SFA_OK;
}

/* What the shards are, so that a training is not resumed with others. */
static sfa_status note_data(sfa_train *t, const sfa_shards_info *info) {
  char tokenizer[24];
  cJSON *data = cJSON_CreateObject();
  snprintf(tokenizer, sizeof tokenizer, "%016" PRIx64, info->tokenizer);
  cJSON_AddNumberToObject(data, "n_tokens", (double)info->n_tokens);
  cJSON_AddNumberToObject(data, "n_documents", (double)info->n_documents);
  cJSON_AddStringToObject(data, "tokenizer", tokenizer);
  return sfa_recipe_put(t->ctx, &t->recipe, "data", data);
}

static sfa_status open_data(sfa_train *t, const sfa_train_options *o, sfa_shards_info *info) {
  SFA_REQUIRE(t->ctx, o->n_data > 0, "no training data: name token shards, which `sfa data` makes from texts");
  SFA_TRY(sfa_batches_open(t->ctx, "training", o->data, o->n_data, t->recipe.sequence_len, &t->data));
  sfa_shards_describe(t->data.shards, info);
  if (o->n_validation <= 0)
    return SFA_OK;
  sfa_shards_info held_out;
  SFA_TRY(sfa_batches_open(t->ctx, "validation", o->validation, o->n_validation, t->recipe.sequence_len, &t->validation));
  sfa_shards_describe(t->validation.shards, &held_out);
  SFA_REQUIRE(t->ctx, held_out.tokenizer == info->tokenizer && held_out.vocab_size == info->vocab_size,
              "the validation shards were made with another tokenizer than the training shards: make them anew");
  return SFA_OK;
}

/* The shards' ids must mean what the tokenizer says that lies beside the trained model: found out now, not after hours. */
static sfa_status check_tokenizer(sfa_train *t, const sfa_train_options *o, const sfa_shards_info *data) {
  sfa_context *ctx = t->ctx;
  sfa_tokenizer *tokenizer = NULL;
  char *path;
  if (!o->tokenizer && !o->model)
    return SFA_OK;
  SFA_TRY(o->tokenizer ? sfa_strdup(ctx, o->tokenizer, &path) : sfa_save_path(ctx, o->model, "tokenizer.json", &path));
  sfa_status status = SFA_OK;
  if (o->tokenizer || access(path, F_OK) == 0) { /* a model may have none */
    status = sfa_tokenizer_open(ctx, path, &tokenizer);
    if (status == SFA_OK && sfa_tokenizer_fingerprint(tokenizer) != data->tokenizer)
      status = sfa_fail(ctx, SFA_ERROR_ARGUMENT, "the shards were not made with the tokenizer %s: make them with it, or name theirs", path);
    sfa_tokenizer_close(tokenizer);
  }
  sfa_free(ctx, path);
  return status;
}

/* ---- The folder --------------------------------------------------------------------------------------------------------------------- */

static sfa_status lock_folder(sfa_train *t, const char *out) {
  char *path;
  SFA_TRY(sfa_save_folder(t->ctx, out));
  SFA_TRY(sfa_save_path(t->ctx, out, "lock", &path));
  sfa_status status = SFA_OK;
  t->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (t->lock < 0)
    status = sfa_fail(t->ctx, SFA_ERROR_IO, "cannot open %s: %s", path, strerror(errno));
  else if (flock(t->lock, LOCK_EX | LOCK_NB) != 0)
    status = sfa_fail(t->ctx, SFA_ERROR_IO, "another process trains in %s: wait for its end, or name another folder", out);
  sfa_free(t->ctx, path);
  return status;
}

static sfa_status open_checkpoint(sfa_train *t, const sfa_train_options *o, sfa_checkpoint *checkpoint, bool *found) {
  SFA_TRY(sfa_checkpoint_open(t->ctx, t->checkpoint_folder, checkpoint, found));
  if (!*found)
    return SFA_OK;
  SFA_REQUIRE(t->ctx, o->resume, "%s holds a training that is at step %" PRId64 ": resume it, or name another folder", o->out,
              checkpoint->state.step);
  return sfa_recipe_match(t->ctx, &t->recipe, checkpoint->recipe, checkpoint->path);
}

/* ---- The model ---------------------------------------------------------------------------------------------------------------------- */

static sfa_learn_options learn_options(const sfa_recipe *r) {
  return (sfa_learn_options){.max_tokens = (int32_t)(r->sequences * r->sequence_len),
                             .max_seqlen = (int32_t)r->sequence_len,
                             .checkpointing = r->checkpointing,
                             .bf16_products = r->bf16_products};
}

static sfa_status create_learner(sfa_train *t, const char *folder) {
  const sfa_recipe *r = &t->recipe;
  SFA_REQUIRE(t->ctx, r->sequences * r->sequence_len <= INT32_MAX,
              "%" PRId64 " sequences of %" PRId64 " tokens are too many for a batch: accumulate several", r->sequences, r->sequence_len);
  const sfa_learn_options options = learn_options(r);
  sfa_weights *weights;
  SFA_TRY(sfa_weights_open(t->ctx, folder, &weights));
  SFA_TRY(sfa_learner_create(t->ctx, weights, &options, &t->learner));
  t->shape = sfa_learner_shape_of(t->learner);
  sfa_shards_info data;
  sfa_shards_describe(t->data.shards, &data);
  t->end_token = data.end_token;
  SFA_REQUIRE(t->ctx, data.vocab_size <= t->shape.vocab_size,
              "the shards have ids up to %d, the model has %d tokens: they are of another tokenizer", data.vocab_size - 1,
              t->shape.vocab_size);
  SFA_REQUIRE(t->ctx, r->sequence_len <= t->shape.context_len,
              "sequence_len %" PRId64 " is more than the %lld tokens of the model's context", r->sequence_len,
              (long long)t->shape.context_len);
  return SFA_OK;
}

/* A new model: its folder is made once; its numbers are a function of the seed. */
static sfa_status create_model(sfa_train *t, const char *folder, bool is_resumed) {
  char *path;
  SFA_TRY(sfa_save_path(t->ctx, folder, "model.safetensors", &path));
  const bool is_there = access(path, F_OK) == 0;
  sfa_free(t->ctx, path);
  if (!is_resumed || !is_there)
    SFA_TRY(sfa_train_model_create(t->ctx, folder, member(t, "model")));
  SFA_TRY(create_learner(t, folder));
  SFA_TRY(sfa_learner_init_random(t->learner, (uint64_t)t->recipe.seed));
  return is_resumed ? SFA_OK : sfa_train_model_save(t->ctx, folder, &t->recipe, SFA_SAVE_INITIAL, t->learner);
}

/* The model that is trained further teaches what the conversion asks of it. */
static sfa_status open_teacher(sfa_train *t, const char *model) {
  const sfa_recipe *r = &t->recipe;
  if (r->head_weight == 0 && r->teacher_weight == 0)
    return SFA_OK;
  SFA_REQUIRE(t->ctx, model,
              "the recipe has a head_weight or a teacher_weight, but a new model has no teacher: name a model to train further");
  const sfa_learn_options options = learn_options(r);
  return sfa_teacher_open(t->ctx, model, &options, r->head_weight > 0, r->teacher_weight > 0, &t->teacher);
}

static sfa_status open_model(sfa_train *t, const sfa_train_options *o, bool is_resumed) {
  SFA_TRY(open_teacher(t, o->model));
  if (o->model)
    return create_learner(t, o->model);
  char *folder;
  SFA_TRY(sfa_save_path(t->ctx, o->out, "initial", &folder));
  sfa_status status = create_model(t, folder, is_resumed);
  sfa_free(t->ctx, folder);
  return status;
}

/* "qk": what makes queries and keys, and nothing else. */
static void choose_parameters(sfa_train *t) {
  for (int32_t i = 0; i < sfa_learner_count(t->learner); i++) {
    sfa_parameter *p = sfa_learner_parameter(t->learner, i);
    const bool is_qk = p->role == SFA_ROLE_Q || p->role == SFA_ROLE_K || p->role == SFA_ROLE_Q_NORM || p->role == SFA_ROLE_K_NORM;
    p->trainable = t->recipe.trained == SFA_TRAIN_ALL || is_qk;
  }
}

static sfa_status create_buffers(sfa_train *t) {
  const sfa_recipe *r = &t->recipe;
  const size_t n = (size_t)(r->sequences * r->sequence_len), n_heads = (size_t)t->shape.n_layers * (size_t)t->shape.n_kv_heads;
  const size_t n_features = n_heads * (size_t)t->shape.head_dim;
  SFA_TRY(sfa_alloc_zero(t->ctx, n, sizeof *t->tokens, "tokens of a batch", (void **)&t->tokens));
  SFA_TRY(sfa_alloc_zero(t->ctx, n, sizeof *t->targets, "tokens of a batch", (void **)&t->targets));
  SFA_TRY(sfa_alloc_zero(t->ctx, n + 1, sizeof *t->cu_seqlens, "lengths of a batch", (void **)&t->cu_seqlens));
  SFA_TRY(sfa_alloc_zero(t->ctx, n_heads, sizeof *t->k_keys, "kept features", (void **)&t->k_keys));
  SFA_TRY(sfa_alloc_zero(t->ctx, n_heads, sizeof *t->k_queries, "kept features", (void **)&t->k_queries));
  SFA_TRY(sfa_alloc_zero(t->ctx, n_features, sizeof *t->key_uses, "counts of features", (void **)&t->key_uses));
  SFA_TRY(sfa_alloc_zero(t->ctx, n_features, sizeof *t->query_uses, "counts of features", (void **)&t->query_uses));
  return SFA_OK;
}

/* ---- The whole -------------------------------------------------------------------------------------------------- */

static sfa_status open_log(sfa_train *t, const char *out) {
  char *path;
  SFA_TRY(sfa_save_path(t->ctx, out, "log.jsonl", &path));
  sfa_status status = sfa_train_log_open(t->ctx, path, t->state.step, &t->log);
  sfa_free(t->ctx, path);
  return status;
}

/* Model, optimizer and state, those of the checkpoint where there is one. */
static sfa_status build(sfa_train *t, const sfa_train_options *o, const sfa_checkpoint *checkpoint) {
  SFA_TRY(open_model(t, o, checkpoint != NULL));
  choose_parameters(t);
  SFA_TRY(sfa_optimizer_create(t->ctx, t->learner, &t->optimizer));
  t->saved_step = -1;
  if (checkpoint) {
    SFA_TRY(sfa_checkpoint_restore(checkpoint, t->learner, &t->optimizer));
    t->state = checkpoint->state;
    t->saved_step = t->state.step;
  }
  t->first_step = t->state.step;
  SFA_TRY(sfa_recipe_sparsity_read(t->ctx, &t->recipe, t->shape.n_layers, t->shape.n_kv_heads, t->shape.head_dim, &t->sparsity));
  return create_buffers(t);
}

static sfa_status read_recipe(sfa_train *t, const sfa_train_options *o) {
  sfa_shards_info info;
  SFA_TRY(sfa_recipe_read(t->ctx, o->recipes, o->n_recipes, &t->recipe));
  if (t->recipe.gumbel_scale > 0 && sfa_context_device(t->ctx) != SFA_DEVICE_CPU)
    return sfa_fail(t->ctx, SFA_ERROR_UNSUPPORTED, "gumbel_scale is %g, and noise is drawn on the CPU only: train there, or with 0",
                    t->recipe.gumbel_scale);
  if (o->model)
    SFA_TRY(take_config(t, o->model));
  SFA_TRY(open_data(t, o, &info));
  SFA_TRY(check_tokenizer(t, o, &info));
  if (!o->model)
    SFA_TRY(complete_config(t, &info));
  SFA_TRY(take_sparsity(t));
  return note_data(t, &info);
}

static sfa_status open_all(sfa_train *t, const sfa_train_options *o) {
  sfa_context *ctx = t->ctx;
  const char *tokenizer = o->tokenizer ? o->tokenizer : o->model;
  SFA_TRY(read_recipe(t, o));
  SFA_TRY(sfa_save_path(ctx, o->out, "checkpoints", &t->checkpoint_folder));
  SFA_TRY(sfa_save_path(ctx, o->out, "model", &t->model_folder));
  SFA_TRY(sfa_save_path(ctx, o->out, "adapter", &t->adapter_folder));
  SFA_TRY(lock_folder(t, o->out));
  SFA_TRY(sfa_save_folder(ctx, t->checkpoint_folder));
  sfa_checkpoint checkpoint;
  bool found = false;
  sfa_status status = open_checkpoint(t, o, &checkpoint, &found);
  if (status == SFA_OK)
    status = build(t, o, found ? &checkpoint : NULL);
  sfa_checkpoint_close(&checkpoint);
  if (status == SFA_OK)
    status = open_log(t, o->out);
  if (status == SFA_OK)
    status = sfa_json_save(ctx, o->out, "recipe.json", t->recipe.json);
  if (status == SFA_OK && tokenizer)
    status = sfa_train_model_copy_tokenizer(ctx, t->model_folder, tokenizer);
  return status;
}

sfa_status sfa_train_open(sfa_context *ctx, const sfa_train_options *o, sfa_train **train) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(ctx, train, "sfa_train_open wants a place for the training");
  *train = NULL;
  SFA_REQUIRE(ctx, o && o->struct_size == sizeof *o, "sfa_train_options is of another version: %zu bytes, not %zu", o ? o->struct_size : 0,
              sizeof *o);
  SFA_REQUIRE(ctx, o->out && *o->out, "a training wants a folder");
  sfa_train *t;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *t, "a training", (void **)&t));
  t->ctx = ctx;
  t->lock = t->log.file = -1;
  t->progress = o->progress;
  t->progress_user = o->progress_user;
  sfa_status status = open_all(t, o);
  if (status == SFA_OK)
    *train = t;
  else
    sfa_train_close(t);
  return status;
}

void sfa_train_close(sfa_train *t) {
  if (!t)
    return;
  sfa_context *ctx = t->ctx;
  sfa_train_log_close(&t->log);
  sfa_optimizer_free(&t->optimizer);
  sfa_learner_destroy(t->learner);
  sfa_teacher_close(&t->teacher);
  sfa_batches_close(&t->data);
  sfa_batches_close(&t->validation);
  sfa_recipe_sparsity_free(ctx, &t->sparsity);
  sfa_recipe_free(&t->recipe);
  if (t->lock >= 0)
    close(t->lock);
  void *const memory[] = {t->checkpoint_folder, t->model_folder, t->adapter_folder, t->tokens,   t->targets,
                          t->cu_seqlens,        t->k_keys,       t->k_queries,      t->key_uses, t->query_uses};
  for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
    sfa_free(ctx, memory[i]);
  sfa_free(ctx, t);
}

static int32_t largest(const int32_t *values, size_t n) {
  int32_t most = 0;
  for (size_t i = 0; values && i < n; i++)
    most = values[i] > most ? values[i] : most;
  return most;
}

void sfa_train_describe(const sfa_train *t, sfa_train_info *info) {
  const sfa_learner_shape *s = &t->shape;
  const size_t n_heads = (size_t)s->n_layers * (size_t)s->n_kv_heads;
  *info = (sfa_train_info){.family = s->family->name,
                           .n_layers = s->n_layers,
                           .hidden_dim = s->hidden_dim,
                           .n_heads = s->n_heads,
                           .n_kv_heads = s->n_kv_heads,
                           .head_dim = s->head_dim,
                           .vocab_size = s->vocab_size,
                           .n_steps = t->recipe.steps,
                           .tokens_a_step = t->recipe.accumulate * t->recipe.sequences * t->recipe.sequence_len,
                           .n_tokens = sfa_shards_n_tokens(t->data.shards),
                           .first_step = t->first_step,
                           .bytes = sfa_learner_bytes(t->learner) + sfa_optimizer_bytes(&t->optimizer),
                           .k = largest(t->sparsity.k_keys, n_heads),
                           .k_q = largest(t->sparsity.k_queries, n_heads)};
  for (int32_t i = 0; i < sfa_learner_count(t->learner); i++) {
    const sfa_parameter *p = sfa_learner_parameter(t->learner, i);
    info->n_parameters += p->n;
    info->n_trained += p->trainable ? p->n : 0;
  }
}
