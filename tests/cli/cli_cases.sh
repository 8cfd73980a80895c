#!/usr/bin/env bash
# cli_cases.sh SUBJECT SFA JSON_GET ROOT: runs the command for good and for bad uses. A bad use exits with its status (2 usage, 1 failure),
# leaves stdout empty and says why in one line of stderr that begins with "sfa: ".
set -u
subject=$1 sfa=$2 json_get=$3 root=$4
here=$root/tests/cli
story=$root/tests/golden/models/stories260K/stories260K.bin
book=$root/examples/data/the_time_machine.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export XDG_CACHE_HOME=$work/cache # costs that the user keeps are of no concern here
export LC_ALL=C                   # nor how the user writes numbers
unset SFA_PYTHON SFA_COMMIT
faults=0 checks=0

fault() {
  echo "FAULT: $*"
  faults=$((faults + 1))
}
# equal WHAT SEEN WANTED
equal() {
  checks=$((checks + 1))
  [ "$2" = "$3" ] || fault "$1: \"$2\", not \"$3\""
}
# skip WHY: this machine cannot run the subject
skip() {
  echo "cli_$subject skipped: $1"
  exit 77
}
# holds WHAT ARITHMETIC: an awk condition
holds() {
  checks=$((checks + 1))
  awk "BEGIN { exit !($2) }" || fault "$1: $2 does not hold"
}
# run ARGUMENTS...: $status, $out, $err
run() {
  "$sfa" "$@" >"$work/out" 2>"$work/err" </dev/null
  status=$?
  out=$(cat "$work/out") err=$(cat "$work/err")
}
# good ARGUMENTS...: must succeed
good() {
  run "$@"
  checks=$((checks + 1))
  [ $status = 0 ] || fault "sfa $*: exit $status: $err"
}
# bad STATUS PATTERN ARGUMENTS...: must fail like this
bad() {
  local wanted=$1 pattern=$2
  shift 2
  run "$@"
  checks=$((checks + 1))
  [ $status = "$wanted" ] || fault "sfa $*: exit $status, not $wanted: $err"
  [ -z "$out" ] || fault "sfa $*: writes to stdout: $out"
  [ "$(wc -l <"$work/err")" = 1 ] || fault "sfa $*: not one line on stderr: $err"
  [[ $err == "sfa: "* ]] || fault "sfa $*: stderr does not begin with sfa: $err"
  [[ $err =~ $pattern ]] || fault "sfa $*: \"$err\" does not tell of \"$pattern\""
}
# get PATH...: members of the JSON on the last run's stdout
get() { "$json_get" "$@" <"$work/out" || echo "absent"; }

case_help() {
  good --help
  for verb in generate chat index info tokenize plan bench eval demo; do
    [[ $out == *"  $verb"* ]] || fault "help does not list $verb"
  done
  good --version
  equal version "$out" "sfa $(sed -n 's/^project(sfa VERSION \([0-9.]*\).*/\1/p' "$root/CMakeLists.txt")"
  good --help
  mapfile -t verbs < <(awk -F '  +' '/^  [a-z]/ { print $2 }' <<<"$out")
  holds "verbs with a help" "${#verbs[@]} >= 30"
  for verb in "${verbs[@]}" bench eval; do
    # shellcheck disable=SC2086
    good $verb --help
    [[ $out == "usage: sfa ${verb%% *}"* ]] || fault "$verb --help: $out"
    equal "$verb --help on stderr" "$err" ""
    holds "$verb --help: longest line" "$(awk '{ if (length($0) > n) n = length($0) } END { print n + 0 }' "$work/out") <= 100"
  done
  good bench attention --help
  [[ $out == *"|sp-int8"$'\n'* ]] || fault "bench attention --help cuts the policies short"
  good generate --help
  for option in model prompt file n-predict context threads temp top-k top-p min-p repeat-penalty seed tokenizer raw attention sfa-k sfa-kq \
    sfa-layers cache-k cache-v policy weights chunk json; do
    [[ $out == *"--$option "* || $out == *"--$option"$'\n'* ]] || fault "generate --help does not tell of --$option"
  done
}

case_usage() {
  bad 2 "which verb" 
  bad 2 "did you mean generate" generat
  bad 2 "no verb \"frobnicate\"" frobnicate
  bad 2 "sfa bench attention\|backward\|decode\|topk\|model" bench
  bad 2 "sfa bench attention\|backward\|decode\|topk\|model" bench all
  bad 2 "sfa eval nll" eval perplexity
  bad 2 "wants a model" generate -p hello
  bad 2 "wants a model" info
  bad 2 "did you mean --temp" generate -m "$story" --tmp 1
  bad 2 "knows no option -x" generate -x
  bad 2 "knows no option --sfa-k" tokenize --sfa-k 3
  bad 2 "wants a value: PATH" generate -m
  bad 2 "wants a value: PATH" generate -m -p hello
  bad 2 "takes no value" generate --json=yes
  bad 2 "takes options only, not \"hello\"; a text is given with -p" generate -m "$story" hello
  bad 2 "takes options only, not \"recipe.json\"; each value has a name, see sfa train --help" train recipe.json
  bad 2 "wants a text" generate -m "$story"
  bad 2 "not both" tokenize -m "$story" -p a -f b
  bad 2 "wants a file" index
  bad 2 "knows no option --frob" index --frob
  bad 2 "prompt is empty" generate -m "$story" -p ""
  bad 2 "--n-predict cannot be \"0\"" generate -m "$story" -p a -n 0
  bad 2 "--n-predict cannot be \"1x\"" generate -m "$story" -p a -n 1x
  bad 2 "--n-predict cannot be \"\"" generate -m "$story" -p a -n ""
  bad 2 "--n-predict cannot be \"99999999999999999999\"" generate -m "$story" -p a -n 99999999999999999999
  bad 2 "--threads cannot be \"0\"" generate -m "$story" -p a -t 0
  bad 2 "--temp cannot be \"-1\"" generate -m "$story" -p a --temp -1
  bad 2 "--temp cannot be \"nan\"" generate -m "$story" -p a --temp nan
  bad 2 "--top-p cannot be \"1.5\"" generate -m "$story" -p a --top-p 1.5
  bad 2 "--attention cannot be \"spare\"; it takes dense\|sfa" generate -m "$story" -p a --attention spare
  bad 2 "--sfa-k cannot be \"0\"" generate -m "$story" -p a --sfa-k 0
  bad 2 "--sfa-kq cannot be \"some\"" generate -m "$story" -p a --sfa-kq some
  bad 2 "--sfa-layers cannot be \"1,x\"" generate -m "$story" -p a --sfa-layers 1,x
  bad 2 "--sfa-layers cannot be \"3-1\"" generate -m "$story" -p a --sfa-layers 3-1
  bad 2 "layers are 0 to 4" generate -m "$story" -p a --sfa-layers 2,5
  bad 2 "exclude each other" generate -m "$story" -p a --attention dense --sfa-k 4
  bad 2 "--cache-k cannot be \"int4\"" generate -m "$story" -p a --cache-k int4
  bad 2 "--policy cannot be \"int4\"; it takes auto\|tiles" generate -m "$story" -p a --policy int4
  bad 2 "policy is 6, postings" generate -m "$story" -p a --policy postings
  bad 1 "tensor cores of a GPU" generate -m "$story" -p a --policy sp-int8
  bad 2 "--cache-k cannot be \"fp8\"" generate -m "$story" -p a --cache-k fp8
  bad 2 "--weights cannot be \"int4\"" generate -m "$story" -p a --weights int4
  bad 2 "chat template" generate -m "$story" -p a --system "be brief"
  bad 2 "more than the 512" generate -m "$story" -p a -c 513
  bad 2 "wants a text or token ids" eval nll -m "$story"
  bad 2 "not both" eval nll -m "$story" -f "$book" --tokens 1,2
  bad 2 "--tokens cannot be \"1,,2\"" eval nll -m "$story" --tokens 1,,2
  bad 2 "vocabulary of 512" eval nll -m "$story" --tokens 1,512
  bad 2 "unscored" eval nll -m "$story" --tokens 1,2,3 -c 2 --stride 3
  bad 2 "wants a model or a tokenizer" tokenize -p a
  bad 2 "multiple of 8" bench attention --head-dim 12 --k 4
  bad 2 "more features than --head-dim 8" bench attention --head-dim 8 --k 16
  bad 2 "--isa cannot be \"sse\"" bench attention --isa sse
  bad 2 "--causal cannot be \"2\"" bench attention --causal=2
  bad 2 "dense twin" bench attention --k 0
  bad 2 "knows no option --v-type" bench attention --v-type int8
  bad 2 "more features than --head-dim 64" bench decode --head-dim 64 --k 65
  bad 2 "multiples of 8" bench decode --head-dim 64 --head-dim-v 12
  bad 2 "not a multiple of --kv-heads 2" bench decode --heads 3 --kv-heads 2
  bad 2 "shortest of 4 sequences has 2 tokens" bench decode --n 8 --batch 4 --n-q 3
  bad 2 "--eps cannot be \"0.6\"" bench decode --eps 0.6
  bad 2 "too many" bench decode --k 1,2,3,4,5,6,7,8
  bad 2 "not from 1 to --head-dim 16" bench topk --head-dim 16 --k 17
  bad 2 "wants a model" bench model
  bad 2 "more than the 512 tokens" bench model -m "$story" --depth 513
  bad 2 "leaves no prompt" bench model -m "$story" --depth 8 --steps 8
  bad 2 "at most 4 depths" bench model -m "$story" --depth 16,17,18,19,20
  bad 2 "wants a text" demo -m "$story"
}

