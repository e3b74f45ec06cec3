#ifndef RESA_TESTS_SUPPORT_SEQUENCE_DRIVER_H_
#define RESA_TESTS_SUPPORT_SEQUENCE_DRIVER_H_

// One output of a request, run through an executor the way the engine runs it, but batched, chunked
// and preempted as a test likes.

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/types/span.h"
#include "engine/executor.h"
#include "engine/request.h"
#include "engine/sequence.h"

namespace resa::testing {

class SequenceDriver {
 public:
  // Emits request.stop.max_tokens tokens (REQUIRED); there is no other stop. `pages` must hold
  // prompt and output, and be no one else's. `request` must outlive the driver.
  SequenceDriver(const engine::Request& request, std::vector<int32_t> pages,
                 const kernels::SelectorSpec& selector, int32_t sparse_from = 0);

  bool done() const;
  // What it does next. A prefill is cut to `max_rows` rows.
  engine::SegmentInput Next(int32_t max_rows = 1 << 30);
  // After the step that ran the segment of the last Next(): its sample, when it asked for one.
  void Finish(const kernels::SampleResult* sample);
  // Gives its pages back and goes on with others.
  void Preempt(std::vector<int32_t> pages);

  const engine::Sequence& sequence() const { return *sequence_; }
  absl::Span<const int32_t> pages() const { return pages_; }
  // Tokens emitted so far, and the log-probability of each.
  absl::Span<const int32_t> output() const;
  const std::vector<float>& logprobs() const { return logprobs_; }
  int sparse_steps() const { return sparse_steps_; }
  int rectifications() const { return rectifications_; }

 private:
  const kernels::SelectorSpec selector_;
  const int32_t sparse_from_;
  std::unique_ptr<engine::Sequence> sequence_;
  std::vector<int32_t> pages_;
  engine::Work work_;
  std::vector<float> logprobs_;
  int sparse_steps_ = 0;
  int rectifications_ = 0;
};

// Runs the sequences side by side, all that are not done in each step, until all are done. Prefills
// are cut to `chunk` rows.
void RunTogether(absl::Span<SequenceDriver* const> sequences, engine::Executor* executor,
                 int32_t chunk = 1 << 30);

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_SEQUENCE_DRIVER_H_
