/* file/text_read.h: documents from text files of any size: plain, .bz2, .xz, .jsonl, files and folders, in pieces of bounded size.
 *
 * In a text, a line that is the separator ends a document, and so does the end of the file. In .jsonl a row is a document: the text of one
 * field. Documents without a byte are left out. A byte 0 is in no text: its file is refused.
 *
 * A document of more than piece_len bytes comes in several pieces, cut before a space between two ASCII letters where there is one: there
 * the patterns of byte-level tokenizers cut too, so that the pieces' tokens are those of the whole.
 */
#ifndef SFA_TEXT_READ_H
#define SFA_TEXT_READ_H

#include <sfa/data.h>

#include "base/context.h"

enum { SFA_TEXT_PIECE_BYTES = 1 << 20, SFA_TEXT_ROW_BYTES = 64 << 20, SFA_TEXT_SEPARATOR_BYTES = 256 };

typedef struct sfa_text_piece {
  const uint8_t *text; /* [bytes], until the next call */
  size_t bytes;
  bool ends; /* it is the last of its document */
} sfa_text_piece;

typedef struct sfa_text_reader sfa_text_reader;

/* Looks up files and folders; nothing is read yet but lists of folders. piece_len: 1 .. SFA_TEXT_PIECE_BYTES. */
sfa_status sfa_text_reader_open(sfa_context *ctx, const sfa_text_inputs *inputs, size_t piece_len, sfa_text_reader **reader);
/* *piece is the next one; piece->text is NULL at the end of the last file. */
sfa_status sfa_text_reader_next(sfa_text_reader *reader, sfa_text_piece *piece);
/* Bytes of files read and in all; total is 0 where standard input is among them. */
void sfa_text_reader_progress(const sfa_text_reader *reader, int64_t *done, int64_t *total);
/* Takes NULL. */
void sfa_text_reader_close(sfa_text_reader *reader);

#endif
