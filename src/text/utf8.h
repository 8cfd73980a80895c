/* text/utf8.h: UTF-8 as the tokenizer needs it, and GPT-2's printable alphabet of bytes. */
#ifndef SFA_UTF8_H
#define SFA_UTF8_H

#include "text/text_table.h"

/* Bytes of the character that starts at text (1..4), by the Unicode standard's table of well-formed sequences; 0 if it is malformed, and
 * *bad_len (may be NULL) is then how many bytes one U+FFFD stands for (the maximal subpart, as Python's errors="replace" does). */
size_t sfa_utf8_len(const uint8_t *text, size_t len, size_t *bad_len);
bool sfa_utf8_valid(const uint8_t *text, size_t len);
/* The code point of a well-formed character; *char_len its bytes. */
uint32_t sfa_utf8_decode(const uint8_t *text, size_t *char_len);
/* Writes up to 4 bytes, returns how many. */
size_t sfa_utf8_encode(uint32_t code, uint8_t out[4]);
/* The start of the last character of well-formed text, len > 0. */
size_t sfa_utf8_last(const uint8_t *text, size_t len);
/* Appends text with each malformed part replaced by U+FFFD. */
sfa_status sfa_utf8_repair(sfa_context *ctx, const uint8_t *text, size_t len, sfa_bytes *out);

/* White_Space of Unicode. */
bool sfa_char_is_space(uint32_t code);
/* Where the white space that ends at `end`, or starts at `start`, begins or ends, in well-formed text. */
size_t sfa_utf8_spaces_before(const uint8_t *text, size_t end);
size_t sfa_utf8_spaces_after(const uint8_t *text, size_t len, size_t start);
/* Narrows a text to what lies between the white space at its ends. Malformed text stays as it is. */
void sfa_utf8_trim(const uint8_t **text, size_t *len);
/* Appends text with its first character upper case and the others lower case, one character for one. */
sfa_status sfa_utf8_capitalize(sfa_context *ctx, const uint8_t *text, size_t len, sfa_bytes *out);
/* Letters, marks, numbers, connectors: \w of a Unicode regex. */
bool sfa_char_is_word(uint32_t code);

/* Byte-level vocabularies write each byte as one printable character: itself if it is printable Latin-1, else U+0100 and up in order.
 * Reads a token's text back to bytes at out (at most len); false if it holds a character that stands for no byte. */
bool sfa_byte_alphabet_read(const uint8_t *text, size_t len, uint8_t *out, size_t *out_len);
/* The character of a byte. */
uint32_t sfa_byte_alphabet_char(uint8_t byte);

#endif
