/* How much the loss of a dense model rises when one head keeps k features, and the k of layers or heads that cost least under a budget. */
#include <sfa/train.h>

#include <math.h>
#include <string.h>

#include "train/batches.h"

#include "model/learn.h"

enum { DEFAULT_WINDOWS = 16, DEFAULT_WINDOW_LEN = 256 };
static const int32_t default_k[] = {4, 8, 16, 32};

typedef struct probe {
  sfa_context *ctx;
  const sfa_sensitivity_options *options;
  sfa_learner *learner;
  sfa_batches data;
  int64_t n_windows, n_runs, n_done;
  int32_t *tokens, *targets; /* [window_len] */
  int32_t *kept;             /* [n_layers][n_kv_heads] of the run at hand */
} probe;

/* Mean loss over the windows with p->kept. */
static sfa_status run_windows(probe *p, double *loss) {
  const sfa_learn_sparsity sparsity = {.k_keys = p->kept, .k_queries = p->options->dense_queries ? NULL : p->kept};
  const int64_t len = p->data.window_len;
  double sum = 0;
  SFA_TRY(sfa_learner_sparsity(p->learner, &sparsity));
  for (int64_t i = 0; i < p->n_windows; i++) {
    const sfa_learn_batch batch = {.n_tokens = (int32_t)len, .n_sequences = 1, .tokens = p->tokens, .targets = p->targets};
    sfa_learn_result result;
    SFA_TRY(sfa_batches_read(&p->data, i * p->data.n_windows / p->n_windows, p->tokens, p->targets));
    SFA_TRY(sfa_learner_run(p->learner, &batch, &result));
    sum += result.loss_sum;
  }
  *loss = sum / (double)(p->n_windows * len);
  p->n_done++;
  if (p->options->progress && p->options->progress(p->options->progress_user, p->n_done, p->n_runs))
    return sfa_fail(p->ctx, SFA_ERROR_CANCELLED, "stopped after %lld of %lld losses", (long long)p->n_done, (long long)p->n_runs);
  return isfinite(*loss) ? SFA_OK : sfa_fail(p->ctx, SFA_ERROR_RANGE, "the model's loss over the data is %g", *loss);
}

static sfa_status measure(probe *p, sfa_sensitivity *s) {
  const int32_t n_heads = s->n_layers * s->n_kv_heads;
  p->n_runs = 1 + (int64_t)s->n_k * n_heads;
  SFA_TRY(run_windows(p, &s->dense_loss));
  for (int32_t i = 0; i < s->n_k; i++)
    for (int32_t head = 0; head < n_heads; head++) {
      p->kept[head] = s->k[i];
      SFA_TRY(run_windows(p, &s->rise[i * n_heads + head]));
      s->rise[i * n_heads + head] -= s->dense_loss;
      p->kept[head] = 0;
    }
  return SFA_OK;
}

static sfa_status open_probe(probe *p, sfa_sensitivity *s) {
  const sfa_sensitivity_options *o = p->options;
  const int64_t len = o->window_len > 0 ? o->window_len : DEFAULT_WINDOW_LEN;
  SFA_REQUIRE(p->ctx, o->model && o->n_data > 0, "a sensitivity wants a model and token shards");
  SFA_REQUIRE(p->ctx, len <= INT32_MAX, "a window of %lld tokens is too long", (long long)len);
  SFA_TRY(sfa_batches_open(p->ctx, "sensitivity", o->data, o->n_data, len, &p->data));
  p->n_windows = sfa_min64(o->n_windows > 0 ? o->n_windows : DEFAULT_WINDOWS, p->data.n_windows);
  const sfa_learn_options options = {.max_tokens = (int32_t)len};
  sfa_weights *weights;
  SFA_TRY(sfa_weights_open(p->ctx, o->model, &weights));
  SFA_TRY(sfa_learner_create(p->ctx, weights, &options, &p->learner));
  const sfa_learner_shape shape = sfa_learner_shape_of(p->learner);
  sfa_shards_info info;
  sfa_shards_describe(p->data.shards, &info);
  SFA_REQUIRE(p->ctx, info.vocab_size <= shape.vocab_size,
              "the shards have ids up to %d, the model %d tokens: they are of another tokenizer", info.vocab_size - 1, shape.vocab_size);
  SFA_REQUIRE(p->ctx, len <= shape.context_len, "a window of %lld tokens is longer than the model's context of %lld", (long long)len,
              (long long)shape.context_len);
  s->n_layers = shape.n_layers;
  s->n_kv_heads = shape.n_kv_heads;
  s->head_dim = shape.head_dim;
  const size_t n_heads = (size_t)s->n_layers * (size_t)s->n_kv_heads;
  SFA_TRY(sfa_alloc_zero(p->ctx, (size_t)len, sizeof *p->tokens, "tokens of a window", (void **)&p->tokens));
  SFA_TRY(sfa_alloc_zero(p->ctx, (size_t)len, sizeof *p->targets, "tokens of a window", (void **)&p->targets));
  SFA_TRY(sfa_alloc_zero(p->ctx, n_heads, sizeof *p->kept, "kept features", (void **)&p->kept));
  return sfa_alloc_zero(p->ctx, (size_t)s->n_k * n_heads, sizeof *s->rise, "losses by head", (void **)&s->rise);
}

