/* model/learn_parts.h: what a learner consists of; shared by the files learn*.c. */
#ifndef SFA_LEARN_PARTS_H
#define SFA_LEARN_PARTS_H

#include "device/training.h"
#include "model/learn.h"
#include "model/model_parts.h"

#include <sfa/attention.h>
#include <sfa/stream.h>

/* A linear layer: a parameter, or a range of one's outputs (q, k and v in one). Its row of output o and input i is at
 * value[o * out_stride + i * in_stride]. */
typedef struct sfa_learn_linear {
  sfa_parameter *weight, *bias; /* NULL: no such layer, no bias */
  int64_t n_in, n_out, first, out_stride, in_stride;
} sfa_learn_linear;

typedef struct sfa_learn_norm {
  sfa_parameter *weight, *bias;
} sfa_learn_norm;

typedef struct sfa_learn_layer {
  sfa_learn_norm attention_norm, q_norm, k_norm, post_attention_norm, ffn_norm, post_ffn_norm;
  sfa_learn_linear q, k, v, o, gate, up, down;
} sfa_learn_layer;

/* What the backward pass of a layer wants to know, beside its input. Cheap things (norms, activations) are computed again. */
typedef struct sfa_learn_saved {
  float *raw_q, *raw_k;   /* before QK-norm; NULL: there is none */
  float *q, *k, *v;       /* [T][H][D], [T][G][D], [T][G][E] after QK-norm and rope */
  float *kept_q, *kept_k; /* before rope, 0 where top-k before it left a feature out; NULL: never wanted */
  float *attended;        /* [T][H][E] */
  float *lse;             /* [T][H] */
  float *projected;       /* [T][hidden] before the norm after attention; NULL: there is none */
  float *middle;          /* [T][hidden] the stream between attention and feed-forward */
  float *gate, *up;       /* [T][ffn]; up NULL without a gate, and gate is what is activated */
  float *down;            /* [T][hidden] before the norm after feed-forward; NULL: there is none */
} sfa_learn_saved;

/* A plan of attention and what it was made for. */
typedef struct sfa_learn_plan {
  int32_t k_keys, k_queries, layer_kind, n_kv_heads, n_sequences, max_seqlen;
  sfa_attention_plan *plan;
} sfa_learn_plan;

enum { SFA_LEARN_PLANS = 32 };

/* What comes back of a batch: on the host, there after a wait. */
typedef struct sfa_learn_answer {
  double *heads; /* [n_layers][2] squares of what head outputs are off their targets, and of the targets; 0, 0 without */
  float *losses; /* [T] of tokens, 0 where not scored; [T] divergences */
  bool is_whole, has_losses, has_divergences; /* is_whole: all of it was asked for */
  int32_t n_tokens;
  int64_t n_scored;
  float *token_losses; /* the caller's, or NULL */
} sfa_learn_answer;

struct sfa_learner {
  sfa_context *ctx;
  sfa_weights *weights;
  const sfa_device *device;
  const sfa_training *training;
  sfa_model_config config;
  sfa_learn_options options;
  size_t bytes;

  sfa_parameter *parameters; /* [n_parameters] */
  int32_t n_parameters, most_parameters;
  char (*names)[SFA_NAME_BYTES]; /* [most_parameters] */
  sfa_learn_layer *layers;       /* [n_layers] */
  sfa_learn_norm final_norm;
  sfa_learn_linear head;
  sfa_parameter *embedding, *positions; /* positions NULL: none */
  float initializer_range;

  int32_t *k_keys, *k_queries; /* [n_layers][G], 0: all */
  sfa_learn_sparsity sparsity; /* without the arrays */
  sfa_learn_plan plans[SFA_LEARN_PLANS];
  int32_t n_plans;

  /* Activations, in the memory of the device; T = options.max_tokens. */
  float *streams;         /* [n_layers + 1][T][hidden] inputs of the layers, and what leaves the last */
  sfa_learn_saved *saved; /* [n_layers], with checkpointing [1] */
  float *rope_cos[SFA_LAYER_KINDS], *rope_sin[SFA_LAYER_KINDS], *rope_back[SFA_LAYER_KINDS]; /* [T][rope_pairs]; back: -sin */
  double *frequencies[SFA_LAYER_KINDS];                                                      /* [rope_pairs] */
  int32_t *positions_of;                                                                     /* [T] of each token in its sequence */
  int32_t *tokens, *targets, *cu_seqlens;                                                    /* [T], [T], [T + 1] of the batch */
  float *normed, *d_normed, *d_stream;                                                       /* [T][hidden] */
  float *d_q, *d_k, *d_v;
  float *d_attended; /* [T][H][E] */
  float *activated;  /* [T][ffn]; and their gradient */
  float *heads;      /* [T][H][E] of some heads, where a layer's differ in k */
  float *d_heads, *lse_heads;
  float *norm_weight;      /* [hidden] one plus a weight */
  float *logits, *teacher; /* [loss_tokens][vocab]; teacher allocated when wanted */
  double *heads_off;       /* [n_layers][2], as sfa_learn_answer.heads */
  float *losses;           /* [T] of tokens, [T] divergences */
  float *uses;             /* [T][H * D] */
  void *scratch, *workspace;
  size_t workspace_bytes;

