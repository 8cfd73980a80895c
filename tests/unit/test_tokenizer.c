/* Tokenizers against the ids of Hugging Face's and llama.cpp's (tests/golden/tokenizer), and files that lie. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "text_files.h"
#include "weights_files.h"

#define GOLDEN SFA_TEST_DATA "/golden/tokenizer/"
#define STORIES SFA_TEST_DATA "/golden/models/stories260K/tok512.bin"

static sfa_context *ctx;

static int group_setup(void **state) {
  temp_begin(state);
  return sfa_context_create(NULL, &ctx) == SFA_OK ? 0 : 1;
}

static int group_teardown(void **state) {
  sfa_context_destroy(ctx);
  return temp_end(state);
}

static sfa_tokenizer *open_tokenizer(const char *path) {
  sfa_tokenizer *t = NULL;
  if (sfa_tokenizer_open(ctx, path, &t) != SFA_OK)
    fail_msg("%s: %s", path, sfa_context_error(ctx));
  return t;
}

/* ---- Ids that others gave ---------------------------------------------------------------------------------------------------------- */

static void check_ids(const sfa_tokenizer *t, const char *text, size_t bytes, uint32_t flags, const cJSON *expected, const char *what) {
  int32_t *ids;
  size_t n;
  assert_int_equal(sfa_tokenizer_encode(t, text, bytes, flags, &ids, &n), SFA_OK);
  bool equal = n == (size_t)cJSON_GetArraySize(expected);
  const cJSON *item;
  size_t i = 0;
  cJSON_ArrayForEach(item, expected) {
    equal = equal && ids[i] == item->valueint;
    i++;
  }
  if (!equal) {
    char *shown = cJSON_PrintUnformatted(expected);
    print_error("%s, flags %u: \"%s\"\n  expected %s\n  got      [", what, flags, text, shown);
    for (i = 0; i < n; i++)
      print_error("%s%d", i ? "," : "", ids[i]);
    fail_msg("] %s", what);
  }
  sfa_free_ids(ctx, ids);
}

/* The bytes of all ids of a text; free them. */
static char *round_trip(const sfa_tokenizer *t, const char *text, size_t bytes, size_t *n_bytes) {
  int32_t *ids, previous = -1;
  size_t n;
  assert_int_equal(sfa_tokenizer_encode(t, text, bytes, 0, &ids, &n), SFA_OK);
  buffer out = {0};
  for (size_t i = 0; i < n; i++) {
    char piece[1024];
    size_t len = sfa_tokenizer_decode(t, previous, ids[i], 0, piece, sizeof piece);
    assert_true(len <= sizeof piece);
    put(&out, piece, len);
    previous = ids[i];
  }
  *n_bytes = out.bytes;
  put(&out, "", 1);
  sfa_free_ids(ctx, ids);
  return (char *)out.data;
}

/* As Hugging Face shows bytes that are no text: the cases hold U+FFFD for them, so only the rest is compared. */
static bool shows_replacement(const char *text, size_t bytes) { return memmem(text, bytes, "\xef\xbf\xbd", 3) != NULL; }

static size_t from_hex(const char *hex, char *out) {
  size_t n = strlen(hex) / 2;
  for (size_t i = 0; i < n; i++) {
    unsigned value;
    assert_int_equal(sscanf(hex + 2 * i, "%2x", &value), 1);
    out[i] = (char)value;
  }
  out[n] = 0;
  return n;
}

struct golden {
  const sfa_tokenizer *t;
  const char *name;
};

