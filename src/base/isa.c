/* What the processor and the operating system together offer. */
#include <sfa/base.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdbool.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Bits of CPUID that one of our two compilers has no name for. */
enum {
  LEAF_1_ECX_F16C = 1 << 29,
  LEAF_7_EDX_AVX512_FP16 = 1 << 23,
  LEAF_7_EDX_AMX = 1 << 22 | 1 << 24 | 1 << 25, /* bf16, tiles, int8 */
  LEAF_7_1_EAX_AVX512_BF16 = 1 << 5
};

static bool has_f16c(void) {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & LEAF_1_ECX_F16C);
}

static bool has_avx512(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
}

static bool has_vbmi(void) {
  return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bitalg");
}

/* The tile registers are 8 KiB a thread, which Linux saves only for processes that ask (arch_prctl ARCH_REQ_XCOMP_PERM, state component
 * 18). The permission is the process's and stays; asking again changes nothing. */
static bool may_use_tiles(void) {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

static bool has_amx(void) {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & LEAF_7_EDX_AVX512_FP16) || (edx & LEAF_7_EDX_AMX) != LEAF_7_EDX_AMX)
    return false;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & LEAF_7_1_EAX_AVX512_BF16) && may_use_tiles();
}
#endif

const char *sfa_isa_name(sfa_isa isa) {
  static const char *const names[] = {"default", "scalar", "avx2", "avx512", "vbmi", "amx"};
  return (unsigned)isa < sizeof names / sizeof *names ? names[isa] : "unknown";
}

sfa_isa sfa_isa_best(void) {
#if defined(__x86_64__)
  __builtin_cpu_init(); /* checks the saved register state (XCR0) as well as CPUID */
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c())
    return SFA_ISA_SCALAR;
  if (!has_avx512())
    return SFA_ISA_AVX2;
  if (!has_vbmi())
    return SFA_ISA_AVX512;
  return has_amx() ? SFA_ISA_AMX : SFA_ISA_VBMI;
#else
  return SFA_ISA_SCALAR;
#endif
}
