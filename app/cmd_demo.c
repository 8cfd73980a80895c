/* sfa demo: one long text, read by one model with dense attention and with several kinds of SFA, side by side. Each reading is one pass:
 * the prefill that fills the cache is also the one that scores every token. */
#include "app.h"
#include "plot.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { N_VARIANTS = 6, N_BLOCKS = 16, DEFAULT_CONTINUATION = 64 };

typedef struct variant {
  char name[64];
  sfa_attention_choice choice;
  double prefill_s, decode_per_s, kv_bytes, mean_nll, top1, attention_share;
  double block_nll[N_BLOCKS]; /* mean over each sixteenth of the text */
  text_buffer continuation;
} variant;

typedef struct demo {
  app app;
  variant variants[N_VARIANTS];
  int32_t *layers; /* of the hybrid: all but every third */
  int32_t n_layers;
  int32_t *ids;      /* [n] */
  int64_t n, n_more; /* tokens read, tokens continued */
  float *nll;        /* [n] */
  int32_t *dense_argmax, *argmax;
  float *logits;
} demo;

/* ---- What is compared ---------------------------------------------------------------------------------------------------------- */

static void set_variant(demo *d, int index, const char *name, int32_t k, int32_t k_q, bool hybrid) {
  variant *v = &d->variants[index];
  snprintf(v->name, sizeof v->name, "%s", name);
  v->choice = (sfa_attention_choice){.struct_size = sizeof v->choice, .sparse = k > 0, .k = k, .k_q = k_q, .costs = d->app.choice.costs};
  if (hybrid) {
    v->choice.layers = 2;
    v->choice.layer_list = d->layers;
    v->choice.n_layer_list = d->n_layers;
  }
}

/* k = 8, 16, 32 as the paper has them; where heads are narrower than 64, the same parts of them. */
static int make_variants(demo *d) {
  const sfa_model_info *m = &d->app.info;
  d->layers = malloc((size_t)m->n_layers * sizeof *d->layers);
  if (!d->layers)
    return app_fail("out of memory for the list of layers");
  for (int32_t i = 0; i < m->n_layers; i++)
    if (i % 3)
      d->layers[d->n_layers++] = i;
  int32_t unit = m->head_dim < 64 ? m->head_dim / 8 : 8;
  char name[64];
  set_variant(d, 0, "dense", 0, 0, false);
  for (int i = 0; i < 3; i++) {
    snprintf(name, sizeof name, "SFA k=%d", unit << i);
    set_variant(d, 1 + i, name, unit << i, unit << i, false);
  }
  snprintf(name, sizeof name, "K-only k=%d", 2 * unit);
  set_variant(d, 4, name, 2 * unit, -1, false);
  snprintf(name, sizeof name, "hybrid k=%d, %d of %d layers", 2 * unit, d->n_layers, m->n_layers);
  set_variant(d, 5, name, 2 * unit, 2 * unit, true);
  return EXIT_OK;
}

/* ---- One reading --------------------------------------------------------------------------------------------------------------- */

static void summarise(demo *d, variant *v, const int32_t *argmax) {
  double sum = 0, block[N_BLOCKS] = {0};
  int64_t same = 0, count[N_BLOCKS] = {0};
  for (int64_t i = 0; i + 1 < d->n; i++) {
    int64_t b = i * N_BLOCKS / (d->n - 1);
    sum += (double)d->nll[i];
    block[b] += (double)d->nll[i];
    count[b]++;
  }
  for (int64_t i = 0; i < d->n; i++)
    same += argmax[i] == d->dense_argmax[i];
  for (int b = 0; b < N_BLOCKS; b++)
    v->block_nll[b] = count[b] ? block[b] / (double)count[b] : NAN;
  v->mean_nll = sum / (double)(d->n - 1);
  v->top1 = (double)same / (double)d->n;
}

