/* Codes, attention over arguments, and gradients on a GPU. */
#include "cuda_check.h"

#include "base/half.h"
#include "base/rng.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Codes ----------------------------------------------------------------------------------------------------------- */

/* Rows with everything that a selection may trip over. */
static float *odd_rows(int64_t n_rows, int32_t D) {
  float *x = host_normals(7, n_rows * D, true);
  sfa_rng rng = {8};
  for (int64_t i = 0; i < n_rows; i++)
    for (int32_t f = 0; f < D; f++) {
      float *y = &x[i * D + f];
      switch (i % 8) {
      case 1: *y = (float)((int)(sfa_rng_next(&rng) % 5) - 2); break; /* ties */
      case 2: *y = f % 3 ? 0 : *y; break;
      case 3: *y = f == 5 ? NAN : f == 6 ? -INFINITY : *y; break;
      case 4: *y = 0; break;
      case 5: *y = f % 2 ? -0.0f : 1e-40f; break;
      case 6: *y = ldexpf(*y, f % 20 - 10); break;
      }
    }
  return x;
}

static void select_case(cuda_check *t, int32_t D, int32_t k, sfa_dtype dtype, bool bf16) {
  enum { ROWS = 1003 };
  size_t bytes = sfa_codes_bytes(ROWS, D, k, dtype);
  float *x = odd_rows(ROWS, D), *dense = host_memory((size_t)ROWS * (size_t)D * sizeof *dense),
        *dense_cpu = host_memory((size_t)ROWS * (size_t)D * sizeof *dense);
  uint16_t *halves = host_memory((size_t)ROWS * (size_t)D * sizeof *halves);
  for (int64_t i = 0; i < (int64_t)ROWS * D; i++)
    halves[i] = sfa_bf16_from_f32(x[i]);
  if (bf16) /* 1e-40 is not one of them */
    for (int64_t i = 0; i < (int64_t)ROWS * D; i++)
      x[i] = sfa_f32_from_bf16(halves[i]);
  unsigned char *there = device_of(t, NULL, bytes), *here = host_memory(bytes), *cpu = host_memory(bytes);
  void *rows = bf16 ? device_of(t, halves, (size_t)ROWS * (size_t)D * 2) : device_of(t, x, (size_t)ROWS * (size_t)D * sizeof *x);
  void *spread = device_of(t, NULL, (size_t)ROWS * (size_t)D * sizeof *dense);
  sfa_codes codes, fetched, expected;
  char name[64];
  snprintf(name, sizeof name, "D %d, k %d, dtype %d%s", D, k, (int)dtype, bf16 ? ", bf16 rows" : "");
  cuda_ok(t, t->gpu, sfa_codes_place(t->gpu, ROWS, D, k, dtype, there, &codes), name);
  if (cuda_ok(t, t->gpu, sfa_codes_select(t->gpu, rows, bf16 ? SFA_BF16 : SFA_F32, 0, &codes), name)) {
    fetch(t, here, there, bytes);
    sfa_codes_place(t->cpu, ROWS, D, k, dtype, here, &fetched);
    sfa_codes_place(t->cpu, ROWS, D, k, dtype, cpu, &expected);
    cuda_ok(t, t->cpu, sfa_codes_select(t->cpu, x, SFA_F32, 0, &expected), name);
    size_t id_bytes = (size_t)ROWS * (size_t)k * (D <= 256 ? 1 : 2), value_bytes = (size_t)ROWS * (size_t)k * sfa_dtype_bytes(dtype);
    cuda_expect(t, !memcmp(fetched.ids, expected.ids, id_bytes), "%s: other features than the CPU", name);
    cuda_expect(t, !memcmp(fetched.values, expected.values, value_bytes), "%s: other values than the CPU", name);
    cuda_expect(t, dtype != SFA_I8 || !memcmp(fetched.scales, expected.scales, ROWS * sizeof(uint16_t)), "%s: other scales than the CPU",
                name);
    if (cuda_ok(t, t->gpu, sfa_codes_densify(t->gpu, &codes, spread, D), name)) {
      fetch(t, dense, spread, (size_t)ROWS * (size_t)D * sizeof *dense);
      cuda_ok(t, t->cpu, sfa_codes_densify(t->cpu, &expected, dense_cpu, D), name);
      int64_t other = 0;
      for (int64_t i = 0; i < (int64_t)ROWS * D; i++)
        other += sfa_bits_of(dense[i]) != sfa_bits_of(dense_cpu[i]) && !(isnan(dense[i]) && isnan(dense_cpu[i]));
      cuda_expect(t, !other, "%s: %lld values of dense rows differ from the CPU's", name, (long long)other);
    }
  }
  sfa_memory_free(t->gpu, there), sfa_memory_free(t->gpu, rows), sfa_memory_free(t->gpu, spread);
  free(x), free(halves), free(here), free(cpu), free(dense), free(dense_cpu);
}

void cuda_check_select(cuda_check *t) {
  static const int32_t dims[] = {64, 128, 256, 40, 96, 8, 512};
  static const sfa_dtype dtypes[] = {SFA_F32, SFA_BF16, SFA_F16, SFA_I8};
  for (size_t d = 0; d < sizeof dims / sizeof *dims; d++)
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
      for (int32_t k = 1; k <= dims[d] && k <= 64; k = k < 8 ? 8 : 2 * k)
        select_case(t, dims[d], k, dtypes[i], i % 2);
  /* A row that f16 cannot hold is told by the wait, once. */
  float x[16] = {1e6f, 1};
  float *there = device_of(t, x, sizeof x);
  void *memory = device_of(t, NULL, sfa_codes_bytes(2, 8, 2, SFA_F16));
  sfa_codes codes;
  sfa_codes_place(t->gpu, 2, 8, 2, SFA_F16, memory, &codes);
  cuda_ok(t, t->gpu, sfa_codes_select(t->gpu, there, SFA_F32, 0, &codes), "a large value");
  cuda_expect(t, sfa_stream_wait(t->gpu) == SFA_ERROR_RANGE, "the wait does not tell of 1e6 stored as f16");
  cuda_ok(t, t->gpu, sfa_stream_wait(t->gpu), "the wait after it");
  sfa_memory_free(t->gpu, there), sfa_memory_free(t->gpu, memory);
}

/* ---- Attention ------------------------------------------------------------------------------------------------------- */

static const int32_t lens_q[] = {0, 130, 131, 200, 471}, lens_k[] = {0, 130, 330, 400, 671}, lens_few[] = {0, 3, 3, 4, 9};

