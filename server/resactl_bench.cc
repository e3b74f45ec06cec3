#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "engine/status_macros.h"
#include "grpcpp/grpcpp.h"
#include "server/bench_report.h"
#include "server/generate_flags.h"
#include "server/resactl_client.h"

namespace resa::server {
namespace {

using Stub = resa::v1::InferenceService::StubInterface;

// Requests of an open loop: each may be in flight on a thread of its own.
constexpr int kMaxInFlight = 4096;
constexpr absl::Duration kProgressInterval = absl::Milliseconds(200);

struct BenchFlags {
  std::optional<int32_t> requests;
  std::optional<int32_t> concurrency;
  std::optional<double> rate;
  std::optional<int32_t> prompt_tokens;
  std::optional<int32_t> output_tokens;
  std::optional<int32_t> prompt_seed;

  void AddTo(FlagSet* flags) {
    flags->Add("requests", "N", "requests in all (default 32)", &requests);
    flags->Add("concurrency", "N", "closed loop: this many at a time (default 4)", &concurrency);
    flags->Add("rate", "R", "open loop: this many arrive a second, at random", &rate);
    flags->Add("prompt-tokens", "N",
               "length of random prompts (default 512, unless a prompt is given)", &prompt_tokens);
    flags->Add("output-tokens", "N", "tokens of each output, whatever the model says (default 128)",
               &output_tokens);
    flags->Add("prompt-seed", "N", "of random prompts and arrivals (default 1)", &prompt_seed);
  }

  absl::Status Validate() const {
    if (requests.value_or(32) < 1) return absl::InvalidArgumentError("--requests: at least 1");
    if (rate.has_value() && concurrency.has_value()) {
      return absl::InvalidArgumentError(
          "--rate: an open loop has no --concurrency; give one of the two");
    }
    if (concurrency.value_or(4) < 1) return absl::InvalidArgumentError("--concurrency: at least 1");
    if (rate.has_value() && !(*rate > 0)) {
      return absl::InvalidArgumentError("--rate: must be above 0");
    }
    if (prompt_tokens.value_or(512) < 1) {
      return absl::InvalidArgumentError("--prompt-tokens: at least 1");
    }
    if (output_tokens.value_or(128) < 1) {
      return absl::InvalidArgumentError("--output-tokens: at least 1");
    }
    return absl::OkStatus();
  }
};

// Sends one request and reads its stream to the end.
RequestRecord RunOne(Stub* stub, const ClientFlags& client,
                     const resa::v1::GenerateRequest& request) {
  RequestRecord record;
  grpc::ClientContext context;
  SetDeadline(client, &context);
  const absl::Time start = absl::Now();
  absl::Time last = start;
  bool first = true;
  const auto stream = stub->Generate(&context, request);
  resa::v1::GenerateResponse response;
  while (stream->Read(&response)) {
    if (response.has_delta() && response.delta().token_ids_size() > 0) {
      const absl::Time now = absl::Now();
      // The tokens that came along with the first one took no time of their own to be seen.
      if (first) {
        record.first_token = now - start;
      } else {
        AddTokenIntervals(response.delta().token_ids_size(), now - last, &record);
      }
      first = false;
      last = now;
    } else if (response.has_finished()) {
      const resa::v1::Finished& finished = response.finished();
      record.prompt_tokens = finished.usage().prompt_tokens();
      record.output_tokens += finished.usage().output_tokens();
      const int64_t before = record.sparse_steps;
      record.sparse_steps += finished.attention().sparse_steps();
      if (record.sparse_steps > 0) {
        record.kept_block_ratio =
            (record.kept_block_ratio * before +
             finished.attention().kept_block_ratio() * finished.attention().sparse_steps()) /
            record.sparse_steps;
      }
      record.rectifications += finished.attention().rectifications();
    }
  }
  const absl::Status status = FromGrpcStatus(stream->Finish());
  if (!status.ok()) record.error = absl::StatusCodeToString(status.code());
  record.total = absl::Now() - start;
  return record;
}

// Collects records from many threads and shows how far they are.
class Progress {
 public:
  explicit Progress(int total) : total_(total), terminal_(isatty(STDERR_FILENO) != 0) {}

  void Add(RequestRecord record) {
    absl::MutexLock lock(&mutex_);
    records_.push_back(std::move(record));
    const absl::Time now = absl::Now();
    const bool last = static_cast<int>(records_.size()) == total_;
    if (!terminal_ || (!last && now - shown_ < kProgressInterval)) return;
    shown_ = now;
    constexpr int kWidth = 40;
    const int done = static_cast<int>(records_.size());
    const int filled = static_cast<int>(int64_t{kWidth} * done / total_);
    absl::FPrintF(stderr, "\r[%s%s] %d/%d requests%s", std::string(filled, '#'),
                  std::string(kWidth - filled, '.'), done, total_, last ? "\n" : "");
  }
  std::vector<RequestRecord> Take() {
    absl::MutexLock lock(&mutex_);
    return std::move(records_);
  }

