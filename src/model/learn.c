/* A learner's life, and its run: embedding, layers, losses, and back. */
#include "model/learn_parts.h"

#include <math.h>
#include <string.h>

sfa_status sfa_learn_alloc(sfa_learner *l, size_t count, size_t element_bytes, const char *what, void *out) {
  SFA_TRY(sfa_alloc_zero(l->ctx, count, element_bytes, what, (void **)out));
  l->bytes += count * element_bytes;
  return SFA_OK;
}

sfa_status sfa_learn_alloc_device(sfa_learner *l, size_t count, size_t element_bytes, void *out) {
  void **memory = out;
  size_t bytes;
  if (!sfa_mul_size(count, element_bytes, &bytes) || bytes > PTRDIFF_MAX)
    return sfa_fail(l->ctx, SFA_ERROR_MEMORY, "out of memory: %zu times %zu bytes", count, element_bytes);
  SFA_TRY(sfa_memory_alloc(l->ctx, bytes, memory));
  l->bytes += bytes;
  return sfa_memory_zero(l->ctx, *memory, bytes);
}

/* ---- Life ------------------------------------------------------------------------------------------------------------------------- */

static sfa_status alloc_rows(sfa_learner *l, int64_t dim, float **out) {
  return sfa_learn_alloc_device(l, (size_t)l->options.max_tokens, (size_t)dim * sizeof(float), out);
}

static sfa_status create_saved(sfa_learner *l, int32_t index, sfa_learn_saved *s) {
  const sfa_model_config *c = &l->config;
  const sfa_learn_layer *layer = &l->layers[index];
  if (layer->q_norm.weight) {
    SFA_TRY(alloc_rows(l, sfa_learn_q_dim(c), &s->raw_q));
    SFA_TRY(alloc_rows(l, sfa_learn_k_dim(c), &s->raw_k));
  }
  SFA_TRY(alloc_rows(l, sfa_learn_q_dim(c), &s->q));
  SFA_TRY(alloc_rows(l, sfa_learn_k_dim(c), &s->k));
  SFA_TRY(alloc_rows(l, sfa_learn_v_dim(c), &s->v));
  SFA_TRY(alloc_rows(l, sfa_learn_attended_dim(c), &s->attended));
  SFA_TRY(alloc_rows(l, c->n_heads, &s->lse));
  if (layer->post_attention_norm.weight)
    SFA_TRY(alloc_rows(l, c->hidden_dim, &s->projected));
  SFA_TRY(alloc_rows(l, c->hidden_dim, &s->middle));
  SFA_TRY(alloc_rows(l, c->ffn_dim, &s->gate));
  if (layer->gate.weight)
    SFA_TRY(alloc_rows(l, c->ffn_dim, &s->up));
  if (layer->post_ffn_norm.weight)
    SFA_TRY(alloc_rows(l, c->hidden_dim, &s->down));
  return SFA_OK;
}

static void free_saved(sfa_learner *l, sfa_learn_saved *s) {
  float *all[] = {s->raw_q,    s->raw_k, s->kept_q,    s->kept_k, s->q,    s->k,  s->v,
                  s->attended, s->lse,   s->projected, s->middle, s->gate, s->up, s->down};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    sfa_memory_free(l->ctx, all[i]);
}

static int32_t n_saved(const sfa_learner *l) { return l->options.checkpointing ? 1 : l->config.n_layers; }

static sfa_status create_rotations(sfa_learner *l) {
  const sfa_model_config *c = &l->config;
  for (int kind = 0; c->rope_pairs && kind < SFA_LAYER_KINDS; kind++) {
    SFA_TRY(alloc_rows(l, c->rope_pairs, &l->rope_cos[kind]));
    SFA_TRY(alloc_rows(l, c->rope_pairs, &l->rope_sin[kind]));
    SFA_TRY(alloc_rows(l, c->rope_pairs, &l->rope_back[kind]));
    SFA_TRY(sfa_learn_alloc_device(l, (size_t)c->rope_pairs, sizeof(double), &l->frequencies[kind]));
    SFA_TRY(sfa_memory_copy(l->ctx, l->frequencies[kind], c->rope_frequencies[kind], (size_t)c->rope_pairs * sizeof(double)));
  }
  return SFA_OK;
}

