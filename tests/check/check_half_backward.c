/* Checks of the gradients' 16-bit kernels: every table against formulas in double over what it rounded, AMX also against plain C, bit for
 * bit where nothing is summed. */
#include "base/half.h"
#include "check.h"
#include <math.h>
#include <string.h>

static const int dims[] = {8, 24, 32, 64, 72, 128, 200, 256};
enum { N_DIMS = 8, KEYS = 64 };

static double of_bf16(uint16_t x) { return (double)sfa_f32_from_bf16(x); }

/* Bytes of rows of patches. */
static size_t patch_bytes(int n_rows, int dim) { return sizeof(uint16_t) * (size_t)n_rows * (size_t)sfa_half_padded(dim); }

/* ---- pack_patches ------------------------------------------------------------------------------------------------------------ */

static void pack_case(check *c, check_kind kind) {
  const int dim = dims[check_pick(c, N_DIMS)], n = check_range(c, 1, 32), stride = dim + 3 * check_pick(c, 2), right = check_pick(c, 2);
  check_begin(c, "pack_patches", "%s dim %d n %d stride %d %s", check_kind_name(kind), dim, n, stride, right ? "right" : "left");
  const float *x = check_rows(c, kind, (int64_t)(n - 1) * stride + dim);
  uint16_t *out[3], *plain[2];
  for (int i = 0; i < 3; i++)
    out[i] = check_memory(c, patch_bytes(32, dim));
  for (int i = 0; i < 2; i++)
    plain[i] = check_memory(c, patch_bytes(32, dim));
  c->half->pack_patches(n, dim, x, stride, right, out[0], out[1]);
  c->half->pack_patches(n, dim, x, stride, right, out[2], NULL);
  sfa_half_kernels_scalar.pack_patches(n, dim, x, stride, right, plain[0], plain[1]);
  check_bytes(c, "straight", out[0], plain[0], patch_bytes(32, dim));
  check_bytes(c, "turned", out[1], plain[1], patch_bytes(32, dim));
  check_bytes(c, "straight alone", out[2], plain[0], patch_bytes(32, dim));
  for (int r = 0; r < 32; r++)
    for (int u = 0; u < sfa_half_padded(dim); u++) {
      const float value = r < n && u < dim ? x[r * stride + u] : 0;
      const uint16_t entry = sfa_bf16_from_f32(fabsf(value) < 0x1p-126f ? copysignf(0, value) : value);
      const int64_t patch = sfa_half_patch_at(sfa_half_padded(dim), 0, u);
      const int straight = right ? sfa_half_right_at(r, u % 32) : sfa_half_left_at(r, u % 32);
      const int turned = right ? sfa_half_right_at(u % 32, r) : sfa_half_left_at(u % 32, r);
      if (out[0][patch + straight] != entry || out[1][patch + turned] != entry)
        check_fail(c, "entry %d %d: bits %04x and %04x, not %04x", r, u, out[0][patch + straight], out[1][patch + turned], entry);
    }
  check_end(c);
}

static void check_pack_patches(check *c) {
  for (int i = 0; i < (c->quick ? 60 : 300); i++)
    pack_case(c, i % 2 ? CHECK_NORMAL : (check_kind)check_pick(c, CHECK_NAN)); /* not NaN: of which any is as good */
}

/* ---- weights_backward -------------------------------------------------------------------------------------------------------- */

/* Rows [n][dim], n a multiple of 32, packed by plain C. */
static uint16_t *packed(check *c, int n, int dim, const float *x, bool right, bool turned) {
  uint16_t *straight = check_memory(c, patch_bytes(n, dim)), *other = turned ? check_memory(c, patch_bytes(n, dim)) : NULL;
  for (int r = 0; r < n; r += 32) {
    const int64_t at = sfa_half_patch_at(sfa_half_padded(dim), r, 0);
    sfa_half_kernels_scalar.pack_patches(32, dim, x + r * dim, dim, right, straight + at, other ? other + at : NULL);
  }
  return turned ? other : straight;
}

static double rounded(float x) { return of_bf16(sfa_bf16_from_f32(x)); }

