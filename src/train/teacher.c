/* A frozen dense model beside the one in training. */
#include "train/teacher.h"

#include <sfa/stream.h>

static sfa_status alloc_rows(const sfa_teacher *t, int64_t n_tokens, int64_t dim, float **rows) {
  return sfa_memory_alloc(t->ctx, (size_t)n_tokens * (size_t)dim * sizeof **rows, (void **)rows);
}

static sfa_status open_rows(sfa_teacher *t, int64_t n_tokens, bool heads, bool predictions) {
  if (predictions)
    SFA_TRY(alloc_rows(t, n_tokens, t->shape.hidden_dim, &t->hidden));
  if (!heads)
    return SFA_OK;
  SFA_TRY(sfa_alloc_zero(t->ctx, (size_t)t->shape.n_layers, sizeof *t->heads, "the teacher's head outputs", (void **)&t->heads));
  for (int32_t layer = 0; layer < t->shape.n_layers; layer++)
    SFA_TRY(alloc_rows(t, n_tokens, (int64_t)t->shape.n_heads * t->shape.head_dim_v, &t->heads[layer]));
  return SFA_OK;
}

sfa_status sfa_teacher_open(sfa_context *ctx, const char *folder, const sfa_learn_options *options, bool heads, bool predictions,
                            sfa_teacher *teacher) {
  *teacher = (sfa_teacher){.ctx = ctx};
  sfa_weights *weights;
  SFA_TRY(sfa_weights_open(ctx, folder, &weights));
  sfa_status status = sfa_learner_create(ctx, weights, options, &teacher->learner);
  if (status == SFA_OK) {
    teacher->shape = sfa_learner_shape_of(teacher->learner);
    status = sfa_learner_sparsity(teacher->learner, &(sfa_learn_sparsity){0});
  }
  if (status == SFA_OK)
    status = open_rows(teacher, options->max_tokens, heads, predictions);
  if (status != SFA_OK)
    sfa_teacher_close(teacher);
  return status;
}

void sfa_teacher_close(sfa_teacher *t) {
  if (!t->ctx)
    return;
  for (int32_t layer = 0; t->heads && layer < t->shape.n_layers; layer++)
    sfa_memory_free(t->ctx, t->heads[layer]);
  sfa_free(t->ctx, t->heads);
  sfa_memory_free(t->ctx, t->hidden);
  sfa_learner_destroy(t->learner);
  *t = (sfa_teacher){0};
}

static sfa_status predict(void *user, int32_t first, int32_t n, float *logits) {
  const sfa_teacher *t = user;
  return sfa_learner_logits(t->learner, n, t->hidden + (int64_t)first * t->shape.hidden_dim, logits);
}

sfa_status sfa_teacher_answer(sfa_teacher *t, sfa_learn_batch *batch) {
  const sfa_learn_batch question = {.n_tokens = batch->n_tokens,
                                    .n_sequences = batch->n_sequences,
                                    .tokens = batch->tokens,
                                    .cu_seqlens = batch->cu_seqlens,
                                    .hidden = t->hidden,
                                    .head_outputs = t->heads};
  SFA_TRY(sfa_learner_start(t->learner, &question));
  batch->head_targets = (const float *const *)t->heads;
  if (t->hidden) {
    batch->teacher = predict;
    batch->teacher_user = t;
  }
  return SFA_OK;
}
