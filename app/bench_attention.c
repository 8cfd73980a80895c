/* sfa bench attention: the dense twin and SFA over one head of random rows, and peers beside them. Both sides start from dense rows, so SFA
 * pays for its top-k and its packing, unless --ready gives it the codes. */
#include "bench.h"
#include "plot.h"

#include <math.h>
#include <sfa/plan.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- Columns ---------------------------------------------------------------------------------------------------------------------- */

enum {
  C_N,
  C_HEAD_DIM,
  C_K,
  C_DTYPE,
  C_K_DTYPE,
  C_ISA,
  C_THREADS,
  C_CAUSAL,
  C_SUPPORTS,
  C_READY,
  C_SEED,
  C_ENGINE,
  C_VERSION,
  C_POLICY,
  C_MS,
  C_MIN_MS,
  C_MAX_MS,
  C_ROUNDS,
  C_TIMES_SFA,
  C_TOPK_MS,
  C_PACK_MS,
  C_ATTEND_MS,
  C_PREDICTED_MS,
  C_PREDICTED_TOPK_MS,
  C_PREDICTED_PACK_MS,
  C_PREDICTED_SCORE_MS,
  C_PREDICTED_SOFTMAX_MS,
  C_PREDICTED_VALUE_MS,
  C_OVERLAP,
  C_OVERLAP_RANDOM,
  C_PAIR_MULTIPLIES,
  C_MULTIPLY_RATE,
  C_PEAK_SHARE,
  C_KV_BYTES,
  C_DENSE_KV_BYTES,
  C_PEAK_BYTES,
  N_COLUMNS
};

static const bench_column columns[N_COLUMNS] = {
    [C_N] = {"n", "n", CELL_COUNT, 7},
    [C_HEAD_DIM] = {"head_dim", "dim", CELL_COUNT, 4},
    [C_K] = {"k", "k", CELL_COUNT, 3},
    [C_DTYPE] = {"dtype", "type", CELL_TEXT, 4},
    [C_K_DTYPE] = {"k_dtype", NULL, CELL_TEXT},
    [C_ISA] = {"isa", "isa", CELL_TEXT, 6},
    [C_THREADS] = {"threads", "thr", CELL_COUNT, 3},
    [C_CAUSAL] = {"causal", "causal", CELL_FLAG, 6},
    [C_SUPPORTS] = {"supports", NULL, CELL_TEXT},
    [C_READY] = {"ready", "ready", CELL_FLAG, 5},
    [C_SEED] = {"seed", NULL, CELL_COUNT},
    [C_ENGINE] = {"engine", "engine", CELL_TEXT, 22},
    [C_VERSION] = {"version", NULL, CELL_TEXT},
    [C_POLICY] = {"policy", "policy", CELL_TEXT, 10},
    [C_MS] = {"ms", "ms", CELL_NUMBER, 9, 3},
    [C_MIN_MS] = {"min_ms", NULL, CELL_NUMBER},
    [C_MAX_MS] = {"max_ms", NULL, CELL_NUMBER},
    [C_ROUNDS] = {"rounds", NULL, CELL_COUNT},
    [C_TIMES_SFA] = {"times_sfa", "of SFA", CELL_TIMES, 6, 2},
    [C_TOPK_MS] = {"topk_ms", "top-k ms", CELL_NUMBER, 8, 3},
    [C_PACK_MS] = {"pack_ms", "pack ms", CELL_NUMBER, 8, 3},
    [C_ATTEND_MS] = {"attend_ms", NULL, CELL_NUMBER},
    [C_PREDICTED_MS] = {"predicted_ms", "planned", CELL_NUMBER, 9, 3},
    [C_PREDICTED_TOPK_MS] = {"predicted_topk_ms", NULL, CELL_NUMBER},
    [C_PREDICTED_PACK_MS] = {"predicted_pack_ms", NULL, CELL_NUMBER},
    [C_PREDICTED_SCORE_MS] = {"predicted_score_ms", NULL, CELL_NUMBER},
    [C_PREDICTED_SOFTMAX_MS] = {"predicted_softmax_ms", NULL, CELL_NUMBER},
    [C_PREDICTED_VALUE_MS] = {"predicted_value_ms", NULL, CELL_NUMBER},
    [C_OVERLAP] = {"overlap", "overlap", CELL_NUMBER, 7, 2},
    [C_OVERLAP_RANDOM] = {"overlap_random", NULL, CELL_NUMBER},
    [C_PAIR_MULTIPLIES] = {"pair_multiply_adds", "fma/pair", CELL_COUNT, 8},
    [C_MULTIPLY_RATE] = {"multiply_adds_per_s", NULL, CELL_NUMBER},
    [C_PEAK_SHARE] = {"share_of_peak", "of peak", CELL_PERCENT, 7},
    [C_KV_BYTES] = {"kv_bytes", "KV", CELL_BYTES, 9},
    [C_DENSE_KV_BYTES] = {"dense_kv_bytes", NULL, CELL_BYTES},
    [C_PEAK_BYTES] = {"peak_bytes", "resident", CELL_BYTES, 9},
};

