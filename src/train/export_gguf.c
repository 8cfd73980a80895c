/* A Hugging Face directory as one GGUF file: the tensors under GGUF's names, q and k permuted where the family's GGUF rotates neighbours,
 * the config and sparse attention as keys (docs/MATH.md 9), the tokenizer where it is a byte-level BPE. */
#include <sfa/train.h>

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "file/json.h"
#include "file/save.h"
#include "file/weights_write.h"
#include "model/model_parts.h"

enum { KEYS_MAX = 64, TOKENIZER_BYTES_MAX = 256 << 20 };
/* GGUF's kinds of tokens, and of files. */
enum { TOKEN_NORMAL = 1, TOKEN_CONTROL = 3, TOKEN_USER = 4, TOKEN_UNUSED = 5 };
enum { FILE_F32 = 0, FILE_F16 = 1, FILE_BF16 = 32 };

/* Where the rows of a tensor come from. */
typedef struct source {
  sfa_linear_source linear; /* of matrices */
  sfa_weight_rows rows;
  const float *values; /* of vectors: f32 already */
  int32_t head_dim;    /* rows change places within each head of so many; 0: they do not */
} source;

typedef struct exporter {
  sfa_context *ctx;
  sfa_weights *weights;
  sfa_model_config config;
  sfa_tensor_names names;
  sfa_tensor_type type; /* of matrices */
  sfa_arena arena;
  sfa_meta keys[KEYS_MAX];
  int64_t n_keys;
  sfa_tensor_out *tensors;
  int64_t n_tensors;
} exporter;

/* Whether features change places. Two of four counts neighbours, which must stay together: such a model keeps its order, and says so. */
static bool is_interleaved(const sfa_model_config *c) { return c->family->gguf_interleaved && !c->two_of_four; }

/* ---- Keys ------------------------------------------------------------------------------------------------------------------------- */

/* A copy of count values under "<architecture>.<key>", or the key alone where it begins with a dot. */
static sfa_status add_key(exporter *e, const char *key, sfa_meta_type type, bool is_array, int64_t count, const void *values,
                          size_t bytes) {
  char name[SFA_KEY_BYTES];
  void *copy;
  sfa_meta *meta = &e->keys[e->n_keys++];
  if (*key == '.')
    snprintf(name, sizeof name, "%s", key + 1);
  else
    snprintf(name, sizeof name, "%s.%s", e->config.family->gguf[0], key);
  SFA_TRY(sfa_arena_alloc(e->ctx, &e->arena, bytes, &copy));
  if (bytes)
    memcpy(copy, values, bytes);
  *meta = (sfa_meta){.type = type, .is_array = is_array, .count = count, .data = copy};
  return sfa_arena_text(e->ctx, &e->arena, name, strlen(name), &meta->name);
}

static sfa_status add_u32(exporter *e, const char *key, int64_t value) {
  return add_key(e, key, SFA_META_U32, false, 1, &(uint32_t){(uint32_t)value}, sizeof(uint32_t));
}

static sfa_status add_f32(exporter *e, const char *key, double value) {
  return add_key(e, key, SFA_META_F32, false, 1, &(float){(float)value}, sizeof(float));
}

static sfa_status add_bool(exporter *e, const char *key, bool value) {
  return add_key(e, key, SFA_META_BOOL, false, 1, &(uint8_t){value}, 1);
}

static sfa_status add_text(exporter *e, const char *key, const char *value) {
  sfa_text text = {.bytes = strlen(value)};
  SFA_TRY(sfa_arena_text(e->ctx, &e->arena, value, text.bytes, &text.text));
  return add_key(e, key, SFA_META_STRING, false, 1, &text, sizeof text);
}

