/* The report card: one text, two sessions in step, their logits side by side; and what they take of time, in turns. */
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
  sfa_status status = read_text(&c, tokens, n_tokens);
  sfa_free(ctx, c.logits[0]);
  SFA_TRY(status);
  const double places = (double)(n_tokens - 1);
  sfa_session_stats stats[2];
  for (int side = 0; side < 2; side++)
    sfa_session_stats_read(c.session[side], &stats[side]);
  *result = (sfa_report_card){.n_tokens = n_tokens,
                              .nll_reference = c.nll[0] / places,
                              .nll_candidate = c.nll[1] / places,
                              .kl = c.kl / places,
                              .top1_agreement = (double)c.agree / places,
                              .kv_bytes_reference = stats[0].kv_bytes,
                              .kv_bytes_candidate = stats[1].kv_bytes};
  return SFA_OK;
}

/* ---- Speed ------------------------------------------------------------------------------------------------------------------------ */

enum { USUAL_STEPS = 32, USUAL_ROUNDS = 5 };

/* One reading from an empty timeline. */
static sfa_status time_reading(sfa_session *s, const int32_t *tokens, int64_t n_prompt, int64_t n_steps, sfa_speed *speed) {
  SFA_TRY(sfa_session_truncate(s, 0));
  const int64_t start = sfa_now_ns();
  SFA_TRY(sfa_session_append(s, tokens, n_prompt, NULL));
  const int64_t read = sfa_now_ns();
  for (int64_t i = 0; i < n_steps; i++)
    SFA_TRY(sfa_session_append(s, tokens + n_prompt + i, 1, NULL));
  *speed = (sfa_speed){1e9 * (double)n_prompt / (double)(read - start), 1e9 * (double)n_steps / (double)(sfa_now_ns() - read)};
  return SFA_OK;
}

/* Of n values that lie `stride` apart; they are put in order. */
static double median(double *values, int32_t n, int32_t stride) {
  for (int32_t i = 1; i < n; i++)
    for (int32_t j = i; j > 0 && values[j * stride] < values[(j - 1) * stride]; j--) {
      const double value = values[j * stride];
      values[j * stride] = values[(j - 1) * stride];
      values[(j - 1) * stride] = value;
    }
  return 0.5 * (values[(n - 1) / 2 * stride] + values[n / 2 * stride]);
}

static sfa_status time_rounds(sfa_session *const sessions[2], const int32_t *tokens, int64_t n_prompt, int32_t n_steps, int32_t n_rounds,
                              sfa_speed *times /* [n_rounds][2] */, sfa_speed speeds[2]) {
  for (int32_t round = -1; round < n_rounds; round++)
    for (int side = 0; side < 2; side++) {
      sfa_speed speed;
      SFA_TRY(time_reading(sessions[side], tokens, n_prompt, n_steps, &speed));
      if (round >= 0)
        times[2 * round + side] = speed;
    }
  for (int side = 0; side < 2; side++) {
    SFA_TRY(sfa_session_truncate(sessions[side], 0));
    speeds[side] = (sfa_speed){median(&times[side].prefill, n_rounds, 4), median(&times[side].decode, n_rounds, 4)};
  }
  return SFA_OK;
}

sfa_status sfa_eval_speeds(sfa_session *reference, sfa_session *candidate, const int32_t *tokens, int64_t n_tokens, int32_t n_steps,
                           int32_t n_rounds, sfa_speed speeds[2]) {
  if (!reference || !candidate)
    return SFA_ERROR_ARGUMENT;
  sfa_session *const sessions[2] = {reference, candidate};
  sfa_context *ctx = reference->ctx;
  n_steps = n_steps ? n_steps : USUAL_STEPS;
  n_rounds = n_rounds ? n_rounds : USUAL_ROUNDS;
  SFA_REQUIRE(
      ctx, tokens && speeds && n_steps >= 1 && n_rounds >= 1 && n_tokens > n_steps,
      "speeds want a text of more tokens than the %d single steps, at least one round, and a place for the result; the text has %lld",
      n_steps, (long long)n_tokens);
  sfa_speed *times;
  SFA_TRY(sfa_alloc(ctx, 2 * (size_t)n_rounds * sizeof *times, "the times of rounds", (void **)&times));
  sfa_status status = time_rounds(sessions, tokens, n_tokens - n_steps, n_steps, n_rounds, times, speeds);
  sfa_free(ctx, times);
  return status;
}
