/* Loaded models: logits of every family against Hugging Face transformers (tools/make_model_golden.py), same bits however a text is cut
 * and whatever runs it, choices of attention, files that are wrong. */
#include "unit_tools.h"

#include <math.h>

#include "base/half.h"
#include "model/model_parts.h"
#include "temp_files.h"

#define MODELS SFA_TEST_DATA "/golden/models/"

typedef struct golden {
  const char *folder, *file; /* file "" : the folder itself */
  const char *family, *format;
} golden;

static const golden goldens[] = {
    {"llama", "", "llama", "safetensors"},       {"llama", "/model.gguf", "llama", "gguf"},
    {"qwen2", "", "qwen2", "safetensors"},       {"qwen3", "", "qwen3", "safetensors"},
    {"qwen3", "/model.gguf", "qwen3", "gguf"},   {"gpt2", "", "gpt2", "safetensors"},
    {"gpt2", "/model.gguf", "gpt2", "gguf"},     {"gemma3", "", "gemma3", "safetensors"},
    {"gemma3", "/model.gguf", "gemma3", "gguf"}, {"stories260K", "/stories260K.bin", "llama", "llama2.c"},
};
enum { N_GOLDENS = sizeof goldens / sizeof *goldens };

static sfa_context *context_of(sfa_isa isa, int32_t n_threads) {
  sfa_context *ctx;
  sfa_context_options options = {.struct_size = sizeof options, .n_threads = n_threads, .isa = isa};
  assert_int_equal(sfa_context_create(&options, &ctx), SFA_OK);
  return ctx;
}

static void *read_file(const char *folder, const char *name, size_t *bytes) {
  char path[512];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  FILE *file = fopen(path, "rb");
  if (!file)
    fail_msg("%s is not there", path);
  fseek(file, 0, SEEK_END);
  *bytes = (size_t)ftell(file);
  rewind(file);
  void *data = malloc(*bytes + 1);
  assert_int_equal(fread(data, 1, *bytes, file), *bytes);
  ((char *)data)[*bytes] = 0;
  fclose(file);
  return data;
}

static sfa_status open_model(sfa_context *ctx, const char *path, sfa_weight_format format, sfa_model **model) {
  sfa_weights *weights;
  sfa_status status = sfa_weights_open(ctx, path, &weights);
  return status == SFA_OK ? sfa_model_load(ctx, weights, format, model) : status;
}

static sfa_model *must_open(sfa_context *ctx, const golden *g, sfa_weight_format format) {
  char path[512];
  sfa_model *model;
  snprintf(path, sizeof path, MODELS "%s%s", g->folder, g->file);
  if (open_model(ctx, path, format, &model) != SFA_OK)
    fail_msg("%s: %s", path, sfa_context_error(ctx));
  return model;
}

typedef struct text {
  int32_t *ids;
  int32_t n;
  float *logits; /* [n][vocab] of the reference */
  size_t logit_bytes;
} text;

static text read_text(const golden *g) {
  char folder[512];
  size_t bytes;
  text t = {0};
  snprintf(folder, sizeof folder, MODELS "%s", g->folder);
  t.ids = read_file(folder, "ids.i32", &bytes);
  t.n = (int32_t)(bytes / sizeof(int32_t));
  t.logits = read_file(folder, "logits.f32", &t.logit_bytes);
  return t;
}

static void free_text(text *t) {
  free(t->ids);
  free(t->logits);
}

/* Logits [n][vocab] of a text in steps of chunk_len tokens. */
static float *logits_of(const sfa_model *model, const sfa_attention_choice *choice, const text *t, int32_t chunk_len) {
  sfa_model_info info;
  sfa_forward *forward;
  sfa_model_describe(model, &info);
  if (sfa_forward_create(model, choice, t->n, chunk_len, &forward) != SFA_OK)
    fail_msg("%s", sfa_context_error(sfa_model_context(model)));
  float *hidden = malloc((size_t)t->n * (size_t)info.hidden_dim * sizeof *hidden);
  float *logits = malloc((size_t)t->n * (size_t)info.vocab_size * sizeof *logits);
  int64_t attention_ns = 0;
  for (int32_t i = 0; i < t->n; i += chunk_len) {
    int32_t n = chunk_len < t->n - i ? chunk_len : t->n - i;
    assert_int_equal(sfa_forward_run(forward, t->ids + i, n, hidden + (size_t)i * (size_t)info.hidden_dim, &attention_ns), SFA_OK);
    assert_int_equal(sfa_forward_len(forward), i + n);
    assert_int_equal(sfa_model_logits(model, n, hidden + (size_t)i * (size_t)info.hidden_dim, logits + (size_t)i * (size_t)info.vocab_size),
                     SFA_OK);
  }
  assert_true(attention_ns > 0);
  assert_true(sfa_forward_kv_bytes(forward) > 0);
  sfa_forward_destroy(forward);
  free(hidden);
  return logits;
}

static double relative_error(const float *found, const float *expected, size_t bytes) {
  double error = 0, largest = 0;
  for (size_t i = 0; i < bytes / sizeof(float); i++) {
    double e = fabs((double)found[i] - (double)expected[i]);
    error = !(e <= error) ? e : error;
    largest = fmax(largest, fabs((double)expected[i]));
  }
  return error / largest;
}

static void assert_bits(const float *found, const float *expected, size_t bytes, const char *what) {
  if (memcmp(found, expected, bytes) != 0)
    fail_msg("%s: other bits, error %g", what, relative_error(found, expected, bytes));
}

/* ---- Logits ------------------------------------------------------------------------------------------------------------------------ */

