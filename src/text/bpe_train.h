/* text/bpe_train.h: which merges a byte-level BPE should have, from the words of a text and how often they are seen. */
#ifndef SFA_BPE_TRAIN_H
#define SFA_BPE_TRAIN_H

#include "text/text_table.h"

/* Words and how often they were seen. Start it zeroed. */
typedef struct sfa_word_counts {
  sfa_text_table words; /* word -> index in counts */
  int64_t *counts;
  size_t capacity;
} sfa_word_counts;

/* A word of more than SFA_WORD_MOST_BYTES counts as several, so that no word makes a merge slow. */
enum { SFA_WORD_MOST_BYTES = 4096 };
sfa_status sfa_word_counts_add(sfa_context *ctx, sfa_word_counts *counts, const uint8_t *word, size_t len, int64_t n);
/* Adds all of `more`. */
sfa_status sfa_word_counts_join(sfa_context *ctx, sfa_word_counts *counts, const sfa_word_counts *more);
/* Forgets the words that were seen once. */
sfa_status sfa_word_counts_prune(sfa_context *ctx, sfa_word_counts *counts);
size_t sfa_word_counts_bytes(const sfa_word_counts *counts);
void sfa_word_counts_free(sfa_context *ctx, sfa_word_counts *counts);

typedef struct sfa_bpe_token {
  size_t at, len; /* in texts */
} sfa_bpe_token;

typedef struct sfa_bpe_merge {
  int32_t left, right; /* indices of tokens */
} sfa_bpe_merge;

/* Tokens: the 256 bytes in the order of the characters that they are written as, then what merges made. */
typedef struct sfa_bpe_vocabulary {
  sfa_bytes texts;
  sfa_bpe_token *tokens; /* [n_tokens] */
  sfa_bpe_merge *merges; /* [n_merges] in rank */
  size_t n_tokens, token_capacity, n_merges, merge_capacity;
  int64_t n_text_tokens; /* of the words, as often as they were seen */
} sfa_bpe_vocabulary;

/* Merges until there are n_tokens >= 256 tokens, or no pair was seen min_count times. The rule of ties is that of sfa_tokenizer_train. A
 * merge costs what the words cost that have its pair. */
sfa_status sfa_bpe_train(sfa_context *ctx, const sfa_word_counts *counts, int32_t n_tokens, int64_t min_count, sfa_bpe_vocabulary *out);
void sfa_bpe_vocabulary_free(sfa_context *ctx, sfa_bpe_vocabulary *vocabulary);

/* Writes folder/tokenizer.json and folder/tokenizer_config.json; the special tokens get the ids before those of the vocabulary, and the
 * first of them begins and ends a text. Each file is whole or as it was. */
sfa_status sfa_tokenizer_write(sfa_context *ctx, const char *folder, const sfa_bpe_vocabulary *vocabulary, const char *const *special,
                               int32_t n_special);

#endif
