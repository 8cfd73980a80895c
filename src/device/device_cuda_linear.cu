/* Linear layers on a GPU. Weights are rows [n_out][ld], bf16 (whatever 16-, 8- or 4-bit form the file has) or f32, ld = n_in rounded up to
 * 8 with zeros behind.
 *
 * Few rows (decode): the time is that of reading the weights once, and of starting. A warp takes an output (or a gate and its up) with 16
 * bytes a lane at a time; the input lies in shared memory, normalised there by every block for itself, so that norm, layers, activation and
 * residual addition are one launch. Many rows: rounded to bf16 and multiplied by cuBLASLt, which adds to the stream itself.
 */
#include "device/device_cuda.cuh"

struct sfa_linear {
  int32_t n_in, n_out, ld;
  bool bf16;
  void *weights; /* [n_out][ld] */
  float *bias;   /* [n_out] or NULL */
};

enum { THREADS = 128, WARPS = THREADS / 32, FEW_ROWS = 8, MAX_PARTS = 3, MOST_SHARED = 200 << 10 };

/* ---- Preparing weights ------------------------------------------------------------------------------------------------------------ */

static sfa_storage fast_storage(const sfa_context *ctx, sfa_storage storage) {
  (void)ctx;
  return storage == SFA_STORE_F32 ? SFA_STORE_F32 : SFA_STORE_BF16;
}

typedef struct fill_job {
  const sfa_linear_source *source;
  const sfa_linear *linear;
  uint8_t *rows, *temporary; /* [n_rows][ld] elements; [n_threads][n_in] f32 */
  int64_t first;
} fill_job;

static void fill_row(void *arg, int64_t item, int32_t thread) {
  const fill_job *job = (const fill_job *)arg;
  const sfa_linear *l = job->linear;
  float *values = (float *)job->temporary + (int64_t)thread * l->ld;
  job->source->row_f32(job->source->arg, job->first + item, values);
  if (!l->bf16) {
    memcpy((float *)job->rows + item * l->ld, values, (size_t)l->n_in * sizeof(float));
    return;
  }
  uint16_t *row = (uint16_t *)job->rows + item * l->ld;
  for (int32_t i = 0; i < l->n_in; i++)
    row[i] = sfa_bf16_from_f32(values[i]);
}

/* Rows are made on the host, by all threads, and copied a few megabytes at a time. */
static sfa_status fill_weights(sfa_context *ctx, const sfa_linear_source *source, sfa_linear *l) {
  enum { PIECE_BYTES = 16 << 20 };
  const size_t row_bytes = (size_t)l->ld * (l->bf16 ? 2 : 4);
  const int64_t piece = sfa_max64(1, sfa_min64(l->n_out, (int64_t)(PIECE_BYTES / row_bytes)));
  fill_job job = {source, l, NULL, NULL, 0};
  sfa_status status = sfa_alloc_zero(ctx, (size_t)piece, row_bytes, "reading weights", (void **)&job.rows);
  if (status == SFA_OK)
    status = sfa_alloc_zero(ctx, (size_t)ctx->n_threads, (size_t)l->ld * sizeof(float), "reading weights", (void **)&job.temporary);
  for (; status == SFA_OK && job.first < l->n_out; job.first += piece) {
    const int64_t n = sfa_min64(piece, l->n_out - job.first);
    sfa_parallel(ctx, n, fill_row, &job);
    status = ctx->device_state->memory->copy(ctx, (uint8_t *)l->weights + (size_t)job.first * row_bytes, job.rows, (size_t)n * row_bytes);
  }
  sfa_free(ctx, job.rows);
  sfa_free(ctx, job.temporary);
  return status;
}

static void linear_destroy(sfa_context *ctx, sfa_linear *l) {
  if (!l)
    return;
  ctx->device_state->memory->free(ctx, l->weights);
  ctx->device_state->memory->free(ctx, l->bias);
  sfa_free(ctx, l);
}

