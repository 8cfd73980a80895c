/* e4m3: every byte and every bf16 number by the definition, rows on every instruction set, and pages that others filled. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <sfa/cache.h>

#include "base/fp8.h"
#include "base/rng.h"
#include "kernel/kernel.h"
#include "unit_tools.h"

/* The number of a byte by the definition (OCP OFP8, table 1), in double. */
static double number_of(unsigned byte) {
  unsigned exponent = byte >> 3 & 15, fraction = byte & 7;
  double number = exponent ? ldexp(1 + fraction / 8.0, (int)exponent - 7) : ldexp(fraction / 8.0, -6);
  return exponent == 15 && fraction == 7 ? NAN : byte & 128 ? -number : number;
}

/* The byte nearest to x by looking at all of them; of two, the one with an even last bit. */
static unsigned nearest_to(double x) {
  unsigned best = 0;
  if (isnan(x))
    return 0x7f;
  for (unsigned byte = 1; byte < 0x7f; byte++) {
    double before = fabs(fabs(x) - number_of(best)), here = fabs(fabs(x) - number_of(byte));
    if (here < before || (here == before && byte % 2 == 0))
      best = byte;
  }
  return best | (signbit(x) ? 128 : 0);
}

static void widening_is_exact(void **state) {
  (void)state;
  double before = -1;
  for (unsigned byte = 0; byte < 256; byte++) {
    double want = number_of(byte);
    float x = sfa_f32_from_e4m3((uint8_t)byte);
    assert_true(isnan(want) ? isnan(x) : (double)x == want);
    assert_int_equal(signbit(x) != 0, byte >> 7);
    assert_int_equal(sfa_e4m3_from_f32(x), byte); /* there and back */
    if (byte < 0x7f) {
      assert_true(want > before);
      before = want;
    }
  }
  assert_true(before == 448);
}

static void check_narrow(float x) {
  unsigned got = sfa_e4m3_from_f32(x), want = nearest_to(x);
  if (isnan(x) ? (got & 127) != 127 : got != want)
    fail_msg("%a gives %02x, nearest even is %02x", (double)x, got, want);
}

/* Every bf16 number, NaN and inf among them; between two neighbours the middle, and one step to both sides of it. */
static void narrowing_rounds_to_nearest_even(void **state) {
  (void)state;
  for (uint32_t bits = 0; bits < 65536; bits++)
    check_narrow(sfa_f32_from_bf16((uint16_t)bits));
  for (unsigned byte = 0; byte < 0x7f; byte++) {
    float middle = (float)(byte == 0x7e ? 464 : (number_of(byte) + number_of(byte + 1)) / 2);
    float around[] = {nextafterf(middle, 0), middle, nextafterf(middle, INFINITY)};
    for (size_t i = 0; i < 3; i++) {
      check_narrow(around[i]);
      check_narrow(-around[i]);
    }
  }
  assert_int_equal(sfa_e4m3_from_f32(480), 0x7e);
  assert_int_equal(sfa_e4m3_from_f32(-INFINITY), 0xfe);
  assert_int_equal(sfa_e4m3_from_f32(0x1p-10f), 0); /* half of the least: even */
}

enum { N = 40, MOST_ISA = SFA_ISA_AMX };

static const sfa_kernels *kernels_of(int isa) { return isa <= (int)sfa_isa_best() ? sfa_kernel_select((sfa_isa)isa) : NULL; }

/* Rows of any size: within 2^-4 of a number, or half the least number and the scale, whichever is more; and never beyond 448 scales. */
static void rows_are_within_their_bound(void **state) {
  (void)state;
  sfa_rng rng = {5};
  for (int isa = SFA_ISA_SCALAR; isa <= MOST_ISA; isa++)
    for (int power = -60; power <= 16 && kernels_of(isa); power++)
      for (int spread = 0; spread <= 12; spread += 4) { /* octaves between numbers of a row */
        float x[N], back[N];
        uint8_t stored[N];
        uint16_t scale;
        for (int i = 0; i < N; i++)
          x[i] = ldexpf((float)sfa_rng_normal(&rng), power - (spread ? (int)(sfa_rng_next(&rng) % (uint64_t)(2 * spread)) : 0));
        for (int i = 0; i < N; i++)
          x[i] = fminf(fmaxf(x[i], -65504), 65504);
        assert_int_equal(kernels_of(isa)->quantize_e4m3(1, N, x, N, stored, N, &scale), 0);
        kernels_of(isa)->load_rows(1, N, SFA_E4M3, stored, N, &scale, back, N);
        double unit = sfa_f32_from_f16(scale), largest = 0;
        for (int i = 0; i < N; i++) {
          double limit = fmax(0x1p-4 * fabs((double)x[i]), 0x1p-10 * unit);
          largest = fmax(largest, fabs((double)x[i]));
          assert_true(fabs((double)back[i] - (double)x[i]) <= limit);
        }
        assert_true(largest <= 448 * unit);
        assert_true(unit == 0x1p-24 || 448 * unit / 2 < largest); /* no larger than it must be */
      }
}

