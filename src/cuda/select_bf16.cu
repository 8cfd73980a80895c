/* select of bf16 rows as they are (no norm, no rotation), for the codes, rows and supports that attention reads: a thread a row, or two for
 * rows of more than 128 features. cuda/select.cu takes all other calls, and says what is computed; the bytes are the same.
 *
 *   1. A warp copies its rows to shared memory, 16 bytes a thread and step. Piece p of row r lies at p ^ r % 8 of the row, so that the
 * threads then read their own rows without conflicts. A thread's magnitudes stay in registers, two in a word.
 *   2. The threshold is searched by halves between the least of k or more maxima of parts of the row, which k reach, and 1 above the
 * maximum. A step counts by packed comparisons of f16 and sums of their ones: the bits of positive bf16 numbers below 2^121, taken as f16,
 * are numbers in the same order. Rows with larger ones, infinite ones or NaN are counted by comparing whole numbers.
 *   3. The same sums with powers of two as weights are the mask of what is kept; where features tie at the k-th place, the first ones.
 *   4. The kept ones are taken in feature order, eight slots at a time. */
#include "cuda/select_bf16.cuh"

enum { WARPS = 4 };
enum { F16_INFINITE = 0x7c00 };
static const uint32_t F16_LARGEST = 0x477fe000u, INFINITE = 0x7f800000u; /* as f32: 65504 and inf */

SFA_DEVICE uint32_t twice(uint32_t half) { return __byte_perm(half, 0, 0x1010); }

/* 1.0 in the halves of m that are at least those of limits, and 0 in the others. */
SFA_DEVICE uint32_t f16_reached(uint32_t m, uint32_t limits) {
  uint32_t is;
  asm("set.ge.f16x2.f16x2 %0, %1, %2;" : "=r"(is) : "r"(m), "r"(limits));
  return is;
}
SFA_DEVICE uint32_t f16_add(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}
SFA_DEVICE uint32_t f16_weigh(uint32_t is, uint32_t weight, uint32_t sum) {
  uint32_t to;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(to) : "r"(is), "r"(weight), "r"(sum));
  return to;
}

/* How many of the thread's magnitudes are at least limit. counts: 1..128 in each half are whole numbers of f16. */
template <int WORDS> SFA_DEVICE int32_t count_reached(const uint32_t *m, uint32_t limit, bool ordered) {
  if (ordered) {
    const uint32_t limits = twice(limit);
    uint32_t n[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < WORDS; i++)
      n[i % 4] = f16_add(n[i % 4], f16_reached(m[i], limits));
    const uint32_t sum = f16_add(f16_add(n[0], n[1]), f16_add(n[2], n[3]));
    return (int32_t)(__half2float(__ushort_as_half((unsigned short)sum)) + __half2float(__ushort_as_half((unsigned short)(sum >> 16))));
  }
  int32_t n = 0;
#pragma unroll
  for (int i = 0; i < WORDS; i++)
    n += (m[i] & 0xffffu) >= limit, n += m[i] >> 16 >= limit;
  return n;
}

/* The thread's features that are at least limit: feature 32 i + b is bit 31 - b of mask[i], so that the first one is the highest bit. */
template <int WORDS> SFA_DEVICE void mask_reached(const uint32_t *m, uint32_t limit, bool ordered, uint32_t *mask) {
  if (ordered) { /* eight features a sum, 1024 and a byte: bits of even features in the low half, of odd ones in the high half */
    const uint32_t limits = twice(limit);
#pragma unroll
    for (int i = 0; i < WORDS / 16; i++) {
      uint32_t byte[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint32_t *four = m + 16 * i + 4 * j;
        byte[j] = f16_weigh(f16_reached(four[0], limits), 0x54005800u, 0x64006400u); /* 64, 128 on 1024 */
        byte[j] = f16_weigh(f16_reached(four[1], limits), 0x4c005000u, byte[j]);     /* 16, 32 */
        byte[j] = f16_weigh(f16_reached(four[2], limits), 0x44004800u, byte[j]);     /* 4, 8 */
        byte[j] = f16_weigh(f16_reached(four[3], limits), 0x3c004000u, byte[j]);     /* 1, 2 */
      }
      const uint32_t even = __byte_perm(__byte_perm(byte[3], byte[2], 0x0040), __byte_perm(byte[1], byte[0], 0x0040), 0x5410);
      const uint32_t odd = __byte_perm(__byte_perm(byte[3], byte[2], 0x0062), __byte_perm(byte[1], byte[0], 0x0062), 0x5410);
      mask[i] = even | odd;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < WORDS / 16; i++) {
    mask[i] = 0;
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const uint32_t two = m[16 * i + j];
      mask[i] |= (uint32_t)((two & 0xffffu) >= limit) << (31 - 2 * j) | (uint32_t)(two >> 16 >= limit) << (30 - 2 * j);
    }
  }
}