static sfa_status create_buffers(sfa_learner *l) {
  const sfa_model_config *c = &l->config;
  const int64_t dims[] = {l->options.max_tokens, c->vocab_size, c->hidden_dim, c->ffn_dim, sfa_learn_q_dim(c), sfa_learn_attended_dim(c)};
  int64_t widest = 0;
  for (size_t i = 0; i < sizeof dims / sizeof *dims; i++)
    widest = sfa_max64(widest, dims[i]);
  const size_t n_tokens = (size_t)l->options.max_tokens, loss_tokens = (size_t)l->options.loss_tokens;
  SFA_TRY(sfa_learn_alloc_device(l, (size_t)(c->n_layers + 1) * n_tokens, (size_t)c->hidden_dim * sizeof(float), &l->streams));
  SFA_TRY(sfa_learn_alloc(l, (size_t)n_saved(l), sizeof *l->saved, "activations", &l->saved));
  for (int32_t i = 0; i < n_saved(l); i++)
    SFA_TRY(create_saved(l, i, &l->saved[i]));
  SFA_TRY(create_rotations(l));
  SFA_TRY(sfa_learn_alloc(l, n_tokens, sizeof(int32_t), "positions", &l->host_positions));
  SFA_TRY(sfa_learn_alloc_device(l, n_tokens, sizeof(int32_t), &l->positions_of));
  SFA_TRY(sfa_learn_alloc_device(l, n_tokens, sizeof(int32_t), &l->tokens));
  SFA_TRY(sfa_learn_alloc_device(l, n_tokens, sizeof(int32_t), &l->targets));
  SFA_TRY(sfa_learn_alloc_device(l, n_tokens + 1, sizeof(int32_t), &l->cu_seqlens));
  SFA_TRY(alloc_rows(l, c->hidden_dim, &l->normed));
  SFA_TRY(alloc_rows(l, c->hidden_dim, &l->d_normed));
  SFA_TRY(alloc_rows(l, c->hidden_dim, &l->d_stream));
  SFA_TRY(alloc_rows(l, sfa_learn_q_dim(c), &l->d_q));
  SFA_TRY(alloc_rows(l, sfa_learn_k_dim(c), &l->d_k));
  SFA_TRY(alloc_rows(l, sfa_learn_v_dim(c), &l->d_v));
  SFA_TRY(alloc_rows(l, sfa_learn_attended_dim(c), &l->d_attended));
  SFA_TRY(alloc_rows(l, sfa_learn_attended_dim(c), &l->heads));
  SFA_TRY(alloc_rows(l, sfa_learn_attended_dim(c), &l->d_heads));
  SFA_TRY(alloc_rows(l, c->n_heads, &l->lse_heads));
  SFA_TRY(alloc_rows(l, c->ffn_dim, &l->activated));
  SFA_TRY(sfa_learn_alloc_device(l, (size_t)c->hidden_dim + (size_t)c->head_dim, sizeof(float), &l->norm_weight));
  SFA_TRY(sfa_learn_alloc_device(l, loss_tokens, (size_t)c->vocab_size * sizeof(float), &l->logits));
  SFA_TRY(sfa_learn_alloc_device(l, n_tokens, 2 * sizeof(float), &l->losses));
  SFA_TRY(sfa_learn_alloc_device(l, (size_t)c->n_layers, 2 * sizeof(double), &l->heads_off));
  return sfa_learn_alloc_device(l, 1, l->training->scratch_bytes(widest), &l->scratch);
}

