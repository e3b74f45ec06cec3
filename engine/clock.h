#ifndef RESA_ENGINE_CLOCK_H_
#define RESA_ENGINE_CLOCK_H_

// The engine's only source of time, so that the simulation can hold it in its hand.

#include <chrono>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace resa::engine {

// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual absl::Time Now() = 0;  // Never goes back.
};

// The time of day when it was made, and what has passed since: nobody sets it.
class RealClock final : public Clock {
 public:
  absl::Time Now() override {
    return start_ + absl::FromChrono(std::chrono::steady_clock::now() - begin_);
  }

 private:
  const absl::Time start_ = absl::Now();
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

// Advances only when told to. Thread-compatible.
class ManualClock final : public Clock {
 public:
  explicit ManualClock(absl::Time start) : now_(start) {}
  absl::Time Now() override { return now_; }
  void Advance(absl::Duration by) { now_ += by; }

 private:
  absl::Time now_;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_CLOCK_H_