static const struct {
  const char *name;
  cuda_call c;
} calls[] = {
    {"dense", {.o = {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 300, .max_seqlen_k = 300}}},
    {"dense causal", {.o = {.n_heads = 2, .head_dim = 128, .max_seqlen_q = 257, .max_seqlen_k = 257, .causal = 1}, .bf16 = true}},
    {"sparse", {.o = {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 177, .max_seqlen_k = 340, .k_q = 8, .k_k = 8}}},
    {"sparse causal GQA",
     {.o = {.n_heads = 8, .n_kv_heads = 2, .head_dim = 128, .max_seqlen_q = 190, .max_seqlen_k = 290, .k_q = 16, .k_k = 16, .causal = 1},
      .bf16 = true}},
    {"K-only MQA",
     {.o = {.n_heads = 3, .n_kv_heads = 1, .head_dim = 128, .max_seqlen_q = 133, .max_seqlen_k = 200, .k_k = 16, .causal = 1}}},
    {"large head",
     {.o = {.n_heads = 2, .head_dim = 256, .max_seqlen_q = 165, .max_seqlen_k = 265, .k_q = 16, .k_k = 32, .causal = 1}, .bf16 = true}},
    {"large dense head", {.o = {.n_heads = 1, .head_dim = 256, .max_seqlen_q = 100, .max_seqlen_k = 129}}},
    {"D 40, E 96",
     {.o = {.n_heads = 2, .head_dim = 40, .head_dim_v = 96, .max_seqlen_q = 140, .max_seqlen_k = 166, .k_q = 8, .k_k = 8, .causal = 1}}},
    {"D 96, E 64",
     {.o = {.n_heads = 2, .head_dim = 96, .head_dim_v = 64, .max_seqlen_q = 140, .max_seqlen_k = 166, .k_k = 12}, .bf16 = true}},
    {"nearly all kept", {.o = {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 150, .max_seqlen_k = 190, .k_q = 60, .k_k = 63, .causal = 1}}},
    {"nearly all kept of a large head",
     {.o = {.n_heads = 2, .n_kv_heads = 1, .head_dim = 256, .max_seqlen_q = 70, .max_seqlen_k = 130, .k_q = 200, .k_k = 255, .causal = 1},
      .bf16 = true}},
    {"all kept", {.o = {.n_heads = 2, .head_dim = 128, .max_seqlen_q = 50, .max_seqlen_k = 90, .k_q = 128, .k_k = 128}, .bf16 = true}},
    {"batch",
     {.o = {.n_heads = 4,
            .n_kv_heads = 2,
            .head_dim = 64,
            .n_sequences = 3,
            .max_seqlen_q = 95,
            .max_seqlen_k = 171,
            .k_q = 8,
            .k_k = 8,
            .causal = 1}}},
    {"lengths",
     {.o = {.n_heads = 4,
            .n_kv_heads = 2,
            .head_dim = 64,
            .n_sequences = 4,
            .max_seqlen_q = 271,
            .max_seqlen_k = 271,
            .k_q = 8,
            .k_k = 8,
            .causal = 1},
      .cu_q = lens_q,
      .cu_k = lens_k,
      .bf16 = true}},
    {"more queries than keys", {.o = {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 200, .max_seqlen_k = 66, .causal = 1}}},
    {"no keys but a sink", {.o = {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 130, .max_seqlen_k = 0}, .sinks = true}},
    {"window with sink tokens",
     {.o = {.n_heads = 2,
            .head_dim = 64,
            .max_seqlen_q = 400,
            .max_seqlen_k = 400,
            .k_k = 8,
            .causal = 1,
            .has_window = 1,
            .window_size = {70, 0},
            .n_sink_tokens = 4}}},
    {"window, both sides",
     {.o = {.n_heads = 1, .head_dim = 128, .max_seqlen_q = 300, .max_seqlen_k = 330, .has_window = 1, .window_size = {20, 40}},
      .bf16 = true}},
    {"sinks, softcap",
     {.o = {.n_heads = 4,
            .n_kv_heads = 2,
            .head_dim = 128,
            .max_seqlen_q = 160,
            .max_seqlen_k = 190,
            .k_q = 8,
            .k_k = 8,
            .softmax_scale = 0.4f,
            .softcap = 3,
            .causal = 1},
      .sinks = true}},
    {"ALiBi",
     {.o = {.n_heads = 4, .n_kv_heads = 2, .head_dim = 64, .max_seqlen_q = 150, .max_seqlen_k = 150, .k_q = 8, .k_k = 8, .causal = 1},
      .alibi = true}},
    {"int8 keys and values",
     {.o = {.n_heads = 2,
            .head_dim = 128,
            .max_seqlen_q = 160,
            .max_seqlen_k = 190,
            .k_q = 16,
            .k_k = 16,
            .k_dtype = SFA_I8,
            .v_dtype = SFA_I8,
            .causal = 1}}},
    {"dense, lengths",
     {.o = {.n_heads = 2, .head_dim = 64, .n_sequences = 4, .max_seqlen_q = 271, .max_seqlen_k = 271, .causal = 1},
      .cu_q = lens_q,
      .cu_k = lens_k,
      .bf16 = true}},
    {"dense rows with gaps",
     {.o = {.n_heads = 2, .head_dim = 64, .n_sequences = 2, .max_seqlen_q = 90, .max_seqlen_k = 130}, .bf16 = true, .gap = 4}},
    {"rows with gaps, one sequence",
     {.o = {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 90, .max_seqlen_k = 130, .k_k = 8, .causal = 1}, .bf16 = true, .gap = 8}},
    {"few queries, rows with gaps",
     {.o = {.n_heads = 2, .head_dim = 64, .n_sequences = 2, .max_seqlen_q = 2, .max_seqlen_k = 130}, .bf16 = true, .gap = 3}},
    {"f16 keys, int4 values",
     {.o = {.n_heads = 2,
            .head_dim = 64,
            .max_seqlen_q = 100,
            .max_seqlen_k = 130,
            .k_q = 8,
            .k_k = 8,
            .k_dtype = SFA_F16,
            .v_dtype = SFA_I4,
            .causal = 1},
      .bf16 = true}},
    {"int8 keys, fp8 values",
     {.o = {.n_heads = 2,
            .head_dim = 128,
            .max_seqlen_q = 160,
            .max_seqlen_k = 190,
            .k_q = 16,
            .k_k = 16,
            .k_dtype = SFA_I8,
            .v_dtype = SFA_E4M3,
            .causal = 1}}},
    {"few queries",
     {.o = {.n_heads = 8, .n_kv_heads = 2, .head_dim = 128, .max_seqlen_q = 2, .max_seqlen_k = 777, .k_q = 16, .k_k = 16, .causal = 1}}},
    {"few dense queries", {.o = {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 1, .max_seqlen_k = 300}, .bf16 = true}},
    {"few queries, batch",
     {.o = {.n_heads = 4,
            .n_kv_heads = 4,
            .head_dim = 64,
            .n_sequences = 3,
            .max_seqlen_q = 1,
            .max_seqlen_k = 300,
            .k_k = 8,
            .k_dtype = SFA_I8}}},
    {"few queries, lengths",
     {.o = {.n_heads = 4,
            .n_kv_heads = 2,
            .head_dim = 64,
            .n_sequences = 4,
            .max_seqlen_q = 5,
            .max_seqlen_k = 271,
            .k_q = 8,
            .k_k = 8,
            .causal = 1},
      .cu_q = lens_few,
      .cu_k = lens_k,
      .sinks = true}},
    {"few queries, batch, lengths of queries",
     {.o = {.n_heads = 4,
            .n_kv_heads = 4,
            .head_dim = 128,
            .n_sequences = 4,
            .max_seqlen_q = 5,
            .max_seqlen_k = 130,
            .k_q = 16,
            .k_k = 16,
            .k_dtype = SFA_I8,
            .v_dtype = SFA_I8,
            .causal = 1,
            .has_window = 1,
            .window_size = {70, 0},
            .n_sink_tokens = 4},
      .cu_q = lens_few,
      .bf16 = true,
      .alibi = true}},
    {"wide heads",
     {.o = {.n_heads = 2, .n_kv_heads = 1, .head_dim = 320, .max_seqlen_q = 70, .max_seqlen_k = 90, .k_q = 16, .k_k = 16, .causal = 1}}},
    {"wide dense heads, lengths",
     {.o = {.n_heads = 2, .n_kv_heads = 1, .head_dim = 264, .head_dim_v = 512, .n_sequences = 4, .max_seqlen_q = 5, .max_seqlen_k = 271},
      .cu_q = lens_few,
      .cu_k = lens_k,
      .bf16 = true}},
    {"wide values",
     {.o = {.n_heads = 2, .head_dim = 64, .head_dim_v = 320, .max_seqlen_q = 33, .max_seqlen_k = 90, .k_k = 8, .k_dtype = SFA_I8}}},
    {"one of everything", {.o = {.n_heads = 1, .head_dim = 64, .max_seqlen_q = 1, .max_seqlen_k = 1}}},
};

