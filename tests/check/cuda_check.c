/* cuda_check: the public API on a GPU against the oracle and against the CPU. Skipped (exit status 77) where there is no GPU.
 *
 *     cuda_check [--device N] [NAME...]     tests whose name holds one of the texts; none: all
 *
 * With SFA_CUDA_LIBRARY=cuda_host.so the stages are plain loops on the host (cuda_host.c), and what is tested is all that lies before them.
 */
#include "cuda_check.h"

#include "base/half.h"
#include "base/rng.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SKIPPED = 77 };

bool cuda_expect(cuda_check *t, bool good, const char *format, ...) {
  t->n_checks++;
  if (good)
    return true;
  t->n_failures++;
  printf("FAILED %s: ", t->test);
  va_list args;
  va_start(args, format);
  vprintf(format, args);
  va_end(args);
  printf("\n");
  return false;
}

bool cuda_ok(cuda_check *t, sfa_context *ctx, sfa_status status, const char *what) {
  return cuda_expect(t, status == SFA_OK, "%s: %s: %s", what, sfa_status_name(status), sfa_context_error(ctx));
}

/* ---- Memory ---------------------------------------------------------------------------------------------------------- */

void *host_memory(size_t bytes) {
  size_t whole = (bytes + 127) / 64 * 64;
  void *p = aligned_alloc(64, whole);
  if (!p) {
    fprintf(stderr, "out of memory: %zu bytes\n", bytes);
    exit(2);
  }
  memset(p, 0xff, whole);
  return p;
}

float *host_normals(uint64_t seed, int64_t n, bool bf16) {
  sfa_rng rng = {seed};
  float *x = host_memory((size_t)n * sizeof *x);
  for (int64_t i = 0; i < n; i++) {
    x[i] = (float)sfa_rng_normal(&rng);
    if (bf16)
      x[i] = sfa_f32_from_bf16(sfa_bf16_from_f32(x[i]));
  }
  return x;
}

void *device_of(cuda_check *t, const void *from, size_t bytes) {
  void *p = NULL, *ones = from ? NULL : host_memory(bytes);
  cuda_ok(t, t->gpu, sfa_memory_alloc(t->gpu, bytes ? bytes : 1, &p), "sfa_memory_alloc");
  if (p && bytes)
    cuda_ok(t, t->gpu, sfa_memory_copy(t->gpu, p, from ? from : ones, bytes), "sfa_memory_copy");
  free(ones);
  return p;
}

void fetch(cuda_check *t, void *to, const void *from, size_t bytes) {
  cuda_ok(t, t->gpu, sfa_memory_copy(t->gpu, to, from, bytes), "sfa_memory_copy");
  cuda_ok(t, t->gpu, sfa_stream_wait(t->gpu), "sfa_stream_wait");
}

/* ---- One call -------------------------------------------------------------------------------------------------------- */

static int64_t tokens_of(const int32_t *cu, int32_t n_sequences, int64_t most) { return cu ? cu[n_sequences] : n_sequences * most; }

void cuda_call_fill(cuda_call *c) {
  sfa_attention_options *o = &c->o;
  o->struct_size = sizeof *o;
  o->n_sequences = o->n_sequences ? o->n_sequences : 1;
  o->n_kv_heads = o->n_kv_heads ? o->n_kv_heads : o->n_heads;
  o->head_dim_v = o->head_dim_v ? o->head_dim_v : o->head_dim;
  c->n_q = tokens_of(c->cu_q, o->n_sequences, o->max_seqlen_q);
  c->n_k = tokens_of(c->cu_k, o->n_sequences, o->max_seqlen_k);
  c->q = host_normals(c->seed, c->n_q * o->n_heads * o->head_dim, true);
  c->k = host_normals(c->seed + 1, c->n_k * o->n_kv_heads * o->head_dim, true);
  c->v = host_normals(c->seed + 2, c->n_k * o->n_kv_heads * o->head_dim_v, true);
  c->sink_logit = c->sinks ? host_normals(c->seed + 3, o->n_heads, false) : NULL;
  c->alibi_slopes = c->alibi ? host_memory((size_t)o->n_heads * sizeof(float)) : NULL;
  for (int32_t h = 0; c->alibi && h < o->n_heads; h++)
    c->alibi_slopes[h] = ldexpf(1, -2 - h % 8);
  c->out = host_memory((size_t)(c->n_q * o->n_heads * o->head_dim_v) * sizeof(float));
  c->lse = host_memory((size_t)(c->n_q * o->n_heads) * sizeof(float));
  c->dropped = host_memory((size_t)(c->n_q * o->n_heads) * sizeof(float));
}

