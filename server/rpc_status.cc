#include "server/rpc_status.h"

#include <cstdint>
#include <string>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "google/rpc/error_details.pb.h"

namespace resa::server {
namespace {

// "stop.strings[3]" is one, "the prompt" is not.
bool IsFieldPath(absl::string_view text) {
  if (text.empty() || !absl::ascii_islower(text[0])) return false;
  for (const char c : text) {
    if (!absl::ascii_islower(c) && !absl::ascii_isdigit(c) && c != '_' && c != '.' && c != '[' &&
        c != ']') {
      return false;
    }
  }
  return true;
}

std::string Bounded(absl::string_view message) {
  if (message.size() <= kMaxMessageBytes) return std::string(message);
  size_t end = kMaxMessageBytes;
  while (end > 0 && (static_cast<uint8_t>(message[end]) & 0xC0) == 0x80) --end;
  return absl::StrCat(message.substr(0, end), "...");
}

}  // namespace

google::rpc::Status ToRpcStatus(const absl::Status& status) {
  google::rpc::Status rpc;
  rpc.set_code(static_cast<int>(status.code()));
  rpc.set_message(Bounded(status.message()));
  if (absl::IsInvalidArgument(status)) {
    const std::pair<absl::string_view, absl::string_view> parts =
        absl::StrSplit(rpc.message(), absl::MaxSplits(": ", 1));
    if (IsFieldPath(parts.first) && !parts.second.empty()) {
      google::rpc::BadRequest bad_request;
      google::rpc::BadRequest::FieldViolation* violation = bad_request.add_field_violations();
      violation->set_field(std::string(parts.first));
      violation->set_description(std::string(parts.second));
      rpc.add_details()->PackFrom(bad_request);
    }
  }
  return rpc;
}

google::rpc::Status ToRefusal(const absl::Status& status) {
  google::rpc::Status rpc = ToRpcStatus(status);
  if (absl::IsResourceExhausted(status) || absl::IsUnavailable(status)) {
    google::rpc::RetryInfo retry;
    *retry.mutable_retry_delay() = ToProtoDuration(kRetryDelay);
    rpc.add_details()->PackFrom(retry);
  }
  return rpc;
}

google::protobuf::Duration ToProtoDuration(absl::Duration duration) {
  google::protobuf::Duration proto;
  absl::Duration rest;
  proto.set_seconds(absl::IDivDuration(duration, absl::Seconds(1), &rest));
  proto.set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(rest)));
  return proto;
}

}  // namespace resa::server
