#include "server/health.h"

#include <utility>

#include "engine/clock.h"
#include "kernels/check.h"

namespace resa::server {
namespace {

constexpr absl::Duration kLookInterval = absl::Milliseconds(250);

}  // namespace

bool ProgressWatch::Update(const engine::EngineLoad& load, absl::Time now) {
  const bool has_work = load.running + load.waiting > 0;
  if (!has_work || load.steps != steps_) {
    steps_ = load.steps;
    since_ = now;
  }
  return now - since_ < timeout_;
}

const char* NameOf(Readiness readiness) {
  switch (readiness) {
    case Readiness::kLoading:
      return "loading";
    case Readiness::kServing:
      return "serving";
    case Readiness::kStalled:
      return "stalled";
    case Readiness::kDraining:
      return "draining";
  }
  RESA_CHECK(false) << "readiness " << static_cast<int>(readiness);
  return "";
}

HealthMonitor::HealthMonitor(std::function<void(Readiness)> on_change)
    : on_change_(std::move(on_change)) {
  on_change_(Readiness::kLoading);
}

HealthMonitor::~HealthMonitor() { Stop(); }

void HealthMonitor::StartServing(std::function<engine::EngineLoad()> load) {
  RESA_CHECK(!watcher_.joinable());
  {
    absl::MutexLock lock(&mutex_);
    if (state_ == Readiness::kLoading) Set(Readiness::kServing);
  }
  watcher_ = std::thread([this, load = std::move(load)] { Watch(load); });
}

void HealthMonitor::StartDraining() {
  absl::MutexLock lock(&mutex_);
  Set(Readiness::kDraining);
}

void HealthMonitor::Stop() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  if (watcher_.joinable()) watcher_.join();
}

Readiness HealthMonitor::state() const {
  absl::MutexLock lock(&mutex_);
  return state_;
}

void HealthMonitor::Set(Readiness readiness) {
  if (state_ == readiness || state_ == Readiness::kDraining) return;
  state_ = readiness;
  on_change_(readiness);
}

void HealthMonitor::Watch(const std::function<engine::EngineLoad()>& load) {
  ProgressWatch progress;
  engine::RealClock clock;
  absl::MutexLock lock(&mutex_);
  while (!mutex_.AwaitWithTimeout(absl::Condition(&stopping_), kLookInterval)) {
    const bool moving = progress.Update(load(), clock.Now());
    Set(moving ? Readiness::kServing : Readiness::kStalled);
  }
}

}  // namespace resa::server
