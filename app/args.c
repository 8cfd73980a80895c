/* The option table and its reader. */
#include "args.h"
#include "app.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef enum kind {
  FLAG,   /* bool */
  TEXT,   /* const char * */
  TEXTS,  /* text_list; one more each time */
  INT,    /* int64_t; the i-th word stands for -1 - i */
  REAL,   /* double */
  WORD,   /* int: index of the word */
  INTS,   /* int_list of numbers, or one word */
  WORDS,  /* int_list of indices of words */
  SWITCH, /* WORDS "0|1" whose value may be missing: then 1 */
} kind;

typedef struct row {
  char letter;              /* 0: none */
  const char *name, *alias; /* alias "": words without a dash too */
  kind kind;
  size_t offset;
  const char *value; /* what the help calls the value */
  const char *words; /* separated by | */
  double min, max;
  unsigned verbs;
  const char *help; /* NULL: not shown */
} row;

#define AT(field) offsetof(app_options, field)
#define LOOKS (VERB_EXPLAIN | VERB_INSPECT)
#define TASKS (VERB_EVAL_TASK | VERB_EVAL_NIAH)
#define COMPARES (TASKS | VERB_EVAL_PPL)
#define RUNS (VERB_GENERATE | VERB_CHAT | VERB_EVAL | COMPARES | LOOKS)
#define CHOICES (RUNS | VERB_INFO | VERB_BENCH_MODEL)
#define MODELS (RUNS | VERB_INFO | VERB_DEMO | VERB_BENCH_MODEL)
#define GRIDS (VERB_BENCH_ATTENTION | VERB_BENCH_DECODE | VERB_BENCH_TOPK)
#define BENCHES (GRIDS | VERB_BENCH_MODEL | VERB_BENCH_BACKWARD)
#define PREFILLS (VERB_BENCH_ATTENTION | VERB_BENCH_BACKWARD)
#define CORPUS (VERB_DATA | VERB_TOKENIZER_TRAIN)
#define MADE_UP (VERB_DATA_LISTOPS | VERB_DATA_KV)
#define TRAININGS (VERB_TRAIN | VERB_FINETUNE)
#define POLICIES "auto|tiles|keys|half-codes|half-dense|paper|postings|bf16|sp-bf16|int8|sp-int8"
#define BIG 1e15

