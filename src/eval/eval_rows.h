/* eval/eval_rows.h: the rows of a data file, and their members, with errors that name file, line and what is expected. */
#ifndef SFA_EVAL_ROWS_H
#define SFA_EVAL_ROWS_H

#include <cjson/cJSON.h>

#include "text/text_table.h"

/* A file in memory, and where its lines begin. Empty lines are no rows. */
typedef struct eval_rows {
  char *path;
  sfa_bytes text; /* lines end with a zero byte */
  struct eval_line {
    size_t at;
    int64_t number; /* from 1 */
  } * lines;
  size_t n_lines, capacity;
} eval_rows;

/* Reads a file or a pipe to its end; a zero byte follows the text. Compressed files are refused, with what to do. */
sfa_status sfa_eval_file_read(sfa_context *ctx, const char *path, sfa_bytes *text);
/* The same, in lines; at least one. */
sfa_status sfa_eval_rows_read(sfa_context *ctx, const char *path, eval_rows *rows);
void sfa_eval_rows_free(sfa_context *ctx, eval_rows *rows);

typedef struct eval_row {
  sfa_context *ctx;
  const char *path, *form; /* form: what a row should be */
  int64_t line;
  const char *text;
  cJSON *json; /* NULL for rows of plain text */
} eval_row;

/* Row `index`, parsed if is_json. */
sfa_status sfa_eval_row_open(sfa_context *ctx, const eval_rows *rows, size_t index, const char *form, bool is_json, eval_row *row);
void sfa_eval_row_close(eval_row *row);
/* "FILE, line N: <what>; a row is <form>" */
sfa_status sfa_eval_row_fail(const eval_row *row, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Members by name. A missing one is an error, or NULL from eval_row_find. */
const cJSON *sfa_eval_row_find(const eval_row *row, const char *name);
sfa_status sfa_eval_row_text(const eval_row *row, const char *name, const char **text);
/* A list of 1 .. most texts. */
sfa_status sfa_eval_row_texts(const eval_row *row, const char *name, int32_t most, const char **texts, int32_t *n);
/* A number from `first` on, below first + n, as a number or a text of one; *index counts from 0. */
sfa_status sfa_eval_row_index(const eval_row *row, const char *name, int32_t first, int32_t n, int32_t *index);

#endif
