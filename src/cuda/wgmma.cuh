/* cuda/wgmma.cuh: matrix products of a warpgroup on sm_90a: D [64][N] += A [64][K] B [N][K]^T, asynchronously.
 *
 *     sfa_matrix_fence();                 registers of D and A are as the products shall see them
 *     sfa_product_...(d, a, b, ...);      any number
 *     sfa_matrix_commit();                closes the group
 *     sfa_matrix_wait<n>();               all but the last n groups are done: their D may be read, their A and B overwritten
 *
 * D: thread t = 32 w + 4 g + c (w 0..3, g 0..7, c 0..3) holds rows 16 w + g (d[4 i], d[4 i + 1]) and 16 w + g + 8 (d[4 i + 2],
 * d[4 i + 3]) of columns 8 i + 2 c and 8 i + 2 c + 1. A in registers: 32 bytes of a row a product, a[0] bytes 4 c.. of row 16 w + g,
 * a[1] of the row 8 below, a[2] and a[3] the same at bytes 16 + 4 c. So D rounded to bf16 pairs is an A, column block for column block.
 *
 * Operands in shared memory: sfa_operand(address, bytes to the next 8 rows): rows of 128 bytes, the 16-byte units of row r exchanged by
 * unit ^ (r % 8), as the copy engine writes them with 128-byte swizzle; 8 rows are 1,024 bytes, aligned to that. sfa_operand_at moves
 * along: by 32 bytes in a row for the next K of a row-major operand (64 for the B of a sparse product), or to another block.
 *
 * Sparse products: A has K columns of which two of each four adjacent ones are stored, e says which: 2 bits each. 16-bit: lanes c = 0
 * (groups 0..3 of K = 32) and c = 1 (4..7) hold row g in the low half word, row g + 8 in the high one, a nibble a group. 8-bit, K = 64:
 * lane c holds row g + 8 (c & 1), groups 8 (c >> 1) .. + 7. (Found by experiment; the manual draws the same.) */
#ifndef SFA_WGMMA_CUH
#define SFA_WGMMA_CUH

#include <stdint.h>

