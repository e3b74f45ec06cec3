#include "tests/sim/simulation.h"

#include <cstdint>
#include <iostream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/test_seed.h"

namespace resa::sim {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

SimulationResult RunSeed(uint64_t seed, int64_t steps) {
  std::cout << "replay: resa_sim --seed " << seed << " --steps " << steps << std::endl;
  SimulationOptions options;
  options.seed = seed;
  options.steps = steps;
  return Simulate(options);
}

// A fixed seed, long enough that everything the simulation can do has happened.
TEST(SimulationTest, KeepsEveryRuleAndMeetsEveryEvent) {
  const SimulationResult result = RunSeed(/*seed=*/1, /*steps=*/100000);
  ASSERT_THAT(result.violation, IsEmpty()) << "at step " << result.violation_step;
  EXPECT_EQ(result.counts.steps, 100000);
  for (const Counter& sum : kSums) EXPECT_GT(result.counts.*sum.value, 0) << sum.name;
  EXPECT_GT(result.counts.longest_stall, 1);
  std::cout << Describe(result.counts);
}

// A new seed every time, so that the suite goes on searching.
TEST(SimulationTest, KeepsEveryRuleOnAFreshSeed) {
  const uint64_t seed = testing::TestSeed();
  const SimulationResult result = RunSeed(seed, /*steps=*/100000);
  EXPECT_THAT(result.violation, IsEmpty()) << "at step " << result.violation_step;
}

TEST(SimulationTest, SameSeedSameRun) {
  const SimulationResult first = RunSeed(/*seed=*/3, /*steps=*/5000);
  const SimulationResult second = RunSeed(/*seed=*/3, /*steps=*/5000);
  EXPECT_EQ(Describe(first.counts), Describe(second.counts));
  const SimulationResult other = RunSeed(/*seed=*/4, /*steps=*/5000);
  EXPECT_NE(Describe(first.counts), Describe(other.counts));
}

// The checker can fail: each planted bug is caught, by the rule that is there for it, and at the
// same step again.
struct BugCase {
  Bug bug;
  const char* rule;
};

class PlantedBugTest : public ::testing::TestWithParam<BugCase> {};

TEST_P(PlantedBugTest, IsCaught) {
  SimulationOptions options;
  options.bug = GetParam().bug;
  for (options.seed = 1; options.seed <= 5; ++options.seed) {
    const SimulationResult result = Simulate(options);
    EXPECT_GT(result.bugs_planted, 0) << "seed " << options.seed;
    EXPECT_THAT(result.violation, HasSubstr(GetParam().rule)) << "seed " << options.seed;

    SimulationOptions replay = options;
    replay.steps = result.violation_step;
    EXPECT_EQ(Simulate(replay).violation, result.violation);
    replay.steps = result.violation_step - 1;
    EXPECT_THAT(Simulate(replay).violation, IsEmpty());
  }
}

INSTANTIATE_TEST_SUITE_P(
    Bugs, PlantedBugTest,
    ::testing::Values(BugCase{Bug::kLeakedPage, "leaked page: "},
                      BugCase{Bug::kLostRectification, "lost rectification: "},
                      BugCase{Bug::kSharedPageWritten, "shared page written: "},
                      BugCase{Bug::kLateCopy, "stale page read: "},
                      BugCase{Bug::kLostWrite, "wrong K/V: "},
                      BugCase{Bug::kForeignPage, "stale page read: "},
                      BugCase{Bug::kSwappedTokens, "wrong token: "}),
    [](const ::testing::TestParamInfo<BugCase>& info) { return NameOf(info.param.bug); });

}  // namespace
}  // namespace resa::sim
