/* model/learn.h: a model that learns: f32 parameters with their gradients, the engine's own block forward and backward.
 *
 * Everything is [token][dim] over the packed tokens of a batch; sequences of different lengths lie one after the other (cu_seqlens).
 * Sums have one order: results do not depend on the number of threads. Letters as in docs/MATH.md; the formulas are its section 4 and 10.
 *
 * A training step, by its caller:
 *     sfa_learner_clear(learner);
 *     for each batch of the step: sfa_learner_start(learner, &batch)              batch.loss_scale = 1 / scored tokens of the whole step
 *     clip and step over sfa_learner_parameter(learner, 0 ..)                     device ops square_sum, clip and adamw
 *     sfa_learner_finish(learner, &result)                                        the only wait for a GPU
 */
#ifndef SFA_LEARN_H
#define SFA_LEARN_H

#include "device/training.h"
#include "file/weights.h"
#include "model/families.h"

typedef struct sfa_learner sfa_learner;

typedef struct sfa_learn_options {
  int32_t max_tokens;  /* of a batch, all sequences together */
  int32_t max_seqlen;  /* of a sequence; 0: max_tokens */
  bool checkpointing;  /* keep only the input of every layer, and compute the rest again on the way back: a third more time, a fraction of
                        * the memory */
  bool bf16_products;  /* operands of matrix products rounded to bf16, sums in f32 */
  int32_t loss_tokens; /* tokens whose logits exist at a time; 0: what 32 MB hold */
} sfa_learn_options;

/* One tensor, in the shape and under the name that it has in a Hugging Face file. */
typedef struct sfa_parameter {
  const char *name; /* "model.layers.0.self_attn.q_proj.weight" */
  sfa_role role;
  int32_t layer;    /* -1: of no layer */
  int32_t n_dims;   /* 1 or 2 */
  int64_t shape[2]; /* the second is 1 for vectors */
  int64_t n;
  float *value, *gradient; /* [n] in the memory of the context's device, for the caller to change; that of a frozen one is not touched */
  bool decays;             /* a matrix (embeddings too), not a norm or a bias */
  bool trainable;          /* set by the caller at any time; true at first. Frozen layers at the bottom cost no backward pass */
} sfa_parameter;

/* Every parameter as f32 from a model file: a directory with config.json and *.safetensors, GGUF, llama2.c; a new model is a directory with
 * random weights. Owns weights from here on, also on failure. */
sfa_status sfa_learner_create(sfa_context *ctx, sfa_weights *weights, const sfa_learn_options *options, sfa_learner **learner);
void sfa_learner_destroy(sfa_learner *learner);
const sfa_weights *sfa_learner_weights(const sfa_learner *learner);
/* The operations of its machine, the optimizer's among them. */
const sfa_training *sfa_learner_training(const sfa_learner *learner);
/* Memory of the host that copies from the device go to without a wait, page-locked where there is such. */
sfa_status sfa_learner_host_alloc(sfa_learner *learner, size_t bytes, const char *what, void **memory);
void sfa_learner_host_free(sfa_learner *learner, void *memory);
/* Bytes of parameters, gradients and activations. */
size_t sfa_learner_bytes(const sfa_learner *learner);

typedef struct sfa_learner_shape {
  const sfa_family *family;
  int32_t n_layers, n_heads, n_kv_heads, head_dim, head_dim_v, hidden_dim, ffn_dim, vocab_size;
  int64_t context_len; /* most tokens of a sequence that the config allows */
} sfa_learner_shape;
sfa_learner_shape sfa_learner_shape_of(const sfa_learner *learner);

int32_t sfa_learner_count(const sfa_learner *learner);
/* 0 .. count - 1, in the order of the layers; the pointer holds as long as the learner. Tied embeddings are one parameter. */
sfa_parameter *sfa_learner_parameter(sfa_learner *learner, int32_t index);
/* Gradients = 0. */
sfa_status sfa_learner_clear(sfa_learner *learner);
/* Fills the parameters as Hugging Face initialises: normal with deviation initializer_range of the config (0.02), GPT-2's two projections
 * into the stream 0.02 / sqrt(2 n_layers), biases 0, norms 1. The same numbers on every machine. */
sfa_status sfa_learner_init_random(sfa_learner *learner, uint64_t seed);

