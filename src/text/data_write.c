/* Texts to token shards. */
#include <sfa/data.h>

#include <string.h>

#include "base/rng.h"
#include "file/shards.h"
#include "text/corpus.h"
#include "text/tokenizer_build.h"

typedef struct sink {
  const sfa_tokenizer *tokenizer;
  const sfa_data_options *options;
  sfa_shard_writer *train, *valid;
  bool in_valid; /* the current document */
  sfa_data_result *result;
} sink;

static sfa_status encode(void *user, sfa_corpus_worker *worker, sfa_corpus_item *item) {
  const sfa_tokenizer *t = ((const sink *)user)->tokenizer;
  if (item->begins)
    SFA_TRY(sfa_ids_append(&worker->ctx, &item->ids, t->before.data, t->before.len));
  return sfa_encoder_encode(worker->encoder, false, item->text, item->bytes, &item->ids);
}

/* Whether a document is held out: by its number, so that it stays so when others are added behind it. */
static bool is_held_out(const sfa_data_options *o, int64_t number) {
  sfa_rng rng = {o->seed ^ ((uint64_t)number * 0xd1342543de82ef95u)};
  return o->valid && sfa_rng_uniform(&rng) < o->valid_share;
}

static sfa_status write_items(void *user, const sfa_corpus_item *items, int64_t n_items) {
  sink *s = user;
  for (int64_t i = 0; i < n_items; i++) {
    if (items[i].begins)
      s->in_valid =
          is_held_out(s->options, sfa_shard_writer_n_documents(s->train) + (s->valid ? sfa_shard_writer_n_documents(s->valid) : 0));
    sfa_shard_writer *writer = s->in_valid ? s->valid : s->train;
    SFA_TRY(sfa_shard_writer_add(writer, items[i].ids.data, (int64_t)items[i].ids.len));
    if (items[i].ends)
      SFA_TRY(sfa_shard_writer_end_document(writer));
  }
  s->result->all.n_tokens = sfa_shard_writer_n_tokens(s->train) + (s->valid ? sfa_shard_writer_n_tokens(s->valid) : 0);
  return SFA_OK;
}

static sfa_status find_end_token(const sfa_tokenizer *t, const char *name, int32_t *id) {
  *id = name ? sfa_tokenizer_special_id(t, name) : t->eos_id;
  if (name)
    return *id >= 0 ? SFA_OK
                    : sfa_fail(t->ctx, SFA_ERROR_ARGUMENT, "the tokenizer has no special token \"%s\" to end documents with", name);
  for (size_t i = 0; i < t->n_tokens && *id < 0; i++)
    if (t->tokens[i].flags & SFA_TOKEN_END)
      *id = (int32_t)i;
  return *id >= 0 ? SFA_OK
                  : sfa_fail(t->ctx, SFA_ERROR_ARGUMENT, "the tokenizer names no token that ends a text: name one of its special tokens");
}

static sfa_status open_writers(sink *s) {
  const sfa_tokenizer *t = s->tokenizer;
  const sfa_data_options *o = s->options;
  sfa_shard_settings settings = {.vocab_size = sfa_tokenizer_vocab_size(t),
                                 .tokenizer = sfa_tokenizer_fingerprint(t),
                                 .shard_len = o->shard_len ? o->shard_len : (int64_t)1 << 27};
  SFA_TRY(find_end_token(t, o->end_token, &settings.end_token));
  SFA_TRY(sfa_shard_writer_open(t->ctx, o->train, &settings, &s->train));
  return o->valid ? sfa_shard_writer_open(t->ctx, o->valid, &settings, &s->valid) : SFA_OK;
}

static sfa_status commit(sink *s) {
  sfa_context *ctx = s->tokenizer->ctx;
  int64_t n = s->result->all.n_documents, n_valid = s->valid ? sfa_shard_writer_n_documents(s->valid) : 0;
  if (n == 0)
    return sfa_fail(ctx, SFA_ERROR_ARGUMENT, "the texts hold no document: every file is empty");
  if (s->valid && (n_valid == 0 || n_valid == n))
    return sfa_fail(ctx, SFA_ERROR_ARGUMENT,
                    "a share of %g holds out %lld of %lld documents: choose another share, or name files of their own for what is held out",
                    s->options->valid_share, (long long)n_valid, (long long)n);
  if (s->valid) {
    s->result->n_valid_documents = n_valid;
    s->result->n_valid_tokens = sfa_shard_writer_n_tokens(s->valid);
    SFA_TRY(sfa_shard_writer_commit(s->valid));
  }
  return sfa_shard_writer_commit(s->train);
}

sfa_status sfa_data_write(const sfa_tokenizer *tokenizer, const sfa_text_inputs *inputs, const sfa_data_options *options,
                          sfa_data_result *result) {
  if (!tokenizer)
    return SFA_ERROR_ARGUMENT;
  sfa_context *ctx = tokenizer->ctx;
  SFA_REQUIRE(ctx, inputs && options && result, "sfa_data_write wants inputs, options and a place for the result");
  SFA_REQUIRE(ctx, options->struct_size == sizeof *options, "sfa_data_options.struct_size is %zu, not %zu", options->struct_size,
              sizeof *options);
  SFA_REQUIRE(ctx, options->shard_len >= 0, "a shard of %lld tokens cannot be", (long long)options->shard_len);
  SFA_REQUIRE(ctx, !options->valid || (options->valid_share > 0 && options->valid_share < 1),
              "a share of %g cannot be held out: it is between 0 and 1", options->valid_share);
  *result = (sfa_data_result){0};
  sink s = {.tokenizer = tokenizer, .options = options, .result = result};
  sfa_corpus_work work = {.steps = &tokenizer->steps,
                          .bpe = &tokenizer->bpe,
                          .memory_bytes = options->memory_bytes ? options->memory_bytes : 256 << 20,
                          .item = encode,
                          .batch = write_items,
                          .user = &s,
                          .progress = options->progress,
                          .progress_user = options->progress_user,
                          .done = &result->all};
  sfa_status status = open_writers(&s);
  if (status == SFA_OK)
    status = sfa_corpus_run(ctx, inputs, &work);
  if (status == SFA_OK)
    status = commit(&s);
  sfa_shard_writer_close(s.train);
  sfa_shard_writer_close(s.valid);
  return status;
}
