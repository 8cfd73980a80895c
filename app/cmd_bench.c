/* sfa bench attention: the dense twin against SFA, one head, normal random rows, both from dense inputs: SFA pays for its top-k and its
 * packing. The two run in turn, so that a slow spell of the machine meets both; the figures are medians. */
#include "app.h"

#include <math.h>
#include <sfa/attention.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct bench_case {
  int64_t n, head_dim, k, n_threads;
  sfa_dtype dtype;
  sfa_isa isa;
  bool causal;
} bench_case;

typedef struct bench_result {
  double dense_ms, sfa_ms, topk_ms, pack_ms;
  int64_t peak_bytes;
} bench_result;

static const char *dtype_name(sfa_dtype dtype) { return dtype == SFA_BF16 ? "bf16" : "f32"; }

/* ---- Inputs ------------------------------------------------------------------------------------------------------------------ */

static uint64_t next_random(uint64_t *state) { /* xorshift64* */
  *state ^= *state >> 12;
  *state ^= *state << 25;
  *state ^= *state >> 27;
  return *state * 0x2545f4914f6cdd1dull;
}

/* An even count of standard normal numbers, in pairs (Marsaglia's polar method). */
static void fill_normal(float *x, int64_t n, uint64_t *state) {
  for (int64_t i = 0; i < n;) {
    double u = (double)(int64_t)next_random(state) * 0x1p-63, v = (double)(int64_t)next_random(state) * 0x1p-63, s = u * u + v * v;
    if (s >= 1 || s == 0)
      continue;
    double scale = sqrt(-2 * log(s) / s);
    x[i++] = (float)(u * scale);
    x[i++] = (float)(v * scale);
  }
}

/* n rows of head_dim numbers. bf16 takes the upper halves of f32, cut: both sides get these numbers. */
static void *normal_rows(int64_t n, int64_t head_dim, sfa_dtype dtype, uint64_t seed) {
  size_t row_bytes = (size_t)head_dim * sfa_dtype_bytes(dtype);
  float *row = malloc((size_t)head_dim * sizeof *row);
  char *rows = aligned_alloc(64, ((size_t)n * row_bytes + 63) & ~(size_t)63);
  uint64_t state = seed;
  for (int64_t i = 0; row && rows && i < n; i++) {
    fill_normal(row, head_dim, &state);
    if (dtype == SFA_BF16)
      for (int64_t u = 0; u < head_dim; u++) {
        uint32_t bits;
        memcpy(&bits, row + u, sizeof bits);
        uint16_t upper = (uint16_t)(bits >> 16);
        memcpy((char *)row + 2 * u, &upper, sizeof upper);
      }
    memcpy(rows + (size_t)i * row_bytes, row, row_bytes);
  }
  if (!row) {
    free(rows);
    rows = NULL;
  }
  free(row);
  return rows;
}

/* ---- One side ---------------------------------------------------------------------------------------------------------------- */

typedef struct side {
  sfa_attention_plan *plan;
  void *workspace;
} side;

typedef struct bench {
  sfa_context *ctx;
  void *q, *k, *v;
  float *out;
  side dense, sparse;
} bench;

static int side_open(bench *b, const bench_case *c, int32_t k, side *s) {
  sfa_attention_options options = {.struct_size = sizeof options,
                                   .n_heads = 1,
                                   .head_dim = (int32_t)c->head_dim,
                                   .max_seqlen_q = c->n,
                                   .max_seqlen_k = c->n,
                                   .k_q = k,
                                   .k_k = k,
                                   .k_dtype = c->dtype,
                                   .v_dtype = c->dtype,
                                   .causal = c->causal};
  if (sfa_attention_plan_create(b->ctx, &options, &s->plan) != SFA_OK)
    return app_fail_status(b->ctx);
  s->workspace = aligned_alloc(64, (sfa_attention_workspace_bytes(s->plan) + 63) & ~(size_t)63);
  return s->workspace ? EXIT_OK : app_fail("out of memory for a workspace of %zu bytes", sfa_attention_workspace_bytes(s->plan));
}

static void side_close(side *s) {
  sfa_attention_plan_destroy(s->plan);
  free(s->workspace);
}

