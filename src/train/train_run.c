/* The loop of a training: steps, held-out losses, checkpoints. */
#include "train/train_parts.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/hash.h"

/* ---- Sparsity of a step ------------------------------------------------------------------------------------------------------------ */

static size_t n_heads(const sfa_train *t) { return (size_t)t->shape.n_layers * (size_t)t->shape.n_kv_heads; }

/* Features kept at a step where there are k in the end; 0: all. Two of four are half of them at most, so that the schedule begins there. */
static int32_t kept(const sfa_train *t, int64_t step, int32_t k) {
  const int32_t dim = t->shape.head_dim, now = sfa_recipe_k(&t->recipe, step, k, dim);
  return t->sparsity.two_of_four && now > dim / 2 ? dim / 2 : now;
}

/* Most features kept of a key at a step; 0: all. */
static int32_t most_kept(const sfa_train *t, int64_t step) {
  int32_t most = 0;
  for (size_t i = 0; t->sparsity.k_keys && i < n_heads(t); i++) {
    int32_t k = kept(t, step, t->sparsity.k_keys[i]);
    most = k > most ? k : most;
  }
  return most;
}

/* What the schedule has for a step. Noise helps to find supports; held-out losses are without. */
static sfa_status set_sparsity(sfa_train *t, int64_t step, bool noise) {
  if (!t->sparsity.k_keys)
    return sfa_learner_sparsity(t->learner, &(sfa_learn_sparsity){0});
  for (size_t i = 0; i < n_heads(t); i++) {
    t->k_keys[i] = kept(t, step, t->sparsity.k_keys[i]);
    t->k_queries[i] = kept(t, step, t->sparsity.k_queries[i]);
  }
  const bool sparse = most_kept(t, step) > 0;
  const sfa_learn_sparsity now = {.k_keys = t->k_keys,
                                  .k_queries = t->k_queries,
                                  .pre_rope = t->sparsity.pre_rope,
                                  .two_of_four = t->sparsity.two_of_four && sparse,
                                  .gumbel_scale = noise ? (float)t->recipe.gumbel_scale : 0,
                                  .gumbel_seed = sfa_hash_word(sfa_hash_word(1, (uint64_t)t->recipe.seed), (uint64_t)step)};
  return sfa_learner_sparsity(t->learner, sparse ? &now : &(sfa_learn_sparsity){0});
}

/* ---- A step ------------------------------------------------------------------------------------------------------------------------ */

static sfa_status fail_not_finite(const sfa_train *t, double loss, double norm) {
  char kept[96];
  if (t->saved_step >= 0)
    snprintf(kept, sizeof kept, "the checkpoint of step %" PRId64 " is kept", t->saved_step);
  else
    snprintf(kept, sizeof kept, "there is no checkpoint yet");
  return sfa_fail(t->ctx, SFA_ERROR_RANGE,
                  "step %" PRId64
                  " has a loss of %g and a gradient norm of %g: the training has diverged; %s; try a lower learning_rate (it "
                  "is %g), a longer warm-up (%" PRId64 " steps) or a smaller clip_norm (%g)",
                  t->state.step, loss, norm, kept, t->recipe.learning_rate, t->recipe.warmup_steps, t->recipe.clip_norm);
}

/* Cuts a batch of so many windows into sequences, each of which begins at position 0 and sees itself alone; returns how many they are. */
static int32_t cut_sequences(sfa_train *t, int64_t n_windows) {
  const int64_t len = t->recipe.sequence_len;
  int32_t n = 0;
  for (int64_t i = 0; i < n_windows * len; i++)
    if (i % len == 0 || (t->recipe.document_mask && t->tokens[i - 1] == t->end_token))
      t->cu_seqlens[n++] = (int32_t)i;
  t->cu_seqlens[n] = (int32_t)(n_windows * len);
  return n;
}

