/* Windows of shards in an order that needs no memory: a Feistel network of four rounds permutes 0 .. 4^b - 1, the smallest such range that
 * holds n; what falls outside n is sent through again until it falls inside ("cycle walking"), which keeps it one to one. */
#include "train/batches.h"

#include "base/hash.h"

uint64_t sfa_shuffle(uint64_t key, uint64_t n, uint64_t i) {
  int half = 1;
  while (half < 32 && (uint64_t)1 << (2 * half) < n)
    half++;
  const uint64_t mask = ((uint64_t)1 << half) - 1;
  do {
    uint64_t left = i >> half, right = i & mask;
    for (uint64_t round = 0; round < 4; round++) {
      uint64_t mixed = sfa_hash_word(sfa_hash_word(sfa_hash_word(key, round), right), 0);
      uint64_t next = left ^ (mixed & mask);
      left = right;
      right = next;
    }
    i = left << half | right;
  } while (i >= n);
  return i;
}

sfa_status sfa_batches_open(sfa_context *ctx, const char *what, const char *const *paths, int64_t n_paths, int64_t window_len,
                            sfa_batches *batches) {
  *batches = (sfa_batches){.ctx = ctx, .window_len = window_len};
  SFA_TRY(sfa_shards_open(ctx, paths, n_paths, &batches->shards));
  const int64_t n_tokens = sfa_shards_n_tokens(batches->shards);
  sfa_status status = SFA_OK;
  batches->n_windows = (n_tokens - 1) / window_len;
  if (batches->n_windows < 1)
    status =
        sfa_fail(ctx, SFA_ERROR_ARGUMENT, "the %s shards hold %lld tokens, a window wants %lld: add text, or set a smaller sequence_len",
                 what, (long long)n_tokens, (long long)window_len + 1);
  if (status == SFA_OK)
    status = sfa_alloc_zero(ctx, (size_t)window_len + 1, sizeof *batches->row, "a window of tokens", (void **)&batches->row);
  if (status != SFA_OK)
    sfa_batches_close(batches);
  return status;
}

void sfa_batches_close(sfa_batches *batches) {
  if (batches->ctx)
    sfa_free(batches->ctx, batches->row);
  sfa_shards_close(batches->shards);
  *batches = (sfa_batches){0};
}

sfa_status sfa_batches_read(sfa_batches *batches, int64_t window, int32_t *tokens, int32_t *targets) {
  const size_t bytes = (size_t)batches->window_len * sizeof *tokens;
  SFA_TRY(sfa_shards_read(batches->shards, window * batches->window_len, batches->window_len + 1, batches->row));
  memcpy(tokens, batches->row, bytes);
  memcpy(targets, batches->row + 1, bytes);
  return SFA_OK;
}

int64_t sfa_batches_shuffled(const sfa_batches *batches, uint64_t seed, int64_t index) {
  const uint64_t n = (uint64_t)batches->n_windows, pass = (uint64_t)index / n;
  return (int64_t)sfa_shuffle(sfa_hash_word(sfa_hash_word(0, seed), pass), n, (uint64_t)index % n);
}
