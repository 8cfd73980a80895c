/* The table of costs that `sfa plan --calibrate` measured, kept for this machine: <cache folder>/sfa/costs-<isa>.json. A file that cannot
 * be believed is left alone and said so, and the table in the source serves. */
#include "app.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { COSTS_VERSION = 2, MOST_FILE_BYTES = 1 << 16 };

/* Every entry of sfa_costs, under its name. */
typedef struct cost_entry {
  const char *name;
  size_t offset;
  int n;
} cost_entry;

#define ENTRY(member)                                                                                                                      \
  { #member, offsetof(sfa_costs, member), (int)(sizeof(((sfa_costs *)0)->member) / sizeof(double)) }
static const cost_entry entries[] = {
    ENTRY(call),          ENTRY(block),           ENTRY(tile),
    ENTRY(near_bytes),    ENTRY(read_byte),       ENTRY(topk),
    ENTRY(topk_bf16),     ENTRY(pack_value),      ENTRY(load_value),
    ENTRY(query_value),   ENTRY(code_pair),       ENTRY(code_step),
    ENTRY(dense_step),    ENTRY(densify_key),     ENTRY(densify_value),
    ENTRY(exp_pair),      ENTRY(value_step),      ENTRY(keys_table),
    ENTRY(keys_code),     ENTRY(keys_dense),      ENTRY(keys_exp_pair),
    ENTRY(keys_value),    ENTRY(half_code_step),  ENTRY(half_dense_step),
    ENTRY(half_exp_pair), ENTRY(half_value_step), ENTRY(half_pack_value),
    ENTRY(paper_entry),   ENTRY(posting_entry),
};
enum { N_ENTRIES = sizeof entries / sizeof *entries };

static double *entry_at(sfa_costs *costs, const cost_entry *e) { return (double *)(void *)((char *)costs + e->offset); }

/* What the processor calls itself: costs of another one are of no use. */
static void machine_name(char *out, size_t capacity) {
  FILE *file = fopen("/proc/cpuinfo", "r");
  char line[512];
  snprintf(out, capacity, "unknown");
  while (file && fgets(line, sizeof line, file))
    if (strncmp(line, "model name", 10) == 0 && strchr(line, ':')) {
      const char *name = strchr(line, ':') + 1;
      name += strspn(name, " \t");
      snprintf(out, capacity, "%.*s", (int)strcspn(name, "\n"), name);
      break;
    }
  if (file)
    fclose(file);
}

/* The folder that is the user's for such files, with `sub` behind it. False where the environment names none. */
static bool cache_path(const char *sub, char *out, size_t capacity) {
  const char *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
  int n = xdg && *xdg == '/' ? snprintf(out, capacity, "%s/%s", xdg, sub)
          : home && *home    ? snprintf(out, capacity, "%s/.cache/%s", home, sub)
                             : -1;
  return n > 0 && (size_t)n < capacity;
}

bool costs_path(sfa_isa isa, char *out, size_t capacity) {
  char sub[64];
  snprintf(sub, sizeof sub, "sfa/costs-%s.json", sfa_isa_name(isa));
  return cache_path(sub, out, capacity);
}

/* ---- Reading ------------------------------------------------------------------------------------------------------------------- */

/* The whole of a small file, NUL-terminated, or NULL with errno. */
static char *read_small_file(const char *path) {
  FILE *file = fopen(path, "rb");
  char *text = file ? malloc(MOST_FILE_BYTES + 1) : NULL;
  if (text)
    text[fread(text, 1, MOST_FILE_BYTES, file)] = 0;
  if (file)
    fclose(file);
  return text;
}

static bool is_text(const cJSON *document, const char *name, const char *wanted) {
  const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(document, name));
  return text && strcmp(text, wanted) == 0;
}

/* Numbers of an entry: times, and 0 only where the table in the source has it too. */
static bool read_entry(const cJSON *table, const cost_entry *e, sfa_costs *costs) {
  const cJSON *list = cJSON_GetObjectItemCaseSensitive(table, e->name), *item;
  double *to = entry_at(costs, e);
  int i = 0;
  if (!cJSON_IsArray(list) || cJSON_GetArraySize(list) != e->n)
    return false;
  cJSON_ArrayForEach(item, list) {
    double value = cJSON_IsNumber(item) ? cJSON_GetNumberValue(item) : NAN;
    if (!(value >= 0 && value < 1e12) || (value == 0 && to[i] > 0))
      return false;
    to[i++] = value;
  }
  return true;
}