  /* On the host. */
  int32_t *host_positions;   /* [T] */
  float *host_uses;          /* [T][H * D] for statistics, and uses on the device; NULL until they are wanted */
  sfa_learn_answer *answers; /* [most_answers], the first n_answers of them of batches that were started since the last wait */
  int32_t n_answers, most_answers;
};

/* Zeros that count in bytes: memory of the host, or of the context's device. */
sfa_status sfa_learn_alloc(sfa_learner *learner, size_t count, size_t element_bytes, const char *what, void *out);
sfa_status sfa_learn_alloc_device(sfa_learner *learner, size_t count, size_t element_bytes, void *out);

/* learn_load.c: parameters from the weights. */
sfa_status sfa_learn_load(sfa_learner *learner);

/* learn_block.c: one layer. forward: streams[index] to streams[index + 1]; backward: d_stream of the second to that of the first. */
sfa_status sfa_learn_layer_forward(sfa_learner *learner, const sfa_learn_batch *batch, int32_t index, sfa_learn_saved *saved);
sfa_status sfa_learn_layer_backward(sfa_learner *learner, const sfa_learn_batch *batch, int32_t index, sfa_learn_saved *saved,
                                    float head_scale);
void sfa_learn_norm_forward(sfa_learner *learner, const sfa_learn_norm *norm, int64_t n, int32_t n_groups, int32_t dim, const float *x,
                            float *out);
void sfa_learn_norm_backward(sfa_learner *learner, const sfa_learn_norm *norm, int64_t n, int32_t n_groups, int32_t dim, const float *x,
                             const float *d_out, float *d_x, bool add);
/* out [n][n_out] = x w^T + bias, or added to out. */
void sfa_learn_linear_forward(sfa_learner *learner, const sfa_learn_linear *linear, int64_t n, const float *x, bool add, float *out);
/* d_x [n][n_in] = d_out w, or added to d_x (NULL: not wanted); the parameters' gradients are added to. */
void sfa_learn_linear_backward(sfa_learner *learner, const sfa_learn_linear *linear, int64_t n, const float *x, const float *d_out,
                               bool add, float *d_x);

/* learn_attention.c */
/* Chooses the features of q and k, 0 for the others, where top-k inside attention is not the choice that is wanted. */
sfa_status sfa_learn_keep(sfa_learner *learner, int64_t n, int32_t index, sfa_learn_saved *saved);
sfa_status sfa_learn_attend(sfa_learner *learner, const sfa_learn_batch *batch, int32_t index, sfa_learn_saved *saved);
/* d_attended to d_q, d_k, d_v. */
sfa_status sfa_learn_attend_backward(sfa_learner *learner, const sfa_learn_batch *batch, int32_t index, const sfa_learn_saved *saved);
void sfa_learn_plans_free(sfa_learner *learner);

/* learn_loss.c: from streams[n_layers] to the losses and, where wanted, to d_stream. */
sfa_status sfa_learn_loss_run(sfa_learner *learner, const sfa_learn_batch *batch);

static inline bool sfa_learn_on_gpu(const sfa_learner *l) { return sfa_context_device(l->ctx) != SFA_DEVICE_CPU; }
static inline float sfa_learn_scale(const sfa_learn_batch *batch) { return batch->loss_scale != 0 ? batch->loss_scale : 1.0f; }
static inline int64_t sfa_learn_q_dim(const sfa_model_config *c) { return (int64_t)c->n_heads * c->head_dim; }
static inline int64_t sfa_learn_k_dim(const sfa_model_config *c) { return (int64_t)c->n_kv_heads * c->head_dim; }
static inline int64_t sfa_learn_v_dim(const sfa_model_config *c) { return (int64_t)c->n_kv_heads * c->head_dim_v; }
static inline int64_t sfa_learn_attended_dim(const sfa_model_config *c) { return (int64_t)c->n_heads * c->head_dim_v; }
static inline float *sfa_learn_stream(const sfa_learner *l, int32_t index) {
  return l->streams + (int64_t)index * l->options.max_tokens * l->config.hidden_dim;
}

#endif
