/* What came of a task: table, JSON, picture. */
#include "eval_settings.h"
#include "plot.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- Grids of length and depth --------------------------------------------------------------------------------------------------- */

enum { DEPTH_BINS = 10, MOST = 64 };

/* Means of the first metric by length and depth. */
typedef struct grid {
  int n_lengths, n_depths;
  int64_t lengths[MOST];
  double depths[MOST];
  double cells[MOST][MOST]; /* [n_lengths][n_depths]; NaN where no item is */
  int n_items[MOST][MOST];
} grid;

/* Where an item's prompt stands: niah's lengths are exact; those of other tasks differ by little and are taken as one, their depths as
 * tenths. */
static bool is_needle(const sfa_eval_info *info) { return strcmp(info->task, "niah") == 0; }

static int find_length(const sfa_eval_info *info, grid *g, int64_t length) {
  int i = 0;
  while (i < g->n_lengths && is_needle(info) && g->lengths[i] != length)
    i++;
  if (i == g->n_lengths && i < MOST)
    g->lengths[g->n_lengths++] = length;
  return i < MOST ? i : MOST - 1;
}

static int find_depth(const sfa_eval_info *info, grid *g, double depth) {
  int i = 0;
  if (!is_needle(info)) {
    for (g->n_depths = 0; g->n_depths < DEPTH_BINS; g->n_depths++)
      g->depths[g->n_depths] = (g->n_depths + 0.5) / DEPTH_BINS;
    return depth < 1 ? (int)(depth * DEPTH_BINS) : DEPTH_BINS - 1;
  }
  while (i < g->n_depths && g->depths[i] != depth)
    i++;
  if (i == g->n_depths && i < MOST)
    g->depths[g->n_depths++] = depth;
  return i < MOST ? i : MOST - 1;
}

static void fill_grid(const sfa_eval_info *info, const eval_setting *setting, grid *g) {
  *g = (grid){0};
  for (int64_t i = 0; i < setting->n_done; i++) {
    const sfa_eval_result *r = &setting->results[i];
    int length = find_length(info, g, r->n_tokens), depth = find_depth(info, g, r->depth);
    g->cells[length][depth] += r->metrics[0];
    g->n_items[length][depth]++;
  }
  for (int i = 0; i < g->n_lengths; i++)
    for (int d = 0; d < g->n_depths; d++)
      g->cells[i][d] = g->n_items[i][d] ? g->cells[i][d] / g->n_items[i][d] : NAN;
}

/* Over the items of all depths. */
static double mean_of_length(const grid *g, int length) {
  double sum = 0;
  int n = 0;
  for (int d = 0; d < g->n_depths; d++)
    if (g->n_items[length][d]) {
      sum += g->cells[length][d] * g->n_items[length][d];
      n += g->n_items[length][d];
    }
  return sum / n;
}

static void print_grid(const sfa_eval_info *info, const eval_setting *setting) {
  grid g;
  fill_grid(info, setting, &g);
  printf("\n%s: %s by tokens of the prompt (down) and depth of what is asked for (across)\n%10s", setting->name, info->metrics[0], "");
  for (int d = 0; d < g.n_depths; d++)
    printf(" %5.2f", g.depths[d]);
  printf("\n");
  for (int i = 0; i < g.n_lengths; i++) {
    printf("%10lld", (long long)g.lengths[i]);
    for (int d = 0; d < g.n_depths; d++)
      if (isnan(g.cells[i][d]))
        printf(" %5s", "-");
      else
        printf(" %5.2f", g.cells[i][d]);
    printf("\n");
  }
}

/* ---- A budget --------------------------------------------------------------------------------------------------------------------- */

static double budget_of(const app *a, const eval_settings *s) {
  int64_t longest = 0;
  for (int64_t i = 0; i < s->all[0].n_done; i++)
    longest = s->all[0].results[i].n_tokens > longest ? s->all[0].results[i].n_tokens : longest;
  return eval_budget_bytes(a, s, longest);
}