void cuda_call_free(cuda_call *c) {
  void *all[] = {c->q, c->k, c->v, c->sink_logit, c->alibi_slopes, c->out, c->lse, c->dropped, c->ref, c->ref_lse, c->naive};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    free(all[i]);
}

/* Rows [n][width] as the call brings them: f32 or bf16, NaN in the gaps between tokens. */
static void *device_rows(cuda_check *t, const cuda_call *c, const float *x, int64_t n, int64_t width) {
  const int64_t stride = width + c->gap;
  const size_t element = c->bf16 ? sizeof(uint16_t) : sizeof(float);
  unsigned char *rows = host_memory((size_t)(n * stride) * element);
  for (int64_t i = 0; i < n * width; i++) {
    const int64_t at = i / width * stride + i % width;
    if (c->bf16)
      ((uint16_t *)(void *)rows)[at] = sfa_bf16_from_f32(x[i]);
    else
      ((float *)(void *)rows)[at] = x[i];
  }
  void *p = device_of(t, rows, (size_t)(n * stride) * element);
  free(rows);
  return p;
}

static sfa_rows rows_with_gaps(const cuda_call *c, const void *data, int64_t n_tokens, int64_t width) {
  return (sfa_rows){
      .data = data, .dtype = c->bf16 ? SFA_BF16 : SFA_F32, .batch_stride = n_tokens * (width + c->gap), .token_stride = width + c->gap};
}

bool cuda_call_run(cuda_check *t, cuda_call *c) {
  const sfa_attention_options *o = &c->o;
  sfa_attention_plan *plan = NULL;
  if (!cuda_ok(t, t->gpu, sfa_attention_plan_create(t->gpu, o, &plan), "plan"))
    return false;
  size_t out_bytes = (size_t)(c->n_q * o->n_heads * o->head_dim_v) * sizeof(float),
         lse_bytes = (size_t)(c->n_q * o->n_heads) * sizeof(float);
  const int64_t q_width = o->n_heads * o->head_dim, k_width = o->n_kv_heads * o->head_dim, v_width = o->n_kv_heads * o->head_dim_v;
  size_t cu_bytes = (size_t)(o->n_sequences + 1) * sizeof(int32_t), head_bytes = (size_t)o->n_heads * sizeof(float);
  void *q = device_rows(t, c, c->q, c->n_q, q_width), *k = device_rows(t, c, c->k, c->n_k, k_width);
  void *v = device_rows(t, c, c->v, c->n_k, v_width), *out = device_of(t, NULL, out_bytes);
  void *lse = device_of(t, NULL, lse_bytes), *dropped = device_of(t, NULL, lse_bytes);
  void *workspace = device_of(t, NULL, sfa_attention_workspace_bytes(plan));
  void *cu_q = c->cu_q ? device_of(t, c->cu_q, cu_bytes) : NULL, *cu_k = c->cu_k ? device_of(t, c->cu_k, cu_bytes) : NULL;
  void *sinks = c->sink_logit ? device_of(t, c->sink_logit, head_bytes) : NULL;
  void *slopes = c->alibi_slopes ? device_of(t, c->alibi_slopes, head_bytes) : NULL;
  sfa_attention_args args = {.struct_size = sizeof args,
                             .q = rows_with_gaps(c, q, o->max_seqlen_q, q_width),
                             .k = rows_with_gaps(c, k, o->max_seqlen_k, k_width),
                             .v = rows_with_gaps(c, v, o->max_seqlen_k, v_width),
                             .cu_seqlens_q = cu_q,
                             .cu_seqlens_k = cu_k,
                             .sink_logit = sinks,
                             .alibi_slopes = slopes,
                             .out = out,
                             .lse = c->only_out ? NULL : lse,
                             .dropped = c->only_out ? NULL : dropped,
                             .workspace = workspace};
  bool good = cuda_ok(t, t->gpu, sfa_attention_run(plan, &args), "run");
  if (good) {
    fetch(t, c->out, out, out_bytes);
    if (!c->only_out)
      fetch(t, c->lse, lse, lse_bytes), fetch(t, c->dropped, dropped, lse_bytes);
  }
  void *all[] = {q, k, v, out, lse, dropped, workspace, cu_q, cu_k, sinks, slopes};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    sfa_memory_free(t->gpu, all[i]);
  sfa_attention_plan_destroy(plan);
  return good;
}

