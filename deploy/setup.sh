#!/usr/bin/env bash
# Installs what resad is built with, on Debian 12 and Ubuntu 24.04. Idempotent: when every package
# is there it changes nothing and needs neither root nor a network. Sourced by quickstart.sh and
# tests/run.sh; can also be run by itself.
#
#   deploy/setup.sh            build the daemon
#   deploy/setup.sh --tests    and what the test suite needs besides

resa_build_packages=(
  g++ cmake ninja-build pkg-config ccache ca-certificates
  libgrpc++-dev libgrpc-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc libabsl-dev
  libspdlog-dev prometheus-cpp-dev libcivetweb-dev
  libhwy-dev libdnnl-dev nlohmann-json3-dev libpcre2-dev libutf8proc-dev
  libgtest-dev libgmock-dev python3 python3-venv
)
resa_test_packages=(clang clang-format libclang-rt-dev git)

resa_say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
resa_die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

resa_check_system() {
  local id="" version_id="" name="an unknown system"
  if [ -r /etc/os-release ]; then
    id=$(. /etc/os-release && echo "${ID:-}")
    version_id=$(. /etc/os-release && echo "${VERSION_ID:-}")
    name=$(. /etc/os-release && echo "${PRETTY_NAME:-$ID}")
  fi
  case "$id:$version_id" in
    debian:12 | ubuntu:24.04) ;;
    *) resa_die "this script supports Debian 12 and Ubuntu 24.04, and this is $name." ;;
  esac
  case "$(uname -m)" in
    x86_64 | aarch64) ;;
    *) resa_die "this script supports x86-64 and 64-bit Arm, and this is $(uname -m)." ;;
  esac
}

resa_installed() {
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# resa_install PACKAGE...: installs those that are missing.
resa_install() {
  local missing=() package
  for package in "$@"; do
    resa_installed "$package" || missing+=("$package")
  done
  if [ ${#missing[@]} -eq 0 ]; then
    resa_say "All ${#} packages are installed."
    return
  fi
  local root=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || resa_die "run as root, or install sudo: ${missing[*]} are missing."
    sudo -n true 2>/dev/null || [ -t 0 ] ||
      resa_die "sudo needs a password and there is no terminal: install ${missing[*]} first."
    root=(sudo)
  fi
  resa_say "Installing ${#missing[@]} packages with apt: ${missing[*]}"
  "${root[@]}" apt-get update -qq || resa_die "apt-get update failed (see above)."
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    "${missing[@]}" >/dev/null || resa_die "apt-get install failed (see above)."
}

# resa_setup [--tests]
resa_setup() {
  resa_check_system
  if [ "${1:-}" = --tests ]; then
    resa_install "${resa_build_packages[@]}" "${resa_test_packages[@]}"
  else
    resa_install "${resa_build_packages[@]}"
  fi
}

# resa_build PRESET TARGET...: configures when needed and builds, with ninja's progress line.
resa_build() {
  local preset=$1
  shift
  # One cache for every checkout on the machine: relative paths make their objects the same.
  export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1
  resa_say "Building $* ($preset); the first build takes some minutes, later ones seconds."
  cmake --preset "$preset" >"build-$preset.log" 2>&1 || {
    cat "build-$preset.log" >&2
    rm -f "build-$preset.log"
    resa_die "cmake could not configure the build (see above)."
  }
  rm -f "build-$preset.log"
  cmake --build --preset "$preset" --target "$@" || resa_die "the build failed (see above)."
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  cd "$(dirname "$0")/.."
  resa_setup "$@"
fi
