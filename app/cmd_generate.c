/* sfa generate: a prompt in, new text out. */
#include "app.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEFAULT_PREDICT = 256 };

/* The prompt as the model wants it: through its chat template, or as it is. */
static int make_prompt(const app *a, int32_t **ids, int64_t *n_ids) {
  const app_options *o = a->o;
  char *text, *formatted = NULL;
  size_t n;
  int status = app_read_text(o, &text, &n);
  if (status)
    return status;
  bool chat = a->info.is_instruct && !o->raw;
  if (n == 0) {
    status = app_usage("the prompt is empty; there is nothing to go on from");
  } else if (chat && strlen(text) != n) {
    status = app_usage("the prompt holds a zero byte; a chat message cannot");
  } else if (o->system && !chat) {
    status = app_usage("--system wants the chat template of an instruct model%s",
                       o->raw ? ", which --raw switches off" : "; this model has none");
  } else if (chat) {
    sfa_chat_message messages[2] = {{"system", o->system}, {"user", text}};
    int skip = !o->system;
    if (sfa_chat_format(a->tokenizer, messages + skip, 2 - skip, 1, &formatted) != SFA_OK)
      status = app_fail_status(a->ctx);
    else
      status = app_tokenize(a, formatted, strlen(formatted), SFA_TOKENIZE_PARSE, ids, n_ids);
  } else {
    status = app_tokenize(a, text, n, SFA_TOKENIZE_SPECIAL | SFA_TOKENIZE_PARSE, ids, n_ids);
  }
  if (formatted)
    sfa_free_text(a->ctx, formatted);
  free(text);
  return status;
}

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
static int read_and_answer(app *a, const int32_t *ids, int64_t n_ids, float *logits, sfa_sampler *sampler) {
  int64_t context_len, n_predict;
  int status = app_context_len(a, &context_len);
  if (!status)
    status = choose_length(a, n_ids, context_len, &n_predict);
  if (!status)
    status = app_open_session(a, &a->choice, context_len);
  if (status)
    return status;
  interrupt_begin();
  sfa_status read = sfa_session_append(a->session, ids, n_ids, logits);
  progress_clear(&a->progress);
  if (read == SFA_ERROR_CANCELLED)
    return EXIT_INTERRUPTED;
  if (read != SFA_OK)
    return app_fail_status(a->ctx);
  for (int64_t i = 0; i < n_ids; i++)
    sfa_sampler_accept(sampler, ids[i]);
  app_answer answer = {0};
  status = answer_generate(a, sampler, logits, ids[n_ids - 1], n_predict, !a->o->json, &answer);
  if (!status)
    status = print_answer(a, n_ids, &answer);
  if (!status && answer.stop == STOP_INTERRUPTED)
    status = EXIT_INTERRUPTED;
  answer_free(&answer);
  return status;
}

static int generate(app *a, const app_options *o) {
  int32_t *ids = NULL;
  int64_t n_ids = 0;
  sfa_sampler *sampler = NULL;
  int status = app_require_model(o, "generate");
  if (!status && !o->prompt && !o->file)
    status = app_usage("generate wants a text: -p TEXT or -f FILE (- is standard input)");
  if (!status)
    status = app_open_model(a, o, true);
  if (!status)
    status = make_prompt(a, &ids, &n_ids);
  if (!status)
    status = sampler_open(a, &sampler);
  float *logits = status ? NULL : malloc((size_t)a->info.vocab_size * sizeof *logits);
  if (!status)
    status = logits ? read_and_answer(a, ids, n_ids, logits, sampler) : app_fail("out of memory for the logits");
  free(logits);
  sfa_sampler_destroy(sampler);
  if (ids)
    sfa_free_ids(a->ctx, ids);
  return status;
}

int cmd_generate(const app_options *o) {
  app a = {0};
  int status = generate(&a, o);
  app_close(&a);
  return status;
}
