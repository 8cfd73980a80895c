/* A directory as Hugging Face writes it: config.json, the tensors in model.safetensors or in the parts that model.safetensors.index.json
 * lists, and tokenizer_config.json and generation_config.json where present. An adapter is a directory with a config.json of its own and
 * adapter.safetensors, the tensors that it changes.
 *
 * A safetensors file: u64 header_bytes, a JSON object { name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": ... }, and
 * the tensors' bytes without gaps, offsets counted from the header's end.
 */
#include "file/json.h"
#include "file/weights_build.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { CONFIG_BYTES_MAX = 16 << 20, INDEX_BYTES_MAX = 64 << 20, HEADER_BYTES_MAX = 100000000 /* safetensors' own limit */ };
enum { KEY_BYTES_MAX = 255, PATH_BYTES_MAX = 4096 };

/* ---- Configuration: JSON to flat keys ---------------------------------------------------------------------------------------- */

typedef struct flattener {
  sfa_weights *weights;
  const char *path;
  char key[KEY_BYTES_MAX + 1];
} flattener;

/* The type of a value, or of all elements of an array (any, if it has none). False for an object, null, an array of mixed kinds. */
static bool leaf_type(const cJSON *item, sfa_meta_type *type) {
  static const struct {
    cJSON_bool (*test)(const cJSON *);
    sfa_meta_type type;
  } kinds[] = {{cJSON_IsNumber, SFA_META_F64}, {cJSON_IsString, SFA_META_STRING}, {cJSON_IsBool, SFA_META_BOOL}};
  const bool is_array = cJSON_IsArray(item);
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
    const cJSON *value = is_array ? item->child : item;
    while (value && kinds[i].test(value))
      value = is_array ? value->next : NULL;
    if (!value) {
      *type = kinds[i].type;
      return true;
    }
  }
  return false;
}

static sfa_status add_leaf(flattener *f, size_t key_bytes, const cJSON *item, sfa_meta_type type) {
  sfa_context *ctx = f->weights->ctx;
  sfa_arena *arena = &f->weights->arena;
  const bool is_array = cJSON_IsArray(item);
  sfa_meta meta = {.type = type, .is_array = is_array, .count = is_array ? cJSON_GetArraySize(item) : 1};
  const size_t each = type == SFA_META_STRING ? sizeof(sfa_text) : type == SFA_META_BOOL ? 1 : sizeof(double);
  void *data;
  SFA_TRY(sfa_arena_text(ctx, arena, f->key, key_bytes, &meta.name));
  SFA_TRY(sfa_arena_alloc(ctx, arena, (size_t)meta.count * each, &data));
  const cJSON *value = is_array ? item->child : item;
  for (int64_t i = 0; i < meta.count; i++, value = value->next) {
    if (type == SFA_META_STRING) {
      sfa_text *text = (sfa_text *)data + i;
      text->bytes = strlen(value->valuestring);
      SFA_TRY(sfa_arena_text(ctx, arena, value->valuestring, text->bytes, &text->text));
    } else if (type == SFA_META_BOOL) {
      ((uint8_t *)data)[i] = cJSON_IsTrue(value) ? 1 : 0;
    } else {
      ((double *)data)[i] = value->valuedouble;
    }
  }
  meta.data = data;
  return sfa_weights_add_meta(f->weights, f->path, &meta);
}

/* Adds what is below f->key[0 .. key_bytes). Objects, and arrays of objects or of mixed kinds, give one key a member
 * ("rope_scaling.factor", "list.0.name"); null gives none. Keys that are longer than anybody asks for are left out, which also bounds the
 * depth. */
static sfa_status flatten(flattener *f, size_t key_bytes, const cJSON *item) {
  sfa_meta_type type;
  if (leaf_type(item, &type))
    return add_leaf(f, key_bytes, item, type);
  const char *separator = key_bytes && f->key[key_bytes - 1] != '/' ? "." : "";
  const cJSON *member;
  int index = 0;
  cJSON_ArrayForEach(member, item) {
    char number[16];
    snprintf(number, sizeof number, "%d", index++);
    int added = snprintf(f->key + key_bytes, sizeof f->key - key_bytes, "%s%s", separator, cJSON_IsObject(item) ? member->string : number);
    if (added >= 0 && (size_t)added < sizeof f->key - key_bytes)
      SFA_TRY(flatten(f, key_bytes + (size_t)added, member));
  }
  return SFA_OK;
}

static sfa_status join(sfa_weights *weights, const char *directory, const char *name, char *path /* [PATH_BYTES_MAX] */) {
  size_t bytes = strlen(directory);
  const char *slash = bytes && directory[bytes - 1] == '/' ? "" : "/";
  int length = snprintf(path, PATH_BYTES_MAX, "%s%s%s", directory, slash, name);
  if (length < 0 || length >= PATH_BYTES_MAX)
    return sfa_fail(weights->ctx, SFA_ERROR_ARGUMENT, "the path of %.60s has %d bytes, at most %d are taken: use a shorter one", name,
                    length, PATH_BYTES_MAX - 1);
  return SFA_OK;
}

