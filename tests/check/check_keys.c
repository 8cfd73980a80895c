/* Checks of the slots whose lanes are keys, against plain C and against the query-stationary slots: a prompt may be cut anywhere. */
#include "check.h"
#include "oracle.h"
#include <math.h>
#include <string.h>

enum { W = SFA_LANES, MAX_ROWS = SFA_KEYS_ROWS };

static const sfa_dtype key_types[] = {SFA_I8, SFA_BF16, SFA_F16, SFA_F32};
static const int head_dims[] = {8, 24, 64, 72, 128, 200, 256, 264, 512};
enum { N_KEY_TYPES = 4, N_HEAD_DIMS = 9 };

/* ---- Rows as a cache stores them ---- */

typedef struct stored {
  sfa_stored_rows rows;
  float *loaded; /* [n][width]; before scales */
  float *scale;  /* [n] of types that have them, else 1 */
} stored;

static size_t bytes_of(sfa_dtype dtype, int64_t n) { return dtype == SFA_I4 ? (size_t)n / 2 : (size_t)n * sfa_dtype_bytes(dtype); }

/* n rows x [n][dim], their K largest or all of them (K = 0), stored with or without gaps between rows. */
static stored store_rows_of(check *c, int n, int dim, int K, sfa_dtype dtype, const float *x) {
  const int width = K ? K : dim, gap = check_pick(c, 2) ? 0 : 2 * check_range(c, 1, 9), id_bytes = dim <= 256 ? 1 : 2;
  stored s = {
      .rows = {.n = n, .width = width, .dtype = dtype, .values_stride = width + gap, .ids_stride = width + (gap ? check_pick(c, 5) : 0)}};
  const float *dense = x;
  if (K) {
    char *ids = check_memory(c, (size_t)(n * K * id_bytes)),
         *spaced = check_memory(c, (size_t)(((n - 1) * s.rows.ids_stride + K) * id_bytes));
    float *kept = check_floats(c, (int64_t)n * K);
    c->plain->topk(n, x, dim, dim, K, ids, kept);
    for (int j = 0; j < n; j++)
      memcpy(spaced + j * s.rows.ids_stride * id_bytes, ids + (int64_t)j * K * id_bytes, (size_t)(K * id_bytes));
    s.rows.ids = spaced;
    dense = kept;
  }
  const int64_t elements = (n - 1) * s.rows.values_stride + width;
  void *values = check_memory(c, bytes_of(dtype, elements));
  uint16_t *scales = check_memory(c, (size_t)n * 2);
  if (dtype == SFA_I8)
    c->plain->quantize_i8(n, width, dense, width, values, s.rows.values_stride, scales);
  else if (dtype == SFA_I4)
    c->plain->quantize_i4(n, width, dense, width, values, s.rows.values_stride, scales);
  else if (dtype == SFA_E4M3)
    c->plain->quantize_e4m3(n, width, dense, width, values, s.rows.values_stride, scales);
  else
    c->plain->store_rows(n, width, dense, width, dtype, values, s.rows.values_stride);
  if (dtype == SFA_E4M3 && check_pick(c, 2)) /* NaN, which a row that was rounded to this does not have */
    for (int i = 0; i < 3; i++)
      ((uint8_t *)values)[check_pick(c, n) * s.rows.values_stride + check_pick(c, width)] = check_pick(c, 2) ? 0x7f : 0xff;
  s.rows.values = values;
  s.scale = check_floats(c, n);
  if (dtype >= SFA_I8) {
    s.rows.scales_stride = 1 + check_pick(c, 2);
    uint16_t *spaced = check_memory(c, (size_t)((n - 1) * s.rows.scales_stride + 1) * 2);
    for (int j = 0; j < n; j++)
      spaced[j * s.rows.scales_stride] = scales[j];
    s.rows.scales = spaced;
    c->plain->load_rows(1, n, SFA_F16, scales, n, NULL, s.scale, n);
  } else {
    for (int j = 0; j < n; j++)
      s.scale[j] = 1.0f;
  }
  s.loaded = check_floats(c, (int64_t)n * width);
  c->kernels->load_rows(n, width, dtype, values, s.rows.values_stride, NULL, s.loaded, width);
  return s;
}