static void check_golden(const cJSON *line, void *user) {
  const struct golden *g = user;
  static char text[1 << 14], expected[1 << 14];
  const char *plain_text = text_of(line, "text"), *hex = text_of(line, "hex"), *decoded = text_of(line, "decoded");
  assert_true((plain_text ? strlen(plain_text) : strlen(hex)) < sizeof text && strlen(decoded) < sizeof expected);
  size_t bytes = plain_text ? (size_t)snprintf(text, sizeof text, "%s", plain_text) : from_hex(hex, text);
  check_ids(g->t, text, bytes, 0, cJSON_GetObjectItem(line, "plain"), g->name);
  check_ids(g->t, text, bytes, SFA_TOKENIZE_SPECIAL | SFA_TOKENIZE_PARSE, cJSON_GetObjectItem(line, "parsed"), g->name);
  size_t n_expected = from_hex(decoded, expected), n_got;
  char *got = round_trip(g->t, text, bytes, &n_got);
  if (!shows_replacement(expected, n_expected) && (n_got != n_expected || memcmp(got, expected, n_got) != 0))
    fail_msg("%s: \"%s\" decodes to \"%s\", not \"%s\"", g->name, text, got, expected);
  free(got);
}

static void golden_ids(void **state) {
  (void)state;
  static const struct {
    const char *name, *file;
    int n_cases;
  } sets[] = {{"bytes-prefix", "/tokenizer.json", 63},
              {"bytes-digits", "/tokenizer.json", 63},
              {"bytes-qwen", "/tokenizer.json", 63},
              {"bytes-llama3", "/tokenizer.json", 63},
              {"bytes-splits", "/tokenizer.json", 63},
              {"bytes-words", "", 63},
              {"pieces-llama", "", 63},
              {"pieces-gemma", "", 63},
              {"pieces-meta", "", 63},
              {"gpt2", "", 76},
              {"qwen3", "", 76},
              {"smollm2", "/tokenizer.gguf", 76},
              {"phi3", "/tokenizer.gguf", 47}};
  for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
    char path[512];
    snprintf(path, sizeof path, GOLDEN "%s%s", sets[i].name, sets[i].file);
    sfa_tokenizer *t = open_tokenizer(path);
    struct golden g = {t, sets[i].name};
    snprintf(path, sizeof path, GOLDEN "%s/cases.jsonl", sets[i].name);
    assert_int_equal(each_line(path, check_golden, &g), sets[i].n_cases);
    sfa_tokenizer_close(t);
  }
}

static void llama2c_ids(void **state) {
  (void)state;
  sfa_tokenizer *t = open_tokenizer(STORIES);
  cJSON *ids = cJSON_Parse("[1,403,407,261,378,432,383,286,261,376,298,315,421,395,317,426]"); /* llama2.c's own */
  static const char text[] = "Once upon a time, there was a little girl named Lily.";
  check_ids(t, text, strlen(text), SFA_TOKENIZE_SPECIAL, ids, "stories260K");
  cJSON_Delete(ids);
  assert_int_equal(sfa_tokenizer_vocab_size(t), 512);
  assert_int_equal(sfa_tokenizer_bos(t), 1);
  assert_true(sfa_tokenizer_is_end(t, 1) && sfa_tokenizer_is_end(t, 2) && !sfa_tokenizer_is_end(t, 0) && !sfa_tokenizer_is_end(t, -1));
  assert_false(sfa_tokenizer_has_chat(t));
  char piece[8];
  assert_int_equal(sfa_tokenizer_decode(t, 1, 403, 0, piece, sizeof piece), 4); /* " Once" at the start */
  assert_memory_equal(piece, "Once", 4);
  assert_int_equal(sfa_tokenizer_decode(t, 403, 403, 0, piece, sizeof piece), 5);
  assert_memory_equal(piece, " Once", 5);
  assert_int_equal(sfa_tokenizer_decode(t, 403, 403, 0, piece, 2), 5); /* says what it would take, writes what fits */
  assert_int_equal(sfa_tokenizer_decode(t, -1, 13, 0, piece, sizeof piece), 1);
  assert_int_equal(piece[0], '\n'); /* <0x0A> */
  assert_int_equal(sfa_tokenizer_decode(t, -1, 1, 0, piece, sizeof piece), 0);
  assert_int_equal(sfa_tokenizer_decode(t, -1, 1, 1, piece, sizeof piece), 3);
  assert_memory_equal(piece, "<s>", 3);
  assert_int_equal(sfa_tokenizer_decode(t, -1, 512, 1, piece, sizeof piece), 0);
  static const char unknown[] = "caf\xc3\xa9 \xf0\x9f\x98\x80 \xe4\xb8\xad"; /* byte tokens */
  size_t n;
  char *back = round_trip(t, unknown, strlen(unknown), &n);
  assert_string_equal(back, unknown);
  free(back);
  sfa_tokenizer_close(t);
}

