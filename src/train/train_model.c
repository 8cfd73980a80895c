/* Model folders as Hugging Face has them. What a new model consists of follows from its family's table and from the sizes that the engine's
 * own reader finds in config.json: what it accepts here it opens later. */
#include "train/train_model.h"

#include <sfa/stream.h>

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/map.h"
#include "file/save.h"
#include "file/weights_write.h"
#include "model/model_parts.h"

/* ---- The tensors of a new model ------------------------------------------------------------------------------------------------------ */

typedef struct tensor_list {
  sfa_context *ctx;
  const sfa_model_config *config;
  sfa_tensor_names names;
  sfa_arena texts;
  sfa_tensor_out *tensors;
  int64_t n, capacity;
} tensor_list;

static sfa_status add(tensor_list *list, sfa_role role, int32_t layer, const char *suffix, int64_t rows, int64_t columns) {
  char text[SFA_NAME_BYTES];
  sfa_tensor_names names = list->names;
  names.prefix = role == SFA_ROLE_HEAD ? "" : list->config->family->tensor_prefixes[0];
  sfa_role_name(&names, false, role, layer, suffix, text);
  SFA_TRY(sfa_list_grow(list->ctx, (void **)&list->tensors, list->n, &list->capacity, sizeof *list->tensors, "a list of tensors"));
  sfa_tensor_out *t = &list->tensors[list->n++];
  *t = (sfa_tensor_out){.type = SFA_TENSOR_F32, .n_dims = columns ? 2 : 1, .shape = {rows, columns ? columns : 1, 1, 1}};
  return sfa_arena_text(list->ctx, &list->texts, text, strlen(text), &t->name);
}

static bool config_switch(const tensor_list *list, const char *key, bool usual) {
  sfa_config_bool(list->names.weights, list->config, key, &usual);
  return usual;
}

/* Whether a linear layer has a bias: always in some families, else as the config says. */
static bool is_biased(const tensor_list *list, sfa_role role) {
  const sfa_family *family = list->config->family;
  switch (role) {
  case SFA_ROLE_Q:
  case SFA_ROLE_K:
  case SFA_ROLE_V: return family == &sfa_family_qwen2 || config_switch(list, "attention_bias", family->biased);
  case SFA_ROLE_QKV: return family->biased;
  case SFA_ROLE_O: return config_switch(list, "attention_bias", family->biased);
  case SFA_ROLE_GATE:
  case SFA_ROLE_UP:
  case SFA_ROLE_DOWN: return config_switch(list, "mlp_bias", family->biased);
  default: return false; /* tables and the head */
  }
}

static sfa_status add_role(tensor_list *list, sfa_role role, int32_t layer) {
  const sfa_family *family = list->config->family;
  const sfa_role_shape shape = sfa_role_shape_of(list->config, role);
  if (sfa_role_is_norm(role)) {
    SFA_TRY(add(list, role, layer, ".weight", shape.n_out, 0));
    return family->layer_norm ? add(list, role, layer, ".bias", shape.n_out, 0) : SFA_OK;
  }
  const bool table = role == SFA_ROLE_EMBEDDING || role == SFA_ROLE_POSITIONS || role == SFA_ROLE_HEAD;
  const bool transposed = family->conv1d && !table;
  SFA_TRY(add(list, role, layer, ".weight", transposed ? shape.n_in : shape.n_out, transposed ? shape.n_out : shape.n_in));
  return is_biased(list, role) ? add(list, role, layer, ".bias", shape.n_out, 0) : SFA_OK;
}

static sfa_status add_all(tensor_list *list) {
  const sfa_model_config *c = list->config;
  for (int role = 0; role < SFA_ROLE_COUNT; role++) {
    const char *name = c->family->tensors[role];
    if (!name || (role == SFA_ROLE_HEAD && config_switch(list, "tie_word_embeddings", true)))
      continue;
    const int32_t n = strchr(name, '*') ? c->n_layers : 1;
    for (int32_t layer = 0; layer < n; layer++)
      SFA_TRY(add_role(list, (sfa_role)role, layer));
  }
  return SFA_OK;
}

