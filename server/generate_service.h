#ifndef RESA_SERVER_GENERATE_SERVICE_H_
#define RESA_SERVER_GENERATE_SERVICE_H_

// resa.v1.InferenceService over gRPC's callback API. Its threads validate, tokenize and hand over;
// they never act on the engine, and the engine never waits for them.

#include <atomic>

#include "engine/engine.h"
#include "resa/v1/inference.grpc.pb.h"
#include "server/generate_reactor.h"
#include "server/served_model.h"
#include "spdlog/logger.h"

namespace resa::server {

class GenerateService final : public resa::v1::InferenceService::CallbackService {
 public:
  // `logger` gets one line per request; prompts and outputs only with `log_prompts`.
  // `metrics` counts the calls that are refused.
  GenerateService(std::shared_ptr<spdlog::logger> logger, bool log_prompts,
                  MetricsExporter* metrics);

  // Generate calls whose last message or status is still on its way.
  int32_t LiveCalls() const { return calls_.live; }

  // Until then every call ends with UNAVAILABLE. Both must outlive all calls.
  void StartServing(const ServedModel* model, engine::Engine* engine);

  grpc::ServerWriteReactor<resa::v1::GenerateResponse>* Generate(
      grpc::CallbackServerContext* context, const resa::v1::GenerateRequest* request) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const resa::v1::TokenizeRequest* request,
                                     resa::v1::TokenizeResponse* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const resa::v1::DetokenizeRequest* request,
                                       resa::v1::DetokenizeResponse* response) override;
  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context,
                                     const resa::v1::GetModelRequest* request,
                                     resa::v1::GetModelResponse* response) override;
  grpc::ServerUnaryReactor* GetLoad(grpc::CallbackServerContext* context,
                                    const resa::v1::GetLoadRequest* request,
                                    resa::v1::GetLoadResponse* response) override;

 private:
  struct Backend {
    const ServedModel* model;
    engine::Engine* engine;
  };

  // Null while loading.
  const Backend* backend() const { return serving_.load(std::memory_order_acquire); }

  GenerateCalls calls_;
  Backend backend_ = {};
  std::atomic<const Backend*> serving_ = nullptr;
};

}  // namespace resa::server

#endif  // RESA_SERVER_GENERATE_SERVICE_H_
