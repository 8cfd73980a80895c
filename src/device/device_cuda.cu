/* The CUDA device: its state, and operations row by row. Rows of activations are short (64 to 16,384 elements) and few or many: a warp
 * takes a short one, a block a long one, and elements without a sum go one to a thread. */
#include "device/device_cuda.cuh"

enum { THREADS = 256, WARPS = THREADS / 32, LONG_ROW = 1024, FEW_PIECES = 64 };

/* ---- Norms ------------------------------------------------------------------------------------------------------------------------ */

typedef struct norm_job {
  int64_t n_pieces, x_stride, out_stride;
  int32_t n_groups, dim, width;   /* width: of the output, zeros from dim on */
  const float *x, *weight, *bias; /* weight NULL: the row as it is */
  void *out;
  float eps;
  bool center;
} norm_job;

__device__ static inline void put(float *to, float x) { *to = x; }
__device__ static inline void put(__nv_bfloat16 *to, float x) { *to = __float2bfloat16_rn(x); }

/* TEAM warps normalise a piece: out = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias. */
template <int TEAM, typename Out> __global__ void __launch_bounds__(THREADS) norm_kernel(norm_job j) {
  __shared__ float room[WARPS];
  const int lane = threadIdx.x % (TEAM * 32);
  for (int64_t piece = (int64_t)blockIdx.x * (WARPS / TEAM) + threadIdx.x / (TEAM * 32); piece < j.n_pieces;
       piece += (int64_t)gridDim.x * (WARPS / TEAM)) {
    const int64_t row = piece / j.n_groups, group = piece % j.n_groups * j.dim;
    const float *x = j.x + row * j.x_stride + group;
    Out *out = (Out *)j.out + row * j.out_stride + group;
    float mean = 0, squares = 0, factor = 1;
    if (j.weight && j.center) {
      for (int i = lane; i < j.dim; i += TEAM * 32)
        mean += x[i];
      mean = sfa_block_sum<TEAM>(mean, room) / (float)j.dim;
    }
    if (j.weight) {
      for (int i = lane; i < j.dim; i += TEAM * 32)
        squares = fmaf(x[i] - mean, x[i] - mean, squares);
      factor = 1.0f / sqrtf(sfa_block_sum<TEAM>(squares, room) / (float)j.dim + j.eps);
    }
    for (int i = lane; i < j.width; i += TEAM * 32)
      put(out + i, i >= j.dim ? 0.0f : !j.weight ? x[i] : (x[i] - mean) * factor * j.weight[i] + (j.bias ? j.bias[i] : 0.0f));
  }
}

template <typename Out> static void run_norm(const sfa_context *ctx, const norm_job *job) {
  if (job->n_pieces <= 0)
    return;
  if (job->dim > LONG_ROW || job->n_pieces <= FEW_PIECES)
    SFA_CUDA_LAUNCH(ctx, (norm_kernel<WARPS, Out>), sfa_cuda_blocks(job->n_pieces, 1), THREADS, 0, *job);
  else
    SFA_CUDA_LAUNCH(ctx, (norm_kernel<1, Out>), sfa_cuda_blocks(job->n_pieces, WARPS), THREADS, 0, *job);
}

static void rms_norm(const sfa_context *ctx, int64_t n_rows, int32_t n_groups, int32_t dim, const float *x, int64_t x_stride,
                     const float *weight, float eps, float *out, int64_t out_stride) {
  const norm_job job = {n_rows * n_groups, x_stride, out_stride, n_groups, dim, dim, x, weight, NULL, out, eps, false};
  run_norm<float>(ctx, &job);
}

static void layer_norm(const sfa_context *ctx, int64_t n_rows, int32_t dim, const float *x, int64_t x_stride, const float *weight,
                       const float *bias, float eps, float *out, int64_t out_stride) {
  const norm_job job = {n_rows, x_stride, out_stride, 1, dim, dim, x, weight, bias, out, eps, true};
  run_norm<float>(ctx, &job);
}

void sfa_cuda_norm_to(const sfa_context *ctx, int64_t n_rows, int32_t dim, const float *x, int64_t x_stride, const float *weight,
                      const float *bias, bool center, float eps, void *out, bool bf16, int64_t out_stride) {
  const norm_job job = {n_rows, x_stride, out_stride, 1, dim, (int32_t)out_stride, x, weight, bias, out, eps, center};
  if (bf16)
    run_norm<__nv_bfloat16>(ctx, &job);
  else
    run_norm<float>(ctx, &job);
}

