/* device/linear_tmpl.c: products of activations with panels of 16 weights columns. Included after a lanes_<isa>.h.
 *
 * Lanes are outputs, so that a sum over the inputs runs in one lane in rising order: the bits do not depend on how many rows or panels
 * share a register tile. Floating point:
 *     acc = 0; for i: acc = fma(w_i, x_i, acc)
 * Blocks (w = s (u - offset) + m, x = a q, q = 128 high + low, all of the block; sums of integers are exact):
 *     for each block of 32: acc = fma(sum (u - offset) q, s a, acc); acc = fma(m, a sum q, acc) where there are minima
 */

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

ALWAYS_INLINE int32_t columns_of(const sfa_linear_task *t, int32_t panel) {
  int32_t left = t->n_out - panel * SFA_PANEL;
  return left < SFA_PANEL ? left : SFA_PANEL;
}

ALWAYS_INLINE void store_tile(const sfa_linear_task *t, int R, int P, int64_t row, int32_t panel, lanes acc[][2]) {
  UNROLL for (int p = 0; p < P; p++) {
    int32_t n = columns_of(t, panel + p);
    lanes bias = lanes_set(0.0f);
    if (t->bias)
      bias = lanes_load(t->bias + (panel + p) * SFA_PANEL);
    UNROLL for (int r = 0; r < R; r++) {
      lanes v = t->bias ? lanes_add(acc[r][p], bias) : acc[r][p];
      float *out = t->out + (row + r) * t->out_stride + (int64_t)(panel + p) * SFA_PANEL;
      if (n == SFA_PANEL)
        lanes_store(out, v);
      else
        lanes_store_some(out, v, n);
    }
  }
}

ALWAYS_INLINE lanes load_weights(sfa_storage storage, const uint8_t *panel, int32_t i) {
  switch (storage) {
  case SFA_STORE_BF16: return lanes_load_bf16((const uint16_t *)(const void *)panel + (int64_t)i * SFA_PANEL);
  case SFA_STORE_F16: return lanes_load_f16((const uint16_t *)(const void *)panel + (int64_t)i * SFA_PANEL);
  default: return lanes_load((const float *)(const void *)panel + (int64_t)i * SFA_PANEL);
  }
}

ALWAYS_INLINE void dense_tile(const sfa_linear_task *t, sfa_storage storage, int R, int P, int64_t row, int32_t panel) {
  lanes acc[DENSE_ROWS][2];
  const uint8_t *w = t->weights + (size_t)panel * t->panel_bytes;
  const float *x = t->x + row * t->x_stride;
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) acc[r][p] = lanes_set(0.0f);
  for (int32_t i = 0; i < t->n_in; i++) {
    lanes column[2];
    UNROLL for (int p = 0; p < P; p++) column[p] = load_weights(storage, w + (size_t)p * t->panel_bytes, i);
    UNROLL for (int r = 0; r < R; r++) {
      lanes value = lanes_set(x[r * t->x_stride + i]);
      UNROLL for (int p = 0; p < P; p++) acc[r][p] = lanes_fma(column[p], value, acc[r][p]);
    }
  }
  store_tile(t, R, P, row, panel, acc);
}

ALWAYS_INLINE void block_tile(const sfa_linear_task *t, int bits, bool has_minimum, int R, int P, int64_t row, int32_t panel) {
  lanes acc[BLOCK_ROWS][2];
  const int64_t n_blocks = t->n_blocks, q_stride = n_blocks * SFA_PLANES * SFA_BLOCK;
  const int8_t *q = t->quantized.q + row * q_stride;
  const float *scale = t->quantized.scale + row * n_blocks, *scale_sum = t->quantized.scale_sum + row * n_blocks;
  const int32_t *sum = t->quantized.sum + row * n_blocks;
  const uint8_t *w = t->weights + (size_t)panel * t->panel_bytes;
  const uint16_t *params = t->params + (size_t)panel * t->panel_params;
  const int n_pieces = bits == 4 ? 4 : 8, n_halves = bits == 4 ? 2 : 1, n_params = has_minimum ? 2 : 1;
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) acc[r][p] = lanes_set(0.0f);

  for (int64_t b = 0; b < n_blocks; b++, w += n_pieces * 64, q += SFA_PLANES * SFA_BLOCK, params += n_params * SFA_PANEL) {
    ilanes high[BLOCK_ROWS][2], low[BLOCK_ROWS][2]; /* of sum (u - offset) q, by the two bytes of q */
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) {
      high[r][p] = ilanes_set(0);
      low[r][p] = ilanes_set(has_minimum ? 0 : -t->offset * sum[r * n_blocks + b]);
    }
    UNROLL for (int v = 0; v < n_pieces; v++) {
      blanes piece[2], values[2];
      UNROLL for (int p = 0; p < P; p++) piece[p] = blanes_load(w + (size_t)p * t->panel_bytes + v * 64);
      UNROLL for (int half = 0; half < n_halves; half++) {
        UNROLL for (int p = 0; p < P; p++) values[p] = bits == 8 ? piece[p] : half ? blanes_high(piece[p]) : blanes_low(piece[p]);
        UNROLL for (int r = 0; r < R; r++) {
          int32_t x[SFA_PLANES];
          memcpy(&x[0], q + r * q_stride + 16 * half + 4 * v, sizeof x[0]);
          memcpy(&x[1], q + r * q_stride + 16 * half + 4 * v + SFA_BLOCK, sizeof x[1]);
          UNROLL for (int p = 0; p < P; p++) high[r][p] = ilanes_dot(high[r][p], values[p], x[0], bits == 4);
          UNROLL for (int p = 0; p < P; p++) low[r][p] = ilanes_dot(low[r][p], values[p], x[1], bits == 4);
        }
      }
    }
    UNROLL for (int p = 0; p < P; p++) {
      const uint16_t *s = params + (size_t)p * t->panel_params;
      lanes w_scale = lanes_load_f16(s), minimum = lanes_set(0.0f);
      if (has_minimum)
        minimum = lanes_load_f16(s + SFA_PANEL);
      UNROLL for (int r = 0; r < R; r++) {
        lanes dot = lanes_from_i32(ilanes_join(high[r][p], low[r][p]));
        acc[r][p] = lanes_fma(dot, lanes_mul(w_scale, lanes_set(scale[r * n_blocks + b])), acc[r][p]);
        if (has_minimum)
          acc[r][p] = lanes_fma(minimum, lanes_set(scale_sum[r * n_blocks + b]), acc[r][p]);
      }
    }
  }
  store_tile(t, R, P, row, panel, acc);
}

