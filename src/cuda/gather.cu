/* gather: stored keys or values of pages -> rows for the tensor cores, zeros where a code has nothing. int8 and 4-bit values go to int8
 * rows as they are, with the row's scale. Lanes hold rows as in select.cu; rows beyond 256 features, and places that vectors cannot take,
 * go feature by feature. */
#include "cuda/cuda_rows.cuh"

enum { WARPS = 4, WIDE_THREADS = 128 };

SFA_DEVICE float unit_of(const sfa_cuda_store &store, int32_t sequence, int32_t head, int32_t token) {
  return has_scale(store.format.dtype) ? f32_from_f16(*stored_scale(store, sequence, head, token)) : 1.0f;
}

SFA_DEVICE int32_t id_at(const unsigned char *ids, int32_t dim, int32_t slot) {
  return dim <= 256 ? ids[slot] : ((const uint16_t *)(const void *)ids)[slot];
}

template <int L> __global__ void __launch_bounds__(32 * WARPS) gather_rows(const __grid_constant__ sfa_cuda_gather g) {
  __shared__ float spread[WARPS][32 * SLOTS];
  const int32_t warp = threadIdx.x / 32, group = threadIdx.x % 32 / L, lane = threadIdx.x % L, head = blockIdx.y, sequence = blockIdx.z;
  const int32_t D = g.store.format.dim, k = g.store.format.k, dtype = g.store.format.dtype, n_keys = g.n_keys[sequence];
  float *row = spread[warp] + group * L * SLOTS;
  for (int32_t first = (blockIdx.x * WARPS + warp) * (32 / L); first < n_keys; first += gridDim.x * WARPS * (32 / L)) {
    const bool there = first + group < n_keys;
    const int32_t token = there ? first + group : n_keys - 1;
    const unsigned char *values = stored_values(g.store, sequence, head, token);
    float v[SLOTS];
    if (k) {
#pragma unroll
      for (int j = 0; j < SLOTS; j++)
        row[j * L + lane] = 0.0f;
      __syncwarp();
      const unsigned char *ids = stored_ids(g.store, sequence, head, token);
      for (int32_t slot = lane; slot < k; slot += L)
        row[id_at(ids, D, slot)] = element_at(values, dtype, slot);
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; half++)
        take_eight(row + feature_of<L>(lane, 8 * half), SFA_F32, v + 8 * half);
      __syncwarp();
    } else
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int32_t f = feature_of<L>(lane, 8 * half);
        if (f < D)
          take_eight(values + (dtype == SFA_I4 ? f / 2 : f * bytes_of(dtype)), dtype, v + 8 * half);
        else
#pragma unroll
          for (int j = 8 * half; j < 8 * half + 8; j++)
            v[j] = 0.0f;
      }
    put_row<L>(g.rows, g.row_scales, sequence * (int32_t)g.max_keys + token, head, g.n_heads, D, lane, v,
               unit_of(g.store, sequence, head, token), is_whole(dtype), there);
  }
}

__global__ void __launch_bounds__(WIDE_THREADS) gather_wide(const __grid_constant__ sfa_cuda_gather g) {
  __shared__ uint32_t most_of_row;
  const int32_t head = blockIdx.y, sequence = blockIdx.z;
  const int32_t D = g.store.format.dim, k = g.store.format.k, dtype = g.store.format.dtype, n_keys = g.n_keys[sequence];
  const bool whole = is_whole(dtype);
  for (int32_t token = blockIdx.x; token < n_keys; token += gridDim.x) {
    const unsigned char *values = stored_values(g.store, sequence, head, token);
    const unsigned char *ids = k ? stored_ids(g.store, sequence, head, token) : NULL;
    const int32_t to = sequence * (int32_t)g.max_keys + token;
    const float unit = unit_of(g.store, sequence, head, token);
    row_rounding r = {g.rows.dtype, 0, unit, 1.0f, false};
    if (g.rows.dtype == SFA_I8 && !whole) {
      if (threadIdx.x == 0)
        most_of_row = 0;
      __syncthreads();
      uint32_t most = 0;
      for (int32_t slot = threadIdx.x; slot < (k ? k : D); slot += WIDE_THREADS)
        most = max(most, magnitude_of(__fmul_rn(element_at(values, dtype, slot), unit)));
      atomicMax(&most_of_row, most);
      __syncthreads();
      r = rounding_of(SFA_I8, most_of_row);
    }
    unsigned char *row = row_at(g.rows, to, head);
    if (k) {
      for (int32_t f = threadIdx.x; f < D; f += WIDE_THREADS)
        put_element(row, g.rows.dtype, f, 0.0f);
      __syncthreads();
    }
    for (int32_t slot = threadIdx.x; slot < (k ? k : D); slot += WIDE_THREADS) {
      const float v = element_at(values, dtype, slot);
      put_element(row, g.rows.dtype, k ? id_at(ids, D, slot) : slot,
                  g.rows.dtype == SFA_BF16 ? __fmul_rn(v, unit)
                  : whole                  ? v
                                           : stored(r, __fmul_rn(v, unit)));
    }
    if (g.rows.dtype == SFA_I8 && threadIdx.x == 0)
      g.row_scales[(int64_t)to * g.n_heads + head] = r.unit;
    __syncthreads();
  }
}

extern "C" const char *sfa_cuda_gather_run(const sfa_cuda_gather *args, sfa_cuda_stream stream) {
  if (args->n_sequences == 0 || args->n_heads == 0 || args->max_keys == 0)
    return NULL;
  const int32_t D = args->store.format.dim;
  const bool lanes = D <= WIDEST && sfa_cuda_rows_aligned(&args->rows) && (args->store.format.k || sfa_cuda_store_aligned(&args->store));
  const int64_t rows_a_block = !lanes ? 1 : WARPS * (D <= 64 ? 8 : D <= 128 ? 4 : 2);
  const int64_t n_blocks = (args->max_keys + rows_a_block - 1) / rows_a_block;
  const dim3 grid((unsigned)(n_blocks < 4096 ? n_blocks : 4096), (unsigned)args->n_heads, (unsigned)args->n_sequences);
  if (!lanes)
    gather_wide<<<grid, WIDE_THREADS, 0, stream>>>(*args);
  else if (D <= 64)
    gather_rows<4><<<grid, 32 * WARPS, 0, stream>>>(*args);
  else if (D <= 128)
    gather_rows<8><<<grid, 32 * WARPS, 0, stream>>>(*args);
  else
    gather_rows<16><<<grid, 32 * WARPS, 0, stream>>>(*args);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? NULL : cudaGetErrorString(error);
}
