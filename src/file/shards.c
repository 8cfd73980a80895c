/* Token shards: reading. */
#include "file/shards.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "base/hash.h"
#include "base/map.h"
#include "file/table.h"

typedef struct shard {
  char *path;
  sfa_map map;
  sfa_shard_header header;
  const uint8_t *ids, *sums; /* in the map */
  uint8_t *checked;          /* [n_blocks] 1: this block has its checksum */
  int64_t first, n_blocks;   /* first token of all, blocks of the file */
} shard;

struct sfa_shards {
  sfa_context *ctx;
  shard *list; /* [n] */
  int64_t n, capacity;
  int64_t n_tokens;
};

/* ---- Open -------------------------------------------------------------------------------------------------------------------- */

static sfa_status damaged(sfa_context *ctx, const char *path, const char *what) {
  return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s: %s; make the shards again with sfa data", path, what);
}

/* Where the parts of a file lie; false if its numbers cannot be those of a file of so many bytes. */
static bool find_parts(const sfa_shard_header *h, size_t bytes, size_t *sums_at, int64_t *n_blocks) {
  if (h->n_tokens == 0 || h->n_tokens > bytes) /* so that what follows cannot overflow */
    return false;
  *n_blocks = (int64_t)((h->n_tokens + SFA_SHARD_BLOCK_LEN - 1) / SFA_SHARD_BLOCK_LEN);
  *sums_at = (sizeof *h + (size_t)h->n_tokens * h->id_bytes + 7) / 8 * 8;
  return *sums_at + (size_t)*n_blocks * sizeof(uint64_t) == bytes;
}

static sfa_status check_header(sfa_context *ctx, const char *path, const sfa_shard_header *h) {
  if (memcmp(h->magic, SFA_SHARD_MAGIC, sizeof h->magic) != 0)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s is no token shard; sfa data makes them from texts", path);
  if (h->endian != SFA_SHARD_ENDIAN || h->version != SFA_SHARD_VERSION)
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED,
                    "%s: a shard of version %u and byte order %08x, but version %d in this machine's byte order can be read", path,
                    h->version, h->endian, SFA_SHARD_VERSION);
  if (h->checksum != sfa_hash_bytes(0, h, sizeof *h - sizeof h->checksum))
    return damaged(ctx, path, "the header is damaged");
  if (h->vocab_size == 0 || h->vocab_size > INT32_MAX || h->end_token >= h->vocab_size || h->n_documents == 0 ||
      h->n_documents > h->n_tokens || h->id_bytes != (h->vocab_size <= 65536 ? 2 : 4))
    return damaged(ctx, path, "the numbers of the header cannot be");
  return SFA_OK;
}

static sfa_status map_shard(sfa_context *ctx, shard *s) {
  SFA_TRY(sfa_map_open(ctx, s->path, &s->map));
  size_t sums_at;
  if (s->map.bytes < sizeof s->header)
    return damaged(ctx, s->path, "shorter than a header");
  memcpy(&s->header, s->map.data, sizeof s->header);
  SFA_TRY(check_header(ctx, s->path, &s->header));
  if (!find_parts(&s->header, s->map.bytes, &sums_at, &s->n_blocks))
    return sfa_fail(ctx, SFA_ERROR_FORMAT,
                    "%s: %zu bytes cannot hold exactly the %llu tokens of its header; copy it again, or make it anew", s->path,
                    s->map.bytes, (unsigned long long)s->header.n_tokens);
  s->ids = s->map.data + sizeof s->header;
  s->sums = s->map.data + sums_at;
  if (s->header.block_sums != sfa_hash_bytes(0, s->sums, (size_t)s->n_blocks * sizeof(uint64_t)))
    return damaged(ctx, s->path, "the list of checksums is damaged");
  return sfa_alloc_zero(ctx, (size_t)s->n_blocks, 1, "the blocks of a shard", (void **)&s->checked);
}

static sfa_status add_shard(sfa_shards *shards, const char *path) {
  SFA_TRY(sfa_list_grow(shards->ctx, (void **)&shards->list, shards->n, &shards->capacity, sizeof *shards->list, "a list of shards"));
  shard *s = &shards->list[shards->n];
  *s = (shard){.first = shards->n_tokens};
  SFA_TRY(sfa_strdup(shards->ctx, path, &s->path));
  shards->n++; /* from here on sfa_shards_close knows it */
  SFA_TRY(map_shard(shards->ctx, s));
  const sfa_shard_header *h = &s->header, *first = &shards->list[0].header;
  if (h->vocab_size != first->vocab_size || h->tokenizer != first->tokenizer || h->end_token != first->end_token)
    return sfa_fail(shards->ctx, SFA_ERROR_ARGUMENT,
                    "%s (vocabulary %u, tokenizer %016llx) and %s (vocabulary %u, tokenizer %016llx) were made by different tokenizers: "
                    "use shards of one",
                    shards->list[0].path, first->vocab_size, (unsigned long long)first->tokenizer, s->path, h->vocab_size,
                    (unsigned long long)h->tokenizer);
  shards->n_tokens += (int64_t)h->n_tokens; /* each is at most the bytes of a file */
  return SFA_OK;
}

