/* Tokenizers as Hugging Face writes them: tokenizer.json, with tokenizer_config.json, generation_config.json and chat_template.jinja beside
 * it; or GPT-2's older pair of a vocabulary and a list of merges. */
#include "text/tokenizer_build.h"

#include "base/map.h"
#include "file/json.h"
#include "text/utf8.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define META_SPACE "\xe2\x96\x81" /* U+2581, a space in SentencePiece vocabularies */
enum { JSON_MAX_BYTES = 256 << 20, DECODE_REPLACE_MAX = 8, PATH_BYTES = 4096 };

struct loader {
  sfa_context *ctx;
  sfa_tokenizer *t;
  const char *path;
  struct {
    const char *from, *to;
  } decode_replace[DECODE_REPLACE_MAX]; /* what the decoder does to a token's text */
  int n_decode_replace;
  bool decode_bytes;     /* <0xNN> stands for a byte */
  bool after_byte_level; /* the ByteLevel pre-tokenizer has been seen */
  sfa_bytes text;        /* scratch */
};

static const char *member_text(const cJSON *object, const char *name) {
  return cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, name));
}

static bool member_bool(const cJSON *object, const char *name, bool otherwise) {
  const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);
  return cJSON_IsBool(item) ? cJSON_IsTrue(item) : otherwise;
}

static const char *type_of(const cJSON *node) {
  const char *type = member_text(node, "type");
  return type ? type : "?";
}

static sfa_status unsupported(const struct loader *l, const char *what, const char *name) {
  return sfa_fail(l->ctx, SFA_ERROR_UNSUPPORTED, "%s: the %s \"%.64s\" is not supported", l->path, what, name);
}

static sfa_status damaged(const struct loader *l, const char *what) {
  return sfa_fail(l->ctx, SFA_ERROR_FORMAT, "%s: %s; the file is damaged, or no tokenizer.json", l->path, what);
}

/* {"String": "..."} or {"Regex": "..."} */
static sfa_status read_pattern(const struct loader *l, const cJSON *node, const char **pattern, bool *literal) {
  const cJSON *item = cJSON_GetObjectItemCaseSensitive(node, "pattern");
  const char *string = member_text(item, "String");
  *pattern = string ? string : member_text(item, "Regex");
  *literal = string != NULL;
  return *pattern ? SFA_OK : damaged(l, "a pattern is neither a String nor a Regex");
}

/* ---- Normalizers ------------------------------------------------------------------------------------------------------------- */

static sfa_status add_normalizer(struct loader *l, const cJSON *node) {
  sfa_steps *steps = &l->t->steps;
  const char *type = type_of(node), *pattern, *text;
  bool literal;
  sfa_step *step;
  if (!node || cJSON_IsNull(node))
    return SFA_OK;
  if (strcmp(type, "Sequence") == 0) {
    const cJSON *item;
    cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(node, "normalizers")) SFA_TRY(add_normalizer(l, item));
    return SFA_OK;
  }
  if (strncmp(type, "NF", 2) == 0 &&
      (strcmp(type + 2, "C") == 0 || strcmp(type + 2, "D") == 0 || strcmp(type + 2, "KC") == 0 || strcmp(type + 2, "KD") == 0)) {
    SFA_TRY(sfa_steps_add(l->ctx, steps, SFA_STEP_NORMALIZE, &step));
    step->compose = strchr(type, 'C') != NULL;
    step->compatible = strchr(type, 'K') != NULL;
    return SFA_OK;
  }
  if (strcmp(type, "Replace") == 0) {
    SFA_TRY(read_pattern(l, node, &pattern, &literal));
    text = member_text(node, "content");
    return text ? sfa_steps_add_replace(l->ctx, steps, pattern, literal, text) : damaged(l, "a Replace has no content");
  }
  if (strcmp(type, "Prepend") == 0) {
    text = member_text(node, "prepend");
    return text ? sfa_steps_add_prepend(l->ctx, steps, text, false, false) : damaged(l, "a Prepend has no text");
  }
  if (strcmp(type, "Strip") == 0) {
    SFA_TRY(sfa_steps_add(l->ctx, steps, SFA_STEP_STRIP, &step));
    step->left = member_bool(node, "strip_left", true);
    step->right = member_bool(node, "strip_right", true);
    return SFA_OK;
  }
  return unsupported(l, "normalizer", type);
}

