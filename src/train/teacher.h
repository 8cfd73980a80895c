/* train/teacher.h: the dense model that a conversion starts from, frozen: what its heads put out and what it predicts, for the batches that
 * the model in training sees.
 */
#ifndef SFA_TEACHER_H
#define SFA_TEACHER_H

#include "model/learn.h"

typedef struct sfa_teacher {
  sfa_context *ctx;
  sfa_learner *learner;
  sfa_learner_shape shape;
  float **heads; /* [n_layers] of [max_tokens][H * E]; NULL: head outputs are not wanted */
  float *hidden; /* [max_tokens][hidden_dim]; NULL: predictions are not wanted */
} sfa_teacher;

/* Opens the model in `folder`, dense, for batches of max_tokens. */
sfa_status sfa_teacher_open(sfa_context *ctx, const char *folder, const sfa_learn_options *options, bool heads, bool predictions,
                            sfa_teacher *teacher);
void sfa_teacher_close(sfa_teacher *teacher);
/* Runs the teacher over the batch, and puts its answers into it: head_targets, teacher, teacher_user. They hold until the next call. */
sfa_status sfa_teacher_answer(sfa_teacher *teacher, sfa_learn_batch *batch);

#endif
