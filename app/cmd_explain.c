/* sfa explain: what the last token of a text looks at, passage by passage, and the features behind each look. Everything is read from the
 * stored keys: no attention matrix is made, so the text may be as long as the cache. */
#include "app.h"
#include "plot.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_ASKED = 64, DEFAULT_PASSAGES = 5, NEAR = 12, STRIP_COLUMNS = 64, PICTURE_COLUMNS = 1000 };

/* Tokens first .. end - 1 around one or more of the tokens looked at. */
typedef struct passage {
  int64_t first, end;
  double mass;                     /* of all its tokens */
  const sfa_explained_token *most; /* the one with the largest mass */
} passage;

typedef struct explain {
  app app;
  int32_t *ids; /* [n], the context's: those of the text given; behind an index `all` has these too */
  int64_t n_ids;
  const int32_t *all; /* [n] of the session */
  int64_t n;
  float *mass; /* [n] */
  sfa_explained_token tokens[N_ASKED];
  passage passages[N_ASKED];
  int n_passages;
} explain;

/* ---- The text ------------------------------------------------------------------------------------------------------------------ */

/* The document, then the question: what -f and -p give, either of them alone or both; behind an index the question alone. */
static int read_texts(explain *e) {
  app_options part = *e->app.o;
  text_buffer text = {0};
  int status = EXIT_OK;
  for (int i = 0; i < 2 && !status; i++) {
    char *bytes;
    size_t n;
    part.file = i == 0 ? e->app.o->file : NULL;
    part.prompt = i == 1 ? e->app.o->prompt : NULL;
    if (!part.file && !part.prompt)
      continue;
    if ((status = app_read_text(&part, &bytes, &n)) != EXIT_OK)
      break;
    if (!(text.n == 0 || text_append(&text, "\n\n", 2)) || !text_append(&text, bytes, n))
      status = app_fail("out of memory for the text");
    free(bytes);
  }
  if (!status && e->app.o->index && e->app.o->file)
    status = app_usage("the document is in the index: give the question with -p, not -f");
  if (!status && text.n == 0 && !e->app.o->index)
    status = app_usage("explain wants a text: a document with -f FILE, a question about it with -p TEXT, or both");
  if (!status && text.n)
    status = app_tokenize(&e->app, text.bytes, text.n, e->app.o->index ? 0 : SFA_TOKENIZE_SPECIAL, &e->ids, &e->n_ids);
  free(text.bytes);
  return status;
}

/* Tokens [first, end) as one line of text. */
static int append_text(const explain *e, int64_t first, int64_t end, text_buffer *out) {
  utf8_stream stream = {0};
  char bytes[512], whole[3 * sizeof bytes + 3];
  for (int64_t i = first; i < end; i++) {
    size_t n = sfa_tokenizer_decode(e->app.tokenizer, i ? e->all[i - 1] : -1, e->all[i], 1, bytes, sizeof bytes);
    n = utf8_push(&stream, bytes, n < sizeof bytes ? n : sizeof bytes, i + 1 == end, whole);
    for (size_t c = 0; c < n; c++)
      whole[c] = whole[c] == '\n' || whole[c] == '\r' || whole[c] == '\t' ? ' ' : whole[c];
    if (!text_append(out, whole, n))
      return app_fail("out of memory for a passage");
  }
  return EXIT_OK;
}

/* ---- Passages ------------------------------------------------------------------------------------------------------------------ */

static int by_mass(const void *a, const void *b) {
  const passage *x = a, *y = b;
  return x->mass != y->mass ? (x->mass < y->mass) - (x->mass > y->mass) : (x->first > y->first) - (x->first < y->first);
}

