#!/usr/bin/env bash
# symbols.sh INCLUDE_DIR CC LIBRARY.a...: every symbol that another object could see starts with sfa_; the exported ones (default visibility)
# are exactly those that include/sfa/ declares; no object keeps mutable state of its own (.data, .bss, thread-local).
. "$(dirname "$0")/rule_lib.sh"
include=$1 cc=$2
shift 2

declared=$(for header in "$include"/sfa/*.h; do echo "#include <sfa/$(basename "$header")>"; done | "$cc" -E -P -I "$include" -x c - |
  tr '\n' ' ' | grep -oP '__attribute__\(\(visibility\("default"\)\)\)[^;(]*?\K\bsfa_\w+(?=\()' | sort -u)
exported=""
count=0
for archive in "$@"; do
  while read -r object visibility section symbol; do
    [[ $section == UND ]] && continue
    count=$((count + 1))
    [[ $symbol == sfa_* ]] || fault "$object:$symbol: a global symbol that does not start with sfa_"
    [ "$visibility" != DEFAULT ] || exported+="$symbol"$'\n'
  done < <(readelf -sW "$archive" | awk '
    /^File:/ { object = $0; sub(/.*\(/, "", object); sub(/\)$/, "", object) }
    $5 == "GLOBAL" || $5 == "WEAK" { print object, $6, $7, $8 }')

  while read -r object section symbol; do
    fault "$object:$symbol: mutable state ($section); it belongs into a context, a plan or a cache"
  done < <(objdump -t "$archive" | awk '
    /:     file format/ { object = $1; sub(/:$/, "", object) }
    $0 ~ /[ \t](\.data|\.bss|\.tdata|\.tbss|\*COM\*|\.ldata|\.lbss)(\.[^ \t]*)?[ \t]/ && $0 !~ /\.data\.rel\.ro/ && $0 !~ / d +\./ {
      section = $(NF - 2); print object, section, $NF }')
done
while read -r name; do
  fault "include/sfa: $name is declared and defined nowhere"
done < <(comm -23 <(echo "$declared") <(sort -u <<<"$exported"))
while read -r name; do
  [ -z "$name" ] || fault "$name: exported, and not declared in include/sfa/"
done < <(comm -13 <(echo "$declared") <(sort -u <<<"$exported"))
rule_end symbols $count
