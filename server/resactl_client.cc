#include "server/resactl_client.h"

#include <cstdio>
#include <utility>

#include "absl/strings/str_cat.h"
#include "google/protobuf/util/json_util.h"
#include "grpcpp/grpcpp.h"
#include "kernels/check.h"

namespace resa::server {

void ClientFlags::AddTo(FlagSet* flags) {
  flags->Add("server", "HOST:PORT", "the daemon (default 127.0.0.1:50051)", &server);
  flags->Add("timeout", "DURATION", "give up after this long (default: never)", &timeout);
  flags->AddSwitch("json", "print JSON, one object a line", &json);
}

absl::StatusOr<std::optional<std::vector<std::string>>> ParseArgs(
    FlagSet* flags, absl::Span<const std::string> args) {
  bool help = false;
  flags->AddSwitch("help", "print this and exit", &help);
  absl::StatusOr<std::vector<std::string>> rest = flags->Parse(args);
  if (!rest.ok()) return rest.status();
  if (!help) return std::optional(*std::move(rest));
  std::fputs(flags->Help().c_str(), stdout);
  return std::optional<std::vector<std::string>>();
}

std::shared_ptr<grpc::Channel> Connect(const ClientFlags& flags) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetMaxSendMessageSize(-1);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 30'000);
  return grpc::CreateCustomChannel(flags.server, grpc::InsecureChannelCredentials(), arguments);
}

void SetDeadline(const ClientFlags& flags, grpc::ClientContext* context) {
  if (flags.timeout == absl::InfiniteDuration()) return;
  context->set_deadline(absl::ToChronoTime(absl::Now() + flags.timeout));
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

std::string ToJson(const google::protobuf::Message& message, bool all) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = all;
  std::string json;
  const auto status = google::protobuf::util::MessageToJsonString(message, &json, options);
  RESA_CHECK(status.ok()) << status.ToString();
  return json;
}

}  // namespace resa::server
