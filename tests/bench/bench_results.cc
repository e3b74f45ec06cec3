#include "tests/bench/bench_results.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace resa::bench {
namespace {

using engine::AttentionMode;

double SecondsOf(const StepRecord& record) { return record.seconds; }
double BetweenOpsOf(const StepRecord& record) {
  double seconds = record.seconds;
  for (const StageTotals& stage : record.stages) seconds -= stage.seconds;
  return seconds;
}
double AttentionOf(const StepRecord& record) {
  double seconds = 0;
  for (const Stage stage : {Stage::kSelect, Stage::kSparseAttend, Stage::kChunkAttend}) {
    seconds += record.stages[static_cast<size_t>(stage)].seconds;
  }
  return seconds;
}

// Sums of `value` over units of `unit_steps` records.
std::vector<double> UnitSums(absl::Span<const StepRecord> records, int32_t unit_steps,
                             const std::function<double(const StepRecord&)>& value) {
  std::vector<double> sums;
  const size_t step = static_cast<size_t>(unit_steps);
  for (size_t i = 0; i + step <= records.size(); i += step) {
    double sum = 0;
    for (size_t j = i; j < i + step; ++j) sum += value(records[j]);
    sums.push_back(sum);
  }
  return sums;
}

// The records that have the times of stages.
const std::vector<StepRecord>& StagesOf(const RunResult& run) {
  return run.stage_records.empty() ? run.records : run.stage_records;
}

// Median over rounds of (b's value / a's), each per token. Of what is timed apart a few rounds are
// enough.
double PairedRatio(const RunResult& a, const RunResult& b, bool of_stages,
                   const std::function<double(const StepRecord&)>& value) {
  const int32_t unit = std::max(a.round_steps, b.round_steps);
  const std::vector<double> of_a = UnitSums(of_stages ? StagesOf(a) : a.records, unit, value);
  const std::vector<double> of_b = UnitSums(of_stages ? StagesOf(b) : b.records, unit, value);
  RESA_CHECK_EQ(of_a.size(), of_b.size());
  const double tokens_a = a.records[0].tokens, tokens_b = b.records[0].tokens;
  std::vector<double> ratios;
  for (size_t i = 0; i < of_a.size(); ++i) {
    if (of_a[i] > 0) ratios.push_back(of_b[i] / tokens_b / (of_a[i] / tokens_a));
  }
  return Percentile(ratios, 50);
}

bool SameSetting(const RunSpec& a, const RunSpec& b) {
  return !a.prefill && !b.prefill && a.context == b.context && a.batch == b.batch;
}
bool SameButBatch(const RunSpec& a, const RunSpec& b) {
  return !a.prefill && !b.prefill && a.context == b.context && a.mode == b.mode;
}

}  // namespace

double Percentile(std::vector<double> values, double percent) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const double rank = std::ceil(percent / 100 * static_cast<double>(values.size()));
  return values[static_cast<size_t>(std::max(rank, 1.0)) - 1];
}

Summary Summarise(absl::Span<const StepRecord> records, int32_t unit_steps) {
  RESA_CHECK_GT(unit_steps, 0);
  Summary s;
  s.unit_steps = unit_steps;
  const std::vector<double> seconds = UnitSums(records, unit_steps, SecondsOf);
  s.units = static_cast<int64_t>(seconds.size());
  if (s.units == 0) return s;
  s.median = Percentile(seconds, 50) / unit_steps;
  s.p10 = Percentile(seconds, 10) / unit_steps;
  s.p90 = Percentile(seconds, 90) / unit_steps;
  s.seconds_between_ops = Percentile(UnitSums(records, unit_steps, BetweenOpsOf), 50) / unit_steps;
  const int64_t steps = s.units * unit_steps;
  for (size_t stage = 0; stage < s.stages.size(); ++stage) {
    StageTotals& total = s.stages[stage];
    for (int64_t i = 0; i < steps; ++i) total += records[i].stages[stage];
    total.bytes /= static_cast<double>(steps);
    total.flops /= static_cast<double>(steps);
    total.seconds_at_ceiling /= static_cast<double>(steps);
    total.seconds =
        Percentile(
            UnitSums(records, unit_steps,
                     [stage](const StepRecord& record) { return record.stages[stage].seconds; }),
            50) /
        unit_steps;
    s.bytes += total.bytes;
    s.flops += total.flops;
    s.seconds_at_ceiling += total.seconds_at_ceiling;
  }
  double tokens = 0;
  for (int64_t i = 0; i < steps; ++i) tokens += records[i].tokens;
  s.tokens_per_second = tokens / static_cast<double>(steps) / s.median;
  return s;
}

