/* sfa bench attention|backward --device cuda: many queries on a GPU. Every policy, our dense twin and the peers take turns on the same
 * shapes, from dense bf16 rows: top-k and all packing are in SFA's time, and the time of top-k alone stands beside it, with gradients that
 * of the forward half too. One of the peers is as many products as a dense attention takes, and nothing else: the ceiling. */
#include "bench.h"
#include "plot.h"

#include <math.h>
#include <sfa/backward.h>
#include <sfa/stream.h>
#include <stdlib.h>
#include <string.h>

/* ---- Columns ---------------------------------------------------------------------------------------------------------------------- */

enum {
  C_N,
  C_HEADS,
  C_KV_HEADS,
  C_HEAD_DIM,
  C_K,
  C_CAUSAL,
  C_SUPPORTS,
  C_SEED,
  C_ENGINE,
  C_VERSION,
  C_MS,
  C_MIN_MS,
  C_MAX_MS,
  C_ROUNDS,
  C_TIMES_FIRST,
  C_TOPK_MS,
  C_FORWARD_MS,
  C_RATE,
  C_SHARE,
  N_COLUMNS
};

static const bench_column columns[N_COLUMNS] = {
    [C_N] = {"n", "n", CELL_COUNT, 7},
    [C_HEADS] = {"heads", "heads", CELL_COUNT, 5},
    [C_KV_HEADS] = {"kv_heads", "kv", CELL_COUNT, 3},
    [C_HEAD_DIM] = {"head_dim", "dim", CELL_COUNT, 4},
    [C_K] = {"k", "k", CELL_COUNT, 3},
    [C_CAUSAL] = {"causal", "causal", CELL_FLAG, 6},
    [C_SUPPORTS] = {"supports", NULL, CELL_TEXT},
    [C_SEED] = {"seed", NULL, CELL_COUNT},
    [C_ENGINE] = {"engine", "engine", CELL_TEXT, 26},
    [C_VERSION] = {"version", NULL, CELL_TEXT},
    [C_MS] = {"ms", "ms", CELL_NUMBER, 9, 3},
    [C_MIN_MS] = {"min_ms", NULL, CELL_NUMBER},
    [C_MAX_MS] = {"max_ms", NULL, CELL_NUMBER},
    [C_ROUNDS] = {"rounds", NULL, CELL_COUNT},
    [C_TIMES_FIRST] = {"times_first", "of first", CELL_TIMES, 8, 2},
    [C_TOPK_MS] = {"topk_ms", "top-k ms", CELL_NUMBER, 8, 3},
    [C_FORWARD_MS] = {"forward_ms", NULL, CELL_NUMBER},
    [C_RATE] = {"dense_equivalent_tflops", "TFLOP/s", CELL_NUMBER, 8, 0},
    [C_SHARE] = {"share_of_products", "of products", CELL_PERCENT, 11},
};

/* What to copy, beyond all caches: 1 GiB, but of a small GPU a 64th of its memory. */
static size_t copy_bytes(sfa_context *ctx, const app_options *o) {
  enum { MOST_DEVICES = 64 };
  int64_t bytes = (int64_t)1 << 30;
  sfa_device_info devices[MOST_DEVICES];
  sfa_context_options device = {0};
  int32_t n = 0;
  if (app_device(o, &device) == EXIT_OK && sfa_device_list(ctx, MOST_DEVICES, devices, &n) == SFA_OK)
    for (int32_t i = 0; i < n && i < MOST_DEVICES; i++)
      if (devices[i].index == device.device_index && devices[i].memory_bytes / 64 < bytes)
        bytes = devices[i].memory_bytes / 64;
  return (size_t)bytes;
}

double bench_cuda_copy_rate(sfa_context *ctx, const app_options *o) {
  const size_t bytes = copy_bytes(ctx, o);
  double rate = 0;
  void *from = NULL, *to = NULL;
  bool good = sfa_memory_alloc(ctx, bytes, &from) == SFA_OK && sfa_memory_alloc(ctx, bytes, &to) == SFA_OK &&
              sfa_memory_zero(ctx, from, bytes) == SFA_OK;
  for (int pass = 0; good && pass < 4; pass++) {
    good = sfa_stream_wait(ctx) == SFA_OK;
    double start = seconds_now();
    for (int call = 0; good && call < 8; call++)
      good = sfa_memory_copy(ctx, to, from, bytes) == SFA_OK;
    good = good && sfa_stream_wait(ctx) == SFA_OK;
    rate = fmax(rate, 16 * (double)bytes / (seconds_now() - start));
  }
  sfa_memory_free(ctx, from);
  sfa_memory_free(ctx, to);
  return good ? rate : 0;
}

