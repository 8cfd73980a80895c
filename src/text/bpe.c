/* Byte-pair encoding of one word: a linked list of symbols, and a heap of the pairs that can be merged. */
#include "text/bpe.h"

#include "base/half.h"
#include "text/utf8.h"

#include <string.h>

/* Merging a pair leaves its left symbol, longer; the right one gets id GONE. */
struct sfa_bpe_symbol {
  int32_t id;
  int32_t previous, next; /* -1: none */
  uint32_t at, len;       /* in the word */
};
enum { UNKNOWN = -1, GONE = -2 };

struct sfa_bpe_pair {
  uint64_t order; /* rank << 32 | left symbol: the smallest is merged first */
  int32_t id;     /* of the result */
  uint32_t len;   /* of the result */
};

/* ---- The heap ---------------------------------------------------------------------------------------------------------------- */

static sfa_status heap_push(sfa_context *ctx, sfa_bpe_scratch *s, struct sfa_bpe_pair pair) {
  SFA_TRY(sfa_array_reserve(ctx, (void **)&s->pairs, &s->pair_capacity, s->n_pairs + 1, sizeof *s->pairs));
  size_t i = s->n_pairs++;
  for (; i > 0 && s->pairs[(i - 1) / 2].order > pair.order; i = (i - 1) / 2)
    s->pairs[i] = s->pairs[(i - 1) / 2];
  s->pairs[i] = pair;
  return SFA_OK;
}

static struct sfa_bpe_pair heap_pop(sfa_bpe_scratch *s) {
  struct sfa_bpe_pair top = s->pairs[0], last = s->pairs[--s->n_pairs];
  size_t i = 0;
  for (size_t child = 1; child < s->n_pairs; child = 2 * i + 1) {
    if (child + 1 < s->n_pairs && s->pairs[child + 1].order < s->pairs[child].order)
      child++;
    if (s->pairs[child].order >= last.order)
      break;
    s->pairs[i] = s->pairs[child];
    i = child;
  }
  s->pairs[i] = last;
  return top;
}

/* ---- Merging ----------------------------------------------------------------------------------------------------------------- */

/* Floats to integers in falling order: the best score has the smallest rank. */
static uint32_t rank_of_score(float score) {
  uint32_t bits = sfa_bits_of(score + 0.0f); /* -0 becomes 0 */
  return bits & 0x80000000u ? bits : 0x7fffffffu - bits;
}

/* Offers the pair (left, next of left) to the heap, if it makes a token. */
static sfa_status offer_pair(sfa_context *ctx, const sfa_bpe *bpe, sfa_bpe_scratch *s, const uint8_t *word, int32_t left) {
  if (left < 0 || s->symbols[left].next < 0)
    return SFA_OK;
  const struct sfa_bpe_symbol *a = s->symbols + left, *b = s->symbols + a->next;
  struct sfa_bpe_pair pair = {.order = (uint32_t)left, .len = a->len + b->len};
  if (bpe->by_score) {
    pair.id = pair.len <= bpe->longest ? sfa_text_table_find(&bpe->ids, word + a->at, pair.len) : -1;
    if (pair.id < 0)
      return SFA_OK;
    pair.order |= (uint64_t)rank_of_score(bpe->scores[pair.id]) << 32;
  } else {
    uint64_t merge;
    if (a->id < 0 || b->id < 0 || !sfa_pair_map_find(&bpe->merges, a->id, b->id, &merge))
      return SFA_OK;
    pair.id = (int32_t)(uint32_t)merge;
    pair.order |= merge & 0xffffffff00000000ull;
  }
  return heap_push(ctx, s, pair);
}

static bool all_bytes_known(const sfa_bpe *bpe, const uint8_t *text, size_t len) {
  for (size_t i = 0; i < len; i++)
    if (bpe->byte_ids[text[i]] < 0)
      return false;
  return true;
}

/* Cuts the word into its first symbols. Returns how many. */
static int32_t first_symbols(const sfa_bpe *bpe, struct sfa_bpe_symbol *symbols, const uint8_t *word, size_t len) {
  int32_t n = 0;
  for (size_t at = 0, char_len = 1; at < len; at += char_len) {
    int32_t id;
    if (bpe->byte_level) {
      id = bpe->byte_ids[word[at]];
    } else {
      sfa_utf8_decode(word + at, &char_len);
      id = sfa_text_table_find(&bpe->ids, word + at, char_len);
    }
    if (id < 0 && bpe->byte_fallback && all_bytes_known(bpe, word + at, char_len)) {
      for (size_t i = at; i < at + char_len; i++, n++)
        symbols[n] = (struct sfa_bpe_symbol){bpe->byte_ids[word[i]], n - 1, n + 1, (uint32_t)i, 1};
      continue;
    }
    if (id < 0) {
      id = bpe->unknown_id >= 0 ? bpe->unknown_id : UNKNOWN;
      if (id == UNKNOWN &&
          !bpe->by_score) /* it vanishes, and its neighbours meet; by score it stays: a pair is looked up as the text it spans */
        continue;
      if (bpe->fuse_unknown && n > 0 && symbols[n - 1].id == id && symbols[n - 1].at + symbols[n - 1].len == at) {
        symbols[n - 1].len += (uint32_t)char_len;
        continue;
      }
    }
    symbols[n] = (struct sfa_bpe_symbol){id, n - 1, n + 1, (uint32_t)at, (uint32_t)char_len};
    n++;
  }
  if (n > 0)
    symbols[n - 1].next = -1;
  return n;
}