/* The file's own wish. */
static sfa_status create_sparsity(sfa_learner *l) {
  const sfa_model_config *c = &l->config;
  size_t n = (size_t)c->n_layers * (size_t)c->n_kv_heads;
  SFA_TRY(sfa_learn_alloc(l, n, sizeof(int32_t), "kept features", &l->k_keys));
  SFA_TRY(sfa_learn_alloc(l, n, sizeof(int32_t), "kept features", &l->k_queries));
  for (int32_t i = 0; i < (int32_t)n; i++) {
    const sfa_head_features f = sfa_model_features(c, i);
    l->k_keys[i] = f.k < c->head_dim ? f.k : 0;
    l->k_queries[i] = f.k_q < c->head_dim ? f.k_q : 0;
  }
  l->sparsity.pre_rope = c->pre_rope;
  l->sparsity.two_of_four = c->two_of_four;
  return SFA_OK;
}

static sfa_status fill_learner(sfa_learner *l, const sfa_learn_options *options) {
  enum { LOGIT_FLOATS = 8 << 20, LEAST_LOSS_TOKENS = 64 };
  l->options = *options;
  SFA_REQUIRE(l->ctx, options->max_tokens >= 1, "a batch of %d tokens is out of range", options->max_tokens);
  SFA_TRY(sfa_model_config_read(l->ctx, l->weights, &l->config));
  SFA_TRY(sfa_learn_load(l));
  if (l->options.loss_tokens <= 0)
    l->options.loss_tokens = (int32_t)sfa_max64(LEAST_LOSS_TOKENS, LOGIT_FLOATS / l->config.vocab_size);
  l->options.loss_tokens = (int32_t)sfa_min64(l->options.loss_tokens, options->max_tokens);
  SFA_TRY(create_sparsity(l));
  return create_buffers(l);
}

sfa_status sfa_learner_create(sfa_context *ctx, sfa_weights *weights, const sfa_learn_options *options, sfa_learner **learner) {
  sfa_learner *l = NULL;
  *learner = NULL;
  sfa_status status = sfa_alloc_zero(ctx, 1, sizeof *l, "a model that learns", (void **)&l);
  if (status != SFA_OK) {
    sfa_weights_close(weights);
    return status;
  }
  l->ctx = ctx;
  l->weights = weights;
  status = sfa_device_of(ctx, &l->device, &l->training);
  if (status == SFA_OK)
    status = fill_learner(l, options);
  if (status != SFA_OK) {
    sfa_learner_destroy(l);
    return status;
  }
  *learner = l;
  return SFA_OK;
}

void sfa_learner_destroy(sfa_learner *l) {
  if (!l)
    return;
  for (int32_t i = 0; i < l->n_parameters; i++) {
    sfa_memory_free(l->ctx, l->parameters[i].value);
    sfa_memory_free(l->ctx, l->parameters[i].gradient);
  }
  for (int32_t i = 0; l->saved && i < n_saved(l); i++)
    free_saved(l, &l->saved[i]);
  for (int32_t i = 0; i < l->most_answers; i++)
    sfa_learner_host_free(l, l->answers[i].heads);
  sfa_learn_plans_free(l);
  for (int kind = 0; kind < SFA_LAYER_KINDS; kind++) {
    sfa_memory_free(l->ctx, l->rope_cos[kind]);
    sfa_memory_free(l->ctx, l->rope_sin[kind]);
    sfa_memory_free(l->ctx, l->rope_back[kind]);
    sfa_memory_free(l->ctx, l->frequencies[kind]);
  }
  void *device[] = {l->streams, l->positions_of, l->tokens,      l->targets, l->cu_seqlens, l->normed,   l->d_normed,   l->d_q,
                    l->d_k,     l->d_v,          l->heads,       l->d_heads, l->lse_heads,  l->d_stream, l->d_attended, l->logits,
                    l->teacher, l->uses,         l->norm_weight, l->losses,  l->heads_off,  l->scratch,  l->workspace,  l->activated};
  for (size_t i = 0; i < sizeof device / sizeof *device; i++)
    sfa_memory_free(l->ctx, device[i]);
  void *host[] = {l->parameters, l->names, l->layers, l->k_keys, l->k_queries, l->saved, l->host_positions, l->host_uses, l->answers};
  for (size_t i = 0; i < sizeof host / sizeof *host; i++)
    sfa_free(l->ctx, host[i]);
  sfa_model_config_free(l->ctx, &l->config);
  sfa_weights_close(l->weights);
  sfa_free(l->ctx, l);
}

