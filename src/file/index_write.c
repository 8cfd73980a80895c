/* Writing a document index: one commit at a time, so that whatever stops it leaves the file as the commit before had it. */
#include "file/index_file.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/hash.h"

struct sfa_index_writer {
  sfa_context *ctx;
  char *path;
  int file;
};

/* ---- Open and close ------------------------------------------------------------------------------------------------------------------ */

static sfa_status fail_errno(const sfa_index_writer *w, const char *what) {
  int reason = errno;
  return sfa_fail(w->ctx, SFA_ERROR_IO, "cannot %s %s: %s%s", what, w->path, strerror(reason),
                  reason == ENOSPC || reason == EDQUOT || reason == EFBIG ? "; make room and try again, nothing that was there is lost"
                                                                          : "");
}

/* The lock belongs to the file, not to its name: between open and lock, the writer before may have removed the name. */
static bool is_named(const sfa_index_writer *w, const struct stat *opened) {
  struct stat named;
  return stat(w->path, &named) == 0 && named.st_dev == opened->st_dev && named.st_ino == opened->st_ino;
}

static sfa_status open_and_lock(sfa_index_writer *w) {
  for (int attempt = 0; attempt < 100; attempt++) {
    struct stat info;
    w->file = open(w->path, O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK, 0666);
    if (w->file < 0)
      return fail_errno(w, "open or make");
    if (fstat(w->file, &info) != 0 || !S_ISREG(info.st_mode))
      return sfa_fail(w->ctx, SFA_ERROR_IO, "%s is not a regular file", w->path);
    if (flock(w->file, LOCK_EX | LOCK_NB) != 0)
      return errno == EWOULDBLOCK
                 ? sfa_fail(w->ctx, SFA_ERROR_IO, "%s is being written by another process: wait for its end, or name another file", w->path)
                 : fail_errno(w, "lock");
    if (is_named(w, &info))
      return SFA_OK;
    close(w->file);
    w->file = -1;
  }
  return sfa_fail(w->ctx, SFA_ERROR_IO, "%s is made and removed by others all the time: name another file", w->path);
}

sfa_status sfa_index_writer_open(sfa_context *ctx, const char *path, sfa_index_writer **out) {
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(ctx, out, "sfa_index_writer_open wants a place for the writer");
  *out = NULL;
  SFA_REQUIRE(ctx, path && *path, "sfa_index_writer_open wants a path");
  sfa_index_writer *w;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *w, "the writer of an index", (void **)&w));
  w->ctx = ctx;
  w->file = -1;
  sfa_status status = sfa_strdup(ctx, path, &w->path);
  if (status == SFA_OK)
    status = open_and_lock(w);
  if (status == SFA_OK) {
    *out = w;
  } else {
    if (w->file >= 0)
      close(w->file);
    sfa_free(ctx, w->path);
    sfa_free(ctx, w);
  }
  return status;
}

void sfa_index_writer_close(sfa_index_writer *w) {
  if (!w)
    return;
  struct stat info;
  if (fstat(w->file, &info) == 0 && info.st_size == 0 && is_named(w, &info))
    unlink(w->path); /* before the lock goes */
  close(w->file);
  sfa_free(w->ctx, w->path);
  sfa_free(w->ctx, w);
}

int sfa_index_writer_is_new(const sfa_index_writer *w) {
  bool unfinished;
  return sfa_index_is_unfinished(w->ctx, w->path, &unfinished) == SFA_OK && unfinished;
}

/* ---- Writing ------------------------------------------------------------------------------------------------------------------------- */

static sfa_status write_at(const sfa_index_writer *w, const void *data, size_t bytes, uint64_t at) {
  for (const uint8_t *from = data; bytes;) {
    ssize_t n = pwrite(w->file, from, bytes, (off_t)at);
    if (n < 0 && errno == EINTR)
      continue;
    if (n == 0)
      errno = EIO;
    if (n <= 0)
      return fail_errno(w, "write");
    from += n;
    at += (uint64_t)n;
    bytes -= (size_t)n;
  }
  return SFA_OK;
}

static sfa_status confirm(const sfa_index_writer *w) { return fsync(w->file) == 0 ? SFA_OK : fail_errno(w, "write"); }

