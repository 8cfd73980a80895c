/* sfa chat: a conversation whose history stays in the cache; each turn appends only what is new. */
#include "app.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A turn that the model ended is in the session for good. One that was cut short is taken out again and its messages wait here: with the
 * next question they are written once more, now as a closed turn. */
typedef struct chat {
  app app;
  sfa_sampler *sampler;
  float *logits;
  sfa_chat_message *waiting;
  int32_t n_waiting;
} chat;

static int push_message(chat *c, const char *role, const char *content) {
  sfa_chat_message *more = realloc(c->waiting, ((size_t)c->n_waiting + 1) * sizeof *more);
  char *copy = strdup(content);
  if (more)
    c->waiting = more;
  if (!more || !copy) {
    free(copy);
    return app_fail("out of memory for the conversation");
  }
  c->waiting[c->n_waiting++] = (sfa_chat_message){role, copy};
  return EXIT_OK;
}

static void drop_messages(chat *c, int32_t keep) {
  while (c->n_waiting > keep)
    free((char *)(uintptr_t)c->waiting[--c->n_waiting].content);
}

static int forget(chat *c) {
  drop_messages(c, 0);
  sfa_session_truncate(c->app.session, 0);
  return c->app.o->system ? push_message(c, "system", c->app.o->system) : EXIT_OK;
}

/* What the answer left behind: a closed turn stays, a cut one waits. */
static int keep_turn(chat *c, int64_t turn_start, const app_answer *answer) {
  app *a = &c->app;
  if (answer->stop == STOP_END && sfa_session_len(a->session) < a->context_len) {
    if (sfa_session_append(a->session, &answer->pending, 1, NULL) != SFA_OK)
      return app_fail_status(a->ctx);
    drop_messages(c, 0);
    return EXIT_OK;
  }
  sfa_session_truncate(a->session, turn_start);
  return push_message(c, "assistant", answer->text.bytes ? answer->text.bytes : "");
}

static int answer_tokens(chat *c, const int32_t *ids, int64_t n_ids) {
  app *a = &c->app;
  int64_t start = sfa_session_len(a->session), room = a->context_len - start - n_ids;
  if (room < 1) {
    drop_messages(c, c->n_waiting - 1); /* the question alone is dropped, so that a shorter one may follow */
    fprintf(stderr, "[%lld tokens do not fit what is left of the context, %lld of %lld; /reset starts anew]\n", (long long)n_ids,
            (long long)(a->context_len - start), (long long)a->context_len);
    return EXIT_OK;
  }
  a->progress.start = seconds_now();
  sfa_status status = sfa_session_append(a->session, ids, n_ids, c->logits);
  progress_clear(&a->progress);
  if (status == SFA_ERROR_CANCELLED) {
    drop_messages(c, c->n_waiting - 1);
    return EXIT_OK;
  }
  if (status != SFA_OK)
    return app_fail_status(a->ctx);
  for (int64_t i = 0; i < n_ids; i++)
    sfa_sampler_accept(c->sampler, ids[i]);
  int64_t n_most = a->o->n_predict > 0 && a->o->n_predict < room ? a->o->n_predict : room;
  app_answer answer = {0};
  int result = answer_generate(a, c->sampler, c->logits, ids[n_ids - 1], n_most, !a->o->json, &answer);
  if (!result && !a->o->json) {
    printf("%s\n", answer.stop == STOP_END ? "" : " [cut]");
    result = app_flush();
  } else if (!result) {
    cJSON *line = cJSON_CreateObject();
    cJSON_AddStringToObject(line, "text", answer.text.bytes ? answer.text.bytes : "");
    cJSON_AddStringToObject(line, "stop", stop_name(answer.stop));
    cJSON_AddItemToObject(line, "stats", stats_json(a));
    result = app_print_json(line);
  }
  if (!result)
    result = keep_turn(c, start, &answer);
  answer_free(&answer);
  return result;
}

static int ask(chat *c, const char *line) {
  app *a = &c->app;
  char *text;
  int32_t *ids;
  int64_t n_ids;
  int status = push_message(c, "user", line);
  if (status)
    return status;
  if (sfa_chat_format(a->tokenizer, c->waiting, c->n_waiting, sfa_session_len(a->session) == 0, &text) != SFA_OK)
    return app_fail_status(a->ctx);
  status = app_tokenize(a, text, strlen(text), SFA_TOKENIZE_PARSE, &ids, &n_ids);
  sfa_free_text(a->ctx, text);
  if (status)
    return status;
  interrupt_clear();
  status = answer_tokens(c, ids, n_ids);
  sfa_free_ids(a->ctx, ids);
  return status;
}

static int converse(chat *c) {
  bool prompts = isatty(STDIN_FILENO) && !c->app.o->json;
  char *line = NULL;
  size_t capacity = 0;
  int status = forget(c);
  while (!status) {
    if (prompts)
      fputs("> ", stderr);
    ssize_t n = getline(&line, &capacity, stdin);
    if (n < 0 && interrupted() && !feof(stdin)) { /* Ctrl-C at the prompt empties the line */
      clearerr(stdin);
      interrupt_clear();
      fputc('\n', stderr);
      continue;
    }
    if (n < 0)
      break;
    while (n > 0 && (line[n - 1] == '\n' || line[n - 1] == '\r'))
      line[--n] = 0;
    if (strcmp(line, "/exit") == 0)
      break;
    if (strcmp(line, "/reset") == 0)
      status = forget(c);
    else if (line[0] == '/')
      fprintf(stderr, "[no command %s; there are /reset and /exit]\n", line);
    else if (n > 0)
      status = ask(c, line);
  }
  free(line);
  return status;
}

int cmd_chat(const app_options *o) {
  chat c = {0};
  app *a = &c.app;
  int status = app_require_model(o, "chat");
  if (!status)
    status = app_open_model(a, o, true);
  if (!status && !a->info.is_instruct)
    status = app_fail("%s has no chat template, so it was not trained to converse; sfa generate continues texts", o->model);
  int64_t context_len = 0;
  if (!status)
    status = app_context_len(a, &context_len);
  if (!status)
    status = app_open_session(a, &a->choice, context_len);
  if (!status)
    status = sampler_open(a, &c.sampler);
  if (!status) {
    c.logits = malloc((size_t)a->info.vocab_size * sizeof *c.logits);
    status = c.logits ? EXIT_OK : app_fail("out of memory for the logits");
  }
  if (!status) {
    interrupt_begin();
    status = converse(&c);
    if (!o->json)
      stats_print(a);
  }
  drop_messages(&c, 0);
  free(c.waiting);
  free(c.logits);
  sfa_sampler_destroy(c.sampler);
  app_close(a);
  return status;
}