static const sfa_policy policies[] = {SFA_POLICY_AUTO, SFA_POLICY_KEYS,    SFA_POLICY_BF16, SFA_POLICY_SP_BF16,
                                      SFA_POLICY_INT8, SFA_POLICY_SP_INT8, SFA_POLICY_PAPER};

static bool is_of_hopper(sfa_policy policy) {
  return policy == SFA_POLICY_SP_BF16 || policy == SFA_POLICY_INT8 || policy == SFA_POLICY_SP_INT8;
}

/* Tensor cores take heads of up to 256, PAPER sparse operands. */
static bool takes(const cuda_check *t, sfa_policy policy, const cuda_call *c) {
  if (policy == SFA_POLICY_AUTO || policy == SFA_POLICY_KEYS)
    return true;
  if (is_of_hopper(policy) && !t->of_hopper)
    return false;
  return c->o.head_dim <= 256 && c->o.head_dim_v <= 256 && (policy != SFA_POLICY_PAPER || (c->o.k_q > 0 && c->o.k_k > 0));
}

static void expect_lse(cuda_check *t, const char *what, const cuda_call *c, double tolerance) {
  double most = 0;
  int64_t n = c->n_q * c->o.n_heads, worst = 0;
  for (int64_t i = 0; i < n; i++) {
    double error = c->ref_lse[i] == c->lse[i] ? 0 : fabs(c->ref_lse[i] - c->lse[i]);
    if (!(error <= most))
      most = error, worst = i;
  }
  cuda_expect(t, most <= tolerance, "%s: error of lse %g at %lld: %.7g for %.7g", what, most, (long long)worst,
              n ? (double)c->lse[worst] : 0, n ? c->ref_lse[worst] : 0);
}

void cuda_check_attention(cuda_check *t) {
  for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
    cuda_call c = calls[i].c;
    c.seed = 100 * i + 1;
    cuda_call_fill(&c);
    for (int whole = 0; whole < 2; whole++) {
      cuda_call_reference(&c, whole);
      for (size_t p = 0; p < sizeof policies / sizeof *policies; p++) {
        bool is_whole = policies[p] == SFA_POLICY_INT8 || policies[p] == SFA_POLICY_SP_INT8;
        if (is_whole != whole || !takes(t, policies[p], &c))
          continue;
        char what[96];
        snprintf(what, sizeof what, "%s, %s", calls[i].name, sfa_policy_name(policies[p]));
        c.o.policy = policies[p];
        size_t out_bytes = (size_t)(c.n_q * c.o.n_heads * c.o.head_dim_v) * sizeof(float);
        float *first = host_memory(out_bytes);
        if (!cuda_call_run(t, &c)) {
          printf("  (%s)\n", what);
          free(first);
          continue;
        }
        cuda_expect_close(t, what, c.n_q * c.o.n_heads * c.o.head_dim_v, c.out, c.ref, c.naive);
        expect_lse(t, what, &c, whole ? 0.1 : c.o.k_dtype == SFA_I8 ? 2e-2 : 2e-3);
        int64_t left_out = 0;
        for (int64_t row = 0; row < c.n_q * c.o.n_heads; row++)
          left_out += c.dropped[row] != 0;
        cuda_expect(t, !left_out, "%s: %lld rows tell of mass left out without eps", what, (long long)left_out);
        memcpy(first, c.out, out_bytes);
        c.only_out = true;
        if (cuda_call_run(t, &c))
          cuda_expect(t, !memcmp(first, c.out, out_bytes), "%s: other bits the second time, without lse", what);
        c.only_out = false;
        free(first);
      }
    }
    cuda_call_free(&c);
  }
}

/* ---- Codes as arguments ---------------------------------------------------------------------------------------------- */

