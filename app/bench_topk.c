/* sfa bench topk: rows to codes, beside a plain quickselect (on the CPU, wherever the codes are made). Both must keep the same features. */
#include "bench.h"
#include "plot.h"

#include <math.h>
#include <sfa/stream.h>
#include <stdlib.h>
#include <string.h>

enum {
  C_N,
  C_HEAD_DIM,
  C_K,
  C_DTYPE,
  C_K_DTYPE,
  C_ISA,
  C_SEED,
  C_ENGINE,
  C_VERSION,
  C_ROW_NS,
  C_MIN_ROW_NS,
  C_MAX_ROW_NS,
  C_ROUNDS,
  C_TIMES_SFA,
  C_READ_RATE,
  C_COPY_SHARE,
  N_COLUMNS
};

static const bench_column columns[N_COLUMNS] = {
    [C_N] = {"n", "rows", CELL_COUNT, 7},
    [C_HEAD_DIM] = {"head_dim", "dim", CELL_COUNT, 5},
    [C_K] = {"k", "k", CELL_COUNT, 4},
    [C_DTYPE] = {"dtype", "type", CELL_TEXT, 4},
    [C_K_DTYPE] = {"k_dtype", "code", CELL_TEXT, 4},
    [C_ISA] = {"isa", "isa", CELL_TEXT, 7},
    [C_SEED] = {"seed", NULL, CELL_COUNT},
    [C_ENGINE] = {"engine", "engine", CELL_TEXT, 12},
    [C_VERSION] = {"version", NULL, CELL_TEXT},
    [C_ROW_NS] = {"row_ns", "ns a row", CELL_NUMBER, 9, 3},
    [C_MIN_ROW_NS] = {"min_row_ns", "least", CELL_NUMBER, 9, 3},
    [C_MAX_ROW_NS] = {"max_row_ns", "most", CELL_NUMBER, 9, 3},
    [C_ROUNDS] = {"rounds", NULL, CELL_COUNT},
    [C_TIMES_SFA] = {"times_sfa", "of SFA", CELL_TIMES, 8, 2},
    [C_READ_RATE] = {"read_bytes_per_s", "read a second", CELL_BYTES, 13},
    [C_COPY_SHARE] = {"share_of_copies", "of copies", CELL_PERCENT, 9}, /* on a GPU: rows read and codes written, beside what copies move */
};

typedef struct topk_case {
  int64_t n, head_dim, k, seed;
  sfa_dtype dtype, k_dtype;
  sfa_isa isa;
} topk_case;

typedef struct topk_bench {
  topk_case c;
  sfa_context *ctx;
  bool on_gpu;
  double copy_rate; /* bench_cuda_copy_rate */
  int n_calls;      /* of a round */
  float *wide;      /* [n][head_dim] the rows in f32, for the quickselect */
  void *rows;       /* [n][head_dim] in the case's type, in the device's memory */
  void *memory;     /* of codes, there too */
  sfa_codes codes;
  uint16_t *selected; /* [n][k] ids by quickselect, rising */
  uint64_t *keys;     /* [head_dim] */
} topk_bench;

/* ---- The two sides ----------------------------------------------------------------------------------------------------------------- */

static int run_sfa(void *arg, double *ms, int64_t *stage_ns) {
  (void)stage_ns;
  topk_bench *b = arg;
  double start = seconds_now();
  for (int call = 0; call < b->n_calls; call++)
    if (sfa_codes_select(b->ctx, b->rows, b->c.dtype, b->c.head_dim, &b->codes) != SFA_OK)
      return app_fail_status(b->ctx);
  if (sfa_stream_wait(b->ctx) != SFA_OK)
    return app_fail_status(b->ctx);
  *ms = 1e3 * (seconds_now() - start) / b->n_calls;
  return EXIT_OK;
}

