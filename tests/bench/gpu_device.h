#ifndef RESA_TESTS_BENCH_GPU_DEVICE_H_
#define RESA_TESTS_BENCH_GPU_DEVICE_H_

// The GPU as a device of a bench.

#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/ops.h"

namespace resa::bench {

// The backend of "cuda:N", or "cuda" for the first. INVALID_ARGUMENT for another name, UNAVAILABLE
// with the reason where it is not built in or the device cannot be used.
absl::StatusOr<std::unique_ptr<kernels::Ops>> MakeGpuOps(absl::string_view name);

}  // namespace resa::bench

#endif  // RESA_TESTS_BENCH_GPU_DEVICE_H_
