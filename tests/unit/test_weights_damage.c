/* Damaged files and failing memory: every reader gives an error or an honest view, never a crash, a read outside the file, a request for
 * memory that the file's size does not justify, or a leak (the address sanitizer's part). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "file/weights_build.h"
#include "weights_files.h"

/* ---- An allocator that watches ----------------------------------------------------------------------------------------------- */

typedef struct watch {
  size_t largest;      /* request so far */
  int64_t n_live;      /* pieces not given back */
  int64_t n_until_out; /* requests granted before one is refused; negative: never */
} watch;

static void *watched_alloc(void *user, size_t bytes) {
  watch *w = user;
  if (bytes > w->largest)
    w->largest = bytes;
  if (w->n_until_out >= 0 && w->n_until_out-- == 0)
    return NULL;
  w->n_live++;
  return aligned_alloc(64, (bytes + 63) & ~(size_t)63);
}

static void watched_free(void *user, void *memory) {
  ((watch *)user)->n_live--;
  free(memory);
}

static watch watcher;
static sfa_context *ctx;

/* ---- The three kinds of file ------------------------------------------------------------------------------------------------- */

static void make_gguf3(buffer *b) { make_gguf(b, 3); }
static void make_llama2c_unshared(buffer *b) { make_llama2c(b, 0); }

static void make_config(buffer *b) {
  const char *text = "{\"model_type\":\"llama\",\"a\":[1,2],\"b\":{\"c\":true,\"d\":[{\"e\":\"\\u00e9\"}]},\"f\":null,\"g\":-1.5e3}";
  put(b, text, strlen(text));
}

static void make_index(buffer *b) {
  const char *text = "{\"weight_map\":{\"wte.weight\":\"part.safetensors\",\"half\":\"part.safetensors\"}}";
  put(b, text, strlen(text));
}

typedef struct kind {
  const char *file; /* the damaged one */
  bool is_dir;      /* opened by its directory */
  void (*make)(buffer *b);
  struct {
    const char *file;
    void (*make)(buffer *b);
  } beside[2]; /* what must be there too, whole */
} kind;

static const kind kinds[] = {
    {"a.gguf", false, make_gguf3, {{0}}},
    {"a.bin", false, make_llama2c_unshared, {{0}}},
    {"model.safetensors", true, make_safetensors, {{"config.json", make_config}}},
    {"config.json", true, make_config, {{"model.safetensors", make_safetensors}}},
    {"model.safetensors.index.json", true, make_index, {{"config.json", make_config}, {"part.safetensors", make_safetensors}}},
};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

static void write_file(const char *name, const buffer *b) {
  char path[512];
  snprintf(path, sizeof path, "%s/%s", temp_dir, name);
  buffer_save(b, path);
}

/* Makes the directory of a kind, with the file whole; *whole gets its bytes. */
static void set_up_kind(const kind *k, buffer *whole) {
  make_temp_dir(temp_dir);
  for (size_t i = 0; i < 2 && k->beside[i].make; i++) {
    buffer b = {0};
    k->beside[i].make(&b);
    write_file(k->beside[i].file, &b);
    buffer_free(&b);
  }
  k->make(whole);
  write_file(k->file, whole);
}

/* ---- What must hold of any view ---------------------------------------------------------------------------------------------- */

static const sfa_weights_file *file_of(const sfa_weights *w, const sfa_tensor *t) {
  for (int64_t i = 0; i < w->files.count; i++) {
    const sfa_weights_file *file = sfa_table_at(&w->files, i);
    const uint8_t *data = t->data, *start = file->map.data;
    if (data >= start && data <= start + file->map.bytes && (size_t)t->bytes <= (size_t)(start + file->map.bytes - data))
      return file;
  }
  return NULL;
}

/* Reads every value and every tensor to its last byte. */
static void walk(const sfa_weights *w) {
  for (int64_t i = 0; i < sfa_weights_count(w); i++) {
    const sfa_tensor *t = sfa_weights_at(w, i);
    assert_ptr_equal(sfa_weights_find(w, t->name), t);
    assert_non_null(file_of(w, t));
    assert_true(t->n_elements > 0 && t->n_elements == t->shape[0] * t->shape[1] * t->shape[2] * t->shape[3]);
    assert_true(t->bytes == t->n_elements / sfa_tensor_block_len(t->type) * sfa_tensor_block_bytes(t->type));
    float *values = malloc((size_t)t->n_elements * sizeof *values);
    assert_non_null(values);
    sfa_tensor_dequantize(t->type, t->n_elements, t->data, values);
    free(values);
  }
  for (int64_t i = 0; i < w->metas.count; i++) {
    const sfa_meta *meta = sfa_table_at(&w->metas, i);
    const int64_t length = sfa_meta_array_len(w, meta->name);
    const char *text = "";
    size_t bytes = 0;
    double number;
    bool yes;
    assert_int_equal(length, meta->is_array ? meta->count : -1);
    for (int64_t j = 0; j < length; j++) {
      assert_true(meta->type == SFA_META_STRING ? sfa_meta_array_string(w, meta->name, j, &text, &bytes)
                                                : sfa_meta_array_number(w, meta->name, j, &number));
      assert_int_equal(text[bytes], 0);
    }
    assert_false(sfa_meta_array_number(w, meta->name, length < 0 ? 0 : length, &number));
    if (length < 0)
      assert_int_equal(
          sfa_meta_number(w, meta->name, &number) + sfa_meta_bool(w, meta->name, &yes) + sfa_meta_string(w, meta->name, &text, &bytes), 1);
    assert_int_equal(text[bytes], 0);
  }
}

