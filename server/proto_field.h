#ifndef RESA_SERVER_PROTO_FIELD_H_
#define RESA_SERVER_PROTO_FIELD_H_

// Fields of messages that flags set.

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "google/protobuf/message.h"
#include "server/flag_set.h"

namespace resa::server {

// Sets one field of `message` from a flag's text: a string, a number, a switch ("true", "false"),
// or numbers with commas between them for a repeated field of doubles. INVALID_ARGUMENT when the
// text is none; the ranges are for others to check.
absl::Status SetField(const google::protobuf::FieldDescriptor* field, absl::string_view text,
                      google::protobuf::Message* message);

// The same for a flag. REQUIRES a field of that name; `message` must outlive the setter.
FlagSet::Setter FieldSetter(google::protobuf::Message* message, absl::string_view field_name);

}  // namespace resa::server

#endif  // RESA_SERVER_PROTO_FIELD_H_