/* ---- Pre-tokenizers ------------------------------------------------------------------------------------------------------------ */

static sfa_status read_rule(const struct loader *l, const cJSON *node, sfa_split_rule *rule) {
  static const char *const names[] = {"Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
  const char *name = member_text(node, "behavior");
  for (int i = 0; i < 5; i++)
    if (name && strcmp(name, names[i]) == 0) {
      *rule = (sfa_split_rule)i; /* the enum has their order */
      return SFA_OK;
    }
  return unsupported(l, "split behavior", name ? name : "?");
}

static sfa_status add_metaspace(struct loader *l, const cJSON *node) {
  sfa_steps *steps = &l->t->steps;
  const char *space = member_text(node, "replacement"), *scheme = member_text(node, "prepend_scheme");
  space = space && *space ? space : META_SPACE;
  scheme = scheme ? scheme : member_bool(node, "add_prefix_space", true) ? "always" : "never";
  SFA_TRY(sfa_steps_add_replace(l->ctx, steps, " ", true, space));
  if (strcmp(scheme, "never") != 0)
    SFA_TRY(sfa_steps_add_prepend(l->ctx, steps, space, true, strcmp(scheme, "first") == 0));
  return member_bool(node, "split", true) ? sfa_steps_add_split(l->ctx, steps, space, true, SFA_SPLIT_WITH_NEXT, false) : SFA_OK;
}

static sfa_status add_pre_tokenizer(struct loader *l, const cJSON *node) {
  sfa_steps *steps = &l->t->steps;
  const char *type = type_of(node), *pattern;
  bool literal;
  sfa_split_rule rule = SFA_SPLIT_ISOLATED;
  if (!node || cJSON_IsNull(node))
    return SFA_OK;
  if (strcmp(type, "Sequence") == 0) {
    const cJSON *item;
    cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(node, "pretokenizers")) SFA_TRY(add_pre_tokenizer(l, item));
    return SFA_OK;
  }
  if (l->after_byte_level)
    return unsupported(l, "pre-tokenizer after ByteLevel", type);
  if (strcmp(type, "ByteLevel") == 0) {
    l->after_byte_level = true;
    if (member_bool(node, "add_prefix_space", true))
      SFA_TRY(sfa_steps_add_prepend(l->ctx, steps, " ", true, false));
    return member_bool(node, "use_regex", true) ? sfa_steps_add_split(l->ctx, steps, SFA_PATTERN_GPT2, false, rule, false) : SFA_OK;
  }
  if (strcmp(type, "Split") == 0) {
    SFA_TRY(read_pattern(l, node, &pattern, &literal));
    SFA_TRY(read_rule(l, node, &rule));
    return sfa_steps_add_split(l->ctx, steps, pattern, literal, rule, member_bool(node, "invert", false));
  }
  if (strcmp(type, "Digits") == 0)
    return sfa_steps_add_split(l->ctx, steps, member_bool(node, "individual_digits", false) ? "\\p{N}" : "\\p{N}+", false, rule, false);
  if (strcmp(type, "Punctuation") == 0) {
    if (cJSON_GetObjectItemCaseSensitive(node, "behavior"))
      SFA_TRY(read_rule(l, node, &rule));
    return sfa_steps_add_split(l->ctx, steps, "[\\p{P}$+<=>^`|~]", false, rule, false);
  }
  if (strcmp(type, "Metaspace") == 0)
    return add_metaspace(l, node);
  if (strcmp(type, "Whitespace") == 0)
    return sfa_steps_add_split(l->ctx, steps, "[\\w\\x{200c}\\x{200d}]+|[^\\w\\x{200c}\\x{200d}\\s]+", false, SFA_SPLIT_REMOVED, true);
  if (strcmp(type, "WhitespaceSplit") == 0)
    return sfa_steps_add_split(l->ctx, steps, "\\s", false, SFA_SPLIT_REMOVED, false);
  return unsupported(l, "pre-tokenizer", type);
}