case_model() {
  bad 1 "nothing.gguf" generate -m "$work/nothing.gguf" -p a
  bad 1 "." generate -m "$work" -p a
  bad 1 "nothing.txt" generate -m "$story" -f "$work/nothing.txt"
  bad 1 "nothing.json" generate -m "$story" -p a --tokenizer "$work/nothing.json"
  echo "this is no model" >"$work/words.gguf"
  bad 1 "words.gguf" info -m "$work/words.gguf"
  : >"$work/empty.bin"
  bad 1 "empty.bin" info -m "$work/empty.bin"
  head -c 1000 "$story" >"$work/cut.bin"
  bad 1 "cut.bin" info -m "$work/cut.bin"
  cp "$story" "$work/alone.bin"
  good info -m "$work/alone.bin" --json
  bad 1 "no tokenizer" generate -m "$work/alone.bin" -p a
  good generate -m "$work/alone.bin" --tokenizer "$(dirname "$story")/tok512.bin" -p a -n 1
  good eval nll -m "$work/alone.bin" --tokens 1,403,407
}

case_generate() {
  local reference prompt="Once upon a time" text again
  reference=$(cat "$here/stories260K_greedy.txt")
  good generate -m "$story" -p "$prompt" -n 195 --temp 0
  equal "greedy text" "$prompt$out" "$reference"
  equal "lines on stderr" "$(wc -l <"$work/err")" 1
  [[ $err =~ prefill\ 5\ tokens,.*decode\ 194\ tokens,.*attention.*KV\ cache ]] || fault "the closing line tells: $err"
  # What must not change the text.
  for change in "-t 1" "-t 2" "--chunk 1" "--chunk 3" "--isa scalar" "--sfa-k 8" "--policy tiles" "--policy keys --chunk 4" "--attention sfa --sfa-k 8 --sfa-kq all --cache-k f32"; do
    # shellcheck disable=SC2086
    good generate -m "$story" -p "$prompt" -n 60 --temp 0 $change
    [ "$out" = "${reference:${#prompt}:${#out}}" ] || fault "generate $change: $out"
  done
  # From a file, from standard input.
  printf %s "$prompt" >"$work/prompt.txt"
  good generate -m "$story" -f "$work/prompt.txt" -n 20 --temp 0
  text=$out
  again=$("$sfa" generate -m "$story" -f - -n 20 --temp 0 <"$work/prompt.txt" 2>"$work/err")
  equal "text from stdin" "$again" "$text"
  # Seeds.
  good generate -m "$story" -p "$prompt" -n 40 --seed 7
  text=$out
  good generate -m "$story" -p "$prompt" -n 40 --seed 7 -t 1
  equal "the same seed" "$out" "$text"
  good generate -m "$story" -p "$prompt" -n 40 --seed 8
  [ "$out" != "$text" ] || fault "seeds 7 and 8 give the same text"
  # JSON.
  good generate -m "$story" -p "$prompt" -n 20 --temp 0 --json
  equal "JSON members" "$(get keys)" "ids text stop prompt_tokens seed stats"
  equal "ids" "$(get ids.#)" 20
  equal "stop" "$(get stop)" length
  equal "prompt tokens" "$(get prompt_tokens)" 5
  holds "KV bytes" "$(get stats.kv_bytes) > 0"
  equal "stderr with --json" "$err" ""
  text=$(get text)
  good generate -m "$story" -p "$prompt" -n 20 --temp 0
  equal "text in JSON" "$text" "$out"
  # Sparse attention that does lose something says other things.
  good generate -m "$story" -p "$prompt" -n 60 --temp 0 --sfa-k 1
  [ "$out" != "${reference:${#prompt}:${#out}}" ] || fault "k = 1 changes nothing"
  good generate -m "$story" -p "$prompt" -n 8 --sfa-k 2 --sfa-kq all --sfa-layers 0,2-4 --cache-v int8 --repeat-penalty 1.1 --min-p 0.1
  # The context.
  good generate -m "$story" -p "$prompt" -c 20 --temp 0 --json
  equal "stop at the context" "$(get stop) $(get ids.#)" "length 15"
  bad 1 "the context only 5" generate -m "$story" -p "$prompt" -c 5
  bad 1 "at most -n 15" generate -m "$story" -p "$prompt" -c 20 -n 16
  bad 1 "the context only 512" generate -m "$story" -f "$book"
}

# prefill_of: tokens that the last run with --json read, of the prompt's
prefill_of() { get stats.prefill_tokens prompt_tokens | paste -sd ' '; }