/* Greedy text after the last token. Its logits come from taking that token back and appending it again, as a step of its own. */
static int continue_text(demo *d, variant *v) {
  app *a = &d->app;
  sfa_sampler_options greedy = {.struct_size = sizeof greedy};
  sfa_sampler *sampler;
  if (sfa_session_truncate(a->session, d->n - 1) != SFA_OK || sfa_session_append(a->session, d->ids + d->n - 1, 1, d->logits) != SFA_OK ||
      sfa_sampler_create(a->ctx, &greedy, a->info.vocab_size, &sampler) != SFA_OK)
    return app_fail_status(a->ctx);
  app_answer answer = {0};
  int status = answer_generate(a, sampler, d->logits, d->ids[d->n - 1], d->n_more, false, &answer);
  sfa_sampler_destroy(sampler);
  if (!status && answer.stop == STOP_INTERRUPTED)
    status = EXIT_INTERRUPTED;
  v->continuation = answer.text;
  answer.text = (text_buffer){0};
  answer_free(&answer);
  return status;
}

static int read_text_once(demo *d, int index) {
  app *a = &d->app;
  variant *v = &d->variants[index];
  int32_t *argmax = index ? d->argmax : d->dense_argmax;
  int status = app_open_session(a, &v->choice, d->n + d->n_more);
  if (status)
    return status;
  a->progress.what = v->name;
  sfa_status score = sfa_session_score(a->session, d->ids, d->n, -1, d->nll, argmax);
  progress_clear(&a->progress);
  if (score != SFA_OK)
    return score == SFA_ERROR_CANCELLED ? EXIT_INTERRUPTED : app_fail_status(a->ctx);
  summarise(d, v, argmax);
  sfa_session_stats stats;
  sfa_session_stats_read(a->session, &stats);
  v->prefill_s = 1e-9 * (double)stats.prefill_ns;
  v->attention_share = (double)stats.prefill_attention_ns / (double)stats.prefill_ns;
  v->kv_bytes = (double)stats.kv_bytes;
  if ((status = continue_text(d, v)) != EXIT_OK)
    return status;
  sfa_session_stats_read(a->session, &stats);
  v->decode_per_s = 1e9 * (double)stats.decode_tokens / (double)stats.decode_ns;
  sfa_session_destroy(a->session);
  a->session = NULL;
  return EXIT_OK;
}

/* ---- Table, JSON, picture -------------------------------------------------------------------------------------------------------- */

static void print_head(const demo *d) {
  const sfa_model_info *m = &d->app.info;
  printf("%s: %d layers, head dim %d; %lld tokens read, %lld continued greedily\n\n", *m->name ? m->name : m->family, m->n_layers,
         m->head_dim, (long long)d->n, (long long)d->n_more);
  printf("%-30s %9s %9s %9s %9s %7s %9s %9s %8s\n", "", "prefill s", "attention", "decode/s", "KV cache", "", "mean NLL", "loss", "top-1");
}

static void print_row(const demo *d, const variant *v) {
  const variant *dense = d->variants;
  char bytes[32];
  printf("%-30s %9.1f %7.0f %% %9.1f %9s %5.0f %% %9.3f %+9.3f %6.1f %%\n", v->name, v->prefill_s, 100 * v->attention_share,
         v->decode_per_s, human_bytes(v->kv_bytes, bytes), 100 * v->kv_bytes / dense->kv_bytes, v->mean_nll, v->mean_nll - dense->mean_nll,
         100 * v->top1);
}

/* The beginning of a continuation as one line of at most `most` bytes, cut between characters. */
static void print_line(const char *text, size_t n, size_t most) {
  bool cut = n > most;
  for (n = cut ? most : n; cut && n > 0 && ((unsigned char)text[n] & 0xc0) == 0x80;)
    n--;
  for (size_t i = 0; i < n; i++)
    putchar((unsigned char)text[i] < 0x20 ? ' ' : text[i]);
  printf("%s\n", cut ? "..." : "");
}