/* The longest prompt that fits. */
void eval_task_budget(const app *a, eval_settings *s, const sfa_eval *eval) {
  sfa_eval_info info;
  sfa_eval_describe(eval, &info);
  for (int i = 0; is_needle(&info) && i < s->n && s->all[i].n_done; i++) {
    eval_held *held = &s->all[i].held;
    grid g;
    fill_grid(&info, &s->all[i], &g);
    *held = (eval_held){.tokens = eval_budget_tokens(&s->all[i], budget_of(a, s))};
    for (int l = 0; l < g.n_lengths; l++)
      if (g.lengths[l] <= held->tokens && g.lengths[l] > held->context) {
        held->context = g.lengths[l];
        held->score = mean_of_length(&g, l);
      }
  }
}

/* ---- Table ----------------------------------------------------------------------------------------------------------------------- */

/* Items whose first metric is that of the first setting. */
static int64_t n_agreeing(const eval_settings *s, const eval_setting *setting) {
  int64_t n = 0;
  for (int64_t i = 0; i < setting->n_done && i < s->all[0].n_done; i++)
    n += setting->results[i].metrics[0] == s->all[0].results[i].metrics[0];
  return n;
}

int eval_task_print(const app *a, const eval_settings *s, const sfa_eval *eval) {
  sfa_eval_info info;
  sfa_eval_describe(eval, &info);
  printf("%s: %s, %lld items of %s, %d worked examples before each\n\n%-24s %6s", *a->info.name ? a->info.name : a->info.family, info.task,
         (long long)info.n_items, a->o->file, info.n_shots, "", "items");
  for (int m = 0; m < info.n_metrics; m++)
    printf(" %22s", info.metrics[m]);
  printf(" %9s %9s%s\n", "time s", "KV/token", s->n > 1 ? "      same" : "");
  for (int i = 0; i < s->n && s->all[i].n_done; i++) {
    const eval_setting *setting = &s->all[i];
    char bytes[32];
    printf("%-24s %6lld", setting->name, (long long)setting->n_done);
    for (int m = 0; m < info.n_metrics; m++)
      printf(" %11.4f +- %7.4f", setting->scores[m].value, setting->scores[m].stderr_of_mean);
    printf(" %9.1f %9s", setting->seconds, human_bytes((double)setting->token_bytes, bytes));
    if (i)
      printf(" %7.1f %%", 100.0 * (double)n_agreeing(s, setting) / (double)setting->n_done);
    printf("\n");
  }
  if (s->n > 1)
    printf("\nsame: items with the %s of %s\n", info.metrics[0], s->all[0].name);
  for (int i = 0; info.has_depth && i < s->n && s->all[i].n_done; i++)
    print_grid(&info, &s->all[i]);
  if (is_needle(&info))
    eval_budget_print(s, budget_of(a, s), info.metrics[0]);
  return app_flush();
}

/* ---- JSON ------------------------------------------------------------------------------------------------------------------------ */

static cJSON *item_json(const sfa_eval_info *info, const sfa_eval_result *r) {
  cJSON *item = cJSON_CreateObject();
  for (int m = 0; m < info->n_metrics; m++)
    cJSON_AddNumberToObject(item, info->metrics[m], r->metrics[m]);
  cJSON_AddNumberToObject(item, "tokens", (double)r->n_tokens);
  if (info->has_depth)
    cJSON_AddNumberToObject(item, "depth", r->depth);
  if (r->text) {
    cJSON_AddStringToObject(item, "answer", r->text);
    return item;
  }
  cJSON_AddNumberToObject(item, "gold", r->gold);
  cJSON_AddItemToObject(item, "loglik", cJSON_CreateDoubleArray(r->loglik, r->n_choices));
  cJSON_AddItemToObject(item, "greedy", cJSON_CreateIntArray(r->is_greedy, r->n_choices));
  return item;
}

