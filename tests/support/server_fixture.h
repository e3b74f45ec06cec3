#ifndef RESA_TESTS_SUPPORT_SERVER_FIXTURE_H_
#define RESA_TESTS_SUPPORT_SERVER_FIXTURE_H_

// A whole daemon in the test's process, on a free port, and clients for it: everything is real but
// the model, which is small and random.

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "grpcpp/grpcpp.h"
#include "resa/v1/inference.grpc.pb.h"
#include "server/daemon.h"
#include "spdlog/sinks/ringbuffer_sink.h"
#include "tests/support/model_folder.h"

namespace resa::testing {

struct TestServerOptions {
  TinyModelOptions model = {.max_position = 131072};
  uint64_t model_seed = 1;
  std::string chat_template = kChatMlTemplate;
  // After the defaults: free ports, one thread, rectified, sparse from the first token on, a pool
  // of 16 MiB. A flag given here replaces its default.
  std::vector<std::string> flags = {};
  // False: it listens, but LoadModel is the test's to call.
  bool load = true;
};

// The test fails when it cannot start. Serves when the constructor returns, unless told otherwise.
class TestServer {
 public:
  explicit TestServer(const TestServerOptions& options = {});
  ~TestServer();

  void LoadModel();

  resa::v1::InferenceService::Stub& stub() { return *stub_; }
  std::shared_ptr<grpc::Channel> channel() const { return channel_; }
  server::Daemon& daemon() { return *daemon_; }
  std::string address() const;
  // The newest lines of the daemon's log, oldest first.
  std::vector<std::string> LogLines() const;
  resa::v1::GetLoadResponse Load();
  // Waits for the condition on GetLoad; false after `timeout`.
  bool WaitForLoad(const std::function<bool(const resa::v1::GetLoadResponse&)>& condition,
                   absl::Duration timeout = absl::Seconds(20));

 private:
  std::unique_ptr<ModelFolder> folder_;
  int threads_ = 0;
  std::shared_ptr<spdlog::sinks::ringbuffer_sink_mt> log_;
  std::unique_ptr<server::Daemon> daemon_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<resa::v1::InferenceService::Stub> stub_;
};

// What one Generate call brought.
struct Generation {
  struct Output {
    std::string text;
    std::vector<int32_t> token_ids;
    std::vector<resa::v1::TokenLogprob> logprobs;
    std::optional<resa::v1::Finished> finished;
    int deltas = 0;
  };

  grpc::Status status;
  std::optional<resa::v1::Accepted> accepted;
  std::vector<Output> outputs;  // By index.
  std::string protocol_error;   // What the stream did that it must not; empty: nothing.

  // Status OK and nothing wrong with the stream's order.
  bool ok() const { return status.ok() && protocol_error.empty(); }
  std::string Describe() const;
};

// Sends the request and reads the stream to its end. `context` may carry a deadline or be cancelled
// meanwhile; null: a plain one.
Generation Generate(resa::v1::InferenceService::Stub& stub,
                    const resa::v1::GenerateRequest& request,
                    grpc::ClientContext* context = nullptr);
// The same for a stream that is already open.
Generation ReadToEnd(grpc::ClientReader<resa::v1::GenerateResponse>* stream);

// A request for exactly `tokens` output tokens, with their ids.
resa::v1::GenerateRequest RequestFor(const std::string& prompt, int tokens);

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_SERVER_FIXTURE_H_