/* The base of the rotations, and what they differ by from those of the base: divisors, as GGUF's rope_freqs.weight. */
static sfa_status add_rope(exporter *e, float **divisors) {
  const sfa_model_config *c = &e->config;
  static const char *const places[] = {"rope_theta", "rope_parameters.rope_theta", "rope_parameters.full_attention.rope_theta"};
  double base = c->family->default_rope_base;
  *divisors = NULL;
  if (!c->rope_pairs)
    return SFA_OK;
  for (size_t i = 0; i < sizeof places / sizeof *places; i++)
    sfa_config_number(e->weights, c, places[i], &base);
  SFA_TRY(add_u32(e, "rope.dimension_count", 2 * c->rope_pairs));
  SFA_TRY(add_f32(e, "rope.freq_base", base));
  if (c->family->gguf_interleaved && !is_interleaved(c))
    SFA_TRY(add_bool(e, "rope_interleaved", false));
  if (c->family->default_local_base > 0) { /* theta^(-1 / n_pairs) is the second frequency */
    const double *local = c->rope_frequencies[SFA_LAYER_LOCAL];
    SFA_TRY(add_f32(e, "rope.freq_base_swa", c->rope_pairs > 1 ? pow(local[1], -c->rope_pairs) : c->family->default_local_base));
  }
  float *out;
  bool differs = false;
  SFA_TRY(sfa_arena_alloc(e->ctx, &e->arena, (size_t)c->rope_pairs * sizeof *out, (void **)&out));
  for (int32_t p = 0; p < c->rope_pairs; p++) {
    const double divisor = pow(base, -(double)p / c->rope_pairs) / c->rope_frequencies[SFA_LAYER_GLOBAL][p];
    out[p] = (float)divisor;
    differs |= fabs(divisor - 1) > 1e-6;
  }
  *divisors = differs ? out : NULL;
  return SFA_OK;
}

/* Which layers have a window. Families whose layers all have one need no list. */
static sfa_status add_window(exporter *e) {
  const sfa_model_config *c = &e->config;
  bool *local;
  if (!c->window_len)
    return SFA_OK;
  SFA_TRY(add_u32(e, sfa_gguf_numbers[SFA_NUMBER_WINDOW], c->window_len));
  SFA_TRY(sfa_arena_alloc(e->ctx, &e->arena, (size_t)c->n_layers, (void **)&local));
  for (int32_t layer = 0; layer < c->n_layers; layer++)
    local[layer] = c->layer_kinds[layer] == SFA_LAYER_LOCAL;
  return add_key(e, "attention.sliding_window_pattern", SFA_META_BOOL, true, c->n_layers, local, (size_t)c->n_layers);
}

/* Numbers of kv heads: one where all are the same, one of each layer, or all in a row. */
static sfa_status add_heads(exporter *e, const char *name, const int32_t *heads) {
  const sfa_model_config *c = &e->config;
  const int32_t n_heads = c->n_kv_heads, n = c->n_layers * n_heads;
  bool uniform = true, by_layer = true;
  int32_t *list;
  SFA_TRY(sfa_arena_alloc(e->ctx, &e->arena, (size_t)n * sizeof *list, (void **)&list));
  for (int32_t i = 0; i < n; i++) {
    uniform &= heads[i] == heads[0];
    by_layer &= heads[i] == heads[i / n_heads * n_heads];
  }
  if (uniform)
    return add_u32(e, name, heads[0]);
  const int32_t n_listed = by_layer ? c->n_layers : n;
  for (int32_t i = 0; i < n_listed; i++)
    list[i] = heads[by_layer ? i * n_heads : i];
  return add_key(e, name, SFA_META_I32, true, n_listed, list, (size_t)n_listed * sizeof *list);
}

static sfa_status add_sparsity(exporter *e) {
  const sfa_model_config *c = &e->config;
  if (!c->is_sparse)
    return SFA_OK;
  SFA_TRY(add_heads(e, "attention.sfa.k", c->sfa_k)); /* a layer that is left out is one with 0 */
  if (c->sfa_k_q[0] >= 0)
    SFA_TRY(add_heads(e, "attention.sfa.k_q", c->sfa_k_q));
  SFA_TRY(add_text(e, "attention.sfa.order", c->pre_rope ? "pre_rope" : "post_rope"));
  return add_bool(e, "attention.sfa.two_of_four", c->two_of_four);
}