/* Numbers that are e4m3 already, times a power of two, stay what they are; those below the new least apart. */
static void e4m3_rows_stay(void **state) {
  (void)state;
  for (int isa = SFA_ISA_SCALAR; isa <= MOST_ISA; isa++)
    for (int power = -15; power <= 7 && kernels_of(isa); power++) {
      float x[256], back[256];
      uint8_t stored[256];
      uint16_t scale;
      int n = 0;
      for (unsigned byte = 0; byte < 256; byte++)
        if (!isnan(number_of(byte)))
          x[n++] = (float)ldexp(number_of(byte), power);
      for (int least = 0; least < n; least += 16) { /* rows of which the largest number differs */
        int count = 127 - least > 8 ? 127 - least : 8;
        assert_int_equal(kernels_of(isa)->quantize_e4m3(1, count, x, n, stored, n, &scale), 0);
        kernels_of(isa)->load_rows(1, count, SFA_E4M3, stored, n, &scale, back, n);
        assert_memory_equal(back, x, (size_t)count * sizeof *x);
      }
    }
}

static void odd_rows(void **state) {
  (void)state;
  static const float odd[] = {NAN, -NAN, INFINITY, -INFINITY};
  for (int isa = SFA_ISA_SCALAR; isa <= MOST_ISA; isa++) {
    const sfa_kernels *kernels = kernels_of(isa);
    for (size_t i = 0; i < sizeof odd / sizeof *odd && kernels; i++) {
      float x[2 * N] = {0};
      uint8_t stored[2 * N];
      uint16_t scales[2];
      x[N + i * 9] = odd[i];
      assert_int_equal(kernels->quantize_e4m3(2, N, x, N, stored, N, scales), 0);
      assert_int_equal(scales[0], 0);
      assert_int_equal(scales[1], 0x7e00); /* as int8 rows have it */
      for (int j = 0; j < 2 * N; j++)
        assert_int_equal(stored[j], 0);
      x[N + i * 9] = 0x1.cp23f; /* 448 * 2^15, the most that there is a scale for */
      assert_int_equal(kernels->quantize_e4m3(2, N, x, N, stored, N, scales), 0);
      assert_int_equal(stored[N + i * 9], 0x7e);
      x[N + i * 9] = nextafterf(0x1.cp23f, INFINITY);
      assert_int_equal(kernels->quantize_e4m3(2, N, x, N, stored, N, scales), 2);
    }
  }
}

/* ---- Pages that others filled --------------------------------------------------------------------------------------------------- */

enum { D = 8, E = 40, LEN = 70, AT = D + E }; /* one head, dense f32 keys */

