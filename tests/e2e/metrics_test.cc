// Every series of /metrics moves when real requests are served.

#include <map>
#include <sstream>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/http_client.h"
#include "tests/support/server_fixture.h"

namespace resa::testing {
namespace {

using ::testing::HasSubstr;

// Samples by name and labels, exactly as they are written; the label of the model is taken out.
using Samples = std::map<std::string, double>;

Samples Scrape(TestServer* server) {
  const std::string response = HttpRequest(server->daemon().http_port(), "GET", "/metrics");
  EXPECT_THAT(response, HasSubstr("Content-Type: text/plain; version=0.0.4"));
  Samples samples;
  std::istringstream lines(response.substr(response.find("\r\n\r\n") + 4));
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line[0] == '#') continue;
    const size_t space = line.rfind(' ');
    std::string name = line.substr(0, space);
    for (const char* label : {"{model_name=\"tiny\"}", "model_name=\"tiny\","}) {
      if (const size_t at = name.find(label); at != std::string::npos) {
        name.erase(at, std::string(label).size());
      }
    }
    samples[name] = std::stod(line.substr(space + 1));
  }
  return samples;
}

TEST(MetricsTest, EachSeriesMoves) {
  // A small pool, so that requests lose their pages too; a short queue, so that some are refused.
  TestServer server({.flags = {"--pool-memory=1MiB", "--max-context=600", "--max-sequences=4",
                               "--max-waiting=4"}});
  const Samples before = Scrape(&server);
  EXPECT_EQ(before.at("vllm:num_requests_running"), 0);
  EXPECT_EQ(before.at("vllm:kv_cache_usage_perc"), 0);

  // Finished by length: sparse, with rectifications; and all steps dense.
  for (const auto mode : {resa::v1::ATTENTION_MODE_RECTIFIED, resa::v1::ATTENTION_MODE_DENSE}) {
    resa::v1::GenerateRequest request = RequestFor("a prompt of some length", 200);
    request.mutable_attention()->set_mode(mode);
    const Generation result = Generate(server.stub(), request);
    EXPECT_TRUE(result.ok()) << result.Describe();
  }
  // Finished by a stop token.
  resa::v1::GenerateRequest stopped = RequestFor("x", 50);
  stopped.mutable_stop()->set_ignore_eos(false);
  (*stopped.mutable_sampling()->mutable_logit_bias())[kEosToken] = 100;
  EXPECT_TRUE(Generate(server.stub(), stopped).ok());
  // Refused: wrong, and too long.
  EXPECT_FALSE(Generate(server.stub(), RequestFor("", 5)).ok());
  resa::v1::GenerateRequest wrong = RequestFor("x", 5);
  wrong.mutable_sampling()->set_top_p(2);
  EXPECT_FALSE(Generate(server.stub(), wrong).ok());
  EXPECT_FALSE(Generate(server.stub(), RequestFor(std::string(600, 'x'), 5)).ok());

  // Four streams fill the pool; of twelve more some wait and some are refused; all are cancelled.
  std::vector<std::thread> clients;
  for (int i = 0; i < 4; ++i) {
    clients.emplace_back([&] {
      Generation result = Generate(server.stub(), RequestFor(std::string(100, 'y'), 490));
      EXPECT_TRUE(result.ok()) << result.Describe();
    });
  }
  ASSERT_TRUE(server.WaitForLoad([](const auto& load) { return load.pages_used() > 0; }));
  Samples during = Scrape(&server);
  EXPECT_GT(during.at("vllm:num_requests_running"), 0);
  EXPECT_GT(during.at("vllm:kv_cache_usage_perc"), 0);
  EXPECT_LE(during.at("vllm:kv_cache_usage_perc"), 1);
  EXPECT_GT(during.at("resa_kv_pool_pages{state=\"used\"}"), 0);
  EXPECT_LT(during.at("resa_kv_pool_pages{state=\"free\"}"),
            before.at("resa_kv_pool_pages{state=\"free\"}"));
  bool saw_waiting = false;
  bool saw_refusal = false;
  for (int round = 0; round < 20 && !(saw_waiting && saw_refusal); ++round) {
    std::vector<grpc::ClientContext> contexts(12);
    std::vector<std::unique_ptr<grpc::ClientReader<resa::v1::GenerateResponse>>> streams;
    for (grpc::ClientContext& context : contexts) {
      streams.push_back(server.stub().Generate(&context, RequestFor("cancelled", 300)));
    }
    for (int look = 0; look < 100 && !(saw_waiting && saw_refusal); ++look) {
      const Samples now = Scrape(&server);
      saw_waiting |= now.at("vllm:num_requests_waiting") > 0;
      saw_refusal |= now.at("resa_rejected_requests_total{reason=\"queue_full\"}") > 0;
    }
    for (grpc::ClientContext& context : contexts) context.TryCancel();
    for (const auto& stream : streams) ReadToEnd(stream.get());
  }
  EXPECT_TRUE(saw_waiting);
  EXPECT_TRUE(saw_refusal);
  for (std::thread& client : clients) client.join();
  ASSERT_TRUE(server.WaitForLoad([](const auto& load) { return load.pages_used() == 0; }));

  const Samples after = Scrape(&server);
  for (const char* name : {"vllm:num_preemptions_total",
                           "vllm:prompt_tokens_total",
                           "vllm:generation_tokens_total",
                           "vllm:request_success_total{finished_reason=\"length\"}",
                           "vllm:request_success_total{finished_reason=\"stop\"}",
                           "vllm:request_success_total{finished_reason=\"abort\"}",
                           "vllm:iteration_tokens_total_count",
                           "vllm:request_prompt_tokens_count",
                           "vllm:request_generation_tokens_count",
                           "vllm:time_to_first_token_seconds_count",
                           "vllm:inter_token_latency_seconds_count",
                           "vllm:request_time_per_output_token_seconds_count",
                           "vllm:e2e_request_latency_seconds_count",
                           "vllm:request_queue_time_seconds_count",
                           "vllm:request_prefill_time_seconds_count",
                           "vllm:request_decode_time_seconds_count",
                           "vllm:time_to_first_token_seconds_sum",
                           "vllm:inter_token_latency_seconds_sum",
                           "vllm:e2e_request_latency_seconds_sum",
                           "vllm:request_decode_time_seconds_sum",
                           "resa_rectifications_total",
                           "resa_rectification_rows_total",
                           "resa_rectification_delay_steps_count",
                           "resa_kept_block_ratio_count",
                           "resa_kept_block_ratio_sum",
                           "resa_step_seconds_count{kind=\"prefill\"}",
                           "resa_step_seconds_count{kind=\"decode\"}",
                           "resa_step_seconds_count{kind=\"rectification\"}",
                           "resa_step_tokens_count{kind=\"prefill\"}",
                           "resa_step_tokens_count{kind=\"sparse_decode\"}",
                           "resa_step_tokens_count{kind=\"dense_decode\"}",
                           "resa_step_tokens_count{kind=\"rectification\"}",
                           "resa_rejected_requests_total{reason=\"queue_full\"}",
                           "resa_rejected_requests_total{reason=\"too_long\"}",
                           "resa_rejected_requests_total{reason=\"invalid\"}"}) {
    ASSERT_TRUE(before.contains(name)) << name;
    EXPECT_GT(after.at(name), before.at(name)) << name;
  }
  EXPECT_EQ(after.at("vllm:num_requests_running"), 0);
  EXPECT_EQ(after.at("vllm:num_requests_waiting"), 0);
  EXPECT_EQ(after.at("resa_kv_pool_pages{state=\"used\"}"), 0);

  // What is known of the figures; a stream that was to be cancelled may have finished before.
  EXPECT_EQ(after.at("vllm:request_success_total{finished_reason=\"stop\"}"), 1);
  EXPECT_GE(after.at("vllm:request_success_total{finished_reason=\"length\"}"), 6);
  EXPECT_GE(after.at("vllm:request_generation_tokens_sum"), 2 * 200 + 1 + 4 * 490);
}

}  // namespace
}  // namespace resa::testing
