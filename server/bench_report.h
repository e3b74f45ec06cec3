#ifndef RESA_SERVER_BENCH_REPORT_H_
#define RESA_SERVER_BENCH_REPORT_H_

// What `resactl bench` measured, and how it is shown.

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace resa::server {

// The client's view of one request.
struct RequestRecord {
  std::string error;  // Name of the status code; empty: it went well.
  int64_t prompt_tokens = 0;
  int64_t output_tokens = 0;
  int64_t sparse_steps = 0;
  double kept_block_ratio = 0;  // Over its sparse steps.
  int64_t rectifications = 0;
  absl::Duration first_token;  // From sending the request.
  absl::Duration total;
  std::vector<absl::Duration> token_intervals;  // One per token after the first delta.
};

// A delta of `tokens` tokens that came `since_last` after the one before counts as that many equal
// intervals.
void AddTokenIntervals(int64_t tokens, absl::Duration since_last, RequestRecord* record);

// Nearest-rank percentile: the smallest value that at least `percent` of all do not exceed. NaN
// without values. REQUIRES 0 < percent <= 100; sorts `values`.
double Percentile(std::vector<double>* values, double percent);

struct Distribution {
  double mean = 0;
  double p50 = 0;
  double p90 = 0;
  double p99 = 0;
};
// All NaN without values.
Distribution Summarise(std::vector<double> values);

struct BenchReport {
  double seconds = 0;  // From the first request to the end of the last.
  int64_t requests = 0;
  int64_t succeeded = 0;
  std::map<std::string, int64_t> errors;  // By status code.
  int64_t prompt_tokens = 0;              // Of requests that went well, as all that follows.
  int64_t output_tokens = 0;
  double output_tokens_per_second = 0;
  double total_tokens_per_second = 0;
  double requests_per_second = 0;
  Distribution first_token_seconds;
  Distribution token_interval_seconds;
  Distribution request_seconds;
  int64_t sparse_steps = 0;
  double kept_block_ratio = 0;  // Over all sparse steps.
  int64_t rectifications = 0;
};

BenchReport MakeReport(const std::vector<RequestRecord>& records, absl::Duration elapsed);
std::string ToText(const BenchReport& report);
// One JSON object; what has no value is null.
std::string ToJson(const BenchReport& report);

}  // namespace resa::server

#endif  // RESA_SERVER_BENCH_REPORT_H_
