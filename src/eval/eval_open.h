/* eval/eval_open.h: an open task, shared by the files of this folder. */
#ifndef SFA_EVAL_OPEN_H
#define SFA_EVAL_OPEN_H

#include "eval/eval_task.h"

struct sfa_eval {
  sfa_context *ctx;
  const sfa_model *model;
  const sfa_tokenizer *tokenizer;
  const eval_task *task;
  int64_t n_items;
  int32_t n_generate, n_shots;
  eval_rows rows, shot_rows;
  size_t first_row; /* of the items: behind a line of headings */
  int32_t *shots;   /* [n_items][n_shots] rows of shot_rows */
  struct eval_haystack {
    int64_t lengths[32];
    int32_t n_lengths, n_depths, n_trials;
    uint64_t seed;
    sfa_ids text; /* the whole book */
  } haystack;
};

/* Item `index`, made of its row or its place in the grid. */
sfa_status sfa_eval_item_make(const sfa_eval *eval, int64_t index, eval_item *item);
/* The worked examples before item `index`, appended to text. */
sfa_status sfa_eval_shots_text(const sfa_eval *eval, int64_t index, sfa_bytes *text);
/* niah: reads the text and lays out the grid; the item at a place of it. */
sfa_status sfa_eval_haystack_open(sfa_eval *eval, const char *path, const sfa_eval_options *options);
sfa_status sfa_eval_haystack_make(const sfa_eval *eval, int64_t index, eval_item *item);

/* Appends the tokens of a text. */
sfa_status sfa_eval_encode(const sfa_eval *eval, const char *text, uint32_t flags, sfa_ids *ids);

#endif