/* All rows against P panels from `panel` on: full tiles, then smaller ones. */
#define OVER_ROWS(t, full_rows, tile)                                                                                                      \
  do {                                                                                                                                     \
    int64_t row = 0;                                                                                                                       \
    for (; row + full_rows <= (t)->n_rows; row += full_rows)                                                                               \
      tile(full_rows);                                                                                                                     \
    for (; full_rows > 4 && row + 4 <= (t)->n_rows; row += 4)                                                                              \
      tile((full_rows > 4 ? 4 : 1));                                                                                                       \
    for (; row < (t)->n_rows; row++)                                                                                                       \
      tile(1);                                                                                                                             \
  } while (0)

ALWAYS_INLINE void dense_panels(const sfa_linear_task *t, sfa_storage storage, int P, int32_t panel) {
#define TILE(R) dense_tile(t, storage, R, P, row, panel)
  OVER_ROWS(t, DENSE_ROWS, TILE);
#undef TILE
}

ALWAYS_INLINE void block_panels(const sfa_linear_task *t, int bits, bool has_minimum, int P, int32_t panel) {
#define TILE(R) block_tile(t, bits, has_minimum, R, P, row, panel)
  OVER_ROWS(t, BLOCK_ROWS, TILE);
#undef TILE
}

ALWAYS_INLINE void dense_product(const sfa_linear_task *t, sfa_storage storage) {
  int32_t panel = 0;
  for (; panel + DENSE_PANELS <= t->n_panels; panel += DENSE_PANELS)
    dense_panels(t, storage, DENSE_PANELS, panel);
  for (; DENSE_PANELS > 1 && panel < t->n_panels; panel++)
    dense_panels(t, storage, 1, panel);
}

ALWAYS_INLINE void block_product(const sfa_linear_task *t, int bits, bool has_minimum) {
  int32_t panel = 0;
  for (; panel + BLOCK_PANELS <= t->n_panels; panel += BLOCK_PANELS)
    block_panels(t, bits, has_minimum, BLOCK_PANELS, panel);
  for (; BLOCK_PANELS > 1 && panel < t->n_panels; panel++)
    block_panels(t, bits, has_minimum, 1, panel);
}

/* Each product is a function of its own, so that the compiler gives it the registers. */
static void product_f32(const sfa_linear_task *t) { dense_product(t, SFA_STORE_F32); }
static void product_bf16(const sfa_linear_task *t) { dense_product(t, SFA_STORE_BF16); }
static void product_f16(const sfa_linear_task *t) { dense_product(t, SFA_STORE_F16); }
static void product_u8(const sfa_linear_task *t) { block_product(t, 8, false); }
static void product_u8_min(const sfa_linear_task *t) { block_product(t, 8, true); }
static void product_u4(const sfa_linear_task *t) { block_product(t, 4, false); }
static void product_u4_min(const sfa_linear_task *t) { block_product(t, 4, true); }

static void linear(const sfa_linear_task *t) {
  switch (t->storage) {
  case SFA_STORE_F32: product_f32(t); break;
  case SFA_STORE_BF16: product_bf16(t); break;
  case SFA_STORE_F16: product_f16(t); break;
  case SFA_STORE_BF16_PRODUCTS: break; /* oneDNN's */
  case SFA_STORE_U8: (t->has_minimum ? product_u8_min : product_u8)(t); break;
  case SFA_STORE_U4: (t->has_minimum ? product_u4_min : product_u4)(t); break;
  }
}