/* ---- A case ------------------------------------------------------------------------------------------------------------------------ */

typedef struct cuda_case {
  int64_t n, head_dim, k, heads, kv_heads, seed;
  bool causal, backward;
  bench_supports supports;
} cuda_case;

/* A way to the result. */
typedef struct cuda_side {
  const struct cuda_bench *bench;
  const char *name;
  sfa_policy policy;
  bool dense, only_forward;
  sfa_attention_plan *plan;
  void *workspace;
  int32_t n_calls; /* of a round: enough for the time between two waits to be long */
} cuda_side;

static const struct {
  const char *name;
  sfa_policy policy;
  bool dense;
} ways[] = {{"SFA bf16", SFA_POLICY_BF16, false},       {"SFA sp_bf16", SFA_POLICY_SP_BF16, false}, {"SFA int8", SFA_POLICY_INT8, false},
            {"SFA sp_int8", SFA_POLICY_SP_INT8, false}, {"SFA paper", SFA_POLICY_PAPER, false},     {"dense twin", SFA_POLICY_BF16, true}};
enum { N_WAYS = sizeof ways / sizeof *ways, LONGEST_PAPER = 8192, BLOCK_ROWS = 1 << 17 };

typedef struct cuda_bench {
  cuda_case c;
  sfa_context *ctx;
  void *q, *k, *v;                /* bf16 [n][heads][head_dim] */
  float *out, *lse;               /* [n][H][D], [n][H] */
  float *d_out, *d_q, *d_k, *d_v; /* with backward */
  sfa_codes codes[2];             /* where top-k alone writes */
  void *code_memory[2];
  cuda_side sides[N_WAYS], forward; /* forward: the first one without its gradients */
  int n_sides;
} cuda_bench;

static int upload_rows(cuda_bench *b, bench_random *random, int64_t n_heads, bool features, void **rows) {
  int64_t width = n_heads * b->c.head_dim, block = BLOCK_ROWS / n_heads < b->c.n ? BLOCK_ROWS / n_heads : b->c.n;
  float *wide = bench_alloc(block * width, sizeof *wide);
  uint16_t *narrow = bench_alloc(block * width, sizeof *narrow);
  int status = wide && narrow ? EXIT_OK : app_fail("out of memory for %lld rows", (long long)block);
  if (!status && sfa_memory_alloc(b->ctx, (size_t)(b->c.n * width) * sizeof *narrow, rows) != SFA_OK)
    status = app_fail_status(b->ctx);
  for (int64_t first = 0; first < b->c.n && !status; first += block) {
    int64_t n = b->c.n - first < block ? b->c.n - first : block;
    if (features)
      bench_random_features(random, n, wide);
    else
      bench_random_values(random, n, width, wide);
    bench_cut_bf16(wide, n * width, narrow);
    if (sfa_memory_copy(b->ctx, (uint16_t *)*rows + first * width, narrow, (size_t)(n * width) * sizeof *narrow) != SFA_OK)
      status = app_fail_status(b->ctx);
  }
  free(wide);
  free(narrow);
  return status;
}

static int make_rows(cuda_bench *b) {
  const cuda_case *c = &b->c;
  const int64_t heads[] = {c->heads, c->kv_heads, c->kv_heads};
  void **rows[] = {&b->q, &b->k, &b->v};
  int status = EXIT_OK;
  for (int i = 0; i < 3 && !status; i++) {
    bench_random *random = bench_random_create(c->supports, (int32_t)heads[i], (int32_t)c->head_dim, (uint64_t)(c->seed * 3 + i));
    status = random ? upload_rows(b, random, heads[i], i < 2, rows[i]) : app_fail("out of memory for random numbers");
    bench_random_destroy(random);
  }
  return status;
}