static cJSON *setting_json(const sfa_eval_info *info, const eval_setting *setting) {
  cJSON *row = cJSON_CreateObject(), *scores, *items;
  cJSON_AddStringToObject(row, "name", setting->name);
  cJSON_AddNumberToObject(row, "seconds", setting->seconds);
  cJSON_AddNumberToObject(row, "kv_bytes_per_token", (double)setting->token_bytes);
  scores = cJSON_AddObjectToObject(row, "scores");
  for (int m = 0; m < info->n_metrics; m++) {
    cJSON *score = cJSON_AddObjectToObject(scores, info->metrics[m]);
    cJSON_AddNumberToObject(score, "value", setting->scores[m].value);
    cJSON_AddNumberToObject(score, "stderr", setting->scores[m].stderr_of_mean);
  }
  if (is_needle(info))
    eval_budget_json(setting, row);
  items = cJSON_AddArrayToObject(row, "items");
  for (int64_t i = 0; i < setting->n_done; i++)
    cJSON_AddItemToArray(items, item_json(info, &setting->results[i]));
  return row;
}

cJSON *eval_task_json(const app *a, const eval_settings *s, const sfa_eval *eval) {
  sfa_eval_info info;
  sfa_eval_describe(eval, &info);
  cJSON *document = cJSON_CreateObject();
  cJSON_AddStringToObject(document, "task", info.task);
  cJSON_AddStringToObject(document, "file", a->o->file);
  cJSON_AddStringToObject(document, "model", *a->info.name ? a->info.name : a->info.family);
  cJSON_AddNumberToObject(document, "examples", info.n_shots);
  if (is_needle(&info))
    cJSON_AddNumberToObject(document, "budget_bytes", budget_of(a, s));
  cJSON *settings = cJSON_AddArrayToObject(document, "settings");
  for (int i = 0; i < s->n && s->all[i].n_done; i++)
    cJSON_AddItemToArray(settings, setting_json(&info, &s->all[i]));
  return document;
}

/* ---- Picture --------------------------------------------------------------------------------------------------------------------- */

/* One panel a setting: shades by length and depth, boxes of their own: an image wants two columns at least, and no gaps. */
static void plot_heat(FILE *plot, const sfa_eval_info *info, const eval_setting *setting) {
  grid g;
  fill_grid(info, setting, &g);
  fprintf(plot, "$heat << EOD\n");
  for (int i = 0; i < g.n_lengths; i++)
    for (int d = 0; d < g.n_depths; d++)
      if (!isnan(g.cells[i][d]))
        fprintf(plot, "%d %d %g\n", i, d, g.cells[i][d]);
  fprintf(plot, "EOD\nset title ");
  plot_text(plot, setting->name);
  fprintf(plot, "\nunset key; set xtics (");
  for (int i = 0; i < g.n_lengths; i++)
    fprintf(plot, "%s'%lld' %d", i ? ", " : "", (long long)g.lengths[i], i);
  fprintf(plot, "); set ytics (");
  for (int d = 0; d < g.n_depths; d++)
    fprintf(plot, "%s'%.2f' %d", d ? ", " : "", g.depths[d], d);
  fprintf(plot,
          ")\nset xlabel 'tokens of the prompt'; set ylabel 'depth'; set xrange [-0.5:%d.5]; set yrange [%d.5:-0.5]; set cbrange [0:1]\n"
          "set palette defined (0 '#b2182b', 0.5 '#fddbc7', 1 '#2166ac')\nset style fill solid 1 noborder\n"
          "plot $heat using 1:2:(0.5):(0.5):3 with boxxyerror fillcolor palette\n",
          g.n_lengths - 1, g.n_depths - 1);
}

