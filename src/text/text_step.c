/* The chain of steps from a text to words. */
#include "text/text_step.h"

#include "text/normalize.h"
#include "text/utf8.h"

#include <string.h>

/* Texts run through the chain: the memory that the steps reuse from piece to piece. */
struct sfa_encoder {
  sfa_context *ctx;
  const sfa_steps *steps;
  const sfa_bpe *bpe;
  bool parse_special;
  sfa_ids *ids;     /* of the current text */
  sfa_word_fn word; /* takes the words, if not NULL */
  void *word_user;
  sfa_bpe_scratch scratch;
  pcre2_match_context *match_context;
  struct {
    pcre2_match_data *match;
    sfa_bytes text;
  } step[SFA_STEPS_MAX];
};

/* ---- Patterns ---------------------------------------------------------------------------------------------------------------- */

static void *pcre_alloc(PCRE2_SIZE bytes, void *user) {
  sfa_context *ctx = user;
  return ctx->allocator.alloc(ctx->allocator.user, bytes);
}

static void pcre_free(void *memory, void *user) { sfa_free(user, memory); }

/* Of the regex engine that Hugging Face uses, \s is Unicode's White_Space (PCRE2's has U+180E too) and \w has marks and connectors. */
static sfa_status translate_pattern(sfa_context *ctx, const char *pattern, sfa_bytes *out) {
  static const struct {
    char letter;
    const char *members;
  } classes[] = {{'s', "\\p{Z}\\x09-\\x0d\\x{85}"}, {'w', "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}"}};
  bool in_class = false;
  for (const char *p = pattern; *p; p++) {
    size_t len = p[0] == '\\' && p[1] ? 2 : 1;
    const char *members = NULL;
    bool negated = false;
    if (len == 2)
      for (size_t i = 0; i < sizeof classes / sizeof *classes; i++) {
        negated = p[1] == classes[i].letter - 'a' + 'A';
        if (p[1] == classes[i].letter || (negated && !in_class)) {
          members = classes[i].members;
          break;
        }
      }
    if (members) {
      if (!in_class)
        SFA_TRY(sfa_bytes_append(ctx, out, "[^", negated ? 2 : 1));
      SFA_TRY(sfa_bytes_append(ctx, out, members, strlen(members)));
      if (!in_class)
        SFA_TRY(sfa_bytes_append(ctx, out, "]", 1));
    } else {
      SFA_TRY(sfa_bytes_append(ctx, out, p, len));
      if (len == 1 && *p == '[')
        in_class = true;
      else if (len == 1 && *p == ']')
        in_class = false;
    }
    p += len - 1;
  }
  return SFA_OK;
}

enum { PATTERN_MAX_BYTES = 1 << 16 };

static sfa_status compile_pattern(sfa_context *ctx, const char *pattern, bool literal, pcre2_code **code) {
  size_t len = strlen(pattern);
  if (len == 0 || len > PATTERN_MAX_BYTES)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "a pattern of the tokenizer has %zu bytes; 1 to %d are allowed", len, PATTERN_MAX_BYTES);
  sfa_bytes translated = {0};
  sfa_status status = literal ? sfa_bytes_append(ctx, &translated, pattern, len) : translate_pattern(ctx, pattern, &translated);
  pcre2_general_context *memory = status == SFA_OK ? pcre2_general_context_create(pcre_alloc, pcre_free, ctx) : NULL;
  pcre2_compile_context *options = memory ? pcre2_compile_context_create(memory) : NULL;
  if (options) {
    int error = 0;
    PCRE2_SIZE at = 0;
    *code = pcre2_compile(translated.data, translated.len, PCRE2_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C),
                          &error, &at, options);
    if (*code) {
      pcre2_jit_compile(*code, PCRE2_JIT_COMPLETE); /* without it the interpreter runs, slower */
    } else {
      char text[120] = "";
      pcre2_get_error_message(error, (PCRE2_UCHAR *)text, sizeof text);
      status = sfa_fail(ctx, error == PCRE2_ERROR_HEAP_FAILED ? SFA_ERROR_MEMORY : SFA_ERROR_UNSUPPORTED,
                        "the tokenizer's pattern \"%.100s\" is not one that PCRE2 compiles: %s", pattern, text);
    }
  } else if (status == SFA_OK) {
    status = sfa_fail(ctx, SFA_ERROR_MEMORY, "out of memory for a pattern of the tokenizer");
  }
  pcre2_compile_context_free(options);
  pcre2_general_context_free(memory);
  sfa_free(ctx, translated.data);
  return status;
}

