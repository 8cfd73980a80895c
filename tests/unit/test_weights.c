/* The three readers: small files are written, read back value by value, and refused when they lie. What a damaged file may do to the
 * process is the subject of test_weights_damage.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "weights_files.h"

static sfa_context *ctx;

static void write_file(const char *name, const buffer *b) { buffer_save(b, in_temp(name)); }

static void write_text(const char *name, const char *text) {
  buffer b = {0};
  put(&b, text, strlen(text));
  write_file(name, &b);
  buffer_free(&b);
}

static void drop(const char *name) { remove(in_temp(name)); }

static sfa_weights *open_good(const char *path) {
  sfa_weights *weights;
  sfa_status status = sfa_weights_open(ctx, path, &weights);
  if (status != SFA_OK)
    fail_msg("%s: %s", sfa_status_name(status), sfa_context_error(ctx));
  return weights;
}

/* The path must be refused with that status and a text that holds `reason` (and the file's name, and what to do). */
static void open_bad(const char *path, sfa_status want, const char *reason) {
  sfa_weights *weights = (sfa_weights *)&ctx;
  sfa_status status = sfa_weights_open(ctx, path, &weights);
  assert_null(weights);
  const char *text = sfa_context_error(ctx);
  if (status != want || !strstr(text, reason) || !strstr(text, temp_dir))
    fail_msg("want %s with \"%s\", got %s: %s", sfa_status_name(want), reason, sfa_status_name(status), status ? text : "");
}

static double number(const sfa_weights *w, const char *key) {
  double value = -12345;
  if (!sfa_meta_number(w, key, &value))
    fail_msg("no number %s", key);
  return value;
}

static const char *string(const sfa_weights *w, const char *key) {
  const char *text = NULL;
  size_t bytes;
  if (!sfa_meta_string(w, key, &text, &bytes))
    fail_msg("no string %s", key);
  assert_int_equal(text[bytes], 0);
  return text;
}

static void check_floats(const sfa_weights *w, const char *name, int32_t n_dims, int64_t rows, int64_t columns, float first) {
  const sfa_tensor *t = sfa_weights_find(w, name);
  if (!t)
    fail_msg("no tensor %s", name);
  assert_int_equal(t->n_dims, n_dims);
  assert_int_equal(t->shape[0], n_dims == 2 ? rows : columns);
  assert_int_equal(t->shape[1], n_dims == 2 ? columns : 1);
  assert_int_equal(t->shape[2], 1);
  assert_int_equal(t->n_elements, rows * columns);
  float *values = malloc((size_t)t->n_elements * sizeof *values);
  assert_non_null(values);
  sfa_tensor_dequantize(t->type, t->n_elements, t->data, values);
  for (int64_t i = 0; i < t->n_elements; i++)
    assert_float_equal(values[i], first + (float)i, 0);
  free(values);
}

/* ---- GGUF -------------------------------------------------------------------------------------------------------------------- */