const sfa_weights *sfa_learner_weights(const sfa_learner *l) { return l->weights; }
const sfa_training *sfa_learner_training(const sfa_learner *l) { return l->training; }
size_t sfa_learner_bytes(const sfa_learner *l) { return l->bytes; }
int32_t sfa_learner_count(const sfa_learner *l) { return l->n_parameters; }
sfa_parameter *sfa_learner_parameter(sfa_learner *l, int32_t index) {
  return index >= 0 && index < l->n_parameters ? &l->parameters[index] : NULL;
}

sfa_status sfa_learner_host_alloc(sfa_learner *l, size_t bytes, const char *what, void **memory) {
  if (!l->device->host_alloc)
    return sfa_alloc(l->ctx, bytes, what, memory);
  *memory = l->device->host_alloc(l->ctx, bytes);
  return *memory ? SFA_OK : sfa_fail(l->ctx, SFA_ERROR_MEMORY, "out of page-locked memory: %zu bytes for %s", bytes, what);
}

void sfa_learner_host_free(sfa_learner *l, void *memory) {
  if (l->device->host_free)
    l->device->host_free(l->ctx, memory);
  else
    sfa_free(l->ctx, memory);
}

sfa_learner_shape sfa_learner_shape_of(const sfa_learner *l) {
  const sfa_model_config *c = &l->config;
  return (sfa_learner_shape){.family = c->family,
                             .n_layers = c->n_layers,
                             .n_heads = c->n_heads,
                             .n_kv_heads = c->n_kv_heads,
                             .head_dim = c->head_dim,
                             .head_dim_v = c->head_dim_v,
                             .hidden_dim = c->hidden_dim,
                             .ffn_dim = c->ffn_dim,
                             .vocab_size = c->vocab_size,
                             .context_len = c->context_len};
}

sfa_status sfa_learner_clear(sfa_learner *l) {
  for (int32_t i = 0; i < l->n_parameters; i++)
    SFA_TRY(sfa_memory_zero(l->ctx, l->parameters[i].gradient, (size_t)l->parameters[i].n * sizeof(float)));
  return SFA_OK;
}

/* ---- A batch ---------------------------------------------------------------------------------------------------------------------- */

static sfa_status check_batch(const sfa_learner *l, const sfa_learn_batch *batch) {
  sfa_context *ctx = l->ctx;
  int32_t n = batch->n_tokens, vocab = l->config.vocab_size, n_sequences = batch->n_sequences;
  SFA_REQUIRE(ctx, n >= 1 && n <= l->options.max_tokens, "a batch of %d tokens; this learner takes 1 to %d", n, l->options.max_tokens);
  SFA_REQUIRE(ctx, batch->tokens, "a batch without tokens");
  SFA_REQUIRE(ctx, batch->cu_seqlens || n_sequences <= 1, "%d sequences want cu_seqlens", n_sequences);
  for (int32_t t = 0; t < n; t++) {
    if (batch->tokens[t] < 0 || batch->tokens[t] >= vocab)
      return sfa_fail(ctx, SFA_ERROR_RANGE, "token id %d is outside the model's vocabulary of %d", batch->tokens[t], vocab);
    if (batch->targets && (batch->targets[t] < -1 || batch->targets[t] >= vocab))
      return sfa_fail(ctx, SFA_ERROR_RANGE, "target %d is outside the model's vocabulary of %d", batch->targets[t], vocab);
  }
  for (int32_t b = 0; batch->cu_seqlens && b < n_sequences; b++) {
    int32_t len = batch->cu_seqlens[b + 1] - batch->cu_seqlens[b];
    SFA_REQUIRE(ctx, batch->cu_seqlens[b] >= 0 && len >= 0 && batch->cu_seqlens[b + 1] <= n, "sequence %d has %d tokens of a batch of %d",
                b, len, n);
  }
  SFA_REQUIRE(ctx, !batch->cu_seqlens || (n_sequences >= 1 && batch->cu_seqlens[0] == 0 && batch->cu_seqlens[n_sequences] == n),
              "cu_seqlens of a batch of %d tokens goes from %d to %d", n, batch->cu_seqlens ? batch->cu_seqlens[0] : 0,
              batch->cu_seqlens ? batch->cu_seqlens[n_sequences] : 0);
  return SFA_OK;
}

