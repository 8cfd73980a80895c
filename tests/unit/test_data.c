/* Texts to documents to shards, and texts to a tokenizer: each form of a text gives the same documents; what is damaged is a clear error;
 * the number of threads changes nothing; merges are those of a reference. */
#include <dirent.h>
#include <sys/stat.h>

#include "unit_tools.h"

#include <cjson/cJSON.h>
#include <sfa/data.h>

#include "file/text_read.h"
#include "text/bpe_train.h"
#include "text/text_step.h"
#include "text_files.h"
#include "weights_files.h"

#define TEXTS SFA_TEST_DATA "/golden/texts/"
#define BPE SFA_TEST_DATA "/golden/bpe_train/"

static sfa_context *ctx;

static int begin(void **state) {
  ctx = new_context(1, SFA_ISA_DEFAULT);
  return temp_begin(state);
}

static int end(void **state) {
  sfa_context_destroy(ctx);
  return temp_end(state);
}

/* ---- Documents --------------------------------------------------------------------------------------------------------------------- */

static sfa_text_inputs inputs_of(const char *const *paths, int64_t n) {
  return (sfa_text_inputs){.struct_size = sizeof(sfa_text_inputs), .paths = paths, .n_paths = n};
}

/* All documents, each with a 0x01 behind it and a 0x02 between pieces. */
static sfa_status read_all(const sfa_text_inputs *inputs, size_t piece_len, buffer *out) {
  sfa_text_reader *reader;
  sfa_text_piece piece;
  *out = (buffer){0};
  sfa_status status = sfa_text_reader_open(ctx, inputs, piece_len, &reader);
  while (status == SFA_OK && (status = sfa_text_reader_next(reader, &piece)) == SFA_OK && piece.text) {
    assert_true(piece.bytes <= piece_len);
    put(out, piece.text, piece.bytes);
    put(out, piece.ends ? "\1" : "\2", 1);
  }
  int64_t done, total;
  if (status == SFA_OK) {
    sfa_text_reader_progress(reader, &done, &total);
    assert_int_equal(done, total);
  }
  sfa_text_reader_close(reader);
  put(out, "", 1);
  return status;
}

