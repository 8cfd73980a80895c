/* Tokenizers out of GGUF metadata (tokenizer.ggml.*). The file names the kind of model ("gpt2": byte-level with merges, "llama":
 * SentencePiece with scores) and, for the first, which pre-tokenizer: GGUF carries its name, not its pattern. */
#include "text/tokenizer_build.h"

#include "text/utf8.h"

#include <string.h>

/* tokenizer.ggml.token_type */
enum { TYPE_NORMAL = 1, TYPE_UNKNOWN = 2, TYPE_CONTROL = 3, TYPE_USER = 4, TYPE_UNUSED = 5, TYPE_BYTE = 6 };

#define PATTERN_CONTRACTIONS "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
#define PATTERN_TAIL "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define PATTERN_LLAMA3 PATTERN_CONTRACTIONS "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}" PATTERN_TAIL
#define PATTERN_QWEN2 PATTERN_CONTRACTIONS "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}" PATTERN_TAIL

/* The models' own tokenizer.json files are the source of this table; the names are those that converters write. */
static const struct pre_tokenizer {
  const char *names;       /* each between spaces */
  const char *patterns[2]; /* applied in turn, matches isolated */
  bool nfc, whole_words, add_bos;
} pre_tokenizers[] = {
    {" gpt-2 phi-2 mpt olmo jais default ", {SFA_PATTERN_GPT2}, false, false, false},
    {" smollm starcoder refact command-r codeshell exaone ", {"\\p{N}", SFA_PATTERN_GPT2}, false, false, false},
    {" qwen2 deepseek-r1-qwen ", {PATTERN_QWEN2}, true, false, false},
    {" stablelm2 ", {PATTERN_QWEN2}, false, false, false},
    {" llama-bpe llama3 llama-v3 falcon3 ", {PATTERN_LLAMA3}, false, true, true},
    {" dbrx smaug-bpe ", {PATTERN_LLAMA3}, false, false, false},
};

static const struct pre_tokenizer *find_pre_tokenizer(const char *name) {
  size_t len = strlen(name);
  if (len == 0 || strchr(name, ' '))
    return NULL;
  for (size_t i = 0; i < sizeof pre_tokenizers / sizeof *pre_tokenizers; i++)
    for (const char *at = pre_tokenizers[i].names; (at = strstr(at, name)) != NULL; at++)
      if (at[-1] == ' ' && at[len] == ' ')
        return pre_tokenizers + i;
  return NULL;
}

struct gguf {
  sfa_tokenizer *t;
  const sfa_weights *weights;
  sfa_step *added; /* tokens that are found in the text itself */
  sfa_bytes text;  /* scratch */
};

/* ids in the metadata: -1 if absent; SFA_ERROR_FORMAT if outside the vocabulary. */
static sfa_status read_id(const struct gguf *g, const char *key, int32_t *id) {
  double value;
  *id = -1;
  if (!sfa_meta_number(g->weights, key, &value))
    return SFA_OK;
  if (!(value >= 0 && value < (double)g->t->n_tokens)) {
    if (value == 4294967295.0 || value == -1) /* how converters write "none" */
      return SFA_OK;
    return sfa_fail(g->t->ctx, SFA_ERROR_FORMAT, "%s is %g, but the vocabulary has %zu tokens", key, value, g->t->n_tokens);
  }
  *id = (int32_t)value;
  return SFA_OK;
}

/* What a token's text stands for when it is decoded. */
static sfa_status put_piece(struct gguf *g, int32_t id, const uint8_t *text, size_t len, int type, float score) {
  sfa_tokenizer *t = g->t;
  bool special = type == TYPE_CONTROL || type == TYPE_UNKNOWN;
  int byte = type == TYPE_BYTE ? sfa_byte_token_read(text, len) : -1;
  if (byte >= 0) {
    t->bpe.byte_ids[byte] = id;
    return sfa_tokenizer_put(t, id, &(uint8_t){(uint8_t)byte}, 1, 0, score);
  }
  g->text.len = 0;
  SFA_TRY(sfa_bytes_append(t->ctx, &g->text, text, len));
  if (t->bpe.byte_level && type != TYPE_USER && !special) {
    size_t n;
    if (sfa_byte_alphabet_read(text, len, g->text.data, &n))
      g->text.len = n;
    else
      g->text.len = len;
  } else if (!t->bpe.byte_level && !special) { /* U+2581 is a space */
    size_t n = 0;
    for (size_t i = 0; i < len;) {
      bool space = len - i >= 3 && memcmp(text + i, "\xe2\x96\x81", 3) == 0;
      g->text.data[n++] = space ? ' ' : text[i];
      i += space ? 3 : 1;
    }
    g->text.len = n;
  }
  return sfa_tokenizer_put(t, id, g->text.data, g->text.len, special ? SFA_TOKEN_SPECIAL : 0, score);
}

