/* value_keys: weights of one or a few rows times values as a cache stores them.
 *
 * A block of rows times a block of output vectors stays in registers over all keys of the tile; each key costs one load and conversion a
 * vector, which the rows share. Keys are taken from a list, so that those without weight are not touched. */

/* Where the list has gaps, memory is asked for so many keys ahead; else SFA_AHEAD_BYTES. The processor's own prefetching needs neighbours,
 * and looks ahead too little beside so much arithmetic. */
enum { PREFETCH_KEYS = 6 };

/* Types whose elements share a lane at first: they come as pairs of vectors, the even and the odd elements. */
V_INLINE int comes_in_pairs(const sfa_dtype dtype) { return dtype == SFA_BF16 || dtype == SFA_I4; }

/* e4m3 is read times 2^-8, as its bits are an f16; weights take 2^8. Both are exact. */
V_INLINE float value_unit(const sfa_dtype dtype) { return dtype == SFA_E4M3 ? 0x1p-8f : 1.0f; }

/* `columns` vectors, an even number, of a stored row, before its scale, times value_unit; NaN of e4m3 are numbers. */
V_INLINE void value_vectors(const sfa_dtype dtype, const int columns, const char *row, vf *v) {
#pragma GCC unroll 8
  for (int c = 0; c < columns; c++)
    switch (dtype) {
    case SFA_BF16:
      if (c % 2 == 0) {
        const vf pairs = vf_load((const float *)row + c / 2 * V_LANES);
        v[c] = v_low_bf16(pairs);
        v[c + 1] = v_high_bf16(pairs);
      }
      break;
    case SFA_F16: v[c] = v_load_f16((const uint16_t *)row + c * V_LANES); break;
    case SFA_I8: v[c] = v_load_i8((const int8_t *)row + c * V_LANES); break;
    case SFA_I4:
      if (c % 2 == 0)
        v_load_i4((const uint8_t *)row + c * V_LANES / 2, v + c);
      break;
    case SFA_E4M3:
      if (c % 2 == 0)
        v_load_e4m3_pair((const uint8_t *)row + c * V_LANES, v + c);
      break;
    default: v[c] = vf_load((const float *)row + c * V_LANES);
    }
}

/* The keys of a tile that have weight, and where their values lie. */
typedef struct value_list {
  const char *values, *next; /* of key 0, at the block's first element; where the last keys ask on */
  int64_t row_bytes;
  int32_t n;
  int gaps;            /* the keys are listed; else 0 .. n - 1 */
  const uint8_t *keys; /* [n + PREFETCH_KEYS] */
} value_list;

/* Element `at` as value_vectors has it, and NaN as such. */
V_INLINE float value_number(const sfa_dtype dtype, const void *row, int64_t at) {
  return sfa_stored_value(dtype, row, at) * value_unit(dtype);
}

/* sum += P V over keys from .. to - 1 of the list; `most`: see v_most_e4m3. `wanted` is memory to ask for: a row of it for each key, or
 * where there are gaps, and keys ask for the list's rows, a line. dtype, rows, columns and gaps are constants where this is inlined. */
V_INLINE void value_keys_run(const sfa_dtype dtype, const int rows, const int columns, const int gaps, const value_list *list, int32_t from,
                             int32_t to, const char *wanted, const float *P, vf *sum, vi *most) {
  const int bytes = (int)sfa_stored_bytes(dtype, columns * V_LANES);
  const int64_t row_bytes = list->row_bytes;
  const char *row = list->values + from * row_bytes;
  for (int32_t at = from; at < to; at++, row += row_bytes, wanted += gaps ? 64 : row_bytes) {
    const int32_t j = gaps ? list->keys[at] : at;
    const char *ahead = wanted;
    if (gaps) {
      row = list->values + j * row_bytes;
      ahead = list->values + list->keys[at + PREFETCH_KEYS] * row_bytes;
      __builtin_prefetch(wanted);
    }
#pragma GCC unroll 8
    for (int b = 0; b < bytes; b += 64)
      __builtin_prefetch(ahead + b);
    vf v[8];
    value_vectors(dtype, columns, row, v);
    if (dtype == SFA_E4M3)
#pragma GCC unroll 2
      for (int b = 0; b < bytes; b += 4 * V_LANES)
        *most = v_most_e4m3(*most, (const uint8_t *)row + b, bytes < 4 * V_LANES ? bytes : 4 * V_LANES);
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) {
      const vf p = vf_set(P[i * SFA_KEY_TILE + j]);
#pragma GCC unroll 8
      for (int c = 0; c < columns; c++)
        sum[i * columns + c] = vf_fma(p, v[c], sum[i * columns + c]);
    }
  }
}

