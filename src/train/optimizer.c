/* AdamW as torch.optim.AdamW and clip_grad_norm_ compute it; the loops over elements are the device's (device/training.h). */
#include "train/optimizer.h"

#include <sfa/stream.h>

#include <math.h>

#include "device/training.h"

static sfa_status alloc_moments(sfa_context *ctx, int64_t n, float **moments) {
  SFA_TRY(sfa_memory_alloc(ctx, (size_t)n * sizeof **moments, (void **)moments));
  return sfa_memory_zero(ctx, *moments, (size_t)n * sizeof **moments);
}

sfa_status sfa_optimizer_create(sfa_context *ctx, sfa_learner *learner, sfa_optimizer *o) {
  const int32_t n = sfa_learner_count(learner);
  *o = (sfa_optimizer){.ctx = ctx, .learner = learner, .n = n};
  sfa_status status = sfa_alloc_zero(ctx, (size_t)n, sizeof *o->m, "a list of moments", (void **)&o->m);
  if (status == SFA_OK)
    status = sfa_alloc_zero(ctx, (size_t)n, sizeof *o->v, "a list of moments", (void **)&o->v);
  for (int32_t i = 0; i < n && status == SFA_OK; i++) {
    const sfa_parameter *p = sfa_learner_parameter(learner, i);
    if (!p->trainable)
      continue;
    status = alloc_moments(ctx, p->n, &o->m[i]);
    if (status == SFA_OK)
      status = alloc_moments(ctx, p->n, &o->v[i]);
  }
  if (status != SFA_OK)
    sfa_optimizer_free(o);
  return status;
}

void sfa_optimizer_free(sfa_optimizer *o) {
  if (!o->ctx)
    return;
  for (int32_t i = 0; i < o->n; i++) {
    if (o->m)
      sfa_memory_free(o->ctx, o->m[i]);
    if (o->v)
      sfa_memory_free(o->ctx, o->v[i]);
  }
  sfa_free(o->ctx, o->m);
  sfa_free(o->ctx, o->v);
  *o = (sfa_optimizer){0};
}

double sfa_optimizer_norm(const sfa_optimizer *o) {
  const sfa_training *device = sfa_learner_training(o->learner);
  double sum = 0;
  for (int32_t i = 0; i < o->n; i++) {
    const sfa_parameter *p = sfa_learner_parameter(o->learner, i);
    if (o->m[i])
      sum += device->square_sum(o->ctx, p->n, p->gradient);
  }
  return sqrt(sum);
}

void sfa_optimizer_step(const sfa_optimizer *o, const sfa_recipe *recipe, int64_t step, double norm) {
  const sfa_training *device = sfa_learner_training(o->learner);
  const double clip = recipe->clip_norm > 0 ? fmin(1, recipe->clip_norm / (norm + 1e-6)) : 1; /* 1e-6 as PyTorch has it */
  sfa_adamw how = {.rate = (float)sfa_recipe_rate(recipe, step),
                   .beta1 = (float)recipe->beta1,
                   .beta2 = (float)recipe->beta2,
                   .eps = (float)recipe->epsilon,
                   .gradient_scale = (float)clip,
                   .correction1 = (float)(1 - pow(recipe->beta1, (double)(step + 1))),
                   .correction2 = (float)(1 - pow(recipe->beta2, (double)(step + 1)))};
  for (int32_t i = 0; i < o->n; i++) {
    const sfa_parameter *p = sfa_learner_parameter(o->learner, i);
    if (!o->m[i])
      continue;
    how.decay = p->decays ? (float)recipe->weight_decay : 0;
    device->adamw(o->ctx, &how, p->n, p->gradient, o->m[i], o->v[i], p->value);
  }
}

size_t sfa_optimizer_bytes(const sfa_optimizer *o) {
  size_t bytes = 0;
  for (int32_t i = 0; i < o->n; i++)
    bytes += o->m[i] ? 2 * sizeof(float) * (size_t)sfa_learner_parameter(o->learner, i)->n : 0;
  return bytes;
}