case_index() {
  local index=$work/book.index docs=$work/docs ids=$work/ids n question="What did Lily see?"
  mkdir -p "$docs/src/.git" "$docs/.cache"
  printf 'Once upon a time, there was a little girl named Lily.' >"$docs/a.txt"
  printf 'int main(void) { return 0; }\n' >"$docs/src/main.c"
  printf 'One day, she saw a big, red ball.\n' >"$docs/z.txt"
  printf 'not text\0' >"$docs/data.bin"
  printf 'hidden' >"$docs/.hidden"
  : >"$docs/empty"
  ln -s ../prompt.txt "$docs/link"
  ln -s . "$docs/round"
  # A folder: its files in order, the rest counted.
  local ask=(generate -m "$story" -n 30 --temp 0)
  good "${ask[@]}" -f "$docs" -p "$question"
  [[ $err == "[3 files, "*"; left out: 3 hidden, 1 binary, 1 empty, 2 links]"* ]] || fault "what a folder gave: $err"
  # The same answer without an index, while it is made, and from it.
  for choice in "" "--sfa-k 2" "--sfa-k 3 --sfa-kq all --cache-v int8"; do
    rm -f "$index"
    # shellcheck disable=SC2086
    good "${ask[@]}" -f "$docs" -p "$question" --json $choice
    get ids >"$ids" && n=$(get prompt_tokens)
    equal "read without an index" "$(prefill_of)" "$n $n"
    # shellcheck disable=SC2086
    good "${ask[@]}" -f "$docs" -p "$question" --json --index "$index" $choice
    equal "ids while the index is made" "$(get ids)" "$(cat "$ids")"
    equal "read to make it" "$(prefill_of)" "$n $n"
    for from in "$docs" ""; do
      # shellcheck disable=SC2086
      good "${ask[@]}" ${from:+-f "$from"} -p "$question" --json --index "$index" $choice
      equal "ids from the index" "$(get ids)" "$(cat "$ids")"
      holds "only the question is read" "$(get stats.prefill_tokens) < 20 && $(get prompt_tokens) == $n && $(get stats.index_bytes) > 0"
    done
  done
  # No question: the text goes on.
  good "${ask[@]}" -f "$docs" --json
  get ids >"$ids"
  rm -f "$index"
  for i in 1 2; do
    good "${ask[@]}" -f "$docs" --json --index "$index"
    equal "ids without a question, $i" "$(get ids)" "$(cat "$ids")"
  done
  equal "nothing is read again" "$(get stats.prefill_tokens stats.decode_tokens | paste -sd ' ')" "0 30"
  # What it tells of itself.
  good index "$index" --verify --json
  equal "sources" "$(get sources.0.name sources.1.name sources.2.name sources.# | paste -sd ' ')" "a.txt src/main.c z.txt 3"
  equal "tokens" "$(get tokens)" "$(($(get sources.2.first_token) + $(get sources.2.tokens)))"
  equal "verified" "$(get verified)" true
  good index "$index"
  [[ $out == *"a.txt"* && $out == *"dense"* ]] || fault "index: $out"
  # New files at the end are appended; other changes are refused, and change nothing.
  printf 'The end.' >"$docs/zz.txt"
  good "${ask[@]}" -f "$docs" -p "$question" --json
  get ids >"$ids"
  good "${ask[@]}" -f "$docs" -p "$question" --json --index "$index"
  equal "ids after the folder has grown" "$(get ids)" "$(cat "$ids")"
  holds "only what is new is read" "$(get stats.prefill_tokens) < 45"
  cp "$index" "$work/before"
  printf 'Between.' >"$docs/b.txt"
  bad 1 "made of another text.*part in src/main.c" "${ask[@]}" -f "$docs" -p "$question" --index "$index" --json
  bad 1 "kept features" "${ask[@]}" -p "$question" --index "$index" --sfa-k 2
  bad 1 "int8" "${ask[@]}" -p "$question" --index "$index" --cache-v int8
  bad 1 "the context only 50" "${ask[@]}" -c 50 -p "$question" --index "$index"
  cp "$story" "$work/other.bin"
  printf '\1' | dd of="$work/other.bin" bs=1 seek=29 conv=notrunc status=none
  bad 1 "another model" generate -m "$work/other.bin" --tokenizer "$(dirname "$story")/tok512.bin" -n 3 -p "$question" --index "$index"
  cmp -s "$index" "$work/before" || fault "a refused use has changed the index"
  # A file that has grown.
  printf 'Lily had a ball.\nIt was red.\n' >"$work/book" && rm -f "$index"
  good "${ask[@]}" -f "$work/book" --json --index "$index"
  printf 'She lost it in the park.\n' >>"$work/book"
  good "${ask[@]}" -f "$work/book" --json
  get ids >"$ids"
  good "${ask[@]}" -f "$work/book" --json --index "$index"
  equal "ids after the file has grown" "$(get ids)" "$(cat "$ids")"
  good "${ask[@]}" --json --index "$index"
  equal "ids without it" "$(get ids)" "$(cat "$ids")"
  # Files that are none, or no longer.
  bad 1 "no index" "${ask[@]}" -p "$question" --index "$work/nothing"
  bad 1 "not a document index" "${ask[@]}" -f "$docs" --index "$docs/a.txt" --json
  head -c 20000 "$index" >"$work/cut"
  bad 1 "cut short" "${ask[@]}" -p "$question" --index "$work/cut"
  bad 1 "cut short" index "$work/cut"
  bad 1 "not a regular file" index "$docs"
  : >"$work/empty"
  bad 1 "it is empty" index "$work/empty"
  good "${ask[@]}" -f "$docs" --index "$work/empty"
  good index "$work/empty" --verify
  n=$(wc -c <"$work/empty")
  printf 'x' | dd of="$work/empty" bs=1 seek=$((n - 100)) conv=notrunc status=none
  bad 1 "is damaged: layer 4 of tokens" index "$work/empty" --verify
  bad 1 "is damaged" "${ask[@]}" -p "$question" --index "$work/empty" --verify
  good "${ask[@]}" -p "$question" --index "$work/empty" # opens without a look at the pages
  good "${ask[@]}" -p "$question" --index "$index" --verify
  bad 2 "give --index FILE" "${ask[@]}" -p "$question" --verify
  rm -rf "$docs"/*.txt "$docs/src"
  bad 1 "holds no text; left out" "${ask[@]}" -f "$docs"
}

# A reader that knows docs/LAYOUTS.md alone finds what the command tells, and in layer 0, whose keys and values do not depend on how attention
# is computed, the rows of a dense f32 index in one of int8 codes and values.
case_index_reader() {
  command -v python3 >"$work/which" || skip "no python3 here"
  local reader=$root/tools/read_index.py which
  printf 'Once upon a time, there was a little girl named Lily. She loved to play outside in the park.' >"$work/a.txt"
  printf ' One day, she saw a big, red ball. She wanted to play with it, but it was too high for her to reach.' >"$work/b.txt"
  cat "$work/a.txt" "$work/b.txt" >"$work/both.txt"
  for which in "dense:--cache-k f32" "codes:--sfa-k 3 --cache-v int8" "fp8:--sfa-k 3 --cache-v fp8" "mixed:--sfa-k 2 --sfa-layers 1,4 --cache-k f16 --cache-v bf16"; do
    # shellcheck disable=SC2086
    good generate -m "$story" -f "$work/both.txt" --index "$work/${which%%:*}" -n 1 ${which#*:}
    good index "$work/${which%%:*}" --json
    cp "$work/out" "$work/told"
    python3 "$reader" "$work/${which%%:*}" --row 0 2 41 >"$work/out" 2>"$work/err"
    equal "the second reader's exit for ${which%%:*}: $(cat "$work/err")" $? 0
    for member in model fingerprint tokens bytes segments commits layers kv_heads head_dim k k_q sources; do
      equal "$member of ${which%%:*}" "$(get $member)" "$("$json_get" $member <"$work/told")"
    done
    cp "$work/out" "$work/${which%%:*}.json"
  done
  holds "ids" "$(get ids.#) == $(get tokens)"
  python3 - "$work/dense.json" "$work/codes.json" <<'END' || fault "the rows of int8 codes are not those of f32"
import json, sys
dense, codes = (json.load(open(path)) for path in sys.argv[1:])
top = sorted(range(8), key=lambda i: (-abs(dense["key"][i]), i))[:3]
assert {i for i, x in enumerate(codes["key"]) if x} == set(top), (dense["key"], codes["key"])
for name, kept in (("key", top), ("value", range(8))):
    step = max(abs(x) for x in dense[name]) / 127
    assert 0 < step and all(abs(dense[name][i] - codes[name][i]) <= 0.51 * step for i in kept), (dense[name], codes[name])
END
  python3 - "$work/dense.json" "$work/fp8.json" <<'END' || fault "the rows of fp8 values are not those of f32"
import json, sys
dense, fp8 = (json.load(open(path))["value"] for path in sys.argv[1:])
largest = max(map(abs, dense))
assert 0 < largest and all(abs(x - y) <= max(2**-4 * abs(x), 2**-17 * largest) for x, y in zip(dense, fp8)), (dense, fp8)
assert any(x != y for x, y in zip(dense, fp8))
END
  # What it finds damaged.
  python3 - "$work/codes" "$work/bad" <<'END'
import sys
data = bytearray(open(sys.argv[1], "rb").read())
data[-200] ^= 1
open(sys.argv[2], "wb").write(data)
END
  python3 "$reader" "$work/bad" >"$work/out" 2>"$work/err"
  equal "the second reader's exit for a damaged file" $? 1
}

case_chat() {
  bad 1 "no chat template" chat -m "$story"
}

case_tokenize() {
  good tokenize -m "$story" -p "Once upon a time" --json
  equal "ids" "$(get ids)" "[1,403,407,261,378]"
  good tokenize -m "$story" -p "Once upon a time" --json --no-special
  equal "ids without special tokens" "$(get ids)" "[403,407,261,378]"
  good tokenize --tokenizer "$(dirname "$story")/tok512.bin" -p "Once upon a time" --no-special
  equal "lines" "$(wc -l <"$work/out")" 5
  good tokenize -m "$story" -p "" --json --no-special
  equal "no text, no ids" "$(get ids)" "[]"
  good tokenize -m "$story" -f "$book" --json
  holds "tokens of the book" "$(get ids.#) > 50000"
  printf '\xff\xfe' >"$work/bytes"
  good tokenize -m "$story" -f "$work/bytes" --json
}

case_info() {
  good info -m "$story" --json
  equal "shape" "$(get family n_layers n_heads n_kv_heads head_dim hidden_dim vocab_size context_len | tr '\n' ' ')" "llama 5 8 4 8 64 512 512 "
  equal "dense first" "$(get kv_cache.0.attention)" dense
  good info -m "$story" --tensors
  equal "tensors listed" "$(grep -c 'layers\.' "$work/out")" 45
  good info -m "$story" --json --tensors
  equal "tensors" "$(get tensors.#)" "$(get n_tensors)"
  good info --devices
  holds "a line of the processor" "$(grep -cE '^cpu +[a-z0-9]+, [0-9]+ threads$' "$work/out") == 1"
  holds "lines of GPUs, or why there are none" "$(grep -cE '^cuda:[0-9]|^cuda +none: .+' "$work/out") >= 1"
  good info --devices --json
  holds "GPUs, or why there are none" "$(get cuda.devices.#) > 0 || $(get cuda.why | wc -c) > 20"
  SFA_CUDA_LIBRARY=$work/none.so good info --devices
  holds "a library that is not there is named" "$(grep -c "none: $work/none.so" "$work/out") == 1"
  SFA_CUDA_LIBRARY=$work/none.so bad 1 "none.so" generate -m "$story" -p x --device cuda
}

case_eval() {
  local ids mean all
  ids=$(cat "$here/stories260K_greedy_ids.txt")
  good eval nll -m "$story" --tokens "$ids" --json
  equal "members" "$(get keys)" "nll argmax mean"
  equal "sizes" "$(get nll.# argmax.# | tr '\n' ' ')" "199 200 "
  mean=$(get mean)
  holds "mean against the reference" "($mean - 0.4751923848) ^ 2 < 1e-8"
  # The greedy text is what the model says itself: token i + 1 is the likeliest after i, from the last of the prompt on.
  equal "argmax" "$(get argmax | tr -d '[]' | cut -d, -f5-199)" "$(cut -d, -f6-200 <<<"$ids")"
  all=$(get nll)
  for change in "-t 1" "-t 2" "--chunk 1" "--chunk 7" "--sfa-k 8" "--isa scalar"; do
    # shellcheck disable=SC2086
    good eval nll -m "$story" --tokens "$ids" --json $change
    equal "nll with $change" "$(get nll)" "$all"
  done
  good eval nll -m "$story" --tokens 1 --json
  equal "one token" "$(get nll.# argmax.# mean | tr '\n' ' ')" "0 1 null "
  # Windows: the first is as without, each token is scored once.
  good eval nll -m "$story" --tokens "$ids" --json -c 50
  equal "sizes in windows" "$(get nll.# argmax.# | tr '\n' ' ')" "199 200 "
  equal "first window" "$(get nll | cut -d, -f1-50)" "$(cut -d, -f1-50 <<<"$all")"
  holds "less context, more loss" "$(get mean) > $mean"
  good eval nll -m "$story" --tokens "$ids" --json -c 50 --stride 1
  equal "sizes at stride 1" "$(get nll.# argmax.# | tr '\n' ' ')" "199 200 "
  # A text: BOS in front, so that its first token is scored too.
  printf 'Once upon a time' >"$work/text"
  good eval nll -m "$story" -f "$work/text" --json
  equal "a text" "$(get nll.# argmax.# | tr '\n' ' ')" "4 5 "
  good eval nll -m "$story" -f "$work/text"
  [[ $out == *"perplexity"* ]] || fault "table: $out"
  good eval nll -m "$story" --tokens "$ids" --json --sfa-k 2
  holds "k = 2 of 8 loses" "$(get mean) > $mean + 0.01"
}

case_eval_task() {
  local golden=$root/tests/golden/eval model=$root/tests/golden/eval/model task
  for task in hellaswag piqa arc_easy arc_challenge winogrande openbookqa lambada pubmedqa scitldr; do
    good eval $task -m "$model" -f "$golden/$task.jsonl" --limit 2 -n 4
    [[ $out == *"$task, "* ]] || fault "table of $task: $out"
  done
  good eval piqa -m "$model" -f "$golden/piqa.jsonl" --json --compare dense,4@tiles,4/all,8/2 --plot "$work/piqa.png"
  equal "settings" "$(get settings.0.name settings.1.name settings.2.name settings.3.name | paste -sd'|')" "dense|SFA k=4, tiles|K-only k=4|SFA k=8, k_q=2"
  equal "scores" "$(get settings.3.scores.keys)" "acc acc_norm"
  equal "items" "$(get settings.2.items.# settings.2.items.3.loglik.# | tr '\n' ' ')" "4 2 "
  equal "all features are dense" "$(get settings.3.items.0.gold)" "0"
  holds "codes take less" "$(get settings.1.kv_bytes_per_token) < $(get settings.0.kv_bytes_per_token)"
  [ -s "$work/piqa.png" ] || fault "no picture"
  equal "a pipe" "$(cat "$golden/piqa.jsonl" | "$sfa" eval piqa -m "$model" -f /dev/stdin --json | sed 's/.*"items"//')" \
    "$("$sfa" eval piqa -m "$model" -f "$golden/piqa.jsonl" --json | sed 's/.*"items"//')"
  good eval gsm8k -m "$model" -f "$golden/gsm8k.jsonl" --shots-file "$golden/gsm8k_train.jsonl" --shots 2 -n 3 --json
  equal "examples" "$(get examples)" 2
  good eval kv -m "$model" -f "$golden/kv.jsonl" -n 2
  [[ $out == *"0.55"* && $out == *"acc by tokens"* ]] || fault "depths of kv: $out"
  good eval niah -m "$model" -f "$book" --lengths 300,384 --depths 3 --trials 1 --compare dense,4 --plot "$work/niah.png"
  [[ $out == *"       384"* ]] || fault "grid of niah: $out"
  [[ $out == *"what a KV cache of"*"192            - "* ]] || fault "half the budget of dense is too little for it: $out"
  good eval niah -m "$model" -f "$book" --lengths 300,384 --depths 1 --trials 1 --compare dense,4 --json --budget 10
  equal "the longest prompt is held" "$(get budget_bytes settings.1.held.measured_at | tr '\n' ' ')" "10000000 384 "
  [ -s "$work/niah.png" ] || fault "no picture of niah"
  good data listops --rows 20 --min-length 5 --max-length 30 --max-depth 3 --seed 2
  cp "$work/out" "$work/lists.tsv"
  equal "lines" "$(grep -cP '^\[(MIN|MAX|MED|SM) .*\]\t[0-9]$' "$work/lists.tsv")" 20
  good eval listops -m "$model" -f "$work/lists.tsv" --limit 5 --json
  equal "ten choices" "$(get settings.0.items.# settings.0.items.0.loglik.# | tr '\n' ' ')" "5 10 "
  head -c 3000 "$book" >"$work/text"
  good eval ppl -m "$model" -f "$work/text" -c 200 --stride 100 --compare dense,2 --json --plot "$work/ppl.png"
  holds "perplexity" "$(get settings.0.perplexity) > 100 && ($(get settings.0.perplexity) - exp($(get settings.0.nll))) ^ 2 < 1e-6"
  equal "settings of ppl" "$(get settings.# window stride | tr '\n' ' ')" "2 200 100 "
  [ -s "$work/ppl.png" ] || fault "no picture of ppl"
  holds "half of what dense takes" "$(get budget_bytes) == 100 * $(get settings.0.kv_bytes_per_token) && $(get settings.0.held.tokens) == 100"
  holds "codes hold more" "$(get settings.1.held.tokens) > 100 && $(get settings.1.held.measured_at) <= 200 && $(get settings.1.held.score) > 0"
  good eval ppl -m "$model" -f "$work/text"
  [[ $out == *"loss by place"* ]] || fault "table of ppl: $out"
  bad 2 "wants its data" eval piqa -m "$model"
  bad 2 "wants a model" eval piqa -f "$golden/piqa.jsonl"
  bad 2 "takes a list of dense, K" eval piqa -m "$model" -f "$golden/piqa.jsonl" --compare 16,x
  bad 2 "takes a list of dense, K" eval piqa -m "$model" -f "$golden/piqa.jsonl" --compare 16/
  bad 2 "takes a list of dense, K" eval piqa -m "$model" -f "$golden/piqa.jsonl" --compare 16@
  bad 2 "takes a list of dense, K" eval piqa -m "$model" -f "$golden/piqa.jsonl" --compare 16@int4
  bad 1 "line 1: \"goal\" is missing" eval piqa -m "$model" -f "$golden/lambada.jsonl"
  bad 1 "wants 5 worked examples" eval gsm8k -m "$model" -f "$golden/gsm8k.jsonl"
  bad 1 "after 0 rows" data listops --rows 1 --max-depth 2
  bad 2 "budget" eval ppl -m "$model" -f "$work/text" --budget -1
  bad 2 "stride" eval ppl -m "$model" -f "$work/text" -c 100 --stride 101
}

# The verbs that run and train models, on a GPU and here: every family, dense and sparse; an index that one makes and the other goes on with.
case_gpu() {
  local gpu=(--device cuda) models=$root/tests/golden/models ids model change side here limit recipe train
  good info --devices --json
  [[ $(get cuda.devices.#) =~ ^[1-9] ]] || skip "$(get cuda.why)"
  ids=$(seq 7 13 1200 | awk '{ print $1 % 200 }' | paste -sd,)
  for model in llama qwen2 qwen3 gpt2 gemma3 llama/model.gguf; do
    for change in "" "--sfa-k 8"; do
      # shellcheck disable=SC2086
      good eval nll -m "$models/$model" --tokens "$ids" --json --weights bf16 $change
      here=$(get mean) limit=${change:+0.04}
      # shellcheck disable=SC2086
      good eval nll -m "$models/$model" --tokens "$ids" --json --weights bf16 $change "${gpu[@]}"
      holds "loss of $model $change" "($(get mean) - $here) ^ 2 < (${limit:-0.01} * $here) ^ 2"
    done
  done
  head -c 600 "$book" >"$work/text"
  local ask=(generate -m "$story" --temp 0 -n 12 --weights bf16 -p "Once upon a time")
  good "${ask[@]}" "${gpu[@]}"
  holds "a story" "${#out} > 20"
  for side in "${gpu[*]}" ""; do
    rm -f "$work/index"
    # shellcheck disable=SC2086
    good "${ask[@]}" --sfa-k 4 $side -f "$work/text" --index "$work/index"
    good "${ask[@]}" --sfa-k 4 --index "$work/index" --verify "${gpu[@]}"
    good "${ask[@]}" --sfa-k 4 --index "$work/index" --verify
  done
  good explain -m "$story" -f "$work/text" -p "Once" --sfa-k 4 "${gpu[@]}"
  good inspect -m "$story" -f "$work/text" --sfa-k 4 -o "$work/look" "${gpu[@]}"
  small_recipe
  good "${train[@]}" -o "$work/here" --json
  here=$(get loss)
  good "${train[@]}" -o "$work/there" --json "${gpu[@]}"
  equal "a training" "$(get finished steps | tr '\n' ' ')" "true 8 "
  holds "its loss" "($(get loss) - $here) ^ 2 < (0.02 * $here) ^ 2"
  good generate -m "$work/there/model" -p "The time" -n 4 --temp 0 "${gpu[@]}"
}

# What cannot be written is a failure.
case_output() {
  [ -e /dev/full ] || skip "no /dev/full here"
  local uses=("generate -m $story -p Once -n 4" "tokenize -m $story -p Once" "info -m $story --json" "eval nll -m $story --tokens 1,2"
    "bench attention --n 8 --head-dim 8 --k 2 --repeats 1" "--help" "--version" "chat --help") use
  mkfifo "$work/pipe"
  for use in "${uses[@]}"; do
    # shellcheck disable=SC2086
    "$sfa" $use >/dev/full 2>"$work/err"
    equal "sfa $use on a full disk" $? 1
    grep -q '^sfa: .*standard output.*No space' "$work/err" || fault "sfa $use on a full disk: $(cat "$work/err")"
    exec 4<>"$work/pipe" 5>"$work/pipe" 4>&- # nobody reads it any more
    # shellcheck disable=SC2086
    "$sfa" $use >&5 2>"$work/err"
    equal "sfa $use into a closed pipe" $? 1
    exec 5>&-
    grep -q '^sfa: .*standard output.*[Pp]ipe' "$work/err" || fault "sfa $use into a closed pipe: $(cat "$work/err")"
    # shellcheck disable=SC2086
    "$sfa" $use >&- 2>"$work/err"
    equal "sfa $use without standard output" $? 1
    grep -q '^sfa: .*standard output.*descriptor' "$work/err" || fault "sfa $use without standard output: $(cat "$work/err")"
  done
}

case_finetune() {
  local dense=$work/dense/model card=$work/all/report.json
  cat >"$work/recipe.json" <<'END'
{"model": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
  "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "hidden_act": "silu"},
 "steps": 60, "sequences": 4, "sequence_len": 32, "warmup_steps": 2, "learning_rate": 0.005, "checkpoint_every": 0}
END
  head -c 30000 "$book" >"$work/text"
  good tokenizer train "$work/text" --format text --vocab 300 -o "$work/tok"
  good data "$work/text" --format text --tokenizer "$work/tok" -o "$work/shards"
  good train --config "$work/recipe.json" --data "$work/shards/train" --tokenizer "$work/tok" -o "$work/dense"
  local convert=(finetune -m "$dense" --data "$work/shards/train" --validation "$work/shards/train" --set "steps=12,sequences=2" --set sequence_len=32)
  good "${convert[@]}" -o "$work/all" --sfa-k 4 --task "piqa=$root/tests/golden/eval/piqa.jsonl" --limit 3 --json
  card=$work/all/report.json
  equal "k" "$("$json_get" sparse_attention_config.k <"$work/all/model/config.json")" 4
  equal "steps" "$("$json_get" steps <"$work/all/recipe.json")" 12
  equal "the card on stdout" "$(get loss.1)" "$("$json_get" loss.1 <"$card")"
  equal "tokens of the card" "$(get tokens)" 8192
  holds "codes take less memory" "$(get kv_bytes.1) < 0.8 * $(get kv_bytes.0)"
  holds "the models are near each other" "$(get kl_to_dense) > 0 && $(get kl_to_dense) < 1 && $(get top1_agreement) > 0.3 && $(get top1_agreement) <= 1"
  holds "speeds" "$(get prefill_tokens_per_s.0) > 0 && $(get prefill_tokens_per_s.1) > 0 && $(get decode_tokens_per_s.0) > 0 && $(get decode_tokens_per_s.1) > 0"
  holds "losses" "$(get loss.0) < 5.5 && $(get loss.1) < $(get loss.0) + 0.5"
  equal "task" "$(get tasks.0.task tasks.0.acc.# tasks.0.acc_norm.# | tr '\n' ' ')" "piqa 2 2 "
  # An adapter holds what learned, and gives the same model when it is laid over the dense one.
  good "${convert[@]}" -o "$work/qk" --sfa-k 4 --sfa-kq all --set train=qk
  [[ $out == *kl_to_dense*kv_bytes* ]] || fault "report card: $out"
  holds "an adapter is small" "$(wc -c <"$work/qk/adapter/adapter.safetensors") < 0.4 * $(wc -c <"$dense/model.safetensors")"
  good generate -m "$work/qk/model" -p "The time" -n 8 --temp 0
  local text=$out
  good generate -m "$dense" --adapter "$work/qk/adapter" -p "The time" -n 8 --temp 0
  equal "the adapter gives the model" "$out" "$text"
  good info -m "$dense" --adapter "$work/qk/adapter" --json
  equal "dense queries" "$(get sfa_k sfa_k_q | tr '\n' ' ')" "4 0 "
  # A budget is shared out by what each head loses.
  good "${convert[@]}" -o "$work/budget" --mean-k 6
  holds "the budget" "($("$json_get" k.0 <"$work/budget/sensitivity.json") + $("$json_get" k.1 <"$work/budget/sensitivity.json")) <= 12"
  equal "tried" "$("$json_get" rises.# rises.0.layers.# rises.0.layers.0.# <"$work/budget/sensitivity.json" | tr '\n' ' ')" "2 2 2 "
  equal "k of the layers" "$("$json_get" sparse_attention_config.k.0 <"$work/budget/model/config.json")" "$("$json_get" k.0 <"$work/budget/sensitivity.json")"
  bad 2 "wants a dense model" finetune -m "$dense" -o "$work/none"
  bad 2 "one of them is meant" "${convert[@]}" -o "$work/none" --sfa-k 4 --mean-k 6

  # A number for each head: in the model's config, and used by the engine.
  good "${convert[@]}" -o "$work/heads" --mean-k 6 --by-head
  equal "heads of the layers" "$("$json_get" k.# k.0.# k.1.# <"$work/heads/sensitivity.json" | tr '\n' ' ')" "2 2 2 "
  equal "k of the heads" "$("$json_get" sparse_attention_config.k.1.0 sparse_attention_config.k.1.1 <"$work/heads/model/config.json")" \
    "$("$json_get" k.1.0 k.1.1 <"$work/heads/sensitivity.json")"
  bad 2 "mean-k" "${convert[@]}" -o "$work/none" --by-head
  bad 2 "NAME=FILE" "${convert[@]}" -o "$work/none" --sfa-k 4 --task piqa
  bad 1 "cannot make the folder" "${convert[@]}" -o "$work/no/such/folder" --sfa-k 4
}

# interrupt PID: Ctrl-C, once the process listens to it (SIGINT is the second bit of what it catches); $state: how it ended
interrupt() {
  until { [ "/proc/$1/exe" -ef "$sfa" ] && ((0x$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$1/status") & 2)); } || ! kill -0 "$1"; do
    sleep 0.05
  done 2>"$work/gone"
  kill -INT "$1"
  wait "$1"
  state=$?
}

# Ctrl-C: what was printed stays, exit 130. By itself neither of the two would end in the time of a test.
case_interrupt() {
  local golden=$root/tests/golden/eval/model state
  "$sfa" eval nll -m "$story" -f "$book" -c 512 --stride 1 >"$work/out" 2>"$work/err" &
  interrupt $!
  equal "interrupted eval" $state 130
  equal "its output" "$(cat "$work/out")" ""
  mkdir "$work/endless" # a model with a long context and no end of texts
  cp "$golden/model.safetensors" "$work/endless"
  sed 's/\("max_position_embeddings": \).*/\11000000,/; s/\("eos_token_id": \).*/\1426,/' "$golden/config.json" >"$work/endless/config.json"
  sed 's/<|endoftext|>/<|start|>/' "$golden/tokenizer.json" >"$work/endless/tokenizer.json"
  "$sfa" generate -m "$work/endless" -p "Once" -n 900000 --temp 0 --isa scalar -t 1 >"$work/out" 2>"$work/err" &
  until [ -s "$work/out" ] || ! kill -0 $!; do sleep 0.05; done 2>"$work/gone"
  interrupt $!
  equal "interrupted generate" $state 130
  [ -s "$work/out" ] || fault "what was printed before Ctrl-C is gone"
}

