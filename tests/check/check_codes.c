/* Checks of topk, topk_bf16, quantize_i8, quantize_i4, load_rows, store_rows, norm_rows, rotate_rows, query_tile and query_tile_codes: all
 * exact. */
#include "base/half.h"
#include "check.h"
#include "oracle.h"
#include <math.h>
#include <string.h>

static const int head_dims[] = {8, 24, 64, 72, 128, 256, 264, 512};
enum { N_HEAD_DIMS = sizeof head_dims / sizeof *head_dims };

static void topk_case(check *c, check_kind kind, int n_rows, int D, int K, int stride) {
  check_begin(c, "topk", "%s n %d D %d K %d stride %d", check_kind_name(kind), n_rows, D, K, stride);
  const size_t n = (size_t)n_rows * (size_t)K, id_bytes = D <= 256 ? 1 : 2;
  const float *x = check_rows(c, kind, n_rows ? (int64_t)(n_rows - 1) * stride + D : 0);
  uint8_t *ids = check_memory(c, n * id_bytes), *plain_ids = check_memory(c, n * id_bytes);
  float *values = check_floats(c, (int64_t)n), *plain_values = check_floats(c, (int64_t)n);
  c->kernels->topk(n_rows, x, stride, D, K, ids, values);
  c->plain->topk(n_rows, x, stride, D, K, plain_ids, plain_values);
  check_bytes(c, "ids", ids, plain_ids, n * id_bytes);
  check_bytes(c, "values", values, plain_values, n * sizeof *values);
  for (int row = 0; row < n_rows; row++) {
    int expected[512];
    oracle_topk(x + (int64_t)row * stride, D, K, expected);
    for (int u = 0; u < K; u++) {
      const size_t at = (size_t)row * (size_t)K + (size_t)u;
      const int id = id_bytes == 1 ? ids[at] : ((const uint16_t *)(const void *)ids)[at];
      if (id != expected[u])
        check_fail(c, "row %d slot %d: feature %d, oracle %d", row, u, id, expected[u]);
      else if (sfa_bits_of(values[at]) != sfa_bits_of(x[(int64_t)row * stride + id]))
        check_fail(c, "row %d slot %d: value changed", row, u);
    }
  }
  check_end(c);
}

/* Rows of bf16: those of topk_case, cut. */
static void topk_bf16_case(check *c, check_kind kind, int n_rows, int D, int K, int stride) {
  check_begin(c, "topk_bf16", "%s n %d D %d K %d stride %d", check_kind_name(kind), n_rows, D, K, stride);
  const int64_t n = n_rows ? (int64_t)(n_rows - 1) * stride + D : 0;
  const size_t n_kept = (size_t)n_rows * (size_t)K;
  float *x = check_rows(c, kind, n);
  uint16_t *rows = check_memory(c, (size_t)n * sizeof *rows);
  for (int64_t i = 0; i < n; i++) {
    rows[i] = (uint16_t)(sfa_bits_of(x[i]) >> 16);
    x[i] = sfa_f32_from_bf16(rows[i]);
  }
  uint8_t *ids = check_memory(c, n_kept), *plain_ids = check_memory(c, n_kept);
  float *values = check_floats(c, (int64_t)n_kept), *plain_values = check_floats(c, (int64_t)n_kept);
  c->kernels->topk_bf16(n_rows, rows, stride, D, K, ids, values);
  c->plain->topk(n_rows, x, stride, D, K, plain_ids, plain_values);
  check_bytes(c, "ids", ids, plain_ids, n_kept);
  check_bytes(c, "values", values, plain_values, n_kept * sizeof *values);
  check_end(c);
}

static void check_topk_bf16(check *c) {
  static const int rows[] = {0, 1, 7, 15, 16, 17, 33};
  for (int d = 0; head_dims[d] <= 256; d++) {
    const int D = head_dims[d], kept[] = {1, 2, 7, 8, 9, 15, 16, 17, 32, D / 2, D - 1, D};
    for (int kind = 0; kind < CHECK_KINDS; kind++)
      for (size_t k = 0; k < sizeof kept / sizeof *kept; k++)
        if (kept[k] <= D)
          topk_bf16_case(c, (check_kind)kind, rows[check_pick(c, 7)], D, kept[k], D + (check_pick(c, 2) ? 3 : 0));
  }
}

