/* train/train_log.h: the log of a training, a JSON object a line, "step" first and rising. */
#ifndef SFA_TRAIN_LOG_H
#define SFA_TRAIN_LOG_H

#include "file/json.h"

typedef struct sfa_train_log {
  sfa_context *ctx;
  char *path;
  int file;
} sfa_train_log;

/* Opens or makes it and cuts off what lies behind `step`: lines that a stopped run wrote after its last checkpoint, and half a line. */
sfa_status sfa_train_log_open(sfa_context *ctx, const char *path, int64_t step, sfa_train_log *log);
void sfa_train_log_close(sfa_train_log *log);
/* Appends a line; takes it (NULL: out of memory). */
sfa_status sfa_train_log_add(sfa_train_log *log, cJSON *line);

#endif