/* ---- References ------------------------------------------------------------------------------------------------------ */

oracle_problem cuda_call_problem(const cuda_call *c, int32_t b, int64_t *q0, int64_t *k0) {
  const sfa_attention_args rows = {.q.data = c->q,
                                   .k.data = c->k,
                                   .v.data = c->v,
                                   .cu_seqlens_q = c->cu_q,
                                   .cu_seqlens_k = c->cu_k,
                                   .sink_logit = c->sink_logit,
                                   .alibi_slopes = c->alibi_slopes};
  return oracle_of(&c->o, &rows, b, q0, k0);
}

/* Rows as naive code has them: what is kept, rounded as stored, then to bf16 or int8. */
static float *naive_rows(const float *x, int64_t n_rows, int d, int k, int storage, bool whole) {
  float *rows = host_memory((size_t)(n_rows * d) * sizeof *rows);
  int *ids = host_memory((size_t)d * sizeof *ids);
  for (int64_t i = 0; i < n_rows; i++) {
    float *row = rows + i * d;
    memcpy(row, x + i * d, (size_t)d * sizeof *row);
    if (k && k < d) {
      oracle_topk(x + i * d, d, k, ids);
      memset(row, 0, (size_t)d * sizeof *row);
      for (int u = 0; u < k; u++)
        row[ids[u]] = x[i * d + ids[u]];
    }
    oracle_round(row, d, storage);
    oracle_round(row, d, whole ? ORACLE_I8 : ORACLE_BF16);
  }
  free(ids);
  return rows;
}

/* Attention with such rows, weights in bf16, sums in f32. */
static void naive_attention(const oracle_problem *p, bool whole, float *out) {
  int H = p->n_heads, G = p->n_kv_heads, D = p->head_dim, E = p->head_dim_v;
  float *q = naive_rows(p->q, (int64_t)p->n_queries * H, D, p->k_q, ORACLE_F32, whole);
  float *k = naive_rows(p->k, (int64_t)p->n_keys * G, D, p->k_k, p->k_storage, whole);
  float *v = naive_rows(p->v, (int64_t)p->n_keys * G, E, 0, p->v_storage, false);
  float *s = host_memory((size_t)p->n_keys * sizeof *s), scale = p->softmax_scale != 0 ? (float)p->softmax_scale : 1 / sqrtf((float)D);
  for (int64_t row = 0; row < (int64_t)p->n_queries * H; row++) {
    int t = (int)(row / H), h = (int)(row % H), g = h / (H / G);
    float m = p->sink_logit ? p->sink_logit[h] : -INFINITY, l = 0;
    for (int j = 0; j < p->n_keys; j++) {
      s[j] = -INFINITY;
      if (!oracle_sees(p, t, j))
        continue;
      float sum = 0;
      for (int u = 0; u < D; u++)
        sum += q[row * D + u] * k[((int64_t)j * G + g) * D + u];
      s[j] = sum * scale;
      if (p->softcap > 0)
        s[j] = (float)p->softcap * tanhf(s[j] / (float)p->softcap);
      if (p->alibi_slopes)
        s[j] += p->alibi_slopes[h] * (float)(j - (t + p->n_keys - p->n_queries));
      m = s[j] > m ? s[j] : m;
    }
    float *o = out + row * E;
    memset(o, 0, (size_t)E * sizeof *o);
    for (int j = 0; j < p->n_keys; j++) {
      if (s[j] == -INFINITY)
        continue;
      float weight = expf(s[j] - m), rounded = sfa_f32_from_bf16(sfa_bf16_from_f32(weight));
      l += weight;
      for (int e = 0; e < E; e++)
        o[e] += rounded * v[((int64_t)j * G + g) * E + e];
    }
    l += p->sink_logit ? expf(p->sink_logit[h] - m) : 0;
    for (int e = 0; e < E; e++)
      o[e] = l == 0 ? 0 : o[e] / l;
  }
  free(q), free(k), free(v), free(s);
}