/* The same element by element. */
static void value_keys_slowly(const sfa_dtype dtype, int rows, int32_t n, const value_list *list, const float *P, int64_t E, float *O) {
  for (int32_t at = 0; at < list->n; at++) {
    const int32_t j = list->gaps ? list->keys[at] : at;
    for (int32_t e = 0; e < n; e++) {
      const float v = value_number(dtype, list->values + j * list->row_bytes, e);
      for (int i = 0; i < rows; i++)
        O[i * E + e] = fmaf(P[i * SFA_KEY_TILE + j], v, O[i * E + e]);
    }
  }
}

V_INLINE void value_keys_block(const sfa_dtype dtype, const int rows, const int columns, const value_list *list, const float *P, int64_t E,
                               float *O) {
  vf sum[16];
  vi most = vi_set(0);
#pragma GCC unroll 4
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
    for (int c = 0; c < columns; c++)
      sum[i * columns + c] = vf_load(O + i * E + c * V_LANES);
  if (comes_in_pairs(dtype))
#pragma GCC unroll 8
    for (int a = 0; a < rows * columns; a += 2)
      v_split(sum + a);
  if (list->gaps) {
    value_keys_run(dtype, rows, columns, 1, list, 0, list->n, list->next, P, sum, &most);
  } else { /* the last keys ask for what is wanted next */
    const int32_t ahead = (int32_t)(SFA_AHEAD_BYTES / list->row_bytes), here = list->n > ahead ? list->n - ahead : 0;
    value_keys_run(dtype, rows, columns, 0, list, 0, here, list->values + ahead * list->row_bytes, P, sum, &most);
    value_keys_run(dtype, rows, columns, 0, list, here, list->n, list->next, P, sum, &most);
  }
  if (dtype == SFA_E4M3 && v_has_nan_e4m3(most)) {
    value_keys_slowly(dtype, rows, columns * V_LANES, list, P, E, O);
    return;
  }
  if (comes_in_pairs(dtype))
#pragma GCC unroll 8
    for (int a = 0; a < rows * columns; a += 2)
      v_join(sum + a);
#pragma GCC unroll 4
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
    for (int c = 0; c < columns; c++)
      vf_store(O + i * E + c * V_LANES, sum[i * columns + c]);
}

/* `n_rows` rows and a band of `columns` vectors. */
V_INLINE void value_keys_band(const sfa_dtype dtype, const int columns, const value_list *list, int32_t n_rows, const float *P, int64_t E,
                              float *O) {
  const int most = columns <= 4 ? V_LANES / 4 : 2; /* rows of a block: 16 or 8 sums and the vectors of V */
  for (; n_rows >= most; n_rows -= most, P += most * SFA_KEY_TILE, O += most * E)
    value_keys_block(dtype, most, columns, list, P, E, O);
  for (; n_rows > 0; n_rows--, P += SFA_KEY_TILE, O += E)
    value_keys_block(dtype, 1, columns, list, P, E, O);
}

/* The list's values from element e on. If nothing is wanted next, the last keys ask for these values again: that costs nothing. */
V_INLINE void list_from(const sfa_stored_rows *values, int32_t e, value_list *list) {
  const size_t bytes = sfa_stored_bytes(values->dtype, e);
  list->values = (const char *)values->values + bytes;
  list->next = values->next ? (const char *)values->next + bytes : list->values;
}

/* One row alone has 8 vectors at a time, more have 4 (2). */
V_INLINE void value_keys_of(const sfa_dtype dtype, const sfa_stored_rows *values, value_list *list, int32_t n_rows, const float *P,
                            int32_t E, float *O) {
  enum { few = 4 };
  int32_t e = 0;
  for (; n_rows < V_LANES / 4 && E - e >= 8 * V_LANES; e += 8 * V_LANES) {
    list_from(values, e, list);
    value_keys_band(dtype, 8, list, n_rows, P, E, O + e);
  }
  for (; E - e >= few * V_LANES; e += few * V_LANES) {
    list_from(values, e, list);
    value_keys_band(dtype, few, list, n_rows, P, E, O + e);
  }
  for (; E - e >= 2 * V_LANES; e += 2 * V_LANES) {
    list_from(values, e, list);
    value_keys_band(dtype, 2, list, n_rows, P, E, O + e);
  }
  if (e < E) { /* elements that fill no pair of vectors */
    list_from(values, e, list);
    value_keys_slowly(dtype, n_rows, E - e, list, P, E, O + e);
  }
}