static size_t linear_bytes(const sfa_linear *l) {
  return (size_t)l->n_out * ((size_t)l->ld * (l->bf16 ? 2 : 4) + (l->bias ? sizeof(float) : 0));
}

static sfa_status fill_linear(sfa_context *ctx, const sfa_linear_source *source, sfa_linear *l) {
  if ((size_t)l->ld * sizeof(float) > MOST_SHARED)
    return sfa_fail(ctx, SFA_ERROR_UNSUPPORTED, "a linear layer of %d inputs; on a GPU it may have %d", l->n_in,
                    (int)(MOST_SHARED / sizeof(float)));
  const sfa_device_cuda_memory *memory = ctx->device_state->memory;
  SFA_TRY(memory->alloc(ctx, (size_t)l->n_out * (size_t)l->ld * (l->bf16 ? 2 : 4), &l->weights));
  if (source->bias) {
    SFA_TRY(memory->alloc(ctx, (size_t)l->n_out * sizeof(float), (void **)&l->bias));
    SFA_TRY(memory->copy(ctx, l->bias, source->bias, (size_t)l->n_out * sizeof(float)));
  }
  return fill_weights(ctx, source, l);
}

static sfa_status linear_create(sfa_context *ctx, const sfa_linear_source *source, sfa_storage storage, sfa_linear **linear) {
  sfa_linear *l;
  *linear = NULL;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *l, "a linear layer", (void **)&l));
  l->n_in = source->n_in;
  l->n_out = source->n_out;
  l->ld = (source->n_in + 7) / 8 * 8;
  l->bf16 = storage != SFA_STORE_F32;
  const sfa_status status = fill_linear(ctx, source, l);
  if (status != SFA_OK) {
    linear_destroy(ctx, l);
    return status;
  }
  *linear = l;
  return SFA_OK;
}

/* ---- Few rows --------------------------------------------------------------------------------------------------------------------- */

typedef struct few_part {
  const void *weights;
  const float *bias;
  float *out;
  int64_t out_stride;
  int32_t n_out;
} few_part;

typedef struct few_job {
  few_part parts[MAX_PARTS];
  int32_t n_parts, n_in, ld, act; /* act -1: none */
  const float *x, *norm_weight, *norm_bias;
  int64_t x_stride;
  float eps;
  bool center, add;
} few_job;

/* Shared memory has a row as two halves [2][ld / 8][4]: of every eight the first four, and the last: lanes side by side read side by side.
 */
__device__ static inline int32_t place_of(int32_t i, int32_t ld) { return (i % 8 / 4 * (ld / 8) + i / 8) * 4 + i % 4; }

__device__ static inline float dot_four(float4 x, float a, float b, float c, float d, float sum) {
  return fmaf(a, x.x, fmaf(b, x.y, fmaf(c, x.z, fmaf(d, x.w, sum))));
}

/* 16 bytes of weights, number c of an output's, times a row. */
__device__ static inline float fold(const __nv_bfloat16 *, uint4 w, int32_t c, const float *row, int32_t ld, float sum) {
  const float4 a = *(const float4 *)(row + c * 4), b = *(const float4 *)(row + (ld / 8 + c) * 4);
  sum = dot_four(a, __uint_as_float(w.x << 16), __uint_as_float(w.x & 0xffff0000u), __uint_as_float(w.y << 16),
                 __uint_as_float(w.y & 0xffff0000u), sum);
  return dot_four(b, __uint_as_float(w.z << 16), __uint_as_float(w.z & 0xffff0000u), __uint_as_float(w.w << 16),
                  __uint_as_float(w.w & 0xffff0000u), sum);
}

__device__ static inline float fold(const float *, uint4 w, int32_t c, const float *row, int32_t ld, float sum) {
  const float4 a = *(const float4 *)(row + (c % 2 * (ld / 8) + c / 2) * 4);
  return dot_four(a, __uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z), __uint_as_float(w.w), sum);
}

