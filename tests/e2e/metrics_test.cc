// Every series of /metrics moves when real requests are served, by as much as the clients were
// told.

#include <functional>
#include <initializer_list>
#include <map>
#include <sstream>
#include <thread>
#include <utility>

#include "absl/time/clock.h"
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

void ExpectSamples(const Samples& samples,
                   std::initializer_list<std::pair<const char*, int64_t>> expected) {
  for (const auto& [name, value] : expected) {
    ASSERT_TRUE(samples.contains(name)) << name;
    EXPECT_EQ(samples.at(name), value) << name;
  }
}

// The load is published at a step's end, a moment after its clients have been told.
void WaitUntilIdle(TestServer* server) {
  ASSERT_TRUE(server->WaitForLoad([](const auto& load) {
    return load.running() + load.waiting() == 0 && load.pages_used() == 0;
  }));
}

TEST(MetricsTest, CountWhatTheClientsWereTold) {
  TestServer server;
  resa::v1::GenerateRequest stopped = RequestFor("x", 50);
  stopped.mutable_stop()->set_ignore_eos(false);
  (*stopped.mutable_sampling()->mutable_logit_bias())[kEosToken] = 100;
  resa::v1::GenerateRequest rectified = RequestFor("a prompt of some length", 200);
  rectified.mutable_attention()->set_mode(resa::v1::ATTENTION_MODE_RECTIFIED);
  resa::v1::GenerateRequest dense = rectified;
  dense.mutable_attention()->set_mode(resa::v1::ATTENTION_MODE_DENSE);

  int64_t requests = 0;
  int64_t prompt_tokens = 0;
  int64_t output_tokens = 0;
  resa::v1::AttentionStats sums;
  for (const resa::v1::GenerateRequest& request : {stopped, rectified, dense}) {
    const Generation result = Generate(server.stub(), request);
    ASSERT_TRUE(result.ok()) << result.Describe();
    ++requests;
    prompt_tokens += result.accepted->prompt_tokens();
    for (const Generation::Output& output : result.outputs) {
      output_tokens += output.finished->usage().output_tokens();
      const resa::v1::AttentionStats& stats = output.finished->attention();
      sums.set_sparse_steps(sums.sparse_steps() + stats.sparse_steps());
      sums.set_dense_steps(sums.dense_steps() + stats.dense_steps());
      sums.set_rectifications(sums.rectifications() + stats.rectifications());
      sums.set_rectified_tokens(sums.rectified_tokens() + stats.rectified_tokens());
    }
  }
  EXPECT_EQ(output_tokens, 1 + 200 + 200);
  EXPECT_GT(sums.rectifications(), 0);
  WaitUntilIdle(&server);
  const int64_t steps = server.Load().steps();
  const Samples samples = Scrape(&server);
  ExpectSamples(
      samples,
      {{"vllm:num_requests_running", 0},
       {"vllm:num_requests_waiting", 0},
       {"vllm:kv_cache_usage_perc", 0},
       {"resa_kv_pool_pages{state=\"used\"}", 0},
       {"vllm:num_preemptions_total", 0},
       {"vllm:prompt_tokens_total", prompt_tokens},
       {"vllm:generation_tokens_total", output_tokens},
       {"vllm:request_success_total{finished_reason=\"length\"}", 2},
       {"vllm:request_success_total{finished_reason=\"stop\"}", 1},
       {"vllm:request_success_total{finished_reason=\"abort\"}", 0},
       {"vllm:request_success_total{finished_reason=\"error\"}", 0},
       {"vllm:request_prompt_tokens_count", requests},
       {"vllm:request_prompt_tokens_sum", prompt_tokens},
       {"vllm:request_generation_tokens_count", requests},
       {"vllm:request_generation_tokens_sum", output_tokens},
       {"vllm:time_to_first_token_seconds_count", requests},
       {"vllm:inter_token_latency_seconds_count", output_tokens - requests},
       {"vllm:request_time_per_output_token_seconds_count", 2},  // One has a single token.
       {"vllm:e2e_request_latency_seconds_count", requests},
       {"vllm:request_queue_time_seconds_count", requests},
       {"vllm:request_prefill_time_seconds_count", requests},
       {"vllm:request_decode_time_seconds_count", requests},
       {"vllm:iteration_tokens_total_count", steps},
       {"resa_rectifications_total", sums.rectifications()},
       {"resa_rectification_rows_total", sums.rectified_tokens()},
       {"resa_rectification_delay_steps_count", sums.rectifications()},
       {"resa_kept_block_ratio_count", sums.sparse_steps()},
       {"resa_step_seconds_count{kind=\"prefill\"}", requests},
       {"resa_step_seconds_count{kind=\"rectification\"}", sums.rectifications()},
       {"resa_step_seconds_count{kind=\"decode\"}", steps - requests - sums.rectifications()},
       {"resa_step_tokens_sum{kind=\"prefill\"}", prompt_tokens},
       {"resa_step_tokens_sum{kind=\"sparse_decode\"}", sums.sparse_steps()},
       {"resa_step_tokens_sum{kind=\"dense_decode\"}", sums.dense_steps()},
       {"resa_step_tokens_sum{kind=\"rectification\"}", sums.rectified_tokens()},
       {"resa_rejected_requests_total{reason=\"queue_full\"}", 0},
       {"resa_rejected_requests_total{reason=\"unavailable\"}", 0},
       {"resa_rejected_requests_total{reason=\"invalid\"}", 0}});
  for (const char* name :
       {"vllm:time_to_first_token_seconds_sum", "vllm:inter_token_latency_seconds_sum",
        "vllm:e2e_request_latency_seconds_sum", "vllm:request_decode_time_seconds_sum",
        "resa_kept_block_ratio_sum"}) {
    EXPECT_GT(samples.at(name), 0) << name;
  }
}

