/* Checks of sfa_exp2, softmax_tile, rescale, scale_weights, value_product, value_product_masked and merge. */
#include "check.h"
#include <math.h>
#include <string.h>

static const int widths[] = {16, 32, 48, 64, 80, 96, 112, 128};
static const int key_counts[] = {1, 2, 5, 63, SFA_KEY_TILE};
static const int value_dims[] = {8, 16, 24, 40, 64, 72, 128, 136, 256};
enum { N_WIDTHS = 8, N_KEY_COUNTS = 5, N_VALUE_DIMS = 9 };

static void check_exp2(check *c) {
  check_begin(c, "exp2", "values");
  for (int i = 0; i < (c->quick ? 200000 : 5000000); i++) {
    float x = (float)(sfa_rng_uniform(&c->rng) * 253.5 - 126.0);
    double truth = exp2(x), error = fabs(sfa_exp2(x) - truth) / truth;
    if (!(error <= 2e-7))
      check_fail(c, "2^%.9g: relative error %.3g", (double)x, error);
  }
  for (int n = -126; n <= 127; n++)
    if (sfa_exp2((float)n) != ldexpf(1, n))
      check_fail(c, "2^%d is not exact", n);
  if (sfa_exp2(-126.00001f) != 0 || sfa_exp2(-INFINITY) != 0 || sfa_exp2(128) != INFINITY || !isnan(sfa_exp2(NAN)))
    check_fail(c, "the ends: below -126 is 0, 128 is inf, NaN is NaN");
  check_end(c);
}

/* ---- softmax ---- */

/* Scores of one tile: most of them ordinary, some lanes special. */
static void fill_scores(check *c, float *S, int n_keys, int W, int special) {
  for (int i = 0; i < W; i++) {
    const int kind = special ? check_pick(c, 8) : 7;
    const float wide = check_pick(c, 4) ? 4.0f : 100.0f;
    for (int j = 0; j < n_keys; j++) {
      float s = wide * check_normal(c);
      if (kind == 0 || (kind == 1 && check_pick(c, 2)))
        s = -INFINITY;
      else if (kind == 2 && !check_pick(c, n_keys))
        s = NAN;
      else if (kind == 3 && !check_pick(c, n_keys))
        s = INFINITY;
      else if (kind == 4)
        s = check_pick(c, 2) ? 0.0f : -0.0f;
      S[(int64_t)j * W + i] = s;
    }
  }
}

static void softmax_case(check *c, int W, int n_keys, int special) {
  enum { N_TILES = 3 };
  check_begin(c, "softmax_tile", "W %d n_keys %d special %d", W, n_keys, special);
  const int64_t n = (int64_t)n_keys * W;
  float *state[2][3], *S[2], *all = check_floats(c, N_TILES * n);
  for (int t = 0; t < 2; t++) {
    S[t] = check_floats(c, n);
    for (int s = 0; s < 3; s++)
      state[t][s] = check_floats(c, W);
    for (int i = 0; i < W; i++) {
      state[t][0][i] = -INFINITY;
      state[t][1][i] = 0.0f;
    }
  }
  for (int tile = 0; tile < N_TILES; tile++) {
    float *scores = all + tile * n;
    fill_scores(c, scores, n_keys, W, special);
    memcpy(S[0], scores, (size_t)n * sizeof *scores);
    memcpy(S[1], scores, (size_t)n * sizeof *scores);
    const int changed = c->kernels->softmax_tile(n_keys, W, S[0], state[0][0], state[0][1], state[0][2]);
    const int plain_changed = c->plain->softmax_tile(n_keys, W, S[1], state[1][0], state[1][1], state[1][2]);
    int expected = 0;
    for (int i = 0; i < W; i++)
      expected |= state[0][2][i] != 1.0f;
    if (changed != expected || plain_changed != expected)
      check_fail(c, "tile %d returns %d, plain C %d, alpha says %d", tile, changed, plain_changed, expected);
    check_bits(c, "P", S[0], S[1], n);
    check_bits(c, "m", state[0][0], state[1][0], W);
    check_bits(c, "l", state[0][1], state[1][1], W);
    check_bits(c, "alpha", state[0][2], state[1][2], W);
    check_errors errors = {0};
    for (int64_t at = 0; at < n; at++) { /* the weights of this tile, relative to the running maximum */
      const float m = state[0][0][at % W], s = scores[at];
      if (isnan(s) || s == INFINITY || m == INFINITY) {
        if (isnan(s) && !isnan(S[0][at]))
          check_fail(c, "tile %d: a NaN score has weight %g", tile, (double)S[0][at]);
        continue;
      }
      if (s == -INFINITY ? S[0][at] != 0.0f : s - m > -125.0f && !(S[0][at] > 0.0f))
        check_fail(c, "tile %d: score %g against %g has weight %g", tile, (double)s, (double)m, (double)S[0][at]);
      if (m != -INFINITY)
        check_errors_add(&errors, S[0][at], exp2f(s - m), exp2((double)s - (double)m));
    }
    check_errors_judge(c, "weights", &errors, 2);
  }
  check_errors sums = {0};
  for (int i = 0; i < W; i++) { /* the sum over all tiles; NaN where a score was NaN or inf */
    double most = -INFINITY, sum = 0;
    float naive = 0;
    for (int64_t at = i; at < N_TILES * n; at += W)
      if (isnan(all[at]) || all[at] == INFINITY)
        most = NAN;
      else if (all[at] > most)
        most = all[at];
    for (int64_t at = i; at < N_TILES * n; at += W) {
      sum += exp2(all[at] - most);
      naive += exp2f(all[at] - (float)most);
    }
    const float l = state[0][1][i];
    if (isnan(most) ? !isnan(l) : most == -INFINITY && l != 0.0f)
      check_fail(c, "lane %d: sum %.9g with largest score %g", i, (double)l, most);
    if (isfinite(most))
      check_errors_add(&sums, l / sum, naive / sum, 1);
  }
  check_errors_judge(c, "sums", &sums, 4);
  check_end(c);
}