static void test_gguf_reads_back(void **state) {
  (void)state;
  for (uint32_t version = 2; version <= 3; version++) {
    buffer b = {0};
    make_gguf(&b, version);
    write_file("a.gguf", &b);
    sfa_weights *w = open_good(in_temp("a.gguf"));
    assert_string_equal(sfa_weights_format(w), "gguf");
    assert_int_equal(sfa_weights_bytes(w), (int64_t)b.bytes);
    assert_int_equal(sfa_weights_count(w), 3);
    assert_string_equal(sfa_weights_at(w, 0)->name, "token_embd.weight");
    check_floats(w, "token_embd.weight", 2, 3, 4, 0.5f);
    check_floats(w, "norm", 1, 1, 5, 100);
    const sfa_tensor *q = sfa_weights_find(w, "blk.0.q");
    assert_int_equal(q->type, SFA_TENSOR_Q8_0);
    assert_int_equal(q->shape[0], 2);
    assert_int_equal(q->shape[1], 64);
    assert_int_equal(q->bytes, 4 * 34);
    assert_null(sfa_weights_find(w, "blk.1.q"));

    assert_float_equal(number(w, "u8"), 200, 0);
    assert_float_equal(number(w, "i8"), -100, 0);
    assert_float_equal(number(w, "u16"), 60000, 0);
    assert_float_equal(number(w, "i16"), -30000, 0);
    assert_float_equal(number(w, "u32"), 4e9, 0);
    assert_float_equal(number(w, "i32"), -2e9, 0);
    assert_float_equal(number(w, "f32"), 0.25, 0);
    assert_float_equal(number(w, "u64"), 0x1p53, 0);
    assert_float_equal(number(w, "i64"), -0x1p53, 0);
    assert_float_equal(number(w, "f64"), 0.1, 0);
    assert_string_equal(string(w, "general.architecture"), "llama");
    bool yes = false;
    assert_true(sfa_meta_bool(w, "flag", &yes) && yes);

    const char *text = NULL;
    size_t bytes = 0;
    assert_int_equal(sfa_meta_array_len(w, "tokens"), 3);
    assert_true(sfa_meta_array_string(w, "tokens", 0, &text, &bytes));
    assert_int_equal(bytes, 0);
    assert_true(sfa_meta_array_string(w, "tokens", 1, &text, &bytes));
    assert_memory_equal(text, "a\0b", 4); /* a zero byte is an ordinary one */
    assert_int_equal(bytes, 3);
    assert_true(sfa_meta_array_string(w, "tokens", 2, &text, NULL));
    assert_string_equal(text, "hello");
    double value = 7;
    assert_int_equal(sfa_meta_array_len(w, "scores"), 2);
    assert_true(sfa_meta_array_number(w, "scores", 1, &value));
    assert_float_equal(value, -1.5, 0);
    assert_true(sfa_meta_array_number(w, "pattern", 1, &value)); /* truth values count as 0 and 1 in arrays */
    assert_float_equal(value, 1, 0);
    assert_int_equal(sfa_meta_array_len(w, "empty"), 0);

    /* Wrong type, wrong form, out of range, absent: false, and the output stays. */
    value = 7;
    assert_false(sfa_meta_number(w, "general.architecture", &value));
    assert_false(sfa_meta_number(w, "flag", &value));
    assert_false(sfa_meta_number(w, "scores", &value));
    assert_false(sfa_meta_number(w, "nothing", &value));
    assert_false(sfa_meta_array_number(w, "scores", 2, &value));
    assert_false(sfa_meta_array_number(w, "scores", -1, &value));
    assert_false(sfa_meta_array_number(w, "u8", 0, &value));
    assert_false(sfa_meta_array_number(w, "tokens", 0, &value));
    assert_false(sfa_meta_array_number(w, "empty", 0, &value));
    assert_float_equal(value, 7, 0);
    assert_false(sfa_meta_bool(w, "u8", &yes));
    text = "as before";
    assert_false(sfa_meta_string(w, "u8", &text, &bytes));
    assert_false(sfa_meta_array_string(w, "scores", 0, &text, &bytes));
    assert_false(sfa_meta_array_string(w, "general.architecture", 0, &text, &bytes));
    assert_string_equal(text, "as before");
    assert_int_equal(sfa_meta_array_len(w, "u8"), -1);
    assert_int_equal(sfa_meta_array_len(w, "nothing"), -1);
    sfa_weights_close(w);
    buffer_free(&b);
  }
}

/* A file of one key and one tensor, any part of which may be told to lie. */
typedef struct gguf_case {
  const char *reason;
  sfa_status status;
  uint32_t version; /* 0: 3 */
  uint64_t n_tensors, n_keys;
  const char *key;
  uint64_t key_bytes;
  uint32_t key_type, element_type;
  uint64_t count; /* the array's, the text's bytes, or the number's value */
  const char *name;
  uint32_t n_dims;
  uint64_t dims[5];
  uint32_t type;
  uint64_t offset;
  int key_copies, tensor_copies; /* 0: 1 */
} gguf_case;

