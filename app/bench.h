/* bench.h: what the benchmarks share: random rows, rounds of several engines in turn, one way to show results, the machine's own limits,
 * and peers in a child process. */
#ifndef SFA_APP_BENCH_H
#define SFA_APP_BENCH_H

#include "app.h"

#include <sfa/attention.h>
#include <stdio.h>

/* ---- bench_rows.c: inputs ------------------------------------------------------------------------------------------------------ */

/* Standard normal numbers; every feature u of kind `head` is scaled by popularity(u), which decides how often top-k keeps it. */
typedef struct bench_random bench_random;

typedef enum bench_supports { SUPPORTS_UNIFORM = 0, SUPPORTS_SKEWED = 1 } bench_supports;

/* NULL: out of memory. supports: docs/MATH.md 5. */
bench_random *bench_random_create(bench_supports supports, int32_t n_heads, int32_t head_dim, uint64_t seed);
void bench_random_destroy(bench_random *random);
/* Goes to another sequence of numbers under the same popularities: queries, keys and values of one head. */
void bench_random_stream(bench_random *random, uint64_t stream);
/* n_rows rows [n_rows][dim] without popularities. */
void bench_random_values(bench_random *random, int64_t n_rows, int64_t dim, float *out);
/* [n_rows][n_heads][head_dim] as keys or queries are. */
void bench_random_features(bench_random *random, int64_t n_rows, float *out);
/* f32 cut to its upper half; in and out may be the same memory. */
void bench_cut_bf16(const float *in, int64_t n, uint16_t *out);
/* 64-byte aligned memory for free(); NULL: none, or too much asked for. */
void *bench_alloc(int64_t count, size_t size);

/* The mean of |S_i and S_j| over pairs of rows of q and k, j <= i + n_k - n_q if causal. 0 if there is no memory for the count. */
double bench_mean_overlap(const sfa_codes *q, const sfa_codes *k, bool causal);

/* ---- bench_rounds.c: time --------------------------------------------------------------------------------------------------------- */

enum { BENCH_MOST_ROUNDS = 1000, BENCH_LEAST_ROUNDS = 5, BENCH_WARM_MS = 25, BENCH_MOST_ENGINES = 24 };

/* Something that is timed against others. run times itself, in ms, and adds its stages in ns, summed over threads. */
typedef struct bench_engine {
  const char *name, *version;
  int (*run)(void *arg, double *ms, int64_t *stage_ns);
  void (*rest)(void *arg); /* returns when nothing of it runs any more; NULL: nothing does */
  void *arg;
  bool optional;   /* a failure takes it out of the comparison instead of ending it */
  bool lost;       /* it has failed */
  bool part;       /* of another engine: timed, and no row of its own */
  double setup_ms; /* of a peer whose setting up is a result (a prefill); NaN: none */
  double ms[BENCH_MOST_ROUNDS + 1], stage_ms[SFA_STAGE_COUNT][BENCH_MOST_ROUNDS + 1];
} bench_engine;

typedef struct bench_times {
  double median_ms, least_ms, most_ms;
  double times_first; /* its time over that of engine 0: the median of the rounds' ratios, so that a slow spell meets both */
  double stage_ms[SFA_STAGE_COUNT];
} bench_times;

/* Rounds of all engines in turn. The first warms caches and pages up and counts only if it stays alone. repeats > 0: that many more;
 * otherwise at least five and half a second, and none begun after 20 seconds. An engine whose runs are shorter than warm_ms has run,
 * untimed, for as long before each timed one, so that no engine pays for the memory, the threads or the rest of the one before it; 0: it
 * finds its memory as a step among others does. times: [n_engines]. */
int bench_time(bench_engine *engines, int n_engines, int64_t repeats, double warm_ms, bench_times *times, int *n_rounds);
double bench_median(const double *values, int n);
const char *bench_dtype_name(sfa_dtype dtype);
/* The type of a word of "f32|bf16|f16|int8|int4|fp8". */
sfa_dtype bench_dtype(int64_t word);
int bench_check_isa(sfa_isa isa);

/* ---- bench_output.c: results ------------------------------------------------------------------------------------------------------- */

typedef enum bench_kind { CELL_TEXT, CELL_COUNT, CELL_NUMBER, CELL_BYTES, CELL_PERCENT, CELL_TIMES, CELL_FLAG } bench_kind;

/* A column. Columns without a title are in JSON and CSV only. */
typedef struct bench_column {
  const char *name, *title;
  bench_kind kind;
  int width, digits; /* digits: decimals of CELL_NUMBER and CELL_TIMES */
} bench_column;

/* text or number; both absent (NULL, NaN): JSON null, nothing in CSV. Texts stay the caller's until the output is closed. */
typedef struct bench_cell {
  const char *text;
  double number;
} bench_cell;

