/* sfa inspect: how the heads of a model use their features over a text. */
#include "app.h"
#include "plot.h"

#include <stdio.h>
#include <stdlib.h>

enum { N_MASSES = 3 };
static const char *const mass_names[N_MASSES] = {"0.9", "0.99", "0.999"};

typedef struct inspect {
  app app;
  int32_t *ids; /* [n] */
  int64_t n;
  int64_t n_rows; /* layers * kv heads */
  sfa_head_report *heads;
  int32_t *use; /* [n_rows][D] */
} inspect;

/* ---- Table ----------------------------------------------------------------------------------------------------------------------- */

/* Features that a query and a key share if all features are used alike. */
static double even_overlap(const inspect *in, const sfa_head_report *r) { return (double)r->k_queries * r->k_keys / in->app.info.head_dim; }

static void print_table(const inspect *in) {
  int32_t G = in->app.info.n_kv_heads, D = in->app.info.head_dim;
  char name[96];
  printf("%lld tokens, %s; per layer: mean over %d kv head%s of %d features\n\n", (long long)in->n,
         app_attention_name(&in->app, name, sizeof name), G, G == 1 ? "" : "s", D);
  printf("%5s %6s %9s %10s  %8s %6s   %s\n", "layer", "dead", "hottest", "effective", "overlap", "even",
         "keys that hold 0.9 / 0.99 / 0.999");
  for (int64_t row = 0; row < in->n_rows; row += G) {
    double dead = 0, hottest = 0, effective = 0, overlap = 0, even = 0, keys[N_MASSES] = {0};
    for (int64_t i = row; i < row + G; i++) {
      const sfa_head_report *r = &in->heads[i];
      dead += (double)r->n_dead / G;
      hottest += (double)r->hottest_share / G;
      effective += (double)r->effective / G;
      overlap += (double)r->overlap / G;
      even += even_overlap(in, r) / G;
      for (int m = 0; m < N_MASSES; m++)
        keys[m] += (double)r->keys_for[m] / G;
    }
    printf("%5d %6.1f %7.1f %% %10.1f  %8.2f %6.2f   %5.1f %% / %5.1f %% / %5.1f %%\n", in->heads[row].layer, dead, 100 * hottest,
           effective, overlap, even, 100 * keys[0], 100 * keys[1], 100 * keys[2]);
  }
}

/* ---- JSON ------------------------------------------------------------------------------------------------------------------------ */

static cJSON *make_json(const inspect *in) {
  cJSON *document = cJSON_CreateObject(), *heads = cJSON_AddArrayToObject(document, "heads");
  int32_t D = in->app.info.head_dim;
  cJSON_AddNumberToObject(document, "n_tokens", (double)in->n);
  cJSON_AddNumberToObject(document, "head_dim", D);
  for (int64_t row = 0; row < in->n_rows; row++) {
    const sfa_head_report *r = &in->heads[row];
    cJSON *head = cJSON_CreateObject(), *keys = cJSON_CreateObject();
    cJSON_AddNumberToObject(head, "layer", r->layer);
    cJSON_AddNumberToObject(head, "kv_head", r->kv_head);
    cJSON_AddNumberToObject(head, "k_keys", r->k_keys);
    cJSON_AddNumberToObject(head, "k_queries", r->k_queries);
    cJSON_AddNumberToObject(head, "dead", r->n_dead);
    cJSON_AddNumberToObject(head, "hottest", r->hottest);
    cJSON_AddNumberToObject(head, "hottest_share", (double)r->hottest_share);
    cJSON_AddNumberToObject(head, "effective", (double)r->effective);
    cJSON_AddNumberToObject(head, "overlap", (double)r->overlap);
    cJSON_AddNumberToObject(head, "even_overlap", even_overlap(in, r));
    for (int m = 0; m < N_MASSES; m++)
      cJSON_AddNumberToObject(keys, mass_names[m], (double)r->keys_for[m]);
    cJSON_AddItemToObject(head, "keys_for", keys);
    cJSON_AddItemToObject(head, "use", cJSON_CreateIntArray(in->use + row * D, D));
    cJSON_AddItemToArray(heads, head);
  }
  return document;
}

/* ---- Picture --------------------------------------------------------------------------------------------------------------------- */

