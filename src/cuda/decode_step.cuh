/* cuda/decode_step.cuh: a warp's step of decode: scores of 32 keys for up to 8 rows, and sum of p v over 32 keys.
 *
 * Scores from codes: lane = key. The rows' queries stand in shared memory as a table that is repeated so that each lane reads its own
 * banks, whatever feature it asks for:
 *
 *     1 row      [D][32 copies]            4-byte reads, lane i reads copy i
 *     4 rows     [D][8 copies][4 rows]     16-byte reads, of 8 lanes at a time
 *     8 rows     [D][2][8 copies][4 rows]
 *
 * so a code's entry costs one or two reads and a multiply-add a row. An id of D or above (of a damaged page) reads within the table.
 *
 * Scores from dense keys, and all values, by mma m16n8k16 (bf16, f32 sums), transposed: keys or value columns are the 16 rows of A, the
 * rows of queries the 8 columns of B. A's elements then are what a lane (g = lane / 4, t = lane % 4) loads itself, 16 bytes at a time,
 * since neither the order of the features nor that of the columns matters to the product:
 *
 *     values   lane (g, t) takes of keys 4 t .. 4 t + 3 of 16 its share of the columns: of each 8 vectors of a row vector g.
 *              Two keys' elements of a column are one register of A.
 *     keys     lane (g, t) loads of keys g, g + 8 vector t of each 4; two neighbours in a row are one register of A.
 *
 * int8 to bf16: with l = low seven bits and s = sign, v = l - 128 s = (128 + l) - (128 + 128 s), both exact as bf16: two masks and a
 * subtraction for two elements.
 *
 * e4m3 to bf16: its bits at those of a bf16 are the number times 2^-120, subnormal or not: two masks and a product. 0x7f, NaN, would be
 * 480 there: where a vector has one, NaN is added once more for those elements alone.
 *
 * What stands in B, weights and queries, is f32: hi = bf16(x) and lo = bf16(x - hi) are multiplied both, which leaves 2^-17. Up to 4 rows
 * hi and lo are columns 0..3 and 4..7 of one B; 8 rows take two products.
 */
#ifndef SFA_CUDA_DECODE_STEP_CUH
#define SFA_CUDA_DECODE_STEP_CUH

#include "cuda/decode_call.cuh"

/* ---- Registers ----------------------------------------------------------------------------------------------------------------------- */

template <int BYTES> static __device__ __forceinline__ void sfa_decode_fetch(uint32_t *words, const unsigned char *from) {
  if constexpr (BYTES == 8) {
    uint2 x = __ldcs((const uint2 *)from);
    words[0] = x.x, words[1] = x.y;
  } else {
#pragma unroll
    for (int i = 0; i < BYTES / 16; i++) {
      uint4 x = __ldcs((const uint4 *)from + i);
      words[4 * i] = x.x, words[4 * i + 1] = x.y, words[4 * i + 2] = x.z, words[4 * i + 3] = x.w;
    }
  }
}

/* Two int8, as bytes 0 and 2 of `pair` (bytes 1 and 3: anything), to bf16. `magic` is 0x43004300 in a register: an instruction takes one
 * constant, and with two registers (pair & mask) | magic is one instruction. */
static __device__ __forceinline__ uint32_t sfa_decode_bf16_of_bytes(uint32_t pair, uint32_t magic) {
  uint32_t low, sign, out;
  asm("lop3.b32 %0, %1, 0x007f007f, %2, 0xea;" : "=r"(low) : "r"(pair), "r"(magic));
  asm("lop3.b32 %0, %1, 0x00800080, %2, 0xea;" : "=r"(sign) : "r"(pair), "r"(magic));
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(sign), "r"(0xbf80bf80u), "r"(low));
  return out;
}

