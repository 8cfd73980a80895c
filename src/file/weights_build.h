/* file/weights_build.h: what the three readers share: each fills one sfa_weights, tensor by tensor and key by key, through these calls,
 * which do the checks that are common to all formats. */
#ifndef SFA_WEIGHTS_BUILD_H
#define SFA_WEIGHTS_BUILD_H

#include "base/map.h"
#include "file/table.h"
#include "file/weights.h"

/* Types of metadata values; numbers are GGUF's. */
typedef enum sfa_meta_type {
  SFA_META_U8 = 0,
  SFA_META_I8 = 1,
  SFA_META_U16 = 2,
  SFA_META_I16 = 3,
  SFA_META_U32 = 4,
  SFA_META_I32 = 5,
  SFA_META_F32 = 6,
  SFA_META_BOOL = 7,
  SFA_META_STRING = 8,
  SFA_META_ARRAY = 9,
  SFA_META_U64 = 10,
  SFA_META_I64 = 11,
  SFA_META_F64 = 12
} sfa_meta_type;

typedef struct sfa_text {
  const char *text; /* NUL behind it */
  size_t bytes;
} sfa_text;

/* One value (count 1) or an array of values. */
typedef struct sfa_meta {
  const char *name;
  sfa_meta_type type; /* of the elements; never SFA_META_ARRAY */
  bool is_array;
  int64_t count;
  const void *data; /* [count] little-endian values in the map or the arena, alignment 1; strings: sfa_text, bool: one byte */
} sfa_meta;

/* A file of the model. */
typedef struct sfa_weights_file {
  const char *name; /* as opened */
  sfa_map map;
} sfa_weights_file;

struct sfa_weights {
  sfa_context *ctx;
  const char *format;
  bool lays_over;  /* tensors that are added take the place of others */
  sfa_arena arena; /* names, texts, arrays */
  sfa_table files; /* of sfa_weights_file */
  sfa_table tensors;
  sfa_table metas;
};

/* The readers. Each gets a fresh sfa_weights; on failure the caller closes it. */
sfa_status sfa_gguf_read(sfa_weights *weights, const sfa_weights_file *file);
sfa_status sfa_llama2c_read(sfa_weights *weights, const sfa_weights_file *file);
/* Is the size of the file exactly what its first seven integers say? */
bool sfa_llama2c_is(const sfa_map *map);
sfa_status sfa_safetensors_read(sfa_weights *weights, const char *directory, const char *adapter);

/* Maps a file for as long as the weights live. A path that is open already gives that file. */
sfa_status sfa_weights_add_file(sfa_weights *weights, const char *path, const sfa_weights_file **file);

/* A tensor whose bytes start `offset` bytes into a file. Checks the name, the shape (1 or more everywhere, at most 4 dimensions, whole
 * blocks) and that the bytes are inside the file. The name must live as long as the weights; the shape is outermost first. */
sfa_status sfa_weights_add_tensor(sfa_weights *weights, const sfa_weights_file *file, const char *name, sfa_tensor_type type,
                                  int32_t n_dims, const int64_t *shape, uint64_t offset, sfa_tensor **tensor);
/* A name or key from a file, as text that is safe to print: 1 to 255 bytes, none of them a control character. */
sfa_status sfa_weights_check_name(sfa_weights *weights, const char *path, const char *what, size_t offset, const char *text, size_t bytes);

/* Key and data must live as long as the weights (the arena). */
sfa_status sfa_weights_add_meta(sfa_weights *weights, const char *path, const sfa_meta *meta);
/* These copy the value; the key must live as long as the weights. */
sfa_status sfa_weights_add_number(sfa_weights *weights, const char *path, const char *key, double value);
sfa_status sfa_weights_add_bool(sfa_weights *weights, const char *path, const char *key, bool value);
sfa_status sfa_weights_add_string(sfa_weights *weights, const char *path, const char *key, const char *value);

/* "Q2_K", also of types that are not read here; "unknown". */
const char *sfa_gguf_type_name(uint32_t type);

#endif