enum { PATH_BYTES = 4096 };

/* PATH_00000.shard and those after it, up to the one that says it is the last. */
static sfa_status add_set(sfa_shards *shards, const char *path) {
  uint64_t previous = 0;
  for (uint64_t number = 0;; number++) {
    char name[PATH_BYTES];
    struct stat info;
    if (snprintf(name, sizeof name, "%s_%05llu.shard", path, (unsigned long long)number) >= (int)sizeof name)
      return sfa_fail(shards->ctx, SFA_ERROR_ARGUMENT, "the path %s is too long", path);
    if (number == 0 && stat(name, &info) != 0)
      return sfa_fail(shards->ctx, SFA_ERROR_IO, "there is no %s, and no set of shards that begins with %s", path, name);
    SFA_TRY(add_shard(shards, name));
    const sfa_shard_header *h = &shards->list[shards->n - 1].header;
    if (h->number != number || h->previous != previous)
      return damaged(shards->ctx, name,
                     number ? "does not follow the shard before it: the set is mixed from two" : "not the first of a set");
    if (h->is_last)
      return SFA_OK;
    previous = h->checksum;
  }
}

sfa_status sfa_shards_open(sfa_context *ctx, const char *const *paths, int64_t n_paths, sfa_shards **out) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(ctx, out, "sfa_shards_open wants a place for the shards");
  *out = NULL;
  SFA_REQUIRE(ctx, paths && n_paths > 0, "sfa_shards_open wants paths, not %lld", (long long)n_paths);
  sfa_shards *shards;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *shards, "shards", (void **)&shards));
  shards->ctx = ctx;
  sfa_status status = SFA_OK;
  for (int64_t i = 0; i < n_paths && status == SFA_OK; i++) {
    struct stat info;
    if (!paths[i])
      status = sfa_fail(ctx, SFA_ERROR_ARGUMENT, "sfa_shards_open: path %lld is NULL", (long long)i);
    else
      status = stat(paths[i], &info) == 0 && !S_ISDIR(info.st_mode) ? add_shard(shards, paths[i]) : add_set(shards, paths[i]);
  }
  if (status == SFA_OK)
    *out = shards;
  else
    sfa_shards_close(shards);
  return status;
}

void sfa_shards_close(sfa_shards *shards) {
  if (!shards)
    return;
  for (int64_t i = 0; i < shards->n; i++) {
    sfa_map_close(&shards->list[i].map);
    sfa_free(shards->ctx, shards->list[i].checked);
    sfa_free(shards->ctx, shards->list[i].path);
  }
  sfa_free(shards->ctx, shards->list);
  sfa_free(shards->ctx, shards);
}

void sfa_shards_describe(const sfa_shards *shards, sfa_shards_info *info) {
  const sfa_shard_header *h = &shards->list[0].header;
  *info = (sfa_shards_info){.n_shards = shards->n,
                            .n_tokens = shards->n_tokens,
                            .vocab_size = (int32_t)h->vocab_size,
                            .end_token = (int32_t)h->end_token,
                            .tokenizer = h->tokenizer};
  for (int64_t i = 0; i < shards->n; i++) {
    info->bytes += (int64_t)shards->list[i].map.bytes;
    info->n_documents += (int64_t)shards->list[i].header.n_documents;
  }
}

int64_t sfa_shards_n_tokens(const sfa_shards *shards) { return shards->n_tokens; }

/* ---- Read -------------------------------------------------------------------------------------------------------------------- */

/* Ids of a block; the last one is shorter. */
static int64_t block_len(const shard *s, int64_t block) {
  return sfa_min64(SFA_SHARD_BLOCK_LEN, (int64_t)s->header.n_tokens - block * SFA_SHARD_BLOCK_LEN);
}

