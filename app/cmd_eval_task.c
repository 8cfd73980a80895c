/* sfa eval hellaswag and its kin: the items of a task, with one or several settings of attention. */
#include "eval_settings.h"
#include "plot.h"

#include <stdio.h>
#include <stdlib.h>

static int open_items(const app *a, const char *task, sfa_eval **eval) {
  const app_options *o = a->o;
  sfa_eval_options options = {.struct_size = sizeof options,
                              .limit = o->limit > 0 ? o->limit : 0,
                              .shots_path = o->shots_file,
                              .n_shots = o->shots == 0  ? -1
                                         : o->shots > 0 ? (int32_t)o->shots
                                                        : 0,
                              .n_generate = o->n_predict > 0 ? (int32_t)o->n_predict : 0,
                              .lengths = o->lengths.n ? o->lengths.values : NULL,
                              .n_lengths = (int32_t)o->lengths.n,
                              .n_depths = o->depths > 0 ? (int32_t)o->depths : 0,
                              .n_trials = o->trials > 0 ? (int32_t)o->trials : 0,
                              .seed = o->seed > 0 ? (uint64_t)o->seed : 0};
  return sfa_eval_open(a->model, task, o->file, &options, eval) == SFA_OK ? EXIT_OK : app_fail_status(a->ctx);
}

/* The session asks between chunks whether to go on. */
static int stop_on_request(void *user, int64_t done, int64_t total) {
  (void)user, (void)done, (void)total;
  return interrupted();
}

static int run_setting(app *a, const sfa_eval *eval, int64_t n_items, eval_setting *setting) {
  int64_t context_len;
  int status = app_context_len(a, &context_len);
  if (!status)
    status = eval_open_session(a, setting, context_len, stop_on_request, NULL);
  if (status)
    return status;
  setting->results = calloc((size_t)n_items, sizeof *setting->results);
  if (!setting->results)
    return app_fail("out of memory for the results of %lld items", (long long)n_items);
  a->progress = (progress){.what = setting->name, .unit = "items", .start = seconds_now()};
  while (!status && setting->n_done < n_items) {
    sfa_status scored = sfa_eval_item(eval, a->session, setting->n_done, &setting->results[setting->n_done]);
    if (scored != SFA_OK)
      status = scored == SFA_ERROR_CANCELLED ? EXIT_INTERRUPTED : app_fail_status(a->ctx);
    else if (progress_step(&a->progress, ++setting->n_done, n_items) && setting->n_done < n_items)
      status = EXIT_INTERRUPTED;
  }
  progress_clear(&a->progress);
  setting->seconds = seconds_now() - a->progress.start;
  sfa_eval_summarise(eval, setting->results, setting->n_done, setting->scores);
  return status;
}

static int run_task(app *a, const app_options *o, eval_settings *s, sfa_eval **eval) {
  char verb[64];
  snprintf(verb, sizeof verb, "eval %s", o->second);
  int status = app_require_model(o, verb);
  if (!status && !o->file)
    status = app_usage("%s wants its data: -f FILE", verb);
  if (!status && o->plot && !plot_available())
    status = app_fail("gnuplot is missing, and --plot draws by it: install gnuplot-nox");
  if (!status)
    status = app_open_model(a, o, true);
  if (!status)
    status = eval_settings_read(a, s);
  if (!status)
    status = open_items(a, o->second, eval);
  if (status)
    return status;
  sfa_eval_info info;
  sfa_eval_describe(*eval, &info);
  interrupt_begin();
  for (int i = 0; i < s->n && !status; i++)
    status = run_setting(a, *eval, info.n_items, &s->all[i]);
  if (status && status != EXIT_INTERRUPTED)
    return status;
  eval_task_budget(a, s, *eval);
  /* What is done until Ctrl-C is told as well. */
  int told = o->json ? app_print_json(eval_task_json(a, s, *eval)) : eval_task_print(a, s, *eval);
  if (!told && o->plot)
    told = eval_task_plot(a, s, *eval, o->plot);
  return status ? status : told;
}

int cmd_eval_task(const app_options *o) {
  app a = {0};
  eval_settings s = {0};
  sfa_eval *eval = NULL;
  int status = run_task(&a, o, &s, &eval);
  eval_settings_free(&a, &s);
  sfa_eval_close(eval);
  app_close(&a);
  return status;
}