/* The first match at or after `from` that is not empty. *found is false when there is none. */
static sfa_status next_match(sfa_encoder *run, int32_t index, const uint8_t *text, size_t len, size_t from, size_t *start, size_t *end,
                             bool *found) {
  const pcre2_code *code = run->steps->steps[index].pattern;
  if (!run->step[index].match)
    run->step[index].match = pcre2_match_data_create_from_pattern(code, NULL);
  if (!run->step[index].match)
    return sfa_fail(run->ctx, SFA_ERROR_MEMORY, "out of memory for matching a pattern of the tokenizer");
  int rc = pcre2_match(code, text, len, from, PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY, run->step[index].match, run->match_context);
  if (rc == PCRE2_ERROR_JIT_STACKLIMIT) /* the interpreter keeps its state in the heap */
    rc = pcre2_match(code, text, len, from, PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY | PCRE2_NO_JIT, run->step[index].match, run->match_context);
  *found = rc >= 0;
  if (rc == PCRE2_ERROR_NOMATCH)
    return SFA_OK;
  if (rc < 0) {
    char message[120] = "";
    pcre2_get_error_message(rc, (PCRE2_UCHAR *)message, sizeof message);
    return sfa_fail(run->ctx, SFA_ERROR_UNSUPPORTED, "a pattern of the tokenizer fails on this text at byte %zu: %s", from, message);
  }
  const PCRE2_SIZE *ends = pcre2_get_ovector_pointer(run->step[index].match);
  *start = ends[0];
  *end = ends[1];
  return SFA_OK;
}

/* ---- Steps that change the text ---------------------------------------------------------------------------------------------- */

static sfa_status replace_matches(sfa_encoder *run, int32_t index, const uint8_t *text, size_t len, sfa_bytes *out) {
  const sfa_step *step = run->steps->steps + index;
  size_t at = 0, start = 0, end = 0;
  for (;;) {
    bool found;
    SFA_TRY(next_match(run, index, text, len, at, &start, &end, &found));
    if (!found)
      return sfa_bytes_append(run->ctx, out, text + at, len - at);
    SFA_TRY(sfa_bytes_append(run->ctx, out, text + at, start - at));
    SFA_TRY(sfa_bytes_append(run->ctx, out, step->text, strlen(step->text)));
    at = end;
  }
}

/* One text-changing step; out is empty before. */
static sfa_status change_text(sfa_encoder *run, int32_t index, const uint8_t *text, size_t len, bool at_start, sfa_bytes *out) {
  const sfa_step *step = run->steps->steps + index;
  switch (step->kind) {
  case SFA_STEP_NORMALIZE: return sfa_normalize(run->ctx, text, len, step->compose, step->compatible, out);
  case SFA_STEP_REPLACE: return replace_matches(run, index, text, len, out);
  case SFA_STEP_PREPEND: {
    size_t n = strlen(step->text);
    bool there = step->unless_there && len >= n && memcmp(text, step->text, n) == 0;
    if (len > 0 && !there && (at_start || !step->only_first))
      SFA_TRY(sfa_bytes_append(run->ctx, out, step->text, n));
    return sfa_bytes_append(run->ctx, out, text, len);
  }
  default: { /* SFA_STEP_STRIP */
    size_t start = step->left ? sfa_utf8_spaces_after(text, len, 0) : 0;
    size_t end = step->right ? start + sfa_utf8_spaces_before(text + start, len - start) : len;
    return sfa_bytes_append(run->ctx, out, text + start, end - start);
  }
  }
}

