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
  if (status == SFA_OK)
    status = sfa_memory_alloc(ctx, (size_t)n * sizeof *o->squares, (void **)&o->squares);
  if (status == SFA_OK)
    status = sfa_memory_alloc(ctx, sizeof *o->clip, (void **)&o->clip);
  if (status == SFA_OK)
    status = sfa_learner_host_alloc(learner, sizeof *o->told, "the norm of gradients", (void **)&o->told);
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
  sfa_memory_free(o->ctx, o->squares);
  sfa_memory_free(o->ctx, o->clip);
  sfa_learner_host_free(o->learner, o->told);
  sfa_free(o->ctx, o->m);
  sfa_free(o->ctx, o->v);
  *o = (sfa_optimizer){0};
}

double sfa_optimizer_norm(const sfa_optimizer *o) { return o->told->norm; }

/* The norm of all gradients, and the factor of this step. */
static sfa_status clip_gradients(const sfa_optimizer *o, double most) {
  const sfa_training *device = sfa_learner_training(o->learner);
  int32_t n = 0;
  for (int32_t i = 0; i < o->n; i++) {
    const sfa_parameter *p = sfa_learner_parameter(o->learner, i);
    if (o->m[i])
      device->square_sum(o->ctx, p->n, p->gradient, &o->squares[n++]);
  }
  device->clip(o->ctx, n, o->squares, most, o->clip);
  return sfa_memory_copy(o->ctx, o->told, o->clip, sizeof *o->told);
}

sfa_status sfa_optimizer_step(const sfa_optimizer *o, const sfa_recipe *recipe, int64_t step) {
  const sfa_training *device = sfa_learner_training(o->learner);
  sfa_adamw how = {.rate = (float)sfa_recipe_rate(recipe, step),
                   .beta1 = (float)recipe->beta1,
                   .beta2 = (float)recipe->beta2,
                   .eps = (float)recipe->epsilon,
                   .correction1 = (float)(1 - pow(recipe->beta1, (double)(step + 1))),
                   .correction2 = (float)(1 - pow(recipe->beta2, (double)(step + 1))),
                   .clip = o->clip};
  SFA_TRY(clip_gradients(o, recipe->clip_norm));
  for (int32_t i = 0; i < o->n; i++) {
    const sfa_parameter *p = sfa_learner_parameter(o->learner, i);
    if (!o->m[i])
      continue;
    how.decay = p->decays ? (float)recipe->weight_decay : 0;
    device->adamw(o->ctx, &how, p->n, p->gradient, o->m[i], o->v[i], p->value);
  }
  return SFA_OK;
}

size_t sfa_optimizer_bytes(const sfa_optimizer *o) {
  size_t bytes = 0;
  for (int32_t i = 0; i < o->n; i++)
    bytes += o->m[i] ? 2 * sizeof(float) * (size_t)sfa_learner_parameter(o->learner, i)->n : 0;
  return bytes;
}
