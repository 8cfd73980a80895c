/* cuda/prefill_sm90.cu: sfa_cuda_prefill_run: what the host knows of a call, for the blocks of prefill_sm90.cuh.
 *
 * The copy engine reads rows by tensor maps: (feature, head, token), boxes of 128 bytes of a row. So strides must be multiples of 16 bytes,
 * which int8 rows of a head_dim that is not a multiple of 16 only are if they are laid out so. */
#include <string.h>

#include "cuda/prefill_sm90.cuh"

typedef CUresult (*sfa_map_encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *,
                                   const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                   CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static const char *sfa_map_rows(sfa_map_encode encode, const sfa_cuda_rows *rows, int32_t dim, int32_t n_heads, int64_t n_tokens,
                                int32_t box_heads, int32_t box_tokens, CUtensorMap *map) {
  const size_t bytes = rows->dtype == SFA_I8 ? 1 : 2;
  const cuuint64_t dims[3] = {(cuuint64_t)dim, (cuuint64_t)n_heads, (cuuint64_t)n_tokens};
  const cuuint64_t strides[2] = {(cuuint64_t)rows->head_stride * bytes, (cuuint64_t)rows->token_stride * bytes};
  const cuuint32_t box[3] = {(cuuint32_t)(128 / bytes), (cuuint32_t)box_heads, (cuuint32_t)box_tokens}, steps[3] = {1, 1, 1};
  if ((uintptr_t)rows->data % 16 || strides[0] % 16 || strides[1] % 16)
    return "rows for the tensor cores must begin, and lie apart, at multiples of 16 bytes";
  return encode(map, bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, rows->data, dims, strides, box,
                steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS
             ? NULL
             : "the driver refused a tensor map: strides of rows must be below 2^40 bytes";
}

static int64_t sfa_prefill_n_tokens(const sfa_cuda_tokens *tokens) {
  return tokens->n_tokens ? tokens->n_tokens : tokens->n_sequences * tokens->max_seqlen;
}

/* -1 or a width that fits 31 bits; beyond all keys there is no difference. */
static int32_t sfa_prefill_window(int64_t width) { return width < 0 ? -1 : width > 0x3FFFFFFF ? 0x3FFFFFFF : (int32_t)width; }

const char *sfa_prefill_prepare(const sfa_cuda_prefill *args, int n_rows, int n_keys, sfa_prefill_job *job) {
  const sfa_cuda_scores *scores = &args->scores;
  const int32_t group = args->n_heads / args->n_kv_heads;
  memset(job, 0, sizeof *job);

  /* Packing a group fills blocks that one head would leave empty, and then reads keys once for all of them. */
  const int64_t T = args->q_tokens.max_seqlen, together = n_rows / group, apart = (T + n_rows - 1) / n_rows * group;
  const int is_packed = group > 1 && group <= 64 && (T + together - 1) / together < apart;
  job->pack = is_packed ? group : 1;
  job->block_tokens = n_rows / job->pack;
  job->n_blocks = (int32_t)((T + job->block_tokens - 1) / job->block_tokens);
  job->heads_first = scores->causal || scores->window_right >= 0;

  void *symbol = NULL;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &found) != cudaSuccess || !symbol)
    return "the driver has no cuTensorMapEncodeTiled: update it to one of CUDA 12";
  const sfa_map_encode encode = (sfa_map_encode)symbol;
  const int64_t n_keys_all = sfa_prefill_n_tokens(&args->k_tokens);
  const char *refused = sfa_map_rows(encode, &args->q, args->head_dim, args->n_heads, sfa_prefill_n_tokens(&args->q_tokens), job->pack,
                                     job->block_tokens, &job->q);
  if (!refused)
    refused = n_keys_all ? sfa_map_rows(encode, &args->k, args->head_dim, args->n_kv_heads, n_keys_all, 1, n_keys, &job->k) : NULL;
  if (!refused)
    refused = n_keys_all ? sfa_map_rows(encode, &args->v, args->head_dim_v, args->n_kv_heads, n_keys_all, 1, n_keys, &job->v) : NULL;
  if (refused)
    return refused;

  job->softmax_scale = scores->softmax_scale;
  job->softcap = scores->softcap;
  job->causal = scores->causal;
  job->window_left = sfa_prefill_window(scores->window_left);
  job->window_right = sfa_prefill_window(scores->window_right);
  job->n_sink_tokens = scores->n_sink_tokens > 0x3FFFFFFF ? 0x3FFFFFFF : (int32_t)scores->n_sink_tokens;
  job->sink_logit = scores->sink_logit;
  job->alibi_slopes = scores->alibi_slopes;
  job->shaped = scores->softcap != 0 || scores->alibi_slopes || !(scores->softmax_scale > 0);
  job->q_scales = args->q_scales;
  job->k_scales = args->k_scales;
  job->cu_q = args->q_tokens.cu_seqlens;
  job->cu_k = args->k_tokens.cu_seqlens;
  job->k_lens = args->k_lens;
  job->k_ends = args->k_ends;
  job->max_q = (int32_t)args->q_tokens.max_seqlen;
  job->max_k = (int32_t)args->k_tokens.max_seqlen;
  job->n_heads = args->n_heads;
  job->n_kv_heads = args->n_kv_heads;
  job->head_dim_v = args->head_dim_v;
  job->out = args->out.data;
  job->out_bf16 = args->out.dtype == SFA_BF16;
  job->out_token_stride = args->out.token_stride;
  job->out_head_stride = args->out.head_stride;
  job->lse = args->lse;
  return NULL;
}

