#ifndef RESA_ENGINE_STEP_PLAN_H_
#define RESA_ENGINE_STEP_PLAN_H_

// What one step does: the one noun between the scheduler and everything below it. Everything but
// attention sees flat rows; attention sees sparse rows and dense chunks.

#include <cstdint>
#include <vector>

#include "engine/sequence.h"

namespace resa::engine {

// A sequence has at most one segment a step.
struct Segment {
  int32_t sequence = 0;  // Index into the scheduler's input.
  Work work;

  int32_t rows() const { return work.end - work.begin; }
};

// Indices are into the scheduler's input. The engine applies it in this order.
struct StepPlan {
  std::vector<int32_t> preempt;   // Their pages go back first.
  std::vector<int32_t> admit;     // Begin to run with this step.
  std::vector<Segment> segments;  // By rank: higher priority first, then older.
  std::vector<int32_t> stalled;   // Due for rectification, but the step had no room.

  void Clear() {
    preempt.clear();
    admit.clear();
    segments.clear();
    stalled.clear();
  }
  bool empty() const { return preempt.empty() && segments.empty(); }
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_STEP_PLAN_H_
