/* text/bpe.h: byte-pair encoding of one word: the vocabulary, the merges, and the merging.
 *
 * Both families are one algorithm: start from the smallest symbols (bytes, or characters with bytes for the unknown ones), then merge the
 * best pair of neighbours, the leftmost of equals, until none can be merged. They differ in what the best is: the merge list's order
 * (GPT-2; Llama and Gemma in tokenizer.json), or the score of the token that the pair makes (SentencePiece in GGUF, llama2.c).
 */
#ifndef SFA_BPE_H
#define SFA_BPE_H

#include "text/text_table.h"

typedef struct sfa_bpe {
  sfa_text_table ids;    /* text -> id of the tokens that merging can make; byte-level vocabularies: raw bytes */
  sfa_pair_map merges;   /* (left id, right id) -> rank << 32 | merged id; unused if by_score */
  uint32_t n_merges;     /* as listed */
  const float *scores;   /* [n_ids] if by_score. Not owned */
  bool by_score;         /* best pair: by score, not by rank */
  bool byte_level;       /* symbols are bytes, not characters */
  bool byte_fallback;    /* a character that is no token becomes its bytes' tokens, if all are there */
  bool fuse_unknown;     /* neighbouring unknown characters become one unknown token */
  bool whole_words;      /* a word that is a token is taken as it is, without merging */
  int32_t byte_ids[256]; /* token of a byte (byte-level: the byte itself; else <0xNN>) or -1 */
  int32_t unknown_id;    /* or -1: unknown characters vanish */
  size_t longest;        /* bytes of the longest text in ids */
} sfa_bpe;

/* Memory for words, reused from one to the next. Zeroed at first. */
typedef struct sfa_bpe_scratch {
  struct sfa_bpe_symbol *symbols;
  struct sfa_bpe_pair *pairs; /* a binary heap */
  size_t symbol_capacity, pair_capacity, n_pairs;
  sfa_text_table words; /* words seen before -> where in word_ids: their number of ids, then the ids */
  sfa_ids word_ids;
} sfa_bpe_scratch;

/* Appends the ids of a word (well-formed UTF-8, len < 2^31) to ids. O(len log len). */
sfa_status sfa_bpe_word(sfa_context *ctx, const sfa_bpe *bpe, sfa_bpe_scratch *scratch, const uint8_t *word, size_t len, sfa_ids *ids);
void sfa_bpe_scratch_free(sfa_context *ctx, sfa_bpe_scratch *scratch);
/* Adds a merge of two tokens of the vocabulary, the next in rank. SFA_ERROR_FORMAT if a part or the result is no token. */
sfa_status sfa_bpe_add_merge(sfa_context *ctx, sfa_bpe *bpe, const uint8_t *left, size_t left_len, const uint8_t *right, size_t right_len);
void sfa_bpe_free(sfa_context *ctx, sfa_bpe *bpe);

#endif
