#!/usr/bin/env bash
# public_headers.sh INCLUDE_DIR CC [CXX]: each public header compiles alone, and twice in a file, as strict C11 and as C++.
. "$(dirname "$0")/rule_lib.sh"
include=$1 cc=$2 cxx=${3:-}
flags=(-pedantic -Wall -Wextra -Wshadow -Werror -fsyntax-only -I "$include")

count=0
for header in "$include"/sfa/*.h; do
  name=sfa/$(basename "$header")
  text=$(printf '#include <%s>\n#include <%s>\n' "$name" "$name")
  "$cc" -x c -std=c11 "${flags[@]}" -Wstrict-prototypes - <<<"$text" || fault "$name:1: not strict C11 on its own"
  if [ -n "$cxx" ]; then
    "$cxx" -x c++ -std=c++11 "${flags[@]}" - <<<"$text" || fault "$name:1: not C++ on its own"
  fi
  count=$((count + 1))
done
[ -n "$cxx" ] || echo "public_headers: no C++ compiler here, C++ not tried"
rule_end public_headers $count
