/* Tensors of a model file as rows of linear layers: to f32, or to blocks of 32 with an f16 scale.
 *
 * Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 keep their integers and scales as they are. Q4_K and Q5_K keep their integers; the products of their two
 * levels of scales are rounded to f16, 2^-11 of a value that is itself one of 16 or 32. All others are rounded to 8 bits: scale =
 * f16(max|w| / 127), u = w / scale + 128. For Q6_K that adds at most a quarter of the error that the file has already. */
#include "base/half.h"
#include "model/model_parts.h"

#include <math.h>
#include <string.h>

sfa_storage sfa_weight_storage(const sfa_tensor *tensor, sfa_weight_format format) {
  bool in_floats = tensor->type == SFA_TENSOR_F32 || tensor->type == SFA_TENSOR_F16 || tensor->type == SFA_TENSOR_BF16;
  switch (format) {
  case SFA_WEIGHTS_F32: return SFA_STORE_F32;
  case SFA_WEIGHTS_BF16: return SFA_STORE_BF16;
  case SFA_WEIGHTS_AUTO:
    if (in_floats)
      return tensor->type == SFA_TENSOR_F32 ? SFA_STORE_F32 : tensor->type == SFA_TENSOR_F16 ? SFA_STORE_F16 : SFA_STORE_BF16;
    break;
  case SFA_WEIGHTS_INT8: break;
  }
  bool four_bits = tensor->type == SFA_TENSOR_Q4_0 || tensor->type == SFA_TENSOR_Q4_1 || tensor->type == SFA_TENSOR_Q4_K;
  return four_bits ? SFA_STORE_U4 : SFA_STORE_U8;
}

static const uint8_t *row_data(const sfa_tensor *t, int64_t row) {
  int64_t bytes = t->shape[1] / sfa_tensor_block_len(t->type) * sfa_tensor_block_bytes(t->type);
  return (const uint8_t *)t->data + row * bytes;
}

/* n elements of a column from row `first` on; the format has blocks of one. */
static void column_f32(const sfa_tensor *t, int64_t column, int64_t first, int64_t n, float *out) {
  int64_t bytes = sfa_tensor_block_bytes(t->type);
  for (int64_t i = 0; i < n; i++)
    sfa_tensor_dequantize(t->type, 1, (const uint8_t *)t->data + ((first + i) * t->shape[1] + column) * bytes, out + i);
}

static void row_f32(void *arg, int64_t row, float *out) {
  const sfa_weight_rows *rows = arg;
  const sfa_tensor *t = rows->tensor;
  if (rows->transposed)
    column_f32(t, row, 0, t->shape[0], out);
  else
    sfa_tensor_dequantize(t->type, t->shape[1], row_data(t, row), out);
}

/* ---- Blocks ------------------------------------------------------------------------------------------------------------------- */

static uint16_t read_u16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

static void nibbles(const uint8_t *packed, uint8_t *u) {
  for (int i = 0; i < 16; i++) {
    u[i] = packed[i] & 15;
    u[i + 16] = packed[i] >> 4;
  }
}

/* The fifth bits of 32 values. */
static void fifth_bits(const uint8_t *bits, uint8_t *u) {
  for (int i = 0; i < 32; i++)
    u[i] = (uint8_t)(u[i] | (bits[i / 8] >> (i % 8) & 1) << 4);
}

static void read_q4_0(const uint8_t *block, uint8_t *u, uint16_t *scale, uint16_t *minimum) {
  *scale = read_u16(block);
  *minimum = 0;
  nibbles(block + 2, u);
}

static void read_q4_1(const uint8_t *block, uint8_t *u, uint16_t *scale, uint16_t *minimum) {
  *scale = read_u16(block);
  *minimum = read_u16(block + 2);
  nibbles(block + 4, u);
}

static void read_q5_0(const uint8_t *block, uint8_t *u, uint16_t *scale, uint16_t *minimum) {
  *scale = read_u16(block);
  *minimum = 0;
  nibbles(block + 6, u);
  fifth_bits(block + 2, u);
}

static void read_q5_1(const uint8_t *block, uint8_t *u, uint16_t *scale, uint16_t *minimum) {
  *scale = read_u16(block);
  *minimum = read_u16(block + 2);
  nibbles(block + 8, u);
  fifth_bits(block + 4, u);
}

static void read_q8_0(const uint8_t *block, uint8_t *u, uint16_t *scale, uint16_t *minimum) {
  *scale = read_u16(block);
  *minimum = 0;
  for (int i = 0; i < 32; i++)
    u[i] = (uint8_t)(block[2 + i] ^ 0x80); /* int8 + 128 */
}

/* Q4_K, Q5_K: 256 values as 8 blocks; d, dmin f16; 8 six-bit scales and minima in 12 bytes; (fifth bits [32], bit s of byte i for value i
 * of block s;) nibbles [4][32], the low halves for block 2j, the high ones for 2j + 1. */
static void read_k_block(const uint8_t *super, int s, const uint8_t *high, const uint8_t *packed, uint8_t *u, uint16_t *scale,
                         uint16_t *minimum) {
  const uint8_t *six = super + 4;
  int factor = s < 4 ? six[s] & 63 : (six[s + 4] & 15) | (six[s - 4] >> 6) << 4;
  int shift = s < 4 ? six[s + 4] & 63 : six[s + 4] >> 4 | (six[s] >> 6) << 4;
  *scale = sfa_f16_from_f32(sfa_f32_from_f16(read_u16(super)) * (float)factor);
  *minimum = sfa_f16_from_f32(-sfa_f32_from_f16(read_u16(super + 2)) * (float)shift);
  for (int i = 0; i < 32; i++) {
    u[i] = packed[(s / 2) * 32 + i] >> (s % 2 * 4) & 15;
    if (high)
      u[i] = (uint8_t)(u[i] | (high[i] >> s & 1) << 4);
  }
}

