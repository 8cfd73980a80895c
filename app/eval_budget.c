/* What a budget of memory buys: the context that it holds with each setting, and how good the model is there. */
#include "eval_settings.h"
#include "plot.h"

#include <math.h>
#include <stdio.h>

double eval_budget_bytes(const app *a, const eval_settings *s, int64_t longest) {
  return a->o->budget > 0 ? 1e6 * a->o->budget : 0.5 * (double)longest * (double)s->all[0].token_bytes;
}

int64_t eval_budget_tokens(const eval_setting *setting, double bytes) { return (int64_t)(bytes / (double)setting->token_bytes); }

void eval_budget_print(const eval_settings *s, double bytes, const char *score) {
  char budget[32];
  printf("\nwhat a KV cache of %s holds\n%-24s %10s %12s %10s\n", human_bytes(bytes, budget), "", "tokens", "measured at", score);
  for (int i = 0; i < s->n && s->all[i].n_done; i++) {
    const eval_held *h = &s->all[i].held;
    printf("%-24s %10lld", s->all[i].name, (long long)h->tokens);
    if (h->context)
      printf(" %12lld %10.4f\n", (long long)h->context, h->score);
    else
      printf(" %12s %10s\n", "-", "-");
  }
}

void eval_budget_json(const eval_setting *setting, cJSON *row) {
  cJSON *held = cJSON_AddObjectToObject(row, "held");
  cJSON_AddNumberToObject(held, "tokens", (double)setting->held.tokens);
  cJSON_AddNumberToObject(held, "measured_at", (double)setting->held.context);
  cJSON_AddNumberToObject(held, "score", setting->held.score);
}

/* A point a setting: the tokens held, and the score. Names stand above and below in turns. */
void eval_budget_plot(FILE *plot, const eval_settings *s, double bytes, const char *score) {
  char budget[32];
  fprintf(plot, "$held << EOD\n");
  for (int i = 0; i < s->n && s->all[i].n_done; i++)
    if (s->all[i].held.context) {
      fprintf(plot, "%lld %g %d ", (long long)s->all[i].held.tokens, s->all[i].held.score, i + 1);
      plot_text(plot, s->all[i].name);
      fprintf(plot, "\n");
    }
  fprintf(plot,
          "EOD\nset title 'what a KV cache of %s holds'; unset key; unset logscale x; set autoscale; set xtics auto; set ytics auto\n"
          "set xrange [0:*]; set offsets 0, graph 0.15, graph 0.15, graph 0.15; set xlabel 'tokens held'; set ylabel '%s'\n"
          "if (|$held| > 0) plot $held using 1:2:3 with points pointtype 7 pointsize 1.5 linecolor variable, '' every 2 using 1:2:4 with "
          "labels offset 0,1.2, '' every 2::1 using 1:2:4 with labels offset 0,-1.2\nset offsets; set autoscale\n",
          human_bytes(bytes, budget), score);
}
