/* Peers: bench/peers.py as a child, which answers each line by a line. It says there what the lines are. */
#include "bench.h"

#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST_NAMES = 64, MOST_NOTES = 16 };

typedef struct peer {
  bench_peers *peers;
  int index;
} peer;

struct bench_peers {
  pid_t pid; /* 0: not running */
  int64_t n_threads;
  FILE *to, *from;
  bool lost;
  peer engines[BENCH_MOST_ENGINES]; /* of the cases since the last forget */
  int n_engines;
  char *names[MOST_NAMES], *notes[MOST_NOTES]; /* every name and note once */
};

bench_peers *bench_peers_open(const app_options *o) { return o->peers ? calloc(1, sizeof(bench_peers)) : NULL; }

static void stop(bench_peers *p) {
  if (p->to)
    fclose(p->to);
  if (p->from)
    fclose(p->from);
  if (p->pid > 0)
    waitpid(p->pid, NULL, 0);
  p->to = p->from = NULL;
  p->pid = 0;
  p->n_engines = 0;
}

void bench_peers_close(bench_peers *p) {
  if (!p)
    return;
  stop(p);
  for (int i = 0; i < MOST_NAMES; i++)
    free(p->names[i]);
  for (int i = 0; i < MOST_NOTES; i++)
    free(p->notes[i]);
  free(p);
}

/* The text from a list that owns each text once, or NULL if the list is full. *is_new may be NULL. */
static const char *intern(char **list, int capacity, const char *text, bool *is_new) {
  if (is_new)
    *is_new = false;
  for (int i = 0; i < capacity; i++) {
    if (list[i] && strcmp(list[i], text) == 0)
      return list[i];
    if (!list[i]) {
      if (is_new)
        *is_new = true;
      return list[i] = strdup(text);
    }
  }
  return NULL;
}

/* Says a thing on stderr, the first time only. */
static void note(bench_peers *p, const char *text) {
  bool is_new;
  if (intern(p->notes, MOST_NOTES, text, &is_new) && is_new)
    app_note("peers: %s", text);
}

static void lose(bench_peers *p, const char *why) {
  note(p, why);
  stop(p);
  p->lost = true;
}

/* ---- The child --------------------------------------------------------------------------------------------------------------------- */

static void run_child(const char *script, int64_t n_threads, const int *to, const int *from) {
  const char *python = getenv("SFA_PYTHON");
  char threads[24];
  snprintf(threads, sizeof threads, "%lld", (long long)n_threads);
  dup2(to[0], STDIN_FILENO);
  dup2(from[1], STDOUT_FILENO);
  for (int i = 0; i < 2; i++) {
    close(to[i]);
    close(from[i]);
  }
  execlp(python ? python : "python3", python ? python : "python3", "-W", "ignore", script, threads, (char *)NULL);
  _exit(127);
}

/* DIR/share/sfa/peers.py where the command is DIR/bin/sfa: so in a build and where it is installed. */
static bool script_path(char path[PATH_MAX]) {
  ssize_t n = readlink("/proc/self/exe", path, PATH_MAX - 1);
  if (n <= 0)
    return false;
  path[n] = '\0';
  for (int up = 0; up < 2; up++) {
    char *slash = strrchr(path, '/');
    if (!slash)
      return false;
    *slash = '\0';
  }
  static const char below[] = "/share/sfa/peers.py";
  if (strlen(path) + sizeof below > PATH_MAX)
    return false;
  strcat(path, below);
  return access(path, R_OK) == 0;
}

static bool start(bench_peers *p, int64_t n_threads) {
  char script[PATH_MAX];
  int to[2], from[2];
  if (!script_path(script)) {
    lose(p, "share/sfa/peers.py is not beside the folder of this command; install sfa, or run it where it was built");
    return false;
  }
  fflush(stdout);
  if (pipe(to) != 0)
    return false;
  if (pipe(from) != 0) {
    close(to[0]);
    close(to[1]);
    return false;
  }
  p->n_threads = n_threads;
  p->pid = fork();
  if (p->pid == 0)
    run_child(script, n_threads, to, from);
  close(to[0]);
  close(from[1]);
  p->to = fdopen(to[1], "w");
  p->from = fdopen(from[0], "r");
  if (p->pid > 0 && p->to && p->from)
    return true;
  lose(p, "no child process could be started");
  return false;
}