static void specials_of_real_files(void **state) {
  (void)state;
  sfa_tokenizer *t = open_tokenizer(GOLDEN "qwen3");
  assert_int_equal(sfa_tokenizer_vocab_size(t), 151669);
  assert_int_equal(sfa_tokenizer_bos(t), -1);
  assert_true(sfa_tokenizer_is_end(t, 151645) && sfa_tokenizer_is_end(t, 151643) && !sfa_tokenizer_is_end(t, 151644));
  assert_true(sfa_tokenizer_has_chat(t));
  sfa_tokenizer_close(t);
  t = open_tokenizer(GOLDEN "smollm2/tokenizer.gguf");
  assert_int_equal(sfa_tokenizer_bos(t), 1);
  assert_true(sfa_tokenizer_is_end(t, 2) && sfa_tokenizer_is_end(t, 0) && !sfa_tokenizer_is_end(t, 1));
  assert_true(sfa_tokenizer_has_chat(t));
  sfa_tokenizer_close(t);
  t = open_tokenizer(GOLDEN "gpt2");
  assert_int_equal(sfa_tokenizer_bos(t), 50256);
  assert_true(sfa_tokenizer_is_end(t, 50256));
  sfa_tokenizer_close(t);
}

/* The files beside tokenizer.json: what transformers takes from them. */
static void files_beside(void **state) {
  (void)state;
  size_t bytes;
  char *text = read_whole(GOLDEN "pieces-llama/tokenizer.json", &bytes);
  write_whole(in_temp("tokenizer.json"), text, bytes);
  free(text);
  static const char config[] =
      "{\"bos_token\":{\"content\":\"<s>\"},\"eos_token\":\"</s>\",\"add_bos_token\":false,\"add_eos_token\":true,"
      "\"chat_template\":[{\"name\":\"tool\",\"template\":\"x\"},{\"name\":\"default\",\"template\":\"<|im_start|><|im_end|>\"}]}";
  write_whole(in_temp("tokenizer_config.json"), config, strlen(config));
  static const char generation[] = "{\"eos_token_id\":[2,300,999999]}";
  write_whole(in_temp("generation_config.json"), generation, strlen(generation));
  sfa_tokenizer *t = open_tokenizer(temp_dir);
  assert_int_equal(sfa_tokenizer_bos(t), 1);
  assert_true(sfa_tokenizer_is_end(t, 2) && sfa_tokenizer_is_end(t, 300) && !sfa_tokenizer_is_end(t, 301));
  assert_true(sfa_tokenizer_has_chat(t));
  int32_t *ids;
  size_t n;
  assert_int_equal(sfa_tokenizer_encode(t, "", 0, SFA_TOKENIZE_SPECIAL, &ids, &n), SFA_OK); /* the template's BOS is overruled */
  assert_int_equal(n, 1);
  assert_int_equal(ids[0], 2);
  sfa_free_ids(ctx, ids);
  sfa_tokenizer_close(t);
  write_whole(in_temp("chat_template.jinja"), "[INST]", 6); /* goes before the one in the configuration, and is of no family */
  t = open_tokenizer(in_temp("tokenizer.json"));
  assert_false(sfa_tokenizer_has_chat(t));
  sfa_tokenizer_close(t);
  remove(in_temp("chat_template.jinja"));
  remove(in_temp("generation_config.json"));
  remove(in_temp("tokenizer_config.json"));
  remove(in_temp("tokenizer.json"));
}

