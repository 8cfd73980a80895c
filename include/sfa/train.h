/* sfa/train.h: training of language models, dense or with sparse features, from token shards. Link libsfa_engine.
 *
 * A training lives in one folder:
 *
 *     recipe.json      what is trained and how, every member with its value (docs/TRAINING.md)
 *     initial/         the model of a new training before its first step, as a Hugging Face directory
 *     checkpoints/     step-....sfa: weights, moments, counters, recipe; each whole or not there
 *     log.jsonl        a JSON object a line: losses, rates, speed, how features are used
 *     adapter/         where only a part of the weights was trained: that part, to be laid over the model (sfa_model_options.adapter)
 *     model/           the trained model as a Hugging Face directory: safetensors, config.json, the tokenizer's files
 *
 * Whatever ends the process at whatever moment, the same call goes on from the newest checkpoint, and arrives at the same bits as a
 * training that nothing stopped, for any number of threads.
 *
 *     sfa_train_options options = {.struct_size = sizeof options, .recipes = &text, .n_recipes = 1, .out = "run", ...};
 *     if (sfa_train_open(ctx, &options, &train) == SFA_OK)
 *       sfa_train_run(train);
 *     sfa_train_close(train);
 */
#ifndef SFA_TRAIN_H
#define SFA_TRAIN_H

#include <sfa/data.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Where a training stands. Losses are in nats a token; NAN: not known at this step. */
typedef struct sfa_train_progress {
  int64_t step, n_steps; /* steps done, of how many */
  int64_t n_tokens;      /* trained on until now */
  double loss;           /* of the last step */
  double validation_loss;
  double learning_rate, gradient_norm; /* of the last step; the norm before clipping */
  int32_t k;                           /* most features kept of a key now; 0: all */
  double tokens_per_s, seconds_left;
} sfa_train_progress;

/* Called after every step, and after every held-out loss (validation_loss is set then). Return non-zero to stop: the training is saved and
 * sfa_train_run returns SFA_ERROR_CANCELLED. */
typedef int (*sfa_train_progress_fn)(void *user, const sfa_train_progress *progress);

typedef struct sfa_train_options {
  size_t struct_size;         /* sizeof(sfa_train_options) */
  const char *const *recipes; /* JSON texts, laid over each other member by member, the last one on top */
  int64_t n_recipes;
  const char *model;       /* a Hugging Face directory to train further; NULL: a new model of the recipe's "model" */
  const char *const *data; /* shards or sets of shards, as sfa_shards_open takes them */
  int64_t n_data;
  const char *const *validation; /* the same, for the held-out loss; n_validation = 0: none */
  int64_t n_validation;
  const char *tokenizer; /* tokenizer.json or the directory that holds it, copied to the trained model; NULL: that of model, if any */
  const char *out;       /* the folder; made where it is not there */
  int32_t resume;        /* 1: go on from the newest checkpoint; without one, begin. 0: a folder with a checkpoint is an error */
  sfa_train_progress_fn progress; /* NULL: none */
  void *progress_user;
} sfa_train_options;

typedef struct sfa_train sfa_train;

/* Reads the recipe, opens the shards and the model or makes one, and takes what a checkpoint has. Holds a lock on the folder.
 * SFA_ERROR_ARGUMENT: the recipe is wrong, or another than that of the checkpoint (the text names the member); SFA_ERROR_FORMAT: a shard or
 * a checkpoint is damaged (the text names it). On failure *train is NULL and nothing that was in the folder is changed. Texts of the
 * options are copied or read; their memory is not kept. */
SFA_API sfa_status sfa_train_open(sfa_context *ctx, const sfa_train_options *options, sfa_train **train);
/* Trains to the last step, then writes model/. SFA_ERROR_CANCELLED: stopped by the callback, checkpoint and model/ of that step written;
 * SFA_ERROR_RANGE: a loss that is not finite; SFA_ERROR_IO: a full disk. In all cases the checkpoints that were there are intact. */
SFA_API sfa_status sfa_train_run(sfa_train *train);
/* Takes NULL. */
SFA_API void sfa_train_close(sfa_train *train);

typedef struct sfa_train_info {
  const char *family;
  int32_t n_layers, hidden_dim, n_heads, n_kv_heads, head_dim, vocab_size;
  int64_t n_parameters, n_trained; /* values; those that learn */
  int64_t n_steps, tokens_a_step;
  int64_t n_tokens;   /* of the training shards */
  int64_t first_step; /* where this run begins: above 0 after a checkpoint */
  size_t bytes;       /* of memory: parameters, gradients, moments, activations */
  int32_t k, k_q;     /* most features kept in the end; 0: all */
} sfa_train_info;

SFA_API void sfa_train_describe(const sfa_train *train, sfa_train_info *info);

/* Writes a Hugging Face directory (a trained model, or any other that sfa_model_open reads) as one GGUF file, whole or not at all. Matrices
 * are rounded to type: SFA_F32, SFA_F16 or SFA_BF16 (0); vectors stay f32. Sparse attention is in the keys {arch}.attention.sfa.*
 * (docs/MATH.md 9). A tokenizer that is a byte-level BPE with GPT-2's or SmolLM's cut into words is written too; with another, the file has
 * none, which the log tells. */
SFA_API sfa_status sfa_model_export_gguf(sfa_context *ctx, const char *directory, const char *path, sfa_dtype type);

/* ---- Sensitivity: which heads of a dense model need many features ---------------------------------------------------------------- */

typedef struct sfa_sensitivity_options {
  size_t struct_size;      /* sizeof(sfa_sensitivity_options) */
  const char *model;       /* as sfa_model_open takes it */
  const char *const *data; /* token shards of held-out text */
  int64_t n_data;
  int64_t n_windows, window_len; /* 0: 16 windows of 256 tokens, spread evenly */
  const int32_t *k;              /* [n_k] rising; NULL: 4, 8, 16, 32. Those from head_dim on are left out */
  int32_t n_k;
  int32_t dense_queries;    /* 1: keys alone are cut ("K-only") */
  sfa_progress_fn progress; /* NULL: none */
  void *progress_user;
} sfa_sensitivity_options;

/* Nats a token by which the mean loss rises where one kv head keeps k features and everything else is dense. */
typedef struct sfa_sensitivity {
  int32_t n_layers, n_kv_heads, head_dim, n_k;
  int32_t *k; /* [n_k] */
  double dense_loss;
  double *rise; /* [n_k][n_layers][n_kv_heads] */
} sfa_sensitivity;

/* Cost: n_k * n_layers * n_kv_heads + 1 passes over the windows. */
SFA_API sfa_status sfa_sensitivity_measure(sfa_context *ctx, const sfa_sensitivity_options *options, sfa_sensitivity **sensitivity);
SFA_API void sfa_sensitivity_destroy(sfa_context *ctx, sfa_sensitivity *sensitivity);
/* The k of every layer, or with by_head = 1 of every head (head_dim: dense), at most mean_k on average, whose rises have the smallest sum,
 * by dynamic programming. As if rises added up: a first guess, to be trained and measured. k: [n_layers][n_kv_heads]; *rise: that sum.
 * A cache has slots for the most features of a layer's heads: by head saves no bytes over those. */
SFA_API sfa_status sfa_sensitivity_allocate(sfa_context *ctx, const sfa_sensitivity *sensitivity, double mean_k, int32_t by_head,
                                            int32_t *k, double *rise);

#ifdef __cplusplus
}
#endif
#endif
