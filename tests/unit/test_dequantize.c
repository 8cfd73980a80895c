/* Every tensor format against golden vectors of the gguf Python package (tools/make_quant_golden.py), to the bit. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "file/weights.h"

static uint8_t *load(const char *name, size_t *bytes) {
  char path[512];
  snprintf(path, sizeof path, "%s/golden/quant/%s", SFA_TEST_DATA, name);
  FILE *file = fopen(path, "rb");
  assert_non_null(file);
  assert_int_equal(fseek(file, 0, SEEK_END), 0);
  *bytes = (size_t)ftell(file);
  rewind(file);
  uint8_t *data = malloc(*bytes);
  assert_non_null(data);
  assert_int_equal(fread(data, 1, *bytes, file), *bytes);
  fclose(file);
  return data;
}

/* The file: n blocks, then n * block_len floats. Each call gets exactly the blocks it may read and room for what it may write, so that
 * the address sanitizer sees a byte too far; the output starts as NaN. */
static void compare(const char *name, sfa_tensor_type type, int64_t blocks_a_call) {
  size_t bytes;
  uint8_t *golden = load(name, &bytes);
  const size_t block_bytes = (size_t)sfa_tensor_block_bytes(type), block_len = (size_t)sfa_tensor_block_len(type);
  const size_t n_blocks = bytes / (block_bytes + 4 * block_len);
  assert_int_equal(bytes, n_blocks * (block_bytes + 4 * block_len));
  assert_true(n_blocks >= 4 && n_blocks % (size_t)blocks_a_call == 0);
  const size_t step = (size_t)blocks_a_call, n = step * block_len;
  for (size_t b = 0; b < n_blocks; b += step) {
    uint8_t *blocks = malloc(step * block_bytes);
    float *out = malloc(n * sizeof *out), *want = malloc(n * sizeof *want);
    assert_true(blocks && out && want);
    memcpy(blocks, golden + b * block_bytes, step * block_bytes);
    memcpy(want, golden + n_blocks * block_bytes + 4 * b * block_len, n * sizeof *want);
    for (size_t i = 0; i < n; i++)
      out[i] = NAN;
    sfa_tensor_dequantize(type, (int64_t)n, blocks, out);
    for (size_t i = 0; i < n; i++)
      if (!(out[i] == want[i]))
        fail_msg("%s: element %zu is %.9g, not %.9g", name, b * block_len + i, (double)out[i], (double)want[i]);
    free(blocks);
    free(out);
    free(want);
  }
  free(golden);
}

static void test_formats(void **state) {
  (void)state;
  static const struct {
    const char *file;
    sfa_tensor_type type;
  } formats[] = {{"f16.bin", SFA_TENSOR_F16},   {"bf16.bin", SFA_TENSOR_BF16}, {"q8_0.bin", SFA_TENSOR_Q8_0}, {"q4_0.bin", SFA_TENSOR_Q4_0},
                 {"q4_1.bin", SFA_TENSOR_Q4_1}, {"q5_0.bin", SFA_TENSOR_Q5_0}, {"q5_1.bin", SFA_TENSOR_Q5_1}, {"q4_k.bin", SFA_TENSOR_Q4_K},
                 {"q5_k.bin", SFA_TENSOR_Q5_K}, {"q6_k.bin", SFA_TENSOR_Q6_K}};
  for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
    compare(formats[i].file, formats[i].type, 1);
    compare(formats[i].file, formats[i].type, 4);
  }
}

static void test_f32_unaligned(void **state) {
  (void)state;
  const float want[3] = {1.5f, -INFINITY, 0x1p-149f};
  uint8_t data[1 + sizeof want];
  float out[3];
  memcpy(data + 1, want, sizeof want);
  sfa_tensor_dequantize(SFA_TENSOR_F32, 3, data + 1, out);
  assert_memory_equal(out, want, sizeof want);
}

/* Halves that the golden file has not: infinities, NaN, the smallest subnormal, the largest number, minus zero. */
static void test_half_corners(void **state) {
  (void)state;
  const uint16_t f16[] = {0x7c00, 0xfc00, 0x0001, 0x03ff, 0x7bff, 0x8000, 0x7e01};
  const float want[] = {INFINITY, -INFINITY, 0x1p-24f, 0x3ffp-24f, 65504.0f, -0.0f};
  float out[7];
  sfa_tensor_dequantize(SFA_TENSOR_F16, 7, f16, out);
  assert_memory_equal(out, want, sizeof want);
  assert_true(isnan(out[6]));
  const uint16_t bf16[] = {0x7f80, 0x3f80, 0x0001, 0x7fc0};
  const float want_bf16[] = {INFINITY, 1.0f, 0x1p-133f};
  sfa_tensor_dequantize(SFA_TENSOR_BF16, 4, bf16, out);
  assert_memory_equal(out, want_bf16, sizeof want_bf16);
  assert_true(isnan(out[3]));
}

static void test_names(void **state) {
  (void)state;
  assert_string_equal(sfa_tensor_type_name(SFA_TENSOR_Q5_K), "Q5_K");
  assert_string_equal(sfa_tensor_type_name(SFA_TENSOR_BF16), "BF16");
  assert_string_equal(sfa_tensor_type_name((sfa_tensor_type)10), "unknown"); /* Q2_K is not read */
  assert_int_equal(sfa_tensor_block_len((sfa_tensor_type)10), 0);
  assert_int_equal(sfa_tensor_block_len((sfa_tensor_type)-1), 0);
  assert_int_equal(sfa_tensor_block_bytes(SFA_TENSOR_Q6_K), 210);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_formats), cmocka_unit_test(test_f32_unaligned),
                                     cmocka_unit_test(test_half_corners), cmocka_unit_test(test_names)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
