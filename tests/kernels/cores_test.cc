#include "kernels/cpu/cores.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

#include "kernels/cpu/cpu_ops.h"

namespace resa::kernels::cpu {
namespace {

class CoresTest : public ::testing::Test {
 protected:
  CoresTest()
      : mount_(std::filesystem::path(::testing::TempDir()) /
               ("cgroup_" + std::to_string(::getpid()))) {
    std::filesystem::create_directories(mount_);
  }
  ~CoresTest() override { std::filesystem::remove_all(mount_); }

  void Write(const std::string& path, const std::string& content) {
    std::filesystem::create_directories((mount_ / path).parent_path());
    std::ofstream(mount_ / path) << content;
  }
  std::optional<int> Cores(const std::string& membership) const {
    return CgroupCores(mount_.string(), membership);
  }

 private:
  const std::filesystem::path mount_;
};

TEST_F(CoresTest, NoLimitGivesNone) {
  EXPECT_EQ(Cores("0::/\n"), std::nullopt);
  Write("cpu.max", "max 100000\n");
  EXPECT_EQ(Cores("0::/\n"), std::nullopt);
  Write("cpu/cpu.cfs_quota_us", "-1\n");
  Write("cpu/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(Cores("3:cpu,cpuacct:/\n"), std::nullopt);
}

TEST_F(CoresTest, VersionTwoTakesTheTightestGroupOnTheWayUp) {
  Write("a/cpu.max", "250000 100000\n");
  Write("a/b/cpu.max", "max 100000\n");
  Write("a/b/c/cpu.max", "800000 100000\n");
  EXPECT_EQ(Cores("0::/a/b/c\n"), 2);
  EXPECT_EQ(Cores("0::/other\n"), std::nullopt);
}

TEST_F(CoresTest, VersionOneReadsTheCpuController) {
  Write("cpu,cpuacct/pod/cpu.cfs_quota_us", "350000\n");
  Write("cpu,cpuacct/pod/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(Cores("5:memory:/pod\n4:cpu,cpuacct:/pod\n"), 3);
  EXPECT_EQ(Cores("5:cpuset:/pod\n"), std::nullopt);
}

// A container sees the host's path but only its own group, mounted as the root.
TEST_F(CoresTest, ForeignPathFallsBackToTheMountsRoot) {
  Write("cpu/cpu.cfs_quota_us", "200000\n");
  Write("cpu/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(Cores("4:cpu:/kubepods/pod7/abc\n"), 2);
}

TEST_F(CoresTest, LessThanOneCoreIsOne) {
  Write("cpu.max", "50000 100000\n");
  EXPECT_EQ(Cores("0::/\n"), 1);
}

TEST_F(CoresTest, NonsenseIsIgnored) {
  Write("cpu.max", "lots of it\n");
  EXPECT_EQ(Cores("0::/\n"), std::nullopt);
  EXPECT_EQ(Cores("no colons here\n"), std::nullopt);
  EXPECT_EQ(Cores(""), std::nullopt);
}

TEST(AvailableCoresTest, FollowsTheAffinityMask) {
  EXPECT_GE(AvailableCores(), 1);
  std::thread([] {
    cpu_set_t all;
    ASSERT_EQ(sched_getaffinity(0, sizeof(all), &all), 0);
    cpu_set_t one;
    CPU_ZERO(&one);
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &all)) continue;
      CPU_SET(cpu, &one);
      break;
    }
    ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
    EXPECT_EQ(AvailableCores(), 1);
  }).join();
}

}  // namespace
}  // namespace resa::kernels::cpu
