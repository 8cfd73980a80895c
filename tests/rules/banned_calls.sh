#!/usr/bin/env bash
# banned_calls.sh ROOT: a library never ends its host's process, never writes to its streams, and takes memory from the context only.
. "$(dirname "$0")/rule_lib.sh"
root=$1
ends='exit|_exit|_Exit|quick_exit|abort|assert|raise|longjmp'
writes='printf|fprintf|vprintf|vfprintf|dprintf|puts|fputs|putchar|putc|fputc|perror'
memory='malloc|calloc|realloc|reallocarray|free|aligned_alloc|posix_memalign|memalign|strdup|strndup|asprintf|vasprintf|alloca'
unsafe='strcpy|strcat|sprintf|vsprintf|gets|strtok|system|setlocale|getenv|rand|srand'

count=0
while read -r file; do
  count=$((count + 1))
  names="$ends|$writes|$unsafe"
  [ "$file" = src/base/context.c ] || names="$names|$memory"
  while IFS=: read -r line text; do
    # A member or pointer of that name (allocator.free) is the injected one.
    call=$(grep -oP '(?<![\w.>])('"$names"')\s*\(' <<<"$text" | head -n 1)
    fault "$file:$line: $call) must not be called here (CONTRIBUTING.md)"
  done < <(code_lines "$root/$file" | grep -P '(?<![\w.>])('"$names"')\s*\(' || true)
done < <(tree_files "$root" '*.c' '*.h' '*.inc' '*.def' '*.cu' '*.cuh' | grep '^src/' || true)
rule_end banned_calls $count
