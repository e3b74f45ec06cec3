// Which step the engine takes next with a sequence, against the rules of Rectified Sparse Attention
// written down a second time (tests/support/reference_schedule.h). No model is involved.

#include <cstdint>
#include <iostream>
#include <random>
#include <string>

#include "engine/sequence.h"
#include "gtest/gtest.h"
#include "tests/support/reference_schedule.h"

namespace resa::testing {
namespace {

engine::AttentionPolicy PolicyOf(const ScheduleRules& rules) {
  engine::AttentionPolicy policy;
  policy.mode = rules.mode == ReferenceMode::kDense    ? engine::AttentionMode::kDense
                : rules.mode == ReferenceMode::kSparse ? engine::AttentionMode::kSparse
                                                       : engine::AttentionMode::kRectified;
  policy.keep_ratio = rules.keep_ratio;
  policy.min_tokens = rules.min_tokens;
  policy.local_tokens = rules.local_tokens;
  policy.sink_tokens = rules.sink_tokens;
  policy.rectify_interval = rules.interval;
  return policy;
}

ScheduleRules RandomRules(std::mt19937* random) {
  const auto below = [&](int n) { return static_cast<int>((*random)() % n); };
  ScheduleRules rules;
  rules.mode = static_cast<ReferenceMode>(below(3));
  rules.keep_ratio = (1 + below(100)) / 100.0;
  rules.min_tokens = 1 + below(200);
  rules.local_tokens = 1 + below(40);
  rules.sink_tokens = below(40);
  rules.interval = 8 * (1 + below(32));
  rules.block_tokens = 4 << below(3);
  rules.sparse_from = below(2) * below(400);
  return rules;
}

// What the engine does next with a sequence, step for step, against the rules written down again.
TEST(ScheduleReferenceTest, EngineTakesTheSameSteps) {
  constexpr uint32_t kSeed = 23;
  std::cout << "seed " << kSeed << "\n";
  std::mt19937 random(kSeed);
  int steps_seen = 0;
  for (int round = 0; round < 400; ++round) {
    const ScheduleRules rules = RandomRules(&random);
    const int prompt = 1 + static_cast<int>(random() % 500);
    constexpr int kNewTokens = 150;
    engine::Request request;
    request.prompt.assign(prompt, 1);
    request.attention = PolicyOf(rules);
    engine::Sequence sequence(request, 0, 0, {});
    kernels::SelectorSpec selector;
    selector.block_tokens = rules.block_tokens;
    while (sequence.prefilling()) {
      const engine::Work work = NextWork(sequence, selector, rules.sparse_from);
      ASSERT_EQ(work.kind, engine::SegmentKind::kPrefill);
      Advance(&sequence, work);
    }
    sequence.tokens.push_back(1);
    for (const ScheduleStep& step : MakeSchedule(prompt, kNewTokens, rules)) {
      const engine::Work work = NextWork(sequence, selector, rules.sparse_from);
      const std::string where = "round " + std::to_string(round) + ", position " +
                                std::to_string(step.end - 1) + ", prompt " + std::to_string(prompt);
      ASSERT_EQ(work.begin, step.begin) << where;
      ASSERT_EQ(work.end, step.end) << where;
      ASSERT_TRUE(work.emits) << where;
      ASSERT_EQ(work.sparse.has_value(), step.kind == ScheduleStep::Kind::kSparse) << where;
      if (work.sparse.has_value()) {
        ASSERT_EQ(work.sparse->keep_blocks, step.budget.keep) << where;
        ASSERT_EQ(work.sparse->local_blocks, step.budget.local) << where;
        ASSERT_EQ(work.sparse->sink_blocks, step.budget.sink) << where;
      }
      Advance(&sequence, work);
      ASSERT_EQ(sequence.kv_len, step.end) << where;
      if (rules.mode == ReferenceMode::kRectified) {
        ASSERT_EQ(sequence.rectified_len, step.exact_len) << where;
      }
      sequence.tokens.push_back(1);
      ++steps_seen;
    }
  }
  std::cout << steps_seen << " steps\n";
}

}  // namespace
}  // namespace resa::testing