/* Three panels: the features that each head's keys keep, overlap beside the even one, and how many keys hold the softmax. */
static int draw(const inspect *in, const char *path) {
  FILE *plot = plot_open(path, 1300, 900);
  if (!plot)
    return app_fail("cannot start gnuplot for %s", path);
  int32_t G = in->app.info.n_kv_heads, D = in->app.info.head_dim;
  fprintf(plot,
          "set multiplot\nset tics out nomirror\nset origin 0,0\nset size 0.56,1\nset title 'Share of the keys that keep a feature'\n"
          "set xlabel 'feature'\nset ylabel 'layer'\nset xrange [-0.5:%g]\nset yrange [%g:-0.5]\nset cbrange [0:*]\n"
          "set palette defined (0 'white', 0.3 'gold', 0.7 'red', 1 'black')\nset ytics ('0' 0",
          D - 0.5, (double)in->n_rows - 0.5);
  for (int64_t layer = 5; layer < in->n_rows / G; layer += 5)
    fprintf(plot, ", '%lld' %lld", (long long)layer, (long long)layer * G);
  fprintf(plot, ")\nplot '-' matrix with image notitle\n");
  for (int64_t row = 0; row < in->n_rows; row++)
    for (int32_t u = 0; u < D; u++)
      fprintf(plot, "%g%c", (double)in->use[row * D + u] / (double)in->n, u + 1 < D ? ' ' : '\n');
  fprintf(
      plot,
      "e\nset origin 0.56,0.5\nset size 0.44,0.5\nset ytics auto\nset xrange [-0.5:%g]\nset yrange [0:*]\nset ylabel 'features shared'\n"
      "set xlabel 'layer'\nset title 'Overlap of a query and a key'\nset key bottom right\n"
      "plot '-' with points pt 7 ps 0.5 lc 'red' title 'measured, each kv head', '-' with lines lc 'black' dt 2 title 'if all "
      "features were used alike'\n",
      (double)(in->n_rows / G) - 0.5);
  for (int64_t row = 0; row < in->n_rows; row++)
    fprintf(plot, "%g %g\n", (double)in->heads[row].layer, (double)in->heads[row].overlap);
  fprintf(plot, "e\n");
  for (int64_t row = 0; row < in->n_rows; row++)
    fprintf(plot, "%d %g\n", in->heads[row].layer, even_overlap(in, &in->heads[row]));
  fprintf(plot, "e\nset origin 0.56,0\nset key top right\nset yrange [0:100]\nset ylabel '%% of the keys'\nset title 'Keys that hold the "
                "softmax, each kv head'\nplot ");
  static const char *const colours[N_MASSES] = {"black", "red", "gold"};
  for (int m = 0; m < N_MASSES; m++)
    fprintf(plot, "%s'-' with points pt 7 ps 0.5 lc '%s' title '%s of it'", m ? ", " : "", colours[m], mass_names[m]);
  fputc('\n', plot);
  for (int m = 0; m < N_MASSES; m++) {
    for (int64_t row = 0; row < in->n_rows; row++)
      fprintf(plot, "%d %g\n", in->heads[row].layer, 100 * (double)in->heads[row].keys_for[m]);
    fprintf(plot, "e\n");
  }
  fprintf(plot, "unset multiplot\n");
  return plot_close(plot) ? EXIT_OK : app_fail("gnuplot could not write %s", path);
}

static int write_files(const inspect *in, const char *folder) {
  char path[APP_PATH_BYTES];
  int status = app_path(folder, "inspect.json", path);
  if (!status)
    status = app_save_json(path, make_json(in));
  if (status)
    return status;
  printf("\nnumbers     %s\n", path);
  if (!plot_available()) {
    printf("picture     none: install gnuplot-nox for it\n");
    return EXIT_OK;
  }
  status = app_path(folder, "inspect.png", path);
  if (!status)
    status = draw(in, path);
  if (!status)
    printf("picture     %s\n", path);
  return status;
}

/* ---- The verb -------------------------------------------------------------------------------------------------------------------- */

static int read_text(inspect *in) {
  app *a = &in->app;
  int64_t context_len = 0;
  int status = app_read_ids(a, &in->ids, &in->n, NULL);
  if (!status)
    status = app_context_len(a, &context_len);
  if (!status && in->n < 2)
    status = app_usage("the text has %lld tokens: inspect wants at least 2", (long long)in->n);
  in->n = in->n < context_len ? in->n : context_len; /* a longer text is cut: what heads do shows in its beginning */
  return status;
}

static int run(inspect *in, const app_options *o) {
  app *a = &in->app;
  const char *folder = o->out ? o->out : "inspect_out";
  int status = app_require_model(o, "inspect");
  if (!status && !o->file)
    status = app_usage("inspect wants a text: -f FILE");
  if (!status && !o->json)
    status = app_make_folder(folder); /* before the long reading */
  if (!status)
    status = app_open_model(a, o, true);
  if (!status)
    status = read_text(in);
  if (!status)
    status = app_open_session(a, &a->choice, in->n);
  if (status)
    return status;
  in->n_rows = (int64_t)a->info.n_layers * a->info.n_kv_heads;
  in->heads = calloc((size_t)in->n_rows, sizeof *in->heads);
  in->use = calloc((size_t)in->n_rows * (size_t)a->info.head_dim, sizeof *in->use);
  if (!in->heads || !in->use)
    return app_fail("out of memory for the report of %lld heads", (long long)in->n_rows);
  interrupt_begin();
  sfa_status read = sfa_session_inspect(a->session, in->ids, in->n, 0, in->heads, in->use);
  progress_clear(&a->progress);
  if (read != SFA_OK)
    return read == SFA_ERROR_CANCELLED ? EXIT_INTERRUPTED : app_fail_status(a->ctx);
  if (o->json)
    return app_print_json(make_json(in));
  print_table(in);
  status = write_files(in, folder);
  return status ? status : app_flush();
}

int cmd_inspect(const app_options *o) {
  inspect in = {0};
  int status = run(&in, o);
  if (in.ids)
    sfa_free_ids(in.app.ctx, in.ids);
  free(in.heads);
  free(in.use);
  app_close(&in.app);
  return status;
}
