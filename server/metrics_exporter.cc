#include "server/metrics_exporter.h"

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/params.h"
#include "prometheus/counter.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"
#include "prometheus/text_serializer.h"

namespace resa::server {
namespace {

using ::prometheus::BuildCounter;
using ::prometheus::BuildGauge;
using ::prometheus::BuildHistogram;
using ::prometheus::Counter;
using ::prometheus::Gauge;
using ::prometheus::Histogram;
using ::prometheus::Labels;
using ::prometheus::Registry;

// 1, 2, 5, 10, ... times `first`, up to `last`.
std::vector<double> Buckets(double first, double last) {
  static constexpr double kSteps[] = {1, 2, 5};
  std::vector<double> buckets;
  for (double decade = first;; decade *= 10) {
    for (const double step : kSteps) {
      // A hair above, so that a last bound that is met in exact arithmetic is met here too.
      if (decade * step > last * (1 + 1e-9)) return buckets;
      buckets.push_back(decade * step);
    }
  }
}

// Builds families in one registry. All series get the common labels.
class Maker {
 public:
  Maker(Registry* registry, Labels common) : registry_(*registry), common_(std::move(common)) {}

  Counter* MakeCounter(const char* name, const char* help, const Labels& labels = {}) {
    auto& family = BuildCounter().Name(name).Help(help).Labels(common_).Register(registry_);
    return &family.Add(labels);
  }
  Gauge* MakeGauge(const char* name, const char* help, const Labels& labels = {}) {
    auto& family = BuildGauge().Name(name).Help(help).Labels(common_).Register(registry_);
    return &family.Add(labels);
  }
  Histogram* MakeHistogram(const char* name, const char* help, const std::vector<double>& buckets,
                           const Labels& labels = {}) {
    auto& family = BuildHistogram().Name(name).Help(help).Labels(common_).Register(registry_);
    return &family.Add(labels, buckets);
  }

 private:
  Registry& registry_;
  const Labels common_;
};

// What a step was mostly about: prompts, or a rectification, or nothing but decoding.
enum StepKind { kDecodeStep, kRectificationStep, kPrefillStep, kNumStepKinds };
constexpr const char* kStepKindNames[] = {"decode", "rectification", "prefill"};

enum RowKind { kPrefillRow, kSparseRow, kDenseRow, kRectificationRow, kNumRowKinds };
constexpr const char* kRowKindNames[] = {"prefill", "sparse_decode", "dense_decode",
                                         "rectification"};

// The label finished_reason, which knows aborts where we tell why.
enum Outcome { kStop, kLength, kAbort, kError, kNumOutcomes };
constexpr const char* kOutcomeNames[] = {"stop", "length", "abort", "error"};

// Why a call was refused: by itself, for load, or while the model loads or the server drains.
enum Refusal { kInvalid, kQueueFull, kUnavailable, kNumRefusals };
constexpr const char* kRefusalNames[] = {"invalid", "queue_full", "unavailable"};

}  // namespace

struct MetricsExporter::Series {
  explicit Series(std::string model_name);