static sfa_status add_config(exporter *e, const char *directory, float **divisors) {
  const sfa_model_config *c = &e->config;
  const struct {
    sfa_number number;
    int64_t value;
  } numbers[] = {{SFA_NUMBER_LAYERS, c->n_layers},      {SFA_NUMBER_HIDDEN, c->hidden_dim},   {SFA_NUMBER_FFN, c->ffn_dim},
                 {SFA_NUMBER_HEADS, c->n_heads},        {SFA_NUMBER_KV_HEADS, c->n_kv_heads}, {SFA_NUMBER_HEAD_DIM, c->head_dim},
                 {SFA_NUMBER_VALUE_DIM, c->head_dim_v}, {SFA_NUMBER_CONTEXT, c->context_len}};
  const char *slash = strrchr(directory, '/');
  SFA_TRY(add_text(e, ".general.architecture", c->family->gguf[0]));
  SFA_TRY(add_text(e, ".general.name", slash && slash[1] ? slash + 1 : directory));
  SFA_TRY(add_u32(e, ".general.file_type", e->type == SFA_TENSOR_F32 ? FILE_F32 : e->type == SFA_TENSOR_F16 ? FILE_F16 : FILE_BF16));
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
    SFA_TRY(add_u32(e, sfa_gguf_numbers[numbers[i].number], numbers[i].value));
  SFA_TRY(add_u32(e, "vocab_size", c->vocab_size));
  SFA_TRY(add_f32(e, c->family->gguf_norm_eps, (double)c->norm_eps));
  if (c->attention_softcap > 0)
    SFA_TRY(add_f32(e, "attn_logit_softcapping", (double)c->attention_softcap));
  if (c->final_softcap > 0)
    SFA_TRY(add_f32(e, "final_logit_softcapping", (double)c->final_softcap));
  SFA_TRY(add_rope(e, divisors));
  SFA_TRY(add_window(e));
  return add_sparsity(e);
}

/* ---- The tokenizer ------------------------------------------------------------------------------------------------------------------ */

/* What GGUF calls a cut into words; NULL: none of those that are told apart here. */
static const char *pre_name(const cJSON *pre) {
  const char *type = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(pre, "type"));
  const cJSON *parts = cJSON_GetObjectItemCaseSensitive(pre, "pretokenizers"), *regex = cJSON_GetObjectItemCaseSensitive(pre, "use_regex");
  if (!type)
    return NULL;
  if (strcmp(type, "ByteLevel") == 0 && !cJSON_IsFalse(regex))
    return "gpt-2";
  const cJSON *first = cJSON_GetArrayItem(parts, 0);
  const char *first_type = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(first, "type"));
  const bool digits = first_type && strcmp(first_type, "Digits") == 0 && cJSON_GetArraySize(parts) == 2;
  const char *rest = digits ? pre_name(cJSON_GetArrayItem(parts, 1)) : NULL;
  return rest && cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(first, "individual_digits")) ? "smollm" : NULL;
}

static sfa_status fail_tokenizer(const exporter *e, const char *what) {
  return sfa_fail(e->ctx, SFA_ERROR_FORMAT, "tokenizer.json: %s", what);
}

static sfa_status set_token(exporter *e, sfa_text *tokens, int32_t *types, const cJSON *id, const char *text, int32_t type) {
  if (!cJSON_IsNumber(id) || !text || !(id->valuedouble >= 0 && id->valuedouble < e->config.vocab_size))
    return fail_tokenizer(e, "a token has no id that the model knows");
  sfa_text *token = &tokens[id->valueint];
  types[id->valueint] = type;
  token->bytes = strlen(text);
  return sfa_arena_text(e->ctx, &e->arena, text, token->bytes, &token->text);
}

static sfa_status add_tokens(exporter *e, const cJSON *model, const cJSON *added) {
  const size_t n = (size_t)e->config.vocab_size;
  sfa_text *tokens;
  int32_t *types;
  SFA_TRY(sfa_arena_alloc(e->ctx, &e->arena, n * sizeof *tokens, (void **)&tokens));
  SFA_TRY(sfa_arena_alloc(e->ctx, &e->arena, n * sizeof *types, (void **)&types));
  for (size_t i = 0; i < n; i++) { /* rows of the embedding that no token has */
    char name[32];
    tokens[i].bytes = (size_t)snprintf(name, sizeof name, "[PAD%zu]", i);
    SFA_TRY(sfa_arena_text(e->ctx, &e->arena, name, tokens[i].bytes, &tokens[i].text));
    types[i] = TOKEN_UNUSED;
  }
  const cJSON *item;
  cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(model, "vocab")) {
    SFA_TRY(set_token(e, tokens, types, item, item->string, TOKEN_NORMAL));
  }
  cJSON_ArrayForEach(item, added) {
    const bool special = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(item, "special"));
    const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(item, "content"));
    SFA_TRY(set_token(e, tokens, types, cJSON_GetObjectItemCaseSensitive(item, "id"), text, special ? TOKEN_CONTROL : TOKEN_USER));
  }
  SFA_TRY(add_key(e, ".tokenizer.ggml.tokens", SFA_META_STRING, true, (int64_t)n, tokens, n * sizeof *tokens));
  return add_key(e, ".tokenizer.ggml.token_type", SFA_META_I32, true, (int64_t)n, types, n * sizeof *types);
}