static const row rows[] = {
    {'m', "model", 0, TEXT, AT(model), "PATH", 0, 0, 0, MODELS | VERB_TOKENIZE, "a GGUF file, a Hugging Face directory or a llama2.c .bin"},
    {0, "tokenizer", 0, TEXT, AT(tokenizer), "PATH", 0, 0, 0, MODELS | VERB_TOKENIZE,
     "tokenizer file, if it is not in or beside the model"},
    {0, "adapter", 0, TEXT, AT(adapter), "DIR", 0, 0, 0, MODELS, "lay an adapter of sfa finetune over the model"},
    {0, "weights", 0, WORD, AT(weights), 0, "auto|f32|bf16|int8", 0, 0, MODELS,
     "linear layers in memory; auto: the fastest that is no further from the file than its own format"},
    {'p', "prompt", 0, TEXT, AT(prompt), "TEXT", 0, 0, 0, VERB_GENERATE | VERB_TOKENIZE | VERB_EXPLAIN,
     "the text; explain: the question after the document"},
    {'f', "file", 0, TEXT, AT(file), "FILE", 0, 0, 0, VERB_GENERATE | VERB_TOKENIZE | VERB_EVAL | VERB_DEMO | LOOKS,
     "read the text from a file, or from all text files of a folder under their names; - is standard input"},
    {'f', "file", 0, TEXT, AT(file), "FILE", 0, 0, 0, VERB_EVAL_TASK, "the items, a line each (docs/EVALUATION.md)"},
    {'f', "file", 0, TEXT, AT(file), "FILE", 0, 0, 0, VERB_EVAL_NIAH, "a long text, the haystack"},
    {'f', "file", 0, TEXT, AT(file), "FILE", 0, 0, 0, VERB_EVAL_PPL, "the text, or a folder of texts"},
    {0, "compare", 0, TEXT, AT(compare), "LIST", 0, 0, 0, COMPARES,
     "settings of attention, one after another: dense, K, K/KQ and K/all (dense queries), as in dense,16,16/all; with @ and a --policy: "
     "16@int8"},
    {0, "budget", 0, REAL, AT(budget), "MB", 0, 0, BIG, VERB_EVAL_PPL | VERB_EVAL_NIAH,
     "tell what a KV cache of that size holds (default: half of what the first setting takes for the longest context)"},
    {0, "limit", 0, INT, AT(limit), "N", 0, 1, BIG, TASKS, "the first N items (default: all)"},
    {0, "shots", 0, INT, AT(shots), "N", 0, 0, 1000, VERB_EVAL_TASK,
     "worked examples before each item, drawn as lm-evaluation-harness does (default: gsm8k 5, others 0)"},
    {0, "shots-file", 0, TEXT, AT(shots_file), "FILE", 0, 0, 0, VERB_EVAL_TASK, "where they are drawn from: the task's training part"},
    {'n', "n-predict", 0, INT, AT(n_predict), "N", 0, 1, 65536, VERB_EVAL_TASK | VERB_EVAL_NIAH,
     "most new tokens of a generated answer (default: gsm8k 256, scitldr and kv 64, niah 16)"},
    {0, "lengths", 0, INTS, AT(lengths), "LIST", 0, 1, BIG, VERB_EVAL_NIAH,
     "tokens of the prompts, answer included (default: 512, 1024, ... up to the context)"},
    {0, "depths", 0, INT, AT(depths), "N", 0, 1, 64, VERB_EVAL_NIAH, "places of the needle, evenly from the start to the end (default: 5)"},
    {0, "trials", 0, INT, AT(trials), "N", 0, 1, 1000, VERB_EVAL_NIAH, "needles at each place (default: 2)"},
    {'s', "seed", 0, INT, AT(seed), "N", 0, 1, BIG, VERB_EVAL_NIAH, "of needles and of their places in the text (default: 1)"},
    {0, "tokens", 0, INTS, AT(tokens), "ID,ID,...", 0, 0, INT32_MAX, VERB_EVAL, "token ids instead of a text, taken as they are"},
    {0, "system", 0, TEXT, AT(system), "TEXT", 0, 0, 0, VERB_GENERATE | VERB_CHAT, "system message of the conversation"},
    {0, "raw", "no-chat", FLAG, AT(raw), 0, 0, 0, 0, VERB_GENERATE, "no chat template, even for an instruct model"},
    {0, "no-special", 0, FLAG, AT(no_special), 0, 0, 0, 0, VERB_TOKENIZE, "add no special tokens and read none in the text"},
    {0, "index", 0, TEXT, AT(index), "FILE", 0, 0, 0, VERB_GENERATE | VERB_EXPLAIN,
     "keep the document of -f here once it is read, and go on from there the next time; with it -f may be left out"},
    {0, "index", "", TEXT, AT(index), "FILE", 0, 0, 0, VERB_INDEX, NULL},
    {0, "verify", 0, FLAG, AT(verify), 0, 0, 0, 0, VERB_GENERATE | VERB_INDEX, "read all of the index first, and compare its checksums"},
    {0, "tensors", 0, FLAG, AT(tensors), 0, 0, 0, 0, VERB_INFO, "list the tensors too"},
    {0, "devices", 0, FLAG, AT(devices), 0, 0, 0, 0, VERB_INFO, "instead of a model: the processor and the GPUs, and why there is none"},
    {'n', "n-predict", 0, INT, AT(n_predict), "N", 0, 1, BIG, VERB_GENERATE | VERB_CHAT | VERB_DEMO,
     "most new tokens (generate: 256; chat: as the context allows; demo: 64)"},
    {'c', "context", 0, INT, AT(context), "N", 0, 1, BIG, RUNS | VERB_DEMO, "tokens of context (default: the model's)"},
    {0, "stride", 0, INT, AT(stride), "N", 0, 1, BIG, VERB_EVAL | VERB_EVAL_PPL,
     "a text longer than the context is read in windows of it that move by N tokens (default: half of it)"},
    {0, "temp", 0, REAL, AT(temp), "X", 0, 0, 100, VERB_GENERATE | VERB_CHAT, "temperature; 0 takes the most likely token (default: 0.8)"},
    {0, "top-k", 0, INT, AT(top_k), "N", 0, 0, INT32_MAX, VERB_GENERATE | VERB_CHAT,
     "draw from the N most likely tokens; 0: all (default: 40)"},
    {0, "top-p", 0, REAL, AT(top_p), "X", 0, 0, 1, VERB_GENERATE | VERB_CHAT,
     "draw from the most likely tokens that together have X (default: 0.95)"},
    {0, "min-p", 0, REAL, AT(min_p), "X", 0, 0, 1, VERB_GENERATE | VERB_CHAT, "drop tokens below X times the likeliest (default: 0.05)"},
    {0, "repeat-penalty", 0, REAL, AT(repeat_penalty), "X", 0, 0.01, 100, VERB_GENERATE | VERB_CHAT,
     "make the last 64 tokens less likely; 1: off (default)"},
    {'s', "seed", 0, INT, AT(seed), "N", 0, 0, BIG, VERB_GENERATE | VERB_CHAT,
     "the same seed gives the same text (default: from the clock)"},
    {0, "attention", 0, WORD, AT(attention), 0, "dense|sfa", 0, 0, CHOICES,
     "default: as the model file says, else dense; sfa if an --sfa option is given"},
    {0, "sfa-k", 0, INT, AT(sfa_k), "N", 0, 1, 65536, CHOICES, "features kept of a key (default: as the model says, else 16)"},
    {0, "sfa-kq", 0, INT, AT(sfa_kq), "N|all", "all", 1, 65536, CHOICES,
     "features kept of a query; all: dense queries, \"K-only\" (default: as the model says, else as --sfa-k)"},
    {0, "sfa-layers", 0, INTS, AT(sfa_layers), "all|global|LIST", "all|global", 0, 65535, CHOICES,
     "sparse layers, the rest stays dense: global is those without a window, a LIST counts from 0: 0,3-5 (default: all)"},
    {0, "cache-k", 0, WORD, AT(cache_k), 0, "int8|bf16|f16|f32", 0, 0, CHOICES, "storage of keys (default: int8 for codes)"},
    {0, "cache-v", 0, WORD, AT(cache_v), 0, "int8|bf16|f16|f32|int4|fp8", 0, 0, CHOICES,
     "storage of values; fp8: e4m3 (default: bf16, f32 for an f32 model)"},
    {0, "eps", 0, REAL, AT(eps), "X", 0, 0, 0.5, RUNS | VERB_BENCH_MODEL,
     "softmax mass that a decode step may leave out of a head; the values behind it are not read (default: 0, exact)"},
    {0, "precision", 0, WORD, AT(precision), 0, "default|f32|half", 0, 0, RUNS | VERB_BENCH_MODEL,
     "f32: the same bits on every machine; default: 16-bit arithmetic where the processor has AMX"},
    {0, "chunk", 0, INT, AT(chunk), "N", 0, 1, 65536, RUNS | VERB_DEMO,
     "tokens that prefill takes at once; changes no result but for rounding on a GPU or with AMX (default: 512)"},
    {0, "n", 0, INTS, AT(bench_n), "LIST", 0, 1, 1 << 24, PREFILLS,
     "tokens, queries as many as keys (default: 1024,4096; on a GPU 8192,32768)"},
    {0, "n", 0, INTS, AT(bench_n), "LIST", 0, 1, 1 << 24, VERB_BENCH_DECODE, "tokens in the cache (default: 65536)"},
    {0, "n", 0, INTS, AT(bench_n), "LIST", 0, 1, 1 << 24, VERB_BENCH_TOPK, "rows (default: 4096)"},
    {0, "head-dim", 0, INTS, AT(bench_head_dim), "LIST", 0, 8, 65536, PREFILLS | VERB_BENCH_TOPK,
     "a multiple of 8 (default: 64,128; on a GPU 64,128,256)"},
    {0, "head-dim", 0, INTS, AT(bench_head_dim), "LIST", 0, 8, 65536, VERB_BENCH_DECODE, "a multiple of 8 (default: 128)"},
    {0, "k", 0, INTS, AT(bench_k), "LIST", 0, 0, 65536, GRIDS | VERB_BENCH_BACKWARD,
     "features kept of queries and keys; decode: 0 is dense (default: 8,16)"},
    {0, "dtype", 0, WORDS, AT(bench_dtype), "LIST", "f32|bf16", 0, 0, VERB_BENCH_ATTENTION | VERB_BENCH_TOPK,
     "of the inputs: f32, bf16 (default: f32)"},
    {0, "k-type", 0, WORDS, AT(bench_k_type), "TYPE", "f32|bf16|f16|int8", 0, 0, VERB_BENCH_ATTENTION,
     "that codes are stored in: f32, bf16, f16, int8 (default: that of the inputs)"},
    {0, "k-type", 0, WORDS, AT(bench_k_type), "LIST", "f32|bf16|f16|int8", 0, 0, VERB_BENCH_DECODE | VERB_BENCH_TOPK,
     "that keys are stored in: f32, bf16, f16, int8 (default: int8)"},
    {0, "v-type", 0, WORDS, AT(bench_v_type), "LIST", "f32|bf16|f16|int8|int4|fp8", 0, 0, VERB_BENCH_DECODE,
     "that values are stored in: f32, bf16, f16, int8, int4, fp8 (default: bf16,int8,int4)"},
    {0, "heads", 0, INT, AT(heads), "N", 0, 1, 4096, PREFILLS | VERB_BENCH_DECODE,
     "query heads (default: as many as --kv-heads; attention on a GPU 8, on the CPU it is one)"},
    {0, "kv-heads", 0, INT, AT(kv_heads), "N", 0, 1, 4096, PREFILLS | VERB_BENCH_DECODE,
     "key and value heads (default: 1; attention on a GPU as many as --heads)"},
    {0, "head-dim-v", 0, INT, AT(head_dim_v), "N", 0, 8, 65536, VERB_BENCH_DECODE,
     "of the values; 32 leaves little but the scores (default: as --head-dim)"},
    {0, "batch", 0, INTS, AT(bench_batch), "LIST", 0, 1, 4096, VERB_BENCH_DECODE,
     "sequences; lengths rise evenly from n / batch to n (default: 1)"},
    {0, "n-q", 0, INTS, AT(bench_n_q), "LIST", 0, 1, 4096, VERB_BENCH_DECODE, "query tokens of a step (default: 1)"},
    {0, "eps", 0, REAL, AT(eps), "X", 0, 0, 0.5, VERB_BENCH_DECODE, "softmax mass that a row may leave out; 0: none (default)"},
    {0, "score-sd", 0, REAL, AT(score_sd), "X", 0, 0.001, 1000, VERB_BENCH_DECODE,
     "queries are scaled so that scores spread this far (default: as they come; at 2.3 half of the weights hold 99 % of the mass)"},
    {0, "against", 0, WORDS, AT(bench_against), "LIST", "f32|bf16|f16|int8", 0, 0, VERB_BENCH_DECODE,
     "dense caches to compare with: f32, bf16, f16, int8 (default: bf16)"},
    {0, "supports", 0, WORD, AT(supports), 0, "uniform|skewed", 0, 0, PREFILLS | VERB_BENCH_DECODE,
     "how evenly features are kept; skewed is as on trained models (default: uniform)"},
    {0, "policy", 0, WORD, AT(policy), 0, POLICIES, 0, 0, VERB_BENCH_ATTENTION,
     "how SFA computes (default: the planner's choice; on a GPU bf16, sp-bf16, int8, sp-int8 and paper in turn)"},
    {0, "policy", 0, WORD, AT(policy), 0, POLICIES, 0, 0, RUNS | VERB_BENCH_MODEL,
     "how prompts are attended to; on a GPU bf16, sp-bf16, int8 or sp-int8 (default: bf16; int8 if that is faster and the model was made "
     "for SFA)"},
    {0, "isa", 0, WORDS, AT(bench_isa), "LIST", "auto|scalar|avx2|avx512|vbmi|amx", 0, 0, GRIDS,
     "scalar, avx2, avx512, vbmi, amx (default: the best here)"},
    {0, "isa", 0, WORD, AT(isa), 0, "auto|scalar|avx2|avx512|vbmi|amx", 0, 0, RUNS | VERB_DEMO | VERB_BENCH_MODEL,
     "most that the kernels of attention use; changes no result but with AMX"},
    {0, "device", 0, TEXT, AT(device), "cpu|cuda[:N]", 0, 0, 0, RUNS | BENCHES | TRAININGS,
     "where to compute: cuda is an NVIDIA GPU, its first or number N (sfa info --devices lists them; default: cpu)"},
    {'t', "threads", 0, INTS, AT(bench_threads), "LIST", 0, 1, 4096, VERB_BENCH_ATTENTION | VERB_BENCH_DECODE, "(default: 1)"},
    {'t', "threads", 0, INT, AT(threads), "N", 0, 1, 4096, MODELS | VERB_TOKENIZE, "changes no result (default: all processors)"},
    {0, "causal", 0, SWITCH, AT(bench_causal), "[0|1]", "0|1", 0, 0, PREFILLS,
     "queries see earlier keys only; 0,1 times both (default: 0; on a GPU 0,1)"},
    {0, "ready", 0, SWITCH, AT(bench_ready), "[0|1]", "0|1", 0, 0, VERB_BENCH_ATTENTION,
     "SFA is given the codes: top-k is not in its time; 0,1 times both (default: 0)"},
    {0, "depth", 0, INTS, AT(bench_depth), "LIST", 0, 2, BIG, VERB_BENCH_MODEL,
     "tokens of context at the last step (default: 64 and the model's context, at most 8192)"},
    {0, "steps", 0, INT, AT(steps), "N", 0, 1, 4096, VERB_BENCH_MODEL, "decode steps of a round (default: 8)"},
    {0, "repeats", 0, INT, AT(repeats), "N", 0, 1, 1000, BENCHES, "timed rounds (default: 5 or more, fewer where one takes seconds)"},
    {0, "seed", 0, INT, AT(seed), "N", 0, 0, BIG, GRIDS | VERB_BENCH_BACKWARD, "of the random rows (default: 1)"},
    {0, "peers", 0, FLAG, AT(peers), 0, 0, 0, 0, BENCHES,
     "times other software in the same rounds, where $SFA_PYTHON (default: python3) has it: torch, numpy, llama_cpp, triton"},
    {0, "layers", 0, INTS, AT(explain_layers), "LIST", 0, 0, 65535, VERB_EXPLAIN, "layers to ask: 0,3-5 (default: all)"},
    {0, "heads", 0, INTS, AT(explain_heads), "LIST", 0, 0, 65535, VERB_EXPLAIN, "query heads to ask (default: all)"},
    {0, "top", 0, INT, AT(top), "N", 0, 1, 64, VERB_EXPLAIN, "passages shown (default: 5)"},
    {0, "plot", 0, TEXT, AT(plot), "FILE.png", 0, 0, 0, VERB_EXPLAIN, "draws the strip of the document too"},
    {0, "csv", 0, TEXT, AT(csv), "FILE", 0, 0, 0, BENCHES, "appends the results to a file, one line each"},
    {0, "plot", 0, TEXT, AT(plot), "FILE.png", 0, 0, 0, COMPARES | BENCHES, "draws them, by gnuplot"},
    {0, "child", 0, FLAG, AT(child), 0, 0, 0, 0, VERB_BENCH_ATTENTION, NULL},
    {'m', "model", 0, TEXT, AT(model), "PATH", 0, 0, 0, VERB_PLAN, "take the shapes of a model, with its keys and values in a cache"},
    {0, "n", 0, INTS, AT(bench_n), "LIST", 0, 1, INT32_MAX / 2, VERB_PLAN, "keys (default: 4096, or the model's context)"},
    {0, "n-q", 0, INTS, AT(bench_n_q), "LIST", 0, 1, INT32_MAX / 2, VERB_PLAN,
     "queries; 1 is a decode step (default: as many as keys; with a model 512,1)"},
    {0, "batch", 0, INTS, AT(bench_batch), "LIST", 0, 1, 65536, VERB_PLAN, "sequences (default: 1)"},
    {0, "heads", 0, INT, AT(heads), "N", 0, 1, 65536, VERB_PLAN, "query heads (default: 1, or the model's)"},
    {0, "kv-heads", 0, INT, AT(kv_heads), "N", 0, 1, 65536, VERB_PLAN, "heads of keys and values (default: as --heads, or the model's)"},
    {0, "head-dim", 0, INTS, AT(bench_head_dim), "LIST", 0, 8, 65536, VERB_PLAN, "a multiple of 8 (default: 64, or the model's)"},
    {0, "head-dim-v", 0, INT, AT(head_dim_v), "N", 0, 8, 65536, VERB_PLAN, "of values (default: as --head-dim)"},
    {0, "k", 0, INTS, AT(bench_k), "LIST", 0, 0, 65536, VERB_PLAN, "features kept; 0: dense (default: 16, or the model's)"},
    {0, "k-q", 0, INT, AT(plan_k_q), "N|all", "all", 1, 65536, VERB_PLAN, "features kept of a query (default: as --k)"},
    {0, "dtype", 0, WORDS, AT(bench_dtype), 0, "f32|bf16", 0, 0, VERB_PLAN, "of the rows that are brought (default: f32)"},
    {0, "k-type", 0, WORDS, AT(bench_k_type), 0, "f32|bf16|f16|int8", 0, 0, VERB_PLAN,
     "storage of keys (default: f32; in a cache int8, bf16 for dense ones)"},
    {0, "v-type", 0, WORDS, AT(bench_v_type), 0, "f32|bf16|f16|int8|int4|fp8", 0, 0, VERB_PLAN,
     "storage of values (default: f32; in a cache bf16)"},
    {0, "cached", 0, FLAG, AT(cached), 0, 0, 0, 0, VERB_PLAN, "keys and values come from a cache: top-k of keys is done already"},
    {0, "causal", 0, SWITCH, AT(bench_causal), "[0|1]", "0|1", 0, 0, VERB_PLAN,
     "queries see earlier keys only (default: 0; with a model 1)"},
    {0, "window", 0, INT, AT(window), "N", 0, 1, INT32_MAX, VERB_PLAN, "keys that a query sees, its own the last (default: all)"},
    {0, "sinks", 0, INT, AT(sinks), "N", 0, 0, INT32_MAX, VERB_PLAN, "first keys that stay visible (default: 0)"},
    {0, "policy", 0, WORD, AT(policy), 0, "auto|tiles|keys|half-codes|half-dense|paper|postings", 0, 0, VERB_PLAN,
     "ask for a way (default: auto, the one that costs least)"},
    {0, "precision", 0, WORD, AT(precision), 0, "default|f32|half", 0, 0, VERB_PLAN, "whether 16-bit arithmetic may be chosen"},
    {0, "eps", 0, REAL, AT(eps), "X", 0, 0, 0.5, VERB_PLAN, "softmax mass that a row may leave out (default: 0)"},
    {0, "isa", 0, WORD, AT(isa), 0, "auto|scalar|avx2|avx512|vbmi|amx", 0, 0, VERB_PLAN, "instruction set (default: the best here)"},
    {'t', "threads", 0, INT, AT(threads), "N", 0, 1, 4096, VERB_PLAN, "threads that the workspace is for (default: all processors)"},
    {0, "calibrate", 0, FLAG, AT(calibrate), 0, 0, 0, 0, VERB_PLAN,
     "time this machine's kernels first, in under two seconds, and keep the costs for it: the other commands use them too"},
    {0, "config", 0, TEXT, AT(config), "FILE,...", 0, 0, 0, TRAININGS,
     "the recipe, JSON (docs/TRAINING.md); members of later files replace those of earlier ones"},
    {0, "set", 0, TEXTS, AT(set), "NAME=VALUE,...", 0, 0, 0, TRAININGS,
     "members of the recipe that replace those of the files; may be given several times, the last value of a name holds"},
    {0, "data", 0, TEXT, AT(data), "PATH,...", 0, 0, 0, TRAININGS, "token shards to train on, or sets of them (sfa data makes them)"},
    {0, "validation", 0, TEXT, AT(validation), "PATH,...", 0, 0, 0, TRAININGS, "token shards for the held-out loss"},
    {'m', "model", 0, TEXT, AT(model), "DIR", 0, 0, 0, VERB_TRAIN,
     "train this Hugging Face model further (default: a new one of the recipe)"},
    {0, "tokenizer", 0, TEXT, AT(tokenizer), "PATH", 0, 0, 0, VERB_TRAIN,
     "tokenizer.json that is copied beside the trained model (default: that of --model)"},
    {'o', "out", 0, TEXT, AT(out), "DIR", 0, 0, 0, VERB_TRAIN, "folder for checkpoints, log, curves and the trained model"},
    {'m', "model", 0, TEXT, AT(model), "DIR", 0, 0, 0, VERB_EXPORT, "a Hugging Face directory"},
    {0, "gguf", 0, TEXT, AT(gguf), "FILE", 0, 0, 0, VERB_EXPORT, "the file that is written"},
    {0, "type", 0, WORD, AT(export_type), 0, "bf16|f16|f32", 0, 0, VERB_EXPORT, "of the matrices (default: bf16); vectors stay f32"},
    {'m', "model", 0, TEXT, AT(model), "DIR", 0, 0, 0, VERB_FINETUNE, "the dense model, a Hugging Face directory"},
    {0, "sfa-k", 0, INT, AT(sfa_k), "N", 0, 1, 65536, VERB_FINETUNE, "features kept of a key in every layer (default: 16)"},
    {0, "mean-k", 0, REAL, AT(mean_k), "X", 0, 0, 65536, VERB_FINETUNE,
     "instead: measure how sensitive every head is, and share out so many features a layer on average"},
    {0, "by-head", 0, FLAG, AT(by_head), 0, 0, 0, 0, VERB_FINETUNE,
     "with --mean-k: each kv head its own number; the cache has room for the most of a layer's"},
    {0, "sfa-kq", 0, INT, AT(sfa_kq), "N|all", "all", 1, 65536, VERB_FINETUNE,
     "features kept of a query; all: dense queries, \"K-only\" (default: as of keys)"},
    {0, "task", 0, TEXTS, AT(tasks), "NAME=FILE", 0, 0, 0, VERB_FINETUNE,
     "score both models on a task of sfa eval too; may be given several times"},
    {0, "limit", 0, INT, AT(limit), "N", 0, 1, BIG, VERB_FINETUNE, "the first items of a task only (default: all)"},
    {'o', "out", 0, TEXT, AT(out), "DIR", 0, 0, 0, VERB_FINETUNE, "folder for all that a training leaves, sensitivity and report card"},
    {0, "resume", 0, FLAG, AT(resume), 0, 0, 0, 0, TRAININGS, "go on from the newest checkpoint in --out; without one, begin"},
    {'t', "threads", 0, INT, AT(threads), "N", 0, 1, 4096, TRAININGS, "changes no result (default: all processors)"},
    {0, "input", "", TEXTS, AT(inputs), "FILE", 0, 0, 0, CORPUS, NULL},
    {0, "tokenizer", 0, TEXT, AT(tokenizer), "PATH", 0, 0, 0, VERB_DATA, "tokenizer.json, its folder, or another file of a tokenizer"},
    {'m', "model", 0, TEXT, AT(model), "PATH", 0, 0, 0, VERB_DATA, "take the tokenizer of a model"},
    {'o', "out", 0, TEXT, AT(out), "DIR", 0, 0, 0, VERB_DATA,
     "folder for the shards: DIR/train_00000.shard, ..., DIR/valid_00000.shard, ..."},
    {'o', "out", 0, TEXT, AT(out), "DIR", 0, 0, 0, VERB_TOKENIZER_TRAIN, "folder for tokenizer.json and tokenizer_config.json"},
    {0, "valid", 0, TEXTS, AT(valid), "FILE", 0, 0, 0, VERB_DATA, "texts that are held out; may be given several times"},
    {0, "valid-share", 0, REAL, AT(valid_share), "X", 0, 0, 0.999, VERB_DATA,
     "share of the documents that is held out, drawn by --seed (default: 0)"},
    {'s', "seed", 0, INT, AT(seed), "N", 0, 0, BIG, VERB_DATA, "of that draw (default: 0)"},
    {0, "vocab", 0, INT, AT(vocab), "N", 0, 256, 1 << 22, VERB_TOKENIZER_TRAIN,
     "tokens, special ones and the 256 bytes included (default: 32768)"},
    {0, "special", 0, TEXTS, AT(special), "TEXT", 0, 0, 0, VERB_TOKENIZER_TRAIN,
     "a special token; may be given several times, the first one ends a text (default: <|endoftext|>)"},
    {0, "min-count", 0, INT, AT(min_count), "N", 0, 1, BIG, VERB_TOKENIZER_TRAIN, "merge no pair that is seen less often (default: 2)"},
    {0, "format", 0, WORD, AT(text_format), 0, "auto|text|jsonl", 0, 0, CORPUS,
     "of the inputs; auto: jsonl by the names .jsonl and .ndjson, with or without .bz2 or .xz behind them"},
    {0, "separator", 0, TEXT, AT(separator), "LINE", 0, 0, 0, CORPUS,
     "a line that ends a document inside a text; \"\": none, a file is a document (default: <|endoftext|>)"},
    {0, "field", 0, TEXT, AT(field), "NAME", 0, 0, 0, CORPUS, "of a row of jsonl that has the text (default: text)"},
    {0, "end-token", 0, TEXT, AT(end_token), "TEXT", 0, 0, 0, VERB_DATA,
     "special token that ends a document (default: the tokenizer's end of text)"},
    {0, "shard-tokens", 0, INT, AT(shard_tokens), "N", 0, 1, BIG, VERB_DATA,
     "a shard ends with the document that reaches so many (default: 134217728)"},
    {0, "memory", 0, INT, AT(memory), "MB", 0, 1, 1 << 30, CORPUS,
     "for what is under way, whatever the files' sizes (default: 256; tokenizer train: 1024)"},
    {0, "verify", 0, FLAG, AT(verify), 0, 0, 0, 0, VERB_DATA, "instead: read the shards named, and compare their checksums"},
    {'t', "threads", 0, INT, AT(threads), "N", 0, 1, 4096, CORPUS, "changes no result (default: all processors)"},
    {0, "rows", 0, INT, AT(rows), "N", 0, 1, 1 << 28, MADE_UP, "how many (default: listops 1000, kv 500)"},
    {0, "min-length", 0, INT, AT(min_length), "N", 0, 1, 1 << 20, VERB_DATA_LISTOPS,
     "expressions have more digits, operators and ends than this (default: 500)"},
    {0, "max-length", 0, INT, AT(max_length), "N", 0, 3, 1 << 20, VERB_DATA_LISTOPS, "and fewer than this (default: 2000)"},
    {0, "max-depth", 0, INT, AT(max_depth), "N", 0, 1, 100, VERB_DATA_LISTOPS, "of digits, the whole expression is 1 (default: 10)"},
    {0, "max-args", 0, INT, AT(max_args), "N", 0, 2, 64, VERB_DATA_LISTOPS, "most arguments of an operator (default: 10)"},
    {0, "format", 0, WORD, AT(text_format), 0, "auto|text|jsonl", 0, 0, VERB_DATA_LISTOPS,
     "lines EXPRESSION<tab>VALUE, for sfa eval listops (default), or rows {source, target, text}, for sfa data"},
    {0, "keys", 0, INT, AT(keys), "N", 0, 1, 1 << 20, VERB_DATA_KV, "pairs of a row (default: 75)"},
    {'s', "seed", 0, INT, AT(seed), "N", 0, 0, BIG, MADE_UP, "the same seed gives the same rows (default: 1)"},
    {'o', "out", 0, TEXT, AT(out), "DIR", 0, 0, 0, VERB_DEMO | VERB_INSPECT,
     "folder for the picture and the numbers (default: demo_out, inspect_out)"},
    {0, "json", 0, FLAG, AT(json), 0, 0, 0, 0, ~0u, "one JSON document on standard output"},
    {'h', "help", 0, FLAG, AT(help), 0, 0, 0, 0, ~0u, "this text"},
};
enum { N_ROWS = sizeof rows / sizeof *rows };

