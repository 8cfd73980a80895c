#!/usr/bin/env bash
# first_program.sh ROOT: the program in the first comment of sfa.h is examples/01_attention.c, letter by letter (that one is compiled and run).
. "$(dirname "$0")/rule_lib.sh"
root=$1
shown=$(awk '/^ \*     #include/ { program = 1 } /^ \*\// || /^ \* [^ ]/ { if (program) exit } program { print substr($0, 8) }' "$root/include/sfa/sfa.h")
real=$(sed -n '/^#include/,$p' "$root/examples/01_attention.c")
count=$(wc -l <<<"$shown")
[ "$shown" = "$real" ] || fault "include/sfa/sfa.h:1: its program is not that of examples/01_attention.c: $(diff <(echo "$shown") <(echo "$real") | head -n 4 | tr '\n' ' ')"
rule_end first_program "$count"