static sfa_status read_vocabulary(struct gguf *g) {
  sfa_tokenizer *t = g->t;
  int64_t n = sfa_meta_array_len(g->weights, "tokenizer.ggml.tokens");
  int64_t n_types = sfa_meta_array_len(g->weights, "tokenizer.ggml.token_type");
  int64_t n_scores = sfa_meta_array_len(g->weights, "tokenizer.ggml.scores");
  if (n <= 0 || n > SFA_TOKEN_IDS_MAX)
    return sfa_fail(t->ctx, SFA_ERROR_FORMAT, "tokenizer.ggml.tokens has %lld tokens; 1 to %d are possible", (long long)n,
                    SFA_TOKEN_IDS_MAX);
  if ((n_types >= 0 && n_types != n) || (n_scores >= 0 && n_scores != n))
    return sfa_fail(t->ctx, SFA_ERROR_FORMAT, "the file has %lld tokens, but %lld types and %lld scores for them", (long long)n,
                    (long long)n_types, (long long)n_scores);
  if (t->bpe.by_score && n_scores < 0)
    return sfa_fail(t->ctx, SFA_ERROR_FORMAT, "a SentencePiece tokenizer needs tokenizer.ggml.scores, which the file lacks");
  for (int32_t id = 0; id < (int32_t)n; id++) {
    const char *text;
    size_t len;
    double type = TYPE_NORMAL, score = 0;
    if (!sfa_meta_array_string(g->weights, "tokenizer.ggml.tokens", id, &text, &len))
      return sfa_fail(t->ctx, SFA_ERROR_FORMAT, "tokenizer.ggml.tokens: element %d is no text", id);
    if ((n_types >= 0 && !sfa_meta_array_number(g->weights, "tokenizer.ggml.token_type", id, &type)) ||
        (n_scores >= 0 && !sfa_meta_array_number(g->weights, "tokenizer.ggml.scores", id, &score)))
      return sfa_fail(t->ctx, SFA_ERROR_FORMAT, "type or score of token %d is no number", id);
    int kind = type >= TYPE_NORMAL && type <= TYPE_BYTE ? (int)type : TYPE_NORMAL;
    SFA_TRY(put_piece(g, id, (const uint8_t *)text, len, kind, (float)score));
    bool merges_make_it = kind == TYPE_NORMAL || kind == TYPE_UNUSED;
    if (merges_make_it && t->bpe.byte_level) /* its piece is the raw bytes */
      SFA_TRY(sfa_tokenizer_put_text(t, id, t->pieces.data + t->tokens[id].at, t->tokens[id].len));
    else if (merges_make_it)
      SFA_TRY(sfa_tokenizer_put_text(t, id, (const uint8_t *)text, len));
    else if (kind != TYPE_BYTE && len > 0)
      SFA_TRY(sfa_step_add_token(t->ctx, g->added, (const uint8_t *)text, len, (sfa_added_token){.id = id, .special = kind != TYPE_USER}));
  }
  return SFA_OK;
}

/* Merges may pass through the text of a user-defined token. It stands in the file as it is (not in the byte alphabet), and an ordinary
 * token of the same bytes goes first. */
static sfa_status add_user_texts(struct gguf *g) {
  for (size_t i = 0; i < g->added->n_tokens; i++) {
    const char *text;
    size_t len;
    int32_t id = g->added->tokens[i].id;
    if (!g->added->tokens[i].special && sfa_meta_array_string(g->weights, "tokenizer.ggml.tokens", id, &text, &len))
      SFA_TRY(sfa_text_table_add(g->t->ctx, &g->t->bpe.ids, text, len, id, NULL));
  }
  return SFA_OK;
}

static sfa_status read_merges(struct gguf *g) {
  sfa_tokenizer *t = g->t;
  int64_t n = sfa_meta_array_len(g->weights, "tokenizer.ggml.merges");
  if (n < 0)
    return sfa_fail(t->ctx, SFA_ERROR_FORMAT, "a byte-level tokenizer needs tokenizer.ggml.merges, which the file lacks");
  for (int64_t i = 0; i < n; i++) {
    const char *text;
    size_t len, left, right;
    if (!sfa_meta_array_string(g->weights, "tokenizer.ggml.merges", i, &text, &len))
      return sfa_fail(t->ctx, SFA_ERROR_FORMAT, "tokenizer.ggml.merges: element %lld is no text", (long long)i);
    const char *gap = len > 1 ? memchr(text + 1, ' ', len - 1) : NULL;
    g->text.len = 0;
    SFA_TRY(sfa_bytes_append(t->ctx, &g->text, text, len));
    size_t at = gap ? (size_t)(gap - text) : 0;
    if (!gap || !sfa_byte_alphabet_read((const uint8_t *)text, at, g->text.data, &left) ||
        !sfa_byte_alphabet_read((const uint8_t *)gap + 1, len - at - 1, g->text.data + left, &right))
      return sfa_fail(t->ctx, SFA_ERROR_FORMAT,
                      "tokenizer.ggml.merges: element %lld, \"%.64s\", is not two texts of a byte-level vocabulary", (long long)i, text);
    SFA_TRY(sfa_bpe_add_merge(t->ctx, &t->bpe, g->text.data, left, g->text.data + left, right));
  }
  return SFA_OK;
}

/* ---- The two kinds ----------------------------------------------------------------------------------------------------------- */

