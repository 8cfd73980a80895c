/* select: dense rows -> (RMS norm) -> (RoPE) -> the K features of largest magnitude -> what attention reads, in one pass over x.
 *
 * The same supports and the same bytes as the CPU's: magnitudes are compared as integers, so NaN is largest, ties go to the lower feature;
 * norm and rotation round in the order of device/rows_tmpl.c (sums in 16 chains, feature f in chain f mod 16, joined as a tree) and of
 * kernel/convert_tmpl.c (two rounded products and a rounded sum).
 *
 * Rows of up to 256 features lie over 4, 8 or 16 lanes (cuda_rows.cuh), 8, 4 or 2 rows a warp:
 *   1. The threshold, a magnitude that exactly K reach, is searched between a bound that K or more reach and the maximum; a step compares
 *      16 features a lane and adds up over the row's lanes. Rows where features tie at the K-th place end with the K-th magnitude itself.
 *   2. A mask of 16 bits a lane. Ties: the first ones in feature order.
 *   3. The kept features go to shared memory in feature order (prefix sums over the lanes' counts), and from there, a slot a lane, rounded
 *      to the store. Rows with zeros, bitmaps and f32 rows leave from the registers.
 * bf16 rows that are neither normed nor turned go to a thread each (select_bf16.cu). Longer rows, and memory that vectors cannot take, go
 * the plain way: a block a row, the threshold by four digits of 8 bits.
 */
#include "base/cuda_early.cuh"
#include "cuda/select_bf16.cuh"

enum { WARPS = 4, WIDE_THREADS = 256, WIDE_WARPS = WIDE_THREADS / 32, FEW_ROWS = 64 };

static const uint32_t F16_LARGEST = 0x477fe000u, INFINITE = 0x7f800000u; /* 65504 and inf */

/* ---- Norm and rotation, feature by feature ---------------------------------------------------------------------------------------- */

/* Element f of a row of x. */
SFA_DEVICE float load(const sfa_cuda_select &s, const void *x, int32_t f) {
  return s.x.dtype == SFA_BF16 ? f32_from_bf16(((const uint16_t *)x)[f]) : ((const float *)x)[f];
}

/* Features a, a + 16, ... of a row; the sum of the 16 chains comes to the first of 16 lanes. */
SFA_DEVICE float norm_factor(const sfa_cuda_select &s, const void *x, int32_t a) {
  float squares = 0.0f;
  for (int32_t f = a; f < s.dim; f += 16) {
    const float v = load(s, x, f);
    squares = __fmaf_rn(v, v, squares);
  }
#pragma unroll
  for (int apart = 8; apart > 0; apart /= 2)
    squares = __fadd_rn(squares, __shfl_xor_sync(~0u, squares, apart));
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(squares, (float)s.dim), s.norm_eps)));
}

SFA_DEVICE float normed(const sfa_cuda_select &s, const void *x, float factor, int32_t f) {
  const float v = load(s, x, f);
  return s.norm_weight ? __fmul_rn(__fmul_rn(v, factor), s.norm_weight[f]) : v;
}

/* (a, b) becomes (a cos - b sin, b cos + a sin). */
SFA_DEVICE void turn(float *a, float *b, float c, float s) {
  const float x = *a, y = *b;
  *a = __fsub_rn(__fmul_rn(x, c), __fmul_rn(y, s));
  *b = __fadd_rn(__fmul_rn(y, c), __fmul_rn(x, s));
}

/* Feature f as it is selected. */
SFA_DEVICE float turned(const sfa_cuda_select &s, const void *x, float factor, int64_t line, int32_t f) {
  float v = normed(s, x, factor, f);
  if (!s.rope_cos || f >= 2 * s.n_pairs)
    return v;
  const bool first = s.rope_interleaved ? f % 2 == 0 : f < s.n_pairs;
  const int32_t apart = s.rope_interleaved ? 1 : s.n_pairs;
  const int64_t at = line * s.n_pairs + (s.rope_interleaved ? f / 2 : first ? f : f - s.n_pairs);
  float other = normed(s, x, factor, first ? f + apart : f - apart);
  if (first)
    turn(&v, &other, s.rope_cos[at], s.rope_sin[at]);
  else
    turn(&other, &v, s.rope_cos[at], s.rope_sin[at]);
  return v;
}

