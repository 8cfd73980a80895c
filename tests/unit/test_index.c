/* The document index: what a session saves another one reads, bit for bit; and whatever happens to the file or to the process that writes
 * it, the answer is the old state, the new state or a clear error. `test_index kills N DIR` kills a writer N times instead, over a file in
 * that folder. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "file/index_file.h"
#include "unit_tools.h"
#include "weights_files.h"

#define MODEL SFA_TEST_DATA "/golden/models/stories260K/stories260K.bin"

static sfa_context *ctx;

static int begin(void **state) {
  ctx = new_context(1, SFA_ISA_DEFAULT);
  return temp_begin(state);
}

static int end(void **state) {
  sfa_context_destroy(ctx);
  return temp_end(state);
}

/* ---- A file without a model ---------------------------------------------------------------------------------------------------------- */

/* Two layers of made-up pages: byte i of a token's row in a page tells layer, token and i. Sources every 50 tokens. */
enum { VOCAB = 1000, N_LAYERS = 2, ROW = 8, MOST = 3000, SOURCE_LEN = 50 };
static const sfa_index_layer_entry layers[N_LAYERS] = {{4, 4, SFA_I8, SFA_BF16, 64 + 64 * ROW}, {0, 0, SFA_BF16, SFA_I8, 64 + 128 * ROW}};
static const sfa_index_settings settings = {.model = 0x123456789abcdef0,
                                            .tokenizer = 7,
                                            .n_layers = N_LAYERS,
                                            .n_kv_heads = 1,
                                            .head_dim = 8,
                                            .head_dim_v = 8,
                                            .weights = 1,
                                            .vocab_size = VOCAB,
                                            .layers = layers,
                                            .name = "made-up model"};

static int32_t token_of(int64_t i) { return (int32_t)((i * 7919 + i / 100) % VOCAB); }

/* As sfa_cache_page_save does: rows of tokens beyond n_tokens are 0. */
static void fill_page(int32_t layer, int64_t page, int64_t n_tokens, uint8_t *image) {
  size_t row = (layers[layer].page_bytes - 64) / 64;
  memset(image, 0, layers[layer].page_bytes);
  for (int64_t t = page * 64; t < n_tokens && t < (page + 1) * 64; t++)
    for (size_t i = 0; i < row; i++)
      image[64 + (size_t)(t % 64) * row + i] = (uint8_t)((size_t)layer * 101 + (size_t)t * 13 + i);
}

static sfa_status give_page(void *user, int32_t layer, int64_t page, void *image) {
  fill_page(layer, page, *(const int64_t *)user, image);
  return SFA_OK;
}

static sfa_status commit_with(sfa_index_writer *writer, const sfa_index_settings *s, int64_t n_tokens) {
  static int32_t tokens[MOST];
  static sfa_index_source sources[MOST / SOURCE_LEN];
  static char names[MOST / SOURCE_LEN][32];
  int64_t n_sources = n_tokens / SOURCE_LEN;
  for (int64_t i = 0; i < n_tokens; i++)
    tokens[i] = token_of(i);
  for (int64_t i = 0; i < n_sources; i++) {
    snprintf(names[i], sizeof names[i], "part %lld", (long long)i);
    sources[i] = (sfa_index_source){names[i], i * 300, 299, i * SOURCE_LEN, SOURCE_LEN};
  }
  sfa_index_state state = {.settings = s,
                           .tokens = tokens,
                           .n_tokens = n_tokens,
                           .sources = sources,
                           .n_sources = n_sources,
                           .page = give_page,
                           .user = &n_tokens};
  return sfa_index_writer_commit(writer, &state);
}

/* The state of n_tokens becomes that of the file. */
static sfa_status commit_to(const char *path, int64_t n_tokens) {
  sfa_index_writer *writer;
  sfa_status status = sfa_index_writer_open(ctx, path, &writer);
  if (status == SFA_OK) {
    status = commit_with(writer, &settings, n_tokens);
    sfa_index_writer_close(writer);
  }
  return status;
}

