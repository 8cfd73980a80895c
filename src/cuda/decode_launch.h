/* cuda/decode_launch.h: the instances of decode's kernels. */
#ifndef SFA_CUDA_DECODE_LAUNCH_H
#define SFA_CUDA_DECODE_LAUNCH_H

#include <cuda_runtime.h>
#include <stdint.h>

typedef struct sfa_decode_call sfa_decode_call;

/* Enqueues a call. */
typedef const char *(*sfa_decode_launch)(const sfa_decode_call *call, cudaStream_t stream);

/* Instances for `rows` (1, 4 or 8) rows a block; NULL: there is none. */
/* Parts of splits: of int8 codes with K = 8 and 16, of codes with any multiple of 8, of dense keys of D = E. */
sfa_decode_launch sfa_decode_stream_k8(int32_t value_dtype, int32_t rows, int32_t head_dim_v);
sfa_decode_launch sfa_decode_stream_k16(int32_t value_dtype, int32_t rows, int32_t head_dim_v);
sfa_decode_launch sfa_decode_stream_i8(int32_t value_dtype, int32_t rows, int32_t head_dim_v);
sfa_decode_launch sfa_decode_stream_bf16(int32_t value_dtype, int32_t rows, int32_t head_dim_v);
sfa_decode_launch sfa_decode_dense_i8(int32_t value_dtype, int32_t rows, int32_t head_dim);
sfa_decode_launch sfa_decode_dense_bf16(int32_t value_dtype, int32_t rows, int32_t head_dim);
/* Calls with eps, of int8 codes with K = 8 and 16; blocks of 1 or 4 rows. Short ones, whose splits have at most SFA_DROP_SHORT keys times
 * rows of a block, leave parts; long ones are done. */
enum { SFA_DROP_BINS = 256, SFA_DROP_SHORT = 4096 };
sfa_decode_launch sfa_decode_drop_k8(int32_t value_dtype, int32_t rows, int32_t head_dim_v);
sfa_decode_launch sfa_decode_drop_k16(int32_t value_dtype, int32_t rows, int32_t head_dim_v);
/* All of these for values of e4m3: over int8 codes of K, over the other keys (K = 0: dense), and with eps. */
sfa_decode_launch sfa_decode_fp8_codes(int32_t k, int32_t rows, int32_t head_dim_v);
sfa_decode_launch sfa_decode_fp8_rows(int32_t key_dtype, int32_t k, int32_t rows, int32_t head_dim_v);
sfa_decode_launch sfa_decode_fp8_drop(int32_t k, int32_t rows, int32_t head_dim_v);

/* Parts of splits for any types and sizes whose rows fit shared memory, one row a block, on every GPU. */
const char *sfa_decode_plain(const sfa_decode_call *call, cudaStream_t stream);

#endif
