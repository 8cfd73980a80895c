#!/usr/bin/env bash
# old_nvcc.sh ROOT NVCC: a build with CUDA by an nvcc before 12 ends with a sentence about it. The nvcc is the real one, which says of
# itself that it is 11.8.
set -u
root=$1 nvcc=$2 work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/bin" "$work/source"
cat >"$work/bin/nvcc" <<END
#!/usr/bin/env bash
arguments=()
for argument in "\$@"; do
  if [[ \$argument == *CMakeCUDACompilerId.cu ]]; then
    sed 's/DEC(__CUDACC_VER_MAJOR__)/DEC(11)/; s/DEC(__CUDACC_VER_MINOR__)/DEC(8)/' "\$argument" >"$work/source/\${argument##*/}"
    argument=$work/source/\${argument##*/}
  fi
  arguments+=("\$argument")
done
exec "$nvcc" "\${arguments[@]}"
END
chmod +x "$work/bin/nvcc"
cmake -G Ninja -S "$root" -B "$work/build" -DSFA_CUDA=ON -DCMAKE_CUDA_COMPILER="$work/bin/nvcc" >"$work/out" 2>&1
status=$?
[ $status = 1 ] || { echo "an nvcc of 11.8: cmake ends with $status"; cat "$work/out"; exit 1; }
grep -q "nvcc is CUDA 11.8.*: 12 or later is needed" "$work/out" || { echo "an nvcc of 11.8 is not told of:"; cat "$work/out"; exit 1; }
echo "an nvcc of 11.8 is refused"
