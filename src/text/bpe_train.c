/* Training a BPE: the words as lists of tokens, the count of every pair of neighbours, and the words where each pair is. A merge touches
 * only the words that have its pair; a heap gives the pair of the highest count. */
#include "text/bpe_train.h"

#include <string.h>

#include "text/utf8.h"

/* ---- Words ------------------------------------------------------------------------------------------------------------------- */

static sfa_status add_part(sfa_context *ctx, sfa_word_counts *c, const uint8_t *word, size_t len, int64_t n) {
  int32_t present;
  if (c->words.count >= INT32_MAX)
    return sfa_fail(ctx, SFA_ERROR_MEMORY, "the texts have more than %d different words", INT32_MAX);
  SFA_TRY(sfa_array_reserve(ctx, (void **)&c->counts, &c->capacity, c->words.count + 1, sizeof *c->counts));
  SFA_TRY(sfa_text_table_add(ctx, &c->words, word, len, (int32_t)c->words.count, &present));
  if (present < 0)
    c->counts[c->words.count - 1] = n;
  else
    c->counts[present] += n;
  return SFA_OK;
}

sfa_status sfa_word_counts_add(sfa_context *ctx, sfa_word_counts *c, const uint8_t *word, size_t len, int64_t n) {
  for (; len > SFA_WORD_MOST_BYTES; len -= SFA_WORD_MOST_BYTES, word += SFA_WORD_MOST_BYTES)
    SFA_TRY(add_part(ctx, c, word, SFA_WORD_MOST_BYTES, n));
  return add_part(ctx, c, word, len, n);
}

/* Adds the words of `more` that were seen at least `least` times. */
static sfa_status join(sfa_context *ctx, sfa_word_counts *c, const sfa_word_counts *more, int64_t least) {
  for (const struct sfa_text_slot *slot = more->words.slots; slot < more->words.slots + more->words.capacity; slot++)
    if (slot->used && more->counts[slot->value] >= least)
      SFA_TRY(add_part(ctx, c, more->words.texts.data + slot->at, slot->len, more->counts[slot->value]));
  return SFA_OK;
}

sfa_status sfa_word_counts_join(sfa_context *ctx, sfa_word_counts *c, const sfa_word_counts *more) { return join(ctx, c, more, 1); }

sfa_status sfa_word_counts_prune(sfa_context *ctx, sfa_word_counts *c) {
  sfa_word_counts kept = {0};
  sfa_status status = join(ctx, &kept, c, 2);
  sfa_word_counts_free(ctx, status == SFA_OK ? c : &kept);
  if (status == SFA_OK)
    *c = kept;
  return status;
}

size_t sfa_word_counts_bytes(const sfa_word_counts *c) {
  return c->words.capacity * sizeof *c->words.slots + c->words.texts.capacity + c->capacity * sizeof *c->counts;
}

void sfa_word_counts_free(sfa_context *ctx, sfa_word_counts *c) {
  sfa_text_table_free(ctx, &c->words);
  sfa_free(ctx, c->counts);
  *c = (sfa_word_counts){0};
}

/* ---- The state of training ----------------------------------------------------------------------------------------------------- */

typedef struct word {
  size_t at;   /* of its tokens */
  int32_t len; /* in tokens; shrinks */
  int64_t count;
} word;

enum { NO_PLACE = -1 };

typedef struct pair {
  int32_t left, right;
  int64_t count;  /* over all words */
  int32_t places; /* first of the list of words that had it; NO_PLACE: none */
  bool merged;    /* it is among the merges */
  bool grown;     /* its count rose in this merge: the heap has to know */
} pair;

typedef struct place {
  int32_t word, next;
} place;

typedef struct ranked {
  int64_t count; /* of the pair when it was put here */
  int32_t pair;
} ranked;

typedef struct trainer {
  sfa_context *ctx;
  sfa_bpe_vocabulary *out;
  sfa_text_table ids; /* text -> token */
  word *words;        /* [n_words] */
  size_t n_words;
  int32_t *symbols; /* tokens of the words */
  sfa_pair_map pair_ids;
  pair *pairs;
  size_t n_pairs, pair_capacity;
  place *places; /* a pool: lists are linked by index */
  size_t n_places, place_capacity;
  int32_t free_places; /* list of those given back */
  int32_t *grown;      /* pairs that are `grown` */
  size_t n_grown, grown_capacity;
  ranked *heap;
  size_t n_heap, heap_capacity;
} trainer;

