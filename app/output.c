/* Messages, checked output, whole UTF-8 characters, growing arrays. */
#include "app.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

static void complain(const char *format, va_list args) {
  fflush(stdout);
  char line[1024];
  vsnprintf(line, sizeof line, format, args);
  for (char *c = line; *c; c++) /* one line, whatever a file name holds */
    if (*c == '\n' || *c == '\r')
      *c = ' ';
  fprintf(stderr, "sfa: %s\n", line);
}

int app_usage(const char *format, ...) {
  va_list args;
  va_start(args, format);
  complain(format, args);
  va_end(args);
  return EXIT_USAGE;
}

int app_fail(const char *format, ...) {
  va_list args;
  va_start(args, format);
  complain(format, args);
  va_end(args);
  return EXIT_FAILED;
}

void app_note(const char *format, ...) {
  va_list args;
  va_start(args, format);
  complain(format, args);
  va_end(args);
}

int app_fail_status(const sfa_context *ctx) { return app_fail("%s", sfa_context_error(ctx)); }

int app_flush(void) {
  errno = 0;
  if (fflush(stdout) == 0 && !ferror(stdout))
    return EXIT_OK;
  int reason = errno;
  clearerr(stdout);
  return app_fail("cannot write to standard output: %s", reason ? strerror(reason) : "an earlier write failed");
}

int app_print_json(cJSON *document) {
  char *text = document ? cJSON_PrintUnformatted(document) : NULL;
  cJSON_Delete(document);
  if (!text)
    return app_fail("out of memory for the JSON output");
  fputs(text, stdout);
  putchar('\n');
  cJSON_free(text);
  return app_flush();
}

int app_save_json(const char *path, cJSON *document) {
  char *text = document ? cJSON_Print(document) : NULL;
  cJSON_Delete(document);
  if (!text)
    return app_fail("out of memory for %s", path);
  FILE *file = fopen(path, "w");
  bool written = file && fputs(text, file) >= 0 && fputc('\n', file) >= 0;
  int reason = errno;
  if (file && fclose(file) != 0 && written) {
    written = false;
    reason = errno;
  }
  cJSON_free(text);
  return written ? EXIT_OK : app_fail("cannot write %s: %s", path, strerror(reason));
}

int app_make_folder(const char *path) {
  struct stat info;
  if (mkdir(path, 0777) == 0 || (errno == EEXIST && stat(path, &info) == 0 && S_ISDIR(info.st_mode)))
    return EXIT_OK;
  return app_fail("cannot make the folder %s: %s", path, strerror(errno));
}

int app_path(const char *folder, const char *name, char path[APP_PATH_BYTES]) {
  return snprintf(path, APP_PATH_BYTES, "%s/%s", folder, name) < APP_PATH_BYTES
             ? EXIT_OK
             : app_fail("the name of the folder is too long: %s", folder);
}

/* ---- UTF-8 ------------------------------------------------------------------------------------------------------------------- */

/* Bytes of the character that starts with `lead`; 0 if none does. */
static int utf8_len(unsigned char lead) {
  return lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
}

/* Can `next` be byte `index` (from 1) after `lead`? Excludes overlong forms, surrogates and what is beyond U+10FFFF. */
static bool utf8_follows(unsigned char lead, int index, unsigned char next) {
  unsigned char low = 0x80, high = 0xbf;
  if (index == 1) {
    low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : low;
    high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : high;
  }
  return next >= low && next <= high;
}

static size_t utf8_replacement(char *out) {
  memcpy(out, "\xef\xbf\xbd", 3);
  return 3;
}

size_t utf8_push(utf8_stream *s, const char *bytes, size_t n, bool final, char *out) {
  size_t written = 0;
  for (size_t i = 0; i < n; i++) {
    unsigned char byte = (unsigned char)bytes[i];
    if (s->n_pending && !utf8_follows((unsigned char)s->pending[0], s->n_pending, byte)) {
      written += utf8_replacement(out + written);
      s->n_pending = 0;
    }
    if (!s->n_pending && !utf8_len(byte)) {
      written += utf8_replacement(out + written);
      continue;
    }
    s->pending[s->n_pending++] = (char)byte;
    if (s->n_pending == utf8_len((unsigned char)s->pending[0])) {
      memcpy(out + written, s->pending, (size_t)s->n_pending);
      written += (size_t)s->n_pending;
      s->n_pending = 0;
    }
  }
  if (final && s->n_pending) {
    written += utf8_replacement(out + written);
    s->n_pending = 0;
  }
  return written;
}

bool text_append(text_buffer *text, const char *bytes, size_t n) {
  if (text->n + n + 1 > text->capacity) {
    size_t capacity = 2 * (text->n + n + 1);
    char *more = realloc(text->bytes, capacity);
    if (!more)
      return false;
    text->bytes = more;
    text->capacity = capacity;
  }
  if (n)
    memcpy(text->bytes + text->n, bytes, n);
  text->n += n;
  text->bytes[text->n] = 0;
  return true;
}

bool list_append(int_list *list, int64_t value) {
  if ((list->n & (list->n - 1)) == 0) { /* full at 0, 1, 2, 4, ...: double it */
    int64_t *more = realloc(list->values, sizeof *more * (size_t)(list->n ? 2 * list->n : 1));
    if (!more)
      return false;
    list->values = more;
  }
  list->values[list->n++] = value;
  return true;
}

/* ---- Numbers ----------------------------------------------------------------------------------------------------------------- */

const char *human_bytes(double bytes, char out[32]) {
  static const char *const units[] = {"bytes", "kB", "MB", "GB", "TB"};
  int unit = 0;
  while (bytes >= 1000 && unit < 4) {
    bytes /= 1000;
    unit++;
  }
  snprintf(out, 32, "%.*f %s", unit && bytes < 100, bytes, units[unit]);
  return out;
}

double seconds_now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}