/* ---- Decoders ---------------------------------------------------------------------------------------------------------------- */

static sfa_status add_decode_replace(struct loader *l, const char *from, const char *to) {
  if (!from || !*from || !to || l->n_decode_replace == DECODE_REPLACE_MAX)
    return damaged(l, "a Replace of the decoder has no text, or there are too many");
  l->decode_replace[l->n_decode_replace].from = from;
  l->decode_replace[l->n_decode_replace++].to = to;
  return SFA_OK;
}

static sfa_status read_decoder(struct loader *l, const cJSON *node) {
  const char *type = type_of(node), *text;
  if (!node || cJSON_IsNull(node) || strcmp(type, "ByteLevel") == 0 || strcmp(type, "Fuse") == 0)
    return SFA_OK;
  if (strcmp(type, "Sequence") == 0) {
    const cJSON *item;
    cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(node, "decoders")) SFA_TRY(read_decoder(l, item));
    return SFA_OK;
  }
  if (strcmp(type, "ByteFallback") == 0) {
    l->decode_bytes = true;
    return SFA_OK;
  }
  if (strcmp(type, "Replace") == 0) {
    bool literal;
    SFA_TRY(read_pattern(l, node, &text, &literal));
    return literal ? add_decode_replace(l, text, member_text(node, "content")) : unsupported(l, "decoder Replace with the Regex", text);
  }
  if (strcmp(type, "Strip") == 0) {
    const cJSON *start = cJSON_GetObjectItemCaseSensitive(node, "start"), *stop = cJSON_GetObjectItemCaseSensitive(node, "stop");
    text = member_text(node, "content");
    if (!text || strcmp(text, " ") != 0 || !cJSON_IsNumber(start) || start->valuedouble > 1 || (stop && stop->valuedouble != 0))
      return unsupported(l, "decoder", "Strip of anything but one space at the start");
    l->t->strip_space = start->valuedouble == 1;
    return SFA_OK;
  }
  if (strcmp(type, "Metaspace") == 0) {
    const char *scheme = member_text(node, "prepend_scheme");
    l->t->strip_space = scheme ? strcmp(scheme, "never") != 0 : member_bool(node, "add_prefix_space", true);
    text = member_text(node, "replacement");
    return add_decode_replace(l, text ? text : META_SPACE, " ");
  }
  return unsupported(l, "decoder", type);
}

static sfa_status replace_all(struct loader *l, const char *from, const char *to) {
  sfa_bytes before = l->text;
  l->text = (sfa_bytes){0};
  sfa_status status = SFA_OK;
  size_t n = strlen(from);
  for (size_t i = 0; i < before.len && status == SFA_OK;) {
    bool match = before.len - i >= n && memcmp(before.data + i, from, n) == 0;
    status = match ? sfa_bytes_append(l->ctx, &l->text, to, strlen(to)) : sfa_bytes_append(l->ctx, &l->text, before.data + i, 1);
    i += match ? n : 1;
  }
  sfa_free(l->ctx, before.data);
  return status;
}

/* Enters a token with the bytes that the decoder makes of its text. */
static sfa_status put_token(struct loader *l, int32_t id, const char *text, uint32_t flags) {
  size_t len = strlen(text);
  l->text.len = 0;
  SFA_TRY(sfa_bytes_append(l->ctx, &l->text, text, len));
  int byte = l->decode_bytes ? sfa_byte_token_read(l->text.data, l->text.len) : -1;
  if (flags & SFA_TOKEN_SPECIAL) {
    byte = -1; /* as it is written */
  } else if (byte >= 0) {
    l->text.data[0] = (uint8_t)byte;
    l->text.len = 1;
  } else if (l->t->bpe.byte_level) {
    if (!sfa_byte_alphabet_read((const uint8_t *)text, len, l->text.data, &l->text.len)) {
      l->text.len = 0;
      SFA_TRY(sfa_bytes_append(l->ctx, &l->text, text, len));
    }
  } else {
    for (int i = 0; i < l->n_decode_replace; i++)
      if (strstr(text, l->decode_replace[i].from))
        SFA_TRY(replace_all(l, l->decode_replace[i].from, l->decode_replace[i].to));
  }
  return sfa_tokenizer_put(l->t, id, l->text.data, l->text.len, flags, 0);
}

