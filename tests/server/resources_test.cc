#include "server/resources.h"

#include <filesystem>
#include <fstream>
#include <map>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace resa::server {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30;

// A made-up /proc and /sys.
class ResourcesTest : public testing::Test {
 protected:
  void SetUp() override {
    root_ = testing::TempDir() + "/resources_test_" +
            testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(root_);
    Write("/proc/meminfo", "MemTotal:  33554432 kB\nMemFree: 1 kB\nMemAvailable: 16777216 kB\n");
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  void Write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }

  std::string root_;
};

TEST_F(ResourcesTest, WithoutCgroupsTheKernelsFigureCounts) {
  EXPECT_EQ(MemoryAvailable(root_).value(), 16 * kGiB);
}

TEST_F(ResourcesTest, CgroupV2LimitCountsAndPageCacheIsFree) {
  Write("/proc/self/cgroup", "0::/kube/pod\n");
  Write("/sys/fs/cgroup/kube/pod/memory.max", std::to_string(4 * kGiB) + "\n");
  Write("/sys/fs/cgroup/kube/pod/memory.current", std::to_string(3 * kGiB) + "\n");
  Write("/sys/fs/cgroup/kube/pod/memory.stat", "anon 5\ninactive_file " + std::to_string(kGiB) +
                                                   "\nactive_file " + std::to_string(kGiB) +
                                                   "\nactive_file_other 77\n");
  EXPECT_EQ(MemoryAvailable(root_).value(), 3 * kGiB);
}

TEST_F(ResourcesTest, TheTightestCgroupOnThePathCounts) {
  Write("/proc/self/cgroup", "0::/kube/pod\n");
  Write("/sys/fs/cgroup/kube/memory.max", std::to_string(2 * kGiB));
  Write("/sys/fs/cgroup/kube/memory.current", std::to_string(kGiB));
  Write("/sys/fs/cgroup/kube/pod/memory.max", "max\n");
  Write("/sys/fs/cgroup/kube/pod/memory.current", "1");
  EXPECT_EQ(MemoryAvailable(root_).value(), kGiB);
}

TEST_F(ResourcesTest, CgroupV1LimitCountsFromTheContainersOwnRoot) {
  // The path is the host's; inside the container only the mount's root exists.
  Write("/proc/self/cgroup", "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n");
  Write("/sys/fs/cgroup/memory/memory.limit_in_bytes", std::to_string(8 * kGiB));
  Write("/sys/fs/cgroup/memory/memory.usage_in_bytes", std::to_string(2 * kGiB));
  Write("/sys/fs/cgroup/memory/memory.stat",
        "inactive_file 1\ntotal_inactive_file " + std::to_string(kGiB) + "\n");
  EXPECT_EQ(MemoryAvailable(root_).value(), 7 * kGiB);
}

TEST_F(ResourcesTest, AFullCgroupHasNothingLeft) {
  Write("/sys/fs/cgroup/memory.max", std::to_string(kGiB));
  Write("/sys/fs/cgroup/memory.current", std::to_string(2 * kGiB));
  EXPECT_EQ(MemoryAvailable(root_).value(), 0);
}

TEST_F(ResourcesTest, AnUnreadableMeminfoIsAnError) {
  Write("/proc/meminfo", "");
  EXPECT_EQ(MemoryAvailable(root_).status().code(), absl::StatusCode::kUnavailable);
}

kernels::KvLayout SmallLayout() {
  kernels::KvLayout layout;
  layout.num_layers = 2;
  layout.num_kv_heads = 2;
  layout.head_dim = 64;
  return layout;
}

TEST(PoolPagesTest, ASizeIsWholePages) {
  const kernels::KvLayout layout = SmallLayout();
  const int64_t page = layout.PageBytes();
  EXPECT_EQ(PoolPagesFor(layout, 10 * page + page - 1).value(), 10);
  EXPECT_EQ(PoolPagesFor(layout, page - 1).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(PoolPagesTest, TheDefaultIsAShareOfWhatIsFreeButNoMoreThanIsUseful) {
  const kernels::KvLayout layout = SmallLayout();
  const int64_t page = layout.PageBytes();
  // 3 contexts of 1,600 tokens are 300 pages.
  EXPECT_EQ(DefaultPoolPages(layout, {1600, 3, 0}, 1000 * page).value(), 300);
  EXPECT_EQ(DefaultPoolPages(layout, {1600, 3, 0}, 400 * page).value(), 240);
  const auto too_little = DefaultPoolPages(layout, {1600, 3, 0}, 100 * page);
  EXPECT_EQ(too_little.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(too_little.status().message()), testing::HasSubstr("--max-context"));
}

TEST(PoolPagesTest, TheDefaultLeavesRoomForActivations) {
  const kernels::KvLayout layout = SmallLayout();
  const int64_t page = layout.PageBytes();
  EXPECT_EQ(DefaultPoolPages(layout, {1600, 3, 100 * page}, 500 * page).value(), 240);
  const auto too_little = DefaultPoolPages(layout, {1600, 3, 400 * page}, 500 * page);
  EXPECT_EQ(too_little.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(too_little.status().message()), testing::HasSubstr("activations"));
  EXPECT_THAT(std::string(too_little.status().message()), testing::HasSubstr("--max-step-tokens"));
  EXPECT_EQ(DefaultPoolPages(layout, {1600, 3, 600 * page}, 500 * page).status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST(PoolPagesTest, ADeviceHoldsWeightsTooAndGivesAGreaterShare) {
  const kernels::KvLayout layout = SmallLayout();
  const int64_t page = layout.PageBytes();
  PoolDemand demand = {.max_context = 1600, .max_sequences = 100};
  demand.weight_bytes = 300 * page;
  demand.share = kDevicePoolShare;
  EXPECT_EQ(DefaultPoolPages(layout, demand, 1300 * page).value(), 950);
  const auto too_little = DefaultPoolPages(layout, demand, 350 * page);
  EXPECT_THAT(std::string(too_little.status().message()), testing::HasSubstr("to weights"));
}

TEST(FormatBytesTest, UsesTheLargestUnit) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1536), "1.5 KiB");
  EXPECT_EQ(FormatBytes(3 * kGiB), "3.0 GiB");
}

}  // namespace
}  // namespace resa::server
