/* base/hash.h: a 64-bit checksum of bytes, for files: fast (a multiplication in 8 bytes), not made against an adversary.
 *
 * Bytes in words of 8, little-endian, the last one padded with zeros: h = fold((h ^ word) * M) for each, then for the number of bytes;
 * fold(x) = x ^ (x >> 32), M = 0x9e3779b97f4a7c15. Each step is one to one in h and in the word, so that a change within one word always
 * shows. Sums of parts are chained: the result of one is the seed of the next.
 */
#ifndef SFA_HASH_H
#define SFA_HASH_H

#include <stdint.h>
#include <string.h>

static inline uint64_t sfa_hash_word(uint64_t h, uint64_t word) {
  h = (h ^ word) * 0x9e3779b97f4a7c15u;
  return h ^ (h >> 32);
}

static inline uint64_t sfa_hash_bytes(uint64_t seed, const void *data, size_t bytes) {
  const unsigned char *at = data;
  uint64_t h = seed, word;
  for (size_t left = bytes; left >= sizeof word; left -= sizeof word, at += sizeof word) {
    memcpy(&word, at, sizeof word);
    h = sfa_hash_word(h, word);
  }
  if (bytes % sizeof word) {
    word = 0;
    memcpy(&word, at, bytes % sizeof word);
    h = sfa_hash_word(h, word);
  }
  return sfa_hash_word(h, bytes);
}

#endif
