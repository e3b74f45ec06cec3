#ifndef RESA_ENGINE_INVALID_H_
#define RESA_ENGINE_INVALID_H_

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace resa::engine {

// INVALID_ARGUMENT with the parts for a message. By custom it begins with the field's path, or the
// flag, and says what is accepted.
template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

}  // namespace resa::engine

#endif  // RESA_ENGINE_INVALID_H_
