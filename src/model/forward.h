/* model/forward.h: the mutable side of a model: one timeline's caches, activations and attention plans. */
#ifndef SFA_FORWARD_H
#define SFA_FORWARD_H

#include "model/model_parts.h"

enum { SFA_CACHE_DENSE = 0, SFA_CACHE_SPARSE = 1, SFA_CACHES = 2 }; /* dense and coded keys may differ in dtype */

/* Attention of all layers that share these settings. */
typedef struct sfa_attention_kind {
  int32_t k_keys, k_queries;
  int32_t keep_keys, keep_queries; /* features that rows keep before they are codes (sfa_rows_keep); 0: all */
  sfa_layer_kind layer_kind;
  sfa_attention_plan *chunk, *one; /* for up to chunk_len tokens, and for one */
} sfa_attention_kind;

/* Where a layer's keys and values are, and how they are attended to. */
typedef struct sfa_layer_route {
  sfa_cache *cache;
  int32_t cache_layer;
  const sfa_attention_kind *attention;
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
  float *stream;                                                /* [chunk_len][hidden_dim] the residual stream */
  float *normed;                                                /* [chunk_len][hidden_dim] input or output of a sub-layer */
  float *qkv;                                                   /* [chunk_len][(H + G) * D + G * E] */
  float *attended;                                              /* [chunk_len][H * E] */
  float *ffn;                                                   /* [chunk_len][2 * ffn_dim] gate, up */
  float *rope_cos[SFA_LAYER_KINDS], *rope_sin[SFA_LAYER_KINDS]; /* [chunk_len][rope_pairs] */
  void *scratch;                                                /* of linear layers */
  void *workspace;                                              /* of attention */
  float *dropped;                                               /* [H] mass that a step left out; NULL without eps */
  float dropped_most;                                           /* the largest so far */
  sfa_probe_fn probe;                                           /* NULL: none */
  void *probe_user;
};

#endif
