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
 * it. Checks all but the blocks of ids: a length that does not fit, a damaged header, another version, shards of different tokenizers.
 * SFA_ERROR_FORMAT names the file. Cost: a page or two of each file. */
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

#ifdef __cplusplus
}
#endif
#endif
