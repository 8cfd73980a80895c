/* Training on a GPU: the operations of training.h. Sums over rows are cut into pieces by their number alone, pieces are joined in order,
 * and nothing is added to by two threads at once: the same bits every time. */
#include "device/device_cuda.cuh"

enum { THREADS = 256, WARPS = THREADS / 32, PIECES = 64 };

static size_t scratch_bytes(int64_t max_dim) {
  (void)max_dim;
  return 0;
}

/* ---- Products --------------------------------------------------------------------------------------------------------------------- */

typedef struct operand {
  sfa_cuda_matrix matrix;
  void *borrowed; /* of a copy in bf16, NULL: none */
} operand;

/* [rows][columns] as it lies in memory, or rounded to bf16 in the same order. */
static operand operand_of(const sfa_context *ctx, const sfa_matrix *m, int64_t rows, int64_t columns, bool bf16) {
  const bool transposed = m->column_stride != 1;
  const int64_t n_lines = transposed ? columns : rows, n = transposed ? rows : columns, stride = (n + 7) / 8 * 8;
  operand o = {{m->data, transposed ? m->column_stride : m->row_stride, transposed}, NULL};
  if (!bf16)
    return o;
  o.borrowed = sfa_cuda_borrow(ctx, (size_t)n_lines * (size_t)stride * sizeof(__nv_bfloat16));
  if (o.borrowed)
    sfa_cuda_norm_to(ctx, n_lines, (int32_t)n, m->data, o.matrix.stride, NULL, NULL, false, 0, o.borrowed, true, stride);
  o.matrix.data = o.borrowed;
  o.matrix.stride = stride;
  return o;
}

static void product(const sfa_context *ctx, const sfa_product *p, void *scratch) {
  (void)scratch;
  const operand a = operand_of(ctx, &p->a, p->m, p->k, p->bf16), b = operand_of(ctx, &p->b, p->k, p->n, p->bf16);
  if (a.matrix.data && b.matrix.data)
    sfa_cuda_multiply(ctx, p->m, p->n, p->k, p->bf16, a.matrix, b.matrix, p->bias, p->add, p->out, p->out_stride);
  sfa_cuda_return(ctx, a.borrowed);
  sfa_cuda_return(ctx, b.borrowed);
}

/* ---- Sums over rows --------------------------------------------------------------------------------------------------------------- */

/* sums [PIECES][dim] of term(row, column) over the rows of each piece. */
template <typename Term> __global__ void __launch_bounds__(THREADS) piece_sums_kernel(int64_t n_rows, int32_t dim, float *sums, Term term) {
  const int64_t first = blockIdx.y * n_rows / PIECES, end = (blockIdx.y + 1) * n_rows / PIECES;
  const int32_t column = blockIdx.x * THREADS + threadIdx.x;
  if (column >= dim)
    return;
  float sum = 0;
  for (int64_t row = first; row < end; row++)
    sum += term(row, column);
  sums[(int64_t)blockIdx.y * dim + column] = sum;
}

__global__ void __launch_bounds__(THREADS) join_pieces_kernel(int32_t dim, const float *sums, float *out) {
  const int32_t column = blockIdx.x * THREADS + threadIdx.x;
  if (column >= dim)
    return;
  float sum = out[column];
  for (int piece = 0; piece < PIECES; piece++)
    sum += sums[(int64_t)piece * dim + column];
  out[column] = sum;
}

/* out [dim] += the sum over rows. */
template <typename Term> static void sum_rows(const sfa_context *ctx, int64_t n_rows, int32_t dim, float *out, Term term) {
  const unsigned columns = (unsigned)((dim + THREADS - 1) / THREADS);
  float *sums = (float *)sfa_cuda_borrow(ctx, (size_t)PIECES * (size_t)dim * sizeof *sums);
  if (!sums)
    return;
  SFA_CUDA_LAUNCH(ctx, piece_sums_kernel, dim3(columns, PIECES), THREADS, 0, n_rows, dim, sums, term);
  SFA_CUDA_LAUNCH(ctx, join_pieces_kernel, columns, THREADS, 0, dim, sums, out);
  sfa_cuda_return(ctx, sums);
}

static void column_sum(const sfa_context *ctx, int64_t n_rows, int32_t dim, const float *x, int64_t x_stride, float *out, void *scratch) {
  (void)scratch;
  sum_rows(ctx, n_rows, dim, out, [=] __device__(int64_t row, int32_t column) { return x[row * x_stride + column]; });
}