/* ---- The model --------------------------------------------------------------------------------------------------------------- */

static sfa_status read_id(const struct loader *l, const cJSON *item, const char *text, int32_t *id) {
  uint64_t value;
  if (!sfa_json_size(item, &value) || value >= SFA_TOKEN_IDS_MAX)
    return sfa_fail(l->ctx, SFA_ERROR_FORMAT, "%s: the id of token \"%.64s\" is not a whole number in 0..%d", l->path, text,
                    SFA_TOKEN_IDS_MAX - 1);
  *id = (int32_t)value;
  return SFA_OK;
}

/* The bytes that encoding sees for a text of the vocabulary or the merges; false if they can never occur. */
static bool encoding_bytes(const struct loader *l, const char *text, size_t len, uint8_t *out, size_t *out_len) {
  if (l->t->bpe.byte_level)
    return sfa_byte_alphabet_read((const uint8_t *)text, len, out, out_len) && *out_len > 0;
  memcpy(out, text, len);
  *out_len = len;
  return len > 0;
}

static sfa_status read_vocabulary(struct loader *l, const cJSON *vocab) {
  if (!cJSON_IsObject(vocab))
    return damaged(l, "model.vocab is no object");
  const cJSON *item;
  cJSON_ArrayForEach(item, vocab) {
    const char *text = item->string;
    size_t len = strlen(text);
    int32_t id = 0;
    SFA_TRY(read_id(l, item, text, &id));
    if ((size_t)id < l->t->n_tokens && (l->t->tokens[id].flags & SFA_TOKEN_PRESENT))
      return sfa_fail(l->ctx, SFA_ERROR_FORMAT, "%s: two tokens of the vocabulary have the id %d, \"%.64s\" is one", l->path, id, text);
    SFA_TRY(put_token(l, id, text, 0));
    l->text.len = 0;
    SFA_TRY(sfa_bytes_append(l->ctx, &l->text, text, len));
    if (encoding_bytes(l, text, len, l->text.data, &l->text.len))
      SFA_TRY(sfa_tokenizer_put_text(l->t, id, l->text.data, l->text.len));
    int byte = l->t->bpe.byte_fallback ? sfa_byte_token_read((const uint8_t *)text, len) : -1;
    if (byte >= 0)
      l->t->bpe.byte_ids[byte] = id;
  }
  return SFA_OK;
}

static sfa_status add_merge(struct loader *l, const char *left, size_t left_len, const char *right, size_t right_len) {
  size_t n_left, n_right;
  l->text.len = 0;
  SFA_TRY(sfa_bytes_append(l->ctx, &l->text, left, left_len));
  SFA_TRY(sfa_bytes_append(l->ctx, &l->text, right, right_len));
  if (left_len == 0 || right_len == 0 || !encoding_bytes(l, left, left_len, l->text.data, &n_left) ||
      !encoding_bytes(l, right, right_len, l->text.data + n_left, &n_right))
    return sfa_fail(l->ctx, SFA_ERROR_FORMAT, "%s: merge %u is not two texts of the vocabulary", l->path, l->t->bpe.n_merges);
  return sfa_bpe_add_merge(l->ctx, &l->t->bpe, l->text.data, n_left, l->text.data + n_left, n_right);
}

/* "left right" */
static sfa_status add_merge_line(struct loader *l, const char *line, size_t len) {
  const char *gap = memchr(line, ' ', len);
  if (!gap)
    return sfa_fail(l->ctx, SFA_ERROR_FORMAT, "%s: merge %u has no space between two texts", l->path, l->t->bpe.n_merges);
  size_t left = (size_t)(gap - line);
  return add_merge(l, line, left, gap + 1, len - left - 1);
}

