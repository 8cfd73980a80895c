/* text/text_step.h: what happens to a text before byte-pair encoding, as a chain of steps.
 *
 * A tokenizer's added tokens, normalizers and pre-tokenizers (Hugging Face's words) are one list of steps. A text runs through it: a step
 * changes the text or cuts it into pieces, and hands each piece to the next step; after the last one a piece is a word for sfa_bpe_word.
 * Most of the named variants (ByteLevel, Metaspace, Digits, ...) are compositions of these few kinds.
 */
#ifndef SFA_TEXT_STEP_H
#define SFA_TEXT_STEP_H

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "text/bpe.h"

typedef enum sfa_step_kind {
  SFA_STEP_TOKENS,    /* added tokens in the text become their ids; the rest goes on */
  SFA_STEP_NORMALIZE, /* NFC and its kin */
  SFA_STEP_REPLACE,   /* each match of the pattern becomes `text` */
  SFA_STEP_PREPEND,   /* `text` goes before it */
  SFA_STEP_STRIP,     /* white space goes from its ends */
  SFA_STEP_SPLIT      /* cut at matches of the pattern */
} sfa_step_kind;

typedef enum sfa_split_rule {                     /* what becomes of a match */
                              SFA_SPLIT_ISOLATED, /* a piece of its own */
                              SFA_SPLIT_REMOVED,
                              SFA_SPLIT_WITH_PREVIOUS, /* the end of the piece before it */
                              SFA_SPLIT_WITH_NEXT,     /* the start of the piece after it */
                              SFA_SPLIT_CONTIGUOUS     /* one piece with the matches that touch it */
} sfa_split_rule;

typedef struct sfa_added_token {
  int32_t id;
  bool special;                     /* only with SFA_TOKENIZE_PARSE */
  bool single_word, lstrip, rstrip; /* as Hugging Face means them */
} sfa_added_token;

typedef struct sfa_step {
  sfa_step_kind kind;
  pcre2_code *pattern;           /* REPLACE, SPLIT */
  char *text;                    /* REPLACE, PREPEND */
  sfa_split_rule rule;           /* SPLIT */
  bool inverted;                 /* SPLIT: what lies between the matches takes the matches' part */
  bool unless_there, only_first; /* PREPEND: not if the text starts with it; only to the piece that starts the input */
  bool left, right;              /* STRIP */
  bool compose, compatible;      /* NORMALIZE: the C and the K of NFKC */
  sfa_pair_map trie;             /* TOKENS: (node, byte) -> node; (node, 256) -> index in tokens */
  int32_t n_nodes;               /* TOKENS: of the trie; 0 is the root */
  bool starts[256];              /* TOKENS: bytes that tokens start with */
  sfa_added_token *tokens;       /* TOKENS */
  size_t n_tokens, token_capacity;
} sfa_step;

enum { SFA_STEPS_MAX = 32 };

typedef struct sfa_steps {
  sfa_step steps[SFA_STEPS_MAX];
  int32_t count;
} sfa_steps;

/* Appends a step of a kind; *step is NULL on failure. */
sfa_status sfa_steps_add(sfa_context *ctx, sfa_steps *steps, sfa_step_kind kind, sfa_step **step);
/* The compositions that loaders want. literal: the pattern is a plain text. */
sfa_status sfa_steps_add_replace(sfa_context *ctx, sfa_steps *steps, const char *pattern, bool literal, const char *text);
sfa_status sfa_steps_add_split(sfa_context *ctx, sfa_steps *steps, const char *pattern, bool literal, sfa_split_rule rule, bool inverted);
sfa_status sfa_steps_add_prepend(sfa_context *ctx, sfa_steps *steps, const char *text, bool unless_there, bool only_first);
/* Adds a token to a TOKENS step; the same text again replaces it. A text that is empty or not UTF-8 is left out: it never occurs. */
sfa_status sfa_step_add_token(sfa_context *ctx, sfa_step *step, const uint8_t *text, size_t len, sfa_added_token token);
/* What the text-changing steps first..last-1 make of a well-formed text at the start of an input. */
sfa_status sfa_steps_transform(sfa_context *ctx, const sfa_steps *steps, int32_t first, int32_t last, const uint8_t *text, size_t len,
                               sfa_bytes *out);
/* Runs well-formed UTF-8 through all steps and encodes the words. Appends to ids. */
sfa_status sfa_steps_encode(sfa_context *ctx, const sfa_steps *steps, const sfa_bpe *bpe, bool parse_special, const uint8_t *text,
                            size_t len, sfa_ids *ids);
void sfa_steps_free(sfa_context *ctx, sfa_steps *steps);

/* The same for many texts, with memory (of words seen before, among others) that is kept from one to the next. One thread at a time; steps
 * and bpe live longer. bpe may be NULL for words alone. */
typedef struct sfa_encoder sfa_encoder;
sfa_status sfa_encoder_create(sfa_context *ctx, const sfa_steps *steps, const sfa_bpe *bpe, sfa_encoder **encoder);
sfa_status sfa_encoder_encode(sfa_encoder *encoder, bool parse_special, const uint8_t *text, size_t len, sfa_ids *ids);
/* Calls fn with each word instead; steps without added tokens. */
typedef sfa_status (*sfa_word_fn)(void *user, const uint8_t *word, size_t len);
sfa_status sfa_encoder_words(sfa_encoder *encoder, const uint8_t *text, size_t len, sfa_word_fn fn, void *user);
/* Takes NULL. */
void sfa_encoder_destroy(sfa_encoder *encoder);

/* GPT-2's cut into words. */
#define SFA_PATTERN_GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

#endif
