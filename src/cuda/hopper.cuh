/* cuda/hopper.cuh: the instructions of sm_90 that a warp-specialised kernel needs beside the matrix ones (wgmma.cuh): barriers in shared
 * memory, the tensor copy engine, named barriers, registers given from warpgroup to warpgroup.
 *
 * Shared memory is addressed by 32-bit addresses (sfa_shared_at). An mbarrier counts arrivals and bytes; a wait names the parity of the
 * phase it waits for: 0 the first, 1 the second, 0 the third. On a fresh barrier a wait for parity 1 passes at once. */
#ifndef SFA_HOPPER_CUH
#define SFA_HOPPER_CUH

#include <cuda.h>
#include <stdint.h>

static __device__ __forceinline__ uint32_t sfa_shared_at(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* ---- Barriers in shared memory, 8 bytes each ------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void sfa_barrier_init(uint32_t barrier, int n_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(n_arrivals) : "memory");
}
/* After all inits, before the block's __syncthreads: the copy engine sees them too. */
static __device__ __forceinline__ void sfa_barrier_publish(void) { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
static __device__ __forceinline__ void sfa_barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/* Arrives, and the phase also waits for that many bytes of the copy engine. */
static __device__ __forceinline__ void sfa_barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void sfa_barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  while (!done);
}

/* ---- Copies into shared memory --------------------------------------------------------------------------------------------------- */

/* The box of a 3D tensor map at (x, y, z); what lies outside of the tensor arrives as zeros. Counts its bytes at the barrier. */
static __device__ __forceinline__ void sfa_box_load(uint32_t to, const CUtensorMap *map, int x, int y, int z, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
               "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
               : "memory");
}
static __device__ __forceinline__ void sfa_map_prefetch(const CUtensorMap *map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* 4 bytes, by the thread itself, without waiting; sfa_copies_arrive arrives at the barrier once all of this thread's are there. */
static __device__ __forceinline__ void sfa_word_load(uint32_t to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
static __device__ __forceinline__ void sfa_copies_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

/* Between a thread's own writes to shared memory and matrix instructions or the copy engine there; then a barrier. */
static __device__ __forceinline__ void sfa_shared_publish(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* ---- Words of shared memory ------------------------------------------------------------------------------------------------------ */

static __device__ __forceinline__ uint2 sfa_shared_load2(uint32_t at) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(at) : "memory");
  return x;
}
static __device__ __forceinline__ uint32_t sfa_shared_load(uint32_t at) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
  return x;
}
static __device__ __forceinline__ void sfa_shared_store(uint32_t at, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
static __device__ __forceinline__ void sfa_shared_store2(uint32_t at, uint2 x) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(x.x), "r"(x.y) : "memory");
}
static __device__ __forceinline__ void sfa_shared_zero16(uint32_t at) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
}

/* ---- Warpgroups ------------------------------------------------------------------------------------------------------------------ */

/* Named barrier `id` (1 to 15) of n_threads: sync waits for all, arrive only counts. */
static __device__ __forceinline__ void sfa_named_sync(int id, int n_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}
static __device__ __forceinline__ void sfa_named_arrive(int id, int n_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

template <int N> static __device__ __forceinline__ void sfa_registers_release(void) {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> static __device__ __forceinline__ void sfa_registers_take(void) {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

/* ---- Arithmetic ------------------------------------------------------------------------------------------------------------------ */

/* 2^x, subnormal results as 0. */
static __device__ __forceinline__ float sfa_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/* Two f32 as bf16, `low` in the low half. */
static __device__ __forceinline__ uint32_t sfa_bf16_pair(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

#endif
