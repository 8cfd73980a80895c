# shellcheck shell=bash disable=SC2154
# cli_bench_cases.sh: the subjects of cli_cases.sh that measure, or predict: sfa bench and sfa plan.

case_bench() {
  good bench attention --n 64,100 --head-dim 32 --k 4,32 --dtype f32,bf16 --isa scalar --threads 1,2 --causal 0,1 --repeats 1 --json
  equal "every combination, two sides" "$(get '#')" 64
  equal "keys" "$(get 0.keys)" "n head_dim k dtype k_dtype isa threads causal supports ready seed engine version policy ms min_ms max_ms rounds \
times_sfa topk_ms pack_ms attend_ms predicted_ms predicted_topk_ms predicted_pack_ms predicted_score_ms predicted_softmax_ms \
predicted_value_ms overlap overlap_random pair_multiply_adds multiply_adds_per_s share_of_peak kv_bytes dense_kv_bytes peak_bytes"
  equal "first case" "$(get 0.n 0.head_dim 0.k 0.dtype 0.isa 0.threads 0.causal 0.engine 1.engine | tr '\n' ' ')" \
    "64 32 4 f32 scalar 1 false SFA dense twin "
  equal "last case" "$(get 63.n 63.k 63.dtype 63.threads 63.causal | tr '\n' ' ')" "100 32 bf16 2 true "
  holds "times" "$(get 0.ms) > $(get 0.topk_ms) + $(get 0.pack_ms) && $(get 0.topk_ms) > 0 && $(get 1.ms) > 0 && $(get 1.topk_ms) == 0"
  holds "peak" "$(get 0.peak_bytes) > 1e6 && $(get 0.share_of_peak) > 0"
  # Codes that keep 4 of 32: 4 ids, 4 floats a key; a pair costs 4 + 32 multiply-adds, unless the planner writes codes out as rows.
  holds "bytes" "$(get 0.kv_bytes) == 64 * (4 * 5 + 32 * 4) && $(get 0.dense_kv_bytes) == 64 * 64 * 4 && $(get 1.pair_multiply_adds) == 64"
  holds "overlap" "$(get 0.overlap) > 0.3 && $(get 0.overlap) < 0.8 && $(get 0.overlap_random) == 0.5"
  good bench attention --n 512 --head-dim 64 --k 8,16 --supports skewed --ready 0,1 --repeats 1 --json
  holds "skewed supports" "$(get 0.overlap) > 2.4 && $(get 0.overlap) < 2.9 && $(get 4.overlap) > 6.4 && $(get 4.overlap) < 7.4"
  holds "codes ready" "$(get 0.topk_ms) > 0 && $(get 2.topk_ms) == 0"
  good bench attention --n 64 --head-dim 64 --k 8
  equal "table" "$(wc -l <"$work/out")" 3

  good bench decode --n 200 --head-dim 32 --k 4,8 --kv-heads 2 --heads 4 --batch 1,3 --n-q 2 --against bf16,int8 --v-type bf16,int4 --repeats 1 --json
  equal "two batches of six caches" "$(get '#')" 12
  equal "decode keys" "$(get 0.keys)" "n batch n_q heads kv_heads head_dim head_dim_v k k_dtype v_dtype eps score_sd supports isa threads \
seed engine version policy ms min_ms max_ms rounds times_dense topk_ms attend_ms join_ms predicted_ms bytes bytes_per_s read_bytes_per_s share_of_reads token_bytes \
dropped least_kept"
  equal "engines" "$(get 0.engine 1.engine 2.engine 5.engine)" "dense bf16, V bf16
dense int8, V int8
SFA k 4 int8, V bf16
SFA k 8 int8, V int4"
  holds "bytes of a token" "$(get 0.token_bytes) == 2 * 32 * 4 && $(get 2.token_bytes) == 2 * (4 * 2 + 2 + 64)"
  holds "stages of a step" "$(get 0.topk_ms) == 0 && $(get 2.topk_ms) > 0 && $(get 2.attend_ms) > 0"
  holds "bytes of a step" "$(get 0.bytes) == 200 * $(get 0.token_bytes) && $(get 6.bytes) == (66 + 133 + 200) * $(get 6.token_bytes)"
  holds "times" "$(get 2.ms) > 0 && $(get 2.times_dense) > 0 && $(get 0.times_dense) == 1 && $(get 0.share_of_reads) > 0"
  good bench decode --n 200 --head-dim 32 --k 4 --v-type fp8,int8 --repeats 1 --json
  equal "fp8" "$(get 1.engine 1.v_dtype) $(get 1.token_bytes)" "SFA k 4 int8, V fp8
fp8 $(get 2.token_bytes)"
  good bench decode --n 3000 --head-dim 64 --k 8 --v-type int8 --eps 0.01 --score-sd 2.3 --supports skewed --repeats 1 --json
  holds "what eps drops" "$(get 2.dropped) <= 0.01 && $(get 2.least_kept) > 0.2 && $(get 2.least_kept) < 0.8"

  good bench topk --n 100 --head-dim 16,512 --k 4 --dtype f32,bf16 --repeats 1 --json
  equal "every combination, two sides" "$(get '#')" 8
  equal "top-k keys" "$(get 0.keys)" "n head_dim k dtype k_dtype isa seed engine version row_ns min_row_ns max_row_ns rounds times_sfa read_bytes_per_s share_of_copies"
  equal "sides" "$(get 0.engine 1.engine)" "SFA
quickselect"

  good bench model -m "$story" --depth 16,64 --steps 2 --repeats 2 --sfa-k 4 --json
  equal "two sides at two depths" "$(get 0.engine 1.engine 2.engine 3.engine 0.depth 3.depth | tr '\n' ' ')" "SFA k 4 dense SFA k 4 dense 16 64 "
  holds "model" "$(get 0.prefill_tokens_per_s) > 0 && $(get 2.prefill_tokens) == 62 && $(get 2.step_ms) > $(get 2.attention_ms)"
  holds "less cache" "$(get 2.kv_bytes) < $(get 3.kv_bytes)"
  good bench model -m "$story" --depth 16 --steps 1 --repeats 1 --attention dense --json
  equal "dense alone" "$(get '#')" 1
}