template <int LANES> SFA_DEVICE int32_t of_both(int32_t x) { return LANES == 2 ? x + __shfl_xor_sync(~0u, x, 1) : x; }

/* The mask of the k largest of the row; *most: the maximum. */
template <int WORDS, int LANES> SFA_DEVICE void largest(const uint32_t *m, int32_t k, int32_t lane, uint32_t *mask, uint32_t *most) {
  /* Parts of the row: features f, f + 2 n, f + 4 n, ... for the 2 n of a thread's; k parts have a maximum each that reaches the least. */
  uint32_t part[WORDS / 2], low = 0;
#pragma unroll
  for (int i = 0; i < WORDS / 2; i++)
    part[i] = __vmaxu2(m[i], m[i + WORDS / 2]);
#pragma unroll
  for (int level = 2; level < WORDS; level *= 2) {
    const int n = WORDS / level; /* words of parts; half of them next */
    if (k <= 2 * n * LANES && k > n * LANES) {
      uint32_t least = part[0];
#pragma unroll
      for (int i = 1; i < WORDS / 2; i++)
        least = i < n ? __vminu2(least, part[i]) : least;
      low = min(least & 0xffffu, least >> 16);
    }
#pragma unroll
    for (int i = 0; i < WORDS / 4; i++)
      if (i < n / 2)
        part[i] = __vmaxu2(part[i], part[i + n / 2]);
  }
  *most = max(part[0] & 0xffffu, part[0] >> 16);
  if (k <= 2 * LANES)
    low = k <= LANES ? *most : min(part[0] & 0xffffu, part[0] >> 16);
  if (LANES == 2) {
    low = min(low, __shfl_xor_sync(~0u, low, 1));
    *most = max(*most, __shfl_xor_sync(~0u, *most, 1));
  }
  const bool ordered = !__any_sync(~0u, *most >= F16_INFINITE);
  uint32_t high = *most + 1;
  while (__any_sync(~0u, high - low > 1)) { /* k or more reach low, fewer reach high; a row that is done asks for low again */
    const uint32_t trial = (low + high) / 2;
    const int32_t n = of_both<LANES>(count_reached<WORDS>(m, trial, ordered));
    low = n >= k ? trial : low;
    high = n > k ? high : n == k ? trial + 1 : trial;
  }
  mask_reached<WORDS>(m, low, ordered, mask);
  int32_t n = 0;
#pragma unroll
  for (int i = 0; i < WORDS / 16; i++)
    n += __popc(mask[i]);
  int32_t excess = of_both<LANES>(n) - k;
  if (__any_sync(~0u, excess > 0)) { /* the last ones of those that tie at the k-th place go */
    uint32_t above[WORDS / 16];
    mask_reached<WORDS>(m, low + 1, ordered, above);
    if (LANES == 2) {
      int32_t ties = 0;
#pragma unroll
      for (int i = 0; i < WORDS / 16; i++)
        ties += __popc(mask[i] & ~above[i]);
      const int32_t of_other = __shfl_xor_sync(~0u, ties, 1);
      excess = lane == 1 ? min(excess, ties) : excess - of_other;
    }
#pragma unroll
    for (int i = WORDS / 16 - 1; i >= 0; i--)
      while (excess > 0 && (mask[i] & ~above[i])) {
        mask[i] &= ~((mask[i] & ~above[i]) & -(mask[i] & ~above[i]));
        excess--;
      }
  }
}

