/* JSON by cJSON. Its nesting limit (1000) bounds the stack; a text with a NUL inside is refused, for cJSON would stop there. */
#include "file/json.h"

#include "base/map.h"
#include "file/save.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

sfa_status sfa_json_parse(sfa_context *ctx, const char *path, const char *text, size_t bytes, cJSON **json) {
  char *copy;
  *json = NULL;
  if (bytes >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0) /* byte order mark */
    text += 3, bytes -= 3;
  const char *nul = bytes ? memchr(text, 0, bytes) : NULL;
  if (nul)
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s: a zero byte at offset %zu of the JSON text: download the file again", path,
                    (size_t)(nul - text));
  /* A copy with zeros behind it: cJSON looks one byte beyond where it stopped. */
  SFA_TRY(sfa_alloc(ctx, bytes + 2, "a JSON text", (void **)&copy));
  if (bytes)
    memcpy(copy, text, bytes);
  copy[bytes] = copy[bytes + 1] = 0;
  const char *end = NULL;
  cJSON *root = cJSON_ParseWithLengthOpts(copy, bytes + 1, &end, true);
  size_t offset = end ? (size_t)(end - copy) : 0;
  sfa_free(ctx, copy);
  if (!root)
    return sfa_fail(ctx, SFA_ERROR_FORMAT,
                    "%s: not valid JSON at offset %zu of %zu: mend it there, or download it again if it is cut short", path, offset, bytes);
  if (!cJSON_IsObject(root)) {
    cJSON_Delete(root);
    return sfa_fail(ctx, SFA_ERROR_FORMAT, "%s: its JSON is not an object { ... }: mend it, or download it again", path);
  }
  *json = root;
  return SFA_OK;
}

sfa_status sfa_json_load(sfa_context *ctx, const char *path, size_t max_bytes, cJSON **json) {
  sfa_map map;
  *json = NULL;
  SFA_TRY(sfa_map_open(ctx, path, &map));
  sfa_status status;
  if (map.bytes > max_bytes)
    status =
        sfa_fail(ctx, SFA_ERROR_FORMAT, "%s has %zu bytes, at most %zu are expected: is it the right file?", path, map.bytes, max_bytes);
  else
    status = sfa_json_parse(ctx, path, (const char *)map.data, map.bytes, json);
  sfa_map_close(&map);
  return status;
}

/* Whole numbers as such, others in the fewest digits, with a point whatever mark the host's locale has. */
static void write_number(double x, char text[32]) {
  int digits = 15;
  if (x == floor(x) && fabs(x) <= 0x1p53) {
    snprintf(text, 32, "%.0f", x);
    return;
  }
  do
    snprintf(text, 32, "%.*g", digits, x);
  while (strtod(text, NULL) != x && digits++ < 17);
  char *mark = text + strspn(text, "-0123456789");
  if (!*mark || *mark == 'e')
    return;
  char *behind = mark + strcspn(mark, "0123456789");
  *mark = '.';
  memmove(mark + 1, behind, strlen(behind) + 1);
}

/* item and all that follow it in its list. What is not finite stays as it is: JSON has no word for it. */
static bool spell_out(cJSON *item) {
  for (; item; item = item->next) {
    if (cJSON_IsNumber(item) && isfinite(item->valuedouble)) {
      if (!(item->valuestring = cJSON_malloc(32)))
        return false;
      write_number(item->valuedouble, item->valuestring);
      item->type = cJSON_Raw;
    }
    if (!spell_out(item->child))
      return false;
  }
  return true;
}

cJSON *sfa_json_exact(const cJSON *json) {
  cJSON *copy = cJSON_Duplicate(json, true);
  if (copy && spell_out(copy))
    return copy;
  cJSON_Delete(copy);
  return NULL;
}

char *sfa_json_print(const cJSON *json, bool indented) {
  cJSON *exact = sfa_json_exact(json);
  char *text = exact ? (indented ? cJSON_Print : cJSON_PrintUnformatted)(exact) : NULL;
  cJSON_Delete(exact);
  return text;
}

sfa_status sfa_json_save(sfa_context *ctx, const char *folder, const char *name, const cJSON *json) {
  char *text = sfa_json_print(json, true), *path;
  if (!text)
    return sfa_fail(ctx, SFA_ERROR_MEMORY, "out of memory for %s", name);
  sfa_status status = sfa_save_path(ctx, folder, name, &path);
  if (status == SFA_OK) {
    status = sfa_save_file(ctx, path, text, strlen(text));
    sfa_free(ctx, path);
  }
  cJSON_free(text);
  return status;
}

bool sfa_json_size(const cJSON *item, uint64_t *out) {
  if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble <= 0x1p53) ||
      item->valuedouble != (double)(uint64_t)item->valuedouble)
    return false;
  *out = (uint64_t)item->valuedouble;
  return true;
}