static int make_outputs(cuda_bench *b) {
  const cuda_case *c = &b->c;
  size_t rows = (size_t)(c->n * c->heads) * sizeof(float), kv_rows = (size_t)(c->n * c->kv_heads) * sizeof(float), D = (size_t)c->head_dim;
  const struct {
    float **to;
    size_t bytes;
  } arrays[] = {{&b->out, rows * D}, {&b->lse, rows},        {&b->d_out, rows * D},
                {&b->d_q, rows * D}, {&b->d_k, kv_rows * D}, {&b->d_v, kv_rows * D}};
  for (int i = 0; i < (c->backward ? 6 : 2); i++)
    if (sfa_memory_alloc(b->ctx, arrays[i].bytes, (void **)arrays[i].to) != SFA_OK)
      return app_fail_status(b->ctx);
  for (int i = 0; i < 2; i++) { /* of queries, of keys */
    int64_t n_rows = c->n * (i ? c->kv_heads : c->heads);
    size_t bytes = sfa_codes_bytes(n_rows, (int32_t)c->head_dim, (int32_t)c->k, SFA_BF16);
    if (sfa_memory_alloc(b->ctx, bytes, &b->code_memory[i]) != SFA_OK ||
        sfa_codes_place(b->ctx, n_rows, (int32_t)c->head_dim, (int32_t)c->k, SFA_BF16, b->code_memory[i], &b->codes[i]) != SFA_OK)
      return app_fail_status(b->ctx);
  }
  /* Gradients of out: any random rows; the queries of the same shape. */
  if (c->backward) {
    float *wide = bench_alloc(BLOCK_ROWS, sizeof *wide);
    bench_random *random = bench_random_create(SUPPORTS_UNIFORM, 1, BLOCK_ROWS, (uint64_t)c->seed + 99);
    int status = wide && random ? EXIT_OK : app_fail("out of memory for random numbers");
    size_t total = rows * D / sizeof(float);
    for (size_t first = 0; first < total && !status; first += BLOCK_ROWS) {
      size_t n = total - first < BLOCK_ROWS ? total - first : BLOCK_ROWS;
      bench_random_values(random, 1, (int64_t)n, wide);
      if (sfa_memory_copy(b->ctx, b->d_out + first, wide, n * sizeof *wide) != SFA_OK)
        status = app_fail_status(b->ctx);
    }
    bench_random_destroy(random);
    free(wide);
    return status;
  }
  return EXIT_OK;
}

/* Leaves out a way that this GPU, or this shape, does not have. */
static int side_open(cuda_bench *b, int way) {
  const cuda_case *c = &b->c;
  cuda_side *s = &b->sides[b->n_sides];
  *s = (cuda_side){.bench = b, .name = ways[way].name, .policy = ways[way].policy, .dense = ways[way].dense, .n_calls = 1};
  int32_t k = s->dense ? 0 : (int32_t)c->k;
  sfa_attention_options options = {.struct_size = sizeof options,
                                   .n_heads = (int32_t)c->heads,
                                   .n_kv_heads = (int32_t)c->kv_heads,
                                   .head_dim = (int32_t)c->head_dim,
                                   .max_seqlen_q = c->n,
                                   .max_seqlen_k = c->n,
                                   .k_q = k,
                                   .k_k = k,
                                   .k_dtype = SFA_BF16,
                                   .v_dtype = SFA_BF16,
                                   .causal = c->causal,
                                   .policy = s->policy};
  if (s->policy == SFA_POLICY_INT8 || s->policy == SFA_POLICY_SP_INT8)
    options.k_dtype = SFA_I8;
  switch (sfa_attention_plan_create(b->ctx, &options, &s->plan)) {
  case SFA_OK: break;
  case SFA_ERROR_UNSUPPORTED: app_note("%s is left out: %s", s->name, sfa_context_error(b->ctx)); return EXIT_OK;
  default: return app_fail_status(b->ctx);
  }
  b->n_sides++;
  size_t bytes = sfa_attention_workspace_bytes(s->plan);
  if (c->backward && sfa_attention_backward_workspace_bytes(s->plan) > bytes)
    bytes = sfa_attention_backward_workspace_bytes(s->plan);
  return sfa_memory_alloc(b->ctx, bytes, &s->workspace) == SFA_OK ? EXIT_OK : app_fail_status(b->ctx);
}