/* Reads the windows of a batch. */
static sfa_status fill_batch(sfa_train *t, int64_t first) {
  const int64_t len = t->recipe.sequence_len;
  for (int64_t i = 0; i < t->recipe.sequences; i++) {
    int64_t window = sfa_batches_shuffled(&t->data, (uint64_t)t->recipe.seed, first + i);
    SFA_TRY(sfa_batches_read(&t->data, window, t->tokens + i * len, t->targets + i * len));
  }
  return SFA_OK;
}

/* One step; *loss is the mean over its tokens. */
static sfa_status run_step(sfa_train *t, double *loss, double *norm) {
  const sfa_recipe *r = &t->recipe;
  const int64_t n = r->sequences * r->sequence_len;
  sfa_learn_result result;
  SFA_TRY(set_sparsity(t, t->state.step, true));
  SFA_TRY(sfa_learner_clear(t->learner));
  for (int64_t i = 0; i < r->accumulate; i++) {
    sfa_learn_batch batch = {.n_tokens = (int32_t)n,
                             .tokens = t->tokens,
                             .targets = t->targets,
                             .cu_seqlens = t->cu_seqlens,
                             .backward = true,
                             .loss_scale = (float)(1.0 / (double)(n * r->accumulate)),
                             .loss_weight = r->loss_weight > 0 ? (float)r->loss_weight : -1,
                             .head_weight = (float)r->head_weight,
                             .teacher_weight = (float)r->teacher_weight,
                             .temperature = (float)r->temperature};
    SFA_TRY(fill_batch(t, (t->state.step * r->accumulate + i) * r->sequences));
    batch.n_sequences = cut_sequences(t, r->sequences);
    if (t->teacher.learner)
      SFA_TRY(sfa_teacher_answer(&t->teacher, &batch));
    SFA_TRY(sfa_learner_start(t->learner, &batch));
  }
  SFA_TRY(sfa_optimizer_step(&t->optimizer, r, t->state.step));
  SFA_TRY(sfa_learner_finish(t->learner, &result));
  if (t->teacher.learner)
    SFA_TRY(sfa_learner_finish(t->teacher.learner, NULL));
  *loss = result.loss_sum / (double)(n * r->accumulate);
  *norm = sfa_optimizer_norm(&t->optimizer);
  if (!isfinite(*loss) || !isfinite(*norm))
    return fail_not_finite(t, *loss, *norm);
  t->state.step++;
  t->state.n_tokens += n * r->accumulate;
  t->state.loss_sum += *loss;
  t->state.loss_steps++;
  return SFA_OK;
}

/* ---- Held-out loss and the health of supports ------------------------------------------------------------------- */

/* How features are used, over all sparse heads: p_u is the part of the keys that keep feature u. The overlap is that of independent
 * supports, sum over u of p_q(u) p_k(u). NULL: no head is sparse now. */
static cJSON *support_json(const sfa_train *t, int64_t n_tokens) {
  const int32_t dim = t->shape.head_dim, group = t->shape.n_heads / t->shape.n_kv_heads;
  double overlap = 0, effective = 0, hottest = 0;
  int64_t n_sparse = 0, dead = 0;
  for (size_t head = 0; head < n_heads(t); head++) {
    const int64_t *keys = t->key_uses + head * (size_t)dim, *queries = t->query_uses + head * (size_t)dim;
    double sum = 0, squares = 0;
    for (int32_t u = 0; u < dim; u++) {
      const double p = (double)keys[u] / (double)n_tokens;
      sum += p;
      squares += p * p;
      hottest = p > hottest ? p : hottest;
    }
    if (sum == 0)
      continue;
    n_sparse++;
    for (int32_t u = 0; u < dim; u++) {
      dead += keys[u] == 0;
      overlap += (double)queries[u] / (double)(n_tokens * group) * ((double)keys[u] / (double)n_tokens);
    }
    effective += sum * sum / squares;
  }
  if (!n_sparse)
    return NULL;
  cJSON *json = cJSON_CreateObject();
  cJSON_AddNumberToObject(json, "sparse_heads", (double)n_sparse);
  cJSON_AddNumberToObject(json, "mean_overlap", overlap / (double)n_sparse);
  cJSON_AddNumberToObject(json, "effective_features", effective / (double)n_sparse);
  cJSON_AddNumberToObject(json, "hottest", hottest);
  cJSON_AddNumberToObject(json, "dead", (double)dead);
  return json;
}