/* Sends a line and reads the answer, which the caller frees. NULL: the child is gone. */
static char *ask(bench_peers *p, const char *line) {
  char *answer = NULL;
  size_t capacity = 0;
  if (p->to && fprintf(p->to, "%s\n", line) > 0 && fflush(p->to) == 0 && getline(&answer, &capacity, p->from) > 0) {
    answer[strcspn(answer, "\n")] = '\0';
    return answer;
  }
  free(answer);
  lose(p, "the child process is gone; it wants a Python 3, which SFA_PYTHON can name");
  return NULL;
}

/* ---- Engines ------------------------------------------------------------------------------------------------------------------------ */

/* The nanoseconds of processor time that the child and its threads have had; 0 if the system does not tell. */
static int64_t child_cpu_ns(pid_t pid) {
  clockid_t clock;
  struct timespec used;
  if (clock_getcpuclockid(pid, &clock) != 0 || clock_gettime(clock, &used) != 0)
    return 0;
  return (int64_t)used.tv_sec * 1000000000 + used.tv_nsec;
}

/* Threads of the child spin after their work (those of OpenBLAS for a tenth of a second). They shall not do so in the next engine's time:
 * waits until the child takes less than a twentieth of one processor, at most a second. */
static void let_threads_rest(void *arg) {
  enum { PAUSE_NS = 10000000, MOST_PAUSES = 100 }; /* long beside the ticks by which some systems count */
  pid_t pid = ((const peer *)arg)->peers->pid;
  int64_t before = pid > 0 ? child_cpu_ns(pid) : 0;
  for (int i = 0; i < MOST_PAUSES; i++) {
    nanosleep(&(struct timespec){.tv_nsec = PAUSE_NS}, NULL);
    int64_t now = pid > 0 ? child_cpu_ns(pid) : 0;
    if (now - before < PAUSE_NS / 20)
      return;
    before = now;
  }
}

static int run_engine(void *arg, double *ms, int64_t *stage_ns) {
  (void)stage_ns;
  const peer *e = arg;
  char line[32], *answer;
  snprintf(line, sizeof line, "run %d", e->index);
  if (!(answer = ask(e->peers, line)))
    return EXIT_FAILED;
  char *end;
  *ms = strtod(answer, &end);
  bool good = end > answer && *ms > 0;
  if (!good)
    note(e->peers, answer);
  free(answer);
  return good ? EXIT_OK : EXIT_FAILED;
}

void bench_peers_forget(bench_peers *p) {
  if (p && p->pid > 0)
    free(ask(p, "forget"));
  if (p)
    p->n_engines = 0;
}

static void add_engine(bench_peers *p, const cJSON *described, bench_engine *engines, int *n_engines) {
  const char *name = cJSON_GetStringValue(cJSON_GetObjectItem(described, "name"));
  const char *version = cJSON_GetStringValue(cJSON_GetObjectItem(described, "version"));
  const cJSON *setup = cJSON_GetObjectItem(described, "setup_ms");
  int index = p->n_engines++; /* the child counts every engine */
  if (!name || !version || index >= BENCH_MOST_ENGINES || *n_engines >= BENCH_MOST_ENGINES)
    return;
  p->engines[index] = (peer){p, index};
  bench_engine *e = &engines[*n_engines];
  e->name = intern(p->names, MOST_NAMES, name, NULL);
  e->version = intern(p->names, MOST_NAMES, version, NULL);
  e->run = run_engine;
  e->rest = let_threads_rest;
  e->arg = &p->engines[index];
  e->optional = true;
  e->lost = false;
  e->setup_ms = cJSON_IsNumber(setup) ? setup->valuedouble : NAN;
  *n_engines += e->name && e->version;
}

void bench_peers_add(bench_peers *p, int64_t n_threads, cJSON *bench_case, bench_engine *engines, int *n_engines) {
  char *line = p && !p->lost ? cJSON_PrintUnformatted(bench_case) : NULL;
  cJSON_Delete(bench_case);
  if (!line)
    return;
  if (p->pid > 0 && p->n_threads != n_threads)
    stop(p);
  char *answer = p->pid > 0 || start(p, n_threads) ? ask(p, line) : NULL;
  cJSON *reply = answer ? cJSON_Parse(answer) : NULL;
  if (answer && !reply)
    note(p, answer);
  const cJSON *entry;
  cJSON_ArrayForEach(entry, cJSON_GetObjectItem(reply, "missing")) note(p, cJSON_GetStringValue(entry));
  cJSON_ArrayForEach(entry, cJSON_GetObjectItem(reply, "engines")) add_engine(p, entry, engines, n_engines);
  cJSON_Delete(reply);
  cJSON_free(line);
  free(answer);
}