static void bench_close(cuda_bench *b) {
  for (cuda_side *s = b->sides; s < b->sides + b->n_sides; s++) {
    sfa_attention_plan_destroy(s->plan);
    sfa_memory_free(b->ctx, s->workspace);
  }
  void *memory[] = {b->q, b->k, b->v, b->out, b->lse, b->d_out, b->d_q, b->d_k, b->d_v, b->code_memory[0], b->code_memory[1]};
  for (size_t i = 0; b->ctx && i < sizeof memory / sizeof *memory; i++)
    sfa_memory_free(b->ctx, memory[i]);
  sfa_context_destroy(b->ctx);
}

/* ---- Timed -------------------------------------------------------------------------------------------------------------------------- */

static int enqueue(const cuda_side *s) {
  const cuda_bench *b = s->bench;
  sfa_attention_args args = {.struct_size = sizeof args,
                             .q = {.data = b->q, .dtype = SFA_BF16},
                             .k = {.data = b->k, .dtype = SFA_BF16},
                             .v = {.data = b->v, .dtype = SFA_BF16},
                             .out = b->out,
                             .lse = b->lse,
                             .workspace = s->workspace};
  sfa_attention_grad_args grad = {.struct_size = sizeof grad,
                                  .forward = &args,
                                  .d_out = b->d_out,
                                  .d_q = b->d_q,
                                  .d_k = b->d_k,
                                  .d_v = b->d_v,
                                  .workspace = s->workspace};
  bool gradients = b->c.backward && !s->only_forward;
  bool good = sfa_attention_run(s->plan, &args) == SFA_OK && (!gradients || sfa_attention_backward(s->plan, &grad) == SFA_OK);
  return good ? EXIT_OK : app_fail_status(b->ctx);
}

static int side_run(void *arg, double *ms, int64_t *stage_ns) {
  cuda_side *s = arg;
  (void)stage_ns;
  double start = seconds_now();
  for (int32_t call = 0; call < s->n_calls; call++)
    if (enqueue(s) != EXIT_OK)
      return EXIT_FAILED;
  if (sfa_stream_wait(s->bench->ctx) != SFA_OK)
    return app_fail_status(s->bench->ctx);
  *ms = 1e3 * (seconds_now() - start) / s->n_calls;
  if (s->n_calls == 1 && *ms < 5)
    s->n_calls = (int32_t)(10 / (*ms + 0.01)) + 1;
  return EXIT_OK;
}

/* Top-k of queries and keys, as a part of its own. */
static int topk_run(void *arg, double *ms, int64_t *stage_ns) {
  enum { CALLS = 8 };
  cuda_bench *b = arg;
  (void)stage_ns;
  double start = seconds_now();
  for (int call = 0; call < CALLS; call++)
    for (int i = 0; i < 2; i++)
      if (sfa_codes_select(b->ctx, i ? b->k : b->q, SFA_BF16, b->c.head_dim, &b->codes[i]) != SFA_OK)
        return app_fail_status(b->ctx);
  if (sfa_stream_wait(b->ctx) != SFA_OK)
    return app_fail_status(b->ctx);
  *ms = 1e3 * (seconds_now() - start) / CALLS;
  return EXIT_OK;
}

/* ---- Showing it ---------------------------------------------------------------------------------------------------------------------- */

static cJSON *peer_case(const cuda_case *c) {
  cJSON *object = cJSON_CreateObject();
  cJSON_AddStringToObject(object, "bench", "attention");
  cJSON_AddStringToObject(object, "device", "cuda");
  cJSON_AddNumberToObject(object, "n", (double)c->n);
  cJSON_AddNumberToObject(object, "heads", (double)c->heads);
  cJSON_AddNumberToObject(object, "head_dim", (double)c->head_dim);
  cJSON_AddNumberToObject(object, "k", (double)c->k);
  cJSON_AddBoolToObject(object, "causal", c->causal);
  cJSON_AddBoolToObject(object, "backward", c->backward);
  return object;
}

