/* What the machine can do at most: streaming reads, and multiply-adds in registers. Shares of these two say how far a kernel is from the
 * best that any could do. */
#include "bench.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_THREADS = 256, READ_PASSES = 5, MULTIPLY_PASSES = 20, LINE = 64 };
static const int64_t most_read_bytes = (int64_t)1 << 30;

const char *bench_machine_name(void) {
  static char name[128];
  FILE *file = name[0] ? NULL : fopen("/proc/cpuinfo", "r");
  char line[256];
  while (file && fgets(line, sizeof line, file)) {
    const char *colon = strchr(line, ':');
    if (strncmp(line, "model name", 10) == 0 && colon) {
      snprintf(name, sizeof name, "%s", colon + 1 + strspn(colon + 1, " "));
      name[strcspn(name, "\n")] = '\0';
      break;
    }
  }
  if (file)
    fclose(file);
  return name[0] ? name : "unknown";
}

/* ---- Threads ------------------------------------------------------------------------------------------------------------------ */

typedef struct work {
  void (*run)(struct work *w);
  const uint64_t *data; /* of a reader */
  int64_t n;            /* words to read, or steps to do */
  uint64_t result;      /* keeps the loop alive */
} work;

static void *run_work(void *arg) {
  work *w = arg;
  w->run(w);
  return NULL;
}

/* Seconds that all of them take together. */
static double run_all(work *works, int64_t n) {
  pthread_t threads[MOST_THREADS];
  bool started[MOST_THREADS] = {false};
  double start = seconds_now();
  for (int64_t i = 1; i < n; i++)
    started[i] = pthread_create(&threads[i], NULL, run_work, &works[i]) == 0;
  works[0].run(&works[0]);
  for (int64_t i = 1; i < n; i++) {
    if (started[i])
      pthread_join(threads[i], NULL);
    else
      works[i].run(&works[i]);
  }
  return seconds_now() - start;
}

static int64_t thread_count(int64_t n_threads) { return n_threads < MOST_THREADS ? n_threads : MOST_THREADS; }

/* ---- Reading ------------------------------------------------------------------------------------------------------------------ */

/* Four streams at once, a line of each in turn: more than one stream keeps more of the prefetchers busy. */
static void read_words(work *w) {
  const uint64_t *at = w->data;
  int64_t quarter = w->n / 4 & ~(int64_t)(LINE / 8 - 1);
  uint64_t sum[LINE / 8] = {0};
  for (int64_t i = 0; i < quarter; i += LINE / 8)
    for (int lane = 0; lane < LINE / 8; lane++)
      sum[lane] += at[i + lane] + at[quarter + i + lane] + at[2 * quarter + i + lane] + at[3 * quarter + i + lane];
  for (int lane = 0; lane < LINE / 8; lane++)
    w->result += sum[lane];
}

double bench_read_rate(int64_t bytes, int64_t n_threads) {
  int64_t n = thread_count(n_threads), words = (bytes < most_read_bytes ? bytes : most_read_bytes) / 8 / n / 32 * 32;
  uint64_t *data = words > 0 ? bench_alloc(words * n, sizeof *data) : NULL;
  if (!data)
    return 0;
  memset(data, 1, (size_t)(words * n) * sizeof *data);
  double best = 0;
  for (int pass = 0; pass < READ_PASSES; pass++) {
    /* Short reads are repeated until they can be timed. */
    int64_t repeats = 1 + (int64_t)(1 << 25) / (words * n * 8);
    double seconds = 0;
    for (int64_t repeat = 0; repeat < repeats; repeat++) {
      work works[MOST_THREADS];
      for (int64_t i = 0; i < n; i++)
        works[i] = (work){read_words, data + i * words, words, 0};
      seconds += run_all(works, n);
    }
    double rate = (double)(words * n * 8) * (double)repeats / seconds;
    best = rate > best ? rate : best;
  }
  free(data);
  return best;
}

/* ---- Multiplying --------------------------------------------------------------------------------------------------------------- */

/* Twelve independent chains hide the latency of a fused multiply-add on two ports. */
enum { CHAINS = 12 };

static void multiply_scalar(work *w) {
  volatile float seed = 1e-3f;
  float factor = 1 - seed, sum[4 * CHAINS];
  for (int i = 0; i < 4 * CHAINS; i++)
    sum[i] = (float)i;
  for (int64_t step = 0; step < w->n; step++)
    for (int i = 0; i < 4 * CHAINS; i++)
      sum[i] = sum[i] * factor + factor;
  for (int i = 0; i < 4 * CHAINS; i++)
    w->result += (uint64_t)sum[i];
}

#if defined(__x86_64__)
/* The instructions themselves, on registers 4 to 15 with 3 as the factors, all zero: what they are called in C differs between compilers,
 * and which registers they get is the point. */
#define PRODUCT(r, n) "vfmadd231ps %%" r "3, %%" r "3, %%" r n "\n\t"
#define FOUR_PRODUCTS(r, a, b, c, d) PRODUCT(r, a) PRODUCT(r, b) PRODUCT(r, c) PRODUCT(r, d)
#define TWELVE_PRODUCTS(r)                                                                                                                 \
  FOUR_PRODUCTS(r, "4", "5", "6", "7") FOUR_PRODUCTS(r, "8", "9", "10", "11") FOUR_PRODUCTS(r, "12", "13", "14", "15")
#define REGISTERS                                                                                                                          \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

__attribute__((target("avx2,fma"))) static void multiply_avx2(work *w) {
  __asm__ volatile("vzeroall" ::: REGISTERS);
  for (int64_t step = 0; step < w->n; step++)
    __asm__ volatile(TWELVE_PRODUCTS("ymm")::: REGISTERS);
  __asm__ volatile("vzeroupper" ::: "memory");
}

__attribute__((target("avx512f"))) static void multiply_avx512(work *w) {
  __asm__ volatile("vzeroall" ::: REGISTERS);
  for (int64_t step = 0; step < w->n; step++)
    __asm__ volatile(TWELVE_PRODUCTS("zmm")::: REGISTERS);
  __asm__ volatile("vzeroupper" ::: "memory");
}
#endif

double bench_multiply_rate(sfa_isa isa, int64_t n_threads) {
  enum { STEPS = 1 << 20 };
  void (*run)(work *) = multiply_scalar;
  int lanes = 4;
#if defined(__x86_64__)
  if (isa >= SFA_ISA_AVX2) {
    run = isa >= SFA_ISA_AVX512 ? multiply_avx512 : multiply_avx2;
    lanes = isa >= SFA_ISA_AVX512 ? 16 : 8;
  }
#else
  (void)isa;
#endif
  int64_t n = thread_count(n_threads);
  double best = 0;
  for (int pass = 0; pass < MULTIPLY_PASSES; pass++) {
    work works[MOST_THREADS];
    for (int64_t i = 0; i < n; i++)
      works[i] = (work){run, NULL, STEPS, 0};
    double rate = (double)n * STEPS * CHAINS * lanes / run_all(works, n);
    best = rate > best ? rate : best;
  }
  return best;
}