  // Fixed after construction; the series are thread-safe and belong to the registry.
  Registry registry;
  Maker make;
  Gauge* running;
  Gauge* waiting;
  Gauge* cache_usage;
  Gauge* pages_used;
  Gauge* pages_free;
  Counter* preemptions;
  Counter* prompt_tokens;
  Counter* generation_tokens;
  std::array<Counter*, kNumOutcomes> outcomes;
  Histogram* iteration_tokens;
  Histogram* request_prompt_tokens;
  Histogram* request_generation_tokens;
  Histogram* time_to_first_token;
  Histogram* inter_token_latency;
  Histogram* time_per_output_token;
  Histogram* e2e_latency;
  Histogram* queue_time;
  Histogram* prefill_time;
  Histogram* decode_time;
  Counter* rectifications;
  Counter* rectification_rows;
  Histogram* rectification_delay;
  Histogram* kept_block_ratio;
  std::array<Histogram*, kNumStepKinds> step_seconds;
  std::array<Histogram*, kNumRowKinds> step_tokens;
  std::array<Counter*, kNumRefusals> refused;
};

MetricsExporter::Series::Series(std::string model_name)
    : make(&registry, {{"model_name", std::move(model_name)}}) {
  const std::vector<double> seconds = Buckets(0.001, 1000);
  const std::vector<double> tokens = Buckets(1, 1e6);

  running = make.MakeGauge("vllm:num_requests_running", "Sequences that take part in steps.");
  waiting =
      make.MakeGauge("vllm:num_requests_waiting", "Sequences that are accepted and do not run.");
  cache_usage = make.MakeGauge("vllm:kv_cache_usage_perc", "Share of the KV pool in use, 0 to 1.");
  preemptions = make.MakeCounter("vllm:num_preemptions_total",
                                 "Sequences that lost their pages and were recomputed.");
  prompt_tokens =
      make.MakeCounter("vllm:prompt_tokens_total", "Prompt tokens of started requests.");
  generation_tokens = make.MakeCounter("vllm:generation_tokens_total", "Tokens generated.");
  for (int i = 0; i < kNumOutcomes; ++i) {
    outcomes[i] =
        make.MakeCounter("vllm:request_success_total",
                         "Ended requests by reason; of several outputs, by that of the last.",
                         {{"finished_reason", kOutcomeNames[i]}});
  }
  iteration_tokens = make.MakeHistogram("vllm:iteration_tokens_total", "Rows of a step.", tokens);
  request_prompt_tokens =
      make.MakeHistogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", tokens);
  request_generation_tokens =
      make.MakeHistogram("vllm:request_generation_tokens", "Tokens of an output.", tokens);
  time_to_first_token = make.MakeHistogram("vllm:time_to_first_token_seconds",
                                           "Arrival to an output's first token.", seconds);
  inter_token_latency = make.MakeHistogram("vllm:inter_token_latency_seconds",
                                           "From token to token of an output.", seconds);
  time_per_output_token =
      make.MakeHistogram("vllm:request_time_per_output_token_seconds",
                         "An output's decode time over its tokens after the first.", seconds);
  e2e_latency = make.MakeHistogram("vllm:e2e_request_latency_seconds",
                                   "Arrival to the end of a request's last output.", seconds);
  queue_time = make.MakeHistogram("vllm:request_queue_time_seconds",
                                  "Arrival to an output's first step.", seconds);
  prefill_time = make.MakeHistogram("vllm:request_prefill_time_seconds",
                                    "An output's first step to its first token.", seconds);
  decode_time = make.MakeHistogram("vllm:request_decode_time_seconds",
                                   "An output's first token to its end.", seconds);

  rectifications = make.MakeCounter("resa_rectifications_total", "Windows rectified.");
  rectification_rows =
      make.MakeCounter("resa_rectification_rows_total", "Tokens recomputed by rectification.");
  rectification_delay =
      make.MakeHistogram("resa_rectification_delay_steps",
                         "Steps that a due window waited for room.", {0, 1, 2, 5, 10, 20, 50, 100});
  kept_block_ratio =
      make.MakeHistogram("resa_kept_block_ratio", "Blocks that a sparse step attended to, of all.",
                         {0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1});
  for (int i = 0; i < kNumStepKinds; ++i) {
    step_seconds[i] = make.MakeHistogram("resa_step_seconds",
                                         "Duration of a step, by the heaviest kind of its rows.",
                                         Buckets(0.0001, 100), {{"kind", kStepKindNames[i]}});
  }
  for (int i = 0; i < kNumRowKinds; ++i) {
    step_tokens[i] =
        make.MakeHistogram("resa_step_tokens", "Rows of one kind in a step, where there were any.",
                           Buckets(1, 1e5), {{"kind", kRowKindNames[i]}});
  }
  for (int i = 0; i < kNumRefusals; ++i) {
    refused[i] = make.MakeCounter("resa_rejected_requests_total", "Requests refused on arrival.",
                                  {{"reason", kRefusalNames[i]}});
  }
  pages_used = make.MakeGauge("resa_kv_pool_pages", "Pages of the KV pool.", {{"state", "used"}});
  pages_free = make.MakeGauge("resa_kv_pool_pages", "Pages of the KV pool.", {{"state", "free"}});
}

MetricsExporter::MetricsExporter(std::string model_name)
    : series_(std::make_unique<Series>(std::move(model_name))) {}

MetricsExporter::~MetricsExporter() = default;

void MetricsExporter::OnStep(const engine::StepReport& report) {
  const std::array<int32_t, kNumRowKinds> rows = {
      report.prefill_rows, report.sparse_rows, report.dense_decode_rows, report.rectification_rows};
  int32_t total = 0;
  for (int i = 0; i < kNumRowKinds; ++i) {
    total += rows[i];
    if (rows[i] > 0) series_->step_tokens[i]->Observe(rows[i]);
  }
  if (total > 0) {
    const StepKind kind = report.prefill_rows > 0         ? kPrefillStep
                          : report.rectification_rows > 0 ? kRectificationStep
                                                          : kDecodeStep;
    series_->step_seconds[kind]->Observe(absl::ToDoubleSeconds(report.duration));
    series_->iteration_tokens->Observe(total);
  }
  if (report.preemptions > 0) series_->preemptions->Increment(report.preemptions);
  if (report.tokens_emitted > 0) series_->generation_tokens->Increment(report.tokens_emitted);
}

void MetricsExporter::OnRectification(int32_t rows, int32_t delay_steps) {
  series_->rectifications->Increment();
  series_->rectification_rows->Increment(rows);
  series_->rectification_delay->Observe(delay_steps);
}

void MetricsExporter::OnSparseRow(int32_t kept, int32_t total) {
  series_->kept_block_ratio->Observe(static_cast<double>(kept) / total);
}

void MetricsExporter::OnPromptTokens(int32_t count) { series_->prompt_tokens->Increment(count); }

void MetricsExporter::OnFirstToken(absl::Duration since_arrival) {
  series_->time_to_first_token->Observe(absl::ToDoubleSeconds(since_arrival));
}

void MetricsExporter::OnNextToken(absl::Duration since_last) {
  series_->inter_token_latency->Observe(absl::ToDoubleSeconds(since_last));
}

void MetricsExporter::OnFinished(const engine::Finished& finished) {
  const double decode = absl::ToDoubleSeconds(finished.timings.decode);
  series_->request_generation_tokens->Observe(finished.usage.output_tokens);
  if (finished.usage.output_tokens > 1) {
    series_->time_per_output_token->Observe(decode / (finished.usage.output_tokens - 1));
  }
  series_->queue_time->Observe(absl::ToDoubleSeconds(finished.timings.queued));
  series_->prefill_time->Observe(absl::ToDoubleSeconds(finished.timings.prefill));
  series_->decode_time->Observe(decode);
}

void MetricsExporter::OnRequestFinished(const engine::Finished& last) {
  series_->outcomes[last.reason == engine::FinishReason::kStop ? kStop : kLength]->Increment();
  series_->request_prompt_tokens->Observe(last.usage.prompt_tokens);
  series_->e2e_latency->Observe(absl::ToDoubleSeconds(last.timings.total));
}

void MetricsExporter::OnError(const absl::Status& status) {
  const bool aborted = absl::IsCancelled(status) || absl::IsDeadlineExceeded(status);
  series_->outcomes[aborted ? kAbort : kError]->Increment();
}

void MetricsExporter::CountRefusal(const absl::Status& status) {
  const Refusal refusal = absl::IsResourceExhausted(status) ? kQueueFull
                          : absl::IsUnavailable(status)     ? kUnavailable
                                                            : kInvalid;
  series_->refused[refusal]->Increment();
}

void MetricsExporter::Describe(const resa::v1::GetModelResponse& model) {
  series_->make
      .MakeGauge("vllm:cache_config_info", "The KV pool, in its labels.",
                 {{"block_size", absl::StrCat(kernels::kPageTokens)},
                  {"num_gpu_blocks", absl::StrCat(model.pool_tokens() / kernels::kPageTokens)}})
      ->Set(1);
  series_->make
      .MakeGauge("resa_build_info", "Version and device, in its labels.",
                 {{"version", model.server_version()}, {"device", model.device()}})
      ->Set(1);
}

std::string MetricsExporter::Render(const engine::EngineLoad& load) {
  series_->running->Set(load.running);
  series_->waiting->Set(load.waiting);
  const double total = static_cast<double>(load.pages_total);
  series_->cache_usage->Set(total > 0 ? static_cast<double>(load.pages_used) / total : 0);
  series_->pages_used->Set(static_cast<double>(load.pages_used));
  series_->pages_free->Set(static_cast<double>(load.pages_total - load.pages_used));
  return prometheus::TextSerializer().Serialize(series_->registry.Collect());
}

}  // namespace resa::server
