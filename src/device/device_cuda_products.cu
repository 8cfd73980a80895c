/* Products of matrices by cuBLASLt: which of its ways a shape takes is asked once and kept. Where it has none, a plain kernel. */
#include "device/device_cuda.cuh"

/* A shape and the way that cuBLASLt proposed for it; places of a small table, the newest one wins. */
typedef struct plan_key {
  int64_t m, n, k, a_stride, b_stride, out_stride;
  uint32_t a_align, b_align, out_align;
  uint8_t bf16, a_transposed, b_transposed, biased;
} plan_key;

struct sfa_cuda_plan {
  plan_key key;
  cublasLtMatmulAlgo_t way;
  bool known, possible;
};
const size_t sfa_cuda_plan_bytes = sizeof(struct sfa_cuda_plan);

/* The largest power of two, up to 256, that a pointer is a multiple of. */
static uint32_t alignment_of(const void *pointer) {
  const uintptr_t bits = (uintptr_t)pointer | 256;
  return (uint32_t)(bits & -bits);
}

static cublasStatus_t layout(cublasLtMatrixLayoutOpaque_t *l, bool bf16, bool transposed, int64_t rows, int64_t columns, int64_t stride) {
  return cublasLtMatrixLayoutInit(l, bf16 ? CUDA_R_16BF : CUDA_R_32F, (uint64_t)(transposed ? columns : rows),
                                  (uint64_t)(transposed ? rows : columns), stride);
}

/* cuBLASLt is column-major: out^T [n][m] = b^T a^T, and what is row-major here is its transpose there. */
typedef struct call {
  cublasLtMatmulDescOpaque_t how;
  cublasLtMatrixLayoutOpaque_t a, b, out;
} call;