/* ---- A case ------------------------------------------------------------------------------------------------------------------------ */

typedef struct attention_case {
  int64_t n, head_dim, k, n_threads, seed;
  sfa_dtype dtype, k_dtype;
  sfa_isa isa;
  sfa_policy policy;
  bool causal, ready;
  bench_supports supports;
} attention_case;

typedef struct side {
  const struct attention_bench *bench;
  sfa_attention_plan *plan;
  void *workspace;
  bool coded; /* takes the codes made before */
} side;

typedef struct attention_bench {
  attention_case c;
  sfa_context *ctx;
  void *q, *k, *v;            /* [n][head_dim] */
  sfa_codes q_codes, k_codes; /* of the sparse side; also counted for the overlap */
  void *code_memory[2];
  float *out;
  side sparse, dense;
  double peak_rate;   /* bench_multiply_rate */
  int64_t peak_bytes; /* resident, of a process that runs the sparse side alone */
} attention_bench;

static const char *policy_words[] = {"auto",     "tiles", "keys",    "half-codes", "half-dense", "paper",
                                     "postings", "bf16",  "sp-bf16", "int8",       "sp-int8"};

/* The dense twin of a forced 16-bit way is the 16-bit one, whatever the rows are stored in. */
static sfa_policy twin_policy(sfa_policy policy) {
  return policy == SFA_POLICY_HALF_CODES || policy == SFA_POLICY_HALF_DENSE ? SFA_POLICY_HALF_DENSE : SFA_POLICY_AUTO;
}

static int side_open(attention_bench *b, int32_t k, side *s) {
  const attention_case *c = &b->c;
  sfa_costs costs;
  sfa_attention_options options = {.struct_size = sizeof options,
                                   .n_heads = 1,
                                   .head_dim = (int32_t)c->head_dim,
                                   .max_seqlen_q = c->n,
                                   .max_seqlen_k = c->n,
                                   .k_q = k,
                                   .k_k = k,
                                   .row_dtype = c->dtype,
                                   .k_dtype = k ? c->k_dtype : c->dtype,
                                   .v_dtype = c->dtype,
                                   .causal = c->causal,
                                   .policy = k ? c->policy : twin_policy(c->policy),
                                   .costs = costs_kept(sfa_context_isa(b->ctx), &costs)};
  s->bench = b;
  s->coded = k > 0 && c->ready;
  if (sfa_attention_plan_create(b->ctx, &options, &s->plan) != SFA_OK)
    return app_fail_status(b->ctx);
  s->workspace = bench_alloc((int64_t)sfa_attention_workspace_bytes(s->plan), 1);
  return s->workspace ? EXIT_OK : app_fail("out of memory for a workspace of %zu bytes", sfa_attention_workspace_bytes(s->plan));
}

static void side_close(side *s) {
  sfa_attention_plan_destroy(s->plan);
  free(s->workspace);
}

/* A bench_engine's run. */
static int side_run(void *arg, double *ms, int64_t *stage_ns) {
  const side *s = arg;
  const attention_bench *b = s->bench;
  sfa_attention_args args = {.struct_size = sizeof args,
                             .q = {.data = b->q, .dtype = b->c.dtype},
                             .k = {.data = b->k, .dtype = b->c.dtype},
                             .v = {.data = b->v, .dtype = b->c.dtype},
                             .q_codes = s->coded ? &b->q_codes : NULL,
                             .k_codes = s->coded ? &b->k_codes : NULL,
                             .out = b->out,
                             .workspace = s->workspace,
                             .stage_ns = stage_ns};
  double start = seconds_now();
  if (sfa_attention_run(s->plan, &args) != SFA_OK)
    return app_fail_status(b->ctx);
  *ms = 1e3 * (seconds_now() - start);
  return EXIT_OK;
}

