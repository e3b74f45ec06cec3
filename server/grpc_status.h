#ifndef RESA_SERVER_GRPC_STATUS_H_
#define RESA_SERVER_GRPC_STATUS_H_

#include "absl/status/status.h"
#include "grpcpp/support/status.h"
#include "server/rpc_status.h"

namespace resa::server {

// The same code, message and details (rpc_status.h) for the wire.
inline grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const google::rpc::Status rpc = ToRpcStatus(status);
  return grpc::Status(static_cast<grpc::StatusCode>(rpc.code()), rpc.message(),
                      rpc.details().empty() ? "" : rpc.SerializeAsString());
}

}  // namespace resa::server

#endif  // RESA_SERVER_GRPC_STATUS_H_