/* How attention is sparse from the next run on; copied. NULL arrays: dense. */
typedef struct sfa_learn_sparsity {
  const int32_t *k_keys;    /* [n_layers][n_kv_heads] kept features of a key; 0 or head_dim: all */
  const int32_t *k_queries; /* [n_layers][n_kv_heads] of the queries of these heads; 0 or head_dim: all ("K-only") */
  bool pre_rope;            /* top-k before the rotation: a code has the features of both members of each kept pair */
  bool two_of_four;         /* at most two kept in each aligned group of four */
  float gumbel_scale;       /* noise on the logarithm of the magnitudes that top-k compares; 0: none */
  uint64_t gumbel_seed;     /* of this step; a batch is the same for the same seed */
} sfa_learn_sparsity;
/* What the file asks for (sparse_attention_config) holds until the first call. */
sfa_status sfa_learner_sparsity(sfa_learner *learner, const sfa_learn_sparsity *sparsity);

/* Logits [n][vocab_size], in the memory of the device, of a teacher for tokens first .. first + n - 1 of the batch. */
typedef sfa_status (*sfa_teacher_fn)(void *user, int32_t first, int32_t n, float *logits);

/* loss = sum of next-token losses of scored tokens
 *        + head_weight    * n_scored / n_layers * mean square of (head outputs - head_targets), relative to that of the targets
 *        + teacher_weight * temperature^2 * sum over scored tokens of KL(teacher || model) at that temperature */
typedef struct sfa_learn_batch {
  int32_t n_tokens, n_sequences;
  const int32_t *tokens;     /* [n_tokens] */
  const int32_t *targets;    /* [n_tokens] the token that should follow; -1: not scored. NULL: none is scored */
  const int32_t *cu_seqlens; /* [n_sequences + 1], from 0 rising to n_tokens; NULL: one sequence */
  bool backward;             /* gradients of loss_scale * loss are added to those of the trainable parameters */
  float loss_scale;          /* 0: 1 */
  float loss_weight;         /* of the next-token loss; 0: 1; below 0: none */

  /* Conversion (the paper's Eq. 8, and distillation). Targets are in the memory of the device. */
  float head_weight;                /* lambda */
  const float *const *head_targets; /* [n_layers] of [n_tokens][H * E], entries may be NULL; NULL: none */
  float teacher_weight, temperature;
  sfa_teacher_fn teacher;
  void *teacher_user;

  /* Wanted beside the losses; memory of the caller, NULL: not wanted. */
  float *hidden;              /* [n_tokens][hidden_dim] after the final norm, like the next in the memory of the device */
  float *const *head_outputs; /* [n_layers] of [n_tokens][H * E], entries may be NULL */
  float *token_losses;        /* [n_tokens] nats, 0 where not scored; this and the next on the host */
  int64_t *key_uses;          /* [n_layers][n_kv_heads][head_dim] keys that keep the feature are added; 0 in dense layers */
  int64_t *query_uses;        /* [n_layers][n_kv_heads][head_dim] */
} sfa_learn_batch;

typedef struct sfa_learn_result {
  double loss_sum; /* next-token losses of scored tokens, nats */
  int64_t n_scored;
  double head_loss;   /* mean over the layers with targets, relative; of several batches: the sum */
  double teacher_sum; /* KL of scored tokens */
} sfa_learn_result;

/* Puts the work of a batch on the context's stream; its arrays on the host may be changed on return, but for token_losses. A batch larger
 * than max_tokens, ids outside the vocabulary: an error, nothing changed. */
sfa_status sfa_learner_start(sfa_learner *learner, const sfa_learn_batch *batch);
/* Waits, and tells of all batches started since the last time. A loss that is not finite is no error here: the caller looks at the result,
 * which may be NULL. */
sfa_status sfa_learner_finish(sfa_learner *learner, sfa_learn_result *result);
/* Both. */
sfa_status sfa_learner_run(sfa_learner *learner, const sfa_learn_batch *batch, sfa_learn_result *result);
/* logits [n][vocab_size] of hidden rows, final softcap included, in the memory of the device: for teachers. */
sfa_status sfa_learner_logits(sfa_learner *learner, int32_t n, const float *hidden, float *logits);

#endif
