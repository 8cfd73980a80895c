/* kernel/simd_amx.h: tiles of bf16, and matrices as they read them. For files compiled with AMX and AVX512-BF16; everything is static.
 *
 * A matrix of rows is cut into patches of 32 x 32, 1024 numbers each. Entry (r, c) of a patch stands where tiles want the matrix X as a
 * left operand or X^T as a right one, with sums over c (straight) or over r (turned): kernel_half.h has the places. */
#ifndef SFA_SIMD_AMX_H
#define SFA_SIMD_AMX_H

#include "kernel/simd_avx512.h"

#include <immintrin.h>
#include <stdbool.h>
#include <stdint.h>

#define ALWAYS static inline __attribute__((always_inline))

/* ---- Tile registers ------------------------------------------------------------------------------------------------------------- */

typedef struct tile_config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} tile_config;

#define ROW_BYTES .palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}
static const tile_config full_tiles = {ROW_BYTES, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

/* The four products of two tiles of rows and two of columns, 32 deep; tiles 0..3 are the outputs. The asm of gcc's tile loads does not
 * say that it reads memory: what they read is stored in another function, or by a tile store. */
#define TILE_BLOCK(A, a_next, B)                                                                                                           \
  do {                                                                                                                                     \
    _tile_loadd(4, (A), 64);                                                                                                               \
    _tile_loadd(6, (B), 64);                                                                                                               \
    _tile_dpbf16ps(0, 4, 6);                                                                                                               \
    _tile_loadd(7, (B) + 512, 64);                                                                                                         \
    _tile_dpbf16ps(1, 4, 7);                                                                                                               \
    _tile_loadd(5, (A) + (a_next), 64);                                                                                                    \
    _tile_dpbf16ps(2, 5, 6);                                                                                                               \
    _tile_dpbf16ps(3, 5, 7);                                                                                                               \
  } while (0)

/* ---- Patches -------------------------------------------------------------------------------------------------------------------- */

/* Lanes of a vector of 16 that exist among n. */
ALWAYS __mmask16 lanes_of(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

/* 32 numbers of 16 bits in such an order that interleaving within 128 bits, as the processor does, leaves 0..15 and 16..31 each in order;
 * and back. */
ALWAYS __m512i to_lanes(__m512i x) { return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), x); }
ALWAYS __m512i from_lanes(__m512i x) { return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), x); }

/* 32 bf16 of rows r and r + 1: their pairs, columns 0..15 and 16..31. */
ALWAYS void interleave(__m512i x, __m512i y, __m512i *low, __m512i *high) {
  x = to_lanes(x), y = to_lanes(y);
  *low = _mm512_unpacklo_epi16(x, y);
  *high = _mm512_unpackhi_epi16(x, y);
}

/* A tile of 16 rows as it is, or its 16 columns of 32 bits as rows. */
ALWAYS void store_tile(uint16_t *to, __m512i rows[16], bool turn) {
  if (turn)
    vi_turn(rows);
  for (int r = 0; r < 16; r++)
    _mm512_storeu_si512(to + 32 * r, rows[r]);
}

/* A patch of the first n rows and n_columns of x, of which there may be fewer than 32: zeros beyond. straight and turned: NULL, or where
 * that form goes; as left operands, or as right ones. */
ALWAYS void patch_pack(int64_t n, int64_t n_columns, const float *x, int64_t stride, bool right, uint16_t *straight, uint16_t *turned) {
  const __mmask16 low = lanes_of(n_columns), high = lanes_of(n_columns - 16);
  __m512i rows[32], first[16], second[16];
  for (int r = 0; r < 32; r++) {
    const float *row = x + (r < n ? r * stride : 0);
    rows[r] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(r < n ? high : 0, row + 16), _mm512_maskz_loadu_ps(r < n ? low : 0, row));
  }
  if (turned) {
    for (int p = 0; p < 16; p++)
      interleave(rows[2 * p], rows[2 * p + 1], &first[p], &second[p]);
    store_tile(turned, first, !right);
    store_tile(turned + 512, second, !right);
  }
  if (straight) {
    store_tile(straight, rows, right);
    store_tile(straight + 512, rows + 16, right);
  }
}

/* C [32][32] = the sum of n products of patches that lie one after the other. */
ALWAYS void patch_sum(int64_t n, const uint16_t *A, const uint16_t *B, float *C) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < n; step++)
    TILE_BLOCK(A + step * 1024, 512, B + step * 1024);
  _tile_stored(0, C, 128);
  _tile_stored(1, C + 16, 128);
  _tile_stored(2, C + 16 * 32, 128);
  _tile_stored(3, C + 16 * 32 + 16, 128);
}

#endif
