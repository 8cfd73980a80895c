/* A needle in a haystack: one sentence with a number, put into a long text, and asked for at its end. The grid has lengths x trials x
 * depths; the depths of a trial share their text, so that an item keeps what lies before the needle of the last one. */
#include "eval/eval_open.h"

#include <stdio.h>
#include <string.h>

#include "base/rng.h"

enum { DEFAULT_DEPTHS = 5, DEFAULT_TRIALS = 2, SHORTEST = 128, FIRST_LENGTH = 512 };

static const char *const cities[] = {"Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Quito", "Riga"};

sfa_status sfa_eval_haystack_open(sfa_eval *eval, const char *path, const sfa_eval_options *o) {
  struct eval_haystack *h = &eval->haystack;
  enum { MOST = sizeof h->lengths / sizeof *h->lengths };
  sfa_model_info info;
  sfa_model_describe(eval->model, &info);
  h->n_depths = o->n_depths ? o->n_depths : DEFAULT_DEPTHS;
  h->n_trials = o->n_trials ? o->n_trials : DEFAULT_TRIALS;
  h->seed = o->seed ? o->seed : 1;
  SFA_REQUIRE(eval->ctx, o->n_lengths <= MOST && (o->lengths || !o->n_lengths), "%d lengths: at most %d are taken", o->n_lengths, MOST);
  for (int64_t n = FIRST_LENGTH; !o->n_lengths && n <= info.context_len && h->n_lengths < MOST; n *= 2)
    h->lengths[h->n_lengths++] = n;
  if (!o->n_lengths && !h->n_lengths)
    h->lengths[h->n_lengths++] = info.context_len;
  for (int32_t i = 0; i < o->n_lengths; i++)
    h->lengths[h->n_lengths++] = o->lengths[i];
  int64_t longest = 0;
  for (int32_t i = 0; i < h->n_lengths; i++) {
    if (h->lengths[i] < SHORTEST + eval->n_generate || h->lengths[i] > info.context_len)
      return sfa_fail(eval->ctx, SFA_ERROR_RANGE,
                      "a length of %lld tokens: it must be %d, for text, needle, question and answer, to %lld, the model's context",
                      (long long)h->lengths[i], SHORTEST + eval->n_generate, (long long)info.context_len);
    longest = sfa_max64(longest, h->lengths[i]);
  }
  sfa_bytes text = {0};
  sfa_status status = sfa_eval_file_read(eval->ctx, path, &text);
  if (status == SFA_OK)
    status = sfa_eval_encode(eval, (const char *)text.data, 0, &h->text);
  sfa_free(eval->ctx, text.data);
  SFA_TRY(status);
  if ((int64_t)h->text.len < longest)
    return sfa_fail(eval->ctx, SFA_ERROR_RANGE, "%s has %zu tokens, and the longest prompt %lld: give a longer text, or shorter lengths",
                    path, h->text.len, (long long)longest);
  int64_t n = (int64_t)h->n_lengths * h->n_depths * h->n_trials;
  eval->n_items = o->limit ? sfa_min64(n, o->limit) : n;
  return SFA_OK;
}

static sfa_status add_prompt(const sfa_eval *eval, int64_t length, double depth, sfa_rng *text_rng, sfa_rng *needle_rng, sfa_ids *needle,
                             eval_item *item) {
  const struct eval_haystack *h = &eval->haystack;
  const char *city = cities[sfa_rng_next(needle_rng) % (sizeof cities / sizeof *cities)];
  int number = 1000000 + (int)(sfa_rng_next(needle_rng) % 9000000);
  char answer[16];
  int n_answer = snprintf(answer, sizeof answer, " %d", number);
  SFA_TRY(sfa_bytes_append(eval->ctx, &item->text, answer, (size_t)n_answer + 1));
  item->n_answers = 1;
  item->depth = depth;

  char sentence[160];
  snprintf(sentence, sizeof sentence, "\nThe special magic number of %s is %d.\n", city, number);
  SFA_TRY(sfa_eval_encode(eval, sentence, 0, needle));
  size_t n_needle = needle->len;
  snprintf(sentence, sizeof sentence, "\n\nWhat is the special magic number of %s? The special magic number of %s is", city, city);
  SFA_TRY(sfa_eval_encode(eval, sentence, 0, needle));
  SFA_TRY(sfa_eval_encode(eval, "", SFA_TOKENIZE_SPECIAL, &item->ids));
  int64_t n_hay = length - eval->n_generate - (int64_t)(item->ids.len + needle->len);
  if (n_hay < 0)
    return sfa_fail(eval->ctx, SFA_ERROR_RANGE,
                    "needle and question alone have %zu tokens, more than the length %lld leaves: ask for longer prompts", needle->len,
                    (long long)length);
  int64_t before = (int64_t)(depth * (double)n_hay + 0.5), start = (int64_t)(sfa_rng_next(text_rng) % (h->text.len - (size_t)length + 1));
  SFA_TRY(sfa_ids_append(eval->ctx, &item->ids, h->text.data + start, (size_t)before));
  SFA_TRY(sfa_ids_append(eval->ctx, &item->ids, needle->data, n_needle));
  SFA_TRY(sfa_ids_append(eval->ctx, &item->ids, h->text.data + start + before, (size_t)(n_hay - before)));
  return sfa_ids_append(eval->ctx, &item->ids, needle->data + n_needle, needle->len - n_needle);
}

sfa_status sfa_eval_haystack_make(const sfa_eval *eval, int64_t index, eval_item *item) {
  const struct eval_haystack *h = &eval->haystack;
  int64_t text = index / h->n_depths, place = index % h->n_depths;
  sfa_rng text_rng = {h->seed + (uint64_t)text * 2}, needle_rng = {h->seed * 0x10001u + (uint64_t)index * 2 + 1};
  sfa_ids needle = {0};
  sfa_eval_item_clear(item);
  double depth = h->n_depths > 1 ? (double)place / (h->n_depths - 1) : 0.5;
  sfa_status status = add_prompt(eval, h->lengths[text / h->n_trials], depth, &text_rng, &needle_rng, &needle, item);
  sfa_free(eval->ctx, needle.data);
  return status;
}
