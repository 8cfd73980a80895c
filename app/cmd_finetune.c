/* sfa finetune: a trained dense model to one with sparse attention: which layers need many features, the training, and a report card. */
#include "app.h"
#include "plot.h"

#include <sfa/eval.h>
#include <sfa/train.h>

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TASK_NAME_BYTES = 64, DEFAULT_K = 16, CARD_TOKENS = 8192, CARD_WINDOW = 2048, CARD_STEPS = 64 };

/* What the members of a conversion are where nothing else is said: straight to the final k, a third of the usual rate, heads held near
 * those of the dense model (the paper's Eq. 8). */
static const char base_recipe[] = "{\"k_schedule\": \"fixed\", \"learning_rate\": 0.0006, \"warmup_steps\": 30, \"decay\": \"linear\", "
                                  "\"weight_decay\": 0, \"head_weight\": 1}";

/* Writes and frees a document. */
static int save_json(const app_options *o, const char *name, cJSON *document) {
  char path[APP_PATH_BYTES];
  const int status = app_path(o->out, name, path);
  if (!status)
    return app_save_json(path, document);
  cJSON_Delete(document);
  return status;
}

/* ---- Features by layer or head ------------------------------------------------------------------------------------------------- */

static double rise_at(const sfa_sensitivity *s, int32_t i, int32_t layer, int32_t g) {
  return s->rise[((int64_t)i * s->n_layers + layer) * s->n_kv_heads + g];
}

/* k [n_layers][n_kv_heads] as a list of layers, or of lists of heads. */
static cJSON *k_json(const sfa_sensitivity *s, bool by_head, const int32_t *k) {
  cJSON *list = cJSON_CreateArray();
  for (int32_t layer = 0; layer < s->n_layers; layer++, k += s->n_kv_heads)
    cJSON_AddItemToArray(list, by_head ? cJSON_CreateIntArray(k, s->n_kv_heads) : cJSON_CreateNumber(*k));
  return list;
}

static cJSON *sensitivity_json(const sfa_sensitivity *s, bool by_head, const int32_t *k, double rise) {
  cJSON *document = cJSON_CreateObject();
  cJSON_AddNumberToObject(document, "dense_loss", s->dense_loss);
  cJSON *tried = cJSON_AddArrayToObject(document, "rises");
  for (int32_t i = 0; i < s->n_k; i++) {
    cJSON *entry = cJSON_CreateObject();
    cJSON_AddNumberToObject(entry, "k", s->k[i]);
    cJSON *layers = cJSON_AddArrayToObject(entry, "layers");
    for (int32_t layer = 0; layer < s->n_layers; layer++)
      cJSON_AddItemToArray(layers, cJSON_CreateDoubleArray(&s->rise[((int64_t)i * s->n_layers + layer) * s->n_kv_heads], s->n_kv_heads));
    cJSON_AddItemToArray(tried, entry);
  }
  cJSON_AddItemToObject(document, "k", k_json(s, by_head, k));
  cJSON_AddNumberToObject(document, "sum_of_rises", rise);
  return document;
}

/* A panel for each k: heads across, layers down. */
static int draw_sensitivity(const app_options *o, const sfa_sensitivity *s) {
  char path[APP_PATH_BYTES];
  int status = app_path(o->out, "sensitivity.png", path);
  if (status || !plot_available())
    return status;
  FILE *plot = plot_open(path, 300 * s->n_k + 60, 500);
  if (plot)
    fprintf(plot,
            "set multiplot layout 1,%d title 'loss that rises where one head keeps k features, nats a token'\nset xlabel 'kv head'\n"
            "set ylabel 'layer'\nset xrange [-0.5:%g]\nset yrange [%g:-0.5]\nset xtics 1\nset ytics 1\nset palette defined (0 'white', 1 "
            "'gold', 2 'red', 3 'black')\n",
            s->n_k, s->n_kv_heads - 0.5, s->n_layers - 0.5);
  for (int32_t i = 0; plot && i < s->n_k; i++) {
    fprintf(plot, "set title 'k = %d'\nplot '-' matrix with image notitle\n", s->k[i]);
    for (int32_t layer = 0; layer < s->n_layers; layer++)
      for (int32_t g = 0; g < s->n_kv_heads; g++)
        fprintf(plot, "%g%c", rise_at(s, i, layer, g), g + 1 < s->n_kv_heads ? ' ' : '\n');
    fprintf(plot, "e\n");
  }
  if (plot)
    fprintf(plot, "unset multiplot\n");
  return plot_close(plot) ? EXIT_OK : app_fail("gnuplot could not draw %s", path);
}

