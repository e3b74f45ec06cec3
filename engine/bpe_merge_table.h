#ifndef RESA_ENGINE_BPE_MERGE_TABLE_H_
#define RESA_ENGINE_BPE_MERGE_TABLE_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace resa::engine {

// From a pair of token ids to the merge's rank and result: open addressing, at most half full,
// 16 bytes an entry. Immutable once filled.
class BpeMergeTable {
 public:
  static constexpr uint32_t kNoRank = UINT32_MAX;
  struct Merge {
    uint32_t rank = kNoRank;  // The smaller, the sooner; kNoRank: the pair does not merge.
    int32_t result = -1;
  };

  BpeMergeTable() : entries_(2) {}
  // Makes room for `count` pairs and forgets all there were.
  void Reset(size_t count);
  // A pair added again takes the new rank and result. REQUIRES room.
  void Add(int32_t left, int32_t right, Merge merge);

  Merge Find(int32_t left, int32_t right) const {
    const uint64_t pair = Key(left, right);
    for (size_t slot = Slot(pair);; slot = (slot + 1) & (entries_.size() - 1)) {
      const Entry& entry = entries_[slot];
      if (entry.pair == pair) return entry.merge;
      if (entry.pair == kEmpty) return {};
    }
  }

 private:
  static constexpr uint64_t kEmpty = UINT64_MAX;  // No pair: ids are below 2^31.
  struct Entry {
    uint64_t pair = kEmpty;
    Merge merge;
  };
  static uint64_t Key(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  // Fibonacci hashing: the upper bits of the product are well mixed.
  size_t Slot(uint64_t pair) const { return (pair * 0x9E3779B97F4A7C15u) >> shift_; }

  std::vector<Entry> entries_;  // A power of two.
  int shift_ = 63;              // 64 - log2(entries_.size())
};

// Merges the symbols of one word. Keeps its buffers between words. Not shared by threads.
class BpeMerger {
 public:
  // Replaces *symbols by what is left once no pair merges. O(n log n).
  void Merge(const BpeMergeTable& table, std::vector<int32_t>* symbols);

 private:
  void MergeShort(const BpeMergeTable& table, std::vector<int32_t>* symbols);
  void MergeLong(const BpeMergeTable& table, std::vector<int32_t>* symbols);

  std::vector<BpeMergeTable::Merge> merges_;  // Of symbol i with the next one.
  std::vector<int32_t> next_;                 // Linked list over the symbols that are left.
  std::vector<int32_t> previous_;
  std::vector<uint64_t> heap_;  // rank << 32 | position of the left symbol
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_BPE_MERGE_TABLE_H_
