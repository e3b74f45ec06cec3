#ifndef RESA_SERVER_HEALTH_H_
#define RESA_SERVER_HEALTH_H_

// Whether the daemon should get requests: loaded, not draining, and the engine moves on.

#include <cstdint>
#include <functional>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "engine/metrics.h"

namespace resa::server {

// An engine that has work and finishes no step for this long is stuck.
inline constexpr absl::Duration kStallTimeout = absl::Seconds(30);

// Tells a stuck engine from an idle one. Thread-compatible.
class ProgressWatch {
 public:
  explicit ProgressWatch(absl::Duration timeout = kStallTimeout) : timeout_(timeout) {}
  // True while the engine moves on or has nothing to do. `now` never goes back.
  bool Update(const engine::EngineLoad& load, absl::Time now);

 private:
  const absl::Duration timeout_;
  int64_t steps_ = -1;
  absl::Time since_ = absl::InfinitePast();  // Of the last step seen, or of the last idle look.
};

enum class Readiness : uint8_t { kLoading, kServing, kStalled, kDraining };
const char* NameOf(Readiness readiness);

// Follows the daemon's state and says when it changes. Thread-safe.
class HealthMonitor {
 public:
  // `on_change` gets every new state, starting with kLoading, one call at a time.
  explicit HealthMonitor(std::function<void(Readiness)> on_change);
  ~HealthMonitor();

  // The model is loaded. From now on `load` is looked at a few times a second, until Stop.
  void StartServing(std::function<engine::EngineLoad()> load);
  // For good: nothing leads back from draining.
  void StartDraining();
  // Ends the looks; the state stays. `load` is not called afterwards.
  void Stop();

  Readiness state() const;

 private:
  void Set(Readiness readiness) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Watch(const std::function<engine::EngineLoad()>& load);

  const std::function<void(Readiness)> on_change_;
  mutable absl::Mutex mutex_;
  Readiness state_ ABSL_GUARDED_BY(mutex_) = Readiness::kLoading;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread watcher_;
};

}  // namespace resa::server

#endif  // RESA_SERVER_HEALTH_H_
