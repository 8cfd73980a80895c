/* A folder for what tests write, and files in one go. Included after cmocka.h. */
#ifndef SFA_TEMP_FILES_H
#define SFA_TEMP_FILES_H

#include <ftw.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { TEMP_DIR_BYTES = 40, TEMP_PATH_BYTES = 320 };

/* In memory where that is offered: the tests write tens of thousands of files. */
static inline void make_temp_dir(char dir[TEMP_DIR_BYTES]) {
  snprintf(dir, TEMP_DIR_BYTES, "%s/sfa_test_XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
  assert_non_null(mkdtemp(dir));
}

static inline int remove_entry(const char *path, const struct stat *info, int type, struct FTW *at) {
  (void)info, (void)type, (void)at;
  return remove(path);
}

static inline void remove_tree(const char *dir) { nftw(dir, remove_entry, 16, FTW_DEPTH | FTW_PHYS); }

/* The folder of a group of tests, which has these two as its set-up and tear-down, or calls them there. */
static char temp_dir[TEMP_DIR_BYTES];

static inline int temp_begin(void **state) {
  (void)state;
  make_temp_dir(temp_dir);
  return 0;
}

static inline int temp_end(void **state) {
  (void)state;
  remove_tree(temp_dir);
  return 0;
}

/* A path in it; eight may be in use at once. */
static inline const char *in_temp(const char *name) {
  static char paths[8][TEMP_PATH_BYTES];
  static int next;
  char *path = paths[next++ % 8];
  snprintf(path, TEMP_PATH_BYTES, "%s/%s", temp_dir, name);
  return path;
}

/* The whole file, NUL-terminated; bytes may be NULL. */
static inline char *read_whole(const char *path, size_t *bytes) {
  FILE *file = fopen(path, "rb");
  if (!file)
    fail_msg("cannot open %s", path);
  size_t len = 0, capacity = 1 << 16;
  char *data = malloc(capacity);
  for (size_t n; (n = fread(data + len, 1, capacity - len - 1, file)) > 0;) {
    len += n;
    if (len + 1 == capacity)
      data = realloc(data, capacity *= 2);
    assert_non_null(data);
  }
  fclose(file);
  data[len] = 0;
  if (bytes)
    *bytes = len;
  return data;
}

static inline void write_whole(const char *path, const void *data, size_t bytes) {
  FILE *file = fopen(path, "wb");
  assert_non_null(file);
  assert_int_equal(bytes ? fwrite(data, 1, bytes, file) : 0, bytes);
  assert_int_equal(fclose(file), 0);
}

static inline bool same_files(const char *a, const char *b) {
  size_t n, m;
  char *x = read_whole(a, &n), *y = read_whole(b, &m);
  const bool same = n == m && memcmp(x, y, n) == 0;
  free(x);
  free(y);
  return same;
}

/* A directory with the tensors of a Hugging Face directory, and its config.json with one text replaced; to be removed by the caller. */
static inline void make_variant(const char *source, const char *from, const char *to, char directory[TEMP_DIR_BYTES]) {
  char path[640], tensors[640];
  snprintf(path, sizeof path, "%s/config.json", source);
  char *config = read_whole(path, NULL), *at = strstr(config, from);
  if (!at)
    fail_msg("%s does not hold %s", path, from);
  make_temp_dir(directory);
  snprintf(path, sizeof path, "%s/config.json", directory);
  FILE *file = fopen(path, "wb");
  assert_non_null(file);
  fprintf(file, "%.*s%s%s", (int)(at - config), config, to, at + strlen(from));
  fclose(file);
  snprintf(path, sizeof path, "%s/model.safetensors", directory);
  snprintf(tensors, sizeof tensors, "%s/model.safetensors", source);
  assert_int_equal(symlink(tensors, path), 0);
  free(config);
}

#endif
