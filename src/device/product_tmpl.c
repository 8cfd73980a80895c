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
      product_tile(t, t->a + row * t->k, t->b + column * t->k, row, column);
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

static void pack(int32_t width, int64_t n, int64_t k, const float *x, int64_t stride, int64_t step, bool bf16, float *out) {
  for (int64_t first = 0; first < n; first += width, out += k * width) {
    int64_t n_group = n - first < width ? n - first : width;
    const float *from = x + first * stride;
    if (stride == 1)
      for (int64_t s = 0; s < k; s++) {
        memcpy(out + s * width, from + s * step, (size_t)n_group * sizeof *out);
        memset(out + s * width + n_group, 0, (size_t)(width - n_group) * sizeof *out);
      }
    else {
      if (n_group < width)
        memset(out, 0, (size_t)(k * width) * sizeof *out);
      for (int64_t i = 0; i < n_group; i++)
        for (int64_t s = 0; s < k; s++)
          out[s * width + i] = from[i * stride + s * step];
    }
    for (int64_t i = 0; bf16 && i < k * width; i++)
      out[i] = round_bf16(out[i]);
  }
}
