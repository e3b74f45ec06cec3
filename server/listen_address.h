#ifndef RESA_SERVER_LISTEN_ADDRESS_H_
#define RESA_SERVER_LISTEN_ADDRESS_H_

// What can be known of an address before somebody listens on it.

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace resa::server {

// Who can reach a listener.
enum class Reach : uint8_t {
  kLoopback,  // This machine alone.
  kNetwork,
};

// The host of "HOST:PORT", without the brackets of an IPv6 address.
std::string HostOf(absl::string_view address);

// INVALID_ARGUMENT when the host of "HOST:PORT" ("[::1]:80" for an IPv6 address) is neither an
// address nor a name that can be resolved. May ask a name server, and wait for it.
absl::StatusOr<Reach> ResolveListenAddress(absl::string_view address);

}  // namespace resa::server

#endif  // RESA_SERVER_LISTEN_ADDRESS_H_
