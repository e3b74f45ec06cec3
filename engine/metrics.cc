#include "engine/metrics.h"

namespace resa::engine {

const char* NameOf(RejectReason reason) {
  switch (reason) {
    case RejectReason::kQueueFull:
      return "queue_full";
    case RejectReason::kTooLong:
      return "too_long";
    case RejectReason::kInvalid:
      return "invalid";
    case RejectReason::kDraining:
      return "draining";
  }
  return "unknown";
}

}  // namespace resa::engine