/* Of four neighbours the two largest stay, ties to the lower one; the others become 0. */
SFA_DEVICE void keep_two(float *x) {
  uint32_t m[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    m[i] = magnitude_of(x[i]);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int n_before = 0;
#pragma unroll
    for (int j = 0; j < 4; j++)
      n_before += j < i ? m[j] >= m[i] : j > i && m[j] > m[i];
    if (n_before >= 2)
      x[i] = 0.0f;
  }
}

/* ---- Rows over lanes -------------------------------------------------------------------------------------------------------------- */

/* The lane's 16 features of a row. */
template <int L>
SFA_DEVICE void load_slots(const sfa_cuda_select &s, const void *x, int32_t lane, float factor, int64_t line, bool vectors, float *v) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int32_t first = feature_of<L>(lane, 8 * half);
    float *to = v + 8 * half;
    if (first >= s.dim) {
#pragma unroll
      for (int j = 0; j < 8; j++)
        to[j] = 0.0f;
    } else if (vectors) {
      if (s.x.dtype == SFA_BF16)
        take_eight((const uint16_t *)x + first, SFA_BF16, to);
      else
        take_eight((const float *)x + first, SFA_F32, to);
      if (s.norm_weight)
#pragma unroll
        for (int j = 0; j < 8; j++)
          to[j] = __fmul_rn(__fmul_rn(to[j], factor), s.norm_weight[first + j]);
    } else
#pragma unroll
      for (int j = 0; j < 8; j++)
        to[j] = turned(s, x, factor, line, first + j);
  }
  if (vectors && s.rope_cos) { /* pairs lie in the lane: neighbours, or the same place of both halves */
    const float *cos = s.rope_cos + line * s.n_pairs, *sin = s.rope_sin + line * s.n_pairs;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int a = s.rope_interleaved ? 2 * j : j;
      const int32_t f = feature_of<L>(lane, a), p = s.rope_interleaved ? f / 2 : f;
      if (p < s.n_pairs)
        if (s.rope_interleaved)
          turn(&v[2 * j], &v[2 * j + 1], cos[p], sin[p]);
        else
          turn(&v[j], &v[j + 8], cos[p], sin[p]);
    }
  }
}

/* Bit j: m[j] is at least limit. */
SFA_DEVICE uint32_t reached(const uint32_t *m, uint32_t limit) {
  uint32_t mask = 0;
#pragma unroll
  for (int j = 0; j < SLOTS; j++)
    mask |= (uint32_t)(m[j] >= limit) << j;
  return mask;
}

/* How many of the lane's m are at least limit, by multiply-adds, of which a multiprocessor does twice as many as comparisons: (m - below)
 * 2^64, held to 0 and 1, is 1 where m is more than `below`, the number before limit, as long as a unit of its last place is 2^-64 or more
 * and 2^64 times it is finite. m without NaN. */
static const uint32_t LEAST_COUNTED = 0x2b800000u, MOST_COUNTED = 0x5e800000u; /* 2^-40, 2^62 */
SFA_DEVICE float count_reached(const uint32_t *m, uint32_t limit) {
  const float below = -__fmul_rn(__uint_as_float(limit - 1), 0x1p64f);
  float n[2] = {0.0f, 0.0f};
#pragma unroll
  for (int j = 0; j < SLOTS; j++)
    n[j % 2] += __saturatef(__fmaf_rn(__uint_as_float(m[j]), 0x1p64f, below));
  return n[0] + n[1];
}

template <int L, typename T> SFA_DEVICE T group_sum(T x) {
#pragma unroll
  for (int apart = L / 2; apart > 0; apart /= 2)
    x += __shfl_xor_sync(~0u, x, apart);
  return x;
}

/* How many bits of the row's masks stand before the lane's low and before its high byte, and in all. */
template <int L> SFA_DEVICE int32_t bits_before(uint32_t mask, int32_t lane, int32_t *low, int32_t *high) {
  const int32_t own = __popc(mask & 0xffu) | __popc(mask >> 8) << 16;
  int32_t sum = own;
#pragma unroll
  for (int apart = 1; apart < L; apart *= 2) {
    const int32_t before = __shfl_up_sync(~0u, sum, apart, L);
    sum += lane >= apart ? before : 0;
  }
  const int32_t all = __shfl_sync(~0u, sum, L - 1, L);
  *low = (sum - own) & 0xffff;
  *high = (all & 0xffff) + ((sum - own) >> 16);
  return (all & 0xffff) + (all >> 16);
}

