// The server of serving_bench: resad's own engine, service and metrics around a model that computes
// nothing, or gRPC alone.

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/clock.h"
#include "engine/engine.h"
#include "grpcpp/grpcpp.h"
#include "kernels/check.h"
#include "resa/v1/inference.grpc.pb.h"
#include "server/generate_service.h"
#include "server/grpc_settings.h"
#include "server/metrics_exporter.h"
#include "server/served_model.h"
#include "spdlog/sinks/null_sink.h"
#include "tests/bench/serving/serving_shared.h"
#include "tests/support/count_allocations.h"
#include "tests/support/test_tokenizers.h"

namespace resa::bench {
namespace {

constexpr int32_t kVocabSize = 1000;

// Ticks at a steady rate; one that is late does not delay those after it.
class Pacer {
 public:
  explicit Pacer(double ticks_per_s)
      : interval_ns_(static_cast<int64_t>(1e9 / ticks_per_s)), next_ns_(NowNs()) {}

  void Wait() {
    next_ns_ = std::max(next_ns_ + interval_ns_, NowNs() - 10 * interval_ns_);
    const timespec until = {next_ns_ / 1'000'000'000, next_ns_ % 1'000'000'000};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr) != 0) {
    }
  }

 private:
  const int64_t interval_ns_;
  int64_t next_ns_;
};

// A model in no time: every row that samples gets the token that names the step.
class InstantExecutor final : public engine::Executor {
 public:
  explicit InstantExecutor(SharedState* shared)
      : shared_(shared), pacer_(shared->load.tokens_per_s / shared->load.streams) {}

  absl::Status DoExecute(const engine::StepInput& input, engine::StepOutput* output,
                         absl::FunctionRef<void()> meanwhile) override {
    meanwhile();
    pacer_.Wait();
    const size_t name = static_cast<size_t>(step_++ % kStepNames);
    kernels::SampleResult sample;
    sample.token = shared_->token_of_step[name];
    for (const engine::SegmentInput& segment : input.segments) {
      if (segment.sample.has_value()) output->samples.push_back(sample);
    }
    shared_->handed_out_ns[name].store(NowNs(), std::memory_order_relaxed);
    return absl::OkStatus();
  }

 private:
  SharedState* const shared_;
  Pacer pacer_;
  int64_t step_ = 0;
};

// The first ids with text of three bytes or more: an ordinary token.
void ChooseTokens(const engine::Tokenizer& tokenizer, SharedState* shared) {
  size_t found = 0;
  for (int32_t id = 0; id < std::min(kVocabSize, tokenizer.vocab_size()); ++id) {
    if (found == kStepNames) return;
    const std::string text =
        tokenizer.Decode(absl::MakeConstSpan(&id, 1), /*skip_special_tokens=*/true);
    if (text.size() >= 3) shared->token_of_step[found++] = id;
  }
  RESA_CHECK_EQ(found, size_t{kStepNames}) << "the tokenizer is too small";
}