/* The mean loss of windows spread evenly over the validation shards, the same ones every time. */
static sfa_status run_validation(sfa_train *t, double *loss, cJSON **support) {
  const int64_t len = t->recipe.sequence_len, n = sfa_min64(t->recipe.validation_windows, t->validation.n_windows);
  const size_t use_bytes = n_heads(t) * (size_t)t->shape.head_dim * sizeof *t->key_uses;
  double sum = 0;
  memset(t->key_uses, 0, use_bytes);
  memset(t->query_uses, 0, use_bytes);
  SFA_TRY(set_sparsity(t, t->state.step, false));
  for (int64_t first = 0; first < n; first += t->recipe.sequences) {
    const int64_t m = sfa_min64(t->recipe.sequences, n - first);
    for (int64_t i = 0; i < m; i++)
      SFA_TRY(sfa_batches_read(&t->validation, (first + i) * t->validation.n_windows / n, t->tokens + i * len, t->targets + i * len));
    const sfa_learn_batch batch = {.n_tokens = (int32_t)(m * len),
                                   .n_sequences = cut_sequences(t, m),
                                   .tokens = t->tokens,
                                   .targets = t->targets,
                                   .cu_seqlens = t->cu_seqlens,
                                   .key_uses = t->key_uses,
                                   .query_uses = t->query_uses};
    sfa_learn_result result;
    SFA_TRY(sfa_learner_run(t->learner, &batch, &result));
    sum += result.loss_sum;
  }
  *loss = sum / (double)(n * len);
  *support = support_json(t, n * len);
  return SFA_OK;
}

/* ---- Log, checkpoints ------------------------------------------------------------------------------------------- */

static cJSON *begin_line(const sfa_train *t) {
  cJSON *line = cJSON_CreateObject();
  cJSON_AddNumberToObject(line, "step", (double)t->state.step);
  cJSON_AddNumberToObject(line, "tokens", (double)t->state.n_tokens);
  return line;
}

/* loss: the mean of the steps since the line before. */
static sfa_status log_step(sfa_train *t, const sfa_train_progress *p) {
  cJSON *line = begin_line(t);
  cJSON_AddNumberToObject(line, "loss", t->state.loss_sum / (double)t->state.loss_steps);
  cJSON_AddNumberToObject(line, "learning_rate", p->learning_rate);
  cJSON_AddNumberToObject(line, "gradient_norm", p->gradient_norm);
  cJSON_AddNumberToObject(line, "k", p->k ? p->k : t->shape.head_dim);
  cJSON_AddNumberToObject(line, "tokens_per_s", p->tokens_per_s);
  t->state.loss_sum = 0;
  t->state.loss_steps = 0;
  return sfa_train_log_add(&t->log, line);
}

static sfa_status log_validation(sfa_train *t, const sfa_train_progress *p, cJSON *support) {
  cJSON *line = begin_line(t);
  cJSON_AddNumberToObject(line, "validation_loss", p->validation_loss);
  cJSON_AddNumberToObject(line, "k", p->k ? p->k : t->shape.head_dim);
  if (support)
    cJSON_AddItemToObject(line, "support", support);
  return sfa_train_log_add(&t->log, line);
}

