/* A trained vocabulary as the files that Hugging Face's libraries and our own loader read. */
#include "text/bpe_train.h"

#include "file/json.h"
#include "file/save.h"
#include "text/utf8.h"

/* A token as a byte-level vocabulary writes it; NUL behind it. */
static sfa_status write_chars(sfa_context *ctx, const sfa_bpe_vocabulary *v, int32_t token, sfa_bytes *out) {
  const sfa_bpe_token *t = &v->tokens[token];
  out->len = 0;
  for (size_t i = 0; i < t->len; i++) {
    uint8_t utf8[4];
    SFA_TRY(sfa_bytes_append(ctx, out, utf8, sfa_utf8_encode(sfa_byte_alphabet_char(v->texts.data[t->at + i]), utf8)));
  }
  return sfa_bytes_append(ctx, out, "", 1);
}

static sfa_status add_vocabulary(sfa_context *ctx, cJSON *model, const sfa_bpe_vocabulary *v, const char *const *special, int32_t n_special,
                                 sfa_bytes *left, sfa_bytes *right) {
  cJSON *vocab = cJSON_AddObjectToObject(model, "vocab"), *merges = cJSON_AddArrayToObject(model, "merges");
  for (int32_t i = 0; i < n_special; i++)
    cJSON_AddItemToObject(vocab, special[i], cJSON_CreateNumber(i));
  for (size_t i = 0; i < v->n_tokens; i++) {
    SFA_TRY(write_chars(ctx, v, (int32_t)i, left));
    cJSON_AddItemToObject(vocab, (char *)left->data, cJSON_CreateNumber((double)i + n_special));
  }
  for (size_t i = 0; i < v->n_merges; i++) {
    SFA_TRY(write_chars(ctx, v, v->merges[i].left, left));
    SFA_TRY(write_chars(ctx, v, v->merges[i].right, right));
    cJSON *pair = cJSON_CreateArray();
    cJSON_AddItemToArray(pair, cJSON_CreateString((char *)left->data));
    cJSON_AddItemToArray(pair, cJSON_CreateString((char *)right->data));
    cJSON_AddItemToArray(merges, pair);
  }
  return cJSON_GetArraySize(merges) == (int)v->n_merges ? SFA_OK : sfa_fail(ctx, SFA_ERROR_MEMORY, "out of memory for tokenizer.json");
}

static void add_byte_level(cJSON *root, const char *name) {
  cJSON *node = cJSON_AddObjectToObject(root, name);
  cJSON_AddStringToObject(node, "type", "ByteLevel");
  cJSON_AddBoolToObject(node, "add_prefix_space", false);
  cJSON_AddBoolToObject(node, "trim_offsets", true);
  cJSON_AddBoolToObject(node, "use_regex", true);
}

static sfa_status make_json(sfa_context *ctx, cJSON *root, const sfa_bpe_vocabulary *v, const char *const *special, int32_t n_special) {
  static const char *const token_flags[] = {"single_word", "lstrip", "rstrip", "normalized"};
  static const char *const nothing[] = {"dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"};
  static const char *const model_flags[] = {"fuse_unk", "byte_fallback", "ignore_merges"};
  cJSON_AddStringToObject(root, "version", "1.0");
  cJSON_AddNullToObject(root, "truncation");
  cJSON_AddNullToObject(root, "padding");
  cJSON *added = cJSON_AddArrayToObject(root, "added_tokens");
  for (int32_t i = 0; i < n_special; i++) {
    cJSON *token = cJSON_CreateObject();
    cJSON_AddNumberToObject(token, "id", i);
    cJSON_AddStringToObject(token, "content", special[i]);
    for (size_t f = 0; f < sizeof token_flags / sizeof *token_flags; f++)
      cJSON_AddBoolToObject(token, token_flags[f], false);
    cJSON_AddBoolToObject(token, "special", true);
    cJSON_AddItemToArray(added, token);
  }
  cJSON_AddNullToObject(root, "normalizer");
  add_byte_level(root, "pre_tokenizer");
  add_byte_level(root, "post_processor");
  add_byte_level(root, "decoder");
  cJSON *model = cJSON_AddObjectToObject(root, "model");
  cJSON_AddStringToObject(model, "type", "BPE");
  for (size_t i = 0; i < sizeof nothing / sizeof *nothing; i++)
    cJSON_AddNullToObject(model, nothing[i]);
  for (size_t i = 0; i < sizeof model_flags / sizeof *model_flags; i++)
    cJSON_AddBoolToObject(model, model_flags[i], false);
  sfa_bytes left = {0}, right = {0};
  sfa_status status = add_vocabulary(ctx, model, v, special, n_special, &left, &right);
  sfa_free(ctx, left.data);
  sfa_free(ctx, right.data);
  return status;
}

static void make_config(cJSON *root, const char *const *special, int32_t n_special) {
  cJSON_AddStringToObject(root, "tokenizer_class", "PreTrainedTokenizerFast");
  cJSON_AddBoolToObject(root, "clean_up_tokenization_spaces", false);
  if (n_special > 0) {
    cJSON_AddStringToObject(root, "bos_token", special[0]);
    cJSON_AddStringToObject(root, "eos_token", special[0]);
  }
}

sfa_status sfa_tokenizer_write(sfa_context *ctx, const char *folder, const sfa_bpe_vocabulary *v, const char *const *special,
                               int32_t n_special) {
  SFA_TRY(sfa_save_folder(ctx, folder));
  cJSON *tokenizer = cJSON_CreateObject(), *config = cJSON_CreateObject();
  make_config(config, special, n_special);
  sfa_status status = tokenizer && config ? make_json(ctx, tokenizer, v, special, n_special)
                                          : sfa_fail(ctx, SFA_ERROR_MEMORY, "out of memory for tokenizer.json");
  if (status == SFA_OK)
    status = sfa_json_save(ctx, folder, "tokenizer_config.json", config);
  if (status == SFA_OK)
    status = sfa_json_save(ctx, folder, "tokenizer.json", tokenizer);
  cJSON_Delete(tokenizer);
  cJSON_Delete(config);
  return status;
}