static sfa_status read_merges(struct loader *l, const cJSON *merges) {
  if (!cJSON_IsArray(merges))
    return damaged(l, "model.merges is no list");
  const cJSON *item;
  cJSON_ArrayForEach(item, merges) {
    if (cJSON_IsString(item)) {
      SFA_TRY(add_merge_line(l, item->valuestring, strlen(item->valuestring)));
      continue;
    }
    const char *left = cJSON_GetStringValue(cJSON_GetArrayItem(item, 0)), *right = cJSON_GetStringValue(cJSON_GetArrayItem(item, 1));
    if (!left || !right || cJSON_GetArraySize(item) != 2)
      return sfa_fail(l->ctx, SFA_ERROR_FORMAT, "%s: merge %u is not two texts", l->path, l->t->bpe.n_merges);
    SFA_TRY(add_merge(l, left, strlen(left), right, strlen(right)));
  }
  return SFA_OK;
}

static sfa_status read_model(struct loader *l, const cJSON *model) {
  const char *type = member_text(model, "type"), *unknown = member_text(model, "unk_token");
  static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
  if (!cJSON_IsObject(model))
    return damaged(l, "there is no model");
  if (type && strcmp(type, "BPE") != 0)
    return unsupported(l, "tokenizer model", type);
  for (int i = 0; i < 2; i++) {
    const char *affix = member_text(model, affixes[i]);
    if (affix && *affix)
      return unsupported(l, affixes[i], affix);
  }
  sfa_bpe *bpe = &l->t->bpe;
  bpe->byte_level = l->after_byte_level;
  bpe->byte_fallback = member_bool(model, "byte_fallback", false);
  bpe->fuse_unknown = member_bool(model, "fuse_unk", false);
  bpe->whole_words = member_bool(model, "ignore_merges", false);
  SFA_TRY(read_vocabulary(l, cJSON_GetObjectItemCaseSensitive(model, "vocab")));
  if (unknown) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(cJSON_GetObjectItemCaseSensitive(model, "vocab"), unknown);
    SFA_TRY(read_id(l, item, unknown, &bpe->unknown_id));
  }
  return read_merges(l, cJSON_GetObjectItemCaseSensitive(model, "merges"));
}

/* ---- Added tokens ------------------------------------------------------------------------------------------------------------ */

/* Those that want to be found in the normalized text are entered as the normalizers, steps first..last-1, write them. */
static sfa_status add_tokens(struct loader *l, const cJSON *list, bool normalized, sfa_step *step, int32_t first, int32_t last) {
  const cJSON *item;
  cJSON_ArrayForEach(item, list) {
    const char *text = member_text(item, "content");
    if (!text)
      return damaged(l, "an added token has no content");
    sfa_added_token token = {.special = member_bool(item, "special", false),
                             .single_word = member_bool(item, "single_word", false),
                             .lstrip = member_bool(item, "lstrip", false),
                             .rstrip = member_bool(item, "rstrip", false)};
    SFA_TRY(read_id(l, cJSON_GetObjectItemCaseSensitive(item, "id"), text, &token.id));
    if (member_bool(item, "normalized", !token.special) != normalized)
      continue;
    SFA_TRY(put_token(l, token.id, text, token.special ? SFA_TOKEN_SPECIAL : 0));
    if (!sfa_utf8_valid((const uint8_t *)text, strlen(text)))
      return damaged(l, "an added token is not UTF-8");
    l->text.len = 0;
    SFA_TRY(sfa_steps_transform(l->ctx, &l->t->steps, first, last, (const uint8_t *)text, strlen(text), &l->text));
    SFA_TRY(sfa_step_add_token(l->ctx, step, l->text.data, l->text.len, token));
  }
  return SFA_OK;
}

/* ---- What goes around a text --------------------------------------------------------------------------------------------------- */

/* "<s>", or {"content": "<s>", ...} */
static const char *token_text(const cJSON *object, const char *name) {
  const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);
  return cJSON_IsObject(item) ? member_text(item, "content") : cJSON_GetStringValue(item);
}

