/* 16-bit attention through the public API: as near to the truth as a dense bf16 attention of the same operands, masks exact, what 16 bits
 * cannot hold as in f32. Runs the definition in plain C, and AMX where the machine has it. */
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <sfa/attention.h>
#include <sfa/cache.h>

#include "base/half.h"
#include "kernel/kernel_half.h"
#include "oracle_call.h"
#include "unit_tools.h"

/* ---- Tools ---------------------------------------------------------------------------------------------------------------------- */

static const sfa_isa isas[] = {SFA_ISA_SCALAR, SFA_ISA_AMX};
enum { N_ISAS = sizeof isas / sizeof *isas };

static bool has(sfa_isa isa) { return sfa_half_kernel_select(isa) != NULL; }

/* n normal numbers times gain, of a storage type's values. */
static float *rounded_normals(uint64_t seed, int64_t n, float gain, int storage) {
  float *x = normals(seed, n);
  for (int64_t i = 0; i < n; i++)
    x[i] *= gain;
  oracle_round(x, (int)n, storage);
  return x;
}

/* A call and its inputs. */
typedef struct call {
  sfa_attention_options o;
  sfa_attention_args a;
  int64_t n_q, n_k; /* tokens of all sequences */
  float *q, *k, *v, *out, *lse;
  uint16_t *q_bf16; /* what is passed where the inputs are bf16 */
} call;

static call new_call(sfa_attention_options o, float gain, int storage, uint64_t seed) {
  o.struct_size = sizeof o;
  o.n_sequences = o.n_sequences ? o.n_sequences : 1;
  o.n_kv_heads = o.n_kv_heads ? o.n_kv_heads : o.n_heads;
  o.head_dim_v = o.head_dim_v ? o.head_dim_v : o.head_dim;
  call c = {.o = o, .n_q = o.n_sequences * o.max_seqlen_q, .n_k = o.n_sequences * o.max_seqlen_k};
  c.q = rounded_normals(seed, c.n_q * o.n_heads * o.head_dim, gain, storage);
  c.k = rounded_normals(seed + 1, c.n_k * o.n_kv_heads * o.head_dim, 1, storage);
  c.v = rounded_normals(seed + 2, c.n_k * o.n_kv_heads * o.head_dim_v, 1, storage);
  c.out = memory((size_t)(c.n_q * o.n_heads * o.head_dim_v) * sizeof(float));
  c.lse = memory((size_t)(c.n_q * o.n_heads) * sizeof(float));
  c.a = (sfa_attention_args){.struct_size = sizeof c.a, .q.data = c.q, .k.data = c.k, .v.data = c.v, .out = c.out, .lse = c.lse};
  if (storage == ORACLE_BF16) {
    int64_t n = c.n_q * o.n_heads * o.head_dim;
    c.q_bf16 = memory((size_t)n * sizeof *c.q_bf16);
    for (int64_t i = 0; i < n; i++)
      c.q_bf16[i] = sfa_bf16_from_f32(c.q[i]);
    c.a.q = (sfa_rows){.data = c.q_bf16, .dtype = SFA_BF16};
  }
  return c;
}

static void free_call(call *c) {
  free(c->q_bf16);
  free(c->q);
  free(c->k);
  free(c->v);
  free(c->out);
  free(c->lse);
}

static sfa_status run(sfa_context *ctx, call *c) {
  sfa_attention_plan *plan;
  sfa_status status = sfa_attention_plan_create(ctx, &c->o, &plan);
  if (status != SFA_OK)
    return status;
  size_t bytes = sfa_attention_workspace_bytes(plan);
  unsigned char *workspace = memory(bytes);
  c->a.workspace = workspace;
  status = sfa_attention_run(plan, &c->a);
  for (int i = 0; i < 64; i++) /* nothing beyond the bytes that were asked for */
    assert_int_equal(workspace[(bytes + 63) / 64 * 64 + (size_t)i], 0xff);
  free(workspace);
  sfa_attention_plan_destroy(plan);
  return status;
}

static void run_on(sfa_isa isa, int32_t n_threads, call *c) {
  sfa_context *ctx = new_context(n_threads, isa);
  if (run(ctx, c) != SFA_OK)
    fail_msg("%s", sfa_context_error(ctx));
  sfa_context_destroy(ctx);
}