static void print_tail(const demo *d) {
  const variant *v = d->variants;
  printf("\nprefill: the whole text, every token scored; KV cache and %%: pages in use, against dense; NLL in nats a token, loss against "
         "dense;\n"
         "top-1: how often the likeliest next token is that of dense attention. Every third layer of the hybrid stays dense.\n");
  printf("\nHow each goes on:\n");
  for (int i = 0; i < N_VARIANTS; i++) {
    printf("  %-30s ", v[i].name);
    print_line(v[i].continuation.bytes ? v[i].continuation.bytes : "", v[i].continuation.n, 160);
  }
  if (d->app.info.sfa_k)
    printf("\nThe model was trained with SFA at k = %d.\n", d->app.info.sfa_k);
  else
    printf("\nThe model was trained with dense attention and is read with SFA as it is: its %s loses %.2f nats a token, its %s %.2f.\n"
           "The way to close that gap is conversion: to go on training the model with SFA, so that it learns to put into few features\n"
           "what its heads look for. Nothing here was converted.\n",
           v[1].name, v[1].mean_nll - v->mean_nll, v[3].name, v[3].mean_nll - v->mean_nll);
}

static cJSON *demo_json(const demo *d) {
  cJSON *document = cJSON_CreateObject(), *list;
  cJSON_AddStringToObject(document, "model", *d->app.info.name ? d->app.info.name : d->app.info.family);
  cJSON_AddNumberToObject(document, "tokens", (double)d->n);
  list = cJSON_AddArrayToObject(document, "variants");
  for (const variant *v = d->variants; v < d->variants + N_VARIANTS; v++) {
    cJSON *row = cJSON_CreateObject();
    cJSON_AddStringToObject(row, "name", v->name);
    cJSON_AddNumberToObject(row, "k", v->choice.k);
    cJSON_AddNumberToObject(row, "prefill_s", v->prefill_s);
    cJSON_AddNumberToObject(row, "attention_share", v->attention_share);
    cJSON_AddNumberToObject(row, "decode_tokens_per_s", v->decode_per_s);
    cJSON_AddNumberToObject(row, "kv_bytes", v->kv_bytes);
    cJSON_AddNumberToObject(row, "mean_nll", v->mean_nll);
    cJSON_AddNumberToObject(row, "top1_agreement", v->top1);
    cJSON_AddItemToObject(row, "block_nll", cJSON_CreateDoubleArray(v->block_nll, N_BLOCKS));
    cJSON_AddStringToObject(row, "continuation", v->continuation.bytes ? v->continuation.bytes : "");
    cJSON_AddItemToArray(list, row);
  }
  return document;
}

/* One panel of bars: a column of $rows, with its numbers above. */
static void plot_bars(FILE *plot, const char *title, int column) {
  fprintf(plot,
          "set title '%s'; set yrange [0:*]; set offsets 0,0,graph 0.12,0; unset key\n"
          "plot $rows using 0:%d:0:xtic(1) with boxes linecolor variable, '' using 0:%d:(sprintf('%%.3g', column(%d))) with labels offset "
          "0,0.6\n",
          title, column, column, column);
}

static int plot_demo(const demo *d, const char *path) {
  FILE *plot = plot_open(path, 1200, 860);
  if (plot) {
    fprintf(plot, "$rows << EOD\n");
    for (const variant *v = d->variants; v < d->variants + N_VARIANTS; v++) {
      plot_text(plot, v->choice.layers ? "hybrid" : v->name);
      fprintf(plot, " %g %g %g %g %g\n", v->prefill_s, v->decode_per_s, 1e-6 * v->kv_bytes, v->mean_nll, 100 * v->top1);
    }
    fprintf(plot, "EOD\n$blocks << EOD\n");
    for (int b = 0; b < N_BLOCKS; b++) {
      fprintf(plot, "%g", ((double)b + 0.5) / N_BLOCKS * (double)d->n);
      for (int i = 0; i < N_VARIANTS; i++)
        fprintf(plot, " %g", d->variants[i].block_nll[b]);
      fprintf(plot, "\n");
    }
    fprintf(plot, "EOD\nset multiplot layout 2,3 title ");
    char title[200];
    snprintf(title, sizeof title, "%s, %lld tokens of a book, dense attention and SFA%s",
             *d->app.info.name ? d->app.info.name : d->app.info.family, (long long)d->n,
             d->app.info.sfa_k ? "" : ", which it was not trained for");
    plot_text(plot, title);
    fprintf(plot, "\nset lmargin 8; set rmargin 3; set xtics rotate by -30; set grid ytics; set style fill solid 0.8; set boxwidth 0.7\n");
    plot_bars(plot, "prefill and scoring, s", 2);
    plot_bars(plot, "decode, tokens a second", 3);
    plot_bars(plot, "KV cache, MB", 4);
    plot_bars(plot, "mean NLL, nats a token", 5);
    plot_bars(plot, "top-1 as dense attention, %", 6);
    fprintf(plot, "set title 'NLL along the text'; set yrange [*:*]; set offsets 0,0,graph 0.5,0; set xtics norotate auto; set key top "
                  "right; set xlabel 'token'\nplot ");
    for (int i = 0; i < N_VARIANTS; i++) {
      fprintf(plot, "%s$blocks using 1:%d with linespoints linewidth 2 pointsize 0.5 linecolor %d title ", i ? ", " : "", i + 2, i);
      plot_text(plot, d->variants[i].name);
    }
    fprintf(plot, "\nunset multiplot\n");
  }
  return plot_close(plot) ? EXIT_OK : app_fail("gnuplot could not draw %s", path);
}

