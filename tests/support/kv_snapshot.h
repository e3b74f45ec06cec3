#ifndef RESA_TESTS_SUPPORT_KV_SNAPSHOT_H_
#define RESA_TESTS_SUPPORT_KV_SNAPSHOT_H_

// The bytes of one sequence's K, V and descriptors, in an order that does not depend on which pages
// hold them and without what lies behind its end, so that two sequences can be compared bit for
// bit.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "engine/kv_memory.h"
#include "kernels/ops.h"

namespace resa::testing {

struct KvSnapshot {
  int length = 0;
  std::vector<std::byte> keys;         // [layer][kv_head][token][d]
  std::vector<std::byte> values;       // same
  std::vector<std::byte> descriptors;  // By layer, KV head and page; a sketch's only of its tokens.

  friend bool operator==(const KvSnapshot&, const KvSnapshot&) = default;
};

// REQUIRES pages that cover `length` tokens.
KvSnapshot SnapshotKv(const engine::KvMemory& memory, kernels::Ops* ops,
                      absl::Span<const int32_t> pages, int length);

// Which parts differ, and in how many bytes; empty when equal. For messages.
std::string DescribeDifference(const KvSnapshot& a, const KvSnapshot& b);

}  // namespace resa::testing

#endif  // RESA_TESTS_SUPPORT_KV_SNAPSHOT_H_
