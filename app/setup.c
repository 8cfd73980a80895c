/* From options to a context, a model, a text and a session. */
#include "document.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int app_require_model(const app_options *o, const char *verb) {
  return o->model ? EXIT_OK : app_usage("%s wants a model: -m with a GGUF file, a Hugging Face directory or a llama2.c .bin", verb);
}

int app_device(const app_options *o, sfa_context_options *context) {
  const char *word = o->device ? o->device : "cpu";
  char *end = NULL;
  long index = 0;
  if (strcmp(word, "cpu") == 0)
    return EXIT_OK;
  if (strncmp(word, "cuda:", 5) == 0 && word[5] >= '0' && word[5] <= '9')
    index = strtol(word + 5, &end, 10);
  if (strcmp(word, "cuda") != 0 && (!end || *end || index > 1023))
    return app_usage("--device takes cpu, cuda, or cuda:N with the number of a GPU, not %s", word);
  context->device = SFA_DEVICE_CUDA;
  context->device_index = (int32_t)index;
  return EXIT_OK;
}

int app_open_context(app *a, const app_options *o, int64_t n_threads, sfa_isa isa) {
  *a = (app){.o = o};
  char why[512] = "";
  sfa_context_options context = {
      .struct_size = sizeof context, .n_threads = (int32_t)n_threads, .isa = isa, .why = why, .why_bytes = sizeof why};
  int status = app_device(o, &context);
  if (status)
    return status;
  return sfa_context_create(&context, &a->ctx) == SFA_OK ? EXIT_OK : app_fail("%s", why);
}

void app_close(app *a) {
  sfa_session_destroy(a->session);
  sfa_model_close(a->model);
  sfa_tokenizer_close(a->own_tokenizer);
  sfa_context_destroy(a->ctx);
  free(a->layer_list);
  *a = (app){0};
}

/* Places in "int8|bf16|f16|f32|int4|fp8" of the option table, from -1: not given. */
static sfa_dtype cache_dtype(int index) {
  static const sfa_dtype dtypes[] = {SFA_DTYPE_DEFAULT, SFA_I8, SFA_BF16, SFA_F16, SFA_F32, SFA_I4, SFA_E4M3};
  return dtypes[index + 1];
}

static int read_choice(app *a) {
  const app_options *o = a->o;
  const int_list *layers = &o->sfa_layers;
  bool sfa_options = o->sfa_k || o->sfa_kq || layers->n || layers->word >= 0;
  bool model_is_sparse = a->info.sfa_k > 0;
  a->choice = (sfa_attention_choice){.struct_size = sizeof a->choice,
                                     .sparse = o->attention >= 0 ? o->attention : sfa_options || model_is_sparse,
                                     .k = (int32_t)o->sfa_k,
                                     .k_q = (int32_t)o->sfa_kq,
                                     .cache_k = cache_dtype(o->cache_k),
                                     .cache_v = cache_dtype(o->cache_v),
                                     .precision = (sfa_precision)o->precision,
                                     .eps = (float)o->eps,
                                     .policy = (sfa_policy)o->policy,
                                     .costs = costs_kept(sfa_context_isa(a->ctx), &a->costs)};
  if (sfa_options && !a->choice.sparse)
    return app_usage("--attention dense and the --sfa options exclude each other");
  if (layers->word == 1)
    a->choice.layers = 1;
  if (!layers->n)
    return EXIT_OK;
  a->layer_list = malloc((size_t)layers->n * sizeof *a->layer_list);
  if (!a->layer_list)
    return app_fail("out of memory for the list of layers");
  for (int64_t i = 0; i < layers->n; i++) {
    if (layers->values[i] >= a->info.n_layers)
      return app_usage("--sfa-layers has layer %lld, but the model's layers are 0 to %d", (long long)layers->values[i],
                       a->info.n_layers - 1);
    a->layer_list[i] = (int32_t)layers->values[i];
  }
  a->choice.layers = 2;
  a->choice.layer_list = a->layer_list;
  a->choice.n_layer_list = (int32_t)layers->n;
  return EXIT_OK;
}

int app_open_model(app *a, const app_options *o, bool wants_text) {
  int status = app_open_context(a, o, o->threads, (sfa_isa)o->isa);
  if (status)
    return status;
  sfa_model_options model = {
      .struct_size = sizeof model, .weights = (sfa_weight_format)o->weights, .tokenizer = o->tokenizer, .adapter = o->adapter};
  if (sfa_model_open(a->ctx, o->model, &model, &a->model) != SFA_OK)
    return app_fail_status(a->ctx);
  sfa_model_describe(a->model, &a->info);
  a->tokenizer = sfa_model_tokenizer(a->model);
  if (wants_text && !a->tokenizer)
    return app_fail("no tokenizer that can be read in or beside %s; name one with --tokenizer", o->model);
  if ((status = read_choice(a)) != EXIT_OK)
    return status;
  size_t bytes;
  return sfa_model_kv_bytes(a->model, &a->choice, &bytes) == SFA_OK ? EXIT_OK : app_usage("%s", sfa_context_error(a->ctx));
}

