/* Small kernels between the stages: cuda_help.h. */
#include "cuda/cuda_help.h"

#include "cuda/cuda_rows.cuh"

enum { THREADS = 256, MOST_BLOCKS = 1056 };

static const char *launched(void) {
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? NULL : cudaGetErrorString(error);
}

/* Blocks of THREADS that share out n items in strides. */
static unsigned blocks_for(int64_t n) {
  int64_t blocks = (n + THREADS - 1) / THREADS;
  return (unsigned)(blocks < 1 ? 1 : blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS);
}

SFA_DEVICE int64_t first_item(void) { return (int64_t)blockIdx.x * THREADS + threadIdx.x; }
SFA_DEVICE int64_t item_step(void) { return (int64_t)gridDim.x * THREADS; }

/* ---- Words, lengths ------------------------------------------------------------------------------------------------------------------ */

struct words {
  uint64_t value[SFA_CUDA_WORDS];
};

static __global__ void write_words(uint64_t *to, int32_t n, const __grid_constant__ words w) {
  if ((int32_t)threadIdx.x < n)
    to[threadIdx.x] = w.value[threadIdx.x];
}

const char *sfa_cuda_help_words(uint64_t *to, int32_t n, const uint64_t *values, sfa_cuda_stream stream) {
  words w;
  for (int32_t i = 0; i < n; i++)
    w.value[i] = values[i];
  write_words<<<1, SFA_CUDA_WORDS, 0, stream>>>(to, n, w);
  return launched();
}

static __global__ void change_lens(int32_t *lens, int64_t stride, int64_t n, int32_t len, sfa_cuda_len_change change) {
  for (int64_t i = first_item(); i < n; i += item_step()) {
    const int32_t was = lens[i * stride];
    lens[i * stride] = change == SFA_CUDA_LEN_AT_MOST && was < len ? was : len;
  }
}

const char *sfa_cuda_help_lens(int32_t *lens, int64_t stride, int64_t n, int32_t len, sfa_cuda_len_change change, sfa_cuda_stream stream) {
  change_lens<<<blocks_for(n), THREADS, 0, stream>>>(lens, stride, n, len, change);
  return launched();
}

static __global__ void count_tokens(sfa_cuda_tokens q, sfa_cuda_tokens k, int32_t *numbers) {
  const int32_t B = k.n_sequences;
  if (first_item() == 0) {
    numbers[0] = numbers[2] = 0;
    numbers[1] = (int32_t)(q.cu_seqlens ? q.cu_seqlens[B] : B * q.max_seqlen);
    numbers[3] = (int32_t)(k.cu_seqlens ? k.cu_seqlens[B] : B * k.max_seqlen);
  }
  for (int64_t b = first_item(); b < B; b += item_step()) {
    const int64_t n = k.cu_seqlens ? k.cu_seqlens[b + 1] - k.cu_seqlens[b] : k.max_seqlen;
    numbers[SFA_CUDA_NUMBERS + b] = (int32_t)(n < 0 ? 0 : n < k.max_seqlen ? n : k.max_seqlen);
  }
}

const char *sfa_cuda_help_numbers(const sfa_cuda_tokens *q, const sfa_cuda_tokens *k, int32_t *numbers, sfa_cuda_stream stream) {
  count_tokens<<<blocks_for(k->n_sequences), THREADS, 0, stream>>>(*q, *k, numbers);
  return launched();
}

static __global__ void cut_keys(int32_t n_sequences, const int32_t *n_keys, int64_t first, int64_t most, int32_t *lens, int32_t *ends) {
  for (int64_t b = first_item(); b < n_sequences; b += item_step()) {
    const int64_t left = n_keys[b] - first;
    lens[b] = (int32_t)(left < 0 ? 0 : left < most ? left : most);
    ends[b] = (int32_t)left;
  }
}

const char *sfa_cuda_help_span(int32_t n_sequences, const int32_t *n_keys, int64_t first, int64_t most, int32_t *lens, int32_t *ends,
                               sfa_cuda_stream stream) {
  cut_keys<<<blocks_for(n_sequences), THREADS, 0, stream>>>(n_sequences, n_keys, first, most, lens, ends);
  return launched();
}

/* ---- Tables -------------------------------------------------------------------------------------------------------------------------- */

struct row_numbers {
  int32_t row[SFA_CUDA_WORDS];
};

static __global__ void make_tables(const __grid_constant__ sfa_cuda_tables t, const __grid_constant__ row_numbers rows) {
  const int32_t b = (int32_t)blockIdx.y, row = t.rows ? rows.row[b] : t.first_row + b;
  int64_t n = t.lens[t.from ? row : b];
  n = n < 0 ? 0 : n < t.max_keys ? n : t.max_keys;
  const int64_t room = (t.from_stride < t.max_pages ? t.from_stride : t.max_pages) * TILE_TOKENS;
  n = n < room ? n : room;
  if (first_item() == 0)
    t.n_keys[b] = (int32_t)n;
  for (int64_t i = first_item(); i < (n + TILE_TOKENS - 1) / TILE_TOKENS; i += item_step()) {
    unsigned char *page;
    if (t.from)
      page = t.from[row * t.from_stride + i];
    else {
      int64_t number = t.block_table[b * t.from_stride + i];
      number = number < 0 ? 0 : number < t.n_pages ? number : t.n_pages - 1;
      page = (unsigned char *)t.pool + (size_t)number * t.page_bytes;
    }
    t.pages[b * t.max_pages + i] = page;
  }
}