/* ---- round_rows ---- */

static void round_case(check *c, check_kind kind, int n, int n_terms, float factor) {
  const int n_rows = check_range(c, 1, 5);
  check_begin(c, "round_rows", "%s n %d n_terms %d factor %g", check_kind_name(kind), n, n_terms, (double)factor);
  const int64_t stride = n + check_pick(c, 3), total = (n_rows - 1) * stride + n;
  float *x = check_rows(c, kind, total), *got = check_floats(c, total), *plain = check_floats(c, total);
  float *step = check_floats(c, n_rows), *plain_step = check_floats(c, n_rows);
  for (int64_t at = 0; at < total; at++)
    x[at] *= factor;
  memcpy(got, x, (size_t)total * sizeof *x);
  memcpy(plain, x, (size_t)total * sizeof *x);
  c->kernels->round_rows(n_rows, n, n_terms, got, stride, step);
  c->plain->round_rows(n_rows, n, n_terms, plain, stride, plain_step);
  check_bits(c, "rows", got, plain, total);
  check_bits(c, "steps", step, plain_step, n_rows);
  const int terms = n_terms < SFA_EXACT_TERMS ? n_terms : SFA_EXACT_TERMS;
  const double limit = fmin(32767, floor(ldexp(1, 24) / (127 * terms)));
  for (int row = 0; row < n_rows; row++) {
    double most = 0;
    bool usable = true;
    for (int i = 0; i < n; i++) {
      most = fmax(most, fabs((double)x[row * stride + i]));
      usable &= fabs((double)x[row * stride + i]) < ldexp(1, 100); /* false for NaN */
    }
    int e = -100;
    while (usable && most / ldexp(1, e) > limit)
      e++;
    if (usable ? (double)step[row] != ldexp(1, e) : !isnan(step[row]))
      check_fail(c, "row %d: step %g, must be 2^%d, or NaN if %d", row, (double)step[row], e, !usable);
    for (int i = 0; i < n; i++) {
      const double truth = usable ? nearbyint((double)x[row * stride + i] / ldexp(1, e)) * ldexp(1, e) : NAN;
      const float value = got[row * stride + i];
      if (usable ? (double)value != truth : !isnan(value))
        check_fail(c, "row %d element %d: %.9g, must be %.9g", row, i, (double)value, truth);
    }
  }
  check_end(c);
}

static void check_round_rows(check *c) {
  static const int sizes[] = {1, 8, 15, 16, 17, 64, 128}, terms[] = {1, 2, 3, 4, 8, 16, 24, 31, 32, 33, 128};
  static const float factors[] = {1.0f, 0x1p-120f, 0x1p90f, 0x1p98f, 0x1p110f};
  for (int s = 0; s < 7; s++)
    for (int t = 0; t < 11; t++)
      for (int f = 0; f < 5; f++)
        round_case(c, (check_kind)check_pick(c, CHECK_KINDS), sizes[s], terms[t], factors[f]);
}

/* ---- score_keys ---- */

/* Query rows as attention prepares them: zeros outside their support, scaled, or rounded for int8 keys. */
static float *query_rows(check *c, check_kind kind, int n_rows, int D, int n_terms, sfa_dtype dtype, float query_scale, float *step) {
  float *q = check_rows(c, kind, (int64_t)n_rows * D);
  for (int64_t at = 0; check_pick(c, 2) && at < (int64_t)n_rows * D; at++) /* half of them: a third of the features */
    q[at] = check_pick(c, 3) ? 0.0f : q[at];
  if (dtype == SFA_I8)
    c->kernels->round_rows(n_rows, D, n_terms, q, D, step);
  else
    for (int64_t at = 0; at < (int64_t)n_rows * D; at++)
      q[at] *= query_scale;
  return q;
}