/* Two e4m3, each in both bytes of a half of `pair`, to bf16; NaN as 480. */
static __device__ __forceinline__ uint32_t sfa_decode_bf16_of_e4m3(uint32_t pair) {
  uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"((pair & 0x80008000u) | (pair << 4 & 0x07f007f0u)), "r"(0x7b807b80u), "r"(0u));
  return out;
}

/* The same, but NaN for NaN, and 0 for all else. */
static __device__ __forceinline__ uint32_t sfa_decode_nan_of_e4m3(uint32_t pair) {
  uint32_t nan = ((pair & 0x007f007fu) + 0x00010001u) & 0x00800080u;
  return nan * 0xffu | nan >> 1;
}

static __device__ __forceinline__ uint32_t sfa_decode_pack(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

static __device__ __forceinline__ void sfa_decode_mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* x = hi + lo, to 16 bits each. */
static __device__ __forceinline__ void sfa_decode_split(float x, uint16_t *hi, uint16_t *lo) {
  uint32_t high = sfa_decode_pack(x, 0);
  *hi = (uint16_t)high;
  *lo = (uint16_t)sfa_decode_pack(x - __uint_as_float(high << 16), 0);
}

/* ---- Scores from products ------------------------------------------------------------------------------------------------------------ */

/* Products of a key with the rows become scores; -inf where a row does not see the key. whole: all of them do, straight: nothing but scale.
 */
template <int ROWS>
static __device__ __forceinline__ void sfa_decode_bend_rows(const sfa_decode_call &call, const sfa_decode_span &span,
                                                            const sfa_decode_query *queries, bool whole, bool straight, int32_t key,
                                                            float *s) {
  if (whole && straight) {
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      s[r] *= call.scale_log2;
    return;
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    sfa_decode_query query = queries[r];
    s[r] = sfa_decode_bend(call, s[r], query.head, key - span.first_position - query.token);
    if (!whole && !sfa_decode_sees(call, span, query.token, key))
      s[r] = -INFINITY;
  }
}

/* ---- Scores from codes --------------------------------------------------------------------------------------------------------------- */

/* Codes of DTYPE (SFA_I8 or SFA_BF16) with K entries; K = 0: a multiple of 8 known at run time, read when they are needed. WALKS: load_from
 * is there. */
template <int DTYPE, int K, int ROWS> struct sfa_decode_codes {
  enum { WALKS = 1, VALUE_BYTES = DTYPE == SFA_I8 ? 1 : 2, ENTRIES = K ? K : 8, FEATURE_SHIFT = ROWS == 8 ? 8 : 7 };
  uint32_t ids[ENTRIES / 4], values[ENTRIES * VALUE_BYTES / 4];
  const unsigned char *id_row, *value_row;
  uint16_t scale;

  static __host__ __device__ size_t table_bytes(const sfa_decode_call &call) { return (size_t)(call.id_mask + 1) << FEATURE_SHIFT; }
  static __host__ __device__ size_t exchange_bytes(void) { return 0; }

  /* Fills the table from rows q [ROWS][D]; features from D on are 0. */
  static __device__ __forceinline__ void prepare(const sfa_decode_call &call, const float *q, unsigned char *table) {
    int32_t dim = call.args.head_dim;
#pragma unroll 1
    for (int32_t i = (int32_t)threadIdx.x; i < (int32_t)(table_bytes(call) / 16); i += (int32_t)blockDim.x) {
      int32_t u = i >> (FEATURE_SHIFT - 4), row = ROWS == 8 ? (i >> 3 & 1) * 4 : 0;
      const float *from = q + row * dim + u;
      const int32_t next = ROWS == 1 ? 0 : dim; /* of 1 row four copies */
      ((float4 *)table)[i] = u < dim ? make_float4(from[0], from[next], from[2 * next], from[3 * next]) : make_float4(0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ void load(const sfa_decode_call &, const sfa_decode_rows *streams, const unsigned char *page, int32_t token,
                                       int32_t n_keys, int32_t lane) {
    int32_t own = min(token + lane, n_keys - 1);
    id_row = sfa_decode_row(streams[0], page, own);
    value_row = sfa_decode_row(streams[1], page, own);
    if (K) {
      sfa_decode_fetch<ENTRIES>(ids, id_row);
      sfa_decode_fetch<ENTRIES * VALUE_BYTES>(values, value_row);
    }
    if (DTYPE == SFA_I8)
      scale = __ldcs((const uint16_t *)(const void *)sfa_decode_row(streams[2], page, own));
  }

  /* As load, from the row's addresses. */
  __device__ __forceinline__ void load_from(const unsigned char *id, const unsigned char *value, const unsigned char *scale_at) {
    id_row = id;
    value_row = value;
    if (K) {
      sfa_decode_fetch<ENTRIES>(ids, id);
      sfa_decode_fetch<ENTRIES * VALUE_BYTES>(values, value);
    }
    if (DTYPE == SFA_I8)
      scale = __ldcs((const uint16_t *)(const void *)scale_at);
  }

  __device__ __forceinline__ void add(float *s, const unsigned char *table, uint32_t own, uint32_t mask) {
#pragma unroll
    for (int k = 0; k < ENTRIES; k++) {
      const int shift = FEATURE_SHIFT - 8 * (k & 3);
      uint32_t word = ids[k / 4], at = ((shift >= 0 ? word << (shift & 31) : word >> (-shift & 31)) & mask) | own;
      float x = DTYPE == SFA_I8 ? (float)(int8_t)(values[k / 4] >> 8 * (k & 3))
                                : __uint_as_float(k & 1 ? values[k / 2 % (ENTRIES * VALUE_BYTES / 4)] & 0xffff0000u
                                                        : values[k / 2 % (ENTRIES * VALUE_BYTES / 4)] << 16);
      if (ROWS == 1) {
        s[0] = fmaf(x, *(const float *)(table + at), s[0]);
      } else {
#pragma unroll
        for (int r = 0; r < ROWS; r += 4) {
          float4 q = *(const float4 *)(table + at + 32 * r);
          s[r % ROWS] = fmaf(x, q.x, s[r % ROWS]);
          s[(r + 1) % ROWS] = fmaf(x, q.y, s[(r + 1) % ROWS]);
          s[(r + 2) % ROWS] = fmaf(x, q.z, s[(r + 2) % ROWS]);
          s[(r + 3) % ROWS] = fmaf(x, q.w, s[(r + 3) % ROWS]);
        }
      }
    }
  }

  /* s [ROWS]: products of the lane's key and the rows, times factor. */
  __device__ __forceinline__ void score(const sfa_decode_call &call, const unsigned char *table, unsigned char *, int32_t lane,
                                        float factor, float *s) {
    uint32_t own = ROWS == 1 ? 4 * (uint32_t)lane : 16 * ((uint32_t)lane & 7), mask = call.id_mask << FEATURE_SHIFT;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      s[r] = 0;
    if (K) {
      add(s, table, own, mask);
    } else {
      for (int32_t k = 0; k < call.args.k.format.k; k += 8) {
        sfa_decode_fetch<8>(ids, id_row + k);
        sfa_decode_fetch<8 * VALUE_BYTES>(values, value_row + k * VALUE_BYTES);
        add(s, table, own, mask);
      }
    }
    float unit = DTYPE == SFA_I8 ? sfa_decode_half(scale) * factor : factor;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      s[r] *= unit;
  }
};

/* ---- Scores from dense keys ---------------------------------------------------------------------------------------------------------- */

/* Whole rows of D elements of DTYPE. `table` holds B of each k16, exchange the scores on their way from mma's lanes to the keys' lanes. */
template <int DTYPE, int D, int ROWS> struct sfa_decode_dense {
  enum {
    WALKS = 0,
    PER_VECTOR = DTYPE == SFA_I8 ? 16 : 8,
    VECTORS = D / 4 / PER_VECTOR, /* of a row, a lane */
    AT_ONCE = VECTORS < 4 ? VECTORS : 4,
    PARTS = 2 * VECTORS / AT_ONCE, /* of a step: 16 keys, AT_ONCE vectors of each row */
    K16 = PER_VECTOR / 4,          /* of a vector */
    SETS = ROWS == 8 ? 2 : 1,      /* of B: hi, lo */
    SCORE_PITCH = 36
  };
  uint32_t words[2 * AT_ONCE * 4];
  const unsigned char *rows[4]; /* keys g, g + 8, g + 16, g + 24 */
  uint16_t scale;

  static __host__ __device__ size_t table_bytes(const sfa_decode_call &) { return (size_t)(D / 16) * 32 * 8 * SETS; }
  static __host__ __device__ size_t exchange_bytes(void) { return (size_t)ROWS * SCORE_PITCH * sizeof(float); }

  /* B: [k16][set][lane] two registers; features of k16 number i, lane (g, t): see `feature`. */
  static __device__ __forceinline__ void prepare(const sfa_decode_call &, const float *q, unsigned char *table) {
    for (int32_t i = (int32_t)threadIdx.x; i < D / 16 * SETS * 32; i += (int32_t)blockDim.x) {
      int32_t lane = i & 31, set = i >> 5 & (SETS - 1), number = i / (32 * SETS), column = lane / 4;
      int32_t row = ROWS == 8 ? column : column & 3, first = number / K16 * 4 * PER_VECTOR + lane % 4 * PER_VECTOR + number % K16 * 4;
      uint16_t half[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        uint16_t hi = 0, lo = 0;
        if (row < ROWS)
          sfa_decode_split(q[row * D + first + j], &hi, &lo);
        half[j] = (ROWS == 8 ? set : column >= 4) ? lo : hi;
      }
      ((uint2 *)table)[i] = make_uint2((uint32_t)half[1] << 16 | half[0], (uint32_t)half[3] << 16 | half[2]);
    }
  }

  __device__ __forceinline__ void fetch_part(int part, int32_t t) {
    int at = part % (VECTORS / AT_ONCE) * AT_ONCE, pair = part / (VECTORS / AT_ONCE) * 2;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      sfa_decode_fetch<16>(words + 4 * i, rows[pair] + (at + i) * 64 + 16 * t);
      sfa_decode_fetch<16>(words + 4 * (AT_ONCE + i), rows[pair + 1] + (at + i) * 64 + 16 * t);
    }
  }

  __device__ __forceinline__ void load(const sfa_decode_call &, const sfa_decode_rows *streams, const unsigned char *page, int32_t token,
                                       int32_t n_keys, int32_t lane) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      rows[i] = sfa_decode_row(streams[1], page, min(token + lane / 4 + 8 * i, n_keys - 1));
    fetch_part(0, lane & 3);
    if (DTYPE == SFA_I8)
      scale = __ldcs((const uint16_t *)(const void *)sfa_decode_row(streams[2], page, min(token + lane, n_keys - 1)));
  }

  __device__ __forceinline__ void score(const sfa_decode_call &call, const unsigned char *table, unsigned char *exchange, int32_t lane,
                                        float factor, float *s) {
    float *scores = (float *)exchange;
    const uint32_t magic = call.magic;
    float c[4] = {0, 0, 0, 0};
    int32_t g = lane / 4, t = lane & 3;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      if (part)
        fetch_part(part, t);
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
#pragma unroll
        for (int j = 0; j < K16; j++) {
          int number = (part % (VECTORS / AT_ONCE) * AT_ONCE + i) * K16 + j;
          uint32_t a[4];
          if (DTYPE == SFA_I8) {
            uint32_t x = words[4 * i + j], y = words[4 * (AT_ONCE + i) + j];
            a[0] = sfa_decode_bf16_of_bytes(__byte_perm(x, x, 0x1100), magic),
            a[1] = sfa_decode_bf16_of_bytes(__byte_perm(y, y, 0x1100), magic);
            a[2] = sfa_decode_bf16_of_bytes(__byte_perm(x, x, 0x3322), magic),
            a[3] = sfa_decode_bf16_of_bytes(__byte_perm(y, y, 0x3322), magic);
          } else {
            a[0] = words[4 * i + 2 * (j & 1)], a[1] = words[4 * (AT_ONCE + i) + 2 * (j & 1)];
            a[2] = words[4 * i + 2 * (j & 1) + 1], a[3] = words[4 * (AT_ONCE + i) + 2 * (j & 1) + 1];
          }
#pragma unroll
          for (int set = 0; set < SETS; set++) {
            uint2 b = ((const uint2 *)table)[(number * SETS + set) * 32 + lane];
            sfa_decode_mma(c, a, b.x, b.y);
          }
        }
      }
      if (part % (VECTORS / AT_ONCE) == VECTORS / AT_ONCE - 1) { /* 16 keys are done: columns to the lanes of the keys */
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (ROWS < 8)
            c[i] += __shfl_xor_sync(~0u, c[i], 2);
          int row = 2 * t + (i & 1), key = part / (VECTORS / AT_ONCE) * 16 + g + 8 * (i >> 1);
          if (row < ROWS)
            scores[row * SCORE_PITCH + key] = c[i];
          c[i] = 0;
        }
      }
    }
    __syncwarp();
    float unit = DTYPE == SFA_I8 ? sfa_decode_half(scale) * factor : factor;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      s[r] = scores[r * SCORE_PITCH + lane] * unit;
    __syncwarp();
  }
};

