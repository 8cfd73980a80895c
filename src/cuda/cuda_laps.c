/* How long the stages of a call take on a GPU (args.stage_ns): marks on the stream between them, and the times between the marks when the
 * call has been waited for. Without stage_ns nothing is marked, and nothing waits. */
#include "cuda/cuda_state.h"

/* Times up to the last mark, which is the first of what follows. */
static sfa_status add_up(sfa_context *ctx) {
  const sfa_cuda_library *library = ctx->cuda->library;
  sfa_cuda_laps *laps = &ctx->cuda->laps;
  SFA_TRY(sfa_cuda_status(ctx, "waiting for the GPU", library->stream_wait(ctx->cuda->stream)));
  for (int32_t i = 1; i < laps->n; i++) {
    int64_t ns;
    SFA_TRY(sfa_cuda_status(ctx, "the time of a stage", library->mark_ns(laps->marks[i - 1], laps->marks[i], &ns)));
    laps->stage_ns[laps->stages[i]] += ns;
  }
  void *last = laps->marks[laps->n - 1];
  laps->marks[laps->n - 1] = laps->marks[0];
  laps->marks[0] = last;
  laps->n = 1;
  return SFA_OK;
}

sfa_status sfa_cuda_lap_inside(sfa_context *ctx, int32_t stage, void **mark) {
  sfa_cuda_laps *laps = &ctx->cuda->laps;
  *mark = NULL;
  if (!laps->stage_ns)
    return SFA_OK;
  if (laps->n == SFA_CUDA_MARKS)
    SFA_TRY(add_up(ctx));
  if (!laps->marks[laps->n])
    SFA_TRY(sfa_cuda_status(ctx, "a mark", ctx->cuda->library->mark_create(&laps->marks[laps->n])));
  *mark = laps->marks[laps->n];
  laps->stages[laps->n++] = stage;
  return SFA_OK;
}

sfa_status sfa_cuda_lap(sfa_context *ctx, int32_t stage) {
  void *mark;
  SFA_TRY(sfa_cuda_lap_inside(ctx, stage, &mark));
  return mark ? sfa_cuda_status(ctx, "a mark", ctx->cuda->library->mark(mark, ctx->cuda->stream)) : SFA_OK;
}

sfa_status sfa_cuda_laps_begin(sfa_context *ctx, int64_t *stage_ns) {
  ctx->cuda->laps.stage_ns = stage_ns;
  ctx->cuda->laps.n = 0;
  return sfa_cuda_lap(ctx, SFA_STAGE_COUNT); /* of nothing */
}

sfa_status sfa_cuda_laps_end(sfa_context *ctx) { return ctx->cuda->laps.stage_ns ? add_up(ctx) : SFA_OK; }

void sfa_cuda_laps_close(sfa_cuda *cuda) {
  for (int32_t i = 0; i < SFA_CUDA_MARKS && cuda->laps.marks[i]; i++)
    cuda->library->mark_destroy(cuda->laps.marks[i]);
}
