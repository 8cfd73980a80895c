/* The parts that the fuzz targets share. */
#include "fuzz_case.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "file/weights_build.h"

static char dir[64];
static sfa_context *context;

void fuzz_check(bool condition, const char *what) {
  if (!condition) {
    fprintf(stderr, "broken promise: %s\n", what);
    abort();
  }
}

/* No reader may ask for much more than its file: the largest input here is a few hundred kilobytes. */
static void *limited_alloc(void *user, size_t bytes) {
  (void)user;
  fuzz_check(bytes <= (size_t)256 << 20, "memory is asked for by the size of the file");
  return aligned_alloc(64, (bytes + 63) & ~(size_t)63);
}

static void limited_free(void *user, void *memory) {
  (void)user;
  free(memory);
}

static void remove_dir(void) {
  char command[128];
  snprintf(command, sizeof command, "rm -rf '%s'", dir);
  if (system(command) != 0)
    fprintf(stderr, "%s was left behind\n", dir);
}

sfa_context *fuzz_context(void) {
  static const sfa_allocator allocator = {limited_alloc, limited_free, NULL};
  if (!context) {
    sfa_context_options options = {.struct_size = sizeof options, .allocator = &allocator, .n_threads = 1};
    fuzz_check(sfa_context_init(&options, &context) == SFA_OK, "a context is made"); /* base alone: no backend is needed */
  }
  return context;
}

