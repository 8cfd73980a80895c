/* train/batches.h: which tokens a step trains on: a pure function of seed and step, the same for every recipe. */
#ifndef SFA_BATCHES_H
#define SFA_BATCHES_H

#include <sfa/data.h>

#include "base/context.h"

/* Shards cut into windows of window_len tokens, each with the token that follows: window w is tokens w * window_len .. of the whole row. */
typedef struct sfa_batches {
  sfa_context *ctx;
  sfa_shards *shards;
  int64_t window_len, n_windows;
  int32_t *row; /* [window_len + 1] */
} sfa_batches;

/* Opens files and sets as sfa_shards_open. what: "training" or "validation", for errors. */
sfa_status sfa_batches_open(sfa_context *ctx, const char *what, const char *const *paths, int64_t n_paths, int64_t window_len,
                            sfa_batches *batches);
void sfa_batches_close(sfa_batches *batches);
/* tokens and targets [window_len] of a window. */
sfa_status sfa_batches_read(sfa_batches *batches, int64_t window, int32_t *tokens, int32_t *targets);
/* The window that comes index-th (0 ..) in a training: every pass over the data has each window once, in an order of its own. */
int64_t sfa_batches_shuffled(const sfa_batches *batches, uint64_t seed, int64_t index);
/* The i-th of 0 .. n - 1 in the order of that key: one to one. */
uint64_t sfa_shuffle(uint64_t key, uint64_t n, uint64_t i);

#endif
