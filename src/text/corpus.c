/* Batches: item 0 of the parallel loop reads the next batch, the others are the pieces of this one. */
#include "text/corpus.h"

#include <string.h>

#include "file/text_read.h"
#include "text/utf8.h"

typedef struct batch {
  sfa_bytes text;
  sfa_corpus_item *items; /* [n_items]; text is an offset until the batch is full */
  size_t n_items, capacity;
  size_t *at; /* [n_items] of the items in text */
  size_t at_capacity;
} batch;

typedef struct pass {
  sfa_context *ctx;
  const sfa_corpus_work *work;
  sfa_text_reader *reader;
  size_t batch_bytes;
  batch batches[2];
  int current; /* the batch that is worked on; the other one is read */
  bool in_document;
  sfa_corpus_worker *workers; /* [n_threads] */
  sfa_context read_ctx;       /* of the reader */
  sfa_status read_status;
} pass;

/* ---- Reading ----------------------------------------------------------------------------------------------------------------- */

static sfa_status append_piece(pass *p, batch *b, const sfa_text_piece *piece) {
  sfa_context *ctx = &p->read_ctx;
  SFA_TRY(sfa_array_reserve(ctx, (void **)&b->items, &b->capacity, b->n_items + 1, sizeof *b->items));
  SFA_TRY(sfa_array_reserve(ctx, (void **)&b->at, &b->at_capacity, b->n_items + 1, sizeof *b->at));
  size_t at = b->text.len;
  SFA_TRY(sfa_utf8_valid(piece->text, piece->bytes) ? sfa_bytes_append(ctx, &b->text, piece->text, piece->bytes)
                                                    : sfa_utf8_repair(ctx, piece->text, piece->bytes, &b->text));
  b->at[b->n_items] = at;
  b->items[b->n_items++] = (sfa_corpus_item){.bytes = b->text.len - at, .begins = !p->in_document, .ends = piece->ends};
  p->in_document = !piece->ends;
  return SFA_OK;
}

static sfa_status fill(pass *p, batch *b) {
  b->text.len = b->n_items = 0;
  SFA_TRY(sfa_array_reserve(&p->read_ctx, (void **)&b->text.data, &b->text.capacity, p->batch_bytes + SFA_TEXT_PIECE_BYTES, 1));
  while (b->text.len < p->batch_bytes) {
    sfa_text_piece piece;
    SFA_TRY(sfa_text_reader_next(p->reader, &piece));
    if (!piece.text)
      break;
    SFA_TRY(append_piece(p, b, &piece));
  }
  for (size_t i = 0; i < b->n_items; i++)
    b->items[i].text = b->text.data + b->at[i];
  return SFA_OK;
}

/* ---- The loop ---------------------------------------------------------------------------------------------------------------- */

static void run_item(void *arg, int64_t index, int32_t thread) {
  pass *p = arg;
  if (index == 0) {
    p->read_status = fill(p, &p->batches[!p->current]);
    return;
  }
  sfa_corpus_worker *w = &p->workers[thread];
  if (w->status != SFA_OK) /* items come in rising order: the first failure of a thread is its lowest */
    return;
  if (!w->encoder)
    w->status = sfa_encoder_create(&w->ctx, p->work->steps, p->work->bpe, &w->encoder);
  if (w->status == SFA_OK)
    w->status = p->work->item(p->work->user, w, &p->batches[p->current].items[index - 1]);
  w->failed_item = index;
}

/* The failure of the lowest item, in the words of its thread. */
static sfa_status first_failure(const pass *p) {
  const sfa_corpus_worker *first = NULL;
  for (const sfa_corpus_worker *w = p->workers; w < p->workers + p->ctx->n_threads; w++)
    if (w->status != SFA_OK && (!first || w->failed_item < first->failed_item))
      first = w;
  return first ? sfa_fail(p->ctx, first->status, "%s", first->ctx.error) : SFA_OK;
}

static void free_ids(pass *p, batch *b) {
  for (size_t i = 0; i < b->n_items; i++)
    sfa_free(p->ctx, b->items[i].ids.data);
  b->n_items = 0;
}

static sfa_status take_batch(pass *p, batch *b) {
  sfa_data_progress *done = p->work->done;
  SFA_TRY(p->work->batch(p->work->user, b->items, (int64_t)b->n_items));
  for (size_t i = 0; i < b->n_items; i++) {
    done->text_bytes += (int64_t)b->items[i].bytes;
    done->n_documents += b->items[i].ends;
  }
  if (p->work->progress && p->work->progress(p->work->progress_user, done))
    return sfa_fail(p->ctx, SFA_ERROR_CANCELLED, "stopped after %lld documents; nothing was written", (long long)done->n_documents);
  return SFA_OK;
}

static sfa_status run_pass(pass *p) {
  do { /* the first time no batch is there, and one is read */
    batch *b = &p->batches[p->current];
    sfa_parallel(p->ctx, 1 + (int64_t)b->n_items, run_item, p);
    SFA_TRY(first_failure(p));
    if (b->n_items)
      SFA_TRY(take_batch(p, b));
    free_ids(p, b);
    if (p->read_status != SFA_OK)
      return sfa_fail(p->ctx, p->read_status, "%s", p->read_ctx.error);
    sfa_text_reader_progress(p->reader, &p->work->done->bytes_done, &p->work->done->bytes_total);
    p->current = !p->current;
  } while (p->batches[p->current].n_items);
  return SFA_OK;
}

enum { BATCH_LEAST = 1 << 20, BATCH_MOST = 1 << 28 };

sfa_status sfa_corpus_run(sfa_context *ctx, const sfa_text_inputs *inputs, const sfa_corpus_work *work) {
  SFA_REQUIRE(ctx, work->memory_bytes >= 0, "memory of %lld bytes cannot be", (long long)work->memory_bytes);
  pass p = {.ctx = ctx, .work = work, .read_ctx = *ctx};
  /* Two texts, and ids of 4 bytes for each byte of one at worst, in arrays that may be half full. */
  p.batch_bytes = (size_t)sfa_max64(BATCH_LEAST, sfa_min64(work->memory_bytes / 10, BATCH_MOST));
  sfa_status status = sfa_alloc_zero(ctx, (size_t)ctx->n_threads, sizeof *p.workers, "threads", (void **)&p.workers);
  if (status == SFA_OK) {
    for (int32_t t = 0; t < ctx->n_threads; t++)
      p.workers[t] = (sfa_corpus_worker){.ctx = *ctx, .number = t};
    status = sfa_text_reader_open(&p.read_ctx, inputs, SFA_TEXT_PIECE_BYTES, &p.reader);
    status = status == SFA_OK ? run_pass(&p) : sfa_fail(ctx, status, "%s", p.read_ctx.error);
  }
  sfa_text_reader_close(p.reader);
  for (int i = 0; i < 2; i++) {
    free_ids(&p, &p.batches[i]);
    sfa_free(ctx, p.batches[i].text.data);
    sfa_free(ctx, p.batches[i].items);
    sfa_free(ctx, p.batches[i].at);
  }
  for (int32_t t = 0; p.workers && t < ctx->n_threads; t++)
    sfa_encoder_destroy(p.workers[t].encoder);
  sfa_free(ctx, p.workers);
  return status;
}