/* ---- The whole --------------------------------------------------------------------------------------------------------------------- */

static int prepare(demo *d, const app_options *o) {
  app *a = &d->app;
  if (!o->file)
    return app_usage("demo wants a text: -f FILE");
  if (!plot_available())
    return app_fail("gnuplot is missing, and the demo draws a picture: install gnuplot-nox");
  int status = app_require_model(o, "demo");
  if (!status)
    status = app_open_model(a, o, true);
  int64_t context_len, n_text;
  if (!status)
    status = app_context_len(a, &context_len);
  if (!status)
    status = app_read_ids(a, &d->ids, &n_text, NULL);
  if (status)
    return status;
  d->n_more = o->n_predict > 0 ? o->n_predict : DEFAULT_CONTINUATION;
  if (n_text < 2 * N_BLOCKS || context_len - d->n_more < 2 * N_BLOCKS)
    return app_fail("the demo wants at least %d tokens to read; the text has %lld, the context %lld with %lld to continue", 2 * N_BLOCKS,
                    (long long)n_text, (long long)context_len, (long long)d->n_more);
  d->n = n_text < context_len - d->n_more ? n_text : context_len - d->n_more;
  d->nll = malloc((size_t)d->n * sizeof *d->nll);
  d->dense_argmax = malloc((size_t)d->n * sizeof *d->dense_argmax);
  d->argmax = malloc((size_t)d->n * sizeof *d->argmax);
  d->logits = malloc((size_t)a->info.vocab_size * sizeof *d->logits);
  return d->nll && d->dense_argmax && d->argmax && d->logits ? make_variants(d) : app_fail("out of memory for the scores");
}

static int run_demo(demo *d, const app_options *o) {
  const char *out = o->out ? o->out : "demo_out";
  char png[APP_PATH_BYTES], json[APP_PATH_BYTES];
  int status = app_path(out, "demo.png", png);
  if (!status)
    status = app_path(out, "demo.json", json);
  if (!status)
    status = prepare(d, o);
  if (!status)
    status = app_make_folder(out);
  if (status)
    return status;
  interrupt_begin();
  if (!o->json)
    print_head(d);
  for (int i = 0; i < N_VARIANTS; i++) {
    if ((status = read_text_once(d, i)) != EXIT_OK)
      return status;
    if (!o->json)
      print_row(d, &d->variants[i]);
    if ((status = app_flush()) != EXIT_OK)
      return status;
  }
  if ((status = app_save_json(json, demo_json(d))) != EXIT_OK || (status = plot_demo(d, png)) != EXIT_OK)
    return status;
  if (o->json)
    return app_print_json(demo_json(d));
  print_tail(d);
  printf("\npicture: %s\nnumbers: %s\n", png, json);
  return app_flush();
}

int cmd_demo(const app_options *o) {
  demo d = {0};
  int status = run_demo(&d, o);
  for (int i = 0; i < N_VARIANTS; i++)
    free(d.variants[i].continuation.bytes);
  if (d.ids)
    sfa_free_ids(d.app.ctx, d.ids);
  free(d.layers);
  free(d.nll);
  free(d.dense_argmax);
  free(d.argmax);
  free(d.logits);
  app_close(&d.app);
  return status;
}
