#include "server/resources.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace resa::server {
namespace {

std::optional<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path);
  if (!file) return std::nullopt;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// A file that holds one number. "max" and everything else that is not a number is nothing.
std::optional<int64_t> ReadNumber(const std::string& path) {
  const std::optional<std::string> text = ReadFile(path);
  int64_t value = 0;
  if (!text.has_value() || !absl::SimpleAtoi(*text, &value)) return std::nullopt;
  return value;
}

// The number behind `key` in lines of the form "key value" or "key: value kB", or 0.
int64_t ReadField(const std::string& path, absl::string_view key) {
  for (absl::string_view line : absl::StrSplit(ReadFile(path).value_or(""), '\n')) {
    if (!absl::ConsumePrefix(&line, key)) continue;
    if (!absl::ConsumePrefix(&line, ":") && !absl::StartsWith(line, " ")) continue;
    const std::vector<absl::string_view> words =
        absl::StrSplit(line, absl::ByAnyChar(" \t"), absl::SkipEmpty());
    int64_t value = 0;
    if (!words.empty() && absl::SimpleAtoi(words[0], &value)) return value;
  }
  return 0;
}

// The folders of this process's cgroup and of those above it, for a version 1 controller, or for
// version 2 when `controller` is empty. A container may see its own cgroup as the root of the
// mount while /proc names it from the host's root; folders that are not there are harmless.
std::vector<std::string> CgroupFolders(const std::string& root, absl::string_view controller) {
  const std::string mount =
      absl::StrCat(root, "/sys/fs/cgroup", controller.empty() ? "" : "/", controller);
  std::vector<std::string> folders = {mount};
  for (absl::string_view line :
       absl::StrSplit(ReadFile(root + "/proc/self/cgroup").value_or(""), '\n')) {
    // "hierarchy:controllers:path"; version 2 has hierarchy 0 and no controllers.
    const std::vector<absl::string_view> parts = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (parts.size() != 3) continue;
    const std::vector<absl::string_view> controllers = absl::StrSplit(parts[1], ',');
    if (std::find(controllers.begin(), controllers.end(), controller) == controllers.end()) {
      continue;
    }
    std::string folder = mount;
    for (absl::string_view name : absl::StrSplit(parts[2], '/', absl::SkipEmpty())) {
      absl::StrAppend(&folder, "/", name);
      folders.push_back(folder);
    }
  }
  return folders;
}

// What a cgroup has left, page cache counted as free, or nothing when it has no limit.
std::optional<int64_t> CgroupMemoryLeft(const std::string& folder, bool v2) {
  const auto limit = ReadNumber(folder + (v2 ? "/memory.max" : "/memory.limit_in_bytes"));
  const auto used = ReadNumber(folder + (v2 ? "/memory.current" : "/memory.usage_in_bytes"));
  if (!limit.has_value() || !used.has_value()) return std::nullopt;
  const std::string stat = folder + "/memory.stat";
  const std::string prefix = v2 ? "" : "total_";
  const int64_t cache =
      ReadField(stat, prefix + "inactive_file") + ReadField(stat, prefix + "active_file");
  return std::max<int64_t>(0, *limit - std::max<int64_t>(0, *used - cache));
}

}  // namespace

absl::StatusOr<int64_t> MemoryAvailable(const std::string& root) {
  int64_t available = ReadField(root + "/proc/meminfo", "MemAvailable") * 1024;
  if (available <= 0) {
    return absl::UnavailableError(
        "cannot read MemAvailable from /proc/meminfo; give the pool's size with --pool-memory");
  }
  for (const bool v2 : {false, true}) {
    for (const std::string& folder : CgroupFolders(root, v2 ? "" : "memory")) {
      if (const auto left = CgroupMemoryLeft(folder, v2)) available = std::min(available, *left);
    }
  }
  return available;
}

absl::StatusOr<int64_t> PoolPagesFor(const kernels::KvLayout& layout, int64_t bytes) {
  const int64_t page = static_cast<int64_t>(layout.PageBytes());
  if (bytes < page) {
    return absl::InvalidArgumentError(
        absl::StrCat("--pool-memory: ", FormatBytes(bytes), " is less than one page of ",
                     kernels::kPageTokens, " tokens (", FormatBytes(page), ")"));
  }
  return std::min<int64_t>(bytes / page, std::numeric_limits<int32_t>::max());
}

absl::StatusOr<int64_t> DefaultPoolPages(const kernels::KvLayout& layout, const PoolDemand& demand,
                                         int64_t available) {
  const int64_t page = static_cast<int64_t>(layout.PageBytes());
  const int64_t left =
      std::max<int64_t>(0, available - demand.activation_bytes - demand.weight_bytes);
  const int64_t fitting = static_cast<int64_t>(demand.share * left) / page;
  const int64_t context_pages =
      (int64_t{demand.max_context} + kernels::kPageTokens - 1) / kernels::kPageTokens;
  if (fitting < context_pages) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "one context of ", demand.max_context, " tokens needs ", FormatBytes(context_pages * page),
        " of KV pool, but ", absl::StrFormat("%.0f%%", demand.share * 100), " of the ",
        FormatBytes(left), " available is ", FormatBytes(fitting * page), " (",
        FormatBytes(demand.activation_bytes), " went to activations",
        demand.weight_bytes > 0
            ? absl::StrCat(", ", FormatBytes(demand.weight_bytes), " to weights")
            : "",
        ")", "; lower --max-context or --max-step-tokens, or set --pool-memory"));
  }
  const int64_t wanted = context_pages * demand.max_sequences;
  return std::min<int64_t>(std::min(fitting, wanted), std::numeric_limits<int32_t>::max());
}

std::string FormatBytes(int64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  return absl::StrFormat("%.*f %s", unit == 0 ? 0 : 1, value, kUnits[unit]);
}

}  // namespace resa::server