static cJSON *allocated(app *a, const app_options *o, const sfa_sensitivity *s, int *status) {
  double rise;
  int32_t *k = calloc((size_t)s->n_layers * (size_t)s->n_kv_heads, sizeof *k);
  cJSON *list = NULL;
  if (!k)
    *status = app_fail("out of memory for %d layers", s->n_layers);
  else if (sfa_sensitivity_allocate(a->ctx, s, o->mean_k, o->by_head, k, &rise) != SFA_OK)
    *status = app_fail_status(a->ctx);
  if (!*status)
    *status = save_json(o, "sensitivity.json", sensitivity_json(s, o->by_head, k, rise));
  if (!*status)
    *status = draw_sensitivity(o, s);
  if (!*status)
    list = k_json(s, o->by_head, k);
  free(k);
  return list;
}

/* The k of each layer or head under the budget of --mean-k. */
static cJSON *budget_json(app *a, const app_options *o, int *status) {
  const char *const data[] = {o->validation};
  a->progress = (progress){.what = "sensitivity", .unit = "losses", .start = seconds_now()};
  const sfa_sensitivity_options options = {.struct_size = sizeof options,
                                           .model = o->model,
                                           .data = data,
                                           .n_data = 1,
                                           .dense_queries = o->sfa_kq < 0,
                                           .progress = progress_step,
                                           .progress_user = &a->progress};
  sfa_sensitivity *s;
  interrupt_begin();
  const sfa_status measured = sfa_sensitivity_measure(a->ctx, &options, &s);
  progress_clear(&a->progress);
  *status = measured == SFA_OK ? EXIT_OK : measured == SFA_ERROR_CANCELLED ? EXIT_INTERRUPTED : app_fail_status(a->ctx);
  cJSON *list = *status ? NULL : allocated(a, o, s, status);
  sfa_sensitivity_destroy(a->ctx, s);
  return list;
}

/* {"sparse_attention_config": ...} of the options, for free(). */
static int sparsity_text(app *a, const app_options *o, char **text) {
  int status = EXIT_OK;
  cJSON *document = cJSON_CreateObject(), *config = cJSON_AddObjectToObject(document, "sparse_attention_config");
  cJSON_AddStringToObject(config, "algorithm", "sfa");
  cJSON *k = o->mean_k > 0 ? budget_json(a, o, &status) : cJSON_CreateNumber(o->sfa_k > 0 ? (double)o->sfa_k : DEFAULT_K);
  if (!status) {
    cJSON_AddItemToObject(config, "k", k);
    if (o->sfa_kq != 0)
      cJSON_AddNumberToObject(config, "k_q", o->sfa_kq > 0 ? (double)o->sfa_kq : 0);
  }
  char *printed = status ? NULL : cJSON_PrintUnformatted(document);
  *text = printed ? strdup(printed) : NULL;
  cJSON_free(printed);
  cJSON_Delete(document);
  return status ? status : *text ? EXIT_OK : app_fail("out of memory for a recipe");
}

/* ---- Report card --------------------------------------------------------------------------------------------------------------------- */

/* The dense model and the converted one. */
typedef struct pair {
  app *a;
  sfa_model *models[2];
  sfa_session *sessions[2];
  int32_t *tokens; /* [n_windows][window] of held-out text */
  int64_t n_windows, window;
} pair;

static int open_pair(pair *p, const app_options *o) {
  char path[APP_PATH_BYTES];
  int status = app_path(o->out, "model", path);
  const char *const paths[2] = {o->model, path};
  sfa_model_info info = {0};
  for (int i = 0; i < 2 && !status; i++) {
    const sfa_model_options options = {.struct_size = sizeof options, .weights = SFA_WEIGHTS_F32};
    const sfa_attention_choice choice = {.struct_size = sizeof choice, .sparse = i};
    if (sfa_model_open(p->a->ctx, paths[i], &options, &p->models[i]) != SFA_OK)
      return app_fail_status(p->a->ctx);
    sfa_model_describe(p->models[i], &info);
    p->window = info.context_len < CARD_WINDOW ? info.context_len : CARD_WINDOW;
    const sfa_session_options session = {.struct_size = sizeof session, .attention = &choice};
    if (sfa_session_create(p->models[i], &session, &p->sessions[i]) != SFA_OK)
      return app_fail_status(p->a->ctx);
  }
  return status;
}

static void close_pair(pair *p) {
  for (int i = 0; i < 2; i++) {
    sfa_session_destroy(p->sessions[i]);
    sfa_model_close(p->models[i]);
  }
  free(p->tokens);
}