# Results in a file, pictures, and peers that are not there.
case_bench_files() {
  local attention="bench attention --n 64,128 --head-dim 32 --k 4 --repeats 1"
  # shellcheck disable=SC2086
  good $attention --csv "$work/a.csv"
  # shellcheck disable=SC2086
  SFA_COMMIT=abc good $attention --csv "$work/a.csv"
  equal "one head, two runs of four lines" "$(wc -l <"$work/a.csv") $(grep -c '^version,commit,machine,processors,command,n,head_dim' "$work/a.csv")" "9 1"
  equal "commit" "$(sed -n 9p "$work/a.csv" | cut -d, -f2)" abc
  [[ $(sed -n 9p "$work/a.csv") == *"\"sfa bench attention --n 64,128 "* ]] || fault "the command is not in $(sed -n 9p "$work/a.csv")"
  equal "as many fields" "$(sed 's/"[^"]*"//g' "$work/a.csv" | awk -F, '{ print NF }' | sort -u | wc -l)" 1
  bad 1 "holds other columns" bench topk --n 10 --head-dim 16 --k 2 --repeats 1 --csv "$work/a.csv"
  bad 1 "holds other columns" bench topk --n 10 --head-dim 16 --k 2 --repeats 1 --csv /dev/zero
  bad 1 "cannot write" bench topk --n 10 --head-dim 16 --k 2 --repeats 1 --csv "$work/none/a.csv"
  # shellcheck disable=SC2086
  SFA_PYTHON=$work/no_python run $attention --peers --json
  equal "without a Python: exit, rows, lines on stderr" "$status $(get '#') $(wc -l <"$work/err")" "0 4 1"
  [[ $err == *"SFA_PYTHON"* ]] || fault "the missing Python is not told: $err"
  if command -v python3 >/dev/null; then # an interpreter without any package: each is told, none is needed
    printf '#!/bin/sh\nshift 2\nexec python3 -I -S "$@"\n' >"$work/bare_python"
    chmod +x "$work/bare_python"
    # shellcheck disable=SC2086
    SFA_PYTHON=$work/bare_python run $attention --peers --json
    equal "without packages: exit, rows" "$status $(get '#')" "0 4"
    [[ $err == *"package torch is not installed"*"package numpy is not installed"* ]] || fault "missing packages are not told: $err"
    local told=$err # the same where standard input is closed, whose number a pipe to the child could get
    # shellcheck disable=SC2086
    SFA_PYTHON=$work/bare_python "$sfa" $attention --peers --json <&- >"$work/out" 2>"$work/err"
    equal "without standard input: exit, rows, missing packages" "$? $(get '#') $(cat "$work/err")" "0 4 $told"
  fi
  if command -v gnuplot >/dev/null; then
    # shellcheck disable=SC2086
    good $attention --plot "$work/a.png"
    good bench decode --n 64 --head-dim 32 --k 4 --repeats 1 --plot "$work/d.png"
    good bench topk --n 10 --head-dim 16 --k 2 --repeats 1 --plot "$work/t.png"
    good bench model -m "$story" --depth 16 --steps 1 --repeats 1 --plot "$work/m.png"
    for picture in a d t m; do
      equal "picture $picture" "$(head -c 4 "$work/$picture.png" | tail -c 3)" PNG
    done
  fi
}

# sfa bench on a GPU whose kernels are the host's: every way and every number of its own.
case_bench_gpu() {
  good bench attention --device cuda --n 64 --heads 2 --head-dim 32 --k 4 --causal 0,1 --repeats 1 --json
  equal "ways" "$(for i in 0 1 2 3 4 5; do get $i.engine; done | tr '\n' ,)" "SFA bf16,SFA sp_bf16,SFA int8,SFA sp_int8,SFA paper,dense twin,"
  equal "cases" "$(get '#' 6.causal | tr '\n' ' ')" "12 true "
  # Parts are timed by themselves: which takes longer is chance here, but that both clocks tell the same twice is not.
  holds "times and rates" "$(get 0.ms) > 0 && $(get 11.dense_equivalent_tflops) > 0"
  holds "top-k apart" "$(get 0.topk_ms) > 0 && ($(get 0.topk_ms) != $(get 0.ms) || $(get 6.topk_ms) != $(get 6.ms))"
  good bench backward --device cuda --n 64 --heads 2 --head-dim 32 --k 4,8 --repeats 1 --json
  equal "ways of gradients" "$(get 0.engine 1.engine | tr '\n' ,)" "SFA bf16,dense twin,"
  holds "forward apart" "$(get 0.forward_ms) > 0 && ($(get 0.forward_ms) != $(get 0.ms) || $(get 2.forward_ms) != $(get 2.ms))"
  good bench decode --device cuda --n 200 --kv-heads 2 --head-dim 32 --supports skewed --k 8 --v-type bf16,int8 --against int8 --repeats 1 --json
  equal "steps" "$(get '#')" 3
  holds "stages of steps" "$(get 2.attend_ms) == 0.001 && $(get 2.join_ms) == 0.001" # a lap of the host's clock each
  holds "rates of steps" "$(get 2.bytes_per_s) > 0 && $(get 2.share_of_reads) > 0 && $(get 2.dropped) == 0"
  good bench topk --device cuda --n 100 --head-dim 32 --k 4 --repeats 1 --json
  holds "top-k" "$(get 0.share_of_copies) > 0"
  good info --devices --json
  equal "GPUs" "$(get cuda.devices.# cuda.devices.0.is_usable cuda.devices.2.is_usable | tr '\n' ' ')" "3 true false "
  for verb in attention backward decode topk; do
    bad 1 "8.0 or later" bench $verb --device cuda:2
    bad 1 "3 GPUs" bench $verb --device cuda:3
  done
}

# bench/run and bench/run_cuda over a command that writes what it was asked, and fails where it is told to: a part's numbers are replaced
# when all of its commands have ended well, and only then.
case_bench_run() {
  mkdir "$work/bench" "$work/bin"
  cp "$root/bench/run" "$root/bench/run_cuda" "$work/bench"
  cat >"$work/bin/sfa" <<'END'
#!/usr/bin/env bash
asked=$*
while [ "$1" != --csv ]; do shift; done
echo "$MARK $asked" >>"$2"
[[ $asked != *"${FAIL-nothing of this}"* ]]
END
  chmod +x "$work/bin/sfa"
  # lines PART: how many lines of the part are of each mark
  lines() { cut -d' ' -f1 "$work/bench/results/$1" 2>/dev/null | sort | uniq -c | tr -s ' \n' ' '; }
  local script
  for script in "run x" "run_cuda y"; do
    local name=${script#* } failing="--v-type bf16,int8" n_decode n_topk
    [ "$name" = x ] && failing="--eps"
    # shellcheck disable=SC2086
    SFA_BIN=bin MARK=first bash "$work/bench/"$script decode topk >"$work/out" 2>"$work/err"
    equal "$script: all well" "$?" 0
    n_decode=$(wc -l <"$work/bench/results/$name-decode.csv") n_topk=$(wc -l <"$work/bench/results/$name-topk.csv")
    holds "$script: commands" "$n_decode >= 1 && $n_topk >= 2"
    # shellcheck disable=SC2086
    FAIL=$failing SFA_BIN=bin MARK=second bash "$work/bench/"$script decode topk >"$work/out" 2>"$work/err"
    equal "$script: one fails" "$?" 1
    equal "$script: its part stays" "$(lines $name-decode.csv)" " $n_decode first "
    equal "$script: what was measured" "$(lines $name-decode.failed.csv)" " $n_decode second "
    equal "$script: the other part" "$(lines $name-topk.csv)" " $n_topk second "
  done
}

# Memory of prefill grows as n, not as n^2: four times the tokens, at most 4.3 times the peak.
case_peak() {
  local small large
  good bench attention --n 4096 --head-dim 64 --k 8 --repeats 1 --causal --json
  small=$(get 0.peak_bytes)
  good bench attention --n 16384 --head-dim 64 --k 8 --repeats 1 --causal --json
  large=$(get 0.peak_bytes)
  holds "peak($large) <= 4.3 peak($small)" "$large <= 4.3 * $small"
  holds "the larger holds its inputs" "$large > 4 * 16384 * 64 * 4"
}

# What the planner would do; costs measured and kept, and files of costs that cannot be believed.
case_plan() {
  local kept=$XDG_CACHE_HOME/sfa/costs-scalar.json measured
  good plan --n 256,2048 --k 0,8 --head-dim 64 --isa scalar --threads 1 --json
  equal "members" "$(get keys)" "isa costs calibrated plans"
  equal "origin" "$(get isa costs calibrated | tr '\n' ' ')" "scalar source false "
  equal "every combination" "$(get plans.#)" 4
  equal "a plan" "$(get plans.0.keys)" "n_q n batch heads kv_heads head_dim k k_q dtype k_type v_type causal cached policy densified reason topk_ns pack_ns score_ns softmax_ns value_ns call_ns total_ns dense_ns dense_wins key_bytes dense_key_bytes value_bytes workspace_bytes"
  equal "shapes" "$(get plans.0.n plans.0.k plans.3.n plans.3.n_q plans.3.k plans.3.k_q | tr '\n' ' ')" "256 0 2048 2048 8 8 "
  holds "dense is its own twin" "($(get plans.0.total_ns) - $(get plans.0.dense_ns)) ^ 2 < 1"
  holds "stages add up" "($(get plans.3.topk_ns) + $(get plans.3.pack_ns) + $(get plans.3.score_ns) + $(get plans.3.softmax_ns) + $(get plans.3.value_ns) + $(get plans.3.call_ns) - $(get plans.3.total_ns)) ^ 2 < 1"
  equal "bytes" "$(get plans.3.key_bytes plans.3.dense_key_bytes plans.3.value_bytes | tr '\n' ' ')" "81920 524288 524288 "
  equal "half of dense scores, where top-k is little" "$(get plans.3.dense_wins)" false
  # One query never pays for top-k of all keys.
  good plan --n 4096 --n-q 1 --head-dim 64 --isa scalar
  [[ $out == *"dense wins here"* ]] || fault "plan of one query over dense rows: $out"
  # A model's shapes: a chunk of the prompt, and one step.
  good plan -m "$story" --json
  equal "a model" "$(get plans.0.n_q plans.1.n_q plans.0.n plans.0.heads plans.0.kv_heads plans.0.head_dim plans.0.cached plans.0.causal | tr '\n' ' ')" \
    "512 1 512 8 4 8 true true "
  good plan --n 65536 --n-q 1 --cached --head-dim 128 --heads 8 --kv-heads 2 --batch 3 --window 1000 --sinks 4 --k-q all --v-type int4 --causal --json
  equal "a step" "$(get plans.0.k_type plans.0.v_type plans.0.batch plans.0.k_q | tr '\n' ' ')" "int8 int4 3 0 "
  # Asking for a way.
  good plan --n 64 --policy tiles
  [[ $out == *"tiles: as asked"* ]] || fault "plan --policy tiles: $out"
  bad 1 "policy keys: .*512.*" plan --n 512 --policy keys
  bad 1 "SFA_PRECISION_F32" plan --policy half-codes --precision f32
  bad 2 "multiple of 8" plan --head-dim 12
  bad 2 "not a multiple of --kv-heads" plan --heads 3 --kv-heads 2
  bad 2 "keeps more features" plan --k-q 100
  bad 2 "did you mean --calibrate" plan --calibrat
  # Measured, kept, used from then on: the same plans to the last digit, though most of the entries have a part in them.
  local grid=(--isa scalar --n 4096,16384 --n-q 1,4096 --head-dim 64,128,256 --k 0,4,16 --json)
  good plan --calibrate "${grid[@]}"
  equal "kept" "$(get costs calibrated | tr '\n' ' ')" "$kept true "
  [ "$(ls "$(dirname "$kept")")" = "$(basename "$kept")" ] || fault "the folder of costs holds $(ls "$(dirname "$kept")")"
  measured=${out/'"calibrated":true'/'"calibrated":false'}
  good plan "${grid[@]}"
  equal "used" "$out" "$measured"
  equal "nothing on stderr" "$err" ""
  cp "$kept" "$work/good.json"
  for damage in 's/"version":2/"version":1/' 's/"machine":"/"machine":"Another /' 's/"isa":"scalar"/"isa":"avx2"/' 's/"call":\[/"call":[-/' \
    's/"topk":\[/"topk":[1,/' 's/"code_step"/"code_steps"/' 's/kind/kin/' 's/}//g'; do
    sed "$damage" "$work/good.json" >"$kept"
    good plan --isa scalar --n 128 --json
    equal "$damage" "$(get costs)" source
    [[ $err == "sfa: the costs kept in $kept are not used: "*"calibrate"* ]] || fault "$damage: $err"
  done
  : >"$kept"
  good generate -m "$story" -p "Once" -n 4 --temp 0 --isa scalar
  equal "costs of no bytes, and the closing line" "$(wc -l <"$work/err")" 2
  cp "$work/good.json" "$kept"
  good generate -m "$story" -p "Once" -n 4 --temp 0 --isa scalar
  equal "the closing line alone" "$(wc -l <"$work/err")" 1
  HOME="" XDG_CACHE_HOME="" bad 1 "set HOME or XDG_CACHE_HOME" plan --calibrate --isa scalar
  XDG_CACHE_HOME=/proc/no/such bad 1 "cannot write" plan --calibrate --isa scalar
}
