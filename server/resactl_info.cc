#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/status_macros.h"
#include "google/protobuf/text_format.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "grpcpp/grpcpp.h"
#include "server/generate_flags.h"
#include "server/resactl_client.h"

namespace resa::server {
namespace {

using ::grpc::health::v1::HealthCheckRequest;
using ::grpc::health::v1::HealthCheckResponse;

void Print(const google::protobuf::Message& message, bool json) {
  std::string text;
  if (json) {
    text = ToJson(message, /*all=*/true) + "\n";
  } else {
    google::protobuf::TextFormat::PrintToString(message, &text);
  }
  std::fputs(text.c_str(), stdout);
}

// A command without arguments that prints the response of one call.
template <typename Request, typename Response, typename Call>
absl::Status CallAndPrint(absl::Span<const std::string> args, Call call) {
  FlagSet flags;
  ClientFlags client;
  client.AddTo(&flags);
  RESA_ASSIGN_OR_RETURN(const auto words, ParseArgs(&flags, args));
  if (!words.has_value()) return absl::OkStatus();
  if (!words->empty()) {
    return absl::InvalidArgumentError(absl::StrCat("unexpected argument '", (*words)[0], "'"));
  }
  const auto stub = resa::v1::InferenceService::NewStub(Connect(client));
  grpc::ClientContext context;
  SetDeadline(client, &context);
  Response response;
  RESA_RETURN_IF_ERROR(FromGrpcStatus(call(stub.get(), &context, Request(), &response)));
  Print(response, client.json);
  return absl::OkStatus();
}

// Follows the service's health until it serves, for client.timeout at most.
absl::Status AwaitServing(grpc::health::v1::Health::Stub* stub, const ClientFlags& client,
                          const HealthCheckRequest& request) {
  const absl::Time give_up = absl::Now() + client.timeout;
  while (true) {
    grpc::ClientContext context;
    if (give_up != absl::InfiniteFuture()) context.set_deadline(absl::ToChronoTime(give_up));
    context.set_wait_for_ready(true);
    const auto watch = stub->Watch(&context, request);
    HealthCheckResponse response;
    while (watch->Read(&response)) {
      if (response.status() == HealthCheckResponse::SERVING) {
        context.TryCancel();
        return absl::OkStatus();
      }
    }
    // The connection broke, for example because the daemon is only just starting.
    const absl::Status status = FromGrpcStatus(watch->Finish());
    if (absl::Now() >= give_up || !absl::IsUnavailable(status)) return status;
    absl::SleepFor(absl::Milliseconds(200));
  }
}

}  // namespace

absl::Status RunTokenize(absl::Span<const std::string> args) {
  FlagSet flags;
  ClientFlags client;
  GenerateFlags prompt;
  client.AddTo(&flags);
  prompt.AddPromptTo(&flags);
  RESA_ASSIGN_OR_RETURN(const auto words, ParseArgs(&flags, args));
  if (!words.has_value()) return absl::OkStatus();
  RESA_RETURN_IF_ERROR(prompt.SetPrompt(*words));
  if (prompt.request().has_token_ids()) {
    return absl::InvalidArgumentError("--prompt-ids: these are tokens already");
  }
  resa::v1::TokenizeRequest request;
  if (prompt.request().has_chat()) {
    *request.mutable_chat() = prompt.request().chat();
  } else {
    request.set_text(prompt.request().text());
  }
  const auto stub = resa::v1::InferenceService::NewStub(Connect(client));
  grpc::ClientContext context;
  SetDeadline(client, &context);
  resa::v1::TokenizeResponse response;
  RESA_RETURN_IF_ERROR(FromGrpcStatus(stub->Tokenize(&context, request, &response)));
  if (client.json) {
    Print(response, true);
  } else {
    std::puts(absl::StrJoin(response.token_ids(), " ").c_str());
  }
  return absl::OkStatus();
}

absl::Status RunModel(absl::Span<const std::string> args) {
  using resa::v1::GetModelRequest;
  using resa::v1::GetModelResponse;
  return CallAndPrint<GetModelRequest, GetModelResponse>(
      args, [](auto* stub, auto* context, const GetModelRequest& request,
               GetModelResponse* response) { return stub->GetModel(context, request, response); });
}

absl::Status RunLoad(absl::Span<const std::string> args) {
  using resa::v1::GetLoadRequest;
  using resa::v1::GetLoadResponse;
  return CallAndPrint<GetLoadRequest, GetLoadResponse>(
      args, [](auto* stub, auto* context, const GetLoadRequest& request,
               GetLoadResponse* response) { return stub->GetLoad(context, request, response); });
}

absl::Status RunHealth(absl::Span<const std::string> args) {
  FlagSet flags;
  ClientFlags client;
  client.AddTo(&flags);
  bool wait = false;
  std::string service = resa::v1::InferenceService::service_full_name();
  flags.AddSwitch("wait", "wait until it serves, for --timeout at most", &wait);
  flags.Add("service", "NAME", "service to ask for; empty: is the process alive", &service);
  RESA_ASSIGN_OR_RETURN(const auto words, ParseArgs(&flags, args));
  if (!words.has_value()) return absl::OkStatus();

  HealthCheckRequest request;
  request.set_service(service);
  const auto stub = grpc::health::v1::Health::NewStub(Connect(client));
  HealthCheckResponse response;
  if (wait) {
    RESA_RETURN_IF_ERROR(AwaitServing(stub.get(), client, request));
    response.set_status(HealthCheckResponse::SERVING);
  } else {
    grpc::ClientContext context;
    SetDeadline(client, &context);
    RESA_RETURN_IF_ERROR(FromGrpcStatus(stub->Check(&context, request, &response)));
  }
  const std::string name = HealthCheckResponse::ServingStatus_Name(response.status());
  std::puts(client.json ? ToJson(response, true).c_str() : name.c_str());
  if (response.status() == HealthCheckResponse::SERVING) return absl::OkStatus();
  return absl::UnavailableError("the server takes no requests now");
}

}  // namespace resa::server