/* Milliseconds of one run; stage_ns is added to. */
static int side_run(const bench *b, const bench_case *c, const side *s, double *ms, int64_t *stage_ns) {
  sfa_attention_args args = {.struct_size = sizeof args,
                             .q = {.data = b->q, .dtype = c->dtype},
                             .k = {.data = b->k, .dtype = c->dtype},
                             .v = {.data = b->v, .dtype = c->dtype},
                             .out = b->out,
                             .workspace = s->workspace,
                             .stage_ns = stage_ns};
  double start = seconds_now();
  if (sfa_attention_run(s->plan, &args) != SFA_OK)
    return app_fail_status(b->ctx);
  *ms = 1e3 * (seconds_now() - start);
  return EXIT_OK;
}

static void bench_close(bench *b) {
  side_close(&b->dense);
  side_close(&b->sparse);
  free(b->q);
  free(b->k);
  free(b->v);
  free(b->out);
  sfa_context_destroy(b->ctx);
}

static int bench_open(bench *b, const bench_case *c) {
  sfa_context_options context = {.struct_size = sizeof context, .n_threads = (int32_t)c->n_threads, .isa = c->isa};
  if (sfa_context_create(&context, &b->ctx) != SFA_OK)
    return app_fail("cannot make a context of %lld threads for %s", (long long)c->n_threads, sfa_isa_name(c->isa));
  int64_t count = c->n * c->head_dim;
  b->q = normal_rows(c->n, c->head_dim, c->dtype, 0x51);
  b->k = normal_rows(c->n, c->head_dim, c->dtype, 0x4b);
  b->v = normal_rows(c->n, c->head_dim, c->dtype, 0x56);
  b->out = aligned_alloc(64, ((size_t)count * 4 + 63) & ~(size_t)63);
  if (!b->q || !b->k || !b->v || !b->out)
    return app_fail("out of memory for %lld rows of %lld", (long long)c->n, (long long)c->head_dim);
  return side_open(b, c, (int32_t)c->k, &b->sparse);
}

/* ---- Peak memory: a fresh process that runs the SFA case alone ----------------------------------------------------------------- */

/* Peak resident bytes of this process, as the kernel counts them; -1 if it does not tell. */
static int64_t peak_resident_bytes(void) {
  FILE *file = fopen("/proc/self/status", "r");
  char line[256];
  long long kib = -1;
  while (file && fgets(line, sizeof line, file))
    if (sscanf(line, "VmHWM: %lld kB", &kib) == 1)
      break;
  if (file)
    fclose(file);
  return kib < 0 ? -1 : kib * 1024;
}

/* What the child does: one SFA run, then the peak on stdout. */
static int run_child(const bench_case *c) {
  bench b = {0};
  double ms;
  int status = bench_open(&b, c);
  if (!status)
    status = side_run(&b, c, &b.sparse, &ms, NULL);
  if (!status)
    printf("%lld\n", (long long)peak_resident_bytes());
  bench_close(&b);
  return status ? status : app_flush();
}

static int measure_peak(const bench_case *c, int64_t *peak_bytes) {
  char n[24], head_dim[24], k[24], threads[24];
  snprintf(n, sizeof n, "%lld", (long long)c->n);
  snprintf(head_dim, sizeof head_dim, "%lld", (long long)c->head_dim);
  snprintf(k, sizeof k, "%lld", (long long)c->k);
  snprintf(threads, sizeof threads, "%lld", (long long)c->n_threads);
  const char *const args[] = {"sfa",        "bench",
                              "attention",  "--child",
                              "--n",        n,
                              "--head-dim", head_dim,
                              "--k",        k,
                              "--dtype",    dtype_name(c->dtype),
                              "--isa",      sfa_isa_name(c->isa),
                              "--threads",  threads,
                              "--causal",   c->causal ? "1" : "0",
                              NULL};
  int ends[2];
  fflush(stdout);
  if (pipe(ends) != 0)
    return app_fail("cannot make a pipe for the memory measurement");
  pid_t pid = fork();
  if (pid == 0) {
    dup2(ends[1], STDOUT_FILENO);
    close(ends[0]);
    close(ends[1]);
    execv("/proc/self/exe", (char *const *)args);
    _exit(127);
  }
  close(ends[1]);
  FILE *from = pid > 0 ? fdopen(ends[0], "r") : NULL;
  long long bytes = -1;
  bool read = from && fscanf(from, "%lld", &bytes) == 1;
  if (from)
    fclose(from);
  else
    close(ends[0]);
  int state = 0;
  if (pid > 0)
    waitpid(pid, &state, 0);
  if (!read || bytes < 0 || !WIFEXITED(state) || WEXITSTATUS(state) != 0)
    return app_fail("the process that measures peak memory at n = %lld failed", (long long)c->n);
  *peak_bytes = bytes;
  return EXIT_OK;
}

