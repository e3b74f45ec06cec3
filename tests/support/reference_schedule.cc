#include "tests/support/reference_schedule.h"

#include <algorithm>
#include <cmath>

namespace resa::testing {
namespace {

int CeilDiv(int a, int b) { return (a + b - 1) / b; }

// The budget over `blocks` blocks; keep >= blocks means that it covers the sequence.
Budget BudgetOver(int blocks, const ScheduleRules& rules) {
  Budget budget;
  budget.local = CeilDiv(rules.local_tokens, rules.block_tokens);
  budget.sink = CeilDiv(rules.sink_tokens, rules.block_tokens);
  // The ratio is meant as the decimal that was written, of at most six digits.
  const int share = static_cast<int>(std::ceil(rules.keep_ratio * blocks - 1e-6));
  const int floor = std::min(blocks, CeilDiv(rules.min_tokens, rules.block_tokens));
  budget.keep = std::max({share, floor, budget.local + budget.sink});
  return budget;
}

}  // namespace

std::vector<ScheduleStep> MakeSchedule(int prompt_tokens, int new_tokens,
                                       const ScheduleRules& rules) {
  std::vector<ScheduleStep> steps;
  int exact_len = prompt_tokens;
  for (int p = prompt_tokens; p < prompt_tokens + new_tokens - 1; ++p) {
    const int kv_len = p + 1;
    const int blocks = CeilDiv(kv_len, rules.block_tokens);
    const Budget budget = BudgetOver(blocks, rules);
    const bool dense =
        rules.mode == ReferenceMode::kDense || kv_len < rules.sparse_from || budget.keep >= blocks;
    const bool due = rules.mode == ReferenceMode::kRectified && (p + 1) % rules.interval == 0;
    ScheduleStep step{ScheduleStep::Kind::kSparse, p, p + 1, {}, 0};
    if (due && exact_len < p) {
      step.kind = ScheduleStep::Kind::kWindow;
      step.begin = exact_len;
      exact_len = p + 1;
    } else if (dense || due) {
      step.kind = ScheduleStep::Kind::kDense;
      if (exact_len == p) exact_len = p + 1;
    } else {
      step.budget = budget;
    }
    step.exact_len = exact_len;
    steps.push_back(step);
  }
  return steps;
}

}  // namespace resa::testing