static int32_t find_token(const sfa_tokenizer *t, const char *text) {
  if (!text)
    return -1;
  int32_t id = sfa_tokenizer_special_id(t, text);
  return id >= 0 ? id : sfa_text_table_find(&t->bpe.ids, text, strlen(text));
}

static sfa_status append_token(struct loader *l, sfa_ids *ids, const cJSON *item) {
  int32_t id;
  SFA_TRY(read_id(l, item, "around a text", &id));
  if ((size_t)id >= l->t->n_tokens)
    return sfa_fail(l->ctx, SFA_ERROR_FORMAT, "%s: the post-processor adds token %d, but the vocabulary has %zu", l->path, id,
                    l->t->n_tokens);
  return sfa_ids_append(l->ctx, ids, &id, 1);
}

static sfa_status read_template(struct loader *l, const cJSON *node) {
  const cJSON *part, *id, *known = cJSON_GetObjectItemCaseSensitive(node, "special_tokens");
  sfa_ids *side = &l->t->before;
  cJSON_ArrayForEach(part, cJSON_GetObjectItemCaseSensitive(node, "single")) {
    const char *name = member_text(cJSON_GetObjectItemCaseSensitive(part, "SpecialToken"), "id");
    if (!name) { /* the text itself */
      side = &l->t->after;
      continue;
    }
    const cJSON *ids = cJSON_GetObjectItemCaseSensitive(cJSON_GetObjectItemCaseSensitive(known, name), "ids");
    if (!cJSON_IsArray(ids))
      return damaged(l, "the post-processor names a token that it does not define");
    cJSON_ArrayForEach(id, ids) SFA_TRY(append_token(l, side, id));
  }
  return SFA_OK;
}

static sfa_status read_post_processor(struct loader *l, const cJSON *node) {
  const char *type = type_of(node);
  if (!node || cJSON_IsNull(node) || strcmp(type, "ByteLevel") == 0)
    return SFA_OK;
  if (strcmp(type, "Sequence") == 0) {
    const cJSON *item;
    cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(node, "processors")) SFA_TRY(read_post_processor(l, item));
    return SFA_OK;
  }
  if (strcmp(type, "TemplateProcessing") == 0)
    return read_template(l, node);
  if (strcmp(type, "BertProcessing") == 0 || strcmp(type, "RobertaProcessing") == 0) { /* cls and sep are [text, id] */
    SFA_TRY(append_token(l, &l->t->before, cJSON_GetArrayItem(cJSON_GetObjectItemCaseSensitive(node, "cls"), 1)));
    return append_token(l, &l->t->after, cJSON_GetArrayItem(cJSON_GetObjectItemCaseSensitive(node, "sep"), 1));
  }
  return unsupported(l, "post-processor", type);
}

/* ---- The files beside it ------------------------------------------------------------------------------------------------------- */

/* Loads `name` from the directory of the tokenizer; *json is NULL if there is no such file. */
static sfa_status load_beside(const struct loader *l, const char *name, cJSON **json) {
  char path[PATH_BYTES];
  const char *slash = strrchr(l->path, '/');
  struct stat info;
  *json = NULL;
  int len = snprintf(path, sizeof path, "%.*s%s", slash ? (int)(slash + 1 - l->path) : 0, l->path, name);
  if (len < 0 || (size_t)len >= sizeof path || stat(path, &info) != 0)
    return SFA_OK;
  return sfa_json_load(l->ctx, path, JSON_MAX_BYTES, json);
}

static sfa_status read_chat_file(struct loader *l) {
  char path[PATH_BYTES];
  const char *slash = strrchr(l->path, '/');
  struct stat info;
  int len = snprintf(path, sizeof path, "%.*schat_template.jinja", slash ? (int)(slash + 1 - l->path) : 0, l->path);
  if (len < 0 || (size_t)len >= sizeof path || stat(path, &info) != 0)
    return SFA_OK;
  sfa_map map;
  sfa_bytes text = {0};
  SFA_TRY(sfa_map_open(l->ctx, path, &map));
  sfa_status status = sfa_bytes_append(l->ctx, &text, map.data, map.bytes);
  if (status == SFA_OK)
    status = sfa_bytes_append(l->ctx, &text, "", 1);
  sfa_map_close(&map);
  if (status != SFA_OK) {
    sfa_free(l->ctx, text.data);
    return status;
  }
  sfa_free(l->ctx, l->t->chat_template);
  l->t->chat_template = (char *)text.data;
  return SFA_OK;
}

