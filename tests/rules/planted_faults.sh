#!/usr/bin/env bash
# planted_faults.sh CC: every rule must pass a small tree that keeps it, and fail, naming the place, once a fault is planted there.
set -u
rules=$(cd "$(dirname "$0")" && pwd) cc=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0 tried=0

# expect pass|PATTERN RULE ARGUMENTS...: PATTERN is what the complaint must say.
expect() {
  local want=$1 output status
  shift
  output=$(bash "$rules/$1" "${@:2}" 2>&1)
  status=$?
  tried=$((tried + 1))
  if [ "$want" = pass ]; then
    [ $status = 0 ] && return
    echo "$1 rejects a tree that keeps the rule: $output"
  else
    [ $status = 1 ] && grep -qE "$want" <<<"$output" && return
    echo "$1 does not see a planted fault ($want), status $status: $output"
  fi
  failed=$((failed + 1))
}

# plant FILE: standard input becomes a file of the tree.
plant() {
  mkdir -p "$(dirname "$work/tree/$1")"
  cat >"$work/tree/$1"
}

fresh_tree() {
  rm -rf "$work/tree"
  plant include/sfa/base.h <<<'int sfa_base(void);'
  plant src/base/ground.h <<<'#include <sfa/base.h>'
  plant src/kernel/simd_scalar.h <<<''
  plant src/kernel/fast.c <<<'#include "base/ground.h"
/* printf("in a comment") */
const char *text = "malloc(1) in a text, a quote: \" exit(1)"; int done(void *p) { return p->free(1); }'
  plant app/main.c <<<'#include <sfa/base.h>'
}

fresh_tree
expect pass layers.sh "$work/tree"
expect pass banned_calls.sh "$work/tree"
expect pass tree_hygiene.sh "$work/tree"

# planted RULE PATTERN FILE: the tree with one more file, standard input.
planted() {
  fresh_tree
  plant "$3"
  expect "$2" "$1" "$work/tree"
}
planted layers.sh 'src/base/up.c:1: .* from kernel' src/base/up.c <<<'#include "kernel/simd_scalar.h"'
planted layers.sh 'src/kernel/wide.c:2: .*attention.h' src/kernel/wide.c <<<'
  #  include <sfa/attention.h>'
planted layers.sh 'app/peek.c:1: app may not include from base' app/peek.c <<<'#include "base/ground.h"'
planted layers.sh 'src/model/deep.c:1: .* from kernel' src/model/deep.c <<<'#include "kernel/kernel.h"'
planted layers.sh 'src/attn/store.c:1: .*cache' src/attn/store.c <<<'#include <sfa/cache.h>'
planted layers.sh 'src/attn/matrix.c:1: .*dnnl' src/attn/matrix.c <<<'#include <dnnl.h>'
planted layers.sh 'tests/check/oracle.c:1: ' tests/check/oracle.c <<<'#include <sfa/base.h>'
planted layers.sh 'src/base/dots.c:1: .*dots' src/base/dots.c <<<'#include "../kernel/simd_scalar.h"'
planted layers.sh 'include/sfa/inner.h:1: ' include/sfa/inner.h <<<'#include "base/ground.h"'
planted layers.sh 'src/extra/new.c:1: .*table' src/extra/new.c <<<''
planted layers.sh 'src/cuda/product.cu:1: .*cublas' src/cuda/product.cu <<<'#include <cublasLt.h>'
planted layers.sh 'src/device/above.cuh:1: .* from backend' src/device/above.cuh <<<'#include "backend/backend.h"'
planted banned_calls.sh 'src/attn/a.c:2: exit' src/attn/a.c <<<'/* a
*/ void stop(void) { exit(1); }'
planted banned_calls.sh 'src/attn/b.c:1: printf' src/attn/b.c <<<'void say(void) { printf("%d", 1); }'
planted banned_calls.sh 'src/attn/c.c:1: malloc' src/attn/c.c <<<'char *s = "/*"; void *p = malloc (8); /* */'
planted banned_calls.sh 'src/file/d.c:1: assert' src/file/d.c <<<'void check(int x) { assert(x); }'
planted banned_calls.sh 'src/base/e.c:1: calloc' src/base/e.c <<<'void *p(void) { return calloc(1, 8); }'
planted tree_hygiene.sh 'main.c: this name' src/attn/main.c <<<''
planted tree_hygiene.sh 'src/attn/long.c:1000: 1001 lines' src/attn/long.c < <(yes '' | head -n 1001)
planted tree_hygiene.sh 'src/attn/later.c:1: left' src/attn/later.c <<<'/* TODO: more */'
planted tree_hygiene.sh 'app/off.c:1: left' app/off.c <<<'#if 0'
planted tree_hygiene.sh 'app/mine.c:1: a path' app/mine.c <<<'const char *path = "/home/me/model";'
planted tree_hygiene.sh 'flags.cmake:1: this flag' flags.cmake <<<'add_compile_options(-march=native)'