/* Everything that an open index says is what a state of its length holds. */
static void check_content(const sfa_index *index) {
  sfa_index_info info;
  sfa_index_source source;
  static uint8_t image[64 + 128 * ROW];
  sfa_index_describe(index, &info);
  assert_string_equal(info.model_name, "made-up model");
  assert_int_equal(info.n_sources, info.n_tokens / SOURCE_LEN);
  for (int64_t i = 0; i < info.n_tokens; i++)
    assert_int_equal(sfa_index_tokens(index)[i], token_of(i));
  for (int64_t i = 0; i < info.n_sources; i++) {
    char name[32];
    snprintf(name, sizeof name, "part %lld", (long long)i);
    assert_true(sfa_index_source_at(index, i, &source));
    assert_string_equal(source.name, name);
    assert_true(source.first_byte == i * 300 && source.n_bytes == 299);
    assert_true(source.first_token == i * SOURCE_LEN && source.n_tokens == SOURCE_LEN);
  }
  assert_false(sfa_index_source_at(index, info.n_sources, &source) || sfa_index_source_at(index, -1, &source));
  for (int32_t layer = 0; layer < N_LAYERS; layer++)
    for (int64_t p = 0; p < index->n_pages; p++) {
      fill_page(layer, p, info.n_tokens, image);
      assert_int_equal((uintptr_t)index->pages[layer * index->n_pages + p] % 64, 0);
      assert_memory_equal(index->pages[layer * index->n_pages + p], image, layers[layer].page_bytes);
    }
}

