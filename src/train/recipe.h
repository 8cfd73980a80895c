/* train/recipe.h: how a model is trained, as data: one JSON object (docs/TRAINING.md lists its members).
 *
 *     { "model": { config.json of Hugging Face },                      absent where an existing model is trained further
 *       "sparse_attention_config": { "k": 16, "k_q": 16, ... },       docs/MATH.md 9; null or absent: dense
 *       "k_schedule": "dense_first", "steps": 2000, "learning_rate": 0.002, ... }
 *
 * Several texts may be laid over each other, member by member: a model of one file, a recipe of another, an option of the command line.
 */
#ifndef SFA_RECIPE_H
#define SFA_RECIPE_H

#include "file/json.h"

typedef enum sfa_k_schedule { SFA_K_DENSE_FIRST, SFA_K_FIXED } sfa_k_schedule;
typedef enum sfa_rate_decay { SFA_DECAY_COSINE, SFA_DECAY_LINEAR, SFA_DECAY_WSD } sfa_rate_decay;
typedef enum sfa_trained { SFA_TRAIN_ALL, SFA_TRAIN_QK } sfa_trained;
typedef enum sfa_export_type { SFA_EXPORT_F32, SFA_EXPORT_BF16 } sfa_export_type;

typedef struct sfa_recipe {
  cJSON *json; /* all members, those that were not given with their defaults: what a checkpoint keeps */

  int64_t steps, sequences, accumulate, sequence_len, seed;
  bool document_mask; /* tokens see those of their own document alone */
  double learning_rate, final_learning_rate;
  int64_t warmup_steps, decay;
  double decay_part; /* of wsd */
  double beta1, beta2, epsilon, weight_decay, clip_norm;

  int64_t k_schedule;
  double dense_until, k_final_from; /* parts of the training */
  double gumbel_scale;

  int64_t trained;
  double head_weight, teacher_weight, temperature, loss_weight; /* of a conversion: docs/MATH.md 10 */
  bool checkpointing, bf16_products;

  int64_t log_every, validate_every, validation_windows, checkpoint_every, keep_checkpoints;
  int64_t weights;
} sfa_recipe;

/* Parses and checks. name: of the texts, for errors. Unknown members are refused with the nearest known name. */
sfa_status sfa_recipe_read(sfa_context *ctx, const char *const *texts, int64_t n_texts, sfa_recipe *recipe);
void sfa_recipe_free(sfa_recipe *recipe);
/* Sets a member that holds an object, such as "model"; takes item. */
sfa_status sfa_recipe_put(sfa_context *ctx, sfa_recipe *recipe, const char *name, cJSON *item);
/* SFA_ERROR_ARGUMENT, with the first member that differs and both values, unless the two lead to the same training. Members that only say
 * how often something is written may differ; one that is absent before had its default. */
sfa_status sfa_recipe_match(sfa_context *ctx, const sfa_recipe *now, const cJSON *before, const char *where);

/* What a sparse_attention_config means for a model, when training is over. */
typedef struct sfa_recipe_sparsity {
  int32_t *k_keys, *k_queries; /* [n_layers][n_kv_heads]; 0: dense. NULL: all of them */
  bool pre_rope, two_of_four;
} sfa_recipe_sparsity;
sfa_status sfa_recipe_sparsity_read(sfa_context *ctx, const sfa_recipe *recipe, int32_t n_layers, int32_t n_kv_heads, int32_t head_dim,
                                    sfa_recipe_sparsity *sparsity);
void sfa_recipe_sparsity_free(sfa_context *ctx, sfa_recipe_sparsity *sparsity);

/* The learning rate of a step (0 ..): rises linearly over the warm-up, then falls to final_learning_rate: as a half cosine or a line over
 * the rest, or (wsd) stays and falls linearly over the last decay_part of all steps. */
double sfa_recipe_rate(const sfa_recipe *recipe, int64_t step);
/* Kept features of a step where `k` of head_dim are kept at the end, 0: all. dense_first: all until dense_until of the steps, then
 * head_dim (k / head_dim)^x with x from 0 to 1 at k_final_from, rounded. */
int32_t sfa_recipe_k(const sfa_recipe *recipe, int64_t step, int32_t k, int32_t head_dim);

#endif