static __device__ __forceinline__ void sfa_matrix_fence(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void sfa_matrix_commit(void) { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> static __device__ __forceinline__ void sfa_matrix_wait(void) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/* An operand whose K runs along the rows: the next 8 rows follow at once. */
static __device__ __forceinline__ uint64_t sfa_operand(uint32_t at) {
  return (uint64_t)((at & 0x3FFFF) >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
/* A B operand [K][N] whose rows are those of K: blocks of 64 columns are block_bytes apart. */
static __device__ __forceinline__ uint64_t sfa_operand_turned(uint32_t at, uint32_t block_bytes) {
  return (uint64_t)((at & 0x3FFFF) >> 4) | (uint64_t)(block_bytes >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
static __device__ __forceinline__ uint64_t sfa_operand_at(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }

/* The accumulators of N = 64, 80, 128, 256: their places in the text of an instruction, and the operands behind these. */
#define SFA_PLACES_32                                                                                                                      \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define SFA_PLACES_40                                                                                                                      \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,"    \
  "%35,%36,%37,%38,%39}"
#define SFA_PLACES_64                                                                                                                      \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,"    \
  "%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define SFA_PLACES_128                                                                                                                     \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,"    \
  "%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,"   \
  "%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,"  \
  "%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,"     \
  "%127}"
#define SFA_OPERANDS_8(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define SFA_OPERANDS_32(c, d, i)                                                                                                           \
  SFA_OPERANDS_8(c, d, i), SFA_OPERANDS_8(c, d, i + 8), SFA_OPERANDS_8(c, d, i + 16), SFA_OPERANDS_8(c, d, i + 24)
#define SFA_OPERANDS_40(c, d, i) SFA_OPERANDS_32(c, d, i), SFA_OPERANDS_8(c, d, i + 32)
#define SFA_OPERANDS_64(c, d, i) SFA_OPERANDS_32(c, d, i), SFA_OPERANDS_32(c, d, i + 32)
#define SFA_OPERANDS_128(c, d, i) SFA_OPERANDS_64(c, d, i), SFA_OPERANDS_64(c, d, i + 64)

/* scores: bf16, A and B in shared memory; `add` 0 overwrites D. */
static __device__ __forceinline__ void sfa_product_bf16(float (&d)[32], uint64_t a, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SFA_PLACES_32
               ", %32, %33, p, 1, 1, 0, 0;}"
               : SFA_OPERANDS_32("+f", d, 0)
               : "l"(a), "l"(b), "r"(add));
}
static __device__ __forceinline__ void sfa_product_bf16(float (&d)[40], uint64_t a, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %42, 0;\nwgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 " SFA_PLACES_40
               ", %40, %41, p, 1, 1, 0, 0;}"
               : SFA_OPERANDS_40("+f", d, 0)
               : "l"(a), "l"(b), "r"(add));
}
static __device__ __forceinline__ void sfa_product_bf16(float (&d)[64], uint64_t a, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " SFA_PLACES_64
               ", %64, %65, p, 1, 1, 0, 0;}"
               : SFA_OPERANDS_64("+f", d, 0)
               : "l"(a), "l"(b), "r"(add));
}

/* values: bf16, A in registers, B turned; adds. */
static __device__ __forceinline__ void sfa_product_turned(float (&d)[32], const uint32_t *a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SFA_PLACES_32 ", {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
               : SFA_OPERANDS_32("+f", d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
static __device__ __forceinline__ void sfa_product_turned(float (&d)[64], const uint32_t *a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " SFA_PLACES_64 ", {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
               : SFA_OPERANDS_64("+f", d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
static __device__ __forceinline__ void sfa_product_turned(float (&d)[128], const uint32_t *a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " SFA_PLACES_128 ", {%128,%129,%130,%131}, %132, 1, 1, 1, 1;"
               : SFA_OPERANDS_128("+f", d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* scores: bf16, A and B in shared memory; D is written, whatever it was: for the compiler too, which else keeps its old value. */
static __device__ __forceinline__ void sfa_product_bf16_first(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile("{.reg .pred p; setp.ne.b64 p, %32, %32;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SFA_PLACES_32
               ", %32, %33, p, 1, 1, 0, 0;}"
               : SFA_OPERANDS_32("=f", d, 0)
               : "l"(a), "l"(b));
}

/* sums: bf16, A and B in shared memory, B turned; adds. */
static __device__ __forceinline__ void sfa_product_turned(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SFA_PLACES_32 ", %32, %33, 1, 1, 1, 0, 1;"
               : SFA_OPERANDS_32("+f", d, 0)
               : "l"(a), "l"(b));
}
static __device__ __forceinline__ void sfa_product_turned(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " SFA_PLACES_64 ", %64, %65, 1, 1, 1, 0, 1;"
               : SFA_OPERANDS_64("+f", d, 0)
               : "l"(a), "l"(b));
}

/* both operands turned, in shared memory: A [K][64], B [K][N]; adds, or (first) writes D. */
static __device__ __forceinline__ void sfa_product_both_turned(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SFA_PLACES_32 ", %32, %33, 1, 1, 1, 1, 1;"
               : SFA_OPERANDS_32("+f", d, 0)
               : "l"(a), "l"(b));
}
static __device__ __forceinline__ void sfa_product_both_turned(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " SFA_PLACES_64 ", %64, %65, 1, 1, 1, 1, 1;"
               : SFA_OPERANDS_64("+f", d, 0)
               : "l"(a), "l"(b));
}
static __device__ __forceinline__ void sfa_product_both_turned_first(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile("{.reg .pred p; setp.ne.b64 p, %32, %32;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SFA_PLACES_32
               ", %32, %33, p, 1, 1, 1, 1;}"
               : SFA_OPERANDS_32("=f", d, 0)
               : "l"(a), "l"(b));
}
static __device__ __forceinline__ void sfa_product_both_turned_first(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile("{.reg .pred p; setp.ne.b64 p, %64, %64;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " SFA_PLACES_64
               ", %64, %65, p, 1, 1, 1, 1;}"
               : SFA_OPERANDS_64("=f", d, 0)
               : "l"(a), "l"(b));
}

/* scores: int8, A and B in shared memory; `add` 0 overwrites D. */
static __device__ __forceinline__ void sfa_product_int8(int32_t (&d)[32], uint64_t a, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 " SFA_PLACES_32 ", %32, %33, p;}"
               : SFA_OPERANDS_32("+r", d, 0)
               : "l"(a), "l"(b), "r"(add));
}
static __device__ __forceinline__ void sfa_product_int8(int32_t (&d)[64], uint64_t a, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 " SFA_PLACES_64 ", %64, %65, p;}"
               : SFA_OPERANDS_64("+r", d, 0)
               : "l"(a), "l"(b), "r"(add));
}

/* scores: sparse bf16, A in shared memory or registers. */
static __device__ __forceinline__ void sfa_product_sparse(float (&d)[32], uint64_t a, uint32_t e, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %35, 0;\nwgmma.mma_async.sp.sync.aligned.m64n64k32.f32.bf16.bf16 " SFA_PLACES_32
               ", %32, %33, %34, 0, p, 1, 1, 0, 0;}"
               : SFA_OPERANDS_32("+f", d, 0)
               : "l"(a), "l"(b), "r"(e), "r"(add));
}
static __device__ __forceinline__ void sfa_product_sparse(float (&d)[40], uint64_t a, uint32_t e, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %43, 0;\nwgmma.mma_async.sp.sync.aligned.m64n80k32.f32.bf16.bf16 " SFA_PLACES_40
               ", %40, %41, %42, 0, p, 1, 1, 0, 0;}"
               : SFA_OPERANDS_40("+f", d, 0)
               : "l"(a), "l"(b), "r"(e), "r"(add));
}
static __device__ __forceinline__ void sfa_product_sparse(float (&d)[64], uint64_t a, uint32_t e, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %67, 0;\nwgmma.mma_async.sp.sync.aligned.m64n128k32.f32.bf16.bf16 " SFA_PLACES_64
               ", %64, %65, %66, 0, p, 1, 1, 0, 0;}"
               : SFA_OPERANDS_64("+f", d, 0)
               : "l"(a), "l"(b), "r"(e), "r"(add));
}
static __device__ __forceinline__ void sfa_product_sparse(float (&d)[32], const uint32_t *a, uint32_t e, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %38, 0;\nwgmma.mma_async.sp.sync.aligned.m64n64k32.f32.bf16.bf16 " SFA_PLACES_32
               ", {%32,%33,%34,%35}, %36, %37, 0, p, 1, 1, 0;}"
               : SFA_OPERANDS_32("+f", d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(e), "r"(add));
}
static __device__ __forceinline__ void sfa_product_sparse(float (&d)[64], const uint32_t *a, uint32_t e, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %70, 0;\nwgmma.mma_async.sp.sync.aligned.m64n128k32.f32.bf16.bf16 " SFA_PLACES_64
               ", {%64,%65,%66,%67}, %68, %69, 0, p, 1, 1, 0;}"
               : SFA_OPERANDS_64("+f", d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(e), "r"(add));
}

