#include "engine/kv_pool.h"

#include "kernels/check.h"

namespace resa::engine {

KvPool::KvPool(int32_t num_pages) : owners_(num_pages, 0) {
  RESA_CHECK(num_pages > 0);
  free_.reserve(num_pages);
  // From the back, so that the first pages handed out are the first of the memory.
  for (int32_t page = num_pages - 1; page >= 0; --page) free_.push_back(page);
}

std::optional<PageId> KvPool::Allocate() {
  if (free_.empty()) return std::nullopt;
  const PageId page{free_.back()};
  free_.pop_back();
  RESA_CHECK(owners_[page.value] == 0) << "page " << page.value << " was free and owned";
  owners_[page.value] = 1;
  return page;
}

void KvPool::AddOwner(PageId page) {
  RESA_CHECK(owners(page) > 0) << "page " << page.value << " is free";
  ++owners_[page.value];
}

void KvPool::Release(PageId page) {
  RESA_CHECK(owners(page) > 0) << "page " << page.value << " is free already";
  if (--owners_[page.value] == 0) free_.push_back(page.value);
}

int32_t KvPool::owners(PageId page) const {
  RESA_CHECK(page.value >= 0 && page.value < num_pages()) << "page " << page.value;
  return owners_[page.value];
}

}  // namespace resa::engine