static size_t out_bytes(const call *c) { return (size_t)(c->n_q * c->o.n_heads * c->o.head_dim_v) * sizeof(float); }
static size_t lse_bytes(const call *c) { return (size_t)(c->n_q * c->o.n_heads) * sizeof(float); }

/* ---- The truth, and how near a dense bf16 attention comes to it --------------------------------------------------------- */

/* Rows [n][d] with the k largest features kept (0: all), rounded to a storage type. */
static float *stored(const float *x, int64_t n, int d, int k, int storage) {
  float *out = memory((size_t)(n * d + 1) * sizeof *out);
  int ids[256];
  for (int64_t i = 0; i < n; i++) {
    memcpy(out + i * d, x + i * d, (size_t)d * sizeof *x);
    if (k > 0 && k < d) {
      memset(out + i * d, 0, (size_t)d * sizeof *x);
      oracle_topk(x + i * d, d, k, ids);
      for (int u = 0; u < k; u++)
        out[i * d + ids[u]] = x[i * d + ids[u]];
    }
    oracle_round(out + i * d, d, storage);
  }
  return out;
}

static float bf16(float x) { return sfa_f32_from_bf16(sfa_bf16_from_f32(x)); }

/* Operands and weights rounded to bf16, sums in f32. Weights come in units of a row's largest times `unit`: which ones is luck, and 1,
 * where that weight is exact, the best of it. */
static void attend_in_bf16(const oracle_problem *p, float unit, float *out) {
  int d = p->head_dim, e_dim = p->head_dim_v, group = p->n_heads / p->n_kv_heads;
  int n_q = p->n_queries * p->n_heads, n_k = p->n_keys * p->n_kv_heads;
  float *q = stored(p->q, n_q, d, p->k_q, ORACLE_F32), *k = stored(p->k, n_k, d, p->k_k, p->k_storage),
        *v = stored(p->v, n_k, e_dim, 0, p->v_storage);
  oracle_round(q, n_q * d, ORACLE_BF16);
  oracle_round(k, n_k * d, ORACLE_BF16);
  oracle_round(v, n_k * e_dim, ORACLE_BF16);
  float scale = p->softmax_scale != 0 ? (float)p->softmax_scale : 1 / sqrtf((float)d), *s = memory((size_t)(p->n_keys + 1) * sizeof *s);
  for (int64_t row = 0; row < n_q; row++) {
    int64_t t = row / p->n_heads, g = row % p->n_heads / group;
    float most = -INFINITY, sum = 0;
    for (int64_t j = 0; j < p->n_keys; j++) {
      s[j] = 0;
      for (int u = 0; u < d; u++)
        s[j] += q[row * d + u] * k[(j * p->n_kv_heads + g) * d + u];
      s[j] = oracle_sees(p, t, j) ? s[j] * scale : -INFINITY;
      most = fmaxf(most, s[j]);
    }
    if (p->sink_logit) {
      most = fmaxf(most, p->sink_logit[row % p->n_heads]);
      sum = unit * expf(p->sink_logit[row % p->n_heads] - most);
    }
    memset(out + row * e_dim, 0, (size_t)e_dim * sizeof *out);
    for (int64_t j = 0; j < p->n_keys; j++) {
      float weight = s[j] == -INFINITY ? 0 : bf16(unit * expf(s[j] - most));
      sum += weight;
      for (int e = 0; e < e_dim; e++)
        out[row * e_dim + e] += weight * v[(j * p->n_kv_heads + g) * e_dim + e];
    }
    for (int e = 0; e < e_dim; e++)
      out[row * e_dim + e] /= sum > 0 ? sum : 1;
  }
  free(q);
  free(k);
  free(v);
  free(s);
}

/* Largest and mean square errors of both. */
typedef struct errors {
  double largest, squares, plain_largest, plain_squares, lse;
} errors;

