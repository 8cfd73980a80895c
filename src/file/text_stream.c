/* Bytes of plain and compressed files: one loop over a table of decoders. */
#include "file/text_stream.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#ifdef SFA_HAVE_BZIP2
#include <bzlib.h>
#endif
#ifdef SFA_HAVE_LZMA
#include <lzma.h>
#endif

enum { IN_BYTES = 1 << 18, MAGIC_BYTES = 6 };

/* What a decoder takes and gives. */
typedef struct window {
  const uint8_t *in;
  size_t n_in;
  uint8_t *out;
  size_t n_out;
} window;

typedef enum step { STEP_MORE, STEP_END, STEP_DAMAGED, STEP_MEMORY } step;

typedef struct decoder {
  const char *name, *library;
  const char *magic;
  size_t magic_bytes;
  bool (*begin)(sfa_text_stream *s); /* NULL: this build lacks the library */
  step (*run)(sfa_text_stream *s, window *w, bool no_more_input);
  void (*end)(sfa_text_stream *s);
} decoder;

struct sfa_text_stream {
  sfa_context *ctx;
  char *path;
  int file;
  const decoder *decoder; /* NULL: plain */
  bool begun;             /* the decoder has state */
  bool file_ended, ended;
  uint8_t *in; /* [IN_BYTES], bytes in_at .. in_end - 1 are to be decoded */
  size_t in_at, in_end;
  int64_t position;
#ifdef SFA_HAVE_BZIP2
  bz_stream bzip2;
#endif
#ifdef SFA_HAVE_LZMA
  lzma_stream lzma;
  lzma_allocator lzma_memory;
#endif
};

/* ---- bzip2 ------------------------------------------------------------------------------------------------------------------- */

#ifdef SFA_HAVE_BZIP2
static void *bzip2_alloc(void *user, int n, int size) {
  sfa_context *ctx = user;
  size_t bytes;
  return n >= 0 && size >= 0 && sfa_mul_size((size_t)n, (size_t)size, &bytes) ? ctx->allocator.alloc(ctx->allocator.user, bytes) : NULL;
}

static void bzip2_free(void *user, void *memory) { sfa_free(user, memory); }

static bool bzip2_begin(sfa_text_stream *s) {
  s->bzip2 = (bz_stream){.bzalloc = bzip2_alloc, .bzfree = bzip2_free, .opaque = s->ctx};
  return BZ2_bzDecompressInit(&s->bzip2, 0, 0) == BZ_OK;
}

static void bzip2_end(sfa_text_stream *s) { BZ2_bzDecompressEnd(&s->bzip2); }

static step bzip2_run(sfa_text_stream *s, window *w, bool no_more_input) {
  if (!s->begun) { /* behind the end of one: files that were joined are one */
    if (w->n_in == 0)
      return no_more_input ? STEP_END : STEP_MORE;
    if (!(s->begun = bzip2_begin(s)))
      return STEP_MEMORY;
  }
  s->bzip2.next_in = (char *)(uintptr_t)w->in;
  s->bzip2.avail_in = (unsigned)w->n_in;
  s->bzip2.next_out = (char *)w->out;
  s->bzip2.avail_out = (unsigned)w->n_out;
  int rc = BZ2_bzDecompress(&s->bzip2);
  bool stuck = no_more_input && s->bzip2.avail_in == 0 && s->bzip2.avail_out == w->n_out; /* the end is missing */
  *w = (window){w->in + w->n_in - s->bzip2.avail_in, s->bzip2.avail_in, w->out + w->n_out - s->bzip2.avail_out, s->bzip2.avail_out};
  if (rc == BZ_STREAM_END) {
    bzip2_end(s);
    s->begun = false;
    return STEP_MORE;
  }
  return rc == BZ_MEM_ERROR ? STEP_MEMORY : rc != BZ_OK || stuck ? STEP_DAMAGED : STEP_MORE;
}
#endif

/* ---- xz ---------------------------------------------------------------------------------------------------------------------- */

#ifdef SFA_HAVE_LZMA
enum { LZMA_MOST_BYTES = 1 << 30 }; /* xz -9 wants 65 MB */

static void *lzma_allocate(void *user, size_t n, size_t size) {
  sfa_context *ctx = user;
  size_t bytes;
  return sfa_mul_size(n, size, &bytes) ? ctx->allocator.alloc(ctx->allocator.user, bytes) : NULL;
}

static void lzma_release(void *user, void *memory) { sfa_free(user, memory); }

static bool lzma_begin(sfa_text_stream *s) {
  s->lzma_memory = (lzma_allocator){lzma_allocate, lzma_release, s->ctx};
  s->lzma = (lzma_stream)LZMA_STREAM_INIT;
  s->lzma.allocator = &s->lzma_memory;
  return lzma_stream_decoder(&s->lzma, LZMA_MOST_BYTES, LZMA_CONCATENATED) == LZMA_OK;
}

static void lzma_finish(sfa_text_stream *s) { lzma_end(&s->lzma); }

static step lzma_run(sfa_text_stream *s, window *w, bool no_more_input) {
  s->lzma.next_in = w->in;
  s->lzma.avail_in = w->n_in;
  s->lzma.next_out = w->out;
  s->lzma.avail_out = w->n_out;
  lzma_ret rc = lzma_code(&s->lzma, no_more_input ? LZMA_FINISH : LZMA_RUN);
  *w = (window){s->lzma.next_in, s->lzma.avail_in, s->lzma.next_out, s->lzma.avail_out};
  if (rc == LZMA_STREAM_END)
    return STEP_END;
  return rc == LZMA_OK ? STEP_MORE : rc == LZMA_MEM_ERROR || rc == LZMA_MEMLIMIT_ERROR ? STEP_MEMORY : STEP_DAMAGED;
}
#endif