/* Queries and keys that come as codes, against the maths over the rows that they were made of. */
static void codes_case(cuda_check *t, cuda_call c, sfa_dtype dtype) {
  const sfa_attention_options *o = &c.o;
  c.o.k_dtype = dtype;
  c.o.v_dtype = dtype == SFA_I8 ? SFA_I8 : SFA_DTYPE_DEFAULT;
  c.seed = 300;
  cuda_call_fill(&c);
  char what[96];
  snprintf(what, sizeof what, "policy %s, %lld queries, k %d, dtype %d", sfa_policy_name(o->policy), (long long)o->max_seqlen_q, o->k_k,
           (int)dtype);
  cuda_call_reference(&c, false);
  int64_t n_q = c.n_q * o->n_heads, n_k = c.n_k * o->n_kv_heads, n_out = n_q * o->head_dim_v;
  float *q = device_of(t, c.q, (size_t)(n_q * o->head_dim) * 4), *k = device_of(t, c.k, (size_t)(n_k * o->head_dim) * 4);
  float *v = device_of(t, c.v, (size_t)(n_k * o->head_dim_v) * 4), *out = device_of(t, NULL, (size_t)n_out * 4);
  void *q_memory = device_of(t, NULL, sfa_codes_bytes(n_q, o->head_dim, o->k_q, SFA_F32));
  void *k_memory = device_of(t, NULL, sfa_codes_bytes(n_k, o->head_dim, o->k_k, dtype));
  size_t cu_bytes = (size_t)(o->n_sequences + 1) * sizeof(int32_t);
  void *cu_q = c.cu_q ? device_of(t, c.cu_q, cu_bytes) : NULL, *cu_k = c.cu_k ? device_of(t, c.cu_k, cu_bytes) : NULL;
  sfa_codes q_codes, k_codes;
  sfa_attention_plan *plan = NULL;
  cuda_ok(t, t->gpu, sfa_codes_place(t->gpu, n_q, o->head_dim, o->k_q, SFA_F32, q_memory, &q_codes), what);
  cuda_ok(t, t->gpu, sfa_codes_place(t->gpu, n_k, o->head_dim, o->k_k, dtype, k_memory, &k_codes), what);
  cuda_ok(t, t->gpu, sfa_codes_select(t->gpu, q, SFA_F32, 0, &q_codes), what);
  cuda_ok(t, t->gpu, sfa_codes_select(t->gpu, k, SFA_F32, 0, &k_codes), what);
  if (cuda_ok(t, t->gpu, sfa_attention_plan_create(t->gpu, o, &plan), what)) {
    void *workspace = device_of(t, NULL, sfa_attention_workspace_bytes(plan));
    sfa_attention_args args = {.struct_size = sizeof args,
                               .q_codes = &q_codes,
                               .k_codes = &k_codes,
                               .v.data = v,
                               .out = out,
                               .cu_seqlens_q = cu_q,
                               .cu_seqlens_k = cu_k,
                               .workspace = workspace};
    if (cuda_ok(t, t->gpu, sfa_attention_run(plan, &args), what)) {
      fetch(t, c.out, out, (size_t)n_out * 4);
      cuda_expect_close(t, what, n_out, c.out, c.ref, c.naive);
    }
    sfa_memory_free(t->gpu, workspace);
    sfa_attention_plan_destroy(plan);
  }
  void *all[] = {q, k, v, out, q_memory, k_memory, cu_q, cu_k};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    sfa_memory_free(t->gpu, all[i]);
  cuda_call_free(&c);
}

void cuda_check_codes(cuda_check *t) {
  static const sfa_dtype dtypes[] = {SFA_F32, SFA_BF16, SFA_I8};
  cuda_call many = {.o = {.n_heads = 4,
                          .n_kv_heads = 2,
                          .head_dim = 64,
                          .n_sequences = 2,
                          .max_seqlen_q = 130,
                          .max_seqlen_k = 170,
                          .k_q = 8,
                          .k_k = 8,
                          .causal = 1,
                          .policy = SFA_POLICY_BF16}};
  cuda_call few = many, packed = many, listed = many, few_packed;
  few.o.max_seqlen_q = 1;
  few.o.policy = SFA_POLICY_AUTO;
  packed.o.n_sequences = 4;
  packed.o.max_seqlen_q = packed.o.max_seqlen_k = 271;
  packed.cu_q = lens_q, packed.cu_k = lens_k;
  few_packed = packed;
  few_packed.o.policy = SFA_POLICY_AUTO;
  few_packed.o.max_seqlen_q = 5;
  few_packed.cu_q = lens_few;
  cuda_call all_kept = few_packed;
  all_kept.o.k_q = all_kept.o.k_k = 64;
  listed.o.policy = SFA_POLICY_PAPER;
  for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
    codes_case(t, many, dtypes[i]);
    codes_case(t, few, dtypes[i]);
    codes_case(t, packed, dtypes[i]);
    codes_case(t, few_packed, dtypes[i]);
    codes_case(t, all_kept, dtypes[i]);
    if (dtypes[i] != SFA_I8)
      codes_case(t, listed, dtypes[i]);
  }
}

/* ---- Rows and partial results ---------------------------------------------------------------------------------------------- */

/* Features kept in dense rows, those of the CPU; of all heads, or of all but the first, with tokens further apart. */
void cuda_check_keep(cuda_check *t) {
  enum { TOKENS = 301, HEADS = 3 };
  for (int32_t D = 40; D <= 128; D += 88)
    for (int way = 0; way < 4; way++) {
      const int32_t two_of_four = way & 1, skip = way >> 1;
      size_t bytes = (size_t)(TOKENS * HEADS) * (size_t)D * sizeof(float);
      float *x = host_normals(9, (int64_t)TOKENS * HEADS * D, false), *back = host_memory(bytes);
      void *there = device_of(t, x, bytes);
      sfa_keep_options keep = {.struct_size = sizeof keep, .k = 8, .two_of_four = two_of_four};
      const int64_t stride = skip ? HEADS * D : 0;
      cuda_ok(t, t->gpu, sfa_rows_keep(t->gpu, &keep, TOKENS, HEADS - skip, D, (float *)there + skip * D, stride), "sfa_rows_keep");
      fetch(t, back, there, bytes);
      cuda_ok(t, t->cpu, sfa_rows_keep(t->cpu, &keep, TOKENS, HEADS - skip, D, x + skip * D, stride), "sfa_rows_keep on the CPU");
      int64_t other = 0;
      for (int64_t i = 0; i < (int64_t)TOKENS * HEADS * D; i++)
        other += back[i] != x[i];
      cuda_expect(t, !other, "D %d, two of four %d, heads from %d: %lld values differ from the CPU's", D, two_of_four, skip,
                  (long long)other);
      sfa_memory_free(t->gpu, there);
      free(x), free(back);
    }
}

