/* Opening a model: its files, its layers, and the tokenizer that lies in or beside them. */
#include "file/weights.h"
#include "model/model.h"
#include "text/tokenizer.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* The path of `name` in the directory of `path` (in_directory = false) or in the directory `path` itself. */
static sfa_status path_beside(sfa_context *ctx, const char *path, bool in_directory, const char *name, char **out) {
  const char *slash = strrchr(path, '/');
  size_t stem = in_directory ? strlen(path) : slash ? (size_t)(slash - path) : 0;
  size_t bytes = stem + strlen(name) + 2;
  SFA_TRY(sfa_alloc(ctx, bytes, "a path", (void **)out));
  if (!in_directory && !slash)
    snprintf(*out, bytes, "%s", name);
  else
    snprintf(*out, bytes, "%.*s/%s", (int)stem, path, name);
  return SFA_OK;
}

typedef sfa_status (*tokenizer_reader)(sfa_context *ctx, const char *path, sfa_tokenizer **tokenizer);

/* Reads a tokenizer file if it is there; *tokenizer stays NULL if not. */
static sfa_status open_if_present(sfa_context *ctx, const char *model_path, bool in_directory, const char *name, tokenizer_reader read,
                                  sfa_tokenizer **tokenizer) {
  if (*tokenizer)
    return SFA_OK;
  char *path;
  SFA_TRY(path_beside(ctx, model_path, in_directory, name, &path));
  sfa_status status = access(path, F_OK) == 0 ? read(ctx, path, tokenizer) : SFA_OK;
  sfa_free(ctx, path);
  return status;
}

/* The tokenizer that belongs to the weights by the habits of their format; *tokenizer stays NULL if there is none. */
static sfa_status find_tokenizer(sfa_context *ctx, const char *path, const sfa_weights *weights, sfa_tokenizer **tokenizer) {
  const char *format = sfa_weights_format(weights), *kind;
  if (strcmp(format, "gguf") == 0)
    return sfa_meta_string(weights, "tokenizer.ggml.model", &kind, NULL) ? sfa_tokenizer_from_gguf(ctx, weights, tokenizer) : SFA_OK;
  if (strcmp(format, "safetensors") == 0)
    return open_if_present(ctx, path, true, "tokenizer.json", sfa_tokenizer_from_json, tokenizer);
  /* llama2.c calls its 32,000-token file tokenizer.bin and a trained one of another size tok<size>.bin. */
  double vocab_size = 0;
  char name[32];
  sfa_meta_number(weights, "vocab_size", &vocab_size);
  snprintf(name, sizeof name, "tok%d.bin", (int)vocab_size);
  SFA_TRY(open_if_present(ctx, path, false, name, sfa_tokenizer_from_llama2c, tokenizer));
  return open_if_present(ctx, path, false, "tokenizer.bin", sfa_tokenizer_from_llama2c, tokenizer);
}

static sfa_status attach_tokenizer(sfa_context *ctx, const char *path, const char *tokenizer_path, sfa_model *model) {
  sfa_tokenizer *tokenizer = NULL;
  if (tokenizer_path) {
    SFA_TRY(sfa_tokenizer_open(ctx, tokenizer_path, &tokenizer));
  } else {
    sfa_status status = find_tokenizer(ctx, path, sfa_model_weights(model), &tokenizer);
    if (status == SFA_ERROR_UNSUPPORTED) /* the model itself is usable, with token ids */
      sfa_log(ctx, "the model opens without its tokenizer: %s", sfa_context_error(ctx));
    else if (status != SFA_OK)
      return status;
  }
  sfa_model_attach(model, tokenizer);
  sfa_model_info info;
  sfa_model_describe(model, &info);
  /* More tokens than rows would let a text reach ids that the model does not have; fewer is usual (padded embeddings). */
  if (tokenizer && sfa_tokenizer_vocab_size(tokenizer) > info.vocab_size)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "the tokenizer%s%s has %d tokens but the model %d: they do not belong together",
                    tokenizer_path ? " " : "", tokenizer_path ? tokenizer_path : "", sfa_tokenizer_vocab_size(tokenizer), info.vocab_size);
  return SFA_OK;
}

sfa_status sfa_model_open(sfa_context *ctx, const char *path, const sfa_model_options *options, sfa_model **model) {
  SFA_REQUIRE(ctx, model, "sfa_model_open wants a place for the model");
  *model = NULL;
  SFA_REQUIRE(ctx, path && *path, "sfa_model_open wants a path");
  SFA_REQUIRE(ctx, !options || options->struct_size == sizeof *options, "sfa_model_options is of another version: %zu bytes, not %zu",
              options->struct_size, sizeof *options);
  sfa_weight_format format = options ? options->weights : SFA_WEIGHTS_AUTO;
  SFA_REQUIRE(ctx, format >= SFA_WEIGHTS_AUTO && format <= SFA_WEIGHTS_INT8, "%d is not a weight format", (int)format);

  sfa_weights *weights;
  SFA_TRY(sfa_weights_open_adapted(ctx, path, options ? options->adapter : NULL, &weights));
  SFA_TRY(sfa_model_load(ctx, weights, format, model));
  sfa_status status = attach_tokenizer(ctx, path, options ? options->tokenizer : NULL, *model);
  if (status != SFA_OK) {
    sfa_model_close(*model);
    *model = NULL;
  }
  return status;
}

void sfa_model_close(sfa_model *model) {
  if (!model)
    return;
  sfa_tokenizer_close(sfa_model_attached(model));
  sfa_model_destroy(model);
}

const sfa_tokenizer *sfa_model_tokenizer(const sfa_model *model) { return sfa_model_attached(model); }