enum { BATCH = 12 }; /* inputs that a thread asks for at a time */

/* Inputs to shared memory, times the norm's weight; what they are still to be multiplied with comes to factors. Loads go out together: a
 * step of one token waits for them in every layer. */
template <int ROWS> __device__ static void read_inputs(const few_job &j, float *inputs, float *room, float *factors) {
  for (int row = 0; row < ROWS; row++) {
    const float *x = j.x + row * j.x_stride;
    float *to = inputs + row * j.ld, mean = 0, squares = 0, factor = 1;
    if (j.norm_weight && j.center) {
      for (int i = threadIdx.x; i < j.n_in; i += THREADS)
        mean += x[i];
      mean = sfa_block_sum<WARPS>(mean, room) / (float)j.n_in;
    }
    for (int first = threadIdx.x; first < j.ld; first += THREADS * BATCH) {
      float v[BATCH], weight[BATCH];
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const int i = first + b * THREADS;
        v[b] = i < j.n_in ? x[i] - mean : 0.0f;
        weight[b] = j.norm_weight && i < j.n_in ? __ldg(j.norm_weight + i) : 1.0f;
      }
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const int i = first + b * THREADS;
        squares = fmaf(v[b], v[b], squares);
        if (i < j.ld)
          to[place_of(i, j.ld)] = v[b] * weight[b];
      }
    }
    if (j.norm_weight)
      factor = 1.0f / sqrtf(sfa_block_sum<WARPS>(squares, room) / (float)j.n_in + j.eps);
    for (int i = threadIdx.x; j.norm_bias && i < j.n_in; i += THREADS) {
      const int at = place_of(i, j.ld);
      to[at] = to[at] * factor + j.norm_bias[i];
    }
    if (threadIdx.x == 0)
      factors[row] = j.norm_bias ? 1.0f : factor;
  }
  __syncthreads();
}

/* Where a warp is: output `at` of all parts, and of its 16-byte pieces those from `piece` on. */
typedef struct few_place {
  int32_t at, piece;
} few_place;

enum { DEEP = 4 }; /* pieces that a lane has under way of one output */

/* The part and its output that `at` is. */
template <bool PAIR> __device__ static inline int32_t part_of(const few_job &j, int32_t *at) {
  int32_t p = 0;
  while (!PAIR && *at >= j.parts[p].n_out)
    *at -= j.parts[p++].n_out;
  return p;
}

template <typename W, bool PAIR> __device__ static inline void ask(const few_job &j, few_place place, int32_t n_pieces, uint4 (*w)[DEEP]) {
  int32_t o = place.at;
  const int32_t p = part_of<PAIR>(j, &o);
#pragma unroll
  for (int i = 0; i < (PAIR ? 2 : 1); i++) {
    const uint4 *from = (const uint4 *)((const W *)j.parts[p + i].weights + (int64_t)o * j.ld);
#pragma unroll
    for (int d = 0; d < DEEP; d++) {
      const int32_t c = place.piece + d * 32 + (int32_t)threadIdx.x % 32;
      w[i][d] = c < n_pieces ? __ldg(from + c) : make_uint4(0, 0, 0, 0);
    }
  }
}

/* What is added to the sums of output `at`: bias, and what is there. */
template <int ROWS, bool PAIR> __device__ static inline void ask_base(const few_job &j, int32_t at, float (*base)[ROWS]) {
  const int32_t p = part_of<PAIR>(j, &at);
#pragma unroll
  for (int i = 0; i < (PAIR ? 2 : 1); i++) {
    const few_part &part = j.parts[p + i];
    const float bias = part.bias ? __ldg(part.bias + at) : 0.0f;
#pragma unroll
    for (int row = 0; row < ROWS; row++)
      base[i][row] = bias + (j.add ? part.out[row * part.out_stride + at] : 0.0f);
  }
}

