/* sfa_check --bench on AMX: the 16-bit ways through the public API, codes against the same keys scored as dense rows and against the dense
 * twin (k = 0), in nanoseconds a pair of query and key; and the kernels alone. One thread unless said. Candidates take turns; a ratio is
 * the median of the ratios within a round. */
#include "check.h"
#include <math.h>
#include <sfa/attention.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_ROUNDS = 15, MAX_TOKENS = 8192 };

static double now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(const double *x, int n) {
  double sorted[MAX_ROUNDS];
  memcpy(sorted, x, (size_t)n * sizeof *x);
  qsort(sorted, (size_t)n, sizeof *sorted, by_value);
  return sorted[n / 2];
}

static double median_ratio(const double *a, const double *b, int n) {
  double ratios[MAX_ROUNDS];
  for (int i = 0; i < n; i++)
    ratios[i] = a[i] / b[i];
  return median(ratios, n);
}

static void *memory(size_t bytes) {
  void *p = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (!p) {
    fprintf(stderr, "sfa_check: out of memory (%zu bytes)\n", bytes);
    exit(1);
  }
  memset(p, 0, bytes);
  return p;
}

static void must(sfa_context *ctx, sfa_status status) {
  if (status == SFA_OK)
    return;
  fprintf(stderr, "sfa_check: %s\n", sfa_context_error(ctx));
  exit(1);
}

/* ---- The public path ------------------------------------------------------------------------------------------------------------- */

typedef struct head {
  int D;
  float *q, *k, *v, *out; /* [n][D] */
  sfa_codes codes[2][2];  /* of q and k, k = 8 and 16 */
} head;

static void head_create(sfa_context *ctx, head *h, int D) {
  sfa_rng rng = {1};
  float **all[] = {&h->q, &h->k, &h->v, &h->out};
  h->D = D;
  for (int a = 0; a < 4; a++) {
    *all[a] = memory(sizeof(float) * MAX_TOKENS * (size_t)D);
    for (int64_t i = 0; i < (int64_t)MAX_TOKENS * D; i++)
      (*all[a])[i] = (float)sfa_rng_normal(&rng);
  }
  for (int side = 0; side < 2; side++)
    for (int kept = 0; kept < 2; kept++) {
      sfa_codes *codes = &h->codes[side][kept];
      int k = kept ? 16 : 8;
      must(ctx, sfa_codes_place(ctx, MAX_TOKENS, D, k, SFA_F32, memory(sfa_codes_bytes(MAX_TOKENS, D, k, SFA_F32)), codes));
      must(ctx, sfa_codes_select(ctx, side ? h->k : h->q, SFA_F32, D, codes));
    }
}

static void head_destroy(head *h) {
  for (int side = 0; side < 2; side++)
    for (int kept = 0; kept < 2; kept++)
      free(h->codes[side][kept].ids);
  free(h->q);
  free(h->k);
  free(h->v);
  free(h->out);
}

/* A way to do the call: k kept features (0: the dense twin), codes made before or by the call. */
typedef struct way {
  const char *name;
  int k;
  sfa_policy policy;
  bool ready;
} way;

static const way ways[] = {{"dense", 0, SFA_POLICY_HALF_DENSE, false},           {"k8 codes", 8, SFA_POLICY_HALF_CODES, true},
                           {"k8 written out", 8, SFA_POLICY_HALF_DENSE, true},   {"k16 codes", 16, SFA_POLICY_HALF_CODES, true},
                           {"k16 written out", 16, SFA_POLICY_HALF_DENSE, true}, {"k8 top-k and codes", 8, SFA_POLICY_HALF_CODES, false}};
enum { N_WAYS = sizeof ways / sizeof *ways };

typedef struct api_call {
  sfa_attention_plan *plan;
  sfa_attention_args args;
} api_call;