static const decoder decoders[] = {
#ifdef SFA_HAVE_BZIP2
    {"bzip2", "libbz2", "BZh", 3, bzip2_begin, bzip2_run, bzip2_end},
#else
    {.name = "bzip2", .library = "libbz2", .magic = "BZh", .magic_bytes = 3},
#endif
#ifdef SFA_HAVE_LZMA
    {"xz", "liblzma",
     "\xfd"
     "7zXZ",
     6, lzma_begin, lzma_run, lzma_finish},
#else
    {.name = "xz",
     .library = "liblzma",
     .magic = "\xfd"
              "7zXZ",
     .magic_bytes = 6},
#endif
};

/* ---- The stream -------------------------------------------------------------------------------------------------------------- */

/* Reads until the buffer has at least `need` bytes to be decoded, or the file ends. */
static sfa_status read_input(sfa_text_stream *s, size_t need) {
  if (s->in_at) {
    memmove(s->in, s->in + s->in_at, s->in_end - s->in_at);
    s->in_end -= s->in_at;
    s->in_at = 0;
  }
  while (s->in_end < need && !s->file_ended) {
    ssize_t n = read(s->file, s->in + s->in_end, IN_BYTES - s->in_end);
    if (n < 0 && errno == EINTR)
      continue;
    if (n < 0)
      return sfa_fail(s->ctx, SFA_ERROR_IO, "cannot read %s: %s", s->path, strerror(errno));
    s->file_ended = n == 0;
    s->in_end += (size_t)n;
    s->position += n;
  }
  return SFA_OK;
}

static sfa_status choose_decoder(sfa_text_stream *s) {
  SFA_TRY(read_input(s, MAGIC_BYTES));
  for (const decoder *d = decoders; d < decoders + sizeof decoders / sizeof *decoders; d++)
    if (s->in_end >= d->magic_bytes && memcmp(s->in, d->magic, d->magic_bytes) == 0)
      s->decoder = d;
  if (!s->decoder)
    return SFA_OK;
  if (!s->decoder->begin)
    return sfa_fail(s->ctx, SFA_ERROR_UNSUPPORTED,
                    "%s is compressed by %s, and sfa was built without %s: decompress it first, or install %s's headers and build again",
                    s->path, s->decoder->name, s->decoder->library, s->decoder->library);
  s->begun = s->decoder->begin(s);
  return s->begun ? SFA_OK : sfa_fail(s->ctx, SFA_ERROR_MEMORY, "out of memory for decompressing %s", s->path);
}

sfa_status sfa_text_stream_open(sfa_context *ctx, const char *path, sfa_text_stream **out) {
  *out = NULL;
  sfa_text_stream *s;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *s, "a text file", (void **)&s));
  s->ctx = ctx;
  s->file = strcmp(path, "-") == 0 ? STDIN_FILENO : open(path, O_RDONLY | O_CLOEXEC);
  sfa_status status = s->file >= 0 ? SFA_OK : sfa_fail(ctx, SFA_ERROR_IO, "cannot open %s: %s", path, strerror(errno));
  if (status == SFA_OK)
    status = sfa_strdup(ctx, strcmp(path, "-") == 0 ? "standard input" : path, &s->path);
  if (status == SFA_OK)
    status = sfa_alloc(ctx, IN_BYTES, "a text file", (void **)&s->in);
  if (status == SFA_OK)
    status = choose_decoder(s);
  if (status == SFA_OK)
    *out = s;
  else
    sfa_text_stream_close(s);
  return status;
}

static sfa_status read_plain(sfa_text_stream *s, uint8_t *out, size_t capacity, size_t *n) {
  SFA_TRY(read_input(s, 1));
  *n = s->in_end - s->in_at < capacity ? s->in_end - s->in_at : capacity;
  if (*n)
    memcpy(out, s->in + s->in_at, *n);
  s->in_at += *n;
  return SFA_OK;
}

sfa_status sfa_text_stream_read(sfa_text_stream *s, uint8_t *out, size_t capacity, size_t *n) {
  *n = 0;
  if (!s->decoder)
    return read_plain(s, out, capacity, n);
  while (*n == 0 && !s->ended) {
    if (s->in_at == s->in_end)
      SFA_TRY(read_input(s, 1));
    window w = {s->in + s->in_at, s->in_end - s->in_at, out, capacity < IN_BYTES ? capacity : IN_BYTES};
    size_t room = w.n_out;
    switch (s->decoder->run(s, &w, s->file_ended)) {
    case STEP_END: s->ended = true; break;
    case STEP_MORE: break;
    case STEP_MEMORY: return sfa_fail(s->ctx, SFA_ERROR_MEMORY, "out of memory for decompressing %s", s->path);
    case STEP_DAMAGED:
      return sfa_fail(s->ctx, SFA_ERROR_FORMAT, "%s is damaged or cut short (%s, before byte %lld): fetch it again", s->path,
                      s->decoder->name, (long long)s->position);
    }
    s->in_at = s->in_end - w.n_in;
    *n = room - w.n_out;
  }
  return SFA_OK;
}

int64_t sfa_text_stream_position(const sfa_text_stream *s) { return s->position - (int64_t)(s->in_end - s->in_at); }

void sfa_text_stream_close(sfa_text_stream *s) {
  if (!s)
    return;
  if (s->begun)
    s->decoder->end(s);
  if (s->file >= 0 && s->file != STDIN_FILENO)
    close(s->file);
  sfa_free(s->ctx, s->in);
  sfa_free(s->ctx, s->path);
  sfa_free(s->ctx, s);
}