static void families(void **state) {
  (void)state;
  sfa_context *ctx = context_of(SFA_ISA_DEFAULT, 2);
  for (int i = 0; i < N_GOLDENS; i++) {
    sfa_model *model = must_open(ctx, &goldens[i], SFA_WEIGHTS_F32);
    sfa_model_info info;
    sfa_model_describe(model, &info);
    assert_string_equal(info.family, goldens[i].family);
    assert_string_equal(info.format, goldens[i].format);
    text t = read_text(&goldens[i]);
    assert_int_equal((size_t)t.n * (size_t)info.vocab_size * sizeof(float), t.logit_bytes);
    const sfa_attention_choice exact = {.struct_size = sizeof exact, .cache_k = SFA_F32, .cache_v = SFA_F32};
    float *logits = logits_of(model, &exact, &t, t.n);
    double error = relative_error(logits, t.logits, t.logit_bytes);
    if (!(error <= 2e-5))
      fail_msg("%s%s: relative error %g", goldens[i].folder, goldens[i].file, error);
    free(logits);
    free_text(&t);
    sfa_model_destroy(model);
  }
  sfa_context_destroy(ctx);
}

/* Storage that loses nothing of a 16-bit file gives the bits of f32; what rounds weights stays near. (Without AVX-512: a processor with
 * matrix instructions rounds the inputs of a bf16 layer as well; see bf16_on_this_processor.) */
static void weight_formats(void **state) {
  (void)state;
  sfa_context *ctx = context_of(isa_at_most(SFA_ISA_AVX2), 2);
  const sfa_attention_choice exact = {.struct_size = sizeof exact, .cache_k = SFA_F32, .cache_v = SFA_F32};
  for (int i = 0; i < N_GOLDENS; i++) {
    text t = read_text(&goldens[i]);
    float *by_format[4];
    for (int format = 0; format < 4; format++) {
      sfa_model *model = must_open(ctx, &goldens[i], (sfa_weight_format)format);
      sfa_model_info info;
      sfa_model_describe(model, &info);
      if (format != SFA_WEIGHTS_AUTO)
        assert_int_equal(info.weights, format);
      by_format[format] = logits_of(model, &exact, &t, t.n);
      sfa_model_destroy(model);
    }
    assert_bits(by_format[SFA_WEIGHTS_AUTO], by_format[SFA_WEIGHTS_F32], t.logit_bytes, "AUTO of a file in floats");
    bool is_bf16 = strcmp(goldens[i].folder, "llama") == 0;
    if (is_bf16)
      assert_bits(by_format[SFA_WEIGHTS_BF16], by_format[SFA_WEIGHTS_F32], t.logit_bytes, "BF16 of a bf16 file");
    for (int format = SFA_WEIGHTS_BF16; format < 4; format++) {
      double error = relative_error(by_format[format], by_format[SFA_WEIGHTS_F32], t.logit_bytes);
      if (!(error <= 0.1) || (error == 0 && !is_bf16))
        fail_msg("%s%s, format %d: relative error %g", goldens[i].folder, goldens[i].file, format, error);
      free(by_format[format]);
    }
    free(by_format[SFA_WEIGHTS_AUTO]);
    free(by_format[SFA_WEIGHTS_F32]);
    free_text(&t);
  }
  sfa_context_destroy(ctx);
}

/* A bf16 model as this processor multiplies it: near f32, and the same bits for a prompt in one piece and in others. */
static void bf16_on_this_processor(void **state) {
  (void)state;
  const sfa_attention_choice exact = {.struct_size = sizeof exact, .cache_k = SFA_F32, .cache_v = SFA_F32};
  text t = read_text(&goldens[0]);
  sfa_context *ctx = context_of(SFA_ISA_DEFAULT, 2), *alone = context_of(SFA_ISA_DEFAULT, 1);
  sfa_model *reference = must_open(ctx, &goldens[0], SFA_WEIGHTS_F32), *model = must_open(ctx, &goldens[0], SFA_WEIGHTS_BF16),
            *model_alone = must_open(alone, &goldens[0], SFA_WEIGHTS_BF16);
  float *f32 = logits_of(reference, &exact, &t, t.n), *whole = logits_of(model, &exact, &t, t.n),
        *pieces = logits_of(model_alone, &exact, &t, 7);
  double error = relative_error(whole, f32, t.logit_bytes);
  if (!(error <= 0.1))
    fail_msg("relative error %g", error);
  assert_bits(pieces, whole, t.logit_bytes, "pieces of 7 tokens on one thread");
  free(f32);
  free(whole);
  free(pieces);
  free_text(&t);
  sfa_model_destroy(reference);
  sfa_model_destroy(model);
  sfa_model_destroy(model_alone);
  sfa_context_destroy(ctx);
  sfa_context_destroy(alone);
}

