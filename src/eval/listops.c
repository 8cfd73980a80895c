/* ListOps: nested operations on lists of digits (Nangia and Bowman 2018), as Long Range Arena (Tay et al. 2020) draws them: at every place
 * an operation with probability 1/4 until the depth is reached, else a digit; expressions of other lengths are drawn again. The root is
 * always an operation: a lone digit would be too short. */
#include <sfa/eval.h>

#include <string.h>

#include "base/rng.h"

enum { MOST_ARGS = 64, TRIES = 10000 };

typedef struct writer {
  sfa_rng rng;
  int32_t max_depth, max_args, n_symbols, max_len;
  char *text;
  size_t n, capacity;
} writer;

static int below(writer *w, int n) { return (int)(sfa_rng_uniform(&w->rng) * n); }

static void put(writer *w, const char *symbol) {
  size_t len = strlen(symbol), space = w->n > 0;
  if (w->n + space + len <= w->capacity) {
    memcpy(w->text + w->n, " ", space);
    memcpy(w->text + w->n + space, symbol, len);
  }
  w->n += space + len;
  w->n_symbols++;
}

static int apply(int operation, int *args, int n) {
  int sum = 0;
  for (int i = 1; i < n; i++) /* sorted, a few dozen at most */
    for (int j = i; j > 0 && args[j] < args[j - 1]; j--) {
      int larger = args[j - 1];
      args[j - 1] = args[j];
      args[j] = larger;
    }
  for (int i = 0; i < n; i++)
    sum += args[i];
  switch (operation) {
  case 0: return args[0];
  case 1: return args[n - 1];
  case 2: return (args[(n - 1) / 2] + args[n / 2]) / 2; /* the median, rounded down */
  default: return sum % 10;
  }
}

/* Writes an expression and returns its value; gives up quietly once it is too long. */
static int write_tree(writer *w, int32_t depth) {
  static const char *const names[] = {"[MIN", "[MAX", "[MED", "[SM"};
  if (depth > 1 && (depth >= w->max_depth || sfa_rng_uniform(&w->rng) >= 0.25)) {
    char digit[] = {(char)('0' + below(w, 10)), '\0'};
    put(w, digit);
    return digit[0] - '0';
  }
  int operation = below(w, 4), n = 2 + below(w, w->max_args - 1), args[MOST_ARGS];
  put(w, names[operation]);
  for (int i = 0; i < n; i++)
    args[i] = w->n_symbols >= w->max_len ? 0 : write_tree(w, depth + 1);
  put(w, "]");
  return apply(operation, args, n);
}

size_t sfa_listops_line(uint64_t *state, int32_t max_depth, int32_t max_args, int32_t min_len, int32_t max_len, char *text,
                        size_t capacity) {
  if (!state || !text || max_depth < 1 || max_depth > 100 || min_len < 1 || max_args < 2 || max_args > MOST_ARGS || capacity < 4)
    return 0;
  for (int i = 0; i < TRIES; i++) {
    writer w = {.rng = {*state}, .max_depth = max_depth, .max_args = max_args, .max_len = max_len, .text = text, .capacity = capacity - 3};
    int value = write_tree(&w, 1);
    *state = w.rng.state;
    if (w.n_symbols <= min_len || w.n_symbols >= max_len || w.n > w.capacity)
      continue;
    text[w.n] = '\t';
    text[w.n + 1] = (char)('0' + value);
    text[w.n + 2] = '\n';
    return w.n + 3;
  }
  return 0;
}
