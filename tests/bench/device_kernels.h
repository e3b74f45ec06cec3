#ifndef RESA_TESTS_BENCH_DEVICE_KERNELS_H_
#define RESA_TESTS_BENCH_DEVICE_KERNELS_H_

// The kernels that decide a device's step, each alone, at the shapes the targets are set for.

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/ops.h"

namespace resa::bench {

// Prints a line for each case whose name holds `filter`: time of one op, bytes/s, FLOP/s and the
// share of the ceiling that binds, which is measured first. An op is called once for each of
// several layers with caches of their own, past what the device's cache holds, in one step that is
// recorded and replayed as in service; the time is a layer's share of that.
using MakeOps = std::function<absl::StatusOr<std::unique_ptr<kernels::Ops>>()>;
absl::Status BenchDeviceKernels(const std::string& filter, const MakeOps& make);

}  // namespace resa::bench

#endif  // RESA_TESTS_BENCH_DEVICE_KERNELS_H_