/* The call's first sequence (its only one). */
static errors errors_of(const call *c) {
  const sfa_attention_options *o = &c->o;
  int64_t n = c->n_q * o->n_heads, size = n * o->head_dim_v;
  double *truth = malloc((size_t)(size + 1) * sizeof *truth), *lse = malloc((size_t)(n + 1) * sizeof *lse);
  float *plain = memory((size_t)(size + 1) * sizeof *plain);
  sfa_attention_args rows = c->a; /* in f32, whatever the call takes */
  rows.q.data = c->q, rows.k.data = c->k, rows.v.data = c->v;
  int64_t q0, k0;
  const oracle_problem p = oracle_of(o, &rows, 0, &q0, &k0);
  oracle_attention_f64(&p, truth, lse);
  errors e = {0};
  for (int64_t i = 0; i < size; i++) {
    double mine = fabs(c->out[i] - truth[i]);
    assert_true(mine < INFINITY); /* not NaN */
    e.largest = fmax(e.largest, mine);
    e.squares += mine * mine / (double)size;
  }
  static const float units[] = {1, 0.7f};
  for (int u = 0; u < 2; u++) {
    double squares = 0;
    attend_in_bf16(&p, units[u], plain);
    for (int64_t i = 0; i < size; i++) {
      double its = fabs(plain[i] - truth[i]);
      e.plain_largest = fmax(e.plain_largest, its);
      squares += its * its / (double)size;
    }
    e.plain_squares = fmax(e.plain_squares, squares);
  }
  for (int64_t i = 0; i < n; i++) {
    if (lse[i] == -INFINITY)
      assert_true(c->lse[i] == -INFINITY);
    else
      e.lse = fmax(e.lse, fabs((double)c->lse[i] - lse[i]));
  }
  free(truth);
  free(lse);
  free(plain);
  return e;
}

/* Twice the errors of the dense bf16 attention; a slack for calls with so few keys that it makes none. */
static void judge(const call *c, sfa_isa isa, const char *what) {
  errors e = errors_of(c);
  bool good = e.largest <= 2 * e.plain_largest + 0x1p-9 && sqrt(e.squares) <= 2 * sqrt(e.plain_squares) + 0x1p-11;
  if (!good)
    fail_msg("%s, %s %s: D %d E %d k %d %d: error %.2e, rms %.2e; dense bf16 %.2e, %.2e", what, sfa_isa_name(isa),
             c->o.policy == SFA_POLICY_HALF_CODES ? "codes" : "dense", c->o.head_dim, c->o.head_dim_v, c->o.k_q, c->o.k_k, e.largest,
             sqrt(e.squares), e.plain_largest, sqrt(e.plain_squares));
}

static void both_policies(sfa_attention_options o, float gain, int storage, uint64_t seed, const float *sink_logit, const char *what) {
  for (int policy = SFA_POLICY_HALF_CODES; policy <= SFA_POLICY_HALF_DENSE; policy++)
    for (int i = 0; i < N_ISAS; i++) {
      if (!has(isas[i]) || (policy == SFA_POLICY_HALF_CODES && (o.k_k == 0 || o.k_k == o.head_dim)))
        continue;
      o.policy = (sfa_policy)policy;
      o.k_dtype = o.k_dtype ? o.k_dtype : SFA_F32;
      o.v_dtype = o.v_dtype ? o.v_dtype : SFA_F32;
      call c = new_call(o, gain, storage, seed);
      c.a.sink_logit = sink_logit;
      run_on(isas[i], 2, &c);
      judge(&c, isas[i], what);
      free_call(&c);
    }
}

/* ---- Tests -------------------------------------------------------------------------------------------------------------------------- */

static void test_shapes(void **state) {
  (void)state;
  static const int dims[][2] = {{8, 8}, {24, 40}, {64, 64}, {72, 24}, {128, 128}, {136, 96}, {256, 64}};
  for (size_t i = 0; i < sizeof dims / sizeof *dims; i++)
    for (int kept = 0; kept < 2; kept++) {
      int D = dims[i][0];
      both_policies((sfa_attention_options){.n_heads = 1,
                                            .head_dim = D,
                                            .head_dim_v = dims[i][1],
                                            .max_seqlen_q = 70 + 3 * (int)i,
                                            .max_seqlen_k = 290 + 5 * (int)i,
                                            .causal = (int)i % 2,
                                            .k_q = kept ? D < 16 ? 3 : 8 : 0,
                                            .k_k = D < 16 ? 3 : 8 + 3 * kept},
                    1, ORACLE_F32, 10 + i, NULL, "shapes");
    }
}

