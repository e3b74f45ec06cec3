#include "server/health.h"

#include <atomic>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "engine/clock.h"
#include "engine/engine.h"
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

// A device that does not answer.
class HangingExecutor final : public engine::Executor {
 public:
  absl::Notification entered, released;

 private:
  absl::Status DoExecute(const engine::StepInput& input, engine::StepOutput* output,
                         absl::FunctionRef<void()> meanwhile) override {
    meanwhile();
    entered.Notify();
    released.WaitForNotification();
    for (const engine::SegmentInput& segment : input.segments) {
      if (segment.sample.has_value()) output->samples.emplace_back();
    }
    return absl::OkStatus();
  }
};

class SilentSink final : public engine::OutputSink {
  void OnAccepted(int32_t, int32_t) override {}
  bool OnDelta(const engine::Delta&) override { return true; }
  void OnFinished(engine::Finished) override {}
  void OnError(const absl::Status&) override {}
};

TEST(ProgressWatchTest, AnEngineThatHangsInItsFirstStepIsStuck) {
  engine::EngineOptions options;
  options.num_pages = 4;
  options.limits = {.vocab_size = 10, .max_context = 64, .pool_tokens = 64};
  HangingExecutor executor;
  engine::RealClock clock;
  engine::Engine engine(options, nullptr, &executor, &clock, nullptr);
  auto request = std::make_unique<engine::Request>();
  request->prompt = {1, 2, 3};
  request->stop.max_tokens = 1;
  request->sink = std::make_shared<SilentSink>();
  ASSERT_TRUE(engine.Submit(std::move(request)).ok());

  ProgressWatch watch(absl::Seconds(30));
  EXPECT_TRUE(watch.Update(engine.Load(), kStart));
  std::thread turns([&engine] { engine.Step(); });
  executor.entered.WaitForNotification();
  EXPECT_FALSE(watch.Update(engine.Load(), kStart + absl::Seconds(30)));
  executor.released.Notify();
  turns.join();
  EXPECT_TRUE(watch.Update(engine.Load(), kStart + absl::Minutes(5)));
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