const app_options options_default = {
    .n_predict = -1,
    .context = -1,
    .threads = 0,
    .chunk = 0,
    .stride = -1,
    .repeats = -1,
    .temp = 0.8,
    .top_k = 40,
    .top_p = 0.95,
    .min_p = 0.05,
    .repeat_penalty = 1,
    .seed = -1,
    .heads = -1,
    .kv_heads = -1,
    .head_dim_v = -1,
    .steps = -1,
    .score_sd = -1,
    .attention = -1,
    .sfa_k = 0,
    .sfa_kq = 0,
    .cache_k = -1,
    .cache_v = -1,
    .tokens.word = -1,
    .sfa_layers.word = -1,
    .explain_layers.word = -1,
    .explain_heads.word = -1,
    .top = -1,
    .shard_tokens = -1,
    .memory = -1,
    .min_count = -1,
    .rows = -1,
    .keys = -1,
    .min_length = -1,
    .max_length = -1,
    .max_depth = -1,
    .max_args = -1,
    .vocab = 32768,
    .limit = -1,
    .shots = -1,
    .depths = -1,
    .trials = -1,
    .lengths.word = -1,
};

/* ---- Words ------------------------------------------------------------------------------------------------------------------- */

/* Index of text[0..len) among the words of "a|b|c", or -1. */
static int find_word(const char *words, const char *text, size_t len) {
  int index = 0;
  for (const char *at = words; at; index++) {
    const char *end = strchr(at, '|');
    size_t n = end ? (size_t)(end - at) : strlen(at);
    if (n == len && memcmp(at, text, n) == 0)
      return index;
    at = end ? end + 1 : NULL;
  }
  return -1;
}

