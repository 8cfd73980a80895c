/* The tokenizer's public calls, and what its loaders share. */
#include "text/tokenizer_build.h"

#include <sfa/data.h>

#include "base/hash.h"
#include "base/map.h"
#include "text/utf8.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

/* ---- Building ---------------------------------------------------------------------------------------------------------------- */

sfa_status sfa_tokenizer_create(sfa_context *ctx, sfa_tokenizer **tokenizer) {
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof **tokenizer, "a tokenizer", (void **)tokenizer));
  sfa_tokenizer *t = *tokenizer;
  t->ctx = ctx;
  t->bos_id = t->eos_id = t->bpe.unknown_id = -1;
  memset(t->bpe.byte_ids, 0xff, sizeof t->bpe.byte_ids); /* all -1 */
  return SFA_OK;
}

void sfa_tokenizer_close(sfa_tokenizer *t) {
  if (!t)
    return;
  sfa_context *ctx = t->ctx;
  sfa_steps_free(ctx, &t->steps);
  sfa_bpe_free(ctx, &t->bpe);
  sfa_free(ctx, t->tokens);
  sfa_free(ctx, t->scores);
  sfa_free(ctx, t->pieces.data);
  sfa_free(ctx, t->before.data);
  sfa_free(ctx, t->after.data);
  sfa_free(ctx, t->chat_template);
  sfa_free(ctx, t);
}

sfa_status sfa_tokenizer_put(sfa_tokenizer *t, int32_t id, const uint8_t *piece, size_t len, uint32_t flags, float score) {
  if (id < 0 || id >= SFA_TOKEN_IDS_MAX)
    return sfa_fail(t->ctx, SFA_ERROR_FORMAT, "token id %d is outside 0..%d; the tokenizer's file is damaged", id, SFA_TOKEN_IDS_MAX - 1);
  if (len > UINT32_MAX)
    return sfa_fail(t->ctx, SFA_ERROR_FORMAT, "token %d has %zu bytes; the tokenizer's file is damaged", id, len);
  size_t n = (size_t)id + 1;
  SFA_TRY(sfa_array_reserve(t->ctx, (void **)&t->tokens, &t->token_capacity, n, sizeof *t->tokens));
  if (n > t->n_tokens) {
    memset(t->tokens + t->n_tokens, 0, (n - t->n_tokens) * sizeof *t->tokens);
    t->n_tokens = n;
  }
  sfa_token *token = t->tokens + id;
  *token = (sfa_token){t->pieces.len, (uint32_t)len, token->flags | flags | SFA_TOKEN_PRESENT, score};
  return sfa_bytes_append(t->ctx, &t->pieces, piece, len);
}

sfa_status sfa_tokenizer_put_text(sfa_tokenizer *t, int32_t id, const uint8_t *text, size_t len) {
  int32_t present;
  SFA_TRY(sfa_text_table_add(t->ctx, &t->bpe.ids, text, len, id, &present));
  if (present >= 0)
    return sfa_fail(t->ctx, SFA_ERROR_FORMAT,
                    "tokens %d and %d of the vocabulary are the same text \"%.*s\"; the tokenizer's file is damaged", present, id,
                    (int)(len < 64 ? len : 64), (const char *)text);
  return SFA_OK;
}

int sfa_byte_token_read(const uint8_t *text, size_t len) {
  if (len != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>')
    return -1;
  int byte = 0;
  for (int i = 3; i < 5; i++) {
    int digit = text[i] >= '0' && text[i] <= '9' ? text[i] - '0' : text[i] >= 'A' && text[i] <= 'F' ? text[i] - 'A' + 10 : -1;
    if (digit < 0)
      return -1;
    byte = byte * 16 + digit;
  }
  return byte;
}

int32_t sfa_tokenizer_special_id(const sfa_tokenizer *t, const char *text) {
  size_t len = strlen(text);
  for (size_t i = 0; i < t->n_tokens; i++)
    if ((t->tokens[i].flags & SFA_TOKEN_SPECIAL) && t->tokens[i].len == len && memcmp(t->pieces.data + t->tokens[i].at, text, len) == 0)
      return (int32_t)i;
  return -1;
}

void sfa_tokenizer_mark_ends(sfa_tokenizer *t) {
  static const char *const ends[] = {"<|im_end|>",      "<|endoftext|>", "<|eot_id|>", "<|eom_id|>",
                                     "<|end_of_text|>", "<end_of_turn>", "<|end|>"};
  for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
    int32_t id = sfa_tokenizer_special_id(t, ends[i]);
    if (id >= 0)
      t->tokens[id].flags |= SFA_TOKEN_END;
  }
  if (t->eos_id >= 0)
    t->tokens[t->eos_id].flags |= SFA_TOKEN_END;
}

