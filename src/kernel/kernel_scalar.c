/* The kernels in plain C, as kernel.h words them: the reference that every instruction set must equal bit for bit, and what runs where
 * there is no other. */
#include "base/half.h"
#include "kernel/exp2.h"
#include "kernel/kernel_table.h"
#include "kernel/stored_rows.h"
#include <math.h>
#include <string.h>

static uint32_t magnitude_of(float x) { return sfa_bits_of(x) & 0x7fffffffu; }
static int is_finite(float x) { return magnitude_of(x) < 0x7f800000u; }

static int32_t feature_at(const void *ids, int32_t id_bytes, int64_t at) {
  return id_bytes == 1 ? ((const uint8_t *)ids)[at] : ((const uint16_t *)ids)[at];
}

/* ---- codes ---- */

/* The K-th largest magnitude, found bit by bit from the top: a bit belongs to it if K magnitudes or more are at least as large. */
static uint32_t kth_magnitude(const float *x, int32_t D, int32_t K) {
  uint32_t threshold = 0;
  for (int bit = 30; bit >= 0; bit--) {
    uint32_t trial = threshold | 1u << bit;
    int32_t count = 0;
    for (int32_t u = 0; u < D; u++)
      count += magnitude_of(x[u]) >= trial;
    if (count >= K)
      threshold = trial;
  }
  return threshold;
}

static void topk(int64_t n_rows, const float *x, int64_t row_stride, int32_t D, int32_t K, void *ids, float *values) {
  for (int64_t row = 0; row < n_rows; row++, x += row_stride) {
    uint32_t threshold = kth_magnitude(x, D, K);
    int32_t ties = K; /* how many at the threshold itself are kept */
    for (int32_t u = 0; u < D; u++)
      ties -= magnitude_of(x[u]) > threshold;
    for (int32_t u = 0; u < D; u++) {
      uint32_t magnitude = magnitude_of(x[u]);
      if (magnitude < threshold || (magnitude == threshold && ties-- <= 0))
        continue;
      if (D <= 256) {
        *(uint8_t *)ids = (uint8_t)u;
        ids = (uint8_t *)ids + 1;
      } else {
        *(uint16_t *)ids = (uint16_t)u;
        ids = (uint16_t *)ids + 1;
      }
      *values++ = x[u];
    }
  }
}

static void topk_bf16(int64_t n_rows, const uint16_t *x, int64_t row_stride, int32_t D, int32_t K, uint8_t *ids, float *values) {
  float row[256];
  for (; n_rows > 0; n_rows--, x += row_stride, ids += K, values += K) {
    for (int32_t u = 0; u < D; u++)
      row[u] = sfa_f32_from_bf16(x[u]);
    topk(1, row, D, D, K, ids, values);
  }
}

static uint32_t largest_magnitude(const float *x, int32_t n) {
  uint32_t largest = 0;
  for (int32_t i = 0; i < n; i++)
    largest = magnitude_of(x[i]) > largest ? magnitude_of(x[i]) : largest;
  return largest;
}

static int64_t quantize_i8(int64_t n_rows, int32_t n, const float *x, int64_t row_stride, int8_t *out, int64_t out_stride,
                           uint16_t *scales) {
  for (int64_t row = 0; row < n_rows; row++, x += row_stride, out += out_stride) {
    uint16_t scale = sfa_row_scale(largest_magnitude(x, n), 127.0f);
    if (scale == SFA_ROW_SCALE_OVERFLOW)
      return row + 1;
    scales[row] = scale;
    float step = sfa_f32_from_f16(scale);
    for (int32_t i = 0; i < n; i++)
      out[i] = scale == 0 || scale == SFA_ROW_SCALE_NAN ? 0 : (int8_t)rintf(x[i] / step);
  }
  return 0;
}

