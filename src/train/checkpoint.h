/* train/checkpoint.h: a training between two steps, in one file: step-000000001000.sfa in the folder "checkpoints". The bytes are in
 * docs/LAYOUTS.md. Files are written by file/save.h, so that a checkpoint is whole or not there.
 */
#ifndef SFA_CHECKPOINT_H
#define SFA_CHECKPOINT_H

#include "base/map.h"
#include "train/optimizer.h"

#define SFA_CHECKPOINT_MAGIC "SFATRAIN"
enum { SFA_CHECKPOINT_VERSION = 1, SFA_CHECKPOINT_ENDIAN = 0x01020304 };

/* What a training is beside its parameters, their moments and the recipe. There is no state of a random generator: what is random is a
 * function of seed and step. */
typedef struct sfa_train_state {
  int64_t step;     /* steps done */
  int64_t n_tokens; /* trained on until now */
  double loss_sum;  /* of the steps since the last line of the log */
  int64_t loss_steps;
} sfa_train_state;

/* Writes FOLDER/step-....sfa. */
sfa_status sfa_checkpoint_save(sfa_context *ctx, const char *folder, const sfa_train_state *state, const cJSON *recipe,
                               sfa_learner *learner, const sfa_optimizer *optimizer);

typedef struct sfa_checkpoint {
  sfa_context *ctx;
  char *path;
  sfa_map map;
  sfa_train_state state;
  cJSON *recipe;
} sfa_checkpoint;

/* The newest of a folder, all of its bytes compared with the checksums. *found false: there is none. SFA_ERROR_FORMAT: it is damaged; the
 * text says what to do. */
sfa_status sfa_checkpoint_open(sfa_context *ctx, const char *folder, sfa_checkpoint *checkpoint, bool *found);
void sfa_checkpoint_close(sfa_checkpoint *checkpoint);
/* Fills parameters and moments; they must be those that were saved. */
sfa_status sfa_checkpoint_restore(const sfa_checkpoint *checkpoint, sfa_learner *learner, const sfa_optimizer *optimizer);

/* Deletes all but the newest `keep` checkpoints, and what killed writers left. What cannot be deleted stays, and is told to the log. */
void sfa_checkpoint_prune(sfa_context *ctx, const char *folder, int64_t keep);

#endif
