#ifndef RESA_ENGINE_PAGE_TABLE_H_
#define RESA_ENGINE_PAGE_TABLE_H_

// The pages of one sequence, in the order of its tokens, and a name for what they are: tables that
// were seen under the same id are the same as far as both go. So whoever keeps a copy for the next
// step, in other memory, need look only at what was appended since.
//
// Thread: the owner's.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace resa::engine {

class PageTable {
 public:
  PageTable() = default;
  PageTable(const PageTable&) = delete;  // Two would have one id.
  PageTable& operator=(const PageTable&) = delete;

  // Appending keeps the id.
  void push_back(int32_t page) { pages_.push_back(page); }
  // All else takes a new one.
  void clear() { Renew().clear(); }
  void Replace(size_t index, int32_t page) { Renew()[index] = page; }
  void Assign(absl::Span<const int32_t> pages) { Renew().assign(pages.begin(), pages.end()); }

  // Of no other table of this process, > 0.
  uint64_t id() const { return id_; }

  const int32_t* data() const { return pages_.data(); }
  size_t size() const { return pages_.size(); }
  bool empty() const { return pages_.empty(); }
  int32_t operator[](size_t index) const { return pages_[index]; }
  auto begin() const { return pages_.begin(); }
  auto end() const { return pages_.end(); }

 private:
  static uint64_t NewId();
  std::vector<int32_t>& Renew() {
    id_ = NewId();
    return pages_;
  }

  uint64_t id_ = NewId();
  std::vector<int32_t> pages_;
};

}  // namespace resa::engine

#endif  // RESA_ENGINE_PAGE_TABLE_H_
