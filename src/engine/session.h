/* engine/session.h: what a session is made of; shared by the files of this folder. */
#ifndef SFA_SESSION_H
#define SFA_SESSION_H

#include <sfa/postings.h>

#include "model/model.h"

struct sfa_session {
  sfa_context *ctx;
  const sfa_model *model;
  sfa_forward *forward;
  int64_t context_len;
  int32_t chunk_len, hidden_dim, vocab_size;
  sfa_progress_fn progress;
  void *progress_user;
  float *hidden;             /* [chunk_len][hidden_dim], like the next ones in the memory of the context's device */
  float *logits;             /* [score_rows][vocab_size]; NULL until something is scored, or on a GPU wanted */
  int32_t *targets, *argmax; /* [chunk_len] */
  float *nll;                /* the same */
  float *host_logits;        /* [vocab_size] where a GPU's copies go; NULL: none */
  int32_t score_rows;        /* rows whose logits are held at once */
  int32_t *tokens;           /* [capacity], the first sfa_session_len of them are the timeline */
  int64_t capacity;
  sfa_index *index;        /* whose pages the timeline begins with; NULL: none */
  sfa_postings **postings; /* [n_layers] inverted indexes that explanations made; NULL until the first */
  sfa_session_stats stats;
};

/* Room for the tokens of the timeline. */
sfa_status sfa_session_reserve(sfa_session *session, int64_t n);
/* Bytes of the index's pages that are in use. */
int64_t sfa_session_index_bytes(const sfa_session *session);
/* Where a layer's inverted index is kept; NULL if there is no memory for the list. */
sfa_postings **sfa_session_postings(sfa_session *session, int32_t layer);
/* Runs the last token once more with a probe; the timeline is as before. Where that fails the token is run without the probe; if this fails
 * too, it is lost, and the session ends before it. */
sfa_status sfa_session_rerun_last(sfa_session *session, sfa_probe_fn probe, void *user);
/* Appends tokens; logits [n_tokens][vocab_size] of all of them. */
sfa_status sfa_session_logits(sfa_session *session, const int32_t *tokens, int64_t n_tokens, float *logits);
/* sfa_session_append with a probe. */
sfa_status sfa_session_append_probed(sfa_session *session, const int32_t *tokens, int64_t n_tokens, sfa_probe_fn probe, void *user);

#endif
