/* cuda/cuda_sight.cuh: which queries and keys a sequence has, and which keys a query sees. */
#ifndef SFA_CUDA_SIGHT_CUH
#define SFA_CUDA_SIGHT_CUH

#include "cuda/cuda_stages.h"

/* The rows of sequence b: T queries from packed token first_q on, S keys from first_k on. Query t stands at key t + shift. */
struct sfa_extent {
  int64_t first_q, first_k;
  int32_t T, S, shift;
};
static __device__ __forceinline__ sfa_extent sfa_extent_of(const sfa_cuda_prefill &a, int b) {
  const sfa_cuda_tokens &q = a.q_tokens, &k = a.k_tokens;
  sfa_extent x;
  x.first_q = q.cu_seqlens ? q.cu_seqlens[b] : b * q.max_seqlen;
  x.first_k = k.cu_seqlens ? k.cu_seqlens[b] : b * k.max_seqlen;
  x.T = q.cu_seqlens ? q.cu_seqlens[b + 1] - (int32_t)x.first_q : (int32_t)q.max_seqlen;
  x.S = k.cu_seqlens ? k.cu_seqlens[b + 1] - (int32_t)x.first_k : a.k_lens ? a.k_lens[b] : (int32_t)k.max_seqlen;
  x.shift = (a.k_ends ? a.k_ends[b] : x.S) - x.T;
  return x;
}

/* The keys that a query at an aligned position sees: those up to `last`, and of these the sink tokens and those from `first` on. */
struct sfa_sight {
  int32_t first, last;
};
static __device__ __forceinline__ sfa_sight sfa_sight_of(const sfa_cuda_scores &s, int32_t position, int32_t n_keys) {
  sfa_sight see = {0, n_keys - 1};
  if (s.causal)
    see.last = min(see.last, position);
  if (s.window_right >= 0)
    see.last = (int32_t)min((int64_t)see.last, position + s.window_right);
  if (s.window_left >= 0)
    see.first = (int32_t)max((int64_t)0, position - s.window_left);
  return see;
}

/* Tiles of N keys that rows at positions `position` .. `position + n_rows - 1` walk: those of sink tokens, then window .. end - 1. */
struct sfa_walk {
  int32_t sinks, window, end;
};
template <int N>
static __device__ __forceinline__ sfa_walk sfa_walk_of(const sfa_cuda_scores &s, int32_t position, int32_t n_rows, int32_t n_keys) {
  const int32_t last = sfa_sight_of(s, position + n_rows - 1, n_keys).last;
  sfa_walk walk;
  walk.window = sfa_sight_of(s, position, n_keys).first / N;
  walk.end = last < 0 ? 0 : last / N + 1;
  walk.sinks = (int32_t)min((s.n_sink_tokens + N - 1) / N, (int64_t)walk.window);
  return walk;
}
static __device__ __forceinline__ int32_t sfa_walk_first(const sfa_walk &walk) { return walk.sinks > 0 ? 0 : walk.window; }
static __device__ __forceinline__ int32_t sfa_walk_next(const sfa_walk &walk, int32_t tile) {
  return tile + 1 < walk.sinks ? tile + 1 : max(tile + 1, walk.window);
}

#endif
