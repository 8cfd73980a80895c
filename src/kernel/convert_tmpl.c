/* quantize_i8, load_rows, store_rows: rows from one element type to another, V_LANES elements a step and what remains one by one. */

static int64_t quantize_i8(int64_t n_rows, int32_t n, const float *x, int64_t row_stride, int8_t *out, int64_t out_stride,
                           uint16_t *scales) {
  const int32_t whole = n - n % V_LANES;
  for (int64_t row = 0; row < n_rows; row++, x += row_stride, out += out_stride) {
    vi most = vi_set(0);
    for (int32_t i = 0; i < whole; i += V_LANES)
      most = vi_max(most, vf_bits(vf_abs(vf_load(x + i))));
    int32_t largest = vi_reduce_max(most);
    for (int32_t i = whole; i < n; i++) {
      int32_t magnitude = (int32_t)(sfa_bits_of(x[i]) & 0x7fffffffu);
      largest = magnitude > largest ? magnitude : largest;
    }
    uint16_t scale = sfa_i8_scale((uint32_t)largest);
    if (scale == SFA_I8_SCALE_OVERFLOW)
      return row + 1;
    scales[row] = scale;
    if (scale == 0 || scale == SFA_I8_SCALE_NAN) {
      memset(out, 0, (size_t)n);
      continue;
    }
    float step = sfa_f32_from_f16(scale);
    for (int32_t i = 0; i < whole; i += V_LANES)
      v_store_i8(out + i, vf_div(vf_load(x + i), vf_set(step)));
    for (int32_t i = whole; i < n; i++)
      out[i] = (int8_t)rintf(x[i] / step);
  }
  return 0;
}

/* Four loops of one text, a type each. x * 0 + s turns s into NaN at the first inf or NaN, and it stays. */
#define LOAD_ROW(type, vector, scalar)                                                                                                     \
  do {                                                                                                                                     \
    const type *from = (const type *)in + row * in_stride;                                                                                 \
    for (int32_t i = 0; i < whole; i += V_LANES) {                                                                                         \
      vf x = (vector);                                                                                                                     \
      vf_store(out + i, x);                                                                                                                \
      seen = vf_fma(x, vf_zero(), seen);                                                                                                   \
    }                                                                                                                                      \
    for (int32_t i = whole; i < n; i++) {                                                                                                  \
      out[i] = (scalar);                                                                                                                   \
      seen_tail = fmaf(out[i], 0.0f, seen_tail);                                                                                           \
    }                                                                                                                                      \
  } while (0)

static int load_rows(int64_t n_rows, int32_t n, sfa_dtype dtype, const void *in, int64_t in_stride, const uint16_t *scales, float *out,
                     int64_t out_stride) {
  const int32_t whole = n - n % V_LANES;
  vf seen = vf_zero();
  float seen_tail = 0.0f;
  for (int64_t row = 0; row < n_rows; row++, out += out_stride) {
    switch (dtype) {
    case SFA_BF16: LOAD_ROW(uint16_t, v_load_bf16(from + i), sfa_f32_from_bf16(from[i])); break;
    case SFA_F16: LOAD_ROW(uint16_t, v_load_f16(from + i), sfa_f32_from_f16(from[i])); break;
    case SFA_I8: {
      float scale = sfa_f32_from_f16(scales[row]);
      LOAD_ROW(int8_t, vf_mul(v_load_i8(from + i), vf_set(scale)), (float)from[i] * scale);
      break;
    }
    default: LOAD_ROW(float, vf_load(from + i), from[i]);
    }
  }
  return !vm_bits(vf_ne(seen, vf_zero())) && seen_tail == 0.0f;
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
