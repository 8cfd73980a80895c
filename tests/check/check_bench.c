/* sfa_check --bench: how long the slots take, and a forward of one head: 4096 tokens, full attention, codes ready, V in f32, one thread.
 * "slots" composes it here of the kernels alone, "api" is sfa_attention_run. All candidates take turns; times are medians over the
 * rounds in processor time of the thread, and ratios medians of the ratios within a round, so that a busy neighbour meets both sides. */
#include "check_bench.h"
#include "base/half.h"
#include "check.h"
#include <math.h>
#include <sfa/attention.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { N_TOKENS = 4096, WIDTH = 64, MAX_ROUNDS = 31 };

double check_clock_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static int by_value(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

double check_median(double *x, int n) {
  qsort(x, (size_t)n, sizeof *x, by_value);
  return x[n / 2];
}

void check_must(sfa_context *ctx, sfa_status status) {
  if (status == SFA_OK)
    return;
  fprintf(stderr, "sfa_check: %s\n", sfa_context_error(ctx));
  exit(1);
}

void *check_block(size_t bytes) {
  void *p = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (!p) {
    fprintf(stderr, "sfa_check: out of memory (%zu bytes)\n", bytes);
    exit(1);
  }
  memset(p, 0, bytes);
  return p;
}

/* ---- The data of a head ---- */

enum { DENSE = 0, K8 = 8, K16 = 16 };

typedef struct head {
  int D;
  float *q, *k, *v;   /* [n][D] */
  const float **rows; /* [n] of q */
  sfa_codes codes[2]; /* of k at K = 8 and 16, in f32 */
  sfa_codes q_codes[2];
  float *Qt, *S, *O, *m, *l, *alpha, *out;
} head;

static float *normal_rows(sfa_rng *rng, int64_t n) {
  float *x = check_block((size_t)n * sizeof *x);
  for (int64_t i = 0; i < n; i++)
    x[i] = (float)sfa_rng_normal(rng);
  return x;
}

static sfa_codes codes_of(const sfa_kernels *kernels, const float *x, int D, int K) {
  sfa_codes codes = {.n_rows = N_TOKENS, .head_dim = D, .k = K, .dtype = SFA_F32};
  codes.ids = check_block((size_t)N_TOKENS * (size_t)K);
  codes.values = check_block((size_t)N_TOKENS * (size_t)K * sizeof(float));
  kernels->topk(N_TOKENS, x, D, D, K, codes.ids, codes.values);
  return codes;
}

static void head_create(head *h, const sfa_kernels *kernels, int D) {
  sfa_rng rng = {1};
  *h = (head){.D = D};
  h->q = normal_rows(&rng, (int64_t)N_TOKENS * D);
  h->k = normal_rows(&rng, (int64_t)N_TOKENS * D);
  h->v = normal_rows(&rng, (int64_t)N_TOKENS * D);
  h->rows = check_block(N_TOKENS * sizeof *h->rows);
  for (int i = 0; i < N_TOKENS; i++)
    h->rows[i] = h->q + (int64_t)i * D;
  for (int s = 0; s < 2; s++) {
    h->codes[s] = codes_of(kernels, h->k, D, s ? K16 : K8);
    h->q_codes[s] = codes_of(kernels, h->q, D, s ? K16 : K8);
  }
  /* One block, as attention lays its scratch: arrays that all begin at a page would meet in the same sets of the L1. */
  h->Qt = check_block(((size_t)WIDTH * (2 * (size_t)D + SFA_KEY_TILE + 3)) * sizeof(float));
  h->S = h->Qt + (size_t)WIDTH * (size_t)D;
  h->O = h->S + WIDTH * SFA_KEY_TILE;
  h->m = h->O + (size_t)WIDTH * (size_t)D;
  h->l = h->m + WIDTH;
  h->alpha = h->l + WIDTH;
  h->out = check_block((size_t)N_TOKENS * (size_t)D * sizeof(float));
}

static void head_destroy(head *h) {
  void *all[] = {h->q, h->k, h->v, h->rows, h->Qt, h->out};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    free(all[i]);
  for (int s = 0; s < 2; s++) {
    free(h->codes[s].ids);
    free(h->codes[s].values);
    free(h->q_codes[s].ids);
    free(h->q_codes[s].values);
  }
}

enum { SCORES = 1, WEIGHTS = 2, VALUES = 4, ALL = 7 };

/* The tile loop of attention, or some of its parts. */
static void forward(const sfa_kernels *kernels, head *h, int K, int parts) {
  const int D = h->D;
  const sfa_codes *codes = &h->codes[K == K16], *q_codes = &h->q_codes[K == K16];
  const float scale = 1.442695f / sqrtf((float)D);
  for (int first = 0; first < N_TOKENS; first += WIDTH) {
    const void *id_rows[WIDTH];
    const float *value_rows[WIDTH];
    for (int i = 0; i < WIDTH; i++) {
      id_rows[i] = (const uint8_t *)q_codes->ids + (first + i) * K;
      value_rows[i] = (const float *)q_codes->values + (first + i) * K;
      h->m[i] = -INFINITY;
      h->l[i] = 0.0f;
    }
    if (K)
      kernels->query_tile_codes(WIDTH, id_rows, 1, value_rows, K, D, WIDTH, scale, h->Qt);
    else
      kernels->query_tile(WIDTH, h->rows + first, D, WIDTH, scale, h->Qt);
    memset(h->O, 0, WIDTH * (size_t)D * sizeof *h->O);
    for (int key = 0; key < N_TOKENS; key += SFA_KEY_TILE) {
      int changed = 0;
      if ((parts & SCORES) && K)
        kernels->score_codes(SFA_KEY_TILE, K, (const uint8_t *)codes->ids + key * K, 1, (const float *)codes->values + key * K, NULL, h->Qt,
                             WIDTH, h->S);
      else if (parts & SCORES)
        kernels->score_dense(SFA_KEY_TILE, D, h->k + (int64_t)key * D, D, NULL, h->Qt, WIDTH, h->S);
      if (parts & WEIGHTS)
        changed = kernels->softmax_tile(SFA_KEY_TILE, WIDTH, h->S, h->m, h->l, h->alpha);
      if ((parts & VALUES) && changed)
        kernels->rescale(WIDTH, D, h->alpha, h->O);
      if (parts & VALUES)
        kernels->value_product(WIDTH, SFA_KEY_TILE, WIDTH, h->S, D, h->v + (int64_t)key * D, D, h->O);
    }
  }
}

/* ---- The public path ---- */

typedef struct api_call {
  sfa_attention_plan *plan;
  sfa_attention_args args;
} api_call;

static void must(sfa_context *ctx, sfa_status status) {
  if (status == SFA_OK)
    return;
  fprintf(stderr, "sfa_check: %s\n", sfa_context_error(ctx));
  exit(1);
}

static api_call api_create(sfa_context *ctx, head *h, int K) {
  api_call call = {
      NULL, {.struct_size = sizeof(sfa_attention_args), .q = {.data = h->q}, .k = {.data = h->k}, .v = {.data = h->v}, .out = h->out}};
  const sfa_attention_options options = {.struct_size = sizeof options,
                                         .n_heads = 1,
                                         .head_dim = h->D,
                                         .max_seqlen_q = N_TOKENS,
                                         .max_seqlen_k = N_TOKENS,
                                         .k_q = K,
                                         .k_k = K};
  must(ctx, sfa_attention_plan_create(ctx, &options, &call.plan));
  if (K) {
    call.args.q_codes = &h->q_codes[K == K16];
    call.args.k_codes = &h->codes[K == K16];
  }
  call.args.workspace = check_block(sfa_attention_workspace_bytes(call.plan));
  return call;
}

static void api_destroy(api_call *call) {
  sfa_attention_plan_destroy(call->plan);
  free(call->args.workspace);
}

/* ---- The report ---- */

enum { QK, EXP, PV, SLOTS_DENSE, SLOTS_K8, SLOTS_K16, API_DENSE, API_K8, API_K16, TOPK_8, TOPK_16, N_CANDIDATES };

static void run(sfa_context *ctx, const sfa_kernels *kernels, head *h, api_call calls[3], int candidate) {
  switch (candidate) {
  case QK: forward(kernels, h, DENSE, SCORES); break;
  case EXP: forward(kernels, h, DENSE, WEIGHTS); break;
  case PV: forward(kernels, h, DENSE, VALUES); break;
  case SLOTS_DENSE: forward(kernels, h, DENSE, ALL); break;
  case SLOTS_K8: forward(kernels, h, K8, ALL); break;
  case SLOTS_K16: forward(kernels, h, K16, ALL); break;
  case TOPK_8:
  case TOPK_16: { /* of q and of k */
    const sfa_codes *codes = &h->codes[candidate == TOPK_16];
    kernels->topk(N_TOKENS, h->q, h->D, h->D, codes->k, codes->ids, codes->values);
    kernels->topk(N_TOKENS, h->k, h->D, h->D, codes->k, codes->ids, codes->values);
    break;
  }
  default: must(ctx, sfa_attention_run(calls[candidate - API_DENSE].plan, &calls[candidate - API_DENSE].args));
  }
}

/* Median over the rounds of numerator / (sum of the denominators): the two stand next to each other in time. */
static double ratio(double times[N_CANDIDATES][MAX_ROUNDS], int n_rounds, int numerator, int first, int last) {
  double ratios[MAX_ROUNDS];
  for (int round = 0; round < n_rounds; round++) {
    double sum = 0;
    for (int c = first; c <= last; c++)
      sum += times[c][round];
    ratios[round] = times[numerator][round] / sum;
  }
  return check_median(ratios, n_rounds);
}

static void bench_head(const sfa_kernels *kernels, int D, int n_rounds) {
  const sfa_context_options options = {.struct_size = sizeof options, .n_threads = 1, .isa = kernels->isa};
  sfa_context *ctx = NULL;
  head h;
  double times[N_CANDIDATES][MAX_ROUNDS], ms[N_CANDIDATES];
  must(ctx, sfa_context_create(&options, &ctx));
  head_create(&h, kernels, D);
  api_call calls[3] = {api_create(ctx, &h, DENSE), api_create(ctx, &h, K8), api_create(ctx, &h, K16)};
  for (int round = -1; round < n_rounds; round++)
    for (int c = 0; c < N_CANDIDATES; c++) {
      const double start = check_clock_ms();
      run(ctx, kernels, &h, calls, c);
      if (round >= 0) /* the first one warms up */
        times[c][round] = check_clock_ms() - start;
    }
  const char *isa = sfa_isa_name(kernels->isa);
  double top[2];
  for (int k = 0; k < 2; k++)
    top[k] = 100 * ratio(times, n_rounds, TOPK_8 + k, API_K8 + k, API_K8 + k);
  double ratios[2][3];
  for (int way = 0; way < 2; way++) {
    const int dense = way ? API_DENSE : SLOTS_DENSE;
    ratios[way][0] = ratio(times, n_rounds, dense, QK, PV);
    for (int k = 1; k < 3; k++)
      ratios[way][k] = ratio(times, n_rounds, dense, dense + k, dense + k);
  }
  for (int c = 0; c < N_CANDIDATES; c++)
    ms[c] = check_median(times[c], n_rounds);
  printf("%-6s d %3d parts of dense: QK %.2f ms, exp %.2f, PV %.2f\n", isa, D, ms[QK], ms[EXP], ms[PV]);
  for (int way = 0; way < 2; way++) {
    const double *t = ms + (way ? API_DENSE : SLOTS_DENSE);
    printf("%-6s d %3d %-5s dense %7.2f ms, %.2f of its parts   k 8 %7.2f ms, ratio %.2f   k 16 %7.2f ms, ratio %.2f\n", isa, D,
           way ? "api" : "slots", t[0], ratios[way][0], t[1], ratios[way][1], t[2], ratios[way][2]);
  }
  printf("%-6s d %3d top-k k 8 %.0f ns a row, %.1f %% of a forward   k 16 %.0f ns, %.1f %%\n", isa, D, ms[TOPK_8] * 1e6 / (2 * N_TOKENS),
         top[0], ms[TOPK_16] * 1e6 / (2 * N_TOKENS), top[1]);
  fflush(stdout);
  for (int c = 0; c < 3; c++)
    api_destroy(&calls[c]);
  head_destroy(&h);
  sfa_context_destroy(ctx);
}

/* The slots that stand beside the forward, in ns a row of 128. */
static void bench_rows(const sfa_kernels *kernels, int n_rounds) {
  enum { D = 128, N_WAYS = 5 };
  static const char *const names[N_WAYS] = {"quantize_i8", "load_rows i8", "load_rows bf16", "store_rows bf16", "merge"};
  sfa_rng rng = {1};
  float *x = normal_rows(&rng, (int64_t)N_TOKENS * D), *out = normal_rows(&rng, (int64_t)N_TOKENS * D),
        *m = normal_rows(&rng, 4 * N_TOKENS);
  int8_t *bytes = check_block((size_t)N_TOKENS * D);
  uint16_t *words = check_block((size_t)N_TOKENS * D * 2), *scales = check_block(N_TOKENS * 2);
  double times[N_WAYS][MAX_ROUNDS];
  for (int round = 0; round < n_rounds; round++)
    for (int way = 0; way < N_WAYS; way++) {
      const double start = check_clock_ms();
      switch (way) {
      case 0: kernels->quantize_i8(N_TOKENS, D, x, D, bytes, D, scales); break;
      case 1: kernels->load_rows(N_TOKENS, D, SFA_I8, bytes, D, scales, out, D); break;
      case 2: kernels->load_rows(N_TOKENS, D, SFA_BF16, words, D, NULL, out, D); break;
      case 3: kernels->store_rows(N_TOKENS, D, x, D, SFA_BF16, words, D); break;
      default: kernels->merge(N_TOKENS, D, m, m + N_TOKENS, out, m + 2 * N_TOKENS, m + 3 * N_TOKENS, x);
      }
      times[way][round] = check_clock_ms() - start;
    }
  for (int way = 0; way < N_WAYS; way++)
    printf("%-6s %-16s %.0f ns a row of %d\n", sfa_isa_name(kernels->isa), names[way], check_median(times[way], n_rounds) * 1e6 / N_TOKENS,
           D);
  free(x);
  free(out);
  free(m);
  free(bytes);
  free(words);
  free(scales);
}

/* ---- Top-k beside plain C ---- */

/* What a program without vectors does: quickselect (Hoare, middle element) on pairs of magnitude and feature, as std::nth_element; the
 * features then in the order they came. */
typedef struct pair {
  uint32_t magnitude, feature;
} pair;

static bool comes_before(pair a, pair b) { return a.magnitude > b.magnitude || (a.magnitude == b.magnitude && a.feature < b.feature); }

static void quickselect(const float *x, int D, int K, uint8_t *ids, float *values) {
  pair pairs[256];
  for (int u = 0; u < D; u++)
    pairs[u] = (pair){sfa_bits_of(x[u]) & 0x7fffffffu, (uint32_t)u};
  for (int first = 0, last = D - 1; first < last;) {
    const pair pivot = pairs[(first + last) / 2];
    int i = first, j = last;
    while (i <= j) {
      while (comes_before(pairs[i], pivot))
        i++;
      while (comes_before(pivot, pairs[j]))
        j--;
      if (i <= j) {
        const pair moved = pairs[i];
        pairs[i++] = pairs[j];
        pairs[j--] = moved;
      }
    }
    if (K - 1 <= j)
      last = j;
    else if (K - 1 >= i)
      first = i;
    else
      break;
  }
  const pair least = pairs[K - 1];
  for (int u = 0, at = 0; u < D; u++)
    if (!comes_before(least, (pair){sfa_bits_of(x[u]) & 0x7fffffffu, (uint32_t)u})) {
      ids[at] = (uint8_t)u;
      values[at++] = x[u];
    }
}

static void bench_topk(const sfa_kernels *kernels, int n_rounds) {
  enum { N_ROWS = 512 }; /* in the L2 */
  static const int kept[] = {8, 16, 32, 64};
  sfa_rng rng = {1};
  float *x = normal_rows(&rng, N_ROWS * 256), *values = check_block(N_ROWS * 64 * sizeof *values);
  uint8_t *ids = check_block(N_ROWS * 64);
  for (int D = 64; D <= 256; D *= 2)
    for (size_t k = 0; k < sizeof kept / sizeof *kept; k++) {
      double plain[MAX_ROUNDS], ours[MAX_ROUNDS], ratios[MAX_ROUNDS];
      if (kept[k] == D)
        continue;
      for (int round = 0; round < n_rounds; round++) {
        const double start = check_clock_ms();
        for (int64_t row = 0; row < N_ROWS; row++)
          quickselect(x + row * D, D, kept[k], ids + row * kept[k], values + row * kept[k]);
        plain[round] = check_clock_ms() - start;
        kernels->topk(N_ROWS, x, D, D, kept[k], ids, values); /* a processor takes a while to wake its wide units */
        const double middle = check_clock_ms();
        for (int i = 0; i < 4; i++)
          kernels->topk(N_ROWS, x, D, D, kept[k], ids, values);
        ours[round] = (check_clock_ms() - middle) / 4;
        ratios[round] = plain[round] / ours[round];
      }
      printf("%-6s d %3d top-k k %2d %.0f ns a row, scalar quickselect %.0f, ratio %.1f\n", sfa_isa_name(kernels->isa), D, kept[k],
             check_median(ours, n_rounds) * 1e6 / N_ROWS, check_median(plain, n_rounds) * 1e6 / N_ROWS, check_median(ratios, n_rounds));
    }
  free(x);
  free(values);
  free(ids);
}

int check_bench(const char *isa_name, bool quick) {
  const int n_rounds = quick ? 3 : 11;
  for (sfa_isa isa = SFA_ISA_VBMI; isa >= SFA_ISA_AVX2; isa--) {
    const sfa_kernels *kernels = sfa_kernel_select(isa);
    if (!kernels || (isa_name && strcmp(isa_name, sfa_isa_name(isa))))
      continue;
    for (int D = 64; D <= 256; D *= 2)
      bench_head(kernels, D, n_rounds);
    bench_rows(kernels, 31);
    bench_topk(kernels, 31);
    check_bench_keys(kernels, 1 << 16, n_rounds);
    if (!quick)
      check_bench_keys(kernels, 1 << 20, n_rounds);
  }
  if (!isa_name || !strcmp(isa_name, "amx"))
    check_bench_half(quick);
  return 0;
}