/* What a dense attention multiplies: 2 products of n x n x D a head (causal: half of it), and 5 more backward. */
static double dense_flops(const cuda_case *c) {
  double n = (double)c->n, forward = 4 * n * n * (double)(c->head_dim * c->heads) * (c->causal ? 0.5 : 1);
  return c->backward ? 3.5 * forward : forward;
}

/* How long the products of a dense attention take alone, a peer's line; NaN without peers. */
static double products_ms(const bench_table *t) {
  for (int i = 0; i < t->n_engines; i++)
    if (!t->engines[i].lost && strcmp(t->engines[i].name, "products alone, cuBLAS") == 0)
      return t->times[i].median_ms;
  return NAN;
}

static int fill_row(void *bench, bench_table *t, int i, bench_cell *row) {
  const cuda_bench *b = bench;
  const cuda_case *c = &b->c;
  row[C_N].number = (double)c->n;
  row[C_HEADS].number = (double)c->heads;
  row[C_KV_HEADS].number = (double)c->kv_heads;
  row[C_HEAD_DIM].number = (double)c->head_dim;
  row[C_K].number = (double)c->k;
  row[C_CAUSAL].number = c->causal;
  row[C_SUPPORTS].text = c->supports == SUPPORTS_SKEWED ? "skewed" : "uniform";
  row[C_SEED].number = (double)c->seed;
  row[C_RATE].number = dense_flops(c) / (1e9 * t->times[i].median_ms);
  row[C_SHARE].number = products_ms(t) / t->times[i].median_ms;
  if (i < b->n_sides && !b->sides[i].dense)
    row[C_TOPK_MS].number = t->times[b->n_sides].median_ms;
  if (i == 0 && c->backward)
    row[C_FORWARD_MS].number = t->times[b->n_sides + 1].median_ms;
  return EXIT_OK;
}

/* Whether two rows are of one case. */
static bool same_case(const bench_cell *a, const bench_cell *b) {
  return a[C_N].number == b[C_N].number && a[C_HEAD_DIM].number == b[C_HEAD_DIM].number && a[C_K].number == b[C_K].number &&
         a[C_CAUSAL].number == b[C_CAUSAL].number;
}

/* Dense-equivalent TFLOP/s: a group of bars a case, a bar an engine. */
static int draw(const bench_output *out, const char *path) {
  const char *names[BENCH_MOST_ENGINES];
  int n_names = 0;
  for (int64_t i = 0; i < out->n_rows; i++) {
    const char *name = out->rows[i * N_COLUMNS + C_ENGINE].text;
    int at = 0;
    while (at < n_names && strcmp(names[at], name) != 0)
      at++;
    if (at == n_names && n_names < BENCH_MOST_ENGINES)
      names[n_names++] = name;
  }
  FILE *plot = plot_open(path, 1200, 520);
  if (!plot)
    return app_fail("cannot draw %s: gnuplot does not start", path);
  fprintf(plot, "set style data histograms\nset style histogram clustered gap 1.5\nset style fill solid 0.85\nset linetype 9 lc rgb "
                "'gray60'\nset grid y\nset yrange [0:*]\n"
                "set ylabel 'TFLOP/s of a dense attention'\nset key outside right top\nset xtics rotate by -20\nplot ");
  for (int at = 0; at < n_names; at++) {
    fprintf(plot, "%s'-' using 1:xtic(2) title ", at ? ", " : "");
    plot_text(plot, names[at]);
  }
  fputc('\n', plot);
  for (int at = 0; at < n_names; at++) {
    const bench_cell *first = out->rows, *end = out->rows + out->n_rows * N_COLUMNS;
    while (first < end) { /* a case's rows follow each other */
      double rate = 0;
      const bench_cell *row = first;
      for (; row < end && same_case(row, first); row += N_COLUMNS)
        if (strcmp(row[C_ENGINE].text, names[at]) == 0)
          rate = row[C_RATE].number;
      fprintf(plot, "%.6g \"%.0f d %.0f k %.0f%s\"\n", rate, first[C_N].number, first[C_HEAD_DIM].number, first[C_K].number,
              first[C_CAUSAL].number != 0 ? " causal" : "");
      first = row;
    }
    fputs("e\n", plot);
  }
  return plot_close(plot) ? EXIT_OK : app_fail("gnuplot could not draw %s", path);
}

