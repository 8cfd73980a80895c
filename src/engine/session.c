/* A session: one timeline of tokens. Prompts run through the model in chunks; the rows of a chunk either end in the logits of the last
 * token or in the score of every token. Whatever fails, the timeline goes back to where the call found it. */
#include "engine/session.h"

#include <sfa/stream.h>

#include <math.h>
#include <string.h>

/* Rows that keep a machine busy: a GPU wants more of them at once. */
enum { DEFAULT_CHUNK_LEN = 512, GPU_CHUNK_LEN = 8192, MAX_SCORE_ROWS = 64, SCORE_FLOATS = 1 << 22 };

static bool on_gpu(const sfa_session *s) { return sfa_context_device(s->ctx) != SFA_DEVICE_CPU; }

/* What becomes of a chunk: tokens first .. first + n - 1 of the call, their rows in session->hidden. */
typedef sfa_status (*chunk_fn)(sfa_session *session, void *arg, int64_t first, int32_t n);

/* Memory of the device that stays once it is there. */
static sfa_status need_memory(const sfa_session *s, size_t bytes, void *place) {
  void **memory = place;
  return *memory ? SFA_OK : sfa_memory_alloc(s->ctx, bytes, memory);
}

/* For the logits of a few rows and their scores. */
static sfa_status prepare_scores(sfa_session *s) {
  const size_t chunk = (size_t)s->chunk_len, row_bytes = (size_t)s->vocab_size * sizeof(float);
  if (!s->host_logits)
    s->host_logits = sfa_model_host_alloc(s->model, row_bytes);
  SFA_TRY(need_memory(s, chunk * sizeof *s->targets, &s->targets));
  SFA_TRY(need_memory(s, chunk * sizeof *s->argmax, &s->argmax));
  SFA_TRY(need_memory(s, chunk * sizeof *s->nll, &s->nll));
  return need_memory(s, (size_t)s->score_rows * row_bytes, &s->logits);
}

sfa_status sfa_session_create(const sfa_model *model, const sfa_session_options *options, sfa_session **session) {
  if (session)
    *session = NULL;
  if (!model)
    return SFA_ERROR_ARGUMENT;
  sfa_context *ctx = sfa_model_context(model);
  SFA_REQUIRE(ctx, session, "sfa_session_create wants a place for the session");
  sfa_session_options zero = {.struct_size = sizeof zero};
  const sfa_session_options *o = options ? options : &zero;
  SFA_REQUIRE(ctx, o->struct_size == sizeof *o, "sfa_session_options is of another version: %zu bytes, not %zu", o->struct_size, sizeof *o);
  SFA_REQUIRE(ctx, o->context_len >= 0 && o->chunk_len >= 0, "context_len %lld and chunk_len %d must not be negative",
              (long long)o->context_len, o->chunk_len);
  sfa_model_info info;
  sfa_model_describe(model, &info);
  if (o->context_len > info.context_len)
    return sfa_fail(ctx, SFA_ERROR_RANGE,
                    "a context of %lld tokens is more than the %lld that the model was trained on; ask for at most that",
                    (long long)o->context_len, (long long)info.context_len);

  sfa_session *s;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *s, "a session", (void **)&s));
  s->ctx = ctx;
  s->model = model;
  s->context_len = o->context_len ? o->context_len : info.context_len;
  s->chunk_len = (int32_t)sfa_min64(o->chunk_len ? o->chunk_len : on_gpu(s) ? GPU_CHUNK_LEN : DEFAULT_CHUNK_LEN, s->context_len);
  s->hidden_dim = info.hidden_dim;
  s->vocab_size = info.vocab_size;
  s->score_rows = (int32_t)sfa_max64(1, sfa_min64(MAX_SCORE_ROWS, SCORE_FLOATS / info.vocab_size));
  s->progress = o->progress;
  s->progress_user = o->progress_user;
  sfa_attention_choice dense = {.struct_size = sizeof dense};
  sfa_status status = sfa_forward_create(model, o->attention ? o->attention : &dense, s->context_len, s->chunk_len, &s->forward);
  if (status == SFA_OK)
    status = sfa_memory_alloc(ctx, (size_t)s->chunk_len * (size_t)s->hidden_dim * sizeof(float), (void **)&s->hidden);
  if (status == SFA_OK && on_gpu(s))
    status = prepare_scores(s);
  if (status != SFA_OK) {
    sfa_session_destroy(s);
    return status;
  }
  *session = s;
  return SFA_OK;
}