/* However the text is cut, on every instruction set, with one thread and two. */
static void same_bits(void **state) {
  (void)state;
  enum { PART = 40 }; /* tokens: more than a window of Gemma 3's */
  static const int32_t chunks[] = {1, 7, 32};
  const sfa_attention_choice choices[] = {
      {.struct_size = sizeof *choices},
      {.struct_size = sizeof *choices, .sparse = 1, .k = 4},
      {.struct_size = sizeof *choices, .sparse = 1, .k = 3, .k_q = -1, .layers = 1},
  };
  for (int i = 0; i < N_GOLDENS; i++)
    for (size_t c = 0; c < 3; c += 1 + (size_t)i % 2) { /* dense; codes; K-only on global layers */
      text t = read_text(&goldens[i]);
      t.logit_bytes = t.logit_bytes / (size_t)t.n * PART;
      t.n = PART;
      sfa_weight_format format = c == 0 ? SFA_WEIGHTS_F32 : SFA_WEIGHTS_INT8;
      sfa_context *ctx = context_of(SFA_ISA_SCALAR, 1);
      sfa_model *model = must_open(ctx, &goldens[i], format);
      float *expected = logits_of(model, &choices[c], &t, t.n);
      sfa_model_destroy(model);
      sfa_context_destroy(ctx);
      for (size_t s = 0; s < 3; s++) {
        sfa_isa isa = (sfa_isa)sfa_min64((int64_t)sfa_isa_best(), SFA_ISA_SCALAR + (int64_t)s);
        ctx = context_of(isa, 1 + (int32_t)s % 2);
        model = must_open(ctx, &goldens[i], format);
        float *found = logits_of(model, &choices[c], &t, chunks[s]);
        assert_bits(found, expected, t.logit_bytes, goldens[i].folder);
        free(found);
        sfa_model_destroy(model);
        sfa_context_destroy(ctx);
      }
      free(expected);
      free_text(&t);
    }
}

/* Codes that keep everything are the dense rows. */
static void all_features_is_dense(void **state) {
  (void)state;
  sfa_context *ctx = context_of(SFA_ISA_DEFAULT, 2);
  for (int i = 0; i < N_GOLDENS; i++) {
    sfa_model *model = must_open(ctx, &goldens[i], SFA_WEIGHTS_F32);
    text t = read_text(&goldens[i]);
    sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = 1, .k = model->config.head_dim};
    float *dense = logits_of(model, NULL, &t, 32), *full = logits_of(model, &choice, &t, 32);
    choice.k = 2;
    float *sparse = logits_of(model, &choice, &t, 32);
    assert_bits(full, dense, t.logit_bytes, goldens[i].folder);
    assert_true(relative_error(sparse, dense, t.logit_bytes) > 0.01);
    free(dense);
    free(full);
    free(sparse);
    free_text(&t);
    sfa_model_destroy(model);
  }
  sfa_context_destroy(ctx);
}

/* ---- Timeline ---------------------------------------------------------------------------------------------------------------------- */

static void timeline(void **state) {
  (void)state;
  sfa_context *ctx = context_of(SFA_ISA_DEFAULT, 1);
  sfa_model *model = must_open(ctx, &goldens[0], SFA_WEIGHTS_F32);
  text t = read_text(&goldens[0]);
  const int32_t listed[] = {1};
  const sfa_attention_choice hybrid = {
      .struct_size = sizeof hybrid, .sparse = 1, .k = 4, .layers = 2, .layer_list = listed, .n_layer_list = 1};
  float first[20 * 48], again[20 * 48];
  int64_t ns = 0;
  sfa_forward *f;
  assert_int_equal(model->config.hidden_dim, 48);
  assert_int_equal(sfa_forward_create(model, &hybrid, 40, 20, &f), SFA_OK);
  assert_int_equal(sfa_forward_run(f, t.ids, 20, first, &ns), SFA_OK);
  assert_int_equal(sfa_forward_run(f, t.ids + 20, 20, first, &ns), SFA_OK);
  assert_int_equal(sfa_forward_run(f, t.ids, 1, again, &ns), SFA_ERROR_RANGE);
  assert_non_null(strstr(sfa_context_error(ctx), "context of 40"));
  assert_int_equal(sfa_forward_truncate(f, 41), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_forward_truncate(f, 20), SFA_OK);
  assert_int_equal(sfa_forward_len(f), 20);
  const int32_t unknown[2] = {3, 200};
  assert_int_equal(sfa_forward_run(f, unknown, 2, again, &ns), SFA_ERROR_RANGE);
  assert_non_null(strstr(sfa_context_error(ctx), "200"));
  assert_int_equal(sfa_forward_run(f, t.ids, 21, again, &ns), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_forward_run(f, t.ids, 0, again, &ns), SFA_ERROR_ARGUMENT);
  assert_int_equal(sfa_forward_len(f), 20);
  assert_int_equal(sfa_forward_run(f, t.ids + 20, 20, again, &ns), SFA_OK);
  assert_memory_equal(again, first, sizeof first);
  sfa_forward_destroy(f);
  sfa_forward_destroy(NULL);
  assert_int_equal(sfa_forward_create(model, NULL, 0, 1, &f), SFA_ERROR_ARGUMENT);
  free_text(&t);
  sfa_model_destroy(model);
  sfa_context_destroy(ctx);
}

/* A key that int8 cannot hold fails in the middle of a step: all layers are as before it. */
static void failed_step(void **state) {
  (void)state;
  sfa_context *ctx = context_of(SFA_ISA_DEFAULT, 1);
  sfa_model *model = must_open(ctx, &goldens[2], SFA_WEIGHTS_F32);
  text t = read_text(&goldens[2]);
  const sfa_attention_choice coded = {.struct_size = sizeof coded, .sparse = 1, .k = 4, .cache_k = SFA_F16, .cache_v = SFA_F32};
  float first[10 * 48], again[10 * 48];
  int64_t ns = 0;
  sfa_forward *f;
  assert_int_equal(sfa_forward_create(model, &coded, 40, 10, &f), SFA_OK);
  assert_int_equal(sfa_forward_run(f, t.ids, 10, first, &ns), SFA_OK);
  float usual = model->layers[1].attention_norm.weight[0];
  model->layers[1].attention_norm.weight[0] = 1e30f;
  assert_int_equal(sfa_forward_run(f, t.ids + 10, 10, again, &ns), SFA_ERROR_RANGE);
  assert_int_equal(sfa_forward_len(f), 10);
  model->layers[1].attention_norm.weight[0] = usual;
  assert_int_equal(sfa_forward_truncate(f, 0), SFA_OK);
  assert_int_equal(sfa_forward_run(f, t.ids, 10, again, &ns), SFA_OK);
  assert_memory_equal(again, first, sizeof first);
  sfa_forward_destroy(f);
  free_text(&t);
  sfa_model_destroy(model);
  sfa_context_destroy(ctx);
}

