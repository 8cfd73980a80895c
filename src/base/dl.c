/* dlopen in the places where a shared object of ours may lie. */
#include "base/dl.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The folder of a path, without its last '/'; false: it names none. */
static bool folder_of(const char *path, char folder[PATH_MAX]) {
  const char *slash = path ? strrchr(path, '/') : NULL;
  if (!slash || slash - path >= PATH_MAX)
    return false;
  memcpy(folder, path, (size_t)(slash - path));
  folder[slash - path] = 0;
  return true;
}

/* Of the library that this function is in, or of the program it was linked into. */
static bool own_folder(char folder[PATH_MAX]) {
  Dl_info info;
  return dladdr(__builtin_return_address(0), &info) && folder_of(info.dli_fname, folder);
}

static bool program_folder(char folder[PATH_MAX]) {
  char path[PATH_MAX];
  ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
  if (n <= 0)
    return false;
  path[n] = 0;
  return folder_of(path, folder);
}

/* NULL, and nothing said, where there is no such file: the next place is tried. */
static void *open_if_there(const char *path) {
  return access(path, R_OK) == 0 ? dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE) : NULL;
}

static void *open_somewhere(const char *file) {
  static const char *const beside[] = {"", ("/../" SFA_LIBDIR), "/../lib"};
  char folders[2][PATH_MAX], path[PATH_MAX + 64];
  bool known[2] = {own_folder(folders[0]), program_folder(folders[1])};
  for (int i = 0; i < 2; i++)
    for (size_t j = 0; known[i] && j < sizeof beside / sizeof *beside; j++) {
      snprintf(path, sizeof path, "%s%s/%s", folders[i], beside[j], file);
      void *object = open_if_there(path);
      if (object || access(path, R_OK) == 0)
        return object;
    }
  snprintf(path, sizeof path, "%s/%s", SFA_FULL_LIBDIR, file);
  void *object = open_if_there(path);
  return object || access(path, R_OK) == 0 ? object : dlopen(file, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
}

sfa_status sfa_dl_open(sfa_context *ctx, const char *file, const char *variable, const char *symbol, void **function) {
  const char *named = secure_getenv(variable);
  dlerror();
  void *object = named && *named ? dlopen(named, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE) : open_somewhere(file);
  *function = object ? dlsym(object, symbol) : NULL;
  if (*function)
    return SFA_OK;
  const char *reason = dlerror();
  return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED,
                  "%s. Build it with -DSFA_CUDA=ON, put it beside the program or into its library folder, or name it in %s",
                  reason ? reason : file, variable);
}