/* One attention over pages whose values are these bytes and scales; every instruction set, few queries and many: the same bits. */
static void attend(const uint8_t *bytes, const uint16_t *scales, int32_t n_queries, const float *q, float *out) {
  static const sfa_page_options page = {
      .struct_size = sizeof page, .n_kv_heads = 1, .head_dim = D, .head_dim_v = E, .k_dtype = SFA_F32, .v_dtype = SFA_E4M3};
  static const int32_t table[] = {1, 0}, len = LEN;
  size_t page_bytes = sfa_page_bytes(&page), keys_at = 64, values_at = keys_at + 64 * D * sizeof(float), scales_at = values_at + 64 * E;
  unsigned char *pool = aligned_alloc(64, 2 * page_bytes);
  assert_non_null(pool);
  assert_int_equal(page_bytes, scales_at + 64 * sizeof(uint16_t));
  memset(pool, 0xff, 2 * page_bytes);
  for (int j = 0; j < LEN; j++) {
    unsigned char *at = pool + (size_t)table[j / 64] * page_bytes;
    for (int u = 0; u < D; u++)
      ((float *)(void *)(at + keys_at))[j % 64 * D + u] = sinf((float)(j * D + u));
    memcpy(at + values_at + j % 64 * E, bytes + j * E, E);
    ((uint16_t *)(void *)(at + scales_at))[j % 64] = scales[j];
  }
  for (int isa = SFA_ISA_SCALAR; isa <= (int)sfa_isa_best(); isa++) {
    sfa_context *ctx = new_context(2, (sfa_isa)isa);
    sfa_attention_options o = {.struct_size = sizeof o,
                               .n_heads = 1,
                               .head_dim = D,
                               .head_dim_v = E,
                               .n_sequences = 1,
                               .max_seqlen_q = n_queries,
                               .max_seqlen_k = LEN,
                               .causal = 1,
                               .precision = SFA_PRECISION_F32};
    sfa_attention_plan *plan;
    assert_int_equal(sfa_attention_plan_create(ctx, &o, &plan), SFA_OK);
    float *own = calloc((size_t)n_queries * E, sizeof *own);
    sfa_attention_args args = {.struct_size = sizeof args, .q.data = q, .out = isa == SFA_ISA_SCALAR ? out : own};
    args.workspace = aligned_alloc(64, (sfa_attention_workspace_bytes(plan) + 63) / 64 * 64);
    sfa_paged_kv kv = {
        .struct_size = sizeof kv, .page = page, .pool = pool, .n_pages = 2, .block_table = table, .max_pages = 2, .cache_seqlens = &len};
    if (sfa_attention_run_paged(plan, &args, &kv) != SFA_OK)
      fail_msg("%s", sfa_context_error(ctx));
    for (int i = 0; isa != SFA_ISA_SCALAR && i < n_queries * E; i++) /* any NaN for any NaN */
      assert_true(isnan(out[i]) ? isnan(own[i]) : memcmp(&own[i], &out[i], sizeof *out) == 0);
    free(args.workspace), free(own);
    sfa_attention_plan_destroy(plan);
    sfa_context_destroy(ctx);
  }
  free(pool);
}

/* Any f16 scale is read, and any byte; NaN reaches its own column of the rows that see its key, and no other number. */
static void pages_of_others(void **state) {
  (void)state;
  static uint8_t bytes[LEN * E];
  static uint16_t scales[LEN];
  static float q[LEN * D], out[LEN * E], again[LEN * E];
  sfa_rng rng = {11};
  for (int i = 0; i < LEN * E; i++)
    bytes[i] = (uint8_t)(sfa_rng_next(&rng) % 127 | (sfa_rng_next(&rng) & 128));
  for (int i = 0; i < LEN; i++)
    scales[i] = (uint16_t)(sfa_rng_next(&rng) % 0x5c00); /* 0 to 255, subnormal ones too */
  for (int i = 0; i < LEN * D; i++)
    q[i] = (float)sfa_rng_normal(&rng);
  for (int32_t n = 1; n <= LEN; n += LEN - 1) {
    const float *rows = q + (LEN - n) * D;
    attend(bytes, scales, n, rows, out);
    for (int t = 0; t < n; t++) { /* the definition, in double */
      double weights[LEN], sum = 0, expected[E] = {0}, largest = 0;
      for (int j = 0; j <= LEN - n + t; j++) {
        double s = 0;
        for (int u = 0; u < D; u++)
          s += (double)rows[t * D + u] * (double)sinf((float)(j * D + u));
        sum += weights[j] = exp(s / sqrt(D));
        for (int e = 0; e < E; e++) {
          double v = number_of(bytes[j * E + e]) * (double)sfa_f32_from_f16(scales[j]);
          expected[e] += weights[j] * v;
          largest = fmax(largest, fabs(v));
        }
      }
      for (int e = 0; e < E; e++)
        assert_true(fabs(expected[e] / sum - (double)out[t * E + e]) <= 1e-5 * largest);
    }
    static const int keys[] = {0, 33, 66}, columns[] = {0, 17, 39};
    for (int i = 0; i < 3; i++) {
      uint8_t *byte = &bytes[keys[i] * E + columns[i]], was = *byte;
      *byte = i % 2 ? 0x7f : 0xff;
      attend(bytes, scales, n, rows, again);
      for (int t = 0; t < n; t++)
        for (int e = 0; e < E; e++)
          if (e == columns[i] && keys[i] <= LEN - n + t)
            assert_true(isnan(again[t * E + e]));
          else
            assert_memory_equal(&again[t * E + e], &out[t * E + e], sizeof *out);
      *byte = was;
    }
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(widening_is_exact),
                                     cmocka_unit_test(narrowing_rounds_to_nearest_even),
                                     cmocka_unit_test(rows_are_within_their_bound),
                                     cmocka_unit_test(e4m3_rows_stay),
                                     cmocka_unit_test(odd_rows),
                                     cmocka_unit_test(pages_of_others)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
