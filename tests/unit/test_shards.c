/* Token shards: what the writer took the reader gives, over the borders of blocks and files; a file that was cut, changed or exchanged is a
 * clear error; a writer that fails leaves what was there. */
#include "unit_tools.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "base/hash.h"
#include "file/shards.h"
#include "text_files.h"
#include "weights_files.h"

static sfa_context *ctx;

static int begin(void **state) {
  ctx = new_context(1, SFA_ISA_DEFAULT);
  return temp_begin(state);
}

static int end(void **state) {
  sfa_context_destroy(ctx);
  return temp_end(state);
}

/* ---- Made-up documents --------------------------------------------------------------------------------------------------------------- */

enum { END = 3 };

/* Token i of all, for documents of doc_len tokens with the end token. */
static int32_t token_of(int64_t i, int64_t doc_len, int32_t vocab_size) {
  return i % doc_len == doc_len - 1 ? END : (int32_t)((uint64_t)(i * 7919 + i / 100) % (uint64_t)vocab_size);
}

static sfa_status write_set(const char *path, sfa_shard_settings settings, int64_t n_documents, int64_t doc_len) {
  sfa_shard_writer *writer;
  int32_t *ids = malloc((size_t)doc_len * sizeof *ids);
  assert_non_null(ids);
  sfa_status status = sfa_shard_writer_open(ctx, path, &settings, &writer);
  for (int64_t d = 0; d < n_documents && status == SFA_OK; d++) {
    for (int64_t i = 0; i < doc_len - 1; i++)
      ids[i] = token_of(d * doc_len + i, doc_len, settings.vocab_size);
    int64_t half = (doc_len - 1) / 2; /* in two pieces */
    status = sfa_shard_writer_add(writer, ids, half);
    if (status == SFA_OK)
      status = sfa_shard_writer_add(writer, ids + half, doc_len - 1 - half);
    if (status == SFA_OK)
      status = sfa_shard_writer_end_document(writer);
  }
  if (status == SFA_OK)
    status = sfa_shard_writer_commit(writer);
  sfa_shard_writer_close(writer);
  free(ids);
  return status;
}

