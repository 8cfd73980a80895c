/* sfa data: texts to token shards; sfa tokenizer train: texts to a tokenizer. */
#include "app.h"

#include <sfa/data.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- What both share --------------------------------------------------------------------------------------------------------- */

static sfa_text_inputs inputs_of(const app_options *o, const text_list *paths) {
  return (sfa_text_inputs){.struct_size = sizeof(sfa_text_inputs),
                           .paths = paths->values,
                           .n_paths = paths->n,
                           .format = (sfa_text_format)o->text_format,
                           .separator = o->separator,
                           .field = o->field};
}

typedef struct pass_progress {
  const char *what;
  double start, shown;
} pass_progress;

/* sfa_data_progress_fn; the line is shown twice a second at most. */
static int show_pass(void *user, const sfa_data_progress *at) {
  pass_progress *p = user;
  double now = seconds_now(), passed = now - p->start;
  if (isatty(STDERR_FILENO) && now - p->shown > 0.5 && passed > 0.5) {
    char size[32];
    fprintf(stderr, "\r\033[K%s: %lld documents, %s, %.1f MB/s", p->what, (long long)at->n_documents,
            human_bytes((double)at->text_bytes, size), (double)at->text_bytes / passed / 1e6);
    if (at->n_tokens)
      fprintf(stderr, ", %.1f M tokens", (double)at->n_tokens / 1e6);
    if (at->bytes_total && at->bytes_done)
      fprintf(stderr, ", about %.0f s left", passed * (double)(at->bytes_total - at->bytes_done) / (double)at->bytes_done);
    fflush(stderr);
    p->shown = now;
  }
  return interrupted();
}

static void clear_pass(const pass_progress *p) {
  if (p->shown > 0)
    fputs("\r\033[K", stderr);
}

static cJSON *pass_json(const sfa_data_progress *all, double seconds) {
  cJSON *document = cJSON_CreateObject();
  cJSON_AddNumberToObject(document, "documents", (double)all->n_documents);
  cJSON_AddNumberToObject(document, "text_bytes", (double)all->text_bytes);
  cJSON_AddNumberToObject(document, "tokens", (double)all->n_tokens);
  cJSON_AddNumberToObject(document, "seconds", seconds);
  return document;
}

static void print_pass(const sfa_data_progress *all, double seconds) {
  char size[32];
  printf("%lld documents, %s of text, %lld tokens (%.2f bytes each), %.1f s, %.1f MB/s\n", (long long)all->n_documents,
         human_bytes((double)all->text_bytes, size), (long long)all->n_tokens,
         (double)all->text_bytes / (double)(all->n_tokens ? all->n_tokens : 1), seconds, (double)all->text_bytes / 1e6 / seconds);
}

static int failed_pass(const app *a, sfa_status status) {
  int code = app_fail_status(a->ctx);
  return status == SFA_ERROR_CANCELLED ? EXIT_INTERRUPTED : code;
}

/* ---- Shards ------------------------------------------------------------------------------------------------------------------ */

/* "DIR/train", in memory that the caller frees. */
static char *set_path(const char *folder, const char *name) {
  size_t bytes = strlen(folder) + strlen(name) + 2;
  char *path = malloc(bytes);
  if (path)
    snprintf(path, bytes, "%s/%s", folder, name);
  return path;
}

/* One call of the library: the documents of some paths to one set, or to two with a share held out. */
static int write_set(app *a, const text_list *paths, const char *train, const char *valid, sfa_data_result *result) {
  const app_options *o = a->o;
  pass_progress shown = {.what = "tokenizing", .start = seconds_now()};
  sfa_text_inputs inputs = inputs_of(o, paths);
  sfa_data_options options = {.struct_size = sizeof options,
                              .train = train,
                              .valid = valid,
                              .valid_share = o->valid_share,
                              .seed = o->seed < 0 ? 0 : (uint64_t)o->seed,
                              .end_token = o->end_token,
                              .shard_len = o->shard_tokens < 0 ? 0 : o->shard_tokens,
                              .memory_bytes = o->memory < 0 ? 0 : o->memory << 20,
                              .progress = show_pass,
                              .progress_user = &shown};
  sfa_status status = sfa_data_write(a->tokenizer, &inputs, &options, result);
  clear_pass(&shown);
  return status == SFA_OK ? EXIT_OK : failed_pass(a, status);
}

static int report_shards(const app_options *o, const sfa_data_result *train, const sfa_data_result *valid, double seconds) {
  sfa_data_progress all = train->all;
  int64_t n_valid = train->n_valid_tokens + valid->all.n_tokens, n_valid_documents = train->n_valid_documents + valid->all.n_documents;
  all.n_documents += valid->all.n_documents;
  all.text_bytes += valid->all.text_bytes;
  all.n_tokens += valid->all.n_tokens;
  if (o->json) {
    cJSON *document = pass_json(&all, seconds);
    cJSON_AddNumberToObject(document, "valid_documents", (double)n_valid_documents);
    cJSON_AddNumberToObject(document, "valid_tokens", (double)n_valid);
    cJSON_AddStringToObject(document, "folder", o->out);
    return app_print_json(document);
  }
  print_pass(&all, seconds);
  printf("%s/train: %lld tokens of %lld documents\n", o->out, (long long)(all.n_tokens - n_valid),
         (long long)(all.n_documents - n_valid_documents));
  if (n_valid)
    printf("%s/valid: %lld tokens of %lld documents, held out\n", o->out, (long long)n_valid, (long long)n_valid_documents);
  return app_flush();
}