/* The lowest n bits of those in a byte. */
SFA_DEVICE uint32_t lowest_bits(uint32_t byte, int32_t n) {
  while (__popc(byte) > max(n, 0))
    byte ^= 0x80000000u >> __clz(byte);
  return byte;
}

/* The lane's mask of the k largest of its row's magnitudes, which are multiples of unit. quarters: the maxima of four and four of the
 * lane's; most: of the row's. */
template <int L>
SFA_DEVICE uint32_t largest(const uint32_t *m, int32_t lane, int32_t k, uint32_t unit, const uint32_t *quarters, uint32_t most) {
  /* k or more reach low, fewer reach high. Every lane has one that reaches the least of the lanes' maxima; so have halves, and quarters. */
  uint32_t low = 0, high = most + unit;
  if (k <= 4 * L) {
    const uint32_t a = max(quarters[0], quarters[1]), b = max(quarters[2], quarters[3]);
    low = k <= L ? max(a, b) : k <= 2 * L ? min(a, b) : min(min(quarters[0], quarters[1]), min(quarters[2], quarters[3]));
    low = ~group_max<L>(~low);
  }
  int32_t n_low = 0; /* that reach low, once it was tried; a row whose search has ended tries it again */
  if (!__any_sync(~0u, low < LEAST_COUNTED || most >= MOST_COUNTED)) {
    const float wanted = (float)k;
    float n_reached = 0.0f;
    while (__any_sync(~0u, high - low > unit)) {
      const uint32_t trial = low + ((high - low) / 2 & ~(unit - 1));
      const float n = group_sum<L>(count_reached(m, trial));
      const bool enough = n >= wanted;
      low = enough ? trial : low;
      n_reached = enough ? n : n_reached;
      high = enough ? high : trial;
      high = n == wanted ? trial + unit : high;
    }
    n_low = (int32_t)n_reached;
  } else /* tiny or huge, infinite or NaN; or a k for which there is no bound: down from the maximum in growing steps, then halves */
    for (uint32_t step = 1u << 22; __any_sync(~0u, high - low > unit); step = min(2 * step, 1u << 30)) {
      const uint32_t trial = low == 0 && high > step ? high - step : low + ((high - low) / 2 & ~(unit - 1));
      const int32_t n = group_sum<L>(__popc(reached(m, trial)));
      if (high - low > unit) {
        low = n >= k ? trial : low;
        n_low = n >= k ? n : n_low;
        high = n == k ? trial + unit : n > k ? high : trial;
      }
    }
  uint32_t mask = reached(m, low);
  const bool exact = n_low == k;
  if (__any_sync(~0u, !exact)) { /* what is above the k-th magnitude, and the first ones at it */
    const uint32_t above = reached(m, low + 1), equal = mask & ~above;
    int32_t before_low, before_high;
    const int32_t n_equal = k - group_sum<L>(__popc(above));
    bits_before<L>(equal, lane, &before_low, &before_high);
    if (!exact)
      mask = above | lowest_bits(equal & 0xffu, n_equal - before_low) | lowest_bits(equal >> 8, n_equal - before_high) << 8;
  }
  return mask;
}

/* Two words at an address of shared memory, which the compiler would compute anew for each slot. */
SFA_DEVICE void put_pair(uint32_t at, float value, uint32_t id) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "f"(value), "r"(id) : "memory");
}

