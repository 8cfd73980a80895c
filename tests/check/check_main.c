/* sfa_check: holds every kernel of every instruction set of this machine against plain C (same bits) and the oracle (the maths).
 * Exit status: 0 all passed, 1 something failed, 2 usage. */
#include "check.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
  const char *title;
  const check_entry *entries;
  bool half; /* of the 16-bit tables, which scalar and amx have; the others are of all but amx, whose table is that of vbmi */
} groups[] = {
    {"codes", check_codes_entries, false},     {"scores", check_scores_entries, false},     {"values", check_values_entries, false},
    {"keys", check_keys_entries, false},       {"postings", check_postings_entries, false}, {"drop", check_drop_entries, false},
    {"forward", check_forward_entries, false}, {"public", check_attention_entries, false},  {"backward", check_backward_entries, false},
    {"half", check_half_entries, true},        {"half", check_half_backward_entries, true}};
enum { N_GROUPS = sizeof groups / sizeof *groups };

static const char usage[] = "usage: sfa_check [--quick] [--isa scalar|avx2|avx512|vbmi|amx] [--only NAME] [--seed N] [--list] [--bench | "
                            "--bench-forms | --bench-backward]\n"
                            "  --quick     fewer cases, under a minute\n"
                            "  --isa NAME  one instruction set only\n"
                            "  --only NAME one check only, as --list names them\n"
                            "  --seed N    other random numbers (default 1)\n"
                            "  --bench     times the kernels and a whole forward instead\n"
                            "  --bench-forms  times Algorithm 1 of the paper and the inverted index beside what they stand for\n"
                            "  --bench-backward  times gradients over codes beside their dense twin\n";

int main(int argc, char **argv) {
  const char *isa_name = NULL, *only = NULL;
  uint64_t seed = 1;
  bool quick = false, list = false, bench = false, forms = false, backward = false;
  for (int i = 1; i < argc; i++) {
    const char *value = i + 1 < argc ? argv[i + 1] : NULL;
    if (!strcmp(argv[i], "--quick"))
      quick = true;
    else if (!strcmp(argv[i], "--list"))
      list = true;
    else if (!strcmp(argv[i], "--bench"))
      bench = true;
    else if (!strcmp(argv[i], "--bench-forms"))
      forms = true;
    else if (!strcmp(argv[i], "--bench-backward"))
      backward = true;
    else if (!strcmp(argv[i], "--isa") && value)
      isa_name = argv[++i];
    else if (!strcmp(argv[i], "--only") && value)
      only = argv[++i];
    else if (!strcmp(argv[i], "--seed") && value)
      seed = strtoull(argv[++i], NULL, 0);
    else {
      fputs(usage, stderr);
      return 2;
    }
  }
  if (bench)
    return check_bench(isa_name, quick);
  if (backward)
    return check_bench_backward(isa_name, quick);
  if (forms)
    return check_bench_forms(isa_name, only, quick);
  if (!list)
    printf("seed %llu\n", (unsigned long long)seed);
  int64_t n_passed = 0, n_failed = 0;
  for (sfa_isa isa = SFA_ISA_SCALAR; isa <= SFA_ISA_AMX; isa++) {
    const sfa_kernels *kernels = sfa_kernel_select(isa);
    if (!kernels || (isa_name && strcmp(isa_name, sfa_isa_name(isa))))
      continue;
    for (int g = 0; g < N_GROUPS; g++) {
      if (groups[g].half ? !sfa_half_kernel_select(isa) : isa == SFA_ISA_AMX)
        continue;
      for (const check_entry *entry = groups[g].entries; entry->fn; entry++) {
        if (list) {
          printf("%-8s %-8s %s\n", sfa_isa_name(isa), groups[g].title, entry->name);
          continue;
        }
        if (only && strcmp(only, entry->name))
          continue;
        check c = {.kernels = kernels, .plain = sfa_kernel_select(SFA_ISA_SCALAR), .rng = {seed}, .seed = seed, .quick = quick};
        c.half = sfa_half_kernel_select(isa);
        entry->fn(&c);
        printf("%-8s %-16s %lld passed, %lld failed\n", sfa_isa_name(isa), entry->name, (long long)c.n_passed, (long long)c.n_failed);
        n_passed += c.n_passed;
        n_failed += c.n_failed;
      }
    }
    if (isa < SFA_ISA_AMX && !list && (!only || !strcmp(only, "selftest"))) {
      check c = {.kernels = kernels, .plain = sfa_kernel_select(SFA_ISA_SCALAR), .rng = {seed}, .seed = seed, .quick = quick};
      check_selftest(&c);
      printf("%-8s %-16s %lld passed, %lld failed\n", sfa_isa_name(isa), "selftest", (long long)c.n_passed, (long long)c.n_failed);
      n_passed += c.n_passed;
      n_failed += c.n_failed;
    }
  }
  if (list)
    return 0;
  if (n_passed + n_failed == 0) {
    fprintf(stderr, "sfa_check: nothing to check: this machine lacks that instruction set, or no check has that name (--list)\n");
    return 2;
  }
  printf("%lld passed, %lld failed\n", (long long)n_passed, (long long)n_failed);
  return n_failed != 0;
}