/* Each token looked at with a few around it; what overlaps is one passage. */
static void make_passages(explain *e, int64_t n_tokens) {
  e->n_passages = 0;
  for (int64_t i = 0; i < n_tokens; i++) { /* falling mass: the first token of a passage is its largest */
    const sfa_explained_token *t = &e->tokens[i];
    int64_t first = t->position > NEAR ? t->position - NEAR : 0, end = t->position + NEAR + 1 < e->n ? t->position + NEAR + 1 : e->n;
    passage p = {first, end, 0, t};
    for (int j = 0; j < e->n_passages;) {
      passage *q = &e->passages[j];
      if (q->first >= p.end || p.first >= q->end) {
        j++;
        continue;
      }
      p.first = q->first < p.first ? q->first : p.first;
      p.end = q->end > p.end ? q->end : p.end;
      p.most = q->most->mass >= p.most->mass ? q->most : p.most;
      e->passages[j] = e->passages[--e->n_passages];
    }
    e->passages[e->n_passages++] = p;
  }
  for (int j = 0; j < e->n_passages; j++)
    for (int64_t i = e->passages[j].first; i < e->passages[j].end; i++)
      e->passages[j].mass += (double)e->mass[i];
  qsort(e->passages, (size_t)e->n_passages, sizeof *e->passages, by_mass);
  int64_t most = e->app.o->top > 0 ? e->app.o->top : DEFAULT_PASSAGES;
  e->n_passages = e->n_passages < most ? e->n_passages : (int)most;
}

/* ---- The strip: mass by slices of the document ----------------------------------------------------------------------------------- */

/* Mean mass of a token in slice c of `columns`. */
static double density(const explain *e, int64_t c, int64_t columns) {
  int64_t first = c * e->n / columns, end = (c + 1) * e->n / columns;
  double sum = 0;
  for (int64_t i = first; i < end; i++)
    sum += (double)e->mass[i];
  return end > first ? sum / (double)(end - first) : 0;
}

/* One character a slice, from the least to the largest density in equal steps of its logarithm. */
static void print_strip(const explain *e) {
  static const char *const blocks[] = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  int64_t columns = e->n < STRIP_COLUMNS ? e->n : STRIP_COLUMNS;
  double least = INFINITY, largest = 0;
  for (int64_t c = 0; c < columns; c++) {
    double d = density(e, c, columns);
    least = d > 0 && d < least ? d : least;
    largest = d > largest ? d : largest;
  }
  for (int64_t c = 0; c < columns; c++) {
    double d = density(e, c, columns), range = log(largest / least);
    int level = d > 0 && range > 0 ? (int)(7.999 * log(d / least) / range) : 0;
    fputs(blocks[level], stdout);
  }
}

static int plot_strip(const explain *e, const char *path) {
  if (!plot_available())
    return app_fail("no gnuplot for the picture; install gnuplot-nox, or leave --plot out");
  FILE *plot = plot_open(path, 1200, 260);
  if (!plot)
    return app_fail("cannot start gnuplot for %s", path);
  int64_t columns = e->n < PICTURE_COLUMNS ? e->n : PICTURE_COLUMNS;
  double width = (double)e->n / (double)columns;
  fprintf(plot,
          "set title 'What token %lld of %lld looks at: mean softmax weight of a token, all heads asked for'\n"
          "set xlabel 'position in the text, tokens'\nset xrange [0:%lld]\nset yrange [0:1]\nset logscale cb\n"
          "set palette defined (0 'white', 0.35 'gold', 0.7 'red', 1 'black')\nset tics out nomirror\nunset ytics\nset format cb "
          "'%%.0e'\nset key off\n",
          (long long)e->n - 1, (long long)e->n, (long long)e->n);
  for (int i = 0; i < e->n_passages; i++) {
    double middle = 0.5 * (double)(e->passages[i].first + e->passages[i].end);
    fprintf(plot, "set label %d '%d' at first %g, graph 1.04 center\n", i + 1, i + 1, middle);
  }
  fprintf(plot, "plot '-' using 1:(0.5):(%g):(0.5):2 with boxxyerror fillstyle solid noborder lc palette\n", width / 2);
  for (int64_t c = 0; c < columns; c++) {
    double d = density(e, c, columns);
    if (d > 0)
      fprintf(plot, "%g %g\n", ((double)c + 0.5) * width, d);
  }
  fprintf(plot, "e\n");
  return plot_close(plot) ? EXIT_OK : app_fail("gnuplot could not write %s", path);
}

