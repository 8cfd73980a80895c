/* eval/eval_shots.h: which rows stand before an item as worked examples. */
#ifndef SFA_EVAL_SHOTS_H
#define SFA_EVAL_SHOTS_H

#include "base/context.h"

/* Draws n_shots of n_rows rows for each of n_items items in turn, shots [n_items][n_shots], as the harness does: Python's
 * random.Random(1234), one sample() an item. n_shots <= n_rows. */
sfa_status sfa_eval_shots_draw(sfa_context *ctx, int64_t n_rows, int32_t n_shots, int64_t n_items, int32_t **shots);

#endif
