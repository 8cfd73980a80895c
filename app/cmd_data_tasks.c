/* sfa data listops, sfa data kv: made-up tasks for training and for sfa eval, the same rows from a seed everywhere. */
#include "app.h"

#include <sfa/eval.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* splitmix64. */
static uint64_t draw(uint64_t *state) {
  uint64_t z = *state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

/* 0 .. n - 1; n is small, so that the bias of a remainder is below 2^-50. */
static int64_t draw_below(uint64_t *state, int64_t n) { return (int64_t)(draw(state) % (uint64_t)n); }

static uint64_t first_state(const app_options *o) { return o->seed < 0 ? 1 : (uint64_t)o->seed; }

static int64_t given(int64_t value, int64_t otherwise) { return value < 0 ? otherwise : value; }

/* Adds to a row of JSON and prints it as a line. */
static int print_row(cJSON *row) {
  char *text = cJSON_PrintUnformatted(row);
  cJSON_Delete(row);
  if (!text)
    return app_fail("out of memory for a row");
  puts(text);
  cJSON_free(text);
  return EXIT_OK;
}

/* ---- ListOps ----------------------------------------------------------------------------------------------------------------- */

/* Is it new? [capacity] hashes, a power of two, 0: free. */
static bool is_new(uint64_t *seen, size_t capacity, const char *line, size_t n) {
  uint64_t h = 14695981039346656037u; /* FNV-1a */
  for (size_t i = 0; i < n; i++)
    h = (h ^ (unsigned char)line[i]) * 1099511628211u;
  h += h == 0;
  size_t at = (size_t)(h >> 20) & (capacity - 1);
  for (; seen[at]; at = (at + 1) & (capacity - 1))
    if (seen[at] == h)
      return false;
  seen[at] = h;
  return true;
}

/* line: "EXPRESSION<tab>VALUE<newline>", n bytes; the newline may be overwritten. */
static int print_expression(const app_options *o, char *line, size_t n) {
  if (o->text_format != 2)
    return fwrite(line, 1, n, stdout) < n ? app_flush() : EXIT_OK;
  line[n - 1] = '\0';
  cJSON *row = cJSON_CreateObject();
  cJSON_AddStringToObject(row, "text", line);
  line[n - 3] = '\0';
  cJSON_AddStringToObject(row, "source", line);
  cJSON_AddStringToObject(row, "target", line + n - 2);
  return print_row(row);
}

int cmd_data_listops(const app_options *o) {
  enum { TRIES = 10000, SYMBOL_BYTES = 5 };
  const int64_t rows = given(o->rows, 1000), least = given(o->min_length, 500), most = given(o->max_length, 2000);
  const int32_t depth = (int32_t)given(o->max_depth, 10), args = (int32_t)given(o->max_args, 10);
  const size_t line_bytes = (size_t)most * SYMBOL_BYTES + 4;
  uint64_t state = first_state(o);
  size_t capacity = 16;
  if (least + 1 >= most)
    return app_usage("lengths are more than --min-length and less than --max-length: %lld and %lld leave none", (long long)least,
                     (long long)most);
  while (capacity < 2 * (size_t)rows)
    capacity *= 2;
  uint64_t *seen = calloc(capacity, sizeof *seen);
  char *line = malloc(line_bytes);
  int status = seen && line ? EXIT_OK : app_fail("out of memory for %lld rows", (long long)rows);
  for (int64_t done = 0, tries = 0; done < rows && !status;) {
    const size_t n = sfa_listops_line(&state, depth, args, (int32_t)least, (int32_t)most, line, line_bytes);
    if (n && is_new(seen, capacity, line, n)) {
      status = print_expression(o, line, n);
      done++;
      tries = 0;
    } else if (!n || ++tries == TRIES) {
      status = app_fail("after %lld rows, %d expressions in a row were too short, too long or there already: widen the lengths, or raise "
                        "--max-depth or --max-args",
                        (long long)done, TRIES);
    }
  }
  free(seen);
  free(line);
  int flushed = app_flush();
  return status ? status : flushed;
}

/* ---- Keys and values --------------------------------------------------------------------------------------------------------- */

/* A random UUID, version 4. */
static void make_uuid(uint64_t *state, char out[37]) {
  uint64_t high = (draw(state) & ~(uint64_t)0xf000) | 0x4000, low = (draw(state) & ~((uint64_t)3 << 62)) | (uint64_t)2 << 62;
  snprintf(out, 37, "%08x-%04x-%04x-%04x-%012llx", (unsigned)(high >> 32), (unsigned)(high >> 16) & 0xffff, (unsigned)high & 0xffff,
           (unsigned)(low >> 48), (unsigned long long)(low & 0xffffffffffff));
}

int cmd_data_kv(const app_options *o) {
  uint64_t state = first_state(o);
  int64_t rows = given(o->rows, 500), keys = given(o->keys, 75);
  int status = EXIT_OK;
  for (int64_t r = 0; r < rows && !status; r++) {
    cJSON *row = cJSON_CreateObject(), *list = cJSON_AddArrayToObject(row, "ordered_kv_records");
    int64_t asked = draw_below(&state, keys);
    char key[37], value[37], asked_key[37] = "", asked_value[37] = "";
    for (int64_t i = 0; i < keys; i++) {
      make_uuid(&state, key);
      make_uuid(&state, value);
      if (i == asked) {
        memcpy(asked_key, key, sizeof key);
        memcpy(asked_value, value, sizeof value);
      }
      cJSON_AddItemToArray(list, cJSON_CreateStringArray((const char *[]){key, value}, 2));
    }
    cJSON_AddStringToObject(row, "key", asked_key);
    cJSON_AddStringToObject(row, "value", asked_value);
    status = print_row(row);
  }
  int flushed = app_flush();
  return status ? status : flushed;
}