void Listen(grpc::Service* service, SharedState* shared, std::unique_ptr<grpc::Server>* server) {
  int port = 0;
  grpc::ServerBuilder builder;
  server::ApplyGrpcSettings(&builder);
  std::string address = absl::StrCat("unix:/tmp/serving_bench.", getpid());
  builder.AddListeningPort(shared->load.unix_socket ? address : "127.0.0.1:0",
                           grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(service);
  *server = builder.BuildAndStart();
  RESA_CHECK(*server != nullptr && port != 0) << "cannot listen";
  if (!shared->load.unix_socket) address = absl::StrCat("127.0.0.1:", port);
  RESA_CHECK_LT(address.size(), shared->address.size());
  std::copy(address.begin(), address.end(), shared->address.begin());
  shared->listening.store(true);
}

void Measure(SharedState* shared) {
  AwaitPhase(*shared, Phase::kMeasure);
  const int64_t cpu = CpuNs();
  const int64_t allocations = resa::testing::CountAllocations();
  AwaitPhase(*shared, Phase::kEnd);
  shared->server_allocations = resa::testing::CountAllocations() - allocations;
  shared->server_cpu_ns = CpuNs() - cpu;
  ++shared->processes_done;
  while (true) absl::SleepFor(absl::Seconds(1));
}

void RunResad(SharedState* shared) {
  const Load& load = shared->load;
  const auto tokenizer = resa::testing::LoadTestTokenizer("gpt2");
  ChooseTokens(*tokenizer, shared);
  engine::EngineOptions options;
  const auto context = static_cast<int32_t>(1000 + 2 * (load.seconds + load.warmup_seconds + 5) *
                                                       load.tokens_per_s / load.streams);
  options.limits = {.vocab_size = kVocabSize,
                    .max_context = context,
                    .pool_tokens = int64_t{load.streams} * context};
  options.num_pages = static_cast<int32_t>(options.limits.pool_tokens / kernels::kPageTokens + 1);
  options.scheduler.max_sequences = load.streams;
  options.scheduler.max_step_tokens = load.streams + 1024;
  options.max_waiting = load.streams;
  InstantExecutor executor(shared);
  engine::RealClock clock;
  server::MetricsExporter metrics("bench");
  engine::Engine engine(options, tokenizer.get(), &executor, &clock, &metrics);
  server::ServedModel model;
  model.tokenizer = tokenizer.get();
  model.limits = options.limits;
  auto logger =
      std::make_shared<spdlog::logger>("bench", std::make_shared<spdlog::sinks::null_sink_mt>());
  server::GenerateService service(logger, /*log_prompts=*/false, &metrics);
  service.StartServing(&model, &engine);
  std::thread loop([&] { engine.Run(); });
  std::unique_ptr<grpc::Server> server;
  Listen(&service, shared, &server);
  Measure(shared);
}

// ---- gRPC alone ----

class BareStream final : public grpc::ServerWriteReactor<resa::v1::GenerateResponse> {
 public:
  BareStream(const SharedState* shared) : closed_loop_(shared->load.tokens_per_s == 0) {
    message_.mutable_delta()->set_text("word");
    message_.mutable_delta()->add_token_ids(shared->token_of_step[0]);
    StartWrite(&message_);
  }
  // Writes one message more, now or when the one under way is done.
  void Write(int32_t token) {
    if (owed_.fetch_add(1) == 0) {
      message_.mutable_delta()->set_token_ids(0, token);
      StartWrite(&message_);
    }
    next_token_.store(token, std::memory_order_relaxed);
  }
  void OnWriteDone(bool ok) override {
    if (!ok) return;
    if (closed_loop_) {
      StartWrite(&message_);
    } else if (owed_.fetch_sub(1) > 1) {
      message_.mutable_delta()->set_token_ids(0, next_token_.load(std::memory_order_relaxed));
      StartWrite(&message_);
    }
  }
  void OnDone() override {}

 private:
  const bool closed_loop_;
  resa::v1::GenerateResponse message_;
  std::atomic<int> owed_ = 1;
  std::atomic<int32_t> next_token_ = 0;
};

class BareService final : public resa::v1::InferenceService::CallbackService {
 public:
  explicit BareService(SharedState* shared) : shared_(shared) {}

  grpc::ServerWriteReactor<resa::v1::GenerateResponse>* Generate(
      grpc::CallbackServerContext*, const resa::v1::GenerateRequest*) override {
    absl::MutexLock lock(&mutex_);
    streams_.push_back(std::make_unique<BareStream>(shared_));
    return streams_.back().get();
  }
  // Once all streams are there: a message to each at every tick.
  void Run() {
    const Load& load = shared_->load;
    std::vector<BareStream*> streams;
    {
      absl::MutexLock lock(&mutex_);
      const auto all_here = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        return streams_.size() == static_cast<size_t>(load.streams);
      };
      mutex_.Await(absl::Condition(&all_here));
      for (const auto& stream : streams_) streams.push_back(stream.get());
    }
    Pacer pacer(load.tokens_per_s / load.streams);
    for (size_t step = 0;; ++step) {
      pacer.Wait();
      const size_t name = step % kStepNames;
      shared_->handed_out_ns[name].store(NowNs(), std::memory_order_relaxed);
      for (BareStream* stream : streams) stream->Write(shared_->token_of_step[name]);
    }
  }

 private:
  SharedState* const shared_;
  absl::Mutex mutex_;
  std::vector<std::unique_ptr<BareStream>> streams_ ABSL_GUARDED_BY(mutex_);
};

void RunBare(SharedState* shared) {
  for (size_t i = 0; i < kStepNames; ++i) shared->token_of_step[i] = static_cast<int32_t>(300 + i);
  BareService service(shared);
  std::thread ticker;
  if (shared->load.tokens_per_s > 0) ticker = std::thread([&] { service.Run(); });
  std::unique_ptr<grpc::Server> server;
  Listen(&service, shared, &server);
  Measure(shared);
}

}  // namespace

void RunServer(SharedState* shared) {
  if (shared->load.server == ServerKind::kBare) {
    RunBare(shared);
  } else {
    RunResad(shared);
  }
}

}  // namespace resa::bench
