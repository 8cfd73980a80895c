/* The ways of scoring an item. All of them ask the session the same two things: the log-probability of a continuation, or the greedy text
 * after a context. Either way the timeline keeps what the new tokens share with the last ones. */
#include <string.h>

#include "engine/session.h"
#include "eval/eval_open.h"
#include "text/utf8.h"

/* What an item needs while it is scored. */
typedef struct scoring {
  const sfa_eval *eval;
  sfa_session *session;
  int64_t index;
  eval_item item;
  sfa_bytes shots; /* worked examples, the same before every context of the item */
  sfa_bytes text;
  sfa_ids ids, context_ids;
  float *nll;      /* [capacity] */
  int32_t *argmax; /* [capacity] */
  size_t n_nll, n_argmax;
} scoring;

/* ---- Tokens ---------------------------------------------------------------------------------------------------------------------- */

/* The token that an empty context is replaced by: BOS, else the one that ends texts. */
static sfa_status prefix_token(const sfa_eval *eval, int32_t *token) {
  *token = sfa_tokenizer_bos(eval->tokenizer);
  for (int32_t id = 0; *token < 0 && id < sfa_tokenizer_vocab_size(eval->tokenizer); id++)
    if (sfa_tokenizer_is_end(eval->tokenizer, id))
      *token = id;
  return *token >= 0 ? SFA_OK
                     : sfa_fail(eval->ctx, SFA_ERROR_UNSUPPORTED,
                                "an empty context wants a token that begins or ends texts, and the tokenizer has none");
}

/* Context and continuation as tokens: together, where the context's own tokens end the continuation's begin; white space at the end of the
 * context belongs to the continuation. text: the context; the continuation is appended to it. */
static sfa_status encode_pair(scoring *s, const char *continuation, int64_t *n_continuation) {
  const sfa_eval *eval = s->eval;
  enum { FLAGS = SFA_TOKENIZE_SPECIAL | SFA_TOKENIZE_PARSE };
  size_t n_context = s->text.len, n_kept = n_context;
  if (sfa_utf8_valid(s->text.data, n_context))
    n_kept = sfa_utf8_spaces_before(s->text.data, n_context);
  SFA_TRY(sfa_bytes_append(eval->ctx, &s->text, continuation, strlen(continuation) + 1));
  s->ids.len = s->context_ids.len = 0;
  if (n_kept == 0) {
    int32_t prefix;
    SFA_TRY(prefix_token(eval, &prefix));
    SFA_TRY(sfa_eval_encode(eval, (const char *)s->text.data, SFA_TOKENIZE_PARSE, &s->context_ids));
    if (s->context_ids.len == 0 || s->context_ids.data[0] != prefix)
      SFA_TRY(sfa_ids_append(eval->ctx, &s->ids, &prefix, 1));
    SFA_TRY(sfa_ids_append(eval->ctx, &s->ids, s->context_ids.data, s->context_ids.len));
    *n_continuation = (int64_t)s->ids.len - 1;
    return SFA_OK;
  }
  SFA_TRY(sfa_eval_encode(eval, (const char *)s->text.data, FLAGS, &s->ids));
  uint8_t cut = s->text.data[n_kept];
  s->text.data[n_kept] = '\0';
  sfa_status status = sfa_eval_encode(eval, (const char *)s->text.data, FLAGS, &s->context_ids);
  s->text.data[n_kept] = cut;
  *n_continuation = (int64_t)s->ids.len - (int64_t)s->context_ids.len;
  return status;
}

/* Makes the timeline ids[0 .. n), keeping what is there already, but the last `n_fresh` of them, which the caller appends: *left is where
 * those begin. */
static sfa_status go_to(sfa_session *session, const int32_t *ids, int64_t n, int64_t n_fresh, const int32_t **left) {
  const int32_t *timeline = sfa_session_tokens(session);
  int64_t most = sfa_min64(sfa_session_len(session), n - n_fresh), keep = 0;
  while (keep < most && timeline[keep] == ids[keep])
    keep++;
  SFA_TRY(sfa_session_truncate(session, keep));
  *left = ids + n - n_fresh;
  return n - n_fresh > keep ? sfa_session_append(session, ids + keep, n - n_fresh - keep, NULL) : SFA_OK;
}

/* ---- The likelihood of a continuation -------------------------------------------------------------------------------------------- */