static void check_topk(check *c) {
  static const int rows[] = {0, 1, 7, 8, 9, 15, 16, 17, 33};
  for (int d = 0; d < N_HEAD_DIMS; d++) {
    const int D = head_dims[d], kept[] = {1, 2, 7, 8, 9, 16, 17, 32, 33, D / 2, D - 1, D};
    for (int kind = 0; kind < CHECK_KINDS; kind++)
      for (size_t k = 0; k < sizeof kept / sizeof *kept; k++)
        if (kept[k] <= D)
          topk_case(c, (check_kind)kind, rows[check_pick(c, 9)], D, kept[k], D + (check_pick(c, 2) ? 3 : 0));
  }
}

/* A row's number at i before its scale: int8, two of int4 a byte, or e4m3. */
static double number_at(sfa_dtype dtype, const uint8_t *row, int i) {
  return dtype == SFA_I8 ? (int8_t)row[i]
         : dtype == SFA_I4
             ? (row[i / 2] >> i % 2 * 4 & 15) - 8
             : (row[i] & 128 ? -1 : 1) * (row[i] & 120 ? ldexp(8 + (row[i] & 7), (row[i] >> 3 & 15) - 10) : ldexp(row[i] & 7, -9));
}

/* Rows to a type with scales, by an instruction set's kernels. */
static int64_t quantize(const sfa_kernels *kernels, sfa_dtype dtype, int n_rows, int n, const float *x, int stride, uint8_t *out,
                        int out_stride, uint16_t *scales) {
  return dtype == SFA_I8   ? kernels->quantize_i8(n_rows, n, x, stride, (int8_t *)out, out_stride, scales)
         : dtype == SFA_I4 ? kernels->quantize_i4(n_rows, n, x, stride, out, out_stride, scales)
                           : kernels->quantize_e4m3(n_rows, n, x, stride, out, out_stride, scales);
}

static void quantize_case(check *c, check_kind kind, sfa_dtype dtype, int n_rows, int n, float factor) {
  const char *name = dtype == SFA_I8 ? "quantize_i8" : dtype == SFA_I4 ? "quantize_i4" : "quantize_e4m3";
  check_begin(c, name, "%s n_rows %d n %d factor %g", check_kind_name(kind), n_rows, n, (double)factor);
  const int most = dtype == SFA_I8 ? 127 : 7, stride = n + check_pick(c, 3), out_stride = n + 2 * check_pick(c, 3);
  const size_t row_bytes = dtype == SFA_I4 ? (size_t)out_stride / 2 : (size_t)out_stride, bytes = (size_t)n_rows * row_bytes;
  float *x = check_rows(c, kind, (int64_t)n_rows * stride);
  for (int64_t i = 0; i < (int64_t)n_rows * stride; i++)
    x[i] *= factor;
  uint8_t *out = check_memory(c, bytes), *plain_out = check_memory(c, bytes);
  uint16_t *scales = check_memory(c, (size_t)n_rows * 2), *plain_scales = check_memory(c, (size_t)n_rows * 2);
  const int64_t bad = quantize(c->kernels, dtype, n_rows, n, x, stride, out, out_stride, scales);
  const int64_t plain_bad = quantize(c->plain, dtype, n_rows, n, x, stride, plain_out, out_stride, plain_scales);
  if (bad != plain_bad)
    check_fail(c, "returns %lld, plain C %lld", (long long)bad, (long long)plain_bad);
  const int good = bad ? (int)bad - 1 : n_rows;
  check_bytes(c, "values", out, plain_out, (size_t)good * row_bytes);
  check_bytes(c, "scales", scales, plain_scales, (size_t)good * 2);
  for (int row = 0; row < n_rows; row++) {
    int whole[600];
    double values[600];
    const float *from = x + (int64_t)row * stride;
    const double scale = dtype == SFA_E4M3 ? oracle_e4m3(from, n, values) : oracle_whole(from, n, most, whole);
    if ((scale == -1) != (row == bad - 1) || row > good)
      check_fail(c, "row %d: oracle scale %g, returned %lld", row, scale, (long long)bad);
    if (row >= good)
      break;
    double got = oracle_f16(scales[row]);
    if (!(got == scale || (isnan(got) && isnan(scale))))
      check_fail(c, "row %d: scale %g, oracle %g", row, got, scale);
    for (int i = 0; i < n; i++) {
      const double number = number_at(dtype, out + (size_t)row * row_bytes, i), expected = dtype == SFA_E4M3 ? values[i] : whole[i];
      if (number != expected)
        check_fail(c, "row %d element %d: %g, oracle %g", row, i, number, expected);
    }
  }
  check_end(c);
}

