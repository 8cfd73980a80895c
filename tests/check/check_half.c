/* Checks of the 16-bit kernels: every table against formulas in double, AMX also against plain C, bit for bit where nothing is summed by
 * tiles. */
#include "base/half.h"
#include "check.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const int widths[] = {64, 128, 256};
static const int head_dims[] = {8, 24, 64, 72, 128, 200, 256};
enum { N_HEAD_DIMS = 7 };

static uint16_t *check_halves(check *c, int64_t n) { return check_memory(c, (size_t)n * sizeof(uint16_t)); }

static float f32_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/* A chunk of keys and values and a block of queries, packed by one table. */
typedef struct half_case {
  int D, E, K, W, n_keys, n_rows;
  float *keys, *codes, *values, *q_tile;      /* [n_keys][D], [n_keys][K], [n_keys][E], [D][n_rows] */
  uint8_t *ids;                               /* [n_keys][K] */
  uint16_t *V, *dense, *offsets, *Qt, *Q, *P; /* packed */
  uint32_t *twice;
  float *squares, *O, *l;
  uint32_t longest[2], largest;
} half_case;

static void inputs_create(check *c, half_case *h) {
  *h = (half_case){.W = widths[check_pick(c, 3)], .E = 8 * check_range(c, 1, 18), .n_keys = check_range(c, 1, SFA_HALF_CHUNK)};
  do
    h->D = head_dims[check_pick(c, N_HEAD_DIMS)];
  while (h->D * h->W > 32768);
  h->K = check_range(c, 1, h->D < 24 ? h->D : 24);
  h->n_rows = 16 * check_range(c, 1, h->W / 16);
  h->keys = check_rows(c, CHECK_NORMAL, (int64_t)h->n_keys * h->D);
  h->values = check_rows(c, CHECK_NORMAL, (int64_t)h->n_keys * h->E);
  h->q_tile = check_rows(c, CHECK_NORMAL, (int64_t)h->D * h->n_rows);
  h->codes = check_floats(c, (int64_t)h->n_keys * h->K);
  h->ids = check_memory(c, (size_t)h->n_keys * (size_t)h->K);
  c->plain->topk(h->n_keys, h->keys, h->D, h->D, h->K, h->ids, h->codes);
}

/* Packs the inputs of `from` with a table. */
static void pack(check *c, const sfa_half_kernels *half, const half_case *from, half_case *h) {
  *h = *from;
  int Dp = sfa_half_padded(h->D), Ep = sfa_half_padded(h->E);
  h->V = check_halves(c, (int64_t)SFA_HALF_CHUNK * Ep);
  h->dense = check_halves(c, (int64_t)SFA_HALF_CHUNK * Dp);
  h->twice = check_memory(c, sizeof(uint32_t) * SFA_HALF_CHUNK * (size_t)h->K);
  h->offsets = check_halves(c, (int64_t)SFA_HALF_CHUNK * h->K);
  h->Qt = check_halves(c, (int64_t)h->D * h->W);
  h->Q = check_halves(c, (int64_t)Dp * h->W);
  h->P = check_halves(c, (int64_t)h->W / 32 * SFA_HALF_WEIGHTS_STRIDE);
  h->squares = check_floats(c, 2 * (int64_t)h->n_rows);
  h->O = check_floats(c, (int64_t)Ep * h->W);
  h->l = check_floats(c, h->W);
  memset(h->Qt, 0, sizeof *h->Qt * (size_t)h->D * (size_t)h->W);
  memset(h->Q, 0, sizeof *h->Q * (size_t)Dp * (size_t)h->W);
  memset(h->P, 0, sizeof *h->P * (size_t)h->W / 32 * SFA_HALF_WEIGHTS_STRIDE);
  for (int step = 0; step < SFA_HALF_STEPS; step++) {
    int first = step * SFA_HALF_STEP, n = h->n_keys - first;
    n = n < 0 ? 0 : n > SFA_HALF_STEP ? SFA_HALF_STEP : n;
    first = n ? first : 0;
    uint32_t results[3] = {half->pack_values(step, n, h->E, h->values + first * h->E, h->E, h->V),
                           half->pack_keys(step, n, h->D, h->keys + first * h->D, h->D, h->dense),
                           half->pack_codes(step, n, h->K, h->ids + first * h->K, 1, h->codes + first * h->K, h->W, h->twice, h->offsets)};
    h->largest = results[0] > h->largest ? results[0] : h->largest;
    for (int way = 0; way < 2; way++)
      h->longest[way] = results[1 + way] > h->longest[way] ? results[1 + way] : h->longest[way];
  }
  half->query_codes(0, h->n_rows, h->D, h->q_tile, 16, h->W, h->Qt, h->squares);
  half->query_dense(0, h->n_rows, h->D, h->q_tile, 0.5f, h->Q, h->squares + h->n_rows);
}

