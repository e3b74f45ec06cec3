#ifndef RESA_TESTS_SIM_SOLO_RUN_H_
#define RESA_TESTS_SIM_SOLO_RUN_H_

// One output of one request, alone in the world: what must come, whatever else runs.
//
// There is no pool, no scheduler and no sequence here. The tokens follow from the request, the
// schedule of windows (tests/support/reference_schedule.h, written from the method's description)
// and the toy model. Load may change when the engine delivers a token, never which.
//
// One exception, and it is documented: mode SPARSE has no exact state to go back to, so a
// preemption recomputes it densely (MakeExact) and the tokens after it differ from those of a run
// that was never preempted.

#include <cstdint>
#include <optional>
#include <vector>

#include "engine/engine.h"
#include "engine/request.h"
#include "tests/sim/toy_model.h"
#include "tests/support/reference_schedule.h"

namespace resa::sim {

class SoloRun {
 public:
  // What the next token is, and whether it ends the output.
  struct Token {
    kernels::SampleResult sample;
    bool ends = false;
    engine::FinishReason reason = engine::FinishReason::kStop;  // When it ends.
    std::optional<int32_t> stop_token;                          // That ended it.
  };

  // `request` must outlive the run.
  SoloRun(const engine::Request& request, int32_t index, const engine::EngineOptions& options);

  // Makes one more token. REQUIRES that no token before it ended the output.
  Token Next();

  // From now on the K/V of every token so far are exact. REQUIRES mode SPARSE.
  void MakeExact();

  int32_t prompt_len() const { return prompt_len_; }
  int32_t output_len() const { return static_cast<int32_t>(tokens_.size()) - prompt_len_; }
  int32_t max_output() const { return max_output_; }
  int32_t last_token() const { return tokens_.back(); }
  const std::vector<int32_t>& tokens() const { return tokens_; }

  // Tokens whose K/V are in the pool at this point: all but the newest.
  int32_t kv_len() const { return static_cast<int32_t>(cells_.size()) - 1; }
  // K/V below are exact. REQUIRES another mode than SPARSE, where nobody counts them.
  int32_t exact_len() const { return exact_len_; }
  // The sum of the cells at positions [begin, end), as a run alone would hold them, and as a dense
  // prefill would make them. REQUIRES end <= kv_len().
  Cell Cells(int32_t begin, int32_t end) const;
  Cell ExactCells(int32_t begin, int32_t end) const;

  // What the steps of a run that was never preempted count.
  const engine::AttentionStats& attention() const { return attention_; }

 private:
  void AppendCell(int32_t position, const std::optional<engine::SparseBudget>& sparse);
  void TakeStep(const testing::ScheduleStep& step);
  kernels::SampleRow MakeRow();
  bool IsEndToken(int32_t token) const;
  void Count(int32_t token, bool in_prompt);

  const engine::Request& request_;
  const engine::EngineOptions& options_;
  const int32_t index_;
  const int32_t prompt_len_;
  const int32_t max_output_;

  std::vector<int32_t> tokens_;
  std::vector<testing::ScheduleStep> schedule_;
  // [i]: the sum of the cells below position i; one longer than the number of cells.
  std::vector<Cell> cells_;
  std::vector<Cell> exact_cells_;
  uint64_t last_content_ = 0;
  uint64_t last_prefix_ = 0;
  int32_t exact_len_ = 0;
  engine::AttentionStats attention_;

  std::vector<kernels::TokenCount> counts_;
  std::vector<kernels::TokenBias> bias_;
};

}  // namespace resa::sim

#endif  // RESA_TESTS_SIM_SOLO_RUN_H_