int app_open_tokenizer(app *a, const app_options *o) {
  const char *path = o->tokenizer ? o->tokenizer : o->model;
  size_t len = strlen(path);
  if (!o->tokenizer && len > 4 && strcmp(path + len - 4, ".bin") == 0) /* a llama2.c model: the tokenizer lies beside it */
    return app_open_model(a, o, true);
  int status = app_open_context(a, o, o->threads, SFA_ISA_DEFAULT);
  if (status)
    return status;
  if (sfa_tokenizer_open(a->ctx, path, &a->own_tokenizer) != SFA_OK)
    return app_fail_status(a->ctx);
  a->tokenizer = a->own_tokenizer;
  return EXIT_OK;
}

int app_context_len(const app *a, int64_t *context_len) {
  *context_len = a->o->context > 0 ? a->o->context : a->info.context_len;
  if (*context_len > a->info.context_len)
    return app_usage("--context %lld is more than the %lld tokens that the model was trained on", (long long)*context_len,
                     (long long)a->info.context_len);
  return EXIT_OK;
}

static int open_session(app *a, const sfa_attention_choice *choice, int64_t context_len, const char *index) {
  sfa_session_options session = {.struct_size = sizeof session,
                                 .attention = choice,
                                 .context_len = context_len,
                                 .chunk_len = (int32_t)a->o->chunk,
                                 .progress = progress_step,
                                 .progress_user = &a->progress};
  a->context_len = context_len;
  a->progress = (progress){.what = "reading", .start = seconds_now()};
  sfa_status status =
      index ? sfa_session_load(a->model, &session, index, &a->session) : sfa_session_create(a->model, &session, &a->session);
  return status == SFA_OK ? EXIT_OK : app_fail_status(a->ctx);
}

int app_open_session(app *a, const sfa_attention_choice *choice, int64_t context_len) { return open_session(a, choice, context_len, NULL); }

int app_load_session(app *a, const char *index, int64_t context_len) { return open_session(a, &a->choice, context_len, index); }

/* ---- Text -------------------------------------------------------------------------------------------------------------------- */

int app_read_text(const app_options *o, char **text, size_t *n_bytes) {
  if (o->prompt && o->file)
    return app_usage("give the text with -p or with -f, not both");
  if (!o->prompt && !o->file)
    return app_usage("give a text with -p TEXT or -f FILE (- is standard input)");
  if (o->prompt) {
    *n_bytes = strlen(o->prompt);
    *text = strdup(o->prompt);
    return *text ? EXIT_OK : app_fail("out of memory for the prompt");
  }
  app_document doc = {0};
  int status = document_read(o->file, &doc);
  *n_bytes = doc.text.n;
  *text = doc.text.bytes;
  doc.text.bytes = NULL;
  document_free(&doc);
  return status;
}

int app_read_ids(const app *a, int32_t **ids, int64_t *n_ids, size_t *n_bytes) {
  char *text = NULL;
  size_t n = 0;
  int status = app_read_text(a->o, &text, &n);
  if (status)
    return status;
  status = app_tokenize(a, text, n, SFA_TOKENIZE_SPECIAL, ids, n_ids);
  free(text);
  if (n_bytes)
    *n_bytes = n;
  return status;
}

int app_tokenize(const app *a, const char *text, size_t n_bytes, uint32_t flags, int32_t **ids, int64_t *n_ids) {
  size_t n;
  if (sfa_tokenizer_encode(a->tokenizer, text, n_bytes, flags, ids, &n) != SFA_OK)
    return app_fail_status(a->ctx);
  *n_ids = (int64_t)n;
  return EXIT_OK;
}

const char *app_attention_name(const app *a, char *out, size_t capacity) {
  const char *policy = a->choice.policy ? sfa_policy_name(a->choice.policy) : "", *comma = *policy ? ", " : "";
  if (!a->choice.sparse) {
    snprintf(out, capacity, "dense%s%s", comma, policy);
    return out;
  }
  int k = a->choice.k ? a->choice.k : a->info.sfa_k ? a->info.sfa_k : 16;
  const char *layers[] = {"", ", layers with global attention", ", some layers"};
  if (k > a->info.head_dim)
    k = a->info.head_dim;
  snprintf(out, capacity, "SFA k=%d of %d%s%s%s%s", k, a->info.head_dim, a->choice.k_q == -1 ? ", dense queries" : "",
           layers[a->choice.layers], comma, policy);
  return out;
}
