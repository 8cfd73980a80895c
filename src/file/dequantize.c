/* Tensor formats to f32, as ggml defines them. A block of 32 or 256 elements shares its scales; w = scale * q (+ offset), multiplication
 * and addition each rounded to f32, so that the numbers are those of ggml's own reference to the bit.
 *
 *   Q8_0  f16 d              i8 q[32]                          d * q
 *   Q4_0  f16 d              u4 q[32]                          d * (q - 8)
 *   Q4_1  f16 d, m           u4 q[32]                          d * q + m
 *   Q5_0  f16 d              u1 high[32]  u4 q[32]             d * (q - 16)
 *   Q5_1  f16 d, m           u1 high[32]  u4 q[32]             d * q + m
 *   Q4_K  f16 d, m  u6 s[8], o[8]              u4 q[256]       (d s) q - (m o), s and o of 32 elements
 *   Q5_K  f16 d, m  u6 s[8], o[8]  u1 high[256] u4 q[256]      the same
 *   Q6_K  u4 q[256]  u2 high[256]  i8 s[16]  f16 d             (d s) (q - 32), s of 16 elements
 *
 * Four-bit values come as bytes: first all lower nibbles of a run, then all upper ones.
 */
#include "base/half.h"
#include "file/weights.h"

#include <string.h>

static float load_f16(const uint8_t *data) {
  uint16_t half;
  memcpy(&half, data, sizeof half);
  return sfa_f32_from_f16(half);
}

static uint32_t load_u32(const uint8_t *data) {
  uint32_t bits;
  memcpy(&bits, data, sizeof bits);
  return bits;
}

static void from_f32(int64_t n_blocks, const uint8_t *data, float *out) { memcpy(out, data, (size_t)n_blocks * sizeof *out); }

static void from_f16(int64_t n_blocks, const uint8_t *data, float *out) {
  for (int64_t i = 0; i < n_blocks; i++)
    out[i] = load_f16(data + 2 * i);
}

static void from_bf16(int64_t n_blocks, const uint8_t *data, float *out) {
  for (int64_t i = 0; i < n_blocks; i++) {
    uint16_t half;
    memcpy(&half, data + 2 * i, sizeof half);
    out[i] = sfa_f32_from_bf16(half);
  }
}

static void from_q8_0(int64_t n_blocks, const uint8_t *data, float *out) {
  for (; n_blocks > 0; n_blocks--, data += 34, out += 32) {
    const float d = load_f16(data);
    for (int i = 0; i < 32; i++)
      out[i] = d * (float)(int8_t)data[2 + i];
  }
}

static void from_q4_0(int64_t n_blocks, const uint8_t *data, float *out) {
  for (; n_blocks > 0; n_blocks--, data += 18, out += 32) {
    const float d = load_f16(data);
    for (int i = 0; i < 16; i++) {
      out[i] = d * (float)((data[2 + i] & 15) - 8);
      out[i + 16] = d * (float)((data[2 + i] >> 4) - 8);
    }
  }
}

static void from_q4_1(int64_t n_blocks, const uint8_t *data, float *out) {
  for (; n_blocks > 0; n_blocks--, data += 20, out += 32) {
    const float d = load_f16(data), m = load_f16(data + 2);
    for (int i = 0; i < 16; i++) {
      out[i] = d * (float)(data[4 + i] & 15) + m;
      out[i + 16] = d * (float)(data[4 + i] >> 4) + m;
    }
  }
}

static void from_q5_0(int64_t n_blocks, const uint8_t *data, float *out) {
  for (; n_blocks > 0; n_blocks--, data += 22, out += 32) {
    const float d = load_f16(data);
    const uint32_t high = load_u32(data + 2);
    for (int i = 0; i < 16; i++) {
      out[i] = d * (float)((int)((data[6 + i] & 15u) | (high >> i & 1) << 4) - 16);
      out[i + 16] = d * (float)((int)((uint32_t)data[6 + i] >> 4 | (high >> (i + 16) & 1) << 4) - 16);
    }
  }
}

static void from_q5_1(int64_t n_blocks, const uint8_t *data, float *out) {
  for (; n_blocks > 0; n_blocks--, data += 24, out += 32) {
    const float d = load_f16(data), m = load_f16(data + 2);
    const uint32_t high = load_u32(data + 4);
    for (int i = 0; i < 16; i++) {
      out[i] = d * (float)((data[8 + i] & 15u) | (high >> i & 1) << 4) + m;
      out[i + 16] = d * (float)((uint32_t)data[8 + i] >> 4 | (high >> (i + 16) & 1) << 4) + m;
    }
  }
}