static void read_q4_k(const uint8_t *super, int s, uint8_t *u, uint16_t *scale, uint16_t *minimum) {
  read_k_block(super, s, NULL, super + 16, u, scale, minimum);
}

static void read_q5_k(const uint8_t *super, int s, uint8_t *u, uint16_t *scale, uint16_t *minimum) {
  read_k_block(super, s, super + 16, super + 48, u, scale, minimum);
}

/* Formats whose integers are kept. Exactly one of the readers is there. */
static const struct kept_format {
  sfa_tensor_type type;
  int32_t offset;
  bool has_minimum;
  void (*block)(const uint8_t *block, uint8_t *u, uint16_t *scale, uint16_t *minimum);        /* of 32 */
  void (*piece)(const uint8_t *super, int s, uint8_t *u, uint16_t *scale, uint16_t *minimum); /* s-th of the 8 in 256 */
} kept_formats[] = {
    {SFA_TENSOR_Q4_0, 8, false, read_q4_0, NULL},   {SFA_TENSOR_Q4_1, 0, true, read_q4_1, NULL},
    {SFA_TENSOR_Q5_0, 16, false, read_q5_0, NULL},  {SFA_TENSOR_Q5_1, 0, true, read_q5_1, NULL},
    {SFA_TENSOR_Q8_0, 128, false, read_q8_0, NULL}, {SFA_TENSOR_Q4_K, 0, true, NULL, read_q4_k},
    {SFA_TENSOR_Q5_K, 0, true, NULL, read_q5_k},
};

static const struct kept_format *kept_format(sfa_tensor_type type) {
  for (size_t i = 0; i < sizeof kept_formats / sizeof *kept_formats; i++)
    if (kept_formats[i].type == type)
      return &kept_formats[i];
  return NULL;
}

static void kept_blocks(void *arg, int64_t row, uint8_t *u, uint16_t *scale, uint16_t *minimum) {
  const sfa_tensor *t = ((const sfa_weight_rows *)arg)->tensor;
  const struct kept_format *format = kept_format(t->type);
  const uint8_t *data = row_data(t, row);
  int64_t bytes = sfa_tensor_block_bytes(t->type);
  for (int64_t b = 0; b < t->shape[1] / SFA_BLOCK; b++)
    if (format->block)
      format->block(data + b * bytes, u + b * SFA_BLOCK, scale + b, minimum + b);
    else
      format->piece(data + b / 8 * bytes, (int)(b % 8), u + b * SFA_BLOCK, scale + b, minimum + b);
}

/* n (up to 32) floats to one block of 8 bits. */
static void round_block(const float *values, int64_t n, uint8_t *u, uint16_t *scale) {
  float largest = 0;
  for (int64_t i = 0; i < n; i++)
    largest = fmaxf(largest, fabsf(values[i]));
  *scale = sfa_f16_from_f32(largest / 127.0f);
  float step = sfa_f32_from_f16(*scale);
  for (int64_t i = 0; i < SFA_BLOCK; i++) {
    float q = i < n && step > 0 ? rintf(values[i] / step) : 0.0f;
    u[i] = (uint8_t)(128 + (int)fmaxf(-127.0f, fminf(127.0f, q)));
  }
}

static void rounded_blocks(void *arg, int64_t row, uint8_t *u, uint16_t *scale, uint16_t *minimum) {
  enum { PIECE = 256 }; /* a multiple of every format's block */
  const sfa_weight_rows *rows = arg;
  const sfa_tensor *t = rows->tensor;
  int64_t n = rows->transposed ? t->shape[0] : t->shape[1], bytes = sfa_tensor_block_bytes(t->type);
  const uint8_t *data = rows->transposed ? NULL : row_data(t, row);
  for (int64_t first = 0; first < n; first += PIECE) {
    float values[PIECE];
    int64_t n_values = sfa_min64(PIECE, n - first);
    if (rows->transposed)
      column_f32(t, row, first, n_values, values);
    else
      sfa_tensor_dequantize(t->type, n_values, data + first / sfa_tensor_block_len(t->type) * bytes, values);
    for (int64_t i = 0; i < n_values; i += SFA_BLOCK) {
      int64_t b = (first + i) / SFA_BLOCK;
      round_block(values + i, sfa_min64(SFA_BLOCK, n_values - i), u + b * SFA_BLOCK, scale + b);
      minimum[b] = 0;
    }
  }
}

void sfa_weight_source(const sfa_weight_rows *rows, sfa_storage storage, sfa_linear_source *source) {
  const sfa_tensor *t = rows->tensor;
  const struct kept_format *kept = kept_format(t->type);
  bool in_blocks = storage == SFA_STORE_U8 || storage == SFA_STORE_U4;
  *source = (sfa_linear_source){
      .n_in = (int32_t)t->shape[rows->transposed ? 0 : 1],
      .n_out = (int32_t)t->shape[rows->transposed ? 1 : 0],
      .arg = (void *)(uintptr_t)rows,
      .row_f32 = row_f32,
      .row_blocks = kept ? kept_blocks : rounded_blocks,
      .offset = !in_blocks ? 0
                : kept     ? kept->offset
                           : 128,
      .has_minimum = in_blocks && kept && kept->has_minimum,
  };
}