void cuda_call_reference(cuda_call *c, bool whole) {
  const sfa_attention_options *o = &c->o;
  int64_t n = c->n_q * o->n_heads, width = o->head_dim_v;
  free(c->ref), free(c->ref_lse), free(c->naive);
  c->ref = host_memory((size_t)(n * width) * sizeof *c->ref);
  c->ref_lse = host_memory((size_t)n * sizeof *c->ref_lse);
  c->naive = host_memory((size_t)(n * width) * sizeof *c->naive);
  for (int32_t b = 0; b < o->n_sequences; b++) {
    int64_t q0, k0;
    oracle_problem p = cuda_call_problem(c, b, &q0, &k0);
    oracle_attention_f64(&p, c->ref + q0 * o->n_heads * width, c->ref_lse + q0 * o->n_heads);
    naive_attention(&p, whole, c->naive + q0 * o->n_heads * width);
  }
}

void cuda_expect_close(cuda_check *t, const char *what, int64_t n, const float *out, const double *ref, const float *naive) {
  double most = 0, naive_most = 0, squares = 0, naive_squares = 0, largest = 0;
  int64_t worst = 0;
  for (int64_t i = 0; i < n; i++) {
    double error = fabs(out[i] - ref[i]), naive_error = fabs(naive[i] - ref[i]);
    if (!(error <= most))
      most = error, worst = i;
    naive_most = naive_error > naive_most ? naive_error : naive_most;
    squares += error * error;
    naive_squares += naive_error * naive_error;
    largest = fabs(ref[i]) > largest ? fabs(ref[i]) : largest;
  }
  double floor = 2 * ldexp(largest, -23), count = (double)(n ? n : 1);
  cuda_expect(t, most <= 2 * naive_most + floor && sqrt(squares / count) <= 2 * sqrt(naive_squares / count) + floor,
              "%s: error up to %.3g (naive %.3g), RMS %.3g (naive %.3g), worst at %lld: %.7g for %.7g", what, most, naive_most,
              sqrt(squares / count), sqrt(naive_squares / count), (long long)worst, (double)(n ? out[worst] : 0), n ? ref[worst] : 0);
}

/* ---- Main ------------------------------------------------------------------------------------------------------------ */

static const struct {
  const char *name;
  void (*run)(cuda_check *t);
  bool of_hopper;
} tests[] = {
    {"devices", cuda_check_devices, false}, {"choices", cuda_check_choices, false},     {"memory", cuda_check_memory, false},
    {"select", cuda_check_select, false},   {"attention", cuda_check_attention, false}, {"codes", cuda_check_codes, false},
    {"keep", cuda_check_keep, false},       {"merge", cuda_check_merge, false},         {"refusals", cuda_check_refusals, false},
    {"needles", cuda_check_needles, false}, {"cache", cuda_check_cache, false},         {"slots", cuda_check_slots, false},
    {"decode", cuda_check_decode, false},   {"backward", cuda_check_backward, true},    {"rope", cuda_check_rope, true},
    {"long", cuda_check_long, false},       {"streams", cuda_check_streams, false},     {"lost", cuda_check_lost, false},
#ifdef CUDA_CHECK_GRAPHS
    {"graph", cuda_check_graph, false},
#endif
};

int main(int argc, char **argv) {
  char why[512] = "";
  cuda_check t = {0};
  sfa_context_options o = {.struct_size = sizeof o, .device = SFA_DEVICE_CUDA, .why = why, .why_bytes = sizeof why};
  setvbuf(stdout, NULL, _IOLBF, 0);
  if (argc > 2 && strcmp(argv[1], "--device") == 0) {
    o.device_index = atoi(argv[2]);
    argc -= 2, argv += 2;
  }
  if (sfa_context_create(NULL, &t.cpu) != SFA_OK)
    return 2;
  if (sfa_context_create(&o, &t.gpu) != SFA_OK) {
    printf("skipped: %s\n", why);
    sfa_context_destroy(t.cpu);
    return SKIPPED;
  }
  if (argc == 2 && strcmp(argv[1], "--lose") == 0)
    return cuda_lose_gpu(&t);
  t.of_hopper = cuda_has_hopper(t.gpu);
  for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
    bool wanted = argc < 2;
    for (int a = 1; a < argc; a++)
      wanted = wanted || strstr(tests[i].name, argv[a]);
    if (!wanted)
      continue;
    if (tests[i].of_hopper && !t.of_hopper) {
      printf("%-10s not on this GPU\n", tests[i].name);
      continue;
    }
    int before = t.n_checks, failures = t.n_failures;
    t.test = tests[i].name;
    tests[i].run(&t);
    printf("%-10s %5d checks, %d failed\n", tests[i].name, t.n_checks - before, t.n_failures - failures);
  }
  sfa_context_destroy(t.gpu);
  sfa_context_destroy(t.cpu);
  return t.n_failures > 0;
}
