/* file/index_format.h: the document index as bytes; docs/LAYOUTS.md tells it in full. Shared by its reader and its writer.
 *
 *     0      header
 *     4096   slot 0                     two places for the newest state: a commit overwrites the older one
 *     8192   slot 1
 *     12288  settings                   what the pages were made by
 *            segment, segment, ...      each at a multiple of 64: head, tokens, sources, names, page sums, pages
 *
 * A commit writes its segment behind all that counts, has the disk confirm it, writes the slot, has it confirmed. Whatever ends it before
 * the last step leaves the other slot, and everything that this one names, as it was. Nothing that counts is ever overwritten, so readers
 * need no lock.
 */
#ifndef SFA_INDEX_FORMAT_H
#define SFA_INDEX_FORMAT_H

#include <stdint.h>

#define SFA_INDEX_MAGIC "SFAINDEX"
#define SFA_SEGMENT_MAGIC "SFASEGMT"

enum {
  SFA_INDEX_VERSION = 1,
  SFA_INDEX_ENDIAN = 0x01020304,
  SFA_INDEX_SLOT_BYTES = 4096, /* a block of the disk each, so that a torn write harms one of these parts at most */
  SFA_INDEX_SETTINGS_AT = 3 * SFA_INDEX_SLOT_BYTES,
  SFA_INDEX_ALIGN = 64,
  SFA_INDEX_PAGE_FORMAT = 1, /* "A page of the cache" in docs/LAYOUTS.md */
  SFA_INDEX_PAGE_LEN = 64,
  SFA_INDEX_MAX_LAYERS = 65536
};

/* All numbers little-endian. Checksums: base/hash.h, seed 0, of the bytes of the struct before them. */
typedef struct sfa_index_header {
  char magic[8];
  uint32_t version, endian;
  uint64_t settings_bytes;
  uint64_t settings_checksum;
  uint64_t reserved[3];
  uint64_t checksum;
} sfa_index_header;

/* The settings: this, then n_layers of sfa_index_layer_entry, then the model's name. */
typedef struct sfa_index_settings_head {
  uint64_t model, tokenizer;
  uint32_t page_format, page_len, n_layers, n_kv_heads, head_dim, head_dim_v, weights, vocab_size;
  uint64_t name_bytes;
  uint64_t reserved;
} sfa_index_settings_head;

typedef struct sfa_index_layer_entry {
  uint32_t k, k_q, k_dtype, v_dtype; /* dtypes: sfa_dtype */
  uint64_t page_bytes;
} sfa_index_layer_entry;

typedef struct sfa_index_slot {
  uint64_t sequence;            /* 1, 2, ...: the greater of the two slots holds; slot number sequence % 2 */
  uint64_t bytes;               /* of the file that belong to this state */
  uint64_t segment;             /* where the newest segment begins */
  uint64_t n_tokens, n_sources; /* of all segments together */
  uint64_t reserved[2];
  uint64_t checksum;
} sfa_index_slot;

typedef struct sfa_index_segment {
  char magic[8];
  uint64_t previous; /* where the segment before begins; 0: none */
  uint64_t first_token, n_tokens, first_source, n_sources;
  uint64_t name_bytes;    /* of the names, each with a NUL behind it */
  uint64_t pages_at, end; /* where its pages begin, and what lies behind them */
  uint64_t meta_checksum; /* of all from this head's end to pages_at */
  uint64_t reserved[5];
  uint64_t checksum;
} sfa_index_segment;

typedef struct sfa_index_source_entry {
  uint64_t first_byte, n_bytes, first_token, n_tokens;
} sfa_index_source_entry;

_Static_assert(sizeof(sfa_index_header) == 64 && sizeof(sfa_index_slot) == 64, "as docs/LAYOUTS.md has them");
_Static_assert(sizeof(sfa_index_settings_head) == 64 && sizeof(sfa_index_layer_entry) == 24, "as docs/LAYOUTS.md has them");
_Static_assert(sizeof(sfa_index_segment) == 128 && sizeof(sfa_index_source_entry) == 32, "as docs/LAYOUTS.md has them");

#endif
