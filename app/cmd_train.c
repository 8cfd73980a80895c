/* sfa train: a model, a recipe and token shards to a trained model, with its log and its curves. */
#include "app.h"
#include "plot.h"

#include <sfa/train.h>

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- Lists -------------------------------------------------------------------------------------------------------------------------- */

/* "a,b" as its parts, in memory that list_free gives back. */
typedef struct file_list {
  char **texts;
  int64_t n;
} file_list;

static void list_free(file_list *list) {
  for (int64_t i = 0; i < list->n; i++)
    free(list->texts[i]);
  free(list->texts);
  *list = (file_list){0};
}

/* Takes text. */
static int list_add(file_list *list, char *text) {
  char **larger = realloc(list->texts, (size_t)(list->n + 1) * sizeof *larger);
  if (!larger || !text) {
    free(text);
    return app_fail("out of memory for a list of files");
  }
  list->texts = larger;
  list->texts[list->n++] = text;
  return EXIT_OK;
}

static int list_split(const char *text, file_list *list) {
  int status = EXIT_OK;
  for (const char *at = text; at && !status;) {
    const char *comma = strchr(at, ',');
    status = list_add(list, strndup(at, comma ? (size_t)(comma - at) : strlen(at)));
    at = comma ? comma + 1 : NULL;
  }
  return status;
}

/* ---- The recipe ------------------------------------------------------------------------------------------------- */

static int read_file(const char *path, char **text) {
  FILE *file = fopen(path, "rb");
  text_buffer buffer = {0};
  char block[4096];
  bool complete = file != NULL;
  for (size_t n; complete && (n = fread(block, 1, sizeof block, file)) > 0;)
    complete = text_append(&buffer, block, n);
  complete = complete && !ferror(file) && text_append(&buffer, "", 0);
  int reason = errno;
  if (file)
    fclose(file);
  *text = buffer.bytes;
  if (complete && strlen(buffer.bytes) == buffer.n)
    return EXIT_OK;
  free(buffer.bytes);
  return complete ? app_fail("%s is not a text", path) : app_fail("cannot read %s: %s", path, strerror(reason));
}

/* "steps=200,decay=wsd" as a JSON object that lies over the others. */
static int add_settings(const char *settings, file_list *recipes) {
  file_list parts = {0};
  int status = list_split(settings, &parts);
  cJSON *object = cJSON_CreateObject();
  for (int64_t i = 0; i < parts.n && !status; i++) {
    char *value = strchr(parts.texts[i], '=');
    if (!value || value == parts.texts[i]) {
      status = app_usage("--set takes NAME=VALUE,NAME=VALUE, not \"%s\"", settings);
      break;
    }
    *value++ = 0;
    cJSON *json = cJSON_ParseWithOpts(value, NULL, 1); /* then it stays as it is written: printed, a number would lose digits */
    cJSON_AddItemToObject(object, parts.texts[i], json ? cJSON_CreateRaw(value) : cJSON_CreateString(value));
    cJSON_Delete(json);
  }
  char *text = status ? NULL : cJSON_PrintUnformatted(object);
  if (!status)
    status = list_add(recipes, text ? strdup(text) : NULL);
  cJSON_free(text);
  cJSON_Delete(object);
  list_free(&parts);
  return status;
}

/* From bottom to top: base, the files, over, the settings of each --set; those that are NULL are left out. */
static int read_recipes(const app_options *o, const char *base, const char *over, file_list *recipes) {
  file_list files = {0};
  int status = base ? list_add(recipes, strdup(base)) : EXIT_OK;
  if (!status && o->config)
    status = list_split(o->config, &files);
  for (int64_t i = 0; i < files.n && !status; i++) {
    char *text;
    status = read_file(files.texts[i], &text);
    if (!status)
      status = list_add(recipes, text);
  }
  list_free(&files);
  if (!status && over)
    status = list_add(recipes, strdup(over));
  for (int64_t i = 0; i < o->set.n && !status; i++)
    status = add_settings(o->set.values[i], recipes);
  return status;
}

/* ---- While it runs ---------------------------------------------------------------------------------------------- */

typedef struct watcher {
  bool terminal, shown, quiet;
  double last_line; /* seconds_now() when a line was last written to what is no terminal */
  sfa_train_progress latest;
  double first_loss, validation_loss;
} watcher;

static void format_time(double seconds, char out[32]) {
  if (seconds < 120)
    snprintf(out, 32, "%.0f s", seconds);
  else if (seconds < 2 * 3600)
    snprintf(out, 32, "%.0f min", seconds / 60);
  else
    snprintf(out, 32, "%.1f h", seconds / 3600);
}