static sfa_status read_tokenizer_config(struct loader *l, const cJSON *config) {
  sfa_tokenizer *t = l->t;
  t->bos_id = find_token(t, token_text(config, "bos_token"));
  t->eos_id = find_token(t, token_text(config, "eos_token"));
  bool add_bos = member_bool(config, "add_bos_token", false), add_eos = member_bool(config, "add_eos_token", false);
  if (cJSON_IsBool(cJSON_GetObjectItemCaseSensitive(config, "add_bos_token")) ||
      cJSON_IsBool(cJSON_GetObjectItemCaseSensitive(config, "add_eos_token"))) { /* these go before the post-processor */
    t->before.len = t->after.len = 0;
    if (add_bos && t->bos_id >= 0)
      SFA_TRY(sfa_ids_append(l->ctx, &t->before, &t->bos_id, 1));
    if (add_eos && t->eos_id >= 0)
      SFA_TRY(sfa_ids_append(l->ctx, &t->after, &t->eos_id, 1));
  }
  const cJSON *chat = cJSON_GetObjectItemCaseSensitive(config, "chat_template"), *item;
  const char *text = cJSON_GetStringValue(chat);
  if (cJSON_IsArray(chat))
    cJSON_ArrayForEach(item, chat) {
      const char *name = member_text(item, "name");
      if (name && strcmp(name, "default") == 0)
        text = member_text(item, "template");
    }
  return text ? sfa_strdup(l->ctx, text, &t->chat_template) : SFA_OK;
}

static void mark_end(sfa_tokenizer *t, const cJSON *item) {
  uint64_t id;
  if (sfa_json_size(item, &id) && id < t->n_tokens)
    t->tokens[id].flags |= SFA_TOKEN_END;
}

static sfa_status read_beside(struct loader *l) {
  cJSON *config, *generation;
  SFA_TRY(load_beside(l, "tokenizer_config.json", &config));
  sfa_status status = config ? read_tokenizer_config(l, config) : SFA_OK;
  cJSON_Delete(config);
  SFA_TRY(status);
  SFA_TRY(read_chat_file(l));
  SFA_TRY(load_beside(l, "generation_config.json", &generation));
  const cJSON *eos = cJSON_GetObjectItemCaseSensitive(generation, "eos_token_id"), *item;
  uint64_t bos;
  if (cJSON_IsArray(eos)) {
    cJSON_ArrayForEach(item, eos) mark_end(l->t, item);
  } else {
    mark_end(l->t, eos);
  }
  if (l->t->bos_id < 0 && sfa_json_size(cJSON_GetObjectItemCaseSensitive(generation, "bos_token_id"), &bos) && bos < l->t->n_tokens)
    l->t->bos_id = (int32_t)bos;
  cJSON_Delete(generation);
  if (l->t->bos_id < 0 && l->t->before.len > 0)
    l->t->bos_id = l->t->before.data[0];
  sfa_tokenizer_mark_ends(l->t);
  return SFA_OK;
}

/* ---- The whole --------------------------------------------------------------------------------------------------------------- */

