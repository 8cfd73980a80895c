/* Documents from text files: one buffer, in which the current document is looked for its end. */
#include "file/text_read.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

#include "file/json.h"
#include "file/table.h"
#include "file/text_stream.h"

typedef struct input {
  const char *path;
  int64_t bytes;
  bool rows; /* .jsonl */
} input;

struct sfa_text_reader {
  sfa_context *ctx;
  const sfa_text_inputs *inputs;
  sfa_arena arena; /* paths, the separator, the field */
  const char *separator, *field;
  size_t separator_len, piece_len;
  input *list; /* [n_inputs] */
  int64_t n_inputs, capacity, current;
  int64_t done, total; /* bytes of the files before the current one, of all */
  bool endless;        /* standard input is among them */

  sfa_text_stream *stream; /* of the current file; NULL: to be opened */
  uint8_t *buffer;         /* bytes start .. end - 1 were not given yet, start .. scanned - 1 hold no separator (no line end of a row) */
  size_t buffer_bytes, start, scanned, end;
  bool ended;       /* the stream has no more */
  bool line_start;  /* `start` begins a line */
  bool in_document; /* a piece of the current document was given */
  int64_t line;     /* of a .jsonl, from 1 */

  cJSON *row; /* whose text is given in pieces: bytes row_at .. */
  const char *row_text;
  size_t row_at, row_bytes;
};

/* ---- The list of files ------------------------------------------------------------------------------------------------------- */

static bool ends_with(const char *name, size_t len, const char *end) {
  size_t n = strlen(end);
  return len > n && strncasecmp(name + len - n, end, n) == 0;
}

/* Of a name without .bz2 and .xz: is it text, and is it one of rows? */
static bool is_text_name(const char *name, bool *rows) {
  static const char *const texts[] = {".txt", ".md"}, *const row_files[] = {".jsonl", ".ndjson"};
  size_t len = strlen(name);
  len -= ends_with(name, len, ".bz2") ? 4 : ends_with(name, len, ".xz") ? 3 : 0;
  *rows = ends_with(name, len, row_files[0]) || ends_with(name, len, row_files[1]);
  return *rows || ends_with(name, len, texts[0]) || ends_with(name, len, texts[1]);
}

static sfa_status add_input(sfa_text_reader *r, const char *path, int64_t bytes) {
  SFA_TRY(sfa_list_grow(r->ctx, (void **)&r->list, r->n_inputs, &r->capacity, sizeof *r->list, "a list of files"));
  input *in = &r->list[r->n_inputs];
  *in = (input){.bytes = bytes};
  SFA_TRY(sfa_arena_text(r->ctx, &r->arena, path, strlen(path), &in->path));
  is_text_name(path, &in->rows);
  if (r->inputs->format != SFA_TEXT_AUTO)
    in->rows = r->inputs->format == SFA_TEXT_ROWS;
  r->total += bytes;
  r->n_inputs++;
  return SFA_OK;
}

enum { PATH_BYTES = 4096, FOLDERS_DEEP = 64 };

typedef struct entry {
  const char *name; /* a path */
} entry;

static int by_bytes(const void *a, const void *b) { return strcmp(((const entry *)a)->name, ((const entry *)b)->name); }

/* Paths of what is in a folder, but for what begins with a dot. */
static sfa_status list_folder(sfa_text_reader *r, const char *path, sfa_table *names) {
  DIR *folder = opendir(path);
  if (!folder)
    return sfa_fail(r->ctx, SFA_ERROR_IO, "cannot read the folder %s: %s", path, strerror(errno));
  sfa_status status = SFA_OK;
  for (struct dirent *in = readdir(folder); in && status == SFA_OK; in = readdir(folder)) {
    char whole[PATH_BYTES];
    const char *kept;
    void *item;
    bool added;
    if (in->d_name[0] == '.')
      continue;
    if (snprintf(whole, sizeof whole, "%s/%s", path, in->d_name) >= (int)sizeof whole)
      status = sfa_fail(r->ctx, SFA_ERROR_IO, "the path %s/%s is too long", path, in->d_name);
    if (status == SFA_OK)
      status = sfa_arena_text(r->ctx, &r->arena, whole, strlen(whole), &kept);
    if (status == SFA_OK)
      status = sfa_table_add(r->ctx, names, kept, &item, &added);
  }
  closedir(folder);
  return status;
}

static sfa_status add_path(sfa_text_reader *r, const char *path, int depth);

