/* The end of the model: final norm, logits of a few hundred tokens at a time, losses, and their way back to the stream. */
#include "model/learn_parts.h"

static void head_logits(sfa_learner *l, int64_t n, const float *hidden, float *logits) {
  sfa_learn_linear_forward(l, &l->head, n, hidden, false, logits);
}

sfa_status sfa_learner_logits(sfa_learner *l, int32_t n, const float *hidden, float *logits) {
  head_logits(l, n, hidden, logits);
  if (l->config.final_softcap > 0)
    l->device->softcap(l->ctx, n, l->config.vocab_size, l->config.final_softcap, logits, l->config.vocab_size);
  return SFA_OK;
}

static sfa_status teach(sfa_learner *l, const sfa_learn_batch *batch, int32_t first, int32_t n, sfa_loss *loss) {
  if (!batch->teacher)
    return SFA_OK;
  if (!l->teacher)
    SFA_TRY(sfa_learn_alloc_device(l, (size_t)l->options.loss_tokens, (size_t)l->config.vocab_size * sizeof(float), &l->teacher));
  SFA_TRY(batch->teacher(batch->teacher_user, first, n, l->teacher));
  loss->teacher = l->teacher;
  loss->temperature = batch->temperature > 0 ? batch->temperature : 1.0f;
  loss->teacher_scale = sfa_learn_scale(batch) * batch->teacher_weight;
  return SFA_OK;
}

/* Tokens first .. first + n - 1; hidden and d_hidden are theirs. */
static sfa_status loss_chunk(sfa_learner *l, const sfa_learn_batch *batch, int32_t first, int32_t n, const float *hidden, float *d_hidden) {
  float *losses = l->losses + first;
  sfa_loss loss = {.n_rows = n,
                   .n_classes = l->config.vocab_size,
                   .logits = l->logits,
                   .targets = l->targets + first,
                   .softcap = l->config.final_softcap,
                   .backward = batch->backward,
                   .target_scale = sfa_learn_scale(batch) * (batch->loss_weight > 0   ? batch->loss_weight
                                                             : batch->loss_weight < 0 ? 0.0f
                                                                                      : 1.0f),
                   .losses = losses,
                   .divergences = losses + l->options.max_tokens};
  SFA_TRY(teach(l, batch, first, n, &loss));
  head_logits(l, n, hidden, l->logits);
  l->training->loss(l->ctx, &loss);
  if (batch->backward)
    sfa_learn_linear_backward(l, &l->head, n, hidden, l->logits, false, d_hidden);
  return SFA_OK;
}

sfa_status sfa_learn_loss_run(sfa_learner *l, const sfa_learn_batch *batch) {
  int64_t dim = l->config.hidden_dim;
  const float *x = sfa_learn_stream(l, l->config.n_layers);
  float *hidden = batch->hidden ? batch->hidden : l->normed;
  sfa_learn_norm_forward(l, &l->final_norm, batch->n_tokens, 1, (int32_t)dim, x, hidden);
  for (int32_t first = 0; batch->targets && first < batch->n_tokens; first += l->options.loss_tokens)
    SFA_TRY(loss_chunk(l, batch, first, (int32_t)sfa_min64(l->options.loss_tokens, batch->n_tokens - first), hidden + first * dim,
                       l->d_normed + first * dim));
  if (batch->backward)
    sfa_learn_norm_backward(l, &l->final_norm, batch->n_tokens, 1, (int32_t)dim, x, l->d_normed, l->d_stream, false);
  return SFA_OK;
}