/* ---- Element by element ----------------------------------------------------------------------------------------------------------- */

/* body(row, i) for every element of [n_rows][dim]. */
template <typename Body> __global__ void __launch_bounds__(THREADS) rows_kernel(int64_t n_rows, int32_t dim, Body body) {
  for (int64_t row = blockIdx.y; row < n_rows; row += gridDim.y)
    for (int32_t i = blockIdx.x * THREADS + threadIdx.x; i < dim; i += gridDim.x * THREADS)
      body(row, i);
}

template <typename Body> static void run_rows(const sfa_context *ctx, int64_t n_rows, int32_t dim, Body body) {
  const dim3 grid(sfa_cuda_blocks(dim, THREADS), (unsigned)(n_rows < 32768 ? n_rows : 32768));
  if (n_rows > 0 && dim > 0)
    SFA_CUDA_LAUNCH(ctx, rows_kernel, grid, THREADS, 0, n_rows, dim, body);
}

static void rope(const sfa_context *ctx, int64_t n_rows, int32_t n_heads, int32_t head_dim, int32_t n_pairs, bool interleaved,
                 const float *cos, const float *sin, float *x, int64_t x_stride) {
  run_rows(ctx, n_rows, n_heads * n_pairs, [=] __device__(int64_t row, int32_t i) {
    const int32_t p = i % n_pairs, first = interleaved ? 2 * p : p, second = interleaved ? 2 * p + 1 : p + n_pairs;
    float *head = x + row * x_stride + (int64_t)(i / n_pairs) * head_dim;
    const float c = cos[row * n_pairs + p], s = sin[row * n_pairs + p], a = head[first], b = head[second];
    head[first] = a * c - b * s;
    head[second] = b * c + a * s;
  });
}

static void activate(const sfa_context *ctx, sfa_activation act, int64_t n_rows, int32_t dim, const float *x, int64_t x_stride,
                     const float *up, int64_t up_stride, float *out, int64_t out_stride) {
  run_rows(ctx, n_rows, dim, [=] __device__(int64_t row, int32_t i) {
    const float y = sfa_activated(act, x[row * x_stride + i]);
    out[row * out_stride + i] = up ? y * up[row * up_stride + i] : y;
  });
}

static void add(const sfa_context *ctx, int64_t n_rows, int32_t dim, float *x, const float *y) {
  run_rows(ctx, n_rows, dim, [=] __device__(int64_t row, int32_t i) { x[row * dim + i] += y[row * dim + i]; });
}

static void softcap(const sfa_context *ctx, int64_t n_rows, int32_t dim, float cap, float *x, int64_t x_stride) {
  run_rows(ctx, n_rows, dim, [=] __device__(int64_t row, int32_t i) {
    float *at = x + row * x_stride + i;
    *at = cap * (2.0f * sfa_sigmoid(*at * (2.0f / cap)) - 1.0f);
  });
}

static void rotations(const sfa_context *ctx, int64_t n_rows, const int32_t *positions, int32_t n_pairs, const double *frequencies,
                      float *cos_out, float *sin_out) {
  run_rows(ctx, n_rows, n_pairs, [=] __device__(int64_t row, int32_t p) {
    double s, c;
    sincos((double)positions[row] * frequencies[p], &s, &c);
    cos_out[row * n_pairs + p] = (float)c;
    sin_out[row * n_pairs + p] = (float)s;
  });
}

/* ---- Scores ----------------------------------------------------------------------------------------------------------------------- */

/* A block takes a row: the first largest, then -log softmax = log(sum of e^(x - largest)) + largest - x[target]. The sum runs in double:
 * 50,000 to 260,000 terms. */
__global__ void __launch_bounds__(THREADS)
    score_kernel(int32_t n_classes, const float *logits, const int32_t *targets, float *nll, int32_t *argmax) {
  __shared__ double room[WARPS];
  __shared__ float largest_of[THREADS];
  __shared__ int32_t place_of[THREADS];
  const float *x = logits + (int64_t)blockIdx.x * n_classes;
  float largest = x[0];
  int32_t place = 0;
  for (int32_t i = threadIdx.x; i < n_classes; i += THREADS)
    if (x[i] > largest)
      largest = x[i], place = i;
  largest_of[threadIdx.x] = largest;
  place_of[threadIdx.x] = place;
  for (int width = THREADS / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) {
      const int other = threadIdx.x + width;
      if (largest_of[other] > largest_of[threadIdx.x] ||
          (largest_of[other] == largest_of[threadIdx.x] && place_of[other] < place_of[threadIdx.x])) {
        largest_of[threadIdx.x] = largest_of[other];
        place_of[threadIdx.x] = place_of[other];
      }
    }
  }
  __syncthreads();
  largest = largest_of[0];
  double sum = 0;
  for (int32_t i = threadIdx.x; i < n_classes; i += THREADS)
    sum += (double)expf(x[i] - largest);
  sum = sfa_block_sum<WARPS>(sum, room);
  if (threadIdx.x == 0) {
    const int32_t target = targets[blockIdx.x];
    argmax[blockIdx.x] = place_of[0];
    nll[blockIdx.x] = target < 0 ? nanf("") : (float)(log(sum) + ((double)largest - (double)x[target]));
  }
}