static sfa_index *open_good(const char *path) {
  sfa_index *index;
  if (sfa_index_open(ctx, path, &index) != SFA_OK || sfa_index_verify(index) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  return index;
}

static void expect_state(const char *path, int64_t n_tokens) {
  sfa_index *index = open_good(path);
  assert_int_equal(index->n_tokens, n_tokens);
  check_content(index);
  sfa_index_close(index);
}

/* Opening fails, names the file, and gives nothing. */
static void expect_refusal(const char *path, sfa_status wanted, const char *text) {
  sfa_index *index;
  sfa_status status = sfa_index_open(ctx, path, &index);
  assert_null(index);
  if (status != wanted || !strstr(sfa_context_error(ctx), path) || !strstr(sfa_context_error(ctx), text))
    fail_msg("status %d, not %d with \"%s\": %s", status, wanted, text, sfa_context_error(ctx));
}

static buffer load(const char *path) {
  buffer b = {0};
  char block[1 << 16];
  FILE *file = fopen(path, "rb");
  assert_non_null(file);
  for (size_t n; (n = fread(block, 1, sizeof block, file)) > 0;)
    put(&b, block, n);
  fclose(file);
  return b;
}

static void commits_go_on(void **state) {
  (void)state;
  static const int64_t lens[] = {1, 63, 64, 65, 65, 130, 1000, 1049, 1050, MOST};
  const char *path = in_temp("grows");
  sfa_index *readers[10];
  for (int i = 0; i < 10; i++) {
    assert_int_equal(commit_to(path, lens[i]), SFA_OK);
    readers[i] = open_good(path);
  }
  for (int i = 0; i < 10; i++) { /* those who opened early keep their state, while the file goes on */
    sfa_index_info info;
    sfa_index_describe(readers[i], &info);
    assert_int_equal(info.n_tokens, lens[i]);
    assert_int_equal(info.n_segments, i < 4 ? i + 1 : i);
    assert_int_equal(info.n_commits, info.n_segments);
    assert_int_equal(info.k, 4);
    assert_int_equal(info.n_sparse_layers, 1);
    check_content(readers[i]);
    assert_int_equal(sfa_index_verify(readers[i]), SFA_OK);
    sfa_index_close(readers[i]);
  }
  /* A shorter state, which the file begins with, is a state that it has gone on from: nothing to do. Another one is refused. */
  assert_int_equal(commit_to(path, 100), SFA_ERROR_ARGUMENT);
  assert_non_null(strstr(sfa_context_error(ctx), "token 100"));
  expect_state(path, MOST);
}

static void cut_anywhere(void **state) {
  (void)state;
  const char *whole = in_temp("whole"), *cut = in_temp("cut");
  assert_int_equal(commit_to(whole, 70), SFA_OK);
  assert_int_equal(commit_to(whole, 140), SFA_OK);
  for (int large = 0; large < 2; large++) {
    sfa_rng rng = {5};
    if (large)
      for (int64_t n = 500; n <= MOST; n += 500)
        assert_int_equal(commit_to(whole, n), SFA_OK);
    buffer b = load(whole);
    buffer_save(&b, cut);
    if (!large)
      for (size_t size = b.bytes; size-- > 0;) {
        assert_int_equal(truncate(cut, (off_t)size), 0);
        expect_refusal(cut, SFA_ERROR_FORMAT, size <= 8192 ? "" : "cut short");
      }
    for (int i = 0; large && i < 2000; i++) {
      size_t size = (size_t)(sfa_rng_next(&rng) % b.bytes);
      int file = open(cut, O_WRONLY); /* grown by a hole after a deeper cut, then cut to size: the same as cut from the whole */
      assert_int_equal(pwrite(file, b.data, size, 0), (ssize_t)size);
      assert_int_equal(ftruncate(file, (off_t)size), 0);
      close(file);
      expect_refusal(cut, SFA_ERROR_FORMAT, "");
    }
    buffer_free(&b);
  }
}

/* A byte is damaged: an error, or a state that was committed and is whole. Never another one. */
static void flipped_anywhere(void **state) {
  (void)state;
  const char *path = in_temp("flipped");
  int refused = 0, older = 0, unharmed = 0;
  assert_int_equal(commit_to(path, 70), SFA_OK);
  assert_int_equal(commit_to(path, 140), SFA_OK);
  buffer b = load(path);
  int file = open(path, O_RDWR);
  for (size_t at = 0; at < b.bytes; at++) {
    uint8_t bad = (uint8_t)(b.data[at] ^ (1u << at % 8));
    assert_int_equal(pwrite(file, &bad, 1, (off_t)at), 1);
    sfa_index *index;
    sfa_status status = sfa_index_open(ctx, path, &index);
    if (status == SFA_OK)
      status = sfa_index_verify(index);
    if (status == SFA_OK) {
      assert_true(index->n_tokens == 140 || (index->n_tokens == 70 && at >= 4096 && at < 12288));
      *(index->n_tokens == 140 ? &unharmed : &older) += 1;
      check_content(index);
    } else {
      assert_true(status == SFA_ERROR_FORMAT || (status == SFA_ERROR_UNSUPPORTED && at >= 8 && at < 16));
      assert_non_null(strstr(sfa_context_error(ctx), path));
      refused++;
    }
    sfa_index_close(index);
    assert_int_equal(pwrite(file, b.data + at, 1, (off_t)at), 1);
  }
  close(file);
  /* What may change: the room between the parts, the older slot, and the pages that were not full after the first commit. */
  int room = SFA_INDEX_SETTINGS_AT - 64 - 64 + 3 * 63, rewritten = 2 * 64 + (64 + 128) * ROW;
  assert_int_equal(older, 64); /* the newer slot */
  assert_int_equal(refused + older + unharmed, b.bytes);
  assert_true(unharmed <= room + rewritten);
  expect_state(path, 140);
  buffer_free(&b);
}

static void other_files_are_refused(void **state) {
  (void)state;
  const char *path = in_temp("other");
  buffer b = {0};
  buffer_save(&b, path);
  expect_refusal(path, SFA_ERROR_FORMAT, "it is empty");
  put(&b, "A letter to a friend, of which nothing may be lost.", 51);
  buffer_save(&b, path);
  expect_refusal(path, SFA_ERROR_FORMAT, "not a document index");
  assert_int_equal(commit_to(path, 10), SFA_ERROR_FORMAT);
  buffer after = load(path);
  assert_int_equal(after.bytes, b.bytes);
  assert_memory_equal(after.data, b.data, b.bytes);
  buffer_free(&after);
  buffer_free(&b);

  expect_refusal(temp_dir, SFA_ERROR_IO, "not a regular file");
  assert_int_equal(commit_to(temp_dir, 10), SFA_ERROR_IO);
  expect_refusal(in_temp("nothing"), SFA_ERROR_IO, "No such file");
  assert_int_equal(commit_to(in_temp("no/such/folder"), 10), SFA_ERROR_IO);

  remove(path);
  assert_int_equal(commit_to(path, 10), SFA_OK);
  b = load(path);
  const struct {
    size_t at;
    uint8_t byte;
    sfa_status status;
    const char *text;
  } changes[] = {{8, 2, SFA_ERROR_UNSUPPORTED, "version 2"}, {12, 1, SFA_ERROR_UNSUPPORTED, "byte order"}};
  for (size_t i = 0; i < 2; i++) {
    uint8_t kept = b.data[changes[i].at];
    b.data[changes[i].at] = changes[i].byte;
    buffer_save(&b, path);
    expect_refusal(path, changes[i].status, changes[i].text);
    assert_int_equal(commit_to(path, 20), SFA_ERROR_UNSUPPORTED);
    b.data[changes[i].at] = kept;
  }
  buffer_save(&b, path);
  expect_state(path, 10);

  /* An empty file may become an index; so may one whose first commit never came. */
  for (size_t size = 0; size <= SFA_INDEX_SETTINGS_AT; size += 2048) {
    buffer begun = b;
    begun.bytes = size;
    memset(begun.data + 4096, 0, 8192);
    buffer_save(&begun, path);
    expect_refusal(path, SFA_ERROR_FORMAT, size ? "never finished" : "empty");
    assert_int_equal(commit_to(path, 30), SFA_OK);
    expect_state(path, 30);
  }
  buffer_free(&b);
}

static void settings_must_match(void **state) {
  (void)state;
  const char *path = in_temp("settings");
  sfa_index_layer_entry other_layers[N_LAYERS];
  assert_int_equal(commit_to(path, 10), SFA_OK);
  static const char *const texts[] = {"another model, made-up model",
                                      "another tokenizer",
                                      "weights",
                                      "kept features",
                                      "int8 and bf16, here they are int8 and f16",
                                      "another model"};
  for (int i = 0; i < 6; i++) {
    sfa_index_settings other = settings;
    sfa_index_writer *writer;
    memcpy(other_layers, layers, sizeof layers);
    other.layers = other_layers;
    other.model += i == 0;
    other.tokenizer += i == 1;
    other.weights += i == 2;
    other_layers[1].k_q += i == 3;
    other_layers[0].v_dtype += i == 4;
    other.vocab_size += i == 5;
    assert_int_equal(sfa_index_writer_open(ctx, path, &writer), SFA_OK);
    assert_int_equal(commit_with(writer, &other, 20), SFA_ERROR_ARGUMENT);
    if (!strstr(sfa_context_error(ctx), texts[i]) || !strstr(sfa_context_error(ctx), path))
      fail_msg("%s", sfa_context_error(ctx));
    sfa_index_writer_close(writer);
  }
  expect_state(path, 10);
}

/* ---- Writers ------------------------------------------------------------------------------------------------------------------------- */

static void two_writers(void **state) {
  (void)state;
  const char *path = in_temp("locked");
  sfa_index_writer *first, *second;
  assert_int_equal(sfa_index_writer_open(ctx, path, &first), SFA_OK);
  assert_int_equal(sfa_index_writer_open(ctx, path, &second), SFA_ERROR_IO);
  assert_null(second);
  assert_non_null(strstr(sfa_context_error(ctx), "being written by another process"));
  assert_int_equal(commit_with(first, &settings, 100), SFA_OK);
  pid_t child = fork();
  if (child == 0) { /* another process: may read, may not write */
    sfa_index *index;
    bool good = sfa_index_writer_open(ctx, path, &second) == SFA_ERROR_IO && sfa_index_open(ctx, path, &index) == SFA_OK &&
                index->n_tokens == 100 && sfa_index_verify(index) == SFA_OK;
    _exit(good ? 0 : 1);
  }
  int status;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_int_equal(status, 0);
  assert_int_equal(commit_with(first, &settings, 200), SFA_OK);
  sfa_index_writer_close(first);
  assert_int_equal(commit_to(path, 300), SFA_OK);
  expect_state(path, 300);

  /* A file that got no commit goes with its writer. */
  path = in_temp("unwritten");
  assert_int_equal(sfa_index_writer_open(ctx, path, &first), SFA_OK);
  assert_int_equal(commit_with(first, &settings, 0), SFA_ERROR_ARGUMENT);
  sfa_index_writer_close(first);
  assert_int_equal(access(path, F_OK), -1);
}

static void read_only_file(void **state) {
  (void)state;
  const char *path = in_temp("read_only");
  assert_int_equal(commit_to(path, 100), SFA_OK);
  assert_int_equal(chmod(path, 0444), 0);
  assert_int_equal(chmod(temp_dir, 0755), 0);
  if (geteuid() == 0) /* may write everywhere: be nobody for a while */
    assert_int_equal(seteuid(65534), 0);
  sfa_status status = commit_to(path, 200);
  expect_state(path, 100);
  if (getuid() == 0)
    assert_int_equal(seteuid(0), 0);
  assert_int_equal(status, SFA_ERROR_IO);
  expect_state(path, 100);
}

/* The disk fills at every place of a commit: the error says so, the file is as before and as long as before, and goes on once there is
 * room. */
static void full_disk(void **state) {
  (void)state;
  for (int first_commit = 0; first_commit < 2; first_commit++) {
    const char *path = in_temp("full"), *grown = in_temp("grown");
    const int64_t n_tokens = first_commit ? 100 : 300;
    buffer before = {0}, now;
    remove(path);
    remove(grown);
    if (!first_commit) {
      assert_int_equal(commit_to(path, 100), SFA_OK);
      assert_int_equal(commit_to(grown, 100), SFA_OK);
      before = load(path);
    }
    assert_int_equal(commit_to(grown, n_tokens), SFA_OK);
    buffer after = load(grown);
    for (size_t room = before.bytes; room < after.bytes; room += 331) {
      pid_t child = fork();
      if (child == 0) {
        signal(SIGXFSZ, SIG_IGN); /* then a write beyond the limit fails as one on a full disk does */
        struct rlimit limit = {room, room};
        bool good = setrlimit(RLIMIT_FSIZE, &limit) == 0 && commit_to(path, n_tokens) == SFA_ERROR_IO &&
                    strstr(sfa_context_error(ctx), path) && strstr(sfa_context_error(ctx), "make room");
        _exit(good ? 0 : 1);
      }
      int status;
      assert_int_equal(waitpid(child, &status, 0), child);
      assert_int_equal(status, 0);
      if (first_commit) {
        assert_int_equal(access(path, F_OK), -1);
        continue;
      }
      now = load(path);
      assert_int_equal(now.bytes, before.bytes);
      assert_memory_equal(now.data, before.data, before.bytes);
      buffer_free(&now);
    }
    assert_int_equal(commit_to(path, n_tokens), SFA_OK);
    expect_state(path, n_tokens);
    buffer_free(&before);
    buffer_free(&after);
  }
}

/* A writer that goes on from what it finds, 1 to 97 tokens a commit, until it is killed. */
static void write_on(const char *path) {
  sfa_index_writer *writer;
  sfa_index *index;
  if (sfa_index_writer_open(ctx, path, &writer) != SFA_OK)
    _exit(1);
  int64_t n = sfa_index_open(ctx, path, &index) == SFA_OK ? index->n_tokens : 0;
  for (n++; n <= MOST; n += 1 + n % 97)
    if (commit_with(writer, &settings, n) != SFA_OK)
      _exit(2);
  for (;;)
    pause();
}

/* Kills it at random times. What it leaves is a state that some commit made, and the next one goes on from there. */
static void kill_writers(const char *path, int n_kills, int most_us) {
  sfa_rng rng = {11};
  int64_t longest = 0;
  int finished = 0, unfinished = 0;
  remove(path);
  for (int i = 0; i < n_kills; i++) {
    pid_t child = fork();
    if (child == 0)
      write_on(path);
    usleep((useconds_t)(sfa_rng_next(&rng) % (uint64_t)most_us));
    kill(child, SIGKILL);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    bool none = access(path, F_OK) != 0;
    if (!none)
      assert_int_equal(sfa_index_is_unfinished(ctx, path, &none), SFA_OK);
    unfinished += none;
    if (none) {
      assert_int_equal(longest, 0);
      continue;
    }
    sfa_index *index = open_good(path);
    assert_true(index->n_tokens >= longest);
    check_content(index);
    longest = index->n_tokens;
    sfa_index_close(index);
    if (longest > MOST - 97) {
      finished++;
      longest = 0;
      remove(path);
    }
  }
  print_message("%d kills: %d before the first commit, %d files filled\n", n_kills, unfinished, finished);
}

static void killed_writers(void **state) {
  (void)state;
  kill_writers(in_temp("killed"), 20, 4000);
}

/* ---- Sessions ------------------------------------------------------------------------------------------------------------------------ */

enum { MODEL_VOCAB = 512, N = 200 };
static int32_t text[N];
static float logits_a[MODEL_VOCAB], logits_b[MODEL_VOCAB];

static sfa_session_options session_options(const sfa_attention_choice *choice) {
  return (sfa_session_options){.struct_size = sizeof(sfa_session_options), .attention = choice};
}

static sfa_status save(const sfa_session *session, const char *path, const sfa_index_source *sources, int64_t n_sources) {
  sfa_index_writer *writer;
  sfa_status status = sfa_index_writer_open(ctx, path, &writer);
  if (status == SFA_OK) {
    status = sfa_session_save(session, writer, sources, n_sources);
    sfa_index_writer_close(writer);
  }
  return status;
}

static sfa_model *open_model(const char *path) {
  sfa_model *model;
  for (int i = 0; i < N; i++)
    text[i] = i ? (i * 31 + i / 7) % MODEL_VOCAB : 1;
  if (sfa_model_open(ctx, path, NULL, &model) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  return model;
}

/* Logits after tokens first..end of the text. */
static void read_on(sfa_session *session, int first, int end_token, float *logits) {
  if (sfa_session_append(session, text + first, end_token - first, logits) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
}

/* What is stored in 16 bits and less is read in f32 on every machine: an AMX one's own way shows how a prompt was cut. */
static const sfa_attention_choice choices[] = {
    {.struct_size = sizeof(sfa_attention_choice)},
    {.struct_size = sizeof(sfa_attention_choice), .sparse = 1, .k = 2},
    {.struct_size = sizeof(sfa_attention_choice), .sparse = 1, .k = 3, .k_q = -1, .cache_v = SFA_I8, .precision = SFA_PRECISION_F32},
    {.struct_size = sizeof(sfa_attention_choice),
     .sparse = 1,
     .k = 4,
     .layers = 2,
     .layer_list = (const int32_t[]){1, 3},
     .n_layer_list = 2,
     .cache_k = SFA_BF16,
     .cache_v = SFA_F16,
     .precision = SFA_PRECISION_F32},
};
enum { N_CHOICES = sizeof choices / sizeof *choices };

static void loaded_sessions_go_on_alike(void **state) {
  (void)state;
  static const int cuts[] = {1, 64, 100};
  sfa_model *model = open_model(MODEL);
  for (int c = 0; c < N_CHOICES; c++)
    for (int i = 0; i < 3; i++) {
      const char *path = in_temp("session");
      sfa_session_options options = session_options(&choices[c]);
      sfa_session *whole, *loaded, *again;
      remove(path);
      assert_int_equal(sfa_session_create(model, &options, &whole), SFA_OK);
      read_on(whole, 0, cuts[i], NULL);
      assert_int_equal(save(whole, path, &(sfa_index_source){"text", 0, 400, 0, cuts[i]}, 1), SFA_OK);
      read_on(whole, cuts[i], N, logits_a);

      if (sfa_session_load(model, &options, path, &loaded) != SFA_OK)
        fail_msg("%s", sfa_context_error(ctx));
      assert_int_equal(sfa_session_len(loaded), cuts[i]);
      assert_memory_equal(sfa_session_tokens(loaded), text, (size_t)cuts[i] * sizeof *text);
      sfa_session_stats stats;
      sfa_session_stats_read(loaded, &stats);
      assert_true(stats.prefill_tokens == 0 && stats.kv_bytes == 0 && stats.index_bytes > 0);
      read_on(loaded, cuts[i], 150, NULL);
      assert_int_equal(save(loaded, path, NULL, 0), SFA_OK); /* while its pages are in use */
      read_on(loaded, 150, N, logits_b);
      assert_memory_equal(logits_a, logits_b, sizeof logits_a);

      /* From the appended file; into the index's pages and on from there. */
      assert_int_equal(sfa_session_load(model, &options, path, &again), SFA_OK);
      assert_int_equal(sfa_session_len(again), 150);
      read_on(again, 150, N, logits_b);
      assert_memory_equal(logits_a, logits_b, sizeof logits_a);
      for (int keep = 149; keep > 0; keep -= 59) {
        assert_int_equal(sfa_session_truncate(again, keep), SFA_OK);
        read_on(again, keep, N, logits_b);
        assert_memory_equal(logits_a, logits_b, sizeof logits_a);
      }
      assert_int_equal(save(again, path, NULL, 0), SFA_OK);
      sfa_session_destroy(loaded);
      sfa_session_destroy(again);
      sfa_session_destroy(whole);
      sfa_index *index = open_good(path);
      sfa_index_source source;
      assert_int_equal(index->n_tokens, N);
      assert_int_equal(index->n_segments, 3);
      assert_true(sfa_index_source_at(index, 0, &source) && source.n_tokens == cuts[i] && index->n_sources == 1);
      sfa_index_close(index);
    }
  sfa_model_close(model);
}

/* The same text saved in one commit and token by token: the same pages. */
static void way_of_saving_leaves_the_pages(void **state) {
  (void)state;
  sfa_model *model = open_model(MODEL);
  sfa_session_options options = session_options(&choices[1]);
  sfa_session *session;
  const char *once = in_temp("once"), *often = in_temp("often");
  assert_int_equal(sfa_session_create(model, &options, &session), SFA_OK);
  for (int i = 0; i < 100; i++) {
    read_on(session, i, i + 1, NULL);
    assert_int_equal(save(session, often, NULL, 0), SFA_OK);
  }
  assert_int_equal(save(session, once, NULL, 0), SFA_OK);
  sfa_index *a = open_good(once), *b = open_good(often);
  assert_int_equal(a->n_segments, 1);
  assert_int_equal(b->n_segments, 100);
  assert_int_equal(a->n_pages, b->n_pages);
  for (int64_t p = 0; p < a->n_pages * a->settings.n_layers; p++)
    assert_memory_equal(a->pages[p], b->pages[p], a->layers[p / a->n_pages].page_bytes);
  sfa_index_close(a);
  sfa_index_close(b);
  sfa_session_destroy(session);
  sfa_model_close(model);
}

static void other_sessions_are_refused(void **state) {
  (void)state;
  sfa_model *model = open_model(MODEL);
  sfa_session_options options = session_options(&choices[1]);
  sfa_session *session, *other;
  const char *path = in_temp("refused");
  assert_int_equal(sfa_session_create(model, &options, &session), SFA_OK);
  assert_int_equal(save(session, path, NULL, 0), SFA_ERROR_ARGUMENT); /* nothing to save */
  assert_int_equal(access(path, F_OK), -1);
  read_on(session, 0, 100, NULL);
  sfa_index_source sources[2] = {{"a", 0, 10, 0, 50}, {"b", 10, 10, 50, 51}};
  assert_int_equal(save(session, path, sources, 2), SFA_ERROR_ARGUMENT); /* beyond the tokens */
  sources[1].n_tokens = 50;
  sources[1].first_byte = 9;
  assert_int_equal(save(session, path, sources, 2), SFA_ERROR_ARGUMENT); /* overlap */
  sources[1].first_byte = 10;
  assert_int_equal(save(session, path, sources, 1), SFA_OK);
  read_on(session, 100, 120, NULL);
  /* A longer text under the first name: told of from where the file's ends. */
  assert_int_equal(save(session, path, (sfa_index_source[]){{"longer a", 0, 14, 0, 70}, {"b", 14, 6, 70, 50}}, 2), SFA_OK);
  sfa_index *grown = open_good(path);
  sfa_index_source seen;
  assert_int_equal(grown->n_sources, 3);
  assert_true(sfa_index_source_at(grown, 1, &seen) && strcmp(seen.name, "longer a") == 0);
  assert_true(seen.first_byte == 10 && seen.n_bytes == 4 && seen.first_token == 50 && seen.n_tokens == 20);
  assert_true(sfa_index_source_at(grown, 2, &seen) && seen.first_token == 70 && seen.n_tokens == 50);
  sfa_index_close(grown);
  sfa_session_destroy(session);

  /* Other settings, other texts, a small context. */
  for (int c = 0; c < N_CHOICES; c++) {
    if (c == 1)
      continue;
    sfa_session_options wrong = session_options(&choices[c]);
    assert_int_equal(sfa_session_load(model, &wrong, path, &other), SFA_ERROR_ARGUMENT);
    assert_null(other);
    assert_non_null(strstr(sfa_context_error(ctx), path));
  }
  options.context_len = 119;
  assert_int_equal(sfa_session_load(model, &options, path, &other), SFA_ERROR_RANGE);
  options.context_len = 120;
  assert_int_equal(sfa_session_load(model, &options, path, &other), SFA_OK);
  assert_int_equal(sfa_session_append(other, text, 1, NULL), SFA_ERROR_RANGE);
  sfa_session_destroy(other);
  options.context_len = 0;
  assert_int_equal(sfa_session_load(model, &options, in_temp("nothing"), &other), SFA_ERROR_IO);
  assert_int_equal(sfa_session_load(model, &options, "", &other), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_session_create(model, &options, &other), SFA_OK);
  read_on(other, 0, 60, NULL);
  assert_int_equal(save(other, path, NULL, 0), SFA_ERROR_ARGUMENT); /* shorter */
  read_on(other, 0, 70, NULL);
  assert_int_equal(save(other, path, NULL, 0), SFA_ERROR_ARGUMENT); /* another text */
  assert_non_null(strstr(sfa_context_error(ctx), "from token 60"));
  assert_int_equal(sfa_session_save(other, NULL, NULL, 0), SFA_ERROR_ARGUMENT);
  sfa_session_destroy(other);
  sfa_model_close(model);

  /* A model of the same shape with one weight changed. */
  buffer b = load(MODEL);
  const char *other_path = in_temp("model.bin");
  b.data[28] ^= 1; /* the first of the embedding */
  buffer_save(&b, other_path);
  buffer_free(&b);
  sfa_model_options with_tokenizer = {.struct_size = sizeof with_tokenizer,
                                      .tokenizer = SFA_TEST_DATA "/golden/models/stories260K/tok512.bin"};
  assert_int_equal(sfa_model_open(ctx, other_path, &with_tokenizer, &model), SFA_OK);
  assert_int_equal(sfa_session_load(model, &options, path, &other), SFA_ERROR_ARGUMENT);
  assert_non_null(strstr(sfa_context_error(ctx), "another model"));
  sfa_model_close(model);
  sfa_index *index = open_good(path);
  assert_int_equal(index->n_tokens, 120);
  assert_int_equal(index->n_sources, 3);
  sfa_index_close(index);
}

static void refused_memory_is_an_error(void **state) {
  (void)state;
  memory_account account = {0};
  sfa_context *kept = ctx;
  ctx = new_counted_context(1, &account);
  sfa_model *model = open_model(MODEL);
  sfa_session_options options = session_options(&choices[3]);
  sfa_session *session, *loaded;
  const char *path = in_temp("memory");
  assert_int_equal(sfa_session_create(model, &options, &session), SFA_OK);
  int len = 0, failed = 0;
  for (int step = 0; step < 2; step++) {
    read_on(session, len, len + 90, NULL);
    len += 90;
    sfa_status status = SFA_ERROR_MEMORY;
    for (int64_t refuse = 1; status != SFA_OK; refuse++, failed++) {
      int64_t out = account.out;
      account.calls = 0;
      account.refuse = refuse;
      status = save(session, path, NULL, 0);
      account.refuse = 0;
      assert_int_equal(account.out, out);
      assert_true(status == SFA_OK || status == SFA_ERROR_MEMORY);
      if (status != SFA_OK && step == 1) {
        sfa_index *index = open_good(path);
        assert_int_equal(index->n_tokens, 90);
        sfa_index_close(index);
      }
    }
  }
  sfa_status status = SFA_ERROR_MEMORY;
  for (int64_t refuse = 1; status != SFA_OK; refuse++, failed++) {
    int64_t out = account.out;
    account.calls = 0;
    account.refuse = refuse;
    status = sfa_session_load(model, &options, path, &loaded);
    account.refuse = 0;
    assert_int_equal(loaded != NULL, status == SFA_OK);
    assert_true(status == SFA_OK || status == SFA_ERROR_MEMORY);
    sfa_session_destroy(loaded);
    assert_int_equal(account.out, out);
  }
  assert_true(failed > 30);
  sfa_session_destroy(session);
  sfa_model_close(model);
  sfa_context_destroy(ctx);
  assert_int_equal(account.out, 0);
  ctx = kept;
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(commits_go_on),
      cmocka_unit_test(cut_anywhere),
      cmocka_unit_test(flipped_anywhere),
      cmocka_unit_test(other_files_are_refused),
      cmocka_unit_test(settings_must_match),
      cmocka_unit_test(two_writers),
      cmocka_unit_test(read_only_file),
      cmocka_unit_test(full_disk),
      cmocka_unit_test(killed_writers),
      cmocka_unit_test(loaded_sessions_go_on_alike),
      cmocka_unit_test(way_of_saving_leaves_the_pages),
      cmocka_unit_test(other_sessions_are_refused),
      cmocka_unit_test(refused_memory_is_an_error),
  };
  if (argc == 4 && strcmp(argv[1], "kills") == 0) {
    begin(NULL);
    char file[512];
    snprintf(file, sizeof file, "%s/killed", argv[3]);
    kill_writers(file, atoi(argv[2]), 40000); /* a disk confirms in milliseconds, memory at once */
    remove(file);
    return end(NULL);
  }
  return cmocka_run_group_tests(tests, begin, end);
}