/* One line that is written over on a terminal; elsewhere one every few seconds. Held-out losses stay on a line of their own. */
static int watch(void *user, const sfa_train_progress *p) {
  enum { SECONDS_A_LINE = 10 };
  watcher *w = user;
  const bool held_out = !isnan(p->validation_loss);
  const double now = seconds_now();
  char left[32], line[200];
  w->latest = *p;
  if (isnan(w->first_loss))
    w->first_loss = p->loss;
  if (held_out)
    w->validation_loss = p->validation_loss;
  format_time(p->seconds_left, left);
  if (held_out)
    snprintf(line, sizeof line, "step %" PRId64 ": held-out loss %.4f", p->step, p->validation_loss);
  else
    snprintf(line, sizeof line, "step %" PRId64 " of %" PRId64 ": loss %.4f, k %d, %.0f tokens/s, %s left", p->step, p->n_steps, p->loss,
             p->k, p->tokens_per_s, left);
  if (w->terminal) {
    fprintf(stderr, "\r\033[K%s%s", line, held_out ? "\n" : "");
    w->shown = !held_out;
  } else if (held_out || now - w->last_line >= SECONDS_A_LINE) {
    fprintf(stderr, "%s\n", line);
    w->last_line = now;
  }
  fflush(stderr);
  return interrupted();
}

/* ---- Curves ----------------------------------------------------------------------------------------------------- */

/* The lines of the log that have a member, as "step value" rows under a name; whether there are any. plot NULL: that alone. */
static bool plot_rows(FILE *plot, const char *name, const char *log, const char *member) {
  FILE *file = fopen(log, "rb");
  char line[4096];
  bool any = false;
  if (plot)
    fprintf(plot, "$%s << EOD\n", name);
  while (file && fgets(line, sizeof line, file)) {
    cJSON *json = cJSON_Parse(line);
    const cJSON *step = cJSON_GetObjectItem(json, "step"), *value = cJSON_GetObjectItem(json, member);
    if (cJSON_IsNumber(step) && cJSON_IsNumber(value)) {
      if (plot)
        fprintf(plot, "%.0f %.9g\n", step->valuedouble, value->valuedouble);
      any = true;
    }
    cJSON_Delete(json);
  }
  if (file)
    fclose(file);
  if (plot)
    fprintf(plot, "EOD\n");
  return any;
}

static int plot_curves(const char *out) {
  char png[4096], log[4096];
  if (snprintf(png, sizeof png, "%s/curves.png", out) >= (int)sizeof png ||
      snprintf(log, sizeof log, "%s/log.jsonl", out) >= (int)sizeof log)
    return app_fail("the name of the folder %s is too long for a picture in it", out);
  if (!plot_available()) {
    app_note("no picture of the curves: gnuplot is missing (install gnuplot-nox)");
    return EXIT_OK;
  }
  if (!plot_rows(NULL, "loss", log, "loss")) {
    app_note("no picture of the curves: %s has no line of the training yet", log);
    return EXIT_OK;
  }
  FILE *plot = plot_open(png, 1200, 860);
  if (plot) {
    plot_rows(plot, "loss", log, "loss");
    const bool held_out = plot_rows(plot, "held", log, "validation_loss");
    plot_rows(plot, "norm", log, "gradient_norm");
    plot_rows(plot, "rate", log, "learning_rate");
    plot_rows(plot, "k", log, "k");
    fprintf(plot,
            "set multiplot layout 2,2\nset grid; set xlabel 'step'; set lmargin 10; set rmargin 3\n"
            "set title 'loss, nats a token'; plot $loss with lines linewidth 1.5 title 'training'%s\n"
            "set title 'learning rate'; unset key; plot $rate with lines linewidth 1.5\n"
            "set title 'gradient norm'; set logscale y; plot $norm with lines linewidth 1\n"
            "set title 'kept features of a key'; unset logscale y; set yrange [0:*]; plot $k with lines linewidth 1.5\n"
            "unset multiplot\n",
            held_out ? ", $held with linespoints linewidth 2 title 'held out'" : "");
  }
  return plot_close(plot) ? EXIT_OK : app_fail("gnuplot could not draw %s", png);
}

/* ---- The whole -------------------------------------------------------------------------------------------------- */