/* "a b", or ["a", "b"]. */
static sfa_status add_merges(exporter *e, const cJSON *merges) {
  const int64_t n = cJSON_GetArraySize(merges);
  sfa_text *texts;
  int64_t i = 0;
  const cJSON *item;
  SFA_TRY(sfa_arena_alloc(e->ctx, &e->arena, (size_t)n * sizeof *texts, (void **)&texts));
  cJSON_ArrayForEach(item, merges) {
    const char *a = cJSON_GetStringValue(cJSON_IsArray(item) ? cJSON_GetArrayItem(item, 0) : item);
    const char *b = cJSON_IsArray(item) ? cJSON_GetStringValue(cJSON_GetArrayItem(item, 1)) : "";
    char *text;
    if (!a || !b)
      return fail_tokenizer(e, "a merge is not two texts");
    const size_t bytes = strlen(a) + strlen(b) + 1;
    SFA_TRY(sfa_arena_alloc(e->ctx, &e->arena, bytes + 1, (void **)&text));
    const int written = snprintf(text, bytes + 1, "%s%s%s", a, *b ? " " : "", b);
    texts[i++] = (sfa_text){text, (size_t)written};
  }
  return add_key(e, ".tokenizer.ggml.merges", SFA_META_STRING, true, n, texts, (size_t)n * sizeof *texts);
}

static sfa_status add_special(exporter *e, const char *config_key, const char *key) {
  double id;
  if (!sfa_meta_array_number(e->weights, config_key, 0, &id) && !sfa_config_number(e->weights, &e->config, config_key, &id))
    return SFA_OK;
  return add_u32(e, key, (int64_t)id);
}

static sfa_status add_tokenizer_json(exporter *e, const cJSON *json) {
  const cJSON *model = cJSON_GetObjectItemCaseSensitive(json, "model");
  const char *type = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(model, "type")), *template;
  const char *pre = pre_name(cJSON_GetObjectItemCaseSensitive(json, "pre_tokenizer"));
  if (!type || strcmp(type, "BPE") != 0 || !pre) {
    sfa_log(e->ctx, "the tokenizer is of a kind that is not written to GGUF: the file has none, name tokenizer.json beside it");
    return SFA_OK;
  }
  SFA_TRY(add_text(e, ".tokenizer.ggml.model", "gpt2"));
  SFA_TRY(add_text(e, ".tokenizer.ggml.pre", pre));
  SFA_TRY(add_tokens(e, model, cJSON_GetObjectItemCaseSensitive(json, "added_tokens")));
  SFA_TRY(add_merges(e, cJSON_GetObjectItemCaseSensitive(model, "merges")));
  SFA_TRY(add_special(e, "bos_token_id", ".tokenizer.ggml.bos_token_id"));
  SFA_TRY(add_special(e, "eos_token_id", ".tokenizer.ggml.eos_token_id"));
  SFA_TRY(add_bool(e, ".tokenizer.ggml.add_bos_token", false));
  return sfa_meta_string(e->weights, "tokenizer_config/chat_template", &template, NULL) ? add_text(e, ".tokenizer.chat_template", template)
                                                                                        : SFA_OK;
}

static sfa_status add_tokenizer(exporter *e, const char *directory) {
  char *path;
  cJSON *json = NULL;
  SFA_TRY(sfa_save_path(e->ctx, directory, "tokenizer.json", &path));
  sfa_status status = SFA_OK;
  if (access(path, F_OK) == 0) {
    status = sfa_json_load(e->ctx, path, TOKENIZER_BYTES_MAX, &json);
    if (status == SFA_OK)
      status = add_tokenizer_json(e, json);
    cJSON_Delete(json);
  }
  sfa_free(e->ctx, path);
  return status;
}

