/* train/train_model.h: model folders of a training: the new one that it begins with, the trained one that it ends with. */
#ifndef SFA_TRAIN_MODEL_H
#define SFA_TRAIN_MODEL_H

#include "train/recipe.h"

#include "model/learn.h"

/* A Hugging Face directory of that config with all its tensors, as zeros. Refuses a config that the engine cannot read. */
sfa_status sfa_train_model_create(sfa_context *ctx, const char *folder, const cJSON *config);
/* What a folder gets: the model before its first step, the trained one, or what training changed of it, to be laid over the model that it
 * began as. Trained ones have the sparse attention of the recipe in their config. */
typedef enum sfa_train_saved { SFA_SAVE_INITIAL, SFA_SAVE_MODEL, SFA_SAVE_ADAPTER } sfa_train_saved;
/* Writes the learner's parameters to folder/model.safetensors, those that learn to folder/adapter.safetensors, and config.json beside. */
sfa_status sfa_train_model_save(sfa_context *ctx, const char *folder, const sfa_recipe *recipe, sfa_train_saved what, sfa_learner *learner);
/* Makes the folder and copies the tokenizer's files that lie in `from` (a directory, or a tokenizer.json in one). */
sfa_status sfa_train_model_copy_tokenizer(sfa_context *ctx, const char *folder, const char *from);

#endif
