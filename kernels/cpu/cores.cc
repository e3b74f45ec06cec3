#include "kernels/cpu/cores.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string_view>
#include <thread>

#include "kernels/cpu/cpu_ops.h"

namespace resa::kernels {
namespace cpu {
namespace {

std::string ReadAll(const std::string& path) {
  std::ifstream file(path);
  std::stringstream content;
  content << file.rdbuf();
  return content.str();
}

// Cores of one group, or none when the file is missing or says "no limit".
std::optional<double> QuotaV2(const std::string& group) {
  std::istringstream line(ReadAll(group + "/cpu.max"));
  double quota = 0, period = 0;
  if (!(line >> quota >> period) || quota <= 0 || period <= 0) return std::nullopt;
  return quota / period;
}

std::optional<double> QuotaV1(const std::string& group) {
  std::istringstream quota_file(ReadAll(group + "/cpu.cfs_quota_us"));
  std::istringstream period_file(ReadAll(group + "/cpu.cfs_period_us"));
  double quota = 0, period = 0;
  if (!(quota_file >> quota) || !(period_file >> period) || quota <= 0 || period <= 0) {
    return std::nullopt;
  }
  return quota / period;
}

// The tightest quota of `path` and the groups above it, below `root`.
template <class Quota>
std::optional<double> Tightest(const std::string& root, std::string path, const Quota& quota) {
  std::optional<double> least;
  for (;;) {
    if (const std::optional<double> cores = quota(root + path)) {
      least = std::min(least.value_or(*cores), *cores);
    }
    const size_t slash = path.rfind('/');
    if (path.empty() || slash == std::string::npos) return least;
    path.resize(slash);
  }
}

bool HasController(std::string_view controllers, std::string_view wanted) {
  while (!controllers.empty()) {
    const size_t comma = controllers.find(',');
    if (controllers.substr(0, comma) == wanted) return true;
    if (comma == std::string_view::npos) return false;
    controllers.remove_prefix(comma + 1);
  }
  return false;
}

}  // namespace

std::optional<int> CgroupCores(const std::string& mount, const std::string& membership) {
  // Lines are "hierarchy:controllers:path"; v2 has hierarchy 0 and no controllers.
  std::optional<double> least;
  const auto take = [&least](std::optional<double> cores) {
    if (cores) least = std::min(least.value_or(*cores), *cores);
  };
  std::istringstream lines(membership);
  for (std::string line; std::getline(lines, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    if (path == "/") path.clear();
    if (controllers.empty()) {
      take(Tightest(mount, path, QuotaV2));
    } else if (HasController(controllers, "cpu")) {
      // In a container the path is the host's and may not exist below the mount; the mount's root
      // is then the container's own group, which Tightest reaches as well.
      take(Tightest(mount + "/" + controllers, path, QuotaV1));
      take(Tightest(mount + "/cpu", path, QuotaV1));
    }
  }
  if (!least) return std::nullopt;
  return std::max(1, static_cast<int>(*least));
}

}  // namespace cpu

int AvailableCores() {
  int cores = static_cast<int>(std::thread::hardware_concurrency());
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) cores = CPU_COUNT(&set);
  const std::optional<int> quota =
      cpu::CgroupCores("/sys/fs/cgroup", cpu::ReadAll("/proc/self/cgroup"));
  return std::max(1, std::min(cores, quota.value_or(cores)));
}

}  // namespace resa::kernels
