/* sfa: the verb table. */
#include "app.h"

#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const app_verb verbs[] = {
    {"generate", NULL, VERB_GENERATE, "-m MODEL (-p TEXT | -f FILE) [options]",
     "Continues a text, or answers it where the model has a chat template.", "Only the new text goes to standard output.", cmd_generate},
    {"chat", NULL, VERB_CHAT, "-m MODEL [options]", "Holds a conversation, line by line.",
     "/reset forgets it, /exit or Ctrl-D ends it, Ctrl-C stops an answer.", cmd_chat},
    {"info", NULL, VERB_INFO, "-m MODEL [options]", "Tells what a model file holds, and what its KV cache takes, dense and with SFA.", NULL,
     cmd_info},
    {"tokenize", NULL, VERB_TOKENIZE, "(-m MODEL | --tokenizer FILE) (-p TEXT | -f FILE) [options]", "Shows the tokens of a text.", NULL,
     cmd_tokenize},
    {"bench", "attention", VERB_BENCH, "[options]", "Times one head of attention: the dense twin against SFA, over random rows.",
     "SFA starts from dense rows too: top-k and packing are in its time. A LIST is separated by commas; every combination is run.",
     cmd_bench_attention},
    {"eval", "nll", VERB_EVAL, "-m MODEL (-f FILE | --tokens LIST) [options]",
     "Scores each token of a text: its negative log-likelihood after those before it.",
     "A text longer than the context is read in windows; each token is scored once.", cmd_eval_nll},
    {"demo", NULL, VERB_DEMO, "-m MODEL -f FILE [options]",
     "Reads a long text with dense attention and with several kinds of SFA, side by side.",
     "The text is cut to the context. The result is a table, a picture and the numbers as JSON.", cmd_demo},
};
enum { N_VERBS = sizeof verbs / sizeof *verbs };

static void print_help(void) {
  printf("sfa " SFA_VERSION ": language models with sparse feature attention\n\nusage: sfa VERB [options]\n\n");
  for (const app_verb *v = verbs; v < verbs + N_VERBS; v++)
    printf("  %s%s%-*s%s\n", v->name, v->second ? " " : "", 17 - (int)strlen(v->name) - (v->second != NULL), v->second ? v->second : "",
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

int main(int argc, char **argv) {
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
    if (!v->second)
      return run_verb(v, argc, argv, 2);
    if (argc > 2 && strcmp(argv[2], v->second) == 0)
      return run_verb(v, argc, argv, 3);
    if (argc > 2 && argv[2][0] == '-' && (strcmp(argv[2], "--help") == 0 || strcmp(argv[2], "-h") == 0))
      return run_verb(v, 3, argv, 2);
    return app_usage("%s what? sfa %s %s; see sfa %s --help", v->name, v->name, v->second, v->name);
  }
  return unknown_verb(argv[1]);
}
