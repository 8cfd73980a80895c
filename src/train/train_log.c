/* JSON lines. */
#include "train/train_log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/map.h"

/* Bytes of the leading lines that are whole and of steps up to `step`. */
static size_t kept_bytes(const sfa_map *map, int64_t step) {
  static const char start[] = "{\"step\":";
  size_t kept = 0;
  while (kept < map->bytes) {
    const char *line = (const char *)map->data + kept, *end = memchr(line, '\n', map->bytes - kept);
    if (!end || (size_t)(end - line) < sizeof start || memcmp(line, start, sizeof start - 1) != 0 ||
        strtoll(line + sizeof start - 1, NULL, 10) > step)
      return kept;
    kept += (size_t)(end - line) + 1;
  }
  return kept;
}

sfa_status sfa_train_log_open(sfa_context *ctx, const char *path, int64_t step, sfa_train_log *log) {
  *log = (sfa_train_log){.ctx = ctx, .file = -1};
  SFA_TRY(sfa_strdup(ctx, path, &log->path));
  sfa_map map = {0};
  sfa_status status = SFA_OK;
  log->file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (log->file < 0)
    status = sfa_fail(ctx, SFA_ERROR_IO, "cannot open %s: %s", path, strerror(errno));
  if (status == SFA_OK)
    status = sfa_map_open(ctx, path, &map);
  if (status == SFA_OK && ftruncate(log->file, (off_t)kept_bytes(&map, step)) != 0)
    status = sfa_fail(ctx, SFA_ERROR_IO, "cannot shorten %s: %s", path, strerror(errno));
  sfa_map_close(&map);
  if (status != SFA_OK)
    sfa_train_log_close(log);
  return status;
}

void sfa_train_log_close(sfa_train_log *log) {
  if (!log->ctx)
    return;
  if (log->file >= 0)
    close(log->file);
  sfa_free(log->ctx, log->path);
  *log = (sfa_train_log){.file = -1};
}

static sfa_status append(sfa_train_log *log, const char *text, size_t bytes) {
  while (bytes) {
    ssize_t n = write(log->file, text, bytes);
    if (n < 0 && errno == EINTR)
      continue;
    if (n <= 0)
      return sfa_fail(log->ctx, SFA_ERROR_IO, "cannot write %s: %s; the checkpoints are intact: make room and resume", log->path,
                      strerror(n ? errno : EIO));
    text += n;
    bytes -= (size_t)n;
  }
  return SFA_OK;
}

sfa_status sfa_train_log_add(sfa_train_log *log, cJSON *line) {
  char *text = line ? cJSON_PrintUnformatted(line) : NULL;
  cJSON_Delete(line);
  if (!text)
    return sfa_fail(log->ctx, SFA_ERROR_MEMORY, "out of memory for a line of %s", log->path);
  size_t bytes = strlen(text);
  text[bytes] = '\n'; /* one write, so that a line is rarely torn */
  sfa_status status = append(log, text, bytes + 1);
  cJSON_free(text);
  return status;
}
