/* plot.h: a picture by gnuplot, fed through a pipe. */
#ifndef SFA_APP_PLOT_H
#define SFA_APP_PLOT_H

#include <stdbool.h>
#include <stdio.h>

/* True if gnuplot can be run. */
bool plot_available(void);
/* Starts gnuplot with a PNG of that size as its output; what is written to the pipe are its commands. NULL: it could not be started. */
FILE *plot_open(const char *png_path, int width, int height);
/* Ends it; false if gnuplot met an error. Takes NULL. */
bool plot_close(FILE *plot);
/* A text inside double quotes of gnuplot. */
void plot_text(FILE *plot, const char *text);

#endif