/* NULL, or what is wrong with a kept file. */
static const char *read_costs(const cJSON *document, sfa_isa isa, sfa_costs *costs) {
  char machine[256];
  machine_name(machine, sizeof machine);
  const cJSON *version = cJSON_GetObjectItemCaseSensitive(document, "version"), *table = cJSON_GetObjectItemCaseSensitive(document, "ns");
  if (!is_text(document, "kind", "sfa costs"))
    return "it is damaged";
  if (!cJSON_IsNumber(version) || version->valueint != COSTS_VERSION)
    return "it is of another version";
  if (!is_text(document, "isa", sfa_isa_name(isa)) || !is_text(document, "machine", machine))
    return "it is of another machine";
  for (int i = 0; i < N_ENTRIES; i++)
    if (!read_entry(table, &entries[i], costs))
      return "it is damaged";
  return NULL;
}

const sfa_costs *costs_kept(sfa_isa isa, sfa_costs *costs) {
  char path[1024];
  char *text = costs_path(isa, path, sizeof path) ? read_small_file(path) : NULL;
  if (!text)
    return NULL;
  sfa_costs_default(isa, costs);
  cJSON *document = cJSON_Parse(text);
  free(text);
  const char *wrong = document ? read_costs(document, isa, costs) : "it is damaged";
  cJSON_Delete(document);
  if (!wrong)
    return costs;
  app_note("the costs kept in %s are not used: %s; sfa plan --calibrate makes them anew", path, wrong);
  return NULL;
}

/* ---- Keeping ------------------------------------------------------------------------------------------------------------------- */

/* To the last bit: cJSON's own numbers have 15 digits where those come within a rounding, and costs read back would be others. */
static cJSON *exact_numbers(const double *values, int n) {
  cJSON *list = cJSON_CreateArray();
  for (int i = 0; i < n; i++) {
    char text[32];
    snprintf(text, sizeof text, "%.17g", values[i]);
    cJSON_AddItemToArray(list, cJSON_CreateRaw(text));
  }
  return list;
}

static cJSON *costs_document(const sfa_costs *costs) {
  sfa_costs copy = *costs;
  char machine[256];
  machine_name(machine, sizeof machine);
  cJSON *document = cJSON_CreateObject();
  cJSON_AddStringToObject(document, "kind", "sfa costs");
  cJSON_AddNumberToObject(document, "version", COSTS_VERSION);
  cJSON_AddStringToObject(document, "isa", sfa_isa_name(costs->isa));
  cJSON_AddStringToObject(document, "machine", machine);
  cJSON *table = cJSON_AddObjectToObject(document, "ns");
  for (int i = 0; i < N_ENTRIES; i++)
    cJSON_AddItemToObject(table, entries[i].name, exact_numbers(entry_at(&copy, &entries[i]), entries[i].n));
  return document;
}

/* Makes the folders of a path, those that are missing. */
static void make_folders(char *path) {
  for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
    *slash = 0;
    mkdir(path, 0700);
    *slash = '/';
  }
}

/* Whole or not at all: written beside the place, then moved there. */
static bool write_file(const char *path, const char *text) {
  char beside[1100];
  snprintf(beside, sizeof beside, "%s.%ld", path, (long)getpid());
  int file = open(beside, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  if (file < 0)
    return false;
  size_t n = strlen(text);
  bool written = write(file, text, n) == (ssize_t)n && fsync(file) == 0;
  written = close(file) == 0 && written && rename(beside, path) == 0;
  if (!written) {
    int reason = errno;
    unlink(beside);
    errno = reason;
  }
  return written;
}

int costs_keep(const sfa_costs *costs, char *path, size_t capacity) {
  if (!costs_path(costs->isa, path, capacity))
    return app_fail("there is no place to keep the costs: set HOME or XDG_CACHE_HOME");
  cJSON *document = costs_document(costs);
  char *text = cJSON_PrintUnformatted(document);
  cJSON_Delete(document);
  if (!text)
    return app_fail("out of memory for the table of costs");
  make_folders(path);
  bool written = write_file(path, text);
  cJSON_free(text);
  return written ? EXIT_OK : app_fail("cannot write %s: %s", path, strerror(errno));
}