static api_call api_create(sfa_context *ctx, head *h, const way *w, int n, int causal) {
  const sfa_attention_options options = {.struct_size = sizeof options,
                                         .n_heads = 1,
                                         .head_dim = h->D,
                                         .max_seqlen_q = n,
                                         .max_seqlen_k = n,
                                         .k_q = w->k,
                                         .k_k = w->k,
                                         .causal = causal,
                                         .policy = w->policy};
  api_call call = {.args = {.struct_size = sizeof call.args, .q.data = h->q, .k.data = h->k, .v.data = h->v, .out = h->out}};
  must(ctx, sfa_attention_plan_create(ctx, &options, &call.plan));
  if (w->ready) {
    call.args.q_codes = &h->codes[0][w->k == 16];
    call.args.k_codes = &h->codes[1][w->k == 16];
  }
  call.args.workspace = memory(sfa_attention_workspace_bytes(call.plan));
  return call;
}

static void bench_api(sfa_context *ctx, head *h, int n, int causal, int n_rounds) {
  api_call calls[N_WAYS];
  double times[N_WAYS][MAX_ROUNDS], pairs = causal ? 0.5 * n * (n + 1.0) : (double)n * n;
  int64_t stages[N_WAYS][SFA_STAGE_COUNT] = {{0}};
  for (int w = 0; w < N_WAYS; w++) {
    calls[w] = api_create(ctx, h, &ways[w], n, causal);
    calls[w].args.stage_ns = stages[w];
  }
  for (int round = -1; round < n_rounds; round++)
    for (int w = 0; w < N_WAYS; w++) {
      const double start = now_ns();
      must(ctx, sfa_attention_run(calls[w].plan, &calls[w].args));
      if (round >= 0) /* the first one warms up */
        times[w][round] = now_ns() - start;
    }
  printf("amx d %3d n %4d %-6s %d threads", h->D, n, causal ? "causal" : "full", sfa_context_threads(ctx));
  for (int w = 0; w < N_WAYS; w++) {
    printf("%s %s %.3f", w ? "," : "", ways[w].name, median(times[w], n_rounds) / pairs);
    if (w)
      printf(" (%.2fx)", median_ratio(times[0], times[w], n_rounds));
    printf(" pack %.3f", (double)stages[w][SFA_STAGE_PACK] / (n_rounds + 1) / pairs);
  }
  printf(" ns a pair\n");
  fflush(stdout);
  for (int w = 0; w < N_WAYS; w++) {
    sfa_attention_plan_destroy(calls[w].plan);
    free(calls[w].args.workspace);
  }
}

/* ---- The kernels alone ----------------------------------------------------------------------------------------------------------- */

