/* sfa eval ppl: the perplexity of a text in strided windows, and the loss by place in the window, with one or several settings. */
#include "eval_settings.h"
#include "plot.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* Places of a window in groups that grow: [2^(i/2), 2^((i+1)/2)). */
enum { MOST_GROUPS = 64 };

typedef struct curve {
  int n;
  double place[MOST_GROUPS], nll[MOST_GROUPS]; /* middle of a group, mean loss in it */
} curve;

typedef struct ppl {
  app app;
  eval_settings settings;
  int32_t *ids;
  int64_t n, window, stride;
  size_t n_bytes; /* of the text */
} ppl;

static void make_curve(const eval_setting *setting, int64_t window, curve *c) {
  c->n = 0;
  for (int i = 0; i < MOST_GROUPS; i++) {
    int64_t first = (int64_t)pow(2, 0.5 * i), end = (int64_t)pow(2, 0.5 * (i + 1)), n = 0;
    double sum = 0;
    for (int64_t place = first; place < end && place <= window; place++) { /* place 1 is the prediction from one token */
      sum += setting->position_nll[place - 1];
      n += setting->position_n[place - 1];
    }
    if (n) {
      c->place[c->n] = 0.5 * (double)(first + (end <= window ? end : window + 1) - 1);
      c->nll[c->n++] = sum / (double)n;
    }
  }
}

static double budget_of(const ppl *p) { return eval_budget_bytes(&p->app, &p->settings, p->window); }

/* The loss of predictions from about as many tokens as the budget holds: the last third of them. */
static void find_held(const ppl *p, eval_setting *setting) {
  eval_held *held = &setting->held;
  double sum = 0;
  int64_t n = 0;
  *held = (eval_held){.tokens = eval_budget_tokens(setting, budget_of(p))};
  const int64_t end = held->tokens < p->window ? held->tokens : p->window;
  for (int64_t place = end; place >= 1 && 3 * place >= 2 * end; place--) {
    sum += setting->position_nll[place - 1];
    n += setting->position_n[place - 1];
  }
  if (n) {
    held->context = end;
    held->score = sum / (double)n;
  }
}

static int run_setting(ppl *p, eval_setting *setting) {
  app *a = &p->app;
  int status = eval_open_session(a, setting, p->window, progress_step, &a->progress);
  if (status)
    return status;
  setting->position_nll = calloc((size_t)p->window, sizeof *setting->position_nll);
  setting->position_n = calloc((size_t)p->window, sizeof *setting->position_n);
  if (!setting->position_nll || !setting->position_n)
    return app_fail("out of memory for the losses of a window");
  a->progress = (progress){.what = setting->name, .start = seconds_now()};
  sfa_status scored =
      sfa_eval_perplexity(a->session, p->ids, p->n, p->window, p->stride, &setting->perplexity, setting->position_nll, setting->position_n);
  progress_clear(&a->progress);
  setting->seconds = seconds_now() - a->progress.start;
  setting->n_done = setting->perplexity.n_scored;
  find_held(p, setting);
  if (scored == SFA_OK)
    return interrupted() ? EXIT_INTERRUPTED : EXIT_OK;
  return scored == SFA_ERROR_CANCELLED ? EXIT_INTERRUPTED : app_fail_status(a->ctx);
}

static int print_table(const ppl *p) {
  const app *a = &p->app;
  printf("%s: %lld tokens of %s, windows of %lld that move by %lld\n\n%-24s %10s %20s %14s %9s %9s\n",
         *a->info.name ? a->info.name : a->info.family, (long long)p->n, a->o->file, (long long)p->window, (long long)p->stride, "",
         "perplexity", "NLL", "bits per byte", "time s", "KV/token");
  for (int i = 0; i < p->settings.n && p->settings.all[i].n_done; i++) {
    const eval_setting *s = &p->settings.all[i];
    char bytes[32];
    printf("%-24s %10.4f %9.4f +- %7.4f %14.4f %9.1f %9s\n", s->name, exp(s->perplexity.nll), s->perplexity.nll,
           s->perplexity.stderr_of_mean, s->perplexity.nll * (double)p->n / (double)p->n_bytes / log(2), s->seconds,
           human_bytes((double)s->token_bytes, bytes));
  }
  printf("\nloss by place in the window (tokens before)\n%-24s", "");
  curve c;
  make_curve(&p->settings.all[0], p->window, &c);
  for (int g = c.n & 1; g < c.n; g += 2)
    printf(" %7.0f", c.place[g]);
  printf("\n");
  for (int i = 0; i < p->settings.n && p->settings.all[i].n_done; i++) {
    make_curve(&p->settings.all[i], p->window, &c);
    printf("%-24s", p->settings.all[i].name);
    for (int g = c.n & 1; g < c.n; g += 2)
      printf(" %7.3f", c.nll[g]);
    printf("\n");
  }
  eval_budget_print(&p->settings, budget_of(p), "NLL");
  return app_flush();
}