/* The same values in bf16, and queries as codes: the bytes that f32 rows of these numbers give. */
static void check_pack_short(check *c, const half_case *in) {
  const int Ep = sfa_half_padded(in->E), stride = in->E + check_pick(c, 5), n = in->n_keys < SFA_HALF_STEP ? in->n_keys : SFA_HALF_STEP;
  const size_t chunk_bytes = sizeof(uint16_t) * SFA_HALF_CHUNK * (size_t)Ep, Qt_bytes = sizeof(uint16_t) * (size_t)in->D * (size_t)in->W;
  const int step = check_pick(c, SFA_HALF_STEPS), K = in->K, n_rows = check_range(c, 1, in->n_rows),
            first = 32 * check_pick(c, (in->W - n_rows) / 32 + 1);
  uint16_t *rows = check_halves(c, (int64_t)(n - 1) * stride + in->E);
  float *same = check_floats(c, (int64_t)n * in->E);
  for (int j = 0; j < n; j++)
    for (int e = 0; e < in->E; e++) {
      rows[j * stride + e] = sfa_bf16_from_f32(in->values[j * in->E + e]);
      same[j * in->E + e] = sfa_f32_from_bf16(rows[j * stride + e]);
    }
  uint16_t *V = check_halves(c, (int64_t)SFA_HALF_CHUNK * Ep), *plain = check_halves(c, (int64_t)SFA_HALF_CHUNK * Ep);
  memset(V, 0, chunk_bytes);
  memset(plain, 0, chunk_bytes);
  uint32_t largest = c->half->pack_values_bf16(step, n, in->E, rows, stride, V);
  if (largest != sfa_half_kernels_scalar.pack_values(step, n, in->E, same, in->E, plain))
    check_fail(c, "largest of bf16 values: bits %08x", largest);
  check_bytes(c, "V of bf16", V, plain, chunk_bytes);

  const void *ids[SFA_HALF_MAX_WIDTH];
  const float *values[SFA_HALF_MAX_WIDTH];
  float *tile = check_floats(c, (int64_t)in->D * in->W), *squares = check_floats(c, in->W), *plain_squares = check_floats(c, in->W);
  uint16_t *Qt = check_halves(c, (int64_t)in->D * in->W), *plain_Qt = check_halves(c, (int64_t)in->D * in->W);
  const int n_tile = (n_rows + 15) / 16 * 16;
  memset(tile, 0, sizeof *tile * (size_t)in->D * (size_t)n_tile);
  memset(Qt, 0x55, Qt_bytes);
  memset(plain_Qt, 0x55, Qt_bytes);
  for (int i = 0; i < n_rows; i++) { /* those of keys will do */
    ids[i] = in->ids + i % in->n_keys * K;
    values[i] = in->codes + i % in->n_keys * K;
    for (int u = 0; u < K; u++)
      tile[((const uint8_t *)ids[i])[u] * n_tile + i] = values[i][u];
  }
  c->half->query_sparse(first, n_rows, in->D, K, ids, values, 16, in->W, Qt, squares);
  sfa_half_kernels_scalar.query_codes(first, n_tile, in->D, tile, 16, in->W, plain_Qt, plain_squares);
  check_bytes(c, "Qt of codes", Qt, plain_Qt, Qt_bytes);
  for (int i = 0; i < n_rows; i++)
    if (!(fabsf(squares[i] - plain_squares[i]) <= 1e-5f * plain_squares[i]))
      check_fail(c, "length of query %d from its code", i);
}