TEST(MetricsTest, SeveralOutputsAreOneRequest) {
  TestServer server;
  resa::v1::GenerateRequest request = RequestFor("three ways on", 20);
  request.set_n(3);
  const Generation result = Generate(server.stub(), request);
  ASSERT_TRUE(result.ok()) << result.Describe();
  const int64_t prompt_tokens = result.accepted->prompt_tokens();
  // One that is cancelled with all its outputs.
  request.mutable_stop()->set_max_tokens(3000);
  grpc::ClientContext context;
  const auto stream = server.stub().Generate(&context, request);
  ASSERT_TRUE(server.WaitForLoad([](const auto& load) { return load.running() == 3; }));
  context.TryCancel();
  ReadToEnd(stream.get());
  WaitUntilIdle(&server);
  ExpectSamples(Scrape(&server), {{"vllm:request_success_total{finished_reason=\"length\"}", 1},
                                  {"vllm:request_success_total{finished_reason=\"stop\"}", 0},
                                  {"vllm:request_success_total{finished_reason=\"abort\"}", 1},
                                  {"vllm:prompt_tokens_total", 2 * prompt_tokens},
                                  {"vllm:request_prompt_tokens_count", 1},
                                  {"vllm:request_prompt_tokens_sum", prompt_tokens},
                                  {"vllm:e2e_request_latency_seconds_count", 1},
                                  {"vllm:request_generation_tokens_count", 3},
                                  {"vllm:request_generation_tokens_sum", 3 * 20},
                                  {"vllm:request_time_per_output_token_seconds_count", 3},
                                  {"vllm:request_queue_time_seconds_count", 3},
                                  {"vllm:request_prefill_time_seconds_count", 3},
                                  {"vllm:request_decode_time_seconds_count", 3}});
}