/* ---- The heap ---------------------------------------------------------------------------------------------------------------- */

static int compare_tokens(const sfa_bpe_vocabulary *v, int32_t a, int32_t b) {
  const sfa_bpe_token *x = &v->tokens[a], *y = &v->tokens[b];
  int order = memcmp(v->texts.data + x->at, v->texts.data + y->at, x->len < y->len ? x->len : y->len);
  return order ? order : (x->len > y->len) - (x->len < y->len);
}

/* Is a to be merged before b? */
static bool is_before(const trainer *t, ranked a, ranked b) {
  if (a.count != b.count)
    return a.count > b.count;
  const pair *x = &t->pairs[a.pair], *y = &t->pairs[b.pair];
  int order = compare_tokens(t->out, x->left, y->left);
  return (order ? order : compare_tokens(t->out, x->right, y->right)) > 0;
}

static sfa_status heap_push(trainer *t, int32_t pair_id) {
  SFA_TRY(sfa_array_reserve(t->ctx, (void **)&t->heap, &t->heap_capacity, t->n_heap + 1, sizeof *t->heap));
  ranked new = {t->pairs[pair_id].count, pair_id};
  size_t i = t->n_heap++;
  for (; i > 0 && is_before(t, new, t->heap[(i - 1) / 2]); i = (i - 1) / 2)
    t->heap[i] = t->heap[(i - 1) / 2];
  t->heap[i] = new;
  return SFA_OK;
}

static ranked heap_pop(trainer *t) {
  ranked top = t->heap[0], last = t->heap[--t->n_heap];
  size_t i = 0;
  for (size_t child = 1; child < t->n_heap; child = 2 * i + 1) {
    if (child + 1 < t->n_heap && is_before(t, t->heap[child + 1], t->heap[child]))
      child++;
    if (!is_before(t, t->heap[child], last))
      break;
    t->heap[i] = t->heap[child];
    i = child;
  }
  t->heap[i] = last;
  return top;
}

/* ---- Pairs ------------------------------------------------------------------------------------------------------------------- */

static sfa_status find_pair(trainer *t, int32_t left, int32_t right, int32_t *id) {
  uint64_t value;
  if (sfa_pair_map_find(&t->pair_ids, left, right, &value)) {
    *id = (int32_t)value;
    return SFA_OK;
  }
  if (t->n_pairs == INT32_MAX)
    return sfa_fail(t->ctx, SFA_ERROR_MEMORY, "the words have more than %d different pairs", INT32_MAX);
  SFA_TRY(sfa_array_reserve(t->ctx, (void **)&t->pairs, &t->pair_capacity, t->n_pairs + 1, sizeof *t->pairs));
  *id = (int32_t)t->n_pairs++;
  t->pairs[*id] = (pair){.left = left, .right = right, .places = NO_PLACE};
  return sfa_pair_map_set(t->ctx, &t->pair_ids, left, right, (uint64_t)*id, NULL);
}

/* A pair of a word that is seen `count` times is there once more. */
static sfa_status add_pair(trainer *t, int32_t left, int32_t right, int32_t word_id, int64_t count) {
  int32_t id = 0, at = t->free_places;
  SFA_TRY(find_pair(t, left, right, &id));
  pair *p = &t->pairs[id];
  p->count += count;
  if (!p->grown) {
    SFA_TRY(sfa_array_reserve(t->ctx, (void **)&t->grown, &t->grown_capacity, t->n_grown + 1, sizeof *t->grown));
    t->grown[t->n_grown++] = id;
    p->grown = true;
  }
  if (p->places != NO_PLACE && t->places[p->places].word == word_id)
    return SFA_OK;
  if (at != NO_PLACE) {
    t->free_places = t->places[at].next;
  } else {
    if (t->n_places == INT32_MAX)
      return sfa_fail(t->ctx, SFA_ERROR_MEMORY, "the words have more than %d pairs: train on a part of the texts", INT32_MAX);
    SFA_TRY(sfa_array_reserve(t->ctx, (void **)&t->places, &t->place_capacity, t->n_places + 1, sizeof *t->places));
    at = (int32_t)t->n_places++;
  }
  t->places[at] = (place){word_id, p->places};
  p->places = at;
  return SFA_OK;
}