static void check_softmax(check *c) {
  for (int w = 0; w < N_WIDTHS; w++)
    for (int k = 0; k < N_KEY_COUNTS; k++)
      for (int special = 0; special < 2; special++)
        softmax_case(c, widths[w], key_counts[k], special);
}

/* ---- values ---- */

static void check_rescale(check *c) {
  for (int e = 0; e < N_VALUE_DIMS; e++)
    for (int n_rows = 0; n_rows < 20; n_rows += 3) {
      const int E = value_dims[e];
      const int64_t n = (int64_t)n_rows * E;
      check_begin(c, "rescale", "n_rows %d E %d", n_rows, E);
      const float *alpha = check_rows(c, CHECK_ZEROS, n_rows), *x = check_rows(c, (check_kind)check_pick(c, CHECK_KINDS), n);
      float *O = check_floats(c, n), *expected = check_floats(c, n);
      memcpy(O, x, (size_t)n * sizeof *x);
      for (int64_t at = 0; at < n; at++)
        expected[at] = x[at] * alpha[at / E];
      c->kernels->rescale(n_rows, E, alpha, O);
      check_bits(c, "O", O, expected, n);
      check_end(c);
    }
}

/* A weight of 0 stays 0 beside a scale of NaN, as rows with NaN have it; any other weight is multiplied. */
static void check_scale_weights(check *c) {
  for (int w = 0; w < N_WIDTHS; w++)
    for (int k = 0; k < N_KEY_COUNTS; k++) {
      const int W = widths[w], n_keys = key_counts[k];
      check_begin(c, "scale_weights", "n_keys %d W %d", n_keys, W);
      const int64_t n = (int64_t)n_keys * W;
      float *P = check_rows(c, CHECK_ZEROS, n), *scale = check_rows(c, CHECK_NORMAL, n_keys), *expected = check_floats(c, n);
      scale[check_pick(c, n_keys)] = NAN;
      P[check_pick(c, n_keys) * W] = NAN;
      for (int64_t at = 0; at < n; at++)
        expected[at] = P[at] != 0.0f ? P[at] * scale[at / W] : 0.0f;
      c->kernels->scale_weights(n_keys, W, scale, P);
      check_bits(c, "P", P, expected, n);
      check_end(c);
    }
}

static void value_case(check *c, check_kind kind, int n_rows, int n_keys, int W, int E) {
  check_begin(c, "value_product", "%s n_rows %d n_keys %d W %d E %d", check_kind_name(kind), n_rows, n_keys, W, E);
  const int64_t n = (int64_t)n_rows * E, stride = E + check_pick(c, 2) * 3;
  float *P = check_rows(c, CHECK_NORMAL, (int64_t)n_keys * W);
  const float *V = check_rows(c, kind, (n_keys - 1) * stride + E), *start = check_rows(c, CHECK_NORMAL, n);
  float *O = check_floats(c, n), *plain = check_floats(c, n), *masked = check_floats(c, n);
  for (int64_t at = 0; at < (int64_t)n_keys * W; at++)
    P[at] = check_pick(c, 4) ? fabsf(P[at]) : 0.0f;
  for (int way = 0; way < 2; way++) {
    float *to[] = {O, plain, masked};
    for (int t = 0; t < 3; t++)
      memcpy(to[t], start, (size_t)n * sizeof *start);
    c->kernels->value_product(n_rows, n_keys, W, P, E, V, stride, O);
    c->plain->value_product(n_rows, n_keys, W, P, E, V, stride, plain);
    check_bits(c, "O", O, plain, n);
    c->kernels->value_product_masked(n_rows, n_keys, W, P, E, V, stride, masked);
    if (kind != CHECK_INF && kind != CHECK_NAN)
      check_bits(c, "masked", masked, O, n);
    memcpy(plain, start, (size_t)n * sizeof *start);
    c->plain->value_product_masked(n_rows, n_keys, W, P, E, V, stride, plain);
    check_bits(c, "masked against plain C", masked, plain, n);
    if (way == 0) { /* truth; the second way repeats with a NaN weight, which must reach its row and no other */
      check_errors errors = {0};
      for (int64_t at = 0; at < n; at++) {
        double truth = start[at];
        float naive = start[at];
        for (int j = 0; j < n_keys; j++) {
          const float p = P[(int64_t)j * W + at / E], v = V[j * stride + at % E];
          truth += p == 0.0f ? 0 : (double)p * v;
          naive += p == 0.0f ? 0 : p * v;
        }
        if (isfinite(truth))
          check_errors_add(&errors, masked[at], naive, truth);
        else if (isfinite(masked[at]))
          check_fail(c, "masked: element %lld is finite, oracle %g", (long long)at, truth);
      }
      check_errors_judge(c, "O", &errors, 2);
      P[check_pick(c, n_keys) * W + n_rows - 1] = NAN;
    } else {
      for (int e = 0; e < E; e++)
        if (!isnan(O[n - 1 - e]) || !isnan(masked[n - 1 - e]))
          check_fail(c, "a NaN weight is lost");
    }
  }
  check_end(c);
}