/* Levenshtein distance, for words of at most 31 bytes. */
static int edit_distance(const char *a, const char *b) {
  int row_before[32], n = (int)strlen(b);
  if (n > 31 || strlen(a) > 31)
    return 99;
  for (int j = 0; j <= n; j++)
    row_before[j] = j;
  for (int i = 1; *a; a++, i++) {
    int diagonal = row_before[0];
    row_before[0] = i;
    for (int j = 1; j <= n; j++) {
      int change = diagonal + (*a != b[j - 1]), insert = row_before[j - 1] + 1, remove = row_before[j] + 1;
      diagonal = row_before[j];
      row_before[j] = change < insert ? (change < remove ? change : remove) : (insert < remove ? insert : remove);
    }
  }
  return row_before[n];
}

const char *nearest_word(const char *word, const char *const *candidates, int n) {
  const char *best = NULL;
  int best_distance = 3;
  for (int i = 0; i < n; i++) {
    size_t len = strlen(word);
    bool begins = len >= 3 && strncmp(candidates[i], word, len) == 0;
    int distance = begins ? 1 : edit_distance(word, candidates[i]);
    if (distance < best_distance && distance < (int)strlen(candidates[i])) {
      best = candidates[i];
      best_distance = distance;
    }
  }
  return best;
}

