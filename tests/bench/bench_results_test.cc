#include "tests/bench/bench_results.h"

#include <gmock/gmock.h>

#include <vector>

#include "nlohmann/json.hpp"
#include "tests/bench/bench_report.h"

namespace resa::bench {
namespace {

using engine::AttentionMode;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::Field;
using ::testing::HasSubstr;
using ::testing::Not;

StageTotals& At(StepRecord& record, Stage stage) {
  return record.stages[static_cast<size_t>(stage)];
}

// A step of which `select` seconds are selection and `dense` dense attention, at half the ceiling.
StepRecord MakeStep(double seconds, double select, double dense, int tokens = 1) {
  StepRecord record;
  record.seconds = seconds;
  record.tokens = tokens;
  record.rows = tokens;
  At(record, Stage::kSelect) = {1, select, 10, 20, select / 2};
  At(record, Stage::kChunkAttend) = {1, dense, 30, 40, dense / 2};
  return record;
}

RunResult MakeResult(AttentionMode mode, int batch, int round_steps,
                     std::vector<StepRecord> records) {
  RunResult result;
  result.spec = {.mode = mode, .context = 100, .batch = batch};
  result.round_steps = round_steps;
  result.records = std::move(records);
  result.whole = Summarise(result.records, round_steps);
  return result;
}

TEST(PercentileTest, IsOneOfTheValues) {
  EXPECT_EQ(Percentile({}, 50), 0);
  EXPECT_EQ(Percentile({7}, 10), 7);
  EXPECT_EQ(Percentile({4, 1, 3, 2}, 50), 2);
  EXPECT_EQ(Percentile({4, 1, 3, 2}, 51), 3);
  EXPECT_EQ(Percentile({4, 1, 3, 2}, 100), 4);
}

TEST(SummariseTest, TakesMediansOfStepsAndMeansOfWork) {
  const std::vector<StepRecord> records = {MakeStep(10, 2, 4), MakeStep(20, 3, 8),
                                           MakeStep(60, 30, 20)};
  const Summary s = Summarise(records, 1);
  EXPECT_EQ(s.units, 3);
  EXPECT_EQ(s.median, 20);
  EXPECT_EQ(s.p10, 10);
  EXPECT_EQ(s.p90, 60);
  EXPECT_EQ(s.tokens_per_second, 1.0 / 20);
  EXPECT_EQ(s.bytes, 40);
  EXPECT_EQ(s.flops, 60);
  EXPECT_EQ(s.stages[static_cast<size_t>(Stage::kSelect)].seconds, 3);
  EXPECT_EQ(s.stages[static_cast<size_t>(Stage::kChunkAttend)].seconds, 8);
  // Of 4, 9 and 10.
  EXPECT_EQ(s.seconds_between_ops, 9);
  // Of 3, 5.5 and 25, over a median of 20.
  EXPECT_DOUBLE_EQ(s.roofline_share(), 33.5 / 3 / 20);
}

TEST(SummariseTest, AmortisesARoundOverItsStepsAndDropsAnIncompleteOne) {
  const std::vector<StepRecord> records = {MakeStep(1, 0, 0), MakeStep(9, 0, 4), MakeStep(1, 0, 0),
                                           MakeStep(7, 0, 4), MakeStep(1000, 0, 0)};
  const Summary s = Summarise(records, 2);
  EXPECT_EQ(s.units, 2);
  EXPECT_EQ(s.median, 4);  // Rounds of 10 and 8 seconds, the lower of two is the median.
  EXPECT_EQ(s.p90, 5);
  EXPECT_EQ(s.tokens_per_second, 0.25);
  EXPECT_EQ(s.stages[static_cast<size_t>(Stage::kChunkAttend)].seconds, 2);
}

TEST(RatiosTest, PairStepsOfTheSameMoment) {
  // The machine is five times slower in the second half; the ratio does not see it.
  const std::vector<RunResult> results = {
      MakeResult(AttentionMode::kDense, 1, 1,
                 {MakeStep(8, 0, 6), MakeStep(8, 0, 6), MakeStep(40, 0, 30), MakeStep(40, 0, 30)}),
      MakeResult(AttentionMode::kSparse, 1, 1,
                 {MakeStep(4, 2, 0), MakeStep(4, 2, 0), MakeStep(20, 10, 0), MakeStep(20, 10, 0)}),
      MakeResult(AttentionMode::kRectified, 1, 2,
                 {MakeStep(4, 2, 0), MakeStep(12, 0, 6), MakeStep(20, 10, 0), MakeStep(60, 0, 30)}),
      MakeResult(AttentionMode::kDense, 3, 1,
                 {MakeStep(12, 0, 9, 3), MakeStep(12, 0, 9, 3), MakeStep(60, 0, 45, 3),
                  MakeStep(60, 0, 45, 3)}),
  };
  const auto is = [](const char* name, double value) {
    return AllOf(Field(&Ratio::name, HasSubstr(name)), Field(&Ratio::value, value));
  };
  EXPECT_THAT(RatiosOf(results), ElementsAre(is("sparse / dense, 100 x 1", 2.0),
                                             is("sparse / dense, attention alone, 100 x 1", 3.0),
                                             is("rectified / dense, 100 x 1", 1.0),
                                             is("rectified / dense, attention alone, 100 x 1", 1.5),
                                             is("batch 3 / batch 1, dense, 100", 2.0)));
}

TEST(ReportTest, TextAndJsonHoldEveryRun) {
  BenchReport report;
  report.device = "a machine";
  report.ceilings = {1e9, 2e9};
  report.model = "a model";
  report.config.num_layers = 2;
  report.results = {
      MakeResult(AttentionMode::kDense, 1, 1, {MakeStep(0.5, 0, 0.25)}),
      MakeResult(AttentionMode::kSparse, 1, 1, {MakeStep(0.25, 0.125, 0)}),
  };
  report.results[1].counters.sparse_blocks_read = 34;
  report.ratios = RatiosOf(report.results);

  report.ceilings_at_end = {1.05e9, 1.95e9};
  EXPECT_THAT(TextOf(report), Not(HasSubstr("busy")));
  report.ceilings_at_end = {1.05e9, 1.7e9};
  EXPECT_THAT(TextOf(report), HasSubstr("busy"));

  const std::string text = TextOf(report);
  for (const char* part : {"a machine", "a model", "dense, 100 x 1: 500.0000 ms", "select",
                           "17 blocks read", "sparse / dense, 100 x 1", "2.000x", "= attention"}) {
    EXPECT_THAT(text, HasSubstr(part));
  }
  const auto json = nlohmann::json::parse(JsonOf(report), nullptr, /*allow_exceptions=*/false);
  ASSERT_FALSE(json.is_discarded());
  EXPECT_EQ(json["ceilings"]["flops_per_s"], 2e9);
  ASSERT_EQ(json["runs"].size(), 2u);
  EXPECT_EQ(json["runs"][0]["mode"], "dense");
  EXPECT_EQ(json["runs"][0]["whole"]["seconds"]["median"], 0.5);
  EXPECT_EQ(json["runs"][1]["counters"]["sparse_blocks_read"], 34);
  EXPECT_EQ(json["runs"][1]["whole"]["stages"][0]["stage"], "select");
  EXPECT_EQ(json["ratios"][0]["value"], 2.0);
}

}  // namespace
}  // namespace resa::bench
