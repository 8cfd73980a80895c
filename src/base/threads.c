/* Work sharing over OpenMP. Nested calls run on the calling thread, so that a part may be parallel alone and serial inside another. */
#include "base/context.h"

#include <omp.h>

void sfa_parallel(const sfa_context *ctx, int64_t n_items, sfa_item_fn fn, void *arg) {
  if (n_items <= 1 || ctx->n_threads <= 1 || omp_in_parallel()) {
    for (int64_t item = 0; item < n_items; item++)
      fn(arg, item, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(ctx->n_threads)
  for (int64_t item = 0; item < n_items; item++)
    fn(arg, item, omp_get_thread_num());
}

int32_t sfa_library_threads(int32_t n_threads) {
  int32_t before = omp_get_max_threads();
  omp_set_num_threads(n_threads);
  return before;
}
