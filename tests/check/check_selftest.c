/* Bugs planted in a copy of a table: checks that do not notice them would prove nothing. */
#include "check.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

static const sfa_kernels *real; /* what the planted functions call */

static void last_key_dropped(int32_t n_rows, int32_t n_keys, int32_t W, const float *P, int32_t E, const float *V, int64_t v_stride,
                             float *O) {
  real->value_product(n_rows, n_keys - 1, W, P, E, V, v_stride, O);
}

static void mask_off_by_one(int32_t n_keys, int32_t W, const int32_t *lo, const int32_t *hi, int32_t n_always, float *S) {
  int32_t later[SFA_MAX_WIDTH];
  for (int32_t i = 0; i < W; i++)
    later[i] = hi[i] < INT32_MAX ? hi[i] + 1 : hi[i];
  real->score_mask(n_keys, W, lo, later, n_always, S);
}

static void no_rescale(int32_t n_rows, int32_t E, const float *alpha, float *O) {
  (void)n_rows;
  (void)E;
  (void)alpha;
  (void)O;
}

static void one_feature_lost(int32_t n_keys, int32_t K, const void *ids, int32_t id_bytes, const float *values, const float *key_scale,
                             const float *Qt, int32_t W, float *S) {
  float fewer[SFA_KEY_TILE * 512];
  memcpy(fewer, values, (size_t)n_keys * (size_t)K * sizeof *values);
  for (int32_t j = 0; j < n_keys; j++)
    fewer[j * K + K - 1] = 0.0f;
  real->score_codes(n_keys, K, ids, id_bytes, fewer, key_scale, Qt, W, S);
}

static int sum_not_carried(int32_t n_keys, int32_t W, float *S, float *m, float *l, float *alpha) {
  memset(l, 0, (size_t)W * sizeof *l);
  return real->softmax_tile(n_keys, W, S, m, l, alpha);
}

static void tie_to_the_higher(int64_t n_rows, const float *x, int64_t row_stride, int32_t D, int32_t K, void *ids, float *values) {
  real->topk(n_rows, x, row_stride, D, K, ids, values);
  if (n_rows > 0 && D <= 256 && K < D && ((uint8_t *)ids)[K - 1] < D - 1)
    ((uint8_t *)ids)[K - 1]++;
}

static void sign_lost(int64_t n_rows, const uint16_t *x, int64_t row_stride, int32_t D, int32_t K, uint8_t *ids, float *values) {
  real->topk_bf16(n_rows, x, row_stride, D, K, ids, values);
  for (int64_t i = 0; i < n_rows * K; i++)
    values[i] = fabsf(values[i]);
}

static void last_posting_lost(int64_t n_words, const uint64_t *words, int64_t n_values, const int8_t *values, int32_t q, int32_t *sums) {
  uint64_t fewer[64];
  memcpy(fewer, words, (size_t)n_words * sizeof *words);
  fewer[n_words - 1] &= ~(uint64_t)0 >> 1;
  real->expand_add(n_words, fewer, n_values, values, q, sums);
}

static void last_slot_lost(const sfa_stored_rows *keys, int32_t n_rows, int32_t D, const void *table, float query_scale, float *S) {
  sfa_stored_rows fewer = *keys;
  fewer.width -= keys->ids && keys->width > 1; /* dense rows have all D */
  real->score_keys(&fewer, n_rows, D, table, query_scale, S);
}

static void step_of_the_first_row(int32_t n_rows, int32_t n, int32_t n_terms, float *x, int64_t row_stride, float *step) {
  real->round_rows(n_rows, n, n_terms, x, row_stride, step);
  for (int32_t i = 1; i < n_rows; i++)
    step[i] = step[0];
}

static int keys_sum_not_carried(int32_t n_rows, int32_t n_keys, float *S, float *m, float *l, float *alpha) {
  memset(l, 0, (size_t)n_rows * sizeof *l);
  return real->softmax_keys(n_rows, n_keys, S, m, l, alpha);
}

static void last_value_skipped(const sfa_stored_rows *values, int32_t n_rows, const float *P, int32_t E, float *O) {
  sfa_stored_rows fewer = *values;
  fewer.n--;
  if (fewer.n)
    real->value_keys(&fewer, n_rows, P, E, O);
}

static void delta_forgotten(int32_t n_keys, int32_t W, const float *lse, const float *delta, const float *capped, float cap, float *S,
                            float *dP) {
  const float none[SFA_MAX_WIDTH] = {0};
  (void)delta;
  real->softmax_backward(n_keys, W, lse, none, capped, cap, S, dP);
}

static void last_query_dropped(int32_t n_keys, int32_t n_rows, int32_t W, const float *P, int32_t E, const float *X, int64_t x_stride,
                               float *O) {
  real->key_product(n_keys, n_rows - 1, W, P, E, X, x_stride, O);
}

