#include "server/metrics_exporter.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace resa::server {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class MetricsExporterTest : public testing::Test {
 protected:
  std::string Render() { return exporter_.Render(load_); }

  MetricsExporter exporter_{"tiny"};
  engine::EngineLoad load_;
};

TEST_F(MetricsExporterTest, EverySeriesIsThereFromTheStart) {
  const std::string text = Render();
  for (const char* name : {"vllm:num_requests_running",
                           "vllm:num_requests_waiting",
                           "vllm:kv_cache_usage_perc",
                           "vllm:num_preemptions_total",
                           "vllm:prompt_tokens_total",
                           "vllm:generation_tokens_total",
                           "vllm:request_success_total",
                           "vllm:iteration_tokens_total",
                           "vllm:request_prompt_tokens",
                           "vllm:request_generation_tokens",
                           "vllm:time_to_first_token_seconds",
                           "vllm:inter_token_latency_seconds",
                           "vllm:request_time_per_output_token_seconds",
                           "vllm:e2e_request_latency_seconds",
                           "vllm:request_queue_time_seconds",
                           "vllm:request_prefill_time_seconds",
                           "vllm:request_decode_time_seconds",
                           "resa_rectifications_total",
                           "resa_rectification_rows_total",
                           "resa_rectification_delay_steps",
                           "resa_kept_block_ratio",
                           "resa_step_seconds",
                           "resa_step_tokens",
                           "resa_rejected_requests_total",
                           "resa_kv_pool_pages"}) {
    EXPECT_THAT(text, HasSubstr(std::string("# TYPE ") + name + " "));
  }
}

TEST_F(MetricsExporterTest, EverySampleNamesTheModel) {
  std::istringstream lines(Render());
  int samples = 0;
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line[0] == '#') continue;
    EXPECT_THAT(line, HasSubstr("model_name=\"tiny\""));
    ++samples;
  }
  EXPECT_GT(samples, 100);
}

TEST_F(MetricsExporterTest, GaugesShowTheLoad) {
  load_.running = 3;
  load_.waiting = 4;
  load_.pages_total = 640;
  load_.pages_used = 160;
  const std::string text = Render();
  EXPECT_THAT(text, HasSubstr("vllm:num_requests_running{model_name=\"tiny\"} 3"));
  EXPECT_THAT(text, HasSubstr("vllm:num_requests_waiting{model_name=\"tiny\"} 4"));
  EXPECT_THAT(text, HasSubstr("vllm:kv_cache_usage_perc{model_name=\"tiny\"} 0.25"));
  EXPECT_THAT(text, HasSubstr("resa_kv_pool_pages{model_name=\"tiny\",state=\"used\"} 160"));
  EXPECT_THAT(text, HasSubstr("resa_kv_pool_pages{model_name=\"tiny\",state=\"free\"} 480"));
}

TEST_F(MetricsExporterTest, TheLoadedModelIsDescribedByLabels) {
  EXPECT_THAT(Render(), Not(HasSubstr("_info")));
  resa::v1::GetModelResponse model;
  model.set_pool_tokens(640 * 16);
  model.set_server_version("1.2.3");
  model.set_device("cpu, AVX2, 2 threads");
  exporter_.Describe(model);
  const std::string text = Render();
  EXPECT_THAT(text, HasSubstr("vllm:cache_config_info{model_name=\"tiny\",block_size=\"16\","
                              "num_gpu_blocks=\"640\"} 1"));
  EXPECT_THAT(text, HasSubstr("resa_build_info{model_name=\"tiny\",device=\"cpu, AVX2, 2 threads\","
                              "version=\"1.2.3\"} 1"));
}

TEST_F(MetricsExporterTest, AStepCountsByTheKindsOfItsRows) {
  engine::StepReport step;
  step.duration = absl::Milliseconds(3);
  step.prefill_rows = 100;
  step.sparse_rows = 5;
  step.preemptions = 2;
  step.tokens_emitted = 6;
  exporter_.OnStep(step);
  step = {};
  step.rectification_rows = 32;
  step.dense_decode_rows = 1;
  exporter_.OnStep(step);
  const std::string text = Render();
  EXPECT_THAT(text, HasSubstr("vllm:num_preemptions_total{model_name=\"tiny\"} 2"));
  EXPECT_THAT(text, HasSubstr("vllm:generation_tokens_total{model_name=\"tiny\"} 6"));
  EXPECT_THAT(text, HasSubstr("vllm:iteration_tokens_total_sum{model_name=\"tiny\"} 138"));
  EXPECT_THAT(text, HasSubstr("vllm:iteration_tokens_total_count{model_name=\"tiny\"} 2"));
  for (const char* sample :
       {"resa_step_seconds_count{model_name=\"tiny\",kind=\"prefill\"} 1",
        "resa_step_seconds_count{model_name=\"tiny\",kind=\"rectification\"} 1",
        "resa_step_seconds_count{model_name=\"tiny\",kind=\"decode\"} 0",
        "resa_step_tokens_sum{model_name=\"tiny\",kind=\"prefill\"} 100",
        "resa_step_tokens_sum{model_name=\"tiny\",kind=\"sparse_decode\"} 5",
        "resa_step_tokens_sum{model_name=\"tiny\",kind=\"dense_decode\"} 1",
        "resa_step_tokens_sum{model_name=\"tiny\",kind=\"rectification\"} 32"}) {
    EXPECT_THAT(text, HasSubstr(sample));
  }
}