static void learned_positions_end(void **state) {
  (void)state;
  sfa_context *ctx = context_of(SFA_ISA_DEFAULT, 1);
  sfa_model *model = must_open(ctx, &goldens[5], SFA_WEIGHTS_F32);
  sfa_forward *f;
  assert_int_equal(sfa_forward_create(model, NULL, 129, 1, &f), SFA_ERROR_RANGE);
  assert_int_equal(sfa_forward_create(model, NULL, 128, 1, &f), SFA_OK);
  sfa_forward_destroy(f);
  sfa_model_destroy(model);
  sfa_context_destroy(ctx);
}

/* ---- Choices ----------------------------------------------------------------------------------------------------------------------- */

static void choices(void **state) {
  (void)state;
  sfa_context *ctx = context_of(SFA_ISA_DEFAULT, 1);
  sfa_model *model = must_open(ctx, &goldens[7], SFA_WEIGHTS_AUTO); /* Gemma 3: local, global, local, global; D = 16, G = 2 */
  const int32_t listed[] = {3, 0}, beyond[] = {4};
  const struct {
    sfa_attention_choice choice;
    int32_t k[4], k_q[4];
  } good[] = {
      {{.sparse = 0, .k = 8}, {0, 0, 0, 0}, {0, 0, 0, 0}},
      {{.sparse = 1}, {0, 0, 0, 0}, {0, 0, 0, 0}}, /* the default of 16 is all of 16 */
      {{.sparse = 1, .k = 8}, {8, 8, 8, 8}, {8, 8, 8, 8}},
      {{.sparse = 1, .k = 8, .k_q = -1}, {8, 8, 8, 8}, {0, 0, 0, 0}},
      {{.sparse = 1, .k = 8, .k_q = 5, .layers = 1}, {0, 8, 0, 8}, {0, 5, 0, 5}},
      {{.sparse = 1, .k = 99, .k_q = 4}, {0, 0, 0, 0}, {4, 4, 4, 4}},
      {{.sparse = 1, .k = 2, .layers = 2, .layer_list = listed, .n_layer_list = 2}, {2, 0, 0, 2}, {2, 0, 0, 2}},
  };
  const sfa_attention_choice bad[] = {
      {.sparse = 1, .k = -1},
      {.sparse = 1, .k_q = -2},
      {.sparse = 1, .layers = 3},
      {.sparse = 1, .layers = 2, .layer_list = beyond, .n_layer_list = 1},
      {.sparse = 1, .layers = 2, .n_layer_list = 1},
      {.cache_k = (sfa_dtype)9},
      {.cache_v = (sfa_dtype)-1},
      {.policy = (sfa_policy)-1},
      {.policy = (sfa_policy)(SFA_POLICY_SP_INT8 + 1)},
      {.policy = SFA_POLICY_POSTINGS}, /* wants an index that no session gives it */
  };
  int32_t k[8], k_q[8]; /* two heads a layer */
  sfa_dtype k_sparse, k_dense, v;
  for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
    sfa_attention_choice choice = good[i].choice;
    choice.struct_size = sizeof choice;
    assert_int_equal(sfa_model_resolve(model, &choice, k, k_q, &k_sparse, &k_dense, &v), SFA_OK);
    for (int head = 0; head < 8; head++)
      assert_true(k[head] == good[i].k[head / 2] && k_q[head] == good[i].k_q[head / 2]);
    assert_true(k_sparse == SFA_I8 && k_dense == SFA_F32 && v == SFA_F32); /* the file is f32 */
  }
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    sfa_attention_choice choice = bad[i];
    choice.struct_size = sizeof choice;
    assert_int_equal(sfa_model_resolve(model, &choice, k, k_q, &k_sparse, &k_dense, &v), SFA_ERROR_ARGUMENT);
  }
  assert_int_equal(sfa_model_resolve(model, &bad[0], k, k_q, &k_sparse, &k_dense, &v), SFA_ERROR_ARGUMENT); /* struct_size 0 */

  size_t bytes;
  sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = 1, .k = 4, .layers = 1, .cache_v = SFA_BF16};
  assert_int_equal(sfa_model_kv_bytes(model, NULL, &bytes), SFA_OK);
  assert_int_equal(bytes, 4 * 2 * (16 + 16) * 4);
  assert_int_equal(sfa_model_kv_bytes(model, &choice, &bytes), SFA_OK);
  assert_int_equal(bytes, 2 * 2 * (16 * 4 + 16 * 2) + 2 * 2 * (4 * 2 + 2 + 16 * 2)); /* two layers of dense f32 keys, two of codes */
  sfa_model_destroy(model);
  sfa_context_destroy(ctx);
}