static void check_value_product(check *c) {
  for (int e = 0; e < N_VALUE_DIMS; e++)
    for (int w = 0; w < N_WIDTHS; w += 1 + c->quick)
      for (int k = 0; k < N_KEY_COUNTS; k++) {
        const int W = widths[w], rows[] = {check_range(c, 1, 8), W, check_range(c, 1, W)};
        for (int r = 0; r < (c->quick ? 2 : 3); r++)
          value_case(c, (check_kind)check_pick(c, CHECK_KINDS), rows[r], key_counts[k], W, value_dims[e]);
      }
}

/* ---- merge ---- */

static void merge_case(check *c, int n_rows, int E) {
  check_begin(c, "merge", "n_rows %d E %d", n_rows, E);
  const int64_t n = (int64_t)n_rows * E;
  float *m[3], *l[3], *O[3]; /* under test, plain C, the part that joins */
  for (int t = 0; t < 3; t++) {
    m[t] = check_rows(c, CHECK_NORMAL, n_rows);
    l[t] = check_rows(c, CHECK_NORMAL, n_rows);
    O[t] = check_rows(c, CHECK_NORMAL, n);
    for (int i = 0; i < n_rows; i++) {
      l[t][i] = 1.0f + fabsf(l[t][i]);
      m[t][i] *= 30.0f;
      if (!check_pick(c, 4)) { /* a part that has seen no key */
        m[t][i] = -INFINITY;
        l[t][i] = 0.0f;
        memset(O[t] + (int64_t)i * E, 0, (size_t)E * sizeof **O);
      }
    }
  }
  memcpy(m[1], m[0], (size_t)n_rows * sizeof **m);
  memcpy(l[1], l[0], (size_t)n_rows * sizeof **l);
  memcpy(O[1], O[0], (size_t)n * sizeof **O);
  c->kernels->merge(n_rows, E, m[0], l[0], O[0], m[2], l[2], O[2]);
  check_errors errors = {0};
  for (int i = 0; i < n_rows; i++) {
    const double most = fmax(m[1][i], m[2][i]);
    const double a = m[1][i] == -INFINITY ? 0 : exp2(m[1][i] - most), b = m[2][i] == -INFINITY ? 0 : exp2(m[2][i] - most);
    const float naive_a = (float)a, naive_b = (float)b;
    if (m[0][i] != (float)most)
      check_fail(c, "row %d: m %g, must be %g", i, (double)m[0][i], most);
    check_errors_add(&errors, l[0][i], l[1][i] * naive_a + l[2][i] * naive_b, l[1][i] * a + l[2][i] * b);
    for (int64_t at = (int64_t)i * E; at < (int64_t)(i + 1) * E; at++)
      check_errors_add(&errors, O[0][at], O[1][at] * naive_a + O[2][at] * naive_b, O[1][at] * a + O[2][at] * b);
  }
  check_errors_judge(c, "sum", &errors, 4); /* naive code has exact factors here, ours come from exp2 */
  c->plain->merge(n_rows, E, m[1], l[1], O[1], m[2], l[2], O[2]);
  check_bits(c, "m", m[0], m[1], n_rows);
  check_bits(c, "l", l[0], l[1], n_rows);
  check_bits(c, "O", O[0], O[1], n);
  check_end(c);
}

static void check_merge(check *c) {
  for (int e = 0; e < N_VALUE_DIMS; e++)
    for (int n_rows = 0; n_rows < 40; n_rows += 3)
      merge_case(c, n_rows, value_dims[e]);
}

const check_entry check_values_entries[] = {{"exp2", check_exp2},
                                            {"softmax_tile", check_softmax},
                                            {"rescale", check_rescale},
                                            {"scale_weights", check_scale_weights},
                                            {"value_product", check_value_product},
                                            {"merge", check_merge},
                                            {NULL, NULL}};
