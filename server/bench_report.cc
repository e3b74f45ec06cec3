#include "server/bench_report.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/check.h"
#include "nlohmann/json.hpp"

namespace resa::server {
namespace {

nlohmann::json ToJsonValue(const Distribution& distribution) {
  return {{"mean", distribution.mean},
          {"p50", distribution.p50},
          {"p90", distribution.p90},
          {"p99", distribution.p99}};
}

std::string Row(const char* name, const Distribution& seconds) {
  return absl::StrFormat("%-22s%10.1f%10.1f%10.1f%10.1f\n", name, 1e3 * seconds.mean,
                         1e3 * seconds.p50, 1e3 * seconds.p90, 1e3 * seconds.p99);
}

}  // namespace

void AddTokenIntervals(int64_t tokens, absl::Duration since_last, RequestRecord* record) {
  for (int64_t i = 0; i < tokens; ++i) record->token_intervals.push_back(since_last / tokens);
}

double Percentile(std::vector<double>* values, double percent) {
  RESA_CHECK(percent > 0 && percent <= 100) << percent;
  if (values->empty()) return std::numeric_limits<double>::quiet_NaN();
  std::sort(values->begin(), values->end());
  const double rank = std::ceil(percent / 100 * static_cast<double>(values->size()));
  return (*values)[static_cast<size_t>(rank) - 1];
}

Distribution Summarise(std::vector<double> values) {
  Distribution distribution;
  distribution.mean = values.empty()
                          ? std::numeric_limits<double>::quiet_NaN()
                          : std::accumulate(values.begin(), values.end(), 0.0) / values.size();
  distribution.p50 = Percentile(&values, 50);
  distribution.p90 = Percentile(&values, 90);
  distribution.p99 = Percentile(&values, 99);
  return distribution;
}

BenchReport MakeReport(const std::vector<RequestRecord>& records, absl::Duration elapsed) {
  BenchReport report;
  report.seconds = absl::ToDoubleSeconds(elapsed);
  report.requests = static_cast<int64_t>(records.size());
  std::vector<double> first_token, interval, total;
  double kept = 0;
  for (const RequestRecord& record : records) {
    if (!record.error.empty()) {
      ++report.errors[record.error];
      continue;
    }
    ++report.succeeded;
    report.prompt_tokens += record.prompt_tokens;
    report.output_tokens += record.output_tokens;
    report.sparse_steps += record.sparse_steps;
    kept += record.kept_block_ratio * static_cast<double>(record.sparse_steps);
    report.rectifications += record.rectifications;
    first_token.push_back(absl::ToDoubleSeconds(record.first_token));
    total.push_back(absl::ToDoubleSeconds(record.total));
    for (const absl::Duration each : record.token_intervals) {
      interval.push_back(absl::ToDoubleSeconds(each));
    }
  }
  if (report.seconds > 0) {
    report.output_tokens_per_second = report.output_tokens / report.seconds;
    report.total_tokens_per_second = (report.prompt_tokens + report.output_tokens) / report.seconds;
    report.requests_per_second = report.succeeded / report.seconds;
  }
  if (report.sparse_steps > 0) {
    report.kept_block_ratio = kept / static_cast<double>(report.sparse_steps);
  }
  report.first_token_seconds = Summarise(std::move(first_token));
  report.token_interval_seconds = Summarise(std::move(interval));
  report.request_seconds = Summarise(std::move(total));
  return report;
}

std::string ToText(const BenchReport& report) {
  std::string text = absl::StrFormat(
      "%d of %d requests in %.2f s: %d prompt and %d output tokens\n"
      "%.1f output tokens/s, %.1f tokens/s in all, %.2f requests/s\n\n"
      "%-22s%10s%10s%10s%10s\n",
      report.succeeded, report.requests, report.seconds, report.prompt_tokens, report.output_tokens,
      report.output_tokens_per_second, report.total_tokens_per_second, report.requests_per_second,
      "milliseconds", "mean", "p50", "p90", "p99");
  text += Row("time to first token", report.first_token_seconds);
  text += Row("between tokens", report.token_interval_seconds);
  text += Row("whole request", report.request_seconds);
  absl::StrAppendFormat(&text, "\n%d sparse steps", report.sparse_steps);
  if (report.sparse_steps > 0) {
    absl::StrAppendFormat(&text, ", %.1f%% of the blocks kept", 100 * report.kept_block_ratio);
  }
  absl::StrAppendFormat(&text, ", %d rectifications\n", report.rectifications);
  for (const auto& [code, count] : report.errors) {
    absl::StrAppendFormat(&text, "%d requests failed with %s\n", count, code);
  }
  return text;
}

std::string ToJson(const BenchReport& report) {
  const nlohmann::json json = {
      {"seconds", report.seconds},
      {"requests", report.requests},
      {"succeeded", report.succeeded},
      {"errors", report.errors},
      {"prompt_tokens", report.prompt_tokens},
      {"output_tokens", report.output_tokens},
      {"output_tokens_per_second", report.output_tokens_per_second},
      {"total_tokens_per_second", report.total_tokens_per_second},
      {"requests_per_second", report.requests_per_second},
      {"first_token_seconds", ToJsonValue(report.first_token_seconds)},
      {"token_interval_seconds", ToJsonValue(report.token_interval_seconds)},
      {"request_seconds", ToJsonValue(report.request_seconds)},
      {"sparse_steps", report.sparse_steps},
      {"kept_block_ratio", report.kept_block_ratio},
      {"rectifications", report.rectifications},
  };
  // NaN becomes null.
  return json.dump();
}

}  // namespace resa::server
