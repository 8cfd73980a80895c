/* Ctrl-C as a flag, and the progress line that also asks for it. */
#include "app.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static volatile sig_atomic_t stop_asked;

static void on_interrupt(int number) {
  (void)number;
  if (stop_asked)
    _exit(EXIT_INTERRUPTED);
  stop_asked = 1;
}

void interrupt_begin(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = on_interrupt; /* no SA_RESTART: a line being read ends too */
  sigaction(SIGINT, &action, NULL);
}

bool interrupted(void) { return stop_asked; }
void interrupt_clear(void) { stop_asked = 0; }

int progress_step(void *user, int64_t done, int64_t total) {
  progress *p = user;
  double passed = seconds_now() - p->start;
  done += p->before;
  total = p->total ? p->total : total;
  if (isatty(STDERR_FILENO) && passed > 0.5) {
    double rate = (double)done / passed;
    const char *unit = p->unit ? p->unit : "tokens";
    fprintf(stderr, "\r\033[K%s: %lld of %lld %s, %.*f %s/s, about %.0f s left", p->what, (long long)done, (long long)total, unit,
            rate < 10, rate, unit, (double)(total - done) / rate);
    fflush(stderr);
    p->shown = true;
  }
  return interrupted();
}

void progress_clear(progress *p) {
  if (p->shown)
    fputs("\r\033[K", stderr);
  p->shown = false;
}