/* Moves the k largest of keys[0..n) to the front (Hoare's quickselect, middle of three as the pivot). */
static void quickselect(uint64_t *keys, int64_t n, int64_t k) {
  int64_t low = 0, high = n - 1;
  while (low < high) {
    uint64_t a = keys[low], b = keys[low + (high - low) / 2], c = keys[high];
    uint64_t pivot = a > b ? (b > c ? b : a > c ? c : a) : (a > c ? a : b > c ? c : b);
    int64_t i = low, j = high;
    while (i <= j) {
      while (keys[i] > pivot)
        i++;
      while (keys[j] < pivot)
        j--;
      if (i <= j) {
        uint64_t swap = keys[i];
        keys[i++] = keys[j];
        keys[j--] = swap;
      }
    }
    if (k - 1 <= j)
      high = j;
    else if (k - 1 >= i)
      low = i;
    else
      return;
  }
}

static int compare_ids(const void *a, const void *b) { return *(const uint16_t *)a - *(const uint16_t *)b; }

/* Keys are the magnitude's bits above the inverted feature id, so that the larger key is the one to keep, and a tie goes to the lower id.
 */
static int run_quickselect(void *arg, double *ms, int64_t *stage_ns) {
  (void)stage_ns;
  topk_bench *b = arg;
  int64_t D = b->c.head_dim, K = b->c.k;
  double start = seconds_now();
  for (int64_t row = 0; row < b->c.n; row++) {
    for (int64_t u = 0; u < D; u++) {
      uint32_t bits;
      memcpy(&bits, b->wide + row * D + u, sizeof bits);
      b->keys[u] = (uint64_t)(bits & 0x7fffffff) << 32 | (uint32_t)~u;
    }
    quickselect(b->keys, D, K);
    for (int64_t i = 0; i < K; i++)
      b->selected[row * K + i] = (uint16_t)~b->keys[i];
    qsort(b->selected + row * K, (size_t)K, sizeof *b->selected, compare_ids);
  }
  *ms = 1e3 * (seconds_now() - start);
  return EXIT_OK;
}

/* Fails where the two sides chose differently. */
static int compare_features(const topk_bench *b) {
  const topk_case *c = &b->c;
  size_t bytes = (size_t)(c->n * c->k) * (c->head_dim <= 256 ? 1 : 2);
  void *ids = bench_alloc((int64_t)bytes, 1);
  int status = ids ? EXIT_OK : app_fail("out of memory for %lld rows", (long long)c->n);
  if (!status && sfa_memory_copy(b->ctx, ids, b->codes.ids, bytes) != SFA_OK)
    status = app_fail_status(b->ctx);
  for (int64_t i = 0; i < c->n * c->k && !status; i++)
    if ((c->head_dim <= 256 ? ((const uint8_t *)ids)[i] : ((const uint16_t *)ids)[i]) != b->selected[i])
      status = app_fail("top-k and the quickselect keep different features at row %lld, head dim %lld, k %lld", (long long)(i / c->k),
                        (long long)c->head_dim, (long long)c->k);
  free(ids);
  return status;
}

/* ---- A case -------------------------------------------------------------------------------------------------------------------------- */