/* Scale and offset of sub-block s (0..7) of Q4_K and Q5_K: 16 numbers of 6 bits in 12 bytes. The first four of each kind are the lower six
 * bits of bytes 0-3 and 4-7, whose upper two bits go on top of the nibbles of bytes 8-11 for the last four. */
static void load_scale(const uint8_t *packed, int s, float *scale, float *offset) {
  if (s < 4) {
    *scale = (float)(packed[s] & 63);
    *offset = (float)(packed[s + 4] & 63);
  } else {
    *scale = (float)((packed[s + 4] & 15) | (packed[s - 4] >> 6) << 4);
    *offset = (float)((packed[s + 4] >> 4) | (packed[s] >> 6) << 4);
  }
}

/* Q4_K (high NULL) and Q5_K: sub-blocks 2j and 2j + 1 are the lower and upper nibbles of 32 bytes; bit s of high[i] tops element i of s. */
static void block_k(const uint8_t *head, const uint8_t *high, const uint8_t *quants, float *out) {
  const float d = load_f16(head), m = load_f16(head + 2);
  for (int s = 0; s < 8; s++, out += 32) {
    float scale, offset;
    load_scale(head + 4, s, &scale, &offset);
    scale *= d;
    offset *= m;
    const uint8_t *q = quants + 32 * (s / 2);
    const int shift = 4 * (s & 1);
    for (int i = 0; i < 32; i++)
      out[i] = scale * (float)((q[i] >> shift & 15) | (high ? (high[i] >> s & 1) << 4 : 0)) - offset;
  }
}

static void from_q4_k(int64_t n_blocks, const uint8_t *data, float *out) {
  for (; n_blocks > 0; n_blocks--, data += 144, out += 256)
    block_k(data, NULL, data + 16, out);
}

static void from_q5_k(int64_t n_blocks, const uint8_t *data, float *out) {
  for (; n_blocks > 0; n_blocks--, data += 176, out += 256)
    block_k(data, data + 16, data + 48, out);
}

/* Each half of 128 elements has 64 bytes of nibbles, 32 bytes of upper bits and 8 scales. Its quarter c of 32 elements takes the nibbles of
 * bytes 32 (c % 2) and on (the lower ones for c < 2), and bits 2c, 2c + 1 of the upper bits. */
static void from_q6_k(int64_t n_blocks, const uint8_t *data, float *out) {
  for (; n_blocks > 0; n_blocks--, data += 210) {
    const float d = load_f16(data + 208);
    for (int half = 0; half < 2; half++)
      for (int r = 0; r < 8; r++, out += 16) { /* runs of 16, which share a scale */
        const int quarter = r / 2, shift = 4 * (quarter / 2);
        const uint8_t *low = data + 64 * half + 32 * (quarter % 2) + 16 * (r % 2), *high = data + 128 + 32 * half + 16 * (r % 2);
        const float scale = d * (float)(int8_t)data[192 + 8 * half + r];
        for (int i = 0; i < 16; i++)
          out[i] = scale * (float)(((low[i] >> shift & 15) | (high[i] >> 2 * quarter & 3) << 4) - 32);
      }
  }
}

void sfa_tensor_dequantize(sfa_tensor_type type, int64_t n, const void *data, float *out) {
  static void (*const from[])(int64_t, const uint8_t *, float *) = {
      [SFA_TENSOR_F32] = from_f32,   [SFA_TENSOR_F16] = from_f16,   [SFA_TENSOR_BF16] = from_bf16, [SFA_TENSOR_Q4_0] = from_q4_0,
      [SFA_TENSOR_Q4_1] = from_q4_1, [SFA_TENSOR_Q5_0] = from_q5_0, [SFA_TENSOR_Q5_1] = from_q5_1, [SFA_TENSOR_Q8_0] = from_q8_0,
      [SFA_TENSOR_Q4_K] = from_q4_k, [SFA_TENSOR_Q5_K] = from_q5_k, [SFA_TENSOR_Q6_K] = from_q6_k,
  };
  from[type](n / sfa_tensor_block_len(type), data, out);
}