static void check_pack(check *c) {
  for (int i = 0; i < (c->quick ? 20 : 100); i++) {
    half_case in, h, plain;
    inputs_create(c, &in);
    check_begin(c, "pack", "D %d E %d K %d W %d n_keys %d n_rows %d", in.D, in.E, in.K, in.W, in.n_keys, in.n_rows);
    pack(c, c->half, &in, &h);
    pack(c, &sfa_half_kernels_scalar, &in, &plain);
    float largest = 0, longest[2] = {0, 0};
    for (int j = 0; j < in.n_keys; j++) {
      float sums[2] = {0, 0};
      for (int e = 0; e < in.E; e++) {
        float v = in.values[j * in.E + e];
        largest = fmaxf(largest, fabsf(v));
        if (h.V[sfa_half_value_at(j / 32, e, j % 32)] != sfa_bf16_from_f32(v))
          check_fail(c, "value %d of key %d", e, j);
      }
      for (int u = 0; u < in.D; u++)
        sums[0] += in.keys[j * in.D + u] * in.keys[j * in.D + u];
      for (int u = 0; u < in.K; u++) {
        float k = in.codes[j * in.K + u];
        int at = (j / 2 * in.K + u) * 2 + j % 2;
        sums[1] += k * k;
        if (h.twice[at] != 0x10001u * sfa_f16_from_f32(k) || h.offsets[at] != 2 * in.W * in.ids[j * in.K + u])
          check_fail(c, "feature %d of key %d", u, j);
      }
      for (int way = 0; way < 2; way++)
        longest[way] = fmaxf(longest[way], sums[way]);
    }
    if (f32_of_bits(h.largest) != largest)
      check_fail(c, "largest value %g, not %g", (double)f32_of_bits(h.largest), (double)largest);
    for (int way = 0; way < 2; way++)
      if (!(fabsf(f32_of_bits(h.longest[way]) - longest[way]) <= 1e-5f * longest[way]))
        check_fail(c, "longest key %g, not %g", (double)f32_of_bits(h.longest[way]), (double)longest[way]);
    for (int r = 0; r < in.n_rows; r++)
      for (int way = 0; way < 2; way++) {
        float sum = 0, factor = way ? 0.5f : 16;
        for (int u = 0; u < in.D; u++) {
          float q = in.q_tile[u * in.n_rows + r] * factor;
          sum += q * q;
          if (way ? h.Q[sfa_half_query_at(sfa_half_padded(in.D), r, u)] != sfa_bf16_from_f32(q)
                  : h.Qt[u * in.W + sfa_half_lane(r)] != sfa_f16_from_f32(q))
            check_fail(c, "feature %d of query %d, %s", u, r, way ? "dense" : "codes");
        }
        if (!(fabsf(h.squares[way * in.n_rows + r] - sum) <= 1e-5f * sum))
          check_fail(c, "length of query %d", r);
      }
    check_bytes(c, "V", h.V, plain.V, sizeof *h.V * SFA_HALF_CHUNK * (size_t)sfa_half_padded(in.E));
    check_bytes(c, "dense keys", h.dense, plain.dense, sizeof *h.dense * SFA_HALF_CHUNK * (size_t)sfa_half_padded(in.D));
    check_bytes(c, "codes", h.twice, plain.twice, sizeof *h.twice * SFA_HALF_CHUNK * (size_t)in.K);
    check_bytes(c, "offsets", h.offsets, plain.offsets, sizeof *h.offsets * SFA_HALF_CHUNK * (size_t)in.K);
    check_bytes(c, "Qt", h.Qt, plain.Qt, sizeof *h.Qt * (size_t)in.D * (size_t)in.W);
    check_pack_short(c, &in);
    check_bytes(c, "Q", h.Q, plain.Q, sizeof *h.Q * (size_t)sfa_half_padded(in.D) * (size_t)in.W);
    check_end(c);
  }
}

