/* What the processor and the operating system together offer. */
#include <sfa/base.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdbool.h>

/* clang 14 has no name for it. */
static bool has_f16c(void) {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

const char *sfa_isa_name(sfa_isa isa) {
  static const char *const names[] = {"default", "scalar", "avx2", "avx512"};
  return (unsigned)isa < sizeof names / sizeof *names ? names[isa] : "unknown";
}

sfa_isa sfa_isa_best(void) {
#if defined(__x86_64__)
  __builtin_cpu_init(); /* checks the saved register state (XCR0) as well as CPUID */
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c())
    return SFA_ISA_SCALAR;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    return SFA_ISA_AVX512;
  return SFA_ISA_AVX2;
#else
  return SFA_ISA_SCALAR;
#endif
}