/* The numbers of features that are tried: those asked for that are below head_dim. */
static sfa_status take_k(sfa_context *ctx, const sfa_sensitivity_options *o, sfa_sensitivity *s) {
  const int32_t n = o->n_k > 0 ? o->n_k : (int32_t)(sizeof default_k / sizeof *default_k), *k = o->n_k > 0 ? o->k : default_k;
  SFA_TRY(sfa_alloc_zero(ctx, (size_t)n, sizeof *s->k, "numbers of features", (void **)&s->k));
  for (int32_t i = 0; i < n; i++) {
    SFA_REQUIRE(ctx, k[i] >= 1 && (i == 0 || k[i] > k[i - 1]), "numbers of features must rise from 1; number %d is %d", i, k[i]);
    s->k[s->n_k++] = k[i];
  }
  return SFA_OK;
}

/* Those that keep everything need no run. */
static void drop_whole(sfa_sensitivity *s) {
  while (s->n_k > 0 && s->k[s->n_k - 1] >= s->head_dim)
    s->n_k--;
}

sfa_status sfa_sensitivity_measure(sfa_context *ctx, const sfa_sensitivity_options *options, sfa_sensitivity **sensitivity) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(ctx, sensitivity, "sfa_sensitivity_measure wants a place for its result");
  *sensitivity = NULL;
  SFA_REQUIRE(ctx, options && options->struct_size == sizeof *options, "sfa_sensitivity_options is of another version: %zu bytes, not %zu",
              options ? options->struct_size : 0, sizeof *options);
  sfa_sensitivity *s;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *s, "a sensitivity", (void **)&s));
  probe p = {.ctx = ctx, .options = options};
  sfa_status status = take_k(ctx, options, s);
  if (status == SFA_OK)
    status = open_probe(&p, s);
  if (status == SFA_OK) {
    drop_whole(s);
    status = measure(&p, s);
  }
  sfa_learner_destroy(p.learner);
  sfa_batches_close(&p.data);
  sfa_free(ctx, p.tokens);
  sfa_free(ctx, p.targets);
  sfa_free(ctx, p.kept);
  if (status == SFA_OK)
    *sensitivity = s;
  else
    sfa_sensitivity_destroy(ctx, s);
  return status;
}

void sfa_sensitivity_destroy(sfa_context *ctx, sfa_sensitivity *s) {
  if (!s)
    return;
  sfa_free(ctx, s->k);
  sfa_free(ctx, s->rise);
  sfa_free(ctx, s);
}

/* ---- The budget ------------------------------------------------------------------------------------------------------------------- */

/* What a share of the budget goes to: a layer, whose heads all keep as many features, or a head. */
typedef struct shares {
  const sfa_sensitivity *s;
  int32_t n, n_heads; /* so many, of so many heads each */
} shares;

/* Rise of a share whose heads keep choice i: s->k[i], or everything (i = n_k). */
static double share_rise(const shares *a, int32_t share, int32_t i) {
  double sum = 0;
  for (int32_t g = 0; i < a->s->n_k && g < a->n_heads; g++)
    sum += a->s->rise[((int64_t)i * a->n + share) * a->n_heads + g];
  return sum;
}

static int32_t choice_k(const sfa_sensitivity *s, int32_t i) { return i < s->n_k ? s->k[i] : s->head_dim; }

/* least[b]: the smallest sum of rises of the shares so far with at most b features; took[share][b]: the choice of the last of them. */
static double fill(const shares *a, int32_t budget, double *least, double *next, uint8_t *took) {
  memset(least, 0, ((size_t)budget + 1) * sizeof *least);
  for (int32_t share = 0; share < a->n; share++) {
    for (int32_t b = 0; b <= budget; b++) {
      next[b] = INFINITY;
      for (int32_t i = 0; i <= a->s->n_k; i++) {
        const int32_t k = choice_k(a->s, i);
        if (k > b || !(least[b - k] + share_rise(a, share, i) < next[b]))
          continue;
        next[b] = least[b - k] + share_rise(a, share, i);
        took[(int64_t)share * (budget + 1) + b] = (uint8_t)i;
      }
    }
    memcpy(least, next, ((size_t)budget + 1) * sizeof *least);
  }
  return least[budget];
}

sfa_status sfa_sensitivity_allocate(sfa_context *ctx, const sfa_sensitivity *s, double mean_k, int32_t by_head, int32_t *k, double *rise) {
  SFA_REQUIRE(ctx, s && k && rise, "sfa_sensitivity_allocate wants a sensitivity and places for its results");
  SFA_REQUIRE(ctx, mean_k >= choice_k(s, 0) && mean_k <= s->head_dim,
              "a budget of %g features; it must be from %d, the fewest that were tried, to the head_dim %d", mean_k, choice_k(s, 0),
              s->head_dim);
  const shares a = {s, by_head ? s->n_layers * s->n_kv_heads : s->n_layers, by_head ? 1 : s->n_kv_heads};
  const int32_t budget = (int32_t)floor(mean_k * a.n);
  const size_t n = (size_t)budget + 1;
  double *least = NULL, *next = NULL;
  uint8_t *took = NULL;
  sfa_status status = sfa_alloc_zero(ctx, n, sizeof *least, "sums of rises", (void **)&least);
  if (status == SFA_OK)
    status = sfa_alloc_zero(ctx, n, sizeof *next, "sums of rises", (void **)&next);
  if (status == SFA_OK)
    status = sfa_alloc_zero(ctx, n, (size_t)a.n, "choices", (void **)&took);
  if (status == SFA_OK) {
    *rise = fill(&a, budget, least, next, took);
    for (int32_t share = a.n - 1, left = budget; share >= 0; share--) {
      const int32_t now = choice_k(s, took[(size_t)share * n + (size_t)left]);
      for (int32_t g = 0; g < a.n_heads; g++)
        k[share * a.n_heads + g] = now;
      left -= now;
    }
  }
  sfa_free(ctx, least);
  sfa_free(ctx, next);
  sfa_free(ctx, took);
  return status;
}
