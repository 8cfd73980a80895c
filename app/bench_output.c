/* Results of a benchmark: one list of columns makes the table, the JSON and the CSV. */
#include "bench.h"
#include "plot.h"

#include <errno.h>
#include <math.h>
#include <sfa/stream.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What stands before the columns in a line of CSV. */
static const char csv_prefix[] = "version,commit,machine,processors,command";

/* The command line as it was typed, for those who want to repeat it. */
static char *command_line(void) {
  text_buffer text = {0};
  char bytes[4096];
  FILE *file = fopen("/proc/self/cmdline", "r");
  size_t n = file ? fread(bytes, 1, sizeof bytes - 1, file) : 0;
  if (file)
    fclose(file);
  bytes[n] = '\0';
  bool whole = text_append(&text, "sfa", 3);
  for (size_t at = strlen(bytes) + 1; whole && at < n; at += strlen(bytes + at) + 1)
    whole = text_append(&text, " ", 1) && text_append(&text, bytes + at, strlen(bytes + at));
  if (!whole) {
    free(text.bytes);
    return NULL;
  }
  return text.bytes;
}

/* The processor, and the GPU where that computes. */
static char *machine_name(const sfa_context_options *device) {
  sfa_context *ctx = NULL;
  sfa_device_info devices[16];
  int32_t n_devices = 0;
  text_buffer text = {0};
  const char *processor = bench_machine_name();
  bool whole = text_append(&text, processor, strlen(processor));
  bool on_gpu = device->device == SFA_DEVICE_CUDA && sfa_context_create(NULL, &ctx) == SFA_OK &&
                sfa_device_list(ctx, 16, devices, &n_devices) == SFA_OK;
  for (int32_t i = 0; on_gpu && i < n_devices && i < 16; i++)
    if (devices[i].kind == SFA_DEVICE_CUDA && devices[i].index == device->device_index)
      whole = whole && text_append(&text, " with ", 6) && text_append(&text, devices[i].name, strlen(devices[i].name));
  sfa_context_destroy(ctx);
  if (whole)
    return text.bytes;
  free(text.bytes);
  return NULL;
}

/* ---- CSV ------------------------------------------------------------------------------------------------------------------------- */

static void csv_text(FILE *csv, const char *text) {
  fputc('"', csv);
  for (; *text; text++) {
    if (*text == '"')
      fputc('"', csv);
    fputc(*text == '\n' ? ' ' : *text, csv);
  }
  fputc('"', csv);
}

/* The first line of a CSV file of these columns. */
static char *csv_head(const bench_output *out) {
  text_buffer head = {0};
  bool whole = text_append(&head, csv_prefix, strlen(csv_prefix));
  for (int i = 0; whole && i < out->n_columns; i++)
    whole = text_append(&head, ",", 1) && text_append(&head, out->columns[i].name, strlen(out->columns[i].name));
  if (whole && text_append(&head, "\n", 1))
    return head.bytes;
  free(head.bytes);
  return NULL;
}

/* Opens for appending; a file that is there must have the same columns. */
static int open_csv(bench_output *out) {
  const char *path = out->o->csv;
  out->csv = fopen(path, "a+");
  if (!out->csv)
    return app_fail("cannot write %s: %s", path, strerror(errno));
  char *head = csv_head(out), *seen = head ? malloc(strlen(head) + 1) : NULL;
  int status = seen ? EXIT_OK : app_fail("out of memory for a line of CSV");
  rewind(out->csv);
  if (!status && !fgets(seen, (int)strlen(head) + 1, out->csv))
    fputs(head, out->csv);
  else if (!status && strcmp(seen, head) != 0)
    status = app_fail("%s holds other columns; name a new file, or the one of the same benchmark", path);
  free(head);
  free(seen);
  return status;
}

static void csv_row(const bench_output *out, const bench_cell *row) {
  const char *commit = getenv("SFA_COMMIT");
  fprintf(out->csv, SFA_VERSION ",%s,", commit ? commit : "");
  csv_text(out->csv, out->machine);
  fprintf(out->csv, ",%ld,", sysconf(_SC_NPROCESSORS_ONLN));
  csv_text(out->csv, out->command);
  for (int i = 0; i < out->n_columns; i++) {
    fputc(',', out->csv);
    if (row[i].text)
      csv_text(out->csv, row[i].text);
    else if (!isnan(row[i].number))
      fprintf(out->csv, "%.9g", row[i].number);
  }
  fputc('\n', out->csv);
}

/* ---- Table and JSON ---------------------------------------------------------------------------------------------------------------- */

static void print_head(const bench_output *out) {
  for (int i = 0; i < out->n_columns; i++) {
    const bench_column *c = &out->columns[i];
    if (c->title)
      printf(c->kind == CELL_TEXT ? "%-*s " : "%*s ", c->width, c->title);
  }
  putchar('\n');
}

static void print_cell(const bench_column *c, const bench_cell *cell) {
  char text[64] = "", bytes[32];
  if (cell->text)
    snprintf(text, sizeof text, "%s", cell->text);
  else if (isnan(cell->number))
    text[0] = '\0';
  else if (c->kind == CELL_BYTES)
    snprintf(text, sizeof text, "%s", human_bytes(cell->number, bytes));
  else if (c->kind == CELL_PERCENT)
    snprintf(text, sizeof text, "%.*f %%", c->digits, 100 * cell->number);
  else if (c->kind == CELL_TIMES)
    snprintf(text, sizeof text, "%.*fx", c->digits, cell->number);
  else if (c->kind == CELL_FLAG)
    snprintf(text, sizeof text, "%s", cell->number != 0 ? "yes" : "no");
  else
    snprintf(text, sizeof text, "%.*f", c->kind == CELL_COUNT ? 0 : c->digits, cell->number);
  printf(c->kind == CELL_TEXT ? "%-*s " : "%*s ", c->width, text);
}

