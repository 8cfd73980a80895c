/* text/corpus.h: one pass over texts of any size: batches of bounded memory, the work on a batch shared out over threads while the next one
 * is read, and the results taken in the order of the texts. */
#ifndef SFA_CORPUS_H
#define SFA_CORPUS_H

#include <sfa/data.h>

#include "text/text_step.h"

/* A piece of a document, see file/text_read.h; well-formed UTF-8. */
typedef struct sfa_corpus_item {
  const uint8_t *text; /* [bytes] */
  size_t bytes;
  bool begins, ends; /* its document */
  sfa_ids ids;       /* what the work on it made */
} sfa_corpus_item;

/* A thread of the pass. */
typedef struct sfa_corpus_worker {
  sfa_context ctx; /* its own, for memory and errors */
  sfa_encoder *encoder;
  int32_t number;
  int64_t failed_item; /* the first that failed */
  sfa_status status;
} sfa_corpus_worker;

/* What is done with a pass. A failure ends it. */
typedef struct sfa_corpus_work {
  const sfa_steps *steps; /* of the workers' encoders */
  const sfa_bpe *bpe;
  int64_t memory_bytes;                                                             /* what batches may take */
  sfa_status (*item)(void *user, sfa_corpus_worker *worker, sfa_corpus_item *item); /* beside others */
  sfa_status (*batch)(void *user, const sfa_corpus_item *items, int64_t n_items);   /* all of whose items are done */
  void *user;
  sfa_data_progress_fn progress; /* may be NULL */
  void *progress_user;
  sfa_data_progress *done; /* kept up to date by the pass, but for n_tokens */
} sfa_corpus_work;

sfa_status sfa_corpus_run(sfa_context *ctx, const sfa_text_inputs *inputs, const sfa_corpus_work *work);

#endif