TEST(MetricsTest, EveryRefusalCounts) {
  TestServer server(
      {.flags = {"--max-sequences=1", "--max-waiting=1", "--pool-memory=200MiB"}, .load = false});
  const auto refused = [&](const resa::v1::GenerateRequest& request) {
    const Generation result = Generate(server.stub(), request);
    EXPECT_FALSE(result.ok());
    EXPECT_FALSE(result.accepted.has_value());
  };
  refused(RequestFor("before the model is there", 5));
  ExpectSamples(Scrape(&server), {{"resa_rejected_requests_total{reason=\"unavailable\"}", 1}});
  server.LoadModel();

  // By the engine, by the front end, and by the tokenizer's side of it.
  std::vector<resa::v1::GenerateRequest> wrong(6, RequestFor("x", 5));
  wrong[0].mutable_sampling()->set_top_p(2);
  wrong[1].mutable_stop()->set_max_tokens(1'000'000);
  wrong[2].set_text("");
  wrong[3].mutable_token_ids()->add_ids(-1);
  wrong[4].set_request_id(std::string(257, 'x'));
  wrong[5].mutable_chat();
  for (const resa::v1::GenerateRequest& request : wrong) refused(request);

  grpc::ClientContext running_context;
  const auto running = server.stub().Generate(&running_context, RequestFor("runs", 100'000));
  ASSERT_TRUE(server.WaitForLoad([](const auto& load) { return load.running() == 1; }));
  grpc::ClientContext waiting_context;
  const auto waiting = server.stub().Generate(&waiting_context, RequestFor("waits", 100'000));
  ASSERT_TRUE(server.WaitForLoad([](const auto& load) { return load.waiting() == 1; }));
  for (int i = 0; i < 3; ++i) refused(RequestFor("too many", 5));
  ExpectSamples(Scrape(&server), {{"resa_rejected_requests_total{reason=\"unavailable\"}", 1},
                                  {"resa_rejected_requests_total{reason=\"invalid\"}", 6},
                                  {"resa_rejected_requests_total{reason=\"queue_full\"}", 3}});
  running_context.TryCancel();
  waiting_context.TryCancel();
  ReadToEnd(running.get());
  ReadToEnd(waiting.get());
  WaitUntilIdle(&server);
  ExpectSamples(Scrape(&server), {{"vllm:request_success_total{finished_reason=\"abort\"}", 2},
                                  {"vllm:request_success_total{finished_reason=\"length\"}", 0},
                                  {"vllm:e2e_request_latency_seconds_count", 0}});
}

TEST(MetricsTest, ABusyServerShowsIt) {
  // A small pool, so that requests lose their pages too.
  TestServer server({.flags = {"--pool-memory=1MiB", "--max-context=600", "--max-sequences=4"}});
  const Samples before = Scrape(&server);
  EXPECT_EQ(before.at("vllm:num_requests_running"), 0);
  EXPECT_EQ(before.at("vllm:kv_cache_usage_perc"), 0);

  // Four streams fill the pool; four more wait.
  std::vector<std::thread> clients;
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back([&] {
      Generation result = Generate(server.stub(), RequestFor(std::string(100, 'y'), 490));
      EXPECT_TRUE(result.ok()) << result.Describe();
    });
  }
  // A look at a time; what it shows is of different moments, so each is waited for.
  const auto wait_for = [&](const std::function<bool(const Samples&)>& seen) {
    const absl::Time give_up = absl::Now() + absl::Seconds(20);
    bool found = false;
    while (!found && absl::Now() < give_up) found = seen(Scrape(&server));
    return found;
  };
  EXPECT_TRUE(wait_for([&](const Samples& now) {
    return now.at("vllm:num_requests_running") > 0 && now.at("vllm:kv_cache_usage_perc") > 0 &&
           now.at("vllm:kv_cache_usage_perc") <= 1 &&
           now.at("resa_kv_pool_pages{state=\"used\"}") > 0 &&
           now.at("resa_kv_pool_pages{state=\"free\"}") <
               before.at("resa_kv_pool_pages{state=\"free\"}");
  }));
  EXPECT_TRUE(wait_for([](const Samples& now) { return now.at("vllm:num_requests_waiting") > 0; }));
  for (std::thread& client : clients) client.join();

  WaitUntilIdle(&server);
  const int64_t preemptions = server.Load().preemptions();
  EXPECT_GT(preemptions, 0);
  ExpectSamples(Scrape(&server), {{"vllm:num_requests_running", 0},
                                  {"vllm:num_requests_waiting", 0},
                                  {"resa_kv_pool_pages{state=\"used\"}", 0},
                                  {"vllm:num_preemptions_total", preemptions},
                                  {"vllm:prompt_tokens_total", 8 * 100},
                                  {"vllm:generation_tokens_total", 8 * 490},
                                  {"vllm:request_success_total{finished_reason=\"length\"}", 8}});
}

}  // namespace
}  // namespace resa::testing