static void test_masks(void **state) {
  (void)state;
  const float sink_logit[4] = {0.5f, -INFINITY, 2, -1};
  for (int i = 0; i < 12; i++)
    both_policies((sfa_attention_options){.n_heads = 4,
                                          .n_kv_heads = i % 3 == 0 ? 4 : 2,
                                          .head_dim = 64,
                                          .max_seqlen_q = 41 + 13 * (i % 5),
                                          .max_seqlen_k = i % 4 == 3 ? 40 : 300 + 64 * (i % 3), /* with T > S some rows see nothing */
                                          .causal = i % 2,
                                          .has_window = i % 4 > 0,
                                          .window_size = {i % 4 == 2 ? -1 : 30 + 50 * (i % 3), i % 3 == 1 ? -1 : 7},
                                          .n_sink_tokens = i % 3 == 2 ? 5 + 60 * (i % 2) : 0,
                                          .k_q = 8,
                                          .k_k = 8},
                  1, ORACLE_F32, 100 + (uint64_t)i, i % 2 ? sink_logit : NULL, "masks");
}

/* Chunks that nobody sees are not packed: the bits are those of a call without their keys (and 16-bit ones, which attention that met what
 * was not packed would not have). The first query sees key 1025 and those behind, 1024, 1023, 1022; a chunk has 256. */
static void test_far_window(void **state) {
  (void)state;
  enum { G = 2, D = 64, S = 1280 };
  for (int i = 0; i < 8; i++)
    for (int n = 0; n < N_ISAS; n++) {
      if (!has(isas[n]))
        continue;
      call c = new_call((sfa_attention_options){.n_heads = 4,
                                                .n_kv_heads = G,
                                                .head_dim = D,
                                                .max_seqlen_q = 9,
                                                .max_seqlen_k = S,
                                                .causal = 1,
                                                .has_window = 1,
                                                .window_size = {246 + i % 4, 0},
                                                .k_q = 8,
                                                .k_k = 8,
                                                .k_dtype = SFA_F32,
                                                .v_dtype = SFA_F32,
                                                .policy = i < 4 ? SFA_POLICY_HALF_CODES : SFA_POLICY_HALF_DENSE},
                        1, ORACLE_F32, 200 + (uint64_t)i);
      run_on(isas[n], 2, &c);
      judge(&c, isas[n], "a window far behind the first key");
      assert_true(errors_of(&c).largest > 1e-5); /* of 16 bits */
      float *out = c.out;
      const int64_t left_out = i % 4 < 2 ? 1024 : 768;
      c.out = c.a.out = memory(out_bytes(&c));
      c.o.max_seqlen_k = S - left_out;
      c.a.k.data = c.k + left_out * G * D;
      c.a.v.data = c.v + left_out * G * D;
      run_on(isas[n], 2, &c);
      assert_memory_equal(out, c.out, out_bytes(&c));
      free(out);
      free_call(&c);
    }
}

static void test_storage(void **state) {
  (void)state;
  for (int k_dtype = SFA_F32; k_dtype <= SFA_I8; k_dtype++)
    for (int v_dtype = SFA_F32; v_dtype <= SFA_I8; v_dtype++)
      both_policies((sfa_attention_options){.n_heads = 2,
                                            .n_kv_heads = 1,
                                            .head_dim = 64,
                                            .max_seqlen_q = 30,
                                            .max_seqlen_k = 130,
                                            .causal = 1,
                                            .k_q = k_dtype % 2 ? 0 : 8,
                                            .k_k = 8,
                                            .k_dtype = (sfa_dtype)k_dtype,
                                            .v_dtype = (sfa_dtype)v_dtype},
                    1, ORACLE_F32, 200, NULL, "storage");
}

/* Larger and larger scores: near, far, and beyond what f16 sums may do with operands that are bf16. */
static void test_gains(void **state) {
  (void)state;
  static const float gains[] = {1, 3, 8, 60, 400};
  for (size_t i = 0; i < sizeof gains / sizeof *gains; i++)
    for (int storage = ORACLE_F32; storage <= ORACLE_BF16; storage++)
      for (int D = 64; D <= 128; D *= 2)
        both_policies((sfa_attention_options){.n_heads = 1,
                                              .head_dim = D,
                                              .max_seqlen_q = 64,
                                              .max_seqlen_k = 400,
                                              .k_q = 8,
                                              .k_k = 8,
                                              .k_dtype = storage == ORACLE_BF16 ? SFA_BF16 : SFA_F32},
                      gains[i], storage, 300 + i, NULL, "gains");
}

