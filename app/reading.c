/* A prompt into a session. With an index, the document comes from there as far as it is there; the rest is read and put into it, a piece at
 * a time, so that a reading that was stopped goes on from the last piece. */
#include "document.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

/* Tokens between commits: many pages each, a few seconds of work. */
enum { COMMIT_LEN = 4096 };

/* ---- The index --------------------------------------------------------------------------------------------------------------- */

/* May the file be filled, because nothing was committed to it yet? */
static bool is_unwritten(const app *a, const char *path) {
  sfa_index_writer *writer;
  if (sfa_index_writer_open(a->ctx, path, &writer) != SFA_OK)
    return false;
  bool unwritten = sfa_index_writer_is_new(writer);
  sfa_index_writer_close(writer);
  return unwritten;
}

/* Opens the index if there is one; --verify looks at all of it, which takes the time to read it. */
static int open_index(app *a, sfa_index **index) {
  const char *path = a->o->index;
  struct stat info;
  if (stat(path, &info) != 0)
    return a->o->file ? EXIT_OK : app_fail("there is no index %s; give the document with -f to have it read", path);
  if (sfa_index_open(a->ctx, path, index) != SFA_OK)
    return a->o->file && is_unwritten(a, path) ? EXIT_OK : app_fail_status(a->ctx);
  return !a->o->verify || sfa_index_verify(*index) == SFA_OK ? EXIT_OK : app_fail_status(a->ctx);
}

/* Tokens that the index and the prompt begin with alike, n at most. */
static int64_t count_same(const sfa_index *index, const prompt *p, int64_t n) {
  const int32_t *tokens = sfa_index_tokens(index);
  int64_t same = 0;
  while (same < n && tokens[same] == p->ids[same])
    same++;
  return same;
}

/* The token behind the last source: what follows is of one that was not read to its end. */
static int64_t sources_end(const sfa_index *index) {
  sfa_index_info info;
  sfa_index_source last;
  sfa_index_describe(index, &info);
  return sfa_index_source_at(index, info.n_sources - 1, &last) ? last.first_token + last.n_tokens : 0;
}

/* With -f: the index holds the document, or its first part. */
static int check_document(const app *a, const sfa_index *index, const prompt *p) {
  sfa_index_info info;
  sfa_index_describe(index, &info);
  int64_t same = count_same(index, p, info.n_tokens < p->n_document ? info.n_tokens : p->n_document);
  if (same == info.n_tokens)
    return EXIT_OK;
  sfa_index_source source;
  int64_t number = 0;
  while (sfa_index_source_at(index, number, &source) && source.first_token + source.n_tokens <= same)
    number++;
  bool named = sfa_index_source_at(index, number, &source);
  return app_fail("%s was made of another text than %s: of its %lld tokens the first %lld are the same%s%s; delete it to have the document "
                  "read anew, or name another --index",
                  a->o->index, a->o->file, (long long)info.n_tokens, (long long)same, named ? ", they part in " : "",
                  named ? source.name : "");
}

/* Without -f: the index holds the whole of a document, behind the start that these options give; its tokens become the prompt's. */
static int take_document(const app *a, const sfa_index *index, prompt *p) {
  sfa_index_info info;
  sfa_index_describe(index, &info);
  sfa_index_source first = {0};
  bool framed_alike = sfa_index_source_at(index, 0, &first) && first.first_token == p->n_frame;
  if (info.n_tokens < p->n_head || count_same(index, p, p->n_head) < p->n_head || (info.n_sources && !framed_alike))
    return app_fail("%s was read with another system message, or not with the same --raw; ask as it was read, or give the document with -f "
                    "and another --index",
                    a->o->index);
  if (sources_end(index) < info.n_tokens)
    return app_fail("%s holds a document that was not read to its end; give it with -f once more, and the reading goes on", a->o->index);
  return prompt_insert(p, sfa_index_tokens(index), info.n_tokens);
}

int reading_begin(app *a, prompt *p, reading *r) {
  *r = (reading){.a = a, .p = p};
  sfa_index *index = NULL;
  int status = a->o->index ? open_index(a, &index) : EXIT_OK;
  if (!status && index) {
    r->has_index = true;
    status = a->o->file ? check_document(a, index, p) : take_document(a, index, p);
    r->is_whole = sources_end(index) >= p->n_document;
  }
  sfa_index_close(index);
  return status;
}

/* Commits what the session holds; sources that it holds to their end are told of. */
static int commit(const reading *r, sfa_index_writer *writer) {
  int64_t len = sfa_session_len(r->a->session), n = 0;
  while (n < r->p->n_sources && r->p->sources[n].first_token + r->p->sources[n].n_tokens <= len)
    n++;
  return sfa_session_save(r->a->session, writer, r->p->sources, n) == SFA_OK ? EXIT_OK : app_fail_status(r->a->ctx);
}

/* ---- Reading ----------------------------------------------------------------------------------------------------------------- */

/* Tokens up to `end`, with progress of the whole prompt. */
static int read_to(const reading *r, int64_t end, float *logits) {
  app *a = r->a;
  int64_t len = sfa_session_len(a->session);
  a->progress.before = len;
  a->progress.total = r->p->n_ids;
  sfa_status read = sfa_session_append(a->session, r->p->ids + len, end - len, logits);
  if (read == SFA_OK)
    return EXIT_OK;
  progress_clear(&a->progress);
  return read == SFA_ERROR_CANCELLED ? EXIT_INTERRUPTED : app_fail_status(a->ctx);
}

/* The document up to a token, in the same pieces with and without an index (writer NULL): where a piece ends may show in the bits of 16-bit
 * arithmetic. */
static int read_document(const reading *r, int64_t end, sfa_index_writer *writer) {
  app *a = r->a;
  int64_t len = sfa_session_len(a->session), kept = r->has_index ? len : 0;
  int status = EXIT_OK;
  while (!status && len < end) {
    int64_t next = (len / COMMIT_LEN + 1) * COMMIT_LEN;
    len = next < end ? next : end;
    status = read_to(r, len, NULL);
    if (!status && writer)
      status = commit(r, writer);
    if (!status)
      kept = len;
    if (!status && len < end && interrupted())
      status = EXIT_INTERRUPTED;
  }
  if (status == EXIT_INTERRUPTED && writer && kept)
    app_note("stopped; %s holds %lld of %lld tokens, and the same command reads on", a->o->index, (long long)kept, (long long)end);
  return status;
}

/* What the index does not hold of the document, into it. */
static int keep_document(const reading *r) {
  app *a = r->a;
  sfa_index_writer *writer;
  if (sfa_index_writer_open(a->ctx, a->o->index, &writer) != SFA_OK)
    return app_fail_status(a->ctx);
  int status = read_document(r, r->p->n_document, writer);
  if (!status)
    status = commit(r, writer); /* names of sources, if nothing else was new */
  sfa_index_writer_close(writer);
  return status;
}

int reading_run(const reading *r, float *logits) {
  app *a = r->a;
  int64_t n = r->p->n_ids, n_document = r->p->n_document, n_before = n_document < n ? n_document : n - 1;
  int status = EXIT_OK;
  if (a->o->index && a->o->file && !(r->is_whole && sfa_session_len(a->session) >= n_document))
    status = keep_document(r);
  else if (!a->o->index)
    status = read_document(r, n_before, NULL);
  /* Without a question the document's last token is run once more, for its logits; and the file may have grown since reading_begin. */
  if (!status && sfa_session_len(a->session) > n_before)
    sfa_session_truncate(a->session, n_before);
  return status ? status : read_to(r, n, logits);
}
