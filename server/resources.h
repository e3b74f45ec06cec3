#ifndef RESA_SERVER_RESOURCES_H_
#define RESA_SERVER_RESOURCES_H_

// What memory this process may use: the limits of its container, not those of the host.

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/params.h"

namespace resa::server {

// Bytes that can still be had: the kernel's MemAvailable, and what every cgroup above this process
// (version 1 or 2) has left of its limit, page cache counted as free. UNAVAILABLE when
// /proc/meminfo cannot be read. `root` is where /proc and /sys are, for tests.
absl::StatusOr<int64_t> MemoryAvailable(const std::string& root = "");

// Share of the available memory, less what activations and weights take, that the KV pool takes
// unless told otherwise. The rest is for requests and everybody else.
inline constexpr double kDefaultPoolShare = 0.6;
// The same on a GPU, which nobody else shares: the rest is for the kernels' workspaces.
inline constexpr double kDevicePoolShare = 0.95;

struct PoolDemand {
  int32_t max_context = 0;
  int32_t max_sequences = 0;
  int64_t activation_bytes = 0;  // What a step's workspace takes beside the pool.
  // What will be copied to a device; on the CPU what is mapped, which counts as available but is
  // read in every step.
  int64_t weight_bytes = 0;
  double share = kDefaultPoolShare;
};

// Pages of a default pool: its share of the `available` bytes that activations and weights leave,
// but no more than max_sequences full contexts need. RESOURCE_EXHAUSTED, with the numbers, when not
// even one full context fits.
absl::StatusOr<int64_t> DefaultPoolPages(const kernels::KvLayout& layout, const PoolDemand& demand,
                                         int64_t available);
// Pages of a pool of `bytes`. INVALID_ARGUMENT when that is not even one page.
absl::StatusOr<int64_t> PoolPagesFor(const kernels::KvLayout& layout, int64_t bytes);

// "3.2 GiB"
std::string FormatBytes(int64_t bytes);

}  // namespace resa::server

#endif  // RESA_SERVER_RESOURCES_H_