static void keys_case(check *c, check_kind kind, check_kind q_kind, sfa_dtype dtype, int D, int K, int n, int n_rows) {
  check_begin(c, "score_keys", "%s keys, %s queries, dtype %d D %d K %d n %d n_rows %d", check_kind_name(kind), check_kind_name(q_kind),
              dtype, D, K, n, n_rows);
  const int width = K ? K : D;
  const float query_scale = 0.1f + (float)sfa_rng_uniform(&c->rng), *x = check_rows(c, kind, (int64_t)n * D);
  const stored keys = store_rows_of(c, n, D, K, dtype, x);
  float *step = check_floats(c, n_rows);
  const float *q = query_rows(c, q_kind, n_rows, D, width, dtype, query_scale, step);
  float *S = check_floats(c, n_rows * SFA_KEY_TILE), *plain = check_floats(c, n_rows * SFA_KEY_TILE);
  void *table = check_memory(c, (size_t)n_rows * sfa_query_table_bytes(D));
  c->kernels->query_table(n_rows, D, q, D, dtype == SFA_I8 ? step : NULL, table);
  c->kernels->score_keys(&keys.rows, n_rows, D, table, query_scale, S);
  c->plain->query_table(n_rows, D, q, D, dtype == SFA_I8 ? step : NULL, table);
  c->plain->score_keys(&keys.rows, n_rows, D, table, query_scale, plain);
  for (int i = 0; i < n_rows; i++)
    check_bits(c, "S", S + i * SFA_KEY_TILE, plain + i * SFA_KEY_TILE, n);

  /* The query-stationary slots. */
  const float *rows[MAX_ROWS];
  for (int i = 0; i < n_rows; i++)
    rows[i] = q + (int64_t)i * D;
  float *Qt = check_floats(c, (int64_t)D * W), *tile = check_floats(c, n * W), *key_scale = check_floats(c, n);
  for (int j = 0; j < n; j++)
    key_scale[j] = keys.scale[j] * query_scale;
  c->kernels->query_tile(n_rows, rows, D, W, 1.0f, Qt);
  if (K) {
    const int id_bytes = D <= 256 ? 1 : 2;
    char *ids = check_memory(c, (size_t)(n * K * id_bytes));
    for (int j = 0; j < n; j++)
      memcpy(ids + (int64_t)j * K * id_bytes, (const char *)keys.rows.ids + j * keys.rows.ids_stride * id_bytes, (size_t)(K * id_bytes));
    c->kernels->score_codes(n, K, ids, id_bytes, keys.loaded, dtype == SFA_I8 ? key_scale : NULL, Qt, W, tile);
  } else {
    c->kernels->score_dense(n, D, keys.loaded, D, dtype == SFA_I8 ? key_scale : NULL, Qt, W, tile);
  }
  float *turned = check_floats(c, n);
  for (int i = 0; i < n_rows; i++) {
    for (int j = 0; j < n; j++)
      turned[j] = tile[j * W + i];
    check_bits(c, "S against the query-stationary slots", S + i * SFA_KEY_TILE, turned, n);
  }

  if (kind == CHECK_NORMAL && q_kind == CHECK_NORMAL) {
    check_errors errors = {0};
    for (int i = 0; i < n_rows; i++)
      for (int j = 0; j < n; j++) {
        double truth = 0;
        float naive = 0;
        for (int u = 0; u < width; u++) {
          const int64_t at = j * keys.rows.ids_stride + u;
          const int feature = !K ? u : D <= 256 ? ((const uint8_t *)keys.rows.ids)[at] : ((const uint16_t *)keys.rows.ids)[at];
          const float value = keys.loaded[(int64_t)j * width + u] * keys.scale[j] * (dtype == SFA_I8 ? query_scale : 1.0f);
          truth += (double)value * (double)rows[i][feature];
          naive += value * rows[i][feature];
        }
        check_errors_add(&errors, S[i * SFA_KEY_TILE + j], naive, truth);
      }
    check_errors_judge(c, "scores", &errors, 2);
  }
  check_end(c);
}