/* ---- Values
 * ------------------------------------------------------------------------------------------------------------------------------ */

/* Sum of p v over rows of E elements of DTYPE (SFA_I8, SFA_E4M3 or SFA_BF16), 16 keys at a time: a half step. */
template <int DTYPE, int E, int ROWS> struct sfa_decode_values {
  enum {
    ELEMENT = DTYPE == SFA_BF16 ? 2 : 1,
    ROW_BYTES = E * ELEMENT,
    VECTOR = ROW_BYTES / 8 < 16 ? ROW_BYTES / 8 : 16, /* bytes */
    VECTOR_WORDS = VECTOR / 4,
    VECTORS = ROW_BYTES / 8 / VECTOR, /* of a row, a lane */
    M16 = E / 16,                     /* of all columns */
    M16_WORD = 2 / ELEMENT,           /* of a word */
    P_ROWS = ROWS == 8 ? 16 : 8,      /* of weights: hi and lo */
    P_PITCH = 32                      /* weights of a row: those of a step, in the order of sfa_decode_weight_at */
  };
  float sums[M16][4];

  __device__ __forceinline__ void clear(void) {
#pragma unroll
    for (int m = 0; m < M16; m++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sums[m][i] = 0;
  }

  /* Two elements of bytes to a register of A. */
  static __device__ __forceinline__ uint32_t pair_of(uint32_t pair, uint32_t magic) {
    return DTYPE == SFA_I8 ? sfa_decode_bf16_of_bytes(pair, magic) : sfa_decode_bf16_of_e4m3(pair);
  }

  /* Adds vector number `vector` of the lane's four keys; weights: hi and lo of the four keys. */
  __device__ __forceinline__ void add(int vector, const uint32_t x[4][VECTOR_WORDS], const uint2 &hi, const uint2 &lo, uint32_t magic) {
    if (DTYPE == SFA_E4M3)
      add_nan(vector, x, hi);
#pragma unroll
    for (int w = 0; w < VECTOR_WORDS; w++) {
#pragma unroll
      for (int half = 0; half < M16_WORD; half++) {
        uint32_t a[4];
        if (ELEMENT == 1) {
          const uint32_t even = half ? 0x6622 : 0x4400, odd = half ? 0x7733 : 0x5511;
          a[0] = pair_of(__byte_perm(x[0][w], x[1][w], even), magic);
          a[1] = pair_of(__byte_perm(x[0][w], x[1][w], odd), magic);
          a[2] = pair_of(__byte_perm(x[2][w], x[3][w], even), magic);
          a[3] = pair_of(__byte_perm(x[2][w], x[3][w], odd), magic);
        } else {
          a[0] = __byte_perm(x[0][w], x[1][w], 0x5410), a[1] = __byte_perm(x[0][w], x[1][w], 0x7632);
          a[2] = __byte_perm(x[2][w], x[3][w], 0x5410), a[3] = __byte_perm(x[2][w], x[3][w], 0x7632);
        }
        float *c = sums[(vector * VECTOR_WORDS + w) * M16_WORD + half];
        sfa_decode_mma(c, a, hi.x, hi.y);
        if (ROWS == 8)
          sfa_decode_mma(c, a, lo.x, lo.y);
      }
    }
  }

  /* NaN for elements that are it, of e4m3; seldom are there any. */
  __device__ __forceinline__ void add_nan(int vector, const uint32_t x[4][VECTOR_WORDS], const uint2 &weights) {
    uint32_t any = 0;
#pragma unroll
    for (int key = 0; key < 4; key++)
#pragma unroll
      for (int w = 0; w < VECTOR_WORDS; w++)
        any |= (x[key][w] & 0x7f7f7f7fu) + 0x01010101u;
    if (!__any_sync(~0u, any & 0x80808080u))
      return;
#pragma unroll
    for (int w = 0; w < VECTOR_WORDS; w++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t even = half ? 0x6622 : 0x4400, odd = half ? 0x7733 : 0x5511;
        uint32_t a[4] = {
            sfa_decode_nan_of_e4m3(__byte_perm(x[0][w], x[1][w], even)), sfa_decode_nan_of_e4m3(__byte_perm(x[0][w], x[1][w], odd)),
            sfa_decode_nan_of_e4m3(__byte_perm(x[2][w], x[3][w], even)), sfa_decode_nan_of_e4m3(__byte_perm(x[2][w], x[3][w], odd))};
        sfa_decode_mma(sums[((vector * VECTOR_WORDS + w) * M16_WORD + half) % M16], a, weights.x, weights.y);
      }
  }

  /* Weights of the lane's four keys of half step `half`: of a step's weights [P_ROWS][pitch]. */
  static __device__ __forceinline__ void weights_of(const uint16_t *weights, int pitch, int half, int32_t lane, uint2 *hi, uint2 *lo) {
    const uint16_t *from = weights + lane / 4 * pitch + (lane & 3) * 8 + half * 4;
    *hi = *(const uint2 *)from;
    *lo = ROWS == 8 ? *(const uint2 *)(from + 8 * pitch) : *hi;
  }

  /* Column of sums[m][0] and [1]; [2] and [3] are of the next one. */
  static __device__ __forceinline__ int32_t column(int m, int32_t lane) {
    const int word = m / M16_WORD, vector = word / VECTOR_WORDS;
    return (vector * 8 + lane / 4) * (VECTOR / ELEMENT) + (word % VECTOR_WORDS * 4 / ELEMENT) + m % M16_WORD * 2;
  }

  /* Sums of columns 2 t and 2 t + 1 of B, times those numbers. */
  __device__ __forceinline__ void scale(float even, float odd) {
#pragma unroll
    for (int m = 0; m < M16; m++)
      sums[m][0] *= even, sums[m][1] *= odd, sums[m][2] *= even, sums[m][3] *= odd;
  }
};

/* Where the weight of a step's key stands: lane t's four keys of each half step, 4 t .. 4 t + 3 and 16 + those, side by side. */
static __device__ __forceinline__ int32_t sfa_decode_weight_at(int32_t key) { return (key >> 2 & 3) * 8 + (key >> 4) * 4 + (key & 3); }

#endif