/* ---- Output ---------------------------------------------------------------------------------------------------------------------- */

static int print_passage(const explain *e, int number, const passage *p) {
  const sfa_explained_token *t = p->most;
  text_buffer text = {0};
  int status = append_text(e, p->first, t->position, &text);
  if (!status && !text_append(&text, "[", 1))
    status = app_fail("out of memory for a passage");
  if (!status)
    status = append_text(e, t->position, t->position + 1, &text);
  if (!status && !text_append(&text, "]", 1))
    status = app_fail("out of memory for a passage");
  if (!status)
    status = append_text(e, t->position + 1, p->end, &text);
  if (!status) {
    printf("\n%d  %4.1f %% of the weight, tokens %lld to %lld\n   %s\n", number, 100 * p->mass, (long long)p->first, (long long)p->end - 1,
           text.bytes);
    printf("   layer %d head %d gives token %lld %.1f %%: score %+.2f from %d shared features", t->layer, t->head, (long long)t->position,
           100 * (double)t->weight, (double)t->score, t->n_shared);
    for (int i = 0; i < t->n_reasons; i++)
      printf("%s %d %+.2f", i ? "," : ":", t->reasons[i].feature, (double)t->reasons[i].part);
    printf("%s\n", t->n_shared > t->n_reasons ? ", ..." : "");
  }
  free(text.bytes);
  return status;
}

static int print_table(const explain *e) {
  char name[96];
  text_buffer last = {0};
  int status = append_text(e, e->n - 1, e->n, &last);
  if (!status) {
    printf("explained   token %lld, \"%s\"\nattention   %s\nstart |", (long long)e->n - 1, last.bytes,
           app_attention_name(&e->app, name, sizeof name));
    print_strip(e);
    printf("| end\n");
  }
  free(last.bytes);
  for (int i = 0; i < e->n_passages && !status; i++)
    status = print_passage(e, i + 1, &e->passages[i]);
  return status ? status : app_flush();
}

static cJSON *token_json(const sfa_explained_token *t) {
  cJSON *token = cJSON_CreateObject();
  cJSON_AddNumberToObject(token, "position", (double)t->position);
  cJSON_AddNumberToObject(token, "mass", (double)t->mass);
  cJSON_AddNumberToObject(token, "layer", t->layer);
  cJSON_AddNumberToObject(token, "head", t->head);
  cJSON_AddNumberToObject(token, "weight", (double)t->weight);
  cJSON_AddNumberToObject(token, "score", (double)t->score);
  cJSON_AddNumberToObject(token, "shared_features", t->n_shared);
  cJSON *reasons = cJSON_AddArrayToObject(token, "reasons");
  for (int i = 0; i < t->n_reasons; i++) {
    cJSON *reason = cJSON_CreateObject();
    cJSON_AddNumberToObject(reason, "feature", t->reasons[i].feature);
    cJSON_AddNumberToObject(reason, "part", (double)t->reasons[i].part);
    cJSON_AddItemToArray(reasons, reason);
  }
  return token;
}

static int print_json(const explain *e, int64_t n_tokens) {
  cJSON *document = cJSON_CreateObject();
  cJSON_AddNumberToObject(document, "n_tokens", (double)e->n);
  cJSON *strip = cJSON_AddArrayToObject(document, "strip");
  int64_t columns = e->n < STRIP_COLUMNS ? e->n : STRIP_COLUMNS;
  for (int64_t c = 0; c < columns; c++)
    cJSON_AddItemToArray(strip, cJSON_CreateNumber(density(e, c, columns)));
  cJSON *tokens = cJSON_AddArrayToObject(document, "tokens");
  for (int64_t i = 0; i < n_tokens; i++)
    cJSON_AddItemToArray(tokens, token_json(&e->tokens[i]));
  cJSON *passages = cJSON_AddArrayToObject(document, "passages");
  int status = EXIT_OK;
  for (int i = 0; i < e->n_passages && !status; i++) {
    const passage *p = &e->passages[i];
    text_buffer text = {0};
    status = append_text(e, p->first, p->end, &text);
    cJSON *item = cJSON_CreateObject();
    cJSON_AddNumberToObject(item, "first", (double)p->first);
    cJSON_AddNumberToObject(item, "end", (double)p->end);
    cJSON_AddNumberToObject(item, "mass", p->mass);
    cJSON_AddStringToObject(item, "text", text.bytes ? text.bytes : "");
    cJSON_AddItemToArray(passages, item);
    free(text.bytes);
  }
  if (!status)
    return app_print_json(document);
  cJSON_Delete(document);
  return status;
}

