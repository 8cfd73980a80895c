#!/usr/bin/env bash
# layers.sh ROOT: who may include whom, read from the #include lines. The table is the map of the project (docs/ARCHITECTURE.md).
. "$(dirname "$0")/rule_lib.sh"
root=$1

# Folders of src/ that a folder may include from, beside itself, and headers of include/sfa/ that it may know.
declare -A inner=(
  [src/base]=""
  [src/kernel]="base"
  [src/backend]="base"
  [src/code]="base kernel backend"
  [src/attn]="base kernel code backend"
  [src/cache]="base backend"
  [src/cuda]="base backend"
  [src/api]="base code backend attn cache cuda"
  [src/file]="base"
  [src/text]="base file"
  [src/device]="base kernel"
  [src/model]="base file device"
  [src/engine]="base file text device model"
  [src/train]="base file text device model engine"
  [src/eval]="base file text device model engine"
  [app]="" [examples]="" [tests/oracle]="" [tests/cli]=""
  [tests/check]=any [tests/unit]=any [tests/fuzz]=any [tests/fault]=any [tests/golden]=any [tests/rules]="" [bench]=any
)
declare -A outer=(
  [src/base]="base"
  [src/kernel]="base"
  [src/backend]="base attention backward plan"
  [src/code]="base attention"
  [src/attn]="base attention backward plan"
  [src/cache]="base attention cache"
  [src/cuda]="base attention backward plan stream"
  [src/api]="base attention backward cache plan postings stream"
  [src/file]="base engine data"
  [src/text]="base engine data"
  [src/device]="base stream"
  [src/model]=any [src/engine]=any [src/eval]=any [src/train]=any [app]=any [examples]=any [tests/cli]=any
  [tests/oracle]=""
  [tests/check]=any [tests/unit]=any [tests/fuzz]=any [tests/fault]=any [tests/golden]=any [tests/rules]="" [bench]=any
)
# Other people's headers that are for one place only.
declare -A library=(
  [dnnl]="src/device/device_onednn" [cjson]="src/file/ src/text/ src/eval/ app/ tests/" [pcre2]="src/text/" [utf8proc]="src/text/" [omp]="src/base/"
  [bzlib]="src/file/" [lzma]="src/file/"
  [cublas]="src/device/device_cuda" [cuda]="src/cuda/ src/device/device_cuda src/base/cuda_ tests/ bench/"
  [immintrin]="src/kernel/ src/device/ src/base/ tests/check/"
)

allows() { # allows LIST NAME
  [ "$1" = any ] || [[ " $1 " == *" $2 "* ]]
}

count=0
while read -r file; do
  case $file in
  include/*) folder=include ;;
  tests/check/oracle* | tests/oracle/*) folder=tests/oracle ;;
  src/*/* | tests/*/*) folder=$(cut -d/ -f1-2 <<<"$file") ;;
  *) folder=${file%%/*} ;;
  esac
  count=$((count + 1))
  if [ $folder != include ] && [ -z "${inner[$folder]+known}" ]; then
    fault "$file:1: the folder $folder is not in the table of tests/rules/layers.sh"
    continue
  fi
  while IFS=: read -r line included; do
    case $included in
    \<sfa/*\>)
      header=${included#<sfa/} header=${header%.h>}
      if [ $folder = include ]; then
        [ "$header" != sfa ] || fault "$file:$line: sfa.h is for users, headers include the parts"
      else
        allows "${outer[$folder]}" "$header" || fault "$file:$line: $folder may not include <sfa/$header.h>"
      fi
      ;;
    \<*\>)
      for name in "${!library[@]}"; do
        [[ $included == "<$name"* ]] || continue
        found=no
        for place in ${library[$name]}; do [[ $file != "$place"* ]] || found=yes; done
        [ $found = yes ] || fault "$file:$line: $included is for ${library[$name]} only"
      done
      ;;
    \"*\")
      target=${included//\"/}
      case $target in
      ../* | ./* | */../*) fault "$file:$line: \"$target\": name headers from src/ on, without dots" ;;
      sfa/*) fault "$file:$line: public headers are included as <$target>" ;;
      */*)
        other=${target%%/*}
        if [ $folder = include ]; then
          fault "$file:$line: a public header includes public headers only"
        elif [ "$folder" != "src/$other" ] && ! allows "${inner[$folder]}" "$other"; then
          fault "$file:$line: $folder may not include from $other"
        elif [ "$folder/$other" = src/device/kernel ] && [[ $target != kernel/simd_* ]]; then
          fault "$file:$line: device may include kernel's simd_<isa>.h only"
        fi
        ;;
      *) # a header beside the file
        [ $folder != tests/oracle ] || [[ $target == oracle* ]] || fault "$file:$line: the oracle includes nothing of ours"
        [ -e "$root/$(dirname "$file")/$target" ] || [[ $folder == tests/* && ( -e $root/tests/oracle/$target || -e $root/tests/unit/$target ) ]] ||
          fault "$file:$line: \"$target\" is not beside the file; name it from src/ on"
        ;;
      esac
      ;;
    *) [[ $folder == tests/* || $folder == src/kernel || $folder == src/device ]] || fault "$file:$line: #include of a macro" ;;
    esac
  done < <(sed -n 's/^[ \t]*#[ \t]*include[ \t]*\(<[^>]*>\|"[^"]*"\|[A-Za-z_].*\).*/\1/;T;=;p' "$root/$file" | paste -d: - -)
done < <(tree_files "$root" '*.c' '*.h' '*.inc' '*.def' '*.cpp' '*.cu' '*.cuh')
rule_end layers $count