static sfa_status merge_word(sfa_context *ctx, const sfa_bpe *bpe, sfa_bpe_scratch *s, const uint8_t *word, size_t len, sfa_ids *ids) {
  SFA_TRY(sfa_array_reserve(ctx, (void **)&s->symbols, &s->symbol_capacity, len, sizeof *s->symbols));
  int32_t n = first_symbols(bpe, s->symbols, word, len);
  s->n_pairs = 0;
  for (int32_t i = 0; i < n; i++)
    SFA_TRY(offer_pair(ctx, bpe, s, word, i));
  while (s->n_pairs > 0) {
    struct sfa_bpe_pair pair = heap_pop(s);
    int32_t left = (int32_t)(uint32_t)pair.order, right = s->symbols[left].next;
    /* Symbols only grow, so a pair at the same place with the same total length is still the pair that was offered. */
    if (s->symbols[left].id == GONE || right < 0 || s->symbols[left].len + s->symbols[right].len != pair.len)
      continue;
    s->symbols[left].id = pair.id;
    s->symbols[left].len = pair.len;
    s->symbols[left].next = s->symbols[right].next;
    s->symbols[right].id = GONE;
    if (s->symbols[left].next >= 0)
      s->symbols[s->symbols[left].next].previous = left;
    SFA_TRY(offer_pair(ctx, bpe, s, word, s->symbols[left].previous));
    SFA_TRY(offer_pair(ctx, bpe, s, word, left));
  }
  for (int32_t i = n > 0 ? 0 : -1; i >= 0; i = s->symbols[i].next)
    if (s->symbols[i].id >= 0)
      SFA_TRY(sfa_ids_append(ctx, ids, &s->symbols[i].id, 1));
  return SFA_OK;
}

/* A text repeats its words: most cost one look-up. Bounded, so that a text of endless new words costs bounded memory. */
enum { WORD_CACHE_LEN = 48, WORD_CACHE_COUNT = 1 << 17 };

sfa_status sfa_bpe_word(sfa_context *ctx, const sfa_bpe *bpe, sfa_bpe_scratch *s, const uint8_t *word, size_t len, sfa_ids *ids) {
  if (len == 0)
    return SFA_OK;
  if (len > INT32_MAX)
    return sfa_fail(ctx, SFA_ERROR_ARGUMENT, "a word of %zu bytes is too long to tokenize; cut the text into parts below 2 GiB", len);
  if (bpe->whole_words) {
    int32_t id = len <= bpe->longest ? sfa_text_table_find(&bpe->ids, word, len) : -1;
    if (id >= 0)
      return sfa_ids_append(ctx, ids, &id, 1);
  }
  if (len > WORD_CACHE_LEN)
    return merge_word(ctx, bpe, s, word, len, ids);
  int32_t at = sfa_text_table_find(&s->words, word, len);
  if (at >= 0)
    return sfa_ids_append(ctx, ids, s->word_ids.data + at + 1, (size_t)s->word_ids.data[at]);
  size_t before = ids->len;
  SFA_TRY(merge_word(ctx, bpe, s, word, len, ids));
  if (s->words.count >= WORD_CACHE_COUNT)
    return SFA_OK;
  int32_t n_ids = (int32_t)(ids->len - before);
  SFA_TRY(sfa_text_table_add(ctx, &s->words, word, len, (int32_t)s->word_ids.len, NULL));
  SFA_TRY(sfa_ids_append(ctx, &s->word_ids, &n_ids, 1));
  return n_ids ? sfa_ids_append(ctx, &s->word_ids, ids->data + before, (size_t)n_ids) : SFA_OK;
}

void sfa_bpe_scratch_free(sfa_context *ctx, sfa_bpe_scratch *s) {
  sfa_free(ctx, s->symbols);
  sfa_free(ctx, s->pairs);
  sfa_text_table_free(ctx, &s->words);
  sfa_free(ctx, s->word_ids.data);
  *s = (sfa_bpe_scratch){0};
}

/* ---- Building ---------------------------------------------------------------------------------------------------------------- */

sfa_status sfa_bpe_add_merge(sfa_context *ctx, sfa_bpe *bpe, const uint8_t *left, size_t left_len, const uint8_t *right, size_t right_len) {
  sfa_bytes whole = {0};
  sfa_status status = sfa_bytes_append(ctx, &whole, left, left_len);
  if (status == SFA_OK)
    status = sfa_bytes_append(ctx, &whole, right, right_len);
  if (status == SFA_OK) {
    int32_t a = sfa_text_table_find(&bpe->ids, left, left_len), b = sfa_text_table_find(&bpe->ids, right, right_len);
    int32_t id = sfa_text_table_find(&bpe->ids, whole.data, whole.len);
    uint64_t rank = bpe->n_merges++;
    if (a < 0 || b < 0 || id < 0)
      status = sfa_fail(ctx, SFA_ERROR_FORMAT,
                        "merge %zu of the tokenizer (\"%.*s\" + \"%.*s\") %s is not in its vocabulary; the file is damaged", (size_t)rank,
                        (int)(left_len < 64 ? left_len : 64), (const char *)left, (int)(right_len < 64 ? right_len : 64),
                        (const char *)right, id < 0 ? "makes a token that" : "has a part that");
    else /* a pair named twice has its last rank */
      status = sfa_pair_map_set(ctx, &bpe->merges, a, b, rank << 32 | (uint32_t)id, NULL);
  }
  sfa_free(ctx, whole.data);
  return status;
}

void sfa_bpe_free(sfa_context *ctx, sfa_bpe *bpe) {
  sfa_text_table_free(ctx, &bpe->ids);
  sfa_pair_map_free(ctx, &bpe->merges);
}