static int bench_open(cuda_bench *b, const app_options *o, const cuda_case *c) {
  *b = (cuda_bench){.c = *c};
  app a;
  int status = app_open_context(&a, o, 1, SFA_ISA_DEFAULT);
  if (status)
    return status;
  b->ctx = a.ctx;
  status = make_rows(b);
  if (!status)
    status = make_outputs(b);
  for (int way = 0; way < N_WAYS && !status; way++) {
    bool wanted = o->policy ? ways[way].policy == (sfa_policy)o->policy : ways[way].policy != SFA_POLICY_PAPER || c->n <= LONGEST_PAPER;
    if (c->backward && ways[way].policy != SFA_POLICY_BF16)
      wanted = false;
    if (wanted)
      status = side_open(b, way);
  }
  if (!status && !b->n_sides)
    status = app_fail("no way of SFA takes this case");
  return status;
}

/* ---- The grid ------------------------------------------------------------------------------------------------------------------------ */

enum { A_N, A_HEAD_DIM, A_K, A_CAUSAL, N_AXES };

static cuda_case case_at(const app_options *o, const int64_t *v, bool backward) {
  int64_t heads = o->heads > 0 ? o->heads : 8;
  return (cuda_case){.n = v[A_N],
                     .head_dim = v[A_HEAD_DIM],
                     .k = v[A_K],
                     .heads = heads,
                     .kv_heads = o->kv_heads > 0 ? o->kv_heads : heads,
                     .causal = v[A_CAUSAL] != 0,
                     .backward = backward,
                     .supports = (bench_supports)o->supports,
                     .seed = o->seed < 0 ? 1 : o->seed};
}

static int check_case(const app_options *o, const int64_t *v) {
  cuda_case c = case_at(o, v, false);
  if (c.k < 1 || c.k > c.head_dim || c.head_dim % 8)
    return app_usage("--k %lld of --head-dim %lld: k is from 1 to the head dim, which is a multiple of 8", (long long)c.k,
                     (long long)c.head_dim);
  return EXIT_OK;
}

/* Behind our sides come the times of their parts. */
static int run_case(bench_table *t, const cuda_case *c) {
  cuda_bench b;
  int status = bench_open(&b, t->o, c);
  if (!status) {
    for (int i = 0; i < b.n_sides; i++)
      t->engines[t->n_engines++] = (bench_engine){.name = b.sides[i].name, .version = SFA_VERSION, .run = side_run, .arg = &b.sides[i]};
    t->engines[t->n_engines++] = (bench_engine){.name = "top-k", .version = SFA_VERSION, .run = topk_run, .arg = &b, .part = true};
    if (c->backward) {
      b.forward = b.sides[0];
      b.forward.only_forward = true;
      t->engines[t->n_engines++] =
          (bench_engine){.name = "forward", .version = SFA_VERSION, .run = side_run, .arg = &b.forward, .part = true};
    }
    status = bench_table_time(t, 1, peer_case(c), 0);
  }
  if (!status)
    status = bench_table_show(t, C_ENGINE, C_MS, fill_row, &b);
  bench_close(&b);
  return status;
}

static int run_forward(bench_table *t, const int64_t *v) {
  cuda_case c = case_at(t->o, v, false);
  return run_case(t, &c);
}

static int run_backward(bench_table *t, const int64_t *v) {
  cuda_case c = case_at(t->o, v, true);
  return run_case(t, &c);
}

int bench_cuda_attention(const app_options *o, bool backward) {
  static const int64_t n[] = {8192, 32768}, head_dim[] = {64, 128, 256}, k[] = {8}, causal[] = {0, 1};
  const bench_axis axes[N_AXES] = {[A_N] = bench_choose(&o->bench_n, n, 2),
                                   [A_HEAD_DIM] = bench_choose(&o->bench_head_dim, head_dim, 3),
                                   [A_K] = bench_choose(&o->bench_k, k, 1),
                                   [A_CAUSAL] = bench_choose(&o->bench_causal, causal, 2)};
  return bench_grid_run(o, &(bench_grid){columns, N_COLUMNS, N_AXES, axes, check_case, backward ? run_backward : run_forward, draw});
}
