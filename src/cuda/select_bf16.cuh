/* cuda/select_bf16.cuh: the part of select for bf16 rows as they are (select_bf16.cu). */
#ifndef SFA_CUDA_SELECT_BF16_CUH
#define SFA_CUDA_SELECT_BF16_CUH

#include "cuda/cuda_rows.cuh"

bool sfa_select_bf16_takes(const sfa_cuda_select *args);
void sfa_select_bf16(const sfa_cuda_select *args, int64_t n_tokens, cudaStream_t stream);

#endif
