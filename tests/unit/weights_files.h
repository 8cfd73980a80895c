/* Small valid model files in memory, for the tests of the readers. Included after cmocka.h. */
#ifndef SFA_WEIGHTS_FILES_H
#define SFA_WEIGHTS_FILES_H

#include "base/half.h"
#include "file/weights.h"
#include "temp_files.h"

typedef struct buffer {
  uint8_t *data;
  size_t bytes, capacity;
} buffer;

static inline void put(buffer *b, const void *data, size_t bytes) {
  if (bytes > b->capacity - b->bytes) {
    b->capacity = 2 * (b->bytes + bytes) + 1024;
    b->data = realloc(b->data, b->capacity);
    assert_non_null(b->data);
  }
  if (bytes)
    memcpy(b->data + b->bytes, data, bytes);
  b->bytes += bytes;
}

static inline void put_u32(buffer *b, uint32_t value) { put(b, &value, sizeof value); }
static inline void put_u64(buffer *b, uint64_t value) { put(b, &value, sizeof value); }

static inline void put_text(buffer *b, const char *text) {
  put_u64(b, strlen(text));
  put(b, text, strlen(text));
}

static inline void put_zeros(buffer *b, size_t bytes) {
  for (size_t i = 0; i < bytes; i++)
    put(b, "", 1);
}

static inline void put_padding(buffer *b, size_t alignment) { put_zeros(b, (alignment - b->bytes % alignment) % alignment); }

/* first, first + 1, ... */
static inline void put_floats(buffer *b, int n, float first) {
  for (int i = 0; i < n; i++)
    put(b, &(float){first + (float)i}, sizeof(float));
}

static inline void buffer_save(const buffer *b, const char *path) { write_whole(path, b->data, b->bytes); }

static inline void buffer_free(buffer *b) {
  free(b->data);
  *b = (buffer){0};
}

/* ---- GGUF ---- */

static inline void put_key(buffer *b, const char *key, uint32_t type, const void *value, size_t bytes) {
  put_text(b, key);
  put_u32(b, type);
  put(b, value, bytes);
}

static inline void put_array(buffer *b, const char *key, uint32_t type, uint64_t count) {
  put_key(b, key, 9, &type, 4);
  put_u64(b, count);
}

/* dims: innermost first, as the file has them. */
static inline void put_tensor(buffer *b, const char *name, uint32_t n_dims, const uint64_t *dims, uint32_t type, uint64_t offset) {
  put_text(b, name);
  put_u32(b, n_dims);
  put(b, dims, n_dims * sizeof *dims);
  put_u32(b, type);
  put_u64(b, offset);
}

/* Every type of value, three tensors; the last byte of the file is the last tensor's. */
static inline void make_gguf(buffer *b, uint32_t version) {
  put(b, "GGUF", 4);
  put_u32(b, version);
  put_u64(b, 3);
  put_u64(b, 17);
  put_key(b, "u8", 0, &(uint8_t){200}, 1);
  put_key(b, "i8", 1, &(int8_t){-100}, 1);
  put_key(b, "u16", 2, &(uint16_t){60000}, 2);
  put_key(b, "i16", 3, &(int16_t){-30000}, 2);
  put_key(b, "u32", 4, &(uint32_t){4000000000u}, 4);
  put_key(b, "i32", 5, &(int32_t){-2000000000}, 4);
  put_key(b, "f32", 6, &(float){0.25f}, 4);
  put_key(b, "flag", 7, &(uint8_t){1}, 1);
  put_key(b, "general.architecture", 8, "", 0);
  put_text(b, "llama");
  put_key(b, "u64", 10, &(uint64_t){1ull << 53}, 8);
  put_key(b, "i64", 11, &(int64_t){-(1ll << 53)}, 8);
  put_key(b, "f64", 12, &(double){0.1}, 8);
  put_array(b, "tokens", 8, 3);
  put_text(b, "");
  put_u64(b, 3);
  put(b, "a\0b", 3);
  put_text(b, "hello");
  put_array(b, "scores", 6, 2);
  put(b, (const float[]){2.0f, -1.5f}, 8);
  put_array(b, "pattern", 7, 2);
  put(b, (const uint8_t[]){0, 1}, 2);
  put_array(b, "empty", 5, 0);
  put_key(b, "general.alignment", 4, &(uint32_t){64}, 4);
  put_tensor(b, "token_embd.weight", 2, (const uint64_t[]){4, 3}, SFA_TENSOR_F32, 0);
  put_tensor(b, "norm", 1, (const uint64_t[]){5}, SFA_TENSOR_F32, 256);
  put_tensor(b, "blk.0.q", 2, (const uint64_t[]){64, 2}, SFA_TENSOR_Q8_0, 64);
  put_padding(b, 64);
  const size_t start = b->bytes;
  put_floats(b, 12, 0.5f);
  put_padding(b, 64);
  put_zeros(b, 4 * 34);
  put_zeros(b, start + 256 - b->bytes);
  put_floats(b, 5, 100);
}

/* ---- llama2.c ---- */

/* Dim 8, hidden 12, 2 layers, 4 heads, 2 KV heads, vocabulary 6, 5 positions; the floats are 0, 1, 2, ... */
static inline void make_llama2c(buffer *b, int shared) {
  const int32_t header[7] = {8, 12, 2, 4, 2, shared ? 6 : -6, 5};
  const int a_layer = 8 + 64 + 32 + 32 + 64 + 8 + 3 * 96;
  put(b, header, sizeof header);
  put_floats(b, 6 * 8 + 2 * a_layer + 8 + 2 * 5 * 1 + (shared ? 0 : 6 * 8), 0);
}

/* ---- safetensors ---- */

static inline void put_safetensors(buffer *b, const char *header, size_t data_bytes) {
  put_text(b, header);
  put_zeros(b, data_bytes);
}

static inline void make_safetensors(buffer *b) {
  put_text(b, "{\"__metadata__\":{\"format\":\"pt\"},\"wte.weight\":{\"dtype\":\"F32\",\"shape\":[3,4],\"data_offsets\":[0,48]},"
              "\"half\":{\"dtype\":\"F16\",\"shape\":[3],\"data_offsets\":[48,54]},"
              "\"brain\":{\"dtype\":\"BF16\",\"shape\":[2,2],\"data_offsets\":[54,62]},"
              "\"h.0.attn.bias\":{\"dtype\":\"BOOL\",\"shape\":[3],\"data_offsets\":[62,65]},"
              "\"scalar\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[65,69]}}   ");
  put_floats(b, 12, 0);
  for (int i = 0; i < 3; i++)
    put(b, &(uint16_t){sfa_f16_from_f32(1 + (float)i)}, 2);
  for (int i = 0; i < 4; i++)
    put(b, &(uint16_t){sfa_bf16_from_f32(4 + (float)i)}, 2);
  put_zeros(b, 3);
  put_floats(b, 1, 9);
}

#endif
