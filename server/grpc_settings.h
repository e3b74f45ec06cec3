#ifndef RESA_SERVER_GRPC_SETTINGS_H_
#define RESA_SERVER_GRPC_SETTINGS_H_

#include "grpcpp/server_builder.h"

namespace resa::server {

// How resad's gRPC server behaves on the wire, ports and services apart: message sizes, keepalive,
// connection age, health checking and reflection.
void ApplyGrpcSettings(grpc::ServerBuilder* builder);

}  // namespace resa::server

#endif  // RESA_SERVER_GRPC_SETTINGS_H_