/* ---- Texts ------------------------------------------------------------------------------------------------------------------------- */

/* A rising cost per byte would make these take minutes. */
static void long_runs(void **state) {
  (void)state;
  static const char *const tokenizers[] = {GOLDEN "smollm2/tokenizer.gguf", GOLDEN "phi3/tokenizer.gguf", GOLDEN "bytes-qwen",
                                           GOLDEN "pieces-gemma",           GOLDEN "bytes-splits",        STORIES};
  static const char *const units[] = {
      "a", " ", "\n", " \n", "e\xcc\xa3\xcc\x81", "\xcc\xa3\xcc\x87\xcd\x85", "<|", "\xf0\x9f\x98\x80", "ab", "7", "\xe4\xb8\xad", "\xff"};
  enum { BYTES = 200000 };
  char *text = malloc(BYTES + 8);
  for (size_t k = 0; k < sizeof tokenizers / sizeof *tokenizers; k++) {
    sfa_tokenizer *t = open_tokenizer(tokenizers[k]);
    for (size_t u = 0; u < sizeof units / sizeof *units; u++) {
      size_t len = 0, n, unit = strlen(units[u]);
      for (; len < BYTES; len += unit)
        memcpy(text + len, units[u], unit);
      int32_t *ids;
      assert_int_equal(sfa_tokenizer_encode(t, text, len, SFA_TOKENIZE_PARSE, &ids, &n), SFA_OK);
      assert_true(n <= 3 * len + 1); /* U+FFFD has three bytes */
      sfa_free_ids(ctx, ids);
    }
    sfa_tokenizer_close(t);
  }
  free(text);
}

static void arguments(void **state) {
  (void)state;
  sfa_tokenizer *t;
  int32_t *ids;
  size_t n;
  assert_int_equal(sfa_tokenizer_open(ctx, NULL, &t), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_tokenizer_open(ctx, in_temp("nothing here"), &t), SFA_ERROR_IO);
  assert_int_equal(sfa_tokenizer_open(ctx, temp_dir, &t), SFA_ERROR_IO);
  assert_null(t);
  t = open_tokenizer(STORIES);
  assert_int_equal(sfa_tokenizer_encode(t, NULL, 3, 0, &ids, &n), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_tokenizer_encode(t, "a", 1, 64, &ids, &n), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_tokenizer_encode(t, NULL, 0, 0, &ids, &n), SFA_OK);
  assert_non_null(ids);
  assert_int_equal(n, 0);
  sfa_free_ids(ctx, ids);
  sfa_tokenizer_close(t);
  sfa_tokenizer_close(NULL);
}

/* ---- Files that lie ------------------------------------------------------------------------------------------------------------------ */

static void refuse(const char *path, sfa_status status, const char *word) {
  sfa_tokenizer *t;
  sfa_status got = sfa_tokenizer_open(ctx, path, &t);
  if (got != status || !strstr(sfa_context_error(ctx), word))
    fail_msg("expected %s and \"%s\", got %s: %s", sfa_status_name(status), word, sfa_status_name(got), sfa_context_error(ctx));
  assert_null(t);
}

