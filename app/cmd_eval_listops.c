/* sfa eval listops: scores a model on a file of ListOps, or writes such a file. */
#include "eval_settings.h"

#include <inttypes.h>
#include <stdio.h>

enum { MIN_LEN = 500, MAX_LEN = 2000, MAX_DEPTH = 10, MAX_ARGS = 10 };

int cmd_eval_listops(const app_options *o) {
  if (o->generate <= 0)
    return cmd_eval_task(o);
  uint64_t state = o->seed > 0 ? (uint64_t)o->seed : 1;
  int32_t min_len = o->lengths.n ? (int32_t)o->lengths.values[0] : MIN_LEN;
  int32_t max_len = o->lengths.n ? (int32_t)o->lengths.values[o->lengths.n - 1] : MAX_LEN;
  int32_t max_depth = o->depths > 0 ? (int32_t)o->depths : MAX_DEPTH;
  for (int64_t i = 0; i < o->generate; i++) {
    char line[1 << 16];
    size_t n = sfa_listops_line(&state, max_depth, MAX_ARGS, min_len, max_len, line, sizeof line);
    if (!n)
      return app_fail("no expression of %d to %d symbols was found with %d levels: ask for other --lengths or more --depths", min_len,
                      max_len, max_depth);
    fwrite(line, 1, n, stdout);
  }
  return app_flush();
}