static void assert_documents(const char *path, const char *separator, const char *expected) {
  sfa_text_inputs inputs = inputs_of(&path, 1);
  inputs.separator = separator;
  buffer got;
  if (read_all(&inputs, SFA_TEXT_PIECE_BYTES, &got) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  assert_string_equal((char *)got.data, expected);
  buffer_free(&got);
}

static void assert_error(const char *path, sfa_status expected, const char *part) {
  sfa_text_inputs inputs = inputs_of(&path, 1);
  buffer got;
  assert_int_equal(read_all(&inputs, SFA_TEXT_PIECE_BYTES, &got), expected);
  if (!strstr(sfa_context_error(ctx), part))
    fail_msg("\"%s\" is not in \"%s\"", part, sfa_context_error(ctx));
  buffer_free(&got);
}

#define DOCUMENTS "First document.\n\1Second, caf\xc3\xa9.\n\n\1Third <|endoftext|> is not alone\n<|endoftext|>x\n\1last, without an end\1"

static bool has_library(const char *path) {
  sfa_text_inputs inputs = inputs_of(&path, 1);
  buffer got;
  sfa_status status = read_all(&inputs, SFA_TEXT_PIECE_BYTES, &got);
  buffer_free(&got);
  return status != SFA_ERROR_UNSUPPORTED;
}

static void forms(void **state) {
  (void)state;
  assert_documents(TEXTS "docs.txt", NULL, DOCUMENTS);
  assert_documents(TEXTS "docs.jsonl", NULL, DOCUMENTS);
  if (has_library(TEXTS "docs.txt.bz2"))
    assert_documents(TEXTS "docs.txt.bz2", NULL, DOCUMENTS);
  if (has_library(TEXTS "docs.txt.xz"))
    assert_documents(TEXTS "docs.txt.xz", NULL, DOCUMENTS);
  static const char two[] = "a\nSTOP\n\nSTOP\nb"; /* a document may be an empty line */
  write_whole(in_temp("two.txt"), two, strlen(two));
  assert_documents(in_temp("two.txt"), "STOP", "a\n\1\n\1b\1");
  assert_documents(in_temp("two.txt"), "", "a\nSTOP\n\nSTOP\nb\1");
  write_whole(in_temp("ends.txt"), "STOP\na\nSTOP", 11);
  assert_documents(in_temp("ends.txt"), "STOP", "a\n\1");
  write_whole(in_temp("empty.txt"), "", 0);
  assert_documents(in_temp("empty.txt"), NULL, "");
}

static void folders(void **state) {
  (void)state;
  assert_int_equal(mkdir(in_temp("folder"), 0777) | mkdir(in_temp("folder/inner"), 0777), 0);
  write_whole(in_temp("folder/b.txt"), "b", 1);
  write_whole(in_temp("folder/a.MD"), "a", 1);
  write_whole(in_temp("folder/.hidden.txt"), "no", 2);
  write_whole(in_temp("folder/table.tsv"), "no", 2);
  write_whole(in_temp("folder/c.jsonl"), "{\"text\":\"c\"}\n", 13);
  write_whole(in_temp("folder/inner/z.txt"), "z", 1);
  assert_documents(in_temp("folder"), NULL, "a\1b\1c\1z\1");
  assert_error(in_temp("nowhere"), SFA_ERROR_IO, "nowhere");
  remove_tree(in_temp("folder/inner"));
  assert_int_equal(mkdir(in_temp("folder/inner"), 0777), 0);
  assert_error(in_temp("folder/inner"), SFA_ERROR_IO, "holds no text");
}

/* However small the pieces: together they are the documents, and none ends within a character. */
static void pieces(void **state) {
  (void)state;
  static const char *const paths[] = {TEXTS "docs.txt", TEXTS "docs.jsonl"};
  for (size_t len = 16; len < 64; len++)
    for (int form = 0; form < 2; form++) {
      sfa_text_inputs inputs = inputs_of(&paths[form], 1);
      buffer got;
      assert_int_equal(read_all(&inputs, len, &got), SFA_OK);
      size_t n = 0, cuts = 0;
      for (size_t i = 0; i < got.bytes; i++) {
        bool cut = got.data[i] == 2;
        cuts += cut;
        if (cut)
          assert_true((got.data[i + 1] & 0xc0) != 0x80);
        else
          got.data[n++] = got.data[i];
      }
      assert_string_equal((char *)got.data, DOCUMENTS);
      assert_true(len >= 47 || cuts > 0); /* the longest document has 47 bytes */
      buffer_free(&got);
    }
}

/* Cut at any byte, a compressed file is an error, and never a shorter text. */
static void damaged_files(void **state) {
  (void)state;
  static const char *const names[] = {"docs.txt.bz2", "docs.txt.xz"};
  for (int i = 0; i < 2; i++) {
    char path[256];
    size_t bytes;
    snprintf(path, sizeof path, TEXTS "%s", names[i]);
    if (!has_library(path))
      continue;
    char *whole = read_whole(path, &bytes);
    const char *first_end = memmem(whole + 6, bytes - 6, whole, 6); /* where the second of the joined files begins */
    for (size_t n = 6; n < bytes; n++) {
      write_whole(in_temp("cut"), whole, n);
      if (whole + n != first_end)
        assert_error(in_temp("cut"), SFA_ERROR_FORMAT, "damaged or cut short");
    }
    whole[bytes / 4] ^= 0x55;
    write_whole(in_temp("cut"), whole, bytes);
    assert_error(in_temp("cut"), SFA_ERROR_FORMAT, "damaged or cut short");
    free(whole);
  }
  static const struct {
    const char *row, *error;
  } rows[] = {{"{\"text\": \"good\"}\n{\"text\": \"bad", "line 2"},
              {"{\"text\": 7}", "no text \"text\""},
              {"{\"body\": \"b\"}", "no text \"text\""},
              {"[1]", "not an object"}};
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
    write_whole(in_temp("bad.jsonl"), rows[i].row, strlen(rows[i].row));
    assert_error(in_temp("bad.jsonl"), SFA_ERROR_FORMAT, rows[i].error);
  }
  write_whole(in_temp("zero.txt"), "a text\0no text", 14);
  assert_error(in_temp("zero.txt"), SFA_ERROR_FORMAT, "no text: it has a byte 0");
  const char *path = TEXTS "docs.txt";
  sfa_text_inputs inputs = inputs_of(&path, 1);
  buffer got;
  inputs.separator = "two\nlines";
  assert_int_equal(read_all(&inputs, 64, &got), SFA_ERROR_ARGUMENT);
  buffer_free(&got);
  inputs = inputs_of(&path, 0);
  assert_int_equal(read_all(&inputs, 64, &got), SFA_ERROR_ARGUMENT);
  buffer_free(&got);
}

/* ---- The tokenizer ------------------------------------------------------------------------------------------------------------------- */