/* What a piece of a row needs: mean, r = 1 / sqrt(mean of squares + eps), mean(g), r^2 mean(g (x - mean)) with g = dy w. */
typedef struct norm_facts {
  float mean, r, level, pull;
} norm_facts;

template <int TEAM> __global__ void __launch_bounds__(THREADS) norm_facts_kernel(sfa_norm_backward t, norm_facts *facts) {
  __shared__ float room[WARPS];
  const int lane = threadIdx.x % (TEAM * 32);
  const int64_t n_pieces = t.n_rows * t.n_groups;
  for (int64_t piece = (int64_t)blockIdx.x * (WARPS / TEAM) + threadIdx.x / (TEAM * 32); piece < n_pieces;
       piece += (int64_t)gridDim.x * (WARPS / TEAM)) {
    const int64_t row = piece / t.n_groups, at = piece % t.n_groups * t.dim;
    const float *x = t.x + row * t.x_stride + at, *dy = t.d_out + row * t.d_out_stride + at;
    float mean = 0, squares = 0, along = 0, sum = 0;
    for (int i = lane; t.center && i < t.dim; i += TEAM * 32)
      mean += x[i];
    mean = t.center ? sfa_block_sum<TEAM>(mean, room) / (float)t.dim : 0.0f;
    for (int i = lane; i < t.dim; i += TEAM * 32) {
      const float v = x[i] - mean, g = dy[i] * t.weight[i];
      squares = fmaf(v, v, squares);
      along = fmaf(g, v, along);
      sum += g;
    }
    squares = sfa_block_sum<TEAM>(squares, room);
    along = sfa_block_sum<TEAM>(along, room);
    sum = sfa_block_sum<TEAM>(sum, room);
    const float r = 1.0f / sqrtf(squares / (float)t.dim + t.eps);
    if (lane == 0)
      facts[piece] = (norm_facts){mean, r, t.center ? sum / (float)t.dim : 0.0f, r * r * along / (float)t.dim};
  }
}

__global__ void __launch_bounds__(THREADS) norm_gradient_kernel(sfa_norm_backward t, const norm_facts *facts) {
  const int32_t width = t.n_groups * t.dim;
  for (int64_t row = blockIdx.y; row < t.n_rows; row += gridDim.y)
    for (int32_t i = blockIdx.x * THREADS + threadIdx.x; i < width; i += gridDim.x * THREADS) {
      const norm_facts f = facts[row * t.n_groups + i / t.dim];
      const float v = t.x[row * t.x_stride + i] - f.mean, g = t.d_out[row * t.d_out_stride + i] * t.weight[i % t.dim] - f.level;
      const float dx = f.r * (g - v * f.pull);
      float *to = t.d_x + row * t.d_x_stride + i;
      *to = t.add ? *to + dx : dx;
    }
}

/* dx = r (g - mean(g) - xh mean(g xh)), xh = r (x - mean); dw += dy xh, db += dy: the sums before d_x, which may be d_out. */
static void norm_backward(const sfa_context *ctx, const sfa_norm_backward *norm, void *scratch) {
  (void)scratch;
  const sfa_norm_backward t = *norm;
  const int64_t n_pieces = t.n_rows * t.n_groups;
  if (n_pieces <= 0)
    return;
  norm_facts *facts = (norm_facts *)sfa_cuda_borrow(ctx, (size_t)n_pieces * sizeof *facts);
  if (!facts)
    return;
  if (t.dim > 1024)
    SFA_CUDA_LAUNCH(ctx, norm_facts_kernel<WARPS>, sfa_cuda_blocks(n_pieces, 1), THREADS, 0, t, facts);
  else
    SFA_CUDA_LAUNCH(ctx, norm_facts_kernel<1>, sfa_cuda_blocks(n_pieces, WARPS), THREADS, 0, t, facts);
  if (t.d_weight)
    sum_rows(ctx, n_pieces, t.dim, t.d_weight, [=] __device__(int64_t piece, int32_t i) {
      const int64_t row = piece / t.n_groups, at = piece % t.n_groups * t.dim + i;
      return t.d_out[row * t.d_out_stride + at] * ((t.x[row * t.x_stride + at] - facts[piece].mean) * facts[piece].r);
    });
  if (t.d_bias)
    sum_rows(ctx, n_pieces, t.dim, t.d_bias, [=] __device__(int64_t piece, int32_t i) {
      return t.d_out[piece / t.n_groups * t.d_out_stride + piece % t.n_groups * t.dim + i];
    });
  const dim3 grid(sfa_cuda_blocks(t.n_groups * t.dim, THREADS), (unsigned)(t.n_rows < 32768 ? t.n_rows : 32768));
  SFA_CUDA_LAUNCH(ctx, norm_gradient_kernel, grid, THREADS, 0, t, facts);
  sfa_cuda_return(ctx, facts);
}