static void one_slot_lost(int32_t n_keys, int32_t K, const void *ids, int32_t id_bytes, const float *dS, const float *Qt, int32_t W,
                          float *dK) {
  const float before = dK[n_keys * K - 1];
  real->key_codes_backward(n_keys, K, ids, id_bytes, dS, Qt, W, dK);
  dK[n_keys * K - 1] = before;
}

static void last_key_forgotten(int32_t n_keys, int32_t K, const void *ids, int32_t id_bytes, const float *values, const float *dS,
                               int32_t W, float *dQt) {
  real->query_codes_backward(n_keys - 1, K, ids, id_bytes, values, dS, W, dQt);
}

static const struct bug {
  const char *name;
  const check_entry *entries;
  const char *subject; /* the entry that must notice */
  sfa_kernels slots;   /* only the planted ones are set */
} bugs[] = {
    {"last key dropped", check_values_entries, "value_product", {.value_product = last_key_dropped}},
    {"last key dropped", check_forward_entries, "forward", {.value_product = last_key_dropped}},
    {"last key dropped", check_forward_entries, "needle", {.value_product = last_key_dropped}},
    {"mask off by one", check_scores_entries, "score_mask", {.score_mask = mask_off_by_one}},
    {"mask off by one", check_forward_entries, "forward", {.score_mask = mask_off_by_one}},
    {"mask off by one", check_forward_entries, "needle", {.score_mask = mask_off_by_one}},
    {"no rescale", check_values_entries, "rescale", {.rescale = no_rescale}},
    {"no rescale", check_forward_entries, "forward", {.rescale = no_rescale}},
    {"one feature lost", check_scores_entries, "score_codes", {.score_codes = one_feature_lost}},
    {"one feature lost", check_forward_entries, "forward", {.score_codes = one_feature_lost}},
    {"last posting lost", check_postings_entries, "expand_add", {.expand_add = last_posting_lost}},
    {"sum not carried over", check_values_entries, "softmax_tile", {.softmax_tile = sum_not_carried}},
    {"sum not carried over", check_forward_entries, "forward", {.softmax_tile = sum_not_carried}},
    {"last slot lost", check_keys_entries, "score_keys", {.score_keys = last_slot_lost}},
    {"step of the first row", check_keys_entries, "round_rows", {.round_rows = step_of_the_first_row}},
    {"sum not carried over", check_keys_entries, "softmax_keys", {.softmax_keys = keys_sum_not_carried}},
    {"last value skipped", check_keys_entries, "value_keys", {.value_keys = last_value_skipped}},
    {"delta forgotten", check_backward_entries, "softmax_backward", {.softmax_backward = delta_forgotten}},
    {"delta forgotten", check_backward_entries, "backward", {.softmax_backward = delta_forgotten}},
    {"mask off by one", check_backward_entries, "backward", {.score_mask = mask_off_by_one}},
    {"last query dropped", check_backward_entries, "key_product", {.key_product = last_query_dropped}},
    {"last query dropped", check_backward_entries, "backward", {.key_product = last_query_dropped}},
    {"one slot lost", check_backward_entries, "codes_backward", {.key_codes_backward = one_slot_lost}},
    {"one slot lost", check_backward_entries, "backward", {.key_codes_backward = one_slot_lost}},
    {"last key forgotten", check_backward_entries, "codes_backward", {.query_codes_backward = last_key_forgotten}},
    {"last key forgotten", check_backward_entries, "backward", {.query_codes_backward = last_key_forgotten}},
    {"tie to the higher feature", check_codes_entries, "topk", {.topk = tie_to_the_higher}},
    {"sign lost", check_codes_entries, "topk_bf16", {.topk_bf16 = sign_lost}},
};

void check_selftest(check *c) {
  real = c->kernels;
  for (volatile size_t b = 0; b < sizeof bugs / sizeof *bugs; b++) {
    sfa_kernels planted = *real;
    const sfa_kernels *slots = &bugs[b].slots;
#define SFA_SLOT(name)                                                                                                                     \
  if (slots->name)                                                                                                                         \
    planted.name = slots->name;
#include "kernel/kernel_list.def"
    jmp_buf noticed;
    check inner = {
        .kernels = &planted, .plain = c->plain, .rng = c->rng, .seed = c->seed, .quick = true, .quiet = true, .escape = &noticed};
    check_begin(c, "selftest", "%s, seen by %s", bugs[b].name, bugs[b].subject);
    if (!setjmp(noticed)) {
      for (const check_entry *entry = bugs[b].entries; entry->fn; entry++)
        if (!strcmp(entry->name, bugs[b].subject))
          entry->fn(&inner);
      check_fail(c, "not noticed in %lld cases", (long long)inner.n_passed);
    }
    check_end(c);
  }
}
