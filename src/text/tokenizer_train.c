/* Texts to a tokenizer: words are counted by all threads, merged, and written. */
#include <sfa/data.h>

#include <string.h>

#include "text/bpe_train.h"
#include "text/corpus.h"
#include "text/tokenizer_build.h"
#include "text/utf8.h"

typedef struct counting {
  sfa_context *ctx;
  sfa_word_counts *of_thread; /* [n_threads] of the current batch */
  sfa_word_counts all;
  size_t memory_bytes; /* what `all` may take */
  sfa_tokenizer_train_result *result;
} counting;

typedef struct word_sink {
  sfa_context *ctx;
  sfa_word_counts *counts;
} word_sink;

static sfa_status count_word(void *user, const uint8_t *word, size_t len) {
  word_sink *sink = user;
  return sfa_word_counts_add(sink->ctx, sink->counts, word, len, 1);
}

static sfa_status count_item(void *user, sfa_corpus_worker *worker, sfa_corpus_item *item) {
  word_sink sink = {&worker->ctx, &((counting *)user)->of_thread[worker->number]};
  return sfa_encoder_words(worker->encoder, item->text, item->bytes, count_word, &sink);
}

/* Counts of threads are joined after each batch: what is forgotten for want of memory must not depend on who counted what. */
static sfa_status join_counts(void *user, const sfa_corpus_item *items, int64_t n_items) {
  (void)items;
  (void)n_items;
  counting *c = user;
  for (int32_t t = 0; t < c->ctx->n_threads; t++) {
    SFA_TRY(sfa_word_counts_join(c->ctx, &c->all, &c->of_thread[t]));
    sfa_word_counts_free(c->ctx, &c->of_thread[t]);
  }
  if (sfa_word_counts_bytes(&c->all) > c->memory_bytes) {
    SFA_TRY(sfa_word_counts_prune(c->ctx, &c->all));
    c->result->n_forgotten++;
  }
  return SFA_OK;
}

static sfa_status count_words(counting *c, const sfa_text_inputs *inputs, const sfa_tokenizer_train_options *o, int64_t memory_bytes) {
  sfa_steps steps = {0};
  sfa_corpus_work work = {.steps = &steps,
                          .memory_bytes = memory_bytes / 4,
                          .item = count_item,
                          .batch = join_counts,
                          .user = c,
                          .progress = o->progress,
                          .progress_user = o->progress_user,
                          .done = &c->result->all};
  sfa_status status = sfa_steps_add_split(c->ctx, &steps, SFA_PATTERN_GPT2, false, SFA_SPLIT_ISOLATED, false);
  if (status == SFA_OK)
    status = sfa_corpus_run(c->ctx, inputs, &work);
  sfa_steps_free(c->ctx, &steps);
  c->result->n_words = (int64_t)c->all.words.count;
  if (status == SFA_OK && c->all.words.count == 0)
    status = sfa_fail(c->ctx, SFA_ERROR_ARGUMENT, "the texts hold no word: every file is empty");
  return status;
}

static sfa_status merge_and_write(counting *c, const sfa_tokenizer_train_options *o, const char *const *special, int32_t n_special,
                                  const char *folder) {
  sfa_bpe_vocabulary v;
  SFA_TRY(sfa_bpe_train(c->ctx, &c->all, o->vocab_size - n_special, o->min_count ? o->min_count : 2, &v));
  c->result->vocab_size = (int32_t)v.n_tokens + n_special;
  c->result->all.n_tokens = v.n_text_tokens;
  sfa_status status = sfa_tokenizer_write(c->ctx, folder, &v, special, n_special);
  sfa_bpe_vocabulary_free(c->ctx, &v);
  return status;
}

/* Special tokens are UTF-8, of their own, and no bytes' tokens. */
static sfa_status check_special(sfa_context *ctx, const char *const *special, int32_t n) {
  for (int32_t i = 0; i < n; i++) {
    SFA_REQUIRE(ctx, special[i] && strlen(special[i]) > 1 && sfa_utf8_valid((const uint8_t *)special[i], strlen(special[i])),
                "special token %d is no text of at least two bytes", i);
    for (int32_t j = 0; j < i; j++)
      SFA_REQUIRE(ctx, strcmp(special[i], special[j]) != 0, "the special token \"%s\" is named twice", special[i]);
  }
  return SFA_OK;
}

sfa_status sfa_tokenizer_train(sfa_context *ctx, const sfa_text_inputs *inputs, const sfa_tokenizer_train_options *options,
                               const char *folder, sfa_tokenizer_train_result *result) {
  static const char *const end_of_text[] = {"<|endoftext|>"};
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(ctx, inputs && options && folder && *folder && result,
              "sfa_tokenizer_train wants inputs, options, a folder and a place for the result");
  SFA_REQUIRE(ctx, options->struct_size == sizeof *options, "sfa_tokenizer_train_options.struct_size is %zu, not %zu", options->struct_size,
              sizeof *options);
  const char *const *special = options->special ? options->special : end_of_text;
  int32_t n_special = options->special ? options->n_special : 1;
  SFA_REQUIRE(ctx, n_special >= 0 && n_special <= 4096, "%d special tokens cannot be; 0 to 4096 are allowed", n_special);
  SFA_REQUIRE(ctx, options->vocab_size >= 256 + n_special && options->vocab_size <= SFA_TOKEN_IDS_MAX,
              "a vocabulary of %d cannot be: it has the 256 bytes, %d special tokens, and at most %d in all", options->vocab_size,
              n_special, SFA_TOKEN_IDS_MAX);
  SFA_REQUIRE(ctx, options->min_count >= 0 && options->memory_bytes >= 0, "counts and memory are not negative");
  SFA_TRY(check_special(ctx, special, n_special));
  *result = (sfa_tokenizer_train_result){0};
  int64_t memory = options->memory_bytes ? options->memory_bytes : (int64_t)1 << 30;
  counting c = {.ctx = ctx, .memory_bytes = (size_t)memory / 2, .result = result};
  SFA_TRY(sfa_alloc_zero(ctx, (size_t)ctx->n_threads, sizeof *c.of_thread, "counts of threads", (void **)&c.of_thread));
  sfa_status status = count_words(&c, inputs, options, memory);
  if (status == SFA_OK)
    status = merge_and_write(&c, options, special, n_special, folder);
  for (int32_t t = 0; t < ctx->n_threads; t++)
    sfa_word_counts_free(ctx, &c.of_thread[t]);
  sfa_word_counts_free(ctx, &c.all);
  sfa_free(ctx, c.of_thread);
  return status;
}
