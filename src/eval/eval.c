/* Opening a task, its items, and the sums over their results. */
#include "eval/eval_open.h"

#include <math.h>
#include <string.h>

#include "eval/eval_shots.h"
#include "model/model.h"

/* ---- Items ----------------------------------------------------------------------------------------------------------------------- */

static sfa_status make_row(const sfa_eval *eval, const eval_rows *rows, size_t index, eval_item *item) {
  eval_row row;
  sfa_eval_item_clear(item);
  SFA_TRY(sfa_eval_row_open(eval->ctx, rows, index, eval->task->row_form, eval->task->is_json, &row));
  sfa_status status = eval->task->make(&row, item);
  sfa_eval_row_close(&row);
  return status;
}

sfa_status sfa_eval_item_make(const sfa_eval *eval, int64_t index, eval_item *item) {
  return eval->task->make ? make_row(eval, &eval->rows, eval->first_row + (size_t)index, item) : sfa_eval_haystack_make(eval, index, item);
}

static sfa_status add_shot(const sfa_eval *eval, const eval_item *shot, sfa_bytes *text) {
  const char *context = sfa_eval_item_text(shot, shot->contexts[shot->has_contexts ? shot->gold : 0]);
  const char *answer = sfa_eval_item_text(shot, shot->answers[shot->gold]);
  SFA_TRY(sfa_bytes_append(eval->ctx, text, context, strlen(context)));
  SFA_TRY(sfa_bytes_append(eval->ctx, text, " ", eval->task->way == EVAL_LIKELIHOOD)); /* before the target's own, as in the harness */
  SFA_TRY(sfa_bytes_append(eval->ctx, text, answer, strlen(answer)));
  return sfa_bytes_append(eval->ctx, text, "\n\n", 2);
}

sfa_status sfa_eval_shots_text(const sfa_eval *eval, int64_t index, sfa_bytes *text) {
  eval_item shot = {0};
  sfa_status status = SFA_OK;
  for (int32_t i = 0; i < eval->n_shots && status == SFA_OK; i++) {
    status = make_row(eval, &eval->shot_rows, (size_t)eval->shots[index * eval->n_shots + i], &shot);
    if (status == SFA_OK)
      status = add_shot(eval, &shot, text);
  }
  sfa_eval_item_free(eval->ctx, &shot);
  return status;
}

sfa_status sfa_eval_encode(const sfa_eval *eval, const char *text, uint32_t flags, sfa_ids *ids) {
  int32_t *made;
  size_t n;
  SFA_TRY(sfa_tokenizer_encode(eval->tokenizer, text, strlen(text), flags, &made, &n));
  sfa_status status = sfa_ids_append(eval->ctx, ids, made, n);
  sfa_free_ids(eval->ctx, made);
  return status;
}

/* ---- Opening --------------------------------------------------------------------------------------------------------------------- */

/* Every row is made once, so that a bad one is told before any work. */
static sfa_status check_rows(const sfa_eval *eval, const eval_rows *rows, size_t first, size_t n) {
  eval_item item = {0};
  sfa_status status = SFA_OK;
  for (size_t i = 0; i < n && status == SFA_OK; i++)
    status = make_row(eval, rows, first + i, &item);
  sfa_eval_item_free(eval->ctx, &item);
  return status;
}

static sfa_status open_rows(sfa_eval *eval, const char *path, const sfa_eval_options *o) {
  SFA_TRY(sfa_eval_rows_read(eval->ctx, path, &eval->rows));
  eval->first_row = !eval->task->is_json && strcmp((const char *)eval->rows.text.data, "Source\tTarget") == 0;
  eval->n_items = (int64_t)(eval->rows.n_lines - eval->first_row);
  if (o->limit > 0)
    eval->n_items = sfa_min64(eval->n_items, o->limit);
  if (!eval->n_items)
    return sfa_fail(eval->ctx, SFA_ERROR_FORMAT, "%s holds no rows but its headings", path);
  SFA_TRY(check_rows(eval, &eval->rows, eval->first_row, (size_t)eval->n_items));

  eval->n_shots = o->n_shots < 0 ? 0 : o->n_shots ? o->n_shots : eval->task->n_shots;
  if (!eval->n_shots)
    return SFA_OK;
  SFA_REQUIRE(eval->ctx, o->shots_path, "%s wants %d worked examples before each item: name a file of them, or ask for none",
              eval->task->name, eval->n_shots);
  SFA_TRY(sfa_eval_rows_read(eval->ctx, o->shots_path, &eval->shot_rows));
  SFA_TRY(check_rows(eval, &eval->shot_rows, 0, eval->shot_rows.n_lines));
  if (eval->shot_rows.n_lines < (size_t)eval->n_shots || eval->shot_rows.n_lines > INT32_MAX)
    return sfa_fail(eval->ctx, SFA_ERROR_RANGE, "%s has %zu rows, which cannot give %d different examples", o->shots_path,
                    eval->shot_rows.n_lines, eval->n_shots);
  return sfa_eval_shots_draw(eval->ctx, (int64_t)eval->shot_rows.n_lines, eval->n_shots, eval->n_items, &eval->shots);
}