static void facts(void **state) {
  (void)state;
  sfa_context *ctx = context_of(SFA_ISA_DEFAULT, 1);
  sfa_model *model = must_open(ctx, &goldens[1], SFA_WEIGHTS_AUTO);
  sfa_model_info info;
  sfa_tensor_info tensor;
  sfa_model_describe(model, &info);
  assert_string_equal(info.name, "golden llama");
  assert_true(info.n_layers == 3 && info.n_heads == 6 && info.n_kv_heads == 2 && info.head_dim == 8 && info.hidden_dim == 48);
  assert_true(info.intermediate_dim == 72 && info.vocab_size == 200 && info.context_len == 128 && info.is_instruct == 0);
  assert_true(info.weights == SFA_WEIGHTS_F32 && info.sfa_k == 0 && info.sfa_k_q == 0);
  int64_t n_elements = 0, i = 0;
  for (; sfa_model_tensor(model, i, &tensor); i++)
    n_elements += tensor.shape[0] * tensor.shape[1] * tensor.shape[2] * tensor.shape[3];
  assert_int_equal(i, info.n_tensors);
  assert_int_equal(n_elements, info.n_parameters);
  assert_int_equal(sfa_model_tensor(model, -1, &tensor), 0);
  sfa_model_destroy(model);
  sfa_model_destroy(NULL);
  sfa_context_destroy(ctx);
}

/* ---- Blocks of quantised files ----------------------------------------------------------------------------------------------------- */

/* Every format as blocks gives its own numbers back: exactly where its integers and scales are kept as they are. */
static void quantised_rows(void **state) {
  (void)state;
  static const struct {
    const char *file;
    sfa_tensor_type type;
    double limit; /* of the largest magnitude in the row */
  } formats[] = {
      {"q4_0.bin", SFA_TENSOR_Q4_0, 0},     {"q4_1.bin", SFA_TENSOR_Q4_1, 0},     {"q5_0.bin", SFA_TENSOR_Q5_0, 0},
      {"q5_1.bin", SFA_TENSOR_Q5_1, 0},     {"q8_0.bin", SFA_TENSOR_Q8_0, 0},     {"q4_k.bin", SFA_TENSOR_Q4_K, 0.002},
      {"q5_k.bin", SFA_TENSOR_Q5_K, 0.002}, {"q6_k.bin", SFA_TENSOR_Q6_K, 0.005}, {"f16.bin", SFA_TENSOR_F16, 0.005},
  };
  for (size_t f = 0; f < sizeof formats / sizeof *formats; f++) {
    size_t bytes;
    uint8_t *data = read_file(SFA_TEST_DATA "/golden/quant", formats[f].file, &bytes);
    int64_t block_len = sfa_tensor_block_len(formats[f].type), block_bytes = sfa_tensor_block_bytes(formats[f].type);
    int64_t n_blocks = (int64_t)bytes / (block_bytes + block_len * 4), n = n_blocks * block_len / 2 / 256 * 256; /* two rows */
    assert_true(n >= 32 || (n = n_blocks * block_len / 2) % 32 == 0);
    sfa_tensor tensor = {"golden", formats[f].type, 2, {2, n, 1, 1}, data, 2 * n, 2 * n / block_len * block_bytes};
    sfa_weight_rows rows = {&tensor, false};
    sfa_linear_source source;
    sfa_storage storage = sfa_weight_storage(&tensor, SFA_WEIGHTS_INT8);
    sfa_weight_source(&rows, storage, &source);
    uint8_t *u = malloc((size_t)n);
    uint16_t *scale = malloc((size_t)n / 32 * 2), *minimum = malloc((size_t)n / 32 * 2);
    float *expected = malloc((size_t)n * sizeof *expected);
    for (int64_t row = 0; row < 2; row++) {
      double largest = 0, error = 0;
      source.row_blocks(source.arg, row, u, scale, minimum);
      source.row_f32(source.arg, row, expected);
      for (int64_t i = 0; i < n; i++) {
        assert_true(storage == SFA_STORE_U8 || u[i] < 16);
        float low = source.has_minimum ? sfa_f32_from_f16(minimum[i / 32]) : 0.0f;
        float value = sfa_f32_from_f16(scale[i / 32]) * (float)(u[i] - source.offset) + low;
        largest = fmax(largest, fabs((double)expected[i]));
        error = fmax(error, fabs((double)value - (double)expected[i]));
      }
      if (!(error <= formats[f].limit * largest))
        fail_msg("%s: error %g of %g", formats[f].file, error, largest);
    }
    free(u);
    free(scale);
    free(minimum);
    free(expected);
    free(data);
  }
}

/* ---- Wrong files ------------------------------------------------------------------------------------------------------------------- */

/* A golden model with one text of its config.json replaced. */
static void write_variant(const char *folder, const char *from, const char *to, char directory[TEMP_DIR_BYTES]) {
  char source[512];
  snprintf(source, sizeof source, MODELS "%s", folder);
  make_variant(source, from, to, directory);
}

