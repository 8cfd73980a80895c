/* file/save.h: a file that is there as a whole or not at all. Bytes go to PATH.part; commit has the disk confirm them and gives them the
 * name. Whatever stops a writer before, a kill or a full disk, the file of that name is as it was.
 */
#ifndef SFA_SAVE_H
#define SFA_SAVE_H

#include "base/context.h"

typedef struct sfa_save sfa_save;

/* Begins PATH.part; one that a killed writer left is overwritten. */
sfa_status sfa_save_begin(sfa_context *ctx, const char *path, sfa_save **save);
/* Appends bytes. */
sfa_status sfa_save_write(sfa_save *save, const void *data, size_t bytes);
/* Zeros up to a multiple of `alignment` bytes of the file. */
sfa_status sfa_save_align(sfa_save *save, size_t alignment);
/* Bytes so far. */
uint64_t sfa_save_bytes(const sfa_save *save);
/* Bytes to the disk (fsync), PATH.part becomes PATH, the folder to the disk. Frees save, also on failure, which leaves PATH as it was. */
sfa_status sfa_save_commit(sfa_save *save);
/* Removes what was begun. Takes NULL. */
void sfa_save_abandon(sfa_save *save);

/* A small file in one go. */
sfa_status sfa_save_file(sfa_context *ctx, const char *path, const void *data, size_t bytes);
/* Makes a folder, and those above it; one that exists is fine. */
sfa_status sfa_save_folder(sfa_context *ctx, const char *path);
/* "FOLDER/NAME" by sfa_alloc. */
sfa_status sfa_save_path(sfa_context *ctx, const char *folder, const char *name, char **path);

#endif
