/* base/map.h: a file mapped read-only. */
#ifndef SFA_MAP_H
#define SFA_MAP_H

#include "base/context.h"

typedef struct sfa_map {
  const uint8_t *data; /* NULL for an empty file */
  size_t bytes;
} sfa_map;

sfa_status sfa_map_open(sfa_context *ctx, const char *path, sfa_map *map);
/* Takes a zeroed or closed map. */
void sfa_map_close(sfa_map *map);

#endif
