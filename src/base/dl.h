/* base/dl.h: shared objects that are loaded when they are wanted, so that one program runs on machines that lack what they need. */
#ifndef SFA_DL_H
#define SFA_DL_H

#include "base/context.h"

/* Loads the shared object `file` and finds its function `symbol`; the object stays until the process ends. Looked for, in this order: the
 * path in the environment variable (that alone, where it is set and not empty), the folder of the program or library that this code is in,
 * the library folder beside it, the installed one, the loader's own path. SFA_ERROR_UNSUPPORTED with a text where it is not found, cannot
 * be loaded or lacks the symbol. */
sfa_status sfa_dl_open(sfa_context *ctx, const char *file, const char *variable, const char *symbol, void **function);

#endif