/* ---- Tensors ---------------------------------------------------------------------------------------------------- */

/* GGUF's row of a head that rotates neighbours: rows 2p and 2p + 1 are Hugging Face's p and p + head_dim / 2. */
static int64_t permuted(int64_t row, int32_t head_dim) {
  if (!head_dim)
    return row;
  const int64_t head = row / head_dim * head_dim, i = row % head_dim;
  return head + i / 2 + i % 2 * (head_dim / 2);
}

static void matrix_row(const sfa_tensor_out *tensor, int64_t row, float *out) {
  const source *s = tensor->arg;
  s->linear.row_f32(s->linear.arg, permuted(row, s->head_dim), out);
}

static void vector_row(const sfa_tensor_out *tensor, int64_t row, float *out) {
  const source *s = tensor->arg;
  (void)row;
  for (int64_t i = 0; i < tensor->shape[0]; i++)
    out[i] = s->values[permuted(i, s->head_dim)];
}

static sfa_status begin_tensor(exporter *e, sfa_role role, int32_t layer, const char *suffix, source **s, sfa_tensor_out **out) {
  const sfa_model_config *c = &e->config;
  const sfa_tensor_names bare = {e->ctx, e->weights, c, ""};
  char name[SFA_NAME_BYTES];
  SFA_TRY(sfa_arena_alloc(e->ctx, &e->arena, sizeof **s, (void **)s));
  **s = (source){.head_dim = is_interleaved(c) && (role == SFA_ROLE_Q || role == SFA_ROLE_K) ? c->head_dim : 0};
  *out = &e->tensors[e->n_tensors++];
  sfa_role_name(&bare, true, role, layer, suffix, name);
  return sfa_arena_text(e->ctx, &e->arena, name, strlen(name), &(*out)->name);
}

static sfa_status add_matrix(exporter *e, sfa_role role, int32_t layer, const sfa_tensor *t) {
  const bool table = role == SFA_ROLE_EMBEDDING || role == SFA_ROLE_POSITIONS || role == SFA_ROLE_HEAD;
  const sfa_role_shape shape = sfa_role_shape_of(&e->config, role);
  source *s;
  sfa_tensor_out *out;
  SFA_TRY(begin_tensor(e, role, layer, ".weight", &s, &out));
  s->rows = (sfa_weight_rows){t, e->config.family->conv1d && !table};
  SFA_TRY(s->rows.transposed ? sfa_tensor_check_shape(e->ctx, t, shape.n_in, shape.n_out)
                             : sfa_tensor_check_shape(e->ctx, t, shape.n_out, shape.n_in));
  sfa_weight_source(&s->rows, SFA_STORE_F32, &s->linear);
  *out = (sfa_tensor_out){
      .name = out->name, .type = e->type, .n_dims = 2, .shape = {shape.n_out, shape.n_in, 1, 1}, .row = matrix_row, .arg = s};
  return SFA_OK;
}

/* plus: added to every value. */
static sfa_status add_vector(exporter *e, sfa_role role, int32_t layer, const char *suffix, const sfa_tensor *t, float plus) {
  float *values;
  source *s;
  sfa_tensor_out *out;
  SFA_TRY(begin_tensor(e, role, layer, suffix, &s, &out));
  SFA_TRY(sfa_arena_alloc(e->ctx, &e->arena, (size_t)t->n_elements * sizeof *values, (void **)&values));
  sfa_tensor_dequantize(t->type, t->n_elements, t->data, values);
  for (int64_t i = 0; i < t->n_elements; i++)
    values[i] += plus;
  s->values = values;
  *out = (sfa_tensor_out){
      .name = out->name, .type = SFA_TENSOR_F32, .n_dims = 1, .shape = {t->n_elements, 1, 1, 1}, .row = vector_row, .arg = s};
  return SFA_OK;
}

static sfa_status add_role(exporter *e, sfa_role role, int32_t layer) {
  const sfa_family *family = e->config.family;
  const sfa_tensor *t = role == SFA_ROLE_HEAD ? sfa_role_find_head(&e->names) : sfa_role_find(&e->names, role, layer, ".weight");
  if (!t && role == SFA_ROLE_HEAD) /* tied */
    return SFA_OK;
  if (!t)
    SFA_TRY(sfa_role_require(&e->names, role, layer, ".weight", &t));
  if (sfa_role_is_norm(role))
    SFA_TRY(add_vector(e, role, layer, ".weight", t, family->norm_plus_one ? 1 : 0));
  else
    SFA_TRY(add_matrix(e, role, layer, t));
  const sfa_tensor *bias = role == SFA_ROLE_HEAD ? NULL : sfa_role_find(&e->names, role, layer, ".bias");
  return bias ? add_vector(e, role, layer, ".bias", bias, 0) : SFA_OK;
}

