/* mmap of a whole file. */
#include "base/map.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

sfa_status sfa_map_open(sfa_context *ctx, const char *path, sfa_map *map) {
  *map = (sfa_map){0};
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0)
    return sfa_fail(ctx, SFA_ERROR_IO, "cannot open %s: %s", path, strerror(errno));
  struct stat info;
  if (fstat(file, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(file);
    return sfa_fail(ctx, SFA_ERROR_IO, "%s is not a regular file", path);
  }
  if (info.st_size > 0) {
    void *data = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (data == MAP_FAILED) {
      int reason = errno;
      close(file);
      return sfa_fail(ctx, SFA_ERROR_IO, "cannot map %s: %s", path, strerror(reason));
    }
    map->data = data;
    map->bytes = (size_t)info.st_size;
  }
  close(file);
  return SFA_OK;
}

void sfa_map_close(sfa_map *map) {
  if (map->data)
    munmap((void *)(uintptr_t)map->data, map->bytes);
  *map = (sfa_map){0};
}