static void score(const sfa_context *ctx, int64_t n_rows, int32_t n_classes, const float *logits, const int32_t *targets, float *nll,
                  int32_t *argmax) {
  if (n_rows > 0)
    SFA_CUDA_LAUNCH(ctx, score_kernel, (unsigned)n_rows, THREADS, 0, n_classes, logits, targets, nll, argmax);
}

/* ---- The largest ------------------------------------------------------------------------------------------------------------------ */

__global__ void __launch_bounds__(THREADS) most_kernel(int64_t n, const float *x, float *most) {
  __shared__ float largest_of[THREADS];
  float largest = *most;
  for (int64_t i = threadIdx.x; i < n; i += THREADS)
    largest = fmaxf(largest, x[i]);
  largest_of[threadIdx.x] = largest;
  for (int width = THREADS / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width)
      largest_of[threadIdx.x] = fmaxf(largest_of[threadIdx.x], largest_of[threadIdx.x + width]);
  }
  if (threadIdx.x == 0)
    *most = largest_of[0];
}

static void keep_most(const sfa_context *ctx, int64_t n, const float *x, float *most) {
  SFA_CUDA_LAUNCH(ctx, most_kernel, 1, THREADS, 0, n, x, most);
}

/* ---- Recording -------------------------------------------------------------------------------------------------------------------- */

static void *host_alloc(sfa_context *ctx, size_t bytes) {
  void *memory = NULL;
  (void)ctx;
  if (cudaMallocHost(&memory, bytes) != cudaSuccess)
    (void)cudaGetLastError();
  return memory;
}

static void host_free(sfa_context *ctx, void *memory) {
  (void)ctx;
  if (memory)
    (void)cudaFreeHost(memory);
}

static sfa_status device_status(sfa_context *ctx, cudaError_t error, const char *what) {
  return error == cudaSuccess ? SFA_OK : sfa_fail(ctx, SFA_ERROR_DEVICE, "%s: %s", what, cudaGetErrorString(error));
}

static sfa_status record_begin(sfa_context *ctx) {
  return device_status(ctx, cudaStreamBeginCapture(sfa_cuda_stream_of(ctx), cudaStreamCaptureModeThreadLocal), "recording a step");
}

static sfa_status record_end(sfa_context *ctx, void **record) {
  cudaGraph_t graph = NULL;
  cudaGraphExec_t ready = NULL;
  cudaError_t error = cudaStreamEndCapture(sfa_cuda_stream_of(ctx), &graph);
  if (error == cudaSuccess)
    error = cudaGraphInstantiate(&ready, graph, 0);
  if (error != cudaSuccess)
    (void)cudaGetLastError();
  if (graph)
    (void)cudaGraphDestroy(graph);
  *record = error == cudaSuccess ? ready : NULL;
  return SFA_OK;
}

static sfa_status record_run(sfa_context *ctx, void *record) {
  return device_status(ctx, cudaGraphLaunch((cudaGraphExec_t)record, sfa_cuda_stream_of(ctx)), "a recorded step");
}

static void record_destroy(sfa_context *ctx, void *record) {
  (void)ctx;
  if (record)
    (void)cudaGraphExecDestroy((cudaGraphExec_t)record);
}

/* ---- State ------------------------------------------------------------------------------------------------------------------------ */

void sfa_cuda_note(const sfa_context *ctx, const char *refused, const char *what) {
  sfa_device_state *state = ctx->device_state;
  if (!refused)
    return;
  (void)cudaGetLastError();
  if (!state->failed[0])
    snprintf(state->failed, sizeof state->failed, "%s: %s", what, refused);
}

void *sfa_cuda_borrow(const sfa_context *ctx, size_t bytes) {
  void *memory = NULL;
  sfa_cuda_note(ctx, cudaMallocFromPoolAsync(&memory, bytes ? bytes : 1, ctx->device_state->pool, sfa_cuda_stream_of(ctx)),
                "memory for an operation");
  return memory;
}

