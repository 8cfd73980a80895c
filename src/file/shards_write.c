/* Token shards: writing a set, which gets its names when all of it is on the disk. */
#include "file/shards.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/hash.h"
#include "file/table.h"

struct sfa_shard_writer {
  sfa_context *ctx;
  char *path, *name, *temporary; /* of the set; of a shard: room for both */
  size_t name_bytes;
  sfa_shard_settings settings;
  int file; /* of the current shard; -1: none */
  sfa_shard_header header;
  uint64_t *sums; /* of the current shard's blocks */
  int64_t n_sums, sums_capacity;
  uint8_t *block; /* of ids as they are stored */
  int64_t n_in_block;
  int64_t n_tokens, n_documents; /* of all shards */
  uint64_t n_shards;             /* those that were begun */
  bool in_document, committed;
};

static sfa_status fail_errno(const sfa_shard_writer *w, const char *what) {
  int reason = errno;
  return sfa_fail(
      w->ctx, SFA_ERROR_IO, "cannot %s %s: %s%s", what, w->temporary, strerror(reason),
      reason == ENOSPC || reason == EDQUOT || reason == EFBIG ? "; make room and try again, shards that were there are as they were" : "");
}

static void set_names(sfa_shard_writer *w, uint64_t number) {
  snprintf(w->name, w->name_bytes, "%s_%05llu.shard", w->path, (unsigned long long)number);
  snprintf(w->temporary, w->name_bytes, "%s.tmp", w->name);
}

/* ---- One shard --------------------------------------------------------------------------------------------------------------- */

static sfa_status write_all(const sfa_shard_writer *w, const void *data, size_t bytes) {
  for (const uint8_t *from = data; bytes;) {
    ssize_t n = write(w->file, from, bytes);
    if (n < 0 && errno == EINTR)
      continue;
    if (n <= 0)
      return fail_errno(w, "write");
    from += n;
    bytes -= (size_t)n;
  }
  return SFA_OK;
}

static sfa_status begin_shard(sfa_shard_writer *w) {
  const sfa_shard_settings *s = &w->settings;
  uint64_t previous = w->header.checksum;
  w->header = (sfa_shard_header){.magic = SFA_SHARD_MAGIC,
                                 .version = SFA_SHARD_VERSION,
                                 .endian = SFA_SHARD_ENDIAN,
                                 .id_bytes = s->vocab_size <= 65536 ? 2 : 4,
                                 .vocab_size = (uint32_t)s->vocab_size,
                                 .end_token = (uint32_t)s->end_token,
                                 .tokenizer = s->tokenizer,
                                 .number = w->n_shards,
                                 .previous = previous};
  set_names(w, w->n_shards);
  w->file = open(w->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (w->file < 0)
    return fail_errno(w, "make");
  w->n_shards++;
  w->n_sums = 0;
  return write_all(w, &(sfa_shard_header){0}, sizeof w->header); /* no reader takes it for a shard until the header is there */
}

static sfa_status end_block(sfa_shard_writer *w) {
  SFA_TRY(sfa_list_grow(w->ctx, (void **)&w->sums, w->n_sums, &w->sums_capacity, sizeof *w->sums, "the checksums of a shard"));
  size_t bytes = (size_t)w->n_in_block * w->header.id_bytes;
  w->sums[w->n_sums++] = sfa_hash_bytes(0, w->block, bytes);
  w->n_in_block = 0;
  return write_all(w, w->block, bytes);
}

/* What follows the ids, then the header, then the disk's word that all is there. */
static sfa_status end_shard(sfa_shard_writer *w, bool is_last) {
  sfa_shard_header *h = &w->header;
  if (w->n_in_block)
    SFA_TRY(end_block(w));
  size_t ids_bytes = (size_t)h->n_tokens * h->id_bytes;
  SFA_TRY(write_all(w, &(uint64_t){0}, (8 - ids_bytes % 8) % 8));
  SFA_TRY(write_all(w, w->sums, (size_t)w->n_sums * sizeof *w->sums));
  h->is_last = is_last;
  h->block_sums = sfa_hash_bytes(0, w->sums, (size_t)w->n_sums * sizeof *w->sums);
  h->checksum = sfa_hash_bytes(0, h, sizeof *h - sizeof h->checksum);
  if (lseek(w->file, 0, SEEK_SET) != 0)
    return fail_errno(w, "write");
  SFA_TRY(write_all(w, h, sizeof *h));
  if (fsync(w->file) != 0)
    return fail_errno(w, "write");
  int file = w->file;
  w->file = -1;
  return close(file) == 0 ? SFA_OK : fail_errno(w, "write");
}

/* ---- The set ----------------------------------------------------------------------------------------------------------------- */

sfa_status sfa_shard_writer_open(sfa_context *ctx, const char *path, const sfa_shard_settings *settings, sfa_shard_writer **out) {
  *out = NULL;
  SFA_REQUIRE(ctx, path && *path, "shards want a path");
  SFA_REQUIRE(ctx, settings->vocab_size > 0 && settings->end_token >= 0 && settings->end_token < settings->vocab_size,
              "the end token %d is not of a vocabulary of %d", settings->end_token, settings->vocab_size);
  SFA_REQUIRE(ctx, settings->shard_len > 0, "a shard of %lld tokens cannot be", (long long)settings->shard_len);
  sfa_shard_writer *w;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *w, "a writer of shards", (void **)&w));
  *w = (sfa_shard_writer){.ctx = ctx, .settings = *settings, .file = -1, .name_bytes = strlen(path) + 40};
  sfa_status status = sfa_strdup(ctx, path, &w->path);
  if (status == SFA_OK)
    status = sfa_alloc(ctx, w->name_bytes, "a path", (void **)&w->name);
  if (status == SFA_OK)
    status = sfa_alloc(ctx, w->name_bytes, "a path", (void **)&w->temporary);
  if (status == SFA_OK)
    status = sfa_alloc(ctx, SFA_SHARD_BLOCK_LEN * sizeof(uint32_t), "a block of a shard", (void **)&w->block);
  if (status == SFA_OK)
    status = begin_shard(w);
  if (status == SFA_OK)
    *out = w;
  else
    sfa_shard_writer_close(w);
  return status;
}