/* ---- The verb -------------------------------------------------------------------------------------------------------------------- */

/* A list of numbers as the engine wants it; NULL for an empty one. */
static int32_t *small_list(const int_list *list) {
  int32_t *out = list->n ? malloc((size_t)list->n * sizeof *out) : NULL;
  for (int64_t i = 0; out && i < list->n; i++)
    out[i] = (int32_t)list->values[i];
  return out;
}

static int look(explain *e, int64_t *n_tokens) {
  app *a = &e->app;
  const app_options *o = a->o;
  int32_t *layers = small_list(&o->explain_layers), *heads = small_list(&o->explain_heads);
  sfa_explain_options options = {.struct_size = sizeof options,
                                 .layers = layers,
                                 .heads = heads,
                                 .n_layers = (int32_t)o->explain_layers.n,
                                 .n_heads = (int32_t)o->explain_heads.n};
  /* One in 32 tokens, so that the passages of a short text do not run into one. */
  int64_t most = 1 + e->n / 32 < N_ASKED ? 1 + e->n / 32 : N_ASKED;
  int status = EXIT_OK;
  e->mass = malloc((size_t)e->n * sizeof *e->mass);
  if (!e->mass || (o->explain_layers.n && !layers) || (o->explain_heads.n && !heads))
    status = app_fail("out of memory for the weights of %lld tokens", (long long)e->n);
  else if (sfa_session_explain(a->session, &options, most, e->tokens, n_tokens, e->mass) != SFA_OK)
    status = app_fail_status(a->ctx);
  free(layers);
  free(heads);
  return status;
}

/* The session with all of the text in it. */
static int read_all(explain *e) {
  app *a = &e->app;
  const app_options *o = a->o;
  int64_t context_len;
  int status = app_context_len(a, &context_len);
  if (!status)
    status = o->index ? app_load_session(a, o->index, context_len) : app_open_session(a, &a->choice, context_len);
  if (status)
    return status;
  e->n = sfa_session_len(a->session) + e->n_ids;
  if (e->n > context_len)
    return app_fail("the text has %lld tokens, the context only %lld: shorten it", (long long)e->n, (long long)context_len);
  interrupt_begin();
  sfa_status read = e->n_ids ? sfa_session_append(a->session, e->ids, e->n_ids, NULL) : SFA_OK;
  progress_clear(&a->progress);
  e->all = sfa_session_tokens(a->session);
  return read == SFA_OK ? EXIT_OK : read == SFA_ERROR_CANCELLED ? EXIT_INTERRUPTED : app_fail_status(a->ctx);
}

static int run(explain *e, const app_options *o) {
  int64_t n_tokens = 0;
  int status = app_require_model(o, "explain");
  if (!status)
    status = app_open_model(&e->app, o, true);
  if (!status)
    status = read_texts(e);
  if (!status)
    status = read_all(e);
  if (!status)
    status = look(e, &n_tokens);
  if (status)
    return status;
  make_passages(e, n_tokens);
  status = o->json ? print_json(e, n_tokens) : print_table(e);
  return status || !o->plot ? status : plot_strip(e, o->plot);
}

int cmd_explain(const app_options *o) {
  explain *e = calloc(1, sizeof *e);
  if (!e)
    return app_fail("out of memory");
  int status = run(e, o);
  if (e->ids)
    sfa_free_ids(e->app.ctx, e->ids);
  free(e->mass);
  app_close(&e->app);
  free(e);
  return status;
}