static void train(sfa_context *with, const char *input, const char *folder, int32_t vocab_size, int64_t memory_bytes,
                  sfa_tokenizer_train_result *result) {
  sfa_text_inputs inputs = inputs_of(&input, 1);
  inputs.format = SFA_TEXT_PLAIN;
  sfa_tokenizer_train_options options = {
      .struct_size = sizeof options, .vocab_size = vocab_size, .min_count = 1, .memory_bytes = memory_bytes};
  if (sfa_tokenizer_train(with, &inputs, &options, folder, result) != SFA_OK)
    fail_msg("%s", sfa_context_error(with));
}

/* The merges and the ids of the reference, one by one. */
static void reference_merges(void **state) {
  (void)state;
  sfa_tokenizer_train_result result;
  train(ctx, BPE "corpus.en", in_temp("tokenizer"), 500, 0, &result);
  assert_int_equal(result.vocab_size, 500);
  char *ours = read_whole(in_temp("tokenizer/tokenizer.json"), NULL), *lines = read_whole(BPE "merges.txt", NULL), *rest = lines;
  char *reference = read_whole(BPE "vocab.json", NULL);
  cJSON *root = cJSON_Parse(ours), *vocab = cJSON_Parse(reference);
  const cJSON *model = cJSON_GetObjectItemCaseSensitive(root, "model"), *item;
  int n = 0;
  cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(model, "merges")) {
    const char *line = strsep(&rest, "\n");
    char merge[256];
    snprintf(merge, sizeof merge, "%s %s", cJSON_GetArrayItem(item, 0)->valuestring, cJSON_GetArrayItem(item, 1)->valuestring);
    assert_non_null(line);
    assert_string_equal(merge, line);
    n++;
  }
  assert_int_equal(n, 243);
  assert_int_equal(cJSON_GetArraySize(vocab), 500);
  cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(model, "vocab")) {
    assert_int_equal(cJSON_GetObjectItemCaseSensitive(vocab, item->string)->valueint, item->valueint);
  }
  cJSON_Delete(root);
  cJSON_Delete(vocab);
  free(ours);
  free(reference);
  free(lines);
}