/* The text files of a folder and of those in it, in the order of their names' bytes. Links are followed, so the depth is bounded. */
static sfa_status add_folder(sfa_text_reader *r, const char *path, int depth) {
  if (depth > FOLDERS_DEEP)
    return sfa_fail(r->ctx, SFA_ERROR_IO, "%s is more than %d folders deep: a link leads round in it", path, FOLDERS_DEEP);
  sfa_table names = {.item_bytes = sizeof(entry)};
  sfa_status status = list_folder(r, path, &names);
  if (names.count)
    qsort(names.items, (size_t)names.count, sizeof(entry), by_bytes);
  for (int64_t i = 0; i < names.count && status == SFA_OK; i++) {
    const char *name = ((const entry *)(const void *)names.items)[i].name;
    struct stat info;
    bool rows;
    if (stat(name, &info) == 0 && (S_ISDIR(info.st_mode) || is_text_name(name, &rows)))
      status = add_path(r, name, depth + 1);
  }
  sfa_table_free(r->ctx, &names);
  return status;
}

static sfa_status add_path(sfa_text_reader *r, const char *path, int depth) {
  struct stat info;
  if (strcmp(path, "-") == 0) {
    r->endless = true;
    return add_input(r, path, 0);
  }
  if (stat(path, &info) != 0)
    return sfa_fail(r->ctx, SFA_ERROR_IO, "cannot open %s: %s", path, strerror(errno));
  return S_ISDIR(info.st_mode) ? add_folder(r, path, depth) : add_input(r, path, info.st_size);
}

sfa_status sfa_text_reader_open(sfa_context *ctx, const sfa_text_inputs *inputs, size_t piece_len, sfa_text_reader **out) {
  *out = NULL;
  const char *separator = inputs->separator ? inputs->separator : "<|endoftext|>", *field = inputs->field ? inputs->field : "text";
  SFA_REQUIRE(ctx, inputs->struct_size == sizeof *inputs, "sfa_text_inputs.struct_size is %zu, not %zu", inputs->struct_size,
              sizeof *inputs);
  SFA_REQUIRE(ctx, inputs->paths && inputs->n_paths > 0, "name at least one file or folder with text");
  SFA_REQUIRE(ctx, strlen(separator) <= SFA_TEXT_SEPARATOR_BYTES && !strchr(separator, '\n'),
              "the separator of documents is one line of at most %d bytes", SFA_TEXT_SEPARATOR_BYTES);
  SFA_REQUIRE(ctx, *field, "the field of a row has no name");
  SFA_REQUIRE(ctx, inputs->format >= SFA_TEXT_AUTO && inputs->format <= SFA_TEXT_ROWS, "there is no text format %d", inputs->format);
  sfa_text_reader *r;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *r, "a reader of texts", (void **)&r));
  *r = (sfa_text_reader){.ctx = ctx, .inputs = inputs, .separator_len = strlen(separator), .piece_len = piece_len};
  r->buffer_bytes = 2 * (size_t)SFA_TEXT_PIECE_BYTES; /* a piece, and room for what may be a separator behind it */
  sfa_status status = sfa_arena_text(ctx, &r->arena, separator, r->separator_len, &r->separator);
  if (status == SFA_OK)
    status = sfa_arena_text(ctx, &r->arena, field, strlen(field), &r->field);
  if (status == SFA_OK)
    status = sfa_alloc(ctx, r->buffer_bytes, "a piece of text", (void **)&r->buffer);
  for (int64_t i = 0; i < inputs->n_paths && status == SFA_OK; i++)
    status = inputs->paths[i] ? add_path(r, inputs->paths[i], 0) : sfa_fail(ctx, SFA_ERROR_ARGUMENT, "path %lld is NULL", (long long)i);
  if (status == SFA_OK && r->n_inputs == 0)
    status = sfa_fail(
        ctx, SFA_ERROR_IO,
        "%s holds no text: files of a folder are taken if they end in .txt, .md, .jsonl or .ndjson, or in one of these and .bz2 or .xz",
        inputs->paths[0]);
  if (status == SFA_OK)
    *out = r;
  else
    sfa_text_reader_close(r);
  return status;
}

void sfa_text_reader_close(sfa_text_reader *r) {
  if (!r)
    return;
  sfa_text_stream_close(r->stream);
  cJSON_Delete(r->row);
  sfa_arena_free(r->ctx, &r->arena);
  sfa_free(r->ctx, r->list);
  sfa_free(r->ctx, r->buffer);
  sfa_free(r->ctx, r);
}