const char *sfa_cuda_help_tables(const sfa_cuda_tables *args, sfa_cuda_stream stream) {
  row_numbers rows = {{0}};
  for (int32_t b = 0; args->rows && b < args->n_sequences; b++)
    rows.row[b] = args->rows[b];
  const int64_t blocks = (args->max_pages + THREADS - 1) / THREADS;
  make_tables<<<dim3((unsigned)(blocks < 1    ? 1
                                : blocks < 64 ? blocks
                                              : 64),
                     (unsigned)args->n_sequences),
                THREADS, 0, stream>>>(*args, rows);
  return launched();
}

static __global__ void place_slots(int64_t n, const int64_t *slots, unsigned char *pool, size_t page_bytes, int64_t n_pages,
                                   unsigned char *nowhere, unsigned char **pages, int32_t *tokens) {
  for (int64_t i = first_item(); i < n; i += item_step()) {
    const int64_t slot = slots[i];
    const bool there = slot >= 0 && slot < n_pages * TILE_TOKENS;
    pages[i] = there ? pool + (size_t)(slot / TILE_TOKENS) * page_bytes : nowhere;
    tokens[i] = there ? (int32_t)(slot % TILE_TOKENS) : 0;
  }
}

const char *sfa_cuda_help_slots(int64_t n, const int64_t *slots, unsigned char *pool, size_t page_bytes, int64_t n_pages,
                                unsigned char *nowhere, unsigned char **pages, int32_t *tokens, sfa_cuda_stream stream) {
  place_slots<<<blocks_for(n), THREADS, 0, stream>>>(n, slots, pool, page_bytes, n_pages, nowhere, pages, tokens);
  return launched();
}

/* ---- Rows of sequences, packed and apart --------------------------------------------------------------------------------------------- */

template <class WORD> static __global__ void move_rows(sfa_cuda_places p, bool pack) {
  const sfa_cuda_tokens &tokens = p.tokens;
  const int64_t most = tokens.max_seqlen, width = p.row_bytes / (int64_t)sizeof(WORD), n = tokens.n_sequences * most * width;
  for (int64_t item = first_item(); item < n; item += item_step()) {
    const int64_t row = item / width, b = row / most, first = tokens.cu_seqlens ? tokens.cu_seqlens[b] : b * most;
    const int64_t len = tokens.cu_seqlens ? tokens.cu_seqlens[b + 1] - first : most, t = row % most - (p.at_end ? most - len : 0);
    const bool there = t >= 0 && t < len;
    WORD *packed = (WORD *)p.packed + (first + t) * width + item % width, *apart = (WORD *)p.apart + item;
    if (!pack)
      *apart = there ? *packed : (WORD)0;
    else if (there)
      *packed = p.apart ? *apart : (WORD)0;
  }
}

static const char *moved(const sfa_cuda_places *p, bool pack, sfa_cuda_stream stream) {
  const int64_t n_bytes = p->tokens.n_sequences * p->tokens.max_seqlen * p->row_bytes;
  const bool words = ((uintptr_t)p->packed | (uintptr_t)p->apart | (uint64_t)p->row_bytes) % sizeof(uint32_t) == 0;
  if (n_bytes > 0 && words)
    move_rows<uint32_t><<<blocks_for(n_bytes / (int64_t)sizeof(uint32_t)), THREADS, 0, stream>>>(*p, pack);
  else if (n_bytes > 0)
    move_rows<uint8_t><<<blocks_for(n_bytes), THREADS, 0, stream>>>(*p, pack);
  return launched();
}

const char *sfa_cuda_help_unpack(const sfa_cuda_places *args, sfa_cuda_stream stream) { return moved(args, false, stream); }
const char *sfa_cuda_help_pack(const sfa_cuda_places *args, sfa_cuda_stream stream) { return moved(args, true, stream); }

/* ---- Merge --------------------------------------------------------------------------------------------------------------------------- */

