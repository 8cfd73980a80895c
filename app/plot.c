/* A picture by gnuplot. */
#include "plot.h"

#include <stdlib.h>
#include <sys/wait.h>

bool plot_available(void) {
  int state = system("gnuplot --version >/dev/null 2>&1");
  return state >= 0 && WIFEXITED(state) && WEXITSTATUS(state) == 0;
}

void plot_text(FILE *plot, const char *text) {
  fputc('"', plot);
  for (; *text; text++) {
    if (*text == '"' || *text == '\\')
      fputc('\\', plot);
    fputc(*text == '\n' ? ' ' : *text, plot);
  }
  fputc('"', plot);
}

FILE *plot_open(const char *png_path, int width, int height) {
  FILE *plot = popen("gnuplot", "w");
  if (!plot)
    return NULL;
  /* The cairo terminal draws better letters; a gnuplot without it still has png. */
  fprintf(plot,
          "if (strstrt(GPVAL_TERMINALS, 'pngcairo')) { set terminal pngcairo size %d,%d noenhanced font 'sans,10' } "
          "else { set terminal png size %d,%d noenhanced }\nset output ",
          width, height, width, height);
  plot_text(plot, png_path);
  fputc('\n', plot);
  return plot;
}

bool plot_close(FILE *plot) {
  if (!plot)
    return false;
  bool written = fflush(plot) == 0 && !ferror(plot);
  int state = pclose(plot);
  return written && state >= 0 && WIFEXITED(state) && WEXITSTATUS(state) == 0;
}
