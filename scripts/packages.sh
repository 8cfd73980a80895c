# shellcheck shell=bash disable=SC2034,SC2086
# packages.sh: sourced by scripts/demo and scripts/test. Which Debian or Ubuntu packages each of them needs, and how they get there.

packages_build="cmake ninja-build gcc g++ libc6-dev pkg-config libbz2-dev libcjson-dev libdnnl-dev liblzma-dev libpcre2-dev libutf8proc-dev"
packages_test="$packages_build binutils libcmocka-dev gnuplot-nox"
packages_sanitize="clang libclang-rt-dev libomp-dev" # ThreadSanitizer knows clang's OpenMP runtime, not gcc's
packages_format="clang-format"
packages_demo="$packages_test python3-pip" # the build is configured with its tests

# Those of the packages named that are not installed.
packages_missing() {
  local name
  for name in "$@"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || printf '%s ' "$name"
  done
}

# Installs what is missing of the packages named; says what to do and returns 1 where it cannot.
packages_install() {
  local missing log root=""
  if ! command -v dpkg-query >/dev/null; then
    echo "This is not Debian or Ubuntu: please install what these packages hold, then go on: $*" >&2
    return 0
  fi
  missing=$(packages_missing "$@")
  [ -n "$missing" ] || return 0
  if [ "$(id -u)" != 0 ]; then
    root=sudo
    [ -t 0 ] || root="sudo -n" # nobody is there to type a password
    if ! $root true 2>/dev/null; then
      echo "Missing packages, and no right to install them. Please run as root: apt-get install $missing" >&2
      return 1
    fi
  fi
  echo "Installing: $missing"
  local apt="$root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=5 -o DPkg::Lock::Timeout=300"
  if ! log=$({ $apt update && $apt install -y --no-install-recommends $missing; } </dev/null 2>&1); then
    printf '%s\napt-get could not install: %s\n' "$log" "$missing" >&2
    return 1
  fi
}