static void print_head(const sfa_train *train, const app_options *o) {
  sfa_train_info i;
  char memory[32];
  sfa_train_describe(train, &i);
  fprintf(stderr, "%s, %d layers, hidden %d, %d heads (%d kv) of %d, %d tokens: %.2fM parameters%s; %s of memory\n", i.family, i.n_layers,
          i.hidden_dim, i.n_heads, i.n_kv_heads, i.head_dim, i.vocab_size, 1e-6 * (double)i.n_parameters,
          i.n_trained < i.n_parameters ? ", some of them frozen" : "", human_bytes((double)i.bytes, memory));
  fprintf(stderr, "%" PRId64 " steps of %" PRId64 " tokens over %" PRId64 " tokens of data; ", i.n_steps, i.tokens_a_step, i.n_tokens);
  if (i.k)
    fprintf(stderr, "SFA k=%d, %s", i.k, i.k_q ? "sparse queries" : "dense queries");
  else
    fprintf(stderr, "dense attention");
  if (i.first_step)
    fprintf(stderr, "; from step %" PRId64, i.first_step);
  fprintf(stderr, "\n%s/\n", o->out);
}

static cJSON *result_json(const app_options *o, const watcher *w, bool finished) {
  cJSON *document = cJSON_CreateObject();
  cJSON_AddStringToObject(document, "out", o->out);
  cJSON_AddBoolToObject(document, "finished", finished);
  cJSON_AddNumberToObject(document, "steps", (double)w->latest.step);
  cJSON_AddNumberToObject(document, "tokens", (double)w->latest.n_tokens);
  cJSON_AddNumberToObject(document, "first_loss", w->first_loss);
  cJSON_AddNumberToObject(document, "loss", w->latest.loss);
  cJSON_AddNumberToObject(document, "validation_loss", w->validation_loss);
  cJSON_AddNumberToObject(document, "tokens_per_s", w->latest.tokens_per_s);
  return document;
}

static int run_training(app *a, const app_options *o, const sfa_train_options *options, watcher *w, bool tell_result) {
  sfa_train *train;
  if (sfa_train_open(a->ctx, options, &train) != SFA_OK)
    return app_fail_status(a->ctx);
  if (!o->json)
    print_head(train, o);
  interrupt_begin();
  sfa_status result = sfa_train_run(train);
  sfa_train_close(train);
  if (w->shown)
    fputs("\n", stderr);
  int status = result == SFA_OK ? EXIT_OK : app_fail_status(a->ctx);
  if (result == SFA_ERROR_CANCELLED)
    status = EXIT_INTERRUPTED;
  int drawn = plot_curves(o->out);
  if (tell_result && o->json && (result == SFA_OK || result == SFA_ERROR_CANCELLED))
    app_print_json(result_json(o, w, result == SFA_OK));
  if (status || drawn)
    return status ? status : drawn;
  return app_flush();
}

int app_train(const app_options *o, const char *base, const char *over, bool tell_result) {
  app a = {.o = o};
  file_list recipes = {0}, data = {0}, validation = {0};
  int status = read_recipes(o, base, over, &recipes);
  if (!status)
    status = list_split(o->data, &data);
  if (!status && o->validation)
    status = list_split(o->validation, &validation);
  if (!status)
    status = app_open_context(&a, o, o->threads, SFA_ISA_DEFAULT);
  if (!status) {
    watcher w = {.terminal = isatty(STDERR_FILENO), .first_loss = NAN, .validation_loss = NAN, .last_line = seconds_now()};
    const sfa_train_options options = {.struct_size = sizeof options,
                                       .recipes = (const char *const *)recipes.texts,
                                       .n_recipes = recipes.n,
                                       .model = o->model,
                                       .data = (const char *const *)data.texts,
                                       .n_data = data.n,
                                       .validation = (const char *const *)validation.texts,
                                       .n_validation = validation.n,
                                       .tokenizer = o->tokenizer,
                                       .out = o->out,
                                       .resume = o->resume,
                                       .progress = watch,
                                       .progress_user = &w};
    status = run_training(&a, o, &options, &w, tell_result);
  }
  list_free(&recipes);
  list_free(&data);
  list_free(&validation);
  app_close(&a);
  return status;
}

int cmd_train(const app_options *o) {
  if (!o->config)
    return app_usage("train wants a recipe: --config FILE (docs/TRAINING.md; examples/recipes has some)");
  if (!o->data)
    return app_usage("train wants token shards: --data PATH, made by sfa data");
  if (!o->out)
    return app_usage("train wants a folder for what it makes: -o DIR");
  return app_train(o, NULL, NULL, true);
}
