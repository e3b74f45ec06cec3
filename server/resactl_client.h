#ifndef RESA_SERVER_RESACTL_CLIENT_H_
#define RESA_SERVER_RESACTL_CLIENT_H_

// What the commands of resactl share: how to reach the server, and how errors look.

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "google/protobuf/message.h"
#include "resa/v1/inference.grpc.pb.h"
#include "server/flag_set.h"

namespace resa::server {

// One command. `run` gets the arguments after the command's name. INVALID_ARGUMENT means that the
// command line is wrong; errors of a call come back with their own codes.
struct Command {
  const char* name;
  const char* usage;  // Behind the name.
  const char* help;   // One sentence.
  absl::Status (*run)(absl::Span<const std::string> args);
};

absl::Status RunGenerate(absl::Span<const std::string> args);
absl::Status RunTokenize(absl::Span<const std::string> args);
absl::Status RunModel(absl::Span<const std::string> args);
absl::Status RunLoad(absl::Span<const std::string> args);
absl::Status RunHealth(absl::Span<const std::string> args);
absl::Status RunBench(absl::Span<const std::string> args);

// The flags of every command.
struct ClientFlags {
  std::string server = "127.0.0.1:50051";
  absl::Duration timeout = absl::InfiniteDuration();
  bool json = false;

  void AddTo(FlagSet* flags);
};

// Parses `args`; prints the command's flags and returns nothing when --help is among them.
absl::StatusOr<std::optional<std::vector<std::string>>> ParseArgs(
    FlagSet* flags, absl::Span<const std::string> args);

// Messages of any size; pings that keep idle connections open.
std::shared_ptr<grpc::Channel> Connect(const ClientFlags& flags);
// Calls fail at once when nobody listens.
void SetDeadline(const ClientFlags& flags, grpc::ClientContext* context);

// Code and message; that of INVALID_ARGUMENT begins with the field that is wrong.
absl::Status FromGrpcStatus(const grpc::Status& status);

// One line of JSON, with the field names of the .proto; fields at their default are left out, or
// with `all` shown.
std::string ToJson(const google::protobuf::Message& message, bool all = false);

}  // namespace resa::server

#endif  // RESA_SERVER_RESACTL_CLIENT_H_