/* To the device in pieces that a GPU's driver copies at once: for more than 64 KB it may wait until the stream comes to them. */
static sfa_status place(sfa_learner *l, int32_t *to, const int32_t *from, int64_t n) {
  enum { PIECE = 65536 / sizeof(int32_t) };
  for (int64_t i = 0; i < n; i += PIECE)
    SFA_TRY(sfa_memory_copy(l->ctx, to + i, from + i, (size_t)sfa_min64(PIECE, n - i) * sizeof *to));
  return SFA_OK;
}

static sfa_status place_tokens(sfa_learner *l, const sfa_learn_batch *batch) {
  const sfa_model_config *c = &l->config;
  int32_t most = 0;
  for (int32_t b = 0; b < batch->n_sequences; b++)
    for (int32_t t = batch->cu_seqlens[b]; t < batch->cu_seqlens[b + 1]; t++) {
      l->host_positions[t] = t - batch->cu_seqlens[b];
      most = l->host_positions[t] > most ? l->host_positions[t] : most;
    }
  if (l->positions && most >= c->context_len)
    return sfa_fail(l->ctx, SFA_ERROR_RANGE, "a sequence of %d tokens: this model has learned positions for %lld", most + 1,
                    (long long)c->context_len);
  SFA_TRY(place(l, l->positions_of, l->host_positions, batch->n_tokens));
  SFA_TRY(place(l, l->tokens, batch->tokens, batch->n_tokens));
  if (batch->targets)
    SFA_TRY(place(l, l->targets, batch->targets, batch->n_tokens));
  SFA_TRY(place(l, l->cu_seqlens, batch->cu_seqlens, batch->n_sequences + 1));
  for (int kind = 0; c->rope_pairs && kind < SFA_LAYER_KINDS; kind++) {
    l->device->rotations(l->ctx, batch->n_tokens, l->positions_of, c->rope_pairs, l->frequencies[kind], l->rope_cos[kind],
                         l->rope_sin[kind]);
    l->training->scale(l->ctx, (int64_t)batch->n_tokens * c->rope_pairs, -1.0f, l->rope_sin[kind], false, l->rope_back[kind]);
  }
  return SFA_OK;
}

static void embed(sfa_learner *l, const sfa_learn_batch *batch) {
  const sfa_model_config *c = &l->config;
  float *x = sfa_learn_stream(l, 0);
  l->training->gather(l->ctx, batch->n_tokens, c->hidden_dim, l->embedding->value, l->tokens, c->embedding_scale, false, x);
  if (l->positions)
    l->training->gather(l->ctx, batch->n_tokens, c->hidden_dim, l->positions->value, l->positions_of, 1.0f, true, x);
}

static void embed_backward(sfa_learner *l, const sfa_learn_batch *batch) {
  const sfa_model_config *c = &l->config;
  if (l->embedding->trainable)
    l->training->scatter_add(l->ctx, batch->n_tokens, c->hidden_dim, l->d_stream, l->tokens, c->embedding_scale, l->embedding->gradient);
  if (l->positions && l->positions->trainable)
    l->training->scatter_add(l->ctx, batch->n_tokens, c->hidden_dim, l->d_stream, l->positions_of, 1.0f, l->positions->gradient);
}

/* The lowest layer that learns, -1 the embedding; n_layers: none. */
static int32_t lowest_layer(const sfa_learner *l) {
  int32_t lowest = l->config.n_layers;
  for (int32_t i = 0; i < l->n_parameters; i++) {
    const sfa_parameter *p = &l->parameters[i];
    bool at_the_end = p->role == SFA_ROLE_FINAL_NORM || p->role == SFA_ROLE_HEAD;
    if (p->trainable && !at_the_end && p->layer < lowest)
      lowest = p->layer;
  }
  return lowest;
}