static sfa_status check_block(sfa_context *ctx, const shard *s, int64_t block) {
  const size_t id_bytes = s->header.id_bytes;
  uint64_t sum;
  memcpy(&sum, s->sums + (size_t)block * sizeof sum, sizeof sum);
  if (sum != sfa_hash_bytes(0, s->ids + (size_t)block * SFA_SHARD_BLOCK_LEN * id_bytes, (size_t)block_len(s, block) * id_bytes))
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s: block %lld of %lld (tokens from %lld on) is damaged; make the shards again with sfa data",
                    s->path, (long long)block, (long long)s->n_blocks, (long long)block * SFA_SHARD_BLOCK_LEN);
  return SFA_OK;
}

/* Ids from..from+n-1 of a shard, as they are stored, to numbers. Returns the largest. */
static uint32_t copy_ids(const shard *s, int64_t from, int64_t n, int32_t *out) {
  uint32_t largest = 0;
  if (s->header.id_bytes == 2) {
    const uint16_t *ids = (const uint16_t *)(const void *)s->ids + from;
    for (int64_t i = 0; i < n; i++) {
      out[i] = ids[i];
      largest = ids[i] > largest ? ids[i] : largest;
    }
  } else {
    const uint32_t *ids = (const uint32_t *)(const void *)s->ids + from;
    for (int64_t i = 0; i < n; i++) {
      out[i] = (int32_t)ids[i];
      largest = ids[i] > largest ? ids[i] : largest;
    }
  }
  return largest;
}

/* A checksum can be right over ids that no writer made: they are looked at as well. */
static sfa_status read_shard(sfa_context *ctx, shard *s, int64_t from, int64_t n, int32_t *out) {
  for (int64_t block = from / SFA_SHARD_BLOCK_LEN; block * SFA_SHARD_BLOCK_LEN < from + n; block++) {
    if (s->checked[block])
      continue;
    SFA_TRY(check_block(ctx, s, block));
    s->checked[block] = 1;
  }
  uint32_t largest = copy_ids(s, from, n, out);
  if (largest >= s->header.vocab_size)
    return sfa_fail(ctx, SFA_ERROR_FORMAT,
                    "%s: token id %u is not below %u, the size of the vocabulary; make the shards again with sfa data", s->path, largest,
                    s->header.vocab_size);
  return SFA_OK;
}

/* The shard that has a token. */
static shard *find_shard(const sfa_shards *shards, int64_t token) {
  int64_t low = 0, high = shards->n - 1;
  while (low < high) {
    int64_t middle = (low + high + 1) / 2;
    if (shards->list[middle].first <= token)
      low = middle;
    else
      high = middle - 1;
  }
  return &shards->list[low];
}

sfa_status sfa_shards_read(sfa_shards *shards, int64_t first, int64_t n, int32_t *out) {
  SFA_REQUIRE(shards->ctx, first >= 0 && n >= 0 && first <= shards->n_tokens && n <= shards->n_tokens - first,
              "tokens %lld + %lld were asked for, but the shards hold %lld", (long long)first, (long long)n, (long long)shards->n_tokens);
  while (n > 0) {
    shard *s = find_shard(shards, first);
    int64_t from = first - s->first, here = sfa_min64(n, (int64_t)s->header.n_tokens - from);
    SFA_TRY(read_shard(shards->ctx, s, from, here, out));
    first += here;
    out += here;
    n -= here;
  }
  return SFA_OK;
}

sfa_status sfa_shards_verify(const sfa_shards *shards) {
  sfa_context *ctx = shards->ctx;
  int32_t *ids;
  SFA_TRY(sfa_alloc(ctx, SFA_SHARD_BLOCK_LEN * sizeof *ids, "a block of tokens", (void **)&ids));
  sfa_status status = SFA_OK;
  for (int64_t i = 0; i < shards->n && status == SFA_OK; i++) {
    const shard *s = &shards->list[i];
    uint64_t n_ends = 0;
    int32_t last = -1;
    for (int64_t block = 0; block < s->n_blocks && status == SFA_OK; block++) {
      int64_t n = block_len(s, block);
      s->checked[block] = 0; /* the file may have changed since */
      status = read_shard(ctx, &shards->list[i], block * SFA_SHARD_BLOCK_LEN, n, ids);
      for (int64_t t = 0; t < n && status == SFA_OK; t++)
        n_ends += (uint32_t)ids[t] == s->header.end_token;
      last = ids[n - 1];
    }
    if (status == SFA_OK && ((uint32_t)last != s->header.end_token || n_ends < s->header.n_documents))
      status = damaged(ctx, s->path, "its documents do not end as the header says");
  }
  sfa_free(ctx, ids);
  return status;
}