static int make_shards(app *a, const app_options *o) {
  if (!o->inputs.n)
    return app_usage("data wants files or folders with text; - is standard input");
  if (!o->model && !o->tokenizer)
    return app_usage("data wants a tokenizer: --tokenizer with its file, or -m with a model that has one");
  if (!o->out)
    return app_usage("data wants a folder for the shards: -o DIR");
  if (o->valid.n && o->valid_share > 0)
    return app_usage("--valid names what is held out, --valid-share draws it: give one of them");
  double start = seconds_now();
  sfa_data_result train = {0}, valid = {0};
  int status = app_open_tokenizer(a, o);
  if (!status)
    status = app_make_folder(o->out);
  char *train_path = set_path(o->out, "train"), *valid_path = set_path(o->out, "valid");
  if (!status && (!train_path || !valid_path))
    status = app_fail("out of memory for a path");
  interrupt_begin();
  if (!status && o->valid.n)
    status = write_set(a, &o->valid, valid_path, NULL, &valid);
  if (!status)
    status = write_set(a, &o->inputs, train_path, o->valid_share > 0 ? valid_path : NULL, &train);
  if (!status)
    status = report_shards(o, &train, &valid, seconds_now() - start);
  free(train_path);
  free(valid_path);
  return status;
}

static int verify_shards(app *a, const app_options *o) {
  sfa_shards *shards;
  sfa_shards_info info;
  char size[32], fingerprint[32];
  if (!o->inputs.n)
    return app_usage("--verify wants shards: files, or sets as in DIR/train");
  int status = app_open_context(a, o, 1, SFA_ISA_DEFAULT);
  if (status)
    return status;
  if (sfa_shards_open(a->ctx, o->inputs.values, o->inputs.n, &shards) != SFA_OK)
    return app_fail_status(a->ctx);
  if (sfa_shards_verify(shards) != SFA_OK)
    status = app_fail_status(a->ctx);
  sfa_shards_describe(shards, &info);
  snprintf(fingerprint, sizeof fingerprint, "%016llx", (unsigned long long)info.tokenizer);
  if (!status && o->json) {
    cJSON *document = cJSON_CreateObject();
    cJSON_AddNumberToObject(document, "shards", (double)info.n_shards);
    cJSON_AddNumberToObject(document, "documents", (double)info.n_documents);
    cJSON_AddNumberToObject(document, "tokens", (double)info.n_tokens);
    cJSON_AddNumberToObject(document, "bytes", (double)info.bytes);
    cJSON_AddNumberToObject(document, "vocab_size", info.vocab_size);
    cJSON_AddNumberToObject(document, "end_token", info.end_token);
    cJSON_AddStringToObject(document, "tokenizer", fingerprint);
    status = app_print_json(document);
  } else if (!status) {
    printf("%lld shards, %s, whole: %lld tokens of %lld documents; vocabulary %d, end token %d, tokenizer %s\n", (long long)info.n_shards,
           human_bytes((double)info.bytes, size), (long long)info.n_tokens, (long long)info.n_documents, info.vocab_size, info.end_token,
           fingerprint);
    status = app_flush();
  }
  sfa_shards_close(shards);
  return status;
}

int cmd_data(const app_options *o) {
  app a = {0};
  int status = o->verify ? verify_shards(&a, o) : make_shards(&a, o);
  app_close(&a);
  return status;
}

/* ---- A tokenizer ------------------------------------------------------------------------------------------------------------- */

static int train_tokenizer(app *a, const app_options *o) {
  if (!o->inputs.n)
    return app_usage("tokenizer train wants files or folders with text; - is standard input");
  if (!o->out)
    return app_usage("tokenizer train wants a folder for tokenizer.json: -o DIR");
  int status = app_open_context(a, o, o->threads, SFA_ISA_DEFAULT);
  if (status)
    return status;
  pass_progress shown = {.what = "counting words", .start = seconds_now()};
  sfa_text_inputs inputs = inputs_of(o, &o->inputs);
  sfa_tokenizer_train_options options = {.struct_size = sizeof options,
                                         .vocab_size = (int32_t)o->vocab,
                                         .special = o->special.values,
                                         .n_special = (int32_t)o->special.n,
                                         .min_count = o->min_count < 0 ? 0 : o->min_count,
                                         .memory_bytes = o->memory < 0 ? 0 : o->memory << 20,
                                         .progress = show_pass,
                                         .progress_user = &shown};
  sfa_tokenizer_train_result result;
  interrupt_begin();
  sfa_status trained = sfa_tokenizer_train(a->ctx, &inputs, &options, o->out, &result);
  clear_pass(&shown);
  if (trained != SFA_OK)
    return failed_pass(a, trained);
  double seconds = seconds_now() - shown.start;
  if (result.vocab_size < options.vocab_size)
    app_note("no pair was left to merge: the vocabulary has %d tokens instead of %d", result.vocab_size, options.vocab_size);
  if (o->json) {
    cJSON *document = pass_json(&result.all, seconds);
    cJSON_AddNumberToObject(document, "vocab_size", result.vocab_size);
    cJSON_AddNumberToObject(document, "words", (double)result.n_words);
    cJSON_AddNumberToObject(document, "forgotten", (double)result.n_forgotten);
    cJSON_AddStringToObject(document, "folder", o->out);
    return app_print_json(document);
  }
  print_pass(&result.all, seconds);
  printf("%s/tokenizer.json: %d tokens, from %lld different words\n", o->out, result.vocab_size, (long long)result.n_words);
  return app_flush();
}

int cmd_tokenizer_train(const app_options *o) {
  app a = {0};
  int status = train_tokenizer(&a, o);
  app_close(&a);
  return status;
}