/* ---- Timing ------------------------------------------------------------------------------------------------------------------ */

static int compare_doubles(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(const double *values, int n) {
  double sorted[1001];
  memcpy(sorted, values, (size_t)n * sizeof *values);
  qsort(sorted, (size_t)n, sizeof *sorted, compare_doubles);
  return n % 2 ? sorted[n / 2] : 0.5 * (sorted[n / 2 - 1] + sorted[n / 2]);
}

enum { MOST_ROUNDS = 1000, LEAST_ROUNDS = 5 };
static const double least_seconds = 0.5, most_seconds = 20;

/* Rounds of both sides. The first warms caches and pages up and counts only if it stays alone. Without a number from the user: at least
 * five and half a second, but no further round once 20 seconds have passed. */
static int time_rounds(bench *b, const bench_case *c, int64_t repeats, bench_result *result) {
  static double dense[MOST_ROUNDS + 1], sparse[MOST_ROUNDS + 1], topk[MOST_ROUNDS + 1], pack[MOST_ROUNDS + 1];
  double start = seconds_now();
  int n = 0;
  for (bool more = true; more; n++) {
    int64_t stage_ns[SFA_STAGE_COUNT] = {0};
    int status = side_run(b, c, &b->dense, &dense[n], NULL);
    if (!status)
      status = side_run(b, c, &b->sparse, &sparse[n], stage_ns);
    if (status)
      return status;
    topk[n] = 1e-6 * (double)stage_ns[SFA_STAGE_TOPK] / (double)c->n_threads; /* the sum over threads as wall time */
    pack[n] = 1e-6 * (double)stage_ns[SFA_STAGE_PACK] / (double)c->n_threads;
    double passed = seconds_now() - start;
    more = repeats > 0 ? n < repeats : n < MOST_ROUNDS && (n < LEAST_ROUNDS || passed < least_seconds) && passed < most_seconds;
  }
  int from = n > 1;
  *result = (bench_result){.dense_ms = median(dense + from, n - from),
                           .sfa_ms = median(sparse + from, n - from),
                           .topk_ms = median(topk + from, n - from),
                           .pack_ms = median(pack + from, n - from)};
  return EXIT_OK;
}

static int run_case(const bench_case *c, int64_t repeats, bench_result *result) {
  bench b = {0};
  int status = bench_open(&b, c);
  if (!status)
    status = side_open(&b, c, 0, &b.dense);
  if (!status)
    status = time_rounds(&b, c, repeats, result);
  bench_close(&b);
  return status ? status : measure_peak(c, &result->peak_bytes);
}

/* ---- The grid ---------------------------------------------------------------------------------------------------------------- */

typedef struct axis {
  const int64_t *values;
  int64_t n;
} axis;

enum { N_AXES = 7 };

/* What the user gave for an axis, or its default values. */
static axis choose(const int_list *given, const int64_t *values, int64_t n) {
  return given->n ? (axis){given->values, given->n} : (axis){values, n};
}

/* The case of one place in the grid; n varies slowest. */
static bench_case case_at(const axis axes[N_AXES], int64_t place) {
  static const sfa_dtype dtypes[] = {SFA_F32, SFA_BF16};
  int64_t value[N_AXES];
  for (int i = N_AXES - 1; i >= 0; i--) {
    value[i] = axes[i].values[place % axes[i].n];
    place /= axes[i].n;
  }
  return (bench_case){.n = value[0],
                      .head_dim = value[1],
                      .k = value[2],
                      .dtype = dtypes[value[3]],
                      .isa = value[4] ? (sfa_isa)value[4] : sfa_isa_best(),
                      .n_threads = value[5],
                      .causal = value[6] != 0};
}

static int check_case(const bench_case *c) {
  if (c->head_dim % 8)
    return app_usage("--head-dim %lld is not a multiple of 8", (long long)c->head_dim);
  if (c->k > c->head_dim)
    return app_usage("--k %lld keeps more features than --head-dim %lld has", (long long)c->k, (long long)c->head_dim);
  if (c->isa > sfa_isa_best())
    return app_fail("this machine has no %s; its best is %s", sfa_isa_name(c->isa), sfa_isa_name(sfa_isa_best()));
  return EXIT_OK;
}

static void add_json(cJSON *list, const bench_case *c, const bench_result *r) {
  cJSON *row = cJSON_CreateObject();
  cJSON_AddNumberToObject(row, "n", (double)c->n);
  cJSON_AddNumberToObject(row, "head_dim", (double)c->head_dim);
  cJSON_AddNumberToObject(row, "k", (double)c->k);
  cJSON_AddStringToObject(row, "dtype", dtype_name(c->dtype));
  cJSON_AddStringToObject(row, "isa", sfa_isa_name(c->isa));
  cJSON_AddNumberToObject(row, "threads", (double)c->n_threads);
  cJSON_AddBoolToObject(row, "causal", c->causal);
  cJSON_AddNumberToObject(row, "dense_ms", r->dense_ms);
  cJSON_AddNumberToObject(row, "sfa_ms", r->sfa_ms);
  cJSON_AddNumberToObject(row, "topk_ms", r->topk_ms);
  cJSON_AddNumberToObject(row, "pack_ms", r->pack_ms);
  cJSON_AddNumberToObject(row, "peak_bytes", (double)r->peak_bytes);
  cJSON_AddItemToArray(list, row);
}

static void print_row(const bench_case *c, const bench_result *r) {
  char peak[32];
  double ratio = r->dense_ms / r->sfa_ms;
  printf("%8lld %5lld %4lld  %-5s %-7s %3lld  %-6s %10.3f %10.3f %9.3f %9.3f %9s  %5.2fx%s\n", (long long)c->n, (long long)c->head_dim,
         (long long)c->k, dtype_name(c->dtype), sfa_isa_name(c->isa), (long long)c->n_threads, c->causal ? "causal" : "full", r->dense_ms,
         r->sfa_ms, r->topk_ms, r->pack_ms, human_bytes((double)r->peak_bytes, peak), ratio, ratio < 1 ? "  dense wins here" : "");
}

int cmd_bench_attention(const app_options *o) {
  static const int64_t n[] = {1024, 4096}, head_dim[] = {64, 128}, k[] = {8, 16}, zero[] = {0}, one[] = {1};
  const axis axes[N_AXES] = {choose(&o->bench_n, n, 2),        choose(&o->bench_head_dim, head_dim, 2), choose(&o->bench_k, k, 2),
                             choose(&o->bench_dtype, zero, 1), choose(&o->bench_isa, zero, 1),          choose(&o->bench_threads, one, 1),
                             choose(&o->bench_causal, zero, 1)};
  int64_t n_cases = 1;
  for (int i = 0; i < N_AXES; i++)
    n_cases *= axes[i].n;
  for (int64_t i = 0; i < n_cases; i++) { /* all of them before the first is timed */
    bench_case c = case_at(axes, i);
    int status = check_case(&c);
    if (status)
      return status;
  }
  if (o->child) {
    bench_case c = case_at(axes, 0);
    return run_child(&c);
  }
  cJSON *list = o->json ? cJSON_CreateArray() : NULL;
  if (!o->json)
    printf("%8s %5s %4s  %-5s %-7s %3s  %-6s %10s %10s %9s %9s %9s  %s\n", "n", "dim", "k", "dtype", "isa", "thr", "mask", "dense ms",
           "SFA ms", "top-k ms", "pack ms", "peak", "dense/SFA");
  int status = EXIT_OK;
  for (int64_t i = 0; i < n_cases && !status; i++) {
    bench_case c = case_at(axes, i);
    bench_result r = {0};
    if ((status = run_case(&c, o->repeats, &r)) != EXIT_OK)
      break;
    if (o->json) {
      add_json(list, &c, &r);
    } else {
      print_row(&c, &r);
      status = app_flush();
    }
  }
  if (!o->json)
    return status;
  if (status) {
    cJSON_Delete(list);
    return status;
  }
  return app_print_json(list);
}