case_demo() {
  command -v gnuplot >"$work/which" || skip "no gnuplot here (package gnuplot-nox)"
  good demo -m "$story" -f "$book" -o "$work/demo" -n 24
  for word in dense "SFA k=1" "SFA k=4" "K-only k=2" hybrid conversion demo.png; do
    [[ $out == *"$word"* ]] || fault "the demo does not tell of $word: $out"
  done
  equal "PNG" "$(head -c 4 "$work/demo/demo.png" | od -An -c | tr -d ' ')" '211PNG'
  holds "its size" "$(wc -c <"$work/demo/demo.png") > 5000"
  cp "$work/demo/demo.json" "$work/out"
  equal "variants" "$(get variants.#)" 6
  equal "dense agrees with itself" "$(get variants.0.top1_agreement)" 1
  equal "tokens" "$(get tokens)" 488
  holds "k = 1 of 8 loses" "$(get variants.1.mean_nll) > $(get variants.0.mean_nll)"
  holds "k = 4 is nearer to dense than k = 1" "$(get variants.3.top1_agreement) > $(get variants.1.top1_agreement)"
  bad 1 "cannot make the folder" demo -m "$story" -f "$book" -o "$work/no/such/folder"
  printf 'Once' >"$work/short"
  bad 1 "at least 32 tokens" demo -m "$story" -f "$work/short" -o "$work/demo"
}