/* Both tokens are there, so the pair is known. */
static void drop_pair(trainer *t, int32_t left, int32_t right, int64_t count) {
  uint64_t id;
  if (sfa_pair_map_find(&t->pair_ids, left, right, &id))
    t->pairs[id].count -= count;
}

static sfa_status push_grown(trainer *t, int64_t min_count) {
  for (size_t i = 0; i < t->n_grown; i++) {
    pair *p = &t->pairs[t->grown[i]];
    p->grown = false;
    if (p->count >= min_count)
      SFA_TRY(heap_push(t, t->grown[i]));
  }
  t->n_grown = 0;
  return SFA_OK;
}

/* ---- Merging ----------------------------------------------------------------------------------------------------------------- */

/* The token of a text; a new one if there is none. */
static sfa_status make_token(trainer *t, const uint8_t *text, size_t len, int32_t *id) {
  sfa_bpe_vocabulary *v = t->out;
  int32_t present;
  SFA_TRY(sfa_text_table_add(t->ctx, &t->ids, text, len, (int32_t)v->n_tokens, &present));
  *id = present;
  if (present >= 0)
    return SFA_OK;
  SFA_TRY(sfa_array_reserve(t->ctx, (void **)&v->tokens, &v->token_capacity, v->n_tokens + 1, sizeof *v->tokens));
  *id = (int32_t)v->n_tokens;
  v->tokens[v->n_tokens++] = (sfa_bpe_token){v->texts.len, len};
  return sfa_bytes_append(t->ctx, &v->texts, text, len);
}

static sfa_status join_tokens(trainer *t, int32_t left, int32_t right, int32_t *id) {
  const sfa_bpe_vocabulary *v = t->out;
  sfa_bytes whole = {0};
  sfa_status status = sfa_bytes_append(t->ctx, &whole, v->texts.data + v->tokens[left].at, v->tokens[left].len);
  if (status == SFA_OK)
    status = sfa_bytes_append(t->ctx, &whole, v->texts.data + v->tokens[right].at, v->tokens[right].len);
  if (status == SFA_OK)
    status = make_token(t, whole.data, whole.len, id);
  sfa_free(t->ctx, whole.data);
  return status;
}

/* Each left, right of a word becomes `new`, and the pairs around it are counted anew. */
static sfa_status merge_in_word(trainer *t, int32_t word_id, int32_t left, int32_t right, int32_t new) {
  word *w = &t->words[word_id];
  int32_t *s = t->symbols + w->at, n = 0;
  for (int32_t i = 0; i < w->len; i++) {
    if (s[i] != left || i + 1 == w->len || s[i + 1] != right) {
      s[n++] = s[i];
      continue;
    }
    drop_pair(t, left, right, w->count);
    if (n > 0) {
      drop_pair(t, s[n - 1], left, w->count);
      SFA_TRY(add_pair(t, s[n - 1], new, word_id, w->count));
    }
    if (i + 2 < w->len) {
      drop_pair(t, right, s[i + 2], w->count);
      SFA_TRY(add_pair(t, new, s[i + 2], word_id, w->count));
    }
    s[n++] = new;
    i++;
  }
  w->len = n;
  return SFA_OK;
}

/* Merges a pair in all words that have it. */
static sfa_status merge_pair(trainer *t, int32_t pair_id) {
  sfa_bpe_vocabulary *v = t->out;
  pair *p = &t->pairs[pair_id];
  int32_t left = p->left, right = p->right, new, at = p->places;
  if (!p->merged) {
    SFA_TRY(sfa_array_reserve(t->ctx, (void **)&v->merges, &v->merge_capacity, v->n_merges + 1, sizeof *v->merges));
    v->merges[v->n_merges++] = (sfa_bpe_merge){left, right};
  }
  p->merged = true;
  p->places = NO_PLACE;
  SFA_TRY(join_tokens(t, left, right, &new));
  while (at != NO_PLACE) {
    place here = t->places[at];
    t->places[at].next = t->free_places;
    t->free_places = at;
    SFA_TRY(merge_in_word(t, here.word, left, right, new));
    at = here.next;
  }
  return SFA_OK;
}

