/* train/train_parts.h: what a training consists of; shared by train_open.c and train_run.c. */
#ifndef SFA_TRAIN_PARTS_H
#define SFA_TRAIN_PARTS_H

#include <sfa/train.h>

#include "train/batches.h"
#include "train/checkpoint.h"
#include "train/teacher.h"
#include "train/train_log.h"
#include "train/train_model.h"

struct sfa_train {
  sfa_context *ctx;
  sfa_recipe recipe;
  sfa_recipe_sparsity sparsity; /* of the end */
  sfa_learner *learner;
  sfa_learner_shape shape;
  sfa_optimizer optimizer;
  sfa_teacher teacher;          /* learner NULL: none */
  sfa_batches data, validation; /* validation.shards NULL: none */
  sfa_train_log log;
  int lock; /* an open file of the folder, locked; -1 */
  char *checkpoint_folder, *model_folder, *adapter_folder;
  sfa_train_progress_fn progress;
  void *progress_user;

  sfa_train_state state;
  int64_t first_step, saved_step; /* of this run; of the newest checkpoint, -1: none */
  double step_seconds;            /* running mean; 0: none yet */
  int32_t *tokens, *targets;      /* [sequences * sequence_len] */
  int32_t *cu_seqlens;            /* [sequences * sequence_len + 1] of a batch: its windows, or with document_mask their documents */
  int32_t end_token;              /* of a document */
  int32_t *k_keys, *k_queries;    /* [n_layers][n_kv_heads] of the current step */
  int64_t *key_uses, *query_uses; /* [n_layers][n_kv_heads][head_dim] */
};

#endif
