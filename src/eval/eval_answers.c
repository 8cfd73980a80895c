/* Judges of generated answers. */
#include "eval/eval_task.h"

#include <ctype.h>
#include <string.h>

/* ---- GSM8K: the number of an answer ------------------------------------------------------------------------------------------------ */

static size_t span_of_digits(const char *text, const char *also) {
  size_t n = 0;
  while (isdigit((unsigned char)text[n]) || (text[n] && strchr(also, text[n])))
    n++;
  return n;
}

/* The first match of #### (-?[0-9.,]+): its group. 0: none. */
static size_t find_strict(const char *text, const char **number) {
  for (const char *at = text; (at = strstr(at, "#### ")) != NULL; at++) {
    size_t sign = at[5] == '-', n = span_of_digits(at + 5 + sign, ".,");
    *number = at + 5;
    if (n)
      return sign + n;
  }
  return 0;
}

/* The last match of (-?[$0-9.,]{2,})|(-?[0-9]+). */
static size_t find_flexible(const char *text, const char **number) {
  size_t found = 0;
  for (const char *at = text; *at;) {
    size_t sign = *at == '-', many = span_of_digits(at + sign, "$.,"), few = span_of_digits(at + sign, "");
    size_t n = many >= 2 ? sign + many : few ? sign + few : 0;
    if (n) {
      *number = at;
      found = n;
    }
    at += n ? n : 1;
  }
  return found;
}

/* What the harness compares: lower case, without commas, dollars, what comes before "#### " and a full stop at the end. */
static sfa_status normalize(sfa_context *ctx, const char *text, size_t n, sfa_bytes *out) {
  out->len = 0;
  for (size_t i = 0; i < n; i++) {
    char c = (char)tolower((unsigned char)text[i]);
    if (c != ',' && c != '$')
      SFA_TRY(sfa_bytes_append(ctx, out, &c, 1));
    if (out->len >= 5 && memcmp(out->data + out->len - 5, "#### ", 5) == 0)
      out->len = 0;
  }
  if (out->len && out->data[out->len - 1] == '.')
    out->len--;
  return SFA_OK;
}

sfa_status sfa_eval_judge_number(sfa_context *ctx, const char *answer, const eval_item *item, double *metrics) {
  const char *wanted = sfa_eval_item_text(item, item->answers[0] + 1), *number = "";
  sfa_bytes want = {0}, seen = {0};
  sfa_status status = normalize(ctx, wanted, strlen(wanted), &want);
  for (int way = 0; way < 2 && status == SFA_OK; way++) {
    size_t n = way ? find_flexible(answer, &number) : find_strict(answer, &number);
    status = normalize(ctx, number, n, &seen);
    metrics[way] = n && seen.len == want.len && (seen.len == 0 || memcmp(seen.data, want.data, seen.len) == 0);
  }
  sfa_free(ctx, want.data);
  sfa_free(ctx, seen.data);
  return status;
}

/* ---- Retrieval: the value is somewhere in the answer ------------------------------------------------------------------------------- */

sfa_status sfa_eval_judge_contains(sfa_context *ctx, const char *answer, const eval_item *item, double *metrics) {
  (void)ctx;
  metrics[0] = strcasestr(answer, sfa_eval_item_text(item, item->answers[0] + 1)) != NULL;
  return SFA_OK;
}

/* ---- Summaries: ROUGE of words ----------------------------------------------------------------------------------------------------- */

/* Words are runs of a-z0-9 of the lower-cased text, unstemmed. */
typedef struct words {
  struct word {
    const char *text;
    size_t n;
  } * list;
  size_t n, capacity;
} words;

static sfa_status split_words(sfa_context *ctx, const char *text, words *out) {
  out->n = 0;
  while (*text) {
    size_t n = 0;
    while ((unsigned char)text[n] < 0x80 && isalnum((unsigned char)text[n]))
      n++;
    if (n) {
      SFA_TRY(sfa_array_reserve(ctx, (void **)&out->list, &out->capacity, out->n + 1, sizeof *out->list));
      out->list[out->n++] = (struct word){text, n};
    }
    text += n ? n : 1;
  }
  return SFA_OK;
}

static bool same(struct word a, struct word b) { return a.n == b.n && strncasecmp(a.text, b.text, a.n) == 0; }

static double f1(size_t n_shared, size_t n_a, size_t n_b) { return n_shared ? 2.0 * (double)n_shared / (double)(n_a + n_b) : 0; }

/* F1 of the n-grams that both have, each counted as often as in the text with fewer of it: n = 1 or 2. used: [b->n]. */
static double rouge_n(const words *a, const words *b, size_t n, uint8_t *used) {
  if (a->n < n || b->n < n)
    return 0;
  size_t n_a = a->n - n + 1, n_b = b->n - n + 1, n_shared = 0;
  memset(used, 0, n_b);
  for (size_t i = 0; i < n_a; i++)
    for (size_t j = 0; j < n_b; j++)
      if (!used[j] && same(a->list[i], b->list[j]) && same(a->list[i + n - 1], b->list[j + n - 1])) {
        used[j] = 1;
        n_shared++;
        break;
      }
  return f1(n_shared, n_a, n_b);
}

/* F1 of the longest common subsequence. row: [b->n + 1]. */
static double rouge_l(const words *a, const words *b, uint32_t *row) {
  memset(row, 0, (b->n + 1) * sizeof *row);
  for (size_t i = 0; i < a->n; i++) {
    uint32_t diagonal = 0;
    for (size_t j = 0; j < b->n; j++) {
      uint32_t above = row[j + 1];
      row[j + 1] = same(a->list[i], b->list[j]) ? diagonal + 1 : above > row[j] ? above : row[j];
      diagonal = above;
    }
  }
  return f1(row[b->n], a->n, b->n);
}

/* Each metric is the best over the references. */
sfa_status sfa_eval_judge_rouge(sfa_context *ctx, const char *answer, const eval_item *item, double *metrics) {
  words a = {0}, b = {0};
  sfa_status status = split_words(ctx, answer, &a);
  for (int32_t i = 0; i < item->n_answers && status == SFA_OK; i++) {
    uint32_t *row = NULL;
    status = split_words(ctx, sfa_eval_item_text(item, item->answers[i]), &b);
    if (status == SFA_OK)
      status = sfa_alloc_zero(ctx, b.n + 1, sizeof *row, "a row of words", (void **)&row);
    if (status != SFA_OK)
      break;
    double scores[] = {rouge_n(&a, &b, 1, (uint8_t *)row), rouge_n(&a, &b, 2, (uint8_t *)row), rouge_l(&a, &b, row)};
    for (int m = 0; m < 3; m++)
      metrics[m] = scores[m] > metrics[m] ? scores[m] : metrics[m];
    sfa_free(ctx, row);
  }
  sfa_free(ctx, a.list);
  sfa_free(ctx, b.list);
  return status;
}