/* ---- Folders ---------------------------------------------------------------------------------------------------- */

static sfa_status save_tensors(sfa_context *ctx, const char *folder, const char *name, int64_t n, const sfa_tensor_out *tensors) {
  char *path;
  SFA_TRY(sfa_save_path(ctx, folder, name, &path));
  sfa_status status = sfa_safetensors_write(ctx, path, n, tensors);
  sfa_free(ctx, path);
  return status;
}

/* The tensors of the config that lies in the folder. */
static sfa_status fill_folder(sfa_context *ctx, const char *folder) {
  sfa_weights *weights;
  sfa_model_config config = {0};
  SFA_TRY(sfa_weights_open(ctx, folder, &weights));
  tensor_list list = {.ctx = ctx, .config = &config, .names = {ctx, weights, &config, ""}};
  sfa_status status = sfa_model_config_read(ctx, weights, &config);
  double vocab_size = 0;
  if (status == SFA_OK) {
    sfa_config_number(weights, &config, "vocab_size", &vocab_size);
    config.vocab_size = vocab_size >= 1 && vocab_size < INT32_MAX / 2 ? (int32_t)vocab_size : 0;
    status = config.vocab_size ? add_all(&list) : sfa_fail(ctx, SFA_ERROR_ARGUMENT, "the model's vocab_size is %g", vocab_size);
  }
  if (status == SFA_OK)
    status = save_tensors(ctx, folder, "model.safetensors", list.n, list.tensors);
  sfa_free(ctx, list.tensors);
  sfa_arena_free(ctx, &list.texts);
  sfa_model_config_free(ctx, &config);
  sfa_weights_close(weights);
  return status;
}

sfa_status sfa_train_model_create(sfa_context *ctx, const char *folder, const cJSON *config) {
  SFA_TRY(sfa_save_folder(ctx, folder));
  SFA_TRY(sfa_json_save(ctx, folder, "config.json", config));
  SFA_TRY(save_tensors(ctx, folder, "model.safetensors", 0, NULL)); /* the reader of the config wants a whole directory */
  return fill_folder(ctx, folder);
}

static cJSON *make_config(const sfa_recipe *recipe, bool sparse) {
  static const char name[] = "sparse_attention_config";
  cJSON *config = cJSON_Duplicate(cJSON_GetObjectItemCaseSensitive(recipe->json, "model"), true);
  const cJSON *wish = cJSON_GetObjectItemCaseSensitive(recipe->json, name);
  const char *type = recipe->weights == SFA_EXPORT_BF16 ? "bfloat16" : "float32";
  cJSON_DeleteItemFromObjectCaseSensitive(config, "torch_dtype");
  cJSON_DeleteItemFromObjectCaseSensitive(config, "dtype");
  bool complete = cJSON_AddStringToObject(config, "torch_dtype", type) != NULL;
  if (sparse && cJSON_IsObject(wish)) {
    cJSON *copy = cJSON_Duplicate(wish, true);
    if (!cJSON_HasObjectItem(copy, "algorithm"))
      complete &= cJSON_AddStringToObject(copy, "algorithm", "sfa") != NULL;
    complete &= cJSON_AddItemToObject(config, name, copy);
  }
  if (complete)
    return config;
  cJSON_Delete(config);
  return NULL;
}

/* A parameter's values where a file's writer finds them: in the memory of the host. */
static sfa_status take_values(sfa_context *ctx, const sfa_parameter *p, const float **values) {
  float *copy;
  *values = p->value;
  if (sfa_context_device(ctx) == SFA_DEVICE_CPU)
    return SFA_OK;
  *values = NULL;
  SFA_TRY(sfa_alloc(ctx, (size_t)p->n * sizeof *copy, p->name, (void **)&copy));
  *values = copy;
  SFA_TRY(sfa_memory_copy(ctx, copy, p->value, (size_t)p->n * sizeof *copy));
  return sfa_stream_wait(ctx);
}

static void return_values(sfa_context *ctx, int64_t n, const sfa_tensor_out *tensors) {
  for (int64_t i = 0; i < n && sfa_context_device(ctx) != SFA_DEVICE_CPU; i++)
    sfa_free(ctx, (void *)(uintptr_t)tensors[i].values);
}

