#ifndef RESA_SERVER_RPC_STATUS_H_
#define RESA_SERVER_RPC_STATUS_H_

// From our errors to what goes over the wire beside the status code.

#include <cstddef>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "google/protobuf/duration.pb.h"
#include "google/rpc/status.pb.h"

namespace resa::server {

// When a client that was refused for load should come back.
inline constexpr absl::Duration kRetryDelay = absl::Seconds(1);

// Messages are cut here: a status travels in metadata, of which clients take 8 KiB.
inline constexpr size_t kMaxMessageBytes = 1024;

// The rich form of an error, for the trailer grpc-status-details-bin: code, message, and with
// INVALID_ARGUMENT of the form "field.path: what is wrong" a BadRequest with that field.
google::rpc::Status ToRpcStatus(const absl::Status& status);
// The same for a call that was refused before anything came of it: RESOURCE_EXHAUSTED and
// UNAVAILABLE are then of the moment, and come with a RetryInfo of kRetryDelay.
google::rpc::Status ToRefusal(const absl::Status& status);

google::protobuf::Duration ToProtoDuration(absl::Duration duration);

}  // namespace resa::server

#endif  // RESA_SERVER_RPC_STATUS_H_
