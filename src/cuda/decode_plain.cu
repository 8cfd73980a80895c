/* Decode of any stored types and sizes, one row a block, plainly: thread = key for the scores, thread = column for the values. The steps,
 * splits and parts are those of decode_stream.cuh. For what its instances leave: f32 and f16 rows, int4 values, odd sizes. */
#include "cuda/cuda_fp8.cuh"
#include "cuda/decode_call.cuh"
#include "cuda/decode_launch.h"

static __device__ __forceinline__ float element(const unsigned char *row, int32_t dtype, int32_t at) {
  switch (dtype) {
  case SFA_F32: return ((const float *)row)[at];
  case SFA_BF16: return __uint_as_float((uint32_t)((const uint16_t *)row)[at] << 16);
  case SFA_F16: return sfa_decode_half(((const uint16_t *)row)[at]);
  case SFA_I8: return (float)((const int8_t *)row)[at];
  case SFA_E4M3: return sfa_cuda_f32_from_e4m3(row[at]);
  default: return (float)((row[at >> 1] >> 4 * (at & 1) & 15) - 8);
  }
}

static __device__ __forceinline__ float row_unit(const sfa_decode_rows &scales, int32_t dtype, const unsigned char *page, int32_t token) {
  return dtype == SFA_I8 || dtype == SFA_I4 || dtype == SFA_E4M3
             ? sfa_decode_half(*(const uint16_t *)(const void *)sfa_decode_row(scales, page, token))
             : 1.f;
}

static __global__ __launch_bounds__(SFA_DECODE_THREADS) void plain_kernel(const __grid_constant__ sfa_decode_call call) {
  extern __shared__ __align__(16) float floats[];
  __shared__ float weights[SFA_DECODE_THREADS], units[SFA_DECODE_THREADS], warp_values[SFA_DECODE_WARPS];
  const sfa_cuda_store &k = call.args.k, &v = call.args.v;
  int32_t dim = call.args.head_dim, dim_v = call.args.head_dim_v, n_kept = k.format.k, self = (int32_t)threadIdx.x, warp = self / 32;
  float *q = floats, *out = q + dim;
  sfa_decode_span span = sfa_decode_span_of(call, (int32_t)blockIdx.z, (int32_t)blockIdx.y, (int32_t)blockIdx.x % call.n_row_blocks,
                                            call.args.n_keys[blockIdx.z]);
  int32_t step, end_step, split = (int32_t)blockIdx.x / call.n_row_blocks, head = span.g * call.group + span.first_row % call.group;
  sfa_decode_split_steps(span.n_steps, call.n_splits, split, &step, &end_step);
  int64_t part = (((int64_t)span.b * call.args.n_kv_heads + span.g) * call.n_rows + span.first_row) * call.n_splits + split;

  const sfa_decode_rows ids = sfa_decode_rows_of(k, k.ids, call.ids_pitch, span.b, span.g),
                        keys = sfa_decode_rows_of(k, k.values, call.key_pitch, span.b, span.g),
                        key_scales = sfa_decode_rows_of(k, k.scales, call.key_scale_pitch, span.b, span.g),
                        values = sfa_decode_rows_of(v, v.values, call.value_pitch, span.b, span.g),
                        value_scales = sfa_decode_rows_of(v, v.scales, call.value_scale_pitch, span.b, span.g);
  float m = SFA_DECODE_NOTHING, l = 0; /* l: of the thread's keys */
  sfa_decode_load_queries(call, span.b, span.g, span.first_row, 1, q);
  sfa_decode_cut_queries<0>(call, 1, q);
  for (int32_t e = self; e < dim_v; e += SFA_DECODE_THREADS)
    out[e] = 0;
  for (; step < end_step; step += SFA_DECODE_WARPS) {
    int32_t key = sfa_decode_step_token(span, step + warp) + (self & 31);
    bool sees = step + warp < end_step && sfa_decode_sees(call, span, 0, key);
    float s = -INFINITY, unit = 1;
    if (sees) {
      const unsigned char *page = sfa_decode_page(k, span.b, key), *row = sfa_decode_row(keys, page, key);
      float product = 0;
      if (n_kept) {
        const unsigned char *id = sfa_decode_row(ids, page, key);
        for (int32_t i = 0; i < n_kept; i++) {
          int32_t u = dim <= 256 ? id[i] : ((const uint16_t *)(const void *)id)[i];
          product = fmaf(element(row, k.format.dtype, i), q[min(u, dim - 1)], product);
        }
      } else {
        for (int32_t u = 0; u < dim; u++)
          product = fmaf(element(row, k.format.dtype, u), q[u], product);
      }
      product *= row_unit(key_scales, k.format.dtype, page, key);
      s = sfa_decode_bend(call, product, head, key - span.first_position);
      unit = row_unit(value_scales, v.format.dtype, sfa_decode_page(v, span.b, key), key);
    }
    float largest = sfa_decode_warp_max(s);
    __syncthreads(); /* the weights before have been used */
    if ((self & 31) == 0)
      warp_values[warp] = largest;
    __syncthreads();
    for (int w = 0; w < SFA_DECODE_WARPS; w++)
      largest = fmaxf(largest, warp_values[w]);
    float raised = fmaxf(m, largest), factor = sfa_decode_exp2(m - raised), p = sees ? sfa_decode_exp2(s - raised) : 0.f;
    m = raised;
    l = fmaf(l, factor, p);
    weights[self] = p;
    units[self] = sees ? unit : -1.f; /* -1: not seen; scales are not negative */
    __syncthreads();
    for (int32_t e = self; e < dim_v; e += SFA_DECODE_THREADS) {
      float sum = out[e] * factor;
      for (int32_t i = 0; i < SFA_DECODE_THREADS; i++) {
        if (units[i] < 0)
          continue;
        int32_t other = sfa_decode_step_token(span, step + i / 32) + (i & 31);
        float x = element(sfa_decode_row(values, sfa_decode_page(v, span.b, other), other), v.format.dtype, e);
        sum = fmaf(weights[i] * units[i], x, sum);
      }
      out[e] = sum;
    }
  }
  __syncthreads();
  l = sfa_decode_warp_sum(l);
  if ((self & 31) == 0)
    warp_values[warp] = l;
  __syncthreads();
  if (self == 0) {
    l = 0;
    for (int w = 0; w < SFA_DECODE_WARPS; w++)
      l += warp_values[w];
    call.part_sums[part] = make_float2(m, l);
  }
  for (int32_t e = self; e < dim_v; e += SFA_DECODE_THREADS)
    call.part_out[part * dim_v + e] = out[e];
}

const char *sfa_decode_plain(const sfa_decode_call *call, cudaStream_t stream) {
  size_t shared = ((size_t)call->args.head_dim + (size_t)call->args.head_dim_v) * sizeof(float);
  if (shared > 200 * 1024)
    return "head_dim and head_dim_v beyond 25600 do not fit a multiprocessor's memory: use the CPU backend";
  cudaError_t error = cudaFuncSetAttribute(plain_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
  if (error == cudaSuccess) {
    dim3 grid((unsigned)(call->n_splits * call->n_row_blocks), (unsigned)call->args.n_kv_heads, (unsigned)call->args.n_sequences);
    plain_kernel<<<grid, SFA_DECODE_THREADS, shared, stream>>>(*call);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? NULL : cudaGetErrorString(error);
}
