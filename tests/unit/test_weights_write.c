/* Model files as they are written: read back by the readers, and whole or not there. */
#include "unit_tools.h"
#include "weights_files.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "file/save.h"
#include "file/weights_write.h"

/* Row r of a [3][5] tensor: 100 r, 100 r + 1, ... times 1.001, which no 16-bit type holds. */
static void counted_row(const sfa_tensor_out *tensor, int64_t row, float *out) {
  for (int64_t i = 0; i < tensor->shape[1]; i++)
    out[i] = (float)(100 * row + i) * 1.001f;
}

static const float vector[7] = {-1, 0, 1, 2.5f, 3e-5f, 65504, 1e-3f};

/* One tensor of each kind of source and type. */
static void make_tensors(sfa_tensor_out *t) {
  t[0] = (sfa_tensor_out){.name = "a.weight", .type = SFA_TENSOR_F32, .n_dims = 2, .shape = {3, 5, 1, 1}, .row = counted_row};
  t[1] = (sfa_tensor_out){.name = "b.weight", .type = SFA_TENSOR_BF16, .n_dims = 2, .shape = {3, 5, 1, 1}, .row = counted_row};
  t[2] = (sfa_tensor_out){.name = "c.bias", .type = SFA_TENSOR_F16, .n_dims = 1, .shape = {7, 1, 1, 1}, .values = vector};
  t[3] = (sfa_tensor_out){.name = "zero", .type = SFA_TENSOR_F32, .n_dims = 1, .shape = {9, 1, 1, 1}};
}

static void check_tensors(const sfa_weights *weights) {
  float out[16], row[5];
  for (int which = 0; which < 2; which++) {
    const sfa_tensor *t = sfa_weights_find(weights, which ? "b.weight" : "a.weight");
    assert_non_null(t);
    assert_int_equal(t->n_dims, 2);
    assert_int_equal(t->shape[0], 3);
    assert_int_equal(t->shape[1], 5);
    sfa_tensor_dequantize(t->type, 15, t->data, out);
    for (int64_t r = 0; r < 3; r++) {
      counted_row(&(sfa_tensor_out){.shape = {3, 5, 1, 1}}, r, row);
      for (int i = 0; i < 5; i++)
        assert_true(out[5 * r + i] == (which ? sfa_f32_from_bf16(sfa_bf16_from_f32(row[i])) : row[i]));
    }
  }
  const sfa_tensor *c = sfa_weights_find(weights, "c.bias"), *zero = sfa_weights_find(weights, "zero");
  assert_non_null(c);
  assert_non_null(zero);
  assert_int_equal(c->type, SFA_TENSOR_F16);
  sfa_tensor_dequantize(c->type, 7, c->data, out);
  for (int i = 0; i < 7; i++)
    assert_true(out[i] == sfa_f32_from_f16(sfa_f16_from_f32(vector[i])));
  sfa_tensor_dequantize(zero->type, 9, zero->data, out);
  for (int i = 0; i < 9; i++)
    assert_true(out[i] == 0);
}

static void test_safetensors(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  sfa_tensor_out tensors[4];
  sfa_weights *weights;
  make_tensors(tensors);
  assert_int_equal(sfa_save_file(ctx, in_temp("config.json"), "{\"model_type\":\"llama\"}", 22), SFA_OK);
  assert_int_equal(sfa_safetensors_write(ctx, in_temp("model.safetensors"), 4, tensors), SFA_OK);
  assert_int_equal(sfa_weights_open(ctx, temp_dir, &weights), SFA_OK);
  assert_int_equal(sfa_weights_count(weights), 4);
  check_tensors(weights);
  sfa_weights_close(weights);
  assert_int_equal(access(in_temp("model.safetensors.part"), F_OK), -1);
  sfa_context_destroy(ctx);
}