template <int ROWS, bool PAIR> __device__ static inline void put_outputs(const few_job &j, int32_t at, const float (*sums)[ROWS]) {
  const int32_t p = part_of<PAIR>(j, &at);
  const few_part &part = j.parts[p];
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    const float y = j.act >= 0 ? sfa_activated(j.act, sums[0][row]) : sums[0][row];
    part.out[row * part.out_stride + at] = PAIR ? y * sums[1][row] : y;
  }
}

/* The place after one. */
__device__ static inline few_place place_after(few_place place, int32_t n_pieces, int32_t stride) {
  place.piece += 32 * DEEP;
  return place.piece < n_pieces ? place : (few_place){place.at + stride, 0};
}

/* PAIR: outputs of parts 0 and 1 belong together. Weights depend on nothing: those of two places are asked for before the input is there,
 * and then always one place ahead. */
template <typename W, int ROWS, bool PAIR> __global__ void __launch_bounds__(THREADS) few_kernel(const __grid_constant__ few_job j) {
  extern __shared__ float4 shared[];
  __shared__ float room[WARPS], factors[ROWS];
  float *inputs = (float *)shared;
  enum { N = PAIR ? 2 : 1 };
  const int32_t n_pieces = j.ld / (16 / (int)sizeof(W)), stride = gridDim.x * WARPS, lane = threadIdx.x % 32;
  int32_t n = 0;
  for (int p = 0; p < (PAIR ? 1 : j.n_parts); p++)
    n += j.parts[p].n_out;
  few_place here = {(int32_t)(blockIdx.x * WARPS + threadIdx.x / 32), 0}, there = place_after(here, n_pieces, stride);
  uint4 now[N][DEEP], next[N][DEEP];
  float sums[N][ROWS] = {}, base[N][ROWS] = {};
  if (here.at < n)
    ask<W, PAIR>(j, here, n_pieces, now);
  if (there.at < n)
    ask<W, PAIR>(j, there, n_pieces, next);
  for (int i = threadIdx.x * 32; j.norm_weight && i < j.n_in; i += THREADS * 32)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(j.norm_weight + i));
  sfa_cuda_wait_for_previous();
  if (here.at < n)
    ask_base<ROWS, PAIR>(j, here.at, base);
  read_inputs<ROWS>(j, inputs, room, factors);
  while (here.at < n) {
#pragma unroll
    for (int d = 0; d < DEEP; d++) {
      const int32_t c = here.piece + d * 32 + lane;
      if (c < n_pieces)
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
          for (int row = 0; row < ROWS; row++)
            sums[i][row] = fold((const W *)NULL, now[i][d], c, inputs + row * j.ld, j.ld, sums[i][row]);
    }
    if (there.at != here.at) {
#pragma unroll
      for (int i = 0; i < N; i++)
#pragma unroll
        for (int row = 0; row < ROWS; row++)
          sums[i][row] = fmaf(sfa_warp_sum(sums[i][row]), factors[row], base[i][row]);
      if (lane == 0)
        put_outputs<ROWS, PAIR>(j, here.at, sums);
      if (there.at < n)
        ask_base<ROWS, PAIR>(j, there.at, base);
#pragma unroll
      for (int i = 0; i < N; i++)
#pragma unroll
        for (int row = 0; row < ROWS; row++)
          sums[i][row] = 0;
    }
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
      for (int d = 0; d < DEEP; d++)
        now[i][d] = next[i][d];
    here = there;
    there = place_after(here, n_pieces, stride);
    if (there.at < n)
      ask<W, PAIR>(j, there, n_pieces, next);
  }
}