/* Scores that rise with the position: the shift moves again and again, and the last key outweighs all others. */
static void test_rising_scores(void **state) {
  (void)state;
  enum { D = 64, N = 600 };
  for (int policy = SFA_POLICY_HALF_CODES; policy <= SFA_POLICY_HALF_DENSE; policy++)
    for (int i = 0; i < N_ISAS && has(isas[i]); i++) {
      call c = new_call((sfa_attention_options){.n_heads = 1,
                                                .head_dim = D,
                                                .max_seqlen_q = N,
                                                .max_seqlen_k = N,
                                                .causal = 1,
                                                .k_q = 8,
                                                .k_k = 8,
                                                .softmax_scale = 1,
                                                .policy = (sfa_policy)policy},
                        0, ORACLE_F32, 400);
      for (int t = 0; t < N; t++) {
        c.q[t * D + 5] = 8;
        c.k[t * D + 5] = (float)(t / 8); /* a step of 8 nats every 8 keys, up to 600 */
      }
      run_on(isas[i], 1, &c);
      for (int t = 64; t < N; t++) /* the mean of the keys of the last step */
        for (int e = 0; e < D; e++) {
          float mean = 0;
          for (int j = t / 8 * 8; j <= t; j++)
            mean += c.v[j * D + e] / (float)(t % 8 + 1);
          assert_true(fabsf(c.out[t * D + e] - mean) < 0.03f);
        }
      free_call(&c);
    }
}

/* inf and NaN, scores beyond 16 bits, huge values: the bits of the f32 path in every row that can see them. */
static void test_beyond_16_bits(void **state) {
  (void)state;
  static const struct {
    int side; /* q, k, v */
    float x;
  } planted[] = {{0, INFINITY}, {0, NAN}, {1, INFINITY}, {1, NAN}, {2, INFINITY}, {2, NAN}, {0, 1e30f}, {1, 1e30f}, {2, 1e38f}};
  enum { D = 64, N = 300 };
  for (size_t i = 0; i < sizeof planted / sizeof *planted; i++)
    for (int policy = SFA_POLICY_HALF_CODES; policy <= SFA_POLICY_HALF_DENSE; policy++)
      for (int isa = 0; isa < N_ISAS && has(isas[isa]); isa++) {
        call c = new_call((sfa_attention_options){.n_heads = 1,
                                                  .head_dim = D,
                                                  .max_seqlen_q = N,
                                                  .max_seqlen_k = N,
                                                  .causal = 1,
                                                  .k_q = 8,
                                                  .k_k = 8,
                                                  .policy = (sfa_policy)policy},
                          1, ORACLE_F32, 500);
        float *at = planted[i].side == 0 ? c.q : planted[i].side == 1 ? c.k : c.v;
        at[270 * D + 11] = planted[i].x;
        run_on(isas[isa], 1, &c);
        float *half = memory(out_bytes(&c));
        memcpy(half, c.out, out_bytes(&c));
        c.o.policy = SFA_POLICY_TILES;
        run_on(isas[isa], 1, &c);
        assert_memory_equal(half + 270 * D, c.out + 270 * D, 30 * D * sizeof(float));
        for (int r = 0; r < 256 * D; r++) /* block 0 sees nothing of it */
          assert_true(fabsf(half[r] - c.out[r]) < 0.05f);
        free(half);
        free_call(&c);
      }
}