/* ---- Element by element ----------------------------------------------------------------------------------------------------------- */

/* body(row, i) for every element of [n_rows][width]. */
template <typename Body> __global__ void __launch_bounds__(THREADS) elements_kernel(int64_t n_rows, int64_t width, Body body) {
  for (int64_t row = blockIdx.y; row < n_rows; row += gridDim.y)
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < width; i += (int64_t)gridDim.x * THREADS)
      body(row, i);
}

template <typename Body> static void run_elements(const sfa_context *ctx, int64_t n_rows, int64_t width, Body body) {
  const dim3 grid(sfa_cuda_blocks(width, THREADS), (unsigned)(n_rows < 32768 ? n_rows : 32768));
  if (n_rows > 0 && width > 0)
    SFA_CUDA_LAUNCH(ctx, elements_kernel, grid, THREADS, 0, n_rows, width, body);
}

/* silu x = x s, s = sigmoid(x): derivative s (1 + x (1 - s)). gelu x = x s(2u), 2u = x (a + b x^2): s + x s (1 - s) (a + 3 b x^2). */
static void activate_backward(const sfa_context *ctx, sfa_activation act, int64_t n_rows, int32_t dim, const float *x, int64_t x_stride,
                              const float *up, int64_t up_stride, const float *d_out, int64_t d_out_stride, float *d_x, int64_t d_x_stride,
                              float *d_up, int64_t d_up_stride) {
  run_elements(ctx, n_rows, dim, [=] __device__(int64_t row, int64_t i) {
    const float v = x[row * x_stride + i], square = v * v, other = up ? up[row * up_stride + i] : 1.0f;
    const bool gelu = act == SFA_ACT_GELU_TANH;
    const float u = gelu ? v * fmaf(square, 0x1.2444f2p-4f, 0x1.988454p+0f) : v;
    const float slope = gelu ? fmaf(square, 3.0f * 0x1.2444f2p-4f, 0x1.988454p+0f) : 1.0f;
    const float s = sfa_sigmoid(u), dy = d_out[row * d_out_stride + i];
    if (up)
      d_up[row * d_up_stride + i] = dy * (v * s);
    d_x[row * d_x_stride + i] = dy * other * fmaf(s, v * slope * (1.0f - s), s);
  });
}

static void gather(const sfa_context *ctx, int64_t n_rows, int32_t dim, const float *table, const int32_t *ids, float scale, bool add,
                   float *out) {
  run_elements(ctx, n_rows, dim, [=] __device__(int64_t row, int64_t i) {
    const float v = scale * table[(int64_t)ids[row] * dim + i];
    out[row * dim + i] = add ? out[row * dim + i] + v : v;
  });
}

static void scale(const sfa_context *ctx, int64_t n, float factor, const float *x, bool add, float *out) {
  run_elements(ctx, 1, n, [=] __device__(int64_t, int64_t i) { out[i] = add ? fmaf(factor, x[i], out[i]) : factor * x[i]; });
}

static void copy_rows(const sfa_context *ctx, int64_t n_rows, int64_t width, const float *from, int64_t from_stride, float *to,
                      int64_t to_stride) {
  run_elements(ctx, n_rows, width, [=] __device__(int64_t row, int64_t i) { to[row * to_stride + i] = from[row * from_stride + i]; });
}

static void shift(const sfa_context *ctx, int64_t n, const float *x, float constant, float *out) {
  run_elements(ctx, 1, n, [=] __device__(int64_t, int64_t i) { out[i] = x[i] + constant; });
}

static void keep_where(const sfa_context *ctx, int64_t n, const float *mask, float *x) {
  run_elements(ctx, 1, n, [=] __device__(int64_t, int64_t i) {
    if (mask[i] == 0.0f)
      x[i] = 0.0f;
  });
}

/* ---- Rows with the same place ----------------------------------------------------------------------------------------------------- */

/* table[ids[row]] += scale * x[row], rows in rising order: a block for every row that is the first with its id takes all rows of that id.
 * They are found a block's width of ids at a time, and listed in order by counting those before. */
