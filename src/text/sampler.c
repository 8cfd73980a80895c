/* Choosing the next token: repetition penalty, top-k, top-p, min-p, temperature, draw. */
#include <sfa/engine.h>

#include "base/context.h"
#include "base/rng.h"

#include <math.h>
#include <string.h>

struct candidate {
  float logit;
  int32_t id;
};

struct sfa_sampler {
  sfa_context *ctx;
  sfa_sampler_options options;
  int32_t vocab_size;
  sfa_rng rng;
  struct candidate *candidates; /* [vocab_size] */
  int32_t *recent;              /* ring of the last tokens */
  int64_t n_accepted;
  uint8_t *penalized; /* [vocab_size], all 0 between calls */
};

static bool within(float x, float low, float high) { return x >= low && x <= high; }

sfa_status sfa_sampler_create(sfa_context *ctx, const sfa_sampler_options *options, int32_t vocab_size, sfa_sampler **sampler) {
  if (!ctx || !sampler)
    return SFA_ERROR_ARGUMENT;
  *sampler = NULL;
  SFA_REQUIRE(ctx, options && options->struct_size == sizeof *options, "sfa_sampler_create: options need struct_size = %zu",
              sizeof *options);
  SFA_REQUIRE(ctx, vocab_size > 0, "sfa_sampler_create: vocab_size is %d", vocab_size);
  SFA_REQUIRE(ctx, within(options->temperature, 0, 1e6f), "temperature is %g; it must be 0 (greedy) or above", options->temperature);
  SFA_REQUIRE(ctx, options->top_k >= 0, "top_k is %d; it must be 0 (off) or above", options->top_k);
  SFA_REQUIRE(ctx, within(options->top_p, 0, 1), "top_p is %g; it must be in 0..1", options->top_p);
  SFA_REQUIRE(ctx, within(options->min_p, 0, 1), "min_p is %g; it must be in 0..1", options->min_p);
  SFA_REQUIRE(ctx, within(options->repetition_penalty, 0, 1e6f), "repetition_penalty is %g; it must be 0 (off) or above",
              options->repetition_penalty);
  SFA_REQUIRE(ctx, options->repetition_last >= 0, "repetition_last is %d; it must be 0 (64 tokens) or above", options->repetition_last);
  sfa_sampler *s;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *s, "a sampler", (void **)&s));
  s->ctx = ctx;
  s->options = *options;
  s->options.repetition_last = options->repetition_last ? options->repetition_last : 64;
  s->vocab_size = vocab_size;
  s->rng.state = options->seed;
  sfa_status status = sfa_alloc_zero(ctx, (size_t)vocab_size, sizeof *s->candidates, "a sampler", (void **)&s->candidates);
  if (status == SFA_OK)
    status = sfa_alloc_zero(ctx, (size_t)s->options.repetition_last, sizeof *s->recent, "a sampler", (void **)&s->recent);
  if (status == SFA_OK)
    status = sfa_alloc_zero(ctx, (size_t)vocab_size, 1, "a sampler", (void **)&s->penalized);
  if (status != SFA_OK) {
    sfa_sampler_destroy(s);
    return status;
  }
  *sampler = s;
  return SFA_OK;
}

void sfa_sampler_destroy(sfa_sampler *s) {
  if (!s)
    return;
  sfa_free(s->ctx, s->candidates);
  sfa_free(s->ctx, s->recent);
  sfa_free(s->ctx, s->penalized);
  sfa_free(s->ctx, s);
}

void sfa_sampler_accept(sfa_sampler *s, int32_t token) {
  if (token >= 0 && token < s->vocab_size)
    s->recent[s->n_accepted++ % s->options.repetition_last] = token;
}