/* ---- Steps that cut the text ------------------------------------------------------------------------------------------------- */

static sfa_status run_step(sfa_encoder *run, int32_t index, const uint8_t *text, size_t len, bool at_start);

/* Pieces arrive in order, each a match or what lies between two; the rule says which of them stay together. */
struct splitter {
  sfa_encoder *run;
  int32_t index;
  const uint8_t *text;
  bool at_start;
  size_t start, end; /* the piece that may still grow */
  bool last_is_match, any;
};

static sfa_status flush_piece(struct splitter *s) {
  if (!s->any || s->start == s->end)
    return SFA_OK;
  return run_step(s->run, s->index + 1, s->text + s->start, s->end - s->start, s->at_start && s->start == 0);
}

static sfa_status add_piece(struct splitter *s, size_t start, size_t end, bool is_match) {
  if (start == end)
    return SFA_OK;
  const sfa_step *step = s->run->steps->steps + s->index;
  is_match ^= step->inverted;
  bool joins = false; /* the piece continues the one before */
  switch (step->rule) {
  case SFA_SPLIT_WITH_PREVIOUS: joins = is_match && !s->last_is_match; break;
  case SFA_SPLIT_WITH_NEXT: joins = !is_match && s->last_is_match; break;
  case SFA_SPLIT_CONTIGUOUS: joins = is_match == s->last_is_match; break;
  default: break;
  }
  if (s->any && joins) {
    s->end = end;
  } else {
    SFA_TRY(flush_piece(s));
    s->start = start;
    s->end = step->rule == SFA_SPLIT_REMOVED && is_match ? start : end;
    s->any = true;
  }
  s->last_is_match = is_match;
  return SFA_OK;
}

static sfa_status split_text(sfa_encoder *run, int32_t index, const uint8_t *text, size_t len, bool at_start) {
  struct splitter s = {.run = run, .index = index, .text = text, .at_start = at_start};
  size_t at = 0, start = 0, end = 0;
  for (;;) {
    bool found;
    SFA_TRY(next_match(run, index, text, len, at, &start, &end, &found));
    SFA_TRY(add_piece(&s, at, found ? start : len, false));
    if (!found)
      return flush_piece(&s);
    SFA_TRY(add_piece(&s, start, end, true));
    at = end;
  }
}

/* The longest added token at text[at]; NULL if there is none. */
static const sfa_added_token *token_at(const sfa_step *step, const uint8_t *text, size_t len, size_t at, size_t *end) {
  const sfa_added_token *best = NULL;
  uint64_t node = 0, leaf;
  while (at < len && sfa_pair_map_find(&step->trie, (int32_t)node, text[at], &node)) {
    at++;
    if (sfa_pair_map_find(&step->trie, (int32_t)node, 256, &leaf)) {
      best = step->tokens + leaf;
      *end = at;
    }
  }
  return best;
}

static bool stands_alone(const uint8_t *text, size_t len, size_t start, size_t end) {
  size_t n;
  return !(start > 0 && sfa_char_is_word(sfa_utf8_decode(text + sfa_utf8_last(text, start), &n))) &&
         !(end < len && sfa_char_is_word(sfa_utf8_decode(text + end, &n)));
}

static sfa_status take_tokens(sfa_encoder *run, int32_t index, const uint8_t *text, size_t len, bool at_start) {
  const sfa_step *step = run->steps->steps + index;
  size_t done = 0; /* bytes that were handed on */
  for (size_t at = 0; at < len;) {
    size_t end = 0;
    const sfa_added_token *token = step->starts[text[at]] ? token_at(step, text, len, at, &end) : NULL;
    if (!token) {
      at++;
      continue;
    }
    size_t start = at;
    at = end;
    if (token->special && !run->parse_special)
      continue;
    if (token->single_word && !stands_alone(text, len, start, end))
      continue;
    if (token->lstrip)
      start = sfa_utf8_spaces_before(text, start);
    if (token->rstrip)
      end = sfa_utf8_spaces_after(text, len, end);
    if (start < done) /* the token before has taken those spaces */
      start = done;
    SFA_TRY(run_step(run, index + 1, text + done, start - done, at_start && done == 0));
    SFA_TRY(sfa_ids_append(run->ctx, run->ids, &token->id, 1));
    done = end;
    if (at < end)
      at = end;
  }
  return run_step(run, index + 1, text + done, len - done, at_start && done == 0);
}

