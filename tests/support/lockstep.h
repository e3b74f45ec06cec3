#ifndef RESA_TESTS_SUPPORT_LOCKSTEP_H_
#define RESA_TESTS_SUPPORT_LOCKSTEP_H_

// The real executor and the reference side by side, one generation long.
//
// After every step of the engine the reference takes the same step: it computes its own scores,
// judges the blocks that the engine kept, attends to those same blocks, and compares the K/V
// written and the logits. So a choice that rounding alone decided differently, which is legitimate,
// does not part the two histories, and every later comparison stays tight.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/model_executor.h"
#include "engine/model_files.h"
#include "kernels/ops.h"
#include "tests/support/observing_ops.h"
#include "tests/support/reference_schedule.h"
#include "tests/support/resa_reference.h"

namespace resa::testing {

struct LockstepTolerance {
  SelectionTolerance selection;  // `vector` also bounds the relative error of K, V and queries.
  double logit = 0;              // Absolute.
};

struct LockstepOptions {
  kernels::SelectorSpec selector;
  kernels::DType kv_dtype = kernels::DType::kF32;
  LockstepTolerance tolerance;
  int max_context = 0;
  // Changes what the reference believes: a planted error, to see that it is noticed.
  std::function<void(ReferenceOptions*)> plant;
};

struct LockstepReport {
  int sparse_rows = 0;
  int windows = 0;
  std::vector<int32_t> output;  // The engine's tokens after the prompt.
  int distinct_tokens = 0;      // In the output.
  int near_tie_tokens = 0;      // Other than ours, by a gap in the logits within the tolerance.
  int64_t kept_ids = 0;         // Over sparse rows, layers and KV heads.
  int64_t differing_ids = 0;    // Kept by the engine and not by us.
  double query_error = 0;       // The largest seen, relative.
  double kv_error = 0;          // The largest seen, relative.
  double logit_error = 0;       // The largest seen, absolute.
  double repaired = 0;          // The largest relative change of a value by a window.
  std::vector<std::string> failures;  // The first few.
};

// Thread: one. Host backends with f32 activations only.
class Lockstep {
 public:
  // `model` and `ops` must outlive it.
  Lockstep(const engine::LoadedModel& model, const LockstepOptions& options, kernels::Ops* ops);

  // Prefills in chunks of `chunk`, then takes the schedule's steps, greedily. Once per object.
  LockstepReport Run(const std::vector<int32_t>& prompt, const std::vector<ScheduleStep>& schedule,
                     int chunk);

  // How K, V and descriptors below `length` differ, bit for bit, from those of a dense prefill of
  // the same tokens by the same executor, in other pages and in chunks of `chunk`; empty when they
  // are equal. To call after Run.
  std::string DifferenceFromPrefill(int length, int chunk);

 private:
  using Pages = std::vector<int32_t>;

  int32_t Execute(int begin, int end, const Pages& pages,
                  const std::optional<engine::SparseBudget>& sparse, bool sample);
  void Prefill(int length, int chunk, const Pages& pages, bool sample);
  void TakeStep(const ScheduleStep& step);
  std::vector<int> JudgeChoice(int layer, int kv_head, std::span<const Interval> scores,
                               const Budget& budget);
  void CompareQueries();
  void CompareKv(int begin, int end);
  void CompareLogits(const Vector& expected, int32_t token);
  Vector Pooled(bool key, int layer, int kv_head, int position) const;
  void Fail(const std::string& what);

  const engine::ModelConfig& config_;
  const LockstepTolerance tolerance_;
  const kernels::DType kv_dtype_;
  ObservingOps ops_;
  ReferenceModel model_;
  std::unique_ptr<ReferenceDecoder> reference_;
  std::unique_ptr<engine::ModelExecutor> executor_;
  Pages pages_;        // Shuffled, so that a wrong page cannot go unnoticed.
  Pages other_pages_;  // For DifferenceFromPrefill.

  std::vector<int32_t> tokens_;
  LockstepReport report_;

  // What the observer saw in the last step: per layer.
  std::vector<std::vector<int32_t>> selected_;  // [kv_head * keep + i]
  std::vector<Vector> queries_;                 // [head * d + j]
  std::vector<float> logits_;
};

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_LOCKSTEP_H_
