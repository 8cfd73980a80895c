/* The view over a model's files that the rest of the engine sees, and the checks that all readers share. */
#include "file/weights_build.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

/* ---- Tensor types ------------------------------------------------------------------------------------------------------------ */

static const struct {
  const char *name;
  int32_t block_len, block_bytes;
} tensor_types[] = {
    [SFA_TENSOR_F32] = {"F32", 1, 4},       [SFA_TENSOR_F16] = {"F16", 1, 2},       [SFA_TENSOR_BF16] = {"BF16", 1, 2},
    [SFA_TENSOR_Q4_0] = {"Q4_0", 32, 18},   [SFA_TENSOR_Q4_1] = {"Q4_1", 32, 20},   [SFA_TENSOR_Q5_0] = {"Q5_0", 32, 22},
    [SFA_TENSOR_Q5_1] = {"Q5_1", 32, 24},   [SFA_TENSOR_Q8_0] = {"Q8_0", 32, 34},   [SFA_TENSOR_Q4_K] = {"Q4_K", 256, 144},
    [SFA_TENSOR_Q5_K] = {"Q5_K", 256, 176}, [SFA_TENSOR_Q6_K] = {"Q6_K", 256, 210},
};

static bool type_is_known(uint32_t type) { return type < sizeof tensor_types / sizeof *tensor_types && tensor_types[type].name; }

const char *sfa_tensor_type_name(sfa_tensor_type type) { return type_is_known(type) ? tensor_types[type].name : "unknown"; }
int32_t sfa_tensor_block_len(sfa_tensor_type type) { return type_is_known(type) ? tensor_types[type].block_len : 0; }
int32_t sfa_tensor_block_bytes(sfa_tensor_type type) { return type_is_known(type) ? tensor_types[type].block_bytes : 0; }

/* ---- Open and close ---------------------------------------------------------------------------------------------------------- */

sfa_status sfa_weights_add_file(sfa_weights *weights, const char *path, const sfa_weights_file **file) {
  const char *name;
  sfa_weights_file *slot;
  bool added;
  *file = NULL;
  SFA_TRY(sfa_arena_text(weights->ctx, &weights->arena, path, strlen(path), &name));
  SFA_TRY(sfa_table_add(weights->ctx, &weights->files, name, (void **)&slot, &added));
  if (added)
    SFA_TRY(sfa_map_open(weights->ctx, name, &slot->map));
  *file = slot;
  return SFA_OK;
}

/* What else the file may be, so that the error can say what to do. */
static sfa_status fail_kind(sfa_context *ctx, const char *path, const sfa_map *map) {
  const char *hint = "if it should be one of these, download it again";
  if (map->bytes >= 9 && map->data[8] == '{')
    hint = "it looks like safetensors: give the directory that also holds its config.json";
  else if (map->bytes >= 4 && memcmp(map->data, "PK\3\4", 4) == 0)
    hint = "it looks like a PyTorch file: save the model with save_pretrained(safe_serialization=True) and give that directory";
  return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s (%zu bytes) is neither GGUF nor a llama2.c model; %s", path, map->bytes, hint);
}

static sfa_status read_path(sfa_weights *weights, const char *path, const char *adapter) {
  struct stat info;
  if (stat(path, &info) != 0)
    return sfa_fail(weights->ctx, SFA_ERROR_IO, "cannot open %s: %s", path, strerror(errno));
  if (S_ISDIR(info.st_mode)) {
    weights->format = "safetensors";
    return sfa_safetensors_read(weights, path, adapter);
  }
  SFA_REQUIRE(weights->ctx, !adapter, "%s is a file: adapters (%s) are laid over Hugging Face directories", path, adapter);
  const sfa_weights_file *file;
  SFA_TRY(sfa_weights_add_file(weights, path, &file));
  if (file->map.bytes >= 4 && memcmp(file->map.data, "GGUF", 4) == 0) {
    weights->format = "gguf";
    return sfa_gguf_read(weights, file);
  }
  if (sfa_llama2c_is(&file->map)) {
    weights->format = "llama2.c";
    return sfa_llama2c_read(weights, file);
  }
  return fail_kind(weights->ctx, path, &file->map);
}

sfa_status sfa_weights_open(sfa_context *ctx, const char *path, sfa_weights **out) {
  return sfa_weights_open_adapted(ctx, path, NULL, out);
}

sfa_status sfa_weights_open_adapted(sfa_context *ctx, const char *path, const char *adapter, sfa_weights **out) {
  sfa_weights *weights;
  *out = NULL;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *weights, "the view of a model's files", (void **)&weights));
  weights->ctx = ctx;
  weights->files.item_bytes = sizeof(sfa_weights_file);
  weights->tensors.item_bytes = sizeof(sfa_tensor);
  weights->metas.item_bytes = sizeof(sfa_meta);
  sfa_status status = read_path(weights, path, adapter);
  if (status == SFA_OK)
    *out = weights;
  else
    sfa_weights_close(weights);
  return status;
}

