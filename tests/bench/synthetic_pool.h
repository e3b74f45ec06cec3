#ifndef RESA_TESTS_BENCH_SYNTHETIC_POOL_H_
#define RESA_TESTS_BENCH_SYNTHETIC_POOL_H_

// Fills a KV pool as if long prompts had been prefilled, in seconds rather than hours.

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/kv_memory.h"
#include "engine/model_config.h"
#include "kernels/ops.h"

namespace resa::bench {

// Pages of several sequences, dealt in random order from one pool, as in a daemon that has served
// for a while: neighbours in a sequence are not neighbours in memory.
class PageDeal {
 public:
  // Room for `tokens` tokens of each of `sequences` sequences.
  PageDeal(int sequences, int64_t tokens, uint64_t seed);

  int64_t num_pages() const { return static_cast<int64_t>(pages_.size()); }
  int32_t pages_per_sequence() const { return per_sequence_; }
  absl::Span<const int32_t> pages(int sequence) const {
    return absl::MakeConstSpan(pages_).subspan(static_cast<size_t>(sequence) * per_sequence_,
                                               per_sequence_);
  }
  // As PageTable::id(), among the tables of this deal.
  uint64_t pages_id(int sequence) const { return static_cast<uint64_t>(sequence) + 1; }
  kernels::PageTables tables() const { return {pages_.data(), per_sequence_}; }

 private:
  const int32_t per_sequence_;
  std::vector<int32_t> pages_;  // [sequences, per_sequence_]
};

// Writes K and V at positions [0, lengths[s]) of each sequence s, in every layer, and lets the
// backend's own QkvPost make the descriptors from them, so that selection does honest work. Keys
// are normal around a mean of each component's own, values are normal; both are drawn token by
// token from a short bank that lies with the backend, and repeat, though hardly ever a block.
// RESOURCE_EXHAUSTED when the backend has no room for the bank.
absl::Status FillPool(const engine::ModelConfig& config, const engine::KvMemory& memory,
                      const PageDeal& deal, absl::Span<const int64_t> lengths, uint64_t seed,
                      kernels::Ops* ops);

}  // namespace resa::bench

#endif  // RESA_TESTS_BENCH_SYNTHETIC_POOL_H_
