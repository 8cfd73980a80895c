/* GGUF versions 2 and 3, little-endian:
 *
 *   "GGUF"  u32 version  u64 n_tensors  u64 n_keys
 *   n_keys    x { text key;  u32 type;  value }          text: u64 bytes, then the bytes
 *   n_tensors x { text name; u32 n_dims; u64 dims[n_dims], innermost first; u32 type; u64 offset }
 *   padding to general.alignment (32), then the tensors' bytes, each at its offset from here
 *
 * An array value is { u32 type; u64 count; count values }. Nothing is believed before it was compared with the bytes that are left.
 */
#include "file/weights_build.h"

#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "model files are read in place: little-endian machines only");

/* Bytes of a value on disk; 0: texts and arrays, which have none of their own. */
static const uint8_t value_bytes[] = {
    [SFA_META_U8] = 1,  [SFA_META_I8] = 1,   [SFA_META_U16] = 2, [SFA_META_I16] = 2, [SFA_META_U32] = 4, [SFA_META_I32] = 4,
    [SFA_META_F32] = 4, [SFA_META_BOOL] = 1, [SFA_META_U64] = 8, [SFA_META_I64] = 8, [SFA_META_F64] = 8};

/* The least bytes that a key and that a tensor's entry take: their counts are checked by these. */
enum { KEY_BYTES_MIN = 8 + 1 + 4 + 1, TENSOR_BYTES_MIN = 8 + 1 + 4 + 4 + 8 };

const char *sfa_gguf_type_name(uint32_t type) {
  static const char *const names[] = {"F32",   "F16",    "Q4_0", "Q4_1", "Q4_2", "Q4_3",    "Q5_0",   "Q5_1",    "Q8_0",  "Q8_1",   "Q2_K",
                                      "Q3_K",  "Q4_K",   "Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S",
                                      "IQ2_S", "IQ4_XS", "I8",   "I16",  "I32",  "I64",     "F64",    "IQ1_M",   "BF16"};
  return type < sizeof names / sizeof *names ? names[type] : "unknown";
}

typedef struct reader {
  sfa_weights *weights;
  sfa_context *ctx;
  const sfa_weights_file *file;
  size_t offset;
} reader;

static size_t bytes_left(const reader *in) { return in->file->map.bytes - in->offset; }

static sfa_status take(reader *in, uint64_t bytes, const char *what, const uint8_t **out) {
  *out = in->file->map.data + in->offset;
  if (bytes > bytes_left(in))
    return sfa_fail(in->ctx, SFA_ERROR_FORMAT,
                    "%s: %s at offset %zu needs %llu bytes, %zu are left: the file is cut short or damaged, download it again",
                    in->file->name, what, in->offset, (unsigned long long)bytes, bytes_left(in));
  in->offset += (size_t)bytes;
  return SFA_OK;
}

static sfa_status take_u32(reader *in, const char *what, uint32_t *out) {
  const uint8_t *data;
  SFA_TRY(take(in, sizeof *out, what, &data));
  memcpy(out, data, sizeof *out);
  return SFA_OK;
}

static sfa_status take_u64(reader *in, const char *what, uint64_t *out) {
  const uint8_t *data;
  SFA_TRY(take(in, sizeof *out, what, &data));
  memcpy(out, data, sizeof *out);
  return SFA_OK;
}

static sfa_status take_count(reader *in, const char *what, size_t bytes_each, uint64_t *out) {
  SFA_TRY(take_u64(in, what, out));
  if (*out > bytes_left(in) / bytes_each)
    return sfa_fail(in->ctx, SFA_ERROR_FORMAT,
                    "%s: the %s before offset %zu is %llu, more than the %zu bytes that follow can hold: download the file again",
                    in->file->name, what, in->offset, (unsigned long long)*out, bytes_left(in));
  return SFA_OK;
}

static sfa_status take_text(reader *in, const char *what, sfa_text *out) {
  uint64_t bytes;
  const uint8_t *data;
  SFA_TRY(take_u64(in, what, &bytes));
  SFA_TRY(take(in, bytes, what, &data));
  out->bytes = (size_t)bytes;
  return sfa_arena_text(in->ctx, &in->weights->arena, (const char *)data, out->bytes, &out->text);
}

static sfa_status take_name(reader *in, const char *what, const char **out) {
  size_t offset = in->offset;
  sfa_text text;
  SFA_TRY(take_text(in, what, &text));
  *out = text.text;
  return sfa_weights_check_name(in->weights, in->file->name, what, offset, text.text, text.bytes);
}

static sfa_status fail_key(const reader *in, const sfa_meta *meta, const char *reason) {
  return sfa_fail(in->ctx, SFA_ERROR_FORMAT, "%s: the key %s before offset %zu %s: download the file again", in->file->name, meta->name,
                  in->offset, reason);
}