static void write_case(const gguf_case *c) {
  buffer b = {0};
  const char *key = c->key ? c->key : "general.alignment", *name = c->name ? c->name : "t";
  const int keys = c->key_copies ? c->key_copies : 1, tensors = c->tensor_copies ? c->tensor_copies : 1;
  put(&b, "GGUF", 4);
  put_u32(&b, c->version ? c->version : 3);
  put_u64(&b, c->n_tensors ? c->n_tensors : (uint64_t)tensors);
  put_u64(&b, c->n_keys ? c->n_keys : (uint64_t)keys);
  for (int i = 0; i < keys; i++) {
    put_u64(&b, c->key_bytes ? c->key_bytes : strlen(key));
    put(&b, key, strlen(key));
    put_u32(&b, c->key_type ? c->key_type : 4);
    if (c->key_type == 9) {
      put_u32(&b, c->element_type);
      put_u64(&b, c->count);
    } else if (c->key_type == 8) {
      put_u64(&b, c->count);
    } else if (c->key_type == 7) {
      put(&b, &c->count, 1);
    } else {
      put_u32(&b, (uint32_t)c->count);
    }
  }
  for (int i = 0; i < tensors; i++) {
    put_text(&b, name);
    put_u32(&b, c->n_dims ? c->n_dims : 1);
    for (uint32_t d = 0; d < (c->n_dims ? c->n_dims : 1) && d < 5; d++)
      put_u64(&b, c->dims[d]);
    put_u32(&b, c->type);
    put_u64(&b, c->offset);
  }
  put_padding(&b, 32);
  put_zeros(&b, 1024);
  write_file("case.gguf", &b);
  buffer_free(&b);
}

static void test_gguf_refuses(void **state) {
  (void)state;
  char long_name[301];
  memset(long_name, 'n', 300);
  long_name[300] = 0;
  const sfa_status bad = SFA_ERROR_FORMAT, no = SFA_ERROR_UNSUPPORTED;
  const gguf_case good = {.count = 32, .dims = {32, 4}};
  write_case(&good);
  sfa_weights_close(open_good(in_temp("case.gguf")));
#define CASE(r, s, ...)                                                                                                                    \
  { .reason = r, .status = s, .count = 32, .dims = {32, 4}, __VA_ARGS__ }
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Woverride-init"
  const gguf_case cases[] = {
      CASE("version 1,", no, .version = 1),
      CASE("big-endian", no, .version = 3u << 24),
      CASE("version 4", no, .version = 4),
      CASE("number of tensors", bad, .n_tensors = 1000000),
      CASE("number of tensors", bad, .n_tensors = UINT64_MAX),
      CASE("a tensor's name at offset 90", bad, .n_tensors = 20),
      CASE("number of keys", bad, .n_keys = 1ull << 40),
      CASE("a key at offset", bad, .key_bytes = 1ull << 62),
      CASE("a key at offset", bad, .key_bytes = UINT64_MAX),
      CASE("not 1 to 255", bad, .key = long_name),
      CASE("control character 0x0a", bad, .key = "a\nb"),
      CASE("array of arrays", bad, .key_type = 9, .element_type = 9),
      CASE("a type that GGUF does not define", bad, .key_type = 13),
      CASE("a type that GGUF does not define", bad, .key_type = 9, .element_type = 99),
      CASE("general.alignment", bad, .key_type = 9, .element_type = 8, .count = 1ull << 61),
      CASE("general.alignment", bad, .key_type = 9, .element_type = 10, .count = UINT64_MAX),
      CASE("general.alignment", bad, .key_type = 9, .element_type = 0, .count = 1ull << 63),
      CASE("general.alignment", bad, .key_type = 8, .count = UINT64_MAX - 3),
      CASE("neither 0 nor 1", bad, .key_type = 7, .count = 2),
      CASE("is there twice", bad, .key_copies = 2),
      CASE("two tensors of the name t", bad, .tensor_copies = 2),
      CASE("general.alignment is 0", bad, .count = 0),
      CASE("general.alignment is 24", bad, .count = 24),
      CASE("general.alignment is 131072", bad, .count = 131072),
      CASE("one of 32 parts", no, .key = "split.count"),
      CASE("not 1 to 255", bad, .name = long_name),
      CASE("not 1 to 255", bad, .name = ""),
      CASE("control character 0x1b", bad, .name = "\x1b[2J"),
      CASE("5 dimensions", bad, .n_dims = 5, .dims = {1, 1, 1, 1, 1}),
      CASE("4294967295 dimensions", bad, .n_dims = 0xffffffffu, .dims = {32}),
      CASE("0 elements in dimension 0", bad, .n_dims = 2, .dims = {32, 0}),
      CASE("-1 elements in dimension 0", bad, .dims = {UINT64_MAX}),
      CASE("elements in dimension", bad, .n_dims = 3, .dims = {1ull << 32, 1ull << 32, 2}),
      CASE("ends beyond", bad, .dims = {1ull << 62}),
      CASE("ends beyond", bad, .dims = {257}),
      CASE("ends beyond", bad, .offset = UINT64_MAX - 31),
      CASE("ends beyond", bad, .offset = 1024),
      CASE("not a multiple of the alignment 32", bad, .offset = 8),
      CASE("not whole blocks of 32 (Q8_0)", bad, .type = 8, .dims = {33}),
      CASE("not whole blocks of 256 (Q4_K)", bad, .type = 12, .dims = {128}),
      CASE("type 10 (Q2_K)", no, .type = 10),
      CASE("type 20 (IQ4_NL)", no, .type = 20),
      CASE("type 4000000000 (unknown)", no, .type = 4000000000u),
  };
#pragma GCC diagnostic pop
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    write_case(&cases[i]);
    open_bad(in_temp("case.gguf"), cases[i].status, cases[i].reason);
  }
}