/* Partial results over halves of the keys join to the whole. */
void cuda_check_merge(cuda_check *t) {
  enum { T = 150, S = 300, H = 2, D = 64 };
  cuda_call whole = {.o = {.n_heads = H, .head_dim = D, .max_seqlen_q = T, .max_seqlen_k = S}, .seed = 77}, half[2];
  size_t out_bytes = (size_t)T * H * D * sizeof(float), lse_bytes = (size_t)T * H * sizeof(float);
  void *out[2], *lse[2];
  cuda_call_fill(&whole);
  cuda_call_reference(&whole, false);
  for (int i = 0; i < 2; i++) {
    half[i] = (cuda_call){.o = whole.o, .seed = 77};
    half[i].o.max_seqlen_k = S / 2;
    cuda_call_fill(&half[i]);
    memcpy(half[i].q, whole.q, out_bytes);
    memcpy(half[i].k, whole.k + i * (S / 2) * H * D, (size_t)(S / 2) * H * D * sizeof(float));
    memcpy(half[i].v, whole.v + i * (S / 2) * H * D, (size_t)(S / 2) * H * D * sizeof(float));
    cuda_call_run(t, &half[i]);
    out[i] = device_of(t, half[i].out, out_bytes), lse[i] = device_of(t, half[i].lse, lse_bytes);
  }
  if (cuda_ok(t, t->gpu, sfa_attention_merge(t->gpu, T * H, D, out[0], lse[0], out[1], lse[1]), "sfa_attention_merge")) {
    fetch(t, whole.out, out[0], out_bytes);
    fetch(t, whole.lse, lse[0], lse_bytes);
    cuda_expect_close(t, "two halves", (int64_t)T * H * D, whole.out, whole.ref, whole.naive);
    expect_lse(t, "two halves", &whole, 2e-3);
  }
  for (int i = 0; i < 2; i++)
    sfa_memory_free(t->gpu, out[i]), sfa_memory_free(t->gpu, lse[i]), cuda_call_free(&half[i]);
  cuda_call_free(&whole);
}

/* ---- Needles --------------------------------------------------------------------------------------------------------- */

/* Whether out is this row of values: bit for bit (bound 0), or to a share `bound` of each. */
static bool is_row(const float *out, const float *row, int32_t n, float bound) {
  for (int32_t e = 0; bound > 0 && e < n; e++)
    if (!(fabsf(out[e] - row[e]) <= bound * fabsf(row[e])))
      return false;
  return bound > 0 || !memcmp(out, row, (size_t)n * sizeof *out);
}

/* One key shares one feature with every query, so strongly that softmax saturates: out is its V row, wherever it is; and where the mask
 * forbids it, it is not. */
static void needles(cuda_check *t, sfa_attention_options o) {
  enum { S = 300 };
  const int32_t T = (int32_t)o.max_seqlen_q, D = o.head_dim;
  o.n_heads = o.causal = 1;
  o.max_seqlen_k = S;
  o.k_q = o.k_k = 8;
  cuda_call c = {.o = o, .bf16 = o.v_dtype == SFA_BF16, .seed = 5};
  cuda_call_fill(&c);
  bool whole = o.policy == SFA_POLICY_INT8 || o.policy == SFA_POLICY_SP_INT8;
  /* The score is 64 * 64 / sqrt(D), exact in f32 but with int8 rows, whose scales are rounded up by up to 2^-10 each: docs/NUMERICS.md. */
  float score = 4096 * 1.002f / sqrtf((float)D), bound = whole ? ldexpf(score + 8, -24) : 0;
  char what[96];
  snprintf(what, sizeof what, "%s, %d queries, D %d, eps %g, window %d", sfa_policy_name(o.policy), T, D, (double)o.eps,
           o.has_window ? (int)o.window_size[0] : -1);
  for (int64_t i = 0; i < (int64_t)T * D; i++)
    c.q[i] = i % D == 3 ? 64 : i % D < 8 ? ldexpf(1, -8) : 0;
  for (int needle = 0; needle < S; needle += needle < 3 || needle > S - 4 ? 1 : 37) {
    for (int64_t i = 0; i < (int64_t)S * D; i++)
      c.k[i] = i / D == needle ? (i % D == 3 ? 64 : 0) : (i % D >= 8 && i % D < 16 ? 0.5f : 0);
    if (!cuda_call_run(t, &c))
      break;
    int wrong = 0;
    for (int q = 0; q < T; q++) {
      int at = q + S - T;
      bool sees = needle <= at && (!o.has_window || needle >= at - o.window_size[0] || needle < o.n_sink_tokens);
      wrong += sees != is_row(c.out + (int64_t)q * D, c.v + (int64_t)needle * D, D, bound);
    }
    if (!cuda_expect(t, !wrong, "%s: needle at %d: %d of %d rows are wrong", what, needle, wrong, T))
      break;
  }
  cuda_call_free(&c);
}

void cuda_check_needles(cuda_check *t) {
  for (size_t p = 1; p < sizeof policies / sizeof *policies; p++)
    for (int32_t D = 64; D <= 256 && (t->of_hopper || !is_of_hopper(policies[p])); D *= 2) {
      needles(t, (sfa_attention_options){.head_dim = D, .max_seqlen_q = 300, .policy = policies[p]});
      needles(t,
              (sfa_attention_options){
                  .head_dim = D, .max_seqlen_q = 300, .policy = policies[p], .has_window = 1, .window_size = {70, 0}, .n_sink_tokens = 2});
    }
  for (int32_t T = 1; T <= 4; T += 3)
    for (int32_t D = 64; D <= 128; D *= 2) {
      needles(t, (sfa_attention_options){.head_dim = D, .max_seqlen_q = T});
      needles(t, (sfa_attention_options){.head_dim = D, .max_seqlen_q = T, .k_dtype = SFA_I8, .v_dtype = SFA_BF16});
      needles(t, (sfa_attention_options){.head_dim = D, .max_seqlen_q = T, .k_dtype = SFA_I8, .v_dtype = SFA_BF16, .eps = 0.05f});
      needles(t, (sfa_attention_options){.head_dim = D,
                                         .max_seqlen_q = T,
                                         .k_dtype = SFA_I8,
                                         .v_dtype = SFA_BF16,
                                         .eps = 0.05f,
                                         .has_window = 1,
                                         .window_size = {70, 0},
                                         .n_sink_tokens = 2});
    }
}