/* ---- Values ------------------------------------------------------------------------------------------------------------------ */

static bool read_int(const char *text, const char *end, int64_t *out) {
  char *stop;
  errno = 0;
  *out = strtoll(text, &stop, 10);
  return stop == end && stop > text && errno == 0 && *text != ' ' && *text != '+';
}

static bool in_range(const row *r, double x) { return x >= r->min && x <= r->max; }

/* One line about a value that does not fit its row. */
static int bad_value(const row *r, const char *value) {
  char range[96] = "";
  if (r->kind == INT || r->kind == REAL || r->kind == INTS) {
    if (r->max < BIG)
      snprintf(range, sizeof range, "%s from %.10g to %.10g", r->kind == REAL ? "a number" : "a whole number", r->min, r->max);
    else
      snprintf(range, sizeof range, "a whole number of at least %.10g", r->min);
  }
  return app_usage("--%s cannot be \"%s\"; it takes %s%s%s%s", r->name, value, range, r->kind == INTS ? ", or several with commas" : "",
                   r->words && *range ? ", or " : "", r->words ? r->words : "");
}

enum { LIST_MOST = 1 << 22 };

/* Adds the piece text..end, "7" or "3-5" or a word, to a list. */
static bool read_piece(const row *r, const char *text, const char *end, int_list *list) {
  if (r->kind != INTS) {
    int index = find_word(r->words, text, (size_t)(end - text));
    return index >= 0 && list_append(list, index);
  }
  const char *dash = memchr(text, '-', (size_t)(end - text));
  int64_t from, to;
  if (!dash || dash == text) {
    if (!read_int(text, end, &from))
      return false;
    to = from;
  } else if (!read_int(text, dash, &from) || !read_int(dash + 1, end, &to))
    return false;
  if (from > to || !in_range(r, (double)from) || !in_range(r, (double)to) || to - from + list->n >= LIST_MOST)
    return false;
  for (int64_t value = from; value <= to; value++)
    if (!list_append(list, value))
      return false;
  return true;
}