/* Tokens s->ids, of which the last n_continuation are scored: each by the row of the token before it. */
static sfa_status score_ids(scoring *s, int64_t n_continuation, double *loglik, int32_t *is_greedy) {
  sfa_context *ctx = s->eval->ctx;
  int64_t n = (int64_t)s->ids.len, most = s->session->context_len;
  if (n_continuation < 1 || n_continuation > most)
    return sfa_fail(ctx, SFA_ERROR_RANGE, "item %lld of %s: a continuation of %lld tokens; the context takes 1 to %lld",
                    (long long)s->index, s->eval->rows.path, (long long)n_continuation, (long long)most);
  const int32_t *ids = s->ids.data, *left;
  if (n > most + 1) { /* the first tokens go */
    ids += n - (most + 1);
    n = most + 1;
  }
  SFA_TRY(sfa_array_reserve(ctx, (void **)&s->nll, &s->n_nll, (size_t)n_continuation, sizeof *s->nll));
  SFA_TRY(sfa_array_reserve(ctx, (void **)&s->argmax, &s->n_argmax, (size_t)n_continuation, sizeof *s->argmax));
  SFA_TRY(go_to(s->session, ids, n - 1, n_continuation, &left));
  SFA_TRY(sfa_session_score(s->session, left, n_continuation, ids[n - 1], s->nll, s->argmax));
  *loglik = 0;
  *is_greedy = 1;
  for (int64_t i = 0; i < n_continuation; i++) {
    *loglik -= (double)s->nll[i];
    *is_greedy &= s->argmax[i] == left[i + 1];
  }
  return SFA_OK;
}

/* The index of the largest; ties to the first. */
static int32_t best_of(const double *values, int32_t n) {
  int32_t best = 0;
  for (int32_t i = 1; i < n; i++)
    best = values[i] > values[best] ? i : best;
  return best;
}

static sfa_status score_choices(scoring *s, sfa_eval_result *r) {
  const eval_item *item = &s->item;
  double per_char[SFA_EVAL_MAX_CHOICES];
  r->n_choices = item->n_answers;
  r->gold = item->gold;
  for (int32_t i = 0; i < item->n_answers; i++) {
    const char *context = sfa_eval_item_text(item, item->contexts[item->has_contexts ? i : 0]);
    int64_t n_continuation = 0;
    s->text.len = 0;
    SFA_TRY(sfa_bytes_append(s->eval->ctx, &s->text, s->shots.data, s->shots.len));
    SFA_TRY(sfa_bytes_append(s->eval->ctx, &s->text, context, strlen(context)));
    SFA_TRY(encode_pair(s, sfa_eval_item_text(item, item->answers[i]), &n_continuation));
    SFA_TRY(score_ids(s, n_continuation, &r->loglik[i], &r->is_greedy[i]));
    r->n_tokens = sfa_max64(r->n_tokens, (int64_t)s->ids.len);
    per_char[i] = r->loglik[i] / item->n_chars[i];
  }
  if (s->eval->task->way == EVAL_LIKELIHOOD) {
    r->metrics[0] = r->loglik[0];
    r->metrics[1] = r->is_greedy[0];
  } else {
    r->metrics[0] = best_of(r->loglik, r->n_choices) == item->gold;
    r->metrics[1] = best_of(per_char, r->n_choices) == item->gold;
  }
  return SFA_OK;
}

/* ---- Greedy answers -------------------------------------------------------------------------------------------------------------- */

/* Cuts a text (zero-terminated) before the first of the stops; true if there was one. */
static bool cut_at_stop(const eval_task *task, sfa_bytes *text) {
  size_t before = text->len;
  for (size_t i = 0; i < sizeof task->stops / sizeof *task->stops && task->stops[i]; i++) {
    const char *found = strstr((const char *)text->data, task->stops[i]);
    if (found) {
      text->len = (size_t)(found - (const char *)text->data) + 1;
      text->data[text->len - 1] = '\0';
    }
  }
  return text->len < before;
}

/* Appends the bytes of a token to a zero-terminated text. */
static sfa_status add_piece(const sfa_eval *eval, int32_t previous, int32_t id, sfa_bytes *text) {
  char piece[512];
  size_t n = sfa_tokenizer_decode(eval->tokenizer, previous, id, 0, piece, sizeof piece);
  text->len -= text->len > 0; /* the zero */
  SFA_TRY(sfa_bytes_append(eval->ctx, text, piece, n < sizeof piece ? n : sizeof piece));
  return sfa_bytes_append(eval->ctx, text, "", 1);
}

static sfa_status write_answer(scoring *s, float *logits) {
  const sfa_eval *eval = s->eval;
  int32_t previous = -1;
  for (int32_t n = 1;; n++) {
    int32_t next = 0;
    for (int32_t v = 1; v < s->session->vocab_size; v++)
      next = logits[v] > logits[next] ? v : next;
    if (sfa_tokenizer_is_end(eval->tokenizer, next))
      return SFA_OK;
    SFA_TRY(add_piece(eval, previous, next, &s->text));
    if (cut_at_stop(eval->task, &s->text) || n == eval->n_generate)
      return SFA_OK;
    SFA_TRY(sfa_session_append(s->session, &next, 1, logits));
    previous = next;
  }
}