/* ---- The chain --------------------------------------------------------------------------------------------------------------- */

static sfa_status run_step(sfa_encoder *run, int32_t index, const uint8_t *text, size_t len, bool at_start) {
  if (len == 0)
    return SFA_OK;
  if (index == run->steps->count)
    return run->word ? run->word(run->word_user, text, len) : sfa_bpe_word(run->ctx, run->bpe, &run->scratch, text, len, run->ids);
  switch (run->steps->steps[index].kind) {
  case SFA_STEP_TOKENS: return take_tokens(run, index, text, len, at_start);
  case SFA_STEP_SPLIT: return split_text(run, index, text, len, at_start);
  default: break;
  }
  sfa_bytes *out = &run->step[index].text;
  out->len = 0;
  SFA_TRY(change_text(run, index, text, len, at_start, out));
  return run_step(run, index + 1, out->data, out->len, at_start);
}

/* Bounds on one match, so that a pattern from a file cannot take the machine. */
enum { MATCH_HEAP_KIB = 256 << 10 };

sfa_status sfa_encoder_create(sfa_context *ctx, const sfa_steps *steps, const sfa_bpe *bpe, sfa_encoder **out) {
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof **out, "an encoder of texts", (void **)out));
  sfa_encoder *run = *out;
  run->ctx = ctx;
  run->steps = steps;
  run->bpe = bpe;
  run->match_context = pcre2_match_context_create(NULL);
  if (!run->match_context) {
    sfa_encoder_destroy(run);
    *out = NULL;
    return sfa_fail(ctx, SFA_ERROR_MEMORY, "out of memory for matching the tokenizer's patterns");
  }
  pcre2_set_heap_limit(run->match_context, MATCH_HEAP_KIB);
  return SFA_OK;
}

void sfa_encoder_destroy(sfa_encoder *run) {
  if (!run)
    return;
  for (int32_t i = 0; i < SFA_STEPS_MAX; i++) {
    pcre2_match_data_free(run->step[i].match);
    sfa_free(run->ctx, run->step[i].text.data);
  }
  sfa_bpe_scratch_free(run->ctx, &run->scratch);
  pcre2_match_context_free(run->match_context);
  sfa_free(run->ctx, run);
}

sfa_status sfa_encoder_encode(sfa_encoder *run, bool parse_special, const uint8_t *text, size_t len, sfa_ids *ids) {
  run->parse_special = parse_special;
  run->ids = ids;
  return run_step(run, 0, text, len, true);
}

sfa_status sfa_encoder_words(sfa_encoder *run, const uint8_t *text, size_t len, sfa_word_fn fn, void *user) {
  run->word = fn;
  run->word_user = user;
  sfa_status status = run_step(run, 0, text, len, true);
  run->word = NULL;
  return status;
}

sfa_status sfa_steps_encode(sfa_context *ctx, const sfa_steps *steps, const sfa_bpe *bpe, bool parse_special, const uint8_t *text,
                            size_t len, sfa_ids *ids) {
  sfa_encoder *run;
  SFA_TRY(sfa_encoder_create(ctx, steps, bpe, &run));
  sfa_status status = sfa_encoder_encode(run, parse_special, text, len, ids);
  sfa_encoder_destroy(run);
  return status;
}

sfa_status sfa_steps_transform(sfa_context *ctx, const sfa_steps *steps, int32_t first, int32_t last, const uint8_t *text, size_t len,
                               sfa_bytes *out) {
  sfa_encoder *run;
  SFA_TRY(sfa_encoder_create(ctx, steps, NULL, &run));
  sfa_status status = sfa_bytes_append(ctx, out, text, len);
  for (int32_t i = first; i < last && status == SFA_OK; i++) {
    sfa_bytes before = *out;
    *out = (sfa_bytes){0};
    status = change_text(run, i, before.data, before.len, true, out);
    sfa_free(ctx, before.data);
  }
  sfa_encoder_destroy(run);
  return status;
}