static int read_list(const row *r, const char *value, int_list *list) {
  list->n = 0;
  list->word = r->kind == INTS && r->words ? find_word(r->words, value, strlen(value)) : -1;
  if (list->word >= 0)
    return 0;
  for (const char *at = value; at;) {
    const char *comma = strchr(at, ','), *end = comma ? comma : at + strlen(at);
    if (!read_piece(r, at, end, list))
      return bad_value(r, value);
    at = comma ? comma + 1 : NULL;
  }
  return 0;
}

static bool text_list_append(text_list *list, const char *value) {
  const char **more = realloc(list->values, (size_t)(list->n + 1) * sizeof *more);
  if (!more)
    return false;
  list->values = more;
  list->values[list->n++] = value;
  return true;
}

static int read_value(const row *r, const char *value, app_options *o) {
  void *place = (char *)o + r->offset;
  char *stop;
  int index = r->words ? find_word(r->words, value, strlen(value)) : -1;
  switch (r->kind) {
  case FLAG: *(bool *)place = true; return 0;
  case TEXT: *(const char **)place = value; return 0;
  case TEXTS: return text_list_append(place, value) ? 0 : app_fail("out of memory for the options");
  case WORD: *(int *)place = index; return index >= 0 ? 0 : bad_value(r, value);
  case INT:
    if (index >= 0)
      *(int64_t *)place = -1 - index;
    else if (!read_int(value, value + strlen(value), place) || !in_range(r, (double)*(int64_t *)place))
      return bad_value(r, value);
    return 0;
  case REAL:
    errno = 0;
    *(double *)place = strtod(value, &stop);
    return *value && !*stop && errno == 0 && in_range(r, *(double *)place) ? 0 : bad_value(r, value);
  default: return read_list(r, value, place);
  }
}

