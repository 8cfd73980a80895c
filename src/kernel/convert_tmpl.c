/* quantize_i8, quantize_i4, quantize_e4m3, round_rows, load_rows, store_rows, rotate_rows: rows from one element type to another, V_LANES
 * elements a step and what remains one by one. */

static uint32_t largest_magnitude(const float *x, int32_t n) {
  const int32_t whole = n - n % V_LANES;
  vi most = vi_set(0);
  for (int32_t i = 0; i < whole; i += V_LANES)
    most = vi_max(most, vf_bits(vf_abs(vf_load(x + i))));
  const int32_t half = n - whole < 8 ? 0 : 8;
  if (half)
    most = vi_max(most, vf_bits(vf_abs(vf_load_half(x + whole))));
  uint32_t largest = (uint32_t)vi_reduce_max(most);
  for (int32_t i = whole + half; i < n; i++) {
    uint32_t magnitude = sfa_bits_of(x[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

static int64_t quantize_i8(int64_t n_rows, int32_t n, const float *x, int64_t row_stride, int8_t *out, int64_t out_stride,
                           uint16_t *scales) {
  const int32_t whole = n - n % V_LANES;
  for (int64_t row = 0; row < n_rows; row++, x += row_stride, out += out_stride) {
    uint16_t scale = sfa_row_scale(largest_magnitude(x, n), 127.0f);
    if (scale == SFA_ROW_SCALE_OVERFLOW)
      return row + 1;
    scales[row] = scale;
    if (scale == 0 || scale == SFA_ROW_SCALE_NAN) {
      memset(out, 0, (size_t)n);
      continue;
    }
    float step = sfa_f32_from_f16(scale);
    for (int32_t i = 0; i < whole; i += V_LANES)
      v_store_i8(out + i, vf_div(vf_load(x + i), vf_set(step)));
    const int32_t half = n - whole < 8 ? 0 : 8; /* codes of 8 features */
    if (half) {
      int8_t some[V_LANES];
      v_store_i8(some, vf_div(vf_load_half(x + whole), vf_set(step)));
      memcpy(out + whole, some, 8);
    }
    for (int32_t i = whole + half; i < n; i++)
      out[i] = (int8_t)rintf(x[i] / step);
  }
  return 0;
}

/* 16 elements at a time through int8, so that halves of bytes are one step. */
static int64_t quantize_i4(int64_t n_rows, int32_t n, const float *x, int64_t row_stride, uint8_t *out, int64_t out_stride,
                           uint16_t *scales) {
  for (int64_t row = 0; row < n_rows; row++, x += row_stride, out += out_stride / 2) {
    uint16_t scale = sfa_row_scale(largest_magnitude(x, n), 7.0f);
    if (scale == SFA_ROW_SCALE_OVERFLOW)
      return row + 1;
    scales[row] = scale;
    if (scale == 0 || scale == SFA_ROW_SCALE_NAN) {
      memset(out, 0x88, (size_t)n / 2);
      continue;
    }
    const float step = sfa_f32_from_f16(scale);
    int32_t i = 0;
    for (; i + 16 <= n; i += 16) {
      int8_t values[16];
      for (int32_t u = 0; u < 16; u += V_LANES)
        v_store_i8(values + u, vf_div(vf_load(x + i + u), vf_set(step)));
      for (int32_t u = 0; u < 8; u++)
        out[i / 2 + u] = (uint8_t)((values[2 * u] + 8) | (values[2 * u + 1] + 8) << 4);
    }
    for (; i < n; i += 2)
      out[i / 2] = (uint8_t)((8 + (int)rintf(x[i] / step)) | (8 + (int)rintf(x[i + 1] / step)) << 4);
  }
  return 0;
}

static int64_t quantize_e4m3(int64_t n_rows, int32_t n, const float *x, int64_t row_stride, uint8_t *out, int64_t out_stride,
                             uint16_t *scales) {
  const int32_t whole = n - n % V_LANES;
  for (int64_t row = 0; row < n_rows; row++, x += row_stride, out += out_stride) {
    uint16_t scale = sfa_e4m3_scale(largest_magnitude(x, n));
    if (scale == SFA_ROW_SCALE_OVERFLOW)
      return row + 1;
    scales[row] = scale;
    if (scale == 0 || scale == SFA_ROW_SCALE_NAN) {
      memset(out, 0, (size_t)n);
      continue;
    }
    const float inverse = 1 / sfa_f32_from_f16(scale); /* of a power of two: exact, and so are the products */
    for (int32_t i = 0; i < whole; i += V_LANES)
      v_store_e4m3(out + i, vf_mul(vf_load(x + i), vf_set(inverse)));
    for (int32_t i = whole; i < n; i++)
      out[i] = sfa_e4m3_from_f32(x[i] * inverse);
  }
  return 0;
}

static void round_rows(int32_t n_rows, int32_t n, int32_t n_terms, float *x, int64_t row_stride, float *step) {
  const int32_t whole = n - n % V_LANES;
  for (int32_t row = 0; row < n_rows; row++, x += row_stride) {
    step[row] = sfa_query_step(largest_magnitude(x, n), n_terms);
    /* NaN / NaN is NaN: rows without a step need no case. Quotients are below 2^15, so adding 1.5 * 2^23 rounds them. */
    const vf size = vf_set(step[row]), shift = vf_set(SFA_EXP2_ROUND);
    for (int32_t i = 0; i < whole; i += V_LANES)
      vf_store(x + i, vf_mul(vf_sub(vf_add(vf_div(vf_load(x + i), size), shift), shift), size));
    for (int32_t i = whole; i < n; i++)
      x[i] = rintf(x[i] / step[row]) * step[row] + 0.0f;
  }
}

/* Loops of one text, a type each. */
#define LOAD_ROW(type, vector, scalar)                                                                                                     \
  do {                                                                                                                                     \
    const type *from = (const type *)in + row * in_stride;                                                                                 \
    for (int32_t i = 0; i < whole; i += V_LANES)                                                                                           \
      vf_store(out + i, (vector));                                                                                                         \
    for (int32_t i = whole; i < n; i++)                                                                                                    \
      out[i] = (scalar);                                                                                                                   \
  } while (0)

static void load_rows(int64_t n_rows, int32_t n, sfa_dtype dtype, const void *in, int64_t in_stride, const uint16_t *scales, float *out,
                      int64_t out_stride) {
  const int32_t whole = n - n % V_LANES;
  for (int64_t row = 0; row < n_rows; row++, out += out_stride) {
    switch (dtype) {
    case SFA_BF16: LOAD_ROW(uint16_t, v_load_bf16(from + i), sfa_f32_from_bf16(from[i])); break;
    case SFA_F16: LOAD_ROW(uint16_t, v_load_f16(from + i), sfa_f32_from_f16(from[i])); break;
    case SFA_I8: {
      const float scale = scales ? sfa_f32_from_f16(scales[row]) : 1.0f;
      LOAD_ROW(int8_t, vf_mul(v_load_i8(from + i), vf_set(scale)), (float)from[i] * scale);
      break;
    }
    case SFA_I4: {
      const float scale = scales ? sfa_f32_from_f16(scales[row]) : 1.0f;
      const uint8_t *pairs = (const uint8_t *)in + row * (in_stride / 2);
      for (int32_t i = 0; i < n; i++)
        out[i] = (float)((pairs[i / 2] >> 4 * (i & 1) & 15) - 8) * scale;
      break;
    }
    case SFA_E4M3: {
      const float scale = scales ? sfa_f32_from_f16(scales[row]) : 1.0f;
      LOAD_ROW(uint8_t, vf_mul(v_load_e4m3(from + i), vf_set(scale)), sfa_f32_from_e4m3(from[i]) * scale);
      break;
    }
    default: LOAD_ROW(float, vf_load(from + i), from[i]);
    }
  }
}

#define STORE_ROW(type, vector, scalar)                                                                                                    \
  do {                                                                                                                                     \
    type *to = (type *)out + row * out_stride;                                                                                             \
    for (int32_t i = 0; i < whole; i += V_LANES)                                                                                           \
      vector(to + i, vf_load(in + i));                                                                                                     \
    for (int32_t i = whole; i < n; i++)                                                                                                    \
      to[i] = scalar(in[i]);                                                                                                               \
  } while (0)

static void store_rows(int64_t n_rows, int32_t n, const float *in, int64_t in_stride, sfa_dtype dtype, void *out, int64_t out_stride) {
  const int32_t whole = n - n % V_LANES;
  for (int64_t row = 0; row < n_rows; row++, in += in_stride) {
    switch (dtype) {
    case SFA_BF16: STORE_ROW(uint16_t, v_store_bf16, sfa_bf16_from_f32); break;
    case SFA_F16: STORE_ROW(uint16_t, v_store_f16, sfa_f16_from_f32); break;
    default: STORE_ROW(float, vf_store, +);
    }
  }
}

/* The scales of a tile's rows; 1 where there are none, or no row. */
static void load_scales(const sfa_stored_rows *rows, float out[SFA_KEY_TILE]) {
  if (rows->scales && rows->n == SFA_KEY_TILE && rows->scales_stride == 1) {
    for (int32_t j = 0; j < SFA_KEY_TILE; j += V_LANES)
      vf_store(out + j, v_load_f16(rows->scales + j));
    return;
  }
  for (int32_t j = 0; j < SFA_KEY_TILE; j++)
    out[j] = rows->scales && j < rows->n ? sfa_f32_from_f16(rows->scales[j * rows->scales_stride]) : 1.0f;
}

static void rotate_rows(int64_t n_rows, int32_t D, const float *x, int64_t x_stride, const float *cos, const float *sin,
                        int64_t line_stride, int32_t n_rotated, int interleaved, float *out, int64_t out_stride) {
  const int32_t half = n_rotated / 2, step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
  for (int64_t row = 0; row < n_rows; row++, x += x_stride, out += out_stride, cos += line_stride, sin += line_stride) {
    int32_t p = 0; /* pairs */
    if (interleaved)
      for (; p + V_LANES / 2 <= half; p += V_LANES / 2) {
        const vf pairs = vf_load(x + 2 * p), crossed = vf_mul(vf_swap_pairs(pairs), vf_load_twice(sin + p));
        vf_store(out + 2 * p, vf_add(vf_mul(pairs, vf_load_twice(cos + p)), vf_negate_even(crossed)));
      }
    else
      for (; p + V_LANES <= half; p += V_LANES) {
        const vf a = vf_load(x + p), b = vf_load(x + p + half), c = vf_load(cos + p), s = vf_load(sin + p);
        vf_store(out + p, vf_sub(vf_mul(a, c), vf_mul(b, s)));
        vf_store(out + p + half, vf_add(vf_mul(b, c), vf_mul(a, s)));
      }
    for (; p < half; p++) {
      const float a = x[p * step], b = x[p * step + apart];
      out[p * step] = a * cos[p] - b * sin[p];
      out[p * step + apart] = b * cos[p] + a * sin[p];
    }
    if (out != x)
      memcpy(out + n_rotated, x + n_rotated, (size_t)(D - n_rotated) * sizeof *out);
  }
}
