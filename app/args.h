/* args.h: the command line as one table. A row says how an option is called, what it takes, where it goes and which verbs know it; help
 * texts and error messages come from the same row. */
#ifndef SFA_APP_ARGS_H
#define SFA_APP_ARGS_H

#include <stdbool.h>
#include <stdint.h>

enum { VERB_GENERATE = 1, VERB_CHAT = 2, VERB_INFO = 4, VERB_TOKENIZE = 8, VERB_BENCH_ATTENTION = 16, VERB_EVAL = 32, VERB_DEMO = 64 };
enum { VERB_DATA = 1 << 7, VERB_TOKENIZER_TRAIN = 1 << 8, VERB_DATA_LISTOPS = 1 << 9, VERB_DATA_KV = 1 << 10 };
enum { VERB_BENCH_DECODE = 1 << 12, VERB_BENCH_TOPK = 1 << 13, VERB_BENCH_MODEL = 1 << 14, VERB_BENCH_BACKWARD = 1 << 19 };
enum { VERB_PLAN = 1 << 15, VERB_EXPLAIN = 1 << 16, VERB_INSPECT = 1 << 17, VERB_INDEX = 1 << 18 };
enum { VERB_TRAIN = 1 << 21, VERB_EXPORT = 1 << 22, VERB_FINETUNE = 1 << 23 };
enum { VERB_EVAL_TASK = 1 << 24, VERB_EVAL_NIAH = 1 << 25, VERB_EVAL_PPL = 1 << 26 };

/* Numbers of "1,2,5-7", or one of the words that the option takes instead of them. */
typedef struct int_list {
  int64_t *values;
  int64_t n;
  int word; /* index of the word; -1: numbers */
} int_list;

/* Texts of an option that may be given several times. */
typedef struct text_list {
  const char **values;
  int64_t n;
} text_list;

/* What the options set; options_default is where they start. A number below its option's range means "not given". */
typedef struct app_options {
  const char *second; /* second word of the verb */
  /* Model and text. */
  const char *model, *tokenizer, *prompt, *file, *system, *out, *index;
  int weights; /* sfa_weight_format */
  bool verify;
  bool raw, no_special, json, tensors, devices, help, child;
  int_list tokens;
  /* Amounts. */
  int64_t n_predict, context, threads, chunk, stride, repeats;
  int isa;            /* sfa_isa */
  const char *device; /* "cpu" or "cuda[:N]"; NULL: cpu */
  /* Sampler. */
  double temp, top_p, min_p, repeat_penalty;
  int64_t top_k, seed;
  /* Attention. */
  int attention; /* 0 dense, 1 sfa, -1 not given */
  int64_t sfa_k, sfa_kq;
  int_list sfa_layers;
  int cache_k, cache_v; /* index into "int8|bf16|f16|f32"; -1 not given */
  /* Evaluations. */
  const char *shots_file, *compare;
  int64_t limit, shots, depths, trials;
  text_list tasks; /* NAME=FILE */
  double mean_k, budget;
  bool by_head;
  const char *adapter;
  int_list lengths;
  /* What explain asks. */
  int_list explain_layers, explain_heads;
  int64_t top;
  /* Benchmarks: grids, inputs, results. */
  int_list bench_n, bench_head_dim, bench_k, bench_dtype, bench_isa, bench_threads, bench_causal, bench_ready, bench_k_type, bench_v_type;
  int_list bench_batch, bench_n_q, bench_against, bench_depth;
  int64_t heads, kv_heads, head_dim_v, steps;
  int supports, policy; /* bench_supports, sfa_policy */
  double eps, score_sd; /* score_sd < 0: not given */
  const char *csv, *plot;
  bool peers;
  /* Of `plan`, beside those of the benchmarks. */
  int64_t plan_k_q, window, sinks; /* plan_k_q: 0 as k, -1 all */
  int precision;                   /* sfa_precision */
  bool cached, calibrate;
  /* Of `data` and `tokenizer train`. */
  text_list inputs, valid, special;
  const char *separator, *field, *end_token;
  int text_format; /* sfa_text_format */
  double valid_share;
  int64_t shard_tokens, memory, vocab, min_count;
  int64_t rows, keys, min_length, max_length, max_depth, max_args; /* of made-up tasks */
  /* Of `train` and `export`. */
  const char *config, *data, *validation, *gguf;
  text_list set;   /* NAME=VALUE,... */
  int export_type; /* index into "bf16|f16|f32" */
  bool resume;
} app_options;

typedef struct app_verb {
  const char *name, *second; /* "bench", "attention"; second is NULL for most */
  unsigned bit;
  const char *usage, *summary, *detail; /* detail may be NULL */
  int (*run)(const app_options *o);
} app_verb;

extern const app_options options_default;

/* Reads argv[first..] for a verb. Returns 0, or the exit status after one line on stderr. */
int options_read(const app_verb *v, int argc, char **argv, int first, app_options *o);
void options_free(app_options *o);
/* The help of a verb, on stdout. */
void options_help(const app_verb *v);

/* The candidate nearest to a mistyped word, or NULL if none is near. */
const char *nearest_word(const char *word, const char *const *candidates, int n);

#endif
