/* eval_settings.h: what the verbs of `sfa eval` have in common: the settings of attention that are compared, and the data they gather. */
#ifndef SFA_APP_EVAL_SETTINGS_H
#define SFA_APP_EVAL_SETTINGS_H

#include "app.h"

#include <sfa/eval.h>

#include <stdio.h>

/* What a budget of memory holds with a setting. */
typedef struct eval_held {
  int64_t tokens;  /* that fit */
  int64_t context; /* at most as many, for which there is a score; 0: none */
  double score;    /* at that context */
} eval_held;

/* One setting, and what came of it. */
typedef struct eval_setting {
  char name[96];
  sfa_attention_choice choice;
  size_t token_bytes; /* KV bytes a token */
  double seconds;
  eval_held held;
  /* Of a task: */
  sfa_eval_result *results; /* [n_items], the first n_done are there */
  int64_t n_done;
  sfa_eval_score scores[SFA_EVAL_MAX_METRICS];
  /* Of a perplexity: */
  sfa_perplexity perplexity;
  double *position_nll; /* [window] */
  int64_t *position_n;  /* [window] */
} eval_setting;

enum { EVAL_MOST_SETTINGS = 16 };

typedef struct eval_settings {
  eval_setting all[EVAL_MOST_SETTINGS];
  int n;
} eval_settings;

/* Those of --compare "dense,16,16/all", else the one that the options choose. */
int eval_settings_read(const app *a, eval_settings *s);
void eval_settings_free(const app *a, eval_settings *s);

/* A new session as a->session; the last one is destroyed. fn: its progress function. */
int eval_open_session(app *a, const eval_setting *setting, int64_t context_len, sfa_progress_fn fn, void *user);

/* ---- eval_budget.c: what a budget of memory buys ------------------------------------------------------------------------------------- */

/* --budget; without it half of what the first setting takes for `longest` tokens. */
double eval_budget_bytes(const app *a, const eval_settings *s, int64_t longest);
int64_t eval_budget_tokens(const eval_setting *setting, double bytes);
/* Of the settings' `held`, which the caller fills. score: its name. */
void eval_budget_print(const eval_settings *s, double bytes, const char *score);
void eval_budget_json(const eval_setting *setting, cJSON *row);
void eval_budget_plot(FILE *plot, const eval_settings *s, double bytes, const char *score);

/* ---- eval_output.c: what came of a task ------------------------------------------------------------------------------------------- */

/* After the last item, for the following. */
void eval_task_budget(const app *a, eval_settings *s, const sfa_eval *eval);
int eval_task_print(const app *a, const eval_settings *s, const sfa_eval *eval);
cJSON *eval_task_json(const app *a, const eval_settings *s, const sfa_eval *eval);
int eval_task_plot(const app *a, const eval_settings *s, const sfa_eval *eval, const char *path);

#endif