/* A line a setting: the first metric against the tokens of the prompt, or against the bytes that its keys and values take. */
static void plot_lengths(FILE *plot, const sfa_eval_info *info, const eval_settings *s, bool by_bytes) {
  for (int i = 0; i < s->n && s->all[i].n_done; i++) {
    grid g;
    fill_grid(info, &s->all[i], &g);
    fprintf(plot, "$line%d << EOD\n", i);
    for (int l = 0; l < g.n_lengths; l++)
      fprintf(plot, "%g %g\n", (double)g.lengths[l] * (by_bytes ? 1e-6 * (double)s->all[i].token_bytes : 1), mean_of_length(&g, l));
    fprintf(plot, "EOD\n");
  }
  fprintf(plot,
          "set title '%s against %s'; set key bottom left; set xlabel '%s'; set ylabel '%s'; set autoscale x; set yrange [0:1.05]; "
          "set logscale x; set xtics auto; set ytics auto\nplot ",
          info->metrics[0], by_bytes ? "KV bytes" : "length", by_bytes ? "KV cache, MB" : "tokens of the prompt", info->metrics[0]);
  for (int i = 0; i < s->n && s->all[i].n_done; i++) {
    fprintf(plot, "%s$line%d using 1:2 with linespoints linewidth 2 title ", i ? ", " : "", i);
    plot_text(plot, s->all[i].name);
  }
  fprintf(plot, "\nunset logscale x\n");
}

/* Bars of a metric with its standard error, a bar a setting; or the metric against the KV bytes of a token. */
static void plot_metric(FILE *plot, const sfa_eval_info *info, const eval_settings *s, int metric, bool by_bytes) {
  fprintf(plot, "$rows << EOD\n");
  for (int i = 0; i < s->n && s->all[i].n_done; i++) {
    plot_text(plot, s->all[i].name);
    fprintf(plot, " %g %g %g\n", s->all[i].scores[metric].value, s->all[i].scores[metric].stderr_of_mean,
            1e-3 * (double)s->all[i].token_bytes);
  }
  fprintf(plot, "EOD\nset title '%s%s'; unset key; set autoscale; set offsets graph 0.1, graph 0.1, graph 0.1, 0; set xlabel '%s'\n",
          info->metrics[metric], by_bytes ? " against memory" : "", by_bytes ? "KV kB a token" : "");
  if (by_bytes)
    fprintf(plot, "set xtics auto norotate; plot $rows using 4:2:3 with yerrorbars pointtype 7 linecolor 1, '' using 4:2:1 with labels "
                  "offset 0,1\n");
  else
    fprintf(plot, "set yrange [0:*]; set xtics rotate by -30; set boxwidth 0.7; set style fill solid 0.6\n"
                  "plot $rows using 0:2:0:xtic(1) with boxes linecolor variable, '' using 0:2:3 with yerrorbars linecolor 'black' "
                  "pointsize 0\n");
}

int eval_task_plot(const app *a, const eval_settings *s, const sfa_eval *eval, const char *path) {
  sfa_eval_info info;
  sfa_eval_describe(eval, &info);
  int n = 0;
  while (n < s->n && s->all[n].n_done)
    n++;
  int panels = info.has_depth ? n + 2 + is_needle(&info) : info.n_metrics + 1, columns = panels < 4   ? panels
                                                                                         : panels < 7 ? (panels + 1) / 2
                                                                                                      : 4;
  int lines = (panels + columns - 1) / columns;
  if (n == 0)
    return app_fail("nothing was scored; there is nothing to draw in %s", path);
  FILE *plot = plot_open(path, 420 * columns, 60 + 360 * lines);
  if (plot) {
    char title[160];
    snprintf(title, sizeof title, "%s, %s, %lld items", *a->info.name ? a->info.name : a->info.family, info.task, (long long)info.n_items);
    fprintf(plot, "set multiplot layout %d,%d title ", lines, columns);
    plot_text(plot, title);
    fprintf(plot, "\nset grid\n");
    for (int i = 0; info.has_depth && i < n; i++)
      plot_heat(plot, &info, &s->all[i]);
    for (int by_bytes = 0; info.has_depth && by_bytes < 2; by_bytes++)
      plot_lengths(plot, &info, s, by_bytes);
    if (is_needle(&info))
      eval_budget_plot(plot, s, budget_of(a, s), info.metrics[0]);
    for (int m = 0; !info.has_depth && m < info.n_metrics; m++)
      plot_metric(plot, &info, s, m, false);
    if (!info.has_depth)
      plot_metric(plot, &info, s, 0, true);
    fprintf(plot, "unset multiplot\n");
  }
  return plot_close(plot) ? EXIT_OK : app_fail("gnuplot could not draw %s", path);
}