/* ---- Building ---------------------------------------------------------------------------------------------------------------- */

sfa_status sfa_steps_add(sfa_context *ctx, sfa_steps *steps, sfa_step_kind kind, sfa_step **step) {
  *step = NULL;
  if (steps->count == SFA_STEPS_MAX)
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "the tokenizer has more than %d normalizers and pre-tokenizers", SFA_STEPS_MAX);
  *step = steps->steps + steps->count++;
  **step = (sfa_step){.kind = kind, .n_nodes = 1};
  return SFA_OK;
}

/* What goes into a text keeps it well-formed: the steps after it count on that. */
static sfa_status copy_text(sfa_context *ctx, const char *text, char **out) {
  if (!sfa_utf8_valid((const uint8_t *)text, strlen(text)))
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "a text that the tokenizer puts into others is not UTF-8; its file is damaged");
  return sfa_strdup(ctx, text, out);
}

sfa_status sfa_steps_add_replace(sfa_context *ctx, sfa_steps *steps, const char *pattern, bool literal, const char *text) {
  sfa_step *step;
  SFA_TRY(sfa_steps_add(ctx, steps, SFA_STEP_REPLACE, &step));
  SFA_TRY(copy_text(ctx, text, &step->text));
  return compile_pattern(ctx, pattern, literal, &step->pattern);
}

sfa_status sfa_steps_add_split(sfa_context *ctx, sfa_steps *steps, const char *pattern, bool literal, sfa_split_rule rule, bool inverted) {
  sfa_step *step;
  SFA_TRY(sfa_steps_add(ctx, steps, SFA_STEP_SPLIT, &step));
  step->rule = rule;
  step->inverted = inverted;
  return compile_pattern(ctx, pattern, literal, &step->pattern);
}

sfa_status sfa_steps_add_prepend(sfa_context *ctx, sfa_steps *steps, const char *text, bool unless_there, bool only_first) {
  sfa_step *step;
  SFA_TRY(sfa_steps_add(ctx, steps, SFA_STEP_PREPEND, &step));
  step->unless_there = unless_there;
  step->only_first = only_first;
  return copy_text(ctx, text, &step->text);
}

sfa_status sfa_step_add_token(sfa_context *ctx, sfa_step *step, const uint8_t *text, size_t len, sfa_added_token token) {
  uint64_t node = 0;
  if (len == 0 || !sfa_utf8_valid(text, len)) /* no well-formed text holds it */
    return SFA_OK;
  for (size_t i = 0; i < len; i++) {
    uint64_t next;
    if (!sfa_pair_map_find(&step->trie, (int32_t)node, text[i], &next)) {
      if (step->n_nodes == INT32_MAX)
        return sfa_fail(ctx, SFA_ERROR_FORMAT, "the tokenizer's added tokens are too long");
      next = (uint64_t)step->n_nodes++;
      SFA_TRY(sfa_pair_map_set(ctx, &step->trie, (int32_t)node, text[i], next, NULL));
    }
    node = next;
  }
  step->starts[text[0]] = true;
  SFA_TRY(sfa_array_reserve(ctx, (void **)&step->tokens, &step->token_capacity, step->n_tokens + 1, sizeof *step->tokens));
  step->tokens[step->n_tokens] = token;
  return sfa_pair_map_set(ctx, &step->trie, (int32_t)node, 256, step->n_tokens++, NULL);
}

void sfa_steps_free(sfa_context *ctx, sfa_steps *steps) {
  for (int32_t i = 0; i < steps->count; i++) {
    sfa_step *step = steps->steps + i;
    pcre2_code_free(step->pattern);
    sfa_free(ctx, step->text);
    sfa_free(ctx, step->tokens);
    sfa_pair_map_free(ctx, &step->trie);
  }
  steps->count = 0;
}