void sfa_weights_close(sfa_weights *weights) {
  if (!weights)
    return;
  for (int64_t i = 0; i < weights->files.count; i++)
    sfa_map_close(&((sfa_weights_file *)sfa_table_at(&weights->files, i))->map);
  sfa_table_free(weights->ctx, &weights->files);
  sfa_table_free(weights->ctx, &weights->tensors);
  sfa_table_free(weights->ctx, &weights->metas);
  sfa_arena_free(weights->ctx, &weights->arena);
  sfa_free(weights->ctx, weights);
}

const char *sfa_weights_format(const sfa_weights *weights) { return weights->format; }

int64_t sfa_weights_bytes(const sfa_weights *weights) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < weights->files.count; i++)
    bytes += (int64_t)((const sfa_weights_file *)sfa_table_at(&weights->files, i))->map.bytes;
  return bytes;
}

/* ---- Tensors ----------------------------------------------------------------------------------------------------------------- */

int64_t sfa_weights_count(const sfa_weights *weights) { return weights->tensors.count; }
const sfa_tensor *sfa_weights_at(const sfa_weights *weights, int64_t index) { return sfa_table_at(&weights->tensors, index); }
const sfa_tensor *sfa_weights_find(const sfa_weights *weights, const char *name) { return sfa_table_find(&weights->tensors, name); }

sfa_status sfa_weights_check_name(sfa_weights *weights, const char *path, const char *what, size_t offset, const char *text, size_t bytes) {
  if (bytes < 1 || bytes > 255)
    return sfa_fail(weights->ctx, SFA_ERROR_FORMAT, "%s: %s at offset %zu has %zu bytes, not 1 to 255: download the file again", path, what,
                    offset, bytes);
  for (size_t i = 0; i < bytes; i++)
    if ((uint8_t)text[i] < 0x20 || text[i] == 0x7f)
      return sfa_fail(weights->ctx, SFA_ERROR_FORMAT,
                      "%s: %s at offset %zu has the control character 0x%02x in it: download the file again", path, what, offset,
                      (uint8_t)text[i]);
  return SFA_OK;
}

sfa_status sfa_weights_add_tensor(sfa_weights *weights, const sfa_weights_file *file, const char *name, sfa_tensor_type type,
                                  int32_t n_dims, const int64_t *shape, uint64_t offset, sfa_tensor **out) {
  sfa_context *ctx = weights->ctx;
  sfa_tensor tensor = {.name = name, .type = type, .n_dims = n_dims, .shape = {1, 1, 1, 1}, .n_elements = 1};
  *out = NULL;
  if (n_dims < 0 || n_dims > 4)
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "%s: tensor %s has %d dimensions, at most 4 are read", file->name, name, n_dims);
  for (int32_t d = 0; d < n_dims; d++) {
    if (shape[d] < 1 || __builtin_mul_overflow(tensor.n_elements, shape[d], &tensor.n_elements))
      return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s: tensor %s has %lld elements in dimension %d: download the file again", file->name, name,
                      (long long)shape[d], d);
    tensor.shape[d] = shape[d];
  }
  int64_t row_len = n_dims ? shape[n_dims - 1] : 1, block_len = sfa_tensor_block_len(type);
  if (row_len % block_len)
    return sfa_fail(ctx, SFA_ERROR_FORMAT,
                    "%s: tensor %s has rows of %lld elements, not whole blocks of %lld (%s): download the file again", file->name, name,
                    (long long)row_len, (long long)block_len, sfa_tensor_type_name(type));
  if (__builtin_mul_overflow(tensor.n_elements / block_len, (int64_t)sfa_tensor_block_bytes(type), &tensor.bytes) ||
      offset > file->map.bytes || (uint64_t)tensor.bytes > file->map.bytes - offset)
    return sfa_fail(
        ctx, SFA_ERROR_FORMAT,
        "%s: tensor %s (%lld elements, %s) at offset %llu ends beyond the file's %zu bytes: the file is cut short, download it again",
        file->name, name, (long long)tensor.n_elements, sfa_tensor_type_name(type), (unsigned long long)offset, file->map.bytes);
  tensor.data = file->map.data + offset;
  bool added;
  SFA_TRY(sfa_table_add(ctx, &weights->tensors, name, (void **)out, &added));
  if (!added && !weights->lays_over)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s: there are two tensors of the name %s: download the file again", file->name, name);
  if (weights->lays_over && (added || memcmp((*out)->shape, tensor.shape, sizeof tensor.shape) != 0))
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s: the model has no tensor %s of that shape: the adapter was made for another model",
                    file->name, name);
  **out = tensor;
  return SFA_OK;
}

/* ---- Metadata ---------------------------------------------------------------------------------------------------------------- */

