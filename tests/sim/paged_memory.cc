#include "tests/sim/paged_memory.h"

#include <algorithm>

#include "tests/sim/random.h"

namespace resa::sim {

PagedMemory::PagedMemory(int32_t num_pages) : pages_(num_pages) {
  for (int32_t page = 0; page < num_pages; ++page) Poison(page);
}

void PagedMemory::Write(int32_t page, int32_t slot, const Cell& cell) {
  Page& target = pages_[page];
  target.sum -= target.cells[slot];
  target.cells[slot] = cell;
  target.sum += cell;
  target.poisoned = false;
}

void PagedMemory::Poison(int32_t page) {
  for (int32_t slot = 0; slot < kernels::kPageTokens; ++slot) {
    const uint64_t poison = Mix(++poisons_, 0xdead);
    Write(page, slot, Cell{poison, ~poison});
  }
  pages_[page].poisoned = true;
}

Cell PagedMemory::Sum(int32_t page, int32_t slots) const {
  const Page& source = pages_[page];
  if (slots == kernels::kPageTokens) return source.sum;
  Cell sum;
  for (int32_t slot = 0; slot < slots; ++slot) sum += source.cells[slot];
  return sum;
}

Cell PagedMemory::Sum(absl::Span<const int32_t> table, int32_t length) const {
  Cell sum;
  for (int32_t i = 0; i * kernels::kPageTokens < length; ++i) {
    sum +=
        Sum(table[i], std::min<int32_t>(kernels::kPageTokens, length - i * kernels::kPageTokens));
  }
  return sum;
}

}  // namespace resa::sim