static int64_t quantize_i4(int64_t n_rows, int32_t n, const float *x, int64_t row_stride, uint8_t *out, int64_t out_stride,
                           uint16_t *scales) {
  for (int64_t row = 0; row < n_rows; row++, x += row_stride, out += out_stride / 2) {
    uint16_t scale = sfa_row_scale(largest_magnitude(x, n), 7.0f);
    if (scale == SFA_ROW_SCALE_OVERFLOW)
      return row + 1;
    scales[row] = scale;
    float step = sfa_f32_from_f16(scale);
    for (int32_t i = 0; i < n; i += 2) {
      int empty = scale == 0 || scale == SFA_ROW_SCALE_NAN;
      int low = empty ? 8 : 8 + (int)rintf(x[i] / step), high = empty ? 8 : 8 + (int)rintf(x[i + 1] / step);
      out[i / 2] = (uint8_t)(low | high << 4);
    }
  }
  return 0;
}

static int64_t quantize_e4m3(int64_t n_rows, int32_t n, const float *x, int64_t row_stride, uint8_t *out, int64_t out_stride,
                             uint16_t *scales) {
  for (int64_t row = 0; row < n_rows; row++, x += row_stride, out += out_stride) {
    uint16_t scale = sfa_e4m3_scale(largest_magnitude(x, n));
    if (scale == SFA_ROW_SCALE_OVERFLOW)
      return row + 1;
    scales[row] = scale;
    float step = sfa_f32_from_f16(scale);
    for (int32_t i = 0; i < n; i++)
      out[i] = scale == 0 || scale == SFA_ROW_SCALE_NAN ? 0 : sfa_e4m3_from_f32(x[i] / step);
  }
  return 0;
}

static void load_rows(int64_t n_rows, int32_t n, sfa_dtype dtype, const void *in, int64_t in_stride, const uint16_t *scales, float *out,
                      int64_t out_stride) {
  const int scaled = scales && sfa_has_scales(dtype);
  for (int64_t row = 0; row < n_rows; row++, out += out_stride)
    for (int32_t i = 0; i < n; i++) {
      out[i] = sfa_stored_value(dtype, in, row * in_stride + i);
      if (scaled)
        out[i] *= sfa_f32_from_f16(scales[row]);
    }
}

static void store_rows(int64_t n_rows, int32_t n, const float *in, int64_t in_stride, sfa_dtype dtype, void *out, int64_t out_stride) {
  for (int64_t row = 0; row < n_rows; row++, in += in_stride) {
    char *to = (char *)out + row * out_stride * (int64_t)sfa_dtype_bytes(dtype);
    for (int32_t i = 0; i < n; i++) {
      switch (dtype) {
      case SFA_BF16: ((uint16_t *)to)[i] = sfa_bf16_from_f32(in[i]); break;
      case SFA_F16: ((uint16_t *)to)[i] = sfa_f16_from_f32(in[i]); break;
      default: ((float *)to)[i] = in[i];
      }
    }
  }
}

static void rotate_rows(int64_t n_rows, int32_t D, const float *x, int64_t x_stride, const float *cos, const float *sin,
                        int64_t line_stride, int32_t n_rotated, int interleaved, float *out, int64_t out_stride) {
  const int32_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : n_rotated / 2;
  for (int64_t row = 0; row < n_rows; row++, x += x_stride, out += out_stride, cos += line_stride, sin += line_stride) {
    for (int32_t p = 0; p < n_rotated / 2; p++) {
      float a = x[p * step], b = x[p * step + apart];
      out[p * step] = a * cos[p] - b * sin[p];
      out[p * step + apart] = b * cos[p] + a * sin[p];
    }
    for (int32_t u = n_rotated; u < D; u++)
      out[u] = x[u];
  }
}

/* ---- attention ---- */

static void query_tile(int32_t n_rows, const float *const *rows, int32_t D, int32_t W, float scale, float *Qt) {
  memset(Qt, 0, (size_t)D * (size_t)W * sizeof *Qt);
  for (int32_t i = 0; i < n_rows; i++)
    for (int32_t u = 0; u < D; u++)
      Qt[(int64_t)u * W + i] = scale * rows[i][u];
}

