/* model/forward.h: the mutable side of a model: one timeline's caches, activations and attention plans. */
#ifndef SFA_FORWARD_H
#define SFA_FORWARD_H

#include "model/model_parts.h"

enum { SFA_CACHE_DENSE = 0, SFA_CACHE_SPARSE = 1, SFA_CACHES = 2 }; /* dense and coded keys may differ in dtype */

/* What a step is told by the host. */
enum { SFA_INPUT_TOKENS, SFA_INPUT_POSITIONS, SFA_INPUT_LENGTHS /* [2] cu_seqlens */, SFA_INPUTS };

/* Attention of all layers that share these settings. */
typedef struct sfa_attention_kind {
  int32_t k_keys, k_queries;
  sfa_layer_kind layer_kind;
  sfa_attention_plan *chunk, *one; /* for up to chunk_len tokens, and for one */
} sfa_attention_kind;

/* Where a layer's keys and values are, and how they are attended to. */
typedef struct sfa_layer_route {
  sfa_cache *cache;
  int32_t cache_layer;
  const sfa_attention_kind *attention;
  const int32_t *keep_keys, *keep_queries; /* [G] features that rows keep before they are codes (sfa_rows_keep); 0: all */
} sfa_layer_route;

struct sfa_forward {
  const sfa_model *model;
  int64_t context_len;
  int32_t chunk_len;
  sfa_cache *caches[SFA_CACHES]; /* NULL: no layer of that kind */
  sfa_dtype k_dtype[SFA_CACHES], v_dtype;
  sfa_layer_route *routes;       /* [n_layers] */
  sfa_attention_kind *attention; /* [n_attention] */
  int32_t n_attention;
  int32_t *keep_keys, *keep_queries; /* [n_layers][G] */

  /* In the memory of the context's device. */
  float *stream;                                                /* [chunk_len][hidden_dim] the residual stream */
  float *normed;                                                /* [chunk_len][hidden_dim] input or output of a sub-layer */
  float *qkv;                                                   /* [chunk_len][(H + G) * D + G * E] */
  float *attended;                                              /* [chunk_len][H * E] */
  float *ffn;                                                   /* [chunk_len][2 * ffn_dim] gate, up */
  float *rope_cos[SFA_LAYER_KINDS], *rope_sin[SFA_LAYER_KINDS]; /* [chunk_len][rope_pairs] */
  void *scratch;                                                /* of linear layers */
  void *workspace;                                              /* of attention */
  float *dropped;                                               /* [n_layers][H] mass that a step left out; NULL without eps */
  float *dropped_most;                                          /* [1] the largest of all steps */
  int32_t *inputs;                                              /* [SFA_INPUTS][chunk_len + 2] of the step */
  double *frequencies[SFA_LAYER_KINDS];                         /* [rope_pairs] */

  sfa_probe_fn probe; /* NULL: none */
  void *probe_user;

  /* A step of one token as the device's record, which is run again and again: sfa_cache_advance. */
  void *record;         /* NULL: none yet */
  float *record_rows;   /* where it leaves the token's row */
  int64_t record_moves; /* of the caches' tables, when it was made */
  bool records;         /* the device can record, and nothing has failed to be recorded */
};

#endif
