/* document.h: texts to be read before a question, and what a prompt is made of. */
#ifndef SFA_APP_DOCUMENT_H
#define SFA_APP_DOCUMENT_H

#include "app.h"

enum { DOCUMENT_PATH_BYTES = 4096 };

/* A file of a document: bytes first_byte .. first_byte + n_bytes - 1 of its text, with its heading. */
typedef struct document_part {
  char *name;
  size_t first_byte, n_bytes;
} document_part;

typedef struct app_document {
  text_buffer text;
  document_part *parts;
  size_t n_parts;
  bool is_folder;
  int n_hidden, n_binary, n_large, n_empty, n_links, n_other; /* left out of a folder */
} app_document;

/* ---- document.c ---- */

/* path: a file, "-", or a folder: its files in the order of their names' bytes, folders at their place. Left out of a folder: what begins
 * with a dot, files with a zero byte, over 16 MB or empty, links, devices. */
int document_read(const char *path, app_document *doc);
void document_free(app_document *doc);
/* "3 hidden, 1 binary", or "". */
const char *document_left_out(const app_document *doc, char *out, size_t capacity);

/* ---- prompt.c: the tokens of a prompt ---- */

/* First n_document tokens that depend on the document alone (and on what the chat template puts before it), then the question's. */
typedef struct prompt {
  int32_t *ids;
  int64_t n_ids, capacity, n_document;
  sfa_index_source *sources; /* [n_sources] the document's parts; names are the document's */
  int64_t n_sources;
  int64_t n_frame; /* of n_document, those of the chat template before the text */
  int64_t n_head;  /* those and what the tokenizer puts before a text */
} prompt;

/* The prompt of -p alone, of -f alone, or of -p after -f; doc is read from -f. Without -f, document_known (it is in an index): head and
 * question, n_document = n_head. */
int prompt_make(const app *a, bool document_known, app_document *doc, prompt *p);
void prompt_free(prompt *p);

/* Puts the tokens of an index in the place of the document's. */
int prompt_insert(prompt *p, const int32_t *tokens, int64_t n_tokens);

/* ---- reading.c: prompts into sessions, with or without an index ---- */

typedef struct reading {
  app *a;
  const prompt *p;
  bool has_index; /* the session is loaded from --index */
  bool is_whole;  /* which has all of the document */
} reading;

/* Looks at the index of the options, if one is asked for, and whether it belongs to the prompt; without -f the prompt gets its tokens. */
int reading_begin(app *a, prompt *p, reading *r);
/* Reads what the session does not hold, and puts the document into the index. logits [vocab_size]: of the last token. */
int reading_run(const reading *r, float *logits);

#endif