static void test_threads_and_batch(void **state) {
  (void)state;
  for (int policy = SFA_POLICY_HALF_CODES; policy <= SFA_POLICY_HALF_DENSE; policy++)
    for (int i = 0; i < N_ISAS && has(isas[i]); i++) {
      sfa_attention_options o = {.n_heads = 4,
                                 .n_kv_heads = 2,
                                 .head_dim = 128,
                                 .max_seqlen_q = 150,
                                 .max_seqlen_k = 150,
                                 .causal = 1,
                                 .k_q = 8,
                                 .k_k = 8,
                                 .n_sequences = 3,
                                 .policy = (sfa_policy)policy};
      const int32_t cu[] = {0, 150, 150, 270};
      call c = new_call(o, 1, ORACLE_F32, 600);
      c.a.cu_seqlens_q = c.a.cu_seqlens_k = cu;
      run_on(isas[i], 1, &c);
      float *one = memory(out_bytes(&c));
      memcpy(one, c.out, out_bytes(&c));
      memset(c.out, 0xff, out_bytes(&c));
      memset(c.lse, 0xff, lse_bytes(&c));
      run_on(isas[i], 3, &c);
      assert_memory_equal(one, c.out, 270 * 4 * 128 * sizeof(float));
      /* the last sequence alone */
      call last = c;
      last.o.n_sequences = 1;
      last.o.max_seqlen_q = last.o.max_seqlen_k = 120;
      last.a.cu_seqlens_q = last.a.cu_seqlens_k = NULL;
      last.a.q.data = c.q + 150 * 4 * 128;
      last.a.k.data = c.k + 150 * 2 * 128;
      last.a.v.data = c.v + 150 * 2 * 128;
      last.a.out = memory(out_bytes(&c));
      run_on(isas[i], 2, &last);
      assert_memory_equal(one + 150 * 4 * 128, last.a.out, 120 * 4 * 128 * sizeof(float));
      free(last.a.out);
      free(one);
      free_call(&c);
    }
}

/* Keys that come as codes with all features are dense keys, whose plan knows no codes: the bits of the same keys as rows. */
static void test_codes_of_all_features(void **state) {
  (void)state;
  enum { D = 64, N = 150, T = 40 };
  for (int dtype = SFA_F32; dtype <= SFA_I8; dtype++)
    for (int i = 0; i < N_ISAS; i++) {
      if (!has(isas[i]))
        continue;
      call c = new_call((sfa_attention_options){.n_heads = 2,
                                                .head_dim = D,
                                                .max_seqlen_q = T,
                                                .max_seqlen_k = N,
                                                .causal = 1,
                                                .k_q = 8,
                                                .k_k = D,
                                                .k_dtype = (sfa_dtype)dtype,
                                                .v_dtype = SFA_F32,
                                                .policy = SFA_POLICY_HALF_DENSE},
                        1, ORACLE_F32, 800);
      run_on(isas[i], 2, &c);
      judge(&c, isas[i], "keys as rows");
      float *rows = memory(out_bytes(&c));
      memcpy(rows, c.out, out_bytes(&c));
      sfa_context *ctx = new_context(2, isas[i]);
      sfa_codes codes;
      void *bytes = memory(sfa_codes_bytes(c.n_k * c.o.n_kv_heads, D, D, (sfa_dtype)dtype));
      assert_int_equal(sfa_codes_place(ctx, c.n_k * c.o.n_kv_heads, D, D, (sfa_dtype)dtype, bytes, &codes), SFA_OK);
      assert_int_equal(sfa_codes_select(ctx, c.k, SFA_F32, 0, &codes), SFA_OK);
      c.a.k = (sfa_rows){0};
      c.a.k_codes = &codes;
      memset(c.out, 0xff, out_bytes(&c));
      assert_int_equal(run(ctx, &c), SFA_OK);
      assert_memory_equal(rows, c.out, out_bytes(&c));
      sfa_context_destroy(ctx);
      free(bytes);
      free(rows);
      free_call(&c);
    }
}

/* Over a cache in pages, every type of values; against the f32 way over the same cache. */
static void test_cache(void **state) {
  (void)state;
  enum { D = 64, N = 330, T = 50 };
  static const int32_t kept = 8;
  for (int v_dtype = SFA_F32; v_dtype <= SFA_E4M3; v_dtype++)
    for (int i = 0; i < N_ISAS && has(isas[i]); i++) {
      sfa_context *ctx = new_context(2, isas[i]);
      sfa_cache_options options = {.struct_size = sizeof options,
                                   .n_layers = 1,
                                   .n_kv_heads = 1,
                                   .head_dim = D,
                                   .k = &kept,
                                   .k_dtype = SFA_I8,
                                   .v_dtype = (sfa_dtype)v_dtype,
                                   .n_sequences = 1};
      sfa_cache *cache;
      assert_int_equal(sfa_cache_create(ctx, &options, &cache), SFA_OK);
      call c = new_call(
          (sfa_attention_options){.n_heads = 1, .head_dim = D, .max_seqlen_q = T, .max_seqlen_k = N, .causal = 1, .k_q = kept, .k_k = kept},
          1, ORACLE_F32, 700);
      sfa_rows k = {.data = c.k}, v = {.data = c.v};
      assert_int_equal(sfa_cache_append(cache, 0, 0, N, &k, &v), SFA_OK);
      float *out[3];
      static const sfa_policy policies[] = {SFA_POLICY_TILES, SFA_POLICY_HALF_CODES, SFA_POLICY_HALF_DENSE};
      for (int p = 0; p < 3; p++) {
        sfa_attention_plan *plan;
        c.o.policy = policies[p];
        assert_int_equal(sfa_attention_plan_create(ctx, &c.o, &plan), SFA_OK);
        c.a.workspace = memory(sfa_attention_workspace_bytes(plan));
        c.a.out = out[p] = memory(out_bytes(&c));
        if (sfa_attention_run_cached(plan, &c.a, cache, 0, (const int32_t[]){0}) != SFA_OK)
          fail_msg("%s", sfa_context_error(ctx));
        free(c.a.workspace);
        sfa_attention_plan_destroy(plan);
        for (int r = 0; p && r < T * D; r++)
          assert_true(fabsf(out[p][r] - out[0][r]) < 0.01f);
      }
      for (int p = 0; p < 3; p++)
        free(out[p]);
      free_call(&c);
      sfa_cache_destroy(cache);
      sfa_context_destroy(ctx);
    }
}

