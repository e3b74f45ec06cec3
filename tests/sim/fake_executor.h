#ifndef RESA_TESTS_SIM_FAKE_EXECUTOR_H_
#define RESA_TESTS_SIM_FAKE_EXECUTOR_H_

// Executes steps with the toy model on a paged memory. It knows what a real executor knows, the
// StepInput, and nothing of requests or of what would be right.

#include "absl/status/status.h"
#include "engine/clock.h"
#include "engine/executor.h"
#include "tests/sim/paged_memory.h"

namespace resa::sim {

// Is shown each step between its page copies and its writes.
class StepInspector {
 public:
  virtual ~StepInspector() = default;
  // `fails`: the step is going to.
  virtual void Inspect(const engine::StepInput& input, bool fails) = 0;
};

class FakeExecutor final : public engine::Executor {
 public:
  // Everything must outlive the executor. A step takes a millisecond of `clock`.
  FakeExecutor(int32_t vocab_size, PagedMemory* memory, engine::ManualClock* clock)
      : vocab_size_(vocab_size), memory_(memory), clock_(clock) {}

  void set_inspector(StepInspector* inspector) { inspector_ = inspector; }
  // The next step fails half-way: some K/V are garbage, nothing is sampled.
  void FailNextStep() { fail_next_ = true; }

  absl::Status DoExecute(const engine::StepInput& input, engine::StepOutput* output,
                         absl::FunctionRef<void()> meanwhile) override;

 private:
  void Run(const engine::SegmentInput& segment, engine::StepOutput* output);
  void Scribble(const engine::SegmentInput& segment);

  const int32_t vocab_size_;
  PagedMemory* const memory_;
  engine::ManualClock* const clock_;
  StepInspector* inspector_ = nullptr;
  bool fail_next_ = false;
};

}  // namespace resa::sim

#endif  // RESA_TESTS_SIM_FAKE_EXECUTOR_H_