static void query_tile_codes(int32_t n_rows, const void *const *ids_rows, int32_t id_bytes, const float *const *value_rows, int32_t K,
                             int32_t D, int32_t W, float scale, float *Qt) {
  memset(Qt, 0, (size_t)D * (size_t)W * sizeof *Qt);
  for (int32_t i = 0; i < n_rows; i++)
    for (int32_t u = 0; u < K; u++)
      Qt[(int64_t)feature_at(ids_rows[i], id_bytes, u) * W + i] = scale * value_rows[i][u];
}

/* One key's scores; ids NULL: its slots are the features. */
static void score_key(int32_t K, const void *ids, int32_t id_bytes, const float *values, const float *key_scale, const float *Qt, int32_t W,
                      float *S) {
  const int32_t terms = key_scale ? SFA_EXACT_TERMS : K;
  for (int32_t i = 0; i < W; i++) {
    float total = 0.0f;
    for (int32_t first = 0; first < K; first += terms) {
      float sum = 0.0f;
      for (int32_t u = first; u < K && u < first + terms; u++)
        sum = fmaf(values[u], Qt[(int64_t)(ids ? feature_at(ids, id_bytes, u) : u) * W + i], sum);
      total = first ? total + sum : sum;
    }
    S[i] = key_scale ? total * *key_scale : total;
  }
}

static void score_codes(int32_t n_keys, int32_t K, const void *ids, int32_t id_bytes, const float *values, const float *key_scale,
                        const float *Qt, int32_t W, float *S) {
  for (int32_t j = 0; j < n_keys; j++)
    score_key(K, (const char *)ids + (int64_t)j * K * id_bytes, id_bytes, values + (int64_t)j * K, key_scale ? key_scale + j : NULL, Qt, W,
              S + (int64_t)j * W);
}

static void score_dense(int32_t n_keys, int32_t D, const float *keys, int64_t key_stride, const float *key_scale, const float *Qt,
                        int32_t W, float *S) {
  for (int32_t j = 0; j < n_keys; j++)
    score_key(D, NULL, 0, keys + j * key_stride, key_scale ? key_scale + j : NULL, Qt, W, S + (int64_t)j * W);
}

static void round_rows(int32_t n_rows, int32_t n, int32_t n_terms, float *x, int64_t row_stride, float *step) {
  for (int32_t row = 0; row < n_rows; row++, x += row_stride) {
    step[row] = sfa_query_step(largest_magnitude(x, n), n_terms);
    for (int32_t i = 0; i < n; i++)
      x[i] = step[row] == step[row] ? rintf(x[i] / step[row]) * step[row] + 0.0f : NAN; /* one zero */
  }
}

static void score_adjust(int32_t n_keys, int32_t W, float softcap, const float *slope, const int32_t *pos, float *S) {
  for (int32_t j = 0; j < n_keys; j++, S += W)
    for (int32_t i = 0; i < W; i++) {
      if (softcap > 0)
        S[i] = (softcap * SFA_LOG2E) * sfa_tanh(S[i]);
      if (slope)
        S[i] = fmaf(slope[i], (float)(j - pos[i]), S[i]);
    }
}

static void score_mask(int32_t n_keys, int32_t W, const int32_t *lo, const int32_t *hi, int32_t n_always, float *S) {
  for (int32_t j = 0; j < n_keys; j++, S += W)
    for (int32_t i = 0; i < W; i++)
      if (!((lo[i] <= j || j < n_always) && j <= hi[i]))
        S[i] = -INFINITY;
}