/* ---- Reading ----------------------------------------------------------------------------------------------------------------- */

/* The row of an argument "-x", "-xVALUE", "--name" or "--name=VALUE"; *value is what is joined to it, or NULL. */
static const row *find_row(unsigned verb_bit, const char *arg, const char **value) {
  *value = NULL;
  bool is_long = arg[1] == '-';
  const char *name = arg + (is_long ? 2 : 1), *equals = strchr(name, '=');
  size_t len = is_long && equals ? (size_t)(equals - name) : is_long ? strlen(name) : 1;
  for (const row *r = rows; r < rows + N_ROWS; r++) {
    if (!(r->verbs & verb_bit))
      continue;
    if (!is_long && r->letter && r->letter == name[0]) {
      *value = name[1] ? name + 1 : NULL;
      return r;
    }
    if (is_long && len &&
        ((strlen(r->name) == len && memcmp(r->name, name, len) == 0) ||
         (r->alias && strlen(r->alias) == len && memcmp(r->alias, name, len) == 0))) {
      *value = equals ? equals + 1 : NULL;
      return r;
    }
  }
  return NULL;
}

/* The row that takes a word without a dash, or NULL. */
static const row *find_bare_row(unsigned verb_bit) {
  for (const row *r = rows; r < rows + N_ROWS; r++)
    if ((r->verbs & verb_bit) && r->alias && !*r->alias)
      return r;
  return NULL;
}

