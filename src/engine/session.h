/* engine/session.h: what a session is made of; shared by the files of this folder. */
#ifndef SFA_SESSION_H
#define SFA_SESSION_H

#include "model/model.h"

struct sfa_session {
  sfa_context *ctx;
  const sfa_model *model;
  sfa_forward *forward;
  int64_t context_len;
  int32_t chunk_len, hidden_dim, vocab_size;
  sfa_progress_fn progress;
  void *progress_user;
  float *hidden;      /* [chunk_len][hidden_dim] */
  float *logits;      /* [score_rows][vocab_size]; NULL until something is scored */
  int32_t score_rows; /* rows whose logits are held at once */
  int32_t *tokens;    /* [capacity], the first sfa_session_len of them are the timeline */
  int64_t capacity;
  sfa_session_stats stats;
};

#endif
