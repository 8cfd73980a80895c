/* Perplexity in strided windows, as Hugging Face's guide "Perplexity of fixed-length models" computes it. */
#include <math.h>

#include "engine/session.h"
#include "eval/eval_open.h"

typedef struct sums {
  double sum, squares;
  int64_t n;
} sums;

/* Places first .. n - 2 of a window predict the token after them. */
static void add_scores(sums *s, const float *nll, int64_t first, int64_t n) {
  for (int64_t i = first; i + 1 < n; i++) {
    s->sum += (double)nll[i];
    s->squares += (double)nll[i] * (double)nll[i];
    s->n++;
  }
}

static void add_positions(const float *nll, int64_t n, double *position_nll, int64_t *position_n) {
  for (int64_t i = 0; i + 1 < n; i++) {
    position_nll[i] += (double)nll[i];
    position_n[i]++;
  }
}

sfa_status sfa_eval_perplexity(sfa_session *session, const int32_t *tokens, int64_t n_tokens, int64_t window, int64_t stride,
                               sfa_perplexity *result, double *position_nll, int64_t *position_n) {
  if (!session)
    return SFA_ERROR_ARGUMENT;
  sfa_context *ctx = session->ctx;
  SFA_REQUIRE(ctx, tokens && result, "sfa_eval_perplexity wants tokens and a place for the result");
  SFA_REQUIRE(ctx, (position_nll == NULL) == (position_n == NULL), "position_nll and position_n are given both or not at all");
  SFA_REQUIRE(ctx, n_tokens >= 2, "a text of %lld tokens has nothing to predict: at least 2 are wanted", (long long)n_tokens);
  SFA_REQUIRE(ctx, window >= 2 && window <= session->context_len, "a window of %lld tokens: it must be 2 to %lld, the session's context",
              (long long)window, (long long)session->context_len);
  SFA_REQUIRE(ctx, stride >= 1 && stride <= window, "a stride of %lld tokens: it must be 1 to %lld, the window", (long long)stride,
              (long long)window);
  float *nll;
  sums s = {0};
  int64_t n_windows = 0;
  SFA_TRY(sfa_alloc(ctx, (size_t)window * sizeof *nll, "the scores of a window", (void **)&nll));
  sfa_status status = SFA_OK;
  for (int64_t begin = 0, scored = 0; status == SFA_OK && scored < n_tokens; begin += stride) {
    int64_t end = sfa_min64(begin + window, n_tokens), n = end - begin;
    status = sfa_session_truncate(session, 0);
    if (status == SFA_OK)
      status = sfa_session_score(session, tokens + begin, n, -1, nll, NULL);
    if (status == SFA_OK) {
      add_scores(&s, nll, scored > begin ? scored - begin - 1 : 0, n); /* from the place before the first token that is new */
      if (position_nll)
        add_positions(nll, n, position_nll, position_n);
      scored = end;
      n_windows++;
    }
  }
  sfa_free(ctx, nll);
  double n = (double)s.n, mean = s.sum / n, variance = s.squares / n - mean * mean;
  *result = (sfa_perplexity){mean, n > 1 ? sqrt((variance > 0 ? variance : 0) / (n - 1)) : NAN, s.n, n_windows};
  return status;
}
