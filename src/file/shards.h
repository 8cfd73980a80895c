/* file/shards.h: token shards: the bytes of a file, and its writer. The reader's calls are in sfa/data.h.
 *
 *     header | ids, 2 or 4 bytes each | zeros up to a multiple of 8 | checksum of each block of 65536 ids
 *
 * The header is written last, into a file with a name of its own (PATH_00000.shard.tmp); when all shards of a set are whole and on the disk
 * they get their names. Whatever stops a writer before that leaves the shards that were there; between two renames it leaves a set whose
 * parts do not belong together, which the chain of header checksums shows to the reader.
 */
#ifndef SFA_SHARDS_H
#define SFA_SHARDS_H

#include <sfa/data.h>

#include "base/context.h"

#define SFA_SHARD_MAGIC "SFASHARD"
enum { SFA_SHARD_VERSION = 1, SFA_SHARD_ENDIAN = 0x01020304, SFA_SHARD_BLOCK_LEN = 1 << 16 };

typedef struct sfa_shard_header {
  char magic[8];
  uint32_t version, endian;
  uint32_t id_bytes; /* 2, or 4 where the vocabulary is larger than 65536 */
  uint32_t vocab_size, end_token;
  uint32_t is_last;     /* of its set: 1 */
  uint64_t tokenizer;   /* fingerprint */
  uint64_t n_tokens;    /* > 0; the last one is end_token */
  uint64_t n_documents; /* > 0 */
  uint64_t number;      /* in its set, from 0 */
  uint64_t previous;    /* the `checksum` of the set's shard before this one; 0 for the first */
  uint64_t block_sums;  /* checksum of the list of blocks' checksums */
  uint64_t reserved[5];
  uint64_t checksum; /* of the 120 bytes before it */
} sfa_shard_header;

typedef struct sfa_shard_settings {
  int32_t vocab_size, end_token;
  uint64_t tokenizer;
  int64_t shard_len; /* tokens: a document that ends at or behind it ends its shard */
} sfa_shard_settings;

typedef struct sfa_shard_writer sfa_shard_writer;

/* A writer of the set `path`; makes its first file. */
sfa_status sfa_shard_writer_open(sfa_context *ctx, const char *path, const sfa_shard_settings *settings, sfa_shard_writer **writer);
/* Appends ids of the current document. SFA_ERROR_ARGUMENT: an id outside the vocabulary. */
sfa_status sfa_shard_writer_add(sfa_shard_writer *writer, const int32_t *ids, int64_t n);
/* Ends the current document, with the end token. */
sfa_status sfa_shard_writer_end_document(sfa_shard_writer *writer);
/* Puts all shards on the disk and gives them their names. SFA_ERROR_ARGUMENT: there is no document. */
sfa_status sfa_shard_writer_commit(sfa_shard_writer *writer);
/* Removes what was not committed. Takes NULL. */
void sfa_shard_writer_close(sfa_shard_writer *writer);
/* Tokens and documents until now. */
int64_t sfa_shard_writer_n_tokens(const sfa_shard_writer *writer);
int64_t sfa_shard_writer_n_documents(const sfa_shard_writer *writer);

#endif