/* Grid: tiles, kv heads, sequences; a warp a key. Codes become whole multiples of the largest scale of their tile. */
static __global__ void sfa_level_kernel(const __grid_constant__ sfa_prefill_job job, int8_t *rows, float *scales, int64_t token_stride,
                                        int64_t head_stride, int32_t dim, int32_t n_keys) {
  const int32_t sequence = (int32_t)blockIdx.z, head = (int32_t)blockIdx.y, lane = threadIdx.x & 31, first = (int32_t)blockIdx.x * n_keys;
  const int64_t first_k = job.cu_k ? job.cu_k[sequence] : (int64_t)sequence * job.max_k;
  const int32_t length = job.cu_k ? job.cu_k[sequence + 1] - (int32_t)first_k : job.k_lens ? job.k_lens[sequence] : job.max_k;
  const int32_t n = min(n_keys, length - first);
  float *scale = scales + (first_k + first) * job.n_kv_heads + head; /* of key i: n_kv_heads i behind */
  float most = 0;
  bool is_bad = false; /* a key that scores NaN with every query goes on doing so, and its tile with it */
  for (int32_t i = lane; i < n; i += 32) {
    const float own = scale[(int64_t)i * job.n_kv_heads];
    most = fmaxf(most, own);
    is_bad |= own != own;
  }
  for (int apart = 1; apart < 32; apart *= 2)
    most = fmaxf(most, __shfl_xor_sync(~0u, most, apart));
  if (__any_sync(~0u, is_bad))
    most = CUDART_NAN_F;
  for (int32_t i = (int32_t)threadIdx.x >> 5; i < n; i += (int32_t)blockDim.x >> 5) {
    const float own = scale[(int64_t)i * job.n_kv_heads];
    if (own == most)
      continue;
    const float share = own / most;
    char4 *row = (char4 *)(rows + (first_k + first + i) * token_stride + head * head_stride);
    for (int32_t u = lane; u < dim / 4; u += 32) {
      const char4 x = row[u];
      row[u] = make_char4((signed char)rintf(x.x * share), (signed char)rintf(x.y * share), (signed char)rintf(x.z * share),
                          (signed char)rintf(x.w * share));
    }
  }
  __syncthreads(); /* all have read the scales */
  for (int32_t i = threadIdx.x; i < n; i += (int32_t)blockDim.x)
    scale[(int64_t)i * job.n_kv_heads] = most;
}

const char *sfa_prefill_level(const sfa_cuda_prefill *args, int n_keys, cudaStream_t stream) {
  const int64_t n_tiles = (args->k_tokens.max_seqlen + n_keys - 1) / n_keys;
  if (n_tiles == 0)
    return NULL;
  sfa_prefill_job job;
  memset(&job, 0, sizeof job);
  job.cu_k = args->k_tokens.cu_seqlens;
  job.k_lens = args->k_lens;
  job.max_k = (int32_t)args->k_tokens.max_seqlen;
  job.n_kv_heads = args->n_kv_heads;
  const dim3 grid((unsigned)n_tiles, (unsigned)args->n_kv_heads, (unsigned)args->k_tokens.n_sequences);
  sfa_level_kernel<<<grid, 256, 0, stream>>>(job, (int8_t *)args->k.data, args->k_scales, args->k.token_stride, args->k.head_stride,
                                             args->head_dim, n_keys);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? NULL : cudaGetErrorString(error);
}

const char *sfa_cuda_prefill_run(const sfa_cuda_prefill *args, sfa_cuda_stream stream) {
  if (args->q_tokens.n_sequences == 0 || args->q_tokens.max_seqlen == 0)
    return NULL;
  switch (args->policy) {
  case SFA_POLICY_SP_BF16: return sfa_prefill_sp_bf16(args, stream);
  case SFA_POLICY_INT8: return sfa_prefill_int8(args, stream);
  case SFA_POLICY_SP_INT8: return sfa_prefill_sp_int8(args, stream);
  default: return sfa_prefill_bf16(args, stream);
  }
}
