/* text/tokenizer_build.h: the inside of a tokenizer, and what its loaders share. */
#ifndef SFA_TOKENIZER_BUILD_H
#define SFA_TOKENIZER_BUILD_H

#include "text/text_step.h"
#include "text/tokenizer.h"

enum {
  SFA_TOKEN_PRESENT = 1, /* the vocabulary has this id */
  SFA_TOKEN_SPECIAL = 2, /* no text of its own: shown only on demand */
  SFA_TOKEN_END = 4      /* the model ends its turn or text with it */
};

typedef struct sfa_token {
  uint64_t at; /* of what it decodes to, in pieces */
  uint32_t len;
  uint32_t flags;
  float score;
} sfa_token;

struct sfa_tokenizer {
  sfa_context *ctx;
  sfa_steps steps;
  sfa_bpe bpe;
  sfa_token *tokens; /* [n_tokens] by id */
  size_t n_tokens, token_capacity;
  float *scores; /* [n_tokens], bpe.scores, if it merges by score */
  sfa_bytes pieces;
  bool strip_space;       /* decoding: one space at the start of a text is not part of it */
  sfa_ids before, after;  /* SFA_TOKENIZE_SPECIAL */
  int32_t bos_id, eos_id; /* or -1 */
  char *chat_template;    /* Jinja source, or NULL */
};

/* ids from a file: at most so many, so that a damaged file cannot ask for the machine's memory. */
enum { SFA_TOKEN_IDS_MAX = 1 << 22 };

sfa_status sfa_tokenizer_create(sfa_context *ctx, sfa_tokenizer **tokenizer);
/* Enters a token with the bytes it decodes to. A token that is there already gets the new bytes; flags add up. */
sfa_status sfa_tokenizer_put(sfa_tokenizer *t, int32_t id, const uint8_t *piece, size_t len, uint32_t flags, float score);
/* Enters a text that encoding can make. SFA_ERROR_FORMAT if another token has it. */
sfa_status sfa_tokenizer_put_text(sfa_tokenizer *t, int32_t id, const uint8_t *text, size_t len);
/* Reads "<0xNN>"; -1 if the text is something else. */
int sfa_byte_token_read(const uint8_t *text, size_t len);
/* Marks as ends the special tokens that are known as such by their text (<|im_end|>, <|eot_id|>, ...), and eos_id. */
void sfa_tokenizer_mark_ends(sfa_tokenizer *t);
/* The id of a special token by its text; -1. */
int32_t sfa_tokenizer_special_id(const sfa_tokenizer *t, const char *text);
/* GPT-2's older files: a JSON object text -> id (vocab.json, encoder.json), and lines "left right" (merges.txt, vocab.bpe). */
sfa_status sfa_tokenizer_from_pair(sfa_context *ctx, const char *vocab_path, const char *merges_path, sfa_tokenizer **tokenizer);
/* Last step of every loader: tables that follow from the vocabulary. `space`: what stands for a space in the texts of a SentencePiece
 * vocabulary; NULL for a byte-level one. */
sfa_status sfa_tokenizer_finish(sfa_tokenizer *t, const char *space);

#endif