/* A warp's rows: each group of L lanes has one of its own. there: it is to be written; kept: room of the warp's. */
template <int L>
SFA_DEVICE void select_group(const sfa_cuda_select &s, bool vectors, float2 *kept, int32_t token, int32_t head, bool there) {
  constexpr int ROWS = 32 / L;
  const int32_t group = threadIdx.x % 32 / L, lane = threadIdx.x % L, k = s.k == 0 ? s.dim : s.k;
  const uint32_t unit = s.x.dtype == SFA_BF16 && !s.norm_weight && !s.rope_cos ? 0x10000u : 1;
  float2 *slots = kept + group * k;
  const uint32_t slots_at = (uint32_t)__cvta_generic_to_shared(slots);
  const token_place at = place_of(s, token);
  float factor = 1.0f;
  if (s.norm_weight)
    for (int pair = 0; pair < ROWS; pair += 2) { /* 16 lanes a row */
      const int32_t from = (pair + threadIdx.x % 32 / 16) * L;
      const void *other = row_at(s.x, __shfl_sync(~0u, token, from), __shfl_sync(~0u, head, from));
      const float mine = __shfl_sync(~0u, norm_factor(s, other, threadIdx.x % 16), group % 2 * 16);
      factor = group / 2 * 2 == pair ? mine : factor;
    }
  float v[SLOTS];
  load_slots<L>(s, row_at(s.x, token, head), lane, factor, at.line, vectors, v);
  if (s.two_of_four && s.k)
#pragma unroll
    for (int j = 0; j < SLOTS; j += 4)
      keep_two(v + j);

  uint32_t m[SLOTS], quarters[4] = {0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < SLOTS; j++) {
    m[j] = magnitude_of(v[j]);
    asm("" : "+r"(m[j])); /* kept in a register, not taken from v in each step of the search */
    quarters[j / 4] = max(quarters[j / 4], m[j]);
  }
  const uint32_t most = group_max<L>(max(max(quarters[0], quarters[1]), max(quarters[2], quarters[3])));
  const bool cut = k < s.dim;
  uint32_t mask = cut ? largest<L>(m, lane, k, unit, quarters, most)
                      : (feature_of<L>(lane, 0) < s.dim ? 0xffu : 0u) | (feature_of<L>(lane, 8) < s.dim ? 0xff00u : 0u);

  const row_rounding r = rounding_of(s.has_store ? s.store.format.dtype : SFA_F32, most);
  if (s.n_bad && s.has_store && (has_scale(r.dtype) || r.dtype == SFA_F16) && __any_sync(~0u, most > F16_LARGEST)) {
    uint32_t beyond = 0;
#pragma unroll
    for (int j = 0; j < SLOTS; j++)
      beyond |= (mask >> j & 1) & (m[j] > F16_LARGEST && m[j] < INFINITE);
    if (group_max<L>(beyond) && there && lane == 0)
      atomicAdd(s.n_bad, 1);
  }
  const bool writes_rows = s.rows.data || s.rows_f32;
  if (s.has_store && s.store.format.k) {
    int32_t low, high;
    bits_before<L>(mask, lane, &low, &high);
    uint32_t next[2] = {slots_at + 8 * low, slots_at + 8 * high};
#pragma unroll
    for (int j = 0; j < SLOTS; j++)
      if (mask >> j & 1) {
        put_pair(next[j / 8], v[j], (uint32_t)feature_of<L>(lane, j));
        next[j / 8] += 8;
      }
    __syncwarp();
    unsigned char *to_ids = stored_ids(s.store, at.sequence, head, at.stored), *to = stored_values(s.store, at.sequence, head, at.stored);
    for (int32_t slot = lane; slot < k; slot += L) {
      const float rounded = stored(r, slots[slot].x);
      if (there) {
        to_ids[slot] = (unsigned char)__float_as_uint(slots[slot].y);
        put_element(to, r.dtype, slot, rounded);
      }
      slots[slot].x = rounded;
    }
    __syncwarp();
    if (writes_rows && r.dtype != SFA_F32) {
      bits_before<L>(mask, lane, &low, &high);
#pragma unroll
      for (int j = 0; j < SLOTS; j++)
        if (mask >> j & 1)
          v[j] = slots[j < 8 ? low++ : high++].x;
    }
    __syncwarp();
  } else if (s.has_store) {
    unsigned char *to = stored_values(s.store, at.sequence, head, at.stored);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int32_t f = feature_of<L>(lane, 8 * half);
#pragma unroll
      for (int j = 8 * half; j < 8 * half + 8; j++)
        v[j] = mask >> j & 1 ? stored(r, v[j]) : 0.0f;
      if (there && f < s.dim)
        put_eight(to + (r.dtype == SFA_I4 ? f / 2 : f * bytes_of(r.dtype)), r.dtype, v + 8 * half);
    }
  }
  if (s.has_store && has_scale(r.dtype) && there && lane == 0)
    *stored_scale(s.store, at.sequence, head, at.stored) = (uint16_t)r.scale;
  if (writes_rows) {
#pragma unroll
    for (int j = 0; j < SLOTS; j++)
      v[j] = mask >> j & 1 ? v[j] : 0.0f;
    if (s.rows.data)
      put_row<L>(s.rows, s.row_scales, token, head, s.n_heads, s.dim, lane, v, r.unit, is_whole(r.dtype), there);
    if (s.rows_f32)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int32_t f = feature_of<L>(lane, 8 * half);
#pragma unroll
        for (int j = 8 * half; j < 8 * half + 8; j++)
          v[j] = __fmul_rn(v[j], r.unit);
        if (there && f < s.dim)
          put_eight(s.rows_f32 + ((int64_t)token * s.n_heads + head) * s.dim + f, SFA_F32, v + 8 * half);
      }
  }
  if (s.support && there) {
    const int32_t n_bytes = (s.dim + 31) / 32 * 4;
    uint8_t *bits = (uint8_t *)s.support + ((int64_t)token * s.n_heads + head) * n_bytes;
#pragma unroll
    for (int half = 0; half < 2; half++)
      if (half * L + lane < n_bytes)
        bits[half * L + lane] = (uint8_t)(mask >> 8 * half);
  }
}