/* A warp a row: o = (o_a e^(lse_a - m) + o_b e^(lse_b - m)) / l. */
static __global__ void merge_rows(sfa_cuda_tokens tokens, int32_t n_heads, int32_t dim, float *out_a, float *lse_a, const float *out_b,
                                  const float *lse_b) {
  const int32_t lane = threadIdx.x % 32;
  const int64_t n_rows = (tokens.cu_seqlens ? tokens.cu_seqlens[tokens.n_sequences] : tokens.n_sequences * tokens.max_seqlen) * n_heads;
  for (int64_t row = first_item() / 32; row < n_rows; row += item_step() / 32) {
    const float a = lse_a[row], b = lse_b[row], m = a > b || a != a ? a : b;
    if (b == -INFINITY && a != b)
      continue; /* nothing joins */
    const float weight_a = m == -INFINITY ? 0.0f : expf(a - m), weight_b = m == -INFINITY ? 0.0f : expf(b - m), l = weight_a + weight_b;
    for (int32_t e = lane; e < dim; e += 32) {
      float *to = out_a + row * dim + e;
      *to = l == 0.0f ? 0.0f : (*to * weight_a + out_b[row * dim + e] * weight_b) / l;
    }
    __syncwarp();
    if (lane == 0)
      lse_a[row] = l == 0.0f ? -INFINITY : m + logf(l);
  }
}

const char *sfa_cuda_help_merge(const sfa_cuda_tokens *tokens, int32_t n_heads, int32_t dim, float *out_a, float *lse_a, const float *out_b,
                                const float *lse_b, sfa_cuda_stream stream) {
  const int64_t n_rows = tokens->n_sequences * tokens->max_seqlen * n_heads;
  merge_rows<<<blocks_for(32 * n_rows), THREADS, 0, stream>>>(*tokens, n_heads, dim, out_a, lse_a, out_b, lse_b);
  return launched();
}

/* ---- Codes spread out ---------------------------------------------------------------------------------------------------------------- */

/* A warp a row. */
static __global__ void spread_codes(sfa_codes codes, float *rows, int64_t row_stride, uint32_t *support) {
  const int32_t lane = threadIdx.x % 32, D = codes.head_dim, K = codes.k, n_words = (D + 31) / 32;
  for (int64_t row = first_item() / 32; row < codes.n_rows; row += item_step() / 32) {
    for (int32_t f = lane; rows && f < D; f += 32)
      rows[row * row_stride + f] = 0.0f;
    for (int32_t w = lane; support && w < n_words; w += 32)
      support[row * n_words + w] = 0;
    __syncwarp();
    for (int32_t u = lane; u < K; u += 32) {
      const int64_t at = row * K + u;
      const int32_t f = D <= 256 ? ((const uint8_t *)codes.ids)[at] : ((const uint16_t *)codes.ids)[at];
      if (f >= D)
        continue;
      if (rows) { /* a product would change the bits of a NaN */
        const float value = element_at(codes.values, codes.dtype, at);
        rows[row * row_stride + f] = codes.dtype == SFA_I8 ? value * f32_from_f16(codes.scales[row]) : value;
      }
      if (support)
        atomicOr(&support[row * n_words + f / 32], 1u << f % 32);
    }
  }
}

const char *sfa_cuda_help_spread(const sfa_codes *codes, float *rows, int64_t row_stride, uint32_t *support, sfa_cuda_stream stream) {
  spread_codes<<<blocks_for(32 * codes->n_rows), THREADS, 0, stream>>>(*codes, rows, row_stride, support);
  return launched();
}

/* ---- Turning back -------------------------------------------------------------------------------------------------------------------- */

static __global__ void turn_back(sfa_cuda_tokens tokens, int32_t n_heads, int32_t dim, const float *cos, const float *sin, int32_t n_pairs,
                                 int32_t interleaved, float *rows, int64_t token_stride) {
  const int64_t n = tokens_of(tokens) * n_heads * n_pairs;
  for (int64_t item = first_item(); item < n; item += item_step()) {
    const int32_t pair = (int32_t)(item % n_pairs), head = (int32_t)(item / n_pairs % n_heads);
    const int64_t token = item / n_pairs / n_heads, line = tokens.cu_seqlens ? token : token % tokens.max_seqlen;
    float *row = rows + token * token_stride + (int64_t)head * dim;
    float *x = row + (interleaved ? 2 * pair : pair), *y = interleaved ? x + 1 : x + n_pairs;
    const float c = cos[line * n_pairs + pair], s = sin[line * n_pairs + pair], a = *x, b = *y;
    *x = __fadd_rn(__fmul_rn(a, c), __fmul_rn(b, s));
    *y = __fsub_rn(__fmul_rn(b, c), __fmul_rn(a, s));
  }
}

const char *sfa_cuda_help_unrotate(const sfa_cuda_tokens *tokens, int32_t n_heads, int32_t dim, const sfa_rope *rope, float *rows,
                                   int64_t token_stride, sfa_cuda_stream stream) {
  const int64_t n = tokens->n_sequences * tokens->max_seqlen * n_heads * (rope->n_rotated / 2);
  if (n == 0)
    return NULL;
  turn_back<<<blocks_for(n), THREADS, 0, stream>>>(*tokens, n_heads, dim, rope->cos, rope->sin, rope->n_rotated / 2, rope->interleaved,
                                                   rows, token_stride);
  return launched();
}