static void check_score_keys(check *c) {
  static const int counts[] = {1, 15, 16, 17, 63, SFA_KEY_TILE, SFA_KEY_TILE};
  static const int row_counts[] = {1, 1, 2, 3, 4, 7, MAX_ROWS};
  for (int t = 0; t < N_KEY_TYPES; t++)
    for (int d = 0; d < N_HEAD_DIMS; d++)
      for (int n = 0; n < 7; n++) {
        const int D = head_dims[d], kept[] = {0, 1, 8, D < 16 ? D : 16, D < 32 ? D : 32, check_range(c, 1, D), D};
        if (c->quick && (d + n + t) % 2)
          continue;
        for (int k = 0; k < 7; k++) {
          keys_case(c, CHECK_NORMAL, CHECK_NORMAL, key_types[t], D, kept[k], counts[n], row_counts[check_pick(c, 7)]);
          keys_case(c, (check_kind)check_pick(c, CHECK_KINDS), (check_kind)check_pick(c, CHECK_KINDS), key_types[t], D, kept[k], counts[n],
                    row_counts[check_pick(c, 7)]);
        }
      }
}

/* ---- adjust_keys, softmax_keys ---- */

/* rows [n_rows][64] to a tile [n][W] of the query-stationary slots, and back. */
static void turn(const float *rows, int n_rows, int n, float *tile) {
  for (int j = 0; j < n; j++)
    for (int i = 0; i < W; i++)
      tile[j * W + i] = i < n_rows ? rows[i * SFA_KEY_TILE + j] : 0.0f;
}
static void turn_back(const float *tile, int n_rows, int n, float *rows) {
  for (int i = 0; i < n_rows; i++)
    for (int j = 0; j < n; j++)
      rows[i * SFA_KEY_TILE + j] = tile[j * W + i];
}
static void check_rows_of(check *c, const char *what, const float *got, const float *expected, int n_rows, int n) {
  for (int i = 0; i < n_rows; i++)
    check_bits(c, what, got + i * SFA_KEY_TILE, expected + i * SFA_KEY_TILE, n);
}

static void check_adjust_keys(check *c) {
  static const int counts[] = {1, 7, 16, 63, SFA_KEY_TILE};
  for (int kind = 0; kind < CHECK_KINDS; kind++)
    for (int mode = 1; mode < 4; mode++)
      for (int s = 0; s < 5; s++) {
        const int n = counts[s], n_rows = check_range(c, 1, MAX_ROWS);
        const float softcap = mode & 1 ? 1.0f + 50.0f * (float)sfa_rng_uniform(&c->rng) : 0.0f;
        check_begin(c, "adjust_keys", "%s n_rows %d n %d softcap %g slope %d", check_kind_name((check_kind)kind), n_rows, n,
                    (double)softcap, mode >> 1);
        const int total = n_rows * SFA_KEY_TILE;
        const float *x = check_rows(c, (check_kind)kind, total), *slope = check_rows(c, CHECK_NORMAL, W);
        float *S = check_floats(c, total), *plain = check_floats(c, total), *tile = check_floats(c, n * W);
        int32_t *pos = check_memory(c, W * sizeof *pos);
        for (int i = 0; i < W; i++)
          pos[i] = check_range(c, -100, 100000);
        memcpy(S, x, (size_t)total * sizeof *x);
        memcpy(plain, x, (size_t)total * sizeof *x);
        turn(x, n_rows, n, tile);
        c->kernels->adjust_keys(n_rows, n, softcap, mode >> 1 ? slope : NULL, pos, S);
        c->plain->adjust_keys(n_rows, n, softcap, mode >> 1 ? slope : NULL, pos, plain);
        check_rows_of(c, "S", S, plain, n_rows, n);
        c->kernels->score_adjust(n, W, softcap, mode >> 1 ? slope : NULL, pos, tile);
        turn_back(tile, n_rows, n, plain);
        check_rows_of(c, "S against score_adjust", S, plain, n_rows, n);
        check_end(c);
      }
}