void sfa_text_reader_progress(const sfa_text_reader *r, int64_t *done, int64_t *total) {
  *done = r->done + (r->stream ? sfa_text_stream_position(r->stream) : 0);
  *total = r->endless ? 0 : r->total;
}

/* ---- Bytes ------------------------------------------------------------------------------------------------------------------- */

/* More bytes of the file behind those in the buffer, which has room for them. */
static sfa_status read_more(sfa_text_reader *r) {
  if (r->start) {
    memmove(r->buffer, r->buffer + r->start, r->end - r->start);
    r->end -= r->start;
    r->scanned -= r->start;
    r->start = 0;
  }
  size_t n;
  SFA_TRY(sfa_text_stream_read(r->stream, r->buffer + r->end, r->buffer_bytes - r->end, &n));
  r->ended = n == 0;
  r->end += n;
  return SFA_OK;
}

static bool is_letter(uint8_t c) { return (uint8_t)((c | 0x20) - 'a') < 26; }

/* Where to cut text[0..n), n > 1, so that both parts tokenize as the whole: between letters if there is such a place in the second half;
 * else before white space, else between two characters. */
static size_t find_cut(const uint8_t *text, size_t n) {
  for (size_t i = n - 1; i > n / 2 && i > 1; i--)
    if (text[i - 1] == ' ' && is_letter(text[i]) && is_letter(text[i - 2]))
      return i - 1;
  for (size_t i = n - 1; i > n / 2; i--)
    if ((text[i] == ' ' || text[i] == '\n') && text[i - 1] != ' ' && text[i - 1] != '\n')
      return i;
  for (size_t i = n; i > n - 4 && i > 1; i--) /* a UTF-8 character has at most 3 bytes behind its first */
    if ((text[i - 1] & 0xc0) != 0x80)
      return i - 1;
  return n;
}

/* ---- Texts ------------------------------------------------------------------------------------------------------------------- */

/* Looks for a separator line in what was not looked at. It is at *at, and what follows it begins at *behind; else `scanned` is where one
 * could still begin. */
static bool find_separator(sfa_text_reader *r, size_t *at, size_t *behind) {
  const size_t n = r->separator_len;
  while (n && r->scanned + n <= r->end) {
    const uint8_t *hit = memmem(r->buffer + r->scanned, r->end - r->scanned, r->separator, n);
    if (!hit) {
      r->scanned = r->end - n + 1;
      break;
    }
    size_t p = (size_t)(hit - r->buffer), after = p + n;
    bool begins_line = p == r->start ? r->line_start : r->buffer[p - 1] == '\n';
    after += after < r->end && r->buffer[after] == '\r';
    r->scanned = p;
    if (begins_line && after == r->end && !r->ended)
      return false;
    if (begins_line && (after == r->end || r->buffer[after] == '\n')) {
      *at = p;
      *behind = after + (after < r->end);
      return true;
    }
    r->scanned++;
  }
  if (n == 0 || r->ended)
    r->scanned = r->end;
  return false;
}

/* Hands out start .. cut - 1, and goes on at `next`. */
static void give(sfa_text_reader *r, size_t cut, size_t next, bool ends, sfa_text_piece *piece) {
  *piece = (sfa_text_piece){r->buffer + r->start, cut - r->start, ends};
  r->line_start = next > r->start ? r->buffer[next - 1] == '\n' : r->line_start;
  r->start = next;
  r->scanned = r->scanned < next ? next : r->scanned;
  r->in_document = !ends;
}

/* The next piece of the current file; piece->text stays NULL at its end. */
static sfa_status next_of_text(sfa_text_reader *r, sfa_text_piece *piece) {
  for (;;) {
    size_t stop, behind = 0;
    bool found = find_separator(r, &stop, &behind);
    if (!found) {
      stop = r->scanned;
      behind = r->end;
    }
    size_t n = stop - r->start;
    if (n > r->piece_len) {
      size_t cut = r->start + find_cut(r->buffer + r->start, r->piece_len);
      give(r, cut, cut, false, piece);
      return SFA_OK;
    }
    if (found || r->ended) {
      bool empty = n == 0 && !r->in_document;
      give(r, stop, behind, true, piece);
      if (!empty)
        return SFA_OK;
      piece->text = NULL;
      if (!found)
        return SFA_OK;
    } else {
      SFA_TRY(read_more(r));
    }
  }
}

/* ---- Rows -------------------------------------------------------------------------------------------------------------------- */