/* True if no token goes on over a space: then no merge crosses the start of a word, and words can be encoded (and remembered) apart. */
static bool words_stand_apart(const sfa_bpe *bpe, const char *space) {
  size_t n = strlen(space);
  if (sfa_text_table_find(&bpe->ids, space, n) < 0)
    return false;
  for (size_t i = 0; i < bpe->ids.capacity; i++) {
    const struct sfa_text_slot *slot = bpe->ids.slots + i;
    if (!slot->used)
      continue;
    const uint8_t *text = bpe->ids.texts.data + slot->at;
    size_t at = 0;
    while (at + n <= slot->len && memcmp(text + at, space, n) == 0)
      at += n;
    if (at < slot->len && memmem(text + at, slot->len - at, space, n))
      return false;
  }
  return true;
}

sfa_status sfa_tokenizer_finish(sfa_tokenizer *t, const char *space) {
  sfa_bpe *bpe = &t->bpe;
  if (t->n_tokens == 0 || bpe->ids.count == 0)
    return sfa_fail(t->ctx, SFA_ERROR_FORMAT, "the tokenizer's vocabulary is empty");
  for (size_t i = 0; i < bpe->ids.capacity; i++)
    if (bpe->ids.slots[i].used && bpe->ids.slots[i].len > bpe->longest)
      bpe->longest = bpe->ids.slots[i].len;
  if (bpe->byte_level)
    for (int b = 0; b < 256; b++)
      bpe->byte_ids[b] = sfa_text_table_find(&bpe->ids, &(uint8_t){(uint8_t)b}, 1);
  if (bpe->by_score) {
    SFA_TRY(sfa_alloc(t->ctx, t->n_tokens * sizeof *t->scores, "token scores", (void **)&t->scores));
    for (size_t i = 0; i < t->n_tokens; i++)
      t->scores[i] = t->tokens[i].score;
    bpe->scores = t->scores;
  }
  if (space && words_stand_apart(bpe, space)) {
    char pattern[64];
    snprintf(pattern, sizeof pattern, "%s*+[^%s]++|%s++", space, space, space);
    SFA_TRY(sfa_steps_add_split(t->ctx, &t->steps, pattern, false, SFA_SPLIT_ISOLATED, false));
  }
  sfa_tokenizer_mark_ends(t);
  return SFA_OK;
}

/* ---- Opening ----------------------------------------------------------------------------------------------------------------- */

enum { PATH_BYTES = 4096 };

/* Joins a directory and a name; false if there is no such file. */
static bool find_file(const char *directory, const char *name, char path[PATH_BYTES]) {
  struct stat info;
  int len = snprintf(path, PATH_BYTES, "%s/%s", directory, name);
  return len > 0 && len < PATH_BYTES && stat(path, &info) == 0;
}

static sfa_status open_directory(sfa_context *ctx, const char *path, sfa_tokenizer **tokenizer) {
  char file[PATH_BYTES], merges[PATH_BYTES];
  if (find_file(path, "tokenizer.json", file))
    return sfa_tokenizer_from_json(ctx, file, tokenizer);
  if ((find_file(path, "vocab.json", file) && find_file(path, "merges.txt", merges)) ||
      (find_file(path, "encoder.json", file) && find_file(path, "vocab.bpe", merges)))
    return sfa_tokenizer_from_pair(ctx, file, merges, tokenizer);
  return sfa_fail(ctx, SFA_ERROR_IO, "%s holds no tokenizer.json (nor GPT-2's vocab.json and merges.txt)", path);
}

static sfa_status open_gguf(sfa_context *ctx, const char *path, sfa_tokenizer **tokenizer) {
  sfa_weights *weights;
  SFA_TRY(sfa_weights_open(ctx, path, &weights));
  sfa_status status = sfa_tokenizer_from_gguf(ctx, weights, tokenizer);
  sfa_weights_close(weights);
  return status;
}

sfa_status sfa_tokenizer_open(sfa_context *ctx, const char *path, sfa_tokenizer **tokenizer) {
  if (!ctx || !tokenizer)
    return SFA_ERROR_ARGUMENT;
  *tokenizer = NULL;
  SFA_REQUIRE(ctx, path, "sfa_tokenizer_open: path is NULL");
  struct stat info;
  if (stat(path, &info) != 0)
    return sfa_fail(ctx, SFA_ERROR_IO, "%s: there is no such file or directory", path);
  if (S_ISDIR(info.st_mode))
    return open_directory(ctx, path, tokenizer);
  sfa_map map;
  SFA_TRY(sfa_map_open(ctx, path, &map));
  size_t blank = 0;
  while (blank < map.bytes && memchr(" \t\r\n\xef\xbb\xbf", map.data[blank], 7))
    blank++;
  bool gguf = map.bytes >= 4 && memcmp(map.data, "GGUF", 4) == 0, json = blank < map.bytes && map.data[blank] == '{';
  sfa_map_close(&map);
  return gguf   ? open_gguf(ctx, path, tokenizer)
         : json ? sfa_tokenizer_from_json(ctx, path, tokenizer)
                : sfa_tokenizer_from_llama2c(ctx, path, tokenizer);
}

