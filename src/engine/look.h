/* engine/look.h: a query of a running step and its softmax over the stored keys; what explain.c and inspect.c share. */
#ifndef SFA_LOOK_H
#define SFA_LOOK_H

#include <sfa/postings.h>

#include "model/model.h"

/* Room for one query at a time; where the model is on a GPU, also for what a probe shows there: looking is done on the CPU. */
typedef struct sfa_look {
  sfa_context *ctx, *model_ctx; /* of the CPU; the model's, often the same */
  sfa_model_heads heads;
  int32_t head_dim_v;
  void *memory;   /* of codes */
  sfa_codes code; /* of the query that was loaded last: one row, k features (D where it is dense) */
  float *queries; /* brought from a GPU, as are the pages of the cache; NULL: none */
  void *pages;
  sfa_cache *cache;
} sfa_look;

/* Feature number `at` of codes of head dim D; without ids, of a dense row: at itself. */
static inline int32_t sfa_look_feature(const void *ids, int32_t D, int64_t at) {
  return !ids ? (int32_t)at : D <= 256 ? ((const uint8_t *)ids)[at] : ((const uint16_t *)ids)[at];
}

sfa_status sfa_look_open(sfa_look *look, const sfa_model *model);
/* Passes on how the looking went, with the text that goes with it. */
sfa_status sfa_look_close(sfa_look *look, sfa_status status);
/* What a probe of that timeline shows, in host memory: the same, or a copy that stays until the next one. */
sfa_status sfa_look_bring(sfa_look *look, const sfa_forward *forward, const sfa_probe *probe, sfa_probe *here);
/* Codes query head `head` of token `token` (of the step) as attention does: look->code. */
sfa_status sfa_look_query(sfa_look *look, const sfa_probe *probe, int32_t token, int32_t head);
/* Scores (without softcap) and softmax weights of that query over the keys 0 .. position of its token: both [position + 1]. postings: of
 * the layer, or NULL. */
sfa_status sfa_look_weights(sfa_look *look, const sfa_probe *probe, int32_t token, int32_t head, const sfa_postings *postings,
                            float *scores, float *weights);
/* The features that it shares with a key, by falling |part|; reasons [SFA_MAX_REASONS]; out->n_shared counts all that are shared. ids,
 * values: room for one key, 2 D and 4 D bytes. */
sfa_status sfa_look_reasons(const sfa_look *look, const sfa_probe *probe, int32_t head, int64_t key, void *ids, float *values,
                            sfa_explained_token *out);

#endif
