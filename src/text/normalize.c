/* Unicode normalization: utf8proc's tables; the ordering of marks is ours, because utf8proc's takes quadratic time on long runs. */
#include "text/normalize.h"

#include "text/utf8.h"

#include <string.h>
#include <utf8proc.h>

/* Sorts the marks codes[0..n-1] by combining class, equals in their order. scratch: n. */
static void order_marks(utf8proc_int32_t *codes, size_t n, utf8proc_int32_t *scratch) {
  size_t start[257] = {0};
  for (size_t i = 0; i < n; i++)
    start[utf8proc_get_property(codes[i])->combining_class + 1]++;
  for (int c = 0; c < 256; c++)
    start[c + 1] += start[c];
  for (size_t i = 0; i < n; i++)
    scratch[start[utf8proc_get_property(codes[i])->combining_class]++] = codes[i];
  memcpy(codes, scratch, n * sizeof *codes);
}

/* Canonical ordering: each run of marks between starters. */
static void order_all_marks(utf8proc_int32_t *codes, size_t n, utf8proc_int32_t *scratch) {
  for (size_t i = 0; i < n;) {
    size_t end = i;
    while (end < n && utf8proc_get_property(codes[end])->combining_class > 0)
      end++;
    if (end - i > 1)
      order_marks(codes + i, end - i, scratch);
    i = end + 1;
  }
}

enum { DECOMPOSED_MAX = 32 }; /* code points that one may become: 18 in Unicode (U+FDFA) */

/* codes holds room for len + DECOMPOSED_MAX to begin with. */
static sfa_status decompose(sfa_context *ctx, const uint8_t *text, size_t len, utf8proc_option_t options, utf8proc_int32_t **codes,
                            size_t *capacity, size_t *n_codes) {
  size_t n = 0, char_len;
  for (size_t i = 0; i < len; i += char_len) {
    utf8proc_int32_t code = (utf8proc_int32_t)sfa_utf8_decode(text + i, &char_len);
    SFA_TRY(sfa_array_reserve(ctx, (void **)codes, capacity, n + DECOMPOSED_MAX, sizeof **codes));
    int boundary = 0;
    utf8proc_ssize_t made = utf8proc_decompose_char(code, *codes + n, DECOMPOSED_MAX, options, &boundary);
    if (made < 0 || made > DECOMPOSED_MAX)
      return sfa_fail(ctx, SFA_ERROR_FORMAT, "the text cannot be normalized at byte %zu: %s", i, utf8proc_errmsg(made));
    n += (size_t)made;
  }
  *n_codes = n;
  return SFA_OK;
}

static sfa_status normalize_codes(sfa_context *ctx, const uint8_t *text, size_t len, utf8proc_option_t options, utf8proc_int32_t **codes,
                                  utf8proc_int32_t **scratch, sfa_bytes *out) {
  size_t capacity = 0, n = 0;
  SFA_TRY(decompose(ctx, text, len, options | UTF8PROC_DECOMPOSE, codes, &capacity, &n));
  SFA_TRY(sfa_alloc(ctx, n * sizeof **scratch, "normalizing a text", (void **)scratch));
  order_all_marks(*codes, n, *scratch);
  if (options & UTF8PROC_COMPOSE)
    n = (size_t)utf8proc_normalize_utf32(*codes, (utf8proc_ssize_t)n, options);
  for (size_t i = 0; i < n; i++) {
    uint8_t bytes[4];
    SFA_TRY(sfa_bytes_append(ctx, out, bytes, sfa_utf8_encode((uint32_t)(*codes)[i], bytes)));
  }
  return SFA_OK;
}

sfa_status sfa_normalize(sfa_context *ctx, const uint8_t *text, size_t len, bool compose, bool compatible, sfa_bytes *out) {
  size_t plain = 0; /* below U+0300 nothing composes further; ASCII never changes */
  while (plain < len && text[plain] < (compose && !compatible ? 0xcc : 0x80))
    plain++;
  if (plain == len)
    return sfa_bytes_append(ctx, out, text, len);
  int options = UTF8PROC_STABLE | (compose ? UTF8PROC_COMPOSE : 0) | (compatible ? UTF8PROC_COMPAT : 0);
  utf8proc_int32_t *codes = NULL, *scratch = NULL;
  sfa_status status = normalize_codes(ctx, text, len, (utf8proc_option_t)options, &codes, &scratch, out);
  sfa_free(ctx, codes);
  sfa_free(ctx, scratch);
  return status;
}