static int bench_open(topk_bench *b, const app_options *o, const topk_case *c) {
  int64_t count = c->n * c->head_dim;
  size_t row_bytes = (size_t)count * sfa_dtype_bytes(c->dtype);
  app a;
  *b = (topk_bench){.c = *c};
  int status = app_open_context(&a, o, 1, c->isa);
  if (status)
    return status;
  b->ctx = a.ctx;
  b->on_gpu = sfa_context_device(b->ctx) == SFA_DEVICE_CUDA;
  b->n_calls = b->on_gpu ? 20 : 1;
  if (b->on_gpu && (b->copy_rate = bench_cuda_copy_rate(b->ctx, o)) == 0)
    return app_fail_status(b->ctx);
  bench_random *random = bench_random_create(SUPPORTS_UNIFORM, 1, (int32_t)c->head_dim, (uint64_t)c->seed);
  b->wide = bench_alloc(count, sizeof *b->wide);
  void *rows = bench_alloc(count, sfa_dtype_bytes(c->dtype));
  b->selected = bench_alloc(c->n * c->k, sizeof *b->selected);
  b->keys = bench_alloc(c->head_dim, sizeof *b->keys);
  bool memory = random && b->wide && rows && b->selected && b->keys;
  if (memory) {
    bench_random_features(random, c->n, b->wide);
    if (c->dtype == SFA_BF16) {
      bench_cut_bf16(b->wide, count, rows);
      for (int64_t i = 0; i < count; i++) { /* the other side gets the same numbers */
        uint32_t bits = (uint32_t)((uint16_t *)rows)[i] << 16;
        memcpy(b->wide + i, &bits, sizeof bits);
      }
    } else
      memcpy(rows, b->wide, row_bytes);
  }
  bench_random_destroy(random);
  if (!memory)
    status = app_fail("out of memory for %lld rows of %lld", (long long)c->n, (long long)c->head_dim);
  else if (sfa_memory_alloc(b->ctx, row_bytes, &b->rows) != SFA_OK || sfa_memory_copy(b->ctx, b->rows, rows, row_bytes) != SFA_OK ||
           sfa_memory_alloc(b->ctx, sfa_codes_bytes(c->n, (int32_t)c->head_dim, (int32_t)c->k, c->k_dtype), &b->memory) != SFA_OK ||
           sfa_codes_place(b->ctx, c->n, (int32_t)c->head_dim, (int32_t)c->k, c->k_dtype, b->memory, &b->codes) != SFA_OK)
    status = app_fail_status(b->ctx);
  free(rows);
  return status;
}

static void bench_close(topk_bench *b) {
  if (b->ctx) {
    sfa_memory_free(b->ctx, b->rows);
    sfa_memory_free(b->ctx, b->memory);
  }
  void *memory[] = {b->wide, b->selected, b->keys};
  for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
    free(memory[i]);
  sfa_context_destroy(b->ctx);
}

static cJSON *peer_case(const topk_case *c) {
  cJSON *object = cJSON_CreateObject();
  cJSON_AddStringToObject(object, "bench", "topk");
  cJSON_AddStringToObject(object, "device", "cuda");
  cJSON_AddNumberToObject(object, "n", (double)c->n);
  cJSON_AddNumberToObject(object, "head_dim", (double)c->head_dim);
  cJSON_AddNumberToObject(object, "k", (double)c->k);
  return object;
}

static int fill_row(void *bench, bench_table *t, int i, bench_cell *row) {
  const topk_bench *b = bench;
  const topk_case *c = &b->c;
  row[C_N].number = (double)c->n;
  row[C_HEAD_DIM].number = (double)c->head_dim;
  row[C_K].number = (double)c->k;
  row[C_DTYPE].text = bench_dtype_name(c->dtype);
  row[C_K_DTYPE].text = bench_dtype_name(c->k_dtype);
  row[C_ISA].text = b->on_gpu ? "cuda" : sfa_isa_name(c->isa);
  row[C_SEED].number = (double)c->seed;
  for (int column = C_ROW_NS; column <= C_MAX_ROW_NS; column++)
    row[column].number *= 1e6 / (double)c->n;
  double read_bytes = (double)(c->n * c->head_dim) * (double)sfa_dtype_bytes(c->dtype), seconds = 1e-3 * t->times[i].median_ms;
  row[C_READ_RATE].number = read_bytes / seconds;
  if (i == 0 && b->on_gpu) {
    double code_bytes = (double)sfa_codes_bytes(c->n, (int32_t)c->head_dim, (int32_t)c->k, c->k_dtype);
    row[C_COPY_SHARE].number = (read_bytes + code_bytes) / seconds / b->copy_rate;
  }
  return EXIT_OK;
}

