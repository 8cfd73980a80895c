/* kernel/stored_rows.h: elements of stored rows, and their scales in integer and exact f32 steps: no rounding that an instruction set could
 * change. */
#ifndef SFA_STORED_ROWS_H
#define SFA_STORED_ROWS_H

#include "base/dtype.h"
#include "base/fp8.h"
#include "base/half.h"
#include "kernel/kernel.h"

#define SFA_ROW_SCALE_NAN 0x7e00u
#define SFA_ROW_SCALE_OVERFLOW 0x7c00u

/* largest: bits of max|x|; most: the largest whole number, 127 or 7. The smallest f16 that is at least max|x| / most; NAN for a row with
 * inf or NaN, OVERFLOW if there is none. Rounding to nearest twice gives that or the f16 below it, and scale * most is exact in f32
 * (11 + 7 bits), so one comparison decides. */
static inline uint16_t sfa_row_scale(uint32_t largest, float most) {
  if (largest >= 0x7f800000u)
    return SFA_ROW_SCALE_NAN;
  float limit = sfa_float_of(largest);
  uint16_t scale = sfa_f16_from_f32(limit / most);
  if (scale < SFA_ROW_SCALE_OVERFLOW && sfa_f32_from_f16(scale) * most < limit)
    scale++;
  return scale;
}

/* The same for e4m3: the smallest power of two, from 2^-24 to 2^15, that is at least max|x| / 448. 448 is 1.75 * 2^8. */
static inline uint16_t sfa_e4m3_scale(uint32_t largest) {
  if (largest >= 0x7f800000u)
    return SFA_ROW_SCALE_NAN;
  if (largest == 0)
    return 0;
  const int32_t power = (int32_t)(largest >> 23) - 127 - 8 + ((largest & 0x7fffffu) > 0x600000u);
  return power > 15 ? SFA_ROW_SCALE_OVERFLOW : (uint16_t)(power >= -14 ? (power + 15) << 10 : power >= -24 ? 1 << (power + 24) : 1);
}

/* The step 2^e of round_rows. largest: bits of max|x|. NaN for a row without one. */
static inline float sfa_query_step(uint32_t largest, int32_t n_terms) {
  if (largest >= (uint32_t)(127 + 100) << 23)
    return sfa_float_of(0x7fc00000u);
  int32_t terms = n_terms < SFA_EXACT_TERMS ? n_terms : SFA_EXACT_TERMS, limit = (1 << 24) / (127 * terms), bits = 0;
  limit = limit < 32767 ? limit : 32767;
  while (limit >> (bits + 1))
    bits++;
  int32_t e = (int32_t)(largest >> 23) - 127 - bits; /* then max|x| / 2^e is in [2^bits, 2^(bits + 1)) */
  if (e >= -100 && sfa_float_of((largest & 0x7fffffu) | (uint32_t)(127 + bits) << 23) > (float)limit)
    e++;
  return sfa_float_of((uint32_t)(127 + (e < -100 ? -100 : e)) << 23);
}

/* Asks for part `part` of n_parts of what is wanted next. Requests that come all at once wait for each other, and the work with them. */
static inline void sfa_next_prefetch(const sfa_stored_rows *rows, int32_t part, int32_t n_parts) {
  const int64_t n_lines = (rows->next_bytes + 63) / 64, end = n_lines * (part + 1) / n_parts;
  for (int64_t line = n_lines * part / n_parts; line < end; line++)
    __builtin_prefetch((const char *)rows->next + line * 64);
}

/* Asks for the memory of codes that will be read soon: those of the next tile, which no processor foresees where pages are apart. */
static inline void sfa_stored_rows_prefetch(const sfa_stored_rows *rows, int32_t id_bytes) {
  const char *parts[] = {rows->values, rows->ids, (const char *)rows->scales};
  const size_t row = sfa_stored_bytes(rows->dtype, rows->width);
  const size_t bytes[] = {sfa_stored_bytes(rows->dtype, (rows->n - 1) * rows->values_stride) + row,
                          rows->ids ? (size_t)((rows->n - 1) * rows->ids_stride + rows->width) * (size_t)id_bytes : 0,
                          rows->scales ? (size_t)((rows->n - 1) * rows->scales_stride + 1) * 2 : 0};
  for (int part = 0; part < 3; part++)
    for (size_t at = 0; at < bytes[part]; at += 64)
      __builtin_prefetch(parts[part] + at, 0, 2);
}

/* Element `at` of stored rows, before the row's scale. */
static inline float sfa_stored_value(sfa_dtype dtype, const void *values, int64_t at) {
  switch (dtype) {
  case SFA_BF16: return sfa_f32_from_bf16(((const uint16_t *)values)[at]);
  case SFA_F16: return sfa_f32_from_f16(((const uint16_t *)values)[at]);
  case SFA_I8: return (float)((const int8_t *)values)[at];
  case SFA_I4: return (float)((((const uint8_t *)values)[at >> 1] >> 4 * (at & 1) & 15) - 8);
  case SFA_E4M3: return sfa_f32_from_e4m3(((const uint8_t *)values)[at]);
  default: return ((const float *)values)[at];
  }
}

#endif