void sfa_session_destroy(sfa_session *session) {
  if (!session)
    return;
  sfa_context *ctx = session->ctx;
  for (int32_t layer = 0; session->postings && layer < sfa_model_heads_of(session->model).n_layers; layer++)
    sfa_postings_destroy(session->postings[layer]);
  sfa_free(ctx, session->postings);
  sfa_forward_destroy(session->forward);
  sfa_index_close(session->index); /* after the caches that use its pages */
  void *const buffers[] = {session->hidden, session->logits, session->targets, session->nll, session->argmax};
  for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
    sfa_memory_free(ctx, buffers[i]);
  sfa_model_host_free(session->model, session->host_logits);
  sfa_free(ctx, session->tokens);
  sfa_free(ctx, session);
}

int64_t sfa_session_len(const sfa_session *session) { return sfa_forward_len(session->forward); }
const int32_t *sfa_session_tokens(const sfa_session *session) { return session->tokens; }

sfa_status sfa_session_truncate(sfa_session *session, int64_t new_len) {
  SFA_REQUIRE(session->ctx, new_len >= 0, "cannot truncate a session to %lld tokens", (long long)new_len);
  return new_len < sfa_session_len(session) ? sfa_forward_truncate(session->forward, new_len) : SFA_OK;
}

static sfa_status check_tokens(const sfa_session *s, const int32_t *tokens, int64_t n_tokens) {
  SFA_REQUIRE(s->ctx, tokens && n_tokens > 0, "a session wants at least one token, not %lld", (long long)n_tokens);
  int64_t len = sfa_session_len(s);
  if (n_tokens > s->context_len - len)
    return sfa_fail(s->ctx, SFA_ERROR_RANGE,
                    "%lld tokens after the %lld before do not fit the context of %lld; shorten the text or take a larger context",
                    (long long)n_tokens, (long long)len, (long long)s->context_len);
  for (int64_t i = 0; i < n_tokens; i++)
    if (tokens[i] < 0 || tokens[i] >= s->vocab_size)
      return sfa_fail(s->ctx, SFA_ERROR_RANGE, "token %d at place %lld is outside the vocabulary of %d", tokens[i], (long long)i,
                      s->vocab_size);
  return SFA_OK;
}

static sfa_status run_chunks(sfa_session *s, const int32_t *tokens, int64_t n_tokens, chunk_fn consume, void *arg, int64_t *attention_ns) {
  for (int64_t done = 0; done < n_tokens;) {
    int32_t n = (int32_t)sfa_min64(s->chunk_len, n_tokens - done);
    SFA_TRY(sfa_forward_run(s->forward, tokens + done, n, s->hidden, attention_ns));
    SFA_TRY(consume(s, arg, done, n));
    done += n;
    if (s->progress && done < n_tokens && s->progress(s->progress_user, done, n_tokens))
      return sfa_fail(s->ctx, SFA_ERROR_CANCELLED, "stopped on request after %lld of %lld tokens", (long long)done, (long long)n_tokens);
  }
  return SFA_OK;
}

sfa_status sfa_session_reserve(sfa_session *s, int64_t n) {
  if (n <= s->capacity)
    return SFA_OK;
  int64_t capacity = sfa_max64(n, sfa_min64(2 * s->capacity, s->context_len));
  int32_t *more;
  SFA_TRY(sfa_alloc_zero(s->ctx, (size_t)capacity, sizeof *more, "the tokens of a session", (void **)&more));
  if (s->tokens)
    memcpy(more, s->tokens, (size_t)sfa_session_len(s) * sizeof *more);
  sfa_free(s->ctx, s->tokens);
  s->tokens = more;
  s->capacity = capacity;
  return SFA_OK;
}