static int unknown_option(const app_verb *v, const char *arg) {
  const char *names[N_ROWS];
  int n = 0;
  for (const row *r = rows; r < rows + N_ROWS; r++)
    if (r->verbs & v->bit && r->help)
      names[n++] = r->name;
  const char *name = arg + strspn(arg, "-"), *near = strlen(name) > 1 ? nearest_word(name, names, n) : NULL; /* a letter is near to all */
  return app_usage("%s knows no option %s%s%s; see sfa %s --help", v->name, arg, near ? "; did you mean --" : "", near ? near : "",
                   v->name);
}

static bool is_option(const app_verb *v, const char *arg) {
  const char *value;
  return arg[0] == '-' && arg[1] && (arg[1] == '-' || !arg[2]) && find_row(v->bit, arg, &value) && !value;
}

int options_read(const app_verb *v, int argc, char **argv, int first, app_options *o) {
  for (int i = first; i < argc; i++) {
    const char *value, *arg = argv[i];
    const row *bare = arg[0] != '-' || !arg[1] ? find_bare_row(v->bit) : NULL;
    if (bare) {
      int status = read_value(bare, arg, o);
      if (status)
        return status;
      continue;
    }
    if (arg[0] != '-' || !arg[1])
      return app_usage("%s takes options only, not \"%s\"; %s, see sfa %s --help", v->name, arg,
                       find_row(v->bit, "-p", &value) ? "a text is given with -p or -f" : "each value has a name", v->name);
    const row *r = find_row(v->bit, arg, &value);
    if (!r)
      return unknown_option(v, arg);
    if (r->kind == FLAG && value)
      return app_usage("--%s takes no value, not \"%s\"", r->name, value);
    if (r->kind == SWITCH && !value)
      value = i + 1 < argc && (argv[i + 1][0] == '0' || argv[i + 1][0] == '1') ? argv[++i] : "1";
    if (r->kind != FLAG && !value) {
      if (i + 1 >= argc || is_option(v, argv[i + 1]))
        return app_usage("--%s wants a value: %s", r->name, r->value ? r->value : r->words);
      value = argv[++i];
    }
    int status = read_value(r, value, o);
    if (status)
      return status;
  }
  return 0;
}

void options_free(app_options *o) {
  for (const row *r = rows; r < rows + N_ROWS; r++)
    if (r->kind == TEXTS) {
      text_list *list = (text_list *)((char *)o + r->offset);
      free(list->values);
      *list = (text_list){0};
    } else if (r->kind == INTS || r->kind == WORDS || r->kind == SWITCH) {
      int_list *list = (int_list *)((char *)o + r->offset);
      free(list->values);
      *list = (int_list){0}; /* several rows may fill one list */
    }
}

/* ---- Help -------------------------------------------------------------------------------------------------------------------- */

enum { HELP_COLUMN = 32, HELP_WIDTH = 100 };

/* Breaks a text into lines that begin at a column; the cursor stands at `cursor`. */
static void print_wrapped(const char *text, int column, int cursor) {
  while (*text) {
    size_t len = strlen(text), room = (size_t)(HELP_WIDTH - column);
    if (len > room)
      for (len = room; len > 1 && text[len] != ' ';)
        len--;
    printf("%*s%.*s\n", column - cursor, "", (int)len, text);
    text += len + (text[len] == ' ');
    cursor = 0;
  }
}

void options_help(const app_verb *v) {
  printf("usage: sfa %s%s%s %s\n\n", v->name, v->second ? " " : "", v->second ? v->second : "", v->usage);
  print_wrapped(v->summary, 0, 0);
  if (v->detail)
    print_wrapped(v->detail, 0, 0);
  printf("\noptions:\n");
  for (const row *r = rows; r < rows + N_ROWS; r++) {
    if (!(r->verbs & v->bit) || !r->help)
      continue;
    const char *value = r->value ? r->value : r->words;
    char letter[5] = "    ";
    if (r->letter)
      snprintf(letter, sizeof letter, "-%c, ", r->letter);
    int cursor = printf("  %s--%s%s%s", letter, r->name, value ? " " : "", value ? value : "");
    if (cursor > HELP_COLUMN - 2)
      putchar('\n');
    print_wrapped(r->help, HELP_COLUMN, cursor > HELP_COLUMN - 2 ? 0 : cursor);
  }
}