static sfa_status add_tensors(exporter *e, const float *divisors) {
  const sfa_model_config *c = &e->config;
  const size_t most = (size_t)2 * SFA_ROLE_COUNT * (size_t)c->n_layers + 1;
  SFA_TRY(sfa_alloc_zero(e->ctx, most, sizeof *e->tensors, "a list of tensors", (void **)&e->tensors));
  if (divisors)
    e->tensors[e->n_tensors++] = (sfa_tensor_out){
        .name = "rope_freqs.weight", .type = SFA_TENSOR_F32, .n_dims = 1, .shape = {c->rope_pairs, 1, 1, 1}, .values = divisors};
  for (int role = 0; role < SFA_ROLE_COUNT; role++) {
    const char *name = c->family->tensors[role];
    for (int32_t layer = 0; name && layer < (strchr(name, '*') ? c->n_layers : 1); layer++)
      SFA_TRY(add_role(e, (sfa_role)role, layer));
  }
  return SFA_OK;
}

/* ---- The whole -------------------------------------------------------------------------------------------------- */

static sfa_status export_weights(exporter *e, const char *directory, const char *path) {
  float *divisors;
  SFA_TRY(sfa_model_config_read(e->ctx, e->weights, &e->config));
  if (e->config.is_gguf)
    return sfa_fail(e->ctx, SFA_ERROR_ARGUMENT, "%s is a GGUF file already", directory);
  if (e->config.rope_pairs && 2 * e->config.rope_pairs != e->config.head_dim)
    return sfa_fail(e->ctx, SFA_ERROR_UNSUPPORTED, "%d of %d features are rotated: such models are not written to GGUF",
                    2 * e->config.rope_pairs, e->config.head_dim);
  e->names = sfa_tensor_names_of(e->ctx, e->weights, &e->config);
  const sfa_tensor *embedding;
  SFA_TRY(sfa_role_require(&e->names, SFA_ROLE_EMBEDDING, 0, ".weight", &embedding));
  e->config.vocab_size = (int32_t)embedding->shape[0];
  SFA_TRY(add_config(e, directory, &divisors));
  SFA_TRY(add_tokenizer(e, directory));
  SFA_TRY(add_tensors(e, divisors));
  return sfa_gguf_write(e->ctx, path, e->n_keys, e->keys, e->n_tensors, e->tensors);
}

sfa_status sfa_model_export_gguf(sfa_context *ctx, const char *directory, const char *path, sfa_dtype type) {
  static const struct {
    sfa_dtype dtype;
    sfa_tensor_type type;
  } types[] = {{SFA_DTYPE_DEFAULT, SFA_TENSOR_BF16}, {SFA_F32, SFA_TENSOR_F32}, {SFA_F16, SFA_TENSOR_F16}, {SFA_BF16, SFA_TENSOR_BF16}};
  if (!ctx)
    return SFA_ERROR_ARGUMENT;
  SFA_REQUIRE(ctx, directory && *directory && path && *path, "sfa_model_export_gguf wants a directory and a file");
  exporter *e;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *e, "an exporter", (void **)&e));
  e->ctx = ctx;
  sfa_status status = sfa_fail(ctx, SFA_ERROR_ARGUMENT, "%d is no type of weights for GGUF: f32, f16 or bf16", (int)type);
  for (size_t i = 0; i < sizeof types / sizeof *types; i++)
    if (types[i].dtype == type) {
      e->type = types[i].type;
      status = sfa_weights_open(ctx, directory, &e->weights);
    }
  if (status == SFA_OK)
    status = export_weights(e, directory, path);
  sfa_free(ctx, e->tensors);
  sfa_model_config_free(ctx, &e->config);
  sfa_arena_free(ctx, &e->arena);
  sfa_weights_close(e->weights);
  sfa_free(ctx, e);
  return status;
}
