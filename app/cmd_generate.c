/* sfa generate: a prompt in, new text out. */
#include "document.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEFAULT_PREDICT = 256 };

/* How many tokens may come: what was asked for must fit the context, the default is cut to it. */
static int choose_length(const app *a, int64_t n_prompt, int64_t context_len, int64_t *n_predict) {
  *n_predict = a->o->n_predict > 0 ? a->o->n_predict : DEFAULT_PREDICT;
  if (n_prompt >= context_len)
    return app_fail("the prompt has %lld tokens, the context only %lld: shorten it%s", (long long)n_prompt, (long long)context_len,
                    context_len < a->info.context_len ? " or raise --context" : "");
  int64_t room = context_len - n_prompt;
  if (a->o->n_predict > room)
    return app_fail("%lld tokens of prompt and %lld new ones are more than the context of %lld; ask for at most -n %lld",
                    (long long)n_prompt, (long long)a->o->n_predict, (long long)context_len, (long long)room);
  if (*n_predict > room)
    *n_predict = room;
  return EXIT_OK;
}

static int print_answer(const app *a, int64_t n_prompt, const app_answer *answer) {
  if (!a->o->json) {
    putchar('\n');
    int status = app_flush();
    stats_print(a);
    return status;
  }
  cJSON *document = cJSON_CreateObject(), *ids = cJSON_AddArrayToObject(document, "ids");
  for (int64_t i = 0; i < answer->ids.n; i++)
    cJSON_AddItemToArray(ids, cJSON_CreateNumber((double)answer->ids.values[i]));
  cJSON_AddStringToObject(document, "text", answer->text.bytes ? answer->text.bytes : "");
  cJSON_AddStringToObject(document, "stop", stop_name(answer->stop));
  cJSON_AddNumberToObject(document, "prompt_tokens", (double)n_prompt);
  cJSON_AddNumberToObject(document, "seed", (double)a->seed);
  cJSON_AddItemToObject(document, "stats", stats_json(a));
  return app_print_json(document);
}

/* Prompt tokens through the model, then the answer. */
static int read_and_answer(app *a, prompt *p, float *logits, sfa_sampler *sampler) {
  int64_t context_len, n_predict;
  reading r;
  int status = app_context_len(a, &context_len);
  if (!status)
    status = reading_begin(a, p, &r);
  if (!status)
    status = choose_length(a, p->n_ids, context_len, &n_predict);
  if (!status)
    status = r.has_index ? app_load_session(a, a->o->index, context_len) : app_open_session(a, &a->choice, context_len);
  if (status)
    return status;
  interrupt_begin();
  status = reading_run(&r, logits);
  progress_clear(&a->progress);
  if (status)
    return status;
  for (int64_t i = 0; i < p->n_ids; i++)
    sfa_sampler_accept(sampler, p->ids[i]);
  app_answer answer = {0};
  status = answer_generate(a, sampler, logits, p->ids[p->n_ids - 1], n_predict, !a->o->json, &answer);
  if (!status)
    status = print_answer(a, p->n_ids, &answer);
  if (!status && answer.stop == STOP_INTERRUPTED)
    status = EXIT_INTERRUPTED;
  answer_free(&answer);
  return status;
}

/* What a folder gave, so that nobody wonders about a file that was left out. */
static void tell_folder(const app_document *doc) {
  char bytes[32], left_out[256];
  fprintf(stderr, "[%zu files, %s%s%s]\n", doc->n_parts, human_bytes((double)doc->text.n, bytes),
          *document_left_out(doc, left_out, sizeof left_out) ? "; left out: " : "", left_out);
}

static int generate(app *a, const app_options *o) {
  prompt p = {0};
  app_document doc = {0};
  sfa_sampler *sampler = NULL;
  int status = app_require_model(o, "generate");
  if (!status && !o->prompt && !o->file && !o->index)
    status = app_usage("generate wants a text: -p TEXT or -f FILE (- is standard input)");
  if (!status && o->verify && !o->index)
    status = app_usage("--verify looks at an index: give --index FILE");
  if (!status)
    status = app_open_model(a, o, true);
  if (!status)
    status = prompt_make(a, o->index != NULL, &doc, &p);
  if (!status && doc.is_folder && !o->json)
    tell_folder(&doc);
  if (!status)
    status = sampler_open(a, &sampler);
  float *logits = status ? NULL : malloc((size_t)a->info.vocab_size * sizeof *logits);
  if (!status)
    status = logits ? read_and_answer(a, &p, logits, sampler) : app_fail("out of memory for the logits");
  free(logits);
  sfa_sampler_destroy(sampler);
  prompt_free(&p);
  document_free(&doc);
  return status;
}

int cmd_generate(const app_options *o) {
  app a = {0};
  int status = generate(&a, o);
  app_close(&a);
  return status;
}
