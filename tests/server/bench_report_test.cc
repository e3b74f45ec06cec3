#include "server/bench_report.h"

#include <cmath>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace resa::server {
namespace {

using ::testing::HasSubstr;

TEST(PercentileTest, IsTheNearestRank) {
  std::vector<double> values = {5, 1, 4, 2, 3};
  EXPECT_EQ(Percentile(&values, 50), 3);
  EXPECT_EQ(Percentile(&values, 20), 1);
  EXPECT_EQ(Percentile(&values, 21), 2);
  EXPECT_EQ(Percentile(&values, 90), 5);
  EXPECT_EQ(Percentile(&values, 100), 5);
  std::vector<double> one = {7};
  EXPECT_EQ(Percentile(&one, 1), 7);
  std::vector<double> none;
  EXPECT_TRUE(std::isnan(Percentile(&none, 50)));
}

TEST(AddTokenIntervalsTest, SharesATimeAmongTheTokensOfADelta) {
  RequestRecord record;
  AddTokenIntervals(1, absl::Milliseconds(10), &record);
  AddTokenIntervals(4, absl::Milliseconds(20), &record);
  ASSERT_EQ(record.token_intervals.size(), 5u);
  EXPECT_EQ(record.token_intervals[0], absl::Milliseconds(10));
  EXPECT_EQ(record.token_intervals[4], absl::Milliseconds(5));
}

std::vector<RequestRecord> ThreeRecords() {
  RequestRecord a;
  a.prompt_tokens = 100;
  a.output_tokens = 10;
  a.sparse_steps = 30;
  a.kept_block_ratio = 0.1;
  a.rectifications = 2;
  a.first_token = absl::Seconds(1);
  a.total = absl::Seconds(3);
  a.token_intervals.assign(9, absl::Milliseconds(100));
  RequestRecord b = a;
  b.sparse_steps = 10;
  b.kept_block_ratio = 0.5;
  b.first_token = absl::Seconds(2);
  RequestRecord failed;
  failed.error = "RESOURCE_EXHAUSTED";
  failed.prompt_tokens = 9999;
  return {a, b, failed};
}

TEST(BenchReportTest, CountsWhatWentWellAndNamesTheRest) {
  const BenchReport report = MakeReport(ThreeRecords(), absl::Seconds(5));
  EXPECT_EQ(report.requests, 3);
  EXPECT_EQ(report.succeeded, 2);
  EXPECT_EQ(report.errors.at("RESOURCE_EXHAUSTED"), 1);
  EXPECT_EQ(report.prompt_tokens, 200);
  EXPECT_EQ(report.output_tokens, 20);
  EXPECT_DOUBLE_EQ(report.output_tokens_per_second, 4);
  EXPECT_DOUBLE_EQ(report.total_tokens_per_second, 44);
  EXPECT_DOUBLE_EQ(report.requests_per_second, 0.4);
  EXPECT_DOUBLE_EQ(report.first_token_seconds.mean, 1.5);
  EXPECT_DOUBLE_EQ(report.first_token_seconds.p50, 1);
  EXPECT_DOUBLE_EQ(report.first_token_seconds.p99, 2);
  EXPECT_DOUBLE_EQ(report.token_interval_seconds.p90, 0.1);
  EXPECT_EQ(report.sparse_steps, 40);
  // (30 * 0.1 + 10 * 0.5) / 40
  EXPECT_DOUBLE_EQ(report.kept_block_ratio, 0.2);
  EXPECT_EQ(report.rectifications, 4);
}

TEST(BenchReportTest, TextShowsMilliseconds) {
  const std::string text = ToText(MakeReport(ThreeRecords(), absl::Seconds(5)));
  EXPECT_THAT(text, HasSubstr("2 of 3 requests in 5.00 s: 200 prompt and 20 output tokens"));
  EXPECT_THAT(text, HasSubstr("time to first token       1500.0    1000.0    2000.0    2000.0"));
  EXPECT_THAT(text, HasSubstr("20.0% of the blocks kept"));
  EXPECT_THAT(text, HasSubstr("1 requests failed with RESOURCE_EXHAUSTED"));
}

TEST(BenchReportTest, JsonIsOneObjectAndWhatHasNoValueIsNull) {
  const std::string text = ToJson(MakeReport({}, absl::ZeroDuration()));
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  ASSERT_TRUE(json.is_object()) << text;
  EXPECT_TRUE(json["first_token_seconds"]["p50"].is_null());
  EXPECT_EQ(json["requests"], 0);
  EXPECT_EQ(json["output_tokens_per_second"], 0);
}

}  // namespace
}  // namespace resa::server
