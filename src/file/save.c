/* Files that replace others in one step. */
#include "file/save.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BUFFER_BYTES = 1 << 20 };
static const char suffix[] = ".part";

struct sfa_save {
  sfa_context *ctx;
  char *path, *part;
  int file;
  uint64_t bytes; /* those in the buffer included */
  size_t filled;
  uint8_t *buffer; /* [BUFFER_BYTES] */
};

static sfa_status fail_errno(const sfa_save *save, const char *what) {
  int reason = errno;
  bool full = reason == ENOSPC || reason == EDQUOT || reason == EFBIG;
  return sfa_fail(save->ctx, SFA_ERROR_IO, "cannot %s %s: %s%s", what, save->path, strerror(reason),
                  full ? "; make room and try again, nothing that was there is lost" : "");
}

static void release(sfa_save *save) {
  if (save->file >= 0)
    close(save->file);
  sfa_context *ctx = save->ctx;
  sfa_free(ctx, save->path);
  sfa_free(ctx, save->part);
  sfa_free(ctx, save->buffer);
  sfa_free(ctx, save);
}

static sfa_status open_part(sfa_save *save, const char *path) {
  size_t bytes = strlen(path) + sizeof suffix;
  struct stat info;
  if (stat(path, &info) == 0 && !S_ISREG(info.st_mode)) /* a device or a folder would be gone */
    return sfa_fail(save->ctx, SFA_ERROR_IO, "cannot replace %s: it is not a regular file; give another name", path);
  SFA_TRY(sfa_strdup(save->ctx, path, &save->path));
  SFA_TRY(sfa_alloc(save->ctx, bytes, "a path", (void **)&save->part));
  SFA_TRY(sfa_alloc(save->ctx, BUFFER_BYTES, "bytes to be written", (void **)&save->buffer));
  snprintf(save->part, bytes, "%s%s", path, suffix);
  save->file = open(save->part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  return save->file >= 0 ? SFA_OK : fail_errno(save, "make");
}

sfa_status sfa_save_begin(sfa_context *ctx, const char *path, sfa_save **out) {
  sfa_save *save;
  *out = NULL;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *save, "the writer of a file", (void **)&save));
  save->ctx = ctx;
  save->file = -1;
  sfa_status status = open_part(save, path);
  if (status == SFA_OK)
    *out = save;
  else
    release(save);
  return status;
}

static sfa_status write_out(sfa_save *save, const uint8_t *from, size_t bytes) {
  while (bytes) {
    ssize_t n = write(save->file, from, bytes);
    if (n < 0 && errno == EINTR)
      continue;
    if (n == 0)
      errno = EIO;
    if (n <= 0)
      return fail_errno(save, "write");
    from += n;
    bytes -= (size_t)n;
  }
  return SFA_OK;
}

static sfa_status flush(sfa_save *save) {
  size_t filled = save->filled;
  save->filled = 0;
  return write_out(save, save->buffer, filled);
}

sfa_status sfa_save_write(sfa_save *save, const void *data, size_t bytes) {
  if (bytes > BUFFER_BYTES - save->filled)
    SFA_TRY(flush(save));
  save->bytes += bytes;
  if (bytes > BUFFER_BYTES)
    return write_out(save, data, bytes);
  if (bytes)
    memcpy(save->buffer + save->filled, data, bytes);
  save->filled += bytes;
  return SFA_OK;
}

sfa_status sfa_save_align(sfa_save *save, size_t alignment) {
  static const uint8_t zeros[64];
  for (size_t left = (alignment - save->bytes % alignment) % alignment, n; left; left -= n) {
    n = left < sizeof zeros ? left : sizeof zeros;
    SFA_TRY(sfa_save_write(save, zeros, n));
  }
  return SFA_OK;
}

uint64_t sfa_save_bytes(const sfa_save *save) { return save->bytes; }

/* The new name is safe once its folder is on the disk; a file system that cannot say so is let be. */
static void confirm_folder(sfa_save *save) {
  char *slash = strrchr(save->path, '/');
  const char *folder = slash ? save->path : ".";
  if (slash)
    slash[slash == save->path] = 0; /* the path is not needed any more */
  int file = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (file >= 0) {
    fsync(file);
    close(file);
  }
}

sfa_status sfa_save_commit(sfa_save *save) {
  sfa_status status = flush(save);
  if (status == SFA_OK && fsync(save->file) != 0)
    status = fail_errno(save, "write");
  if (status == SFA_OK && rename(save->part, save->path) != 0)
    status = fail_errno(save, "name");
  if (status == SFA_OK)
    confirm_folder(save);
  else
    unlink(save->part);
  release(save);
  return status;
}

void sfa_save_abandon(sfa_save *save) {
  if (!save)
    return;
  unlink(save->part);
  release(save);
}

sfa_status sfa_save_file(sfa_context *ctx, const char *path, const void *data, size_t bytes) {
  sfa_save *save;
  SFA_TRY(sfa_save_begin(ctx, path, &save));
  sfa_status status = sfa_save_write(save, data, bytes);
  if (status == SFA_OK)
    return sfa_save_commit(save);
  sfa_save_abandon(save);
  return status;
}

sfa_status sfa_save_folder(sfa_context *ctx, const char *path) {
  char *at;
  SFA_TRY(sfa_strdup(ctx, path, &at));
  bool made = true;
  for (char *slash = strchr(at + (*at == '/'), '/'); slash && made; slash = strchr(slash + 1, '/')) {
    *slash = 0;
    made = mkdir(at, 0777) == 0 || errno == EEXIST;
    *slash = '/';
  }
  struct stat info;
  made = made && (mkdir(at, 0777) == 0 || (errno == EEXIST && stat(at, &info) == 0 && S_ISDIR(info.st_mode)));
  int reason = errno;
  sfa_free(ctx, at);
  return made ? SFA_OK : sfa_fail(ctx, SFA_ERROR_IO, "cannot make the folder %s: %s", path, strerror(reason));
}

sfa_status sfa_save_path(sfa_context *ctx, const char *folder, const char *name, char **path) {
  size_t bytes = strlen(folder) + strlen(name) + 2;
  SFA_TRY(sfa_alloc(ctx, bytes, "a path", (void **)path));
  snprintf(*path, bytes, "%s%s%s", folder, *folder && folder[strlen(folder) - 1] == '/' ? "" : "/", name);
  return SFA_OK;
}
