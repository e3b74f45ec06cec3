#include "tests/bench/bench_options.h"

#include <gmock/gmock.h>

#include <string>
#include <utility>
#include <vector>

namespace resa::bench {
namespace {

using engine::AttentionMode;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::string ErrorOf(const std::vector<std::string>& args) {
  const auto options = ParseBenchOptions(args);
  return options.ok() ? "" : std::string(options.status().message());
}

TEST(BenchOptionsTest, DefaultsAreTheDaemons) {
  const auto options = ParseBenchOptions({});
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->shape, "0.5b");
  EXPECT_EQ(options->selector.kind, kernels::SelectorKind::kSketch);
  EXPECT_EQ(options->selector.block_tokens, 8);
  EXPECT_EQ(options->selector.planes, 3);
  EXPECT_EQ(options->policy, engine::AttentionPolicy());
  EXPECT_THAT(options->modes, ElementsAre(AttentionMode::kDense, AttentionMode::kSparse,
                                          AttentionMode::kRectified));
  EXPECT_THAT(options->prefills, IsEmpty());
}

TEST(BenchOptionsTest, ListsAreTakenInOrder) {
  const auto options = ParseBenchOptions({"--context", "1024,32768", "--batch=8,1", "--mode",
                                          "rectified,dense", "--prefill", "512,64@7600"});
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_THAT(options->contexts, ElementsAre(1024, 32768));
  EXPECT_THAT(options->batches, ElementsAre(8, 1));
  EXPECT_THAT(options->modes, ElementsAre(AttentionMode::kRectified, AttentionMode::kDense));
  ASSERT_EQ(options->prefills.size(), 2u);
  EXPECT_EQ(options->prefills[0].rows, 512);
  EXPECT_EQ(options->prefills[0].position, 0);
  EXPECT_EQ(options->prefills[1].rows, 64);
  EXPECT_EQ(options->prefills[1].position, 7600);
}

TEST(BenchOptionsTest, SelectorAndPolicyAreTaken) {
  const auto sketch =
      ParseBenchOptions({"--planes", "3", "--block", "4", "--refine-share", "0.25,0.12",
                         "--keep-ratio", "0.05", "--interval", "64", "--sink-tokens", "0"});
  ASSERT_TRUE(sketch.ok()) << sketch.status();
  EXPECT_EQ(sketch->selector,
            (kernels::SelectorSpec{kernels::SelectorKind::kSketch, 4, 3, {0.25f, 0.12f}}));
  EXPECT_EQ(sketch->policy.keep_ratio, 0.05);
  EXPECT_EQ(sketch->policy.rectify_interval, 64);
  EXPECT_EQ(sketch->policy.sink_tokens, 0);
  // One share counts for every further plane.
  const auto one = ParseBenchOptions({"--planes", "2", "--refine-share", "0.4"});
  ASSERT_TRUE(one.ok()) << one.status();
  EXPECT_EQ(one->selector.refine_share[0], 0.4f);
  EXPECT_EQ(one->selector.refine_share[1], 0.4f);
  const auto minmax = ParseBenchOptions({"--selector", "minmax"});
  ASSERT_TRUE(minmax.ok()) << minmax.status();
  EXPECT_EQ(minmax->selector,
            (kernels::SelectorSpec{kernels::SelectorKind::kMinMax, 16, 0, {1.0f, 1.0f}}));
}

TEST(BenchOptionsTest, WrongValuesAreRefusedByFlagAndWithWhatWasExpected) {
  const std::vector<std::pair<std::vector<std::string>, std::vector<std::string>>> cases = {
      {{"--context", "0"}, {"--context", "1048576"}},
      {{"--context", "1,,2"}, {"--context"}},
      {{"--batch", "257"}, {"--batch", "256"}},
      {{"--mode", "dense,fast"}, {"--mode", "fast", "rectified"}},
      {{"--mode", "none"}, {"--mode", "--prefill"}},
      {{"--prefill", "512@"}, {"--prefill"}},
      {{"--prefill", "33000"}, {"--prefill", "32768"}},
      {{"--selector", "quest"}, {"--selector", "quest", "minmax"}},
      {{"--selector", "minmax", "--planes", "2"}, {"--selector minmax", "--planes"}},
      {{"--block", "32"}, {"--block", "4, 8 and 16"}},
      {{"--planes", "4"}, {"--planes", "1 to 3"}},
      {{"--planes", "1", "--refine-share", "0.5"}, {"--refine-share", "at most 0"}},
      {{"--refine-share", "0.2,0.4"}, {"--refine-share", "at most 0.2"}},
      {{"--refine-share", "nan"}, {"--refine-share"}},
      {{"--keep-ratio", "0"}, {"keep_ratio", "at most 1"}},
      {{"--interval", "12"}, {"rectify_interval", "multiple of 8"}},
      {{"--threads", "-1"}, {"--threads", "1024"}},
      {{"--seconds", "0"}, {"--seconds", "3600"}},
      {{"--contexts", "5"}, {"--contexts", "--context"}},
      {{"0.5b"}, {"0.5b", "not a flag"}},
  };
  for (const auto& [args, parts] : cases) {
    const std::string error = ErrorOf(args);
    for (const std::string& part : parts) {
      EXPECT_THAT(error, HasSubstr(part)) << ::testing::PrintToString(args);
    }
  }
}

TEST(BenchOptionsTest, HelpNamesEveryFlag) {
  for (const char* flag : {"--shape", "--model", "--context", "--mode", "--prefill", "--json"}) {
    EXPECT_THAT(BenchHelp(), HasSubstr(flag));
  }
}

}  // namespace
}  // namespace resa::bench