static void weights_case(check *c, bool masked) {
  const int D = dims[check_pick(c, N_DIMS)], E = dims[check_pick(c, N_DIMS)], W = 32 * check_range(c, 1, 4);
  const int64_t stride = 32 * W + 1024 * check_pick(c, 3);
  const float unit = 0.5f / sqrtf((float)D);
  check_begin(c, "weights_backward", "D %d E %d W %d stride %lld masked %d", D, E, W, (long long)stride, masked);
  const float *k = check_rows(c, CHECK_NORMAL, KEYS * D), *v = check_rows(c, CHECK_NORMAL, KEYS * E);
  const float *q = check_rows(c, CHECK_NORMAL, W * D), *d_out = check_rows(c, CHECK_NORMAL, W * E);
  float *lse = check_rows(c, CHECK_NORMAL, W), *delta = check_rows(c, CHECK_NORMAL, W);
  int32_t *lo = check_memory(c, sizeof *lo * (size_t)W), *hi = check_memory(c, sizeof *hi * (size_t)W), n_always = check_pick(c, 20);
  for (int i = 0; i < W; i++) {
    lo[i] = check_range(c, -1, KEYS);
    hi[i] = check_range(c, -1, KEYS);
  }
  lse[check_pick(c, W)] = INFINITY;
  const size_t bytes = sizeof(uint16_t) * (size_t)(stride + 32 * W);
  uint16_t *out[3], *plain[3];
  for (int i = 0; i < 3; i++) {
    out[i] = check_memory(c, bytes);
    plain[i] = check_memory(c, bytes);
  }
  const uint16_t *K = packed(c, KEYS, D, k, false, false), *V = packed(c, KEYS, E, v, false, false);
  const uint16_t *Q = packed(c, W, D, q, true, false), *dO = packed(c, W, E, d_out, true, false);
  c->half->begin();
  c->half->weights_backward(D, E, K, V, W, Q, dO, unit, lse, delta, masked ? lo : NULL, hi, n_always, stride, out[0], out[1], out[2]);
  c->half->end();
  sfa_half_kernels_scalar.weights_backward(D, E, K, V, W, Q, dO, unit, lse, delta, masked ? lo : NULL, hi, n_always, stride, plain[0],
                                           plain[1], plain[2]);
  int n_apart = 0;
  for (int j = 0; j < KEYS; j++)
    for (int i = 0; i < W; i++) {
      const bool seen = !masked || ((lo[i] <= j || j < n_always) && j <= hi[i]);
      double s = 0, g = 0, s_size = 0, g_size = fabs((double)delta[i]);
      for (int u = 0; u < D; u++) {
        s += rounded(k[j * D + u]) * rounded(q[i * D + u]);
        s_size += fabs(rounded(k[j * D + u]) * rounded(q[i * D + u]));
      }
      for (int e = 0; e < E; e++) {
        g += rounded(v[j * E + e]) * rounded(d_out[i * E + e]);
        g_size += fabs(rounded(v[j * E + e]) * rounded(d_out[i * E + e]));
      }
      const double p = seen ? exp2(s * (double)unit - (double)lse[i]) : 0, d = p * (g - (double)delta[i]);
      const int64_t patch = j / 32 * stride + i / 32 * 1024;
      const uint16_t *at[] = {&out[0][patch + sfa_half_left_at(j % 32, i % 32)], &out[1][patch + sfa_half_left_at(j % 32, i % 32)],
                              &out[2][patch + sfa_half_right_at(i % 32, j % 32)]};
      const double slack = 0x1p-8 + 0x1p-20 * s_size * (double)unit; /* bf16's half place, and sums in f32 */
      if (!(fabs(of_bf16(*at[0]) - p) <= slack * p) || !(fabs(of_bf16(*at[1]) - d) <= slack * fabs(d) + 0x1p-20 * g_size * p) ||
          *at[1] != *at[2])
        check_fail(c, "key %d, query %d: weight %g, not %g; gradient %g and %g, not %g", j, i, of_bf16(*at[0]), p, of_bf16(*at[1]),
                   of_bf16(*at[2]), d);
      for (int n = 0; n < 2; n++)
        n_apart += *at[n] != plain[n][at[n] - out[n]];
    }
  if (n_apart > KEYS * W / 20) /* sums of tiles may round otherwise, here and there to the next number */
    check_fail(c, "%d of %d numbers differ from plain C", n_apart, 2 * KEYS * W);
  check_end(c);
}

static void check_weights_backward(check *c) {
  for (int i = 0; i < (c->quick ? 16 : 80); i++)
    weights_case(c, i % 2);
}

/* ---- add_product ------------------------------------------------------------------------------------------------------------- */

/* X [n_steps 32][n_i 32]^T Y [n_steps 32][n_j 32], both turned, as gradients of keys and queries are. */
static void check_add_product(check *c) {
  for (int n_case = 0; n_case < (c->quick ? 20 : 100); n_case++) {
    const int I = 32 * check_range(c, 1, 4), J = 32 * check_range(c, 1, 4), N = 32 * check_range(c, 1, 8),
              stride = J + 16 * check_pick(c, 3);
    check_begin(c, "add_product", "%d x %d over %d, stride %d", I, J, N, stride);
    const float *x = check_rows(c, CHECK_NORMAL, N * I), *y = check_rows(c, CHECK_NORMAL, N * J);
    const float *before = check_rows(c, CHECK_NORMAL, (int64_t)(I - 1) * stride + J);
    const uint16_t *A = packed(c, N, I, x, false, true), *B = packed(c, N, J, y, true, true);
    float *C = check_floats(c, (int64_t)(I - 1) * stride + J);
    memcpy(C, before, sizeof *C * (size_t)((I - 1) * stride + J));
    c->half->begin();
    c->half->add_product(I / 32, J / 32, N / 32, A, 1024, 32 * I, B, 1024, 32 * J, C, stride);
    c->half->end();
    for (int i = 0; i < I; i++)
      for (int j = 0; j < stride && i * stride + j < (I - 1) * stride + J; j++) {
        double sum = before[i * stride + j], size = fabs(sum);
        for (int n = 0; n < N && j < J; n++) {
          sum += rounded(x[n * I + i]) * rounded(y[n * J + j]);
          size += fabs(rounded(x[n * I + i]) * rounded(y[n * J + j]));
        }
        if (!(fabs((double)C[i * stride + j] - sum) <= (j < J ? 1e-6 * size : 0)))
          check_fail(c, "row %d, column %d: %.9g, not %.9g", i, j, (double)C[i * stride + j], sum);
      }
    check_end(c);
  }
}

const check_entry check_half_backward_entries[] = {{"pack_patches", check_pack_patches},
                                                   {"weights_backward", check_weights_backward},
                                                   {"add_product", check_add_product},
                                                   {"half_backward", check_backward_half},
                                                   {NULL, NULL}};