void sfa_cuda_return(const sfa_context *ctx, void *memory) {
  if (memory)
    sfa_cuda_note(ctx, cudaFreeAsync(memory, sfa_cuda_stream_of(ctx)), "memory of an operation");
}

static sfa_status finish(sfa_context *ctx) {
  sfa_device_state *state = ctx->device_state;
  if (!state->failed[0])
    return SFA_OK;
  const sfa_status status = sfa_fail(ctx, SFA_ERROR_DEVICE, "the GPU refused %s", state->failed);
  state->failed[0] = 0;
  return status;
}

static void close_state(sfa_context *ctx) {
  sfa_device_state *state = ctx->device_state;
  if (!state)
    return;
  if (state->products)
    (void)cublasLtDestroy(state->products);
  if (state->pool)
    (void)cudaMemPoolDestroy(state->pool);
  state->memory->free(ctx, state->workspace);
  state->memory->free(ctx, state->sums);
  sfa_free(ctx, state->plans);
  ctx->device_state = NULL;
  sfa_free(ctx, state);
}

static cudaError_t open_pool(sfa_device_state *state) {
  cudaMemPoolProps props = {};
  uint64_t keep = UINT64_MAX; /* until the context's end */
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  props.allocType = cudaMemAllocationTypePinned;
  props.location.type = cudaMemLocationTypeDevice;
  props.location.id = device;
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&state->n_processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaMemPoolCreate(&state->pool, &props);
  return error == cudaSuccess ? cudaMemPoolSetAttribute(state->pool, cudaMemPoolAttrReleaseThreshold, &keep) : error;
}

static sfa_status fill_state(sfa_context *ctx, sfa_device_state *state) {
  SFA_TRY(device_status(ctx, open_pool(state), "a pool of memory"));
  if (cublasLtCreate(&state->products) != CUBLAS_STATUS_SUCCESS)
    return sfa_fail(ctx, SFA_ERROR_DEVICE, "cuBLASLt could not be started on this GPU");
  SFA_TRY(state->memory->alloc(ctx, SFA_CUDA_WORKSPACE_BYTES, &state->workspace));
  SFA_TRY(state->memory->alloc(ctx, SFA_CUDA_SUMS * sizeof *state->sums + sizeof *state->arrived, (void **)&state->sums));
  state->arrived = (unsigned *)(void *)(state->sums + SFA_CUDA_SUMS);
  SFA_TRY(device_status(ctx, cudaMemsetAsync(state->arrived, 0, sizeof *state->arrived, sfa_cuda_stream_of(ctx)), "a counter"));
  return sfa_alloc_zero(ctx, SFA_CUDA_PLANS, sfa_cuda_plan_bytes, "plans of matrix products", (void **)&state->plans);
}

static sfa_status open_state(sfa_context *ctx, const sfa_device_cuda_memory *memory) {
  if (ctx->device_state)
    return SFA_OK;
  SFA_TRY(sfa_alloc_zero(ctx, 1, sizeof *ctx->device_state, "the state of a GPU", (void **)&ctx->device_state));
  ctx->device_state->memory = memory;
  ctx->device_state_close = close_state;
  const sfa_status status = fill_state(ctx, ctx->device_state);
  if (status != SFA_OK)
    close_state(ctx);
  return status;
}

const sfa_device *sfa_device_cuda(void) {
  static const sfa_device cuda = [] {
    sfa_device d = {};
    d.name = "cuda";
    d.rms_norm = rms_norm;
    d.layer_norm = layer_norm;
    d.rope = rope;
    d.activate = activate;
    d.add = add;
    d.softcap = softcap;
    d.rotations = rotations;
    d.score = score;
    d.host_alloc = host_alloc;
    d.host_free = host_free;
    d.record_begin = record_begin;
    d.record_end = record_end;
    d.record_run = record_run;
    d.record_destroy = record_destroy;
    d.keep_most = keep_most;
    d.finish = finish;
    sfa_cuda_linear_ops(&d);
    return d;
  }();
  return &cuda;
}

const sfa_device_cuda_object *sfa_device_cuda_open(const char *version, size_t interface_bytes) {
  static const sfa_device_cuda_object object = {open_state, sfa_device_cuda(), sfa_training_cuda()};
  return strcmp(version, SFA_VERSION) == 0 && interface_bytes == SFA_DEVICE_CUDA_INTERFACE ? &object : NULL;
}
