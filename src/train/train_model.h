/* train/train_model.h: model folders of a training: the new one that it begins with, the trained one that it ends with. */
#ifndef SFA_TRAIN_MODEL_H
#define SFA_TRAIN_MODEL_H

#include "train/recipe.h"

#include "model/learn.h"

/* A Hugging Face directory of that config with all its tensors, as zeros. Refuses a config that the engine cannot read. */
sfa_status sfa_train_model_create(sfa_context *ctx, const char *folder, const cJSON *config);
/* Writes the learner's parameters to folder/model.safetensors, and config.json beside it, which gets the sparse attention of the recipe
 * where sparse is set. */
sfa_status sfa_train_model_save(sfa_context *ctx, const char *folder, const sfa_recipe *recipe, bool sparse, sfa_learner *learner);
/* Copies the tokenizer's files that lie in `from` (a directory, or a tokenizer.json in one). */
sfa_status sfa_train_model_copy_tokenizer(sfa_context *ctx, const char *folder, const char *from);

#endif