static void penalize_repetitions(sfa_sampler *s, float *logits) {
  float penalty = s->options.repetition_penalty;
  if (penalty == 0 || penalty == 1)
    return;
  int64_t n = sfa_min64(s->n_accepted, s->options.repetition_last);
  for (int64_t i = 0; i < n; i++) {
    int32_t id = s->recent[i];
    if (!s->penalized[id])
      logits[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
    s->penalized[id] = 1;
  }
  for (int64_t i = 0; i < n; i++)
    s->penalized[s->recent[i]] = 0;
}

/* ---- Candidates: a binary heap, the best on top, equals by id ---------------------------------------------------------------------- */

static bool better(struct candidate a, struct candidate b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

static void sink(struct candidate *heap, int32_t n, int32_t i) {
  struct candidate moving = heap[i];
  for (int32_t child = 2 * i + 1; child < n; child = 2 * i + 1) {
    if (child + 1 < n && better(heap[child + 1], heap[child]))
      child++;
    if (!better(heap[child], moving))
      break;
    heap[i] = heap[child];
    i = child;
  }
  heap[i] = moving;
}

/* Share of a candidate relative to the best: exp((logit - best) / temperature), also where both are infinite. */
static double weight_of(float logit, float best, double temperature) {
  return logit == best ? 1 : exp(((double)logit - (double)best) / temperature);
}

/* Moves the candidates that top-k and top-p keep to the end of the array, the best last. Returns how many. */
static int32_t keep_best(struct candidate *c, int32_t n, int32_t top_k, float top_p) {
  for (int32_t i = n / 2; i-- > 0;)
    sink(c, n, i);
  float best = c[0].logit;
  int32_t n_left = n, most = top_k > 0 && top_k < n ? top_k : n;
  double total = 0, sum = 0;
  bool by_share = top_p > 0 && top_p < 1;
  if (by_share && most == n)
    for (int32_t i = 0; i < n; i++)
      total += weight_of(c[i].logit, best, 1);
  while (n - n_left < most) {
    struct candidate top = c[0];
    sum += weight_of(top.logit, best, 1);
    c[0] = c[--n_left];
    sink(c, n_left, 0);
    c[n_left] = top;
    if (by_share && most == n && sum >= top_p * total)
      break;
  }
  int32_t kept = n - n_left;
  if (!by_share || most == n)
    return kept;
  total = sum; /* the shares are those among the top k */
  sum = 0;
  for (int32_t i = 1; i <= kept; i++) {
    sum += weight_of(c[n - i].logit, best, 1);
    if (sum >= top_p * total)
      return i;
  }
  return kept;
}

int32_t sfa_sampler_next(sfa_sampler *s, float *logits) {
  penalize_repetitions(s, logits);
  int32_t n = 0, argmax = -1;
  for (int32_t id = 0; id < s->vocab_size; id++) {
    if (!(logits[id] > -INFINITY)) /* NaN counts as impossible */
      continue;
    s->candidates[n++] = (struct candidate){logits[id], id};
    if (argmax < 0 || logits[id] > logits[argmax])
      argmax = id;
  }
  int32_t chosen = argmax < 0 ? 0 : argmax;
  if (argmax >= 0 && s->options.temperature > 0) {
    struct candidate *c = s->candidates;
    bool sorted = s->options.top_k > 0 || (s->options.top_p > 0 && s->options.top_p < 1);
    int32_t kept = sorted ? keep_best(c, n, s->options.top_k, s->options.top_p) : n;
    c += n - kept;
    float best = logits[argmax];
    double total = 0;
    for (int32_t i = kept; i-- > 0;)
      if (weight_of(c[i].logit, best, 1) >= (double)s->options.min_p)
        total += weight_of(c[i].logit, best, s->options.temperature);
    double at = sfa_rng_uniform(&s->rng) * total;
    for (int32_t i = kept; i-- > 0 && at >= 0;) {
      if (weight_of(c[i].logit, best, 1) < (double)s->options.min_p)
        continue;
      at -= weight_of(c[i].logit, best, s->options.temperature);
      chosen = c[i].id;
    }
  }
  sfa_sampler_accept(s, chosen);
  return chosen;
}