sfa_status sfa_train_model_save(sfa_context *ctx, const char *folder, const sfa_recipe *recipe, sfa_train_saved what,
                                sfa_learner *learner) {
  const int32_t n_parameters = sfa_learner_count(learner);
  sfa_tensor_out *tensors;
  cJSON *config = make_config(recipe, what != SFA_SAVE_INITIAL);
  if (!config)
    return sfa_fail(ctx, SFA_ERROR_MEMORY, "out of memory for a config.json");
  sfa_status status = sfa_save_folder(ctx, folder);
  if (status == SFA_OK)
    status = sfa_alloc_zero(ctx, (size_t)n_parameters, sizeof *tensors, "a list of tensors", (void **)&tensors);
  if (status == SFA_OK) {
    int64_t n = 0;
    for (int32_t i = 0; i < n_parameters && status == SFA_OK; i++) {
      const sfa_parameter *p = sfa_learner_parameter(learner, i);
      if (what == SFA_SAVE_ADAPTER && !p->trainable)
        continue;
      tensors[n++] = (sfa_tensor_out){.name = p->name,
                                      .type = recipe->weights == SFA_EXPORT_BF16 ? SFA_TENSOR_BF16 : SFA_TENSOR_F32,
                                      .n_dims = p->n_dims,
                                      .shape = {p->shape[0], p->n_dims == 2 ? p->shape[1] : 1, 1, 1}};
      status = take_values(ctx, p, &tensors[n - 1].values);
    }
    if (status == SFA_OK)
      status = save_tensors(ctx, folder, what == SFA_SAVE_ADAPTER ? "adapter.safetensors" : "model.safetensors", n, tensors);
    return_values(ctx, n, tensors);
    sfa_free(ctx, tensors);
  }
  if (status == SFA_OK)
    status = sfa_json_save(ctx, folder, "config.json", config);
  cJSON_Delete(config);
  return status;
}

/* ---- The tokenizer's files -------------------------------------------------------------------------------------- */

static sfa_status copy_file(sfa_context *ctx, const char *from_folder, const char *to_folder, const char *name) {
  char *from = NULL, *to = NULL;
  sfa_map map = {0};
  sfa_status status = sfa_save_path(ctx, from_folder, name, &from);
  if (status == SFA_OK)
    status = sfa_save_path(ctx, to_folder, name, &to);
  if (status == SFA_OK && access(from, F_OK) == 0) {
    status = sfa_map_open(ctx, from, &map);
    if (status == SFA_OK)
      status = sfa_save_file(ctx, to, map.data, map.bytes);
    sfa_map_close(&map);
  }
  sfa_free(ctx, from);
  sfa_free(ctx, to);
  return status;
}

sfa_status sfa_train_model_copy_tokenizer(sfa_context *ctx, const char *folder, const char *from) {
  static const char *const names[] = {
      "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja", "vocab.json",
      "merges.txt"};
  struct stat info;
  char *from_folder, *slash;
  SFA_TRY(sfa_save_folder(ctx, folder));
  SFA_TRY(sfa_strdup(ctx, from, &from_folder));
  sfa_status status = SFA_OK;
  if (stat(from, &info) != 0)
    status = sfa_fail(ctx, SFA_ERROR_IO, "there is no tokenizer %s", from);
  else if (!S_ISDIR(info.st_mode)) { /* the folder that holds the file */
    slash = strrchr(from_folder, '/');
    if (strcmp(slash ? slash + 1 : from_folder, names[0]) != 0)
      status = sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "%s is no tokenizer.json: only those can lie beside a Hugging Face model", from);
    if (slash)
      slash[slash == from_folder] = 0;
    else
      snprintf(from_folder, strlen(from_folder) + 1, ".");
  }
  for (size_t i = 0; i < sizeof names / sizeof *names && status == SFA_OK; i++)
    status = copy_file(ctx, from_folder, folder, names[i]);
  sfa_free(ctx, from_folder);
  return status;
}
