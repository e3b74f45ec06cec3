#include "server/health.h"

#include <atomic>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace resa::server {
namespace {

using ::testing::ElementsAre;

constexpr absl::Time kStart = absl::UnixEpoch();

engine::EngineLoad Load(int32_t running, int32_t waiting, int64_t steps) {
  engine::EngineLoad load;
  load.running = running;
  load.waiting = waiting;
  load.steps = steps;
  return load;
}

TEST(ProgressWatchTest, AnIdleEngineIsNeverStuck) {
  ProgressWatch watch(absl::Seconds(30));
  for (int minute = 0; minute < 10; ++minute) {
    EXPECT_TRUE(watch.Update(Load(0, 0, 5), kStart + absl::Minutes(minute)));
  }
}

TEST(ProgressWatchTest, WorkWithoutStepsIsStuckAfterTheTimeout) {
  ProgressWatch watch(absl::Seconds(30));
  EXPECT_TRUE(watch.Update(Load(0, 0, 5), kStart));
  EXPECT_TRUE(watch.Update(Load(0, 1, 5), kStart + absl::Seconds(20)));
  EXPECT_TRUE(watch.Update(Load(1, 0, 5), kStart + absl::Seconds(29)));
  EXPECT_FALSE(watch.Update(Load(1, 0, 5), kStart + absl::Seconds(30)));
  // A step, and it is well again.
  EXPECT_TRUE(watch.Update(Load(1, 0, 6), kStart + absl::Seconds(31)));
  EXPECT_TRUE(watch.Update(Load(1, 0, 6), kStart + absl::Seconds(60)));
  EXPECT_FALSE(watch.Update(Load(1, 0, 6), kStart + absl::Seconds(61)));
}

TEST(ProgressWatchTest, OldIdlenessDoesNotCountAgainstNewWork) {
  ProgressWatch watch(absl::Seconds(30));
  EXPECT_TRUE(watch.Update(Load(0, 0, 5), kStart));
  EXPECT_TRUE(watch.Update(Load(0, 0, 5), kStart + absl::Hours(1)));
  EXPECT_TRUE(watch.Update(Load(1, 0, 5), kStart + absl::Hours(1) + absl::Seconds(1)));
}

TEST(HealthMonitorTest, GoesFromLoadingToServingToDraining) {
  std::vector<Readiness> seen;
  HealthMonitor monitor([&](Readiness readiness) { seen.push_back(readiness); });
  monitor.StartServing([] { return engine::EngineLoad(); });
  EXPECT_EQ(monitor.state(), Readiness::kServing);
  monitor.StartDraining();
  monitor.StartDraining();
  monitor.Stop();
  EXPECT_THAT(seen, ElementsAre(Readiness::kLoading, Readiness::kServing, Readiness::kDraining));
}

TEST(HealthMonitorTest, DrainingWhileLoadingStaysDraining) {
  HealthMonitor monitor([](Readiness) {});
  monitor.StartDraining();
  monitor.StartServing([] { return engine::EngineLoad(); });
  monitor.Stop();
  EXPECT_EQ(monitor.state(), Readiness::kDraining);
}

TEST(HealthMonitorTest, LooksAtTheEngineUntilStopped) {
  std::atomic<int> looks = 0;
  HealthMonitor monitor([](Readiness) {});
  monitor.StartServing([&] {
    ++looks;
    return engine::EngineLoad();
  });
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  while (looks < 2 && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(10));
  EXPECT_GE(looks, 2);
  monitor.Stop();
  const int after = looks;
  absl::SleepFor(absl::Milliseconds(600));
  EXPECT_EQ(looks, after);
}

}  // namespace
}  // namespace resa::server