/* scores: sparse int8. */
static __device__ __forceinline__ void sfa_product_sparse(int32_t (&d)[32], uint64_t a, uint32_t e, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %35, 0;\nwgmma.mma_async.sp.sync.aligned.m64n64k64.s32.s8.s8 " SFA_PLACES_32
               ", %32, %33, %34, 0, p;}"
               : SFA_OPERANDS_32("+r", d, 0)
               : "l"(a), "l"(b), "r"(e), "r"(add));
}
static __device__ __forceinline__ void sfa_product_sparse(int32_t (&d)[64], uint64_t a, uint32_t e, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %67, 0;\nwgmma.mma_async.sp.sync.aligned.m64n128k64.s32.s8.s8 " SFA_PLACES_64
               ", %64, %65, %66, 0, p;}"
               : SFA_OPERANDS_64("+r", d, 0)
               : "l"(a), "l"(b), "r"(e), "r"(add));
}
static __device__ __forceinline__ void sfa_product_sparse(int32_t (&d)[32], const uint32_t *a, uint32_t e, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %38, 0;\nwgmma.mma_async.sp.sync.aligned.m64n64k64.s32.s8.s8 " SFA_PLACES_32
               ", {%32,%33,%34,%35}, %36, %37, 0, p;}"
               : SFA_OPERANDS_32("+r", d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(e), "r"(add));
}
static __device__ __forceinline__ void sfa_product_sparse(int32_t (&d)[64], const uint32_t *a, uint32_t e, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %70, 0;\nwgmma.mma_async.sp.sync.aligned.m64n128k64.s32.s8.s8 " SFA_PLACES_64
               ", {%64,%65,%66,%67}, %68, %69, 0, p;}"
               : SFA_OPERANDS_64("+r", d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(e), "r"(add));
}

#undef SFA_OPERANDS_128
#undef SFA_OPERANDS_64
#undef SFA_OPERANDS_40
#undef SFA_OPERANDS_32
#undef SFA_OPERANDS_8
#undef SFA_PLACES_128
#undef SFA_PLACES_64
#undef SFA_PLACES_40
#undef SFA_PLACES_32

#endif
