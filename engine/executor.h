#ifndef RESA_ENGINE_EXECUTOR_H_
#define RESA_ENGINE_EXECUTOR_H_

// The seam between deciding and computing: one step's segments in, sampled tokens out. The real one
// is engine/model_executor.h; the simulation has its own.

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "engine/attention_policy.h"
#include "kernels/params.h"

namespace resa::engine {

// A run of consecutive tokens of one sequence. Its K/V are written at [position, position + size),
// and each token attends to everything up to itself, or, sparsely, to its budget.
struct SegmentInput {
  absl::Span<const int32_t> tokens;         // Never empty; one token when sparse.
  int32_t position = 0;                     // Of tokens[0].
  absl::Span<const int32_t> pages;          // Page table, covers position + tokens.size().
  uint64_t pages_id = 0;                    // PageTable::id(); 0: unknown, nothing may be assumed.
  std::optional<SparseBudget> sparse = {};  // Unset: dense.
  // Set: sample after the last token. `row` is filled in by the executor.
  std::optional<kernels::SampleRow> sample = {};
};

// A whole page to copy before anything is written (copy on write).
struct PageCopy {
  int32_t from = 0;
  int32_t to = 0;
};

struct StepInput {
  absl::Span<const PageCopy> copies;
  absl::Span<const SegmentInput> segments;
};

struct StepOutput {
  // One per sampling segment, in the order of the segments.
  std::vector<kernels::SampleResult> samples;
};

// Thread: the engine's. Spans are valid during the call only.
class Executor {
 public:
  virtual ~Executor() = default;
  // An error here ends every sequence of the step with INTERNAL; the engine goes on. `meanwhile` is
  // called once: while a device computes, or before a CPU does.
  absl::Status Execute(
      const StepInput& input, StepOutput* output, absl::FunctionRef<void()> meanwhile = [] {}) {
    return DoExecute(input, output, meanwhile);
  }

 private:
  virtual absl::Status DoExecute(const StepInput& input, StepOutput* output,
                                 absl::FunctionRef<void()> meanwhile) = 0;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_EXECUTOR_H_
