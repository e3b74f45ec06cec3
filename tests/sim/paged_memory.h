#ifndef RESA_TESTS_SIM_PAGED_MEMORY_H_
#define RESA_TESTS_SIM_PAGED_MEMORY_H_

// The K/V pool's memory in the simulation: one Cell per token slot. Every page keeps the sum of its
// cells, so that reading or checking a history costs a few words per page.

#include <array>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/params.h"
#include "tests/sim/toy_model.h"

namespace resa::sim {

class PagedMemory {
 public:
  // Every page begins poisoned.
  explicit PagedMemory(int32_t num_pages);

  void Write(int32_t page, int32_t slot, const Cell& cell);
  void Copy(int32_t from, int32_t to) { pages_[to] = pages_[from]; }
  // Makes what the page holds useless to whoever still reads it. A new one each time.
  void Poison(int32_t page);
  bool poisoned(int32_t page) const { return pages_[page].poisoned; }

  const Cell& at(int32_t page, int32_t slot) const { return pages_[page].cells[slot]; }
  // The sum of the first `slots` cells of a page.
  Cell Sum(int32_t page, int32_t slots) const;
  // The sum of the first `length` cells of a sequence with this page table.
  Cell Sum(absl::Span<const int32_t> table, int32_t length) const;

 private:
  struct Page {
    std::array<Cell, kernels::kPageTokens> cells;
    Cell sum;
    bool poisoned = false;
  };
  std::vector<Page> pages_;
  uint64_t poisons_ = 0;
};

}  // namespace resa::sim

#endif  // RESA_TESTS_SIM_PAGED_MEMORY_H_
