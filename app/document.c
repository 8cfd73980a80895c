/* Documents: a file as it is, or a folder of text and code as one text, each file under a heading with its name. */
#include "document.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- One file ---------------------------------------------------------------------------------------------------------------- */

static int read_stream(FILE *file, const char *name, text_buffer *text) {
  char block[1 << 16];
  size_t n;
  bool memory = text_append(text, "", 0);
  while (memory && (n = fread(block, 1, sizeof block, file)) > 0)
    memory = text_append(text, block, n);
  if (!memory)
    return app_fail("out of memory for the text of %s", name);
  return ferror(file) ? app_fail("cannot read %s: %s", name, strerror(errno)) : EXIT_OK;
}

static int read_file(const char *path, text_buffer *text) {
  FILE *file = fopen(path, "rb");
  if (!file)
    return app_fail("cannot open %s: %s", path, strerror(errno));
  int status = read_stream(file, path, text);
  fclose(file);
  return status;
}

/* What was added to the text from first_byte on is a part of this name. */
static int add_part(app_document *doc, const char *name, size_t first_byte) {
  if ((doc->n_parts & (doc->n_parts - 1)) == 0) { /* full at 0, 1, 2, 4, ...: double it */
    document_part *more = realloc(doc->parts, sizeof *more * (doc->n_parts ? 2 * doc->n_parts : 1));
    if (!more)
      return app_fail("out of memory for the parts of a document");
    doc->parts = more;
  }
  char *copy = strdup(name);
  if (!copy)
    return app_fail("out of memory for the parts of a document");
  doc->parts[doc->n_parts++] = (document_part){copy, first_byte, doc->text.n - first_byte};
  return EXIT_OK;
}

/* ---- A folder ---------------------------------------------------------------------------------------------------------------- */

/* Text that is looked at in one go; more is a data file, or a mistake. */
enum { MOST_FILE_BYTES = 16 << 20, MOST_TEXT_BYTES = 1 << 30 };

static int by_bytes(const struct dirent **a, const struct dirent **b) { return strcmp((*a)->d_name, (*b)->d_name); }

/* One file under its heading, "==> name <==" as head(1) prints it, with an empty line behind it. name: from the folder on. */
static int add_file(app_document *doc, const char *path, const char *name, const struct stat *info) {
  if (info->st_size > MOST_FILE_BYTES) {
    doc->n_large++;
    return EXIT_OK;
  }
  size_t start = doc->text.n;
  char heading[DOCUMENT_PATH_BYTES + 16];
  snprintf(heading, sizeof heading, "==> %s <==\n", name);
  if (!text_append(&doc->text, heading, strlen(heading)))
    return app_fail("out of memory for the text of %s", path);
  size_t body = doc->text.n;
  int status = read_file(path, &doc->text);
  if (status)
    return status;
  size_t n = doc->text.n - body;
  bool binary = memchr(doc->text.bytes + body, 0, n) != NULL;
  if (n == 0 || binary) {
    doc->text.n = start;
    *(binary ? &doc->n_binary : &doc->n_empty) += 1;
    return EXIT_OK;
  }
  if (!text_append(&doc->text, "\n\n", doc->text.bytes[doc->text.n - 1] == '\n' ? 1 : 2))
    return app_fail("out of memory for the text of %s", path);
  if (doc->text.n > MOST_TEXT_BYTES)
    return app_fail("the texts from the start to %s are more than %d MB; name a smaller folder", path, MOST_TEXT_BYTES >> 20);
  return add_part(doc, name, start);
}

/* path: of a folder; its files are called by what follows skip bytes. */
static int walk(app_document *doc, const char *path, size_t skip) {
  struct dirent **entries;
  int n = scandir(path, &entries, NULL, by_bytes), status = EXIT_OK;
  if (n < 0)
    return app_fail("cannot read the folder %s: %s", path, strerror(errno));
  for (int i = 0; i < n; i++) {
    const char *name = entries[i]->d_name;
    char inner[DOCUMENT_PATH_BYTES];
    struct stat info;
    int len = snprintf(inner, sizeof inner, "%s/%s", path, name);
    if (status || strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
      ;
    else if (name[0] == '.')
      doc->n_hidden++;
    else if (len >= (int)sizeof inner)
      status = app_fail("the path %s/%s is too long", path, name);
    else if (lstat(inner, &info) != 0)
      status = app_fail("cannot read %s: %s", inner, strerror(errno));
    else if (S_ISDIR(info.st_mode))
      status = walk(doc, inner, skip);
    else if (S_ISREG(info.st_mode))
      status = add_file(doc, inner, inner + skip, &info);
    else if (S_ISLNK(info.st_mode))
      doc->n_links++; /* may lead out of the folder, or round in it */
    else
      doc->n_other++;
    free(entries[i]);
  }
  free(entries);
  return status;
}

static int read_folder(const char *path, app_document *doc) {
  char root[DOCUMENT_PATH_BYTES];
  size_t len = strlen(path);
  while (len > 1 && path[len - 1] == '/')
    len--;
  if (snprintf(root, sizeof root, "%.*s", (int)len, path) >= (int)sizeof root)
    return app_fail("the path %s is too long", path);
  doc->is_folder = true;
  int status = text_append(&doc->text, "", 0) ? walk(doc, root, strlen(root) + 1) : app_fail("out of memory for a text");
  char left_out[256];
  if (!status && doc->n_parts == 0)
    status = app_fail("%s holds no text%s%s", path, *document_left_out(doc, left_out, sizeof left_out) ? "; left out: " : "", left_out);
  return status;
}

/* ---- Both -------------------------------------------------------------------------------------------------------------------- */

int document_read(const char *path, app_document *doc) {
  struct stat info;
  if (strcmp(path, "-") != 0 && stat(path, &info) == 0 && S_ISDIR(info.st_mode))
    return read_folder(path, doc);
  int status = strcmp(path, "-") == 0 ? read_stream(stdin, "standard input", &doc->text) : read_file(path, &doc->text);
  return status ? status : add_part(doc, strcmp(path, "-") == 0 ? "standard input" : path, 0);
}

void document_free(app_document *doc) {
  for (size_t i = 0; i < doc->n_parts; i++)
    free(doc->parts[i].name);
  free(doc->parts);
  free(doc->text.bytes);
  *doc = (app_document){0};
}

const char *document_left_out(const app_document *doc, char *out, size_t capacity) {
  const struct {
    int n;
    const char *what;
  } kinds[] = {{doc->n_hidden, "hidden"}, {doc->n_binary, "binary"}, {doc->n_large, "over 16 MB"},
               {doc->n_empty, "empty"},   {doc->n_links, "links"},   {doc->n_other, "neither file nor folder"}};
  size_t n = 0;
  *out = 0;
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
    if (kinds[i].n && n < capacity)
      n += (size_t)snprintf(out + n, capacity - n, "%s%d %s", n ? ", " : "", kinds[i].n, kinds[i].what);
  return out;
}