static void bench_close(attention_bench *b) {
  side_close(&b->dense);
  side_close(&b->sparse);
  free(b->q);
  free(b->k);
  free(b->v);
  free(b->out);
  free(b->code_memory[0]);
  free(b->code_memory[1]);
  sfa_context_destroy(b->ctx);
}

/* n rows in the case's type. bf16 takes the upper halves of f32, cut: every engine gets these numbers. */
static void *random_rows(const attention_case *c, bool features, uint64_t stream) {
  int64_t D = c->head_dim;
  bench_random *random = bench_random_create(features ? c->supports : SUPPORTS_UNIFORM, 1, (int32_t)D, (uint64_t)c->seed);
  float *row = bench_alloc(D, sizeof *row);
  char *rows = bench_alloc(c->n * D, sfa_dtype_bytes(c->dtype));
  if (random && row && rows) {
    bench_random_stream(random, stream);
    for (int64_t i = 0; i < c->n; i++) {
      if (features)
        bench_random_features(random, 1, row);
      else
        bench_random_values(random, 1, D, row);
      if (c->dtype == SFA_BF16)
        bench_cut_bf16(row, D, (uint16_t *)(void *)rows + i * D);
      else
        memcpy(rows + (size_t)(i * D) * sizeof *row, row, (size_t)D * sizeof *row);
    }
  } else {
    free(rows);
    rows = NULL;
  }
  bench_random_destroy(random);
  free(row);
  return rows;
}

static int make_codes(attention_bench *b, const void *rows, sfa_dtype dtype, void **memory, sfa_codes *codes) {
  const attention_case *c = &b->c;
  size_t bytes = sfa_codes_bytes(c->n, (int32_t)c->head_dim, (int32_t)c->k, dtype);
  *memory = bench_alloc((int64_t)bytes, 1);
  if (!*memory)
    return app_fail("out of memory for %zu bytes of codes", bytes);
  if (sfa_codes_place(b->ctx, c->n, (int32_t)c->head_dim, (int32_t)c->k, dtype, *memory, codes) != SFA_OK ||
      sfa_codes_select(b->ctx, rows, c->dtype, c->head_dim, codes) != SFA_OK)
    return app_fail_status(b->ctx);
  return EXIT_OK;
}

static int bench_open(attention_bench *b, const attention_case *c) {
  sfa_context_options context = {.struct_size = sizeof context, .n_threads = (int32_t)c->n_threads, .isa = c->isa};
  *b = (attention_bench){.c = *c};
  if (sfa_context_create(&context, &b->ctx) != SFA_OK)
    return app_fail("cannot make a context of %lld threads for %s", (long long)c->n_threads, sfa_isa_name(c->isa));
  b->q = random_rows(c, true, 0);
  b->k = random_rows(c, true, 1);
  b->v = random_rows(c, false, 2);
  b->out = bench_alloc(c->n * c->head_dim, sizeof *b->out);
  if (!b->q || !b->k || !b->v || !b->out)
    return app_fail("out of memory for %lld rows of %lld", (long long)c->n, (long long)c->head_dim);
  return side_open(b, (int32_t)c->k, &b->sparse);
}

/* ---- Peak memory: a fresh process that runs the SFA case alone -------------------------------------------------------------------- */

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
static int run_child(const attention_case *c) {
  attention_bench b;
  double ms;
  attention_case all_in = *c;
  all_in.ready = false;
  int status = bench_open(&b, &all_in);
  if (!status)
    status = side_run(&b.sparse, &ms, NULL);
  if (!status)
    printf("%lld\n", (long long)peak_resident_bytes());
  bench_close(&b);
  return status ? status : app_flush();
}

