/* fuzz_case.h: what the fuzz targets share: a context, a directory of files in memory, and a look at all that a reader offers. A broken
 * promise ends the process, which is what a fuzzer looks for. */
#ifndef SFA_FUZZ_CASE_H
#define SFA_FUZZ_CASE_H

#include <sfa/engine.h>

#include "file/weights.h"

/* The one call of a target; libFuzzer's name. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

sfa_context *fuzz_context(void);
/* The path of a file in this process's own directory; the directory itself for "". Valid until the next call. */
const char *fuzz_path(const char *name);
void fuzz_write(const char *name, const void *data, size_t bytes);
/* Writes a copy on which `repair` has set checksums right, so that what lies behind them is reached; an input that begins with a zero byte
 * goes as it is. */
void fuzz_write_repaired(const char *name, const uint8_t *data, size_t bytes, void (*repair)(uint8_t *data, size_t bytes));
/* What a reader of the file must hold to: something is given on success alone, and an error names the file. */
void fuzz_check_open(sfa_status status, const char *name, const void *given);
void fuzz_remove(const char *name);

/* An input that stands for several files has a line "%%" between them: the first such line, or NULL, and what follows it. */
const uint8_t *fuzz_find_line(const uint8_t *data, size_t bytes, const uint8_t **rest);

/* Stops the process if the condition does not hold. */
void fuzz_check(bool condition, const char *what);

/* Opens the model there and reads every value, and the first and last block of every tensor; NULL if it is refused. */
sfa_weights *fuzz_open(const char *path);
/* Encodes and decodes a few texts. Takes what a loader gave, and closes it. */
void fuzz_tokenizer(sfa_status status, sfa_tokenizer *tokenizer);

#endif
