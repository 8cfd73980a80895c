/* Why the last token looks where it looks. Its step is run once more with a probe: the first time for the weights of all keys, head by
 * head, then for the features behind the tokens that got most. */
#include "engine/look.h"
#include "engine/session.h"

#include <string.h>

enum {
  LEAST_INDEXED_LEN = 65536, /* from here on an inverted index of the keys is worth its memory */
  MOST_TOP = 65536           /* tokens told: they are kept in order as they are found */
};

typedef struct explanation {
  sfa_session *session;
  const sfa_explain_options *options;
  sfa_look look;
  int64_t len;
  int64_t n_heads;             /* whose weights were added */
  float *mass;                 /* [len] sum, then mean */
  float *most;                 /* [len] largest weight */
  int32_t *most_by;            /* [len] layer * H + head that gave it */
  float *scores, *weights;     /* [len] */
  sfa_explained_token *tokens; /* [n_tokens] */
  int64_t n_tokens;
  void *ids; /* room for a key */
  float *values;
} explanation;

static bool wanted(const int32_t *list, int32_t n, int32_t number) {
  for (int32_t i = 0; i < n; i++)
    if (list[i] == number)
      return true;
  return !list;
}

/* The layer's inverted index, made and brought up to date where it pays; NULL elsewhere: of a copy it could not be kept. */
static sfa_status indexed(const explanation *e, const sfa_probe *probe, sfa_postings **postings) {
  *postings = NULL;
  if (e->look.ctx != e->session->ctx || e->len < LEAST_INDEXED_LEN || !probe->k_queries || !sfa_cache_k(probe->cache, probe->cache_layer))
    return SFA_OK;
  sfa_postings **kept = sfa_session_postings(e->session, probe->layer);
  if (!kept)
    return SFA_OK;
  sfa_status status = *kept ? SFA_OK : sfa_postings_create(probe->cache, probe->cache_layer, kept);
  if (status == SFA_OK)
    status = sfa_postings_update(*kept, 0);
  if (status == SFA_ERROR_UNSUPPORTED || status == SFA_ERROR_MEMORY) /* codes of another type, or no room: every code is read */
    return SFA_OK;
  *postings = *kept;
  return status;
}

static sfa_status weigh(void *user, const sfa_probe *probe) {
  explanation *e = user;
  sfa_postings *postings;
  sfa_probe here;
  if (!wanted(e->options->layers, e->options->n_layers, probe->layer))
    return SFA_OK;
  SFA_TRY(sfa_look_bring(&e->look, e->session->forward, probe, &here));
  SFA_TRY(indexed(e, &here, &postings));
  for (int32_t head = 0; head < e->look.heads.n_heads; head++) {
    if (!wanted(e->options->heads, e->options->n_heads, head))
      continue;
    SFA_TRY(sfa_look_query(&e->look, &here, 0, head));
    SFA_TRY(sfa_look_weights(&e->look, &here, 0, head, postings, e->scores, e->weights));
    e->n_heads++;
    for (int64_t i = 0; i < e->len; i++) {
      e->mass[i] += e->weights[i];
      if (e->weights[i] > e->most[i]) {
        e->most[i] = e->weights[i];
        e->most_by[i] = probe->layer * e->look.heads.n_heads + head;
      }
    }
  }
  return SFA_OK;
}

/* The features behind the chosen tokens of this layer. */
static sfa_status reason(void *user, const sfa_probe *probe) {
  explanation *e = user;
  sfa_probe here = {.cache = NULL};
  for (int64_t i = 0; i < e->n_tokens; i++) {
    sfa_explained_token *t = &e->tokens[i];
    if (t->layer != probe->layer)
      continue;
    if (!here.cache)
      SFA_TRY(sfa_look_bring(&e->look, e->session->forward, probe, &here));
    SFA_TRY(sfa_look_query(&e->look, &here, 0, t->head));
    SFA_TRY(sfa_look_weights(&e->look, &here, 0, t->head, NULL, e->scores, e->weights));
    t->score = e->scores[t->position];
    SFA_TRY(sfa_look_reasons(&e->look, &here, t->head, t->position, e->ids, e->values, t));
  }
  return SFA_OK;
}