template <int L> __global__ void __launch_bounds__(32 * WARPS) select_rows(const __grid_constant__ sfa_cuda_select s, bool vectors) {
  constexpr int ROWS = 32 / L;
  __shared__ float2 kept[WARPS][32 * SLOTS]; /* of each row the k values, and their ids as bits */
  const int32_t warp = threadIdx.x / 32, group = threadIdx.x % 32 / L, n_tokens = tokens_of(s.tokens);
  for (int32_t first = (blockIdx.x * WARPS + warp) * ROWS; first < n_tokens; first += gridDim.x * WARPS * ROWS)
    select_group<L>(s, vectors, kept[warp], min(first + group, n_tokens - 1), blockIdx.y, first + group < n_tokens);
}

/* Keys and values of a few tokens in one launch: a block, whose warps take the rows of one side and then those of the other. */
struct store_job {
  sfa_cuda_select sides[2];
  bool vectors[2];
  int32_t *len;
};

template <int L> __global__ void __launch_bounds__(32 * WARPS) store_rows(const __grid_constant__ store_job j) {
  constexpr int ROWS = 32 / L;
  __shared__ float2 kept[WARPS][32 * SLOTS];
  const int32_t warp = threadIdx.x / 32, group = threadIdx.x % 32 / L, n_tokens = (int32_t)j.sides[0].tokens.max_seqlen;
  sfa_cuda_wait_for_previous();
  for (int32_t side = 0, piece = warp; side < 2; side++) {
    const int32_t n_heads = j.sides[side].n_heads, n_rows = n_tokens * n_heads, n_pieces = (n_rows + ROWS - 1) / ROWS;
    for (; piece < n_pieces; piece += WARPS) {
      const int32_t row = min(piece * ROWS + group, n_rows - 1);
      select_group<L>(j.sides[side], j.vectors[side], kept[warp], row / n_heads, row % n_heads, piece * ROWS + group < n_rows);
    }
    piece -= n_pieces;
  }
  __syncthreads();
  if (threadIdx.x == 0)
    *j.len += n_tokens;
}

/* ---- A block a row ---------------------------------------------------------------------------------------------------------------- */

/* Feature f as it may be kept. */
SFA_DEVICE float candidate(const sfa_cuda_select &s, const void *x, float factor, int64_t line, int32_t f) {
  if (!s.two_of_four || !s.k)
    return turned(s, x, factor, line, f);
  float four[4];
  for (int i = 0; i < 4; i++)
    four[i] = turned(s, x, factor, line, f / 4 * 4 + i);
  keep_two(four);
  return f % 4 == 0 ? four[0] : f % 4 == 1 ? four[1] : f % 4 == 2 ? four[2] : four[3];
}

/* How many threads before this one, and in the block, say `what`. */
SFA_DEVICE int32_t rank_in_block(bool what, int32_t *counts, int32_t *all) {
  const uint32_t ballot = __ballot_sync(~0u, what);
  const int32_t warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0)
    counts[warp] = __popc(ballot);
  __syncthreads();
  int32_t before = __popc(ballot & ((1u << threadIdx.x % 32) - 1));
  *all = 0;
  for (int32_t w = 0; w < WIDE_WARPS; w++) {
    before += w < warp ? counts[w] : 0;
    *all += counts[w];
  }
  __syncthreads();
  return before;
}