/* Sets the last 8 bytes of a struct to the checksum of the others. */
static void seal(void *data, size_t bytes) {
  uint64_t sum = sfa_hash_bytes(0, data, bytes - sizeof sum);
  memcpy((uint8_t *)data + bytes - sizeof sum, &sum, sizeof sum);
}

/* A new file: header, empty slots, settings. *end: behind them. */
static sfa_status write_settings(const sfa_index_writer *w, const sfa_index_settings *s, uint64_t *end) {
  size_t name_bytes = strlen(s->name), layer_bytes = (size_t)s->n_layers * sizeof *s->layers;
  sfa_index_settings_head head = {.model = s->model,
                                  .tokenizer = s->tokenizer,
                                  .page_format = SFA_INDEX_PAGE_FORMAT,
                                  .page_len = SFA_INDEX_PAGE_LEN,
                                  .n_layers = (uint32_t)s->n_layers,
                                  .n_kv_heads = (uint32_t)s->n_kv_heads,
                                  .head_dim = (uint32_t)s->head_dim,
                                  .head_dim_v = (uint32_t)s->head_dim_v,
                                  .weights = (uint32_t)s->weights,
                                  .vocab_size = (uint32_t)s->vocab_size,
                                  .name_bytes = name_bytes};
  size_t bytes = SFA_INDEX_SETTINGS_AT + sizeof head + layer_bytes + name_bytes;
  uint8_t *block;
  SFA_TRY(sfa_alloc_zero(w->ctx, bytes, 1, "the settings of an index", (void **)&block));
  uint8_t *settings = block + SFA_INDEX_SETTINGS_AT;
  memcpy(settings, &head, sizeof head);
  memcpy(settings + sizeof head, s->layers, layer_bytes);
  memcpy(settings + sizeof head + layer_bytes, s->name, name_bytes);
  sfa_index_header header = {
      .magic = SFA_INDEX_MAGIC, .version = SFA_INDEX_VERSION, .endian = SFA_INDEX_ENDIAN, .settings_bytes = bytes - SFA_INDEX_SETTINGS_AT};
  header.settings_checksum = sfa_hash_bytes(0, settings, header.settings_bytes);
  seal(&header, sizeof header);
  memcpy(block, &header, sizeof header);
  sfa_status status = ftruncate(w->file, 0) == 0 ? write_at(w, block, bytes, 0) : fail_errno(w, "write");
  sfa_free(w->ctx, block);
  *end = bytes;
  return status;
}

enum { BUFFER_BYTES = 1 << 20 };

/* Pages of all layers through a buffer; sums [n_layers][n_pages]. */
static sfa_status write_pages(const sfa_index_writer *w, const sfa_index_state *state, const sfa_index_parts *parts, uint64_t *sums) {
  uint64_t largest = 0, at = parts->pages_at, filled = 0;
  for (int32_t layer = 0; layer < state->settings->n_layers; layer++)
    largest = state->settings->layers[layer].page_bytes > largest ? state->settings->layers[layer].page_bytes : largest;
  uint64_t capacity = largest > BUFFER_BYTES ? largest : BUFFER_BYTES;
  uint8_t *buffer;
  SFA_TRY(sfa_alloc(w->ctx, capacity, "pages to be written", (void **)&buffer));
  sfa_status status = SFA_OK;
  for (int32_t layer = 0; layer < state->settings->n_layers && status == SFA_OK; layer++) {
    uint64_t bytes = state->settings->layers[layer].page_bytes;
    for (uint64_t p = 0; p < parts->n_pages && status == SFA_OK; p++) {
      if (filled + bytes > capacity) {
        status = write_at(w, buffer, filled, at);
        at += filled;
        filled = 0;
      }
      if (status == SFA_OK)
        status = state->page(state->user, layer, (int64_t)(parts->first_page + p), buffer + filled);
      if (status == SFA_OK)
        *sums++ = sfa_hash_bytes(0, buffer + filled, bytes);
      filled += bytes;
    }
  }
  if (status == SFA_OK)
    status = write_at(w, buffer, filled, at);
  sfa_free(w->ctx, buffer);
  return status;
}

/* What of the state's sources a file has not: those behind the end of its last one. */
typedef struct new_sources {
  const sfa_index_source *list;
  uint64_t n;
  int64_t byte, token; /* where they may begin */
} new_sources;

