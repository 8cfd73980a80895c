/* file/json.h: JSON texts from and to files, by cJSON (which allocates by itself), with errors that name the place. */
#ifndef SFA_JSON_H
#define SFA_JSON_H

#include <cjson/cJSON.h>

#include "base/context.h"

/* Parses a text that must be one JSON object. path is for the error. Free *json with cJSON_Delete; NULL on failure. */
sfa_status sfa_json_parse(sfa_context *ctx, const char *path, const char *text, size_t bytes, cJSON **json);
/* The same from a file of at most max_bytes. */
sfa_status sfa_json_load(sfa_context *ctx, const char *path, size_t max_bytes, cJSON **json);
/* Writes FOLDER/NAME (file/save.h), indented. */
sfa_status sfa_json_save(sfa_context *ctx, const char *folder, const char *name, const cJSON *json);
/* A member that is a whole number from 0 to 2^53; false if it is not. */
bool sfa_json_size(const cJSON *item, uint64_t *out);

#endif