static sfa_status save_checkpoint(sfa_train *t) {
  if (t->saved_step == t->state.step)
    return SFA_OK;
  SFA_TRY(sfa_checkpoint_save(t->ctx, t->checkpoint_folder, &t->state, t->recipe.json, t->learner, &t->optimizer));
  t->saved_step = t->state.step;
  sfa_checkpoint_prune(t->ctx, t->checkpoint_folder, t->recipe.keep_checkpoints);
  return SFA_OK;
}

static sfa_status save_model(sfa_train *t) {
  SFA_TRY(sfa_train_model_save(t->ctx, t->model_folder, &t->recipe, SFA_SAVE_MODEL, t->learner));
  if (t->recipe.trained != SFA_TRAIN_ALL)
    SFA_TRY(sfa_train_model_save(t->ctx, t->adapter_folder, &t->recipe, SFA_SAVE_ADAPTER, t->learner));
  return SFA_OK;
}

/* ---- The loop --------------------------------------------------------------------------------------------------- */

static bool is_due(int64_t step, int64_t every) { return every > 0 && step % every == 0; }

static bool tell(sfa_train *t, const sfa_train_progress *p) { return t->progress && t->progress(t->progress_user, p) != 0; }

static sfa_status validate(sfa_train *t, sfa_train_progress *p, bool *stop) {
  cJSON *support = NULL;
  p->k = most_kept(t, t->state.step);
  SFA_TRY(run_validation(t, &p->validation_loss, &support));
  SFA_TRY(log_validation(t, p, support));
  *stop |= tell(t, p);
  p->validation_loss = NAN;
  return SFA_OK;
}

/* A step and what is due after it. */
static sfa_status advance(sfa_train *t, sfa_train_progress *p, bool *stop) {
  const sfa_recipe *r = &t->recipe;
  const int64_t start = sfa_now_ns();
  p->learning_rate = sfa_recipe_rate(r, t->state.step);
  p->k = most_kept(t, t->state.step);
  SFA_TRY(run_step(t, &p->loss, &p->gradient_norm));
  const double seconds = 1e-9 * (double)(sfa_now_ns() - start);
  const bool is_last = t->state.step == r->steps;
  t->step_seconds = t->step_seconds > 0 ? 0.95 * t->step_seconds + 0.05 * seconds : seconds;
  p->step = t->state.step;
  p->n_tokens = t->state.n_tokens;
  p->tokens_per_s = (double)(r->accumulate * r->sequences * r->sequence_len) / t->step_seconds;
  p->seconds_left = (double)(r->steps - p->step) * t->step_seconds;
  if (is_due(p->step, r->log_every) || is_last)
    SFA_TRY(log_step(t, p));
  *stop = tell(t, p);
  if (t->validation.shards && (is_due(p->step, r->validate_every) || is_last))
    SFA_TRY(validate(t, p, stop));
  return is_due(p->step, r->checkpoint_every) ? save_checkpoint(t) : SFA_OK;
}

/* A failure of the data loses no step: what was trained is saved first, and the failure's text put back. */
static sfa_status save_before(sfa_train *t, sfa_status status) {
  char text[sizeof t->ctx->error];
  snprintf(text, sizeof text, "%s", t->ctx->error);
  if (status == SFA_ERROR_FORMAT)
    save_checkpoint(t);
  return sfa_fail(t->ctx, status, "%s", text);
}

sfa_status sfa_train_run(sfa_train *t) {
  sfa_train_progress p = {.n_steps = t->recipe.steps, .validation_loss = NAN};
  bool stop = false;
  while (t->state.step < t->recipe.steps && !stop) {
    sfa_status status = advance(t, &p, &stop);
    if (status != SFA_OK)
      return save_before(t, status);
  }
  SFA_TRY(save_checkpoint(t));
  SFA_TRY(save_model(t));
  if (t->state.step < t->recipe.steps)
    return sfa_fail(t->ctx, SFA_ERROR_CANCELLED, "stopped at step %" PRId64 " of %" PRId64 "; resume goes on from there", t->state.step,
                    t->recipe.steps);
  return SFA_OK;
}