/* Opens the kind's file as it lies there now. bytes: what all files have together. */
static sfa_status try_open(const kind *k, size_t bytes) {
  char path[512];
  snprintf(path, sizeof path, k->is_dir ? "%s" : "%s/%s", temp_dir, k->file);
  sfa_weights *w = (sfa_weights *)&watcher;
  watcher.largest = 0;
  sfa_status status = sfa_weights_open(ctx, path, &w);
  assert_true(watcher.largest <= 128 * 1024 + 32 * bytes);
  if (status == SFA_OK) {
    walk(w);
    sfa_weights_close(w);
  } else {
    assert_null(w);
    if (!strstr(sfa_context_error(ctx), temp_dir) && status != SFA_ERROR_MEMORY)
      fail_msg("the error names no file: %s", sfa_context_error(ctx));
  }
  assert_int_equal(watcher.n_live, 0);
  return status;
}

/* ---- The damage -------------------------------------------------------------------------------------------------------------- */

/* Cut at every byte: never a valid model, for each of these files ends with its last tensor or brace. */
static void test_truncation(void **state) {
  (void)state;
  for (size_t i = 0; i < N_KINDS; i++) {
    buffer whole = {0};
    set_up_kind(&kinds[i], &whole);
    assert_int_equal(try_open(&kinds[i], whole.bytes), SFA_OK);
    size_t n_cuts = 0;
    for (size_t cut = 0; cut<whole.bytes; cut += whole.bytes> 4000 ? whole.bytes / 2000 : 1, n_cuts++) {
      write_file(kinds[i].file, &(buffer){.data = whole.data, .bytes = cut});
      if (try_open(&kinds[i], whole.bytes) == SFA_OK)
        fail_msg("%s opens when cut to %zu of %zu bytes", kinds[i].file, cut, whole.bytes);
    }
    assert_true(n_cuts >= 1000 || n_cuts == whole.bytes);
    buffer_free(&whole);
    remove_tree(temp_dir);
  }
}

/* Every byte (of the first 2,000) replaced by several others: an error, or a view whose every tensor is inside the file. */
static void test_corruption(void **state) {
  (void)state;
  static const uint8_t flips[] = {0x01, 0x02, 0x80, 0x40, 0xff};
  for (size_t i = 0; i < N_KINDS; i++) {
    buffer whole = {0};
    set_up_kind(&kinds[i], &whole);
    size_t n_refused = 0;
    for (size_t at = 0; at < whole.bytes && at < 2000; at++)
      for (size_t f = 0; f < sizeof flips; f++) {
        whole.data[at] ^= flips[f];
        write_file(kinds[i].file, &whole);
        n_refused += try_open(&kinds[i], whole.bytes) != SFA_OK;
        whole.data[at] ^= flips[f];
      }
    assert_true(n_refused > 20);
    buffer_free(&whole);
    remove_tree(temp_dir);
  }
}

/* Whole files, no memory at the n-th request: SFA_ERROR_MEMORY, and everything given back. */
static void test_memory_runs_out(void **state) {
  (void)state;
  for (size_t i = 0; i < N_KINDS; i++) {
    buffer whole = {0};
    set_up_kind(&kinds[i], &whole);
    sfa_status status = SFA_ERROR_MEMORY;
    int64_t n = 0;
    for (; status != SFA_OK && n < 1000; n++) {
      watcher.n_until_out = n;
      status = try_open(&kinds[i], whole.bytes);
      assert_true(status == SFA_OK || status == SFA_ERROR_MEMORY);
    }
    watcher.n_until_out = -1;
    assert_true(n > 3 && n < 1000);
    buffer_free(&whole);
    remove_tree(temp_dir);
  }
}

static int set_up(void **state) {
  (void)state;
  static const sfa_allocator allocator = {watched_alloc, watched_free, &watcher};
  sfa_context_options options = {.struct_size = sizeof options, .allocator = &allocator, .n_threads = 1};
  watcher.n_until_out = -1;
  if (sfa_context_create(&options, &ctx) != SFA_OK)
    return -1;
  watcher.n_live = 0; /* the context itself is not counted */
  return 0;
}

static int tear_down(void **state) {
  (void)state;
  sfa_context_destroy(ctx);
  return 0;
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_truncation), cmocka_unit_test(test_corruption),
                                     cmocka_unit_test(test_memory_runs_out)};
  return cmocka_run_group_tests(tests, set_up, tear_down);
}
