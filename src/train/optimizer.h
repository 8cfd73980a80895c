/* train/optimizer.h: AdamW over the parameters of a learner, with the norm of all gradients clipped. */
#ifndef SFA_OPTIMIZER_H
#define SFA_OPTIMIZER_H

#include "model/learn.h"
#include "train/recipe.h"

typedef struct sfa_optimizer {
  sfa_context *ctx;
  sfa_learner *learner;
  int32_t n;
  float **m, **v;  /* [n]: running means of gradients and of their squares, as long as the parameter; NULL: it does not learn */
  double *squares; /* [n], in the memory of the device: sums of squares of the gradients, those that learn one after the other */
  sfa_clip *clip;  /* there too */
  sfa_clip *told;  /* what the last step had, after a wait */
} sfa_optimizer;

/* For the parameters that are trainable now. */
sfa_status sfa_optimizer_create(sfa_context *ctx, sfa_learner *learner, sfa_optimizer *optimizer);
void sfa_optimizer_free(sfa_optimizer *optimizer);
/* Step `step` (0 ..): gradients, scaled down to clip_norm where their norm is larger (0: never), move the parameters. Where the norm is
 * not finite, since one of the gradients is not, nothing moves. Does not wait. */
sfa_status sfa_optimizer_step(const sfa_optimizer *optimizer, const sfa_recipe *recipe, int64_t step);
/* Root of the sum of squares of all gradients of the last step; there after sfa_stream_wait. */
double sfa_optimizer_norm(const sfa_optimizer *optimizer);
size_t sfa_optimizer_bytes(const sfa_optimizer *optimizer);

#endif
