#!/usr/bin/env bash
# Passes the tests: installs what is missing, builds, and runs the whole suite. Idempotent.
#
#   tests/run.sh                 everything that continuous integration runs; the GPU's kernels are
#                                compiled where nvcc is (tests/gpu/run.sh runs them)
#   tests/run.sh --quick         the release build's tests only
#   tests/run.sh --sanitize-all  the sanitizers over every test, not only unit tests, simulation and
#                                the daemon's (the last without ThreadSanitizer)
set -euo pipefail
cd "$(dirname "$0")/.."
source deploy/setup.sh

sanitize="unit|sim|e2e"
quick=no
for argument in "$@"; do
  case "$argument" in
    --quick) quick=yes ;;
    --sanitize-all) sanitize=".*" ;;
    *) resa_die "unknown argument $argument; see the head of tests/run.sh" ;;
  esac
done

fuzz_seconds=10
jobs=$(nproc)
start=$SECONDS

resa_setup --tests
resa_say "Fetching the real model (SmolLM2-135M-Instruct, 93 MB, once)."
smollm2=$(deploy/models/fetch_smollm2.sh)

venv=build/venv
if ! "$venv/bin/python" -c 'import tokenizers, gguf, jinja2' 2>/dev/null; then
  resa_say "Making a Python environment with the tokenizers library, to compare with."
  python3 -m venv "$venv"
  "$venv/bin/pip" install -q --disable-pip-version-check -r tests/requirements.txt
fi
export RESA_REQUIRE_SMOLLM2=1

# run_tests PRESET LABELS [CTEST_ARGUMENT...]: ctest, its output shown where a test fails.
run_tests() {
  resa_say "Running the tests of $1."
  ctest --test-dir "build/$1" -L "$2" -j "$jobs" --output-on-failure --no-tests=error "${@:3}"
}

resa_build cpu-release all
run_tests cpu-release ".*"
resa_say "Comparing the tokenizer with the tokenizers library on SmolLM2's vocabulary."
"$venv/bin/python" tests/golden/compare_tokenizer.py \
  build/cpu-release/tests/golden/tokenizer_tool "$smollm2" --seconds 15

# The GPU's kernels compile wherever nvcc is; tests/gpu/run.sh runs them where a GPU is.
if command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
  resa_build cuda-release resad resactl resa_bench process_test cuda_ops_test
  run_tests cuda-release ".*" -R "^(process|cuda_ops)_test$"
else
  resa_say "No nvcc here: the CUDA backend is not compiled."
fi

if [ "$quick" = no ]; then
  target=resa_sanitized_tests
  [ "$sanitize" = ".*" ] && target=all
  export ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1
  for preset in cpu-asan cpu-tsan; do
    resa_build "$preset" "$target"
    run_tests "$preset" "$sanitize"
  done

  resa_build cpu-fuzz resa_fuzzers
  for fuzzer in build/cpu-fuzz/tests/fuzz/*_fuzz; do
    resa_say "Fuzzing with $(basename "$fuzzer") for $fuzz_seconds s."
    corpus=build/corpus/$(basename "$fuzzer")
    mkdir -p "$corpus"
    "$fuzzer" -max_total_time=$fuzz_seconds -rss_limit_mb=2048 -timeout=10 -print_final_stats=0 \
      "$corpus" "tests/fuzz/corpus/$(basename "$fuzzer")" 2>build/fuzz.log || {
      tail -40 build/fuzz.log >&2
      resa_die "$(basename "$fuzzer") found a fault (see above)."
    }
    tail -1 build/fuzz.log
  done
fi

resa_say "All tests passed in $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s."
