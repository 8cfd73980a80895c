/* json_get PATH...: reads one JSON document from standard input and prints what lies at each path, one a line. A path is names and indices
 * with dots ("0.peak_bytes"); "#" at its end asks for the number of members, "keys" for the names of an object. Exit 1: no valid JSON, or
 * nothing there. */
#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char *read_all(FILE *file) {
  size_t n = 0, capacity = 1 << 16;
  char *text = malloc(capacity);
  while (text) {
    n += fread(text + n, 1, capacity - n - 1, file);
    text[n] = 0;
    if (feof(file) || ferror(file))
      return text;
    char *more = realloc(text, capacity *= 2);
    if (!more)
      free(text);
    text = more;
  }
  return NULL;
}

/* Prints what a path names; 0 if nothing is there. */
static int print_path(const cJSON *at, char *path) {
  for (char *part = strtok(path, "."); part; part = strtok(NULL, ".")) {
    if (strcmp(part, "#") == 0) {
      printf("%d\n", cJSON_GetArraySize(at));
      return 1;
    }
    if (strcmp(part, "keys") == 0 && cJSON_IsObject(at)) {
      for (const cJSON *member = at->child; member; member = member->next)
        printf("%s%s", member->string, member->next ? " " : "\n");
      return 1;
    }
    at = cJSON_IsArray(at) ? cJSON_GetArrayItem(at, atoi(part)) : cJSON_GetObjectItemCaseSensitive(at, part);
    if (!at)
      return 0;
  }
  if (cJSON_IsString(at)) {
    puts(at->valuestring);
    return 1;
  }
  char *text = cJSON_PrintUnformatted(at);
  if (text)
    puts(text);
  cJSON_free(text);
  return text != NULL;
}

int main(int argc, char **argv) {
  char *text = read_all(stdin);
  const char *end = NULL;
  cJSON *document = text ? cJSON_ParseWithOpts(text, &end, 1) : NULL;
  if (!document)
    fprintf(stderr, "json_get: no valid JSON: %.80s\n", text ? text : "");
  int found = document != NULL;
  for (int i = 1; found && i < argc; i++) {
    char name[256];
    snprintf(name, sizeof name, "%s", argv[i]);
    found = print_path(document, argv[i]);
    if (!found)
      fprintf(stderr, "json_get: nothing at %s\n", name);
  }
  cJSON_Delete(document);
  free(text);
  return !found;
}