/* What the caller wants to see of a layer, and what its head loss is made of. */
static sfa_status show_heads(sfa_learner *l, const sfa_learn_batch *batch, int32_t index, const float *attended) {
  int64_t n = batch->n_tokens * sfa_learn_attended_dim(&l->config);
  const float *target = batch->head_targets ? batch->head_targets[index] : NULL;
  double *off = l->heads_off + 2 * index;
  if (batch->head_outputs && batch->head_outputs[index])
    SFA_TRY(sfa_memory_copy(l->ctx, batch->head_outputs[index], attended, (size_t)n * sizeof *attended));
  if (!target)
    return batch->head_targets ? sfa_memory_zero(l->ctx, off, 2 * sizeof *off) : SFA_OK;
  l->training->square_sum(l->ctx, n, target, off + 1);
  l->training->scale(l->ctx, n, 1.0f, attended, false, l->heads);
  l->training->scale(l->ctx, n, -1.0f, target, true, l->heads);
  l->training->square_sum(l->ctx, n, l->heads, off);
  return SFA_OK;
}

static sfa_status run_back(sfa_learner *l, const sfa_learn_batch *batch, int64_t n_scored) {
  int32_t lowest = lowest_layer(l);
  sfa_learn_batch again = *batch;
  again.key_uses = again.query_uses = NULL;
  float head_scale =
      !batch->head_targets ? 0.0f : sfa_learn_scale(batch) * batch->head_weight * (float)n_scored / (float)l->config.n_layers;
  for (int32_t i = l->config.n_layers - 1; i >= 0 && i >= lowest; i--) {
    sfa_learn_saved *saved = &l->saved[l->options.checkpointing ? 0 : i];
    if (l->options.checkpointing && i < l->config.n_layers - 1) /* the last layer's is still there */
      SFA_TRY(sfa_learn_layer_forward(l, &again, i, saved));
    SFA_TRY(sfa_learn_layer_backward(l, batch, i, saved, head_scale));
  }
  if (lowest < 0)
    embed_backward(l, batch);
  return SFA_OK;
}

/* ---- What comes back ---------------------------------------------------------------------------------------------------------------- */

/* A place for the answer to another batch. */
static sfa_status next_answer(sfa_learner *l, const sfa_learn_batch *batch, sfa_learn_answer **answer) {
  if (l->n_answers == l->most_answers) {
    sfa_learn_answer *more;
    const int32_t most = 2 * l->most_answers + 1;
    SFA_TRY(sfa_alloc_zero(l->ctx, (size_t)most, sizeof *more, "answers to batches", (void **)&more));
    if (l->answers)
      memcpy(more, l->answers, (size_t)l->most_answers * sizeof *more);
    sfa_free(l->ctx, l->answers);
    l->answers = more;
    l->most_answers = most;
  }
  sfa_learn_answer *a = &l->answers[l->n_answers];
  const size_t n_layers = (size_t)l->config.n_layers, n_tokens = (size_t)l->options.max_tokens;
  const size_t head_bytes = 2 * n_layers * sizeof *a->heads, bytes = head_bytes + 2 * n_tokens * sizeof *a->losses;
  if (!a->heads) {
    SFA_TRY(sfa_learner_host_alloc(l, bytes, "the losses of a batch", (void **)&a->heads));
    l->bytes += bytes;
  }
  *a = (sfa_learn_answer){.heads = a->heads,
                          .losses = (float *)(void *)(a->heads + 2 * n_layers),
                          .n_tokens = batch->n_tokens,
                          .token_losses = batch->token_losses};
  memset(a->heads, 0, head_bytes);
  for (int32_t t = 0; batch->targets && t < batch->n_tokens; t++)
    a->n_scored += batch->targets[t] >= 0;
  l->n_answers++;
  *answer = a;
  return SFA_OK;
}

