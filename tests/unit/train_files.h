/* Token shards and the recipe of a tiny model, for the tests of training. Included after unit_tools.h. */
#ifndef SFA_TRAIN_FILES_H
#define SFA_TRAIN_FILES_H

#include "file/shards.h"
#include "temp_files.h"

enum { TRAIN_VOCAB = 33 };

static const char tiny_model[] =
    "{\"model\": {\"model_type\": \"llama\", \"hidden_size\": 32, \"intermediate_size\": 48,"
    "\"num_hidden_layers\": 2, \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"head_dim\": 16,"
    "\"max_position_embeddings\": 64, \"rms_norm_eps\": 1e-5, \"rope_theta\": 10000, \"hidden_act\": \"silu\"},"
    "\"steps\": 12, \"sequences\": 2, \"sequence_len\": 24, \"learning_rate\": 0.01, \"warmup_steps\": 2,"
    "\"log_every\": 3, \"validate_every\": 5, \"validation_windows\": 6, \"checkpoint_every\": 4}";

/* A set of one shard: documents of n tokens of a text that a model can learn (each id follows from the one before, but for noise), with
 * the end token behind each. */
static inline void train_make_documents(sfa_context *ctx, const char *path, uint64_t seed, int64_t n_documents, int64_t n) {
  const sfa_shard_settings settings = {.vocab_size = TRAIN_VOCAB, .end_token = TRAIN_VOCAB - 1, .tokenizer = 7, .shard_len = 1 << 20};
  sfa_shard_writer *writer;
  sfa_rng rng = {seed};
  assert_int_equal(sfa_shard_writer_open(ctx, path, &settings, &writer), SFA_OK);
  int32_t id = 1;
  for (int64_t d = 0; d < n_documents; d++) {
    for (int64_t i = 0; i < n; i++) {
      id = sfa_rng_next(&rng) % 8 ? (id * 5 + 3) % (TRAIN_VOCAB - 1) : (int32_t)(sfa_rng_next(&rng) % (TRAIN_VOCAB - 1));
      assert_int_equal(sfa_shard_writer_add(writer, &id, 1), SFA_OK);
    }
    assert_int_equal(sfa_shard_writer_end_document(writer), SFA_OK);
  }
  assert_int_equal(sfa_shard_writer_commit(writer), SFA_OK);
  sfa_shard_writer_close(writer);
}

static inline void train_make_shards(sfa_context *ctx, const char *path, uint64_t seed, int64_t n) {
  train_make_documents(ctx, path, seed, 1, n);
}

#endif