/* Context as tokens: given, or the examples and the question. */
static sfa_status generation_ids(scoring *s) {
  sfa_context *ctx = s->eval->ctx;
  s->ids.len = 0;
  if (s->item.ids.len)
    return sfa_ids_append(ctx, &s->ids, s->item.ids.data, s->item.ids.len);
  const char *context = sfa_eval_item_text(&s->item, s->item.contexts[0]);
  s->text.len = 0;
  SFA_TRY(sfa_bytes_append(ctx, &s->text, s->shots.data, s->shots.len));
  SFA_TRY(sfa_bytes_append(ctx, &s->text, context, strlen(context) + 1));
  return sfa_eval_encode(s->eval, (const char *)s->text.data, SFA_TOKENIZE_SPECIAL | SFA_TOKENIZE_PARSE, &s->ids);
}

static sfa_status score_generation(scoring *s, sfa_eval_result *r) {
  const sfa_eval *eval = s->eval;
  sfa_context *ctx = eval->ctx;
  int64_t most = s->session->context_len - eval->n_generate;
  if (most < 1)
    return sfa_fail(ctx, SFA_ERROR_RANGE,
                    "answers of %d tokens do not fit a context of %lld beside their questions: take a larger context, or shorter answers",
                    eval->n_generate, (long long)s->session->context_len);
  SFA_TRY(generation_ids(s));
  int64_t n = (int64_t)s->ids.len;
  r->n_tokens = n + eval->n_generate;
  if (s->item.ids.len && n > most)
    return sfa_fail(ctx, SFA_ERROR_RANGE,
                    "a prompt of %lld tokens and %d of answer do not fit the context of %lld: ask for shorter lengths", (long long)n,
                    eval->n_generate, (long long)s->session->context_len);
  const int32_t *ids = s->ids.data, *left;
  if (n > most) {
    ids += n - most;
    n = most;
  }
  if (n < 1)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "item %lld of %s: an empty prompt", (long long)s->index, eval->rows.path);
  float *logits;
  SFA_TRY(sfa_alloc(ctx, (size_t)s->session->vocab_size * sizeof *logits, "logits", (void **)&logits));
  s->text.len = 0;
  sfa_status status = sfa_bytes_append(ctx, &s->text, "", 1);
  if (status == SFA_OK)
    status = go_to(s->session, ids, n, 1, &left);
  if (status == SFA_OK)
    status = sfa_session_append(s->session, left, 1, logits);
  if (status == SFA_OK)
    status = write_answer(s, logits);
  sfa_free(ctx, logits);
  SFA_TRY(status);
  sfa_bytes whole = {0};
  status = sfa_utf8_repair(ctx, s->text.data, s->text.len, &whole);
  r->text = (char *)whole.data;
  SFA_TRY(status);
  return eval->task->judge(ctx, r->text, &s->item, r->metrics);
}

/* ---- An item --------------------------------------------------------------------------------------------------------------------- */

static sfa_status score_item(scoring *s, sfa_eval_result *r) {
  SFA_TRY(sfa_eval_item_make(s->eval, s->index, &s->item));
  SFA_TRY(sfa_eval_shots_text(s->eval, s->index, &s->shots));
  r->depth = s->item.depth;
  return s->eval->task->way == EVAL_GENERATION ? score_generation(s, r) : score_choices(s, r);
}

sfa_status sfa_eval_item(const sfa_eval *eval, sfa_session *session, int64_t item, sfa_eval_result *result) {
  if (!eval)
    return SFA_ERROR_ARGUMENT;
  sfa_context *ctx = eval->ctx;
  SFA_REQUIRE(ctx, session && result, "sfa_eval_item wants a session and a place for the result");
  SFA_REQUIRE(ctx, session->model == eval->model, "the session is of another model than the items were made for");
  SFA_REQUIRE(ctx, item >= 0 && item < eval->n_items, "item %lld: there are %lld, from 0", (long long)item, (long long)eval->n_items);
  *result = (sfa_eval_result){0};
  scoring s = {.eval = eval, .session = session, .index = item};
  sfa_status status = score_item(&s, result);
  if (status != SFA_OK) {
    sfa_free_text(ctx, result->text);
    result->text = NULL;
  }
  sfa_eval_item_free(ctx, &s.item);
  void *memory[] = {s.shots.data, s.text.data, s.ids.data, s.context_ids.data, s.nll, s.argmax};
  for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
    sfa_free(ctx, memory[i]);
  return status;
}