case_explain() {
  head -c 600 "$book" >"$work/text"
  good explain -m "$story" -f "$work/text" -p "Lily saw a" --attention sfa --sfa-k 4 --top 2
  for word in explained "SFA k=4 of 8" "start |" "% of the weight" "shared features"; do
    [[ $out == *"$word"* ]] || fault "explain does not tell of $word: $out"
  done
  good explain -m "$story" -f "$work/text" --sfa-k 4 --layers 1,3 --heads 0 --json
  holds "a heat strip" "$(get strip.#) == 64"
  holds "tokens looked at" "$(get tokens.#) >= 2"
  holds "falling" "$(get tokens.0.mass) >= $(get tokens.1.mass)"
  equal "the head asked for" "$(get tokens.0.head)" 0
  holds "at most k shared" "$(get tokens.0.shared_features) <= 4"
  holds "passages" "$(get passages.#) >= 1"
  good generate -m "$story" -f "$work/text" -p "Lily saw a" -n 1 --temp 0 --sfa-k 4 --index "$work/book.sfa"
  good explain -m "$story" --index "$work/book.sfa" -p "Lily saw a" --sfa-k 4 --json
  holds "the index's tokens" "$(get n_tokens) > 300"
  bad 2 "is in the index" explain -m "$story" --index "$work/book.sfa" -f "$work/text" --sfa-k 4
  bad 2 "wants a text" explain -m "$story"
  bad 1 "0 to 4" explain -m "$story" -p hello --layers 5
  bad 1 "512: shorten" explain -m "$story" -f "$book"
  command -v gnuplot >"$work/which" || return 0
  good explain -m "$story" -f "$work/text" --plot "$work/strip.png"
  equal "PNG" "$(head -c 4 "$work/strip.png" | od -An -c | tr -d ' ')" '211PNG'
  run explain -m "$story" -f "$work/text" --plot "$work/no/such/strip.png"
  equal "a picture that cannot be written" "$status" 1
}

