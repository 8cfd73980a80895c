/* A folder with token shards and the recipe of a tiny model, for the tests of training. Included after unit_tools.h. */
#ifndef SFA_TRAIN_FILES_H
#define SFA_TRAIN_FILES_H

#include <ftw.h>
#include <stdio.h>
#include <unistd.h>

#include "file/shards.h"

enum { TRAIN_DIR_BYTES = 40, TRAIN_VOCAB = 33, TRAIN_PATH_BYTES = 320 };

static const char tiny_model[] =
    "{\"model\": {\"model_type\": \"llama\", \"hidden_size\": 32, \"intermediate_size\": 48,"
    "\"num_hidden_layers\": 2, \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"head_dim\": 16,"
    "\"max_position_embeddings\": 64, \"rms_norm_eps\": 1e-5, \"rope_theta\": 10000, \"hidden_act\": \"silu\"},"
    "\"steps\": 12, \"sequences\": 2, \"sequence_len\": 24, \"learning_rate\": 0.01, \"warmup_steps\": 2,"
    "\"log_every\": 3, \"validate_every\": 5, \"validation_windows\": 6, \"checkpoint_every\": 4}";

static inline void train_make_dir(char dir[TRAIN_DIR_BYTES]) {
  snprintf(dir, TRAIN_DIR_BYTES, "%s/sfa_train_XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
  assert_non_null(mkdtemp(dir));
}

static inline int train_remove_entry(const char *path, const struct stat *info, int type, struct FTW *at) {
  (void)info, (void)type, (void)at;
  return remove(path);
}

static inline void train_remove_dir(const char *dir) { nftw(dir, train_remove_entry, 16, FTW_DEPTH | FTW_PHYS); }

/* A set of one shard: n tokens of a text that a model can learn (each id follows from the one before, but for noise). */
static inline void train_make_shards(sfa_context *ctx, const char *path, uint64_t seed, int64_t n) {
  const sfa_shard_settings settings = {.vocab_size = TRAIN_VOCAB, .end_token = TRAIN_VOCAB - 1, .tokenizer = 7, .shard_len = 1 << 20};
  sfa_shard_writer *writer;
  sfa_rng rng = {seed};
  assert_int_equal(sfa_shard_writer_open(ctx, path, &settings, &writer), SFA_OK);
  int32_t id = 1;
  for (int64_t i = 0; i < n; i++) {
    id = sfa_rng_next(&rng) % 8 ? (id * 5 + 3) % (TRAIN_VOCAB - 1) : (int32_t)(sfa_rng_next(&rng) % (TRAIN_VOCAB - 1));
    assert_int_equal(sfa_shard_writer_add(writer, &id, 1), SFA_OK);
  }
  assert_int_equal(sfa_shard_writer_end_document(writer), SFA_OK);
  assert_int_equal(sfa_shard_writer_commit(writer), SFA_OK);
  sfa_shard_writer_close(writer);
}

/* The bytes of a file; NULL: it is not there. */
static inline uint8_t *train_read_file(const char *path, size_t *bytes) {
  FILE *file = fopen(path, "rb");
  *bytes = 0;
  if (!file)
    return NULL;
  uint8_t *data = NULL;
  for (size_t n = 1; n;) {
    data = realloc(data, *bytes + 65536);
    assert_non_null(data);
    n = fread(data + *bytes, 1, 65536, file);
    *bytes += n;
  }
  fclose(file);
  return data;
}

static inline void train_write_file(const char *path, const void *data, size_t bytes) {
  FILE *file = fopen(path, "wb");
  assert_non_null(file);
  assert_int_equal(bytes ? fwrite(data, 1, bytes, file) : 0, bytes);
  assert_int_equal(fclose(file), 0);
}

static inline bool train_same_files(const char *a, const char *b) {
  size_t n, m;
  uint8_t *x = train_read_file(a, &n), *y = train_read_file(b, &m);
  const bool same = x && y && n == m && memcmp(x, y, n) == 0;
  free(x);
  free(y);
  return same;
}

#endif