static void check_quantize(check *c) {
  static const int sizes[] = {1, 7, 8, 9, 15, 16, 17, 64, 127, 512};
  static const float factors[] = {1.0f, 0x1p-20f, 0x1p-140f, 1e6f, 4e6f};
  for (int s = 0; s < 10; s++)
    for (int kind = 0; kind < CHECK_KINDS; kind++)
      for (int f = 0; f < 5; f++) {
        quantize_case(c, (check_kind)kind, SFA_I8, check_range(c, 0, 5), sizes[s], factors[f]);
        quantize_case(c, (check_kind)kind, SFA_I4, check_range(c, 0, 5), sizes[s] + sizes[s] % 2, factors[f]);
        quantize_case(c, (check_kind)kind, SFA_E4M3, check_range(c, 0, 5), sizes[s], factors[f]);
      }
}

static void rows_case(check *c, check_kind kind, sfa_dtype dtype, int n_rows, int n) {
  check_begin(c, "rows", "%s dtype %d n_rows %d n %d", check_kind_name(kind), dtype, n_rows, n);
  const int stride = n + check_pick(c, 4), stored_stride = n + 2 * check_pick(c, 2);
  const size_t row_bytes = dtype == SFA_I4 ? (size_t)stored_stride / 2 : (size_t)stored_stride * sfa_dtype_bytes(dtype);
  const size_t bytes = (size_t)n_rows * row_bytes;
  const int64_t total = (int64_t)n_rows * stride;
  const float *x = check_rows(c, kind, total);
  uint8_t *stored = check_memory(c, bytes), *plain_stored = check_memory(c, bytes);
  uint16_t *scales = check_memory(c, (size_t)n_rows * 2);
  float *back = check_floats(c, total), *plain_back = check_floats(c, total), *expected = check_floats(c, total);
  if (dtype >= SFA_I8) {
    quantize(c->plain, dtype, n_rows, n, x, stride, stored, stored_stride, scales);
  } else {
    c->kernels->store_rows(n_rows, n, x, stride, dtype, stored, stored_stride);
    c->plain->store_rows(n_rows, n, x, stride, dtype, plain_stored, stored_stride);
    for (int64_t row = 0; row < n_rows; row++) /* any NaN for any NaN: compare what they read as */
      for (int i = 0; i < n; i++) {
        const size_t at = (size_t)(row * stored_stride + i);
        if (dtype != SFA_F32 && isnan(x[row * stride + i]))
          ((uint16_t *)(void *)plain_stored)[at] = ((const uint16_t *)(const void *)stored)[at];
      }
    check_bytes(c, "stored", stored, plain_stored, bytes);
  }
  c->kernels->load_rows(n_rows, n, dtype, stored, stored_stride, scales, back, stride);
  c->plain->load_rows(n_rows, n, dtype, stored, stored_stride, scales, plain_back, stride);
  check_bits(c, "loaded", back, plain_back, total);
  for (int64_t row = 0; row < n_rows; row++) {
    memcpy(expected + row * stride, x + row * stride, (size_t)n * sizeof *x);
    oracle_round(expected + row * stride, n, (int)dtype);
  }
  check_bits(c, "oracle", back, expected, total);
  check_end(c);
}

