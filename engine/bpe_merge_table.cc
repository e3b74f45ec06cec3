#include "engine/bpe_merge_table.h"

#include <algorithm>
#include <functional>

#include "kernels/check.h"

namespace resa::engine {
namespace {

// Up to here a scan over all pairs beats a heap.
constexpr size_t kShortWord = 32;

}  // namespace

void BpeMergeTable::Reset(size_t count) {
  size_t size = 2;
  shift_ = 63;
  while (size < 2 * count) {
    size *= 2;
    --shift_;
  }
  entries_.assign(size, Entry{});
}

void BpeMergeTable::Add(int32_t left, int32_t right, Merge merge) {
  const uint64_t pair = Key(left, right);
  size_t slot = Slot(pair);
  for (size_t probes = 0; entries_[slot].pair != pair && entries_[slot].pair != kEmpty; ++probes) {
    RESA_CHECK_LT(probes, entries_.size() / 2 + 1);
    slot = (slot + 1) & (entries_.size() - 1);
  }
  entries_[slot] = {pair, merge};
}

void BpeMerger::Merge(const BpeMergeTable& table, std::vector<int32_t>* symbols) {
  if (symbols->size() < 2) return;
  if (symbols->size() <= kShortWord) {
    MergeShort(table, symbols);
  } else {
    MergeLong(table, symbols);
  }
}

void BpeMerger::MergeShort(const BpeMergeTable& table, std::vector<int32_t>* symbols) {
  std::vector<int32_t>& ids = *symbols;
  merges_.resize(ids.size() - 1);
  for (size_t i = 0; i + 1 < ids.size(); ++i) merges_[i] = table.Find(ids[i], ids[i + 1]);
  while (!merges_.empty()) {
    size_t best = 0;
    for (size_t i = 1; i < merges_.size(); ++i) {
      if (merges_[i].rank < merges_[best].rank) best = i;
    }
    if (merges_[best].rank == BpeMergeTable::kNoRank) break;
    ids[best] = merges_[best].result;
    ids.erase(ids.begin() + static_cast<ptrdiff_t>(best) + 1);
    merges_.erase(merges_.begin() + static_cast<ptrdiff_t>(best));
    if (best > 0) merges_[best - 1] = table.Find(ids[best - 1], ids[best]);
    if (best < merges_.size()) merges_[best] = table.Find(ids[best], ids[best + 1]);
  }
}

void BpeMerger::MergeLong(const BpeMergeTable& table, std::vector<int32_t>* symbols) {
  std::vector<int32_t>& ids = *symbols;
  const auto count = static_cast<int32_t>(ids.size());
  RESA_CHECK(static_cast<size_t>(count) == ids.size());
  merges_.assign(ids.size(), {});
  next_.resize(ids.size());
  previous_.resize(ids.size());
  heap_.clear();
  const auto key = [this](int32_t at) {
    return static_cast<uint64_t>(merges_[at].rank) << 32 | static_cast<uint32_t>(at);
  };
  for (int32_t i = 0; i < count; ++i) {
    previous_[i] = i - 1;
    next_[i] = i + 1 < count ? i + 1 : -1;
    if (next_[i] < 0) continue;
    merges_[i] = table.Find(ids[i], ids[i + 1]);
    if (merges_[i].rank != BpeMergeTable::kNoRank) heap_.push_back(key(i));
  }
  std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
  const auto update = [&](int32_t at) {
    merges_[at] = next_[at] < 0 ? BpeMergeTable::Merge{} : table.Find(ids[at], ids[next_[at]]);
    if (merges_[at].rank == BpeMergeTable::kNoRank) return;
    heap_.push_back(key(at));
    std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
  };
  while (!heap_.empty()) {
    std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
    const uint64_t top = heap_.back();
    heap_.pop_back();
    const auto at = static_cast<int32_t>(top & UINT32_MAX);
    // A pair that has changed since it was pushed has another rank: each rank is one pair's.
    if (merges_[at].rank != top >> 32) continue;
    const int32_t right = next_[at];
    ids[at] = merges_[at].result;
    ids[right] = -1;
    merges_[right] = {};
    next_[at] = next_[right];
    if (next_[at] >= 0) previous_[next_[at]] = at;
    update(at);
    if (previous_[at] >= 0) update(previous_[at]);
  }
  ids.erase(std::remove(ids.begin(), ids.end(), -1), ids.end());
}

}  // namespace resa::engine
