/* Grids: a benchmark runs every combination of the values of its axes. */
#include "bench.h"

#include <stdlib.h>

enum { MOST_AXES = 8 };

bench_axis bench_choose(const int_list *given, const int64_t *values, int64_t n) {
  return given->n ? (bench_axis){given->values, given->n} : (bench_axis){values, n};
}

int64_t bench_places(const bench_axis *axes, int n_axes) {
  int64_t n = 1;
  for (int i = 0; i < n_axes; i++)
    n *= axes[i].n;
  return n;
}

void bench_place(const bench_axis *axes, int n_axes, int64_t place, int64_t *values) {
  for (int i = n_axes - 1; i >= 0; i--) {
    values[i] = axes[i].values[place % axes[i].n];
    place /= axes[i].n;
  }
}

/* ---- A run -------------------------------------------------------------------------------------------------------------------------- */

static int check_places(const app_options *o, const bench_grid *grid) {
  int64_t v[MOST_AXES], n_places = bench_places(grid->axes, grid->n_axes);
  int status = EXIT_OK;
  for (int64_t i = 0; i < n_places && !status; i++) {
    bench_place(grid->axes, grid->n_axes, i, v);
    status = grid->check(o, v);
  }
  return status;
}

int bench_grid_run(const app_options *o, const bench_grid *grid) {
  int64_t v[MOST_AXES], n_places = bench_places(grid->axes, grid->n_axes);
  int status = check_places(o, grid);
  if (status)
    return status;
  bench_table *t = calloc(1, sizeof *t);
  if (!t)
    return app_fail("out of memory for the rounds");
  t->o = o;
  status = bench_output_open(&t->out, o, grid->columns, grid->n_columns);
  t->peers = status ? NULL : bench_peers_open(o);
  for (int64_t i = 0; i < n_places && !status; i++) {
    bench_place(grid->axes, grid->n_axes, i, v);
    t->n_engines = 0;
    status = grid->run(t, v);
  }
  if (!status && o->plot)
    status = grid->draw(&t->out, o->plot);
  status = bench_output_close(&t->out, status);
  bench_peers_close(t->peers);
  free(t);
  return status;
}

int bench_table_time(bench_table *t, int64_t n_threads, cJSON *peer_case, double warm_ms) {
  bench_peers_forget(t->peers);
  bench_peers_add(t->peers, n_threads, peer_case, t->engines, &t->n_engines);
  return bench_time(t->engines, t->n_engines, t->o->repeats, warm_ms, t->times, &t->n_rounds);
}

int bench_table_show(bench_table *t, int engine, int ms, int (*fill)(void *bench, bench_table *t, int i, bench_cell *row), void *bench) {
  int status = EXIT_OK;
  for (int i = 0; i < t->n_engines && !status; i++) {
    const bench_engine *e = &t->engines[i];
    if (e->lost || e->part)
      continue;
    bench_cell *row = bench_output_row(&t->out);
    if (!row)
      return EXIT_FAILED;
    row[engine].text = bench_output_keep(&t->out, e->name);
    row[engine + 1].text = e->version;
    row[ms].number = t->times[i].median_ms;
    row[ms + 1].number = t->times[i].least_ms;
    row[ms + 2].number = t->times[i].most_ms;
    row[ms + 3].number = t->n_rounds;
    row[ms + 4].number = t->times[i].times_first;
    status = fill(bench, t, i, row);
    if (!status)
      status = bench_output_show(&t->out);
  }
  return status;
}