/* The largest masses, falling, ties to the earlier. */
static void choose(explanation *e, int64_t n_top) {
  e->n_tokens = 0;
  for (int64_t i = 0; i < e->len; i++) {
    int64_t at = e->n_tokens;
    while (at > 0 && e->mass[i] > e->tokens[at - 1].mass)
      at--;
    if (at == n_top)
      continue;
    e->n_tokens += e->n_tokens < n_top;
    memmove(e->tokens + at + 1, e->tokens + at, (size_t)(e->n_tokens - 1 - at) * sizeof *e->tokens);
    e->tokens[at] = (sfa_explained_token){.position = i,
                                          .mass = e->mass[i],
                                          .layer = e->most_by[i] / e->look.heads.n_heads,
                                          .head = e->most_by[i] % e->look.heads.n_heads,
                                          .weight = e->most[i]};
  }
}

static sfa_status check_list(sfa_context *ctx, const char *what, const int32_t *list, int32_t n, int32_t end) {
  SFA_REQUIRE(ctx, !list || n >= 1, "an empty list of %s: pass NULL for all", what);
  for (int32_t i = 0; list && i < n; i++)
    SFA_REQUIRE(ctx, list[i] >= 0 && list[i] < end, "%s %d: the model has 0 to %d", what, list[i], end - 1);
  return SFA_OK;
}

static sfa_status open_explanation(explanation *e) {
  sfa_context *ctx = e->session->ctx;
  size_t n = (size_t)e->len, D = (size_t)e->look.heads.head_dim;
  SFA_TRY(sfa_alloc_zero(ctx, n, sizeof(float), "the mass of each token", (void **)&e->mass));
  SFA_TRY(sfa_alloc_zero(ctx, n, sizeof(float), "the mass of each token", (void **)&e->most));
  SFA_TRY(sfa_alloc_zero(ctx, n, sizeof(int32_t), "the mass of each token", (void **)&e->most_by));
  SFA_TRY(sfa_alloc_zero(ctx, n, sizeof(float), "the scores of a head", (void **)&e->scores));
  SFA_TRY(sfa_alloc_zero(ctx, n, sizeof(float), "the weights of a head", (void **)&e->weights));
  SFA_TRY(sfa_alloc_zero(ctx, D, sizeof(uint16_t), "a key", &e->ids));
  return sfa_alloc_zero(ctx, D, sizeof(float), "a key", (void **)&e->values);
}

sfa_status sfa_session_explain(sfa_session *session, const sfa_explain_options *options, int64_t n_top, sfa_explained_token *tokens,
                               int64_t *n_tokens, float *mass) {
  if (!session)
    return SFA_ERROR_ARGUMENT;
  sfa_context *ctx = session->ctx;
  sfa_explain_options all = {.struct_size = sizeof all};
  explanation e = {.session = session, .options = options ? options : &all, .len = sfa_session_len(session), .tokens = tokens};
  SFA_REQUIRE(ctx, e.options->struct_size == sizeof all, "sfa_explain_options is of another version: %zu bytes, not %zu",
              e.options->struct_size, sizeof all);
  SFA_REQUIRE(ctx, n_top >= 0 && n_top <= MOST_TOP, "n_top is %lld: it must be from 0 to %d; mass tells of every token", (long long)n_top,
              MOST_TOP);
  SFA_REQUIRE(ctx, (n_top == 0 || tokens) && n_tokens, "tokens or n_tokens is NULL");
  SFA_REQUIRE(ctx, e.len >= 1, "the session is empty: there is no token to explain");
  sfa_model_heads heads = sfa_model_heads_of(session->model);
  SFA_TRY(check_list(ctx, "layers", e.options->layers, e.options->n_layers, heads.n_layers));
  SFA_TRY(check_list(ctx, "heads", e.options->heads, e.options->n_heads, heads.n_heads));
  sfa_status status = sfa_look_open(&e.look, session->model);
  if (status == SFA_OK)
    status = open_explanation(&e);
  if (status == SFA_OK)
    status = sfa_session_rerun_last(session, weigh, &e);
  if (status == SFA_OK) {
    for (int64_t i = 0; i < e.len; i++)
      e.mass[i] = (float)((double)e.mass[i] / (double)e.n_heads);
    choose(&e, n_top);
    status = sfa_session_rerun_last(session, reason, &e);
  }
  if (status == SFA_OK) {
    *n_tokens = e.n_tokens;
    if (mass)
      memcpy(mass, e.mass, (size_t)e.len * sizeof *mass);
  }
  void *memory[] = {e.mass, e.most, e.most_by, e.scores, e.weights, e.ids, e.values};
  for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
    sfa_free(ctx, memory[i]);
  return sfa_look_close(&e.look, status);
}
