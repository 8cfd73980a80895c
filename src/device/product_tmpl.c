/* device/product_tmpl.c: a register tile of a product of packed operands. Included after a lanes_<isa>.h and linear_tmpl.c.
 *
 * Lanes are columns; an element of out is one chain acc = fma(b, a, acc) over k in rising order, carried from block to block through out:
 * its bits do not depend on how a product is cut.
 */

enum { TILE_COLUMNS = DENSE_PANELS * 16 };

/* R = DENSE_ROWS rows and TILE_COLUMNS columns; the packed operands have zeros where out ends. */
static void product_tile(const sfa_product_block *t, const float *a, const float *b, int64_t row, int64_t column) {
  lanes acc[DENSE_ROWS][2];
  int64_t n_rows = t->n_rows - row < DENSE_ROWS ? t->n_rows - row : DENSE_ROWS;
  int32_t columns[2];
  float *out = t->out + row * t->out_stride + column;
  UNROLL for (int p = 0; p < DENSE_PANELS; p++) {
    int64_t left = t->n_columns - column - p * 16;
    columns[p] = left < 0 ? 0 : left < 16 ? (int32_t)left : 16;
  }
  UNROLL for (int r = 0; r < DENSE_ROWS; r++) UNROLL for (int p = 0; p < DENSE_PANELS; p++) {
    acc[r][p] = lanes_set(0.0f);
    if (t->add && r < n_rows)
      acc[r][p] =
          columns[p] == 16 ? lanes_load(out + r * t->out_stride + p * 16) : lanes_load_some(out + r * t->out_stride + p * 16, columns[p]);
  }
  for (int64_t s = 0; s < t->k; s++, a += DENSE_ROWS, b += TILE_COLUMNS) {
    lanes values[2];
    UNROLL for (int p = 0; p < DENSE_PANELS; p++) values[p] = lanes_load(b + p * 16);
    UNROLL for (int r = 0; r < DENSE_ROWS; r++) {
      lanes x = lanes_set(a[r]);
      UNROLL for (int p = 0; p < DENSE_PANELS; p++) acc[r][p] = lanes_fma(values[p], x, acc[r][p]);
    }
  }
  UNROLL for (int p = 0; p < DENSE_PANELS; p++) {
    lanes bias = lanes_set(0.0f);
    if (t->bias && columns[p] > 0)
      bias = columns[p] == 16 ? lanes_load(t->bias + column + p * 16) : lanes_load_some(t->bias + column + p * 16, columns[p]);
    UNROLL for (int r = 0; r < DENSE_ROWS; r++) if (r < n_rows) {
      lanes v = t->bias ? lanes_add(acc[r][p], bias) : acc[r][p];
      if (columns[p] == 16)
        lanes_store(out + r * t->out_stride + p * 16, v);
      else
        lanes_store_some(out + r * t->out_stride + p * 16, v, columns[p]);
    }
  }
}

/* A panel of b stays in the nearest cache while the tiles of a pass by. */
static void product(const sfa_product_block *t) {
  for (int64_t column = 0; column < t->n_columns; column += TILE_COLUMNS)
    for (int64_t row = 0; row < t->n_rows; row += DENSE_ROWS)
      product_tile(t, t->a + row * t->stride, t->b + column * t->stride, row, column);
}

static float round_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return x;
  bits = (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/* Lanes become rows: block[i] lane j and block[j] lane i change places. */
static inline void transpose(lanes block[16]) {
#ifdef LANES_TRANSPOSE
  lanes_transpose(block);
#else
  float x[16][16];
  for (int i = 0; i < 16; i++)
    lanes_store(x[i], block[i]);
  for (int i = 0; i < 16; i++) {
    float column[16];
    for (int j = 0; j < 16; j++)
      column[j] = x[j][i];
    block[i] = lanes_load(column);
  }
#endif
}

/* Elements that follow each other along k: 16 x 16 at a time. */
ALWAYS_INLINE void pack_along(int W, int64_t n, int64_t k, const float *x, int64_t stride, float *out) {
  for (int64_t s = 0; s < k; s += 16) {
    int32_t n_steps = k - s < 16 ? (int32_t)(k - s) : 16;
    for (int first = 0; first < W; first += 16) {
      const int w = W - first < 16 ? W - first : 16;
      lanes block[16];
      UNROLL for (int i = 0; i < 16; i++) {
        block[i] = lanes_set(0.0f);
        if (i < w && first + i < n)
          block[i] = n_steps == 16 ? lanes_load(x + (first + i) * stride + s) : lanes_load_some(x + (first + i) * stride + s, n_steps);
      }
      transpose(block);
      for (int j = 0; j < n_steps; j++)
        if (w == 16)
          lanes_store(out + (s + j) * W + first, block[j]);
        else
          lanes_store_some(out + (s + j) * W + first, block[j], w);
    }
  }
}

/* Elements that follow each other across k. */
ALWAYS_INLINE void pack_across(int W, int64_t n, int64_t k, const float *x, int64_t step, float *out) {
  for (int64_t s = 0; s < k; s++)
    if (n == W)
      memcpy(out + s * W, x + s * step, (size_t)W * sizeof *out);
    else
      for (int64_t i = 0; i < W; i++)
        out[s * W + i] = i < n ? x[s * step + i] : 0.0f;
}

ALWAYS_INLINE void pack_group(int W, int64_t n, int64_t k, const float *x, int64_t stride, int64_t step, bool bf16, float *out) {
  n = n < W ? n : W;
  if (stride == 1)
    pack_across(W, n, k, x, step, out);
  else
    pack_along(W, n, k, x, stride, out);
  for (int64_t i = 0; bf16 && i < k * W; i++)
    out[i] = round_bf16(out[i]);
}

static void pack_rows(int64_t n, int64_t k, const float *x, int64_t stride, int64_t step, bool bf16, float *out) {
  pack_group(DENSE_ROWS, n, k, x, stride, step, bf16, out);
}

static void pack_columns(int64_t n, int64_t k, const float *x, int64_t stride, int64_t step, bool bf16, float *out) {
  pack_group(TILE_COLUMNS, n, k, x, stride, step, bf16, out);
}
