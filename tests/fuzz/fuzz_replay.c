/* Stands in for libFuzzer where there is none: runs a target once on every file of a directory, in the order of their names. */
#include "fuzz_case.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>

static bool replay(const char *dir, const char *name) {
  char path[1024];
  snprintf(path, sizeof path, "%s/%s", dir, name);
  FILE *file = fopen(path, "rb");
  if (!file || fseek(file, 0, SEEK_END) != 0)
    return false;
  const size_t bytes = (size_t)ftell(file);
  rewind(file);
  uint8_t *data = malloc(bytes + !bytes); /* exactly as long as the file: the address sanitizer sees a byte too far */
  bool ok = data && fread(data, 1, bytes, file) == bytes;
  fclose(file);
  if (ok)
    LLVMFuzzerTestOneInput(data, bytes);
  free(data);
  return ok;
}

static int is_file(const struct dirent *entry) { return entry->d_name[0] != '.'; }

int main(int argc, char **argv) {
  struct dirent **entries;
  int n = argc == 2 ? scandir(argv[1], &entries, is_file, alphasort) : -1;
  if (n < 1) {
    fprintf(stderr, "usage: %s DIRECTORY (with at least one file)\n", argv[0]);
    return 2;
  }
  int status = 0;
  for (int i = 0; i < n; i++) {
    if (!replay(argv[1], entries[i]->d_name)) {
      fprintf(stderr, "cannot read %s/%s\n", argv[1], entries[i]->d_name);
      status = 1;
    }
    free(entries[i]);
  }
  free(entries);
  printf("%d inputs replayed\n", n);
  sfa_context_free(fuzz_context());
  return status;
}