static sfa_shards *open_one(const char *path) {
  sfa_shards *shards;
  if (sfa_shards_open(ctx, &path, 1, &shards) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  return shards;
}

static void assert_refused(const char *path, sfa_status expected, const char *part) {
  sfa_shards *shards;
  assert_int_equal(sfa_shards_open(ctx, &path, 1, &shards), expected);
  assert_null(shards);
  if (!strstr(sfa_context_error(ctx), part))
    fail_msg("\"%s\" is not in \"%s\"", part, sfa_context_error(ctx));
}

static void assert_tokens(sfa_shards *shards, int64_t first, int64_t n, int64_t doc_len, int32_t vocab_size) {
  int32_t *ids = malloc((size_t)(n + 1) * sizeof *ids);
  assert_non_null(ids);
  ids[n] = -7;
  if (sfa_shards_read(shards, first, n, ids) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  for (int64_t i = 0; i < n; i++)
    assert_int_equal(ids[i], token_of(first + i, doc_len, vocab_size));
  assert_int_equal(ids[n], -7);
  free(ids);
}

/* ---- The tests ----------------------------------------------------------------------------------------------------------------------- */

/* Both sizes of ids; blocks of 65536, shards of three documents, the last of one. */
static void test_read(void **state) {
  (void)state;
  static const int32_t vocab_sizes[] = {4, 2048, 65536, 65537, 1 << 20};
  enum { DOC_LEN = 30011, N_DOCUMENTS = 10 };
  for (size_t v = 0; v < sizeof vocab_sizes / sizeof *vocab_sizes; v++) {
    sfa_shard_settings settings = {.vocab_size = vocab_sizes[v], .end_token = END, .tokenizer = 77 + v, .shard_len = 3 * DOC_LEN};
    assert_int_equal(write_set(in_temp("read"), settings, N_DOCUMENTS, DOC_LEN), SFA_OK);
    sfa_shards *shards = open_one(in_temp("read"));
    sfa_shards_info info;
    sfa_shards_describe(shards, &info);
    assert_int_equal(info.n_shards, 4);
    assert_int_equal(info.n_documents, N_DOCUMENTS);
    assert_int_equal(info.n_tokens, N_DOCUMENTS * DOC_LEN);
    assert_int_equal(info.vocab_size, vocab_sizes[v]);
    assert_int_equal(info.end_token, END);
    assert_int_equal(info.tokenizer, 77 + v);
    assert_int_equal(sfa_shards_n_tokens(shards), info.n_tokens);
    assert_int_equal(sfa_shards_verify(shards), SFA_OK);
    assert_tokens(shards, 0, info.n_tokens, DOC_LEN, vocab_sizes[v]);
    assert_tokens(shards, 65535, 2, DOC_LEN, vocab_sizes[v]);
    assert_tokens(shards, 3 * DOC_LEN - 1, 2, DOC_LEN, vocab_sizes[v]);
    assert_tokens(shards, 3 * DOC_LEN, 3 * DOC_LEN + 1, DOC_LEN, vocab_sizes[v]);
    assert_tokens(shards, info.n_tokens - 1, 1, DOC_LEN, vocab_sizes[v]);
    assert_tokens(shards, info.n_tokens, 0, DOC_LEN, vocab_sizes[v]);
    int32_t id;
    assert_int_equal(sfa_shards_read(shards, info.n_tokens, 1, &id), SFA_ERROR_ARGUMENT);
    assert_int_equal(sfa_shards_read(shards, -1, 1, &id), SFA_ERROR_ARGUMENT);
    assert_int_equal(sfa_shards_read(shards, 1, INT64_MAX, &id), SFA_ERROR_ARGUMENT);
    sfa_shards_close(shards);
  }
  /* A file alone, and files in another order: rows of their own tokens. */
  char second[128];
  snprintf(second, sizeof second, "%s", in_temp("read_00001.shard"));
  const char *paths[] = {second, in_temp("read")};
  sfa_shards *shards;
  assert_int_equal(sfa_shards_open(ctx, paths, 2, &shards), SFA_OK);
  assert_int_equal(sfa_shards_n_tokens(shards), (3 + N_DOCUMENTS) * DOC_LEN);
  int32_t ids[2];
  assert_int_equal(sfa_shards_read(shards, 3 * DOC_LEN - 1, 2, ids), SFA_OK);
  assert_int_equal(ids[0], END);
  assert_int_equal(ids[1], token_of(0, DOC_LEN, 1 << 20));
  sfa_shards_close(shards);
}

static const sfa_shard_settings small = {.vocab_size = 500, .end_token = END, .tokenizer = 5, .shard_len = 1 << 20};

/* Each length that is not the file's own is refused at once. */
static void test_truncated(void **state) {
  (void)state;
  assert_int_equal(write_set(in_temp("cut"), small, 5, 7), SFA_OK);
  size_t bytes;
  uint8_t *whole = (uint8_t *)read_whole(in_temp("cut_00000.shard"), &bytes);
  uint8_t *longer = calloc(bytes + 8, 1);
  assert_non_null(longer);
  memcpy(longer, whole, bytes);
  for (size_t n = 0; n <= bytes + 8; n++) {
    if (n == bytes)
      continue;
    write_whole(in_temp("short.shard"), (char *)longer, n);
    assert_refused(in_temp("short.shard"), SFA_ERROR_FORMAT, "short.shard");
  }
  free(longer);
  free(whole);
}

/* Each byte of header and list is covered by a checksum; a changed id shows when it is read. */
static void test_changed(void **state) {
  (void)state;
  assert_int_equal(write_set(in_temp("changed"), small, 5, 7), SFA_OK);
  size_t bytes;
  uint8_t *file = (uint8_t *)read_whole(in_temp("changed_00000.shard"), &bytes);
  size_t ids_end = sizeof(sfa_shard_header) + 35 * 2, sums_at = (ids_end + 7) / 8 * 8;
  for (size_t at = 0; at < bytes; at++) {
    file[at] ^= 0x10;
    write_whole(in_temp("bad.shard"), (char *)file, bytes);
    file[at] ^= 0x10;
    const char *path = in_temp("bad.shard");
    sfa_shards *shards;
    sfa_status status = sfa_shards_open(ctx, &path, 1, &shards);
    if (at < sizeof(sfa_shard_header) || at >= sums_at) {
      assert_true(status == SFA_ERROR_FORMAT || status == SFA_ERROR_UNSUPPORTED);
      assert_non_null(strstr(sfa_context_error(ctx), "bad.shard"));
      continue;
    }
    assert_int_equal(status, SFA_OK);
    int32_t ids[35];
    sfa_status expected = at < ids_end ? SFA_ERROR_FORMAT : SFA_OK; /* between lie zeros without a meaning */
    assert_int_equal(sfa_shards_read(shards, 20, 1, ids), expected);
    assert_int_equal(sfa_shards_verify(shards), expected);
    if (expected != SFA_OK)
      assert_non_null(strstr(sfa_context_error(ctx), "block 0 of 1"));
    sfa_shards_close(shards);
  }
  free(file);
}

/* Numbers that cannot be, under checksums that are right. */
static void test_absurd(void **state) {
  (void)state;
  assert_int_equal(write_set(in_temp("absurd"), small, 5, 7), SFA_OK);
  size_t bytes;
  uint8_t *file = (uint8_t *)read_whole(in_temp("absurd_00000.shard"), &bytes);
  sfa_shard_header right, h;
  memcpy(&right, file, sizeof right);
#define CASE(member, value)                                                                                                                \
  {                                                                                                                                        \
    h = right;                                                                                                                             \
    h.member = value;                                                                                                                      \
    h.checksum = sfa_hash_bytes(0, &h, sizeof h - sizeof h.checksum);                                                                      \
    memcpy(file, &h, sizeof h);                                                                                                            \
    write_whole(in_temp("absurd.shard"), (char *)file, bytes);                                                                             \
    const char *path = in_temp("absurd.shard");                                                                                            \
    sfa_shards *shards;                                                                                                                    \
    assert_int_not_equal(sfa_shards_open(ctx, &path, 1, &shards), SFA_OK);                                                                 \
    assert_non_null(strstr(sfa_context_error(ctx), "absurd.shard"));                                                                       \
  }
  CASE(n_tokens, 0)
  CASE(n_tokens, UINT64_MAX)
  CASE(n_tokens, UINT64_MAX / 2 + 1)
  CASE(n_tokens, 36 + 100)
  CASE(n_documents, 0)
  CASE(n_documents, 36)
  CASE(vocab_size, 0)
  CASE(vocab_size, 0x80000000u)
  CASE(vocab_size, 70000) /* wants ids of 4 bytes */
  CASE(end_token, 500)
  CASE(id_bytes, 4)
  CASE(id_bytes, 0)
  CASE(version, 2)
  CASE(endian, 0x04030201)
  CASE(magic[0], 'X')
  CASE(block_sums, 1)
#undef CASE
  /* An id outside the vocabulary, with all checksums right. */
  h = right;
  uint16_t id = 500;
  memcpy(file + sizeof h + 2 * 30, &id, 2);
  uint64_t sum = sfa_hash_bytes(0, file + sizeof h, 35 * 2);
  memcpy(file + bytes - 8, &sum, 8);
  h.block_sums = sfa_hash_bytes(0, &sum, 8);
  h.checksum = sfa_hash_bytes(0, &h, sizeof h - sizeof h.checksum);
  memcpy(file, &h, sizeof h);
  write_whole(in_temp("absurd.shard"), (char *)file, bytes);
  sfa_shards *shards = open_one(in_temp("absurd.shard"));
  int32_t ids[35];
  assert_int_equal(sfa_shards_read(shards, 0, 30, ids), SFA_OK);
  assert_int_equal(sfa_shards_read(shards, 0, 31, ids), SFA_ERROR_FORMAT);
  assert_non_null(strstr(sfa_context_error(ctx), "token id 500"));
  assert_int_equal(sfa_shards_verify(shards), SFA_ERROR_FORMAT);
  sfa_shards_close(shards);
  free(file);
}

/* A set whose parts are missing or of another set; paths that lead nowhere; shards of two tokenizers. */
static void test_sets(void **state) {
  (void)state;
  sfa_shard_settings settings = small;
  settings.shard_len = 7;
  assert_int_equal(write_set(in_temp("set"), settings, 3, 7), SFA_OK);
  assert_int_equal(write_set(in_temp("other"), settings, 3, 8), SFA_OK);
  assert_int_equal(rename(in_temp("other_00001.shard"), in_temp("set_00001.shard")), 0);
  assert_refused(in_temp("set"), SFA_ERROR_FORMAT, "set_00001.shard: does not follow");
  assert_int_equal(unlink(in_temp("set_00001.shard")), 0);
  assert_refused(in_temp("set"), SFA_ERROR_IO, "set_00001.shard");
  assert_int_equal(rename(in_temp("set_00002.shard"), in_temp("set_00000.shard")), 0);
  assert_refused(in_temp("set"), SFA_ERROR_FORMAT, "not the first of a set");
  assert_refused(in_temp("nothing"), SFA_ERROR_IO, "nothing_00000.shard");
  assert_refused(temp_dir, SFA_ERROR_IO, temp_dir);

  settings.tokenizer = 6;
  assert_int_equal(write_set(in_temp("six"), settings, 1, 7), SFA_OK);
  assert_int_equal(write_set(in_temp("five"), small, 1, 7), SFA_OK);
  const char *paths[] = {in_temp("five"), in_temp("six")};
  sfa_shards *shards;
  assert_int_equal(sfa_shards_open(ctx, paths, 2, &shards), SFA_ERROR_ARGUMENT);
  assert_non_null(strstr(sfa_context_error(ctx), "different tokenizers"));
  assert_int_equal(sfa_shards_open(ctx, paths, 0, &shards), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_shards_open(ctx, NULL, 1, &shards), SFA_ERROR_ARGUMENT);
  paths[1] = NULL;
  assert_int_equal(sfa_shards_open(ctx, paths, 2, &shards), SFA_ERROR_ARGUMENT);
  assert_null(shards);
  sfa_shards_close(NULL);
  sfa_shard_writer_close(NULL);
}

/* What fails before the commit leaves the files that were there, and no others. */
static void test_failed_writer(void **state) {
  (void)state;
  assert_int_equal(write_set(in_temp("kept"), small, 5, 7), SFA_OK);
  size_t bytes, now;
  char *before = read_whole(in_temp("kept_00000.shard"), &bytes), *after;
  sfa_shard_settings settings = small;

  settings.vocab_size = 4; /* ids of 5 and more are too large for it */
  sfa_shard_writer *writer;
  assert_int_equal(sfa_shard_writer_open(ctx, in_temp("kept"), &settings, &writer), SFA_OK);
  assert_int_equal(sfa_shard_writer_commit(writer), SFA_ERROR_ARGUMENT); /* no document yet */
  assert_int_equal(sfa_shard_writer_add(writer, &(int32_t){4}, 1), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_shard_writer_add(writer, &(int32_t){-1}, 1), SFA_ERROR_ARGUMENT);
  sfa_shard_writer_close(writer);

  struct rlimit old, none = {4096, 4096}; /* a disk without room */
  assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
  none.rlim_max = old.rlim_max;
  signal(SIGXFSZ, SIG_IGN);
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &none), 0);
  sfa_status status = write_set(in_temp("kept"), small, 5000, 7);
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
  assert_int_equal(status, SFA_ERROR_IO);
  assert_non_null(strstr(sfa_context_error(ctx), "make room"));

  assert_int_equal(sfa_shard_writer_open(ctx, in_temp("no/such/folder"), &small, &writer), SFA_ERROR_IO);
  assert_null(writer);
  settings = small;
  settings.end_token = 500;
  assert_int_equal(sfa_shard_writer_open(ctx, in_temp("kept"), &settings, &writer), SFA_ERROR_ARGUMENT);

  struct stat info;
  assert_int_not_equal(stat(in_temp("kept_00000.shard.tmp"), &info), 0);
  after = read_whole(in_temp("kept_00000.shard"), &now);
  assert_int_equal(now, bytes);
  assert_memory_equal(after, before, bytes);
  free(before);
  free(after);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_read),   cmocka_unit_test(test_truncated), cmocka_unit_test(test_changed),
      cmocka_unit_test(test_absurd), cmocka_unit_test(test_sets),      cmocka_unit_test(test_failed_writer),
  };
  return cmocka_run_group_tests(tests, begin, end);
}