static int softmax_tile(int32_t n_keys, int32_t W, float *S, float *m, float *l, float *alpha) {
  int changed = 0;
  for (int32_t i = 0; i < W; i++) {
    float largest = m[i]; /* NaN scores are passed over here and come back through p */
    for (int32_t j = 0; j < n_keys; j++)
      largest = S[(int64_t)j * W + i] > largest ? S[(int64_t)j * W + i] : largest;
    largest += 0.0f; /* one zero only, whichever came first */
    int empty = largest == -INFINITY;
    float base = empty ? 0.0f : largest;
    alpha[i] = empty ? 1.0f : sfa_exp2(m[i] - base);
    changed |= alpha[i] != 1.0f;
    float sums[4] = {0};
    for (int32_t j = 0; j < n_keys; j++) {
      float *s = S + (int64_t)j * W + i;
      *s = sfa_exp2(*s - base);
      sums[j % 4] += *s;
    }
    m[i] = largest;
    l[i] = l[i] * alpha[i] + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return changed;
}

static void rescale(int32_t n_rows, int32_t E, const float *alpha, float *O) {
  for (int32_t i = 0; i < n_rows; i++)
    for (int32_t e = 0; e < E; e++)
      O[(int64_t)i * E + e] *= alpha[i];
}

static void scale_weights(int32_t n_keys, int32_t W, const float *scale, float *P) {
  for (int32_t j = 0; j < n_keys; j++, P += W)
    for (int32_t i = 0; i < W; i++)
      P[i] = P[i] == 0.0f ? 0.0f : P[i] * scale[j];
}

static void value_product(int32_t n_rows, int32_t n_keys, int32_t W, const float *P, int32_t E, const float *V, int64_t v_stride,
                          float *O) {
  for (int32_t i = 0; i < n_rows; i++, O += E)
    for (int32_t j = 0; j < n_keys; j++) {
      float p = P[(int64_t)j * W + i];
      const float *v = V + j * v_stride;
      for (int32_t e = 0; e < E; e++)
        O[e] = fmaf(p, v[e], O[e]);
    }
}

static void value_product_masked(int32_t n_rows, int32_t n_keys, int32_t W, const float *P, int32_t E, const float *V, int64_t v_stride,
                                 float *O) {
  for (int32_t i = 0; i < n_rows; i++, O += E)
    for (int32_t j = 0; j < n_keys; j++) {
      float p = P[(int64_t)j * W + i];
      const float *v = V + j * v_stride;
      for (int32_t e = 0; e < E; e++)
        O[e] = fmaf(p, p == 0.0f && !is_finite(v[e]) ? 0.0f : v[e], O[e]);
    }
}

/* ---- gradients ---- */

#include "kernel/backward_scalar.c"

/* ---- lanes are keys ---- */

#include "kernel/keys_scalar.c"

/* ---- an inverted index ---- */

#include "kernel/drop_tmpl.c"
#include "kernel/expand_tmpl.c"

/* ---- the paper's algorithm ---- */

#include "kernel/lists_tmpl.c"
#include "kernel/norm_tmpl.c"

/* ---- joining ---- */

static void merge(int32_t n_rows, int32_t E, float *m, float *l, float *O, const float *m2, const float *l2, const float *O2) {
  for (int32_t i = 0; i < n_rows; i++, O += E, O2 += E) {
    if (m2[i] == -INFINITY && l2[i] == 0.0f)
      continue;
    if (m[i] == -INFINITY && l[i] == 0.0f) {
      m[i] = m2[i];
      l[i] = l2[i];
      memcpy(O, O2, (size_t)E * sizeof *O);
      continue;
    }
    float largest = m2[i] > m[i] ? m2[i] : m[i];
    float base = largest == -INFINITY ? 0.0f : largest;
    float a = sfa_exp2(m[i] - base), b = sfa_exp2(m2[i] - base);
    m[i] = largest;
    l[i] = fmaf(l2[i], b, l[i] * a);
    for (int32_t e = 0; e < E; e++)
      O[e] = fmaf(O2[e], b, O[e] * a);
  }
}

#define SFA_SLOT(name) .name = name,
const sfa_kernels sfa_kernels_scalar = {
    .isa = SFA_ISA_SCALAR,
#include "kernel/kernel_list.def"
};
