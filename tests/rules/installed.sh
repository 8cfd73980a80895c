#!/usr/bin/env bash
# installed.sh BUILD_DIR SOURCE_DIR CC GENERATOR: installs the build to a fresh prefix, moves that, and builds and runs users of both libraries there,
# by CMake's find_package and by pkg-config.
set -eu
build=$1 source=$2 cc=$3 generator=$4
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$work/log

step() { # step WHAT COMMAND...
  local what=$1
  shift
  "$@" >"$log" 2>&1 || { echo "installed: $what failed: $*"; cat "$log"; exit 1; }
}

step "cmake --install" cmake --install "$build" --prefix "$work/first"
mv "$work/first" "$work/prefix" # an installed tree can be moved
prefix=$work/prefix
LD_LIBRARY_PATH=$prefix/lib:$prefix/lib/$(uname -m)-linux-gnu:$prefix/lib64:${LD_LIBRARY_PATH-}
export LD_LIBRARY_PATH

mkdir "$work/user" && cd "$work/user"
cp "$source/examples/01_attention.c" attention.c
cat >engine.c <<'END'
#include <sfa/engine.h>
#include <sfa/sfa.h>
int main(void) { /* a model that is not there: the call must reach the readers and say so */
  sfa_context *ctx;
  sfa_model *model = 0;
  if (sfa_context_create(0, &ctx) != SFA_OK)
    return 1;
  sfa_status status = sfa_model_open(ctx, "no_such_model.gguf", 0, &model);
  int said = sfa_context_error(ctx)[0] != 0;
  sfa_model_close(model);
  sfa_context_destroy(ctx);
  return !(status == SFA_ERROR_IO && said);
}
END
cat >CMakeLists.txt <<'END'
cmake_minimum_required(VERSION 3.16)
project(user LANGUAGES C)
find_package(sfa 0.1 REQUIRED)
add_executable(attention attention.c)
target_link_libraries(attention PRIVATE sfa::sfa m)
add_executable(engine engine.c)
target_link_libraries(engine PRIVATE sfa::sfa_engine)
END

step "find_package" cmake -S . -B by_cmake -G "$generator" -DCMAKE_C_COMPILER="$cc" -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_FIND_USE_PACKAGE_REGISTRY=OFF
step "build with find_package" cmake --build by_cmake
step "libsfa's user" by_cmake/attention
step "libsfa_engine's user" by_cmake/engine

pc_dir=$(dirname "$(find "$prefix" -name sfa.pc)")
for user in attention:sfa engine:sfa_engine; do
  flags=$(PKG_CONFIG_PATH=$pc_dir pkg-config --cflags --libs "${user#*:}")
  eval "flags=($flags)" # pkg-config quotes for a shell
  step "build with pkg-config" "$cc" -std=c11 -D_POSIX_C_SOURCE=200809L "${user%:*}.c" -o "by_pkg_config_${user%:*}" "${flags[@]}" -lm
  step "pkg-config's user of ${user#*:}" "./by_pkg_config_${user%:*}"
done

step "the command" "$prefix/bin/sfa" --version
if find "$prefix" -path "*include*" -name "*.h" | grep -v /include/sfa/; then echo "installed: these headers are not public"; exit 1; fi
echo "installed: both libraries serve a user by find_package and by pkg-config, and the command runs"