/* ---- llama2.c ---------------------------------------------------------------------------------------------------------------- */

static void test_llama2c_reads_back(void **state) {
  (void)state;
  for (int shared = 0; shared <= 1; shared++) {
    buffer b = {0};
    make_llama2c(&b, shared);
    write_file("any.name", &b);
    sfa_weights *w = open_good(in_temp("any.name"));
    assert_string_equal(sfa_weights_format(w), "llama2.c");
    assert_int_equal(sfa_weights_count(w), 2 * 9 + 2 + !shared);
    /* Dim 8, hidden 12, 2 layers, 4 heads, 2 KV heads, vocabulary 6, 5 positions; the file holds 0, 1, 2, ... */
    float first = 0;
    static const struct {
      const char *name;
      int32_t n_dims, layers;
      int64_t rows, columns;
    } parts[] = {{"model.embed_tokens.weight", 2, 0, 6, 8},
                 {"input_layernorm.weight", 1, 2, 1, 8},
                 {"self_attn.q_proj.weight", 2, 2, 8, 8},
                 {"self_attn.k_proj.weight", 2, 2, 4, 8},
                 {"self_attn.v_proj.weight", 2, 2, 4, 8},
                 {"self_attn.o_proj.weight", 2, 2, 8, 8},
                 {"post_attention_layernorm.weight", 1, 2, 1, 8},
                 {"mlp.gate_proj.weight", 2, 2, 12, 8},
                 {"mlp.down_proj.weight", 2, 2, 8, 12},
                 {"mlp.up_proj.weight", 2, 2, 12, 8},
                 {"model.norm.weight", 1, 0, 1, 8}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
      for (int layer = 0; layer < (parts[i].layers ? parts[i].layers : 1); layer++) {
        char name[128];
        snprintf(name, sizeof name, "model.layers.%d.%s", layer, parts[i].name);
        check_floats(w, parts[i].layers ? name : parts[i].name, parts[i].n_dims, parts[i].rows, parts[i].columns, first);
        first += (float)(parts[i].rows * parts[i].columns);
      }
    first += 2 * 5 * 1; /* the tables of cosines and sines */
    if (!shared)
      check_floats(w, "lm_head.weight", 2, 6, 8, first);
    assert_float_equal(number(w, "hidden_size"), 8, 0);
    assert_float_equal(number(w, "intermediate_size"), 12, 0);
    assert_float_equal(number(w, "num_hidden_layers"), 2, 0);
    assert_float_equal(number(w, "num_attention_heads"), 4, 0);
    assert_float_equal(number(w, "num_key_value_heads"), 2, 0);
    assert_float_equal(number(w, "head_dim"), 2, 0);
    assert_float_equal(number(w, "vocab_size"), 6, 0);
    assert_float_equal(number(w, "max_position_embeddings"), 5, 0);
    assert_float_equal(number(w, "rms_norm_eps"), 1e-5, 0);
    assert_float_equal(number(w, "rope_theta"), 10000, 0);
    assert_string_equal(string(w, "model_type"), "llama2c");
    bool tied = !shared, interleaved = false;
    assert_true(sfa_meta_bool(w, "tie_word_embeddings", &tied));
    assert_int_equal(tied, shared);
    assert_true(sfa_meta_bool(w, "rope_interleaved", &interleaved) && interleaved);
    sfa_weights_close(w);

    put_zeros(&b, 4); /* one float too many */
    write_file("any.name", &b);
    open_bad(in_temp("any.name"), SFA_ERROR_FORMAT, "neither GGUF nor a llama2.c model");
    buffer_free(&b);
  }
  /* Sizes whose product wraps around to a small file. */
  static const int32_t absurd[][7] = {{1 << 30, 1 << 30, 1 << 30, 1, 1, 1 << 30, 1 << 30},
                                      {2, 2, 1 << 30, 1, 1, 2, 2},
                                      {INT32_MAX - 1, INT32_MAX, INT32_MAX, 1, 1, INT32_MIN, INT32_MAX},
                                      {8, 12, 2, 0, 2, 6, 5},
                                      {8, 12, 2, 4, 0, 6, 5},
                                      {8, 12, 2, 8, 2, 6, 5},
                                      {-8, 12, 2, 4, 2, 6, 5}};
  for (size_t i = 0; i < sizeof absurd / sizeof *absurd; i++) {
    buffer b = {0};
    put(&b, absurd[i], sizeof absurd[i]);
    put_zeros(&b, 100);
    write_file("any.name", &b);
    open_bad(in_temp("any.name"), SFA_ERROR_FORMAT, "neither GGUF nor a llama2.c model");
    buffer_free(&b);
  }
}

/* ---- safetensors ------------------------------------------------------------------------------------------------------------- */

static const char config[] = "{\"model_type\": \"llama\", \"hidden_size\": 64, \"rms_norm_eps\": 1e-06, \"tie_word_embeddings\": false,"
                             " \"pad\": null, \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0}, \"eos_token_id\": [1, 2.5],"
                             " \"layer_types\": [\"sliding_attention\", \"full_attention\"], \"flags\": [true, false], \"none\": [],"
                             " \"mixed\": [1, \"two\", {\"three\": 3}]}";

static void write_safetensors(const char *name, const char *header, size_t data_bytes) {
  buffer b = {0};
  put_safetensors(&b, header, data_bytes);
  write_file(name, &b);
  buffer_free(&b);
}

static void test_safetensors_reads_back(void **state) {
  (void)state;
  buffer b = {0};
  make_safetensors(&b);
  write_file("model.safetensors", &b);
  write_text("config.json", config);
  sfa_weights *w = open_good(temp_dir);
  assert_string_equal(sfa_weights_format(w), "safetensors");
  assert_int_equal(sfa_weights_bytes(w), (int64_t)b.bytes);
  assert_int_equal(sfa_weights_count(w), 4);
  check_floats(w, "wte.weight", 2, 3, 4, 0);
  check_floats(w, "half", 1, 1, 3, 1);
  check_floats(w, "brain", 2, 2, 2, 4);
  const sfa_tensor *scalar = sfa_weights_find(w, "scalar");
  assert_true(scalar && scalar->n_dims == 0 && scalar->n_elements == 1);
  assert_null(sfa_weights_find(w, "h.0.attn.bias")); /* a stored mask of bytes is passed over */
  assert_string_equal(string(w, "model_type"), "llama");
  assert_float_equal(number(w, "hidden_size"), 64, 0);
  assert_float_equal(number(w, "rms_norm_eps"), 1e-6, 0);
  assert_float_equal(number(w, "rope_scaling.factor"), 8, 0);
  assert_string_equal(string(w, "rope_scaling.rope_type"), "llama3");
  bool tied = true;
  assert_true(sfa_meta_bool(w, "tie_word_embeddings", &tied) && !tied);
  double value;
  const char *text;
  assert_int_equal(sfa_meta_array_len(w, "eos_token_id"), 2);
  assert_true(sfa_meta_array_number(w, "eos_token_id", 1, &value) && value == 2.5);
  assert_true(sfa_meta_array_string(w, "layer_types", 1, &text, NULL));
  assert_string_equal(text, "full_attention");
  assert_true(sfa_meta_array_number(w, "flags", 0, &value) && value == 1);
  assert_int_equal(sfa_meta_array_len(w, "none"), 0);
  assert_false(sfa_meta_number(w, "pad", &value));
  assert_int_equal(sfa_meta_array_len(w, "mixed"), -1);
  assert_float_equal(number(w, "mixed.0"), 1, 0);
  assert_string_equal(string(w, "mixed.1"), "two");
  assert_float_equal(number(w, "mixed.2.three"), 3, 0);
  assert_false(sfa_meta_number(w, "tokenizer_config/model_max_length", &value));
  sfa_weights_close(w);

  write_text("tokenizer_config.json", "{\"model_max_length\": 2048, \"added_tokens_decoder\": {\"0\": {\"content\": \"<s>\"}}}");
  write_text("generation_config.json", "{\"eos_token_id\": 7}");
  char with_slash[80];
  snprintf(with_slash, sizeof with_slash, "%s/", temp_dir);
  w = open_good(with_slash);
  assert_float_equal(number(w, "tokenizer_config/model_max_length"), 2048, 0);
  assert_string_equal(string(w, "tokenizer_config/added_tokens_decoder.0.content"), "<s>");
  assert_float_equal(number(w, "generation_config/eos_token_id"), 7, 0);
  sfa_weights_close(w);
  drop("tokenizer_config.json");
  drop("generation_config.json");
  buffer_free(&b);
}

static void test_safetensors_parts(void **state) {
  (void)state;
  drop("model.safetensors");
  write_text("config.json", config);
  open_bad(temp_dir, SFA_ERROR_IO, "neither model.safetensors nor");
  write_safetensors("one.safetensors",
                    "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
                    "\"b\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[8,12]}}",
                    12);
  write_safetensors("two.safetensors", "{\"c\":{\"dtype\":\"BF16\",\"shape\":[2,1],\"data_offsets\":[0,4]}}", 4);
  const char *index = "model.safetensors.index.json";
  write_text(
      index,
      "{\"metadata\":{\"total_size\":16},\"weight_map\":{\"a\":\"one.safetensors\",\"c\":\"two.safetensors\",\"b\":\"one.safetensors\"}}");
  sfa_weights *w = open_good(temp_dir);
  assert_int_equal(sfa_weights_count(w), 3);
  assert_non_null(sfa_weights_find(w, "b"));
  assert_int_equal(sfa_weights_find(w, "c")->shape[0], 2);
  sfa_weights_close(w);

  write_text(index, "{\"weight_map\":{\"d\":\"one.safetensors\"}}");
  open_bad(temp_dir, SFA_ERROR_FORMAT, "tensor d is not in one.safetensors");
  write_text(index, "{\"weight_map\":{\"a\":\"three.safetensors\"}}");
  open_bad(temp_dir, SFA_ERROR_IO, "three.safetensors");
  write_text(index, "{\"weight_map\":{\"a\":\"../one.safetensors\"}}");
  open_bad(temp_dir, SFA_ERROR_FORMAT, "not the name of a file beside it");
  write_text(index, "{\"weight_map\":{\"a\":\"..\"}}");
  open_bad(temp_dir, SFA_ERROR_FORMAT, "not the name of a file beside it");
  write_text(index, "{\"weight_map\":{\"a\":5}}");
  open_bad(temp_dir, SFA_ERROR_FORMAT, "not the name of a file beside it");
  write_text(index, "{\"weight_map\":{}}");
  open_bad(temp_dir, SFA_ERROR_FORMAT, "no weight_map");
  write_text(index, "{\"weight_map\":");
  open_bad(temp_dir, SFA_ERROR_FORMAT, "not valid JSON at offset");
  write_safetensors("two.safetensors", "{\"a\":{\"dtype\":\"BF16\",\"shape\":[2,1],\"data_offsets\":[0,4]}}", 4);
  write_text(index, "{\"weight_map\":{\"a\":\"one.safetensors\",\"c\":\"two.safetensors\"}}");
  open_bad(temp_dir, SFA_ERROR_FORMAT, "two tensors of the name a");
  drop(index);
}

static void test_safetensors_refuses(void **state) {
  (void)state;
  static const struct {
    sfa_status status;
    const char *reason, *header;
  } cases[] = {
      {SFA_ERROR_UNSUPPORTED, "tensor t is of type F64", "{\"t\":{\"dtype\":\"F64\",\"shape\":[1],\"data_offsets\":[0,8]}}"},
      {SFA_ERROR_UNSUPPORTED, "tensor t is of type F8_E4M3", "{\"t\":{\"dtype\":\"F8_E4M3\",\"shape\":[8],\"data_offsets\":[0,8]}}"},
      {SFA_ERROR_FORMAT, "lacks dtype", "{\"t\":{\"shape\":[2],\"data_offsets\":[0,8]}}"},
      {SFA_ERROR_FORMAT, "lacks dtype", "{\"t\":{\"dtype\":\"F32\",\"shape\":2,\"data_offsets\":[0,8]}}"},
      {SFA_ERROR_FORMAT, "lacks dtype", "{\"t\":[]}"},
      {SFA_ERROR_FORMAT, "two rising numbers", "{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}"},
      {SFA_ERROR_FORMAT, "two rising numbers", "{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,-8]}}"},
      {SFA_ERROR_FORMAT, "two rising numbers", "{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,8]}}"},
      {SFA_ERROR_FORMAT, "two rising numbers", "{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0.5,8]}}"},
      {SFA_ERROR_FORMAT, "two rising numbers", "{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,1e999]}}"},
      {SFA_ERROR_FORMAT, "it is cut short", "{\"t\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}"},
      {SFA_ERROR_FORMAT, "it is cut short",
       "{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[9007199254740984,9007199254740992]}}"},
      {SFA_ERROR_FORMAT, "4 bytes by its shape, 8", "{\"t\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,8]}}"},
      {SFA_ERROR_FORMAT, "not whole numbers", "{\"t\":{\"dtype\":\"F32\",\"shape\":[\"2\"],\"data_offsets\":[0,8]}}"},
      {SFA_ERROR_FORMAT, "not whole numbers", "{\"t\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}"},
      {SFA_ERROR_FORMAT, "0 elements in dimension 0", "{\"t\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}"},
      {SFA_ERROR_FORMAT, "elements in dimension 1", "{\"t\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,8]}}"},
      {SFA_ERROR_UNSUPPORTED, "more than 4 dimensions", "{\"t\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,2],\"data_offsets\":[0,8]}}"},
      {SFA_ERROR_FORMAT, "take 4 bytes, 8 are there", "{\"t\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}"},
      {SFA_ERROR_FORMAT, "two tensors of the name t",
       "{\"t\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"t\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}"},
      {SFA_ERROR_FORMAT, "control character", "{\"\\u001b[2J\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}"},
      {SFA_ERROR_FORMAT, "not 1 to 255", "{\"\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}"},
      {SFA_ERROR_FORMAT, "not an object", "[]"},
      {SFA_ERROR_FORMAT, "not valid JSON at offset", "{\"t\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}} }"},
      {SFA_ERROR_FORMAT, "not valid JSON at offset", "{\"1\":1,"},
  };
  write_text("config.json", config);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    write_safetensors("model.safetensors", cases[i].header, 8);
    open_bad(temp_dir, cases[i].status, cases[i].reason);
  }
  buffer b = {0};
  put_u64(&b, UINT64_MAX - 7);
  put_zeros(&b, 100);
  write_file("model.safetensors", &b);
  open_bad(temp_dir, SFA_ERROR_FORMAT, "18446744073709551608 header bytes in a file of 108");
  buffer_free(&b);
  put_u64(&b, 16);
  put(&b, "{}\0             ", 16);
  write_file("model.safetensors", &b);
  open_bad(temp_dir, SFA_ERROR_FORMAT, "a zero byte at offset 2");
  buffer_free(&b);
  write_text("model.safetensors", "");
  open_bad(temp_dir, SFA_ERROR_FORMAT, "0 header bytes in a file of 0");
  drop("model.safetensors");
}