/* Bars: ns a row of SFA, a group a head dim. */
static int draw(const bench_output *out, const char *path) {
  FILE *plot = plot_open(path, 900, 480);
  if (!plot)
    return app_fail("cannot draw %s: gnuplot does not start", path);
  fprintf(plot, "set style fill solid 0.8\nset boxwidth 0.7\nset grid y\nset ylabel 'ns a row'\nset logscale y\nset yrange [1:*]\nset "
                "xtics rotate by -30\n"
                "plot '-' using 1:2:xtic(3) with boxes title 'SFA', '-' using 1:2 with linespoints title 'quickselect'\n");
  static const char *const sides[] = {"SFA", "quickselect"};
  for (int side = 0; side < 2; side++) {
    for (int64_t i = 0, place = 0; i < out->n_rows; i++) {
      const bench_cell *row = out->rows + i * N_COLUMNS;
      if (strcmp(row[C_ENGINE].text, sides[side]) == 0)
        fprintf(plot, "%lld %.6g \"d %.0f k %.0f %s %s\"\n", (long long)place++, row[C_ROW_NS].number, row[C_HEAD_DIM].number,
                row[C_K].number, row[C_K_DTYPE].text, row[C_ISA].text);
    }
    fputs("e\n", plot);
  }
  return plot_close(plot) ? EXIT_OK : app_fail("gnuplot could not draw %s", path);
}

/* ---- The grid -------------------------------------------------------------------------------------------------------------- */

enum { A_N, A_HEAD_DIM, A_K, A_DTYPE, A_K_TYPE, A_ISA, N_AXES };

static topk_case case_at(const app_options *o, const int64_t *v) {
  return (topk_case){.n = v[A_N],
                     .head_dim = v[A_HEAD_DIM],
                     .k = v[A_K],
                     .dtype = bench_dtype(v[A_DTYPE]),
                     .k_dtype = bench_dtype(v[A_K_TYPE]),
                     .isa = v[A_ISA] ? (sfa_isa)v[A_ISA] : sfa_isa_best(),
                     .seed = o->seed < 0 ? 1 : o->seed};
}

static int check_case(const app_options *o, const int64_t *v) {
  topk_case c = case_at(o, v);
  if (c.head_dim % 8)
    return app_usage("--head-dim %lld is not a multiple of 8", (long long)c.head_dim);
  if (c.k < 1 || c.k > c.head_dim)
    return app_usage("--k %lld is not from 1 to --head-dim %lld", (long long)c.k, (long long)c.head_dim);
  return bench_check_isa(c.isa);
}

static int run_case(bench_table *t, const int64_t *v) {
  topk_case c = case_at(t->o, v);
  topk_bench b;
  int status = bench_open(&b, t->o, &c);
  if (!status) {
    t->engines[t->n_engines++] = (bench_engine){.name = "SFA", .version = SFA_VERSION, .run = run_sfa, .arg = &b};
    t->engines[t->n_engines++] = (bench_engine){.name = "quickselect", .version = SFA_VERSION, .run = run_quickselect, .arg = &b};
    status = bench_table_time(t, 1, b.on_gpu ? peer_case(&c) : NULL, b.on_gpu ? 0 : BENCH_WARM_MS);
  }
  if (!status)
    status = compare_features(&b);
  if (!status)
    status = bench_table_show(t, C_ENGINE, C_ROW_NS, fill_row, &b);
  bench_close(&b);
  return status;
}

int cmd_bench_topk(const app_options *o) {
  static const int64_t n[] = {4096}, head_dim[] = {64, 128}, k[] = {8, 16}, zero[] = {0}, int8[] = {3};
  const bench_axis axes[N_AXES] = {[A_N] = bench_choose(&o->bench_n, n, 1),
                                   [A_HEAD_DIM] = bench_choose(&o->bench_head_dim, head_dim, 2),
                                   [A_K] = bench_choose(&o->bench_k, k, 2),
                                   [A_DTYPE] = bench_choose(&o->bench_dtype, zero, 1),
                                   [A_K_TYPE] = bench_choose(&o->bench_k_type, int8, 1),
                                   [A_ISA] = bench_choose(&o->bench_isa, zero, 1)};
  return bench_grid_run(o, &(bench_grid){columns, N_COLUMNS, N_AXES, axes, check_case, run_case, draw});
}
