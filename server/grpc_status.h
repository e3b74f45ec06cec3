#ifndef RESA_SERVER_GRPC_STATUS_H_
#define RESA_SERVER_GRPC_STATUS_H_

#include "google/rpc/status.pb.h"
#include "grpcpp/support/status.h"

namespace resa::server {

// The same code, message and details for the wire.
inline grpc::Status ToGrpcStatus(const google::rpc::Status& rpc) {
  return grpc::Status(static_cast<grpc::StatusCode>(rpc.code()), rpc.message(),
                      rpc.details().empty() ? "" : rpc.SerializeAsString());
}

}  // namespace resa::server

#endif  // RESA_SERVER_GRPC_STATUS_H_
