#!/usr/bin/env bash
# tree_hygiene.sh ROOT: unique file names, files that can be read in one sitting, nothing left to do, no path of one machine.
. "$(dirname "$0")/rule_lib.sh"
root=$1
files=$(tree_files "$root" '*.c' '*.h' '*.inc' '*.def' '*.cu' '*.cuh' '*.sh' '*.py' '*.cmake' '*.in' demo test run)

count=0
for file in $files; do
  count=$((count + 1))
  lines=$(wc -l <"$root/$file")
  [ "$lines" -le 1000 ] || fault "$file:1000: $lines lines; cut it where the subject changes (600 is the aim, 1000 the end)"
done
while read -r name; do
  fault "$name: this name is there more than once:" $(grep -E "(^|/)$name\$" <<<"$files")
done < <(sed 's|.*/||' <<<"$files" | grep -F . | sort | uniq -d) # commands without an extension go by their folder

# This folder holds the words that it looks for.
others=$(grep -v '^tests/rules/' <<<"$files" || true)
if [ -n "$others" ]; then
  while IFS= read -r hit; do
    fault "${hit%%:*}:$(cut -d: -f2 <<<"$hit"): left to do, or switched off"
  done < <(cd "$root" && grep -nwE 'TODO|FIXME|XXX|HACK|#[ ]*if 0' $others /dev/null || true)
  while IFS= read -r hit; do
    fault "${hit%%:*}:$(cut -d: -f2 <<<"$hit"): a path of one machine"
  done < <(cd "$root" && grep -nE '(^|[^A-Za-z0-9_.])/(work|home|root|opt)/' $others /dev/null || true)
  while IFS= read -r hit; do
    fault "${hit%%:*}:$(cut -d: -f2 <<<"$hit"): this flag changes results or binds the build to one machine"
  done < <(cd "$root" && grep -nE 'ffast-math|-Ofast|march=native' $(grep -E '\.cmake$' <<<"$others") CMakeLists.txt src/*/CMakeLists.txt /dev/null 2>/dev/null | grep -v '^[^:]*:[0-9]*: *#' || true)
fi
rule_end tree_hygiene $count