/* ---- Gradients ------------------------------------------------------------------------------------------------------- */

/* Against the maths in double: bf16 operands and weights leave an error of some 2^-8 of the largest entries. */
static void expect_gradient(cuda_check *t, const char *what, const char *name, int64_t n, const float *got, const double *ref) {
  double most = 0, squares = 0, ref_squares = 0, largest = 0;
  int64_t worst = 0;
  for (int64_t i = 0; i < n; i++) {
    double error = fabs(got[i] - ref[i]);
    if (!(error <= most))
      most = error, worst = i;
    squares += error * error;
    ref_squares += ref[i] * ref[i];
    largest = fabs(ref[i]) > largest ? fabs(ref[i]) : largest;
  }
  cuda_expect(t, most <= 0.02 * largest + 1e-6 && sqrt(squares) <= 0.01 * sqrt(ref_squares) + 1e-6,
              "%s, %s: error up to %.3g of %.3g, RMS %.3g of %.3g, at %lld: %.7g for %.7g", what, name, most, largest, sqrt(squares),
              sqrt(ref_squares), (long long)worst, n ? (double)got[worst] : 0, n ? ref[worst] : 0);
}

/* Rows of device memory as codes of k features. */
static void *codes_of(cuda_check *t, const void *rows, int64_t n_rows, int32_t D, int32_t k, sfa_dtype dtype, sfa_codes *codes) {
  void *memory = device_of(t, NULL, sfa_codes_bytes(n_rows, D, k, dtype));
  cuda_ok(t, t->gpu, sfa_codes_place(t->gpu, n_rows, D, k, dtype, memory, codes), "sfa_codes_place");
  cuda_ok(t, t->gpu, sfa_codes_select(t->gpu, rows, SFA_F32, 0, codes), "sfa_codes_select");
  return memory;
}

/* Gradients of the codes' values alone, rows not wanted, against the rows' kept entries. */
static void compact(cuda_check *t, const char *what, const cuda_call *c, const sfa_attention_plan *plan, sfa_attention_grad_args grad,
                    const float *d_q, const float *d_k) {
  const sfa_attention_options *o = &c->o;
  const struct {
    const char *name;
    const float *x, *rows;
    int64_t n;
    int32_t k;
    float **to;
  } sides[] = {{"d_q_values", c->q, d_q, c->n_q * o->n_heads, o->k_q, &grad.d_q_values},
               {"d_k_values", c->k, d_k, c->n_k * o->n_kv_heads, o->k_k, &grad.d_k_values}};
  for (int i = 0; i < 2; i++)
    *sides[i].to = device_of(t, NULL, (size_t)(sides[i].n * sides[i].k) * sizeof(float));
  grad.d_q = grad.d_k = NULL;
  bool good = cuda_ok(t, t->gpu, sfa_attention_backward(plan, &grad), what);
  for (int i = 0; i < 2; i++) {
    int32_t D = o->head_dim, k = sides[i].k, *ids = host_memory((size_t)D * sizeof *ids);
    size_t bytes = (size_t)(sides[i].n * k) * sizeof(float);
    float *values = host_memory(bytes);
    int64_t wrong = 0;
    if (good)
      fetch(t, values, *sides[i].to, bytes);
    for (int64_t row = 0; good && row < sides[i].n; row++) {
      oracle_topk(sides[i].x + row * D, D, k, ids); /* rising */
      for (int32_t u = 0; u < k; u++)
        wrong += !(values[row * k + u] == sides[i].rows[row * D + ids[u]]);
    }
    cuda_expect(t, !wrong, "%s, %s: %lld of %lld differ from the rows' entries", what, sides[i].name, (long long)wrong,
                (long long)sides[i].n * k);
    free(values), free(ids), sfa_memory_free(t->gpu, *sides[i].to);
  }
}

