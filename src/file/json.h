/* file/json.h: JSON texts from and to files, by cJSON (which allocates by itself), with errors that name the place. */
#ifndef SFA_JSON_H
#define SFA_JSON_H

#include <cjson/cJSON.h>

#include "base/context.h"

/* Parses a text that must be one JSON object. path is for the error. Free *json with cJSON_Delete; NULL on failure. */
sfa_status sfa_json_parse(sfa_context *ctx, const char *path, const char *text, size_t bytes, cJSON **json);
/* The same from a file of at most max_bytes. */
sfa_status sfa_json_load(sfa_context *ctx, const char *path, size_t max_bytes, cJSON **json);
/* A copy whose numbers are digits that read back as the same double: cJSON by itself writes 15 where they come within
 * a rounding, and compares with such a tolerance. A copy is for printing, and for cJSON_Compare with another. NULL: out of memory. */
cJSON *sfa_json_exact(const cJSON *json);
/* The text of such a copy, for cJSON_free; NULL: out of memory. */
char *sfa_json_print(const cJSON *json, bool indented);
/* Writes FOLDER/NAME (file/save.h), indented and exact. */
sfa_status sfa_json_save(sfa_context *ctx, const char *folder, const char *name, const cJSON *json);
/* A member that is a whole number from 0 to 2^53; false if it is not. */
bool sfa_json_size(const cJSON *item, uint64_t *out);

#endif