static bool describe(const plan_key *key, const float *bias, call *c) {
  const cublasOperation_t op_b = key->b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, op_a = key->a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasLtEpilogue_t epilogue = bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
  bool good = cublasLtMatmulDescInit(&c->how, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS;
  good &= cublasLtMatmulDescSetAttribute(&c->how, CUBLASLT_MATMUL_DESC_TRANSA, &op_b, sizeof op_b) == CUBLAS_STATUS_SUCCESS;
  good &= cublasLtMatmulDescSetAttribute(&c->how, CUBLASLT_MATMUL_DESC_TRANSB, &op_a, sizeof op_a) == CUBLAS_STATUS_SUCCESS;
  good &= cublasLtMatmulDescSetAttribute(&c->how, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue) == CUBLAS_STATUS_SUCCESS;
  if (bias)
    good &= cublasLtMatmulDescSetAttribute(&c->how, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias) == CUBLAS_STATUS_SUCCESS;
  good &= layout(&c->b, key->bf16, key->b_transposed, key->n, key->k, key->b_stride) == CUBLAS_STATUS_SUCCESS;
  good &= layout(&c->a, key->bf16, key->a_transposed, key->k, key->m, key->a_stride) == CUBLAS_STATUS_SUCCESS;
  return good && layout(&c->out, false, false, key->n, key->m, key->out_stride) == CUBLAS_STATUS_SUCCESS;
}

static bool ask(const sfa_device_state *state, const plan_key *key, call *c, cublasLtMatmulAlgo_t *way) {
  cublasLtMatmulPreferenceOpaque_t wish;
  cublasLtMatmulHeuristicResult_t found;
  const uint64_t bytes = SFA_CUDA_WORKSPACE_BYTES;
  int n_found = 0;
  bool good = cublasLtMatmulPreferenceInit(&wish) == CUBLAS_STATUS_SUCCESS;
  const struct {
    cublasLtMatmulPreferenceAttributes_t what;
    uint32_t bytes;
  } alignments[] = {{CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key->b_align},
                    {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key->a_align},
                    {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key->out_align},
                    {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key->out_align}};
  good &=
      cublasLtMatmulPreferenceSetAttribute(&wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes) == CUBLAS_STATUS_SUCCESS;
  for (size_t i = 0; i < sizeof alignments / sizeof *alignments; i++)
    good &= cublasLtMatmulPreferenceSetAttribute(&wish, alignments[i].what, &alignments[i].bytes, sizeof alignments[i].bytes) ==
            CUBLAS_STATUS_SUCCESS;
  good = good && cublasLtMatmulAlgoGetHeuristic(state->products, &c->how, &c->b, &c->a, &c->out, &c->out, &wish, 1, &found, &n_found) ==
                     CUBLAS_STATUS_SUCCESS;
  if (!good || n_found == 0 || found.state != CUBLAS_STATUS_SUCCESS)
    return false;
  *way = found.algo;
  return true;
}

/* The place of a key in the table. */
static struct sfa_cuda_plan *place_of(const sfa_device_state *state, const plan_key *key) {
  const uint8_t *bytes = (const uint8_t *)key;
  uint64_t hash = 0xcbf29ce484222325ull;
  for (size_t i = 0; i < sizeof *key; i++)
    hash = (hash ^ bytes[i]) * 0x100000001b3ull;
  return &state->plans[(hash ^ hash >> 32) % SFA_CUDA_PLANS];
}

/* ---- The plain way ---------------------------------------------------------------------------------------------------------------- */

enum { TILE = 16 };

template <typename T>
__global__ void __launch_bounds__(TILE *TILE) plain_kernel(int64_t m, int64_t n, int64_t k, sfa_cuda_matrix a, sfa_cuda_matrix b,
                                                           const float *bias, bool add, float *out, int64_t out_stride) {
  const int64_t row = (int64_t)blockIdx.y * TILE + threadIdx.y, column = (int64_t)blockIdx.x * TILE + threadIdx.x;
  const int64_t a_row = a.transposed ? 1 : a.stride, a_step = a.transposed ? a.stride : 1;
  const int64_t b_step = b.transposed ? 1 : b.stride, b_column = b.transposed ? b.stride : 1;
  if (row >= m || column >= n)
    return;
  const T *x = (const T *)a.data + row * a_row, *y = (const T *)b.data + column * b_column;
  float sum = 0;
  for (int64_t i = 0; i < k; i++)
    sum = fmaf((float)x[i * a_step], (float)y[i * b_step], sum);
  sum += bias ? bias[column] : 0.0f;
  float *at = out + row * out_stride + column;
  *at = add ? *at + sum : sum;
}

static void multiply_plainly(const sfa_context *ctx, int64_t m, int64_t n, int64_t k, bool bf16, sfa_cuda_matrix a, sfa_cuda_matrix b,
                             const float *bias, bool add, float *out, int64_t out_stride) {
  const dim3 grid((unsigned)((n + TILE - 1) / TILE), (unsigned)((m + TILE - 1) / TILE)), block(TILE, TILE);
  if (bf16)
    SFA_CUDA_LAUNCH(ctx, plain_kernel<__nv_bfloat16>, grid, block, 0, m, n, k, a, b, bias, add, out, out_stride);
  else
    SFA_CUDA_LAUNCH(ctx, plain_kernel<float>, grid, block, 0, m, n, k, a, b, bias, add, out, out_stride);
}

void sfa_cuda_multiply(const sfa_context *ctx, int64_t m, int64_t n, int64_t k, bool bf16, sfa_cuda_matrix a, sfa_cuda_matrix b,
                       const float *bias, bool add, float *out, int64_t out_stride) {
  const sfa_device_state *state = ctx->device_state;
  plan_key key;
  call c;
  memset(&key, 0, sizeof key);
  key.m = m, key.n = n, key.k = k;
  key.a_stride = a.stride, key.b_stride = b.stride, key.out_stride = out_stride;
  key.a_align = alignment_of(a.data), key.b_align = alignment_of(b.data), key.out_align = alignment_of(out);
  key.bf16 = bf16, key.a_transposed = a.transposed, key.b_transposed = b.transposed, key.biased = bias != NULL;
  struct sfa_cuda_plan *plan = place_of(state, &key);
  const bool described = k > 0 && describe(&key, bias, &c);
  if (!plan->known || memcmp(&plan->key, &key, sizeof key) != 0) {
    plan->key = key;
    plan->known = true;
    plan->possible = described && ask(state, &key, &c, &plan->way);
  }
  const float one = 1, beta = add ? 1 : 0;
  if (!plan->possible ||
      cublasLtMatmul(state->products, &c.how, &one, b.data, &c.b, a.data, &c.a, &beta, out, &c.out, out, &c.out, &plan->way,
                     state->workspace, SFA_CUDA_WORKSPACE_BYTES, sfa_cuda_stream_of(ctx)) != CUBLAS_STATUS_SUCCESS)
    multiply_plainly(ctx, m, n, k, bf16, a, b, bias, add, out, out_stride);
}