typedef struct bench_output {
  const app_options *o;
  const bench_column *columns;
  int n_columns;
  bench_cell *rows; /* [n_rows][n_columns] */
  int64_t n_rows;
  FILE *csv;
  char *command, *machine;
  char **kept; /* [n_kept] copies of texts */
  int64_t n_kept;
} bench_output;

/* Prints the table's head, opens --csv for appending. */
int bench_output_open(bench_output *out, const app_options *o, const bench_column *columns, int n_columns);
/* A new row, every cell absent; NULL: out of memory. */
bench_cell *bench_output_row(bench_output *out);
/* A copy of a text that lives as long as the output; NULL: out of memory. */
const char *bench_output_keep(bench_output *out, const char *text);
/* Shows the last row. */
int bench_output_show(bench_output *out);
/* A picture of all rows as bars. columns: those of the tokens and the engine, which label a bar, and of its length. */
int bench_output_bars(const bench_output *out, const char *path, const char *axis, int digits, const int columns[3]);
/* Prints the JSON and frees; status is what came before, and is returned if it is a failure. */
int bench_output_close(bench_output *out, int status);

/* ---- bench_machine.c: what this machine can do at most --------------------------------------------------------------------------- */

/* Bytes a second of a plain sum over `bytes` of memory (at most 1 GiB of them), the best of a few passes, n_threads at once. 0: no memory.
 */
double bench_read_rate(int64_t bytes, int64_t n_threads);
/* f32 multiply-adds a second that the registers can do at most under an instruction set, n_threads at once. */
double bench_multiply_rate(sfa_isa isa, int64_t n_threads);
/* One line about the processor. Static storage. */
const char *bench_machine_name(void);

/* ---- bench_peers.c: other software, in a child process ----------------------------------------------------------------------------- */

/* The child is share/sfa/peers.py beside the command's folder, under $SFA_PYTHON or python3. What is missing is said on stderr, once, and
 * left out: a peer is never an error. */
typedef struct bench_peers bench_peers;

/* NULL if not asked for (--peers). */
bench_peers *bench_peers_open(const app_options *o);
/* Takes NULL, as do the others. */
void bench_peers_close(bench_peers *peers);
/* Drops the engines of cases before. */
void bench_peers_forget(bench_peers *peers);
/* Describes a case (frees it) and adds an engine for each peer that takes part; n_engines is raised. Names live as long as peers. */
void bench_peers_add(bench_peers *peers, int64_t n_threads, cJSON *bench_case, bench_engine *engines, int *n_engines);

/* ---- bench_grid.c: the cases of a benchmark ----------------------------------------------------------------------------------------- */

typedef struct bench_axis {
  const int64_t *values;
  int64_t n;
} bench_axis;

/* What the user gave for an axis, or its default values. */
bench_axis bench_choose(const int_list *given, const int64_t *values, int64_t n);
/* The values of place `place` in the grid; the first axis varies slowest. */
void bench_place(const bench_axis *axes, int n_axes, int64_t place, int64_t *values);
int64_t bench_places(const bench_axis *axes, int n_axes);

/* What the cases of a run share, and the engines of the one that runs: its own first, then peers. */
typedef struct bench_table {
  const app_options *o;
  bench_output out;
  bench_peers *peers;
  bench_engine engines[BENCH_MOST_ENGINES];
  bench_times times[BENCH_MOST_ENGINES];
  int n_engines, n_rounds;
} bench_table;

/* A benchmark: its columns, and what it does at a place of the grid of its axes. v: a value an axis. */
typedef struct bench_grid {
  const bench_column *columns;
  int n_columns, n_axes;
  const bench_axis *axes;
  int (*check)(const app_options *o, const int64_t *v); /* of all places, before the first is run */
  int (*run)(bench_table *t, const int64_t *v);
  int (*draw)(const bench_output *out, const char *path);
} bench_grid;

/* Runs every place, and draws the picture that --plot asks for. */
int bench_grid_run(const app_options *o, const bench_grid *grid);
/* Adds the peers of a case (bench_peers_add; those of cases before are dropped), then times all engines (bench_time). */
int bench_table_time(bench_table *t, int64_t n_threads, cJSON *peer_case, double warm_ms);
/* A row for each engine: name and version from column `engine` on; median, least, most, rounds and times those of engine 0 from column `ms`
 * on; fill gives the other cells of engine i. */
int bench_table_show(bench_table *t, int engine, int ms, int (*fill)(void *bench, bench_table *t, int i, bench_cell *row), void *bench);

/* ---- bench_cuda.c: many queries on a GPU --------------------------------------------------------------------------------------------- */

/* Bytes that copies inside the GPU's memory read and write in a second: the ceiling of what reads all once. 0: the context says why not. */
double bench_cuda_copy_rate(sfa_context *ctx, const app_options *o);
/* What `bench attention` and `bench backward` do with --device cuda. */
int bench_cuda_attention(const app_options *o, bool backward);

#endif
