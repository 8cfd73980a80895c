/* From options to the tokens of a prompt. A document's parts, and the question after it, are tokenised one by one, so that the tokens of
 * what comes first do not depend on what follows: an index can be gone on from. */
#include "document.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Stands for the document while the chat template is written around it. */
#define PLACE "[sfa: here is the document]"

static int add_tokens(const app *a, prompt *p, const char *text, size_t n_bytes, uint32_t flags) {
  int32_t *ids;
  int64_t n;
  int status = app_tokenize(a, text, n_bytes, flags, &ids, &n);
  if (status)
    return status;
  if (p->n_ids + n > p->capacity) {
    int64_t capacity = 2 * (p->n_ids + n);
    int32_t *more = realloc(p->ids, (size_t)capacity * sizeof *more);
    if (!more) {
      sfa_free_ids(a->ctx, ids);
      return app_fail("out of memory for the tokens of the prompt");
    }
    p->ids = more;
    p->capacity = capacity;
  }
  if (n)
    memcpy(p->ids + p->n_ids, ids, (size_t)n * sizeof *ids);
  p->n_ids += n;
  sfa_free_ids(a->ctx, ids);
  return EXIT_OK;
}

/* The chat template's texts around what the user says. */
static int chat_frame(const app *a, const char *content, char **text) {
  sfa_chat_message messages[2] = {{"system", a->o->system}, {"user", content}};
  int skip = !a->o->system;
  return sfa_chat_format(a->tokenizer, messages + skip, 2 - skip, 1, text) == SFA_OK ? EXIT_OK : app_fail_status(a->ctx);
}

/* Parts of the document, with the flags of the first text where nothing stands before it. */
static int add_document(const app *a, const app_document *doc, uint32_t first_flags, prompt *p) {
  p->sources = calloc(doc->n_parts, sizeof *p->sources);
  if (!p->sources)
    return app_fail("out of memory for the parts of the prompt");
  for (size_t i = 0; i < doc->n_parts; i++) {
    const document_part *part = &doc->parts[i];
    int64_t first = p->n_ids;
    int status = add_tokens(a, p, doc->text.bytes + part->first_byte, part->n_bytes, SFA_TOKENIZE_PARSE | (i ? 0 : first_flags));
    if (status)
      return status;
    p->sources[p->n_sources++] = (sfa_index_source){.name = part->name,
                                                    .first_byte = (int64_t)part->first_byte,
                                                    .n_bytes = (int64_t)part->n_bytes,
                                                    .first_token = first,
                                                    .n_tokens = p->n_ids - first};
  }
  return EXIT_OK;
}

/* Head, document, question, tail. head and tail are the chat template's, or empty. */
static int add_all(const app *a, const app_document *doc, bool chat, const char *head, const char *tail, prompt *p) {
  uint32_t start = chat ? 0 : SFA_TOKENIZE_SPECIAL;
  int status = EXIT_OK;
  if (*head)
    status = add_tokens(a, p, head, strlen(head), SFA_TOKENIZE_PARSE);
  p->n_frame = p->n_head = p->n_ids;
  if (!status && doc->n_parts)
    status = add_document(a, doc, start, p);
  else if (!status && !chat) /* the document's own start, as far as it is known */
    status = add_tokens(a, p, "", 0, start);
  p->n_head = doc->n_parts ? p->n_head : p->n_ids;
  p->n_document = p->n_ids;
  text_buffer rest = {0};
  const char *question = a->o->prompt;
  bool memory = text_append(&rest, "", 0) &&
                (!question || (text_append(&rest, "\n\n", 2) && text_append(&rest, question, strlen(question)))) &&
                text_append(&rest, tail, strlen(tail));
  if (!status && !memory)
    status = app_fail("out of memory for the question");
  if (!status && rest.n)
    status = add_tokens(a, p, rest.bytes, rest.n, SFA_TOKENIZE_PARSE);
  free(rest.bytes);
  return status;
}

static int make_around_document(const app *a, const app_document *doc, bool chat, prompt *p) {
  char *frame = NULL;
  int status = chat ? chat_frame(a, PLACE, &frame) : EXIT_OK;
  char *place = frame ? strstr(frame, PLACE) : NULL;
  for (char *next = place; next && (next = strstr(next + 1, PLACE)) != NULL;) /* a system message may hold the words: the last ones */
    place = next;
  if (!status && chat && !place)
    status = app_fail("the chat template leaves no place for a document; take --raw");
  if (place)
    *place = 0;
  if (!status)
    status = add_all(a, doc, chat, frame ? frame : "", place ? place + strlen(PLACE) : "", p);
  if (frame)
    sfa_free_text(a->ctx, frame);
  return status;
}

/* -p alone, in one piece. */
static int make_question(const app *a, bool chat, prompt *p) {
  char *text = NULL;
  const char *question = a->o->prompt;
  int status = chat ? chat_frame(a, question, &text) : EXIT_OK;
  if (!status && chat)
    status = add_tokens(a, p, text, strlen(text), SFA_TOKENIZE_PARSE);
  else if (!status)
    status = add_tokens(a, p, question, strlen(question), SFA_TOKENIZE_SPECIAL | SFA_TOKENIZE_PARSE);
  if (text)
    sfa_free_text(a->ctx, text);
  return status;
}

int prompt_make(const app *a, bool document_known, app_document *doc, prompt *p) {
  const app_options *o = a->o;
  bool chat = a->info.is_instruct && !o->raw;
  if (o->system && !chat)
    return app_usage("--system wants the chat template of an instruct model%s",
                     o->raw ? ", which --raw switches off" : "; this model has none");
  int status = o->file ? document_read(o->file, doc) : EXIT_OK;
  if (status)
    return status;
  if ((o->file && doc->text.n == 0) || (!o->file && !document_known && !*o->prompt))
    return app_usage("the prompt is empty; there is nothing to go on from");
  return o->file || document_known ? make_around_document(a, doc, chat, p) : make_question(a, chat, p);
}

int prompt_insert(prompt *p, const int32_t *tokens, int64_t n_tokens) {
  int64_t n_rest = p->n_ids - p->n_document;
  int32_t *ids = malloc((size_t)(n_tokens + n_rest + 1) * sizeof *ids);
  if (!ids)
    return app_fail("out of memory for the tokens of the prompt");
  memcpy(ids, tokens, (size_t)n_tokens * sizeof *ids);
  if (n_rest)
    memcpy(ids + n_tokens, p->ids + p->n_document, (size_t)n_rest * sizeof *ids);
  free(p->ids);
  p->ids = ids;
  p->n_document = n_tokens;
  p->n_ids = p->capacity = n_tokens + n_rest;
  return EXIT_OK;
}

void prompt_free(prompt *p) {
  free(p->ids);
  free(p->sources);
  *p = (prompt){0};
}
