#!/usr/bin/env bash
# isa_leak.sh LIBRARY.a...: no object holds instructions above the instruction set that its name says, and none offers a helper that the
# linker could pick for a lower one. foo_amx.c may use everything, foo_vbmi.c no half precision and no tiles, foo_avx512.c only the instructions of
# Skylake servers, foo_avx2.c no AVX-512, every other file no AVX at all.
. "$(dirname "$0")/rule_lib.sh"

count=0
for archive in "$@"; do
  # One line an object: name, and the first instruction of a kind that only AVX (1), AVX-512 (2), VBMI, VBMI2,
  # VNNI, BITALG (3), or AVX512-FP16, AVX512-BF16, AMX (4) have. Mnemonics of AVX begin with v.
  while read -r object level function instruction; do
    count=$((count + 1))
    case $object in
    *_amx.*) allowed=4 ;;
    *_vbmi.* | device_avx512.*) allowed=3 ;; # the latter asks for VNNI at run time
    *_avx512.*) allowed=2 ;;
    *_avx2.*) allowed=1 ;;
    *) allowed=0 ;;
    esac
    [ "$level" -le $allowed ] || fault "$object:$function: holds \"$instruction\""
  done < <(objdump -d --no-show-raw-insn "$archive" | awk '
    function report() { if (object != "") print object, level, where }
    /:     file format/ { report(); object = $1; sub(/:$/, "", object); level = 0; where = "-"; next }
    /^[0-9a-f]+ <.*>:$/ { function_name = $2; next }
    level < 4 && $2 ~ /^(tdp|tile|ldtilecfg|sttilecfg|vdpbf16|vcvtne|v[a-z0-9]*(ph|sh)$|v[a-z0-9]*ph2|v[a-z0-9]*2ph|vmovw$)/ &&
      $2 !~ /^(vcvtph2ps|vcvtps2ph)$/ { level = 4; where = function_name " " substr($0, index($0, "\t") + 1) }
    level < 3 && $2 ~ /^(vperm[it]2b|vpermb|vpmultishiftqb|vp(compress|expand)[bw]|vpsh[lr]d[vwdq]+|vpdp[a-z]*|vpopcnt[bw]|vpshufbitqmb)$/ {
      level = 3; where = function_name " " substr($0, index($0, "\t") + 1)
    }
    level < 2 && /%zmm|%k[0-7]|%[xy]mm(1[6-9]|2[0-9]|3[01])/ { level = 2; where = function_name " " substr($0, index($0, "\t") + 1) }
    level < 1 && $2 ~ /^(v[a-z]|andn$|pdep$|pext$|sarx$|shlx$|shrx$|rorx$|mulx$)/ && $2 !~ /^(verr|verw|vm)/ {
      level = 1; where = function_name " " substr($0, index($0, "\t") + 1)
    }
    END { report() }')

  while read -r object type symbol; do
    case $type in
    W | w | V | v | u) fault "$object:$symbol: a weak definition; make it static inline" ;;
    T | R | D | B)
      case $object in
      *_amx.* | *_vbmi.* | *_avx512.* | *_avx2.*)
        isa=$(grep -oE 'amx|vbmi|avx512|avx2' <<<"${object##*/}" | tail -n 1)
        [[ $symbol == *"$isa"* ]] || fault "$object:$symbol: not static, and its name does not say $isa"
        ;;
      esac
      ;;
    esac
  done < <(nm --defined-only -A "$archive" | sed -E 's/^[^:]*:([^:]*):[0-9a-f]* (.) (.*)/\1 \2 \3/')
done
rule_end isa_leak $count
