/* cuda/cuda_help.h: small kernels between the stages: lengths, page tables, slots, and what the API has beside attention. Contracts as in
 * cuda_stages.h. */
#ifndef SFA_CUDA_HELP_H
#define SFA_CUDA_HELP_H

#include "cuda/cuda_stages.h"

#ifdef __cplusplus
extern "C" {
#endif

/* words to[0 .. n - 1] = values [n] (host, n <= SFA_CUDA_WORDS), which travel with the launch: nothing has to be kept for it. */
enum { SFA_CUDA_WORDS = 256 };
const char *sfa_cuda_help_words(uint64_t *to, int32_t n, const uint64_t *values, sfa_cuda_stream stream);

/* lens[i * stride], i < n: becomes len, or what is less. */
typedef enum sfa_cuda_len_change { SFA_CUDA_LEN_IS, SFA_CUDA_LEN_AT_MOST } sfa_cuda_len_change;
const char *sfa_cuda_help_lens(int32_t *lens, int64_t stride, int64_t n, int32_t len, sfa_cuda_len_change change, sfa_cuda_stream stream);

/* What lengths say of a call: numbers[0] = 0, [1] = all queries, [2] = 0, [3] = all keys, [4 + b] = keys of sequence b. */
enum { SFA_CUDA_NUMBERS = 4 };
const char *sfa_cuda_help_numbers(const sfa_cuda_tokens *q, const sfa_cuda_tokens *k, int32_t *numbers, sfa_cuda_stream stream);

/* Keys first .. first + most - 1 of B sequences of n_keys [B], n of them: lens[b] = n, and ends[b] = n_keys[b] - first (sfa_cuda_prefill).
 */
const char *sfa_cuda_help_span(int32_t n_sequences, const int32_t *n_keys, int64_t first, int64_t most, int32_t *lens, int32_t *ends,
                               sfa_cuda_stream stream);

/* Tables of B sequences: pages [B][max_pages], n_keys [B] at most max_keys. From a cache's: rows first_row + b of `from`; those of `rows`
 * (host, at most SFA_CUDA_WORDS sequences) where it is not NULL. From a pool: page block_table[b][i] of n_pages. */
typedef struct sfa_cuda_tables {
  int32_t n_sequences, first_row;
  const int32_t *rows;
  unsigned char *const *from;
  const unsigned char *pool;
  size_t page_bytes;
  int64_t n_pages;
  const int32_t *block_table;
  const int32_t *lens;
  int64_t from_stride, max_pages, max_keys;
  unsigned char **pages;
  int32_t *n_keys;
} sfa_cuda_tables;
const char *sfa_cuda_help_tables(const sfa_cuda_tables *args, sfa_cuda_stream stream);

/* Slot i of a pool as a table of one page and the token in it; slots that the pool has not: the page `nowhere`. */
const char *sfa_cuda_help_slots(int64_t n, const int64_t *slots, unsigned char *pool, size_t page_bytes, int64_t n_pages,
                                unsigned char *nowhere, unsigned char **pages, int32_t *tokens, sfa_cuda_stream stream);

/* Rows of row_bytes, one a token: packed, and apart as [n_sequences][max_seqlen] with those of a shorter sequence at the end of its places
 * (at_end) or at their beginning. */
typedef struct sfa_cuda_places {
  sfa_cuda_tokens tokens;
  int64_t row_bytes;
  int32_t at_end;
  void *packed, *apart;
} sfa_cuda_places;
const char *sfa_cuda_help_unpack(const sfa_cuda_places *args, sfa_cuda_stream stream); /* packed -> apart, zeros where no token is */
const char *sfa_cuda_help_pack(const sfa_cuda_places *args, sfa_cuda_stream stream);   /* apart -> packed; apart NULL: zeros */

/* sfa_attention_merge of rows [tokens][n_heads]. */
const char *sfa_cuda_help_merge(const sfa_cuda_tokens *tokens, int32_t n_heads, int32_t dim, float *out_a, float *lse_a, const float *out_b,
                                const float *lse_b, sfa_cuda_stream stream);
/* Codes as rows [n_rows][dim], row_stride elements apart, and as bitmaps [n_rows][ceil(dim / 32)]; NULL: not wanted. Ids beyond the head
 * are left out. */
const char *sfa_cuda_help_spread(const sfa_codes *codes, float *rows, int64_t row_stride, uint32_t *support, sfa_cuda_stream stream);
/* Rows [tokens][heads][..], turned back: x = x' cos + y' sin, y = y' cos - x' sin. Lines as in sfa_cuda_select without first_line; tokens
 * without cu_seqlens take the line of their place in the sequence. */
const char *sfa_cuda_help_unrotate(const sfa_cuda_tokens *tokens, int32_t n_heads, int32_t dim, const sfa_rope *rope, float *rows,
                                   int64_t token_stride, sfa_cuda_stream stream);

#ifdef __cplusplus
}
#endif
#endif