static sfa_status read_key(reader *in) {
  sfa_meta meta = {.count = 1};
  uint32_t type;
  SFA_TRY(take_name(in, "a key", &meta.name));
  SFA_TRY(take_u32(in, meta.name, &type));
  if (type == SFA_META_ARRAY) {
    meta.is_array = true;
    SFA_TRY(take_u32(in, meta.name, &type));
    if (type == SFA_META_ARRAY)
      return fail_key(in, &meta, "is an array of arrays, which no model needs");
  }
  if (type > SFA_META_F64)
    return fail_key(in, &meta, "has a type that GGUF does not define");
  meta.type = (sfa_meta_type)type;
  size_t each = meta.type == SFA_META_STRING ? sizeof(uint64_t) : value_bytes[type]; /* a text has its length at least */
  if (meta.is_array)
    SFA_TRY(take_count(in, meta.name, each, (uint64_t *)&meta.count));
  if (meta.type == SFA_META_STRING) {
    sfa_text *texts;
    SFA_TRY(sfa_arena_alloc(in->ctx, &in->weights->arena, (size_t)meta.count * sizeof *texts, (void **)&texts));
    for (int64_t i = 0; i < meta.count; i++)
      SFA_TRY(take_text(in, meta.name, &texts[i]));
    meta.data = texts;
  } else {
    const uint8_t *data;
    SFA_TRY(take(in, (uint64_t)meta.count * each, meta.name, &data));
    for (int64_t i = 0; meta.type == SFA_META_BOOL && i < meta.count; i++)
      if (data[i] > 1)
        return fail_key(in, &meta, "holds a truth value that is neither 0 nor 1");
    meta.data = data;
  }
  return sfa_weights_add_meta(in->weights, in->file->name, &meta);
}

/* What an entry of the tensor list says; its bytes are found when the list has ended. */
typedef struct entry {
  const char *name;
  int32_t n_dims;
  int64_t shape[4]; /* outermost first */
  uint32_t type;
  uint64_t offset;
} entry;

static sfa_status read_entry(reader *in, uint64_t alignment, entry *out) {
  uint32_t n_dims;
  SFA_TRY(take_name(in, "a tensor's name", &out->name));
  SFA_TRY(take_u32(in, out->name, &n_dims));
  if (n_dims > 4)
    return sfa_fail(in->ctx, SFA_ERROR_FORMAT, "%s: tensor %s has %u dimensions, GGUF has at most 4: download the file again",
                    in->file->name, out->name, n_dims);
  out->n_dims = (int32_t)n_dims;
  for (uint32_t d = 0; d < n_dims; d++)
    SFA_TRY(take_u64(in, out->name, (uint64_t *)&out->shape[n_dims - 1 - d]));
  SFA_TRY(take_u32(in, out->name, &out->type));
  SFA_TRY(take_u64(in, out->name, &out->offset));
  if (!sfa_tensor_block_len((sfa_tensor_type)out->type))
    return sfa_fail(in->ctx, SFA_ERROR_UNSUPPORTED,
                    "%s: tensor %s is of type %u (%s), which is not read here: use a file quantised to Q4_K_M, Q5_K_M, Q6_K, Q8_0 or F16",
                    in->file->name, out->name, out->type, sfa_gguf_type_name(out->type));
  if (out->offset % alignment)
    return sfa_fail(in->ctx, SFA_ERROR_FORMAT,
                    "%s: tensor %s has the offset %llu, not a multiple of the alignment %llu: download the file again", in->file->name,
                    out->name, (unsigned long long)out->offset, (unsigned long long)alignment);
  return SFA_OK;
}

static sfa_status read_tensors(reader *in, uint64_t n_tensors, uint64_t alignment) {
  entry *entries;
  SFA_TRY(sfa_arena_alloc(in->ctx, &in->weights->arena, (size_t)n_tensors * sizeof *entries, (void **)&entries));
  for (uint64_t i = 0; i < n_tensors; i++)
    SFA_TRY(read_entry(in, alignment, &entries[i]));
  uint64_t start = (in->offset + alignment - 1) & ~(alignment - 1);
  for (uint64_t i = 0; i < n_tensors; i++) {
    sfa_tensor *tensor;
    uint64_t offset;
    if (__builtin_add_overflow(start, entries[i].offset, &offset))
      offset = UINT64_MAX; /* beyond any file: refused with the tensor's name */
    SFA_TRY(sfa_weights_add_tensor(in->weights, in->file, entries[i].name, (sfa_tensor_type)entries[i].type, entries[i].n_dims,
                                   entries[i].shape, offset, &tensor));
  }
  return SFA_OK;
}

sfa_status sfa_gguf_read(sfa_weights *weights, const sfa_weights_file *file) {
  reader in = {.weights = weights, .ctx = weights->ctx, .file = file, .offset = 4};
  uint32_t version;
  uint64_t n_tensors, n_keys;
  SFA_TRY(take_u32(&in, "the version", &version));
  if (version != 2 && version != 3)
    return sfa_fail(in.ctx, SFA_ERROR_UNSUPPORTED, "%s: GGUF version %u%s, versions 2 and 3 are read: download the model as a newer GGUF",
                    file->name, version, version & 0xffff ? "" : " (a big-endian file)");
  SFA_TRY(take_count(&in, "number of tensors", TENSOR_BYTES_MIN, &n_tensors));
  SFA_TRY(take_count(&in, "number of keys", KEY_BYTES_MIN, &n_keys));
  for (uint64_t i = 0; i < n_keys; i++)
    SFA_TRY(read_key(&in));
  double alignment = 32, n_parts = 1;
  sfa_meta_number(weights, "general.alignment", &alignment);
  sfa_meta_number(weights, "split.count", &n_parts);
  if (!(alignment >= 1 && alignment <= 65536) || alignment != (uint64_t)alignment || ((uint64_t)alignment & ((uint64_t)alignment - 1)))
    return sfa_fail(in.ctx, SFA_ERROR_FORMAT, "%s: general.alignment is %g, not a power of two up to 65536: download the file again",
                    file->name, alignment);
  if (n_parts > 1)
    return sfa_fail(in.ctx, SFA_ERROR_UNSUPPORTED, "%s is one of %g parts of a model: join them with `llama-gguf-split --merge`",
                    file->name, n_parts);
  return read_tensors(&in, n_tensors, (uint64_t)alignment);
}