__global__ void __launch_bounds__(WIDE_THREADS) select_wide(const __grid_constant__ sfa_cuda_select s) {
  __shared__ int32_t digits[256], counts[WIDE_WARPS], still;
  __shared__ uint32_t most_of_row, prefix;
  __shared__ float factor_of_row;
  __shared__ bool beyond;
  const int64_t n_rows = (int64_t)tokens_of(s.tokens) * s.n_heads;
  const int32_t D = s.dim, k = s.k == 0 ? D : s.k;
  for (int64_t row = blockIdx.x; row < n_rows; row += gridDim.x) {
    const int32_t token = (int32_t)(row / s.n_heads);
    const int32_t head = (int32_t)(row % s.n_heads);
    const token_place at = place_of(s, token);
    const void *x = row_at(s.x, token, head);
    if (threadIdx.x < 32) {
      const float factor = s.norm_weight ? norm_factor(s, x, threadIdx.x % 16) : 1.0f;
      if (threadIdx.x == 0)
        factor_of_row = factor, most_of_row = 0, prefix = 0, still = k, beyond = false;
    }
    __syncthreads();
    const float factor = factor_of_row;

    uint32_t most = 0;
    for (int32_t f = threadIdx.x; f < D; f += WIDE_THREADS)
      most = max(most, magnitude_of(candidate(s, x, factor, at.line, f)));
    atomicMax(&most_of_row, most);
    __syncthreads();
    most = most_of_row;

    for (int shift = 24; shift >= 0 && k < D; shift -= 8) { /* `prefix`: the digits so far; `still`: to be kept of those with them */
      digits[threadIdx.x] = 0;
      __syncthreads();
      for (int32_t f = threadIdx.x; f < D; f += WIDE_THREADS) {
        const uint32_t m = magnitude_of(candidate(s, x, factor, at.line, f));
        if (shift == 24 || (m ^ prefix) >> (shift + 8) == 0)
          atomicAdd(&digits[m >> shift & 255], 1);
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        int digit = 255;
        for (; digits[digit] < still; digit--)
          still -= digits[digit];
        prefix |= (uint32_t)digit << shift;
      }
      __syncthreads();
    }

    const row_rounding r = rounding_of(s.has_store ? s.store.format.dtype : SFA_F32, most);
    row_rounding of_rows = r; /* of the rows */
    const bool whole = is_whole(r.dtype);
    if (s.rows.data && !whole)
      of_rows = rounding_of(s.rows.dtype, magnitude_of(__fmul_rn(stored(r, __uint_as_float(most)), r.unit)));
    const uint32_t threshold = prefix;
    const bool narrow = has_scale(r.dtype) || r.dtype == SFA_F16;
    unsigned char *ids = NULL, *values = NULL;
    if (s.has_store) {
      values = stored_values(s.store, at.sequence, head, at.stored);
      if (s.store.format.k)
        ids = stored_ids(s.store, at.sequence, head, at.stored);
    }
    int32_t n_equal = 0, n_kept = 0;
    for (int32_t start = 0; start < D; start += WIDE_THREADS) {
      const int32_t f = start + threadIdx.x;
      const float v = f < D ? candidate(s, x, factor, at.line, f) : 0.0f;
      const uint32_t m = magnitude_of(v);
      bool kept = f < D;
      int32_t all;
      if (k < D) {
        const bool equal = f < D && m == threshold;
        const int32_t rank = n_equal + rank_in_block(equal, counts, &all);
        n_equal += all;
        kept = f < D && (m > threshold || (equal && rank < still));
      }
      const int32_t slot = n_kept + rank_in_block(kept, counts, &all);
      n_kept += all;
      if (kept && narrow && m > F16_LARGEST && m < INFINITE)
        beyond = true;
      const float rounded = kept ? stored(r, v) : 0.0f;
      if (ids && kept) {
        if (D <= 256)
          ids[slot] = (unsigned char)f;
        else
          ((uint16_t *)(void *)ids)[slot] = (uint16_t)f;
        put_element(values, r.dtype, slot, rounded);
      } else if (values && !ids) {
        const float next = __shfl_down_sync(~0u, rounded, 1);
        if (f < D && r.dtype != SFA_I4)
          put_element(values, r.dtype, f, rounded);
        else if (f < D && f % 2 == 0)
          values[f / 2] = (unsigned char)(((int)rounded + 8) | ((int)next + 8) << 4);
      }
      if (s.rows.data && f < D)
        put_element(row_at(s.rows, token, head), s.rows.dtype, f,
                    s.rows.dtype == SFA_BF16 ? __fmul_rn(rounded, r.unit)
                    : whole                  ? rounded
                                             : stored(of_rows, __fmul_rn(rounded, r.unit)));
      if (s.rows_f32 && f < D)
        s.rows_f32[row * D + f] = __fmul_rn(rounded, r.unit);
      const uint32_t bits = __ballot_sync(~0u, kept);
      if (s.support && threadIdx.x % 32 == 0 && f < D)
        s.support[row * ((D + 31) / 32) + f / 32] = bits;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      if (s.has_store && has_scale(r.dtype))
        *stored_scale(s.store, at.sequence, head, at.stored) = (uint16_t)r.scale;
      if (s.rows.data && s.rows.dtype == SFA_I8)
        s.row_scales[row] = of_rows.unit;
      if (s.n_bad && beyond)
        atomicAdd(s.n_bad, 1);
    }
    __syncthreads();
  }
}

