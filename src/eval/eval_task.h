/* eval/eval_task.h: what a task is: a row of its file becomes an item (contexts and answers), and one of three ways scores an item.
 *
 *   file --rows--> eval_row --task->make--> eval_item --way--> sfa_eval_result
 */
#ifndef SFA_EVAL_TASK_H
#define SFA_EVAL_TASK_H

#include <sfa/eval.h>

#include "eval/eval_rows.h"

typedef enum eval_way {
  EVAL_CHOICES,    /* the likeliest of several continuations */
  EVAL_LIKELIHOOD, /* how likely the one continuation is, and whether greedy decoding would write it */
  EVAL_GENERATION  /* a greedy answer, judged against references */
} eval_way;

/* What is asked. Texts lie one behind another in `text`; contexts and answers are their places. */
typedef struct eval_item {
  sfa_bytes text;
  int32_t n_answers;                     /* continuations with the space before them, or references */
  size_t answers[SFA_EVAL_MAX_CHOICES];  /* EVAL_CHOICES: with the delimiter that the harness puts before them */
  size_t contexts[SFA_EVAL_MAX_CHOICES]; /* one for each answer if has_contexts, else [0] */
  int32_t n_chars[SFA_EVAL_MAX_CHOICES]; /* characters of each choice, for acc_norm */
  bool has_contexts;
  int32_t gold;
  sfa_ids ids; /* the context as tokens, where it is made of them (niah) */
  double depth;
} eval_item;

void sfa_eval_item_clear(eval_item *item);
void sfa_eval_item_free(sfa_context *ctx, eval_item *item);
static inline const char *sfa_eval_item_text(const eval_item *item, size_t place) { return (const char *)item->text.data + place; }

typedef struct eval_task {
  const char *name;
  eval_way way;
  sfa_status (*make)(const eval_row *row, eval_item *item); /* NULL: niah, whose items are made of a text */
  const char *row_form;                                     /* what error texts expect of a row */
  bool is_json;                                             /* rows are JSON objects, else lines of text */
  bool has_depth;
  const char *metrics[SFA_EVAL_MAX_METRICS]; /* those after the last are NULL */
  /* EVAL_GENERATION: */
  int32_t n_shots, n_generate;
  const char *stops[4]; /* the answer ends before the first of them */
  sfa_status (*judge)(sfa_context *ctx, const char *answer, const eval_item *item, double *metrics);
} eval_task;

/* NULL: no task of that name. */
const eval_task *sfa_eval_task_find(const char *name);
/* How many it has. */
int32_t sfa_eval_task_metrics(const eval_task *task);

/* Judges of answers (eval_answers.c), metrics as the task's names say. */
sfa_status sfa_eval_judge_number(sfa_context *ctx, const char *answer, const eval_item *item, double *metrics);
sfa_status sfa_eval_judge_contains(sfa_context *ctx, const char *answer, const eval_item *item, double *metrics);
sfa_status sfa_eval_judge_rouge(sfa_context *ctx, const char *answer, const eval_item *item, double *metrics);

#endif