static int measure_peak(const attention_case *c, int64_t *peak_bytes) {
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
                              "--dtype",    bench_dtype_name(c->dtype),
                              "--k-type",   bench_dtype_name(c->k_dtype),
                              "--isa",      sfa_isa_name(c->isa),
                              "--policy",   policy_words[c->policy],
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

/* ---- A case's rows ------------------------------------------------------------------------------------------------------------------- */

static void fill_case(bench_cell *row, const attention_case *c) {
  row[C_N].number = (double)c->n;
  row[C_HEAD_DIM].number = (double)c->head_dim;
  row[C_K].number = (double)c->k;
  row[C_DTYPE].text = bench_dtype_name(c->dtype);
  row[C_K_DTYPE].text = bench_dtype_name(c->k_dtype);
  row[C_ISA].text = sfa_isa_name(c->isa);
  row[C_THREADS].number = (double)c->n_threads;
  row[C_CAUSAL].number = c->causal;
  row[C_SUPPORTS].text = c->supports == SUPPORTS_SKEWED ? "skewed" : "uniform";
  row[C_READY].number = c->ready;
  row[C_SEED].number = (double)c->seed;
}

static int64_t dense_bytes(const attention_case *c) { return c->n * 2 * c->head_dim * (int64_t)sfa_dtype_bytes(c->dtype); }

/* What only our own two sides tell. Stage times are sums over threads; shown as wall time. Multiply-adds of the pairs that the mask lets
 * through: D or K of them for a score, as the way does it, and E for the values. */
static int fill_own(bench_cell *row, const attention_bench *b, const side *s, const bench_times *t) {
  const attention_case *c = &b->c;
  double threads = (double)c->n_threads, n = (double)c->n, to_ms = 1e-6 / threads;
  sfa_attention_report report = {.struct_size = sizeof report};
  if (sfa_attention_plan_report(s->plan, &report) != SFA_OK)
    return app_fail_status(b->ctx);
  row[C_POLICY].text = sfa_policy_name(report.policy);
  row[C_TOPK_MS].number = t->stage_ms[SFA_STAGE_TOPK] / threads;
  row[C_PACK_MS].number = t->stage_ms[SFA_STAGE_PACK] / threads;
  row[C_ATTEND_MS].number = t->stage_ms[SFA_STAGE_ATTEND] / threads;
  row[C_PREDICTED_TOPK_MS].number = report.topk_ns * to_ms;
  row[C_PREDICTED_PACK_MS].number = report.pack_ns * to_ms;
  row[C_PREDICTED_SCORE_MS].number = report.score_ns * to_ms;
  row[C_PREDICTED_SOFTMAX_MS].number = report.softmax_ns * to_ms;
  row[C_PREDICTED_VALUE_MS].number = report.value_ns * to_ms;
  row[C_PREDICTED_MS].number =
      (report.topk_ns * !s->coded + report.pack_ns + report.score_ns + report.softmax_ns + report.value_ns + report.call_ns) * to_ms;
  double of_score = (double)c->head_dim;
  if (s == &b->sparse) {
    double k = (double)c->k;
    row[C_OVERLAP].number = bench_mean_overlap(&b->q_codes, &b->k_codes, c->causal);
    row[C_OVERLAP_RANDOM].number = k * k / (double)c->head_dim;
    bool by_overlap = report.policy == SFA_POLICY_PAPER || report.policy == SFA_POLICY_POSTINGS;
    if (report.policy != SFA_POLICY_HALF_DENSE && !report.densified)
      of_score = by_overlap ? row[C_OVERLAP].number : k;
    row[C_KV_BYTES].number = (double)(sfa_codes_bytes(c->n, (int32_t)c->head_dim, (int32_t)c->k, c->k_dtype) + (size_t)dense_bytes(c) / 2);
  } else {
    row[C_KV_BYTES].number = (double)dense_bytes(c);
  }
  double pairs = c->causal ? 0.5 * n * (n + 1) : n * n;
  row[C_DENSE_KV_BYTES].number = (double)dense_bytes(c);
  row[C_PAIR_MULTIPLIES].number = of_score + (double)c->head_dim;
  row[C_MULTIPLY_RATE].number = pairs * row[C_PAIR_MULTIPLIES].number / (1e-3 * t->median_ms);
  row[C_PEAK_SHARE].number = row[C_MULTIPLY_RATE].number / b->peak_rate;
  return EXIT_OK;
}

static cJSON *peer_case(const attention_case *c) {
  cJSON *object = cJSON_CreateObject();
  cJSON_AddStringToObject(object, "bench", "attention");
  cJSON_AddNumberToObject(object, "n", (double)c->n);
  cJSON_AddNumberToObject(object, "head_dim", (double)c->head_dim);
  cJSON_AddStringToObject(object, "dtype", bench_dtype_name(c->dtype));
  cJSON_AddBoolToObject(object, "causal", c->causal);
  return object;
}

static int fill_row(void *bench, bench_table *t, int i, bench_cell *row) {
  const attention_bench *b = bench;
  fill_case(row, &b->c);
  if (i == 0)
    row[C_PEAK_BYTES].number = (double)b->peak_bytes;
  return i < 2 ? fill_own(row, b, i ? &b->dense : &b->sparse, &t->times[i]) : EXIT_OK;
}

/* ---- The picture: time over SFA's against n --------------------------------------------------------------------------------------- */

/* Rows that differ in n alone are a line. */
static bool same_line(const bench_cell *a, const bench_cell *b) {
  static const int numbers[] = {C_HEAD_DIM, C_K, C_THREADS, C_CAUSAL, C_READY}, texts[] = {C_DTYPE, C_K_DTYPE, C_ISA, C_ENGINE};
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
    if (a[numbers[i]].number != b[numbers[i]].number)
      return false;
  for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
    if (strcmp(a[texts[i]].text, b[texts[i]].text) != 0)
      return false;
  return true;
}

static int draw(const bench_output *out, const char *path) {
  int64_t *firsts = bench_alloc(out->n_rows, sizeof *firsts), n_lines = 0;
  FILE *plot = firsts ? plot_open(path, 900, 560) : NULL;
  if (!plot) {
    free(firsts);
    return app_fail("cannot draw %s: gnuplot does not start", path);
  }
  for (int64_t i = 0; i < out->n_rows; i++) {
    const bench_cell *row = out->rows + i * N_COLUMNS;
    bool known = strcmp(row[C_ENGINE].text, "SFA") == 0;
    for (int64_t l = 0; l < n_lines && !known; l++)
      known = same_line(row, out->rows + firsts[l] * N_COLUMNS);
    if (!known)
      firsts[n_lines++] = i;
  }
  fprintf(plot, "set logscale x 2\nset xlabel 'tokens'\nset ylabel 'time over the time of SFA (higher: SFA is faster)'\nset grid\n"
                "set key outside right top\nset yrange [0:*]\nset format x '%%.0f'\nplot 1 with lines dt 2 lc rgb 'gray' notitle");
  for (int64_t l = 0; l < n_lines; l++) {
    const bench_cell *row = out->rows + firsts[l] * N_COLUMNS;
    char title[160];
    snprintf(title, sizeof title, "%s, d %.0f k %.0f %s%s%s", row[C_ENGINE].text, row[C_HEAD_DIM].number, row[C_K].number,
             row[C_DTYPE].text, row[C_CAUSAL].number != 0 ? " causal" : "", row[C_READY].number != 0 ? " codes ready" : "");
    fputs(", '-' with linespoints title ", plot);
    plot_text(plot, title);
  }
  fputc('\n', plot);
  for (int64_t l = 0; l < n_lines; l++) {
    for (int64_t i = firsts[l]; i < out->n_rows; i++) {
      const bench_cell *row = out->rows + i * N_COLUMNS;
      if (same_line(row, out->rows + firsts[l] * N_COLUMNS))
        fprintf(plot, "%.0f %.6g\n", row[C_N].number, row[C_TIMES_SFA].number);
    }
    fputs("e\n", plot);
  }
  free(firsts);
  return plot_close(plot) ? EXIT_OK : app_fail("gnuplot could not draw %s", path);
}

/* ---- The grid ------------------------------------------------------------------------------------------------------------------------ */

enum { A_N, A_HEAD_DIM, A_K, A_DTYPE, A_ISA, A_THREADS, A_CAUSAL, A_READY, N_AXES };

static attention_case case_at(const app_options *o, const int64_t *v) {
  sfa_dtype dtype = bench_dtype(v[A_DTYPE]);
  return (attention_case){.n = v[A_N],
                          .head_dim = v[A_HEAD_DIM],
                          .k = v[A_K],
                          .dtype = dtype,
                          .k_dtype = o->bench_k_type.n ? bench_dtype(o->bench_k_type.values[0]) : dtype,
                          .isa = v[A_ISA] ? (sfa_isa)v[A_ISA] : sfa_isa_best(),
                          .policy = (sfa_policy)o->policy,
                          .n_threads = v[A_THREADS],
                          .causal = v[A_CAUSAL] != 0,
                          .ready = v[A_READY] != 0,
                          .supports = (bench_supports)o->supports,
                          .seed = o->seed < 0 ? 1 : o->seed};
}

static int check_case(const app_options *o, const int64_t *v) {
  attention_case c = case_at(o, v);
  if (c.head_dim % 8)
    return app_usage("--head-dim %lld is not a multiple of 8", (long long)c.head_dim);
  if (c.k > c.head_dim)
    return app_usage("--k %lld keeps more features than --head-dim %lld has", (long long)c.k, (long long)c.head_dim);
  if (c.k < 1)
    return app_usage("--k 0 is the dense twin, which bench attention times anyway; give at least 1");
  if (c.k_dtype == SFA_I4)
    return app_usage("--k-type int4 is for values only; codes are f32, bf16, f16 or int8");
  if (c.dtype != SFA_F32 && c.dtype != SFA_BF16)
    return app_usage("--dtype of bench attention is f32 or bf16");
  return bench_check_isa(c.isa);
}

static int run_case(bench_table *t, const int64_t *v) {
  attention_case c = case_at(t->o, v);
  attention_bench b;
  int status = bench_open(&b, &c);
  if (!status)
    status = side_open(&b, 0, &b.dense);
  if (!status)
    status = make_codes(&b, b.q, SFA_F32, &b.code_memory[0], &b.q_codes);
  if (!status)
    status = make_codes(&b, b.k, c.k_dtype, &b.code_memory[1], &b.k_codes);
  if (!status) {
    t->engines[t->n_engines++] = (bench_engine){.name = "SFA", .version = SFA_VERSION, .run = side_run, .arg = &b.sparse};
    t->engines[t->n_engines++] = (bench_engine){.name = "dense twin", .version = SFA_VERSION, .run = side_run, .arg = &b.dense};
    status = bench_table_time(t, c.n_threads, peer_case(&c), BENCH_WARM_MS);
  }
  if (!status)
    status = measure_peak(&c, &b.peak_bytes);
  if (!status) {
    b.peak_rate = bench_multiply_rate(c.isa, c.n_threads);
    status = bench_table_show(t, C_ENGINE, C_MS, fill_row, &b);
  }
  bench_close(&b);
  return status;
}

int cmd_bench_attention(const app_options *o) {
  static const int64_t n[] = {1024, 4096}, head_dim[] = {64, 128}, k[] = {8, 16}, zero[] = {0}, one[] = {1};
  const bench_axis axes[N_AXES] = {[A_N] = bench_choose(&o->bench_n, n, 2),
                                   [A_HEAD_DIM] = bench_choose(&o->bench_head_dim, head_dim, 2),
                                   [A_K] = bench_choose(&o->bench_k, k, 2),
                                   [A_DTYPE] = bench_choose(&o->bench_dtype, zero, 1),
                                   [A_ISA] = bench_choose(&o->bench_isa, zero, 1),
                                   [A_THREADS] = bench_choose(&o->bench_threads, one, 1),
                                   [A_CAUSAL] = bench_choose(&o->bench_causal, zero, 1),
                                   [A_READY] = bench_choose(&o->bench_ready, zero, 1)};
  sfa_context_options device = {0};
  int status = app_device(o, &device);
  if (status)
    return status;
  if (device.device == SFA_DEVICE_CUDA)
    return bench_cuda_attention(o, false);
  if (o->policy > SFA_POLICY_PAPER)
    return app_usage("--policy %s is not for the attention of many queries on the CPU", policy_words[o->policy]);
  if (o->child) {
    int64_t v[N_AXES];
    bench_place(axes, N_AXES, 0, v);
    attention_case c = case_at(o, v);
    status = check_case(o, v);
    return status ? status : run_child(&c);
  }
  return bench_grid_run(o, &(bench_grid){columns, N_COLUMNS, N_AXES, axes, check_case, run_case, draw});
}

int cmd_bench_backward(const app_options *o) {
  sfa_context_options device = {0};
  int status = app_device(o, &device);
  if (status)
    return status;
  return device.device == SFA_DEVICE_CUDA
             ? bench_cuda_attention(o, true)
             : app_usage("bench backward times a GPU: give --device cuda (sfa_check --bench-backward times the gradients on the CPU)");
}