/* Windows that lie evenly over the held-out text: as long as the context, or CARD_WINDOW, and CARD_TOKENS together. */
static int read_held_out(pair *p, const app_options *o) {
  const char *const path[] = {o->validation};
  sfa_shards *shards;
  if (sfa_shards_open(p->a->ctx, path, 1, &shards) != SFA_OK)
    return app_fail_status(p->a->ctx);
  const int64_t n = sfa_shards_n_tokens(shards), most = n < CARD_TOKENS ? n : CARD_TOKENS;
  p->window = p->window < most ? p->window : most;
  p->n_windows = most / p->window;
  p->tokens = malloc((size_t)(p->n_windows * p->window) * sizeof *p->tokens);
  int status = p->tokens ? EXIT_OK : app_fail("out of memory for %" PRId64 " tokens", most);
  for (int64_t i = 0; i < p->n_windows && !status; i++)
    if (sfa_shards_read(shards, n / p->n_windows * i, p->window, p->tokens + i * p->window) != SFA_OK)
      status = app_fail_status(p->a->ctx);
  sfa_shards_close(shards);
  return status;
}

/* The mean over the windows; speeds of the first one. */
static int measure(pair *p, sfa_report_card *mean, sfa_speed speeds[2]) {
  *mean = (sfa_report_card){0};
  for (int64_t i = 0; i < p->n_windows; i++) {
    sfa_report_card c;
    const double part = 1 / (double)p->n_windows;
    for (int side = 0; side < 2; side++)
      if (sfa_session_truncate(p->sessions[side], 0) != SFA_OK)
        return app_fail_status(p->a->ctx);
    if (sfa_eval_report_card(p->sessions[0], p->sessions[1], p->tokens + i * p->window, p->window, &c) != SFA_OK)
      return app_fail_status(p->a->ctx);
    mean->n_tokens += c.n_tokens;
    mean->nll_reference += part * c.nll_reference;
    mean->nll_candidate += part * c.nll_candidate;
    mean->kl += part * c.kl;
    mean->top1_agreement += part * c.top1_agreement;
    mean->kv_bytes_reference = c.kv_bytes_reference;
    mean->kv_bytes_candidate = c.kv_bytes_candidate;
  }
  const int32_t n_steps = p->window > 2 * CARD_STEPS ? CARD_STEPS : (int32_t)p->window / 2;
  return sfa_eval_speeds(p->sessions[0], p->sessions[1], p->tokens, p->window, n_steps, 0, speeds) == SFA_OK ? EXIT_OK
                                                                                                             : app_fail_status(p->a->ctx);
}

/* Adds {"task", metric: [dense, converted], ...}. task: "NAME=FILE", as check_tasks found it. */
static int add_task(pair *p, const app_options *o, const char *task, cJSON *tasks) {
  char name[TASK_NAME_BYTES];
  const char *equals = strchr(task, '=');
  snprintf(name, sizeof name, "%.*s", (int)(equals - task), task);
  cJSON *entry = cJSON_CreateObject();
  cJSON_AddStringToObject(entry, "task", name);
  cJSON_AddItemToArray(tasks, entry);
  for (int i = 0; i < 2; i++) {
    const sfa_eval_options options = {.struct_size = sizeof options, .limit = o->limit > 0 ? o->limit : 0};
    sfa_eval *eval;
    sfa_eval_info info;
    sfa_eval_score scores[SFA_EVAL_MAX_METRICS];
    if (sfa_eval_open(p->models[i], name, equals + 1, &options, &eval) != SFA_OK)
      return app_fail_status(p->a->ctx);
    sfa_eval_describe(eval, &info);
    sfa_eval_result *results = calloc((size_t)info.n_items, sizeof *results);
    int status = results ? EXIT_OK : app_fail("out of memory for %" PRId64 " items", info.n_items);
    for (int64_t item = 0; item < info.n_items && !status; item++)
      if (sfa_eval_item(eval, p->sessions[i], item, &results[item]) != SFA_OK)
        status = app_fail_status(p->a->ctx);
    if (!status)
      sfa_eval_summarise(eval, results, info.n_items, scores);
    for (int32_t m = 0; m < info.n_metrics && !status; m++) {
      cJSON *values = i ? cJSON_GetObjectItem(entry, info.metrics[m]) : cJSON_AddArrayToObject(entry, info.metrics[m]);
      cJSON_AddItemToArray(values, cJSON_CreateNumber(scores[m].value));
    }
    for (int64_t item = 0; results && item < info.n_items; item++)
      sfa_free_text(p->a->ctx, results[item].text);
    free(results);
    sfa_eval_close(eval);
    if (status)
      return status;
  }
  return EXIT_OK;
}