static sfa_status add_ids(sfa_shard_writer *w, const int32_t *ids, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t id = (uint32_t)ids[i];
    SFA_REQUIRE(w->ctx, id < w->header.vocab_size, "%s: token id %d is not of the vocabulary of %u", w->path, ids[i], w->header.vocab_size);
    if (w->header.id_bytes == 2)
      ((uint16_t *)(void *)w->block)[w->n_in_block++] = (uint16_t)id;
    else
      ((uint32_t *)(void *)w->block)[w->n_in_block++] = id;
    if (w->n_in_block == SFA_SHARD_BLOCK_LEN)
      SFA_TRY(end_block(w));
  }
  w->header.n_tokens += (uint64_t)n;
  w->n_tokens += n;
  return SFA_OK;
}

sfa_status sfa_shard_writer_add(sfa_shard_writer *w, const int32_t *ids, int64_t n) {
  if (!w->in_document && w->header.n_tokens >= (uint64_t)w->settings.shard_len) {
    SFA_TRY(end_shard(w, false));
    SFA_TRY(begin_shard(w));
  }
  w->in_document = true;
  return add_ids(w, ids, n);
}

sfa_status sfa_shard_writer_end_document(sfa_shard_writer *w) {
  SFA_TRY(sfa_shard_writer_add(w, &w->settings.end_token, 1));
  w->in_document = false;
  w->header.n_documents++;
  w->n_documents++;
  return SFA_OK;
}

/* New names are safe once their folder is; a file system that cannot say so is let be. */
static void confirm_folder(const sfa_shard_writer *w) {
  char *folder = w->name; /* not needed any more */
  char *slash = strrchr(folder, '/');
  if (slash)
    slash[slash == folder] = 0;
  int file = open(slash ? folder : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (file >= 0) {
    fsync(file);
    close(file);
  }
}

sfa_status sfa_shard_writer_commit(sfa_shard_writer *w) {
  SFA_REQUIRE(w->ctx, w->n_documents > 0 && !w->in_document, "%s: there is no document to write", w->path);
  SFA_TRY(end_shard(w, true));
  for (uint64_t i = 0; i < w->n_shards; i++) {
    set_names(w, i);
    if (rename(w->temporary, w->name) != 0)
      return fail_errno(w, "rename");
  }
  w->committed = true;
  confirm_folder(w);
  return SFA_OK;
}

void sfa_shard_writer_close(sfa_shard_writer *w) {
  if (!w)
    return;
  if (w->file >= 0)
    close(w->file);
  for (uint64_t i = 0; i < w->n_shards && !w->committed; i++) {
    set_names(w, i);
    unlink(w->temporary);
  }
  sfa_free(w->ctx, w->path);
  sfa_free(w->ctx, w->name);
  sfa_free(w->ctx, w->temporary);
  sfa_free(w->ctx, w->sums);
  sfa_free(w->ctx, w->block);
  sfa_free(w->ctx, w);
}

int64_t sfa_shard_writer_n_tokens(const sfa_shard_writer *w) { return w->n_tokens; }
int64_t sfa_shard_writer_n_documents(const sfa_shard_writer *w) { return w->n_documents; }
