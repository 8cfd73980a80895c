/* Checks of expand_add and scale_sums, the slots of an inverted index. */
#include "check.h"
#include <math.h>
#include <string.h>

/* Bitmaps of a density, `words` of them, with the values of the set bits. */
static int64_t fill_list(check *c, int64_t n_words, uint64_t *words, int8_t *values, int density) {
  int64_t n = 0;
  for (int64_t w = 0; w < n_words; w++) {
    words[w] = 0;
    for (int b = 0; b < 64; b++)
      if (check_pick(c, 64) < density) {
        words[w] |= (uint64_t)1 << b;
        values[n++] = (int8_t)check_range(c, -127, 127);
      }
  }
  return n;
}

static void expand_case(check *c, int64_t n_words, int density) {
  check_begin(c, "expand_add", "n_words %d density %d / 64", (int)n_words, density);
  uint64_t words[64];
  int8_t packed[64 * 64];
  const int64_t n_values = fill_list(c, n_words, words, packed, density), n_keys = n_words * 64;
  /* The last value and what may be read behind it end at an unreadable page. */
  int8_t *values = check_memory(c, (size_t)n_values + SFA_EXPAND_SLACK);
  uint64_t *bits = check_memory(c, (size_t)n_words * sizeof *bits);
  int32_t *sums = check_memory(c, (size_t)n_keys * sizeof *sums), *expected = check_memory(c, (size_t)n_keys * sizeof *expected);
  memcpy(values, packed, (size_t)n_values);
  memcpy(bits, words, (size_t)n_words * sizeof *bits);
  const int32_t q = check_pick(c, 8) ? check_range(c, -32767, 32767) : 32767;
  for (int64_t j = 0, at = 0; j < n_keys; j++) {
    sums[j] = check_range(c, -(1 << 23), 1 << 23);
    expected[j] = sums[j];
    if (words[j / 64] >> (j % 64) & 1)
      expected[j] += q * packed[at++];
  }
  c->kernels->expand_add(n_words, bits, n_values, values, q, sums);
  check_bytes(c, "sums", sums, expected, (size_t)n_keys * sizeof *sums);
  check_end(c);
}

static void check_expand_add(check *c) {
  static const int densities[] = {0, 1, 3, 4, 5, 6, 8, 16, 37, 64};
  for (int64_t n_words = 1; n_words <= 64; n_words += c->quick ? 21 : 1)
    for (size_t d = 0; d < sizeof densities / sizeof *densities; d++)
      expand_case(c, n_words, densities[d]);
}

static void check_scale_sums(check *c) {
  static const uint16_t scales_of[] = {0, 1, 0x03ff, 0x0400, 0x3c00, 0x7bff, 0x7e00}; /* 0, subnormal, least, 1, largest, NaN */
  for (int n = SFA_KEY_TILE; n <= 4 * SFA_KEY_TILE; n += SFA_KEY_TILE)
    for (int e = -100; e <= 20; e += 10) {
      check_begin(c, "scale_sums", "n %d step 2^%d", n, e);
      int32_t *sums = check_memory(c, (size_t)n * sizeof *sums);
      uint16_t *scales = check_memory(c, (size_t)n * sizeof *scales);
      float *S = check_floats(c, n), *plain = check_floats(c, n);
      const float step = e > 10 ? NAN : ldexpf(1, e), query_scale = fabsf(check_normal(c));
      for (int j = 0; j < n; j++) {
        sums[j] = check_range(c, -(1 << 24), 1 << 24);
        scales[j] = check_pick(c, 3) ? (uint16_t)check_range(c, 0, 0x7bff) : scales_of[check_pick(c, 7)];
      }
      c->kernels->scale_sums(n, sums, step, scales, query_scale, S);
      c->plain->scale_sums(n, sums, step, scales, query_scale, plain);
      check_bits(c, "S", S, plain, n);
      check_end(c);
    }
}

const check_entry check_postings_entries[] = {{"expand_add", check_expand_add}, {"scale_sums", check_scale_sums}, {NULL, NULL}};