template <typename W, int ROWS> static void run_few_rows(const sfa_context *ctx, const few_job *j, bool pair) {
  const size_t shared = (size_t)ROWS * (size_t)j->ld * sizeof(float);
  int32_t n = 0;
  for (int p = 0; p < (pair ? 1 : j->n_parts); p++)
    n += j->parts[p].n_out;
  void (*kernel)(few_job) = pair ? few_kernel<W, ROWS, true> : few_kernel<W, ROWS, false>;
  if (shared > 32 << 10) /* 48 KB go without asking, all arrays together */
    sfa_cuda_note(ctx, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MOST_SHARED), "shared memory");
  const int most = ctx->device_state->n_processors * 12, blocks = (n + WARPS - 1) / WARPS;
  sfa_cuda_note(ctx, sfa_cuda_launch_after(kernel, dim3(blocks < most ? blocks : most), THREADS, shared, sfa_cuda_stream_of(ctx), *j),
                "a linear layer");
}

/* As many rows at a time as fit shared memory. */
template <typename W> static void run_few(const sfa_context *ctx, const few_job *all, int64_t n_rows, bool pair) {
  few_job j = *all;
  for (int64_t row = 0; row < n_rows;) {
    int64_t n = n_rows - row;
    n = n >= 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : 1;
    while (n > 1 && (size_t)n * (size_t)j.ld * sizeof(float) > MOST_SHARED)
      n /= 2;
    (n == 8 ? run_few_rows<W, 8> : n == 4 ? run_few_rows<W, 4> : n == 2 ? run_few_rows<W, 2> : run_few_rows<W, 1>)(ctx, &j, pair);
    j.x += n * j.x_stride;
    for (int p = 0; p < j.n_parts; p++)
      j.parts[p].out += n * j.parts[p].out_stride;
    row += n;
  }
}

static void project_few(const sfa_context *ctx, const sfa_projection *t) {
  const sfa_linear *first = t->parts[0].linear;
  few_job j = {};
  for (int p = 0; p < t->n_parts; p++) {
    const sfa_linear *l = t->parts[p].linear;
    j.parts[p] = (few_part){l->weights, l->bias, t->parts[p].out, t->parts[p].out_stride, l->n_out};
  }
  j.n_parts = t->n_parts;
  j.n_in = first->n_in;
  j.ld = first->ld;
  j.act = t->activated ? (int32_t)t->activation : -1;
  j.x = t->x;
  j.x_stride = t->x_stride;
  j.norm_weight = t->norm_weight;
  j.norm_bias = t->norm_bias;
  j.eps = t->norm_eps;
  j.center = t->center;
  j.add = t->add;
  const bool pair = t->activated && t->n_parts == 2;
  if (first->bf16)
    run_few<__nv_bfloat16>(ctx, &j, t->n_rows, pair);
  else
    run_few<float>(ctx, &j, t->n_rows, pair);
}

/* ---- Many rows -------------------------------------------------------------------------------------------------------------------- */

/* x, normalised where that is wanted, in the weights' type and stride. */
static void *prepare_rows(const sfa_context *ctx, const sfa_projection *t) {
  const sfa_linear *l = t->parts[0].linear;
  void *rows = sfa_cuda_borrow(ctx, (size_t)t->n_rows * (size_t)l->ld * (l->bf16 ? 2 : 4));
  if (rows)
    sfa_cuda_norm_to(ctx, t->n_rows, l->n_in, t->x, t->x_stride, t->norm_weight, t->norm_bias, t->center, t->norm_eps, rows, l->bf16,
                     l->ld);
  return rows;
}

static void project_many(const sfa_context *ctx, const sfa_projection *t) {
  void *x = prepare_rows(ctx, t);
  for (int p = 0; x && p < t->n_parts; p++) {
    const sfa_linear *l = t->parts[p].linear;
    sfa_cuda_multiply(ctx, t->n_rows, l->n_out, l->ld, l->bf16, (sfa_cuda_matrix){x, l->ld, false},
                      (sfa_cuda_matrix){l->weights, l->ld, true}, l->bias, t->add, t->parts[p].out, t->parts[p].out_stride);
  }
  if (t->activated) {
    const sfa_linear_part *a = &t->parts[0], *b = t->n_parts == 2 ? &t->parts[1] : NULL;
    sfa_device_cuda()->activate(ctx, t->activation, t->n_rows, a->linear->n_out, a->out, a->out_stride, b ? b->out : NULL,
                                b ? b->out_stride : 0, a->out, a->out_stride);
  }
  sfa_cuda_return(ctx, x);
}