/* ---- The launch ------------------------------------------------------------------------------------------------------------------- */

static const char *text_of(cudaError_t error) { return error == cudaSuccess ? NULL : cudaGetErrorString(error); }

static bool takes_lanes(const sfa_cuda_select *s) {
  return s->dim <= WIDEST && sfa_cuda_rows_aligned(&s->x) && (!s->rows.data || sfa_cuda_rows_aligned(&s->rows)) &&
         sfa_cuda_aligned(s->rows_f32, 0, 16) && (!s->has_store || s->store.format.k || sfa_cuda_store_aligned(&s->store));
}

/* Whether what is turned together lies in one lane. */
template <int L> static bool pairs_in_lane(const sfa_cuda_select *s) { return !s->rope_cos || s->rope_interleaved || s->n_pairs == 8 * L; }

template <int L> static void launch(const sfa_cuda_select *s, int64_t n_tokens, cudaStream_t stream) {
  const int64_t rows_a_block = 32 / L * WARPS, n_blocks = (n_tokens + rows_a_block - 1) / rows_a_block;
  const dim3 grid((unsigned)(n_blocks < 8192 ? n_blocks : 8192), (unsigned)s->n_heads);
  select_rows<L><<<grid, 32 * WARPS, 0, stream>>>(*s, pairs_in_lane<L>(s));
}

extern "C" const char *sfa_cuda_select_run(const sfa_cuda_select *args, sfa_cuda_stream stream) {
  const int64_t n_tokens = args->tokens.n_tokens ? args->tokens.n_tokens : args->tokens.n_sequences * args->tokens.max_seqlen;
  if (n_tokens == 0 || args->n_heads == 0)
    return NULL;
  if (sfa_select_bf16_takes(args))
    sfa_select_bf16(args, n_tokens, stream);
  else if (takes_lanes(args)) {
    if (args->dim <= 64)
      launch<4>(args, n_tokens, stream);
    else if (args->dim <= 128)
      launch<8>(args, n_tokens, stream);
    else
      launch<16>(args, n_tokens, stream);
  } else {
    const int64_t n_rows = n_tokens * args->n_heads;
    const unsigned n_blocks = (unsigned)(n_rows < 65536 ? n_rows : 65536);
    select_wide<<<n_blocks, WIDE_THREADS, 0, stream>>>(*args);
  }
  return text_of(cudaGetLastError());
}

template <int L> static const char *launch_store(const sfa_cuda_select *k, const sfa_cuda_select *v, int32_t *len, cudaStream_t stream) {
  const store_job job = {{*k, *v}, {pairs_in_lane<L>(k), pairs_in_lane<L>(v)}, len};
  return sfa_cuda_launch_after(store_rows<L>, dim3(1), 32 * WARPS, 0, stream, job);
}

static __global__ void grow_len(int32_t *len, int32_t by) { *len += by; }

extern "C" const char *sfa_cuda_store_run(const sfa_cuda_select *k, const sfa_cuda_select *v, int32_t *len, sfa_cuda_stream stream) {
  const int64_t n_tokens = k->tokens.max_seqlen;
  const int32_t dim = k->dim > v->dim ? k->dim : v->dim;
  if (n_tokens * (k->n_heads + v->n_heads) <= FEW_ROWS && takes_lanes(k) && takes_lanes(v))
    return (dim <= 64 ? launch_store<4> : dim <= 128 ? launch_store<8> : launch_store<16>)(k, v, len, stream);
  const char *error = sfa_cuda_select_run(k, stream);
  if (!error)
    error = sfa_cuda_select_run(v, stream);
  if (!error)
    grow_len<<<1, 1, 0, stream>>>(len, (int32_t)n_tokens);
  return error ? error : text_of(cudaGetLastError());
}
