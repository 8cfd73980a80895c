/* sfa/eval.h: how good a model is: the tasks of the field, item by item as lm-evaluation-harness (0.4) scores them; perplexity; and two
 * settings of attention side by side. docs/EVALUATION.md has the forms of the data files and each task's definition. Link libsfa_engine.
 */
#ifndef SFA_EVAL_H
#define SFA_EVAL_H

#include <sfa/engine.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Tasks --------------------------------------------------------------------------------------------------------------------- */

enum { SFA_EVAL_MAX_CHOICES = 16, SFA_EVAL_MAX_METRICS = 4 };

/* A task over a data file: its items, for one model's tokenizer. Immutable; may be used by several sessions of that model in turn. */
typedef struct sfa_eval sfa_eval;

typedef struct sfa_eval_options {
  size_t struct_size;     /* sizeof(sfa_eval_options) */
  int64_t limit;          /* the first items only; 0: all */
  const char *shots_path; /* file of the same form that worked examples are drawn from; NULL: none, but the task's own number is 0 */
  int32_t n_shots;    /* before each item, as the harness draws them with its seed 1234; 0: the task's (gsm8k 5, others none), -1: none */
  int32_t n_generate; /* most new tokens of generated answers; 0: the task's */
  const int64_t *lengths; /* [n_lengths] niah: tokens of a prompt; NULL: 512, 1024, ... up to the model's context */
  int32_t n_lengths;
  int32_t n_depths; /* niah: places of the needle, evenly from 0 to 1; 0: 5 */
  int32_t n_trials; /* niah: needles at each place; 0: 2 */
  uint64_t seed;    /* niah: of needles and places in the text; 0: 1 */
} sfa_eval_options;

/* task: "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa", "lambada", "gsm8k", "pubmedqa", "scitldr", "kv",
 * "listops" or "niah". Reads the whole file (a path, or a pipe such as /dev/stdin) and checks every row: SFA_ERROR_FORMAT names file, line
 * and what is expected. The model must have a tokenizer and outlive the eval. options may be NULL. */
SFA_API sfa_status sfa_eval_open(const sfa_model *model, const char *task, const char *path, const sfa_eval_options *options,
                                 sfa_eval **eval);
SFA_API void sfa_eval_close(sfa_eval *eval);

typedef struct sfa_eval_info {
  const char *task;
  int64_t n_items;
  int32_t n_metrics, n_shots;
  const char *metrics[SFA_EVAL_MAX_METRICS]; /* names: "acc", "acc_norm", ... */
  int32_t has_depth;                         /* items have a depth: niah, kv */
} sfa_eval_info;

SFA_API void sfa_eval_describe(const sfa_eval *eval, sfa_eval_info *info);

typedef struct sfa_eval_result {
  double metrics[SFA_EVAL_MAX_METRICS];    /* of this item; of a perplexity the log-likelihood */
  int32_t n_choices, gold;                 /* n_choices: continuations that were scored; 0 for generated answers */
  double loglik[SFA_EVAL_MAX_CHOICES];     /* [n_choices] sum of log-probabilities, in nats */
  int32_t is_greedy[SFA_EVAL_MAX_CHOICES]; /* [n_choices] 1: greedy decoding would write it */
  int64_t n_tokens;                        /* of the longest prompt with its continuation */
  double depth;                            /* of what is asked for: 0 at the prompt's start, 1 at its end */
  char *text;                              /* generated answer, valid UTF-8; NULL for others. Free it with sfa_free_text */
} sfa_eval_result;

/* Scores item 0 .. n_items - 1. What the session's timeline shares with a prompt is kept, the rest of the timeline is replaced:
 * continuations of one context, items with the same examples, are not read twice. Prompts longer than the session's context lose their
 * first tokens, as in the harness. SFA_ERROR_CANCELLED: the session's progress function stopped it. */
SFA_API sfa_status sfa_eval_item(const sfa_eval *eval, sfa_session *session, int64_t item, sfa_eval_result *result);

typedef struct sfa_eval_score {
  double value, stderr_of_mean; /* mean over items, or exp(-mean) of a perplexity; NaN where it cannot be told */
} sfa_eval_score;

/* scores: [n_metrics] over n_results items. */
SFA_API void sfa_eval_summarise(const sfa_eval *eval, const sfa_eval_result *results, int64_t n_results, sfa_eval_score *scores);

/* ---- Perplexity ---------------------------------------------------------------------------------------------------------------- */

typedef struct sfa_perplexity {
  double nll, stderr_of_mean; /* mean over scored tokens, nats */
  int64_t n_scored, n_windows;
} sfa_perplexity;

/* Strided windows, as Hugging Face's guide has them: windows of `window` tokens start every `stride` tokens; each scores the tokens that no
 * earlier one scored, its own first token never. stride = window: windows do not overlap. position_nll, position_n: [window], added to:
 * loss and number of the predictions made from each place of a window, scored or not; or NULL. Progress and cancelling: the session's. */
SFA_API sfa_status sfa_eval_perplexity(sfa_session *session, const int32_t *tokens, int64_t n_tokens, int64_t window, int64_t stride,
                                       sfa_perplexity *result, double *position_nll, int64_t *position_n);

/* ---- Report card --------------------------------------------------------------------------------------------------------------- */

typedef struct sfa_report_card {
  int64_t n_tokens;
  double nll_reference, nll_candidate; /* nats a token */
  double kl;                           /* mean of KL(reference || candidate), nats */
  double top1_agreement;               /* share of places whose likeliest token is the same */
  int64_t kv_bytes_reference, kv_bytes_candidate;
} sfa_report_card;

/* Reads a text into two empty sessions over the same vocabulary, side by side: what a candidate (another attention, another model of that
 * vocabulary) costs against a reference. n_tokens >= 2. */
SFA_API sfa_status sfa_eval_report_card(sfa_session *reference, sfa_session *candidate, const int32_t *tokens, int64_t n_tokens,
                                        sfa_report_card *card);

/* Tokens a second: of reading a text, and of single steps behind it. */
typedef struct sfa_speed {
  double prefill, decode;
} sfa_speed;

/* Times two sessions in turns: each of n_rounds (0: 5) reads the text but for its last n_steps (0: 32) tokens, and then those one by one,
 * in one session and then in the other. speeds: medians over the rounds, after one that is not counted. Both timelines are emptied.
 * n_tokens must be above n_steps and fit both contexts. */
SFA_API sfa_status sfa_eval_speeds(sfa_session *reference, sfa_session *candidate, const int32_t *tokens, int64_t n_tokens, int32_t n_steps,
                                   int32_t n_rounds, sfa_speed speeds[2]);

/* ---- ListOps ------------------------------------------------------------------------------------------------------------------- */

/* Writes a line "expression<tab>value<newline>" of Long Range Arena's ListOps into text [capacity] and returns its bytes: nested MIN, MAX,
 * MED, SM (sum modulo 10) over digits, up to max_depth (1 to 100) deep, 2 to max_args (2 to 64) arguments, more than min_len (1 or more)
 * and fewer than max_len symbols: digits, operators and ends. The same state gives the same line; *state moves on. 0: capacity or the
 * bounds are too small to find one. */
SFA_API size_t sfa_listops_line(uint64_t *state, int32_t max_depth, int32_t max_args, int32_t min_len, int32_t max_len, char *text,
                                size_t capacity);

#ifdef __cplusplus
}
#endif
#endif
