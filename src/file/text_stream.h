/* file/text_stream.h: the bytes of a file as they were before it was compressed: plain, .bz2, .xz, told apart by their first bytes. */
#ifndef SFA_TEXT_STREAM_H
#define SFA_TEXT_STREAM_H

#include "base/context.h"

typedef struct sfa_text_stream sfa_text_stream;

/* path "-": standard input. */
sfa_status sfa_text_stream_open(sfa_context *ctx, const char *path, sfa_text_stream **stream);
/* Up to `capacity` > 0 bytes; *n is 0 at the end only. SFA_ERROR_FORMAT: a compressed file is damaged or cut short. */
sfa_status sfa_text_stream_read(sfa_text_stream *stream, uint8_t *out, size_t capacity, size_t *n);
/* Bytes of the file that were read until now. */
int64_t sfa_text_stream_position(const sfa_text_stream *stream);
/* Takes NULL. */
void sfa_text_stream_close(sfa_text_stream *stream);

#endif
