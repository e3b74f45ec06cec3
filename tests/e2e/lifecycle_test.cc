// How calls end early, wait, or fall behind; and how the daemon says what state it is in.

#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "grpcpp/generic/generic_stub.h"
#include "gtest/gtest.h"
#include "tests/support/server_fixture.h"

namespace resa::testing {
namespace {

using ::grpc::health::v1::Health;
using ::grpc::health::v1::HealthCheckRequest;
using ::grpc::health::v1::HealthCheckResponse;
using ::resa::v1::GenerateRequest;
using ::resa::v1::GenerateResponse;
using ::testing::HasSubstr;

// Runs until it is stopped, for all practical purposes.
GenerateRequest EndlessRequest() { return RequestFor("endless", 100'000); }

// A pool and a context with room for one of those.
TestServerOptions RoomForEndless(std::vector<std::string> flags = {}) {
  flags.push_back("--pool-memory=200MiB");
  return {.flags = std::move(flags)};
}

// An open stream that has produced its first token.
class RunningStream {
 public:
  RunningStream(TestServer* server, const GenerateRequest& request) {
    stream_ = server->stub().Generate(&context_, request);
    GenerateResponse response;
    while (stream_->Read(&response) && !response.has_delta()) {
    }
    EXPECT_TRUE(response.has_delta());
  }
  ~RunningStream() {
    context_.TryCancel();
    Finish();
  }
  grpc::ClientContext& context() { return context_; }
  // Reads what is left.
  grpc::Status Finish() {
    if (finished_) return grpc::Status::OK;
    finished_ = true;
    GenerateResponse response;
    while (stream_->Read(&response)) {
    }
    return stream_->Finish();
  }

 private:
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<GenerateResponse>> stream_;
  bool finished_ = false;
};

void SetTimeout(grpc::ClientContext* context, absl::Duration timeout) {
  context->set_deadline(absl::ToChronoTime(absl::Now() + timeout));
}

TEST(CancelTest, FreesItsPagesAtOnce) {
  TestServer server(RoomForEndless());
  RunningStream stream(&server, EndlessRequest());
  EXPECT_TRUE(server.WaitForLoad([](const auto& load) { return load.pages_used() > 0; }));
  stream.context().TryCancel();
  EXPECT_EQ(stream.Finish().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(server.WaitForLoad(
      [](const auto& load) { return load.pages_used() == 0 && load.running() == 0; }));
}

TEST(CancelTest, WorksWhileWaiting) {
  TestServer server(RoomForEndless({"--max-sequences=1"}));
  RunningStream running(&server, EndlessRequest());
  grpc::ClientContext context;
  const auto waiting = server.stub().Generate(&context, RequestFor("waits", 5));
  ASSERT_TRUE(server.WaitForLoad([](const auto& load) { return load.waiting() == 1; }));
  context.TryCancel();
  EXPECT_EQ(ReadToEnd(waiting.get()).status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(server.WaitForLoad([](const auto& load) { return load.waiting() == 0; }));
  EXPECT_EQ(server.Load().running(), 1);
}

TEST(DeadlineTest, EndsARequestWhileItDecodes) {
  TestServer server(RoomForEndless());
  grpc::ClientContext context;
  SetTimeout(&context, absl::Milliseconds(300));
  const Generation result = Generate(server.stub(), EndlessRequest(), &context);
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(result.accepted.has_value());
  EXPECT_TRUE(server.WaitForLoad([](const auto& load) { return load.pages_used() == 0; }));
}

TEST(DeadlineTest, HoldsInTheQueueToo) {
  TestServer server(RoomForEndless({"--max-sequences=1"}));
  RunningStream running(&server, EndlessRequest());
  grpc::ClientContext context;
  SetTimeout(&context, absl::Milliseconds(200));
  const absl::Time start = absl::Now();
  const Generation result = Generate(server.stub(), RequestFor("late", 5), &context);
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
  EXPECT_TRUE(server.WaitForLoad([](const auto& load) { return load.waiting() == 0; }));
}

// What the details tell to wait before the next attempt; 0: they don't.
int64_t RetrySeconds(const grpc::Status& status) {
  google::rpc::Status rpc;
  google::rpc::RetryInfo retry;
  if (!rpc.ParseFromString(status.error_details()) || rpc.details_size() != 1 ||
      !rpc.details(0).UnpackTo(&retry)) {
    return 0;
  }
  return retry.retry_delay().seconds();
}

TEST(QueueTest, AFullQueueRefusesBeforeAnyMetadata) {
  TestServer server(RoomForEndless({"--max-sequences=1", "--max-waiting=1"}));
  RunningStream running(&server, EndlessRequest());
  grpc::ClientContext waiting_context;
  const auto waiting = server.stub().Generate(&waiting_context, RequestFor("waits", 5));
  ASSERT_TRUE(server.WaitForLoad([](const auto& load) { return load.waiting() == 1; }));

  grpc::ClientContext context;
  const Generation refused = Generate(server.stub(), RequestFor("refused", 5), &context);
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_FALSE(refused.accepted.has_value());
  // What a proxy or gRPC itself needs to send it elsewhere.
  EXPECT_EQ(context.GetServerInitialMetadata().size(), 0u);
  const auto pushback = context.GetServerTrailingMetadata().find("grpc-retry-pushback-ms");
  ASSERT_NE(pushback, context.GetServerTrailingMetadata().end());
  EXPECT_EQ(std::string(pushback->second.data(), pushback->second.size()), "1000");
  EXPECT_EQ(RetrySeconds(refused.status), 1);
  // Before any work is done on its prompt, even to find it wrong.
  const Generation wrong = Generate(server.stub(), RequestFor("", 5));
  EXPECT_EQ(wrong.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);

  // The one that waits is served when its turn comes.
  running.context().TryCancel();
  const Generation served = ReadToEnd(waiting.get());
  EXPECT_TRUE(served.ok()) << served.Describe();
}

// A connection that takes little without being read, as over a slow network.
std::unique_ptr<resa::v1::InferenceService::Stub> SlowStub(const TestServer& server) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 64 << 10);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return resa::v1::InferenceService::NewStub(
      grpc::CreateCustomChannel(server.address(), grpc::InsecureChannelCredentials(), arguments));
}

TEST(SlowReaderTest, ItsTokensJoinAndOthersAreNotHeldUp) {
  TestServer server({.flags = {"--pool-memory=64MiB"}});
  constexpr int kTokens = 400;
  GenerateRequest request = RequestFor("slow", kTokens);
  request.mutable_sampling()->set_seed(3);
  request.mutable_output()->set_logprobs(true);
  request.mutable_output()->set_top_logprobs(20);
  request.set_n(8);
  const Generation fast = Generate(server.stub(), request);
  ASSERT_TRUE(fast.ok()) << fast.Describe();

  // 3,200 tokens of more than 200 bytes, ten times what the connection takes; and nobody reads.
  const auto slow_stub = SlowStub(server);
  grpc::ClientContext context;
  const auto stream = slow_stub->Generate(&context, request);
  // Yet the engine finishes, and serves others meanwhile.
  ASSERT_TRUE(server.WaitForLoad([](const auto& load) { return load.running() > 0; }));
  const Generation other = Generate(server.stub(), RequestFor("other", 50));
  EXPECT_TRUE(other.ok()) << other.Describe();
  ASSERT_TRUE(server.WaitForLoad(
      [](const auto& load) { return load.running() + load.waiting() == 0; }, absl::Seconds(40)));
  const Generation slow = ReadToEnd(stream.get());
  ASSERT_TRUE(slow.ok()) << slow.Describe();
  for (int i = 0; i < 8; ++i) {
    EXPECT_EQ(slow.outputs[i].token_ids, fast.outputs[i].token_ids);
    EXPECT_EQ(slow.outputs[i].text, fast.outputs[i].text);
    EXPECT_EQ(slow.outputs[i].logprobs.size(), fast.outputs[i].logprobs.size());
    EXPECT_LT(slow.outputs[i].deltas, kTokens / 2);
  }
}

// The log's line about the end of a request, which may come a moment after the client has its end;
// "" when it does not come.
std::string LogLineOf(const TestServer& server, const std::string& request_id,
                      absl::Duration patience = absl::Seconds(10)) {
  const absl::Time give_up = absl::Now() + patience;
  while (absl::Now() < give_up) {
    for (const std::string& line : server.LogLines()) {
      if (line.find("request " + request_id) != std::string::npos) return line;
    }
    absl::SleepFor(absl::Milliseconds(2));
  }
  return "";
}

TEST(SlowReaderTest, OneThatNeverReadsLosesItsRequestThenItsStream) {
  TestServer server({.flags = {"--pool-memory=64MiB"}});
  constexpr int kTokens = 700;
  GenerateRequest request = RequestFor("stuck", kTokens);
  request.mutable_output()->set_logprobs(true);
  request.mutable_output()->set_top_logprobs(20);
  request.set_n(32);
  for (const bool reads_on : {true, false}) {
    SCOPED_TRACE(reads_on);
    const std::string name = reads_on ? "late" : "stuck";
    request.set_request_id(name);
    const int64_t before = server.Load().tokens_generated();
    const auto slow_stub = SlowStub(server);
    grpc::ClientContext context;
    const auto stream = slow_stub->Generate(&context, request);
    ASSERT_TRUE(server.WaitForLoad([](const auto& load) { return load.running() > 0; }));
    // 32 outputs of 342 bytes a token fill 4 MiB after 383 tokens each.
    ASSERT_TRUE(server.WaitForLoad(
        [](const auto& load) { return load.running() == 0 && load.pages_used() == 0; },
        absl::Seconds(50)));
    EXPECT_LT(server.Load().tokens_generated() - before, 32 * kTokens);
    EXPECT_EQ(LogLineOf(server, name, absl::Milliseconds(100)), "") << "ended while it may read on";
    if (!reads_on) {
      EXPECT_THAT(LogLineOf(server, name, absl::Seconds(30)), HasSubstr("reads too slowly"));
    }
    const Generation result = ReadToEnd(stream.get());
    EXPECT_EQ(result.status.error_details(), "") << "it may not simply try again";
    EXPECT_EQ(result.status.error_code(),
              reads_on ? grpc::StatusCode::RESOURCE_EXHAUSTED : grpc::StatusCode::CANCELLED);
  }
}

TEST(LogTest, ARequestsLineCarriesItsNameAndTrace) {
  TestServer server;
  const auto line = [&](const std::string& id, const std::string& traceparent) {
    GenerateRequest request = RequestFor("secret", 3);
    request.set_request_id(id);
    grpc::ClientContext context;
    if (!traceparent.empty()) context.AddMetadata("traceparent", traceparent);
    Generate(server.stub(), request, &context);
    return LogLineOf(server, id);
  };
  const std::string trace = "0af7651916cd43dd8448eb211c80319c";
  const std::string traced = line("traced", "00-" + trace + "-b7ad6b7169203331-01");
  EXPECT_THAT(traced, HasSubstr("trace " + trace));
  EXPECT_THAT(traced, HasSubstr("OK, 6 prompt and 3 output tokens"));
  EXPECT_THAT(line("plain", ""), ::testing::Not(HasSubstr("trace")));
  for (const char* bad : {"00-short-b7ad6b7169203331-01", "nonsense",
                          "00-0af7651916cd43dd8448eb211c80319z-b7ad6b7169203331-01"}) {
    EXPECT_THAT(line(std::string("bad") + bad, bad), ::testing::Not(HasSubstr("trace")));
  }
  for (const std::string& logged : server.LogLines()) {
    EXPECT_THAT(logged, ::testing::Not(HasSubstr("secret")));
  }
}

TEST(LogTest, ANameCannotBreakALineOrPretendToBeAnother) {
  for (const char* flag : {"--no-log-prompts", "--log-prompts"}) {
    TestServer server({.flags = {flag}});
    GenerateRequest request = RequestFor("a\nrequest forged: OK", 3);
    request.set_request_id("two\nrequest forged");
    Generate(server.stub(), request);
    request.set_request_id(std::string(100'000, 'x'));
    Generate(server.stub(), request);
    EXPECT_NE(LogLineOf(server, "two\\nrequest forged: OK, "), "");
    EXPECT_NE(LogLineOf(server, std::string(256, 'x') + ": INVALID_ARGUMENT: request_id: "), "");
    for (const std::string& logged : server.LogLines()) {
      // The logger ends each line with its only line feed.
      EXPECT_EQ(logged.find('\n'), logged.size() - 1) << logged;
    }
  }
}

TEST(LogTest, SaysWhatHappenedBeforeACallEnded) {
  TestServer server(RoomForEndless());
  GenerateRequest request = EndlessRequest();
  request.set_request_id("left");
  request.mutable_output()->set_echo(true);
  {
    RunningStream stream(&server, request);
    ASSERT_TRUE(server.WaitForLoad([](const auto& load) { return load.tokens_generated() >= 50; }));
  }
  const std::string left = LogLineOf(server, "left");
  EXPECT_THAT(left, HasSubstr("request left: CANCELLED: the request was cancelled, 7 prompt and "));
  EXPECT_THAT(left, ::testing::ContainsRegex("and [0-9]{2,} output tokens in [1-9][0-9]* messages, "
                                             "first token [0-9.]+ms, total"));
  // Nothing is made up for one that never began, and it has a name, too.
  TestServer loading({.load = false});
  request.set_request_id("early");
  Generate(loading.stub(), request);
  EXPECT_THAT(LogLineOf(loading, "early"),
              HasSubstr("request early: UNAVAILABLE: the server is still loading its model; try "
                        "again shortly, 0 prompt and 0 output tokens in 0 messages, first token "
                        "never, total"));
}

HealthCheckResponse::ServingStatus Check(TestServer* server, const std::string& service) {
  const auto health = Health::NewStub(server->channel());
  grpc::ClientContext context;
  HealthCheckRequest request;
  request.set_service(service);
  HealthCheckResponse response;
  const grpc::Status status = health->Check(&context, request, &response);
  if (status.error_code() == grpc::StatusCode::NOT_FOUND) {
    return HealthCheckResponse::SERVICE_UNKNOWN;
  }
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response.status();
}

TEST(LogTest, WarnsOfAnAddressThatTheNetworkReaches) {
  const auto warnings = [](const std::string& host) {
    TestServer server({.flags = {"--listen=" + host + ":0"}, .load = false});
    int found = 0;
    for (const std::string& line : server.LogLines()) {
      found += line.find("can be reached from the network, without encryption") != line.npos;
    }
    return found;
  };
  EXPECT_EQ(warnings("0.0.0.0"), 1);
  EXPECT_EQ(warnings("127.0.0.1"), 0);
  EXPECT_EQ(warnings("localhost"), 0);
}

// The states of a service as Health.Watch tells them.
class HealthWatch {
 public:
  HealthWatch(TestServer* server, const std::string& service)
      : health_(Health::NewStub(server->channel())) {
    HealthCheckRequest request;
    request.set_service(service);
    reader_ = health_->Watch(&context_, request);
  }
  ~HealthWatch() {
    context_.TryCancel();
    reader_->Finish();
  }

  // The next state; nothing when the stream has ended.
  std::optional<HealthCheckResponse::ServingStatus> Next() {
    HealthCheckResponse response;
    if (!reader_->Read(&response)) return std::nullopt;
    return response.status();
  }

 private:
  const std::unique_ptr<Health::Stub> health_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<HealthCheckResponse>> reader_;
};

TEST(HealthTest, TellsTheStateOfProcessAndServiceApart) {
  TestServer server;
  EXPECT_EQ(Check(&server, ""), HealthCheckResponse::SERVING);
  EXPECT_EQ(Check(&server, "resa.v1.InferenceService"), HealthCheckResponse::SERVING);
  EXPECT_EQ(Check(&server, "no.such.Service"), HealthCheckResponse::SERVICE_UNKNOWN);
}

TEST(HealthTest, ComesUpWhenTheModelIsLoaded) {
  TestServer server({.load = false});
  HealthWatch watch(&server, "resa.v1.InferenceService");
  ASSERT_EQ(watch.Next(), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(Check(&server, ""), HealthCheckResponse::SERVING);
  const Generation early = Generate(server.stub(), RequestFor("early", 5));
  EXPECT_EQ(early.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(early.status.error_message(), HasSubstr("loading"));
  EXPECT_EQ(RetrySeconds(early.status), 1);
  grpc::ClientContext model_context;
  resa::v1::GetModelResponse model;
  EXPECT_EQ(server.stub().GetModel(&model_context, {}, &model).error_code(),
            grpc::StatusCode::UNAVAILABLE);

  server.LoadModel();
  EXPECT_EQ(watch.Next(), HealthCheckResponse::SERVING);
  const Generation served = Generate(server.stub(), RequestFor("served", 5));
  EXPECT_TRUE(served.ok()) << served.Describe();
}

// The services that reflection lists. The request and the answer are written out by hand: field 7
// of ServerReflectionRequest asks for the list, and the names come back as they are.
std::string ReflectedServices(TestServer* server) {
  grpc::GenericStub stub(server->channel());
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  void* tag = nullptr;
  bool ok = false;
  const auto call = stub.PrepareCall(
      &context, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", &queue);
  call->StartCall(nullptr);
  EXPECT_TRUE(queue.Next(&tag, &ok) && ok);
  const grpc::Slice list_services(std::string("\x3a\x00", 2));
  call->Write(grpc::ByteBuffer(&list_services, 1), nullptr);
  EXPECT_TRUE(queue.Next(&tag, &ok) && ok);
  grpc::ByteBuffer response;
  call->Read(&response, nullptr);
  EXPECT_TRUE(queue.Next(&tag, &ok) && ok);
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(response.Dump(&slices).ok());
  std::string bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  context.TryCancel();
  grpc::Status status;
  call->Finish(&status, nullptr);
  EXPECT_TRUE(queue.Next(&tag, &ok));
  return bytes;
}

TEST(ReflectionTest, ListsTheServices) {
  TestServer server;
  const std::string services = ReflectedServices(&server);
  EXPECT_THAT(services, HasSubstr("resa.v1.InferenceService"));
  EXPECT_THAT(services, HasSubstr("grpc.health.v1.Health"));
}

TEST(DrainTest, RunningStreamsFinishAndNewCallsAreRefused) {
  TestServer server(RoomForEndless({"--drain-timeout=20s"}));
  // Health as a client sees it, from before to after.
  HealthWatch watch(&server, "resa.v1.InferenceService");
  ASSERT_EQ(watch.Next(), HealthCheckResponse::SERVING);

  // Long enough to be still running when the draining starts.
  grpc::ClientContext context;
  const auto stream = server.stub().Generate(&context, RequestFor("finish me", 1500));
  ASSERT_TRUE(server.WaitForLoad([](const auto& load) { return load.running() == 1; }));
  std::thread drain([&] { server.daemon().Drain(); });
  EXPECT_EQ(watch.Next(), HealthCheckResponse::NOT_SERVING);
  const Generation refused = Generate(server.stub(), RequestFor("too late", 5));
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::UNAVAILABLE);

  const Generation finished = ReadToEnd(stream.get());
  EXPECT_TRUE(finished.ok()) << finished.Describe();
  EXPECT_EQ(finished.outputs[0].token_ids.size(), 1500u);
  // The watch, which would go on for ever, does not hold up the end.
  const absl::Time last_stream = absl::Now();
  drain.join();
  EXPECT_LT(absl::Now() - last_stream, absl::Seconds(5));
  EXPECT_EQ(watch.Next(), std::nullopt);
}

TEST(DrainTest, NothingRunningIsNothingToWaitFor) {
  TestServer server({.flags = {"--drain-timeout=20s"}});
  HealthWatch watch(&server, "no.such.Service");
  ASSERT_TRUE(watch.Next().has_value());
  const absl::Time start = absl::Now();
  server.daemon().Drain();
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
}

// A reader that takes nothing of what is ready for it costs the drain its whole time, and no more.
TEST(DrainTest, AStuckReaderIsCutWhenTheTimeIsUp) {
  TestServer server({.flags = {"--pool-memory=64MiB", "--drain-timeout=1s"}});
  GenerateRequest request = RequestFor("stuck", 200);
  request.mutable_output()->set_logprobs(true);
  request.mutable_output()->set_top_logprobs(20);
  request.set_n(8);
  const auto slow_stub = SlowStub(server);
  grpc::ClientContext context;
  const auto stream = slow_stub->Generate(&context, request);
  ASSERT_TRUE(server.WaitForLoad([](const auto& load) { return load.running() > 0; }));
  ASSERT_TRUE(server.WaitForLoad([](const auto& load) { return load.running() == 0; }));
  const absl::Time start = absl::Now();
  server.daemon().Drain();
  EXPECT_GE(absl::Now() - start, absl::Seconds(1));
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
}

TEST(DrainTest, WhatDoesNotFinishInTimeEndsWithUnavailable) {
  TestServer server(RoomForEndless({"--drain-timeout=300ms"}));
  RunningStream stream(&server, EndlessRequest());
  const absl::Time start = absl::Now();
  std::thread drain([&] { server.daemon().Drain(); });
  const grpc::Status status = stream.Finish();
  drain.join();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr("shutting down"));
  EXPECT_EQ(RetrySeconds(status), 0) << "half an answer came before";
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
}

}  // namespace
}  // namespace resa::testing