static void damaged_json(void **state) {
  (void)state;
#define MODEL(rest) "{\"model\":{\"type\":\"BPE\"," rest "}}"
#define AB "\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[\"a b\"]"
  static const struct {
    const char *json;
    sfa_status status;
    const char *word;
  } cases[] = {
      {"{", SFA_ERROR_FORMAT, "JSON"},
      {"{}", SFA_ERROR_FORMAT, "model"},
      {MODEL("\"vocab\":{}") "", SFA_ERROR_FORMAT, "merges"},
      {MODEL("\"vocab\":{},\"merges\":[]"), SFA_ERROR_FORMAT, "empty"},
      {MODEL("\"vocab\":[],\"merges\":[]"), SFA_ERROR_FORMAT, "vocab"},
      {MODEL("\"vocab\":{\"a\":-1},\"merges\":[]"), SFA_ERROR_FORMAT, "id"},
      {MODEL("\"vocab\":{\"a\":1e300},\"merges\":[]"), SFA_ERROR_FORMAT, "id"},
      {MODEL("\"vocab\":{\"a\":4194304},\"merges\":[]"), SFA_ERROR_FORMAT, "id"},
      {MODEL("\"vocab\":{\"a\":1.5},\"merges\":[]"), SFA_ERROR_FORMAT, "id"},
      {MODEL("\"vocab\":{\"a\":\"x\"},\"merges\":[]"), SFA_ERROR_FORMAT, "id"},
      {MODEL("\"vocab\":{\"a\":1,\"b\":1},\"merges\":[]"), SFA_ERROR_FORMAT, "two tokens"},
      {MODEL("\"vocab\":{\"a\":1,\"a\":2},\"merges\":[]"), SFA_ERROR_FORMAT, "same text"},
      {MODEL("\"vocab\":{\"a\":0,\"b\":1},\"merges\":[\"a b\"]"), SFA_ERROR_FORMAT, "merge 0"},
      {MODEL("\"vocab\":{\"a\":0,\"b\":1},\"merges\":[\"ab\"]"), SFA_ERROR_FORMAT, "merge 0"},
      {MODEL("\"vocab\":{\"a\":0,\"b\":1},\"merges\":[[\"a\"]]"), SFA_ERROR_FORMAT, "merge 0"},
      {MODEL("\"vocab\":{\"a\":0,\"b\":1},\"merges\":[17]"), SFA_ERROR_FORMAT, "merge 0"},
      {MODEL("\"unk_token\":\"x\"," AB), SFA_ERROR_FORMAT, "id"},
      {MODEL("\"end_of_word_suffix\":\"</w>\"," AB), SFA_ERROR_UNSUPPORTED, "suffix"},
      {"{\"model\":{\"type\":\"Unigram\",\"vocab\":[]}}", SFA_ERROR_UNSUPPORTED, "Unigram"},
      {"{\"normalizer\":{\"type\":\"Lowercase\"},\"model\":{" AB "}}", SFA_ERROR_UNSUPPORTED, "Lowercase"},
      {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(\"},\"behavior\":\"Isolated\"},\"model\":{" AB "}}",
       SFA_ERROR_UNSUPPORTED, "pattern"},
      {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\C\"},\"behavior\":\"Isolated\"},\"model\":{" AB "}}",
       SFA_ERROR_UNSUPPORTED, "pattern"},
      {"{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"String\":\"a\"},\"behavior\":\"Odd\"},\"model\":{" AB "}}",
       SFA_ERROR_UNSUPPORTED, "Odd"},
      {"{\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"ByteLevel\"},{\"type\":\"Digits\"}]},\"model\":{" AB "}}",
       SFA_ERROR_UNSUPPORTED, "Digits"},
      {"{\"normalizer\":{\"type\":\"Prepend\",\"prepend\":\"\xff\"},\"model\":{" AB "}}", SFA_ERROR_FORMAT, "UTF-8"},
      {"{\"added_tokens\":[{\"id\":9,\"content\":\"\xc3\"}],\"model\":{" AB "}}", SFA_ERROR_FORMAT, "UTF-8"},
      {"{\"added_tokens\":[{\"id\":9}],\"model\":{" AB "}}", SFA_ERROR_FORMAT, "content"},
      {"{\"added_tokens\":[{\"id\":99999999,\"content\":\"x\"}],\"model\":{" AB "}}", SFA_ERROR_FORMAT, "id"},
      {"{\"decoder\":{\"type\":\"WordPiece\"},\"model\":{" AB "}}", SFA_ERROR_UNSUPPORTED, "WordPiece"},
      {"{\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}}]},\"model\":{" AB "}}",
       SFA_ERROR_FORMAT, "post-processor"},
      {"{\"post_processor\":{\"type\":\"BertProcessing\",\"cls\":[\"x\",77],\"sep\":[\"y\",1]},\"model\":{" AB "}}", SFA_ERROR_FORMAT,
       "77"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    write_whole(in_temp("t.json"), cases[i].json, strlen(cases[i].json));
    refuse(in_temp("t.json"), cases[i].status, cases[i].word);
  }
  static const char good[] = "{\"model\":{" AB "}}"; /* what the damaged ones are near to */
  write_whole(in_temp("t.json"), good, strlen(good));
  sfa_tokenizer *t = open_tokenizer(in_temp("t.json"));
  cJSON *ids = cJSON_Parse("[2,0,2]");
  check_ids(t, "abzaab", 6, 0, ids, "good"); /* z is no token, and there is none for the unknown */
  cJSON_Delete(ids);
  sfa_tokenizer_close(t);
  remove(in_temp("t.json"));
}

/* A token that no merge makes is found all the same, if the file says so and the whole word is that token. */
static void whole_words(void **state) {
  (void)state;
  static const char *const flags[] = {"false", "true"}, *const expected[] = {"[0,1,0]", "[2]"};
  for (int i = 0; i < 2; i++) {
    char json[200];
    int len =
        snprintf(json, sizeof json, "{\"model\":{\"ignore_merges\":%s,\"vocab\":{\"a\":0,\"b\":1,\"aba\":2},\"merges\":[]}}", flags[i]);
    write_whole(in_temp("t.json"), json, (size_t)len);
    sfa_tokenizer *t = open_tokenizer(in_temp("t.json"));
    cJSON *ids = cJSON_Parse(expected[i]);
    check_ids(t, "aba", 3, 0, ids, "whole words");
    cJSON_Delete(ids);
    sfa_tokenizer_close(t);
  }
  remove(in_temp("t.json"));
}

/* A pattern whose matching explodes ends in an error, not in hours. */
static void exploding_pattern(void **state) {
  (void)state;
  static const char json[] =
      "{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(?:a|a|aa)+$\"},\"behavior\":\"Isolated\"},\"model\":{" AB "}}";
  write_whole(in_temp("t.json"), json, strlen(json));
  sfa_tokenizer *t = open_tokenizer(in_temp("t.json"));
  char text[61];
  memset(text, 'a', sizeof text);
  text[60] = 'b';
  int32_t *ids;
  size_t n;
  assert_int_equal(sfa_tokenizer_encode(t, text, sizeof text, 0, &ids, &n), SFA_ERROR_UNSUPPORTED);
  assert_null(ids);
  sfa_tokenizer_close(t);
  remove(in_temp("t.json"));
}

static void put_texts(buffer *b, const char *key, const char *const *texts, size_t n) {
  put_array(b, key, 8, n);
  for (size_t i = 0; i < n; i++)
    put_text(b, texts[i]);
}

/* A byte-level tokenizer of three tokens in GGUF, with one thing changed. */
struct gguf_change {
  const char *model, *pre;
  bool no_merges, wrong_types, duplicate;
  const char *merge;
  uint32_t bos;
};

static void write_gguf(const struct gguf_change *c) {
  buffer b = {0};
  put(&b, "GGUF", 4);
  put_u32(&b, 3);
  put_u64(&b, 0);
  put_u64(&b, c->no_merges ? 5 : 6);
  put_key(&b, "tokenizer.ggml.model", 8, "", 0);
  put_text(&b, c->model ? c->model : "gpt2");
  put_key(&b, "tokenizer.ggml.pre", 8, "", 0);
  put_text(&b, c->pre ? c->pre : "gpt-2");
  put_key(&b, "tokenizer.ggml.bos_token_id", 4, &c->bos, 4);
  put_texts(&b, "tokenizer.ggml.tokens", (const char *const[]){"a", c->duplicate ? "a" : "b", "ab"}, 3);
  put_array(&b, "tokenizer.ggml.token_type", 5, c->wrong_types ? 2 : 3);
  for (int i = 0; i < (c->wrong_types ? 2 : 3); i++)
    put_u32(&b, 1);
  if (!c->no_merges)
    put_texts(&b, "tokenizer.ggml.merges", (const char *const[]){c->merge ? c->merge : "a b"}, 1);
  put_padding(&b, 32);
  buffer_save(&b, in_temp("t.gguf"));
  buffer_free(&b);
}

static void damaged_gguf(void **state) {
  (void)state;
  static const struct {
    struct gguf_change change;
    sfa_status status;
    const char *word;
  } cases[] = {
      {{.model = "bert"}, SFA_ERROR_UNSUPPORTED, "bert"},    {{.model = "llama"}, SFA_ERROR_FORMAT, "scores"},
      {{.pre = "odd"}, SFA_ERROR_UNSUPPORTED, "odd"},        {{.pre = "pt-2"}, SFA_ERROR_UNSUPPORTED, "pt-2"},
      {{.pre = ""}, SFA_ERROR_UNSUPPORTED, "pre-tokenizer"}, {{.pre = " "}, SFA_ERROR_UNSUPPORTED, "pre-tokenizer"},
      {{.no_merges = true}, SFA_ERROR_FORMAT, "merges"},     {{.wrong_types = true}, SFA_ERROR_FORMAT, "types"},
      {{.duplicate = true}, SFA_ERROR_FORMAT, "same text"},  {{.merge = "a c"}, SFA_ERROR_FORMAT, "merge 0"},
      {{.merge = "ab"}, SFA_ERROR_FORMAT, "merges"},         {{.merge = " "}, SFA_ERROR_FORMAT, "merges"},
      {{.merge = "a \xff"}, SFA_ERROR_FORMAT, "merges"},     {{.bos = 3}, SFA_ERROR_FORMAT, "bos_token_id"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    write_gguf(&cases[i].change);
    refuse(in_temp("t.gguf"), cases[i].status, cases[i].word);
  }
  write_gguf(&(struct gguf_change){0});
  sfa_tokenizer *t = open_tokenizer(in_temp("t.gguf"));
  assert_int_equal(sfa_tokenizer_bos(t), 0);
  sfa_tokenizer_close(t);
  remove(in_temp("t.gguf"));
}

/* Cut anywhere: a whole number of tokens is a smaller vocabulary, everything else is an error. */
static void damaged_llama2c(void **state) {
  (void)state;
  size_t bytes;
  char *whole = read_whole(STORIES, &bytes);
  int n_opened = 0;
  for (size_t len = 0; len < bytes; len++) {
    write_whole(in_temp("t.bin"), whole, len);
    sfa_tokenizer *t;
    sfa_status status = sfa_tokenizer_open(ctx, in_temp("t.bin"), &t);
    n_opened += status == SFA_OK;
    assert_true(status == SFA_OK || (status == SFA_ERROR_FORMAT && *sfa_context_error(ctx)));
    sfa_tokenizer_close(t);
  }
  assert_in_range(n_opened, 1, 511);
  free(whole);
  remove(in_temp("t.bin"));
}

/* ---- The whole vocabularies, where they are at hand ------------------------------------------------------------------------ */

static void check_vector(const cJSON *line, void *user) {
  const char *text = text_of(line, "text");
  check_ids(((struct golden *)user)->t, text, strlen(text), SFA_TOKENIZE_PARSE, cJSON_GetObjectItem(line, "ids"),
            ((struct golden *)user)->name);
}

/* llama.cpp's cases: texts between separators, a line of ids for each. */
static int check_cases(const sfa_tokenizer *t, const char *path) {
  char name[600];
  snprintf(name, sizeof name, "%s.inp", path);
  size_t bytes;
  char *texts = read_whole(name, &bytes);
  snprintf(name, sizeof name, "%s.out", path);
  char *lines = read_whole(name, NULL), *rest = lines, *text = texts;
  static const char separator[] = "\n__ggml_vocab_test__\n";
  int n = 0;
  for (bool more = true; more; n++) {
    char *end = strstr(text, separator), *line = strsep(&rest, "\n");
    more = end != NULL;
    size_t len = more ? (size_t)(end - text) : strlen(text);
    assert_non_null(line);
    cJSON *ids = cJSON_CreateArray();
    for (char *word; (word = strsep(&line, " ")) != NULL;)
      if (*word)
        cJSON_AddItemToArray(ids, cJSON_CreateNumber(atoi(word)));
    if (more)
      *end = 0;
    check_ids(t, text, len, 0, ids, path);
    cJSON_Delete(ids);
    text += len + strlen(separator);
  }
  free(texts);
  free(lines);
  return n;
}

/* SFA_DATA_DIR/tokenizers as gathered for the project (the README of tests/golden/tokenizer says from where). */
static void whole_vocabularies(void **state) {
  (void)state;
  const char *data = getenv("SFA_DATA_DIR");
  if (!data) {
    print_message("SKIPPED: SFA_DATA_DIR is not set\n");
    skip();
  }
  char path[512];
  snprintf(path, sizeof path, "%s/tokenizers/gpt2", data);
  sfa_tokenizer *t = open_tokenizer(path);
  snprintf(path, sizeof path, "%s/tokenizers/gpt2/test_vectors.jsonl", data);
  assert_int_equal(each_line(path, check_vector, &(struct golden){t, "gpt2"}), 37);
  sfa_tokenizer_close(t);
  static const char *const vocabularies[][2] = {
      {"gpt-2", "gpt-2"}, {"phi-3", "phi-3"}, {"phi-3", "llama-spm"}}; /* Phi-3's is Llama's and more */
  for (size_t i = 0; i < 3; i++) {
    snprintf(path, sizeof path, "%s/tokenizers/llamacpp_vocab/ggml-vocab-%s.gguf", data, vocabularies[i][0]);
    t = open_tokenizer(path);
    snprintf(path, sizeof path, "%s/tokenizers/llamacpp_vocab/ggml-vocab-%s.gguf", data, vocabularies[i][1]);
    assert_int_equal(check_cases(t, path), 47);
    sfa_tokenizer_close(t);
  }
  char command[2048];
  snprintf(command, sizeof command, "xz -dc '%s/tokenizers/qwen3/tokenizer.json.xz' > '%s'", data, in_temp("tokenizer.json"));
  assert_int_equal(system(command), 0);
  t = open_tokenizer(in_temp("tokenizer.json"));
  snprintf(path, sizeof path, "%s/tokenizers/qwen3/test_vectors.jsonl", data);
  assert_int_equal(each_line(path, check_vector, &(struct golden){t, "qwen3"}), 37);
  snprintf(path, sizeof path, "%s/tokenizers/llamacpp_vocab/ggml-vocab-qwen2.gguf", data);
  assert_int_equal(check_cases(t, path), 47);
  sfa_tokenizer_close(t);
  remove(in_temp("tokenizer.json"));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(golden_ids),   cmocka_unit_test(llama2c_ids),     cmocka_unit_test(specials_of_real_files),
      cmocka_unit_test(files_beside), cmocka_unit_test(long_runs),       cmocka_unit_test(arguments),
      cmocka_unit_test(damaged_json), cmocka_unit_test(whole_words),     cmocka_unit_test(exploding_pattern),
      cmocka_unit_test(damaged_gguf), cmocka_unit_test(damaged_llama2c), cmocka_unit_test(whole_vocabularies),
  };
  return cmocka_run_group_tests_name("tokenizer", tests, group_setup, group_teardown);
}