static sfa_status build_byte_level(struct gguf *g, bool *add_bos) {
  sfa_tokenizer *t = g->t;
  const char *name = "default";
  sfa_meta_string(g->weights, "tokenizer.ggml.pre", &name, NULL);
  const struct pre_tokenizer *pre = find_pre_tokenizer(name);
  if (!pre)
    return sfa_fail(t->ctx, SFA_ERROR_UNSUPPORTED,
                    "the pre-tokenizer \"%.64s\" of this GGUF file is not known here; use the model's tokenizer.json", name);
  t->bpe.byte_level = true;
  t->bpe.whole_words = pre->whole_words;
  *add_bos = pre->add_bos;
  SFA_TRY(read_vocabulary(g));
  SFA_TRY(add_user_texts(g));
  SFA_TRY(read_merges(g));
  sfa_step *step;
  if (pre->nfc) {
    SFA_TRY(sfa_steps_add(t->ctx, &t->steps, SFA_STEP_NORMALIZE, &step));
    step->compose = true;
  }
  for (int i = 0; i < 2 && pre->patterns[i]; i++)
    SFA_TRY(sfa_steps_add_split(t->ctx, &t->steps, pre->patterns[i], false, SFA_SPLIT_ISOLATED, false));
  return sfa_tokenizer_finish(t, NULL);
}

static sfa_status build_sentence_piece(struct gguf *g, bool *add_bos) {
  sfa_tokenizer *t = g->t;
  t->bpe.by_score = t->bpe.byte_fallback = true;
  *add_bos = true;
  SFA_TRY(read_vocabulary(g));
  SFA_TRY(add_user_texts(g));
  bool prefix = true;
  sfa_meta_bool(g->weights, "tokenizer.ggml.add_space_prefix", &prefix);
  if (prefix)
    SFA_TRY(sfa_steps_add_prepend(t->ctx, &t->steps, " ", false, false));
  SFA_TRY(sfa_steps_add_replace(t->ctx, &t->steps, " ", true, "\xe2\x96\x81"));
  t->strip_space = prefix;
  SFA_TRY(read_id(g, "tokenizer.ggml.unknown_token_id", &t->bpe.unknown_id));
  return sfa_tokenizer_finish(t, "\xe2\x96\x81");
}

static sfa_status read_specials(struct gguf *g, bool add_bos) {
  sfa_tokenizer *t = g->t;
  SFA_TRY(read_id(g, "tokenizer.ggml.bos_token_id", &t->bos_id));
  SFA_TRY(read_id(g, "tokenizer.ggml.eos_token_id", &t->eos_id));
  static const char *const more_ends[] = {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"};
  for (int i = 0; i < 2; i++) {
    int32_t id;
    SFA_TRY(read_id(g, more_ends[i], &id));
    if (id >= 0)
      t->tokens[id].flags |= SFA_TOKEN_END;
  }
  bool add_eos = false;
  sfa_meta_bool(g->weights, "tokenizer.ggml.add_bos_token", &add_bos);
  sfa_meta_bool(g->weights, "tokenizer.ggml.add_eos_token", &add_eos);
  if (add_bos && t->bos_id >= 0)
    SFA_TRY(sfa_ids_append(t->ctx, &t->before, &t->bos_id, 1));
  if (add_eos && t->eos_id >= 0)
    SFA_TRY(sfa_ids_append(t->ctx, &t->after, &t->eos_id, 1));
  sfa_tokenizer_mark_ends(t);
  const char *chat;
  if (sfa_meta_string(g->weights, "tokenizer.chat_template", &chat, NULL))
    SFA_TRY(sfa_strdup(t->ctx, chat, &t->chat_template));
  return SFA_OK;
}

static sfa_status build(struct gguf *g) {
  const char *model = "";
  bool add_bos = false;
  if (!sfa_meta_string(g->weights, "tokenizer.ggml.model", &model, NULL))
    return sfa_fail(g->t->ctx, SFA_ERROR_FORMAT, "the GGUF file holds no tokenizer (tokenizer.ggml.model)");
  SFA_TRY(sfa_steps_add(g->t->ctx, &g->t->steps, SFA_STEP_TOKENS, &g->added));
  if (strcmp(model, "gpt2") == 0)
    SFA_TRY(build_byte_level(g, &add_bos));
  else if (strcmp(model, "llama") == 0)
    SFA_TRY(build_sentence_piece(g, &add_bos));
  else
    return sfa_fail(g->t->ctx, SFA_ERROR_UNSUPPORTED,
                    "the tokenizer model \"%.64s\" of this GGUF file is not supported; gpt2 and llama are", model);
  return read_specials(g, add_bos);
}

sfa_status sfa_tokenizer_from_gguf(sfa_context *ctx, const sfa_weights *weights, sfa_tokenizer **tokenizer) {
  *tokenizer = NULL;
  struct gguf g = {.weights = weights};
  SFA_TRY(sfa_tokenizer_create(ctx, &g.t));
  sfa_status status = build(&g);
  sfa_free(ctx, g.text.data);
  if (status == SFA_OK)
    *tokenizer = g.t;
  else
    sfa_tokenizer_close(g.t);
  return status;
}
