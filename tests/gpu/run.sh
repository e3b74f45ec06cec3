#!/usr/bin/env bash
# Tests the CUDA backend. Builds what travels to a machine with the GPU, a folder that needs nothing
# there but the driver and the CUDA runtime: no compiler, no toolkit, no network, no package. Beside
# the suite it holds the benches.
#
#   tests/gpu/run.sh           makes build/gpu-suite; copy it there and start its run_suite.sh
#   tests/gpu/run.sh --here    makes it and runs it on this machine; further arguments go to
#                              run_suite.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
source deploy/setup.sh

# is_everywhere LIBRARY: part of any Linux that has the driver, or of the driver or toolkit itself.
is_everywhere() {
  case "$1" in
    linux-vdso* | ld-linux* | libc.so* | libm.so* | libdl.so* | librt.so* | libpthread.so*) ;;
    libcublas* | libcudart* | libcuda.so*) ;;
    *) return 1 ;;
  esac
}

resa_setup
resa_build cuda-suite gpu_suite resa_bench kernel_bench
out=build/gpu-suite
rm -rf "$out"
mkdir -p "$out/lib" "$out/deploy/models/demo"
for target in gpu/gpu_suite bench/resa_bench bench/kernel_bench; do
  binary=build/cuda-suite/tests/$target
  strip -o "$out/$(basename "$binary")" "$binary"
  while read -r name path; do
    is_everywhere "$name" || strip -o "$out/lib/$name" "$path"
  done < <(ldd "$binary" | awk '$2 == "=>" && $3 ~ /^\// { print $1, $3 }')
done
cp tests/gpu/run_suite.sh tests/gpu/compare_flash_attention.py "$out/"
size=$(du -sm "$out" | cut -f1)
cp -r deploy/models/demo/*.json deploy/models/demo/model.safetensors deploy/models/demo/examples \
  "$out/deploy/models/demo/"
resa_say "$out: $size MB and the demo model."
if [ "${1:-}" = --here ]; then
  shift
  exec "$out/run_suite.sh" "$@"
fi
resa_say "Copy it to a machine with a Hopper GPU and start run_suite.sh there."
