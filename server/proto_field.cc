#include "server/proto_field.h"

#include <cstdint>
#include <limits>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/invalid.h"
#include "engine/status_macros.h"
#include "kernels/check.h"

namespace resa::server {

using engine::Invalid;
using ::google::protobuf::FieldDescriptor;
using ::google::protobuf::Message;
using ::google::protobuf::Reflection;

absl::Status SetField(const FieldDescriptor* field, absl::string_view text, Message* message) {
  const Reflection* reflection = message->GetReflection();
  if (field->is_repeated()) {
    reflection->ClearField(message, field);
    for (absl::string_view part : absl::StrSplit(text, ',')) {
      RESA_ASSIGN_OR_RETURN(const double value, ParseNumber(part));
      reflection->AddDouble(message, field, value);
    }
    return absl::OkStatus();
  }
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_STRING:
      reflection->SetString(message, field, std::string(text));
      return absl::OkStatus();
    case FieldDescriptor::CPPTYPE_INT32: {
      RESA_ASSIGN_OR_RETURN(const int64_t value,
                            ParseInteger(text, std::numeric_limits<int32_t>::min(),
                                         std::numeric_limits<int32_t>::max()));
      reflection->SetInt32(message, field, static_cast<int32_t>(value));
      return absl::OkStatus();
    }
    case FieldDescriptor::CPPTYPE_UINT64: {
      uint64_t value = 0;
      if (!absl::SimpleAtoi(text, &value)) {
        return Invalid("'", text, "' is not a whole number from 0 to 2^64 - 1");
      }
      reflection->SetUInt64(message, field, value);
      return absl::OkStatus();
    }
    case FieldDescriptor::CPPTYPE_FLOAT: {
      RESA_ASSIGN_OR_RETURN(const double value, ParseNumber(text));
      reflection->SetFloat(message, field, static_cast<float>(value));
      return absl::OkStatus();
    }
    case FieldDescriptor::CPPTYPE_DOUBLE: {
      RESA_ASSIGN_OR_RETURN(const double value, ParseNumber(text));
      reflection->SetDouble(message, field, value);
      return absl::OkStatus();
    }
    case FieldDescriptor::CPPTYPE_BOOL: {
      RESA_ASSIGN_OR_RETURN(const bool value, ParseSwitch(text));
      reflection->SetBool(message, field, value);
      return absl::OkStatus();
    }
    default:
      return absl::InternalError(absl::StrCat("no flag can set the type of ", field->name()));
  }
}

FlagSet::Setter FieldSetter(Message* message, absl::string_view field_name) {
  const FieldDescriptor* field = message->GetDescriptor()->FindFieldByName(std::string(field_name));
  RESA_CHECK(field != nullptr) << "no field " << field_name;
  return [message, field](absl::string_view text) { return SetField(field, text, message); };
}

}  // namespace resa::server