/* Asks for it, behind the batch's work. */
static sfa_status ask(sfa_learner *l, const sfa_learn_batch *batch, sfa_learn_answer *a) {
  const size_t bytes = (size_t)a->n_tokens * sizeof *a->losses;
  const int64_t apart = l->options.max_tokens;
  if (batch->head_targets)
    SFA_TRY(sfa_memory_copy(l->ctx, a->heads, l->heads_off, 2 * (size_t)l->config.n_layers * sizeof *a->heads));
  if (batch->targets)
    SFA_TRY(sfa_memory_copy(l->ctx, a->losses, l->losses, bytes));
  if (batch->targets && batch->teacher)
    SFA_TRY(sfa_memory_copy(l->ctx, a->losses + apart, l->losses + apart, bytes));
  a->has_losses = batch->targets != NULL;
  a->has_divergences = a->has_losses && batch->teacher;
  a->is_whole = true;
  return SFA_OK;
}

static void read_answer(const sfa_learner *l, const sfa_learn_answer *a, sfa_learn_result *result) {
  double loss_sum = 0, head_loss = 0, teacher_sum = 0;
  for (int32_t t = 0; a->has_losses && t < a->n_tokens; t++)
    loss_sum += (double)a->losses[t];
  for (int32_t t = 0; a->has_divergences && t < a->n_tokens; t++)
    teacher_sum += (double)a->losses[l->options.max_tokens + t];
  for (int32_t i = 0; i < l->config.n_layers; i++)
    head_loss += a->heads[2 * i + 1] > 0 ? a->heads[2 * i] / a->heads[2 * i + 1] / l->config.n_layers : 0;
  if (a->has_losses && a->token_losses)
    memcpy(a->token_losses, a->losses, (size_t)a->n_tokens * sizeof *a->losses);
  result->loss_sum += loss_sum;
  result->n_scored += a->n_scored;
  result->head_loss += head_loss;
  result->teacher_sum += teacher_sum;
}

/* ---- Run -------------------------------------------------------------------------------------------------------------------------- */

static sfa_status run_batch(sfa_learner *l, const sfa_learn_batch *batch, sfa_learn_answer *answer) {
  SFA_TRY(place_tokens(l, batch));
  embed(l, batch);
  for (int32_t i = 0; i < l->config.n_layers; i++) {
    sfa_learn_saved *saved = &l->saved[l->options.checkpointing ? 0 : i];
    SFA_TRY(sfa_learn_layer_forward(l, batch, i, saved));
    SFA_TRY(show_heads(l, batch, i, saved->attended));
  }
  SFA_TRY(sfa_learn_loss_run(l, batch));
  if (batch->backward)
    SFA_TRY(run_back(l, batch, answer->n_scored));
  SFA_TRY(ask(l, batch, answer));
  return l->device->finish ? l->device->finish(l->ctx) : SFA_OK;
}

sfa_status sfa_learner_start(sfa_learner *l, const sfa_learn_batch *given) {
  sfa_learn_batch batch = *given;
  sfa_learn_answer *answer;
  SFA_TRY(check_batch(l, &batch));
  const int32_t whole[2] = {0, batch.n_tokens};
  if (!batch.cu_seqlens) {
    batch.cu_seqlens = whole;
    batch.n_sequences = 1;
  }
  batch.backward = batch.backward && batch.targets;
  SFA_TRY(next_answer(l, &batch, &answer));
  return run_batch(l, &batch, answer);
}

sfa_status sfa_learner_finish(sfa_learner *l, sfa_learn_result *result) {
  sfa_learn_result sum = {0};
  const int32_t n = l->n_answers;
  l->n_answers = 0;
  SFA_TRY(sfa_stream_wait(l->ctx));
  for (int32_t i = 0; i < n; i++)
    if (l->answers[i].is_whole)
      read_answer(l, &l->answers[i], &sum);
  if (result)
    *result = sum;
  return SFA_OK;
}

sfa_status sfa_learner_run(sfa_learner *l, const sfa_learn_batch *batch, sfa_learn_result *result) {
  *result = (sfa_learn_result){0};
  SFA_TRY(sfa_learner_start(l, batch));
  return sfa_learner_finish(l, result);
}
