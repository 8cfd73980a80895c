/* The report card: one text, two sessions in step, their logits side by side. */
#include <math.h>

#include "engine/session.h"
#include "eval/eval_open.h"

enum { PIECE = 64 };

typedef struct card {
  sfa_session *session[2];
  float *logits[2]; /* [PIECE][vocab] */
  double nll[2], kl;
  int64_t agree;
} card;

/* max and log of the sum of e^(x - max): log softmax(x)[i] = x[i] - max - log_sum. Returns the first place of the maximum. */
static int32_t normalizer(const float *x, int32_t n, double *max, double *log_sum) {
  int32_t best = 0;
  double sum = 0;
  for (int32_t i = 1; i < n; i++)
    best = x[i] > x[best] ? i : best;
  for (int32_t i = 0; i < n; i++)
    sum += exp((double)x[i] - (double)x[best]);
  *max = (double)x[best];
  *log_sum = log(sum);
  return best;
}

/* One place: losses of the token that follows, and KL(p || q) = sum p (log p - log q). */
static void add_place(card *c, int64_t row, int32_t next) {
  int32_t n = c->session[0]->vocab_size, best[2];
  const float *x[2];
  double offset[2]; /* log p[i] = x[i] - offset */
  for (int side = 0; side < 2; side++) {
    double max, log_sum;
    x[side] = c->logits[side] + row * n;
    best[side] = normalizer(x[side], n, &max, &log_sum);
    offset[side] = max + log_sum;
    c->nll[side] += offset[side] - (double)x[side][next];
  }
  for (int32_t i = 0; i < n; i++) {
    double log_p = (double)x[0][i] - offset[0], log_q = (double)x[1][i] - offset[1];
    c->kl += exp(log_p) * (log_p - log_q);
  }
  c->agree += best[0] == best[1];
}

static sfa_status read_text(card *c, const int32_t *tokens, int64_t n_tokens) {
  for (int64_t first = 0; first < n_tokens; first += PIECE) {
    int64_t n = sfa_min64(PIECE, n_tokens - first);
    for (int side = 0; side < 2; side++)
      SFA_TRY(sfa_session_logits(c->session[side], tokens + first, n, c->logits[side]));
    for (int64_t i = 0; i < n && first + i + 1 < n_tokens; i++)
      add_place(c, i, tokens[first + i + 1]);
  }
  return SFA_OK;
}

sfa_status sfa_eval_report_card(sfa_session *reference, sfa_session *candidate, const int32_t *tokens, int64_t n_tokens,
                                sfa_report_card *result) {
  if (!reference || !candidate)
    return SFA_ERROR_ARGUMENT;
  sfa_context *ctx = reference->ctx;
  card c = {.session = {reference, candidate}};
  SFA_REQUIRE(ctx, tokens && result && n_tokens >= 2, "a report card wants a text of at least 2 tokens, and a place for the result");
  SFA_REQUIRE(ctx, reference != candidate && sfa_session_len(reference) == 0 && sfa_session_len(candidate) == 0,
              "a report card wants two sessions that are empty");
  SFA_REQUIRE(ctx, reference->vocab_size == candidate->vocab_size, "vocabularies of %d and %d tokens cannot be compared",
              reference->vocab_size, candidate->vocab_size);
  SFA_TRY(sfa_alloc(ctx, 2u * PIECE * (size_t)reference->vocab_size * sizeof(float), "the logits of a piece", (void **)&c.logits[0]));
  c.logits[1] = c.logits[0] + (int64_t)PIECE * reference->vocab_size;
  sfa_session_stats before[2], after[2];
  for (int side = 0; side < 2; side++)
    sfa_session_stats_read(c.session[side], &before[side]);
  sfa_status status = read_text(&c, tokens, n_tokens);
  sfa_free(ctx, c.logits[0]);
  SFA_TRY(status);
  double places = (double)(n_tokens - 1), seconds[2];
  for (int side = 0; side < 2; side++) {
    sfa_session_stats_read(c.session[side], &after[side]);
    seconds[side] = 1e-9 * (double)(after[side].prefill_ns + after[side].decode_ns - before[side].prefill_ns - before[side].decode_ns);
  }
  *result = (sfa_report_card){.n_tokens = n_tokens,
                              .nll_reference = c.nll[0] / places,
                              .nll_candidate = c.nll[1] / places,
                              .kl = c.kl / places,
                              .top1_agreement = (double)c.agree / places,
                              .kv_bytes_reference = after[0].kv_bytes,
                              .kv_bytes_candidate = after[1].kv_bytes,
                              .tokens_per_s_reference = (double)n_tokens / seconds[0],
                              .tokens_per_s_candidate = (double)n_tokens / seconds[1]};
  return SFA_OK;
}
