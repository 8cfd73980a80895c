/* sfa eval nll: how surprised the model is by each token of a text. A text longer than the context is read in windows: each ends
 * `stride` tokens after the one before, and scores the tokens that no earlier window reached. */
#include "app.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct scores {
  int64_t n;       /* T tokens */
  int32_t *ids;    /* [T] */
  float *nll;      /* [T]; of the token after each, the last is NaN */
  int32_t *argmax; /* [T] */
  double mean;     /* of T - 1 values */
} scores;

static int score_windows(app *a, int64_t window, int64_t stride, scores *s) {
  float *nll = malloc((size_t)window * sizeof *nll);
  int32_t *argmax = malloc((size_t)window * sizeof *argmax);
  int status = nll && argmax ? EXIT_OK : app_fail("out of memory for the scores of a window");
  int64_t n_more = s->n > window ? (s->n - window + stride - 1) / stride : 0;
  a->progress.total = window * (1 + n_more);
  for (int64_t scored = 0; !status && scored < s->n;) {
    int64_t end = scored ? scored + stride : window;
    end = end < s->n ? end : s->n;
    int64_t start = end > window ? end - window : 0;
    sfa_session_truncate(a->session, 0);
    sfa_status score = sfa_session_score(a->session, s->ids + start, end - start, end < s->n ? s->ids[end] : -1, nll, argmax);
    if (score != SFA_OK) {
      status = score == SFA_ERROR_CANCELLED ? EXIT_INTERRUPTED : app_fail_status(a->ctx);
      break;
    }
    memcpy(s->nll + scored, nll + (scored - start), (size_t)(end - scored) * sizeof *nll);
    memcpy(s->argmax + scored, argmax + (scored - start), (size_t)(end - scored) * sizeof *argmax);
    scored = end;
    a->progress.before += end - start;
    if (progress_step(&a->progress, 0, 0))
      status = EXIT_INTERRUPTED;
  }
  progress_clear(&a->progress);
  free(nll);
  free(argmax);
  double sum = 0;
  for (int64_t i = 0; !status && i + 1 < s->n; i++)
    sum += (double)s->nll[i];
  s->mean = s->n > 1 ? sum / (double)(s->n - 1) : NAN; /* null in JSON */
  return status;
}

static int read_ids(const app *a, scores *s) {
  const app_options *o = a->o;
  int32_t *ids;
  if (!o->tokens.n) {
    int status = app_read_ids(a, &ids, &s->n, NULL);
    if (status)
      return status;
  } else {
    ids = NULL;
    s->n = o->tokens.n;
  }
  s->ids = s->n ? malloc((size_t)s->n * sizeof *s->ids) : NULL;
  for (int64_t i = 0; s->ids && i < s->n; i++)
    s->ids[i] = ids ? ids[i] : (int32_t)o->tokens.values[i];
  if (ids)
    sfa_free_ids(a->ctx, ids);
  if (!s->n)
    return app_usage("the text is empty; there is nothing to score");
  s->nll = malloc((size_t)s->n * sizeof *s->nll);
  s->argmax = malloc((size_t)s->n * sizeof *s->argmax);
  return s->ids && s->nll && s->argmax ? EXIT_OK : app_fail("out of memory for %lld tokens", (long long)s->n);
}

static int print_scores(const app *a, const scores *s, int64_t window, int64_t stride) {
  if (a->o->json) {
    cJSON *document = cJSON_CreateObject(), *nll = cJSON_AddArrayToObject(document, "nll"),
          *argmax = cJSON_AddArrayToObject(document, "argmax");
    for (int64_t i = 0; i + 1 < s->n; i++)
      cJSON_AddItemToArray(nll, cJSON_CreateNumber((double)s->nll[i]));
    for (int64_t i = 0; i < s->n; i++)
      cJSON_AddItemToArray(argmax, cJSON_CreateNumber(s->argmax[i]));
    cJSON_AddNumberToObject(document, "mean", s->mean);
    return app_print_json(document);
  }
  char name[96];
  int64_t hits = 0;
  for (int64_t i = 0; i + 1 < s->n; i++)
    hits += s->argmax[i] == s->ids[i + 1];
  printf("tokens scored   %lld of %lld\n", (long long)s->n - 1, (long long)s->n);
  printf("mean NLL        %.6f nats\n", s->mean);
  printf("perplexity      %.4f\n", exp(s->mean));
  printf("top-1 correct   %.2f %%\n", 100.0 * (double)hits / (double)(s->n > 1 ? s->n - 1 : 1));
  printf("attention       %s\n", app_attention_name(a, name, sizeof name));
  if (s->n > window)
    printf("windows         %lld tokens, moved by %lld\n", (long long)window, (long long)stride);
  int status = app_flush();
  stats_print(a);
  return status;
}

static int eval_nll(app *a, const app_options *o, scores *s) {
  int status = app_require_model(o, "eval nll");
  if (!status && !o->tokens.n && !o->file)
    status = app_usage("eval nll wants a text or token ids: -f FILE or --tokens 1,2,3");
  if (!status && o->tokens.n && o->file)
    status = app_usage("give the tokens with -f or with --tokens, not both");
  if (!status)
    status = app_open_model(a, o, !o->tokens.n);
  if (!status)
    status = read_ids(a, s);
  int64_t window, stride;
  if (!status)
    status = app_context_len(a, &window);
  if (status)
    return status;
  stride = o->stride > 0 ? o->stride : window > 1 ? window / 2 : 1;
  if (stride > window)
    return app_usage("--stride %lld is more than the window of %lld tokens; tokens between would go unscored", (long long)stride,
                     (long long)window);
  for (int64_t i = 0; i < s->n; i++)
    if (s->ids[i] >= a->info.vocab_size)
      return app_usage("token %d at place %lld is not in the model's vocabulary of %d", s->ids[i], (long long)i, a->info.vocab_size);
  if ((status = app_open_session(a, &a->choice, window)) != EXIT_OK)
    return status;
  interrupt_begin();
  status = score_windows(a, window < s->n ? window : s->n, stride, s);
  return status ? status : print_scores(a, s, window, stride);
}

int cmd_eval_nll(const app_options *o) {
  app a = {0};
  scores s = {0};
  int status = eval_nll(&a, o, &s);
  free(s.ids);
  free(s.nll);
  free(s.argmax);
  app_close(&a);
  return status;
}