/* coded: queries and keys come as codes. */
static void gradients(cuda_check *t, const char *what, cuda_call *c, bool coded) {
  const sfa_attention_options *o = &c->o;
  int64_t n_out = c->n_q * o->n_heads * o->head_dim_v, n_lse = c->n_q * o->n_heads, n_dq = c->n_q * o->n_heads * o->head_dim;
  int64_t n_dk = c->n_k * o->n_kv_heads * o->head_dim, n_dv = c->n_k * o->n_kv_heads * o->head_dim_v;
  int64_t counts[] = {n_dq, n_dk, n_dv, o->n_heads};
  static const char *const names[] = {"d_q", "d_k", "d_v", "d_sink_logit"};
  float *d_out = host_normals(c->seed + 9, n_out, true), *d_lse = host_normals(c->seed + 10, n_lse, false), *first[4], *second[4];
  double *ref[4];
  void *there[4];
  for (int i = 0; i < 4; i++) {
    size_t bytes = (size_t)counts[i] * sizeof(float);
    first[i] = host_memory(bytes), second[i] = host_memory(bytes), ref[i] = host_memory(2 * bytes), there[i] = device_of(t, NULL, bytes);
  }
  sfa_attention_plan *plan = NULL;
  if (cuda_ok(t, t->gpu, sfa_attention_plan_create(t->gpu, o, &plan), what)) {
    sfa_dtype dtype = SFA_F32;
    void *q = device_of(t, c->q, (size_t)n_dq * 4), *k = device_of(t, c->k, (size_t)n_dk * 4), *v = device_of(t, c->v, (size_t)n_dv * 4);
    void *out = device_of(t, NULL, (size_t)n_out * 4), *lse = device_of(t, NULL, (size_t)n_lse * 4);
    void *dev_d_out = device_of(t, d_out, (size_t)n_out * 4), *dev_d_lse = device_of(t, d_lse, (size_t)n_lse * 4);
    size_t bytes = sfa_attention_workspace_bytes(plan), back_bytes = sfa_attention_backward_workspace_bytes(plan);
    void *workspace = device_of(t, NULL, bytes > back_bytes ? bytes : back_bytes);
    void *sinks = c->sink_logit ? device_of(t, c->sink_logit, (size_t)o->n_heads * 4) : NULL;
    size_t cu_bytes = (size_t)(o->n_sequences + 1) * sizeof(int32_t);
    void *cu_q = c->cu_q ? device_of(t, c->cu_q, cu_bytes) : NULL, *cu_k = c->cu_k ? device_of(t, c->cu_k, cu_bytes) : NULL;
    sfa_attention_args args = {.struct_size = sizeof args,
                               .q = {.data = q, .dtype = dtype},
                               .k.data = k,
                               .v.data = v,
                               .out = out,
                               .lse = lse,
                               .cu_seqlens_q = cu_q,
                               .cu_seqlens_k = cu_k,
                               .sink_logit = sinks,
                               .workspace = workspace};
    sfa_codes q_codes, k_codes;
    void *q_memory = NULL, *k_memory = NULL;
    const sfa_rope beside = {.cos = q, .sin = q, .n_rotated = 8}; /* not looked at */
    if (coded) {
      q_memory = codes_of(t, q, c->n_q * o->n_heads, o->head_dim, o->k_q, SFA_F32, &q_codes);
      k_memory = codes_of(t, k, c->n_k * o->n_kv_heads, o->head_dim, o->k_k, o->k_dtype ? o->k_dtype : SFA_F32, &k_codes);
      args.q = args.k = (sfa_rows){.rope = &beside};
      args.q_codes = &q_codes, args.k_codes = &k_codes;
    }
    sfa_attention_grad_args grad = {.struct_size = sizeof grad,
                                    .forward = &args,
                                    .d_out = dev_d_out,
                                    .d_lse = dev_d_lse,
                                    .d_q = there[0],
                                    .d_k = there[1],
                                    .d_v = there[2],
                                    .d_sink_logit = c->sink_logit ? there[3] : NULL,
                                    .workspace = workspace};
    bool good = cuda_ok(t, t->gpu, sfa_attention_run(plan, &args), what) && cuda_ok(t, t->gpu, sfa_attention_backward(plan, &grad), what);
    for (int i = 0; good && i < 3 + (c->sink_logit != NULL); i++)
      fetch(t, first[i], there[i], (size_t)counts[i] * 4);
    int64_t stage_ns[SFA_STAGE_COUNT] = {0};
    grad.stage_ns = stage_ns;
    good = good && cuda_ok(t, t->gpu, sfa_attention_backward(plan, &grad), what);
    grad.stage_ns = NULL;
    cuda_expect(t, !good || stage_ns[SFA_STAGE_ATTEND] > 0, "%s: no time passes", what);
    for (int i = 0; good && i < 3 + (c->sink_logit != NULL); i++) {
      fetch(t, second[i], there[i], (size_t)counts[i] * 4);
      cuda_expect(t, !memcmp(first[i], second[i], (size_t)counts[i] * 4), "%s, %s: other bits the second time", what, names[i]);
    }
    if (good && o->k_q && o->k_k)
      compact(t, what, c, plan, grad, first[0], first[1]);
    if (good) {
      memset(ref[3], 0, (size_t)o->n_heads * sizeof(double));
      double *sink = host_memory((size_t)o->n_heads * sizeof *sink);
      for (int32_t b = 0; b < o->n_sequences; b++) {
        int64_t q0, k0;
        oracle_problem p = cuda_call_problem(c, b, &q0, &k0);
        oracle_grad_f64 g = {ref[0] + q0 * o->n_heads * o->head_dim, ref[1] + k0 * o->n_kv_heads * o->head_dim,
                             ref[2] + k0 * o->n_kv_heads * o->head_dim_v, sink};
        oracle_backward_f64(&p, d_out + q0 * o->n_heads * o->head_dim_v, d_lse + q0 * o->n_heads, &g);
        for (int32_t h = 0; h < o->n_heads; h++)
          ref[3][h] += sink[h];
      }
      free(sink);
      for (int i = 0; i < 3 + (c->sink_logit != NULL); i++)
        expect_gradient(t, what, names[i], counts[i], first[i], ref[i]);
      int64_t outside = 0;
      for (int64_t i = 0; i < n_dq; i++)
        outside += ref[0][i] == 0 && first[0][i] != 0;
      for (int64_t i = 0; i < n_dk; i++)
        outside += ref[1][i] == 0 && first[1][i] != 0;
      cuda_expect(t, !outside, "%s: %lld gradients outside of the supports are not 0", what, (long long)outside);
    }
    void *all[] = {q, k, v, out, lse, dev_d_out, dev_d_lse, workspace, sinks, cu_q, cu_k, q_memory, k_memory};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
      sfa_memory_free(t->gpu, all[i]);
    sfa_attention_plan_destroy(plan);
  }
  for (int i = 0; i < 4; i++)
    free(first[i]), free(second[i]), free(ref[i]), sfa_memory_free(t->gpu, there[i]);
  free(d_out), free(d_lse);
}

/* Rows that are turned on the way: attention and gradients as the CPU has them; normed before, attention alone, for gradients are refused.
 * Two sequences with odd strides between tokens, `gap` elements apart. */