case_inspect() {
  head -c 600 "$book" >"$work/text"
  good inspect -m "$story" -f "$work/text" --sfa-k 3 -o "$work/inspect"
  for word in "SFA k=3 of 8" overlap "keys that hold" inspect.json; do
    [[ $out == *"$word"* ]] || fault "inspect does not tell of $word: $out"
  done
  cp "$work/inspect/inspect.json" "$work/out"
  equal "heads" "$(get heads.#)" 20
  equal "kept" "$(get heads.7.k_keys)" 3
  holds "overlap of at most 3" "$(get heads.7.overlap) <= 3"
  equal "features" "$(get heads.7.use.#)" 8
  good inspect -m "$story" -f "$work/text" --json
  equal "dense: all features" "$(get heads.0.k_keys)" 8
  bad 2 "" inspect -m "$story"
  bad 1 "cannot make the folder" inspect -m "$story" -f "$work/text" -o "$work/no/such/folder" --sfa-k 3
}

# case_data: texts to a tokenizer, to shards, and back; made-up tasks.
# A tiny model on a book: trained, interrupted, resumed, used, exported; and what a user gets wrong.
# small_recipe: tokens of a book, and ${train[@]}, the command that learns them
small_recipe() {
  recipe=$work/recipe.json
  cat >"$recipe" <<'END'
{"model": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
  "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "hidden_act": "silu"},
 "steps": 8, "sequences": 4, "sequence_len": 32, "warmup_steps": 2, "log_every": 2, "checkpoint_every": 3, "validate_every": 4}
END
  echo '{"sparse_attention_config": {"k": 4}}' >"$work/k4.json"
  head -c 20000 "$book" >"$work/text"
  good tokenizer train "$work/text" --format text --vocab 300 -o "$work/tok"
  good data "$work/text" --format text --tokenizer "$work/tok" -o "$work/shards"
  train=(train --config "$recipe,$work/k4.json" --data "$work/shards/train" --validation "$work/shards/train" --tokenizer "$work/tok")
}