namespace {

bool HasWindow(const StepRecord& record) { return record.windows > 0; }

std::vector<StepRecord> Those(absl::Span<const StepRecord> records, bool with_window) {
  std::vector<StepRecord> those;
  std::copy_if(records.begin(), records.end(), std::back_inserter(those),
               [&](const StepRecord& r) { return HasWindow(r) == with_window; });
  return those;
}

// With the stages' times from `apart`, where there are any.
Summary SummariseWith(absl::Span<const StepRecord> records, absl::Span<const StepRecord> apart,
                      int32_t unit_steps) {
  Summary summary = Summarise(records, unit_steps);
  if (apart.empty()) return summary;
  const Summary timed = Summarise(apart, unit_steps);
  for (size_t i = 0; i < summary.stages.size(); ++i) {
    summary.stages[i].seconds = timed.stages[i].seconds;
  }
  summary.seconds_between_ops = 0;
  return summary;
}

}  // namespace

RunResult ResultOf(const BenchRun& run) {
  RunResult result;
  result.spec = run.spec();
  result.round_steps = run.round_steps();
  result.records = run.records();
  result.stage_records = run.stage_records();
  result.whole = SummariseWith(result.records, result.stage_records, result.round_steps);
  for (const StepRecord& r : result.records) {
    result.steps += 1;
    result.rows += r.rows;
    result.tokens += r.tokens;
    result.rectifications += r.windows;
    result.rectified_rows += r.rectified_rows;
    result.counters = AddScaled(result.counters, r.counters, 1);
  }
  const std::vector<StepRecord> plain = Those(result.records, false);
  const std::vector<StepRecord> windows = Those(result.records, true);
  if (!plain.empty() && !windows.empty()) {
    result.plain = SummariseWith(plain, Those(result.stage_records, false), 1);
    result.windows = SummariseWith(windows, Those(result.stage_records, true), 1);
  }
  return result;
}

std::vector<Ratio> RatiosOf(absl::Span<const RunResult> results) {
  std::vector<Ratio> ratios;
  for (const RunResult& a : results) {
    const RunSpec& spec = a.spec;
    for (const RunResult& b : results) {
      if (SameSetting(spec, b.spec) && b.spec.mode == AttentionMode::kDense &&
          spec.mode != AttentionMode::kDense) {
        const std::string where = absl::StrCat(", ", spec.context, " x ", spec.batch);
        ratios.push_back({absl::StrCat(NameOf(spec.mode), " / dense", where),
                          PairedRatio(a, b, false, SecondsOf)});
        ratios.push_back({absl::StrCat(NameOf(spec.mode), " / dense, attention alone", where),
                          PairedRatio(a, b, true, AttentionOf)});
      }
      if (SameButBatch(spec, b.spec) && b.spec.batch < spec.batch &&
          std::none_of(results.begin(), results.end(), [&](const RunResult& c) {
            return SameButBatch(spec, c.spec) && c.spec.batch < b.spec.batch;
          })) {
        ratios.push_back({absl::StrCat("batch ", spec.batch, " / batch ", b.spec.batch, ", ",
                                       NameOf(spec.mode), ", ", spec.context),
                          PairedRatio(a, b, false, SecondsOf)});
      }
    }
  }
  return ratios;
}

}  // namespace resa::bench