sfa_status sfa_weights_add_meta(sfa_weights *weights, const char *path, const sfa_meta *meta) {
  sfa_meta *slot;
  bool added;
  SFA_TRY(sfa_table_add(weights->ctx, &weights->metas, meta->name, (void **)&slot, &added));
  if (!added)
    return sfa_fail(weights->ctx, SFA_ERROR_FORMAT, "%s: the key %s is there twice: download the file again", path, meta->name);
  *slot = *meta;
  return SFA_OK;
}

static sfa_status add_value(sfa_weights *weights, const char *path, const char *key, sfa_meta_type type, const void *value, size_t bytes) {
  void *copy;
  SFA_TRY(sfa_arena_alloc(weights->ctx, &weights->arena, bytes, &copy));
  memcpy(copy, value, bytes);
  return sfa_weights_add_meta(weights, path, &(sfa_meta){.name = key, .type = type, .count = 1, .data = copy});
}

sfa_status sfa_weights_add_number(sfa_weights *weights, const char *path, const char *key, double value) {
  return add_value(weights, path, key, SFA_META_F64, &value, sizeof value);
}

sfa_status sfa_weights_add_bool(sfa_weights *weights, const char *path, const char *key, bool value) {
  return add_value(weights, path, key, SFA_META_BOOL, &value, 1);
}

sfa_status sfa_weights_add_string(sfa_weights *weights, const char *path, const char *key, const char *value) {
  sfa_text text = {.bytes = strlen(value)};
  SFA_TRY(sfa_arena_text(weights->ctx, &weights->arena, value, text.bytes, &text.text));
  return add_value(weights, path, key, SFA_META_STRING, &text, sizeof text);
}

/* Element `index` of the value or array of that name, if there is one of that form. */
static const sfa_meta *find_meta(const sfa_weights *weights, const char *key, bool is_array, int64_t index) {
  const sfa_meta *meta = sfa_table_find(&weights->metas, key);
  return meta && meta->is_array == is_array && index >= 0 && index < meta->count ? meta : NULL;
}

static bool load_number(const sfa_meta *meta, int64_t index, double *out) {
  const uint8_t *data = meta->data;
#define SFA_LOAD(type)                                                                                                                     \
  do {                                                                                                                                     \
    type value;                                                                                                                            \
    memcpy(&value, data + (size_t)index * sizeof value, sizeof value);                                                                     \
    *out = (double)value;                                                                                                                  \
    return true;                                                                                                                           \
  } while (0)
  switch (meta->type) {
  case SFA_META_U8:
  case SFA_META_BOOL: SFA_LOAD(uint8_t);
  case SFA_META_I8: SFA_LOAD(int8_t);
  case SFA_META_U16: SFA_LOAD(uint16_t);
  case SFA_META_I16: SFA_LOAD(int16_t);
  case SFA_META_U32: SFA_LOAD(uint32_t);
  case SFA_META_I32: SFA_LOAD(int32_t);
  case SFA_META_F32: SFA_LOAD(float);
  case SFA_META_U64: SFA_LOAD(uint64_t);
  case SFA_META_I64: SFA_LOAD(int64_t);
  case SFA_META_F64: SFA_LOAD(double);
  default: return false;
  }
#undef SFA_LOAD
}

static bool load_string(const sfa_meta *meta, int64_t index, const char **out, size_t *bytes) {
  if (meta->type != SFA_META_STRING)
    return false;
  const sfa_text *text = (const sfa_text *)meta->data + index;
  *out = text->text;
  if (bytes)
    *bytes = text->bytes;
  return true;
}

bool sfa_meta_number(const sfa_weights *weights, const char *key, double *out) {
  const sfa_meta *meta = find_meta(weights, key, false, 0);
  return meta && meta->type != SFA_META_BOOL && load_number(meta, 0, out);
}

bool sfa_meta_bool(const sfa_weights *weights, const char *key, bool *out) {
  const sfa_meta *meta = find_meta(weights, key, false, 0);
  double value;
  if (!meta || meta->type != SFA_META_BOOL || !load_number(meta, 0, &value))
    return false;
  *out = value != 0;
  return true;
}

bool sfa_meta_string(const sfa_weights *weights, const char *key, const char **out, size_t *bytes) {
  const sfa_meta *meta = find_meta(weights, key, false, 0);
  return meta && load_string(meta, 0, out, bytes);
}

int64_t sfa_meta_array_len(const sfa_weights *weights, const char *key) {
  const sfa_meta *meta = sfa_table_find(&weights->metas, key);
  return meta && meta->is_array ? meta->count : -1;
}

bool sfa_meta_array_number(const sfa_weights *weights, const char *key, int64_t index, double *out) {
  const sfa_meta *meta = find_meta(weights, key, true, index);
  return meta && load_number(meta, index, out);
}

bool sfa_meta_array_string(const sfa_weights *weights, const char *key, int64_t index, const char **out, size_t *bytes) {
  const sfa_meta *meta = find_meta(weights, key, true, index);
  return meta && load_string(meta, index, out, bytes);
}
