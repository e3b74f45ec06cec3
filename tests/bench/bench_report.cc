#include "tests/bench/bench_report.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"

namespace resa::bench {
namespace {

using Json = nlohmann::ordered_json;

std::string SelectorText(const kernels::SelectorSpec& spec) {
  if (spec.kind == kernels::SelectorKind::kMinMax) return "minmax, blocks of 16";
  return absl::StrFormat("sketch, %d planes, blocks of %d, refine shares %g and %g", spec.planes,
                         spec.block_tokens, spec.refine_share[0], spec.refine_share[1]);
}

// The shares are of the first measurement; a second that differs says that one of both was
// disturbed, and the steps in between no less.
bool Unsteady(const kernels::Ceilings& a, const kernels::Ceilings& b) {
  const auto differ = [](double x, double y) { return std::abs(x - y) > 0.1 * std::max(x, y); };
  return differ(a.read_bytes_per_s, b.read_bytes_per_s) || differ(a.flops_per_s, b.flops_per_s);
}

void AppendHead(const BenchReport& r, std::string* out) {
  absl::StrAppendFormat(out, "machine   %s\n", r.device);
  absl::StrAppendFormat(
      out, "ceilings  read %.1f GB/s, multiply-add %.0f GFLOP/s (at the end %.1f and %.0f)\n",
      r.ceilings.read_bytes_per_s / 1e9, r.ceilings.flops_per_s / 1e9,
      r.ceilings_at_end.read_bytes_per_s / 1e9, r.ceilings_at_end.flops_per_s / 1e9);
  if (Unsteady(r.ceilings, r.ceilings_at_end)) {
    out->append("          they differ: the machine was busy, trust the ratios alone\n");
  }
  absl::StrAppendFormat(out, "model     %s: %d layers, hidden %d, %d/%d heads, d %d, %.0f MB\n",
                        r.model, r.config.num_layers, r.config.hidden_size, r.config.num_heads,
                        r.config.num_kv_heads, r.config.head_dim,
                        static_cast<double>(r.weight_bytes) / 1e6);
  absl::StrAppendFormat(out, "selector  %s; keep %g, f %d\n", SelectorText(r.layout.selector),
                        r.policy.keep_ratio, r.policy.rectify_interval);
}

// The same columns for a run, a part of it and a stage.
std::string Columns(const std::string& name, double seconds, double of, double bytes, double flops,
                    double seconds_at_ceiling) {
  if (seconds <= 0) return absl::StrFormat("  %-16s %10.4f\n", name, seconds * 1e3);
  return absl::StrFormat("  %-16s %10.4f %6.1f%% %8.2f %9.1f %7.1f%%\n", name, seconds * 1e3,
                         100 * seconds / of, bytes / seconds / 1e9, flops / seconds / 1e9,
                         100 * seconds_at_ceiling / seconds);
}

void AppendPart(const char* name, const Summary& part, std::string* out) {
  if (part.units == 0) return;
  absl::StrAppendFormat(out, "  %-16s %10.4f ms a step [%.4f, %.4f], %d of them; roofline %.1f%%\n",
                        name, part.median * 1e3, part.p10 * 1e3, part.p90 * 1e3, part.units,
                        100 * part.roofline_share());
}

// What several stages make together.
void AppendSubtotal(const char* name, const Summary& s, std::initializer_list<Stage> stages,
                    std::string* out) {
  StageTotals sum;
  for (const Stage stage : stages) sum += s.stages[static_cast<size_t>(stage)];
  out->append(Columns(name, sum.seconds, s.median, sum.bytes, sum.flops, sum.seconds_at_ceiling));
}

void AppendRun(const BenchReport& report, const RunResult& r, std::string* out) {
  const Summary& w = r.whole;
  absl::StrAppendFormat(out, "\n%s: %.4f ms a step [p10 %.4f, p90 %.4f], %.1f tokens/s\n",
                        r.spec.Name(), w.median * 1e3, w.p10 * 1e3, w.p90 * 1e3,
                        w.tokens_per_second);
  const bool apart = !r.stage_records.empty();
  absl::StrAppendFormat(out, "  %-16s %10s %7s %8s %9s %8s\n", apart ? "stage, alone" : "stage",
                        "ms", "share", "GB/s", "GFLOP/s", "ceiling");
  for (int i = 0; i < kNumStages; ++i) {
    const StageTotals& stage = w.stages[static_cast<size_t>(i)];
    if (stage.calls == 0) continue;
    out->append(Columns(NameOf(static_cast<Stage>(i)), stage.seconds, w.median, stage.bytes,
                        stage.flops, stage.seconds_at_ceiling));
  }
  AppendSubtotal(
      "= all Linear", w,
      {Stage::kQkv, Stage::kOutput, Stage::kGateUp, Stage::kDown, Stage::kLinear, Stage::kLogits},
      out);
  AppendSubtotal("= attention", w, {Stage::kSelect, Stage::kSparseAttend, Stage::kChunkAttend},
                 out);
  if (!apart) {
    absl::StrAppendFormat(out, "  %-16s %10.4f %6.1f%%\n", "between ops",
                          w.seconds_between_ops * 1e3, 100 * w.seconds_between_ops / w.median);
  }
  out->append(Columns("whole step", w.median, w.median, w.bytes, w.flops, w.seconds_at_ceiling));
  AppendPart("steps without", r.plain, out);
  AppendPart("steps with window", r.windows, out);
  const kernels::OpCounters& c = r.counters;
  const double layers = report.config.num_layers;
  absl::StrAppendFormat(out,
                        "  ran: %d steps, %d rows, %d tokens; a layer: %.0f dense rows, %.0f "
                        "sparse rows, %.0f blocks "
                        "read, %.0f descriptor bytes; %d windows of %d rows in all\n",
                        r.steps, r.rows, r.tokens, c.dense_rows / layers, c.sparse_rows / layers,
                        c.sparse_blocks_read / layers, c.descriptor_bytes / layers,
                        r.rectifications, r.rectified_rows);
  if (c.steps_recorded + c.steps_replayed > 0) {
    absl::StrAppendFormat(out, "  of the steps %d were replayed from a recording, %d recorded\n",
                          c.steps_replayed, c.steps_recorded);
  }
}

void AppendSummary(const BenchReport& report, std::string* out) {
  absl::StrAppendFormat(out, "\n%-32s %10s %21s %10s %7s %8s\n", "run", "ms a step", "p10 .. p90",
                        "tokens/s", "read", "roofline");
  for (const RunResult& r : report.results) {
    const Summary& w = r.whole;
    absl::StrAppendFormat(
        out, "%-32s %10.3f %10.3f ..%9.3f %10.1f %6.1f%% %7.1f%%\n", r.spec.Name(), w.median * 1e3,
        w.p10 * 1e3, w.p90 * 1e3, w.tokens_per_second,
        100 * w.bytes / w.median / report.ceilings.read_bytes_per_s, 100 * w.roofline_share());
  }
}

Json JsonOfCeilings(const kernels::Ceilings& c) {
  return {{"read_bytes_per_s", c.read_bytes_per_s}, {"flops_per_s", c.flops_per_s}};
}

Json JsonOfSummary(const Summary& s) {
  Json stages = Json::array();
  for (int i = 0; i < kNumStages; ++i) {
    const StageTotals& stage = s.stages[static_cast<size_t>(i)];
    if (stage.calls == 0) continue;
    stages.push_back({{"stage", NameOf(static_cast<Stage>(i))},
                      {"seconds", stage.seconds},
                      {"bytes", stage.bytes},
                      {"flops", stage.flops},
                      {"seconds_at_ceiling", stage.seconds_at_ceiling}});
  }
  return {{"units", s.units},
          {"unit_steps", s.unit_steps},
          {"seconds", {{"median", s.median}, {"p10", s.p10}, {"p90", s.p90}}},
          {"tokens_per_s", s.tokens_per_second},
          {"bytes", s.bytes},
          {"flops", s.flops},
          {"seconds_at_ceiling", s.seconds_at_ceiling},
          {"roofline_share", s.roofline_share()},
          {"seconds_between_ops", s.seconds_between_ops},
          {"stages", std::move(stages)}};
}

Json JsonOfCounters(const RunResult& r) {
  const kernels::OpCounters& c = r.counters;
  return {{"steps", r.steps},
          {"rows", r.rows},
          {"tokens", r.tokens},
          {"rectifications", r.rectifications},
          {"rectified_rows", r.rectified_rows},
          {"linear_rows", c.linear_rows},
          {"linear_flops", c.linear_flops},
          {"weight_bytes", c.weight_bytes},
          {"dense_rows", c.dense_rows},
          {"dense_tokens_attended", c.dense_tokens_attended},
          {"sparse_rows", c.sparse_rows},
          {"sparse_blocks_read", c.sparse_blocks_read},
          {"blocks_scored", c.blocks_scored},
          {"descriptor_bytes", c.descriptor_bytes},
          {"steps_recorded", c.steps_recorded},
          {"steps_replayed", c.steps_replayed},
          {"linears_fused", c.linears_fused},
          {"page_ids_staged", c.page_ids_staged}};
}

Json JsonOfRun(const RunResult& r) {
  Json run = {{"name", r.spec.Name()},           {"kind", r.spec.prefill ? "prefill" : "decode"},
              {"mode", NameOf(r.spec.mode)},     {"context", r.spec.context},
              {"batch", r.spec.batch},           {"rows", r.spec.rows},
              {"whole", JsonOfSummary(r.whole)}, {"counters", JsonOfCounters(r)}};
  if (r.plain.units > 0) run["steps_without_window"] = JsonOfSummary(r.plain);
  if (r.windows.units > 0) run["steps_with_window"] = JsonOfSummary(r.windows);
  return run;
}

}  // namespace

std::string TextOf(const BenchReport& report) {
  std::string out;
  AppendHead(report, &out);
  for (const RunResult& result : report.results) AppendRun(report, result, &out);
  AppendSummary(report, &out);
  if (!report.ratios.empty()) out.append("\nratios of tokens/s\n");
  for (const Ratio& ratio : report.ratios) {
    absl::StrAppendFormat(&out, "  %-48s %7.3fx\n", ratio.name, ratio.value);
  }
  return out;
}

std::string JsonOf(const BenchReport& report) {
  const engine::ModelConfig& c = report.config;
  const kernels::SelectorSpec& spec = report.layout.selector;
  Json json = {{"device", report.device},
               {"ceilings", JsonOfCeilings(report.ceilings)},
               {"ceilings_at_end", JsonOfCeilings(report.ceilings_at_end)},
               {"model",
                {{"name", report.model},
                 {"layers", c.num_layers},
                 {"hidden", c.hidden_size},
                 {"intermediate", c.intermediate_size},
                 {"heads", c.num_heads},
                 {"kv_heads", c.num_kv_heads},
                 {"head_dim", c.head_dim},
                 {"vocabulary", c.vocab_size},
                 {"weight_bytes", report.weight_bytes}}},
               {"selector",
                {{"kind", spec.kind == kernels::SelectorKind::kMinMax ? "minmax" : "sketch"},
                 {"block_tokens", spec.block_tokens},
                 {"planes", spec.planes},
                 {"refine_share", spec.refine_share}}},
               {"policy",
                {{"keep_ratio", report.policy.keep_ratio},
                 {"min_tokens", report.policy.min_tokens},
                 {"local_tokens", report.policy.local_tokens},
                 {"sink_tokens", report.policy.sink_tokens},
                 {"interval", report.policy.rectify_interval}}}};
  json["runs"] = Json::array();
  for (const RunResult& result : report.results) json["runs"].push_back(JsonOfRun(result));
  json["ratios"] = Json::array();
  for (const Ratio& ratio : report.ratios) {
    json["ratios"].push_back({{"name", ratio.name}, {"value", ratio.value}});
  }
  return json.dump(2);
}

}  // namespace resa::bench
