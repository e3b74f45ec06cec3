// The client of serving_bench: every stream reads as fast as it can and notes when each token came.

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "grpcpp/grpcpp.h"
#include "kernels/check.h"
#include "resa/v1/inference.grpc.pb.h"
#include "tests/bench/serving/serving_shared.h"

namespace resa::bench {
namespace {

using ::resa::v1::GenerateRequest;
using ::resa::v1::GenerateResponse;
using ::resa::v1::InferenceService;

// One call, driven by the events of a completion queue: its start, then one per message.
class Stream {
 public:
  Stream(InferenceService::Stub* stub, grpc::CompletionQueue* queue, SharedState* shared,
         const std::vector<int32_t>* step_of)
      : shared_(shared), step_of_token_(*step_of) {
    GenerateRequest request;
    request.set_text("Tell me more.");
    request.mutable_stop()->set_ignore_eos(true);
    for (int i = 0; i < shared->load.stop_strings; ++i) {
      request.mutable_stop()->add_strings(absl::StrCat("\n\nnever said ", i));
    }
    request.mutable_output()->set_token_ids(true);
    reader_ = stub->AsyncGenerate(&context_, request, queue, this);
  }

  void OnEvent() {
    if (response_.has_delta()) Count(response_.delta());
    reader_->Read(&response_, this);
  }

  int64_t messages() const { return messages_.load(std::memory_order_relaxed); }
  int64_t tokens() const { return tokens_.load(std::memory_order_relaxed); }

 private:
  void Count(const resa::v1::Delta& delta) {
    const int64_t now = NowNs();
    messages_.store(messages_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    tokens_.store(tokens_.load(std::memory_order_relaxed) + delta.token_ids_size(),
                  std::memory_order_relaxed);
    if (shared_->phase.load(std::memory_order_relaxed) != Phase::kMeasure) return;
    for (const int32_t token : delta.token_ids()) {
      const auto step = static_cast<size_t>(step_of_token_[static_cast<size_t>(token)]);
      shared_->latency.Add(now - shared_->handed_out_ns[step].load(std::memory_order_relaxed));
    }
  }

  SharedState* const shared_;
  const std::vector<int32_t>& step_of_token_;
  grpc::ClientContext context_;
  GenerateResponse response_;
  std::unique_ptr<grpc::ClientAsyncReader<GenerateResponse>> reader_;
  std::atomic<int64_t> messages_ = 0;  // Written by the thread of the queue.
  std::atomic<int64_t> tokens_ = 0;
};

struct Totals {
  int64_t messages = 0;
  int64_t tokens = 0;
  int64_t cpu_ns = 0;
  int64_t at_ns = 0;
};

Totals Sum(const std::vector<std::unique_ptr<Stream>>& streams) {
  Totals totals;
  for (const auto& stream : streams) {
    totals.messages += stream->messages();
    totals.tokens += stream->tokens();
  }
  totals.cpu_ns = CpuNs();
  totals.at_ns = NowNs();
  return totals;
}

}  // namespace

void RunClient(SharedState* shared) {
  while (!shared->listening.load()) absl::SleepFor(absl::Milliseconds(1));
  std::vector<int32_t> step_of_token(1 << 20, 0);
  for (int step = 0; step < kStepNames; ++step) {
    step_of_token[static_cast<size_t>(shared->token_of_step[static_cast<size_t>(step)])] = step;
  }
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  std::vector<std::unique_ptr<InferenceService::Stub>> stubs;
  for (int i = 0; i < shared->load.connections; ++i) {
    stubs.push_back(InferenceService::NewStub(grpc::CreateCustomChannel(
        shared->address.data(), grpc::InsecureChannelCredentials(), arguments)));
  }
  // One thread reads all streams.
  grpc::CompletionQueue queue;
  std::vector<std::unique_ptr<Stream>> streams;
  for (int i = 0; i < shared->load.streams; ++i) {
    streams.push_back(std::make_unique<Stream>(stubs[static_cast<size_t>(i) % stubs.size()].get(),
                                               &queue, shared, &step_of_token));
  }
  std::thread events([&queue, shared] {
    void* stream = nullptr;
    bool ok = false;
    while (queue.Next(&stream, &ok)) {
      RESA_CHECK(ok || shared->phase.load() == Phase::kEnd) << "a stream ended early";
      if (ok) static_cast<Stream*>(stream)->OnEvent();
    }
  });
  for (const auto& stream : streams) {
    while (stream->tokens() == 0) absl::SleepFor(absl::Milliseconds(1));
  }
  shared->streaming.store(true);
  AwaitPhase(*shared, Phase::kMeasure);
  const Totals before = Sum(streams);
  AwaitPhase(*shared, Phase::kEnd);
  const Totals after = Sum(streams);
  shared->messages = after.messages - before.messages;
  shared->tokens = after.tokens - before.tokens;
  shared->client_cpu_ns = after.cpu_ns - before.cpu_ns;
  shared->measured_seconds = 1e-9 * static_cast<double>(after.at_ns - before.at_ns);
  ++shared->processes_done;
  // The process ends without taking the streams down, which run on.
  while (true) absl::SleepFor(absl::Seconds(1));
}

}  // namespace resa::bench
