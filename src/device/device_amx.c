/* Products of training in bf16 by tiles (AMX): operands rounded as they are packed, sums in f32. An element of out is one chain of tile
 * products over a block of steps, in the order of tiles, then added to what earlier blocks left. */
#include "device/training_kernels.h"

#include "kernel/simd_amx.h"

enum { SIDE = 32, PATCH = SIDE * SIDE };

/* `out` holds patches [steps / 32][1024]: left operands of rows, right ones of columns. Elements that follow each other along k give them
 * straight, those across k turned. */
ALWAYS void pack_side(bool right, int64_t n, int64_t k, const float *x, int64_t stride, int64_t step, float *out) {
  uint16_t *patch = (uint16_t *)out;
  for (int64_t s = 0; s < k; s += SIDE, patch += PATCH)
    if (step == 1)
      patch_pack(n, k - s, x + s, stride, right, patch, NULL);
    else
      patch_pack(k - s, n, x + s * step, step, right, NULL, patch);
}

static void pack_rows(int64_t n, int64_t k, const float *x, int64_t stride, int64_t step, bool bf16, float *out) {
  (void)bf16;
  pack_side(false, n, k, x, stride, step, out);
}

static void pack_columns(int64_t n, int64_t k, const float *x, int64_t stride, int64_t step, bool bf16, float *out) {
  (void)bf16;
  pack_side(true, n, k, x, stride, step, out);
}

/* sum [32][32] to a corner of out. */
ALWAYS void add_block(const sfa_product_block *t, int64_t row, int64_t column, const float *sum) {
  for (int64_t c = 0; c < SIDE && column + c < t->n_columns; c += 16) {
    const __mmask16 lanes = lanes_of(t->n_columns - column - c);
    const __m512 bias = t->bias ? _mm512_maskz_loadu_ps(lanes, t->bias + column + c) : _mm512_setzero_ps();
    for (int64_t r = 0; r < SIDE && row + r < t->n_rows; r++) {
      float *out = t->out + (row + r) * t->out_stride + column + c;
      __m512 x = _mm512_load_ps(sum + r * SIDE + c);
      if (t->add)
        x = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, out), x);
      _mm512_mask_storeu_ps(out, lanes, t->bias ? _mm512_add_ps(x, bias) : x);
    }
  }
}

static void product(const sfa_product_block *t) {
  float sum[SIDE * SIDE] __attribute__((aligned(64)));
  const int64_t n_steps = t->stride / SIDE;
  _tile_loadconfig(&full_tiles);
  for (int64_t column = 0; column < t->n_columns; column += SIDE)
    for (int64_t row = 0; row < t->n_rows; row += SIDE) {
      patch_sum(n_steps, (const uint16_t *)(t->a + row * t->stride), (const uint16_t *)(t->b + column * t->stride), sum);
      add_block(t, row, column, sum);
    }
  _tile_release();
}

const sfa_product_kernels sfa_product_kernels_amx = {SIDE, SIDE, product, pack_rows, pack_columns};