/* ---- Use --------------------------------------------------------------------------------------------------------------------- */

int32_t sfa_tokenizer_vocab_size(const sfa_tokenizer *t) { return (int32_t)t->n_tokens; }
int32_t sfa_tokenizer_bos(const sfa_tokenizer *t) { return t->bos_id; }

int sfa_tokenizer_is_end(const sfa_tokenizer *t, int32_t id) {
  return id >= 0 && (size_t)id < t->n_tokens && (t->tokens[id].flags & SFA_TOKEN_END);
}

static sfa_status encode_text(const sfa_tokenizer *t, const uint8_t *text, size_t len, uint32_t flags, sfa_ids *ids) {
  if (flags & SFA_TOKENIZE_SPECIAL)
    SFA_TRY(sfa_ids_append(t->ctx, ids, t->before.data, t->before.len));
  SFA_TRY(sfa_steps_encode(t->ctx, &t->steps, &t->bpe, flags & SFA_TOKENIZE_PARSE, text, len, ids));
  if (flags & SFA_TOKENIZE_SPECIAL)
    SFA_TRY(sfa_ids_append(t->ctx, ids, t->after.data, t->after.len));
  return sfa_array_reserve(t->ctx, (void **)&ids->data, &ids->capacity, 1, sizeof *ids->data); /* never NULL */
}

sfa_status sfa_tokenizer_encode(const sfa_tokenizer *t, const char *text, size_t text_bytes, uint32_t flags, int32_t **ids, size_t *n_ids) {
  if (!t || !ids || !n_ids)
    return SFA_ERROR_ARGUMENT;
  *ids = NULL;
  *n_ids = 0;
  SFA_REQUIRE(t->ctx, text || text_bytes == 0, "sfa_tokenizer_encode: text is NULL");
  SFA_REQUIRE(t->ctx, flags <= (SFA_TOKENIZE_SPECIAL | SFA_TOKENIZE_PARSE), "sfa_tokenizer_encode: unknown flags 0x%x", flags);
  const uint8_t *bytes = (const uint8_t *)(text ? text : "");
  sfa_bytes repaired = {0};
  sfa_ids made = {0};
  sfa_status status = SFA_OK;
  if (sfa_utf8_valid(bytes, text_bytes)) {
    status = encode_text(t, bytes, text_bytes, flags, &made);
  } else {
    status = sfa_utf8_repair(t->ctx, bytes, text_bytes, &repaired);
    if (status == SFA_OK)
      status = encode_text(t, repaired.data, repaired.len, flags, &made);
  }
  sfa_free(t->ctx, repaired.data);
  if (status != SFA_OK) {
    sfa_free(t->ctx, made.data);
    return status;
  }
  *ids = made.data;
  *n_ids = made.len;
  return SFA_OK;
}

void sfa_free_ids(sfa_context *ctx, int32_t *ids) { sfa_free(ctx, ids); }

size_t sfa_tokenizer_decode(const sfa_tokenizer *t, int32_t previous, int32_t id, int keep_special, char *out, size_t capacity) {
  if (id < 0 || (size_t)id >= t->n_tokens)
    return 0;
  const sfa_token *token = t->tokens + id;
  if (token->flags & SFA_TOKEN_SPECIAL ? !keep_special : !(token->flags & SFA_TOKEN_PRESENT))
    return 0;
  const uint8_t *piece = t->pieces.data + token->at;
  size_t len = token->len;
  bool at_start = previous < 0 || previous == t->bos_id;
  if (t->strip_space && at_start && !(token->flags & SFA_TOKEN_SPECIAL) && len > 0 && piece[0] == ' ') {
    piece++;
    len--;
  }
  size_t n = len < capacity ? len : capacity;
  if (n > 0)
    memcpy(out, piece, n);
  return len;
}

uint64_t sfa_tokenizer_fingerprint(const sfa_tokenizer *t) {
  enum { SAMPLES = 1024 };
  if (!t)
    return 0;
  int64_t n = sfa_tokenizer_vocab_size(t);
  uint64_t h = sfa_hash_word((uint64_t)n, (uint64_t)sfa_tokenizer_bos(t));
  for (int64_t i = 0; i < SAMPLES && i < n; i++) {
    char text[64];
    int32_t id = (int32_t)(n <= SAMPLES ? i : i * n / SAMPLES);
    size_t bytes = sfa_tokenizer_decode(t, -1, id, 1, text, sizeof text);
    h = sfa_hash_bytes(h, text, bytes < sizeof text ? bytes : sizeof text);
  }
  return h;
}
