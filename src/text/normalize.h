/* text/normalize.h: Unicode normalization in linear time. */
#ifndef SFA_NORMALIZE_H
#define SFA_NORMALIZE_H

#include "text/text_table.h"

/* Appends the NFC (compose), NFD, NFKC (compose, compatible) or NFKD form of well-formed UTF-8. */
sfa_status sfa_normalize(sfa_context *ctx, const uint8_t *text, size_t len, bool compose, bool compatible, sfa_bytes *out);

#endif