/* What infinite and NaN inputs leave in the facts of a chunk. */
static void check_pack_special(check *c) {
  const float specials[] = {INFINITY, -INFINITY, NAN, -NAN};
  for (int i = 0; i < 4; i++) {
    check_begin(c, "pack_special", "%g", (double)specials[i]);
    half_case in, h;
    inputs_create(c, &in);
    in.values[check_pick(c, in.n_keys * in.E)] = specials[i];
    in.keys[check_pick(c, in.n_keys * in.D)] = specials[i];
    in.codes[check_pick(c, in.n_keys * in.K)] = specials[i];
    in.q_tile[3 * in.n_rows + 1] = specials[i];
    pack(c, c->half, &in, &h);
    if (h.largest < 0x7f800000u || h.longest[0] < 0x7f800000u || h.longest[1] < 0x7f800000u)
      check_fail(c, "the largest value is %g, the longest key %g, %g: none may be finite", (double)f32_of_bits(h.largest),
                 (double)f32_of_bits(h.longest[0]), (double)f32_of_bits(h.longest[1]));
    if (isfinite(h.squares[1]) || isfinite(h.squares[in.n_rows + 1]))
      check_fail(c, "the length of a query is finite");
    check_end(c);
  }
}

/* Weights of both ways with and without masks and shifts: within what the table and f16 give of 2^(s - shift), 0 where masked. */
static void weights_case(check *c, bool dense, bool masked, bool far) {
  half_case in, h, plain;
  inputs_create(c, &in);
  check_begin(c, dense ? "weights_dense" : "weights_codes", "D %d K %d W %d n_keys %d masked %d far %d", in.D, in.K, in.W, in.n_keys,
              masked, far);
  pack(c, c->half, &in, &h);
  pack(c, &sfa_half_kernels_scalar, &in, &plain);
  float *shift = check_floats(c, in.W);
  int16_t *top[2] = {check_memory(c, sizeof **top * (size_t)in.W), check_memory(c, sizeof **top * (size_t)in.W)};
  sfa_half_mask *mask = check_memory(c, sizeof *mask);
  mask->n_always = check_pick(c, 40);
  for (int i = 0; i < in.W; i++) {
    shift[i] = (float)(128 * check_range(c, -9, 9));
    mask->lo[i] = (int16_t)check_range(c, -1, 100);
    mask->hi[i] = (int16_t)check_range(c, -1, SFA_HALF_CHUNK);
    top[0][i] = top[1][i] = SFA_HALF_UNSEEN;
  }
  const float unit = 32;
  const int first_step = check_pick(c, SFA_HALF_STEPS), n_steps = check_range(c, 1, SFA_HALF_STEPS - first_step);
  for (int t = 0; t < 2; t++) {
    const sfa_half_kernels *half = t ? &sfa_half_kernels_scalar : c->half;
    const half_case *at = t ? &plain : &h;
    half->begin();
    if (dense)
      half->weights_dense(first_step, n_steps, in.D, at->dense, in.W, at->Q, unit, far ? shift : NULL, masked ? mask : NULL,
                          far ? top[t] : NULL, at->P);
    else
      half->weights_codes(first_step, n_steps, in.K, at->twice, at->offsets, in.W, at->Qt, far ? shift : NULL, masked ? mask : NULL,
                          far ? top[t] : NULL, at->P);
    half->end();
  }
  for (int i = 0; i < in.n_rows; i++) {
    double most = -32768;
    for (int j = first_step * 32; j < (first_step + n_steps) * 32; j++) {
      double s = far ? -shift[i] : 0, size = fabs(s);
      if (j < in.n_keys)
        for (int u = 0; u < (dense ? in.D : in.K); u++) {
          int feature = dense ? u : in.ids[j * in.K + u];
          double product =
              (double)in.q_tile[feature * in.n_rows + i] * (dense ? 16.0 * in.keys[j * in.D + u] : 16.0 * in.codes[j * in.K + u]);
          s += product;
          size += fabs(product);
        }
      bool seen = !masked || ((mask->lo[i] <= j || j < mask->n_always) && j <= mask->hi[i]);
      float p = sfa_f32_from_bf16(h.P[sfa_half_weight_at(j / 32, i, j % 32)]);
      double tolerance = 0.008 + size * (dense ? 0x1p-8 : 0x1p-11 * in.K) * M_LN2 / 128;
      if (seen ? !(fabs(p / exp2(s / 128) - 1) <= tolerance) : p != 0)
        check_fail(c, "weight of query %d, key %d is %g, not %g", i, j, (double)p, seen ? exp2(s / 128) : 0.0);
      if (seen)
        most = fmax(most, s);
    }
    if (far && !(fabs(top[0][i] - most) <= 1 + fabs(most) / 16))
      check_fail(c, "top of query %d is %d, not %g", i, top[0][i], most);
  }
  int64_t n_apart = 0, n = (int64_t)in.W / 32 * SFA_HALF_WEIGHTS_STRIDE;
  for (int64_t at = 0; at < n; at++) { /* sums of tiles may round otherwise, once in thousands to the next weight */
    int apart = abs((int)h.P[at] - (int)plain.P[at]);
    n_apart += apart > 0;
    if (apart > (dense ? 2 : 0))
      check_fail(c, "weight at %lld: bits %04x, plain C %04x", (long long)at, h.P[at], plain.P[at]);
  }
  if (n_apart > n / 200)
    check_fail(c, "%lld of %lld weights differ from plain C", (long long)n_apart, (long long)n);
  check_end(c);
}