static void value_keys_listed(const sfa_stored_rows *values, value_list *list, int32_t n_rows, const float *P, int32_t E, float *O) {
  switch (values->dtype) {
  case SFA_BF16: value_keys_of(SFA_BF16, values, list, n_rows, P, E, O); break;
  case SFA_F16: value_keys_of(SFA_F16, values, list, n_rows, P, E, O); break;
  case SFA_I8: value_keys_of(SFA_I8, values, list, n_rows, P, E, O); break;
  case SFA_I4: value_keys_of(SFA_I4, values, list, n_rows, P, E, O); break;
  case SFA_E4M3: value_keys_of(SFA_E4M3, values, list, n_rows, P, E, O); break;
  default: value_keys_of(SFA_F32, values, list, n_rows, P, E, O);
  }
}

/* Bit j: P[j] is not 0 (it may be NaN). */
V_INLINE uint64_t keys_with_weight(int32_t n_keys, const float *P) {
  uint64_t bits = 0;
#pragma GCC unroll 8
  for (int j = 0; j < SFA_KEY_TILE; j += V_LANES)
    bits |= (uint64_t)vm_bits(vf_ne(vf_load(P + j), vf_zero())) << j;
  return bits & ~(uint64_t)0 >> (SFA_KEY_TILE - n_keys);
}

static void list_keys(uint64_t bits, uint8_t keys[SFA_KEY_TILE + PREFETCH_KEYS], value_list *list) {
  list->keys = keys;
  list->n = __builtin_popcountll(bits);
  list->gaps = (bits & (bits + 1)) != 0;
  for (int32_t at = 0; list->gaps && at < list->n + PREFETCH_KEYS; at++) { /* the last one again and again */
    keys[at] = (uint8_t)__builtin_ctzll(bits);
    bits = bits & (bits - 1) ? bits & (bits - 1) : bits;
  }
}

/* P times the values' scales and what value_unit left out, into out. */
static void scale_keys(const sfa_stored_rows *values, int32_t n_rows, const float *P, float *out) {
  float scale[SFA_KEY_TILE];
  const vf unit = vf_set(1 / value_unit(values->dtype)); /* last: a product below 2^-126 is rounded before */
  load_scales(values, scale);
  for (int j = 0; j < SFA_KEY_TILE; j += V_LANES)
    for (int32_t i = 0; i < n_rows; i++)
      vf_store(out + i * SFA_KEY_TILE + j, vf_mul(vf_mul(vf_load(P + i * SFA_KEY_TILE + j), vf_load(scale + j)), unit));
}

static void value_keys(const sfa_stored_rows *values, int32_t n_rows, const float *P, int32_t E, float *O) {
  uint64_t weight[SFA_KEYS_ROWS], differ = 0;
  float scaled[SFA_KEYS_ROWS * SFA_KEY_TILE];
  uint8_t keys[SFA_KEY_TILE + PREFETCH_KEYS];
  if (values->scales)
    scale_keys(values, n_rows, P, scaled);
  for (int32_t i = 0; i < n_rows; i++) {
    weight[i] = keys_with_weight(values->n, P + i * SFA_KEY_TILE);
    if (values->dtype == SFA_E4M3) /* nothing of a row whose scale is 0, not even NaN */
      weight[i] &= keys_with_weight(values->n, scaled + i * SFA_KEY_TILE);
    differ |= weight[i] ^ weight[0];
  }
  if (values->scales)
    P = scaled;
  value_list list = {.row_bytes = (int64_t)sfa_stored_bytes(values->dtype, values->values_stride)};
  if (!differ) {
    list_keys(weight[0], keys, &list);
    value_keys_listed(values, &list, n_rows, P, E, O);
    return;
  }
  /* A row must not meet a value that it gives no weight: that may be inf or NaN. Rows that differ take turns. */
  for (int32_t i = 0; i < n_rows; i++) {
    list_keys(weight[i], keys, &list);
    value_keys_listed(values, &list, 1, P + i * SFA_KEY_TILE, E, O + (int64_t)i * E);
  }
}