static sfa_status read_config(sfa_weights *weights, const char *directory, const char *name, const char *prefix) {
  char path[PATH_BYTES_MAX];
  cJSON *json;
  SFA_TRY(join(weights, directory, name, path));
  if (*prefix && access(path, F_OK) != 0) /* those with a prefix may be absent */
    return SFA_OK;
  SFA_TRY(sfa_json_load(weights->ctx, path, CONFIG_BYTES_MAX, &json));
  flattener f = {.weights = weights, .path = path};
  size_t prefix_bytes = strlen(prefix);
  memcpy(f.key, prefix, prefix_bytes);
  sfa_status status = flatten(&f, prefix_bytes, json);
  cJSON_Delete(json);
  return status;
}

/* ---- Tensors ----------------------------------------------------------------------------------------------------------------- */

static bool find_type(const char *dtype, sfa_tensor_type *type) {
  static const struct {
    const char *dtype;
    sfa_tensor_type type;
  } types[] = {{"F32", SFA_TENSOR_F32}, {"F16", SFA_TENSOR_F16}, {"BF16", SFA_TENSOR_BF16}};
  for (size_t i = 0; i < sizeof types / sizeof *types; i++)
    if (strcmp(dtype, types[i].dtype) == 0) {
      *type = types[i].type;
      return true;
    }
  return false;
}

/* Causal masks that GPT-2's files store as if they were parameters. */
static bool is_stored_mask(const char *name) {
  static const char *const endings[] = {".attn.bias", ".attn.masked_bias"};
  size_t bytes = strlen(name);
  for (size_t i = 0; i < sizeof endings / sizeof *endings; i++)
    if (bytes >= strlen(endings[i]) && strcmp(name + bytes - strlen(endings[i]), endings[i]) == 0)
      return true;
  return false;
}

static sfa_status fail_header(sfa_weights *weights, const char *path, const char *name, const char *reason) {
  return sfa_fail(weights->ctx, SFA_ERROR_FORMAT, "%s: the header's entry %s %s: download the file again", path, name, reason);
}

/* start: offset of the tensors' bytes in the file; *used grows by this one's. */
static sfa_status read_tensor(sfa_weights *weights, const sfa_weights_file *file, uint64_t start, const cJSON *item, uint64_t *used) {
  const char *name = item->string, *path = file->name;
  SFA_TRY(sfa_weights_check_name(weights, path, "a tensor's name", sizeof(uint64_t), name, strlen(name)));
  const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(item, "dtype"), *dims = cJSON_GetObjectItemCaseSensitive(item, "shape");
  const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(item, "data_offsets");
  uint64_t begin, end;
  if (!cJSON_IsString(dtype) || !cJSON_IsArray(dims) || !cJSON_IsArray(offsets))
    return fail_header(weights, path, name, "lacks dtype, shape or data_offsets");
  if (cJSON_GetArraySize(offsets) != 2 || !sfa_json_size(cJSON_GetArrayItem(offsets, 0), &begin) ||
      !sfa_json_size(cJSON_GetArrayItem(offsets, 1), &end) || begin > end)
    return fail_header(weights, path, name, "has data_offsets that are not two rising numbers");
  if (end > file->map.bytes - start)
    return sfa_fail(weights->ctx, SFA_ERROR_FORMAT,
                    "%s: tensor %s ends %llu bytes behind the header, the file after %llu: it is cut short, download it again", path, name,
                    (unsigned long long)end, (unsigned long long)(file->map.bytes - start));
  *used += end - begin;
  if (is_stored_mask(name))
    return SFA_OK;
  sfa_tensor_type type;
  if (!find_type(dtype->valuestring, &type))
    return sfa_fail(weights->ctx, SFA_ERROR_UNSUPPORTED,
                    "%s: tensor %s is of type %.16s; F32, F16 and BF16 are read: convert the model with "
                    "AutoModelForCausalLM.from_pretrained(DIR, torch_dtype=\"bfloat16\").save_pretrained(NEW_DIR), or use a GGUF file",
                    path, name, dtype->valuestring);
  int64_t shape[4] = {1, 1, 1, 1};
  int32_t n_dims = 0;
  const cJSON *dim;
  cJSON_ArrayForEach(dim, dims) {
    uint64_t size;
    if (n_dims == 4)
      return sfa_fail(weights->ctx, SFA_ERROR_UNSUPPORTED, "%s: tensor %s has more than 4 dimensions", path, name);
    if (!sfa_json_size(dim, &size))
      return fail_header(weights, path, name, "has a shape that is not whole numbers");
    shape[n_dims++] = (int64_t)size;
  }
  const char *copy;
  sfa_tensor *tensor;
  SFA_TRY(sfa_arena_text(weights->ctx, &weights->arena, name, strlen(name), &copy));
  SFA_TRY(sfa_weights_add_tensor(weights, file, copy, type, n_dims, shape, start + begin, &tensor));
  if ((uint64_t)tensor->bytes != end - begin)
    return sfa_fail(weights->ctx, SFA_ERROR_FORMAT,
                    "%s: tensor %s has %lld bytes by its shape, %llu by its data_offsets: download the file again", path, name,
                    (long long)tensor->bytes, (unsigned long long)(end - begin));
  return SFA_OK;
}