static void check_weights(check *c) {
  for (int i = 0; i < (c->quick ? 2 : 10); i++)
    for (int kind = 0; kind < 8; kind++)
      weights_case(c, kind & 1, kind & 2, kind & 4);
}

/* O^T and l after two calls, a rescale between them, and the rows that come out. */
static void check_values(check *c) {
  for (int i = 0; i < (c->quick ? 8 : 40); i++) {
    half_case in, h;
    inputs_create(c, &in);
    check_begin(c, "half_values", "E %d W %d n_keys %d", in.E, in.W, in.n_keys);
    pack(c, c->half, &in, &h);
    const int Ep = sfa_half_padded(in.E), split = check_range(c, 1, SFA_HALF_STEPS - 1);
    float *factor = check_floats(c, in.W), *scale = check_floats(c, in.W), *rows[SFA_HALF_MAX_WIDTH],
          *out = check_floats(c, (int64_t)in.W * in.E);
    memset(h.O, 0, sizeof *h.O * (size_t)Ep * (size_t)in.W);
    memset(h.l, 0, sizeof *h.l * (size_t)in.W);
    for (int64_t at = 0; at < (int64_t)in.W / 32 * SFA_HALF_WEIGHTS_STRIDE; at++)
      h.P[at] = sfa_bf16_from_f32(fabsf(check_normal(c)));
    for (int r = 0; r < in.W; r++)
      factor[r] = check_pick(c, 3) ? 1 : ldexpf(1, -check_pick(c, 30));
    c->half->begin();
    c->half->accumulate(0, split, in.E, h.V, in.W, h.P, h.O, h.l);
    c->half->rescale(in.E, in.W, factor, h.O, h.l);
    c->half->accumulate(split, SFA_HALF_STEPS - split, in.E, h.V, in.W, h.P, h.O, h.l);
    c->half->end();
    for (int r = 0; r < in.W; r++) {
      scale[r] = 0.5f;
      rows[r] = out + r * in.E;
    }
    const int first = 16 * check_pick(c, in.W / 16), n_first = check_range(c, 1, 16);
    c->half->output_rows(0, in.W, in.E, in.W, h.O, scale, rows);
    c->half->output_rows(first, n_first, in.E, in.W, h.O, scale, rows + first); /* again, a few */
    for (int r = 0; r < in.W; r++)
      for (int e = -1; e < in.E; e++) { /* -1: l */
        double sum = 0, size = 0;
        for (int j = 0; j < SFA_HALF_CHUNK; j++) {
          double p = sfa_f32_from_bf16(h.P[sfa_half_weight_at(j / 32, r, j % 32)]) * (j / 32 < split ? (double)factor[r] : 1.0);
          double v = e < 0 ? 1 : j < in.n_keys ? sfa_f32_from_bf16(h.V[sfa_half_value_at(j / 32, e, j % 32)]) : 0;
          sum += p * v;
          size += fabs(p * v);
        }
        float got = e < 0 ? h.l[r] : 2 * out[r * in.E + e];
        if (!(fabs(got - sum) <= 1e-6 * size))
          check_fail(c, "row %d, %s %d: %.9g, not %.9g", r, e < 0 ? "sum" : "dimension", e, (double)got, sum);
      }
    check_end(c);
  }
}

const check_entry check_half_entries[] = {{"half_pack", check_pack},
                                          {"half_special", check_pack_special},
                                          {"half_weights", check_weights},
                                          {"half_values", check_values},
                                          {NULL, NULL}};
