/* Golden files of the text tests: JSON by the line. Included after cmocka.h. */
#ifndef SFA_TEXT_FILES_H
#define SFA_TEXT_FILES_H

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <sfa/engine.h>

/* The whole file, NUL-terminated. */
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

static inline void write_whole(const char *path, const char *text, size_t bytes) {
  FILE *file = fopen(path, "wb");
  assert_non_null(file);
  assert_int_equal(fwrite(text, 1, bytes, file), bytes);
  assert_int_equal(fclose(file), 0);
}

/* Calls fn for each line's object; returns how many there were. */
static inline int each_line(const char *path, void (*fn)(const cJSON *line, void *user), void *user) {
  char *text = read_whole(path, NULL), *rest = text;
  int n = 0;
  for (char *line; (line = strsep(&rest, "\n")) != NULL;) {
    if (!*line)
      continue;
    cJSON *json = cJSON_Parse(line);
    if (!json)
      fail_msg("%s, line %d is not JSON", path, n + 1);
    fn(json, user);
    cJSON_Delete(json);
    n++;
  }
  free(text);
  return n;
}

static inline const char *text_of(const cJSON *object, const char *name) {
  return cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, name));
}

#endif