static void softmax_keys_case(check *c, int n_rows, int n, bool special) {
  check_begin(c, "softmax_keys", "n_rows %d n %d special %d", n_rows, n, special);
  const int total = n_rows * SFA_KEY_TILE;
  float *state[3][3], *S[3], *tile = check_floats(c, n * W); /* under test, plain C, the query-stationary slot */
  for (int t = 0; t < 3; t++) {
    S[t] = check_floats(c, total);
    for (int s = 0; s < 3; s++)
      state[t][s] = check_floats(c, W);
    for (int i = 0; i < W; i++) {
      state[t][0][i] = -INFINITY;
      state[t][1][i] = 0.0f;
    }
  }
  for (int round = 0; round < 3; round++) {
    const float wide = check_pick(c, 2) ? 3.0f : 120.0f;
    for (int i = 0; i < n_rows; i++) {
      const int kind = special ? check_pick(c, 7) : 6;
      for (int j = 0; j < SFA_KEY_TILE; j++) {
        float s = wide * check_normal(c);
        if (kind == 0 || (kind == 1 && check_pick(c, 2)))
          s = -INFINITY;
        else if (kind == 2 && !check_pick(c, n))
          s = NAN;
        else if (kind == 3 && !check_pick(c, n))
          s = INFINITY;
        else if (kind == 4)
          s = check_pick(c, 2) ? 0.0f : -0.0f;
        for (int t = 0; t < 3; t++)
          S[t][i * SFA_KEY_TILE + j] = j < n ? s : NAN;
      }
    }
    turn(S[2], n_rows, n, tile);
    const int changed = c->kernels->softmax_keys(n_rows, n, S[0], state[0][0], state[0][1], state[0][2]);
    const int plain_changed = c->plain->softmax_keys(n_rows, n, S[1], state[1][0], state[1][1], state[1][2]);
    c->kernels->softmax_tile(n, W, tile, state[2][0], state[2][1], state[2][2]);
    turn_back(tile, n_rows, n, S[2]);
    int expected = 0;
    for (int i = 0; i < n_rows; i++)
      expected |= state[0][2][i] != 1.0f;
    if (changed != expected || plain_changed != expected)
      check_fail(c, "tile %d returns %d, plain C %d, alpha says %d", round, changed, plain_changed, expected);
    static const char *const names[] = {"m", "l", "alpha"};
    for (int t = 1; t < 3; t++) {
      check_rows_of(c, t == 1 ? "P" : "P against softmax_tile", S[0], S[t], n_rows, n);
      for (int s = 0; s < 3; s++)
        check_bits(c, names[s], state[0][s], state[t][s], n_rows);
    }
  }
  check_end(c);
}

static void check_softmax_keys(check *c) {
  for (int n_rows = 1; n_rows <= MAX_ROWS; n_rows++)
    for (int n = 1; n <= SFA_KEY_TILE; n += c->quick ? 7 : 1)
      for (int special = 0; special < 2; special++)
        softmax_keys_case(c, n_rows, n, special);
}

/* ---- value_keys ---- */

static void values_case(check *c, check_kind kind, sfa_dtype dtype, int E, int n, int n_rows, int zeros) {
  check_begin(c, "value_keys", "%s dtype %d E %d n %d n_rows %d zeros %d", check_kind_name(kind), dtype, E, n, n_rows, zeros);
  const int64_t total = (int64_t)n_rows * E;
  const stored values = store_rows_of(c, n, E, 0, dtype, check_rows(c, kind, (int64_t)n * E));
  float *P = check_rows(c, CHECK_NORMAL, n_rows * SFA_KEY_TILE), *tile = check_floats(c, n * W);
  const float *start = check_rows(c, CHECK_NORMAL, total);
  for (int j = 0; j < n; j++) {
    const bool unseen = zeros == 2 && check_pick(c, 2); /* by every row */
    for (int i = 0; i < n_rows; i++) {
      float *p = &P[i * SFA_KEY_TILE + j];
      *p = unseen || (zeros == 1 && check_pick(c, 2)) ? 0.0f : fabsf(*p);
      if (zeros == 3 && !check_pick(c, n * n_rows))
        *p = NAN;
    }
  }
  turn(P, n_rows, n, tile);
  if (values.rows.scales)
    c->kernels->scale_weights(n, W, values.scale, tile);
  float *O[3];
  for (int t = 0; t < 3; t++) {
    O[t] = check_floats(c, total);
    memcpy(O[t], start, (size_t)total * sizeof *start);
  }
  c->kernels->value_keys(&values.rows, n_rows, P, E, O[0]);
  c->plain->value_keys(&values.rows, n_rows, P, E, O[1]);
  c->kernels->value_product_masked(n_rows, n, W, tile, E, values.loaded, E, O[2]);
  for (int t = 0; t < 3; t++)
    for (int64_t at = 0; at < total; at++)
      O[t][at] += 0.0f; /* one zero */
  check_bits(c, "O", O[0], O[1], total);
  check_bits(c, "O against value_product_masked", O[0], O[2], total);
  check_end(c);
}

