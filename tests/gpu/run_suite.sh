#!/usr/bin/env bash
# The GPU suite, on the machine that has the GPU, from the folder that tests/gpu/run.sh made. Exits
# with 0 when everything passed. Needs the driver and libcublasLt; nothing is installed.
#
#   run_suite.sh                    kernels, whole models, then the same under compute-sanitizer
#   run_suite.sh --no-sanitizer     the tests alone
#   run_suite.sh --filter PATTERN   tests whose name holds PATTERN
#   run_suite.sh --logs FOLDER      where each test's output goes (logs)
#
# Each test is a process of its own: a CUDA error ends its test and no other.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
logs=$here/logs
filter=.
sanitize=yes
while [ $# -gt 0 ]; do
  case "$1" in
    --no-sanitizer) sanitize=no ;;
    --filter) filter=$2; shift ;;
    --logs) logs=$2; shift ;;
    *) echo "unknown argument $1; see the head of $0" >&2; exit 2 ;;
  esac
  shift
done
mkdir -p "$logs"
export RESA_SOURCE_DIR=${RESA_SOURCE_DIR:-$here}
export RESA_GPU_SUITE=$here/gpu_suite LOGS=$logs

# The driver's machine may keep the toolkit's libraries anywhere.
cublas=$(ldconfig -p 2>/dev/null | awk '/libcublasLt\.so\.1[0-9]/ { print $NF; exit }')
if [ -z "$cublas" ]; then
  cublas=$(find /usr/local/cuda*/ /opt /usr/lib -name 'libcublasLt.so.1?' 2>/dev/null | head -1)
fi
[ -n "$cublas" ] || { echo "libcublasLt was not found: install the CUDA runtime" >&2; exit 2; }
export LD_LIBRARY_PATH=$here/lib:$(dirname "$cublas")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

# tests_of PATTERN: full names of the tests on the GPU.
tests_of() {
  "$RESA_GPU_SUITE" --gtest_list_tests 2>/dev/null |
    awk '/^[^ ]/ { suite = $1; next } $1 ~ /\/cuda$/ { print suite $1 }' | grep -E "$1" || true
}

# run_one KIND NAME: one test, under compute-sanitizer's tool KIND or (test) without.
run_one() {
  local kind=$1 name=$2 start=$SECONDS result=passed
  local log=$LOGS/$kind.${name//\//_}.log
  local limit=120 tool=()
  if [ "$kind" != test ]; then
    limit=600
    tool=(compute-sanitizer --tool "$kind" --error-exitcode 9)
  fi
  timeout -k 5 "$limit" "${tool[@]}" "$RESA_GPU_SUITE" --gtest_filter="$name" >"$log" 2>&1 ||
    result="FAILED ($?)"
  # A test that was skipped, or that no longer exists, proves nothing; nor does a sanitizer that
  # did not attach, or that has only warned.
  grep -q '^\[  PASSED  \] 1 test' "$log" || [ "$result" != passed ] || result="did not run"
  if [ "$kind" != test ] && [ "$result" = passed ]; then
    grep -qE 'SUMMARY: 0 (errors|hazards)' "$log" || result="not clean"
  fi
  printf '%-9s %-12s %4d s  %s\n' "$kind" "$result" $((SECONDS - start)) "$name" |
    tee -a "$LOGS/table.txt"
}
export -f run_one

# run_all KIND: the tests named on standard input, several at once: the references run on the CPU.
at_once=$((($(nproc) + 1) / 2))
run_all() { xargs -r -P "$at_once" -I{} bash -c 'run_one "$@"' _ "$1" {}; }

: >"$logs/table.txt"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
total=$(tests_of "$filter" | wc -l)
[ "$total" -gt 0 ] || {
  echo "no tests: either no GPU that the backend takes is here, or none matches $filter" >&2
  exit 2
}
tests_of "$filter" | run_all test

# Whole models run the same kernels a thousand times: one of those tests is enough. Racecheck makes
# kernels so slow, a launch of Sample takes it seconds, that those tests are left out which bring
# more data or more settings to kernels that others run.
if [ "$sanitize" = yes ]; then
  export PATH=$PATH:/usr/local/cuda/bin
  if command -v compute-sanitizer >/dev/null; then
    skip='DeviceTest\.(Random|TheDemo|InDet)'
    tests_of "$filter" | { grep -vE "$skip" || true; } | run_all memcheck
    skip="$skip|RandomIds|LongContexts|BatchAndThreads|DeviceTest"
    skip="$skip|SampleTest\.(Filters|Bias|Equal|Frequencies|OtherRows)"
    tests_of "$filter" | { grep -vE "$skip" || true; } | run_all racecheck
  else
    echo "compute-sanitizer is not here: memcheck and racecheck were left out"
  fi
fi

grep -h "near ties\|window [0-9]*:" "$logs"/test.*.log 2>/dev/null || true
failed=$(grep -cv ' passed ' "$logs/table.txt" || true)
if [ "$failed" -gt 0 ]; then
  grep -v ' passed ' "$logs/table.txt" | awk '{ print $NF }' | sort -u | while read -r name; do
    for log in "$logs"/*."${name//\//_}".log; do
      echo "--- $(basename "$log")"
      grep -E 'Failure|check failed|rror|Which is|actual|Expected|near|SUMMARY|hazard' "$log" |
        head -12
    done
  done
fi
echo "$(wc -l <"$logs/table.txt") runs in $SECONDS s, $failed of them not passed"
[ "$failed" -eq 0 ]