static void wrong_files(void **state) {
  (void)state;
  static const struct {
    const char *folder, *from, *to;
    sfa_status status;
    const char *says[2];
  } wrongs[] = {
      {"llama", "\"llama\"", "\"bert\"", SFA_ERROR_UNSUPPORTED, {"bert", "Qwen3"}},
      {"llama", "\"model_type\"", "\"kind\"", SFA_ERROR_FORMAT, {"model_type", ""}},
      {"llama", "\"silu\"", "\"relu\"", SFA_ERROR_UNSUPPORTED, {"relu", "silu"}},
      {"llama", "\"llama3\"", "\"yarn\"", SFA_ERROR_UNSUPPORTED, {"yarn", "llama3"}},
      {"llama", "\"low_freq_factor\"", "\"other_factor\"", SFA_ERROR_FORMAT, {"low_freq_factor", ""}},
      {"llama", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4", SFA_ERROR_FORMAT, {"model.layers.3.input_layernorm.weight", ""}},
      {"llama", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 0", SFA_ERROR_FORMAT, {"num_hidden_layers", ""}},
      {"llama", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 2.5", SFA_ERROR_FORMAT, {"num_hidden_layers", "2.5"}},
      {"llama", "\"hidden_size\": 48", "\"hidden_size\": 56", SFA_ERROR_FORMAT, {"200 x 48", "200 x 56"}},
      {"llama",
       "\"intermediate_size\": 72",
       "\"intermediate_size\": 80",
       SFA_ERROR_FORMAT,
       {"gate_proj.weight has shape 72 x 48", "80 x 48"}},
      {"llama", "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 4", SFA_ERROR_FORMAT, {"6 query heads", "4 key heads"}},
      {"llama", "\"head_dim\": 8", "\"head_dim\": 12", SFA_ERROR_UNSUPPORTED, {"12", "multiple of 8"}},
      {"llama", "\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": -1", SFA_ERROR_FORMAT, {"rms_norm_eps", ""}},
      {"llama", "{", "{\"num_local_experts\": 8,", SFA_ERROR_UNSUPPORTED, {"experts", ""}},
      {"llama",
       "{",
       "{\"sparse_attention_config\": {\"k\": 4, \"order\": \"mid_rope\"},",
       SFA_ERROR_UNSUPPORTED,
       {"mid_rope", "post_rope"}},
      {"llama", "{", "{\"sparse_attention_config\": {\"k\": 5, \"two_of_four\": true},", SFA_ERROR_FORMAT, {"two_of_four", "head_dim 8"}},
      {"llama", "{", "{\"sparse_attention_config\": {\"k\": 4, \"algorithm\": \"nsa\"},", SFA_ERROR_UNSUPPORTED, {"nsa", ""}},
      {"llama", "{", "{\"sparse_attention_config\": {\"k\": 9},", SFA_ERROR_FORMAT, {"9", "head_dim 8"}},
      {"llama", "{", "{\"sparse_attention_config\": {\"k\": [4, 4]},", SFA_ERROR_FORMAT, {"2 numbers", "3 layers"}},
      {"llama", "{", "{\"sparse_attention_config\": {\"k\": [4, [4, 4, 4], 4]},", SFA_ERROR_FORMAT, {"k.1 lists 3 numbers", "2 kv heads"}},
      {"llama", "{", "{\"sparse_attention_config\": {\"k\": [4, [4, 4]]},", SFA_ERROR_FORMAT, {"k.2", ""}},
      {"llama", "{", "{\"sparse_attention_config\": {\"k\": [4, [4, 9], 4]},", SFA_ERROR_FORMAT, {"holds 9", "head_dim 8"}},
      {"llama", "{", "{\"sparse_attention_config\": {\"k\": 4, \"k_q\": [4, 4, -1]},", SFA_ERROR_FORMAT, {"k_q holds -1", ""}},
      {"llama", "{", "{\"sparse_attention_config\": {\"k\": 4, \"layers\": [3]},", SFA_ERROR_FORMAT, {"0 to 2", ""}},
      {"gemma3", "\"sliding_window\": 24", "\"sliding_window\": -3", SFA_ERROR_FORMAT, {"sliding_window", "-3"}},
      {"gemma3", "\"query_pre_attn_scalar\": 24", "\"query_pre_attn_scalar\": 0", SFA_ERROR_FORMAT, {"query_pre_attn_scalar", ""}},
      {"gemma3", "\"sliding_attention\",", "", SFA_ERROR_FORMAT, {"layer_types", "3 layers"}},
      {"gpt2", "\"scale_attn_weights\": true", "\"scale_attn_weights\": false", SFA_ERROR_UNSUPPORTED, {"scale_attn_weights", ""}},
      {"gpt2", "\"n_positions\": 128", "\"n_ctx\": 128", SFA_ERROR_FORMAT, {"n_positions", ""}},
  };
  sfa_context *ctx = context_of(SFA_ISA_DEFAULT, 1);
  for (size_t i = 0; i < sizeof wrongs / sizeof *wrongs; i++) {
    char directory[TEMP_DIR_BYTES];
    sfa_model *model = (sfa_model *)ctx;
    write_variant(wrongs[i].folder, wrongs[i].from, wrongs[i].to, directory);
    sfa_status status = open_model(ctx, directory, SFA_WEIGHTS_AUTO, &model);
    remove_tree(directory);
    const char *error = sfa_context_error(ctx);
    if (status != wrongs[i].status || !strstr(error, wrongs[i].says[0]) || !strstr(error, wrongs[i].says[1]))
      fail_msg("%s -> %s: %s, %s", wrongs[i].from, wrongs[i].to, sfa_status_name(status), error);
    assert_null(model);
  }
  sfa_context_destroy(ctx);
}

/* What a file asks for is what a choice without numbers gives. */
static void file_asks_for_sparsity(void **state) {
  (void)state;
  char directory[TEMP_DIR_BYTES];
  sfa_context *ctx = context_of(SFA_ISA_DEFAULT, 1);
  sfa_model *model;
  sfa_model_info info;
  write_variant("llama", "{", "{\"sparse_attention_config\": {\"algorithm\": \"sfa\", \"k\": [2, 4, 6], \"k_q\": 0, \"layers\": [0, 2]},",
                directory);
  assert_int_equal(open_model(ctx, directory, SFA_WEIGHTS_AUTO, &model), SFA_OK);
  sfa_model_describe(model, &info);
  assert_true(info.sfa_k == 6 && info.sfa_k_q == 0);
  int32_t k[6], k_q[6]; /* two heads a layer */
  sfa_dtype k_sparse, k_dense, v;
  sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = 1};
  assert_int_equal(sfa_model_resolve(model, &choice, k, k_q, &k_sparse, &k_dense, &v), SFA_OK);
  assert_true(k[0] == 2 && k[1] == 2 && k[2] == 0 && k[3] == 0 && k[4] == 6 && k[5] == 6 && k_q[0] == 0 && k_q[5] == 0);
  assert_true(k_sparse == SFA_I8 && k_dense == SFA_BF16 && v == SFA_BF16); /* the file is bf16 */
  choice.k = 3;
  choice.k_q = 5;
  assert_int_equal(sfa_model_resolve(model, &choice, k, k_q, &k_sparse, &k_dense, &v), SFA_OK);
  assert_true(k[0] == 3 && k[1] == 3 && k[2] == 0 && k[5] == 3 && k_q[0] == 5 && k_q[2] == 0);
  sfa_model_destroy(model);
  remove_tree(directory);
  /* A number a head; without one for queries they keep what their keys keep, in every layer its own. */
  write_variant("llama", "{", "{\"sparse_attention_config\": {\"k\": [[2, 4], 3, [0, 5]]},", directory);
  assert_int_equal(open_model(ctx, directory, SFA_WEIGHTS_AUTO, &model), SFA_OK);
  sfa_model_describe(model, &info);
  assert_true(info.sfa_k == 5 && info.sfa_k_q == 5);
  choice.k = choice.k_q = 0;
  assert_int_equal(sfa_model_resolve(model, &choice, k, k_q, &k_sparse, &k_dense, &v), SFA_OK);
  assert_memory_equal(k, ((int32_t[]){2, 4, 3, 3, 0, 5}), sizeof k);
  assert_memory_equal(k_q, k, sizeof k);
  choice.k_q = -1;
  assert_int_equal(sfa_model_resolve(model, &choice, k, k_q, &k_sparse, &k_dense, &v), SFA_OK);
  assert_memory_equal(k_q, ((int32_t[6]){0}), sizeof k_q);
  sfa_model_destroy(model);
  remove_tree(directory);
  sfa_context_destroy(ctx);
}

/* What layer 0 of the llama makes of a text: its queries as they are scored, its stored keys as dense rows. */
enum { SEEN_TOKENS = 24, SEEN_HEADS = 6, SEEN_KV_HEADS = 2, SEEN_DIM = 8 };
typedef struct seen_rows {
  float rows[SEEN_TOKENS][SEEN_HEADS + SEEN_KV_HEADS][SEEN_DIM];
  int32_t k_keys, k_queries;
} seen_rows;

static sfa_status see_rows(void *user, const sfa_probe *probe) {
  seen_rows *seen = user;
  if (probe->layer != 0)
    return SFA_OK;
  seen->k_keys = sfa_cache_k(probe->cache, probe->cache_layer);
  seen->k_queries = probe->k_queries;
  for (int64_t t = 0; t < probe->n_tokens; t++)
    memcpy(seen->rows[probe->first + t], probe->queries + t * probe->query_stride, SEEN_HEADS * SEEN_DIM * sizeof(float));
  for (int32_t g = 0; g < SEEN_KV_HEADS; g++)
    for (int64_t t = probe->first; t < probe->first + probe->n_tokens; t++) {
      uint8_t ids[SEEN_DIM] = {0, 1, 2, 3, 4, 5, 6, 7};
      float values[SEEN_DIM], *row = seen->rows[t][SEEN_HEADS + g];
      assert_int_equal(sfa_cache_read_keys(probe->cache, 0, probe->cache_layer, g, t, 1, ids, values), SFA_OK);
      memset(row, 0, SEEN_DIM * sizeof *row);
      for (int32_t i = 0; i < (seen->k_keys ? seen->k_keys : SEEN_DIM); i++)
        row[ids[i]] = values[i];
    }
  return SFA_OK;
}

static void see_model(const char *sparsity, bool sparse, seen_rows *seen) {
  char directory[TEMP_DIR_BYTES], config[256];
  snprintf(config, sizeof config, "{\"sparse_attention_config\": %s,", sparsity);
  write_variant("llama", "{", config, directory);
  sfa_context *ctx = context_of(SFA_ISA_DEFAULT, 2);
  sfa_model *model;
  sfa_forward *forward = NULL;
  sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = sparse, .cache_k = SFA_F32};
  int32_t tokens[SEEN_TOKENS];
  float *hidden = malloc(SEEN_TOKENS * 48 * sizeof *hidden);
  int64_t attention_ns = 0;
  for (int32_t t = 0; t < SEEN_TOKENS; t++)
    tokens[t] = 3 + 5 * t % 60;
  if (open_model(ctx, directory, SFA_WEIGHTS_AUTO, &model) != SFA_OK ||
      sfa_forward_create(model, &choice, SEEN_TOKENS, 8, &forward) != SFA_OK)
    fail_msg("%s: %s", sparsity, sfa_context_error(ctx));
  sfa_forward_probe(forward, see_rows, seen);
  for (int32_t t = 0; t < SEEN_TOKENS; t += 8)
    assert_int_equal(sfa_forward_run(forward, tokens + t, 8, hidden, &attention_ns), SFA_OK);
  free(hidden);
  sfa_forward_destroy(forward);
  sfa_model_destroy(model);
  remove_tree(directory);
  sfa_context_destroy(ctx);
}

/* Features p and p + 4 turned by an angle a pair. */
static void turn_row(const double *frequencies, double position, const double *x, double *out) {
  for (int p = 0; p < SEEN_DIM / 2; p++) {
    double a = position * frequencies[p], low = x[p], high = x[p + SEEN_DIM / 2];
    out[p] = low * cos(a) - high * sin(a);
    out[p + SEEN_DIM / 2] = high * cos(a) + low * sin(a);
  }
}

/* The K largest, at most two of each four where that is asked. */
static void keep_row(const double *x, int32_t K, bool two_of_four, double *out) {
  int in_four[SEEN_DIM / 4] = {0};
  memset(out, 0, SEEN_DIM * sizeof *out);
  for (int32_t n = 0; n < K; n++) {
    int best = -1;
    for (int u = 0; u < SEEN_DIM; u++)
      if (out[u] == 0 && !(two_of_four && in_four[u / 4] == 2) && (best < 0 || fabs(x[u]) > fabs(x[best])))
        best = u;
    out[best] = x[best];
    in_four[best / 4]++;
  }
}

/* Top-k before the rotation and two of each four: rows of layer 0 against the dense ones, cut here by the definition. */
static void file_asks_for_another_choice(void **state) {
  (void)state;
  static const struct {
    const char *sparsity;
    int32_t k, slots, k_q;
    bool pre_rope, two_of_four;
  } cases[] = {{"{\"k\": 3, \"two_of_four\": true}", 3, 3, 3, false, true},
               {"{\"k\": 3, \"order\": \"pre_rope\"}", 3, 6, 6, true, false},
               {"{\"k\": 3, \"order\": \"pre_rope\", \"two_of_four\": true}", 3, 6, 6, true, true},
               {"{\"k\": 4, \"order\": \"pre_rope\"}", 4, 0, 0, true, false}};
  sfa_context *ctx = context_of(SFA_ISA_DEFAULT, 1);
  sfa_model *model;
  assert_int_equal(open_model(ctx, MODELS "llama", SFA_WEIGHTS_AUTO, &model), SFA_OK);
  const double *frequencies = model->config.rope_frequencies[SFA_LAYER_GLOBAL];
  seen_rows *dense = malloc(sizeof *dense), *seen = malloc(sizeof *seen);
  see_model("{\"k\": 4}", false, dense);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    see_model(cases[i].sparsity, true, seen);
    assert_int_equal(seen->k_keys, cases[i].slots);
    assert_int_equal(seen->k_queries, cases[i].k_q);
    for (int t = 0; t < SEEN_TOKENS; t++)
      for (int h = 0; h < SEEN_HEADS + SEEN_KV_HEADS; h++) {
        double x[SEEN_DIM], straight[SEEN_DIM], kept[SEEN_DIM], want[SEEN_DIM];
        for (int u = 0; u < SEEN_DIM; u++)
          x[u] = (double)dense->rows[t][h][u];
        turn_row(frequencies, cases[i].pre_rope ? -t : 0, x, straight);
        keep_row(straight, cases[i].k, cases[i].two_of_four, kept);
        turn_row(frequencies, cases[i].pre_rope ? t : 0, kept, want);
        for (int u = 0; u < SEEN_DIM; u++)
          if (!(fabs(want[u] - (double)seen->rows[t][h][u]) <= 2e-6 * (1 + fabs(want[u]))))
            fail_msg("%s: token %d head %d feature %d is %g, not %g", cases[i].sparsity, t, h, u, (double)seen->rows[t][h][u], want[u]);
      }
  }
  free(dense);
  free(seen);
  sfa_model_destroy(model);
  sfa_context_destroy(ctx);
}

/* ---- Memory ------------------------------------------------------------------------------------------------------------------------ */

/* The n-th allocation fails, for every n until all goes well: a clear status, nothing held. */
static void failing_memory(void **state) {
  (void)state;
  sfa_status status = SFA_ERROR_MEMORY;
  for (int64_t n = 1; status != SFA_OK; n++) {
    memory_account account = {.refuse = n};
    const sfa_allocator allocator = {account_alloc, account_free, &account};
    const sfa_context_options options = {.struct_size = sizeof options, .allocator = &allocator, .n_threads = 1};
    const sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = 1, .k = 8, .layers = 1};
    const int32_t ids[3] = {5, 6, 7};
    sfa_context *ctx;
    sfa_model *model = NULL;
    sfa_forward *forward = NULL;
    float hidden[3 * 48], logits[200];
    int64_t ns = 0;
    status = sfa_context_create(&options, &ctx);
    if (status != SFA_OK)
      continue;
    status = open_model(ctx, MODELS "gemma3/model.gguf", SFA_WEIGHTS_INT8, &model);
    if (status == SFA_OK)
      status = sfa_forward_create(model, &choice, 16, 8, &forward);
    if (status == SFA_OK)
      status = sfa_forward_run(forward, ids, 3, hidden, &ns);
    if (status == SFA_OK)
      status = sfa_model_logits(model, 1, hidden, logits);
    assert_true(status == SFA_OK || status == SFA_ERROR_MEMORY);
    sfa_forward_destroy(forward);
    sfa_model_destroy(model);
    sfa_context_destroy(ctx);
    assert_int_equal(account.out, 0);
    assert_true(n < 10000);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(families),
      cmocka_unit_test(weight_formats),
      cmocka_unit_test(bf16_on_this_processor),
      cmocka_unit_test(same_bits),
      cmocka_unit_test(all_features_is_dense),
      cmocka_unit_test(timeline),
      cmocka_unit_test(failed_step),
      cmocka_unit_test(learned_positions_end),
      cmocka_unit_test(choices),
      cmocka_unit_test(facts),
      cmocka_unit_test(quantised_rows),
      cmocka_unit_test(wrong_files),
      cmocka_unit_test(file_asks_for_sparsity),
      cmocka_unit_test(file_asks_for_another_choice),
      cmocka_unit_test(failing_memory),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