/* Keys without weight are not read: they lie where nothing can be read. */
static void unread_case(check *c, sfa_dtype dtype, int E, int n_rows, int before, int n_read, int after) {
  check_begin(c, "value_keys", "unread keys: dtype %d E %d n_rows %d, %d before and %d after %d", dtype, E, n_rows, before, after, n_read);
  stored values = store_rows_of(c, n_read, E, 0, dtype, check_rows(c, CHECK_NORMAL, (int64_t)n_read * E));
  uint16_t *scales = check_memory(c, SFA_KEY_TILE * 2);
  float *P = check_floats(c, n_rows * SFA_KEY_TILE);
  const float *start = check_rows(c, CHECK_NORMAL, (int64_t)n_rows * E);
  float *O = check_floats(c, (int64_t)n_rows * E), *plain = check_floats(c, (int64_t)n_rows * E);
  sfa_stored_rows rows = values.rows;
  for (int j = 0; j < n_read; j++)
    scales[before + j] = rows.scales ? rows.scales[j * rows.scales_stride] : 0;
  rows.n = before + n_read + after;
  rows.values = (const char *)rows.values - (ptrdiff_t)bytes_of(dtype, before * rows.values_stride);
  rows.scales = rows.scales ? scales : NULL;
  rows.scales_stride = 1;
  for (int i = 0; i < n_rows; i++)
    for (int j = 0; j < rows.n; j++)
      P[i * SFA_KEY_TILE + j] = j >= before && j < before + n_read ? fabsf(check_normal(c)) + 0.01f : check_pick(c, 2) ? 0.0f : -0.0f;
  memcpy(O, start, (size_t)(n_rows * E) * sizeof *O);
  memcpy(plain, start, (size_t)(n_rows * E) * sizeof *O);
  c->kernels->value_keys(&rows, n_rows, P, E, O);
  for (int i = 0; i < n_rows; i++)
    memmove(P + i * SFA_KEY_TILE, P + i * SFA_KEY_TILE + before, (size_t)n_read * sizeof *P);
  c->plain->value_keys(&values.rows, n_rows, P, E, plain);
  check_bits(c, "O", O, plain, (int64_t)n_rows * E);
  check_end(c);
}

static void check_value_keys(check *c) {
  static const sfa_dtype types[] = {SFA_F32, SFA_BF16, SFA_F16, SFA_I8, SFA_I4, SFA_E4M3};
  static const int dims[] = {8, 16, 24, 40, 64, 72, 80, 96, 128, 136, 256}, counts[] = {1, 2, 5, 63, SFA_KEY_TILE};
  for (int t = 0; t < 6; t++)
    for (int e = 0; e < 11; e++)
      for (int n = 0; n < 5; n++) {
        for (int zeros = 0; zeros < 4; zeros++) {
          if (c->quick && (e + n + zeros) % 2)
            continue;
          values_case(c, CHECK_NORMAL, types[t], dims[e], counts[n], check_range(c, 1, MAX_ROWS), zeros);
          values_case(c, (check_kind)check_pick(c, CHECK_KINDS), types[t], dims[e], counts[n], check_range(c, 1, 5), zeros);
        }
        values_case(c, CHECK_ZEROS, types[t], dims[e], counts[n], check_range(c, 1, 5), 0); /* scales of 0 */
        unread_case(c, types[t], dims[e], check_range(c, 1, 5), check_range(c, 0, 20), check_range(c, 1, 20), check_range(c, 0, 20));
      }
}

const check_entry check_keys_entries[] = {{"round_rows", check_round_rows},   {"score_keys", check_score_keys},
                                          {"adjust_keys", check_adjust_keys}, {"softmax_keys", check_softmax_keys},
                                          {"value_keys", check_value_keys},   {NULL, NULL}};
