/* llama2.c's tokenizer.bin: int32 length of the longest token, then for each token: float32 score, int32 length, bytes.
 *
 * Encoding as llama2.c's run.c: a space goes before a text, characters that are no token become byte tokens (<0xNN>, ids from 3), then the
 * pair whose token has the best score is merged. Id 1 is BOS, 2 is EOS; the model ends a text with either. */
#include "text/tokenizer_build.h"

#include "base/map.h"

#include <string.h>

enum { UNKNOWN_ID = 0, BOS_ID = 1, EOS_ID = 2 };

static sfa_status read_vocabulary(sfa_tokenizer *t, const char *path, const sfa_map *map) {
  if (map->bytes < 4)
    return sfa_fail(t->ctx, SFA_ERROR_FORMAT, "%s: %zu bytes are too few for a llama2.c tokenizer", path, map->bytes);
  size_t at = 4;
  for (int32_t id = 0; at < map->bytes; id++) {
    float score;
    int32_t len;
    if (map->bytes - at < 8)
      return sfa_fail(t->ctx, SFA_ERROR_FORMAT, "%s: token %d is cut off; this is no llama2.c tokenizer, or part of one", path, id);
    memcpy(&score, map->data + at, 4);
    memcpy(&len, map->data + at + 4, 4);
    at += 8;
    if (len < 0 || (size_t)len > map->bytes - at)
      return sfa_fail(t->ctx, SFA_ERROR_FORMAT,
                      "%s: token %d says it has %d bytes, %zu are left; this is no llama2.c tokenizer, or part of one", path, id, len,
                      map->bytes - at);
    const uint8_t *text = map->data + at;
    size_t text_len = (size_t)len;
    at += text_len;
    int byte = sfa_byte_token_read(text, text_len);
    if (byte >= 0) {
      t->bpe.byte_ids[byte] = id;
      SFA_TRY(sfa_tokenizer_put(t, id, &(uint8_t){(uint8_t)byte}, 1, 0, score));
    } else if (id <= EOS_ID) { /* stored as "\n<s>\n" */
      static const char *const names[] = {"<unk>", "<s>", "</s>"};
      SFA_TRY(sfa_tokenizer_put(t, id, (const uint8_t *)names[id], strlen(names[id]), SFA_TOKEN_SPECIAL | (id ? SFA_TOKEN_END : 0), score));
    } else {
      SFA_TRY(sfa_tokenizer_put(t, id, text, text_len, 0, score));
      if (text_len > 0)
        SFA_TRY(sfa_text_table_add(t->ctx, &t->bpe.ids, text, text_len, id, NULL)); /* of equal texts the first counts */
    }
  }
  if (t->n_tokens <= EOS_ID)
    return sfa_fail(t->ctx, SFA_ERROR_FORMAT, "%s: a llama2.c tokenizer has more than %zu tokens", path, t->n_tokens);
  return SFA_OK;
}

static sfa_status build(sfa_tokenizer *t, const char *path, const sfa_map *map) {
  SFA_TRY(read_vocabulary(t, path, map));
  sfa_step *specials;
  SFA_TRY(sfa_steps_add(t->ctx, &t->steps, SFA_STEP_TOKENS, &specials));
  SFA_TRY(sfa_step_add_token(t->ctx, specials, (const uint8_t *)"<s>", 3, (sfa_added_token){.id = BOS_ID, .special = true}));
  SFA_TRY(sfa_step_add_token(t->ctx, specials, (const uint8_t *)"</s>", 4, (sfa_added_token){.id = EOS_ID, .special = true}));
  SFA_TRY(sfa_steps_add_prepend(t->ctx, &t->steps, " ", false, false));
  t->bpe.by_score = t->bpe.byte_fallback = true;
  t->bpe.unknown_id = UNKNOWN_ID;
  t->bos_id = BOS_ID;
  t->eos_id = EOS_ID;
  t->strip_space = true;
  SFA_TRY(sfa_ids_append(t->ctx, &t->before, &t->bos_id, 1));
  return sfa_tokenizer_finish(t, " ");
}

sfa_status sfa_tokenizer_from_llama2c(sfa_context *ctx, const char *path, sfa_tokenizer **tokenizer) {
  *tokenizer = NULL;
  sfa_map map;
  SFA_TRY(sfa_map_open(ctx, path, &map));
  sfa_tokenizer *t;
  sfa_status status = sfa_tokenizer_create(ctx, &t);
  if (status == SFA_OK) {
    status = build(t, path, &map);
    if (status == SFA_OK)
      *tokenizer = t;
    else
      sfa_tokenizer_close(t);
  }
  sfa_map_close(&map);
  return status;
}
