/* UTF-8, character classes, and the alphabet of byte-level vocabularies. */
#include "text/utf8.h"

#include <string.h>
#include <utf8proc.h>

size_t sfa_utf8_len(const uint8_t *text, size_t len, size_t *bad_len) {
  uint8_t lead = text[0], low = 0x80, high = 0xbf; /* what the second byte may be */
  size_t need = lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
  low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : low;
  high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : high;
  size_t have = 1;
  while (have < need && have < len && text[have] >= low && text[have] <= high) {
    low = 0x80;
    high = 0xbf;
    have++;
  }
  if (have == need)
    return need;
  if (bad_len)
    *bad_len = have;
  return 0;
}

bool sfa_utf8_valid(const uint8_t *text, size_t len) {
  for (size_t i = 0; i < len;) {
    size_t n = text[i] < 0x80 ? 1 : sfa_utf8_len(text + i, len - i, NULL);
    if (n == 0)
      return false;
    i += n;
  }
  return true;
}

uint32_t sfa_utf8_decode(const uint8_t *text, size_t *char_len) {
  uint8_t lead = text[0];
  size_t n = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  uint32_t code = n == 1 ? lead : lead & (0x7fu >> n);
  for (size_t i = 1; i < n; i++)
    code = code << 6 | (text[i] & 0x3fu);
  *char_len = n;
  return code;
}

size_t sfa_utf8_encode(uint32_t code, uint8_t out[4]) {
  size_t n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
  static const uint8_t leads[] = {0, 0, 0xc0, 0xe0, 0xf0};
  for (size_t i = n; i-- > 1; code >>= 6)
    out[i] = (uint8_t)(0x80 | (code & 0x3f));
  out[0] = (uint8_t)(leads[n] | code);
  return n;
}

size_t sfa_utf8_last(const uint8_t *text, size_t len) {
  size_t at = len - 1;
  while (at > 0 && (text[at] & 0xc0) == 0x80)
    at--;
  return at;
}

sfa_status sfa_utf8_repair(sfa_context *ctx, const uint8_t *text, size_t len, sfa_bytes *out) {
  size_t good = 0; /* start of the well-formed run that is not yet copied */
  for (size_t i = 0; i < len;) {
    size_t bad = 0, n = sfa_utf8_len(text + i, len - i, &bad);
    if (n == 0) {
      SFA_TRY(sfa_bytes_append(ctx, out, text + good, i - good));
      SFA_TRY(sfa_bytes_append(ctx, out, "\xef\xbf\xbd", 3));
      good = i + bad;
    }
    i += n ? n : bad;
  }
  return sfa_bytes_append(ctx, out, text + good, len - good);
}

bool sfa_char_is_space(uint32_t code) {
  if ((code >= 9 && code <= 13) || code == 0x85)
    return true;
  utf8proc_category_t category = utf8proc_category((utf8proc_int32_t)code);
  return category >= UTF8PROC_CATEGORY_ZS && category <= UTF8PROC_CATEGORY_ZP;
}

size_t sfa_utf8_spaces_before(const uint8_t *text, size_t end) {
  while (end > 0) {
    size_t at = sfa_utf8_last(text, end), n;
    if (!sfa_char_is_space(sfa_utf8_decode(text + at, &n)))
      break;
    end = at;
  }
  return end;
}

size_t sfa_utf8_spaces_after(const uint8_t *text, size_t len, size_t start) {
  size_t n;
  while (start < len && sfa_char_is_space(sfa_utf8_decode(text + start, &n)))
    start += n;
  return start;
}

void sfa_utf8_trim(const uint8_t **text, size_t *len) {
  if (!sfa_utf8_valid(*text, *len))
    return;
  size_t end = sfa_utf8_spaces_before(*text, *len), start = sfa_utf8_spaces_after(*text, end, 0);
  *text += start;
  *len = end - start;
}

sfa_status sfa_utf8_capitalize(sfa_context *ctx, const uint8_t *text, size_t len, sfa_bytes *out) {
  for (size_t i = 0, n; i < len; i += n) {
    n = sfa_utf8_len(text + i, len - i, NULL);
    if (n == 0) { /* a malformed byte stays as it is */
      n = 1;
      SFA_TRY(sfa_bytes_append(ctx, out, text + i, 1));
      continue;
    }
    uint8_t changed[4];
    utf8proc_int32_t code = (utf8proc_int32_t)sfa_utf8_decode(text + i, &n);
    size_t n_changed = sfa_utf8_encode((uint32_t)(i ? utf8proc_tolower(code) : utf8proc_totitle(code)), changed);
    SFA_TRY(sfa_bytes_append(ctx, out, changed, n_changed));
  }
  return SFA_OK;
}

bool sfa_char_is_word(uint32_t code) {
  utf8proc_category_t category = utf8proc_category((utf8proc_int32_t)code);
  return (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_NL) || category == UTF8PROC_CATEGORY_PC || code == 0x200c ||
         code == 0x200d;
}

static bool byte_is_printable(uint32_t byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || (byte >= 0xae && byte <= 0xff);
}

/* The 68 other bytes in order: 0..32, 127..160, 173. */
static int byte_of_char(uint32_t code) {
  if (code < 0x100)
    return byte_is_printable(code) ? (int)code : -1;
  uint32_t nth = code - 0x100;
  return nth < 33 ? (int)nth : nth < 67 ? (int)(nth - 33 + 127) : nth == 67 ? 173 : -1;
}

bool sfa_byte_alphabet_read(const uint8_t *text, size_t len, uint8_t *out, size_t *out_len) {
  *out_len = 0;
  for (size_t i = 0; i < len;) {
    size_t n = sfa_utf8_len(text + i, len - i, NULL);
    int byte = n ? byte_of_char(sfa_utf8_decode(text + i, &n)) : -1;
    if (byte < 0)
      return false;
    out[(*out_len)++] = (uint8_t)byte;
    i += n;
  }
  return true;
}

uint32_t sfa_byte_alphabet_char(uint8_t byte) {
  uint32_t b = byte;
  return byte_is_printable(b) ? b : 0x100 + (b < 33 ? b : b < 161 ? b - 127 + 33 : 67);
}