case_train() {
  local recipe train model=$work/run/model
  small_recipe
  good "${train[@]}" -o "$work/run" --json
  equal "result" "$(get finished steps tokens | tr '\n' ' ')" "true 8 1024 "
  holds "it learns" "$(get loss) < $(get first_loss)"
  equal "checkpoints kept" "$(ls "$work/run/checkpoints" | tr '\n' ' ')" "step-000000000006.sfa step-000000000008.sfa "
  equal "lines of losses" "$(grep -c '"loss"' "$work/run/log.jsonl")" 4
  equal "held-out losses" "$(grep -c '"validation_loss".*"k":4' "$work/run/log.jsonl")" 1
  equal "trained with" "$("$json_get" sparse_attention_config.k <"$model/config.json")" 4
  good generate -m "$model" -p "The time" -n 4 --temp 0
  local text=$out
  good export -m "$model" --gguf "$work/model.gguf" --type f32
  good generate -m "$work/model.gguf" -p "The time" -n 4 --temp 0
  equal "the same text from GGUF" "$out" "$text"
  good info -m "$work/model.gguf" --json
  equal "SFA in GGUF" "$(get format sfa_k vocab_size | tr '\n' ' ')" "gguf 4 300 "
  good "${train[@]}" -o "$work/more" --set steps=4,learning_rate=0.002,seed=9007199254740991 --threads 1
  equal "a seed of many digits" "$(grep -c '"seed":[[:space:]]*9007199254740991,' "$work/more/recipe.json")" 1
  bad 1 "step 8" "${train[@]}" -o "$work/run"
  bad 1 "learning_rate" "${train[@]}" -o "$work/run" --resume --set learning_rate=0.5
  good "${train[@]}" -o "$work/run" --resume
  bad 1 "no member" "${train[@]}" -o "$work/none" --set stepz=3
  bad 2 "NAME=VALUE" "${train[@]}" -o "$work/none" --set steps
  good tokenizer train "$work/text" --format text --vocab 290 -o "$work/other"
  bad 1 "not made with the tokenizer" train --config "$recipe" --data "$work/shards/train" --tokenizer "$work/other" -o "$work/none"
  bad 1 "absent.json" train --config "$work/absent.json" --data "$work/shards/train" -o "$work/none"
  bad 1 "nowhere" train --config "$recipe" --data "$work/nowhere" -o "$work/none"
  bad 2 "wants a recipe" train --data "$work/shards/train" -o "$work/none"
  bad 2 "wants token shards" train --config "$recipe" -o "$work/none"
  bad 2 "wants a folder" train --config "$recipe" --data "$work/shards/train"
  bad 2 "wants a model and a file" export -m "$model"
  bad 1 "nowhere" export -m "$work/nowhere" --gguf "$work/x.gguf"
  bad 1 "it is not a regular file; give another name" export -m "$model" --gguf "$work"
  # Every recipe that is shipped, through all of its phases, over every model that is.
  local way at=$root/examples/recipes
  for way in "$at"/*.json; do
    case ${way##*/} in
    model_*) way=$way,$at/dense_first.json ;;
    *) way=$at/model_small.json,$way ;;
    esac
    good train --config "$way" --data "$work/shards/train" -o "$work/way" --set steps=4,sequences=1,sequence_len=32 --json
    holds "$way trains" "$(get loss) < 7"
    good info -m "$work/way/model"
    rm -r "$work/way"
  done
  # Ctrl-C saves and ends.
  local state
  "$sfa" "${train[@]}" -o "$work/stopped" --set steps=1000000 >"$work/out" 2>"$work/err" &
  until [ -s "$work/stopped/log.jsonl" ] || ! kill -0 $!; do sleep 0.05; done 2>"$work/gone"
  interrupt $!
  equal "interrupted" $state 130
  [ -e "$work/stopped/model/model.safetensors" ] || fault "an interrupted training leaves no model"
}