/* run_chunks with time kept, undone on failure. */
static sfa_status run_tokens(sfa_session *s, const int32_t *tokens, int64_t n_tokens, chunk_fn consume, void *arg) {
  SFA_TRY(check_tokens(s, tokens, n_tokens));
  SFA_TRY(sfa_session_reserve(s, sfa_session_len(s) + n_tokens));
  int64_t len = sfa_session_len(s), start = sfa_now_ns(), attention_ns = 0;
  sfa_status status = run_chunks(s, tokens, n_tokens, consume, arg, &attention_ns);
  if (status != SFA_OK) { /* the truncation cannot fail for a length that was there; the first error is the one to tell */
    sfa_forward_truncate(s->forward, len);
    return status;
  }
  memcpy(s->tokens + len, tokens, (size_t)n_tokens * sizeof *tokens);
  bool decode = n_tokens == 1;
  *(decode ? &s->stats.decode_tokens : &s->stats.prefill_tokens) += n_tokens;
  *(decode ? &s->stats.decode_ns : &s->stats.prefill_ns) += sfa_now_ns() - start;
  *(decode ? &s->stats.decode_attention_ns : &s->stats.prefill_attention_ns) += attention_ns;
  return SFA_OK;
}

/* logits [n][vocab_size] of rows of s->hidden, in memory of the host. */
static sfa_status logits_of(sfa_session *s, int32_t row, int32_t n, float *logits) {
  const float *hidden = s->hidden + (int64_t)row * s->hidden_dim;
  if (!on_gpu(s))
    return sfa_model_logits(s->model, n, hidden, logits);
  size_t row_bytes = (size_t)s->vocab_size * sizeof(float);
  for (int32_t done = 0, some; done < n; done += some) {
    some = (int32_t)sfa_min64(s->score_rows, n - done);
    SFA_TRY(sfa_model_logits(s->model, some, hidden + (int64_t)done * s->hidden_dim, s->logits));
    float *to = n == 1 && s->host_logits ? s->host_logits : logits + (int64_t)done * s->vocab_size;
    SFA_TRY(sfa_memory_copy(s->ctx, to, s->logits, (size_t)some * row_bytes));
    SFA_TRY(sfa_stream_wait(s->ctx));
    if (to == s->host_logits)
      memcpy(logits, to, row_bytes);
  }
  return SFA_OK;
}

typedef struct append_args {
  int64_t n_tokens;
  float *logits; /* [vocab_size] or NULL */
} append_args;

static sfa_status append_chunk(sfa_session *s, void *arg, int64_t first, int32_t n) {
  append_args *args = arg;
  if (!args->logits || first + n < args->n_tokens)
    return SFA_OK;
  return logits_of(s, n - 1, 1, args->logits);
}

sfa_status sfa_session_append(sfa_session *session, const int32_t *tokens, int64_t n_tokens, float *logits) {
  return run_tokens(session, tokens, n_tokens, append_chunk, &(append_args){n_tokens, logits});
}

static sfa_status logits_chunk(sfa_session *s, void *arg, int64_t first, int32_t n) {
  return logits_of(s, 0, n, (float *)arg + first * s->vocab_size);
}

sfa_status sfa_session_logits(sfa_session *session, const int32_t *tokens, int64_t n_tokens, float *logits) {
  return run_tokens(session, tokens, n_tokens, logits_chunk, logits);
}

typedef struct score_args {
  const int32_t *tokens;
  int64_t n_tokens;
  int32_t next;
  float *nll;      /* [n_tokens] or NULL */
  int32_t *argmax; /* [n_tokens] or NULL */
} score_args;

