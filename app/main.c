/* sfa: the verb table. */
#include "app.h"

#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A task of `sfa eval` over a file of items. */
#define TASK(name, summary)                                                                                                                \
  { "eval", name, VERB_EVAL_TASK, "-m MODEL -f FILE [options]", summary, NULL, cmd_eval_task }

static const app_verb verbs[] = {
    {"generate", NULL, VERB_GENERATE, "-m MODEL (-p TEXT | -f FILE | -f FILE -p TEXT) [options]",
     "Continues a text, or answers it where the model has a chat template.",
     "With both, the text of -p follows that of the file, after an empty line. Only the new text goes to standard output.", cmd_generate},
    {"chat", NULL, VERB_CHAT, "-m MODEL [options]", "Holds a conversation, line by line.",
     "/reset forgets it, /exit or Ctrl-D ends it, Ctrl-C stops an answer.", cmd_chat},
    {"index", NULL, VERB_INDEX, "FILE [options]", "Tells what a document index holds.", "sfa generate --index FILE -f DOCUMENT makes one.",
     cmd_index},
    {"info", NULL, VERB_INFO, "(-m MODEL | --devices) [options]",
     "Tells what a model file holds, and what its KV cache takes, dense and with SFA; or what there is to compute on.", NULL, cmd_info},
    {"tokenize", NULL, VERB_TOKENIZE, "(-m MODEL | --tokenizer FILE) (-p TEXT | -f FILE) [options]", "Shows the tokens of a text.", NULL,
     cmd_tokenize},
    {"data", NULL, VERB_DATA, "FILE... (--tokenizer PATH | -m MODEL) -o DIR [options]",
     "Makes token shards of texts, for training: plain, .bz2, .xz and .jsonl files, and folders of them.",
     "Each document ends with the tokenizer's end token. --verify FILE... reads shards instead.", cmd_data},
    {"data", "listops", VERB_DATA_LISTOPS, "[options]",
     "Makes ListOps expressions as Long Range Arena does: nested MIN, MAX, MED and SM (sum mod 10).", "They go to standard output.",
     cmd_data_listops},
    {"data", "kv", VERB_DATA_KV, "[options]", "Makes rows for sfa eval kv: pairs of random keys and values, one of which is asked for.",
     "They go to standard output.", cmd_data_kv},
    {"tokenizer", "train", VERB_TOKENIZER_TRAIN, "FILE... -o DIR [options]",
     "Trains a byte-level BPE tokenizer on texts: plain, .bz2, .xz and .jsonl files, and folders of them.",
     "Words are cut as GPT-2's are; DIR/tokenizer.json is what Hugging Face's libraries read too.", cmd_tokenizer_train},
    {"bench", "attention", VERB_BENCH_ATTENTION, "[options]",
     "Times attention over random rows, of one head, or with --device cuda of several: SFA, the dense twin, and peers.",
     "SFA starts from dense rows too: top-k and packing are in its time. A LIST is separated by commas; every combination is run.",
     cmd_bench_attention},
    {"bench", "backward", VERB_BENCH_BACKWARD, "--device cuda [options]",
     "Times attention forward and backward on a GPU: SFA and the dense twin, which are deterministic, and peers.", NULL,
     cmd_bench_backward},
    {"bench", "decode", VERB_BENCH_DECODE, "[options]", "Times decode steps over a cache of random rows: SFA, dense caches, and peers.",
     "Bytes a second are those of the keys and values that a step reads, beside what plain reads of as much memory reach.",
     cmd_bench_decode},
    {"bench", "topk", VERB_BENCH_TOPK, "[options]", "Times the selection of codes, beside a plain quickselect.", NULL, cmd_bench_topk},
    {"bench", "model", VERB_BENCH_MODEL, "-m MODEL [options]",
     "Times a model at several depths of context: prefill, decode steps and attention's share, dense, with SFA, and llama.cpp.", NULL,
     cmd_bench_model},
    {"plan", NULL, VERB_PLAN, "[options]", "Tells how attention of a shape would be computed, and what it should cost.",
     "A LIST is separated by commas; every combination is planned.", cmd_plan},
    {"eval", "nll", VERB_EVAL, "-m MODEL (-f FILE | --tokens LIST) [options]",
     "Scores each token of a text: its negative log-likelihood after those before it.",
     "A text longer than the context is read in windows; each token is scored once.", cmd_eval_nll},
    {"eval", "ppl", VERB_EVAL_PPL, "-m MODEL -f FILE [options]", "Perplexity of a text in strided windows, and its loss by place.", NULL,
     cmd_eval_ppl},
    TASK("hellaswag", "HellaSwag: how a scene goes on."),
    TASK("piqa", "PIQA: which of two ways works."),
    TASK("arc_easy", "ARC, the easy questions."),
    TASK("arc_challenge", "ARC, the hard questions."),
    TASK("winogrande", "WinoGrande: who is meant."),
    TASK("openbookqa", "OpenBookQA: elementary science."),
    TASK("lambada", "LAMBADA: the last word of a passage."),
    TASK("gsm8k", "GSM8K: word problems, answers generated; wants --shots-file, or --shots 0."),
    TASK("pubmedqa", "PubMedQA: yes, no or maybe after an abstract."),
    TASK("scitldr", "SciTLDR: a sentence on an abstract, by ROUGE."),
    TASK("kv", "Key-value retrieval, as in Lost in the Middle."),
    TASK("listops", "ListOps of Long Range Arena, for models trained on sfa data listops."),
    {"eval", "niah", VERB_EVAL_NIAH, "-m MODEL -f TEXT [options]", "A needle in a haystack: a sentence in a long text, at several depths.",
     NULL, cmd_eval_task},
    {"train", NULL, VERB_TRAIN, "--config FILE --data PATH -o DIR [options]", "Trains a model, dense or with SFA, on token shards.",
     "Ctrl-C saves and ends; --resume goes on, after any interruption, to the same result.", cmd_train},
    {"finetune", NULL, VERB_FINETUNE, "-m DIR --data PATH --validation PATH -o DIR [options]",
     "Converts a dense model to sparse attention, and reports what that cost.",
     "The recipe is that of a conversion; --config and --set replace members of it (docs/TRAINING.md).", cmd_finetune},
    {"export", NULL, VERB_EXPORT, "-m DIR --gguf FILE [options]", "Writes a model as a GGUF file.", NULL, cmd_export},
    {"demo", NULL, VERB_DEMO, "-m MODEL -f FILE [options]",
     "Reads a long text with dense attention and with several kinds of SFA, side by side.",
     "The text is cut to the context. The result is a table, a picture and the numbers as JSON.", cmd_demo},
    {"explain", NULL, VERB_EXPLAIN, "-m MODEL (-f FILE | --index FILE | -p TEXT) [options]",
     "Shows the passages that the last token of a text looks at, and the features behind each look.",
     "-f or --index is the document, -p the question after it. Weights are means over the heads asked for.", cmd_explain},
    {"inspect", NULL, VERB_INSPECT, "-m MODEL -f FILE [options]",
     "Reports how the heads use their features over a text: dead and hot ones, overlap, how many keys hold the softmax.",
     "The text is cut to the context. The result is a table, a picture and the numbers as JSON.", cmd_inspect},
};
enum { N_VERBS = sizeof verbs / sizeof *verbs };