static void test_gguf(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  const uint32_t layers = 3, ks[] = {4, 5, 6};
  const uint8_t yes = 1;
  const float eps = 1e-5f;
  const sfa_text name[] = {{"llama", 5}}, words[] = {{"one", 3}, {"", 0}, {"thr\0e", 5}};
  const sfa_meta keys[] = {{"general.architecture", SFA_META_STRING, false, 1, name},
                           {"llama.block_count", SFA_META_U32, false, 1, &layers},
                           {"yes", SFA_META_BOOL, false, 1, &yes},
                           {"eps", SFA_META_F32, false, 1, &eps},
                           {"ks", SFA_META_U32, true, 3, ks},
                           {"words", SFA_META_STRING, true, 3, words}};
  sfa_tensor_out tensors[4];
  sfa_weights *weights;
  make_tensors(tensors);
  assert_int_equal(sfa_gguf_write(ctx, in_temp("m.gguf"), 6, keys, 4, tensors), SFA_OK);
  assert_int_equal(sfa_weights_open(ctx, in_temp("m.gguf"), &weights), SFA_OK);
  assert_string_equal(sfa_weights_format(weights), "gguf");
  check_tensors(weights);
  double number;
  bool flag = false;
  const char *text;
  size_t bytes;
  assert_true(sfa_meta_number(weights, "llama.block_count", &number) && number == 3);
  assert_true(sfa_meta_number(weights, "eps", &number) && number == (double)eps);
  assert_true(sfa_meta_bool(weights, "yes", &flag) && flag);
  assert_int_equal(sfa_meta_array_len(weights, "ks"), 3);
  assert_true(sfa_meta_array_number(weights, "ks", 2, &number) && number == 6);
  assert_true(sfa_meta_array_string(weights, "words", 2, &text, &bytes));
  assert_int_equal(bytes, 5);
  assert_memory_equal(text, "thr\0e", 5);
  sfa_weights_close(weights);
  sfa_context_destroy(ctx);
}

/* A disk that is full after some bytes: what was there under the name stays as it was, and nothing else stays. */
static void test_full_disk(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  assert_int_equal(sfa_save_file(ctx, in_temp("kept"), "before", 6), SFA_OK);
  pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0) {
    static uint8_t data[3 << 20];
    sfa_save *save;
    struct rlimit limit = {1 << 20, 1 << 20};
    signal(SIGXFSZ, SIG_IGN); /* then a write beyond the limit fails as one on a full disk does */
    setrlimit(RLIMIT_FSIZE, &limit);
    if (sfa_save_begin(ctx, in_temp("kept"), &save) != SFA_OK)
      _exit(1);
    if (sfa_save_write(save, data, sizeof data) != SFA_ERROR_IO || !strstr(sfa_context_error(ctx), "make room"))
      _exit(2);
    sfa_save_abandon(save);
    if (sfa_save_file(ctx, in_temp("kept"), data, (1 << 20) + 1) != SFA_ERROR_IO || access(in_temp("kept.part"), F_OK) == 0)
      _exit(3);
    if (sfa_save_begin(ctx, in_temp("kept"), &save) != SFA_OK || sfa_save_write(save, data, 1 << 20) != SFA_OK ||
        sfa_save_write(save, data, 1) != SFA_OK) /* one byte is left for the end */
      _exit(4);
    _exit(sfa_save_commit(save) == SFA_ERROR_IO ? 0 : 5);
  }
  int result;
  assert_int_equal(waitpid(child, &result, 0), child);
  assert_int_equal(result, 0);
  sfa_map map;
  assert_int_equal(sfa_map_open(ctx, in_temp("kept"), &map), SFA_OK);
  assert_int_equal(map.bytes, 6);
  assert_memory_equal(map.data, "before", 6);
  sfa_map_close(&map);
  assert_int_equal(access(in_temp("kept.part"), F_OK), -1);
  sfa_context_destroy(ctx);
}

static void test_folders(void **state) {
  (void)state;
  sfa_context *ctx = new_context(1, SFA_ISA_DEFAULT);
  assert_int_equal(sfa_save_file(ctx, in_temp("file"), "", 0), SFA_OK);
  assert_int_equal(sfa_save_folder(ctx, in_temp("file")), SFA_ERROR_IO);
  assert_int_equal(sfa_save_folder(ctx, in_temp("file/below")), SFA_ERROR_IO);
  assert_int_equal(sfa_save_folder(ctx, temp_dir), SFA_OK);
  assert_int_equal(sfa_save_folder(ctx, in_temp("one/two/")), SFA_OK);
  assert_int_equal(access(in_temp("one/two"), W_OK), 0);
  assert_int_equal(rmdir(in_temp("one/two")), 0);
  assert_int_equal(rmdir(in_temp("one")), 0);
  assert_int_equal(sfa_save_file(ctx, in_temp("nowhere/file"), "", 0), SFA_ERROR_IO);
  struct stat info; /* what is no regular file is not replaced */
  assert_int_equal(mkfifo(in_temp("pipe"), 0600), 0);
  assert_int_equal(sfa_save_file(ctx, in_temp("pipe"), "", 0), SFA_ERROR_IO);
  assert_non_null(strstr(sfa_context_error(ctx), "not a regular file"));
  assert_int_equal(stat(in_temp("pipe"), &info), 0);
  assert_true(S_ISFIFO(info.st_mode));
  assert_int_equal(unlink(in_temp("pipe")), 0);
  sfa_context_destroy(ctx);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_safetensors),
      cmocka_unit_test(test_gguf),
      cmocka_unit_test(test_full_disk),
      cmocka_unit_test(test_folders),
  };
  return cmocka_run_group_tests(tests, temp_begin, temp_end);
}
