/* app.h: what the verbs share: messages, output, and the way from options to a model, a text and a session. */
#ifndef SFA_APP_H
#define SFA_APP_H

#include "args.h"

#include <cjson/cJSON.h>
#include <sfa/engine.h>
#include <sfa/plan.h>
#include <stddef.h>

enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_INTERRUPTED = 130 };

/* ---- output.c: one line on stderr for what went wrong, stdout that is checked, UTF-8 that is whole ---------------------------- */

/* "sfa: ..." on stderr; both return their exit status. */
int app_usage(const char *format, ...) __attribute__((format(printf, 1, 2)));
int app_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* "sfa: ..." on stderr about something that is not in the way. */
void app_note(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The text of the context's last failure. */
int app_fail_status(const sfa_context *ctx);
/* Flushes stdout; EXIT_FAILED with a message if something could not be written. */
int app_flush(void);
/* Prints and frees a document. NULL: out of memory. */
int app_print_json(cJSON *document);
/* The same into a file, indented. */
int app_save_json(const char *path, cJSON *document);
/* Makes a folder; one that exists is fine. */
int app_make_folder(const char *path);
enum { APP_PATH_BYTES = 4096 };
/* FOLDER/NAME. */
int app_path(const char *folder, const char *name, char path[APP_PATH_BYTES]);

/* Bytes in, whole UTF-8 characters out: an unfinished character waits for its rest, what cannot be one becomes U+FFFD. */
typedef struct utf8_stream {
  char pending[4];
  int n_pending;
} utf8_stream;
/* Writes at most 3 * n + 3 bytes to out; returns how many. n = 0 with final ends the text. */
size_t utf8_push(utf8_stream *stream, const char *bytes, size_t n, bool final, char *out);

/* A growing text, always NUL-terminated once something was added. */
typedef struct text_buffer {
  char *bytes;
  size_t n, capacity;
} text_buffer;
bool text_append(text_buffer *text, const char *bytes, size_t n);
bool list_append(int_list *list, int64_t value);

/* 1234567 -> "1.2 MB". */
const char *human_bytes(double bytes, char out[32]);
double seconds_now(void);

/* ---- interrupt.c: Ctrl-C and the progress line -------------------------------------------------------------------------------- */

/* From here on Ctrl-C sets a flag instead of ending the process; a second one ends it. */
void interrupt_begin(void);
bool interrupted(void);
void interrupt_clear(void);

/* Progress of a long prefill on stderr, if that is a terminal. Work of several calls: `before` tokens came in earlier ones, `total` (0: the
 * call's own) in all. */
typedef struct progress {
  const char *what, *unit; /* unit: of what is counted; NULL: tokens */
  double start;
  int64_t before, total;
  bool shown;
} progress;
/* sfa_progress_fn with a progress as its user; also stops the work on Ctrl-C. */
int progress_step(void *user, int64_t done, int64_t total);
void progress_clear(progress *p);

/* ---- setup.c: from options to things ------------------------------------------------------------------------------------------ */

/* What most verbs work on; closed by app_close, whatever was opened. */
typedef struct app {
  const app_options *o;
  sfa_context *ctx;
  sfa_model *model;
  const sfa_tokenizer *tokenizer;
  sfa_tokenizer *own_tokenizer; /* of app_open_tokenizer */
  sfa_model_info info;
  sfa_attention_choice choice;
  sfa_costs costs; /* of choice.costs */
  int32_t *layer_list;
  sfa_session *session;
  int64_t context_len; /* of the session */
  uint64_t seed;       /* of the sampler */
  progress progress;
} app;

/* Sets the device that --device names. */
int app_device(const app_options *o, sfa_context_options *context);
int app_open_context(app *a, const app_options *o, int64_t n_threads, sfa_isa isa);
/* Context, model, attention choice. wants_text: a model without a tokenizer is an error. */
int app_open_model(app *a, const app_options *o, bool wants_text);
/* Context and tokenizer alone. */
int app_open_tokenizer(app *a, const app_options *o);
int app_open_session(app *a, const sfa_attention_choice *choice, int64_t context_len);
/* The same from an index, with the options' own choice. */
int app_load_session(app *a, const char *index, int64_t context_len);
void app_close(app *a);
/* Tokens of context that the options ask for, checked against the model. */
int app_context_len(const app *a, int64_t *context_len);
/* The text of -p or -f (of all files of a folder, see document.h), in memory that the caller frees. */
int app_read_text(const app_options *o, char **text, size_t *n_bytes);
/* That text as tokens, with the special ones of a text. Free ids with sfa_free_ids; n_bytes may be NULL. */
int app_read_ids(const app *a, int32_t **ids, int64_t *n_ids, size_t *n_bytes);
int app_tokenize(const app *a, const char *text, size_t n_bytes, uint32_t flags, int32_t **ids, int64_t *n_ids);
/* "dense" or "SFA k=16 (queries 16), 20 of 30 layers"; written for people. */
const char *app_attention_name(const app *a, char *out, size_t capacity);
/* "wants -m" and the like. */
int app_require_model(const app_options *o, const char *verb);

/* ---- costs.c: the costs that were measured on this machine -------------------------------------------------------------------- */

/* Where those of an instruction set are kept. False where the environment names no place. */
bool costs_path(sfa_isa isa, char *out, size_t capacity);
/* Those kept, in *costs; NULL where there are none, or none that can be believed (said on stderr). */
const sfa_costs *costs_kept(sfa_isa isa, sfa_costs *costs);
/* Keeps them; path [capacity]: where. */
int costs_keep(const sfa_costs *costs, char *path, size_t capacity);

/* ---- answer.c: tokens drawn one after another ---------------------------------------------------------------------------------- */

typedef enum stop_reason { STOP_END, STOP_LENGTH, STOP_CONTEXT, STOP_INTERRUPTED } stop_reason;
const char *stop_name(stop_reason reason);

typedef struct app_answer {
  int_list ids;     /* without a token that ended it */
  text_buffer text; /* valid UTF-8 */
  stop_reason stop;
  int32_t pending; /* the last token drawn: known to the sampler, not in the session */
} app_answer;

/* Draws tokens from logits [vocab_size] (of the session's last token, `previous`) until the model ends, n_most are drawn, the context is
 * full or Ctrl-C. print: show the text as it comes. */
int answer_generate(app *a, sfa_sampler *sampler, float *logits, int32_t previous, int64_t n_most, bool print, app_answer *out);
void answer_free(app_answer *answer);
int sampler_open(app *a, sfa_sampler **sampler);
/* What the session did, as JSON members or as one line on stderr. */
cJSON *stats_json(const app *a);
void stats_print(const app *a);

/* ---- The verbs ------------------------------------------------------------------------------------------------------------------ */

int cmd_generate(const app_options *o);
int cmd_chat(const app_options *o);
int cmd_info(const app_options *o);
int cmd_index(const app_options *o);
int cmd_tokenize(const app_options *o);
int cmd_data(const app_options *o);
int cmd_data_listops(const app_options *o);
int cmd_data_kv(const app_options *o);
int cmd_tokenizer_train(const app_options *o);
int cmd_bench_attention(const app_options *o);
int cmd_bench_backward(const app_options *o);
int cmd_bench_decode(const app_options *o);
int cmd_bench_topk(const app_options *o);
int cmd_bench_model(const app_options *o);
int cmd_plan(const app_options *o);
int cmd_eval_nll(const app_options *o);
int cmd_eval_ppl(const app_options *o);
int cmd_eval_task(const app_options *o);
int cmd_demo(const app_options *o);
int cmd_explain(const app_options *o);
int cmd_inspect(const app_options *o);
int cmd_train(const app_options *o);
/* Trains as the options say; the recipe is base, the files of --config, over, --set, each laid over those before it (NULL: none).
 * tell_result: with --json the result goes to stdout. */
int app_train(const app_options *o, const char *base, const char *over, bool tell_result);
int cmd_finetune(const app_options *o);
int cmd_export(const app_options *o);

#endif