TEST_F(MetricsExporterTest, AStepWithoutRowsIsNoIteration) {
  engine::StepReport step;
  step.preemptions = 1;
  exporter_.OnStep(step);
  EXPECT_THAT(Render(), HasSubstr("vllm:iteration_tokens_total_count{model_name=\"tiny\"} 0"));
}

TEST_F(MetricsExporterTest, AttentionIsObserved) {
  exporter_.OnRectification(32, 3);
  exporter_.OnSparseRow(10, 100);
  const std::string text = Render();
  EXPECT_THAT(text, HasSubstr("resa_rectifications_total{model_name=\"tiny\"} 1"));
  EXPECT_THAT(text, HasSubstr("resa_rectification_rows_total{model_name=\"tiny\"} 32"));
  EXPECT_THAT(text, HasSubstr("resa_rectification_delay_steps_sum{model_name=\"tiny\"} 3"));
  EXPECT_THAT(text, HasSubstr("resa_kept_block_ratio_sum{model_name=\"tiny\"} 0.1"));
}

TEST_F(MetricsExporterTest, AFinishedRequestFillsTheLatencies) {
  exporter_.OnPromptTokens(50);
  exporter_.OnFirstToken(absl::Seconds(2));
  exporter_.OnNextToken(absl::Milliseconds(500));
  engine::Finished finished;
  finished.reason = engine::FinishReason::kLength;
  finished.usage.prompt_tokens = 50;
  finished.usage.output_tokens = 5;
  finished.timings.queued = absl::Seconds(1);
  finished.timings.prefill = absl::Seconds(1);
  finished.timings.decode = absl::Seconds(4);
  finished.timings.total = absl::Seconds(6);
  // Two outputs of one request.
  for (int i = 0; i < 2; ++i) exporter_.OnFinished(finished);
  EXPECT_THAT(Render(), HasSubstr("finished_reason=\"length\"} 0"));
  exporter_.OnRequestFinished(finished);
  const std::string text = Render();
  for (const char* sample :
       {"vllm:prompt_tokens_total{model_name=\"tiny\"} 50",
        "vllm:time_to_first_token_seconds_sum{model_name=\"tiny\"} 2",
        "vllm:inter_token_latency_seconds_sum{model_name=\"tiny\"} 0.5",
        "vllm:request_success_total{model_name=\"tiny\",finished_reason=\"length\"} 1",
        "vllm:request_success_total{model_name=\"tiny\",finished_reason=\"stop\"} 0",
        "vllm:request_prompt_tokens_sum{model_name=\"tiny\"} 50",
        "vllm:request_generation_tokens_sum{model_name=\"tiny\"} 10",
        "vllm:request_time_per_output_token_seconds_sum{model_name=\"tiny\"} 2",
        "vllm:e2e_request_latency_seconds_sum{model_name=\"tiny\"} 6",
        "vllm:request_queue_time_seconds_sum{model_name=\"tiny\"} 2",
        "vllm:request_prefill_time_seconds_sum{model_name=\"tiny\"} 2",
        "vllm:request_decode_time_seconds_sum{model_name=\"tiny\"} 8"}) {
    EXPECT_THAT(text, HasSubstr(sample));
  }
}

TEST_F(MetricsExporterTest, ErrorsAndRefusalsAreCountedByReason) {
  exporter_.OnError(absl::CancelledError(""));
  exporter_.OnError(absl::DeadlineExceededError(""));
  exporter_.OnError(absl::InternalError(""));
  exporter_.CountRefusal(absl::ResourceExhaustedError(""));
  for (int i = 0; i < 2; ++i) exporter_.CountRefusal(absl::UnavailableError(""));
  for (int i = 0; i < 3; ++i) exporter_.CountRefusal(absl::InvalidArgumentError(""));
  const std::string text = Render();
  EXPECT_THAT(text, HasSubstr("finished_reason=\"abort\"} 2"));
  EXPECT_THAT(text, HasSubstr("finished_reason=\"error\"} 1"));
  EXPECT_THAT(text, HasSubstr("reason=\"queue_full\"} 1"));
  EXPECT_THAT(text, HasSubstr("reason=\"unavailable\"} 2"));
  EXPECT_THAT(text, HasSubstr("reason=\"invalid\"} 3"));
  EXPECT_THAT(text,
              Not(HasSubstr("vllm:e2e_request_latency_seconds_count{model_name=\"tiny\"} 1")));
}

}  // namespace
}  // namespace resa::server