/* The first feature of a mask, which leaves it. */
template <int MASKS> SFA_DEVICE int32_t take_first(uint32_t *mask) {
  uint32_t word = mask[MASKS - 1];
  int32_t base = 32 * (MASKS - 1);
#pragma unroll
  for (int i = MASKS - 2; i >= 0; i--) {
    base = mask[i] ? 32 * i : base;
    word = mask[i] ? mask[i] : word;
  }
  const int32_t before = __clz(word);
#pragma unroll
  for (int i = 0; i < MASKS; i++)
    mask[i] ^= base == 32 * i ? 0x80000000u >> before : 0;
  return base + before;
}

/* Where the 16 bytes of piece `piece` of a row of PIECES lie in its warp's tile. */
template <int PIECES, int LANES> SFA_DEVICE uint32_t piece_at(int32_t row, int32_t piece) {
  return 16 * (row * PIECES + (piece ^ (row * LANES + piece / (PIECES / LANES)) % 8));
}

/* 16 bytes to shared memory, or zeros. */
SFA_DEVICE void copy_or_clear(void *to, const void *from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}

/* WORDS: of a thread's features. The tile of a warp has 32 / LANES rows of 2 LANES WORDS features; what is beyond dim is zero. */
template <int WORDS, int LANES, bool AS_IT_IS>
__global__ void __launch_bounds__(32 * WARPS) select_threads(const __grid_constant__ sfa_cuda_select s, bool vectors) {
  constexpr int ROWS = 32 / LANES, PIECES = LANES * WORDS / 4, TILE_BYTES = 16 * PIECES * ROWS, MASKS = WORDS / 16;
  extern __shared__ __align__(16) unsigned char tiles[];
  const int32_t warp = threadIdx.x / 32, thread = threadIdx.x % 32, lane = thread % LANES, row = thread / LANES, head = blockIdx.y;
  const bool writes_rows = s.rows.data != NULL;
  unsigned char *tile = tiles + warp * TILE_BYTES * (writes_rows ? 2 : 1), *rows = tile + TILE_BYTES;
  const int32_t n_tokens = tokens_of(s.tokens), n_pieces = s.dim / 8;
  for (int32_t first = (blockIdx.x * WARPS + warp) * ROWS; first < n_tokens; first += gridDim.x * WARPS * ROWS) {
    const int32_t n_rows = min(ROWS, n_tokens - first);
#pragma unroll
    for (int i = 0; i < PIECES / LANES; i++) {
      const int32_t r = (32 * i + thread) / PIECES, piece = (32 * i + thread) % PIECES;
      const bool there = r < n_rows && piece < n_pieces;
      copy_or_clear(tile + piece_at<PIECES, LANES>(r, piece), row_at(s.x, first + min(r, n_rows - 1), head) + 16 * (there ? piece : 0),
                    there);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();

    uint32_t m[WORDS], mask[MASKS], most;
#pragma unroll
    for (int i = 0; i < WORDS / 4; i++) {
      const uint4 four = *(const uint4 *)(tile + piece_at<PIECES, LANES>(row, lane * (WORDS / 4) + i));
      m[4 * i] = four.x & 0x7fff7fffu, m[4 * i + 1] = four.y & 0x7fff7fffu;
      m[4 * i + 2] = four.z & 0x7fff7fffu, m[4 * i + 3] = four.w & 0x7fff7fffu;
    }
#pragma unroll
    for (int i = 0; i < WORDS; i++)
      asm("" : "+r"(m[i])); /* without signs in a register, not anew in each step of the search */
    largest<WORDS, LANES>(m, s.k, lane, mask, &most);

    const bool there = row < n_rows;
    const int32_t token = first + min(row, n_rows - 1);
    if (s.support && there) {
      const int32_t n_words = (s.dim + 31) / 32;
      uint32_t *words = s.support + ((int64_t)token * s.n_heads + head) * n_words + lane * MASKS;
#pragma unroll
      for (int i = 0; i < MASKS; i++)
        if (lane * MASKS + i < n_words)
          words[i] = __brev(mask[i]);
    }
    const row_rounding r = rounding_of(s.has_store ? s.store.format.dtype : SFA_F32, most << 16);
    int32_t n = 0; /* the thread's, and its first slot */
#pragma unroll
    for (int i = 0; i < MASKS; i++)
      n += __popc(mask[i]);
    const int32_t first_slot = LANES == 2 && lane == 1 ? s.k - n : 0;
    unsigned char *ids = NULL, *values = NULL;
    if (s.has_store) {
      const token_place at = place_of(s, token);
      ids = stored_ids(s.store, at.sequence, head, at.stored) + first_slot;
      values = stored_values(s.store, at.sequence, head, at.stored);
      if (is_whole(r.dtype) && there && lane == 0)
        *stored_scale(s.store, at.sequence, head, at.stored) = (uint16_t)r.scale;
    }
    row_rounding of_rows = r; /* of rows of int8 that are not stored as such */
    if (writes_rows) {
      if (s.rows.dtype == SFA_I8) {
        if (!is_whole(r.dtype))
          of_rows = rounding_of(SFA_I8, magnitude_of(stored(r, __uint_as_float(most << 16))));
        if (there && lane == 0)
          s.row_scales[(int64_t)token * s.n_heads + head] = of_rows.unit;
      }
#pragma unroll
      for (int i = 0; i < WORDS / 4; i++)
        *(uint4 *)(rows + 16 * (32 * i + thread)) = make_uint4(0, 0, 0, 0);
      __syncwarp();
    }
    bool beyond = false;
    const bool narrow = is_whole(r.dtype) || r.dtype == SFA_F16;
    for (int32_t slot = 0; slot < n; slot += 8) {
      float v[8];
      uint32_t id[2] = {0, 0}, halves[4] = {0, 0, 0, 0};
#pragma unroll
      for (int u = 0; u < 8; u++) {
        v[u] = 0;
        if (slot + u >= n)
          continue;
        const int32_t f = lane * 2 * WORDS + take_first<MASKS>(mask);
        const uint32_t at = piece_at<PIECES, LANES>(row, f / 8) + 2 * (f % 8);
        const uint32_t x = *(const uint16_t *)(tile + at);
        id[u / 4] |= (uint32_t)f << 8 * (u % 4);
        if (AS_IT_IS) {
          const uint32_t h = x | ((x & 0x7fff) > 0x7f80 ? 0x40 : 0); /* NaN as bf16_from_f32 leaves it */
          halves[u / 2] |= h << 16 * (u % 2);
          if (writes_rows)
            *(uint16_t *)(rows + at) = (uint16_t)h;
          continue;
        }
        v[u] = f32_from_bf16(x);
        beyond |= narrow && magnitude_of(v[u]) > F16_LARGEST && magnitude_of(v[u]) < INFINITE;
        v[u] = stored(r, v[u]);
        if (writes_rows && s.rows.dtype == SFA_BF16)
          *(uint16_t *)(rows + at) = (uint16_t)bf16_from_f32(is_whole(r.dtype) ? __fmul_rn(v[u], r.unit) : v[u]);
        else if (writes_rows)
          *(int8_t *)(rows + piece_at<PIECES, LANES>(row, f / 16) + f % 16) =
              (int8_t)(int)(is_whole(r.dtype) ? v[u] : stored(of_rows, v[u]));
      }
      if (!s.has_store || !there)
        continue;
      if (LANES == 1 && vectors) {
        *(uint2 *)(ids + slot) = make_uint2(id[0], id[1]);
        if (AS_IT_IS)
          *(uint4 *)(values + 2 * slot) = make_uint4(halves[0], halves[1], halves[2], halves[3]);
        else
          put_eight(values + slot * bytes_of(r.dtype), r.dtype, v);
      } else
#pragma unroll
        for (int u = 0; u < 8; u++)
          if (slot + u < n) {
            ids[slot + u] = (unsigned char)(id[u / 4] >> 8 * (u % 4));
            if (AS_IT_IS)
              ((uint16_t *)(void *)values)[first_slot + slot + u] = (uint16_t)(halves[u / 2] >> 16 * (u % 2));
            else
              put_element(values, r.dtype, first_slot + slot + u, v[u]);
          }
    }
    if (s.n_bad && s.has_store) {
      beyond = of_both<LANES>(beyond) != 0;
      if (beyond && there && lane == 0)
        atomicAdd(s.n_bad, 1);
    }
    __syncwarp();
    if (writes_rows) {
      const int32_t row_pieces = s.rows.dtype == SFA_BF16 ? n_pieces : (s.dim + 15) / 16;
#pragma unroll 4
      for (int i = thread; i < ROWS * PIECES; i += 32) {
        const int32_t r_of = i / PIECES, piece = i % PIECES;
        if (r_of < n_rows && piece < row_pieces) {
          const uint4 four = *(const uint4 *)(rows + piece_at<PIECES, LANES>(r_of, piece));
          *(uint4 *)(row_at(s.rows, first + r_of, head) + 16 * piece) = four;
        }
      }
      __syncwarp();
    }
  }
}

/* ---- The launch ------------------------------------------------------------------------------------------------------------------- */

static bool stream_aligned(const sfa_cuda_store &store, const sfa_kv_stream &stream, size_t element, size_t bytes) {
  return sfa_cuda_aligned(store.pages ? NULL : stream.base, stream.offset, bytes) && stream.head_bytes % bytes == 0 &&
         (size_t)stream.row_stride * element % bytes == 0 &&
         (store.pages || (stream.tile_bytes % bytes == 0 && (size_t)store.sequence_bytes % bytes == 0));
}

/* Whether eight slots are stored as vectors. */
static bool slots_aligned(const sfa_cuda_select *s) {
  const size_t element = sfa_stored_bytes(s->store.format.dtype, 1), bytes = element == 1 ? 8 : 16;
  return s->k % 8 == 0 && stream_aligned(s->store, s->store.ids, 1, 8) && stream_aligned(s->store, s->store.values, element, bytes);
}

bool sfa_select_bf16_takes(const sfa_cuda_select *s) {
  return s->x.dtype == SFA_BF16 && s->dim <= WIDEST && s->dim % 8 == 0 && s->k > 0 && s->k < s->dim && !s->norm_weight && !s->rope_cos &&
         !s->two_of_four && !s->rows_f32 && (!s->has_store || s->store.format.k) && sfa_cuda_rows_aligned(&s->x) &&
         (!s->rows.data || (sfa_cuda_rows_aligned(&s->rows) &&
                            (s->rows.dtype == SFA_BF16 || (s->dim % 16 == 0 && sfa_cuda_aligned(s->rows.data, 0, 16) &&
                                                           s->rows.token_stride % 16 == 0 && s->rows.head_stride % 16 == 0))));
}

template <int WORDS, int LANES> static void launch(const sfa_cuda_select *s, int64_t n_tokens, cudaStream_t stream) {
  const int32_t bytes = WARPS * 32 * WORDS * 4 * (s->rows.data ? 2 : 1), rows_a_block = WARPS * 32 / LANES;
  const dim3 grid((unsigned)((n_tokens + rows_a_block - 1) / rows_a_block), (unsigned)s->n_heads);
  const bool as_it_is = (!s->has_store || s->store.format.dtype == SFA_BF16) && (!s->rows.data || s->rows.dtype == SFA_BF16);
  const auto kernel = as_it_is ? select_threads<WORDS, LANES, true> : select_threads<WORDS, LANES, false>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<grid, 32 * WARPS, bytes, stream>>>(*s, s->has_store && slots_aligned(s));
}

void sfa_select_bf16(const sfa_cuda_select *s, int64_t n_tokens, cudaStream_t stream) {
  if (s->dim <= 64)
    launch<32, 1>(s, n_tokens, stream);
  else if (s->dim <= 128)
    launch<64, 1>(s, n_tokens, stream);
  else
    launch<64, 2>(s, n_tokens, stream);
}