case_data() {
  local corpus=$root/tests/golden/bpe_train/corpus.en texts=$root/tests/golden/texts
  good tokenizer train "$corpus" --format text --vocab 400 -o "$work/tok"
  [[ $out == *"tokenizer.json: 400 tokens"* ]] || fault "tokenizer train tells: $out"
  bad 1 "no word" tokenizer train - --vocab 300 -o "$work/none" # standard input is empty
  good tokenizer train "$corpus" --format text --vocab 400 --special "<s>" --special "<pad>" -o "$work/two" --json
  equal "vocabulary" "$(get vocab_size)" 400
  good tokenize --tokenizer "$work/two" -p "<pad> the iron" --json
  equal "a special token" "$(get ids.0)" 1
  good data "$texts/docs.txt" --valid "$texts/docs.jsonl" --tokenizer "$work/tok" -o "$work/shards" --json
  equal "documents" "$(get documents)" 8
  equal "held out" "$(get valid_documents)" 4
  cmp -s "$work/shards/train_00000.shard" "$work/shards/valid_00000.shard" || fault "rows and lines give different shards"
  good data --verify "$work/shards/train" "$work/shards/valid_00000.shard" --json
  equal "verified documents" "$(get documents)" 8
  equal "vocabulary of shards" "$(get vocab_size)" 400
  good data "$texts" --tokenizer "$work/tok" -o "$work/share" --valid-share 0.5 --seed 3 --shard-tokens 1
  [[ -e $work/share/train_00001.shard && -e $work/share/valid_00000.shard ]] || fault "no second shard, or none held out"
  bad 2 "wants files" data --tokenizer "$work/tok" -o "$work/none"
  bad 2 "wants a tokenizer" data "$texts" -o "$work/none"
  bad 2 "wants a folder" data "$texts" --tokenizer "$work/tok"
  bad 2 "one of them" data "$texts" --tokenizer "$work/tok" -o "$work/none" --valid "$texts" --valid-share 0.5
  bad 1 "no special token" data "$texts" --tokenizer "$work/tok" -o "$work/none" --end-token "<nothing>"
  bad 1 "cannot open" data "$work/absent" --tokenizer "$work/tok" -o "$work/none"
  bad 1 "no text \"body\"" data "$texts/docs.jsonl" --field body --tokenizer "$work/tok" -o "$work/none"
  equal "files after failures" "$(find "$work/none" -type f | wc -l)" 0
  printf 'x' | dd of="$work/shards/train_00000.shard" bs=1 seek=130 conv=notrunc status=none
  bad 1 "block 0 of 1" data --verify "$work/shards/train"
  bad 1 "is no token shard" data --verify "$texts/docs.txt"
  bad 1 "no set of shards" data --verify "$work/shards/test"

  good data listops --rows 50 --min-length 5 --max-length 60 --seed 4
  equal "expressions" "$(wc -l <"$work/out")" 50
  cp "$work/out" "$work/listops"
  equal "different ones" "$(sort -u "$work/listops" | wc -l)" 50
  awk -F'\t' 'function value(  op, n, i, j, x, v, sum) {
      if (t[at] !~ /^\[/) return t[at++]
      op = t[at++]
      for (n = 0; t[at] != "]"; v[n++] = x) x = value()
      at++
      for (i = 1; i < n; i++) for (j = i; j > 0 && v[j - 1] + 0 > v[j] + 0; j--) { x = v[j]; v[j] = v[j - 1]; v[j - 1] = x }
      for (i = 0; i < n; i++) sum += v[i]
      return op == "[MIN" ? v[0] : op == "[MAX" ? v[n - 1] : op == "[SM" ? sum % 10 : int((v[int((n - 1) / 2)] + v[int(n / 2)]) / 2)
    }
    { n_words = split($1, t, " "); at = 1; if (n_words <= 5 || n_words >= 60 || value() != $2) bad++ } END { exit bad > 0 }' "$work/listops" ||
    fault "ListOps: a wrong value or length"
  good data listops --rows 50 --min-length 5 --max-length 60 --seed 4 --format jsonl
  equal "rows" "$(head -n 1 "$work/out" | "$json_get" text)" "$(head -n 1 "$work/listops")"
  bad 2 "leave none" data listops --min-length 50 --max-length 51
  run data listops --rows 100000 --min-length 1 --max-length 4
  equal "too few expressions" "$status" 1
  good data kv --rows 4 --keys 3
  equal "rows of pairs" "$(wc -l <"$work/out")" 4
  equal "pairs" "$(head -n 1 "$work/out" | "$json_get" "ordered_kv_records.#")" 3
}

# shellcheck source=tests/cli/cli_bench_cases.sh
. "$here/cli_bench_cases.sh"

"case_$subject"
[ $checks -gt 0 ] || fault "nothing was checked"
echo "cli_$subject: $checks checks, $faults faults"
[ $faults = 0 ]