/* ---- The whole --------------------------------------------------------------------------------------------------------------- */

/* The 256 bytes, in the order of their characters: first those that are written as themselves. */
static sfa_status add_bytes(trainer *t) {
  for (int as_itself = 1; as_itself >= 0; as_itself--)
    for (int b = 0; b < 256; b++) {
      int32_t id;
      if ((sfa_byte_alphabet_char((uint8_t)b) == (uint32_t)b) == as_itself)
        SFA_TRY(make_token(t, &(uint8_t){(uint8_t)b}, 1, &id));
    }
  return SFA_OK;
}

static sfa_status add_words(trainer *t, const sfa_word_counts *counts) {
  size_t n_symbols = counts->words.texts.len, at = 0;
  int32_t id_of[256];
  for (int i = 0; i < 256; i++)
    id_of[t->out->texts.data[t->out->tokens[i].at]] = i;
  SFA_TRY(sfa_alloc_zero(t->ctx, counts->words.count, sizeof *t->words, "the words of the texts", (void **)&t->words));
  SFA_TRY(sfa_alloc_zero(t->ctx, n_symbols, sizeof *t->symbols, "the words of the texts", (void **)&t->symbols));
  for (const struct sfa_text_slot *slot = counts->words.slots; slot < counts->words.slots + counts->words.capacity; slot++) {
    if (!slot->used)
      continue;
    const uint8_t *text = counts->words.texts.data + slot->at;
    word *w = &t->words[t->n_words];
    *w = (word){at, (int32_t)slot->len, counts->counts[slot->value]};
    for (uint32_t i = 0; i < slot->len; i++)
      t->symbols[at++] = id_of[text[i]];
    for (int32_t i = 0; i + 1 < w->len; i++)
      SFA_TRY(add_pair(t, t->symbols[w->at + (size_t)i], t->symbols[w->at + (size_t)i + 1], (int32_t)t->n_words, w->count));
    t->n_words++;
  }
  return SFA_OK;
}

static sfa_status train(trainer *t, const sfa_word_counts *counts, size_t n_tokens, int64_t min_count) {
  SFA_TRY(add_bytes(t));
  SFA_TRY(add_words(t, counts));
  SFA_TRY(push_grown(t, min_count));
  while (t->n_heap > 0 && t->out->n_tokens < n_tokens) {
    ranked top = heap_pop(t);
    int64_t count = t->pairs[top.pair].count;
    if (count == top.count) {
      SFA_TRY(merge_pair(t, top.pair));
      SFA_TRY(push_grown(t, min_count));
    } else if (count >= min_count && count < top.count) { /* it fell since; where it rose, a newer entry is in the heap */
      SFA_TRY(heap_push(t, top.pair));
    }
  }
  for (size_t i = 0; i < t->n_words; i++)
    t->out->n_text_tokens += t->words[i].count * t->words[i].len;
  return SFA_OK;
}

sfa_status sfa_bpe_train(sfa_context *ctx, const sfa_word_counts *counts, int32_t n_tokens, int64_t min_count, sfa_bpe_vocabulary *out) {
  *out = (sfa_bpe_vocabulary){0};
  trainer t = {.ctx = ctx, .out = out, .free_places = NO_PLACE};
  sfa_status status = train(&t, counts, (size_t)n_tokens, min_count);
  sfa_text_table_free(ctx, &t.ids);
  sfa_pair_map_free(ctx, &t.pair_ids);
  sfa_free(ctx, t.words);
  sfa_free(ctx, t.symbols);
  sfa_free(ctx, t.pairs);
  sfa_free(ctx, t.places);
  sfa_free(ctx, t.grown);
  sfa_free(ctx, t.heap);
  if (status != SFA_OK)
    sfa_bpe_vocabulary_free(ctx, out);
  return status;
}

void sfa_bpe_vocabulary_free(sfa_context *ctx, sfa_bpe_vocabulary *v) {
  sfa_free(ctx, v->texts.data);
  sfa_free(ctx, v->tokens);
  sfa_free(ctx, v->merges);
  *v = (sfa_bpe_vocabulary){0};
}