static void bench_kernels(const sfa_half_kernels *half, int D, int n_rounds) {
  enum { N = 2048, CHUNKS = N / SFA_HALF_CHUNK, N_PARTS = 9 };
  static const char *const names[N_PARTS] = {"codes k8", "codes k16",           "codes k16 shifted",    "dense",           "dense shifted",
                                             "values",   "codes k8 and values", "codes k16 and values", "dense and values"};
  const int W = sfa_half_width(D), Dp = sfa_half_padded(D);
  const size_t chunk = (size_t)SFA_HALF_CHUNK * (size_t)Dp;
  sfa_rng rng = {1};
  uint16_t *V = memory(CHUNKS * chunk * 2), *keys = memory(CHUNKS * chunk * 2), *Qt = memory((size_t)D * (size_t)W * 2),
           *Q = memory((size_t)Dp * (size_t)W * 2), *P = memory((size_t)W / 32 * SFA_HALF_WEIGHTS_STRIDE * 2);
  uint32_t *values[2] = {memory(N * 8 * 4), memory(N * 16 * 4)};
  uint16_t *offsets[2] = {memory(N * 8 * 2), memory(N * 16 * 2)};
  float *O = memory((size_t)Dp * (size_t)W * 4), *l = memory((size_t)W * 4), *shift = memory((size_t)W * 4), rows[32][256], codes[32 * 16];
  float *squares = memory((size_t)W * 4), *q_tile = memory((size_t)D * (size_t)W * 4);
  int16_t *top = memory((size_t)W * 2);
  uint8_t ids[32 * 16];
  for (int64_t i = 0; i < (int64_t)D * W; i++)
    q_tile[i] = (float)sfa_rng_normal(&rng) / sqrtf((float)D);
  half->query_codes(0, W, D, q_tile, SFA_HALF_OCTAVE, W, Qt, squares);
  half->query_dense(0, W, D, q_tile, 1, Q, squares);
  for (int step = 0; step < N / 32; step++) {
    size_t at = (size_t)(step / SFA_HALF_STEPS);
    for (int j = 0; j < 32; j++)
      for (int u = 0; u < D; u++)
        rows[j][u] = (float)sfa_rng_normal(&rng);
    half->pack_values(step % SFA_HALF_STEPS, 32, D, rows[0], 256, V + at * chunk);
    half->pack_keys(step % SFA_HALF_STEPS, 32, D, rows[0], 256, keys + at * chunk);
    for (int kept = 0; kept < 2; kept++) {
      int K = kept ? 16 : 8;
      for (int u = 0; u < 32 * K; u++) {
        codes[u] = (float)sfa_rng_normal(&rng);
        ids[u] = (uint8_t)(u % K * (D / K) + (int)(sfa_rng_next(&rng) % (uint64_t)(D / K)));
      }
      half->pack_codes(step % SFA_HALF_STEPS, 32, K, ids, 1, codes, W, values[kept] + at * SFA_HALF_CHUNK * (size_t)K,
                       offsets[kept] + at * SFA_HALF_CHUNK * (size_t)K);
    }
  }
  double times[N_PARTS][MAX_ROUNDS];
  for (int round = -1; round < n_rounds; round++)
    for (int part = 0; part < N_PARTS; part++) {
      const double start = now_ns();
      half->begin();
      for (int again = 0; again < 4; again++)
        for (size_t c = 0; c < CHUNKS; c++) {
          const int kept = part > 0 && part != 6, K = kept ? 16 : 8;
          const bool far = part == 2 || part == 4;
          if (part < 3 || part == 6 || part == 7)
            half->weights_codes(0, SFA_HALF_STEPS, K, values[kept] + c * SFA_HALF_CHUNK * (size_t)K,
                                offsets[kept] + c * SFA_HALF_CHUNK * (size_t)K, W, Qt, far ? shift : NULL, NULL, far ? top : NULL, P);
          if (part == 3 || part == 4 || part == 8)
            half->weights_dense(0, SFA_HALF_STEPS, D, keys + c * chunk, W, Q, SFA_HALF_OCTAVE, far ? shift : NULL, NULL, far ? top : NULL,
                                P);
          if (part >= 5)
            half->accumulate(0, SFA_HALF_STEPS, D, V + c * chunk, W, P, O, l);
        }
      half->end();
      if (round >= 0)
        times[part][round] = now_ns() - start;
    }
  printf("amx d %3d kernels:", D);
  for (int part = 0; part < N_PARTS; part++)
    printf("%s %s %.3f", part ? "," : "", names[part], median(times[part], n_rounds) / (4.0 * N * W));
  printf(" ns a pair\n");
  void *all[] = {V, keys, Qt, Q, P, values[0], values[1], offsets[0], offsets[1], O, l, shift, squares, q_tile, top};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    free(all[i]);
}

void check_bench_half(bool quick) {
  const sfa_half_kernels *half = sfa_half_kernel_select(SFA_ISA_AMX);
  if (!half)
    return;
  for (int threads = 1; threads >= 0; threads--) { /* one, then all */
    const sfa_context_options options = {.struct_size = sizeof options, .n_threads = threads, .isa = SFA_ISA_AMX};
    sfa_context *ctx = NULL;
    must(ctx, sfa_context_create(&options, &ctx));
    for (int D = 64; D <= 256; D *= 2) {
      head h;
      head_create(ctx, &h, D);
      if (threads)
        bench_kernels(half, D, quick ? 5 : MAX_ROUNDS);
      for (int n = quick ? 2048 : 1024; n <= MAX_TOKENS; n *= quick ? 4 : 2)
        for (int causal = 0; causal < 2; causal++)
          bench_api(ctx, &h, n, causal, n < 4096 ? 9 : quick ? 3 : 5);
      head_destroy(&h);
    }
    sfa_context_destroy(ctx);
  }
}