/* The next line of the file, without its end; *line is NULL behind the last. */
static sfa_status next_line(sfa_text_reader *r, const char **line, size_t *bytes) {
  *line = NULL;
  for (;;) {
    const uint8_t *end = r->scanned < r->end ? memchr(r->buffer + r->scanned, '\n', r->end - r->scanned) : NULL;
    if (!end && r->ended && r->start == r->end)
      return SFA_OK;
    if (end || r->ended) {
      *line = (const char *)r->buffer + r->start;
      *bytes = end ? (size_t)(end - r->buffer) - r->start : r->end - r->start;
      r->start = r->scanned = r->start + *bytes + (end != NULL);
      r->line++;
      return SFA_OK;
    }
    r->scanned = r->end;
    if (r->end - r->start == r->buffer_bytes) {
      uint8_t *larger;
      if (r->buffer_bytes >= SFA_TEXT_ROW_BYTES)
        return sfa_fail(r->ctx, SFA_ERROR_FORMAT, "%s: line %lld has more than %d MB: a row is one document; cut it into several",
                        r->list[r->current].path, (long long)r->line + 1, SFA_TEXT_ROW_BYTES >> 20);
      SFA_TRY(sfa_alloc(r->ctx, 2 * r->buffer_bytes, "a row of a .jsonl", (void **)&larger));
      memcpy(larger, r->buffer + r->start, r->end - r->start);
      sfa_free(r->ctx, r->buffer);
      r->buffer = larger;
      r->buffer_bytes *= 2;
    }
    SFA_TRY(read_more(r));
  }
}

static bool is_blank(const char *line, size_t bytes) {
  while (bytes && memchr(" \t\r", line[bytes - 1], 3))
    bytes--;
  return bytes == 0;
}

static sfa_status parse_row(sfa_text_reader *r, const char *line, size_t bytes) {
  char place[PATH_BYTES + 32];
  snprintf(place, sizeof place, "%s, line %lld", r->list[r->current].path, (long long)r->line);
  SFA_TRY(sfa_json_parse(r->ctx, place, line, bytes, &r->row));
  r->row_text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(r->row, r->field));
  if (!r->row_text)
    return sfa_fail(r->ctx, SFA_ERROR_FORMAT, "%s: the row has no text \"%s\"; name the field that has it", place, r->field);
  r->row_at = 0;
  r->row_bytes = strlen(r->row_text);
  return SFA_OK;
}

/* The next piece of the current file; piece->text stays NULL at its end. */
static sfa_status next_of_rows(sfa_text_reader *r, sfa_text_piece *piece) {
  while (r->row_at == r->row_bytes) {
    const char *line;
    size_t bytes;
    cJSON_Delete(r->row);
    r->row = NULL;
    SFA_TRY(next_line(r, &line, &bytes));
    if (!line)
      return SFA_OK;
    if (!is_blank(line, bytes))
      SFA_TRY(parse_row(r, line, bytes));
  }
  const uint8_t *text = (const uint8_t *)r->row_text + r->row_at;
  size_t n = r->row_bytes - r->row_at;
  bool ends = n <= r->piece_len;
  n = ends ? n : find_cut(text, r->piece_len);
  *piece = (sfa_text_piece){text, n, ends};
  r->row_at += n;
  return SFA_OK;
}

/* ---- Files in turn ----------------------------------------------------------------------------------------------------------- */

sfa_status sfa_text_reader_next(sfa_text_reader *r, sfa_text_piece *piece) {
  *piece = (sfa_text_piece){0};
  for (; r->current < r->n_inputs; r->current++) {
    const input *in = &r->list[r->current];
    if (!r->stream) {
      SFA_TRY(sfa_text_stream_open(r->ctx, in->path, &r->stream));
      r->start = r->scanned = r->end = r->row_at = r->row_bytes = 0;
      r->line = 0;
      r->ended = r->in_document = false;
      r->line_start = true;
    }
    SFA_TRY(in->rows ? next_of_rows(r, piece) : next_of_text(r, piece));
    if (piece->text && memchr(piece->text, 0, piece->bytes))
      return sfa_fail(r->ctx, SFA_ERROR_FORMAT,
                      "%s is no text: it has a byte 0. Name the texts alone, in UTF-8; what is packed, .bz2 or .xz", in->path);
    if (piece->text)
      return SFA_OK;
    r->done += sfa_text_stream_position(r->stream);
    sfa_text_stream_close(r->stream);
    r->stream = NULL;
  }
  return SFA_OK;
}