static new_sources find_new_sources(const sfa_index *index, const sfa_index_state *state) {
  new_sources new = {.list = state->sources, .n = (uint64_t)state->n_sources};
  if (index && index->n_sources) {
    const sfa_index_source *last = &index->sources[index->n_sources - 1];
    new.byte = last->first_byte + last->n_bytes;
    new.token = last->first_token + last->n_tokens;
    for (; new.n &&new.list->first_token + new.list->n_tokens <= new.token; new.n--)
      new.list++;
  }
  return new;
}

/* A source from `at` on. The file may hold its beginning: a text that has grown since. */
static void cut_front(int64_t at, int64_t *first, int64_t *n) {
  int64_t cut = sfa_min64(sfa_max64(at - *first, 0), *n);
  *first = sfa_max64(*first, at);
  *n -= cut;
}

/* The segment at an offset: pages first, since their sums are among what lies before them. */
static sfa_status write_segment(const sfa_index_writer *w, const sfa_index_state *state, const new_sources *sources, uint64_t at,
                                sfa_index_segment *head) {
  head->n_sources = sources->n;
  for (uint64_t i = 0; i < sources->n; i++)
    head->name_bytes += strlen(sources->list[i].name) + 1;
  sfa_index_parts parts;
  if (!sfa_index_parts_of(state->settings, at, head, &parts))
    return sfa_fail(w->ctx, SFA_ERROR_RANGE, "%s: %llu tokens are too many for an index", w->path, (unsigned long long)state->n_tokens);
  head->pages_at = parts.pages_at;
  head->end = parts.end;
  uint8_t *meta;
  SFA_TRY(sfa_alloc_zero(w->ctx, parts.pages_at - at, 1, "the list of a segment", (void **)&meta));
  memcpy(meta + (parts.tokens_at - at), state->tokens + head->first_token, head->n_tokens * sizeof *state->tokens);
  char *name = (char *)meta + (parts.names_at - at);
  for (uint64_t i = 0; i < sources->n; i++) {
    sfa_index_source s = sources->list[i];
    cut_front(sources->byte, &s.first_byte, &s.n_bytes);
    cut_front(sources->token, &s.first_token, &s.n_tokens);
    sfa_index_source_entry entry = {(uint64_t)s.first_byte, (uint64_t)s.n_bytes, (uint64_t)s.first_token, (uint64_t)s.n_tokens};
    memcpy(meta + (parts.sources_at - at) + i * sizeof entry, &entry, sizeof entry);
    size_t bytes = strlen(s.name) + 1;
    memcpy(name, s.name, bytes);
    name += bytes;
  }
  sfa_status status = write_pages(w, state, &parts, (uint64_t *)(void *)(meta + (parts.sums_at - at)));
  if (status == SFA_OK) {
    head->meta_checksum = sfa_hash_bytes(0, meta + sizeof *head, parts.pages_at - at - sizeof *head);
    seal(head, sizeof *head);
    memcpy(meta, head, sizeof *head);
    status = write_at(w, meta, parts.pages_at - at, at);
  }
  sfa_free(w->ctx, meta);
  return status;
}

/* The name of a new file is safe on the disk as well once its folder is; a file system that cannot say so is let be. */
static void confirm_folder(const sfa_index_writer *w) {
  const char *slash = strrchr(w->path, '/');
  char *folder;
  if (sfa_strdup(w->ctx, slash ? w->path : ".", &folder) != SFA_OK)
    return;
  if (slash)
    folder[slash == w->path ? 1 : slash - w->path] = 0;
  int file = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (file >= 0) {
    fsync(file);
    close(file);
  }
  sfa_free(w->ctx, folder);
}

/* ---- Commit -------------------------------------------------------------------------------------------------------------------------- */

