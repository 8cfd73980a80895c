/* What many tests need: a context, memory that is not zero, random rows, and an allocator that counts and refuses. */
#ifndef UNIT_TOOLS_H
#define UNIT_TOOLS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <sfa/base.h>

#include "base/rng.h"

/* n_threads 0: the processor's. */
static inline sfa_context *new_context(int32_t n_threads, sfa_isa isa) {
  sfa_context_options options = {.struct_size = sizeof options, .n_threads = n_threads, .isa = isa};
  sfa_context *ctx;
  assert_int_equal(sfa_context_create(&options, &ctx), SFA_OK);
  return ctx;
}

/* An instruction set, or the best of this machine where it lacks that. */
static inline sfa_isa isa_at_most(sfa_isa isa) { return isa < sfa_isa_best() ? isa : sfa_isa_best(); }

/* 64-byte aligned, with 64 bytes behind; all NaN: what is read must have been written. */
static inline void *memory(size_t bytes) {
  size_t whole = (bytes + 63) / 64 * 64 + 64;
  void *p = aligned_alloc(64, whole);
  assert_non_null(p);
  memset(p, 0xff, whole);
  return p;
}

static inline float *normals(uint64_t seed, int64_t n) {
  sfa_rng rng = {seed};
  float *x = memory((size_t)n * sizeof *x);
  for (int64_t i = 0; i < n; i++)
    x[i] = (float)sfa_rng_normal(&rng);
  return x;
}

/* An allocator that counts what is out, and refuses the call number `refuse` (from 1; 0: none). */
typedef struct memory_account {
  int64_t out, calls, refuse;
} memory_account;

static inline void *account_alloc(void *user, size_t bytes) {
  memory_account *a = user;
  if (++a->calls == a->refuse)
    return NULL;
  a->out++;
  return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

static inline void account_free(void *user, void *block) {
  ((memory_account *)user)->out--;
  free(block);
}

static inline sfa_context *new_counted_context(int32_t n_threads, memory_account *account) {
  sfa_allocator allocator = {account_alloc, account_free, account};
  sfa_context_options options = {.struct_size = sizeof options, .n_threads = n_threads, .allocator = &allocator};
  sfa_context *ctx;
  assert_int_equal(sfa_context_create(&options, &ctx), SFA_OK);
  return ctx;
}

#endif