 private:
  const int total_;
  const bool terminal_;
  absl::Mutex mutex_;
  std::vector<RequestRecord> records_ ABSL_GUARDED_BY(mutex_);
  absl::Time shown_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
};

// The requests, all made before the clock starts.
absl::StatusOr<std::vector<resa::v1::GenerateRequest>> MakeRequests(const BenchFlags& bench,
                                                                    const ClientFlags& client,
                                                                    const GenerateFlags& generate,
                                                                    bool given, Stub* stub) {
  resa::v1::GenerateRequest base = generate.request();
  base.mutable_output()->set_token_ids(true);
  if (!base.stop().has_max_tokens() || bench.output_tokens.has_value()) {
    base.mutable_stop()->set_max_tokens(bench.output_tokens.value_or(128));
    base.mutable_stop()->set_ignore_eos(true);
  }
  std::vector<resa::v1::GenerateRequest> requests(bench.requests.value_or(32), base);
  if (given) return requests;

  grpc::ClientContext context;
  SetDeadline(client, &context);
  resa::v1::GetModelResponse model;
  RESA_RETURN_IF_ERROR(FromGrpcStatus(stub->GetModel(&context, {}, &model)));
  std::mt19937_64 random(bench.prompt_seed.value_or(1));
  std::uniform_int_distribution<int32_t> any_token(0, model.vocab_size() - 1);
  for (resa::v1::GenerateRequest& request : requests) {
    auto* ids = request.mutable_token_ids()->mutable_ids();
    for (int i = 0; i < bench.prompt_tokens.value_or(512); ++i) ids->Add(any_token(random));
  }
  return requests;
}

// A fixed number of requests in flight: each thread sends its next when one ends.
void RunClosedLoop(const std::vector<resa::v1::GenerateRequest>& requests, int concurrency,
                   const ClientFlags& client, Stub* stub, Progress* progress) {
  std::atomic<size_t> next = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < concurrency; ++i) {
    threads.emplace_back([&] {
      for (size_t mine = next++; mine < requests.size(); mine = next++) {
        progress->Add(RunOne(stub, client, requests[mine]));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Poisson arrivals, whatever the server has finished.
void RunOpenLoop(const std::vector<resa::v1::GenerateRequest>& requests, double rate, int seed,
                 const ClientFlags& client, Stub* stub, Progress* progress) {
  std::mt19937_64 random(static_cast<uint64_t>(seed) + 1);
  std::exponential_distribution<double> gap(rate);
  std::vector<std::thread> threads;
  absl::Time arrival = absl::Now();
  for (const resa::v1::GenerateRequest& request : requests) {
    absl::SleepFor(arrival - absl::Now());
    threads.emplace_back(
        [&, request = &request] { progress->Add(RunOne(stub, client, *request)); });
    arrival += absl::Seconds(gap(random));
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

absl::Status RunBench(absl::Span<const std::string> args) {
  FlagSet flags;
  ClientFlags client;
  GenerateFlags generate;
  BenchFlags bench;
  client.AddTo(&flags);
  bench.AddTo(&flags);
  generate.AddPromptTo(&flags);
  generate.AddTo(&flags);
  RESA_ASSIGN_OR_RETURN(const auto words, ParseArgs(&flags, args));
  if (!words.has_value()) return absl::OkStatus();
  RESA_RETURN_IF_ERROR(bench.Validate());
  const bool given = !words->empty() || generate.HasPromptFlags();
  if (given && bench.prompt_tokens.has_value()) {
    return absl::InvalidArgumentError("--prompt-tokens: is for random prompts, but one is given");
  }
  if (given) RESA_RETURN_IF_ERROR(generate.SetPrompt(*words));
  if (bench.rate.has_value() && bench.requests.value_or(32) > kMaxInFlight) {
    return absl::InvalidArgumentError(
        absl::StrCat("--requests: at most ", kMaxInFlight, " with --rate"));
  }

  const auto stub = resa::v1::InferenceService::NewStub(Connect(client));
  RESA_ASSIGN_OR_RETURN(const auto requests,
                        MakeRequests(bench, client, generate, given, stub.get()));
  Progress progress(static_cast<int>(requests.size()));
  const absl::Time start = absl::Now();
  if (bench.rate.has_value()) {
    RunOpenLoop(requests, *bench.rate, bench.prompt_seed.value_or(1), client, stub.get(),
                &progress);
  } else {
    RunClosedLoop(requests, bench.concurrency.value_or(4), client, stub.get(), &progress);
  }
  const BenchReport report = MakeReport(progress.Take(), absl::Now() - start);
  std::fputs((client.json ? ToJson(report) + "\n" : ToText(report)).c_str(), stdout);
  if (report.succeeded == report.requests) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat(report.requests - report.succeeded, " requests failed"));
}

}  // namespace resa::server
