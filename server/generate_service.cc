#include "server/generate_service.h"

#include <utility>

#include "kernels/params.h"
#include "server/grpc_status.h"
#include "server/rpc_status.h"
#include "server/validate.h"

namespace resa::server {
namespace {

absl::Status LoadingError() {
  return absl::UnavailableError("the server is still loading its model; try again shortly");
}

grpc::ServerUnaryReactor* FinishUnary(grpc::CallbackServerContext* context,
                                      const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(ToRefusal(status)));
  return reactor;
}

}  // namespace

GenerateService::GenerateService(std::shared_ptr<spdlog::logger> logger, bool log_prompts,
                                 MetricsExporter* metrics)
    : calls_{std::move(logger), log_prompts, metrics} {}

void GenerateService::StartServing(const ServedModel* model, engine::Engine* engine) {
  backend_ = {model, engine};
  serving_.store(&backend_, std::memory_order_release);
}

grpc::ServerWriteReactor<resa::v1::GenerateResponse>* GenerateService::Generate(
    grpc::CallbackServerContext* context, const resa::v1::GenerateRequest* request) {
  auto* reactor = new GenerateReactor(context, *request, &calls_);
  if (const Backend* serving = backend()) {
    reactor->Start(*request, *serving->model, serving->engine);
  } else {
    reactor->Refuse(LoadingError());
  }
  return reactor;
}

grpc::ServerUnaryReactor* GenerateService::Tokenize(grpc::CallbackServerContext* context,
                                                    const resa::v1::TokenizeRequest* request,
                                                    resa::v1::TokenizeResponse* response) {
  const Backend* serving = backend();
  if (serving == nullptr) return FinishUnary(context, LoadingError());
  const absl::StatusOr<std::vector<int32_t>> ids = server::Tokenize(*request, *serving->model);
  if (ids.ok()) response->mutable_token_ids()->Add(ids->begin(), ids->end());
  return FinishUnary(context, ids.status());
}

grpc::ServerUnaryReactor* GenerateService::Detokenize(grpc::CallbackServerContext* context,
                                                      const resa::v1::DetokenizeRequest* request,
                                                      resa::v1::DetokenizeResponse* response) {
  const Backend* serving = backend();
  if (serving == nullptr) return FinishUnary(context, LoadingError());
  absl::StatusOr<std::string> text = server::Detokenize(*request, *serving->model);
  if (text.ok()) response->set_text(*std::move(text));
  return FinishUnary(context, text.status());
}

grpc::ServerUnaryReactor* GenerateService::GetModel(grpc::CallbackServerContext* context,
                                                    const resa::v1::GetModelRequest* /*request*/,
                                                    resa::v1::GetModelResponse* response) {
  const Backend* serving = backend();
  if (serving == nullptr) return FinishUnary(context, LoadingError());
  *response = serving->model->description;
  return FinishUnary(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* GenerateService::GetLoad(grpc::CallbackServerContext* context,
                                                   const resa::v1::GetLoadRequest* /*request*/,
                                                   resa::v1::GetLoadResponse* response) {
  const Backend* serving = backend();
  if (serving == nullptr) return FinishUnary(context, LoadingError());
  const engine::EngineLoad load = serving->engine->Load();
  response->set_running(load.running);
  response->set_waiting(load.waiting);
  response->set_pages_total(load.pages_total);
  response->set_pages_used(load.pages_used);
  response->set_page_tokens(kernels::kPageTokens);
  response->set_steps(load.steps);
  response->set_tokens_generated(load.tokens_generated);
  response->set_preemptions(load.preemptions);
  response->set_draining(serving->engine->Draining());
  return FinishUnary(context, absl::OkStatus());
}

}  // namespace resa::server
