/* sfa data listops, sfa data kv: made-up tasks for training and for sfa eval, the same rows from a seed everywhere. */
#include "app.h"

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

/* Long Range Arena (Tay et al. 2020) after Nangia and Bowman (2018): a node is an operator with probability 1/4, at the greatest depth
 * never, else a digit. An operator has 2 .. most_args nodes. Lengths count digits, operators and brackets' ends. */
typedef struct expression {
  uint64_t *state;
  text_buffer *text;
  int64_t most_depth, most_args, most_length;
  int64_t length;
  bool failed; /* too long, or no memory */
} expression;

static int compare_ints(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

enum { MOST_ARGS = 64 };

/* The median of an even number is the mean of the two in the middle, rounded down. */
static int apply(int operator, int * values, int n) {
  int sum = 0;
  qsort(values, (size_t)n, sizeof *values, compare_ints);
  for (int i = 0; i < n; i++)
    sum += values[i];
  switch (operator) {
  case 0: return values[0];
  case 1: return values[n - 1];
  case 2: return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
  default: return sum % 10;
  }
}

static void add_text(expression *e, const char *text) {
  if (!text_append(e->text, " ", e->text->n > 0) || !text_append(e->text, text, strlen(text)))
    e->failed = true;
}

/* Writes a node; returns its value. */
static int add_node(expression *e, int64_t depth) {
  static const char *const operators[] = {"[MIN", "[MAX", "[MED", "[SM"};
  int values[MOST_ARGS], n, operator;
  if (++e->length >= e->most_length || e->failed) {
    e->failed = true;
    return 0;
  }
  if (depth >= e->most_depth || draw_below(e->state, 4) != 0) {
    int digit = (int)draw_below(e->state, 10);
    add_text(e, (const char[]){(char)('0' + digit), 0});
    return digit;
  }
  n = 2 + (int)draw_below(e->state, e->most_args - 1);
  operator=(int) draw_below(e->state, 4);
  add_text(e, operators[operator]);
  for (int i = 0; i < n; i++)
    values[i] = add_node(e, depth + 1);
  e->length++;
  add_text(e, "]");
  return apply(operator, values, n);
}

/* Is it new? [capacity] hashes, a power of two, 0: free. */
static bool is_new(uint64_t *seen, size_t capacity, const text_buffer *text) {
  uint64_t h = 14695981039346656037u; /* FNV-1a */
  for (size_t i = 0; i < text->n; i++)
    h = (h ^ (unsigned char)text->bytes[i]) * 1099511628211u;
  h += h == 0;
  size_t at = (size_t)(h >> 20) & (capacity - 1);
  for (; seen[at]; at = (at + 1) & (capacity - 1))
    if (seen[at] == h)
      return false;
  seen[at] = h;
  return true;
}

static int print_expression(const app_options *o, text_buffer *text, int value) {
  const char target[] = {(char)('0' + value), 0};
  if (o->text_format != 2)
    return printf("%s\t%s\n", text->bytes, target) < 0 ? app_flush() : EXIT_OK;
  cJSON *row = cJSON_CreateObject();
  cJSON_AddStringToObject(row, "source", text->bytes);
  cJSON_AddStringToObject(row, "target", target);
  if (!text_append(text, "\t", 1) || !text_append(text, target, 1))
    return app_fail("out of memory for an expression");
  cJSON_AddStringToObject(row, "text", text->bytes);
  return print_row(row);
}

int cmd_data_listops(const app_options *o) {
  enum { TRIES = 10000 };
  int64_t rows = given(o->rows, 1000), least = given(o->min_length, 500), most = given(o->max_length, 2000), tries = 0;
  uint64_t state = first_state(o);
  size_t capacity = 16;
  text_buffer text = {0};
  if (least >= most)
    return app_usage("lengths are more than --min-length and less than --max-length: %lld and %lld leave none", (long long)least,
                     (long long)most);
  while (capacity < 2 * (size_t)rows)
    capacity *= 2;
  uint64_t *seen = calloc(capacity, sizeof *seen);
  int status = seen ? EXIT_OK : app_fail("out of memory for %lld rows", (long long)rows);
  for (int64_t done = 0; done < rows && !status;) {
    text.n = 0;
    expression e = {&state, &text, given(o->max_depth, 10), given(o->max_args, 10), most, 0, false};
    int value = add_node(&e, 1);
    if (!e.failed && e.length > least && e.length < most && is_new(seen, capacity, &text)) {
      status = print_expression(o, &text, value);
      done++;
      tries = 0;
    } else if (++tries == TRIES) {
      status = app_fail("after %lld rows, %d expressions in a row were too short, too long or there already: widen the lengths, or raise "
                        "--max-depth or --max-args",
                        (long long)done, TRIES);
    }
  }
  free(seen);
  free(text.bytes);
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