static void check_stored_rows(check *c) {
  static const int sizes[] = {1, 7, 8, 9, 16, 17, 64, 130};
  for (int dtype = SFA_F32; dtype <= SFA_E4M3; dtype++)
    for (int s = 0; s < 8; s++)
      for (int kind = 0; kind < CHECK_KINDS; kind++)
        if ((kind != CHECK_NAN || dtype < SFA_I8) && (sizes[s] % 2 == 0 || dtype != SFA_I4))
          rows_case(c, (check_kind)kind, (sfa_dtype)dtype, check_range(c, 0, 5), sizes[s]);
}

static void norm_case(check *c, check_kind kind, int n_rows, int D, float eps) {
  check_begin(c, "norm_rows", "%s n_rows %d D %d eps %g", check_kind_name(kind), n_rows, D, (double)eps);
  const int stride = D + check_pick(c, 4);
  const int64_t total = (int64_t)n_rows * stride;
  const float *x = check_rows(c, kind, total), *weight = check_rows(c, CHECK_NORMAL, D);
  float *out = check_floats(c, total), *in_place = check_floats(c, total), *expected = check_floats(c, total);
  memcpy(in_place, x, (size_t)total * sizeof *x);
  memcpy(expected, x, (size_t)total * sizeof *x);
  memcpy(out, x, (size_t)total * sizeof *x); /* what lies between rows stays */
  for (int64_t row = 0; row < n_rows; row++) {
    float chains[16] = {0};
    for (int u = 0; u < D; u++)
      chains[u % 16] = fmaf(x[row * stride + u], x[row * stride + u], chains[u % 16]);
    for (int apart = 8; apart > 0; apart /= 2)
      for (int i = 0; i < apart; i++)
        chains[i] += chains[i + apart];
    const float factor = 1.0f / sqrtf(chains[0] / (float)D + eps);
    for (int u = 0; u < D; u++)
      expected[row * stride + u] = x[row * stride + u] * factor * weight[u];
  }
  c->kernels->norm_rows(n_rows, D, x, stride, weight, eps, out, stride);
  c->kernels->norm_rows(n_rows, D, in_place, stride, weight, eps, in_place, stride);
  check_bits(c, "out", out, expected, total);
  check_bits(c, "in place", in_place, expected, total);
  check_end(c);
}

static void check_norms(check *c) {
  for (int d = 0; d < N_HEAD_DIMS; d++)
    for (int kind = 0; kind < CHECK_KINDS; kind++)
      for (int eps = 0; eps < 2; eps++)
        norm_case(c, (check_kind)kind, check_range(c, 0, 5), head_dims[d], eps ? 1e-6f : 0);
}

static void rotate_case(check *c, check_kind kind, int n_rows, int D, int n_rotated, int interleaved, bool one_line) {
  check_begin(c, "rotate_rows", "%s n_rows %d D %d n_rotated %d interleaved %d one_line %d", check_kind_name(kind), n_rows, D, n_rotated,
              interleaved, one_line);
  const int stride = D + check_pick(c, 4), half = n_rotated / 2, step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
  const int64_t total = (int64_t)n_rows * stride, line_stride = one_line ? 0 : half;
  const float *x = check_rows(c, kind, total);
  float *cos = check_floats(c, (int64_t)n_rows * half), *sin = check_floats(c, (int64_t)n_rows * half);
  float *out = check_floats(c, total), *in_place = check_floats(c, total), *expected = check_floats(c, total);
  for (int64_t i = 0; i < (int64_t)n_rows * half; i++) {
    cos[i] = cosf((float)i);
    sin[i] = sinf((float)i);
  }
  memcpy(in_place, x, (size_t)total * sizeof *x);
  memcpy(expected, x, (size_t)total * sizeof *x);
  memcpy(out, x, (size_t)total * sizeof *x); /* what lies between rows stays */
  for (int64_t row = 0; row < n_rows; row++)
    for (int p = 0; p < half; p++) {
      const float a = x[row * stride + p * step], b = x[row * stride + p * step + apart];
      const float cosine = cos[row * line_stride + p], sine = sin[row * line_stride + p];
      const float products[4] = {a * cosine, b * sine, b * cosine, a * sine};
      expected[row * stride + p * step] = products[0] - products[1];
      expected[row * stride + p * step + apart] = products[2] + products[3];
    }
  c->kernels->rotate_rows(n_rows, D, x, stride, cos, sin, line_stride, n_rotated, interleaved, out, stride);
  c->kernels->rotate_rows(n_rows, D, in_place, stride, cos, sin, line_stride, n_rotated, interleaved, in_place, stride);
  check_bits(c, "out", out, expected, total);
  check_bits(c, "in place", in_place, expected, total);
  check_end(c);
}

