#ifndef RESA_ENGINE_IDS_H_
#define RESA_ENGINE_IDS_H_

// Strong types for the numbers that must not be mixed up.

#include <compare>
#include <cstdint>
#include <functional>

namespace resa::engine {

// One Generate call. Ours, unique in the process; the client's request_id is only echoed.
struct RequestId {
  uint64_t value = 0;
  friend auto operator<=>(const RequestId&, const RequestId&) = default;
};

// A page of the KV pool: an index in [0, num_pages).
struct PageId {
  int32_t value = -1;
  friend auto operator<=>(const PageId&, const PageId&) = default;
};

template <typename H>
H AbslHashValue(H h, const RequestId& id) {
  return H::combine(std::move(h), id.value);
}

}  // namespace resa::engine

#endif  // RESA_ENGINE_IDS_H_