/* Parts of both types one type after the other (only where nothing ties them together). */
static bool same_types(const sfa_projection *t) {
  for (int p = 1; p < t->n_parts; p++)
    if (t->parts[p].linear->bf16 != t->parts[0].linear->bf16)
      return false;
  return true;
}

static void project_same(const sfa_context *ctx, const sfa_projection *t) { (t->n_rows <= FEW_ROWS ? project_few : project_many)(ctx, t); }

static void project(const sfa_context *ctx, const sfa_projection *t) {
  if (same_types(t)) {
    project_same(ctx, t);
    return;
  }
  sfa_projection one = *t;
  one.n_parts = 1;
  one.activated = false;
  for (int p = 0; p < t->n_parts; p++) {
    one.parts = &t->parts[p];
    project_same(ctx, &one);
  }
  if (t->activated)
    sfa_device_cuda()->activate(ctx, t->activation, t->n_rows, t->parts[0].linear->n_out, t->parts[0].out, t->parts[0].out_stride,
                                t->parts[1].out, t->parts[1].out_stride, t->parts[0].out, t->parts[0].out_stride);
}

static size_t scratch_bytes(const sfa_context *ctx, int64_t n_rows, int32_t n_in) {
  (void)ctx, (void)n_rows, (void)n_in;
  return 0;
}

static void linear(const sfa_context *ctx, int64_t n_rows, const float *x, int64_t x_stride, int32_t n_parts, const sfa_linear_part *parts,
                   void *scratch) {
  (void)scratch;
  sfa_projection t = {};
  t.n_rows = n_rows;
  t.x = x;
  t.x_stride = x_stride;
  t.n_parts = n_parts;
  t.parts = parts;
  project(ctx, &t);
}

/* ---- Tables ----------------------------------------------------------------------------------------------------------------------- */

template <typename W>
__global__ void __launch_bounds__(THREADS)
    rows_of_kernel(int64_t n_rows, int32_t dim, int32_t ld, const W *table, const int32_t *ids, float scale, bool add, float *out) {
  for (int64_t row = blockIdx.x; row < n_rows; row += gridDim.x)
    for (int32_t i = threadIdx.x; i < dim; i += THREADS) {
      const float v = scale * (float)table[(int64_t)ids[row] * ld + i];
      out[row * dim + i] = add ? out[row * dim + i] + v : v;
    }
}

static void rows(const sfa_context *ctx, int64_t n_rows, const sfa_linear *l, const int32_t *ids, float scale, bool add, float *out) {
  const unsigned blocks = sfa_cuda_blocks(n_rows, 1);
  if (l->bf16)
    SFA_CUDA_LAUNCH(ctx, rows_of_kernel, blocks, THREADS, 0, n_rows, l->n_in, l->ld, (const __nv_bfloat16 *)l->weights, ids, scale, add,
                    out);
  else
    SFA_CUDA_LAUNCH(ctx, rows_of_kernel, blocks, THREADS, 0, n_rows, l->n_in, l->ld, (const float *)l->weights, ids, scale, add, out);
}

void sfa_cuda_linear_ops(sfa_device *device) {
  device->linear_create = linear_create;
  device->linear_destroy = linear_destroy;
  device->linear_bytes = linear_bytes;
  device->fast_storage = fast_storage;
  device->scratch_bytes = scratch_bytes;
  device->linear = linear;
  device->project = project;
  device->rows = rows;
}