static void check_rotations(check *c) {
  for (int d = 0; d < N_HEAD_DIMS; d++) {
    const int D = head_dims[d], rotated[] = {0, 2, D / 2 / 2 * 2, D - 2, D};
    for (int kind = 0; kind < CHECK_KINDS; kind++)
      for (int r = 0; r < 5; r++)
        for (int interleaved = 0; interleaved < 2; interleaved++)
          rotate_case(c, (check_kind)kind, check_range(c, 0, 5), D, rotated[r], interleaved, check_pick(c, 2));
  }
}

static void query_case(check *c, check_kind kind, int D, int W, int n_rows) {
  check_begin(c, "query_tile", "%s D %d W %d n_rows %d", check_kind_name(kind), D, W, n_rows);
  const int64_t n = (int64_t)D * W;
  const float scale = check_normal(c);
  const float *rows[SFA_MAX_WIDTH];
  for (int i = 0; i < n_rows; i++)
    rows[i] = check_rows(c, kind, D);
  float *Qt = check_floats(c, n), *plain = check_floats(c, n);
  c->kernels->query_tile(n_rows, rows, D, W, scale, Qt);
  for (int64_t at = 0; at < n; at++)
    plain[at] = at % W < n_rows ? scale * rows[at % W][at / W] : 0.0f;
  check_bits(c, "Qt", Qt, plain, n);
  check_end(c);
}

static void query_codes_case(check *c, int D, int K, int W, int n_rows) {
  check_begin(c, "query_tile_codes", "D %d K %d W %d n_rows %d", D, K, W, n_rows);
  const int64_t n = (int64_t)D * W;
  const int id_bytes = D <= 256 ? 1 : 2;
  const float scale = check_normal(c);
  const float *x = check_rows(c, CHECK_TIES, (int64_t)n_rows * D);
  char *ids = check_memory(c, (size_t)(n_rows * K * id_bytes));
  float *values = check_floats(c, (int64_t)n_rows * K), *Qt = check_floats(c, n), *expected = check_floats(c, n);
  const void *id_rows[SFA_MAX_WIDTH];
  const float *value_rows[SFA_MAX_WIDTH];
  memset(expected, 0, (size_t)n * sizeof *expected);
  c->plain->topk(n_rows, x, D, D, K, ids, values);
  for (int i = 0; i < n_rows; i++) {
    int kept[512];
    id_rows[i] = ids + (int64_t)i * K * id_bytes;
    value_rows[i] = values + (int64_t)i * K;
    oracle_topk(x + (int64_t)i * D, D, K, kept);
    for (int u = 0; u < K; u++)
      expected[(int64_t)kept[u] * W + i] = scale * x[(int64_t)i * D + kept[u]];
  }
  c->kernels->query_tile_codes(n_rows, id_rows, id_bytes, value_rows, K, D, W, scale, Qt);
  check_bits(c, "Qt", Qt, expected, n);
  check_end(c);
}

static void check_queries(check *c) {
  static const int widths[] = {16, 32, 48, 64, 96, 128};
  for (int d = 0; d < N_HEAD_DIMS; d++)
    for (int w = 0; w < 6; w++) {
      const int W = widths[w], D = head_dims[d], rows[] = {1, check_range(c, 1, W < 48 ? W : 48), W < 48 ? W : 48};
      for (int r = 0; r < 3; r++) {
        query_case(c, (check_kind)check_pick(c, CHECK_KINDS), D, W, rows[r]);
        query_codes_case(c, D, check_range(c, 1, D), W, rows[r]);
      }
    }
}

const check_entry check_codes_entries[] = {
    {"topk", check_topk},       {"topk_bf16", check_topk_bf16},   {"quantize", check_quantize},  {"rows", check_stored_rows},
    {"norm_rows", check_norms}, {"rotate_rows", check_rotations}, {"query_tile", check_queries}, {NULL, NULL}};