__global__ void __launch_bounds__(THREADS)
    scatter_kernel(int32_t n_rows, int32_t dim, const float *x, const int32_t *ids, float scale, float *table) {
  __shared__ int32_t list[THREADS], counts[WARPS];
  const int32_t row = (int32_t)blockIdx.x, id = ids[row];
  bool before = false;
  for (int32_t i = threadIdx.x; i < row; i += THREADS)
    before |= ids[i] == id;
  if (__syncthreads_or(before))
    return;
  float *to = table + (int64_t)id * dim;
  for (int32_t first = row; first < n_rows; first += THREADS) {
    const int32_t at = first + (int32_t)threadIdx.x, warp = threadIdx.x / 32;
    const bool same = at < n_rows && ids[at] == id;
    const unsigned votes = __ballot_sync(~0u, same);
    int32_t place = __popc(votes & ((1u << threadIdx.x % 32) - 1)), n = 0;
    if (threadIdx.x % 32 == 0)
      counts[warp] = __popc(votes);
    __syncthreads();
    for (int w = 0; w < WARPS; w++) {
      place += w < warp ? counts[w] : 0;
      n += counts[w];
    }
    if (same)
      list[place] = at;
    __syncthreads();
    for (int32_t i = threadIdx.x; n > 0 && i < dim; i += THREADS) {
      float sum = to[i];
      for (int32_t k = 0; k < n; k++)
        sum = fmaf(scale, x[(int64_t)list[k] * dim + i], sum);
      to[i] = sum;
    }
    __syncthreads();
  }
}

static void scatter_add(const sfa_context *ctx, int64_t n_rows, int32_t dim, const float *x, const int32_t *ids, float scale,
                        float *table) {
  if (n_rows > 0)
    SFA_CUDA_LAUNCH(ctx, scatter_kernel, (unsigned)n_rows, THREADS, 0, (int32_t)n_rows, dim, x, ids, scale, table);
}

/* ---- Losses ----------------------------------------------------------------------------------------------------------------------- */

__device__ static float block_max(float x, float *room) {
  for (int width = 16; width > 0; width /= 2)
    x = fmaxf(x, __shfl_xor_sync(~0u, x, width));
  __syncthreads();
  if (threadIdx.x % 32 == 0)
    room[threadIdx.x / 32] = x;
  __syncthreads();
  x = room[0];
  for (int warp = 1; warp < WARPS; warp++)
    x = fmaxf(x, room[warp]);
  return x;
}

/* The largest of x and the sum of e^((x - largest) * sharpness). */
__device__ static float soften(int32_t dim, const float *x, float sharpness, float *room, float *sum) {
  float largest = -INFINITY, total = 0;
  for (int32_t i = threadIdx.x; i < dim; i += THREADS)
    largest = fmaxf(largest, x[i]);
  largest = block_max(largest, room);
  for (int32_t i = threadIdx.x; i < dim; i += THREADS)
    total += expf((x[i] - largest) * sharpness);
  *sum = sfa_block_sum<WARPS>(total, room);
  return largest;
}

/* A block takes a row; the formulas are those of training_tmpl.c. */
__global__ void __launch_bounds__(THREADS) loss_kernel(sfa_loss t) {
  __shared__ float room[WARPS];
  const int64_t row = blockIdx.x;
  const int32_t dim = t.n_classes, target = t.targets[row];
  float *x = t.logits + row * dim, sum, sum_t = 1, sum_x = 1, peak = 0, peak_x = 0, apart = 0;
  const float *teacher = t.teacher ? t.teacher + row * dim : NULL;
  for (int32_t i = threadIdx.x; t.softcap > 0 && i < dim; i += THREADS)
    x[i] = t.softcap * (2.0f * sfa_sigmoid(x[i] * (2.0f / t.softcap)) - 1.0f);
  if (target < 0) {
    for (int32_t i = threadIdx.x; t.backward && i < dim; i += THREADS)
      x[i] = 0.0f;
    if (threadIdx.x == 0) {
      t.losses[row] = 0.0f;
      if (teacher)
        t.divergences[row] = 0.0f;
    }
    return;
  }
  const float largest = soften(dim, x, 1.0f, room, &sum), cool = teacher ? 1.0f / t.temperature : 0.0f;
  __syncthreads();
  const float at_target = x[target];
  if (teacher) {
    peak = soften(dim, teacher, cool, room, &sum_t);
    peak_x = soften(dim, x, cool, room, &sum_x);
    for (int32_t i = threadIdx.x; i < dim; i += THREADS)
      apart += expf((teacher[i] - peak) * cool) / sum_t * ((teacher[i] - peak) * cool - (x[i] - peak_x) * cool);
    apart = sfa_block_sum<WARPS>(apart, room);
  }
  if (threadIdx.x == 0) {
    t.losses[row] = logf(sum) + largest - at_target;
    if (teacher)
      t.divergences[row] = apart - logf(sum_t) + logf(sum_x);
  }
  __syncthreads(); /* at_target is read by all before it changes */
  const float share = t.target_scale / sum, pull = t.teacher_scale * t.temperature;
  for (int32_t i = threadIdx.x; t.backward && i < dim; i += THREADS) {
    const float v = x[i], y = t.softcap > 0 ? v / t.softcap : 0.0f;
    float g = expf(v - largest) * share;
    if (teacher)
      g = fmaf(pull, expf((v - peak_x) * cool) / sum_x - expf((teacher[i] - peak) * cool) / sum_t, g);
    x[i] = (g - (i == target ? t.target_scale : 0.0f)) * (1.0f - y * y);
  }
}

