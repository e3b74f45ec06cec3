#include "server/grpc_settings.h"

#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/health_check_service_interface.h"

namespace resa::server {
namespace {

// Prompts of a million tokens fit, as text or as ids.
constexpr int kMaxReceiveBytes = 32 << 20;
// Above what a StreamWriter puts into one message, and above what Tokenize makes of a prompt.
constexpr int kMaxSendBytes = 32 << 20;
// Clients may ping this often, with or without a call in progress.
constexpr int kMinPingInterval_ms = 10'000;
// The server pings a silent connection, and gives it up without an answer.
constexpr int kKeepaliveInterval_ms = 60'000;
constexpr int kKeepaliveTimeout_ms = 20'000;
// Connections end now and then, so that balancers of connections spread clients anew; calls in
// progress get a long time to finish.
constexpr int kMaxConnectionAge_ms = 30 * 60'000;
constexpr int kMaxConnectionAgeGrace_ms = 60 * 60'000;

}  // namespace

void ApplyGrpcSettings(grpc::ServerBuilder* builder) {
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  builder->SetMaxReceiveMessageSize(kMaxReceiveBytes);
  builder->SetMaxSendMessageSize(kMaxSendBytes);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                              kMinPingInterval_ms);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveInterval_ms);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeout_ms);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS, kMaxConnectionAge_ms);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS, kMaxConnectionAgeGrace_ms);
  // Two servers on one port would share its calls by chance.
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
}

}  // namespace resa::server
