/* Golden files of the text tests: JSON by the line. Included after cmocka.h. */
#ifndef SFA_TEXT_FILES_H
#define SFA_TEXT_FILES_H

#include <cjson/cJSON.h>

#include <sfa/engine.h>

#include "temp_files.h"

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