/* What it wrote our own loader reads; every byte comes back, and the training counted the tokens that encoding makes. */
static void round_trip(void **state) {
  (void)state;
  sfa_tokenizer_train_result result;
  sfa_tokenizer *t;
  train(ctx, BPE "corpus.en", in_temp("tokenizer"), 400, 0, &result);
  if (sfa_tokenizer_open(ctx, in_temp("tokenizer"), &t) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  assert_int_equal(sfa_tokenizer_vocab_size(t), 400);
  assert_int_equal(sfa_tokenizer_bos(t), 0);
  assert_true(sfa_tokenizer_is_end(t, 0));
  size_t bytes, n_ids;
  char *text = read_whole(BPE "corpus.en", &bytes);
  int32_t *ids;
  assert_int_equal(sfa_tokenizer_encode(t, text, bytes, 0, &ids, &n_ids), SFA_OK);
  assert_int_equal(n_ids, result.all.n_tokens);
  size_t at = 0;
  for (size_t i = 0; i < n_ids; i++) {
    char piece[64];
    size_t n = sfa_tokenizer_decode(t, -1, ids[i], 0, piece, sizeof piece);
    assert_true(n <= bytes - at);
    assert_memory_equal(piece, text + at, n);
    at += n;
  }
  assert_int_equal(at, bytes);
  sfa_free_ids(ctx, ids);
  free(text);
  sfa_tokenizer_close(t);
}

/* Of words "low" x 5, "lower" x 2, "newest" x 6, "widest" x 3, the merges that a pencil finds. */
static void small_merges(void **state) {
  (void)state;
  static const struct {
    const char *word;
    int64_t n;
  } words[] = {{"low", 5}, {"lower", 2}, {"newest", 6}, {"widest", 3}, {"aaa", 1}};
  static const char *const expected[] = {"st", "est", "ow", "low", "west", "ne", "newest", "wi", "widest", "we", "lower", "aa", "aaa"};
  sfa_word_counts counts = {0};
  for (size_t i = 0; i < sizeof words / sizeof *words; i++)
    assert_int_equal(sfa_word_counts_add(ctx, &counts, (const uint8_t *)words[i].word, strlen(words[i].word), words[i].n), SFA_OK);
  sfa_bpe_vocabulary v;
  assert_int_equal(sfa_bpe_train(ctx, &counts, 256 + 6, 1, &v), SFA_OK);
  assert_int_equal(v.n_merges, 6);
  for (size_t i = 0; i < v.n_merges; i++) {
    const sfa_bpe_token *token = &v.tokens[256 + i];
    assert_int_equal(token->len, strlen(expected[i]));
    assert_memory_equal(v.texts.data + token->at, expected[i], token->len);
  }
  sfa_bpe_vocabulary_free(ctx, &v);
  /* Until nothing is left: every word is a token, and "aaa", whose pair overlaps itself, two merges. */
  assert_int_equal(sfa_bpe_train(ctx, &counts, 1000, 1, &v), SFA_OK);
  assert_int_equal(v.n_text_tokens, 5 + 2 + 6 + 3 + 1);
  sfa_bpe_vocabulary_free(ctx, &v);
  assert_int_equal(sfa_bpe_train(ctx, &counts, 1000, 3, &v), SFA_OK); /* not below three: "er" and "aa" stay apart */
  assert_int_equal(v.n_text_tokens, 5 + 2 * 3 + 6 + 3 + 3);
  sfa_bpe_vocabulary_free(ctx, &v);
  assert_int_equal(sfa_word_counts_prune(ctx, &counts), SFA_OK);
  assert_int_equal(counts.words.count, 4);
  sfa_word_counts_free(ctx, &counts);
}

static void train_arguments(void **state) {
  (void)state;
  const char *path = TEXTS "docs.txt";
  const char *twice[] = {"<s>", "<s>"};
  sfa_text_inputs inputs = inputs_of(&path, 1);
  sfa_tokenizer_train_result result;
  sfa_tokenizer_train_options options = {.struct_size = sizeof options, .vocab_size = 256};
  assert_int_equal(sfa_tokenizer_train(ctx, &inputs, &options, in_temp("tokenizer"), &result), SFA_ERROR_ARGUMENT);
  options.vocab_size = 300;
  options.special = twice;
  options.n_special = 2;
  assert_int_equal(sfa_tokenizer_train(ctx, &inputs, &options, in_temp("tokenizer"), &result), SFA_ERROR_ARGUMENT);
  options.n_special = 1;
  options.vocab_size = 1000; /* more than the text has pairs for */
  assert_int_equal(sfa_tokenizer_train(ctx, &inputs, &options, in_temp("tokenizer"), &result), SFA_OK);
  assert_true(result.vocab_size < 1000 && result.vocab_size > 257);
  write_whole(in_temp("empty.txt"), "", 0);
  path = in_temp("empty.txt");
  assert_int_equal(sfa_tokenizer_train(ctx, &inputs, &options, in_temp("tokenizer"), &result), SFA_ERROR_ARGUMENT);
}

/* ---- Shards ----------------------------------------------------------------------------------------------------- */

static sfa_status write_shards(sfa_context *with, const char *input, const sfa_data_options *changes, sfa_data_result *result) {
  sfa_tokenizer *t;
  assert_int_equal(sfa_tokenizer_open(with, in_temp("tokenizer"), &t), SFA_OK);
  sfa_text_inputs inputs = inputs_of(&input, 1);
  sfa_data_options options = *changes;
  options.struct_size = sizeof options;
  sfa_status status = sfa_data_write(t, &inputs, &options, result);
  sfa_tokenizer_close(t);
  return status;
}

/* The text of all tokens, end tokens as \1. */
static void assert_shard_text(const char *set, const char *expected) {
  sfa_shards *shards;
  sfa_tokenizer *t;
  assert_int_equal(sfa_tokenizer_open(ctx, in_temp("tokenizer"), &t), SFA_OK);
  if (sfa_shards_open(ctx, &set, 1, &shards) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  assert_int_equal(sfa_shards_verify(shards), SFA_OK);
  sfa_shards_info info;
  sfa_shards_describe(shards, &info);
  assert_int_equal(info.tokenizer, sfa_tokenizer_fingerprint(t));
  buffer got = {0};
  for (int64_t i = 0; i < info.n_tokens; i++) {
    int32_t id;
    char piece[64];
    assert_int_equal(sfa_shards_read(shards, i, 1, &id), SFA_OK);
    if (id == info.end_token)
      put(&got, "\1", 1);
    else
      put(&got, piece, sfa_tokenizer_decode(t, -1, id, 0, piece, sizeof piece));
  }
  put(&got, "", 1);
  assert_string_equal((char *)got.data, expected);
  buffer_free(&got);
  sfa_shards_close(shards);
  sfa_tokenizer_close(t);
}

static void shards_of_texts(void **state) {
  (void)state;
  sfa_tokenizer_train_result trained;
  sfa_data_result result;
  train(ctx, BPE "corpus.en", in_temp("tokenizer"), 300, 0, &trained);
  char set[128], held[128];
  snprintf(set, sizeof set, "%s", in_temp("set"));
  snprintf(held, sizeof held, "%s", in_temp("held"));
  sfa_data_options options = {.train = set, .shard_len = 1};
  assert_int_equal(write_shards(ctx, TEXTS "docs.txt", &options, &result), SFA_OK);
  assert_int_equal(result.all.n_documents, 4);
  assert_shard_text(set, DOCUMENTS); /* a separator inside a line is text, not the end token */
  options.valid = held;
  options.valid_share = 0.5;
  options.seed = 1;
  assert_int_equal(write_shards(ctx, TEXTS "docs.txt", &options, &result), SFA_OK);
  assert_true(result.n_valid_documents > 0 && result.n_valid_documents < 4 && result.n_valid_tokens > 0);
  options.valid_share = 1e-9;
  assert_int_equal(write_shards(ctx, TEXTS "docs.txt", &options, &result), SFA_ERROR_ARGUMENT);
  assert_non_null(strstr(sfa_context_error(ctx), "holds out 0 of 4"));
  options.valid = NULL;
  options.end_token = "<nothing>";
  assert_int_equal(write_shards(ctx, TEXTS "docs.txt", &options, &result), SFA_ERROR_ARGUMENT);
  options.end_token = NULL;
  write_whole(in_temp("bad.jsonl"), "{", 1);
  assert_int_equal(write_shards(ctx, in_temp("bad.jsonl"), &options, &result), SFA_ERROR_FORMAT);
  assert_non_null(strstr(sfa_context_error(ctx), "bad.jsonl, line 1"));
}

static int stop_at_once(void *user, const sfa_data_progress *at) {
  *(sfa_data_progress *)user = *at;
  return 1;
}

/* Many batches of many documents, some of several pieces: the same files with one thread and with three, and with more memory. */
static void threads_change_nothing(void **state) {
  (void)state;
  enum { COPIES = 30 };
  size_t bytes;
  char *corpus = read_whole(BPE "corpus.en", &bytes);
  FILE *file = fopen(in_temp("large.txt"), "wb");
  assert_non_null(file);
  for (int i = 0; i < COPIES; i++) { /* the lengths differ; the first is cut into pieces */
    for (int j = 0; j < (i ? 1 : 10); j++)
      fwrite(corpus + (size_t)i * 100, 1, bytes - (size_t)i * 1000, file);
    fputs("\n<|endoftext|>\n", file);
  }
  assert_int_equal(fclose(file), 0);
  free(corpus);
  sfa_tokenizer_train_result trained[2];
  char *json[2], *shard[2];
  size_t json_bytes[2], shard_bytes[2];
  for (int i = 0; i < 2; i++) {
    sfa_context *with = new_context(i ? 3 : 1, SFA_ISA_DEFAULT);
    train(with, in_temp("large.txt"), in_temp("tokenizer"), 600, i ? 0 : 1 << 20, &trained[i]);
    json[i] = read_whole(in_temp("tokenizer/tokenizer.json"), &json_bytes[i]);
    sfa_data_result result;
    char set[128];
    snprintf(set, sizeof set, "%s", in_temp("large"));
    sfa_data_options options = {.train = set, .memory_bytes = i ? 0 : 1};
    assert_int_equal(write_shards(with, in_temp("large.txt"), &options, &result), SFA_OK);
    assert_int_equal(result.all.n_documents, COPIES);
    shard[i] = read_whole(in_temp("large_00000.shard"), &shard_bytes[i]);
    sfa_data_progress seen = {0};
    options.progress = stop_at_once;
    options.progress_user = &seen;
    assert_int_equal(write_shards(with, in_temp("large.txt"), &options, &result), SFA_ERROR_CANCELLED);
    assert_true(seen.n_documents > 0 && seen.n_tokens > 0 && seen.bytes_total > 0);
    sfa_context_destroy(with);
  }
  assert_int_equal(json_bytes[0], json_bytes[1]);
  assert_memory_equal(json[0], json[1], json_bytes[0]);
  assert_int_equal(shard_bytes[0], shard_bytes[1]);
  assert_memory_equal(shard[0], shard[1], shard_bytes[0]);
  for (int i = 0; i < 2; i++) {
    free(json[i]);
    free(shard[i]);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(forms),           cmocka_unit_test(folders),
      cmocka_unit_test(pieces),          cmocka_unit_test(damaged_files),
      cmocka_unit_test(small_merges),    cmocka_unit_test(reference_merges),
      cmocka_unit_test(round_trip),      cmocka_unit_test(train_arguments),
      cmocka_unit_test(shards_of_texts), cmocka_unit_test(threads_change_nothing),
  };
  return cmocka_run_group_tests(tests, begin, end);
}
