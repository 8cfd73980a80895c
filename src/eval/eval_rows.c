/* The rows of a data file. The whole file is in memory: the largest of the field has 50 MB. */
#include "eval/eval_rows.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "file/json.h"

enum { READ_BYTES = 1 << 16 };

static sfa_status read_all(sfa_context *ctx, FILE *file, const char *path, sfa_bytes *text) {
  for (size_t n = READ_BYTES; n == READ_BYTES;) {
    SFA_TRY(sfa_array_reserve(ctx, (void **)&text->data, &text->capacity, text->len + READ_BYTES + 1, 1));
    n = fread(text->data + text->len, 1, READ_BYTES, file);
    text->len += n;
  }
  if (ferror(file))
    return sfa_fail(ctx, SFA_ERROR_IO, "cannot read %s: %s", path, strerror(errno));
  text->data[text->len] = '\0';
  return SFA_OK;
}

/* Where lines begin; their ends become zero bytes. */
static sfa_status find_lines(sfa_context *ctx, eval_rows *rows) {
  char *data = (char *)rows->text.data, *end = data + rows->text.len;
  int64_t number = 1;
  for (char *at = data; at < end; number++) {
    char *stop = memchr(at, '\n', (size_t)(end - at));
    stop = stop ? stop : end;
    size_t n = (size_t)(stop - at);
    if (n && at[n - 1] == '\r')
      at[--n] = '\0';
    if (memchr(at, 0, n))
      return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s, line %lld: a zero byte: the file is damaged, or no text", rows->path, (long long)number);
    *stop = '\0';
    if (n) {
      SFA_TRY(sfa_array_reserve(ctx, (void **)&rows->lines, &rows->capacity, rows->n_lines + 1, sizeof *rows->lines));
      rows->lines[rows->n_lines++] = (struct eval_line){(size_t)(at - data), number};
    }
    at = stop + 1;
  }
  return SFA_OK;
}

sfa_status sfa_eval_file_read(sfa_context *ctx, const char *path, sfa_bytes *text) {
  FILE *file = fopen(path, "rb");
  if (!file)
    return sfa_fail(ctx, SFA_ERROR_IO, "cannot open %s: %s", path, strerror(errno));
  sfa_status status = read_all(ctx, file, path, text);
  fclose(file);
  SFA_TRY(status);
  const char *head = (const char *)text->data;
  if (strncmp(head, "\x1f\x8b", 2) == 0 || strncmp(head, "BZh", 3) == 0 ||
      strncmp(head,
              "\xfd"
              "7z",
              3) == 0)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s is compressed: unpack it, or pipe it in, as in zcat FILE | sfa ... -f /dev/stdin", path);
  return SFA_OK;
}

static sfa_status read_rows(sfa_context *ctx, const char *path, eval_rows *rows) {
  SFA_TRY(sfa_strdup(ctx, path, &rows->path));
  SFA_TRY(sfa_eval_file_read(ctx, path, &rows->text));
  SFA_TRY(find_lines(ctx, rows));
  return rows->n_lines ? SFA_OK : sfa_fail(ctx, SFA_ERROR_FORMAT, "%s is empty: it holds no rows", path);
}

sfa_status sfa_eval_rows_read(sfa_context *ctx, const char *path, eval_rows *rows) {
  *rows = (eval_rows){0};
  sfa_status status = read_rows(ctx, path, rows);
  if (status != SFA_OK)
    sfa_eval_rows_free(ctx, rows);
  return status;
}

void sfa_eval_rows_free(sfa_context *ctx, eval_rows *rows) {
  sfa_free(ctx, rows->path);
  sfa_free(ctx, rows->text.data);
  sfa_free(ctx, rows->lines);
  *rows = (eval_rows){0};
}

/* ---- One row ------------------------------------------------------------------------------------------------------------------- */

sfa_status sfa_eval_row_open(sfa_context *ctx, const eval_rows *rows, size_t index, const char *form, bool is_json, eval_row *row) {
  const char *text = (const char *)rows->text.data + rows->lines[index].at;
  *row = (eval_row){.ctx = ctx, .path = rows->path, .form = form, .line = rows->lines[index].number, .text = text};
  if (!is_json)
    return SFA_OK;
  const char *end;
  row->json = cJSON_ParseWithOpts(text, &end, 1);
  if (row->json && cJSON_IsObject(row->json))
    return SFA_OK;
  sfa_status status = row->json ? sfa_eval_row_fail(row, "it is no JSON object")
                                : sfa_eval_row_fail(row, "it is no JSON from byte %zu on", (size_t)(end - text));
  sfa_eval_row_close(row);
  return status;
}

void sfa_eval_row_close(eval_row *row) {
  cJSON_Delete(row->json);
  row->json = NULL;
}

sfa_status sfa_eval_row_fail(const eval_row *row, const char *format, ...) {
  char what[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  return sfa_fail(row->ctx, SFA_ERROR_FORMAT, "%s, line %lld: %s; a row is %s", row->path, (long long)row->line, what, row->form);
}

const cJSON *sfa_eval_row_find(const eval_row *row, const char *name) { return cJSON_GetObjectItemCaseSensitive(row->json, name); }

sfa_status sfa_eval_row_text(const eval_row *row, const char *name, const char **text) {
  const cJSON *member = sfa_eval_row_find(row, name);
  if (!cJSON_IsString(member))
    return sfa_eval_row_fail(row, "\"%s\" is %s", name, member ? "no text" : "missing");
  *text = member->valuestring;
  return SFA_OK;
}

sfa_status sfa_eval_row_texts(const eval_row *row, const char *name, int32_t most, const char **texts, int32_t *n) {
  const cJSON *member = sfa_eval_row_find(row, name), *element;
  *n = 0;
  if (!cJSON_IsArray(member))
    return sfa_eval_row_fail(row, "\"%s\" is %s", name, member ? "no list" : "missing");
  cJSON_ArrayForEach(element, member) {
    if (!cJSON_IsString(element))
      return sfa_eval_row_fail(row, "\"%s\" holds something that is no text", name);
    if (*n == most)
      return sfa_eval_row_fail(row, "\"%s\" has more than the %d texts that are taken", name, most);
    texts[(*n)++] = element->valuestring;
  }
  return *n ? SFA_OK : sfa_eval_row_fail(row, "\"%s\" is empty", name);
}

sfa_status sfa_eval_row_index(const eval_row *row, const char *name, int32_t first, int32_t n, int32_t *index) {
  const cJSON *member = sfa_eval_row_find(row, name);
  double value = -1;
  if (cJSON_IsNumber(member))
    value = member->valuedouble;
  else if (cJSON_IsString(member) && *member->valuestring) {
    char *end;
    value = strtod(member->valuestring, &end);
    value = *end ? -1 : value;
  } else
    return sfa_eval_row_fail(row, "\"%s\" is %s", name, member ? "no number" : "missing");
  if (!(value >= first && value < first + n) || value != (double)(int32_t)value)
    return sfa_eval_row_fail(row, "\"%s\" is not a whole number from %d to %d", name, first, first + n - 1);
  *index = (int32_t)value - first;
  return SFA_OK;
}