static void loss(const sfa_context *ctx, const sfa_loss *t) {
  if (t->n_rows > 0)
    SFA_CUDA_LAUNCH(ctx, loss_kernel, (unsigned)t->n_rows, THREADS, 0, *t);
}

/* ---- Sums of squares, and what hangs on them ---------------------------------------------------------------------------------------- */

/* Of a block each; the last block to arrive adds them up, in a tree over their places. `arrived` is 0 before and after. */
__global__ void __launch_bounds__(THREADS) squares_kernel(int64_t n, const float *x, double *sums, unsigned *arrived, double *out) {
  __shared__ double room[WARPS];
  __shared__ bool is_last;
  double sum = 0;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS)
    sum += (double)x[i] * (double)x[i];
  sum = sfa_block_sum<WARPS>(sum, room);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    __threadfence();
    is_last = atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last)
    return;
  __threadfence();
  sum = sfa_block_sum<WARPS>(threadIdx.x < gridDim.x ? __ldcg(sums + threadIdx.x) : 0.0, room);
  if (threadIdx.x == 0)
    *out = sum;
}

static void square_sum(const sfa_context *ctx, int64_t n, const float *x, double *sum) {
  const sfa_device_state *state = ctx->device_state;
  const int64_t blocks = (n + THREADS - 1) / THREADS;
  SFA_CUDA_LAUNCH(ctx, squares_kernel,
                  (unsigned)(blocks < 1               ? 1
                             : blocks < SFA_CUDA_SUMS ? blocks
                                                      : SFA_CUDA_SUMS),
                  THREADS, 0, n, x, state->sums, state->arrived, sum);
}

__global__ void __launch_bounds__(32) clip_kernel(int32_t n, const double *sums, double most, sfa_clip *clip) {
  double sum = 0;
  for (int32_t i = threadIdx.x; i < n; i += 32)
    sum += sums[i];
  sum = sqrt(sfa_warp_sum(sum));
  if (threadIdx.x == 0)
    *clip = (sfa_clip){sum, (float)(most > 0 ? fmin(1.0, most / (sum + 1e-6)) : 1.0)};
}

static void clip(const sfa_context *ctx, int32_t n, const double *sums, double most, sfa_clip *clip) {
  SFA_CUDA_LAUNCH(ctx, clip_kernel, 1, 32, 0, n, sums, most, clip);
}

static void add_share(const sfa_context *ctx, int64_t n, double factor, const double *over, const float *x, float *out) {
  run_elements(ctx, 1, n, [=] __device__(int64_t, int64_t i) {
    if (*over != 0)
      out[i] = fmaf((float)(factor / *over), x[i], out[i]);
  });
}

static void adamw(const sfa_context *ctx, const sfa_adamw *how, int64_t n, const float *gradient, float *m, float *v, float *value) {
  const sfa_adamw t = *how;
  const float keep = 1.0f - t.rate * t.decay, step = -t.rate / t.correction1, level = 1.0f / sqrtf(t.correction2);
  run_elements(ctx, 1, n, [=] __device__(int64_t, int64_t i) {
    if (t.clip && !isfinite(t.clip->norm))
      return;
    const float g = gradient[i] * (t.clip ? t.clip->factor : 1.0f), first = fmaf(1.0f - t.beta1, g - m[i], m[i]);
    const float second = fmaf(1.0f - t.beta2, g * g, t.beta2 * v[i]);
    m[i] = first;
    v[i] = second;
    value[i] = fmaf(step, first / fmaf(sqrtf(second), level, t.eps), value[i] * keep);
  });
}

const sfa_training *sfa_training_cuda(void) {
  static const sfa_training cuda = {scratch_bytes, product, column_sum, norm_backward, activate_backward, gather, scatter_add, loss, scale,
                                    square_sum,    clip,    add_share,  adamw,         copy_rows,         shift,  keep_where};
  return &cuda;
}
