#ifndef RESA_SERVER_GENERATE_REACTOR_H_
#define RESA_SERVER_GENERATE_REACTOR_H_

// One Generate call: gRPC's side of a StreamWriter.

#include <atomic>
#include <memory>
#include <string>

#include "absl/time/time.h"
#include "engine/engine.h"
#include "grpcpp/alarm.h"
#include "resa/v1/inference.grpc.pb.h"
#include "server/metrics_exporter.h"
#include "server/served_model.h"
#include "server/stream_writer.h"
#include "spdlog/logger.h"

namespace resa::server {

// What all calls of a service share. Must outlive them.
struct GenerateCalls {
  const std::shared_ptr<spdlog::logger> logger;
  const bool log_prompts;
  MetricsExporter* const metrics;
  std::atomic<int32_t> live = 0;  // Those that gRPC is not done with.
};

// Deletes itself when gRPC is done with the call.
//
// Life: Start (handler's thread) submits the request. From then on the engine's thread drives the
// StreamWriter, which calls StartWrite and Finish here; gRPC's threads call OnWriteDone and
// OnCancel. gRPC calls OnDone last: after Finish, after every write, and after the handler.
class GenerateReactor final : public grpc::ServerWriteReactor<resa::v1::GenerateResponse>,
                              private StreamTransport {
 public:
  GenerateReactor(grpc::CallbackServerContext* context, const resa::v1::GenerateRequest& request,
                  GenerateCalls* calls);

  // Once. Ends the call at once when the request is refused.
  void Start(const resa::v1::GenerateRequest& request, const ServedModel& model,
             engine::Engine* engine);
  // Instead of Start: ends the call before it began.
  void Refuse(const absl::Status& status);

  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  ~GenerateReactor() override = default;

  absl::StatusOr<engine::RequestId> Submit(const resa::v1::GenerateRequest& request,
                                           const ServedModel& model);
  void StartWrite(const resa::v1::GenerateResponse& response) override;
  void Finish(const absl::Status& status) override;
  void StartGrace() override;
  void Abandon() override;
  void Log();

  grpc::CallbackServerContext* const context_;
  GenerateCalls* const calls_;
  const absl::Time arrival_;
  const uint64_t random_;       // Seed and name where the request has none.
  const std::string name_;      // request_id, or one made up.
  const std::string log_name_;  // The same escaped: a line of the log stays one line.
  const std::string trace_;     // Of the traceparent header, or empty.
  // Set by Start, before gRPC can call back.
  engine::Engine* engine_ = nullptr;
  engine::RequestId id_;
  std::shared_ptr<StreamWriter> writer_;  // Null when refused before it was made.
  grpc::Alarm grace_;                     // Set by StartGrace.
  // Set by Finish or Refuse, read by OnDone.
  absl::Status status_;
};

}  // namespace resa::server

#endif  // RESA_SERVER_GENERATE_REACTOR_H_