static sfa_status open_task(sfa_eval *eval, const char *path, const sfa_eval_options *o) {
  SFA_REQUIRE(eval->ctx, eval->tokenizer, "the model has no tokenizer, and the items of %s are texts", eval->task->name);
  SFA_REQUIRE(eval->ctx, o->limit >= 0 && o->n_generate >= 0 && o->n_depths >= 0 && o->n_trials >= 0 && o->n_lengths >= 0,
              "the numbers of sfa_eval_options must not be negative");
  eval->n_generate = o->n_generate ? o->n_generate : eval->task->n_generate;
  return eval->task->make ? open_rows(eval, path, o) : sfa_eval_haystack_open(eval, path, o);
}

sfa_status sfa_eval_open(const sfa_model *model, const char *task, const char *path, const sfa_eval_options *options, sfa_eval **eval) {
  if (eval)
    *eval = NULL;
  if (!model)
    return SFA_ERROR_ARGUMENT;
  sfa_context *ctx = sfa_model_context(model);
  SFA_REQUIRE(ctx, eval && task && path, "sfa_eval_open wants a task, a path and a place for the result");
  sfa_eval_options zero = {.struct_size = sizeof zero};
  const sfa_eval_options *o = options ? options : &zero;
  SFA_REQUIRE(ctx, o->struct_size == sizeof *o, "sfa_eval_options is of another version: %zu bytes, not %zu", o->struct_size, sizeof *o);
  const eval_task *found = sfa_eval_task_find(task);
  SFA_REQUIRE(ctx, found, "no task is called \"%s\"; sfa/eval.h names them", task);
  sfa_eval *e;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *e, "a task", (void **)&e));
  *e = (sfa_eval){.ctx = ctx, .model = model, .tokenizer = sfa_model_tokenizer(model), .task = found};
  sfa_status status = open_task(e, path, o);
  if (status != SFA_OK) {
    sfa_eval_close(e);
    return status;
  }
  *eval = e;
  return SFA_OK;
}

void sfa_eval_close(sfa_eval *eval) {
  if (!eval)
    return;
  sfa_eval_rows_free(eval->ctx, &eval->rows);
  sfa_eval_rows_free(eval->ctx, &eval->shot_rows);
  sfa_free(eval->ctx, eval->shots);
  sfa_free(eval->ctx, eval->haystack.text.data);
  sfa_free(eval->ctx, eval);
}

void sfa_eval_describe(const sfa_eval *eval, sfa_eval_info *info) {
  const eval_task *task = eval->task;
  *info = (sfa_eval_info){.task = task->name,
                          .n_items = eval->n_items,
                          .n_metrics = sfa_eval_task_metrics(task),
                          .n_shots = eval->n_shots,
                          .has_depth = task->has_depth};
  memcpy(info->metrics, task->metrics, sizeof info->metrics);
}

/* ---- Sums ------------------------------------------------------------------------------------------------------------------------ */

/* The standard error is that of the mean with n - 1; that of a perplexity follows from it: d exp(-m) = exp(-m) dm. */
void sfa_eval_summarise(const sfa_eval *eval, const sfa_eval_result *results, int64_t n_results, sfa_eval_score *scores) {
  for (int32_t m = 0; m < sfa_eval_task_metrics(eval->task); m++) {
    double n = (double)n_results, mean = 0, squares = 0;
    for (int64_t i = 0; i < n_results; i++)
      mean += results[i].metrics[m] / n;
    for (int64_t i = 0; i < n_results; i++)
      squares += (results[i].metrics[m] - mean) * (results[i].metrics[m] - mean);
    scores[m] = (sfa_eval_score){mean, n > 1 ? sqrt(squares / (n - 1) / n) : NAN};
    if (strcmp(eval->task->metrics[m], "perplexity") == 0)
      scores[m] = (sfa_eval_score){exp(-mean), exp(-mean) * scores[m].stderr_of_mean};
    if (n_results == 0)
      scores[m].value = NAN;
  }
}