static void rope_case(cuda_check *t, int32_t T, int32_t gap, bool normed) {
  enum { B = 2, S = 140, H = 2, D = 64, PAIRS = 16, STRIDE = H * D + 8, BATCH = S * STRIDE + 24 };
  size_t bytes = (size_t)B * BATCH * sizeof(float), rows_bytes = (size_t)B * S * H * D * sizeof(float),
         table_bytes = (size_t)S * PAIRS * sizeof(float);
  float *x[4], *cos_table = host_memory(table_bytes), *sin_table = host_memory(table_bytes), *weight = host_normals(59, D, false);
  void *there[4], *dev_cos, *dev_sin, *dev_rows[6], *dev_weight = device_of(t, weight, D * sizeof *weight);
  float *got[6], *want[6]; /* out, lse, d_q, d_k, d_v */
  for (int i = 0; i < S * PAIRS; i++)
    cos_table[i] = cosf((float)(i / PAIRS) * powf(100, -(float)(i % PAIRS) / PAIRS)),
    sin_table[i] = sinf((float)(i / PAIRS) * powf(100, -(float)(i % PAIRS) / PAIRS));
  dev_cos = device_of(t, cos_table, table_bytes), dev_sin = device_of(t, sin_table, table_bytes);
  for (int i = 0; i < 4; i++)
    x[i] = host_normals(60 + (uint64_t)i, (int64_t)B * BATCH, true), there[i] = device_of(t, x[i], bytes);
  for (int i = 0; i < 6; i++)
    got[i] = host_memory(rows_bytes), want[i] = host_memory(rows_bytes), dev_rows[i] = device_of(t, NULL, rows_bytes);
  for (int interleaved = 0; interleaved < 2; interleaved++)
    for (int side = 0; side < 2; side++) {
      sfa_context *ctx = side ? t->cpu : t->gpu;
      sfa_attention_options o = {.struct_size = sizeof o,
                                 .n_heads = H,
                                 .head_dim = D,
                                 .n_sequences = B,
                                 .max_seqlen_q = T,
                                 .max_seqlen_k = S,
                                 .k_q = 8,
                                 .k_k = 8,
                                 .causal = 1};
      sfa_rope rope = {side ? cos_table : dev_cos, side ? sin_table : dev_sin, 2 * PAIRS, interleaved};
      const sfa_row_norm of_rows = {side ? weight : dev_weight, 1e-5f}, *norm = normed ? &of_rows : NULL;
      void **in = side ? (void **)x : there, **out = side ? (void **)want : dev_rows;
      const sfa_rows q = {.data = in[0], .batch_stride = T * STRIDE + gap, .token_stride = STRIDE, .rope = &rope, .norm = norm},
                     k = {.data = in[1], .batch_stride = S * STRIDE + gap, .token_stride = STRIDE, .rope = &rope, .norm = norm},
                     v = {.data = in[2], .batch_stride = S * STRIDE + gap, .token_stride = STRIDE};
      sfa_attention_plan *plan = NULL;
      if (!cuda_ok(t, ctx, sfa_attention_plan_create(ctx, &o, &plan), "plan"))
        continue;
      size_t forward = sfa_attention_workspace_bytes(plan), backward = sfa_attention_backward_workspace_bytes(plan),
             most = forward > backward ? forward : backward;
      void *workspace = side ? host_memory(most) : device_of(t, NULL, most);
      sfa_attention_args args = {.struct_size = sizeof args, .q = q, .k = k, .v = v, .out = out[0], .lse = out[1], .workspace = workspace};
      sfa_attention_grad_args grad = {.struct_size = sizeof grad,
                                      .forward = &args,
                                      .d_out = in[3],
                                      .d_q = out[2],
                                      .d_k = out[3],
                                      .d_v = out[4],
                                      .workspace = workspace};
      cuda_ok(t, ctx, sfa_attention_run(plan, &args), "run with a rope");
      if (normed)
        cuda_expect(t, sfa_attention_backward(plan, &grad) == SFA_ERROR_UNSUPPORTED && strstr(sfa_context_error(ctx), "norm"),
                    "gradients through a norm: %s", sfa_context_error(ctx));
      else
        cuda_ok(t, ctx, sfa_attention_backward(plan, &grad), "gradients with a rope");
      const int n_written = normed ? 2 : 5;
      const int64_t counts[] = {B * T * H * D, B * T * H, B * T * H * D, B * S * H * D, B * S * H * D};
      for (int i = 0; !side && i < n_written; i++)
        fetch(t, got[i], dev_rows[i], (size_t)counts[i] * sizeof(float));
      side ? free(workspace) : sfa_memory_free(t->gpu, workspace);
      sfa_attention_plan_destroy(plan);
      static const char *const names[] = {"out", "lse", "d_q", "d_k", "d_v"};
      for (int i = 0; side && i < n_written; i++) {
        double most_error = 0, largest = 0;
        for (int64_t j = 0; j < counts[i]; j++) {
          double error = fabs((double)got[i][j] - (double)want[i][j]);
          most_error = !(error <= most_error) ? error : most_error;
          largest = fabs((double)want[i][j]) > largest ? fabs((double)want[i][j]) : largest;
        }
        cuda_expect(t, most_error <= 0.02 * largest,
                    "%d queries, gap %d, interleaved %d, normed %d, %s: differs by up to %g of %g from the CPU", T, gap, interleaved,
                    normed, names[i], most_error, largest);
      }
    }
  for (int i = 0; i < 4; i++)
    free(x[i]), sfa_memory_free(t->gpu, there[i]);
  for (int i = 0; i < 6; i++)
    free(got[i]), free(want[i]), sfa_memory_free(t->gpu, dev_rows[i]);
  sfa_memory_free(t->gpu, dev_cos), sfa_memory_free(t->gpu, dev_sin), sfa_memory_free(t->gpu, dev_weight);
  free(cos_table), free(sin_table), free(weight);
}

void cuda_check_rope(cuda_check *t) {
  for (int normed = 0; normed < 2; normed++) {
    rope_case(t, 140, 24, normed);
    rope_case(t, 3, 0, normed);
    rope_case(t, 3, 24, normed);
  }
}

void cuda_check_backward(cuda_check *t) {
  static const struct {
    const char *name;
    cuda_call c;
  } cases[] = {
      {"dense", {.o = {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 200, .max_seqlen_k = 200}}},
      {"sparse causal GQA",
       {.o =
            {.n_heads = 4, .n_kv_heads = 2, .head_dim = 128, .max_seqlen_q = 150, .max_seqlen_k = 150, .k_q = 16, .k_k = 16, .causal = 1}}},
      {"D 256", {.o = {.n_heads = 1, .head_dim = 256, .max_seqlen_q = 100, .max_seqlen_k = 140, .k_q = 16, .k_k = 16, .causal = 1}}},
      {"D 40, E 96", {.o = {.n_heads = 2, .head_dim = 40, .head_dim_v = 96, .max_seqlen_q = 130, .max_seqlen_k = 70, .k_k = 8}}},
      {"int8 keys", {.o = {.n_heads = 2, .head_dim = 64, .max_seqlen_q = 90, .max_seqlen_k = 130, .k_q = 8, .k_k = 8, .k_dtype = SFA_I8}}},
      {"lengths",
       {.o = {.n_heads = 2, .head_dim = 64, .n_sequences = 4, .max_seqlen_q = 271, .max_seqlen_k = 271, .k_q = 8, .k_k = 8, .causal = 1},
        .cu_q = lens_q,
        .cu_k = lens_k}},
      {"window, sinks, softcap",
       {.o = {.n_heads = 2,
              .head_dim = 64,
              .max_seqlen_q = 150,
              .max_seqlen_k = 150,
              .k_q = 8,
              .k_k = 8,
              .softmax_scale = 0.4f,
              .softcap = 3,
              .causal = 1,
              .has_window = 1,
              .window_size = {50, 0}},
        .sinks = true}},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    cuda_call c = cases[i].c;
    c.seed = 1000 + 50 * i;
    cuda_call_fill(&c);
    gradients(t, cases[i].name, &c, false);
    if (c.o.k_q && c.o.k_k)
      gradients(t, cases[i].name, &c, true);
    cuda_call_free(&c);
  }
}