static cJSON *json_row(const bench_output *out, const bench_cell *row) {
  cJSON *object = cJSON_CreateObject();
  for (int i = 0; i < out->n_columns; i++) {
    const char *name = out->columns[i].name;
    if (row[i].text)
      cJSON_AddStringToObject(object, name, row[i].text);
    else if (isnan(row[i].number))
      cJSON_AddNullToObject(object, name);
    else if (out->columns[i].kind == CELL_FLAG)
      cJSON_AddBoolToObject(object, name, row[i].number != 0);
    else
      cJSON_AddNumberToObject(object, name, row[i].number);
  }
  return object;
}

int bench_output_open(bench_output *out, const app_options *o, const bench_column *columns, int n_columns) {
  sfa_context_options device = {0};
  app a;
  int wrong = app_device(o, &device);
  if (!wrong) { /* a GPU that is not there is told before anything is written */
    wrong = app_open_context(&a, o, 1, SFA_ISA_DEFAULT);
    app_close(&a);
  }
  *out = (bench_output){.o = o, .columns = columns, .n_columns = n_columns, .command = command_line(), .machine = machine_name(&device)};
  if (wrong)
    return wrong;
  if (!out->command || !out->machine)
    return app_fail("out of memory for the command line");
  int status = o->csv ? open_csv(out) : EXIT_OK;
  if (!status && !o->json)
    print_head(out);
  return status;
}

bench_cell *bench_output_row(bench_output *out) {
  size_t n = (size_t)out->n_columns;
  bench_cell *rows = realloc(out->rows, (size_t)(out->n_rows + 1) * n * sizeof *rows);
  if (!rows) {
    app_fail("out of memory for %lld results", (long long)out->n_rows + 1);
    return NULL;
  }
  out->rows = rows;
  bench_cell *row = rows + (size_t)out->n_rows++ * n;
  for (size_t i = 0; i < n; i++)
    row[i] = (bench_cell){NULL, NAN};
  return row;
}

const char *bench_output_keep(bench_output *out, const char *text) {
  char **kept = realloc(out->kept, (size_t)(out->n_kept + 1) * sizeof *kept);
  if (!kept)
    return NULL;
  out->kept = kept;
  return kept[out->n_kept++] = strdup(text);
}

int bench_output_show(bench_output *out) {
  const bench_cell *row = out->rows + (out->n_rows - 1) * out->n_columns;
  if (out->csv)
    csv_row(out, row);
  if (out->o->json)
    return EXIT_OK;
  for (int i = 0; i < out->n_columns; i++)
    if (out->columns[i].title)
      print_cell(&out->columns[i], &row[i]);
  putchar('\n');
  return app_flush();
}

int bench_output_bars(const bench_output *out, const char *path, const char *axis, int digits, const int columns[3]) {
  FILE *plot = plot_open(path, 900, 200 + 26 * (int)(out->n_rows < 60 ? out->n_rows : 60));
  if (!plot)
    return app_fail("cannot draw %s: gnuplot does not start", path);
  fprintf(plot,
          "set style fill solid 0.8\nset boxwidth 0.7\nunset key\nset grid x\nset xlabel '%s'\nset yrange [*:*] reverse\n"
          "set offsets 0,graph 0.1,0.6,0.6\nset xrange [0:*]\nset lmargin 44\n"
          "plot '-' using (0.5*$2):1:(0.5*$2):(0.35):ytic(3) with boxxyerror lc rgb '#3070b0', "
          "'-' using 2:1:(sprintf(' %%.%df', $2)) with labels left\n",
          axis, digits);
  for (int pass = 0; pass < 2; pass++) { /* the boxes, then their numbers */
    for (int64_t i = 0; i < out->n_rows; i++) {
      const bench_cell *row = out->rows + i * out->n_columns;
      char label[128];
      snprintf(label, sizeof label, "%.0f tokens: %s", row[columns[0]].number, row[columns[1]].text);
      fprintf(plot, "%lld %.6g ", (long long)i, row[columns[2]].number);
      plot_text(plot, label);
      fputc('\n', plot);
    }
    fputs("e\n", plot);
  }
  return plot_close(plot) ? EXIT_OK : app_fail("gnuplot could not draw %s", path);
}

int bench_output_close(bench_output *out, int status) {
  if (out->csv) {
    bool bad = ferror(out->csv) != 0;
    if ((fclose(out->csv) != 0 || bad) && !status)
      status = app_fail("cannot write %s: %s", out->o->csv, strerror(errno));
  }
  if (!status && out->o->json) {
    cJSON *list = cJSON_CreateArray();
    for (int64_t i = 0; i < out->n_rows; i++)
      cJSON_AddItemToArray(list, json_row(out, out->rows + i * out->n_columns));
    status = app_print_json(list);
  }
  for (int64_t i = 0; i < out->n_kept; i++)
    free(out->kept[i]);
  free(out->kept);
  free(out->rows);
  free(out->command);
  free(out->machine);
  return status;
}
