/* sfa/data.h: training data: texts to token shards, shards to tokens. Link libsfa_engine.
 *
 * A shard is a file of token ids, mapped and never read as a whole; its bytes are in docs/LAYOUTS.md. A set of shards is PATH_00000.shard,
 * PATH_00001.shard, ..., where each knows the one before it and the last one that it is the last, so that a missing, exchanged or older
 * file in the set is noticed when the set is opened.
 */
#ifndef SFA_DATA_H
#define SFA_DATA_H

#include <sfa/engine.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Shards ------------------------------------------------------------------------------------------------------------------ */

typedef struct sfa_shards sfa_shards;

/* Opens n_paths files and sets as one row of tokens, in their order. A path that is no file names a set: PATH_00000.shard and those after
 * it. Checks all but the blocks of ids: a length that does not fit, a damaged header, another version, shards of different tokenizers
 * (SFA_ERROR_ARGUMENT). SFA_ERROR_FORMAT names the file. Cost: a page or two of each file. */
SFA_API sfa_status sfa_shards_open(sfa_context *ctx, const char *const *paths, int64_t n_paths, sfa_shards **shards);
SFA_API void sfa_shards_close(sfa_shards *shards);

typedef struct sfa_shards_info {
  int64_t n_shards, n_tokens, n_documents; /* tokens include one end token a document */
  int64_t bytes;                           /* of the files */
  int32_t vocab_size;
  int32_t end_token;  /* the last token of every document */
  uint64_t tokenizer; /* fingerprint: sfa_tokenizer_fingerprint */
} sfa_shards_info;

SFA_API void sfa_shards_describe(const sfa_shards *shards, sfa_shards_info *info);
SFA_API int64_t sfa_shards_n_tokens(const sfa_shards *shards);
/* Copies tokens first .. first + n - 1 to out [n]. Each block of 65536 ids is compared with its checksum when it is first read:
 * SFA_ERROR_FORMAT names the file and the block; out then has no meaning. Ids that it gives are below vocab_size. By one thread at a time.
 */
SFA_API sfa_status sfa_shards_read(sfa_shards *shards, int64_t first, int64_t n, int32_t *out);
/* Reads all blocks and compares their checksums, at the speed of memory or of the disk; counts documents too. */
SFA_API sfa_status sfa_shards_verify(const sfa_shards *shards);

/* What shards and tokenizers have in common if they belong together: of the size of the vocabulary and the texts of up to 1024 tokens;
 * 0 for NULL. */
SFA_API uint64_t sfa_tokenizer_fingerprint(const sfa_tokenizer *tokenizer);

/* ---- Texts ------------------------------------------------------------------------------------------------------------------- */

typedef enum sfa_text_format {
  SFA_TEXT_AUTO = 0, /* by the name: .jsonl and .ndjson are rows, all else is plain; .bz2 and .xz behind it */
  SFA_TEXT_PLAIN = 1,
  SFA_TEXT_ROWS = 2 /* a JSON object a line: each is a document, the text of one of its fields */
} sfa_text_format;

/* Where documents come from. Files may be plain, .bz2 or .xz (told by their first bytes) and of any size; of a folder, those in it and
 * below whose names end in .txt, .md, .jsonl or .ndjson, or in one of these with .bz2 or .xz, in the order of their bytes; "-" is standard
 * input. */
typedef struct sfa_text_inputs {
  size_t struct_size; /* sizeof(sfa_text_inputs) */
  const char *const *paths;
  int64_t n_paths;
  sfa_text_format format;
  const char *separator; /* a line that ends a document of a plain text, as its end does. NULL: "<|endoftext|>"; "": none */
  const char *field;     /* of a row; NULL: "text" */
} sfa_text_inputs;

/* Where a pass over texts stands. */
typedef struct sfa_data_progress {
  int64_t bytes_done, bytes_total; /* of the files; bytes_total is 0 where standard input is among them */
  int64_t text_bytes;              /* of the documents */
  int64_t n_documents, n_tokens;
} sfa_data_progress;

/* Called now and then; anything but 0 stops the call with SFA_ERROR_CANCELLED. */
typedef int (*sfa_data_progress_fn)(void *user, const sfa_data_progress *progress);

typedef struct sfa_data_options {
  size_t struct_size; /* sizeof(sfa_data_options) */
  const char *train;  /* the set that is written */
  const char *valid;  /* the set of the documents that are held out; NULL: none are */
  double valid_share; /* of the documents, drawn by their numbers; with valid only */
  uint64_t seed;      /* of the draw */
  const char
      *end_token;    /* text of a special token; NULL: the one that ends a text by the tokenizer's files, else <|endoftext|> and its kin */
  int64_t shard_len; /* tokens of a shard; 0: 2^27. A shard ends with the document that reaches it */
  int64_t memory_bytes; /* for texts and ids under way; 0: 256 MB. Rows of a .jsonl may take three times their size beside it */
  sfa_data_progress_fn progress;
  void *progress_user;
} sfa_data_options;

typedef struct sfa_data_result {
  sfa_data_progress all;
  int64_t n_valid_documents, n_valid_tokens; /* of all */
} sfa_data_result;

/* Texts to shards: of each document what the tokenizer puts before a text, its tokens, the end token. Texts of special tokens inside a
 * document are text. Equal inputs, tokenizers and options give equal files, whatever the number of threads. On failure nothing is written.
 * The context's allocator is called from all threads. */
SFA_API sfa_status sfa_data_write(const sfa_tokenizer *tokenizer, const sfa_text_inputs *inputs, const sfa_data_options *options,
                                  sfa_data_result *result);

/* ---- Training a tokenizer ------------------------------------------------------------------------------------------------------ */

typedef struct sfa_tokenizer_train_options {
  size_t struct_size;         /* sizeof(sfa_tokenizer_train_options) */
  int32_t vocab_size;         /* with the special tokens and the 256 bytes */
  const char *const *special; /* [n_special] they get the first ids. NULL: "<|endoftext|>" */
  int32_t n_special;
  int64_t min_count;    /* a pair seen less often is not merged; 0: 2 */
  int64_t memory_bytes; /* for the words seen and the texts under way; 0: 1 GB. Where the words take more, those seen once are forgotten */
  sfa_data_progress_fn progress;
  void *progress_user;
} sfa_tokenizer_train_options;

typedef struct sfa_tokenizer_train_result {
  sfa_data_progress all; /* n_tokens: of the texts, by the new tokenizer, special tokens aside */
  int32_t vocab_size;    /* less than asked for where no pair was left */
  int64_t n_words;       /* different ones */
  int64_t n_forgotten;   /* times that words seen once were forgotten to keep the memory */
} sfa_tokenizer_train_result;

/* A byte-level BPE with GPT-2's cut into words, written as folder/tokenizer.json and folder/tokenizer_config.json, which Hugging Face's
 * libraries and sfa_tokenizer_open read. The folder is made if it is not there. Again and again the pair of neighbouring tokens that is
 * seen most often, over all words, becomes a token; of equals, that pair whose first token's bytes come last in the order of memcmp (a
 * longer one after its beginning), then whose second's do. So the result depends on the words and how often they are seen, on nothing else.
 */
SFA_API sfa_status sfa_tokenizer_train(sfa_context *ctx, const sfa_text_inputs *inputs, const sfa_tokenizer_train_options *options,
                                       const char *folder, sfa_tokenizer_train_result *result);

#ifdef __cplusplus
}
#endif
#endif