static cJSON *ppl_json(const ppl *p) {
  cJSON *document = cJSON_CreateObject(), *list;
  cJSON_AddStringToObject(document, "task", "ppl");
  cJSON_AddStringToObject(document, "file", p->app.o->file);
  cJSON_AddNumberToObject(document, "tokens", (double)p->n);
  cJSON_AddNumberToObject(document, "bytes", (double)p->n_bytes);
  cJSON_AddNumberToObject(document, "window", (double)p->window);
  cJSON_AddNumberToObject(document, "stride", (double)p->stride);
  cJSON_AddNumberToObject(document, "budget_bytes", budget_of(p));
  list = cJSON_AddArrayToObject(document, "settings");
  for (int i = 0; i < p->settings.n && p->settings.all[i].n_done; i++) {
    const eval_setting *s = &p->settings.all[i];
    cJSON *row = cJSON_CreateObject();
    curve c;
    make_curve(s, p->window, &c);
    cJSON_AddStringToObject(row, "name", s->name);
    cJSON_AddNumberToObject(row, "perplexity", exp(s->perplexity.nll));
    cJSON_AddNumberToObject(row, "nll", s->perplexity.nll);
    cJSON_AddNumberToObject(row, "stderr", s->perplexity.stderr_of_mean);
    cJSON_AddNumberToObject(row, "scored", (double)s->perplexity.n_scored);
    cJSON_AddNumberToObject(row, "seconds", s->seconds);
    cJSON_AddNumberToObject(row, "kv_bytes_per_token", (double)s->token_bytes);
    eval_budget_json(s, row);
    cJSON_AddItemToObject(row, "place", cJSON_CreateDoubleArray(c.place, c.n));
    cJSON_AddItemToObject(row, "place_nll", cJSON_CreateDoubleArray(c.nll, c.n));
    cJSON_AddItemToArray(list, row);
  }
  return document;
}

/* Loss by tokens before, and by the bytes that their keys and values take: what a budget of memory buys. */
static int plot_curves(const ppl *p, const char *path) {
  FILE *plot = plot_open(path, 1700, 520);
  if (plot) {
    for (int i = 0; i < p->settings.n && p->settings.all[i].n_done; i++) {
      curve c;
      make_curve(&p->settings.all[i], p->window, &c);
      fprintf(plot, "$line%d << EOD\n", i);
      for (int g = 0; g < c.n; g++)
        fprintf(plot, "%g %g %g\n", c.place[g], c.nll[g], 1e-6 * c.place[g] * (double)p->settings.all[i].token_bytes);
      fprintf(plot, "EOD\n");
    }
    fprintf(plot, "set multiplot layout 1,3\nset grid; set logscale x; set key top right; set ylabel 'NLL, nats a token'\n");
    for (int by_bytes = 0; by_bytes < 2; by_bytes++) {
      fprintf(plot, "set xlabel '%s'\nplot ", by_bytes ? "KV cache of the tokens before, MB" : "tokens before");
      for (int i = 0; i < p->settings.n && p->settings.all[i].n_done; i++) {
        fprintf(plot, "%s$line%d using %d:2 with linespoints linewidth 2 pointsize 0.5 title ", i ? ", " : "", i, by_bytes ? 3 : 1);
        plot_text(plot, p->settings.all[i].name);
      }
      fprintf(plot, "\n");
    }
    eval_budget_plot(plot, &p->settings, budget_of(p), "NLL, nats a token");
    fprintf(plot, "unset multiplot\n");
  }
  return plot_close(plot) ? EXIT_OK : app_fail("gnuplot could not draw %s", path);
}

static int prepare(ppl *p, const app_options *o) {
  app *a = &p->app;
  int status = app_require_model(o, "eval ppl");
  if (!status && !o->file)
    status = app_usage("eval ppl wants a text: -f FILE");
  if (!status && o->plot && !plot_available())
    status = app_fail("gnuplot is missing, and --plot draws by it: install gnuplot-nox");
  if (!status)
    status = app_open_model(a, o, true);
  if (!status)
    status = eval_settings_read(a, &p->settings);
  if (!status)
    status = app_context_len(a, &p->window);
  if (!status)
    status = app_read_ids(a, &p->ids, &p->n, &p->n_bytes);
  if (status)
    return status;
  if (p->n < 2)
    return app_usage("the text has %lld tokens: at least 2 are wanted", (long long)p->n);
  p->window = p->window < p->n ? p->window : p->n;
  p->stride = o->stride > 0 ? o->stride : p->window > 1 ? p->window / 2 : 1;
  if (p->window < 2 || p->stride > p->window)
    return app_usage("--stride %lld is more than the window of %lld tokens; tokens between would go unscored", (long long)p->stride,
                     (long long)p->window);
  return EXIT_OK;
}

static int run_ppl(ppl *p, const app_options *o) {
  int status = prepare(p, o);
  if (status)
    return status;
  interrupt_begin();
  for (int i = 0; i < p->settings.n && !status; i++)
    status = run_setting(p, &p->settings.all[i]);
  if ((status && status != EXIT_INTERRUPTED) || !p->settings.all[0].n_done)
    return status;
  int told = o->json ? app_print_json(ppl_json(p)) : print_table(p);
  if (!told && o->plot)
    told = plot_curves(p, o->plot);
  return status ? status : told;
}

int cmd_eval_ppl(const app_options *o) {
  ppl p = {0};
  int status = run_ppl(&p, o);
  if (p.ids)
    sfa_free_ids(p.app.ctx, p.ids);
  for (int i = 0; i < p.settings.n; i++)
    p.settings.all[i].n_done = 0; /* of tokens, not of results */
  eval_settings_free(&p.app, &p.settings);
  app_close(&p.app);
  return status;
}
