#ifndef RESA_TESTS_SIM_CHECKER_H_
#define RESA_TESTS_SIM_CHECKER_H_

// The rules that hold for the engine's state, looked at from outside in every step: once between a
// step's page copies and its writes (the plan and the sequences are then as the engine applies
// them), and once when the step is over. What clients are told is the Witness's to check.
//
// Each broken rule is reported by name; the names are in checker.cc, beside the rules.

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/types/span.h"
#include "engine/engine.h"
#include "tests/sim/fake_executor.h"
#include "tests/sim/paged_memory.h"
#include "tests/sim/stage.h"
#include "tests/sim/witness.h"

namespace resa::sim {

class Checker final : public StepInspector {
 public:
  // Everything must outlive the checker.
  Checker(const engine::EngineOptions& options, const engine::Engine& engine, PagedMemory* memory,
          Stage* stage);

  // In the step, before its writes.
  void Inspect(const engine::StepInput& input, bool fails) override;

  // After the step, with the requests that are accepted and have not ended.
  void CheckAfterStep(const std::vector<std::shared_ptr<Witness>>& live);

 private:
  // In the step.
  void CheckReads(const engine::SegmentInput& input, const engine::Sequence& sequence);
  void CheckWrites(const engine::SegmentInput& input, const engine::Sequence& sequence);
  void CheckRows(const engine::StepPlan& plan);
  void CheckAdmissions(const engine::StepPlan& plan);
  void CheckTop(const engine::StepPlan& plan);
  void CheckWindows(const engine::StepPlan& plan);

  // After the step.
  void CheckPreemptions();
  void CheckPages();
  void CheckLengths(const engine::Sequence& sequence, const SoloRun& solo);
  void CheckContents(const engine::Sequence& sequence, const SoloRun& solo);
  void CheckPace(const engine::Sequence& sequence);
  void CheckCounts(const std::vector<std::shared_ptr<Witness>>& live);

  bool Holds(absl::Span<const int32_t> table, int32_t length,
             absl::FunctionRef<Cell(int32_t, int32_t)> expected) const;

  const engine::EngineOptions& options_;
  const engine::Engine& engine_;
  PagedMemory* const memory_;
  Stage* const stage_;

  std::vector<int32_t> owners_;  // Scratch, by page.
  int32_t steps_without_segment_ = 0;
  bool inspected_ = false;  // The current step had segments.
};

// Steps that an output takes at most from its admission on while it is the first in rank of those
// that run, so that nobody can take its pages:
//   prefill: at least min_chunk_tokens rows a step, over everything it may ever hold;
//   replay of an open window: below rectify_interval rows, one a step;
//   decode: one step per output token;
//   stalls: each window waits for those that were due before it, below max_sequences steps.
int64_t StepsOnTop(const engine::Request& request, const engine::EngineOptions& options);

// Whether `a` goes before `b`: higher priority, then older.
bool Outranks(const engine::Sequence& a, const engine::Sequence& b);

}  // namespace resa::sim

#endif  // RESA_TESTS_SIM_CHECKER_H_