static void test_config_refuses(void **state) {
  (void)state;
  drop("config.json");
  open_bad(temp_dir, SFA_ERROR_IO, "config.json");
  write_text("config.json", "");
  open_bad(temp_dir, SFA_ERROR_FORMAT, "not valid JSON at offset 0");
  write_text("config.json", "{\"a\": 1, \"a\": 2}");
  open_bad(temp_dir, SFA_ERROR_FORMAT, "the key a is there twice");
  buffer b = {0};
  for (int i = 0; i < 200000; i++) /* nesting far deeper than any stack */
    put(&b, "{\"a\":", 5);
  write_file("config.json", &b);
  open_bad(temp_dir, SFA_ERROR_FORMAT, "not valid JSON");
  buffer_free(&b);
  for (int i = 0; i < 900; i++) /* deep, but JSON: keys that nobody asks for are left out */
    put(&b, "{\"a\":", 5);
  put(&b, "1", 1);
  for (int i = 0; i < 900; i++)
    put(&b, "}", 1);
  write_file("config.json", &b);
  buffer_free(&b);
  make_safetensors(&b);
  write_file("model.safetensors", &b);
  buffer_free(&b);
  sfa_weights *w = open_good(temp_dir);
  double value;
  assert_false(sfa_meta_number(w, "a.a", &value));
  sfa_weights_close(w);
}