static sfa_status check_state(const sfa_index_writer *w, const sfa_index_state *state) {
  int64_t byte = 0, token = 0;
  SFA_REQUIRE(w->ctx, state->n_tokens > 0, "%s: a session without tokens has nothing to save", w->path);
  SFA_REQUIRE(w->ctx, state->n_sources >= 0 && (state->sources || state->n_sources == 0), "%lld sources, but no list",
              (long long)state->n_sources);
  for (int64_t i = 0; i < state->n_sources; i++) {
    const sfa_index_source *s = &state->sources[i];
    SFA_REQUIRE(w->ctx,
                s->name && s->first_byte >= byte && s->n_bytes >= 0 && s->n_bytes <= INT64_MAX / 2 - s->first_byte &&
                    s->first_token >= token && s->n_tokens >= 0 && s->first_token <= state->n_tokens &&
                    s->n_tokens <= state->n_tokens - s->first_token,
                "source %lld (%s): bytes %lld + %lld, tokens %lld + %lld overlap the one before or go beyond the %lld tokens", (long long)i,
                s->name ? s->name : "no name", (long long)s->first_byte, (long long)s->n_bytes, (long long)s->first_token,
                (long long)s->n_tokens, (long long)state->n_tokens);
    byte = s->first_byte + s->n_bytes;
    token = s->first_token + s->n_tokens;
  }
  return SFA_OK;
}

/* Does the state go on from what the file holds? */
static sfa_status check_goes_on(const sfa_index_writer *w, const sfa_index *index, const sfa_index_state *state) {
  SFA_TRY(sfa_index_settings_match(index, state->settings));
  int64_t n = sfa_min64(index->n_tokens, state->n_tokens), same = 0;
  while (same < n && index->tokens[same] == state->tokens[same])
    same++;
  SFA_REQUIRE(w->ctx, same == index->n_tokens,
              "%s holds %lld tokens of a text that goes on otherwise from token %lld: save under another name, or delete it first", w->path,
              (long long)index->n_tokens, (long long)same);
  return SFA_OK;
}

/* From the state that the file holds to the new one; `index` is NULL for a file that holds none. *old_bytes: what to go back to. */
static sfa_status commit(const sfa_index_writer *w, const sfa_index *index, const sfa_index_state *state, const new_sources *sources,
                         uint64_t *old_bytes) {
  sfa_index_slot slot = {.n_tokens = (uint64_t)state->n_tokens, .n_sources = sources->n};
  sfa_index_segment head = {.magic = SFA_SEGMENT_MAGIC};
  uint64_t at;
  if (index) {
    at = *old_bytes = index->slot.bytes;
    head.previous = index->slot.segment;
    head.first_token = index->slot.n_tokens;
    head.first_source = index->slot.n_sources;
    slot.sequence = index->slot.sequence;
    slot.n_sources += head.first_source;
  } else {
    *old_bytes = 0;
    SFA_TRY(write_settings(w, state->settings, &at));
  }
  at = (at + SFA_INDEX_ALIGN - 1) / SFA_INDEX_ALIGN * SFA_INDEX_ALIGN;
  head.n_tokens = slot.n_tokens - head.first_token;
  SFA_TRY(write_segment(w, state, sources, at, &head));
  SFA_TRY(confirm(w));
  slot.sequence++;
  slot.bytes = head.end;
  slot.segment = at;
  seal(&slot, sizeof slot);
  SFA_TRY(write_at(w, &slot, sizeof slot, (1 + slot.sequence % 2) * SFA_INDEX_SLOT_BYTES));
  *old_bytes = slot.bytes; /* from here on the new state may be the one that counts */
  SFA_TRY(confirm(w));
  if (!index)
    confirm_folder(w);
  return SFA_OK;
}

sfa_status sfa_index_writer_commit(sfa_index_writer *w, const sfa_index_state *state) {
  SFA_TRY(check_state(w, state));
  bool fresh;
  sfa_index *index = NULL;
  SFA_TRY(sfa_index_is_unfinished(w->ctx, w->path, &fresh));
  if (!fresh)
    SFA_TRY(sfa_index_open(w->ctx, w->path, &index));
  sfa_status status = index ? check_goes_on(w, index, state) : SFA_OK;
  new_sources sources = find_new_sources(index, state);
  if (status == SFA_OK && (!index || state->n_tokens > index->n_tokens || sources.n)) {
    uint64_t old_bytes = 0;
    status = commit(w, index, state, &sources, &old_bytes);
    if (status != SFA_OK && ftruncate(w->file, (off_t)old_bytes) != 0) /* gives the room back; what lies there never counts */
      sfa_log(w->ctx, "%s stays longer than it need be: %s", w->path, strerror(errno));
  }
  sfa_index_close(index);
  return status;
}
