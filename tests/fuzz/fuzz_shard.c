/* The input is a token shard. */
#include "fuzz_case.h"

#include <string.h>

#include "base/hash.h"
#include "file/shards.h"

static void repair(uint8_t *data, size_t bytes) {
  sfa_shard_header h;
  if (bytes < sizeof h)
    return;
  memcpy(&h, data, sizeof h);
  size_t n = (size_t)h.n_tokens, id_bytes = h.id_bytes, n_blocks = (n + SFA_SHARD_BLOCK_LEN - 1) / SFA_SHARD_BLOCK_LEN;
  if (n <= bytes && id_bytes <= 4 && sizeof h + n * id_bytes + n_blocks * 8 <= bytes) {
    size_t sums_at = bytes - n_blocks * 8;
    for (size_t b = 0; b < n_blocks; b++) {
      size_t first = b * SFA_SHARD_BLOCK_LEN, len = n - first < SFA_SHARD_BLOCK_LEN ? n - first : SFA_SHARD_BLOCK_LEN;
      uint64_t sum = sfa_hash_bytes(0, data + sizeof h + first * id_bytes, len * id_bytes);
      memcpy(data + sums_at + b * 8, &sum, 8);
    }
    h.block_sums = sfa_hash_bytes(0, data + sums_at, n_blocks * 8);
  }
  h.checksum = sfa_hash_bytes(0, &h, sizeof h - sizeof h.checksum);
  memcpy(data, &h, sizeof h);
}

static void walk(sfa_shards *shards) {
  sfa_shards_info info;
  int32_t ids[256];
  sfa_shards_describe(shards, &info);
  fuzz_check(info.n_tokens > 0 && info.n_documents > 0 && info.n_documents <= info.n_tokens, "the numbers can be");
  fuzz_check(info.end_token >= 0 && info.end_token < info.vocab_size, "the end token is of the vocabulary");
  for (int64_t first = 0; first < info.n_tokens; first += 256) {
    int64_t n = info.n_tokens - first < 256 ? info.n_tokens - first : 256;
    if (sfa_shards_read(shards, first, n, ids) != SFA_OK) {
      fuzz_check(strstr(sfa_context_error(fuzz_context()), fuzz_path("shard")) != NULL, "the error names the file");
      break;
    }
    for (int64_t i = 0; i < n; i++)
      fuzz_check(ids[i] >= 0 && ids[i] < info.vocab_size, "an id is of the vocabulary");
  }
  sfa_status status = sfa_shards_verify(shards);
  fuzz_check(status == SFA_OK || status == SFA_ERROR_FORMAT, "verifying says good or damaged");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
  fuzz_write_repaired("shard", data, bytes, repair);
  const char *path = fuzz_path("shard");
  sfa_shards *shards;
  const sfa_status status = sfa_shards_open(fuzz_context(), &path, 1, &shards);
  fuzz_check_open(status, "shard", shards);
  if (shards)
    walk(shards);
  sfa_shards_close(shards);
  return 0;
}