static sfa_status read_part(sfa_weights *weights, const char *path) {
  const sfa_weights_file *file;
  SFA_TRY(sfa_weights_add_file(weights, path, &file));
  uint64_t header_bytes = 0, used = 0;
  if (file->map.bytes >= sizeof header_bytes)
    memcpy(&header_bytes, file->map.data, sizeof header_bytes);
  if (header_bytes < 2 || header_bytes > file->map.bytes - sizeof header_bytes || header_bytes > HEADER_BYTES_MAX)
    return sfa_fail(weights->ctx, SFA_ERROR_FORMAT,
                    "%s: %llu header bytes in a file of %zu: it is cut short or no safetensors file, download it again", path,
                    (unsigned long long)header_bytes, file->map.bytes);
  cJSON *header;
  SFA_TRY(sfa_json_parse(weights->ctx, path, (const char *)file->map.data + sizeof header_bytes, (size_t)header_bytes, &header));
  uint64_t start = sizeof header_bytes + header_bytes;
  sfa_status status = SFA_OK;
  for (const cJSON *item = header->child; item && status == SFA_OK; item = item->next)
    if (strcmp(item->string, "__metadata__") != 0)
      status = read_tensor(weights, file, start, item, &used);
  cJSON_Delete(header);
  if (status == SFA_OK && used != file->map.bytes - start)
    return sfa_fail(weights->ctx, SFA_ERROR_FORMAT,
                    "%s: its tensors take %llu bytes, %llu are there: the file is damaged, download it again", path,
                    (unsigned long long)used, (unsigned long long)(file->map.bytes - start));
  return status;
}

/* Every part that the index names is read; every tensor that it lists must have come. */
static sfa_status read_index(sfa_weights *weights, const char *directory, const char *index_path, const cJSON *index) {
  const cJSON *map = cJSON_GetObjectItemCaseSensitive(index, "weight_map"), *item;
  if (!cJSON_IsObject(map) || !map->child)
    return sfa_fail(weights->ctx, SFA_ERROR_FORMAT, "%s has no weight_map: download it again", index_path);
  char path[PATH_BYTES_MAX];
  cJSON_ArrayForEach(item, map) {
    if (!cJSON_IsString(item) || !*item->valuestring || strchr(item->valuestring, '/') || *item->valuestring == '.')
      return sfa_fail(weights->ctx, SFA_ERROR_FORMAT, "%s: the part of %.100s is not the name of a file beside it: download it again",
                      index_path, item->string);
    SFA_TRY(join(weights, directory, item->valuestring, path));
    if (!sfa_table_find(&weights->files, path))
      SFA_TRY(read_part(weights, path));
    if (!sfa_weights_find(weights, item->string) && !is_stored_mask(item->string))
      return sfa_fail(weights->ctx, SFA_ERROR_FORMAT, "%s: tensor %.100s is not in %.100s: download both again", index_path, item->string,
                      item->valuestring);
  }
  return SFA_OK;
}

static sfa_status read_parts(sfa_weights *weights, const char *directory) {
  char path[PATH_BYTES_MAX];
  SFA_TRY(join(weights, directory, "model.safetensors", path));
  if (access(path, F_OK) == 0)
    return read_part(weights, path);
  SFA_TRY(join(weights, directory, "model.safetensors.index.json", path));
  if (access(path, F_OK) != 0)
    return sfa_fail(weights->ctx, SFA_ERROR_IO,
                    "%s has neither model.safetensors nor model.safetensors.index.json: download them, or convert pytorch_model.bin with "
                    "save_pretrained(safe_serialization=True)",
                    directory);
  cJSON *index;
  SFA_TRY(sfa_json_load(weights->ctx, path, INDEX_BYTES_MAX, &index));
  sfa_status status = read_index(weights, directory, path, index);
  cJSON_Delete(index);
  return status;
}

sfa_status sfa_safetensors_read(sfa_weights *weights, const char *directory, const char *adapter) {
  char path[PATH_BYTES_MAX];
  SFA_TRY(read_config(weights, adapter ? adapter : directory, "config.json", ""));
  SFA_TRY(read_config(weights, directory, "tokenizer_config.json", "tokenizer_config/"));
  SFA_TRY(read_config(weights, directory, "generation_config.json", "generation_config/"));
  SFA_TRY(read_parts(weights, directory));
  if (!adapter)
    return SFA_OK;
  SFA_TRY(join(weights, adapter, "adapter.safetensors", path));
  weights->lays_over = true;
  return read_part(weights, path);
}