static sfa_status build(struct loader *l, const cJSON *root) {
  sfa_steps *steps = &l->t->steps;
  const cJSON *added = cJSON_GetObjectItemCaseSensitive(root, "added_tokens");
  sfa_step *as_written, *normalized;
  SFA_TRY(sfa_steps_add(l->ctx, steps, SFA_STEP_TOKENS, &as_written));
  SFA_TRY(add_normalizer(l, cJSON_GetObjectItemCaseSensitive(root, "normalizer")));
  int32_t last = steps->count;
  SFA_TRY(sfa_steps_add(l->ctx, steps, SFA_STEP_TOKENS, &normalized));
  SFA_TRY(add_pre_tokenizer(l, cJSON_GetObjectItemCaseSensitive(root, "pre_tokenizer")));
  SFA_TRY(read_decoder(l, cJSON_GetObjectItemCaseSensitive(root, "decoder")));
  SFA_TRY(read_model(l, cJSON_GetObjectItemCaseSensitive(root, "model")));
  SFA_TRY(add_tokens(l, added, false, as_written, 0, 0));
  SFA_TRY(add_tokens(l, added, true, normalized, 1, last));
  SFA_TRY(read_post_processor(l, cJSON_GetObjectItemCaseSensitive(root, "post_processor")));
  SFA_TRY(sfa_tokenizer_finish(l->t, l->after_byte_level ? NULL : META_SPACE));
  return read_beside(l);
}

static sfa_status finish_load(struct loader *l, sfa_status status, sfa_tokenizer **tokenizer) {
  sfa_free(l->ctx, l->text.data);
  if (status == SFA_OK)
    *tokenizer = l->t;
  else
    sfa_tokenizer_close(l->t);
  return status;
}

sfa_status sfa_tokenizer_from_json(sfa_context *ctx, const char *path, sfa_tokenizer **tokenizer) {
  *tokenizer = NULL;
  struct loader l = {.ctx = ctx, .path = path};
  cJSON *root;
  SFA_TRY(sfa_json_load(ctx, path, JSON_MAX_BYTES, &root));
  sfa_status status = sfa_tokenizer_create(ctx, &l.t);
  if (status == SFA_OK)
    status = build(&l, root);
  cJSON_Delete(root);
  return finish_load(&l, status, tokenizer);
}

/* ---- GPT-2's older files ------------------------------------------------------------------------------------------------------- */

static sfa_status build_pair(struct loader *l, const cJSON *vocab, const sfa_map *merges) {
  static const char end_of_text[] = "<|endoftext|>";
  sfa_step *added;
  SFA_TRY(sfa_steps_add(l->ctx, &l->t->steps, SFA_STEP_TOKENS, &added));
  SFA_TRY(sfa_steps_add_split(l->ctx, &l->t->steps, SFA_PATTERN_GPT2, false, SFA_SPLIT_ISOLATED, false));
  l->t->bpe.byte_level = true;
  SFA_TRY(read_vocabulary(l, vocab));
  for (size_t at = 0; at < merges->bytes;) {
    const char *line = (const char *)merges->data + at, *end = memchr(line, '\n', merges->bytes - at);
    size_t len = end ? (size_t)(end - line) : merges->bytes - at;
    at += len + 1;
    if (len > 0 && line[len - 1] == '\r')
      len--;
    if (len > 0 && !(len >= 9 && memcmp(line, "#version:", 9) == 0))
      SFA_TRY(add_merge_line(l, line, len));
  }
  int32_t id = find_token(l->t, end_of_text);
  if (id >= 0) {
    l->t->tokens[id].flags |= SFA_TOKEN_SPECIAL;
    l->t->bos_id = l->t->eos_id = id;
    SFA_TRY(
        sfa_step_add_token(l->ctx, added, (const uint8_t *)end_of_text, strlen(end_of_text), (sfa_added_token){.id = id, .special = true}));
  }
  return sfa_tokenizer_finish(l->t, NULL);
}

sfa_status sfa_tokenizer_from_pair(sfa_context *ctx, const char *vocab_path, const char *merges_path, sfa_tokenizer **tokenizer) {
  *tokenizer = NULL;
  struct loader l = {.ctx = ctx, .path = vocab_path};
  cJSON *vocab;
  sfa_map merges;
  SFA_TRY(sfa_json_load(ctx, vocab_path, JSON_MAX_BYTES, &vocab));
  sfa_status status = sfa_map_open(ctx, merges_path, &merges);
  if (status == SFA_OK) {
    status = sfa_tokenizer_create(ctx, &l.t);
    if (status == SFA_OK)
      status = build_pair(&l, vocab, &merges);
    sfa_map_close(&merges);
  }
  cJSON_Delete(vocab);
  return finish_load(&l, status, tokenizer);
}