const char *fuzz_path(const char *name) {
  static char path[256];
  if (!*dir) {
    snprintf(dir, sizeof dir, "%s/sfa_fuzz_XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
    fuzz_check(mkdtemp(dir) != NULL, "a directory is made");
    atexit(remove_dir);
  }
  snprintf(path, sizeof path, "%s/%s", dir, name);
  return path;
}

void fuzz_write(const char *name, const void *data, size_t bytes) {
  FILE *file = fopen(fuzz_path(name), "wb");
  fuzz_check(file != NULL, "a file is made");
  fuzz_check(bytes == 0 || fwrite(data, 1, bytes, file) == bytes, "a file is written");
  fuzz_check(fclose(file) == 0, "a file is closed");
}

void fuzz_write_repaired(const char *name, const uint8_t *data, size_t bytes, void (*repair)(uint8_t *data, size_t bytes)) {
  uint8_t *copy = malloc(bytes + !bytes);
  fuzz_check(copy != NULL, "memory for the input");
  if (bytes)
    memcpy(copy, data, bytes);
  if (bytes && copy[0])
    repair(copy, bytes);
  fuzz_write(name, copy, bytes);
  free(copy);
}

void fuzz_check_open(sfa_status status, const char *name, const void *given) {
  fuzz_check((status == SFA_OK) == (given != NULL), "something is given on success alone");
  if (status != SFA_OK)
    fuzz_check(strstr(sfa_context_error(fuzz_context()), fuzz_path(name)) || status == SFA_ERROR_MEMORY, "the error names the file");
}

void fuzz_remove(const char *name) { remove(fuzz_path(name)); }

const uint8_t *fuzz_find_line(const uint8_t *data, size_t bytes, const uint8_t **rest) {
  const uint8_t *line = bytes ? memmem(data, bytes, "\n%%\n", 4) : NULL;
  *rest = line ? line + 4 : NULL;
  return line;
}

/* ---- Weights ----------------------------------------------------------------------------------------------------------------- */

static bool is_inside(const sfa_weights *weights, const sfa_tensor *tensor) {
  const uint8_t *data = tensor->data;
  for (int64_t i = 0; i < weights->files.count; i++) {
    const sfa_map *map = &((const sfa_weights_file *)sfa_table_at(&weights->files, i))->map;
    if (data >= map->data && data <= map->data + map->bytes && (size_t)tensor->bytes <= (size_t)(map->data + map->bytes - data))
      return true;
  }
  return false;
}

static void walk_tensor(const sfa_weights *weights, const sfa_tensor *t) {
  const int32_t block_len = sfa_tensor_block_len(t->type), block_bytes = sfa_tensor_block_bytes(t->type);
  float values[256];
  fuzz_check(sfa_weights_find(weights, t->name) == t, "a tensor is found by its name");
  fuzz_check(is_inside(weights, t), "a tensor is inside its file");
  fuzz_check(t->n_elements >= 1 && t->n_elements == t->shape[0] * t->shape[1] * t->shape[2] * t->shape[3], "elements agree with the shape");
  fuzz_check(t->bytes == t->n_elements / block_len * block_bytes, "bytes agree with the elements");
  sfa_tensor_dequantize(t->type, block_len, t->data, values);
  sfa_tensor_dequantize(t->type, block_len, (const uint8_t *)t->data + t->bytes - block_bytes, values);
}

static void walk_meta(const sfa_weights *weights, const sfa_meta *meta) {
  const int64_t len = sfa_meta_array_len(weights, meta->name);
  const char *text = "";
  size_t bytes = 0;
  double number;
  bool yes;
  fuzz_check(len == (meta->is_array ? meta->count : -1), "the length of an array");
  for (int64_t i = 0; i < len; i++) {
    fuzz_check(meta->type == SFA_META_STRING ? sfa_meta_array_string(weights, meta->name, i, &text, &bytes)
                                             : sfa_meta_array_number(weights, meta->name, i, &number),
               "an element of an array");
    fuzz_check(text[bytes] == 0, "a NUL behind an element");
  }
  if (len < 0)
    fuzz_check(sfa_meta_number(weights, meta->name, &number) + sfa_meta_bool(weights, meta->name, &yes) +
                       sfa_meta_string(weights, meta->name, &text, &bytes) ==
                   1,
               "a value has one type");
  fuzz_check(text[bytes] == 0, "a NUL behind a text");
}

sfa_weights *fuzz_open(const char *path) {
  sfa_weights *weights;
  sfa_status status = sfa_weights_open(fuzz_context(), path, &weights);
  if (status != SFA_OK) {
    fuzz_check(weights == NULL, "nothing is given on failure");
    fuzz_check(strstr(sfa_context_error(fuzz_context()), dir) != NULL, "the error names the file");
    return NULL;
  }
  for (int64_t i = 0; i < sfa_weights_count(weights); i++)
    walk_tensor(weights, sfa_weights_at(weights, i));
  for (int64_t i = 0; i < weights->metas.count; i++)
    walk_meta(weights, sfa_table_at(&weights->metas, i));
  return weights;
}

/* ---- Tokenizers -------------------------------------------------------------------------------------------------------------- */

void fuzz_tokenizer(sfa_status status, sfa_tokenizer *tokenizer) {
  static const char *const texts[] = {"", " a", "Hello, world! 12 345\n\n  x", "<s>caf\xc3\xa9 \xe4\xbd\xa0\xe5\xa5\xbd<|im_end|>",
                                      "\xff\xfe\xc3"};
  if (status != SFA_OK) {
    fuzz_check(tokenizer == NULL, "nothing is given on failure");
    fuzz_check(*sfa_context_error(fuzz_context()) != 0, "there is an error text");
    return;
  }
  for (size_t i = 0; i < 2 * sizeof texts / sizeof *texts; i++) {
    const char *text = texts[i / 2];
    int32_t *ids;
    size_t n_ids;
    char piece[64];
    if (sfa_tokenizer_encode(tokenizer, text, strlen(text), i % 2 ? SFA_TOKENIZE_SPECIAL | SFA_TOKENIZE_PARSE : 0, &ids, &n_ids) != SFA_OK)
      continue;
    for (size_t j = 0; j < n_ids; j++) {
      fuzz_check(ids[j] >= 0 && ids[j] < sfa_tokenizer_vocab_size(tokenizer), "an id is in the vocabulary");
      sfa_tokenizer_decode(tokenizer, j ? ids[j - 1] : -1, ids[j], j & 1, piece, sizeof piece);
      sfa_tokenizer_is_end(tokenizer, ids[j]);
    }
    sfa_free_ids(fuzz_context(), ids);
  }
  if (sfa_tokenizer_has_chat(tokenizer)) {
    const sfa_chat_message messages[] = {{"system", "Be brief."}, {"user", "Hello"}, {"assistant", "Yes?"}, {"user", "Bye"}};
    char *text;
    if (sfa_chat_format(tokenizer, messages, 4, 1, &text) == SFA_OK)
      sfa_free_text(fuzz_context(), text);
  }
  sfa_tokenizer_close(tokenizer);
}