/* Rows row .. row + n - 1 of a chunk whose first token is `first`. */
static sfa_status score_rows(sfa_session *s, const score_args *args, int64_t first, int32_t row, int32_t n) {
  int32_t targets[MAX_SCORE_ROWS];
  for (int32_t i = 0; i < n; i++)
    targets[i] = first + row + i + 1 < args->n_tokens ? args->tokens[first + row + i + 1] : args->next;
  SFA_TRY(sfa_memory_copy(s->ctx, s->targets + row, targets, (size_t)n * sizeof *targets));
  SFA_TRY(sfa_model_logits(s->model, n, s->hidden + (int64_t)row * s->hidden_dim, s->logits));
  sfa_model_score(s->model, n, s->logits, s->targets + row, s->nll + row, s->argmax + row);
  return SFA_OK;
}

static sfa_status score_chunk(sfa_session *s, void *arg, int64_t first, int32_t n) {
  const score_args *args = arg;
  for (int32_t row = 0; row < n; row += s->score_rows)
    SFA_TRY(score_rows(s, args, first, row, (int32_t)sfa_min64(s->score_rows, n - row)));
  if (args->nll)
    SFA_TRY(sfa_memory_copy(s->ctx, args->nll + first, s->nll, (size_t)n * sizeof *s->nll));
  if (args->argmax)
    SFA_TRY(sfa_memory_copy(s->ctx, args->argmax + first, s->argmax, (size_t)n * sizeof *s->argmax));
  return sfa_stream_wait(s->ctx);
}

sfa_status sfa_session_score(sfa_session *session, const int32_t *tokens, int64_t n_tokens, int32_t next, float *nll, int32_t *argmax) {
  if (next < -1 || next >= session->vocab_size)
    return sfa_fail(session->ctx, SFA_ERROR_RANGE, "the token %d after the last is outside the vocabulary of %d", next,
                    session->vocab_size);
  SFA_TRY(prepare_scores(session));
  score_args args = {.tokens = tokens, .n_tokens = n_tokens, .next = next, .nll = nll, .argmax = argmax};
  return run_tokens(session, tokens, n_tokens, score_chunk, &args);
}

void sfa_session_stats_read(const sfa_session *session, sfa_session_stats *stats) {
  *stats = session->stats;
  stats->kv_bytes = (int64_t)sfa_forward_kv_bytes(session->forward);
  stats->dropped_most = sfa_forward_dropped(session->forward);
  stats->prefill_policy = sfa_forward_policy(session->forward);
  stats->index_bytes = sfa_session_index_bytes(session);
}

/* ---- Looking inside ---------------------------------------------------------------------------------------------------------- */

sfa_postings **sfa_session_postings(sfa_session *session, int32_t layer) {
  if (!session->postings && sfa_alloc_zero(session->ctx, (size_t)sfa_model_heads_of(session->model).n_layers, sizeof *session->postings,
                                           "the list of inverted indexes", (void **)&session->postings) != SFA_OK)
    return NULL;
  return &session->postings[layer];
}

sfa_status sfa_session_append_probed(sfa_session *session, const int32_t *tokens, int64_t n_tokens, sfa_probe_fn probe, void *user) {
  sfa_forward_probe(session->forward, probe, user);
  sfa_status status = sfa_session_append(session, tokens, n_tokens, NULL);
  sfa_forward_probe(session->forward, NULL, NULL);
  return status;
}

sfa_status sfa_session_rerun_last(sfa_session *session, sfa_probe_fn probe, void *user) {
  int64_t len = sfa_session_len(session);
  SFA_TRY(sfa_forward_truncate(session->forward, len - 1));
  sfa_forward_probe(session->forward, probe, user);
  int64_t attention_ns = 0;
  sfa_status status = sfa_forward_run(session->forward, session->tokens + len - 1, 1, session->hidden, &attention_ns);
  sfa_forward_probe(session->forward, NULL, NULL);
  if (status != SFA_OK) { /* what the probe refused is no fault of the step: without it the token goes back to its place */
    sfa_status again = sfa_forward_run(session->forward, session->tokens + len - 1, 1, session->hidden, &attention_ns);
    status = again == SFA_OK ? status : again;
  }
  return status;
}