static void print_help(void) {
  printf("sfa " SFA_VERSION ": language models with sparse feature attention\n\nusage: sfa VERB [options]\n\n");
  for (const app_verb *v = verbs; v < verbs + N_VERBS; v++)
    printf("  %s%s%-*s%s\n", v->name, v->second ? " " : "", 20 - (int)strlen(v->name) - (v->second != NULL), v->second ? v->second : "",
           v->summary);
  printf("\nsfa VERB --help tells a verb's options; sfa --version the version.\n");
}

static int unknown_verb(const char *name) {
  const char *names[N_VERBS];
  for (int i = 0; i < N_VERBS; i++)
    names[i] = verbs[i].name;
  const char *near = nearest_word(name, names, N_VERBS);
  return app_usage("no verb \"%s\"%s%s%s; see sfa --help", name, near ? "; did you mean " : "", near ? near : "", near ? "?" : "");
}

static int run_verb(const app_verb *v, int argc, char **argv, int first) {
  app_options o = options_default;
  o.second = v->second;
  int status = options_read(v, argc, argv, first, &o);
  if (!status && o.help) {
    options_help(v);
    status = app_flush();
  } else if (!status) {
    status = v->run(&o);
  }
  options_free(&o);
  return status;
}

/* Is there a verb of these two words? */
static bool is_second(const char *name, const char *second) {
  for (const app_verb *v = verbs; v < verbs + N_VERBS; v++)
    if (v->second && strcmp(v->name, name) == 0 && strcmp(v->second, second) == 0)
      return true;
  return false;
}