planted doc_names.sh 'more.md:2: the link docs/none.md' more.md <<<'See [base](include/sfa/base.h)
and [none](docs/none.md).'
planted doc_names.sh 'more.md:1: there is no src/attn/gone.c' more.md <<<'Read src/attn/gone.c first.'
planted doc_names.sh 'more.md:1: there is no sfa_gone' more.md <<<'Call `sfa_gone()`.'
planted doc_names.sh 'more.h:1: no document names sfa_untold' include/sfa/more.h <<<'SFA_API int sfa_untold(void); /* sfa_told(1) */'
fresh_tree
plant more.md <<<'`sfa_base` is in [base.h](include/sfa/base.h), used by fast.c; sfa_<noun>_<verb>, `*_tmpl.c`.'
expect pass doc_names.sh "$work/tree"

# Headers: C++ keywords and missing includes.
headers() {
  fresh_tree
  plant include/sfa/more.h
  expect "$1" public_headers.sh "$work/tree/include" "$cc"
}
headers pass <<<'#include <stddef.h>
size_t sfa_more(void);'
headers 'sfa/more.h:1: not strict C11' <<<'size_t sfa_more(void);'
headers 'sfa/more.h:1: not strict C11' <<<'typedef struct sfa_more { int x; } sfa_more; static int sfa_unused(void) { return 1; }
struct sfa_more y = {1}; struct sfa_more y = {1};'
cxx=$(command -v c++ || command -v g++ || command -v clang++ || true)
if [ -n "$cxx" ]; then
  plant include/sfa/more.h <<<'int sfa_more(int class);'
  expect 'sfa/more.h:1: not C\+\+' public_headers.sh "$work/tree/include" "$cc" "$cxx"
fi

# first_program: one letter differs.
fresh_tree
plant examples/01_attention.c <<<'#include <sfa/sfa.h>
int main(void) { return 0; }'
plant include/sfa/sfa.h <<<'/* sfa
 *
 *     #include <sfa/sfa.h>
 *     int main(void) { return 0; }
 */'
expect pass first_program.sh "$work/tree"
sed -i 's/return 0/return 1/' "$work/tree/include/sfa/sfa.h"
expect 'not that of examples' first_program.sh "$work/tree"

# Libraries: compile what a rule must see in an object.
declare_public='#define SFA_API __attribute__((visibility("default")))
SFA_API int sfa_base(void);'
library() { # library FILE FLAGS...: standard input and a good object become library.a
  local file=$1
  shift
  rm -rf "$work/objects" "$work/library.a"
  mkdir -p "$work/objects"
  printf '%s\nint sfa_base(void) { return 1; }\n' "$declare_public" | "$cc" -O2 -fPIC -fvisibility=hidden -x c -c -o "$work/objects/good.c.o" -
  "$cc" -O2 -fPIC -fvisibility=hidden "$@" -x c -c -o "$work/objects/$file.o" - && ar rcs "$work/library.a" "$work"/objects/*.o
}
fresh_tree
plant include/sfa/base.h <<<"$declare_public"
constants='const int sfa_numbers[2] = {1, 2}; extern int sfa_base(void); int (*const sfa_table[1])(void) = {sfa_base};'
library table.c <<<"$constants"
expect pass symbols.sh "$work/tree/include" "$cc" "$work/library.a"
library name.c <<<'int helper(void) { return 1; }'
expect 'name.c.o:helper: a global symbol' symbols.sh "$work/tree/include" "$cc" "$work/library.a"
library state.c <<<'int sfa_next(void) { static int n; return n++; }'
expect 'state.c.o:.*\bn\b.*mutable' symbols.sh "$work/tree/include" "$cc" "$work/library.a"
library counter.c <<<'int sfa_counter = 3;'
expect 'counter.c.o:sfa_counter: mutable' symbols.sh "$work/tree/include" "$cc" "$work/library.a"
library shown.c <<<'__attribute__((visibility("default"))) int sfa_shown(void) { return 1; }'
expect 'sfa_shown: exported' symbols.sh "$work/tree/include" "$cc" "$work/library.a"
plant include/sfa/base.h <<<"$declare_public"'
SFA_API int sfa_promised(int x);'
library table.c <<<"$constants"
expect 'sfa_promised is declared' symbols.sh "$work/tree/include" "$cc" "$work/library.a"

if [ "$(uname -m)" = x86_64 ]; then
  sum='typedef float wide __attribute__((vector_size(64)));
    void sfa_sum_avx2(wide *sum, const wide *x, const wide *y) { *sum += *x * *y; }'
  library sum_avx2.c -O3 -mavx2 -mfma <<<"$sum"
  expect pass isa_leak.sh "$work/library.a"
  library sum.c -O3 -mavx2 -mfma <<<"$sum"
  expect 'sum.c.o:<sfa_sum_avx2>.*v[a-z]' isa_leak.sh "$work/library.a"
  library sum_avx2.c -O3 -mavx512f -mprefer-vector-width=512 <<<"$sum"
  expect 'sum_avx2.c.o:<sfa_sum_avx2>.*zmm' isa_leak.sh "$work/library.a"
  library sum_avx512.c -O3 -mavx512f <<<'float sfa_sum(float x) { return x * x; }'
  expect 'sum_avx512.c.o:sfa_sum: not static' isa_leak.sh "$work/library.a"
  library weak.c <<<'__attribute__((weak)) int sfa_weak(void) { return 1; }'
  expect 'weak.c.o:sfa_weak: a weak' isa_leak.sh "$work/library.a"
fi

[ $failed = 0 ] || { echo "planted_faults: $failed of $tried failed"; exit 1; }
echo "planted_faults: $tried judged as they should be"