static void test_refusals(void **state) {
  (void)state;
  sfa_context *scalar = new_context(1, SFA_ISA_SCALAR);
  sfa_attention_options fine = {
      .n_heads = 1, .head_dim = 64, .max_seqlen_q = 4, .max_seqlen_k = 4, .k_q = 8, .k_k = 8, .policy = SFA_POLICY_HALF_CODES};
  sfa_attention_options wrong[] = {fine, fine, fine, fine};
  wrong[0].softcap = 30;
  wrong[1].head_dim = 264;
  wrong[2].k_k = 0;
  wrong[3].precision = SFA_PRECISION_F32;
  const char *reasons[] = {"softcap", "head_dim", "dense", "SFA_PRECISION_F32"};
  for (int i = 0; i < 4; i++) {
    call c = new_call(wrong[i], 1, ORACLE_F32, 1);
    assert_int_equal(run(scalar, &c), SFA_ERROR_UNSUPPORTED);
    assert_non_null(strstr(sfa_context_error(scalar), reasons[i]));
    free_call(&c);
  }
  sfa_context_destroy(scalar);
  for (sfa_isa isa = SFA_ISA_AVX2; isa < SFA_ISA_AMX && isa <= sfa_isa_best(); isa++) {
    sfa_context *ctx = new_context(1, isa);
    call c = new_call(fine, 1, ORACLE_F32, 1);
    assert_int_equal(run(ctx, &c), SFA_ERROR_UNSUPPORTED);
    assert_non_null(strstr(sfa_context_error(ctx), "AMX"));
    free_call(&c);
    sfa_context_destroy(ctx);
  }
}

/* ALiBi is an argument of the run: such a call takes the f32 way, bit for bit. */
static void test_alibi(void **state) {
  (void)state;
  const float slopes[2] = {0.1f, 0.3f};
  call c = new_call(
      (sfa_attention_options){
          .n_heads = 2, .head_dim = 64, .max_seqlen_q = 40, .max_seqlen_k = 90, .k_q = 8, .k_k = 8, .policy = SFA_POLICY_HALF_CODES},
      1, ORACLE_F32, 800);
  c.a.alibi_slopes = slopes;
  run_on(SFA_ISA_SCALAR, 1, &c);
  float *half = memory(out_bytes(&c));
  memcpy(half, c.out, out_bytes(&c));
  c.o.policy = SFA_POLICY_TILES;
  run_on(SFA_ISA_SCALAR, 1, &c);
  assert_memory_equal(half, c.out, out_bytes(&c));
  free(half);
  free_call(&c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_shapes),         cmocka_unit_test(test_masks),
      cmocka_unit_test(test_far_window),     cmocka_unit_test(test_storage),
      cmocka_unit_test(test_gains),          cmocka_unit_test(test_rising_scores),
      cmocka_unit_test(test_beyond_16_bits), cmocka_unit_test(test_threads_and_batch),
      cmocka_unit_test(test_cache),          cmocka_unit_test(test_refusals),
      cmocka_unit_test(test_alibi),          cmocka_unit_test(test_codes_of_all_features),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