static void add_both(cJSON *card, const char *name, double dense, double converted) {
  const double values[] = {dense, converted};
  cJSON_AddItemToObject(card, name, cJSON_CreateDoubleArray(values, 2));
}

static cJSON *card_json(const sfa_report_card *c, const sfa_speed speeds[2]) {
  cJSON *card = cJSON_CreateObject();
  cJSON_AddNumberToObject(card, "tokens", (double)c->n_tokens);
  add_both(card, "loss", c->nll_reference, c->nll_candidate);
  cJSON_AddNumberToObject(card, "kl_to_dense", c->kl);
  cJSON_AddNumberToObject(card, "top1_agreement", c->top1_agreement);
  add_both(card, "kv_bytes", (double)c->kv_bytes_reference, (double)c->kv_bytes_candidate);
  add_both(card, "prefill_tokens_per_s", speeds[0].prefill, speeds[1].prefill);
  add_both(card, "decode_tokens_per_s", speeds[0].decode, speeds[1].decode);
  return card;
}

static void print_card(const cJSON *card) {
  printf("%-22s %12s %12s\n", "", "dense", "converted");
  const cJSON *item, *metric;
  cJSON_ArrayForEach(item, card) {
    if (cJSON_IsNumber(item))
      printf("%-22s %12s %12.5g\n", item->string, "", item->valuedouble);
    else if (strcmp(item->string, "tasks") != 0)
      printf("%-22s %12.6g %12.6g\n", item->string, cJSON_GetArrayItem(item, 0)->valuedouble, cJSON_GetArrayItem(item, 1)->valuedouble);
  }
  cJSON_ArrayForEach(item, cJSON_GetObjectItem(card, "tasks")) cJSON_ArrayForEach(metric, item) if (cJSON_IsArray(metric)) {
    char name[96];
    snprintf(name, sizeof name, "%s %s", cJSON_GetObjectItem(item, "task")->valuestring, metric->string);
    printf("%-22s %12.4f %12.4f\n", name, cJSON_GetArrayItem(metric, 0)->valuedouble, cJSON_GetArrayItem(metric, 1)->valuedouble);
  }
}

static int report(app *a, const app_options *o) {
  pair p = {.a = a};
  sfa_report_card measured;
  sfa_speed speeds[2];
  cJSON *card = NULL;
  int status = open_pair(&p, o);
  if (!status)
    status = read_held_out(&p, o);
  if (!status)
    status = measure(&p, &measured, speeds);
  if (!status) {
    card = card_json(&measured, speeds);
    cJSON *tasks = cJSON_AddArrayToObject(card, "tasks");
    for (int64_t i = 0; i < o->tasks.n && !status; i++)
      status = add_task(&p, o, o->tasks.values[i], tasks);
  }
  close_pair(&p);
  if (!status)
    status = save_json(o, "report.json", cJSON_Duplicate(card, true));
  if (!status && o->json)
    return app_print_json(card);
  if (!status)
    print_card(card);
  cJSON_Delete(card);
  return status ? status : app_flush();
}

/* ---- The verb -------------------------------------------------------------------------------------------------------------------- */

static int check_tasks(const app_options *o) {
  for (int64_t i = 0; i < o->tasks.n; i++) {
    const char *equals = strchr(o->tasks.values[i], '=');
    if (!equals || equals - o->tasks.values[i] >= TASK_NAME_BYTES)
      return app_usage("--task takes NAME=FILE, not \"%s\"", o->tasks.values[i]);
  }
  return EXIT_OK;
}

static int run(app *a, const app_options *o) {
  char *sparsity = NULL;
  int status = app_open_context(a, o, o->threads, SFA_ISA_DEFAULT);
  if (!status)
    status = app_make_folder(o->out);
  if (!status)
    status = sparsity_text(a, o, &sparsity);
  if (!status)
    status = app_train(o, base_recipe, sparsity, false);
  free(sparsity);
  return status ? status : report(a, o);
}

int cmd_finetune(const app_options *o) {
  if (!o->model || !o->data || !o->validation || !o->out)
    return app_usage(
        "finetune wants a dense model (-m DIR), token shards (--data PATH), held-out ones (--validation PATH) and a folder for "
        "what it makes (-o DIR)");
  if (o->mean_k > 0 && o->sfa_k > 0)
    return app_usage("--sfa-k gives every layer as many features, --mean-k shares a budget out: one of them is meant");
  if (o->by_head && !(o->mean_k > 0))
    return app_usage("--by-head says how --mean-k shares a budget out, which is not given");
  app a = {.o = o};
  int status = check_tasks(o); /* before the training */
  if (!status)
    status = run(&a, o);
  app_close(&a);
  return status;
}
