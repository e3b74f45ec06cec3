// The rules of the schedule on small cases that fit on a line.

#include "tests/support/reference_schedule.h"

#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace resa::testing {
namespace {

std::string Describe(const std::vector<ScheduleStep>& steps) {
  std::string out;
  for (const ScheduleStep& step : steps) {
    const char* kind = step.kind == ScheduleStep::Kind::kDense    ? "d"
                       : step.kind == ScheduleStep::Kind::kSparse ? "s"
                                                                  : "w";
    out += kind + std::to_string(step.begin);
    if (step.kind == ScheduleStep::Kind::kWindow) out += "-" + std::to_string(step.end - 1);
    out += " ";
  }
  return out;
}

ScheduleRules SmallRules() {
  ScheduleRules rules;
  rules.keep_ratio = 0.25;
  rules.min_tokens = 8;
  rules.local_tokens = 8;
  rules.sink_tokens = 0;
  rules.interval = 8;
  return rules;
}

TEST(ReferenceScheduleTest, WindowsEndAtMultiplesOfTheInterval) {
  EXPECT_EQ(Describe(MakeSchedule(18, 16, SmallRules())),
            "s18 s19 s20 s21 s22 w18-23 s24 s25 s26 s27 s28 s29 s30 w24-31 s32 ");
}

TEST(ReferenceScheduleTest, DuePositionOnExactHistoryIsADenseRow) {
  EXPECT_EQ(Describe(MakeSchedule(23, 4, SmallRules())), "d23 s24 s25 ");
}

TEST(ReferenceScheduleTest, DenseWhileTheBudgetCoversTheSequenceAndThatKeepsHistoryExact) {
  ScheduleRules rules = SmallRules();
  rules.min_tokens = 24;  // Three blocks of 8.
  const std::vector<ScheduleStep> steps = MakeSchedule(20, 14, rules);
  EXPECT_EQ(Describe(steps), "d20 d21 d22 d23 s24 s25 s26 s27 s28 s29 s30 w24-31 s32 ");
  EXPECT_EQ(steps[3].exact_len, 24);
  EXPECT_EQ(steps[4].exact_len, 24);
  EXPECT_EQ(steps[11].exact_len, 32);
}

TEST(ReferenceScheduleTest, SparseFromAndModes) {
  ScheduleRules rules = SmallRules();
  rules.sparse_from = 21;
  EXPECT_EQ(Describe(MakeSchedule(18, 8, rules)), "d18 d19 s20 s21 s22 w20-23 s24 ");
  rules.mode = ReferenceMode::kSparse;
  EXPECT_EQ(Describe(MakeSchedule(18, 8, rules)), "d18 d19 s20 s21 s22 s23 s24 ");
  rules.mode = ReferenceMode::kDense;
  EXPECT_EQ(Describe(MakeSchedule(18, 8, rules)), "d18 d19 d20 d21 d22 d23 d24 ");
}

TEST(ReferenceScheduleTest, BudgetRoundsUpToBlocks) {
  ScheduleRules rules = SmallRules();
  rules.local_tokens = 9;
  rules.sink_tokens = 1;
  rules.keep_ratio = 0.3;
  const std::vector<ScheduleStep> steps = MakeSchedule(160, 2, rules);
  ASSERT_EQ(steps.size(), 1u);
  EXPECT_EQ(steps[0].budget.local, 2);
  EXPECT_EQ(steps[0].budget.sink, 1);
  EXPECT_EQ(steps[0].budget.keep, 7);  // ceil(0.3 * 21)
}

}  // namespace
}  // namespace resa::testing