/* ---- Others ------------------------------------------------------------------------------------------------------------------ */

static void test_other_files(void **state) {
  (void)state;
  open_bad(in_temp("not there"), SFA_ERROR_IO, "No such file");
  write_text("x", "");
  open_bad(in_temp("x"), SFA_ERROR_FORMAT, "(0 bytes) is neither");
  write_text("x", "PK\3\4 zip");
  open_bad(in_temp("x"), SFA_ERROR_FORMAT, "PyTorch");
  buffer b = {0};
  make_safetensors(&b);
  write_file("x", &b);
  open_bad(in_temp("x"), SFA_ERROR_FORMAT, "give the directory");
  buffer_free(&b);
  write_text("x", "GGUF");
  open_bad(in_temp("x"), SFA_ERROR_FORMAT, "the version at offset 4");
  sfa_weights_close(NULL);
}

/* Enough names that the table grows several times, found one by one. */
static void test_many_names(void **state) {
  (void)state;
  enum { N = 3000 };
  buffer b = {0};
  put(&b, "GGUF", 4);
  put_u32(&b, 3);
  put_u64(&b, N);
  put_u64(&b, 0);
  for (int i = 0; i < N; i++) {
    char name[32];
    snprintf(name, sizeof name, "blk.%d.weight", i);
    put_tensor(&b, name, 1, (const uint64_t[]){1}, SFA_TENSOR_F32, 32 * (uint64_t)i);
  }
  put_padding(&b, 32);
  for (int i = 0; i < N; i++) {
    const float value = (float)i;
    put(&b, &value, sizeof value);
    put_padding(&b, 32);
  }
  write_file("many.gguf", &b);
  sfa_weights *w = open_good(in_temp("many.gguf"));
  assert_int_equal(sfa_weights_count(w), N);
  for (int i = 0; i < N; i++) {
    char name[32];
    snprintf(name, sizeof name, "blk.%d.weight", i);
    check_floats(w, name, 1, 1, 1, (float)i);
    assert_ptr_equal(sfa_weights_at(w, i), sfa_weights_find(w, name));
  }
  sfa_weights_close(w);
  buffer_free(&b);
}

static int set_up(void **state) {
  temp_begin(state);
  return sfa_context_create(NULL, &ctx) == SFA_OK ? 0 : -1;
}

static int tear_down(void **state) {
  sfa_context_destroy(ctx);
  return temp_end(state);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_gguf_reads_back),        cmocka_unit_test(test_gguf_refuses),      cmocka_unit_test(test_llama2c_reads_back),
      cmocka_unit_test(test_safetensors_reads_back), cmocka_unit_test(test_safetensors_parts), cmocka_unit_test(test_safetensors_refuses),
      cmocka_unit_test(test_config_refuses),         cmocka_unit_test(test_other_files),       cmocka_unit_test(test_many_names),
  };
  return cmocka_run_group_tests(tests, set_up, tear_down);
}
