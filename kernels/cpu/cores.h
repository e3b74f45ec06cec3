#ifndef RESA_KERNELS_CPU_CORES_H_
#define RESA_KERNELS_CPU_CORES_H_

#include <optional>
#include <string>

namespace resa::kernels::cpu {

// The CPU quota of a process in cores, rounded down but at least 1; none when there is no limit.
// `mount` is where cgroups are mounted (/sys/fs/cgroup), `membership` the content of
// /proc/self/cgroup. The tightest limit on the way from the process's group to the root counts;
// both versions are understood (v2: cpu.max; v1: cpu.cfs_quota_us and cpu.cfs_period_us).
std::optional<int> CgroupCores(const std::string& mount, const std::string& membership);

}  // namespace resa::kernels::cpu

#endif  // RESA_KERNELS_CPU_CORES_H_