/* Verbs of two words; v is the first row with the first word. */
static int run_second(const app_verb *v, int argc, char **argv) {
  char words[128] = "";
  bool help = argc > 2 && (strcmp(argv[2], "--help") == 0 || strcmp(argv[2], "-h") == 0);
  for (const app_verb *row = v; row < verbs + N_VERBS && strcmp(row->name, v->name) == 0; row++) {
    if (argc > 2 && strcmp(argv[2], row->second) == 0)
      return run_verb(row, argc, argv, 3);
    snprintf(words + strlen(words), sizeof words - strlen(words), "%s%s", *words ? "|" : "", row->second);
    if (help) {
      if (row > v)
        putchar('\n');
      options_help(row);
    }
  }
  return help ? app_flush() : app_usage("%s what? sfa %s %s; see sfa %s --help", v->name, v->name, words, v->name);
}

/* OpenMP's idle threads spin by default. Beside any other busy process they take the time that the working ones need: decode was seen to
 * run 40 times slower. The runtime reads its policy before main, so the command starts itself once more with it set, unless the user has
 * set one. */
static void wait_without_spinning(char **argv) {
  char path[PATH_MAX];
  ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
  if (getenv("OMP_WAIT_POLICY") || length <= 0 || setenv("OMP_WAIT_POLICY", "passive", 1) != 0)
    return;
  path[length] = '\0';
  execv(path, argv); /* returns only where it fails: then the command goes on as it is */
}

/* A stream that the caller has closed is opened on nothing, so that no file or pipe gets its number: reading ends at once, and what is
 * written to standard output still fails. */
static void open_streams(void) {
  for (int fd = 0; fd <= STDERR_FILENO; fd++)
    if (fcntl(fd, F_GETFD) < 0)
      open("/dev/null", fd == STDERR_FILENO ? O_WRONLY : O_RDONLY); /* takes the lowest number that is free */
}

int main(int argc, char **argv) {
  open_streams();
  wait_without_spinning(argv);
  signal(SIGPIPE, SIG_IGN); /* a closed pipe is an error of the write */
  if (argc < 2)
    return app_usage("which verb? see sfa --help");
  if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0) {
    print_help();
    return app_flush();
  }
  if (strcmp(argv[1], "--version") == 0) {
    printf("sfa " SFA_VERSION "\n");
    return app_flush();
  }
  for (const app_verb *v = verbs; v < verbs + N_VERBS; v++) {
    if (strcmp(argv[1], v->name) != 0)
      continue;
    if (!v->second && argc > 2 && is_second(v->name, argv[2]))
      continue;
    if (!v->second)
      return run_verb(v, argc, argv, 2);
    return run_second(v, argc, argv);
  }
  return unknown_verb(argv[1]);
}
